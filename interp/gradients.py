"""Attribution patching: every patch, or path, of a sweep estimated from one gradient, to first order.

The exact sweep costs a token step a patch, so the estimate is needed only where even that is too much; what
it is good for is to see how linear the model is. Both give the same shapes.

Source: Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale".
"""

from collections.abc import Iterable
from itertools import pairwise
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
    checked_subspaces,
    chunks,
    empty_results,
    is_one,
    shaped_results,
    slices,
)
from interp.paths import Paths, checked_senders, empty_effects, shaped_paths
from interp.rows import Activations, Base, branches_at, half_block
from othello_gpt import OthelloGPT


@torch.no_grad()
def attribution_sweep(
    model: OthelloGPT,
    clean: Games,
    corrupted: Games,
    metric: LastMetric,
    sites: Iterable[str] = ("attn_out", "mlp_out"),
    within: Float[Tensor, "*subspace d_model d_model"] | None = None,
    memory: int = 2**27,
) -> dict[str, Float[Tensor, "..."]]:
    """What `patch_sweep` gives, estimated: the metric of the corrupted run, plus change times gradient.

    A patch adds its change to the residual stream, so one gradient of the metric with respect to the stream at
    each place serves every site. Arguments and results are those of `patch_sweep`, but for the metric, which must
    look at the last position only.
    """
    pairs, sites = checked_pairs(model, clean, corrupted), checked_sites(sites)
    _check_metric(metric, len(pairs))
    spaces = checked_subspaces(model, within)
    results = empty_results(model, len(pairs), sites, 1 if spaces is None else len(spaces))
    # The gradient needs the activations of all layers at once.
    games, memory = [game for _, game in pairs], memory // model.cfg.n_layers
    for some, max_rows in chunks(model, games, memory, results[sites[0]].shape[-1]):
        base = base_of_pairs(model, [pairs[i] for i in some], None, some)
        of_some = metric.of_pairs(torch.tensor(some, device=model.device))
        plain, gradients, climbed = _gradients(model, base, of_some)
        for place, here in enumerate(climbed):
            for branch in branches_at(model, place, here, base, sites, spaces):
                site, layer = branch.key
                for parts in slices(branch.n_parts, max_rows // len(some) // branch.per_part):
                    estimate = plain + (branch.change(parts) * gradients[place]).sum(-1)
                    shape = (len(some), -1, branch.per_part)
                    results[site][some, layer, parts] = estimate.reshape(shape).cpu()
    return shaped_results(results, within, is_one(clean), model.device)


@torch.no_grad()
def attribution_paths(
    model: OthelloGPT,
    clean: Games,
    corrupted: Games,
    metric: LastMetric,
    senders: Iterable[str] = ("embed", "attn_out", "mlp_out"),
    memory: int = 2**27,
) -> Paths:
    """What `path_sweep` gives, estimated, the metric as for `attribution_sweep`.

    What a receiver adds to the gradient of the stream that it reads is the gradient there less that above it, so
    that the paths from a sender add up to the estimate of its patch.
    """
    pairs, senders = checked_pairs(model, clean, corrupted), checked_senders(senders)
    _check_metric(metric, len(pairs))
    effects = empty_effects(model, len(pairs), senders)
    games, memory = [game for _, game in pairs], memory // model.cfg.n_layers
    for some, max_rows in chunks(model, games, memory):
        base = base_of_pairs(model, [pairs[i] for i in some], None, some)
        of_some = metric.of_pairs(torch.tensor(some, device=model.device))
        plain, gradients, climbed = _gradients(model, base, of_some)
        read = [below - above for below, above in pairwise(gradients)] + gradients[-1:]
        for place, here in enumerate(climbed):
            for sender in branches_at(model, place, here, base, senders):
                site, layer = sender.key
                for parts in slices(sender.n_parts, max_rows // len(some)):
                    change = sender.change(parts)
                    for receiver in range(place, len(read)):
                        estimate = plain + (change * read[receiver]).sum(-1)
                        effects[site][some, receiver, layer, parts] = estimate.cpu()
    return shaped_paths(model, effects, is_one(clean))


def _check_metric(metric: Metric, n_pairs: int) -> None:
    if not isinstance(metric, LastMetric):
        raise ValueError(
            "`metric` must be an `interp.metrics.LastMetric`, which has a gradient by pair."
        )
    metric.check(n_pairs)


class Agreement(NamedTuple):
    """How near estimates come to the exact effects, over all pairs, layers and parts."""

    correlation: float
    worst_error: float  # in the metric's unit


def agreement(exact: Float[Tensor, "*effect"], estimated: Float[Tensor, "*effect"]) -> Agreement:
    """Of one site's `patch_sweep` and `attribution_sweep`."""
    both = torch.stack([exact.flatten(), estimated.flatten()])
    return Agreement(both.corrcoef()[0, 1].item(), both.diff(dim=0).abs().max().item())


def _gradients(
    model: OthelloGPT, base: Base, metric: LastMetric
) -> tuple[Float[Tensor, "pair 1"], list[Float[Tensor, "pair 1 d_model"]], list[Activations]]:
    """The metric of the base run, its gradient by the stream at every place, and the activations there."""
    own = slice(base.n_before, base.n_before + 1)
    past = list(base.past)
    with torch.enable_grad():
        rows = base.rows.detach().requires_grad_()
        made = written = rows
        climbed = [Activations(rows, made, written)]
        for place in range(2 * model.cfg.n_layers):
            made, written = half_block(model, place, rows, base.n_before, past)
            rows = rows + written
            climbed.append(Activations(rows, made, written))
        plain = metric.rows(model.unembed(rows[:, own]))
        gradients = torch.autograd.grad(plain.sum(), [here.stream for here in climbed])
    detached = [Activations(*(t.detach() for t in here)) for here in climbed]
    return plain.detach(), [gradient[:, own] for gradient in gradients], detached
