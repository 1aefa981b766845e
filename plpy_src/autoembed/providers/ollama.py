"""Ollama's own endpoint; the provider openai speaks to its /v1.

Written from the API reference, https://docs.ollama.com/api/embed, which sets no limits. The limits here keep a request
short on a computer without a graphics card. Ollama shortens texts by the model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.answers import trouble_of_answer
from autoembed.errors import Refused, Trouble
from autoembed.model import PREFIXES, Embedded, Model, Request, prefixed
from autoembed.providers import http
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "http://127.0.0.1:11434"
MAX_INPUTS_PER_REQUEST = 64
MAX_TOKENS_PER_REQUEST = 32_000
MAX_TOKENS_PER_INPUT: int | None = None
RUNS_IN_BACKEND = False

# Words in an answer with status 500 that blame a text, which then fails each time it is sent.
TEXTS_FAULTS = (b"context length", b"NaN")


def check(model: Model) -> None:
    # A server with a base_url needs no key, so the default address becomes one.
    placed = replace(model, base_url=model.base_url or BASE_URL)
    http.check(placed, default_url=None, example=f"{BASE_URL}, what comes before /api", options=PREFIXES)


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    url = http.url(request.model, BASE_URL, "/api/embed")
    return http.post(request, network, url, http.bearer(key), request_body(request), embedded_in, trouble_of)


abort = http.abort


def request_body(request: Request) -> dict[str, Any]:
    return {
        "model": request.model.model_id,
        "input": prefixed(request),
        "dimensions": request.model.dimensions,
        "truncate": True,
    }


def embedded_in(body: bytes | bytearray, count: int, dimensions: int) -> Embedded:
    """The vectors of an answer, which are in the order of the texts, and the tokens it counted."""
    with http.reading("Ollama"):
        answer = http.parse(body)
        vectors = matrix(answer["embeddings"], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "prompt_eval_count"))


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray) -> Trouble:
    """The usual judgment, but a text may be to blame for a 500."""
    trouble = trouble_of_answer(status, headers, body)
    if status == 500 and any(fault in body for fault in TEXTS_FAULTS):
        return Refused(str(trouble))
    return trouble
