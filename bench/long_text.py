"""Cuts a long text; prints the bytes that this took beside the text, and the longest time between two interrupts.

python -m bench.long_text MODEL MEGABYTES
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from autoembed.chunks import chunks_of
from autoembed.onnx_model import count_tokens, load_tokenizer
from bench import manuals
from bench.splitters import TOKENS


def main() -> None:
    folder, megabytes = sys.argv[1:]
    part = "\n\n".join(manuals.manuals())
    text = part * (1 + int(megabytes) * 1_000_000 // len(part))
    count = partial(count_tokens, load_tokenizer(folder))
    count(["a word"])
    before = _bytes("VmRSS")
    longest, last = 0.0, time.monotonic()

    def note() -> None:
        nonlocal longest, last
        longest, last = max(longest, time.monotonic() - last), time.monotonic()

    for _ in chunks_of(text, count, TOKENS, between_steps=note):
        pass
    # Memory that was freed in between counts, too: a look between the steps would miss it.
    print(_bytes("VmHWM") - before, longest)


def _bytes(figure: str) -> int:
    """The memory that the process has now (VmRSS), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{figure}:"))


main()
