"""What hypothesis draws of the game: whole games and boards, shrinking towards short and plain ones."""

import numpy as np
from hypothesis import strategies as st

from othello_gpt import board


@st.composite
def games(draw, min_plies: int = 1, max_plies: int = 60) -> np.ndarray:
    """A legal game: small integers, each of which picks among the legal moves; squares, without padding."""
    picks = draw(st.lists(st.integers(0, 20), min_size=min_plies, max_size=max_plies))
    state, to_move, squares = board.START, board.BLACK, []
    for pick in picks:
        legal = np.flatnonzero(board.legal_moves(state, to_move))
        if not len(legal):
            to_move = -to_move
            legal = np.flatnonzero(board.legal_moves(state, to_move))
        if not len(legal):
            break
        squares.append(legal[pick % len(legal)])
        record = board.play(np.array(squares))
        state, to_move = record.state[-1], record.to_move[-1] or 1
    return np.array(squares)
