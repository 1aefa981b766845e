-- Texts, tokens and costs of rows. Nothing is sent to a provider.

CREATE OR REPLACE FUNCTION autoembed.preview(table_name regclass, key text, embedding_column name DEFAULT NULL)
    RETURNS TABLE (
        content text,
        tokens integer,
        truncated boolean,
        state text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer
    )
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    -- The settings with which lanes make texts and keys, as in _output_settings().
    SET TimeZone = 'UTC'
    SET DateStyle = 'ISO, YMD'
    SET IntervalStyle = 'postgres'
    SET extra_float_digits = 1
    SET bytea_output = 'hex'
    SET standard_conforming_strings = on
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline := autoembed._owned_pipeline(table_name, embedding_column);
    _condition text;
    _key jsonb;
    _row jsonb;
    _chunk record;
BEGIN
    table_name := _pipeline.table_id;
    -- A key of one column may be given as its value; a longer one is a JSON array.
    IF cardinality(_pipeline.key_columns) = 1 AND key !~ '^[[:space:]]*[[]' THEN
        _key := jsonb_build_array(key);
    ELSIF pg_input_is_valid(key, 'jsonb') THEN
        _key := key::jsonb;
    END IF;
    -- The operator is that of the key's index, so that the index is used.
    SELECT string_agg(
        format('t.%I %s %L::%s', k.name, autoembed._operator(table_name, k.name, 3), k.value, k.type), ' AND '
    )
    INTO _condition
    FROM (
        SELECT n.name, format_type(a.atttypid, a.atttypmod) AS type, _key ->> (n.position - 1)::integer AS value
        FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS n(name, position)
        JOIN pg_attribute AS a ON a.attrelid = table_name AND a.attname = n.name
    ) AS k
    HAVING jsonb_typeof(_key) = 'array' AND jsonb_array_length(_key) = count(*) AND count(k.value) = count(*);
    BEGIN
        _row := CASE WHEN _condition IS NOT NULL THEN autoembed._as_owner(table_name, format(
            'SELECT %s AS content, %s AS prefix, pg_catalog.encode(%s, ''hex'') AS vector_digest, %s AS key '
            'FROM %s AS t WHERE %s LIMIT 1',
            autoembed._content_expression(_pipeline, 't'), autoembed._prefix_expression(_pipeline, 't'),
            autoembed._vector_digest_expression(_pipeline, 't'), autoembed._key_expression(_pipeline, 't'), table_name,
            _condition
        )) -> 0 END;
    EXCEPTION WHEN data_exception THEN
        _condition := NULL;
    END;
    IF _condition IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('%s is not a valid key for table %s', coalesce(format('"%s"', key), 'NULL'), table_name),
            HINT = format('Its key is %s%s.', array_to_string(_pipeline.key_columns, ', '), CASE
                WHEN cardinality(_pipeline.key_columns) > 1 THEN ', given as a JSON array'
                ELSE ''
            END);
    ELSIF _row IS NULL THEN
        RETURN;
    END IF;
    FOR _chunk IN
        SELECT p.*
        FROM (
            SELECT max(encode(r.digest, 'hex')) AS digest, max(encode(r.vector_digest, 'hex')) AS vector_digest,
                   max(r.state) AS state
            FROM autoembed._row_state AS r
            WHERE r.pipeline_id = _pipeline.id AND r.key IN (_row ->> 'key', autoembed._short_key(_row ->> 'key'))
        ) AS r
        CROSS JOIN LATERAL autoembed._preview(
            _pipeline.id, _row ->> 'content', _row ->> 'prefix', _row ->> 'vector_digest', r.digest, r.vector_digest,
            r.state
        ) AS p
    LOOP
        IF _chunk.problem IS NOT NULL THEN
            RAISE EXCEPTION USING MESSAGE = _chunk.problem, ERRCODE = _chunk.errcode;
        END IF;
        content := _chunk.content;
        tokens := _chunk.tokens;
        truncated := _chunk.truncated;
        state := _chunk.state;
        chunk_number := _chunk.chunk_number;
        chunk_start := _chunk.chunk_start;
        chunk_end := _chunk.chunk_end;
        RETURN NEXT;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.preview IS
    'The text as which a row of a table that the caller owns is embedded, chunk by chunk: the number of tokens with '
    'chunk_prefix, estimated if the model does not count them here, whether the model cuts the text, the state of the '
    'row''s embedding (fresh, waiting, failed, missing, stale, or not wanted), and where the chunk begins and ends. '
    'Returns nothing if the table has no row with that key.';

CREATE OR REPLACE FUNCTION autoembed._preview(
    pipeline_id integer,
    content text,
    prefix text,
    vector_digest text,
    known_digest text,
    known_vector_digest text,
    outstanding text
)
    RETURNS TABLE (
        content text,
        tokens integer,
        truncated boolean,
        state text,
        chunk_number integer,
        chunk_start integer,
        chunk_end integer,
        problem text,
        errcode text
    )
    LANGUAGE plpython3u
    -- Not SECURITY DEFINER: the caller has to be known.
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.preview(pipeline_id, content, prefix, vector_digest, known_digest, known_vector_digest, outstanding)
$python$;
COMMENT ON FUNCTION autoembed._preview IS
    'The rows of preview(), from a row''s text and the digest of its vector, and the digests that are recorded. '
    'outstanding: waiting or failed, if the row is. problem: why the text cannot be cut. Fails unless the caller has '
    'the rights of the table''s owner.';

CREATE OR REPLACE FUNCTION autoembed.estimate(
    table_name regclass,
    embedding_column name DEFAULT NULL,
    content_columns name[] DEFAULT NULL,
    content_function text DEFAULT NULL,
    content_template text DEFAULT NULL,
    model text DEFAULT NULL,
    condition text DEFAULT NULL,
    chunking text DEFAULT NULL,
    chunk_size integer DEFAULT NULL,
    chunk_overlap integer DEFAULT NULL,
    chunk_prefix text DEFAULT NULL,
    OUT rows bigint,
    OUT tokens bigint,
    OUT requests bigint,
    OUT cost numeric,
    OUT duration interval
)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET standard_conforming_strings = on
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _sample bigint;
    _percent numeric;
    _texts text[];
    _prefixes text[];
    _texts_of_rows bigint;
    _answer jsonb;
    _found record;
    _chunking CONSTANT record := autoembed._chunking(chunking);
    _condition record;
    _void text;
BEGIN
    IF num_nonnulls(content_columns, content_function, content_template) = 0 THEN
        _pipeline := autoembed._owned_pipeline(table_name, embedding_column);
        table_name := _pipeline.table_id;
    ELSE
        _void := autoembed._check_owner(table_name);
        _void := autoembed._check_content(content_columns, content_function, content_template, true);
        _pipeline.table_id := table_name;
        _pipeline.content_columns := estimate.content_columns;
        _pipeline.content_function := estimate.content_function;
        _pipeline.content_template := estimate.content_template;
        _pipeline.condition_columns := '{}';
        _pipeline.chunking := CASE WHEN estimate.embedding_column IS NULL THEN 'structure' ELSE 'none' END;
    END IF;
    _pipeline.model := coalesce(estimate.model, _pipeline.model);
    IF chunking IS NOT NULL THEN
        _pipeline.chunking := _chunking.way;
        _pipeline.chunk_function := _chunking.chunk_function;
        _pipeline.chunk_function_oid := NULL;
    END IF;
    -- The rows are read by a query, whose error would name what nobody has written.
    IF _pipeline.content_function IS NOT NULL AND autoembed._content_function_of(_pipeline) IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_function',
            MESSAGE = format('there is no function "%s" of one row of %s', _pipeline.content_function, table_name),
            HINT = format('Create it, as a function of one argument of type %s that returns text.', table_name);
    ELSIF _pipeline.chunk_function IS NOT NULL AND autoembed._chunk_function_of(_pipeline) IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_function',
            MESSAGE = format('there is no function "%s" that cuts a text', _pipeline.chunk_function),
            HINT = 'Give chunking as structure, tokens or none, or the name of a function of one text that returns a '
                'set of texts.';
    END IF;
    _pipeline.chunk_size := coalesce(estimate.chunk_size, _pipeline.chunk_size);
    _pipeline.chunk_overlap := coalesce(estimate.chunk_overlap, _pipeline.chunk_overlap, 0);
    _pipeline.chunk_prefix := nullif(coalesce(estimate.chunk_prefix, _pipeline.chunk_prefix), '');
    IF num_nonnulls(chunking, chunk_size, chunk_overlap, chunk_prefix) > 0 THEN
        _void := autoembed._check_chunking(
            true, _pipeline.chunking, _pipeline.chunk_size, _pipeline.chunk_overlap, _pipeline.model,
            _pipeline.chunk_prefix
        );
    END IF;
    -- An unknown model is an error here, in PostgreSQL's form.
    _void := autoembed._dimensions(_pipeline.model);
    IF estimate.condition IS NOT NULL THEN
        _condition := autoembed._read_condition(table_name, estimate.condition);
        _pipeline.condition := _condition.condition;
        _pipeline.condition_columns := _condition.columns;
    END IF;
    rows := coalesce(autoembed._estimated_rows(table_name), 0);
    -- About 10,000 rows are a large enough sample of a large table.
    _percent := CASE WHEN rows > 20000 THEN 1000000.0 / rows ELSE 100 END;
    _answer := autoembed._as_owner(table_name, format(
        'SELECT s.content, s.prefix, %s AS pieces FROM (SELECT %s AS content, %s AS prefix FROM %s AS t %s) AS s',
        CASE
            WHEN _pipeline.chunking = 'function' THEN
                format('ARRAY(SELECT p.piece::text FROM %s(s.content) AS p(piece))', autoembed._chunk_call(_pipeline))
            ELSE 'NULL'
        END,
        autoembed._content_expression(_pipeline, 't'), autoembed._prefix_expression(_pipeline, 't'), table_name,
        CASE WHEN _percent < 100 THEN format('TABLESAMPLE SYSTEM (%s)', _percent) END
    ));
    SELECT count(*), count(*) FILTER (WHERE s.content ~ '[^[:space:]]')
    INTO _sample, _texts_of_rows
    FROM jsonb_to_recordset(_answer) AS s(content text);
    SELECT array_agg(p.piece), array_agg(coalesce(s.prefix, ''))
    INTO _texts, _prefixes
    FROM jsonb_to_recordset(_answer) AS s(content text, prefix text, pieces text[])
    CROSS JOIN LATERAL unnest(coalesce(s.pieces, ARRAY[s.content])) AS p(piece)
    WHERE p.piece ~ '[^[:space:]]';
    SELECT e.* INTO _found
    FROM autoembed._estimate_texts(
        coalesce(_texts, '{}'), coalesce(_prefixes, '{}'), _pipeline.model, _pipeline.chunking, _pipeline.chunk_size,
        _pipeline.chunk_overlap
    ) AS e;
    IF _percent = 100 THEN
        rows := _texts_of_rows;
        tokens := _found.tokens;
        requests := _found.requests;
    ELSE
        tokens := _found.tokens * rows / greatest(_sample, 1);
        requests := ceil(_found.requests * rows / greatest(_sample, 1)::numeric);
        rows := _texts_of_rows * rows / greatest(_sample, 1);
    END IF;
    cost := round(tokens * _found.price / 1000000, 4);
    duration := make_interval(secs => rows / nullif(_found.rows_per_second, 0));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.estimate IS
    'The estimated rows, tokens and requests that it takes to embed all rows of a table that the caller owns, with the '
    'cost at the model''s price, and the time at the rate of the model''s busiest recent minute. Takes the arguments '
    'of enable(), or the table as it is attached. Sends nothing, and samples large tables.';

CREATE OR REPLACE FUNCTION autoembed._estimate_texts(
    texts text[],
    prefixes text[],
    model text,
    chunking text,
    chunk_size integer,
    chunk_overlap integer
)
    RETURNS TABLE (tokens bigint, requests bigint, price numeric, rows_per_second numeric)
    LANGUAGE plpython3u
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return [doors.estimate(texts, prefixes, model, chunking, chunk_size, chunk_overlap)]
$python$;
COMMENT ON FUNCTION autoembed._estimate_texts IS
    'The tokens and requests that it takes to embed these texts, cut into chunks like that behind these prefixes, and '
    'the price and rate of the model.';
