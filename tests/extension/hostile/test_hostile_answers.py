"""An answer takes bounded memory and time, whatever is in it, and counts no more than it can have used."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from extension.hostile.raw_api import BOMBS, COUNTS, ENDLESS, LONG_HEADERS
from extension.hostile.tenants import ENABLE_COLUMNS, NOTES, Tenant, peak_megabytes, stays_fresh, waiting_of
from harness import Connection
from lanes import Lane
from waiting import wait_until

MakeModel = Callable[..., None]
# The most memory of a session that reads an answer, shared memory included; an answer may have 64 MB.
MOST_MEGABYTES = 400
# The longest time to read an answer that has come, on a busy machine.
READ_SECONDS = 5.0


def attach(mallory: Tenant, model: str) -> None:
    mallory.run(NOTES, ENABLE_COLUMNS.replace("'{content}'", f"'{{content}}', model => '{model}'"))
    mallory.run("INSERT INTO notes VALUES (1, 'a note')")


@pytest.mark.parametrize("case", BOMBS)
def test_an_answer_that_unpacks_without_end_takes_little_memory(
    connect: Callable[..., Connection], db: Connection, raw_model: MakeModel, case: str
) -> None:
    raw_model("packed", f"bomb/{case}")

    with connect() as caller:
        with pytest.raises(psycopg.Error, match="gave no embedding"):
            caller.execute("SELECT autoembed.embed('a question', 'packed')")

        assert peak_megabytes(db, caller.info.backend_pid) < MOST_MEGABYTES


@pytest.mark.parametrize("case", LONG_HEADERS)
def test_a_long_header_takes_no_time(db: Connection, raw_model: MakeModel, case: str) -> None:
    raw_model("long", f"header/{case}")
    began_at = time.monotonic()

    try:
        assert len(db.execute("SELECT autoembed.embed('a question', 'long')").fetchall()) == 1
    except psycopg.Error as error:
        assert "gave no embedding" in str(error)

    assert time.monotonic() - began_at < READ_SECONDS


@pytest.mark.parametrize("case", ENDLESS)
def test_an_answer_without_end_ends_at_the_timeout(
    db: Connection, mallory: Tenant, raw_model: MakeModel, case: str
) -> None:
    raw_model("endless", f"endless/{case}")
    attach(mallory, "endless")
    db.execute("SET statement_timeout = '15s'")

    row = db.execute("SELECT * FROM autoembed.process(timeout_milliseconds => 1000)").fetchone()

    assert row is not None
    assert (row.completed, row.retried, row.failed) == (0, 1, 0)
    assert "1 s" in row.failed_jobs[0]["error"]


@pytest.mark.parametrize("case", ["header", "continue", "body"])
def test_an_answer_without_end_holds_up_no_other_tenant(
    mallory: Tenant, bob: Tenant, raw_model: MakeModel, lane: Lane, case: str
) -> None:
    raw_model("endless", f"endless/{case}")
    attach(mallory, "endless")

    for _ in range(3):
        stays_fresh(bob)

    assert lane.error is None


@pytest.mark.parametrize("case", sorted(COUNTS.keys() - {"false", "int4", "int8", "object"}))
def test_a_count_of_tokens_that_is_none_is_estimated(
    db: Connection, mallory: Tenant, bob: Tenant, raw_model: MakeModel, lane: Lane, case: str
) -> None:
    raw_model("counting", f"count/{case}")
    attach(mallory, "counting")

    wait_until(lambda: mallory.session.execute("SELECT embedding IS NOT NULL FROM notes").fetchall() == [(True,)])
    wait_until(lambda: waiting_of(db, mallory) == 0)
    stays_fresh(bob)

    assert lane.error is None
    used: Any = db.execute("SELECT sum(tokens) AS tokens FROM autoembed.usage WHERE model = 'counting'").fetchone()
    assert 0 < used.tokens < 10


@pytest.mark.parametrize("case", ["negative", "true", "false"])
def test_a_count_of_tokens_that_is_none_gives_no_budget_back(
    db: Connection, mallory: Tenant, raw_model: MakeModel, case: str
) -> None:
    raw_model("counting", f"count/{case}", daily_token_budget=1)
    attach(mallory, "counting")

    db.execute("SELECT autoembed.process()")

    with pytest.raises(psycopg.Error, match="budget"):
        db.execute("SELECT autoembed.embed('a question', 'counting')")
