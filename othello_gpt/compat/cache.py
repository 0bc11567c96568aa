"""The activation cache with TransformerLens's methods: it knows its model, and stacks what the weights write."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from othello_gpt import cache
from othello_gpt.cache import Index, Labelled, Stack, at_pos, centred

if TYPE_CHECKING:
    from othello_gpt.compat.model import HookedTransformer

Slice = Index | None  # a tuple means (start, stop, step)
Tokens = int | Int[Tensor, "*batch"]


class ActivationCache(cache.ActivationCache):
    """What a run kept, as TransformerLens's class of the name: `cache["post", 5]`, `cache.logit_attrs(...)`.

    Everywhere, `layer` None or -1 is the end of the model, `pos_slice` an int (which drops the axis), a
    tuple (start, stop), a list or a tensor of positions, and `apply_ln` the division by the scale of the
    LayerNorm that reads the stream at `layer`, without its weight and bias.

    Unlike TransformerLens, `remove_batch_dim` of a run of several games is an error, `stack_head_results`
    keeps nothing in the cache, and `logit_attrs` counts the final LayerNorm's weight.

    Args:
        cache_dict: activations by the full names of their sites.
        model: whose they are.
        has_batch_dim: False if they come without their first axis.
    """

    def __init__(
        self, cache_dict: Any, model: "HookedTransformer", has_batch_dim: bool = True
    ) -> None:
        super().__init__(cache_dict, model.cfg.n_layers)
        self.model, self.has_batch_dim = model, has_batch_dim

    @property
    def cache_dict(self) -> dict[str, Tensor]:
        """The activations by full name, as the plain dictionary in which the cache keeps them."""
        return self._activations

    def remove_batch_dim(self) -> "ActivationCache":
        """The cache itself, of one game, now without the batch axis.

        Raises:
            ValueError: it holds several games.
        """
        if self.has_batch_dim:
            n_games = {len(activation) for activation in self.values()}
            if n_games - {1}:
                raise ValueError(
                    f"the cache holds {max(n_games)} games, so its batch axis cannot be removed. "
                    "Choose one with `cache.apply_slice_to_batch_dim(game)`."
                )
            self._activations = {name: activation[0] for name, activation in self.items()}
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Slice) -> "ActivationCache":
        """The cache of some games; of a single one, without the batch axis."""
        self._check_batch_dim()
        games = slice(None) if batch_slice is None else as_index(batch_slice)
        chosen = self._map(lambda name, activation: activation[games])
        chosen.has_batch_dim = not isinstance(games, int)
        return chosen

    def select(self, batch: Index = slice(None), pos: Index = slice(None)) -> cache.ActivationCache:
        """As `othello_gpt.ActivationCache.select`, of a cache that has its batch axis."""
        self._check_batch_dim()
        return super().select(batch, pos)

    @staticmethod
    def concat(caches: Sequence[cache.ActivationCache]) -> cache.ActivationCache:
        """As `othello_gpt.ActivationCache.concat`, of caches that have their batch axis."""
        for one in caches:
            if isinstance(one, ActivationCache):
                one._check_batch_dim()
        return cache.ActivationCache.concat(caches)

    def _check_batch_dim(self) -> None:
        if not self.has_batch_dim:
            raise ValueError(
                "the cache has no batch axis any more: choose and join games before `remove_batch_dim`."
            )

    def to(self, device: torch.device | str) -> "ActivationCache":
        """The cache itself, moved to another device."""
        self._activations = {name: activation.to(device) for name, activation in self.items()}
        return self

    def decompose_resid(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Slice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Labelled:
        """What was written to the stream that enters `layer`, one writer after another."""
        pos = as_index(pos_slice)
        stack, labels = super().decompose_resid(
            layer, mlp_input, mode, pos_slice=pos, incl_embeds=incl_embeds, return_labels=True
        )
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos)
        return (stack, labels) if return_labels else stack

    def accumulated_resid(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Slice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Labelled:
        """The stream that enters every block up to and with `layer`.

        With `apply_ln` at the end of the model it is the logit lens, so each row goes through the final
        LayerNorm anew, weight and bias included.
        """
        pos = as_index(pos_slice)
        stack, labels = super().accumulated_resid(
            layer, incl_mid, pos_slice=pos, mlp_input=mlp_input, return_labels=True
        )
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos, recompute_ln=True)
        return (stack, labels) if return_labels else stack

    def apply_ln_to_stack(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice = None,
        batch_slice: Slice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Parts of the stream, centred and divided by what the LayerNorm of this run divided their sum by.

        Args:
            residual_stack: [component batch pos d_model], at the positions of `pos_slice`.
            batch_slice: games to take, of the stack (unless `has_batch_dim` is False) and of the scale.
            recompute_ln: at the end of the model, put each row through the final LayerNorm by itself.
        """
        games = as_index(batch_slice)
        if games is not None and has_batch_dim:
            residual_stack = residual_stack[:, games]
        if recompute_ln and self.end_layer(layer) == self.n_layers:
            return self.model.ln_final(residual_stack)
        scale = at_pos(self.ln_scale(layer, mlp_input), as_index(pos_slice))
        if games is not None and self.has_batch_dim:
            scale = scale[games]
        return centred(residual_stack) / scale

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Slice = None,
        batch_slice: Slice = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component *kept"]:
        """What each part of the stream adds to the logit of `tokens`, less that of `incorrect_tokens`.

        The parts of the whole stream sum to the logit, less the constant `ln_final.b @ W_U + b_U`.

        Unlike TransformerLens, the final LayerNorm's weight is counted, so this holds without folding too.

        Args:
            residual_stack: [component batch pos d_model], at the positions of `pos_slice`.
            tokens: one; or one a game, for a stack of one position; or one a game and position.
            pos_slice: the positions of the stack.
            batch_slice: games to take of the stack.
        """
        if isinstance(tokens, str) or isinstance(incorrect_tokens, str):
            raise TypeError(
                "tokens are numbers here: `vocab.square_to_token(vocab.label_to_square('C0'))`."
            )
        directions = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            if torch.as_tensor(tokens).shape != torch.as_tensor(incorrect_tokens).shape:
                raise ValueError("`tokens` and `incorrect_tokens` must have the same shape.")
            wrong = self.model.tokens_to_residual_directions(incorrect_tokens)
            directions = directions - wrong
        w = self.model.ln_final.w
        if not bool((w == 1).all()):
            warnings.warn(
                "LayerNorm is not folded: these attributions count the final LayerNorm's weight, which "
                "TransformerLens left out. Load with `fold_ln=True` and both agree.",
                stacklevel=2,
            )
        stack = self.apply_ln_to_stack(
            residual_stack, None, False, pos_slice, batch_slice, has_batch_dim
        )
        return torch.einsum("c...m,...m->c...", stack, w * directions)

    def compute_head_results(self) -> None:
        """Adds every layer's `hook_result`, what each head wrote, to the cache: eight times the stream's size."""
        for layer in range(self.n_layers):
            name = f"blocks.{layer}.attn.hook_result"
            self._activations.setdefault(name, self._head_writes(layer, None))

    def stack_head_results(
        self,
        layer: int | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice = None,
        apply_ln: bool = False,
    ) -> Labelled:
        """What each head below `layer` wrote, "L0H0", "L0H1" ...; with the rest of the stream as "remainder"."""
        end, pos = self.end_layer(layer), as_index(pos_slice)
        heads = [self._head_writes(i, pos).movedim(-2, 0) for i in range(end)]
        stack = self._joined(heads, pos, self.model.cfg.d_model)
        labels = self.model.all_head_labels()[: len(stack)]
        if incl_remainder:
            stack, labels = _with_remainder(stack, labels, self._stream(end, pos))
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=pos)
        return (stack, labels) if return_labels else stack

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Slice = None,
        pos_slice: Slice = None,
        project_output_onto: Tensor | None = None,
    ) -> Float[Tensor, "*pos neuron out"] | Float[Tensor, "*pos neuron"]:
        """What each neuron of a layer wrote, or its dot product with each column of `project_output_onto`."""
        writes = self._neuron_writes(
            layer, as_index(neuron_slice), _projection(project_output_onto)
        )
        post = self._neuron_acts(layer, as_index(neuron_slice), as_index(pos_slice))
        return _unprojected(post[..., None] * writes, project_output_onto)

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Slice = None,
        neuron_slice: Slice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Labelled:
        """What each neuron below `layer` wrote, "L0N0", "L0N1" ...; with the rest of the stream as "remainder".

        Args:
            project_output_onto: [d_model] or [d_model out]: only the dot products with these directions,
                made without ever making what the neurons wrote, which is d_mlp streams a layer.
        """
        end, pos, neurons = self.end_layer(layer), as_index(pos_slice), as_index(neuron_slice)
        onto = _projection(project_output_onto)
        stack = self._neuron_stack(end, neurons, pos, onto, apply_ln, mlp_input=False)
        labels = self._neuron_labels(end, neurons)
        if incl_remainder:
            stream = self._stream(end, pos)[None]
            stream = self.apply_ln_to_stack(stream, layer, pos_slice=pos) if apply_ln else stream
            stream = stream if onto is None else stream @ onto
            stack, labels = _with_remainder(stack, labels, stream[0])
        stack = _unprojected(stack, project_output_onto)
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Slice = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Labelled:
        """The stream that enters `layer` as its heads, its neurons or MLPs, embeddings and biases, which sum to it.

        Unlike TransformerLens, projected neurons at an MLP's input are divided by `ln2`'s scale, not `ln1`'s.
        """
        end, pos = self.end_layer(layer), as_index(pos_slice)
        onto = _projection(project_output_onto)

        def finished(stack: Tensor) -> Tensor:
            if apply_ln:
                stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos)
            return stack if onto is None else stack @ onto

        heads, labels = self.stack_head_results(end + mlp_input, True, pos_slice=pos)
        parts = [finished(heads)]
        if expand_neurons:
            parts.append(self._neuron_stack(end, None, pos, onto, apply_ln, mlp_input))
            labels += self._neuron_labels(end, None)
        elif end:
            mlps, mlp_labels = self.decompose_resid(end, False, "mlp", False, pos, False, True)
            parts.append(finished(mlps))
            labels += mlp_labels
        bias = self.model.accumulated_bias(end, mlp_input, include_mlp_biases=expand_neurons)
        embeds = [at_pos(self[name], pos) for name in ("embed", "pos_embed")]
        parts.append(finished(torch.stack([*embeds, bias.expand_as(embeds[0])])))
        stack = _unprojected(torch.cat(parts), project_output_onto)
        labels = [*labels, "embed", "pos_embed", "bias"]
        return (stack, labels) if return_labels else stack

    def _stream(self, layer: int, pos: Slice) -> Float[Tensor, "*pos d_model"]:
        """The stream that enters the layer, which is also what leaves the one before."""
        entering = self["resid_post", layer - 1] if layer else self["resid_pre", 0]
        return at_pos(entering, pos)

    def _head_writes(self, layer: int, pos: Slice) -> Float[Tensor, "*pos head d_model"]:
        z = self["z", layer]
        z = z if pos is None else z[..., pos, :, :]
        return torch.einsum("...hd,hdm->...hm", z, self.model.blocks[layer].attn.W_O)

    def _neuron_acts(self, layer: int, neurons: Slice, pos: Slice) -> Float[Tensor, "*pos neuron"]:
        return at_pos(self["post", layer], pos)[..., _span(neurons)]

    def _neuron_writes(
        self, layer: int, neurons: Slice, onto: Tensor | None, centre: bool = False
    ) -> Float[Tensor, "neuron out"]:
        W_out = self.model.blocks[layer].mlp.W_out[_span(neurons)]
        W_out = centred(W_out) if centre else W_out
        return W_out if onto is None else W_out @ onto

    def _neuron_stack(
        self,
        end: int,
        neurons: Slice,
        pos: Slice,
        onto: Tensor | None,
        apply_ln: bool,
        mlp_input: bool,
    ) -> Float[Tensor, "neuron *pos out"]:
        """LayerNorm with its scale held is linear, so it is the weights that are centred, not what is written."""
        stack, width = [], self.model.cfg.d_model if onto is None else onto.shape[-1]
        scale = at_pos(self.ln_scale(end, mlp_input), pos) if apply_ln else None
        for layer in range(end):
            post = self._neuron_acts(layer, neurons, pos)
            post = post if scale is None else post / scale
            writes = self._neuron_writes(layer, neurons, onto, centre=apply_ln)
            stack.append(torch.einsum("...n,no->n...o", post, writes))
        return self._joined(stack, pos, width)

    def _joined(
        self, parts: list[Tensor], pos: Slice, width: int
    ) -> Float[Tensor, "component *pos width"]:
        """Along the first axis; of no parts an empty stack, as below the first layer."""
        if parts:
            return torch.cat(parts)
        stream = self._stream(0, pos)
        return stream.new_empty(0, *stream.shape[:-1], width)

    def _neuron_labels(self, end: int, neurons: Slice) -> list[str]:
        numbers = torch.arange(self.model.cfg.d_mlp)[_span(neurons)].tolist()
        return [f"L{layer}N{number}" for layer in range(end) for number in numbers]


def as_index(chosen: Any) -> Slice:
    """An index of torch from a slice of TransformerLens, where a tuple is (start, stop, step)."""
    if isinstance(chosen, tuple):
        return slice(*chosen)
    return chosen if chosen is None or isinstance(chosen, int | slice) else torch.as_tensor(chosen)


def _span(chosen: Slice) -> Any:
    """An index that keeps its axis."""
    if isinstance(chosen, int):
        return slice(chosen, chosen + 1 or None)
    return slice(None) if chosen is None else chosen


def _projection(onto: Tensor | None) -> Float[Tensor, "d_model out"] | None:
    return onto[:, None] if onto is not None and onto.ndim == 1 else onto


def _unprojected(stack: Tensor, onto: Tensor | None) -> Tensor:
    return stack[..., 0] if onto is not None and onto.ndim == 1 else stack


def _with_remainder(stack: Tensor, labels: list[str], stream: Tensor) -> tuple[Tensor, list[str]]:
    return torch.cat([stack, (stream - stack.sum(0))[None]]), [*labels, "remainder"]
