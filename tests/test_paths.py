"""Path patching: equal to three hooked runs of each path, and direct effects that close."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_strategies import models, random_model
from test_patching import CLEAN, CORRUPTED, SMALL, last_log_prob, pairs, site_name

from interp.metrics import log_probability
from interp.paths import direct_effects, path_sweep

SENDERS = ("embed", "attn_out", "z", "mlp_out", "post")


@torch.no_grad()
def plain_path(model, clean, corrupted, metric, site, layer, part, receiver, scale=1.0):
    """One path by hooks: the sender's change of the stream, scaled, reaches one receiver, whose write goes on."""
    _, clean_cache = model.run_with_cache(clean)
    _, cache = model.run_with_cache(corrupted)
    name = site_name(site, layer)
    change = scale * (clean_cache[name] - cache[name])[0, -1][part]
    block = model.blocks[layer]
    if site == "z":
        change = change @ block.attn.W_O[part]
    if site == "post":
        change = change * block.mlp.W_out[part]

    def add_change(activation, hook):
        activation[0, -1] += change

    if receiver == "logits":
        last = f"resid_post{model.cfg.n_layers - 1}"
        return metric(model.run_with_hooks(corrupted, [(last, add_change)]))
    kind, at = receiver[:-1], int(receiver[-1])
    read = f"resid_pre{at}" if kind == "attn" else f"resid_mid{at}"
    written = f"{kind}_out{at}"
    kept = {}
    hooks = [(read, add_change), (written, lambda a, hook: kept.update(out=a[0, -1].clone()))]
    model.run_with_hooks(corrupted, hooks)

    def put(activation, hook):
        activation[0, -1] = kept["out"]

    return metric(model.run_with_hooks(corrupted, [(written, put)]))


def stands_below(site, layer, receiver, n_layers):
    """Whether the receiver reads what the sender wrote."""
    place = {"embed": 0, "attn_out": 2 * layer + 1, "z": 2 * layer + 1}.get(site, 2 * layer + 2)
    if receiver == "logits":
        return True
    reads = 2 * int(receiver[-1]) + (receiver[:-1] == "mlp")
    return place <= reads


@settings(max_examples=4)
@given(models(), pairs(max_pairs=2, max_pos=4), st.integers(1, 2**17))
def test_a_path_equals_its_hooked_runs(model, games, memory):
    """Every sender with every receiver above it, in float64 to 1e-10; nan for receivers below."""
    clean, corrupted = games
    metric = log_probability(torch.arange(len(clean)))
    paths = path_sweep(model, clean, corrupted, metric, SENDERS, memory)
    n_parts = {"z": model.cfg.n_heads, "post": min(model.cfg.d_mlp, 2)}
    for i, pair in enumerate(zip(clean, corrupted, strict=True)):
        for site in SENDERS:
            for layer in range(1 if site == "embed" else model.cfg.n_layers):
                for part in range(n_parts[site]) if site in n_parts else [slice(None)]:
                    for r, receiver in enumerate(paths.receivers):
                        found = paths.effects[site][i, r]
                        found = found if site == "embed" else found[layer]
                        found = found[part] if site in n_parts else found
                        if not stands_below(site, layer, receiver, model.cfg.n_layers):
                            assert found.isnan()
                            continue
                        expected = plain_path(
                            model, *pair, log_probability(i), site, layer, part, receiver
                        )
                        assert torch.allclose(found, expected, rtol=0, atol=1e-10)


def test_a_path_sweep_takes_any_metric():
    """One pair has no pair axis, and a metric of whole logits is called run by run."""
    model = random_model(SMALL)
    by_row = path_sweep(model, CLEAN, CORRUPTED, log_probability(7))
    one_by_one = path_sweep(model, CLEAN, CORRUPTED, last_log_prob)

    assert by_row.receivers == ("attn0", "mlp0", "attn1", "mlp1", "logits")
    assert by_row.effects["embed"].shape == (5,)
    assert by_row.effects["attn_out"].shape == (5, 2)
    for site, effects in by_row.effects.items():
        assert torch.allclose(effects, one_by_one.effects[site], atol=1e-10, equal_nan=True)


@given(models(), pairs(), st.data())
def test_direct_effects_add_up_to_the_change_of_the_stream(model, games, data):
    """Along any directions, after any layer; heads add up to attention, neurons to the MLP."""
    clean, corrupted = games
    directions = torch.randn(model.cfg.d_model, 2, 3, dtype=torch.float64)
    effects = direct_effects(model, clean, corrupted, directions, SENDERS, memory=2**16)
    layer = data.draw(st.integers(0, model.cfg.n_layers - 1))

    assert torch.allclose(effects["z"].sum(2), effects["attn_out"], rtol=0, atol=1e-10)
    assert torch.allclose(effects["post"].sum(2), effects["mlp_out"], rtol=0, atol=1e-10)
    upto = slice(0, layer + 1)
    written = effects["attn_out"][:, upto].sum(1) + effects["mlp_out"][:, upto].sum(1)
    for i, pair in enumerate(zip(clean, corrupted, strict=True)):
        streams = [model.run_with_cache(g)[1]["resid_post", layer][0, -1] for g in pair]
        change = torch.tensordot(streams[0] - streams[1], directions, 1)
        assert torch.allclose(effects["embed"][i] + written[i], change, rtol=0, atol=1e-10)


def test_the_stream_is_no_sender():
    """It writes nothing to itself."""
    with pytest.raises(ValueError, match="'resid_pre' is the stream itself"):
        path_sweep(random_model(SMALL), CLEAN, CORRUPTED, last_log_prob, ["resid_pre"])
