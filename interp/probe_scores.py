"""How right probes are on held-out games, with intervals over games, beside what needs no board at all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.probe_training import EVERYWHERE, Games, Labelled, as_games, labelled_activations
from interp.probe_types import Probe, check_reads
from interp.targets import MINE, Target, find_target
from othello_gpt import OthelloGPT, board
from othello_gpt.bootstrap import Estimate, bootstrap_ratio


@dataclass(frozen=True)
class ProbeAccuracy:
    """What probes got right, position by position, over positions from which somebody still moves.

    Every share can be had with its interval over games: `accuracy.estimate("by_square")`.
    """

    right: Bool[Tensor, "probe game pos 8 8"]
    seen: Bool[Tensor, "game pos"]
    confusion: Float[Tensor, "probe game state state"]  # squares counted by [true, predicted] class

    def estimate(self, part: str) -> Estimate:
        """The share of that name with its 95 % bootstrap interval over games.

        Args:
            part: "by_layer", "by_square", "by_pos", "whole_board", "by_class" or "f1".
        """
        numerator, denominator = self._counts(part)
        return bootstrap_ratio(numerator.movedim(1, 0).float(), denominator.float())

    @property
    def by_layer(self) -> Float[Tensor, " probe"]:
        """All squares and positions, probe by probe."""
        return self._share("by_layer")

    @property
    def by_square(self) -> Float[Tensor, "probe 8 8"]:
        """All positions."""
        return self._share("by_square")

    @property
    def by_pos(self) -> Float[Tensor, "probe pos"]:
        """All squares; nan where no game goes on."""
        return self._share("by_pos")

    @property
    def whole_board(self) -> Float[Tensor, " probe"]:
        """Positions whose 64 squares are all right."""
        return self._share("whole_board")

    @property
    def by_class(self) -> Float[Tensor, "probe state"]:
        """Of the squares that are of a class, those that were read so (recall)."""
        return self._share("by_class")

    @property
    def f1(self) -> Float[Tensor, "probe state"]:
        """Of each class, the harmonic mean of precision and recall."""
        return self._share("f1")

    def _share(self, part: str) -> Tensor:
        numerator, denominator = self._counts(part)
        total = denominator.double().sum(0).expand_as(numerator[:, 0])
        return (numerator.double().sum(1) / total).float()

    def _counts(self, part: str) -> tuple[Tensor, Tensor]:
        """What is counted, [probe game *part], and out of how many, [game, 1 or probe, *part]."""
        plies = self.seen.sum(1)[:, None]  # [game, 1]
        if part == "by_layer":
            return self.right.sum((2, 3, 4)), 64 * plies
        if part == "by_square":
            return self.right.sum(2), plies[..., None, None]
        if part == "by_pos":
            return self.right.sum((3, 4)), 64 * self.seen[:, None]
        if part == "whole_board":
            return self.right.flatten(3).all(-1).sum(2), plies
        hits, of_class = self.confusion.diagonal(dim1=2, dim2=3), self.confusion.sum(3)
        if part == "by_class":
            return hits, of_class.movedim(1, 0)
        if part == "f1":
            return 2 * hits, (of_class + self.confusion.sum(2)).movedim(1, 0)
        raise ValueError(
            f"`part` is '{part}', but must be by_layer, by_square, by_pos, whole_board, by_class or f1."
        )


@torch.no_grad()
def probe_accuracy(
    model: OthelloGPT,
    probes: Sequence[Probe],
    squares: Games,
    batch_size: int = 64,
    *,
    targets: Sequence[Target] = (),
    positions: slice = EVERYWHERE,
) -> ProbeAccuracy:
    """How often probes of one or several targets are right on these games, from one run of each game.

    Args:
        probes: each is scored against the target whose name it bears.
        targets: your own ones among them.
        positions: which positions count; the published figures are of `slice(5, 54)`.

    Raises:
        ValueError: no games, positions or probes, two targets of one name, a probe whose target nobody knows or has
            other classes, or which does not read this model's residual stream.
    """
    asked = [_target_of(probe, targets) for probe in probes]
    check_reads(probes, model)
    layers = list(dict.fromkeys(probe.layer for probe in probes))
    distinct = list({target.name: target for target in asked}.values())

    def predictions(games: Tensor) -> tuple[Labelled, Iterator[tuple[Tensor, Tensor]]]:
        batch = labelled_activations(model, games, layers, distinct, positions)
        labels = dict(zip([target.name for target in distinct], batch.labels, strict=True))
        read = (
            (probe.logits(batch.resid[layers.index(probe.layer)]).argmax(-1), labels[probe.target])
            for probe in probes
        )
        return batch, read

    return _scored(predictions, as_games(squares), asked, model.cfg.n_ctx, batch_size)


@torch.no_grad()
def majority_baseline(
    model: OthelloGPT,
    squares: Games,
    held_out: Games,
    targets: Sequence[Target] = (MINE,),
    positions: slice = EVERYWHERE,
) -> ProbeAccuracy:
    """How often the class most frequent in `squares` at each square and ply is right on `held_out`; one row a target.

    Raises:
        ValueError: no games or positions, or held-out games of more plies than the others.

    Source: Nanda, Lee and Wattenberg 2023, table 1, "probabilistic".
    """
    squares, held_out = as_games(squares), as_games(held_out)
    n_pos = min(squares.shape[1], model.cfg.n_ctx)
    if min(held_out.shape[1], model.cfg.n_ctx) > n_pos:
        raise ValueError(
            f"`held_out` has {held_out.shape[1]} plies, but `squares`, where the majority is counted, {n_pos}: give "
            "games of as many plies."
        )
    record = board.play(squares.numpy())
    live = torch.from_numpy(record.to_move[:, :n_pos] != 0)[..., None, None]
    majority = []
    for target in targets:
        labels = target(record)[:, :n_pos]
        counts = [((labels == k) & live).sum(0) for k in range(len(target.classes))]
        majority.append(torch.stack(counts, -1).argmax(-1))  # [pos, 8, 8]

    def predictions(games: Tensor) -> tuple[Labelled, Iterator[tuple[Tensor, Tensor]]]:
        batch = labelled_activations(model, games, [-1], targets, positions)
        return batch, ((m[batch.pos], x) for m, x in zip(majority, batch.labels, strict=True))

    return _scored(predictions, held_out, targets, model.cfg.n_ctx)


def _target_of(probe: Probe, targets: Sequence[Target]) -> Target:
    target = find_target(probe.target, tuple(targets))
    if probe.classes != target.classes:
        raise ValueError(
            f"accuracy is counted for probes whose classes are those of their target, {target.classes}, "
            f"but this one of '{probe.target}' has {probe.classes}."
        )
    return target


def _scored(
    predictions: Callable,
    squares: Int[Tensor, "game ply"],
    targets: Sequence[Target],
    n_ctx: int,
    batch_size: int = 64,
) -> ProbeAccuracy:
    """Counts what `predictions(games)` gives: the batch, and for each row its predictions and the truth."""
    if not len(squares) or not targets:
        raise ValueError(
            f"{len(squares)} games and {len(targets)} probes: there is nothing to score without both."
        )
    n_pos, k = min(squares.shape[1], n_ctx), max(len(target.classes) for target in targets)
    right = torch.zeros(len(targets), len(squares), n_pos, 8, 8, dtype=torch.bool)
    seen = torch.zeros(len(squares), n_pos, dtype=torch.bool)
    confusion = torch.zeros(len(targets), len(squares), k, k)
    for first in range(0, len(squares), batch_size):
        batch, read = predictions(squares[first : first + batch_size])
        game = first + batch.game
        seen[game, batch.pos] = True
        for row, (predicted, truth) in enumerate(read):
            predicted, truth = predicted.cpu(), truth.cpu()
            right[row, game, batch.pos] = predicted == truth
            cells = (game[:, None, None] * k + truth) * k + predicted
            counts = torch.bincount(cells.flatten(), minlength=len(squares) * k * k)
            confusion[row] += counts.view(len(squares), k, k)
    if not seen.any():
        raise ValueError(
            "no position is left from which somebody moves: take other games, or other `positions`."
        )
    return ProbeAccuracy(right, seen, confusion)
