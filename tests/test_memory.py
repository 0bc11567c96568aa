"""Freed memory stays with the process that asked for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from othello_gpt import memory
from othello_gpt.memory import keep_freed_memory, keep_room_for

ROOT = Path(__file__).parent.parent
FAULTS = """
import resource, torch
from othello_gpt import GPTConfig, OthelloGPT, memory

def faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
ONE_TENSOR = """
print(*(faults(lambda: torch.ones(2**25)) for _ in range(20)))
print(memory.keep_freed_memory())
print(*(faults(lambda: torch.ones(2**25)) for _ in range(20)))
"""
CACHES = """
print(memory._set({}))
model = OthelloGPT(GPTConfig(n_layers=4, d_model=64, n_heads=2, d_head=32, d_mlp=256))
tokens = torch.ones(256, 59, dtype=torch.long)
with torch.no_grad():
    print(*(faults(lambda: model.run_with_cache(tokens)) for _ in range(6)))
"""


def lines_of(code: str, **environment: str) -> list[list[str]]:
    """The words of each line that the code prints in a process of its own, by glibc's defaults if nothing else."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    run = [sys.executable, "-c", FAULTS + code]
    environment = {**plain, "PYTHONPATH": str(ROOT), **environment}
    printed = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    return [line.split() for line in printed.stdout.splitlines()]


@pytest.mark.slow
def test_a_tensor_as_large_as_the_last_takes_no_new_pages():
    """128 MiB, made and freed: cleared anew by the kernel each time, but for the first few not once it is kept."""
    given_back, done, kept = lines_of(ONE_TENSOR)
    if done == ["False"]:
        pytest.skip("another C library")

    assert min(map(int, given_back)) > 50  # 64 pages of 2 MiB, or 32,768 small ones
    assert int(kept[-1]) < 10


@pytest.mark.slow
def test_a_cache_as_large_as_the_last_takes_few_new_pages_unless_the_environment_forbids():
    """340 MiB, made and freed."""
    done, kept = lines_of(CACHES)
    if done == ["False"]:
        pytest.skip("another C library")
    _, forbidden = lines_of(CACHES, MALLOC_TRIM_THRESHOLD_="131072")

    assert int(kept[-1]) < min(map(int, forbidden)) / 20


def test_no_more_room_is_kept_than_asked_for(monkeypatch):
    """Half as much again as the largest cache, 2 GiB at most, and nothing for small caches or once all is kept."""
    kept: list[int] = []
    monkeypatch.setattr(memory, "_set", lambda v: kept.append(v[memory.M_TRIM_THRESHOLD]) or True)
    for name in [k for k in os.environ if k.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(memory, "_kept", 2**26)

    for mib in (40, 100, 80, 1000, 3000, 9000):
        keep_room_for(mib * 2**20)
    assert kept == [150 * 2**20, 1500 * 2**20, 2**31 - 1]
    keep_freed_memory()
    keep_room_for(2**40)
    assert kept[3:] == [-1]


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_another_c_library_is_left_alone(monkeypatch, missing):
    """No `mallopt` in it, no such library, no name for it."""

    def library(name):
        raise missing

    monkeypatch.setattr("ctypes.CDLL", library)
    monkeypatch.setattr(memory, "_kept", 2**26)
    assert keep_freed_memory() is False
    keep_room_for(2**30)
