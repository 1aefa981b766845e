-- Search by meaning. Conditions, policies and functions in them run with the rights of the caller and in the caller's
-- search_path. So all else in these functions is qualified.

CREATE OR REPLACE FUNCTION autoembed._search_target(
    table_name regclass,
    embedding_column name,
    OUT table_id regclass,
    OUT model text,
    OUT vector_type text,
    OUT is_beside boolean,
    OUT has_index boolean,
    OUT query_start text,
    OUT query_end text,
    OUT query_tail text
)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
DECLARE
    _pipelines autoembed.pipeline[] := ARRAY(
        SELECT p
        FROM autoembed.pipeline AS p
        WHERE _search_target.table_name IN (p.table_id, p.embeddings_table)
          AND p.embedding_column = coalesce(_search_target.embedding_column, p.embedding_column)
        ORDER BY p.id
    );
    _pipeline autoembed.pipeline;
    _vectors_table regclass;
    _identity text;
    _expression text;
    _operator text;
    _key text;
    _same_key text;
    _passage text;
BEGIN
    IF cardinality(_pipelines) = 0 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = CASE
                WHEN embedding_column IS NULL THEN format('table %s is not attached to autoembed', table_name)
                ELSE format('column "%s" of table %s is not attached to autoembed', embedding_column, table_name)
            END,
            HINT = format('Attach it: SELECT autoembed.enable(%L, …).', table_name);
    ELSIF cardinality(_pipelines) > 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'ambiguous_column',
            MESSAGE = format('table %s has several embeddings', table_name),
            HINT = (
                SELECT 'Name one of them: ' || string_agg(CASE
                    WHEN f.embeddings_table IS NULL THEN format('embedding_column => %L', f.embedding_column)
                    ELSE format('table_name => %L', f.embeddings_table)
                END, ' or ') || '.'
                FROM unnest(_pipelines) AS f
            );
    END IF;
    _pipeline := _pipelines[1];
    table_id := _pipeline.table_id;
    is_beside := _pipeline.embeddings_table IS NOT NULL;
    _vectors_table := coalesce(_pipeline.embeddings_table, _pipeline.table_id);
    SELECT m.name, autoembed._model_identity(m) INTO model, _identity FROM autoembed._model(_pipeline.model) AS m;
    SELECT v.full_name, format('OPERATOR(%I.<=>)', n.nspname) INTO vector_type, _operator
    FROM pg_attribute AS a
    JOIN autoembed._vector_types() AS v ON v.id = a.atttypid
    JOIN pg_type AS t ON t.oid = v.id
    JOIN pg_namespace AS n ON n.oid = t.typnamespace
    WHERE a.attrelid = _vectors_table AND a.attname = _pipeline.embedding_column;
    SELECT k.expression INTO _expression FROM autoembed._index_key(_pipeline) AS k;
    IF _expression LIKE '%::%' THEN
        vector_type := substring(_expression FROM '::(.*)$');
    END IF;
    has_index := EXISTS (
        SELECT FROM pg_partition_tree(_vectors_table) AS t
        CROSS JOIN LATERAL autoembed._vector_index(t.relid, _pipeline.embedding_column) AS i
        WHERE i.indisvalid
    ) OR EXISTS (
        SELECT FROM autoembed._vector_index(_vectors_table, _pipeline.embedding_column) AS i WHERE i.indisvalid
    );
    _key := autoembed._key_expression(_pipeline, 't');

    IF NOT is_beside THEN
        query_start := format(
            'SELECT ROW(t.*)::%1$s AS hit, %2$s AS key, %3$s %4$s $1::%5$s AS distance, '
            'NULL::pg_catalog.int4 AS number, NULL::pg_catalog.int4 AS start, NULL::pg_catalog.int4 AS stop, '
            'NULL::pg_catalog.text AS chunk FROM %1$s AS t WHERE t.%6$I IS NOT NULL AND (',
            _pipeline.table_id, _key, 't.' || _expression, _operator, vector_type, _pipeline.embedding_column
        );
        query_end := format(') ORDER BY (%s %s $1::%s)', 't.' || _expression, _operator, vector_type);
        query_tail := '';
        RETURN;
    END IF;

    -- A condition names columns without their table. No name of a column of the embeddings table can be meant.
    SELECT string_agg(format('e."autoembed %s" %s t.%I', k.number, autoembed._operator(
               _pipeline.table_id, k.name, 3), k.name), ' AND ' ORDER BY k.number)
    INTO _same_key
    FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, number);
    -- The text is not shown if it has changed since. A function of the owner gets no rights of the caller.
    _pipeline.condition := NULL;
    _passage := CASE WHEN _pipeline.content_function IS NULL THEN format(
        '(SELECT p.part FROM (SELECT pg_catalog.substr(%s, h.start OPERATOR(pg_catalog.+) 1, '
        'h.stop OPERATOR(pg_catalog.-) h.start) AS part OFFSET 0) AS p '
        'WHERE pg_catalog.substring(pg_catalog.sha256(%L::pg_catalog.bytea OPERATOR(pg_catalog.||) '
        'pg_catalog.convert_to(p.part, ''UTF8'')), 1, 16) OPERATOR(pg_catalog.=) h.digest)',
        autoembed._content_expression(_pipeline, '(h.hit)'), sha256(convert_to(_identity, 'UTF8'))
    ) ELSE 'NULL::pg_catalog.text' END;
    query_start := format(
        'SELECT h.hit, h.key, h.distance, h.number, h.start, h.stop, %s AS chunk FROM ('
        'SELECT ROW(t.*)::%s AS hit, %s AS key, e."autoembed vector" %s $1::%s AS distance, '
        'e."autoembed number" AS number, e."autoembed start" AS start, e."autoembed stop" AS stop, '
        'e."autoembed digest" AS digest FROM (SELECT %s, v.chunk_number AS "autoembed number", '
        'v.chunk_start AS "autoembed start", v.chunk_end AS "autoembed stop", v.digest AS "autoembed digest", '
        'v.%s AS "autoembed vector" FROM %s AS v) AS e JOIN %s AS t ON %s WHERE (',
        _passage, _pipeline.table_id, _key, _operator, vector_type,
        (SELECT string_agg(format('v.%I AS "autoembed %s"', k.name, k.number), ', ' ORDER BY k.number)
         FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, number)),
        _expression, _vectors_table, _pipeline.table_id, _same_key
    );
    query_end := format(') ORDER BY (e."autoembed vector" %s $1::%s)', _operator, vector_type);
    query_tail := ') AS h';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._search_target IS
    'The facts that a search of a table needs. query_start, query_end, query_tail: the query of rows and distances, '
    'nearest first, around a condition and a limit. $1 is the vector. has_index: whether an index may answer it.';

CREATE OR REPLACE FUNCTION autoembed._estimated_matches(table_id regclass, condition text)
    RETURNS double precision
    LANGUAGE plpgsql
    -- A STABLE function may not use EXPLAIN.
    VOLATILE
AS $plpgsql$
DECLARE
    _plan pg_catalog.json;
BEGIN
    IF condition IS NULL AND NOT pg_catalog.row_security_active(table_id) THEN
        RETURN (
            SELECT c.reltuples
            FROM pg_catalog.pg_class AS c
            WHERE c.oid OPERATOR(pg_catalog.=) table_id
              AND c.reltuples OPERATOR(pg_catalog.>=) 0::pg_catalog.float4
        );
    END IF;
    EXECUTE pg_catalog.concat(
        'EXPLAIN (FORMAT JSON) SELECT FROM ', table_id, ' AS t WHERE (', coalesce(condition, 'true'), E'\n)'
    ) INTO _plan;
    RETURN (_plan OPERATOR(pg_catalog.#>>) '{0,Plan,Plan Rows}'::pg_catalog.text[])::double precision;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._estimated_matches IS
    'The number of rows of a table that the planner expects to fulfil a condition and the policies for the caller. '
    'NULL: not known.';

CREATE OR REPLACE FUNCTION autoembed._search(
    like_row anyelement,
    table_name regclass,
    query text,
    wanted integer,
    condition text,
    embedding_column name
)
    RETURNS TABLE (
        hit anyelement,
        key text,
        distance double precision,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer,
        chunk text
    )
    LANGUAGE plpgsql
    STABLE
    -- An index gives as many rows as are asked for, whatever the condition and the policies leave out.
    SET hnsw.iterative_scan = 'strict_order'
    SET hnsw.ef_search = 100
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- So many rows are compared one by one sooner than an index finds the nearest of them among others.
    _few CONSTANT double precision := 5000::double precision;
    _target record;
    _vector @extschema:vector@.vector;
    _by_index boolean;
    _limit integer;
    _fetched integer;
    _row record;
    -- The keys of this try, and those of all tries.
    _keys pg_catalog.text[];
    _returned pg_catalog.text[] := '{}';
BEGIN
    IF query IS NULL OR pg_catalog.btrim(query, E' \t\r\n') OPERATOR(pg_catalog.=) ''::pg_catalog.text
       OR wanted OPERATOR(pg_catalog.=) 0 THEN
        RETURN;
    END IF;
    SELECT s.* INTO _target FROM autoembed._search_target(table_name, embedding_column) AS s;
    _vector := autoembed.embed(query, _target.model);
    _by_index := _target.has_index
        AND (autoembed._estimated_matches(_target.table_id, condition) OPERATOR(pg_catalog.<=) _few) IS NOT TRUE;
    -- Several chunks of one row may be near.
    _limit := CASE WHEN _target.is_beside THEN 4 ELSE 1 END OPERATOR(pg_catalog.*) wanted;
    LOOP
        _fetched := 0;
        _keys := '{}';
        FOR _row IN EXECUTE pg_catalog.concat(
            _target.query_start, coalesce(condition, 'true'), E'\n', _target.query_end,
            -- No index has this order.
            CASE WHEN NOT _by_index THEN ' OPERATOR(pg_catalog.+) 0::pg_catalog.float8' END,
            ' LIMIT ', _limit, _target.query_tail
        ) USING _vector LOOP
            _fetched := _fetched OPERATOR(pg_catalog.+) 1;
            CONTINUE WHEN _row.key OPERATOR(pg_catalog.=) ANY (_keys);
            _keys := pg_catalog.array_append(_keys, _row.key);
            IF _row.key OPERATOR(pg_catalog.<>) ALL (_returned) THEN
                _returned := pg_catalog.array_append(_returned, _row.key);
                hit := _row.hit; key := _row.key; distance := _row.distance;
                chunk := _row.chunk; chunk_number := _row.number; chunk_start := _row.start; chunk_end := _row.stop;
                RETURN NEXT;
            END IF;
            EXIT WHEN pg_catalog.cardinality(_keys) OPERATOR(pg_catalog.>=) wanted;
        END LOOP;
        EXIT WHEN pg_catalog.cardinality(_keys) OPERATOR(pg_catalog.>=) wanted
            OR _fetched OPERATOR(pg_catalog.<) _limit AND NOT _by_index;
        IF _fetched OPERATOR(pg_catalog.<) _limit THEN
            -- The index has given up before it had as many.
            _by_index := false;
        ELSE
            _limit := 4 OPERATOR(pg_catalog.*) _limit;
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._search IS
    'The nearest rows of a table, at least as many as wanted if there are so many, and their nearest chunks, in no '
    'order.';

CREATE OR REPLACE FUNCTION autoembed._ranked(
    like_row anyelement,
    table_name regclass,
    query text,
    max_rows integer,
    skip_rows integer,
    condition text,
    embedding_column name
)
    RETURNS TABLE (
        rank integer,
        hit anyelement,
        key text,
        score double precision,
        chunk text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer
    )
    LANGUAGE plpgsql
    STABLE
AS $plpgsql$
#variable_conflict use_column
BEGIN
    IF max_rows IS NULL OR skip_rows IS NULL OR max_rows OPERATOR(pg_catalog.<) 0
       OR skip_rows OPERATOR(pg_catalog.<) 0 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('max_rows and skip_rows must be 0 or more, not %s and %s',
                                        coalesce(max_rows::pg_catalog.text, 'NULL'),
                                        coalesce(skip_rows::pg_catalog.text, 'NULL')),
            HINT = 'Leave them out for the ten nearest rows.';
    END IF;
    RETURN QUERY
    SELECT s.rank::integer, s.hit, s.key, 1::double precision OPERATOR(pg_catalog.-) s.distance,
           s.chunk, s.chunk_number, s.chunk_start, s.chunk_end
    FROM (
        SELECT f.*, pg_catalog.row_number() OVER (ORDER BY f.distance, f.key) AS rank
        FROM autoembed._search(
            like_row, table_name, query, max_rows OPERATOR(pg_catalog.+) skip_rows, condition, embedding_column
        ) AS f
    ) AS s
    WHERE s.rank OPERATOR(pg_catalog.>) skip_rows
    ORDER BY s.rank
    LIMIT max_rows;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._ranked IS
    'Does the work of search(). like_row: NULL with the type of the table''s rows.';

CREATE OR REPLACE FUNCTION autoembed.search(
    like_row anyelement,
    query text,
    max_rows integer DEFAULT 10,
    skip_rows integer DEFAULT 0,
    condition text DEFAULT NULL,
    embedding_column name DEFAULT NULL
)
    RETURNS TABLE (
        rank integer,
        hit anyelement,
        key text,
        score double precision,
        chunk text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer
    )
    LANGUAGE plpgsql
    STABLE
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _table pg_catalog.regclass := (
        SELECT t.typrelid FROM pg_catalog.pg_type AS t
        WHERE t.oid OPERATOR(pg_catalog.=) pg_catalog.pg_typeof(like_row)
    );
BEGIN
    IF coalesce(_table::pg_catalog.oid, 0::pg_catalog.oid) OPERATOR(pg_catalog.=) 0::pg_catalog.oid THEN
        RAISE EXCEPTION USING
            ERRCODE = 'datatype_mismatch',
            MESSAGE = pg_catalog.format('search() needs a row of a table, not a value of type %s',
                                        pg_catalog.pg_typeof(like_row)),
            HINT = 'For example: SELECT * FROM autoembed.search(NULL::documents, ''words'').';
    END IF;
    RETURN QUERY
    SELECT r.* FROM autoembed._ranked(like_row, _table, query, max_rows, skip_rows, condition, embedding_column) AS r;
END;
$plpgsql$;

CREATE OR REPLACE FUNCTION autoembed.search(
    table_name regclass,
    query text,
    max_rows integer DEFAULT 10,
    skip_rows integer DEFAULT 0,
    condition text DEFAULT NULL,
    embedding_column name DEFAULT NULL
)
    RETURNS TABLE (
        rank integer,
        key text,
        score double precision,
        chunk text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer
    )
    LANGUAGE plpgsql
    STABLE
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _table pg_catalog.regclass := (SELECT s.table_id FROM autoembed._search_target(table_name, embedding_column) AS s);
BEGIN
    RETURN QUERY EXECUTE pg_catalog.format(
        'SELECT s.rank, s.key, s.score, s.chunk, s.chunk_number, s.chunk_start, s.chunk_end '
        'FROM autoembed._ranked(NULL::%s, $1, $2, $3, $4, $5, $6) AS s', _table
    ) USING table_name, query, max_rows, skip_rows, condition, embedding_column;
END;
$plpgsql$;

-- A literal without a type is a text. It is a name in the caller's search_path.
CREATE OR REPLACE FUNCTION autoembed.search(
    table_name text,
    query text,
    max_rows integer DEFAULT 10,
    skip_rows integer DEFAULT 0,
    condition text DEFAULT NULL,
    embedding_column name DEFAULT NULL
)
    RETURNS TABLE (
        rank integer,
        key text,
        score double precision,
        chunk text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer
    )
    LANGUAGE sql
    STABLE
AS $sql$
    SELECT s.*
    FROM autoembed.search(
        table_name::pg_catalog.regclass, query, max_rows, skip_rows, condition, embedding_column
    ) AS s;
$sql$;
COMMENT ON FUNCTION autoembed.search(anyelement, text, integer, integer, text, name) IS
    'The rows of a table whose embeddings are nearest to a text, nearest first, with the rights of the caller: '
    'max_rows of them, after skip_rows. like_row: NULL::the_table. condition: of the rows that are wanted, as in '
    'WHERE. score: the cosine similarity, from -1 to 1. chunk: the passage that is nearest, if the embeddings are '
    'beside the rows and the text has not changed since.';
COMMENT ON FUNCTION autoembed.search(regclass, text, integer, integer, text, name) IS
    'The same for a table that is not known beforehand: its rows by their keys, as JSON arrays.';
COMMENT ON FUNCTION autoembed.search(text, text, integer, integer, text, name) IS
    'The same for the name of a table.';

CREATE OR REPLACE FUNCTION autoembed.search_rows(
    like_row anyelement,
    query text,
    max_rows integer DEFAULT 10,
    skip_rows integer DEFAULT 0,
    condition text DEFAULT NULL,
    embedding_column name DEFAULT NULL
)
    RETURNS SETOF anyelement
    LANGUAGE plpgsql
    STABLE
    ROWS 10
AS $plpgsql$
BEGIN
    RETURN QUERY
    SELECT (s.hit).*
    FROM autoembed.search(like_row, query, max_rows, skip_rows, condition, embedding_column) AS s
    ORDER BY s.rank;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.search_rows IS 'The rows that search() finds, in its order.';

CREATE OR REPLACE FUNCTION autoembed.embed_query(
    table_name regclass,
    query text,
    embedding_column name DEFAULT NULL
)
    RETURNS @extschema:vector@.vector
    LANGUAGE plpgsql
    STABLE
    PARALLEL RESTRICTED
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN autoembed.embed(query, (SELECT s.model FROM autoembed._search_target(table_name, embedding_column) AS s));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.embed_query IS
    'The embedding of a search text by the model of a table. ORDER BY embedding <=> (SELECT autoembed.embed_query(…))'
    ' calls it once, and uses the index.';
