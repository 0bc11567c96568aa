"""Edits: each against its own definition in float64, in batches as alone, and at the last position only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_strategies import random_model

from interp.cases import make_cases, natural_cases, unnatural_cases
from interp.intervene import (
    Preset,
    Wanted,
    added,
    erased,
    flip_hook,
    injected,
    latent_saliency,
    mirrored,
    optimised,
    placed,
    presets,
    run_edited,
    scale_coordinate,
)
from interp.probes import LinearProbe, TwoLayerProbe
from othello_gpt import GPTConfig, board
from othello_gpt.games import games_to_tokens
from othello_gpt.vocab import square_to_token

WIDE = GPTConfig(n_layers=3, d_model=200, n_heads=2, d_head=4, d_mlp=8)
CASES = unnatural_cases(8, seed=1)
WANTED = Wanted.of(CASES, torch.device("cpu"))


def random_probe(layer: int = 1) -> LinearProbe:
    W = torch.randn(200, 8, 8, 3, dtype=torch.double)
    return LinearProbe(W, torch.randn(8, 8, 3).double(), layer, space="raw")


def two_layer_probe(layer: int = 1) -> TwoLayerProbe:
    hidden = torch.randn(200, 20).double() / 14, torch.randn(20).double()
    readout = torch.randn(20, 8, 8, 3).double(), torch.randn(8, 8, 3).double()
    return TwoLayerProbe(*hidden, *readout, layer, space="raw")


def margins(probe, resid, wanted=WANTED) -> torch.Tensor:
    """By how much the new class of each edited square stands above the old one, in logits."""
    logits = probe.logits(resid).flatten(1, 2)
    case = torch.arange(len(resid))
    return logits[case, wanted.square, wanted.new] - logits[case, wanted.square, wanted.old]


def contrasts(probe) -> torch.Tensor:
    """The direction from old to new class of each case, by a loop."""
    flat = probe.W.flatten(1, 2)
    rows = zip(WANTED.square, WANTED.old, WANTED.new, strict=True)
    return torch.stack([flat[:, square, new] - flat[:, square, old] for square, old, new in rows])


RESID = torch.randn(8, 200, generator=torch.Generator().manual_seed(1)).double()


def test_mirroring_is_the_exercise_s_flip_of_each_case():
    """The coordinate along each case's own direction becomes `-scale` times itself."""
    probe = random_probe()
    for scale in (0.0, 1.0, 3.0):
        edited = mirrored(scale)(RESID, probe, WANTED)
        for row, direction in enumerate(contrasts(probe)):
            expected = scale_coordinate(RESID[row], direction, scale)
            torch.testing.assert_close(edited[row], expected)


def test_adding_moves_by_the_length_towards_the_new_class():
    """Whatever the stream holds."""
    probe = random_probe()
    step = added(2.3)(RESID, probe, WANTED) - RESID

    torch.testing.assert_close(step.norm(dim=1), torch.full((8,), 2.3).double())
    assert torch.cosine_similarity(step, contrasts(probe)).min() > 1 - 1e-9


def test_placing_reaches_the_margin_by_the_shortest_step():
    """Along the direction itself; twice is once."""
    probe = random_probe()
    edited = placed(6.0)(RESID, probe, WANTED)

    torch.testing.assert_close(margins(probe, edited), torch.full((8,), 6.0).double())
    assert torch.cosine_similarity(edited - RESID, contrasts(probe)).abs().min() > 1 - 1e-9
    torch.testing.assert_close(placed(6.0)(edited, probe, WANTED), edited)


def test_injecting_reaches_the_margin_and_leaves_other_squares():
    """Their class probabilities stay as they were, to rounding."""
    probe = random_probe()
    edited = injected(6.0)(RESID, probe, WANTED)
    before, after = (probe.probabilities(x).flatten(1, 2) for x in (RESID, edited))
    others = torch.ones(8, 64, dtype=torch.bool)
    others[torch.arange(8), WANTED.square] = False

    torch.testing.assert_close(margins(probe, edited), torch.full((8,), 6.0).double())
    torch.testing.assert_close(after[others], before[others])


def test_erasing_leaves_the_classes_equally_likely():
    """Of the edited square; no shorter step does."""
    probe = random_probe()
    edited = erased()(RESID, probe, WANTED)
    read = probe.probabilities(edited).flatten(1, 2)[torch.arange(8), WANTED.square]
    W = probe.W.flatten(1, 2)[:, WANTED.square].movedim(1, 0)  # [case, d_model, k]
    outside = torch.linalg.lstsq(W, (edited - RESID)[..., None]).solution
    inside = (W @ outside)[..., 0]

    torch.testing.assert_close(read, torch.full((8, 3), 1 / 3).double())
    torch.testing.assert_close(edited - RESID, inside)


@pytest.mark.parametrize("probe", [random_probe(), two_layer_probe()], ids=["linear", "two layers"])
def test_optimising_brings_the_new_board_about(probe):
    """The weighted cross-entropy falls in every case, and no weight has a gradient."""
    edited = optimised(0.01, steps=50)(RESID, probe, WANTED)
    weight = torch.full((8, 64), 0.2).double()
    weight[torch.arange(8), WANTED.square] = 1.0

    def losses(resid):
        log_probabilities = probe.probabilities(resid).log().flatten(1, 2)
        wrong = -log_probabilities.gather(-1, WANTED.board[..., None])[..., 0]
        return (weight * wrong).sum(1)

    assert (losses(edited) < losses(RESID)).all()
    assert not any(tensor.requires_grad for tensor in probe.tensors().values())
    with pytest.raises(ValueError, match="take a smaller `lr`"):
        optimised(1e308, steps=3)(RESID, probe, WANTED)


def test_asked_for_the_truth_linear_edits_do_nothing():
    """What the sham of the benchmark rests on."""
    for change in (mirrored(), added(2.0), placed(5.0), injected(5.0), erased()):
        assert torch.equal(change(RESID, random_probe(), WANTED.truth()), RESID)


def test_a_batch_of_cases_is_each_case_alone():
    """Other lengths and squares, padding and order make no difference, in float64."""
    model = random_model(WIDE)
    probes = [random_probe(layer) for layer in range(3)]
    preset = Preset("set", placed(4.0), (0, 2))
    together = run_edited(model, CASES, preset, probes, batch_size=3)
    for i in range(len(CASES)):
        alone = run_edited(model, CASES.select(slice(i, i + 1)), preset, probes)
        torch.testing.assert_close(together.logits[i], alone.logits[0])
        torch.testing.assert_close(together.resid[i], alone.resid[0])


def test_an_edited_run_is_a_run_with_the_hook_of_the_exercise():
    """One case, one layer, one coordinate mirrored at the last position."""
    model, probe = random_model(WIDE), random_probe()
    case = CASES.select(slice(2, 3))
    run = run_edited(model, case, Preset("flip", mirrored(), (1,)), [probe])
    hooks = [("blocks.1.hook_resid_post", flip_hook(contrasts(probe)[2]))]
    logits = model.run_with_hooks(games_to_tokens(case.squares), hooks)

    torch.testing.assert_close(run.logits[0], logits[0, -1])


def test_attn_out_and_one_probe_for_all_layers():
    """Nanda's way: the direction of one layer's probe, added to what attention writes in several."""
    model, probe = random_model(WIDE), random_probe(2)
    case = CASES.select(slice(1))
    preset = Preset("add", added(3.0), (0, 1), probe_layer=2, site="attn_out")
    step = 3.0 * torch.nn.functional.normalize(contrasts(probe)[0], dim=0)

    def add(activation, hook):
        activation[:, -1] += step

    hooks = [(f"blocks.{layer}.hook_attn_out", add) for layer in (0, 1)]
    logits = model.run_with_hooks(games_to_tokens(case.squares), hooks)
    torch.testing.assert_close(run_edited(model, case, preset, [probe]).logits[0], logits[0, -1])


def test_what_cannot_be_edited_is_refused():
    """A layer without its probe or with two, a probe of other classes, two layers where directions are needed."""
    model, preset = random_model(WIDE), Preset("set", placed(4.0), (1, 2))
    probe = random_probe()
    black = LinearProbe(probe.W, probe.b, 2, ("empty", "white", "black"), "raw", "black")
    for probes, message in (
        ([probe], r"needs probes of layers \[2\], but `probes` has those of \[1\]"),
        ([probe, probe], r"`probes` are of layers \[1, 1\]: give one a layer"),
        ([probe, black], "reads empty, white, black: give one of empty, theirs, mine"),
        ([probe, two_layer_probe(2)], "only `optimised` edits take a two-layer probe"),
    ):
        with pytest.raises(ValueError, match=message):
            run_edited(model, CASES, preset, probes)


def test_runs_that_are_not_finite_are_refused():
    """By the model's weights or the probe's; and so are no cases."""
    model, probe, preset = random_model(WIDE), random_probe(), Preset("set", placed(4.0), (1,))
    broken = replace(probe, b=probe.b * torch.nan)
    with pytest.raises(ValueError, match="logits of case 0 are not finite: look for NaN"):
        run_edited(model, CASES, preset, [broken])
    with torch.no_grad():
        model.blocks[1].mlp.b_out[0] = torch.nan
    with pytest.raises(ValueError, match="logits of case 0 are not finite: look for NaN"):
        run_edited(model, CASES, None, [])
    with pytest.raises(ValueError, match="there are no cases: give at least one"):
        run_edited(model, CASES.select(slice(0)), None, [])


def test_saliency_is_each_disc_s_own_edit():
    """By a loop of single edits; empty squares have none."""
    model, probes = random_model(WIDE), [random_probe(layer) for layer in range(3)]
    game, answer = board.random_games(1, seed=6)[0, :9], 44
    preset, token = Preset("set", placed(4.0), (1,)), square_to_token(44)
    saliency = latent_saliency(model, game, preset, probes, answer).flatten()
    state = board.play(game).state[-1].flatten()
    clean = model(games_to_tokens(game[None]))[0, -1].log_softmax(-1)[token]

    assert np.array_equal(saliency.isnan().numpy(), state == 0)
    for square in np.flatnonzero(state):
        case = make_cases(game[None], np.array([square]), -state[[square]])
        edited = run_edited(model, case, preset, probes).logits[0].log_softmax(-1)[token]
        torch.testing.assert_close(saliency[square], clean - edited)


def test_every_preset_runs_on_any_model():
    """On three layers as on eight: layers exist, and each but the sham changes the logits."""
    model, probes = random_model(WIDE), [random_probe(layer) for layer in range(3)]
    cases = natural_cases(3, seed=0)
    null = run_edited(model, cases, None, [])
    for preset in presets(model).values():
        run = run_edited(model, cases, preset, probes)
        assert run.logits.isfinite().all()
        assert (run.logits != null.logits).any(-1).all(), preset.name
