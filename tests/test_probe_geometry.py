"""Angles between directions, and shares in a span beside those of random vectors."""

import pytest
import torch

from interp.probe_geometry import cosines, shared_span, square_cosines


def test_cosines_of_two_probes_hold_those_of_each_square():
    """On the diagonal of the block that pairs them; each direction agrees with itself."""
    a, b = torch.randn(2, 20, 8, 8, dtype=torch.double)
    both = cosines(a, b)

    assert both.shape == (128, 128)
    assert torch.allclose(both.diagonal(), torch.ones(128).double())
    assert torch.allclose(both[:64, 64:].diagonal(), square_cosines(a, b).flatten())
    assert torch.allclose(square_cosines(a, -3 * a), -torch.ones(8, 8).double())
    a[:, 3, 3] = 0
    assert (cosines(a)[27] == 0).all()
    assert square_cosines(a, a)[3, 3] == 0


def test_a_span_holds_its_own_vectors_whole_and_random_ones_by_its_dimension():
    """Share 1 for combinations of the basis; for random vectors the dimension over d_model."""
    basis = torch.linalg.qr(torch.randn(40, 10, dtype=torch.double)).Q
    share, random = shared_span(basis @ torch.randn(10, 6, dtype=torch.double), basis)

    assert abs(share.item() - 1) < 1e-12
    assert random.low < 10 / 40 < random.high
    assert abs(random.value.item() - 10 / 40) < 0.02
    assert random.high < share
    with pytest.raises(ValueError, match="not orthonormal.* Give `torch.linalg.qr"):
        shared_span(basis, 2 * basis)
