"""How fast a model may be asked: what its definition says, what its provider's answers tell, and what follows of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from autoembed.errors import Trouble
from autoembed.model import Embedded

if TYPE_CHECKING:
    from autoembed.model import Model

# No clock of ours runs like the provider's, and no two requests take equally long to arrive.
HEADROOM = 1.03
# Requests are looked after every 50 ms; what one comes too late must not be lost for the next.
SAVED_SECONDS = 0.1
# How long the others wait for the first answer of a model that nothing is known of.
FIRST_ANSWER_SECONDS = 1.0
# How long a pass, or embed(), waits for its turns.
PATIENCE_SECONDS = 10.0


class Allowance(NamedTuple):
    """Requests or tokens: so many a minute, so many more at once; None: not known."""

    per_minute: int | None = None
    at_once: int | None = None


class Limits(NamedTuple):
    """What a provider allows, as far as it is known."""

    requests: Allowance = Allowance()
    tokens: Allowance = Allowance()


class Toll(NamedTuple):
    """What a request takes from an allowance, and how much of it may have been saved up before, both in seconds."""

    seconds: float
    saved_seconds: float


class Permit(NamedTuple):
    """What a request needs to be sent: the moment, by time.monotonic(), and a slot where only so many may be in flight.

    at None: no slot is free; spent: why nothing may be sent for rest_seconds.
    """

    at: float | None = None
    slot: int | None = None
    spent: str | None = None
    rest_seconds: float = 0.0


NOTHING_KNOWN = Limits()
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0.001}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[dhms]|$)")


def limits_in(headers: Mapping[str, str]) -> Limits:
    """What the x-ratelimit headers of an answer say, OpenAI's and those of whoever has them too; at_once: what is left.

    A limit that takes longer than a minute to be whole again is one of an hour or a day: its 429s say when.
    """
    return Limits(*(_allowance_told(headers, unit) for unit in ("requests", "tokens")))


def _allowance_told(headers: Mapping[str, str], unit: str) -> Allowance:
    limit, left = (_count(headers.get(f"x-ratelimit-{what}-{unit}", "")) for what in ("limit", "remaining"))
    if not limit or _seconds(headers.get(f"x-ratelimit-reset-{unit}", "")) > 61:
        return Allowance()
    return Allowance(limit, left)


def _count(value: str) -> int | None:
    return int(value) if re.fullmatch(r"\d{1,9}", value, re.ASCII) else None


def _seconds(value: str) -> float:
    """A duration as OpenAI writes it: 12ms, 1.5s, 6m0s; without a unit, seconds."""
    return sum(float(number) * _SECONDS[unit or "s"] for number, unit in _DURATION.findall(value))


def learn(known: Limits | None, told: Limits) -> Limits:
    """What is known after an answer; the most that was ever left is how much may be sent at once."""
    before = known or NOTHING_KNOWN
    return Limits(_learn(before.requests, told.requests), _learn(before.tokens, told.tokens))


def _learn(known: Allowance, told: Allowance) -> Allowance:
    if told.per_minute is None:
        return known
    # Not each time that a little more is left: it is written down.
    if told.per_minute != known.per_minute or (told.at_once or 0) > 1.1 * (known.at_once or 0):
        return told
    return known


def stricter(per_minute: int | None, known: Allowance) -> Allowance:
    """The lower of a limit of the model's own and its provider's."""
    if per_minute is not None and (known.per_minute is None or per_minute < known.per_minute):
        return Allowance(per_minute)
    return known


def toll(allowance: Allowance, amount: float, left: int | None = None, age_seconds: float = 0.0) -> Toll | None:
    """What a request of that amount takes; None: there is no limit. left: what an answer of that age said there is."""
    if allowance.per_minute is None:
        return None
    each = HEADROOM * 60 / allowance.per_minute
    saved = max(max(allowance.at_once or 0, amount) * each, SAVED_SECONDS)
    if left is not None:
        saved = min(saved, left * each + age_seconds)
    return Toll(amount * each, saved)


def tokens_per_request(model: Model, most: int, learnt: Limits | None) -> int:
    """The tokens that one request may have: no more than a minute's."""
    limits = (
        model.max_tokens_per_request or most,
        model.tokens_per_minute,
        (learnt or NOTHING_KNOWN).tokens.per_minute,
    )
    return min(limit for limit in limits if limit is not None)


class Limiter:
    """One model's limits, as a pass or a call of embed() keeps to them."""

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
        # Tokens that were estimated and not used.
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

    def tolls(self, tokens: int, now: float) -> tuple[Toll | None, Toll | None]:
        """What a request of so many tokens, by estimate, takes of requests and tokens."""
        requests, token_allowance = self._allowances()
        refund = min(self._overpaid, tokens)
        self._overpaid -= refund
        age = now - self._told_at
        return (
            toll(requests, 1, self._told.requests.at_once, age),
            toll(token_allowance, tokens - refund, self._told.tokens.at_once, age),
        )

    def learn_from(self, outcome: Embedded | BaseException, now: float) -> bool:
        """Takes the limits from the headers of an answer. Returns whether they differ from those known before."""
        told = limits_in(outcome.headers) if isinstance(outcome, Embedded | Trouble) else NOTHING_KNOWN
        if told == NOTHING_KNOWN and not isinstance(outcome, Embedded):
            return False
        before, self.learnt = self.learnt, learn(self.learnt, told)
        self._told, self._told_at = told, now
        return self.learnt != before

    def counted(self, estimated: int, tokens: int | None) -> None:
        """An answer says how many tokens there were."""
        if tokens is not None:
            self._overpaid += max(0, estimated - tokens)
