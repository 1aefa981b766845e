"""Voyage AI's embeddings endpoint.

Written from the API reference, https://docs.voyageai.com/reference/embeddings-api: 1,000 texts a request, and 120,000,
320,000 or 1,000,000 tokens, by model. Tokens of a text: https://docs.voyageai.com/docs/embeddings. Statuses:
https://docs.voyageai.com/docs/error-codes. The answer is in the form of OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.answers import trouble_of_answer
from autoembed.errors import ProviderTrouble, Trouble
from autoembed.model import Embedded, Model, Request
from autoembed.providers import http, openai
from autoembed.providers.definition import check_tokens_per_input

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "https://api.voyageai.com/v1"
MAX_INPUTS_PER_REQUEST = 1000
# Every model takes this many. max_tokens_per_request can raise it for a model that takes more.
MAX_TOKENS_PER_REQUEST = 120_000
MAX_TOKENS_PER_INPUT: int | None = 32_000
RUNS_IN_BACKEND = False

SHORT_MODELS = ("voyage-law-2", "voyage-code-2")
SHORT_MAX_TOKENS_PER_INPUT = 16_000
# These models have only one length of vectors.
WITHOUT_DIMENSIONS = (*SHORT_MODELS, "voyage-finance-2", "voyage-multilingual-2", "voyage-3", "voyage-3-lite")


def check(model: Model) -> None:
    http.check(model, default_url=BASE_URL, example=f"{BASE_URL}, what comes before /embeddings")
    if model.model_id in SHORT_MODELS:
        check_tokens_per_input(model, SHORT_MAX_TOKENS_PER_INPUT)


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    url = http.url(request.model, BASE_URL, "/embeddings")
    return http.post(request, network, url, http.bearer(key), request_body(request), embedded_in, trouble_of)


abort = http.abort


embedded_in = partial(openai.embedded_in, api="Voyage")


def request_body(request: Request) -> dict[str, Any]:
    body = {
        "model": request.model.model_id,
        "input": list(request.texts),
        "input_type": request.purpose,
        "encoding_format": "base64",
        # Texts that are too long were cut before, or must not be cut.
        "truncation": False,
    }
    if request.model.model_id in WITHOUT_DIMENSIONS:
        return body
    return {**body, "output_dimension": request.model.dimensions}


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray) -> Trouble:
    """The usual judgment, but an unknown model is answered with 400."""
    trouble = trouble_of_answer(status, headers, body)
    if status == 400 and b"Supported models are" in body:
        return ProviderTrouble(str(trouble), permanent=True)
    return trouble
