"""Attributions: sums that close, against the reference and on drawn models."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import models, token_batches
from reference_model import fixture_model, load_fixture

from interp.attribution import (
    accumulated_scores,
    contributions,
    direct_logit_attribution,
    head_contributions,
)
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
