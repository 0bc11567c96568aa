"""Games from files, the tokens that the model reads, and the example that the literature looks at.

A file tells moves in one of several notations, and the wrong one cannot be noticed: the start position is
symmetric under transposition, so a game with rows and columns exchanged is a legal game too. Each format
therefore has its usual notation as its default, and it can be said.
"""

import pickle
import re
from collections.abc import Callable, Iterable
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int8
from numpy import ndarray
from torch import Tensor

from othello_gpt import board
from othello_gpt.vocab import (
    CENTRE,
    label_to_square,
    li_to_square,
    square_to_token,
    standard_to_square,
    token_to_square,
)

NOTATIONS: dict[str, Callable[[str], int]] = {
    "label": label_to_square,  # "C0": row letter, column digit from 0
    "li": li_to_square,  # "c1": row letter, column digit from 1
    "standard": standard_to_square,  # "a3": column letter, row digit from 1
}


class Pair(NamedTuple):
    """Two games that differ in the last move only, and a reply that is legal after the first alone."""

    clean: Int8[ndarray, " ply"]
    corrupted: Int8[ndarray, " ply"]
    answer: int  # a square


def parse_moves(text: str, notation: str = "label") -> Int8[ndarray, " ply"]:
    """The squares of moves written one after another, with or without spaces; passes are left out.

    Args:
        text: "C3 C4 E2", "f5d6c3"; "pass", "ps", "pa" and "--" are passes, which the rules imply.
        notation: "label" (C0), "li" (c1) or "standard" (a3); see the module's text.
    """
    if notation not in NOTATIONS:
        raise ValueError(f"`notation` is '{notation}', but must be one of {', '.join(NOTATIONS)}.")
    moves = re.sub(r"pass|ps|pa|--", " ", text, flags=re.IGNORECASE)
    words = re.findall(r"[A-Za-z][0-9]|\S+", moves)
    return np.array([NOTATIONS[notation](word) for word in words], dtype=np.int8)


def example_game() -> Int8[ndarray, " ply"]:
    """Game 4 of the exercise page: 59 moves.

    Source: N. Nanda, Othello_GPT_Circuits notebook; ARENA 1.5.3, section 2.
    """
    return parse_moves(
        "C3 C4 C5 E2 F2 C2 D2 E1 F5 B6 C6 B5 C1 B0 B4 E5 F6 B2 F4 B3 E0 G2 A2 D6 F1 G3 F3 D0 A6 G1 "
        "A1 D5 D1 F7 H0 A4 E6 C0 G6 H7 A5 F0 G0 B1 H3 E7 A3 G4 A0 H4 H5 D7 G5 A7 H2 G7 C7 B7 H6"
    )


def example_pair() -> Pair:
    """The example game up to its 21st move, E0, and the same with C0 in its place.

    White can answer F0 after the first only.

    Source: as `example_game`.
    """
    clean = example_game()[:21]
    corrupted = np.array([*clean[:-1], label_to_square("C0")], dtype=np.int8)
    return Pair(clean, corrupted, label_to_square("F0"))


def games_to_tokens(
    squares: Int[ndarray, "*game ply"] | Int[Tensor, "*game ply"],
) -> Int[Tensor, "game pos"]:
    """What the model reads of whole games: the tokens of the first 59 moves, int64 [game pos], 0 after the end.

    The 60th move predicts nothing. Position `i` is after ply `i`.
    """
    tokens = square_to_token(np.asarray(squares))
    return torch.from_numpy(np.atleast_2d(tokens)[:, :59])


def load_games(
    path: str | Path, *, kind: str | None = None, notation: str | None = None
) -> Int8[ndarray, "game ply=60"]:
    """The games of a file as squares, -1 after a game's end; every game is played through and checked.

    Args:
        path: `.npy` [game ply] of squares or tokens; `.pickle` with Li et al.'s lists of squares; `.wtb`
            (WTHOR); anything else is text: one game a line, or with PGN-like headers.
        kind: "square" or "token", for a `.npy` whose values do not tell.
        notation: of texts, "standard" by default; "li" and "label" are the others. WTHOR is standard.

    Raises:
        ValueError: an unknown kind, a damaged file, or an illegal move, with file, game and move.
    """
    path = Path(path)
    if kind is not None and path.suffix != ".npy":
        raise ValueError(f"`kind` is for .npy files: leave it out for '{path}'.")
    if notation is not None and path.suffix in (".npy", ".pickle", ".pkl", ".wtb"):
        raise ValueError(f"`notation` is for texts: leave it out for '{path}'.")
    if path.suffix == ".npy":
        games = _from_npy(_read(path, np.load, path, mmap_mode="r", allow_pickle=False), kind, path)
    elif path.suffix in (".pickle", ".pkl"):
        with path.open("rb") as file:
            games = _padded(_read(path, OnlyPlainData(file).load), path)
    elif path.suffix == ".wtb":
        games = _from_wthor(path)
    else:
        games = _from_text(path.read_text(), notation or "standard", path)
    _check_games(games, path)
    return games


def _check_games(games: Int8[ndarray, "game ply"], path: Path) -> None:
    for start in range(0, len(games), 8192):
        try:
            board.play(games[start : start + 8192])
        except ValueError as error:
            raise ValueError(f"'{path}' (games counted from {start}): {error}") from None


def _read(path: Path, reader: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return reader(*arguments, **options)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a pickle that is cut short can raise anything
        raise ValueError(f"'{path}' is damaged or cut short ({error}): fetch it again.") from error


def _padded(games: Iterable, path: Path) -> Int8[ndarray, "game ply=60"]:
    try:
        rows = [[index(move) for move in game] for game in games]
        padded = np.full((len(rows), board.MAX_PLIES), -1, dtype=np.int8)
        for row, moves in zip(padded, rows, strict=True):
            row[: len(moves)] = moves
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"'{path}' does not hold games, each at most 60 squares from 0 to 63: {error}."
        ) from error
    return padded


def _from_npy(stored: ndarray, kind: str | None, path: Path) -> Int8[ndarray, "game ply=60"]:
    if stored.ndim != 2 or not np.issubdtype(stored.dtype, np.integer) or stored.shape[1] > 60:
        raise ValueError(
            f"'{path}' holds {stored.dtype} of shape {stored.shape}; games are integers [game ply], "
            "with at most 60 plies."
        )
    if stored.size and not -1 <= stored.min() <= stored.max() < 64:
        raise ValueError(
            f"'{path}' holds {stored.min()} to {stored.max()}; squares are 0 to 63, and -1 after a game's end."
        )
    kind = kind or _detected_kind(stored, path)
    if kind not in ("square", "token"):
        raise ValueError(f"`kind` is '{kind}', but must be 'square' or 'token'.")
    squares = token_to_square(np.asarray(stored)) if kind == "token" else np.asarray(stored)
    return _padded(squares, path)


def _detected_kind(stored: ndarray, path: Path) -> str:
    values = np.unique(stored)
    is_square, is_token = (values > 60).any(), np.isin(CENTRE, values).any()
    if is_square == is_token:
        raise ValueError(
            f"'{path}' may hold squares or tokens: its values do not tell. Give `kind='square'` or "
            "`kind='token'`."
        )
    return "square" if is_square else "token"


class OnlyPlainData(pickle.Unpickler):
    """Reads lists and numbers; refuses anything that names code."""

    def find_class(self, module: str, name: str) -> object:
        raise ValueError(
            f"the pickle wants to run {module}.{name}; files of games hold nothing but lists of integers."
        )


_WTHOR_GAME = np.dtype(
    [("ids", "<u2", 3), ("score", "u1"), ("best_score", "u1"), ("moves", "u1", 60)]
)


def _from_wthor(path: Path) -> Int8[ndarray, "game ply=60"]:
    """WTHOR: a header of 16 bytes, 68 bytes a game; a move is 10 * row + column from 1; 0 is none."""
    content = path.read_bytes()
    n_games = int.from_bytes(content[4:8], "little")
    if len(content) < 16 or len(content) != 16 + 68 * n_games:
        raise ValueError(
            f"'{path}' has {len(content)} bytes, but its header promises {n_games} games, "
            f"{16 + 68 * n_games} bytes: it is damaged or no WTHOR file of games."
        )
    moves = np.frombuffer(content, _WTHOR_GAME, offset=16)["moves"]
    row, col = (digit.astype(np.int8) - 1 for digit in np.divmod(moves, 10))
    on_board = (row >= 0) & (row < 8) & (col >= 0) & (col < 8)
    if len(damaged := np.argwhere((moves != 0) & ~on_board)):
        game, ply = damaged[0]
        raise ValueError(
            f"'{path}' (games counted from 0), game {game}, ply {ply}: {moves[game, ply]} is no move, "
            "which is 10 * row + column, both 1 to 8: the file is damaged."
        )
    return np.where(moves == 0, -1, row * 8 + col).astype(np.int8)


def _from_text(text: str, notation: str, path: Path) -> Int8[ndarray, "game ply=60"]:
    """One game a line; with PGN-like headers in brackets, one game for each block of lines after them."""
    if re.search(r"^\[", text, re.MULTILINE):
        blocks = re.split(r"(?:^\[.*\]\s*\n)+", text, flags=re.MULTILINE)
        games = [
            re.sub(r"\{.*?\}|\d+\.+|\d+-\d+|\*", " ", block, flags=re.DOTALL) for block in blocks
        ]
    else:
        games = text.splitlines()
    parsed = []
    for number, game in enumerate((game for game in games if game.strip()), 1):
        try:
            parsed.append(parse_moves(game, notation))
        except ValueError as error:
            raise ValueError(f"'{path}', game {number}: {error}") from None
    return _padded(parsed, path)
