-- 57_clean_up.sql: what lanes see to every second, besides their jobs.

CREATE FUNCTION autoembed._lane_lives(pid integer, backend_start timestamptz)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- With more rights than the reader of a view may have: others' processes show him no start.
    RETURN EXISTS (SELECT FROM pg_stat_get_activity(_lane_lives.pid) AS a WHERE a.backend_start = _lane_lives.backend_start);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lane_lives(integer, timestamptz) IS 'Whether a process that started then is still there.';

CREATE FUNCTION autoembed._clean_up()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._drop_orphaned_pipelines();
    PERFORM autoembed._finish_backfills();
    PERFORM autoembed._fold_usage();
    WITH dead AS (
        DELETE FROM autoembed.lane AS l
        WHERE NOT autoembed._lane_lives(l.pid, l.backend_start)
        RETURNING l.claimed_at, l.message_ids
    )
    UPDATE pgmq.q_embedding_jobs AS q
    SET vt = clock_timestamp()
    FROM dead AS d
    CROSS JOIN LATERAL unnest(d.message_ids) AS m(id)
    -- Unless another lane has them since.
    WHERE q.msg_id = m.id AND q.last_read_at <= d.claimed_at;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._clean_up() IS
    'Ends the pipelines of dropped tables and the backfills that are done, and makes the jobs of lanes whose backend is gone visible at once; the try stays counted.';
