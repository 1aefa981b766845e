-- The function that clients of Supabase and LangChain call, made for a table on request.

CREATE OR REPLACE FUNCTION autoembed._match_function(
    table_name regclass,
    name text,
    embedding_column name,
    OUT signature text,
    OUT statement text
)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
DECLARE
    _target record;
    _schema name;
    _table name;
    _vector text := (SELECT v.full_name FROM autoembed._vector_types() AS v WHERE v.name = 'vector');
    _columns text;
    _values text;
    _row text;
    _metadata boolean;
    _taken name;
    _template text[] := string_to_array(autoembed._function_template('match'), '$body$');
    _slots jsonb;
BEGIN
    _target := autoembed._search_target((autoembed._searched(table_name, embedding_column)).pipeline_id);
    SELECT n.nspname, c.relname INTO _schema, _table
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = _target.table_id;
    name := coalesce(name, 'match_' || _table);
    -- A name that is cut off may be that of another table's function.
    IF octet_length(name) NOT BETWEEN 1 AND 63 THEN
        RAISE EXCEPTION USING
            ERRCODE = CASE WHEN name = '' THEN 'invalid_name' ELSE 'name_too_long' END,
            MESSAGE = format('the function''s name "%s" must have from 1 to 63 bytes', name),
            HINT = format('Give it a name: SELECT autoembed.create_match_function(%L, name => …).', table_name);
    END IF;
    SELECT string_agg(format('%I %s', a.attname, format_type(a.atttypid, NULL)), ', ' ORDER BY a.attnum),
           string_agg(format('(_hits[i.n]).%I', a.attname), ', ' ORDER BY a.attnum),
           -- Columns that the filter does not name are not read. A vector as JSON takes long, and nobody filters by it.
           string_agg(format(
               'CASE WHEN $2 OPERATOR(pg_catalog.?) %1$L::pg_catalog.text ' || CASE
                   WHEN autoembed._is_superusers(a.atttypid) THEN 'THEN %2$I.%1$I END AS %1$I'
                   -- to_jsonb() would call a cast of the type's owner.
                   ELSE 'AND %2$I.%1$I IS NOT NULL THEN pg_catalog.concat(%2$I.%1$I) END AS %1$I'
               END, a.attname, _table), ', ' ORDER BY a.attnum)
               FILTER (WHERE a.atttypid NOT IN (SELECT v.id FROM autoembed._vector_types() AS v)),
           bool_or(a.attname = 'metadata' AND a.atttypid = 'jsonb'::regtype),
           min(a.attname::text) FILTER (
               WHERE a.attname IN ('query_embedding', 'match_count', 'filter', 'similarity')
           )
    INTO _columns, _values, _row, _metadata, _taken
    FROM pg_attribute AS a
    WHERE a.attrelid = _target.table_id AND a.attnum > 0 AND NOT a.attisdropped;
    IF _taken IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_column',
            MESSAGE = format('table %s has a column "%s", which is a name of the function''s own', table_name, _taken),
            HINT = 'Rename the column, or use search().';
    END IF;
    _row := format('(SELECT pg_catalog.to_jsonb(r.*) FROM (SELECT %s) AS r)', _row);
    IF _metadata THEN
        _row := format(
            '((CASE WHEN pg_catalog.jsonb_typeof(%1$I.metadata) OPERATOR(pg_catalog.=) ''object''::pg_catalog.text '
            'THEN %1$I.metadata ELSE ''{}''::pg_catalog.jsonb END) OPERATOR(pg_catalog.||) %2$s)', _table, _row
        );
    END IF;
    signature := format('%I.%I(%s, pg_catalog.int4, pg_catalog.jsonb)', _schema, name, _vector);
    _slots := jsonb_build_object(
        'function', format('%I.%I', _schema, name),
        'schema', quote_ident(_schema),
        'table', _target.table_id::text,
        'table_literal', quote_literal(_target.table_id),
        'vector', _vector,
        'columns', _columns,
        'values', _values,
        'limit', CASE
            -- Several chunks of one row may be near.
            WHEN _target.is_chunked THEN
                '_wanted OPERATOR(pg_catalog.+) least(3::pg_catalog.int8 OPERATOR(pg_catalog.*) _wanted, 50)'
            ELSE '_wanted'
        END,
        'start', quote_literal(_target.match_start),
        'end', quote_literal(_target.near_end),
        'exact_end', quote_literal(_target.exact_end),
        'candidates', CASE WHEN _target.is_binary THEN _target.ef_search ELSE 0 END,
        'condition', quote_literal(_row || ' OPERATOR(pg_catalog.@>) $2'),
        'ef_search', quote_literal(_target.ef_search)
    );
    statement := concat(
        autoembed._filled(_template[1], _slots), quote_literal(autoembed._filled(_template[2], _slots))
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._match_function IS
    'The statement that makes the match function of a table, and the signature that it gets.';

CREATE OR REPLACE FUNCTION autoembed.create_match_function(
    table_name regclass,
    name text DEFAULT NULL,
    embedding_column name DEFAULT NULL
)
    RETURNS regprocedure
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _schema regnamespace;
    _made record;
    _void text;
BEGIN
    _void := autoembed._check_owner(table_name);
    SELECT c.relnamespace::regnamespace INTO _schema FROM pg_class AS c WHERE c.oid = create_match_function.table_name;
    IF NOT has_schema_privilege(_schema::oid, 'CREATE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role %I may not create a function in schema %s', current_user, _schema),
            HINT = format('GRANT CREATE ON SCHEMA %s TO %I.', _schema, current_user);
    END IF;
    _made := autoembed._match_function(
        table_name, create_match_function.name, create_match_function.embedding_column
    );
    _void := autoembed._execute(_made.statement);
    EXECUTE format(
        'COMMENT ON FUNCTION %s IS %L', _made.signature,
        format('The rows of %s that are nearest to a vector, with the rights of the caller. '
               'Made by autoembed.create_match_function().', table_name)
    );
    -- A superuser leaves nothing of its own in the schema of somebody else.
    IF (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user) THEN
        EXECUTE format(
            'ALTER FUNCTION %s OWNER TO %I', _made.signature,
            (SELECT pg_get_userbyid(c.relowner) FROM pg_class AS c WHERE c.oid = create_match_function.table_name)
        );
    END IF;
    RETURN _made.signature::regprocedure;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.create_match_function IS
    'Makes, for the caller, the function match_TABLE(query_embedding, match_count, filter) that clients of Supabase '
    'and LangChain call: the nearest rows of a table and their similarity, with the rights of the one that calls it. '
    'It replaces a function of the same name, arguments and columns. Call it again when the columns, the name or the '
    'embedding of the table have changed.';
