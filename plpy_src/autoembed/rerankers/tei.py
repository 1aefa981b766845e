"""The /rerank endpoint of Text Embeddings Inference, which serves one model.

Written from https://huggingface.github.io/text-embeddings-inference. It takes 32 passages unless it is started with
another --max-client-batch-size, and reports no tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.model import Model, Request, Reranked
from autoembed.providers import http
from autoembed.rerankers.scores import scores_in

if TYPE_CHECKING:
    from autoembed.network import Network

RUNS_IN_BACKEND = False


def check(model: Model) -> None:
    http.check(model, default_url=None, example="http://127.0.0.1:8080, what comes before /rerank")


def rerank(request: Request, network: Network) -> Reranked:
    key = keys.resolve(request.model)
    url = http.url(request.model, "", "/rerank")
    return http.post(request, network, url, http.bearer(key), request_body(request), reranked_in)


def request_body(request: Request) -> dict[str, Any]:
    return {"query": request.query, "texts": list(request.texts), "truncate": True}


def reranked_in(body: bytes | bytearray, count: int, _dimensions: int) -> Reranked:
    with http.reading("Text Embeddings Inference"):
        return Reranked(scores_in(http.parse(body), count, "score"))
