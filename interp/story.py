"""The modular-circuit story of one pair of games: computed once, and told in a screenful of text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interp.atlas import AtlasGames, Described, describe_neurons
from interp.attribution import Contributions, contributions, direct_logit_attribution
from interp.circuits import Circuit, Step, find_circuit
from interp.gradients import Agreement, agreement, attribution_sweep
from interp.neurons import input_weights, logit_weights, top_neurons
from interp.pairs import pair_tokens, pairs_metric, sure_pairs
from interp.patching import patch_sweep, patching_metric
from interp.playback import Playback, playback
from interp.probe_types import SHIPPED
from interp.probes import LinearProbe, ProbeAccuracy, probe_accuracy
from othello_gpt import ActivationCache, OthelloGPT, board
from othello_gpt.bootstrap import Estimate, bootstrap_mean
from othello_gpt.games import Pair, games_to_tokens
from othello_gpt.vocab import (
    square_to_label,
    square_to_token,
    token_to_label,
    token_to_square,
)


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
    # `contributions` to "mine" of every square, [component 1 1 8 8], and the probe's "bias": they sum to its logits
    written: Contributions
    effects: dict[str, Float[Tensor, "layer *part"]]  # `patch_sweep`
    n_pairs: int  # over which the next two are: `sure_pairs`
    averages: dict[str, Estimate]  # `bootstrap_mean` of `patch_sweep`, by layer
    agreements: dict[str, Agreement]  # of `attribution_sweep` with it
    log_probs: tuple[float, float]  # of the answer, clean and corrupted
    neurons: tuple[NeuronReading, ...]  # of one layer, those that vary most
    circuit: Circuit  # `find_circuit`
    carriers: tuple[NeuronReading, ...]  # the neurons of the circuit
    played: Playback  # `playback` of the whole game

    @property
    def legal(self) -> Bool[ndarray, "8 8"]:
        return self.record.legal[-1]

    @property
    def colour(self) -> str:
        """Who moves next: "black" or "white"."""
        return "black" if self.record.to_move[-1] == board.BLACK else "white"

    def average_rows(self) -> list[tuple[str, int, float, float, float]]:
        """The averages as (site, layer, mean, low, high)."""
        return [
            (site, layer, *values)
            for site, interval in self.averages.items()
            for layer, values in enumerate(torch.stack(interval).T.tolist())
        ]

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
    """The probes after every block that ship with the packaged model."""
    return [probe for probe in LinearProbe.load_all(SHIPPED) if probe.layer >= 0]


@torch.no_grad()
def tell(
    model: OthelloGPT,
    probes: Sequence[LinearProbe],
    pair: Pair,
    game: Int[ndarray, " ply"] | None = None,
    n_games: int = 60,
    n_pairs: int = 300,
    seed: int = 1,
    progress: bool = False,
) -> Story:
    """Computes the whole story of a pair.

    Args:
        game: the whole game that begins with the pair's clean one; by default it is that one.
        n_games: random games over which probes are scored and neurons ranked; rules are found on twice as many.
        n_pairs: pairs over which the sweep is averaged, see `sure_pairs`.

    Raises:
        ValueError: `game` does not begin with the clean game, `probes` are not those of all layers in order, or
            the answer is not a legal reply to the clean game only.
    """
    game = pair.clean if game is None else game
    _check_asked(model, probes, pair, game)
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
    pairs = sure_pairs(model, n_pairs, seed)
    averages, agreements = _average_sweep(model, pairs)
    next(steps)
    games = torch.from_numpy(board.random_games(n_games, seed))
    accuracy = probe_accuracy(model, probes, games)
    next(steps)
    best = probes[int(accuracy.by_layer.argmax())]
    layer = max(model.cfg.n_layers - 3, 0)  # where the exercise looks: layer 5 of 8
    _, varied = model.run_with_cache(games_to_tokens(games), f"post{layer}")
    varying = [(layer, neuron) for neuron in top_neurons(varied, layer, 6).tolist()]
    next(steps)
    circuit = find_circuit(model, clean, corrupted, token)
    steps_of_chains = (step.writer for chain in circuit.chains for step in chain.steps)
    carrying = {w[1:]: None for w in steps_of_chains if w.kind == "neuron"}
    rule_games = AtlasGames.random(2 * n_games, seed)
    neurons = _read_neurons(model, best, [*varying, *carrying], rule_games)
    next(steps)
    played = playback(model, probes, game, {len(pair.clean) - 1: token})
    log_probs = [lg[0, -1].log_softmax(-1)[token].item() for lg in (logits, corrupted_logits)]
    return Story(
        pair=pair,
        record=board.play(pair.clean),
        probabilities=logits[0, -1].softmax(-1),
        believed=played.believed[len(pair.clean) - 1],
        accuracy=accuracy,
        contributions=direct_logit_attribution(model, cache, token),
        written=_written(cache.select(pos=-1), best),
        effects=effects,
        n_pairs=len(pairs),
        averages=averages,
        agreements=agreements,
        log_probs=(log_probs[0], log_probs[1]),
        neurons=neurons[: len(varying)],
        circuit=circuit,
        carriers=tuple(sorted(neurons[len(varying) :], key=lambda reading: reading[:2])),
        played=played,
    )


def _check_asked(
    model: OthelloGPT, probes: Sequence[LinearProbe], pair: Pair, game: Int[ndarray, " ply"]
) -> None:
    if not np.array_equal(game[: len(pair.clean)], pair.clean):
        raise ValueError("`game` must begin with the pair's clean game: its moves differ.")
    layers = [probe.layer for probe in probes]
    if layers != list(range(model.cfg.n_layers)):
        raise ValueError(
            f"`probes` are of layers {layers}: give those of 0 to {model.cfg.n_layers - 1} in order, for "
            "instance from `fit_probes` with `layers=range(model.cfg.n_layers)`."
        )
    after = [board.play(side).legal[-1].flat[pair.answer] for side in (pair.clean, pair.corrupted)]
    if after != [True, False]:
        raise ValueError(
            f"the answer {square_to_label(pair.answer)} must be a legal reply to the clean game and none to the "
            "corrupted one: `find_pair` finds such a pair."
        )


def _written(cache: ActivationCache, probe: LinearProbe) -> Contributions:
    labels, values, total = contributions(cache, probe.mine, probe.layer)
    bias = (probe.b[..., 2] - probe.b[..., 1]).expand_as(total)  # mine, theirs
    return Contributions((*labels, "bias"), torch.cat([values, bias[None]]), total + bias)


def _average_sweep(
    model: OthelloGPT, pairs: Sequence[Pair]
) -> tuple[dict[str, Estimate], dict[str, Agreement]]:
    """The sweep averaged over pairs, and how near attribution patching comes to it."""
    clean, corrupted, _ = pair_tokens(pairs)
    metric = pairs_metric(model, pairs)
    exact = patch_sweep(model, clean, corrupted, metric)
    estimated = attribution_sweep(model, clean, corrupted, metric)
    averages = {site: bootstrap_mean(effects) for site, effects in exact.items()}
    return averages, {site: agreement(exact[site], estimated[site]) for site in exact}


def _steps(progress: bool) -> Iterator[None]:
    names = (
        "running the pair",
        "patching",
        "averaging",
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


def summary(story: Story) -> str:
    """The story in a screenful of text."""
    pair, answer = story.pair, square_to_label(story.pair.answer)
    top = story.probabilities.topk(int(story.legal.sum())).indices.tolist()
    predicted = [(token_to_square(token), story.probabilities[token].item()) for token in top]
    right = sum(bool(square >= 0 and story.legal.flat[square]) for square, _ in predicted)
    return "\n".join(
        [
            f"Clean game:     {in_labels(pair.clean)}",
            f"Corrupted game: ... {square_to_label(int(pair.corrupted[-1]))} in place of the last move",
            f"Legal replies ({story.colour}): {in_labels(np.flatnonzero(story.legal))}",
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
            f"(score {story.score:+.2f} after layer {story.last_layer}; the rest is the embeddings' and the bias):",
            *(
                f"  {part:9} "
                + " ".join(
                    f"{value:z7.2f}" for value in story.written_by(part).flatten(1)[:, story.turned]
                )
                for part in ("attn", "mlp")
            ),
            "",
            f"Patching the last move's activations, clean into corrupted (1 = {answer} fully restored):",
            *(
                f"  {site:9} "
                + " ".join(f"{value:z7.3f}" for value in story.effects[site].tolist())
                for site in ("attn_out", "mlp_out")
            ),
            "",
            f"The same, mean over {story.n_pairs} pairs in which one reply changes (95 % interval); of random games "
            "those with the nearest boards, then the surest replies:",
            *(
                f"  {site:9} {layer}: {mean:z6.3f} ({low:z.3f} to {high:z.3f})"
                for site, layer, mean, low, high in story.average_rows()
            ),
            f"  attribution patching, its estimate by gradient: {agreement_in_words(story)}",
            "",
            f"Neurons of layer {story.neurons[0].layer} that vary most:",
            *map(_neuron_line, story.neurons),
            "",
            f"What carries {answer}, from the last move up (%: share of the next one's difference):",
            *(f"  {_chain_line(chain.steps)}" for chain in story.circuit.chains),
            *map(_neuron_line, story.carriers),
        ]
    )


def in_labels(squares: Sequence[int] | ndarray) -> str:
    """Squares as labels, one after another."""
    return " ".join(square_to_label(int(square)) for square in squares)


def agreement_in_words(story: Story) -> str:
    """How near attribution patching comes to the sweep of each pair and layer."""
    return "; ".join(
        f"{site} correlation {correlation:.2f}, worst error {worst_error:.2f}"
        for site, (correlation, worst_error) in story.agreements.items()
    )


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
