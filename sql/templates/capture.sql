-- Queues the keys of rows whose text, key or vector changes. Runs as the extension's owner, after a write to the table.
-- No clause sets the search_path, which would cost each UPDATE of another column a tenth more: every name is qualified.
CREATE OR REPLACE FUNCTION autoembed._capture_{{id}}()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    {{key_settings}}
AS $body$
BEGIN
    IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' THEN
        -- A vector that is not a lane's is replaced. A row whose key is NULL cannot be found again.
        IF NOT ({{key_changed}} OR {{text_changed}} OR {{vector_changed}} AND NOT {{is_lanes_write}})
           OR NOT ({{has_new_key}} OR {{has_old_key}} AND {{key_changed}}) THEN
            RETURN NULL;
        END IF;
        {{queue_update}}
        {{erase_update}}
    ELSIF TG_OP OPERATOR(pg_catalog.=) 'TRUNCATE' THEN
        {{erase_truncate}}
        {{queue_truncate}}
    ELSIF TG_LEVEL OPERATOR(pg_catalog.=) 'ROW' THEN
        {{queue_row}}
        {{erase_row}}
    ELSIF TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN
        {{queue_new_rows}}
    ELSE
        {{queue_old_rows}}
        {{erase_rows}}
    END IF;
    RETURN NULL;
END;
$body$
