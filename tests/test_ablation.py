"""Ablation: equal to a plain loop of hooked runs, whatever the replacement."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_strategies import models
from test_patching import pairs, site_name

from interp.ablation import ablation_sweep, last_values, mean_values, resampled_values
from interp.metrics import log_probability
from interp.patching import SITES, patch_sweep


@torch.no_grad()
def plain_loop(model, game, site, values, i):
    """One hooked run for each layer and part, of the game number `i`."""
    n_parts = {"z": model.cfg.n_heads, "post": model.cfg.d_mlp}.get(site)
    effects = []
    for layer in range(1 if site == "embed" else model.cfg.n_layers):
        for part in [slice(None)] if n_parts is None else range(n_parts):

            def ablate(activation, hook, part=part):
                value = values.get(hook.name, torch.zeros(1)).expand_as(activation[0, -1])
                activation[0, -1][part] = value[part].to(activation)

            logits = model.run_with_hooks(game, [(site_name(site, layer), ablate)])
            effects.append(log_probability(i)(logits))
    return torch.stack(effects)


@settings(max_examples=12)
@given(models(), pairs(), st.sampled_from(["zero", "mean", "resampled"]), st.integers(1, 2**17))
def test_an_ablation_equals_the_plain_loop(model, games, kind, memory):
    """Zero, mean over other games and activations of another game; different lengths, any memory."""
    others, runs = games
    sites = [site for site in SITES if site != "result"]
    stored = last_values(model, others, sites)
    resampled = resampled_values(stored, len(runs), seed=3)
    values = {"zero": None, "mean": mean_values(stored), "resampled": resampled}[kind]
    metric = log_probability(torch.arange(len(runs)))
    swept = ablation_sweep(model, runs, metric, sites, values, memory=memory)
    for i, run in enumerate(runs):
        own = {} if values is None else values
        own = {n: v[i] for n, v in own.items()} if kind == "resampled" else own
        for site in sites:
            looped = plain_loop(model, run, site, own, i)
            assert torch.allclose(swept[site][i].flatten(), looped, rtol=0, atol=1e-10), site


@settings(max_examples=10)
@given(models(), pairs(max_pairs=2))
def test_replacing_by_the_clean_run_is_patching(model, games):
    """Both sweeps are the same rows; and a game replaced by itself is itself."""
    clean, corrupted = games
    values, metric = last_values(model, clean, SITES), log_probability(5)
    swept = ablation_sweep(model, corrupted, metric, SITES, values)
    for site, effects in patch_sweep(model, clean, corrupted, metric, SITES).items():
        assert torch.allclose(swept[site], effects, rtol=0, atol=1e-10), site
    for site, effects in ablation_sweep(model, clean, metric, SITES, values).items():
        for game, of_game in zip(clean, effects, strict=True):
            plain = metric(model(game)).expand_as(of_game)
            assert torch.allclose(of_game, plain, rtol=0, atol=1e-10), site


def test_resampled_values_are_one_game_for_all_sites():
    """So that the replacement is something that the model once did."""
    values = {"a": torch.arange(7.0), "b": torch.arange(7.0) * 10}
    drawn = resampled_values(values, 20, seed=1)

    assert torch.equal(drawn["b"], drawn["a"] * 10)
    assert len(set(drawn["a"].tolist())) > 3


def test_no_game_is_resampled_by_itself():
    """Every other one is drawn about equally often."""
    values = {"a": torch.arange(5.0)}
    drawn = torch.stack([resampled_values(values, 5, seed)["a"] for seed in range(300)])

    for game, of_game in enumerate(drawn.T):
        counts = of_game.long().bincount(minlength=5)
        assert counts[game] == 0
        assert (counts > 45).sum() == 4
