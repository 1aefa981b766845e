"""OpenAI's embeddings endpoint and whatever speaks its protocol.

Written from the API reference, https://platform.openai.com/docs/api-reference/embeddings/create, which sets the limits.
It has one form for documents and queries; for models behind it that have two, see prefixed().
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import ProviderTrouble
from autoembed.model import PREFIXES, Ask, Embedded, Model, prefixed
from autoembed.providers import http

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

BASE_URL = "https://api.openai.com/v1"
MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
MAX_TOKENS_PER_INPUT: int | None = 8192

# The models that OpenAI made before it allowed shorter vectors refuse the parameter.
WITHOUT_DIMENSIONS = ("text-embedding-ada-002",)


def check(model: Model) -> None:
    http.check(
        model,
        default_url=BASE_URL,
        example="https://api.openai.com/v1, what comes before /embeddings",
        options=http.OPTIONS | PREFIXES,
    )


def embed(ask: Ask, network: Network) -> Embedded:
    key = keys.resolve(ask.model.api_key)
    url = http.url(ask.model, BASE_URL, "/embeddings")
    answer = http.post(ask, network, url, http.bearer(key), request_body(ask), key)
    return embedded_in(answer, len(ask.texts), ask.model.dimensions)


def abort() -> None:
    """Nothing to end: all it does goes over the network."""


def request_body(ask: Ask) -> dict[str, Any]:
    body = {"model": ask.model.model_id, "input": prefixed(ask), "encoding_format": "base64"}
    if ask.model.model_id in WITHOUT_DIMENSIONS:
        return body
    return {**body, "dimensions": ask.model.dimensions}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int, api: str = "OpenAI") -> Embedded:
    """The vectors of an answer in the order of its indexes, and the tokens it reports."""
    with http.reading(api):
        answer = http.parse(body)
        by_index = {item["index"]: item["embedding"] for item in answer["data"]}
        if len(answer["data"]) != count or set(by_index) != set(range(count)):
            raise ProviderTrouble(f"the provider answered with {len(by_index)} vectors for {count} texts")
        vectors: np.ndarray = http.matrix([by_index[index] for index in range(count)], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "usage", "total_tokens"))
