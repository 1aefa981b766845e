-- Lanes as jobs of pg_cron. Only this file names pg_cron's objects.

CREATE OR REPLACE FUNCTION autoembed._cron_is_here()
    RETURNS boolean
    LANGUAGE sql
    STABLE
    -- An owner may not look into the schema of pg_cron.
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT to_regclass('cron.job') IS NOT NULL;
$sql$;
COMMENT ON FUNCTION autoembed._cron_is_here IS 'Whether pg_cron is installed in this database.';

CREATE OR REPLACE FUNCTION autoembed._cron_places()
    RETURNS integer
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- 5 is pg_cron's default with background workers. Without them its default is higher.
    SELECT coalesce(current_setting('cron.max_running_jobs', true)::integer, 5);
$sql$;
COMMENT ON FUNCTION autoembed._cron_places IS 'How many jobs pg_cron runs at a time.';

CREATE OR REPLACE FUNCTION autoembed._never()
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT '0 0 1 1 *';
$sql$;
COMMENT ON FUNCTION autoembed._never IS
    'The schedule, once a year, of an entry of pg_cron that is not to begin again, but must stay while its run lasts.';

CREATE OR REPLACE FUNCTION autoembed._backfill_lane_is_scheduled()
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF NOT autoembed._cron_is_here() THEN
        RETURN false;
    END IF;
    RETURN EXISTS (
        SELECT FROM cron.job AS j
        WHERE j.active AND j.schedule <> autoembed._never()
          AND j.jobname ~ '^autoembed-backfill-[0-9]+(@.*)?$' AND j.database = current_database()
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._backfill_lane_is_scheduled IS
    'Whether pg_cron starts a lane for backfills in this database.';

CREATE OR REPLACE FUNCTION autoembed._index_may_be_built(pipeline_id integer)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- Builds run one at a time: each may wait long for old snapshots, and a lane that begins again must find a place.
    SELECT NOT EXISTS (
               SELECT FROM cron.job AS j
               WHERE j.jobname ~ '^autoembed-index-[0-9]+$' AND j.jobname <> 'autoembed-index-' || pipeline_id
           )
           AND (SELECT count(*) FROM cron.job AS j
                WHERE j.active AND j.jobname ~ '^autoembed-(lane|backfill)-[0-9]+(@.*)?$') < autoembed._cron_places();
$sql$;
COMMENT ON FUNCTION autoembed._index_may_be_built IS
    'Whether pg_cron can build the index of a pipeline without taking the place of a lane.';

CREATE OR REPLACE FUNCTION autoembed._schedule_statement()
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- A job of the same name would be moved here from its database, so the name has the database in it.
    SELECT format('SELECT %s;', string_agg(format(
        'cron.schedule_in_database(%L, %L, %L, %L) AS %I',
        format('autoembed-%s-1@%s', j.kind, current_database()), '1 second', j.command, current_database(), j.kind
    ), ', ' ORDER BY j.kind DESC))
    FROM (VALUES
        ('lane', 'CALL autoembed.work()'),
        ('backfill', 'CALL autoembed.work(backfill => true)')
    ) AS j(kind, command);
$sql$;
COMMENT ON FUNCTION autoembed._schedule_statement IS
    'The statement that schedules a lane, and one for backfills, for this database in the database of pg_cron.';

-- pg_cron terminates the worker of an entry that is removed, which the server's log calls FATAL. So the entry of a lane
-- that runs is retired: its schedule is once a year, and the lane removes it as the last thing that it does.
CREATE OR REPLACE FUNCTION autoembed._job_of_lane(pid integer)
    RETURNS bigint
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT d.jobid
        FROM cron.job_run_details AS d
        WHERE d.job_pid = _job_of_lane.pid AND d.status = 'running'
        ORDER BY d.runid DESC
        LIMIT 1
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._job_of_lane IS
    'The entry of pg_cron that a lane runs for. NULL: another scheduler''s, or pg_cron keeps no notes of its runs.';

CREATE OR REPLACE FUNCTION autoembed._job_runs(jobid bigint)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN EXISTS (
        SELECT FROM cron.job_run_details AS d
        WHERE d.jobid = _job_runs.jobid AND (
            d.status = 'starting'
            OR d.status = 'running' AND EXISTS (SELECT FROM pg_stat_get_activity(d.job_pid))
        )
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._job_runs IS 'Whether pg_cron has started an entry that has not ended.';

CREATE OR REPLACE FUNCTION autoembed._is_retired(pid integer)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF NOT autoembed._cron_is_here() THEN
        RETURN false;
    END IF;
    -- Each lane asks once a second. Notes of runs, perhaps millions, are read only while an entry is retired.
    IF NOT EXISTS (
        SELECT FROM cron.job AS j
        WHERE j.schedule = autoembed._never() AND j.jobname ~ '^autoembed-(lane|backfill)-'
          AND j.database = current_database()
    ) THEN
        RETURN false;
    END IF;
    RETURN EXISTS (
        SELECT FROM cron.job AS j
        WHERE j.schedule = autoembed._never() AND j.jobid = autoembed._job_of_lane(_is_retired.pid)
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._is_retired IS 'Whether the entry of a lane in pg_cron is retired.';

CREATE OR REPLACE FUNCTION autoembed._remove_retired_job(pid integer)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF autoembed._is_retired(pid) THEN
        -- Not cron.unschedule(): an entry that is scheduled again at this moment stays.
        DELETE FROM cron.job AS j
        WHERE j.schedule = autoembed._never() AND j.jobid = autoembed._job_of_lane(_remove_retired_job.pid);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._remove_retired_job IS 'Removes the entry of a lane from pg_cron if it is retired.';

CREATE OR REPLACE FUNCTION autoembed._unschedule(jobs text)
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _job record;
    _unscheduled integer := 0;
BEGIN
    IF NOT autoembed._cron_is_here() THEN
        RETURN 0;
    END IF;
    FOR _job IN
        SELECT j.jobid, j.schedule = autoembed._never() AS is_held,
               j.jobname !~ '^autoembed-index-' AND autoembed._job_runs(j.jobid) AS is_running
        FROM cron.job AS j
        WHERE j.jobname ~ format('^autoembed-%s(@.*)?$', jobs) AND j.database = current_database()
    LOOP
        CONTINUE WHEN _job.is_running AND _job.is_held;
        IF _job.is_running THEN
            PERFORM cron.alter_job(_job.jobid, schedule => autoembed._never());
        ELSE
            PERFORM cron.unschedule(_job.jobid);
        END IF;
        _unscheduled := _unscheduled + 1;
    END LOOP;
    RETURN _unscheduled;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._unschedule IS
    'Takes out of pg_cron the entries whose names match, and returns their number. Those of lanes that run are '
    'retired. jobs: a regular expression.';

CREATE OR REPLACE FUNCTION autoembed.unschedule()
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    UPDATE autoembed.lane SET stop = true;
    -- No lane would watch the builds of indexes. The next lane starts them again.
    PERFORM autoembed._unschedule('(backfill|index)-[0-9]+');
    RETURN autoembed._unschedule('lane-[0-9]+');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.unschedule IS
    'Ends all lanes. Returns how many were scheduled, not counting those for backfills. Rows in flight go back to the '
    'queue.';

CREATE OR REPLACE FUNCTION autoembed.schedule(
    lanes integer DEFAULT 1,
    backfill_lanes integer DEFAULT 1,
    role regrole DEFAULT NULL
)
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _role text := (SELECT r.rolname FROM pg_roles AS r WHERE r.oid = role);
BEGIN
    IF lanes IS NULL OR lanes NOT BETWEEN 1 AND 32 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('lanes must be between 1 and 32, not %s', coalesce(lanes::text, 'NULL')),
            HINT = 'autoembed.unschedule() ends all lanes.';
    END IF;
    IF backfill_lanes IS NULL OR backfill_lanes NOT BETWEEN 0 AND 32 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('backfill_lanes must be between 0 and 32, not %s', coalesce(backfill_lanes::text, 'NULL')),
            HINT = 'With 0, the other lanes do backfills when nothing else waits.';
    END IF;
    IF NOT autoembed._cron_is_here() THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('pg_cron is not installed in database "%s"', current_database()),
            DETAIL = 'pg_cron can be in one database of a server only, the one that cron.database_name names.',
            HINT = autoembed._start_advice();
    END IF;
    -- pg_cron's own worker and that of logical replication run as well.
    IF current_setting('cron.use_background_workers')::boolean
       AND lanes + backfill_lanes > current_setting('max_worker_processes')::integer - 3 THEN
        RAISE WARNING USING
            ERRCODE = 'configuration_limit_exceeded',
            MESSAGE = format('max_worker_processes is %s, which is too low for %s lanes',
                             current_setting('max_worker_processes'), lanes + backfill_lanes),
            HINT = format('Set max_worker_processes to at least %s and restart the server.',
                          lanes + backfill_lanes + 3);
    ELSIF lanes + backfill_lanes >= autoembed._cron_places() THEN
        RAISE WARNING USING
            ERRCODE = 'configuration_limit_exceeded',
            MESSAGE = format('%s lanes leave no place for other jobs of pg_cron, which runs %s jobs at a time',
                             lanes + backfill_lanes, autoembed._cron_places()),
            HINT = format('Set cron.max_running_jobs to at least %s and restart the server.',
                          lanes + backfill_lanes + 2);
    END IF;
    UPDATE autoembed.lane SET stop = true;
    -- Without an argument, the lanes keep the role that was chosen for them before.
    _role := coalesce(_role, (
        SELECT j.username
        FROM cron.job AS j
        JOIN pg_roles AS r ON r.rolname = j.username
        WHERE j.jobname ~ '^autoembed-(lane|backfill)-[0-9]+(@.*)?$' AND j.database = current_database()
        LIMIT 1
    ), current_user);
    -- PostgreSQL does not drop a role that has a right. Jobs of a role that is gone fail each second.
    EXECUTE format('GRANT USAGE ON SCHEMA autoembed TO %I', _role);
    PERFORM autoembed._unschedule('(lane|backfill)-[0-9]+');
    PERFORM cron.schedule_in_database(
        'autoembed-lane-' || n, '1 second', 'CALL autoembed.work()', current_database(), _role
    )
    FROM generate_series(1, lanes) AS n;
    PERFORM cron.schedule_in_database(
        'autoembed-backfill-' || n, '1 second', 'CALL autoembed.work(backfill => true)', current_database(), _role
    )
    FROM generate_series(1, backfill_lanes) AS n;
    RETURN lanes;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.schedule IS
    'Has pg_cron run that many lanes in this database (1 to 32), and that many more for backfills (0 to 32), in place '
    'of those that it ran before. role: whose rights they have; NULL: that of the lanes before, or the caller''s. '
    'Returns the number of lanes, not counting those for backfills.';

CREATE OR REPLACE FUNCTION autoembed._broken_jobs()
    RETURNS TABLE (jobid bigint, name text, is_of_dropped_database boolean, problem text)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF autoembed._cron_is_here() THEN
        RETURN QUERY
        SELECT j.jobid, coalesce(j.jobname::text, j.jobid::text), d.datname IS NULL, CASE
                   WHEN r.rolname IS NULL THEN
                       format('role "%s" does not exist, and pg_cron starts no job of anybody', j.username)
                   ELSE format('database "%s" does not exist', j.database)
               END
        FROM cron.job AS j
        LEFT JOIN pg_database AS d ON d.datname = j.database
        LEFT JOIN pg_roles AS r ON r.rolname = j.username
        WHERE r.rolname IS NULL
           OR d.datname IS NULL AND j.jobname ~ '^autoembed-(lane|backfill)-[0-9]+(@.*)?$';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._broken_jobs IS
    'The lanes that pg_cron is to run in databases that do not exist, and all jobs of roles that do not exist: for one '
    'of these, pg_cron ends each time that it reads its list.';

CREATE OR REPLACE FUNCTION autoembed._forget_runs()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF to_regclass('cron.job_run_details') IS NOT NULL THEN
        PERFORM cron.unschedule(j.jobid) FROM autoembed._broken_jobs() AS j WHERE j.is_of_dropped_database;
        -- Those of lanes that were killed before they could remove them.
        PERFORM cron.unschedule(j.jobid)
        FROM cron.job AS j
        WHERE j.jobname ~ '^autoembed-(lane|backfill)-[0-9]+(@.*)?$' AND j.database = current_database()
          AND j.schedule = autoembed._never() AND NOT autoembed._job_runs(j.jobid);
        -- Lanes of other databases cannot do this. A run that never started has no start_time, so runid tells its age.
        DELETE FROM cron.job_run_details AS d
        WHERE d.command LIKE 'CALL autoembed.work(%'
          AND d.status NOT IN ('starting', 'running')
          AND d.runid < (
              SELECT min(r.runid)
              FROM cron.job_run_details AS r
              WHERE r.start_time > clock_timestamp() - interval '1 hour'
          );
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_runs IS
    'Deletes pg_cron''s records of runs of lanes that are more than an hour old, and the lanes of databases that '
    'were dropped, or that ended without removing their retired entries.';

CREATE OR REPLACE FUNCTION autoembed._lane_jobs(
    backfill boolean,
    OUT scheduled bigint,
    OUT last_message text,
    OUT missing_role text
)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF autoembed._cron_is_here() THEN
        SELECT count(*), (
            SELECT split_part(d.return_message, E'\n', 1)
            FROM cron.job_run_details AS d
            WHERE d.jobid = ANY (array_agg(j.jobid)) AND d.status = 'failed'
              -- A run that goes on, or was stopped for a new one, has no reason.
              AND NOT EXISTS (
                  SELECT FROM cron.job_run_details AS s
                  WHERE s.jobid = d.jobid AND s.runid > d.runid AND s.status = 'succeeded'
              )
            ORDER BY d.runid DESC
            LIMIT 1
        ), min(j.username) FILTER (WHERE to_regrole(quote_ident(j.username)) IS NULL)
        INTO scheduled, last_message, missing_role
        FROM cron.job AS j
        WHERE j.active AND j.schedule <> autoembed._never()
          AND j.database = current_database() AND j.command ~ 'autoembed[.]work'
          AND (j.command ~ 'backfill *=> *true') = _lane_jobs.backfill;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lane_jobs IS
    'The number of lanes that pg_cron is to run in this database, of those for backfills or of the others, and the '
    'message with which the last one failed, if none has ended well since. missing_role: the one that is to run them '
    'and does not exist. NULLs without pg_cron.';

CREATE OR REPLACE FUNCTION autoembed._full_limit(OUT name text, OUT problem text)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT l.name, format('%s is %s, and all are in use', l.name, l.most)
    FROM (
        SELECT count(*) FILTER (WHERE a.backend_type = 'pg_cron') AS of_cron,
               -- All types but those of the server's own processes are background workers.
               count(*) FILTER (WHERE a.backend_type !~ '^(client backend|autovacuum .*|background writer|checkpointer|'
                   'wal.*|startup|archiver|io worker|slotsync worker|standalone backend|logger)$') AS workers
        FROM pg_stat_activity AS a
    ) AS u
    CROSS JOIN LATERAL (VALUES
        ('cron.max_running_jobs', autoembed._cron_places(), u.of_cron),
        ('max_worker_processes', current_setting('max_worker_processes')::integer, u.workers)
    ) AS l(name, most, used)
    WHERE l.used >= l.most AND to_regclass('cron.job') IS NOT NULL
    ORDER BY l.name
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._full_limit IS
    'The setting that keeps pg_cron from running more jobs at present; NULLs: none does.';

CREATE OR REPLACE FUNCTION autoembed._start_advice()
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT CASE
        WHEN autoembed._cron_is_here() THEN 'SELECT autoembed.schedule();'
        WHEN current_setting('cron.database_name', true) IS NULL THEN
            'Set shared_preload_libraries = ''pg_cron'', restart the server, and call autoembed.doctor() again. '
            'Or have another scheduler run CALL autoembed.work().'
        WHEN current_setting('cron.database_name') = current_database() THEN
            'CREATE EXTENSION pg_cron; SELECT autoembed.schedule();'
        ELSE
            format('In database "%s": %s', current_setting('cron.database_name'), autoembed._schedule_statement())
    END;
$sql$;
COMMENT ON FUNCTION autoembed._start_advice IS 'The advice on how to have lanes run in this database.';

CREATE OR REPLACE FUNCTION autoembed._index_job(pipeline_id integer, OUT is_due boolean, OUT problem text)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    SELECT j.schedule <> autoembed._never(), (
        -- A build may end in a deadlock with an ANALYZE, so three ends with an error are the last. One that ended with
        -- a restart, or found no process, does not count.
        SELECT substring(max(d.return_message) FROM E'^ERROR:[[:space:]]*([^\n]*)')
        FROM cron.job_run_details AS d
        WHERE d.jobid = j.jobid AND d.status = 'failed' AND d.return_message LIKE 'ERROR%'
        HAVING count(*) >= 3
    )
    INTO is_due, problem
    FROM cron.job AS j
    WHERE j.jobname = 'autoembed-index-' || pipeline_id AND j.database = current_database();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._index_job IS
    'Whether pg_cron is to build the index of a pipeline, and the error with which its build ended three times. '
    'NULLs if pg_cron has no entry for it.';

CREATE OR REPLACE FUNCTION autoembed._schedule_index(pipeline_id integer, command text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Lanes check once a second, so they end this before a second run, which would log that the index exists.
    PERFORM cron.schedule('autoembed-index-' || pipeline_id, '2 seconds', command);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._schedule_index IS 'Has pg_cron build the index of a pipeline with that command.';

CREATE OR REPLACE FUNCTION autoembed._hold_index_job(pipeline_id integer)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Unscheduling would end the build.
    PERFORM cron.alter_job(j.jobid, schedule => autoembed._never())
    FROM cron.job AS j
    WHERE j.jobname = 'autoembed-index-' || pipeline_id AND j.database = current_database()
      AND j.schedule <> autoembed._never();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._hold_index_job IS
    'Keeps pg_cron from starting the build of an index again when the present build ends.';

-- DROP EXTENSION runs no code of the extension, and its entries in cron.job and pgmq.meta are not its members. They go
-- before any extension is dropped, and come back as they were if it was another one.
CREATE OR REPLACE FUNCTION autoembed._before_drop()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- DROP EXTENSION of this one, among others or not, without CASCADE.
    restricted CONSTANT text := '^[[:space:]]*DROP[[:space:]]+EXTENSION[[:space:]]+(IF[[:space:]]+EXISTS[[:space:]]+)?'
        || '("?[[:alnum:]_]+"?[[:space:]]*,[[:space:]]*)*"?autoembed"?[[:space:]]*'
        || '(,[[:space:]]*"?[[:alnum:]_]+"?[[:space:]]*)*([[:space:]]RESTRICT[[:space:]]*)?;?[[:space:]]*$';
    _jobs jsonb;
    _attached text;
BEGIN
    -- Only a superuser can drop this extension. A direct DROP EXTENSION names the extension that it drops.
    IF NOT (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user)
       OR current_query() ~* '^[[:space:]]*DROP[[:space:]]+EXTENSION'
          AND current_query() !~* '(autoembed|pgmq|vector|plpython3u|pg_cron)' THEN
        RETURN;
    END IF;
    IF current_query() ~* restricted THEN
        SELECT string_agg(format('%I.%I', t.nspname, t.relname), ', ' ORDER BY t.nspname, t.relname)
        INTO _attached
        FROM (
            SELECT DISTINCT n.nspname, c.relname
            FROM autoembed.pipeline AS p
            JOIN pg_class AS c ON c.oid = p.table_id
            JOIN pg_namespace AS n ON n.oid = c.relnamespace
        ) AS t;
        -- PostgreSQL's own refusal would name each trigger and function made for these tables.
        IF _attached IS NOT NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'dependent_objects_still_exist',
                MESSAGE = 'tables are attached to autoembed',
                DETAIL = format('These tables are attached: %s.', _attached),
                HINT = 'Call autoembed.disable() for each of them, or use DROP EXTENSION autoembed CASCADE. Both leave '
                       'the tables and their vectors.';
        END IF;
    END IF;
    -- Each transaction of a lane takes this lock first, so there is no deadlock.
    LOCK TABLE autoembed.lane IN ACCESS EXCLUSIVE MODE;
    IF autoembed._cron_is_here() THEN
        WITH taken AS (
            DELETE FROM cron.job AS j
            WHERE j.jobname ~ '^autoembed-(lane|backfill|index)-[0-9]+(@.*)?$' AND j.database = current_database()
            RETURNING j.*
        )
        SELECT jsonb_agg(to_jsonb(t)) INTO _jobs FROM taken AS t;
    END IF;
    PERFORM set_config('autoembed.jobs_before_drop', coalesce(_jobs, '[]')::text, true);
    PERFORM autoembed._list_queue(false);
    -- PostgreSQL would refuse to drop this extension for the sake of its trigger.
    DROP TRIGGER IF EXISTS autoembed_keep_restored ON pgmq.meta;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._before_drop IS
    'Takes the lanes out of pg_cron and the queue off pgmq''s list before an extension is dropped.';

CREATE OR REPLACE FUNCTION autoembed._after_drop()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _jobs jsonb := nullif(current_setting('autoembed.jobs_before_drop', true), '')::jsonb;
BEGIN
    IF _jobs IS NULL OR NOT (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user) THEN
        RETURN;
    END IF;
    PERFORM set_config('autoembed.jobs_before_drop', '', true);
    PERFORM autoembed._list_queue(true);
    CREATE OR REPLACE TRIGGER autoembed_keep_restored
        BEFORE INSERT ON pgmq.meta
        FOR EACH ROW
        WHEN (NEW.queue_name = 'embedding_jobs')
        EXECUTE FUNCTION autoembed._keep_restored_queue();
    ALTER TABLE pgmq.meta ENABLE ALWAYS TRIGGER autoembed_keep_restored;
    IF autoembed._cron_is_here() THEN
        INSERT INTO cron.job SELECT j.* FROM jsonb_populate_recordset(NULL::cron.job, _jobs) AS j;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._after_drop IS
    'Puts the lanes and the queue back as they were if the extension that was dropped was another one.';
