"""Freed memory stays with the process that asked for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from othello_gpt.memory import keep_freed_memory

ROOT = Path(__file__).parent.parent
FAULTS = """
import resource, torch
from othello_gpt.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(*(faults() for _ in range(20)))
print(keep_freed_memory())
print(*(faults() for _ in range(20)))
"""


@pytest.mark.slow
def test_a_tensor_as_large_as_the_last_takes_no_new_pages():
    """128 MiB, made and freed: cleared anew by the kernel each time, but for the first few not once it is kept."""
    run = [sys.executable, "-c", FAULTS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in environment.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    lines = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    given_back, done, kept = (line.split() for line in lines.splitlines())
    if done == ["False"]:
        pytest.skip("another C library")

    assert min(map(int, given_back)) > 50  # 64 pages of 2 MiB, or 32,768 small ones
    assert int(kept[-1]) < 10


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_another_c_library_is_left_alone(monkeypatch, missing):
    """No `mallopt` in it, no such library, no name for it."""

    def library(name):
        raise missing

    monkeypatch.setattr("ctypes.CDLL", library)
    assert keep_freed_memory() is False
