"""Keeping the memory of freed tensors: why a full cache can cost as much as a second forward pass, and how it does not.

On a CPU the C library gives the memory of large freed tensors back to the kernel, which hands it out again page by
page, each cleared first. A run that keeps every activation needs new pages for all of them.
"""

import ctypes
import os

# glibc's numbers of these settings, in malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4

LARGEST_BLOCK = 2**25  # glibc lets no larger ones count as anything but single mappings
MOST_KEPT = 2**31 - 1

_kept = 2 * LARGEST_BLOCK  # what glibc keeps at most by itself


def keep_freed_memory() -> bool:
    """From now on this process keeps all the memory that it frees, for its own next tensors.

    `run_with_cache` by itself has the process keep room for the next cache of its size, up to 2 GiB and in tensors of
    up to 32 MiB: for batches of 64 games at the published size. This call is for whoever runs with larger ones again
    and again: keeping every activation of a batch of 256x59 then adds nothing that can be measured to a plain pass,
    where it adds 60 to 95 % otherwise (`benchmarks/bench_cache.py`). The process does not shrink until it ends, at its
    largest it holds somewhat more, and this cannot be undone. On GPUs PyTorch keeps freed memory anyway.

    Returns:
        Whether it could be done: with glibc's allocator, so on most Linux systems. Elsewhere nothing changes.

    Source: `mallopt` in the Linux manual; in the environment of a program it is `MALLOC_TRIM_THRESHOLD_=-1
    MALLOC_MMAP_MAX_=0`.
    """
    global _kept
    never, none = -1, 0
    done = _set({M_TRIM_THRESHOLD: never, M_MMAP_MAX: none})
    if done:
        _kept = MOST_KEPT
    return done


def keep_room_for(n_bytes: int) -> None:
    """Once as much as this is freed, the process keeps it for its next tensors: up to 2 GiB, and 32 MiB of each.

    glibc does the same for what single tensors free, and stops at 64 MiB. Whoever sets its variables in the
    environment of the program, `MALLOC_TRIM_THRESHOLD_` above all, has decided, and nothing is done.
    """
    global _kept
    wanted = min(n_bytes * 3 // 2, MOST_KEPT)  # half as much again, for what a run frees besides
    if wanted > _kept and not any(name.startswith(("MALLOC_", "GLIBC_")) for name in os.environ):
        _kept = wanted
        _set({M_TRIM_THRESHOLD: wanted, M_MMAP_THRESHOLD: LARGEST_BLOCK})


def _set(values: dict[int, int]) -> bool:
    """Whether glibc took all these settings; another C library has none."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows names its own
        return False
    return all(mallopt(setting, value) == 1 for setting, value in values.items())
