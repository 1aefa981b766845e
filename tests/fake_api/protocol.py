"""A provider's protocol: what the file of each says of it, and what several of them have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, NamedTuple

from fake_api.behaviour import Behaviour, Limits
from fake_api.rate_limit import Allowance
from fake_api.vectors import Vector, embedding_of, tokens_in


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
        details: Sequence[dict[str, Any]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.details, self.headers = details, dict(headers or {})


@dataclass(frozen=True)
class Item:
    """One embedding, or one score, of an answer, before it is written in the provider's form."""

    index: int | None
    vector: Vector | str


class Ask(NamedTuple):
    """A request that is in order."""

    texts: list[str]
    model: str
    dimensions: int
    base64: bool
    tokens: int
    query: str | None = None  # with which the texts are compared; None: they are to be embedded


@dataclass
class Reply:
    """An answer on its way; `pieces` go out instead of the body, in chunks."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    pieces: Iterator[bytes] | None = None
    cut_off_at: int | None = None
    spread_seconds: float = 0.0


class Protocol(NamedTuple):
    """A provider's way of speaking; another provider is another file with one of these and an entry in PROTOCOLS."""

    path: re.Pattern[str]  # below the tenant; its groups are what the address says
    fields: frozenset[str]  # that its reference names
    texts: Callable[[Any], list[str]]  # as far as they can be made out, for log and faults
    settings: Callable[[Any], dict[str, Any]]  # the body without its texts, for the log
    # Takes the body, and the parts and parameters of the address; raises Refusal.
    check: Callable[[Any, Behaviour, Mapping[str, str]], Ask]
    answer: Callable[[Ask, list[Item]], bytes]
    usual_refusal: Callable[[int], Refusal]
    error: Callable[[Refusal], bytes]
    bad_key: Callable[[str | None], Refusal | None]  # of none, or of one that is not right; None: never mind
    embed: Callable[[str, int, str], Vector] = embedding_of
    requests_in: Callable[[list[str]], int] = lambda texts: 1  # that a request with these texts counts as
    # Takes the tenant's limits and the status of the answer that they go with.
    limit_headers: Callable[[Sequence[Allowance], int], dict[str, str]] = lambda allowances, status: {}
    # Takes the allowance that does not suffice and the usual refusal.
    over_limit: Callable[[Allowance, Refusal], Refusal] = lambda allowance, usual: usual
    key_header: str = "Authorization"


def retry_after(seconds: float) -> dict[str, str]:
    return {} if seconds == math.inf else {"Retry-After": str(math.ceil(seconds))}


def key_in(headers: Message, name: str) -> str | None:
    value = str(headers.get(name, ""))
    if name != "Authorization":
        return value or None
    scheme, _, key = value.partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def strings(name: str) -> Callable[[Any], list[str]]:
    def found(body: Any) -> list[str]:
        given = body.get(name) if isinstance(body, dict) else None
        given = [given] if isinstance(given, str) else given
        return [text for text in given if isinstance(text, str)] if isinstance(given, list) else []

    return found


def without(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda body: {name: body[name] for name in body.keys() - names} if isinstance(body, dict) else {}


def json_item(item: Item) -> Any:
    return item.vector if isinstance(item.vector, str) else item.vector.tolist()


def only(body: Any, fields: frozenset[str], behaviour: Behaviour) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise Refusal(400, "invalid JSON")
    unknown = body.keys() - fields
    if unknown and not behaviour.accepts_extra_fields:
        raise Refusal(400, f"unknown field: {', '.join(sorted(unknown))}")
    return body


def known(model: object, behaviour: Behaviour, models: Mapping[str, int], refusal: Refusal) -> int:
    full = behaviour.dimensions_of(model, models)
    if full is None:
        raise refusal
    return full


def count_tokens(texts: list[str], limits: Limits, words: Mapping[str, str], cut: bool = False) -> int:
    """The tokens of the texts, if they are within the limits; words: what is said of those that are not."""
    if not texts or len(texts) > limits.inputs:
        raise Refusal(400, words["inputs"].format(most=limits.inputs))
    tokens = [min(tokens_in(text), limits.tokens_per_input) if cut else tokens_in(text) for text in texts]
    if max(tokens) > limits.tokens_per_input:
        raise Refusal(400, words["input"].format(most=limits.tokens_per_input, found=max(tokens)))
    if sum(tokens) > limits.tokens_per_request:
        raise Refusal(400, words["request"].format(most=limits.tokens_per_request, found=sum(tokens)))
    return sum(tokens)


def usually(messages: Mapping[int, str]) -> Callable[[int], Refusal]:
    return lambda status: Refusal(status, messages.get(status, f"Refused with {status}."))
