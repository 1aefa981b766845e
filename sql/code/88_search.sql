-- Search by meaning and by words. What a search runs has the rights of the caller, and the caller's search_path. So all
-- else in these functions is qualified.

CREATE OR REPLACE FUNCTION autoembed._estimated_matches(
    table_id regclass,
    condition text,
    OUT matches double precision,
    OUT cost double precision
)
    LANGUAGE plpgsql
    -- A STABLE function may not use EXPLAIN.
    VOLATILE
AS $plpgsql$
DECLARE
    _plan pg_catalog.json;
BEGIN
    EXECUTE pg_catalog.concat(
        'EXPLAIN (FORMAT JSON) SELECT FROM ', table_id, ' WHERE (', coalesce(condition, 'true'), E'\n)'
    ) INTO _plan;
    matches := (_plan OPERATOR(pg_catalog.#>>) '{0,Plan,Plan Rows}'::pg_catalog.text[])::double precision;
    cost := (_plan OPERATOR(pg_catalog.#>>) '{0,Plan,Total Cost}'::pg_catalog.text[])::double precision;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._estimated_matches IS
    'The number of rows of a table that the planner expects to fulfil a condition and the policies for the caller, and '
    'what it expects it to cost to find them.';

CREATE OR REPLACE FUNCTION autoembed._nearest(
    table_name regclass,
    embedding_column name,
    vector text,
    wanted integer,
    by_index boolean,
    ef_search integer,
    OUT keys text[],
    OUT distances double precision[],
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpython3u
    STABLE
    SET hnsw.iterative_scan = 'off'
    SET hnsw.ef_search = 100
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import search_doors
    return search_doors.nearest(table_name, embedding_column, vector, wanted, by_index, ef_search)
$python$;
COMMENT ON FUNCTION autoembed._nearest IS
    'The rows of a table that are nearest to a vector, at least as many as wanted if there are so many, nearest first, '
    'or the fault that SQL is to raise. by_index, ef_search: NULL: as suits the table.';

CREATE OR REPLACE FUNCTION autoembed._search_page(
    table_name regclass,
    query text,
    max_rows integer,
    skip_rows integer,
    condition text,
    embedding_column name,
    mode text,
    vector_weight double precision,
    candidates integer,
    has_row_type boolean,
    INOUT search integer,
    OUT pipeline_id integer,
    OUT rows_query text,
    OUT vector text,
    OUT by_index boolean,
    OUT ranks integer[],
    OUT keys text[],
    OUT numbers integer[],
    OUT scores double precision[],
    OUT similarities double precision[],
    OUT text_scores double precision[],
    OUT fell_back boolean,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpython3u
    STABLE
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import search_doors
    return search_doors.page(
        table_name, query, max_rows, skip_rows, condition, embedding_column, mode, vector_weight, candidates,
        has_row_type, search
    )
$python$;
COMMENT ON FUNCTION autoembed._search_page IS
    'The query that gives the rows of a page of search(), and its parameters: the ranks $1, keys $2, numbers of '
    'passages $3 and scores $4 to $6 of rows that the caller may read; or, if there is a vector, that as $7, whether '
    'an index is asked as $8, skip_rows as $9 and max_rows as $10. In the latter case it may give no rows though '
    'there are some: then the number of the search is to be handed back. NULL: there are none. candidates: so many of '
    'the best rows are listed, too. has_row_type: the table is told by the type of the rows that are wanted. search: '
    'the number by which _note_search() counts it. NULL if nothing was looked for. problem: the fault that SQL is to '
    'raise.';

CREATE OR REPLACE FUNCTION autoembed._rerank_candidates(model text, skip_rows integer)
    RETURNS integer
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _model autoembed.model := autoembed._model(model, true);
    -- Text Embeddings Inference takes as many, unless it is told otherwise.
    _candidates integer := least(coalesce(_model.max_inputs_per_request, 32), 1000);
BEGIN
    -- A page behind all of them is the same in any order of these.
    RETURN CASE WHEN skip_rows < _candidates THEN _candidates ELSE 0 END;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._rerank_candidates IS
    'How many of the best rows a rerank model is given; 0: none, because a page begins behind them.';

CREATE OR REPLACE FUNCTION autoembed._present_text(pipeline_id integer)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _is_owners_code boolean;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = _present_text.pipeline_id;
    -- The code of the owner gets no rights of the caller.
    _is_owners_code := num_nonnulls(_pipeline.content_function, _pipeline.condition) > 0;
    IF _pipeline.content_function IS NOT NULL OR _is_owners_code AND _pipeline.embeddings_table IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('rows of table %s cannot be reranked, because code of its owner tells their texts',
                             _pipeline.table_id),
            HINT = 'Leave out rerank_model; or attach the table with content_columns or a content_template, and, if it '
                'has a condition, with embeddings beside its rows.';
    END IF;
    RETURN CASE WHEN _is_owners_code THEN 'NULL' ELSE autoembed._content_expression(_pipeline, '(r.hit)') END;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._present_text IS
    'The SQL expression that gives the text of r.hit, a row that a search has found; NULL if it needs code of the '
    'table''s owner. An error if there are no passages either.';

CREATE OR REPLACE FUNCTION autoembed._scores(
    query text,
    passages text[],
    model_name text,
    definition text,
    OUT scores double precision[],
    OUT trouble text
)
    LANGUAGE plpython3u
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.scores(query, passages, model_name, definition)
$python$;
COMMENT ON FUNCTION autoembed._scores IS
    'How well passages answer a query, by a rerank model, or why that is not known. definition: the row of the model '
    'and the version of its function. A session keeps the scores of the same query, passages and definition.';

CREATE OR REPLACE FUNCTION autoembed._rerank(
    model text,
    query text,
    passages text[],
    OUT scores double precision[],
    OUT trouble text
)
    LANGUAGE plpgsql
    STABLE
    -- It notes what was used, which no parallel plan may.
    PARALLEL UNSAFE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _model autoembed.model := autoembed._model(model, true);
    _answer record;
BEGIN
    -- Any role that may search can call this function itself.
    IF query IS NULL OR passages IS NULL OR array_ndims(passages) > 1 OR array_position(passages, NULL) IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'query and passages must be texts, and one of them is NULL or an array of arrays',
            HINT = 'Give a query and an array of passages.';
    ELSIF cardinality(passages) > 1000 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'program_limit_exceeded',
            MESSAGE = format('%s passages are more than a model reranks at once, which is 1000', cardinality(passages)),
            HINT = 'Give fewer passages. A search sends no more.';
    ELSIF cardinality(passages) = 0 THEN
        scores := '{}';
        RETURN;
    END IF;
    -- An assignment runs no statement, and shows none in the context of an error.
    _answer := autoembed._scores(
        query,
        passages,
        _model.name,
        concat(_model, CASE
            WHEN _model.provider = 'function' THEN autoembed._embedder_version(_model, 'rerank')
        END)
    );
    scores := _answer.scores;
    trouble := _answer.trouble;
EXCEPTION WHEN query_canceled THEN
    -- Python puts words of its own around those of PostgreSQL.
    RAISE EXCEPTION USING
        ERRCODE = 'query_canceled',
        MESSAGE = regexp_replace(SQLERRM, '^spiexceptions[.][[:alpha:]]+: ', ''),
        HINT = 'The model had not answered yet.';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._rerank IS
    'How well passages answer a query, by a rerank model: a score for each, or the trouble with the model.';

CREATE OR REPLACE FUNCTION autoembed._reranked(
    page record,
    model text,
    query text,
    candidates integer,
    skip_rows integer,
    max_rows integer
)
    RETURNS record
    LANGUAGE plpgsql
    STABLE
AS $plpgsql$
DECLARE
    -- More of a passage is not read, in characters.
    _most_characters CONSTANT integer := 10000;
    _places integer[];
    _passages pg_catalog.text[];
    _answer pg_catalog.record;
    _scores double precision[];
    _trouble pg_catalog.text;
BEGIN
    EXECUTE pg_catalog.concat(
        'SELECT pg_catalog.array_agg(p.place), pg_catalog.array_agg(p.passage) FROM ('
        'SELECT r.place, pg_catalog.left(coalesce(r.chunk, ', autoembed._present_text(page.pipeline_id), '), $7) '
        'AS passage FROM (', page.rows_query, ') AS r(place, hit, key, score, chunk) ORDER BY r.place) AS p '
        'WHERE pg_catalog.btrim(p.passage, $8) OPERATOR(pg_catalog.<>) ''''::pg_catalog.text'
    )
    INTO _places, _passages
    USING page.ranks[:candidates], page.keys[:candidates], page.numbers[:candidates], page.scores[:candidates],
          page.scores[:candidates], page.scores[:candidates], _most_characters, E' \t\r\n'::pg_catalog.text;
    IF _passages IS NOT NULL THEN
        -- An assignment runs no statement, and shows none in the CONTEXT of an error.
        _answer := autoembed._rerank(model, query, _passages);
        _scores := _answer.scores;
        _trouble := _answer.trouble;
        -- Meanwhile the names in the query may have come to mean other tables.
        page.rows_query := (autoembed._search_target(page.pipeline_id)).rows_query;
        page.fell_back := _scores IS NULL;
    END IF;
    IF page.fell_back THEN
        RAISE NOTICE USING
            MESSAGE = pg_catalog.format('the rows are not reranked, because model "%s" gave no scores: %s',
                                        model, _trouble),
            HINT = 'An administrator sees what to do: SELECT * FROM autoembed.doctor().';
    END IF;
    SELECT pg_catalog.array_agg(o.rank), pg_catalog.array_agg(o.key), pg_catalog.array_agg(o.number),
           pg_catalog.array_agg(o.score), pg_catalog.array_agg(o.similarity), pg_catalog.array_agg(o.text_score)
    INTO page.ranks, page.keys, page.numbers, page.scores, page.similarities, page.text_scores
    FROM (
        SELECT pg_catalog.row_number() OVER (ORDER BY s.score DESC NULLS LAST, l.rank)::integer AS rank,
               l.key, l.number, l.similarity, l.text_score,
               -- The rows behind them have no higher score than the last of them.
               coalesce(s.score, CASE
                   WHEN _scores IS NULL THEN l.score
                   ELSE least(pg_catalog.min(s.score) OVER (), 0::double precision)
               END) AS score
        FROM ROWS FROM (
            pg_catalog.unnest(page.ranks), pg_catalog.unnest(page.keys), pg_catalog.unnest(page.numbers),
            pg_catalog.unnest(page.scores), pg_catalog.unnest(page.similarities), pg_catalog.unnest(page.text_scores)
        ) AS l(rank, key, number, score, similarity, text_score)
        LEFT JOIN ROWS FROM (
            pg_catalog.unnest(_places), pg_catalog.unnest(_scores)
        ) AS s(rank, score) ON s.rank OPERATOR(pg_catalog.=) l.rank
    ) AS o
    WHERE o.rank OPERATOR(pg_catalog.>) skip_rows
      AND o.rank OPERATOR(pg_catalog.-) skip_rows OPERATOR(pg_catalog.<=) max_rows;
    RETURN page;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._reranked IS
    'A page of _search_page() once a rerank model has put the first of the listed rows in order by their passages. The '
    'rest follows. The rows are in their old order, with a NOTICE, if the model gives no scores: it fell back.';

CREATE OR REPLACE FUNCTION autoembed._is_pipeline_of(pipeline_id integer, table_id oid)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT EXISTS (
        SELECT FROM autoembed.pipeline AS p WHERE p.id = pipeline_id AND p.table_id = _is_pipeline_of.table_id
    );
$sql$;
COMMENT ON FUNCTION autoembed._is_pipeline_of IS 'Whether a table has the pipeline of this number.';

CREATE OR REPLACE FUNCTION autoembed._note_search(search integer, found integer, fell_back boolean)
    RETURNS boolean
    LANGUAGE plpython3u
    STABLE
    STRICT
    -- A setting of its own takes as long as the count.
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import search_doors
    return search_doors.note(search, found, fell_back)
$python$;
COMMENT ON FUNCTION autoembed._note_search IS
    'Counts a search that the session has begun, by its number, for search_stats. found: how many rows it gave. Writes '
    'no table.';

CREATE OR REPLACE FUNCTION autoembed._refuse(problem text, hint text, errcode text)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF hint = '' THEN
        RAISE EXCEPTION USING ERRCODE = errcode, MESSAGE = problem;
    END IF;
    RAISE EXCEPTION USING ERRCODE = errcode, MESSAGE = problem, HINT = hint;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._refuse IS 'Raises a fault that Python has found. hint: empty if there is none.';

CREATE OR REPLACE FUNCTION autoembed.search(
    like_row anyelement,
    query text,
    max_rows integer DEFAULT 10,
    skip_rows integer DEFAULT 0,
    condition text DEFAULT NULL,
    embedding_column name DEFAULT NULL,
    mode text DEFAULT NULL,
    vector_weight double precision DEFAULT 0.7,
    rerank_model text DEFAULT NULL
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
    -- Python changes these where it has to, and they are as before in the end.
    SET hnsw.iterative_scan = 'off'
    SET hnsw.ef_search = 100
    SET debug_print_plan = off
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _table pg_catalog.regclass := (
        SELECT t.typrelid FROM pg_catalog.pg_type AS t
        WHERE t.oid OPERATOR(pg_catalog.=) pg_catalog.pg_typeof(like_row)
    );
    -- So many of the best rows are reranked.
    _candidates CONSTANT integer := CASE
        WHEN rerank_model IS NULL THEN 0
        ELSE autoembed._rerank_candidates(rerank_model, skip_rows)
    END;
    _page pg_catalog.record;
    _search integer;
    _found integer := 0;
    _void pg_catalog.text;
BEGIN
    IF coalesce(_table::pg_catalog.oid, 0::pg_catalog.oid) OPERATOR(pg_catalog.=) 0::pg_catalog.oid THEN
        RAISE EXCEPTION USING
            ERRCODE = 'datatype_mismatch',
            MESSAGE = pg_catalog.format('search() needs a row of a table, not a value of type %s',
                                        pg_catalog.pg_typeof(like_row)),
            HINT = 'For example: SELECT * FROM autoembed.search(NULL::documents, ''words'').';
    END IF;
    LOOP
        -- An assignment runs no statement, and shows none in the CONTEXT of a refusal.
        _page := autoembed._search_page(
            _table, query, max_rows, skip_rows, condition, embedding_column, mode, vector_weight, _candidates, true,
            _search
        );
        IF _page.problem IS NOT NULL THEN
            _void := autoembed._refuse(_page.problem, _page.hint, _page.errcode);
        ELSIF _page.rows_query IS NOT NULL THEN
            IF _candidates OPERATOR(pg_catalog.>) 0 THEN
                _page := autoembed._reranked(_page, rerank_model, query, _candidates, skip_rows, max_rows);
            END IF;
            RETURN QUERY EXECUTE _page.rows_query
            USING _page.ranks, _page.keys, _page.numbers, _page.scores, _page.similarities, _page.text_scores,
                  _page.vector, _page.by_index, skip_rows, max_rows;
            GET DIAGNOSTICS _found = ROW_COUNT;
        END IF;
        _search := _page.search;
        EXIT WHEN _page.vector IS NULL OR _found OPERATOR(pg_catalog.>) 0;
    END LOOP;
    IF _search IS NOT NULL THEN
        _void := autoembed._note_search(_search, _found, _page.fell_back);
    END IF;
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
    vector_weight double precision DEFAULT 0.7,
    rerank_model text DEFAULT NULL
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
    -- Python changes these where it has to, and they are as before in the end.
    SET hnsw.iterative_scan = 'off'
    SET hnsw.ef_search = 100
    SET debug_print_plan = off
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- So many of the best rows are reranked.
    _candidates CONSTANT integer := CASE
        WHEN rerank_model IS NULL THEN 0
        ELSE autoembed._rerank_candidates(rerank_model, skip_rows)
    END;
    _page pg_catalog.record;
    _search integer;
    _found integer := 0;
    _void pg_catalog.text;
BEGIN
    LOOP
        -- An assignment runs no statement, and shows none in the CONTEXT of a refusal.
        _page := autoembed._search_page(
            table_name, query, max_rows, skip_rows, condition, embedding_column, mode, vector_weight, _candidates,
            false, _search
        );
        IF _page.problem IS NOT NULL THEN
            _void := autoembed._refuse(_page.problem, _page.hint, _page.errcode);
        ELSIF _page.rows_query IS NOT NULL THEN
            IF _candidates OPERATOR(pg_catalog.>) 0 THEN
                _page := autoembed._reranked(_page, rerank_model, query, _candidates, skip_rows, max_rows);
            END IF;
            RETURN QUERY EXECUTE pg_catalog.concat(
                'SELECT r.rank, r.key, r.score, r.chunk, r.chunk_number, r.chunk_start, r.chunk_end, r.similarity, '
                'r.text_score FROM (', _page.rows_query, ') AS r(rank, hit, key, score, chunk, chunk_number, '
                'chunk_start, chunk_end, similarity, text_score)'
            )
            USING _page.ranks, _page.keys, _page.numbers, _page.scores, _page.similarities, _page.text_scores,
                  _page.vector, _page.by_index, skip_rows, max_rows;
            GET DIAGNOSTICS _found = ROW_COUNT;
        END IF;
        _search := _page.search;
        EXIT WHEN _page.vector IS NULL OR _found OPERATOR(pg_catalog.>) 0;
    END LOOP;
    IF _search IS NOT NULL THEN
        _void := autoembed._note_search(_search, _found, _page.fell_back);
    END IF;
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
    vector_weight double precision DEFAULT 0.7,
    rerank_model text DEFAULT NULL
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
        table_name::pg_catalog.regclass, query, max_rows, skip_rows, condition, embedding_column, mode, vector_weight,
        rerank_model
    ) AS s;
$sql$;
COMMENT ON FUNCTION autoembed.search(
    anyelement, text, integer, integer, text, name, text, double precision, text
) IS
    'The rows of a table that answer a text best, best first, with the rights of the caller: max_rows of them, after '
    'skip_rows. like_row: NULL::the_table. condition: of the rows that are wanted, as in WHERE. mode: vector, by '
    'meaning; text, by words (BM25); hybrid, by both, which is the default where the table has a text index. '
    'vector_weight: the share of the meaning in hybrid. rerank_model: a model of create_rerank_model(), which puts the '
    'best of them in order by their passages; if it gives no scores, a NOTICE says why. score: what orders the rows. '
    'similarity: of the embeddings, from -1 to 1. chunk: the passage that is nearest, if the embeddings are beside the '
    'rows and the text has not changed since.';
COMMENT ON FUNCTION autoembed.search(
    regclass, text, integer, integer, text, name, text, double precision, text
) IS
    'The same for a table that is named, not given by its row type. Tells the rows by their keys, as JSON arrays.';
COMMENT ON FUNCTION autoembed.search(
    text, text, integer, integer, text, name, text, double precision, text
) IS
    'The same for the name of a table.';

CREATE OR REPLACE FUNCTION autoembed.search_rows(
    like_row anyelement,
    query text,
    max_rows integer DEFAULT 10,
    skip_rows integer DEFAULT 0,
    condition text DEFAULT NULL,
    embedding_column name DEFAULT NULL,
    mode text DEFAULT NULL,
    vector_weight double precision DEFAULT 0.7,
    rerank_model text DEFAULT NULL
)
    RETURNS SETOF anyelement
    LANGUAGE plpgsql
    STABLE
    ROWS 10
AS $plpgsql$
DECLARE
    _found pg_catalog.record;
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_type AS t
        WHERE t.oid OPERATOR(pg_catalog.=) pg_catalog.pg_typeof(like_row)::pg_catalog.oid
          AND t.typrelid OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'datatype_mismatch',
            MESSAGE = pg_catalog.format('search_rows() needs a row of a table, not a value of type %s',
                                        pg_catalog.pg_typeof(like_row)),
            HINT = 'For example: SELECT * FROM autoembed.search_rows(NULL::documents, ''words''). search() takes the '
                'name of a table.';
    END IF;
    -- The loop keeps this statement out of the CONTEXT of a refusal. Its plan outlives a change of the table's columns,
    -- so it must not name them.
    FOR _found IN
        SELECT s.hit
        FROM autoembed.search(
            like_row, query, max_rows, skip_rows, condition, embedding_column, mode, vector_weight, rerank_model
        ) AS s
        ORDER BY s.rank
    LOOP
        RETURN NEXT _found.hit;
    END LOOP;
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
    COST 1000
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN autoembed.embed(query, (autoembed._searched(table_name, embedding_column)).model);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.embed_query IS
    'The embedding of a search text by the model of a table. ORDER BY embedding <=> (SELECT autoembed.embed_query(…))'
    ' calls it once, and uses the index.';
