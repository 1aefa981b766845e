"""Voyage AI's embeddings endpoint: an answer like OpenAI's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fake_api.behaviour import Behaviour, Limits
from fake_api.protocol import Ask, Item, Protocol, Refusal, count_tokens, known, only, strings, usually, without
from fake_api.protocols import openai

MODELS = {"voyage-4": 1024, "voyage-4-lite": 1024, "voyage-law-2": 1024, "voyage-code-2": 1536}
TOKENS = {"voyage-4": 320_000, "voyage-4-lite": 1_000_000}
FIELDS = frozenset(
    {"model", "input", "input_type", "truncation", "encoding_format", "output_dimension", "output_dtype"}
)
WORDS = {
    "inputs": "The batch size limit is {most}.",
    "input": "An input has {found} tokens, which exceeds the context length of {most}.",
    "request": "The max allowed tokens per submitted batch is {most}. Your batch has {found} tokens after truncation.",
}
texts_in = strings("input")
usual_refusal = usually(
    {
        401: "Provided API key is invalid.",
        403: "Access from your IP address is forbidden.",
        429: "You have exceeded your rate limit.",
        500: "Unexpected issue on our servers.",
        503: "Our servers are currently experiencing high traffic.",
    }
)


def check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    body = only(body, FIELDS, behaviour)
    model = body.get("model")
    unknown = f"Model {model} is not supported. Supported models are {sorted(MODELS)}."
    full = known(model, behaviour, MODELS, Refusal(400, unknown))
    old = full != 1024 or model == "voyage-law-2"
    if body.get("input_type") not in (None, "query", "document"):
        raise Refusal(400, "Argument 'input_type' must be query, document or null.")
    if body.get("encoding_format") not in (None, "base64"):
        raise Refusal(400, "Argument 'encoding_format' must be base64 or null.")
    limits = behaviour.within(Limits(1000, 16_000 if old else 32_000, TOKENS.get(str(model), 120_000)))
    tokens = count_tokens(texts_in(body), limits, WORDS, cut=body.get("truncation", True) is not False)
    dimensions = body.get("output_dimension", full)
    if dimensions not in ((full,) if old else (256, 512, 1024, 2048)):
        raise Refusal(400, f"Argument 'output_dimension' = {dimensions} is not supported by {model}.")
    return Ask(texts_in(body), str(model), dimensions, body.get("encoding_format") == "base64", tokens)


def answer(ask: Ask, items: list[Item]) -> bytes:
    return openai.list_of(items, ask, {"total_tokens": ask.tokens})


PROTOCOL = Protocol(
    path=re.compile("/voyage/v1/embeddings"),
    fields=FIELDS,
    texts=texts_in,
    settings=without("input"),
    check=check,
    answer=answer,
    usual_refusal=usual_refusal,
    error=lambda refusal: json.dumps({"detail": refusal.message}).encode(),
    bad_key=lambda key: usual_refusal(401),
)
