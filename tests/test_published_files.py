"""Checkpoints that are not part of the project, in the folder that OTHELLO_GPT_REFERENCE names; else skipped."""

import os
from pathlib import Path

import pytest
import torch

from othello_gpt import OthelloGPT, board
from othello_gpt.games import games_to_tokens

FOLDER = Path(os.environ.get("OTHELLO_GPT_REFERENCE", "not given"))
LAYOUTS = [FOLDER / "interim_tl_layout.pth", FOLDER / "interim_mingpt_layout.ckpt"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(Path.exists, LAYOUTS)), reason="OTHELLO_GPT_REFERENCE not given"
    ),
]


def log_probs(source: Path | None, dtype: torch.dtype) -> torch.Tensor:
    tokens = games_to_tokens(board.random_games(60, seed=5))
    with torch.no_grad():
        return OthelloGPT.from_pretrained(source, dtype=dtype)(tokens).log_softmax(-1)


def test_both_layouts_give_the_same_log_probabilities():
    """To 1e-5 nats in float64, where only the rounding of the stored weights differs; relative in float32."""
    for dtype in (torch.float64, torch.float32):
        theirs, mingpt = (log_probs(path, dtype) for path in LAYOUTS)
        largest = 1.0 if dtype == torch.float64 else mingpt.abs().max()
        assert (theirs - mingpt).abs().max() < 1e-5 * largest, dtype


def test_the_packaged_weights_are_these_in_half_precision():
    """Their log-probabilities of moves that are not absurd differ by the rounding to float16 alone."""
    packaged, original = log_probs(None, torch.float64), log_probs(LAYOUTS[1], torch.float64)
    likely = original > -10

    assert (packaged - original)[likely].abs().max() < 0.1
    assert (packaged.exp() - original.exp()).abs().max() < 5e-3
