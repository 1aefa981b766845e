-- Writes the embeddings of rows that still have the text that was sent into the table beside them. Takes no lock on a
-- row of the application's table. Runs as the table's owner, in lanes.
-- prefixes: what the chunks of each row are embedded behind; NULL: nothing, in all rows.
-- contents: the digests of the texts that were sent. A long text itself would be copied several times.
-- versions: those of the rows that have the text that was sent; NULL: not known. A row of another version is read.
-- firsts, lasts: the numbers of the chunks that a row has then; other ones go. NULL: this is a part of the row's
-- chunks, and not the last one.
-- chunk_keys to embeddings: the chunks of all rows. The last ones have no embedding: the row has one of that digest
-- already, perhaps as the number in sources.
CREATE FUNCTION autoembed._write_{{id}}(
    keys text[],
    contents bytea[],
    model text,
    prefixes text[],
    versions text[],
    firsts integer[],
    lasts integer[],
    chunk_keys text[],
    numbers integer[],
    sources integer[],
    starts integer[],
    ends integer[],
    digests bytea[],
    embeddings {{vector_type}}[]
)
    RETURNS TABLE (key text, outcome text, version text)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
    SET autoembed.writing = '{{table_id}}'
    -- The plans are made once, perhaps while the table is small.
    {{plan_settings}}
AS $body$
#variable_conflict use_column
DECLARE
    _context text;
    _outcomes text[];
    _versions text[];
    _written text[];
    _overtaken text[];
BEGIN
    -- The request was sent for another model. An answer of the present model may have come first.
    IF model IS DISTINCT FROM {{model}} THEN
        RETURN QUERY SELECT s.key, 'changed', NULL FROM pg_catalog.unnest(keys) AS s(key);
        RETURN;
    END IF;
    LOCK TABLE {{table}} IN ACCESS SHARE MODE NOWAIT;
    LOCK TABLE {{embeddings_table}} IN ROW EXCLUSIVE MODE NOWAIT;
    {{table_guard}}
    {{embeddings_guard}}
    {{content_guard}}
    -- Another session that writes the same row has locked the first of its chunks, or writes number 1.
    SELECT pg_catalog.array_agg(CASE WHEN p.first IS NOT NULL AND l.is_free IS NULL THEN 'locked' END ORDER BY s.number)
    INTO _outcomes
    FROM (SELECT s.number, {{sent_keys}} FROM pg_catalog.unnest(keys) WITH ORDINALITY AS s(key, number)) AS s
    LEFT JOIN LATERAL (
        SELECT e.chunk_number AS first FROM {{embeddings_table}} AS e WHERE {{same_embeddings}}
        ORDER BY e.chunk_number LIMIT 1
    ) AS p ON true
    LEFT JOIN LATERAL (
        SELECT true AS is_free FROM {{embeddings_table}} AS e WHERE {{same_embeddings}} AND e.chunk_number = p.first
        FOR UPDATE OF e SKIP LOCKED
    ) AS l ON p.first IS NOT NULL;

    SELECT pg_catalog.array_agg(coalesce(s.outcome, CASE
               WHEN t.ctid IS NULL THEN 'gone'
               WHEN {{version}} = s.version THEN 'written'
               WHEN {{content_digest}} IS NOT DISTINCT FROM s.content
                   AND {{prefix}} COLLATE "C" IS NOT DISTINCT FROM s.prefix THEN 'written'
               ELSE 'changed'
           END) ORDER BY s.number),
           pg_catalog.array_agg({{version}} ORDER BY s.number)
    INTO _outcomes, _versions
    FROM (
        SELECT s.number, s.content, s.prefix, s.version, s.outcome, {{sent_keys}}
        FROM unnest(keys, contents, prefixes, versions, _outcomes) WITH ORDINALITY
            AS s(key, content, prefix, version, outcome, number)
    ) AS s
    LEFT JOIN {{table}} AS t ON {{same_key}};

    LOOP
        _written := ARRAY(SELECT s.key FROM unnest(keys, _outcomes) AS s(key, outcome) WHERE s.outcome = 'written');
        BEGIN
            -- Sessions that write the same rows wait for each other in one order, so they cannot deadlock.
            INSERT INTO {{embeddings_table}} AS e (
                {{key_names}}, chunk_number, chunk_start, chunk_end, digest, {{embedding_column}}
            )
            SELECT {{sent_key_names}}, s.number, s.start, s.end_, s.digest,
                   coalesce(s.embedding, p.embedding, k.embedding)
            FROM (
                SELECT s.number, s.source, s.start, s.end_, s.digest, s.embedding, {{sent_keys}}
                FROM unnest(chunk_keys, numbers, sources, starts, ends, digests, embeddings)
                    AS s(key, number, source, start, end_, digest, embedding)
                WHERE pg_catalog.cardinality(_written) = pg_catalog.cardinality(keys) OR s.key = ANY (_written)
            ) AS s
            LEFT JOIN LATERAL (
                SELECT e.{{embedding_column}} AS embedding
                FROM {{embeddings_table}} AS e
                WHERE s.embedding IS NULL AND {{same_embeddings}} AND e.chunk_number = s.source AND e.digest = s.digest
            ) AS p ON true
            -- Another job of the same row has written it since.
            LEFT JOIN LATERAL (
                SELECT e.{{embedding_column}} AS embedding
                FROM {{embeddings_table}} AS e
                WHERE s.embedding IS NULL AND p.embedding IS NULL AND {{same_embeddings}} AND e.digest = s.digest
                LIMIT 1
            ) AS k ON true
            ORDER BY {{sent_key_names}}, s.number
            ON CONFLICT ({{key_names}}, chunk_number) DO UPDATE
            SET chunk_start = excluded.chunk_start, chunk_end = excluded.chunk_end, digest = excluded.digest,
                {{embedding_column}} = excluded.{{embedding_column}}
            WHERE pg_catalog.record_image_ne(
                ROW(e.chunk_start, e.chunk_end, e.digest, e.{{embedding_column}}),
                ROW(excluded.chunk_start, excluded.chunk_end, excluded.digest, excluded.{{embedding_column}})
            );
            -- Another text before, and a row that is gone, leave chunks behind.
            DELETE FROM {{embeddings_table}} AS d
            WHERE d.ctid = ANY (ARRAY(
                SELECT f.ctid
                FROM (
                    SELECT s.first, CASE s.outcome WHEN 'written' THEN s.last ELSE 0 END AS last, {{sent_keys}}
                    FROM unnest(keys, firsts, lasts, _outcomes) AS s(key, first, last, outcome)
                    WHERE s.outcome = 'written' AND s.last IS NOT NULL OR s.outcome = 'gone'
                ) AS s
                CROSS JOIN LATERAL (
                    SELECT e.ctid FROM {{embeddings_table}} AS e
                    WHERE {{same_embeddings}} AND (e.chunk_number < s.first OR e.chunk_number > s.last)
                    OFFSET 0
                ) AS f
            ));
            -- A text that has changed since the first look has queued its row before this one. Its embeddings may have
            -- been written already, and must not be overwritten.
            _overtaken := ARRAY(
                SELECT s.key
                FROM (
                    SELECT s.key, s.content, s.prefix, s.version, {{sent_keys}}
                    FROM unnest(keys, contents, prefixes, _outcomes, _versions)
                        AS s(key, content, prefix, outcome, version)
                    WHERE s.outcome = 'written'
                ) AS s
                LEFT JOIN {{table}} AS t ON {{same_key}}
                WHERE CASE
                    WHEN t.ctid IS NULL THEN true
                    WHEN {{version}} = s.version THEN false
                    ELSE {{content_digest}} IS DISTINCT FROM s.content
                        OR {{prefix}} COLLATE "C" IS DISTINCT FROM s.prefix
                END
            );
            EXIT WHEN pg_catalog.cardinality(_overtaken) = 0;
            RAISE EXCEPTION SQLSTATE 'AE001' USING MESSAGE = 'texts have changed while their embeddings were written';
        EXCEPTION WHEN SQLSTATE 'AE001' THEN
            _outcomes := ARRAY(
                SELECT CASE WHEN s.key = ANY (_overtaken) THEN 'changed' ELSE s.outcome END
                FROM unnest(keys, _outcomes) WITH ORDINALITY AS s(key, outcome, number)
                ORDER BY s.number
            );
        END;
    END LOOP;
    RETURN QUERY
    SELECT s.key, s.outcome, s.version FROM unnest(keys, _outcomes, _versions) AS s(key, outcome, version);
EXCEPTION WHEN query_canceled THEN
    {{raise_if_cancelled}}
    RAISE EXCEPTION USING ERRCODE = 'external_routine_exception', MESSAGE = SQLERRM;
END;
$body$
