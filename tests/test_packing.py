"""Packed weights: another order in memory and nothing else, whatever happens to the weights or is asked of them."""

import copy
import io

import pytest
import torch
from compat_models import hooked
from hypothesis import given
from model_strategies import models, random_model, token_batches

from interp.patching import SITES, last_logits, patch_sweep, patching_metric
from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.compat import HookedTransformer
from othello_gpt.model import MLP
from othello_gpt.packing import HAS_ONEDNN, packed

CFG = GPTConfig(n_layers=2, d_model=16, n_heads=2, d_head=8, d_mlp=32)
TOKENS = torch.tensor([[20, 19, 18, 5], [1, 2, 3, 4]])

needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")


def model_of_floats() -> OthelloGPT:
    return random_model(CFG, dtype=torch.float32)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32's rounding; in the tests' models values are of a few units."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def packs_of(model: OthelloGPT) -> dict:
    return vars(model.blocks[0].mlp).get("packs", {})


@given(models(dtype=torch.float32), token_batches())
def test_every_activation_is_the_models(model, tokens):
    """Of any configuration and batch; heads' results, which are made on request, too."""
    fast = packed(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, model.hook_names)
        found, found_cache = fast.run_with_cache(tokens, model.hook_names)

    close(found, logits)
    assert list(found_cache) == list(cache)
    for name in cache:
        close(found_cache[name], cache[name])


@needs_onednn
def test_all_products_of_blocks_are_packed():
    """Each weight once, by a run without gradients; and by runs with gradients none."""
    fast = packed(model_of_floats())
    with torch.no_grad():
        fast(TOKENS)

    for block in fast.blocks:
        assert set(block.attn.packs) == {"Q", "K", "V", "O"}
        assert set(block.mlp.packs) == {"in", "out"}


def test_sweeps_are_the_models():
    """Of every site."""
    model = model_of_floats()
    clean, corrupted = TOKENS[:1], torch.cat([TOKENS[:1, :-1], TOKENS[1:, -1:]], 1)
    games = [clean[0], corrupted[0]]
    metric = patching_metric(*last_logits(model, games).split(1), 7)
    expected = patch_sweep(model, clean, corrupted, metric, SITES)
    found = patch_sweep(packed(model), clean, corrupted, metric, SITES)

    for site in SITES:
        torch.testing.assert_close(found[site], expected[site], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_changed_weights_are_packed_again():
    """Changed in place in the packed model or in its original, and replaced by others."""
    model = model_of_floats()
    fast = packed(model)
    seen = [fast(TOKENS)]

    for change in (
        lambda: fast.blocks[0].mlp.W_in.mul_(2),
        lambda: model.blocks[1].attn.W_Q.add_(1),
        lambda: model.blocks[1].attn.b_V.add_(1),
        lambda: fast.load_state_dict(random_model(CFG, seed=1).state_dict()),
    ):
        change()
        seen.append(fast(TOKENS))
        close(seen[-1], model(TOKENS))
        assert not torch.allclose(seen[-1], seen[-2])

    for each in (fast, model):
        each.blocks[0].mlp.W_out = torch.nn.Parameter(torch.ones(32, 16))
    close(fast(TOKENS), model(TOKENS))
    assert not torch.allclose(seen[-1], fast(TOKENS))


def test_gradients_are_the_models():
    """Of activations, and of the weights once they are asked for."""
    model = model_of_floats()
    fast = packed(model)
    stream = torch.randn(2, 4, CFG.d_model, requires_grad=True)
    of_stream = [
        torch.autograd.grad(each(stream, start_at_layer=0).square().sum(), stream)[0]
        for each in (model, fast)
    ]
    close(of_stream[1], of_stream[0])

    assert not fast(TOKENS).requires_grad
    assert model(TOKENS).requires_grad
    fast.requires_grad_()
    for each in (model, fast):
        each(TOKENS).log_softmax(-1)[..., 7].sum().backward()
    for own, expected in zip(fast.parameters(), model.parameters(), strict=True):
        close(own.grad, expected.grad)


@torch.no_grad()
@pytest.mark.usefixtures("unchecked")  # the compiler cannot read shape checks
def test_whatever_packs_cannot_serve_is_computed_as_ever():
    """Float64, autocast, a compiled model, weights made in inference mode: equal to the last bit, nothing packed."""
    with torch.inference_mode():
        of_inference = model_of_floats()
    plain = model_of_floats()
    for model in (plain.double(), of_inference):
        fast = packed(model)
        assert torch.equal(fast(TOKENS), model(TOKENS))
        assert not packs_of(fast)

    model = model_of_floats()
    fast = packed(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(TOKENS), model(TOKENS))
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS), model(TOKENS))
    assert not packs_of(fast)


def test_hooks_act_on_the_packed_model_and_stay_where_they_were():
    model = model_of_floats()

    def silence(activation, hook):
        return activation * 0

    with model.hooks([("blocks.1.mlp.hook_pre", silence)]):
        fast, hooked = packed(model), model(TOKENS)

    close(fast(TOKENS), model(TOKENS))
    close(fast.run_with_hooks(TOKENS, [("blocks.1.mlp.hook_pre", silence)]), hooked)
    assert not torch.allclose(fast(TOKENS), hooked)


@torch.no_grad()
def test_copies_pack_for_themselves():
    """Deep copies, unpickled ones and one packed twice."""
    fast, file = packed(model_of_floats()), io.BytesIO()
    expected = fast(TOKENS)
    torch.save(fast, file)
    file.seek(0)
    copies = [copy.deepcopy(fast), torch.load(file, weights_only=False), packed(fast)]

    for each in copies:
        assert not packs_of(each)
        assert torch.equal(each(TOKENS), expected)
        assert packs_of(each) or not HAS_ONEDNN


def test_the_models_class_and_modules_of_ones_own_stay():
    class Silent(MLP):
        def forward(self, x):
            return 0 * super().forward(x)

    model = hooked(model_of_floats())
    model.blocks[1].mlp = Silent(CFG)
    fast = packed(model)

    assert type(fast) is HookedTransformer
    close(fast(TOKENS), model(TOKENS))
    assert not fast.run_with_cache(TOKENS)[1]["mlp_out", 1].any()
