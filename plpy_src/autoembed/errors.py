"""The errors: who is to blame, and whether they pass. Decided here, acted on in worker and rows."""

from __future__ import annotations

import base64
import email.utils
import html
import itertools
import json
import math
import re
import time
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC
from types import MappingProxyType


class Fault(Exception):
    """A mistake of the user. It is returned to SQL, which raises it with message, hint and SQLSTATE."""

    def __init__(self, problem: str, *, hint: str, errcode: str = "22023") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
        self.errcode = errcode

    def fields(self) -> dict[str, str | None]:
        """What SQL raises: the columns of the functions that may return a fault."""
        return {"problem": self.problem, "hint": self.hint, "errcode": self.errcode}


# The same columns without one.
NO_FAULT: dict[str, str | None] = {"problem": None, "hint": None, "errcode": None}


class Trouble(Exception):
    """An embedding that could not be had; str() is one sentence for the operator, without secrets.

    headers: those of the HTTP answer that says so, in lower case; empty without an answer.
    summary: the same without words of the provider, which may quote texts: for every tenant.
    may_be_a_texts: the texts were sent, and one of them may be the reason.
    status: that of the HTTP answer; None: there was none, or it was 200.
    """

    headers: Mapping[str, str] = MappingProxyType({})
    summary: str = "its provider is in trouble"
    may_be_a_texts: bool = False
    status: int | None = None


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

    summary = "its daily budget is used up"


class CameLate(ProviderTrouble):
    """No whole answer came in time."""


class FellOver(ProviderTrouble):
    """The connection ended without an answer, or there was none."""


class RanTooLong(ProviderTrouble):
    """A model's SQL function was cancelled when its time was up."""


class PassEnded(Exception):
    """A cancel came while an owner's code ran: the pass ends in good order. str() is the error."""


class RowError(Exception):
    """A statement failed because of a row: its data, or its owner's functions, triggers and constraints.

    sqlstate: that of the error. locked: another session has a lock, perhaps on the whole table; the same statement may
    work in a moment. slow: it ran too long. cancels: a cancel came while an owner's code ran, or that code raised one.
    """

    def __init__(
        self,
        message: str,
        *,
        sqlstate: str = "XX000",
        locked: bool = False,
        slow: bool = False,
        cancels: bool = False,
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.locked = locked
        self.slow = slow
        self.cancels = cancels

    @property
    def may_pass(self) -> bool:
        """Whether another try of a write may do."""
        return self.slow or self.sqlstate.startswith(CONFLICT)

    @property
    def is_of_code(self) -> bool:
        """Whether it may be the code that is at fault, and not the row."""
        return self.sqlstate.startswith(CODE)


# SQLSTATEs (PostgreSQL manual, appendix A).
LOCK_NOT_AVAILABLE = "55P03"
OBJECT_IN_USE = "55006"
QUERY_CANCELED = "57014"
INSUFFICIENT_PRIVILEGE = "42501"
SERIALIZATION_FAILURE = "40001"
# A deadlock or a serialization failure, by its beginning: another try may do.
CONFLICT = "40"
# By their beginnings: the code names something that is gone, or that it may not use.
CODE = ("42", "3F")
# By their beginnings: the statement may work at another time.
PASSING = ("08", "40", "53", "55", "57P03", "58000", "58030")
# Raised by a statement without an owner's code, by nobody's fault: no memory or disk, a cancel, a shutdown.
NOBODYS = ("53", "57", "58030")


# More of an error's words is not kept: an owner's code can raise any number of megabytes.
MAX_REASON_CHARACTERS = 10_000


def row_error(sqlstate: str, message: str, *, timed_out: bool = False) -> RowError:
    """The error of a row that a statement with an owner's code has raised. timed_out: it ran too long."""
    message = message[:MAX_REASON_CHARACTERS]
    if timed_out and sqlstate == QUERY_CANCELED:
        message = "the code of the table's owner ran too long, and was cancelled"
        return RowError(message, sqlstate=sqlstate, slow=True)
    return RowError(
        message,
        sqlstate=sqlstate,
        locked=sqlstate in (LOCK_NOT_AVAILABLE, OBJECT_IN_USE),
        cancels=sqlstate == QUERY_CANCELED,
    )


def is_nobodys(sqlstate: str) -> bool:
    """Whether a statement without an owner's code has failed by no row's fault."""
    return sqlstate.startswith(NOBODYS)


def trouble_of_function(error: RowError, timeout_seconds: float) -> Trouble:
    """The trouble that an error of a user's SQL function means for the texts it was given."""
    if error.slow:
        return RanTooLong(
            f"the function was cancelled after {timeout_seconds:g} s; timeout_seconds of its model allows more"
        )
    if error.sqlstate.startswith(PASSING):
        return ProviderTrouble(str(error))
    return Refused(str(error))


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


# Words with which servers refuse a text for its length: TEI, vLLM, llama.cpp, Ollama, OpenAI, Jina and others.
TOO_LONG = re.compile(
    r"context (?:length|window|size)|too (?:large|long|many tokens)|(?:less|fewer|more) than \d+ tokens"
    r"|(?:maximum|exceed)[^.]{0,40}(?:tokens|length|limit|size)",
    re.IGNORECASE,
)
# The words before the number of tokens that such a server takes.
LIMIT_STATED = re.compile(
    r"(?:maximum|max|limit|less than|fewer than|at most|up to|batch size|length)\D{0,30}?(\d{2,7})", re.IGNORECASE
)
# The beginning of a trouble's words, which have a number, too.
ANSWERED = re.compile(r"^.*?the provider answered \d+: ", re.DOTALL)
# A text of fewer tokens is refused for another reason than its length.
MIN_CUT_TOKENS = 32


def shorter_limit(trouble: Trouble, tokens: int) -> int | None:
    """The tokens to cut a text to that was refused and has about so many; None: its length is not to blame."""
    words = ANSWERED.sub("", str(trouble))
    # A request of more tokens than a minute has is not too long for the model.
    if trouble.status == 429 or " per min" in words or trouble.status != 413 and not TOO_LONG.search(words):
        return None
    stated = [int(number) for number in LIMIT_STATED.findall(words)]
    # The stated number is of tokens by the server's own count. A text that was cut by the estimate may still exceed it.
    guess = tokens * 3 // 4 if stated else tokens // 2
    limit = min((number for number in stated if MIN_CUT_TOKENS <= number < tokens), default=guess)
    return limit if limit >= MIN_CUT_TOKENS else None


# Statuses that blame the request (RFC 9110, section 15).
REFUSED_STATUSES = {400, 413, 414, 422}
# Statuses that pass by themselves. 409, 423 and 425 come from busy gateways.
PASSING_STATUSES = {408, 409, 423, 425, 429}


def trouble_of_answer(status: int, headers: Mapping[str, str], body: bytes | bytearray) -> Trouble:
    """The trouble that an HTTP answer with a status other than 200 means."""
    trouble = _trouble_of_answer(status, headers, body)
    trouble.summary = summary_of(status)
    trouble.may_be_a_texts = may_be_a_texts(status)
    trouble.status = status
    return trouble


# Advice for an answer with this status.
ADVICE = {
    401: "Give the key that its provider takes: autoembed.alter_model(…, api_key => …). A new value of an env: "
    "reference is there after a restart of the server, one of file: or vault: at once.",
    403: "Its key may not use this model: give it the right at the provider, or another one by "
    "autoembed.alter_model(…, api_key => …).",
    404: "Compare the address with the provider's reference, and correct base_url, or model_id, with "
    "autoembed.alter_model().",
    429: "Nothing: lanes wait and go on by themselves. If it stays so, check the quota at the provider, or lower "
    "requests_per_minute with autoembed.alter_model().",
}


def advice_for(trouble: Trouble) -> str:
    """Advice for trouble with a provider."""
    if isinstance(trouble, OverBudget):
        return "Nothing: lanes go on when the day is over. Or raise the budget with autoembed.alter_model()."
    if trouble.status in ADVICE:
        return ADVICE[trouble.status]
    if trouble.status is not None and trouble.status >= 500:
        return "Look at its server, or at the provider's page of outages. Lanes try it again by themselves."
    if isinstance(trouble, ProviderTrouble) and trouble.status is None and not trouble.permanent:
        return (
            "Check that the database's server reaches its base_url: the name, the port, the firewall. Lanes try it "
            "again by themselves; timeout_seconds in autoembed.alter_model() gives a slow server more time."
        )
    return "Correct its definition with autoembed.alter_model(), its key, or the network. Lanes then try it again."


def may_be_a_texts(status: int) -> bool:
    """Whether a text may be to blame for an answer that is no good. A firewall answers 403 to texts that look like SQL.

    A probe may pass a limit of tokens that texts exceed.
    """
    return status != 429


def summary_of(status: int) -> str:
    """The part of an answer's error that every tenant may know."""
    return f"its provider is in trouble (HTTP {status})"


def _trouble_of_answer(status: int, headers: Mapping[str, str], body: bytes | bytearray) -> Trouble:
    message = f"the provider answered {status}: {message_in(body)}"
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
    milliseconds = re.fullmatch(r"[0-9]{1,12}(?:\.[0-9]{1,6})?", headers.get("retry-after-ms", ""))
    if milliseconds:
        return float(milliseconds[0]) / 1000
    value = headers.get("retry-after", "").strip()
    if not value or len(value) > 100:
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


# A part of a secret that is shorter than this says nothing.
MIN_SECRET_LENGTH = 4
# So many letters and digits of a secret in its order are a part of it, whatever stands between them.
PART_LETTERS = 8
LETTER = re.compile(r"[0-9A-Za-z]")
# How many layers of escapes are taken off in the search for secrets.
ESCAPE_LAYERS = 4
# The ways to write a character in JSON, Python and C.
BACKSLASHED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([^\w\s]))")
# An escape that the end of a text has cut, or a character.
CUT_ESCAPE = re.compile(r"(?:\\+(?:u[0-9a-fA-F]{0,3}|x[0-9a-fA-F]?)?|&#?\w{0,6}|%[0-9a-fA-F]?|\ufffd)\Z")


def without_secrets(trouble: Trouble, secrets: Collection[str], values: Collection[str] = ()) -> Trouble:
    """The same trouble, its words on one line of at most 400 characters, without secrets that the provider may echo.

    A secret is found in the escapes of JSON, Python, HTML and URLs, in base64 and hexadecimal, in either case, broken
    into lines, and in part.
    values: further values that were sent. They stand in a table, and only the whole of one is hidden.
    """
    wholes = sorted({w for w in (*secrets, *values) if len(w) >= MIN_SECRET_LENGTH}, key=len, reverse=True)
    parts = _parts_of(secrets)
    words = plain = _masked(str(trouble), wholes, parts)
    for _ in range(ESCAPE_LAYERS):
        unescaped = _unescaped(plain)
        plain = _masked(unescaped, wholes, parts)
        if plain != unescaped:
            words = plain
    trouble.args = (" ".join(words.split())[:400],)
    return trouble


def _masked(words: str, longest_first: Sequence[str], parts: Collection[str]) -> str:
    for secret in longest_first:
        words = words.replace(secret, "***")
    words = _without_parts(words, parts)
    end = CUT_ESCAPE.sub("", words)
    for secret in longest_first:
        for length in range(len(secret) - 1, MIN_SECRET_LENGTH - 1, -1):
            if end.endswith(secret[:length]):
                return end[:-length] + "***"
    return words


def _parts_of(secrets: Collection[str]) -> set[str]:
    """The parts of secrets, and of their encodings, as _without_parts() looks for them."""
    forms = [form for secret in secrets for form in (secret, _decoded(secret), *_encoded(secret.encode()))]
    letters = ["".join(LETTER.findall(form)).lower() for form in forms]
    return {form[n : n + PART_LETTERS] for form in letters for n in range(len(form) - PART_LETTERS + 1)}


def _decoded(secret: str) -> str:
    """What a secret says that is base64, as the name and the password of HTTP's Basic are; empty if it is none."""
    try:
        return base64.b64decode(secret, validate=True).decode("ascii")
    except ValueError:
        return ""


def _encoded(secret: bytes) -> list[str]:
    """A secret in hexadecimal, and in base64: alone, and behind one or two bytes more than a multiple of three."""
    in_base64 = [base64.b64encode(bytes(before) + secret).decode()[math.ceil(before * 8 / 6) :] for before in range(3)]
    return [secret.hex(), *in_base64]


def _without_parts(words: str, parts: Collection[str]) -> str:
    places = [letter.start() for letter in LETTER.finditer(words)]
    letters = "".join(words[place] for place in places).lower()
    hidden: set[int] = set()
    for first in range(len(letters) - PART_LETTERS + 1):
        if letters[first : first + PART_LETTERS] in parts:
            hidden.update(range(places[first], places[first + PART_LETTERS - 1] + 1))
    return "".join(
        "***" if is_hidden else "".join(words[place] for place in run)
        for is_hidden, run in itertools.groupby(range(len(words)), hidden.__contains__)
    )


def _unescaped(words: str) -> str:
    def character(escape: re.Match[str]) -> str:
        code = escape[1] or escape[2]
        return chr(int(code, 16)) if code else escape[3]

    return html.unescape(urllib.parse.unquote(BACKSLASHED.sub(character, words)))


def message_in(body: bytes | bytearray) -> str:
    """The provider's own words."""
    text = body[:10_000].decode("utf-8", "replace")
    try:
        answer = json.loads(text)
        if isinstance(answer, dict):
            text = _words_in(answer)
    except (ValueError, RecursionError):
        pass
    return text.strip() or "no explanation"


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
