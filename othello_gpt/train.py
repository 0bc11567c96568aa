"""Training on random games that are made on the fly: one process, or many under torchrun.

    recipe ── games 0, 1, 2 ... of a seed ── loss ── Muon on the blocks, AdamW on the rest ── weights

A run sees no game twice, so what is measured while training is measured on games the model has not seen (nor
the weights that it started from, if its seed is new to them). Game `g` depends on the seed and `g` alone, so
the counter of games is all the random state there is, and a resumed run goes on with the next game. All
positions count, also those after a forfeit: the replies are those of whoever really moves. (The published
training data has them too; a third of random games has a forfeit.)
"""

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # first imported beside a group, it would hold it in its defaults
import torch.nn.functional as F
from jaxtyping import Bool, Int8, Int64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from othello_gpt import board
from othello_gpt.evaluate import HELD_OUT_SEED, evaluate, score, summary, table
from othello_gpt.games import games_to_tokens
from othello_gpt.model import GPTConfig, OthelloGPT
from othello_gpt.optimizers import optimizers
from othello_gpt.recipe import OBJECTIVES, Recipe, command, learning_rate
from othello_gpt.vocab import PLAYABLE, square_to_token
from othello_gpt.weights import save_pretrained, write_text

# --- Games ------------------------------------------------------------------------------------------

_PLAYABLE = torch.tensor(PLAYABLE)


class Batch(NamedTuple):
    """Games as they come from other processes."""

    squares: Int8[Tensor, "*step game ply=60"]
    replies: Int64[Tensor, "*step game ply=60"]  # a bit for each square; see `board.RandomGames`


class Games(Dataset):
    """The random games of a seed in blocks of some steps, or one process's share of them.

    Games are drawn many at a time, because few take as long. Step `i` has the games from `i * batch` on.
    """

    def __init__(self, seed: int, batch: int, rank: int = 0, n_ranks: int = 1) -> None:
        if batch % n_ranks:
            raise ValueError(f"`batch` is {batch}, which {n_ranks} processes cannot share equally.")
        self.seed, self.batch, self.share = seed, batch, batch // n_ranks
        self.first, self.steps = rank * self.share, max(1, 2048 // self.share)  # steps of a block

    def __getitem__(self, block: int) -> Batch:
        steps = block * self.steps + np.arange(self.steps)
        numbers = steps[:, None] * self.batch + self.first + np.arange(self.share)
        drawn = board.random_games_with_replies(numbers.reshape(-1), self.seed)
        tensors = (
            torch.from_numpy(field) for field in (drawn.squares, drawn.replies.view("int64"))
        )
        return Batch(*(tensor.unflatten(0, numbers.shape) for tensor in tensors))

    def batches(self, first_step: int, workers: int) -> Generator[Batch, None, None]:
        """The games of `first_step` and of all steps after it, made ahead of time by other processes.

        Close it when enough games were made: the interpreter waits for these processes, which heed no signal.
        """
        blocks = DataLoader(
            self,
            batch_size=None,  # each item is a block
            sampler=count(first_step // self.steps),
            num_workers=workers,
            worker_init_fn=_leave_group,
        )
        steps = chain.from_iterable(map(Batch, *block) for block in blocks)
        try:
            yield from islice(steps, first_step % self.steps, None)
        except BaseException as error:  # also Ctrl-C
            traceback.clear_frames(error.__traceback__)  # they hold the processes
            raise


def _leave_group(worker: int) -> None:
    """Ctrl-C, `timeout` and `pkill` reach all processes of a run, but the last step still needs its games."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def legal_tokens(replies: Int64[Tensor, "game pos"]) -> Bool[Tensor, "game pos d_vocab"]:
    """Which tokens may come next, from words of squares; padding never may."""
    legal = (replies[..., None] >> _PLAYABLE.to(replies.device)) & 1
    return F.pad(legal, (1, 0)).bool()


# --- A run ------------------------------------------------------------------------------------------


class Trainer:
    """A model half-way through its recipe: one step at a time, saved and loaded whole."""

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        self.recipe, self.device = recipe, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = OthelloGPT(recipe.model).to(device)
        self.forward: nn.Module = self.model  # or what wraps it
        self.optimizers = optimizers(self.model, recipe)
        self.commands = [command(recipe)]  # that made it, in turn
        self.steps, self.seconds = 0, 0.0
        self.sums = torch.zeros(5, device=device)  # since the last report

    @property
    def games(self) -> int:
        return self.steps * self.recipe.batch

    @property
    def progress(self) -> float:
        """The part of the budget that is spent, 0 to 1."""
        by_games = self.games / self.recipe.games if self.recipe.games else 0.0
        by_time = self.seconds / (60 * self.recipe.minutes) if self.recipe.minutes else 0.0
        return min(1.0, max(by_games, by_time))

    def step(self, games: Batch) -> None:
        """One step of every optimizer on a batch of games."""
        tokens = square_to_token(games.squares).to(self.device)
        legal = legal_tokens(games.replies[:, :59].to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            logits = self.forward(tokens[:, :59])
        log_probs = logits.float().log_softmax(-1)
        losses = OBJECTIVES[self.recipe.objective](log_probs, tokens, legal)
        # The mean over all positions, live or not: so the mean over processes is the mean over all games.
        losses.mul(legal.any(-1)).mean().backward()
        factor = learning_rate(self.progress, self.recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["full_lr"]
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1
        self._count(losses.detach(), log_probs.detach(), legal)

    def _count(self, losses: Tensor, log_probs: Tensor, legal: Tensor) -> None:
        scores = score(log_probs, legal)
        floor = legal.sum(-1).clamp(min=1).log()
        totals = (losses * scores.live, floor, scores.kl, scores.illegal, scores.live)
        self.sums += torch.stack([total.sum() for total in totals])

    def report(self) -> dict[str, float]:
        """Means over the live positions since the last report, of all processes.

        The loss, the best that it can be (in expectation), the KL from uniform (nats), the illegal top moves.
        """
        self.check_weights()
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        *totals, live = self.sums.tolist()
        self.sums.zero_()
        named = zip(("loss", "floor", "kl", "illegal"), totals, strict=True)
        return {name: total / max(live, 1) for name, total in named}

    def check_weights(self) -> None:
        """Weights that float16, as which they are shared, does not hold are an error, in all processes alike."""
        if not all(weight.half().isfinite().all() for weight in self.model.parameters()):
            raise ValueError(
                f"the run has diverged: after {self.games:,} games it has weights that are nan, or too large for "
                "float16. Begin again in another folder with a lower learning rate; checkpoint.pt, if there "
                "is one, is from before."
            )

    def save(self, path: Path) -> None:
        """Writes all that the run needs to go on; a kill at any moment leaves the file before or after."""
        state = {
            "recipe": asdict(self.recipe),
            "commands": self.commands,
            "steps": self.steps,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    @classmethod
    def load(
        cls, path: Path, device: torch.device | str = "cpu", **changes: float | None
    ) -> "Trainer":
        """A saved run as it was; `changes` are of its recipe's budget."""
        recipe, state = _read_checkpoint(path)
        trainer = cls(replace(recipe, **changes), device)
        trainer.model.load_state_dict(state["model"])
        for optimizer, its_state in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        trainer.steps, trainer.seconds = state["steps"], state["seconds"]
        trainer.commands = state["commands"]
        if changes:
            given = "".join(f" --{k} {v}" for k, v in changes.items() if v is not None)
            resumed = f"othello-gpt train --resume FOLDER{given}  # after {trainer.games:,} games"
            trainer.commands.append(resumed)
        return trainer


def _read_checkpoint(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a saved run, and all that `Trainer.save` wrote."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        recipe = Recipe(**state["recipe"] | {"model": GPTConfig(**state["recipe"]["model"])})
        names = ("steps", "seconds", "model", "optimizers", "commands")
        state = {"commands": [command(recipe)]} | state  # older ones have none
        return recipe, {name: state[name] for name in names}
    except OSError:
        raise
    except Exception as error:  # torch's reader raises many kinds
        raise ValueError(
            f"'{path}' is no checkpoint of a training run, or a damaged one ({type(error).__name__}): "
            "begin again in another folder."
        ) from error


# --- The command ------------------------------------------------------------------------------------

REPORT_STEPS = 20  # between two lines of the log
SHARD_BYTES = 15 * 2**20


def train(
    folder: str | Path,
    recipe: Recipe | None = None,
    *,
    games: int | None = None,
    minutes: float | None = None,
    workers: int = 1,
    compile: bool | None = None,
    save_minutes: float = 5.0,
    held_out: int = 2000,
) -> bool:
    """Trains to the end of the budget; False if a signal (SIGINT, SIGTERM) stopped it before.

    Under torchrun each process takes its share of every batch. `folder` gets `checkpoint.pt`, to go on
    from; `log.jsonl`, a line every 20 steps; and at the end the weights, as float16, with their card.

    Args:
        recipe: None goes on with the run in `folder`, on a CPU with as many threads as before to the same weights,
            bit by bit, as without the stop. Then `games`, `minutes` or both may be another budget in place of
            the run's; what it has had counts.
        workers: processes that make games; 0 makes them here.
        compile: `torch.compile` the model, which takes a minute at the start and is faster then; by default
            from d_model 256 on.
        save_minutes: between two checkpoints.
        held_out: games on which the trained model is evaluated for its card.

    Raises:
        ValueError: a folder that holds a run already, or none to go on with; a budget that is spent already; no
            games to evaluate on; a run that diverges, whose last checkpoint stays.
    """
    if held_out < 1:
        raise ValueError(f"`held_out` is {held_out}, but the card needs at least one game.")
    if workers < 0 or not save_minutes >= 0:
        raise ValueError(
            f"`workers` is {workers} and `save_minutes` {save_minutes}, but both must be 0 or more."
        )
    folder = Path(folder)
    with _processes() as device:
        trainer = _prepared(folder, recipe, {"games": games, "minutes": minutes}, device)
        if trainer.recipe.model.d_model >= 256 if compile is None else compile:
            torch._dynamo.config.suppress_errors = True  # where it cannot compile, go on without
            trainer.model.compile()
        if dist.is_initialized():
            ids = [device] if device.type == "cuda" else None
            trainer.forward = DistributedDataParallel(
                trainer.model, device_ids=ids, broadcast_buffers=False
            )
        finished = _run(trainer, folder, workers, save_minutes)
        trainer.forward = trainer.model  # the wrapper holds the group, and the group has threads
        if finished and is_first_process():
            save_trained(trainer, folder, held_out)
        if dist.is_initialized():
            dist.barrier()
    return finished


@contextmanager
def _processes() -> Iterator[torch.device]:
    """The device of this process, which has joined the others if torchrun started it."""
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "RANK is set, but not WORLD_SIZE: start with torchrun, which sets both, or unset RANK."
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is the one that writes and tells; True without torchrun."""
    return int(os.environ.get("RANK", 0)) == 0


def _prepared(folder: Path, recipe: Recipe | None, budget: dict, device) -> Trainer:
    path = folder / "checkpoint.pt"
    given = any(value is not None for value in budget.values())
    if recipe is None:
        if not path.is_file():
            raise ValueError(
                f"there is no run in '{folder}' to go on with: it has no checkpoint.pt."
            )
        trainer = Trainer.load(path, device, **budget if given else {})
        if given and trainer.progress >= 1:
            raise ValueError(
                f"the run has had {trainer.games} games and {trainer.seconds / 60:.2f} minutes, which count: "
                "give more than that."
            )
        return trainer
    if given:
        raise ValueError(
            "`games` and `minutes` change the budget of a run that goes on, but a recipe has its own: "
            "give them to the recipe."
        )
    if path.exists():
        raise ValueError(
            f"'{folder}' holds a run already. Go on with it (`--resume {folder}`), or choose another folder."
        )
    trainer = Trainer(recipe, device)
    if recipe.init is not None:
        weights = OthelloGPT.from_pretrained(recipe.init, fold=False)
        if weights.cfg != recipe.model:
            raise ValueError(
                f"'{recipe.init}' is {weights.cfg}, but the recipe has {recipe.model}."
            )
        trainer.model.load_state_dict(weights.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    return trainer


def _run(trainer: Trainer, folder: Path, workers: int, save_minutes: float) -> bool:
    recipe = trainer.recipe
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    games = Games(recipe.seed, recipe.batch, *ranks)
    with (
        closing(games.batches(trainer.steps, workers)) as batches,
        _stop_signals(trainer) as received,
        _Log(trainer, folder / "log.jsonl") as log,
    ):
        stopped, saved, clock = False, time.monotonic(), time.monotonic()
        while trainer.progress < 1 and not stopped:
            start = time.monotonic()
            batch = next(batches)
            log.waited += time.monotonic() - start
            trainer.step(batch)
            now = time.monotonic()
            trainer.seconds, stopped = _agreed(
                trainer.seconds + now - clock, bool(received), trainer.device
            )
            clock = now
            if trainer.steps % REPORT_STEPS == 0:
                log.write()
            if now - saved >= 60 * save_minutes or stopped or trainer.progress >= 1:
                _save(trainer, folder)
                saved = now
    return trainer.progress >= 1


def _save(trainer: Trainer, folder: Path) -> None:
    trainer.check_weights()
    if is_first_process():
        trainer.save(folder / "checkpoint.pt")


def _agreed(seconds: float, stop: bool, device: torch.device) -> tuple[float, bool]:
    """The longest time and any wish to stop, of all processes: they must end with the same step."""
    if not dist.is_initialized():
        return seconds, stop
    both = torch.tensor([seconds, stop], dtype=torch.float64, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return both[0].item(), bool(both[1])


@contextmanager
def _stop_signals(trainer: Trainer) -> Iterator[list[int]]:
    """The signals to stop that have come; the step in progress goes on to its end.

    Not the first step: it may be compiling, in processes that the signal ends too, and would wait for them
    forever; and there is nothing to save yet.
    """
    received: list[int] = []
    first = trainer.steps

    def note(number: int, frame: object) -> None:
        if trainer.steps == first:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_trained(trainer: Trainer, folder: Path, held_out: int) -> None:
    """The weights as float16, and their card, with what the model that anybody loads from here can do."""
    save_pretrained(trainer.model, folder, dtype=torch.float16, shard_bytes=SHARD_BYTES)
    model = OthelloGPT.from_pretrained(folder, device=trainer.device)
    unrounded = OthelloGPT(trainer.recipe.model).to(trainer.device)
    unrounded.load_state_dict(trainer.model.state_dict())
    games = board.random_games(held_out, HELD_OUT_SEED)
    tokens = games_to_tokens(games[:100])
    with torch.no_grad():
        change = (model(tokens).softmax(-1) - unrounded(tokens).softmax(-1)).abs().max().item()
    card = _CARD.format(
        **asdict(trainer.recipe.model),
        n_parameters=sum(p.numel() for p in model.parameters()),
        games=trainer.games,
        minutes=trainer.seconds / 60,
        seed=trainer.recipe.seed,
        torch=torch.__version__,
        commands="\n    ".join(trainer.commands),
        recipe=trainer.recipe,
        held_out=held_out,
        held_out_seed=HELD_OUT_SEED,
        scores=table({folder.name: summary(evaluate(model, games))}).replace("\n", "\n    "),
        change=change,
    )
    write_text(folder / "README.md", card)


_CARD = """---
license: mit
library_name: othello-gpt
tags: [othello-gpt, mechanistic-interpretability]
---
# Othello-GPT, trained on {games:,} random games

{n_layers} layers, d_model {d_model}, {n_heads} heads of {d_head}, d_mlp {d_mlp}; {n_parameters:,} parameters.

    from othello_gpt import OthelloGPT
    model = OthelloGPT.from_pretrained("this folder or repository")

## How it was made

    {commands}

Uniformly random legal games of seed {seed}, none seen twice in this run; positions after a forfeit count like all
others. {minutes:.0f} minutes, torch {torch}. The whole recipe:

    {recipe}

## How good it is

On {held_out:,} games of seed {held_out_seed}, which training never sees; all 59 positions, 95 % intervals over games:

    {scores}

    othello-gpt evaluate FOLDER --games {held_out}

The weights are stored as float16. That changes no probability by more than {change:.1g} (100 of these games).

## Licence and limits

MIT. The model knows how the discs move, not how to win: all it saw is moves drawn at random from the legal
ones, and on games that people play it is out of its depth. It reads whole games from the first move.
"""


def _games_of(line: str) -> float:
    """The games that a line of the log counts; infinity for half a line, as a kill leaves it."""
    try:
        return json.loads(line)["games"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class _Log:
    """A line of JSON for every report, and the same as a progress bar."""

    def __init__(self, trainer: Trainer, path: Path) -> None:
        from tqdm import tqdm

        self.trainer, self.path = trainer, path
        self.waited = 0.0
        self.last = (trainer.games, trainer.seconds)
        self.bar = tqdm(
            total=1.0,
            initial=trainer.progress,
            bar_format="{percentage:5.1f}% |{bar:20}| {elapsed}, {remaining} left{postfix}",
            mininterval=0.5 if sys.stderr.isatty() else 60,
            disable=not is_first_process(),
        )
        if path.exists() and is_first_process():  # drop what came after the checkpoint
            lines = path.read_text().splitlines()
            kept = [f"{line}\n" for line in lines if _games_of(line) <= trainer.games]
            write_text(path, "".join(kept))

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def write(self) -> None:
        trainer, row = self.trainer, self.trainer.report()
        if not is_first_process():
            return
        games, seconds = trainer.games - self.last[0], trainer.seconds - self.last[1]
        row = {
            "games": trainer.games,
            "seconds": trainer.seconds,
            **row,
            "learning_rate": learning_rate(
                trainer.progress, trainer.recipe
            ),  # part of the full one
            "games_per_second": games / seconds,
            "waiting": self.waited / seconds,  # for games, part of the time
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.last, self.waited = (trainer.games, trainer.seconds), 0.0
        self.bar.set_postfix_str(
            f"{trainer.games:,} games, {row['games_per_second']:.0f}/s, loss {row['loss']:.3f} "
            f"(floor {row['floor']:.3f}), illegal {row['illegal']:.2%}",
            refresh=False,
        )
        self.bar.update(trainer.progress - self.bar.n)
