"""The vectors in a provider's answer, as numbers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoembed.errors import ProviderTrouble, Refused

if TYPE_CHECKING:
    import numpy as np


def matrix(embeddings: Sequence[Any], count: int, dimensions: int) -> np.ndarray:
    """Embeddings, lists of numbers or base64 of float32, as (count, dimensions) float32.

    Raises ValueError for one in another form. Raises ProviderTrouble if their count or their length is wrong, and
    Refused if one is not finite, or zero: its cosine distance is NaN.
    """
    import numpy as np

    vectors = [_vector(embedding) for embedding in embeddings]
    if len(vectors) != count:
        raise ProviderTrouble(f"the provider answered with {len(vectors)} vectors for {count} texts")
    lengths = {len(vector) for vector in vectors}
    if lengths != {dimensions}:
        wrong = max(lengths - {dimensions})
        raise ProviderTrouble(
            f"the provider's vectors have {wrong} dimensions, the model is defined with {dimensions}", permanent=True
        )
    stacked = np.stack(vectors)
    if not np.isfinite(stacked).all():
        raise Refused("the provider answered with a vector that is not finite")
    # Numbers whose squares are zero in float32 make a zero length, too.
    with np.errstate(over="ignore", under="ignore"):
        if not np.einsum("ij,ij->i", stacked, stacked).all():
            raise Refused("the provider answered with a vector of length zero, which has no direction")
    return stacked


def _vector(embedding: Any) -> np.ndarray:
    import numpy as np

    if isinstance(embedding, str):
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        except binascii.Error as error:
            raise ValueError("invalid base64") from error
    # JSON writers put null where a number is not finite.
    numbers = np.array([np.nan if n is None else n for n in embedding] if isinstance(embedding, list) else embedding)
    if numbers.ndim != 1 or numbers.dtype.kind not in "fi":
        raise ValueError("an embedding that is not a list of numbers")
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)
