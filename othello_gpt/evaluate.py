"""How well does a model know the rules? Measured after every ply of games, with intervals over games.

A model that knows them, and that random moves cannot be foretold, gives every legal reply the same
probability. Three distances from that: how often its best move is illegal, how much probability lies on
illegal moves, and the divergence of its distribution from the uniform one over the legal replies.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from othello_gpt import board
from othello_gpt.bootstrap import Estimate, bootstrap_ratio
from othello_gpt.games import games_to_tokens
from othello_gpt.model import OthelloGPT
from othello_gpt.vocab import PLAYABLE

HELD_OUT_SEED = 2024  # games of this seed are for evaluation; `train` refuses it


class Scores(NamedTuple):
    """How far from the rules a model is after each ply. What is not `live` counts for nothing."""

    illegal: Float[Tensor, "*batch pos"]  # 1 where the most likely move is illegal, else 0
    illegal_mass: Float[Tensor, "*batch pos"]  # probability of all illegal moves together
    kl: Float[
        Tensor, "*batch pos"
    ]  # nats, of the uniform distribution over replies from the model's
    live: Bool[Tensor, "*batch pos"]  # the game goes on


# Illegal top moves, each on games of the model's own kind. Li et al. 2022, section 2.3; Hazineh et al. 2023,
# view_trained_GPT.ipynb (100 % minus their legal rate; layers and heads).
PUBLISHED = {
    "Li et al., random games": {"illegal": 0.0001},
    "Li et al., championship games": {"illegal": 0.0517},
    "Li et al., untrained": {"illegal": 0.9329},
    "Hazineh et al., 8 layers, 8 heads": {"illegal": 0.0008},
    "Hazineh et al., 4 layers, 8 heads": {"illegal": 0.0032},
    "Hazineh et al., 4 layers, 1 head": {"illegal": 0.0025},
    "Hazineh et al., 1 layer, 8 heads": {"illegal": 0.0136},
    "Hazineh et al., 1 layer, 1 head": {"illegal": 0.0501},
}


def legal_tokens(
    games: Int[ndarray, "game ply"],
) -> tuple[Bool[Tensor, "game pos d_vocab"], Bool[Tensor, "game pos"]]:
    """Which tokens may come next after each of the first 59 moves, and where the game goes on at all."""
    record = board.play(games)
    legal = torch.from_numpy(record.legal[:, :59]).flatten(2)[..., list(PLAYABLE)]
    none = torch.zeros_like(legal[..., :1])
    return torch.cat([none, legal], -1), torch.from_numpy(record.to_move[:, :59] != 0)


def score(
    log_probs: Float[Tensor, "*batch pos d_vocab"], legal: Bool[Tensor, "*batch pos d_vocab"]
) -> Scores:
    """The three distances at each position; zero where there is no legal reply."""
    live, n_legal = legal.any(-1), legal.sum(-1).clamp(min=1).to(log_probs.dtype)
    illegal = ~legal.gather(-1, log_probs.argmax(-1, keepdim=True))[..., 0]
    illegal_mass = log_probs.exp().masked_fill(legal, 0).sum(-1)
    kl = -log_probs.masked_fill(~legal, 0).sum(-1) / n_legal - n_legal.log()
    return Scores(illegal * live.to(kl.dtype), illegal_mass * live, kl * live, live)


@torch.no_grad()
def evaluate(
    model: OthelloGPT, games: Int[ndarray, "game ply"], batch: int = 128, progress: bool = False
) -> Scores:
    """The scores of a model on games, `batch` of them at a time: squares, -1 after a game's end."""
    from tqdm import trange

    if len(games) == 0:
        raise ValueError("there are no games to evaluate on: give at least one.")
    n_ctx, d_vocab, parts = model.cfg.n_ctx, model.cfg.d_vocab, []
    for i in trange(0, len(games), batch, disable=not progress, leave=False):
        some = games[i : i + batch]
        log_probs = model(games_to_tokens(some)[:, :n_ctx]).float().log_softmax(-1)
        legal = F.pad(
            legal_tokens(some)[0][:, :n_ctx], (0, d_vocab - 61)
        )  # no other token is a move
        scores = score(log_probs, legal.to(log_probs.device))
        parts.append(Scores(*(each.cpu() for each in scores)))
    return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def summary(scores: Scores) -> dict[str, Estimate]:
    """The three distances over all live positions, with intervals over games.

    A rate of which no case was seen has the interval 0 to 0: read it as "below 3 / games".
    """
    n_live = scores.live.sum(1).float()
    return {
        name: bootstrap_ratio((getattr(scores, name) * scores.live).sum(1), n_live)
        for name in _COLUMNS
    }


def summary_by_ply(scores: Scores) -> dict[int, dict[str, Estimate]]:
    """The same after each ply, counted from 0, that some game goes on after."""
    by_ply = {
        name: bootstrap_ratio(getattr(scores, name) * scores.live, scores.live.float())
        for name in _COLUMNS
    }
    plies = scores.live.any(0).nonzero()[:, 0].tolist()
    return {
        ply: {name: Estimate(*(part[ply] for part in parts)) for name, parts in by_ply.items()}
        for ply in plies
    }


_COLUMNS = {  # heading, and how a number is written
    "illegal": ("illegal top moves", "{:.2%}"),
    "illegal_mass": ("illegal probability", "{:.2%}"),
    "kl": ("KL from uniform, nats", "{:.4f}"),
}


def table(rows: Mapping[str, Mapping[str, Estimate | float]], kind: str = "model") -> str:
    """One line for each row, its 95 % intervals in brackets; published figures have none.

    Args:
        rows: by their name, what `summary` gives, or `PUBLISHED`.
        kind: what the names are, for the heading.
    """
    width = max(map(len, [kind, *rows]))
    lines = [f"{kind:{width}}" + "".join(f"  {heading:25}" for heading, _ in _COLUMNS.values())]
    for name, figures in rows.items():
        cells = (_written(figures[key], key) if key in figures else "" for key in _COLUMNS)
        lines.append(f"{name:{width}}" + "".join(f"  {cell:25}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def _written(figure: Estimate | float, key: str) -> str:
    form = _COLUMNS[key][1]
    if not isinstance(figure, Estimate):
        return form.format(figure)
    value, low, high = (form.format(part.item()) for part in figure)
    return f"{value} ({low} to {high})"
