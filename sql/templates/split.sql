-- Cuts a text into pieces by the owner's function: so many of them, and so many bytes together, at most. Runs as the
-- table's owner, in lanes.
CREATE FUNCTION autoembed._split_{{id}}(content text, max_pieces integer, max_bytes bigint)
    RETURNS SETOF text
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
AS $body$
DECLARE
    _piece text;
    _context text;
BEGIN
    -- The lock keeps the name of the function's schema.
    LOCK TABLE {{table}} IN ACCESS SHARE MODE NOWAIT;
    {{table_guard}}
    {{chunk_guard}}
    FOR _piece IN SELECT s.piece::pg_catalog.text FROM {{chunk_call}}(content) AS s(piece) LOOP
        max_pieces := max_pieces OPERATOR(pg_catalog.-) 1;
        max_bytes := max_bytes OPERATOR(pg_catalog.-) coalesce(pg_catalog.octet_length(_piece), 0);
        IF max_pieces OPERATOR(pg_catalog.<) 0 OR max_bytes OPERATOR(pg_catalog.<) 0 THEN
            RAISE EXCEPTION USING
                ERRCODE = 'program_limit_exceeded',
                MESSAGE = 'the function that cuts texts gives too many pieces, or too long ones';
        END IF;
        RETURN NEXT _piece;
    END LOOP;
EXCEPTION WHEN query_canceled THEN
    {{raise_if_cancelled}}
    RAISE EXCEPTION USING ERRCODE = 'external_routine_exception', MESSAGE = SQLERRM;
END;
$body$
