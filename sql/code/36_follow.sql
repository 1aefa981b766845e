-- These triggers act when a pipeline is defined, changed or ended, and when its table is altered.

CREATE OR REPLACE FUNCTION autoembed._is_key(table_id oid, columns name[])
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT EXISTS (
        SELECT FROM pg_index AS i
        WHERE i.indrelid = table_id AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
          AND NOT EXISTS (
              SELECT FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS n(number, position)
              JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = n.number
              WHERE n.position <= i.indnkeyatts AND NOT (a.attnotnull AND a.attname = ANY (columns))
          )
    ) AND columns <@ ARRAY(
        SELECT a.attname FROM pg_attribute AS a WHERE a.attrelid = table_id AND NOT a.attisdropped
    );
$sql$;
COMMENT ON FUNCTION autoembed._is_key IS
    'Whether these columns tell the rows of a table apart: a unique index without NULLs is on them, or on some of '
    'them.';

CREATE OR REPLACE FUNCTION autoembed._labels(table_id oid)
    RETURNS jsonb
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH used AS MATERIALIZED (
        SELECT u.id
        FROM autoembed._used_types(ARRAY(
            SELECT a.atttypid FROM pg_attribute AS a
            WHERE a.attrelid = table_id AND a.attnum > 0 AND NOT a.attisdropped
        )) AS u(id)
    )
    SELECT coalesce(jsonb_object_agg(f.key, f.value), '{}')
    FROM (
        SELECT 'enum ' || e.oid AS key, e.enumlabel::text AS value
        FROM used AS u
        JOIN pg_enum AS e ON e.enumtypid = u.id
        UNION ALL
        SELECT 'composite ' || t.oid, string_agg(format_type(a.atttypid, a.atttypmod), ',' ORDER BY a.attnum)
        FROM used AS u
        JOIN pg_type AS t ON t.oid = u.id AND t.typtype = 'c'
        JOIN pg_attribute AS a ON a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        GROUP BY t.oid
    ) AS f;
$sql$;
COMMENT ON FUNCTION autoembed._labels IS
    'The names of enum values, and the types of attributes, in the types of a table''s columns. The text of a value '
    'depends on them.';

CREATE OR REPLACE FUNCTION autoembed._table_shape(pipeline autoembed.pipeline)
    RETURNS jsonb
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
    SET standard_conforming_strings = on
AS $sql$
    SELECT jsonb_build_object(
        'name', (SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class AS c
                 JOIN pg_namespace AS n ON n.oid = c.relnamespace
                 WHERE c.oid = pipeline.table_id),
        'key', autoembed._is_key(pipeline.table_id, pipeline.key_columns),
        'key_numbers', (SELECT jsonb_agg(a.attnum ORDER BY a.attnum) FROM pg_attribute AS a
                        WHERE a.attrelid = pipeline.table_id AND a.attname = ANY (pipeline.key_columns)),
        'labels', autoembed._labels(pipeline.table_id),
        'columns', (SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_attribute AS a
                    WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped),
        'type', (SELECT concat_ws(' ', a.attnum, format_type(a.atttypid, a.atttypmod)) FROM pg_attribute AS a
                 WHERE a.attrelid = coalesce(pipeline.embeddings_table, pipeline.table_id)
                   AND a.attname = pipeline.embedding_column),
        'contents', (SELECT jsonb_object_agg(a.attnum, concat_ws(
                         ' ', format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid)
                     ))
                     FROM pg_attribute AS a
                     LEFT JOIN pg_attrdef AS d ON a.attgenerated <> '' AND d.adrelid = a.attrelid AND d.adnum = a.attnum
                     WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped
                       AND (a.attname <> pipeline.embedding_column OR pipeline.embeddings_table IS NOT NULL)),
        'partitions', (SELECT coalesce(jsonb_agg(t.relid::oid::bigint ORDER BY t.relid::oid), '[]')
                       FROM autoembed._partition_tree(pipeline.table_id) AS t
                       WHERE t.isleaf),
        'owner', (SELECT c.relowner::bigint FROM pg_class AS c WHERE c.oid = pipeline.table_id)
    );
$sql$;
COMMENT ON FUNCTION autoembed._table_shape IS
    'The facts of a table that its pipeline follows. name: the name of the table. key: whether the key columns are a '
    'key. key_numbers: the numbers of the columns that were one last. labels: the names of enum values and attributes '
    'by type. columns: the names by number. type: the number and the type of the embedding column. contents: the types '
    'and expressions of the other columns. partitions: the OIDs of the leaves. owner: the OID of the owner.';

CREATE OR REPLACE FUNCTION autoembed._renamed(names name[], renames jsonb)
    RETURNS name[]
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT array_agg(coalesce((renames ->> n.name)::name, n.name) ORDER BY n.position)
    FROM unnest(names) WITH ORDINALITY AS n(name, position);
$sql$;
COMMENT ON FUNCTION autoembed._renamed IS 'The names after renames, given as {old name: new name}.';

CREATE OR REPLACE FUNCTION autoembed._renamed_template(template text, renames jsonb)
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT string_agg(
        CASE
            WHEN t.column_name IS NOT NULL THEN format('{%s}', coalesce(renames ->> t.column_name, t.column_name))
            WHEN t.literal IN ('{', '}', E'\\') THEN t.literal || t.literal
            ELSE t.literal
        END, ''
    )
    FROM autoembed._template(template) AS t;
$sql$;
COMMENT ON FUNCTION autoembed._renamed_template IS
    'A template after renames of columns, given as {old name: new name}.';

CREATE OR REPLACE FUNCTION autoembed._backfill(ids integer[])
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.backfill AS b (pipeline_id)
    SELECT p.id FROM autoembed.pipeline AS p WHERE p.id = ANY (ids) FOR KEY SHARE
    ON CONFLICT ON CONSTRAINT backfill_pkey DO UPDATE
    SET position = NULL, rows_queued = 0, scanned_at = NULL, index_problem = NULL, started_at = clock_timestamp();
$sql$;
COMMENT ON FUNCTION autoembed._backfill IS
    'Has lanes scan the rows of pipelines for embeddings that are missing or stale.';

CREATE OR REPLACE FUNCTION autoembed._with_content_function(pipeline autoembed.pipeline, function oid)
    RETURNS autoembed.pipeline
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
BEGIN
    SELECT p.oid, format('%I.%I', n.nspname, p.proname)
    INTO pipeline.content_function_oid, pipeline.content_function_id
    FROM pg_proc AS p
    JOIN pg_namespace AS n ON n.oid = p.pronamespace
    WHERE p.oid = function;
    RETURN pipeline;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._with_content_function IS
    'A pipeline that knows the OID and the present name of its content function; NULLs for no function.';

CREATE OR REPLACE FUNCTION autoembed._with_chunk_function(pipeline autoembed.pipeline, function oid)
    RETURNS autoembed.pipeline
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
BEGIN
    pipeline.chunk_function_oid := function;
    -- The check of the pipeline names a function that there is not.
    pipeline.chunk_function := coalesce(
        (SELECT format('%I.%I', n.nspname, p.proname)
         FROM pg_proc AS p
         JOIN pg_namespace AS n ON n.oid = p.pronamespace
         WHERE p.oid = function),
        pipeline.chunk_function
    );
    RETURN pipeline;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._with_chunk_function IS
    'A pipeline that knows the OID and the present name of the function that cuts its texts.';

CREATE OR REPLACE FUNCTION autoembed._find_functions(ids integer[] DEFAULT NULL)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    UPDATE autoembed.pipeline AS p
    SET content_function_id = coalesce((n.pipeline).content_function_id, p.content_function_id),
        content_function_oid = coalesce((n.pipeline).content_function_oid, p.content_function_oid),
        chunk_function = (n.pipeline).chunk_function,
        chunk_function_oid = coalesce((n.pipeline).chunk_function_oid, p.chunk_function_oid)
    FROM (
        SELECT q.id, autoembed._with_content_function(
            autoembed._with_chunk_function(q, autoembed._chunk_function_of(q)), autoembed._content_function_of(q)
        ) AS pipeline
        FROM autoembed.pipeline AS q
        WHERE num_nonnulls(q.content_function, q.chunk_function) > 0 AND (ids IS NULL OR q.id = ANY (ids))
        -- A tenant may have locked the row. Another look comes.
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS n
    WHERE p.id = n.id
      AND ((p.content_function_id, p.content_function_oid)
           <> ((n.pipeline).content_function_id, (n.pipeline).content_function_oid)
           OR (p.chunk_function, p.chunk_function_oid)
           <> ((n.pipeline).chunk_function, (n.pipeline).chunk_function_oid));
$sql$;
COMMENT ON FUNCTION autoembed._find_functions IS
    'Has pipelines know the OIDs of functions that pg_upgrade has changed, and names that changed unseen. ids: NULL: '
    'all of them.';

CREATE OR REPLACE FUNCTION autoembed._define()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _check record;
BEGIN
    -- The row comes from a dump. It was sound once, and the triggers of its table are restored later.
    IF TG_OP = 'INSERT' AND NEW.built_from IS NOT NULL THEN
        NEW.table_shape := autoembed._table_shape(NEW);
        IF autoembed._content_function_of(NEW) IS NOT NULL THEN
            NEW := autoembed._with_content_function(NEW, autoembed._content_function_of(NEW));
        END IF;
        NEW := autoembed._with_chunk_function(NEW, autoembed._chunk_function_of(NEW));
        RETURN NEW;
    END IF;
    -- A dump of the schema alone restores functions and triggers without their pipelines. Their numbers are taken.
    WHILE TG_OP = 'INSERT' AND EXISTS (
        SELECT FROM pg_proc AS p WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname = '_content_' || NEW.id
    ) LOOP
        NEW.id := nextval('autoembed.pipeline_id_seq');
    END LOOP;
    IF (TG_OP = 'INSERT' OR NEW.embeddings_table IS DISTINCT FROM OLD.embeddings_table)
       AND NEW.embeddings_table IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_class AS t
        JOIN pg_class AS e ON e.relowner = t.relowner AND e.oid = NEW.embeddings_table
        WHERE t.oid = NEW.table_id
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('table %s and its embeddings table do not belong to the same role', NEW.table_id),
            HINT = 'Leave it to enable() to make the embeddings table.';
    END IF;
    IF NEW.managed AND NEW.key_columns IS NULL THEN
        NEW.key_columns := coalesce(autoembed._key_columns(NEW.table_id), '{}');
    END IF;
    IF TG_OP = 'INSERT' OR NEW.content_function IS DISTINCT FROM OLD.content_function THEN
        NEW := autoembed._with_content_function(
            NEW, autoembed._content_function(NEW.table_id, NEW.content_function)
        );
    END IF;
    IF TG_OP = 'INSERT' OR NEW.chunk_function IS DISTINCT FROM OLD.chunk_function THEN
        NEW := autoembed._with_chunk_function(NEW, autoembed._chunk_function_of(NEW));
    END IF;
    NEW.replicated := NEW.replicated OR autoembed._is_subscribed(NEW.table_id);
    -- Nobody drops the model meanwhile.
    PERFORM FROM autoembed.model AS m WHERE m.name = NEW.model FOR KEY SHARE;
    SELECT c.* INTO _check FROM autoembed._check_pipeline(NEW) AS c;
    IF _check.errcode <> 'waits' THEN
        RAISE EXCEPTION USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = _check.errcode;
    END IF;
    -- _defined() plans it again.
    NEW.plan_problem := NULL;
    -- The former shape stays, because _follow_one() finds changes by it.
    IF TG_OP = 'INSERT' OR NEW.embeddings_table IS DISTINCT FROM OLD.embeddings_table THEN
        NEW.table_shape := autoembed._table_shape(NEW);
    END IF;
    IF TG_OP = 'UPDATE' AND (
        NEW.model, NEW.content_columns, NEW.content_template, NEW.content_function, NEW.condition, NEW.chunk_prefix
    ) IS DISTINCT FROM (
        OLD.model, OLD.content_columns, OLD.content_template, OLD.content_function, OLD.condition, OLD.chunk_prefix
    ) THEN
        NEW.stale_since := clock_timestamp();
    END IF;
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._define IS 'Completes the definition of a pipeline, and refuses one that cannot work.';

CREATE OR REPLACE FUNCTION autoembed._adopt_vectors(pipeline autoembed.pipeline)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _model autoembed.model := autoembed._model(pipeline.model);
BEGIN
    IF pipeline.embeddings_table IS NOT NULL THEN
        IF autoembed._is_empty(pipeline.embeddings_table) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'feature_not_supported',
                MESSAGE = format('table %s has no vectors to adopt', pipeline.embeddings_table),
                HINT = format(
                    'Adopt those of a column, then move them: SELECT autoembed.enable(%1$L, embedding_column => …, '
                    'adopt => true, …); SELECT autoembed.alter_pipeline(%1$L, storage => ''beside'');',
                    pipeline.table_id
                );
        END IF;
        -- Each of these has the digest of its model and its text.
        RETURN;
    ELSIF NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = pipeline.table_id AND a.attname = pipeline.embedding_column
          AND a.atttypmod = _model.dimensions
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('column "%s" of table %s holds no vectors of model "%s", which have %s dimensions',
                             pipeline.embedding_column, pipeline.table_id, _model.name, _model.dimensions),
            HINT = format('Name the model that made them, or give the column its dimensions: '
                          'ALTER TABLE %s ALTER COLUMN %I TYPE @extschema:vector@.halfvec(%s).',
                          pipeline.table_id, pipeline.embedding_column, _model.dimensions);
    END IF;
    RAISE NOTICE '% rows of table % have vectors, which count as those of model "%"',
        autoembed._adopt_rows(pipeline.id), pipeline.table_id, _model.name;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._adopt_vectors IS
    'Takes the vectors in the column of a new pipeline for those of its rows'' texts by its model. Fails if they '
    'cannot be.';

CREATE OR REPLACE FUNCTION autoembed._adopt_rows(pipeline_id integer)
    RETURNS bigint
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.adopt_rows(pipeline_id)
$python$;
COMMENT ON FUNCTION autoembed._adopt_rows IS
    'Records that the rows of a pipeline have the vectors of their texts, where they have any. Returns how many.';

CREATE OR REPLACE FUNCTION autoembed._defined()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _strays integer[];
    _plan record;
    _check record;
    _void text;
BEGIN
    IF TG_OP = 'INSERT' AND NEW.built_from IS NOT NULL THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'INSERT' THEN
        _strays := ARRAY(SELECT DISTINCT t.pipeline_id FROM autoembed._stray_triggers(NEW.table_id) AS t);
        _void := autoembed._drop_stray_triggers(NEW.table_id);
        -- A dump of the schema alone has brought them.
        PERFORM autoembed._drop_functions(s.pipeline_id, true)
        FROM unnest(_strays) AS s(pipeline_id)
        WHERE NOT EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = s.pipeline_id);
    END IF;
    IF NOT autoembed._build_pipeline(NEW.id) AND NEW.embeddings_table IS NOT NULL THEN
        -- Somebody may have dropped the policy or the view.
        PERFORM autoembed._admit_readers(s.slots)
        FROM autoembed._slots(NEW) AS s(slots)
        WHERE s.slots ->> 'vector_type' IS NOT NULL;
    END IF;
    -- PostgreSQL plans the statements of a lane, under the guards of a lane.
    IF autoembed._missing_object(NEW) IS NULL AND EXISTS (
        SELECT FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname = '_content_' || NEW.id
    ) THEN
        SELECT p.* INTO _plan FROM autoembed._plan(NEW.id, NULL) AS p;
        IF _plan.problem IS NOT NULL THEN
            RAISE EXCEPTION USING MESSAGE = _plan.problem, ERRCODE = _plan.errcode;
        END IF;
    END IF;
    IF TG_OP = 'UPDATE' AND OLD.plan_problem IS NOT NULL THEN
        -- It goes on. Rows may fulfil the condition by now that did not, and the other way round.
        _void := autoembed._backfill(ARRAY[NEW.id]);
    END IF;
    IF TG_OP = 'INSERT' AND NEW.adopts THEN
        -- The rows are read before the triggers lock the table against writes. A row that changes meanwhile has another
        -- digest, which the backfill sees.
        _void := autoembed._adopt_vectors(NEW);
        _void := autoembed._lock_table(NEW.table_id, false);
    END IF;
    IF NEW.managed AND (
        TG_OP = 'INSERT'
        OR autoembed._clears(NEW) <> autoembed._clears(OLD)
        OR NEW.on_change <> OLD.on_change
        OR NEW.embeddings_table IS DISTINCT FROM OLD.embeddings_table
        OR EXISTS (SELECT FROM autoembed._trigger_problems(NEW))
    ) THEN
        _void := autoembed._build_triggers(NEW);
    END IF;
    IF TG_OP = 'INSERT' THEN
        _void := autoembed._follow_partitions(NEW.table_id);
    ELSIF NEW.model IS DISTINCT FROM OLD.model THEN
        _void := autoembed._fit_embeddings_table(NEW);
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.embeddings_table IS DISTINCT FROM OLD.embeddings_table THEN
        _void := autoembed._move_embeddings(OLD);
    END IF;
    -- The embeddings table has the model's dimensions only now.
    SELECT c.* INTO _check FROM autoembed._check_pipeline(NEW) AS c;
    IF _check.errcode = 'waits' THEN
        RAISE WARNING USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._defined IS
    'Makes the functions and triggers of a pipeline that is defined or changed, and warns of what keeps it waiting.';

CREATE OR REPLACE FUNCTION autoembed._move_embeddings(pipeline autoembed.pipeline)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _keys jsonb := autoembed._key_slots(pipeline);
    _place text;
    _moved record;
BEGIN
    -- The keys come between the two parts of the query.
    IF pipeline.embeddings_table IS NULL THEN
        _place := format(
            ') AS s(key)) AS s JOIN %s AS t ON %s CROSS JOIN LATERAL (SELECT t.%I AS embedding, %s AS digest) AS d '
            'WHERE d.embedding IS NOT NULL',
            autoembed._rows_of(pipeline.table_id), _keys ->> 'same_key', pipeline.embedding_column,
            autoembed._vector_digest_expression(pipeline, 't')
        );
    ELSE
        -- Several chunks have no embedding of the whole text.
        _place := format(
            ') AS s(key)) AS s CROSS JOIN LATERAL (SELECT (array_agg(e.%I))[1] AS embedding, '
            'substring(sha256((array_agg(e.digest))[1]), 1, 8) AS digest FROM %s AS e WHERE %s '
            'HAVING count(*) = 1) AS d',
            pipeline.embedding_column, pipeline.embeddings_table, _keys ->> 'same_embeddings'
        );
    END IF;
    SELECT m.* INTO _moved
    FROM autoembed._copy_embeddings(
        pipeline.id, pipeline.table_id,
        format('SELECT s.key, d.embedding::text AS vector, encode(d.digest, ''hex'') AS digest '
               'FROM (SELECT s.key, %s FROM unnest(', _keys ->> 'sent_keys'),
        _place, pipeline.chunking, pipeline.chunk_size, pipeline.chunk_overlap, pipeline.chunk_prefix
    ) AS m;
    IF _moved.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _moved.problem, ERRCODE = _moved.errcode;
    END IF;
    -- An index goes along.
    INSERT INTO autoembed.backfill AS b (pipeline_id, create_index)
    SELECT pipeline.id, true
    FROM autoembed._vector_index(
        coalesce(pipeline.embeddings_table, pipeline.table_id), pipeline.embedding_column
    ) AS i
    WHERE i.indisvalid
    ON CONFLICT ON CONSTRAINT backfill_pkey DO UPDATE SET create_index = true;
    IF pipeline.embeddings_table IS NOT NULL THEN
        -- Its policy and its view go with these functions.
        PERFORM autoembed._drop_readers(pipeline.id);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._move_embeddings IS
    'Copies the embeddings of a pipeline, given as it was, to where it has them now. An embedding whose text has '
    'changed stays behind, and so do those of chunks.';

CREATE OR REPLACE FUNCTION autoembed._copy_embeddings(
    pipeline_id integer,
    table_id regclass,
    query_start text,
    query_end text,
    chunking text,
    chunk_size integer,
    chunk_overlap integer,
    chunk_prefix text,
    OUT problem text,
    OUT errcode text
)
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.copy_embeddings(
        pipeline_id, table_id, query_start, query_end,
        {
            "chunking": chunking,
            "chunk_size": chunk_size,
            "chunk_overlap": chunk_overlap,
            "chunk_prefix": chunk_prefix,
        },
    )
$python$;
COMMENT ON FUNCTION autoembed._copy_embeddings IS
    'The work of _move_embeddings(), and why it fails. The query gives the old embeddings of the keys between its '
    'parts; the other arguments tell how texts were cut.';

CREATE OR REPLACE FUNCTION autoembed._ended()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _trigger name;
BEGIN
    -- Lanes drop the jobs that they hold themselves. Nobody waits for their locks here.
    DELETE FROM autoembed._job AS q
    WHERE q.message_id = ANY (ARRAY(
        SELECT o.message_id FROM autoembed._job AS o WHERE o.pipeline = OLD.id::text LIMIT 5000 FOR UPDATE SKIP LOCKED
    ));
    IF NOT autoembed._forget_ended(OLD.id) THEN
        -- Lanes delete the rest, part by part.
        INSERT INTO autoembed._job (due_at, message)
        VALUES (clock_timestamp(), jsonb_build_object('pipeline', OLD.id, 'truncated', true));
    END IF;
    PERFORM autoembed._drop_functions(OLD.id, true);
    PERFORM autoembed._drop_stray_triggers(t.relid)
    FROM autoembed._partition_tree(OLD.table_id) AS t
    WHERE t.level > 0;
    PERFORM autoembed._unschedule('index-' || OLD.id);
    FOR _trigger IN
        SELECT t.tgname FROM autoembed._guide_triggers(OLD) AS t WHERE t.tgrelid = OLD.table_id
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', _trigger, OLD.table_id);
    END LOOP;
    -- The embeddings of a table that was dropped go with it, unless something depends on them.
    IF EXISTS (
        SELECT FROM pg_class AS c
        WHERE c.oid = OLD.embeddings_table AND c.relowner::bigint = (OLD.table_shape ->> 'owner')::bigint
    )
       -- 0: another pipeline has them now.
       AND OLD.table_id <> 0 AND NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = OLD.table_id) THEN
        BEGIN
            EXECUTE format('DROP TABLE %s', OLD.embeddings_table);
        EXCEPTION WHEN dependent_objects_still_exist OR lock_not_available THEN
            NULL;
        END;
    END IF;
    PERFORM autoembed._follow_partitions(OLD.table_id);
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._ended IS
    'Removes the jobs, records, functions and triggers of a pipeline that has ended. Waits for no lock of a record.';

CREATE OR REPLACE FUNCTION autoembed._model_changed()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline record;
BEGIN
    -- The restore of a dump, which switches this off, changes no model.
    IF NOT current_setting('check_function_bodies')::boolean THEN
        RETURN NULL;
    END IF;
    FOR _pipeline IN
        SELECT p.*
        FROM autoembed.pipeline AS p
        CROSS JOIN autoembed.model AS m
        WHERE m.name = coalesce(p.model, autoembed._default_model())
          AND CASE TG_TABLE_NAME
              WHEN 'model' THEN m.name = to_jsonb(NEW) ->> 'name'
              ELSE p.model IS NULL AND autoembed._model_identity(m) <> autoembed._model_identity(autoembed._model(
                  CASE WHEN TG_OP = 'UPDATE' THEN to_jsonb(OLD) ->> 'value' ELSE 'all-MiniLM-L6-v2' END
              ))
          END
          AND EXISTS (SELECT FROM autoembed.embedded AS e WHERE e.pipeline_id = p.id)
    LOOP
        -- A tenant may have locked the row. The warning comes all the same.
        UPDATE autoembed.pipeline AS p
        SET stale_since = clock_timestamp()
        WHERE p.id = (
            SELECT q.id FROM autoembed.pipeline AS q WHERE q.id = _pipeline.id FOR NO KEY UPDATE SKIP LOCKED
        );
        -- Another warning tells of a pipeline that does not fit its model.
        CONTINUE WHEN (SELECT c.problem IS NOT NULL FROM autoembed.pipeline AS p
                       CROSS JOIN LATERAL autoembed._check_pipeline(p) AS c WHERE p.id = _pipeline.id);
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('%s.%I holds vectors of another model', _pipeline.table_id, _pipeline.embedding_column),
            HINT = format('Embed its rows again: SELECT autoembed.resync(%L);', _pipeline.table_id);
    END LOOP;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._model_changed IS
    'Notes that the vectors of pipelines are of another model than the present one, and warns of it.';

CREATE OR REPLACE FUNCTION autoembed._end()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- The table is locked meanwhile.
    SET lock_timeout = '5s'
AS $plpgsql$
BEGIN
    DELETE FROM autoembed.pipeline AS p WHERE p.id = NEW.id;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._end IS 'Deletes a pipeline that is marked as ended.';

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
            EXECUTE format('DROP VIEW %s', _view);
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

CREATE OR REPLACE FUNCTION autoembed._rows_of(table_id oid)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- Rows of tables that inherit from it have keys of their own.
    SELECT CASE c.relkind WHEN 'r' THEN 'ONLY ' ELSE '' END || c.oid::regclass
    FROM pg_class AS c
    WHERE c.oid = table_id;
$sql$;
COMMENT ON FUNCTION autoembed._rows_of IS 'A table, as FROM names it, with its own rows and those of its partitions.';

CREATE OR REPLACE FUNCTION autoembed._may_take_key(pipeline autoembed.pipeline, key_columns name[])
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT pipeline.embeddings_table IS NULL
        OR NOT key_columns && '{chunk_number,chunk_start,chunk_end,digest,embedding}'
           -- The rows tell which old key each new one had, or a part of it is enough.
           AND (key_columns <@ pipeline.key_columns OR pipeline.key_columns <@ ARRAY(
               SELECT a.attname FROM pg_attribute AS a WHERE a.attrelid = pipeline.table_id AND NOT a.attisdropped
           ))
           AND EXISTS (
               SELECT FROM pg_class AS t
               JOIN pg_class AS e ON e.relowner = t.relowner AND e.oid = pipeline.embeddings_table
               WHERE t.oid = pipeline.table_id
           );
$sql$;
COMMENT ON FUNCTION autoembed._may_take_key IS
    'Whether a pipeline can go on with another key. Its embeddings table needs the old key to know the rows.';

CREATE OR REPLACE FUNCTION autoembed._take_key_beside(pipeline autoembed.pipeline, key_columns name[])
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _old_keys text;
    _same_key text;
    _new_keys text := (SELECT string_agg(quote_ident(k.name), ', ') FROM unnest(key_columns) AS k(name));
    _statement text;
BEGIN
    SELECT string_agg(quote_ident(k.name), ', '),
           string_agg(format('e.%1$I %2$s t.%1$I', k.name, autoembed._operator(pipeline.embeddings_table, k.name, 3)),
                      ' AND ')
    INTO _old_keys, _same_key
    FROM unnest(pipeline.key_columns) AS k(name);
    PERFORM autoembed._drop_readers(pipeline.id);
    FOR _statement IN
        SELECT s.statement
        FROM (
            -- The same names are those of other columns, which do not tell the rows.
            SELECT 0 AS step, format('TRUNCATE %s', pipeline.embeddings_table) AS statement
            WHERE key_columns = pipeline.key_columns
            UNION ALL
            SELECT 1, format(
                'ALTER TABLE %s ADD COLUMN %I %s%s', pipeline.embeddings_table, a.attname,
                format_type(a.atttypid, a.atttypmod),
                (SELECT format(' COLLATE %I.%I', n.nspname, l.collname)
                 FROM pg_collation AS l
                 JOIN pg_namespace AS n ON n.oid = l.collnamespace
                 WHERE l.oid = a.attcollation AND l.collname <> 'default')
            )
            FROM pg_attribute AS a
            WHERE a.attrelid = pipeline.table_id AND a.attname = ANY (key_columns)
              AND a.attname <> ALL (pipeline.key_columns)
            UNION ALL
            -- An old key of several rows tells nothing.
            SELECT 2, format(
                'UPDATE %s AS e SET %s '
                'FROM (SELECT *, count(*) OVER (PARTITION BY %s) AS "autoembed rows" FROM %s) AS t '
                'WHERE %s AND t."autoembed rows" = 1',
                pipeline.embeddings_table,
                string_agg(format('%1$I = t.%1$I', k.name), ', ') FILTER (WHERE k.name <> ALL (pipeline.key_columns)),
                _old_keys, autoembed._rows_of(pipeline.table_id), _same_key
            )
            FROM unnest(key_columns) AS k(name)
            HAVING NOT key_columns <@ pipeline.key_columns
            UNION ALL
            SELECT 3, format('DELETE FROM %s AS e WHERE num_nulls(%s) > 0', pipeline.embeddings_table, _new_keys)
            UNION ALL
            SELECT 4, format('ALTER TABLE %s DROP CONSTRAINT %I', pipeline.embeddings_table, c.conname)
            FROM pg_constraint AS c
            WHERE c.conrelid = pipeline.embeddings_table AND c.contype = 'p'
            UNION ALL
            SELECT 5, format('ALTER TABLE %s DROP COLUMN %I', pipeline.embeddings_table, k.name)
            FROM unnest(pipeline.key_columns) AS k(name)
            WHERE k.name <> ALL (key_columns)
            UNION ALL
            SELECT 6, format('ALTER TABLE %s ADD PRIMARY KEY (%s, chunk_number)', pipeline.embeddings_table, _new_keys)
        ) AS s
        ORDER BY s.step
    LOOP
        PERFORM autoembed._alter_as_owner(pipeline.embeddings_table, _statement);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._take_key_beside IS
    'Gives the embeddings table of a pipeline another key. Embeddings go whose row is not told by the old key.';

CREATE OR REPLACE FUNCTION autoembed._keys_of_rows(
    table_id oid,
    old_key text,
    new_key text,
    max_seconds double precision
)
    RETURNS SETOF jsonb
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- So many keys fit into the memory of a session.
    _part_rows CONSTANT bigint := 500000;
    _parts integer := 1 + coalesce(autoembed._estimated_rows(table_id), 0) / _part_rows;
    _answer record;
BEGIN
    FOR _part IN 0 .. _parts - 1 LOOP
        -- To plan a query calls functions of the owner, in expressions of indexes and statistics. To run it may reach
        -- foreign tables.
        SELECT a.* INTO _answer FROM autoembed._run_as_owner(table_id, format(
            'SELECT k.* FROM (SELECT %s AS old_key, min(%s COLLATE "C") AS new_key FROM %s AS t GROUP BY 1 '
            'HAVING count(*) = 1) AS k WHERE abs(mod(hashtextextended(k.old_key, 0), %s)) = %s',
            old_key, new_key, autoembed._rows_of(table_id), _parts, _part
        ), max_seconds) AS a;
        RETURN NEXT _answer.found;
        EXIT WHEN _answer.problem IS NOT NULL;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._keys_of_rows IS
    'The old and the new key of the rows of a table, in parts, where an old key is that of one row. NULL as the last '
    'part: the rest cannot be read.';

CREATE OR REPLACE FUNCTION autoembed._take_key(pipeline autoembed.pipeline, key_columns name[])
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    -- The settings with which lanes make keys, as in _output_settings().
    SET TimeZone = 'UTC'
    SET DateStyle = 'ISO, YMD'
    SET IntervalStyle = 'postgres'
    SET extra_float_digits = 1
    SET bytea_output = 'hex'
AS $plpgsql$
DECLARE
    _new autoembed.pipeline := pipeline;
    _part jsonb;
BEGIN
    -- Lanes may hold jobs with the old keys. These end with the old number.
    UPDATE autoembed.pipeline AS p SET table_id = 0 WHERE p.id = pipeline.id;
    IF pipeline.embeddings_table IS NOT NULL THEN
        PERFORM autoembed._take_key_beside(pipeline, key_columns);
    END IF;
    _new.key_columns := _take_key.key_columns;
    INSERT INTO autoembed.pipeline AS p (
        table_id, embedding_column, key_columns, content_columns, content_template, content_function,
        content_function_id, content_function_oid, condition, condition_columns, condition_objects, model,
        on_change, truncate, replicated, managed, paused, table_shape, built_from, text_config,
        ef_search, recall_target, recall, recall_measured_at, embeddings_table, chunking, chunk_size, chunk_overlap,
        chunk_function, chunk_function_oid, chunk_prefix, binary_index, former_chunking
    )
    SELECT (_new).table_id, (_new).embedding_column, (_new).key_columns, (_new).content_columns,
           (_new).content_template, (_new).content_function, (_new).content_function_id,
           (_new).content_function_oid, (_new).condition, (_new).condition_columns, (_new).condition_objects,
           (_new).model, (_new).on_change, (_new).truncate, (_new).replicated, (_new).managed, (_new).paused,
           (_new).table_shape, 'stopped', (_new).text_config, (_new).ef_search, (_new).recall_target,
           (_new).recall, (_new).recall_measured_at, (_new).embeddings_table, (_new).chunking, (_new).chunk_size,
           (_new).chunk_overlap, (_new).chunk_function, (_new).chunk_function_oid,
           (_new).chunk_prefix, (_new).binary_index, (_new).former_chunking
    RETURNING p.id INTO _new.id;
    -- The digests of the rows go along while the table has both keys.
    IF NOT EXISTS (
        SELECT FROM unnest(pipeline.key_columns) AS k(name)
        WHERE NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = pipeline.table_id AND a.attname = k.name AND NOT a.attisdropped
        )
    ) THEN
        -- A row whose digest stays behind is embedded again.
        FOR _part IN
            SELECT k.found
            FROM autoembed._keys_of_rows(
                pipeline.table_id, autoembed._key_expression(pipeline, 't'), autoembed._key_expression(_new, 't'), NULL
            ) AS k(found)
        LOOP
            INSERT INTO autoembed.embedded (
                pipeline_id, key, digest, truncated, vector_digest, embedded_at, replaced
            )
            SELECT _new.id, autoembed._short_key(k.new_key), e.digest, e.truncated, e.vector_digest, e.embedded_at,
                   e.replaced
            FROM jsonb_to_recordset(_part) AS k(old_key text, new_key text)
            JOIN autoembed.embedded AS e ON e.pipeline_id = pipeline.id AND e.key = autoembed._short_key(k.old_key);
        END LOOP;
    END IF;
    INSERT INTO autoembed.backfill (pipeline_id, create_index)
    SELECT _new.id, coalesce(bool_or(b.create_index), false)
    FROM autoembed.backfill AS b
    WHERE b.pipeline_id = pipeline.id;
    DELETE FROM autoembed.pipeline AS p WHERE p.id = pipeline.id;
    RETURN _new.id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._take_key IS
    'Replaces a pipeline by one with another key. Digests go along if the table still has the columns of the old key.';

CREATE OR REPLACE FUNCTION autoembed._forget_old_keys(pipeline autoembed.pipeline, max_seconds double precision)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    -- The settings with which lanes make keys, as in _output_settings().
    SET TimeZone = 'UTC'
    SET DateStyle = 'ISO, YMD'
    SET IntervalStyle = 'postgres'
    SET extra_float_digits = 1
    SET bytea_output = 'hex'
AS $plpgsql$
DECLARE
    _key text := autoembed._key_expression(pipeline, 't');
    _part jsonb;
    _present bigint[] := '{}'::bigint[];
BEGIN
    FOR _part IN
        SELECT k.found FROM autoembed._keys_of_rows(pipeline.table_id, _key, _key, max_seconds) AS k(found)
    LOOP
        IF _part IS NULL THEN
            -- A digest of no row does no harm.
            RETURN;
        END IF;
        _present := _present || ARRAY(
            SELECT hashtextextended(autoembed._short_key(k.old_key), 0)
            FROM jsonb_to_recordset(_part) AS k(old_key text)
        );
    END LOOP;
    DELETE FROM autoembed.embedded AS e
    WHERE e.pipeline_id = pipeline.id AND NOT EXISTS (
        SELECT FROM unnest(_present) AS k(hash) WHERE k.hash = hashtextextended(e.key, 0)
    );
    UPDATE autoembed.text_document AS d
    SET is_live = false
    WHERE d.pipeline_id = pipeline.id AND d.is_live AND NOT EXISTS (
        SELECT FROM autoembed.embedded AS e
        WHERE e.pipeline_id = pipeline.id AND e.key = autoembed._short_key(d.key)
    );
    IF pipeline.embeddings_table IS NOT NULL AND max_seconds IS NULL THEN
        PERFORM autoembed._alter_as_owner(pipeline.embeddings_table, (
            SELECT format('DELETE FROM %s AS e WHERE NOT EXISTS (SELECT FROM %s AS t WHERE %s)',
                          pipeline.embeddings_table, autoembed._rows_of(pipeline.table_id),
                          string_agg(format('e.%1$I %2$s t.%1$I', k.name,
                                            autoembed._operator(pipeline.embeddings_table, k.name, 3)), ' AND '))
            FROM unnest(pipeline.key_columns) AS k(name)
        ));
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_old_keys IS
    'Deletes the digests, the indexed texts and the embeddings of rows whose key is written in another way since the '
    'type of a key column has changed.';

CREATE OR REPLACE FUNCTION autoembed._note_plan(pipeline_id integer, problem text)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _before text;
BEGIN
    SELECT p.plan_problem INTO _before
    FROM autoembed.pipeline AS p
    WHERE p.id = _note_plan.pipeline_id AND (p.plan_problem IS NOT NULL OR problem IS NOT NULL)
    -- A tenant may have locked the row. Another look comes.
    FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE autoembed.pipeline AS p
    SET plan_problem = left(problem, 1000), planned_at = clock_timestamp(),
        -- The same problem is told again when it comes again.
        warned_of = CASE WHEN problem IS NOT NULL THEN p.warned_of END
    WHERE p.id = _note_plan.pipeline_id;
    IF problem IS NULL THEN
        -- Rows may fulfil the condition by now that did not, and the other way round.
        PERFORM autoembed._backfill(ARRAY[_note_plan.pipeline_id]);
    END IF;
    RETURN left(problem, 1000) IS DISTINCT FROM _before;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._note_plan IS
    'Notes why a pipeline''s texts cannot be read, which stops it; NULL: they can, and its rows are scanned if they '
    'could not. Returns whether that is new.';

CREATE OR REPLACE FUNCTION autoembed._rows_to_try(
    pipeline_id integer,
    OUT is_stopped boolean,
    OUT cuts boolean,
    OUT keys text[]
)
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT p.plan_problem IS NOT NULL, p.chunk_function IS NOT NULL, ARRAY(
        (SELECT k.key
         FROM (
             SELECT e.key FROM autoembed.embedded AS e
             WHERE e.pipeline_id = p.id AND left(e.key, 1) = '['
             LIMIT 200
         ) AS k
         ORDER BY random()
         LIMIT 10)
        UNION ALL
        (SELECT k.key::text
         FROM (
             SELECT q.message -> 'keys' AS keys FROM autoembed._job AS q
             WHERE q.pipeline = p.id::text AND jsonb_typeof(q.message -> 'keys') = 'array'
             ORDER BY q.due_at DESC
             LIMIT 10
         ) AS m
         CROSS JOIN LATERAL jsonb_array_elements(m.keys) AS k(key)
         LIMIT 10)
    )
    FROM autoembed.pipeline AS p
    WHERE p.id = _rows_to_try.pipeline_id;
$sql$;
COMMENT ON FUNCTION autoembed._rows_to_try IS
    'Some rows of a pipeline that tell whether its texts can be read: those that had a text, and those that wait. '
    'is_stopped: the texts could not be read. cuts: its owner''s function cuts them.';

CREATE OR REPLACE FUNCTION autoembed._plan_again(pipeline_id integer, max_seconds double precision)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _plan record;
BEGIN
    SELECT p.* INTO _plan FROM autoembed._plan(pipeline_id, max_seconds) AS p;
    -- A lock, a cancel, or code that takes too long tells nothing.
    IF _plan.errcode IS NULL OR _plan.problem IS NOT NULL AND _plan.errcode <> '57014' THEN
        PERFORM autoembed._note_plan(pipeline_id, _plan.problem);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._plan_again IS
    'Stops a pipeline whose texts PostgreSQL cannot plan to read, and has one that is stopped go on once its texts can '
    'be read.';

CREATE OR REPLACE FUNCTION autoembed._plan_stopped()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _id integer;
BEGIN
    -- One at a time, and briefly: the code of its owner holds up the lane.
    UPDATE autoembed.pipeline AS p
    SET planned_at = clock_timestamp()
    WHERE p.id = (
        SELECT q.id FROM autoembed.pipeline AS q
        WHERE q.plan_problem IS NOT NULL AND q.planned_at < clock_timestamp() - interval '10 seconds'
        ORDER BY q.planned_at
        LIMIT 1
        FOR NO KEY UPDATE SKIP LOCKED
    )
    RETURNING p.id INTO _id;
    IF FOUND THEN
        -- Code that is slow has its time now and then.
        PERFORM autoembed._plan_again(_id, CASE WHEN random() < 0.05 THEN 1 ELSE 0.1 END);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._plan_stopped IS
    'Looks whether a pipeline whose texts could not be read can go on: a change of rights, a cast or an operator tells '
    'no trigger.';

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
    _names CONSTANT text[] := '{key,labels,name,former_name}'::text[];
    _key name[];
    _changed text[];
    _check record;
    _rival autoembed.pipeline;
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
    -- The next pass replaces them.
    IF NOT current_setting('check_function_bodies')::boolean
       AND _before.table_shape - _names = _shape - _names THEN
        UPDATE autoembed.pipeline AS p SET table_shape = _shape WHERE p.id = _before.id;
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
       OR _before.table_shape ->> 'type' <> _shape ->> 'type'
       OR EXISTS (
           SELECT FROM jsonb_array_elements(_shape -> 'partitions') AS n(id)
           WHERE NOT _before.table_shape -> 'partitions' @> n.id
             AND NOT autoembed._is_empty(n.id::bigint::oid::regclass)
       ) THEN
        PERFORM autoembed._backfill(ARRAY[_after.id]);
    END IF;
    IF _shape -> 'partitions' <> _before.table_shape -> 'partitions'
       AND _after.built_from IS DISTINCT FROM 'stopped' THEN
        PERFORM autoembed._build_partition_triggers(_after);
    END IF;
    IF _after.managed AND _after.built_from IS DISTINCT FROM 'stopped' AND autoembed._inherits(_after.table_id)
       AND EXISTS (
           SELECT FROM pg_trigger AS t
           WHERE t.tgrelid = _after.table_id AND t.tgname = autoembed._trigger_name(_after.id, 'insert')
             -- This bit of pg_trigger.tgtype is set in a trigger of rows.
             AND t.tgtype & 1 = 0
       ) THEN
        PERFORM autoembed._build_triggers(_after);
    END IF;
    IF NOT _shape -> 'partitions' @> (_before.table_shape -> 'partitions') THEN
        PERFORM autoembed._drop_stray_triggers(c.oid)
        FROM jsonb_array_elements(_before.table_shape -> 'partitions') AS o(id)
        JOIN pg_class AS c ON c.oid = o.id::bigint::oid
        WHERE NOT _shape -> 'partitions' @> o.id;
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
    IF TG_TAG = 'ALTER TYPE' THEN
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

    IF TG_TAG = 'ALTER TABLE' THEN
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
    PERFORM autoembed._follow_others(array_agg(p.id ORDER BY p.id), TG_TAG = 'CREATE FUNCTION')
    FROM autoembed.pipeline AS p
    CROSS JOIN LATERAL (
        SELECT d.objid FROM pg_event_trigger_ddl_commands() AS d WHERE d.classid = 'pg_proc'::regclass
    ) AS f
    WHERE p.id = ANY (_ids) AND f.objid IN (autoembed._content_function_of(p), autoembed._chunk_function_of(p))
    HAVING count(*) > 0;
    -- PostgreSQL may choose a function of other arguments in a condition than before.
    PERFORM autoembed._follow_others(array_agg(w.id ORDER BY w.id), TG_TAG = 'CREATE FUNCTION' AND w.is_it)
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
    'new body may give other texts.';

CREATE OR REPLACE FUNCTION autoembed._follow_drops()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
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

CREATE OR REPLACE FUNCTION autoembed._protect_functions()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
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
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._protect_functions IS
    'Keeps table owners from altering the functions made for them, and everybody from renaming the schema of pgvector.';
