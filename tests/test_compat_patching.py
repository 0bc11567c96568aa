"""compat's patching helpers: equal to one hooked run a patch, and to TransformerLens, for any site and index."""

import sys
from types import SimpleNamespace

import pytest
import torch
from compat_models import hooked, reference, reference_hooked
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import models, random_model, token_batches
from test_model import relative_error

from othello_gpt import GPTConfig
from othello_gpt.compat import patching

SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=3, d_mlp=16)
SETTERS = {
    "layer_pos": (patching.layer_pos_patch_setter, ("layer", "pos")),
    "by_pos": (patching.layer_pos_head_vector_patch_setter, ("layer", "pos", "head")),
    "all_pos": (patching.layer_head_vector_patch_setter, ("layer", "head")),
    "pattern": (patching.layer_head_pattern_patch_setter, ("layer", "head_index")),
    "dest": (patching.layer_head_pos_pattern_patch_setter, ("layer", "head_index", "dest_pos")),
    "entry": (
        patching.layer_head_dest_src_pos_pattern_patch_setter,
        ("layer", "head_index", "dest_pos", "src_pos"),
    ),
}


def metric(logits: torch.Tensor) -> float:
    """Weighs every game, position and token, so that no change goes unseen."""
    weights = torch.arange(logits.numel()).sin().to(logits.dtype).view_as(logits)
    return (logits.log_softmax(-1) * weights).sum().item()


@st.composite
def pairs(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Games with a common beginning of any length, none to all."""
    clean = draw(token_batches(max_batch=2, max_pos=6))
    corrupted, first = clean.clone(), draw(st.integers(0, clean.shape[1]))
    corrupted[:, first:] = (corrupted[:, first:] * 7 + 3) % 61
    return clean, corrupted


@given(models(), pairs(), st.data())
def test_replaying_equals_the_plain_loop(model, pair, data):
    """At every site that is replayed, by every way of choosing a part, in float64 to 1e-10."""
    clean, corrupted = pair
    _, cache = model.run_with_cache(clean)
    site = data.draw(st.sampled_from(patching._FAST_SITES))
    ways = ["layer_pos"]
    if site in ("q", "k", "v", "z"):
        ways = ["layer_pos", "by_pos", "all_pos"]
    if site in ("pattern", "attn_scores"):
        ways = ["pattern", "dest", "entry"]
    setter, axes = SETTERS[data.draw(st.sampled_from(ways))]
    kept = {name: activation.clone() for name, activation in cache.items()}

    fast, loop = (
        patching.generic_activation_patch(
            model, corrupted, cache, metric, setter, site, axes, loop=loop
        )
        for loop in (False, True)
    )
    assert torch.allclose(fast, loop, rtol=0, atol=1e-10)
    assert all(torch.equal(cache[name], kept[name]) for name in cache)


@pytest.mark.parametrize(
    "name", ["attn_head_all_pos_every", "attn_head_by_pos_every", "block_every", "resid_mid"]
)
def test_helpers_equal_the_reference(name):
    """TransformerLens's helpers on two unrelated games; its metric was one logit of the last move."""
    run = reference("tlpatch/")
    model = reference_hooked()
    _, cache = model.run_with_cache(run["clean_tokens"])
    helper = getattr(patching, f"get_act_patch_{name}")

    effects = helper(model, run["corrupted_tokens"], cache, lambda logits: logits[0, -1, 24])
    assert relative_error(effects, run[name]) < 1e-4


def test_single_entries_of_patterns_equal_the_reference():
    """The first five moves of the same games."""
    run = {name: tokens[:, :5] for name, tokens in reference("tlpatch/").items() if "tok" in name}
    model = reference_hooked()
    _, cache = model.run_with_cache(run["clean_tokens"])

    effects = patching.get_act_patch_attn_head_pattern_dest_src_pos(
        model, run["corrupted_tokens"], cache, lambda logits: logits[0, -1, 24]
    )
    assert relative_error(effects, reference("tlpatch/")["pattern_dest_src"]) < 1e-4


def test_helpers_that_bundle_equal_those_that_they_bundle():
    """Axes in TransformerLens's order: part, layer, position, head; games without a batch axis too."""
    model = hooked(random_model(SMALL))
    clean, corrupted = torch.tensor([20, 19, 18, 10]), torch.tensor([20, 21, 10, 18])
    _, cache = model.run_with_cache(clean)
    run = (model, corrupted, cache, metric)
    every = patching.get_act_patch_attn_head_by_pos_every(*run)
    cfg = model.cfg

    assert every.shape == (5, cfg.n_layers, len(clean), cfg.n_heads)
    for part, site in enumerate(("out", "q", "k", "v", "pattern")):
        single = getattr(patching, f"get_act_patch_attn_head_{site}_by_pos")(*run)
        single = single.transpose(1, 2) if site == "pattern" else single
        assert torch.equal(every[part], single)
    every = patching.get_act_patch_attn_head_all_pos_every(*run)
    assert torch.equal(every[4], patching.get_act_patch_attn_head_pattern_all_pos(*run))
    every = patching.get_act_patch_block_every(*run)
    assert torch.equal(every[1], patching.get_act_patch_attn_out(*run))


def test_indices_may_be_given_in_any_order(monkeypatch):
    """A list or a data frame: results lie as the indices do, and come back with them on request."""
    frame = lambda rows, columns=None: SimpleNamespace(values=rows, columns=columns)  # noqa: E731
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=frame))
    model = hooked(random_model(SMALL))
    clean, corrupted = torch.tensor([[20, 19, 18]]), torch.tensor([[20, 21, 10]])
    _, cache = model.run_with_cache(clean)
    run = (model, corrupted, cache, metric, patching.layer_pos_patch_setter, "attn_out")
    table = patching.generic_activation_patch(*run, index_axis_names=("layer", "pos"))
    rows = [[1, 2], [0, 1], [1, 0], [0, 2]]

    expected = torch.stack([table[layer, pos] for layer, pos in rows])
    for given_rows in (rows, frame(rows)):
        found, kept = patching.generic_activation_patch(
            *run, index_df=given_rows, return_index_df=True
        )
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        assert [list(row) for row in kept.values] == rows


def test_hooks_of_the_model_and_other_sites_are_honoured():
    """Where the replay does not apply, the plain loop runs, and hooks that are there stay there."""
    model = hooked(random_model(SMALL))
    clean, corrupted = torch.tensor([[20, 19, 18]]), torch.tensor([[20, 21, 10]])
    _, cache = model.run_with_cache(clean)
    run = (model, corrupted, cache, metric)
    plain = patching.get_act_patch_attn_out(*run)
    handle = model.add_hook("blocks.1.hook_mlp_out", lambda activation, hook: activation * 0)
    without_mlp = patching.get_act_patch_attn_out(*run)
    assert torch.allclose(without_mlp, patching.get_act_patch_attn_out(*run, loop=True))
    assert not torch.allclose(without_mlp, plain)
    handle.remove()

    all_neurons = patching.generic_activation_patch(
        *run, patching.layer_pos_patch_setter, "post", ("layer", "pos")
    )
    assert torch.allclose(all_neurons, patching.get_act_patch_mlp_out(*run), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "either `index_axis_names` or `index_df`"),
        (dict(index_df=[[0, 1], [2, 1]]), r"index \(2, 1\) begins with layer 2.*0 to 1"),
        (dict(index_axis_names=("layer", "row")), "no axis 'row'. Axes are layer"),
        (dict(index_axis_names=("layer", "pos"), clean=[[20, 19]]), r"\(1, 2, 8\).*\(1, 3, 8\)"),
    ],
)
def test_what_cannot_be_patched_is_an_error(options, message):
    """No indices, an unknown axis, runs of different lengths (which TransformerLens would broadcast)."""
    model = hooked(random_model(SMALL))
    _, cache = model.run_with_cache(torch.tensor(options.pop("clean", [[20, 19, 18]])))
    setter = patching.layer_pos_patch_setter

    with pytest.raises(ValueError, match=message):
        patching.generic_activation_patch(
            model, torch.tensor([[20, 21, 10]]), cache, metric, setter, "resid_pre", **options
        )
