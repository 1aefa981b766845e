-- 40_enqueue.sql: the triggers that note which rows have changed. They call neither Python nor the network.

CREATE FUNCTION autoembed.queue_embeddings()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _root oid := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    _key jsonb;
BEGIN
    -- Nothing has changed, or only the vector that we ourselves are writing.
    IF TG_OP = 'UPDATE' AND (
        NEW OPERATOR(pg_catalog.*=) OLD
        OR pg_trigger_depth() = 1 AND current_setting('autoembed.writing', true) = _root::text
    ) THEN
        RETURN NEW;
    END IF;

    BEGIN
        -- By the type's output function: a cast, as of to_jsonb(), may be the owner's, and we run with more rights than his.
        _key := to_jsonb(format('%s', NEW.id));
        IF pg_typeof(NEW.id) IN ('bigint'::regtype, 'integer'::regtype, 'smallint'::regtype) THEN
            _key := to_jsonb((_key #>> '{}')::bigint);
        END IF;
    EXCEPTION WHEN undefined_column THEN
        RAISE WARNING USING
            ERRCODE = 'undefined_column',
            MESSAGE = format('a row of %s is not queued for embedding: the table has no column id', TG_RELID::regclass),
            HINT = 'queue_embeddings() finds rows by a primary key column called id.';
        RETURN NEW;
    END;

    -- What pgmq.send() does inside, without its dynamic SQL, which costs more than all the rest.
    INSERT INTO pgmq.q_embedding_jobs (vt, message)
    VALUES (
        clock_timestamp(),
        jsonb_build_object(
            'id', _key,
            'schema', TG_TABLE_SCHEMA,
            'table', TG_TABLE_NAME,
            'contentFunction', TG_ARGV[0],
            'embeddingColumn', TG_ARGV[1],
            'pipeline', (
                SELECT p.id
                FROM autoembed.pipeline AS p
                WHERE p.table_id = _root AND p.embedding_column = TG_ARGV[1]
            )
        )
    );
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.queue_embeddings() IS
    'Row trigger for INSERT and UPDATE: queues the row for embedding. Arguments: the function of a row that gives its text, and the embedding column.';

CREATE FUNCTION autoembed.clear_column()
    RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF NOT NEW OPERATOR(pg_catalog.*=) OLD THEN
        NEW := jsonb_populate_record(NEW, jsonb_build_object(TG_ARGV[0], NULL));
    END IF;
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.clear_column() IS
    'Row trigger BEFORE UPDATE: sets a column to NULL when the row changes. Argument: the column.';
