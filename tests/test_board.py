"""The rules: bitboards against plain loops, forfeits, edits, random games."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from strategies import games

from othello_gpt import board
from othello_gpt.games import example_pair, parse_moves
from othello_gpt.vocab import label_to_square, square_to_label

STEPS = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]
GAME_1 = "F4 F3 D2 F5 G2 F2 G3 C4 E5 F6 D6 E2 B4 C5 G7 C1 G6 F7 G5 C3 B3"


def slow_flips(state: np.ndarray, square: int, side: int) -> list[tuple[int, int]]:
    """The discs that a move would turn, by walking from it in each direction."""
    flips = []
    for step_row, step_col in STEPS:
        row, col = square // 8 + step_row, square % 8 + step_col
        run = []
        while 0 <= row < 8 and 0 <= col < 8 and state[row, col] == -side:
            run.append((row, col))
            row, col = row + step_row, col + step_col
        if 0 <= row < 8 and 0 <= col < 8 and state[row, col] == side:
            flips += run
    return flips if state[square // 8, square % 8] == 0 else []


def slow_legal(state: np.ndarray, side: int) -> np.ndarray:
    """Where `side` can play, square by square."""
    return np.array([bool(slow_flips(state, s, side)) for s in range(64)]).reshape(8, 8)


def slow_play(squares: np.ndarray):
    """One game by plain loops: (state, legal, mover, to_move, flipped) for each ply."""
    state, side = np.zeros((8, 8), int), 1
    state[3, 3] = state[4, 4] = -1
    state[3, 4] = state[4, 3] = 1
    for square in squares:
        flips = slow_flips(state, square, side)
        flipped = np.zeros((8, 8), bool)
        state = state.copy()
        for row, col in flips:
            state[row, col], flipped[row, col] = side, True
        state[square // 8, square % 8] = side
        mover, side = side, -side
        legal = slow_legal(state, side)
        if not legal.any():
            side = -side
            legal = slow_legal(state, side)
        yield state, legal, mover, side if legal.any() else 0, flipped


def assert_agrees(record: board.Record, squares: np.ndarray) -> None:
    for ply, expected in enumerate(slow_play(squares)):
        for name, found, value in zip(record._fields, record, expected, strict=True):
            assert np.array_equal(found[ply], value), f"{name} at ply {ply}"


@given(games())
def test_play_agrees_with_plain_loops(squares):
    """Every field at every ply of drawn games."""
    assert_agrees(board.play(squares), squares)


def test_random_games_agree_with_plain_loops_forfeits_included():
    """Whole random games, a good part of which contain a forfeit."""
    squares = board.random_games(60, seed=3)
    record = board.play(squares)
    forfeits = 0

    for game, row in enumerate(squares):
        moves = row[row >= 0]
        assert_agrees(board.Record(*(field[game] for field in record)), moves)
        mover = record.mover[game, : len(moves)]
        forfeits += bool((mover[1:] == mover[:-1]).any())
    assert forfeits >= 10  # about a third


def test_perft_counts_what_the_literature_counts():
    """Sequences of plies from the start; depth 9 is 3 005 288."""
    expected = [4, 12, 56, 244, 1396, 8200, 55092, 390216, 3005288]

    assert [board.perft(depth) for depth in range(1, 10)] == expected


@given(games())
def test_discs_are_conserved_and_transposing_a_game_transposes_its_boards(squares):
    """A ply adds one disc, turns at least one, and moves none; rows and columns are alike."""
    record = board.play(squares)
    discs = np.abs(record.state).sum((1, 2))
    transposed = board.play(squares % 8 * 8 + squares // 8)

    assert discs.tolist() == list(range(5, 5 + len(squares)))
    assert (record.flipped.sum((1, 2)) >= 1).all()
    assert np.array_equal(transposed.state, record.state.swapaxes(1, 2))
    assert np.array_equal(transposed.legal, record.legal.swapaxes(1, 2))


def test_the_example_games_have_the_published_legal_moves():
    """Game 4 of the exercise page, its corrupted twin, and the replies to C3."""
    pair = example_pair()

    def legal(squares):
        return " ".join(map(square_to_label, np.flatnonzero(board.play(squares).legal[-1])))

    assert legal(pair.clean) == "C7 D5 D6 D7 F0 F1 F3 G1 G2 G4 G5 G6 G7"
    assert legal(pair.corrupted) == "B1 D0 D1 D5 D6 D7 E6 G1 G2 G3 G4 G5 G6 G7"
    assert legal(parse_moves("C3")) == "C2 C4 E2"


def test_flipping_f4_takes_c7_away():
    """Game 1 after 21 moves. The exercise page prints C6: it read the square 23 as a token."""
    state = board.play(parse_moves(GAME_1)).state[-1]
    edited = board.flip_square(state, label_to_square("F4"))
    changes = board.legal_changes(state, edited, board.WHITE)

    assert not changes.newly_legal.any()
    assert np.flatnonzero(changes.newly_illegal).tolist() == [label_to_square("C7")]
    assert state[5, 4] == -edited[5, 4] != 0
    assert board.erase_square(state, label_to_square("F4"))[5, 4] == 0
    with pytest.raises(ValueError, match="A0 is empty, so there is no disc to flip"):
        board.flip_square(state, 0)


@pytest.mark.parametrize("square", [-1, 64])
def test_what_is_no_square_cannot_be_edited(square):
    """Not even -1, which elsewhere is "no move"."""
    for edit in (board.flip_square, board.erase_square, lambda *at: board.set_square(*at, 1)):
        with pytest.raises(ValueError, match=f"{square} is no square: squares are 0 to 63"):
            edit(board.START, square)


def test_mine_follows_the_mover_and_not_the_parity():
    """After a forfeit the same side moves again, and the classes say so."""
    squares = board.random_games(50, seed=0)
    record = board.play(squares)
    relative, classes = board.relative_state(record), board.piece_classes(record)
    live = record.to_move != 0

    assert np.array_equal((relative * record.to_move[..., None, None])[live], record.state[live])
    assert np.array_equal(classes == 2, relative == 1)
    assert np.array_equal(classes == 0, record.state == 0)
    parity = np.where(np.arange(60) % 2, 1, -1)
    assert (record.to_move != parity)[live].any()


def test_after_the_end_mine_are_the_discs_of_the_side_that_did_not_move_last():
    """At the last move, and as long as its state is carried on."""
    squares = board.random_games(200, seed=5)
    record = board.play(squares)
    classes = board.piece_classes(record)
    ended = (squares == -1).any(1)

    assert ended.any()
    assert np.array_equal(classes == 0, record.state == 0)
    for game in np.flatnonzero(ended):
        last = np.flatnonzero(squares[game] >= 0)[-1]
        assert np.array_equal(
            classes[game, last] == 1, record.state[game, last] == record.mover[game, last]
        )
        assert (classes[game, last:] == classes[game, last]).all()


def test_games_that_end_early_carry_their_last_state():
    """After -1 nothing is legal, nobody moves, nothing flips."""
    record = board.play(np.array([[19, 18, -1, -1]]))

    assert record.mover[0].tolist() == [1, -1, 0, 0]
    assert record.to_move[0].tolist() == [-1, 1, 0, 0]
    assert np.array_equal(record.state[0, 3], record.state[0, 1])
    assert not record.legal[0, 2:].any()
    assert not record.flipped[0, 2:].any()


@pytest.mark.parametrize(
    ("squares", "message"),
    [
        ([[19, 18], [19, 0]], "game 1, ply 1: white cannot play A0; legal moves are C2 C4 E2"),
        ([19, 64], "white cannot play square 64"),
        ([19, -1, 18], "ply 2: black cannot play C2; legal moves are none|ply 2"),
        ([27], "black cannot play D3; legal moves are C3 D2 E5 F4"),
    ],
)
def test_an_illegal_move_is_an_error_that_names_everything(squares, message):
    """Game, ply, side, move and the legal set, in labels."""
    with pytest.raises(ValueError, match=message):
        board.play(np.array(squares))


def test_random_games_are_the_same_everywhere():
    """A game depends on the seed and its number alone: not on how many are made, nor on the machine."""
    many = board.random_games(300, seed=5)

    assert np.array_equal(board.random_games(20, seed=5), many[:20])
    assert np.array_equal(board.random_games(20, seed=np.int64(5)), many[:20])
    assert not np.array_equal(board.random_games(20, seed=6), many[:20])
    digest = hashlib.sha256(board.random_games(1000, seed=0).tobytes()).hexdigest()
    assert digest == "6dd81e2ad23975d2002221b1e388b842b496b4da1714e654745c9bea1f774785"


def test_the_replies_drawn_with_games_are_those_that_playing_them_finds():
    """After every ply, forfeits and ends included; and games come by their numbers."""
    numbers = np.array([3, 70, 4])
    squares = board.random_games_with_replies(numbers, seed=5).squares

    assert np.array_equal(squares, board.random_games(71, seed=5)[numbers])
    many = board.random_games_with_replies(np.arange(100))
    legal = board.play(many.squares).legal.reshape(100, 60, 64)
    bits = (many.replies[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.array_equal(bits.astype(bool), legal)


def test_random_moves_are_uniform():
    """Four first moves and three second ones, each as often as the others within five standard deviations."""
    squares = board.random_games(12_000, seed=9)
    pairs, counts = np.unique(squares[:, :2], axis=0, return_counts=True)

    assert len(pairs) == 12
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
