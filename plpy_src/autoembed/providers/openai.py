"""OpenAI's embeddings endpoint, and servers that speak its protocol.

Written from the API reference, https://platform.openai.com/docs/api-reference/embeddings/create, which sets the limits.
It has one form for documents and queries. For models behind it that have two, see prefixed().
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.answers import trouble_of_answer
from autoembed.errors import ProviderTrouble, Refused, Trouble
from autoembed.model import PREFIXES, Embedded, Model, Request, prefixed
from autoembed.providers import http
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

BASE_URL = "https://api.openai.com/v1"
MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
MAX_TOKENS_PER_INPUT: int | None = 8192
RUNS_IN_BACKEND = False

# Fields that a server may refuse. The request is then sent without them.
OPTIONAL_FIELDS = frozenset({"dimensions", "encoding_format"})
PARAM = re.compile(rb'"param"\s*:\s*"(\w+)"')

# The fields that servers refused in this process, by URL and model.
_refused: dict[tuple[str, str], frozenset[str]] = {}

# Models from before OpenAI allowed shorter vectors refuse the field dimensions.
WITHOUT_DIMENSIONS = ("text-embedding-ada-002",)


def check(model: Model) -> None:
    http.check(
        model,
        default_url=BASE_URL,
        example="https://api.openai.com/v1, what comes before /embeddings",
        options=PREFIXES,
    )


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    return embed_at(http.url(request.model, BASE_URL, "/embeddings"), request, network, http.bearer(key))


abort = http.abort


class FieldsRefused(Refused):
    """A refusal that names fields, which may be to blame instead of a text."""

    def __init__(self, message: str, fields: frozenset[str]) -> None:
        super().__init__(message)
        self.fields = fields


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray) -> Trouble:
    trouble = trouble_of_answer(status, headers, body)
    if not isinstance(trouble, Refused):
        return trouble
    param = PARAM.search(body)
    words = str(trouble) if param is None else f"{trouble} {param[1].decode()}"
    return FieldsRefused(str(trouble), frozenset(name for name in OPTIONAL_FIELDS if name in words))


def embed_at(url: str, request: Request, network: Network, headers: Mapping[str, str]) -> Embedded:
    """Asks again without the fields that the server names when it refuses; remembers them where that has worked."""
    which = (url, request.model.model_id)
    # A field that the model's options set is always sent.
    optional = OPTIONAL_FIELDS - request.model.extra_body(request.purpose).keys()
    left_out = _refused.get(which, frozenset()) & optional
    refusal: Refused | None = None
    while True:
        body = {name: value for name, value in request_body(request).items() if name not in left_out}
        try:
            embedded = http.post(request, network, url, headers, body, embedded_in, trouble_of)
        except FieldsRefused as error:
            named = error.fields & optional & body.keys()
            if not named:
                raise
            refusal = refusal or error
            left_out |= named
        except ProviderTrouble as error:
            if refusal and error.permanent:
                # The vectors probably have another length. The refusal says more about the cause.
                refusal.headers = error.headers
                raise refusal from error
            raise
        else:
            if refusal:
                _refused[which] = left_out
            return embedded


def request_body(request: Request) -> dict[str, Any]:
    body = {"model": request.model.model_id, "input": prefixed(request), "encoding_format": "base64"}
    if request.model.model_id in WITHOUT_DIMENSIONS:
        return body
    return {**body, "dimensions": request.model.dimensions}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int, api: str = "OpenAI") -> Embedded:
    """The vectors of an answer in the order of its indexes, and the tokens it reports.

    An item without an index has the index of its place: Google's endpoint leaves the first one out, others all.
    """
    with http.reading(api):
        answer = http.parse(body)
        embeddings = [item["embedding"] for item in answer["data"]]
        if len(embeddings) != count:
            raise ProviderTrouble(f"the provider answered with {len(embeddings)} vectors for {count} texts")
        indexes = [place if item.get("index") is None else item["index"] for place, item in enumerate(answer["data"])]
        by_index = dict(zip(indexes, embeddings, strict=True))
        if by_index.keys() != set(range(count)):
            raise ProviderTrouble(f"the provider's answer does not number its vectors from 0 to {count - 1}, each once")
        vectors: np.ndarray = matrix([by_index[index] for index in range(count)], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "usage", "total_tokens"))
