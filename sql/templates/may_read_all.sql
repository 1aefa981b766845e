-- Whether a role that reads the embeddings table may read all columns of all rows. It runs with the rights of the
-- reader.
CREATE OR REPLACE FUNCTION autoembed._may_read_all_{{id}}()
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    COST 0.01
AS $body$
BEGIN
    RETURN NOT ({{is_renamed}})
        AND pg_catalog.has_table_privilege({{table_literal}}::pg_catalog.text, 'SELECT'::pg_catalog.text)
        AND NOT pg_catalog.row_security_active({{table_literal}}::pg_catalog.text);
END;
$body$
