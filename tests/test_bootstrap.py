"""Intervals over games: their coverage, their ratio, what cannot be drawn from."""

import pytest
import torch

from othello_gpt.bootstrap import bootstrap_mean, bootstrap_ratio


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 300 samples whose games agree within themselves, about 90 % of the 90 % intervals hold the mean."""
    generator = torch.Generator().manual_seed(0)
    truth, n_games, samples = 0.3, 60, 300
    share = torch.rand(n_games, samples, generator=generator) * 2 * truth  # of each game, mean 0.3
    length = torch.randint(20, 60, (n_games, samples), generator=generator).float()
    right = torch.binomial(length, share, generator=generator)
    _, low, high = bootstrap_ratio(right, length, level=0.9)
    held = ((low <= truth) & (truth <= high)).double().mean().item()

    assert 0.84 < held < 0.95


def test_the_value_is_the_ratio_of_the_sums():
    """Long games weigh more; equal games leave no doubt; where nothing was counted there is none."""
    numerator, denominator = torch.tensor([[1.0, 0], [3, 0]]), torch.tensor([[10.0, 0], [10, 0]])
    value, low, high = bootstrap_ratio(numerator, denominator)
    same = bootstrap_mean(torch.full((5,), 0.7))

    assert value[0].item() == pytest.approx(0.2)
    assert (low[0].item(), high[0].item()) == pytest.approx((0.1, 0.3))
    assert value[1].isnan()
    assert [x.item() for x in same] == pytest.approx([0.7] * 3)


def test_one_game_that_counts_has_an_interval():
    """Though many draws are without it, and their ratio is 0 / 0."""
    counted = torch.zeros(20).index_fill(0, torch.tensor(3), 4.0)

    assert [x.item() for x in bootstrap_ratio(counted / 2, counted)] == [0.5] * 3


def test_intervals_are_the_same_for_a_seed_and_need_games():
    """Another seed moves them a little."""
    values = torch.randn(40)

    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    with pytest.raises(ValueError, match="no games to draw from: give at least one"):
        bootstrap_mean(values[:0])
