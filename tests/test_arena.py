"""Code written for the exercise page and for HookedTransformer, on our objects."""

from functools import partial

import numpy as np
import pytest
import torch

from interp import arena
from interp.attribution import contributions
from interp.intervene import scale_coordinate
from interp.probes import LinearProbe
from othello_gpt import HookPoint, OthelloGPT, board, get_act_name
from othello_gpt.games import example_pair, games_to_tokens
from othello_gpt.vocab import label_to_token, square_to_token


@pytest.fixture(scope="module")
def model():
    return OthelloGPT.from_pretrained()


@pytest.fixture(scope="module")
def probe():
    return LinearProbe.from_pretrained(layer=4)


@pytest.fixture(scope="module")
def focus(model):
    squares = torch.from_numpy(board.random_games(4, seed=21))
    with torch.no_grad():
        return squares, model.run_with_cache(games_to_tokens(squares))[1]


def test_the_patching_section_runs_as_it_stands(model):
    """In-place hooks with partials, 1-D tokens, (name, fn) lists, reset_hooks; and the fast sweep agrees."""
    torch.set_grad_enabled(False)
    try:
        pair = example_pair()
        clean_input = games_to_tokens(pair.clean[None])[0]
        corrupted_input = clean_input.clone()
        corrupted_input[-1] = label_to_token("C0")
        clean_logits, clean_cache = model.run_with_cache(clean_input)
        corrupted_logits, corrupted_cache = model.run_with_cache(corrupted_input)
        f0 = label_to_token("F0")
        metric = arena.patching_metric(clean_logits, corrupted_logits, f0)

        def patch_final_move_output(activation, hook: HookPoint, clean_cache):
            activation[0, -1, :] = clean_cache[hook.name][0, -1, :]
            return activation

        model.reset_hooks()
        results = torch.zeros(2, model.cfg.n_layers)
        for i, activation in enumerate(["attn_out", "mlp_out"]):
            for layer in range(model.cfg.n_layers):
                hook = partial(patch_final_move_output, clean_cache=clean_cache)
                logits = model.run_with_hooks(
                    corrupted_input, fwd_hooks=[(get_act_name(activation, layer), hook)]
                )
                results[i, layer] = metric(logits)
    finally:
        torch.set_grad_enabled(True)

    swept = arena.get_act_patch_attn_mlp(model, clean_input, corrupted_input, metric)
    page = arena.get_act_patch_resid_pre(model, corrupted_input, clean_cache, metric)
    assert torch.allclose(results, swept.detach(), atol=1e-5)
    assert torch.allclose(results, page.detach(), atol=1e-6)
    assert metric(clean_logits).item() == pytest.approx(1)
    assert metric(corrupted_logits).item() == pytest.approx(0, abs=1e-6)


def test_contributions_are_those_of_every_layer_up_to_and_with_the_last(model, probe, focus):
    """Shapes (layer + 1, 8, 8); with the embeddings they add up to the accumulated score."""
    _, cache = focus
    attn, mlp = arena.calculate_attn_and_mlp_probe_score_contributions(cache, probe.mine, 3, 1, 20)
    score = arena.calculate_accumulated_probe_score(cache, probe.mine, 3, 1, 20)
    embeddings = contributions(cache, probe.mine, 3).values[:2, 1, 20].sum(0)
    by_hand = torch.einsum("d,drc->rc", cache["attn_out", 2][1, 20], probe.mine)

    assert attn.shape == mlp.shape == score.shape == (4, 8, 8)
    assert torch.allclose(attn[2], by_hand, atol=1e-5)
    assert torch.allclose(attn.sum(0) + mlp.sum(0) + embeddings, score[-1], atol=1e-4)


def test_neuron_weights_are_copies_and_cosines(model, probe):
    """get_w_in does not alias the model; a random, unnormalised probe is taken as it is."""
    stacked_in, stacked_out = model.W_in[5, :, 93], model.W_out[5, 93]
    w_in = arena.get_w_in(model, 5, 93)
    assert torch.equal(w_in, stacked_in)
    w_in /= 10
    assert torch.equal(arena.get_w_in(model, 5, 93), stacked_in)
    assert arena.get_w_out(model, 5, 93, normalize=True).norm().item() == pytest.approx(1)

    random = torch.randn(model.cfg.d_model, 8, 8)
    for found, w in (
        (arena.calculate_neuron_input_weights(model, random, 5, 93), stacked_in),
        (arena.calculate_neuron_output_weights(model, random, 5, 93), stacked_out),
    ):
        assert torch.allclose(found, torch.einsum("d,drc->rc", w / w.norm(), random), atol=1e-5)


def test_scaling_a_coordinate_mirrors_erases_and_spares_the_rest():
    """In place, first game, one position: scale 1 mirrors, 0 erases, -1 does nothing; twice 1 is nothing."""
    resid, direction = torch.randn(2, 5, 16).double(), torch.randn(16).double()
    unit = direction / direction.norm()
    for scale in (0, 1, 2, -1, 8):
        edited = arena.apply_scale(resid.clone(), direction, scale, pos=2)
        assert torch.allclose(edited[0, 2] @ unit, -scale * (resid[0, 2] @ unit))
        changed = (edited - resid).abs().sum(-1) > 1e-12
        assert changed.sum() == (scale != -1)
        across = edited[0, 2] - (edited[0, 2] @ unit) * unit
        assert torch.allclose(across, resid[0, 2] - (resid[0, 2] @ unit) * unit)
    mirrored = resid.clone()
    assert arena.apply_scale(mirrored, direction, 1, 2) is mirrored
    assert torch.allclose(arena.apply_scale(mirrored, direction, 1, 2), resid)


def test_boards_and_pictures(model, probe, focus):
    """States and legal moves of whole games; the probe's three boards."""
    squares, cache = focus
    states, legal, marks = arena.get_board_states_and_legal_moves(squares)
    picture = arena.plot_probe_outputs(cache, probe, 4, 1, 20)

    assert states.shape == legal.shape == (4, 60, 8, 8)
    assert torch.equal(states, torch.from_numpy(board.play(squares.numpy()).state).int())
    assert (
        arena.plot_board_values(states[0, 20], text=marks[0][20]).count(">o<") == legal[0, 20].sum()
    )
    for name in ("P(empty)", "P(theirs)", "P(mine)"):
        assert name in picture


def test_a_flipped_belief_moves_the_legal_moves(model, probe):
    """Mirroring "mine" at a square lets the model play what flipping its disc would make legal.

    Every disc of a few boards whose flip makes replies legal, one row each; averaged, because no probe is
    perfect: the newly legal replies at least double their probability.
    """
    before, after = [], []
    for game in board.random_games(4, seed=900)[:, :21]:
        record = board.play(game)
        state, side = record.state[-1], int(record.to_move[-1])
        occupied = np.flatnonzero(state)
        gained = [
            board.legal_changes(state, board.flip_square(state, square), side).newly_legal
            for square in occupied
        ]
        tokens = games_to_tokens(game[None]).repeat(len(occupied), 1)
        directions = [probe.mine.flatten(1)[:, square] for square in occupied]

        def flip(activation, hook, directions=directions):
            for row, direction in zip(activation[:, -1], directions, strict=True):
                row.copy_(scale_coordinate(row, direction, 1.5))

        with torch.no_grad():
            plain = model(tokens)[:, -1].softmax(-1)
            edited = model.run_with_hooks(tokens, [("resid_post4", flip)])[:, -1].softmax(-1)
        for row, squares in enumerate(gained):
            if squares.any():
                newly_legal = square_to_token(np.flatnonzero(squares))
                before.append(plain[row, newly_legal].sum())
                after.append(edited[row, newly_legal].sum())
    assert len(before) > 20
    assert torch.stack(after).mean() > 2 * torch.stack(before).mean()
