-- These event triggers act when the table of a pipeline is altered, or what it uses.

CREATE OR REPLACE FUNCTION autoembed._drop_orphaned_pipelines(embeddings_table regclass DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- A tenant may have locked what depends on a function that goes. No lane waits for that.
    SET lock_timeout = '10ms'
AS $plpgsql$
DECLARE
    _id integer;
    -- Whether the records that take long to delete are gone.
    _is_bare boolean;
    -- A tenant may drop thousands of tables at once, or a large one. The next second goes on.
    _until CONSTANT timestamptz := clock_timestamp() + interval '200 milliseconds';
BEGIN
    IF embeddings_table IS NOT NULL THEN
        -- No lane calls this. One may be ending the pipeline.
        PERFORM set_config('lock_timeout', '5s', true);
        BEGIN
            PERFORM FROM autoembed.pipeline AS o
            WHERE o.embeddings_table = _drop_orphaned_pipelines.embeddings_table
              AND (SELECT c.oid FROM pg_class AS c WHERE c.oid = o.table_id) IS NULL
            FOR UPDATE;
        EXCEPTION WHEN lock_not_available THEN
            RETURN;
        END;
    END IF;
    FOR _id IN
        -- The subquery looks each table up by its OID. NOT EXISTS would read the whole catalog, every second.
        SELECT o.id
        FROM autoembed.pipeline AS o
        WHERE (SELECT c.oid FROM pg_class AS c WHERE c.oid = o.table_id) IS NULL
          AND (_drop_orphaned_pipelines.embeddings_table IS NULL
               OR o.embeddings_table = _drop_orphaned_pipelines.embeddings_table)
        -- One that cannot go does not keep the others for ever.
        ORDER BY random()
        FOR UPDATE SKIP LOCKED
    LOOP
        EXIT WHEN clock_timestamp() > _until;
        BEGIN
            LOOP
                _is_bare := embeddings_table IS NOT NULL
                    OR autoembed._forget_part(_id, 'infinity') AND autoembed._drop_part(_id);
                EXIT WHEN _is_bare OR clock_timestamp() > _until;
            END LOOP;
            EXIT WHEN NOT _is_bare;
            DELETE FROM autoembed.pipeline AS p WHERE p.id = _id;
        EXCEPTION WHEN OTHERS THEN
            EXIT;
        END;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_orphaned_pipelines IS
    'Ends the pipelines whose table was dropped, with their jobs and records: as many as it can in a fifth of a '
    'second. embeddings_table: only the one that has this table, however long it takes; NULL: all.';

CREATE OR REPLACE FUNCTION autoembed._follow_embeddings_table(pipeline autoembed.pipeline, renames jsonb)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table pg_class;
    _embeddings pg_class;
    _view regclass;
    _change text;
    _name name;
    _type text;
    _void text;
BEGIN
    SELECT c.* INTO _table FROM pg_class AS c WHERE c.oid = pipeline.table_id;
    SELECT c.* INTO _embeddings FROM pg_class AS c WHERE c.oid = pipeline.embeddings_table;
    -- A table that was given to another role is left alone. REASSIGN OWNED gives the functions away, too, and fires no
    -- event trigger.
    IF _embeddings.relowner::bigint IS DISTINCT FROM (pipeline.table_shape ->> 'owner')::bigint AND NOT EXISTS (
        SELECT FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname = format('_content_%s', pipeline.id)
          AND p.proowner = _embeddings.relowner
    ) THEN
        RETURN;
    END IF;
    _view := autoembed._chunks_view(pipeline.id, pipeline.embeddings_table);
    -- These statements run no code of the owner. Each of them may have others done by the event triggers.
    LOOP
        SELECT format('ALTER TABLE %s %s', c.oid::regclass, s.change) INTO _change
        FROM pg_class AS c
        CROSS JOIN LATERAL (
            SELECT format('OWNER TO %I', pg_get_userbyid(_table.relowner)) AS change
            WHERE c.relowner <> _table.relowner
            UNION ALL
            SELECT format('SET SCHEMA %s', _table.relnamespace::regnamespace)
            WHERE c.relnamespace <> _table.relnamespace
            UNION ALL
            SELECT format('RENAME COLUMN %I TO %I', r.key, r.value)
            FROM jsonb_each_text(renames) AS r
            JOIN pg_attribute AS a
                ON a.attrelid = c.oid AND a.attname = r.key AND a.attnum > 0 AND NOT a.attisdropped
            WHERE r.value = ANY (pipeline.key_columns)
        ) AS s
        WHERE c.oid IN (pipeline.embeddings_table, _view)
        -- A view of another owner is not known as the one of the table, and would be made again.
        ORDER BY c.relkind = 'v' DESC
        LIMIT 1;
        EXIT WHEN NOT FOUND;
        EXECUTE _change;
    END LOOP;
    FOR _name, _type IN
        SELECT k.name, format_type(t.atttypid, t.atttypmod)
        FROM unnest(pipeline.key_columns) AS k(name)
        JOIN pg_attribute AS t ON t.attrelid = pipeline.table_id AND t.attname = k.name
        JOIN pg_attribute AS a ON a.attrelid = pipeline.embeddings_table AND a.attname = k.name
        WHERE (a.atttypid, a.atttypmod) <> (t.atttypid, t.atttypmod)
    LOOP
        -- The functions of the pipeline are made again after this, the policy and the view with them.
        EXECUTE format('DROP POLICY IF EXISTS autoembed_readers ON %s', pipeline.embeddings_table);
        IF EXISTS (SELECT FROM pg_class AS c WHERE c.oid = _view) THEN
            _void := autoembed._check_chunks_view(pipeline);
            EXECUTE format('DROP VIEW %s CASCADE', _view);
        END IF;
        -- PostgreSQL checks constraints again, and these call functions of the owner, and so may a cast.
        _change := format('ALTER TABLE %s ALTER COLUMN %I TYPE %s', pipeline.embeddings_table, _name, _type);
        BEGIN
            PERFORM autoembed._alter_as_owner(
                pipeline.embeddings_table, format('%s USING %I::pg_catalog.text::%s', _change, _name, _type)
            );
        EXCEPTION WHEN OTHERS THEN
            _change := _change || ' USING NULL';
            SELECT r.ev_class INTO _view
            FROM pg_depend AS d
            JOIN pg_rewrite AS r ON r.oid = d.objid
            JOIN pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid AND a.attname = _name
            WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
              AND d.refobjid = pipeline.embeddings_table AND r.ev_class <> pipeline.embeddings_table
            LIMIT 1;
            IF FOUND THEN
                RAISE EXCEPTION USING
                    ERRCODE = 'feature_not_supported',
                    MESSAGE = format('column "%s" of table %s cannot get another type: view %s uses this column of its '
                                     'embeddings table %s', _name, pipeline.table_id, _view, pipeline.embeddings_table),
                    HINT = 'Drop the view, and create it again after the change.';
            END IF;
            -- The values are no keys any more, or two of them are one. The rows are embedded again.
            PERFORM autoembed._alter_as_owner(
                pipeline.embeddings_table, format('TRUNCATE %s', pipeline.embeddings_table)
            );
            PERFORM autoembed._alter_as_owner(pipeline.embeddings_table, _change);
            PERFORM autoembed._backfill(ARRAY[pipeline.id]);
        END;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_embeddings_table IS
    'Gives an embeddings table the owner, the schema and the key columns of its table.';

CREATE OR REPLACE FUNCTION autoembed._after_renames(pipeline autoembed.pipeline)
    RETURNS autoembed.pipeline
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _followed autoembed.pipeline := pipeline;
    _shape jsonb;
    _renames jsonb;
    _void text;
BEGIN
    SELECT coalesce(jsonb_object_agg(b.value, a.value), '{}') INTO _renames
    FROM jsonb_each_text(pipeline.table_shape -> 'columns') AS b
    JOIN jsonb_each_text(autoembed._table_shape(pipeline) -> 'columns') AS a
        ON a.key = b.key AND a.value <> b.value;
    IF _renames <> '{}' THEN
        IF pipeline.embeddings_table IS NULL THEN
            _followed.embedding_column := coalesce(_renames ->> pipeline.embedding_column, pipeline.embedding_column);
        END IF;
        _followed.key_columns := autoembed._renamed(pipeline.key_columns, _renames);
        _followed.content_columns := autoembed._renamed(pipeline.content_columns, _renames);
        _followed.content_template := autoembed._renamed_template(pipeline.content_template, _renames);
        _followed.chunk_prefix := autoembed._renamed_template(pipeline.chunk_prefix, _renames);
        -- The condition keeps its names. It is the owner's code, and no other role may parse it.
        SELECT coalesce(jsonb_object_agg(c.key, coalesce(_renames ->> c.value, c.value)), '{}')
        INTO _followed.condition_columns
        FROM jsonb_each_text(pipeline.condition_columns) AS c;
    END IF;
    _void := autoembed._follow_embeddings_table(_followed, _renames);
    _shape := autoembed._table_shape(_followed);
    _followed.table_shape := _shape || jsonb_strip_nulls(jsonb_build_object('former_name', pipeline.table_shape -> CASE
        WHEN _shape ->> 'name' = pipeline.table_shape ->> 'name' THEN 'former_name'
        ELSE 'name'
    END, 'key_numbers', CASE
        WHEN NOT (_shape -> 'key')::boolean THEN pipeline.table_shape -> 'key_numbers'
    END));
    RETURN _followed;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._after_renames IS
    'A pipeline with the present names of its columns, and the present shape of its table.';

CREATE OR REPLACE FUNCTION autoembed._warn_once(pipeline_id integer)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _found record;
BEGIN
    SELECT p.table_id, p.embedding_column, p.warned_of, c.problem, c.hint
    INTO _found
    FROM autoembed.pipeline AS p
    CROSS JOIN LATERAL autoembed._check_pipeline(p) AS c
    WHERE p.id = _warn_once.pipeline_id AND p.warned_of IS DISTINCT FROM c.problem
    -- A tenant may have locked the row. Another look comes.
    FOR NO KEY UPDATE OF p SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    UPDATE autoembed.pipeline AS p SET warned_of = _found.problem WHERE p.id = _warn_once.pipeline_id;
    IF _found.problem IS NOT NULL THEN
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('%s.%I is not being embedded: %s',
                             _found.table_id, _found.embedding_column, _found.problem),
            HINT = _found.hint;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._warn_once IS
    'Warns of a problem that stops a pipeline, unless the same problem was the last that was told.';

CREATE OR REPLACE FUNCTION autoembed._follow_one(
    pipeline_id integer,
    text_changed boolean,
    max_seconds double precision DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _before autoembed.pipeline;
    _after autoembed.pipeline;
    _shape jsonb;
    _names CONSTANT text[] := '{key,labels,functions,name,former_name}'::text[];
    _key name[];
    _changed text[];
    _check record;
    _rival autoembed.pipeline;
    -- The partitions that are none any more.
    _left oid[];
BEGIN
    SELECT p.* INTO _before
    FROM autoembed.pipeline AS p
    JOIN pg_class AS c ON c.oid = p.table_id
    WHERE p.id = pipeline_id;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    _after := autoembed._after_renames(_before);
    _shape := _after.table_shape;
    -- The restore of a dump switches check_function_bodies off. Its last statements need the functions of the dump.
    -- The next pass replaces them, and a lane finds by the former shape what there is to follow.
    IF NOT current_setting('check_function_bodies')::boolean
       AND _before.table_shape - _names = _shape - _names THEN
        RETURN;
    END IF;
    -- A column that is renamed may take the name of a column that another pipeline has lost.
    FOR _rival IN
        SELECT p.* FROM autoembed.pipeline AS p
        WHERE p.table_id = _after.table_id AND p.embedding_column = _after.embedding_column
          AND p.embeddings_table IS NOT DISTINCT FROM _after.embeddings_table AND p.id <> _after.id
    LOOP
        DELETE FROM autoembed.pipeline AS p WHERE p.id = _rival.id;
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('the pipeline of %s.%I has ended: its column was dropped, and the column of another '
                             'pipeline has that name now', _rival.table_id, _rival.embedding_column),
            HINT = 'SELECT * FROM autoembed.status shows the pipelines of the table.';
    END LOOP;
    IF _before.table_shape IS DISTINCT FROM _shape THEN
        UPDATE autoembed.pipeline AS p
        SET embedding_column = _after.embedding_column, key_columns = _after.key_columns,
            content_columns = _after.content_columns, content_template = _after.content_template,
            chunk_prefix = _after.chunk_prefix,
            condition_columns = _after.condition_columns, table_shape = _shape
        -- A statement for the embeddings table may have followed it already.
        WHERE p.id = _before.id AND p.table_shape IS DISTINCT FROM _shape;
    END IF;
    -- A type or a function that changes takes no key away.
    _key := CASE
        WHEN NOT _after.managed OR max_seconds IS NOT NULL THEN NULL
        WHEN NOT (_shape -> 'key')::boolean THEN autoembed._key_columns(_after.table_id)
        -- Another column has the name of one that was dropped.
        WHEN _shape -> 'key_numbers' <> _before.table_shape -> 'key_numbers' THEN _after.key_columns
    END;
    _key := CASE WHEN autoembed._may_take_key(_after, _key) THEN _key END;
    IF _key IS NOT NULL THEN
        _after.id := autoembed._take_key(_after, _key);
        SELECT p.* INTO STRICT _after FROM autoembed.pipeline AS p WHERE p.id = _after.id;
    END IF;
    -- It is planned again below.
    _after.plan_problem := NULL;
    SELECT c.* INTO _check FROM autoembed._check_pipeline(_after) AS c;
    IF _check.errcode IN ('undefined_column', 'duplicate_object') THEN
        -- The trigger of a lost column would refuse writes.
        IF _after.managed AND _after.built_from IS DISTINCT FROM 'stopped' THEN
            PERFORM autoembed._drop_functions(_after.id, true);
            PERFORM autoembed._drop_readers(_after.id, _after.embeddings_table, _after.table_id);
            UPDATE autoembed.pipeline AS p SET built_from = 'stopped' WHERE p.id = _after.id;
        END IF;
        -- The other pipeline overwrites vectors, which only a digest of them can show.
        IF _check.errcode = 'duplicate_object' THEN
            DELETE FROM autoembed.embedded AS e WHERE e.pipeline_id = _after.id AND e.vector_digest IS NULL;
        END IF;
    ELSE
        -- A trigger made for other names would refuse writes. Its function is made even if the pipeline waits.
        PERFORM autoembed._build_pipeline(_after.id);
    END IF;
    -- In a restore, what the owner's code needs may be yet to come.
    IF _check.problem IS NULL
       AND num_nonnulls(_after.condition, _after.content_function, _after.chunk_function) > 0
       AND current_setting('check_function_bodies')::boolean THEN
        -- An owner's code holds up nobody's migration.
        PERFORM autoembed._plan_again(_after.id, coalesce(max_seconds, 5));
    END IF;
    SELECT coalesce(array_agg(coalesce(_shape -> 'columns' ->> a.key, a.key)), '{}') INTO _changed
    FROM (VALUES ('contents'), ('labels')) AS f(fact)
    CROSS JOIN LATERAL jsonb_each_text(_before.table_shape -> f.fact) AS b
    JOIN jsonb_each_text(_shape -> f.fact) AS a ON a.key = b.key AND a.value <> b.value;
    IF _after.managed AND _key IS NULL AND _check.problem IS NULL AND (
        _changed && _after.key_columns::text[] OR _before.table_shape -> 'labels' <> _shape -> 'labels'
    ) THEN
        PERFORM autoembed._forget_old_keys(_after, max_seconds);
    END IF;
    IF _after.managed AND _key IS NULL AND _changed && _after.key_columns::text[] THEN
        -- The scan finds the rows of these jobs. A key of theirs may be no value of the new type.
        DELETE FROM autoembed._job AS q
        WHERE q.message_id = ANY (ARRAY(
            SELECT o.message_id FROM autoembed._job AS o
            WHERE o.pipeline = _after.id::text AND o.message ? 'keys'
            FOR UPDATE SKIP LOCKED
        ));
    END IF;
    IF _before.table_shape ->> 'type' <> _shape ->> 'type' THEN
        -- The bytes of the vectors are others.
        UPDATE autoembed.embedded AS e SET vector_digest = NULL WHERE e.pipeline_id = _after.id;
    END IF;
    -- The vectors have another type, or the texts may have changed, or a partition has brought rows. No trigger
    -- sees such a change.
    IF text_changed OR _changed <> '{}'
       -- Where a column is missing, none of the texts can be read. Another change brings it back.
       OR _check.errcode IS DISTINCT FROM 'undefined_column'
          -- Version 0.1.0 noted less.
          AND _before.table_shape ? 'functions' AND autoembed._text_facts(_before) <> autoembed._text_facts(_after)
       OR _before.table_shape ->> 'type' <> _shape ->> 'type'
       -- Rows may have got a key while there was none. A restore brings keys after the rows.
       OR max_seconds IS NULL AND (_shape -> 'key')::boolean AND NOT (_before.table_shape -> 'key')::boolean
       OR EXISTS (
           SELECT FROM jsonb_array_elements(_shape -> 'partitions') AS n(id)
           WHERE NOT _before.table_shape -> 'partitions' @> n.id
             -- One that becomes a partition itself keeps its rows.
             AND n.id::bigint::oid <> _after.table_id
             AND NOT autoembed._is_empty(n.id::bigint::oid::regclass)
       ) THEN
        PERFORM autoembed._backfill(ARRAY[_after.id]);
    END IF;
    IF _shape -> 'partitions' <> _before.table_shape -> 'partitions'
       AND _after.built_from IS DISTINCT FROM 'stopped' THEN
        PERFORM autoembed._build_partition_triggers(_after);
    END IF;
    IF _after.managed AND _after.built_from IS DISTINCT FROM 'stopped' AND (
        autoembed._inherits(_after.table_id) AND EXISTS (
            SELECT FROM pg_trigger AS t
            WHERE t.tgrelid = _after.table_id AND t.tgname = autoembed._trigger_name(_after.id, 'insert')
              -- This bit of pg_trigger.tgtype is set in a trigger of rows.
              AND t.tgtype & 1 = 0
        )
        OR _check.problem IS NULL AND autoembed._clears(_after) AND NOT EXISTS (
            SELECT FROM pg_trigger AS t
            WHERE t.tgrelid = _after.table_id AND t.tgname = autoembed._trigger_name(_after.id, 'clear')
        )
    ) THEN
        PERFORM autoembed._build_triggers(_after);
    ELSIF _after.managed AND _check.errcode <> 'waits' AND autoembed._clears(_after) THEN
        -- Nothing would bring the vectors back.
        EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s',
                       autoembed._trigger_name(_after.id, 'clear'), _after.table_id);
    END IF;
    _left := ARRAY(
        SELECT o.id::bigint::oid
        FROM jsonb_array_elements(_before.table_shape -> 'partitions') AS o(id)
        WHERE NOT _shape -> 'partitions' @> o.id AND o.id::bigint::oid <> _after.table_id
    );
    IF _left <> '{}' THEN
        PERFORM autoembed._drop_stray_triggers(c.oid) FROM pg_class AS c WHERE c.oid = ANY (_left);
        -- A partition has taken rows away. A lane finds the others.
        INSERT INTO autoembed._job (due_at, message)
        VALUES (clock_timestamp(), jsonb_build_object('pipeline', _after.id, 'recorded_after', ''));
    END IF;
    -- A migration that replaces a key drops the old one first. Lanes tell of a key that stays away.
    IF _check.problem IS NULL OR (_shape -> 'key')::boolean OR _check.errcode = 'undefined_column' THEN
        PERFORM autoembed._warn_once(_after.id);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_one IS
    'Has a pipeline follow what has changed of its table: names, owner, types, key and partitions. One that has lost a '
    'column, or whose texts cannot be read any more, is stopped, and goes on when it can. text_changed: texts may have '
    'changed, so rows are scanned. max_seconds: for a statement that reads the table; NULL: as long as it takes.';

CREATE OR REPLACE FUNCTION autoembed._follow(ids integer[], text_changed boolean DEFAULT false)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT autoembed._follow_one(i.id, text_changed) FROM unnest(ids) AS i(id);
$sql$;
COMMENT ON FUNCTION autoembed._follow IS 'Has pipelines follow a change of their own tables.';

CREATE OR REPLACE FUNCTION autoembed._follow_others(ids integer[], text_changed boolean DEFAULT false)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '500ms'
AS $plpgsql$
DECLARE
    _until CONSTANT timestamptz := clock_timestamp() + interval '1 second';
    _late integer[] := '{}'::integer[];
    _id integer;
BEGIN
    FOREACH _id IN ARRAY coalesce(ids, '{}') LOOP
        IF clock_timestamp() > _until THEN
            _late := _late || _id;
            CONTINUE;
        END IF;
        BEGIN
            PERFORM autoembed._follow_one(
                _id, text_changed, greatest(0.1, extract(epoch FROM _until - clock_timestamp()))
            );
        EXCEPTION WHEN OTHERS THEN
            _late := _late || _id;
            PERFORM set_config('lock_timeout', '1ms', true);
        END;
    END LOOP;
    -- Lanes make their functions again, and find the texts that have changed.
    BEGIN
        PERFORM autoembed._backfill(_late);
    EXCEPTION WHEN OTHERS THEN
        -- The owner of one of them keeps no other from it.
        FOREACH _id IN ARRAY _late LOOP
            BEGIN
                PERFORM autoembed._backfill(ARRAY[_id]);
            EXCEPTION WHEN OTHERS THEN
                NULL;
            END;
        END LOOP;
    END;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_others IS
    'Has pipelines follow a change of a type or a function, whose owner need not own their tables and waits a second '
    'for them at most. Those that cannot follow in that time are scanned.';

CREATE OR REPLACE FUNCTION autoembed._follow_unseen()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- No lane waits for a lock.
    SET lock_timeout = '10ms'
    SET check_function_bodies = on
    -- A warning is for the server's log alone.
    SET client_min_messages = error
AS $plpgsql$
DECLARE
    _id integer;
    -- A tenant may have thousands of tables. The next second looks at others.
    _until timestamptz := clock_timestamp() + interval '10 milliseconds';
    _end CONSTANT timestamptz := clock_timestamp() + interval '0.3 seconds';
BEGIN
    FOR _id IN
        SELECT p.id
        FROM autoembed.pipeline AS p
        JOIN pg_class AS c ON c.oid = p.table_id
        -- A restore that goes on brings triggers last.
        WHERE NOT p.managed OR p.built_from = 'stopped' OR EXISTS (
            SELECT FROM pg_trigger AS t
            WHERE t.tgrelid = p.table_id AND t.tgname = autoembed._trigger_name(p.id, 'insert')
        )
        ORDER BY random()
    LOOP
        EXIT WHEN clock_timestamp() > _until;
        BEGIN
            PERFORM autoembed._keep_name(p.table_id), autoembed._follow_one(p.id, false, 0.5)
            FROM autoembed.pipeline AS p
            CROSS JOIN autoembed._table_shape(p) AS s(shape)
            CROSS JOIN LATERAL (
                -- These are what the pipeline knows of the past.
                SELECT CASE WHEN (s.shape -> 'key')::boolean THEN '{former_name}' ELSE '{former_name,key_numbers}' END
            ) AS f(facts)
            WHERE p.id = _id AND p.table_shape - f.facts::text[] <> s.shape - f.facts::text[];
            IF FOUND THEN
                _until := least(_end, clock_timestamp() + interval '10 milliseconds');
            END IF;
        EXCEPTION WHEN OTHERS THEN
            -- Another look comes.
            NULL;
        END;
        BEGIN
            PERFORM autoembed._share_embeddings(ARRAY[_id]);
        EXCEPTION WHEN OTHERS THEN
            NULL;
        END;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_unseen IS
    'Has pipelines follow what no event trigger has told: a change by a session that did not see the pipeline yet, or '
    'where event triggers were off. Until then triggers that name an old column refuse writes. Gives readers rights '
    'that they lack yet. Looks for a hundredth of a second, and longer while it finds something.';

CREATE OR REPLACE FUNCTION autoembed._follow_partitions(table_id oid)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._follow(ARRAY(
        SELECT p.id
        FROM autoembed._partition_tree(table_id) AS t
        JOIN autoembed.pipeline AS p ON p.table_id = t.relid AND t.level > 0
    ));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_partitions IS
    'Has the pipelines of partitions follow that the whole table is attached or detached.';

CREATE OR REPLACE FUNCTION autoembed._follow_tables()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _ids integer[];
    _rename record;
    _void text;
BEGIN
    WITH RECURSIVE altered AS (
        SELECT coalesce(i.indrelid, d.objid) AS id, d.command_tag
        FROM pg_event_trigger_ddl_commands() AS d
        LEFT JOIN pg_index AS i ON i.indexrelid = d.objid
        WHERE d.classid = 'pg_class'::regclass
    ),
    -- A change of a table is one of those that inherit from it.
    touched AS (
        SELECT a.id FROM altered AS a
        UNION
        -- ALTER TYPE … CASCADE alters the tables of the type.
        SELECT c.oid
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_type AS y
            ON d.classid = 'pg_type'::regclass AND y.oid = d.objid
            OR d.classid = 'pg_class'::regclass AND y.typrelid = d.objid
        JOIN pg_class AS c ON c.reloftype = y.oid
        WHERE TG_TAG = 'ALTER TYPE'
        UNION
        SELECT i.inhrelid FROM touched AS t JOIN pg_inherits AS i ON i.inhparent = t.id
    )
    SELECT array_agg(DISTINCT p.id) INTO _ids
    FROM autoembed.pipeline AS p
    WHERE p.table_id IN (
        SELECT t.id FROM touched AS t
        UNION
        SELECT r.relid::oid FROM altered AS a CROSS JOIN LATERAL pg_partition_ancestors(a.id) AS r(relid)
    )
    OR p.embeddings_table IN (SELECT t.id FROM touched AS t)
    -- A partition that is detached is not named. The pipeline of the whole table still knows it.
    OR p.built_from = 'stopped' AND p.table_shape -> 'partitions' <> '[]' AND EXISTS (
        SELECT FROM altered AS a
        CROSS JOIN LATERAL (
            SELECT a.id AS relid UNION ALL SELECT r.relid FROM pg_partition_ancestors(a.id) AS r(relid)
        ) AS w
        JOIN autoembed.pipeline AS q ON q.table_id = w.relid
        WHERE q.table_shape -> 'partitions' @> (p.table_shape -> 'partitions')
    );
    _void := autoembed._follow(_ids);
    -- ALTER TABLE, too, may rename an attribute of a composite type, and each table has a type of its rows.
    IF TG_TAG = 'ALTER TABLE' OR EXISTS (
        SELECT FROM pg_event_trigger_ddl_commands() AS d
        WHERE d.classid = 'pg_type'::regclass OR d.object_type LIKE 'composite type%'
    ) THEN
        -- The text of a value may depend on its type.
        PERFORM autoembed._follow_others(ARRAY(
            SELECT p.id FROM autoembed.pipeline AS p
            -- A tenant may have thousands of tables, whose labels nobody waits for.
            WHERE p.table_shape -> 'labels' ?| ARRAY(
                SELECT w.label
                FROM pg_event_trigger_ddl_commands() AS d
                JOIN pg_type AS t
                    ON d.classid = 'pg_type'::regclass AND t.oid = d.objid
                    OR d.classid = 'pg_class'::regclass AND t.typrelid = d.objid
                CROSS JOIN LATERAL (
                    SELECT 'composite ' || t.oid AS label
                    UNION ALL
                    SELECT 'enum ' || e.oid FROM pg_enum AS e WHERE e.enumtypid = t.oid
                ) AS w
            )
            ORDER BY p.id
        ));
    END IF;

    IF TG_TAG IN ('ALTER TABLE', 'ALTER INDEX') THEN
        FOR _rename IN
            SELECT DISTINCT ON (c.oid) c.oid::regclass AS new_table, o.oid::regclass AS old_table
            FROM pg_event_trigger_ddl_commands() AS d
            JOIN pg_class AS c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind IN ('r', 'p')
            JOIN pg_namespace AS n ON n.oid = c.relnamespace
            JOIN autoembed.pipeline AS p ON p.table_id <> c.oid
            LEFT JOIN pg_class AS o ON o.oid = p.table_id
            WHERE format('%I.%I', n.nspname, c.relname)
                  = CASE WHEN o.oid IS NULL THEN p.table_shape ->> 'name' ELSE p.table_shape ->> 'former_name' END
              AND NOT EXISTS (SELECT FROM autoembed.pipeline AS q WHERE q.table_id = c.oid)
        LOOP
            RAISE WARNING USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('%s is not attached to autoembed: it has the name of a table that is',
                                 _rename.new_table),
                DETAIL = coalesce('The attached table is ' || _rename.old_table || ' now.',
                                  'The attached table was dropped.'),
                HINT = format('Attach it: SELECT autoembed.enable(%L, …).', _rename.new_table);
        END LOOP;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_tables IS
    'Has pipelines follow changes of their tables, indexes and types. Warns of a table that takes the name of an '
    'attached one.';

CREATE OR REPLACE FUNCTION autoembed._follow_schemas()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _ids integer[];
    _table regclass;
    _void text;
BEGIN
    WITH renamed AS (
        SELECT d.objid AS id FROM pg_event_trigger_ddl_commands() AS d WHERE d.classid = 'pg_namespace'::regclass
    ),
    -- The functions of a pipeline name all of these.
    inside AS (
        SELECT c.oid AS id FROM pg_class AS c JOIN renamed AS n ON n.id = c.relnamespace
        UNION
        SELECT f.oid FROM pg_proc AS f JOIN renamed AS n ON n.id = f.pronamespace
        UNION
        SELECT o.oid FROM pg_operator AS o JOIN renamed AS n ON n.id = o.oprnamespace
        UNION
        SELECT c.oid FROM pg_collation AS c JOIN renamed AS n ON n.id = c.collnamespace
        UNION
        SELECT t.oid FROM pg_type AS t JOIN renamed AS n ON n.id = t.typnamespace
    ),
    types AS (
        SELECT y.id
        FROM (
            SELECT DISTINCT a.atttypid AS id
            FROM autoembed.pipeline AS p
            JOIN pg_attribute AS a ON a.attrelid = p.table_id AND a.attnum > 0 AND NOT a.attisdropped
        ) AS y
        WHERE EXISTS (SELECT FROM autoembed._used_types(ARRAY[y.id]) AS u(id) JOIN inside AS i ON i.id = u.id)
    )
    SELECT array_agg(p.id ORDER BY p.id) INTO _ids
    FROM autoembed.pipeline AS p
    WHERE EXISTS (
        SELECT FROM (
            SELECT p.table_id::oid AS id
            UNION ALL
            SELECT r.relid FROM autoembed._partition_tree(p.table_id) AS r
            UNION ALL
            SELECT unnest(ARRAY[p.embeddings_table, p.content_function_oid, p.chunk_function_oid]::oid[])
            UNION ALL
            SELECT (o.value ->> 'oid')::oid FROM jsonb_each(p.condition_objects) AS o
            UNION ALL
            SELECT autoembed._key_operator(p.table_id, k.name, s.strategy)
            FROM unnest(p.key_columns) AS k(name)
            CROSS JOIN (VALUES (3), (5)) AS s(strategy)
        ) AS u
        JOIN inside AS i ON i.id = u.id
    )
    OR EXISTS (
        SELECT FROM pg_attribute AS a JOIN types AS t ON t.id = a.atttypid
        WHERE a.attrelid = p.table_id AND a.attnum > 0 AND NOT a.attisdropped
    );
    -- A statement that runs looks its names up again at any time. The owner of a schema may drop the tables in it,
    -- so it may lock them, too.
    FOR _table IN
        SELECT DISTINCT t.id
        FROM autoembed.pipeline AS p
        CROSS JOIN LATERAL (
            SELECT p.table_id::oid AS id
            UNION ALL
            SELECT p.embeddings_table
            UNION ALL
            SELECT r.relid FROM autoembed._partition_tree(p.table_id) AS r
        ) AS t
        JOIN pg_class AS c ON c.oid = t.id
        WHERE p.id = ANY (_ids)
        ORDER BY t.id
    LOOP
        _void := autoembed._lock_table(_table, true);
    END LOOP;
    _void := autoembed._follow(_ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_schemas IS
    'Has pipelines follow a new name of a schema that has their tables or what these use. Nobody uses the tables '
    'meanwhile.';

CREATE OR REPLACE FUNCTION autoembed._follow_rewrite()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- A new value of a column, by its type or by USING.
    _new_values CONSTANT integer := 4;
    _table CONSTANT oid := pg_event_trigger_table_rewrite_oid();
BEGIN
    IF pg_event_trigger_table_rewrite_reason() & _new_values > 0 THEN
        PERFORM autoembed._backfill(ARRAY(
            SELECT p.id
            FROM autoembed.pipeline AS p
            WHERE p.table_id = _table OR p.table_id IN (SELECT a.relid FROM pg_partition_ancestors(_table) AS a)
        ));
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_rewrite IS
    'Has the rows of a table scanned when ALTER TABLE gives a column new values, perhaps of the same type.';

CREATE OR REPLACE FUNCTION autoembed._follow_functions()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
DECLARE
    _ids integer[];
BEGIN
    -- The functions of pipelines are made often, and are nobody's content.
    IF NOT EXISTS (SELECT FROM pg_event_trigger_ddl_commands() AS d WHERE d.schema_name <> 'autoembed') THEN
        RETURN;
    END IF;
    -- The owner of another table may have locked the row of its pipeline.
    UPDATE autoembed.pipeline AS p
    SET content_function_id = n.name
    FROM (
        SELECT q.id, (autoembed._with_content_function(q, f.oid)).content_function_id AS name
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_proc AS f ON d.classid = 'pg_proc'::regclass AND f.oid = d.objid
        JOIN pg_class AS c ON c.reltype = f.proargtypes[0]
        JOIN autoembed.pipeline AS q ON q.content_function_oid = f.oid AND q.table_id = c.oid
        WHERE TG_TAG <> 'CREATE FUNCTION'
        FOR NO KEY UPDATE OF q SKIP LOCKED
    ) AS n
    WHERE p.id = n.id;
    UPDATE autoembed.pipeline AS p
    SET chunk_function = n.name
    FROM (
        SELECT q.id, (autoembed._with_chunk_function(q, f.oid)).chunk_function AS name
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_proc AS f ON d.classid = 'pg_proc'::regclass AND f.oid = d.objid
        JOIN autoembed.pipeline AS q ON q.chunk_function_oid = f.oid
        WHERE TG_TAG <> 'CREATE FUNCTION'
        FOR NO KEY UPDATE OF q SKIP LOCKED
    ) AS n
    WHERE p.id = n.id AND p.chunk_function <> n.name;
    -- Those that may mean the function. To look at all of them takes a millisecond for each.
    _ids := ARRAY(
        SELECT p.id
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_proc AS f ON d.classid = 'pg_proc'::regclass AND f.oid = d.objid
        JOIN autoembed.pipeline AS p
            ON f.oid IN (p.content_function_oid, p.chunk_function_oid)
            OR p.table_id = (SELECT t.typrelid FROM pg_type AS t WHERE t.oid = f.proargtypes[0])
            OR f.proretset AND f.pronargs = 1 AND f.proargtypes[0] = 'text'::regtype
               AND strpos(p.chunk_function, f.proname) > 0
               -- One whose function is there means that one.
               AND NOT EXISTS (SELECT FROM pg_proc AS k WHERE k.oid = p.chunk_function_oid)
    );
    PERFORM autoembed._find_functions(_ids);
    PERFORM autoembed._follow_others(array_agg(p.id ORDER BY p.id), true)
    FROM autoembed.pipeline AS p
    CROSS JOIN LATERAL (
        SELECT d.objid FROM pg_event_trigger_ddl_commands() AS d WHERE d.classid = 'pg_proc'::regclass
    ) AS f
    WHERE p.id = ANY (_ids) AND f.objid IN (autoembed._content_function_of(p), autoembed._chunk_function_of(p))
    HAVING count(*) > 0;
    -- PostgreSQL may choose a function of other arguments in a condition than before.
    PERFORM autoembed._follow_others(array_agg(w.id ORDER BY w.id), w.is_it)
    FROM (
        SELECT p.id, bool_or(d.object_identity = o.key OR d.objid::text = o.value ->> 'oid') AS is_it
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN autoembed.pipeline AS p ON d.classid = 'pg_proc'::regclass AND p.condition_objects <> '{}'
        CROSS JOIN LATERAL jsonb_each(p.condition_objects) AS o
        WHERE split_part(o.key, '(', 1) = split_part(d.object_identity, '(', 1) OR d.objid::text = o.value ->> 'oid'
        GROUP BY p.id
    ) AS w
    GROUP BY w.is_it;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_functions IS
    'Has pipelines follow changes of the functions that give and cut their texts, and of those in their conditions. A '
    'new body or setting may give other texts.';

CREATE OR REPLACE FUNCTION autoembed._deny_readers(embeddings_table regclass)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
    SET lock_timeout = '100ms'
AS $plpgsql$
BEGIN
    EXECUTE format('DROP POLICY IF EXISTS autoembed_readers ON %s', embeddings_table);
EXCEPTION WHEN lock_not_available THEN
    -- A reader holds the table. The functions that the policy calls know the dropped one by its OID.
    NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._deny_readers IS
    'Drops the policy of an embeddings table whose table is dropped. Row security stays on, and shows nobody anything '
    'then.';

CREATE OR REPLACE FUNCTION autoembed._follow_drops()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _embeddings_table regclass;
BEGIN
    -- A table of the same name may come before a lane ends the pipeline.
    FOR _embeddings_table IN
        SELECT p.embeddings_table
        FROM pg_event_trigger_dropped_objects() AS d
        JOIN autoembed.pipeline AS p ON p.table_id = d.objid
        JOIN pg_class AS c ON c.oid = p.embeddings_table
        WHERE d.classid = 'pg_class'::regclass AND d.objsubid = 0
    LOOP
        PERFORM autoembed._deny_readers(_embeddings_table);
    END LOOP;
    PERFORM autoembed._follow(array_agg(p.id))
    FROM autoembed.pipeline AS p
    WHERE p.table_id IN (
              SELECT d.objid FROM pg_event_trigger_dropped_objects() AS d
              WHERE d.classid = 'pg_class'::regclass AND d.objsubid > 0
          )
       OR p.embeddings_table IN (
              SELECT d.objid FROM pg_event_trigger_dropped_objects() AS d WHERE d.classid = 'pg_class'::regclass
          )
       -- It is not told whose index was dropped. The look at a key takes longest, so it comes last.
       OR EXISTS (
              SELECT FROM pg_event_trigger_dropped_objects() AS d
              WHERE d.object_type = 'index' AND d.original
          )
          AND p.managed AND p.table_shape -> 'key' = 'true'
          AND pg_has_role(
              coalesce(nullif(current_setting('role'), 'none'), session_user),
              (SELECT c.relowner FROM pg_class AS c WHERE c.oid = p.table_id), 'USAGE'
          )
          AND NOT autoembed._is_key(p.table_id, p.key_columns)
    HAVING count(*) > 0;
    PERFORM autoembed._follow_others(array_agg(p.id ORDER BY p.id))
    FROM autoembed.pipeline AS p
    WHERE p.table_shape -> 'partitions' <> '[]' AND EXISTS (
              SELECT FROM pg_event_trigger_dropped_objects() AS d
              WHERE d.object_type = 'table' AND p.table_shape -> 'partitions' @> to_jsonb(d.objid::bigint)
          )
       OR EXISTS (
              SELECT FROM pg_event_trigger_dropped_objects() AS d
              WHERE d.classid = 'pg_proc'::regclass AND d.objid IN (p.content_function_oid, p.chunk_function_oid)
          )
       OR p.condition_objects ?| ARRAY(
              SELECT d.object_identity FROM pg_event_trigger_dropped_objects() AS d
              WHERE d.classid <> 'pg_class'::regclass
          )
    HAVING count(*) > 0;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_drops IS
    'Has pipelines follow that their tables have lost a column, a key, a function or a partition, however it was '
    'dropped.';

CREATE OR REPLACE FUNCTION autoembed._follow_grants()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '1s'
AS $plpgsql$
DECLARE
    -- A row of a catalog that is older was written by another transaction.
    _age CONSTANT integer := age(pg_current_xact_id()::xid);
    _role CONSTANT name := coalesce(nullif(current_setting('role'), 'none'), session_user);
    _until CONSTANT timestamptz := clock_timestamp() + interval '1 second';
    _ids integer[];
    _unshared record;
BEGIN
    -- The restore of a dump, which switches check_function_bodies off, gives each of the rights itself. The statements
    -- below fire this trigger, too.
    IF NOT current_setting('check_function_bodies')::boolean OR current_setting('autoembed.sharing', true) = 'on'
       OR NOT EXISTS (
           SELECT FROM pg_event_trigger_ddl_commands() AS d
           WHERE d.object_type = 'TABLE' AND d.command_tag IN ('GRANT', 'REVOKE')
       ) THEN
        RETURN;
    END IF;
    -- PostgreSQL does not tell whose rights have changed. The age of a table's rows in the catalogs is known sooner
    -- than its readers. A join would read the whole catalogs.
    SELECT array_agg(p.id) INTO _ids
    FROM autoembed.pipeline AS p
    WHERE least(
        (SELECT min(age(c.xmin)) FROM pg_class AS c WHERE c.oid IN (p.table_id, p.embeddings_table)),
        (SELECT min(age(a.xmin)) FROM pg_attribute AS a WHERE a.attrelid = p.table_id)
    ) <= _age;
    PERFORM set_config('autoembed.sharing', 'on', true);
    FOR _unshared IN
        SELECT u.cure, pg_has_role(_role, u.owner, 'USAGE') AS is_own
        FROM autoembed._unshared(_ids) AS u
        ORDER BY is_own DESC
    LOOP
        EXIT WHEN NOT _unshared.is_own AND clock_timestamp() > _until;
        BEGIN
            EXECUTE _unshared.cure;
        EXCEPTION WHEN OTHERS THEN
            -- Another owner may hold its table. A lane gives what is left.
            PERFORM set_config('lock_timeout', '10ms', true);
        END;
    END LOOP;
    PERFORM set_config('autoembed.sharing', '', true);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_grants IS
    'Has those read the embeddings of a table who may read the table.';

CREATE OR REPLACE FUNCTION autoembed._protect_functions()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _function record;
BEGIN
    -- The functions of a pipeline belong to the table's owner. The owner could make them SECURITY INVOKER, and so have
    -- them run with the rights of a lane, which may be a superuser.
    IF NOT (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user)
       AND EXISTS (SELECT FROM pg_event_trigger_ddl_commands() AS d WHERE d.schema_name = 'autoembed') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = 'the functions in schema autoembed cannot be altered',
            HINT = 'They are made again when their table changes.';
    END IF;
    -- The owner of the database owns the schema public. A new schema of that name could hold other types and operators,
    -- which would run with the rights of each caller.
    IF to_regnamespace('@extschema:vector@') IS DISTINCT FROM (
        SELECT e.extnamespace::regnamespace FROM pg_extension AS e WHERE e.extname = 'vector'
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'schema @extschema:vector@ cannot be renamed: autoembed finds pgvector in it by this name';
    END IF;
    -- The owner of a schema could put its own function in the place of a model's, which runs as the owner of that one.
    -- No lock on a table tells whether one is running. The caller may not look into autoembed.
    SELECT f.oid::regprocedure AS id, n.oid::regnamespace AS schema INTO _function
    FROM pg_event_trigger_ddl_commands() AS d
    JOIN pg_namespace AS n ON d.classid = 'pg_namespace'::regclass AND n.oid = d.objid
    JOIN pg_proc AS f ON f.pronamespace = n.oid AND NOT pg_has_role(f.proowner, 'USAGE')
    JOIN pg_proc AS w
        ON w.pronamespace = 'autoembed'::regnamespace AND w.proname ~ '^_(embed_document|embed_query|rerank)_'
       AND w.proowner = f.proowner AND strpos(w.prosrc, format('.%I(', f.proname)) > 0
    CROSS JOIN LATERAL (SELECT substring(w.proconfig[1] FROM '^search_path=(.*), public, pg_temp$') AS schema) AS s
    WHERE to_regnamespace(s.schema) IS NULL
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('schema %s cannot be renamed: a model of autoembed calls %s by its name',
                             _function.schema, _function.id),
            HINT = 'The owner of the function, or a superuser, can rename it.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._protect_functions IS
    'Keeps table owners from altering the functions made for them, everybody from renaming the schema of pgvector, and '
    'others than the owner of a model''s function from renaming its schema.';
