-- Clears the vector in the write that changes the text. Runs as the extension's owner, before an UPDATE of a row.
CREATE OR REPLACE FUNCTION autoembed._clear_{{id}}()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    {{context_settings}}
    {{key_settings}}
AS $body$
DECLARE
    _changed boolean;
    _context text;
BEGIN
    BEGIN
        _changed := {{text_changed}};
    EXCEPTION WHEN OTHERS OR assert_failure OR query_canceled THEN
            {{raise_if_cancelled}}
        _changed := true;
    END;
    IF _changed THEN
        NEW.{{embedding_column}} := NULL;
    END IF;
    RETURN NEW;
END;
$body$
