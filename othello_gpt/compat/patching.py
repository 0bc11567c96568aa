"""Activation patching with TransformerLens's helpers, 7 to 98 times faster: only what a patch can change is run.

Each helper replaces one part of one activation of the corrupted run by that of the clean run, for every
index of some axes, and gives the metric of each patched run. The model is causal, so a patch at one layer and
position changes nothing at layers below nor at positions before. The corrupted run is therefore made once.
Every patch joins as a row of a batch at its own layer, with the positions from its first change on, and looks
back at the keys and values of the corrupted run. A patch that changes nothing costs nothing. `loop=True`
runs the model once a patch in place of all this; the results are the same. Times are those of
`benchmarks/bench_patching_helpers.py`, for 21 moves: 7 times for unrelated games, 98 for another last move.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from othello_gpt.cache import ActivationCache
from othello_gpt.hooks import HookPoint, get_act_name
from othello_gpt.model import Block, OthelloGPT, attention_scores, gathered_values

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Any]
PatchSetter = Callable[[Tensor, Sequence[int], Tensor], Tensor]

# Sites that are [batch head query_pos key_pos]; all others are [batch pos ...].
_BY_QUERY = ("attn_scores", "pattern")
_FAST_SITES = (
    *("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"),
    *("q", "k", "v", "attn_scores", "pattern", "z"),
)
_ROWS = 128  # patched games run together; more costs memory and saves no time


def generic_activation_patch(
    model: OthelloGPT,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    patching_metric: Metric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    loop: bool = False,
) -> Any:
    """The metric of every patched run, one for each index.

    Args:
        corrupted_tokens: [batch pos] or [pos].
        clean_cache: a run over as many games of the same length, which kept the patched site.
        patching_metric: a function of the patched run's logits [batch pos d_vocab] that gives one number.
        patch_setter: `fn(corrupted, index, clean)`, which gets a copy of the corrupted activation and
            returns the patched one. It must not depend on anything else.
        activation_name: a short name, such as "z"; the layer is the first number of each index.
        index_axis_names: of "layer", "pos", "head_index", "head", "src_pos", "dest_pos": every combination.
        index_df: or the indices themselves, as a data frame or as rows of numbers.
        return_index_df: also the indices, as a data frame; this needs pandas.
        loop: one hooked run a patch. So it is done too where the fast way does not apply: for a model
            with hooks attached, and for sites that are not in the stream, the queries, keys, values,
            scores, patterns or outputs of heads.

    Returns:
        With `index_axis_names` a tensor with these axes, else [index]; in the dtype of the logits.

    Source: TransformerLens 3.9, `patching.generic_activation_patch`.
    """
    corrupted_tokens = torch.atleast_2d(corrupted_tokens)
    if (index_axis_names is None) == (index_df is None):
        raise ValueError("give either `index_axis_names` or `index_df`.")
    shape, indices = _indices(model, corrupted_tokens, index_axis_names, index_df)
    order = sorted(range(len(indices)), key=lambda i: indices[i][0])  # by layer
    by_layer = [indices[i] for i in order]
    patches = _Patches(activation_name, patch_setter, clean_cache, by_layer)
    fast = activation_name in _FAST_SITES and not model.registry.hooks and not loop
    run = _replayed if fast else _looped
    with torch.no_grad():
        effects = [
            torch.as_tensor(patching_metric(logits), dtype=logits.dtype).reshape(())
            for logits in run(model, corrupted_tokens, patches)
        ]
    results = torch.stack(effects)[torch.argsort(torch.tensor(order))].reshape(shape)
    if not return_index_df:
        return results
    import pandas as pd  # pyright: ignore[reportMissingImports]

    return results, pd.DataFrame(indices, columns=index_axis_names)


def _indices(
    model: OthelloGPT, tokens: Tensor, axes: Sequence[str] | None, rows: Any
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The shape of the results, and the indices in their order."""
    cfg, n_pos = model.cfg, tokens.shape[-1]
    if axes is None:
        indices = [tuple(map(int, row)) for row in getattr(rows, "values", rows)]
        if wrong := [index for index in indices if not 0 <= index[0] < cfg.n_layers]:
            raise ValueError(
                f"index {wrong[0]} begins with layer {wrong[0][0]}, but layers are 0 to {cfg.n_layers - 1}."
            )
        return (len(indices),), indices
    sizes = {"layer": cfg.n_layers, "head": cfg.n_heads, "head_index": cfg.n_heads}
    sizes |= dict.fromkeys(("pos", "src_pos", "dest_pos"), n_pos)
    if unknown := [axis for axis in axes if axis not in sizes]:
        raise ValueError(f"no axis {', '.join(map(repr, unknown))}. Axes are {', '.join(sizes)}.")
    shape = tuple(sizes[axis] for axis in axes)
    return shape, list(product(*map(range, shape)))


class _Patches(NamedTuple):
    """What to patch: a site, how, from which run, and where."""

    site: str
    setter: PatchSetter
    clean_cache: ActivationCache
    indices: list[tuple[int, ...]]

    def apply(self, corrupted: Tensor, index: Sequence[int]) -> Tensor:
        """The patched activation; the corrupted one stays as it is."""
        clean = self.clean_cache[get_act_name(self.site, index[0])]
        if clean.shape != corrupted.shape:
            raise ValueError(
                f"the clean run's {self.site} is {tuple(clean.shape)}, but the corrupted run's "
                f"{tuple(corrupted.shape)}. Both need as many games of the same length."
            )
        return self.setter(corrupted.clone(), list(index), clean)


def _looped(model: OthelloGPT, tokens: Tensor, patches: _Patches) -> Iterator[Tensor]:
    """Logits of one hooked run after another: what the helpers mean."""
    for index in patches.indices:

        def patch(activation: Tensor, hook: HookPoint, index: Sequence[int] = index) -> Tensor:
            return patches.apply(activation, index)

        yield model.run_with_hooks(
            tokens, fwd_hooks=[(get_act_name(patches.site, index[0]), patch)]
        )


def _replayed(model: OthelloGPT, tokens: Tensor, patches: _Patches) -> Iterator[Tensor]:
    """The same logits, from the corrupted run and what each patch changes of it."""
    logits, run = model.run_with_cache(tokens)
    n_rows = max(1, _ROWS // len(tokens))
    for start in range(0, len(patches.indices), n_rows):
        rows = _Rows(patches.indices[start : start + n_rows], model, run)
        for layer in range(rows.indices[0][0], model.cfg.n_layers):
            rows.pass_block(layer, patches)
        patched = logits.repeat(len(rows.indices), 1, 1, 1)  # [patch, batch, pos, d_vocab]
        patched[rows.where] = model.unembed(rows.stream)
        yield from patched


class _Rows:
    """Patched runs on their way up the layers: the stream where it differs from the corrupted run's."""

    def __init__(
        self, indices: list[tuple[int, ...]], model: OthelloGPT, run: ActivationCache
    ) -> None:
        self.indices, self.model, self.run = indices, model, run
        shape = run["resid_pre", 0].shape
        self.where = torch.zeros(
            len(indices), *shape[:-1], dtype=torch.bool, device=model.device
        )  # [patch, batch, pos]
        self.stream = model.W_U.new_empty(0, shape[-1])  # one row for each True in `where`

    def pass_block(self, layer: int, patches: _Patches) -> None:
        """One layer further; the patches of this layer join where they act."""
        block = self.model.blocks[layer]
        joins, streams, where = self._patched(layer, patches)
        if joins == "resid_pre":
            self._join(streams, where)
        self.stream = self.stream + self._attn_out(block, layer)
        if joins == "resid_mid":
            self._join(streams, where)
        self.stream = self.stream + block.mlp(block.ln2(self.stream))
        if joins == "resid_post":
            self._join(streams, where)

    def _patched(
        self, layer: int, patches: _Patches
    ) -> tuple[str, Float[Tensor, "row d_model"], Bool[Tensor, "patch batch pos"]]:
        """The stream just after the patches of this layer, at and after their first change."""
        where, site = torch.zeros_like(self.where), patches.site
        here = [i for i, index in enumerate(self.indices) if index[0] == layer]
        if not here:
            return "", self.stream[:0], where
        corrupted = self.run[site, layer]
        patched = torch.stack([patches.apply(corrupted, self.indices[i]) for i in here])
        changed = (
            (patched != corrupted).movedim(3 if site in _BY_QUERY else 2, 2).flatten(3).any(-1)
        )
        where[here] = changed.cumsum(-1) > 0
        acting = changed.any(-1).any(-1)
        joins, streams = _stream_after(
            self.model.blocks[layer], self.run, site, layer, patched[acting]
        )
        return joins, streams[where[here][acting]], where

    def _join(
        self, streams: Float[Tensor, "row d_model"], where: Bool[Tensor, "patch batch pos"]
    ) -> None:
        """Later patches come after earlier ones, so their rows come after too."""
        self.stream, self.where = torch.cat([self.stream, streams]), self.where | where

    def _attn_out(self, block: Block, layer: int) -> Float[Tensor, "row d_model"]:
        """What attention writes to every row, which sees the corrupted run's positions before its first change."""
        if not len(self.stream):
            return self.stream
        attn, x = block.attn, block.ln1(self.stream)
        where = self.where[self.where.flatten(1).any(1)]  # of the patches that have joined
        n_patches, first = len(where), int(where.any(0).any(0).nonzero()[0])
        q = self.run["q", layer][:, first:].repeat(n_patches, 1, 1, 1, 1)
        k = self.run["k", layer].repeat(n_patches, 1, 1, 1, 1)
        v = self.run["v", layer].repeat(n_patches, 1, 1, 1, 1)  # [patch, batch, pos, head, d_head]
        q[where[..., first:]], k[where], v[where] = attn.read(x)
        pattern = attention_scores(q, k, attn.future).softmax(-1)
        z = gathered_values(pattern, v)[where[..., first:]]
        return attn.write(z)


def _stream_after(
    block: Block, run: ActivationCache, site: str, layer: int, patched: Tensor
) -> tuple[str, Float[Tensor, "patch batch pos d_model"]]:
    """Where in the block a patched activation reaches the stream, and the stream there."""
    if site in ("resid_pre", "resid_mid", "resid_post"):
        return site, patched
    if site == "mlp_out":
        return "resid_post", run["resid_mid", layer] + patched
    if site == "attn_out":
        return "resid_mid", run["resid_pre", layer] + patched
    q, k, v, scores = (
        patched if site == name else run[name, layer] for name in ("q", "k", "v", "attn_scores")
    )
    if site in ("q", "k"):
        scores = attention_scores(q, k, block.attn.future)
    pattern = patched if site == "pattern" else scores.softmax(-1)
    z = patched if site == "z" else gathered_values(pattern, v)
    attn_out = block.attn.write(z)
    return "resid_mid", run["resid_pre", layer] + attn_out


# --- Setters: each puts the clean part in place of the corrupted one, for all games ---


def layer_pos_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """One position; index (layer, pos)."""
    _, pos = index
    corrupted[:, pos] = clean[:, pos]
    return corrupted


def layer_pos_head_vector_patch_setter(
    corrupted: Tensor, index: Sequence[int], clean: Tensor
) -> Tensor:
    """One head at one position; index (layer, pos, head)."""
    _, pos, head = index
    corrupted[:, pos, head] = clean[:, pos, head]
    return corrupted


def layer_head_vector_patch_setter(
    corrupted: Tensor, index: Sequence[int], clean: Tensor
) -> Tensor:
    """One head at all positions; index (layer, head)."""
    _, head = index
    corrupted[:, :, head] = clean[:, :, head]
    return corrupted


def layer_head_pattern_patch_setter(
    corrupted: Tensor, index: Sequence[int], clean: Tensor
) -> Tensor:
    """One head's whole pattern; index (layer, head), or with the destination, or with its source too."""
    _, head, *entry = index
    corrupted[(slice(None), head, *entry)] = clean[(slice(None), head, *entry)]
    return corrupted


layer_head_pos_pattern_patch_setter = layer_head_pattern_patch_setter
layer_head_dest_src_pos_pattern_patch_setter = layer_head_pattern_patch_setter


# --- The helpers: get_act_patch_...(model, corrupted_tokens, clean_cache, metric) ---


def _helper(name: str, setter: PatchSetter, *axes: str) -> Callable[..., Any]:
    return partial(
        generic_activation_patch,
        patch_setter=setter,
        activation_name=name,
        index_axis_names=axes,
    )


_LAYER_POS = (layer_pos_patch_setter, "layer", "pos")
get_act_patch_resid_pre = _helper("resid_pre", *_LAYER_POS)  # [layer pos], as the next three
get_act_patch_resid_mid = _helper("resid_mid", *_LAYER_POS)
get_act_patch_attn_out = _helper("attn_out", *_LAYER_POS)
get_act_patch_mlp_out = _helper("mlp_out", *_LAYER_POS)

_BY_POS = (layer_pos_head_vector_patch_setter, "layer", "pos", "head")
get_act_patch_attn_head_out_by_pos = _helper("z", *_BY_POS)  # [layer pos head], as the next three
get_act_patch_attn_head_q_by_pos = _helper("q", *_BY_POS)
get_act_patch_attn_head_k_by_pos = _helper("k", *_BY_POS)
get_act_patch_attn_head_v_by_pos = _helper("v", *_BY_POS)

_ALL_POS = (layer_head_vector_patch_setter, "layer", "head")
get_act_patch_attn_head_out_all_pos = _helper("z", *_ALL_POS)  # [layer head], as the next three
get_act_patch_attn_head_q_all_pos = _helper("q", *_ALL_POS)
get_act_patch_attn_head_k_all_pos = _helper("k", *_ALL_POS)
get_act_patch_attn_head_v_all_pos = _helper("v", *_ALL_POS)

_PATTERN = (layer_head_pattern_patch_setter, "layer", "head_index")
get_act_patch_attn_head_pattern_all_pos = _helper("pattern", *_PATTERN)  # [layer head]
get_act_patch_attn_head_pattern_by_pos = _helper("pattern", *_PATTERN, "dest_pos")
get_act_patch_attn_head_pattern_dest_src_pos = _helper(
    "pattern", *_PATTERN, "dest_pos", "src_pos"
)  # [layer head dest_pos src_pos]


def get_act_patch_attn_head_all_pos_every(
    model: OthelloGPT, corrupted_tokens: Tensor, clean_cache: ActivationCache, metric: Metric
) -> Float[Tensor, "part=5 layer head"]:
    """Every head at all positions: its output, query, key, value and pattern."""
    helpers = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return torch.stack([each(model, corrupted_tokens, clean_cache, metric) for each in helpers])


def get_act_patch_attn_head_by_pos_every(
    model: OthelloGPT, corrupted_tokens: Tensor, clean_cache: ActivationCache, metric: Metric
) -> Float[Tensor, "part=5 layer pos head"]:
    """Every head at every position: its output, query, key, value and (by destination) pattern."""
    helpers = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
    )
    run = (model, corrupted_tokens, clean_cache, metric)
    pattern = get_act_patch_attn_head_pattern_by_pos(*run).movedim(1, 2)  # [layer, pos, head]
    return torch.stack([*(each(*run) for each in helpers), pattern])


def get_act_patch_block_every(
    model: OthelloGPT, corrupted_tokens: Tensor, clean_cache: ActivationCache, metric: Metric
) -> Float[Tensor, "part=3 layer pos"]:
    """Every position of the stream that enters each block, of attention's output, and of the MLP's."""
    helpers = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack([each(model, corrupted_tokens, clean_cache, metric) for each in helpers])
