"""Vectors that follow from the text, and tokens that follow from its length."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


def embedding_of(text: str, dimensions: int = 1536, model: str = "text-embedding-3-small") -> Vector:
    """The unit vector that the fake API gives for this text; fewer dimensions are a prefix, rescaled."""
    seed = hashlib.sha256(f"{model}\0{text}".encode("utf-8", "surrogatepass")).digest()
    # numpy keeps the raw stream of a bit generator stable, not what its distributions make of it
    raw = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(-(-dimensions // 4))
    numbers = raw.astype("<u8").view("<i2")[:dimensions].astype(np.int64)
    # a sum of integers is exact, so the last bit does not depend on the machine's order of adding
    return (numbers / math.sqrt(int(np.dot(numbers, numbers)))).astype(np.float32)


def tokens_in(text: str) -> int:
    return -(-len(text) // 4)


def relevance_of(query: str, text: str) -> Vector:
    """The score that the fake API gives this text, as a vector of one number: the share of the query's words in it."""
    words = query.lower().split()
    return np.array([sum(word in text.lower().split() for word in words) / max(len(words), 1)], np.float32)
