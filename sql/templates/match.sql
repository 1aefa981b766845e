-- Finds the nearest rows of a table for a vector. Belongs to who made it, or to the owner of the table if that was a
-- superuser, and runs with the rights of the caller. A caller needs no right in the schema autoembed, so nothing of it
-- is used here. The settings of pgvector are no clause of the function: where pgvector is not loaded, as in a restore,
-- only a superuser may write such a clause.
CREATE OR REPLACE FUNCTION {{function}}(
    query_embedding {{vector}},
    match_count pg_catalog.int4 DEFAULT 10,
    filter pg_catalog.jsonb DEFAULT '{}'
)
    RETURNS TABLE ({{columns}}, similarity pg_catalog.float8)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, {{schema}}, pg_temp
AS $body$
-- A column of a composite type may have the name of an alias below.
#variable_conflict use_column
DECLARE
    _wanted CONSTANT pg_catalog.int8 := coalesce(match_count, 10);
    _limit pg_catalog.int8 := {{limit}};
    -- So many rows are compared one by one sooner than an index finds the nearest of them.
    _by_index pg_catalog.bool := NOT EXISTS (
        SELECT FROM pg_catalog.pg_class AS c
        WHERE c.oid OPERATOR(pg_catalog.=) {{table_literal}}::pg_catalog.regclass::pg_catalog.oid
          AND c.reltuples OPERATOR(pg_catalog.>=) 0::pg_catalog.float4
          AND c.reltuples OPERATOR(pg_catalog.<=) 5000::pg_catalog.float4
    );
    _hits {{table}}[];
    _distances pg_catalog.float8[];
    _fetched pg_catalog.int8;
    _found pg_catalog.int4;
    _scan_before pg_catalog.text;
    _ef_before pg_catalog.text;
BEGIN
    IF _wanted OPERATOR(pg_catalog.<) 0::pg_catalog.int8 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('match_count must be 0 or more, not %s', match_count),
            HINT = 'Leave it out for the ten nearest rows.';
    ELSIF _wanted OPERATOR(pg_catalog.=) 0::pg_catalog.int8 OR query_embedding IS NULL THEN
        RETURN;
    END IF;
    -- This loads pgvector. An error undoes its settings, too.
    PERFORM '[1]'::{{vector}};
    _scan_before := pg_catalog.current_setting('hnsw.iterative_scan');
    _ef_before := pg_catalog.current_setting('hnsw.ef_search');
    PERFORM pg_catalog.set_config('hnsw.iterative_scan', 'strict_order', true),
            pg_catalog.set_config('hnsw.ef_search', {{ef_search}}, true);
    IF _by_index THEN
        _limit := greatest(_limit, {{candidates}});
    END IF;
    BEGIN
        LOOP
            EXECUTE pg_catalog.concat(
                -- The nearest chunk of a row counts.
                'SELECT pg_catalog.array_agg(n.hit ORDER BY n.distance, n.key), '
                'pg_catalog.array_agg(n.distance ORDER BY n.distance, n.key), '
                'coalesce(pg_catalog.max(n.fetched), 0::pg_catalog.int8) FROM ('
                'SELECT DISTINCT ON (h.key) h.hit, h.key, h.distance, pg_catalog.count(*) OVER () AS fetched FROM (',
                {{start}},
                CASE
                    WHEN filter OPERATOR(pg_catalog.<>) '{}'::pg_catalog.jsonb THEN {{condition}}
                    ELSE 'true'
                END,
                CASE WHEN _by_index THEN {{end}} ELSE {{exact_end}} END,
                ' LIMIT ', _limit, ') AS h ORDER BY h.key, h.distance) AS n'
            ) INTO _hits, _distances, _fetched USING query_embedding, filter;
            EXIT WHEN pg_catalog.cardinality(_hits) OPERATOR(pg_catalog.>=) _wanted
                OR _fetched OPERATOR(pg_catalog.<) _limit AND NOT _by_index;
            IF _fetched OPERATOR(pg_catalog.<) _limit THEN
                -- The index has given up before it had as many.
                _by_index := false;
            ELSE
                _limit := 4::pg_catalog.int8 OPERATOR(pg_catalog.*) _limit;
            END IF;
        END LOOP;
    EXCEPTION WHEN data_exception THEN
        IF SQLSTATE OPERATOR(pg_catalog.<>) '22000' THEN
            RAISE;
        END IF;
        RAISE EXCEPTION USING
            ERRCODE = 'data_exception',
            MESSAGE = pg_catalog.format(
                'query_embedding has %s dimensions, and the embeddings of table %s have others',
                pg_catalog.cardinality(query_embedding::pg_catalog.float4[]), {{table_literal}}
            ),
            HINT = 'Have the model of the table make it.';
    END;
    PERFORM pg_catalog.set_config('hnsw.iterative_scan', _scan_before, true),
            pg_catalog.set_config('hnsw.ef_search', _ef_before, true);
    _found := least(_wanted, coalesce(pg_catalog.cardinality(_hits), 0));
    RETURN QUERY
    SELECT {{values}}, 1::pg_catalog.float8 OPERATOR(pg_catalog.-) _distances[i.n]
    FROM pg_catalog.generate_series(1, _found) AS i(n)
    ORDER BY i.n;
END;
$body$
