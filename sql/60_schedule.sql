-- 60_schedule.sql: lanes as pg_cron jobs, and leaving without a trace. Nothing else knows pg_cron.

CREATE FUNCTION autoembed.unschedule()
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _lanes integer;
BEGIN
    UPDATE autoembed.lane SET stop = true;
    IF to_regclass('cron.job') IS NULL THEN
        RETURN 0;
    END IF;
    SELECT count(cron.unschedule(j.jobid)) INTO _lanes
    FROM cron.job AS j
    WHERE j.jobname LIKE 'autoembed-lane-%' AND j.database = current_database();
    RETURN _lanes;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.unschedule() IS
    'Ends all lanes; returns how many were scheduled. What a lane has in flight goes back to the queue.';

CREATE FUNCTION autoembed.schedule(lanes integer DEFAULT 1)
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
       AND lanes > current_setting('max_worker_processes')::integer - 3 THEN
        RAISE WARNING USING
            ERRCODE = 'configuration_limit_exceeded',
            MESSAGE = format('%s lanes may not all run with max_worker_processes at %s', lanes,
                             current_setting('max_worker_processes')),
            HINT = format('Set max_worker_processes to at least %s and restart the server.', lanes + 3);
    END IF;
    PERFORM autoembed.unschedule();
    PERFORM cron.schedule('autoembed-lane-' || n, '1 second', 'CALL autoembed.work()') FROM generate_series(1, lanes) AS n;
    RETURN lanes;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.schedule(integer) IS
    'Has pg_cron run that many lanes side by side in this database, in place of those it ran before; returns their number.';

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
