"""How many games a second does the board play, and draw?

Against plain Python loops over one game at a time, on a few games; both agree square by square.
"""

import time

import numpy as np
from paired import compare, report

from othello_gpt import board

STEPS = [(dr, dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1) if dr or dc]


def main() -> None:
    games = board.random_games(300, seed=0)
    np.testing.assert_array_equal(board.play(games).state[:, -1], play_with_loops(games))
    row = compare(
        "300 games, last board",
        lambda: board.play(games),
        lambda: play_with_loops(games),
        pairs=3,
        warm_up=1,
    )
    start = time.perf_counter()
    many = board.random_games(100_000, seed=1)
    drawn = time.perf_counter()
    for first in range(0, len(many), 10_000):
        board.play(many[first : first + 10_000])
    played = time.perf_counter()
    report(
        "Vectorised bitboards against plain loops.",
        [row],
        random_games_100000_seconds=round(drawn - start, 2),
        play_100000_seconds=round(played - drawn, 2),
    )


def play_with_loops(games) -> np.ndarray:
    """The last board of each game, square by square."""
    boards = []
    for game in games.tolist():
        state, side = board.START.astype(int).tolist(), 1
        for square in game:
            if square < 0:
                break
            row, col = divmod(square, 8)
            flips = _flips(state, row, col, side)
            if not flips:  # the side had to pass
                side = -side
                flips = _flips(state, row, col, side)
            for r, c in [*flips, (row, col)]:
                state[r][c] = side
            side = -side
        boards.append(state)
    return np.array(boards)


def _flips(state, row: int, col: int, side: int) -> list[tuple[int, int]]:
    flips = []
    for dr, dc in STEPS:
        line, r, c = [], row + dr, col + dc
        while 0 <= r < 8 and 0 <= c < 8 and state[r][c] == -side:
            line.append((r, c))
            r, c = r + dr, c + dc
        if 0 <= r < 8 and 0 <= c < 8 and state[r][c] == side:
            flips += line
    return flips


if __name__ == "__main__":
    main()
