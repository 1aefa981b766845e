-- Reads the texts of rows by key. Runs as the table's owner, in lanes.
CREATE FUNCTION autoembed._content_{{id}}(keys text[])
    RETURNS TABLE (key text, content text, has_embedding boolean)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
AS $body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
    -- A lane does not wait for a lock on the table. The mode is that of a write, since a row that could not be written is
    -- not embedded.
    LOCK TABLE {{table}} IN ROW EXCLUSIVE MODE NOWAIT;
    RETURN QUERY
    SELECT s.key, {{content}}, t.{{embedding_column}} IS NOT NULL
    FROM (SELECT s.key, {{sent_keys}} FROM pg_catalog.unnest(keys) AS s(key)) AS s
    JOIN {{table}} AS t ON {{same_key}};
EXCEPTION WHEN operator_intervention OR insufficient_resources OR system_error THEN
    GET STACKED DIAGNOSTICS _context = PG_EXCEPTION_CONTEXT;
    IF pg_catalog.split_part(_context, E'\n', 1) LIKE '% at RAISE' THEN
        RAISE EXCEPTION USING MESSAGE = SQLERRM;
    END IF;
    RAISE;
END;
$body$
