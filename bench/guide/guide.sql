-- guide.sql: the queue, functions and job of the guide "Automatic embeddings", with a table in place of pg_net's queue.
CREATE EXTENSION IF NOT EXISTS vector;
CREATE EXTENSION IF NOT EXISTS pgmq;
SELECT pgmq.create('embedding_jobs');

CREATE SCHEMA net;
-- The table is pg_net's; pump.mjs stands in for its worker.
CREATE UNLOGGED TABLE net.http_request_queue (
    id bigint GENERATED ALWAYS AS IDENTITY,
    url text NOT NULL,
    headers jsonb NOT NULL,
    body jsonb NOT NULL,
    timeout_milliseconds integer NOT NULL
);
CREATE FUNCTION net.http_post(url text, headers jsonb, body jsonb, timeout_milliseconds integer)
    RETURNS void
    LANGUAGE sql
BEGIN ATOMIC
    INSERT INTO net.http_request_queue (url, headers, body, timeout_milliseconds)
    VALUES (url, headers, body, timeout_milliseconds);
    SELECT pg_notify('http_request_queue', '');
END;

CREATE SCHEMA util;
CREATE TABLE util.setting (project_url text);

CREATE FUNCTION util.queue_embeddings()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = ''
AS $plpgsql$
BEGIN
    PERFORM pgmq.send('embedding_jobs', jsonb_build_object(
        'id', NEW.id,
        'schema', TG_TABLE_SCHEMA,
        'table', TG_TABLE_NAME,
        'contentFunction', TG_ARGV[0],
        'embeddingColumn', TG_ARGV[1]
    ));
    RETURN NEW;
END;
$plpgsql$;

CREATE FUNCTION util.process_embeddings(
    batch_size integer DEFAULT 10,
    max_requests integer DEFAULT 10,
    timeout_milliseconds integer DEFAULT 300000
)
    RETURNS void
    LANGUAGE sql
AS $sql$
    WITH job AS (
        SELECT
            q.message || jsonb_build_object('jobId', q.msg_id) AS job,
            (row_number() OVER () - 1) / batch_size AS batch
        FROM pgmq.read('embedding_jobs', timeout_milliseconds / 1000, batch_size * max_requests) AS q
    ),
    request AS (
        SELECT jsonb_agg(job) AS body FROM job GROUP BY batch
    )
    SELECT net.http_post(
        s.project_url || '/functions/v1/embed',
        '{"Content-Type": "application/json"}',
        r.body,
        timeout_milliseconds
    )
    FROM request AS r, util.setting AS s;
$sql$;
