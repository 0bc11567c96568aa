"""Square, token, label: the three names of a place on the board, and every way from one to another.

- square: 0 to 63, row by row; A0 = 0, H7 = 63. -1 stands for "no move".
- token: what the model reads. 1 to 60 are the squares in order without the four centre ones, which are
  never played; 0 is padding, never a move, and stands for "no move".
- label: "C0", the row's letter and the column's digit from 0.

Others write the same places otherwise: Li et al. "c1" (row letter, digit from 1), players "a3" (column letter,
digit from 1). The start position is symmetric under transposition, so a game read in the wrong notation is
still a legal game, and nothing fails: hence one named function for each.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

CENTRE = (27, 28, 35, 36)  # D3, D4, E3, E4: occupied from the start
PLAYABLE = tuple(square for square in range(64) if square not in CENTRE)

_NO_TOKEN = -2
_TOKEN_OF = np.full(65, _NO_TOKEN)  # index 64, reached as -1, is "no move"
_TOKEN_OF[list(PLAYABLE)] = np.arange(1, 61)
_TOKEN_OF[-1] = 0
_SQUARE_OF = np.array([-1, *PLAYABLE])


def square_to_token(square: Any) -> Any:
    """The tokens of squares; an int gives an int, an array or tensor one of the same kind (64-bit).

    Raises:
        ValueError: a centre square, which is never played, or what is no square at all.

    Example:
        >>> square_to_token(16), square_to_token(np.array([0, 63, -1])).tolist()
        (17, [1, 60, 0])
    """
    return _looked_up(square, "square", 64, _TOKEN_OF, "use `token_to_square` if these are tokens")


def token_to_square(token: Any) -> Any:
    """The squares of tokens; padding (0) gives -1.

    Raises:
        ValueError: what is no token, for instance 61 to 63, which are squares.

    Example:
        >>> token_to_square(17), token_to_square(np.array([0, 60])).tolist()
        (16, [-1, 63])
    """
    hint = "use `square_to_token` if these are squares"
    return _looked_up(token, "token", 61, _SQUARE_OF, hint)


def _looked_up(places, kind: str, size: int, table: np.ndarray, hint: str):
    values = np.asarray(places.cpu() if isinstance(places, Tensor) else places)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"{kind}s must be integers, but these are {values.dtype}.")
    lowest = -1 if kind == "square" else 0
    found = table[np.where((values >= lowest) & (values < size), values, 0)]
    bad = (values < lowest) | (values >= size) | (found == _NO_TOKEN)
    if bad.any():
        value = int(values[bad].flat[0]) if values.ndim else int(values)
        raise ValueError(f"{_why_not(kind, value)}; {hint}.")
    if isinstance(places, Tensor):
        return torch.from_numpy(np.asarray(found)).to(places.device)
    return found if values.ndim else int(found)


def _why_not(kind: str, value: int) -> str:
    if kind == "square" and value in CENTRE:
        return f"square {value} ({square_to_label(value)}) is a centre square and has no token"
    return f"{value} is no {kind}: {kind}s are {'0 to 63' if kind == 'square' else '0 to 60'}"


def square_to_label(square: int | np.integer) -> str:
    """The label of a square: row letter, column digit from 0.

    Example:
        >>> square_to_label(40)
        'F0'
    """
    row, col = divmod(checked_square(square), 8)
    return f"{'ABCDEFGH'[row]}{col}"


def label_to_square(label: str) -> int:
    """The square of a label like "F0"; small letters are read too.

    Example:
        >>> label_to_square("F0")
        40
    """
    return 8 * _letter(label) + _digit(label, first=0)


def token_to_label(token: int | np.integer) -> str:
    """The label of a token, 1 to 60; padding has none."""
    square = token_to_square(int(token))
    if square == -1:
        raise ValueError("token 0 is padding and has no label: labels belong to tokens 1 to 60.")
    return square_to_label(square)


def label_to_token(label: str) -> int:
    """The token of a label.

    Example:
        >>> label_to_token("F0")
        37
    """
    return square_to_token(label_to_square(label))


def li_to_square(label: str) -> int:
    """The square that Li et al. 2022 write like "f5": row letter, column digit from 1.

    Example:
        >>> li_to_square("f5"), standard_to_square("f5")
        (44, 37)
    """
    return 8 * _letter(label) + _digit(label, first=1)


def square_to_li(square: int | np.integer) -> str:
    """A square as Li et al. 2022 write it: row letter, column digit from 1."""
    row, col = divmod(checked_square(square), 8)
    return f"{'abcdefgh'[row]}{col + 1}"


def standard_to_square(label: str) -> int:
    """The square that players, WTHOR and Edax write like "f5": column letter, row digit from 1."""
    return 8 * _digit(label, first=1) + _letter(label)


def square_to_standard(square: int | np.integer) -> str:
    """A square as players write it: column letter, row digit from 1."""
    row, col = divmod(checked_square(square), 8)
    return f"{'abcdefgh'[col]}{row + 1}"


def checked_square(square: int | np.integer) -> int:
    """The square itself, 0 to 63; anything else is a ValueError."""
    if not 0 <= square < 64:
        raise ValueError(f"{square} is no square: squares are 0 to 63.")
    return int(square)


def _letter(label: str) -> int:
    place = "ABCDEFGH".find(label[:1].upper()) if len(label) == 2 else -1
    if place < 0:
        raise ValueError(f"'{label}' is no label: write a letter A to H and a digit, like 'F0'.")
    return place


def _digit(label: str, first: int) -> int:
    place = "01234567".find(chr(ord(label[1]) - first))
    if place < 0:
        raise ValueError(
            f"'{label}' has no digit {first} to {first + 7}. Labels here are row letter, digit from 0 "
            "('F0'); Li et al. and players count from 1: `li_to_square`, `standard_to_square`."
        )
    return place


def values_on_board(
    values: Float[Tensor, "*batch d_vocab"], fill: float | int = float("nan")
) -> Float[Tensor, "*batch 8 8"]:
    """Per-token values laid out on the board; the centre squares, which have no token, hold `fill`.

    Args:
        values: 61 values, of which the padding's is dropped, or 60, from token 1 on. A reshape to 8 x 8
            would put all that comes after D2 in the wrong place.
    """
    if values.shape[-1] not in (60, 61):
        raise ValueError(
            f"`values` has {values.shape[-1]} entries at its end, but a board needs 60 or 61."
        )
    boards = values.new_full((*values.shape[:-1], 64), fill)
    boards[..., list(PLAYABLE)] = values[..., -60:]
    return boards.unflatten(-1, (8, 8))
