-- Rows, messages and backfills that were given up.

CREATE OR REPLACE VIEW autoembed.failed WITH (security_barrier) AS
SELECT f.id,
       p.table_id::text AS table_name,
       p.embedding_column,
       f.key,
       f.error_class,
       CASE WHEN autoembed._owns(p.table_id) OR p.id IS NULL THEN f.reason END AS reason,
       f.attempts,
       f.first_failed_at,
       f.last_failed_at,
       CASE WHEN autoembed._owns(p.table_id) THEN f.excerpt END AS excerpt,
       f.message
FROM autoembed.failure AS f
-- A backfill that was given up is a message, which names its pipeline inside.
LEFT JOIN autoembed.pipeline AS p
    ON p.id = coalesce(
        f.pipeline_id, (jsonb_populate_record(NULL::autoembed.backfill, f.message -> 'backfill')).pipeline_id
    )
WHERE autoembed._may_see(p.table_id);
COMMENT ON VIEW autoembed.failed IS
    'The rows that could not be embedded and are not tried again, each with the reason. retry_failed() tries them '
    'again.';
COMMENT ON COLUMN autoembed.failed.id IS 'Number of the failure.';
COMMENT ON COLUMN autoembed.failed.table_name IS 'Table of the row. NULL for a message that names none.';
COMMENT ON COLUMN autoembed.failed.embedding_column IS 'Column for the embedding.';
COMMENT ON COLUMN autoembed.failed.key IS 'Key of the row, as a JSON array.';
COMMENT ON COLUMN autoembed.failed.error_class IS
    'Cause of the failure. row: the row''s text or its table; message: the message itself.';
COMMENT ON COLUMN autoembed.failed.reason IS
    'Error of the last attempt. It may quote the text, so only the table''s owner sees it.';
COMMENT ON COLUMN autoembed.failed.attempts IS 'Number of attempts.';
COMMENT ON COLUMN autoembed.failed.first_failed_at IS 'Time at which the row was first given up.';
COMMENT ON COLUMN autoembed.failed.last_failed_at IS 'Time at which the row was last given up.';
COMMENT ON COLUMN autoembed.failed.excerpt IS 'First 200 characters of the text. Only the table''s owner sees them.';
COMMENT ON COLUMN autoembed.failed.message IS 'The message, if it names no row.';

CREATE OR REPLACE FUNCTION autoembed.retry_failed(table_name regclass DEFAULT NULL, error_class text DEFAULT NULL)
    RETURNS integer
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _retried integer;
BEGIN
    WITH retried AS (
        DELETE FROM autoembed.failure AS f
        USING autoembed.failed AS v
        WHERE v.id = f.id
          AND (retry_failed.table_name IS NULL OR v.table_name = retry_failed.table_name::text)
          AND (retry_failed.error_class IS NULL OR v.error_class = retry_failed.error_class)
        RETURNING f.pipeline_id, f.key, f.message
    ),
    queued AS (
        INSERT INTO autoembed._job (due_at, message)
        SELECT clock_timestamp(), coalesce(r.message, jsonb_build_object(
                   'pipeline', r.pipeline_id,
                   'keys', jsonb_build_array(r.key::jsonb)
               ))
        FROM retried AS r
        WHERE r.message -> 'backfill' IS NULL
    ),
    begun AS (
        INSERT INTO autoembed.backfill (pipeline_id, condition, force, create_index)
        SELECT b.pipeline_id, b.condition, b.force, b.create_index
        FROM retried AS r
        CROSS JOIN LATERAL jsonb_populate_record(NULL::autoembed.backfill, r.message -> 'backfill') AS b
        JOIN autoembed.pipeline AS p ON p.id = b.pipeline_id
        WHERE r.message -> 'backfill' IS NOT NULL
        FOR KEY SHARE OF p
        ON CONFLICT DO NOTHING
    )
    SELECT count(*) INTO _retried FROM retried;
    RETURN _retried;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.retry_failed IS
    'Queues failed rows again: those of a table, of an error class, or all. Returns how many.';
