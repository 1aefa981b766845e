"""Which answer of a provider, and which SQLSTATE, is whose fault and whether it passes: tables of cases."""

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

from autoembed import errors
from autoembed.errors import (
    OverBudget,
    ProviderTrouble,
    Refused,
    Trouble,
    advice_for,
    rest_seconds,
    retry_after_seconds,
    trouble_of_answer,
)

NOW = 1_700_000_000.0


def kind_of(trouble: Trouble) -> str:
    if isinstance(trouble, ProviderTrouble):
        return "permanent" if trouble.permanent else "passing"
    assert isinstance(trouble, Refused)
    return "refused"


# --- answers -----------------------------------------------------------------------------------------

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
    ("trouble", "summary"),
    [
        (ProviderTrouble("no answer from embeddings.internal"), "its provider is in trouble"),
        (Refused("not these words"), "its provider is in trouble"),
        (OverBudget("all 9 tokens of the day are used up"), "its daily budget is used up"),
    ],
)
def test_a_summary_has_no_words_of_the_trouble(trouble: Trouble, summary: str) -> None:
    assert trouble.summary == summary


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

    found = errors.without_secrets(trouble, secrets)

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
    found = str(errors.without_secrets(trouble_of_answer(500, {}, body), ["sk-0123456789-0123456789", KEY]))

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
    found = str(errors.without_secrets(trouble, [LONG_KEY, f"Bearer {LONG_KEY}"]))

    letters = [letter for letter in shown if letter.isalnum()]
    left = "".join(letter for letter in found if letter.isalnum())
    assert found.startswith("the key ")
    assert found.endswith(" is not known here")
    assert [n for n in range(len(letters) - 8) if "".join(letters[n : n + 8]) in left] == []


def test_the_password_in_a_secret_is_hidden() -> None:
    secret = base64.b64encode(b"me:correct-horse-battery").decode()

    found = errors.without_secrets(ProviderTrouble("no correct-horse-battery for me"), [secret, f"Basic {secret}"])

    assert str(found) == "no *** for me"


def test_a_value_that_is_no_secret_takes_no_words_away() -> None:
    trouble = ProviderTrouble("the embedding for the header https://example.com/embeddings failed")

    found = errors.without_secrets(trouble, ["sk-0123456789"], ["https://example.com/embeddings"])

    assert str(found) == "the embedding for the header *** failed"


@given(st.text(max_size=300), st.lists(st.text(min_size=4, max_size=30)))
def test_no_words_break_the_mask(words: str, secrets: list[str]) -> None:
    found = str(errors.without_secrets(ProviderTrouble(words), secrets))

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


# --- rest --------------------------------------------------------------------------------------------

PASSING = ProviderTrouble("busy")
PERMANENT = ProviderTrouble("wrong key", permanent=True)


@pytest.mark.parametrize(
    ("trouble", "failures", "fraction", "seconds"),
    [
        (PASSING, 0, 0.0, 0.2),
        (PASSING, 0, 1.0, 1.2),
        (PASSING, 3, 0.5, 4.2),
        (PASSING, 3, 1.0, 8.2),
        (PASSING, 4, 1.0, 15.2),
        (PASSING, 10**9, 1.0, 15.2),
        (PERMANENT, 0, 0.5, 10.0),
        (PERMANENT, 1, 0.5, 20.0),
        (PERMANENT, 3, 0.5, 60.0),
        (PERMANENT, 10**9, 0.5, 60.0),
        (ProviderTrouble("", retry_after_seconds=0), 5, 0.25, 0.25),
        (ProviderTrouble("", retry_after_seconds=7), 5, 0.25, 7.25),
        (ProviderTrouble("", retry_after_seconds=86_400), 0, 0.0, 3600.0),
        (ProviderTrouble("", retry_after_seconds=float("inf")), 0, 0.0, 3600.0),
    ],
)
def test_a_model_rests_as_asked_or_longer_with_every_failure(
    trouble: ProviderTrouble, failures: int, fraction: float, seconds: float
) -> None:
    assert rest_seconds(trouble, failures, fraction) == pytest.approx(seconds)


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_backoff_is_never_nothing_and_never_long(failures: int, fraction: float) -> None:
    assert 0.2 <= rest_seconds(PASSING, failures, fraction) <= 15.2
    assert 10 <= rest_seconds(PERMANENT, failures, fraction) <= 60


# --- rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sqlstate", "timed_out", "kinds"),
    [
        # Another session has a lock.
        ("55P03", False, {"locked"}),
        ("55006", False, {"locked"}),
        ("55P03", True, {"locked"}),
        # The owner's code ran too long; or somebody cancels, or that code does.
        ("57014", True, {"slow"}),
        ("57014", False, {"cancels"}),
        # Whatever else the owner's code raises is its row's fault: a conflict, a shortage, bad data, made-up states.
        *[
            (sqlstate, timed_out, set())
            for timed_out in (False, True)
            for sqlstate in (
                *("40001", "40P01", "53100", "53200", "55000", "57P01", "57P03", "58030", "58P01", "08006"),
                *("09000", "0A000", "21000", "22003", "22P02", "23502", "23514", "27000", "2F005", "38000", "39000"),
                *("42501", "42883", "44000", "54000", "P0001", "XX000", "20000", "24000", "2D000", "34000", "3F000"),
                *("0Z002", "HV000", "AE001", "U0001"),
            )
        ],
    ],
)
def test_an_error_of_an_owners_code_is_its_rows_fault(sqlstate: str, timed_out: bool, kinds: set[str]) -> None:
    error = errors.row_error(sqlstate, "what it said", timed_out=timed_out)

    assert {name for name in ("locked", "slow", "cancels") if getattr(error, name)} == kinds
    assert error.sqlstate == sqlstate
    slow = "the code of the table's owner ran too long, and was cancelled"
    assert str(error) == (slow if kinds == {"slow"} else "what it said")


@pytest.mark.parametrize(
    ("sqlstate", "nobodys"),
    [
        *[(sqlstate, True) for sqlstate in ("53100", "53200", "53300", "57014", "57P01", "57P02", "57P03", "58030")],
        *[(sqlstate, False) for sqlstate in ("58P01", "40P01", "55P03", "22P02", "42501", "XX000", "08006")],
    ],
)
def test_cancel_shutdown_and_want_of_resources_are_nobodys_fault_where_no_owners_code_runs(
    sqlstate: str, nobodys: bool
) -> None:
    assert errors.is_nobodys(sqlstate) is nobodys


# --- SQL functions that embed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sqlstate",
    ["08006", "08001", "40001", "40P01", "55P03", "53200", "53300", "57P03", "58000", "58030"],
)
def test_what_passes_by_itself_in_an_embedding_function_is_the_models_trouble(sqlstate: str) -> None:
    trouble = errors.trouble_of_function(errors.row_error(sqlstate, "in the way"), 1.5)

    assert isinstance(trouble, ProviderTrouble)
    assert (trouble.permanent, str(trouble)) == (False, "in the way")


@pytest.mark.parametrize("timed_out", [False, True])
@pytest.mark.parametrize(
    "sqlstate", ["22023", "22P02", "38000", "42501", "42883", "57P01", "58P01", "P0001", "XX000", "ZZ999"]
)
def test_whatever_else_an_embedding_function_raises_is_a_refusal_of_its_texts(sqlstate: str, timed_out: bool) -> None:
    trouble = errors.trouble_of_function(errors.row_error(sqlstate, "bad words", timed_out=timed_out), 1.5)

    assert isinstance(trouble, Refused)
    assert str(trouble) == "bad words"


def test_an_embedding_function_that_runs_too_long_is_the_models_trouble() -> None:
    trouble = errors.trouble_of_function(errors.row_error("57014", "canceling statement", timed_out=True), 1.5)

    assert isinstance(trouble, errors.RanTooLong)
    words = "the function was cancelled after 1.5 s; timeout_seconds of its model allows more"
    assert (trouble.permanent, str(trouble)) == (False, words)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (trouble_of_answer(401, {}, b""), "Give the key"),
        (trouble_of_answer(403, {}, b""), "give it the right"),
        (trouble_of_answer(404, {}, b""), "Compare the address"),
        (trouble_of_answer(429, {}, b""), "Nothing: lanes wait"),
        (trouble_of_answer(503, {}, b""), "page of outages"),
        (ProviderTrouble("no answer within 30 s"), "the port, the firewall"),
        (OverBudget("spent"), "when the day is over"),
        (trouble_of_answer(400, {}, b""), "Correct its definition"),
        (ProviderTrouble("no key", permanent=True), "Correct its definition"),
    ],
)
def test_the_advice_fits_the_trouble(trouble: Trouble, words: str) -> None:
    assert words in advice_for(trouble)
