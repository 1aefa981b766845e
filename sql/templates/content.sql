-- Reads the texts of rows by key, up to about max_bytes. Runs as the table's owner, in lanes. encoded: a text of more
-- than encoded_bytes, in UTF-8, in place of content. It comes in parts, as a row is held in memory several times at
-- once.
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
        vector_digest bytea,
        bytes bigint,
        own_key text,
        version text,
        is_locked boolean
    )
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
AS $body$
#variable_conflict use_column
DECLARE
    -- A cursor fetches the rows one by one. Several texts at a time may not fit into memory.
    _rows CURSOR FOR
        SELECT s.key,
               CASE WHEN {{content_bytes}} <= LEAST(encoded_bytes, max_text_bytes) THEN {{content}} END,
               {{vector_digest}},
               {{content_bytes}},
               {{own_key}},
               {{read_version}},
               t.xmax, t.tableoid, t.ctid
        FROM (SELECT s.key, {{sent_keys}} FROM pg_catalog.unnest(keys) AS s(key)) AS s
        JOIN {{table}} AS t ON {{same_key}};
    _locked_by xid;
    _table oid;
    _place tid;
    _encoded bytea;
    _part_bytes CONSTANT integer := 4194304;
    _context text;
BEGIN
    -- A lane does not wait for a lock on the table. The mode is that of a write, so a row that cannot be written is not
    -- embedded.
    LOCK TABLE {{table}} IN ROW EXCLUSIVE MODE NOWAIT;
    {{table_guard}}
    {{content_guard}}
    OPEN _rows;
    LOOP
        FETCH _rows INTO key, content, vector_digest, bytes, own_key, version, _locked_by, _table, _place;
        EXIT WHEN NOT FOUND;
        _encoded := NULL;
        IF bytes > LEAST(encoded_bytes, max_text_bytes) AND bytes <= max_text_bytes THEN
            -- The cursor would hold a long text once more. The row may have another version by now.
            SELECT pg_catalog.convert_to({{content}}, 'UTF8'), {{read_version}}
            INTO _encoded, version
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
        END IF;
        is_locked := false;
        -- Most rows have never been locked. The lock taken here is undone with what else the code of the owner does.
        IF _locked_by OPERATOR(pg_catalog.<>) 0 THEN
            PERFORM FROM {{table}} AS t WHERE t.ctid = _place AND t.tableoid = _table FOR NO KEY UPDATE SKIP LOCKED;
            is_locked := NOT FOUND;
        END IF;
        encoded := pg_catalog.substring(_encoded, 1, _part_bytes);
        RETURN NEXT;
        IF encoded IS NOT NULL THEN
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
