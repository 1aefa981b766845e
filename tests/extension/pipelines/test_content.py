"""The text of a row: columns, a template or a function, for the rows that a condition chooses."""

from __future__ import annotations

import pytest

from extension.pipelines.documents import (
    COLUMNS,
    FORMS,
    assert_fresh,
    attach,
    embed,
    enable,
    queued,
    send_all,
    vectors,
)
from fake_api import FakeApi
from harness import Connection, waiting


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_content_gives_its_text_before_and_after_a_change(db: Connection, form: str) -> None:
    arguments, text = FORMS[form]
    db.execute("CREATE FUNCTION \"Text von\"(documents) RETURNS varchar(9) LANGUAGE sql AS 'SELECT upper($1.title)'")
    db.execute("INSERT INTO documents (id, title, content) VALUES (4, 'four', NULL), (5, NULL, 'c5'), (6, NULL, NULL)")
    attach(db, arguments)
    assert_fresh(db, text)

    db.execute("UPDATE documents SET title = content, content = title")
    embed(db)
    assert_fresh(db, text)


def test_a_row_that_failed_before_its_tables_truncation_is_read_stays_known(db: Connection, api: FakeApi) -> None:
    """The newest messages are claimed before older ones."""
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    attach(db)
    db.execute("UPDATE documents SET content = 'poison' WHERE id = 1")
    db.execute("SELECT autoembed.process(); TRUNCATE documents")
    db.execute("UPDATE pgmq.q_embedding_jobs SET vt = 'infinity'; INSERT INTO documents VALUES (5, 'poison', 'poison')")
    db.execute("SELECT autoembed.process(); UPDATE pgmq.q_embedding_jobs SET vt = '-infinity'")
    assert db.execute("SELECT key FROM autoembed.failed ORDER BY key").fetchall() == [("[1]",), ("[5]",)]

    for _ in range(2):
        db.execute("SELECT autoembed.process()")

    assert waiting(db) == 0
    assert db.execute("SELECT key FROM autoembed.failed").fetchall() == [("[5]",)]


def test_a_blank_text_has_no_embedding(db: Connection, api: FakeApi) -> None:
    attach(db, "content_columns => '{content}'")

    db.execute("UPDATE documents SET content = (ARRAY['', E' \\n\\t', NULL])[id]")

    assert send_all(db, api) == []
    assert vectors(db) == {1: False, 2: False, 3: False}


def test_the_condition_says_which_rows_have_an_embedding_at_all(db: Connection, api: FakeApi) -> None:
    db.execute("UPDATE documents SET archived = true WHERE id = 1; UPDATE documents SET published = NULL WHERE id = 2")
    attach(db, f"{COLUMNS}, condition => 'published and not archived'")
    assert vectors(db) == {1: False, 2: False, 3: True}

    db.execute("UPDATE documents SET archived = false")
    assert queued(db) == [[1]]
    assert send_all(db, api) == ["one\n\nc1"]
    assert vectors(db) == {1: True, 2: False, 3: True}

    db.execute("UPDATE documents SET published = false")
    assert queued(db) == [[1], [3]]
    assert send_all(db, api) == []
    assert vectors(db) == {1: False, 2: False, 3: False}

    db.execute("UPDATE documents SET title = 'unseen'; INSERT INTO documents VALUES (4, 'unseen', '', false)")
    assert queued(db) == []
    db.execute("INSERT INTO documents (id, title) VALUES (5, 'seen'), (6, 'seen too')")
    assert queued(db) == [[5], [6]]


@pytest.mark.parametrize(
    "condition",
    [
        "title <> 'two' AND length(content) BETWEEN 1 AND 10",
        "title = ANY (ARRAY['one', 'three']::varchar[])",
        "title ~ '^(one|three)$' -- and a comment",
        "CASE WHEN id = 2 THEN false ELSE true END",
        "odd(id)",
        "(id, title) IS DISTINCT FROM (2, 'two')",
    ],
)
def test_a_condition_may_be_any_expression_of_a_rows_columns(db: Connection, condition: str) -> None:
    db.execute("CREATE FUNCTION odd(n int) RETURNS boolean LANGUAGE sql RETURN n % 2 = 1")
    db.execute(
        "SELECT autoembed.enable('documents', 'embedding', content_columns => '{title}', condition => %s)", [condition]
    )
    embed(db)
    assert vectors(db) == {1: True, 2: False, 3: True}

    db.execute("UPDATE documents SET title = title")
    assert queued(db) == []


def test_partitions_that_come_and_go_are_followed(db: Connection, api: FakeApi) -> None:
    db.execute("""
        CREATE TABLE parts (id int PRIMARY KEY, title text) PARTITION BY RANGE (id);
        CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (10);
        CREATE TABLE high (title text, embedding halfvec(1536), gone int, id int NOT NULL);
        ALTER TABLE high DROP gone;
        INSERT INTO parts VALUES (1, 'one');
        INSERT INTO high VALUES ('eleven', NULL, 11), ('twelve', NULL, 12);
    """)
    enable(db, "content_columns => '{title}'", "parts")
    embed(db)

    db.execute("ALTER TABLE parts ATTACH PARTITION high FOR VALUES FROM (10) TO (20)")
    assert send_all(db, api) == ["eleven", "twelve"]
    db.execute("UPDATE high SET title = 'new' WHERE id = 11; INSERT INTO parts VALUES (13, 'thirteen')")
    db.execute(
        "CREATE TABLE higher PARTITION OF parts FOR VALUES FROM (20) TO (30);"
        "INSERT INTO higher VALUES (21, 'twenty-one')"
    )
    assert queued(db) == [[11], [13], [21]]
    embed(db)
    assert_fresh(db, "title", "parts")

    db.execute("ALTER TABLE parts DETACH PARTITION high")
    db.execute("UPDATE high SET title = 'unseen'; INSERT INTO high (id, title) VALUES (14, 'unseen')")
    assert send_all(db, api) == []
    db.execute("UPDATE parts SET title = 'seen' WHERE id = 1")
    assert send_all(db, api) == ["seen"]


def test_a_deferrable_primary_key_is_a_key(db: Connection) -> None:
    db.execute("CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, content text)")
    db.execute("INSERT INTO deferred VALUES (1, 'one')")
    enable(db, "content_columns => '{content}'", "deferred")
    db.execute("UPDATE deferred SET content = 'new', id = 2; SET CONSTRAINTS ALL IMMEDIATE")
    embed(db)

    assert_fresh(db, "content", "deferred")


def test_rows_of_tables_that_inherit_are_none_of_the_table(db: Connection, api: FakeApi) -> None:
    db.execute("ALTER TABLE documents ADD embedding halfvec(1536)")
    db.execute("CREATE TABLE special () INHERITS (documents); INSERT INTO special VALUES (1, 'child', 'c1')")
    attach(db)

    assert len(api.texts()) == 3
    assert_fresh(db, table="ONLY documents")
    assert db.execute("SELECT embedding FROM special").fetchall() == [(None,)]


def test_a_temporary_table_of_the_same_name_is_not_in_the_way_of_a_condition(db: Connection) -> None:
    db.execute("CREATE TEMP TABLE documents (x int)")
    db.execute(
        "SELECT autoembed.enable('app.documents', 'embedding', content_columns => '{title}', condition => 'published')"
    )
    assert db.execute("SELECT count(*) FROM pg_temp.documents").fetchone() == (0,)
    embed(db)

    assert_fresh(db, "title", "app.documents")
