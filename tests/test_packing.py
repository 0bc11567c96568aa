"""Packed weights: another order in memory and nothing else, whatever happens to the weights or is asked of them."""

import copy
import io
from functools import partial

import pytest
import torch
from compat_models import hooked
from hypothesis import given
from model_strategies import models, random_model, token_batches
from torch.autograd import forward_ad

from interp.patching import SITES, last_logits, patch_sweep, patching_metric
from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.compat import HookedTransformer
from othello_gpt.model import MLP, Attention
from othello_gpt.onednn import HAS_ONEDNN
from othello_gpt.packing import packed

CFG = GPTConfig(n_layers=2, d_model=16, n_heads=2, d_head=8, d_mlp=32)
TOKENS = torch.tensor([[20, 19, 18, 5], [1, 2, 3, 4]])

needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")


def model_of_floats() -> OthelloGPT:
    return random_model(CFG, dtype=torch.float32)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32's rounding; in the tests' models values are of a few units."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def packed_weights(model: OthelloGPT) -> dict[str, torch.Tensor]:
    """The packed copies of the first block."""
    halves = (model.blocks[0].attn, model.blocks[0].mlp)
    known = [vars(half).get("packed_weights", {}) for half in halves]
    return {name: weight.copied for each in known for name, weight in each.items()}


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
def test_each_weight_is_packed_once():
    """With gradients asked for, not at all; without, at the first run of several positions."""
    fast = packed(model_of_floats()).requires_grad_()
    fast(TOKENS)
    with torch.no_grad():
        fast(TOKENS[:1, :1])
        assert not packed_weights(fast)
        fast(TOKENS)
        first = packed_weights(fast)
        fast(TOKENS)

    assert set(first) == {"Q", "K", "V", "O", "in", "out"}
    assert all(packed_weights(fast)[name] is copied for name, copied in first.items())


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
    """Changed in place, in the packed model or in its original, and loaded over."""
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


@torch.no_grad()
def test_replaced_weights_are_packed_again():
    """By another parameter, of other memory or the same, and by other memory for the same one.

    The versions of the weights that come and go are equal.
    """
    fast = packed(model_of_floats())
    mlp = fast.blocks[0].mlp

    def another_parameter():
        mlp.W_out = torch.nn.Parameter(torch.randn(32, 16), requires_grad=False)

    def another_of_the_same_memory():
        same = torch.nn.Parameter(mlp.W_in.data, requires_grad=False)
        while same._version < mlp.W_in._version:
            same += 1
        mlp.W_in = same

    another_parameter()
    seen = [fast(TOKENS)]
    for replace in (
        another_parameter,
        another_of_the_same_memory,
        lambda: setattr(mlp.W_in, "data", mlp.W_in + 1),
        lambda: fast.bfloat16().float(),
    ):
        versions = [mlp.W_in._version, mlp.W_out._version]
        replace()
        assert versions == [mlp.W_in._version, mlp.W_out._version]
        seen.append(fast(TOKENS))
        assert torch.equal(seen[-1], copy.deepcopy(fast)(TOKENS))
        assert not torch.allclose(seen[-1], seen[-2])


def test_biases_may_lie_anywhere_in_memory():
    """oneDNN takes no strides of a bias: a column of some biases is copied for it."""
    model = model_of_floats()
    model.blocks[0].mlp.b_in = torch.nn.Parameter(torch.randn(32, 3)[:, 1])
    model.blocks[0].mlp.b_out = torch.nn.Parameter(torch.ones(1).expand(16))
    model.blocks[1].attn.b_O = torch.nn.Parameter(torch.randn(32)[::2])

    close(packed(model)(TOKENS), model(TOKENS))


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
    for names in (("W_in",), ("b_in",), ("W_Q", "b_O")):
        wanted = [
            [p for name, p in each.named_parameters() if name.endswith(names)]
            for each in (model, fast)
        ]
        for parameter in wanted[1]:
            parameter.requires_grad_()
        expected, found = (
            torch.autograd.grad(each(TOKENS).log_softmax(-1)[..., 7].sum(), parameters)
            for each, parameters in zip((model, fast), wanted, strict=True)
        )
        for own, reference in zip(found, expected, strict=True):
            close(own, reference)
        fast.requires_grad_(False)


@pytest.mark.usefixtures("unchecked")  # shapes inside a transform are not those outside
def test_transforms_of_torch_func_are_the_models():
    """Forward-mode derivatives, by their own road too, and a batch of weights."""
    model = model_of_floats()
    fast = packed(model)
    stream, tangent = torch.randn(2, 1, 4, CFG.d_model)

    def run(each: OthelloGPT, resid: torch.Tensor) -> torch.Tensor:
        return each(resid, start_at_layer=0)

    derivatives = [
        torch.func.jvp(partial(run, each), (stream,), (tangent,))[1] for each in (model, fast)
    ]
    assert derivatives[0].abs().max() > 0.1
    assert torch.equal(*derivatives)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(stream, tangent)
        assert torch.equal(forward_ad.unpack_dual(run(fast, dual)).tangent, derivatives[0])

    def with_weight(each: OthelloGPT, W: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(each, {"blocks.0.mlp.W_in": W}, TOKENS)

    weights = torch.randn(3, 16, 32)
    close(*(torch.func.vmap(partial(with_weight, each))(weights) for each in (model, fast)))


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
        assert not packed_weights(fast)

    model = plain.float()
    fast = packed(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(TOKENS), model(TOKENS))
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS), model(TOKENS))
    assert not packed_weights(fast)


def test_hooks_act_on_the_packed_model_and_stay_where_they_were():
    model = model_of_floats()

    def silence(activation, hook):
        return activation * 0

    with model.hooks([("blocks.1.mlp.hook_pre", silence)]):
        fast, silenced = packed(model), model(TOKENS)

    close(fast(TOKENS), model(TOKENS))
    close(fast.run_with_hooks(TOKENS, [("blocks.1.mlp.hook_pre", silence)]), silenced)
    assert not torch.allclose(fast(TOKENS), silenced)


@torch.no_grad()
def test_copies_pack_for_themselves():
    """Deep copies, unpickled ones and one packed twice."""
    fast, file = packed(model_of_floats()), io.BytesIO()
    expected = fast(TOKENS)
    torch.save(fast, file)
    file.seek(0)
    copies = [copy.deepcopy(fast), torch.load(file, weights_only=False), packed(fast)]

    for each in copies:
        assert not packed_weights(each)
        assert torch.equal(each(TOKENS), expected)
        assert packed_weights(each) or not HAS_ONEDNN


def test_the_models_class_and_modules_of_ones_own_stay():
    class Ones(torch.nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    class OnesMLP(Ones, MLP): ...

    class OnesAttention(Ones, Attention): ...

    model = hooked(model_of_floats())
    model.blocks[1].mlp, model.blocks[0].attn = OnesMLP(CFG), OnesAttention(CFG)
    fast = packed(model)

    assert type(fast) is HookedTransformer
    close(fast(TOKENS), model(TOKENS))
    cache = fast.run_with_cache(TOKENS)[1]
    assert (cache["mlp_out", 1] == 1).all()
    assert (cache["attn_out", 0] == 1).all()


@torch.no_grad()
def test_without_onednn_it_is_the_model(monkeypatch):
    monkeypatch.setattr("othello_gpt.onednn.HAS_ONEDNN", False)
    model = model_of_floats()
    fast = packed(model)

    assert torch.equal(fast(TOKENS), model(TOKENS))
    assert not packed_weights(fast)
