"""Cases for editing the believed board: a game so far, a square, and what is put there in place of the truth."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Int8
from numpy import ndarray

from othello_gpt import board
from othello_gpt.games import OnlyPlainData
from othello_gpt.vocab import CENTRE, square_to_label


@dataclass(frozen=True)
class Cases:
    """Edits of boards, one a game, and the replies that they change. Made by `make_cases`."""

    squares: Int8[ndarray, "case ply"]  # the games so far, -1 after their end
    square: Int[ndarray, " case"]  # which square is edited, 0 to 63
    last: Int[ndarray, " case"]  # the position of the last move
    to_move: Int8[ndarray, " case"]
    before: Int8[ndarray, "case 8 8"]  # +1 black, -1 white, 0 empty
    after: Int8[ndarray, "case 8 8"]
    legal_before: Bool[ndarray, "case 8 8"]
    legal_after: Bool[ndarray, "case 8 8"]  # for the same side, which still is to move

    def __len__(self) -> int:
        return len(self.squares)

    def select(self, index: ndarray | slice) -> "Cases":
        """Some of the cases, their games cut at the longest."""
        chosen = {field.name: getattr(self, field.name)[index] for field in fields(self)}
        chosen["squares"] = chosen["squares"][:, : chosen["last"].max(initial=0) + 1]
        return Cases(**chosen)

    def classes(self, boards: Int8[ndarray, "case 8 8"]) -> Int8[ndarray, "case 8 8"]:
        """Boards as the side to move sees them: 0 empty, 1 theirs, 2 mine."""
        return boards * self.to_move[:, None, None] % 3 * 2 % 3

    def edited_classes(self) -> tuple[Int8[ndarray, " case"], Int8[ndarray, " case"]]:
        """The class of each edited square before and after: 0 empty, 1 theirs, 2 mine."""
        row, col, case = self.square // 8, self.square % 8, np.arange(len(self))
        old, new = (self.classes(boards)[case, row, col] for boards in (self.before, self.after))
        return old, new


def make_cases(
    squares: Int[ndarray, "case ply"], square: Int[ndarray, " case"], colour: Int[ndarray, " case"]
) -> Cases:
    """The cases in which `square` becomes `colour` (+1 black, -1 white, 0 empty) after each game.

    Raises:
        ValueError: no cases, other numbers of games, squares and colours, a square or colour that is none, a game
            that is not legal or is over, or an edit that changes nothing.
    """
    squares, square, colour = map(np.asarray, (squares, square, colour))
    if not len(squares):
        raise ValueError("there are no cases: give at least one game, square and colour.")
    if square.shape != (len(squares),) or colour.shape != (len(squares),):
        raise ValueError(
            f"there are {len(squares)} games, but `square` is of shape {square.shape} and `colour` of "
            f"{colour.shape}: give one square and one colour a game."
        )
    if (outside := (square < 0) | (square > 63)).any():
        raise ValueError(
            f"case {outside.argmax()}: the square is {square[outside.argmax()]}, but must be 0 to 63."
        )
    if (unknown := ~np.isin(colour, (-1, 0, 1))).any():
        raise ValueError(
            f"case {unknown.argmax()}: the colour is {colour[unknown.argmax()]}, but must be +1 (black), -1 (white) "
            "or 0 (empty)."
        )
    case = np.arange(len(squares))
    record, last = board.play(squares), (squares >= 0).sum(1) - 1
    before, to_move = record.state[case, last], record.to_move[case, last]
    after = before.copy()
    after[case, square // 8, square % 8] = colour
    over, same = to_move == 0, (before == after).all((1, 2))
    if over.any():
        raise ValueError(
            f"case {over.argmax()}: nobody can move any more, so there is nothing to predict."
        )
    if same.any():
        label = square_to_label(int(square[same.argmax()]))
        raise ValueError(f"case {same.argmax()}: {label} holds that colour already; give another.")
    legal = (board.legal_moves(boards, to_move) for boards in (before, after))
    return Cases(squares.astype(np.int8), square, last, to_move, before, after, *legal)


def published_cases(path: str | Path) -> Cases:
    """The 1001 cases of `intervention_benchmark.pkl`: one disc changes colour after 5 to 30 moves.

    Raises:
        ValueError: another content, or a disc of another colour than the case names.

    Source: Li et al. 2022, section 4; the file is that of likenneth/othello_world.
    """
    try:
        with Path(path).open("rb") as file:
            stored = OnlyPlainData(file).load()
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError) as error:
        raise ValueError(f"'{path}' is no pickle of intervention cases: {error}") from None
    try:
        histories = [case["history"] for case in stored]
        square = np.array([case["pos_int"] for case in stored])
        held = np.array([case["ori_color"] for case in stored]).astype(int) - 1  # 0 white, 2 black
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"'{path}' holds no intervention cases: a list of dicts with `history`, `pos_int` and "
            f"`ori_color` was expected ({error})."
        ) from None
    cases = make_cases(_padded(histories), square, -held)
    wrong = cases.before.reshape(-1, 64)[np.arange(len(cases)), square] != held
    if wrong.any():
        label = square_to_label(int(square[wrong.argmax()]))
        raise ValueError(
            f"'{path}', case {wrong.argmax()}: {label} does not hold the disc it names."
        )
    return cases


def _padded(histories: Sequence[Sequence[int]]) -> Int[ndarray, "case ply"]:
    squares = np.full((len(histories), max(map(len, histories), default=0)), -1)
    for row, history in zip(squares, histories, strict=True):
        row[: len(history)] = history
    return squares


def natural_cases(n: int, seed: int = 0) -> Cases:
    """Seeded edits like the published ones: one disc changes colour after 5 to 30 moves of a random game.

    The number of discs still fits the number of moves. Every edit changes which replies there are, and leaves
    some; the four centre discs stay.
    """

    def flipped(held: Int8[ndarray, " case"], rng: np.random.Generator) -> Int8[ndarray, " case"]:
        return -held

    return _drawn(n, seed, flipped)


def unnatural_cases(n: int, seed: int = 0) -> Cases:
    """Seeded edits to boards that no game reaches: a disc vanishes, or one appears on an empty square.

    After as many moves there would be another number of discs. Otherwise as `natural_cases`.
    """

    def changed(held: Int8[ndarray, " case"], rng: np.random.Generator) -> Int8[ndarray, " case"]:
        return np.where(held == 0, rng.choice([-1, 1], len(held)), 0).astype(np.int8)

    return _drawn(n, seed, changed)


def _drawn(n: int, seed: int, colour: Callable[[ndarray, np.random.Generator], ndarray]) -> Cases:
    """The first `n` proper edits of seeded games, each with a length, a square and a colour of its own."""
    if n < 1:
        raise ValueError(f"`n` is {n}, but there must be at least one case.")
    rng = np.random.default_rng(seed)
    n_games = 16 * n + 64  # about one in five is proper
    squares = board.random_games(n_games, seed)[:, :30]
    length = rng.integers(5, 31, n_games)
    squares[np.arange(30) >= length[:, None]] = -1
    square = rng.choice([s for s in range(64) if s not in CENTRE], n_games)
    record, last = board.play(squares), (squares >= 0).sum(1) - 1
    game = np.arange(n_games)
    held = record.state[game, last, square // 8, square % 8]
    put = colour(held, rng)
    proper = (put != held) & (record.to_move[game, last] != 0)
    cases = make_cases(squares[proper], square[proper], put[proper])
    changes = (cases.legal_before != cases.legal_after).any((1, 2)) & cases.legal_after.any((1, 2))
    return cases.select(np.flatnonzero(changes)[:n])
