"""Publications of an application do not stop what autoembed does."""

from __future__ import annotations

from fake_api import FakeApi
from harness import Connection


def test_a_publication_of_all_tables_stops_no_work(db: Connection, api: FakeApi) -> None:
    db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}')")
    db.execute("INSERT INTO notes VALUES (1, 'a note')")
    db.execute("SELECT autoembed.process()")
    assert db.execute("SELECT count(embedding) FROM notes").fetchone() == (1,)

    # Usage that is old is added up, which deletes the entries.
    db.execute("UPDATE autoembed.usage_entry SET at = at - interval '1 hour'")
    db.execute("SELECT autoembed._clean_up()")

    assert db.execute("SELECT count(*) FROM autoembed.usage_entry").fetchone() == (0,)
    assert db.execute("SELECT sum(requests) FROM autoembed.usage").fetchone() == (1,)


def test_an_extension_can_be_dropped_beside_a_publication_of_all_tables(db: Connection) -> None:
    db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    db.execute("CREATE EXTENSION pg_trgm")

    db.execute("DO $$ BEGIN EXECUTE 'DROP EXTENSION pg_trgm'; END $$")

    assert db.execute("SELECT queue_name FROM pgmq.meta").fetchall() == [("embedding_jobs",)]


def test_every_logged_table_has_a_replica_identity(db: Connection) -> None:
    without = db.execute(
        "SELECT c.oid::regclass::text FROM pg_class AS c"
        " WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND c.relreplident <> 'f'"
        " AND (c.relnamespace = 'autoembed'::regnamespace OR c.oid IN ('pgmq.meta'::regclass,"
        " 'pgmq.q_embedding_jobs'::regclass))"
        " AND NOT EXISTS (SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indisprimary)"
    ).fetchall()

    assert without == []


def test_the_extension_can_be_dropped_without_cascade_when_nothing_is_attached(db: Connection) -> None:
    db.execute("DROP EXTENSION autoembed")

    assert db.execute("SELECT FROM pg_extension WHERE extname = 'autoembed'").fetchall() == []


def test_the_list_of_queues_is_kept_for_a_dump_after_another_extension_was_dropped(db: Connection) -> None:
    db.execute("CREATE EXTENSION pg_trgm")
    db.execute("DO $$ BEGIN EXECUTE 'DROP EXTENSION pg_trgm'; END $$")

    # A dump brings the entry, in place of the one that CREATE EXTENSION made.
    db.execute(
        "INSERT INTO pgmq.meta (queue_name, is_partitioned, is_unlogged) VALUES ('embedding_jobs', false, false)"
    )
