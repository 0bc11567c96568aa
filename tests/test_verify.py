"""Checking a checkpoint: what passes, what fails, and the published figures."""

import torch

from othello_gpt import OthelloGPT
from othello_gpt.verify import _circuit_figures, verify_checkpoint


def test_verify_passes_the_packaged_model_and_fails_an_untrained_one(tmp_path):
    """Facts are told, checks pass or fail, and the command's status follows."""
    good = verify_checkpoint(n_games=30)
    OthelloGPT(OthelloGPT.from_pretrained().cfg).save_pretrained(tmp_path / "random")
    bad = verify_checkpoint(tmp_path / "random", n_games=30)

    assert good.ok
    assert "PASS folding keeps log-probabilities" in str(good)
    assert not bad.ok
    assert "FAIL illegal top moves" in str(bad)


def test_the_published_figures_fail_on_another_model_of_that_size():
    """Log-probabilities, both rows of the sweep and the neuron are compared, and random weights have none."""
    torch.manual_seed(0)
    checks = _circuit_figures(OthelloGPT())

    assert [check.name for check in checks] == [
        "log-probability of F0",
        "sweep, attn_out",
        "sweep, mlp_out",
        "L5N1393 to logits",
    ]
    assert not any(check.passed for check in checks)
