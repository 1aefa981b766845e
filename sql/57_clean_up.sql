-- 57_clean_up.sql: what lanes see to every second, besides their jobs.

CREATE FUNCTION autoembed._clean_up()
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT autoembed._drop_orphaned_pipelines();
    SELECT autoembed._finish_backfills();
    SELECT autoembed._fold_usage();
    WITH dead AS (
        DELETE FROM autoembed.lane AS l
        WHERE NOT EXISTS (
            SELECT FROM pg_stat_get_activity(NULL) AS a
            WHERE a.pid = l.pid AND a.backend_start = l.backend_start
        )
        RETURNING l.claimed_at, l.message_ids
    )
    UPDATE pgmq.q_embedding_jobs AS q
    SET vt = clock_timestamp()
    FROM dead AS d
    CROSS JOIN LATERAL unnest(d.message_ids) AS m(id)
    -- Unless another lane has them since.
    WHERE q.msg_id = m.id AND q.last_read_at <= d.claimed_at;
$sql$;
COMMENT ON FUNCTION autoembed._clean_up() IS
    'Ends the pipelines of dropped tables and the backfills that are done, and makes the jobs of lanes whose backend is gone visible at once; the try stays counted.';
