"""Rules: planted ones are recovered exactly, random neurons have none, and scores are plain counts."""

import numpy as np
import pytest
import torch
from planted import board_stream, model_of_moves, model_of_the_board, planted_rules, rules_of_moves

from interp.positions import positions_of, stream_neurons
from interp.rules import Condition, Rule, find_rules, rays, score_rule, vocabulary
from othello_gpt import OthelloGPT, board
from othello_gpt.vocab import label_to_square

TRAINING, HELD_OUT = board.random_games(300, seed=1), board.random_games(60, seed=2)


def activations_of(model, squares):
    positions, post = zip(*stream_neurons(model, squares, [0], len(squares)), strict=True)
    return positions[0], post[0][0].numpy()


def test_planted_rules_of_the_board_are_recovered_exactly():
    """Every conjunction of blank, theirs and mine, rays among them, that a model's neurons compute."""
    positions, held_out = positions_of(TRAINING), positions_of(HELD_OUT)
    planted = planted_rules(positions, 40, seed=0)
    model = model_of_the_board(planted)
    with torch.no_grad():
        runs = [
            model.run_with_cache(board_stream(p), "post0", start_at_layer=0)[1]
            for p in (positions, held_out)
        ]
    training, later = (run["post", 0][:, 0].numpy() for run in runs)

    assert find_rules(positions, training) == planted
    for neuron, rule in enumerate(planted):
        assert np.array_equal(later[:, neuron] > 0, rule.holds(held_out))
        if rule.holds(held_out).any():
            assert score_rule(rule, held_out, later[:, neuron]).f1 == 1


def test_planted_rules_of_a_model_of_moves_are_recovered_exactly():
    """A transformer that reads tokens, attention and LayerNorm included, streamed over games."""
    planted = rules_of_moves(positions_of(TRAINING), 12, seed=4)
    positions, activations = activations_of(model_of_moves(planted), TRAINING)

    assert len(planted) == 12
    assert {c.state for rule in planted for c in rule.conditions} == {"blank", "occupied", "played"}
    assert find_rules(positions, activations) == planted


def test_a_neuron_that_mostly_fires_is_described_by_its_silence():
    """The same conditions, told of the rarer side."""
    positions = positions_of(TRAINING)
    rule = Rule((Condition(16, "blank"), Condition(25, "theirs")), silent=True)
    assert find_rules(positions, 0.5 - rule.holds(positions)[:, None]) == [rule]


@pytest.mark.slow
def test_random_neurons_have_no_rule():
    """Random input weights in the packaged model: of 60, none has a rule above 0.8 on other games."""
    model = OthelloGPT.from_pretrained()
    mlp = model.blocks[3].mlp
    with torch.no_grad():
        mlp.W_in.normal_(std=model.cfg.d_model**-0.5)
        mlp.b_in.uniform_(-1, 0)
    scores = []
    found = None
    for squares in (TRAINING[:150], HELD_OUT):
        positions, post = next(stream_neurons(model, squares, [3], len(squares)))
        activations = post[0, :, :60].numpy()
        found = find_rules(positions, activations) if found is None else found
        scores = [score_rule(r, positions, a) for r, a in zip(found, activations.T, strict=True)]

    assert max(score.f1 for score in scores) < 0.8
    assert max(score.explained for score in scores) < 0.5


def test_scores_are_plain_counts():
    """Precision, recall, F1 and the variance between the two cases, counted by hand."""
    positions = positions_of(HELD_OUT)
    rule = Rule((Condition(label_to_square("C0"), "blank"), Condition(25, "theirs")))
    holds = (positions.classes[:, 16] == 0) & (positions.classes[:, 25] == 1)
    activations = np.random.default_rng(0).normal(size=len(holds)) + holds
    fires = activations > 0
    score = score_rule(rule, positions, activations)
    means = np.where(holds, activations[holds].mean(), activations[~holds].mean())

    assert np.array_equal(rule.holds(positions), holds)
    assert score.support == holds.sum()
    assert score.precision == pytest.approx((holds & fires).sum() / holds.sum())
    assert score.recall == pytest.approx((holds & fires).sum() / fires.sum())
    assert score.f1 == pytest.approx(2 / (1 / score.precision + 1 / score.recall))
    assert score.explained == pytest.approx(means.var() / activations.var())


def test_a_square_beyond_a_ray_of_an_empty_board_is_a_legal_move():
    """The 960 rays are what the engine calls legal, and a blank square is legal exactly where one holds."""
    positions = positions_of(HELD_OUT[:5])
    record = board.play(HELD_OUT[:5])
    legal = record.legal[positions.game, positions.ply].reshape(-1, 64)
    reached = np.zeros_like(legal)
    for ray in rays():
        square = _before(ray)
        blank = positions.classes[:, square] == 0
        reached[:, square] |= Rule(ray).holds(positions) & blank

    assert len(rays()) == len(set(rays())) == 960
    assert np.array_equal(reached, legal)


def _before(ray: tuple[Condition, ...]) -> int:
    first, second = ray[0].square, ray[1].square
    return 2 * first - second


def test_rules_are_told_in_words():
    """Labels and states; a state that does not exist is refused with those that do."""
    rule = Rule((Condition(16, "blank"), Condition(25, "theirs"), Condition(34, "mine")))

    assert str(rule) == "fires when C0 blank, D1 theirs, E2 mine"
    assert str(rule._replace(silent=True)).startswith("silent when C0 blank")
    assert len(vocabulary()) == 5 * 64 - 3 * 4 + 960
    with pytest.raises(ValueError, match="states are blank, occupied, theirs, mine, played"):
        Condition(16, "black").holds(positions_of(HELD_OUT[:1]))


def test_a_silent_rule_foretells_firing_where_it_does_not_hold():
    """Both readings of a rule, at every position one of them."""
    positions = positions_of(HELD_OUT[:5])
    rule = Rule((Condition(16, "blank"),))

    assert np.array_equal(rule.fires(positions), rule.holds(positions))
    assert np.array_equal(rule._replace(silent=True).fires(positions), ~rule.holds(positions))


def test_a_neuron_without_a_rule_is_said_to_have_none():
    """One that never fires, and one that always does."""
    positions = positions_of(HELD_OUT[:5])
    constant = np.tile([-1.0, 1.0], (len(positions.ply), 1))

    words = [str(rule) for rule in find_rules(positions, constant)]
    assert words == ["hardly ever fires: no rule", "nearly always fires: no rule"]
