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
    no_op_all: Run | None  # such a hook on all that the library sees
    cache_all: Run | None
    patch: Run  # the same output, set to 0 at the last position of the first game


def blank(activation: torch.Tensor) -> torch.Tensor:
    """In place, the last position of the first game."""
    activation[0, -1] = 0
    return activation


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
    theirs, site = hooked_transformer(model), "blocks.3.hook_attn_out"
    no_op = [(site, lambda activation, hook: activation)]
    no_op_all = [(lambda name: True, lambda activation, hook: activation)]
    patch = [(site, lambda activation, hook: blank(activation))]
    return Peer(
        theirs,
        lambda tokens: theirs.run_with_hooks(tokens, fwd_hooks=no_op),
        lambda tokens: theirs.run_with_hooks(tokens, fwd_hooks=no_op_all),
        lambda tokens: theirs.run_with_cache(tokens)[0],
        lambda tokens: theirs.run_with_hooks(tokens, fwd_hooks=patch),
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

    attn = [twin.blocks[3].attn]
    return Peer(
        twin,
        lambda tokens: with_hooks(tokens, attn, lambda m, args, out: None),
        lambda tokens: with_hooks(tokens, twin.modules(), lambda m, args, out: None),
        cache_all,
        lambda tokens: with_hooks(tokens, attn, lambda m, args, out: blank(out)),
    )


def nnsight(twin: OthelloGPT) -> Peer:
    from nnsight import NNsight

    traced = NNsight(twin)

    def no_op(tokens):
        with traced.trace(tokens):
            traced.blocks[3].attn.output.save()
            logits = traced.output.save()
        return logits

    def cache_all(tokens):
        with traced.trace(tokens) as tracer:
            tracer.cache()
            logits = traced.output.save()
        return logits

    def patch(tokens):
        with traced.trace(tokens):
            traced.blocks[3].attn.output[0, -1] = 0
            logits = traced.output.save()
        return logits

    return Peer(twin, no_op, None, cache_all, patch)


def pyvene(twin: OthelloGPT) -> Peer:
    import pyvene

    twin.config = SimpleNamespace(hidden_size=twin.cfg.d_model)

    def intervened(intervention):
        place = {"component": "blocks[3].attn.output", "intervention": intervention}
        model = pyvene.IntervenableModel([place], model=twin)
        return lambda tokens: model({"tokens": tokens})[1]

    no_op, patch = lambda base, source: base, lambda base, source: blank(base)
    return Peer(twin, intervened(no_op), None, None, intervened(patch))


def baukit(twin: OthelloGPT) -> Peer:
    from baukit import Trace, TraceDict

    modules = [name for name, _ in twin.named_modules() if name]

    def edited(edit):
        def run(tokens):
            with Trace(twin, "blocks.3.attn", retain_output=False, edit_output=edit):
                return twin(tokens)

        return run

    def no_op_all(tokens):
        with TraceDict(twin, modules, retain_output=False, edit_output=lambda output: output):
            return twin(tokens)

    def cache_all(tokens):
        with TraceDict(twin, modules):
            return twin(tokens)

    return Peer(twin, edited(lambda output: output), no_op_all, cache_all, edited(blank))


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
        for run in (peer.forward, peer.no_op, peer.no_op_all, peer.cache_all):
            if run is not None:
                torch.testing.assert_close(run(tokens), model(tokens), rtol=0, atol=2e-5)
    return found
