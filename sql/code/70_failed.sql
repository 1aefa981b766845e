-- Rows and messages that were given up.

CREATE OR REPLACE VIEW autoembed.failed WITH (security_barrier) AS
SELECT f.id,
       p.table_id AS table_name,
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
LEFT JOIN autoembed.pipeline AS p ON p.id = f.pipeline_id
WHERE autoembed._may_see(p.table_id);
COMMENT ON VIEW autoembed.failed IS
    'The rows that could not be embedded and will not be tried again, each with the reason; retry_failed() tries them again.';
COMMENT ON COLUMN autoembed.failed.id IS 'The failure''s number.';
COMMENT ON COLUMN autoembed.failed.table_name IS 'The table; NULL for a message that names none.';
COMMENT ON COLUMN autoembed.failed.embedding_column IS 'The column that was to hold the embedding.';
COMMENT ON COLUMN autoembed.failed.key IS 'The row''s key as a JSON array.';
COMMENT ON COLUMN autoembed.failed.error_class IS 'row: the text or the table; message: the job itself.';
COMMENT ON COLUMN autoembed.failed.reason IS 'What went wrong the last time, for the table''s owner: it may quote the text.';
COMMENT ON COLUMN autoembed.failed.attempts IS 'How often it was tried.';
COMMENT ON COLUMN autoembed.failed.first_failed_at IS 'When it was given up first.';
COMMENT ON COLUMN autoembed.failed.last_failed_at IS 'When it was given up last.';
COMMENT ON COLUMN autoembed.failed.excerpt IS 'The first 200 characters of the text, for the table''s owner.';
COMMENT ON COLUMN autoembed.failed.message IS 'The message, where it names no row.';

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
          AND (retry_failed.table_name IS NULL OR v.table_name = retry_failed.table_name)
          AND (retry_failed.error_class IS NULL OR v.error_class = retry_failed.error_class)
        RETURNING f.pipeline_id, f.key, f.message
    ),
    queued AS (
        INSERT INTO autoembed._job (due_at, message)
        SELECT clock_timestamp(),
               coalesce(r.message, jsonb_build_object('pipeline', r.pipeline_id, 'keys', jsonb_build_array(r.key::jsonb)))
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
        ON CONFLICT DO NOTHING
    )
    SELECT count(*) INTO _retried FROM retried;
    RETURN _retried;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.retry_failed IS
    'Queues the failed rows of a table, of an error class, or all again; returns how many.';
