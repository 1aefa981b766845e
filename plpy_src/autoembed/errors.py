"""The errors: who is to blame, and whether they pass. Decided here, acted on in worker and rows."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping
from datetime import UTC
from types import MappingProxyType


class Fault(Exception):
    """A mistake of the user. It is returned to SQL, which raises it with message, hint and SQLSTATE."""

    def __init__(self, problem: str, *, hint: str, errcode: str = "22023") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
        self.errcode = errcode


class Trouble(Exception):
    """An embedding that could not be had; str() is one sentence for the operator, without secrets.

    headers: those of the HTTP answer that says so, in lower case; empty without an answer.
    """

    headers: Mapping[str, str] = MappingProxyType({})


class Refused(Trouble):
    """The provider refused this request but not the next: one of its texts is to blame."""


class ProviderTrouble(Trouble):
    """The provider is to blame, not the texts.

    permanent: somebody must act (a wrong key, an unknown model); otherwise it passes by itself.
    retry_after_seconds: the wait that the provider asked for, if it did.
    """

    def __init__(self, message: str, *, permanent: bool = False, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.retry_after_seconds = retry_after_seconds


class OverBudget(ProviderTrouble):
    """The model has used up its budget of the day. retry_after_seconds: the time until the next day."""


class RowError(Exception):
    """A statement failed because of a row: its data, or its owner's functions, triggers and constraints.

    passes: another transaction was in the way, and the same statement may work in a moment.
    locked: it holds a lock, perhaps on the whole table.
    """

    def __init__(self, message: str, *, passes: bool, locked: bool = False) -> None:
        super().__init__(message)
        self.passes = passes
        self.locked = locked


# SQLSTATEs by their beginnings (PostgreSQL manual, appendix A).
# Errors that pass by themselves: rollbacks for concurrency, and locks that another transaction holds.
PASSING = ("40", "55")
# Errors that no row causes: no disk space or memory, a cancel or a shutdown, a failing disk.
NOBODYS = ("53", "57", "58030")
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"
NO_CONNECTION = ("08",)
UNDEFINED_FUNCTION = "42883"


def row_error(sqlstate: str, message: str) -> RowError | None:
    """The row error that a failed statement stands for; None if no row is to blame."""
    if sqlstate.startswith(NOBODYS):
        return None
    # A function of the pipeline was replaced while a request was in flight. The next claim finds the new one.
    gone = sqlstate == UNDEFINED_FUNCTION and "autoembed._" in message
    return RowError(message, passes=gone or sqlstate.startswith(PASSING), locked=sqlstate == LOCK_NOT_AVAILABLE)


def trouble_of_function(sqlstate: str, message: str) -> Trouble | None:
    """The trouble that an error of a user's SQL function stands for; None if it was cancelled."""
    if sqlstate == QUERY_CANCELED:
        return None
    if sqlstate.startswith(PASSING + NOBODYS + NO_CONNECTION):
        return ProviderTrouble(message)
    return Refused(message)


# The longest rest after trouble that passes by itself, in seconds.
MAX_REST_SECONDS = 15.0
# The longest rest after trouble that somebody must mend, in seconds.
MAX_PERMANENT_REST_SECONDS = 60.0
# A longer wait, in seconds, is not granted to a provider.
MAX_RETRY_AFTER_SECONDS = 3600.0


def rest_seconds(trouble: ProviderTrouble, failures: int, fraction: float) -> float:
    """The rest of a model whose provider has failed that many times before. fraction: random, from 0 to 1.

    The rest is the time that the provider asks for, plus up to a second so that lanes do not all come back at once.
    Without such a time it grows exponentially, with full jitter. It is never long: a small request now and then shows
    whether the provider is back.
    """
    if isinstance(trouble, OverBudget) and trouble.retry_after_seconds is not None:
        return trouble.retry_after_seconds
    if trouble.retry_after_seconds is not None:
        return min(trouble.retry_after_seconds, MAX_RETRY_AFTER_SECONDS) + fraction
    if trouble.permanent:
        return float(min(10.0 * 2 ** min(failures, 10), MAX_PERMANENT_REST_SECONDS))
    return 0.2 + fraction * min(2.0 ** min(failures, 10), MAX_REST_SECONDS)


# Statuses that blame the request (RFC 9110, section 15).
REFUSED_STATUSES = {400, 413, 414, 422}
# Statuses that pass by themselves. 409, 423 and 425 come from busy gateways.
PASSING_STATUSES = {408, 409, 423, 425, 429}


def trouble_of_answer(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None
) -> Trouble:
    """The trouble that an HTTP answer with a status other than 200 stands for."""
    message = f"the provider answered {status}: {_message_in(body, secret)}"
    if status in REFUSED_STATUSES:
        return Refused(message)
    if status == 429 and b"Request too large" in body:
        # The request has more tokens than a minute allows. Waiting does not help; fewer texts do.
        return Refused(message)
    if status == 429 and b"insufficient_quota" in body:
        return ProviderTrouble(message, permanent=True)
    if status in PASSING_STATUSES or status >= 500:
        return ProviderTrouble(message, retry_after_seconds=retry_after_seconds(headers))
    if 300 <= status < 400:
        return ProviderTrouble(f"the provider answered {status}, a redirect, which is not followed", permanent=True)
    return ProviderTrouble(message, permanent=True)


def retry_after_seconds(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Retry-After in seconds from now; None if there is none. It is a number or an HTTP date (RFC 9110, 10.2.3).

    OpenAI and Azure also send it in milliseconds, in another header.
    """
    milliseconds = re.fullmatch(r"[0-9]{1,12}", headers.get("retry-after-ms", ""))
    if milliseconds:
        return int(milliseconds[0]) / 1000
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - (time.time() if now is None else now))


def _message_in(body: bytes | bytearray, secret: str | None) -> str:
    """The provider's message, on one line of at most 300 characters, without the key that it may echo."""
    text = body[:10_000].decode("utf-8", "replace")
    try:
        answer = json.loads(text)
        if isinstance(answer, dict):
            text = _words_in(answer)
    except (ValueError, RecursionError):
        pass
    if secret:
        text = text.replace(secret, "***")
    return " ".join(text.split())[:300] or "no explanation"


def _words_in(error: object) -> str:
    """The message in an error, in the forms that providers and their web frameworks use."""
    if isinstance(error, list):
        return "; ".join(map(_words_in, error))
    if not isinstance(error, dict):
        return str(error)
    for name in ("error", "message", "detail"):
        if error.get(name) is not None:
            return _words_in(error[name])
    if isinstance(error.get("msg"), str):
        # A field of the request is wrong.
        place = ".".join(map(str, error["loc"])) + ": " if isinstance(error.get("loc"), list) else ""
        return f"{place}{error['msg']}"
    return str(error)
