"""What a probe can be asked of the board: each target names its classes and reads them off a record.

A target is a name, the names of its classes and a function of `board.Record`. Colours are black and white, or
mine and theirs, where `mine` is the colour of whoever moves next. It comes from the engine's mover: forfeits
break the parity of plies in a third of full-length random games.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from torch import Tensor

from othello_gpt import board


@dataclass(frozen=True)
class Target:
    """A question with one answer a square: `labels` gives [game ply 8 8] indices into `classes`.

    Example:
        >>> corner = np.zeros((8, 8), dtype=bool)
        >>> corner[::7, ::7] = True
        >>> taken = Target("corner taken", ("no", "yes"), lambda record: (record.state != 0) & corner)
    """

    name: str
    classes: tuple[str, ...]
    labels: Callable[[board.Record], ndarray]

    def __call__(self, record: board.Record) -> Int[Tensor, "game ply 8 8"]:
        """The classes of every square after every ply.

        Raises:
            ValueError: the function gave another shape, or values that are no integers or no classes.
        """
        labels = np.asarray(self.labels(record))
        if labels.shape != record.state.shape:
            raise ValueError(
                f"target '{self.name}' gave labels of shape {labels.shape}, but the boards are "
                f"{record.state.shape}: give one label a square."
            )
        if labels.dtype.kind not in "biu" and (labels % 1).any():
            raise ValueError(
                f"target '{self.name}' gave labels that are no integers: give 0 to {len(self.classes) - 1}."
            )
        labels = torch.from_numpy(labels.astype(np.int64))
        if labels.numel() and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise ValueError(
                f"target '{self.name}' gave labels {labels.min()} to {labels.max()}, but it has "
                f"{len(self.classes)} classes: give 0 to {len(self.classes) - 1}."
            )
        return labels


def _colours(record: board.Record) -> ndarray:
    return record.state % 3 * 2 % 3  # 0, -1, +1 become 0, 1, 2


def _played(record: board.Record) -> Bool[ndarray, "game ply 8 8"]:
    start = np.broadcast_to(board.START, (len(record.state), 1, 8, 8))
    before = np.concatenate([start, record.state[:, :-1]], axis=1)
    return (record.state != 0) & (before == 0)


MINE = Target("mine", ("empty", "theirs", "mine"), board.piece_classes)
BLACK = Target("black", ("empty", "white", "black"), _colours)
FLIPPED = Target("flipped", ("flipped", "not flipped"), lambda record: ~record.flipped)
PLAYED = Target("played", ("played", "not played"), lambda record: ~_played(record))
LEGAL = Target("legal", ("legal", "not legal"), lambda record: ~record.legal)
TARGETS = {target.name: target for target in (MINE, BLACK, FLIPPED, PLAYED, LEGAL)}


def shuffled(target: Target, seed: int = 0) -> Target:
    """The same question with the answers of other games: what a probe can know without the board.

    Each game takes the labels of a random game, ply by ply. Which one depends on the game itself and the seed, not
    on the games beside it, so batches and ranks do not matter.
    """

    def labels(record: board.Record) -> ndarray:
        games = zip(record.state, record.mover != 0, strict=True)
        numbers = [zlib.crc32(state[played].tobytes()) for state, played in games]
        others = board.random_games_with_replies(np.array(numbers, dtype=np.int64), seed).squares
        return np.asarray(target.labels(board.play(others[:, : record.state.shape[1]])))

    return Target(target.name, target.classes, labels)


def check_names(targets: Sequence[Target]) -> None:
    """Refuses targets that scores, which go by name, could not tell apart.

    Raises:
        ValueError: two of one name, or one with the name of a target of ours.
    """
    names = [target.name for target in targets]
    for target in targets:
        if names.count(target.name) > 1 or TARGETS.get(target.name, target) != target:
            raise ValueError(
                f"two targets are named '{target.name}', and probes are scored by name: give each its own."
            )


def find_target(name: str, others: tuple[Target, ...] = ()) -> Target:
    """The target of that name, among `others` and ours.

    Raises:
        ValueError: there is none, or there are two.
    """
    check_names(others)
    known = TARGETS | {target.name: target for target in others}
    if name not in known:
        raise ValueError(
            f"no target is named '{name}': there are {', '.join(known)}. Give your own as `targets=`."
        )
    return known[name]
