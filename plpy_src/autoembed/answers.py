"""What an HTTP answer says that is no embedding: who is to blame, when to ask again, and its words without secrets."""

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

from autoembed.errors import ProviderTrouble, Refused, Trouble

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
