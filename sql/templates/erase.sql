-- Deletes the embeddings of rows by key; NULL: of all rows, or of those of a partition. Returns whether it could. Runs
-- as the table's owner, in the statement that deletes the rows or changes their keys.
CREATE FUNCTION autoembed._erase_{{id}}(keys text[], part pg_catalog.regclass DEFAULT NULL)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
    -- The plan is made once, perhaps while the table is small.
    SET enable_seqscan = off
    SET autoembed.erasing = '{{id}}'
AS $body$
#variable_conflict use_column
BEGIN
    LOCK TABLE {{embeddings_table}} IN ROW EXCLUSIVE MODE;
    {{embeddings_guard}}
    IF part IS NOT NULL THEN
        EXECUTE pg_catalog.format({{erase_part}}, part);
    ELSIF keys IS NULL THEN
        BEGIN
            LOCK TABLE {{embeddings_table}} IN ACCESS EXCLUSIVE MODE NOWAIT;
            TRUNCATE {{embeddings_table}};
        EXCEPTION WHEN OTHERS THEN
            -- To wait for a reader could be a deadlock. A foreign key or a trigger may refuse it.
            DELETE FROM {{embeddings_table}};
            -- An older snapshot does not show what lanes have written since.
            RETURN pg_catalog.current_setting('transaction_isolation') IN ('read committed', 'read uncommitted');
        END;
    ELSE
        DELETE FROM {{embeddings_table}} AS d
        WHERE d.ctid = ANY (ARRAY(
            SELECT f.ctid
            FROM (SELECT {{sent_keys}} FROM pg_catalog.unnest(keys) AS s(key)) AS s
            CROSS JOIN LATERAL (SELECT e.ctid FROM {{embeddings_table}} AS e WHERE {{same_embeddings}} OFFSET 0) AS f
        ));
    END IF;
    RETURN true;
EXCEPTION WHEN OTHERS THEN
    -- No row is kept from being deleted. A lane deletes its embeddings later.
    RETURN false;
END;
$body$
