"""What does a game teach under each objective and optimizer, and how fast do games go by?

A small model is trained from the same weights on the same games by all four; the curves go to results/. Then the
preset `small` is timed for some steps, after its compilation.
"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from othello_gpt import GPTConfig, board
from othello_gpt.recipe import OBJECTIVES, PRESETS, Recipe
from othello_gpt.train import Games, Trainer, train

RESULTS = Path(__file__).parent / "results"
MODEL = GPTConfig(n_layers=2, d_model=64, n_heads=4, d_head=16, d_mlp=256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", type=int, default=6400)
    parser.add_argument("--small-steps", type=int, default=0, help="steps of `small` to time")
    options = parser.parse_args()
    curves = {
        f"{objective}, {optimizer}": curve(objective, optimizer, options.games)
        for objective in OBJECTIVES
        for optimizer in ("muon", "adamw")
    }
    print(f"{'after ' + format(options.games, ',') + ' games':24} illegal top moves   KL, nats")
    for name, rows in curves.items():
        print(f"{name:24} {rows[-1]['illegal']:17.2%} {rows[-1]['kl']:10.3f}")
    facts = {
        "question": __doc__.splitlines()[0],
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "model": repr(MODEL),
        "generator_games_per_cpu_second": generator_speed(),
        "small_games_per": small_speed(options.small_steps) if options.small_steps else None,
        "curves": curves,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"training_{date.today()}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps({name: fact for name, fact in facts.items() if name != "curves"}))


def curve(objective: str, optimizer: str, games: int) -> list[dict]:
    """The log of a run: what it says of every 20 steps is measured on games before they are learned from."""
    recipe = Recipe(MODEL, games=games, batch=16, objective=objective, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as folder:
        train(folder, recipe, held_out=1)
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [{k: json.loads(line)[k] for k in ("games", "loss", "kl", "illegal")} for line in lines]


def generator_speed() -> int:
    """Games with their replies, 8192 at a time, a second of processor time."""
    start = time.process_time()
    for first in range(0, 32768, 8192):
        board.random_games_with_replies(torch.arange(first, first + 8192).numpy())
    return round(32768 / (time.process_time() - start))


def small_speed(steps: int) -> dict[str, float]:
    """Games a second of the preset `small`, compiled, by the clock and by the processors' time.

    The first three steps, which compile, are left out. By processor time a loaded machine counts less.
    """
    recipe = replace(PRESETS["small"], bf16=torch.cpu._is_avx512_bf16_supported())
    trainer, batches = Trainer(recipe), Games(1, recipe.batch).batches(0, workers=1)
    trainer.model.compile()
    for _ in range(3):
        trainer.step(next(batches))
    clock, busy = time.monotonic(), time.process_time()
    for _ in range(steps):
        trainer.step(next(batches))
    spent = {"second": time.monotonic() - clock, "cpu_second": time.process_time() - busy}
    return {name: round(steps * recipe.batch / seconds, 1) for name, seconds in spent.items()}


if __name__ == "__main__":
    main()
