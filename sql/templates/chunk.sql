-- The text of a chunk; NULL if the row has another text there by now. PostgreSQL itself decides who may read it: the
-- function runs with the rights of the reader.
CREATE OR REPLACE FUNCTION autoembed._chunk_{{id}}(
    {{key_types}},
    chunk_start integer,
    chunk_end integer,
    digest bytea
)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
AS $body$
DECLARE
    _chunk text;
    _version text;
    _long_bytes CONSTANT integer := 1048576;
BEGIN
    SELECT CASE WHEN NOT s.is_long THEN {{passage}} END,
           CASE WHEN s.is_long THEN pg_catalog.concat_ws(' ', '{{id}}', t.tableoid, t.ctid, t.xmin) END
    INTO _chunk, _version
    FROM {{table}} AS t
    CROSS JOIN LATERAL (SELECT {{content_bytes}} OPERATOR(pg_catalog.>) _long_bytes AS is_long) AS s
    WHERE {{is_key}};
    IF _version IS NULL THEN
        RETURN _chunk;
    END IF;
    -- A reader of the table may have no right to call autoembed.
    IF pg_catalog.has_schema_privilege('autoembed', 'USAGE') THEN
        IF pg_catalog.has_function_privilege('autoembed._kept_part(text, integer, integer)', 'EXECUTE') THEN
            -- PostgreSQL would read the whole text again for each of its chunks.
            RETURN (SELECT {{long_passage}} FROM {{table}} AS t WHERE {{is_key}});
        END IF;
    END IF;
    RETURN (SELECT {{passage}} FROM {{table}} AS t WHERE {{is_key}});
END;
$body$
