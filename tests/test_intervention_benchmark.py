"""The benchmark: its measures by hand, its controls, and that edits of the packaged model do what they should."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from model_strategies import random_model

from interp.cases import natural_cases, published_cases
from interp.intervene import EditedRun, Preset, Wanted, added, placed, presets, run_edited
from interp.intervention_benchmark import (
    benchmark,
    controls,
    outcome,
    random_beside,
    threshold_errors,
    top_n_errors,
)
from interp.probes import LinearProbe
from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.cli import main
from othello_gpt.vocab import square_to_token

SMALL = GPTConfig(n_layers=2, d_model=16, n_heads=2, d_head=4, d_mlp=16)


def test_both_definitions_count_false_positives_and_negatives():
    """Three legal moves: the best three hold two of them; four stand above a sixth, of which three are legal."""
    probabilities = torch.zeros(1, 61)
    probabilities[0, [1, 2, 3, 4, 5]] = torch.tensor([0.28, 0.25, 0.2, 0.17, 0.1])
    legal = torch.zeros(1, 60, dtype=torch.bool)
    legal[0, [0, 1, 3]] = True

    assert top_n_errors(probabilities, legal).item() == 2
    assert threshold_errors(probabilities, legal).item() == 1
    probabilities[0, 4] = 0.16
    assert threshold_errors(probabilities, legal).item() == 2


def test_a_model_that_plays_by_the_edited_board_makes_no_errors():
    """Uniform over the new replies: none against the new board, all of the changes against the old."""
    cases = natural_cases(10, seed=1)
    logits = torch.full((10, 61), -30.0)
    for i in range(10):
        logits[i, square_to_token(np.flatnonzero(cases.legal_after[i]))] = 0
    reader = LinearProbe(torch.zeros(4, 8, 8, 3), torch.zeros(8, 8, 3), 0)
    run = EditedRun(logits, torch.zeros(10, 4))
    found = outcome(cases, run, run, reader)
    changed = torch.from_numpy((cases.legal_before != cases.legal_after).sum((1, 2))).float()
    gained = torch.from_numpy((cases.legal_after & ~cases.legal_before).sum((1, 2)))
    n_legal = torch.from_numpy(cases.legal_after.sum((1, 2)))

    assert (found.top_n == 0).all()
    assert (found.threshold == 0).all()
    assert torch.equal(found.threshold_before, changed)
    torch.testing.assert_close(found.newly_legal, (gained / n_legal).float())
    assert (found.newly_illegal < 1e-9).all()
    assert (found.never_legal < 1e-9).all()
    assert (found.collateral == 0).all()


def test_landing_and_collateral_are_read_by_the_probe():
    """One square read anew on purpose, and four others besides."""
    cases = natural_cases(1, seed=1)
    _, new = cases.edited_classes()
    square, others = int(cases.square[0]), [s for s in range(64) if s != cases.square[0]][:4]
    W = torch.zeros(1, 64, 3)
    W[0, [square, *others], [int(new[0])] * 5] = 1
    b = torch.zeros(64, 3)
    b[:, (int(new[0]) + 1) % 3] = 0.5
    reader = LinearProbe(W.view(1, 8, 8, 3), b.view(8, 8, 3), 0)
    unedited, edited = (EditedRun(torch.zeros(1, 61), torch.tensor([[x]])) for x in (0.0, 1.0))

    assert outcome(cases, unedited, unedited, reader).landed.item() == 0
    found = outcome(cases, edited, unedited, reader)
    assert found.landed.item() == 1
    assert found.collateral.item() == pytest.approx(4 / 63)


def test_the_random_control_steps_as_far_as_the_edit():
    """Pair by pair at one layer, in a direction that has nothing to do with it."""
    cases = natural_cases(5, seed=1)
    pairs = cases.select(np.arange(5).repeat(2))
    probe = LinearProbe(torch.randn(300, 8, 8, 3), torch.randn(8, 8, 3), 0)
    resid = torch.randn(5, 300).repeat_interleave(2, 0)
    wanted = Wanted.of(pairs, torch.device("cpu"))
    step = random_beside(placed(9.0))(resid, probe, wanted) - resid
    alone = placed(9.0)(resid, probe, wanted) - resid

    torch.testing.assert_close(step[::2], alone[::2])
    torch.testing.assert_close(step[1::2].norm(dim=1), alone[::2].norm(dim=1))
    assert torch.cosine_similarity(step[1::2], alone[::2]).abs().max() < 0.3


def test_rows_are_the_edit_and_its_three_controls():
    """The unedited model first; the sham of a linear edit is the unedited model, to the last bit."""
    model = random_model(SMALL)
    W = torch.randn(3, 16, 8, 8, 3).double()
    zero = torch.zeros(8, 8, 3).double()
    probes = [LinearProbe(W[i], zero, layer=i - 1, space="raw") for i in range(3)]
    edit = Preset("add", added(20.0), (0, 1))
    found = benchmark(model, probes, natural_cases(6, seed=2), [edit])
    by_name = {(row.preset, row.control): row for row in found.rows}

    assert [row.control for row in found.rows[1:]] == ["", *controls(edit)]
    null, sham = by_name["null", ""].outcome, by_name["add", "sham"].outcome
    assert all(torch.equal(a, b) for a, b in zip(null, sham, strict=True))
    assert (by_name["add", ""].outcome.newly_legal != null.newly_legal).any()
    assert "random direction" in str(found)
    low, high = by_name["add", ""].means["top_n"][1:]
    assert low <= by_name["add", ""].outcome.top_n.mean() <= high
    with pytest.raises(
        ValueError, match="has none of layer 1, which reads what the edits have done"
    ):
        benchmark(model, probes[:2], natural_cases(1, seed=2), [edit])
    with pytest.raises(ValueError, match=r"none of the embeddings \(layer -1\)"):
        benchmark(model, probes[1:], natural_cases(1, seed=2), [edit])


@pytest.mark.slow
def test_edits_of_the_packaged_model_work_and_controls_do_not():
    """Errors fall by more than half, against the truth they grow, and every control stays near the null."""
    model = OthelloGPT.from_pretrained()
    probes = [LinearProbe.from_pretrained(layer) for layer in range(-1, 8)]
    found = benchmark(model, probes, natural_cases(60, seed=7))
    means = {(row.preset, row.control): row.means for row in found.rows}
    null = means["null", ""]["top_n"]

    assert 2 < null.value < 4
    for name in ("set", "li_gradient"):
        edited = means[name, ""]
        assert edited["top_n"].value < null.value / 2
        assert edited["top_n_before"].value > means["null", ""]["top_n_before"].high
        assert edited["landed"].value > 0.9
    for (name, control), of_control in means.items():
        if control:
            assert of_control["top_n"].high > null.low, (name, control)
            assert of_control["top_n"].low < null.high, (name, control)


@pytest.mark.slow
def test_the_command_prints_the_table(capsys):
    """`othello-gpt intervene` on the packaged model; an unknown preset is refused."""
    arguments = ["intervene", "--n", "4", "--games", "8", "--presets", "set", "--unnatural"]
    assert main(arguments) == 0
    assert "wrong layer" in capsys.readouterr().out
    assert main(["intervene", "--presets", "wish"]) == 1
    assert "no preset is named wish: there are arena_flip" in capsys.readouterr().err


REFERENCE = Path(os.environ.get("OTHELLO_GPT_REFERENCE", "none")) / "intervention_benchmark.pkl"


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.exists(), reason="OTHELLO_GPT_REFERENCE lacks the file")
def test_the_published_cases_are_edited_on_the_packaged_model():
    """Null errors between 2 and 3, with the best preset at most 0.4."""
    model, cases = OthelloGPT.from_pretrained(), published_cases(REFERENCE)
    probes = [LinearProbe.from_pretrained(layer) for layer in range(8)]
    null = run_edited(model, cases, None, probes)
    run = run_edited(model, cases, presets(model)["li_gradient"], probes)

    assert 2 < outcome(cases, null, null, probes[7]).top_n.mean() < 3
    assert outcome(cases, run, null, probes[7]).top_n.mean() <= 0.4
