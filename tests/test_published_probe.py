"""The published three-mode probe gives the published figures; skipped where the file is not at hand.

Set OTHELLO_GPT_REFERENCE to a folder with `main_linear_probe.pth` (likenneth/othello_world).
"""

import os
from pathlib import Path

import pytest
import torch

from interp.neurons import span_fraction
from interp.probe_geometry import cosines, square_cosines
from interp.probes import LinearProbe
from othello_gpt.vocab import CENTRE

FOLDER = os.environ.get("OTHELLO_GPT_REFERENCE")
PATH = Path(FOLDER or "none") / "main_linear_probe.pth"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason="OTHELLO_GPT_REFERENCE lacks the file")

OTHERS = [square for square in range(64) if square not in CENTRE]


def mode(name: str) -> LinearProbe:
    return LinearProbe.load(PATH, mode=name)


def colour(name: str) -> torch.Tensor:
    return mode(name).direction("black", "white")


def test_black_minus_white_turns_round_with_the_parity():
    """Same square, two parities: nearly opposite; other squares: nearly orthogonal."""
    same = square_cosines(colour("black to play"), colour("white to play"))

    assert same.mean().item() == pytest.approx(-0.9855, abs=5e-5)
    assert same.min().item() == pytest.approx(-0.9969, abs=5e-5)
    assert same.max().item() == pytest.approx(-0.9527, abs=5e-5)
    off = torch.stack([cosines(colour(name)) for name in ("black to play", "white to play")])
    off = off[:, ~torch.eye(64, dtype=torch.bool)].abs()
    assert off.mean().item() == pytest.approx(0.034, abs=1e-3)
    assert off.max().item() == pytest.approx(0.353, abs=1e-3)


def test_blank_is_the_same_for_both_parities():
    """All squares but the four of the centre, which never are blank."""
    blank = [
        (mode(name).direction("empty", "white") + mode(name).direction("empty", "black")) / 2
        for name in ("black to play", "white to play")
    ]
    same = square_cosines(*blank).flatten()

    assert same.mean().item() == pytest.approx(0.974, abs=1e-3)
    assert same[list(CENTRE)].min().item() == pytest.approx(0.748, abs=1e-3)
    assert same[list(CENTRE)].max().item() == pytest.approx(0.797, abs=1e-3)
    assert same[OTHERS].min().item() >= 0.962 - 1e-3


def test_norms_of_the_directions():
    """Blank small in the centre only, mine larger at the edges, and the absolute colours found little."""
    probe = LinearProbe.load(PATH)
    blank, mine = probe.blank.norm(dim=0).flatten(), probe.mine.norm(dim=0)
    edge = torch.ones(8, 8, dtype=torch.bool)
    edge[1:-1, 1:-1] = False

    assert 8.55 < blank[OTHERS].min() < blank[OTHERS].max() < 11.05
    assert 3.255 < blank[list(CENTRE)].min() < blank[list(CENTRE)].max() < 3.365
    assert 3.35 < mine[~edge].min() < mine[~edge].max() < 5.05
    assert 5.95 < mine[edge].min() < mine[edge].max() < 9.35
    same = square_cosines(probe.blank, probe.mine).abs()
    assert same.mean().item() == pytest.approx(0.047, abs=1e-3)
    assert same.max().item() == pytest.approx(0.128, abs=1e-3)
    for name, norm in (("black to play", 3.3), ("white to play", 3.3), ("all", 1.14)):
        assert mode(name).W[..., 1:].norm(dim=0).mean().item() == pytest.approx(norm, abs=0.12)


def test_the_span_of_all_directions():
    """Three small singular values, so dropping the last four takes a real direction and leaves a centre one."""
    probe = LinearProbe.load(PATH)
    both = torch.cat([probe.mine.flatten(1), probe.blank.flatten(1)], 1)
    U, S, _ = torch.linalg.svd(both.double(), full_matrices=False)

    assert S[:3].tolist() == pytest.approx([14.96, 14.38, 14.19], abs=5e-3)
    assert S[-5:].tolist() == pytest.approx([2.652, 2.595, 0.547, 0.495, 0.463], abs=1e-3)
    played = torch.cat([probe.mine.flatten(1), probe.blank.flatten(1)[:, OTHERS]], 1)
    true_span = torch.linalg.qr(played.double()).Q
    assert span_fraction(U[:, :-4], true_span).sum().item() == pytest.approx(123.0, abs=0.05)


def test_the_probe_was_trained_on_a_centred_stream():
    """No direction has much of the all-ones one."""
    probe = LinearProbe.load(PATH)
    assert (probe.space, probe.layer) == ("centred", 6)
    for directions in (probe.blank, probe.mine):
        along = directions.sum(0) / 512**0.5 / directions.norm(dim=0)
        assert along.abs().mean() < 0.025
