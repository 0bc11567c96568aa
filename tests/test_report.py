"""The report and the command line: figures equal what the calls give, the page is self-contained."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from interp import report
from interp.arena import calculate_attn_and_mlp_probe_score_contributions
from interp.patching import patch_sweep, patching_metric
from othello_gpt import OthelloGPT, board, cli
from othello_gpt.games import example_pair, games_to_tokens
from othello_gpt.verify import _circuit_figures, verify_checkpoint
from othello_gpt.vocab import label_to_token, square_to_label


@pytest.fixture(scope="module")
def story():
    pair = report.Pair(*example_pair())
    return report.tell(OthelloGPT.from_pretrained(), report.shipped_probes(), pair, n_games=20)


def test_figures_equal_what_the_calls_give(story):
    """Log-probabilities, sweep and attribution, computed again by hand."""
    model, pair = OthelloGPT.from_pretrained(), story.pair
    clean, corrupted = (games_to_tokens(game[None]) for game in pair[:2])
    f0 = label_to_token("F0")
    with torch.no_grad():
        logits, other = model(clean), model(corrupted)
    swept = patch_sweep(model, clean, corrupted, patching_metric(logits, other, f0))

    assert story.log_probs[0] == pytest.approx(logits[0, -1].log_softmax(-1)[f0].item(), abs=1e-5)
    assert story.log_probs[1] == pytest.approx(other[0, -1].log_softmax(-1)[f0].item(), abs=1e-5)
    for site, effects in swept.items():
        assert torch.allclose(story.effects[site], effects, atol=1e-5)
        row = " ".join(f"{value:7.3f}" for value in effects.tolist())
        assert f"{site:9} {row}" in report.summary(story)
    assert story.contributions.values.sum().item() == pytest.approx(
        logits[0, -1, f0].item(), abs=1e-3
    )
    assert "C7 D5 D6 D7 F0 F1 F3 G1 G2 G4 G5 G6 G7" in report.summary(story)


def test_what_layers_write_is_what_the_exercise_calls_give(story):
    """The boards of attention and MLPs, at the square of which the summary tells, turned by the last move."""
    model, probes = OthelloGPT.from_pretrained(), report.shipped_probes()
    probe = probes[int(story.accuracy.by_layer.argmax())]
    _, cache = model.run_with_cache(games_to_tokens(story.pair.clean[None]))
    expected = calculate_attn_and_mlp_probe_score_contributions(
        cache, probe.mine, probe.layer, 0, len(story.pair.clean) - 1
    )
    text = report.summary(story)

    assert story.last_layer == probe.layer
    assert story.record.flipped[-1].flat[story.turned]
    assert f'"mine" at {square_to_label(story.turned)}' in text
    for part, boards in zip(("attn", "mlp"), expected, strict=True):
        assert torch.allclose(story.written_by(part), boards, atol=1e-4)
        assert (
            " ".join(f"{v:7.2f}" for v in story.written_by(part).flatten(1)[:, story.turned])
            in text
        )


def test_the_page_is_one_file_that_asks_for_nothing(story, tmp_path):
    """Well-formed, no addresses but SVG's namespace, under 2 MB, the same figures."""
    report.write_page(story, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    parser = HTMLParser()
    parser.feed(page)

    assert len(page) < 2_000_000
    assert not re.search(r"<(script|img|link|iframe)[^>]*(src|href)=\"(?!data:)", page)
    assert set(re.findall(r"https?://[^\"'< ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert f"mlp_out, 5: {story.effects['mlp_out'][5]:.4f}" in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_pair_is_found_for_any_game():
    """Another last move, and a reply that is legal after the given one only."""
    game = board.random_games(1, seed=4)[0, :15]
    pair = report.find_pair(OthelloGPT.from_pretrained(), game)
    clean, corrupted = board.play(pair.clean), board.play(pair.corrupted)

    assert np.array_equal(pair.clean[:-1], pair.corrupted[:-1])
    assert pair.clean[-1] != pair.corrupted[-1]
    assert clean.legal[-1].flat[pair.answer]
    assert not corrupted.legal[-1].flat[pair.answer]
    with pytest.raises(ValueError, match="at least two moves"):
        report.find_pair(OthelloGPT.from_pretrained(), game[:1])


def test_the_commands_run(tmp_path, capsys):
    """report, verify, info; an error is one line and exit status 1."""
    page = tmp_path / "page.html"
    game = "C3 C4 C5 E2 F2 C2 D2"

    assert cli.main(["report", "--game", game, "--out", str(page)]) == 0
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


def test_verify_passes_the_packaged_model_and_fails_an_untrained_one(tmp_path):
    """Facts are told, checks pass or fail, and the command's status follows."""
    good = verify_checkpoint(n_games=30)
    OthelloGPT(OthelloGPT.from_pretrained().cfg).save_pretrained(tmp_path / "random")
    bad = verify_checkpoint(tmp_path / "random", n_games=30)

    assert good.ok
    assert "PASS folding keeps log-probabilities" in str(good)
    assert not bad.ok
    assert "FAIL illegal top moves" in str(bad)


def test_the_published_figures_fail_on_another_model_of_that_size():
    """Log-probabilities, both rows of the sweep and the neuron are compared, and random weights have none."""
    torch.manual_seed(0)
    checks = _circuit_figures(OthelloGPT())

    assert [check.name for check in checks] == [
        "log-probability of F0",
        "sweep, attn_out",
        "sweep, mlp_out",
        "L5N1393 to logits",
    ]
    assert not any(check.passed for check in checks)
