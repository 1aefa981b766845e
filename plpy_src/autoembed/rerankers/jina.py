"""Jina's rerank endpoint, and servers that speak its protocol: vLLM, Infinity, LiteLLM, llama.cpp.

Written from the API reference, https://api.jina.ai/redoc, and those of the servers. Some return the passages unless
they are told not to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.model import Model, Request, Reranked
from autoembed.providers import http
from autoembed.rerankers.scores import scores_in

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "https://api.jina.ai/v1"
RUNS_IN_BACKEND = False


def check(model: Model) -> None:
    http.check(model, default_url=BASE_URL, example=f"{BASE_URL}, what comes before /rerank")


def rerank(request: Request, network: Network) -> Reranked:
    key = keys.resolve(request.model)
    url = http.url(request.model, BASE_URL, "/rerank")
    return http.post(request, network, url, http.bearer(key), request_body(request), reranked_in)


def request_body(request: Request) -> dict[str, Any]:
    return {
        "model": request.model.model_id,
        "query": request.query,
        "documents": list(request.texts),
        "top_n": len(request.texts),
        "return_documents": False,
    }


def reranked_in(body: bytes | bytearray, count: int, _dimensions: int) -> Reranked:
    with http.reading("Jina"):
        answer = http.parse(body)
        scores = scores_in(answer["results"], count, "relevance_score")
        return Reranked(scores, http.tokens_in(answer, "usage", "total_tokens"))
