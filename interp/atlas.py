"""The atlas of all neurons: what each reads, writes and does, with its rule, found and checked."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from interp.causal_checks import CausalCheck, causal_checks
from interp.neurons import NeuronTable, neuron_table
from interp.positions import stream_neurons
from interp.probes import LinearProbe
from interp.rules import Rule, RuleScore, find_rules, score_rule
from interp.spectra import TopPositions, top_positions
from othello_gpt import OthelloGPT, board
from othello_gpt.games import games_to_tokens


class Described(NamedTuple):
    """One neuron's rule, how well it describes the neuron on held-out games, and whether the neuron acts on it."""

    layer: int
    neuron: int
    rule: Rule
    score: RuleScore
    check: CausalCheck | None  # none where the rule offers too few matched positions


class Atlas(NamedTuple):
    """All neurons of the layers that were asked for."""

    table: NeuronTable
    described: tuple[Described, ...]
    top: dict[int, TopPositions]  # by layer, over `games`
    games: Int[ndarray, "game ply"]


class AtlasGames(NamedTuple):
    """Different games for different questions, so that no answer is marked by its own maker."""

    rules: Int[ndarray, "game ply"]  # on which rules are found, and maximal positions
    held_out: Int[ndarray, "game ply"]  # on which they are scored
    checked: Int[ndarray, "game ply"]  # on which neurons are silenced

    @classmethod
    def random(cls, n_games: int = 200, seed: int = 1) -> "AtlasGames":
        """`n_games` to find rules, half as many to score them, a quarter to check them."""
        if n_games < 1:
            raise ValueError(f"`n_games` is {n_games}: give at least one game to find rules on.")
        sizes = n_games, max(n_games // 2, 1), max(n_games // 4, 1)
        games = board.random_games(sum(sizes), seed)
        return cls(*np.split(games, np.cumsum(sizes)[:-1]))


def describe_neurons(
    model: OthelloGPT,
    layer: int,
    games: AtlasGames,
    neurons: Sequence[int] | None = None,
    progress: bool = False,
) -> list[Described]:
    """Rules of the neurons of a layer (all by default), their scores on held-out games, and their checks."""
    chosen = list(range(model.cfg.d_mlp)) if neurons is None else list(neurons)
    positions, training = _at_once(model, games.rules, layer)
    held_out, later = _at_once(model, games.held_out, layer)
    rules = find_rules(positions, training[:, chosen], progress=progress)
    by_neuron = dict(zip(chosen, rules, strict=True))
    checks = causal_checks(model, games.checked, layer, by_neuron)
    return [
        Described(layer, n, rule, score_rule(rule, held_out, later[:, n]), checks.get(n))
        for n, rule in by_neuron.items()
    ]


def _at_once(model: OthelloGPT, squares: Int[ndarray, "game ply"], layer: int):
    positions, post = next(stream_neurons(model, squares, [layer], len(squares)))
    return positions, post[0].numpy()


def make_atlas(
    model: OthelloGPT,
    probe: LinearProbe,
    games: AtlasGames | None = None,
    layers: Iterable[int] | None = None,
    k: int = 3,
    progress: bool = False,
) -> Atlas:
    """The atlas of a model; a few minutes for the packaged one.

    Args:
        probe: one probe, whose directions say what neurons read and write.
        layers: whose neurons get rules; all by default.
        k: how many maximal positions are kept for each neuron.

    Raises:
        ValueError: no layers, or one that the model lacks.
    """
    games = AtlasGames.random() if games is None else games
    layers = range(model.cfg.n_layers) if layers is None else list(layers)
    if not layers or not all(0 <= layer < model.cfg.n_layers for layer in layers):
        raise ValueError(f"`layers` is {layers}: layers are 0 to {model.cfg.n_layers - 1}.")
    sites = [f"post{layer}" for layer in range(model.cfg.n_layers)]
    few = games.rules[:50]
    with torch.no_grad():
        _, cache = model.run_with_cache(games_to_tokens(few)[:, : model.cfg.n_ctx], sites)
    described, top = [], {}
    for layer in layers:
        described += describe_neurons(model, layer, games, progress=progress)
        top[layer] = top_positions(model, games.rules, layer, k)
    return Atlas(neuron_table(model, probe, cache, few), tuple(described), top, games.rules)
