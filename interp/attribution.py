"""Who wrote what: the residual stream as a sum of its writers, along any direction; sums that close."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from othello_gpt import ActivationCache, OthelloGPT


class Contributions(NamedTuple):
    """A value, split over the components that wrote it."""

    labels: tuple[str, ...]  # "embed", "pos_embed", "attn0", "mlp0", ...; heads are "attn0.head3"
    values: Float[Tensor, "component *rest"]
    total: Float[Tensor, "*rest"]  # the value itself, read from the run, not summed

    @property
    def gap(self) -> float:
        """By how much the sum of the parts misses the value, at worst."""
        return (self.values.sum(0) - self.total).abs().max().item()


def contributions(
    cache: ActivationCache, directions: Float[Tensor, "d_model *direction"], layer: int = -1
) -> Contributions:
    """The dot product of `resid_post[layer]` with each direction, split by component.

    The stream is embed + pos_embed + all that attention and MLPs wrote up to and with `layer`, biases
    included in what they wrote, so the parts sum to the score exactly.

    Args:
        cache: a run that kept `embed`, `pos_embed`, and each layer's `attn_out`, `mlp_out`, `resid_post`.
        directions: for instance `probe.mine` [d_model 8 8], or one column of W_U.
        layer: the last layer that counts; negative counts from the end.

    Returns:
        Values [component batch pos *direction], in the units of the direction (logits for a probe).
    """
    last = layer % cache.n_layers
    written = {"embed": cache["embed"], "pos_embed": cache["pos_embed"]}
    for i in range(last + 1):
        written[f"attn{i}"] = cache["attn_out", i]
        written[f"mlp{i}"] = cache["mlp_out", i]
    parts = torch.stack([torch.tensordot(write, directions, 1) for write in written.values()])
    total = torch.tensordot(cache["resid_post", last], directions, 1)
    return Contributions(tuple(written), parts, total)


def head_contributions(
    model: OthelloGPT,
    cache: ActivationCache,
    directions: Float[Tensor, "d_model *direction"],
    layer: int,
) -> Contributions:
    """The dot product of `attn_out[layer]` with each direction, split by head, the bias last."""
    attn, z = model.blocks[layer].attn, cache["z", layer]
    reads = torch.tensordot(attn.W_O, directions, 1)  # [head, d_head, *direction]
    heads = [torch.tensordot(z[:, :, head], reads[head], 1) for head in range(len(reads))]
    bias = torch.tensordot(attn.b_O, directions, 1).expand_as(heads[0])
    parts = torch.stack([*heads, bias])
    labels = tuple(f"attn{layer}.head{head}" for head in range(len(attn.W_O)))
    total = torch.tensordot(cache["attn_out", layer], directions, 1)
    return Contributions((*labels, f"attn{layer}.bias"), parts, total)


def accumulated_scores(
    cache: ActivationCache, directions: Float[Tensor, "d_model *direction"], layer: int = -1
) -> Float[Tensor, "layer batch pos *direction"]:
    """The dot product of `resid_post` with each direction, after every layer up to and with `layer`."""
    last = layer % cache.n_layers
    resid = [cache["resid_post", i] for i in range(last + 1)]
    return torch.stack([torch.tensordot(stream, directions, 1) for stream in resid])


def direct_logit_attribution(
    model: OthelloGPT, cache: ActivationCache, token: int, pos: int = -1
) -> Contributions:
    """The logit of `token` after one move, split by component, plus a "bias" that nobody wrote.

    The final LayerNorm's scale is held at its value in this run, and then the logit is linear in the
    stream. Its weight belongs to the direction, its bias and b_U to the constant: so the parts sum to the
    logit whether or not LayerNorm was folded.

    Returns:
        Values [component batch], in logits.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    column = model.W_U[:, token]
    direction = model.ln_final.w * column
    direction = direction - direction.mean()  # LayerNorm centres the stream, so does this
    run = cache.select(pos=pos)
    stream = contributions(run, direction)
    scale = run["ln_final.hook_scale"][..., 0]
    constant = (model.ln_final.b @ column + model.b_U[token]).expand(1, len(scale), 1)
    values = torch.cat([stream.values / scale, constant])[..., 0]
    total = run["ln_final.hook_normalized"][:, 0] @ (model.ln_final.w * column) + constant[0, :, 0]
    return Contributions((*stream.labels, "bias"), values, total)
