"""Positions of games, one a row, and neurons' activations at them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from model_strategies import random_model
from strategies import games

from interp.positions import positions_of, stream_neurons
from othello_gpt import GPTConfig, board
from othello_gpt.games import games_to_tokens


@given(games())
def test_positions_are_those_from_which_somebody_moves(game):
    """Each row is the engine's board as the next mover sees it, after the move that it names."""
    record = board.play(game[None])
    positions = positions_of(game[None], first_game=5)

    assert set(positions.game.tolist()) <= {5}
    assert positions.ply.tolist() == np.flatnonzero(record.to_move[0, :59]).tolist()
    expected = board.piece_classes(record)[0, positions.ply].reshape(-1, 64)
    assert np.array_equal(positions.classes, expected)
    assert np.array_equal(positions.played, game[positions.ply])


def test_positions_end_with_the_model_s_context():
    """A model of twenty positions is asked for no more."""
    cfg = GPTConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=6, n_ctx=20)
    positions, post = next(stream_neurons(random_model(cfg), board.random_games(3, seed=3), [0]))

    assert positions.ply.tolist() == 3 * list(range(20))
    assert post.shape == (1, 60, 6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_of_games_are_what_one_run_gives(batch_size):
    """Rows and activations in order, whatever the size of the batches."""
    model = random_model(GPTConfig(n_layers=3, d_model=8, n_heads=2, d_head=4, d_mlp=6))
    squares = board.random_games(7, seed=3)
    _, cache = model.run_with_cache(games_to_tokens(squares))
    batches = list(stream_neurons(model, squares, [2, 0], batch_size))
    game, ply = (np.concatenate([getattr(p, f) for p, _ in batches]) for f in ("game", "ply"))
    post = torch.cat([post for _, post in batches], 1)

    assert len(batches) == -(-7 // batch_size)
    assert np.array_equal(positions_of(squares).game, game)
    for layer, activations in zip([2, 0], post, strict=True):
        assert torch.allclose(activations, cache["post", layer][game, ply], atol=1e-12)
