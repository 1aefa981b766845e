"""Cuts a long text; prints the bytes that this took beside the text, and the longest time between two interrupts.

python -m bench.long_text MODEL MEGABYTES
"""

from __future__ import annotations

import resource
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
    list(chunks_of(part[:100_000], count, TOKENS))
    before = most = _bytes()
    longest, last = 0.0, time.monotonic()

    def note() -> None:
        nonlocal longest, last, most
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        most = max(most, _bytes())

    for _ in chunks_of(text, count, TOKENS, between_steps=note):
        pass
    print(most - before, longest)


def _bytes() -> int:
    """The memory that the process has now."""
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])


main()
