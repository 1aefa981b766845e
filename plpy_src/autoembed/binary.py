"""Vectors as PostgreSQL reads them: as text, and in the binary COPY format, which it reads many times faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# The signature, the flags and the length of the header's extension; and the end (PostgreSQL manual, COPY).
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
# The numbers of each type, big-endian. Two int16 (dimensions, zero) go before them: vector_recv(), halfvec_recv().
NUMBERS = {"vector": ">f4", "halfvec": ">f2"}


def copy_rows(vectors: np.ndarray, type_name: str) -> bytes:
    """Rows of (ordinal integer, vector or halfvec), counted from 1, as COPY … FROM … (FORMAT binary) takes them.

    vectors: (n, dimensions) float32. A number that a halfvec cannot hold becomes infinite, which PostgreSQL refuses.
    """
    import numpy as np

    count, dimensions = vectors.shape
    numbers = np.dtype((NUMBERS[type_name], dimensions))
    rows = np.empty(
        count,
        [
            ("fields", ">i2"),
            ("ordinal_bytes", ">i4"),
            ("ordinal", ">i4"),
            ("vector_bytes", ">i4"),
            ("dimensions", ">i2"),
            ("zero", ">i2"),
            ("numbers", numbers),
        ],
    )
    rows["fields"] = 2
    rows["ordinal_bytes"] = 4
    rows["ordinal"] = np.arange(1, count + 1)
    rows["vector_bytes"] = 4 + numbers.itemsize
    rows["dimensions"] = dimensions
    rows["zero"] = 0
    with np.errstate(over="ignore"):
        rows["numbers"] = vectors
    return HEADER + rows.tobytes() + TRAILER


def literals(vectors: np.ndarray) -> list[str]:
    """Vectors in pgvector's text form."""
    import numpy as np
    import orjson

    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    return [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY).decode() for row in rows]
