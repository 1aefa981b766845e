-- 30_pipelines.sql: what a pipeline is: the keys of its rows, their text, and whether it can be embedded as things stand.

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
            ON p.proname IN (name, substring(name FROM '^"(.*)"$'), substring(name FROM '[.]([^.]*)$'), substring(name FROM '[.]"(.*)"$'))
           AND p.proargtypes[0] = c.reltype AND p.pronargs = 1 AND p.prokind = 'f' AND NOT p.proretset
        JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE c.oid = table_id
          AND name IN (p.proname::text, quote_ident(p.proname), format('%s.%s', n.nspname, p.proname), format('%I.%I', n.nspname, p.proname))
    ) AS f;
    RETURN _found[1];
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_function(oid, text) IS
    'The function of one row of the table with that name, which may name its schema; NULL if there is none.';

CREATE FUNCTION autoembed._content_function_of(pipeline autoembed.pipeline)
    RETURNS oid
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- One that was dropped and made again has another OID, but the same name.
    RETURN coalesce((SELECT p.oid FROM pg_proc AS p WHERE p.oid = pipeline.content_function_id),
                    autoembed._content_function(pipeline.table_id, pipeline.content_function));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_function_of(autoembed.pipeline) IS 'The content function of a pipeline; NULL if there is none.';

CREATE FUNCTION autoembed._key_columns(table_id oid)
    RETURNS name[]
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT k.columns
    FROM pg_index AS i
    CROSS JOIN LATERAL (
        SELECT array_agg(a.attname ORDER BY n.position) AS columns, bool_and(a.attnotnull) AS not_null
        FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS n(number, position)
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = n.number
        WHERE n.position <= i.indnkeyatts
    ) AS k
    WHERE i.indrelid = table_id AND i.indisunique AND i.indisvalid
      AND i.indpred IS NULL AND i.indexprs IS NULL AND k.not_null
    ORDER BY i.indisprimary DESC, i.indisreplident DESC, i.indimmediate DESC, i.indnkeyatts, i.indexrelid
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._key_columns(oid) IS
    'The columns that tell the rows of a table apart: its primary key, else its replica identity, else a unique index without NULLs; NULL if there is none.';

CREATE FUNCTION autoembed._template(template text)
    RETURNS TABLE (literal text, column_name text)
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY
    SELECT CASE
               WHEN t.part[1] IN ('{{', '}}', '\\') THEN left(t.part[1], 1)
               WHEN t.part[1] = '\n' THEN E'\n'
               WHEN t.part[2] IS NULL THEN t.part[1]
           END,
           replace(t.part[2], '""', '"')
    FROM regexp_matches(template, '(\{\{|\}\}|\\\\|\\n|\{([^{}]+)\}|[^{}\\]+|.)', 'g') WITH ORDINALITY AS t(part, position)
    ORDER BY t.position;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._template(text) IS
    'The parts of a template in order: literal text, or a column. {{ and }} are braces, \n is a line break, \\ a backslash.';

CREATE FUNCTION autoembed._columns_of(pipeline autoembed.pipeline)
    RETURNS name[]
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce(
        pipeline.content_columns,
        (SELECT array_agg(DISTINCT t.column_name::name) FROM autoembed._template(pipeline.content_template) AS t
         WHERE t.column_name IS NOT NULL),
        '{}'
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._columns_of(autoembed.pipeline) IS 'The columns that a pipeline names as its content.';

CREATE FUNCTION autoembed._needed_columns(pipeline autoembed.pipeline)
    RETURNS name[]
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN pipeline.key_columns || autoembed._columns_of(pipeline)
        || ARRAY(SELECT c.value::name FROM jsonb_each_text(pipeline.condition_columns) AS c);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._needed_columns(autoembed.pipeline) IS
    'The columns without which a pipeline cannot work, its embedding column aside.';

CREATE FUNCTION autoembed._missing_object(pipeline autoembed.pipeline)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT concat_ws(' ', o.value ->> 'type', o.key)
        FROM jsonb_each(pipeline.condition_objects) AS o
        WHERE NOT EXISTS (
            SELECT FROM (
                SELECT 'pg_proc'::regclass AS class, p.oid FROM pg_proc AS p WHERE p.proname = o.value ->> 'name'
                UNION ALL
                SELECT 'pg_operator'::regclass, p.oid FROM pg_operator AS p WHERE p.oprname = o.value ->> 'name'
                UNION ALL
                SELECT 'pg_type'::regclass, t.oid FROM pg_type AS t WHERE t.typname = o.value ->> 'name'
                UNION ALL
                SELECT 'pg_collation'::regclass, c.oid FROM pg_collation AS c WHERE c.collname = o.value ->> 'name'
            ) AS c
            CROSS JOIN LATERAL pg_identify_object(c.class, c.oid, 0) AS i
            -- Made anew it is as good. The types that it takes may have other names since: the condition does not tell them.
            WHERE i.identity = o.key
               OR c.oid::text = o.value ->> 'oid' AND split_part(i.identity, '(', 1) = split_part(o.key, '(', 1)
        )
        ORDER BY o.key
        LIMIT 1
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._missing_object(autoembed.pipeline) IS
    'A function, operator, type or collation of a pipeline''s condition that no longer has the name that it has there; NULL if there is none.';

CREATE FUNCTION autoembed._operator(table_id oid, column_name name, strategy integer)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Not in SQL, which would be planned anew for each claim: 1 ms.
    -- As the index has it: the name alone might mean another operator, or none, where the type is not in a schema searched.
    RETURN coalesce((
        SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname)
        FROM pg_index AS i
        CROSS JOIN LATERAL unnest(i.indkey::smallint[], i.indclass::oid[]) AS k(number, class)
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.number AND a.attname = column_name
        JOIN pg_opclass AS c ON c.oid = k.class
        JOIN pg_amop AS m ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype
                         AND m.amopstrategy = strategy
        JOIN pg_am ON pg_am.oid = m.amopmethod AND pg_am.amname = 'btree'
        JOIN pg_operator AS o ON o.oid = m.amopopr
        JOIN pg_namespace AS n ON n.oid = o.oprnamespace
        WHERE i.indrelid = table_id AND i.indisunique
        ORDER BY i.indisprimary DESC, i.indisreplident DESC, i.indexrelid
        LIMIT 1
    ), CASE strategy WHEN 3 THEN '=' ELSE '>' END);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._operator(oid, name, integer) IS
    'The operator by which a key column is compared: 3 for equal, 5 for greater, as B-tree strategies are numbered.';

CREATE FUNCTION autoembed._content_expression(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _columns text;
    _text text;
BEGIN
    -- Output functions, not casts: a cast to text may be the owner's, and triggers evaluate this with more rights than his.
    -- An empty string is as good as none.
    SELECT string_agg(format('nullif(pg_catalog.concat(%s.%I), '''')', alias, c.name), ', ' ORDER BY c.position) INTO _columns
    FROM unnest(autoembed._columns_of(pipeline)) WITH ORDINALITY AS c(name, position);
    IF pipeline.content_columns IS NOT NULL THEN
        _text := format('pg_catalog.concat_ws(%L, %s)', E'\n\n', _columns);
    ELSIF pipeline.content_template IS NOT NULL THEN
        SELECT format('CASE WHEN pg_catalog.num_nonnulls(%s) OPERATOR(pg_catalog.>) 0 THEN pg_catalog.concat(%s) END', _columns,
                      string_agg(CASE WHEN t.column_name IS NULL THEN quote_literal(t.literal) ELSE format('%s.%I', alias, t.column_name) END, ', '))
        INTO _text
        FROM autoembed._template(pipeline.content_template) AS t;
    ELSE
        SELECT format('%I.%I(%s)::pg_catalog.text', n.nspname, p.proname, alias) INTO _text
        FROM pg_proc AS p
        JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE p.oid = autoembed._content_function_of(pipeline);
        -- One that is gone is an error in whatever calls it, and nobody can make it where this looks.
        _text := coalesce(_text, format('autoembed.%I(%s)', pipeline.content_function, alias));
    END IF;
    IF pipeline.condition IS NOT NULL THEN
        _text := format('CASE WHEN (SELECT (%s) FROM (SELECT %s) AS r) THEN %s END', pipeline.condition, (
            SELECT string_agg(format('%s.%I AS %I', alias, c.value, c.key), ', ') FROM jsonb_each_text(pipeline.condition_columns) AS c
        ), _text);
    END IF;
    RETURN _text;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_expression(autoembed.pipeline, text) IS
    'The SQL expression that gives the text of the row of that alias; NULL in rows that have no embedding.';

CREATE FUNCTION autoembed._key_expression(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT format('pg_catalog.concat(''['', %s, '']'')', string_agg(
            CASE WHEN coalesce(nullif(t.typbasetype, 0), t.oid) IN ('bigint'::regtype, 'integer'::regtype, 'smallint'::regtype)
                 THEN format('%s.%I', alias, k.name)
                 ELSE format('pg_catalog.to_json(pg_catalog.concat(%s.%I))', alias, k.name)
            END, ', '','', ' ORDER BY k.position))
        FROM unnest(pipeline.key_columns) WITH ORDINALITY AS k(name, position)
        JOIN pg_attribute AS a ON a.attrelid = pipeline.table_id AND a.attname = k.name
        JOIN pg_type AS t ON t.oid = a.atttypid
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._key_expression(autoembed.pipeline, text) IS
    'The SQL expression that gives the key of the row of that alias as a JSON array.';

CREATE FUNCTION autoembed._vector_index(table_id regclass, embedding_column name)
    RETURNS SETOF pg_index
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT i.*
    FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indexrelid
    JOIN pg_am AS m ON m.oid = c.relam AND m.amname IN ('hnsw', 'ivfflat')
    JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attname = _vector_index.embedding_column
    WHERE i.indrelid = _vector_index.table_id
      -- Of the column, or of an expression with it.
      AND (a.attnum = i.indkey[0] OR i.indkey[0] = 0 AND EXISTS (
          SELECT FROM pg_depend AS d
          WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid AND d.refobjsubid = a.attnum
      ))
    ORDER BY i.indisvalid DESC
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._vector_index(regclass, name) IS
    'The index on the embeddings of a table or partition, a valid one first; no row if there is none.';

CREATE FUNCTION autoembed._index_key(pipeline autoembed.pipeline, OUT key text, OUT expression text, OUT problem text, OUT hint text)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _type name;
    _dimensions integer;
BEGIN
    SELECT t.typname, nullif(a.atttypmod, -1) INTO STRICT _type, _dimensions
    FROM pg_attribute AS a
    JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = pipeline.table_id AND a.attname = pipeline.embedding_column;
    IF _dimensions IS NULL THEN
        _dimensions := autoembed._dimensions(pipeline.model);
        problem := format('column "%s" of table %s has no dimensions, which an HNSW index needs', pipeline.embedding_column, pipeline.table_id);
        hint := format('ALTER TABLE %s ALTER COLUMN %I TYPE @extschema:vector@.%s(%s);',
                       pipeline.table_id, pipeline.embedding_column, _type, _dimensions);
    END IF;
    expression := quote_ident(pipeline.embedding_column);
    -- pgvector's limits of an HNSW index.
    IF _dimensions > 4000 THEN
        problem := format('embeddings of %s dimensions cannot have an HNSW index, which takes up to 4000', _dimensions);
        hint := 'Many models give shorter ones: autoembed.create_model(…, dimensions => 1024).';
    ELSIF _type = 'vector' AND _dimensions > 2000 THEN
        expression := format('%s::@extschema:vector@.halfvec(%s)', expression, _dimensions);
        key := format('(%s) @extschema:vector@.halfvec_cosine_ops', expression);
    ELSE
        key := format('%s @extschema:vector@.%s_cosine_ops', expression, _type);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._index_key(autoembed.pipeline) IS
    'What an HNSW index on a pipeline''s embeddings is built on, NULL: none can be; the expression by which queries use it; what is in its way, and what to do before.';

CREATE FUNCTION autoembed._check_pipeline(pipeline autoembed.pipeline, OUT problem text, OUT hint text, OUT errcode text)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table pg_class;
    _function pg_proc;
    _missing text;
    _type text;
    _type_dimensions integer;
    _generated boolean;
    _model autoembed.model;
BEGIN
    SELECT c.* INTO _table FROM pg_class AS c WHERE c.oid = pipeline.table_id;
    IF NOT FOUND THEN
        problem := format('the table with OID %s no longer exists', pipeline.table_id::oid);
        hint := 'It is ended by the next lane, or by SELECT autoembed.process().';
        errcode := 'undefined_table';
        RETURN;
    END IF;
    IF _table.relkind NOT IN ('r', 'p') THEN
        problem := format('%s is not a table', pipeline.table_id);
        hint := 'Only tables and partitioned tables hold embeddings.';
        errcode := 'wrong_object_type';
        RETURN;
    END IF;
    IF pipeline.managed AND cardinality(pipeline.key_columns) = 0 THEN
        problem := format('table %s has no key to find its rows by', pipeline.table_id);
        hint := format('Add a primary key, or a unique index on columns that are NOT NULL: ALTER TABLE %s ADD COLUMN id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY.', pipeline.table_id);
        errcode := 'object_not_in_prerequisite_state';
        RETURN;
    END IF;
    SELECT k.name INTO _missing
    FROM unnest(autoembed._needed_columns(pipeline)) WITH ORDINALITY AS k(name, position)
    WHERE NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = _table.oid AND a.attname = k.name AND a.attnum > 0 AND NOT a.attisdropped
    )
    ORDER BY k.position
    LIMIT 1;
    IF FOUND THEN
        problem := format('table %s has no column "%s"', pipeline.table_id, _missing);
        hint := CASE
            WHEN pipeline.managed THEN
                (SELECT 'Its columns are: ' || string_agg(a.attname, ', ' ORDER BY a.attnum) || '.'
                 FROM pg_attribute AS a
                 WHERE a.attrelid = _table.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attname <> pipeline.embedding_column)
            ELSE 'queue_embeddings() finds rows by a primary key column called id.'
        END;
        errcode := 'undefined_column';
        RETURN;
    END IF;

    IF _table.relforcerowsecurity AND _table.relrowsecurity
       AND NOT (SELECT r.rolsuper OR r.rolbypassrls FROM pg_roles AS r WHERE r.oid = _table.relowner)
       AND (SELECT NOT coalesce(bool_or(p.polpermissive AND p.polcmd = '*' AND pg_get_expr(p.polqual, p.polrelid) = 'true'), false)
                   OR NOT bool_and(p.polpermissive)
            FROM pg_policy AS p
            WHERE p.polrelid = _table.oid
              -- Those that bind him: for PUBLIC, or for a role that he has the rights of.
              AND EXISTS (SELECT FROM unnest(p.polroles) AS r(id) WHERE r.id = 0 OR pg_has_role(_table.relowner, r.id, 'USAGE'))) THEN
        problem := format('row level security is forced on the owner of table %s and may hide rows from him', pipeline.table_id);
        hint := format('Let him see all: CREATE POLICY embeddings ON %s TO %I USING (true), without restrictive policies; or ALTER TABLE %s NO FORCE ROW LEVEL SECURITY.',
                       pipeline.table_id, pg_get_userbyid(_table.relowner), pipeline.table_id);
        errcode := 'waits';
        RETURN;
    END IF;

    SELECT CASE WHEN e.oid IS NOT NULL THEN t.typname ELSE format_type(a.atttypid, a.atttypmod) END, a.atttypmod, a.attgenerated <> ''
    INTO _type, _type_dimensions, _generated
    FROM pg_attribute AS a
    JOIN pg_type AS t ON t.oid = a.atttypid
    LEFT JOIN pg_extension AS e ON e.extname = 'vector' AND e.extnamespace = t.typnamespace
    WHERE a.attrelid = _table.oid AND a.attname = pipeline.embedding_column AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        problem := format('table %s has no column "%s"', pipeline.table_id, pipeline.embedding_column);
        hint := format('Add it: ALTER TABLE %s ADD COLUMN %I halfvec(%s).',
                       pipeline.table_id, pipeline.embedding_column, (autoembed._model(pipeline.model)).dimensions);
        errcode := 'undefined_column';
        RETURN;
    END IF;
    IF _type NOT IN ('vector', 'halfvec') OR _generated THEN
        problem := format('column "%s" of table %s is %s', pipeline.embedding_column, pipeline.table_id,
                          CASE WHEN _generated THEN 'a generated column' ELSE 'of type ' || _type END);
        hint := 'An embedding column is of type halfvec or vector.';
        errcode := 'datatype_mismatch';
        RETURN;
    END IF;
    IF pipeline.embedding_column = ANY (autoembed._columns_of(pipeline)) THEN
        problem := format('column "%s" cannot be its own content', pipeline.embedding_column);
        hint := 'Leave it out of the content.';
        errcode := 'invalid_parameter_value';
        RETURN;
    END IF;

    IF pipeline.on_change = 'clear' AND EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = _table.oid AND a.attname = pipeline.embedding_column AND a.attnotnull AND NOT a.attisdropped
    ) THEN
        problem := format('column "%s" of table %s is NOT NULL and cannot be cleared', pipeline.embedding_column, pipeline.table_id);
        hint := 'Use on_change => ''keep'', or drop the constraint.';
        errcode := 'invalid_parameter_value';
        RETURN;
    END IF;
    -- A BEFORE trigger sees no generated column; what a function reads is not known.
    IF pipeline.on_change = 'clear' AND EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = _table.oid AND a.attgenerated <> '' AND NOT a.attisdropped
          AND (a.attname = ANY (autoembed._needed_columns(pipeline)) OR pipeline.content_function IS NOT NULL)
    ) THEN
        problem := format('on_change => ''clear'' does not work with the generated columns of table %s', pipeline.table_id);
        hint := 'Use on_change => ''keep'', or columns that are not generated.';
        errcode := 'feature_not_supported';
        RETURN;
    END IF;

    IF pipeline.content_function IS NOT NULL THEN
        SELECT p.* INTO _function FROM pg_proc AS p WHERE p.oid = autoembed._content_function_of(pipeline);
        IF NOT FOUND THEN
            problem := format('there is no function "%s" of one row of %s', pipeline.content_function, pipeline.table_id);
            hint := format('Create it: CREATE FUNCTION %s(%s) RETURNS text.', pipeline.content_function, pipeline.table_id);
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
                              pg_get_userbyid(_table.relowner), pipeline.table_id);
            hint := format('Make it the table owner''s: ALTER FUNCTION %s OWNER TO %I.',
                           _function.oid::regprocedure, pg_get_userbyid(_table.relowner));
            errcode := 'insufficient_privilege';
            RETURN;
        END IF;
    END IF;

    _missing := autoembed._missing_object(pipeline);
    IF _missing IS NOT NULL THEN
        problem := format('the condition on table %s uses %s, which is gone or has another name', pipeline.table_id, _missing);
        hint := format('Bring it back, or give the condition anew: SELECT autoembed.alter_pipeline(%L, condition => …).', pipeline.table_id);
        errcode := 'waits';
        RETURN;
    END IF;

    _model := autoembed._model(pipeline.model);
    IF _type_dimensions NOT IN (-1, _model.dimensions) THEN
        problem := format('column "%s" of table %s has %s dimensions, model "%s" has %s',
                          pipeline.embedding_column, pipeline.table_id, _type_dimensions, _model.name, _model.dimensions);
        hint := format('Change the column: ALTER TABLE %s ALTER COLUMN %I TYPE %s(%s) USING NULL; or the model: SELECT %s.',
                       pipeline.table_id, pipeline.embedding_column, _type, _model.dimensions,
                       CASE WHEN pipeline.managed THEN format('autoembed.alter_pipeline(%L, model => …)', pipeline.table_id)
                            ELSE 'autoembed.set_default_model(…)' END);
        -- Not an error of the pipeline: another model cures it at any time.
        errcode := 'waits';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_pipeline(autoembed.pipeline) IS
    'Why the column cannot be embedded as things stand, and what to do; NULLs if it can. errcode waits: the jobs wait for a change.';

CREATE VIEW autoembed._pipeline_state AS
SELECT p.id,
       p.table_id,
       p.embedding_column,
       p.content_function,
       p.truncate,
       p.paused,
       coalesce(p.model, autoembed._default_model()) AS model,
       coalesce(c.problem, CASE WHEN p.paused THEN 'it is paused' WHEN r.until > clock_timestamp() THEN format('model "%s" rests: %s', r.model, r.reason) END)
           AS blocked,
       coalesce(c.hint, CASE WHEN p.paused THEN format('SELECT autoembed.resume(%L).', p.table_id)
                             WHEN r.needs_attention THEN format('SELECT autoembed.resume_model(%L) tries it at once.', r.model) END)
           AS hint,
       c.problem IS NULL AS sound,
       coalesce(r.failures, 0) AS failures
FROM autoembed.pipeline AS p
CROSS JOIN LATERAL autoembed._check_pipeline(p) AS c
LEFT JOIN autoembed.model_rest AS r ON r.model = coalesce(p.model, autoembed._default_model());
COMMENT ON VIEW autoembed._pipeline_state IS 'Every pipeline, and why its jobs wait, if they do.';

CREATE FUNCTION autoembed._warn_of_blocked_pipelines(only_with_jobs boolean DEFAULT false, resting text[] DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _state record;
BEGIN
    IF resting IS NOT NULL THEN
        -- For the server's log: a lane's client is pg_cron, which would write it there again.
        PERFORM set_config('client_min_messages', 'error', true);
    END IF;
    FOR _state IN
        SELECT s.*
        FROM autoembed.pipeline AS p
        JOIN autoembed._pipeline_state AS s ON s.id = p.id AND s.blocked IS NOT NULL AND NOT s.paused
        WHERE (resting IS NULL OR CASE WHEN s.sound THEN s.model = ANY (resting) ELSE resting = '{}' END)
          AND (NOT only_with_jobs
               OR EXISTS (SELECT FROM pgmq.q_embedding_jobs AS q WHERE coalesce(q.message ->> 'pipeline', '') = p.id::text))
        ORDER BY p.id
    LOOP
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('%s.%I is not being embedded: %s', _state.table_id, _state.embedding_column, _state.blocked),
            HINT = coalesce(_state.hint, 'Its jobs are kept, and go on by themselves.');
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._warn_of_blocked_pipelines(boolean, text[]) IS
    'Says which pipelines wait, why, and what to do. With resting, for lanes, in the server''s log: those that wait for one of these models, or, with none, for no model.';
