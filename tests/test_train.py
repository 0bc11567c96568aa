"""Training: games of any process, resuming, stopping, being killed, many processes."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from model_strategies import random_model

from othello_gpt import GPTConfig, OthelloGPT, board
from othello_gpt.cli import main
from othello_gpt.evaluate import HELD_OUT_SEED, evaluate
from othello_gpt.evaluate import legal_tokens as legal_tokens_of_games
from othello_gpt.recipe import OBJECTIVES, Recipe, recipe_of
from othello_gpt.train import Games, Trainer, legal_tokens, train
from othello_gpt.weights import save_pretrained

ROOT = Path(__file__).parent.parent
SMALL = GPTConfig(n_layers=2, d_model=16, n_heads=2, d_head=4, d_mlp=24)
SHORT = Recipe(SMALL, games=160, batch=4, bf16=False, warm_up=0.1)  # 40 steps


def run(folder, recipe=None, **options) -> bool:
    """Training as in the tests: games made in this process, a few to be evaluated on."""
    return train(folder, recipe, workers=0, held_out=2, **options)


def weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["model"]


def log(folder) -> list[dict]:
    """The lines of a run's log without what depends on the clock."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [
        {k: r[k] for k in ("games", "loss", "floor", "kl", "illegal", "learning_rate")}
        for r in rows
    ]


def assert_same(a: dict, b: dict) -> None:
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- What is learned from


def test_games_travel_as_words_and_arrive_as_tokens():
    """The replies of a batch, unpacked, are the legal tokens that playing its games gives."""
    batch = next(Games(seed=3, batch=8).batches(first_step=2, workers=0))

    assert np.array_equal(batch.squares, board.random_games(24, 3)[16:])
    legal = legal_tokens_of_games(batch.squares.numpy())[0]
    assert torch.equal(legal_tokens(batch.replies[:, :59]), legal)


def test_processes_share_every_step():
    """The shares of three processes, joined, are the games of the step."""
    whole = islice(Games(1, 900).batches(1, workers=0), 3)
    shares = [Games(1, 900, rank, 3).batches(1, workers=0) for rank in range(3)]

    for all_games, *parts in zip(whole, *shares, strict=False):
        joined = np.concatenate([part.squares for part in parts])
        assert np.array_equal(joined, all_games.squares)


def test_games_go_on_when_a_signal_to_stop_reaches_every_process():
    """The step in progress, and the checkpoint after it, still need the process that makes games."""
    batches = Games(1, 2048).batches(0, workers=1)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
    later = list(islice(batches, 8))  # each a block of its own; two are made ahead

    assert np.array_equal(later[-1].squares, Games(1, 2048)[8].squares[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # on one core
def test_any_step_can_come_first_and_other_processes_make_the_same_games():
    """Two workers, from the fourth step on, in the middle of a block."""
    batches = islice(Games(1, 900).batches(3, workers=2), 3)

    for step, batch in enumerate(batches, 3):
        numbers = np.arange(900 * step, 900 * (step + 1))
        assert np.array_equal(batch.squares, board.random_games_with_replies(numbers, 1).squares)


# --- Runs


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_lowers_the_distance_from_the_rules(tmp_path, objective, optimizer):
    """Two layers, a few hundred games: under both objectives and both optimizers."""
    recipe = Recipe(
        GPTConfig(2, 32, 2, 16, 64), games=640, batch=16, objective=objective, optimizer=optimizer
    )
    assert run(tmp_path / "run", recipe)
    games = board.random_games(20, HELD_OUT_SEED)
    untrained, trained = (
        evaluate(model, games)
        for model in (Trainer(recipe).model, OthelloGPT.from_pretrained(tmp_path / "run"))
    )

    assert trained.kl.sum() < 0.95 * untrained.kl.sum()
    assert trained.illegal.sum() < 0.9 * untrained.illegal.sum()


@pytest.mark.slow
def test_the_tiny_preset_learns_the_rules(tmp_path):
    """At a fifth of its games: the last line of its log has less than half of the moves illegal."""
    recipe = recipe_of("tiny", games=1920, batch=32)
    run(tmp_path / "run", recipe)
    rows = log(tmp_path / "run")

    assert rows[-1]["illegal"] < 0.5
    assert rows[0]["illegal"] > rows[-1]["illegal"]
    assert abs(rows[-1]["loss"] - rows[-1]["floor"] - rows[-1]["kl"]) < 1e-5


def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    """Stopped by a signal in its 23rd step, which it ends; resumed, the weights are the same bit by bit."""
    assert run(tmp_path / "whole", SHORT)
    step = Trainer.step

    def signalled(trainer, games):
        if trainer.steps == 22:
            signal.raise_signal(signal.SIGTERM)
        step(trainer, games)

    monkeypatch.setattr(Trainer, "step", signalled)
    assert not run(tmp_path / "parts", SHORT)
    assert Trainer.load(tmp_path / "parts" / "checkpoint.pt").steps == 23
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(Trainer, "step", step)
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:  # as if it had been killed later on
        file.write(json.dumps({"games": 120}) + '\n{"games": 40, "sec')
    assert run(tmp_path / "parts")

    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = log(tmp_path / "whole"), log(tmp_path / "parts")
    assert whole[0] == parts[0]  # a report begins anew after a stop
    assert [row["games"] for row in whole] == [row["games"] for row in parts] == [80, 160]


def test_a_signal_in_the_first_step_ends_the_run_at_once(tmp_path, monkeypatch):
    """It may be compiling, and there is nothing to save."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of the background
    monkeypatch.setattr(Trainer, "step", lambda *_: signal.raise_signal(signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", SHORT)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


KILLED = """
import os, signal, sys, torch
from othello_gpt.train import Recipe, GPTConfig, train
recipe = Recipe(GPTConfig(2, 16, 2, 4, 24), games=160, batch=4, bf16=False, warm_up=0.1)
save, saves = torch.save, []
def half_a_save(state, file):
    saves.append(state["steps"])
    if len(saves) == 3:
        save(state, file)
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = half_a_save
train(sys.argv[1], recipe, workers=0, save_minutes=0)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_leaves_the_last_checkpoint(tmp_path):
    """kill -9 with half of the third checkpoint written: the second is there, and the run goes on from it."""
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "run"], env=environment())

    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint.pt.partial").exists()
    assert Trainer.load(tmp_path / "run" / "checkpoint.pt").steps == 2
    assert run(tmp_path / "run")
    assert run(tmp_path / "whole", SHORT)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    """torchrun with two gloo processes, each with half of every batch: the same curve, to float noise."""
    options = [
        "--preset=tiny",
        "--games=640",
        "--batch=16",
        "--float32",
        "--workers=0",
        "--held-out=2",
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    two = [*torchrun, "-m", "othello_gpt", "train", *options, "--out", tmp_path / "two"]
    run = subprocess.run(two, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert main(["train", *options, "--out", str(tmp_path / "one")]) == 0

    rows = list(zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True))
    assert len(rows) == 2
    for one, both in rows:
        assert one.keys() == both.keys()
        for name in ("games", "loss", "floor", "kl", "learning_rate"):
            assert math.isclose(one[name], both[name], rel_tol=1e-5), name


THREADS = """
import os, sys
from pathlib import Path
from othello_gpt.train import Recipe, GPTConfig, train
os.environ |= dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
train(sys.argv[1], Recipe(GPTConfig(1, 8, 2, 4, 8), games=4, batch=4), workers=0, held_out=1)
print(*(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux")
def test_the_threads_of_a_group_end_with_it(tmp_path):
    """Those that live on when the interpreter ends can abort it."""
    run = [sys.executable, "-c", THREADS, tmp_path / "run"]
    threads = subprocess.run(run, env=environment(), capture_output=True, text=True, check=True)

    assert "python" in threads.stdout
    assert "gloo" not in threads.stdout


FAILING = """
import os, signal, sys, time
from othello_gpt.train import Games, Recipe, GPTConfig, Trainer, train
def fail(*_): raise ArithmeticError
def interrupt(*_):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(1)  # the other process is waiting
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of the background
{}
train(sys.argv[1], Recipe(GPTConfig(1, 8, 2, 4, 8), games=4, batch=4), workers=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "status", "error"),
    [
        ("Trainer.step = fail", 1, "ArithmeticError"),
        ("Games.__getitem__ = fail", 1, "ArithmeticError"),
        ("Games.__getitem__ = interrupt", -signal.SIGINT, "KeyboardInterrupt"),
    ],
)
def test_a_run_that_fails_leaves_no_process_behind(tmp_path, change, status, error):
    """Those that make games heed no signal to stop, and the interpreter would wait for them forever."""
    run = [sys.executable, "-c", FAILING.format(change), tmp_path / "run"]
    failed = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=60)

    assert failed.returncode == status
    assert error in failed.stderr


def test_the_log_tells_waiting_for_games_from_saving(tmp_path, monkeypatch):
    """Saves that take longer than the steps, of games that are all made in the first."""
    monkeypatch.setattr(Trainer, "save", lambda *_: time.sleep(0.02))
    run(tmp_path / "run", SHORT, save_minutes=0)
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()

    assert json.loads(rows[1])["waiting"] < 0.1


@pytest.mark.parametrize("save_minutes", [0, 5])
def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(tmp_path, save_minutes):
    """It writes no weights and logs no nan; the first step, of rate 0, was fine."""
    with pytest.raises(ValueError, match="has diverged: .* with a lower learning rate"):
        run(tmp_path, replace(SHORT, lr=1e30), save_minutes=save_minutes)

    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "log.jsonl").exists()
    if save_minutes == 0:
        assert all(W.isfinite().all() for W in weights(tmp_path).values())


def test_a_budget_of_time_ends_a_run(tmp_path):
    """After as many minutes, whatever the games; and the learning rate has fallen by then."""
    assert run(tmp_path / "run", replace(SHORT, games=None, minutes=0.02))
    trainer = Trainer.load(tmp_path / "run" / "checkpoint.pt")

    assert 1.2 <= trainer.seconds < 10
    assert trainer.progress == 1
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.5 * SHORT.lr


def test_a_resumed_run_can_have_another_budget_and_its_card_tells(tmp_path):
    """In place of the old one, also of the other kind; one that is spent is an error."""
    assert run(tmp_path, replace(SHORT, games=8))
    with pytest.raises(ValueError, match="has had 8 games and .* which count: give more than that"):
        run(tmp_path, games=8)
    assert run(tmp_path, games=16)
    minutes = Trainer.load(tmp_path / "checkpoint.pt").seconds / 60 + 0.02
    assert run(tmp_path, minutes=minutes)
    trainer = Trainer.load(tmp_path / "checkpoint.pt")

    assert trainer.games > 16
    assert trainer.recipe == replace(SHORT, games=None, minutes=minutes)
    first, *then = (tmp_path / "README.md").read_text().split("made\n\n    ")[1].splitlines()[:3]
    assert "games=8" in first
    assert then == [
        "    othello-gpt train --resume FOLDER --games 16  # after 8 games",
        f"    othello-gpt train --resume FOLDER --minutes {minutes}  # after 16 games",
    ]


def test_training_can_start_from_weights(tmp_path):
    """From a folder, with the first step (of rate 0) still those weights; other sizes are an error."""
    start = random_model(SMALL, dtype=torch.float32)
    save_pretrained(start, tmp_path / "start")
    recipe = replace(SHORT, init=str(tmp_path / "start"), games=4)
    assert run(tmp_path / "run", recipe)

    assert_same(start.state_dict(), weights(tmp_path / "run"))
    with pytest.raises(ValueError, match="n_layers=2.*but the recipe has .*n_layers=8"):
        run(tmp_path / "other", replace(recipe, model=GPTConfig()))


def test_the_weights_that_are_saved_are_the_trained_ones_in_half_precision(tmp_path):
    """With a card that names the recipe's command, the seed and the figures."""
    assert run(tmp_path / "run", SHORT)
    loaded = OthelloGPT.from_pretrained(tmp_path / "run", fold=False).state_dict()

    for name, W in weights(tmp_path / "run").items():
        assert torch.equal(loaded[name], W.half().float())
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"On 2 games of seed {HELD_OUT_SEED}" in card
    assert repr(SHORT) in card


def test_what_cannot_be_trained_is_named(tmp_path, capsys, monkeypatch):
    """Uneven shares, nothing to evaluate on, folders in the way, checkpoints that are none, a changed recipe."""
    with pytest.raises(ValueError, match="`batch` is 4, which 3 processes cannot share equally"):
        Games(0, 4, 0, 3)
    with pytest.raises(ValueError, match="`held_out` is 0, but the card needs at least one game"):
        train(tmp_path / "run", SHORT, held_out=0)
    for options in ({"workers": -1}, {"save_minutes": math.nan}, {"save_minutes": -1}):
        with pytest.raises(ValueError, match="but both must be 0 or more"):
            train(tmp_path / "run", SHORT, **options)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        patch.delenv("WORLD_SIZE", raising=False)
        with pytest.raises(ValueError, match="not WORLD_SIZE: start with torchrun.* or unset RANK"):
            run(tmp_path / "run", SHORT)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="no run in .* to go on with"):
        run(tmp_path / "nothing")
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match="holds a run already. Go on with it"):
        run(tmp_path, SHORT)
    with pytest.raises(ValueError, match="a recipe has its own: give them to the recipe"):
        run(tmp_path / "run", SHORT, games=64)
    for foreign in (None, {}, [], {"recipe": {"lr": 1}}):
        if foreign is not None:  # the first time it is an empty file
            torch.save(foreign, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match="no checkpoint of a training run, or a damaged one"):
            run(tmp_path)
    ignored = ["--lr=1", "--preset=full", "--float32", f"--out={tmp_path}"]
    assert main(["train", "--resume", str(tmp_path), *ignored]) == 1
    kept = (
        "a resumed run keeps its recipe and its folder: leave out --float32, --lr, --out, --preset"
    )
    assert kept in capsys.readouterr().err
