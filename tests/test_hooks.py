"""Hooks: what they may do, what they may not, and that none outlives its run."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import models, random_model, token_batches
from reference_model import fixture_model, load_fixture

from othello_gpt import GPTConfig, get_act_name
from othello_gpt.hooks import HookPoint

SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=3, d_mlp=16)
TOKENS = torch.tensor([[20, 19, 18]])


def documented_names(n_layers: int) -> list[str]:
    """The table of the model's docstring, written out by hand."""
    names = """
        hook_resid_pre ln1.hook_scale ln1.hook_normalized attn.hook_q attn.hook_k attn.hook_v
        attn.hook_attn_scores attn.hook_pattern attn.hook_z attn.hook_result hook_attn_out
        hook_resid_mid ln2.hook_scale ln2.hook_normalized mlp.hook_pre mlp.hook_post hook_mlp_out
        hook_resid_post"""
    block = names.split()
    blocks = [f"blocks.{layer}.{site}" for layer in range(n_layers) for site in block]
    last = [
        "ln_final.hook_scale",
        "ln_final.hook_normalized",
        "unembed.hook_in",
        "unembed.hook_out",
    ]
    return ["hook_embed", "hook_pos_embed", *blocks, *last]


@given(models())
def test_the_sites_are_those_of_the_table(model):
    """The names recorded from a run are the documented ones, in the order of the forward pass."""
    assert list(model.hook_names) == documented_names(model.cfg.n_layers)


@given(models(), token_batches())
def test_hooks_that_do_nothing_change_nothing(model, tokens):
    """Neither looking at a site nor returning what was there moves a bit; all heads' writes move rounding."""
    sites = [name for name in model.hook_names if not name.endswith("hook_result")]
    plain = model(tokens)

    assert torch.equal(
        model.run_with_hooks(tokens, [(sites, lambda activation, hook: None)]), plain
    )
    assert torch.equal(model.run_with_hooks(tokens, [(sites, lambda a, hook: a)]), plain)
    with_heads = model.run_with_hooks(tokens, [(lambda name: True, lambda a, hook: a)])
    assert torch.allclose(with_heads, plain, rtol=0, atol=1e-12)


@given(models(), token_batches(), st.data())
def test_no_hook_outlives_its_run(model, tokens, data):
    """Not even when one raises, at whatever site, and the exception says where."""
    site = data.draw(st.sampled_from(model.hook_names))
    plain = model(tokens)

    def fail(activation, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose") as caught:
        model.run_with_hooks(tokens, [("hook_embed", lambda a, hook: a * 2), (site, fail)])
    assert caught.value.__notes__ == [f"raised by a hook on '{site}'"]
    assert model.registry.hooks == {}
    assert torch.equal(model(tokens), plain)


@given(models(), token_batches(), st.data())
def test_changing_in_place_equals_returning_the_change(model, tokens, data):
    """Both ways of editing that notebooks use."""
    site = data.draw(st.sampled_from(model.hook_names))

    def in_place(activation, hook):
        activation[:, -1] = 0.5

    def returned(activation, hook):
        activation = activation.clone()
        activation[:, -1] = 0.5
        return activation

    with torch.no_grad():
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        edited = model.run_with_hooks(tokens, [(site, in_place)])
        assert torch.equal(edited, model.run_with_hooks(tokens, [(site, returned)]))
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), f"a hook on {site} wrote into {name}"


def test_hooks_run_in_the_order_of_attaching_and_nest():
    """The second sees what the first made; an inner `with` comes after an outer one and leaves it in place."""
    model, seen = random_model(SMALL), []

    def note(name):
        return lambda activation, hook: seen.append((name, hook.name, hook.layer()))

    site = "blocks.1.hook_resid_post"
    with model.hooks([(site, note("outer"))]):
        model.run_with_hooks(TOKENS, [(site, note("first")), (site, note("second"))])
        model(TOKENS)
        model.reset_hooks()
        model(TOKENS)

    assert [name for name, _, _ in seen] == ["outer", "first", "second", "outer"]
    assert {(site_name, layer) for _, site_name, layer in seen} == {(site, 1)}
    assert model.registry.hooks == {}


class Recorder:
    """Makes hooks whose signatures take `hook` in different ways; each appends what it was given."""

    def __init__(self) -> None:
        self.calls = []

    def second(self):
        return lambda activation, hook: self.calls.append((activation, hook))

    def third(self):
        def fn(activation, layer=None, hook=None):
            assert layer is None
            self.calls.append((activation, hook))

        return fn

    def partial(self):
        def fn(activation, layer, hook):
            assert layer == 3
            self.calls.append((activation, hook))

        return partial(fn, layer=3)

    def keyword_only(self):
        def fn(activation, *, hook):
            self.calls.append((activation, hook))

        return fn

    def keywords(self):
        return lambda activation, **given: self.calls.append(
            (activation, given.pop("hook"), *given)
        )

    def method(self):
        return self.__call__

    def callable_object(self):
        return self

    def __call__(self, activation, hook):
        self.calls.append((activation, hook))


@pytest.mark.parametrize("dir", ["fwd", "bwd"])
@pytest.mark.parametrize("shape", [name for name in vars(Recorder) if not name.startswith("_")])
def test_a_hook_gets_its_point_as_the_argument_named_hook(shape, dir):
    """Wherever its signature has that: alone at its site, then together with another."""
    model, recorder = random_model(SMALL), Recorder()
    fn = getattr(recorder, shape)()
    for _ in range(2):
        model.add_hook("unembed.hook_out", fn, dir=dir)
        logits = model(TOKENS)
        logits.sum().backward()

    expected = torch.ones_like(logits) if dir == "bwd" else logits
    for activation, point in recorder.calls:
        assert torch.equal(activation, expected)
        assert point is model.registry.point("unembed.hook_out")
    assert len(recorder.calls) == 1 + 2


@pytest.mark.parametrize("key", ["zero_attn_out_0", "double_resid_mid_1_last", "uniform_pattern_1"])
def test_edits_equal_the_reference(key):
    """Three edits of TransformerLens 3.9: a zeroed write, a doubled last position, a uniform pattern."""
    fixture, model = load_fixture(), fixture_model()

    def double_last(activation, hook):
        activation[:, -1] *= 2

    def uniform(activation, hook):
        allowed = (activation > 0).to(activation)
        return allowed / allowed.sum(-1, keepdim=True)

    edits = {
        "zero_attn_out_0": ("blocks.0.hook_attn_out", lambda a, hook: torch.zeros_like(a)),
        "double_resid_mid_1_last": ("blocks.1.hook_resid_mid", double_last),
        "uniform_pattern_1": ("blocks.1.attn.hook_pattern", uniform),
    }
    with torch.no_grad():
        logits = model.run_with_hooks(fixture["tokens"], [edits[key]])
    assert torch.allclose(logits, fixture[f"hooks/{key}_logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.hook_resid_mdi", "Did you mean 'blocks.1.hook_resid_mid'"),
        ("blocks.7.hook_resid_mid", "no hook site named 'blocks.7.hook_resid_mid'"),
        ("nonsense", "`model.hook_names` lists every site"),
    ],
)
def test_a_name_that_is_no_site_is_an_error(name, message):
    """With the nearest names; and nothing is attached, not even the hooks named rightly."""
    model = random_model(SMALL)

    with pytest.raises(KeyError, match=message):
        model.run_with_hooks(TOKENS, [("hook_embed", lambda a, hook: a), (name, lambda a, hook: a)])
    with pytest.raises(KeyError, match=message):
        model.run_with_cache(TOKENS, names_filter=[name])
    assert model.registry.hooks == {}


def test_a_predicate_that_holds_nowhere_is_an_error():
    """A silent nothing is the worst answer."""
    with pytest.raises(ValueError, match="holds for none of the model's hook sites"):
        random_model(SMALL).run_with_cache(TOKENS, names_filter=lambda name: name.endswith("resid"))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("replacement", "error", "message"),
    [
        (lambda a: a[:, :1], ValueError, r"returned \(1, 1, 8\).*activation there is \(1, 3, 8\)"),
        (lambda a: a.float(), ValueError, r"float32 on cpu.*float64 on cpu.*`.to\(activation\)`"),
        (lambda a: 0, TypeError, "returned int. Return a tensor to replace the activation"),
    ],
)
@pytest.mark.parametrize("others", [0, 1])
def test_a_replacement_of_another_kind_is_an_error(replacement, error, message, others):
    """TransformerLens would broadcast a wrong shape without a word."""
    site = "blocks.0.hook_resid_pre"
    hooks = [(site, lambda a, hook: None)] * others + [(site, lambda a, hook: replacement(a))]
    with pytest.raises(error, match=message) as caught:
        random_model(SMALL).run_with_hooks(TOKENS, hooks)
    assert caught.value.__notes__ == [f"raised by a hook on '{site}'"]


def test_short_names_are_those_of_transformer_lens():
    """And `resid_post0`, which its own parser does not read."""
    expected = {
        ("k6",): "blocks.6.attn.hook_k",
        ("pre5",): "blocks.5.mlp.hook_pre",
        ("scale4ln1",): "blocks.4.ln1.hook_scale",
        ("resid_post0",): "blocks.0.hook_resid_post",
        ("attn", 2): "blocks.2.attn.hook_pattern",
        ("attn_out", 2): "blocks.2.hook_attn_out",
        ("mlp_post", 2): "blocks.2.mlp.hook_post",
        ("post", 2, "mlp"): "blocks.2.mlp.hook_post",
        ("normalized", 2, "ln2"): "blocks.2.ln2.hook_normalized",
        ("scale",): "ln_final.hook_scale",
        ("embed",): "hook_embed",
        ("blocks.1.attn.hook_z",): "blocks.1.attn.hook_z",
    }

    assert {key: get_act_name(*key) for key in expected} == expected


def test_a_site_outside_the_blocks_has_no_layer():
    """`hook.layer()` is an error there, not a wrong number."""
    assert HookPoint("blocks.11.attn.hook_z").layer() == 11
    with pytest.raises(ValueError, match="'hook_embed' belongs to no block"):
        HookPoint("hook_embed").layer()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_hooks_attached_after_compiling_are_honoured():
    """Where module hooks would be ignored without a word."""
    model = random_model(SMALL)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(TOKENS)
    with model.hooks([("blocks.0.hook_attn_out", lambda a, hook: torch.zeros_like(a))]):
        hooked = compiled(TOKENS)
        assert torch.allclose(hooked, model(TOKENS), rtol=0, atol=1e-12)
    assert torch.allclose(plain, model(TOKENS), rtol=0, atol=1e-12)
    assert not torch.allclose(plain, hooked)


# --- Hooks that stay, and hooks on gradients ---


def test_a_hook_stays_until_its_handle_removes_it():
    """By `remove()` or by `with`; removing twice is nothing; it outlives other blocks and runs."""
    model, seen = random_model(SMALL), []
    site = "blocks.0.hook_attn_out"
    with model.hooks([("hook_embed", lambda a, hook: seen.append("embed"))]):
        handle = model.add_hook(site, lambda a, hook: seen.append("attn"))
    model(TOKENS)
    with model.add_hook([site], lambda a, hook: seen.append("first"), prepend=True):
        model.run_with_cache(TOKENS)
    handle.remove()
    handle.remove()
    model(TOKENS)

    assert seen == ["attn", "first", "attn"]
    assert model.registry.hooks == {}


def test_resetting_leaves_permanent_hooks_and_those_of_another_level_or_direction():
    """And what hooks noted in `hook.ctx` is forgotten with them, unless told not to."""
    model, seen = random_model(SMALL), []

    def note(name):
        def hook_fn(activation, hook):
            seen.append(name)
            hook.ctx[name] = hook.ctx.get(name, 0) + 1

        return hook_fn

    def names_left():
        seen.clear()
        model(TOKENS).sum().backward()
        return sorted(seen)

    model.add_hook("hook_embed", note("permanent"), is_permanent=True)
    model.add_hook("hook_embed", note("level 2"), level=2)
    model.add_hook("hook_embed", note("plain"))
    model.add_hook("hook_embed", note("gradient"), dir="bwd")
    assert names_left() == ["gradient", "level 2", "permanent", "plain"]
    model.reset_hooks(level=2, clear_contexts=False)
    assert names_left() == ["gradient", "permanent", "plain"]
    assert model.registry.point("hook_embed").ctx["plain"] == 2
    model.reset_hooks(direction="bwd")
    assert names_left() == ["permanent", "plain"]
    model.reset_hooks()
    assert model.registry.point("hook_embed").ctx == {}
    assert names_left() == ["permanent"]
    model.reset_hooks(including_permanent=True)
    assert names_left() == []


@given(models(), token_batches(), st.data())
def test_a_backward_hook_sees_the_gradient_of_all_that_the_activation_feeds(model, tokens, data):
    """At any site, in float64, against autograd; the hook changes nothing by looking."""
    site = data.draw(st.sampled_from(model.hook_names))
    logits, cache = model.run_with_cache(tokens, site, detach=False)
    (expected,) = torch.autograd.grad(logits.square().sum(), cache[site])
    grads = []
    with model.hooks(bwd_hooks=[(site, lambda grad, hook: grads.append((hook.name, grad)))]):
        again = model(tokens)
    again.square().sum().backward()  # a run's hooks last as long as the run, not longer

    ((name, grad),) = grads
    assert name == site
    assert torch.equal(again, logits)
    assert torch.allclose(grad, expected, rtol=1e-10, atol=1e-10)
    assert model.registry.hooks == {}
    model(tokens).sum().backward()
    assert len(grads) == 1


@given(models(), token_batches(), st.data())
def test_a_returned_gradient_takes_the_place_of_the_true_one(model, tokens, data):
    """Zeroing it at a site removes its path; hooks on one site go in order; both ends of a block differ."""
    layer = data.draw(st.integers(0, model.cfg.n_layers - 1))
    zero = [(f"blocks.{layer}.hook_mlp_out", lambda grad, hook: grad * 0)]
    mid, post = f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_resid_post"
    grads = {}

    def keep(grad, hook):
        grads[hook.name] = grad

    doubled = [(post, lambda grad, hook: grad * 2), (post, keep)]
    with model.hooks(bwd_hooks=[*zero, *doubled, (mid, keep)]):
        model(tokens).square().sum().backward()
    assert torch.allclose(grads[mid], grads[post], rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", range(len(random_model(SMALL).hook_names)))
def test_changing_a_gradient_in_place_equals_returning_the_change(number):
    """It changes the gradient of that site alone: autograd hands one tensor to both terms of a sum."""
    model = random_model(SMALL)
    site, after = model.hook_names[number], model.hook_names[number + 1 :]

    def gradients(fn):
        model.zero_grad()
        with model.hooks(bwd_hooks=[(site, fn)]):
            _, kept = model.run_with_cache(TOKENS, after, grad_of=lambda lg: lg.square().sum())
        of_weights = [p.grad for p in model.parameters() if p.grad is not None]
        return of_weights, [kept[f"{name}_grad"] for name in after]

    def spoil(gradient, hook):
        gradient.fill_(7)

    of_weights, above = gradients(spoil)
    returned, _ = gradients(lambda gradient, hook: torch.full_like(gradient, 7))
    _, plain = gradients(lambda gradient, hook: None)
    for changed, expected in zip([*of_weights, *above], [*returned, *plain], strict=True):
        assert torch.allclose(changed, expected, rtol=0, atol=1e-10), site


def test_frozen_models_and_streams_have_gradients_too():
    """No parameter needs one for a site to have one; under `no_grad` a backward hook is an error."""
    model, grads = random_model(SMALL).requires_grad_(False), {}
    resid = model(TOKENS, stop_at_layer=1)

    def keep(grad, hook):
        grads[hook.name] = grad

    sites = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    logits = model.run_with_hooks(resid, bwd_hooks=[(sites, keep)], start_at_layer=1)
    logits[0, -1, 7].backward()
    assert set(grads) == set(sites)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are switched off"):
        model.run_with_hooks(TOKENS, bwd_hooks=[(sites, keep)])
    with pytest.raises(ValueError, match="direction is 'forward', but must be 'fwd' or 'bwd'"):
        model.add_hook("hook_embed", keep, dir="forward")


def test_hooks_find_modules_that_were_put_in_later():
    """A block exchanged for another, and one exchanged while it is hooked: neither is hooked then, nor ever again."""
    model, seen = random_model(SMALL), []
    hooks = [("blocks.1.hook_mlp_out", lambda a, hook: seen.append(hook.name))]
    model.blocks[1] = copy.deepcopy(model.blocks[1])
    model.run_with_hooks(TOKENS, hooks)
    assert seen == ["blocks.1.hook_mlp_out"]
    assert len(model.run_with_cache(TOKENS)[1]) == len(model.hook_names) - SMALL.n_layers

    exchanged = model.blocks[1]
    with model.hooks(hooks):
        model.blocks[1] = copy.deepcopy(exchanged)
    model(TOKENS)
    assert not exchanged.is_hooked("hook_mlp_out")
    model.blocks[1] = exchanged
    model(TOKENS)
    assert len(seen) == 1
    assert model.registry.hooks == {}


def test_a_hook_keeps_notes_until_they_are_cleared():
    """In the dict that is there, or in one that it puts in its place."""
    model, seen = random_model(SMALL), []

    def note(activation, hook):
        seen.append(dict(hook.ctx))
        hook.ctx["runs"] = hook.ctx.get("runs", 0) + 1
        hook.ctx = {**hook.ctx, "site": hook.name}

    for _ in range(2):
        model.run_with_hooks(TOKENS, [("hook_embed", note)])
    model.registry.clear_contexts()
    model.run_with_hooks(TOKENS, [("hook_embed", note)])
    assert seen == [{}, {"runs": 1, "site": "hook_embed"}, {}]


def test_a_hook_may_attach_and_detach_others():
    """What it detaches is not called any more; what it attaches is called in every module that starts later."""
    model, seen = random_model(SMALL), []
    sites = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]
    handle = model.add_hook(sites[2], lambda a, hook: seen.append(hook.name))

    def attach_and_detach(activation, hook):
        handle.remove()
        model.add_hook(sites[:2], lambda a, hook: seen.append(hook.name))

    model.run_with_hooks(TOKENS, [("blocks.0.hook_resid_mid", attach_and_detach)])
    assert seen == sites[1:2]
    model(TOKENS)
    assert seen == [sites[1], *sites[:2]]


def test_a_module_without_taps_cannot_be_hooked():
    """Hooks would never be called. None is attached, and those that were there end with their block."""
    model = random_model(SMALL)
    with model.hooks([("post1", lambda a, hook: None)]):
        model.blocks[1].mlp = torch.nn.Identity()
    for site in ("post1", "scale1ln1"):
        with pytest.raises(KeyError, match="Make that a subclass of `othello_gpt.hooks.Tapped`"):
            model.run_with_cache(TOKENS, ["hook_embed", site])
        with pytest.raises(KeyError, match=f"'{get_act_name(site)}' cannot be hooked"):
            model.add_hook(["hook_embed", site], lambda a, hook: None)
        assert model.registry.hooks == {}
        model.blocks[1] = torch.nn.Identity()
