"""Behaviour: what a test may order of a tenant, and how an order is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NamedTuple, Self, get_type_hints


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def is_count(value: object) -> bool:
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
    return value == "forever" or is_count(value)


def _anything(value: object) -> bool:
    return True


def _object(value: object) -> bool:
    return isinstance(value, dict)


def _hold(value: object) -> bool:
    return _flag(value) or _text(value) or (isinstance(value, list) and all(map(_text, value)))


def _models(value: object) -> bool:
    return isinstance(value, dict) and all(_text(name) and is_count(size) for name, size in value.items())


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
    """Allowances that refill evenly, up to a burst: so many at once, or burst_seconds' worth."""

    requests_per_minute: Annotated[int | None, is_count] = None
    tokens_per_minute: Annotated[int | None, is_count] = None
    burst_seconds: Annotated[float, _number] = 60
    burst_requests: Annotated[int | None, is_count] = None
    burst_tokens: Annotated[int | None, is_count] = None
    counts_refused: Annotated[bool, _flag] = False  # as OpenAI does: who knocks again too soon is never let in


COMMON_TO_FAULTS = ("times", "match")
STATUS_EXTRAS = ("body", "headers", "retry_after", "retry_after_date")


@dataclass(frozen=True)
class Fault(FromJson):
    """One kind of wrong answer, given `times` times to requests whose text contains `match`."""

    times: Annotated[int | str, _times] = 1
    match: Annotated[str | None, _text] = None

    status: Annotated[int | None, is_count] = None  # this status, with the provider's usual body for it, or:
    body: Annotated[Any, _anything] = None  # a string is sent as it is, anything else as JSON
    headers: Annotated[dict[str, str] | None, _object] = None
    retry_after: Annotated[float | None, _number] = None  # seconds, as a number
    retry_after_date: Annotated[float | None, _number] = None  # seconds from now, as an HTTP date

    hang: Annotated[bool | float | None, _true_or(_number)] = None  # answer after N seconds; true: never
    close: Annotated[bool | None, _true] = None  # no answer at all
    fall: Annotated[float | None, _number] = None  # no answer at all, to nobody for N seconds
    cut_off: Annotated[bool | int | None, _true_or(is_count)] = None  # ends after N bytes; true: halfway
    slow_body: Annotated[float | None, _number] = None  # the body takes N seconds, a few bytes at a time
    big_body: Annotated[int | None, is_count] = None  # N bytes, their number not announced
    gzip_body: Annotated[int | None, is_count] = None  # N bytes, a thousandth of it on the wire
    not_json: Annotated[bool | None, _true] = None
    redirect: Annotated[str | None, _text] = None  # to this URL, with 307
    echo_authorization: Annotated[bool | None, _true] = None  # a 401 whose body repeats the header

    wrong_count: Annotated[bool | int | None, _true_or(_difference)] = None  # N more; true: one less
    wrong_dimensions: Annotated[bool | int | None, _true_or(is_count)] = None  # N; true: one less
    nan: Annotated[bool | None, _true] = None
    infinity: Annotated[bool | None, _true] = None
    duplicate_index: Annotated[bool | None, _true] = None  # the last item bears the first one's index
    missing_index: Annotated[bool | None, _true] = None  # the last item bears none
    shuffled: Annotated[bool | None, _true] = None  # reversed, with right indexes: not wrong at all
    invalid_base64: Annotated[bool | None, _true] = None  # the last item's embedding is "?!"

    @classmethod
    def from_json(cls, value: object) -> Self:
        fault = super().from_json(value)
        kinds = [kind for kind in cls.kinds() if getattr(fault, kind) is not None]
        extras = [name for name in STATUS_EXTRAS if getattr(fault, name) is not None]
        if extras and fault.status is None:
            raise ValueError(f"fault: {extras[0]!r} goes with 'status' only")
        if len(kinds) != 1:
            raise ValueError(f"fault must have exactly one of {', '.join(cls.kinds())}; it has {len(kinds)}")
        return fault

    @property
    def most(self) -> float:
        return self.times if isinstance(self.times, int) else math.inf

    @property
    def kind(self) -> str:
        return next(kind for kind in self.kinds() if getattr(self, kind) is not None)

    @classmethod
    def kinds(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name not in COMMON_TO_FAULTS + STATUS_EXTRAS]


class Limits(NamedTuple):
    """The most that a provider takes in one request."""

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
    max_inputs_per_request: Annotated[int | None, is_count] = None  # None, and so below: the provider's own
    max_tokens_per_input: Annotated[int | None, is_count] = None
    max_tokens_per_request: Annotated[int | None, is_count] = None
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

    def dimensions_of(self, model: object, models: Mapping[str, int]) -> int | None:
        return {**models, **(self.models or {})}.get(model) if isinstance(model, str) else None

    def within(self, own: Limits) -> Limits:
        return Limits(
            self.max_inputs_per_request or own.inputs,
            self.max_tokens_per_input or own.tokens_per_input,
            self.max_tokens_per_request or own.tokens_per_request,
        )
