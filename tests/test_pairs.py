"""The pair finder: what it promises of each pair is true by the rules, and averages have honest intervals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_strategies import random_model
from test_patching import SMALL

from interp.metrics import log_probability
from interp.pairs import find_pair, find_pairs, pair_tokens, pairs_metric, sure_pairs
from interp.patching import patch_sweep
from othello_gpt import OthelloGPT, board
from othello_gpt.games import example_pair


def test_a_pair_is_found_for_any_game():
    """Another last move, and a reply that is legal after the given one only."""
    game = board.random_games(1, seed=4)[0, :15]
    pair = find_pair(OthelloGPT.from_pretrained(), game)
    clean, corrupted = board.play(pair.clean), board.play(pair.corrupted)

    assert np.array_equal(pair.clean[:-1], pair.corrupted[:-1])
    assert pair.clean[-1] != pair.corrupted[-1]
    assert clean.legal[-1].flat[pair.answer]
    assert not corrupted.legal[-1].flat[pair.answer]
    with pytest.raises(ValueError, match="at least two moves"):
        find_pair(OthelloGPT.from_pretrained(), game[:1])


@settings(max_examples=5)
@given(st.integers(0, 2**16), st.integers(2, 40), st.sampled_from([1, 3, None]))
def test_every_pair_keeps_the_promise(seed, n_moves, max_changes):
    """By the rules: one exchanged move, the same side next, an answer legal once, no more changes than asked."""
    games = board.random_games(5, seed)
    pairs = find_pairs(random_model(SMALL), games, (n_moves,), max_changes, per_game=3)
    for (clean_game, corrupted_game, answer), game, distance, changes, _ in pairs:
        clean, corrupted = board.play(clean_game), board.play(corrupted_game)
        empty = (clean.state[-1] == 0) & (corrupted.state[-1] == 0)
        legal, other = clean.legal[-1] & empty, corrupted.legal[-1] & empty
        assert np.array_equal(clean_game, games[game, :n_moves])
        assert np.array_equal(clean_game[:-1], corrupted_game[:-1])
        assert clean_game[-1] != corrupted_game[-1]
        assert clean.to_move[-1] == corrupted.to_move[-1] != 0
        assert legal.flat[answer]
        assert not other.flat[answer]
        assert changes == (legal != other).sum()
        assert max_changes is None or changes <= max_changes
        assert distance == (clean.state[-1] != corrupted.state[-1]).sum()
    assert [p.distance for p in pairs] == sorted(p.distance for p in pairs)
    assert max(np.bincount([p.game for p in pairs]), default=0) <= 3


def test_a_named_square_changes_hands():
    """Mine after one game, theirs after the other; and such pairs there are."""
    games, d3 = board.random_games(60, seed=5), 27
    pairs = find_pairs(random_model(SMALL), games, (21,), max_changes=None, square=d3)
    last = [[board.play(game).state[-1].flat[d3] for game in p.pair[:2]] for p in pairs]

    assert len(pairs) > 3
    assert all(clean == -corrupted != 0 for clean, corrupted in last)


def test_the_pair_of_the_literature_is_found():
    """E0 and C0 with F0, of nine replies that change; and the model's log-probabilities rank it."""
    example, model = example_pair(), OthelloGPT.from_pretrained()
    found = find_pairs(model, example.clean[None], (21,), None, per_game=999)
    drops = {(int(p.pair.corrupted[-1]), p.pair.answer): p for p in found}
    ranked = drops[int(example.corrupted[-1]), example.answer]
    clean, corrupted, tokens = pair_tokens([ranked.pair])
    log_prob = log_probability(tokens)
    with torch.no_grad():
        expected = log_prob(model(clean[0])) - log_prob(model(corrupted[0]))

    assert ranked.changes == 9
    assert ranked.distance == 8
    assert ranked.drop == pytest.approx(expected.item(), abs=1e-4)
    assert not find_pairs(model, example.clean[None], (22,))


def test_the_metric_of_pairs_is_one_for_the_whole_stream():
    """Patching all of the last block's stream is the clean run: every pair's metric is 1."""
    model, games = random_model(SMALL), board.random_games(40, seed=2)
    found = find_pairs(model, games, (9, 12), max_changes=3)
    pairs = [ranked.pair for ranked in found]
    clean, corrupted, _ = pair_tokens(pairs)
    metric = pairs_metric(model, pairs)
    effects = patch_sweep(model, clean, corrupted, metric, ["resid_post"])["resid_post"]

    assert len(pairs) > 5
    assert torch.allclose(effects[:, -1], torch.ones(len(pairs)).double(), rtol=0, atol=1e-8)


def test_sure_pairs_are_the_nearest_boards_and_the_model_sees_the_difference():
    """Of all that the random games give, and each of more than a nat."""
    model = OthelloGPT.from_pretrained()
    ranked = find_pairs(model, board.random_games(24, seed=1), (16, 21, 26))
    sure = [each for each in ranked if each.drop > 1]
    pairs = sure_pairs(model, 6)

    assert len(pairs) == 6 < len(sure)
    for pair, expected in zip(pairs, sure, strict=False):
        assert all(map(np.array_equal, pair, expected.pair))
    with pytest.raises(ValueError, match="no pair was found in 0 games: average over more"):
        sure_pairs(model, 0)


def test_no_pair_comes_twice():
    """Games that begin alike give the same pairs: after three moves there are few."""
    found = find_pairs(random_model(SMALL), board.random_games(60, 3), (3,), max_changes=None)
    keys = {tuple(np.concatenate([r.pair.clean, r.pair.corrupted, [r.pair.answer]])) for r in found}

    assert len(keys) == len(found) > 20
