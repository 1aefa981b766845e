-- Functions that run as somebody else, and what keeps their owner's code in its place.

CREATE OR REPLACE FUNCTION autoembed._output_settings()
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT $$SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres' $$
        || $$SET extra_float_digits = 1 SET bytea_output = 'hex' SET standard_conforming_strings = on$$;
$sql$;
COMMENT ON FUNCTION autoembed._output_settings IS
    'The settings under which texts and keys are written and conditions are read, so that they do not depend on the '
    'session.';

CREATE OR REPLACE FUNCTION autoembed._plan(
    pipeline_id integer,
    max_seconds double precision,
    OUT problem text,
    OUT errcode text
)
    LANGUAGE plpython3u
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.plan(pipeline_id, max_seconds)
$python$;
COMMENT ON FUNCTION autoembed._plan IS
    'Plans the reading of a pipeline''s texts with its owner''s rights, and reads some if it is stopped. problem: why '
    'that fails; NULL if it does not, or if a lock or the time does not let it be known: then errcode says so. '
    'max_seconds: NULL: as long as it takes.';

CREATE OR REPLACE FUNCTION autoembed._as_owner(table_id regclass, query text)
    RETURNS jsonb
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _answer record;
    _void text;
BEGIN
    _void := autoembed._check_owner(table_id);
    SELECT a.* INTO _answer FROM autoembed._run_as_owner(table_id, query) AS a;
    IF _answer.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _answer.problem, ERRCODE = _answer.errcode;
    END IF;
    RETURN _answer.found;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._as_owner IS
    'The rows of a query as a JSON array. It runs with the rights of a table''s owner, which the caller must have.';

CREATE OR REPLACE FUNCTION autoembed._run_as_owner(
    table_id regclass,
    query text,
    max_seconds double precision DEFAULT NULL,
    OUT found jsonb,
    OUT problem text,
    OUT errcode text
)
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.run_as_owner(table_id, query, max_seconds)
$python$;
COMMENT ON FUNCTION autoembed._run_as_owner IS 'The work of _as_owner(), and why it fails.';

CREATE OR REPLACE FUNCTION autoembed._alter_as_owner(table_id regclass, statement text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _answer record;
BEGIN
    SELECT a.* INTO _answer FROM autoembed._run_statement_as_owner(table_id, statement) AS a;
    IF _answer.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _answer.problem, ERRCODE = _answer.errcode;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._alter_as_owner IS
    'Runs a statement that may call code of a table''s owner, with the rights of that owner.';

CREATE OR REPLACE FUNCTION autoembed._run_statement_as_owner(
    table_id regclass,
    statement text,
    OUT problem text,
    OUT errcode text
)
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.run_statement_as_owner(table_id, statement)
$python$;
COMMENT ON FUNCTION autoembed._run_statement_as_owner IS 'The work of _alter_as_owner(), and why it fails.';

CREATE OR REPLACE FUNCTION autoembed._advisory_locks()
    RETURNS text[]
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT ARRAY(
        SELECT format('%s(%s)', CASE l.mode WHEN 'ShareLock' THEN '_shared' END, CASE l.objsubid
            WHEN 1 THEN (l.classid::bigint << 32 | l.objid::bigint)::text
            ELSE format('%s, %s', l.classid::bigint::bit(32)::integer, l.objid::bigint::bit(32)::integer)
        END)
        FROM pg_locks AS l
        WHERE l.locktype = 'advisory' AND l.pid = pg_backend_pid()
    );
$sql$;
COMMENT ON FUNCTION autoembed._advisory_locks IS
    'The advisory locks of the session, each as the end of a call that takes or frees it.';

CREATE OR REPLACE FUNCTION autoembed._restore_advisory_locks(before text[])
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = error
AS $plpgsql$
DECLARE
    _was_held boolean;
    _after text[] := autoembed._advisory_locks();
    _lock text;
BEGIN
    IF before = _after THEN
        RETURN;
    END IF;
    FOR _lock IN SELECT a.lock FROM unnest(_after) AS a(lock) EXCEPT SELECT b.lock FROM unnest(before) AS b(lock) LOOP
        -- It may have been taken several times.
        LOOP
            EXECUTE 'SELECT pg_advisory_unlock' || _lock INTO _was_held;
            EXIT WHEN NOT _was_held;
        END LOOP;
    END LOOP;
    FOR _lock IN SELECT b.lock FROM unnest(before) AS b(lock) EXCEPT SELECT a.lock FROM unnest(_after) AS a(lock) LOOP
        EXECUTE 'SELECT pg_try_advisory_lock' || _lock;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._restore_advisory_locks IS
    'Takes and frees advisory locks of the session, so that they are as before an owner''s code has run.';
