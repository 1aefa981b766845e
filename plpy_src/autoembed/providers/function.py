"""An SQL function of the user: texts in, vectors out, with its owner's rights; see sql/code/22_embedders.sql."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from autoembed.errors import Refused
from autoembed.model import Embedded, Model, Request
from autoembed.providers.definition import check_options, check_without
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    from autoembed.providers import CallEmbedder

# Requests are small, because nothing else happens in the session until the function returns.
MAX_INPUTS_PER_REQUEST = 100
MAX_TOKENS_PER_REQUEST = 100_000
MAX_TOKENS_PER_INPUT: int | None = None
RUNS_IN_BACKEND = True

# vector_send() puts two int16 before the numbers, which are big-endian. In bytes.
HEADER_BYTES = 4


def check(model: Model) -> None:
    check_without(model, "api_key", "base_url")
    check_options(model, frozenset({"query_function"}))


def embed(request: Request, call_embedder: CallEmbedder) -> Embedded:
    import numpy as np

    began_at = time.monotonic()
    answer = call_embedder(request.model.name, request.purpose, request.texts, request.timeout_seconds)
    seconds = time.monotonic() - began_at
    if len(answer) != len(request.texts):
        raise Refused(f"the function returned {len(answer)} vectors for {len(request.texts)} texts")
    sent = [vector for vector in answer if vector is not None]
    if len(sent) < len(answer):
        raise Refused("the function returned NULL in place of a vector")
    vectors = [np.frombuffer(vector, ">f4", offset=HEADER_BYTES) for vector in sent]
    return Embedded(matrix(vectors, len(vectors), request.model.dimensions), seconds=seconds)


def abort() -> None:
    """Does nothing: the function runs in the backend's own thread, where a cancel ends it."""
