"""Accuracy of probes: counted as by hand, with baselines, errors and the table."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from model_strategies import random_model

from interp.probes import (
    BLACK,
    MINE,
    LinearProbe,
    Target,
    majority_baseline,
    probe_accuracy,
    probe_table,
)
from othello_gpt import GPTConfig, OthelloGPT, board
from othello_gpt.cli import main
from othello_gpt.games import games_to_tokens

SMALL = GPTConfig(n_layers=2, d_model=16, n_heads=2, d_head=4, d_mlp=16)
HELD_OUT = torch.from_numpy(board.random_games(12, seed=4))


def random_probe(layer: int = 1, target: Target = MINE) -> LinearProbe:
    W = torch.randn(16, 8, 8, len(target.classes), dtype=torch.double)
    b = torch.randn(8, 8, len(target.classes), dtype=torch.double)
    return LinearProbe(W, b, layer, target.classes, "raw", target.name)


def test_accuracy_is_what_a_loop_over_positions_counts():
    """Squares, boards and classes, position by position; two targets of different numbers of classes."""
    corner = Target("late", ("no", "yes"), lambda record: (record.state != 0) & (record.state > -2))
    model = random_model(SMALL)
    probes = [random_probe(), random_probe(0, corner)]
    accuracy = probe_accuracy(model, probes, HELD_OUT, batch_size=5, targets=[corner])
    _, cache = model.run_with_cache(games_to_tokens(HELD_OUT))
    record = board.play(HELD_OUT.numpy())
    right, whole, tp, predicted_mine, mine = [], [], 0, 0, 0
    for game, pos in zip(*torch.from_numpy(record.to_move[:, :59] != 0).nonzero().T, strict=True):
        read = probes[0].logits(cache["resid_post", 1][game, pos]).argmax(-1)
        true = MINE(record)[game, pos]
        right.append((read == true).double().mean())
        whole.append((read == true).all().double())
        tp += ((read == 2) & (true == 2)).sum()
        predicted_mine, mine = predicted_mine + (read == 2).sum(), mine + (true == 2).sum()

    assert accuracy.by_layer[0].item() == pytest.approx(torch.stack(right).mean().item(), abs=1e-6)
    assert accuracy.whole_board[0].item() == torch.stack(whole).mean().item()
    assert accuracy.by_class[0, 2].item() == pytest.approx((tp / mine).item(), abs=1e-6)
    assert accuracy.f1[0, 2].item() == pytest.approx(
        (2 * tp / (predicted_mine + mine)).item(), abs=1e-6
    )
    assert accuracy.f1[1].isnan().tolist() == [False, False, True]
    assert accuracy.by_pos.shape == (2, 59)
    assert torch.allclose(accuracy.by_square.mean((1, 2)), accuracy.by_layer, atol=1e-6)


def test_estimates_enclose_their_value():
    """For every share, low to value to high; a share without spread has no width."""
    accuracy = probe_accuracy(random_model(SMALL), [random_probe()], HELD_OUT)
    for part in ("by_layer", "by_square", "by_pos", "whole_board", "by_class", "f1"):
        value, low, high = accuracy.estimate(part)
        assert torch.allclose(value, getattr(accuracy, part), equal_nan=True)
        assert ((low <= value + 1e-6) & (value <= high + 1e-6))[~value.isnan()].all()
    with pytest.raises(ValueError, match="must be by_layer, by_square"):
        accuracy.estimate("by_age")


def test_positions_can_be_left_out():
    """The published range leaves five out at both ends."""
    accuracy = probe_accuracy(
        random_model(SMALL), [random_probe()], HELD_OUT, positions=slice(5, 54)
    )

    assert accuracy.seen.any(0).nonzero().flatten().tolist() == list(range(5, 54))


def test_the_majority_of_the_same_games_is_the_best_of_constant_answers():
    """Scored on the games that it was counted on, no constant answer of a square and ply beats it."""
    accuracy = majority_baseline(random_model(SMALL), HELD_OUT, HELD_OUT, [MINE, BLACK])
    record = board.play(HELD_OUT.numpy())
    live = torch.from_numpy(record.to_move[:, :59] != 0)
    for row, target in enumerate((MINE, BLACK)):
        labels = target(record)[:, :59]
        shares = [((labels == k) & live[..., None, None]).sum(0) for k in range(3)]
        best = torch.stack(shares).amax(0).sum() / live.sum() / 64
        assert accuracy.by_layer[row].item() == pytest.approx(best.item(), abs=1e-6)


def test_what_cannot_be_scored_is_refused():
    """No games or positions, an unknown target, other classes, another stream."""
    model, probe = random_model(SMALL), random_probe()
    unknown = LinearProbe(probe.W, probe.b, 1, MINE.classes, "raw", "age")
    other = LinearProbe(probe.W, probe.b, 1, ("a", "b", "c"), "raw")
    centred = LinearProbe(probe.W, probe.b, 1)
    for wrong, games, message in (
        (probe, HELD_OUT[:0], "nothing to score without both"),
        (unknown, HELD_OUT, "no target is named 'age'"),
        (other, HELD_OUT, "accuracy is counted for probes whose classes are"),
        (centred, HELD_OUT, "reads the centred residual stream"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_accuracy(model, [wrong], games)
    with pytest.raises(ValueError, match="no position is left from which somebody moves"):
        probe_accuracy(model, [probe], HELD_OUT, positions=slice(70, 80))


def test_two_targets_of_one_name_are_refused():
    """Either would be scored by the labels of the other; so would one with the name of ours."""
    filled, empty = (
        Target("own", ("no", "yes"), lambda record, held=held: (record.state != 0) == held)
        for held in (True, False)
    )
    model, probe, mine = random_model(SMALL), random_probe(1, filled), replace(filled, name="mine")
    for targets, name in (([filled, empty], "own"), ([filled, filled], "own"), ([mine], "mine")):
        for score in (
            lambda targets: probe_accuracy(model, [probe], HELD_OUT, targets=targets),
            lambda targets: probe_table(model, HELD_OUT, HELD_OUT, targets),
        ):
            with pytest.raises(ValueError, match=f"two targets are named '{name}'.*give each its"):
                score(targets)


def test_the_majority_of_shorter_games_says_nothing_of_longer_ones():
    """More plies than were counted are refused; fewer are scored."""
    model = random_model(SMALL)
    with pytest.raises(ValueError, match="`held_out` has 60 plies, but `squares`.* 20: give"):
        majority_baseline(model, HELD_OUT[:, :20], HELD_OUT)

    assert majority_baseline(model, HELD_OUT, HELD_OUT[:, :20]).right.shape[2] == 20


def test_games_may_be_numpy_s():
    """As `board.random_games` gives them: the same counts."""
    model, games = random_model(SMALL), HELD_OUT.numpy()
    for score in (
        lambda g: probe_accuracy(model, [random_probe()], g),
        lambda g: majority_baseline(model, g, g),
    ):
        torch.manual_seed(1)
        expected = score(HELD_OUT).right
        torch.manual_seed(1)
        assert torch.equal(score(games).right, expected)


def test_the_table_leaves_the_caller_s_random_numbers_alone():
    """As if nothing had been drawn; and it is the same each time."""
    table = partial(probe_table, random_model(SMALL), HELD_OUT, HELD_OUT)
    state = torch.get_rng_state()
    first = str(table())

    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert str(table()) == first


@pytest.mark.slow
def test_colours_are_read_as_mine_and_theirs():
    """On the packaged model: black and white far below mine and theirs, which lie far above all baselines."""
    model = OthelloGPT.from_pretrained()
    games = torch.from_numpy(board.random_games(150, seed=3))
    table = probe_table(model, games, HELD_OUT, [MINE, BLACK])
    shares = {(row.target, row.probe): row.squares.value for row in table.rows}

    assert (shares["mine", "linear"][4:8] > 0.87).all()
    assert (shares["black", "linear"][4:8] < shares["mine", "linear"][4:8] - 0.1).all()
    for baseline in ("shuffled", "untrained", "majority"):
        assert (shares["mine", baseline] < shares["mine", "linear"][4:8].min() - 0.15).all()
    assert "mine, untrained" in str(table)


def test_the_packaged_probes_read_the_board():
    """Best in the middle, at least 92 % there, above the first and the last layer."""
    probes = [LinearProbe.from_pretrained(layer) for layer in range(8)]
    held_out = torch.from_numpy(board.random_games(30, seed=555))
    accuracy = probe_accuracy(OthelloGPT.from_pretrained(), probes, held_out).by_layer

    assert [probe.layer for probe in probes] == list(range(8))
    assert accuracy.max() > 0.92
    assert accuracy.argmax() in (3, 4, 5)
    assert accuracy[4] > max(accuracy[0], accuracy[7])


@pytest.mark.slow
def test_the_command_prints_the_table(capsys):
    """`othello-gpt probe` on the packaged model; an unknown target is refused."""
    assert main(["probe", "--games", "8", "--held-out", "4", "--targets", "flipped"]) == 0
    assert "flipped, linear" in capsys.readouterr().out
    assert main(["probe", "--targets", "age"]) == 1
    assert "no target is named 'age'" in capsys.readouterr().err
