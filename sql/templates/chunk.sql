-- The text of a chunk; NULL if the row has another text there by now, or a long one. PostgreSQL itself decides who may
-- read it: the function runs with the rights of the reader.
CREATE OR REPLACE FUNCTION autoembed._chunk_{{id}}(
    {{key_types}},
    chunk_start integer,
    chunk_end integer,
    digest bytea
)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    {{passage_settings}}
AS $body$
BEGIN
    IF {{is_renamed}} THEN
        RETURN NULL;
    END IF;
    RETURN (
        SELECT CASE WHEN {{content_bytes}} OPERATOR(pg_catalog.<=) {{long_bytes}} THEN {{passage}} END
        FROM {{table}} AS t
        WHERE {{is_key}}
    );
END;
$body$
