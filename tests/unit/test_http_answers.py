"""Which answer of a provider is whose fault, when to ask again, and words without secrets: tables of cases."""

from __future__ import annotations

import base64
import email.utils
import html
import json
import time
import tracemalloc
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed.answers import retry_after_seconds, trouble_of_answer, without_secrets
from autoembed.errors import ProviderTrouble, Refused, Trouble

NOW = 1_700_000_000.0


def kind_of(trouble: Trouble) -> str:
    if isinstance(trouble, ProviderTrouble):
        return "permanent" if trouble.permanent else "passing"
    assert isinstance(trouble, Refused)
    return "refused"


CLIENT_ERRORS = {
    **dict.fromkeys([400, 413, 414, 422], "refused"),
    **dict.fromkeys([408, 409, 423, 425, 429], "passing"),
}


@pytest.mark.parametrize("status", range(300, 600))
def test_a_status_means_its_kind_of_trouble(status: int) -> None:
    expected = "passing" if status >= 500 else CLIENT_ERRORS.get(status, "permanent")

    trouble = trouble_of_answer(status, {}, b'{"error": {"message": "No."}}')

    assert kind_of(trouble) == expected
    assert f"the provider answered {status}" in str(trouble)
    # A limit is no text's fault.
    assert trouble.may_be_a_texts == (status != 429)


def test_a_used_up_quota_does_not_pass_by_itself() -> None:
    body = {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}

    trouble = trouble_of_answer(429, {"retry-after": "1"}, json.dumps(body).encode())

    assert kind_of(trouble) == "permanent"
    assert str(trouble) == "the provider answered 429: You exceeded your current quota."


@pytest.mark.parametrize("status", [429, 500, 503])
def test_retry_after_goes_with_trouble_that_passes(status: int) -> None:
    trouble = trouble_of_answer(status, {"retry-after": "7"}, b"")

    assert isinstance(trouble, ProviderTrouble)
    assert trouble.retry_after_seconds == 7


def test_a_redirect_is_not_quoted() -> None:
    trouble = trouble_of_answer(307, {"location": "http://elsewhere"}, b"http://elsewhere")

    assert str(trouble) == "the provider answered 307, a redirect, which is not followed"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "Too long.", "type": "invalid"}}', "Too long."),
        (b'{"error": "model not found"}', "model not found"),
        (b'{"error": {"type": "overloaded"}}', "{'type': 'overloaded'}"),
        (b'{"message": "Not here."}', "Not here."),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": {"message": "Not here."}}', "Not here."),
        (
            b'{"detail": [{"loc": ["body", "dimensions"], "msg": "Extra inputs are not permitted"}]}',
            "body.dimensions: Extra inputs are not permitted",
        ),
        (b'{"detail": [{"msg": "No."}, {"loc": ["body"], "msg": "Nor this."}]}', "No.; body: Nor this."),
        (b'{"detail": []}', "no explanation"),
        (b'{"object": "error", "message": {"detail": [{"loc": ["body"], "msg": "No."}]}}', "body: No."),
        (b'{"error": {"message": null, "code": 7}}', "{'message': None, 'code': 7}"),
        (b'{"error": null}', "{'error': None}"),
        (b'["a", "list"]', '["a", "list"]'),
        (b'"a string"', '"a string"'),
        (b"<html>Bad gateway</html>", "<html>Bad gateway</html>"),
        (b'{"error": {"message": "cut o', '{"error": {"message": "cut o'),
        (b"", "no explanation"),
        (b" \n ", "no explanation"),
        (b'{"error": {"message": ""}}', "no explanation"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[" * 5000, "[" * 5000),
        (b"9" * 5000, "9" * 5000),
    ],
)
def test_the_providers_own_words_are_found(body: bytes, message: str) -> None:
    assert str(trouble_of_answer(500, {}, body)) == f"the provider answered 500: {message}"


def test_a_huge_body_is_not_read_to_its_end() -> None:
    body = b'{"error": {"message": "' + b"x " * 20_000_000
    tracemalloc.start()
    try:
        message = str(trouble_of_answer(500, {}, body))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(message) < 11_000
    assert peak < 1 << 20


@pytest.mark.parametrize("status", [300, 400, 401, 429, 500])
def test_every_tenant_may_know_the_status_and_no_words(status: int) -> None:
    trouble = trouble_of_answer(status, {}, b'{"error": {"message": "Your text says: a secret"}}')

    assert trouble.summary == f"its provider is in trouble (HTTP {status})"


@pytest.mark.parametrize(
    ("words", "secrets", "left"),
    [
        ("Not allowed: Bearer sk-secret, sk-secret", ["sk-secret"], "Not allowed: Bearer ***, ***"),
        # A secret may be part of another.
        ("Bearer sk-secret", ["sk-secret", "Bearer sk-secret"], "***"),
        ("sk-one and two-sk", ["two-sk", "sk-one"], "*** and ***"),
        # Hidden first and cut then: no part of a secret is left at the end.
        ("x" * 395 + "sk-secret", ["sk-secret"], "x" * 395 + "***"),
        ("x" * 398 + "sk-secret", ["sk-secret"], "x" * 398 + "**"),
        ("two\nlines   and\ttabs ", [], "two lines and tabs"),
        ("x" * 401, [], "x" * 400),
    ],
)
def test_secrets_are_hidden_and_the_words_are_one_short_line(words: str, secrets: list[str], left: str) -> None:
    trouble = ProviderTrouble(words, permanent=True, retry_after_seconds=7)

    found = without_secrets(trouble, secrets)

    assert found is trouble
    assert str(found) == left
    assert (trouble.permanent, trouble.retry_after_seconds) == (True, 7)


KEY = "sk-a/b\\c\"d'e&f%g-1234"
BACKSLASHED = "".join(f"\\u{ord(c):04x}" for c in KEY)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        # The end of what is read of a body cuts the key, in each of its forms.
        (b"x" + b" " * 9_979 + b"sk-0123456789-0123456789" + b" " * 100, "x ***"),
        (b"x" + b" " * 9_995 + b"sk-0123456789-0123456789", "x ***"),
        (b"x" + b" " * 9_996 + b"sk-0123456789-0123456789", "x sk-"),
        (b"x" + b" " * 9_990 + b"sk-\\u0030123456789-0123456789", "x ***"),
        (b"x" + b" " * 9_991 + b"sk-0\\u003123456789-0123456789", "x ***"),
        (b"x" + b" " * 9_992 + b"sk-0\\u003123456789-0123456789", "x ***"),
        (b"x" + b" " * 9_993 + b"sk-0\\u003123456789-0123456789", "x ***"),
        (b"x" + b" " * 9_993 + b"sk-0\\x3123456789-0123456789", "x ***"),
        (b"x" + b" " * 9_993 + b"sk-0&#x31;23456789-0123456789", "x ***"),
        (b"x" + b" " * 9_994 + b"sk-0%3123456789-0123456789", "x ***"),
        # A body that is no complete JSON, with the escapes of JSON.
        (('{"error": "Bad key ' + json.dumps(KEY)[1:-1]).encode(), '{"error": "Bad key ***'),
        (('{"error": "Bad key ' + KEY.replace("/", "\\/").replace('"', '\\"') + " here").encode(), "*** here"),
        (('{"error": "Bad key ' + BACKSLASHED + " here").encode(), "*** here"),
        (('{"error": "Bad key ' + BACKSLASHED.upper().replace("\\U", "\\u") + " here").encode(), "*** here"),
        (('{"error": "Bad key ' + BACKSLASHED.replace("\\", "\\\\") + " here").encode(), "*** here"),
        # An object that has no message is shown as Python writes it.
        (json.dumps({"error": {"key": KEY}}).encode(), "***"),
        (json.dumps({"error": {KEY: {"inner": json.dumps(KEY)}}}).encode(), "***"),
        (f"<p>Bad key {html.escape(KEY)} here".encode(), "*** here"),
        (f"Bad key {urllib.parse.quote(KEY, safe='')} here".encode(), "*** here"),
        (f"Bad key {''.join(f'&#{ord(c)};' for c in KEY)} here".encode(), "*** here"),
        (f"Bad key {''.join(f'%{ord(c):02x}' for c in KEY)} here".encode(), "*** here"),
        # Other escapes stay as they are.
        (b"50%25 of \\u0041 &amp; b, not valid", "50%25 of \\u0041 &amp; b, not valid"),
    ],
)
def test_no_part_of_a_secret_is_shown_in_any_form(body: bytes, left: str) -> None:
    found = str(without_secrets(trouble_of_answer(500, {}, body), ["sk-0123456789-0123456789", KEY]))

    assert left in found
    assert "1234" not in found


LONG_KEY = "sk-proj-Zq7Yw3_Rt9Lm2/Kx8Vb4+Nc6Hd1Fg5"
PARTS = {
    "beginning": LONG_KEY[:14] + "…",
    "end": "…" + LONG_KEY[-14:],
    "middle": f"{LONG_KEY[5:16]}***{LONG_KEY[20:30]}",
    "upper case": LONG_KEY.upper(),
    "lower case": LONG_KEY.lower(),
    "lines": "\n".join(LONG_KEY[n : n + 6] for n in range(0, len(LONG_KEY), 6)),
    "a list": json.dumps(list(LONG_KEY)),
    "hexadecimal": LONG_KEY.encode().hex(),
    "hexadecimal with colons": LONG_KEY.encode().hex(":").upper(),
    "base64": base64.b64encode(LONG_KEY.encode()).decode(),
    "base64 of a header": base64.b64encode(f"Bearer {LONG_KEY}".encode()).decode(),
    "base64 of a name and a password": base64.b64encode(f"me:{LONG_KEY}!".encode()).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(f"{LONG_KEY}?".encode()).decode(),
    "base64 in a URL": urllib.parse.quote(base64.b64encode(LONG_KEY.encode()).decode(), safe=""),
}


@pytest.mark.parametrize("form", PARTS)
def test_no_part_of_a_secret_is_shown_in_an_encoding(form: str) -> None:
    shown = PARTS[form]

    trouble = ProviderTrouble(f"the key {shown} is not known here")
    found = str(without_secrets(trouble, [LONG_KEY, f"Bearer {LONG_KEY}"]))

    letters = [letter for letter in shown if letter.isalnum()]
    left = "".join(letter for letter in found if letter.isalnum())
    assert found.startswith("the key ")
    assert found.endswith(" is not known here")
    assert [n for n in range(len(letters) - 8) if "".join(letters[n : n + 8]) in left] == []


def test_the_password_in_a_secret_is_hidden() -> None:
    secret = base64.b64encode(b"me:correct-horse-battery").decode()

    found = without_secrets(ProviderTrouble("no correct-horse-battery for me"), [secret, f"Basic {secret}"])

    assert str(found) == "no *** for me"


def test_a_value_that_is_no_secret_takes_no_words_away() -> None:
    trouble = ProviderTrouble("the embedding for the header https://example.com/embeddings failed")

    found = without_secrets(trouble, ["sk-0123456789"], ["https://example.com/embeddings"])

    assert str(found) == "the embedding for the header *** failed"


@given(st.text(max_size=300), st.lists(st.text(min_size=4, max_size=30)))
def test_no_words_break_the_mask(words: str, secrets: list[str]) -> None:
    found = str(without_secrets(ProviderTrouble(words), secrets))

    assert len(found) <= 400


@given(status=st.integers(300, 599), body=st.binary(), header=st.text())
def test_no_answer_breaks_the_judge(status: int, body: bytes, header: str) -> None:
    message = str(trouble_of_answer(status, {"retry-after": header}, body))

    assert message.startswith(f"the provider answered {status}")
    assert len(message) < 11_000


# --- Retry-After -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("  ", None),
        ("0", 0),
        ("7", 7),
        (" 2.5 ", 2.5),
        ("-5", 0),
        (email.utils.formatdate(NOW + 90, usegmt=True), 90),
        (email.utils.formatdate(NOW - 90, usegmt=True), 0),
        ("Tue, 14 Nov 2023 22:13:50 -0000", 30),
        ("Tue, 14 Nov 2023 23:13:50 +0100", 30),
        ("soon", None),
        ("7 seconds", None),
        ("Tue, 99 Nov 2023 22:13:20 GMT", None),
        ("31 Dec 99999 00:00:00 GMT", None),
        ("Tue, 14 Nov 2023 22:13:20 +99999999999999999999", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds({} if value is None else {"retry-after": value}, NOW) == seconds


def test_a_date_counts_from_now() -> None:
    header = email.utils.formatdate(time.time() + 60, usegmt=True)

    seconds = retry_after_seconds({"retry-after": header})

    assert seconds is not None
    assert 58 < seconds <= 60


@given(st.text() | st.floats().map(str))
def test_retry_after_is_never_negative_nor_not_a_number(value: str) -> None:
    seconds = retry_after_seconds({"retry-after": value}, NOW)

    assert seconds is None or seconds >= 0
