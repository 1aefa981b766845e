-- The text index: texts are added with their vectors, and segments are merged.

CREATE OR REPLACE FUNCTION autoembed._text_config(pipeline_id integer)
    RETURNS regconfig
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT CASE WHEN pg_input_is_valid(p.text_config, 'regconfig') THEN p.text_config::regconfig END
        FROM autoembed.pipeline AS p
        WHERE p.id = _text_config.pipeline_id
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._text_config IS
    'The text search configuration of a pipeline. NULL: it has none, or that one was dropped.';

CREATE OR REPLACE FUNCTION autoembed._full_text_config(text_config text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT format('%I.%I', n.nspname, c.cfgname)
        FROM pg_ts_config AS c
        JOIN pg_namespace AS n ON n.oid = c.cfgnamespace
        WHERE c.oid = nullif(text_config, '')::regconfig
    );
EXCEPTION
    WHEN undefined_object OR invalid_name THEN
        RAISE EXCEPTION USING
            ERRCODE = SQLSTATE,
            MESSAGE = CASE
                WHEN SQLSTATE = '42602' THEN format('"%s" is not the name of a text search configuration', text_config)
                ELSE SQLERRM
            END,
            HINT = 'Give one of your own with its schema, such as public.my_config. All of them: SELECT oid::regconfig '
                'FROM pg_ts_config.';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._full_text_config IS
    'The full name of a text search configuration; fails if there is none of that name. An empty name gives NULL.';

CREATE OR REPLACE FUNCTION autoembed._unindexed(pipeline_id integer, keys text[])
    RETURNS text[]
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- The plan may be made while the table is small.
    SET enable_seqscan = off
AS $sql$
    SELECT coalesce(array_agg(k.key), '{}')
    FROM unnest(keys) AS k(key)
    -- A look-up for each key. The planner would rather read all texts of the table, for each batch of a lane.
    WHERE NOT EXISTS (
        SELECT FROM autoembed.text_document AS d
        WHERE d.pipeline_id = _unindexed.pipeline_id
          AND hashtextextended(d.key, 0) = hashtextextended(k.key COLLATE "C", 0)
          AND d.key = k.key
          AND d.is_live
        OFFSET 0
    );
$sql$;
COMMENT ON FUNCTION autoembed._unindexed IS 'Those of the keys whose rows have no text in the text index.';

CREATE OR REPLACE FUNCTION autoembed._drop_texts(pipeline_id integer, keys text[])
    RETURNS SETOF autoembed.text_document
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    UPDATE autoembed.text_document AS d
    SET is_live = false
    WHERE d.pipeline_id = _drop_texts.pipeline_id
      AND hashtextextended(d.key, 0) = ANY (ARRAY(
          SELECT hashtextextended(k.key COLLATE "C", 0) FROM unnest(keys) AS k(key)
      ))
      AND d.key = ANY (keys)
      AND d.is_live
    RETURNING d.*;
$sql$;
COMMENT ON FUNCTION autoembed._drop_texts IS 'Takes the texts of rows out of the text index. Returns them.';

CREATE OR REPLACE FUNCTION autoembed._index_texts(
    pipeline_id integer,
    keys text[],
    digests bytea[],
    rows integer[],
    chunk_numbers integer[],
    texts text[]
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- The place of a document in a segment has two bytes, one bit of them for the sign.
    _most CONSTANT integer := 32768;
    _config regconfig;
    _rows integer[];
    _segments bigint[];
BEGIN
    -- Another configuration waits until these texts are there, and then drops them. No lane waits for it.
    PERFORM FROM autoembed.pipeline AS p WHERE p.id = _index_texts.pipeline_id FOR SHARE NOWAIT;
    _config := autoembed._text_config(_index_texts.pipeline_id);
    IF _config IS NULL THEN
        RETURN;
    END IF;
    -- The record of a row is locked. If it is of another text, that text has been indexed since.
    _rows := ARRAY(
        SELECT k.number::integer
        FROM unnest(autoembed._short_keys(keys), digests) WITH ORDINALITY AS k(key, digest, number)
        JOIN autoembed.embedded AS e
            ON e.pipeline_id = _index_texts.pipeline_id AND e.key = k.key AND e.digest = k.digest
    );
    PERFORM FROM autoembed._drop_texts(
        _index_texts.pipeline_id, ARRAY(SELECT keys[r.number] FROM unnest(_rows) AS r(number))
    );
    _segments := ARRAY(
        SELECT nextval('autoembed.text_segment_id_seq') FROM generate_series(1, 1 + cardinality(texts) / _most)
    );
    WITH word AS MATERIALIZED (
        SELECT t.row, t.chunk_number, w.lexeme, sum(coalesce(cardinality(w.positions), 1))::integer AS frequency
        FROM unnest(_index_texts.rows, chunk_numbers, texts) AS t(row, chunk_number, text)
        CROSS JOIN LATERAL unnest(to_tsvector(_config, t.text)) AS w
        WHERE t.row = ANY (_rows)
        GROUP BY t.row, t.chunk_number, w.lexeme
    ),
    document AS MATERIALIZED (
        SELECT o.*, _segments[1 + o.place / _most] AS segment_id, (o.place % _most)::smallint AS ordinal
        FROM (
            SELECT n.*, row_number() OVER (ORDER BY n.id)::integer - 1 AS place
            FROM (
                SELECT nextval('autoembed.text_document_id_seq') AS id, d.row, d.chunk_number,
                       coalesce(w.length, 0)::integer AS length
                FROM (
                    SELECT DISTINCT t.row, t.chunk_number
                    FROM unnest(_index_texts.rows, chunk_numbers) AS t(row, chunk_number)
                    WHERE t.row = ANY (_rows)
                ) AS d
                LEFT JOIN (
                    SELECT w.row, w.chunk_number, sum(w.frequency) AS length
                    FROM word AS w
                    GROUP BY w.row, w.chunk_number
                ) AS w USING (row, chunk_number)
            ) AS n
        ) AS o
    ),
    posting AS MATERIALIZED (
        SELECT d.segment_id, w.lexeme, string_agg(int2send(d.ordinal), '' ORDER BY d.ordinal) AS ordinals,
               string_agg(substr(int2send((CASE
                   WHEN w.frequency < 128 THEN w.frequency
                   -- The rule of bm25.level_of().
                   ELSE least(255, 128 + round(8 * log(2, w.frequency / 128.0)))
               END)::smallint), 2), '' ORDER BY d.ordinal) AS levels
        FROM word AS w
        JOIN document AS d USING (row, chunk_number)
        GROUP BY d.segment_id, w.lexeme COLLATE "C", w.lexeme
    ),
    new_document AS (
        INSERT INTO autoembed.text_document (id, pipeline_id, key, chunk_number)
        SELECT d.id, _index_texts.pipeline_id, keys[d.row], d.chunk_number FROM document AS d ORDER BY d.id
    ),
    new_segment AS (
        INSERT INTO autoembed.text_segment (id, pipeline_id, document_count, posting_count, documents, lengths)
        SELECT d.segment_id, _index_texts.pipeline_id, count(*), (
                   SELECT count(*) FROM posting AS p WHERE p.segment_id = d.segment_id
               ),
               string_agg(int8send(d.id), '' ORDER BY d.ordinal), string_agg(int4send(d.length), '' ORDER BY d.ordinal)
        FROM document AS d
        GROUP BY d.segment_id
    )
    INSERT INTO autoembed.text_posting (segment_id, term, ordinals, levels)
    SELECT p.* FROM posting AS p;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._index_texts IS
    'Puts the texts of rows whose embeddings are recorded into the text index, in place of older ones, as one segment. '
    'digests: those recorded for keys. rows: the number of the row in keys, of each text. A long text comes in parts.';

CREATE OR REPLACE FUNCTION autoembed._forget_postings()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    DELETE FROM autoembed.text_posting AS p WHERE p.segment_id = OLD.id;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_postings IS 'Deletes the postings of a segment that is deleted.';

CREATE OR REPLACE FUNCTION autoembed._forget_texts()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    DELETE FROM autoembed.text_document AS d WHERE d.pipeline_id = NEW.id;
    DELETE FROM autoembed.text_segment AS s WHERE s.pipeline_id = NEW.id;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_texts IS
    'Empties the text index of a pipeline that gets another text search configuration.';

CREATE OR REPLACE FUNCTION autoembed._drop_part(pipeline_id integer)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- Lanes do nothing else meanwhile.
    _most CONSTANT integer := 10000;
    _count bigint;
    _is_all boolean;
BEGIN
    DELETE FROM autoembed.text_document AS d
    WHERE d.ctid = ANY (ARRAY(
        SELECT o.ctid FROM autoembed.text_document AS o
        WHERE o.pipeline_id = _drop_part.pipeline_id AND NOT o.is_live
        LIMIT _most
        FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS _count = ROW_COUNT;
    _is_all := _count < _most;
    DELETE FROM autoembed.text_posting AS p
    WHERE p.ctid = ANY (ARRAY(
        SELECT o.ctid FROM autoembed.text_segment AS s
        JOIN autoembed.text_posting AS o ON o.segment_id = s.id
        WHERE s.pipeline_id = _drop_part.pipeline_id
        LIMIT _most
        FOR UPDATE OF o SKIP LOCKED
    ));
    GET DIAGNOSTICS _count = ROW_COUNT;
    RETURN _is_all AND _count < _most;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_part IS
    'Deletes some of what the text index has of a pipeline that is ending. Returns whether little is left.';

CREATE OR REPLACE FUNCTION autoembed._segments_to_merge(
    dedicated boolean,
    most_postings integer,
    OUT pipeline_id integer,
    OUT segments bigint[],
    OUT postings integer[],
    OUT many_are_dead boolean
)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _most CONSTANT integer := 65000;
    _tier integer;
BEGIN
    -- A merge takes a second. Live changes need not wait for it.
    IF NOT dedicated AND EXISTS (SELECT FROM autoembed.lane AS l WHERE l.backfill) THEN
        RETURN;
    END IF;
    SELECT s.pipeline_id, length(s.document_count::text), false
    INTO _segments_to_merge.pipeline_id, _tier, many_are_dead
    FROM autoembed.text_segment AS s
    WHERE s.document_count < _most / 2 AND s.posting_count < most_postings / 2
    GROUP BY 1, 2
    -- Each look-up takes as long in a small segment as in one of the greatest.
    HAVING count(*) >= 10 OR sum(s.document_count) >= _most OR sum(s.posting_count) >= most_postings
    -- No table keeps the segments of others from being merged.
    ORDER BY 2, random()
    LIMIT 1;
    IF NOT FOUND THEN
        -- A text that changes leaves one behind.
        SELECT d.pipeline_id, true
        INTO _segments_to_merge.pipeline_id, many_are_dead
        FROM (
            SELECT d.pipeline_id, count(*) AS dead
            FROM autoembed.text_document AS d
            WHERE NOT d.is_live
            GROUP BY d.pipeline_id
        ) AS d
        JOIN (
            SELECT s.pipeline_id, sum(s.document_count) AS documents FROM autoembed.text_segment AS s GROUP BY 1
        ) AS s USING (pipeline_id)
        WHERE d.dead > 100 + 0.2 * s.documents
        LIMIT 1;
    END IF;
    -- Another lane may merge some of them.
    SELECT array_agg(c.id ORDER BY c.id), array_agg(c.posting_count ORDER BY c.id)
    INTO segments, postings
    FROM (
        SELECT l.id, l.posting_count, sum(l.document_count) OVER (ORDER BY l.id) AS documents,
               sum(l.posting_count) OVER (ORDER BY l.id) AS postings
        FROM (
            SELECT s.id, s.document_count, s.posting_count
            FROM autoembed.text_segment AS s
            WHERE s.pipeline_id = _segments_to_merge.pipeline_id
              AND (many_are_dead OR s.document_count < _most / 2 AND s.posting_count < most_postings / 2
                                    AND length(s.document_count::text) = _tier)
            ORDER BY s.id
            FOR UPDATE SKIP LOCKED
        ) AS l
    ) AS c
    WHERE c.documents <= _most AND c.postings <= most_postings OR many_are_dead;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._segments_to_merge IS
    'The segments of one pipeline that are to be merged into one, locked, and how many postings each has. dedicated: '
    'the caller is a lane for backfills alone. most_postings: so many are merged at a time. many_are_dead: only those '
    'with the most dead documents are worth it.';

CREATE OR REPLACE FUNCTION autoembed._replace_segments(
    pipeline_id integer,
    old_segments bigint[],
    document_count integer,
    documents bytea,
    lengths bytea,
    terms text[],
    ordinals bytea[],
    levels bytea[],
    dead_documents bigint[]
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _segment_id bigint := nextval('autoembed.text_segment_id_seq');
BEGIN
    DELETE FROM autoembed.text_segment AS s WHERE s.id = ANY (old_segments);
    DELETE FROM autoembed.text_document AS d WHERE d.id = ANY (dead_documents);
    INSERT INTO autoembed.text_segment (id, pipeline_id, document_count, posting_count, documents, lengths)
    SELECT _segment_id, _replace_segments.pipeline_id, _replace_segments.document_count, cardinality(terms),
           _replace_segments.documents, _replace_segments.lengths
    WHERE _replace_segments.document_count > 0;
    INSERT INTO autoembed.text_posting (segment_id, term, ordinals, levels)
    SELECT _segment_id, p.term, p.ordinals, p.levels
    FROM unnest(terms, _replace_segments.ordinals, _replace_segments.levels) AS p(term, ordinals, levels)
    ORDER BY p.term COLLATE "C";
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._replace_segments IS
    'Puts one segment in the place of several, and forgets the dead documents that it leaves out.';
