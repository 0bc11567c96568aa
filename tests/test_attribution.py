"""Attributions: sums that close, against the reference and on drawn models."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import models, token_batches
from reference_model import fixture_model, load_fixture

from interp.attribution import (
    LEVELS,
    accumulated_scores,
    contributions,
    direct_logit_attribution,
    earliest_right,
    frozen_logit_lens,
    head_contributions,
    logit_lens,
    neuron_contributions,
    split_contributions,
    stepwise_logit_attribution,
)
from interp.probes import LinearProbe
from othello_gpt.weights import fold_layer_norm


@given(models(), token_batches(), st.data())
def test_contributions_close(model, tokens, data):
    """Embeddings, positions, attention, MLPs and their biases add up to the score, in any direction."""
    layer = data.draw(st.integers(-model.cfg.n_layers, model.cfg.n_layers - 1))
    directions = torch.randn(model.cfg.d_model, 8, 8, dtype=torch.float64)
    logits, cache = model.run_with_cache(tokens)
    parts = contributions(cache, directions, layer)
    last = layer % model.cfg.n_layers

    assert parts.values.shape == (2 * last + 4, *tokens.shape, 8, 8)
    assert parts.labels[:4] == ("embed", "pos_embed", "attn0", "mlp0")
    assert parts.gap < 1e-11
    assert torch.equal(parts.total, accumulated_scores(cache, directions, layer)[-1])


@given(models(), token_batches())
def test_heads_and_the_bias_add_up_to_attention(model, tokens):
    """For one direction and for many."""
    _, cache = model.run_with_cache(tokens)
    for shape in ((), (3,), (8, 8)):
        directions = torch.randn(model.cfg.d_model, *shape, dtype=torch.float64)
        parts = head_contributions(model, cache, directions, model.cfg.n_layers - 1)
        assert parts.values.shape == (model.cfg.n_heads + 1, *tokens.shape, *shape)
        assert parts.gap < 1e-11


@given(models(), token_batches(), st.integers(0, 60), st.data())
def test_direct_logit_attributions_add_up_to_the_logit(model, tokens, token, data):
    """Folded or not: LayerNorm's weight is in the direction, its bias in the constant."""
    pos = data.draw(st.integers(-tokens.shape[1], tokens.shape[1] - 1))
    logits, cache = model.run_with_cache(tokens)
    parts = direct_logit_attribution(model, cache, token, pos)

    assert torch.allclose(parts.values.sum(0), logits[:, pos, token], rtol=0, atol=1e-10)
    assert parts.gap < 1e-10
    assert parts.labels[-1] == "bias"


@given(models(), token_batches(), st.data())
def test_every_split_closes_in_any_direction(model, tokens, data):
    """Heads, neurons and the biases of both; the coarser parts are sums of the finer ones."""
    layer = data.draw(st.integers(-model.cfg.n_layers, model.cfg.n_layers - 1))
    directions = torch.randn(model.cfg.d_model, 3, dtype=torch.float64)
    _, cache = model.run_with_cache(tokens)
    by_layer = contributions(cache, directions, layer)
    for level in LEVELS:
        parts = split_contributions(model, cache, directions, layer, level)
        assert parts.gap < 1e-10, level
        assert len(parts.labels) == len(set(parts.labels)) == len(parts.values)
        for label, whole in zip(by_layer.labels, by_layer.values, strict=True):
            mine = [i for i, name in enumerate(parts.labels) if name.split(".")[0] == label]
            assert torch.allclose(parts.values[mine].sum(0), whole, rtol=0, atol=1e-10), label
    assert neuron_contributions(model, cache, directions, layer).gap < 1e-10


@given(models(), token_batches(), st.sampled_from(LEVELS), st.data())
def test_both_attributions_of_logits_close_at_every_level(model, tokens, level, data):
    """LayerNorm frozen or recomputed, one token or many; the two differ, but not in their sum."""
    pos = data.draw(st.integers(-tokens.shape[1], tokens.shape[1] - 1))
    logits, cache = model.run_with_cache(tokens)
    for token in (7, torch.arange(61)):
        for attribution in (direct_logit_attribution, stepwise_logit_attribution):
            parts = attribution(model, cache, token, pos, level)
            assert torch.allclose(parts.values.sum(0), logits[:, pos][:, token], atol=1e-10, rtol=0)
            assert parts.gap < 1e-10
            assert parts.labels[-1] == "bias"


@given(models(), token_batches())
def test_both_lenses_end_in_the_logits_and_add_up_the_attributions(model, tokens):
    """Entry by entry: the frozen lens sums the frozen attribution, the other the stepwise one."""
    logits, cache = model.run_with_cache(tokens)
    for lens, attribution in (
        (frozen_logit_lens, direct_logit_attribution),
        (logit_lens, stepwise_logit_attribution),
    ):
        seen = lens(model, cache)
        parts = attribution(model, cache, torch.arange(61), pos=0).values
        summed = parts[-1] + parts[:-1].cumsum(0)[1::2]  # embeddings, then after every MLP
        assert torch.allclose(seen[-1], logits, rtol=0, atol=1e-10)
        assert torch.allclose(seen[:, :, 0], summed, rtol=0, atol=1e-10)


def test_an_unknown_level_is_an_error():
    """With the levels that there are."""
    model = fixture_model()
    _, cache = model.run_with_cache(torch.tensor([[20, 19]]))
    with pytest.raises(ValueError, match="`level` is 'expert', but must be one of layer, head"):
        split_contributions(model, cache, torch.ones(model.cfg.d_model), level="expert")


@given(models(), token_batches(), st.integers(0, 2**16))
def test_the_earliest_layer_is_the_first_probe_that_is_right(model, tokens, seed):
    """Square by square; `n_layers` where no probe is, and -1 reads the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    _, cache = model.run_with_cache(tokens)
    classes = torch.randint(3, (*tokens.shape, 8, 8), generator=generator)
    probes = [
        LinearProbe(
            torch.randn(model.cfg.d_model, 8, 8, 3, generator=generator, dtype=torch.float64),
            torch.zeros(8, 8, 3, dtype=torch.float64),
            layer,
        )
        for layer in range(-1, model.cfg.n_layers)
    ]
    found = earliest_right(probes[::-1], cache, classes)
    streams = [cache["resid_pre", 0]]
    streams += [cache["resid_post", layer] for layer in range(model.cfg.n_layers)]
    right = torch.stack(
        [p.logits(s).argmax(-1) == classes for p, s in zip(probes, streams, strict=True)]
    )
    for layer in range(-1, model.cfg.n_layers + 1):
        at = found == layer
        assert not right[: layer + 1, at].any()
        assert layer == model.cfg.n_layers or right[layer + 1, at].all()


def test_attributions_equal_the_reference():
    """The exact attribution of the unfolded model, and TransformerLens's own on the folded one."""
    fixture = load_fixture()
    folded = fixture_model()
    folded.load_state_dict(fold_layer_norm(folded.state_dict()))
    for model, key in ((fixture_model(), "exact"), (folded, "folded")):
        with torch.no_grad():
            _, cache = model.run_with_cache(fixture["tokens"])
            for game, token in enumerate(fixture["dla/tokens"].tolist()):
                parts = direct_logit_attribution(model, cache, token).values[:-1, game]
                expected = fixture[f"dla/logit_attrs_{key}"][:, game]
                assert (parts - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-6, key


def test_a_layer_that_is_not_there_is_an_error():
    """It would wrap round to another in silence; the last may be counted from the end, and is labelled in full."""
    model = fixture_model()
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
    n, eye = model.cfg.n_layers, torch.eye(model.cfg.d_model, dtype=model.dtype)
    for split in (
        lambda: contributions(cache, eye, n),
        lambda: accumulated_scores(cache, eye, -n - 1),
        lambda: head_contributions(model, cache, eye, n),
    ):
        with pytest.raises(ValueError, match=f"but the model has layers 0 to {n - 1}"):
            split()
    assert head_contributions(model, cache, eye, -1).labels[0] == f"attn{n - 1}.head0"
