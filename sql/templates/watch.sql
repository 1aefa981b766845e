-- Finds embeddings beside the rows that somebody else deletes or overwrites: queues the keys of their rows. Runs as the
-- extension's owner, after a statement that writes the embeddings table.
CREATE OR REPLACE FUNCTION autoembed._watch_{{id}}()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    {{key_settings}}
AS $body$
BEGIN
    -- The rows of the embeddings have been deleted or queued by the same statement.
    IF pg_trigger_depth() > 1 AND current_setting('autoembed.erasing', true) = '{{id}}' THEN
        RETURN NULL;
    ELSIF TG_OP = 'TRUNCATE' THEN
        PERFORM autoembed._backfill(ARRAY[{{id}}]);
        RETURN NULL;
    END IF;
    -- Most statements of a lane insert.
    IF NOT EXISTS (SELECT FROM old_rows)
       OR pg_trigger_depth() = 1 AND current_setting('autoembed.writing', true) = '{{table_id}}'
          AND autoembed._may_write_vectors({{table_id}}, true)
       -- The pipeline takes another key.
       OR NOT EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = {{id}} AND p.table_id = {{table_id}}) THEN
        RETURN NULL;
    ELSIF TG_OP = 'DELETE' THEN
        {{queue_lost_rows}}
    ELSE
        {{queue_replaced_rows}}
    END IF;
    RETURN NULL;
END;
$body$
