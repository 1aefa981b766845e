-- The functions of a pipeline are made from the templates in sql/templates/.

CREATE OR REPLACE FUNCTION autoembed._function_template(name text)
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $templates$
    SELECT CASE _function_template.name
@TEMPLATES@
    END;
$templates$;
COMMENT ON FUNCTION autoembed._function_template IS
    'The text of a file of sql/templates/, by its name. build.py puts the texts in.';

CREATE OR REPLACE FUNCTION autoembed._filled(template text, slots jsonb)
    RETURNS text
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _filled text;
    _unknown text;
BEGIN
    -- Only the template is split. A value that contains {{ is not taken for a template.
    SELECT string_agg(CASE WHEN p.number % 2 = 1 THEN p.part ELSE slots ->> p.part END, '' ORDER BY p.number),
           min(p.part) FILTER (WHERE p.number % 2 = 0 AND slots ->> p.part IS NULL)
    INTO _filled, _unknown
    FROM string_to_table(replace(template, '}}', '{{'), '{{') WITH ORDINALITY AS p(part, number);
    IF _unknown IS NOT NULL THEN
        RAISE EXCEPTION 'no value for the slot % of a template', _unknown;
    END IF;
    RETURN _filled;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._filled IS
    'The template with each {{name}} replaced by the value of that name. Fails if there is no value.';

CREATE OR REPLACE FUNCTION autoembed._create_function(template_name text, slots jsonb, owner name DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _template text[] := string_to_array(autoembed._function_template(template_name), '$body$');
    _name text := autoembed._filled(substring(_template[1] FROM 'FUNCTION autoembed[.]([^(]+)'), slots);
    _function regprocedure;
    _role text;
BEGIN
    -- The body is quoted as a whole. A dollar quote within a name would end a dollar-quoted body.
    EXECUTE concat(autoembed._filled(_template[1], slots), quote_literal(autoembed._filled(_template[2], slots)));
    SELECT p.oid INTO STRICT _function
    FROM pg_proc AS p
    WHERE p.pronamespace = 'autoembed'::regnamespace
      AND p.proname = _name;
    IF owner IS NOT NULL THEN
        EXECUTE format('ALTER FUNCTION %s OWNER TO %I', _function, owner);
    END IF;
    IF template_name IN (
        'may_read', 'may_read_all', 'readable', 'chunk', 'long_version', 'long_text', 'long_chunk', 'nearest_rows'
    ) THEN
        -- It runs with the rights of the reader, who may be any role.
        IF NOT has_function_privilege('public', _function, 'EXECUTE') THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', _function);
        END IF;
        RETURN;
    END IF;
    PERFORM autoembed._close_function(_function);
    IF template_name IN ('content', 'content_beside', 'scan', 'split', 'write', 'write_beside') THEN
        FOR _role IN SELECT r.role::text FROM autoembed._lane_roles() AS r(role) LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', _function, _role);
        END LOOP;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._create_function IS
    'Makes a function from a template. Only its owner and the lanes may call it, but for those of readers. owner: '
    'the role that it runs as. NULL: the current role.';

CREATE OR REPLACE FUNCTION autoembed._lane_roles()
    RETURNS SETOF regrole
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT a.grantee::regrole
    FROM pg_proc AS p
    CROSS JOIN LATERAL aclexplode(p.proacl) AS a
    WHERE p.oid = 'autoembed.work'::regproc AND a.grantee NOT IN (0, p.proowner);
$sql$;
COMMENT ON FUNCTION autoembed._lane_roles IS 'The roles that grant_lane() lets run lanes.';

CREATE OR REPLACE FUNCTION autoembed._open_to(function oid)
    RETURNS text
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT string_agg(DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, ', ')
    FROM pg_proc AS p
    CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
    WHERE p.oid = function AND p.prosecdef AND a.grantee <> p.proowner
      AND a.grantee::regrole NOT IN (SELECT r.role FROM autoembed._lane_roles() AS r(role));
$sql$;
COMMENT ON FUNCTION autoembed._open_to IS
    'The roles that may call a function which runs with the rights of its owner, besides the owner and the lanes. NULL '
    'if there are none.';

CREATE OR REPLACE FUNCTION autoembed._close_function(function oid)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _roles CONSTANT text := autoembed._open_to(function);
BEGIN
    IF _roles IS NOT NULL THEN
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM %s', function::regprocedure, _roles);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._close_function IS
    'Takes the right to call a function that runs with the rights of its owner from all roles but the owner and the '
    'lanes. A dump restored without its rights, and default privileges, give it to others.';

CREATE OR REPLACE FUNCTION autoembed._open_functions(pipeline_id integer DEFAULT NULL)
    RETURNS TABLE (function regprocedure, roles text)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT f.oid, autoembed._open_to(f.oid)
    FROM (
        SELECT p.oid FROM pg_proc AS p
        WHERE _open_functions.pipeline_id IS NULL AND p.pronamespace = 'autoembed'::regnamespace
        UNION ALL
        SELECT p.oid FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname = ANY (ARRAY(
            SELECT format('_%s_%s', t.name, _open_functions.pipeline_id)::name
            FROM unnest('{capture,clear,content,erase,scan,split,text,watch,write}'::text[]) AS t(name)
            WHERE _open_functions.pipeline_id IS NOT NULL
        ))
    ) AS f
    WHERE autoembed._open_to(f.oid) IS NOT NULL
      AND NOT EXISTS (
          SELECT FROM pg_depend AS d
          WHERE d.classid = 'pg_proc'::regclass AND d.objid = f.oid AND d.deptype = 'e'
      )
    ORDER BY f.oid::regprocedure::text;
$sql$;
COMMENT ON FUNCTION autoembed._open_functions IS
    'The functions of a pipeline that roles may call which must not. pipeline_id: NULL: those of all pipelines and '
    'models.';

CREATE OR REPLACE FUNCTION autoembed._is_open(embeddings_table regclass)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT EXISTS (
        SELECT FROM pg_class AS c
        CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        WHERE c.oid = embeddings_table AND c.relkind = 'r' AND NOT c.relrowsecurity AND a.grantee <> c.relowner
    );
$sql$;
COMMENT ON FUNCTION autoembed._is_open IS
    'Whether an embeddings table has no row level security, and other roles than its owner have rights to it.';

CREATE OR REPLACE FUNCTION autoembed._open_tables()
    RETURNS TABLE (pipeline_id integer, embeddings_table regclass)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT p.id, p.embeddings_table
    FROM autoembed.pipeline AS p
    JOIN pg_class AS c ON c.oid = p.embeddings_table AND c.relkind = 'r' AND NOT c.relrowsecurity
    -- One owner has not to wait for the table of another.
    WHERE pg_has_role(coalesce(nullif(current_setting('role'), 'none'), session_user), c.relowner, 'USAGE');
$sql$;
COMMENT ON FUNCTION autoembed._open_tables IS
    'The embeddings tables without row level security whose owner''s rights the session has. A role that may read one '
    'sees all embeddings.';

CREATE OR REPLACE FUNCTION autoembed._mend_restored()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '5s'
AS $plpgsql$
DECLARE
    _open record;
BEGIN
    PERFORM autoembed._close_function(f.function) FROM autoembed._open_functions() AS f;
    FOR _open IN SELECT t.* FROM autoembed._open_tables() AS t LOOP
        BEGIN
            EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', _open.embeddings_table);
            PERFORM autoembed._admit_readers(s.slots)
            FROM autoembed.pipeline AS p
            CROSS JOIN LATERAL autoembed._slots(p) AS s(slots)
            WHERE p.id = _open.pipeline_id AND s.slots ->> 'vector_type' IS NOT NULL;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM set_config('lock_timeout', '10ms', true);
            RAISE WARNING USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('table %s has no row level security, and is in use by another transaction',
                                 _open.embeddings_table),
                HINT = format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY; until then other roles see all embeddings.',
                              _open.embeddings_table);
        END;
    END LOOP;
    PERFORM autoembed._share_embeddings(ARRAY(SELECT p.id FROM autoembed.pipeline AS p));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._mend_restored IS
    'Takes away what a restore without rights or policies has given to all roles: functions that run as their owners, '
    'and embeddings tables without row level security. Gives readers the rights that such a restore has left out.';

CREATE OR REPLACE FUNCTION autoembed._check_restored()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF TG_TAG = 'CREATE FUNCTION' THEN
        PERFORM autoembed._close_function(d.objid)
        FROM pg_event_trigger_ddl_commands() AS d
        WHERE d.classid = 'pg_proc'::regclass AND d.schema_name = 'autoembed' AND NOT d.in_extension;
    ELSIF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() AS d WHERE d.object_type = 'TABLE')
          AND EXISTS (SELECT FROM autoembed._open_tables()) THEN
        -- A dump grants last. Its policies would be there by now.
        PERFORM autoembed._mend_restored();
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_restored IS
    'Keeps functions and embeddings of owners from other roles where a restore leaves out rights or policies.';

CREATE OR REPLACE FUNCTION autoembed._changed_expression(table_id oid, columns name[])
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- A long value that the UPDATE leaves alone keeps its place in the TOAST table, and is not fetched.
    SELECT coalesce(string_agg(concat(
        CASE WHEN a.attlen = -1 AND a.attstorage <> 'p' THEN
            format('(pg_catalog.pg_column_toast_chunk_id(OLD.%1$I) OPERATOR(pg_catalog.=) '
                   'pg_catalog.pg_column_toast_chunk_id(NEW.%1$I)) IS NOT TRUE AND ', a.attname)
        END,
        format('pg_catalog.record_image_ne(ROW(OLD.%1$I), ROW(NEW.%1$I))', a.attname)
    ), ' OR ' ORDER BY k.position, a.attnum), 'false')
    FROM unnest(columns) WITH ORDINALITY AS k(name, position)
    JOIN pg_attribute AS n ON n.attrelid = table_id AND n.attname = k.name
    CROSS JOIN LATERAL (
        SELECT n.attnum WHERE n.attgenerated <> 'v'
        UNION ALL
        -- A trigger sees no virtual column. The columns that it is computed from stand for it.
        SELECT d.refobjsubid
        FROM pg_attrdef AS e
        JOIN pg_depend AS d
            ON d.classid = 'pg_attrdef'::regclass AND d.objid = e.oid
           AND d.refclassid = 'pg_class'::regclass AND d.refobjid = table_id AND d.refobjsubid NOT IN (0, n.attnum)
        WHERE n.attgenerated = 'v' AND e.adrelid = table_id AND e.adnum = n.attnum
    ) AS s(number)
    JOIN pg_attribute AS a ON a.attrelid = table_id AND a.attnum = s.number;
$sql$;
COMMENT ON FUNCTION autoembed._changed_expression IS
    'The SQL expression that says, in a row trigger, whether an UPDATE has changed one of these columns, byte by byte.';

CREATE OR REPLACE FUNCTION autoembed._compute_virtual(pipeline autoembed.pipeline)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- The fields of a polymorphic parameter are not known when the function is made.
    SELECT coalesce('DECLARE _r record := r; BEGIN ' || string_agg(
        format('_r.%I := (SELECT %s FROM (SELECT r.*) AS c);', a.attname, pg_get_expr(e.adbin, e.adrelid)),
        ' ' ORDER BY a.attnum
    ) || ' r := _r; END;', '')
    FROM pg_attribute AS a
    JOIN pg_attrdef AS e ON e.adrelid = a.attrelid AND e.adnum = a.attnum
    WHERE a.attrelid = pipeline.table_id AND a.attgenerated = 'v'
      -- A content function may read any column.
      AND (
          pipeline.content_function IS NOT NULL
          -- The subquery computes them once, not for each column of the table.
          OR a.attname = ANY ((SELECT autoembed._needed_columns(pipeline))::name[])
      );
$sql$;
COMMENT ON FUNCTION autoembed._compute_virtual IS
    'The block that puts the virtual columns that a pipeline needs into the row r of a trigger, which has NULL there.';

CREATE OR REPLACE FUNCTION autoembed._is_renamed(table_id regclass)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- A restore gives all tables other OIDs, and the schema autoembed another one, too. Lanes make the functions again.
    SELECT format(
        '(pg_catalog.to_regclass(%L)::pg_catalog.oid OPERATOR(pg_catalog.=) %s::pg_catalog.oid) IS NOT TRUE AND '
        'pg_catalog.to_regnamespace(''autoembed'')::pg_catalog.oid OPERATOR(pg_catalog.=) %s::pg_catalog.oid',
        table_id, table_id::oid, 'autoembed'::regnamespace::oid
    );
$sql$;
COMMENT ON FUNCTION autoembed._is_renamed IS
    'The SQL expression that says whether the present name of a table means no table any more, or another one. False '
    'in a function that a dump has brought.';

CREATE OR REPLACE FUNCTION autoembed._table_guard(table_id regclass)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT format($$IF %s THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_table', MESSAGE = %L;
    END IF;$$, autoembed._is_renamed(table_id), format('the name %s means another table than before', table_id));
$sql$;
COMMENT ON FUNCTION autoembed._table_guard IS
    'A statement that fails once the name of a table means another one. It stands behind a lock on the table, which '
    'keeps its name.';

CREATE OR REPLACE FUNCTION autoembed._key_slots(pipeline autoembed.pipeline)
    RETURNS jsonb
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT jsonb_build_object(
        'keys', string_agg(format('t.%I', k.name), ', ' ORDER BY k.number),
        'sent_keys', string_agg(
            format('(s.key::pg_catalog.json ->> %s)::%s AS k%s', k.number - 1, k.type, k.number),
            ', ' ORDER BY k.number
        ),
        'same_key', string_agg(format('t.%I %s s.k%s', k.name, k.equal, k.number), ' AND ' ORDER BY k.number),
        'same_embeddings', string_agg(format('e.%I %s s.k%s', k.name, k.equal, k.number), ' AND ' ORDER BY k.number),
        'same_row', string_agg(format('e.%1$I %2$s t.%1$I', k.name, k.equal), ' AND ' ORDER BY k.number),
        'key_names', string_agg(quote_ident(k.name), ', ' ORDER BY k.number),
        'embeddings_key', string_agg(format('e.%I', k.name), ', ' ORDER BY k.number),
        'key_types', string_agg(k.bare_type, ', ' ORDER BY k.number),
        'readable_columns', string_agg(format('%I %s', 'k' || k.number, k.bare_type), ', ' ORDER BY k.number),
        'readable_key', string_agg('r.k' || k.number, ', ' ORDER BY k.number),
        'listed_keys', string_agg(format('t.%I AS k%s', k.name, k.number), ', ' ORDER BY k.number),
        -- Policies of the table keep an operator that is not LEAKPROOF from its indexes: a look at one row reads all.
        -- A comparison of rows has one operator. A composite type that a function returns is no column of its own.
        'lists_readable', NOT bool_and(k.is_leakproof) AND count(DISTINCT k.equal) = 1 AND NOT bool_or(k.is_composite),
        'is_readable', format('(%s) %s ANY (SELECT %s FROM autoembed._readable_%s() AS r)',
                              string_agg(quote_ident(k.name), ', ' ORDER BY k.number), min(k.equal),
                              string_agg('r.k' || k.number, ', ' ORDER BY k.number), pipeline.id),
        'is_key', string_agg(format('t.%I %s $%s', k.name, k.equal, k.number), ' AND ' ORDER BY k.number),
        'sent_key_names', string_agg('s.k' || k.number, ', ' ORDER BY k.number),
        -- A row comparison uses the index. It cannot name operators of other schemas: with these, the columns are
        -- compared one by one.
        'later_key', CASE
            WHEN bool_and(k.greater = 'OPERATOR(pg_catalog.>)') THEN
                format('ROW(%s) OPERATOR(pg_catalog.>) ROW(%s)',
                       string_agg(format('t.%I', k.name), ', ' ORDER BY k.number),
                       string_agg(k.last, ', ' ORDER BY k.number))
            ELSE
                string_agg(
                    format('%st.%I %s %s', k.equal_before, k.name, k.greater, k.last),
                    ' OR ' ORDER BY k.number
                )
        END,
        -- Stored values are compared byte by byte, which calls no code of a type.
        'key_changed', format('pg_catalog.record_image_ne(ROW(%s), ROW(%s))',
                              string_agg(format('OLD.%I', k.name), ', ' ORDER BY k.number),
                              string_agg(format('NEW.%I', k.name), ', ' ORDER BY k.number)),
        -- The text of such a key depends on settings of the session.
        'key_settings', CASE WHEN bool_and(k.is_plain) THEN '' ELSE autoembed._output_settings() END
    )
    FROM (
        SELECT p.*,
               string_agg(format('t.%I %s %s AND ', p.name, p.equal, p.last), '')
                   OVER (ORDER BY p.number ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS equal_before
        FROM (
            SELECT n.name, n.number,
                   format_type(a.atttypid, a.atttypmod) AS type,
                   -- A function's parameters and results have no length or scale.
                   format_type(a.atttypid, NULL) AS bare_type,
                   -- The condition of a scan names columns without their table. Beside them stands nothing else.
                   format('($1::pg_catalog.jsonb ->> %s)::%s', n.number - 1, format_type(a.atttypid, a.atttypmod))
                       AS last,
                   autoembed._operator(pipeline.table_id, n.name, 3) AS equal,
                   autoembed._operator(pipeline.table_id, n.name, 5) AS greater,
                   EXISTS (
                       SELECT FROM pg_operator AS o
                       JOIN pg_proc AS f ON f.oid = o.oprcode AND f.proleakproof
                       WHERE o.oid = autoembed._key_operator(pipeline.table_id, n.name, 3)
                   ) AS is_leakproof,
                   -- A domain over a domain may be one, too.
                   b.typtype IN ('c', 'd') AS is_composite,
                   autoembed._is_plain(y.oid) AS is_plain
            FROM unnest(pipeline.key_columns) WITH ORDINALITY AS n(name, number)
            JOIN pg_attribute AS a ON a.attrelid = pipeline.table_id AND a.attname = n.name
            JOIN pg_type AS y ON y.oid = a.atttypid
            JOIN pg_type AS b ON b.oid = coalesce(nullif(y.typbasetype, 0), y.oid)
        ) AS p
    ) AS k
$sql$;
COMMENT ON FUNCTION autoembed._key_slots IS
    'The slots of the templates that follow from the key of the table. Called by _slots(), with its settings.';

CREATE OR REPLACE FUNCTION autoembed._slots(pipeline autoembed.pipeline)
    RETURNS jsonb
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
    -- SQL needs no quotes around some words that PL/pgSQL reserves: begin, by, if, loop.
    SET quote_all_identifiers = on
    SET standard_conforming_strings = on
AS $plpgsql$
DECLARE
    _table jsonb;
    _text_changed text;
    -- Nothing but a lane is expected to write an embeddings table.
    _vector_changed text := CASE WHEN pipeline.embeddings_table IS NULL THEN autoembed._changed_expression(
        pipeline.table_id, ARRAY[pipeline.embedding_column]
    ) ELSE 'false' END;
    _runs_owners_code boolean := num_nonnulls(pipeline.content_function, pipeline.condition) > 0;
    -- A function that a query calls for each column of a wide table would take seconds.
    _columns CONSTANT name[] := autoembed._columns_of(pipeline);
    _prefix_columns CONSTANT name[] := autoembed._columns_of(autoembed._prefix_of(pipeline));
    _needed_columns CONSTANT name[] := autoembed._needed_columns(pipeline);
    -- The text of a version of a row stays the same: it is not the owner's code that gives it, and no type that anybody
    -- can change.
    _is_stable CONSTANT boolean := NOT _runs_owners_code AND NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = pipeline.table_id AND a.attname = ANY (_needed_columns)
          AND (
              a.attgenerated = 'v'
              OR a.atttypid NOT IN (
                  'bigint'::regtype, 'integer'::regtype, 'smallint'::regtype, 'numeric'::regtype, 'boolean'::regtype,
                  'text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'name'::regtype, 'uuid'::regtype,
                  'json'::regtype, 'jsonb'::regtype
              )
          )
    );
    -- With the way in which the text is made: another one gives another text of the same version.
    _version CONSTANT text := format('pg_catalog.concat(%L, t.tableoid, t.ctid, t.xmin)', md5(concat(
        autoembed._content_expression(pipeline, 't'), autoembed._prefix_expression(pipeline, 't')
    )) || ' ');
    _old record;
BEGIN
    SELECT jsonb_build_object(
        'table_id', c.oid,
        -- Rows of tables that inherit from it have keys of their own.
        'table', CASE c.relkind WHEN 'r' THEN 'ONLY ' ELSE '' END || c.oid::regclass::text,
        'table_literal', quote_literal(c.oid::regclass),
        'is_renamed', autoembed._is_renamed(c.oid),
        'table_guard', autoembed._table_guard(c.oid),
        'embeddings_guard', autoembed._table_guard(pipeline.embeddings_table),
        'owner', pg_get_userbyid(c.relowner),
        'search_path', format('%I, public, pg_temp', n.nspname),
        'embedding_column', quote_ident(pipeline.embedding_column),
        'embeddings_table', pipeline.embeddings_table,
        'vector_type', (
            SELECT v.full_name
            FROM pg_attribute AS e
            JOIN autoembed._vector_types() AS v ON v.id = e.atttypid
            WHERE e.attrelid = coalesce(pipeline.embeddings_table, c.oid)
              AND e.attname = pipeline.embedding_column
              AND NOT e.attisdropped
        )
    )
    INTO STRICT _table
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = pipeline.table_id;

    -- The columns of the text before a write, to see whether a trigger of the table has changed them. A long value has
    -- its place in the TOAST table, and is not fetched.
    SELECT coalesce(string_agg(format(
               '%1$s AS place_%3$s, CASE WHEN %1$s IS NULL THEN %2$s END AS old_%3$s', v.place, v.value, a.attnum
           ), ', ' ORDER BY a.attnum), 'NULL') AS columns,
           coalesce(string_agg(format(
               '((%1$s OPERATOR(pg_catalog.=) s.place_%3$s) IS TRUE OR s.place_%3$s IS NULL AND '
               'NOT pg_catalog.record_image_ne(ROW(%2$s), ROW(s.old_%3$s)))', v.place, v.value, a.attnum
           ), ' AND ' ORDER BY a.attnum), 'false') AS are_kept
    INTO _old
    FROM pg_attribute AS a
    CROSS JOIN LATERAL (
        SELECT format('t.%I', a.attname) AS value,
               format('pg_catalog.pg_column_toast_chunk_id(t.%I)', a.attname) AS place
    ) AS v
    WHERE _is_stable AND a.attrelid = pipeline.table_id AND a.attname = ANY (_columns);

    IF _runs_owners_code THEN
        _text_changed := format(
            'autoembed._text_%1$s(OLD) COLLATE "C" IS DISTINCT FROM autoembed._text_%1$s(NEW) OR %2$s',
            pipeline.id, autoembed._changed_expression(pipeline.table_id, _prefix_columns)
        );
    ELSE
        _text_changed := autoembed._changed_expression(
            pipeline.table_id, _columns || _prefix_columns
        );
    END IF;

    RETURN _table || autoembed._key_slots(pipeline) || jsonb_build_object(
        'id', pipeline.id,
        'output_settings', autoembed._output_settings(),
        -- The context of an error is read in PostgreSQL's own language.
        'context_settings', CASE WHEN _runs_owners_code THEN 'SET lc_messages = ''C''' ELSE '' END,
        -- An index gives the few chunks of a row in their order. An owner's code may need bitmaps.
        'plan_settings', CASE
            WHEN _runs_owners_code THEN 'SET enable_seqscan = off'
            ELSE 'SET enable_seqscan = off SET enable_bitmapscan = off'
        END,
        'keys_per_message', autoembed._keys_per_message(),
        'bytes_per_message', autoembed._bytes_per_message(),
        'model', (SELECT quote_literal(autoembed._model_identity(m)) FROM autoembed._model(pipeline.model) AS m),
        'content', autoembed._content_expression(pipeline, 't'),
        'content_digest', format('pg_catalog.sha256(pg_catalog.convert_to(%s, ''UTF8''))',
                                 autoembed._content_expression(pipeline, 't')),
        'version', _version,
        -- Rows of a foreign server have no transaction.
        'read_version', CASE
            WHEN _is_stable THEN format('CASE WHEN t.xmin OPERATOR(pg_catalog.<>) 0 THEN %s END', _version)
            ELSE 'NULL::pg_catalog.text'
        END,
        'old_columns', _old.columns,
        'are_kept', _old.are_kept,
        'content_guard', autoembed._content_guard(pipeline),
        'content_bytes', autoembed._content_bytes_expression(pipeline, 't'),
        'chunk_call', autoembed._chunk_call(pipeline),
        'chunk_guard', CASE WHEN pipeline.chunk_function IS NOT NULL THEN autoembed._function_guard(
            autoembed._chunk_function_of(pipeline),
            format('the function %s, which cuts texts, was dropped or replaced', pipeline.chunk_function)
        ) END,
        'prefix', autoembed._prefix_expression(pipeline, 't'),
        'content_of_r', autoembed._content_expression(pipeline, 'r'),
        'compute_virtual', autoembed._compute_virtual(pipeline),
        'key', autoembed._key_expression(pipeline, 't'),
        'old_key', autoembed._key_expression(pipeline, 'OLD'),
        'new_key', autoembed._key_expression(pipeline, 'NEW'),
        -- The key as the row has it, where that is not how the message has it.
        'own_key', CASE
            WHEN autoembed._is_spelled_one_way(pipeline) THEN 'NULL::pg_catalog.text'
            ELSE format('nullif(%s, s.key)', autoembed._key_expression(pipeline, 't'))
        END,
        'has_old_key', autoembed._has_key_expression(pipeline, 'OLD'),
        'has_new_key', autoembed._has_key_expression(pipeline, 'NEW'),
        'moved_keys', (SELECT format('ARRAY[%s]', string_agg(format(
                           'CASE WHEN %s THEN %s END', autoembed._has_key_expression(pipeline, r.row),
                           autoembed._key_expression(pipeline, r.row)
                       ), ', ' ORDER BY r.row)) FROM (VALUES ('NEW'), ('OLD')) AS r(row)),
        'old_rows', format('SELECT %s AS key FROM old_rows AS o WHERE %s',
                           autoembed._key_expression(pipeline, 'o'), autoembed._has_key_expression(pipeline, 'o')),
        'new_rows', format('SELECT %s AS key FROM new_rows AS n WHERE %s',
                           autoembed._key_expression(pipeline, 'n'), autoembed._has_key_expression(pipeline, 'n')),
        -- These are of the embeddings table. A row has several embeddings there.
        'lost_rows', format('SELECT DISTINCT %s AS key FROM old_rows AS o', autoembed._key_expression(pipeline, 'o')),
        -- Texts of keys and numbers are compared without code of their types.
        'replaced_rows', format(
            'SELECT DISTINCT r.key FROM (SELECT unnest(ARRAY[o.key, n.key]) AS key '
            'FROM (SELECT %s AS key, o.chunk_number, o.digest, o.%I AS embedding FROM old_rows AS o) AS o '
            'FULL JOIN (SELECT %s AS key, n.chunk_number, n.digest, n.%I AS embedding FROM new_rows AS n) AS n '
            'ON n.key = o.key AND n.chunk_number = o.chunk_number '
            'WHERE record_image_ne(ROW(o.key, o.digest, o.embedding), ROW(n.key, n.digest, n.embedding))) AS r '
            'WHERE r.key IS NOT NULL',
            autoembed._key_expression(pipeline, 'o'), pipeline.embedding_column,
            autoembed._key_expression(pipeline, 'n'), pipeline.embedding_column
        ),
        'with_text', CASE
            WHEN pipeline.condition IS NULL THEN ''
            ELSE (
                -- PostgreSQL fails where a virtual column of a transition table is read.
                SELECT format(' AND autoembed._text_%s(ROW(%s)::%s) IS NOT NULL', pipeline.id, string_agg(
                    CASE a.attgenerated WHEN 'v' THEN 'NULL' ELSE format('n.%I', a.attname) END, ', ' ORDER BY a.attnum
                ), pipeline.table_id)
                FROM pg_attribute AS a
                WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped
            )
        END,
        'text_changed', _text_changed,
        'vector_changed', _vector_changed,
        -- A write of a lane, and not one of a trigger that it fires. No lane writes a table with embeddings beside it.
        'is_lanes_write', CASE WHEN pipeline.embeddings_table IS NULL THEN format(
            $sql$(pg_catalog.pg_trigger_depth() OPERATOR(pg_catalog.=) 1 AND pg_catalog.current_setting(
            'autoembed.writing', true) OPERATOR(pg_catalog.=) '%1$s' AND autoembed._may_write_vectors(%1$s, true)
            ) IS TRUE$sql$,
            pipeline.table_id::oid
        ) ELSE 'false' END,
        'is_echo', format(
            $sql$pg_catalog.pg_trigger_depth() OPERATOR(pg_catalog.>) 1
                 AND pg_catalog.current_setting('autoembed.writing', true) OPERATOR(pg_catalog.<>) ''
                 AND autoembed._may_write_vectors(%s) AND (%s)$sql$,
            -- The owner's code does not run there.
            pipeline.table_id::oid, CASE WHEN _runs_owners_code THEN 'true' ELSE _text_changed END
        ),
        'vector_digest', autoembed._vector_digest_expression(pipeline, 't'),
        'runs_owners_code', _runs_owners_code,
        'read_columns', CASE
            -- A content function may read any column.
            WHEN pipeline.content_function IS NOT NULL THEN 't.*'
            ELSE (SELECT string_agg(DISTINCT format('t.%I', c.name), ', ')
                  FROM unnest(_needed_columns) AS c(name))
        END,
        'passage_settings', CASE
            WHEN autoembed._has_plain_text(pipeline) THEN '' ELSE autoembed._output_settings()
        END,
        'passage', autoembed._passage_expression(
            pipeline, 't', '_chunk_' || pipeline.id || '.chunk_start', '_chunk_' || pipeline.id || '.chunk_end',
            '_chunk_' || pipeline.id || '.digest'
        ),
        'long_passage', autoembed._passage_expression(
            pipeline, 't', NULL, NULL, '_long_chunk_' || pipeline.id || '.digest',
            '_long_chunk_' || pipeline.id || '.part'
        ),
        'readable_text', autoembed._readable_text(pipeline, 't'),
        'long_bytes', 1048576,
        'managed', pipeline.managed,
        'on_change', pipeline.on_change,
        -- A plan that a session keeps knows the old names of enum values, and hides that the condition has them.
        'labels', CASE WHEN _runs_owners_code THEN pipeline.table_shape -> 'labels' END,
        -- PL/pgSQL refuses a row whose columns have other types than at its first call in a session.
        'column_types', (
            SELECT jsonb_object_agg(a.attname, format_type(a.atttypid, a.atttypmod))
            FROM pg_attribute AS a
            WHERE a.attrelid = pipeline.table_id AND NOT a.attisdropped
              AND a.attname = ANY (_needed_columns || pipeline.embedding_column)
        )
    ) || coalesce(autoembed._nearest_rows_slots(pipeline), '{}');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._slots IS
    'The facts on which the functions of a pipeline depend, as names and pieces of SQL for the templates.';

CREATE OR REPLACE FUNCTION autoembed._keep_name(table_id regclass)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _name CONSTANT text := table_id;
BEGIN
    -- Another session may hold a partition.
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS SHARE MODE', _name);
    IF to_regclass(_name) IS DISTINCT FROM table_id THEN
        RAISE EXCEPTION USING
            ERRCODE = 'serialization_failure',
            MESSAGE = format('table %s is being renamed', _name),
            HINT = 'Try it again.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._keep_name IS
    'Keeps a table''s name as it is until the transaction ends: a rename of the table or of its schema waits.';

CREATE OR REPLACE FUNCTION autoembed._build_pipeline(pipeline_id integer)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    _slots jsonb;
    _built_from text;
    _is_built boolean;
BEGIN
    SELECT autoembed._slots(p), p.built_from INTO STRICT _slots, _built_from
    FROM autoembed.pipeline AS p
    WHERE p.id = pipeline_id;
    SELECT count(*) = 3 INTO _is_built
    FROM pg_proc AS p
    JOIN pg_roles AS o ON o.oid = p.proowner AND o.rolname = _slots ->> 'owner'
    WHERE p.pronamespace = 'autoembed'::regnamespace
      AND p.proname IN ('_content_' || pipeline_id, '_write_' || pipeline_id, '_scan_' || pipeline_id)
      AND p.prosecdef;
    IF _is_built AND _built_from = md5('@BUILD@' || _slots::text) THEN
        RETURN false;
    END IF;
    -- The statements below name the tables. Nobody gives the names to others meanwhile.
    PERFORM autoembed._keep_name(t.id)
    FROM autoembed.pipeline AS p
    CROSS JOIN LATERAL (VALUES (1, p.table_id), (2, p.embeddings_table)) AS t(number, id)
    JOIN pg_class AS c ON c.oid = t.id
    WHERE p.id = pipeline_id
    ORDER BY t.number;
    SELECT autoembed._slots(p) INTO STRICT _slots FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    IF EXISTS (
        SELECT FROM pg_class AS c
        WHERE c.oid = to_regclass(_slots ->> 'embeddings_table') AND NOT c.relrowsecurity
    ) THEN
        -- A dump without policies leaves it open to all. The event trigger for this statement makes the functions, too.
        EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', _slots ->> 'embeddings_table');
    END IF;
    PERFORM autoembed._drop_functions(pipeline_id, false);
    PERFORM autoembed._create_functions(_slots);
    UPDATE autoembed.pipeline AS p SET built_from = md5('@BUILD@' || _slots::text) WHERE p.id = pipeline_id;
    IF _built_from = 'stopped' THEN
        -- It goes on. No trigger has seen what happened meanwhile.
        PERFORM autoembed._build_triggers(p) FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
        PERFORM autoembed._backfill(ARRAY[pipeline_id]);
    END IF;
    RETURN true;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_pipeline IS
    'Makes the functions of a pipeline, unless they exist and the same version made them from the same facts: false. A '
    'pipeline that was stopped gets its triggers again, and its table is scanned.';

CREATE OR REPLACE FUNCTION autoembed._admit_readers(slots jsonb)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    -- The slots have such names.
    SET quote_all_identifiers = on
AS $plpgsql$
DECLARE
    _lists_readable CONSTANT boolean := (slots ->> 'lists_readable')::boolean;
    _unused CONSTANT name := concat(CASE WHEN _lists_readable THEN '_may_read_' ELSE '_readable_' END, slots ->> 'id');
    _outdated regprocedure;
    _view text;
BEGIN
    FOR _outdated IN
        SELECT p.oid
        FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace
          AND p.proname = ANY (autoembed._readers_functions((slots ->> 'id')::integer))
          AND CASE
              WHEN p.pronargs > 0 THEN
                  p.proname = _unused
                  OR regexp_replace(pg_get_function_identity_arguments(p.oid), ', "(chunk_start|part)" .*', '')
                     <> slots ->> 'key_types'
              WHEN p.proretset THEN
                  p.proname = _unused
                  OR pg_get_function_result(p.oid) <> format('TABLE(%s)', slots ->> 'readable_columns')
          END
    LOOP
        EXECUTE format('DROP FUNCTION %s CASCADE', _outdated);
    END LOOP;
    PERFORM autoembed._create_function(CASE WHEN _lists_readable THEN 'readable' ELSE 'may_read' END, slots);
    PERFORM autoembed._create_function('may_read_all', slots);
    PERFORM autoembed._create_function('chunk', slots);
    PERFORM autoembed._create_function('long_version', slots);
    PERFORM autoembed._create_function('long_text', slots);
    PERFORM autoembed._create_function('long_chunk', slots);
    -- A dump may have brought a policy that asks for the rights to rows of another table.
    IF NOT EXISTS (
        SELECT FROM pg_policy AS o
        WHERE o.polrelid = (slots ->> 'embeddings_table')::regclass AND o.polname = 'autoembed_readers'
          AND autoembed._pipeline_of_policy(o.oid) = (slots ->> 'id')::integer
    ) THEN
        EXECUTE format('DROP POLICY IF EXISTS autoembed_readers ON %s', slots ->> 'embeddings_table');
        -- A subquery is asked once. To ask for each row takes as long as a hundred distances.
        EXECUTE format(
            'CREATE POLICY autoembed_readers ON %s FOR SELECT USING ((SELECT autoembed._may_read_all_%s()) OR %s)',
            slots ->> 'embeddings_table', slots ->> 'id', CASE
                WHEN _lists_readable THEN slots ->> 'is_readable'
                ELSE format('autoembed._may_read_%s(%s)', slots ->> 'id', slots ->> 'key_names')
            END
        );
    END IF;
    IF autoembed._chunks_view((slots ->> 'id')::integer, (slots ->> 'embeddings_table')::regclass) IS NULL THEN
        SELECT coalesce(
            -- A dump has brought it, and it calls the function of another pipeline.
            autoembed._chunks_view(NULL, c.oid)::text,
            (SELECT f.name
             FROM unnest(ARRAY[
                 autoembed._beginning(regexp_replace(c.relname, '_embeddings$', ''), 56) || '_chunks',
                 concat('autoembed_', slots ->> 'id', '_chunks'),
                 -- Other roles may have views of both names.
                 concat('autoembed_', slots ->> 'id', '_chunks_', md5(random()::text))
             ]) WITH ORDINALITY AS v(name, number)
             CROSS JOIN LATERAL (SELECT format('%I.%I', n.nspname, v.name)) AS f(name)
             WHERE to_regclass(f.name) IS NULL AND to_regtype(f.name) IS NULL
             ORDER BY v.number
             LIMIT 1)
        )
        INTO STRICT _view
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.oid = (slots ->> 'embeddings_table')::regclass;
        EXECUTE format(
            'CREATE OR REPLACE VIEW %1$s WITH (security_invoker = true) AS '
            'SELECT %2$s, e.chunk_number, e.chunk_start, e.chunk_end, coalesce('
            'autoembed._chunk_%3$s(%2$s, e.chunk_start, e.chunk_end, e.digest), ('
            'SELECT autoembed._long_chunk_%3$s(%2$s, coalesce('
            'autoembed._part_of_long_text(v.version, NULL, e.chunk_start, e.chunk_end), '
            'autoembed._part_of_long_text(v.version, autoembed._long_text_%3$s(%2$s), e.chunk_start, e.chunk_end)'
            '), e.digest) FROM (SELECT autoembed._long_version_%3$s(%2$s) AS version OFFSET 0) AS v '
            'WHERE v.version IS NOT NULL)) AS chunk FROM %4$s AS e',
            _view, slots ->> 'embeddings_key', slots ->> 'id', slots ->> 'embeddings_table'
        );
        EXECUTE format('ALTER VIEW %s OWNER TO %I', _view, slots ->> 'owner');
        EXECUTE format('COMMENT ON VIEW %s IS %L', _view, format(
            'The chunks of %s with their texts. A text that has changed since is NULL.', (
                SELECT concat_ws('.', n.nspname, c.relname)
                FROM pg_class AS c
                JOIN pg_namespace AS n ON n.oid = c.relnamespace
                WHERE c.oid = (slots ->> 'table_id')::oid
            )
        ));
    END IF;
    PERFORM autoembed._share_embeddings(ARRAY[(slots ->> 'id')::integer]);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._admit_readers IS
    'Lets those read the embeddings and the chunks of a row who may read the row.';

CREATE OR REPLACE FUNCTION autoembed._unshared(pipeline_ids integer[])
    RETURNS TABLE (problem text, cure text, owner oid)
    -- PL/pgSQL keeps the plan, which takes longer to make than the query.
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY
    WITH shared AS MATERIALIZED (
        SELECT p, t.oid AS table_id, t.relacl, t.relowner AS owner, e.oid AS embeddings_table, e.relacl AS given,
               e.relrowsecurity AS has_policy,
               -- A tenant may have a wide table with a long template. The columns are looked up once.
               CASE WHEN c.have_rights THEN autoembed._needed_columns(p) END AS needed
        FROM autoembed.pipeline AS p
        JOIN pg_class AS t ON t.oid = p.table_id
        JOIN pg_class AS e ON e.oid = p.embeddings_table AND e.relowner = t.relowner AND e.relkind = 'r'
        CROSS JOIN LATERAL (
            SELECT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = t.oid AND a.attacl IS NOT NULL)
                AS have_rights
        ) AS c
        WHERE p.id = ANY (pipeline_ids)
    ),
    readable AS (
        SELECT s.embeddings_table AS id, s.table_id, s.given, s.owner, s.has_policy FROM shared AS s
        UNION ALL
        -- The views of the chunks, which _chunks_view() finds one by one.
        SELECT DISTINCT v.oid, s.table_id, v.relacl, s.owner, s.has_policy
        FROM shared AS s
        JOIN pg_depend AS t
            ON t.classid = 'pg_rewrite'::regclass AND t.refclassid = 'pg_class'::regclass
            AND t.refobjid = s.embeddings_table
        JOIN pg_rewrite AS r ON r.oid = t.objid
        JOIN pg_class AS v ON v.oid = r.ev_class AND v.relkind = 'v' AND v.relowner = s.owner
        JOIN pg_depend AS d
            ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_proc'::regclass
        JOIN pg_proc AS f
            ON f.oid = d.refobjid AND f.pronamespace = 'autoembed'::regnamespace
            AND f.proname = concat('_chunk_', (s.p).id)
    ),
    reader AS (
        SELECT s.table_id, a.grantee
        FROM shared AS s
        CROSS JOIN LATERAL aclexplode(s.relacl) AS a
        WHERE a.privilege_type = 'SELECT' AND a.grantee <> s.owner
        UNION
        -- A right to all columns that the text is made of will do.
        SELECT s.table_id, g.grantee
        FROM shared AS s
        CROSS JOIN LATERAL (
            SELECT DISTINCT x.grantee, CASE x.grantee WHEN 0 THEN 'public' ELSE pg_get_userbyid(x.grantee) END AS name
            FROM pg_attribute AS a
            CROSS JOIN LATERAL aclexplode(a.attacl) AS x
            WHERE a.attrelid = s.table_id AND a.attacl IS NOT NULL AND x.privilege_type = 'SELECT'
              AND x.grantee <> s.owner
        ) AS g
        WHERE NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = s.table_id AND a.attnum > 0 AND NOT a.attisdropped
              AND CASE
                  WHEN NOT has_column_privilege(g.name, s.table_id, a.attnum, 'SELECT') THEN
                      (s.p).content_function IS NOT NULL OR a.attname = ANY (s.needed)
              END
        )
    ),
    wanted AS (
        SELECT r.id, r.table_id, w.grantee FROM readable AS r
        JOIN reader AS w ON w.table_id = r.table_id AND r.has_policy
    ),
    given AS (
        SELECT r.id, r.table_id, a.grantee, bool_or(a.grantor = r.owner) AS by_owner
        FROM readable AS r
        CROSS JOIN LATERAL aclexplode(r.given) AS a
        WHERE a.privilege_type = 'SELECT' AND a.grantee <> r.owner
        GROUP BY r.id, r.table_id, a.grantee
    ),
    changed AS (
        SELECT id, table_id, w.id IS NOT NULL AS is_reader, string_agg(
                   CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END, ', ' ORDER BY grantee
               ) AS roles
        FROM wanted AS w
        FULL JOIN given AS g USING (id, table_id, grantee)
        WHERE w.id IS NULL AND g.by_owner OR g.id IS NULL
        GROUP BY id, table_id, w.id IS NOT NULL
    )
    SELECT format(CASE WHEN c.is_reader THEN '%s may read %s, and not %s' ELSE '%s may not read %s, but %s' END,
                  c.roles, string_agg(DISTINCT c.table_id::regclass::text, ', '),
                  string_agg(c.id::regclass::text, ', ' ORDER BY c.id)),
           format(CASE WHEN c.is_reader THEN 'GRANT SELECT ON %1$s TO %2$s;'
                       ELSE 'REVOKE SELECT ON %1$s FROM %2$s CASCADE;' END,
                  string_agg(c.id::regclass::text, ', ' ORDER BY c.id), c.roles),
           t.relowner
    FROM changed AS c
    JOIN pg_class AS t ON t.oid = c.table_id
    -- A table that one owner has locked keeps no other table from it.
    GROUP BY c.is_reader, c.roles, t.relowner;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._unshared IS
    'Where the readers of the tables of these pipelines and those of their embeddings and chunks are not the same '
    'roles, and the SQL that mends it. owner: that of the tables.';

CREATE OR REPLACE FUNCTION autoembed._share_embeddings(pipeline_ids integer[])
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _cure text;
BEGIN
    FOR _cure IN SELECT u.cure FROM autoembed._unshared(pipeline_ids) AS u LOOP
        EXECUTE _cure;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._share_embeddings IS
    'Gives the roles that may read the tables of these pipelines the right to read their embeddings tables and the '
    'views of their chunks, and takes it from all others.';

CREATE OR REPLACE FUNCTION autoembed._readers_functions(pipeline_id integer)
    RETURNS name[]
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT array_agg(format('_%s_%s', t.name, pipeline_id)::name)
    FROM unnest('{may_read,may_read_all,readable,chunk,long_version,long_text,long_chunk}'::text[]) AS t(name);
$sql$;
COMMENT ON FUNCTION autoembed._readers_functions IS
    'The names of the functions of a pipeline that run with the rights of a reader.';

CREATE OR REPLACE FUNCTION autoembed._chunks_view(pipeline_id integer, embeddings_table regclass)
    RETURNS regclass
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT v.oid::regclass
    FROM pg_class AS e
    JOIN pg_class AS v ON v.relkind = 'v' AND v.relowner = e.relowner
    JOIN pg_rewrite AS r ON r.ev_class = v.oid
    JOIN pg_depend AS d
        ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_proc'::regclass
    JOIN pg_proc AS p
        ON p.oid = d.refobjid AND p.pronamespace = 'autoembed'::regnamespace
        AND p.proname ~ concat('^_chunk_', coalesce(pipeline_id::text, '[0-9]+'), '$')
    WHERE e.oid = embeddings_table
      AND EXISTS (
          SELECT FROM pg_depend AS t
          WHERE t.classid = 'pg_rewrite'::regclass AND t.objid = r.oid
            AND t.refclassid = 'pg_class'::regclass AND t.refobjid = e.oid
      )
    ORDER BY v.oid
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._chunks_view IS
    'The view that shows the chunks of a pipeline with their texts; NULL if there is none. pipeline_id: NULL: of any.';

CREATE OR REPLACE FUNCTION autoembed._pipeline_of_policy(policy oid)
    RETURNS integer
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT substring(p.proname FROM '^_may_read_all_([0-9]{1,9})$')::integer
    FROM pg_depend AS d
    JOIN pg_proc AS p ON p.oid = d.refobjid AND p.pronamespace = 'autoembed'::regnamespace
    WHERE d.classid = 'pg_policy'::regclass AND d.objid = policy AND d.refclassid = 'pg_proc'::regclass
      AND p.proname ~ '^_may_read_all_[0-9]{1,9}$'
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._pipeline_of_policy IS
    'The pipeline whose rows a reader must be able to read for a policy to show their embeddings; NULL if there is '
    'none.';

CREATE OR REPLACE FUNCTION autoembed._check_policy()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _stray record;
BEGIN
    FOR _stray IN
        SELECT o.polname AS name, o.polrelid::regclass AS stray_on
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_policy AS o ON d.classid = 'pg_policy'::regclass AND o.oid = d.objid
        JOIN autoembed.pipeline AS p ON p.id = autoembed._pipeline_of_policy(o.oid)
        WHERE o.polname = 'autoembed_readers' AND p.embeddings_table IS DISTINCT FROM o.polrelid
    LOOP
        EXECUTE format('DROP POLICY %I ON %s', _stray.name, _stray.stray_on);
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('policy %I was taken away from table %s: it asks for the rights to rows of another table',
                             _stray.name, _stray.stray_on),
            HINT = 'enable() makes the right one. Until then only the owner reads the embeddings.';
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_policy IS
    'Takes a policy away that would show the embeddings of one table to those who may read another: a dump of one '
    'table has brought it.';

CREATE OR REPLACE FUNCTION autoembed._erasures(slots jsonb)
    RETURNS jsonb
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT jsonb_object_agg(e.slot, CASE
        WHEN slots ->> 'embeddings_table' IS NOT NULL AND slots ->> 'vector_type' IS NOT NULL THEN
            autoembed._filled(replace(e.statement, 'erase(', 'PERFORM autoembed._erase_{{id}}('), slots)
        ELSE ''
    END)
    FROM (VALUES
        -- Lanes find the rows that are gone by their records.
        ('erase_truncate', 'IF NOT autoembed._erase_{{id}}(NULL) THEN '
                           'INSERT INTO autoembed._job (due_at, message) VALUES (pg_catalog.clock_timestamp(), '
                           '''{"pipeline": {{id}}, "recorded_after": ""}''); RETURN NULL; END IF;'),
        ('erase_rows', 'erase(ARRAY(SELECT r.key FROM ({{old_rows}}) AS r));'),
        ('erase_row', 'IF TG_OP OPERATOR(pg_catalog.=) ''DELETE'' AND {{has_old_key}} THEN erase(ARRAY[{{old_key}}]); '
                      'END IF;'),
        -- The embeddings of a key that changes belong to no row.
        ('erase_update', CASE slots ->> 'on_change'
            WHEN 'clear' THEN 'erase({{moved_keys}});'
            ELSE 'IF {{key_changed}} THEN erase({{moved_keys}}); END IF;'
        END)
    ) AS e(slot, statement);
$sql$;
COMMENT ON FUNCTION autoembed._erasures IS
    'The statements by which a pipeline''s triggers delete embeddings that are beside the rows. Empty for vectors in '
    'the rows, which go with them.';

CREATE OR REPLACE FUNCTION autoembed._create_functions(slots jsonb)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _owner name := slots ->> 'owner';
    -- The pieces that go into other templates, by name.
    _pieces jsonb := '{}'::jsonb;
    _piece text;
BEGIN
    slots := slots || jsonb_build_object(
        'raise_if_cancelled', autoembed._function_template('raise_if_cancelled'),
        'scan_query', quote_literal(autoembed._filled(autoembed._function_template('scan_query'), slots)),
        'and_later_key', quote_literal(format(' AND (%s)', slots ->> 'later_key')),
        'order_by_key', quote_literal(format(' ORDER BY %s', slots ->> 'keys'))
    );
    -- A column that is no vector cannot be written. The triggers go on queuing.
    IF slots ->> 'vector_type' IS NOT NULL THEN
        PERFORM autoembed._create_function('scan', slots, _owner);
        IF slots ->> 'embeddings_table' IS NULL THEN
            PERFORM autoembed._create_function('content', slots, _owner);
            PERFORM autoembed._create_function('write', slots, _owner);
        ELSE
            PERFORM autoembed._create_function('content_beside', slots, _owner);
            PERFORM autoembed._create_function('write_beside', slots, _owner);
            PERFORM autoembed._create_function('erase', slots || jsonb_build_object('erase_part', quote_literal(format(
                'DELETE FROM %s AS e USING ONLY %%s AS t WHERE %s',
                replace(slots ->> 'embeddings_table', '%', '%%'), replace(slots ->> 'same_row', '%', '%%')
            ))), _owner);
            IF slots ->> 'chunk_call' IS NOT NULL THEN
                PERFORM autoembed._create_function('split', slots, _owner);
            END IF;
            PERFORM autoembed._admit_readers(slots);
        END IF;
        IF slots ? 'nearest_rows_by_index' THEN
            PERFORM autoembed._create_function('nearest_rows', slots);
        END IF;
    END IF;
    IF NOT (slots ->> 'managed')::boolean THEN
        RETURN;
    END IF;

    slots := slots || autoembed._erasures(slots);
    FOREACH _piece IN ARRAY '{queue_update,queue_truncate,queue_row}'::text[] LOOP
        _pieces := _pieces
            || jsonb_build_object(_piece, autoembed._filled(autoembed._function_template(_piece), slots));
    END LOOP;
    SELECT _pieces || jsonb_object_agg(r.name, autoembed._filled(
        autoembed._function_template('queue_rows'),
        slots || jsonb_build_object('rows', r.rows, 'said_of_rows', coalesce(r.said, ''))
    ))
    INTO _pieces
    FROM (VALUES
        ('queue_old_rows', slots ->> 'old_rows', NULL),
        ('queue_new_rows', slots ->> 'new_rows', NULL),
        ('queue_new_rows_with_text', concat(slots ->> 'new_rows', slots ->> 'with_text'), NULL),
        ('queue_lost_rows', slots ->> 'lost_rows', NULL),
        ('queue_replaced_rows', slots ->> 'replaced_rows', ', "replaced": true')
    ) AS r(name, rows, said);
    IF (slots ->> 'runs_owners_code')::boolean THEN
        PERFORM autoembed._create_function('text', slots, _owner);
        PERFORM autoembed._create_function('capture_by_owners_code', slots || _pieces);
    ELSE
        PERFORM autoembed._create_function('capture', slots || _pieces);
    END IF;
    IF slots ->> 'embeddings_table' IS NULL THEN
        PERFORM autoembed._create_function('clear', slots || _pieces);
    ELSE
        PERFORM autoembed._create_function('watch', slots || _pieces);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._create_functions IS 'Makes the functions of a pipeline from the facts of _slots().';

CREATE OR REPLACE FUNCTION autoembed._drop_functions(pipeline_id integer, with_triggers boolean)
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
          AND (p.proname IN ('_content_' || pipeline_id, '_write_' || pipeline_id, '_scan_' || pipeline_id,
                             '_text_' || pipeline_id, '_erase_' || pipeline_id, '_split_' || pipeline_id)
               -- A search may be about to call the last of these. It is replaced, and not used where it does not fit.
               OR with_triggers AND p.proname IN ('_capture_' || pipeline_id, '_clear_' || pipeline_id,
                                                  '_watch_' || pipeline_id, '_nearest_rows_' || pipeline_id))
    LOOP
        EXECUTE format('DROP FUNCTION %s %s', _function, CASE WHEN with_triggers THEN 'CASCADE' END);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_functions IS
    'Drops the functions of a pipeline, but those of readers. with_triggers: drops its triggers and their functions '
    'too.';

CREATE OR REPLACE FUNCTION autoembed._dependents(view regclass, table_id regclass)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT string_agg(DISTINCT coalesce(
        pg_describe_object('pg_class'::regclass, r.ev_class, 0), pg_describe_object(d.classid, d.objid, d.objsubid)
    ), ', ')
    FROM (
        SELECT 'pg_class'::regclass AS class, view::oid AS id
        UNION ALL
        SELECT 'pg_type'::regclass, y.id
        FROM pg_type AS t
        CROSS JOIN LATERAL (VALUES (t.oid), (t.typarray)) AS y(id)
        WHERE t.typrelid = view
    ) AS o
    JOIN pg_depend AS d ON d.refclassid = o.class AND d.refobjid = o.id AND d.deptype = 'n'
    LEFT JOIN pg_rewrite AS r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    LEFT JOIN pg_policy AS p ON d.classid = 'pg_policy'::regclass AND p.oid = d.objid
    LEFT JOIN pg_proc AS f ON d.classid = 'pg_proc'::regclass AND f.oid = d.objid
    LEFT JOIN pg_class AS c ON c.oid = coalesce(
        r.ev_class, p.polrelid, CASE WHEN d.classid = 'pg_class'::regclass THEN d.objid END
    )
    WHERE r.ev_class IS DISTINCT FROM view
      -- Any role can make a view on another one. A role without a right to the rows is not to stop their owner.
      AND CASE
          WHEN EXISTS (SELECT FROM pg_class AS t WHERE t.oid = table_id) THEN
              has_any_column_privilege(coalesce(c.relowner, f.proowner), table_id, 'SELECT')
          ELSE true
      END;
$sql$;
COMMENT ON FUNCTION autoembed._dependents IS
    'The objects that depend on the view of the chunks of a table, and whose owners may read it; NULL if there are '
    'none. All count once the table is gone.';

CREATE OR REPLACE FUNCTION autoembed._check_chunks_view(pipeline autoembed.pipeline)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _view CONSTANT regclass := autoembed._chunks_view(pipeline.id, pipeline.embeddings_table);
    _dependents CONSTANT text := autoembed._dependents(_view, pipeline.table_id);
BEGIN
    IF _dependents IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'dependent_objects_still_exist',
            MESSAGE = format('view %s has to be dropped for this, but other objects depend on it', _view),
            DETAIL = format('These are: %s.', _dependents),
            HINT = format('Drop them first, or all of them by DROP VIEW %s CASCADE, and make them again afterwards.',
                          _view);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_chunks_view IS
    'Raises an error if something of a reader depends on the view of the chunks of a pipeline.';

CREATE OR REPLACE FUNCTION autoembed._drop_readers(
    pipeline_id integer,
    embeddings_table regclass,
    table_id regclass
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    _view CONSTANT regclass := autoembed._chunks_view(pipeline_id, embeddings_table);
    _keeps_view CONSTANT boolean := autoembed._dependents(_view, table_id) IS NOT NULL;
    _function regprocedure;
BEGIN
    FOR _function IN
        SELECT p.oid
        FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace
          AND p.proname = ANY (autoembed._readers_functions(pipeline_id))
          -- Row security stays on, and shows nobody anything without the policy.
          AND (p.proname ~ '^_(may_read|may_read_all|readable)_[0-9]+$' OR NOT _keeps_view)
    LOOP
        EXECUTE format('DROP FUNCTION %s CASCADE', _function);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_readers IS
    'Drops what lets roles read the embeddings table of a pipeline: functions, the policy, and the view of chunks. The '
    'view stays if something of a reader depends on it.';
