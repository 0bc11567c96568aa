"""Attribution patching: the exact sweep to first order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_strategies import models, random_model
from test_patching import CLEAN, CORRUPTED, SMALL, last_log_prob, pairs
from test_paths import SENDERS, plain_path

from interp.gradients import attribution_paths, attribution_sweep
from interp.metrics import log_probability
from interp.patching import SITES, onto, patch_sweep


@settings(max_examples=10)
@given(models(), pairs(), st.integers(1, 2**17))
def test_an_estimate_is_the_derivative_of_the_exact_patch(model, games, memory):
    """A patch inside a thousandth of the change moves the metric by a thousandth of the estimate."""
    clean, corrupted = games
    metric = log_probability(torch.arange(len(clean)))
    eye = torch.eye(model.cfg.d_model, dtype=torch.float64)
    estimated = attribution_sweep(model, clean, corrupted, metric, SITES, memory=memory)
    small = 1e-4
    forth = patch_sweep(model, clean, corrupted, metric, SITES, within=small * eye)
    back = patch_sweep(model, clean, corrupted, metric, SITES, within=-small * eye)
    for i, game in enumerate(corrupted):
        plain = log_probability(i)(model(game)).detach()
        for site in SITES:
            slope = (forth[site][i] - back[site][i]) / (2 * small)
            error = (estimated[site][i] - plain - slope).abs()
            assert (error < 1e-4 * (1 + slope.abs())).all(), site


@settings(max_examples=10)
@given(models(), pairs(max_pairs=2))
def test_estimates_within_subspaces_add_up(model, games):
    """A span and its complement together are the whole estimate, for it is linear in the change."""
    clean, corrupted = games
    metric, d_model = log_probability(3), model.cfg.d_model
    inside = onto(torch.randn(d_model, 2, dtype=torch.float64))
    eye = torch.eye(d_model, dtype=torch.float64)
    within = torch.stack([inside, eye - inside])
    parts = attribution_sweep(model, clean, corrupted, metric, SITES, within)
    whole = attribution_sweep(model, clean, corrupted, metric, SITES)
    for i, game in enumerate(corrupted):
        plain = metric(model(game)).detach()
        for site in SITES:
            total = (parts[site][i] - plain).sum(-1)
            assert torch.allclose(total, whole[site][i] - plain, rtol=0, atol=1e-9), site


@settings(max_examples=10)
@given(models(), pairs(max_pairs=2), st.integers(1, 2**17))
def test_estimated_paths_add_up_to_the_estimated_patch(model, games, memory):
    """Whatever reads a sender's change reads it from the stream."""
    clean, corrupted = games
    metric = log_probability(torch.arange(len(clean)))
    paths = attribution_paths(model, clean, corrupted, metric, SENDERS, memory=memory)
    whole = attribution_sweep(model, clean, corrupted, metric, SENDERS)
    for i, game in enumerate(corrupted):
        plain = log_probability(i)(model(game)).detach()
        for site in SENDERS:
            total = (paths.effects[site][i] - plain).nansum(0)
            assert torch.allclose(total, whole[site][i] - plain, rtol=0, atol=1e-9), site


@settings(max_examples=4)
@given(models(), pairs(max_pairs=1, max_pos=4), st.data())
def test_an_estimated_path_is_the_derivative_of_the_path(model, games, data):
    """A thousandth of the sender's change, read by the receiver, moves the metric by a thousandth of the estimate."""
    (clean,), (corrupted,) = games
    metric, small = log_probability(3), 1e-4
    paths = attribution_paths(model, clean[None], corrupted[None], metric, SENDERS)
    plain = metric(model(corrupted)).detach()
    for site in SENDERS:
        known = paths.effects[site].isfinite().nonzero().tolist()
        receiver, *where = data.draw(st.sampled_from(known), label=site)
        layer, *part = where or [0]
        name = paths.receivers[receiver]
        forth, back = (
            plain_path(
                model, clean, corrupted, metric, site, layer, part[0] if part else ..., name, scale
            )
            for scale in (small, -small)
        )
        slope = (forth - back) / (2 * small)
        estimate = paths.effects[site][(receiver, *where)] - plain
        assert (estimate - slope).abs() < 1e-4 * (1 + slope.abs()), (site, name)


@pytest.mark.usefixtures("unchecked")
def test_an_estimate_keeps_no_graph_and_wants_a_metric_of_the_last_position():
    """Results that held on to the run would fill the memory pair by pair."""
    model = random_model(SMALL)
    estimates = attribution_sweep(model, CLEAN, CORRUPTED, log_probability(7), SITES)
    assert not any(effects.requires_grad for effects in estimates.values())
    with pytest.raises(ValueError, match="must be an `interp.metrics.LastMetric`"):
        attribution_sweep(model, CLEAN, CORRUPTED, last_log_prob)
