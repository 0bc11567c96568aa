"""Paired timing: both sides alternate in one process, so that a slow minute slows both."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any, NamedTuple

import torch


class Comparison(NamedTuple):
    """Medians of paired runs, in milliseconds, and the median and quartiles of their ratios."""

    name: str
    ours_ms: float
    other_ms: float
    ratio: float  # other / ours: how many times faster ours is
    ratio_low: float
    ratio_high: float

    def __str__(self) -> str:
        return (
            f"{self.name:44} {self.ours_ms:9.3f} ms {self.other_ms:9.3f} ms  "
            f"x{self.ratio:.3f} ({self.ratio_low:.3f} to {self.ratio_high:.3f})"
        )


def compare(
    name: str, ours: Callable[[], Any], other: Callable[[], Any], pairs: int = 100, warm_up: int = 5
) -> Comparison:
    """Times both sides in turns. That they agree is for the caller to check before."""
    for _ in range(warm_up):
        ours(), other()
    seconds = []
    for i in range(pairs):  # who goes first changes from pair to pair
        first, second = (ours, other) if i % 2 else (other, ours)
        a, b = _seconds(first), _seconds(second)
        seconds.append((a, b) if i % 2 else (b, a))
    ratios = sorted(b / a for a, b in seconds)
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = [1e3 * statistics.median(side) for side in zip(*seconds, strict=True)]
    return Comparison(name, medians[0], medians[1], statistics.median(ratios), low, high)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(question: str, comparisons: list[Comparison], **facts: Any) -> None:
    """The table, then one line of JSON with the hardware, the date and the versions."""
    print(f"{question}\n{'':44} {'ours':>12} {'other':>12}  other / ours (quartiles)")
    for comparison in comparisons:
        print(comparison)
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    machine = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    rows = [comparison._asdict() for comparison in comparisons]
    print(json.dumps({"question": question, **machine, "rows": rows, **facts}))
