-- Lanes: which sessions are lanes, the messages that each holds, and the cleaning up that they do every second.

CREATE OR REPLACE VIEW autoembed._this_lane AS
SELECT l.*
FROM autoembed.lane AS l
WHERE (l.pid, l.backend_start) = (
    SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a
);
COMMENT ON VIEW autoembed._this_lane IS 'The entry of this session, if it is a lane.';

CREATE OR REPLACE FUNCTION autoembed._enter_lane(backfill boolean)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- DROP EXTENSION takes this lock first, too.
    PERFORM autoembed._gate();
    PERFORM autoembed._forget_runs();
    PERFORM autoembed._find_functions();
    INSERT INTO autoembed.lane (pid, backend_start, backfill)
    SELECT a.pid, a.backend_start, _enter_lane.backfill FROM pg_stat_get_activity(pg_backend_pid()) AS a
    ON CONFLICT DO NOTHING;
    RETURN EXISTS (
        SELECT FROM autoembed.pipeline AS p
        JOIN pg_index AS i ON i.indrelid = coalesce(p.embeddings_table, p.table_id)
        JOIN pg_class AS c ON c.oid = i.indexrelid
        JOIN pg_am AS m ON m.oid = c.relam AND m.amname IN ('hnsw', 'ivfflat')
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._enter_lane IS
    'Signs this session on as a lane. backfill: for backfills alone. Returns whether any attached table has a vector '
    'index.';

CREATE OR REPLACE FUNCTION autoembed._lane_is_wanted()
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- A lane without an entry belongs to an extension that was dropped since.
    RETURN EXISTS (SELECT FROM autoembed._this_lane AS l WHERE NOT l.stop)
        -- It may have been retired before it signed on.
        AND NOT autoembed._is_retired(pg_backend_pid());
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lane_is_wanted IS 'Whether this lane is signed on and has not been asked to stop.';

CREATE OR REPLACE FUNCTION autoembed._gate()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    LOCK TABLE autoembed.lane IN ACCESS SHARE MODE;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._gate IS
    'Takes the first lock of a lane''s transaction. DROP EXTENSION takes it first too, so they cannot deadlock.';

CREATE OR REPLACE FUNCTION autoembed._leave_lane()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._gate();
    -- First its own entry, then that of pg_cron: schedule() locks them in this order, too.
    WITH ended AS (
        DELETE FROM autoembed._this_lane AS l RETURNING l.claimed_at, l.message_ids
    )
    UPDATE autoembed._job AS q
    SET due_at = clock_timestamp()
    FROM ended AS e
    CROSS JOIN LATERAL unnest(e.message_ids) AS m(id)
    -- Another lane may have claimed those that were given back.
    WHERE q.message_id = m.id AND q.last_read_at <= e.claimed_at AND q.due_at > clock_timestamp();
    PERFORM autoembed._remove_retired_job(pg_backend_pid());
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._leave_lane IS
    'Signs this session off as a lane, and removes its entry from pg_cron if it is not to come back. Makes the jobs '
    'that it still has due at once; the attempt stays counted.';

CREATE OR REPLACE FUNCTION autoembed._lane_lives(pid integer, backend_start timestamptz)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- A reader of the views may not see when other roles' processes started, so this is SECURITY DEFINER.
    RETURN EXISTS (
        SELECT FROM pg_stat_get_activity(_lane_lives.pid) AS a WHERE a.backend_start = _lane_lives.backend_start
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lane_lives IS 'Whether the process that started then still runs.';

CREATE OR REPLACE FUNCTION autoembed._clean_up()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._drop_orphaned_pipelines();
    PERFORM autoembed._finish_backfills();
    PERFORM autoembed._follow_unseen();
    PERFORM autoembed._plan_stopped();
    PERFORM autoembed._fold_usage();
    WITH dead AS (
        DELETE FROM autoembed.lane AS l
        WHERE (l.pid, l.backend_start) IN (
            SELECT d.pid, d.backend_start
            FROM autoembed.lane AS d
            WHERE NOT autoembed._lane_lives(d.pid, d.backend_start)
            -- Another session cleans up, and may take its time with the rest of its transaction.
            FOR UPDATE SKIP LOCKED
        )
        RETURNING l.claimed_at, l.message_ids
    )
    UPDATE autoembed._job AS q
    SET due_at = clock_timestamp()
    FROM dead AS d
    CROSS JOIN LATERAL unnest(d.message_ids) AS m(id)
    -- Another lane may have claimed them since.
    WHERE q.message_id = m.id AND q.last_read_at <= d.claimed_at;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._clean_up IS
    'Ends the pipelines of dropped tables and the backfills that are done, and follows columns that were renamed '
    'or dropped unseen. Makes the jobs of lanes whose process is gone due at once; the attempt stays counted.';
