-- Functions that run as somebody else, and what keeps their owner's code in its place.

CREATE OR REPLACE FUNCTION autoembed._output_settings()
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT $$SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres' $$
        || $$SET extra_float_digits = 1 SET bytea_output = 'hex'$$;
$sql$;
COMMENT ON FUNCTION autoembed._output_settings IS
    'The settings under which texts and keys are written, so that they do not depend on the session.';

CREATE OR REPLACE FUNCTION autoembed._check_deferred()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table regclass;
BEGIN
    FOR _table IN
        SELECT g.tgrelid FROM pg_trigger AS g WHERE g.tgdeferrable AND NOT g.tgisinternal
        UNION
        SELECT c.conrelid FROM pg_constraint AS c WHERE c.contype = 'x' AND c.condeferrable
    LOOP
        BEGIN
            -- Any ALTER TABLE is refused while the table has events pending; this one changes nothing, and is undone.
            EXECUTE format('ALTER TABLE %s RESET (fillfactor)', _table);
            RAISE EXCEPTION USING ERRCODE = 'AE000';
        EXCEPTION
            WHEN SQLSTATE 'AE000' THEN
                NULL;
            WHEN object_in_use THEN
                RAISE EXCEPTION 'a trigger on table % is deferred to the commit, where it would run with the rights of the lane', _table;
        END;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_deferred IS
    'Fails if writing has left trigger events for the commit, which PostgreSQL runs as the session''s user.';

CREATE OR REPLACE FUNCTION autoembed._prepared()
    RETURNS text[]
    LANGUAGE sql
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT ARRAY(SELECT format('%L %s', p.name, p.statement) FROM pg_prepared_statements AS p);
$sql$;
COMMENT ON FUNCTION autoembed._prepared IS 'The prepared statements of the session.';

CREATE OR REPLACE FUNCTION autoembed._forget_prepared(known text[])
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _name text;
BEGIN
    FOR _name IN SELECT p.name FROM pg_prepared_statements AS p WHERE format('%L %s', p.name, p.statement) <> ALL (known) LOOP
        EXECUTE format('DEALLOCATE %I', _name);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_prepared IS
    'Forgets the prepared statements that an owner''s code has left, which no rollback does, before the session''s user executes them by name.';
