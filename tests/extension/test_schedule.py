"""Lanes as pg_cron jobs: how they come, how they go, and what becomes of them when extensions are dropped."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

from harness import (
    GUIDE_TABLE,
    GUIDE_TRIGGERS,
    Connection,
    Server,
    assert_fresh,
    insert,
    is_settled,
    run_server,
)
from waiting import wait_until

JOBS = "SELECT jobname, database, command, active FROM cron.job ORDER BY jobname"


@pytest.fixture(scope="module")
def scheduled() -> Iterator[Server]:
    """A server that starts two lanes by itself; its database postgres has pg_cron."""
    with ExitStack() as stack:
        yield run_server(stack, AUTOEMBED_LANES="2")


@pytest.fixture
def cron(scheduled: Server) -> Iterator[Connection]:
    """A session in the database with pg_cron, the extension made again, without lanes."""
    with scheduled.connect() as db:
        db.execute("DROP EXTENSION IF EXISTS autoembed CASCADE")
        db.execute("CREATE EXTENSION IF NOT EXISTS pg_cron")
        db.execute("CREATE EXTENSION autoembed CASCADE")
        yield db
        db.execute("DROP EXTENSION IF EXISTS autoembed CASCADE")


def jobs(db: Connection) -> list[str]:
    return [row.jobname for row in db.execute(JOBS)]


def lanes(db: Connection) -> set[int]:
    return {row.pid for row in db.execute("SELECT pid FROM autoembed.lane WHERE NOT stop AND NOT backfill")}


def backfill_lanes(db: Connection) -> set[int]:
    return {row.pid for row in db.execute("SELECT pid FROM autoembed.lane WHERE NOT stop AND backfill")}


def lane_sessions(db: Connection) -> list[int]:
    """The processes that run lanes, whatever the table of lanes says."""
    return [
        row.pid
        for row in db.execute(
            "SELECT pid FROM pg_stat_activity"
            " WHERE query LIKE 'CALL autoembed.work()%' AND backend_type <> 'client backend'"
        )
    ]


def test_the_image_starts_as_many_lanes_as_told(scheduled: Server) -> None:
    with scheduled.connect() as db:
        assert jobs(db) == ["autoembed-backfill-1", "autoembed-lane-1", "autoembed-lane-2"]
        wait_until(lambda: len(lanes(db)) == 2)


def test_the_image_starts_no_lane_when_told_so(server: Server) -> None:
    # The session's server has AUTOEMBED_LANES=0.
    with server.connect() as db:
        assert jobs(db) == []
        assert db.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (0,)


def test_schedule_replaces_the_lanes_that_were(cron: Connection) -> None:
    assert cron.execute("SELECT autoembed.schedule(2)").fetchone() == (2,)
    assert cron.execute(JOBS).fetchall() == [
        ("autoembed-backfill-1", "postgres", "CALL autoembed.work(backfill => true)", True),
        *((f"autoembed-lane-{n}", "postgres", "CALL autoembed.work()", True) for n in (1, 2)),
    ]
    wait_until(lambda: len(lanes(cron)) == 2)
    before = lanes(cron)

    assert cron.execute("SELECT autoembed.schedule()").fetchone() == (1,)

    wait_until(lambda: jobs(cron) == ["autoembed-backfill-1", "autoembed-lane-1"])
    wait_until(lambda: len(lanes(cron)) == 1 and not lanes(cron) & before)
    wait_until(lambda: len(lane_sessions(cron)) == 1)


def test_unschedule_ends_the_lanes_and_says_how_many(cron: Connection) -> None:
    cron.execute("SELECT autoembed.schedule(3)")
    wait_until(lambda: len(lanes(cron)) == 3)

    assert cron.execute("SELECT autoembed.unschedule()").fetchone() == (3,)

    assert cron.execute("SELECT autoembed.unschedule()").fetchone() == (0,)
    assert cron.execute("SELECT scheduled FROM autoembed._lane_jobs(false)").fetchone() == (0,)
    wait_until(lambda: not lane_sessions(cron) and not jobs(cron), 10)


def log_lines(server: Server) -> list[str]:
    return "".join(part.decode() for part in server.container.get_logs()).splitlines()


def test_a_planned_change_of_lanes_terminates_none(cron: Connection, scheduled: Server) -> None:
    """pg_cron would terminate the worker of an entry that is removed, which the log calls FATAL."""
    cron.execute("SELECT autoembed.schedule(2)")
    wait_until(lambda: len(lanes(cron)) == 2 and len(backfill_lanes(cron)) == 1)
    before = len(log_lines(scheduled))

    for change in ["schedule(1)", "unschedule()", "schedule(2)", "schedule(1, 0)", "unschedule()"]:
        lanes_before = lanes(cron) | backfill_lanes(cron)
        cron.execute(f"SELECT autoembed.{change}")
        wait_until(lambda: not (lanes(cron) | backfill_lanes(cron)) & lanes_before)  # noqa: B023
        if not change.startswith("un"):
            lane_count = int(change[9])
            wait_until(lambda: len(lanes(cron)) == lane_count)  # noqa: B023
        else:
            wait_until(lambda: not jobs(cron) and not lane_sessions(cron))

    wait_until(lambda: not jobs(cron))
    log = log_lines(scheduled)[before:]
    # On a busy machine a lane may still be ending when pg_cron sees that its entry is gone. Nine lanes have ended.
    assert len([line for line in log if "FATAL" in line]) <= 2


def test_lanes_that_are_scheduled_again_at_once_are_not_lost(cron: Connection) -> None:
    cron.execute("SELECT autoembed.schedule(2)")
    wait_until(lambda: len(lanes(cron)) == 2)
    before = lanes(cron)

    for _ in range(5):
        cron.execute("SELECT autoembed.unschedule()")
        cron.execute("SELECT autoembed.schedule(2)")

    wait_until(lambda: len(lanes(cron)) == 2 and not lanes(cron) & before)
    assert jobs(cron) == ["autoembed-backfill-1", "autoembed-lane-1", "autoembed-lane-2"]


def test_the_entry_of_a_lane_that_is_killed_on_its_way_out_is_removed_by_the_next_one(cron: Connection) -> None:
    cron.execute("SELECT autoembed.schedule(2, 0)")
    wait_until(lambda: len(lanes(cron)) == 2)
    # In one transaction, so the lane cannot end by itself before.
    with cron.transaction():
        cron.execute("SELECT autoembed.schedule(1, 0)")
        cron.execute("SELECT pg_terminate_backend(pid, 10000) FROM autoembed.lane")
    assert jobs(cron) == ["autoembed-lane-1", "autoembed-lane-2"]

    wait_until(lambda: jobs(cron) == ["autoembed-lane-1"])
    wait_until(lambda: len(lanes(cron)) == 1)


def test_what_an_unscheduled_lane_has_in_flight_is_not_lost(cron: Connection, scheduled: Server) -> None:
    api = scheduled.fake_api("in_flight")
    api.behave(hold=True)
    cron.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
    cron.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    cron.execute("DROP TABLE IF EXISTS documents CASCADE")
    cron.execute(GUIDE_TABLE.format(dimensions=1536))
    cron.execute(GUIDE_TRIGGERS)
    insert(cron, "one")
    cron.execute("SELECT autoembed.schedule(1)")
    api.wait_for(held=1)

    cron.execute("SELECT autoembed.unschedule()")
    api.release()

    wait_until(lambda: not lane_sessions(cron), 5)
    # Whether the lane has waited for the answer or not, the job is done or free at once.
    cron.execute("SELECT autoembed.process()")
    assert is_settled(cron)
    assert_fresh(cron)
    assert cron.execute("SELECT count(*) FROM autoembed.lane WHERE NOT backfill").fetchone() == (0,)


def test_lanes_leave_the_jobs_of_others_alone(cron: Connection) -> None:
    cron.execute("SELECT cron.schedule('nightly', '0 3 * * *', 'VACUUM')")
    try:
        cron.execute("SELECT autoembed.schedule(1)")
        wait_until(lambda: len(lanes(cron)) == 1)
        cron.execute("SELECT autoembed.unschedule()")
        cron.execute("DROP EXTENSION autoembed CASCADE")

        assert jobs(cron) == ["nightly"]
    finally:
        cron.execute("SELECT cron.unschedule('nightly')")


@pytest.mark.parametrize("number", ["0", "-1", "33", "NULL"])
def test_a_number_of_lanes_that_makes_no_sense_is_an_error(cron: Connection, number: str) -> None:
    cron.execute("SELECT autoembed.schedule(1)")

    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"between 1 and 32, not {number}\n") as caught:
        cron.execute(f"SELECT autoembed.schedule({number})")

    assert "unschedule" in (caught.value.diag.message_hint or "")
    assert jobs(cron) == ["autoembed-backfill-1", "autoembed-lane-1"]


@pytest.mark.parametrize("extension", ["autoembed", "pgmq", "vector", "autoembed, pgmq"])
def test_dropping_the_extension_takes_the_lanes_out_of_pg_cron_at_once(cron: Connection, extension: str) -> None:
    cron.execute("SELECT autoembed.schedule(2)")
    wait_until(lambda: len(lanes(cron)) == 2)

    cron.execute(f"DROP EXTENSION {extension} CASCADE")

    assert jobs(cron) == []
    wait_until(lambda: not lane_sessions(cron), 5)


def test_dropping_another_extension_keeps_the_lanes(cron: Connection) -> None:
    cron.execute("CREATE EXTENSION IF NOT EXISTS pgcrypto")
    cron.execute("SELECT autoembed.schedule(2)")

    cron.execute("DROP EXTENSION pgcrypto")

    assert jobs(cron) == ["autoembed-backfill-1", "autoembed-lane-1", "autoembed-lane-2"]
    wait_until(lambda: len(lanes(cron)) == 2)


def test_dropping_what_does_not_exist_keeps_the_lanes(cron: Connection) -> None:
    cron.execute("SELECT autoembed.schedule(2)")

    cron.execute("DROP EXTENSION IF EXISTS nothing_of_that_name")
    with pytest.raises(psycopg.errors.UndefinedObject):
        cron.execute("DROP EXTENSION nothing_of_that_name")
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        cron.execute("DROP EXTENSION pgmq")

    assert jobs(cron) == ["autoembed-backfill-1", "autoembed-lane-1", "autoembed-lane-2"]
    wait_until(lambda: len(lanes(cron)) == 2)


def test_a_drop_that_is_rolled_back_keeps_the_lanes(cron: Connection) -> None:
    cron.execute("SELECT autoembed.schedule(2)")

    with cron.transaction(force_rollback=True):
        cron.execute("DROP EXTENSION autoembed CASCADE")
        assert jobs(cron) == []

    assert jobs(cron) == ["autoembed-backfill-1", "autoembed-lane-1", "autoembed-lane-2"]
    wait_until(lambda: len(lanes(cron)) == 2)


def test_dropping_pg_cron_ends_the_lanes_and_is_not_hindered(cron: Connection) -> None:
    cron.execute("SELECT autoembed.schedule(1)")
    wait_until(lambda: len(lanes(cron)) == 1)

    cron.execute("DROP EXTENSION pg_cron")

    wait_until(lambda: not lane_sessions(cron), 5)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        cron.execute("SELECT autoembed.schedule(1)")


@pytest.mark.parametrize("name", ["elsewhere", 'it\'s % "else"'])
def test_without_pg_cron_the_error_says_what_to_do_and_that_works(
    scheduled: Server, cron: Connection, name: str
) -> None:
    dbname = f"{name} {uuid.uuid4().hex[:8]}"
    quoted = dbname.replace('"', '""')
    cron.execute(f'CREATE DATABASE "{quoted}"')
    try:
        with scheduled.connect(dbname) as db:
            db.execute("CREATE EXTENSION autoembed CASCADE")

            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as caught:
                db.execute("SELECT autoembed.schedule()")

            diagnostic = caught.value.diag
            assert diagnostic.message_primary == f'pg_cron is not installed in database "{dbname}"'
            assert diagnostic.message_detail
            assert "CREATE EXTENSION" not in (diagnostic.message_hint or "")
            statement = re.search(r"SELECT cron\.schedule_in_database\(.*;", diagnostic.message_hint or "")
            assert statement
            cron.execute("SELECT autoembed.schedule()")
            cron.execute(statement[0].encode())
            wait_until(lambda: len(lanes(db)) == 1)
            # The lanes of the first database are where they were.
            wait_until(lambda: len(lanes(cron)) == 1)
            assert [
                (row.database, row.jobname.split("@")[0]) for row in cron.execute(JOBS) if row.database == dbname
            ] == [
                (dbname, "autoembed-backfill-1"),
                (dbname, "autoembed-lane-1"),
            ]
            cron.execute("SELECT autoembed.unschedule()")
            wait_until(lambda: [row.database for row in cron.execute(JOBS)] == [dbname, dbname])
            # They end for good only where pg_cron is.
            cron.execute("SELECT cron.unschedule(jobid) FROM cron.job WHERE database = %s", [dbname])
            assert db.execute("SELECT autoembed.unschedule()").fetchone() == (0,)
            # pg_cron may terminate a lane before it signs off.
            alive = "SELECT count(*) FROM autoembed.lane WHERE autoembed._lane_lives(pid, backend_start)"
            wait_until(lambda: db.execute(alive).fetchone() == (0,), 5)
    finally:
        cron.execute("SELECT cron.unschedule(jobid) FROM cron.job")
        cron.execute(f'DROP DATABASE "{quoted}" WITH (FORCE)')


def test_a_lane_deletes_what_pg_cron_noted_of_lanes_an_hour_ago(cron: Connection) -> None:
    """pg_cron keeps such notes for ever, a dozen an hour of each lane. Lanes of other databases cannot reach them."""
    lane, other = "CALL autoembed.work()", "SELECT 1"
    cron.execute("DELETE FROM cron.job_run_details")
    for command, database, status, started in [
        (lane, "postgres", "failed", None),
        (lane, "postgres", "succeeded", "2 hours"),
        (lane, "postgres", "running", "2 hours"),
        (lane, "elsewhere", "succeeded", "2 hours"),
        (other, "postgres", "succeeded", "2 hours"),
        (lane, "postgres", "succeeded", "50 minutes"),
        (other, "postgres", "succeeded", "5 minutes"),
    ]:
        cron.execute(
            "INSERT INTO cron.job_run_details (command, database, username, status, start_time)"
            " VALUES (%s, %s, current_user, %s, now() - %s::interval)",
            [command, database, status, started],
        )

    cron.execute("CALL autoembed.work(run_seconds => 0)")

    assert cron.execute(
        "SELECT command, database, status, date_trunc('hour', now() - start_time) = '2 hours' AS old"
        " FROM cron.job_run_details ORDER BY runid"
    ).fetchall() == [
        (lane, "postgres", "running", True),
        (other, "postgres", "succeeded", True),
        (lane, "postgres", "succeeded", False),
        (other, "postgres", "succeeded", False),
    ]


def test_a_dropped_database_leaves_no_lane_behind(scheduled: Server, cron: Connection) -> None:
    dbname = f"dropped_{uuid.uuid4().hex[:8]}"
    cron.execute(f"CREATE DATABASE {dbname}")
    with scheduled.connect(dbname) as db:
        db.execute("CREATE EXTENSION autoembed CASCADE")
        [statement] = db.execute("SELECT autoembed._schedule_statement() AS sql").fetchall()
        cron.execute(statement.sql)
        wait_until(lambda: len(lanes(db)) == 1)

    # No lane is asked to end before.
    cron.execute(f"DROP DATABASE {dbname} WITH (FORCE)")

    found = cron.execute("SELECT * FROM autoembed.doctor() WHERE subject LIKE 'job %' ORDER BY subject").fetchall()
    assert [(row.subject, row.ok, row.finding) for row in found] == [
        (f"job autoembed-{kind}-1@{dbname}", False, f'database "{dbname}" does not exist')
        for kind in ("backfill", "lane")
    ]
    cron.execute(found[0].advice)
    cron.execute("CALL autoembed.work(run_seconds => 0)")
    assert jobs(cron) == []


def test_a_job_of_a_dropped_role_that_keeps_lanes_from_starting_is_named(cron: Connection) -> None:
    role = f"former_{uuid.uuid4().hex[:8]}"
    cron.execute(f"CREATE ROLE {role} LOGIN")
    cron.execute("SELECT cron.schedule_in_database('report', '0 0 1 1 *', 'SELECT 1', 'postgres', %s)", [role])
    cron.execute(f"DROP ROLE {role}")
    cron.execute("SELECT autoembed.schedule()")
    wait_until(lambda: not lane_check(cron).ok, 60)

    [found] = cron.execute("SELECT * FROM autoembed.doctor() WHERE subject LIKE 'job %'").fetchall()

    assert (found.subject, found.ok) == ("job report", False)
    assert found.finding == f'role "{role}" does not exist, and pg_cron starts no job of anybody'
    cron.execute(found.advice)
    wait_until(lambda: lane_check(cron).ok, 60)


def test_the_setting_that_keeps_all_jobs_from_starting_is_named(cron: Connection) -> None:
    cron.execute("ALTER SYSTEM SET cron.launch_active_jobs = off")
    try:
        cron.execute("SELECT pg_reload_conf(), autoembed.schedule()")
        wait_until(lambda: not lane_check(cron).ok, 60)

        advice = lane_check(cron).advice
        assert advice == "ALTER SYSTEM SET cron.launch_active_jobs = on; SELECT pg_reload_conf();"
        for statement in advice.split("; "):
            cron.execute(statement)

        wait_until(lambda: lane_check(cron).ok, 60)
    finally:
        cron.execute("ALTER SYSTEM RESET cron.launch_active_jobs")
        cron.execute("SELECT pg_reload_conf()")


def test_the_reason_of_a_lane_that_fails_is_told_while_the_next_one_starts(cron: Connection) -> None:
    cron.execute("DELETE FROM cron.job_run_details")
    cron.execute("SELECT cron.schedule('autoembed-lane-1', '0 0 2 1 *', 'CALL autoembed.work()')")
    for status, message in [("succeeded", "CALL"), ("failed", "ERROR: no"), ("running", None)]:
        cron.execute(
            "INSERT INTO cron.job_run_details (jobid, command, database, username, status, return_message)"
            " SELECT jobid, command, database, username, %s, %s FROM cron.job",
            [status, message],
        )

    told = "SELECT last_message FROM autoembed._lane_jobs(false)"
    assert cron.execute(told).fetchone() == ("ERROR: no",)
    cron.execute("UPDATE cron.job_run_details SET status = 'succeeded' WHERE status = 'running'")
    assert cron.execute(told).fetchone() == (None,)


def check(db: Connection, subject: str) -> tuple[object, ...]:
    row = db.execute("SELECT ok, finding, advice FROM autoembed.doctor() WHERE subject = %s", [subject]).fetchone()
    assert row is not None
    return tuple(row)


def wait_for_others(db: Connection, seen: set[int]) -> set[int]:
    """The lanes that have begun since."""
    return wait_until(lambda: lanes(db) - seen, 30)


def test_a_short_statement_timeout_of_the_database_stops_no_work(cron: Connection, scheduled: Server) -> None:
    api = scheduled.fake_api("short")
    cron.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
    cron.execute("DROP TABLE IF EXISTS short_lived")
    cron.execute("CREATE TABLE short_lived (id int PRIMARY KEY, body text)")
    cron.execute("ALTER DATABASE postgres SET statement_timeout = '3s'")
    try:
        cron.execute(
            "SELECT autoembed.enable('short_lived', content_columns => '{body}', model => 'text-embedding-3-small')"
        )
        cron.execute("SELECT autoembed.schedule(1)")
        wait_until(lambda: lanes(cron))
        seen = lanes(cron)
        for n in range(3):
            rows = f"generate_series({100 * n}, {100 * n + 99})"
            cron.execute(f"INSERT INTO short_lived SELECT n, 'text ' || n FROM {rows} AS n".encode())
            seen |= wait_for_others(cron, seen)
        count = "SELECT count(*) FROM short_lived_embeddings"
        wait_until(lambda: cron.execute(count).fetchone() == (300,), 60)
        assert cron.execute("SELECT count(*) FROM autoembed.failure").fetchone() == (0,)
    finally:
        cron.execute("ALTER DATABASE postgres RESET statement_timeout")
        cron.execute("SELECT autoembed.unschedule()")
        cron.execute("DROP TABLE short_lived CASCADE")


def test_doctor_tells_lanes_for_backfills_from_the_others(cron: Connection) -> None:
    cron.execute("SELECT autoembed.schedule(2)")
    wait_until(lambda: len(lanes(cron)) == 2 and len(backfill_lanes(cron)) == 1)
    assert check(cron, "lanes") == (True, "2 running, 2 scheduled", None)
    assert check(cron, "backfill lanes") == (True, "1 running, 1 scheduled", None)

    cron.execute("SELECT autoembed.schedule(1, 0)")
    wait_until(lambda: len(lanes(cron)) == 1 and not backfill_lanes(cron))
    assert check(cron, "backfill lanes") == (True, "0 running, 0 scheduled", None)

    # Only the lane for backfills is there: nothing that changes is embedded.
    cron.execute("SELECT cron.unschedule('autoembed-lane-1')")
    cron.execute("SELECT cron.schedule('autoembed-backfill-1', '1 second', 'CALL autoembed.work(backfill => true)')")
    wait_until(lambda: not lanes(cron) and len(backfill_lanes(cron)) == 1)
    assert check(cron, "lanes") == (False, "0 running, 0 scheduled", "SELECT autoembed.schedule();")


def test_doctor_names_the_setting_that_keeps_lanes_from_starting(cron: Connection) -> None:
    """cron.max_running_jobs is 5 by default."""
    cron.execute("SELECT autoembed.schedule(7, 0)")
    wait_until(lambda: len(lanes(cron)) == 5)

    ok, finding, advice = check(cron, "lanes")

    assert (ok, finding) == (False, "5 running, 7 scheduled, cron.max_running_jobs is 5, and all are in use")
    assert "cron.max_running_jobs" in str(advice)


def test_doctor_names_a_lane_that_does_not_go_on(cron: Connection, scheduled: Server) -> None:
    cron.execute("SELECT autoembed.schedule(1)")
    wait_until(lambda: len(lanes(cron)) == 1)
    [pid] = lanes(cron)
    # A lane that starts on a busy machine does nothing for a second too.
    frozen = f"SELECT ok, finding, advice FROM autoembed._lane_checks('1 second') WHERE subject = 'lane {pid}'"
    scheduled.container.get_wrapped_container().exec_run(["kill", "-STOP", str(pid)])
    try:
        [row] = wait_until(lambda: cron.execute(frozen).fetchall())
    finally:
        scheduled.container.get_wrapped_container().exec_run(["kill", "-CONT", str(pid)])

    assert not row.ok
    assert row.finding.startswith("has done nothing for 00:00:0")
    assert f"pg_terminate_backend({pid})" in row.advice
    # A lane that waits for work goes on all the time.
    wait_until(lambda: not cron.execute(frozen).fetchall())


def test_the_role_that_runs_the_lanes_cannot_be_dropped(cron: Connection) -> None:
    role = f"boss_{uuid.uuid4().hex[:12]}"
    cron.execute(f"CREATE ROLE {role} SUPERUSER LOGIN")
    try:
        cron.execute(f"SELECT autoembed.schedule(1, 0, '{role}')")
        with pytest.raises(psycopg.errors.DependentObjectsStillExist):
            cron.execute(f"DROP ROLE {role}")
        cron.execute("SELECT autoembed.unschedule()")
        wait_until(lambda: lane_sessions(cron) == [], 60)
        cron.execute(f"SELECT autoembed.schedule(1, 0, '{role}')")
    finally:
        cron.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")

    # The jobs of such a role fail each second.
    wait_until(lambda: not lane_check(cron).ok, 60)
    advice = lane_check(cron).advice
    assert advice == f"Role {role} does not exist. SELECT autoembed.schedule(); makes the jobs again."
    cron.execute("SELECT autoembed.schedule()")
    assert {row.username for row in cron.execute("SELECT username FROM cron.job")} == {"postgres"}
    wait_until(lambda: lane_check(cron).ok, 60)


def lane_check(db: Connection) -> Any:
    return db.execute("SELECT ok, advice FROM autoembed.doctor() WHERE subject = 'lanes'").fetchone()
