"""Games from files of every format, and what is refused."""

import pickle

import numpy as np
import pytest
import torch

from othello_gpt import board
from othello_gpt.games import example_pair, games_to_tokens, load_games, parse_moves
from othello_gpt.vocab import square_to_li, square_to_standard, square_to_token

GAMES = board.random_games(40, seed=11)


def rows(games):
    return [[int(s) for s in game if s >= 0] for game in games]


def written(path, games, square_to_text, separator=""):
    path.write_text("\n".join(separator.join(map(square_to_text, game)) for game in rows(games)))
    return path


def test_arrays_of_squares_and_tokens_are_told_apart(tmp_path):
    """By values that only one kind can have."""
    for name, stored in (("squares", GAMES), ("tokens", square_to_token(GAMES))):
        np.save(tmp_path / f"{name}.npy", stored)
        assert np.array_equal(load_games(tmp_path / f"{name}.npy"), GAMES)


def test_texts_are_read_in_their_notation(tmp_path):
    """Standard by default, Li's when said; both are legal, and they differ."""
    standard = written(tmp_path / "a.txt", GAMES, square_to_standard)
    li = written(tmp_path / "b.txt", GAMES, square_to_li, " ")

    assert np.array_equal(load_games(standard), GAMES)
    assert np.array_equal(load_games(li, notation="li"), GAMES)
    transposed = np.where(GAMES < 0, -1, GAMES % 8 * 8 + GAMES // 8)
    assert np.array_equal(load_games(li), transposed)


def test_texts_with_headers_numbers_comments_and_passes_are_read(tmp_path):
    """As exported from WTHOR: passes are implied by the rules and left out."""
    blocks = []
    for game in rows(GAMES[:3]):
        moves = [square_to_standard(s) for s in game]
        numbered = " ".join(f"{i // 2 + 1}. {m}" if i % 2 == 0 else m for i, m in enumerate(moves))
        blocks.append(f'[Event "x"]\n[Result "40-24"]\n\n{numbered} -- pass {{end}} 40-24\n')
    (tmp_path / "games.pgn").write_text("\n".join(blocks))

    assert np.array_equal(load_games(tmp_path / "games.pgn"), GAMES[:3])


def test_wthor_files_are_read(tmp_path):
    """Moves are 10 * row + column from 1, 0 after the end."""
    records = b""
    for game in GAMES:
        moves = [0 if s < 0 else 10 * (s // 8 + 1) + s % 8 + 1 for s in game.tolist()]
        records += bytes(8) + bytes(moves)
    header = bytes([20, 26, 1, 1]) + len(GAMES).to_bytes(4, "little") + bytes(8)
    (tmp_path / "WTH_2026.wtb").write_bytes(header + records)

    assert np.array_equal(load_games(tmp_path / "WTH_2026.wtb"), GAMES)
    (tmp_path / "cut.wtb").write_bytes((header + records)[:-5])
    with pytest.raises(ValueError, match="its header promises 40 games"):
        load_games(tmp_path / "cut.wtb")
    for byte in (10, 19, 9, 90, 255):
        damaged = bytearray(header + records)
        damaged[16 + 68 + 8 + 20] = byte
        (tmp_path / "damaged.wtb").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"game 1, ply 20: {byte} is no move.*is damaged"):
            load_games(tmp_path / "damaged.wtb")


def test_pickled_lists_are_read_and_code_in_them_is_not(tmp_path):
    """Li et al.'s files are lists of lists; a pickle can hold anything."""
    (tmp_path / "games.pickle").write_bytes(pickle.dumps(rows(GAMES)))
    (tmp_path / "evil.pickle").write_bytes(pickle.dumps([print]))

    assert np.array_equal(load_games(tmp_path / "games.pickle"), GAMES)
    with pytest.raises(ValueError, match="wants to run builtins.print"):
        load_games(tmp_path / "evil.pickle")


def test_what_cannot_be_games_is_refused(tmp_path):
    """Values that do not tell, other shapes, illegal moves, unknown notation."""
    np.save(tmp_path / "short.npy", GAMES[:1, :1])
    np.save(tmp_path / "float.npy", GAMES.astype(float))
    (tmp_path / "illegal.txt").write_text("f5d6\nf5f5\n")
    (tmp_path / "word.txt").write_text("f5x9\n")

    with pytest.raises(ValueError, match="may hold squares or tokens.*kind='square'"):
        load_games(tmp_path / "short.npy")
    assert load_games(tmp_path / "short.npy", kind="square")[0, 0] == GAMES[0, 0]
    np.save(tmp_path / "big.npy", np.array([[19, 275]]))
    with pytest.raises(ValueError, match="big.npy' holds 19 to 275; squares are 0 to 63"):
        load_games(tmp_path / "big.npy")
    with pytest.raises(ValueError, match="holds float64"):
        load_games(tmp_path / "float.npy")
    with pytest.raises(ValueError, match="illegal.txt.*game 1, ply 1: white cannot play E5"):
        load_games(tmp_path / "illegal.txt")
    with pytest.raises(ValueError, match=r"word.txt', game 1: 'x9' is no label|'x9'"):
        load_games(tmp_path / "word.txt")
    with pytest.raises(
        ValueError, match="`kind` is for .npy files: leave it out for .*illegal.txt"
    ):
        load_games(tmp_path / "illegal.txt", kind="square")
    for name in ("games.npy", "games.pickle", "games.wtb"):
        with pytest.raises(ValueError, match=f"`notation` is for texts: leave it out for .*{name}"):
            load_games(tmp_path / name, notation="li")
    with pytest.raises(ValueError, match="`notation` is 'french'"):
        parse_moves("C3", "french")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pickle", b"", "is damaged or cut short"),
        ("empty.npy", b"", "is damaged or cut short"),
        ("cut.pickle", pickle.dumps(rows(GAMES))[:-9], "is damaged or cut short"),
        ("ints.pickle", pickle.dumps([1, 2]), "does not hold games, each at most 60 squares"),
        ("big.pickle", pickle.dumps([[19, 275]]), "does not hold games, each at most 60 squares"),
        ("long.pickle", pickle.dumps([[19] * 61]), "does not hold games, each at most 60 squares"),
        ("float.pickle", pickle.dumps([[19.9, 18.4]]), "does not hold games, each at most 60"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    """Nothing, half a file, no lists, what is no square, more moves than a game has."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=f"{name}.*({message})"):
        load_games(tmp_path / name)


def test_the_model_reads_the_first_59_moves():
    """Tokens in the order of play, 0 after the end."""
    tokens = games_to_tokens(GAMES)

    assert tokens.shape == (40, 59)
    assert tokens.dtype == torch.int64
    assert np.array_equal(tokens.numpy(), square_to_token(GAMES)[:, :59])
    assert games_to_tokens(example_pair().clean).shape == (1, 21)
