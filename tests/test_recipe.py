"""Recipes: objectives, learning rates, command lines, and what is no recipe."""

import math
import shlex
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from othello_gpt import board
from othello_gpt.cli import main
from othello_gpt.evaluate import HELD_OUT_SEED, legal_tokens
from othello_gpt.games import games_to_tokens
from othello_gpt.recipe import OBJECTIVES, PRESETS, Recipe, command, learning_rate, recipe_of


def test_the_two_objectives_agree_on_average_over_the_move():
    """The loss on each legal reply, averaged, is the loss against all of them: in float64, forfeits included."""
    games = board.random_games(6, seed=2)
    tokens, (legal, _) = games_to_tokens(games), legal_tokens(games)
    log_probs = torch.randn(legal.shape, dtype=torch.float64).log_softmax(-1)
    averaged = torch.zeros(legal.shape[:2], dtype=torch.float64)
    for token in range(1, 61):
        loss = OBJECTIVES["next-move"](log_probs, torch.full((6, 60), token), legal)
        averaged += loss * legal[..., token] / legal.sum(-1).clamp(min=1)

    assert has_forfeit(games)
    assert torch.allclose(OBJECTIVES["legal-moves"](log_probs, tokens, legal), averaged, atol=1e-12)


def has_forfeit(games) -> bool:
    mover = board.play(games).mover
    return bool(((mover[:, 1:] == mover[:, :-1]) & (mover[:, 1:] != 0)).any())


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    """Over the parts of the budget that the recipe says."""
    recipe = Recipe(games=160, warm_up=0.1, cool_down=0.5)
    rates = [learning_rate(progress, recipe) for progress in (0, 0.05, 0.1, 0.5, 0.75, 1)]

    assert rates == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    assert learning_rate(0.3, replace(recipe, warm_up=0, cool_down=0)) == 1


@given(
    preset=st.sampled_from(sorted(PRESETS)),
    games=st.integers(1, 10**9) | st.sampled_from([preset.games for preset in PRESETS.values()]),
    minutes=st.none() | st.floats(0.1, 100),
    lr=st.floats(1e-6, 1),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    float32=st.booleans(),
    init=st.sampled_from([None, "my model/weights.pth"]),
    seed=st.sampled_from([1, 3]),
)
def test_the_command_of_a_recipe_gives_that_recipe(preset, float32, seed, **changes):
    """What the card says, typed in again, trains the same."""
    given = {name: value for name, value in changes.items() if value is not None}
    given |= {"seed": seed} if "init" in given else {}
    recipe = recipe_of(preset, float32=float32, **given)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("othello_gpt.train.train", lambda folder, recipe, **_: seen.append(recipe))
        main(shlex.split(command(recipe))[1:])

    assert seen == [recipe]


def test_what_is_no_recipe_is_named():
    """Unknown choices, no budget or a negative one, the seed kept for evaluation, what is no number or part."""
    for changes, message in (
        ({"objective": "win"}, "`objective` is 'win', but must be one of legal-moves, next-move"),
        ({"optimizer": "sgd"}, "must be one of muon, adamw"),
        ({"games": None}, "needs a budget: give `games`, `minutes` or both"),
        ({"games": -5}, "`games` is -5, but must be a number above 0"),
        ({"games": None, "minutes": -1}, "`minutes` is -1, but must be a number above 0"),
        ({"batch": 0}, "`batch` is 0, but must be"),
        ({"lr": math.nan}, "`lr` is nan, but must be"),
        ({"adam_lr": math.inf}, "`adam_lr` is inf, but must be"),
        ({"warm_up": 5}, "`warm_up` is 5, but must be a part of the budget, 0 to 1"),
        ({"cool_down": -1}, "`cool_down` is -1, but must be a part of the budget"),
        ({"seed": HELD_OUT_SEED}, "whose games are for evaluation: take another"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**{"games": 160} | changes)
    with pytest.raises(ValueError, match="may have seen .* give the `seed` of games that are new"):
        recipe_of("small", init="small")
