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
    SELECT count(u.unscheduled) FILTER (WHERE j.jobname LIKE 'autoembed-lane-%') INTO _lanes
    FROM cron.job AS j
    CROSS JOIN LATERAL cron.unschedule(j.jobid) AS u(unscheduled)
    WHERE j.jobname ~ '^autoembed-(lane|backfill)-' AND j.database = current_database();
    RETURN _lanes;
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
    PERFORM autoembed.unschedule();
    PERFORM cron.schedule('autoembed-lane-' || n, '1 second', 'CALL autoembed.work()') FROM generate_series(1, lanes) AS n;
    PERFORM cron.schedule('autoembed-backfill-' || n, '1 second', 'CALL autoembed.work(backfill => true)')
    FROM generate_series(1, backfill_lanes) AS n;
    RETURN lanes;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.schedule(integer, integer) IS
    'Has pg_cron run that many lanes side by side in this database, and that many more for backfills, in place of those it ran before; returns the number of lanes.';

CREATE FUNCTION autoembed._build_index(pipeline_id integer)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _job text := 'autoembed-index-' || pipeline_id;
    _pipeline autoembed.pipeline;
    _index pg_index;
    _type text;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    SELECT i.* INTO _index FROM autoembed._vector_index(_pipeline) AS i;
    IF to_regclass('cron.job') IS NULL OR _index.indisvalid THEN
        IF to_regclass('cron.job') IS NOT NULL THEN
            PERFORM cron.unschedule(j.jobid) FROM cron.job AS j WHERE j.jobname = _job AND j.database = current_database();
        ELSE
            RAISE WARNING USING MESSAGE = format('%s.%I has no index', _pipeline.table_id, _pipeline.embedding_column),
                                HINT = 'Create it by hand: indexes are built by pg_cron, which is not installed in this database.';
        END IF;
        RETURN true;
    END IF;
    IF _index.indexrelid IS NOT NULL THEN
        -- Either it is being built, or a build was interrupted.
        IF NOT EXISTS (SELECT FROM pg_stat_progress_create_index AS s WHERE s.index_relid = _index.indexrelid) THEN
            EXECUTE format('DROP INDEX %s', _index.indexrelid::regclass);
        END IF;
    ELSIF NOT EXISTS (SELECT FROM cron.job AS j WHERE j.jobname = _job AND j.database = current_database()) THEN
        SELECT t.typname INTO STRICT _type
        FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
        WHERE a.attrelid = _pipeline.table_id AND a.attname = _pipeline.embedding_column;
        -- By pg_cron, as no function can build one concurrently.
        PERFORM cron.schedule(_job, '1 second', format(
            'CREATE INDEX CONCURRENTLY IF NOT EXISTS %I ON %s USING hnsw (%I @extschema:vector@.%s_cosine_ops)',
            left((SELECT c.relname FROM pg_class AS c WHERE c.oid = _pipeline.table_id), 30)
                || '_' || left(_pipeline.embedding_column, 25) || '_idx',
            _pipeline.table_id, _pipeline.embedding_column, _type));
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
