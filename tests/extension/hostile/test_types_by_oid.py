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
        "SELECT autoembed.enable('prey', 'embedding', content_columns => '{content}')",
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


# Objects that a trigger could leave in the session's temporary schema, named like those of later statements.
LEFT_BEHIND = {
    "domain": "CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK ({me}.attack() IS NOT NULL)",
    "enum": "CREATE TYPE pg_temp.jsonb AS ENUM ('a')",
    "composite type": "CREATE TYPE pg_temp.lane AS (a int)",
    "table": "CREATE TEMPORARY TABLE pipeline (a int)",
    "view": "CREATE VIEW pg_temp.pg_class AS SELECT {me}.attack()",
    "sequence": "CREATE TEMPORARY SEQUENCE pg_proc",
    "function": "CREATE FUNCTION pg_temp.now() RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN {me}.attack(); END'",
    "operator": "CREATE OPERATOR pg_temp.= (FUNCTION = pg_catalog.int4pl, LEFTARG = int, RIGHTARG = int)",
}


@pytest.mark.parametrize("act", LEFT_BEHIND.values(), ids=LEFT_BEHIND.keys())
@pytest.mark.parametrize("place", ["BEFORE", "AFTER"])
def test_a_trigger_leaves_nothing_in_the_temporary_schema_of_a_lane(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, act: str, place: str
) -> None:
    mallory.run(
        ATTACK, NOTES, ENABLE_COLUMNS, trigger(f"{act};", f"{place} UPDATE"), "INSERT INTO notes VALUES (1, 'n')"
    )

    wait_until(lambda: waiting_of(db, mallory) == 0)
    stays_fresh(bob)

    assert lane.error is None
    assert_nothing_gained(db, mallory)
    assert left_behind(db, mallory) == []


@pytest.mark.parametrize("act", LEFT_BEHIND.values(), ids=LEFT_BEHIND.keys())
def test_a_trigger_leaves_nothing_in_the_temporary_schema_of_a_caller_of_process(
    db: Connection, mallory: Tenant, act: str
) -> None:
    mallory.run(ATTACK, NOTES, ENABLE_COLUMNS, trigger(f"{act};"), "INSERT INTO notes VALUES (1, 'n')")
    db.execute("CREATE TEMPORARY TABLE mine ()")

    db.execute("SELECT autoembed.process()")

    assert_nothing_gained(db, mallory)
    assert left_behind(db, mallory) == []


def left_behind(db: Connection, tenant: Tenant) -> list[tuple[str, int]]:
    """The objects of a tenant in temporary schemas."""
    return db.execute(
        "SELECT d.classid::regclass, d.objid FROM pg_depend AS d JOIN pg_namespace AS n ON n.oid = d.refobjid"
        " JOIN pg_shdepend AS o ON (o.classid, o.objid) = (d.classid, d.objid) AND o.deptype = 'o'"
        " WHERE d.refclassid = 'pg_namespace'::regclass AND n.nspname LIKE 'pg\\_temp\\_%%'"
        " AND o.dbid = (SELECT b.oid FROM pg_database AS b WHERE b.datname = current_database())"
        " AND o.refobjid = %s::regrole",
        [tenant.name],
    ).fetchall()
