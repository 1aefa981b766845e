-- Whether a role that reads the embeddings table may read the row, and the columns that its text is made of. PostgreSQL
-- itself decides: the function runs with the rights of the reader.
CREATE OR REPLACE FUNCTION autoembed._may_read_{{id}}({{key_types}})
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
AS $body$
BEGIN
    IF {{is_renamed}} THEN
        RETURN false;
    END IF;
    RETURN EXISTS (SELECT {{read_columns}} FROM {{table}} AS t WHERE {{is_key}});
END;
$body$
