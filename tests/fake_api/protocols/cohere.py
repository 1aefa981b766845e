"""Cohere's embed endpoint, version 2."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fake_api.behaviour import Behaviour, Limits
from fake_api.protocol import (
    Ask,
    Item,
    Protocol,
    Refusal,
    count_tokens,
    json_item,
    known,
    only,
    strings,
    usually,
    without,
)
from fake_api.rate_limit import Allowance

MODELS = {"embed-v4.0": 1536, "embed-english-v3.0": 1024, "embed-multilingual-light-v3.0": 384}
FIELDS = frozenset({"model", "texts", "input_type", "embedding_types", "truncate", "output_dimension", "max_tokens"})
WORDS = {
    "inputs": "invalid request: total number of texts must be at most {most}",
    "input": "too many tokens: text exceeds {most} tokens - received {found}",
    "request": "too many tokens: size limit exceeded by {found} tokens",
}
texts_in = strings("texts")
usual_refusal = usually(
    {
        401: "invalid api token",
        404: "model not found, make sure the correct model ID was used",
        429: "You are using a Trial key, which is limited to 100 API calls / minute.",
        498: "your text contains content that violates our usage guidelines",
        500: "internal server error, this has been reported to our developers.",
    }
)


def check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    body = only(body, FIELDS, behaviour)
    model, old = body.get("model"), str(body.get("model")).endswith("-v3.0")
    full = known(model, behaviour, MODELS, Refusal(404, f"model '{model}' not found"))
    if body.get("input_type") not in ("search_document", "search_query", "classification", "clustering"):
        raise Refusal(400, "invalid request: valid input_type must be provided with the provided model")
    if body.get("embedding_types", ["float"]) != ["float"]:
        raise Refusal(400, "invalid request: valid embedding_types are float here")
    cut = body.get("truncate", "END") != "NONE"
    limits = behaviour.within(Limits(96, 512 if old else 128_000, 1_000_000))
    tokens = count_tokens(texts_in(body), limits, WORDS, cut)
    dimensions = body.get("output_dimension", full)
    if dimensions != full and (old or dimensions not in (256, 512, 1024, 1536)):
        raise Refusal(400, "invalid request: output_dimension is not valid for the provided model")
    if old and "output_dimension" in body:
        raise Refusal(400, "invalid request: output_dimension is not supported by the provided model")
    return Ask(texts_in(body), str(model), dimensions, False, tokens)


def answer(ask: Ask, items: list[Item]) -> bytes:
    meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": ask.tokens}}
    embeddings = {"float": [json_item(item) for item in items]}
    answer = {"id": "0", "response_type": "embeddings_by_type", "embeddings": embeddings, "texts": ask.texts}
    return json.dumps({**answer, "meta": meta}).encode()


def limit_headers(allowances: Sequence[Allowance], status: int) -> dict[str, str]:
    """Its reference names none; these are what users of trial keys see, not when they are refused."""
    for allowance in allowances:
        if allowance.unit == "requests" and status != 429:
            limit, left = str(allowance.per_minute), str(int(allowance.left))
            return {"x-trial-endpoint-call-limit": limit, "x-trial-endpoint-call-remaining": left}
    return {}


def over_limit(allowance: Allowance, usual: Refusal) -> Refusal:
    what = "tokens" if allowance.unit == "tokens" else "API calls"
    return Refusal(429, f"You are using a Trial key, which is limited to {allowance.per_minute} {what} / minute.")


PROTOCOL = Protocol(
    path=re.compile("/v2/embed"),
    fields=FIELDS,
    texts=texts_in,
    settings=without("texts"),
    check=check,
    answer=answer,
    usual_refusal=usual_refusal,
    error=lambda refusal: json.dumps({"id": "0", "message": refusal.message}).encode(),
    bad_key=lambda key: usual_refusal(401),
    limit_headers=limit_headers,
    over_limit=over_limit,
)
