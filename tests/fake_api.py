"""A stand-in for embedding APIs: real HTTP on loopback, vectors that follow from the text, faults on order.

    python3 fake_api.py --host 127.0.0.1 --port 8000

POST /{tenant}/v1/embeddings   OpenAI's protocol; each tenant has its own behaviour and its own log
POST /{tenant}/...             the protocols of Azure, Cohere, Voyage (under /voyage/v1), Gemini and Ollama
PUT /control/{tenant}          set the tenant's behaviour (PATCH: amend it; DELETE: forget the tenant)
GET /control/{tenant}          its behaviour, counters and log (?only=counters leaves the log out)
PUT /ports/{port}              open a further port (DELETE: close it, so that connections are refused)
GET /health                    answers as soon as the server does

Written from the providers' API references, which the modules of the providers name, and from error bodies that
their users have published. A token is four characters, rounded up per text. Standard library and numpy only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import re
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from binascii import b2a_base64
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Annotated, Any, NamedTuple, Self, get_type_hints
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

MODELS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536}
POLL_SECONDS = 0.02  # how soon a waiting request notices that its client has gone


def embedding_of(text: str, dimensions: int = 1536, model: str = "text-embedding-3-small") -> Vector:
    """The unit vector that the fake API gives for this text; fewer dimensions are a prefix, rescaled."""
    seed = hashlib.sha256(f"{model}\0{text}".encode("utf-8", "surrogatepass")).digest()
    # numpy keeps the raw stream of a bit generator stable, not what its distributions make of it
    raw = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(-(-dimensions // 4))
    numbers = raw.astype("<u8").view("<i2")[:dimensions].astype(np.int64)
    # a sum of integers is exact, so the last bit does not depend on the machine's order of adding
    return (numbers / math.sqrt(int(np.dot(numbers, numbers)))).astype(np.float32)


def tokens_in(text: str) -> int:
    return -(-len(text) // 4)


# --- behaviour: what a test may order -------------------------------------------------------------


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _true(value: object) -> bool:
    return value is True


def _true_or(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is True or check(value)


def _difference(value: object) -> bool:
    return isinstance(value, int) and value != 0


def _support(value: object) -> bool:
    return isinstance(value, bool) or value == "ignore"


def _text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _times(value: object) -> bool:
    return value == "forever" or _count(value)


def _anything(value: object) -> bool:
    return True


def _object(value: object) -> bool:
    return isinstance(value, dict)


def _hold(value: object) -> bool:
    return _flag(value) or _text(value) or (isinstance(value, list) and all(map(_text, value)))


def _models(value: object) -> bool:
    return isinstance(value, dict) and all(_text(name) and _count(size) for name, size in value.items())


class FromJson:
    """A dataclass that is read from JSON; each field's type is annotated with the check of its values."""

    @classmethod
    def from_json(cls, value: object) -> Self:
        name = cls.__name__.lower()
        if not isinstance(value, dict):
            raise TypeError(f"{name} must be an object, not {json.dumps(value)}")
        checks = {key: hint.__metadata__[0] for key, hint in get_type_hints(cls, include_extras=True).items()}
        for key, given in value.items():
            if key not in checks:
                raise ValueError(f"{name} has no {key!r}; it has {', '.join(sorted(checks))}")
            if given is not None and not checks[key](given):
                raise ValueError(f"{name}: {json.dumps(given)} is no value for {key!r}")
        return cls(**{key: given for key, given in value.items() if given is not None})


@dataclass(frozen=True)
class RateLimit(FromJson):
    """Allowances that refill evenly, up to burst_seconds' worth; a refused request uses up nothing."""

    requests_per_minute: Annotated[float | None, _count] = None
    tokens_per_minute: Annotated[float | None, _count] = None
    burst_seconds: Annotated[float, _number] = 60


STATUS_EXTRAS = ("body", "headers", "retry_after", "retry_after_date")


@dataclass(frozen=True)
class Fault(FromJson):
    """One kind of wrong answer, given `times` times to requests whose text contains `match`."""

    times: Annotated[int | str, _times] = 1
    match: Annotated[str | None, _text] = None

    status: Annotated[int | None, _count] = None  # this status, with the provider's usual body for it, or:
    body: Annotated[Any, _anything] = None  # a string is sent as it is, anything else as JSON
    headers: Annotated[dict[str, str] | None, _object] = None
    retry_after: Annotated[float | None, _number] = None  # seconds, as a number
    retry_after_date: Annotated[float | None, _number] = None  # seconds from now, as an HTTP date

    hang: Annotated[bool | float | None, _true_or(_number)] = None  # answer after N seconds; true: never
    close: Annotated[bool | None, _true] = None  # no answer at all
    cut_off: Annotated[bool | int | None, _true_or(_count)] = None  # ends after N bytes; true: halfway
    slow_body: Annotated[float | None, _number] = None  # the body takes N seconds, a few bytes at a time
    big_body: Annotated[int | None, _count] = None  # N bytes, their number not announced
    gzip_body: Annotated[int | None, _count] = None  # N bytes, a thousandth of it on the wire
    not_json: Annotated[bool | None, _true] = None
    redirect: Annotated[str | None, _text] = None  # to this URL, with 307
    echo_authorization: Annotated[bool | None, _true] = None  # a 401 whose body repeats the header

    wrong_count: Annotated[bool | int | None, _true_or(_difference)] = None  # N more; true: one less
    wrong_dimensions: Annotated[bool | int | None, _true_or(_count)] = None  # N; true: one less
    nan: Annotated[bool | None, _true] = None
    infinity: Annotated[bool | None, _true] = None
    duplicate_index: Annotated[bool | None, _true] = None  # the last item bears the first one's index
    missing_index: Annotated[bool | None, _true] = None  # the last item bears none
    shuffled: Annotated[bool | None, _true] = None  # reversed, with right indexes: not wrong at all
    invalid_base64: Annotated[bool | None, _true] = None  # the last item's embedding is "?!"

    @classmethod
    def from_json(cls, value: object) -> Self:
        fault = super().from_json(value)
        kinds = [kind for kind in FAULTS if getattr(fault, kind) is not None]
        extras = [name for name in STATUS_EXTRAS if getattr(fault, name) is not None]
        if extras and fault.status is None:
            raise ValueError(f"fault: {extras[0]!r} goes with 'status' only")
        if len(kinds) != 1:
            raise ValueError(f"fault must have exactly one of {', '.join(FAULTS)}; it has {len(kinds)}")
        return fault

    @property
    def most(self) -> float:
        return self.times if isinstance(self.times, int) else math.inf

    @property
    def kind(self) -> str:
        return next(kind for kind in FAULTS if getattr(self, kind) is not None)


class Limits(NamedTuple):
    """What a provider takes in one request."""

    inputs: int
    tokens_per_input: int
    tokens_per_request: int


def _rate_limit(value: object) -> bool:
    return bool(RateLimit.from_json(value))


def _faults(value: object) -> bool:
    return isinstance(value, list) and all(Fault.from_json(fault) for fault in value)


@dataclass(frozen=True)
class Behaviour(FromJson):
    """How a tenant answers; a held request is answered as ordered when it is let go."""

    delay_seconds: Annotated[float, _number] = 0
    delay_seconds_per_input: Annotated[float, _number] = 0
    hold: Annotated[bool | str | list[str], _hold] = False  # requests wait: all, or those containing a text
    faults: Annotated[Any, _faults] = ()  # a list; each request uses up the first that fits
    rate_limit: Annotated[Any, _rate_limit] = None
    max_inputs_per_request: Annotated[int | None, _count] = None  # None, and so below: the provider's own
    max_tokens_per_input: Annotated[int | None, _count] = None
    max_tokens_per_request: Annotated[int | None, _count] = None
    supports_dimensions: Annotated[bool | str, _support] = True  # false: 400; "ignore": as if not sent
    supports_base64: Annotated[bool | str, _support] = True
    accepts_extra_fields: Annotated[bool, _flag] = False  # as compatible servers do, unlike OpenAI
    api_key: Annotated[str | None, _text] = None  # the only right one; without it any will do
    models: Annotated[dict[str, int] | None, _models] = None  # further models and their dimensions
    keep_texts: Annotated[bool, _flag] = True  # False: the log has numbers only, for benchmarks

    @classmethod
    def from_json(cls, value: object) -> Behaviour:
        behaviour = super().from_json(value)
        faults = tuple(Fault.from_json(fault) for fault in behaviour.faults)
        rate_limit = behaviour.rate_limit and RateLimit.from_json(behaviour.rate_limit)
        return replace(behaviour, faults=faults, rate_limit=rate_limit)

    def holds(self, texts: list[str]) -> bool:
        if isinstance(self.hold, bool):
            return self.hold
        parts = [self.hold] if isinstance(self.hold, str) else self.hold
        return any(part in text for part in parts for text in texts)

    def dimensions_of(self, model: object, models: Mapping[str, int] = MODELS) -> int | None:
        return {**models, **(self.models or {})}.get(model) if isinstance(model, str) else None

    def within(self, own: Limits) -> Limits:
        return Limits(
            self.max_inputs_per_request or own.inputs,
            self.max_tokens_per_input or own.tokens_per_input,
            self.max_tokens_per_request or own.tokens_per_request,
        )


# --- state: what a tenant has seen ----------------------------------------------------------------


class Bucket:
    """An allowance per minute that refills evenly."""

    def __init__(self, per_minute: float, burst_seconds: float) -> None:
        self.per_minute, self.capacity = per_minute, max(1.0, per_minute * burst_seconds / 60)
        self.level, self.at = self.capacity, time.monotonic()

    def seconds_until(self, level: float) -> float:
        now = time.monotonic()
        self.level = min(self.capacity, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now
        return max(0.0, (level - self.level) * 60 / self.per_minute)


class Tenant:
    """One tenant's behaviour, log and counters; guarded by the lock of its State."""

    def __init__(self) -> None:
        self.log: list[dict[str, Any]] = []
        self.statuses: Counter[str] = Counter()
        self.distinct: set[int] = set()
        self.inputs = self.tokens = self.in_flight = self.max_in_flight = self.held = self.connections = 0
        self.gone = False
        self.order: dict[str, Any] = {}
        self.behave({}, amend=False)

    def behave(self, order: Mapping[str, Any], amend: bool) -> None:
        whole = {**self.order, **order} if amend else dict(order)
        self.behaviour = Behaviour.from_json(whole)
        self.order = whole
        if not amend or "faults" in order:
            self.faults = [[fault, fault.most] for fault in self.behaviour.faults]
        if not amend or "rate_limit" in order:
            limit = self.behaviour.rate_limit or RateLimit()
            rates = {"requests": limit.requests_per_minute, "tokens": limit.tokens_per_minute}
            self.buckets = {unit: Bucket(rate, limit.burst_seconds) for unit, rate in rates.items() if rate is not None}

    def next_fault(self, texts: list[str]) -> Fault | None:
        for left in self.faults:
            fault: Fault = left[0]
            if left[1] > 0 and (not fault.match or any(fault.match in text for text in texts)):
                left[1] -= 1
                return fault
        return None

    def counters(self) -> dict[str, Any]:
        return {
            "requests": len(self.log),
            "inputs": self.inputs,  # received, whatever they were answered
            "distinct_texts": len(self.distinct),
            "tokens": self.tokens,  # reported as usage
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "held": self.held,
            "connections": self.connections,
            "statuses": dict(self.statuses),  # "none" counts requests that got no answer
        }


class State:
    """All tenants behind one lock; `changed` wakes the requests that wait."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.tenants: dict[str, Tenant] = {}

    def tenant(self, name: str) -> Tenant:
        with self.changed:
            return self.tenants.setdefault(name, Tenant())

    def behave(self, name: str, order: object, amend: bool) -> None:
        if not isinstance(order, dict):
            raise TypeError(f"behaviour must be an object, not {json.dumps(order)}")
        with self.changed:
            self.tenant(name).behave(order, amend)
            self.changed.notify_all()

    def look(self, name: str, with_log: bool) -> dict[str, Any]:
        with self.changed:
            tenant = self.tenant(name)
            requests = [dict(entry) for entry in tenant.log] if with_log else None
            return {"behaviour": tenant.order, "counters": tenant.counters(), "requests": requests}

    def reset(self, name: str) -> None:
        """Forget the tenant; requests that still wait are let go and belong to nobody."""
        with self.changed:
            self.tenant(name).gone = True
            del self.tenants[name]
            self.changed.notify_all()


# --- protocols: how a provider speaks -------------------------------------------------------------


class Refusal(Exception):
    """A request that the provider would refuse."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code


@dataclass(frozen=True)
class Item:
    """One embedding of an answer, before it is written in the provider's form."""

    index: int | None
    vector: Vector | str


class Ask(NamedTuple):
    """A request that is in order."""

    texts: list[str]
    model: str
    dimensions: int
    base64: bool
    tokens: int


class Protocol(NamedTuple):
    """A provider's way of speaking; another provider is another one of these and a line in PROTOCOLS."""

    key_header: str
    texts: Callable[[Any], list[str]]  # as far as they can be made out, for log and faults
    # Of a body and what its address says, that is its parts and parameters; raises Refusal.
    check: Callable[[Any, Behaviour, Mapping[str, str]], Ask]
    answer: Callable[[Ask, list[Item]], bytes]
    usual_refusal: Callable[[int], Refusal]
    error: Callable[[Refusal], bytes]
    bad_key: Callable[[str | None], Refusal | None]  # of none, or of one that is not right; None: never mind
    settings: Callable[[Any], dict[str, Any]]  # the body without its texts, for the log
    embed: Callable[[str, int, str], Vector] = embedding_of


def _key(headers: Message, name: str) -> str | None:
    value = str(headers.get(name, ""))
    if name != "Authorization":
        return value or None
    scheme, _, key = value.partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _strings(body: Any, name: str) -> list[str]:
    given = body.get(name) if isinstance(body, dict) else None
    given = [given] if isinstance(given, str) else given
    return [text for text in given if isinstance(text, str)] if isinstance(given, list) else []


def _without(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda body: {name: body[name] for name in body.keys() - names} if isinstance(body, dict) else {}


def _json_item(item: Item) -> Any:
    return item.vector if isinstance(item.vector, str) else item.vector.tolist()


OPENAI_LIMITS = Limits(2048, 8192, 300_000)
OPENAI_FIELDS = {"input", "model", "encoding_format", "dimensions", "user"}
NO_KEY = "You didn't provide an API key. You need to provide your API key in an Authorization header."


def _openai_texts(body: Any) -> list[str]:
    return _strings(body, "input")


def _openai_check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    if not isinstance(body, dict):
        raise Refusal(400, "We could not parse the JSON body of your request.")
    unknown = body.keys() - OPENAI_FIELDS
    if unknown and not behaviour.accepts_extra_fields:
        raise Refusal(400, f"Unrecognized request argument supplied: {', '.join(sorted(unknown))}")
    model = body.get("model")
    if not model:
        raise Refusal(400, "you must provide a model parameter")
    full = behaviour.dimensions_of(model)
    if full is None:
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise Refusal(404, message, code="model_not_found")

    given, texts = body.get("input"), _openai_texts(body)
    whole = isinstance(given, str) or (isinstance(given, list) and len(given) == len(texts))
    if not whole or not texts or not all(texts):
        reference = "Please check the API reference: https://platform.openai.com/docs/api-reference."
        raise Refusal(400, f"'$.input' is invalid. {reference}")
    limits = behaviour.within(OPENAI_LIMITS)
    if len(texts) > limits.inputs:
        raise Refusal(400, f"'$.input' is invalid: array length must be {limits.inputs} or less.")
    tokens = [tokens_in(text) for text in texts]
    if max(tokens) > limits.tokens_per_input:
        raise Refusal(400, f"Invalid 'input': maximum context length is {limits.tokens_per_input} tokens.")
    if sum(tokens) > limits.tokens_per_request:
        most = limits.tokens_per_request
        message = f"Requested {sum(tokens)} tokens, max {most} tokens per request"
        raise Refusal(400, message, "max_tokens_per_request", code="max_tokens_per_request")

    dimensions = _openai_dimensions(body, behaviour, full)
    return Ask(texts, model, dimensions, _openai_base64(body, behaviour), sum(tokens))


def _openai_dimensions(body: dict[str, Any], behaviour: Behaviour, full: int) -> int:
    dimensions = body.get("dimensions")
    if dimensions is None or behaviour.supports_dimensions == "ignore":
        return full
    if not behaviour.supports_dimensions or body["model"] == "text-embedding-ada-002":
        raise Refusal(400, "This model does not support specifying dimensions.")
    if not _count(dimensions) or dimensions > full:
        message = f"Invalid value for 'dimensions' = {json.dumps(dimensions)}. Must be between 1 and {full}."
        raise Refusal(400, message, param="dimensions")
    return int(dimensions)


def _openai_base64(body: dict[str, Any], behaviour: Behaviour) -> bool:
    encoding_format = body.get("encoding_format", "float")
    if encoding_format not in ("float", "base64"):
        message = f"Invalid value: {json.dumps(encoding_format)}. Supported values are: 'float' and 'base64'."
        raise Refusal(400, message, param="encoding_format", code="invalid_value")
    if encoding_format == "base64" and not behaviour.supports_base64:
        raise Refusal(400, "encoding_format 'base64' is not supported.", param="encoding_format")
    return encoding_format == "base64" and behaviour.supports_base64 is True


def _openai_answer(ask: Ask, items: list[Item]) -> bytes:
    # put together by hand: json.dumps takes longer to look through base64 than all the rest together
    data = b",".join(_openai_item(item, ask.base64) for item in items)
    tail = {"model": ask.model, "usage": {"prompt_tokens": ask.tokens, "total_tokens": ask.tokens}}
    return b'{"object":"list","data":[%s],%s' % (data, json.dumps(tail).encode()[1:])


def _openai_item(item: Item, base64: bool) -> bytes:
    index = b"" if item.index is None else b'"index":%d,' % item.index
    if base64 and not isinstance(item.vector, str):
        vector = b'"%s"' % b2a_base64(item.vector.astype("<f4").tobytes(), newline=False)
    else:
        vector = json.dumps(item.vector if isinstance(item.vector, str) else item.vector.tolist()).encode()
    return b'{"object":"embedding",%s"embedding":%s}' % (index, vector)


def _openai_usual_refusal(status: int) -> Refusal:
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


def _openai_error(refusal: Refusal) -> bytes:
    error = {key: getattr(refusal, key) for key in ("message", "type", "param", "code")}
    return json.dumps({"error": error}).encode()


def _openai_bad_key(key: str | None) -> Refusal:
    if key is None:
        return Refusal(401, NO_KEY)
    return Refusal(401, f"Incorrect API key provided: {'*' * 8}{key[-4:]}.", code="invalid_api_key")


OPENAI = Protocol(
    "Authorization",
    _openai_texts,
    _openai_check,
    _openai_answer,
    _openai_usual_refusal,
    _openai_error,
    _openai_bad_key,
    _without("input"),
)


# Azure: OpenAI's body and answer, addressed by deployment, with errors of its own.


def _azure_check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    if re.fullmatch(r"\d{4}-\d\d-\d\d(-preview)?", address.get("api-version", "")) is None:
        raise Refusal(404, "Resource not found", code="404")
    if behaviour.dimensions_of(address["deployment"]) is None:
        raise _azure_usual_refusal(404)
    body = {**body, "model": address["deployment"]} if isinstance(body, dict) else body
    return _openai_check(body, behaviour, address)


def _azure_usual_refusal(status: int) -> Refusal:
    if status == 401:
        message = "Access denied due to invalid subscription key or wrong API endpoint."
        return Refusal(401, message, code="401")
    if status == 404:
        return Refusal(404, "The API deployment for this resource does not exist.", code="DeploymentNotFound")
    if status == 429:
        message = (
            "Requests to the Embeddings_Create Operation have exceeded call rate limit. Please retry after 2 seconds."
        )
        return Refusal(429, message, code="429")
    return Refusal(status, f"Refused with {status}.", code=str(status))


def _azure_error(refusal: Refusal) -> bytes:
    return json.dumps({"error": {"code": refusal.code, "message": refusal.message}}).encode()


AZURE = OPENAI._replace(
    key_header="api-key",
    check=_azure_check,
    usual_refusal=_azure_usual_refusal,
    error=_azure_error,
    bad_key=lambda key: _azure_usual_refusal(401),
)


# What the others have in common: a model, its dimensions, texts within limits.


def _known(model: object, behaviour: Behaviour, models: Mapping[str, int], refusal: Refusal) -> int:
    full = behaviour.dimensions_of(model, models)
    if full is None:
        raise refusal
    return full


def _tokens(texts: list[str], limits: Limits, words: Mapping[str, str], cut: bool = False) -> int:
    """The tokens of the texts, if they are within the limits; words: what is said of those that are not."""
    if not texts or len(texts) > limits.inputs:
        raise Refusal(400, words["inputs"].format(most=limits.inputs))
    tokens = [min(tokens_in(text), limits.tokens_per_input) if cut else tokens_in(text) for text in texts]
    if max(tokens) > limits.tokens_per_input:
        raise Refusal(400, words["input"].format(most=limits.tokens_per_input, found=max(tokens)))
    if sum(tokens) > limits.tokens_per_request:
        raise Refusal(400, words["request"].format(most=limits.tokens_per_request, found=sum(tokens)))
    return sum(tokens)


def _usual_refusal(messages: Mapping[int, str]) -> Callable[[int], Refusal]:
    return lambda status: Refusal(status, messages.get(status, f"Refused with {status}."))


def _only(body: Any, fields: set[str], behaviour: Behaviour) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise Refusal(400, "invalid JSON")
    unknown = body.keys() - fields
    if unknown and not behaviour.accepts_extra_fields:
        raise Refusal(400, f"unknown field: {', '.join(sorted(unknown))}")
    return body


COHERE_MODELS = {"embed-v4.0": 1536, "embed-english-v3.0": 1024, "embed-multilingual-light-v3.0": 384}
COHERE_FIELDS = {"model", "texts", "input_type", "embedding_types", "truncate", "output_dimension", "max_tokens"}
COHERE_WORDS = {
    "inputs": "invalid request: total number of texts must be at most {most}",
    "input": "too many tokens: text exceeds {most} tokens - received {found}",
    "request": "too many tokens: size limit exceeded by {found} tokens",
}
_cohere_usual_refusal = _usual_refusal(
    {
        401: "invalid api token",
        404: "model not found, make sure the correct model ID was used",
        429: "You are using a Trial key, which is limited to 100 API calls / minute.",
        498: "your text contains content that violates our usage guidelines",
        500: "internal server error, this has been reported to our developers.",
    }
)


def _cohere_check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    body = _only(body, COHERE_FIELDS, behaviour)
    model, old = body.get("model"), str(body.get("model")).endswith("-v3.0")
    full = _known(model, behaviour, COHERE_MODELS, Refusal(404, f"model '{model}' not found"))
    if body.get("input_type") not in ("search_document", "search_query", "classification", "clustering"):
        raise Refusal(400, "invalid request: valid input_type must be provided with the provided model")
    if body.get("embedding_types", ["float"]) != ["float"]:
        raise Refusal(400, "invalid request: valid embedding_types are float here")
    cut = body.get("truncate", "END") != "NONE"
    limits = behaviour.within(Limits(96, 512 if old else 128_000, 1_000_000))
    tokens = _tokens(_strings(body, "texts"), limits, COHERE_WORDS, cut)
    dimensions = body.get("output_dimension", full)
    if dimensions != full and (old or dimensions not in (256, 512, 1024, 1536)):
        raise Refusal(400, "invalid request: output_dimension is not valid for the provided model")
    if old and "output_dimension" in body:
        raise Refusal(400, "invalid request: output_dimension is not supported by the provided model")
    return Ask(_strings(body, "texts"), str(model), dimensions, False, tokens)


def _cohere_answer(ask: Ask, items: list[Item]) -> bytes:
    meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": ask.tokens}}
    embeddings = {"float": [_json_item(item) for item in items]}
    answer = {"id": "0", "response_type": "embeddings_by_type", "embeddings": embeddings, "texts": ask.texts}
    return json.dumps({**answer, "meta": meta}).encode()


def _message_error(refusal: Refusal) -> bytes:
    return json.dumps({"id": "0", "message": refusal.message}).encode()


COHERE = Protocol(
    "Authorization",
    lambda body: _strings(body, "texts"),
    _cohere_check,
    _cohere_answer,
    _cohere_usual_refusal,
    _message_error,
    lambda key: _cohere_usual_refusal(401),
    _without("texts"),
)

VOYAGE_MODELS = {"voyage-4": 1024, "voyage-4-lite": 1024, "voyage-law-2": 1024, "voyage-code-2": 1536}
VOYAGE_TOKENS = {"voyage-4": 320_000, "voyage-4-lite": 1_000_000}
VOYAGE_FIELDS = {
    "model", "input", "input_type", "truncation", "encoding_format", "output_dimension", "output_dtype",
}  # fmt: skip
VOYAGE_WORDS = {
    "inputs": "The batch size limit is {most}.",
    "input": "An input has {found} tokens, which exceeds the context length of {most}.",
    "request": "The max allowed tokens per submitted batch is {most}. Your batch has {found} tokens after truncation.",
}
_voyage_usual_refusal = _usual_refusal(
    {
        401: "Provided API key is invalid.",
        403: "Access from your IP address is forbidden.",
        429: "You have exceeded your rate limit.",
        500: "Unexpected issue on our servers.",
        503: "Our servers are currently experiencing high traffic.",
    }
)


def _voyage_check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    body = _only(body, VOYAGE_FIELDS, behaviour)
    model = body.get("model")
    known = f"Model {model} is not supported. Supported models are {sorted(VOYAGE_MODELS)}."
    full = _known(model, behaviour, VOYAGE_MODELS, Refusal(400, known))
    old = full != 1024 or model == "voyage-law-2"
    if body.get("input_type") not in (None, "query", "document"):
        raise Refusal(400, "Argument 'input_type' must be query, document or null.")
    if body.get("encoding_format") not in (None, "base64"):
        raise Refusal(400, "Argument 'encoding_format' must be base64 or null.")
    limits = behaviour.within(Limits(1000, 16_000 if old else 32_000, VOYAGE_TOKENS.get(str(model), 120_000)))
    tokens = _tokens(_strings(body, "input"), limits, VOYAGE_WORDS, cut=body.get("truncation", True) is not False)
    dimensions = body.get("output_dimension", full)
    if dimensions not in ((full,) if old else (256, 512, 1024, 2048)):
        raise Refusal(400, f"Argument 'output_dimension' = {dimensions} is not supported by {model}.")
    return Ask(_strings(body, "input"), str(model), dimensions, body.get("encoding_format") == "base64", tokens)


def _voyage_answer(ask: Ask, items: list[Item]) -> bytes:
    data = b",".join(_openai_item(item, ask.base64) for item in items)
    tail = {"model": ask.model, "usage": {"total_tokens": ask.tokens}}
    return b'{"object":"list","data":[%s],%s' % (data, json.dumps(tail).encode()[1:])


VOYAGE = Protocol(
    "Authorization",
    _openai_texts,
    _voyage_check,
    _voyage_answer,
    _voyage_usual_refusal,
    lambda refusal: json.dumps({"detail": refusal.message}).encode(),
    lambda key: _voyage_usual_refusal(401),
    _without("input"),
)

GEMINI_MODELS = {"gemini-embedding-001": 3072, "gemini-embedding-2": 3072}
GEMINI_WORDS = {
    "inputs": "* BatchEmbedContentsRequest.requests: at most {most} requests can be in one batch",
    "input": "The input token count ({found}) exceeds the maximum number of tokens allowed ({most}).",
    "request": "The input token count ({found}) exceeds the maximum number of tokens allowed ({most}).",
}
GEMINI_STATUSES = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
GEMINI_TASKS = {"RETRIEVAL_DOCUMENT", "RETRIEVAL_QUERY", "SEMANTIC_SIMILARITY", "CLASSIFICATION", "CLUSTERING"}
_gemini_usual_refusal = _usual_refusal(
    {
        403: "Permission denied on resource project.",
        404: "The model is not found for API version v1beta, or is not supported for embedContent.",
        429: "You exceeded your current quota, please check your plan and billing details.",
        500: "An internal error has occurred. Please retry.",
        503: "The model is overloaded. Please try again later.",
    }
)


def _gemini_requests(body: Any) -> list[dict[str, Any]]:
    requests = body.get("requests") if isinstance(body, dict) else None
    return [request for request in requests if isinstance(request, dict)] if isinstance(requests, list) else []


def _gemini_texts(body: Any) -> list[str]:
    contents = [request.get("content") for request in _gemini_requests(body)]
    parts = [content.get("parts") for content in contents if isinstance(content, dict)]
    firsts = [part[0] for part in parts if isinstance(part, list) and len(part) == 1 and isinstance(part[0], dict)]
    return [first["text"] for first in firsts if isinstance(first.get("text"), str)]


def _gemini_settings(body: Any) -> dict[str, Any]:
    """Those of the first of its requests: all must have the same."""
    return _without("content")(next(iter(_gemini_requests(body)), {}))


def _gemini_check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    texts, settings = _gemini_texts(body), _gemini_settings(body)
    model = address["model"]
    full = _known(model, behaviour, GEMINI_MODELS, _gemini_usual_refusal(404))
    given = body.get("requests") if isinstance(body, dict) else None
    if not isinstance(given, list) or not texts or len(texts) != len(given) or not all(texts):
        raise Refusal(400, "* BatchEmbedContentsRequest.requests[0].content: contents is not specified")
    if any(_without("content")(request) != settings for request in _gemini_requests(body)):
        raise Refusal(400, "the requests of one batch differ")
    if settings.get("model") != f"models/{model}":
        raise Refusal(400, "* BatchEmbedContentsRequest.requests[0].model: does not match the model of the batch")
    if settings.get("taskType", "CLUSTERING") not in GEMINI_TASKS or ("taskType" in settings and model.endswith("-2")):
        raise Refusal(400, "Invalid value at 'requests[0].task_type'")
    _only(settings, {"model", "taskType", "outputDimensionality", "title"}, behaviour)
    limits = behaviour.within(Limits(100, 8192 if model.endswith("-2") else 2048, 1_000_000))
    dimensions = settings.get("outputDimensionality", full)
    if not _count(dimensions) or dimensions > full:
        raise Refusal(400, f"output_dimensionality must be between 1 and {full}")
    return Ask(texts, model, dimensions, False, _tokens(texts, limits, GEMINI_WORDS))


def _gemini_answer(ask: Ask, items: list[Item]) -> bytes:
    embeddings = [{"values": _json_item(item)} for item in items]
    return json.dumps({"embeddings": embeddings, "usageMetadata": {"promptTokenCount": ask.tokens}}).encode()


def _gemini_error(refusal: Refusal) -> bytes:
    status = GEMINI_STATUSES.get(refusal.status, "UNKNOWN")
    error: dict[str, Any] = {"code": refusal.status, "message": refusal.message, "status": status}
    if refusal.code:
        info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": refusal.code}
        error["details"] = [{**info, "domain": "googleapis.com"}]
    return json.dumps({"error": error}).encode()


def _gemini_bad_key(key: str | None) -> Refusal:
    if key is None:
        return Refusal(403, "Method doesn't allow unregistered callers. Please use API Key.")
    return Refusal(400, "API key not valid. Please pass a valid API key.", code="API_KEY_INVALID")


def _cut(text: str, dimensions: int, model: str) -> Vector:
    """Shortened by cutting, so no longer of unit length."""
    return embedding_of(text, max(dimensions, GEMINI_MODELS.get(model, 0)), model)[:dimensions]


GEMINI = Protocol(
    "x-goog-api-key",
    _gemini_texts,
    _gemini_check,
    _gemini_answer,
    _gemini_usual_refusal,
    _gemini_error,
    _gemini_bad_key,
    _gemini_settings,
    _cut,
)

OLLAMA_MODELS = {"nomic-embed-text": 768, "all-minilm": 384}
OLLAMA_FIELDS = {"model", "input", "truncate", "dimensions", "keep_alive", "options"}
OLLAMA_WORDS = {
    "inputs": "too many inputs: {most}",
    "input": "the input length exceeds the context length",
    "request": "too many tokens: {most}",
}


def _ollama_check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    body = _only(body, OLLAMA_FIELDS, behaviour)
    model = body.get("model")
    full = _known(model, behaviour, OLLAMA_MODELS, Refusal(404, f'model "{model}" not found, try pulling it first'))
    texts = _strings(body, "input")
    if isinstance(body.get("input"), list) and len(texts) != len(body["input"]):
        raise Refusal(400, "invalid input type")
    limits = behaviour.within(Limits(1_000_000, 2048, 1 << 40))
    tokens = _tokens(texts, limits, OLLAMA_WORDS, cut=body.get("truncate", True) is not False)
    # More than the model has changes nothing.
    dimensions = min(body.get("dimensions") or full, full)
    return Ask(texts, str(model), dimensions, False, tokens)


def _ollama_answer(ask: Ask, items: list[Item]) -> bytes:
    embeddings = [_json_item(item) for item in items]
    return json.dumps({"model": ask.model, "embeddings": embeddings, "prompt_eval_count": ask.tokens}).encode()


OLLAMA = Protocol(
    "Authorization",
    _openai_texts,
    _ollama_check,
    _ollama_answer,
    _usual_refusal({401: "unauthorized", 404: "model not found", 503: "server busy, please try again"}),
    lambda refusal: json.dumps({"error": refusal.message}).encode(),
    lambda key: None if key is None else Refusal(401, "unauthorized"),
    _without("input"),
)

PROTOCOLS = [
    (re.compile(r"/(?P<tenant>[^/]+)/v1/embeddings"), OPENAI),
    (re.compile(r"/(?P<tenant>[^/]+)/openai/deployments/(?P<deployment>[^/]+)/embeddings"), AZURE),
    (re.compile(r"/(?P<tenant>[^/]+)/v2/embed"), COHERE),
    (re.compile(r"/(?P<tenant>[^/]+)/voyage/v1/embeddings"), VOYAGE),
    (re.compile(r"/(?P<tenant>[^/]+)/v1beta/models/(?P<model>[^/]+):batchEmbedContents"), GEMINI),
    (re.compile(r"/(?P<tenant>[^/]+)/api/embed"), OLLAMA),
]


# --- exchange: one request and its answer ---------------------------------------------------------


class ClientGone(Exception):
    """The client hung up while its request waited."""


@dataclass
class Reply:
    """An answer on its way; `pieces` go out instead of the body, in chunks."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    pieces: Iterator[bytes] | None = None
    cut_off_at: int | None = None
    spread_seconds: float = 0.0


class Exchange:
    """One request to a provider's endpoint."""

    def __init__(
        self, handler: Handler, protocol: Protocol, tenant: Tenant, body: bytes, address: Mapping[str, str]
    ) -> None:
        self.handler, self.protocol, self.tenant, self.address = handler, protocol, tenant, address
        self.changed = handler.state.changed
        try:
            self.body = json.loads(body)
        except ValueError:
            self.body = None
        self.texts = protocol.texts(self.body)
        self.ask: Ask | None = None
        self.limit_headers: dict[str, str] = {}
        self.entry = self._enter()

    def _enter(self) -> dict[str, Any]:
        key = _key(self.handler.headers, self.protocol.key_header)
        fields = self.protocol.settings(self.body)
        entry = {
            "method": self.handler.command,
            "path": self.handler.path,
            "headers": sorted(self.handler.headers.keys()),
            "key_sha256": key and hashlib.sha256(key.encode()).hexdigest(),
            "inputs": len(self.texts),
            "model": fields.get("model"),
            "dimensions": fields.get("dimensions"),
            "encoding_format": fields.get("encoding_format"),
            "settings": fields,  # all of the body but the texts
            "extra_fields": {name: fields[name] for name in fields.keys() - OPENAI_FIELDS},
            "texts": None,
            "fault": None,
            "status": None,
            "started_at": time.monotonic(),
            "finished_at": None,
        }
        with self.changed:
            tenant = self.tenant
            if tenant.behaviour.keep_texts:
                entry["texts"] = self.texts
            tenant.log.append(entry)
            tenant.inputs += len(self.texts)
            tenant.distinct.update(map(hash, self.texts))
            tenant.in_flight += 1
            tenant.max_in_flight = max(tenant.max_in_flight, tenant.in_flight)
            if tenant not in self.handler.tenants_seen:
                self.handler.tenants_seen.append(tenant)
                tenant.connections += 1
        return entry

    def finish(self, status: int | None) -> None:
        """Enter the outcome, once; before the last byte goes out: who has the answer finds it logged."""
        with self.changed:
            if self.entry["finished_at"] is None:
                self.entry.update(status=status, finished_at=time.monotonic())
                self.tenant.statuses[str(status or "none")] += 1
                self.tenant.in_flight -= 1
                self.tenant.tokens += self.ask.tokens if self.ask and status == 200 else 0

    def run(self) -> Reply | None:
        """The answer, when it is due; None for none at all."""
        fault = self._wait_while_held()
        behaviour = self.behaviour
        self.wait(behaviour.delay_seconds + behaviour.delay_seconds_per_input * len(self.texts))
        try:
            reply = FAULTS[fault.kind](self, fault) if fault else self.reply(self.items())
        except Refusal as refusal:
            reply = Reply(refusal.status, self.protocol.error(refusal))
        if reply:
            reply.headers = {**self.limit_headers, **reply.headers}
        return reply

    def _wait_while_held(self) -> Fault | None:
        with self.changed:
            if self.tenant.behaviour.holds(self.texts):
                self.tenant.held += 1
                try:
                    self.wait(math.inf, lambda: not self.tenant.behaviour.holds(self.texts))
                finally:
                    self.tenant.held -= 1
            self.behaviour = self.tenant.behaviour
            fault = self.tenant.next_fault(self.texts)
            self.entry["fault"] = fault.kind if fault else None
            return fault

    def wait(self, seconds: float, done: Callable[[], bool] = lambda: False) -> None:
        """Wait until done, until the time is over, or until the tenant is reset; raise if the client goes."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while not done() and not self.tenant.gone and (left := deadline - time.monotonic()) > 0:
                self.changed.wait(min(left, POLL_SECONDS))
                if self.handler.client_has_gone():
                    raise ClientGone

    def items(self) -> list[Item]:
        """The right embeddings, if the request is in order and within its limits."""
        self._authorize()
        tokens = sum(map(tokens_in, self.texts))
        self._limit(tokens)
        self.ask = ask = self.protocol.check(self.body, self.behaviour, self.address)
        vectors = (self.protocol.embed(text, ask.dimensions, ask.model) for text in ask.texts)
        return [Item(index, vector) for index, vector in enumerate(vectors)]

    def reply(self, items: list[Item]) -> Reply:
        assert self.ask
        return Reply(200, self.protocol.answer(self.ask, items))

    def _authorize(self) -> None:
        key = _key(self.handler.headers, self.protocol.key_header)
        if key is None or self.behaviour.api_key not in (None, key):
            refusal = self.protocol.bad_key(key)
            if refusal:
                raise refusal

    def _limit(self, tokens: int) -> None:
        with self.changed:
            buckets = self.tenant.buckets
            costs = {unit: tokens if unit == "tokens" else 1 for unit in buckets}
            waits = {unit: bucket.seconds_until(costs[unit]) for unit, bucket in buckets.items()}
            unit = max(waits, key=waits.__getitem__, default="")
            refused = bool(unit and waits[unit])
            for name, bucket in buckets.items():
                bucket.level -= 0 if refused else costs[name]
                self.limit_headers |= {
                    f"x-ratelimit-limit-{name}": f"{bucket.per_minute:g}",
                    f"x-ratelimit-remaining-{name}": str(int(bucket.level)),
                    f"x-ratelimit-reset-{name}": _duration(bucket.seconds_until(bucket.capacity)),
                }
        if refused:
            message = (
                f"Rate limit reached on {unit} per min: Limit {buckets[unit].per_minute:g}, "
                f"Requested {costs[unit]}. Please try again in {_duration(waits[unit])}."
            )
            self.limit_headers["Retry-After"] = str(math.ceil(waits[unit]))
            self.limit_headers["retry-after-ms"] = str(math.ceil(waits[unit] * 1000))
            raise Refusal(429, message, unit, code="rate_limit_exceeded")


def _duration(seconds: float) -> str:
    """As OpenAI's x-ratelimit-reset-* headers have it: 12ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"


# --- faults: one small function a kind ------------------------------------------------------------


def _status(exchange: Exchange, fault: Fault) -> Reply:
    assert fault.status
    body = exchange.protocol.error(exchange.protocol.usual_refusal(fault.status))
    if fault.body is not None:
        body = (fault.body if isinstance(fault.body, str) else json.dumps(fault.body)).encode()
    headers = dict(fault.headers or {})
    if fault.retry_after is not None:
        headers["Retry-After"] = f"{fault.retry_after:g}"
    if fault.retry_after_date is not None:
        headers["Retry-After"] = formatdate(math.ceil(time.time() + fault.retry_after_date), usegmt=True)
    return Reply(fault.status, body, headers)


def _hang(exchange: Exchange, fault: Fault) -> Reply | None:
    if fault.hang is True:
        exchange.wait(math.inf)
        return None
    exchange.wait(fault.hang or 0)
    return exchange.reply(exchange.items())


def _close(exchange: Exchange, fault: Fault) -> None:
    return None


def _cut_off(exchange: Exchange, fault: Fault) -> Reply:
    reply = exchange.reply(exchange.items())
    reply.cut_off_at = len(reply.body) // 2 if fault.cut_off is True else fault.cut_off
    return reply


def _slow_body(exchange: Exchange, fault: Fault) -> Reply:
    reply = exchange.reply(exchange.items())
    reply.spread_seconds = fault.slow_body or 0
    return reply


def _blocks(size: int) -> Iterator[bytes]:
    """The start of a right answer, and then digits without end."""
    start, block = b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.', 1 << 16
    yield start[:size]
    for left in range(size - len(start), 0, -block):
        yield b"1" * min(left, block)


def _gzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(level=1, wbits=31)
    for piece in pieces:
        if packed := packer.compress(piece):
            yield packed
    yield packer.flush()


def _big_body(exchange: Exchange, fault: Fault) -> Reply:
    return Reply(200, pieces=_blocks(fault.big_body or 0))


def _gzip_body(exchange: Exchange, fault: Fault) -> Reply:
    return Reply(200, headers={"Content-Encoding": "gzip"}, pieces=_gzipped(_blocks(fault.gzip_body or 0)))


def _not_json(exchange: Exchange, fault: Fault) -> Reply:
    return Reply(200, b"<html><body>Bad gateway</body></html>", {"Content-Type": "text/html"})


def _redirect(exchange: Exchange, fault: Fault) -> Reply:
    return Reply(307, headers={"Location": fault.redirect or ""})


def _echo_authorization(exchange: Exchange, fault: Fault) -> Reply:
    name = exchange.protocol.key_header
    given = exchange.handler.headers.get(name)
    return Reply(401, exchange.protocol.error(Refusal(401, f"Not allowed: {name}: {given}")))


def _twisted(twist: Callable[[list[Item], Fault], list[Item]]) -> Callable[[Exchange, Fault], Reply]:
    return lambda exchange, fault: exchange.reply(twist(exchange.items(), fault))


def _wrong_count(items: list[Item], fault: Fault) -> list[Item]:
    difference = -1 if fault.wrong_count is True else fault.wrong_count or 0
    more = [replace(items[-1], index=len(items) + number) for number in range(difference)]
    return items[:difference] if difference < 0 else items + more


def _wrong_dimensions(items: list[Item], fault: Fault) -> list[Item]:
    size = len(items[0].vector) - 1 if fault.wrong_dimensions is True else fault.wrong_dimensions or 0
    return [replace(item, vector=np.resize(item.vector, size)) for item in items]


def _with_number(number: float) -> Callable[[list[Item], Fault], list[Item]]:
    def twist(items: list[Item], fault: Fault) -> list[Item]:
        vector = np.array(items[-1].vector)
        vector[len(vector) // 2] = number
        return [*items[:-1], replace(items[-1], vector=vector)]

    return twist


FAULTS: dict[str, Callable[[Exchange, Fault], Reply | None]] = {
    "status": _status,
    "hang": _hang,
    "close": _close,
    "cut_off": _cut_off,
    "slow_body": _slow_body,
    "big_body": _big_body,
    "gzip_body": _gzip_body,
    "not_json": _not_json,
    "redirect": _redirect,
    "echo_authorization": _echo_authorization,
    "wrong_count": _twisted(_wrong_count),
    "wrong_dimensions": _twisted(_wrong_dimensions),
    "nan": _twisted(_with_number(math.nan)),
    "infinity": _twisted(_with_number(math.inf)),
    "duplicate_index": _twisted(lambda items, fault: [*items[:-1], replace(items[-1], index=0)]),
    "missing_index": _twisted(lambda items, fault: [*items[:-1], replace(items[-1], index=None)]),
    "shuffled": _twisted(lambda items, fault: items[::-1]),
    "invalid_base64": _twisted(lambda items, fault: [*items[:-1], replace(items[-1], vector="?!")]),
}


# --- server ---------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One connection, request by request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # head and body leave in one packet
    server: Listener

    def setup(self) -> None:
        super().setup()
        self.state = self.server.owner.state
        self.tenants_seen: list[Tenant] = []

    def route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        for pattern, protocol in PROTOCOLS:
            if self.command == "POST" and (match := pattern.fullmatch(path)):
                address = {name: unquote(part) for name, part in match.groupdict().items()} | dict(parse_qsl(query))
                self.provide(Exchange(self, protocol, self.state.tenant(match["tenant"]), body, address))
                return
        try:
            self.control(path.strip("/").split("/"), query, json.loads(body or b"{}"))
        except (ValueError, TypeError) as error:
            self.send(Reply(400, json.dumps({"error": str(error)}).encode()))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = route

    def control(self, path: list[str], query: str, order: Any) -> None:
        status, answer = 200, dict[str, Any]()
        match self.command, path:
            case "GET", ["health"]:
                pass
            case "PUT" | "PATCH", ["control", tenant]:
                self.state.behave(tenant, order, amend=self.command == "PATCH")
            case "GET", ["control", tenant]:
                answer = self.state.look(tenant, with_log="only=counters" not in query)
            case "DELETE", ["control", tenant]:
                self.state.reset(tenant)
            case "PUT", ["ports", port]:
                answer = {"port": self.server.owner.listen(int(port), **order)}
            case "DELETE", ["ports", port]:
                self.server.owner.refuse(int(port))
            case _:
                status, answer = 404, {"error": {"message": f"Invalid URL ({self.command} {self.path})"}}
        self.send(Reply(status, json.dumps(answer).encode()))

    def provide(self, exchange: Exchange) -> None:
        try:
            reply = exchange.run()
            if reply is None:
                self.close_connection = True
            else:
                self.send(reply, exchange)
        except (ClientGone, OSError):
            self.close_connection = True
        finally:
            exchange.finish(None)

    def send(self, reply: Reply, exchange: Exchange | None = None) -> None:
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body))}
        if reply.pieces:
            headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        for name, value in {**headers, **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        pieces = reply.pieces or self._pieces(reply, exchange)
        last = b""
        for piece in pieces:
            self.wfile.write(last)
            last = b"%x\r\n%s\r\n" % (len(piece), piece) if reply.pieces else piece
        if exchange:
            exchange.finish(reply.status)
        self.wfile.write(last + (b"0\r\n\r\n" if reply.pieces else b""))
        self.wfile.flush()
        if reply.cut_off_at is not None:
            self.close_connection = True

    def _pieces(self, reply: Reply, exchange: Exchange | None) -> Iterator[bytes]:
        body = reply.body[: reply.cut_off_at]
        if not exchange or not reply.spread_seconds:
            yield body
            return
        steps = max(1, min(len(body), int(reply.spread_seconds / 0.05)))
        for step in range(steps):
            yield body[len(body) * step // steps : len(body) * (step + 1) // steps]
            self.wfile.flush()
            exchange.wait(reply.spread_seconds / steps)

    def handle_expect_100(self) -> bool:
        goes_on = super().handle_expect_100()
        self.wfile.flush()
        return goes_on

    def client_has_gone(self) -> bool:
        try:
            # the plain socket's recv: a TLS socket knows no peeking
            return not socket.socket.recv(self.connection, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Listener(ThreadingMixIn, TCPServer):
    """One open port."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, owner: Server, port: int, context: ssl.SSLContext | None) -> None:
        self.owner, self.connections, self.lock = owner, set[socket.socket](), threading.Lock()
        super().__init__((owner.host, port), Handler)
        if context:
            # the handshake belongs to the connection's own thread: it may never end
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.thread = threading.Thread(target=self.serve_forever, args=(POLL_SECONDS,), daemon=True)
        self.thread.start()

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        with self.lock:
            self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that goes is no news
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        with self.lock:
            connections = list(self.connections)
        for connection in connections:
            with contextlib.suppress(OSError):  # gone by itself
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


class Server:
    """The fake API in this process, on one port and others opened later; all see the same tenants."""

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, tls_cert: str | None = None, tls_key: str | None = None
    ) -> None:
        self.host, self.state, self.listeners = host, State(), dict[int, Listener]()
        self.port = self.listen(port, tls_cert, tls_key)
        self.url = f"{'https' if tls_cert else 'http'}://{host}:{self.port}"

    def listen(self, port: int = 0, tls_cert: str | None = None, tls_key: str | None = None) -> int:
        """Open a port (0: any free one), with TLS if a certificate is given."""
        if port in self.listeners:
            return port
        context = None
        try:
            if tls_cert:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(tls_cert, tls_key)
            listener = Listener(self, port, context)
        except OSError as error:
            raise ValueError(f"cannot listen on port {port}: {error}") from error
        port = int(listener.server_address[1])
        self.listeners[port] = listener
        return port

    def refuse(self, port: int) -> None:
        """Close a port and its connections: from now on the operating system refuses."""
        if port == self.port:
            raise ValueError(f"port {port} is the server's own and stays open")
        if listener := self.listeners.pop(port, None):
            listener.close()

    def api(self, tenant: str) -> FakeApi:
        return FakeApi(self.url, f"{self.url}/{tenant}/v1", tenant)

    def close(self) -> None:
        for listener in self.listeners.values():
            listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- client ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeApi:
    """What a test holds in its hand: one tenant of a running server.

    control_url is the server as the test sees it, base_url the tenant's API as the database sees it.

        api.behave(faults=[{"status": 429, "retry_after": 2, "times": 3}])
        api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
        api.behave(hold="first text"); ...; api.wait_for(held=1); ...; api.release()
        api.texts(), api.counters()["max_in_flight"], api.log()[0]["status"]

    A shared port cannot refuse connections for one tenant. For an outage use a port of your own:

        port = api.listen()                      # base_url = f"http://127.0.0.1:{port}/{tenant}/v1"
        api.refuse(port); ...; api.listen(port)  # nobody there; there again
    """

    control_url: str
    base_url: str
    tenant: str

    @property
    def root(self) -> str:
        """The address of the tenant, under which the other protocols have theirs."""
        return self.base_url.removesuffix("/v1")

    def behave(self, **behaviour: Any) -> None:
        """Set the whole behaviour; what is not named is as by default."""
        self._call("PUT", f"control/{self.tenant}", behaviour)

    def amend(self, **behaviour: Any) -> None:
        """Change what is named; faults and rate limits that are not named keep their count."""
        self._call("PATCH", f"control/{self.tenant}", behaviour)

    def release(self) -> None:
        """Let the held requests go, and those that come."""
        self.amend(hold=False)

    def reset(self) -> None:
        """Default behaviour, empty log."""
        self._call("DELETE", f"control/{self.tenant}")

    def log(self) -> list[dict[str, Any]]:
        """Every request so far, in order of arrival."""
        requests: list[dict[str, Any]] = self._call("GET", f"control/{self.tenant}")["requests"]
        return requests

    def texts(self) -> list[str]:
        """Every text so far, in order of arrival."""
        return [text for request in self.log() for text in request["texts"] or []]

    def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = self._call("GET", f"control/{self.tenant}?only=counters")["counters"]
        return counters

    def wait_for(self, seconds: float = 10, **least: int) -> dict[str, Any]:
        """Wait until each named counter has at least this value; return all of them."""
        return self._wait(seconds, f"{least}", lambda now: all(now[name] >= least[name] for name in least))

    def wait_until_idle(self, seconds: float = 10) -> dict[str, Any]:
        """Wait until no request is in flight; return all counters."""
        return self._wait(seconds, "no request in flight", lambda now: not now["in_flight"])

    def _wait(self, seconds: float, what: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not done(counters := self.counters()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds} s for {what}, have {counters}")
            time.sleep(0.01)
        return counters

    def listen(self, port: int = 0, **tls: str) -> int:
        """Open a further port (0: any free one; tls_cert and tls_key: paths on the server's side)."""
        return int(self._call("PUT", f"ports/{port}", tls)["port"])

    def refuse(self, port: int) -> None:
        """Close that port: connections to it end, new ones are refused."""
        self._call("DELETE", f"ports/{port}")

    def _call(self, method: str, path: str, order: object = None) -> Any:
        body = None if order is None else json.dumps(order).encode()
        request = urllib.request.Request(f"{self.control_url}/{path}", body, method=method)
        # neither a proxy nor a certificate's name matters on the way to our own server
        handlers = [
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),
        ]
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error)["error"]) from None


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for embedding APIs.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tls-cert", help="serve https with this certificate (PEM)")
    parser.add_argument("--tls-key")
    arguments = parser.parse_args()
    with Server(arguments.host, arguments.port, arguments.tls_cert, arguments.tls_key) as server:
        print(f"listening on {server.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
