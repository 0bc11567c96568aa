"""A game move by move: the board, what each layer believes of it, what the model predicts, and who writes that."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interp.attribution import direct_logit_attribution
from interp.probe_training import resid_site
from interp.probe_types import check_reads_mine
from interp.probes import LinearProbe
from othello_gpt import ActivationCache, OthelloGPT, board
from othello_gpt.games import games_to_tokens
from othello_gpt.vocab import token_to_square, values_on_board


class Playback(NamedTuple):
    """After each move from which somebody still moves, up to the model's context."""

    squares: Int[ndarray, " ply"]
    record: board.Record
    probabilities: Float[Tensor, "ply d_vocab"]
    believers: tuple[str, ...]  # whose probes: "layer 4", or "embeddings"
    believed: Float[Tensor, "ply believer 8 8"]  # P(mine) - P(theirs)
    wrong: Bool[Tensor, "ply believer 8 8"]  # where the likeliest class is not the true one
    tokens: tuple[int, ...]  # the move whose logit is split: the likeliest unless told
    labels: tuple[str, ...]  # components, and "bias"
    parts: Float[Tensor, "ply component"]  # direct logit attribution, in logits
    heads: Float[
        Tensor, "ply layer head"
    ]  # the same by head; with their biases they sum to the layers'


@torch.no_grad()
def playback(
    model: OthelloGPT,
    probes: Sequence[LinearProbe],
    squares: Int[ndarray, " ply"],
    tokens: Mapping[int, int] | None = None,
) -> Playback:
    """Follows one game.

    Args:
        probes: of empty, theirs and mine, of any layers, -1 (the embeddings) among them.
        squares: the game; the model sees 59 moves at most.
        tokens: by ply, the move whose logit is split there.

    Raises:
        ValueError: a probe that asks something else, or does not read this model's stream.
    """
    check_reads_mine(probes, model)
    record = board.play(squares)
    n = int((record.to_move[: model.cfg.n_ctx] != 0).sum())
    record, squares = board.Record(*(field[:n] for field in record)), squares[:n]
    logits, cache = model.run_with_cache(games_to_tokens(squares[None]))
    classes = torch.from_numpy(board.piece_classes(record)).long()
    beliefs = [probe.probabilities(cache[resid_site(probe.layer)][0]) for probe in probes]
    signs = logits.new_tensor([0.0, -1, 1])  # empty, theirs, mine
    chosen = logits[0, :, 1:].argmax(-1).add(1).tolist()
    for ply, token in (tokens or {}).items():
        chosen[ply] = token
    split = [direct_logit_attribution(model, cache, token, p) for p, token in enumerate(chosen)]
    return Playback(
        squares=squares,
        record=record,
        probabilities=logits[0].softmax(-1),
        believers=tuple("embeddings" if p.layer == -1 else f"layer {p.layer}" for p in probes),
        believed=torch.stack([belief @ signs for belief in beliefs], 1),
        wrong=torch.stack([belief.argmax(-1) != classes for belief in beliefs], 1),
        tokens=tuple(chosen),
        labels=split[0].labels,
        parts=torch.stack([each.values[:, 0] for each in split]),
        heads=_by_head(model, cache, chosen),
    )


def _by_head(
    model: OthelloGPT, cache: ActivationCache, tokens: Sequence[int]
) -> Float[Tensor, "ply layer head"]:
    """What each head writes directly to the logit of each position's own token."""
    directions = model.ln_final.w[:, None] * model.W_U[:, list(tokens)]
    directions = directions - directions.mean(0)  # [d_model, ply]
    scale = cache["ln_final.hook_scale"][0]
    by_layer = [
        torch.einsum("phd,hdm,mp->ph", cache["z", layer][0], block.attn.W_O, directions)
        for layer, block in enumerate(model.blocks)
    ]
    return torch.stack(by_layer, 1) / scale[..., None]


def as_data(played: Playback) -> dict[str, Any]:
    """What the report's slider shows, as plain lists; numbers to four decimals, squares 0 to 63."""
    record, discs = played.record, np.array([".", "b", "w"])
    boards = values_on_board(played.probabilities)
    return {
        "moves": played.squares.tolist(),
        "to_move": record.to_move.tolist(),
        "state": ["".join(discs[state.ravel()]) for state in record.state],
        "legal": [np.flatnonzero(legal).tolist() for legal in record.legal],
        "probabilities": [
            [None if value != value else round(value, 4) for value in ply]
            for ply in boards.flatten(1).tolist()
        ],
        "believers": list(played.believers),
        "believed": _rounded(played.believed.flatten(2)),
        "wrong": [
            [layer.flatten().nonzero()[:, 0].tolist() for layer in ply] for ply in played.wrong
        ],
        "explained": [token_to_square(token) for token in played.tokens],
        "labels": list(played.labels),
        "parts": _rounded(played.parts),
        "heads": _rounded(played.heads),
    }


def _rounded(values: Tensor) -> list:
    return np.round(values.double().numpy(), 4).tolist()
