-- Does the same as capture.sql where the text or the condition is the owner's code. That code runs in _text_{{id}}(),
-- as the owner.
CREATE OR REPLACE FUNCTION autoembed._capture_{{id}}()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    {{context_settings}}
    {{key_settings}}
AS $body$
DECLARE
    _changed boolean;
    _context text;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        -- A lane writes the vector, and nothing else has changed.
        IF {{is_lanes_write}} THEN
            RETURN NULL;
        END IF;
        BEGIN
            _changed := {{key_changed}} OR {{vector_changed}} OR {{text_changed}};
        EXCEPTION WHEN OTHERS OR assert_failure OR query_canceled THEN
            {{raise_if_cancelled}}
            -- No row is refused for its embedding. The lane meets the error again, and reports it.
            _changed := true;
        END;
        IF NOT _changed OR NOT ({{has_new_key}} OR {{has_old_key}} AND {{key_changed}}) THEN
            RETURN NULL;
        END IF;
        {{queue_update}}
        {{erase_update}}
    ELSIF TG_OP = 'TRUNCATE' THEN
        {{erase_truncate}}
        {{queue_truncate}}
    ELSIF TG_LEVEL = 'ROW' THEN
        {{queue_row}}
        {{erase_row}}
    ELSIF TG_OP = 'INSERT' THEN
        BEGIN
            {{table_guard}}
            {{queue_new_rows_with_text}}
        EXCEPTION WHEN OTHERS OR assert_failure OR query_canceled THEN
            {{raise_if_cancelled}}
            {{queue_new_rows}}
        END;
    ELSE
        {{queue_old_rows}}
        {{erase_rows}}
    END IF;
    RETURN NULL;
END;
$body$
