"""Ollama's own endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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
    retry_after,
    strings,
    usually,
    without,
)
from fake_api.rate_limit import Allowance

MODELS = {"nomic-embed-text": 768, "all-minilm": 384}
FIELDS = frozenset({"model", "input", "truncate", "dimensions", "keep_alive", "options"})
WORDS = {
    "inputs": "too many inputs: {most}",
    "input": "the input length exceeds the context length",
    "request": "too many tokens: {most}",
}
texts_in = strings("input")
usual_refusal = usually(
    {
        401: "unauthorized",
        404: "model not found",
        429: "too many requests",
        503: "server busy, please try again",
    }
)


def check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    body = only(body, FIELDS, behaviour)
    model = body.get("model")
    full = known(model, behaviour, MODELS, Refusal(404, f'model "{model}" not found, try pulling it first'))
    texts = texts_in(body)
    if isinstance(body.get("input"), list) and len(texts) != len(body["input"]):
        raise Refusal(400, "invalid input type")
    limits = behaviour.within(Limits(1_000_000, 2048, 1 << 40))
    tokens = count_tokens(texts, limits, WORDS, cut=body.get("truncate", True) is not False)
    # More than the model has changes nothing.
    dimensions = min(body.get("dimensions") or full, full)
    return Ask(texts, str(model), dimensions, False, tokens)


def over_limit(allowance: Allowance, usual: Refusal) -> Refusal:
    """It has no limits of its own; a proxy before it may."""
    return Refusal(429, usual.message, headers=retry_after(allowance.wait_seconds))


def answer(ask: Ask, items: list[Item]) -> bytes:
    embeddings = [json_item(item) for item in items]
    return json.dumps({"model": ask.model, "embeddings": embeddings, "prompt_eval_count": ask.tokens}).encode()


PROTOCOL = Protocol(
    path=re.compile("/api/embed"),
    fields=FIELDS,
    texts=texts_in,
    settings=without("input"),
    check=check,
    answer=answer,
    usual_refusal=usual_refusal,
    error=lambda refusal: json.dumps({"error": refusal.message}).encode(),
    bad_key=lambda key: None if key is None else Refusal(401, "unauthorized"),
    over_limit=over_limit,
)
