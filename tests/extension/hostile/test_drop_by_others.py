"""A DROP by a role that could not drop autoembed, or of something else, changes nothing of its lanes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from extension.hostile.tenants import Tenant, stays_fresh
from harness import PASSWORD, Connection, Server
from lanes import Lane
from waiting import wait_until

# Statements of a role without rights; most of them fail, which changes nothing.
SAID = {
    "a drop of nothing": "DROP EXTENSION IF EXISTS nosuch",
    "a drop of nothing with CASCADE": "DROP EXTENSION IF EXISTS nosuch CASCADE",
    "a drop of autoembed": "SAVEPOINT s; DROP EXTENSION autoembed CASCADE",
    "a drop of pgmq": "SAVEPOINT s; DROP EXTENSION pgmq CASCADE",
    "a drop of an extension that does not exist": "SAVEPOINT s; DROP EXTENSION nosuch",
    "a drop in a function": "DO 'BEGIN DROP EXTENSION IF EXISTS nosuch; END'",
    "a drop of all that it owns": "DROP OWNED BY CURRENT_USER",
    "a drop of what is temporary": "CREATE TEMPORARY TABLE x (id int); DROP OWNED BY CURRENT_USER CASCADE",
    "a drop of another's": "SAVEPOINT s; DROP OWNED BY postgres",
}


@pytest.mark.parametrize("said", SAID)
def test_a_drop_of_a_role_without_rights_holds_up_and_ends_no_lane(
    db: Connection, bob: Tenant, nobody: Connection, lane: Lane, said: str
) -> None:
    nobody.execute("BEGIN")
    try:
        nobody.execute(SAID[said].encode())
    except psycopg.Error:
        nobody.execute("ROLLBACK TO s")

    stays_fresh(bob)
    nobody.execute("COMMIT")
    stays_fresh(bob)

    assert lane.error is None
    assert db.execute("SELECT pid FROM autoembed.lane WHERE NOT stop").fetchall() == [(lane.pid,)]


@pytest.fixture
def cron(server: Server) -> Iterator[Connection]:
    """A superuser's session in the database that has pg_cron and autoembed, where no job is scheduled."""
    with closing(server.connect()) as db:
        db.execute("CREATE ROLE plain_lane LOGIN; CREATE ROLE stranger LOGIN PASSWORD '" + PASSWORD + "'")
        yield db
        db.execute("SELECT cron.unschedule(jobid) FROM cron.job")
        db.execute("DROP EXTENSION IF EXISTS pg_trgm")
        db.execute("DROP OWNED BY plain_lane, stranger; DROP ROLE plain_lane, stranger")
        db.execute("SELECT autoembed.unschedule()")
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (0,))


JOBS = "SELECT jobid, jobname, username, database, schedule, command, active FROM cron.job ORDER BY jobid"
# Lanes that are not as schedule() makes them.
ARRANGED = {
    "no lane for backfills": "SELECT autoembed.schedule(2, 0)",
    "more lanes for backfills": "SELECT autoembed.schedule(1, 2)",
    "lanes of another role": """
        SELECT cron.schedule_in_database('autoembed-lane-1', '1 second', 'CALL autoembed.work()', 'postgres',
                                         'plain_lane')""",
    "lanes with arguments": """
        SELECT cron.schedule('autoembed-lane-1', '5 seconds', 'CALL autoembed.work(batch_size => 10)')""",
    "lanes that are switched off": """
        SELECT autoembed.schedule(1);
        SELECT cron.alter_job(jobid, active => false) FROM cron.job""",
    "lanes of another database": """
        SELECT cron.schedule_in_database('autoembed-lane-1', '1 second', 'CALL autoembed.work()', 'template1')""",
    "an index that is being built": """
        SELECT autoembed.schedule(1);
        SELECT cron.schedule('autoembed-index-1', '0 0 1 1 *', 'SELECT 1')""",
}
DROPS = {
    "another extension": "CREATE EXTENSION pg_trgm; DROP EXTENSION pg_trgm",
    "an extension that is not there": "DROP EXTENSION IF EXISTS nosuch",
    "what a role owns": "DROP OWNED BY stranger",
}


@pytest.mark.parametrize(
    ("arranged", "drop"),
    [
        *((arranged, "another extension") for arranged in ARRANGED),
        *(("no lane for backfills", drop) for drop in DROPS if drop != "another extension"),
    ],
)
def test_a_superusers_drop_of_something_else_leaves_the_jobs_as_they_were(
    cron: Connection, arranged: str, drop: str
) -> None:
    cron.execute(ARRANGED[arranged].encode())
    before = cron.execute(JOBS).fetchall()
    assert before

    cron.execute(DROPS[drop].encode())

    assert cron.execute(JOBS).fetchall() == before


def test_an_extension_dropped_with_its_owner_leaves_the_jobs_as_they_were(cron: Connection) -> None:
    cron.execute("SELECT autoembed.schedule(2, 0)")
    cron.execute("GRANT CREATE ON DATABASE postgres TO stranger")
    cron.execute("SET ROLE stranger; CREATE EXTENSION pg_trgm; RESET ROLE")
    before = cron.execute(JOBS).fetchall()

    cron.execute("DROP OWNED BY stranger CASCADE")

    assert cron.execute("SELECT FROM pg_extension WHERE extname = 'pg_trgm'").fetchall() == []
    assert cron.execute(JOBS).fetchall() == before


@pytest.mark.parametrize("drop", ["DROP OWNED BY CURRENT_USER", "DROP EXTENSION IF EXISTS nosuch"])
def test_a_stranger_who_drops_ends_no_lane_of_pg_cron(cron: Connection, server: Server, drop: str) -> None:
    def lanes() -> list[Any]:
        return cron.execute("SELECT pid FROM autoembed.lane WHERE NOT stop ORDER BY pid").fetchall()

    cron.execute("SELECT autoembed.schedule(1, 0)")
    wait_until(lambda: len(lanes()) == 1)
    before = lanes(), cron.execute(JOBS).fetchall()

    with closing(server.connect(user="stranger")) as stranger:
        for _ in range(3):
            stranger.execute(drop.encode())

    assert (lanes(), cron.execute(JOBS).fetchall()) == before
