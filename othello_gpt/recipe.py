"""All that decides a training run's weights: the model's sizes, the objective, the budget, the learning rates."""

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from othello_gpt.evaluate import HELD_OUT_SEED
from othello_gpt.model import GPTConfig


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, but for the machine's rounding."""

    model: GPTConfig = field(default_factory=GPTConfig)
    games: int | None = None  # the budget, over which the learning rate rises and falls
    minutes: float | None = None  # the same in time; with both, whichever is spent first
    batch: int = 128  # games a step, of all processes together
    objective: str = "legal-moves"  # or "next-move"
    optimizer: str = "muon"  # of the block matrices; or "adamw"
    lr: float = 0.02  # of Muon
    adam_lr: float = 0.002  # of whatever AdamW trains
    warm_up: float = 0.02  # part of the budget over which the learning rates rise from 0
    cool_down: float = 0.5  # part of the budget, its last, over which they fall to 0
    seed: int = 1  # of the first weights and of the games
    bf16: bool = True  # matrix products in bfloat16; weights and sums stay float32
    init: str | None = None  # weights to start from (`from_pretrained`), with a seed new to them

    def __post_init__(self) -> None:
        for name, known in (("objective", OBJECTIVES), ("optimizer", ("muon", "adamw"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` is '{getattr(self, name)}', but must be one of {', '.join(known)}."
                )
        if self.games is None and self.minutes is None:
            raise ValueError("a recipe needs a budget: give `games`, `minutes` or both.")
        for name in ("games", "minutes", "batch", "lr", "adam_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}, but must be a number above 0.")
        for name in ("warm_up", "cool_down"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but must be a part of the budget, 0 to 1."
                )
        if self.seed == HELD_OUT_SEED:
            raise ValueError(
                f"`seed` is {self.seed}, whose games are for evaluation: take another."
            )


def next_move(
    log_probs: Float[Tensor, "game pos d_vocab"],
    tokens: Int64[Tensor, "game ply"],
    legal: Bool[Tensor, "game pos d_vocab"],
) -> Float[Tensor, "game pos"]:
    """Cross-entropy on the move that was played, in nats, as the published models were trained."""
    return F.nll_loss(log_probs.mT, tokens[:, 1:], ignore_index=0, reduction="none")


def legal_moves(
    log_probs: Float[Tensor, "game pos d_vocab"],
    tokens: Int64[Tensor, "game ply"],
    legal: Bool[Tensor, "game pos d_vocab"],
) -> Float[Tensor, "game pos"]:
    """Cross-entropy against the uniform distribution over the legal replies, in nats.

    It is what `next_move` is on average over the move to be drawn: the same minimum and the same expected
    gradient, without the noise of the draw.
    """
    return -log_probs.masked_fill(~legal, 0).sum(-1) / legal.sum(-1).clamp(min=1)


OBJECTIVES: dict[str, Callable[..., Float[Tensor, "game pos"]]] = {
    "legal-moves": legal_moves,
    "next-move": next_move,
}

PRESETS = {
    "tiny": Recipe(
        GPTConfig(n_layers=2, d_model=128, n_heads=4, d_head=32, d_mlp=512), games=10_000, batch=64
    ),
    "small": Recipe(GPTConfig(d_model=256, d_head=32, d_mlp=1024), games=2_000_000),
    "full": Recipe(GPTConfig(), games=20_000_000, batch=1024),
}


def given_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of a recipe and not None."""
    names = {field.name for field in fields(Recipe)}
    return {key: value for key, value in options.items() if key in names and value is not None}


def recipe_of(preset: str, *, float32: bool = False, **changes: Any) -> Recipe:
    """A preset with changes, in bfloat16 where the hardware has it; minutes replace its budget of games.

    Raises:
        ValueError: `init` without a `seed`.
    """
    if "init" in changes and "seed" not in changes:
        raise ValueError(
            f"`init` is '{changes['init']}', weights that may have seen the games of seed 1, the default: "
            "give the `seed` of games that are new to them."
        )
    if "minutes" in changes:
        changes = {"games": None} | changes
    where = torch.cuda if torch.cuda.is_available() else torch.cpu
    has_bf16 = getattr(where, "is_bf16_supported", torch.cpu._is_avx512_bf16_supported)()
    return replace(PRESETS[preset], **changes, bf16=has_bf16 and not float32)


def learning_rate(progress: float, recipe: Recipe) -> float:
    """The part of the full learning rate in use when `progress`, 0 to 1, of the budget is spent."""
    rising = progress / recipe.warm_up if recipe.warm_up else 1.0
    falling = (1 - progress) / recipe.cool_down if recipe.cool_down else 1.0
    return min(1.0, rising, max(falling, 0.0))


def command(recipe: Recipe) -> str:
    """The command line that trains by this recipe."""
    for name, preset in PRESETS.items():
        if preset.model == recipe.model:
            default = vars(preset) | ({"games": None} if recipe.minutes else {})  # as `recipe_of`
            default |= {"seed": None} if recipe.init else {}
            given = [
                f" --{key.replace('_', '-')} {shlex.quote(str(value))}"
                for key, value in vars(recipe).items()
                if value not in (None, default[key]) and key != "bf16"
            ]
            return f"othello-gpt train --preset {name}{''.join(given)}" + " --float32" * (
                not recipe.bf16
            )
    return f"train(folder, {recipe})"
