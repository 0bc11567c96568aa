"""Squares, tokens and labels: every way there and back, and what is refused."""

import numpy as np
import pytest
import torch

from othello_gpt import vocab

PLAYABLE = [s for s in range(64) if s not in (27, 28, 35, 36)]


def test_every_conversion_has_an_inverse():
    """All 60 tokens and all 64 squares."""
    assert [vocab.square_to_token(s) for s in PLAYABLE] == list(range(1, 61))
    assert [vocab.token_to_square(t) for t in range(61)] == [-1, *PLAYABLE]
    for square in range(64):
        assert vocab.label_to_square(vocab.square_to_label(square)) == square
        assert vocab.li_to_square(vocab.square_to_li(square)) == square
        assert vocab.standard_to_square(vocab.square_to_standard(square)) == square
    for token in range(1, 61):
        assert vocab.label_to_token(vocab.token_to_label(token)) == token


def test_the_dialects_read_one_label_as_different_squares():
    """A much-played opening move: f5 is square 37 to players, 44 to Li et al., F5 is 45 here."""
    assert vocab.standard_to_square("f5") == 37
    assert vocab.li_to_square("f5") == 44
    assert vocab.label_to_square("F5") == 45
    assert (vocab.label_to_token("C0"), vocab.label_to_token("D1"), vocab.label_to_token("F0")) == (
        17,
        26,
        37,
    )


def test_arrays_and_tensors_keep_their_kind():
    """NumPy integers too, which much-copied helpers turn into None."""
    squares = np.array([[0, 63], [26, -1]], dtype=np.int8)

    assert vocab.square_to_token(squares).tolist() == [[1, 60], [27, 0]]
    tokens = vocab.square_to_token(torch.from_numpy(squares))
    assert isinstance(tokens, torch.Tensor)
    assert tokens.dtype == torch.int64
    assert torch.equal(vocab.token_to_square(tokens), torch.from_numpy(squares).long())
    assert vocab.square_to_token(np.int64(63)) == 60


@pytest.mark.parametrize(
    ("convert", "value", "error", "message"),
    [
        (
            vocab.square_to_token,
            27,
            ValueError,
            r"square 27 \(D3\) is a centre square.*token_to_square",
        ),
        (vocab.square_to_token, 64, ValueError, "64 is no square: squares are 0 to 63"),
        (
            vocab.token_to_square,
            61,
            ValueError,
            "61 is no token: tokens are 0 to 60; use `square_to_token`",
        ),
        (vocab.token_to_square, np.array([3, -1]), ValueError, "-1 is no token"),
        (
            vocab.square_to_token,
            torch.tensor([1.0]),
            TypeError,
            "squares must be integers.*float32",
        ),
        (vocab.token_to_square, np.array([True]), TypeError, "tokens must be integers.*bool"),
        (vocab.label_to_square, "F8", ValueError, "'F8' has no digit 0 to 7.*li_to_square"),
        (vocab.li_to_square, "f0", ValueError, "'f0' has no digit 1 to 8"),
        (vocab.label_to_square, "I1", ValueError, "'I1' is no label"),
        (vocab.square_to_label, 64, ValueError, "64 is no square"),
        (vocab.token_to_label, 0, ValueError, "token 0 is padding"),
    ],
)
def test_what_cannot_be_theirs_is_refused(convert, value, error, message):
    """With what was expected, and the conversion that was probably meant."""
    with pytest.raises(error, match=message):
        convert(value)


@pytest.mark.parametrize("n", [60, 61])
def test_values_go_to_their_squares(n):
    """Each token's value on its square; the centre holds the fill."""
    values = torch.arange(61 - n, 61).double().expand(2, n)
    boards = vocab.values_on_board(values, fill=-1)

    assert boards.shape == (2, 8, 8)
    assert [int(boards[1].flatten()[s]) for s in PLAYABLE] == list(range(1, 61))
    assert (boards[0, 3:5, 3:5] == -1).all()
    with pytest.raises(ValueError, match="has 64 entries at its end"):
        vocab.values_on_board(torch.zeros(64))
