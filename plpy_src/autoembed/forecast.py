"""The effort to embed texts that are cut into chunks, from a sample of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from autoembed.batching import estimate_tokens
from autoembed.chunks import FEWEST_TOKENS, FUNCTION, STRUCTURE, Count, chunks_of

# So many characters of texts are really cut, which takes about half a second. The rest is taken to be like them.
SAMPLED_CHARACTERS = 500_000


def chunk_effort(
    texts: Sequence[tuple[str, str]],
    count: Count,
    chunk_size: int,
    chunking: str,
    chunk_overlap: int,
    check_interrupts: Callable[[], None] = lambda: None,
) -> tuple[int, int]:
    """The tokens and the number of all chunks of these texts, each with the prefix of its chunks before it.

    chunk_size, count: the most tokens of a chunk, and how they are counted.
    """
    way = STRUCTURE if chunking == FUNCTION else chunking
    all_tokens, all_chunks = _rough(texts, chunk_size)
    left, sampled, tokens, chunks = SAMPLED_CHARACTERS, [], 0, 0
    # The same texts have the same effort each time.
    for prefix, text in random.Random(0).sample(texts, len(texts)):
        part = text[:left]
        before = estimate_tokens(prefix) if prefix else 0
        room = max(chunk_size - before, FEWEST_TOKENS + chunk_overlap + sum(count([""])))
        for chunk in chunks_of(part, count, room, way, chunk_overlap, check_interrupts):
            tokens, chunks = tokens + chunk.tokens + before, chunks + 1
        sampled.append((prefix, part))
        left -= len(part)
        if left <= 0:
            break
    rough_tokens, rough_chunks = _rough(sampled, chunk_size)
    if not (chunks and rough_tokens):
        return all_tokens, all_chunks
    return math.ceil(all_tokens * tokens / rough_tokens), math.ceil(all_chunks * chunks / rough_chunks)


def _rough(texts: Sequence[tuple[str, str]], chunk_size: int) -> tuple[int, int]:
    """The same, as if each chunk were full."""
    tokens, chunks = 0, 0
    for prefix, text in texts:
        of_prefix, of_text = estimate_tokens(prefix) if prefix else 0, estimate_tokens(text)
        of_row = math.ceil(of_text / max(1, chunk_size - of_prefix))
        tokens, chunks = tokens + of_text + of_row * of_prefix, chunks + of_row
    return tokens, chunks
