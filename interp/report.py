"""The modular-circuit story of one pair of games: computed once, told as text and as one HTML page."""

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8
from numpy import ndarray
from torch import Tensor

from interp import plots, webpage
from interp.atlas import AtlasGames, Described, describe_neurons
from interp.attribution import Contributions, contributions, direct_logit_attribution
from interp.circuits import Circuit, Step, find_circuit
from interp.neurons import input_weights, logit_weights, top_neurons
from interp.patching import patch_sweep, patching_metric
from interp.playback import Playback, as_data, playback
from interp.probes import LinearProbe, ProbeAccuracy, probe_accuracy
from othello_gpt import OthelloGPT, board
from othello_gpt.games import games_to_tokens
from othello_gpt.vocab import (
    square_to_label,
    square_to_token,
    token_to_label,
    token_to_square,
    values_on_board,
)

# Game 4 of the exercise page, which begins with `othello_gpt.games.example_pair`'s clean game.
EXAMPLE_GAME = (
    "C3 C4 C5 E2 F2 C2 D2 E1 F5 B6 C6 B5 C1 B0 B4 E5 F6 B2 F4 B3 E0 G2 A2 D6 F1 G3 F3 D0 A6 G1 "
    "A1 D5 D1 F7 H0 A4 E6 C0 G6 H7 A5 F0 G0 B1 H3 E7 A3 G4 A0 H4 H5 D7 G5 A7 H2 G7 C7 B7 H6"
)


class Pair(NamedTuple):
    """Two games that differ in the last move, and a square that can be answered after the first only."""

    clean: Int8[ndarray, " ply"]
    corrupted: Int8[ndarray, " ply"]
    answer: int


class NeuronReading(NamedTuple):
    """One neuron: what it reads most, which logits it writes most, and its rule."""

    layer: int
    neuron: int
    reads: tuple[tuple[str, float], ...]  # ("C0 blank", cosine)
    writes: tuple[tuple[str, float], ...]  # ("C0", logit for each unit of activation)
    described: Described  # `describe_neurons` on random games


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
    log_probs: tuple[float, float]  # of the answer, clean and corrupted
    neurons: tuple[NeuronReading, ...]  # of one layer, those that vary most
    circuit: Circuit  # `find_circuit`
    carriers: tuple[NeuronReading, ...]  # the neurons of the circuit
    played: Playback  # `playback` of the whole game

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


def find_pair(model: OthelloGPT, clean: Int[ndarray, " ply"]) -> Pair:
    """The other last move, and the reply, for which the model's belief differs most.

    Among the moves legal in place of the last one, and the replies legal after the given move only, the
    pair whose log-probability the model lowers most.

    Raises:
        ValueError: no other last move changes which replies are legal.
    """
    clean = np.asarray(clean, dtype=np.int8)
    if len(clean) < 2:
        raise ValueError("a pair needs games of at least two moves.")
    before, after = board.play(clean[:-1]), board.play(clean)
    alternatives = [s for s in np.flatnonzero(before.legal[-1]) if s != clean[-1]]
    games = [np.array([*clean[:-1], s], dtype=np.int8) for s in alternatives]
    with torch.no_grad():
        log_probs = [
            model(games_to_tokens(g[None]))[0, -1].log_softmax(-1) for g in [clean, *games]
        ]
    found = []
    for game, other in zip(games, log_probs[1:], strict=True):
        record = board.play(game)
        if record.to_move[-1] != after.to_move[-1]:
            continue
        for answer in np.flatnonzero(after.legal[-1] & ~record.legal[-1]):
            token = square_to_token(int(answer))
            drop = (log_probs[0][token] - other[token]).item()
            found.append((drop, Pair(clean, game, int(answer))))
    if not found:
        raise ValueError("no other last move changes which replies are legal: give a longer game.")
    return max(found, key=lambda scored: scored[0])[1]


@torch.no_grad()
def tell(
    model: OthelloGPT,
    probes: Sequence[LinearProbe],
    pair: Pair,
    game: Int[ndarray, " ply"] | None = None,
    n_games: int = 60,
    seed: int = 1,
    progress: bool = False,
) -> Story:
    """Computes the whole story of a pair.

    Args:
        game: the whole game that begins with the pair's clean one; by default it is that one.
        n_games: random games over which probes are scored and neurons ranked; rules are found on twice as many.

    Raises:
        ValueError: `game` does not begin with the clean game.
    """
    game = pair.clean if game is None else game
    if not np.array_equal(game[: len(pair.clean)], pair.clean):
        raise ValueError("`game` must begin with the pair's clean game: its moves differ.")
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
    games = torch.from_numpy(board.random_games(n_games, seed))
    accuracy = probe_accuracy(model, probes, games)
    next(steps)
    believed = [
        probe.probabilities(cache["resid_post", probe.layer][0, -1]) @ torch.tensor([0.0, -1, 1])
        for probe in probes
    ]
    best = probes[int(accuracy.by_layer.argmax())]
    layer = model.cfg.n_layers - 3  # where the exercise looks: layer 5 of 8
    _, varied = model.run_with_cache(games_to_tokens(games), f"post{layer}")
    varying = [(layer, neuron) for neuron in top_neurons(varied, layer, 6).tolist()]
    next(steps)
    circuit = find_circuit(model, clean, corrupted, token)
    steps_of_chains = (step.writer for chain in circuit.chains for step in chain.steps)
    carrying = {w[1:]: None for w in steps_of_chains if w.kind == "neuron"}
    rule_games = AtlasGames.random(2 * n_games, seed)
    neurons = _read_neurons(model, best, [*varying, *carrying], rule_games)
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
        log_probs=(log_probs[0], log_probs[1]),
        neurons=neurons[: len(varying)],
        circuit=circuit,
        carriers=tuple(sorted(neurons[len(varying) :], key=lambda reading: reading[:2])),
        played=playback(model, probes, game, {len(pair.clean) - 1: token}),
    )


def _steps(progress: bool) -> Iterator[None]:
    names = (
        "running the pair",
        "patching",
        "scoring probes",
        "ranking neurons",
        "finding rules",
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
    model: OthelloGPT, probe: LinearProbe, places: Sequence[tuple[int, int]], games: AtlasGames
) -> tuple[NeuronReading, ...]:
    directions = torch.stack(probe.normalised(), dim=-1)  # [d_model, 8, 8, (blank, mine)]
    described = {}
    for layer in {layer for layer, _ in places}:
        neurons = sorted({neuron for other, neuron in places if other == layer})
        found = describe_neurons(model, layer, games, neurons)
        described |= {(layer, each.neuron): each for each in found}
    readings = []
    for layer, neuron in places:
        reads = input_weights(model, layer, directions)[neuron].flatten()  # [(square, kind)]
        read = [_named_read(i, reads[i].item()) for i in reads.abs().topk(3).indices.tolist()]
        writes = logit_weights(model, layer, neuron)
        written = [
            (token_to_label(i + 1), writes[i].item()) for i in writes.topk(2).indices.tolist()
        ]
        rule = described[layer, neuron]
        readings.append(NeuronReading(layer, neuron, tuple(read), tuple(written), rule))
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
            f"Neurons of layer {story.neurons[0].layer} that vary most:",
            *map(_neuron_line, story.neurons),
            "",
            f"What carries {answer}, from the last move up (%: share of the next one's difference):",
            *(f"  {_chain_line(chain.steps)}" for chain in story.circuit.chains),
            *map(_neuron_line, story.carriers),
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


def _neuron_line(reading: NeuronReading) -> str:
    reads = ", ".join(f"{name} {cosine:.2f}" for name, cosine in reading.reads)
    writes = ", ".join(f"{name} {weight:+.2f}" for name, weight in reading.writes)
    d = reading.described
    return (
        f"  L{reading.layer}N{reading.neuron}: reads {reads}; writes {writes}; "
        f"{d.rule} (F1 {d.score.f1:.2f} on other games)"
    )


def _chain_line(steps: Sequence[Step]) -> str:
    return " > ".join(f"{step.writer} ({step.share:.0%})" for step in steps)


# --- As a page --------------------------------------------------------------------------------------


def page(story: Story) -> str:
    """The story as one self-contained HTML page: pictures as SVG, a little script for the slider, no network."""
    answer = square_to_label(story.pair.answer)
    body = "".join(
        [
            f"<h1>Why Othello-GPT thinks {answer} is legal</h1>",
            f"<p>A transformer that only ever saw lists of moves, looked at inside. After "
            f"{_labels(story.pair.clean)} {_colour_of(story)} can play {answer}: which board does the model "
            "believe in, who writes the move's logit, and what carries the last move there?</p>",
            _moves_section(story),
            _pair_sections(story, answer),
            _circuit_section(story, answer),
            _section(
                f"Neurons of layer {story.neurons[0].layer} that vary most",
                _neuron_table(story.neurons),
            ),
            _section(
                "How right the probes are",
                _card(
                    plots.plot_lines({"squares right": story.accuracy.by_layer}, x_title="layer")
                ),
                "Linear probes of empty, theirs and mine on random games.",
            ),
        ]
    )
    data = {"story": as_data(story.played)}
    return webpage.document(f"Othello-GPT: {answer}", body, data, ("boards.js", "report.js"))


def _moves_section(story: Story) -> str:
    """The slider and what it moves; without scripts it shows the pair's last move."""
    ply, played = len(story.pair.clean) - 1, story.played
    state, last = story.record.state[-1], int(story.pair.clean[-1])
    true = state * int(story.record.to_move[-1])
    layers = [f"layer {layer}" for layer in range(len(story.believed))]
    drawn = {
        "board": plots.plot_board(state, story.legal, last, f"{_colour_of(story)} to move"),
        "predicted": plots.plot_board_values(
            values_on_board(story.probabilities), ["the model's next move"], pieces=state
        ),
        "truth": plots.plot_board_values(true, ["the truth"], pieces=state),
        "believed": plots.plot_board_values(story.believed, layers, pieces=state, last_move=last),
        "parts": plots.plot_bars(played.labels, played.parts[ply]),
        "heads": "",
    }
    return (
        "<section><h2>The game, move by move</h2>"
        '<div class="bar" role="group" aria-label="Move"><button id="back" aria-label="Back">&#9664;</button>'
        f'<input type="range" id="move" min="0" max="{len(played.squares) - 1}" value="{ply}" '
        'aria-label="Move of the game"><button id="forward" aria-label="Forward">&#9654;</button>'
        '<button id="play">Play</button><output id="status" for="move" aria-live="polite"></output></div>'
        f'<div class="row"><div class="card fill" id="board">{drawn["board"]}</div>'
        f'<div class="card fill" id="predicted">{drawn["predicted"]}</div><div class="card">'
        '<h3>Legal moves against predicted</h3><p id="legality"></p><ul class="chips" id="moves"></ul>'
        '<p class="soft">Dots mark legal moves. Arrow keys move through the game.</p></div></div>'
        "<h3>The board that each layer believes in</h3>"
        '<p class="soft">P(mine) - P(theirs) by the linear probe of each layer: blue is mine, red theirs, of '
        "whoever moves next. Discs show the real board; a red frame is a square read wrong.</p>"
        f'<div class="card boards"><div id="truth">{drawn["truth"]}</div>'
        f'<div id="believed" style="display:contents">{drawn["believed"]}</div></div>'
        '<h3>Who writes the logit of <span id="explained"></span></h3>'
        '<p class="soft">Direct logit attribution: what each part adds to the logit, LayerNorm\'s scale held. '
        "At the pair's last move it is the answer's, elsewhere that of the likeliest move.</p>"
        f'<div class="row"><div class="card" id="parts">{drawn["parts"]}</div>'
        f'<div class="card" id="heads">{drawn["heads"]}</div></div></section>'
    )


def _pair_sections(story: Story, answer: str) -> str:
    layers = [f"layer {layer}" for layer in range(len(story.believed))]
    effects = {site: story.effects[site] for site in ("attn_out", "mlp_out")}
    heads = story.effects["z"]
    names = [f"head {h}" for h in range(heads.shape[1])]
    return _section(
        f"What restores {answer}",
        '<div class="row">'
        + _card(plots.plot_lines(effects, x_title="layer", y_title="restored"))
        + _card(plots.plot_grid(heads.T, names, layers, "by head"))
        + "</div>",
        f"The corrupted game ends in {square_to_label(int(story.pair.corrupted[-1]))}; there {answer} has "
        f"log-probability {story.log_probs[1]:.3f}, in the clean game {story.log_probs[0]:.3f}. One activation "
        "of the last move comes from the clean run; 1 means fully restored, 0 not at all.",
    ) + _section(
        "Who writes mine and theirs",
        _card(_written_boards(story)),
        f"What each layer writes along mine minus theirs of each square, up to layer {story.last_layer}, whose "
        "probe reads the board best. Blue writes mine, red theirs. The sum with what the embeddings write is "
        f"the probe's score; {square_to_label(story.turned)}, turned by the last move, has {story.score:+.2f}.",
    )


def _circuit_section(story: Story, answer: str) -> str:
    return _section(
        f"What carries {answer}",
        _card(circuit_graph(story.circuit), "wide") + _neuron_table(story.carriers),
        f"The logit of {answer} differs by {story.circuit.difference:+.2f} between the two games. From the "
        "neurons that restore most when patched alone, each line goes to the largest part of what they read; "
        "its number is the part's share of the difference, and below each name stands what patching it alone "
        "restores. A chain ends at a head, which looks at earlier moves, or at the last move itself.",
    )


def circuit_graph(circuit: Circuit) -> plots.Svg:
    """The chains as a drawing, what starts them on the left and the move on the right."""
    answer = token_to_label(circuit.token)
    nodes, edges, last = {}, {}, 0
    for chain in circuit.chains:
        names = [str(step.writer) for step in chain.steps] + [answer]
        for step, name, later in zip(chain.steps, names, names[1:], strict=False):
            column = 2 * step.writer.layer + (step.writer.kind == "neuron")
            words = "last move" if step.restored is None else f"{step.restored:z.2f}"
            nodes[name], last = (column, words), max(last, column)
            edges[name, later] = step.share
    nodes[answer] = (last + 1, f"{circuit.difference:+.2f}")
    return plots.plot_graph(nodes, [(*ends, share) for ends, share in edges.items()])


def _section(title: str, content: str, words: str = "") -> str:
    return (
        f"<section><h2>{title}</h2>" + (f"<p>{words}</p>" if words else "") + content + "</section>"
    )


def _card(svg: plots.Svg, kind: str = "") -> str:
    return f'<figure class="card {kind}">{svg}</figure>'


def _written_boards(story: Story) -> plots.Svg:
    parts = {part: story.written_by(part) for part in ("attn", "mlp")}
    titles = [f"{part} {layer}" for part, boards in parts.items() for layer in range(len(boards))]
    return plots.plot_board_values(
        torch.cat([*parts.values()]),
        titles,
        boards_per_row=story.last_layer + 1,
        pieces=story.record.state[-1],
        last_move=int(story.pair.clean[-1]),
        size=min(200, 1040 // (story.last_layer + 1)),
    )


_COLUMNS = (
    "neuron",
    "rule",
    "F1 on other games",
    "variance explained",
    "what it adds to the move it writes most",
    "reads most (cosine with the probe)",
    "writes most (logits)",
)


def _neuron_table(neurons: Sequence[NeuronReading]) -> str:
    rows = []
    for reading in neurons:
        d = reading.described
        cells = (
            f"L{reading.layer}N{reading.neuron}",
            str(d.rule),
            f"{d.score.f1:.2f}",
            f"{d.score.explained:.0%}",
            check_in_words(d),
            ", ".join(f"{name} ({cosine:.2f})" for name, cosine in reading.reads),
            ", ".join(f"{name} ({weight:+.2f})" for name, weight in reading.writes),
        )
        named = zip(_COLUMNS, cells, strict=True)
        rows.append("".join(f'<td data-label="{name}">{cell}</td>' for name, cell in named))
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="card"><table class="stacked"><tr>{head}</tr>{body}</table></div>'


def check_in_words(described: Described) -> str:
    """What the causal check found: the effect where the rule says so, against where it does not."""
    check = described.check
    if check is None:
        return "too few positions to say"
    verdict = "it acts on its rule" if check.passed else "not shown to act on it"
    return (
        f"{check.effect:+z.2f} to {token_to_label(check.token)} when it should fire, {check.control:+z.2f} "
        f"when not: {verdict}"
    )


def write_page(story: Story, path: str | Path) -> None:
    """Writes the page, whole or not at all."""
    webpage.write(page(story), path)
