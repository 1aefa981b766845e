"""Embeddings beside the rows: the table that holds them, and what happens to it when rows and tables change."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection, waiting, warnings_of
from waiting import wait_until

COLUMNS = "chunk_number, chunk_start, chunk_end, embedding::text::halfvec::real[]"


@pytest.fixture
def pages(db: Connection, api: FakeApi) -> Connection:
    """An attached table whose embeddings are beside its rows."""
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text, views int NOT NULL DEFAULT 0)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    return db


def process(db: Connection) -> Any:
    counts = db.execute("SELECT * FROM autoembed.process()").fetchone()
    assert counts is not None
    return counts


def assert_beside(db: Connection, texts: str = "SELECT id, body FROM pages WHERE body <> ''") -> None:
    """Checks that each row has the embedding of its text, that nothing else is there, and that no row waits."""
    expected = dict(db.execute(texts).fetchall())
    found = db.execute("SELECT id, chunk_start, chunk_end, embedding::real[] FROM pages_embeddings").fetchall()
    assert sorted(row[0] for row in found) == sorted(expected)
    for key, start, end, vector in found:
        assert (start, end) == (0, len(expected[key]))
        assert np.allclose(vector, embedding_of(expected[key]), atol=2e-3), expected[key]
    assert waiting(db) == 0


def test_embeddings_are_beside_the_rows_which_are_never_written(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two'), (3, ''), (4, NULL)")
    before = pages.execute("SELECT id, ctid, xmin, xmax FROM pages ORDER BY id").fetchall()

    counts = process(pages)

    assert (counts.completed, counts.failed) == (4, 0)
    assert_beside(pages)
    assert pages.execute("SELECT id, ctid, xmin, xmax FROM pages ORDER BY id").fetchall() == before


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE pages SET body = 'other' WHERE id = 1",
        "UPDATE pages SET body = NULL WHERE id = 1",
        "UPDATE pages SET body = '' WHERE id = 1",
        "UPDATE pages SET id = 9 WHERE id = 1",
        "UPDATE pages SET id = 9, body = 'other' WHERE id = 1",
        "UPDATE pages SET id = CASE id WHEN 1 THEN 3 WHEN 2 THEN 4 ELSE id END, body = body || '!'",
        "DELETE FROM pages WHERE id = 1",
        "DELETE FROM pages",
        "TRUNCATE pages",
        "DELETE FROM pages WHERE id = 1; INSERT INTO pages VALUES (1, 'again')",
        "INSERT INTO pages VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET body = 'merged'",
        "MERGE INTO pages AS p USING (VALUES (1, 'a'), (7, 'b')) AS s(id, body) ON s.id = p.id "
        "WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (s.id, s.body, 0)",
    ],
)
def test_embeddings_follow_every_change_of_the_rows(pages: Connection, change: str) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)

    pages.execute(change)

    # Nothing is left of rows and keys that are gone, in the same transaction.
    gone = "SELECT count(*) FROM pages_embeddings AS e WHERE NOT EXISTS (SELECT FROM pages AS p WHERE p.id = e.id)"
    assert pages.execute(gone).fetchone() == (0,)
    process(pages)
    assert_beside(pages)


@pytest.mark.parametrize(
    "parent",
    [
        "CREATE TABLE books (LIKE pages INCLUDING ALL) PARTITION BY RANGE (id);"
        " ALTER TABLE books ATTACH PARTITION pages FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE books (LIKE pages INCLUDING ALL); ALTER TABLE pages INHERIT books",
    ],
)
def test_writes_to_a_table_that_it_becomes_a_part_of_are_followed(pages: Connection, parent: str) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two'), (3, 'three')")
    process(pages)

    pages.execute(parent.encode())
    pages.execute("DELETE FROM books WHERE id = 1")
    pages.execute("UPDATE books SET body = 'other' WHERE id = 2")
    if "PARTITION" in parent:
        pages.execute("INSERT INTO books VALUES (4, 'four')")
        process(pages)
        pages.execute("INSERT INTO books VALUES (5, 'five')")
        pages.execute("ALTER TABLE books DETACH PARTITION pages")
    pages.execute("INSERT INTO pages VALUES (6, 'six')")
    process(pages)

    assert_beside(pages)


def test_a_table_that_is_partitioned_keeps_its_embeddings(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)
    pages.execute(
        "ALTER TABLE pages RENAME TO first_pages;"
        " CREATE TABLE pages (LIKE first_pages INCLUDING ALL) PARTITION BY RANGE (id);"
        " ALTER TABLE pages ATTACH PARTITION first_pages FOR VALUES FROM (0) TO (10);"
        " CREATE TABLE other_pages PARTITION OF pages DEFAULT"
    )

    with pytest.raises(psycopg.errors.DuplicateTable) as refused:
        pages.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    pages.execute((refused.value.diag.message_hint or "").split("after ")[1].encode())
    pages.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    pages.execute("INSERT INTO pages VALUES (11, 'eleven')")
    process(pages)
    pages.execute("DELETE FROM pages WHERE id = 1")
    pages.execute("UPDATE pages SET id = 12 WHERE id = 2")
    process(pages)

    assert_beside(pages)
    # A row with another key is embedded again.
    assert sorted(api.texts()) == ["eleven", "one", "two", "two"]


def test_what_a_row_had_stays_until_the_new_embedding_is_written(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)

    pages.execute("UPDATE pages SET body = 'two'")

    [(vector,)] = pages.execute("SELECT embedding::real[] FROM pages_embeddings").fetchall()
    assert np.allclose(vector, embedding_of("one"), atol=2e-3)


def test_with_clear_an_embedding_goes_with_its_text(pages: Connection) -> None:
    pages.execute("SELECT autoembed.alter_pipeline('pages', on_change => 'clear')")
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)

    pages.execute("UPDATE pages SET body = 'other', views = 1 WHERE id = 1")
    pages.execute("UPDATE pages SET views = 1 WHERE id = 2")

    assert pages.execute("SELECT id FROM pages_embeddings").fetchall() == [(2,)]
    process(pages)
    assert_beside(pages)


def test_an_unchanged_text_is_not_sent_again(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)
    before = len(api.log())

    pages.execute("UPDATE pages SET views = 1")
    pages.execute("SELECT autoembed.resync('pages')")
    pages.execute("UPDATE pages SET body = 'other' WHERE id = 1; UPDATE pages SET body = 'one' WHERE id = 1")
    process(pages)
    process(pages)

    assert len(api.log()) == before
    assert_beside(pages)


def test_reembed_sends_an_unchanged_text_again(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)
    before = len(api.log())

    pages.execute("SELECT autoembed.reembed('pages')")
    process(pages)
    process(pages)

    assert [text for request in api.log()[before:] for text in request["texts"]] == ["one", "two"]
    assert_beside(pages)


def test_an_embedding_that_is_deleted_unseen_is_made_again_by_resync(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)
    with pages.transaction():
        pages.execute("SET LOCAL session_replication_role = replica")
        pages.execute("DELETE FROM pages_embeddings WHERE id = 1")
    assert pages.execute("SELECT state FROM autoembed.preview('pages', '1')").fetchone() == ("missing",)
    assert pages.execute("SELECT state FROM autoembed.preview('pages', '2')").fetchone() == ("fresh",)

    pages.execute("SELECT autoembed.resync('pages')")
    process(pages)
    process(pages)

    assert_beside(pages)


# What somebody may do to the embeddings of three rows, and the number of texts that are sent again.
WRITES_BESIDE = {
    "TRUNCATE": ("TRUNCATE pages_embeddings", 5),
    "DELETE": ("DELETE FROM pages_embeddings WHERE id < 3", 2),
    # An equal chunk of the row is left.
    "part": ("DELETE FROM pages_embeddings WHERE chunk_number = 2", 0),
    "vector": (
        "UPDATE pages_embeddings AS e SET embedding = o.embedding FROM pages_embeddings AS o"
        " WHERE e.id = 1 AND o.id = 2 AND o.chunk_number = 1",
        1,
    ),
    "digest": ("UPDATE pages_embeddings SET digest = '' WHERE id = 2", 1),
    "key": ("UPDATE pages_embeddings SET id = 9 WHERE id = 2", 1),
    "in a trigger": (
        "CREATE FUNCTION empty() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN DELETE FROM pages_embeddings; RETURN NULL; END';"
        " CREATE TABLE button (); CREATE TRIGGER empty AFTER INSERT ON button EXECUTE FUNCTION empty();"
        " INSERT INTO button DEFAULT VALUES",
        5,
    ),
}
LONG = "\n\n".join(f"Paragraph {n} has some more words in it, so that it is a chunk." for n in range(2))


@pytest.mark.parametrize("written", WRITES_BESIDE)
def test_embeddings_that_somebody_takes_away_or_overwrites_are_made_again(
    pages: Connection, api: FakeApi, written: str
) -> None:
    """If nobody looks at the embeddings table, such rows count as embedded, and no search finds them."""
    statement, texts = WRITES_BESIDE[written]
    pages.execute("SELECT autoembed.alter_pipeline('pages', chunk_size => 20)")
    process(pages)
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two'), (3, %s)", [LONG])
    process(pages)
    embeddings = "SELECT * FROM pages_embeddings ORDER BY id, chunk_number"
    before = pages.execute(embeddings).fetchall()
    assert [row.id for row in before] == [1, 2, 3, 3, 3, 3]

    pages.execute(statement.encode())

    assert pages.execute("SELECT autoembed.wait_until_fresh('pages', 0)").fetchone() == (False,)
    while process(pages).read:
        pass
    assert pages.execute(embeddings).fetchall() == before
    assert pages.execute("SELECT autoembed.wait_until_fresh('pages', 0)").fetchone() == (True,)
    # Equal chunks are sent once.
    assert len(api.texts()) == 5 + texts


@pytest.mark.parametrize("on_change", ["keep", "clear"])
def test_what_lanes_and_the_rows_own_triggers_do_beside_queues_nothing_more(pages: Connection, on_change: str) -> None:
    """If each DELETE beside a row queues it, all changes of rows are queued twice."""
    pages.execute("SELECT autoembed.alter_pipeline('pages', on_change => %s, chunk_size => 20)", [on_change])
    process(pages)
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two'), (3, %s)", [LONG])
    for change, messages in [
        ("UPDATE pages SET body = 'other' WHERE id = 3", 1),
        ("UPDATE pages SET body = '' WHERE id = 3", 1),
        ("UPDATE pages SET id = 4 WHERE id = 1", 1),
        ("DELETE FROM pages WHERE id = 4", 1),
        ("TRUNCATE pages", 1),
    ]:
        process(pages)
        assert waiting(pages) == 0
        pages.execute(change.encode())
        assert waiting(pages) == messages, change
        assert pages.execute("SELECT count(*) FROM autoembed.backfill WHERE scanned_at IS NULL").fetchone() == (0,)


def test_another_column_of_the_embeddings_table_is_its_owners(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)
    pages.execute("ALTER TABLE pages_embeddings ADD COLUMN seen integer")

    pages.execute("UPDATE pages_embeddings SET seen = 1, embedding = embedding")

    assert waiting(pages) == 0


def test_a_trigger_of_the_owner_that_overwrites_each_embedding_costs_ever_fewer_requests(
    pages: Connection, api: FakeApi
) -> None:
    pages.execute(
        "CREATE FUNCTION turn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " UPDATE pages_embeddings SET embedding = (embedding::vector * array_fill(-1, ARRAY[1536])::vector)::halfvec"
        " WHERE id = NEW.id; RETURN NULL; END $$"
    )
    pages.execute(
        "CREATE TRIGGER turn AFTER INSERT OR UPDATE ON pages_embeddings FOR EACH ROW"
        " WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION turn()"
    )

    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    for _ in range(20):
        pages.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
        process(pages)

    assert 5 <= len(api.texts()) <= 8
    assert waiting(pages) == 1


def test_the_triggers_of_an_embeddings_table_come_and_go_with_its_pipeline(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    triggers = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'pages_embeddings'::regclass AND NOT tgisinternal"
    assert pages.execute(triggers).fetchone() == (3,)

    pages.execute("DROP TRIGGER autoembed_1_delete ON pages_embeddings")
    pages.execute("ALTER TABLE pages_embeddings DISABLE TRIGGER autoembed_1_update")
    assert pages.execute("SELECT count(*) FROM autoembed.doctor() WHERE NOT ok").fetchone() != (0,)
    pages.execute("SELECT autoembed.resync('pages')")
    enabled = f"{triggers} AND tgenabled = 'O'"
    assert pages.execute(enabled).fetchone() == (3,)

    pages.execute("ALTER TABLE pages_embeddings RENAME TO other; CREATE SCHEMA s; ALTER TABLE pages SET SCHEMA s")
    pages.execute("TRUNCATE s.other")
    process(pages)
    assert pages.execute("SELECT count(*) FROM s.other").fetchone() == (1,)

    pages.execute("SELECT autoembed.disable('s.pages')")
    assert pages.execute(triggers.replace("pages_embeddings", "s.other")).fetchone() == (0,)
    pages.execute("DELETE FROM s.other; TRUNCATE s.other")


def test_an_application_that_holds_a_row_does_not_hold_up_its_embedding(
    pages: Connection, connect: Callable[..., Connection]
) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    holder = connect()
    with holder.transaction():
        holder.execute("SELECT FROM pages FOR UPDATE")

        process(pages)

        assert_beside(pages)


def test_a_text_that_changes_while_its_embedding_is_written_wins(
    pages: Connection, connect: Callable[..., Connection], api: FakeApi
) -> None:
    """A change that commits between the look at the text and the commit of the lane must not be overwritten."""
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    # A trigger of the embeddings table changes the row in another session, after the look at its text.
    pages.execute("CREATE EXTENSION dblink")
    dsn = f"dbname={pages.info.dbname} user=postgres"
    pages.execute(
        "CREATE FUNCTION interfere() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM public.dblink_exec('{dsn}',"
        " 'UPDATE public.pages SET body = ''changed'' WHERE id = 1 AND body = ''one''');"
        " RETURN NEW; END $$"
    )
    pages.execute(
        "CREATE TRIGGER interfere BEFORE INSERT ON pages_embeddings FOR EACH ROW EXECUTE FUNCTION interfere()"
    )

    process(pages)

    assert pages.execute("SELECT id FROM pages_embeddings").fetchall() == [(2,)]
    process(pages)
    [(vector,)] = pages.execute("SELECT embedding::real[] FROM pages_embeddings WHERE id = 1").fetchall()
    assert np.allclose(vector, embedding_of("changed"), atol=2e-3)


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE pages RENAME TO sheets; ALTER TABLE sheets RENAME TO pages",
        "ALTER TABLE pages RENAME COLUMN body TO words; ALTER TABLE pages RENAME COLUMN words TO body",
        "ALTER TABLE pages RENAME COLUMN id TO number; ALTER TABLE pages RENAME COLUMN number TO id",
        "ALTER TABLE pages ALTER COLUMN id TYPE bigint",
        "CREATE SCHEMA other; ALTER TABLE pages SET SCHEMA other; SET search_path = other, public",
        "ALTER TABLE pages_embeddings RENAME TO vectors; ALTER TABLE vectors RENAME TO pages_embeddings",
    ],
)
def test_embeddings_follow_every_change_of_the_table(pages: Connection, change: str) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)

    pages.execute(change)
    pages.execute("UPDATE pages SET body = 'other' WHERE id = 1; DELETE FROM pages WHERE id = 2")
    pages.execute("INSERT INTO pages VALUES (3, 'three')")
    process(pages)

    assert_beside(pages)


def test_the_embeddings_of_a_table_that_is_dropped_go_with_it(pages: Connection) -> None:
    pages.execute("DROP TABLE pages")
    process(pages)

    assert pages.execute("SELECT to_regclass('pages_embeddings')").fetchone() == (None,)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_table_that_takes_the_place_of_a_dropped_one_is_attached(pages: Connection, at_once: bool) -> None:
    """No lane has been there. The embeddings of the dropped table are not those of the new one."""
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)

    with pages.transaction() if at_once else nullcontext():
        pages.execute("DROP TABLE pages")
        pages.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
        pages.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    assert pages.execute("SELECT count(*) FROM pages_embeddings").fetchone() == (0,)

    pages.execute("INSERT INTO pages VALUES (2, 'two')")
    process(pages)
    assert_beside(pages)


def test_a_lane_that_ends_the_dropped_one_meanwhile_is_waited_for(
    pages: Connection, connect: Callable[..., Connection]
) -> None:
    lane = connect()
    pages.execute("DROP TABLE pages; CREATE TABLE pages (id int PRIMARY KEY, body text)")
    lane.execute("BEGIN")
    lane.execute("SELECT autoembed._drop_orphaned_pipelines()")

    with ThreadPoolExecutor(1) as pool:
        enabled = pool.submit(pages.execute, "SELECT autoembed.enable('pages', content_columns => '{body}')")
        wait_until(lambda: enabled.done() or lane.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall() != [])
        lane.execute("COMMIT")
        enabled.result()

    pages.execute("INSERT INTO pages VALUES (2, 'two')")
    process(pages)
    assert_beside(pages)


def test_disable_leaves_the_embeddings_and_enable_takes_them_again(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)
    before = len(api.log())

    pages.execute("SELECT autoembed.disable('pages')")
    pages.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    process(pages)

    assert len(api.log()) == before
    assert_beside(pages)


def test_disable_can_drop_the_embeddings(pages: Connection) -> None:
    pages.execute("SELECT autoembed.disable('pages', drop => true)")

    assert pages.execute("SELECT to_regclass('pages_embeddings')").fetchone() == (None,)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT autoembed.disable('pages')",
        "SELECT autoembed.disable('pages', drop => true)",
        "SELECT autoembed.alter_pipeline('pages', storage => 'row')",
        "ALTER TABLE pages ALTER id TYPE bigint",
        "ALTER TABLE pages DROP CONSTRAINT pages_pkey, ADD PRIMARY KEY (views)",
    ],
)
def test_no_statement_takes_away_what_depends_on_the_view_of_chunks(pages: Connection, statement: str) -> None:
    pages.execute("INSERT INTO pages (id, body, views) VALUES (1, 'one', 1)")
    process(pages)
    pages.execute("CREATE VIEW mine AS SELECT chunk FROM pages_chunks")

    with pytest.raises(psycopg.errors.DependentObjectsStillExist) as refused:
        pages.execute(statement.encode())

    assert refused.value.diag.message_primary == (
        "view public.pages_chunks has to be dropped for this, but other objects depend on it"
    )
    assert refused.value.diag.message_detail == "These are: view public.mine."
    assert "DROP VIEW public.pages_chunks CASCADE" in str(refused.value.diag.message_hint)
    assert pages.execute("SELECT chunk FROM mine").fetchall() == [("one",)]
    pages.execute("DROP VIEW mine")
    pages.execute(statement.encode())


@pytest.mark.parametrize("statement", ["SELECT autoembed.disable('pages')", "ALTER TABLE pages ALTER id TYPE bigint"])
def test_a_view_of_a_role_without_a_right_to_the_rows_stops_nobody(
    pages: Connection, role: Callable[[str], str], connect: Callable[..., Connection], statement: str
) -> None:
    session = connect(user=role("stranger"))
    session.execute("CREATE TEMP VIEW mine AS SELECT chunk FROM pages_chunks")
    session.execute("CREATE FUNCTION pg_temp.mine() RETURNS text BEGIN ATOMIC SELECT chunk FROM pages_chunks; END")

    pages.execute(statement.encode())


def test_what_depends_on_the_view_of_chunks_stays_when_the_table_or_a_column_goes(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    pages.execute("CREATE VIEW mine AS SELECT chunk FROM pages_chunks")

    pages.execute("ALTER TABLE pages DROP COLUMN body")
    assert pages.execute("SELECT state FROM autoembed.status").fetchone() == ("stopped",)
    pages.execute("ALTER TABLE pages ADD COLUMN body text DEFAULT 'two'")
    process(pages)
    assert pages.execute("SELECT chunk FROM mine").fetchall() == [("two",)]

    pages.execute("DROP TABLE pages")
    pages.execute("SELECT autoembed._clean_up()")
    assert pages.execute("SELECT FROM autoembed.pipeline").rowcount == 0
    assert pages.execute("SELECT to_regclass('mine')::text").fetchone() == ("mine",)


def test_resync_makes_the_policy_and_the_view_again_that_somebody_has_dropped(
    pages: Connection, connect: Callable[..., Connection], role: Callable[[str], str]
) -> None:
    reader = role("reader")
    pages.execute(f"GRANT SELECT ON pages TO {reader}; INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    pages.execute("DROP VIEW pages_chunks; DROP POLICY autoembed_readers ON pages_embeddings")
    assert connect(user=reader).execute("SELECT FROM pages_embeddings").fetchall() == []

    pages.execute("SELECT autoembed.resync('pages')")

    assert connect(user=reader).execute("SELECT chunk FROM pages_chunks").fetchall() == [("one",)]


@pytest.mark.parametrize("sets", [1, 2])
def test_the_hint_for_a_lost_column_goes_on_without_all_that_names_it(pages: Connection, sets: int) -> None:
    if sets == 2:
        pages.execute("SELECT autoembed.enable('pages', content_columns => '{body}', embeddings_table => 'others')")
    pages.execute("ALTER TABLE pages ADD COLUMN title text DEFAULT 'title'")
    pages.execute(
        "SELECT autoembed.alter_pipeline('pages_embeddings', content_columns => '{title,body}',"
        " chunk_prefix => '{title}', condition => 'title <> $$$$')"
    )
    pages.execute("ALTER TABLE pages DROP COLUMN title")

    hint = pages.execute("SELECT hint FROM autoembed.status WHERE state = 'stopped'").fetchone()
    assert hint is not None
    [statement] = re.findall("SELECT [^;]+", hint[0])
    pages.execute(statement.encode())

    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    assert_beside(pages)


@pytest.mark.parametrize("column", ["chunk_start", "embedding"])
def test_a_renamed_column_of_the_embeddings_table_is_named(pages: Connection, column: str) -> None:
    pages.execute(f"ALTER TABLE pages_embeddings RENAME {column} TO other")

    found = pages.execute("SELECT reason FROM autoembed.status").fetchone()
    assert found == (f'table public.pages_embeddings has no column "{column}"',)

    pages.execute(f"ALTER TABLE pages_embeddings RENAME other TO {column}")
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    assert_beside(pages)


@pytest.mark.parametrize(
    "call",
    [
        "preview('pages', '1')",
        "search('pages', 'one')",
        "search(NULL::pages, 'one')",
        "measure_recall('pages')",
        "tune('pages')",
        "create_match_function('pages')",
        "reembed('pages')",
        "alter_pipeline('pages', binary_index => true)",
        "alter_pipeline('pages', storage => 'row')",
    ],
)
def test_what_needs_an_embeddings_table_that_was_dropped_says_so(pages: Connection, call: str) -> None:
    pages.execute("DROP TABLE pages_embeddings CASCADE")
    pages.execute("INSERT INTO pages VALUES (1, 'one')")

    with pytest.raises(
        psycopg.errors.UndefinedTable, match="the embeddings table of table public.pages was dropped"
    ) as refused:
        pages.execute(f"SELECT * FROM autoembed.{call}".encode())

    assert "autoembed.disable('public.pages'); then" in (refused.value.diag.message_hint or "")


def test_an_embeddings_table_that_was_dropped_is_made_again(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)

    pages.execute("DROP TABLE pages_embeddings CASCADE")
    pages.execute("UPDATE pages SET body = 'two'; DELETE FROM pages; INSERT INTO pages VALUES (3, 'three')")
    pages.execute("SELECT autoembed.disable('pages', drop => true)")
    pages.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    process(pages)

    assert_beside(pages)


def test_a_table_may_have_several_embeddings_tables_and_a_column(pages: Connection) -> None:
    with pytest.raises(psycopg.errors.DuplicateObject) as refusal:
        pages.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    assert "embeddings_table" in str(refusal.value.diag.message_hint)
    pages.execute("SELECT autoembed.enable('pages', content_columns => '{body}', embeddings_table => 'others')")
    pages.execute("SELECT autoembed.enable('pages', 'embedding', content_columns => '{body}')")
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    assert_beside(pages)
    assert pages.execute("SELECT count(*) FROM others").fetchone() == (1,)
    assert pages.execute("SELECT count(embedding) FROM pages").fetchone() == (1,)

    pages.execute("SELECT autoembed.disable('others', drop => true)")

    assert pages.execute("SELECT to_regclass('others')").fetchone() == (None,)
    assert pages.execute("SELECT count(*) FROM autoembed.pipeline").fetchone() == (2,)


def test_an_embeddings_table_is_named_without_a_schema(db: Connection) -> None:
    db.execute("SELECT autoembed.create_model('fake', 'fake', 3), autoembed.set_default_model('fake')")
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    enable = "SELECT autoembed.enable('notes', content_columns => '{body}', embeddings_table => %s)"
    with pytest.raises(psycopg.errors.InvalidName, match='name "app.vectors" has a dot') as refusal:
        db.execute(enable, ["app.vectors"])
    assert refusal.value.diag.message_hint == "Give the name alone, such as 'vectors'."
    db.execute(enable, ["vectors"])
    assert db.execute("SELECT to_regclass('public.vectors') IS NOT NULL").fetchone() == (True,)


def test_a_text_that_each_write_of_its_embeddings_changes_costs_ever_fewer_requests(
    pages: Connection, api: FakeApi
) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    pages.execute(
        "CREATE FUNCTION echo() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN UPDATE pages SET body = body || '.' WHERE id = NEW.id; RETURN NULL; END $$;"
        " CREATE TRIGGER echo AFTER INSERT OR UPDATE ON pages_embeddings FOR EACH ROW EXECUTE FUNCTION echo()"
    )
    before = len(api.texts())

    pages.execute("UPDATE pages SET body = 'new'")
    for _ in range(30):
        pages.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
        process(pages)

    assert 5 <= len(api.texts()) - before <= 8


def test_each_of_several_sets_is_named_by_its_embeddings_table(pages: Connection) -> None:
    pages.execute(
        "SELECT autoembed.enable('pages', content_template => 'x {body}', embeddings_table => 'others', model => 'two')"
        " FROM (SELECT autoembed.create_model('two', 'fake', 3)) AS m"
    )
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)

    for table, text in (("pages_embeddings", "one"), ("others", "x one")):
        assert pages.execute("SELECT content FROM autoembed.preview(%s, '1')", [table]).fetchall() == [(text,)]
        assert pages.execute("SELECT tokens > 0 AS any FROM autoembed.estimate(%s)", [table]).fetchall() == [(True,)]
        pages.execute("SELECT autoembed.reset_search_stats(%s)", [table])
    pages.execute(
        "INSERT INTO autoembed.failure (pipeline_id, key, error_class, reason, attempts)"
        " SELECT p.id, '[1]', 'row', 'odd', 1 FROM autoembed.pipeline AS p"
    )
    assert pages.execute("SELECT autoembed.retry_failed('others')").fetchall() == [(1,)]
    assert pages.execute("SELECT autoembed.retry_failed('pages')").fetchall() == [(1,)]


def test_the_tables_owner_owns_the_embeddings_and_runs_all_that_hangs_on_them(
    db: Connection, api: FakeApi, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    owner = role("beside_owner")
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute(f"SELECT autoembed.grant_usage('{owner}')")
    db.execute(f"GRANT CREATE ON SCHEMA public TO {owner}")
    db.execute(f"SET ROLE {owner}")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    db.execute("CREATE TABLE seen (who text)")
    db.execute(
        "CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO public.seen VALUES (current_user); RETURN coalesce(NEW, OLD); END $$"
    )
    db.execute("CREATE TRIGGER spy BEFORE INSERT OR DELETE ON pages_embeddings FOR EACH ROW EXECUTE FUNCTION spy()")
    db.execute("RESET ROLE")
    db.execute("INSERT INTO pages VALUES (1, 'one')")
    process(db)
    assert_beside(db)
    db.execute("DELETE FROM pages")
    process(db)

    assert db.execute(
        "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname = 'pages_embeddings'"
    ).fetchone() == (owner,)
    assert db.execute("SELECT DISTINCT who FROM seen").fetchall() == [(owner,)]
    assert_beside(db)


def test_an_embeddings_table_that_refuses_keeps_no_row_from_being_deleted(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)
    pages.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;"
        "CREATE TRIGGER refuse BEFORE DELETE ON pages_embeddings FOR EACH ROW EXECUTE FUNCTION refuse()"
    )

    pages.execute("DELETE FROM pages WHERE id = 1")
    assert pages.execute("SELECT id FROM pages").fetchall() == [(2,)]

    # A lane deletes the embedding as soon as it can.
    pages.execute("DROP TRIGGER refuse ON pages_embeddings")
    process(pages)
    assert_beside(pages)


@pytest.mark.parametrize("on_delete", ["CASCADE", "NO ACTION"])
def test_embeddings_that_others_refer_to_go_with_a_truncate_as_soon_as_they_can(
    pages: Connection, on_delete: str
) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)
    pages.execute(
        f"CREATE TABLE quotes (id int, chunk_number int,"
        f" FOREIGN KEY (id, chunk_number) REFERENCES pages_embeddings ON DELETE {on_delete})"
    )
    pages.execute("INSERT INTO quotes VALUES (1, 1)")

    pages.execute("TRUNCATE pages")
    pages.execute("INSERT INTO pages VALUES (3, 'three')")

    if on_delete == "CASCADE":
        assert pages.execute("SELECT FROM pages_embeddings").fetchall() == []
    process(pages)
    process(pages)
    kept = pages.execute("SELECT key FROM autoembed.failed").fetchall()
    assert kept == ([] if on_delete == "CASCADE" else [("[1]",)])
    pages.execute("DELETE FROM quotes")
    pages.execute("SELECT autoembed.retry_failed('pages')")
    process(pages)
    assert_beside(pages)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_a_truncate_leaves_no_embeddings_that_its_snapshot_does_not_show(
    pages: Connection, connect: Callable[..., Connection], isolation: str
) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    other, reader = connect(), connect()
    other.execute(f"BEGIN ISOLATION LEVEL {isolation}")
    other.execute("SELECT count(*) FROM pg_class")
    pages.execute("INSERT INTO pages VALUES (2, 'two')")
    process(pages)
    # The embeddings table cannot be truncated meanwhile.
    reader.execute("BEGIN; TABLE pages_embeddings")

    other.execute("TRUNCATE pages; INSERT INTO pages VALUES (1, 'new'); COMMIT")
    reader.execute("COMMIT")

    process(pages)
    process(pages)
    assert_beside(pages)


@pytest.mark.parametrize(
    ("table", "arguments", "sqlstate", "message"),
    [
        ("id int PRIMARY KEY, body text", "embedding_column => 'e', embeddings_table => 'x'", "22023", "cannot both"),
        ("digest int PRIMARY KEY, body text", "embedding_column => NULL", "42701", 'key column "digest"'),
        ("id int, body text", "embedding_column => NULL", "55000", "has no key"),
        (
            "id int PRIMARY KEY, body text",
            "embeddings_table => 'pg_class2'",
            "42P07",
            "exists",
        ),
    ],
)
def test_what_cannot_be_beside_is_refused_with_a_reason(
    db: Connection, table: str, arguments: str, sqlstate: str, message: str
) -> None:
    db.execute(f"CREATE TABLE books ({table})")
    db.execute("CREATE TABLE pg_class2 (id int)")

    with pytest.raises(psycopg.Error) as refusal:
        db.execute(f"SELECT autoembed.enable('books', content_columns => '{{body}}', {arguments})")

    assert refusal.value.sqlstate == sqlstate
    assert message in str(refusal.value)
    assert refusal.value.diag.message_hint


def test_doctor_names_the_index_that_many_embeddings_lack(db: Connection) -> None:
    db.execute("SELECT autoembed.create_model('tiny', 'fake', 8)")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}', model => 'tiny')")
    db.execute(
        "INSERT INTO pages_embeddings SELECT n, 1, 0, 1, '', '[1,0,0,0,0,0,0,0]' FROM generate_series(1, 10000) AS n"
    )
    db.execute("ANALYZE pages_embeddings")
    index = "SELECT ok, finding, advice FROM autoembed.doctor() WHERE subject = 'index of public.pages.embedding'"

    [row] = db.execute(index).fetchall()
    assert not row.ok
    db.execute(row.advice)

    assert db.execute(index).fetchone() == (True, "public.pages_embeddings_embedding_idx", None)


def long_text(paragraphs: int) -> str:
    """Paragraphs that are all different."""
    return "\n\n".join(
        f"This is paragraph {n}. " + f"It says what number {n} says, in some words. " * 8 for n in range(paragraphs)
    )


def chunks(db: Connection) -> list[Any]:
    return db.execute(
        "SELECT e.chunk_number, substr(p.body, e.chunk_start + 1, e.chunk_end - e.chunk_start) AS chunk,"
        " e.embedding::real[] AS vector FROM pages_embeddings AS e JOIN pages AS p USING (id) ORDER BY 1"
    ).fetchall()


def test_a_long_text_has_an_embedding_for_each_of_its_chunks(pages: Connection) -> None:
    text = long_text(60)
    pages.execute("INSERT INTO pages VALUES (1, %s)", [text])

    process(pages)

    found = chunks(pages)
    assert len(found) > 5
    assert [row.chunk_number for row in found] == list(range(1, len(found) + 1))
    assert "".join("".join(row.chunk for row in found).split()) == "".join(text.split())
    for row in found:
        assert np.allclose(row.vector, embedding_of(row.chunk), atol=2e-3)


def test_only_the_chunks_that_an_edit_changes_are_sent(pages: Connection, api: FakeApi) -> None:
    text = long_text(60)
    pages.execute("INSERT INTO pages VALUES (1, %s)", [text])
    process(pages)
    before = len(api.log())

    pages.execute("UPDATE pages SET body = %s", [text.replace("paragraph 30.", "the thirtieth.")])
    process(pages)
    sent = [text for request in api.log()[before:] for text in request["texts"]]
    assert len(sent) == 1
    # A text before them moves the other chunks, whose texts stay.
    pages.execute("UPDATE pages SET body = 'A new beginning.' || E'\\n\\n' || body")
    process(pages)
    sent = [text for request in api.log()[before + 1 :] for text in request["texts"]]

    assert 1 <= len(sent) <= 2
    for row in chunks(pages):
        assert np.allclose(row.vector, embedding_of(row.chunk), atol=2e-3)


def test_what_is_left_of_a_longer_text_goes(pages: Connection, api: FakeApi) -> None:
    text = long_text(60)
    pages.execute("INSERT INTO pages VALUES (1, %s)", [text])
    process(pages)
    few = chunks(pages)[:3]
    before = len(api.log())

    pages.execute("UPDATE pages SET body = %s", [text[: text.index(few[-1].chunk) + len(few[-1].chunk)]])
    process(pages)

    assert [row.chunk for row in chunks(pages)] == [row.chunk for row in few]
    assert len(api.log()) == before


def test_another_way_to_cut_is_taken_for_all_rows(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, %s)", [long_text(20)])
    process(pages)
    before = len(chunks(pages))

    pages.execute("SELECT autoembed.alter_pipeline('pages', chunk_size => 128)")
    process(pages)
    process(pages)
    finer = len(chunks(pages))
    pages.execute("SELECT autoembed.alter_pipeline('pages', chunking => 'tokens', chunk_overlap => 16)")
    process(pages)
    process(pages)

    assert finer > 2 * before
    overlapping = "SELECT FROM pages_embeddings AS a JOIN pages_embeddings AS b ON b.chunk_start < a.chunk_end"
    assert pages.execute(f"{overlapping} AND b.chunk_number = a.chunk_number + 1").fetchall() != []
    for row in chunks(pages):
        assert np.allclose(row.vector, embedding_of(row.chunk), atol=2e-3)


def test_a_refused_chunk_fails_its_row_alone(pages: Connection, api: FakeApi) -> None:
    api.behave(faults=[{"status": 400, "match": "number 30 says", "times": "forever"}])
    pages.execute("INSERT INTO pages VALUES (1, %s), (2, 'two')", [long_text(60)])

    process(pages)
    process(pages)

    assert pages.execute("SELECT key FROM autoembed.failed").fetchall() == [("[1]",)]
    assert pages.execute("SELECT id FROM pages_embeddings").fetchall() == [(2,)]


@pytest.mark.parametrize(
    ("arguments", "sqlstate"),
    [
        ("chunking => 'lines'", "42883"),
        ("chunk_size => 1", "22023"),
        ("chunk_size => 100000", "22023"),
        ("chunk_overlap => 400", "22023"),
        ("embedding_column => 'embedding', chunk_size => 100", "0A000"),
    ],
)
def test_a_way_to_cut_that_cannot_be_is_refused(db: Connection, api: FakeApi, arguments: str, sqlstate: str) -> None:
    db.execute("CREATE TABLE books (id int PRIMARY KEY, body text)")

    with pytest.raises(psycopg.Error) as refusal:
        db.execute(f"SELECT autoembed.enable('books', content_columns => '{{body}}', {arguments})")

    assert refusal.value.sqlstate == sqlstate
    assert refusal.value.diag.message_hint


def test_another_model_makes_other_embeddings_whatever_its_dimensions(pages: Connection) -> None:
    pages.execute("SELECT autoembed.create_model('tiny', 'fake', 8)")
    pages.execute("CREATE INDEX ON pages_embeddings USING hnsw (embedding halfvec_cosine_ops)")
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)

    with warnings_of(pages) as warnings:
        pages.execute("SELECT autoembed.alter_pipeline('pages', model => 'tiny')")
    assert warnings == []
    assert process(pages).completed == 2
    assert pages.execute("SELECT array_agg(vector_dims(embedding)) FROM pages_embeddings").fetchone() == ([8, 8],)

    pages.execute("SELECT autoembed.alter_pipeline('pages', model => '')")
    process(pages)
    assert_beside(pages)


def test_another_default_model_says_what_makes_room_for_its_embeddings(pages: Connection) -> None:
    pages.execute("SELECT autoembed.create_model('tiny', 'fake', 8)")
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)

    with warnings_of(pages) as warnings:
        pages.execute("SELECT autoembed.set_default_model('tiny')")
    [cure] = re.findall(r"Change the column: (.*); or the model", warnings[0])
    pages.execute(cure)

    assert process(pages).completed == 2
    assert pages.execute("SELECT array_agg(vector_dims(embedding)) FROM pages_embeddings").fetchone() == ([8, 8],)


def test_preview_shows_each_chunk_that_is_sent(pages: Connection, api: FakeApi) -> None:
    text = long_text(60)
    pages.execute("INSERT INTO pages VALUES (1, %s), (2, ' two '), (3, '')", [text])
    shown = pages.execute("SELECT * FROM autoembed.preview('pages', '1')").fetchall()
    assert {row.state for row in shown} == {"waiting"}
    before = len(api.log())

    process(pages)

    assert [row.content for row in shown] == [t for r in api.log()[before:] for t in r["texts"] if t != "two"]
    assert [row.chunk_number for row in shown] == list(range(1, len(shown) + 1))
    for row in shown:
        assert row.content == text[row.chunk_start : row.chunk_end]
        assert 0 < row.tokens <= 512 and not row.truncated
    place = "SELECT content, state, chunk_number, chunk_start, chunk_end FROM autoembed.preview('pages', %s)"
    assert pages.execute(place, ["2"]).fetchall() == [("two", "fresh", 1, 1, 4)]
    assert pages.execute(place, ["3"]).fetchall() == [("", "not wanted", None, None, None)]


def test_preview_says_where_the_model_cuts_what_is_no_chunk(pages: Connection) -> None:
    pages.execute("SELECT autoembed.alter_pipeline('pages', chunking => 'none')")
    pages.execute("INSERT INTO pages VALUES (1, %s)", ["Some words of prose. " * 9000])

    [row] = pages.execute("SELECT * FROM autoembed.preview('pages', '1')").fetchall()
    process(pages)

    assert row.truncated and row.tokens > 8191
    assert pages.execute("SELECT chunk_start, chunk_end FROM pages_embeddings").fetchall() == [
        (row.chunk_start, row.chunk_end)
    ]


# The view of chunks ---------------------------------------------------------------------------------


def texts_of_chunks(db: Connection, view: str = "pages_chunks") -> list[tuple[int, str | None]]:
    return [(row[0], row.chunk) for row in db.execute(f"SELECT * FROM {view} ORDER BY 1, chunk_number").fetchall()]


def test_a_view_shows_the_text_of_each_chunk_at_its_offsets(pages: Connection) -> None:
    text = "Grüße 👩‍👩‍👧.\n\n" + long_text(60)
    pages.execute("INSERT INTO pages VALUES (1, %s), (2, 'two')", [text])
    process(pages)

    found = pages.execute("SELECT * FROM pages_chunks ORDER BY id, chunk_number").fetchall()

    assert len(found) > 5
    for row in found[:-1]:
        assert row.chunk == text[row.chunk_start : row.chunk_end]
    assert tuple(found[-1]) == (2, 1, 0, 3, "two")
    assert pages.execute("SELECT count(*) FROM pages_embeddings").fetchone() == (len(found),)


def test_a_chunk_of_an_older_text_has_no_text(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)

    pages.execute("UPDATE pages SET body = 'oak' WHERE id = 1")
    assert texts_of_chunks(pages) == [(1, None), (2, "two")]
    process(pages)

    assert texts_of_chunks(pages) == [(1, "oak"), (2, "two")]


def test_who_may_not_read_a_text_sees_none_of_its_chunks(
    pages: Connection, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    reader, half, stranger = role("chunk_reader"), role("chunk_half"), role("chunk_stranger")
    pages.execute(f"GRANT SELECT ON pages TO {reader}; GRANT SELECT (id, views) ON pages TO {half}")
    pages.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY; CREATE POLICY odd ON pages USING (id % 2 = 1)")
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two'), (3, 'three')")
    process(pages)
    function = pages.execute("SELECT oid::regprocedure::text FROM pg_proc WHERE proname ~ '^_chunk_[0-9]+$'").fetchone()
    assert function is not None

    assert texts_of_chunks(connect(user=reader)) == [(1, "one"), (3, "three")]
    for name in (half, stranger):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            texts_of_chunks(connect(user=name))
        pages.execute(f"GRANT USAGE ON SCHEMA autoembed TO {name}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connect(user=name).execute(f"SELECT {str(function[0]).split('(')[0]}(1, 0, 3, '')")


def test_an_owner_who_may_not_create_a_table_there_is_told_so(
    db: Connection, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    owner = role("owner")
    db.execute(f"SELECT autoembed.grant_usage('{owner}'); CREATE SCHEMA app; GRANT USAGE ON SCHEMA app TO {owner}")
    db.execute(f"CREATE TABLE app.notes (id int PRIMARY KEY, body text); ALTER TABLE app.notes OWNER TO {owner}")

    with pytest.raises(psycopg.errors.InsufficientPrivilege) as refusal:
        connect(user=owner).execute("SELECT autoembed.enable('app.notes', content_columns => '{body}')")

    assert (
        refusal.value.diag.message_primary == f"role {owner} may not create the embeddings table app.notes_embeddings"
    )
    assert f"GRANT CREATE ON SCHEMA app TO {owner}" in str(refusal.value.diag.message_hint)


def test_an_owner_who_may_not_give_a_table_to_the_owner_of_the_rows_is_told_so(
    db: Connection, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    owner, member = role("owner"), role("member")
    db.execute(f"GRANT {owner} TO {member} WITH INHERIT TRUE, SET FALSE; SELECT autoembed.grant_usage('{owner}')")
    db.execute(f"GRANT CREATE ON SCHEMA public TO {owner}")
    db.execute(f"CREATE TABLE notes (id int PRIMARY KEY, body text); ALTER TABLE notes OWNER TO {owner}")

    with pytest.raises(psycopg.errors.InsufficientPrivilege) as refusal:
        connect(user=member).execute("SELECT autoembed.enable('notes', content_columns => '{body}')")

    assert refusal.value.diag.message_primary == (
        f"role {member} may not give the embeddings table public.notes_embeddings to {owner}, the owner of public.notes"
    )
    assert f"GRANT {owner} TO {member} WITH SET TRUE" in str(refusal.value.diag.message_hint)


def test_default_privileges_give_no_role_a_right_to_the_embeddings(
    pages: Connection, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    owner, tenant = role("owner"), role("tenant")
    pages.execute(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {tenant}, PUBLIC")
    pages.execute(f"CREATE TABLE notes (id int PRIMARY KEY, body text); ALTER TABLE notes OWNER TO {owner}")
    pages.execute(f"REVOKE ALL ON notes FROM {tenant}, PUBLIC; GRANT SELECT ON notes TO {tenant}")
    pages.execute("INSERT INTO notes VALUES (1, 'one')")
    pages.execute("SELECT autoembed.enable('notes', content_columns => '{body}')")
    process(pages)

    session = connect(user=tenant)

    assert session.execute("SELECT id FROM notes_embeddings").fetchall() == [(1,)]
    for statement in (
        "TRUNCATE notes_embeddings",
        "DELETE FROM notes_embeddings",
        "CREATE TRIGGER mine AFTER INSERT ON notes_embeddings FOR EACH ROW "
        "EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute(statement)


def test_a_role_that_no_policy_binds_needs_a_right_to_the_rows(
    pages: Connection, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    unbound = role("unbound")
    pages.execute(f"ALTER ROLE {unbound} BYPASSRLS; SELECT autoembed.grant_usage('{unbound}')")
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table pages"):
        connect(user=unbound).execute("SELECT * FROM autoembed.search('pages', 'one')")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table pages_embeddings"):
        connect(user=unbound).execute("SELECT * FROM pages_embeddings")


def test_a_rule_on_an_embeddings_table_stops_the_pipeline_and_one_on_the_table_does_not(pages: Connection) -> None:
    pages.execute("CREATE RULE frozen AS ON UPDATE TO pages DO INSTEAD NOTHING")
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    assert texts_of_chunks(pages) == [(1, "one")]

    pages.execute("CREATE RULE lost AS ON INSERT TO pages_embeddings DO INSTEAD NOTHING")
    pages.execute("INSERT INTO pages VALUES (2, 'two')")
    process(pages)
    row = pages.execute("SELECT state, reason, embeddings_table FROM autoembed.status").fetchone()
    assert row is not None
    reason = 'rule "lost" of table public.pages_embeddings stands in the way of the embeddings'
    assert (row.state, row.reason, row.embeddings_table) == (
        "stopped",
        reason,
        "pages_embeddings",
    )

    pages.execute("DROP RULE lost ON pages_embeddings")
    process(pages)
    assert texts_of_chunks(pages) == [(1, "one"), (2, "two")]


@pytest.mark.parametrize(("drop", "what"), [(False, "detached"), (True, "dropped")])
def test_the_end_of_several_sets_is_told(pages: Connection, drop: bool, what: str) -> None:
    pages.execute("SELECT autoembed.enable('pages', content_columns => '{body}', embeddings_table => 'others')")
    notices: list[str] = []
    pages.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))

    pages.execute("SELECT autoembed.disable('pages', drop => %s)", [drop])

    names = "public.pages_embeddings, public.others"
    assert notices == [f"table public.pages had several embeddings, and all of them are {what}: {names}"]


LONG_TEXT = "(SELECT string_agg('Sentence ' || n || ' of 字.', ' ' ORDER BY n) FROM generate_series(1, 120000) AS n)"


@pytest.fixture
def long_page(db: Connection) -> Connection:
    """An attached table with a row whose text has some megabytes, and a short one."""
    db.execute("SELECT autoembed.create_model('fake', 'fake', 8)")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}', model => 'fake')")
    db.execute(f"INSERT INTO pages VALUES (1, {LONG_TEXT}), (2, 'short')")
    while waiting(db):
        db.execute("SELECT autoembed.process()")
    return db


def test_the_chunks_of_a_long_text_are_read_with_the_text_once(
    long_page: Connection, connect: Callable[..., Connection], role: Callable[[str], str]
) -> None:
    reader = role("long_reader")
    long_page.execute(f"GRANT SELECT ON pages TO {reader}")
    text = long_page.execute("SELECT body FROM pages WHERE id = 1").fetchone().body  # type: ignore[union-attr]

    # A reader needs no right to call functions of autoembed.
    for name in (None, reader):
        session = connect() if name is None else connect(user=name)
        session.execute("SET statement_timeout = '60s'")
        found = session.execute("SELECT * FROM pages_chunks ORDER BY id, chunk_number").fetchall()
        assert len(found) > 1000
        assert all(row.chunk == text[row.chunk_start : row.chunk_end] for row in found[:-1])
        assert found[-1].chunk == "short"
        # A statement that changes the text sees the new one.
        query = "SELECT count(chunk) FROM pages_chunks WHERE id = 1 AND chunk_number < 5"
        assert session.execute(query).fetchone() == (4,)
    long_page.execute("UPDATE pages SET body = '字' || body WHERE id = 1")
    assert long_page.execute(query).fetchone() == (0,)
    long_page.execute("UPDATE pages SET body = substr(body, 2) WHERE id = 1")
    assert session.execute(query).fetchone() == (4,)


def test_a_long_text_that_is_kept_is_given_to_no_other_statement_and_to_no_other_role(
    long_page: Connection, connect: Callable[..., Connection], role: Callable[[str], str]
) -> None:
    owner, thief = role("long_owner"), role("long_thief")
    for name in (owner, thief):
        long_page.execute("SELECT autoembed.grant_usage(%s::regrole)", [name])
    long_page.execute(f"GRANT {owner}, {thief} TO CURRENT_USER")
    call = "SELECT autoembed._part_of_long_text('v', NULL, 0, 5)"
    keep = "SELECT autoembed._part_of_long_text('v', 'a text', 0, 1)"

    long_page.execute(f"SET ROLE {owner}")
    assert long_page.execute(f"SELECT ({keep}) AS kept, ({call}) AS got").fetchone() == ("a", "a tex")
    assert long_page.execute(call).fetchone() == (None,)
    long_page.execute("RESET ROLE")
    long_page.execute(
        f"CREATE FUNCTION seen() RETURNS text LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SET ROLE {owner}';"
        f" PERFORM ({keep}); EXECUTE 'SET ROLE {thief}'; RETURN ({call}); END $$"
    )
    assert long_page.execute("SELECT seen()").fetchone() == (None,)
    long_page.execute("RESET ROLE")


def test_no_code_of_the_owner_runs_for_a_reader_of_chunks(pages: Connection) -> None:
    pages.execute("CREATE FUNCTION said(p pages) RETURNS text LANGUAGE sql STABLE AS 'SELECT p.body'")
    pages.execute("SELECT autoembed.enable('pages', content_function => 'said', embeddings_table => 'others')")
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)

    assert texts_of_chunks(pages, "others_chunks") == [(1, None)]
    assert texts_of_chunks(pages) == [(1, "one")]


@pytest.mark.parametrize(
    ("change", "view"),
    [
        ("ALTER TABLE pages RENAME TO sheets", "pages_chunks"),
        ("ALTER TABLE pages RENAME COLUMN id TO number; ALTER TABLE pages RENAME body TO words", "pages_chunks"),
        ("ALTER TABLE pages ALTER COLUMN id TYPE bigint", "pages_chunks"),
        ("ALTER TABLE pages ALTER COLUMN body TYPE varchar(90)", "pages_chunks"),
        ("CREATE SCHEMA other; ALTER TABLE pages SET SCHEMA other", "other.pages_chunks"),
        ("ALTER TABLE pages_embeddings RENAME TO vectors", "pages_chunks"),
        ("SELECT autoembed.disable('pages'); SELECT autoembed.enable('pages', content_columns => '{body}')",
         "pages_chunks"),
    ],
)  # fmt: skip
def test_the_view_of_chunks_follows_every_change_of_the_table(pages: Connection, change: str, view: str) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)

    pages.execute(change)
    process(pages)

    assert texts_of_chunks(pages, view) == [(1, "one"), (2, "two")]
    (key,) = pages.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum = 1", [view]
    ).fetchone() or ("",)
    assert key == ("number" if "number" in change else "id")


def test_the_view_of_chunks_follows_the_owner(pages: Connection, role: Callable[[str], str]) -> None:
    owner = role("chunk_owner")
    pages.execute(f"GRANT CREATE ON SCHEMA public TO {owner}")
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)

    pages.execute(f"ALTER TABLE pages OWNER TO {owner}")

    assert pages.execute(
        "SELECT pg_get_userbyid(relowner), reloptions FROM pg_class WHERE relname = 'pages_chunks'"
    ).fetchone() == (owner, ["security_invoker=true"])
    pages.execute(f"SET ROLE {owner}")
    assert texts_of_chunks(pages) == [(1, "one")]
    pages.execute("RESET ROLE")


def test_an_embeddings_table_that_was_given_away_comes_back_by_the_hint(
    pages: Connection, role: Callable[[str], str]
) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)
    other = role("other")
    give = f"GRANT CREATE ON SCHEMA public TO {other}; ALTER TABLE pages_embeddings OWNER TO {other}"
    pages.execute(give)

    [state] = pages.execute("SELECT reason, hint FROM autoembed.status").fetchall()
    assert state.reason == "the embeddings table public.pages_embeddings has another owner than table public.pages"
    pages.execute(state.hint.removeprefix("Give it back: ").encode())
    pages.execute("INSERT INTO pages VALUES (2, 'two')")
    process(pages)
    assert texts_of_chunks(pages) == [(1, "one"), (2, "two")]

    pages.execute(f"{give}; SELECT autoembed.disable('pages')")
    enable = "SELECT autoembed.enable('pages', content_columns => '{body}')"
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="do not belong to the same role") as caught:
        pages.execute(enable)
    pages.execute(str(caught.value.diag.message_hint).encode())
    pages.execute(enable)
    assert texts_of_chunks(pages) == [(1, "one"), (2, "two")]


def test_a_table_may_change_hands_again_and_has_one_view_of_chunks(
    pages: Connection, role: Callable[[str], str]
) -> None:
    owners = [role("first_owner"), role("second_owner")]
    # REASSIGN OWNED fires no event trigger.
    for change, owner in [
        (f"ALTER TABLE pages OWNER TO {owners[0]}", owners[0]),
        (f"ALTER TABLE pages OWNER TO {owners[1]}", owners[1]),
        (f"ALTER TABLE pages OWNER TO {owners[0]}", owners[0]),
        (f"REASSIGN OWNED BY {owners[0]} TO {owners[1]}", owners[1]),
        (f"ALTER TABLE pages OWNER TO {owners[0]}", owners[0]),
    ]:
        pages.execute(change)

        assert pages.execute(
            "SELECT relname, pg_get_userbyid(relowner) FROM pg_class"
            " WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND relname ~ '^pages|chunks$'"
            " ORDER BY relname"
        ).fetchall() == [("pages", owner), ("pages_chunks", owner), ("pages_embeddings", owner)]


@pytest.mark.parametrize(
    "change",
    [
        "SELECT autoembed.disable('pages')",
        "SELECT autoembed.disable('pages', drop => true)",
        "DROP TABLE pages",
    ],
)
def test_the_view_of_chunks_goes_with_the_pipeline_and_stops_no_change(pages: Connection, change: str) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    process(pages)

    pages.execute("ALTER TABLE pages DROP COLUMN views")
    pages.execute(change)
    process(pages)

    assert pages.execute("SELECT to_regclass('pages_chunks')").fetchone() == (None,)


def test_a_name_that_is_taken_is_left_to_its_table(db: Connection, api: FakeApi) -> None:
    db.execute("CREATE TABLE books (id int PRIMARY KEY, body text)")
    db.execute("CREATE TABLE books_chunks (mine text)")
    db.execute("INSERT INTO books VALUES (1, 'one')")

    db.execute("SELECT autoembed.enable('books', content_columns => '{body}')")
    process(db)

    [(view,)] = db.execute("SELECT relname FROM pg_class WHERE relname ~ '^autoembed_[0-9]+_chunks$'").fetchall()
    assert texts_of_chunks(db, view) == [(1, "one")]
    assert db.execute("SELECT * FROM books_chunks").fetchall() == []


# From the rows to beside them, and back -------------------------------------------------------------


@pytest.fixture
def in_rows(db: Connection, api: FakeApi) -> Connection:
    """An attached table whose embeddings are in its rows: one is fresh, one has another text by now."""
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text, views int NOT NULL DEFAULT 0)")
    db.execute("SELECT autoembed.enable('pages', 'embedding', content_columns => '{body}')")
    db.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two'), (3, ''), (4, 'four')")
    process(db)
    return db


def sent_since(api: FakeApi, before: int) -> list[str]:
    return [text for request in api.log()[before:] for text in request["texts"]]


@pytest.mark.parametrize("on_change", ["keep", "clear"])
def test_embeddings_move_beside_the_rows_without_a_request(in_rows: Connection, api: FakeApi, on_change: str) -> None:
    in_rows.execute("SELECT autoembed.alter_pipeline('pages', on_change => %s)", [on_change])
    before = len(api.log())

    in_rows.execute("SELECT autoembed.alter_pipeline('pages', storage => 'beside')")

    assert in_rows.execute("SELECT id FROM pages_embeddings ORDER BY 1").fetchall() == [(1,), (2,), (4,)]
    assert texts_of_chunks(in_rows) == [(1, "one"), (2, "two"), (4, "four")]
    process(in_rows)
    process(in_rows)
    assert sent_since(api, before) == []
    assert_beside(in_rows)
    in_rows.execute("DELETE FROM pages WHERE id = 1; UPDATE pages SET body = 'other' WHERE id = 2")
    assert in_rows.execute("SELECT count(*) FROM pages_embeddings WHERE id = 1").fetchone() == (0,)
    process(in_rows)
    assert sent_since(api, before) == ["other"]
    assert_beside(in_rows)
    in_rows.execute("ALTER TABLE pages DROP COLUMN embedding")
    process(in_rows)
    assert_beside(in_rows)


def test_a_text_that_has_changed_does_not_take_its_old_embedding_along(in_rows: Connection, api: FakeApi) -> None:
    before = len(api.log())
    # No trigger sees this change, so nothing is queued.
    in_rows.execute("ALTER TABLE pages DISABLE TRIGGER USER; UPDATE pages SET body = 'unseen' WHERE id = 1")
    in_rows.execute("ALTER TABLE pages ENABLE TRIGGER USER; UPDATE pages SET body = 'queued' WHERE id = 2")

    in_rows.execute("SELECT autoembed.alter_pipeline('pages', storage => 'beside')")

    assert in_rows.execute("SELECT id FROM pages_embeddings").fetchall() == [(4,)]
    process(in_rows)
    process(in_rows)
    assert sorted(sent_since(api, before)) == ["queued", "unseen"]
    assert_beside(in_rows)


def test_short_texts_stay_embedded_when_long_ones_are_cut_into_chunks(in_rows: Connection, api: FakeApi) -> None:
    in_rows.execute("INSERT INTO pages VALUES (5, %s)", [long_text(60)])
    process(in_rows)
    before = len(api.log())

    in_rows.execute("SELECT autoembed.alter_pipeline('pages', storage => 'beside', chunking => 'structure')")
    process(in_rows)
    process(in_rows)

    assert sent_since(api, before) == [chunk for key, chunk in texts_of_chunks(in_rows) if key == 5]
    assert len(sent_since(api, before)) > 5


def test_embeddings_move_into_the_rows_without_a_request(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two'), (3, ''), (5, %s)", [long_text(20)])
    process(pages)
    before = len(api.log())

    pages.execute("SELECT autoembed.alter_pipeline('pages', storage => 'row')")

    assert pages.execute(
        "SELECT coalesce(to_regclass('pages_embeddings'), to_regclass('pages_chunks'))"
    ).fetchone() == (None,)
    assert pages.execute("SELECT id FROM pages WHERE embedding IS NOT NULL ORDER BY 1").fetchall() == [(1,), (2,)]
    process(pages)
    process(pages)
    # One embedding of the whole text is what a row has, and chunks have none.
    assert sent_since(api, before) == [long_text(20)]
    found = pages.execute("SELECT body, embedding::vector::real[] FROM pages WHERE body <> '' ORDER BY id").fetchall()
    for text, vector in found:
        assert np.allclose(vector, embedding_of(text), atol=2e-3), text


@pytest.mark.parametrize(
    ("arguments", "chunking"),
    [
        ("", ("structure", 40, 5, "{views}")),
        (", chunk_size => 50, chunk_prefix => ''", ("structure", 50, 5, None)),
        (", chunking => 'none'", ("none", None, 0, None)),
    ],
)
def test_texts_that_come_back_beside_the_rows_are_cut_as_before(
    pages: Connection, api: FakeApi, arguments: str, chunking: tuple[object, ...]
) -> None:
    pages.execute(
        "SELECT autoembed.alter_pipeline('pages', chunk_size => 40, chunk_overlap => 5, chunk_prefix => '{views}')"
    )

    pages.execute("SELECT autoembed.alter_pipeline('pages', storage => 'row')")
    pages.execute("SELECT autoembed.alter_pipeline('pages', condition => 'views >= 0')")
    pages.execute(f"SELECT autoembed.alter_pipeline('pages', storage => 'beside' {arguments})".encode())

    known = "SELECT chunking, chunk_size, chunk_overlap, chunk_prefix FROM autoembed.pipeline"
    assert pages.execute(known).fetchone() == chunking


def test_an_index_and_the_search_go_along(in_rows: Connection, api: FakeApi) -> None:
    in_rows.execute("CREATE INDEX ON pages USING hnsw (embedding halfvec_cosine_ops)")
    search = "SELECT s.key FROM autoembed.search('pages', 'four', max_rows => 1) AS s"

    in_rows.execute("SELECT autoembed.alter_pipeline('pages', storage => 'beside')")

    assert in_rows.execute(search).fetchall() == [("[4]",)]
    assert in_rows.execute("SELECT create_index FROM autoembed.backfill").fetchone() == (True,)


def test_an_owner_may_move_embeddings_and_gains_nothing(
    db: Connection, api: FakeApi, role: Callable[[str], str]
) -> None:
    owner = role("mover")
    db.execute(f"SELECT autoembed.grant_usage('{owner}'); GRANT CREATE ON SCHEMA public TO {owner}")
    db.execute("CREATE TABLE foreign_vectors (id int, chunk_number int, chunk_start int, chunk_end int, digest bytea)")
    db.execute(f"SET ROLE {owner}")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute(
        "CREATE FUNCTION said(p pages) RETURNS text LANGUAGE plpgsql AS"
        f" $$ BEGIN IF current_user <> '{owner}' THEN RAISE EXCEPTION 'runs as another'; END IF; RETURN p.body; END $$"
    )
    db.execute("SELECT autoembed.enable('pages', 'embedding', content_function => 'said')")
    db.execute("INSERT INTO pages VALUES (1, 'one')")
    db.execute("RESET ROLE")
    process(db)
    db.execute(f"SET ROLE {owner}")

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.execute("UPDATE autoembed.pipeline SET embeddings_table = 'foreign_vectors'")
    db.execute("SELECT autoembed.alter_pipeline('pages', storage => 'beside')")
    assert db.execute("SELECT id FROM pages_embeddings").fetchall() == [(1,)]
    db.execute("SELECT autoembed.alter_pipeline('pages', storage => 'row')")

    assert db.execute("SELECT count(embedding) FROM pages").fetchone() == (1,)
    db.execute("RESET ROLE")


def test_storage_is_beside_or_row(pages: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as refusal:
        pages.execute("SELECT autoembed.alter_pipeline('pages', storage => 'column')")
    assert refusal.value.diag.message_hint


# Another key ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("ALTER TABLE pages DROP CONSTRAINT pages_pkey, ADD PRIMARY KEY (views)", "views"),
        (
            "ALTER TABLE pages ADD COLUMN uid uuid NOT NULL DEFAULT gen_random_uuid();"
            " ALTER TABLE pages DROP CONSTRAINT pages_pkey; ALTER TABLE pages ADD PRIMARY KEY (uid);"
            " ALTER TABLE pages DROP COLUMN id; ALTER TABLE pages RENAME uid TO id",
            "id",
        ),
        ("ALTER TABLE pages DROP CONSTRAINT pages_pkey, ADD PRIMARY KEY (views, id)", "views, id"),
        ("ALTER TABLE pages DROP CONSTRAINT pages_pkey; ALTER TABLE pages ADD PRIMARY KEY (id)", "id"),
        (
            "ALTER TABLE pages DROP CONSTRAINT pages_pkey, ADD PRIMARY KEY (views, id);"
            " ALTER TABLE pages DROP CONSTRAINT pages_pkey, ADD PRIMARY KEY (id)",
            "id",
        ),
    ],
)
def test_embeddings_follow_their_rows_to_another_key(pages: Connection, api: FakeApi, change: str, key: str) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one', 2), (2, 'two', 1), (3, %s, 5)", [long_text(60)])
    process(pages)
    before = len(api.log())

    pages.execute(change)
    process(pages)
    process(pages)

    assert sent_since(api, before) == []
    joined = f"SELECT p.body, c.chunk FROM pages AS p JOIN pages_chunks AS c USING ({key}) WHERE c.chunk_number = 1"
    found = pages.execute(joined).fetchall()
    assert len(found) == 3 and all(text.startswith(chunk) for text, chunk in found)
    pages.execute("UPDATE pages SET body = 'other' WHERE body = 'one'; DELETE FROM pages WHERE body = 'two'")
    process(pages)
    assert sent_since(api, before) == ["other"]
    assert sorted(row.body for row in pages.execute(joined)) == sorted(["other", long_text(60)])
    assert waiting(pages) == 0


def test_a_row_whose_old_key_another_row_has_is_embedded_again(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one', 1), (2, 'two', 2)")
    process(pages)
    before = len(api.log())

    pages.execute("ALTER TABLE pages DROP CONSTRAINT pages_pkey; ALTER TABLE pages ALTER id DROP NOT NULL")
    pages.execute("INSERT INTO pages VALUES (1, 'uno', 3)")
    pages.execute("ALTER TABLE pages ADD PRIMARY KEY (views)")
    process(pages)
    process(pages)

    assert sorted(sent_since(api, before)) == ["one", "uno"]
    assert pages.execute("SELECT views, chunk FROM pages_chunks ORDER BY 1").fetchall() == [
        (1, "one"), (2, "two"), (3, "uno")
    ]  # fmt: skip


def test_a_key_that_leaves_no_trace_of_the_old_one_says_what_works(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one'), (2, 'two')")
    process(pages)

    with warnings_of(pages) as warnings:
        pages.execute("ALTER TABLE pages DROP COLUMN id, ADD COLUMN uid int PRIMARY KEY GENERATED ALWAYS AS IDENTITY")
    [cure] = re.findall(r"(SELECT autoembed.disable.*)", "\n".join(warnings))
    pages.execute(cure.replace("...", "content_columns => '{body}'"))
    process(pages)

    assert texts_of_chunks(pages) == [(1, "one"), (2, "two")]


@pytest.mark.parametrize("table", ["beside", "in the row"])
def test_triggers_call_nothing_that_a_writer_has_in_its_search_path(pages: Connection, table: str) -> None:
    # The function of the triggers runs as a superuser, and sets no search_path.
    if table == "in the row":
        pages.execute("SELECT autoembed.alter_pipeline('pages', storage => 'row')")
    trap = "LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'called as %', current_user; END $$"
    pages.execute("CREATE SCHEMA traps")
    for function in [
        "concat(text, text, text) RETURNS text",
        "concat(text, text) RETURNS text",
        "concat(text, text, text, text) RETURNS text",
        "clock_timestamp() RETURNS timestamptz",
        "record_image_ne(record, record) RETURNS boolean",
        "pg_column_toast_chunk_id(text) RETURNS oid",
        "pg_trigger_depth() RETURNS integer",
        "current_setting(text, boolean) RETURNS text",
    ]:
        pages.execute(f"CREATE FUNCTION traps.{function} {trap}")
    for number, (left, operator, right) in enumerate(
        [
            ("text", "=", "text"),
            ("oid", "=", "oid"),
            ("integer", "=", "integer"),
            ("integer", "+", "integer"),
            ("bigint", "-", "integer"),
            ("bigint", "/", "integer"),
            ("bigint", ">=", "integer"),
            ("bigint", "<=", "integer"),
        ]
    ):
        pages.execute(
            f"CREATE FUNCTION traps.trap_{number}({left}, {right}) RETURNS boolean {trap};"
            f"CREATE OPERATOR traps.{operator} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = traps.trap_{number})"
        )
    pages.execute("CREATE DOMAIN traps.jsonb AS pg_catalog.jsonb CHECK (VALUE IS NULL)")
    pages.execute("SET search_path = traps, pg_catalog, public")

    pages.execute("INSERT INTO pages SELECT n, 'text', 0 FROM generate_series(1, 150) AS n")
    pages.execute("UPDATE pages SET views = 1")
    pages.execute("UPDATE pages SET body = 'other' WHERE id OPERATOR(pg_catalog.<) 5")
    pages.execute("UPDATE pages SET id = 200 WHERE id OPERATOR(pg_catalog.=) 1")
    pages.execute("DELETE FROM pages WHERE id OPERATOR(pg_catalog.>) 140")
    # The INSERT has two messages, the second UPDATE four, the others and the DELETE one.
    assert pages.execute("SELECT pg_catalog.count(*) FROM pgmq.q_embedding_jobs").fetchone() == (8,)
    pages.execute("TRUNCATE pages")
    pages.execute("RESET search_path")


def test_a_lane_commits_seldom_while_it_cuts_texts(db: Connection, connect: Callable[..., Connection]) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8), autoembed.set_default_model('test')")
    db.execute("CREATE TABLE letters (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('letters', content_columns => '{body}')")
    db.execute(
        "INSERT INTO letters SELECT n, repeat('a letter of ' || n || ' words ', 40) FROM generate_series(1, 500) AS n"
    )
    commits = "SELECT xact_commit AS n FROM pg_stat_database WHERE datname = current_database()"
    session = connect()
    session.execute("SELECT pg_stat_force_next_flush()")
    [before] = db.execute(commits).fetchall()
    session.execute("CALL autoembed.work(1)")
    session.execute("SELECT pg_stat_force_next_flush()")

    [after] = db.execute(commits).fetchall()
    assert db.execute("SELECT count(*) FROM letters_embeddings").fetchone() == (500,)
    assert after.n - before.n < 250


def test_a_name_of_63_bytes_gets_an_embeddings_table_and_a_view_of_its_own(db: Connection) -> None:
    """A name is cut after so many bytes, not characters: the embeddings table would have the name of the table."""
    table = "文" * 21
    db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, body text)".encode())

    db.execute(f"SELECT autoembed.enable('{table}', content_columns => '{{body}}')".encode())

    names = db.execute(
        "SELECT c.relname FROM autoembed.pipeline AS p, "
        "LATERAL (VALUES (p.embeddings_table), (autoembed._chunks_view(p.id, p.embeddings_table))) AS r(id) "
        "JOIN pg_class AS c ON c.oid = r.id"
    ).fetchall()
    assert [row.relname for row in names] == ["文" * 17 + "_embeddings", "文" * 17 + "_chunks"]
