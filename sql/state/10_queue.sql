-- The queue is a table of pgmq.

DO LANGUAGE plpgsql $plpgsql$
BEGIN
    -- DROP SCHEMA … CASCADE drops the extension with the schema of pgvector, and leaves the queue on pgmq's list.
    DELETE FROM pgmq.meta AS m
    WHERE m.queue_name = 'embedding_jobs' AND to_regclass('pgmq.q_embedding_jobs') IS NULL;
    IF EXISTS (SELECT FROM pgmq.meta AS m WHERE m.queue_name = 'embedding_jobs') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = 'the queue embedding_jobs exists already',
            HINT = 'Stop what writes to it, wait until it is empty, then SELECT pgmq.drop_queue(''embedding_jobs'').';
    END IF;
END;
$plpgsql$;

SELECT pgmq.create('embedding_jobs');

-- A claim reads the due messages of one pipeline through this index. Messages that name no pipeline sort under ''.
CREATE INDEX q_embedding_jobs_pipeline_idx
    ON pgmq.q_embedding_jobs ((coalesce(message ->> 'pipeline', '')), vt);

-- A message of a hundred keys is larger than 2 kB. Compression would take an eighth of the time that the triggers add
-- to an application's INSERT.
ALTER TABLE pgmq.q_embedding_jobs SET (toast_tuple_target = 8160);

-- A publication of all tables would refuse each UPDATE and DELETE of a table without a replica identity.
ALTER TABLE pgmq.meta REPLICA IDENTITY FULL;
ALTER TABLE pgmq.topic_bindings REPLICA IDENTITY USING INDEX topic_bindings_unique_pattern_queue;

SELECT pg_catalog.pg_extension_config_dump('pgmq.q_embedding_jobs', '');
SELECT pg_catalog.pg_extension_config_dump('pgmq.q_embedding_jobs_msg_id_seq', '');

-- The triggers of attached tables write to this view. To replace it would wait for every transaction that has written.
CREATE VIEW autoembed._job AS
SELECT q.msg_id AS message_id,
       q.vt AS due_at,
       q.read_ct AS read_count,
       q.enqueued_at,
       q.last_read_at,
       q.message,
       coalesce(q.message ->> 'pipeline', '') AS pipeline,
       CASE jsonb_typeof(q.message -> 'keys')
           WHEN 'array' THEN jsonb_array_length(q.message -> 'keys')
           ELSE 1
       END AS rows,
       CASE jsonb_typeof(q.message -> 'keys')
           WHEN 'array' THEN q.message -> 'keys'
           ELSE jsonb_build_array(jsonb_build_array(q.message -> 'id'))
       END AS keys
FROM pgmq.q_embedding_jobs AS q;
COMMENT ON VIEW autoembed._job IS
    'The messages of the queue. pipeline: the id as text, empty if the message names none. rows: the number of rows '
    'that the message names. keys: these rows, an array in each case.';
