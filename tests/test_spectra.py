"""Spectra and maximal positions, against plain counting over all positions at once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from model_strategies import random_model

from interp.positions import EMPTY, positions_of, stream_neurons
from interp.spectra import spectrum, spectrum_of, top_positions
from othello_gpt import GPTConfig, board

MODEL = random_model(GPTConfig(n_layers=2, d_model=8, n_heads=2, d_head=4, d_mlp=5))
_float16 = st.floats(-100, 100, width=16)


@st.composite
def labelled(draw):
    n = draw(st.integers(2, 40))
    values = draw(hnp.arrays(np.float16, n, elements=_float16)).astype(np.float64)
    return values, draw(hnp.arrays(bool, n))


@given(labelled(), _float16)
def test_figures_are_those_of_counting_by_hand(sample, threshold):
    """AUROC over all pairs; precision, recall, F1 and information from the two-by-two table."""
    values, truth = sample
    found = spectrum_of(values, truth)
    above = values > threshold
    hit, alarms, misses = ((truth & above).sum(), (~truth & above).sum(), (truth & ~above).sum())
    difference = values[truth][:, None] - values[~truth]
    entropy = -sum(
        p * np.log(p / (np.mean(truth == t) * np.mean(above == a)))
        for t in (False, True)
        for a in (False, True)
        if (p := np.mean((truth == t) & (above == a))) > 0
    )

    if difference.size:
        wins = np.mean((difference > 0) + (difference == 0) / 2)
        assert found.auroc == pytest.approx(wins)
    if hit + alarms:
        assert found.precision(threshold) == pytest.approx(hit / (hit + alarms))
    if truth.any():
        assert found.recall(threshold) == pytest.approx(hit / (hit + misses))
        assert found.f1(threshold) == pytest.approx(2 * hit / (2 * hit + alarms + misses))
    assert found.mutual_information(threshold) == pytest.approx(-entropy, abs=1e-12)


@given(labelled())
def test_a_picture_s_percents_are_a_histogram_of_each_class(sample):
    """As numpy counts the activations themselves; a class that is empty has none."""
    values, truth = sample
    edges = np.linspace(-101, 101, 8)
    found = spectrum_of(values, truth).percent(edges)

    for row, flag in zip(found, (False, True), strict=True):
        chosen = values[truth == flag]
        expected = 100 * np.histogram(chosen, edges)[0] / max(len(chosen), 1)
        assert row == pytest.approx(expected)


@given(labelled(), labelled())
def test_spectra_of_parts_merge_into_that_of_the_whole(one, other):
    """So streaming is exact, and its size does not grow."""
    merged = spectrum_of(*one).merged(spectrum_of(*other))
    whole = spectrum_of(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))

    assert np.array_equal(merged.counts, whole.counts)


def test_a_spectrum_streams_over_the_positions_where_somebody_moves():
    """The same as one pass over everything; every position is counted once."""
    squares = board.random_games(9, seed=2)
    streamed = spectrum(MODEL, squares, 1, 3, lambda at: at.classes[:, 2] == EMPTY, batch_size=4)
    positions, post = next(stream_neurons(MODEL, squares, [1], batch_size=9))
    whole = spectrum_of(post[0, :, 3].numpy(), positions.classes[:, 2] == EMPTY)

    assert np.array_equal(streamed.counts, whole.counts)
    assert streamed.counts.sum() == len(positions_of(squares).ply)


def test_maximal_positions_are_the_highest_of_all():
    """Across batches, with game and ply at which each value is found."""
    squares = board.random_games(11, seed=5)
    found = top_positions(MODEL, squares, layer=1, k=6, batch_size=3)
    positions, post = next(stream_neurons(MODEL, squares, [1], batch_size=11))

    assert torch.allclose(found.activation, post[0].T.topk(6).values, atol=1e-12)
    for neuron in range(5):
        for game, ply, value in zip(*(field[neuron] for field in found), strict=True):
            row = (positions.game == int(game)) & (positions.ply == int(ply))
            assert post[0, row, neuron].item() == pytest.approx(value.item(), abs=1e-12)
    with pytest.raises(ValueError, match="give at least one"):
        top_positions(MODEL, squares[:0], layer=1)
