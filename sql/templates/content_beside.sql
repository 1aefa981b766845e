-- Does the same as content.sql where the embeddings are in a table beside the rows. digests, numbers: those of a
-- row's chunks that have an embedding. Only the first row of a key has them.
CREATE FUNCTION autoembed._content_{{id}}(
    keys text[],
    max_bytes bigint,
    max_text_bytes bigint,
    encoded_bytes bigint DEFAULT NULL
)
    RETURNS TABLE (
        key text,
        content text,
        encoded bytea,
        bytes bigint,
        own_key text,
        version text,
        digests bytea[],
        numbers integer[],
        prefix text
    )
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
    -- The plan is made once, perhaps while the table is small.
    {{plan_settings}}
AS $body$
#variable_conflict use_column
DECLARE
    -- A cursor fetches the rows one by one. Several texts at a time may not fit into memory.
    _rows CURSOR FOR
        SELECT s.key,
               CASE WHEN {{content_bytes}} <= LEAST(encoded_bytes, max_text_bytes) THEN {{content}} END,
               {{content_bytes}},
               {{own_key}},
               {{read_version}},
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
    _encoded bytea;
    _part_bytes CONSTANT integer := 4194304;
    _context text;
BEGIN
    -- A lane does not wait for a lock. A text whose embedding cannot be written is not sent.
    LOCK TABLE {{table}} IN ACCESS SHARE MODE NOWAIT;
    LOCK TABLE {{embeddings_table}} IN ROW EXCLUSIVE MODE NOWAIT;
    {{table_guard}}
    {{embeddings_guard}}
    {{content_guard}}
    OPEN _rows;
    LOOP
        FETCH _rows INTO key, content, bytes, own_key, version, digests, numbers, prefix;
        EXIT WHEN NOT FOUND;
        _encoded := NULL;
        IF bytes > LEAST(encoded_bytes, max_text_bytes) AND bytes <= max_text_bytes THEN
            -- The cursor would hold a long text once more. The row may have another version by now.
            SELECT pg_catalog.convert_to({{content}}, 'UTF8'), {{read_version}}, {{prefix}}
            INTO _encoded, version, prefix
            FROM (SELECT s.key, {{sent_keys}} FROM (SELECT key) AS s(key)) AS s
            JOIN {{table}} AS t ON {{same_key}};
            CONTINUE WHEN NOT FOUND;
        ELSIF pg_catalog.octet_length(content) > encoded_bytes THEN
            _encoded := pg_catalog.convert_to(content, 'UTF8');
            content := NULL;
        END IF;
        bytes := GREATEST(bytes, pg_catalog.octet_length(_encoded), pg_catalog.octet_length(content));
        IF bytes > max_text_bytes THEN
            content := NULL;
            _encoded := NULL;
            prefix := NULL;
        END IF;
        encoded := pg_catalog.substring(_encoded, 1, _part_bytes);
        RETURN NEXT;
        IF encoded IS NOT NULL THEN
            digests := NULL;
            numbers := NULL;
            FOR _before IN _part_bytes .. pg_catalog.octet_length(_encoded) OPERATOR(pg_catalog.-) 1 BY _part_bytes LOOP
                encoded := pg_catalog.substring(_encoded, _before OPERATOR(pg_catalog.+) 1, _part_bytes);
                RETURN NEXT;
            END LOOP;
            _encoded := NULL;
            encoded := NULL;
        END IF;
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
