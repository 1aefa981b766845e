-- Does the same as content.sql where the embeddings are in a table beside the rows. digests, numbers: those of a
-- row's chunks that have an embedding.
CREATE FUNCTION autoembed._content_{{id}}(keys text[], max_bytes bigint, max_text_bytes bigint)
    RETURNS TABLE (key text, content text, bytes bigint, own_key text, digests bytea[], numbers integer[], prefix text)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
    -- The plan is made once, perhaps while the table is small.
    SET enable_seqscan = off
AS $body$
#variable_conflict use_column
DECLARE
    -- A cursor fetches the rows one by one. Several texts at a time may not fit into memory.
    _rows CURSOR FOR
        SELECT s.key,
               CASE WHEN {{content_bytes}} OPERATOR(pg_catalog.<=) max_text_bytes THEN {{content}} END,
               {{content_bytes}},
               {{own_key}},
               d.digests,
               d.numbers,
               {{prefix}}
        FROM (SELECT s.key, {{sent_keys}} FROM pg_catalog.unnest(keys) AS s(key)) AS s
        JOIN {{table}} AS t ON {{same_key}}
        CROSS JOIN LATERAL (
            SELECT pg_catalog.array_agg(e.digest ORDER BY e.chunk_number) AS digests,
                   pg_catalog.array_agg(e.chunk_number ORDER BY e.chunk_number) AS numbers
            FROM {{embeddings_table}} AS e
            WHERE {{same_embeddings}}
        ) AS d;
    _context text;
BEGIN
    {{content_guard}}
    -- A lane does not wait for a lock. A text whose embedding cannot be written is not sent.
    LOCK TABLE {{table}} IN ACCESS SHARE MODE NOWAIT;
    LOCK TABLE {{embeddings_table}} IN ROW EXCLUSIVE MODE NOWAIT;
    OPEN _rows;
    LOOP
        FETCH _rows INTO key, content, bytes, own_key, digests, numbers, prefix;
        EXIT WHEN NOT FOUND;
        bytes := GREATEST(bytes, pg_catalog.octet_length(content));
        IF bytes OPERATOR(pg_catalog.>) max_text_bytes THEN
            content := NULL;
            prefix := NULL;
        END IF;
        RETURN NEXT;
        max_bytes := max_bytes - bytes;
        IF max_bytes < 0 THEN
            -- A NULL key tells that rows are left.
            key := NULL;
            RETURN NEXT;
            EXIT;
        END IF;
    END LOOP;
EXCEPTION WHEN query_canceled THEN
    {{raise_if_cancelled}}
    RAISE EXCEPTION USING ERRCODE = 'external_routine_exception', MESSAGE = SQLERRM;
END;
$body$
