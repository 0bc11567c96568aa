"""The commands: they run, their errors are one line, and their exit status tells."""

import torch

import othello_gpt
from othello_gpt import OthelloGPT, cli


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


def test_the_benchmarks_need_a_checkout(monkeypatch, tmp_path, capsys):
    """An installed package has none, and the command says how to come by them."""
    monkeypatch.setattr(othello_gpt, "__file__", str(tmp_path / "othello_gpt" / "__init__.py"))

    assert cli.main(["bench"]) == 1
    assert "Clone the repository" in capsys.readouterr().err
