"""Measuring a model against the rules: the distances, their intervals, the table and the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import random_model

from othello_gpt import GPTConfig, board
from othello_gpt.bootstrap import Estimate
from othello_gpt.cli import main
from othello_gpt.evaluate import (
    _COLUMNS,
    PUBLISHED,
    Scores,
    evaluate,
    legal_tokens,
    score,
    summary,
    summary_by_ply,
    table,
)
from othello_gpt.games import games_to_tokens
from othello_gpt.vocab import square_to_token
from othello_gpt.weights import save_pretrained

GAMES = board.random_games(40, seed=11)
SMALL = GPTConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=16)


def test_the_legal_tokens_are_the_replies_of_whoever_moves():
    """Square by square, with forfeits; nothing after a game's end, and padding never."""
    legal, live = legal_tokens(GAMES)
    record = board.play(GAMES)

    assert (record.mover[:, 1:] == record.mover[:, :-1])[record.mover[:, 1:] != 0].any()  # forfeits
    for game, ply in np.ndindex(5, 59):
        squares = np.flatnonzero(record.legal[game, ply])
        assert legal[game, ply].nonzero()[:, 0].tolist() == square_to_token(squares).tolist()
    assert torch.equal(live, legal.any(-1))
    assert not live.all()


def test_a_model_that_knows_the_rules_is_at_no_distance():
    """The uniform distribution over the legal replies: no illegal move, no mass, no divergence."""
    legal, live = legal_tokens(GAMES)
    uniform = legal.double() / legal.sum(-1, keepdim=True).clamp(min=1)
    scores = score(uniform.log(), legal)

    assert torch.equal(scores.live, live)
    assert scores.illegal.sum() == scores.illegal_mass.sum() == 0
    assert scores.kl.abs().max() < 1e-12


@given(st.integers(0, 2**16))
def test_the_distances_are_what_their_definitions_say(seed):
    """Against plain sums over tokens, in float64."""
    logits = 3 * torch.randn(1, 4, 61, generator=torch.Generator().manual_seed(seed)).double()
    legal = torch.rand(1, 4, 61, generator=torch.Generator().manual_seed(seed)) < 0.2
    scores = score(logits.log_softmax(-1), legal)

    for pos in range(4):
        p, replies = logits[0, pos].softmax(-1).tolist(), legal[0, pos].nonzero()[:, 0].tolist()
        if not replies:
            assert not any(values[0, pos] for values in scores)
            continue
        share = 1 / len(replies)
        assert scores.illegal[0, pos] == (max(range(61), key=p.__getitem__) not in replies)
        assert math.isclose(
            scores.illegal_mass[0, pos], 1 - sum(p[t] for t in replies), abs_tol=1e-12
        )
        kl = sum(share * math.log(share / p[t]) for t in replies)
        assert math.isclose(
            scores.kl[0, pos], kl, abs_tol=1e-6
        )  # the logarithm of a count is float32


def test_evaluating_in_batches_changes_nothing():
    """Seven games at a time or all at once; and every position counts for itself."""
    model = random_model(SMALL)
    whole, single = evaluate(model, GAMES), evaluate(model, GAMES, batch=7)
    with torch.no_grad():
        direct = score(
            model(games_to_tokens(GAMES)).float().log_softmax(-1), legal_tokens(GAMES)[0]
        )

    for a, b, c in zip(whole, single, direct, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-5)
        assert torch.allclose(a.float(), c.float(), atol=1e-5)


def test_plies_weighted_by_their_positions_give_the_whole():
    """The mean over all positions is the mean of the plies' means, by how many positions each has."""
    scores = evaluate(random_model(SMALL), GAMES)
    counts = scores.live.sum(0)
    by_ply, whole = summary_by_ply(scores), summary(scores)

    assert list(by_ply) == counts.nonzero()[:, 0].tolist()
    for name, interval in whole.items():
        total = sum(by_ply[ply][name].value.item() * counts[ply].item() for ply in by_ply)
        assert math.isclose(total / counts.sum().item(), interval.value.item(), rel_tol=1e-5)


def test_what_is_not_live_counts_for_nothing():
    """Whatever stands at positions after a game's end."""
    scores = evaluate(random_model(SMALL), GAMES)
    spoilt = Scores(*(torch.where(scores.live, s, 7.0) for s in scores[:3]), scores.live)

    assert summary(spoilt) == summary(scores)


def test_the_table_has_a_line_for_each_model_and_each_published_figure():
    """The published ones without intervals."""
    rows = {"mine": summary(evaluate(random_model(SMALL), GAMES))}
    lines = table(rows | PUBLISHED).splitlines()

    assert lines[0].split()[:3] == ["model", "illegal", "top"]
    assert lines[1].startswith("mine")
    assert lines[1].count(" to ") == 3
    assert lines[2].endswith("0.01%")
    assert len(lines) == 2 + len(PUBLISHED)


@pytest.mark.parametrize("source", ["random", "file"])
def test_the_command_compares_models_on_random_games_or_those_of_a_file(tmp_path, capsys, source):
    """One table, the plies, and the figures as JSON that agree with the library's."""
    for name, seed in (("a", 0), ("b", 1)):
        save_pretrained(random_model(SMALL, seed, torch.float32), tmp_path / name)
    np.save(tmp_path / "games.npy", GAMES)
    models, figures = [str(tmp_path / name) for name in "ab"], tmp_path / "figures.json"
    which = (
        ["--games", "40", "--seed", "11"]
        if source == "random"
        else ["--file", str(tmp_path / "games.npy")]
    )

    assert main(["evaluate", *models, *which, "--by-ply", "--json", str(figures)]) == 0
    out, stored = capsys.readouterr().out, json.loads(figures.read_text())
    assert out.startswith("40 games")
    assert "Li et al., random games" in out
    for name, seed in zip(models, (0, 1), strict=True):
        expected = summary(evaluate(random_model(SMALL, seed, torch.float32), GAMES))["kl"]
        assert np.allclose(stored["models"][name]["kl"], expected, rtol=1e-3)
        assert "58" in stored["by_ply"][name]
        assert f"{name}, ply" in out


def test_without_a_model_the_command_takes_the_packaged_one(tmp_path, monkeypatch, capsys):
    """Also beside a folder of that name, which is taken when it is named."""
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--games", "2"]) == 0
    packaged = capsys.readouterr().out
    save_pretrained(random_model(SMALL, dtype=torch.float32), "small")

    assert main(["evaluate", "--games", "2"]) == 0
    assert capsys.readouterr().out == packaged
    assert main(["evaluate", "small", "--games", "2"]) == 0
    assert capsys.readouterr().out != packaged


def test_what_is_no_number_is_null_in_json(tmp_path, monkeypatch):
    """JSON has no nan, and strict readers refuse it."""
    nothing = Estimate(*torch.tensor([torch.nan, torch.nan, torch.inf]))
    monkeypatch.setattr("othello_gpt.evaluate.summary", lambda _: dict.fromkeys(_COLUMNS, nothing))
    assert main(["evaluate", "--games", "2", "--json", str(tmp_path / "figures.json")]) == 0
    stored = json.loads((tmp_path / "figures.json").read_text())

    assert stored["models"]["small"]["kl"] == [None] * 3


@pytest.mark.parametrize("sizes", [{"n_ctx": 30}, {"d_vocab": 66}])
def test_models_of_every_size_are_evaluated(sizes):
    """At the positions that they have; tokens beyond the board's are never legal."""
    scores = evaluate(random_model(replace(SMALL, **sizes)), GAMES)

    assert scores.live.shape == (40, sizes.get("n_ctx", 59))
    assert torch.equal(scores.live, legal_tokens(GAMES)[1][:, : scores.live.shape[1]])


def test_no_games_are_an_error():
    """And the message says what to give."""
    with pytest.raises(ValueError, match="no games to evaluate on: give at least one"):
        evaluate(random_model(SMALL), GAMES[:0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--games", "0"], "`--games` is 0: there must be at least one"),
        (["--file", "games.npy", "--seed", "7"], "`--seed` is of random games: leave it out"),
        (["--notation", "li"], "`--notation` is of a file's games: give `--file` too"),
    ],
)
def test_the_command_passes_no_option_over(capsys, options, message):
    """One that means nothing beside the others is an error."""
    assert main(["evaluate", *options]) == 1
    assert message in capsys.readouterr().err
