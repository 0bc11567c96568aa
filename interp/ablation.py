"""Ablation at the last position: activations set to zero, to their mean over games, or to another game's.

The same rows as a patch, from one run: see `interp.rows`. Whether a component matters depends on what it
is replaced by, so none of the three is left unsaid.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import Metric
from interp.patching import (
    Games,
    by_length,
    check_unhooked,
    checked_sites,
    game_list,
    is_one,
    sweep_games,
)
from interp.rows import Base
from othello_gpt import OthelloGPT, get_act_name

Values = Mapping[str, Float[Tensor, "..."]]  # by full name of the site: [*site] or [game *site]


@torch.no_grad()
def ablation_sweep(
    model: OthelloGPT,
    games: Games,
    metric: Metric,
    sites: Iterable[str] = ("attn_out", "mlp_out"),
    values: Values | None = None,
    within: Float[Tensor, "*subspace d_model d_model"] | None = None,
    memory: int = 2**27,
    progress: bool = False,
) -> dict[str, Float[Tensor, "..."]]:
    """The metric of a run with one activation of its last position replaced.

    Args:
        games: as for `patch_sweep`.
        values: what replaces each activation: `None` is zero, `mean_values` the mean over games,
            `resampled_values` that of other games. One value for all games, or one a game.
        metric, sites, within, memory, progress: as for `patch_sweep`.

    Returns:
        As `patch_sweep`. The metric of the run itself is not among them.
    """
    sites = checked_sites(sites)
    check_unhooked(model)
    runs = game_list(games)

    def base(some: list[int]) -> Base:
        rows = model.embed(torch.stack([runs[i] for i in some]))
        pos_embed = model.W_pos[rows.shape[1] - 1]

        def value(site: str, layer: int, here: Tensor) -> Tensor:
            shape = (len(here), *here.shape[2:])
            name = _full_name(site, layer)
            given = here.new_zeros(()) if values is None else values[name].to(here)
            given = _of_games(given, some, len(runs)) if given.ndim == len(shape) else given
            return (given + pos_embed if site == "embed" else given).expand(shape)

        return Base(rows, rows.shape[1] - 1, [None] * model.cfg.n_layers, value)

    return sweep_games(model, runs, metric, sites, base, is_one(games), within, memory, progress)


def _of_games(values: Tensor, some: list[int], n_games: int) -> Tensor:
    if len(values) != n_games:
        raise ValueError(
            f"`values` are of {len(values)} games, but {n_games} are swept: give one value for all "
            "(`mean_values`), or one a game (`resampled_values`)."
        )
    return values[some]


@torch.no_grad()
def last_values(
    model: OthelloGPT,
    games: Sequence[Int[Tensor, " _pos"]],
    sites: Iterable[str] = ("attn_out", "mlp_out"),
    batch_size: int = 64,
) -> dict[str, Float[Tensor, "game ..."]]:
    """The activations of the sites at every game's last position, by full name, [game *site]."""
    layers = range(model.cfg.n_layers)
    names = list(dict.fromkeys(_full_name(s, at) for s in checked_sites(sites) for at in layers))
    values: dict[str, Tensor] = {}
    for same in by_length(games):
        for some in (same[i : i + batch_size] for i in range(0, len(same), batch_size)):
            _, cache = model.run_with_cache(torch.stack([games[i] for i in some]), names)
            for name in names:
                last = cache[name][:, -1]
                values.setdefault(name, last.new_empty(len(games), *last.shape[1:]))[some] = last
    return values


def mean_values(values: Values) -> dict[str, Float[Tensor, "..."]]:
    """The mean over games of `last_values`."""
    return {name: of_games.mean(0) for name, of_games in values.items()}


def resampled_values(
    values: Values, n_games: int, seed: int = 0
) -> dict[str, Float[Tensor, "..."]]:
    """Of `last_values`, those of `n_games` games drawn at random, one game for all sites of a run.

    Run i never draws game i, so that games swept with their own values get another's.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(next(iter(values.values())))
    steps = torch.randint(1, max(n, 2), (n_games,), generator=generator)
    drawn = (torch.arange(n_games) + steps) % n
    return {name: of_games[drawn] for name, of_games in values.items()}


def _full_name(site: str, layer: int) -> str:
    site = "z" if site == "result" else site
    return get_act_name(site, None if site == "embed" else layer)
