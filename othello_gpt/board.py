"""The rules of Othello on bitboards, for many games at once.

A board is two 64-bit words, the discs of the side to move and those of the other side; bit `square` (A0 = 0,
row by row, H7 = 63) says whether a disc lies there. A NumPy array of such words is as many games, and one
shift moves all of their discs one step. A side without a legal move forfeits its turn, which costs no ply:
so who moves at a ply is recorded, and never to be guessed from the ply's parity.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int8, UInt64
from numpy import ndarray

from othello_gpt.vocab import checked_square, square_to_label

BLACK, WHITE, EMPTY = 1, -1, 0
MAX_PLIES = 60

Words = UInt64[ndarray, "*games"]  # at least one axis, else NumPy makes scalars of them

_ALL = 0xFFFF_FFFF_FFFF_FFFF
_NOT_COL_0 = 0xFEFE_FEFE_FEFE_FEFE  # where a step to the right may arrive
_NOT_COL_7 = 0x7F7F_7F7F_7F7F_7F7F  # where a step to the left may arrive
# Eight directions: by how many squares the bits shift up, and where they may arrive.
_DIRECTIONS = [
    (1, _NOT_COL_0),
    (9, _NOT_COL_0),
    (8, _ALL),
    (7, _NOT_COL_7),
    (-1, _NOT_COL_7),
    (-9, _NOT_COL_7),
    (-8, _ALL),
    (-7, _NOT_COL_0),
]


def _words(*squares: int) -> np.uint64:
    return np.uint64(sum(1 << square for square in squares))


_START_BLACK, _START_WHITE = _words(28, 35), _words(27, 36)  # D4 and E3; D3 and E4
_BIT = np.uint64(1) << np.arange(64, dtype=np.uint64)  # the word of each square


class Record(NamedTuple):
    """What happened in games, ply by ply. Leading axes: games (none for one game) and plies."""

    state: Int8[ndarray, "*games ply 8 8"]  # after the ply: +1 black, -1 white, 0 empty
    legal: Bool[ndarray, "*games ply 8 8"]  # replies of whoever moves next
    mover: Int8[ndarray, "*games ply"]  # who played the ply; 0 after the game's end
    to_move: Int8[ndarray, "*games ply"]  # who plays next; 0 when nobody can
    flipped: Bool[ndarray, "*games ply 8 8"]  # discs that changed colour at the ply


class LegalChanges(NamedTuple):
    """Which replies an edit of the board makes possible, and which it takes away."""

    newly_legal: Bool[ndarray, "*games 8 8"]
    newly_illegal: Bool[ndarray, "*games 8 8"]


def play(squares: Int[ndarray, "*games ply"]) -> Record:
    """Plays whole games and records every ply.

    Args:
        squares: moves, squares 0 to 63, and -1 after a game's end. One game may come without its axis.

    Returns:
        A `Record`. After a game's end the last state is carried on, and all else is False or 0.

    Raises:
        ValueError: an illegal move; names game, ply, side to move, the move and the legal replies.

    Example:
        >>> record = play(np.array([19, 18]))  # C3, then C2
        >>> record.mover.tolist(), int(record.state[1].sum())
        ([1, -1], 0)
    """
    squares = _checked_squares(squares)
    games = np.atleast_2d(squares)
    chunks = [_play_chunk(games[i : i + 8192], i) for i in range(0, max(len(games), 1), 8192)]
    fields = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    record = Record(*fields)
    return record if squares.ndim == 2 else Record(*(field[0] for field in record))


def _checked_squares(squares: object) -> Int[ndarray, "*games ply"]:
    squares = np.asarray(squares)
    if not np.issubdtype(squares.dtype, np.integer) or squares.ndim not in (1, 2):
        raise ValueError(
            f"`squares` is {squares.dtype} of shape {squares.shape}, but must be integers [game ply] "
            "or [ply]: squares 0 to 63, and -1 after a game's end."
        )
    return squares


def _play_chunk(games: Int[ndarray, "game ply"], first_game: int) -> Record:
    n_games, n_plies = games.shape
    black = np.full((n_games, n_plies), _START_BLACK)
    white = np.full_like(black, _START_WHITE)
    legal, flipped = np.zeros_like(black), np.zeros_like(black)
    mover = np.zeros((n_games, n_plies), dtype=np.int8)
    to_move = np.zeros_like(mover)

    own, other = np.full(n_games, _START_BLACK), np.full(n_games, _START_WHITE)
    side = np.full(n_games, BLACK, dtype=np.int8)  # whoever `own` belongs to
    replies = _legal_words(own, other)
    for ply in range(n_plies):
        square = games[:, ply]
        _check_legal(square, replies, side, first_game, ply)
        moved = square >= 0
        move = np.where(moved, _BIT[square], np.uint64(0))
        flips = _flips(own, other, move)
        own, other = other ^ flips, own | flips | move  # the other side is to move
        flipped[:, ply], mover[:, ply] = flips, np.where(moved, side, 0)
        own, other = np.where(moved, own, other), np.where(moved, other, own)
        side = np.where(moved, -side, side)
        own, other, side, replies = _after_forfeit(own, other, side)
        is_black = side == BLACK
        black[:, ply], white[:, ply] = (
            np.where(is_black, own, other),
            np.where(is_black, other, own),
        )
        replies = np.where(moved, replies, np.uint64(0))
        legal[:, ply], to_move[:, ply] = replies, np.where(replies != 0, side, 0)
    state = _bits(black).astype(np.int8) - _bits(white)
    return Record(state, _bits(legal), mover, to_move, _bits(flipped))


def _after_forfeit(
    own: Words, other: Words, side: Int8[ndarray, "*games"]
) -> tuple[Words, Words, Int8[ndarray, "*games"], Words]:
    """The same boards from the side that really moves next, and its replies (none: the game is over)."""
    replies = _legal_words(own, other)
    stuck = replies == 0
    if stuck.any():
        other_replies = _legal_words(other, own)
        passes = stuck & (other_replies != 0)
        own, other = np.where(passes, other, own), np.where(passes, own, other)
        side, replies = np.where(passes, -side, side), np.where(passes, other_replies, replies)
    return own, other, side, replies


def _check_legal(
    square: Int[ndarray, " game"], replies: Words, side: ndarray, first_game: int, ply: int
) -> None:
    inside = (square >= 0) & (square < 64)
    allowed = inside & (replies & _BIT[np.where(inside, square, 0)] != 0)
    bad = ~allowed & (square != -1)
    if not bad.any():
        return
    game = int(bad.argmax())
    move = int(square[game])
    named = square_to_label(move) if 0 <= move < 64 else f"square {move}"
    legal = (
        " ".join(square_to_label(int(s)) for s in np.flatnonzero(replies[game] & _BIT)) or "none"
    )
    colour = "black" if side[game] == BLACK else "white"
    raise ValueError(
        f"game {first_game + game}, ply {ply}: {colour} cannot play {named}; legal moves are {legal}. "
        "Moves are squares 0 to 63 (not tokens), -1 after the end of a game."
    )


def _shifted(words: Words, by: int) -> Words:
    return words << np.uint64(by) if by > 0 else words >> np.uint64(-by)


def _runs(own: Words, other: Words) -> Iterator[tuple[int, np.uint64, Words]]:
    """For each direction: the other side's discs that lie in an unbroken run next to an own disc."""
    for by, arrivals in _DIRECTIONS:
        mask = np.uint64(arrivals)
        enclosed = other & mask
        run = _shifted(own, by) & enclosed
        for _ in range(5):  # a run has at most six discs
            run |= _shifted(run, by) & enclosed
        yield by, mask, run


def _legal_words(own: Words, other: Words) -> Words:
    """Where the side to move can play: an empty square just beyond a run."""
    legal = np.zeros_like(own)
    for by, mask, run in _runs(own, other):
        legal |= _shifted(run, by) & mask
    return legal & ~(own | other)


def _flips(own: Words, other: Words, move: Words) -> Words:
    """The discs that a move turns: the runs from the move that an own disc closes."""
    flips = np.zeros_like(own)
    for by, mask, run in _runs(move, other):
        closed = _shifted(run, by) & mask & own
        flips |= np.where(closed != 0, run, np.uint64(0))
    return flips


def _bits(words: Words) -> Bool[ndarray, "*games 8 8"]:
    bytes_ = (
        words[..., None].astype("<u8").view(np.uint8)
    )  # one byte a row, column 0 in the lowest bit
    return np.unpackbits(bytes_, axis=-1, bitorder="little").reshape(*words.shape, 8, 8).view(bool)


def _to_words(boards: Bool[ndarray, "*games 8 8"]) -> Words:
    bytes_ = np.packbits(boards.reshape(*boards.shape[:-2], 64), axis=-1, bitorder="little")
    return np.ascontiguousarray(bytes_).view("<u8")[..., 0].astype(np.uint64)


_BLACK_AND_WHITE = _bits(np.array([_START_BLACK, _START_WHITE])).astype(np.int8)
START: Int8[ndarray, "8 8"] = _BLACK_AND_WHITE[0] - _BLACK_AND_WHITE[1]


def legal_moves(
    state: Int[ndarray, "*games 8 8"], to_move: int | np.integer | Int[ndarray, "*games"]
) -> Bool[ndarray, "*games 8 8"]:
    """Where `to_move` (+1 black, -1 white) can play on these boards; forfeits are not looked for."""
    relative = np.asarray(state) * np.asarray(to_move)[..., None, None]
    boards = relative.reshape(-1, 8, 8)
    legal = _bits(_legal_words(_to_words(boards > 0), _to_words(boards < 0)))
    return legal.reshape(relative.shape)


def legal_changes(
    before: Int[ndarray, "*games 8 8"],
    after: Int[ndarray, "*games 8 8"],
    to_move: int | np.integer | Int[ndarray, "*games"],
) -> LegalChanges:
    """What an edit of the board changes for the side to move.

    Example:
        >>> start = START
        >>> changes = legal_changes(start, flip_square(start, 27), to_move=BLACK)  # D3 becomes black
        >>> int(changes.newly_illegal.sum()), int(changes.newly_legal.sum())
        (2, 1)
    """
    old, new = legal_moves(before, to_move), legal_moves(after, to_move)
    return LegalChanges(new & ~old, old & ~new)


def flip_square(
    state: Int[ndarray, "*games 8 8"], square: int | np.integer
) -> Int[ndarray, "*games 8 8"]:
    """A copy of the board with the disc on `square` in the other colour."""
    row, col = divmod(checked_square(square), 8)
    if (np.asarray(state)[..., row, col] == EMPTY).any():
        raise ValueError(
            f"{square_to_label(square)} is empty, so there is no disc to flip: use `set_square`."
        )
    return set_square(state, square, -np.asarray(state)[..., row, col])


def erase_square(
    state: Int[ndarray, "*games 8 8"], square: int | np.integer
) -> Int[ndarray, "*games 8 8"]:
    """A copy of the board without a disc on `square`."""
    return set_square(state, square, EMPTY)


def set_square(
    state: Int[ndarray, "*games 8 8"],
    square: int | np.integer,
    colour: int | np.integer | Int[ndarray, "*games"],
) -> Int[ndarray, "*games 8 8"]:
    """A copy of the board with +1 (black), -1 (white) or 0 (nothing) on `square`, 0 to 63."""
    edited = np.array(state)
    row, col = divmod(checked_square(square), 8)
    edited[..., row, col] = colour
    return edited


def relative_state(record: Record) -> Int8[ndarray, "*games ply 8 8"]:
    """The boards as whoever moves next sees them: +1 mine, -1 theirs, 0 empty.

    When the game is over nobody moves next; then mine are the discs of the side that did not move last.
    """
    ply = np.arange(record.mover.shape[-1])
    last = np.maximum.accumulate(np.where(record.mover != 0, ply, 0), axis=-1)
    other = -np.take_along_axis(record.mover, last, axis=-1)
    mine = np.where(record.to_move != 0, record.to_move, other)
    return (record.state * mine[..., None, None]).astype(np.int8)


def piece_classes(record: Record) -> Int8[ndarray, "*games ply 8 8"]:
    """The boards in the probes' class order: 0 empty, 1 theirs, 2 mine; see `relative_state`."""
    return relative_state(record) % 3 * 2 % 3  # 0, -1, +1 become 0, 1, 2


class RandomGames(NamedTuple):
    """Random games and, after each ply, where whoever moves next can play."""

    squares: Int8[ndarray, "game ply=60"]  # -1 after a game's end
    replies: UInt64[ndarray, "game ply=60"]  # bit `square`, as in all words here; 0 when it is over


def random_games(n: int, seed: int | np.integer = 0) -> Int8[ndarray, "game ply=60"]:
    """Games in which every legal move is equally likely, as squares, -1 after an early end.

    Game `g` depends on `(seed, g)` alone: the same on every machine, and whatever `n` is.
    """
    if n < 0:
        raise ValueError(f"`n` is {n}, but a number of games cannot be negative.")
    return random_games_with_replies(np.arange(n), seed).squares


def random_games_with_replies(
    numbers: Int[ndarray, " game"], seed: int | np.integer = 0
) -> RandomGames:
    """The games of these numbers, with the replies, which drawing a game finds anyway.

    `play` tells more, but takes three times as long.
    """
    n, numbers = len(numbers), numbers.astype(np.uint64)
    squares = np.full((n, MAX_PLIES), -1, dtype=np.int8)
    all_replies = np.zeros((n, MAX_PLIES), dtype=np.uint64)
    own, other = np.full(n, _START_BLACK), np.full(n, _START_WHITE)
    side, replies = np.full(n, BLACK, dtype=np.int8), _legal_words(own, other)
    for ply in range(MAX_PLIES):
        move = _random_bit(replies, _hash(seed, numbers, ply))
        squares[:, ply] = np.where(move != 0, np.bitwise_count(move - np.uint64(1)), -1)
        flips = _flips(own, other, move)
        own, other = other ^ flips, own | flips | move
        own, other, side, replies = _after_forfeit(own, other, -side)
        all_replies[:, ply] = replies
    return RandomGames(squares, all_replies)


def _hash(seed: int | np.integer, game: Words, ply: int) -> Words:
    """64 random bits for a ply of a game: splitmix64 of its place in a seeded sequence.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix(np.uint64(int(seed) % 2**64) + np.uint64(0x9E37_79B9_7F4A_7C15))
        return _splitmix(_splitmix(mixed ^ game) + np.uint64(ply))


def _splitmix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return x ^ (x >> np.uint64(31))


def _random_bit(words: Words, random: Words) -> Words:
    """One of the bits of each word, all equally likely (to 1 in 2**27); no bit of an empty word."""
    count = np.bitwise_count(words).astype(np.uint64)
    skip = ((random >> np.uint64(32)) * count) >> np.uint64(32)
    for i in range(int(count.max(initial=0))):
        words = np.where(skip > i, words & (words - np.uint64(1)), words)  # drops the lowest bit
    return words & -words


def perft(depth: int) -> int:
    """How many sequences of `depth` plies there are from the start; a forfeit counts as a ply."""
    own, other = np.array([_START_BLACK]), np.array([_START_WHITE])
    return _perft(own, other, depth)


def _perft(own: Words, other: Words, depth: int) -> int:
    if depth == 0:
        return len(own)
    replies = _legal_words(own, other)
    if depth == 1 and (replies != 0).all():
        return int(np.bitwise_count(replies).sum())
    if len(own) > 2**18:
        half = len(own) // 2
        return _perft(own[:half], other[:half], depth) + _perft(own[half:], other[half:], depth)
    stuck = replies == 0
    passing = stuck & (_legal_words(other, own) != 0)
    total = _perft(other[passing], own[passing], depth - 1) if passing.any() else 0
    board_index, square = np.nonzero(replies[:, None] & _BIT)
    own, other, move = own[board_index], other[board_index], _BIT[square]
    if len(own) == 0:
        return total
    flips = _flips(own, other, move)
    return total + _perft(other ^ flips, own | flips | move, depth - 1)
