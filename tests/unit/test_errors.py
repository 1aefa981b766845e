"""Which error, and which SQLSTATE, is whose fault and whether it passes: tables of cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed import errors
from autoembed.answers import trouble_of_answer
from autoembed.errors import OverBudget, ProviderTrouble, Refused, Trouble, advice_for, rest_seconds


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
