"""Ablations equal full runs with a hook; checks tell neurons that do what their rule says from those that do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_strategies import models
from planted import model_of_moves, rules_of_moves

from interp.causal_checks import CausalCheck, ablated_logits, causal_checks, replay_cache
from interp.positions import positions_of
from othello_gpt import board
from othello_gpt.games import games_to_tokens


@settings(max_examples=15)
@given(models(), st.data())
def test_an_ablation_is_a_full_run_with_one_neuron_held(model, data):
    """Each row against a hooked run of its game."""
    squares = board.random_games(3, seed=data.draw(st.integers(0, 99)))
    logits, cache = replay_cache(model, squares)
    layer = data.draw(st.integers(0, model.cfg.n_layers - 1))
    place = st.tuples(st.integers(0, model.cfg.d_mlp - 1), st.integers(0, 2), st.integers(0, 58))
    rows = data.draw(st.lists(place, min_size=1, max_size=4))
    value = data.draw(st.sampled_from([0.0, 1.5]))
    found = ablated_logits(model, cache, layer, *map(torch.tensor, zip(*rows, strict=True)), value)

    for (neuron, game, pos), row in zip(rows, found, strict=True):

        def hold(activation, hook, neuron=neuron, pos=pos):
            activation[:, pos, neuron] = value

        tokens = games_to_tokens(squares[game : game + 1])
        with torch.no_grad():
            hooked = model.run_with_hooks(tokens, [(f"post{layer}", hold)])
        assert torch.allclose(row, hooked[0, pos], atol=1e-10)


def test_a_neuron_that_writes_a_move_where_its_rule_holds_passes():
    """And fails under another neuron's rule; the effect is what was written, LayerNorm's weight and sign included."""
    squares = board.random_games(60, seed=7)
    rules = rules_of_moves(positions_of(squares), 6, seed=4)
    model = model_of_moves(rules)
    with torch.no_grad():
        model.W_U.normal_()
        model.ln_final.w.normal_()
        model.blocks[0].mlp.W_out.normal_(std=0.1)
    own = causal_checks(model, squares, 0, dict(enumerate(rules)))
    other = causal_checks(model, squares, 0, {i: rules[i - 1] for i in range(6)})

    assert own
    for check in own.values():
        assert check.passed
        assert check.control == pytest.approx(0, abs=1e-5)
        assert check.effect * check.weight > 0
    assert not any(check.passed for check in other.values())


def test_a_check_needs_a_difference_the_weight_s_sign_and_a_silent_control():
    """A strong effect everywhere says nothing for the rule; nor does a weak one, or one the other way."""
    good = CausalCheck(3, weight=0.2, effect=1.0, control=0.1, t=3.0, pairs=20)
    assert good.passed
    assert good._replace(weight=-0.2, effect=-1.0, t=-3.0).passed
    assert not good._replace(weight=-0.2).passed
    assert not good._replace(control=-0.3, t=9.0).passed
    assert not good._replace(t=2.9).passed
