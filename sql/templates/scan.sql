-- Reads the next keys of a backfill, up to about max_bytes. Runs as the table's owner, in lanes.
CREATE FUNCTION autoembed._scan_{{id}}(after text, condition text, max_rows integer, max_bytes bigint)
    RETURNS TABLE (key text)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
AS $body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
    LOCK TABLE {{table}} IN ACCESS SHARE MODE NOWAIT;
    {{table_guard}}
    FOR key IN EXECUTE pg_catalog.concat(
        {{scan_query}},
        -- A scan that begins has no key to start after.
        CASE WHEN after IS NOT NULL THEN {{and_later_key}} END,
        CASE WHEN condition IS NOT NULL THEN pg_catalog.concat(' AND (', condition, ')') END,
        {{order_by_key}},
        ' LIMIT $2'
    ) USING after, max_rows LOOP
        RETURN NEXT;
        max_rows := max_rows - 1;
        EXIT WHEN max_rows = 0;
        max_bytes := max_bytes - pg_catalog.octet_length(key);
        IF max_bytes < 0 THEN
            -- A NULL key tells that rows are left.
            key := NULL;
            RETURN NEXT;
            EXIT;
        END IF;
    END LOOP;
EXCEPTION WHEN query_canceled THEN
    {{raise_if_cancelled}}
    RAISE EXCEPTION USING ERRCODE = 'external_routine_exception', MESSAGE = SQLERRM;
END;
$body$
