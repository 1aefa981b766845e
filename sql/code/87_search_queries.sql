-- The queries of searches. Conditions, policies and functions in them run with the rights of the caller, and in the
-- caller's search_path. So all else in them is qualified.

CREATE OR REPLACE FUNCTION autoembed._is_superusers(type_id oid)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- The types that initdb made. The rest takes a tenth of a millisecond.
    RETURN type_id < 16384::oid OR NOT EXISTS (
        SELECT FROM autoembed._used_types(ARRAY[type_id]) AS u(id)
        JOIN pg_type AS t ON t.oid = u.id
        JOIN pg_roles AS o ON o.oid = t.typowner AND NOT o.rolsuper
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._is_superusers IS
    'Whether a type, and those that it is made of, belong to superusers. The owner of another one may have made casts '
    'and checks for it.';

CREATE OR REPLACE FUNCTION autoembed._has_foreign_types(pipeline autoembed.pipeline)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN EXISTS (
        SELECT FROM pg_attribute AS e
        LEFT JOIN pg_attribute AS t
            ON t.attrelid = pipeline.table_id AND t.attname = e.attname AND e.attname = ANY (pipeline.key_columns)
        CROSS JOIN LATERAL (
            SELECT coalesce(t.atttypid, CASE
                WHEN e.attname IN ('chunk_number', 'chunk_start', 'chunk_end') THEN 'integer'::regtype
                WHEN e.attname = 'digest' THEN 'bytea'::regtype
            END) AS id
        ) AS meant
        WHERE e.attrelid = pipeline.embeddings_table AND e.atttypid <> meant.id
          AND NOT (autoembed._is_superusers(e.atttypid) AND autoembed._is_superusers(meant.id))
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._has_foreign_types IS
    'Whether the owner has given a column of the embeddings table a type with casts of the owner''s own. A comparison '
    'with it would call them.';

CREATE OR REPLACE FUNCTION autoembed._sent_keys(
    pipeline autoembed.pipeline,
    OUT key_values text,
    OUT is_row text,
    OUT is_embedding text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    WITH RECURSIVE base AS (
        SELECT k.name, k.number, a.atttypid AS id, autoembed._operator(a.attrelid, k.name, 3) AS operator,
               format('(s.key::pg_catalog.jsonb OPERATOR(pg_catalog.->>) %s)', k.number - 1) AS value
        FROM unnest(pipeline.key_columns) WITH ORDINALITY AS k(name, number)
        JOIN pg_attribute AS a ON a.attrelid = pipeline.table_id AND a.attname = k.name
        UNION ALL
        -- A cast to a domain would run its checks.
        SELECT b.name, b.number, t.typbasetype, b.operator, b.value
        FROM base AS b
        JOIN pg_type AS t ON t.oid = b.id AND t.typtype = 'd'
    ),
    sent AS (
        SELECT b.number, b.name, CASE
                   WHEN autoembed._is_superusers(t.oid) THEN format('%s::%I.%I', b.value, n.nspname, t.typname)
                   WHEN t.typtype = 'e' THEN
                       format('(SELECT l.label FROM pg_catalog.unnest(pg_catalog.enum_range(NULL::%I.%I)) AS l(label) '
                              'WHERE pg_catalog.concat(l.label) OPERATOR(pg_catalog.=) %s)',
                              n.nspname, t.typname, b.value)
                   ELSE b.value
               END AS value,
               CASE
                   WHEN NOT (autoembed._is_superusers(t.oid) OR t.typtype = 'e') THEN 'autoembed._key_text'
               END AS call,
               CASE
                   WHEN autoembed._is_superusers(t.oid) THEN b.operator
                   ELSE 'OPERATOR(pg_catalog.=)'
               END AS operator
        FROM base AS b
        JOIN pg_type AS t ON t.oid = b.id AND t.typtype <> 'd'
        JOIN pg_namespace AS n ON n.oid = t.typnamespace
    )
    SELECT string_agg(format('%s AS k%s', o.value, o.number), ', ' ORDER BY o.number),
           string_agg(format('%s(t.%I) %s s.k%s', o.call, o.name, o.operator, o.number), ' AND ' ORDER BY o.number),
           string_agg(format('%s(e.%I) %s s.k%s', o.call, o.name, o.operator, o.number), ' AND ' ORDER BY o.number)
    INTO key_values, is_row, is_embedding
    FROM sent AS o;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._sent_keys IS
    'The SQL expressions of the values in s.key, as columns k1, k2 and so on, and those that tell whether the row t, '
    'and the embedding e, has them. These run no code of the owner of the table or of a type: the caller of a search '
    'may have more rights. A query has to take the columns from a subquery with OFFSET 0: a comparison with them that '
    'is leakproof then uses an index, even if policies hide rows.';

CREATE OR REPLACE FUNCTION autoembed._searched(
    table_name regclass,
    embedding_column name,
    OUT table_id regclass,
    OUT vectors_table regclass,
    OUT model text,
    OUT pipeline_id integer,
    OUT version text
)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _is_ambiguous boolean;
    _has_lost_its_table boolean;
    _advice text;
    _void text;
BEGIN
    SELECT p.table_id, coalesce(p.embeddings_table, p.table_id), coalesce(p.model, m.name, autoembed._default_model()),
           p.id,
           -- A call of _text_config() takes as long as the rest of this query.
           concat_ws(' ', p.xmin, p.ctid, m.xmin, m.ctid, CASE
               WHEN pg_input_is_valid(p.text_config, 'regconfig') THEN p.text_config::regconfig::oid
           END),
           -- The first of several sets beside the rows counts until it is detached: another model takes its place at
           -- once.
           count(*) OVER () > 1 AND bool_or(p.embeddings_table IS NULL) OVER (),
           p.embeddings_table IS NOT NULL AND e.oid IS NULL
    INTO table_id, vectors_table, model, pipeline_id, version, _is_ambiguous, _has_lost_its_table
    FROM autoembed.pipeline AS p
    LEFT JOIN autoembed.model AS m ON m.name = coalesce(p.model, autoembed._default_model())
    LEFT JOIN pg_class AS e ON e.oid = p.embeddings_table
    WHERE _searched.table_name IN (p.table_id, p.embeddings_table)
      AND coalesce(_searched.embedding_column, p.embedding_column) IN (p.embedding_column, e.relname)
    ORDER BY p.id
    LIMIT 1;
    IF table_name IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'table_name must not be NULL',
            HINT = 'Give the name of a table, such as ''public.documents''.';
    ELSIF pipeline_id IS NULL OR _is_ambiguous THEN
        SELECT 'Name one of them: ' || string_agg(format(
                   'embedding_column => %L', coalesce(c.relname, p.embedding_column)
               ), ' or ' ORDER BY p.id) || '.'
        INTO _advice
        FROM autoembed.pipeline AS p
        LEFT JOIN pg_class AS c ON c.oid = p.embeddings_table
        WHERE _searched.table_name IN (p.table_id, p.embeddings_table);
        IF _is_ambiguous THEN
            RAISE EXCEPTION USING
                ERRCODE = 'ambiguous_column',
                MESSAGE = format('table %s has several embeddings', table_name),
                HINT = _advice;
        END IF;
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = CASE
                WHEN embedding_column IS NULL THEN format('table %s is not attached to autoembed', table_name)
                ELSE format('column "%s" of table %s is not attached to autoembed', embedding_column, table_name)
            END,
            HINT = coalesce(_advice, (
                SELECT CASE
                    WHEN c.relkind IN ('v', 'm') THEN 'A view cannot be attached. Search the table that it reads.'
                    WHEN c.relispartition THEN
                        format('It is a part of table %s. Search that one.', pg_partition_root(c.oid))
                END
                FROM pg_class AS c WHERE c.oid = table_name
            ), format('Attach it: SELECT autoembed.enable(%L, …).', table_name));
    END IF;
    IF _has_lost_its_table THEN
        _void := autoembed._check_beside(table_id, vectors_table);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._searched IS
    'The table whose rows a search finds, the table with their embeddings, their model, and their pipeline. version: '
    'another text once the pipeline, its model or its text search configuration is changed.';

CREATE OR REPLACE FUNCTION autoembed._vector_access(
    pipeline autoembed.pipeline,
    OUT vector_type text,
    OUT expression text,
    OUT operator text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
BEGIN
    SELECT v.full_name, format('OPERATOR(%I.<=>)', n.nspname) INTO vector_type, operator
    FROM pg_attribute AS a
    JOIN autoembed._vector_types() AS v ON v.id = a.atttypid
    JOIN pg_type AS t ON t.oid = v.id
    JOIN pg_namespace AS n ON n.oid = t.typnamespace
    WHERE a.attrelid = coalesce(pipeline.embeddings_table, pipeline.table_id)
      AND a.attname = pipeline.embedding_column;
    IF vector_type IS NULL THEN
        RETURN;
    END IF;
    SELECT k.expression INTO expression FROM autoembed._index_key(pipeline) AS k;
    IF expression <> quote_ident(pipeline.embedding_column) THEN
        -- An index on a cast.
        vector_type := substr(expression, length(quote_ident(pipeline.embedding_column) || '::') + 1);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._vector_access IS
    'How a query compares vectors of a pipeline so that an index may serve it: the expression of the stored vector, '
    'without the alias of its table, the operator of the distance, and the type of the other vector. NULL: the column '
    'holds no vectors.';

CREATE OR REPLACE FUNCTION autoembed._nearest_rows_slots(pipeline autoembed.pipeline)
    RETURNS jsonb
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
DECLARE
    _is_beside CONSTANT boolean := pipeline.embeddings_table IS NOT NULL;
    _is_chunked CONSTANT boolean := _is_beside AND pipeline.chunking <> 'none';
    _access CONSTANT record := autoembed._vector_access(pipeline);
    _slots jsonb;
    _keys text;
    _near_keys text;
    _key_order text;
    _distance text;
    _nearest text;
    _query CONSTANT text := autoembed._function_template('nearest_rows_query');
BEGIN
    IF _access.vector_type IS NULL OR EXISTS (
        SELECT FROM pg_class AS c
        WHERE c.oid IN (pipeline.table_id, pipeline.embeddings_table) AND c.relkind <> 'r'
    ) OR EXISTS (
        -- A comparison of keys is to run no code but PostgreSQL's own.
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid IN (pipeline.table_id, pipeline.embeddings_table)
          AND a.attname = ANY (pipeline.key_columns) AND a.atttypid >= 16384
    ) THEN
        RETURN NULL;
    END IF;
    SELECT jsonb_build_object(
        'nearest_vector_type', _access.vector_type,
        'nearest_table', format('ONLY %s', pipeline.table_id),
        'row_type', pipeline.table_id::text,
        -- An equal key of the embedding may be spelled in another way.
        'row_key', autoembed._key_expression(pipeline, 't', 'autoembed._key_text(%s)'),
        'row_columns', string_agg(format('t.%I', a.attname), ', ' ORDER BY a.attnum),
        'nearest_passage', CASE
            WHEN _is_beside THEN autoembed._passage_of_hit(pipeline)
            ELSE 'NULL::pg_catalog.text'
        END
    )
    INTO _slots
    FROM pg_attribute AS a
    WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped;
    SELECT _slots || jsonb_build_object('is_near', string_agg(format(
               't.%I %s n.k%s', k.name, autoembed._operator(pipeline.table_id, k.name, 3), k.number
           ), ' AND ' ORDER BY k.number)),
           string_agg(format('v.%I AS k%s', k.name, k.number), ', ' ORDER BY k.number),
           string_agg('y.k' || k.number, ', ' ORDER BY k.number),
           string_agg(format(
               'v.%I USING %s', k.name, autoembed._operator(pipeline.table_id, k.name, 1)
           ), ', ' ORDER BY k.number)
    INTO _slots, _keys, _near_keys, _key_order
    FROM unnest(pipeline.key_columns) WITH ORDINALITY AS k(name, number);
    _distance := format('v.%s %s given._vector', _access.expression, _access.operator);
    _nearest := format(
        'SELECT x.*, CASE WHEN x.raw OPERATOR(pg_catalog.=) ''NaN''::pg_catalog.float8 THEN 1 ELSE x.raw END '
        'AS distance, pg_catalog.row_number() OVER () AS place, pg_catalog.count(*) OVER () AS compared '
        'FROM (SELECT %s, %s, %s AS raw FROM %s ',
        _keys, CASE
            WHEN _is_beside THEN 'v.chunk_number AS number, v.chunk_start AS start, v.chunk_end AS stop, v.digest'
            ELSE 'NULL::pg_catalog.int4 AS number, NULL::pg_catalog.int4 AS start, NULL::pg_catalog.int4 AS stop, '
                'NULL::pg_catalog.bytea AS digest'
        END, _distance, CASE
            WHEN _is_beside THEN format('%s AS v', pipeline.embeddings_table)
            ELSE format('ONLY %s AS v WHERE v.%I IS NOT NULL', pipeline.table_id, pipeline.embedding_column)
        END
    );
    RETURN _slots || (
        SELECT jsonb_object_agg(w.slot, autoembed._filled(_query, _slots || jsonb_build_object(
            'nearest', format(
                CASE
                    -- The nearest chunk of a row counts.
                    WHEN _is_chunked THEN
                        '(SELECT DISTINCT ON (%2$s) y.* FROM (%1$s) AS y ORDER BY %2$s, y.distance, y.place)'
                    ELSE '(%1$s)'
                END, format('%s ORDER BY %s LIMIT %s) AS x', _nearest, w.ordered_by, l.vectors), _near_keys
            ),
            'are_enough', concat('h.found OPERATOR(pg_catalog.>=) ($3 OPERATOR(pg_catalog.+) $4)', CASE
                WHEN w.compares_all THEN format(' OR h.compared OPERATOR(pg_catalog.<) %s', l.vectors)
            END)
        )))
        FROM (VALUES
            -- An index rounds vectors, so its order is not quite that of the distances.
            ('nearest_rows_by_index', _distance, 15, false),
            -- No index has this order. Rows that are as near are in the same order in each search.
            ('nearest_rows_by_comparison', format(
                '(%s) OPERATOR(pg_catalog.+) 0::pg_catalog.float8, %s, number', _distance, _key_order
            ), 10, true)
        ) AS w(slot, ordered_by, wanted, compares_all)
        CROSS JOIN LATERAL (
            -- Several chunks of one row may be near.
            SELECT w.wanted + CASE WHEN _is_chunked THEN least(3 * w.wanted, 50) ELSE 0 END AS vectors
        ) AS l
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._nearest_rows_slots IS
    'The slots of nearest_rows.sql, of which a page with up to ten rows can be read. NULL: the table is partitioned or '
    'foreign, has keys of types that are not PostgreSQL''s, or no vectors.';

CREATE OR REPLACE FUNCTION autoembed._search_target(
    pipeline_id integer,
    OUT table_id regclass,
    OUT vectors_table regclass,
    OUT model text,
    OUT vector_type text,
    OUT is_beside boolean,
    OUT has_index boolean,
    OUT has_texts boolean,
    OUT near_start text,
    OUT near_end text,
    OUT exact_end text,
    OUT match_start text,
    OUT rows_query text,
    OUT distances_query text,
    OUT visible_start text,
    OUT visible_distance text,
    OUT visible_end text,
    OUT matching_query text,
    OUT matching_end text,
    OUT keys_query text,
    OUT is_chunked boolean,
    OUT has_few_chunks boolean,
    OUT row_count double precision,
    OUT ef_search integer,
    OUT is_binary boolean,
    OUT lasts boolean,
    OUT texts_query text,
    OUT nearest_rows text
)
    LANGUAGE plpgsql
    -- It sees what was committed before the tables were locked, and not before the statement began.
    VOLATILE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
    -- Its statements, and those of what it calls, would be planned again for each search: half a millisecond.
    SET plan_cache_mode = force_generic_plan
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _access record;
    _slots jsonb;
    _expression text;
    _operator text;
    _key text;
    _same_key text;
    _passage text;
    _sent record;
    _sent_rows text;
    _rows text;
    _embeddings text;
    _key_order text;
    _own_key text;
    _table text;
    _rows_meant text;
    -- PostgreSQL takes a look-up of a row for one in each partition, and would read all rows instead.
    _has_partitions boolean;
    _lookup_start text;
    _lookup_end text;
    _end text;
    _bits integer;
    _hits text;
    -- A composite value has its long columns read. PostgreSQL makes a volatile one only for rows within a limit.
    _hit text;
BEGIN
    SELECT p.* INTO _pipeline FROM autoembed.pipeline AS p WHERE p.id = _search_target.pipeline_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = 'the table of the search is not attached to autoembed any more';
    END IF;
    table_id := _pipeline.table_id;
    is_beside := _pipeline.embeddings_table IS NOT NULL;
    is_chunked := is_beside AND _pipeline.chunking <> 'none';
    IF is_beside AND autoembed._has_foreign_types(_pipeline) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'datatype_mismatch',
            MESSAGE = format('columns of the embeddings table %s have other types than autoembed gave them',
                             _pipeline.embeddings_table),
            HINT = 'Give them their types again, or attach the table again.';
    END IF;
    SELECT t.reltuples, coalesce(e.reltuples BETWEEN 0 AND 1.05 * t.reltuples, false) INTO row_count, has_few_chunks
    FROM pg_class AS t
    LEFT JOIN pg_class AS e ON e.oid = _pipeline.embeddings_table
    WHERE t.oid = _pipeline.table_id;
    has_texts := autoembed._text_config(_pipeline.id) IS NOT NULL;
    vectors_table := coalesce(_pipeline.embeddings_table, _pipeline.table_id);
    model := coalesce(_pipeline.model, autoembed._default_model());
    _access := autoembed._vector_access(_pipeline);
    vector_type := _access.vector_type;
    _expression := _access.expression;
    _operator := _access.operator;
    has_index := EXISTS (
        SELECT FROM autoembed._vector_index(vectors_table, _pipeline.embedding_column) AS i WHERE i.indisvalid
    ) OR EXISTS (
        SELECT FROM pg_class AS c
        CROSS JOIN LATERAL autoembed._partition_tree(vectors_table) AS t
        CROSS JOIN LATERAL autoembed._vector_index(t.relid, _pipeline.embedding_column) AS i
        WHERE c.oid = vectors_table AND c.relkind = 'p' AND i.indisvalid
    );
    -- The text index has keys as lanes write them.
    _key := autoembed._key_expression(_pipeline, 't', 'autoembed._key_text(%s)');
    -- A match function has no right to call this.
    _own_key := autoembed._key_expression(_pipeline, 't', 'pg_catalog.record_send(ROW(%s))');
    _has_partitions := EXISTS (SELECT FROM pg_class AS c WHERE c.oid = table_id AND c.relkind = 'p');
    -- Rows of tables that inherit from it have keys of their own.
    _table := CASE WHEN _has_partitions THEN '' ELSE 'ONLY ' END || table_id;
    -- A condition stands behind the table's own name, and beside no other one.
    _rows_meant := format('(SELECT * FROM %s WHERE (', _table);
    _lookup_start := CASE WHEN _has_partitions THEN 'LATERAL (SELECT t.* FROM ' ELSE '' END || _rows_meant;
    _lookup_end := CASE WHEN _has_partitions THEN ')) AS t WHERE %s OFFSET 0) AS t' ELSE ')) AS t WHERE %s' END;
    -- Rows that are as near are in the same order in each search.
    SELECT string_agg(format('t.%I USING %s', k.name, autoembed._operator(table_id, k.name, 1)), ', ' ORDER BY k.number)
    INTO _key_order
    FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, number);
    _sent := autoembed._sent_keys(_pipeline);
    _sent_rows := format('(SELECT s.*, %s FROM %%s OFFSET 0) AS s', replace(_sent.key_values, '%', '%%'));
    _hits := format(
        _sent_rows,
        'ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), '
        'pg_catalog.unnest($5), pg_catalog.unnest($6)) AS s(rank, key, chunk_number, score, similarity, text_score)'
    );
    _rows := format(
        CASE WHEN _has_partitions THEN 'CROSS JOIN LATERAL (SELECT t.* FROM %s AS t WHERE %s OFFSET 0) AS t'
             ELSE 'JOIN %s AS t ON %s' END,
        _table, _sent.is_row
    );
    -- The types that initdb made stay as they are. The indexes of partitions come and go without their table.
    lasts := NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE (a.attrelid = _pipeline.table_id AND a.attname = ANY (_pipeline.key_columns)
               OR a.attrelid = _pipeline.embeddings_table AND a.attname <> _pipeline.embedding_column)
          AND a.atttypid >= 16384
    ) AND EXISTS (SELECT FROM pg_class AS c WHERE c.oid = vectors_table AND c.relkind <> 'p');
    -- The code of the owner gets no rights of the caller. A function of PostgreSQL's own can run any query.
    texts_query := CASE WHEN num_nonnulls(_pipeline.content_function, _pipeline.condition) = 0 THEN format(
        'SELECT h."autoembed key" AS key, %s AS content FROM (SELECT t.*, %s AS "autoembed key", '
        's.place AS "autoembed place", pg_catalog.sum(%s) OVER (ORDER BY s.place) AS "autoembed bytes" '
        'FROM %s %s) AS h '
        'WHERE h."autoembed bytes" OPERATOR(pg_catalog.<=) $2::pg_catalog.numeric',
        autoembed._content_expression(_pipeline, 'h'), _key, autoembed._content_bytes_expression(_pipeline, 't'),
        format(_sent_rows, 'pg_catalog.unnest($1) WITH ORDINALITY AS s(key, place)'), _rows
    ) END;
    matching_query := format(
        'SELECT %s AS key FROM %s CROSS JOIN %s',
        _key, format(_sent_rows, 'pg_catalog.unnest($1) AS s(key)'), _lookup_start
    );
    matching_end := format(_lookup_end, _sent.is_row);
    keys_query := format('SELECT %s AS key FROM %s', _key, _rows_meant);
    visible_start := format('SELECT s.place, %s AS key, ', _key);
    visible_distance := format(
        '%s %s $3::%s', CASE WHEN is_beside THEN 'e.' ELSE 't.' END || _expression, _operator, vector_type
    );
    visible_end := format(
        ' FROM %s %s %s',
        format(
            _sent_rows,
            'ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) WITH ORDINALITY AS s(key, number, place)'
        ),
        _rows, CASE
            WHEN is_beside THEN format(
                'JOIN %s AS e ON %s AND e.chunk_number OPERATOR(pg_catalog.=) s.number',
                vectors_table, _sent.is_embedding
            )
            ELSE format('WHERE t.%I IS NOT NULL', _pipeline.embedding_column)
        END
    );
    distances_query := format(
        'SELECT %s AS key, %s %s $1::%s AS distance, %s AS number FROM %s %s %s',
        _key, CASE WHEN is_beside THEN 'e.' ELSE 't.' END || _expression, _operator, vector_type,
        CASE WHEN is_beside THEN 'e.chunk_number' ELSE 'NULL::pg_catalog.int4' END,
        format(_sent_rows, 'pg_catalog.unnest($2) AS s(key)'), _rows, CASE
            WHEN is_beside THEN format('JOIN %s AS e ON %s', vectors_table, _sent.is_embedding)
            ELSE format('WHERE t.%I IS NOT NULL', _pipeline.embedding_column)
        END
    );

    -- The function is made again some time after such a change as it does not fit, and stays where none fits. An older
    -- snapshot still has it when it is gone.
    _slots := autoembed._nearest_rows_slots(_pipeline);
    IF _slots IS NOT NULL AND EXISTS (
        SELECT FROM pg_proc AS p
        WHERE p.oid = to_regprocedure(
            format('autoembed._nearest_rows_%s(text, boolean, integer, integer)', pipeline_id)
        ) AND p.prosrc = autoembed._filled(
            split_part(autoembed._function_template('nearest_rows'), '$body$', 2), _slots
        )
    ) THEN
        nearest_rows := format(
            'SELECT r.* FROM autoembed._nearest_rows_%s($7, $8, $9, $10) AS r(rank integer, hit %s, '
            'key pg_catalog.text, score double precision, chunk pg_catalog.text, chunk_number integer, '
            'chunk_start integer, chunk_end integer, similarity double precision, text_score double precision)',
            pipeline_id, table_id
        );
    END IF;
    _bits := CASE WHEN has_index THEN autoembed._bits_indexed(vectors_table, _pipeline.embedding_column) END;
    is_binary := _bits IS NOT NULL;
    -- The candidates of a binary index are compared by their vectors, and the nearest of them found.
    ef_search := coalesce(_pipeline.ef_search, CASE WHEN is_binary THEN 400 ELSE 100 END);
    _hit := format('CASE WHEN pg_catalog.clock_timestamp() IS NOT NULL THEN ROW(t.*)::%s END', _pipeline.table_id);
    IF NOT is_beside THEN
        match_start := format(
            'SELECT %s AS hit, %s AS key, %s %s $1::%s AS distance FROM %s',
            _hit, _own_key, 't.' || _expression, _operator, vector_type, _rows_meant
        );
        near_start := format(
            'SELECT %s AS key, %s %s $1::%s AS distance, NULL::pg_catalog.int4 AS number FROM %s',
            _key, 't.' || _expression, _operator, vector_type, _rows_meant
        );
        _end := format(')) AS t WHERE t.%I IS NOT NULL ORDER BY ', _pipeline.embedding_column);
        near_end := format('%s(%s %s $1::%s)', _end, 't.' || _expression, _operator, vector_type);
        -- No index has this order.
        exact_end := format('%s OPERATOR(pg_catalog.+) 0::pg_catalog.float8, %s', near_end, _key_order);
        IF is_binary THEN
            near_end := format(
                '%s(%s OPERATOR(@extschema:vector@.<~>) %s)', _end,
                autoembed._bits(format('t.%I', _pipeline.embedding_column), _bits),
                autoembed._bits('$1::' || vector_type, _bits)
            );
        END IF;
        rows_query := format(
            'SELECT s.rank, ROW(t.*)::%1$s, s.key, s.score, NULL::pg_catalog.text, NULL::pg_catalog.int4, '
            'NULL::pg_catalog.int4, NULL::pg_catalog.int4, s.similarity, s.text_score '
            'FROM %2$s %3$s ORDER BY s.rank',
            _pipeline.table_id, _hits, _rows
        );
        RETURN;
    END IF;

    -- No name of a column of the embeddings table can be meant in a condition.
    SELECT string_agg(format('e."autoembed %s" %s t.%I', k.number, autoembed._operator(
               _pipeline.table_id, k.name, 3), k.name), ' AND ' ORDER BY k.number)
    INTO _same_key
    FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, number);
    _embeddings := format(
        '(SELECT %s, v.chunk_number AS "autoembed number", v.%s AS "autoembed vector" FROM %s AS v) AS e',
        (SELECT string_agg(format('v.%I AS "autoembed %s"', k.name, k.number), ', ' ORDER BY k.number)
         FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, number)),
        _expression, vectors_table
    );
    match_start := format(
        'SELECT %s AS hit, %s AS key, e."autoembed vector" %s $1::%s AS distance FROM %s CROSS JOIN %s',
        _hit, _own_key, _operator, vector_type, _embeddings, _lookup_start
    );
    near_start := format(
        'SELECT %s AS key, e."autoembed vector" %s $1::%s AS distance, e."autoembed number" AS number '
        'FROM %s CROSS JOIN %s',
        _key, _operator, vector_type, _embeddings, _lookup_start
    );
    near_end := format(
        '%s ORDER BY (e."autoembed vector" %s $1::%s)', format(_lookup_end, _same_key), _operator, vector_type
    );
    exact_end := format(
        '%s WHERE %s ORDER BY (e."autoembed vector" %s $1::%s) OPERATOR(pg_catalog.+) 0::pg_catalog.float8, %s, '
        'e."autoembed number"',
        CASE WHEN _has_partitions THEN ')) AS t) AS t' ELSE ')) AS t' END, _same_key, _operator, vector_type, _key_order
    );
    IF is_binary THEN
        near_end := format(
            '%s ORDER BY (%s OPERATOR(@extschema:vector@.<~>) %s)',
            format(_lookup_end, _same_key), autoembed._bits('e."autoembed vector"', _bits),
            autoembed._bits('$1::' || vector_type, _bits)
        );
    END IF;
    _passage := autoembed._passage_of_hit(_pipeline);
    rows_query := format(
        'SELECT h.rank, h.hit, h.key, h.score, %s, h.number, h.start, h.stop, h.similarity, h.text_score FROM ('
        'SELECT s.*, ROW(t.*)::%s AS hit, e.chunk_number AS number, e.chunk_start AS start, e.chunk_end AS stop, '
        'e.digest FROM %s %s '
        'LEFT JOIN %5$s AS e ON e.chunk_number OPERATOR(pg_catalog.=) s.chunk_number AND %6$s ORDER BY s.rank) AS h',
        _passage, _pipeline.table_id, _hits, _rows, vectors_table, _sent.is_embedding
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._search_target IS
    'The facts that a search of a table needs. near_start, near_end: the query of keys, distances and numbers of '
    'chunks, nearest first, around a condition and before a limit. $1 is the vector. exact_end: the same without an '
    'index. is_binary: the index has bits, whose order is not that of the distances. match_start, near_end: that of '
    'rows and distances. has_index: whether an index may answer it. is_chunked: whether rows have several vectors. '
    'has_few_chunks: few of them do. row_count: about how many rows there are; below 1: not known. has_texts: whether '
    'it may go by words. distances_query: the same of the rows with keys $2. rows_query: the rows of search() with the '
    'ranks $1, keys $2, numbers of passages $3, and scores $4 to $6. visible_start, visible_end: which of the chunks '
    'with keys $1 and numbers $2 the caller may read, around visible_distance, which is that to the vector $3, or a '
    'NULL. matching_query, matching_end: which rows with keys $1 fulfil the condition between them. keys_query: which '
    'rows fulfil the condition behind it, before two brackets and AS t. ef_search: how many candidates an index keeps. '
    'texts_query: the present texts of the rows with keys $1, as many of the first as have $2 bytes; NULL: they are '
    'code of the table''s owner. nearest_rows: the query that finds and reads rows for the vector $7, by the index if '
    '$8, behind $9 of them, and $10 of them; NULL: there is none. lasts: '
    'this is true until _searched() gives another version, the table or that of the embeddings is altered, or '
    'PostgreSQL makes all plans again.';

CREATE OR REPLACE FUNCTION autoembed._lasting_target(pipeline_id integer, version text)
    RETURNS json
    LANGUAGE plpgsql
    -- PostgreSQL keeps the answer in the plan of a query, and asks again when it has to make another plan.
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (SELECT to_json(t) FROM autoembed._search_target(pipeline_id) AS t);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lasting_target IS
    'The facts of _search_target() for a query that names the table and that of the embeddings, so that a change of '
    'either, or another version, has it planned again. It is not for other queries: the facts change.';

CREATE OR REPLACE FUNCTION autoembed._sample_query(pipeline_id integer)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = _sample_query.pipeline_id;
    RETURN format(
        'SELECT v.%1$I::%2$s AS vector, %3$s AS key FROM %4$s AS v WHERE v.ctid OPERATOR(pg_catalog.=) ANY (ARRAY('
        'SELECT r.ctid FROM %4$s AS r WHERE r.%1$I IS NOT NULL ORDER BY pg_catalog.random() LIMIT $1))',
        _pipeline.embedding_column, '@extschema:vector@.vector',
        autoembed._key_expression(_pipeline, 'v', 'autoembed._key_text(%s)'),
        coalesce(_pipeline.embeddings_table, _pipeline.table_id)
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._sample_query IS
    'The query of $1 embeddings at random, with the keys of their rows.';
