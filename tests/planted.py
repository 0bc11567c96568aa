"""Models written by hand whose neurons compute known conjunctions, so that a rule finder can be wrong."""

from collections.abc import Sequence

import numpy as np
import torch

from interp.positions import EMPTY, MINE, THEIRS, Positions
from interp.rules import Condition, Rule, vocabulary
from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.vocab import PLAYABLE, square_to_token

_CLASSES = {"blank": (EMPTY,), "occupied": (THEIRS, MINE), "theirs": (THEIRS,), "mine": (MINE,)}


def planted_rules(
    positions: Positions, n: int, seed: int, states: Sequence[str] = ("blank", "theirs", "mine")
) -> list[Rule]:
    """Conjunctions of one to three conditions or rays, each of whose conditions matters at these positions.

    A condition that the rules of the game imply cannot be recovered by anybody: so each, left out, must
    admit at least a hundredth more positions.
    """
    rng = np.random.default_rng(seed)
    parts = [part for part in vocabulary() if all(c.state in states for c in part)]
    rules: list[Rule] = []
    while len(rules) < n:
        picked = rng.choice(len(parts), rng.integers(1, 4), replace=False)
        conditions = tuple(sorted({c for i in picked for c in parts[i]}))
        one_a_square = len({c.square for c in conditions}) == len(conditions) <= 5
        if one_a_square and _matters(conditions, positions):
            rules.append(Rule(conditions))
    return rules


def _matters(conditions: tuple[Condition, ...], positions: Positions) -> bool:
    support = Rule(conditions).holds(positions).sum()
    wider = [Rule(tuple(c for c in conditions if c != left)) for left in conditions]
    admitted = [rule.holds(positions).sum() for rule in wider]
    return 40 <= support <= len(positions.ply) / 2 and min(admitted) >= 1.02 * support


def model_of_the_board(rules: Sequence[Rule]) -> OthelloGPT:
    """One block, a neuron a rule; the residual stream that enters is `board_stream`, and attention is silent.

    The stream always holds 65 ones and else zeros, so LayerNorm is one shift and one scale.
    """
    model = OthelloGPT(GPTConfig(n_layers=1, d_model=256, n_heads=1, d_head=1, d_mlp=len(rules)))
    mean = 65 / 256
    scale = (mean * (1 - mean) + model.cfg.eps) ** 0.5
    with torch.no_grad():
        model.blocks[0].attn.W_O.zero_()
        mlp = model.blocks[0].mlp
        mlp.W_in.zero_()
        for neuron, rule in enumerate(rules):
            for square, state in rule.conditions:
                columns = [192 + square] if state == "played" else _columns(square, state)
                mlp.W_in[columns, neuron] = 8 * scale
            total = mlp.W_in[:, neuron].sum() / scale
            mlp.b_in[neuron] = total * mean - 8 * (len(rule.conditions) - 0.5)
    return model


def _columns(square: int, state: str) -> list[int]:
    return [64 * k + square for k in _CLASSES[state]]


def board_stream(positions: Positions) -> torch.Tensor:
    """Ones for the class of each square and for the last move, [position 1 256]."""
    parts = [positions.classes == k for k in (EMPTY, THEIRS, MINE)]
    parts.append(positions.played[:, None] == np.arange(64))
    return torch.from_numpy(np.concatenate(parts, 1)).float()[:, None]


def model_of_moves(rules: Sequence[Rule]) -> OthelloGPT:
    """One block that reads tokens: a head counts which squares were played, a neuron a rule of blank,
    occupied and played squares.

    Columns: 0 to 60 the current token, 61 and 62 "first move" and "later move" (one is 1), 63 to 125 the
    means of these over all moves so far, 126 nothing. A square that was played has mean 1/t, and so has
    "first move" itself: their difference has the sign that is wanted, whatever t and LayerNorm's scale.
    """
    cfg = GPTConfig(n_layers=1, d_model=127, n_heads=1, d_head=63, d_mlp=len(rules))
    model = OthelloGPT(cfg)
    mean = 2 / 127
    scale = (mean * (1 - mean) + cfg.eps) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        model.W_E[:, :61] = torch.eye(61)
        model.W_pos[0, 61], model.W_pos[1:, 62] = 1, 1
        attn = model.blocks[0].attn  # W_Q = 0: every head looks at all moves alike
        attn.W_V[0, :63], attn.b_V[0] = scale * torch.eye(63), mean
        attn.W_O[0, :, 63:126] = torch.eye(63)
        for neuron, rule in enumerate(rules):
            model.blocks[0].mlp.W_in[:, neuron] = 1e3 * _reads_moves(rule)
    return model


def _reads_moves(rule: Rule) -> torch.Tensor:
    weights = torch.zeros(127)
    for square, state in rule.conditions:
        token = square_to_token(square)
        if state == "played":  # 0 where it was the last move, -10 elsewhere
            weights[token] += 10
            weights[[61, 62]] -= 10
        else:
            weights[63 + token] += 1 if state == "occupied" else -1
    n_occupied = sum(state == "occupied" for _, state in rule.conditions)
    weights[63 + 61] -= n_occupied - 0.5
    weights[126] = -weights.sum()  # LayerNorm's mean cancels
    return weights


def rules_of_moves(positions: Positions, n: int, seed: int) -> list[Rule]:
    """Planted rules that the list of moves alone decides."""
    rules = planted_rules(positions, 4 * n, seed, ("blank", "occupied", "played"))
    return [r for r in rules if all(c.square in PLAYABLE for c in r.conditions)][:n]
