"""The model: an 8-layer GPT that sees move lists, one file, read top to bottom.

    tokens ── embed + pos_embed ── block 0 ── ... ── block 7 ── ln_final ── unembed ── logits

Every activation worth looking at has a name, a hook site, given where it is made by `tap`. Names and
shapes are those of TransformerLens:

    hook_embed, hook_pos_embed                                  batch pos d_model
    blocks.{l}.hook_resid_pre, hook_resid_mid, hook_resid_post  batch pos d_model
    blocks.{l}.hook_attn_out, hook_mlp_out                      batch pos d_model
    blocks.{l}.ln1.hook_scale, ln2.hook_scale                   batch pos 1
    blocks.{l}.ln1.hook_normalized, ln2.hook_normalized         batch pos d_model
    blocks.{l}.attn.hook_q, hook_k, hook_v, hook_z              batch pos head d_head
    blocks.{l}.attn.hook_attn_scores, hook_pattern              batch head query_pos key_pos
    blocks.{l}.attn.hook_result (made only on request)          batch pos head d_model
    blocks.{l}.mlp.hook_pre, hook_post                          batch pos d_mlp
    ln_final.hook_scale                                         batch pos 1
    ln_final.hook_normalized, unembed.hook_in                   batch pos d_model
    unembed.hook_out (the logits)                               batch pos d_vocab

Weights act on the right, `x @ W + b`, and are stored in the shapes in which they are shown.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from othello_gpt.cache import ActivationCache, Index, take_pos
from othello_gpt.hooks import (
    Hook,
    HookFn,
    HookHandle,
    HookPoint,
    HookRegistry,
    SiteFilter,
    Tapped,
    kind,
    select_sites,
    sites_recorded,
)
from othello_gpt.memory import keep_room_for


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model; the defaults are those of the published Othello-GPT (25 M parameters)."""

    n_layers: int = 8
    d_model: int = 512
    n_heads: int = 8
    d_head: int = 64
    d_mlp: int = 2048
    d_vocab: int = 61  # padding, and the 60 squares that can be played
    n_ctx: int = 59  # a game has at most 60 moves, and the last predicts nothing
    eps: float = 1e-5  # added to the variance inside LayerNorm's square root

    def __post_init__(self) -> None:
        for field in fields(GPTConfig):
            size = getattr(self, field.name)
            if size <= 0:
                raise ValueError(
                    f"`{field.name}` is {size}. Every size of a model must be positive."
                )


class LayerNorm(Tapped):
    """Each position, centred and scaled to unit variance, then weighted. Folded weights are w = 1, b = 0."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.eps = cfg.eps
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        self.b = nn.Parameter(torch.zeros(cfg.d_model))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        tap = self.tap  # found once, since modules find their attributes slowly
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        scale = tap("hook_scale", scale)
        normalized = tap("hook_normalized", centred / scale)
        return normalized * self.w + self.b


class Attention(Tapped):
    """Each position gathers values `v` from itself and the positions before it, head by head."""

    future: Tensor  # [query_pos, key_pos], True where the key comes after the query

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.W_Q = _heads_parameter(cfg)
        self.W_K = _heads_parameter(cfg)
        self.W_V = _heads_parameter(cfg)
        self.W_O = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head, cfg.d_model))
        self.b_Q = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head))
        self.b_K = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head))
        self.b_V = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head))
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model))
        future = torch.tensor(~np.tri(cfg.n_ctx, dtype=bool))  # above the diagonal
        self.register_buffer("future", future, persistent=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        tap = self.tap
        q, k, v = self.read(x)  # [batch, pos, head, d_head]
        q, k, v = tap("hook_q", q), tap("hook_k", k), tap("hook_v", v)

        attn_scores = tap("hook_attn_scores", attention_scores(q, k, self.future))
        pattern = tap("hook_pattern", attn_scores.softmax(-1))  # rows sum to 1
        z = tap("hook_z", gathered_values(pattern, v))

        if self.is_hooked("hook_result"):
            result = torch.einsum("bphd,hdm->bphm", z, self.W_O)  # each head's own write
            return self.tap("hook_result", result).sum(2) + self.b_O
        return self.write(z)

    def read(
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch head d_head"], ...]:
        """q, k and v of every head."""
        q = into_heads(x, self.W_Q, self.b_Q)
        k = into_heads(x, self.W_K, self.b_K)
        v = into_heads(x, self.W_V, self.b_V)
        return q, k, v

    def write(self, z: Float[Tensor, "*batch head d_head"]) -> Float[Tensor, "*batch d_model"]:
        """What all heads write together: the sum of `z[head] @ W_O[head]`, plus the bias."""
        return F.linear(z.flatten(-2), self.W_O.flatten(0, 1).T, self.b_O)


def _heads_parameter(cfg: GPTConfig) -> nn.Parameter:
    """W_Q, W_K or W_V, [head d_model d_head], strided so that `into_heads` multiplies it as it lies in memory."""
    return nn.Parameter(torch.empty(cfg.d_model, cfg.n_heads, cfg.d_head).transpose(0, 1))


def into_heads(
    x: Float[Tensor, "*batch d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "*batch head d_head"]:
    """What each head reads: `x @ W[head] + b[head]` for all heads in one multiplication."""
    return F.linear(x, W.mT.flatten(0, 1), b.flatten()).unflatten(-1, b.shape)


def attention_scores(
    q: Float[Tensor, "*#batch query_pos head d_head"],
    k: Float[Tensor, "*#batch key_pos head d_head"],
    future: Bool[Tensor, "n_ctx n_ctx"],
) -> Float[Tensor, "*#batch head query_pos key_pos"]:
    """How much each query asks for each key, -inf where the key comes later. The queries are the last positions."""
    n_query, n_key, d_head = q.shape[-3], k.shape[-3], k.shape[-1]
    q, k = q.transpose(-3, -2), k.transpose(-3, -2)  # [batch, head, pos, d_head]
    scores = q @ k.mT / d_head**0.5
    return scores.masked_fill(future[n_key - n_query : n_key, :n_key], -torch.inf)


def gathered_values(
    pattern: Float[Tensor, "*#batch head query_pos key_pos"],
    v: Float[Tensor, "*#batch key_pos head d_head"],
) -> Float[Tensor, "*#batch query_pos head d_head"]:
    """z: the mean of the values that each head sees, weighted by its pattern."""
    return (pattern @ v.transpose(-3, -2)).transpose(-3, -2)


class MLP(Tapped):
    """Each position by itself: `d_mlp` neurons read with W_in, fire through a GELU, write with W_out."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(cfg.d_mlp))
        # strided so that `write` reads it in the order in which it lies in memory, which is 3 % faster at 20 positions
        self.W_out = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp).T)
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.write(self.neurons(x))

    def neurons(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        """How strongly each neuron fires."""
        tap = self.tap
        pre = tap("hook_pre", self.read(x))
        return tap("hook_post", F.gelu(pre))  # the exact GELU, not its tanh approximation

    def read(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        """What each neuron reads."""
        return F.linear(x, self.W_in.T, self.b_in)

    def write(self, post: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """What all neurons write together."""
        return F.linear(post, self.W_out.T, self.b_out)


class Block(Tapped):
    """One layer: attention writes to the residual stream, then the MLP does.

    resid_pre ─┬───────────────(+)── resid_mid ─┬──────────────(+)── resid_post
               └─ ln1 ── attn ──┘ attn_out      └─ ln2 ── mlp ──┘ mlp_out
    """

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.ln1, self.attn = LayerNorm(cfg), Attention(cfg)
        self.ln2, self.mlp = LayerNorm(cfg), MLP(cfg)

    def forward(
        self, resid_pre: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        tap = self.tap
        resid_pre = tap("hook_resid_pre", resid_pre)
        attn_out = tap("hook_attn_out", self.attn(self.ln1(resid_pre)))
        resid_mid = tap("hook_resid_mid", resid_pre + attn_out)
        mlp_out = tap("hook_mlp_out", self.mlp(self.ln2(resid_mid)))
        return tap("hook_resid_post", resid_mid + mlp_out)


TokensOrResid = (
    Integer[Tensor, "batch pos"] | Integer[Tensor, " pos"] | Float[Tensor, "batch pos d_model"]
)


Hooks = Iterable[tuple[SiteFilter, HookFn]]


class OthelloGPT(Tapped):
    """Othello-GPT with random weights; `OthelloGPT.from_pretrained()` has trained ones.

    Position `i` of activations and logits comes after move `i` (from 0) and predicts move `i + 1`.

    Example:
        >>> model = OthelloGPT.from_pretrained()
        >>> logits = model(torch.tensor([20]))  # the token of C3, the first move
        >>> logits.shape, sorted(logits[0, -1].topk(3).indices.tolist())  # C2, C4 and E2 are legal
        (torch.Size([1, 1, 61]), [19, 21, 33])
    """

    blocks: Any  # an nn.ModuleList of Block, which type checkers cannot say

    def __init__(self, cfg: GPTConfig = GPTConfig()) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = LayerNorm(cfg)
        self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab))
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab))
        self.registry = HookRegistry(self)
        for name, parameter in self.named_parameters():
            if name.split(".")[-1].startswith("W_") and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)  # as GPT-2; biases start at 0

    def forward(
        self,
        tokens: TokensOrResid,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"] | Float[Tensor, "batch pos d_model"]:
        """Logits after every move; with `stop_at_layer`, the residual stream that enters that block.

        Args:
            tokens: 0 to 60 (see `othello_gpt.vocab`), at most `n_ctx` moves; one game may come without
                its batch axis. With `start_at_layer`, the residual stream that enters that block.
            start_at_layer: run `blocks[start_at_layer:]` only; negative counts from the end.
            stop_at_layer: run only `blocks[:stop_at_layer]`; negative counts from the end.
        """
        first, end = self._checked_range(start_at_layer, stop_at_layer)
        resid = self.embed(tokens) if start_at_layer is None else self._checked_resid(tokens)
        for block in [*self.blocks][first:end]:
            resid = block(resid)
        return self.unembed(resid) if stop_at_layer is None else resid

    def embed(
        self, tokens: Integer[Tensor, "batch pos"] | Integer[Tensor, " pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters the first block."""
        tokens = self._checked_tokens(tokens)
        n_batch, n_pos = tokens.shape
        embed = self.tap("hook_embed", self.W_E[tokens])
        pos_embed = self.tap("hook_pos_embed", self.W_pos[:n_pos].repeat(n_batch, 1, 1))
        return embed + pos_embed

    def unembed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits from the residual stream that leaves the last block."""
        resid = self.tap("unembed.hook_in", self.ln_final(resid))
        return self.tap("unembed.hook_out", resid @ self.W_U + self.b_U)

    def run_with_hooks(
        self,
        tokens: TokensOrResid,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        **options: Any,
    ) -> Any:
        """Logits of a run under these hooks; see `hooks`. The options are those of the model itself."""
        with self.hooks(fwd_hooks, bwd_hooks):
            return self(tokens, **options)

    def run_with_cache(
        self,
        tokens: TokensOrResid,
        names_filter: SiteFilter | None = None,
        *,
        fwd_hooks: Hooks = (),
        pos_slice: Index | None = None,
        grad_of: Callable[[Any], Tensor] | None = None,
        detach: bool = True,
        **options: Any,
    ) -> tuple[Any, ActivationCache]:
        """Logits, and the activations of the run.

        On a CPU most of what a large cache costs is fresh memory, so the process keeps room for the next one: see
        `othello_gpt.memory`.

        Args:
            tokens: as for the model itself.
            names_filter: which sites to keep: a name, several names, or a predicate on names; None keeps all
                but the heads' `hook_result`, which is eight times the size of anything else.
            fwd_hooks: hooks for this run, see `hooks`; what they make of an activation is what is kept.
            pos_slice: positions to keep, all by default; copied, so that the rest takes no memory. As in
                `ActivationCache.select`, one position keeps its axis.
            grad_of: a function of the logits that gives one number. Its gradient at every kept site is kept
                too, as `<name>_grad`; as always with `.backward()`, parameters gather theirs in `.grad`.
            detach: False keeps the activations of the autograd graph themselves, to take gradients with
                respect to them; a later hook that edits in place then changes what was kept.
            options: those of the model itself. Sites that do not run are not kept.
        """
        if names_filter is None:
            sites = [name for name in self.hook_names if not name.endswith("hook_result")]
        else:
            sites = self._sites(names_filter)
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: HookPoint) -> None:
            if pos_slice is not None:
                activation = take_pos(hook.name, activation, pos_slice)
            if detach:
                activation = activation.detach()
                copied = others_may_write or pos_slice is not None
                activation = activation.clone() if copied else activation
            kept[hook.name] = activation

        def keep_grad(grad: Tensor, hook: HookPoint) -> None:
            grad = grad if pos_slice is None else take_pos(hook.name, grad, pos_slice).clone()
            kept[f"{hook.name}_grad"] = grad

        with self.hooks(fwd_hooks):
            others_may_write = bool(self.registry.hooks)
            keepers = [Hook(keep)] + [Hook(keep_grad, backward=True)] * (grad_of is not None)
            with self.registry.attached((site, hook) for site in sites for hook in keepers):
                logits = self(tokens, **options)
            last = next(reversed(kept), "")
            if detach and last.endswith(("hook_resid_post", "unembed.hook_out")):
                kept[last] = kept[last].clone()  # the run may return it, for the caller to edit
            if grad_of is not None:
                grad_of(logits).backward()
        if self.device.type == "cpu":
            keep_room_for(sum(activation.nbytes for activation in kept.values()))
        return logits, ActivationCache(kept, self.cfg.n_layers)

    def hooks(self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> AbstractContextManager[None]:
        """Attaches hooks for the length of a `with` block, after those already attached.

        Args:
            fwd_hooks: pairs of a site (a name, several, or a predicate on names) and a function
                `fn(activation, hook)`, which may change the activation in place, or return another of the
                same shape, or do neither. `hook.name` and `hook.layer()` say where it was called.
            bwd_hooks: the same for `fn(gradient, hook)`. A run made inside the block calls them whenever
                gradients flow back through it, with the gradient of all that the activation feeds.

        Raises:
            UnknownSite: a name is no site of this model, or no longer; nothing is attached then.
            ValueError: a predicate holds for no site.
        """
        pairs = [(which, Hook(fn)) for which, fn in fwd_hooks]
        pairs += [(which, Hook(fn, backward=True)) for which, fn in bwd_hooks]
        named = [(site, hook) for which, hook in pairs for site in self._sites(which)]
        return self.registry.attached(named)

    def add_hook(
        self,
        name: SiteFilter,
        hook: HookFn,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> HookHandle:
        """Attaches a hook until its handle or `reset_hooks` removes it; `hooks` is safer, as it cannot be forgotten.

        Args:
            name: a site, several, or a predicate on names.
            hook: see `hooks`.
            dir: "fwd" for a hook on the activation, "bwd" for one on its gradient.
            is_permanent: `reset_hooks()` leaves it where it is.
            level: a number of yours, by which `reset_hooks` can remove some hooks and leave others.
            prepend: call it before the hooks already there, not after them.
        """
        _check_direction(dir, ("fwd", "bwd"))
        attached = Hook(hook, dir == "bwd", is_permanent, level)
        self.registry.add([(site, attached) for site in self._sites(name)], prepend)
        return HookHandle(self.registry, attached)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Detaches every hook at once, those of an open `with` block too, but not permanent ones.

        Args:
            clear_contexts: also forget what hooks noted in `hook.ctx`.
            direction: "fwd" or "bwd" to detach only hooks on activations or only hooks on gradients.
            including_permanent: permanent ones too.
            level: only those added with this level.
        """
        _check_direction(direction, ("fwd", "bwd", "both"))
        self.registry.remove(
            {
                hook
                for hooks in self.registry.hooks.values()
                for hook in hooks
                if direction in ("both", "bwd" if hook.backward else "fwd")
                and (including_permanent or not hook.is_permanent)
                and level in (None, hook.level)
            }
        )
        if clear_contexts:
            self.registry.clear_contexts()

    def _sites(self, which: SiteFilter) -> list[str]:
        return select_sites(which, self._names)

    @cached_property
    def _names(self) -> Collection[str]:
        return dict.fromkeys(self.hook_names)  # the same, in which a name is found at once

    @cached_property
    def hook_names(self) -> tuple[str, ...]:
        """The full names of all hook sites, in the order of the forward pass, recorded from a dry run."""
        with torch.no_grad(), sites_recorded(self) as names:
            self.forward(torch.zeros(1, 1, dtype=torch.long))  # never the compiled one
        return tuple(names)

    def _checked_tokens(self, tokens: Tensor) -> Integer[Tensor, "batch pos"]:
        if (
            not isinstance(tokens, Tensor)
            or tokens.is_floating_point()
            or tokens.dtype == torch.bool
        ):
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(
                f"`tokens` is {kind}, but must be a tensor of integers [batch pos] or [pos]: "
                "make one with `torch.as_tensor(moves)`."
            )
        if tokens.ndim not in (1, 2) or not 1 <= tokens.shape[-1] <= self.cfg.n_ctx:
            raise ValueError(
                f"`tokens` has shape {tuple(tokens.shape)}, but must be [batch pos] or [pos] with 1 to "
                f"{self.cfg.n_ctx} moves. A game's last move predicts nothing: use `tokens[..., :{self.cfg.n_ctx}]`."
            )
        tokens = torch.atleast_2d(tokens)
        if not torch.compiler.is_compiling():
            self._check_token_range(tokens)
        return tokens.to(self.W_E.device, torch.long)

    def _check_token_range(self, tokens: Integer[Tensor, "batch pos"]) -> None:
        if tokens.numel() == 0 or (tokens.min() >= 0 and tokens.max() < self.cfg.d_vocab):
            return
        batch, pos = ((tokens < 0) | (tokens >= self.cfg.d_vocab)).nonzero()[0].tolist()
        raise ValueError(
            f"`tokens` holds {tokens[batch, pos].item()} at batch {batch}, pos {pos}. "
            f"Tokens are 0 to {self.cfg.d_vocab - 1}: 0 is padding, 1 to 60 the squares that can be played. "
            "Board squares (0 to 63) become tokens with `othello_gpt.vocab.square_to_token`."
        )

    def _checked_resid(self, resid: Tensor) -> Float[Tensor, "batch pos d_model"]:
        n_ctx, d_model = self.cfg.n_ctx, self.cfg.d_model
        fits = resid.ndim == 3 and 1 <= resid.shape[1] <= n_ctx and resid.shape[2] == d_model
        if not fits or resid.dtype != self.dtype:
            raise ValueError(
                "with `start_at_layer` the input is the residual stream that enters that block, "
                f"(batch, up to {n_ctx}, {d_model}) {self.dtype}, but it is {kind(resid)}. "
                "`model(tokens, stop_at_layer=...)` makes one."
            )
        return resid.clone() if self.registry.hooks else resid  # hooks may edit it in place

    def _checked_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        n_layers = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise ValueError(
                    f"`{name}` is {layer}, but the model has {n_layers} layers: "
                    f"give 0 to {n_layers}, or a negative number counted from the end."
                )
        first, end, _ = slice(start, stop).indices(n_layers)
        if first > end:
            raise ValueError(
                f"`start_at_layer` is {start}, but the run stops before, at layer {stop}."
            )
        return first, end

    @property
    def device(self) -> torch.device:
        return self.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_E.dtype

    # The weights of all layers, stacked. Each call makes a copy: to change a weight, change it in its block.

    def _stacked(self, part: str, weight: str) -> Tensor:
        return torch.stack([getattr(getattr(block, part), weight) for block in self.blocks])

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self._stacked("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        return self._stacked("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        return self._stacked("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        return self._stacked("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        return self._stacked("attn", "b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._stacked("mlp", "W_in")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        return self._stacked("mlp", "b_in")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self._stacked("mlp", "W_out")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        return self._stacked("mlp", "b_out")

    # Files and the hub; see `othello_gpt.weights`.

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, **options: Any) -> "OthelloGPT":
        """The model with trained weights: those that ship in the package, or a file, a folder, or a hub repository.

        See `othello_gpt.weights.load_pretrained` for the options.
        """
        from othello_gpt.weights import load_pretrained

        return load_pretrained(source, model_class=cls, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and README.md; see `othello_gpt.weights.save_pretrained`."""
        from othello_gpt.weights import save_pretrained

        save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the same files to the hub; see `othello_gpt.weights.push_to_hub`."""
        from othello_gpt.weights import push_to_hub

        return push_to_hub(self, repo_id, **options)


def _check_direction(direction: str, allowed: tuple[str, ...]) -> None:
    if direction not in allowed:
        raise ValueError(
            f"the direction is '{direction}', but must be {' or '.join(map(repr, allowed))}."
        )
