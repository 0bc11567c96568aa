"""When a neuron fires: the positions that move it most, and its activations where a predicate is true or false.

All is computed by streaming over games, so that a million positions need no more memory than a thousand.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interp.positions import Predicate, stream_neurons
from othello_gpt import OthelloGPT

_N_BINS = 2**16


class Spectrum(NamedTuple):
    """A neuron's activations, counted apart where a predicate of the board is false and where it is true.

    A bin is one value of float16, so figures are exact for activations rounded to three digits, and a
    spectrum has one size however many positions were counted.
    """

    counts: Int[ndarray, "truth=2 bin"]  # bins in ascending order of activation
    values: Float[ndarray, " bin"]  # the activation of each bin

    @property
    def auroc(self) -> float:
        """The probability that a true position is more active than a false one; ties count one half."""
        false, true = self.counts
        below = np.cumsum(false) - false
        wins = (true * (below + false / 2)).sum()
        return float(wins / (false.sum() * true.sum())) if false.any() and true.any() else np.nan

    def precision(self, threshold: float = 0.0) -> float:
        """The share of positions above the threshold where the predicate is true."""
        (_, false_alarm), (_, hit) = self._table(threshold)
        return hit / (hit + false_alarm) if hit + false_alarm else np.nan

    def recall(self, threshold: float = 0.0) -> float:
        """The share of positions where the predicate is true that are above the threshold."""
        _, (miss, hit) = self._table(threshold)
        return hit / (hit + miss) if hit + miss else np.nan

    def f1(self, threshold: float = 0.0) -> float:
        """The harmonic mean of precision and recall."""
        (_, false_alarm), (miss, hit) = self._table(threshold)
        return 2 * hit / (2 * hit + miss + false_alarm) if hit + miss + false_alarm else np.nan

    def mutual_information(self, threshold: float = 0.0) -> float:
        """What being above the threshold says about the predicate, in nats."""
        joint = np.array(self._table(threshold)) / self.counts.sum()
        independent = joint.sum(1, keepdims=True) * joint.sum(0)
        seen = joint > 0
        return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())

    def percent(self, edges: Float[ndarray, " edge"]) -> Float[ndarray, "truth=2 bin"]:
        """The percent of false and of true positions between neighbouring edges, for a picture."""
        finite = np.isfinite(self.values)
        within = [
            np.histogram(self.values[finite], edges, weights=row[finite])[0] for row in self.counts
        ]
        return 100 * np.stack(within) / np.maximum(self.counts.sum(1, keepdims=True), 1)

    def merged(self, other: "Spectrum") -> "Spectrum":
        """The spectrum of both sets of positions together."""
        return Spectrum(self.counts + other.counts, self.values)

    def _table(self, threshold: float) -> list[list[float]]:
        """Positions by truth of the predicate (rows) and below or above the threshold (columns)."""
        above = self.values > threshold
        return [[float(row[~above].sum()), float(row[above].sum())] for row in self.counts]


def spectrum_of(
    activations: Float[ndarray, " position"], truth: Bool[ndarray, " position"]
) -> Spectrum:
    """The spectrum of activations that are at hand."""
    codes, values = _float16_bins()
    rounded = np.asarray(activations, np.float16) + np.float16(0)  # -0 becomes 0
    place = codes[rounded.view(np.uint16)]
    counts = [np.bincount(place[truth == flag], minlength=_N_BINS) for flag in (False, True)]
    return Spectrum(np.stack(counts), values)


def spectrum(
    model: OthelloGPT,
    squares: Int[ndarray, "game ply"],
    layer: int,
    neuron: int,
    predicate: Predicate,
    batch_size: int = 64,
) -> Spectrum:
    """A neuron's spectrum over all positions of many games.

    Args:
        squares: whole games, 0 to 63, and -1 after the end.
        predicate: a function of `Positions`, such as `Rule.holds`, or
            `lambda at: (at.classes[:, 16] == EMPTY) & (at.classes[:, 25] == THEIRS)`.
    """
    total = Spectrum(np.zeros((2, _N_BINS), dtype=np.int64), _float16_bins()[1])
    for positions, post in stream_neurons(model, squares, [layer], batch_size):
        part = spectrum_of(post[0, :, neuron].numpy(), predicate(positions))
        total = total.merged(part)
    return total


def _float16_bins() -> tuple[Int[ndarray, " code"], Float[ndarray, " bin"]]:
    """For each bit pattern of a float16 its rank, and the values in order; nan comes last."""
    values = np.arange(_N_BINS, dtype=np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(values, kind="stable")
    ranks = np.empty(_N_BINS, dtype=np.int64)
    ranks[order] = np.arange(_N_BINS)
    return ranks, values[order]


class TopPositions(NamedTuple):
    """The positions at which each neuron of a layer is most active, the highest first."""

    game: Int[Tensor, "neuron k"]
    ply: Int[Tensor, "neuron k"]
    activation: Float[Tensor, "neuron k"]


def top_positions(
    model: OthelloGPT,
    squares: Int[ndarray, "game ply"],
    layer: int,
    k: int = 10,
    batch_size: int = 64,
) -> TopPositions:
    """Where every neuron of a layer fires most, over many games; fewer than `k` if there are fewer positions."""
    best = None
    for positions, post in stream_neurons(model, squares, [layer], batch_size):
        places = torch.from_numpy(np.stack([positions.game, positions.ply]))
        found = post[0].T, places[:, None].expand(2, post.shape[-1], -1)
        if best is not None:
            found = torch.cat([best[0], found[0]], -1), torch.cat([best[1], found[1]], -1)
        activation, order = found[0].topk(min(k, found[0].shape[-1]), dim=-1)
        best = activation, found[1].gather(-1, order.expand(2, -1, -1))
    if best is None:
        raise ValueError("`squares` holds no games: give at least one.")
    return TopPositions(best[1][0], best[1][1], best[0])
