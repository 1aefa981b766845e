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
-- Lanes delete the failures of a pipeline that has ended.
WHERE autoembed._may_see(p.table_id) AND (f.pipeline_id IS NULL OR p.id IS NOT NULL);
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
    'Error of the last attempt. It may quote the text, so only the table''s owner sees it. A message that names no row '
    'has no owner: who sees its entry sees its reason.';
COMMENT ON COLUMN autoembed.failed.attempts IS 'Number of attempts.';
COMMENT ON COLUMN autoembed.failed.first_failed_at IS 'Time at which the row was first given up.';
COMMENT ON COLUMN autoembed.failed.last_failed_at IS 'Time at which the row was last given up.';
COMMENT ON COLUMN autoembed.failed.excerpt IS 'First 200 characters of the text. Only the table''s owner sees them.';
COMMENT ON COLUMN autoembed.failed.message IS 'The message, if it names no row.';

CREATE OR REPLACE VIEW autoembed._own_failure WITH (security_barrier) AS
SELECT f.id,
       p.table_id,
       f.error_class,
       false AS retried,
       p.embeddings_table
FROM autoembed.failure AS f
LEFT JOIN autoembed.pipeline AS p
    ON p.id = coalesce(
        f.pipeline_id, (jsonb_populate_record(NULL::autoembed.backfill, f.message -> 'backfill')).pipeline_id
    )
WHERE autoembed._owns(p.table_id)
   OR f.pipeline_id IS NULL AND p.id IS NULL AND (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user);
COMMENT ON VIEW autoembed._own_failure IS
    'The failures that the reader may have tried again: UPDATE … SET retried = true. A right to DELETE would include '
    'one to LOCK TABLE.';

CREATE OR REPLACE FUNCTION autoembed._retry_failure()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _failure autoembed.failure;
BEGIN
    DELETE FROM autoembed.failure AS f WHERE f.id = OLD.id RETURNING f.* INTO _failure;
    IF NOT FOUND THEN
        -- Another session has retried it.
        RETURN NULL;
    END IF;
    IF _failure.message -> 'backfill' IS NULL THEN
        INSERT INTO autoembed._job (due_at, message)
        VALUES (clock_timestamp(), coalesce(_failure.message, jsonb_build_object(
            'pipeline', _failure.pipeline_id,
            'keys', jsonb_build_array(_failure.key::jsonb)
        )));
    ELSE
        INSERT INTO autoembed.backfill (pipeline_id, condition, condition_objects, force, create_index)
        SELECT b.pipeline_id, b.condition, coalesce(b.condition_objects, '{}'), b.force, b.create_index
        FROM jsonb_populate_record(NULL::autoembed.backfill, _failure.message -> 'backfill') AS b
        JOIN autoembed.pipeline AS p ON p.id = b.pipeline_id
        FOR KEY SHARE OF p
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._retry_failure IS 'Queues what has failed again, and takes it off the failed list.';

CREATE OR REPLACE FUNCTION autoembed.retry_failed(table_name regclass DEFAULT NULL, error_class text DEFAULT NULL)
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _retried integer;
BEGIN
    -- The view decides by the caller's rights, which a SECURITY DEFINER function does not know.
    UPDATE autoembed._own_failure AS f
    SET retried = true
    WHERE (retry_failed.table_name IS NULL OR retry_failed.table_name IN (f.table_id, f.embeddings_table))
      AND (retry_failed.error_class IS NULL OR f.error_class = retry_failed.error_class);
    GET DIAGNOSTICS _retried = ROW_COUNT;
    RETURN _retried;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.retry_failed IS
    'Queues failed rows again: those of a table, of an error class, or all of the tables that the caller owns. Returns '
    'how many.';
