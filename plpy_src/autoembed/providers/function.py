"""An SQL function of the user's: texts in, vectors out. It runs with its owner's rights; see sql/22_embedders.sql."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoembed.errors import Refused
from autoembed.model import Ask, Embedded, Model
from autoembed.providers import http

if TYPE_CHECKING:
    from autoembed.network import Network

# Lower than where the function is a gateway: it answers before anything else is done in this session.
MAX_INPUTS_PER_REQUEST = 100
MAX_TOKENS_PER_REQUEST = 100_000
MAX_TOKENS_PER_INPUT: int | None = None

# vector_send(): two int16 before the numbers, which are big-endian.
HEADER_BYTES = 4


def check(model: Model) -> None:
    http.check_without(model, "api_key", "base_url")
    http.check_options(model, frozenset({"query_function"}))


def embed(ask: Ask, network: Network) -> Embedded:
    import numpy as np

    assert ask.database is not None
    answer = ask.database.call_embedder(ask.model.name, ask.purpose, ask.texts)
    if len(answer) != len(ask.texts):
        raise Refused(f"the function returned {len(answer)} vectors for {len(ask.texts)} texts")
    sent = [vector for vector in answer if vector is not None]
    if len(sent) < len(answer):
        raise Refused("the function returned NULL in place of a vector")
    vectors = [np.frombuffer(vector, ">f4", offset=HEADER_BYTES) for vector in sent]
    return Embedded(http.matrix(vectors, len(vectors), ask.model.dimensions))


def abort() -> None:
    """Nothing to end: it runs in the backend's own thread, where a cancel ends it."""
