"""What can go wrong, by whose fault and whether it passes: decided here, acted on in worker."""

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
    retry_after_seconds: what the provider asked for, if it did.
    """

    def __init__(self, message: str, *, permanent: bool = False, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.retry_after_seconds = retry_after_seconds


class OverBudget(ProviderTrouble):
    """The model has used up what it may use a day; retry_after_seconds: until the next one."""


class RowError(Exception):
    """A statement failed by a row's fault: its data, or its owner's functions, triggers and constraints.

    passes: somebody else was in the way, and the same statement may work in a moment; locked: with a lock, and
    perhaps on the whole table.
    """

    def __init__(self, message: str, *, passes: bool, locked: bool = False) -> None:
        super().__init__(message)
        self.passes = passes
        self.locked = locked


# SQLSTATEs by their beginnings (PostgreSQL manual, appendix A). What passes by itself: rollbacks for concurrency, and
# locks that are not to be had. What is nobody's row: no disk or memory left, cancel and shutdown, a failing disk.
PASSING = ("40", "55")
NOBODYS = ("53", "57", "58030")
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"
NO_CONNECTION = ("08",)
UNDEFINED_FUNCTION = "42883"


def row_error(sqlstate: str, message: str) -> RowError | None:
    """The row error that a failed statement means; None if no row is to blame."""
    if sqlstate.startswith(NOBODYS):
        return None
    # A function of ours that was made anew under a request in flight: the next claim finds it.
    gone = sqlstate == UNDEFINED_FUNCTION and "autoembed._" in message
    return RowError(message, passes=gone or sqlstate.startswith(PASSING), locked=sqlstate == LOCK_NOT_AVAILABLE)


def trouble_of_function(sqlstate: str, message: str) -> Trouble | None:
    """The trouble that an error of a user's SQL function means for the texts it was given; None: it was cancelled."""
    if sqlstate == QUERY_CANCELED:
        return None
    if sqlstate.startswith(PASSING + NOBODYS + NO_CONNECTION):
        return ProviderTrouble(message)
    return Refused(message)


MAX_REST_SECONDS = 15.0
MAX_PERMANENT_REST_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 3600.0


def rest_seconds(trouble: ProviderTrouble, failures: int, fraction: float) -> float:
    """How long a model rests after its provider failed that many times before; fraction: random, from 0 to 1.

    What the provider asks for, plus up to a second so that lanes do not come back all at once; else exponential backoff
    with full jitter. Never long: one small request now and then is how we learn that the provider is back.
    """
    if isinstance(trouble, OverBudget) and trouble.retry_after_seconds is not None:
        return trouble.retry_after_seconds
    if trouble.retry_after_seconds is not None:
        return min(trouble.retry_after_seconds, MAX_RETRY_AFTER_SECONDS) + fraction
    if trouble.permanent:
        return float(min(10.0 * 2 ** min(failures, 10), MAX_PERMANENT_REST_SECONDS))
    return 0.2 + fraction * min(2.0 ** min(failures, 10), MAX_REST_SECONDS)


# RFC 9110, section 15: what a client should make of a status. 409, 423, 425: a busy gateway.
REFUSED_STATUSES = {400, 413, 414, 422}
PASSING_STATUSES = {408, 409, 423, 425, 429}


def trouble_of_answer(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None
) -> Trouble:
    """The trouble that an HTTP answer with a status other than 200 means."""
    message = f"the provider answered {status}: {_message_in(body, secret)}"
    if status in REFUSED_STATUSES:
        return Refused(message)
    if status == 429 and b"Request too large" in body:
        # More tokens than a whole minute has: no time helps, fewer texts do.
        return Refused(message)
    if status == 429 and b"insufficient_quota" in body:
        return ProviderTrouble(message, permanent=True)
    if status in PASSING_STATUSES or status >= 500:
        return ProviderTrouble(message, retry_after_seconds=retry_after_seconds(headers))
    if 300 <= status < 400:
        return ProviderTrouble(f"the provider answered {status}, a redirect, which is not followed", permanent=True)
    return ProviderTrouble(message, permanent=True)


def retry_after_seconds(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Retry-After in seconds from now, given as such or as an HTTP date (RFC 9110, 10.2.3); None if there is none.

    OpenAI and Azure say it in milliseconds too, in a header of their own.
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
    """The provider's own words, on one line of at most 300 characters, without the key it may echo."""
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
    """What an error says, in the forms that providers and their web frameworks have for it."""
    if isinstance(error, list):
        return "; ".join(map(_words_in, error))
    if not isinstance(error, dict):
        return str(error)
    for name in ("error", "message", "detail"):
        if error.get(name) is not None:
            return _words_in(error[name])
    if isinstance(error.get("msg"), str):
        # A field of the request that is not as it should be.
        place = ".".join(map(str, error["loc"])) + ": " if isinstance(error.get("loc"), list) else ""
        return f"{place}{error['msg']}"
    return str(error)
