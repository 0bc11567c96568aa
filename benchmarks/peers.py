"""The same weights in the peers that are installed: TransformerLens, nnsight, pyvene, baukit, module hooks.

`pip install -e '.[bench]'` brings the first two. What is not installed is left out.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

import torch

from othello_gpt import OthelloGPT
from othello_gpt.weights import to_transformer_lens

Run = Callable[[torch.Tensor], torch.Tensor]


class Peer(NamedTuple):
    """Calls from tokens to logits, by what they do on the way."""

    forward: Run
    no_op: Run | None  # one hook that changes nothing, on the output of block 3's attention
    cache_all: Run | None
    patch: Callable[[torch.Tensor, int, bool, torch.Tensor], torch.Tensor]
    # patch(tokens, layer, is_mlp, value): the last position of one layer's output set to a value


def hooked_transformer(model: OthelloGPT):
    """TransformerLens's model with the weights of ours."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = model.cfg
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = HookedTransformer(
            HookedTransformerConfig(
                n_layers=cfg.n_layers,
                d_model=cfg.d_model,
                n_ctx=cfg.n_ctx,
                d_head=cfg.d_head,
                n_heads=cfg.n_heads,
                d_mlp=cfg.d_mlp,
                d_vocab=cfg.d_vocab,
                act_fn="gelu",
                normalization_type="LN",
                device="cpu",
            )
        )
    state = {k: v for k, v in to_transformer_lens(model).items() if k in theirs.state_dict()}
    theirs.load_state_dict(state, strict=False)
    return theirs


def transformer_lens(model: OthelloGPT) -> Peer:
    theirs = hooked_transformer(model)

    def patch(tokens, layer, is_mlp, value):
        def fn(activation, hook):
            activation[0, -1] = value
            return activation

        name = f"blocks.{layer}.hook_{'mlp' if is_mlp else 'attn'}_out"
        return theirs.run_with_hooks(tokens, fwd_hooks=[(name, fn)])

    no_op = [("blocks.3.hook_attn_out", lambda activation, hook: activation)]
    return Peer(
        theirs,
        lambda tokens: theirs.run_with_hooks(tokens, fwd_hooks=no_op),
        lambda tokens: theirs.run_with_cache(tokens)[0],
        patch,
    )


def module_hooks(twin: OthelloGPT) -> Peer:
    """`register_forward_hook` on the tapless twin; modules are coarser than sites."""

    def with_hooks(tokens, modules, fn):
        handles = [module.register_forward_hook(fn) for module in modules]
        try:
            return twin(tokens)
        finally:
            for handle in handles:
                handle.remove()

    def cache_all(tokens):
        kept = {}
        return with_hooks(tokens, twin.modules(), lambda m, args, out: kept.update({m: out}))

    def patch(tokens, layer, is_mlp, value):
        def fn(module, args, out):
            out[0, -1] = value
            return out

        block = twin.blocks[layer]
        return with_hooks(tokens, [block.mlp if is_mlp else block.attn], fn)

    attn = [twin.blocks[3].attn]
    return Peer(
        twin, lambda tokens: with_hooks(tokens, attn, lambda m, args, out: None), cache_all, patch
    )


def nnsight(twin: OthelloGPT) -> Peer:
    from nnsight import NNsight

    traced = NNsight(twin)

    def no_op(tokens):
        with traced.trace(tokens):
            traced.blocks[3].attn.output.save()
            logits = traced.output.save()
        return logits

    def patch(tokens, layer, is_mlp, value):
        with traced.trace(tokens):
            if is_mlp:
                traced.blocks[layer].mlp.output[0, -1] = value
            else:
                traced.blocks[layer].attn.output[0, -1] = value
            logits = traced.output.save()
        return logits

    def cache_all(tokens):
        with traced.trace(tokens) as tracer:
            tracer.cache()
            logits = traced.output.save()
        return logits

    return Peer(twin, no_op, cache_all, patch)


def pyvene(twin: OthelloGPT) -> Peer:
    import pyvene

    twin.config = SimpleNamespace(hidden_size=twin.cfg.d_model)

    def intervened(tokens, component, fn):
        model = pyvene.IntervenableModel([{"component": component, "intervention": fn}], model=twin)
        return model({"tokens": tokens})[1]

    def patch(tokens, layer, is_mlp, value):
        def fn(base, source):
            base[0, -1] = value
            return base

        return intervened(tokens, f"blocks[{layer}].{'mlp' if is_mlp else 'attn'}.output", fn)

    no_op = pyvene.IntervenableModel(
        [{"component": "blocks[3].attn.output", "intervention": lambda base, source: base}],
        model=twin,
    )
    return Peer(twin, lambda tokens: no_op({"tokens": tokens})[1], None, patch)


def baukit(twin: OthelloGPT) -> Peer:
    from baukit import Trace

    def traced(tokens, layer, is_mlp, fn):
        name = f"blocks.{layer}.{'mlp' if is_mlp else 'attn'}"
        with Trace(twin, name, edit_output=fn):
            return twin(tokens)

    def patch(tokens, layer, is_mlp, value):
        def fn(out):
            out[0, -1] = value
            return out

        return traced(tokens, layer, is_mlp, fn)

    return Peer(twin, lambda tokens: traced(tokens, 3, False, lambda out: out), None, patch)


def installed(model: OthelloGPT, twin: OthelloGPT) -> dict[str, Peer]:
    """The peers at hand, each checked to give the model's logits."""
    makers = {
        "module hooks": lambda: module_hooks(twin),
        "TransformerLens": lambda: transformer_lens(model),
        "nnsight": lambda: nnsight(twin),
        "pyvene": lambda: pyvene(twin),
        "baukit": lambda: baukit(twin),
    }
    packages = {"TransformerLens": "transformer_lens", "module hooks": "torch"}
    found = {name: make() for name, make in makers.items() if find_spec(packages.get(name, name))}
    tokens = torch.randint(1, 61, (2, 9))
    for peer in found.values():
        for run in (peer.forward, peer.no_op, peer.cache_all):
            if run is not None:
                torch.testing.assert_close(run(tokens), model(tokens), rtol=0, atol=2e-5)
    return found
