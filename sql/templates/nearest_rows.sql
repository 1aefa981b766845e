-- Finds the nearest rows of a table and reads them, by queries whose plans a session keeps: ranks, rows, keys, scores
-- and passages as search() gives them. Gives nothing if they may be too few. Runs with the rights of the caller, a role
-- that may read all rows.
CREATE OR REPLACE FUNCTION autoembed._nearest_rows_{{id}}(
    vector pg_catalog.text,
    by_index pg_catalog.bool,
    skip_rows pg_catalog.int4,
    max_rows pg_catalog.int4
)
    RETURNS SETOF record
    LANGUAGE plpgsql
    STABLE
    ROWS 10
AS $body$
<<given>>
DECLARE
    _vector CONSTANT {{nearest_vector_type}} := $1::{{nearest_vector_type}};
BEGIN
    IF $2 THEN
        RETURN QUERY
        {{nearest_rows_by_index}};
    ELSE
        RETURN QUERY
        {{nearest_rows_by_comparison}};
    END IF;
END;
$body$
