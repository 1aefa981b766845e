-- Calls the function that a model names. Runs as that function's owner, in lanes and in embed().
CREATE FUNCTION autoembed.{{wrapper}}(texts text[])
    RETURNS {{vector_type}}
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
AS $body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
    RETURN {{function}}(texts);
EXCEPTION WHEN operator_intervention OR insufficient_resources OR system_error THEN
    GET STACKED DIAGNOSTICS _context = PG_EXCEPTION_CONTEXT;
    IF pg_catalog.split_part(_context, E'\n', 1) LIKE '% at RAISE' THEN
        RAISE EXCEPTION USING MESSAGE = SQLERRM;
    END IF;
    RAISE;
END;
$body$
