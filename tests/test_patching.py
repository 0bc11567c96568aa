"""The sweep: equal to the plain loop of hooked runs, to the reference, and clear about what it cannot do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import models, random_model, token_batches
from reference_model import fixture_model, load_fixture

from interp.patching import SITES, patch_sweep, patching_metric
from othello_gpt import GPTConfig, OthelloGPT, get_act_name
from othello_gpt.games import example_pair, games_to_tokens
from othello_gpt.vocab import square_to_token

SMALL = GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=4, d_mlp=16)
CLEAN, CORRUPTED = torch.tensor([[20, 19, 18]]), torch.tensor([[20, 19, 21]])


def last_log_prob(logits):
    return logits[0, -1].log_softmax(-1)[7]


@torch.no_grad()
def plain_loop(model, clean, corrupted, metric, sites):
    """One hooked forward pass a patch: the oracle."""
    _, cache = model.run_with_cache(clean)

    def effect(site, layer, part):
        def patch(activation, hook):
            activation[0, -1][part] = cache[hook.name][0, -1][part]

        return metric(model.run_with_hooks(corrupted, [(get_act_name(site, layer), patch)]))

    parts = {"z": range(model.cfg.n_heads), "post": range(model.cfg.d_mlp)}
    return {
        site: torch.stack(
            [
                torch.stack([effect(site, layer, part) for part in parts[site]])
                if site in parts
                else effect(site, layer, slice(None))
                for layer in range(model.cfg.n_layers)
            ]
        )
        for site in sites
    }


@given(models(), token_batches(max_batch=1), st.integers(0, 60))
def test_a_sweep_equals_the_plain_loop(model, tokens, last):
    """At every site, head by head and neuron by neuron, in float64 to 1e-10; one-move games too."""
    other = tokens.clone()
    other[0, -1] = last
    swept = patch_sweep(model, tokens, other, last_log_prob, SITES)
    looped = plain_loop(model, tokens, other, last_log_prob, SITES)

    assert list(swept) == list(SITES)
    for site in SITES:
        assert swept[site].shape == looped[site].shape
        assert torch.allclose(swept[site], looped[site], rtol=0, atol=1e-10), site


@given(models(), token_batches(max_batch=1))
def test_a_run_patched_with_itself_is_itself(model, tokens):
    """Every patch, and patching the whole stream gives the clean run."""
    plain = last_log_prob(model(tokens)).detach()
    swept = patch_sweep(model, tokens, tokens, last_log_prob, SITES)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 61

    for effects in swept.values():
        assert torch.allclose(effects, plain.expand_as(effects), rtol=0, atol=1e-10)
    whole = patch_sweep(model, tokens, other, last_log_prob, ["resid_post"])["resid_post"]
    assert torch.allclose(whole, plain.expand_as(whole), rtol=0, atol=1e-10)


def test_a_sweep_of_the_packaged_model_equals_the_plain_loop():
    """The 21 moves of the example; float32 to 1e-5, float64 to 1e-10."""
    pair = example_pair()
    clean, corrupted = (games_to_tokens(game[None]) for game in pair[:2])
    sites = ("attn_out", "mlp_out", "resid_pre", "z")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = OthelloGPT.from_pretrained(dtype=dtype)
        with torch.no_grad():
            metric = patching_metric(model(clean), model(corrupted), square_to_token(pair.answer))
        swept = patch_sweep(model, clean, corrupted, metric, sites)
        looped = plain_loop(model, clean, corrupted, metric, sites)
        for site in sites:
            assert (swept[site] - looped[site]).abs().max() < tolerance, (site, dtype)


def test_patches_equal_the_reference():
    """attn_out and mlp_out, all heads and all neurons of TransformerLens 3.9; measured 4e-7."""
    fixture, model = load_fixture(), fixture_model()
    answer = int(fixture["patch/answer"])
    metric = patching_metric(
        fixture["patch/clean_logits"], fixture["patch/corrupted_logits"], answer
    )
    swept = patch_sweep(
        model, fixture["patch/clean_tokens"], fixture["patch/corrupted_tokens"], metric, SITES
    )
    neurons = swept["post"][tuple(fixture["patch/neurons_index"].T)]

    components = torch.stack([swept["attn_out"], swept["mlp_out"]])
    assert (components - fixture["patch/metric"]).abs().max() < 1e-5
    assert (swept["z"] - fixture["patch/heads_metric"]).abs().max() < 1e-5
    assert (neurons - fixture["patch/neurons_metric"]).abs().max() < 1e-5


def test_the_metric_is_one_for_clean_zero_for_corrupted_and_linear_in_log_probabilities():
    """The closed form at the mean of both log-probabilities holds: 1/2 - ln(BC) / (clean - corrupted)."""
    clean, corrupted = torch.randn(2, 1, 5, 61, dtype=torch.float64)
    metric = patching_metric(clean, corrupted, 7)
    p, q = (logits[0, -1].log_softmax(-1) for logits in (clean, corrupted))
    bhattacharyya = ((p + q) / 2).exp().sum()
    mean = (clean.log_softmax(-1) + corrupted.log_softmax(-1)) / 2

    assert torch.allclose(metric(clean), torch.tensor(1.0).double())
    assert torch.allclose(metric(corrupted), torch.tensor(0.0).double())
    assert torch.allclose(metric(mean), 0.5 - bhattacharyya.log() / (p[7] - q[7]))
    with pytest.raises(ValueError, match="token 7 has log-probability .* in both runs"):
        patching_metric(clean, clean, 7)


@pytest.mark.parametrize(
    ("clean", "corrupted", "sites", "message"),
    [
        (CLEAN, CORRUPTED, ["attn"], "cannot patch 'attn'. Sites are resid_pre, attn_out"),
        (
            CLEAN,
            torch.tensor([[20, 21, 18]]),
            SITES,
            "already differ at pos 1, before their last move",
        ),
        (CLEAN, CORRUPTED[:, :2], SITES, r"`clean` has shape \(1, 3\) and `corrupted` \(1, 2\)"),
        (CLEAN.repeat(2, 1), CORRUPTED.repeat(2, 1), SITES, "takes one pair of games"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_swept_is_an_error(clean, corrupted, sites, message):
    """Unknown sites, games that differ earlier, other shapes."""
    with pytest.raises(ValueError, match=message):
        patch_sweep(random_model(SMALL), clean, corrupted, last_log_prob, sites)


def test_a_hooked_model_is_refused():
    """Its hooks would not fire in the replayed position, and nobody would know."""
    model = random_model(SMALL)
    with (
        model.hooks([("hook_embed", lambda activation, hook: activation * 2)]),
        pytest.raises(ValueError, match="they would not fire in a sweep"),
    ):
        patch_sweep(model, CLEAN, CORRUPTED, last_log_prob)
