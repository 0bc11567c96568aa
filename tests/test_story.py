"""The story of a pair: its figures equal what the calls give, and the text tells them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_strategies import random_model

from interp import report
from interp.arena import calculate_attn_and_mlp_probe_score_contributions
from interp.gradients import attribution_sweep
from interp.pairs import pair_tokens, pairs_metric, sure_pairs
from interp.patching import patch_sweep, patching_metric
from interp.playback import playback
from interp.probes import fit_probes
from interp.story import shipped_probes, summary, tell
from othello_gpt import GPTConfig, OthelloGPT, board
from othello_gpt.games import example_game, example_pair, games_to_tokens
from othello_gpt.vocab import label_to_square, label_to_token, square_to_label

TINY = random_model(GPTConfig(n_layers=2, d_model=16, n_heads=2, d_head=4, d_mlp=12))
PROBES = fit_probes(TINY, torch.from_numpy(board.random_games(8, seed=1)))  # of -1, 0 and 1


def test_figures_equal_what_the_calls_give(story):
    """Log-probabilities, sweep and attribution, computed again by hand."""
    model, pair = OthelloGPT.from_pretrained(), story.pair
    clean, corrupted = (games_to_tokens(game[None]) for game in pair[:2])
    f0 = label_to_token("F0")
    with torch.no_grad():
        logits, other = model(clean), model(corrupted)
    swept = patch_sweep(model, clean, corrupted, patching_metric(logits, other, f0))

    assert story.log_probs[0] == pytest.approx(logits[0, -1].log_softmax(-1)[f0].item(), abs=1e-5)
    assert story.log_probs[1] == pytest.approx(other[0, -1].log_softmax(-1)[f0].item(), abs=1e-5)
    for site, effects in swept.items():
        assert torch.allclose(story.effects[site], effects, atol=1e-5)
        row = " ".join(f"{value:z7.3f}" for value in effects.tolist())
        assert f"{site:9} {row}" in summary(story)
    assert story.contributions.values.sum().item() == pytest.approx(
        logits[0, -1, f0].item(), abs=1e-3
    )
    assert "C7 D5 D6 D7 F0 F1 F3 G1 G2 G4 G5 G6 G7" in summary(story)


def test_what_layers_write_is_what_the_exercise_calls_give(story):
    """The boards of attention and MLPs, at the square of which the summary tells, turned by the last move."""
    model, probes = OthelloGPT.from_pretrained(), shipped_probes()
    probe = probes[int(story.accuracy.by_layer.argmax())]
    _, cache = model.run_with_cache(games_to_tokens(story.pair.clean[None]))
    expected = calculate_attn_and_mlp_probe_score_contributions(
        cache, probe.mine, probe.layer, 0, len(story.pair.clean) - 1
    )
    text = summary(story)

    assert story.last_layer == probe.layer
    assert story.record.flipped[-1].flat[story.turned]
    assert f'"mine" at {square_to_label(story.turned)}' in text
    for part, boards in zip(("attn", "mlp"), expected, strict=True):
        assert torch.allclose(story.written_by(part), boards, atol=1e-4)
        assert (
            " ".join(f"{v:z7.2f}" for v in story.written_by(part).flatten(1)[:, story.turned])
            in text
        )


def test_the_turned_disc_is_the_one_of_which_the_probe_is_surest(story):
    """By its logits, bias included: of all discs that the last move turned, the widest margin, which is the score."""
    probe = shipped_probes()[story.last_layer]
    _, cache = OthelloGPT.from_pretrained().run_with_cache(games_to_tokens(story.pair.clean[None]))
    logits = probe.logits(cache["resid_post", probe.layer][0, -1])
    margin = (logits[..., 2] - logits[..., 1])[torch.from_numpy(story.record.flipped[-1])]

    assert story.score == pytest.approx(margin[margin.abs().argmax()].item(), abs=1e-4)
    assert story.written.gap < 1e-3


def test_averages_are_of_the_pairs_that_they_name(story):
    """Within their intervals, one entry a layer, and the same in the text."""
    assert 3 <= story.n_pairs <= 12
    for site, (mean, low, high) in story.averages.items():
        assert mean.shape == (8,)
        assert ((low <= mean) & (mean <= high)).all()
        line = f"{site:9} 5: {mean[5].item():z6.3f} ({low[5].item():z.3f} to {high[5].item():z.3f})"
        assert line in summary(story)


def test_the_estimate_is_told_beside_the_exact_sweep(story):
    """Attribution patching over the same pairs: its correlation and its worst error, computed again."""
    model = OthelloGPT.from_pretrained()
    pairs = sure_pairs(model, 12)
    clean, corrupted, _ = pair_tokens(pairs)
    metric = pairs_metric(model, pairs)
    exact = patch_sweep(model, clean, corrupted, metric)
    estimated = attribution_sweep(model, clean, corrupted, metric)
    for site, (correlation, worst_error) in story.agreements.items():
        a, b = exact[site].flatten().double(), estimated[site].flatten().double()
        assert correlation == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-4)
        assert worst_error == pytest.approx((a - b).abs().max().item(), abs=1e-4)
        words = f"{site} correlation {correlation:.2f}, worst error {worst_error:.2f}"
        assert words in summary(story)
        assert words in report.page(story)


def test_each_probe_of_a_playback_reads_its_own_layer():
    """The embeddings' too, which are called so."""
    played = playback(TINY, PROBES, example_game())
    _, cache = TINY.run_with_cache(games_to_tokens(example_game()))
    for row, site in enumerate((("resid_pre", 0), ("resid_post", 0), ("resid_post", 1))):
        belief = PROBES[row].probabilities(cache[site][0, : len(played.squares)])
        assert torch.allclose(played.believed[:, row], belief[..., 2] - belief[..., 1])
    assert played.believers == ("embeddings", "layer 0", "layer 1")


def test_a_playback_takes_only_probes_that_read_its_board():
    """Neither those of another stream, nor of black and white."""
    centred = replace(PROBES[0], space="centred")
    black = replace(PROBES[0], classes=("empty", "white", "black"), target="black")
    for probe, message in (
        (centred, "reads the centred residual stream, but this model's is raw"),
        (black, "reads empty, white, black: give one of empty, theirs, mine"),
    ):
        with pytest.raises(ValueError, match=message):
            playback(TINY, [probe], example_game())


def test_a_story_needs_the_probes_of_all_layers_in_order():
    """Neither the embeddings' besides, nor another order, nor too few."""
    for probes in (PROBES, PROBES[:0:-1], PROBES[1:2]):
        with pytest.raises(ValueError, match="give those of 0 to 1 in order"):
            tell(TINY, probes, example_pair())


def test_a_story_needs_an_answer_that_is_legal_after_the_clean_game_only():
    """Neither one that is no reply at all, nor one that is a reply to both games."""
    for label in ("A0", "D6"):
        pair = example_pair()._replace(answer=label_to_square(label))
        with pytest.raises(
            ValueError, match=f"{label} must be a legal reply to the clean game and"
        ):
            tell(TINY, PROBES[1:], pair)


def test_a_story_is_told_of_models_of_any_depth_and_dtype():
    """Two layers in float64, as text and as a page."""
    told = tell(TINY, PROBES[1:], example_pair(), n_games=4, n_pairs=12)

    assert "Neurons of layer 0 that vary most" in summary(told)
    assert "layer 1" in report.page(told)
    assert torch.equal(told.believed, told.played.believed[20])
