-- 60_schedule.sql: lanes as pg_cron jobs, and leaving without a trace. Nothing else knows pg_cron.

CREATE FUNCTION autoembed._unschedule(jobs text)
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _unscheduled integer := 0;
BEGIN
    IF to_regclass('cron.job') IS NOT NULL THEN
        SELECT count(u.unscheduled) INTO _unscheduled
        FROM cron.job AS j
        CROSS JOIN LATERAL cron.unschedule(j.jobid) AS u(unscheduled)
        WHERE j.jobname ~ format('^autoembed-%s$', jobs) AND j.database = current_database();
    END IF;
    RETURN _unscheduled;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._unschedule(text) IS 'Takes the jobs of such names out of pg_cron; returns how many.';

CREATE FUNCTION autoembed.unschedule()
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    UPDATE autoembed.lane SET stop = true;
    -- Nobody would see to the builds of indexes: the next lane begins them anew.
    PERFORM autoembed._unschedule('(backfill|index)-\d+');
    RETURN autoembed._unschedule('lane-\d+');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.unschedule() IS
    'Ends all lanes; returns how many were scheduled, those for backfills not counted. What a lane has in flight goes back to the queue.';

CREATE FUNCTION autoembed.schedule(lanes integer DEFAULT 1, backfill_lanes integer DEFAULT 1)
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
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
    IF to_regclass('cron.job') IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('pg_cron is not installed in database "%s"', current_database()),
            DETAIL = 'pg_cron lives in one database of a server, the one that cron.database_name names.',
            HINT = format(
                'CREATE EXTENSION pg_cron here; or, in its database, SELECT cron.schedule_in_database(%L, %L, %L, %L).',
                'autoembed-lane-1', '1 second', 'CALL autoembed.work()', current_database()
            );
    END IF;
    -- Beside the lanes run pg_cron's own worker and that of logical replication.
    IF current_setting('cron.use_background_workers')::boolean
       AND lanes + backfill_lanes > current_setting('max_worker_processes')::integer - 3 THEN
        RAISE WARNING USING
            ERRCODE = 'configuration_limit_exceeded',
            MESSAGE = format('%s lanes may not all run with max_worker_processes at %s', lanes + backfill_lanes,
                             current_setting('max_worker_processes')),
            HINT = format('Set max_worker_processes to at least %s and restart the server.', lanes + backfill_lanes + 3);
    END IF;
    UPDATE autoembed.lane SET stop = true;
    PERFORM autoembed._unschedule('(lane|backfill)-\d+');
    PERFORM cron.schedule('autoembed-lane-' || n, '1 second', 'CALL autoembed.work()') FROM generate_series(1, lanes) AS n;
    PERFORM cron.schedule('autoembed-backfill-' || n, '1 second', 'CALL autoembed.work(backfill => true)')
    FROM generate_series(1, backfill_lanes) AS n;
    RETURN lanes;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.schedule(integer, integer) IS
    'Has pg_cron run that many lanes side by side in this database, and that many more for backfills, in place of those it ran before; returns the number of lanes.';

CREATE FUNCTION autoembed._forget_runs()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF to_regclass('cron.job_run_details') IS NOT NULL THEN
        -- Those that never started have no time, but a number.
        DELETE FROM cron.job_run_details AS d
        WHERE d.command LIKE 'CALL autoembed.work(%' AND d.database = current_database() AND d.status NOT IN ('starting', 'running')
          AND d.runid < (SELECT min(r.runid) FROM cron.job_run_details AS r WHERE r.start_time > clock_timestamp() - interval '1 hour');
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_runs() IS
    'Deletes what pg_cron has noted of lanes more than an hour ago: it keeps such notes for ever.';

CREATE FUNCTION autoembed._build_index(pipeline_id integer)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _job text := 'autoembed-index-' || pipeline_id;
    -- Lanes look once a second: before a second run, which would find the index there and say so in the log.
    _interval text := '2 seconds';
    _pipeline autoembed.pipeline;
    _index pg_index;
    _key record;
    _name text;
    _problem text;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    SELECT i.* INTO _index FROM autoembed._vector_index(_pipeline.table_id, _pipeline.embedding_column) AS i;
    IF _index.indisvalid THEN
        PERFORM autoembed._unschedule('index-' || pipeline_id);
        RETURN true;
    ELSIF to_regclass('cron.job') IS NULL THEN
        RAISE WARNING USING MESSAGE = format('%s.%I has no index', _pipeline.table_id, _pipeline.embedding_column),
                            HINT = 'Create it by hand: indexes are built by pg_cron, which is not installed in this database.';
        RETURN true;
    END IF;
    SELECT k.* INTO _key FROM autoembed._index_key(_pipeline) AS k;
    SELECT coalesce(b.index_problem, CASE WHEN _key.key IS NULL THEN _key.problem END, (
               -- An error is not tried again; a server that was restarted, or has no process to spare, is.
               SELECT substring(d.return_message FROM '^ERROR:\s*([^\n]*)')
               FROM cron.job_run_details AS d
               JOIN cron.job AS j ON j.jobid = d.jobid AND j.jobname = _job AND j.database = current_database()
               WHERE d.status = 'failed' AND d.return_message LIKE 'ERROR%'
               LIMIT 1
           ))
    INTO _problem
    FROM autoembed.backfill AS b
    WHERE b.pipeline_id = _build_index.pipeline_id;
    IF _problem IS NOT NULL THEN
        PERFORM autoembed._unschedule('index-' || pipeline_id);
        UPDATE autoembed.backfill AS b SET index_problem = _problem WHERE b.pipeline_id = _build_index.pipeline_id AND b.index_problem IS NULL;
    END IF;
    IF _index.indexrelid IS NOT NULL THEN
        -- Either it is being built, or a build was interrupted.
        BEGIN
            EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', _pipeline.table_id);
            -- It may have been finished before the lock was ours.
            IF EXISTS (SELECT FROM pg_index AS i WHERE i.indexrelid = _index.indexrelid AND NOT i.indisvalid) THEN
                EXECUTE format('DROP INDEX %s', _index.indexrelid::regclass);
            END IF;
        EXCEPTION WHEN lock_not_available THEN
            -- The next run would begin as soon as this one ends; to unschedule the job would end this one.
            PERFORM cron.alter_job(j.jobid, schedule => '0 0 1 1 *')
            FROM cron.job AS j
            WHERE j.jobname = _job AND j.database = current_database() AND j.schedule = _interval;
        END;
    ELSIF _problem IS NULL AND NOT EXISTS (
        SELECT FROM cron.job AS j WHERE j.jobname = _job AND j.database = current_database() AND j.schedule = _interval
    ) THEN
        SELECT CASE WHEN to_regclass(format('%I.%I', n.nspname, k.name)) IS NULL THEN k.name ELSE format('autoembed_%s_idx', pipeline_id) END
        INTO STRICT _name
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        CROSS JOIN LATERAL (SELECT left(c.relname, 30) || '_' || left(_pipeline.embedding_column, 25) || '_idx' AS name) AS k
        WHERE c.oid = _pipeline.table_id;
        -- By pg_cron, as no function can build one concurrently.
        PERFORM cron.schedule(_job, _interval, format('CREATE INDEX CONCURRENTLY IF NOT EXISTS %I ON %s USING hnsw (%s)',
                                                      _name, _pipeline.table_id, _key.key));
    END IF;
    RETURN false;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_index(integer) IS
    'Has pg_cron build the HNSW index of a pipeline''s column, concurrently; whether it is there, or cannot be built here.';

-- DROP EXTENSION does not call us, and neither cron.job nor pgmq.meta is ours: so our rows there go before any extension is
-- dropped, and come back if it was not this one.
CREATE FUNCTION autoembed._before_drop()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- What every transaction of a lane locks first: taken first here too, it leaves no way to a deadlock.
    LOCK TABLE autoembed.lane IN ACCESS EXCLUSIVE MODE;
    PERFORM set_config('autoembed.lanes', autoembed.unschedule()::text, true);
    DELETE FROM pgmq.meta AS m WHERE m.queue_name = 'embedding_jobs';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._before_drop() IS
    'Takes the lanes out of pg_cron and the queue off pgmq''s list before an extension is dropped.';

CREATE EVENT TRIGGER autoembed_before_drop
    ON ddl_command_start
    WHEN TAG IN ('DROP EXTENSION', 'DROP OWNED')
    EXECUTE FUNCTION autoembed._before_drop();

CREATE FUNCTION autoembed._after_drop()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _lanes integer := nullif(current_setting('autoembed.lanes', true), '');
BEGIN
    INSERT INTO pgmq.meta (queue_name, is_partitioned, is_unlogged)
    VALUES ('embedding_jobs', false, false)
    ON CONFLICT (queue_name) DO NOTHING;
    IF _lanes > 0 AND to_regclass('cron.job') IS NOT NULL THEN
        PERFORM autoembed.schedule(_lanes);
    END IF;
    PERFORM set_config('autoembed.lanes', '', true);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._after_drop() IS 'Puts both back if the extension dropped was another.';

CREATE EVENT TRIGGER autoembed_after_drop
    ON ddl_command_end
    WHEN TAG IN ('DROP EXTENSION', 'DROP OWNED')
    EXECUTE FUNCTION autoembed._after_drop();
