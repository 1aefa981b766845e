"""The freed memory that a process keeps, by glibc's mallopt(3) and malloc_trim(3). Without glibc nothing happens."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(), from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8


def share_one_arena() -> None:
    """Lets all threads share one heap. Otherwise each thread has a heap that keeps the most it ever used."""
    _call("mallopt", M_ARENA_MAX, 1)


def keep(block_bytes: int, free_bytes: int) -> None:
    """Keeps freed blocks up to a size (at most 32 MiB), and so much at the end of the heap. The rest is given back."""
    _call("mallopt", M_MMAP_THRESHOLD, block_bytes)
    _call("mallopt", M_TRIM_THRESHOLD, free_bytes)


def trim() -> None:
    """Gives all free memory back. Takes 1 to 3 ms."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function:
        function(*arguments)
