-- The models and pipelines of a dump, and how a restore brings them back.

CREATE OR REPLACE FUNCTION autoembed._take_restored()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- The triggers of the table have their part in a restore, which may say that it is a replica.
    SET session_replication_role = origin
AS $plpgsql$
BEGIN
    BEGIN
        EXECUTE (
            SELECT format('INSERT INTO autoembed.%1$I (%2$s) OVERRIDING SYSTEM VALUE '
                          'SELECT %2$s FROM jsonb_populate_record(NULL::autoembed.%1$I, $1)',
                          NEW.kind, string_agg(quote_ident(c.name), ', '))
            FROM jsonb_object_keys(NEW.definition) AS c(name)
        ) USING NEW.definition;
        DELETE FROM autoembed.restored AS r WHERE r.kind = NEW.kind AND r.definition = NEW.definition;
    EXCEPTION WHEN OTHERS THEN
        UPDATE autoembed.restored AS r SET problem = SQLERRM
        WHERE r.kind = NEW.kind AND r.definition = NEW.definition;
        RAISE WARNING USING
            ERRCODE = SQLSTATE,
            MESSAGE = format('%s of %s is left out: %s', NEW.kind,
                             coalesce(NEW.definition ->> 'table_id', NEW.definition ->> 'name'), SQLERRM),
            HINT = 'autoembed.doctor() says how to bring it back.';
    END;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._take_restored IS
    'Puts a model or a pipeline of a dump into its table. One that does not fit stays, with the reason.';

CREATE OR REPLACE FUNCTION autoembed._forget_restored()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _id integer := (OLD.definition ->> 'id')::integer;
BEGIN
    IF OLD.kind = 'pipeline' AND NOT EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = _id) THEN
        PERFORM autoembed._drop_functions(_id, true);
        -- Lanes delete its records.
        INSERT INTO autoembed._job (due_at, message)
        VALUES (clock_timestamp(), jsonb_build_object('pipeline', _id, 'truncated', true));
    END IF;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_restored IS
    'Removes the functions, jobs and records of a pipeline that a restore could not bring back.';

CREATE OR REPLACE FUNCTION autoembed._follow_restore()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _trigger record;
BEGIN
    FOR _trigger IN
        SELECT t.tgrelid, t.tgname, t.tgenabled
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_trigger AS t
            ON d.classid = 'pg_class'::regclass AND t.tgrelid = d.objid
           AND t.tgfoid IN ('autoembed._keep_restored_queue'::regproc, 'autoembed._take_restored'::regproc)
    LOOP
        IF _trigger.tgenabled = 'O' THEN
            -- ENABLE TRIGGER ALL has made an ordinary trigger of it. This statement is followed, too.
            EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', _trigger.tgrelid::regclass, _trigger.tgname);
        ELSIF _trigger.tgrelid = 'pgmq.meta'::regclass THEN
            PERFORM autoembed._list_queue(_trigger.tgenabled <> 'D');
        ELSIF _trigger.tgenabled <> 'D' THEN
            UPDATE autoembed.restored AS r SET problem = NULL WHERE r.problem IS NULL;
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_restore IS
    'Does the work of the triggers of a restore that switches them off: pg_restore --disable-triggers.';
