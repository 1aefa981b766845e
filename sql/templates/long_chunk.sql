-- A part of the long text of a row, if it is the chunk with that digest. Runs with the rights of the reader.
CREATE OR REPLACE FUNCTION autoembed._long_chunk_{{id}}({{key_types}}, part text, digest bytea)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    {{passage_settings}}
AS $body$
BEGIN
    IF {{is_renamed}} THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT {{long_passage}} FROM {{table}} AS t WHERE {{is_key}});
END;
$body$
