"""Cases of edits: the published file, our own generators, what is refused."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from interp.cases import make_cases, natural_cases, published_cases, unnatural_cases
from othello_gpt import board
from othello_gpt.vocab import CENTRE


def test_natural_cases_turn_one_disc_and_change_the_replies():
    """Of 5 to 30 moves; the number of discs still fits; some reply remains; no centre square."""
    cases = natural_cases(60, seed=3)
    n_discs = (cases.before != 0).sum((1, 2))

    assert len(cases) == 60
    assert ((cases.before != cases.after).sum((1, 2)) == 1).all()
    assert ((cases.after != 0).sum((1, 2)) == n_discs).all()
    assert (n_discs == cases.last + 5).all()
    assert cases.last.min() >= 4
    assert cases.last.max() <= 29
    assert not np.isin(cases.square, CENTRE).any()
    assert (cases.legal_before != cases.legal_after).any((1, 2)).all()
    assert cases.legal_after.any((1, 2)).all()
    assert len(np.unique(cases.squares, axis=0)) == 60


def test_unnatural_cases_have_too_many_discs_or_too_few():
    """Both kinds occur."""
    cases = unnatural_cases(60, seed=3)
    surplus = (cases.after != 0).sum((1, 2)) - (cases.last + 5)

    assert set(surplus.tolist()) == {-1, 1}


def test_cases_are_the_same_for_a_seed():
    """The first ones do not depend on how many follow only by their seed."""
    assert np.array_equal(natural_cases(10, seed=1).squares, natural_cases(10, seed=1).squares)
    assert not np.array_equal(natural_cases(10, seed=1).square, natural_cases(10, seed=2).square)


def test_a_case_knows_boards_replies_and_classes():
    """By the engine, for whoever moves next."""
    cases = natural_cases(20, seed=5)
    for i in range(20):
        game = cases.squares[i, : cases.last[i] + 1]
        record = board.play(game)
        assert np.array_equal(cases.before[i], record.state[-1])
        assert np.array_equal(cases.legal_before[i], record.legal[-1])
        assert cases.to_move[i] == record.to_move[-1]
        after = board.flip_square(record.state[-1], cases.square[i])
        assert np.array_equal(cases.after[i], after)
        assert np.array_equal(cases.legal_after[i], board.legal_moves(after, record.to_move[-1]))
        mine = after.flat[cases.square[i]] == record.to_move[-1]
        old, new = (classes[i] for classes in cases.edited_classes())
        assert (old, new) == ((1, 2) if mine else (2, 1))


def stored(cases) -> list[dict]:
    """Cases as the published file holds them."""
    rows = range(len(cases))
    held = cases.before[np.arange(len(cases)), cases.square // 8, cases.square % 8]
    return [
        {
            "history": cases.squares[i, : cases.last[i] + 1].tolist(),
            "pos_int": int(cases.square[i]),
            "ori_color": float(held[i] + 1),
        }
        for i in rows
    ]


def test_the_published_format_is_read(tmp_path):
    """0 is white, 2 black, and the disc takes the other colour; a wrong colour is noticed."""
    cases, path = natural_cases(12, seed=1), tmp_path / "cases.pkl"
    rows = stored(cases)
    path.write_bytes(pickle.dumps(rows))
    loaded = published_cases(path)

    assert np.array_equal(loaded.after, cases.after)
    assert np.array_equal(loaded.legal_after, cases.legal_after)
    empty = [{**rows[0], "pos_int": int(np.flatnonzero(cases.before[0] == 0)[0])}, *rows[1:]]
    path.write_bytes(pickle.dumps(empty))
    with pytest.raises(ValueError, match="case 0: .. does not hold the disc it names"):
        published_cases(path)
    path.write_text("no pickle")
    with pytest.raises(ValueError, match="is no pickle of intervention cases"):
        published_cases(path)
    rows[3]["ori_color"] = 2 - rows[3]["ori_color"]
    path.write_bytes(pickle.dumps(rows))
    with pytest.raises(ValueError, match="case 3: .. holds that colour already"):
        published_cases(path)
    for wrong, message in (({"pos_int": 64}, "the square is 64"), ({"history": [275]}, "275")):
        path.write_bytes(pickle.dumps([rows[0] | wrong]))
        with pytest.raises(ValueError, match=message):
            published_cases(path)
    path.write_bytes(pickle.dumps([[1, 2]]))
    with pytest.raises(
        ValueError, match="a list of dicts with `history`, `pos_int` and `ori_color`"
    ):
        published_cases(path)


def test_improper_cases_are_refused():
    """None at all, a game that is over, a colour that is none, an edit that changes nothing."""
    games = board.random_games(2, seed=0)
    with pytest.raises(ValueError, match="there are no cases: give at least one"):
        make_cases(games[:0], np.array([], dtype=int), np.array([], dtype=int))
    for draw in (natural_cases, unnatural_cases):
        with pytest.raises(ValueError, match="there must be at least one case"):
            draw(0)
    with pytest.raises(ValueError, match="case 1: the colour is 2, but must be"):
        make_cases(np.array([[19], [19]]), np.array([28, 27]), np.array([1, 2]))
    with pytest.raises(ValueError, match="case 0: nobody can move any more"):
        make_cases(games[:1], np.array([0]), np.array([0]))
    with pytest.raises(ValueError, match="case 1: D3 holds that colour already; give another"):
        make_cases(np.array([[19], [19]]), np.array([28, 27]), np.array([-1, 1]))


@pytest.mark.usefixtures("unchecked")
def test_each_case_has_its_square_and_colour():
    """On the board, one of each a game; lists will do, and no move becomes another."""
    made = make_cases([[19], [19]], [28, 28], [0, -1])
    assert made.square.tolist() == [28, 28]
    for squares, square, colour, message in (
        ([[19]], [-1], [0], "case 0: the square is -1, but must be 0 to 63"),
        ([[19], [19]], [28, 64], [0, 0], "case 1: the square is 64, but must be 0 to 63"),
        (
            [[19]] * 3,
            [28],
            [0] * 3,
            r"3 games, but `square` is of shape \(1,\).*one square and one",
        ),
        ([[19]] * 3, [28] * 3, [0], r"and `colour` of \(1,\): give one square and one colour"),
        ([[275]], [28], [0], "275"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cases(squares, square, colour)


REFERENCE = Path(os.environ.get("OTHELLO_GPT_REFERENCE", "none")) / "intervention_benchmark.pkl"


@pytest.mark.skipif(not REFERENCE.exists(), reason="OTHELLO_GPT_REFERENCE lacks the file")
def test_the_published_cases_are_what_is_said_of_them():
    """1001, 483 of white discs and 518 of black, 510 after an odd number of moves; all change the replies."""
    cases = published_cases(REFERENCE)
    held = cases.before[np.arange(1001), cases.square // 8, cases.square % 8]

    assert [(held == colour).sum() for colour in (-1, 1)] == [483, 518]
    assert (cases.last % 2 == 0).sum() == 510
    assert (cases.legal_before != cases.legal_after).any((1, 2)).all()
