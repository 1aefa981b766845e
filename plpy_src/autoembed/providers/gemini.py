"""Google's Gemini API.

Written from the API reference, https://ai.google.dev/api/embeddings#method:-models.batchembedcontents. Dimensions, task
types and tokens of a text: https://ai.google.dev/gemini-api/docs/embeddings. Errors:
https://ai.google.dev/gemini-api/docs/troubleshooting. The 100 texts a request are what the API says when it has more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from autoembed import keys
from autoembed.answers import trouble_of_answer
from autoembed.errors import ProviderTrouble, Refused, Trouble
from autoembed.model import PREFIXES, Embedded, Model, Request, prefixed
from autoembed.providers import http
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

BASE_URL = "https://generativelanguage.googleapis.com/v1beta"
MAX_INPUTS_PER_REQUEST = 100
# The reference sets no limit. A request should be a small part of the tokens that a key has per minute.
MAX_TOKENS_PER_REQUEST = 20_000
MAX_TOKENS_PER_INPUT: int | None = 2048
RUNS_IN_BACKEND = False

TASK_TYPES = {"document": "RETRIEVAL_DOCUMENT", "query": "RETRIEVAL_QUERY"}
# These models read the task in the text, where document_prefix and query_prefix put it.
WITHOUT_TASK_TYPE = "gemini-embedding-2"
RETRY_DELAY = re.compile(rb'"retryDelay"\s*:\s*"([0-9]+(?:\.[0-9]+)?)s"')


def check(model: Model) -> None:
    http.check(
        model,
        default_url=BASE_URL,
        example=f"{BASE_URL}, what comes before /models",
        options=PREFIXES,
    )


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    headers = {} if key is None else {"x-goog-api-key": key}
    url = http.url(request.model, BASE_URL, f"/{quote(name_of(request.model))}:batchEmbedContents")
    return http.post(request, network, url, headers, request_body(request), embedded_in, trouble_of)


abort = http.abort


def name_of(model: Model) -> str:
    return "models/" + model.model_id.removeprefix("models/")


def request_body(request: Request) -> dict[str, Any]:
    name = name_of(request.model)
    each: dict[str, Any] = {"model": name, "outputDimensionality": request.model.dimensions}
    if WITHOUT_TASK_TYPE not in name:
        each["taskType"] = TASK_TYPES[request.purpose]
    return {"requests": [{**each, "content": {"parts": [{"text": text}]}} for text in prefixed(request)]}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int) -> Embedded:
    """The vectors of an answer, which are in the order of the texts, at unit length; and the tokens it reports."""
    with http.reading("Gemini"):
        answer = http.parse(body)
        vectors = matrix([embedding["values"] for embedding in answer["embeddings"]], count, dimensions)
        return Embedded(unit_length(vectors), http.tokens_in(answer, "usageMetadata", "promptTokenCount"))


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Brings vectors to length 1. gemini-embedding-001 cuts them short, and inner products are then no cosines."""
    import numpy as np

    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scaled: np.ndarray = (vectors / lengths).astype(np.float32)
    return scaled


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray) -> Trouble:
    """The usual judgment, but a bad key or a missing bill is answered with 400, and the delay is in the body."""
    trouble = trouble_of_answer(status, headers, body)
    if isinstance(trouble, Refused) and (b"API_KEY_INVALID" in body or b"FAILED_PRECONDITION" in body):
        return ProviderTrouble(str(trouble), permanent=True)
    delay = RETRY_DELAY.search(body)
    if status == 429 and "retry-after" not in headers and delay:
        return ProviderTrouble(str(trouble), retry_after_seconds=float(delay[1]))
    return trouble
