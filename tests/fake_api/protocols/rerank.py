"""The endpoints that rerank: Cohere's, version 2; Voyage's; Jina's, which many servers have; TEI's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from fake_api.behaviour import Behaviour, Limits
from fake_api.protocol import Ask, Item, Protocol, Refusal, count_tokens, only, strings, without
from fake_api.protocols import cohere, openai, voyage

WORDS = {
    "inputs": "batch size exceeds the maximum of {most}",
    "input": "a document has {found} tokens, more than {most}",
    "request": "the documents have {found} tokens, more than {most}",
}


def _checked(field: str, fields: frozenset[str], most: int, model: str | None) -> Callable[..., Ask]:
    def check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
        body = only(body, fields, behaviour)
        if not isinstance(body.get("query"), str) or not body["query"]:
            raise Refusal(400, "query is required")
        if model is not None and body.get("model") != model:
            raise Refusal(404, f"model '{body.get('model')}' not found")
        texts = strings(field)(body)
        tokens = count_tokens(texts, behaviour.within(Limits(most, 100_000, 600_000)), WORDS)
        return Ask(texts, model or "", 1, False, tokens, body["query"])

    return check


def _results(items: list[Item], field: str) -> list[dict[str, Any]]:
    """The best first, as all of them answer; an index that is left out is left out here, too."""
    scored = [(item.index, item.vector if isinstance(item.vector, str) else float(item.vector[0])) for item in items]
    best_first = sorted(scored, key=lambda one: -one[1] if isinstance(one[1], float) else 0)
    return [{field: score} | ({} if index is None else {"index": index}) for index, score in best_first]


def _cohere(ask: Ask, items: list[Item]) -> bytes:
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return json.dumps({"id": "0", "results": _results(items, "relevance_score"), "meta": meta}).encode()


def _voyage(ask: Ask, items: list[Item]) -> bytes:
    data = _results(items, "relevance_score")
    return json.dumps({"object": "list", "data": data, "usage": {"total_tokens": ask.tokens}}).encode()


def _jina(ask: Ask, items: list[Item]) -> bytes:
    results = _results(items, "relevance_score")
    return json.dumps({"model": ask.model, "results": results, "usage": {"total_tokens": ask.tokens}}).encode()


def _tei(ask: Ask, items: list[Item]) -> bytes:
    return json.dumps(_results(items, "score")).encode()


def _protocol(
    path: str, field: str, fields: set[str], most: int, model: str | None, answer: Any, like: Protocol
) -> Protocol:
    known = frozenset({"query", field, *fields, *({"model"} if model else ())})
    return Protocol(
        path=re.compile(path),
        fields=known,
        texts=strings(field),
        settings=without(field),
        check=_checked(field, known, most, model),
        answer=answer,
        usual_refusal=like.usual_refusal,
        error=like.error,
        bad_key=like.bad_key,
        limit_headers=like.limit_headers,
        over_limit=like.over_limit,
    )


_tei_like = openai.PROTOCOL._replace(
    error=lambda refusal: json.dumps({"error": refusal.message, "error_type": "Validation"}).encode(),
    bad_key=lambda key: None if key is None else Refusal(401, "Unauthorized"),
)

PROTOCOLS = [
    _protocol(
        "/v2/rerank", "documents", {"top_n", "max_tokens_per_doc"}, 1000, "rerank-v3.5", _cohere, cohere.PROTOCOL
    ),
    _protocol(
        "/voyage/v1/rerank",
        "documents",
        {"top_k", "return_documents", "truncation"},
        1000,
        "rerank-2.5",
        _voyage,
        voyage.PROTOCOL,
    ),
    _protocol(
        "/v1/rerank", "documents", {"top_n", "return_documents"}, 1000, "jina-reranker-v2", _jina, openai.PROTOCOL
    ),
    _protocol("/tei/rerank", "texts", {"raw_scores", "return_text", "truncate"}, 32, None, _tei, _tei_like),
]
