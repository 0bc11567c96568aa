"""Pairs of games that differ in their last move only, found by rule and ranked, for averages over many of them.

A sweep of one pair is an anecdote. Here are hundreds, alike in what changes: one reply that is legal after
the clean game and not after the corrupted one.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from interp.metrics import LastMetric, patching_metric
from interp.patching import last_logits
from othello_gpt import OthelloGPT, board
from othello_gpt.games import Pair
from othello_gpt.vocab import square_to_label, square_to_token


class RankedPair(NamedTuple):
    """A pair, how little its boards differ, and how sure the model is of the difference."""

    pair: Pair
    game: int  # which of the given games it was made from
    distance: int  # how many squares of the two boards differ
    changes: int  # how many replies, on squares empty in both, are legal after one only
    drop: float  # by how much the answer's log-probability falls from clean to corrupted, in nats


def find_pairs(
    model: OthelloGPT,
    games: Int[ndarray, "game ply"],
    n_moves: Iterable[int] = (21,),
    max_changes: int | None = 1,
    square: int | None = None,
    per_game: int = 1,
) -> list[RankedPair]:
    """Pairs made from games by exchanging a move: the nearest boards first, then the surest model.

    A pair is a game cut after some moves, the same game with another legal last move, and a reply that is
    legal after the first only. The same side moves next in both. The squares of the two exchanged moves do not
    count as replies: one of them is occupied, which is no question of lines.

    Args:
        games: squares, -1 after a game's end; for instance `board.random_games(1000)`.
        n_moves: after how many moves to cut.
        max_changes: how many replies may be legal after one of the two only; 1 means the answer alone, None
            any number.
        square: only pairs in which this square is mine after one game and theirs after the other.
        per_game: how many pairs a game may give at most, so that an average is one over games; none comes twice.
    """
    games = np.asarray(games)
    found = [pair for n in n_moves for pair in _candidates(games, n, max_changes, square)]
    ranked = sorted(_with_drops(model, found), key=lambda pair: (pair.distance, -pair.drop))
    n_taken = np.zeros(len(games), dtype=int)
    kept: dict[bytes, RankedPair] = {}  # games that begin alike give the same pair
    for ranking in ranked:
        key = b"".join(np.int8(field).tobytes() for field in ranking.pair)
        if key not in kept and n_taken[ranking.game] < per_game:
            n_taken[ranking.game] += 1
            kept[key] = ranking
    return list(kept.values())


def sure_pairs(
    model: OthelloGPT, n_pairs: int, seed: int = 1, n_moves: Iterable[int] = (16, 21, 26)
) -> list[Pair]:
    """Pairs from random games for an average: one reply changes, and the model is sure of it.

    They are no fair sample: of one pair a game from four times as many games, those with the nearest boards,
    and at equal distance the largest drops of the reply's log-probability, all of more than a nat.

    Raises:
        ValueError: no pair was found.
    """
    ranked = find_pairs(model, board.random_games(4 * n_pairs, seed), n_moves)
    pairs = [each.pair for each in ranked if each.drop > 1][:n_pairs]
    if not pairs:
        raise ValueError(f"no pair was found in {4 * n_pairs} games: average over more.")
    return pairs


def find_pair(
    model: OthelloGPT,
    clean: Int[ndarray, " ply"],
    corrupted: Int[ndarray, " ply"] | None = None,
    answer: int | None = None,
) -> Pair:
    """The other last move, and the reply, for which the model's belief differs most.

    Among the moves legal in place of the last one, and the replies legal after the given move only, the
    pair whose log-probability the model lowers most.

    Args:
        corrupted: the game with the other last move, if that is settled and only the reply is sought.
        answer: the reply, a square, if that is settled and only the other last move is sought.

    Raises:
        ValueError: no other last move, or not this one, takes a reply away, or not that reply.
    """
    if len(clean) < 2:
        raise ValueError("a pair needs games of at least two moves.")
    game = np.asarray(clean)[None]
    found = find_pairs(model, game, (len(clean),), max_changes=None, per_game=64**2)
    if corrupted is not None:
        found = [each for each in found if np.array_equal(each.pair.corrupted, corrupted)]
    if answer is not None:
        found = [each for each in found if each.pair.answer == answer]
    if not found:
        move = "no other last move" if corrupted is None else "not this other last move"
        reply = "a reply" if answer is None else square_to_label(answer)
        raise ValueError(
            f"{move} takes {reply} away: give a longer game, another last move or another reply."
        )
    return max(found, key=lambda ranked: ranked.drop).pair


def pair_tokens(
    pairs: Sequence[Pair],
) -> tuple[list[Int[Tensor, " _pos"]], list[Int[Tensor, " _pos"]], Int[Tensor, " pair"]]:
    """Clean games, corrupted games and answers as tokens: what `patch_sweep` and its metrics take."""
    clean, corrupted = (_tokens([pair[side] for pair in pairs]) for side in (0, 1))
    answers = [square_to_token(pair.answer) for pair in pairs]
    return clean, corrupted, torch.tensor(answers, dtype=torch.long)


def _tokens(games: list) -> list[Int[Tensor, " _pos"]]:
    squares = np.concatenate([np.zeros(0, dtype=np.int8), *games])  # all at once: it is faster
    return list(torch.from_numpy(square_to_token(squares)).split([len(game) for game in games]))


def pairs_metric(model: OthelloGPT, pairs: Sequence[Pair]) -> LastMetric:
    """`patching_metric` of each pair and its answer: 1 is the clean run, 0 the corrupted one."""
    clean, corrupted, answers = pair_tokens(pairs)
    return patching_metric(last_logits(model, clean), last_logits(model, corrupted), answers)


def _candidates(
    games: Int[ndarray, "game ply"], n_moves: int, max_changes: int | None, square: int | None
) -> Iterator[RankedPair]:
    """All pairs that the rules allow, their `drop` still unknown (nan)."""
    long_enough = np.flatnonzero((games[:, :n_moves] >= 0).all(1)) if n_moves >= 2 else []
    if not len(long_enough) or games.shape[1] < n_moves:
        return
    cut = games[long_enough, :n_moves]
    clean = board.play(cut)
    which, move = np.nonzero(clean.legal[:, -2].reshape(len(cut), 64))
    others = move != cut[which, -1]
    which, move = which[others], move[others]
    corrupted_games = np.concatenate([cut[which, :-1], move[:, None]], 1)
    corrupted = board.play(corrupted_games)

    def last(field: ndarray) -> ndarray:
        return field[:, -1]

    empty = (last(clean.state)[which] == 0) & (last(corrupted.state) == 0)
    legal, other_legal = last(clean.legal)[which] & empty, last(corrupted.legal) & empty
    differ = last(clean.state)[which] != last(corrupted.state)
    changes = (legal ^ other_legal).sum((1, 2))
    to_move = last(clean.to_move)[which]
    good = (to_move == last(corrupted.to_move)) & (to_move != 0)
    if max_changes is not None:
        good &= changes <= max_changes
    if square is not None:
        both = last(clean.state)[which] * last(corrupted.state)
        good &= both[:, square // 8, square % 8] == -1
    gained = (legal & ~other_legal).reshape(-1, 64)
    for i, answer in zip(*np.nonzero(gained & good[:, None]), strict=True):
        pair = Pair(cut[which[i]].astype(np.int8), corrupted_games[i].astype(np.int8), int(answer))
        game, distance = int(long_enough[which[i]]), int(differ[i].sum())
        yield RankedPair(pair, game, distance, int(changes[i]), float("nan"))


@torch.no_grad()
def _with_drops(model: OthelloGPT, found: Sequence[RankedPair]) -> list[RankedPair]:
    clean, corrupted, answers = pair_tokens([ranked.pair for ranked in found])
    log_probs = [
        last_logits(model, games)[:, 0].log_softmax(-1).gather(1, answers[:, None].to(model.device))
        for games in (clean, corrupted)
    ]
    drops = (log_probs[0] - log_probs[1])[:, 0].tolist()
    return [ranked._replace(drop=drop) for ranked, drop in zip(found, drops, strict=True)]
