-- 31_build.sql: the functions made for a pipeline. Those that read texts and write vectors run with its table owner's rights.

CREATE FUNCTION autoembed._output_settings()
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT $$SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres' SET extra_float_digits = 1 SET bytea_output = 'hex'$$;
$sql$;
COMMENT ON FUNCTION autoembed._output_settings() IS
    'The settings of functions in which a text or a key must look the same whatever the session''s are.';

CREATE FUNCTION autoembed._create_owned(owner name, signature text, returns text, options text, body text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _function regprocedure;
BEGIN
    -- The body is quoted as a whole, so that no name in it can end it. An owner's code that raises a cancel or a shutdown
    -- would be taken for a real one, and end every pass.
    EXECUTE format('CREATE FUNCTION autoembed.%s RETURNS %s LANGUAGE plpgsql SECURITY DEFINER %s AS %L', signature, returns, options, format($body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
%s
EXCEPTION WHEN operator_intervention OR insufficient_resources OR system_error THEN
    GET STACKED DIAGNOSTICS _context = PG_EXCEPTION_CONTEXT;
    IF pg_catalog.split_part(_context, E'\n', 1) LIKE '%% at RAISE' THEN
        RAISE EXCEPTION USING MESSAGE = SQLERRM;
    END IF;
    RAISE;
END;$body$, body));
    SELECT p.oid INTO STRICT _function
    FROM pg_proc AS p
    WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname = split_part(signature, '(', 1);
    EXECUTE format('ALTER FUNCTION %s OWNER TO %I', _function, owner);
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', _function);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._create_owned(name, text, text, text, text) IS
    'Makes a function that runs with the rights of a table''s owner, for lanes alone.';

CREATE FUNCTION autoembed._drop_functions(pipeline_id integer, with_capture boolean)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    _function regprocedure;
BEGIN
    FOR _function IN
        SELECT p.oid
        FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace
          AND (p.proname IN ('_content_' || pipeline_id, '_write_' || pipeline_id, '_scan_' || pipeline_id, '_text_' || pipeline_id)
               OR with_capture AND p.proname IN ('_capture_' || pipeline_id, '_clear_' || pipeline_id))
    LOOP
        -- Its triggers go with a trigger function.
        EXECUTE format('DROP FUNCTION %s %s', _function, CASE WHEN with_capture THEN 'CASCADE' END);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_functions(integer, boolean) IS
    'Drops the functions made for a pipeline; with_capture: those of its triggers, and the triggers, too.';

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
    _vector_type text;
    _options text;
    -- Of the row t: its text, its key as a JSON array, its key columns; the same of a key s.key that was sent.
    _content text;
    _key_json text;
    _keys text;
    _sent_keys text;
    _same_key text;
    _later_key text;
    _model text;
    _from text;
    _ready boolean;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    _content := autoembed._content_expression(_pipeline, 't');
    _key_json := autoembed._key_expression(_pipeline, 't');
    -- Rows of tables that inherit from it have keys of their own.
    SELECT CASE c.relkind WHEN 'r' THEN 'ONLY ' ELSE '' END || c.oid::regclass::text, pg_get_userbyid(c.relowner), format_type(e.atttypid, NULL),
           -- What a key or a text looks like must not depend on the session.
           format('SET search_path = %I, public, pg_temp %s', n.nspname, autoembed._output_settings())
    INTO STRICT _table, _owner, _vector_type, _options
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_attribute AS e ON e.attrelid = c.oid AND e.attname = _pipeline.embedding_column AND NOT e.attisdropped
    WHERE c.oid = _pipeline.table_id;
    SELECT string_agg(format('t.%I', k.name), ', ' ORDER BY k.position),
           string_agg(format('(s.key::pg_catalog.jsonb ->> %s)::%s AS k%s', k.position - 1, format_type(a.atttypid, a.atttypmod), k.position),
                      ', ' ORDER BY k.position),
           string_agg(format('t.%I %s s.k%s', k.name, autoembed._operator(_pipeline.table_id, k.name, 3), k.position), ' AND ' ORDER BY k.position),
           -- One row comparison goes by the index; operators of several schemas take it in pieces.
           CASE WHEN bool_and(autoembed._operator(_pipeline.table_id, k.name, 5) IN ('OPERATOR(pg_catalog.>)', '>'))
                THEN format('ROW(%s) OPERATOR(pg_catalog.>) ROW(%s)', string_agg(format('t.%I', k.name), ', ' ORDER BY k.position), string_agg('s.k' || k.position, ', ' ORDER BY k.position))
                ELSE string_agg(format('%st.%I %s s.k%s', (
                         SELECT string_agg(format('t.%I %s s.k%s AND ', e.name, autoembed._operator(_pipeline.table_id, e.name, 3), e.position), '')
                         FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS e(name, position) WHERE e.position < k.position
                     ), k.name, autoembed._operator(_pipeline.table_id, k.name, 5), k.position), ' OR ' ORDER BY k.position)
           END
    INTO STRICT _keys, _sent_keys, _same_key, _later_key
    FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, position)
    JOIN pg_attribute AS a ON a.attrelid = _pipeline.table_id AND a.attname = k.name;

    _model := autoembed._model_identity(autoembed._model(_pipeline.model));

    _from := concat_ws(' ', _table, _owner, _options, _keys, _sent_keys, _pipeline.embedding_column, _vector_type, _content, _model);
    SELECT count(*) = 3 INTO _ready
    FROM pg_proc AS p
    JOIN pg_roles AS o ON o.oid = p.proowner AND o.rolname = _owner
    WHERE p.pronamespace = 'autoembed'::regnamespace
      AND p.proname IN ('_content_' || pipeline_id, '_write_' || pipeline_id, '_scan_' || pipeline_id)
      AND p.prosecdef;
    IF _ready AND _pipeline.built_from = _from THEN
        RETURN;
    END IF;
    PERFORM autoembed._drop_functions(pipeline_id, false);

    PERFORM autoembed._create_owned(_owner, format('_content_%s(keys text[])', pipeline_id),
        'TABLE (key text, content text, has_embedding boolean)', _options, format($body$
    -- Whoever has locked the table as a whole is not waited for; and what could not be written is not embedded.
    LOCK TABLE %3$s IN ROW EXCLUSIVE MODE NOWAIT;
    RETURN QUERY
    SELECT s.key, %1$s, t.%2$I IS NOT NULL
    FROM (SELECT s.key, %4$s FROM pg_catalog.unnest(keys) AS s(key)) AS s
    JOIN %3$s AS t ON %5$s;
$body$, _content, _pipeline.embedding_column, _table, _sent_keys, _same_key));

    PERFORM autoembed._create_owned(_owner, format('_scan_%s(after text, condition text, max_rows integer)', pipeline_id),
        'TABLE (key text)', _options, format($body$
    LOCK TABLE %1$s IN ACCESS SHARE MODE NOWAIT;
    FOR key IN EXECUTE pg_catalog.concat(
        %2$L,
        CASE WHEN after IS NOT NULL THEN %3$L END,
        CASE WHEN condition IS NOT NULL THEN pg_catalog.concat(' AND (', condition, ')') END,
        %4$L
    ) USING after, max_rows LOOP
        RETURN NEXT;
        max_rows := max_rows - 1;
        EXIT WHEN max_rows = 0;
    END LOOP;
$body$, _table,
        -- Of the first key there is nothing before.
        format('SELECT %s FROM %s AS t CROSS JOIN LATERAL (SELECT %s FROM (SELECT $1 AS key) AS s) AS s WHERE true', _key_json, _table, _sent_keys),
        format(' AND (%s)', _later_key),
        format(' ORDER BY %s LIMIT $2', _keys)));

    -- Rows that somebody else has locked are left out: embeddings never wait for an application, nor two lanes for each other.
    -- Triggers deferred to the commit would run as the lane, so they run at the end of this.
    PERFORM autoembed._create_owned(_owner, format('_write_%s(keys text[], contents text[], model text, embeddings %s[])', pipeline_id, _vector_type),
        'TABLE (key text, outcome text)', format('%s SET autoembed.writing = %L', _options, _pipeline.table_id::oid), format($body$
    -- Asked for before its model was changed: that of now may have been faster.
    IF model IS DISTINCT FROM %7$L THEN
        RETURN QUERY SELECT s.key, 'changed' FROM unnest(keys) AS s(key);
        RETURN;
    END IF;
    LOCK TABLE %3$s IN ROW EXCLUSIVE MODE NOWAIT;
    FOR key, outcome IN
    WITH sent AS MATERIALIZED (
        SELECT s.key, s.content, s.embedding, %4$s
        FROM unnest(keys, contents, embeddings) AS s(key, content, embedding)
    ),
    locked AS MATERIALIZED (
        SELECT s.*, %1$s COLLATE "C" IS NOT DISTINCT FROM s.content AS unchanged
        FROM sent AS s
        JOIN %3$s AS t ON %5$s
        ORDER BY %6$s
        FOR NO KEY UPDATE OF t SKIP LOCKED
    ),
    written AS (
        UPDATE %3$s AS t
        SET %2$I = s.embedding
        FROM locked AS s
        WHERE %5$s AND s.unchanged
        RETURNING s.key, %1$s COLLATE "C" IS NOT DISTINCT FROM s.content AS unchanged
    )
    SELECT s.key,
           CASE WHEN w.unchanged THEN 'written'
                WHEN w.key IS NOT NULL THEN 'overtaken'
                WHEN l.key IS NOT NULL THEN 'changed'
                WHEN EXISTS (SELECT FROM %3$s AS t WHERE %5$s) THEN 'locked'
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
$body$, _content, _pipeline.embedding_column, _table, _sent_keys, _same_key, _keys, _model));

    IF _pipeline.managed THEN
        PERFORM autoembed._build_capture(_pipeline, _owner, _options);
    END IF;
    UPDATE autoembed.pipeline AS p SET built_from = _from WHERE p.id = pipeline_id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_pipeline(integer) IS
    'Makes the functions that read a pipeline''s texts and write its vectors, if they are missing or the table has changed.';

CREATE FUNCTION autoembed._build_capture(pipeline autoembed.pipeline, owner name, options text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _runs_owners_code boolean := num_nonnulls(pipeline.content_function, pipeline.condition) > 0;
    _key_changed text;
    _text_changed text;
    -- A row whose key is NULL, now that it may be, cannot be found again.
    _has_key text := (SELECT format('ROW(%s) IS NOT NULL', string_agg(format('%%1$s.%I', k.name), ', ')) FROM unnest(pipeline.key_columns) AS k(name));
    _new_rows text := format('SELECT %s AS key FROM new_rows AS n WHERE %s', autoembed._key_expression(pipeline, 'n'), format(_has_key, 'n'));
    _enqueue text;
    _options text := 'SECURITY DEFINER SET search_path = pg_catalog, pg_temp';
BEGIN
    -- These run as the extension's owner, so that whoever writes the table needs no rights of ours; and so they compare values as
    -- they are stored, which calls no code of a type's. What is the owner's code runs in _text_N, as the owner.
    SELECT format('record_image_ne(ROW(%s), ROW(%s))', string_agg(format('OLD.%I', k.name), ', '), string_agg(format('NEW.%I', k.name), ', '))
    INTO _key_changed
    FROM unnest(pipeline.key_columns) AS k(name);

    IF _runs_owners_code THEN
        PERFORM autoembed._create_owned(owner, format('_text_%s(r anyelement)', pipeline.id), 'text', 'STABLE ' || options,
                                        format('RETURN %s;', autoembed._content_expression(pipeline, 'r')));
        _text_changed := format('autoembed._text_%1$s(OLD) COLLATE "C" IS DISTINCT FROM autoembed._text_%1$s(NEW)', pipeline.id);
    ELSE
        -- A long text that was left alone is the same value in the TOAST table, and need not be fetched to know it.
        SELECT string_agg(
            concat(
                CASE WHEN a.attlen = -1 AND a.attstorage <> 'p' THEN
                    format('(pg_column_toast_chunk_id(OLD.%1$I) = pg_column_toast_chunk_id(NEW.%1$I)) IS NOT TRUE AND ', k.name)
                END,
                format('record_image_ne(ROW(OLD.%1$I), ROW(NEW.%1$I))', k.name)
            ), ' OR ')
        INTO _text_changed
        FROM unnest(autoembed._columns_of(pipeline)) AS k(name)
        JOIN pg_attribute AS a ON a.attrelid = pipeline.table_id AND a.attname = k.name;
    END IF;
    IF EXISTS (
        SELECT FROM pg_attribute AS a
        JOIN pg_type AS t ON t.oid = a.atttypid
        WHERE a.attrelid = pipeline.table_id AND a.attname = ANY (pipeline.key_columns)
          AND t.typtype <> 'e' AND coalesce(nullif(t.typbasetype, 0), t.oid) NOT IN (
              'bigint'::regtype, 'integer'::regtype, 'smallint'::regtype, 'numeric'::regtype, 'boolean'::regtype,
              'text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'name'::regtype, 'uuid'::regtype)
    ) THEN
        -- What such a key looks like depends on the session.
        _options := concat_ws(' ', _options, autoembed._output_settings());
    END IF;

    -- The queue's INSERT is what pgmq.send() does inside, without its dynamic SQL, which costs more than all the rest. Most
    -- statements are of few rows, and to number these costs half as much again.
    _enqueue := format($sql$INSERT INTO pgmq.q_embedding_jobs (vt, message)
        SELECT clock_timestamp(), concat('{"pipeline": %1$s, "keys": [', string_agg(k.key, ','), ']}')::jsonb
        FROM (SELECT r.key FROM (%%1$s) AS r LIMIT 101) AS k
        HAVING count(*) BETWEEN 1 AND 100;
        IF NOT FOUND THEN
            INSERT INTO pgmq.q_embedding_jobs (vt, message)
            SELECT clock_timestamp(), concat('{"pipeline": %1$s, "keys": [', string_agg(k.key, ','), ']}')::jsonb
            FROM (SELECT r.key, (row_number() OVER () - 1) / 100 AS message FROM (%%1$s) AS r) AS k
            GROUP BY k.message;
        END IF$sql$, pipeline.id);

    EXECUTE format('CREATE OR REPLACE FUNCTION autoembed._capture_%s() RETURNS trigger LANGUAGE plpgsql %s AS %L',
                   pipeline.id, _options, format($body$
DECLARE
    _changed boolean;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        %1$s
        IF NOT (%8$s) THEN
            RETURN NULL;
        END IF;
        INSERT INTO pgmq.q_embedding_jobs (vt, message)
        VALUES (clock_timestamp(), concat('{"pipeline": %2$s, "keys": [', CASE WHEN %3$s THEN concat(%4$s, ',') END, %5$s, CASE WHEN %3$s THEN '], "moved": true}' ELSE ']}' END)::jsonb);
    ELSIF TG_OP = 'TRUNCATE' THEN
        INSERT INTO pgmq.q_embedding_jobs (vt, message)
        VALUES (clock_timestamp(), '{"pipeline": %2$s, "truncated": true}');
    ELSIF TG_LEVEL = 'ROW' THEN
        INSERT INTO pgmq.q_embedding_jobs (vt, message)
        SELECT clock_timestamp(), concat('{"pipeline": %2$s, "keys": [', CASE TG_OP WHEN 'INSERT' THEN %5$s ELSE %4$s END, ']}')::jsonb
        WHERE CASE TG_OP WHEN 'INSERT' THEN %9$s ELSE %10$s END;
    ELSIF TG_OP = 'INSERT' THEN
        %6$s
    ELSE
        %7$s;
    END IF;
    RETURN NULL;
END;$body$,
        CASE WHEN _runs_owners_code THEN format($plain$
        -- Only the vector that we ourselves are writing.
        IF pg_trigger_depth() = 1 AND current_setting('autoembed.writing', true) = %L THEN
            RETURN NULL;
        END IF;
        BEGIN
            _changed := %s OR %s;
        EXCEPTION WHEN OTHERS OR assert_failure THEN
            -- A row is never refused for its embedding: the lane will meet the error again, and report it.
            _changed := true;
        END;
        IF NOT _changed THEN
            RETURN NULL;
        END IF;$plain$, pipeline.table_id::oid, _key_changed, _text_changed)
        ELSE format($plain$
        IF NOT (%s OR %s) THEN
            RETURN NULL;
        END IF;$plain$, _key_changed, _text_changed)
        END,
        pipeline.id,
        _key_changed,
        autoembed._key_expression(pipeline, 'OLD'),
        autoembed._key_expression(pipeline, 'NEW'),
        CASE WHEN pipeline.condition IS NULL THEN format(_enqueue, _new_rows) || ';'
             ELSE format($plain$
        BEGIN
            %s;
        EXCEPTION WHEN OTHERS OR assert_failure THEN
            %s;
        END;$plain$,
                         format(_enqueue, format('%s AND autoembed._text_%s(n::%s) IS NOT NULL', _new_rows, pipeline.id, pipeline.table_id)),
                         format(_enqueue, _new_rows))
        END,
        format(_enqueue, format('SELECT %s AS key FROM old_rows AS o WHERE %s', autoembed._key_expression(pipeline, 'o'), format(_has_key, 'o'))),
        format(_has_key, 'OLD') || ' AND ' || format(_has_key, 'NEW'),
        format(_has_key, 'NEW'),
        format(_has_key, 'OLD')));
    EXECUTE format('REVOKE ALL ON FUNCTION autoembed._capture_%s() FROM PUBLIC', pipeline.id);

    EXECUTE format('CREATE OR REPLACE FUNCTION autoembed._clear_%s() RETURNS trigger LANGUAGE plpgsql %s AS %L',
                   pipeline.id, _options, format($body$
DECLARE
    _changed boolean;
BEGIN
    BEGIN
        _changed := %s;
    EXCEPTION WHEN OTHERS OR assert_failure THEN
        _changed := true;
    END;
    IF _changed THEN
        NEW.%I := NULL;
    END IF;
    RETURN NEW;
END;$body$, _text_changed, pipeline.embedding_column));
    EXECUTE format('REVOKE ALL ON FUNCTION autoembed._clear_%s() FROM PUBLIC', pipeline.id);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_capture(autoembed.pipeline, name, text) IS
    'Makes the trigger functions of a pipeline, which queue the keys of rows whose text has changed.';

CREATE FUNCTION autoembed._build_triggers(pipeline autoembed.pipeline)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    -- Neither partitions written directly nor logical replication fire statement triggers.
    _by_row boolean := pipeline.replicated
        OR (SELECT c.relkind = 'p' FROM pg_class AS c WHERE c.oid = pipeline.table_id);
    _name text;
    _definition text;
BEGIN
    FOR _name, _definition IN
        SELECT t.name, t.definition
        FROM (VALUES
            ('insert', 'AFTER INSERT ON %s' || CASE WHEN _by_row THEN ' FOR EACH ROW' ELSE ' REFERENCING NEW TABLE AS new_rows' END),
            ('delete', 'AFTER DELETE ON %s' || CASE WHEN _by_row THEN ' FOR EACH ROW' ELSE ' REFERENCING OLD TABLE AS old_rows' END),
            ('update', 'AFTER UPDATE ON %s FOR EACH ROW'),
            ('truncate', 'AFTER TRUNCATE ON %s'),
            -- By its name the last of the BEFORE triggers, so that it sees what the others make of the text.
            ('clear', CASE WHEN pipeline.on_change = 'clear' THEN 'BEFORE UPDATE ON %s FOR EACH ROW' END)
        ) AS t(name, definition)
    LOOP
        EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', autoembed._trigger_name(pipeline.id, _name), pipeline.table_id);
        CONTINUE WHEN _definition IS NULL;
        EXECUTE format('CREATE TRIGGER %I ' || _definition || ' EXECUTE FUNCTION autoembed._%s_%s()',
                       autoembed._trigger_name(pipeline.id, _name), pipeline.table_id,
                       CASE _name WHEN 'clear' THEN 'clear' ELSE 'capture' END, pipeline.id);
        IF pipeline.replicated THEN
            EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', pipeline.table_id, autoembed._trigger_name(pipeline.id, _name));
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_triggers(autoembed.pipeline) IS 'Makes the triggers of a pipeline anew.';

CREATE FUNCTION autoembed._trigger_name(pipeline_id integer, event text)
    RETURNS name
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT format(CASE event WHEN 'clear' THEN 'zz_autoembed_%s_%s' ELSE 'autoembed_%s_%s' END, pipeline_id, event)::name;
$sql$;
COMMENT ON FUNCTION autoembed._trigger_name(integer, text) IS 'What a pipeline''s trigger is called.';

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
