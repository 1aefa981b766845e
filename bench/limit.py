"""The limit: how fast the server takes vectors that are ready, by plain batched UPDATEs with binary parameters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg import pq
from psycopg.types import TypeInfo

from bench import documents
from fake_api import FakeApi
from harness import Connection

BATCH_SIZE = 100
UPDATE = b"""
UPDATE documents AS d SET embedding = new.embedding
FROM unnest($1, $2) AS new (id, embedding) WHERE d.id = new.id
"""

Batch = tuple[bytes, bytes]


def batches(db: Connection, api: FakeApi) -> list[Batch]:
    """The arrays of ids and vectors of all rows, in Postgres' binary form."""
    halfvec = TypeInfo.fetch(db, "halfvec")
    integer = TypeInfo.fetch(db, "integer")
    assert halfvec and integer
    rows = db.execute("SELECT id, embedding_input(d) FROM documents AS d ORDER BY id").fetchall()
    made = []
    for start in range(0, len(rows), BATCH_SIZE):
        ids, texts = zip(*rows[start : start + BATCH_SIZE], strict=True)
        vectors = documents.vectors_of(api, list(texts))
        made.append((_array(integer.oid, np.array(ids, ">i4")[:, None]), _array(halfvec.oid, _halfvecs(vectors))))
    return made


def write(batches: Sequence[Batch], connections: Sequence[Connection]) -> float:
    """Write them all over these connections side by side; return when the first UPDATE began, in seconds since 1970."""
    types = [info.array_oid for name in ("integer", "halfvec") if (info := TypeInfo.fetch(connections[0], name))]
    waiting = iter(batches)

    def run(connection: Connection) -> None:
        for ids, vectors in waiting:  # next() of a list's iterator is atomic
            result = connection.pgconn.exec_prepared(b"write", [ids, vectors], [pq.Format.BINARY] * 2)
            if result.status != pq.ExecStatus.COMMAND_OK:
                raise RuntimeError(result.error_message.decode())

    for connection in connections:
        connection.pgconn.prepare(b"write", UPDATE, types)
    began = time.time()
    with ThreadPoolExecutor(len(connections)) as pool:
        list(pool.map(run, connections))
    return began


def _halfvecs(vectors: NDArray[np.float32]) -> NDArray[Any]:
    """pgvector's binary layout: int16 dimensions, int16 zero, big-endian float16s."""
    count, dimensions = vectors.shape
    made = np.zeros(count, [("dimensions", ">i2"), ("unused", ">i2"), ("values", ">f2", dimensions)])
    made["dimensions"], made["values"] = dimensions, vectors
    return made


def _array(element_oid: int, elements: NDArray[Any]) -> bytes:
    """Postgres' binary layout of an array of one dimension: a header, then each element behind its length."""
    raw = np.ascontiguousarray(elements).view(np.uint8).reshape(len(elements), -1)
    lengths = np.full((len(raw), 1), raw.shape[1], ">i4").view(np.uint8)
    header = np.array([1, 0, element_oid, len(raw), 1], ">i4")
    return header.tobytes() + np.hstack([lengths, raw]).tobytes()
