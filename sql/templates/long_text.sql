-- The long text of a row. Runs with the rights of the reader.
CREATE OR REPLACE FUNCTION autoembed._long_text_{{id}}({{key_types}})
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    {{passage_settings}}
AS $body$
BEGIN
    IF {{is_renamed}} THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT {{readable_text}} FROM {{table}} AS t WHERE {{is_key}});
END;
$body$
