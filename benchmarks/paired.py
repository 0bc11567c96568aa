"""Paired timing: both sides alternate in one process, so that a slow minute slows both.

`--quick` means fewer pairs and no large batches, `--save` keeps the table and the line of JSON in
`benchmarks/results`, dated.
"""

import json
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

QUICK = "--quick" in sys.argv
Key = TypeVar("Key", bound=Hashable)


class Comparison(NamedTuple):
    """Medians of paired runs, in milliseconds of processor time, and the quartiles of their ratios."""

    name: str
    ours_ms: float
    other_ms: float
    ratio: float  # other / ours: how many times faster ours is
    ratio_low: float
    ratio_high: float
    pairs: float
    # ours less other, between the lower quartiles of their times: what else runs on a machine only adds
    overhead_ms: float | None = None

    @classmethod
    def of(cls, name: str, ours: Sequence[float], other: Sequence[float]) -> "Comparison":
        """From the seconds that both sides took in each turn."""
        ratios = sorted(b / a for a, b in zip(ours, other, strict=True))
        low, _, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        )
        sides = [sorted(1e3 * seconds for seconds in side) for side in (ours, other)]
        medians = map(statistics.median, sides)
        undisturbed = [side[len(side) // 4] for side in sides]
        overhead = undisturbed[0] - undisturbed[1]
        return cls(name, *medians, statistics.median(ratios), low, high, len(ratios), overhead)

    @classmethod
    def median(cls, comparisons: Sequence["Comparison"]) -> "Comparison":
        """Of several that compare the same, the median of every figure."""
        name, *figures = zip(*comparisons, strict=True)
        return cls(name[0], *map(statistics.median, figures))

    def __str__(self) -> str:
        return (
            f"{self.name:52} {self.ours_ms:10.3f} {self.other_ms:10.3f}   "
            f"{self.ratio:8.3f} ({self.ratio_low:.3f} to {self.ratio_high:.3f}, {self.pairs:g} pairs)"
        )


def compare(
    name: str,
    ours: Callable[[], Any],
    other: Callable[[], Any],
    pairs: int = 100,
    warm_up: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> Comparison:
    """Times both sides in turns. That they agree is for the caller to check before.

    The faster side is called as often in a turn as fits the slower side's, so that both find their weights in
    the caches, or neither does. Processor time, as other people's work on the machine is not ours;
    `time.perf_counter` for whole processes.
    """
    warm = [[_seconds(side, 1, clock) for side in (ours, other)] for _ in range(warm_up)]
    calls = [max(1, round(max(warm[-1]) / seconds)) for seconds in warm[-1]]
    seconds: tuple[list[float], list[float]] = [], []
    for i in range(pairs):  # who goes first changes from pair to pair
        for side in (0, 1) if i % 2 else (1, 0):
            seconds[side].append(_seconds((ours, other)[side], calls[side], clock))
    return Comparison.of(name, *seconds)


def rotate(
    sides: Mapping[Key, Callable[[], Any]], rounds: int, warm_up: int = 0, calls: int = 1
) -> dict[Key, list[float]]:
    """The seconds of processor time that each timed call of each side took, in an order drawn anew for every round.

    With many sides, each finds the caches full of the others' objects, and none has its luck with them.

    Args:
        warm_up: how often a side is called at the start of its turn before it is timed.
        calls: how many calls of a turn are timed, each by itself.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in sides}
    order = list(sides)
    draw = random.Random(0)
    for i in range(-1, rounds):  # the first round is for nothing but to begin
        draw.shuffle(order)
        for key in order:
            for _ in range(warm_up):
                sides[key]()
            timed = [_seconds(sides[key], 1, time.process_time) for _ in range(calls)]
            if i >= 0:
                seconds[key] += timed
    return seconds


def _seconds(call: Callable[[], Any], times: int, clock: Callable[[], float]) -> float:
    """What one of some calls takes."""
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times


def peak_mib() -> float:
    """The most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(question: str, comparisons: list[Comparison], **facts: Any) -> None:
    """The table, then one line of JSON with the hardware, the date and the versions."""
    lines = [question, f"{'':52} {'ours, ms':>10} {'other, ms':>10}   other / ours (quartiles)"]
    lines += [str(comparison) for comparison in comparisons]
    lines += [f"{name}: {fact}" for name, fact in facts.items()]
    machine = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "python": platform.python_version(),
        "quick": QUICK,
    }
    rows = [comparison._asdict() for comparison in comparisons]
    lines.append(json.dumps({"question": question, **machine, "rows": rows, **facts}))
    print("\n".join(lines))
    if "--save" in sys.argv:
        save("\n".join(lines))


def save(text: str) -> None:
    """Keeps a result under the benchmark's name and today's date."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = Path(sys.argv[0]).stem.removeprefix("bench_")
    (folder / f"{date.today().isoformat()}-{name}.txt").write_text(text + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
