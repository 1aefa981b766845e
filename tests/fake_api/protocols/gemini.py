"""Google's Gemini API: a batch of requests, one a text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fake_api.behaviour import Behaviour, Limits, is_count
from fake_api.protocol import Ask, Item, Protocol, Refusal, count_tokens, json_item, known, only, usually, without
from fake_api.rate_limit import Allowance
from fake_api.vectors import Vector, embedding_of

MODELS = {"gemini-embedding-001": 3072, "gemini-embedding-2": 3072}
FIELDS = frozenset({"model", "taskType", "outputDimensionality", "title"})
WORDS = {
    "inputs": "* BatchEmbedContentsRequest.requests: at most {most} requests can be in one batch",
    "input": "The input token count ({found}) exceeds the maximum number of tokens allowed ({most}).",
    "request": "The input token count ({found}) exceeds the maximum number of tokens allowed ({most}).",
}
STATUSES = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
TASKS = {"RETRIEVAL_DOCUMENT", "RETRIEVAL_QUERY", "SEMANTIC_SIMILARITY", "CLASSIFICATION", "CLUSTERING"}
usual_refusal = usually(
    {
        403: "Permission denied on resource project.",
        404: "The model is not found for API version v1beta, or is not supported for embedContent.",
        429: "You exceeded your current quota, please check your plan and billing details.",
        500: "An internal error has occurred. Please retry.",
        503: "The model is overloaded. Please try again later.",
    }
)


def requests_in(body: Any) -> list[dict[str, Any]]:
    requests = body.get("requests") if isinstance(body, dict) else None
    return [request for request in requests if isinstance(request, dict)] if isinstance(requests, list) else []


def texts_in(body: Any) -> list[str]:
    contents = [request.get("content") for request in requests_in(body)]
    parts = [content.get("parts") for content in contents if isinstance(content, dict)]
    firsts = [part[0] for part in parts if isinstance(part, list) and len(part) == 1 and isinstance(part[0], dict)]
    return [first["text"] for first in firsts if isinstance(first.get("text"), str)]


def settings_in(body: Any) -> dict[str, Any]:
    """Those of the first of its requests: all must have the same."""
    return without("content")(next(iter(requests_in(body)), {}))


def check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    texts, settings = texts_in(body), settings_in(body)
    model = address["model"]
    full = known(model, behaviour, MODELS, usual_refusal(404))
    given = body.get("requests") if isinstance(body, dict) else None
    if not isinstance(given, list) or not texts or len(texts) != len(given) or not all(texts):
        raise Refusal(400, "* BatchEmbedContentsRequest.requests[0].content: contents is not specified")
    if any(without("content")(request) != settings for request in requests_in(body)):
        raise Refusal(400, "the requests of one batch differ")
    if settings.get("model") != f"models/{model}":
        raise Refusal(400, "* BatchEmbedContentsRequest.requests[0].model: does not match the model of the batch")
    if settings.get("taskType", "CLUSTERING") not in TASKS or ("taskType" in settings and model.endswith("-2")):
        raise Refusal(400, "Invalid value at 'requests[0].task_type'")
    only(settings, FIELDS, behaviour)
    limits = behaviour.within(Limits(100, 8192 if model.endswith("-2") else 2048, 1_000_000))
    dimensions = settings.get("outputDimensionality", full)
    if not is_count(dimensions) or dimensions > full:
        raise Refusal(400, f"output_dimensionality must be between 1 and {full}")
    return Ask(texts, model, dimensions, False, count_tokens(texts, limits, WORDS))


def answer(ask: Ask, items: list[Item]) -> bytes:
    embeddings = [{"values": json_item(item)} for item in items]
    return json.dumps({"embeddings": embeddings, "usageMetadata": {"promptTokenCount": ask.tokens}}).encode()


def error(refusal: Refusal) -> bytes:
    status = STATUSES.get(refusal.status, "UNKNOWN")
    error: dict[str, Any] = {"code": refusal.status, "message": refusal.message, "status": status}
    if refusal.details:
        error["details"] = refusal.details
    return json.dumps({"error": error}).encode()


def bad_key(key: str | None) -> Refusal:
    if key is None:
        return Refusal(403, "Method doesn't allow unregistered callers. Please use API Key.")
    info = detail("ErrorInfo", reason="API_KEY_INVALID", domain="googleapis.com")
    return Refusal(400, "API key not valid. Please pass a valid API key.", details=[info])


def over_limit(allowance: Allowance, usual: Refusal) -> Refusal:
    """When to come back is in the body only."""
    metric = "requests" if allowance.unit == "requests" else "input_token_count"
    quota = {"quotaMetric": f"generativelanguage.googleapis.com/embed_content_{metric}"}
    details = [detail("QuotaFailure", violations=[{**quota, "quotaValue": str(allowance.per_minute)}])]
    if allowance.wait_seconds != math.inf:
        details.append(detail("RetryInfo", retryDelay=f"{allowance.wait_seconds:.9f}s"))
    return Refusal(429, usual.message, details=details)


def detail(kind: str, **fields: Any) -> dict[str, Any]:
    return {"@type": f"type.googleapis.com/google.rpc.{kind}", **fields}


def cut(text: str, dimensions: int, model: str) -> Vector:
    """Shortened by cutting, so no longer of unit length."""
    return embedding_of(text, max(dimensions, MODELS.get(model, 0)), model)[:dimensions]


PROTOCOL = Protocol(
    path=re.compile("/v1beta/models/(?P<model>[^/]+):batchEmbedContents"),
    key_header="x-goog-api-key",
    fields=FIELDS,
    texts=texts_in,
    settings=settings_in,
    check=check,
    answer=answer,
    usual_refusal=usual_refusal,
    error=error,
    bad_key=bad_key,
    embed=cut,
    requests_in=len,  # each text of a batch counts, as users of small quotas find
    over_limit=over_limit,
)
