"""Activation patching: exact sweeps of the last position, one token step for all patches together.

Two games differ in their last move only. The model is causal, so before the last position both runs are
equal, and so are their keys and values. A patch at the last position therefore changes nothing but the
last position from the patched layer up: `patch_sweep` runs it as one row (see `interp.rows`).

`patch_together` is the slower road for everything else: earlier positions, several places at once, games that
differ anywhere.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import LastMetric, Metric, patching_metric
from interp.rows import PARTED, SITES, Base, bytes_of_a_row, normalized, replay
from othello_gpt import ActivationCache, HookPoint, OthelloGPT, get_act_name
from othello_gpt.cache import pos_axis
from othello_gpt.model import into_heads

__all__ = [
    "SITES",
    "Metric",
    "Patch",
    "last_logits",
    "onto",
    "patch_grid",
    "patch_sweep",
    "patch_sweep_by_rank",
    "patch_together",
    "patching_metric",
]

# One game or a batch of one length; or several games, each [pos], of any lengths.
Games = Int[Tensor, "*batch pos"] | Sequence[Int[Tensor, " _pos"]]


@torch.no_grad()
def patch_sweep(
    model: OthelloGPT,
    clean: Games,
    corrupted: Games,
    metric: Metric,
    sites: Iterable[str] = ("attn_out", "mlp_out"),
    within: Float[Tensor, "*subspace d_model d_model"] | None = None,
    clean_cache: ActivationCache | None = None,
    memory: int = 2**27,
    progress: bool = False,
) -> dict[str, Float[Tensor, "..."]]:
    """The metric of the corrupted run with one activation of its last position taken from the clean run.

    Exchange `clean` and `corrupted` for noising in place of denoising.

    Args:
        model: a model that nobody has hooked: hooks would not fire in the replayed position.
        clean: tokens of one game, [pos] or [1 pos]; of many of one length, [pair pos]; or a sequence of
            games [pos] of different lengths.
        corrupted: the same games, each with another last move.
        metric: a `LastMetric`, such as `patching_metric`, scores all patches at once; any other function of
            the logits [1 pos d_vocab] of one patched run is called once a patch.
        sites: any of "embed", "resid_pre", "attn_out", "z", "result", "resid_mid", "mlp_out", "post",
            "resid_post". "z" and "result" patch head by head (and give the same), "post" neuron by neuron.
        within: patch only the part of the change inside a subspace: a projection from `onto`, or several,
            each of which is a run of its own.
        clean_cache: of the clean runs, which are then of one length: saves running them, and the positions
            before the last. Nothing may have been edited in those, nor in what block 0 makes keys of. It
            needs "k" and "v" of every layer, what is patched ("z" for "result", "resid_pre" of block 0 for
            "embed"), and "unembed.hook_out" for a metric that is no `LastMetric`.
        memory: bytes that the sweep may take at a time, above the weights and the results.
        progress: show a bar that counts patched runs.

    Returns:
        For each site the metric by layer, [pair layer *part *subspace], without the pair axis for one pair
        given as a tensor. The part is the head of "z" and "result" and the neuron of "post"; "embed" has
        no layer axis.

    Raises:
        ValueError: unknown sites, games that differ before the last move, or a hooked model.
    """
    sites = checked_sites(sites)
    pairs = checked_pairs(model, clean, corrupted)

    if clean_cache is not None:
        _check_cache_fits(clean_cache, pairs)

    def base(some: list[int]) -> Base:
        return base_of_pairs(model, [pairs[i] for i in some], clean_cache, some)

    before = None
    if clean_cache is not None and not isinstance(metric, LastMetric):
        before = clean_cache["unembed.hook_out"][:, :-1]
    games = [game for _, game in pairs]
    one = is_one(clean)
    return sweep_games(model, games, metric, sites, base, one, within, memory, progress, before)


def patch_sweep_by_rank(
    model: OthelloGPT,
    clean: Games,
    corrupted: Games,
    metric: Metric,
    sites: Iterable[str] = ("attn_out", "mlp_out"),
    **options,
) -> dict[str, Float[Tensor, "..."]]:
    """`patch_sweep` under `torchrun`: every rank sweeps its share of the pairs, and all get the whole result.

    Called by every rank with the same pairs, after `torch.distributed.init_process_group`; with one process
    it is `patch_sweep`. The options are those of `patch_sweep`, but for `clean_cache`.
    """
    from torch import distributed

    if options.get("clean_cache") is not None:
        raise ValueError("ranks run their own clean games: leave `clean_cache` out.")
    rank, n_ranks = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, n_ranks = distributed.get_rank(), distributed.get_world_size()
    if n_ranks == 1:
        return patch_sweep(model, clean, corrupted, metric, sites, **options)
    pairs = checked_pairs(model, clean, corrupted)
    shares = [list(range(first, len(pairs), n_ranks)) for first in range(n_ranks)]
    own = shares[rank]
    if isinstance(metric, LastMetric):
        metric.check(len(pairs))
        metric = metric.of_pairs(torch.tensor(own, dtype=torch.long))
    own_clean, own_corrupted = ([pairs[i][side] for i in own] for side in (0, 1))
    results = patch_sweep(model, own_clean, own_corrupted, metric, sites, **options)
    gathered: list[dict[str, Tensor]] = [{}] * n_ranks
    distributed.all_gather_object(gathered, {site: r.cpu() for site, r in results.items()})
    order = torch.tensor([i for share in shares for i in share]).argsort()
    whole = {site: torch.cat([part[site] for part in gathered])[order] for site in results}
    return {site: (w[0] if is_one(clean) else w).to(model.device) for site, w in whole.items()}


def onto(directions: Float[Tensor, "d_model *direction"]) -> Float[Tensor, "d_model d_model"]:
    """The projection onto the span of some directions: `x @ onto(directions)` is the part of x inside it.

    `torch.eye(d_model) - onto(...)` is the projection onto all that is orthogonal to it. Directions that
    depend on each other are no trouble.
    """
    columns = directions.reshape(len(directions), -1)
    U, scales, _ = torch.linalg.svd(columns, full_matrices=False)
    rounding = scales.max() * max(columns.shape) * torch.finfo(scales.dtype).eps
    U = U[:, scales > rounding]
    return U @ U.T


@torch.no_grad()
def last_logits(
    model: OthelloGPT, games: Sequence[Int[Tensor, " _pos"]], batch_size: int = 64
) -> Float[Tensor, "game pos=1 d_vocab"]:
    """The logits after the last move of each game, whatever their lengths; its form suits metrics."""
    logits = torch.empty(len(games), 1, model.cfg.d_vocab, dtype=model.dtype, device=model.device)
    for same in by_length(games):
        for some in (same[i : i + batch_size] for i in range(0, len(same), batch_size)):
            logits[some] = model(torch.stack([games[i] for i in some]))[:, -1:]
    return logits


# --- The slower road --------------------------------------------------------------------------------


class Patch(NamedTuple):
    """One activation, or one head or neuron of it, taken from the clean run."""

    site: str  # in a block, by its short or full name
    layer: int
    pos: int  # of "pattern" and "attn_scores", the query's
    # the head of "q", "k", "v", "z", "result", "pattern" and "attn_scores", the neuron of "pre" and "post"
    part: int | None = None


@torch.no_grad()
def patch_together(
    model: OthelloGPT,
    clean: Int[Tensor, "*game pos"],
    corrupted: Int[Tensor, "*game pos"],
    metric: Metric,
    patches: Sequence[Sequence[Patch]],
    memory: int = 2**27,
) -> Float[Tensor, " run"]:
    """The metric of the corrupted run under each set of patches, at any positions and of any two games.

    Many runs are one batch, with hooks that change each its own row, and start at the lowest layer that
    they patch. Exact, but a run costs whole positions, where `patch_sweep` needs one token step.

    Args:
        clean, corrupted: two games of equal length, which may differ anywhere.
        patches: each entry is one run, with all its patches at once.
        memory: bytes that a batch may take.
    """
    check_unhooked(model)
    clean, corrupted = _one_game(clean), _one_game(corrupted)
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"`clean` has {len(clean)} moves and `corrupted` {len(corrupted)}: the games must be of equal length."
        )
    if isinstance(metric, LastMetric):
        metric.check(1)
    patches = [[_checked_patch(patch) for patch in run] for run in patches]
    sites = {patch.site for run in patches for patch in run}
    _, clean_cache = model.run_with_cache(clean, sorted(sites))
    starts = [f"resid_pre{layer}" for layer in range(model.cfg.n_layers)]
    plain, cache = model.run_with_cache(corrupted, [*starts, "unembed.hook_out"])
    row = bytes_of_a_row(model.cfg, len(clean), model.W_E.element_size()) * len(clean)
    n, lowest = max(1, memory // row), [min((p.layer for p in run), default=-1) for run in patches]
    effects = torch.empty(len(patches), dtype=model.dtype, device=model.device)
    for layer in sorted(set(lowest)):
        same = [i for i, first in enumerate(lowest) if first == layer]
        for some in (same[i : i + n] for i in range(0, len(same), n)):
            hooks = _patch_hooks([patches[i] for i in some], clean_cache)
            logits = plain
            if hooks:
                stream = cache["resid_pre", layer].repeat(len(some), 1, 1)
                logits = model.run_with_hooks(stream, hooks, start_at_layer=layer)
            effects[some] = _scores(metric, logits).to(effects)
    return effects


def _checked_patch(patch: Patch) -> Patch:
    """With the full name of its site."""
    site = get_act_name(patch.site, patch.layer)
    if not site.startswith(f"blocks.{patch.layer}."):
        raise ValueError(
            f"'{patch.site}' is no site of block {patch.layer}, where the run would start. Give the site's own "
            "layer; 'resid_pre' of block 0 stands for the embeddings."
        )
    if patch.part is not None and not (".attn." in site or ".mlp." in site):
        raise ValueError(
            f"'{patch.site}' has no heads or neurons, but `part` is {patch.part}: leave it out."
        )
    return patch._replace(site=site)


def _one_game(tokens: Int[Tensor, "*game pos"]) -> Int[Tensor, " pos"]:
    if tokens.ndim > 2 or (tokens.ndim == 2 and len(tokens) != 1):
        raise ValueError(
            f"one game is wanted, [pos] or [1 pos], not tokens of {tuple(tokens.shape)}."
        )
    return tokens.reshape(-1)


def _patch_hooks(
    runs: Sequence[Sequence[Patch]], clean: ActivationCache
) -> list[tuple[str, Callable]]:
    """One hook a site, which takes each run's own patches of that site from the clean cache."""
    by_site: dict[str, list[tuple[int, Patch]]] = {}
    for row, run in enumerate(runs):
        for patch in run:
            by_site.setdefault(patch.site, []).append((row, patch))

    def hook_of(patches: list[tuple[int, Patch]]) -> Callable:
        def patch_rows(activation: Tensor, hook: HookPoint) -> Tensor:
            patched = activation.clone()
            for row, patch in patches:
                part = slice(None) if patch.part is None else patch.part
                where = (patch.pos, part) if pos_axis(patch.site) == 1 else (part, patch.pos)
                patched[(row, *where)] = clean[hook.name][(0, *where)]
            return patched

        return patch_rows

    return [(site, hook_of(patches)) for site, patches in by_site.items()]


def _scores(metric: Metric, logits: Float[Tensor, "run pos d_vocab"]) -> Float[Tensor, " run"]:
    if isinstance(metric, LastMetric):
        return metric.rows(logits[None, :, -1])[0]
    return torch.tensor([float(metric(row[None])) for row in logits], dtype=logits.dtype)


def patch_grid(
    model: OthelloGPT,
    clean: Int[Tensor, "*game pos"],
    corrupted: Int[Tensor, "*game pos"],
    metric: Metric,
    sites: Iterable[str] = ("resid_pre", "attn_out", "mlp_out"),
    memory: int = 2**27,
) -> dict[str, Float[Tensor, "layer pos *part"]]:
    """The metric with each site of each layer patched at each position: `patch_together`, one patch a run.

    Before the first move in which the games differ a patch changes nothing, and nothing is run.
    """
    sites, clean, corrupted = checked_sites(sites), _one_game(clean), _one_game(corrupted)
    differ = (clean != corrupted).nonzero()
    first = int(differ[0]) if len(differ) else len(clean)
    results = {}
    plain = patch_together(model, clean, corrupted, metric, [[]])
    for site, (n_layers, n_parts) in sizes(model, sites).items():
        parts = range(n_parts) if site in PARTED else [None]
        inside = ("resid_pre", site)[site != "embed"]  # of block 0: the same change of the stream
        runs = [
            [Patch(inside, layer, pos, part)]
            for layer in range(n_layers)
            for pos in range(first, len(clean))
            for part in parts
        ]
        effects = patch_together(model, clean, corrupted, metric, runs, memory)
        ran = effects.reshape(n_layers, len(clean) - first, len(parts))
        whole = torch.cat([plain.expand(n_layers, first, len(parts)), ran], 1)
        results[site] = whole if parts != [None] else whole[..., 0]
    return results


# --- The sweep of the last position -----------------------------------------------------------------


def sweep_games(
    model: OthelloGPT,
    games: Sequence[Int[Tensor, " _pos"]],
    metric: Metric,
    sites: Sequence[str],
    base: Callable[[list[int]], Base],
    one: bool,
    within: Float[Tensor, "*subspace d_model d_model"] | None = None,
    memory: int = 2**27,
    progress: bool = False,
    before: Float[Tensor, "game pos d_vocab"] | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """The metric of every patch of the last position of every game: what the sweeps of this package call.

    Args:
        base: the unpatched rows of some of the games, given by index, all of one length, and what a patch
            sets an activation to.
        one: leave out the axis of games.
        before: logits before the last position, if the base rows do not have those positions.

    Returns:
        For each site [game layer *part *subspace], with the axes left out that `patch_sweep` leaves out.
    """
    spaces = checked_subspaces(model, within)
    n_spaces = 1 if spaces is None else len(spaces)
    results = empty_results(model, len(games), sites, n_spaces)
    if isinstance(metric, LastMetric):
        metric.check(len(games))
    with _bar(sum(result.numel() for result in results.values()), progress) as bar:
        for some, max_rows in chunks(model, games, memory, n_spaces):
            earlier = None
            found = {site: [[] for _ in result[0]] for site, result in results.items()}
            for batch in replay(model, base(some), sites, spaces, max_rows):
                if not batch.branches:
                    n_before = len(games[some[0]]) - 1
                    earlier = batch.logits[:, :n_before] if before is None else before[some]
                    continue
                effects = effects_of(metric, batch.logits, earlier, some).cpu()
                for branch, _, own in batch.of_each(effects):  # a layer's parts come in order
                    site, layer = branch.key
                    found[site][layer].append(own)
                if bar is not None:
                    bar.update(effects.numel())
            for site, by_layer in found.items():
                of_all = torch.cat([own for layer in by_layer for own in layer], 1)
                results[site][some] = of_all.reshape(len(some), *results[site].shape[1:])
    return shaped_results(results, within, one, model.device)


def sizes(model: OthelloGPT, sites: Iterable[str]) -> dict[str, tuple[int, int]]:
    """How many layers and how many parts a site has."""
    n_parts = {"z": model.cfg.n_heads, "result": model.cfg.n_heads, "post": model.cfg.d_mlp}
    return {s: (1 if s == "embed" else model.cfg.n_layers, n_parts.get(s, 1)) for s in sites}


def empty_results(
    model: OthelloGPT, n_games: int, sites: Iterable[str], n_spaces: int
) -> dict[str, Float[Tensor, "game layer part subspace"]]:
    """Room for the effects of every site, on the CPU."""
    return {
        site: torch.empty(n_games, *size, n_spaces, dtype=model.dtype)
        for site, size in sizes(model, sites).items()
    }


def shaped_results(
    results: dict[str, Float[Tensor, "game layer part subspace"]],
    within: Float[Tensor, "*subspace d_model d_model"] | None,
    one: bool,
    device: torch.device,
) -> dict[str, Float[Tensor, "..."]]:
    """[game layer *part *subspace] without the axes that a site or the call does not have."""
    spaces = () if within is None else within.shape[:-2]
    shaped = {}
    for site, result in results.items():
        n_games, n_layers, n_parts, _ = result.shape
        shape = [n_games] + [n_layers] * (site != "embed") + [n_parts] * (site in PARTED)
        effects = result.reshape(*shape, *spaces).to(device)
        shaped[site] = effects[0] if one else effects
    return shaped


def effects_of(
    metric: Metric,
    logits: Float[Tensor, "pair row d_vocab"],
    before: Float[Tensor, "pair pos d_vocab"] | None,
    pairs: list[int],
) -> Float[Tensor, "pair row"]:
    if isinstance(metric, LastMetric):
        usual = logits.clone()  # a metric may want gradients, of which `replay`'s know nothing
        return metric.of_pairs(torch.tensor(pairs, device=logits.device)).rows(usual)
    assert before is not None
    whole = [
        [metric(torch.cat([earlier, row[None]])[None]) for row in rows]
        for earlier, rows in zip(before, logits, strict=True)
    ]
    return torch.tensor([[float(effect) for effect in row] for row in whole], dtype=logits.dtype)


def base_of_pairs(
    model: OthelloGPT,
    pairs: Sequence[tuple[Tensor, Tensor]],
    cache: ActivationCache | None,
    some: list[int],
) -> Base:
    """Rows: the positions before the last, the corrupted last one, the clean one; with a cache the second alone."""
    clean, corrupted = (torch.stack(games) for games in zip(*pairs, strict=True))
    layers = range(model.cfg.n_layers)
    embedded, of_clean = model.embed(torch.cat([corrupted, clean])).split(len(pairs))
    if cache is None:
        rows = torch.cat([embedded, of_clean[:, -1:]], 1)
        return Base(rows, clean.shape[1] - 1, [None for _ in layers], _clean_row)

    which = slice(some[0], some[-1] + 1)  # consecutive, as all games of a cache are of one length
    _check_keys(model, of_clean, cache["k", 0][which])

    def cached(site: str, layer: int, here: Tensor) -> Tensor:
        return cache["resid_pre" if site == "embed" else site, layer][which, -1]

    past = [(cache["k", layer][which, :-1], cache["v", layer][which, :-1]) for layer in layers]
    return Base(embedded[:, -1:], 0, [*past], cached)


def _clean_row(site: str, layer: int, here: Tensor) -> Tensor:
    return here[:, -1]


def chunks(
    model: OthelloGPT, games: Sequence[Tensor], memory: int, per_part: int = 1
) -> Iterator[tuple[list[int], int]]:
    """Games of one length, as many as half the memory has room for, and how many rows have room in all.

    Args:
        per_part: the rows of a game that must run together, one for each subspace.
    """
    cfg, itemsize = model.cfg, model.W_E.element_size()
    for same in by_length(games):
        n_pos = games[same[0]].shape[0]
        row = bytes_of_a_row(cfg, n_pos, itemsize)
        past = 2 * cfg.n_layers * n_pos * cfg.n_heads * cfg.d_head * itemsize
        n_games = max(1, memory // 2 // (max(n_pos + 1, per_part) * row + past))
        for i in range(0, len(same), n_games):
            some = same[i : i + n_games]
            yield some, max(1, (memory - len(some) * past) // row)


def by_length(games: Sequence[Tensor]) -> Iterator[list[int]]:
    """The indices of the games of each length."""
    lengths = [game.shape[0] for game in games]
    for length in sorted(set(lengths)):
        yield [i for i, other in enumerate(lengths) if other == length]


def slices(n: int, size: int) -> Iterator[slice]:
    """0 to n in pieces of at most `size`, and at least 1."""
    size = max(size, 1)
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def _bar(total: int, shown: bool):
    """A bar, or None, as even one that is not shown takes its time."""
    if not shown:
        return nullcontext()
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="run")


def is_one(games: Games) -> bool:
    return isinstance(games, Tensor) and (games.ndim == 1 or len(games) == 1)


def game_list(games: Games) -> list[Int[Tensor, " _pos"]]:
    return list(torch.atleast_2d(games)) if isinstance(games, Tensor) else list(games)


def checked_sites(sites: Iterable[str]) -> tuple[str, ...]:
    sites = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if unknown := [site for site in sites if site not in SITES]:
        raise ValueError(
            f"cannot patch {', '.join(map(repr, unknown))}. Sites are {', '.join(SITES)}."
        )
    return sites


def checked_subspaces(
    model: OthelloGPT, within: Float[Tensor, "*subspace d_model d_model"] | None
) -> Float[Tensor, "subspace d_model d_model"] | None:
    """One after another, whatever their axes."""
    if within is None:
        return None
    d_model = model.cfg.d_model
    if within.shape[-2:] != (d_model, d_model):
        raise ValueError(
            f"`within` has shape {tuple(within.shape)}, but a projection is ({d_model}, {d_model}): make one "
            "from directions with `onto`."
        )
    return within.reshape(-1, d_model, d_model)


def check_unhooked(model: OthelloGPT) -> None:
    if model.registry.hooks:
        raise ValueError(
            "the model has hooks attached, and they would not fire in a sweep, which replays one "
            "position. Leave the `with model.hooks(...)` block, or call `model.reset_hooks()`."
        )


def checked_pairs(
    model: OthelloGPT, clean: Games, corrupted: Games
) -> list[tuple[Int[Tensor, " _pos"], Int[Tensor, " _pos"]]]:
    """Clean and corrupted games, pair by pair."""
    check_unhooked(model)
    pairs = list(zip(game_list(clean), game_list(corrupted), strict=True))
    for pair in pairs:
        _check_pair(*pair)
    return pairs


def _check_pair(clean: Tensor, corrupted: Tensor) -> None:
    if clean.shape != corrupted.shape or clean.ndim != 1:
        raise ValueError(
            f"`clean` has shape {tuple(clean.shape)} and `corrupted` {tuple(corrupted.shape)}. "
            "A sweep takes pairs of games of equal length: [pos], [pair pos], or sequences of [pos]."
        )
    if not torch.equal(clean[:-1], corrupted[:-1]):
        first = int((clean != corrupted).nonzero()[0])
        raise ValueError(
            f"the games already differ at pos {first}, before their last move. "
            "Cut both after their first difference, or use `patch_together`."
        )


def _check_cache_fits(cache: ActivationCache, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    held = tuple(cache["k", 0].shape[:2])
    needed = {(len(pairs), len(clean)) for clean, _ in pairs}
    if needed != {held}:
        raise ValueError(
            f"`clean_cache` holds {held[0]} games of {held[1]} positions, but the pairs are "
            f"{', '.join(f'{n} of {n_pos}' for n, n_pos in sorted(needed))}. Make it from the clean "
            "games of one length, in the same order."
        )


def _check_keys(
    model: OthelloGPT,
    embedded: Float[Tensor, "pair pos d_model"],
    cached: Float[Tensor, "pair pos head d_head"],
) -> None:
    """Whether a cache's keys of block 0 are those of the games, embedded."""
    block, rounding = model.blocks[0], torch.finfo(model.dtype).eps ** 0.5
    k = into_heads(normalized(block.ln1, embedded), block.attn.W_K, block.attn.b_K)
    if (k - cached).abs().max() > rounding * k.abs().max():
        raise ValueError(
            "`clean_cache` is of other games than `clean`: its keys differ. When `clean` and `corrupted` "
            "change places, the cache must be of the new clean games too."
        )
