"""Who wrote what: the residual stream as a sum of its writers, along any direction; sums that close."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.probes import LinearProbe
from othello_gpt import ActivationCache, OthelloGPT

LEVELS = ("layer", "head", "neuron")


class Contributions(NamedTuple):
    """A value, split over the components that wrote it."""

    labels: tuple[
        str, ...
    ]  # "embed", "pos_embed", "attn0", "mlp0", ...; "attn0.head3", "mlp0.neuron7"
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
    last = _checked_layer(layer, cache.n_layers)
    written = {"embed": cache["embed"], "pos_embed": cache["pos_embed"]}
    for i in range(last + 1):
        written[f"attn{i}"] = cache["attn_out", i]
        written[f"mlp{i}"] = cache["mlp_out", i]
    parts = torch.stack([torch.tensordot(write, directions, 1) for write in written.values()])
    total = torch.tensordot(cache["resid_post", last], directions, 1)
    return Contributions(tuple(written), parts, total)


def _checked_layer(layer: int, n_layers: int) -> int:
    """The layer, counted from the front."""
    if not -n_layers <= layer < n_layers:
        raise ValueError(f"`layer` is {layer}, but the model has layers 0 to {n_layers - 1}.")
    return layer % n_layers


def head_contributions(
    model: OthelloGPT,
    cache: ActivationCache,
    directions: Float[Tensor, "d_model *direction"],
    layer: int,
) -> Contributions:
    """The dot product of `attn_out[layer]` with each direction, split by head, the bias last."""
    layer = _checked_layer(layer, cache.n_layers)
    attn, z = model.blocks[layer].attn, cache["z", layer]
    reads = torch.tensordot(attn.W_O, directions, 1)  # [head, d_head, *direction]
    heads = [torch.tensordot(z[:, :, head], reads[head], 1) for head in range(len(reads))]
    bias = torch.tensordot(attn.b_O, directions, 1).expand_as(heads[0])
    parts = torch.stack([*heads, bias])
    labels = tuple(f"attn{layer}.head{head}" for head in range(len(attn.W_O)))
    total = torch.tensordot(cache["attn_out", layer], directions, 1)
    return Contributions((*labels, f"attn{layer}.bias"), parts, total)


def neuron_contributions(
    model: OthelloGPT,
    cache: ActivationCache,
    directions: Float[Tensor, "d_model *direction"],
    layer: int,
) -> Contributions:
    """The dot product of `mlp_out[layer]` with each direction, split by neuron, the bias last."""
    layer = _checked_layer(layer, cache.n_layers)
    mlp, post = model.blocks[layer].mlp, cache["post", layer]
    reads = torch.tensordot(mlp.W_out, directions, 1)  # [d_mlp, *direction]
    neurons = torch.einsum("bpn,n...->nbp...", post, reads)
    bias = torch.tensordot(mlp.b_out, directions, 1).expand_as(neurons[:1])
    labels = (*(f"mlp{layer}.neuron{n}" for n in range(len(reads))), f"mlp{layer}.bias")
    total = torch.tensordot(cache["mlp_out", layer], directions, 1)
    return Contributions(labels, torch.cat([neurons, bias]), total)


def split_contributions(
    model: OthelloGPT,
    cache: ActivationCache,
    directions: Float[Tensor, "d_model *direction"],
    layer: int = -1,
    level: str = "head",
) -> Contributions:
    """`contributions` with attention split into heads or, at level "neuron", the MLPs into neurons as well.

    The biases of what is split are components of their own.

    Args:
        cache: a run that kept what `contributions` needs and, of each layer, `z` and (for neurons) `post`.
            Select games and positions first: one value a neuron, position and direction adds up.
        level: "layer" (which is `contributions`), "head" or "neuron".
    """
    if level not in LEVELS:
        raise ValueError(f"`level` is '{level}', but must be one of {', '.join(LEVELS)}.")
    whole = contributions(cache, directions, layer)
    if level == "layer":
        return whole
    parts = [Contributions(whole.labels[:2], whole.values[:2], whole.total)]  # the embeddings
    for i in range(_checked_layer(layer, cache.n_layers) + 1):
        parts.append(head_contributions(model, cache, directions, i))
        if level == "neuron":
            parts.append(neuron_contributions(model, cache, directions, i))
        else:
            mlp = whole.values[2 * i + 3 : 2 * i + 4]
            parts.append(Contributions((f"mlp{i}",), mlp, mlp[0]))
    labels = tuple(label for part in parts for label in part.labels)
    return Contributions(labels, torch.cat([part.values for part in parts]), whole.total)


def accumulated_scores(
    cache: ActivationCache, directions: Float[Tensor, "d_model *direction"], layer: int = -1
) -> Float[Tensor, "layer batch pos *direction"]:
    """The dot product of `resid_post` with each direction, after every layer up to and with `layer`."""
    last = _checked_layer(layer, cache.n_layers)
    resid = [cache["resid_post", i] for i in range(last + 1)]
    return torch.stack([torch.tensordot(stream, directions, 1) for stream in resid])


def direct_logit_attribution(
    model: OthelloGPT,
    cache: ActivationCache,
    token: int | Int[Tensor, "*token"],
    pos: int = -1,
    level: str = "layer",
) -> Contributions:
    """The logit of `token` after one move, split by component, plus a "bias" that nobody wrote.

    The final LayerNorm's scale is frozen at its value in this run, and then the logit is linear in the
    stream. Its weight belongs to the direction, its bias and b_U to the constant: so the parts sum to the
    logit whether or not LayerNorm was folded.

    Args:
        token: one, or several at once; all of them at level "neuron" is what every neuron does to every move.
        level: "layer", "head" or "neuron", as for `split_contributions`.

    Returns:
        Values [component batch *token], in logits.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    columns = model.W_U[:, token]  # [d_model, *token]
    weighted = torch.einsum("m,m...->m...", model.ln_final.w, columns)
    directions = weighted - weighted.mean(0)  # LayerNorm centres the stream, so does this
    run = cache.select(pos=pos)
    stream = split_contributions(model, run, directions, -1, level)
    scale = run["ln_final.hook_scale"][:, 0, 0]
    constant = torch.tensordot(model.ln_final.b, columns, 1) + model.b_U[token]
    written = torch.einsum("cb...,b->cb...", stream.values[:, :, 0], 1 / scale)
    values = torch.cat([written, constant.expand_as(written[:1])])
    normalized = run["ln_final.hook_normalized"][:, 0]
    total = torch.tensordot(normalized, weighted, 1) + constant
    return Contributions((*stream.labels, "bias"), values, total)


def stepwise_logit_attribution(
    model: OthelloGPT,
    cache: ActivationCache,
    token: int | Int[Tensor, "*token"],
    pos: int = -1,
    level: str = "layer",
) -> Contributions:
    """The logit of `token`, split by how far each component moves it when its write is added to those before.

    The final LayerNorm is recomputed at every step. So this is what the logit lens sees change, and it
    depends on the order, where `direct_logit_attribution` holds the scale and does not. "bias" is the logit of
    an empty stream.

    Args, Returns: as `direct_logit_attribution`.
    """
    run = cache.select(pos=pos)
    eye = torch.eye(model.cfg.d_model, dtype=model.dtype, device=model.device)
    writes = split_contributions(model, run, eye, -1, level)
    streams = torch.cat([torch.zeros_like(writes.values[:1]), writes.values.cumsum(0)])[:, :, 0]
    logits = model.unembed(streams)[..., token]  # [step, batch, *token]
    total = model.unembed(writes.total[:, 0])[..., token]
    values = torch.cat([logits.diff(dim=0), logits[:1]])
    return Contributions((*writes.labels, "bias"), values, total)


def logit_lens(
    model: OthelloGPT, cache: ActivationCache
) -> Float[Tensor, "layer batch pos d_vocab"]:
    """The logits that the stream would give if the model ended there, the final LayerNorm recomputed.

    Entry 0 reads the embeddings, entry `l + 1` reads `resid_post[l]`; the last is the model's own.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    return model.unembed(torch.stack(_streams(cache)))


def frozen_logit_lens(
    model: OthelloGPT, cache: ActivationCache
) -> Float[Tensor, "layer batch pos d_vocab"]:
    """The logit lens with the final LayerNorm's scale frozen at its value in this run.

    Entries are then sums of `direct_logit_attribution`: all that was written so far, and the bias.
    """
    streams = torch.stack(_streams(cache))
    centred = streams - streams.mean(-1, keepdim=True)
    normalized = centred / cache["ln_final.hook_scale"]
    return (normalized * model.ln_final.w + model.ln_final.b) @ model.W_U + model.b_U


def _streams(cache: ActivationCache) -> list[Float[Tensor, "batch pos d_model"]]:
    layers = range(cache.n_layers)
    return [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in layers)]


def earliest_right(
    probes: Sequence[LinearProbe], cache: ActivationCache, classes: Int[Tensor, "batch pos 8 8"]
) -> Int[Tensor, "batch pos 8 8"]:
    """The earliest layer whose probe reads each square right; `n_layers` where none does.

    A later probe may be wrong again. -1 is a probe of the embeddings.

    Args:
        probes: of several layers, whose class order is that of `classes`.
        classes: the true class of every square, `othello_gpt.board.piece_classes`.
    """
    earliest = torch.full_like(classes, cache.n_layers)
    for probe in sorted(probes, key=lambda probe: -probe.layer):
        resid = cache["resid_pre", 0] if probe.layer < 0 else cache["resid_post", probe.layer]
        right = probe.logits(resid).argmax(-1) == classes
        earliest = torch.where(right, probe.layer, earliest)
    return earliest
