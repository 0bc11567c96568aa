"""Pairs of games to sweep over: random moves, which cost what legal ones do."""

import torch


def random_pair(n_games: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean and the corrupted tokens of games of 21 moves that differ in the last move."""
    clean = torch.randint(1, 60, (n_games, 21))
    return clean, torch.cat([clean[:, :-1], clean[:, -1:] + 1], 1)
