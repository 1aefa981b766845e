-- The share of the nearest rows that a search finds. Policies run with the rights of the caller and in the caller's
-- search_path, as in a search. So all else in the functions that search is qualified.

CREATE OR REPLACE FUNCTION autoembed._distances(
    table_name regclass,
    embedding_column name,
    vector @extschema:vector@.vector,
    own_key text,
    wanted integer,
    by_index boolean,
    ef_search integer
)
    RETURNS double precision[]
    LANGUAGE plpgsql
    STABLE
AS $plpgsql$
DECLARE
    _found pg_catalog.record;
BEGIN
    _found := autoembed._nearest(
        table_name, embedding_column, vector::pg_catalog.text, wanted OPERATOR(pg_catalog.+) 1, by_index, ef_search
    );
    IF _found.problem IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = _found.errcode, MESSAGE = _found.problem;
    END IF;
    RETURN ARRAY(
        SELECT f.distance
        FROM ROWS FROM (pg_catalog.unnest(_found.keys), pg_catalog.unnest(_found.distances)) AS f(key, distance)
        WHERE (f.key OPERATOR(pg_catalog.<>) own_key) IS NOT FALSE
        ORDER BY f.distance
        LIMIT wanted
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._distances IS
    'The distances of the rows that a search finds for a vector, nearest first, without the row that the vector is of.';

CREATE OR REPLACE FUNCTION autoembed._exact_answers(
    table_name regclass,
    embedding_column name,
    queries text[],
    sample_rows integer,
    wanted integer
)
    RETURNS TABLE (vector @extschema:vector@.vector, key text, distances double precision[])
    LANGUAGE plpgsql
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _target pg_catalog.record;
    _query pg_catalog.text;
    _last @extschema:vector@.vector;
BEGIN
    IF (wanted OPERATOR(pg_catalog.>=) 1 AND sample_rows OPERATOR(pg_catalog.>=) 1) IS NOT TRUE THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('max_rows and sample_rows must be 1 or more, not %s and %s',
                                        coalesce(wanted::pg_catalog.text, 'NULL'),
                                        coalesce(sample_rows::pg_catalog.text, 'NULL')),
            HINT = 'Leave them out for the ten nearest rows of a hundred.';
    END IF;
    IF wanted OPERATOR(pg_catalog.>) 10000 OR sample_rows OPERATOR(pg_catalog.>) 1000000 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('max_rows can be at most 10000 and sample_rows 1000000, not %s and %s',
                                        wanted, sample_rows),
            HINT = 'Leave them out for the ten nearest rows of a hundred.';
    ELSIF EXISTS (SELECT FROM pg_catalog.unnest(queries) AS q(text) WHERE q.text IS NULL) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'one of the queries is NULL',
            HINT = 'Give texts, or leave queries out: rows stand for them.';
    END IF;
    _target := autoembed._searched(table_name, embedding_column);
    IF queries IS NULL THEN
        FOR vector, key IN EXECUTE autoembed._sample_query(_target.pipeline_id) USING sample_rows LOOP
            -- A question is seldom as near to a row as rows are to each other, and then an index loses more.
            IF _last IS NOT NULL THEN
                vector := vector OPERATOR(@extschema:vector@.+) _last;
                key := NULL;
                _last := NULL;
            ELSE
                _last := vector;
            END IF;
            distances := autoembed._distances(table_name, embedding_column, vector, key, wanted, false, NULL);
            RETURN NEXT;
        END LOOP;
    ELSE
        FOREACH _query IN ARRAY queries LOOP
            vector := autoembed.embed(_query, _target.model);
            distances := autoembed._distances(table_name, embedding_column, vector, NULL, wanted, false, NULL);
            RETURN NEXT;
        END LOOP;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._exact_answers IS
    'The vectors by which recall is measured, of these texts; or of rows at random, with their keys, and halfway '
    'between two of them. With the distances of the rows that are truly nearest.';

CREATE OR REPLACE FUNCTION autoembed._recall(
    shares double precision[],
    wanted integer,
    OUT recall double precision,
    OUT recall_low double precision,
    OUT recall_high double precision,
    OUT worst double precision,
    OUT measured integer
)
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _z CONSTANT double precision := 1.96;
    _variance double precision;
    _n double precision;
    _middle double precision;
    _half double precision;
BEGIN
    SELECT avg(s.share), min(s.share), count(*), var_pop(s.share) / nullif(count(*), 0)
    INTO recall, worst, measured, _variance
    FROM unnest(shares) AS s(share);
    -- Misses come together in some queries. So many independent ones would vary as much.
    _n := nullif(least(recall * (1 - recall) / nullif(_variance, 0), measured * wanted), 0);
    _middle := (recall + _z ^ 2 / (2 * _n)) / (1 + _z ^ 2 / _n);
    _half := _z / (1 + _z ^ 2 / _n) * sqrt(recall * (1 - recall) / _n + _z ^ 2 / (4 * _n ^ 2));
    recall_low := greatest(0, _middle - _half);
    -- Sums of floats are not exact.
    recall_high := greatest(recall, least(1, _middle + _half));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._recall IS
    'The recall of searches of which each has found such a share of its nearest rows, with Wilson''s interval of 95 %.';

CREATE OR REPLACE FUNCTION autoembed._measured_recall(
    table_name regclass,
    embedding_column name,
    wanted integer,
    ef_search integer,
    vectors @extschema:vector@.vector[],
    keys text[],
    furthest double precision[],
    counts integer[],
    OUT recall double precision,
    OUT recall_low double precision,
    OUT recall_high double precision,
    OUT worst double precision,
    OUT measured integer
)
    LANGUAGE plpgsql
AS $plpgsql$
DECLARE
    _shares double precision[] := '{}'::double precision[];
    _found double precision[];
BEGIN
    FOR _number IN 1 .. pg_catalog.cardinality(vectors) LOOP
        CONTINUE WHEN counts[_number] OPERATOR(pg_catalog.=) 0;
        _found := autoembed._distances(
            table_name, embedding_column, vectors[_number], keys[_number], wanted, NULL, ef_search
        );
        _shares := pg_catalog.array_append(_shares, (
            -- Rows that are as far as the last one are as good.
            SELECT pg_catalog.count(*)::double precision OPERATOR(pg_catalog./) counts[_number]::double precision
            FROM pg_catalog.unnest(_found) AS f(distance)
            WHERE f.distance OPERATOR(pg_catalog.<=) furthest[_number]
        ));
    END LOOP;
    SELECT r.* INTO recall, recall_low, recall_high, worst, measured FROM autoembed._recall(_shares, wanted) AS r;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._measured_recall IS
    'The recall of search() for these vectors, whose nearest rows are no further than furthest. counts: how many rows '
    'those are. ef_search: NULL: that of the table.';

CREATE OR REPLACE FUNCTION autoembed.measure_recall(
    table_name regclass,
    queries text[] DEFAULT NULL,
    max_rows integer DEFAULT 10,
    sample_rows integer DEFAULT 100,
    embedding_column name DEFAULT NULL,
    OUT recall double precision,
    OUT recall_low double precision,
    OUT recall_high double precision,
    OUT worst double precision,
    OUT measured integer
)
    LANGUAGE plpgsql
AS $plpgsql$
BEGIN
    -- The loop keeps this statement out of the CONTEXT of a refusal.
    FOR recall, recall_low, recall_high, worst, measured IN
        SELECT r.*
        FROM (
            SELECT pg_catalog.array_agg(e.vector) AS vectors, pg_catalog.array_agg(e.key) AS keys,
                   pg_catalog.array_agg(e.distances[pg_catalog.cardinality(e.distances)]) AS furthest,
                   pg_catalog.array_agg(pg_catalog.cardinality(e.distances)) AS counts
            FROM autoembed._exact_answers(table_name, embedding_column, queries, sample_rows, max_rows) AS e
        ) AS a
        CROSS JOIN LATERAL autoembed._measured_recall(
            table_name, embedding_column, max_rows, NULL, a.vectors, a.keys, a.furthest, a.counts
        ) AS r
        WHERE a.vectors IS NOT NULL
    LOOP
    END LOOP;
    measured := coalesce(measured, 0);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.measure_recall IS
    'How many of the max_rows nearest rows search() finds by meaning, with the rights of the caller: the mean share, '
    'an interval of 95 %, the worst query, and the number of queries. queries: their texts, which cost a request each; '
    'NULL: sample_rows rows, and places between two, stand for them. Each is answered once more by comparing all rows.';

CREATE OR REPLACE FUNCTION autoembed.tune(
    table_name regclass,
    target double precision DEFAULT 0.99,
    queries text[] DEFAULT NULL,
    embedding_column name DEFAULT NULL,
    OUT ef_search integer,
    OUT recall double precision,
    OUT recall_low double precision,
    OUT recall_high double precision,
    OUT worst double precision,
    OUT measured integer
)
    LANGUAGE plpgsql
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _pipeline autoembed.pipeline := autoembed._owned_pipeline(table_name, embedding_column);
    _has_index CONSTANT boolean := (autoembed._search_target(_pipeline.id)).has_index;
    _wanted CONSTANT integer := 10;
    _answers pg_catalog.record;
BEGIN
    IF (target OPERATOR(pg_catalog.>) 0::double precision
        AND target OPERATOR(pg_catalog.<=) 1::double precision) IS NOT TRUE THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('target must be above 0 and at most 1, not %s',
                                        coalesce(target::pg_catalog.text, 'NULL')),
            HINT = 'Leave it out for 0.99.';
    END IF;
    -- The loop keeps this statement out of the CONTEXT of a refusal.
    FOR _answers IN
        SELECT pg_catalog.array_agg(e.vector) AS vectors, pg_catalog.array_agg(e.key) AS keys,
               pg_catalog.array_agg(e.distances[pg_catalog.cardinality(e.distances)]) AS furthest,
               pg_catalog.array_agg(pg_catalog.cardinality(e.distances)) AS counts
        FROM autoembed._exact_answers(table_name, embedding_column, queries, 100, _wanted) AS e
    LOOP
    END LOOP;
    IF _answers.vectors IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = pg_catalog.format('table %s has no embeddings to measure by', table_name),
            HINT = 'Call it once rows are embedded.';
    END IF;
    FOREACH ef_search IN ARRAY '{100,150,200,300,400,600,1000}'::integer[] LOOP
        SELECT r.* INTO recall, recall_low, recall_high, worst, measured
        FROM autoembed._measured_recall(
            table_name, embedding_column, _wanted, ef_search, _answers.vectors, _answers.keys, _answers.furthest,
            _answers.counts
        ) AS r;
        -- A sample that is lucky by chance is not enough.
        EXIT WHEN recall_low OPERATOR(pg_catalog.>=) target OR recall IS NULL OR NOT _has_index;
    END LOOP;
    -- A single embedding has no other that is near. Without an index all rows are compared, and an index that comes
    -- later needs a measurement of its own.
    IF recall IS NULL OR NOT _has_index THEN
        RETURN;
    END IF;
    UPDATE autoembed.pipeline AS p
    SET ef_search = tune.ef_search, recall_target = target, recall = tune.recall,
        recall_measured_at = pg_catalog.clock_timestamp()
    WHERE p.id OPERATOR(pg_catalog.=) _pipeline.id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.tune IS
    'Measures recall with more and more candidates (ef_search) until its interval is above the target, and has '
    'search() use as many for this table. For its owner. doctor() tells if the target was not reached.';
