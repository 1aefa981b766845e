"""What a process keeps of the memory that it frees: glibc's mallopt(3), malloc_trim(3); elsewhere these do nothing."""

from __future__ import annotations

import ctypes

# malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8


def share_one_arena() -> None:
    """Otherwise each thread has a heap of its own, which keeps what it once had; a lane's do well with one for all."""
    _call("mallopt", M_ARENA_MAX, 1)


def keep(block_bytes: int, free_bytes: int) -> None:
    """Keeps freed blocks up to a size, 32 MiB at most, and so much at the heap's end; the system gets the rest."""
    _call("mallopt", M_MMAP_THRESHOLD, block_bytes)
    _call("mallopt", M_TRIM_THRESHOLD, free_bytes)


def trim() -> None:
    """Gives back all that is free. Takes 1 to 3 ms."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function:
        function(*arguments)
