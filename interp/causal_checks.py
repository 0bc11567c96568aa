"""What single neurons do: one position replayed with one of its neurons held at another value, a row for each.

Earlier positions do not see the change, so their keys and values stay: a row costs one token step from the
neuron's layer up.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from interp.neurons import unembedding
from interp.positions import Positions, positions_of
from interp.rules import Rule
from othello_gpt import ActivationCache, OthelloGPT
from othello_gpt.games import games_to_tokens
from othello_gpt.model import Attention


def replay_cache(
    model: OthelloGPT, squares: Int[ndarray, "game ply"]
) -> tuple[Float[Tensor, "game pos d_vocab"], ActivationCache]:
    """Logits of games, and what `ablated_logits` needs to replay their positions in every layer."""
    wanted = ("attn.hook_k", "attn.hook_v", "hook_post", "hook_resid_post")
    tokens = games_to_tokens(squares)[:, : model.cfg.n_ctx]
    with torch.no_grad():
        return model.run_with_cache(tokens, lambda name: name.endswith(wanted))


@torch.no_grad()
def ablated_logits(
    model: OthelloGPT,
    cache: ActivationCache,
    layer: int,
    neuron: Int[Tensor, " row"],
    game: Int[Tensor, " row"],
    pos: Int[Tensor, " row"],
    value: float = 0.0,
) -> Float[Tensor, "row d_vocab"]:
    """The logits at a position of a game with one of its neurons held at `value` there, row by row.

    Args:
        cache: from `replay_cache`.
        neuron: of `layer`, one a row.
    """
    neuron, game, pos = (index.to(model.device) for index in (neuron, game, pos))
    change = value - cache["post", layer][game, pos, neuron]
    resid = cache["resid_post", layer][game, pos]
    resid = resid + change[:, None] * model.blocks[layer].mlp.W_out[neuron]
    for above in range(layer + 1, model.cfg.n_layers):
        block = model.blocks[above]
        past = cache["k", above][game], cache["v", above][game]
        z = _attend(block.attn, block.ln1(resid), past, pos)
        resid = resid + block.attn.write(z)
        resid = resid + block.mlp(block.ln2(resid))
    return model.unembed(resid)


def _attend(
    attn: Attention,
    x: Float[Tensor, "row d_model"],
    past: tuple[Float[Tensor, "row pos head d_head"], Float[Tensor, "row pos head d_head"]],
    pos: Int[Tensor, " row"],
) -> Float[Tensor, "row head d_head"]:
    """z of each row, which sees its game's earlier positions as they were, and itself as it is."""
    rows = torch.arange(len(x), device=x.device)
    k, v = past[0].clone(), past[1].clone()
    q, k[rows, pos], v[rows, pos] = attn.read(x)
    scores = torch.einsum("rhd,rkhd->rhk", q, k)
    later = torch.arange(k.shape[1], device=x.device) > pos[:, None, None]  # [row, 1, key_pos]
    pattern = (scores / k.shape[-1] ** 0.5).masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("rhk,rkhd->rhd", pattern, v)


class CausalCheck(NamedTuple):
    """What a neuron adds to the logit of the move it writes most: where its rule says that it fires, and at
    positions of the same plies where the rule says that it does not."""

    token: int  # the move whose logit the output weights change most
    weight: float  # how they change it, in logits for one unit of activation, less the moves' mean
    effect: float  # logits that are gone when the neuron is silenced where it should fire
    control: float  # the same where it should not
    t: float  # their difference over its standard error
    pairs: int

    @property
    def passed(self) -> bool:
        """The sign of the weight, five times the control's effect at least, and a t of 3 or more."""
        sign = 1 if self.weight > 0 else -1
        return sign * self.t >= 3 and sign * self.effect >= 5 * abs(self.control)


def causal_checks(
    model: OthelloGPT,
    squares: Int[ndarray, "game ply"],
    layer: int,
    rules: dict[int, Rule],
    max_pairs: int = 24,
    seed: int = 0,
) -> dict[int, CausalCheck]:
    """Whether neurons of a layer do where their rules hold what they do not where they fail.

    The logit is taken less the mean of the sixty moves', which no choice depends on. Neurons whose rule
    offers fewer than four matched pairs are left out.
    """
    logits, cache = replay_cache(model, squares)
    positions = positions_of(squares, n_ctx=model.cfg.n_ctx)
    weights = model.W_out[layer].detach() @ unembedding(model)  # [neuron, move]
    weights = weights - weights.mean(1, keepdim=True)
    checks = {}
    for neuron, rule in rules.items():
        rng = np.random.default_rng((seed, layer, neuron))  # whoever else is checked
        rows = _matched(rule.fires(positions), positions, max_pairs, rng)
        if rows.shape[1] < 4:
            continue
        move = int(weights[neuron].abs().argmax())
        game, pos = (torch.from_numpy(places[rows.ravel()]) for places in positions[:2])
        ablated = ablated_logits(model, cache, layer, torch.full_like(pos, neuron), game, pos)
        lost = (logits[game.to(model.device), pos.to(model.device)] - ablated)[:, 1:]
        lost = (lost[:, move] - lost.mean(1)).double().unflatten(0, (2, -1))
        checks[neuron] = _compared(move + 1, weights[neuron, move].item(), lost)
    return checks


def _compared(token: int, weight: float, lost: Float[Tensor, "side=2 pair"]) -> CausalCheck:
    difference = lost[0] - lost[1]
    error = difference.std() / len(difference) ** 0.5
    t = (difference.mean() / error).item() if error > 0 else 0.0
    effect, control = lost.mean(1).tolist()
    return CausalCheck(token, weight, effect, control, t, len(difference))


def _matched(
    fires: ndarray, positions: Positions, max_pairs: int, rng: np.random.Generator
) -> Int[ndarray, "side=2 pair"]:
    """Rows where the rule holds, and for each another of the same ply where it does not."""
    pairs = []
    for row in rng.permutation(np.flatnonzero(fires))[: 2 * max_pairs]:
        others = np.flatnonzero(~fires & (positions.ply == positions.ply[row]))
        if len(others) and len(pairs) < max_pairs:
            pairs.append((row, rng.choice(others)))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).T
