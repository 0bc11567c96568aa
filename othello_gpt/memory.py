"""Keeping the memory of freed tensors: why a full cache can cost as much as a second forward pass, and how it does not.

On a CPU the C library gives the memory of large freed tensors back to the kernel, which hands it out again page by
page, each cleared first. A run that keeps every activation needs new pages for all of them.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's numbers of these settings, in malloc.h


def keep_freed_memory() -> bool:
    """From now on this process keeps the memory that it frees, for its own next tensors.

    For whoever runs with large caches again and again: keeping every activation of a batch of 256x59 at the published
    size then adds nothing that can be measured to a plain pass, where it adds 60 to 90 % otherwise
    (`benchmarks/bench_cache.py`). The process does not shrink until it ends, at its largest it holds somewhat more, and
    this cannot be undone. On GPUs PyTorch keeps freed memory anyway.

    Returns:
        Whether it could be done: with glibc's allocator, so on most Linux systems. Elsewhere nothing changes.

    Source: `mallopt` in the Linux manual; in the environment of a program it is `MALLOC_TRIM_THRESHOLD_=-1
    MALLOC_MMAP_MAX_=0`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows names its own
        return False
    never, none = -1, 0
    return mallopt(M_TRIM_THRESHOLD, never) == mallopt(M_MMAP_MAX, none) == 1
