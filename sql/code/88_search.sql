-- Search by meaning and by words. Conditions, policies and functions in them run with the rights of the caller and in
-- the caller's search_path. So all else in these functions is qualified.

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
    OUT query_tail text,
    OUT rows_start text,
    OUT pipeline_id integer,
    OUT of_keys text,
    OUT visible_query text,
    OUT matching_query text,
    OUT keys_query text,
    OUT has_plain_keys boolean,
    OUT texts_query text,
    OUT row_query text,
    OUT sample_query text,
    OUT ef_search integer
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
    _expression text;
    _operator text;
    _key text;
    _same_key text;
    _passage text;
    _sent_key text;
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
    model := (autoembed._model(_pipeline.model)).name;
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
    pipeline_id := _pipeline.id;
    SELECT string_agg(format(
               '%%1$s.%I %s (s.key::pg_catalog.jsonb OPERATOR(pg_catalog.->>) %s::pg_catalog.int4)::%I.%I',
               k.name, autoembed._operator(_pipeline.table_id, k.name, 3), k.number - 1, n.nspname, y.typname
           ), ' AND ' ORDER BY k.number),
           bool_and(a.atttypid IN (
               'bigint'::regtype, 'integer'::regtype, 'smallint'::regtype, 'numeric'::regtype, 'boolean'::regtype,
               'text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'name'::regtype, 'uuid'::regtype
           ))
    INTO _sent_key, has_plain_keys
    FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, number)
    JOIN pg_attribute AS a ON a.attrelid = _pipeline.table_id AND a.attname = k.name
    JOIN pg_type AS y ON y.oid = a.atttypid
    JOIN pg_namespace AS n ON n.oid = y.typnamespace;
    of_keys := format('EXISTS (SELECT FROM pg_catalog.unnest($2) AS s(key) WHERE %s)', format(_sent_key, 't'));
    matching_query := format(
        'SELECT %s AS key FROM %s AS t WHERE EXISTS (SELECT FROM pg_catalog.unnest($1) AS s(key) WHERE %s) AND (',
        _key, _pipeline.table_id, format(_sent_key, 't')
    );
    keys_query := format('SELECT %s AS key FROM %s AS t WHERE (', _key, _pipeline.table_id);
    visible_query := format(
        -- The caller needs the rights to all columns, as for the rows of a search.
        'SELECT s.place, %s AS key, ROW(t.*) IS NULL AS is_null '
        'FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) WITH ORDINALITY AS s(key, number, place) '
        'JOIN %s AS t ON %s WHERE %s',
        _key, _pipeline.table_id, format(_sent_key, 't'),
        CASE
            WHEN is_beside THEN format(
                'EXISTS (SELECT FROM %s AS e WHERE %s AND e.chunk_number OPERATOR(pg_catalog.=) s.number)',
                _vectors_table, format(_sent_key, 'e')
            )
            ELSE format('t.%I IS NOT NULL', _pipeline.embedding_column)
        END
    );

    ef_search := coalesce(_pipeline.ef_search, 100);
    sample_query := format(
        'SELECT v.%1$I::%2$s AS vector, %3$s AS key FROM %4$s AS v WHERE v.ctid OPERATOR(pg_catalog.=) ANY (ARRAY('
        'SELECT r.ctid FROM %4$s AS r WHERE r.%1$I IS NOT NULL ORDER BY pg_catalog.random() LIMIT $1))',
        _pipeline.embedding_column, '@extschema:vector@.vector', autoembed._key_expression(_pipeline, 'v'),
        _vectors_table
    );
    row_query := format(
        'SELECT ROW(t.*)::%1$s AS hit, %2$s AS key, NULL::pg_catalog.float8 AS distance, '
        'NULL::pg_catalog.int4 AS number, NULL::pg_catalog.int4 AS start, NULL::pg_catalog.int4 AS stop, '
        'NULL::pg_catalog.text AS chunk FROM %1$s AS t WHERE %3$s',
        _pipeline.table_id, _key, of_keys
    );
    -- A function of the owner gets no rights of the caller.
    texts_query := CASE WHEN _pipeline.content_function IS NULL AND _pipeline.condition_objects = '{}' THEN format(
        'SELECT h.key, h.place, %s AS content FROM (SELECT ROW(t.*)::%s AS hit, %s AS key, s.place, '
        'pg_catalog.sum(%s) OVER (ORDER BY s.place) AS bytes '
        'FROM pg_catalog.unnest($1) WITH ORDINALITY AS s(key, place) JOIN %2$s AS t ON %5$s) AS h '
        'WHERE h.bytes OPERATOR(pg_catalog.<=) $2::pg_catalog.numeric',
        autoembed._content_expression(_pipeline, '(h.hit)'), _pipeline.table_id, _key,
        autoembed._content_bytes_expression(_pipeline, 't'), format(_sent_key, 't')
    ) END;

    IF NOT is_beside THEN
        query_start := format(
            'SELECT ROW(t.*)::%1$s AS hit, %2$s AS key, %3$s %4$s $1::%5$s AS distance, '
            'NULL::pg_catalog.int4 AS number, NULL::pg_catalog.int4 AS start, NULL::pg_catalog.int4 AS stop, '
            'NULL::pg_catalog.text AS chunk FROM %1$s AS t WHERE t.%6$I IS NOT NULL AND (',
            _pipeline.table_id, _key, 't.' || _expression, _operator, vector_type, _pipeline.embedding_column
        );
        query_end := format(') ORDER BY (%s %s $1::%s)', 't.' || _expression, _operator, vector_type);
        query_tail := '';
        rows_start := query_start;
        RETURN;
    END IF;

    -- A condition names columns without their table. No name of a column of the embeddings table can be meant.
    SELECT string_agg(format('e."autoembed %s" %s t.%I', k.number, autoembed._operator(
               _pipeline.table_id, k.name, 3), k.name), ' AND ' ORDER BY k.number)
    INTO _same_key
    FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, number);
    _passage := autoembed._passage_expression(_pipeline, '(h.hit)', 'h.start', 'h.stop', 'h.digest');
    query_start := format('SELECT h.hit, h.key, h.distance, h.number, h.start, h.stop, %s AS chunk FROM (', _passage);
    rows_start := format(
        'SELECT ROW(t.*)::%s AS hit, %s AS key, e."autoembed vector" %s $1::%s AS distance, '
        'e."autoembed number" AS number, e."autoembed start" AS start, e."autoembed stop" AS stop, '
        'e."autoembed digest" AS digest FROM (SELECT %s, v.chunk_number AS "autoembed number", '
        'v.chunk_start AS "autoembed start", v.chunk_end AS "autoembed stop", v.digest AS "autoembed digest", '
        'v.%s AS "autoembed vector" FROM %s AS v) AS e JOIN %s AS t ON %s WHERE (',
        _pipeline.table_id, _key, _operator, vector_type,
        (SELECT string_agg(format('v.%I AS "autoembed %s"', k.name, k.number), ', ' ORDER BY k.number)
         FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, number)),
        _expression, _vectors_table, _pipeline.table_id, _same_key
    );
    query_start := query_start || rows_start;
    query_end := format(') ORDER BY (e."autoembed vector" %s $1::%s)', _operator, vector_type);
    query_tail := ') AS h';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._search_target IS
    'The facts that a search of a table needs. query_start, query_end, query_tail: the query of rows and distances, '
    'nearest first, around a condition and a limit. $1 is the vector. rows_start, query_end: the same without '
    'passages. has_index: whether an index may answer it. of_keys: that the row has one of the keys $2. '
    'visible_query: which of the chunks with keys $1 and numbers $2 the caller may read. matching_query, keys_query: '
    'which rows with keys $1, and which rows, fulfil the condition behind it. has_plain_keys: no setting of the '
    'session changes how keys are written. row_query: the rows with keys $2, with or without an embedding. '
    'texts_query: the present texts of the rows with keys $1, as many of the first as have $2 bytes; NULL: they are '
    'the owner''s code. sample_query: $1 vectors at random, with the keys of their rows. ef_search: how many '
    'candidates an index keeps.';

CREATE OR REPLACE FUNCTION autoembed._has_text_index(table_name regclass, embedding_column name)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT bool_or(autoembed._text_config(p.id) IS NOT NULL)
    FROM autoembed.pipeline AS p
    WHERE _has_text_index.table_name IN (p.table_id, p.embeddings_table)
      AND p.embedding_column = coalesce(_has_text_index.embedding_column, p.embedding_column);
$sql$;
COMMENT ON FUNCTION autoembed._has_text_index IS
    'Whether a search of a table may go by words. NULL: the table is not attached.';

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
    vector @extschema:vector@.vector,
    wanted integer,
    condition text,
    embedding_column name,
    by_index boolean DEFAULT NULL,
    ef_search integer DEFAULT NULL
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
    _by_index boolean;
    _limit integer;
    _fetched integer;
    _row record;
    -- The keys of this try, and those of all tries.
    _keys pg_catalog.text[];
    _returned pg_catalog.text[] := '{}';
BEGIN
    SELECT s.* INTO _target FROM autoembed._search_target(table_name, embedding_column) AS s;
    PERFORM pg_catalog.set_config(
        'hnsw.ef_search', coalesce(ef_search, _target.ef_search)::pg_catalog.text, true
    );
    _by_index := _target.has_index AND coalesce(
        by_index,
        (autoembed._estimated_matches(_target.table_id, condition) OPERATOR(pg_catalog.<=) _few) IS NOT TRUE
    );
    -- Several chunks of one row may be near.
    _limit := wanted OPERATOR(pg_catalog.+) CASE
        WHEN _target.is_beside THEN least(3 OPERATOR(pg_catalog.*) wanted, 50)
        ELSE 0
    END;
    LOOP
        _fetched := 0;
        _keys := '{}';
        FOR _row IN EXECUTE pg_catalog.concat(
            _target.query_start, coalesce(condition, 'true'), E'\n', _target.query_end,
            -- No index has this order.
            CASE WHEN NOT _by_index THEN ' OPERATOR(pg_catalog.+) 0::pg_catalog.float8' END,
            ' LIMIT ', _limit, _target.query_tail
        ) USING vector LOOP
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
    'The rows of a table that are nearest to a vector, at least as many as wanted if there are so many, and their '
    'nearest chunks, in no order. by_index, ef_search: NULL as suits the table.';

CREATE OR REPLACE FUNCTION autoembed._found_rows(
    like_row anyelement,
    table_name regclass,
    vector @extschema:vector@.vector,
    keys text[],
    chunk_numbers integer[],
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
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _target record;
BEGIN
    IF pg_catalog.cardinality(keys) OPERATOR(pg_catalog.=) 0 THEN
        RETURN;
    END IF;
    SELECT s.* INTO _target FROM autoembed._search_target(table_name, embedding_column) AS s;
    RETURN QUERY EXECUTE pg_catalog.concat(
        'SELECT DISTINCT ON (n.place) f.hit, f.key, f.distance, f.number, f.start, f.stop, f.chunk '
        'FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) WITH ORDINALITY AS n(key, number, place) '
        'JOIN ((',
        _target.query_start, _target.of_keys, _target.query_end, ' OPERATOR(pg_catalog.+) 0::pg_catalog.float8',
        _target.query_tail, ')',
        -- Rows that have no embedding yet.
        CASE WHEN 0 OPERATOR(pg_catalog.=) ANY (chunk_numbers) THEN ' UNION ALL ' END,
        CASE WHEN 0 OPERATOR(pg_catalog.=) ANY (chunk_numbers) THEN _target.row_query END,
        ') AS f ON f.key OPERATOR(pg_catalog.=) n.key AND ($1 IS NOT NULL OR coalesce(f.number, n.number) '
        'OPERATOR(pg_catalog.=) n.number) ORDER BY n.place, f.distance'
    ) USING vector, keys, chunk_numbers;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._found_rows IS
    'The rows of these keys that the caller may read, each with the chunk that is nearest to a vector; without one, '
    'with the chunk of that number. 0: the row may have none.';

CREATE OR REPLACE FUNCTION autoembed._text_matches(
    table_name regclass,
    embedding_column name,
    query text,
    wanted integer,
    condition text,
    keys text[]
)
    RETURNS TABLE (key text, chunk_number integer, score double precision, place integer)
    LANGUAGE plpython3u
    STABLE
    -- A plan would show the candidates to a caller who may not read them.
    SET debug_print_plan = off
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.text_matches(table_name, embedding_column, query, wanted, condition, keys)
$python$;
COMMENT ON FUNCTION autoembed._text_matches IS
    'The rows that match words best and that the caller may read, by BM25, with the score of their best chunk, in the '
    'order of place; and without a place those of keys that match, too. chunk_number 0: of the text as a whole, which '
    'has changed since it was embedded.';

CREATE OR REPLACE FUNCTION autoembed._ranked(
    like_row anyelement,
    table_name regclass,
    query text,
    max_rows integer,
    skip_rows integer,
    condition text,
    embedding_column name,
    mode text,
    vector_weight double precision
)
    RETURNS TABLE (
        rank integer,
        hit anyelement,
        key text,
        score double precision,
        chunk text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer,
        similarity double precision,
        text_score double precision
    )
    LANGUAGE plpgsql
    STABLE
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- So many of the nearest rows, and of the rows with the best words, are compared by both.
    _candidates CONSTANT integer := 100;
    _wanted integer := max_rows OPERATOR(pg_catalog.+) skip_rows;
    _has_texts boolean;
    _mode text;
    _vector @extschema:vector@.vector;
BEGIN
    IF max_rows IS NULL OR skip_rows IS NULL OR max_rows OPERATOR(pg_catalog.<) 0
       OR skip_rows OPERATOR(pg_catalog.<) 0 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('max_rows and skip_rows must be 0 or more, not %s and %s',
                                        coalesce(max_rows::pg_catalog.text, 'NULL'),
                                        coalesce(skip_rows::pg_catalog.text, 'NULL')),
            HINT = 'Leave them out for the ten nearest rows.';
    ELSIF mode OPERATOR(pg_catalog.<>) ALL ('{vector,text,hybrid}'::pg_catalog.text[]) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('mode must be hybrid, vector or text, not %s', mode),
            HINT = 'Leave it out for hybrid where the table has a text index, and for vector where it has none.';
    ELSIF (vector_weight OPERATOR(pg_catalog.>=) 0::double precision
           AND vector_weight OPERATOR(pg_catalog.<=) 1::double precision) IS NOT TRUE THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('vector_weight must be from 0 to 1, not %s',
                                        coalesce(vector_weight::pg_catalog.text, 'NULL')),
            HINT = 'Leave it out for 0.7.';
    END IF;
    _has_texts := autoembed._has_text_index(table_name, embedding_column);
    _mode := coalesce(mode, CASE WHEN _has_texts THEN 'hybrid' ELSE 'vector' END);
    IF _mode OPERATOR(pg_catalog.<>) 'vector'::pg_catalog.text AND NOT _has_texts THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = pg_catalog.format('table %s has no text index', table_name),
            HINT = pg_catalog.format('Add one: SELECT autoembed.alter_pipeline(%L, text_config => ''english'').',
                                     table_name);
    ELSIF query IS NULL OR pg_catalog.btrim(query, E' \t\r\n') OPERATOR(pg_catalog.=) ''::pg_catalog.text
          OR _wanted OPERATOR(pg_catalog.=) 0 THEN
        RETURN;
    END IF;

    IF _mode OPERATOR(pg_catalog.=) 'text'::pg_catalog.text THEN
        RETURN QUERY
        WITH matched AS MATERIALIZED (
            SELECT m.*
            FROM autoembed._text_matches(table_name, embedding_column, query, _wanted, condition, '{}') AS m
            WHERE m.place OPERATOR(pg_catalog.>) skip_rows
        )
        SELECT m.place, r.hit, m.key, m.score, r.chunk, r.chunk_number, r.chunk_start, r.chunk_end,
               NULL::double precision, m.score
        FROM autoembed._found_rows(
            like_row, table_name, NULL, ARRAY(SELECT m.key FROM matched AS m ORDER BY m.place),
            ARRAY(SELECT m.chunk_number FROM matched AS m ORDER BY m.place), embedding_column
        ) AS r
        JOIN matched AS m ON m.key OPERATOR(pg_catalog.=) r.key
        ORDER BY m.place;
        RETURN;
    END IF;
    _vector := autoembed.embed_query(table_name, query, embedding_column);
    IF _mode OPERATOR(pg_catalog.=) 'vector'::pg_catalog.text THEN
        RETURN QUERY
        SELECT s.rank::integer, s.hit, s.key, 1::double precision OPERATOR(pg_catalog.-) s.distance,
               s.chunk, s.chunk_number, s.chunk_start, s.chunk_end,
               1::double precision OPERATOR(pg_catalog.-) s.distance, NULL::double precision
        FROM (
            SELECT f.*, pg_catalog.row_number() OVER (ORDER BY f.distance, f.key) AS rank
            FROM autoembed._search(like_row, table_name, _vector, _wanted, condition, embedding_column) AS f
        ) AS s
        WHERE s.rank OPERATOR(pg_catalog.>) skip_rows
        ORDER BY s.rank
        LIMIT max_rows;
        RETURN;
    END IF;

    RETURN QUERY
    WITH near AS MATERIALIZED (
        SELECT f.*, pg_catalog.row_number() OVER (ORDER BY f.distance, f.key) AS place
        FROM autoembed._search(
            like_row, table_name, _vector, greatest(_wanted, _candidates), condition, embedding_column
        ) AS f
    ),
    matched AS MATERIALIZED (
        SELECT m.*
        FROM autoembed._text_matches(
            table_name, embedding_column, query, _candidates, condition,
            ARRAY(SELECT n.key FROM near AS n WHERE n.place OPERATOR(pg_catalog.<=) _candidates)
        ) AS m
    ),
    -- Rows with good words that are not among the nearest.
    other AS MATERIALIZED (
        SELECT m.key, m.chunk_number, m.place
        FROM matched AS m
        WHERE NOT EXISTS (
            SELECT FROM near AS n
            WHERE n.key OPERATOR(pg_catalog.=) m.key AND n.place OPERATOR(pg_catalog.<=) _candidates
        )
    ),
    candidate AS MATERIALIZED (
        SELECT c.*, 1::double precision OPERATOR(pg_catalog.-) c.distance AS similarity,
               coalesce(m.score, 0::double precision) AS text_score
        FROM (
            SELECT n.hit, n.key, n.distance, n.chunk_number, n.chunk_start, n.chunk_end, n.chunk
            FROM near AS n
            WHERE n.place OPERATOR(pg_catalog.<=) _candidates
            UNION ALL
            SELECT r.hit, r.key, r.distance, r.chunk_number, r.chunk_start, r.chunk_end, r.chunk
            FROM autoembed._found_rows(
                like_row, table_name, _vector, ARRAY(SELECT o.key FROM other AS o ORDER BY o.place),
                ARRAY(SELECT o.chunk_number FROM other AS o ORDER BY o.place), embedding_column
            ) AS r
        ) AS c
        LEFT JOIN matched AS m ON m.key OPERATOR(pg_catalog.=) c.key
    ),
    scored AS (
        SELECT c.*,
               -- Operators that are written in full all bind alike.
               (vector_weight OPERATOR(pg_catalog.*) coalesce(
                   (c.similarity OPERATOR(pg_catalog.-) b.least_similarity) OPERATOR(pg_catalog./) b.similarities,
                   0::double precision
               )) OPERATOR(pg_catalog.+) ((1::double precision OPERATOR(pg_catalog.-) vector_weight)
               OPERATOR(pg_catalog.*) coalesce(
                   (c.text_score OPERATOR(pg_catalog.-) b.least_text_score) OPERATOR(pg_catalog./) b.text_scores,
                   0::double precision
               )) AS score
        FROM candidate AS c
        CROSS JOIN (
            SELECT pg_catalog.min(c.similarity) AS least_similarity, pg_catalog.min(c.text_score) AS least_text_score,
                   nullif(pg_catalog.max(c.similarity) OPERATOR(pg_catalog.-) pg_catalog.min(c.similarity),
                          0::double precision) AS similarities,
                   nullif(pg_catalog.max(c.text_score) OPERATOR(pg_catalog.-) pg_catalog.min(c.text_score),
                          0::double precision) AS text_scores
            FROM candidate AS c
        ) AS b
    ),
    -- The nearest of all other rows come after the candidates.
    listed AS (
        SELECT s.hit, s.key, s.score, s.chunk, s.chunk_number, s.chunk_start, s.chunk_end, s.similarity, s.text_score,
               1 AS part
        FROM scored AS s
        UNION ALL
        SELECT n.hit, n.key, 0::double precision, n.chunk, n.chunk_number, n.chunk_start, n.chunk_end,
               1::double precision OPERATOR(pg_catalog.-) n.distance, NULL::double precision, 2
        FROM near AS n
        WHERE NOT EXISTS (SELECT FROM candidate AS c WHERE c.key OPERATOR(pg_catalog.=) n.key)
    )
    SELECT l.rank::integer, l.hit, l.key, l.score, l.chunk, l.chunk_number, l.chunk_start, l.chunk_end, l.similarity,
           l.text_score
    FROM (
        SELECT i.*, pg_catalog.row_number() OVER (
            ORDER BY i.part, i.score DESC, i.similarity DESC NULLS LAST, i.key
        ) AS rank
        FROM listed AS i
    ) AS l
    WHERE l.rank OPERATOR(pg_catalog.>) skip_rows
    ORDER BY l.rank
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
    embedding_column name DEFAULT NULL,
    mode text DEFAULT NULL,
    vector_weight double precision DEFAULT 0.7
)
    RETURNS TABLE (
        rank integer,
        hit anyelement,
        key text,
        score double precision,
        chunk text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer,
        similarity double precision,
        text_score double precision
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
    SELECT r.*
    FROM autoembed._ranked(
        like_row, _table, query, max_rows, skip_rows, condition, embedding_column, mode, vector_weight
    ) AS r;
END;
$plpgsql$;

CREATE OR REPLACE FUNCTION autoembed.search(
    table_name regclass,
    query text,
    max_rows integer DEFAULT 10,
    skip_rows integer DEFAULT 0,
    condition text DEFAULT NULL,
    embedding_column name DEFAULT NULL,
    mode text DEFAULT NULL,
    vector_weight double precision DEFAULT 0.7
)
    RETURNS TABLE (
        rank integer,
        key text,
        score double precision,
        chunk text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer,
        similarity double precision,
        text_score double precision
    )
    LANGUAGE plpgsql
    STABLE
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _table pg_catalog.regclass := (SELECT s.table_id FROM autoembed._search_target(table_name, embedding_column) AS s);
BEGIN
    RETURN QUERY EXECUTE pg_catalog.format(
        'SELECT s.rank, s.key, s.score, s.chunk, s.chunk_number, s.chunk_start, s.chunk_end, s.similarity, '
        's.text_score FROM autoembed._ranked(NULL::%s, $1, $2, $3, $4, $5, $6, $7, $8) AS s', _table
    ) USING table_name, query, max_rows, skip_rows, condition, embedding_column, mode, vector_weight;
END;
$plpgsql$;

-- A literal without a type is a text. It is a name in the caller's search_path.
CREATE OR REPLACE FUNCTION autoembed.search(
    table_name text,
    query text,
    max_rows integer DEFAULT 10,
    skip_rows integer DEFAULT 0,
    condition text DEFAULT NULL,
    embedding_column name DEFAULT NULL,
    mode text DEFAULT NULL,
    vector_weight double precision DEFAULT 0.7
)
    RETURNS TABLE (
        rank integer,
        key text,
        score double precision,
        chunk text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer,
        similarity double precision,
        text_score double precision
    )
    LANGUAGE sql
    STABLE
AS $sql$
    SELECT s.*
    FROM autoembed.search(
        table_name::pg_catalog.regclass, query, max_rows, skip_rows, condition, embedding_column, mode, vector_weight
    ) AS s;
$sql$;
COMMENT ON FUNCTION autoembed.search(anyelement, text, integer, integer, text, name, text, double precision) IS
    'The rows of a table that answer a text best, best first, with the rights of the caller: max_rows of them, after '
    'skip_rows. like_row: NULL::the_table. condition: of the rows that are wanted, as in WHERE. mode: vector, by '
    'meaning; text, by words (BM25); hybrid, by both, which is the default where the table has a text index. '
    'vector_weight: the share of the meaning in hybrid. score: what orders the rows. similarity: of the embeddings, '
    'from -1 to 1. chunk: the passage that is nearest, if the embeddings are beside the rows and the text has not '
    'changed since.';
COMMENT ON FUNCTION autoembed.search(regclass, text, integer, integer, text, name, text, double precision) IS
    'The same for a table that is named, not given by its row type. Tells the rows by their keys, as JSON arrays.';
COMMENT ON FUNCTION autoembed.search(text, text, integer, integer, text, name, text, double precision) IS
    'The same for the name of a table.';

CREATE OR REPLACE FUNCTION autoembed.search_rows(
    like_row anyelement,
    query text,
    max_rows integer DEFAULT 10,
    skip_rows integer DEFAULT 0,
    condition text DEFAULT NULL,
    embedding_column name DEFAULT NULL,
    mode text DEFAULT NULL,
    vector_weight double precision DEFAULT 0.7
)
    RETURNS SETOF anyelement
    LANGUAGE plpgsql
    STABLE
    ROWS 10
AS $plpgsql$
BEGIN
    RETURN QUERY
    SELECT (s.hit).*
    FROM autoembed.search(
        like_row, query, max_rows, skip_rows, condition, embedding_column, mode, vector_weight
    ) AS s
    ORDER BY s.rank;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.search_rows IS 'The rows that search() finds, in its order.';

CREATE OR REPLACE FUNCTION autoembed._search_model(table_name regclass, embedding_column name)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _models text[] := ARRAY(
        SELECT coalesce(p.model, autoembed._default_model())
        FROM autoembed.pipeline AS p
        WHERE table_name IN (p.table_id, p.embeddings_table)
          AND p.embedding_column = coalesce(_search_model.embedding_column, p.embedding_column)
    );
BEGIN
    IF cardinality(_models) = 1 THEN
        RETURN _models[1];
    END IF;
    -- The one search to which this belongs cannot be told. This raises its error.
    RETURN (SELECT s.model FROM autoembed._search_target(table_name, embedding_column) AS s);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._search_model IS 'The model of the embeddings of a table that a search compares.';

CREATE OR REPLACE FUNCTION autoembed.embed_query(
    table_name regclass,
    query text,
    embedding_column name DEFAULT NULL
)
    RETURNS @extschema:vector@.vector
    LANGUAGE plpgsql
    STABLE
    COST 1000
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN autoembed.embed(query, autoembed._search_model(table_name, embedding_column));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.embed_query IS
    'The embedding of a search text by the model of a table. ORDER BY embedding <=> (SELECT autoembed.embed_query(…))'
    ' calls it once, and uses the index.';

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
    SELECT s.* INTO _target FROM autoembed._search_target(table_name, embedding_column) AS s;
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
           -- A vector as JSON takes long, and nobody filters by it.
           string_agg(format('t.%I', a.attname), ', ' ORDER BY a.attnum)
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
            '((CASE WHEN pg_catalog.jsonb_typeof(t.metadata) OPERATOR(pg_catalog.=) ''object''::pg_catalog.text '
            'THEN t.metadata ELSE ''{}''::pg_catalog.jsonb END) OPERATOR(pg_catalog.||) %s)', _row
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
            WHEN _target.is_beside THEN
                '_wanted OPERATOR(pg_catalog.+) least(3::pg_catalog.int8 OPERATOR(pg_catalog.*) _wanted, 50)'
            ELSE '_wanted'
        END,
        'start', quote_literal(_target.rows_start),
        'end', quote_literal(_target.query_end),
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
    _made record;
BEGIN
    PERFORM autoembed._check_owner(table_name);
    SELECT m.* INTO _made
    FROM autoembed._match_function(
        table_name, create_match_function.name, create_match_function.embedding_column
    ) AS m;
    EXECUTE _made.statement;
    EXECUTE format(
        'COMMENT ON FUNCTION %s IS %L', _made.signature,
        format('The rows of %s that are nearest to a vector, with the rights of the caller. '
               'Made by autoembed.create_match_function().', table_name)
    );
    RETURN _made.signature::regprocedure;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.create_match_function IS
    'Makes, for the caller, the function match_TABLE(query_embedding, match_count, filter) that clients of Supabase '
    'and LangChain call: the nearest rows of a table and their similarity, with the rights of the one that calls it. '
    'It replaces a function of the same name, arguments and columns. Call it again when the columns, the name or the '
    'embedding of the table have changed.';
