"""A pipeline that cannot be embedded says why, and its rows wait until that is mended."""

from __future__ import annotations

import pytest

from extension.pipelines.documents import COLUMNS, assert_fresh, attach, embed, queued, send_all, vectors
from fake_api import FakeApi
from harness import Connection, warnings_of

# The objects that a condition uses, besides columns: how each goes, and comes back.
HELPERS = """
CREATE SCHEMA helpers;
CREATE FUNCTION helpers.odd(n int) RETURNS boolean LANGUAGE sql RETURN n % 2 = 1;
CREATE OPERATOR helpers.%% (FUNCTION = helpers.odd, RIGHTARG = int);
CREATE TYPE helpers.colour AS ENUM ('one', 'two', 'three');
CREATE COLLATION helpers.plain (LOCALE = 'C');
"""
ODD = "helpers.odd(id)"
GOING: dict[str, tuple[str, str, str]] = {
    "a function, renamed": (
        ODD,
        "ALTER FUNCTION helpers.odd RENAME TO uneven",
        "ALTER FUNCTION helpers.uneven RENAME TO odd",
    ),
    "a function, moved": (
        ODD,
        "ALTER FUNCTION helpers.odd SET SCHEMA public",
        "ALTER FUNCTION public.odd SET SCHEMA helpers",
    ),
    "a function, dropped": (
        ODD,
        "DROP FUNCTION helpers.odd CASCADE",
        "CREATE FUNCTION helpers.odd(n int) RETURNS boolean LANGUAGE sql RETURN n % 2 = 1",
    ),
    "a function, another of its name in its place": (
        ODD,
        "DROP FUNCTION helpers.odd CASCADE;"
        "CREATE FUNCTION helpers.odd(t text) RETURNS boolean LANGUAGE sql RETURN true",
        "CREATE FUNCTION helpers.odd(n int) RETURNS boolean LANGUAGE sql RETURN n % 2 = 1",
    ),
    "its schema, renamed": (ODD, "ALTER SCHEMA helpers RENAME TO tools", "ALTER SCHEMA tools RENAME TO helpers"),
    "its schema, dropped": (ODD, "DROP SCHEMA helpers CASCADE", HELPERS),
    "an operator": (
        "OPERATOR(helpers.%%) id",
        "DROP OPERATOR helpers.%% (NONE, int)",
        "CREATE OPERATOR helpers.%% (FUNCTION = helpers.odd, RIGHTARG = int)",
    ),
    "a type": (
        "title::helpers.colour <> 'two'",
        "ALTER TYPE helpers.colour RENAME TO color",
        "ALTER TYPE helpers.color RENAME TO colour",
    ),
    "a collation": (
        "title COLLATE helpers.plain <> 'two'",
        "DROP COLLATION helpers.plain",
        "CREATE COLLATION helpers.plain (LOCALE = 'C')",
    ),
}


def enable_odd(db: Connection, condition: str) -> None:
    db.execute(HELPERS)
    db.execute(
        "SELECT autoembed.enable('documents', 'embedding', content_columns => '{content}', condition => %s)",
        [condition],
    )
    embed(db)


def state(db: Connection) -> tuple[str, str | None, str | None]:
    [row] = db.execute("SELECT state, reason, hint FROM autoembed.status").fetchall()
    return row.state, row.reason, row.hint


@pytest.mark.parametrize("going", GOING)
@pytest.mark.parametrize("mended", ["it comes back", "the condition is given again"])
def test_what_a_condition_uses_may_go_and_its_rows_wait_until_that_is_mended(
    db: Connection, going: str, mended: str
) -> None:
    condition, goes, comes_back = GOING[going]
    enable_odd(db, condition)
    assert vectors(db) == {1: True, 2: False, 3: True}

    db.execute(goes)
    db.execute("UPDATE documents SET content = 'new'; INSERT INTO documents VALUES (5, 'three', 'c5')")
    with warnings_of(db) as warnings:
        report = db.execute("SELECT read, failed FROM autoembed.process()").fetchone()
    assert report == (0, 0)
    assert queued(db) == [[1], [2], [3], [5]]
    stopped, reason, hint = state(db)
    assert stopped == "stopped"
    assert reason is not None and "the condition on table app.documents uses" in reason and " helpers." in reason
    assert hint is not None and "autoembed.alter_pipeline('app.documents', condition => ...)" in hint
    assert any(reason in warning and hint in warning for warning in warnings)
    finding = "SELECT ok, finding, advice FROM autoembed.doctor() WHERE subject = 'table app.documents.embedding'"
    assert db.execute(finding).fetchone() == (False, reason, hint)
    # Nothing else of the pipeline is refused meanwhile.
    db.execute("ALTER TABLE documents RENAME content TO body; UPDATE documents SET body = body || '!' WHERE id = 1")
    db.execute("SELECT autoembed.alter_pipeline('documents', on_change => 'clear'), autoembed.resync('documents')")

    if mended == "it comes back":
        db.execute(comes_back)
    else:
        db.execute("SELECT autoembed.alter_pipeline('documents', condition => 'id <> 2')")
    embed(db)
    assert vectors(db) == {1: True, 2: False, 3: True, 5: True}
    assert state(db) == ("idle", None, None)


def test_a_type_that_a_conditions_function_takes_may_be_renamed(db: Connection) -> None:
    db.execute(HELPERS)
    db.execute("CREATE FUNCTION warm(c helpers.colour) RETURNS boolean LANGUAGE sql RETURN c::text <> 'two'")
    db.execute("ALTER TABLE documents ADD colour helpers.colour; UPDATE documents SET colour = title::helpers.colour")
    attach(db, "content_columns => '{content}', condition => 'warm(colour)'")

    db.execute("ALTER TYPE helpers.colour RENAME TO color; UPDATE documents SET content = 'new'")
    embed(db)

    assert state(db) == ("idle", None, None)
    assert_fresh(db, "CASE WHEN id <> 2 THEN content END")


# Faults that stop a pipeline, whose tables may be altered all the same.
HELD_UP = {
    "dimensions that do not fit": (COLUMNS, "ALTER TABLE documents ALTER embedding TYPE halfvec(3) USING NULL"),
    "a type that is none of vectors": (COLUMNS, "ALTER TABLE documents ALTER embedding TYPE text USING NULL"),
    "a content function that is gone": ("content_function => 'text_of'", "DROP FUNCTION text_of"),
    "a condition's function that is gone": (
        f"{COLUMNS}, condition => 'helpers.odd(id)'",
        "DROP FUNCTION helpers.odd CASCADE",
    ),
    "a column that must not be NULL": (
        f"{COLUMNS}, on_change => 'clear'",
        "ALTER TABLE documents ALTER embedding SET NOT NULL",
    ),
}


@pytest.mark.parametrize("held_up", HELD_UP)
def test_a_rename_refuses_no_row_whatever_keeps_its_table_from_being_embedded(db: Connection, held_up: str) -> None:
    arguments, holds_up = HELD_UP[held_up]
    db.execute(HELPERS)
    attach(db, arguments)
    db.execute(holds_up)

    db.execute("ALTER TABLE documents RENAME id TO number; ALTER TABLE documents RENAME content TO body")
    if "NULL" not in held_up:
        db.execute("UPDATE documents SET body = 'new'; INSERT INTO documents VALUES (4, 'four', 'c4')")
    db.execute("DELETE FROM documents WHERE number = 2")

    assert [2] in queued(db)
    assert state(db)[0] == "stopped"


FORCED = {
    "none at all": ("", False),
    "one that hides rows": ("CREATE POLICY few ON documents USING (id < 3)", False),
    "one that hides rows by a setting": (
        "CREATE POLICY tenant ON documents USING (note = current_setting('x'))",
        False,
    ),
    "one that lets all be seen, but not written": ("CREATE POLICY seen ON documents FOR SELECT USING (true)", False),
    "another's": ("CREATE POLICY others ON documents TO enable_other USING (true)", False),
    "a restrictive one beside": (
        "CREATE POLICY every ON documents USING (true); CREATE POLICY few ON documents AS RESTRICTIVE USING (id < 3)",
        False,
    ),
    "one that hides nothing": ("CREATE POLICY every ON documents USING (true)", True),
    "one for a group of the owner's": ("CREATE POLICY every ON documents TO enable_group USING (true)", True),
    "a restrictive one for others beside": (
        "CREATE POLICY every ON documents TO enable_owner USING (true);"
        "CREATE POLICY few ON documents AS RESTRICTIVE TO enable_other USING (id < 3)",
        True,
    ),
}


@pytest.mark.parametrize("policies", FORCED)
def test_policies_that_may_hide_rows_from_their_owner_are_reported_and_leave_none_out(
    db: Connection, policies: str
) -> None:
    statements, sound = FORCED[policies]
    db.execute("CREATE ROLE enable_group; CREATE ROLE enable_other; CREATE ROLE enable_owner IN ROLE enable_group")
    db.execute("GRANT ALL ON SCHEMA app TO enable_owner; ALTER TABLE documents OWNER TO enable_owner")
    attach(db)
    db.execute("ALTER TABLE documents ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    db.execute(f"{statements}; UPDATE documents SET content = 'new'")

    if not sound:
        assert db.execute("SELECT read FROM autoembed.process()").fetchone() == (0,)
        assert queued(db) == [[1], [2], [3]]
        problem = "row level security is forced on the owner of table app.documents and may hide rows from the owner"
        stopped, reason, hint = state(db)
        assert (stopped, reason) == ("stopped", problem)
        assert hint is not None and "CREATE POLICY embeddings ON app.documents TO enable_owner USING (true)" in hint
        finding = "SELECT finding, advice FROM autoembed.doctor() WHERE NOT ok AND subject ~ '^table'"
        assert db.execute(finding).fetchall() == [(problem, hint)]
        db.execute("ALTER TABLE documents NO FORCE ROW LEVEL SECURITY")

    embed(db)
    assert_fresh(db)


def test_a_content_function_that_is_dropped_stops_its_pipeline_until_it_is_there_again(
    db: Connection, api: FakeApi
) -> None:
    attach(db, "content_function => 'text_of'")
    db.execute("DROP FUNCTION text_of")

    db.execute("UPDATE documents SET content = 'new' WHERE id = 1; INSERT INTO documents VALUES (4, 'four', 'c4')")
    with warnings_of(db) as warnings:
        assert db.execute("SELECT read, failed FROM autoembed.process()").fetchone() == (0, 0)
    assert any('there is no function "text_of" of one row of app.documents' in warning for warning in warnings)

    db.execute(
        "CREATE FUNCTION text_of(d documents) RETURNS text LANGUAGE sql AS 'SELECT d.title || '': '' || d.content'"
    )
    assert send_all(db, api) == ["four: c4", "one: new"]
    assert_fresh(db, "title || ': ' || content")
