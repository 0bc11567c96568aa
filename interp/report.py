"""The modular-circuit story of one pair of games: computed once, told as text and as one HTML page."""

import html
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interp import plots
from interp.attribution import Contributions, contributions, direct_logit_attribution
from interp.neurons import input_weights, logit_weights, top_neurons
from interp.pairs import find_pairs, pair_tokens, pairs_metric
from interp.patching import patch_sweep, patching_metric
from interp.probes import LinearProbe, ProbeAccuracy, probe_accuracy
from othello_gpt import OthelloGPT, board
from othello_gpt.bootstrap import Estimate, bootstrap_mean
from othello_gpt.games import Pair, games_to_tokens
from othello_gpt.vocab import (
    square_to_label,
    square_to_token,
    token_to_label,
    token_to_square,
    values_on_board,
)


class NeuronReading(NamedTuple):
    """One neuron: what it reads most and which logits it writes most."""

    layer: int
    neuron: int
    reads: tuple[tuple[str, float], ...]  # ("C0 blank", cosine)
    writes: tuple[tuple[str, float], ...]  # ("C0", logit for each unit of activation)


class Story(NamedTuple):
    """All that the report tells; every figure can be had from the calls named beside it."""

    pair: Pair
    record: board.Record  # `board.play(pair.clean)`
    probabilities: Float[Tensor, " d_vocab"]  # `model(tokens)[0, -1].softmax(-1)`
    believed: Float[Tensor, "layer 8 8"]  # P(mine) - P(theirs) by each layer's probe, last position
    accuracy: ProbeAccuracy  # `probe_accuracy` on random games
    contributions: Contributions  # `direct_logit_attribution` of the answer
    written: Contributions  # `contributions` to "mine" of every square, [component 1 1 8 8]
    effects: dict[str, Float[Tensor, "layer *part"]]  # `patch_sweep`
    n_pairs: int  # over which the next is averaged: `find_pairs` in random games
    averages: dict[str, Estimate]  # `bootstrap_mean` of `patch_sweep`, by layer
    log_probs: tuple[float, float]  # of the answer, clean and corrupted
    neurons: tuple[NeuronReading, ...]

    @property
    def legal(self) -> Bool[ndarray, "8 8"]:
        return self.record.legal[-1]

    @property
    def turned(self) -> int:
        """The disc that the last move turned and whose colour the model is surest of: a square."""
        sureness = self.written.total[0, 0].abs().numpy()
        return int(np.where(self.record.flipped[-1], sureness, -1).argmax())

    @property
    def score(self) -> float:
        """How strongly that disc is read as mine (positive) or theirs, in logits."""
        return self.written.total[0, 0].flatten()[self.turned].item()

    @property
    def last_layer(self) -> int:
        """The layer after which `written` is read: that of the best probe."""
        return len(self.written_by("mlp")) - 1

    def written_by(self, part: str) -> Float[Tensor, "layer 8 8"]:
        """What "attn" or "mlp" of each layer writes to "mine" of every square."""
        chosen = [i for i, name in enumerate(self.written.labels) if name.startswith(part)]
        return self.written.values[chosen, 0, 0]


def shipped_probes() -> list[LinearProbe]:
    """The probes of every layer that ship with the packaged model."""
    path = resources.files("othello_gpt") / "assets" / "small" / "probes.safetensors"
    return LinearProbe.load_all(Path(str(path)))


@torch.no_grad()
def tell(
    model: OthelloGPT,
    probes: Sequence[LinearProbe],
    pair: Pair,
    n_games: int = 60,
    n_pairs: int = 300,
    seed: int = 1,
    progress: bool = False,
) -> Story:
    """Computes the whole story of a pair.

    Args:
        n_games: random games over which probes are scored and neurons ranked.
        n_pairs: pairs from random games over which the sweep is averaged.
    """
    steps = _steps(progress)
    next(steps)
    clean, corrupted = (games_to_tokens(game[None]) for game in (pair.clean, pair.corrupted))
    logits, cache = model.run_with_cache(clean)
    corrupted_logits = model(corrupted)
    token = square_to_token(pair.answer)
    next(steps)
    metric = patching_metric(logits, corrupted_logits, token)
    effects = patch_sweep(model, clean, corrupted, metric, sites=("attn_out", "mlp_out", "z"))
    next(steps)
    n_found, averages = _average_sweep(model, n_pairs, seed)
    next(steps)
    games = torch.from_numpy(board.random_games(n_games, seed))
    accuracy = probe_accuracy(model, probes, games)
    next(steps)
    believed = [
        probe.probabilities(cache["resid_post", probe.layer][0, -1]) @ torch.tensor([0.0, -1, 1])
        for probe in probes
    ]
    best = probes[int(accuracy.by_layer.argmax())]
    layer = model.cfg.n_layers - 3  # where the exercise looks: layer 5 of 8
    neurons = _read_neurons(model, best, layer, games)
    next(steps)
    log_probs = [lg[0, -1].log_softmax(-1)[token].item() for lg in (logits, corrupted_logits)]
    return Story(
        pair=pair,
        record=board.play(pair.clean),
        probabilities=logits[0, -1].softmax(-1),
        believed=torch.stack(believed),
        accuracy=accuracy,
        contributions=direct_logit_attribution(model, cache, token),
        written=contributions(cache.select(pos=-1), best.mine, best.layer),
        effects=effects,
        n_pairs=n_found,
        averages=averages,
        log_probs=(log_probs[0], log_probs[1]),
        neurons=neurons,
    )


def _average_sweep(model: OthelloGPT, n_pairs: int, seed: int) -> tuple[int, dict[str, Estimate]]:
    """The sweep averaged over pairs in which one reply changes and the model's belief falls by a nat."""
    ranked = find_pairs(model, board.random_games(4 * n_pairs, seed), (16, 21, 26))
    pairs = [each.pair for each in ranked if each.drop > 1][:n_pairs]
    if not pairs:
        raise ValueError(f"no pair was found in {4 * n_pairs} games: average over more.")
    clean, corrupted, _ = pair_tokens(pairs)
    effects = patch_sweep(model, clean, corrupted, pairs_metric(model, pairs))
    return len(pairs), {site: bootstrap_mean(of_site) for site, of_site in effects.items()}


def _steps(progress: bool) -> Iterator[None]:
    names = (
        "running the pair",
        "patching",
        "averaging",
        "scoring probes",
        "reading neurons",
        "done",
    )
    if not progress:
        yield from (None for _ in names)
        return
    from tqdm.auto import tqdm

    with tqdm(names) as bar:
        for name in bar:
            bar.set_description(name)
            yield


def _read_neurons(
    model: OthelloGPT, probe: LinearProbe, layer: int, games: Int[Tensor, "game ply"], k: int = 6
) -> tuple[NeuronReading, ...]:
    _, cache = model.run_with_cache(games_to_tokens(games), f"post{layer}")
    directions = torch.stack(probe.normalised(), dim=-1)  # [d_model, 8, 8, (blank, mine)]
    reads = input_weights(model, layer, directions).flatten(1, 2)  # [d_mlp, square, kind]
    readings = []
    for neuron in top_neurons(cache, layer, k).tolist():
        strongest = reads[neuron].abs().flatten().topk(3).indices.tolist()
        read = [_named_read(i, reads[neuron].flatten()[i].item()) for i in strongest]
        writes = logit_weights(model, layer, neuron)
        written = [
            (token_to_label(i + 1), writes[i].item()) for i in writes.topk(2).indices.tolist()
        ]
        readings.append(NeuronReading(layer, neuron, tuple(read), tuple(written)))
    return tuple(readings)


def _named_read(index: int, cosine: float) -> tuple[str, float]:
    square, kind = divmod(index, 2)
    states = (("blank", "occupied"), ("mine", "theirs"))[kind]
    return f"{square_to_label(square)} {states[0] if cosine > 0 else states[1]}", abs(cosine)


# --- As text ----------------------------------------------------------------------------------------


def summary(story: Story) -> str:
    """The story in a screenful of text."""
    pair, answer = story.pair, square_to_label(story.pair.answer)
    top = story.probabilities.topk(int(story.legal.sum())).indices.tolist()
    predicted = [(token_to_square(token), story.probabilities[token].item()) for token in top]
    right = sum(bool(square >= 0 and story.legal.flat[square]) for square, _ in predicted)
    return "\n".join(
        [
            f"Clean game:     {_labels(pair.clean)}",
            f"Corrupted game: ... {square_to_label(int(pair.corrupted[-1]))} in place of the last move",
            f"Legal replies ({_colour_of(story)}): {_labels(np.flatnonzero(story.legal))}",
            f"The model's top {len(predicted)} hold {right} of them; all replies of the rules have "
            f"{_legal_mass(story):.1%} of its probability",
            f"Log-probability of {answer}: {story.log_probs[0]:.3f} clean, {story.log_probs[1]:.3f} corrupted",
            "",
            "Probes (empty, theirs, mine) by layer: "
            + " ".join(f"{share:.1%}" for share in story.accuracy.by_layer.tolist()),
            "",
            f"Who writes the logit of {answer} (sum misses it by {story.contributions.gap:.1e}):",
            "  " + ", ".join(f"{name} {value:+.2f}" for name, value in _largest(story, 6)),
            "",
            f'Who writes "mine" at {square_to_label(story.turned)}, turned by the last move, by layer '
            f"(score {story.score:+.2f} after layer {story.last_layer}; the embeddings write the rest):",
            *(
                f"  {part:9} "
                + " ".join(
                    f"{value:7.2f}" for value in story.written_by(part).flatten(1)[:, story.turned]
                )
                for part in ("attn", "mlp")
            ),
            "",
            f"Patching the last move's activations, clean into corrupted (1 = {answer} fully restored):",
            *(
                f"  {site:9} " + " ".join(f"{value:7.3f}" for value in story.effects[site].tolist())
                for site in ("attn_out", "mlp_out")
            ),
            "",
            f"The same, mean over {story.n_pairs} pairs in which one reply changes (95 % interval):",
            *(
                f"  {site:9} {layer}: {mean:6.3f} ({low:.3f} to {high:.3f})"
                for site, layer, mean, low, high in _average_rows(story)
            ),
            "",
            f"Neurons of layer {story.neurons[0].layer} that vary most:",
            *map(_neuron_line, story.neurons),
        ]
    )


def _labels(squares: Sequence[int] | ndarray) -> str:
    return " ".join(square_to_label(int(square)) for square in squares)


def _colour_of(story: Story) -> str:
    return "black" if story.record.to_move[-1] == board.BLACK else "white"


def _legal_mass(story: Story) -> float:
    tokens = square_to_token(np.flatnonzero(story.legal))
    return story.probabilities[torch.from_numpy(tokens)].sum().item()


def _largest(story: Story, k: int) -> list[tuple[str, float]]:
    values = story.contributions.values[:, 0]
    order = values.abs().argsort(descending=True)[:k].tolist()
    return [(story.contributions.labels[i], values[i].item()) for i in order]


def _average_rows(story: Story) -> list[tuple[str, int, float, float, float]]:
    return [
        (site, layer, *values)
        for site, interval in story.averages.items()
        for layer, values in enumerate(torch.stack(interval).T.tolist())
    ]


def _neuron_line(reading: NeuronReading) -> str:
    reads = ", ".join(f"{name} {cosine:.2f}" for name, cosine in reading.reads)
    writes = ", ".join(f"{name} {weight:+.2f}" for name, weight in reading.writes)
    return f"  L{reading.layer}N{reading.neuron}: reads {reads}; writes {writes}"


# --- As a page --------------------------------------------------------------------------------------

_STYLE = """
:root { --ink: #222; --line: #999; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --line: #777; --paper: #1b1d20; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
       max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
figure { margin: 1rem 0; overflow-x: auto; } .pair { display: flex; flex-wrap: wrap; align-items: start;
       gap: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: left;
       border-bottom: 1px solid var(--line); }
@media print { h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


def page(story: Story) -> str:
    """The story as one self-contained HTML page: no scripts, no network, pictures as SVG."""
    answer = square_to_label(story.pair.answer)
    state, last = story.record.state[-1], int(story.pair.clean[-1])
    layers = [f"layer {layer}" for layer in range(len(story.believed))]
    effects = {site: story.effects[site] for site in ("attn_out", "mlp_out")}
    averages = {site: interval.value for site, interval in story.averages.items()}
    heads = story.effects["z"]
    legal = plots.plot_board(state, story.legal, last, f"{_colour_of(story)} to move")
    probabilities = plots.plot_board_values(
        values_on_board(story.probabilities),
        ["the model's probabilities"],
        pieces=state,
        last_move=last,
    )
    believed = plots.plot_board_values(story.believed, layers, pieces=state, last_move=last)
    mover = int(story.record.to_move[-1])
    true = plots.plot_board_values(state * mover, ["the truth: mine +1, theirs -1"], pieces=state)
    contributions = story.contributions
    sections = [
        ("The position", f"<p>{html.escape(_labels(story.pair.clean))}. Dots: legal replies.</p>"),
        ("", f"<div class=pair>{legal}{probabilities}</div>"),
        (
            "What the model believes, layer by layer",
            "<p>P(mine) - P(theirs) of each square, read by the linear probe of each layer; discs "
            f"show the real board.</p><figure>{believed}</figure><figure>{true}</figure>",
        ),
        (
            "How right the probes are",
            _figure(plots.plot_lines({"squares right": story.accuracy.by_layer}, x_title="layer")),
        ),
        (
            "Who writes mine and theirs",
            f"<p>What each layer writes along mine minus theirs of each square, up to layer {story.last_layer}, "
            "whose probe reads the board best. Blue writes mine, red theirs. The sum with what the "
            f"embeddings write is the probe's score; {square_to_label(story.turned)}, turned by the last "
            f"move, has {story.score:+.2f}.</p><figure>{_written_boards(story)}</figure>",
        ),
        (
            f"Who writes the logit of {answer}",
            "<p>Direct logit attribution, final LayerNorm's scale held; the parts sum to the logit but for "
            f"{contributions.gap:.1e}.</p>"
            + _figure(plots.plot_bars(contributions.labels, contributions.values[:, 0])),
        ),
        (
            "What restores it",
            f"<p>The corrupted game ends in {square_to_label(int(story.pair.corrupted[-1]))}; there "
            f"{answer} has log-probability {story.log_probs[1]:.3f}, in the clean game "
            f"{story.log_probs[0]:.3f}. One activation of the last move comes from the clean run; 1 means "
            "fully restored, 0 not at all.</p>"
            + _figure(plots.plot_lines(effects, x_title="layer", y_title="restored"))
            + _figure(
                plots.plot_grid(
                    heads.T,
                    [f"head {h}" for h in range(heads.shape[1])],
                    layers,
                    "by head",
                )
            ),
        ),
        (
            f"What restores a reply on average over {story.n_pairs} pairs",
            "<p>Pairs from random games that differ in the last move only, where exactly one reply changes "
            "legality; mean and 95 % bootstrap interval.</p>"
            + _figure(plots.plot_lines(averages, x_title="layer", y_title="restored"))
            + _average_table(story),
        ),
        (f"Neurons of layer {story.neurons[0].layer} that vary most", _neuron_table(story.neurons)),
    ]
    body = "".join((f"<h2>{title}</h2>" if title else "") + content for title, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Othello-GPT: {answer}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Why Othello-GPT thinks {answer} is legal</h1>{body}</body></html>"
    )


def _written_boards(story: Story) -> plots.Svg:
    parts = {part: story.written_by(part) for part in ("attn", "mlp")}
    titles = [f"{part} {layer}" for part, boards in parts.items() for layer in range(len(boards))]
    return plots.plot_board_values(
        torch.cat([*parts.values()]),
        titles,
        boards_per_row=story.last_layer + 1,
        pieces=story.record.state[-1],
        last_move=int(story.pair.clean[-1]),
        size=min(200, 960 // (story.last_layer + 1)),
    )


def _figure(svg: plots.Svg) -> str:
    return f"<figure>{svg}</figure>"


def _average_table(story: Story) -> str:
    rows = "".join(
        f"<tr><td>{site}<td>{layer}<td>{mean:.3f}<td>{low:.3f} to {high:.3f}</tr>"
        for site, layer, mean, low, high in _average_rows(story)
    )
    return f"<table><tr><th>site<th>layer<th>mean<th>interval</tr>{rows}</table>"


def _neuron_table(neurons: Sequence[NeuronReading]) -> str:
    rows = []
    for reading in neurons:
        reads = ", ".join(f"{name} ({cosine:.2f})" for name, cosine in reading.reads)
        writes = ", ".join(f"{name} ({weight:+.2f})" for name, weight in reading.writes)
        rows.append(f"<tr><td>L{reading.layer}N{reading.neuron}<td>{reads}<td>{writes}</tr>")
    head = "<tr><th>neuron<th>reads most (cosine with the probe)<th>writes most (logits)</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def write_page(story: Story, path: str | Path) -> None:
    """Writes the page, whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(page(story), encoding="utf-8")
    partial.replace(path)
