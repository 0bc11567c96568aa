"""ActivationCache: what a run kept, found by full name or by short key; and the stream as a stack of its parts."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from othello_gpt.hooks import UnknownSite, get_act_name, unknown_site_message

Index = int | slice | Sequence[int] | Shaped[Tensor, " _"]  # numbers or a mask
Key = str | tuple  # a full name, or (name, layer, part) of which the last two may be missing

Stack = Float[Tensor, "component *rest d_model"]
Labelled = Any  # a Stack, or with `return_labels` a pair (Stack, list of labels)


class ActivationCache(Mapping[str, Tensor]):
    """The activations of one run, in the order in which the forward pass made them.

    Found by full name, `cache["blocks.5.mlp.hook_post"]`, or by short key: `cache["post", 5]`,
    `cache["resid_post", -1]`, `cache["scale", 0, "ln1"]`, `cache["embed"]`. The cache holds tensors and
    nothing else: no model, and no hook can change them after they were kept.
    """

    def __init__(self, activations: Mapping[str, Tensor], n_layers: int) -> None:
        self._activations = dict(activations)
        self.n_layers = n_layers

    def __getitem__(self, key: Key) -> Tensor:
        name = self._full_name(key)
        if name not in self._activations:
            raise UnknownSite(self._missing_message(name))
        return self._activations[name]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and self._full_name(key) in self._activations

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} activations, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the activations occupy; storage shared by several is counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.values()}
        return sum(storage.nbytes() for storage in storages.values())

    def to(self, device: torch.device | str) -> "ActivationCache":
        """The same cache on another device."""
        return self._map(lambda name, activation: activation.to(device))

    def detach(self) -> "ActivationCache":
        """The same values, cut from the graph that made them (for a cache kept with `detach=False`)."""
        return self._map(lambda name, activation: activation.detach())

    def select(self, batch: Index = slice(None), pos: Index = slice(None)) -> "ActivationCache":
        """The cache of some games and some positions; every axis stays, so names and shapes keep their meaning.

        Args:
            batch: games to keep: an index, a slice, several indices or a mask.
            pos: positions to keep. For attention scores and patterns it is the query position.
        """
        return self._map(lambda name, activation: take_pos(name, _take(activation, 0, batch), pos))

    @staticmethod
    def concat(caches: Sequence["ActivationCache"]) -> "ActivationCache":
        """One cache of all the games, in order. The caches must hold the same sites at the same positions."""
        if not caches:
            raise ValueError("`concat` needs at least one cache.")
        first = caches[0]
        for i, other in enumerate(caches):
            if different := sorted(set(first) ^ set(other)):
                raise ValueError(
                    f"cache 0 and cache {i} hold different sites: {', '.join(different[:4])}. "
                    "Make them with the same `names_filter`."
                )
        return first._map(lambda name, _: torch.cat([cache[name] for cache in caches]))

    def stack_activation(
        self, name: str, layer: int | None = None, part: str | None = None
    ) -> Shaped[Tensor, "layer *rest"]:
        """One activation of every layer below `layer`, by default of all; `part` as in `get_act_name`."""
        return torch.stack([self[name, i, part] for i in range(self.end_layer(layer))])

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        *,
        pos_slice: Index | None = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Labelled:
        """What was written to the stream that enters block `layer`, one writer after another.

        With mode "all" and embeddings it sums to `resid_pre` of the layer, with `mlp_input` to its
        `resid_mid`, and for None, the end of the model, to the last `resid_post`.

        Args:
            mode: "all", or only what "attn" or "mlp" wrote.
            pos_slice: positions, all by default; a single one drops its axis.
            incl_embeds: count the token and the position embedding among the writers.
            return_labels: also the writers' labels: "embed", "pos_embed", "0_attn_out", "0_mlp_out" ...
        """
        if mode not in ("all", "attn", "mlp"):
            raise ValueError(f"`mode` is '{mode}', but must be 'all', 'attn' or 'mlp'.")
        end = self.end_layer(layer)
        sites = [f"{part}_out" for part in ("attn", "mlp") if mode in ("all", part)]
        writes = {f"{i}_{site}": self[site, i] for i in range(end) for site in sites}
        if mlp_input and mode != "mlp":
            writes[f"{end}_attn_out"] = self["attn_out", end]
        if incl_embeds:
            writes = {name: self[name] for name in ("embed", "pos_embed")} | writes
        return _stacked(writes, pos_slice, return_labels)

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        *,
        pos_slice: Index | None = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Labelled:
        """The stream that enters every block up to and with `layer`; `model.unembed` of it is the logit lens.

        Args:
            layer: the last block; None goes to the end of the model.
            incl_mid: also between the attention and the MLP of the blocks before.
            pos_slice: positions, all by default; a single one drops its axis.
            mlp_input: also between the attention and the MLP of block `layer`.
            return_labels: also the labels: "0_pre", "0_mid", "1_pre" ... "final_post".
        """
        end = self.end_layer(layer)
        streams: dict[str, Tensor] = {}
        for i in range(min(end + 1, self.n_layers)):
            streams[f"{i}_pre"] = self["resid_pre", i]
            if (incl_mid and i < end) or (mlp_input and i == end):
                streams[f"{i}_mid"] = self["resid_mid", i]
        if end == self.n_layers:
            streams["final_post"] = self["resid_post", -1]
        return _stacked(streams, pos_slice, return_labels)

    def apply_ln_to_stack(
        self,
        stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        *,
        pos_slice: Index | None = None,
    ) -> Stack:
        """Parts of the stream, centred, and divided by what the LayerNorm of this run divided their sum by.

        So it is linear: the parts of a stream sum to its `hook_normalized`, before weight and bias.

        Args:
            stack: at the positions of `pos_slice`.
            layer: the LayerNorm before this block, with `mlp_input` before its MLP, for None the last.
        """
        return centred(stack) / at_pos(self.ln_scale(layer, mlp_input), pos_slice)

    def ln_scale(
        self, layer: int | None = None, mlp_input: bool = False
    ) -> Float[Tensor, "*pos 1"]:
        """What the LayerNorm before block `layer` (its MLP, with `mlp_input`; for None the last) divided by."""
        end = self.end_layer(layer)
        if end == self.n_layers:
            return self["scale"]
        return self["scale", end, "ln2" if mlp_input else "ln1"]

    def end_layer(self, layer: int | None) -> int:
        """The number of layers below: all for None and, as TransformerLens has it, for -1."""
        end = self.n_layers if layer in (None, -1) else layer
        if not 0 <= end <= self.n_layers:
            raise ValueError(f"`layer` is {layer}, but must be 0 to {self.n_layers}, None or -1.")
        return end

    def _map(self, change):
        changed = copy.copy(self)
        changed._activations = {name: change(name, value) for name, value in self.items()}
        return changed

    def _full_name(self, key: Key) -> str:
        if isinstance(key, str):
            return key if key in self._activations else get_act_name(key)
        return self._of_layer(*key)

    def _of_layer(self, name: str, layer: int | None = None, part: str | None = None) -> str:
        if layer is not None and layer < 0:
            layer += self.n_layers
        return get_act_name(name, layer, part)

    def _missing_message(self, name: str) -> str:
        kept = list(self._activations)
        return (
            f"the run did not keep '{name}'. {unknown_site_message(name, kept)} "
            f"It kept {len(kept)} sites: {', '.join(kept[:3])}{' ...' if len(kept) > 3 else ''}"
        )


def _stacked(
    parts: dict[str, Tensor], pos_slice: Index | None, return_labels: bool
) -> Tensor | tuple[Tensor, list[str]]:
    stack = torch.stack([at_pos(part, pos_slice) for part in parts.values()])
    return (stack, [*parts]) if return_labels else stack


def centred(stack: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
    """Without its mean over d_model, as every LayerNorm begins."""
    return stack - stack.mean(-1, keepdim=True)


def at_pos(stream: Float[Tensor, "*batch pos width"], pos: Index | None) -> Tensor:
    """Some positions of a stream, all for None; a single one drops its axis."""
    return stream if pos is None else stream[..., pos, :]


def take_pos(name: str, activation: Tensor, pos: Index) -> Tensor:
    """Some positions of a site's activation or gradient; of attention scores and patterns, query positions."""
    return _take(activation, pos_axis(name), pos)


def pos_axis(name: str) -> int:
    """Which axis of a site's activation or gradient counts positions; of scores and patterns, query positions."""
    return 2 if name.removesuffix("_grad").endswith(("hook_attn_scores", "hook_pattern")) else 1


def _take(activation: Tensor, axis: int, index: Index) -> Tensor:
    if isinstance(index, slice):
        return activation[(slice(None),) * axis + (index,)]
    size = activation.shape[axis]
    chosen = _numbers(torch.as_tensor(index, device=activation.device).reshape(-1), size, axis)
    if not bool(((chosen >= -size) & (chosen < size)).all()):
        raise IndexError(f"index {index} is out of range for {size} entries along axis {axis}.")
    return activation.index_select(axis, chosen % size)


def _numbers(index: Tensor, size: int, axis: int) -> Tensor:
    """The entries that an index names by number, or a mask where it is True."""
    if index.dtype == torch.bool:
        if len(index) != size:
            raise IndexError(
                f"a mask of {len(index)} entries cannot choose among {size} along axis {axis}."
            )
        return index.nonzero()[:, 0]
    if len(index) and (index.is_floating_point() or index.is_complex()):
        raise TypeError(f"an index must be whole numbers or a mask, but it is {index.dtype}.")
    return index.long()
