-- 30_pipelines.sql: which column of which table is embedded, and the two functions that touch it with its owner's rights.

CREATE FUNCTION autoembed._content_function(table_id oid, name text)
    RETURNS oid
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _found oid[];
BEGIN
    -- The table's own schema comes first, as the caller's search_path is not known here.
    SELECT array_agg(f.oid ORDER BY f.same_schema DESC, f.oid)
    INTO _found
    FROM (
        SELECT p.oid, p.pronamespace = c.relnamespace AS same_schema
        FROM pg_class AS c
        -- By its name without a schema first, which has an index.
        JOIN pg_proc AS p
            ON p.proname IN (name, substring(name FROM '[.]([^.]*)$'), substring(name FROM '[.]"(.*)"$'))
           AND p.proargtypes[0] = c.reltype AND p.pronargs = 1 AND p.prokind = 'f' AND NOT p.proretset
        JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE c.oid = table_id
          AND name IN (p.proname::text, format('%s.%s', n.nspname, p.proname), format('%I.%I', n.nspname, p.proname))
    ) AS f;
    RETURN _found[1];
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_function(oid, text) IS
    'The function of one row of the table with that name, which may name its schema; NULL if there is none.';

CREATE FUNCTION autoembed._check_pipeline(
    table_id oid,
    embedding_column text,
    content_function text,
    model text,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table pg_class;
    _function pg_proc;
    _type text;
    _type_dimensions integer;
    _model autoembed.model;
BEGIN
    SELECT c.* INTO _table FROM pg_class AS c WHERE c.oid = table_id;
    IF NOT FOUND THEN
        problem := format('the table with OID %s no longer exists', table_id);
        errcode := 'undefined_table';
        RETURN;
    END IF;
    IF _table.relkind NOT IN ('r', 'p') THEN
        problem := format('%s is not a table', table_id::regclass);
        hint := 'Only tables and partitioned tables hold embeddings.';
        errcode := 'wrong_object_type';
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = table_id AND a.attname = 'id' AND NOT a.attisdropped) THEN
        problem := format('table %s has no column id', table_id::regclass);
        hint := 'queue_embeddings() finds rows by a primary key column called id.';
        errcode := 'undefined_column';
        RETURN;
    END IF;

    SELECT CASE WHEN e.oid IS NOT NULL THEN t.typname ELSE format_type(a.atttypid, a.atttypmod) END, a.atttypmod
    INTO _type, _type_dimensions
    FROM pg_attribute AS a
    JOIN pg_type AS t ON t.oid = a.atttypid
    LEFT JOIN pg_extension AS e ON e.extname = 'vector' AND e.extnamespace = t.typnamespace
    WHERE a.attrelid = table_id AND a.attname = embedding_column AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        problem := format('table %s has no column "%s"', table_id::regclass, embedding_column);
        hint := format('Add it: ALTER TABLE %s ADD COLUMN %I halfvec(%s).',
                       table_id::regclass, embedding_column, (autoembed._model(model)).dimensions);
        errcode := 'undefined_column';
        RETURN;
    END IF;
    IF _type NOT IN ('vector', 'halfvec') THEN
        problem := format('column "%s" of table %s is of type %s', embedding_column, table_id::regclass, _type);
        hint := 'An embedding column is of type halfvec or vector.';
        errcode := 'datatype_mismatch';
        RETURN;
    END IF;

    SELECT p.* INTO _function FROM pg_proc AS p WHERE p.oid = autoembed._content_function(table_id, content_function);
    IF NOT FOUND THEN
        problem := format('there is no function "%s" of one row of %s', content_function, table_id::regclass);
        hint := format('Create it: CREATE FUNCTION %s(%s) RETURNS text.', content_function, table_id::regclass);
        errcode := 'undefined_function';
        RETURN;
    END IF;
    IF (SELECT t.typcategory FROM pg_type AS t WHERE t.oid = _function.prorettype) <> 'S' THEN
        problem := format('function %s returns %s', _function.oid::regprocedure, format_type(_function.prorettype, NULL));
        hint := 'A content function returns text.';
        errcode := 'datatype_mismatch';
        RETURN;
    END IF;
    -- It will run as the table's owner, so it must come from somebody who already has the owner's rights.
    IF NOT pg_has_role(_function.proowner, _table.relowner, 'MEMBER') THEN
        problem := format('function %s belongs to %I, who has not the rights of %I, the owner of table %s',
                          _function.oid::regprocedure, pg_get_userbyid(_function.proowner),
                          pg_get_userbyid(_table.relowner), table_id::regclass);
        hint := format('Make it the table owner''s: ALTER FUNCTION %s OWNER TO %I.',
                       _function.oid::regprocedure, pg_get_userbyid(_table.relowner));
        errcode := 'insufficient_privilege';
        RETURN;
    END IF;

    _model := autoembed._model(model);
    IF _type_dimensions NOT IN (-1, _model.dimensions) THEN
        problem := format('column "%s" of table %s has %s dimensions, model "%s" has %s',
                          embedding_column, table_id::regclass, _type_dimensions, _model.name, _model.dimensions);
        hint := format('Change the column: ALTER TABLE %s ALTER COLUMN %I TYPE %s(%s) USING NULL; or the model: SELECT autoembed.set_default_model(…).',
                       table_id::regclass, embedding_column, _type, _model.dimensions);
        -- Not an error of the trigger: another model cures it at any time.
        errcode := 'waits';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_pipeline(oid, text, text, text) IS
    'Why the column cannot be embedded as things stand, and what to do; NULLs if it can. errcode waits: the jobs wait for a change.';

CREATE VIEW autoembed._pipeline_state AS
SELECT p.id,
       p.table_id,
       p.embedding_column,
       p.content_function,
       p.truncate,
       coalesce(p.model, autoembed._default_model()) AS model,
       coalesce(c.problem, CASE WHEN r.until > clock_timestamp() THEN format('model "%s" rests: %s', r.model, r.reason) END)
           AS blocked,
       coalesce(c.hint, CASE WHEN r.needs_attention THEN format('SELECT autoembed.resume_model(%L) tries it at once.', r.model) END)
           AS hint,
       c.problem IS NULL AS sound,
       coalesce(r.failures, 0) AS failures
FROM autoembed.pipeline AS p
CROSS JOIN LATERAL autoembed._check_pipeline(p.table_id, p.embedding_column, p.content_function, p.model) AS c
LEFT JOIN autoembed.model_rest AS r ON r.model = coalesce(p.model, autoembed._default_model());
COMMENT ON VIEW autoembed._pipeline_state IS 'Every pipeline, and why its jobs wait, if they do.';

CREATE FUNCTION autoembed._warn_of_blocked_pipelines(only_with_jobs boolean DEFAULT false)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _state record;
BEGIN
    FOR _state IN
        SELECT s.*
        FROM autoembed.pipeline AS p
        JOIN autoembed._pipeline_state AS s ON s.id = p.id AND s.blocked IS NOT NULL
        WHERE NOT only_with_jobs
           OR EXISTS (SELECT FROM pgmq.q_embedding_jobs AS q WHERE coalesce(q.message ->> 'pipeline', '') = p.id::text)
        ORDER BY p.id
    LOOP
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('%s.%I is not being embedded: %s', _state.table_id, _state.embedding_column, _state.blocked),
            HINT = coalesce(_state.hint, 'Its jobs are kept, and go on by themselves.');
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._warn_of_blocked_pipelines(boolean) IS 'Says which pipelines wait, why, and what to do.';

CREATE FUNCTION autoembed._build_pipeline(pipeline_id integer)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _owner name;
    _table text;
    _schema text;
    _key_type text;
    _column text;
    _column_type text;
    _content text;
    _guard text;
    _body text;
    _from text;
    _ready boolean;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    SELECT c.oid::regclass::text, n.nspname, pg_get_userbyid(c.relowner), format_type(k.atttypid, k.atttypmod),
           quote_ident(e.attname), format_type(e.atttypid, e.atttypmod),
           format('%I.%I(t)', fn.nspname, f.proname)
    INTO STRICT _table, _schema, _owner, _key_type, _column, _column_type, _content
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_attribute AS k ON k.attrelid = c.oid AND k.attname = 'id' AND NOT k.attisdropped
    JOIN pg_attribute AS e ON e.attrelid = c.oid AND e.attname = _pipeline.embedding_column AND NOT e.attisdropped
    JOIN pg_proc AS f ON f.oid = autoembed._content_function(c.oid, _pipeline.content_function)
    JOIN pg_namespace AS fn ON fn.oid = f.pronamespace
    WHERE c.oid = _pipeline.table_id;

    _from := concat_ws(' ', _table, _owner, _key_type, _column, _column_type, _content);
    SELECT count(*) = 2 INTO _ready
    FROM pg_proc AS p
    JOIN pg_roles AS o ON o.oid = p.proowner AND o.rolname = _owner
    WHERE p.pronamespace = 'autoembed'::regnamespace
      AND p.proname IN ('_content_' || pipeline_id, '_write_' || pipeline_id)
      AND p.prosecdef;
    IF _ready AND _pipeline.built_from = _from THEN
        RETURN;
    END IF;

    -- An owner's code that raises a cancel or a shutdown would be taken for a real one, and end every pass.
    _guard := $guard$
EXCEPTION WHEN operator_intervention OR insufficient_resources OR system_error THEN
    GET STACKED DIAGNOSTICS _context = PG_EXCEPTION_CONTEXT;
    IF pg_catalog.split_part(_context, E'\n', 1) LIKE '%% at RAISE' THEN
        RAISE EXCEPTION USING MESSAGE = SQLERRM;
    END IF;
    RAISE;
END;$guard$;

    -- Both run as the table's owner, whoever runs the lane: what his functions, triggers and defaults do, they do as him.
    -- The bodies are quoted as a whole, so that no name in them can end them.
    _body := format($body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
    RETURN QUERY
    SELECT s.key, %1$s::text, t.%2$s IS NOT NULL
    FROM pg_catalog.unnest(keys) AS s(key)
    JOIN %3$s AS t ON t.id = (s.key::pg_catalog.jsonb ->> 0)::%4$s;
$body$ || _guard, _content, _column, _table, _key_type);
    EXECUTE format('DROP FUNCTION IF EXISTS autoembed._content_%1$s(text[]), autoembed._write_%1$s(text[], text[], text[])', pipeline_id);
    EXECUTE format($ddl$
CREATE FUNCTION autoembed._content_%1$s(keys text[])
    RETURNS TABLE (key text, content text, has_embedding boolean)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = %2$I, public, pg_temp
AS %3$L$ddl$, pipeline_id, _schema, _body);

    -- Rows that somebody else has locked are left out: embeddings never wait for an application, nor two lanes for each other.
    -- Triggers deferred to the commit would run as the lane, so they run at the end of this.
    _body := format($body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
    FOR key, outcome IN
    WITH sent AS MATERIALIZED (
        SELECT s.key, (s.key::pg_catalog.jsonb ->> 0)::%4$s AS id, s.content, s.embedding
        FROM unnest(keys, contents, embeddings) AS s(key, content, embedding)
    ),
    locked AS MATERIALIZED (
        SELECT s.key, t.id, s.content, s.embedding, %1$s::text COLLATE "C" IS NOT DISTINCT FROM s.content AS unchanged
        FROM sent AS s
        JOIN %3$s AS t ON t.id = s.id
        ORDER BY t.id
        FOR NO KEY UPDATE OF t SKIP LOCKED
    ),
    written AS (
        UPDATE %3$s AS t
        SET %2$s = l.embedding::%5$s
        FROM locked AS l
        WHERE t.id = l.id AND l.unchanged
        RETURNING l.key, %1$s::text COLLATE "C" IS NOT DISTINCT FROM l.content AS unchanged
    )
    SELECT s.key,
           CASE WHEN w.unchanged THEN 'written'
                WHEN w.key IS NOT NULL THEN 'overtaken'
                WHEN l.key IS NOT NULL THEN 'changed'
                WHEN EXISTS (SELECT FROM %3$s AS t WHERE t.id = s.id) THEN 'locked'
                ELSE 'gone'
           END
    FROM sent AS s
    LEFT JOIN locked AS l ON l.key = s.key
    LEFT JOIN (SELECT w.key, pg_catalog.bool_and(w.unchanged) AS unchanged FROM written AS w GROUP BY w.key) AS w
        ON w.key = s.key
    LOOP
        -- Undone, as it would leave the vector of one text beside another.
        IF outcome = 'overtaken' THEN
            RAISE EXCEPTION 'a trigger of the table changes the text when its embedding is written';
        END IF;
        RETURN NEXT;
    END LOOP;
    IF EXISTS (SELECT FROM pg_catalog.pg_trigger AS g WHERE g.tgdeferrable AND NOT g.tgisinternal)
       OR EXISTS (SELECT FROM pg_catalog.pg_constraint AS c WHERE c.contype = 'x' AND c.condeferrable) THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
$body$ || _guard, _content, _column, _table, _key_type, _column_type);
    EXECUTE format($ddl$
CREATE FUNCTION autoembed._write_%1$s(keys text[], contents text[], embeddings text[])
    RETURNS TABLE (key text, outcome text)
    LANGUAGE plpgsql
    VOLATILE
    SECURITY DEFINER
    SET search_path = %2$I, public, pg_temp
    SET autoembed.writing = %3$L
AS %4$L$ddl$, pipeline_id, _schema, _pipeline.table_id::oid, _body);
    EXECUTE format('ALTER FUNCTION autoembed._content_%s(text[]) OWNER TO %I', pipeline_id, _owner);
    EXECUTE format('ALTER FUNCTION autoembed._write_%s(text[], text[], text[]) OWNER TO %I', pipeline_id, _owner);
    EXECUTE format('REVOKE ALL ON FUNCTION autoembed._content_%1$s(text[]), autoembed._write_%1$s(text[], text[], text[]) FROM PUBLIC', pipeline_id);
    UPDATE autoembed.pipeline AS p SET built_from = _from WHERE p.id = pipeline_id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_pipeline(integer) IS
    'Makes the functions that read a pipeline''s texts and write its vectors, if they are missing or the table has changed.';

CREATE FUNCTION autoembed._check_deferred()
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
COMMENT ON FUNCTION autoembed._check_deferred() IS
    'Fails if writing has left trigger events for the commit, which PostgreSQL runs as the session''s user.';

CREATE FUNCTION autoembed._adopt(table_id oid, embedding_column text, content_function text)
    RETURNS integer
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _root oid := coalesce(pg_partition_root(table_id), table_id);
    _check record;
    _id integer;
BEGIN
    SELECT p.id INTO _id
    FROM autoembed.pipeline AS p
    WHERE p.table_id = _root AND p.embedding_column = _adopt.embedding_column AND p.content_function = _adopt.content_function;
    IF FOUND THEN
        RETURN _id;
    END IF;
    SELECT c.* INTO _check FROM autoembed._check_pipeline(_root, embedding_column, content_function, NULL) AS c;
    IF _check.errcode = 'waits' THEN
        RAISE WARNING USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = 'object_not_in_prerequisite_state';
    ELSIF _check.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = _check.errcode;
    END IF;
    INSERT INTO autoembed.pipeline AS p (table_id, embedding_column, content_function)
    VALUES (_root, _adopt.embedding_column, _adopt.content_function)
    ON CONFLICT ON CONSTRAINT pipeline_table_id_embedding_column_content_function_key DO UPDATE SET table_id = excluded.table_id
    RETURNING p.id INTO _id;
    PERFORM autoembed._build_pipeline(_id);
    RETURN _id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._adopt(oid, text, text) IS
    'The pipeline of that table, column and content function, made if it is new; an error if it cannot be.';

CREATE FUNCTION autoembed._drop_orphaned_pipelines()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _id integer;
BEGIN
    FOR _id IN
        DELETE FROM autoembed.pipeline AS p
        WHERE NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = p.table_id)
        RETURNING p.id
    LOOP
        DELETE FROM pgmq.q_embedding_jobs AS q WHERE coalesce(q.message ->> 'pipeline', '') = _id::text;
        EXECUTE format('DROP FUNCTION IF EXISTS autoembed._content_%1$s(text[]), autoembed._write_%1$s(text[], text[], text[])', _id);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_orphaned_pipelines() IS 'Ends the pipelines whose table was dropped, with their jobs.';

-- What can be known at DDL time is said at DDL time -------------------------------------------------

CREATE FUNCTION autoembed._check_trigger()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _trigger record;
    _arguments text[];
BEGIN
    FOR _trigger IN
        SELECT t.*, f.proname
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_trigger AS t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid AND t.tgparentid = 0
        JOIN pg_proc AS f ON f.oid = t.tgfoid AND f.pronamespace = 'autoembed'::regnamespace
        WHERE f.proname IN ('queue_embeddings', 'clear_column')
    LOOP
        -- tgargs: each argument ends with a zero byte, which the escape format shows as \000.
        SELECT array_agg(convert_from(decode(a.argument, 'escape'), getdatabaseencoding()) ORDER BY a.position)
        INTO _arguments
        FROM string_to_table(encode(_trigger.tgargs, 'escape'), '\000') WITH ORDINALITY AS a(argument, position)
        WHERE a.position <= _trigger.tgnargs;
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
                    MESSAGE = 'autoembed.queue_embeddings() is for AFTER triggers and takes two arguments, a content function and an embedding column',
                    HINT = 'For example: AFTER INSERT ON documents FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings(''embedding_input'', ''embedding'').';
            END IF;
            PERFORM autoembed._adopt(_trigger.tgrelid, _arguments[2], _arguments[1]);
        ELSIF _trigger.tgnargs <> 1 OR _trigger.tgtype & 2 = 0 OR _trigger.tgtype & 16 = 0 THEN
            RAISE EXCEPTION USING
                ERRCODE = 'invalid_parameter_value',
                MESSAGE = 'autoembed.clear_column() is for BEFORE UPDATE triggers and takes one argument, a column',
                HINT = 'For example: BEFORE UPDATE OF title ON documents FOR EACH ROW EXECUTE FUNCTION autoembed.clear_column(''embedding'').';
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
COMMENT ON FUNCTION autoembed._check_trigger() IS 'Checks a trigger of ours when it is created, not when a row is written.';

CREATE EVENT TRIGGER autoembed_check_trigger
    ON ddl_command_end
    WHEN TAG IN ('CREATE TRIGGER')
    EXECUTE FUNCTION autoembed._check_trigger();

CREATE FUNCTION autoembed._protect_functions()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- A table owner owns his pipelines' functions; as SECURITY INVOKER they would run as the lane, a superuser.
    IF NOT (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user)
       AND EXISTS (SELECT FROM pg_event_trigger_ddl_commands() AS d WHERE d.schema_name = 'autoembed') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = 'the functions in schema autoembed cannot be altered',
            HINT = 'They are made anew when their table changes.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._protect_functions() IS 'Keeps table owners from altering the functions made for them.';

CREATE EVENT TRIGGER autoembed_protect_functions
    ON ddl_command_end
    WHEN TAG IN ('ALTER FUNCTION', 'ALTER ROUTINE')
    EXECUTE FUNCTION autoembed._protect_functions();
