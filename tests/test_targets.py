"""What probes are asked: labels by rules stated anew, the mover through forfeits, shuffling, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import games

from interp.targets import (
    BLACK,
    FLIPPED,
    LEGAL,
    MINE,
    PLAYED,
    TARGETS,
    Target,
    find_target,
    shuffled,
)
from othello_gpt import board


@given(games())
def test_each_target_says_of_each_square_what_its_name_says(game):
    """Ply by ply from the record: colours, the discs that turned, the move itself, the replies."""
    record = board.play(game[None])
    labels = {name: target(record)[0].numpy() for name, target in TARGETS.items()}
    names = {name: np.array(target.classes)[labels[name]] for name, target in TARGETS.items()}
    for ply, square in enumerate(game):
        row, col = divmod(int(square), 8)
        state, to_move = record.state[0, ply], record.to_move[0, ply]
        played = np.zeros((8, 8), dtype=bool)
        played[row, col] = True
        assert np.array_equal(names["played"][ply] == "played", played)
        assert np.array_equal(names["black"][ply] == "black", state == 1)
        assert np.array_equal(names["black"][ply] == "white", state == -1)
        assert np.array_equal(names["flipped"][ply] == "flipped", record.flipped[0, ply])
        assert np.array_equal(names["legal"][ply] == "legal", record.legal[0, ply])
        if to_move:
            assert np.array_equal(names["mine"][ply] == "mine", state == to_move)
            assert np.array_equal(names["mine"][ply] == "theirs", state == -to_move)


def test_mine_follows_the_mover_through_a_forfeit():
    """Where one side moves twice, mine are its discs, whatever the parity of the ply."""
    record = board.play(board.random_games(50, seed=0))
    labels = MINE(record)
    same_side_again = (record.mover[:, 1:] == record.mover[:, :-1]) & (record.mover[:, 1:] != 0)

    assert same_side_again.any()
    for game, ply in np.argwhere(same_side_again):
        mine = record.state[game, ply] == record.mover[game, ply + 1]
        assert np.array_equal(labels[game, ply].numpy() == 2, mine)


def test_shuffled_labels_are_those_of_another_game_at_the_same_ply():
    """Discs are as many as plies played and four, no game keeps its own labels, and another seed gives others."""
    record = board.play(board.random_games(20, seed=0)[:, :40])
    own, other = BLACK(record), shuffled(BLACK)(record)
    discs = (other != 0).sum((2, 3))

    assert not any(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert discs[0].tolist() == list(range(5, 45))
    assert not torch.equal(other, shuffled(BLACK, seed=1)(record))
    assert (shuffled(BLACK).name, shuffled(BLACK).classes) == (BLACK.name, BLACK.classes)


def test_shuffled_labels_do_not_depend_on_the_batch():
    """A game alone, or padded among others, takes the same ones; no games are none."""
    games, asked = board.random_games(6, seed=0), shuffled(MINE)
    together = asked(board.play(games))

    assert torch.equal(asked(board.play(games[3:4])), together[3:4])
    cut = np.where(np.arange(60) < 9, games, -1).astype(np.int8)
    assert torch.equal(asked(board.play(cut[:, :9])), asked(board.play(cut))[:, :9])
    assert asked(board.play(games[:0])).shape == (0, 60, 8, 8)


def test_wrong_labels_are_refused():
    """Another shape, fractions, values that are no classes, a name that nobody knows."""
    record = board.play(board.random_games(2, seed=0))
    with pytest.raises(ValueError, match="give one label a square"):
        Target("x", ("a", "b"), lambda record: record.to_move)(record)
    with pytest.raises(ValueError, match="gave labels -1 to 1, but it has 2 classes: give 0 to 1"):
        Target("x", ("a", "b"), lambda record: record.state)(record)
    with pytest.raises(ValueError, match="gave labels that are no integers: give 0 to 1"):
        Target("x", ("a", "b"), lambda record: record.state**2 / 2)(record)
    with pytest.raises(ValueError, match="no target is named 'x': there are mine, black"):
        find_target("x")
    assert find_target("flipped") is FLIPPED
    assert (PLAYED.classes[0], LEGAL.classes[0]) == ("played", "legal")
