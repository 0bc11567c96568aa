"""How sure a figure is: intervals from drawing whole games anew, since positions of a game are not independent."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Estimate(NamedTuple):
    """A figure and the bounds between which it would lie with other games."""

    value: Float[Tensor, "*part"]
    low: Float[Tensor, "*part"]
    high: Float[Tensor, "*part"]


def bootstrap_ratio(
    numerator: Float[Tensor, "game *part"],
    denominator: Float[Tensor, "game *#part"],
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """The sum of one count over the sum of another, with its percentile interval over games.

    Args:
        numerator: what each game counts, for instance squares read right.
        denominator: out of how many. Where nothing was counted the estimate is nan.
        level: the share of draws between the bounds.
        draws: how often as many games are drawn with replacement; fewer where they would take over a gigabyte.

    Raises:
        ValueError: no games.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    n_games = len(numerator)
    if n_games == 0:
        raise ValueError("there are no games to draw from: give at least one.")
    draws = min(draws, 2**26 // n_games)
    counts = torch.stack([numerator, denominator.expand_as(numerator)], 1).double().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_games, (draws, n_games), generator=generator)
    ones = torch.ones(draws, n_games, dtype=torch.double)
    weights = torch.zeros_like(ones).scatter_add_(1, drawn, ones)  # how often each game was drawn
    sums = torch.tensordot(weights, counts, 1)  # [draws, 2, *part]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)
    low, high = torch.nanquantile(sums[:, 0] / sums[:, 1], tails, dim=0)  # of draws that counted
    total = counts.sum(0)
    return Estimate(*(x.to(numerator) for x in (total[0] / total[1], low, high)))


def bootstrap_mean(values: Float[Tensor, "game *part"], **options) -> Estimate:
    """The mean over games (or cases, one a game) with its interval; options as of `bootstrap_ratio`."""
    return bootstrap_ratio(values, torch.ones_like(values), **options)
