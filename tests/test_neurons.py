"""Neurons in the probe basis, rankings, and spans."""

import numpy as np
import pytest
import torch
from model_strategies import random_model
from safetensors.torch import save_file

from interp.neurons import (
    STATISTICS,
    NeuronTable,
    input_weights,
    kurtosis,
    logit_weights,
    neuron_table,
    output_weights,
    probe_basis,
    span_fraction,
    top_neurons,
)
from interp.positions import positions_of
from interp.probes import LinearProbe
from othello_gpt import ActivationCache, GPTConfig, board
from othello_gpt.games import games_to_tokens

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


def test_a_neuron_without_weights_reads_and_writes_nothing():
    """Zeros everywhere, not nan, and its neighbours are as before."""
    model, probe = random_model(SMALL), random_probe()
    squares = board.random_games(2, seed=8)
    with torch.no_grad():
        model.blocks[1].mlp.W_in[:, 3] = model.blocks[1].mlp.W_out[3] = 0
        _, cache = model.run_with_cache(games_to_tokens(squares))
    table = neuron_table(model, probe, cache, squares)
    spans = [values for name, values in table.statistics.items() if name.endswith("span")]

    for found in (table.reads, table.writes, table.logits, *spans):
        assert (found[1, 3] == 0).all()
        assert found[1, 4].any()
    assert (logit_weights(model, 1, 3, cosine=True) == 0).all()


def test_logit_weights_leave_the_padding_out_before_normalising():
    """Sixty values; the raw ones are what one unit adds, the final LayerNorm's weight included, its scale held."""
    model = random_model(SMALL)
    w_out, W_U = model.W_out[0, 5], model.ln_final.w[:, None] * model.W_U[:, 1:]

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
    for constant in (torch.ones(5, 1), torch.full((1000, 1), 0.1)):
        assert kurtosis(constant).isnan().all()


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
    with pytest.raises(ValueError, match="leaves 0 positions, but a spread needs two"):
        top_neurons(cache, 0, pos=slice(40, None))
    with pytest.raises(ValueError, match="must be 'std' or 'kurtosis'"):
        top_neurons(cache, 0, statistic="range")


@pytest.fixture(scope="module")
def small_table():
    """A random model's table, with all that it was made of."""
    model, probe = random_model(SMALL), random_probe()
    squares = board.random_games(12, seed=8)
    _, cache = model.run_with_cache(games_to_tokens(squares))
    return neuron_table(model, probe, cache, squares), model, probe, cache, squares


def test_the_table_holds_what_the_single_calls_give(small_table):
    """Cosines, logits, spans and kurtosis of drawn neurons, each from its own function."""
    table, model, probe, cache, squares = small_table
    positions = positions_of(squares)
    directions = probe.normalised()
    for layer, neuron in [(0, 3), (1, 15)]:
        for kind in (0, 1):
            reads = input_weights(model, layer, directions[kind])[neuron]
            assert torch.allclose(table.reads[layer, neuron, kind], reads)
            writes = output_weights(model, layer, directions[kind])[neuron]
            assert torch.allclose(table.writes[layer, neuron, kind], writes)
        assert torch.allclose(table.logits[layer, neuron], logit_weights(model, layer, neuron))
        post = cache["post", layer][positions.game, positions.ply][:, neuron]
        expected = {
            "std": post.std(),
            "kurtosis": kurtosis(post),
            "read_probe_span": span_fraction(model.W_in[layer, :, neuron], probe_basis(probe)),
            "write_probe_span_arena": span_fraction(
                model.W_out[layer, neuron], probe_basis(probe, "arena")
            ),
            "in_out_cosine": torch.cosine_similarity(
                model.W_in[layer, :, neuron], model.W_out[layer, neuron], dim=0
            ),
        }
        for name, value in expected.items():
            assert table.statistics[name][layer, neuron].item() == pytest.approx(value.item()), name
    assert table.baselines["probe_span"] == 124 / 160


def test_selectivity_is_the_best_correlation_with_a_square(small_table):
    """Against numpy's correlation, one condition at a time."""
    table, _, _, cache, squares = small_table
    positions = positions_of(squares)
    post = cache["post", 1][positions.game, positions.ply][:, 4].detach().numpy()
    conditions = [positions.classes[:, s] == state for s in range(64) for state in range(3)]
    conditions += [positions.played == s for s in range(64)]
    best = max(abs(np.corrcoef(post, c)[0, 1]) for c in conditions if 0 < c.sum() < len(c))

    assert table.statistics["selectivity"][1, 4].item() == pytest.approx(best, abs=1e-6)


def test_a_ranking_names_its_statistic_and_is_in_order(small_table):
    """Of all layers or of one; unknown statistics are refused with those that exist."""
    table = small_table[0]
    everywhere, inside = table.rank("std", k=32), table.rank("std", k=3, layer=1)

    assert everywhere.statistic == "std"
    assert list(everywhere.values) == sorted(everywhere.values, reverse=True)
    assert len(set(everywhere.neurons)) == 32
    assert all(
        table.statistics["std"][place].item() == value
        for place, value in zip(everywhere.neurons, everywhere.values, strict=True)
    )
    assert inside.neurons == tuple(place for place in everywhere.neurons if place[0] == 1)[:3]
    with pytest.raises(ValueError, match="no statistic 'size'; there are std, kurtosis"):
        table.rank("size")


def test_a_table_is_saved_and_loaded_as_one_file(small_table, tmp_path):
    """Every tensor and baseline returns; another file is refused."""
    table = small_table[0]
    table.save(tmp_path / "neurons.safetensors")
    returned = NeuronTable.load(tmp_path / "neurons.safetensors")

    assert [path.name for path in tmp_path.iterdir()] == ["neurons.safetensors"]
    for field in ("reads", "writes", "logits"):
        assert torch.equal(getattr(returned, field), getattr(table, field))
    assert list(returned.statistics) == list(STATISTICS)
    assert all(torch.equal(returned.statistics[n], table.statistics[n]) for n in STATISTICS)
    assert returned.baselines == table.baselines
    save_file({"W": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no table of neurons"):
        NeuronTable.load(tmp_path / "other.safetensors")
