"""PostgreSQL's guards around an owner's code: the server's functions are there, and its state is put back each time."""

from __future__ import annotations

import psycopg
import pytest

from harness import Connection

# Ends by itself, though not soon.
CATCHES_EVERY_CANCEL = """
    DO $$
    BEGIN
        WHILE clock_timestamp() < now() + interval '10 s' LOOP
            BEGIN
                PERFORM pg_sleep(3);
            EXCEPTION WHEN query_canceled THEN
                NULL;
            END;
        END LOOP;
    END $$
"""
# Each level catches the cancel that ended the one below, and begins again.
CATCHES_AT_TEN_LEVELS = """
    DO $$
    BEGIN
        EXECUTE (
            SELECT format('DO $code$ BEGIN %s %s END $code$',
                repeat('WHILE clock_timestamp() < now() + interval ''10 s'' LOOP BEGIN ', 10) || 'PERFORM pg_sleep(3);',
                repeat(' EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP;', 10)));
    END $$
"""
PROBE = """
    CREATE FUNCTION state() RETURNS text LANGUAGE plpython3u AS $python$
        import ctypes

        user, flags = ctypes.c_uint(), ctypes.c_int()
        library = ctypes.PyDLL(None)
        library.GetUserIdAndSecContext(ctypes.byref(user), ctypes.byref(flags))
        settings = plpy.execute(
            "SELECT string_agg(name || '=' || setting, ' ' ORDER BY name) AS all"
            " FROM pg_settings WHERE source = 'session'"
        )[0]["all"]
        return f"{user.value} {flags.value} {library.get_timeout_active(3)} {settings}"
    $python$;
    CREATE FUNCTION guarded(statement text, seconds double precision, times integer DEFAULT 1)
        RETURNS text LANGUAGE plpython3u AS $python$
        import contextlib

        plpy.execute("SELECT autoembed._load_python()")
        from autoembed.restricted import restricted

        runs = []
        try:
            with contextlib.ExitStack() as stack:
                for _ in range(times):
                    stack.enter_context(plpy.subtransaction())
                    runs.append(stack.enter_context(restricted(seconds)))
                plpy.execute(statement)
        except plpy.SPIError as error:
            return f"{error.sqlstate}{' timed out' if any(run.timed_out for run in runs) else ''}"
        return "done"
    $python$;
"""


@pytest.fixture
def probe(db: Connection) -> Connection:
    db.execute(PROBE)
    return db


def one(db: Connection, sql: str, *arguments: object) -> object:
    row = db.execute(sql, arguments).fetchone()
    assert row is not None
    return row[0]


def test_this_server_has_the_guards(probe: Connection) -> None:
    probe.execute("""
        CREATE FUNCTION has_guards() RETURNS boolean LANGUAGE plpython3u AS $python$
            plpy.execute("SELECT autoembed._load_python()")
            from autoembed import restricted
            return restricted.available()
        $python$
    """)

    assert one(probe, "SELECT has_guards()") is True


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize(
    ("statement", "outcome"),
    [
        ("SELECT 1", "done"),
        ("SELECT set_config('work_mem', '1MB', false), set_config('app.tenant', 'x', false)", "done"),
        ("SELECT set_config('search_path', 'nowhere', false)", "done"),
        ("SELECT 1 / 0", "22012"),
        ("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'query_canceled'; END $$", "57014"),
        ("SELECT pg_sleep(30)", "57014 timed out"),
        (CATCHES_EVERY_CANCEL, "57014 timed out"),
        (CATCHES_AT_TEN_LEVELS, "57014 timed out"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "42501"),
        ("PREPARE p AS SELECT 1", "42501"),
        ("LISTEN somebody", "42501"),
        ("CREATE TEMPORARY TABLE t (a integer)", "42501"),
    ],
)
def test_user_settings_and_timer_are_as_before_whatever_ran(
    probe: Connection, statement: str, outcome: str, times: int
) -> None:
    before = one(probe, "SELECT state()")

    assert one(probe, "SELECT guarded(%s, 0.3, %s)", statement, times) == outcome

    assert one(probe, "SELECT state()") == before
    assert one(probe, "SELECT count(*) FROM pg_cursors WHERE is_holdable") == 0
    assert one(probe, "SELECT coalesce(current_setting('app.tenant', true), '')") == ""


def test_a_role_without_rights_cannot_end_the_session_by_a_setting(probe: Connection, dbname: str) -> None:
    role = f"plain_{dbname}"
    probe.execute(f"""
        CREATE ROLE {role};
        CREATE FUNCTION attack() RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            EXECUTE 'SET transaction_timeout = 0';
            EXECUTE 'SET transaction_timeout = 1';
            PERFORM pg_sleep(0.1);
            RETURN 'alive';
        END $$;
        ALTER FUNCTION attack() OWNER TO {role}
    """)

    assert one(probe, "SELECT guarded('SELECT attack()', 5)") == "42501"
    # The setting is the session's own again afterwards.
    probe.execute("SET transaction_timeout = '1h'")
    probe.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_the_sessions_own_timeout_still_strikes_inside_and_outside(probe: Connection) -> None:
    probe.execute("SET statement_timeout = '300ms'")

    with pytest.raises(psycopg.errors.QueryCanceled):
        probe.execute("SELECT guarded('SELECT pg_sleep(0.05)', 5), pg_sleep(30)")
    assert one(probe, "SELECT guarded('SELECT pg_sleep(30)', 5)") == "57014"


def test_a_limit_that_strikes_too_late_cancels_nothing_else(probe: Connection) -> None:
    for _ in range(50):
        assert one(probe, "SELECT guarded('SELECT pg_sleep(0.01)', 0.01)") in ("done", "57014 timed out")
        assert one(probe, "SELECT count(*) FROM generate_series(1, 10000)") == 10000
