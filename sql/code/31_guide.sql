-- Triggers made by hand, as the Supabase guide has them, and the messages that they send.

CREATE OR REPLACE FUNCTION autoembed.queue_embeddings()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _root oid := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    _id text;
    _type regtype;
BEGIN
    -- Nothing has changed, or only the vector that a lane is writing.
    IF TG_OP = 'UPDATE' AND (
        NEW OPERATOR(pg_catalog.*=) OLD
        OR pg_trigger_depth() = 1 AND current_setting('autoembed.writing', true) = _root::text
           AND autoembed._may_write_vectors(_root, true)
    ) THEN
        RETURN NEW;
    END IF;

    BEGIN
        -- format() uses the type's output function. A cast, as in to_jsonb(), may be the owner's, and this function
        -- runs with more rights.
        _id := format('%s', NEW.id);
        _type := pg_typeof(NEW.id);
    EXCEPTION
        WHEN undefined_column THEN
            RAISE WARNING USING
                ERRCODE = 'undefined_column',
                MESSAGE = format('a row of %s is not queued for embedding: the table has no column id',
                                 TG_RELID::regclass),
                HINT = 'queue_embeddings() finds rows by a primary key column called id.';
            RETURN NEW;
        WHEN datatype_mismatch THEN
            -- The column had another type when this session planned these expressions.
            EXECUTE 'SELECT pg_catalog.format(''%s'', ($1).id), pg_catalog.pg_typeof(($1).id)'
            INTO _id, _type
            USING NEW;
    END;

    -- The same INSERT as in pgmq.send(), whose dynamic SQL costs more than all the rest.
    INSERT INTO autoembed._job (due_at, message)
    VALUES (
        clock_timestamp(),
        jsonb_build_object(
            'id', CASE
                WHEN _type IN ('bigint'::regtype, 'integer'::regtype, 'smallint'::regtype) THEN to_jsonb(_id::bigint)
                ELSE to_jsonb(_id)
            END,
            'schema', TG_TABLE_SCHEMA,
            'table', TG_TABLE_NAME,
            'contentFunction', TG_ARGV[0],
            'embeddingColumn', TG_ARGV[1],
            'pipeline', (
                SELECT p.id
                FROM autoembed.pipeline AS p
                WHERE p.table_id = _root AND p.embedding_column = TG_ARGV[1]
            )
        ) || CASE
            -- Another trigger changes the row where a lane writes a vector, and the lane would write for ever.
            WHEN pg_trigger_depth() > 1 AND current_setting('autoembed.writing', true) <> ''
                 AND autoembed._may_write_vectors(_root) THEN '{"echo": true}'
            ELSE '{}'
        END::jsonb
    );
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.queue_embeddings IS
    'Row trigger for INSERT and UPDATE: queues the row for embedding. Arguments: the function of a row that gives its '
    'text, and the embedding column.';

CREATE OR REPLACE FUNCTION autoembed.clear_column()
    RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _is_changed boolean := NOT NEW OPERATOR(pg_catalog.*=) OLD;
BEGIN
    -- A trigger for a generated column fires for the write of a vector, too. Any session can have the setting.
    IF _is_changed AND pg_trigger_depth() = 1 AND current_setting('autoembed.writing', true)
           = coalesce(pg_partition_root(TG_RELID), TG_RELID)::oid::text THEN
        EXECUTE (
            SELECT format('SELECT pg_catalog.record_image_ne(ROW(%s), ROW(%s))',
                          string_agg(format('($1).%I', a.attname), ', ' ORDER BY a.attnum),
                          string_agg(format('($2).%I', a.attname), ', ' ORDER BY a.attnum))
            FROM pg_attribute AS a
            WHERE a.attrelid = TG_RELID AND a.attnum > 0 AND NOT a.attisdropped
              -- PostgreSQL computes generated columns after this trigger.
              AND a.attgenerated = '' AND a.attname <> TG_ARGV[0]
        )
        INTO _is_changed
        USING NEW, OLD;
    END IF;
    IF _is_changed THEN
        NEW := jsonb_populate_record(NEW, jsonb_build_object(TG_ARGV[0], NULL));
    END IF;
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.clear_column IS
    'Row trigger BEFORE UPDATE: sets a column to NULL when the row changes. Argument: the column.';

CREATE OR REPLACE FUNCTION autoembed._arguments(trigger pg_trigger)
    RETURNS text[]
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- tgargs: each argument ends with a zero byte, which the escape format shows as \000.
    SELECT array_agg(convert_from(decode(a.argument, 'escape'), getdatabaseencoding()) ORDER BY a.position)
    FROM string_to_table(encode(trigger.tgargs, 'escape'), E'\\000') WITH ORDINALITY AS a(argument, position)
    WHERE a.position <= trigger.tgnargs;
$sql$;
COMMENT ON FUNCTION autoembed._arguments IS 'The arguments of a trigger.';

CREATE OR REPLACE FUNCTION autoembed._guide_triggers(pipeline autoembed.pipeline)
    RETURNS SETOF pg_trigger
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT t.*
    FROM pg_trigger AS t
    WHERE t.tgrelid IN (
              SELECT r.relid FROM autoembed._partition_tree(pipeline.table_id) AS r UNION ALL SELECT pipeline.table_id
          )
      AND pipeline.embedding_column = CASE t.tgfoid
              WHEN 'autoembed.queue_embeddings()'::regprocedure THEN (autoembed._arguments(t))[2]
              WHEN 'autoembed.clear_column()'::regprocedure THEN (autoembed._arguments(t))[1]
          END;
$sql$;
COMMENT ON FUNCTION autoembed._guide_triggers IS
    'The triggers made by hand for the embedding column of a pipeline, on its table and its partitions.';

CREATE OR REPLACE FUNCTION autoembed._missing_guide_triggers(pipeline autoembed.pipeline)
    RETURNS TABLE (problem text, cure text)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT format('no trigger for %s', e.event),
           format('CREATE TRIGGER %I AFTER %s ON %s FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings(%L, %L);',
                  autoembed._trigger_name(pipeline.id, e.event), upper(e.event), pipeline.table_id,
                  pipeline.content_function, pipeline.embedding_column)
    -- Bits of pg_trigger.tgtype.
    FROM (VALUES ('insert', 4), ('update', 16)) AS e(event, bit)
    WHERE NOT EXISTS (
        SELECT FROM autoembed._guide_triggers(pipeline) AS t
        WHERE t.tgrelid = pipeline.table_id
          AND t.tgfoid = 'autoembed.queue_embeddings()'::regprocedure AND t.tgtype & e.bit <> 0
    );
$sql$;
COMMENT ON FUNCTION autoembed._missing_guide_triggers IS
    'The events for which a table has no trigger made by hand, and the statement that makes one.';

CREATE OR REPLACE FUNCTION autoembed._adopt(table_id oid, embedding_column text, content_function text)
    RETURNS integer
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH root AS (
        SELECT coalesce(pg_partition_root(_adopt.table_id)::oid, _adopt.table_id) AS table_id
    ),
    made AS (
        INSERT INTO autoembed.pipeline AS p (table_id, embedding_column, key_columns, content_function, managed)
        SELECT r.table_id, _adopt.embedding_column, '{id}', _adopt.content_function, false
        FROM root AS r
        WHERE NOT EXISTS (
            SELECT FROM autoembed.pipeline AS p
            WHERE p.table_id = r.table_id AND p.embedding_column = _adopt.embedding_column
        )
        RETURNING p.id
    )
    SELECT m.id FROM made AS m
    UNION ALL
    SELECT p.id
    FROM autoembed.pipeline AS p
    JOIN root AS r ON p.table_id = r.table_id AND p.embedding_column = _adopt.embedding_column;
$sql$;
COMMENT ON FUNCTION autoembed._adopt IS
    'The pipeline of that table and column, made with that content function if it is new; an error if it cannot be.';

-- Errors that can be known at DDL time --------------------------------------------------------------

CREATE OR REPLACE FUNCTION autoembed._check_trigger()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _trigger record;
    _arguments text[];
    _id integer;
    _stray record;
    _void text;
BEGIN
    -- It would read columns of another table, and queue its rows for that one.
    FOR _stray IN
        SELECT s.*
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_trigger AS t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid
        CROSS JOIN LATERAL autoembed._stray_triggers(t.tgrelid) AS s
        JOIN autoembed.pipeline AS p ON p.id = s.pipeline_id
        WHERE s.name = t.tgname
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', _stray.name, _stray.stray_on);
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('trigger %I was taken away from table %s: it belongs to a pipeline of another table',
                             _stray.name, _stray.stray_on),
            HINT = format('Attach the table: SELECT autoembed.enable(%L, …).', _stray.stray_on);
    END LOOP;
    -- The restore of a dump, which switches this off, may bring the trigger before its pipeline.
    IF NOT current_setting('check_function_bodies')::boolean THEN
        RETURN;
    END IF;
    FOR _trigger IN
        SELECT t AS trigger, t.tgrelid, t.tgtype, t.tgnargs, f.proname
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_trigger AS t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid AND t.tgparentid = 0
        JOIN pg_proc AS f ON f.oid = t.tgfoid AND f.pronamespace = 'autoembed'::regnamespace
        WHERE f.proname IN ('queue_embeddings', 'clear_column')
    LOOP
        _arguments := autoembed._arguments(_trigger.trigger);
        -- Bits of pg_trigger.tgtype: 1 row, 2 before, 16 update.
        IF _trigger.tgtype & 1 = 0 THEN
            RAISE EXCEPTION USING
                ERRCODE = 'feature_not_supported',
                MESSAGE = format('autoembed.%s() works only FOR EACH ROW', _trigger.proname),
                HINT = 'Add FOR EACH ROW to CREATE TRIGGER.';
        ELSIF _trigger.proname = 'queue_embeddings' THEN
            IF _trigger.tgnargs <> 2 OR _trigger.tgtype & 2 <> 0 THEN
                RAISE EXCEPTION USING
                    ERRCODE = 'invalid_parameter_value',
                    MESSAGE = 'autoembed.queue_embeddings() is for AFTER triggers and takes two arguments, '
                              'a content function and an embedding column',
                    HINT = 'For example: AFTER INSERT ON documents FOR EACH ROW EXECUTE FUNCTION '
                           'autoembed.queue_embeddings(''embedding_input'', ''embedding'').';
            END IF;
            _id := autoembed._adopt(_trigger.tgrelid, _arguments[2], _arguments[1]);
            -- The loop keeps this statement out of the CONTEXT of a refusal.
            FOR _void IN
                UPDATE autoembed.pipeline AS p
                SET content_function = _arguments[1]
                WHERE p.id = _id AND p.content_function IS DISTINCT FROM _arguments[1] AND NOT p.managed
                RETURNING p.id
            LOOP
            END LOOP;
            IF EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = _id AND p.managed) THEN
                RAISE EXCEPTION USING
                    ERRCODE = 'duplicate_object',
                    MESSAGE = format('%s.%I is being embedded already', _trigger.tgrelid::regclass, _arguments[2]),
                    HINT = 'autoembed.enable() has made its triggers; autoembed.disable() ends them.';
            END IF;
        ELSIF _trigger.tgnargs <> 1 OR _trigger.tgtype & 2 = 0 OR _trigger.tgtype & 16 = 0 THEN
            RAISE EXCEPTION USING
                ERRCODE = 'invalid_parameter_value',
                MESSAGE = 'autoembed.clear_column() is for BEFORE UPDATE triggers and takes one argument, a column',
                HINT = 'For example: BEFORE UPDATE OF title ON documents FOR EACH ROW EXECUTE FUNCTION '
                       'autoembed.clear_column(''embedding'').';
        ELSIF NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = _trigger.tgrelid AND a.attname = _arguments[1] AND a.attnum > 0 AND NOT a.attisdropped
        ) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'undefined_column',
                MESSAGE = format('table %s has no column "%s"', _trigger.tgrelid::regclass, _arguments[1]),
                HINT = 'autoembed.clear_column() takes the name of a column of its table.';
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_trigger IS
    'Checks a trigger of this extension when it is created, not when a row is written.';

CREATE OR REPLACE FUNCTION autoembed._resolve(message jsonb)
    RETURNS integer
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _missing text;
    _table oid;
    _pipeline autoembed.pipeline;
    _function oid;
BEGIN
    SELECT string_agg(k.key, ', ') INTO _missing
    FROM unnest('{id,schema,table,contentFunction,embeddingColumn}'::text[]) AS k(key)
    WHERE jsonb_typeof(message) IS DISTINCT FROM 'object' OR (message ->> k.key) IS NULL;
    IF _missing IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('the message lacks %s', _missing),
            HINT = 'Messages are sent by the trigger autoembed.queue_embeddings().';
    END IF;
    SELECT c.oid INTO _table
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = message ->> 'schema' AND c.relname = message ->> 'table';
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_table',
            MESSAGE = format('there is no table %I.%I', message ->> 'schema', message ->> 'table');
    END IF;
    _pipeline.id := autoembed._adopt(_table, message ->> 'embeddingColumn', message ->> 'contentFunction');
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = _pipeline.id;
    _function := autoembed._content_function(_pipeline.table_id, message ->> 'contentFunction');
    IF _function IS DISTINCT FROM autoembed._content_function_of(_pipeline) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_function',
            MESSAGE = CASE
                WHEN _function IS NULL THEN format(
                    'there is no function "%s" of one row of %s', message ->> 'contentFunction', _pipeline.table_id
                )
                ELSE format(
                    '%s.%I is not embedded from function "%s"',
                    _pipeline.table_id, _pipeline.embedding_column, message ->> 'contentFunction'
                )
            END;
    END IF;
    RETURN _pipeline.id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._resolve IS
    'The pipeline that a message of the guide''s form is for, made if it is new; an error if the message is of no use.';
