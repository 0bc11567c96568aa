"""HookedTransformer and its configuration: OthelloGPT under TransformerLens's names and arguments."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from othello_gpt import weights as folding
from othello_gpt.compat.cache import ActivationCache, as_index
from othello_gpt.compat.factored import FactoredMatrix, composition_scores
from othello_gpt.hooks import HookFn, HookHandle, HookPoint, SiteFilter
from othello_gpt.model import GPTConfig, Hooks, OthelloGPT
from othello_gpt.weights import WeightsError, convert

_OURS = {  # what TransformerLens lets one choose, and the choice that this library's model has made
    "act_fn": ("gelu",),  # the exact one; "gelu_new" is its tanh approximation
    "attention_dir": ("causal",),
    "attn_only": (False,),
    "attn_types": (None,),
    "final_rms": (False,),
    "gated_mlp": (False,),
    "normalization_type": ("LN", "LNPre"),
    "n_key_value_heads": (None,),
    "num_experts": (None,),
    "parallel_attn_mlp": (False,),
    "positional_embedding_type": ("standard",),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tokenizer_name": (None,),
    "use_attn_in": (False,),
    "use_attn_scale": (True,),
    "use_hook_mlp_in": (False,),
    "use_hook_tokens": (False,),
    "use_local_attn": (False,),
    "use_split_qkv_input": (False,),
    "attn_scores_soft_cap": (-1.0,),
    "clip_qkv": (None,),
    "output_logits_soft_cap": (-1.0,),
    "post_embedding_ln": (False,),
    "rotary_dim": (None,),
    "tie_word_embeddings": (False,),
    "use_NTK_by_parts_rope": (False,),
    "use_attention_sinks": (False,),
    "use_dynamic_ntk_rope": (False,),
    "use_logn_attn": (False,),
    "use_normalization_before_and_after": (False,),
    "use_qk_norm": (False,),
    "use_yarn_rope": (False,),
    "uses_rms_norm": (False,),
}
# No effect here, nor in TransformerLens unless one of those above is switched on.
_WITHOUT_EFFECT = """
    NTK_by_parts_factor NTK_by_parts_high_freq_factor NTK_by_parts_low_freq_factor NTK_original_ctx_len
    checkpoint_index checkpoint_label_type checkpoint_value decoder_start_token_id default_prepend_bos
    experts_per_token from_checkpoint init_mode init_weights initializer_range layer_norm_folding
    load_in_4bit model_name n_devices n_params norm_topk_prob original_architecture quantization_method
    relative_attention_max_distance relative_attention_num_buckets rotary_adjacent_pairs rotary_base
    rotary_base_local rotary_scaling_factor tokenizer_prepends_bos train_seq_length trust_remote_code
    ungroup_grouped_query_attention window_size yarn_attention_factor yarn_beta_fast
    yarn_beta_slow yarn_factor yarn_global_attn_only yarn_original_max_position_embeddings yarn_truncate
"""
_INSTEAD = {  # methods of TransformerLens that have no meaning here, and what has
    "generate": "`othello_gpt.board.random_games`, or the model's logits move by move",
    "to_tokens": "`othello_gpt.vocab.square_to_token`",
    "to_single_token": "`othello_gpt.vocab.square_to_token`",
    "to_str_tokens": "`othello_gpt.vocab.token_to_square` and `square_to_label`",
    "to_string": "`othello_gpt.vocab.token_to_square` and `square_to_label`",
    "set_use_split_qkv_input": "a hook on `ln1.hook_normalized`, which q, k and v share",
    "set_use_attn_in": "a hook on `ln1.hook_normalized`, which q, k and v share",
    "set_use_hook_mlp_in": "a hook on `ln2.hook_normalized`",
    "get_caching_hooks": "`run_with_cache`, or `hooks` and a function that keeps what it sees",
    "add_caching_hooks": "`run_with_cache`, or `hooks` and a function that keeps what it sees",
    "refactor_factored_attn_matrices": "`model.QK` and `model.OV`, which no choice of basis changes",
}
_FOR_OTHERS = "For other architectures: `pip install 'transformer_lens<4'`."


class HookedTransformerConfig(GPTConfig):
    """The sizes of a model, and the few settings of TransformerLens that mean something here.

    Args:
        n_layers, d_model, n_ctx, d_head, n_heads, d_mlp, d_vocab, eps: sizes; by default d_model // d_head
            heads, 4 * d_model neurons and 61 tokens.
        normalization_type: "LN", or "LNPre" for folded weights, whose LayerNorm has no parameters of its own.
        device, dtype: of the weights.
        seed: sets torch's global seed before weights are drawn, as TransformerLens does.
        use_attn_result: `run_with_cache` keeps `hook_result` too, when nothing else is asked for.
        others: TransformerLens's remaining fields, with the one value that fits this architecture.

    Raises:
        ValueError: another architecture, or a field that TransformerLens does not have.
    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        n_ctx: int,
        d_head: int,
        *,
        n_heads: int = -1,
        d_mlp: int | None = None,
        d_vocab: int = 61,
        eps: float = 1e-5,
        normalization_type: str | None = "LN",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        use_attn_result: bool = False,
        **others: Any,
    ) -> None:
        fitting = _OURS | {"attn_scale": (-1.0, d_head**0.5), "d_vocab_out": (-1, d_vocab)}
        _check_architecture(others | {"normalization_type": normalization_type}, fitting)
        n_heads = d_model // d_head if n_heads == -1 else n_heads
        d_mlp = 4 * d_model if d_mlp is None else d_mlp
        super().__init__(n_layers, d_model, n_heads, d_head, d_mlp, d_vocab, n_ctx, eps)
        self.normalization_type, self.act_fn = normalization_type, "gelu"
        self.device, self.dtype = torch.device(device or "cpu"), dtype
        self.seed, self.use_attn_result = seed, use_attn_result


def _check_architecture(settings: dict[str, Any], fitting: dict[str, tuple[Any, ...]]) -> None:
    for name, value in settings.items():
        if name in fitting and value not in fitting[name]:
            raise ValueError(
                f"`{name}` is {value!r}, but this library has one architecture, with "
                f"{' or '.join(map(repr, fitting[name]))}. {_FOR_OTHERS}"
            )
        if name not in fitting and name not in _WITHOUT_EFFECT.split():
            raise ValueError(f"`{name}` means nothing for this library's model. {_FOR_OTHERS}")


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Tensor


class HookedTransformer(OthelloGPT):
    """OthelloGPT, called as TransformerLens's class of the name.

    Unlike TransformerLens, a name or predicate that fits no site is an error, filters may be sets and
    tuples, a hook's replacement must have the activation's shape, `add_hook` returns a handle, `ln1` is
    called once a block so that its gradient is the whole one, and weights are processed in float64. `embed`
    and `unembed` are OthelloGPT's: steps of the model, which count positions and the final LayerNorm.

    Args:
        cfg: a HookedTransformerConfig or its fields as a dictionary.
        tokenizer: None, as moves need none.
        move_to_device: False leaves the weights where they are made, whatever `cfg.device` is.

    Example:
        >>> model = HookedTransformer.from_pretrained()
        >>> logits, cache = model.run_with_cache(torch.tensor([20, 19, 18]), remove_batch_dim=True)
        >>> cache["resid_post", 6].shape
        torch.Size([3, 256])
    """

    cfg: HookedTransformerConfig

    def __init__(
        self,
        cfg: GPTConfig | Mapping[str, Any],
        tokenizer: Any = None,
        move_to_device: bool = True,
    ) -> None:
        if tokenizer is not None:
            raise ValueError(
                "there is no tokenizer here: moves become tokens with `othello_gpt.vocab.square_to_token`."
            )
        if isinstance(cfg, HookedTransformerConfig):
            cfg = copy.copy(cfg)  # folding and moving one model change nothing of another
        else:
            cfg = HookedTransformerConfig(**(asdict(cfg) if isinstance(cfg, GPTConfig) else cfg))
        if cfg.seed is not None:
            torch.manual_seed(cfg.seed)
        super().__init__(cfg)
        self.to(cfg.device if move_to_device else self.device, cfg.dtype)
        self._mark_folded(cfg.normalization_type == "LNPre")

    # --- Running ---

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Tensor,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        *,
        start_at_layer: int | None = None,
        tokens: Tensor | None = None,
        stop_at_layer: int | None = None,
        **unsupported: Any,
    ) -> Any:
        """Logits, the loss, both, or None; with `stop_at_layer` the stream that enters that block.

        Args:
            input: tokens, or with `start_at_layer` the stream that enters that block.
            return_type: "logits", "loss", "both" or None.
            loss_per_token: the loss as [batch pos-1] in place of its mean.
            tokens: for the loss, when `input` is a stream.
        """
        if unsupported or prepend_bos:
            names = ", ".join(unsupported) or "prepend_bos"
            raise TypeError(f"{names}: this library's model has no such option. {_FOR_OTHERS}")
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(
                f"`return_type` is {return_type!r}, but must be 'logits', 'loss', 'both' or None."
            )
        output = super().forward(input, start_at_layer, stop_at_layer)
        if return_type == "logits" or stop_at_layer is not None:
            return output
        if return_type is None:
            return None
        if tokens is None and start_at_layer is not None:
            raise ValueError("a loss from a stream needs the moves too: give `tokens=`.")
        loss = self.loss_fn(output, input if tokens is None else tokens, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(output, loss)

    def loss_fn(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Tensor, per_token: bool = False
    ) -> Tensor:
        """Cross-entropy of every move after the first, in nats: the mean, or [batch pos-1].

        Padding counts like a move, as in TransformerLens; cut games short rather than pad them.
        """
        targets = torch.atleast_2d(tokens)[:, 1:].to(logits.device, torch.long)
        losses = F.cross_entropy(logits[:, :-1].mT, targets, reduction="none")
        return losses if per_token else losses.mean()

    @contextmanager
    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> "Iterator[HookedTransformer]":
        """As `OthelloGPT.hooks`; with `reset_hooks_end=False` the hooks stay until `reset_hooks`."""
        bwd_hooks = [(name, _unpacked(hook)) for name, hook in bwd_hooks]
        try:
            if reset_hooks_end:
                with super().hooks(fwd_hooks, bwd_hooks):
                    yield self
            else:
                pairs = [("fwd", *pair) for pair in fwd_hooks] + [
                    ("bwd", *pair) for pair in bwd_hooks
                ]
                named = [(self._sites(name), hook, dir) for dir, name, hook in pairs]
                for sites, hook, dir in named:  # none is attached before all names are found
                    self.add_hook(sites, hook, dir)
                yield self
        finally:
            if clear_contexts:
                self.registry.clear_contexts()

    def run_with_hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *input: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **options: Any,
    ) -> Any:
        """What the model returns, under these hooks; see `hooks`."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*input, **options)

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Tensor,
        return_type: str | None = "logits",
        *,
        names_filter: SiteFilter | None = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: Any = None,
        fwd_hooks: Hooks = (),
        return_cache_object: bool = True,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **options: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """What the model returns, and a cache of its activations.

        Args:
            names_filter: as in `OthelloGPT.run_with_cache`; sets and tuples too.
            device: where the cache shall lie.
            remove_batch_dim: for one game: activations without their first axis.
            incl_bwd: also their gradients, as `<name>_grad`; the run must give one number, a "loss".
            pos_slice: a position (which keeps its axis), a tuple (start, stop), or a list of positions.
            fwd_hooks: hooks for this run; what they make of an activation is what is kept.
            return_cache_object: False gives a plain dictionary.
            reset_hooks_end: without effect, as these hooks never outlive the run.
        """
        if names_filter is None and self.cfg.use_attn_result:
            names_filter = self.hook_names
        with self.hooks(clear_contexts=clear_contexts):
            output, kept = super().run_with_cache(
                input,
                names_filter,
                fwd_hooks=fwd_hooks,
                pos_slice=as_index(pos_slice),
                grad_of=_one_number if incl_bwd else None,
                return_type=return_type,
                **options,
            )
        cache = ActivationCache(kept, self)
        if device is not None:
            cache.to(device)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, cache if return_cache_object else cache.cache_dict

    def add_hook(
        self, name: SiteFilter, hook: HookFn, dir: str = "fwd", *others: Any, **options: Any
    ) -> HookHandle:
        """As `OthelloGPT.add_hook`; a hook on a gradient may return it in a tuple of its own."""
        hook = _unpacked(hook) if dir == "bwd" else hook
        return super().add_hook(name, hook, dir, *others, **options)

    def add_perma_hook(self, name: SiteFilter, hook: HookFn, dir: str = "fwd") -> HookHandle:
        """As `add_hook`, permanent."""
        return self.add_hook(name, hook, dir, is_permanent=True)

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """The hook points by name: `name`, `layer()` and `ctx`."""
        return {name: self.registry.point(name) for name in self.hook_names}

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether `run_with_cache` keeps `hook_result` unasked; hooks on it always fire."""
        self.cfg.use_attn_result = use_attn_result

    # --- Weights ---

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        model_name: str | Path | None = None,
        *,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> "HookedTransformer":
        """The packaged model, or one from a file, a folder or a hub repository; "othello-gpt" is TransformerLens's.

        See `othello_gpt.weights.load_pretrained` for the options.
        """
        if model_name == "othello-gpt":
            model_name = "Baidicoot/Othello-GPT-Transformer-Lens"
            options.setdefault("filename", "final.pth")
        model = super().from_pretrained(model_name, fold=False, dtype=torch.float64, **options)
        assert isinstance(model, cls)
        model.process_weights_(
            fold_ln, center_writing_weights, center_unembed, fold_value_biases=fold_value_biases
        )
        return model.to(dtype)

    @classmethod
    def from_pretrained_no_processing(
        cls, model_name: str | Path | None = None, **options: Any
    ) -> "HookedTransformer":
        """The same with the weights as they are stored."""
        steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
        return cls.from_pretrained(model_name, **dict.fromkeys(steps, False), **options)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads weights under TransformerLens's, minGPT's or our names, as they are.

        Unlike TransformerLens, a dictionary that does not fit is an error with `strict=False` too.
        """
        weights = self._converted(state_dict)
        norms = [name for name in weights if _is_of_layer_norm(name)]
        folded = all(bool((weights[name] == name.endswith(".w")).all()) for name in norms)
        if self.cfg.normalization_type == "LNPre" and not folded:
            raise WeightsError(
                "the weights have a LayerNorm of their own, but `normalization_type` is 'LNPre', folded. "
                "Make the model with 'LN', or call `load_and_process_state_dict`, which folds."
            )
        return super().load_state_dict(weights, strict, assign)

    def _converted(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        cfg, weights = convert(state_dict, self.cfg.n_heads)
        sizes = [(f.name, getattr(cfg, f.name), getattr(self.cfg, f.name)) for f in fields(cfg)]
        if different := [size for size in sizes if size[1] != size[2] and size[0] != "eps"]:
            listed = ", ".join(
                f"`{name}` is {found}, not {ours}" for name, found, ours in different
            )
            raise WeightsError(f"the weights are those of a model of another size: {listed}.")
        return weights

    def load_and_process_state_dict(
        self,
        state_dict: Mapping[str, Any],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Loads weights after taking out of them what has no effect; see `othello_gpt.weights.fold`.

        Unlike TransformerLens 2, LayerNorm is not applied twice after folding; unlike every version, the
        arithmetic is float64, so that a float64 model keeps its log-probabilities to 1e-11.
        """
        if refactor_factored_attn_matrices:
            raise ValueError(_missing("refactor_factored_attn_matrices"))
        weights = {name: w.double() for name, w in self._converted(state_dict).items()}
        steps = {
            folding.fold_layer_norm: fold_ln,
            folding.fold_value_biases: fold_value_biases,
            folding.center_writing_weights: center_writing_weights,
            folding.center_unembed: center_unembed,
        }
        for step in (step for step, wanted in steps.items() if wanted):
            weights = step(weights)
        self.load_state_dict(weights)
        self._mark_folded(fold_ln or self.cfg.normalization_type == "LNPre")

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = True,
    ) -> None:
        """The same for the weights that the model has."""
        self.load_and_process_state_dict(
            self.state_dict(),
            fold_ln,
            center_writing_weights,
            center_unembed,
            fold_value_biases,
            refactor_factored_attn_matrices,
        )

    def _mark_folded(self, folded: bool) -> None:
        """A folded LayerNorm is 1 and 0 and stays so: it takes no gradient."""
        self.cfg.normalization_type = "LNPre" if folded else "LN"
        for name, parameter in self.named_parameters():
            if folded and _is_of_layer_norm(name):
                parameter.requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "HookedTransformer":
        super()._apply(fn, recurse)
        self.cfg.device, self.cfg.dtype = self.device, self.dtype
        return self

    @property
    def W_E_pos(self) -> Float[Tensor, "token_then_pos d_model"]:
        """Token and position embeddings, one under the other."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def OV(self) -> FactoredMatrix:
        """What each head writes for what it reads at the source: [layer head d_model d_model]."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """How each head scores a source for a query: [layer head d_model d_model]."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    def all_head_labels(self) -> list[str]:
        """ "L0H0", "L0H1" ..."""
        cfg = self.cfg
        return [f"L{layer}H{head}" for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head layer_ head_"]:
        """How much each later head's Q, K or V reads of what each earlier head writes; 0 for other pairs.

        Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"`mode` is '{mode}', but must be 'Q', 'K' or 'V'.")
        reader = {"Q": self.QK, "K": self.QK.T, "V": self.OV}[mode]
        layer = torch.arange(self.cfg.n_layers, device=self.device)
        later = (layer[:, None] < layer)[:, None, :, None]
        return composition_scores(self.OV, reader) * later

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of all b_O and b_out below `layer`, and with `mlp_input` of its own b_O."""
        bias = self.b_O[: layer + mlp_input].sum(0)
        return bias + self.b_out[:layer].sum(0) if include_mlp_biases else bias

    def tokens_to_residual_directions(
        self, tokens: int | Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*kept d_model"]:
        """The columns of W_U; of a single token without a batch axis."""
        tokens = torch.as_tensor(tokens, device=self.device)
        return self.W_U.T[tokens.reshape(()) if tokens.numel() == 1 else tokens]

    def __getattr__(self, name: str) -> Any:
        if name in _INSTEAD:
            raise AttributeError(_missing(name))
        return super().__getattr__(name)


def _is_of_layer_norm(name: str) -> bool:
    return name.split(".")[-2:-1] in (["ln1"], ["ln2"], ["ln_final"])


def _unpacked(hook: HookFn) -> HookFn:
    """The same backward hook; `(gradient,)`, which TransformerLens lets it return, becomes the gradient."""

    def unpacked(gradient: Tensor, **point: HookPoint) -> Any:
        returned = hook(gradient, **point)
        return returned[0] if isinstance(returned, tuple) and len(returned) == 1 else returned

    return unpacked


def _one_number(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.numel() != 1:
        raise ValueError(
            "`incl_bwd` takes gradients of one number, but the run does not give one: "
            "use `return_type='loss'`, or `model.hooks(bwd_hooks=...)` and your own metric."
        )
    return output


def _missing(name: str) -> str:
    return f"this library has no `{name}`. For Othello-GPT use {_INSTEAD[name]}. {_FOR_OTHERS}"
