"""The speed at which a model may be asked: by its definition, and by what its provider's answers tell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from autoembed.errors import Trouble
from autoembed.model import Embedded, Reranked

if TYPE_CHECKING:
    from autoembed.model import Model

# Requests stay 3 % below the limit, because clocks and network delays differ.
HEADROOM = 1.03
# Sending is checked every SLICE_SECONDS. Allowance that is unused for up to this long, in seconds, carries over, so
# that being late does not lower the rate.
SAVED_SECONDS = 0.1
# The first request to an unknown model goes alone for at most this long, in seconds.
FIRST_ANSWER_SECONDS = 1.0
# A pass waits this long for the turn of a request, and embed() for its own, in seconds.
PATIENCE_SECONDS = 10.0
# A limit that takes longer than this to be whole again, in seconds, is not one of a minute.
MINUTE_SECONDS = 61
# The minutes' worth of a limit that one counts as, by the unit in the header's name.
PER_MINUTE = {"minute": 1, "second": 60}
# A larger limit, which limits nobody, is not learnt: no column holds it.
MAX_PER_MINUTE = 2**31 - 1
# The names of requests and tokens in x-ratelimit headers with a unit: Mistral's, and those of gateways such as Kong.
KINDS = {"requests": ("req-", "requests-", ""), "tokens": ("tokens-",)}
# Together counts by the second, without saying so in the names.
OF_A_SECOND = {"requests": "x-ratelimit", "tokens": "x-tokenlimit"}


class Allowance(NamedTuple):
    """Requests or tokens: so many a minute, and so many more at once. None: not known."""

    per_minute: int | None = None
    at_once: int | None = None


class Limits(NamedTuple):
    """The limits of a provider, as far as they are known."""

    requests: Allowance = Allowance()
    tokens: Allowance = Allowance()


class Charge(NamedTuple):
    """The part of an allowance that a request uses, and how much of it may have been saved up. Both in seconds."""

    seconds: float
    saved_seconds: float


class Permit(NamedTuple):
    """The permission to send a request.

    at: the moment, by time.monotonic(); None: it is not given. slot: where the number of requests in flight is limited.
    spent: why nothing may be sent for rest_seconds. possible_at: the moment that the limits allow, which is too far
    away. Neither, and no permission: no slot is free.
    """

    at: float | None = None
    slot: int | None = None
    spent: str | None = None
    rest_seconds: float = 0.0
    possible_at: float | None = None


NOTHING_KNOWN = Limits()
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0.001}
# A longer value of a header is nobody's duration: reading it would take long.
MAX_HEADER_CHARACTERS = 100
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[dhms]|$)")


# A policy of the draft of the IETF: a quota, and its window in seconds.
_POLICY = re.compile(r'(?:^|,)\s*(?:"[^"]*"|(\d{1,9}))\s*((?:;[^,]*)?)')
_PARAMETER = re.compile(r";\s*([qw])\s*=\s*(\d{1,9})\b")


def limits_in(headers: Mapping[str, str]) -> Limits:
    """The limits in the headers of an answer, as OpenAI, Mistral, Together and gateways send them.

    at_once: what is left. Where several are told, the lowest counts. Limits of an hour or a day are left out: the
    provider's 429s say when they end.
    """
    return Limits(_lowest(_requests_in(headers)), _lowest(_allowances_in(headers, "tokens")))


def _lowest(told: Iterable[Allowance]) -> Allowance:
    held = (one for one in told if 0 < (one.per_minute or 0) <= MAX_PER_MINUTE)
    return min(held, key=lambda one: one.per_minute or 0, default=Allowance())


def _requests_in(headers: Mapping[str, str]) -> Iterator[Allowance]:
    yield from _allowances_in(headers, "requests")
    policies = headers.get("ratelimit-policy", "")
    for bare, parameters in _POLICY.findall(policies if len(policies) <= MAX_HEADER_CHARACTERS else ""):
        found = dict(_PARAMETER.findall(parameters))
        quota, window = int(found.get("q", bare) or 0), int(found.get("w", 0))
        if 0 < window <= MINUTE_SECONDS:
            yield Allowance(quota * 60 // window)


def _allowances_in(headers: Mapping[str, str], kind: str) -> Iterator[Allowance]:
    limit, left = (_count(headers.get(f"x-ratelimit-{what}-{kind}", "")) for what in ("limit", "remaining"))
    reset = headers.get(f"x-ratelimit-reset-{kind}", "")
    if limit and _seconds(reset) <= MINUTE_SECONDS:
        yield Allowance(limit, left)
    for name in KINDS[kind]:
        for unit, count in PER_MINUTE.items():
            limit, left = (
                _count(headers.get(f"x-ratelimit-{what}-{name}{unit}", "")) for what in ("limit", "remaining")
            )
            yield Allowance(limit and limit * count, left)
    if "x-tokenlimit-limit" in headers:
        limit, left = (_count(headers.get(f"{OF_A_SECOND[kind]}-{what}", "")) for what in ("limit", "remaining"))
        yield Allowance(limit and limit * 60, left)


def _count(value: str) -> int | None:
    return int(value) if re.fullmatch(r"\d{1,9}", value, re.ASCII) else None


def _seconds(value: str) -> float:
    """A duration in OpenAI's notation: 12ms, 1.5s, 6m0s; without a unit, seconds."""
    if len(value) > MAX_HEADER_CHARACTERS:
        return math.inf
    return sum(float(number) * _SECONDS[unit or "s"] for number, unit in _DURATION.findall(value))


def learn(known: Limits | None, told: Limits) -> Limits:
    """The limits known after an answer. The most that was ever left is how much may be sent at once."""
    before = known or NOTHING_KNOWN
    return Limits(_learn(before.requests, told.requests), _learn(before.tokens, told.tokens))


def _learn(known: Allowance, told: Allowance) -> Allowance:
    if told.per_minute is None:
        return known
    # A small difference is not worth a write.
    if told.per_minute != known.per_minute or (told.at_once or 0) > 1.1 * (known.at_once or 0):
        return told
    return known


def stricter(per_minute: int | None, known: Allowance) -> Allowance:
    """The lower of a model's own limit and its provider's."""
    if per_minute is not None and (known.per_minute is None or per_minute < known.per_minute):
        return Allowance(per_minute)
    return known


def charge_for(amount: float, allowance: Allowance, left: int | None = None, age_seconds: float = 0.0) -> Charge | None:
    """The charge for a request of that amount; None if there is no limit.

    left: the allowance that an answer of that age said was left.
    """
    if allowance.per_minute is None:
        return None
    each = HEADROOM * 60 / allowance.per_minute
    saved = max(max(allowance.at_once or 0, amount) * each, SAVED_SECONDS)
    if left is not None:
        saved = min(saved, left * each + age_seconds)
    return Charge(amount * each, saved)


class Limiter:
    """The limits of one model, as a pass or a call of embed() keeps to them."""

    def __init__(self, model: Model) -> None:
        row = model.learnt
        self._model = model
        self.learnt = (
            None
            if row is None
            else Limits(
                Allowance(row.get("requests_per_minute"), row.get("requests_at_once")),
                Allowance(row.get("tokens_per_minute"), row.get("tokens_at_once")),
            )
        )
        self._told = NOTHING_KNOWN
        self._told_at = 0.0
        # Tokens that were charged by estimate and not used.
        self._overpaid = 0

    @property
    def paces(self) -> bool:
        """Whether requests or tokens a minute are limited."""
        return any(allowance.per_minute is not None for allowance in self._allowances())

    @property
    def needs_permits(self) -> bool:
        model = self._model
        budgets = (model.max_requests_in_flight, model.daily_token_budget, model.daily_cost_budget)
        return self.paces or any(budget is not None for budget in budgets)

    def _allowances(self) -> tuple[Allowance, Allowance]:
        known = self.learnt or NOTHING_KNOWN
        return (
            stricter(self._model.requests_per_minute, known.requests),
            stricter(self._model.tokens_per_minute, known.tokens),
        )

    def charge(self, tokens: int, now: float) -> tuple[Charge | None, Charge | None]:
        """Charges a request of so many tokens, by estimate: in requests, and in tokens less those overpaid before."""
        requests, token_allowance = self._allowances()
        refund = min(self._overpaid, tokens)
        age = now - self._told_at
        return (
            charge_for(1, requests, self._told.requests.at_once, age),
            charge_for(tokens - refund, token_allowance, self._told.tokens.at_once, age),
        )

    def charged(self, tokens: int) -> None:
        """Takes note that a permit for so many tokens was given."""
        self._overpaid -= min(self._overpaid, tokens)

    def learn_from(self, outcome: object, now: float) -> bool:
        """Takes the limits from the headers of an answer. Returns whether they differ from those known before."""
        told = limits_in(outcome.headers) if isinstance(outcome, Embedded | Reranked | Trouble) else NOTHING_KNOWN
        if told == NOTHING_KNOWN and not isinstance(outcome, Embedded | Reranked):
            return False
        before, self.learnt = self.learnt, learn(self.learnt, told)
        self._told, self._told_at = told, now
        return self.learnt != before

    def correct_estimate(self, estimated: int, tokens: int | None) -> None:
        """Notes the tokens that a request had by its answer: those charged in excess are credited to the next."""
        if tokens is not None:
            self._overpaid += max(0, estimated - tokens)
