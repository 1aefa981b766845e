"""Reading texts is bounded, counted before it begins, and whatever an owner's code raises is its rows' alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from extension.hostile.tenants import (
    ENABLE_COLUMNS,
    ENABLE_FUNCTION,
    NOTES,
    Tenant,
    content_function,
    failures_of,
    has_vector_of,
    make_due,
    peak_megabytes,
    stays_fresh,
    trigger,
)
from harness import Connection, Server
from lanes import Lane
from waiting import wait_until

# The most memory of a lane, shared memory included; one that reads all texts of a claim at once takes 1.6 GB.
MOST_MEGABYTES = 800
# 64 rows have 128 MB of it; on disk it is some megabytes.
LARGE = "repeat('a large text ', 150000)"
LARGE_TABLES = {
    "a column": f"{NOTES}; {ENABLE_COLUMNS}; INSERT INTO notes SELECT n, {LARGE} FROM generate_series(1, 64) AS n",
    "a template, looked through": f"""
        {NOTES};
        INSERT INTO notes SELECT n, repeat('a large text ', 9400) FROM generate_series(1, 64) AS n;
        SELECT autoembed.enable('notes', 'embedding', content_template => '{"{content} " * 16}')""",
    "a content function": f"""
        {NOTES};
        CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql AS $$SELECT {LARGE}$$;
        {ENABLE_FUNCTION};
        INSERT INTO notes SELECT n, 'small' FROM generate_series(1, 64) AS n""",
}


@pytest.mark.parametrize("table", LARGE_TABLES)
def test_texts_are_read_by_their_size(db: Connection, mallory: Tenant, lane: Lane, table: str) -> None:
    mallory.run(LARGE_TABLES[table])

    embedded = f"SELECT count(*) FROM {mallory.name}.notes WHERE embedding IS NOT NULL"
    wait_until(lambda: db.execute(embedded).fetchone() == (64,), 180)

    assert lane.error is None
    assert peak_megabytes(db, lane.pid) < MOST_MEGABYTES


# One character more than 64 MB.
TOO_LARGE = {
    "a column": f"{NOTES}; {ENABLE_COLUMNS}; INSERT INTO notes VALUES (1, repeat('x', 67108865)), (2, 'two')",
    "a content function": f"""
        {NOTES};
        CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE plpgsql AS
            $$BEGIN RETURN CASE n.id WHEN 1 THEN repeat('x', 67108865) ELSE n.content END; END$$;
        {ENABLE_FUNCTION};
        INSERT INTO notes VALUES (1, 'one'), (2, 'two')""",
    "characters of two bytes": f"""
        {NOTES}; {ENABLE_COLUMNS}; INSERT INTO notes VALUES (1, repeat('é', 33554433)), (2, 'two')""",
    "much more": f"""
        {NOTES};
        CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE plpgsql AS
            $$BEGIN RETURN CASE n.id WHEN 1 THEN repeat('x', 150000000) ELSE n.content END; END$$;
        {ENABLE_FUNCTION};
        INSERT INTO notes VALUES (1, 'one'), (2, 'two')""",
}


@pytest.mark.parametrize("table", TOO_LARGE)
def test_a_text_that_is_too_large_fails_with_the_reason(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, table: str
) -> None:
    mallory.run(TOO_LARGE[table])

    wait_until(lambda: failures_of(db, mallory).keys() == {"[1]"}, 120)
    wait_until(lambda: has_vector_of(db, f"{mallory.name}.notes", 2, "two"))
    stays_fresh(bob)

    # A machine with much else to do cancels a function before it has given so long a text.
    assert re.search("64 M|ran too long", failures_of(db, mallory)["[1]"])
    assert lane.error is None


def test_a_try_is_counted_before_texts_are_read(db: Connection, mallory: Tenant, lane: Lane) -> None:
    mallory.run(
        NOTES,
        content_function("PERFORM pg_sleep(0.7);"),
        ENABLE_FUNCTION,
        "INSERT INTO notes VALUES (1, 'a note')",
    )
    reads = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
    wait_until(lambda: db.execute(reads, [lane.pid]).fetchall())

    db.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
    lane.join()

    assert db.execute("SELECT read_ct FROM pgmq.q_embedding_jobs").fetchall() == [(1,)]


# Errors that PostgreSQL itself raises when a session is cancelled or the server is in trouble, raised by an owner, from
# where a reader of the error's context does not expect it.
CODES = {
    "query_canceled": "57014",
    "admin_shutdown": "57P01",
    "out_of_memory": "53200",
    "disk_full": "53100",
    "io_error": "58030",
    "undefined_file": "58P01",
}
# The line break hides where the error comes from.
DISGUISES = {
    "raised": """
        CREATE FUNCTION {me}."a
b"() RETURNS text LANGUAGE plpgsql AS
            $$BEGIN RAISE EXCEPTION 'feigned' USING ERRCODE = '{code}'; END$$""",
    "raised again": """
        CREATE FUNCTION {me}."a
b"() RETURNS text LANGUAGE plpgsql AS
            $$BEGIN
                RAISE EXCEPTION 'feigned' USING ERRCODE = '{code}';
            EXCEPTION WHEN SQLSTATE '{code}' THEN
                RAISE;
            END$$""",
}
FEIGNED = '{me}."a\nb"()'
PLACES: dict[str, str] = {
    "content function": f"{NOTES}; {content_function(f'PERFORM {FEIGNED};')}; {ENABLE_FUNCTION}",
    "condition": f"""
        {NOTES};
        CREATE FUNCTION wanted(id int) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RETURN {FEIGNED} IS NOT NULL; END';
        SELECT autoembed.enable('notes', 'embedding', content_columns => '{{content}}', condition => 'wanted(id)')""",
    "trigger": f"{NOTES}; {ENABLE_COLUMNS}; {trigger(f'PERFORM {FEIGNED};')}",
    "check": f"""
        {NOTES}; {ENABLE_COLUMNS};
        ALTER TABLE notes ADD CHECK (embedding IS NULL OR {FEIGNED} IS NOT NULL)""",
}


def feign(mallory: Tenant, place: str, code: str, disguise: str = "raised") -> None:
    mallory.run(
        DISGUISES[disguise].replace("{code}", CODES[code]),
        PLACES[place],
        "INSERT INTO notes VALUES (1, 'a note')",
    )


@pytest.mark.parametrize(
    ("place", "code", "disguise"),
    [
        *((place, "query_canceled", "raised") for place in PLACES),
        ("content function", "query_canceled", "raised again"),
        *(("content function", code, "raised") for code in CODES if code != "query_canceled"),
        *(("trigger", code, "raised") for code in ("admin_shutdown", "out_of_memory")),
    ],
)
def test_an_owners_code_that_feigns_an_error_of_the_server_ends_no_pass(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, place: str, code: str, disguise: str
) -> None:
    feign(mallory, place, code, disguise)

    for _ in range(2):
        stays_fresh(bob)

    assert lane.error is None


@pytest.fixture
def german(server: Server, db: Connection, dbname: str) -> None:
    """Has new sessions of the test's database speak German."""
    command = ["localedef", "--no-archive", "-i", "de_DE", "-f", "UTF-8", "/usr/lib/locale/de_DE.utf8"]
    code, said = server.container.get_wrapped_container().exec_run(command, user="root")
    assert code == 0, said
    db.execute(f"ALTER DATABASE {dbname} SET lc_messages = 'de_DE.utf8'")


def test_a_feigned_cancel_is_known_in_any_language(
    german: None, db: Connection, mallory: Tenant, bob: Tenant, start_lane: Callable[[], Lane]
) -> None:
    mallory.run(
        NOTES,
        content_function("RAISE EXCEPTION 'feigned' USING ERRCODE = 'query_canceled';"),
        ENABLE_FUNCTION,
        "INSERT INTO notes VALUES (1, 'a note')",
    )

    lane = start_lane()
    for _ in range(2):
        stays_fresh(bob)

    assert lane.error is None


@pytest.mark.parametrize(("place", "code"), [("content function", "query_canceled"), ("trigger", "out_of_memory")])
def test_a_row_whose_code_feigns_such_an_error_ends_on_the_failed_list(
    db: Connection, mallory: Tenant, lane: Lane, place: str, code: str
) -> None:
    feign(mallory, place, code)

    def failed() -> bool:
        make_due(db)
        return failures_of(db, mallory) == {"[1]": "feigned"}

    wait_until(failed, 120)

    assert lane.error is None


@pytest.mark.parametrize("on_change", ["keep", "clear"])
def test_no_row_is_refused_in_another_language(german: None, mallory: Tenant, on_change: str) -> None:
    session = mallory.enter()
    assert session.execute("SHOW lc_messages").fetchone() == ("de_DE.utf8",)
    mallory.run(
        NOTES,
        content_function(""),
        ENABLE_FUNCTION,
        f"SELECT autoembed.alter_pipeline('notes', on_change => '{on_change}')",
        "INSERT INTO notes VALUES (1, 'a note')",
    )
    mallory.run(content_function("RAISE EXCEPTION 'feigned' USING ERRCODE = 'query_canceled';"))

    session.execute("UPDATE notes SET content = 'changed'")


# Resources that an owner's code can use up.
USED_UP: dict[str, str] = {
    "the table of locks": "PERFORM pg_advisory_xact_lock(i) FROM generate_series(1, 100000) AS i;",
    "temporary files": """
        SET LOCAL work_mem = '64kB';
        PERFORM max(s.i) FROM (SELECT i FROM generate_series(1, 300000) AS i ORDER BY md5(i::text) OFFSET 1) AS s;""",
    "the stack": "PERFORM {me}.deeper(1);",
    "the length of a text": "PERFORM length(repeat(repeat('x', 1000000), 1100));",
    "the parameters of a statement": "EXECUTE 'SELECT ' || repeat('(', 100000) || '1' || repeat(')', 100000);",
}


@pytest.mark.parametrize("what", USED_UP)
@pytest.mark.parametrize("place", ["content function", "trigger"])
def test_an_owners_code_that_uses_something_up_fails_its_row_alone(
    db: Connection,
    dbname: str,
    mallory: Tenant,
    bob: Tenant,
    connect: Callable[..., Connection],
    place: str,
    what: str,
) -> None:
    act = USED_UP[what]
    db.execute(f"ALTER DATABASE {dbname} SET temp_file_limit = '5MB'")
    mallory.run(
        """CREATE FUNCTION deeper(n int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN {me}.deeper(n + 1); END'""",
        NOTES,
        content_function(act) if place == "content function" else trigger(act),
        ENABLE_FUNCTION if place == "content function" else ENABLE_COLUMNS,
        "INSERT INTO notes VALUES (1, 'a note')",
    )

    # A lane would use up what the test's other sessions need.
    with connect() as caller:
        report: Any = caller.execute("SELECT * FROM autoembed.process()").fetchone()

    assert has_vector_of(db, f"{bob.name}.letters", 1, "a letter")
    assert len(report.failed_jobs) == 1, report
    assert failures_of(db, bob) == {}
