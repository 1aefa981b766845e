-- The quality of the answers of a search, by judgments of the user's own.

CREATE OR REPLACE FUNCTION autoembed._search_quality(
    found jsonb,
    grades jsonb,
    max_rows integer,
    OUT ndcg double precision,
    OUT ndcg_low double precision,
    OUT ndcg_high double precision,
    OUT mrr double precision,
    OUT mrr_low double precision,
    OUT mrr_high double precision,
    OUT recall double precision,
    OUT recall_low double precision,
    OUT recall_high double precision
)
    LANGUAGE plpython3u
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.search_quality(found, grades, max_rows)
$python$;
COMMENT ON FUNCTION autoembed._search_quality IS
    'The mean quality of answers, and its interval. found: for each query the grades of the rows that were found, best '
    'first. grades: for each query those of all rows that answer it.';

CREATE OR REPLACE FUNCTION autoembed._judgments(judgments regclass)
    RETURNS TABLE (query text, keys jsonb, grades jsonb)
    LANGUAGE plpgsql
AS $plpgsql$
DECLARE
    _missing pg_catalog.text := (
        SELECT pg_catalog.string_agg(pg_catalog.quote_ident(n.name), ', ')
        FROM pg_catalog.unnest('{query,key}'::pg_catalog.text[]) AS n(name)
        WHERE NOT EXISTS (
            SELECT FROM pg_catalog.pg_attribute AS a
            WHERE a.attrelid OPERATOR(pg_catalog.=) judgments::pg_catalog.oid AND NOT a.attisdropped
              AND a.attname OPERATOR(pg_catalog.=) n.name
        )
    );
    -- A key in JSON is the text of its value. Any other is written as search() writes keys.
    _key CONSTANT pg_catalog.text := (
        SELECT CASE
            WHEN a.atttypid OPERATOR(pg_catalog.=) ANY (ARRAY[
                'pg_catalog.json'::pg_catalog.regtype, 'pg_catalog.jsonb'::pg_catalog.regtype
            ]::pg_catalog.oid[]) THEN 't.key::pg_catalog.jsonb OPERATOR(pg_catalog.#>>) ''{}''::pg_catalog.text[]'
            ELSE 'CASE WHEN pg_catalog.num_nulls(t.key) OPERATOR(pg_catalog.=) 0 THEN autoembed._key_text(t.key) END'
        END
        FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid OPERATOR(pg_catalog.=) judgments::pg_catalog.oid
          AND a.attname OPERATOR(pg_catalog.=) 'key'::pg_catalog.name
    );
    _left_out pg_catalog.int8;
    _no_number pg_catalog.text;
BEGIN
    IF judgments IS NULL THEN
        RAISE EXCEPTION USING 
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'judgments must not be NULL',
            HINT = 'Give a table or view with the columns query and key.';
    END IF;
    IF _missing IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_column',
            MESSAGE = pg_catalog.format('the judgments %s have no column %s', judgments, _missing),
            HINT = 'They need query, a text; key, of a row that answers it; and may have grade, how well, above 0.';
    END IF;
    EXECUTE pg_catalog.format(
        'SELECT pg_catalog.count(*) FROM (SELECT pg_catalog.to_jsonb(t.*) AS one FROM %s AS t) AS j '
        'WHERE pg_catalog.num_nulls(j.one OPERATOR(pg_catalog.->>) ''query'', j.one OPERATOR(pg_catalog.->>) ''key'') '
        'OPERATOR(pg_catalog.>) 0 '
        'OR j.one OPERATOR(pg_catalog.->) ''grade'' OPERATOR(pg_catalog.=) ''null''::pg_catalog.jsonb',
        judgments
    ) INTO _left_out;
    IF _left_out OPERATOR(pg_catalog.>) 0 THEN
        RAISE NOTICE USING
            MESSAGE = pg_catalog.format('%s of the judgments %s have no query, key or grade, and do not count',
                                        _left_out, judgments);
    END IF;
    EXECUTE pg_catalog.format(
        'SELECT pg_catalog.min(j.one OPERATOR(pg_catalog.->>) ''grade'') '
        'FROM (SELECT pg_catalog.to_jsonb(t.*) AS one FROM %s AS t) AS j '
        'WHERE (pg_catalog.pg_input_is_valid(j.one OPERATOR(pg_catalog.->>) ''grade'', ''pg_catalog.float8'') '
        'AND pg_catalog.lower(pg_catalog.btrim(j.one OPERATOR(pg_catalog.->>) ''grade'')) '
        'OPERATOR(pg_catalog.!~) ''^([+-]?inf|nan)'') IS FALSE',
        judgments
    ) INTO _no_number;
    IF _no_number IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('the judgments %s have the grade %s, which is no number',
                                        judgments, pg_catalog.left(_no_number, 100)),
            HINT = 'A grade tells how well the row answers: a number above 0.';
    END IF;
    RETURN QUERY EXECUTE pg_catalog.format(
        'SELECT g.query, pg_catalog.jsonb_agg(g.key), pg_catalog.jsonb_agg(g.grade) FROM ('
        'SELECT j.one OPERATOR(pg_catalog.->>) ''query'' AS query, j.key, '
        'pg_catalog.max(CASE WHEN j.one OPERATOR(pg_catalog.?) ''grade'' '
        'THEN (j.one OPERATOR(pg_catalog.->>) ''grade'')::pg_catalog.float8 ELSE 1 END) AS grade '
        'FROM (SELECT pg_catalog.to_jsonb(t.*) AS one, %s AS key FROM %s AS t) AS j GROUP BY 1, 2) AS g '
        'WHERE g.grade OPERATOR(pg_catalog.>) 0::pg_catalog.float8 AND g.query IS NOT NULL '
        'AND g.key IS NOT NULL GROUP BY g.query',
        _key, judgments
    );
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'no_data_found',
            MESSAGE = pg_catalog.format('the judgments %s have no query with a grade above 0', judgments),
            HINT = 'Give it a row for each row that answers a query: query, key, grade.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._judgments IS
    'The queries of a table of judgments, each with the keys of the rows that answer it and their grades.';

CREATE OR REPLACE FUNCTION autoembed._judged_keys(table_name regclass, embedding_column name, keys jsonb)
    RETURNS jsonb
    LANGUAGE plpgsql
AS $plpgsql$
DECLARE
    _target CONSTANT pg_catalog.record := autoembed._search_target(
        (autoembed._searched(table_name, embedding_column)).pipeline_id
    );
    _query CONSTANT pg_catalog.text := pg_catalog.concat(
        'SELECT r.key FROM (', _target.matching_query, 'true', _target.matching_end, ') AS r'
    );
    _key pg_catalog.record;
    _found pg_catalog.text;
    _spellings pg_catalog.jsonb := '{}'::pg_catalog.jsonb;
BEGIN
    FOR _key IN
        -- A key of one column may be written as it is, or as search() writes it.
        SELECT k.text,
               CASE
                   WHEN pg_catalog.pg_input_is_valid(k.text, 'pg_catalog.jsonb')
                        AND pg_catalog.left(pg_catalog.ltrim(k.text), 1) OPERATOR(pg_catalog.=) '['::pg_catalog.text
                       THEN ARRAY[k.text, pg_catalog.jsonb_build_array(k.text)::pg_catalog.text]
                   ELSE ARRAY[pg_catalog.jsonb_build_array(k.text)::pg_catalog.text]
               END AS candidates
        FROM (
            SELECT DISTINCT j.key OPERATOR(pg_catalog.#>>) '{}'::pg_catalog.text[] AS text
            FROM pg_catalog.jsonb_array_elements(keys) AS j(key)
        ) AS k
        ORDER BY k.text
    LOOP
        _found := NULL;
        FOR _number IN 1 .. pg_catalog.cardinality(_key.candidates) LOOP
            BEGIN
                EXECUTE _query INTO _found USING _key.candidates[_number:_number];
            EXCEPTION WHEN data_exception THEN
                -- It is no value of the key's type.
                _found := NULL;
            END;
            EXIT WHEN _found IS NOT NULL;
        END LOOP;
        _spellings := _spellings OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object(_key.text, _found);
    END LOOP;
    RETURN _spellings;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._judged_keys IS
    'These keys, each with how search() writes it; NULL: it is of no row that the caller may read.';

CREATE OR REPLACE FUNCTION autoembed.evaluate_search(
    table_name regclass,
    judgments regclass,
    max_rows integer DEFAULT 10,
    embedding_column name DEFAULT NULL
)
    RETURNS TABLE (
        mode text,
        vector_weight double precision,
        ndcg double precision,
        ndcg_low double precision,
        ndcg_high double precision,
        mrr double precision,
        mrr_low double precision,
        mrr_high double precision,
        recall double precision,
        recall_low double precision,
        recall_high double precision,
        queries integer
    )
    LANGUAGE plpgsql
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _queries pg_catalog.text[];
    _keys pg_catalog.jsonb;
    _grades pg_catalog.jsonb;
    _spellings pg_catalog.jsonb;
    _unknown pg_catalog.text[];
BEGIN
    IF (max_rows OPERATOR(pg_catalog.>=) 1) IS NOT TRUE THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('max_rows must be 1 or more, not %s',
                                        coalesce(max_rows::pg_catalog.text, 'NULL')),
            HINT = 'Leave it out for the ten best rows.';
    END IF;
    -- The loop keeps this statement out of the CONTEXT of a refusal.
    FOR _queries, _keys, _grades IN
        SELECT pg_catalog.array_agg(j.query), pg_catalog.jsonb_agg(j.keys), pg_catalog.jsonb_agg(j.grades)
        FROM autoembed._judgments(judgments) AS j
    LOOP
    END LOOP;
    _spellings := autoembed._judged_keys(
        table_name, embedding_column, pg_catalog.jsonb_path_query_array(_keys, '$[*][*]')
    );
    _unknown := ARRAY(
        SELECT k.key FROM pg_catalog.jsonb_each_text(_spellings) AS k WHERE k.value IS NULL ORDER BY k.key
    );
    IF pg_catalog.cardinality(_unknown) OPERATOR(pg_catalog.>) 0 THEN
        RAISE NOTICE USING
            MESSAGE = pg_catalog.format(
                '%s of the keys in %s are of no row of table %s that you may read, and count as not found',
                pg_catalog.cardinality(_unknown), judgments, table_name
            ),
            DETAIL = pg_catalog.format(
                'They are %s%s.', pg_catalog.array_to_string(_unknown[1:5], ', '),
                CASE WHEN pg_catalog.cardinality(_unknown) OPERATOR(pg_catalog.>) 5 THEN ', …' END
            );
    END IF;
    RETURN QUERY
    WITH judged AS MATERIALIZED (
        SELECT j.*
        FROM ROWS FROM (
            pg_catalog.unnest(_queries), pg_catalog.jsonb_array_elements(_keys),
            pg_catalog.jsonb_array_elements(_grades)
        ) AS j(query, keys, grades)
    ),
    way AS (
        SELECT w.*
        FROM (VALUES
            ('vector', NULL::double precision), ('text', NULL), ('hybrid', 0.3), ('hybrid', 0.5), ('hybrid', 0.7),
            ('hybrid', 0.9)
        ) AS w(mode, vector_weight)
        WHERE w.mode OPERATOR(pg_catalog.=) 'vector'::pg_catalog.text
           OR (SELECT t.has_texts FROM autoembed._searched(table_name, embedding_column) AS s,
                                       autoembed._search_target(s.pipeline_id) AS t)
    ),
    answered AS (
        SELECT w.mode, w.vector_weight, pg_catalog.count(*)::integer AS queries,
               pg_catalog.jsonb_agg(f.found ORDER BY j.query) AS found,
               pg_catalog.jsonb_agg(j.grades ORDER BY j.query) AS grades
        FROM way AS w
        CROSS JOIN judged AS j
        CROSS JOIN LATERAL (
            SELECT coalesce(pg_catalog.jsonb_agg(coalesce(a.grade, '0') ORDER BY s.rank), '[]') AS found
            FROM autoembed.search(
                table_name, j.query, max_rows, 0, NULL, embedding_column, w.mode, coalesce(w.vector_weight, 0.7)
            ) AS s
            LEFT JOIN LATERAL (
                SELECT g.grade
                FROM ROWS FROM (
                    pg_catalog.jsonb_array_elements(j.keys), pg_catalog.jsonb_array_elements(j.grades)
                ) AS g(key, grade)
                WHERE (_spellings OPERATOR(pg_catalog.->>) (g.key OPERATOR(pg_catalog.#>>) '{}'::pg_catalog.text[]))
                    OPERATOR(pg_catalog.=) s.key
                LIMIT 1
            ) AS a ON true
        ) AS f
        GROUP BY w.mode, w.vector_weight
    )
    SELECT a.mode, a.vector_weight, q.*, a.queries
    FROM answered AS a
    CROSS JOIN LATERAL autoembed._search_quality(a.found, a.grades, max_rows) AS q
    ORDER BY q.ndcg DESC;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.evaluate_search IS
    'How good search() answers queries, by mode and weight, best first, with the rights of the caller. judgments: a '
    'table or view with the columns query, key (of a row that answers it; of several columns: a JSON array) and grade '
    '(how well, above 0; without the column: 1). ndcg: the grades found, the sooner the better, as a share of the best '
    'order. mrr: one divided by the place of the first answer. recall: the share of the answers found. All of the '
    'first max_rows rows, as the mean of the queries, with an interval of 95 %. A table without a text index has the '
    'mode vector alone.';
