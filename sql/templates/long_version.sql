-- The version of a row that has a long text; NULL: it has none. PostgreSQL would read the whole text again for each of
-- its chunks. Runs with the rights of the reader.
CREATE OR REPLACE FUNCTION autoembed._long_version_{{id}}({{key_types}})
    RETURNS text
    LANGUAGE plpgsql
    STABLE
AS $body$
BEGIN
    IF {{is_renamed}} THEN
        RETURN NULL;
    END IF;
    RETURN (
        SELECT pg_catalog.concat_ws(' ', '{{id}}', t.tableoid, t.ctid, t.xmin)
        FROM {{table}} AS t
        WHERE {{is_key}} AND {{content_bytes}} OPERATOR(pg_catalog.>) {{long_bytes}}
    );
END;
$body$
