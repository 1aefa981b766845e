"""A type is known by its identity: one of the same name, which its maker can give code, is another type."""

from __future__ import annotations

import psycopg
import pytest

from extension.hostile.tenants import (
    ATTACK,
    ENABLE_COLUMNS,
    NOTES,
    Tenant,
    assert_nothing_gained,
    stays_fresh,
    trigger,
    waiting_of,
)
from harness import Connection
from lanes import Lane
from waiting import wait_until

# A domain's check is the code of whoever made it. {type}: halfvec or vector; {schema}: where the impostor is.
IMPOSTOR = (
    ATTACK
    + """
CREATE FUNCTION attacked(v public.{type}) RETURNS boolean LANGUAGE plpgsql AS
    'BEGIN PERFORM {me}.attack(); RETURN true; END';
CREATE DOMAIN {schema}.{type} AS public.{type} CHECK ({me}.attacked(VALUE));
"""
)
TYPES = pytest.mark.parametrize("type", ["halfvec", "vector"])


def named(script: str, type: str, schema: str = "pg_temp") -> str:
    return script.replace("{type}", type).replace("{schema}", schema)


@pytest.fixture
def clerk(db: Connection, mallory: Tenant) -> Tenant:
    """A tenant who may call process() too."""
    db.execute(f"GRANT EXECUTE ON FUNCTION autoembed.process TO {mallory.name}")
    return mallory


@TYPES
@pytest.mark.parametrize("schema", ["pg_temp", "{me}"])
def test_a_domain_named_as_a_type_of_vectors_is_refused(db: Connection, clerk: Tenant, type: str, schema: str) -> None:
    clerk.run(
        named(IMPOSTOR, type, schema),
        named("CREATE TABLE notes (id int PRIMARY KEY, content text, embedding {schema}.{type})", type, schema),
    )

    with pytest.raises(psycopg.errors.DatatypeMismatch):
        clerk.run(ENABLE_COLUMNS.replace("'{content}'", "'{content}', enqueue_existing => false"))

    clerk.run("INSERT INTO notes VALUES (1, 'a note')", "SELECT autoembed.process()")
    assert_nothing_gained(db, clerk)


@TYPES
def test_a_column_that_becomes_such_a_domain_is_not_written(db: Connection, clerk: Tenant, type: str) -> None:
    clerk.run(
        named(IMPOSTOR, type),
        named("CREATE TABLE notes (id int PRIMARY KEY, content text, embedding public.{type}(8))", type),
        ENABLE_COLUMNS,
        named("ALTER TABLE notes ALTER embedding TYPE pg_temp.{type}", type),
        "INSERT INTO notes VALUES (1, 'a note')",
        "SELECT autoembed.process()",
    )

    assert clerk.session.execute("SELECT state FROM autoembed.status").fetchall() == [("stopped",)]
    assert clerk.session.execute("SELECT embedding IS NULL FROM notes").fetchall() == [(True,)]
    assert_nothing_gained(db, clerk)


@TYPES
def test_a_trigger_cannot_make_such_a_domain_in_the_lane(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, type: str
) -> None:
    """The trigger of one table makes the domain in the lane's session, and gives it to the column of another table."""
    mallory.run(
        named(IMPOSTOR, type, "{me}"),
        NOTES,
        ENABLE_COLUMNS,
        named("CREATE TABLE prey (id int PRIMARY KEY, content text, embedding public.{type}(8))", type),
        "SELECT autoembed.enable('prey', content_columns => '{content}')",
        trigger(
            named(
                """CREATE DOMAIN pg_temp.{type} AS public.{type} CHECK ({me}.attacked(VALUE));
                   ALTER TABLE {me}.prey ALTER embedding TYPE pg_temp.{type};
                   INSERT INTO {me}.prey VALUES (1, 'prey');""",
                type,
            )
        ),
        "INSERT INTO notes VALUES (1, 'a note')",
    )

    wait_until(lambda: waiting_of(db, mallory) == 0)
    stays_fresh(bob)

    assert lane.error is None
    assert_nothing_gained(db, mallory)


@pytest.mark.parametrize("place", ["BEFORE", "AFTER"])
def test_a_trigger_cannot_put_a_relation_of_its_own_in_the_way_of_what_comes_next(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, place: str
) -> None:
    """Temporary relations and types named as what statements of a lane mention without a schema, or might."""
    names = ("text", "jsonb", "int4", "bool", "regtype", "pg_proc", "pg_class", "pg_attribute", "lane", "pipeline")
    making = " ".join(
        f"""BEGIN
                CREATE DOMAIN pg_temp.{name} AS pg_catalog.text CHECK ({{me}}.attack() IS NOT NULL);
            EXCEPTION WHEN OTHERS THEN NULL; END;"""
        for name in names
    )
    mallory.run(ATTACK, NOTES, ENABLE_COLUMNS, trigger(making, f"{place} UPDATE"), "INSERT INTO notes VALUES (1, 'n')")

    wait_until(lambda: waiting_of(db, mallory) == 0)
    stays_fresh(bob)

    assert lane.error is None
    assert_nothing_gained(db, mallory)
    assert (
        db.execute(
            "SELECT typname FROM pg_type AS t JOIN pg_namespace AS n ON n.oid = t.typnamespace"
            " WHERE n.nspname LIKE 'pg\\_temp\\_%%' AND t.typowner = %s::regrole",
            [mallory.name],
        ).fetchall()
        == []
    )
