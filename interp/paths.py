"""Path patching at the last position: what one component tells another, everything else left as it was.

A sender's write is taken from the clean run, and only one receiver, above it, reads the changed stream: an
attention layer, an MLP, or the logits. What the receiver then writes differently goes into the corrupted run,
and everything above the receiver runs freely.

Source: Wang et al. 2022, "Interpretability in the Wild", section 3.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.metrics import LastMetric, Metric
from interp.patching import (
    Games,
    base_of_pairs,
    checked_pairs,
    checked_sites,
    chunks,
    effects_of,
    empty_results,
    is_one,
    shaped_results,
    sizes,
    slices,
)
from interp.rows import (
    PARTED,
    Activations,
    Base,
    Branch,
    KeysAndValues,
    branches_at,
    half_block,
    replay_branches,
)
from othello_gpt import OthelloGPT


class Paths(NamedTuple):
    """The metric of every path; nan where the sender does not stand below the receiver."""

    receivers: tuple[str, ...]  # "attn0", "mlp0", ..., "logits"
    effects: dict[str, Float[Tensor, "..."]]  # by the sender's site, [pair receiver layer *part]


@torch.no_grad()
def path_sweep(
    model: OthelloGPT,
    clean: Games,
    corrupted: Games,
    metric: Metric,
    senders: Iterable[str] = ("embed", "attn_out", "mlp_out"),
    memory: int = 2**27,
) -> Paths:
    """The metric of the corrupted run with one path, from a sender's write to one receiver, patched.

    Args:
        model, clean, corrupted, metric, memory: as for `patch_sweep`.
        senders: of "embed", "attn_out", "z", "mlp_out" and "post", the sites that write to the stream; "z"
            head by head, "post" neuron by neuron.

    Returns:
        Effects [pair receiver layer *part] for each sender's site, without the pair axis for one pair given
        as a tensor; the layer is the sender's, and "embed" has none.
    """
    pairs, senders = checked_pairs(model, clean, corrupted), checked_senders(senders)
    effects = empty_effects(model, len(pairs), senders)
    if isinstance(metric, LastMetric):
        metric.check(len(pairs))
    for some, max_rows in chunks(model, [game for _, game in pairs], memory):
        base = base_of_pairs(model, [pairs[i] for i in some], None, some)
        past = list(base.past)
        paths, before = _paths(model, base, past, senders)
        for batch in replay_branches(model, paths, past, max_rows // len(some)):
            found = effects_of(metric, batch.logits, before, some).cpu()
            for branch, parts, own in batch.of_each(found):
                site, layer, receiver = branch.key
                effects[site][some, receiver, layer, parts] = own
    return shaped_paths(model, effects, is_one(clean))


def _paths(
    model: OthelloGPT, base: Base, past: list[KeysAndValues | None], senders: Sequence[str]
) -> tuple[list[Branch], Float[Tensor, "pair pos d_vocab"]]:
    """The branches of every path, which leave just above the receiver; and the logits before the last."""
    rows = made = written = base.rows
    own = slice(base.n_before, base.n_before + 1)
    known: list[Branch] = []
    paths: list[Branch] = []
    for place in range(2 * model.cfg.n_layers):
        known += branches_at(model, place, Activations(rows, made, written), base, senders)
        made, written = half_block(model, place, rows, base.n_before, past)
        before, rows = rows[:, own].clone(), rows + written  # copies: views would keep all rows
        at = rows[:, own].clone()
        for sender in known:
            heard = partial(_heard, model, place, before, past, sender.change)
            key = (*sender.key, place)
            paths.append(sender._replace(key=key, place=place + 1, at=at, change=heard))
    end = 2 * model.cfg.n_layers
    known += branches_at(model, end, Activations(rows, made, written), base, senders)
    at = rows[:, own].clone()
    paths += [s._replace(key=(*s.key, end), place=end, at=at) for s in known]
    return paths, model.unembed(rows[:, : base.n_before])


def _heard(
    model: OthelloGPT,
    place: int,
    own: Float[Tensor, "pair 1 d_model"],
    past: list[KeysAndValues | None],
    change: Callable[[slice], Tensor],
    parts: slice,
) -> Float[Tensor, "pair row d_model"]:
    """By how much the receiver at a place writes differently when it reads a sender's change."""
    rows = torch.cat([own, own + change(parts)], 1)
    written = half_block(model, place, rows, 0, past)[1]
    return written[:, 1:] - written[:, :1]


@torch.no_grad()
def direct_effects(
    model: OthelloGPT,
    clean: Games,
    corrupted: Games,
    directions: Float[Tensor, "d_model *direction"],
    senders: Iterable[str] = ("embed", "attn_out", "mlp_out"),
    memory: int = 2**27,
) -> dict[str, Float[Tensor, "..."]]:
    """By how much each sender moves the stream along directions, from the corrupted to the clean run.

    It is the path from a head or neuron to whatever reads a square there, such as a probe. Summed over "embed",
    "attn_out" and "mlp_out" of the layers up to `l` it is the whole change of the score at `resid_post[l]`.

    Returns:
        For each sender's site [pair layer *part *direction], as for `patch_sweep`.
    """
    pairs, senders = checked_pairs(model, clean, corrupted), checked_senders(senders)
    columns = directions.reshape(len(directions), -1)
    results = empty_results(model, len(pairs), senders, columns.shape[1])
    for some, max_rows in chunks(model, [game for _, game in pairs], memory):
        base = base_of_pairs(model, [pairs[i] for i in some], None, some)
        past, rows = list(base.past), base.rows
        made = written = rows
        for place in range(2 * model.cfg.n_layers + 1):
            if place:
                made, written = half_block(model, place - 1, rows, base.n_before, past)
                rows = rows + written
            here = Activations(rows, made, written)
            for sender in branches_at(model, place, here, base, senders):
                site, layer = sender.key
                for parts in slices(sender.n_parts, max_rows // len(some)):
                    results[site][some, layer, parts] = (sender.change(parts) @ columns).cpu()
    as_subspaces = directions.new_empty(*directions.shape[1:], 0, 0)  # one for each direction
    return shaped_results(results, as_subspaces, is_one(clean), model.device)


def empty_effects(
    model: OthelloGPT, n_pairs: int, senders: Iterable[str]
) -> dict[str, Float[Tensor, "pair receiver layer part"]]:
    """Room for the effects of every path, on the CPU, nan so far."""
    n_receivers = 2 * model.cfg.n_layers + 1
    return {
        site: torch.full((n_pairs, n_receivers, *size), torch.nan, dtype=model.dtype)
        for site, size in sizes(model, senders).items()
    }


def shaped_paths(
    model: OthelloGPT, effects: dict[str, Float[Tensor, "pair receiver layer part"]], one: bool
) -> Paths:
    """The effects without the axes that a site or the call does not have."""
    names = [f"{kind}{layer}" for layer in range(model.cfg.n_layers) for kind in ("attn", "mlp")]
    shaped = {}
    for site, effect in effects.items():
        if site not in PARTED:
            effect = effect.squeeze(3)
        if site == "embed":
            effect = effect.squeeze(2)
        shaped[site] = (effect[0] if one else effect).to(model.device)
    return Paths((*names, "logits"), shaped)


def checked_senders(senders: Iterable[str]) -> tuple[str, ...]:
    senders = checked_sites(senders)
    if streams := [site for site in senders if site.startswith("resid")]:
        raise ValueError(
            f"{', '.join(map(repr, streams))} is the stream itself and writes nothing to it. Senders are "
            "embed, attn_out, z, mlp_out and post."
        )
    return senders
