-- These triggers act when a pipeline is defined, changed or ended.

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
        SELECT 'composite ' || t.oid,
               string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ',' ORDER BY a.attnum)
        FROM used AS u
        JOIN pg_type AS t ON t.oid = u.id AND t.typtype = 'c'
        JOIN pg_attribute AS a ON a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        GROUP BY t.oid
    ) AS f;
$sql$;
COMMENT ON FUNCTION autoembed._labels IS
    'The names of enum values, and the names and types of attributes, in the types of a table''s columns. The text of '
    'a value depends on them.';

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
        -- A table may lose all its columns.
        'columns', (SELECT coalesce(jsonb_object_agg(a.attnum, a.attname), '{}') FROM pg_attribute AS a
                    WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped),
        'type', (SELECT concat_ws(' ', a.attnum, format_type(a.atttypid, a.atttypmod)) FROM pg_attribute AS a
                 WHERE a.attrelid = coalesce(pipeline.embeddings_table, pipeline.table_id)
                   AND a.attname = pipeline.embedding_column),
        'contents', (SELECT coalesce(jsonb_object_agg(a.attnum, concat_ws(
                         ' ', format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid)
                     )), '{}')
                     FROM pg_attribute AS a
                     LEFT JOIN pg_attrdef AS d ON a.attgenerated <> '' AND d.adrelid = a.attrelid AND d.adnum = a.attnum
                     WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped
                       AND (a.attname <> pipeline.embedding_column OR pipeline.embeddings_table IS NOT NULL)),
        'partitions', (SELECT coalesce(jsonb_agg(t.relid::oid::bigint ORDER BY t.relid::oid), '[]')
                       FROM autoembed._partition_tree(pipeline.table_id) AS t
                       WHERE t.isleaf),
        'functions', (SELECT coalesce(jsonb_agg(d.digest ORDER BY d.digest), '[]')
                      FROM (
                          -- The OIDs of a dump, or before pg_upgrade, are those of another database.
                          SELECT md5(concat(f.prosrc, pg_get_function_sqlbody(f.oid), f.proconfig)) AS digest
                          FROM pg_proc AS f
                          WHERE pipeline.content_function IS NOT NULL
                                AND f.oid = (SELECT autoembed._content_function_of(pipeline))
                             OR pipeline.chunk_function IS NOT NULL
                                AND f.oid = (SELECT autoembed._chunk_function_of(pipeline))
                             OR pipeline.condition_objects <> '{}' AND f.oid IN (
                                 SELECT o.id
                                 FROM autoembed._condition_objects(pipeline.table_id, pipeline.condition_objects) AS o
                                 WHERE o.class = 'pg_proc'::regclass
                             )
                      ) AS d),
        'owner', (SELECT c.relowner::bigint FROM pg_class AS c WHERE c.oid = pipeline.table_id)
    );
$sql$;
COMMENT ON FUNCTION autoembed._table_shape IS
    'The facts of a table that its pipeline follows. name: the name of the table. key: whether the key columns are a '
    'key. key_numbers: the numbers of the columns that were one last. labels: the names of enum values and attributes '
    'by type. columns: the names by number. type: the number and the type of the embedding column. contents: the types '
    'and expressions of the other columns. partitions: the OIDs of the leaves. functions: digests of those that give '
    'or cut the texts. owner: the OID of the owner.';

CREATE OR REPLACE FUNCTION autoembed._text_facts(pipeline autoembed.pipeline)
    RETURNS jsonb
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT jsonb_build_object('functions', pipeline.table_shape -> 'functions', 'columns', coalesce((
        SELECT jsonb_object_agg(c.key, CASE WHEN pipeline.content_function IS NOT NULL THEN c.value END)
        FROM jsonb_each_text(pipeline.table_shape -> 'columns') AS c
        WHERE c.value = ANY (n.names)
           -- A content function may read any column, and its name.
           OR pipeline.content_function IS NOT NULL
              AND (c.value <> pipeline.embedding_column OR pipeline.embeddings_table IS NOT NULL)
    ), '{}'))
    -- Without OFFSET, PostgreSQL calls it for each column.
    FROM (SELECT autoembed._needed_columns(pipeline)::text[] AS names OFFSET 0) AS n;
$sql$;
COMMENT ON FUNCTION autoembed._text_facts IS
    'The facts of table_shape that say which columns and functions the texts are made of. Another column may have the '
    'name of one that was dropped.';

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
    -- To embed all rows again, where some were asked for, would cost more than they are.
    SET condition = CASE WHEN b.force THEN b.condition END, position = NULL, rows_queued = 0,
        scanned_at = NULL, index_problem = NULL, started_at = clock_timestamp();
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
        IF autoembed._content_function_of(NEW) IS NOT NULL THEN
            NEW := autoembed._with_content_function(NEW, autoembed._content_function_of(NEW));
        END IF;
        NEW := autoembed._with_chunk_function(NEW, autoembed._chunk_function_of(NEW));
        NEW.table_shape := autoembed._table_shape(NEW);
        -- The dump may be restored without its rights, or without its policies.
        PERFORM autoembed._close_function(f.function) FROM autoembed._open_functions(NEW.id) AS f;
        IF autoembed._is_open(NEW.embeddings_table) THEN
            EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', NEW.embeddings_table);
        END IF;
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
            HINT = (
                SELECT format('ALTER TABLE %s OWNER TO %I;', NEW.embeddings_table, pg_get_userbyid(c.relowner))
                FROM pg_class AS c WHERE c.oid = NEW.table_id
            );
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
        _strays := ARRAY(
            SELECT DISTINCT t.pipeline_id
            FROM (VALUES (NEW.table_id), (NEW.embeddings_table)) AS r(relid)
            CROSS JOIN LATERAL autoembed._stray_triggers(r.relid) AS t
            WHERE r.relid IS NOT NULL
        );
        _void := autoembed._drop_stray_triggers(NEW.table_id);
        IF NEW.embeddings_table IS NOT NULL THEN
            _void := autoembed._drop_stray_triggers(NEW.embeddings_table);
        END IF;
        -- A dump of the schema alone has brought them.
        PERFORM autoembed._drop_functions(s.pipeline_id, true), autoembed._drop_readers(s.pipeline_id, NULL, NULL)
        FROM unnest(_strays) AS s(pipeline_id)
        WHERE NOT EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = s.pipeline_id);
    END IF;
    IF NOT autoembed._build_pipeline(NEW.id) AND NEW.embeddings_table IS NOT NULL THEN
        IF EXISTS (SELECT FROM pg_class AS c WHERE c.oid = NEW.embeddings_table AND NOT c.relrowsecurity) THEN
            EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', NEW.embeddings_table);
        END IF;
        -- Somebody may have dropped the policy or the view.
        PERFORM autoembed._admit_readers(s.slots)
        FROM autoembed._slots(NEW) AS s(slots)
        WHERE s.slots ->> 'vector_type' IS NOT NULL;
    END IF;
    PERFORM autoembed._close_function(f.function) FROM autoembed._open_functions(NEW.id) AS f;
    PERFORM autoembed._share_embeddings(ARRAY[NEW.id]);
    -- PostgreSQL plans the statements of a lane, under the guards of a lane.
    IF autoembed._condition_problem(NEW.table_id, NEW.condition_objects) IS NULL AND EXISTS (
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
        PERFORM autoembed._drop_readers(pipeline.id, pipeline.embeddings_table, pipeline.table_id);
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
    PERFORM autoembed._drop_readers(OLD.id, OLD.embeddings_table, OLD.table_id);
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
              ELSE p.model IS NULL AND autoembed._model_identity(m) IS DISTINCT FROM (
                  -- The model before may be gone.
                  SELECT autoembed._model_identity(o) FROM autoembed.model AS o
                  WHERE o.name = CASE WHEN TG_OP = 'UPDATE' THEN to_jsonb(OLD) ->> 'value' ELSE 'all-MiniLM-L6-v2' END
              )
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
