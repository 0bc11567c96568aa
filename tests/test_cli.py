"""The commands: they run, their errors are one line, and their exit status tells."""

import numpy as np
import pytest
import torch
from model_strategies import random_model
from test_weights import SMALL, to_mingpt

import othello_gpt
from othello_gpt import OthelloGPT, board, cli
from othello_gpt.games import example_pair
from othello_gpt.vocab import label_to_square, square_to_label


def test_the_commands_run(tmp_path, capsys):
    """report, verify, info; an error is one line and exit status 1."""
    page = tmp_path / "page.html"
    game = "C3 C4 C5 E2 F2 C2 D2"

    assert cli.main(["report", "--game", game, "--pairs", "10", "--out", str(page)]) == 0
    assert page.stat().st_size > 50_000
    assert "Neurons of layer 5" in capsys.readouterr().out
    assert cli.main(["info"]) == 0
    assert "interp:" in capsys.readouterr().out
    assert cli.main(["report", "--game", "C3 A0", "--out", str(page)]) == 1
    assert "white cannot play A0; legal moves are C2 C4 E2" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path / "nothing.pth")]) == 1
    assert "no file and no folder here" in capsys.readouterr().err


def test_every_way_of_naming_a_pair_is_heeded():
    """A game, its other last move, its reply, each alone or together; a game and a seed exclude each other."""
    model, example = OthelloGPT.from_pretrained(), example_pair()
    corrupted = " ".join(map(square_to_label, example.corrupted))

    def chosen(*arguments):
        return cli._pair_and_game(cli._parser().parse_args(["report", *arguments]), model)

    for arguments in ([], ["--answer", "F0", "--corrupted", corrupted]):
        pair, game = chosen(*arguments)
        assert all(map(np.array_equal, pair, example))
        assert len(game) == 59
    assert chosen("--answer", "G2")[0].answer == label_to_square("G2")
    assert np.array_equal(chosen("--corrupted", corrupted)[0].corrupted, example.corrupted)
    pair, game = chosen(
        "--random", "3", "--answer", square_to_label(chosen("--random", "3")[0].answer)
    )
    assert np.array_equal(pair.clean, board.random_games(1, 3)[0, :21])
    assert len(game) == 60
    with pytest.raises(ValueError, match="no other last move takes A0 away"):
        chosen("--answer", "A0")
    with pytest.raises(ValueError, match="not this other last move takes A0 away"):
        chosen("--answer", "A0", "--corrupted", corrupted)
    with pytest.raises(SystemExit):
        chosen("--random", "3", "--game", "C3 C4")


def test_a_checkpoint_converts_there_and_back(tmp_path, capsys):
    """To TransformerLens's names and back to a folder of ours, bit by bit; what is there is not overwritten."""
    theirs, ours = tmp_path / "tl.pth", tmp_path / "ours"
    packaged = OthelloGPT.from_pretrained(fold=False)
    packaged.save_pretrained(tmp_path / "packaged")

    assert cli.main(["convert", str(tmp_path / "packaged"), str(theirs)]) == 0
    assert cli.main(["convert", str(theirs), str(ours)]) == 0
    returned = OthelloGPT.from_pretrained(ours, fold=False).state_dict()
    assert all(torch.equal(returned[name], value) for name, value in packaged.state_dict().items())
    assert "embed.W_E" in torch.load(theirs)
    assert cli.main(["convert", str(theirs), str(ours)]) == 1
    assert "is there already: name another place" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial"))
    assert cli.main(["convert", str(theirs), str(tmp_path / "new" / "tl.pth")]) == 0
    assert cli.main(["convert", str(theirs), str(tmp_path / "x.safetensors")]) == 1
    assert "neither a folder's name nor a file.pth" in capsys.readouterr().err


def test_a_mingpt_checkpoint_is_read_with_the_heads_that_one_says(tmp_path, capsys):
    """Its layout does not tell; every command that reads one takes `--n-heads`."""
    stored, heads = tmp_path / "gpt.ckpt", ["--n-heads", "2"]
    torch.save(to_mingpt(random_model(SMALL, dtype=torch.float32)), stored)

    assert cli.main(["convert", str(stored), str(tmp_path / "ours"), *heads]) == 0
    assert OthelloGPT.from_pretrained(tmp_path / "ours").cfg.n_heads == 2
    assert cli.main(["verify", str(tmp_path / "ours"), "--n-heads", "4"]) == 1
    assert "the checkpoint has 2 heads: give that, or leave it out" in capsys.readouterr().err
    cli.main(["verify", str(stored), *heads])
    assert "n_heads=2" in capsys.readouterr().out
    assert cli.main(["evaluate", str(stored), "--games", "2", *heads]) == 0
    few = ["--games", "2", *heads]
    assert cli.main(["probe", str(stored), "--held-out", "2", "--targets", "mine", *few]) == 0
    assert cli.main(["intervene", str(stored), "--n", "1", "--presets", "set", *few]) == 0


def test_the_benchmarks_need_a_checkout(monkeypatch, tmp_path, capsys):
    """An installed package has none, and the command says how to come by them."""
    monkeypatch.setattr(othello_gpt, "__file__", str(tmp_path / "othello_gpt" / "__init__.py"))

    assert cli.main(["bench"]) == 1
    assert "Clone the repository" in capsys.readouterr().err


def test_published_cases_come_alone(capsys):
    """The options of our own cases beside them are refused, and so are no cases."""
    for options in (["--n", "1"], ["--unnatural"]):
        assert cli.main(["intervene", "--cases", "cases.pkl", *options]) == 1
        assert "leave `--n` and `--unnatural` out" in capsys.readouterr().err
    assert cli.main(["intervene", "--n", "0"]) == 1
    assert "there must be at least one case" in capsys.readouterr().err
