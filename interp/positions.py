"""Positions of many games, one a row, and the neurons' activations there, a batch of games at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8
from numpy import ndarray
from torch import Tensor

from othello_gpt import OthelloGPT, board
from othello_gpt.games import games_to_tokens

EMPTY, THEIRS, MINE = 0, 1, 2  # the probes' classes; `mine` belongs to whoever moves next


class Positions(NamedTuple):
    """Positions from which somebody still moves; each row is one."""

    game: Int[ndarray, " position"]
    ply: Int[ndarray, " position"]
    classes: Int8[ndarray, "position square=64"]  # 0 empty, 1 theirs, 2 mine
    played: Int8[ndarray, " position"]  # the square of the last move


Predicate = Callable[[Positions], Bool[ndarray, " position"]]


def positions_of(
    squares: Int[ndarray, "game ply"], first_game: int = 0, n_ctx: int = 59
) -> Positions:
    """The positions of whole games that a model of that context sees, while somebody moves next."""
    record = board.play(squares)
    game, ply = np.nonzero(record.to_move[:, :n_ctx])
    classes = board.piece_classes(record)[game, ply].reshape(-1, 64)
    return Positions(game + first_game, ply, classes, np.asarray(squares, np.int8)[game, ply])


@torch.no_grad()
def stream_neurons(
    model: OthelloGPT,
    squares: Int[ndarray, "game ply"],
    layers: Sequence[int],
    batch_size: int = 64,
) -> Iterator[tuple[Positions, Float[Tensor, "layer position d_mlp"]]]:
    """Batches of games as positions, with the activations of all neurons of some layers there.

    Memory does not grow with the number of games: each batch is forgotten when the next is made.
    """
    sites = [f"blocks.{layer}.mlp.hook_post" for layer in layers]
    stop = max(layers) + 1
    for start in range(0, len(squares), batch_size):
        games = squares[start : start + batch_size]
        positions = positions_of(games, start, model.cfg.n_ctx)
        tokens = games_to_tokens(games)[:, : model.cfg.n_ctx]
        _, cache = model.run_with_cache(tokens, sites, stop_at_layer=stop)
        rows = torch.from_numpy(positions.game - start), torch.from_numpy(positions.ply)
        yield positions, torch.stack([cache[site][rows].cpu() for site in sites])
