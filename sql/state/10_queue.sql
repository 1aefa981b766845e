-- The queue is a table of pgmq.

DO LANGUAGE plpgsql $plpgsql$
BEGIN
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

SELECT pg_catalog.pg_extension_config_dump('pgmq.q_embedding_jobs', '');
SELECT pg_catalog.pg_extension_config_dump('pgmq.q_embedding_jobs_msg_id_seq', '');
