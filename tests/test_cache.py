"""The activation cache: what it keeps, how it is found, and that nothing changes it afterwards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import models, random_model, token_batches

from othello_gpt import ActivationCache, GPTConfig

SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=3, d_mlp=16)
TOKENS = torch.tensor([[20, 19, 18], [20, 21, 10]])


def test_a_cache_keeps_every_site_but_the_heads_writes_in_forward_order():
    """`hook_result` is eight times the size of anything else, and kept when it is named."""
    model = random_model(SMALL)
    _, cache = model.run_with_cache(TOKENS)

    assert list(cache) == [name for name in model.hook_names if "hook_result" not in name]
    assert list(model.run_with_cache(TOKENS, "blocks.1.attn.hook_result")[1]) == [
        "blocks.1.attn.hook_result"
    ]


def test_activations_are_found_by_short_keys():
    """As in TransformerLens, negative layers included."""
    _, cache = random_model(SMALL).run_with_cache(TOKENS)

    assert cache["resid_post", -1] is cache["blocks.1.hook_resid_post"]
    assert cache["post", 0, "mlp"] is cache["post", 0]
    assert cache["scale"] is cache["ln_final.hook_scale"]
    assert ("pattern", 1) in cache
    assert "resid_post1" in cache
    assert "nonsense" not in cache


def test_what_was_not_kept_is_an_error_that_says_what_was():
    """With the nearest names."""
    _, cache = random_model(SMALL).run_with_cache(TOKENS, lambda name: name.endswith("resid_post"))

    with pytest.raises(KeyError, match=r"did not keep 'blocks.0.hook_resid_pre'.*It kept 2 sites"):
        cache["resid_pre", 0]


@pytest.mark.parametrize("container", [list, tuple, set])
def test_filters_may_be_any_collection(container):
    """TransformerLens refuses sets and tuples."""
    names = container(["blocks.0.hook_attn_out", "resid_post1"])
    _, cache = random_model(SMALL).run_with_cache(TOKENS, names)

    assert list(cache) == ["blocks.0.hook_attn_out", "blocks.1.hook_resid_post"]


@pytest.mark.parametrize("number", range(len(random_model(SMALL).hook_names)))
def test_no_later_hook_changes_what_was_kept(number):
    """resid_pre is the same tensor as the resid_post before it: an in-place edit must not reach back."""
    model = random_model(SMALL)
    site, before = model.hook_names[number], model.hook_names[:number]
    _, plain = model.run_with_cache(TOKENS, model.hook_names)

    def spoil(activation, hook):
        activation.fill_(7)

    with torch.no_grad(), model.hooks([(site, spoil)]):
        _, cache = model.run_with_cache(TOKENS, model.hook_names)
    for name in before:
        assert torch.equal(cache[name], plain[name]), name
    assert (cache[site] == 7).all()


@torch.no_grad()
def test_nothing_done_with_a_run_later_changes_its_cache():
    """Neither a run that goes on from a kept stream under a hook, nor an edit of what the run returned."""
    model = random_model(SMALL)
    _, plain = model.run_with_cache(TOKENS)
    plain = {name: activation.clone() for name, activation in plain.items()}
    logits, cache = model.run_with_cache(TOKENS)
    stream, cut = model.run_with_cache(TOKENS, stop_at_layer=1)
    spoil = [("resid_pre1", lambda activation, hook: activation.zero_())]
    model.run_with_hooks(cache["resid_pre", 1], spoil, start_at_layer=1)
    logits.zero_()
    stream.zero_()

    for kept in (cache, cut):
        for name, activation in kept.items():
            assert torch.equal(activation, plain[name]), name


@given(models(), token_batches(max_batch=3, max_pos=5), st.data())
def test_selecting_equals_indexing(model, tokens, data):
    """Games by the first axis, positions by the second, or by the query axis of a pattern; axes stay."""
    _, cache = model.run_with_cache(tokens)
    game = data.draw(st.integers(-len(tokens), len(tokens) - 1))
    pos = data.draw(st.integers(-tokens.shape[1], tokens.shape[1] - 1))
    part = cache.select(batch=game, pos=pos)

    assert torch.equal(part["mlp_out", 0][0, 0], cache["mlp_out", 0][game, pos])
    assert torch.equal(part["pattern", 0][0, :, 0], cache["pattern", 0][game, :, pos])
    assert part["q", 0].shape[:2] == (1, 1)
    halves = [cache.select(batch=slice(0, 1)), cache.select(batch=slice(1, None))]
    joined = ActivationCache.concat(halves)
    assert all(torch.equal(joined[name], cache[name]) for name in cache)


@given(models(), token_batches(max_batch=3, max_pos=5), st.data())
def test_a_mask_selects_where_it_is_true(model, tokens, data):
    """Games or positions, as the same numbers do: all of them, some or none."""
    _, cache = model.run_with_cache(tokens)
    games, pos = (torch.tensor([data.draw(st.booleans()) for _ in range(n)]) for n in tokens.shape)
    numbers = [mask.nonzero()[:, 0].tolist() for mask in (games, pos)]
    part, same = cache.select(games, pos), cache.select(*numbers)

    assert torch.equal(part["mlp_out", 0], cache["mlp_out", 0][games][:, pos])
    assert all(torch.equal(part[name], same[name]) for name in cache)
    run = model.run_with_cache(tokens, pos_slice=pos)[1]
    assert torch.equal(run["pattern", 0], cache["pattern", 0][:, :, pos])


def test_selecting_what_is_not_there_is_an_error():
    """An index beyond the games, a mask of other games, no index; caches of different sites; none at all."""
    model = random_model(SMALL)
    _, cache = model.run_with_cache(TOKENS)
    _, other = model.run_with_cache(TOKENS, "hook_embed")

    with pytest.raises(IndexError, match="index 2 is out of range for 2 entries along axis 0"):
        cache.select(batch=2)
    with pytest.raises(IndexError, match="a mask of 3 entries cannot choose among 2 along axis 0"):
        cache.select(batch=torch.tensor([True, False, True]))
    with pytest.raises(TypeError, match="an index must be whole numbers or a mask.*float32"):
        cache.select(batch=torch.tensor([0.0]))
    with pytest.raises(ValueError, match="cache 0 and cache 1 hold different sites"):
        ActivationCache.concat([cache, other])
    with pytest.raises(ValueError, match="at least one cache"):
        ActivationCache.concat([])


def test_a_cache_is_cut_from_the_graph_unless_asked():
    """Gradients with respect to activations need `detach=False`; `.detach()` cuts them afterwards."""
    model = random_model(SMALL)
    _, cache = model.run_with_cache(TOKENS)
    logits, live = model.run_with_cache(TOKENS, detach=False)
    (grad,) = torch.autograd.grad(logits.sum(), live["resid_mid", 0])

    assert not any(activation.requires_grad for activation in cache.values())
    assert grad.abs().sum() > 0
    assert not live.detach()["resid_mid", 0].requires_grad
    assert live.to("cpu")["resid_mid", 0].device.type == "cpu"


def test_memory_counts_shared_storage_once():
    """resid_pre of a block is resid_post of the one before."""
    _, cache = random_model(SMALL).run_with_cache(
        TOKENS, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    )

    assert cache.nbytes == 2 * 3 * 8 * 8
    assert repr(cache) == "ActivationCache(2 activations, 0.0 MiB)"


@given(models(), token_batches(), st.data())
def test_one_run_hooks_caches_selects_and_takes_gradients(model, tokens, data):
    """What hooks make is what is kept, copied, at the chosen positions; gradients of any one number."""
    pos = data.draw(st.integers(-tokens.shape[1], tokens.shape[1] - 1))
    double = [("blocks.0.hook_attn_out", lambda activation, hook: activation * 2)]
    with model.hooks(double):
        logits, cache = model.run_with_cache(tokens, detach=False)
    (grad,) = torch.autograd.grad(logits[0, -1, 7], cache["resid_mid", 0])
    again, part = model.run_with_cache(
        tokens, fwd_hooks=double, pos_slice=pos, grad_of=lambda logits: logits[0, -1, 7]
    )

    assert torch.equal(again, logits)
    assert torch.equal(part["attn_out", 0], cache["attn_out", 0][:, [pos]])
    assert torch.equal(part["attn_scores", 0], cache["attn_scores", 0][:, :, [pos]])
    kept = part["blocks.0.hook_resid_mid_grad"]
    assert torch.allclose(kept, grad[:, [pos]], rtol=0, atol=1e-10)
    assert part["blocks.0.attn.hook_pattern_grad"].shape == part["pattern", 0].shape
    assert model.registry.hooks == {}


@given(models(), token_batches(), st.data())
def test_the_stream_is_the_sum_of_its_writers_at_every_layer(model, tokens, data):
    """Writers by mode, streams between blocks, and the LayerNorm of this run, which is linear in them."""
    _, cache = model.run_with_cache(tokens)
    layer, pos = data.draw(st.integers(0, model.cfg.n_layers)), -1
    writers, labels = cache.decompose_resid(layer, pos_slice=pos, return_labels=True)
    streams, names = cache.accumulated_resid(incl_mid=True, return_labels=True)
    by_name = dict(zip(names, streams[:, :, pos], strict=True))
    entering = by_name["final_post" if layer == model.cfg.n_layers else f"{layer}_pre"]

    assert torch.allclose(writers.sum(0), entering, rtol=0, atol=1e-12)
    normalized = cache.apply_ln_to_stack(writers, layer, pos_slice=pos).sum(0)
    end = layer == model.cfg.n_layers
    expected = cache["normalized"] if end else cache["normalized", layer, "ln1"]
    assert torch.allclose(normalized, expected[:, pos], rtol=0, atol=1e-10)
    attn = cache.decompose_resid(layer, mode="attn", incl_embeds=False) if layer else []
    assert all(
        torch.equal(a[:, pos], writers[labels.index(f"{i}_attn_out")]) for i, a in enumerate(attn)
    )
    assert torch.equal(
        cache.stack_activation("attn_out", model.cfg.n_layers)[0], cache["attn_out", 0]
    )
    lens = model.unembed(cache.accumulated_resid())
    assert torch.allclose(lens[-1], model(tokens), rtol=0, atol=1e-12)
