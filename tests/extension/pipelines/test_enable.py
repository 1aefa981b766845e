"""A table is attach, changed, paused and detached."""

from __future__ import annotations

import psycopg
import pytest

from extension.pipelines.documents import (
    BOTH,
    COLUMNS,
    assert_fresh,
    attach,
    embed,
    enable,
    queued,
    send_all,
    traces,
    vectors,
)
from fake_api import FakeApi
from harness import Connection, warnings_of


@pytest.mark.parametrize("drop_column", [False, True])
@pytest.mark.parametrize(
    "arguments", [COLUMNS, "content_function => 'text_of', condition => 'published', on_change => 'clear'"]
)
def test_disable_leaves_nothing_but_the_vectors(db: Connection, arguments: str, drop_column: bool) -> None:
    attach(db, arguments)
    db.execute("UPDATE documents SET content = 'new' WHERE id = 1; SELECT autoembed.resync('documents')")
    assert {trace.kind for trace in traces(db)} >= {"function", "trigger", "job", "pipeline", "backfill", "embedded"}

    db.execute("SELECT autoembed.disable('documents', drop => %s)", [drop_column])

    assert traces(db) == []
    db.execute("UPDATE documents SET content = 'newer'; DELETE FROM documents WHERE id = 2")
    if drop_column:
        with pytest.raises(psycopg.errors.UndefinedColumn), db.transaction():
            vectors(db)
    else:
        assert vectors(db)[3]
    attach(db, arguments)
    assert set(vectors(db).values()) == {True}


def test_what_was_enabled_is_gone_when_the_transaction_is_rolled_back(db: Connection) -> None:
    with db.transaction(force_rollback=True):
        attach(db)

    assert traces(db) == []


def test_a_paused_table_goes_on_where_it_stood(db: Connection, api: FakeApi) -> None:
    enable(db)
    db.execute("SELECT autoembed.pause('documents')")
    assert process_while_paused(db, api) == []

    db.execute("UPDATE documents SET content = 'new' WHERE id = 1; INSERT INTO documents VALUES (4, 'four', 'c4')")
    assert process_while_paused(db, api) == []
    assert queued(db) == [[1], [4]]

    db.execute("SELECT autoembed.resume('documents')")
    embed(db)
    assert len(api.texts()) == 4
    assert_fresh(db)


def process_while_paused(db: Connection, api: FakeApi) -> list[str]:
    assert db.execute("SELECT read, retried, failed FROM autoembed.process()").fetchone() == (0, 0, 0)
    return api.texts()


ALTERATIONS = {
    "content_columns => '{title}'": (["three", "two"], "CASE WHEN published THEN title END"),
    "content_columns => '{title,content}'": ([], "CASE WHEN published THEN concat_ws(E'\\n\\n', title, content) END"),
    r"content_template => '{title}\n\n{content}'": (
        ["one\n\n"],
        r"CASE WHEN published THEN concat(title, E'\n\n', content) END",
    ),
    "content_function => 'text_of'": (
        ["three: c3", "two: c2"],
        "CASE WHEN published THEN title || ': ' || content END",
    ),
    "condition => 'true'": (["four\n\nc4"], BOTH),
    "condition => ''": (["four\n\nc4"], BOTH),
    "condition => 'id > 1'": (["four\n\nc4"], f"CASE WHEN id > 1 THEN {BOTH} END"),
    "condition => 'published IS TRUE'": ([], f"CASE WHEN published THEN {BOTH} END"),
    "on_change => 'clear'": ([], f"CASE WHEN published THEN {BOTH} END"),
    "truncate => false": ([], f"CASE WHEN published THEN {BOTH} END"),
    "model => ''": ([], f"CASE WHEN published THEN {BOTH} END"),
    "content_columns => '{title}', condition => 'id = 4'": (["four"], "CASE WHEN id = 4 THEN title END"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_alteration_sends_exactly_the_rows_to_which_it_makes_a_difference(
    db: Connection, api: FakeApi, alteration: str
) -> None:
    """One row has no content, so that some forms give it the same text; one is not published."""
    db.execute(
        "UPDATE documents SET content = NULL WHERE id = 1; INSERT INTO documents VALUES (4, 'four', 'c4', false)"
    )
    attach(db, f"{COLUMNS}, condition => 'published'")
    texts, text = ALTERATIONS[alteration]

    db.execute(f"SELECT autoembed.alter_pipeline('documents', {alteration})")

    assert send_all(db, api) == texts
    assert_fresh(db, text)
    db.execute("UPDATE documents SET title = upper(title)")
    embed(db)
    assert_fresh(db, text)


def test_another_model_embeds_all_rows_anew(db: Connection, api: FakeApi) -> None:
    attach(db)
    db.execute("SELECT autoembed.alter_pipeline('documents', model => 'large')")
    assert len(send_all(db, api)) == 3
    assert_fresh(db, model="text-embedding-3-large")

    with warnings_of(db) as warnings:
        db.execute("SELECT autoembed.alter_pipeline('documents', model => 'small')")
    [warning] = warnings
    assert 'has 1536 dimensions, model "small" has 256' in warning
    assert db.execute("SELECT read FROM autoembed.process()").fetchone() == (0,)
    assert set(vectors(db).values()) == {True}

    db.execute("SELECT autoembed.alter_pipeline('documents', model => '')")
    assert len(send_all(db, api)) == 3
    assert_fresh(db)


def test_reembed_sends_all_rows_or_those_that_a_condition_holds_for(db: Connection, api: FakeApi) -> None:
    attach(db, f"{COLUMNS}, condition => 'published'")
    db.execute("SELECT autoembed.reembed('documents')")
    assert len(send_all(db, api)) == 3
    db.execute("SELECT autoembed.reembed('documents', condition => 'title < ''p''')")
    assert send_all(db, api) == ["one\n\nc1"]
    db.execute("UPDATE documents SET published = false WHERE id = 1")
    db.execute("SELECT autoembed.reembed('documents', 'embedding', 'id <= 2')")
    assert send_all(db, api) == ["two\n\nc2"]

    # Two one after the other: neither is forgotten.
    db.execute("SELECT autoembed.reembed('documents', condition => 'id = 2')")
    db.execute("SELECT autoembed.reembed('documents', condition => 'id = 3')")
    assert set(send_all(db, api)) >= {"two\n\nc2", "three\n\nc3"}


WITHOUT_TRIGGERS = {
    "disabled triggers": ("ALTER TABLE documents DISABLE TRIGGER USER", "ALTER TABLE documents ENABLE TRIGGER USER"),
    "replica": ("SET LOCAL session_replication_role = replica", "SET LOCAL session_replication_role = origin"),
}


@pytest.mark.parametrize("how", WITHOUT_TRIGGERS)
def test_resync_finds_what_no_trigger_saw_and_sends_nothing_else(db: Connection, api: FakeApi, how: str) -> None:
    attach(db)
    off, on = WITHOUT_TRIGGERS[how]
    db.execute(off)
    db.execute("UPDATE documents SET content = 'new' WHERE id = 1; INSERT INTO documents VALUES (4, 'four', 'c4')")
    db.execute("UPDATE documents SET embedding = NULL WHERE id = 2; UPDATE documents SET note = 'seen'")
    db.execute(on)
    assert queued(db) == []

    db.execute("SELECT autoembed.resync('documents')")

    assert send_all(db, api) == ["four\n\nc4", "one\n\nnew", "two\n\nc2"]
    assert_fresh(db)
    db.execute("SELECT autoembed.resync('documents')")
    assert send_all(db, api) == []


def test_resync_after_the_digests_are_lost_embeds_all(db: Connection, api: FakeApi) -> None:
    attach(db)
    db.execute("TRUNCATE autoembed.embedded")
    db.execute("SELECT autoembed.resync('documents')")

    assert len(send_all(db, api)) == 3


def test_an_option_that_is_null_is_as_if_it_were_not_given(db: Connection) -> None:
    nulls = ("model", "condition", "truncate", "create_index", "replicated", "if_not_exists")
    enable(db, ", ".join([COLUMNS, *(f"{name} => NULL" for name in nulls)]))
    embed(db)

    assert_fresh(db)


def test_if_not_exists_leaves_what_is_there_as_it_is(db: Connection, api: FakeApi) -> None:
    attach(db)
    with warnings_of(db) as notices:
        enable(db, "content_columns => '{title}', if_not_exists => true")

    assert notices == ["app.documents.embedding is already attached, skipping"]
    assert send_all(db, api) == []
    enable(db, "content_columns => '{title}', if_not_exists => true", column="other")
    assert len(send_all(db, api)) == 3
