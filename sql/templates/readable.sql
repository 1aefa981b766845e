-- The keys of all rows that a reader of the embeddings table may read. It runs with the rights of the reader.
CREATE OR REPLACE FUNCTION autoembed._readable_{{id}}()
    RETURNS TABLE ({{readable_columns}})
    LANGUAGE plpgsql
    STABLE
AS $body$
#variable_conflict use_column
BEGIN
    IF {{is_renamed}} THEN
        RETURN;
    END IF;
    -- PostgreSQL asks for the rights to all columns that are named, and computes none that is not wanted.
    RETURN QUERY SELECT {{readable_key}} FROM (SELECT {{listed_keys}}, ROW({{read_columns}}) FROM {{table}} AS t) AS r;
END;
$body$
