"""Cohere's embed endpoint, version 2.

Written from the API reference, https://docs.cohere.com/reference/embed: 96 texts a request. Tokens of a text:
https://docs.cohere.com/docs/cohere-embed. Statuses: https://docs.cohere.com/reference/errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.answers import trouble_of_answer
from autoembed.errors import ProviderTrouble, Refused, Trouble
from autoembed.model import Embedded, Model, Request
from autoembed.providers import http
from autoembed.providers.definition import check_tokens_per_input
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "https://api.cohere.com"
MAX_INPUTS_PER_REQUEST = 96
# The reference sets no limit for a request. One text of embed-v4.0 may have this many.
MAX_TOKENS_PER_REQUEST = 128_000
MAX_TOKENS_PER_INPUT: int | None = 128_000
RUNS_IN_BACKEND = False

# Models before embed-v4.0 take shorter texts and refuse output_dimension.
OLD_MODELS = "-v3.0"
OLD_MAX_TOKENS_PER_INPUT = 512
INPUT_TYPES = {"document": "search_document", "query": "search_query"}


def check(model: Model) -> None:
    http.check(model, default_url=BASE_URL, example=f"{BASE_URL}, what comes before /v2/embed")
    if model.model_id.endswith(OLD_MODELS):
        check_tokens_per_input(model, OLD_MAX_TOKENS_PER_INPUT)


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    url = http.url(request.model, BASE_URL, "/v2/embed")
    return http.post(request, network, url, http.bearer(key), request_body(request), embedded_in, trouble_of)


abort = http.abort


def request_body(request: Request) -> dict[str, Any]:
    body = {
        "model": request.model.model_id,
        "texts": list(request.texts),
        "input_type": INPUT_TYPES[request.purpose],
        # The reference does not describe the bytes of its base64 form.
        "embedding_types": ["float"],
        # Texts that are too long were cut before, or must not be cut.
        "truncate": "NONE",
    }
    if request.model.model_id.endswith(OLD_MODELS):
        return body
    return {**body, "output_dimension": request.model.dimensions}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int) -> Embedded:
    """The vectors of an answer, which are in the order of the texts, and the tokens that are billed."""
    with http.reading("Cohere"):
        answer = http.parse(body)
        vectors = matrix(answer["embeddings"]["float"], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "meta", "billed_units", "input_tokens"))


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray) -> Trouble:
    """The usual judgment, but 498 blocks a text, 499 is a request given up, and a trial key's month may be used up."""
    trouble = trouble_of_answer(status, headers, body)
    if status == 498:
        return Refused(str(trouble))
    if status == 499:
        return ProviderTrouble(str(trouble))
    if status == 429 and b"/ month" in body:
        return ProviderTrouble(str(trouble), permanent=True)
    return trouble
