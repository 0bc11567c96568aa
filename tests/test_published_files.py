"""Files that are not part of the project, in the folder that OTHELLO_GPT_REFERENCE names; else skipped.

A checkpoint in two layouts, and figures of the real synthetic model: the plot data of N. Nanda's
Othello_GPT_Circuits notebook. They check our board and our conventions against a model that we do not have.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from othello_gpt import OthelloGPT, board
from othello_gpt.games import games_to_tokens, parse_moves
from othello_gpt.vocab import label_to_square, token_to_square

FOLDER = Path(os.environ.get("OTHELLO_GPT_REFERENCE", "not given"))
LAYOUTS = [FOLDER / "interim_tl_layout.pth", FOLDER / "interim_mingpt_layout.ckpt"]
FIGURES = FOLDER / "golden_real_weights.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(Path.exists, [*LAYOUTS, FIGURES])), reason="OTHELLO_GPT_REFERENCE not given"
    ),
]


@pytest.fixture(scope="module")
def figures() -> dict:
    return json.loads(FIGURES.read_text())


@pytest.fixture(scope="module")
def games(figures) -> np.ndarray:
    """The exercise's first ten games, 59 plies each."""
    return np.stack([parse_moves(" ".join(g)) for g in figures["focus_games_0_to_9_first59_moves"]])


def log_probs(source: Path, dtype: torch.dtype) -> torch.Tensor:
    tokens = games_to_tokens(board.random_games(60, seed=5))
    with torch.no_grad():
        return OthelloGPT.from_pretrained(source, dtype=dtype)(tokens).log_softmax(-1)


def test_both_layouts_give_the_same_log_probabilities():
    """To 1e-5 nats in float64, where only the rounding of the stored weights differs; relative in float32."""
    for dtype in (torch.float64, torch.float32):
        theirs, mingpt = (log_probs(path, dtype) for path in LAYOUTS)
        largest = 1.0 if dtype == torch.float64 else mingpt.abs().max()
        assert (theirs - mingpt).abs().max() < 1e-5 * largest, dtype


def test_the_exercise_s_games_are_legal_with_one_forfeit(games):
    """In game 0 at index 58; each game leaves one empty square."""
    record = board.play(games)
    parity = np.where(np.arange(59) % 2, -1, 1)

    assert np.argwhere(record.mover != parity).tolist() == [[0, 58]]
    assert (np.abs(record.state[:, -1]).sum((1, 2)) == 63).all()


def test_the_real_model_s_best_moves_are_legal_on_our_board(figures):
    """All 59 of its sample game, whose loss is within 0.003 nats of the least that the rules allow."""
    squares = token_to_square(np.array(figures["sample_input"]))
    best = token_to_square(np.array(figures["sample_output_argmax"]))
    legal = board.play(squares).legal.reshape(59, 64)
    least = np.mean([math.log(replies.sum()) for replies in legal[:58]])

    assert legal[np.arange(59), best].all()
    assert least == pytest.approx(1.91010, abs=1e-5)
    assert figures["sample_loss_TL_from_pretrained_othello_gpt"] == pytest.approx(least, abs=3e-3)


def test_the_real_probe_s_boards_are_ours(figures, games):
    """Empty, theirs and mine of game 1 as read from the real model: at most one square differs a board."""
    classes = board.piece_classes(board.play(games))[1]
    read = {move: figures[f"game1_move{move}_L6_probs"]["z"] for move in (22, 30)}

    for move, boards in read.items():
        assert (np.argmax(boards, axis=0) != classes[move]).sum() <= 1, move


def test_the_real_neuron_fires_where_our_board_says(figures, games):
    """L5N1393: wherever it exceeds 1, C0 is empty, D1 theirs and E2 mine; it fires most in game 5."""
    relative = board.relative_state(board.play(games)).reshape(10, 59, 64)
    c0, d1, e2 = (relative[..., label_to_square(label)] for label in ("C0", "D1", "E2"))
    rule = (c0 == 0) & (d1 == -1) & (e2 == 1)
    activations = np.array(figures["L5N1393_acts_50x59"])[:10]

    assert rule[activations > 1].all()
    assert np.flatnonzero(rule[5]).tolist() == [10, 12, 14, 16, 18, 20]
    assert np.unravel_index(activations.argmax(), activations.shape) == (5, 14)
