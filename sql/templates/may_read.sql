-- Whether a role that reads the embeddings table may read the row, and the columns that its text is made of. PostgreSQL
-- itself decides: the function runs with the rights of the reader. PostgreSQL asks it before it compares a column that
-- has no index, because that costs more. Otherwise the plan of a query would tell which texts hidden rows have.
CREATE OR REPLACE FUNCTION autoembed._may_read_{{id}}({{key_types}})
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    COST 0.01
AS $body$
BEGIN
    IF {{is_renamed}} THEN
        RETURN false;
    END IF;
    RETURN EXISTS (SELECT {{read_columns}} FROM {{table}} AS t WHERE {{is_key}});
END;
$body$
