"""OpenAI's embeddings endpoint."""

from __future__ import annotations

import json
import math
import re
from binascii import b2a_base64
from collections.abc import Mapping, Sequence
from typing import Any

from fake_api.behaviour import Behaviour, Limits, is_count
from fake_api.protocol import Ask, Item, Protocol, Refusal, json_item, retry_after, strings, without
from fake_api.rate_limit import Allowance
from fake_api.vectors import tokens_in

MODELS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536}
LIMITS = Limits(2048, 8192, 300_000)
FIELDS = frozenset({"input", "model", "encoding_format", "dimensions", "user"})
NO_KEY = "You didn't provide an API key. You need to provide your API key in an Authorization header."
texts_in = strings("input")


def check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    if not isinstance(body, dict):
        raise Refusal(400, "We could not parse the JSON body of your request.")
    unknown = body.keys() - FIELDS
    if unknown and not behaviour.accepts_extra_fields:
        raise Refusal(400, f"Unrecognized request argument supplied: {', '.join(sorted(unknown))}")
    model = body.get("model")
    if not model:
        raise Refusal(400, "you must provide a model parameter")
    full = behaviour.dimensions_of(model, MODELS)
    if full is None:
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise Refusal(404, message, code="model_not_found")

    given, texts = body.get("input"), texts_in(body)
    whole = isinstance(given, str) or (isinstance(given, list) and len(given) == len(texts))
    if not whole or not texts or not all(texts):
        reference = "Please check the API reference: https://platform.openai.com/docs/api-reference."
        raise Refusal(400, f"'$.input' is invalid. {reference}")
    limits = behaviour.within(LIMITS)
    if len(texts) > limits.inputs:
        raise Refusal(400, f"'$.input' is invalid: array length must be {limits.inputs} or less.")
    tokens = [tokens_in(text) for text in texts]
    if max(tokens) > limits.tokens_per_input:
        raise Refusal(400, f"Invalid 'input': maximum context length is {limits.tokens_per_input} tokens.")
    if sum(tokens) > limits.tokens_per_request:
        most = limits.tokens_per_request
        message = f"Requested {sum(tokens)} tokens, max {most} tokens per request"
        raise Refusal(400, message, "max_tokens_per_request", code="max_tokens_per_request")

    dimensions = dimensions_in(body, behaviour, full)
    return Ask(texts, model, dimensions, wants_base64(body, behaviour), sum(tokens))


def dimensions_in(body: dict[str, Any], behaviour: Behaviour, full: int) -> int:
    dimensions = body.get("dimensions")
    if dimensions is None or behaviour.supports_dimensions == "ignore":
        return full
    if not behaviour.supports_dimensions or body["model"] == "text-embedding-ada-002":
        raise Refusal(400, "This model does not support specifying dimensions.")
    if not is_count(dimensions) or dimensions > full:
        message = f"Invalid value for 'dimensions' = {json.dumps(dimensions)}. Must be between 1 and {full}."
        raise Refusal(400, message, param="dimensions")
    return int(dimensions)


def wants_base64(body: dict[str, Any], behaviour: Behaviour) -> bool:
    encoding_format = body.get("encoding_format", "float")
    if encoding_format not in ("float", "base64"):
        message = f"Invalid value: {json.dumps(encoding_format)}. Supported values are: 'float' and 'base64'."
        raise Refusal(400, message, param="encoding_format", code="invalid_value")
    if encoding_format == "base64" and not behaviour.supports_base64:
        raise Refusal(400, "encoding_format 'base64' is not supported.", param="encoding_format")
    return encoding_format == "base64" and behaviour.supports_base64 is True


def answer(ask: Ask, items: list[Item]) -> bytes:
    return list_of(items, ask, {"prompt_tokens": ask.tokens, "total_tokens": ask.tokens})


def list_of(items: list[Item], ask: Ask, usage: dict[str, int]) -> bytes:
    # put together by hand: json.dumps takes longer to look through base64 than all the rest together
    data = b",".join(written(item, ask.base64) for item in items)
    tail = {"model": ask.model, "usage": usage}
    return b'{"object":"list","data":[%s],%s' % (data, json.dumps(tail).encode()[1:])


def written(item: Item, base64: bool) -> bytes:
    index = b"" if item.index is None else b'"index":%d,' % item.index
    if base64 and not isinstance(item.vector, str):
        vector = b'"%s"' % b2a_base64(item.vector.astype("<f4").tobytes(), newline=False)
    else:
        vector = json.dumps(json_item(item)).encode()
    return b'{"object":"embedding",%s"embedding":%s}' % (index, vector)


def usual_refusal(status: int) -> Refusal:
    if status == 401:
        return Refusal(401, "Incorrect API key provided.", code="invalid_api_key")
    if status == 404:
        message = "The model does not exist or you do not have access to it."
        return Refusal(404, message, code="model_not_found")
    if status == 429:
        return Refusal(429, "Rate limit reached for requests.", "requests", code="rate_limit_exceeded")
    if status >= 500:
        message = "The server had an error while processing your request. Sorry about that!"
        return Refusal(status, message, "server_error")
    return Refusal(status, f"Refused with {status}.")


def limit_headers(allowances: Sequence[Allowance], status: int) -> dict[str, str]:
    headers: dict[str, str] = {}
    for allowance in allowances:
        headers |= {
            f"x-ratelimit-limit-{allowance.unit}": str(allowance.per_minute),
            f"x-ratelimit-remaining-{allowance.unit}": str(int(allowance.left)),
            f"x-ratelimit-reset-{allowance.unit}": duration(allowance.reset_seconds),
        }
    return headers


def over_limit(allowance: Allowance, usual: Refusal) -> Refusal:
    unit, wait_seconds = allowance.unit, allowance.wait_seconds
    where = f"on {unit} per min ({unit[0].upper()}PM)"
    if wait_seconds == math.inf:
        message = f"Request too large {where}: Limit {allowance.most:.0f}, Requested {allowance.asked}."
    else:
        used = f"Limit {allowance.per_minute}, Used {allowance.per_minute - int(allowance.left)}"
        again = f"Please try again in {duration(wait_seconds)}."
        message = f"Rate limit reached {where}: {used}, Requested {allowance.asked}. {again}"
    return Refusal(429, message, unit, code=usual.code, headers=retry_after_ms(wait_seconds))


def retry_after_ms(seconds: float) -> dict[str, str]:
    return {} if seconds == math.inf else {**retry_after(seconds), "retry-after-ms": str(math.ceil(seconds * 1000))}


def duration(seconds: float) -> str:
    """A duration in the form of its headers: 12ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"


def error(refusal: Refusal) -> bytes:
    error = {key: getattr(refusal, key) for key in ("message", "type", "param", "code")}
    return json.dumps({"error": error}).encode()


def bad_key(key: str | None) -> Refusal:
    if key is None:
        return Refusal(401, NO_KEY)
    return Refusal(401, f"Incorrect API key provided: {'*' * 8}{key[-4:]}.", code="invalid_api_key")


PROTOCOL = Protocol(
    path=re.compile("/v1/embeddings"),
    fields=FIELDS,
    texts=texts_in,
    settings=without("input"),
    check=check,
    answer=answer,
    usual_refusal=usual_refusal,
    error=error,
    bad_key=bad_key,
    limit_headers=limit_headers,
    over_limit=over_limit,
)
