-- Gives the text of one row, for triggers, where the text or the condition is the owner's code. Runs as the table's owner.
CREATE FUNCTION autoembed._text_{{id}}(r anyelement)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
AS $body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
    RETURN {{content_of_r}};
EXCEPTION WHEN operator_intervention OR insufficient_resources OR system_error THEN
    GET STACKED DIAGNOSTICS _context = PG_EXCEPTION_CONTEXT;
    IF pg_catalog.split_part(_context, E'\n', 1) LIKE '% at RAISE' THEN
        RAISE EXCEPTION USING MESSAGE = SQLERRM;
    END IF;
    RAISE;
END;
$body$
