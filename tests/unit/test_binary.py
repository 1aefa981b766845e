"""The binary form of vectors, byte by byte as PostgreSQL's manual and pgvector have it."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from autoembed.binary import copy_rows


@pytest.mark.parametrize(("type_name", "code", "width"), [("vector", "f", 4), ("halfvec", "e", 2)])
def test_each_row_is_its_number_and_its_vector(type_name: str, code: str, width: int) -> None:
    vectors = np.array([[1.0, -0.5, 0.25], [0.0, 2.0, -3.5]], np.float32)

    data = copy_rows(vectors, type_name)

    expected = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
    for number, vector in enumerate(vectors, 1):
        expected += struct.pack(">hiiihh", 2, 4, number, 4 + 3 * width, 3, 0) + struct.pack(f">3{code}", *vector)
    assert data == expected + struct.pack(">h", -1)


def test_a_number_that_a_halfvec_cannot_hold_becomes_infinite_and_warns_nobody() -> None:
    data = copy_rows(np.array([[70_000.0]], np.float32), "halfvec")

    assert data[-4:-2] == struct.pack(">e", float("inf"))
