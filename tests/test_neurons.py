"""Neurons in the probe basis, rankings, and spans."""

import pytest
import torch
from model_strategies import random_model

from interp.neurons import (
    input_weights,
    kurtosis,
    logit_weights,
    output_weights,
    probe_basis,
    span_fraction,
    top_neurons,
)
from interp.probes import LinearProbe
from othello_gpt import ActivationCache, GPTConfig

SMALL = GPTConfig(n_layers=2, d_model=160, n_heads=2, d_head=4, d_mlp=16)


def random_probe(d_model: int = 160) -> LinearProbe:
    W = torch.randn(d_model, 8, 8, 3, dtype=torch.float64)
    return LinearProbe(W, torch.zeros(8, 8, 3, dtype=torch.float64), layer=0)


def test_neuron_weights_are_cosines_with_unit_directions():
    """And a neuron that reads a direction exactly scores 1 there."""
    model = random_model(SMALL)
    directions = torch.nn.functional.normalize(torch.randn(160, 5, dtype=torch.float64), dim=0)
    with torch.no_grad():
        model.blocks[1].mlp.W_in[:, 3] = 7 * directions[:, 2]
        model.blocks[1].mlp.W_out[4] = -2 * directions[:, 1]
    reads, writes = (f(model, 1, directions) for f in (input_weights, output_weights))

    assert reads.shape == writes.shape == (16, 5)
    assert reads[3, 2].item() == pytest.approx(1)
    assert writes[4, 1].item() == pytest.approx(-1)
    expected = torch.cosine_similarity(model.W_in[1].T[:, :, None], directions[None], dim=1)
    assert torch.allclose(reads, expected)


def test_logit_weights_leave_the_padding_out_before_normalising():
    """Sixty values; the raw ones are what one unit of activation adds to the logits."""
    model = random_model(SMALL)
    w_out, W_U = model.W_out[0, 5], model.W_U[:, 1:]

    assert torch.allclose(logit_weights(model, 0, 5), w_out @ W_U)
    cosines = torch.cosine_similarity(w_out[:, None], W_U, dim=0)
    assert torch.allclose(logit_weights(model, 0, 5, cosine=True), cosines)


def test_a_vector_of_the_span_lies_in_it_whole():
    """1 inside, 0 across, the share of the dimensions on average for random vectors."""
    probe = random_probe()
    basis = probe_basis(probe)
    inside = (probe.mine[:, 2, 2] + 3 * probe.blank[:, 0, 0])[:, None]
    across = torch.linalg.qr(torch.cat([basis, torch.randn(160, 1).double()], 1)).Q[:, -1:]
    many = torch.randn(160, 4000, dtype=torch.float64)

    assert basis.shape == (160, 124)
    assert span_fraction(inside, basis).item() == pytest.approx(1)
    assert span_fraction(across, basis).item() == pytest.approx(0, abs=1e-12)
    assert span_fraction(many, basis).mean().item() == pytest.approx(124 / 160, abs=0.01)


def test_the_exercise_s_basis_keeps_a_centre_direction():
    """Both have 124 dimensions, but dropping four singular vectors is not dropping the four columns."""
    probe = random_probe()
    W = probe.W.clone()
    W[:, [3, 3, 4, 4], [3, 4, 3, 4], 0] *= 0.01
    arena = probe_basis(LinearProbe(W, probe.b, 0), "arena")

    assert arena.shape == (160, 124)
    with pytest.raises(ValueError, match="must be 'columns' or 'arena'"):
        probe_basis(probe, "other")


def test_kurtosis_has_its_closed_form():
    """Unbiased deviation, biased fourth moment: ((n-1)/n)**2 times the plain value, minus 3."""
    values = torch.randn(400, 3, dtype=torch.float64) ** 3
    centred = values - values.mean(0)
    plain = centred.pow(4).mean(0) / centred.pow(2).mean(0) ** 2

    assert torch.allclose(kurtosis(values), plain * (399 / 400) ** 2 - 3)
    assert torch.allclose(kurtosis(values, fisher=False), kurtosis(values) + 3)
    assert kurtosis(torch.ones(5, 1)).isnan().all()


def test_top_neurons_vary_most_and_dead_ones_come_last():
    """By spread and by tails, with the ends of the games left out."""
    post = torch.randn(20, 30, 6, dtype=torch.float64) * torch.tensor([1.0, 5, 2, 0, 3, 4]).double()
    post[:, :3, 0] = 1e6  # left out
    post[3, 10, 2] = 100.0
    cache = ActivationCache({"blocks.0.mlp.hook_post": post}, n_layers=1)

    assert top_neurons(cache, 0, k=6).tolist()[-1] == 3
    assert top_neurons(cache, 0, k=2).tolist() == [1, 5] or 2 in top_neurons(cache, 0, k=2)
    by_tails = top_neurons(cache, 0, k=6, statistic="kurtosis").tolist()
    assert by_tails[0] == 2
    assert by_tails[-1] == 3
    assert top_neurons(cache, 0, k=1, pos=slice(None)).tolist() == [0]
    with pytest.raises(ValueError, match="must be 'std' or 'kurtosis'"):
        top_neurons(cache, 0, statistic="range")
