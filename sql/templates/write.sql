-- Writes vectors into the rows that still have the text that was sent. Runs as the table's owner, in lanes.
-- contents: the digests of the texts that were sent. A long text itself would be copied several times.
-- versions: those of the rows that have the text that was sent; NULL: not known. A row of another version is read.
CREATE FUNCTION autoembed._write_{{id}}(
    keys text[],
    contents bytea[],
    model text,
    versions text[],
    embeddings {{vector_type}}[]
)
    RETURNS TABLE (key text, outcome text, vector_digest bytea)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
    SET autoembed.writing = '{{table_id}}'
AS $body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
    -- The request was sent for another model. An answer of the present model may have come first.
    IF model IS DISTINCT FROM {{model}} THEN
        RETURN QUERY SELECT s.key, 'changed', NULL::pg_catalog.bytea FROM pg_catalog.unnest(keys) AS s(key);
        RETURN;
    END IF;
    LOCK TABLE {{table}} IN ROW EXCLUSIVE MODE NOWAIT;
    {{table_guard}}
    {{content_guard}}
    FOR key, outcome, vector_digest IN
    WITH sent AS MATERIALIZED (
        SELECT s.key, s.content, s.version, s.embedding, {{sent_keys}}
        FROM unnest(keys, contents, versions, embeddings) AS s(key, content, version, embedding)
    ),
    -- Rows that another session has locked are left out. A lane waits for no application and for no other lane.
    locked AS MATERIALIZED (
        SELECT s.*, {{old_columns}}, t.{{embedding_column}} AS present,
               CASE
                   WHEN {{version}} = s.version THEN true
                   ELSE {{content_digest}} IS NOT DISTINCT FROM s.content
               END AS unchanged
        FROM sent AS s
        JOIN {{table}} AS t ON {{same_key}}
        ORDER BY {{keys}}
        FOR NO KEY UPDATE OF t SKIP LOCKED
    ),
    written AS (
        UPDATE {{table}} AS t
        SET {{embedding_column}} = s.embedding
        FROM locked AS s
        WHERE {{same_key}} AND s.unchanged
        -- A trigger of the table may have changed the text, and the vector.
        RETURNING s.key,
                  CASE WHEN {{are_kept}} THEN true ELSE {{content_digest}} IS NOT DISTINCT FROM s.content END
                      AS unchanged,
                  {{vector_digest}} AS vector_digest
    )
    SELECT s.key,
           CASE WHEN w.unchanged THEN 'written'
                WHEN w.key IS NOT NULL THEN 'overtaken'
                -- A trigger of the table may leave out an UPDATE that changes nothing.
                WHEN l.unchanged AND NOT pg_catalog.record_image_ne(ROW(l.present), ROW(l.embedding)) THEN 'written'
                -- A trigger or a policy of the table has left the row out.
                WHEN l.unchanged THEN 'skipped'
                WHEN l.key IS NOT NULL THEN 'changed'
                WHEN EXISTS (SELECT FROM {{table}} AS t WHERE {{same_key}}) THEN 'locked'
                ELSE 'gone'
           END,
           CASE WHEN w.key IS NOT NULL THEN w.vector_digest
                WHEN l.unchanged THEN (SELECT {{vector_digest}} FROM {{table}} AS t WHERE {{same_key}})
           END
    FROM sent AS s
    LEFT JOIN locked AS l ON l.key = s.key
    LEFT JOIN (
        SELECT w.key, pg_catalog.bool_and(w.unchanged) AS unchanged,
               (pg_catalog.array_agg(w.vector_digest))[1] AS vector_digest
        FROM written AS w
        GROUP BY w.key
    ) AS w ON w.key = s.key
    LOOP
        -- The error undoes the write, which would leave the vector of one text beside another text.
        IF outcome = 'overtaken' THEN
            RAISE EXCEPTION 'a trigger of the table changes the text when its embedding is written';
        END IF;
        RETURN NEXT;
    END LOOP;
EXCEPTION WHEN query_canceled THEN
    {{raise_if_cancelled}}
    RAISE EXCEPTION USING ERRCODE = 'external_routine_exception', MESSAGE = SQLERRM;
END;
$body$
