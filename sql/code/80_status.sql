-- State and progress of each embedding column, and what its requests cost.

CREATE OR REPLACE FUNCTION autoembed._estimated_rows(table_id regclass)
    RETURNS bigint
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- The activity statistics are newer than the last ANALYZE.
    SELECT sum(coalesce(
        nullif(pg_stat_get_live_tuples(c.oid), 0),
        nullif(c.reltuples, -1)::bigint,
        CASE WHEN autoembed._is_empty(c.oid) THEN 0 END
    ))::bigint
    FROM (SELECT t.relid FROM autoembed._partition_tree(table_id) AS t WHERE t.isleaf UNION SELECT table_id) AS r
    JOIN pg_class AS c ON c.oid = r.relid AND c.relkind = 'r';
$sql$;
COMMENT ON FUNCTION autoembed._estimated_rows IS
    'The estimated number of rows of a table, without reading or locking it. NULL if the table was never analysed.';

CREATE OR REPLACE VIEW autoembed.status WITH (security_barrier) AS
WITH held AS MATERIALIZED (
    SELECT m.id AS message_id
    FROM autoembed.lane AS l
    CROSS JOIN LATERAL unnest(l.message_ids) AS m(id)
    WHERE autoembed._lane_lives(l.pid, l.backend_start)
)
SELECT s.table_id::text AS table_name,
       s.embedding_column,
       s.model,
       CASE WHEN s.paused THEN 'paused'
            WHEN NOT s.sound THEN 'stopped'
            WHEN s.blocked IS NOT NULL THEN 'resting'
            WHEN w.is_scanned THEN 'backfilling'
            WHEN q.oldest_at IS NOT NULL THEN 'embedding'
            WHEN b.create_index AND b.index_problem IS NULL THEN 'indexing'
            WHEN e.stale > 0 THEN 'stale'
            ELSE 'idle'
       END AS state,
       coalesce(
           s.blocked,
           CASE WHEN e.stale > 0 AND b.pipeline_id IS NULL THEN 'its model or its content has changed since' END,
           -- The owner may have written anything into the record of a scan.
           'the index could not be built: ' || left(b.index_problem, 1000)
       ) AS reason,
       CASE WHEN s.blocked IS NOT NULL THEN s.hint
            WHEN e.stale > 0 AND b.pipeline_id IS NULL THEN
                format('Embed the rows again: SELECT autoembed.resync(%L);', s.table_id)
            WHEN b.index_problem IS NOT NULL THEN
                format('Create the index by hand, or have it built again: SELECT autoembed.resync(%L);', s.table_id)
       END AS hint,
       greatest(r.rows, e.embedded, b.rows_queued) AS estimated_rows,
       e.embedded,
       e.stale,
       q.waiting,
       q.in_flight,
       f.failed,
       clock_timestamp() - q.oldest_at AS oldest_waiting,
       a.rows_per_second,
       -- Neither says that all is done before it is.
       CASE WHEN NOT s.sound THEN NULL
            WHEN w.left = 0 THEN 100.0
            WHEN w.left > 0 THEN
                least(round(100 * (1 - w.left::numeric / greatest(r.rows, e.embedded, w.left, 1)), 1), 99.9)
       END AS percent_done,
       CASE WHEN NOT s.sound THEN NULL
            WHEN w.left = 0 THEN interval '0'
            WHEN e.stale > 0 AND b.pipeline_id IS NULL THEN NULL
            WHEN t.rows_per_second > 0 THEN
                make_interval(secs => least(ceil(w.left / t.rows_per_second), 1e10)::double precision)
       END AS time_left,
       s.embeddings_table::text AS embeddings_table
FROM autoembed._pipeline_state AS s
-- The next lane ends a pipeline whose table was dropped.
JOIN pg_class AS c ON c.oid = s.table_id
LEFT JOIN autoembed.backfill AS b ON b.pipeline_id = s.id
CROSS JOIN LATERAL (SELECT autoembed._estimated_rows(s.table_id) AS rows) AS r
CROSS JOIN LATERAL (
    SELECT (SELECT count(*) FROM autoembed.embedded AS e WHERE e.pipeline_id = s.id) AS embedded,
           CASE
               -- A scan has read all rows since. The next look of a lane ends it.
               WHEN s.stale_since IS NULL
                   OR b.scanned_at IS NOT NULL AND b.condition IS NULL AND b.started_at >= s.stale_since THEN 0
               ELSE (SELECT count(*) FROM autoembed.embedded AS e
                     WHERE e.pipeline_id = s.id AND (e.embedded_at >= s.stale_since) IS NOT TRUE)
           END AS stale
    -- Without it, each mention of the counts would count again.
    OFFSET 0
) AS e
CROSS JOIN LATERAL (SELECT count(*) AS failed FROM autoembed.failure AS f WHERE f.pipeline_id = s.id) AS f
CROSS JOIN LATERAL (
    -- A row may wait in several messages. More than 100,000 keys are not compared.
    SELECT CASE WHEN m.rows > 100000 THEN m.rows - m.rows_held ELSE k.waiting END AS waiting,
           CASE WHEN m.rows > 100000 THEN m.rows_held ELSE k.in_flight END AS in_flight,
           m.oldest_at
    FROM (
        SELECT coalesce(sum(j.rows), 0)::bigint AS rows,
               coalesce(sum(j.rows) FILTER (WHERE j.message_id IN (SELECT h.message_id FROM held AS h)), 0)::bigint
                   AS rows_held,
               min(j.enqueued_at) AS oldest_at
        FROM autoembed._job AS j
        WHERE j.pipeline = s.id::text
    ) AS m
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE NOT d.held) AS waiting,
               -- A message stays until the last of its rows has its vector.
               count(*) FILTER (WHERE d.held AND ((
                   SELECT e.embedded_at
                   FROM autoembed.embedded AS e
                   WHERE e.pipeline_id = s.id AND e.key = autoembed._short_key((
                       SELECT concat('[', string_agg(v.value::text, ',' ORDER BY v.number), ']')
                       FROM jsonb_array_elements(CASE jsonb_typeof(d.key) WHEN 'array' THEN d.key END)
                           WITH ORDINALITY AS v(value, number)
                   ))
               ) > d.claimed_at) IS NOT TRUE) AS in_flight
        FROM (
            SELECT i.key, bool_or(i.held) AS held, max(i.last_read_at) FILTER (WHERE i.held) AS claimed_at
            FROM (
                SELECT k.key, j.last_read_at,
                       j.due_at > clock_timestamp() AND j.message_id IN (SELECT h.message_id FROM held AS h) AS held
                FROM autoembed._job AS j
                CROSS JOIN LATERAL jsonb_array_elements(j.keys) AS k(key)
                WHERE m.rows <= 100000 AND j.pipeline = s.id::text
            ) AS i
            GROUP BY i.key
        ) AS d
    ) AS k
) AS q
CROSS JOIN LATERAL (
    SELECT round(
        coalesce(sum(u.rows), 0) / greatest(extract(epoch FROM clock_timestamp() - min(u.at)), 1), 1
    ) AS rows_per_second
    FROM autoembed.usage_entry AS u
    WHERE u.pipeline_id = s.id AND u.at > clock_timestamp() - interval '1 minute'
) AS a
CROSS JOIN LATERAL (
    SELECT x.is_scanned,
           -- It is not known how many rows the condition of a scan has still to find. A scan finds more rows than are
           -- estimated, and a message may outlast its rows.
           CASE
               WHEN b.pipeline_id IS NULL THEN greatest(q.waiting + q.in_flight, e.stale, x.least)
               WHEN NOT x.is_scanned THEN greatest(q.waiting + q.in_flight, x.least)
               WHEN b.condition IS NULL THEN
                   greatest(
                       q.waiting + q.in_flight + coalesce(r.rows, 0) - b.rows_queued::numeric,
                       q.waiting + q.in_flight, 1
                   )
           END AS left
    FROM (
        SELECT b.pipeline_id IS NOT NULL AND b.scanned_at IS NULL AS is_scanned,
               CASE WHEN q.oldest_at IS NULL THEN 0 ELSE 1 END AS least
    ) AS x
) AS w
CROSS JOIN LATERAL (
    -- Over five minutes, or since there is work. A scan passes rows that need nothing, too.
    SELECT coalesce(greatest(
        sum(u.rows) / greatest(extract(epoch FROM clock_timestamp() - greatest(
            clock_timestamp() - interval '5 minutes', least(q.oldest_at, b.started_at)
        )), 1),
        CASE
            WHEN w.is_scanned THEN
                (b.rows_queued::numeric - q.in_flight)
                / greatest(extract(epoch FROM clock_timestamp() - b.started_at), 1)
        END
    ), a.rows_per_second) AS rows_per_second
    FROM autoembed.usage_entry AS u
    WHERE u.pipeline_id = s.id
      AND u.at > greatest(clock_timestamp() - interval '5 minutes', least(q.oldest_at, b.started_at))
) AS t
WHERE autoembed._may_see(s.table_id);
COMMENT ON VIEW autoembed.status IS 'State and progress of each embedding column.';
COMMENT ON COLUMN autoembed.status.table_name IS 'Attached table.';
COMMENT ON COLUMN autoembed.status.embedding_column IS 'Column that holds the embeddings.';
COMMENT ON COLUMN autoembed.status.model IS 'Model that embeds the table.';
COMMENT ON COLUMN autoembed.status.state IS
    'idle; embedding: rows wait or are in flight; backfilling: the table is being scanned; indexing: its index is '
    'being built; resting: the provider fails, or a limit is reached; paused; stopped: the owner or an administrator '
    'must act; stale: rows have vectors of another model or content.';
COMMENT ON COLUMN autoembed.status.reason IS
    'Reason why the table is stopped, paused or resting, or lacks the index that was asked for.';
COMMENT ON COLUMN autoembed.status.hint IS 'Advice on what to do about the reason.';
COMMENT ON COLUMN autoembed.status.estimated_rows IS
    'Estimated number of rows of the table. NULL if the table was never analysed.';
COMMENT ON COLUMN autoembed.status.embedded IS 'Number of rows that have a vector, stale ones included.';
COMMENT ON COLUMN autoembed.status.stale IS
    'Number of rows whose vector was made before the model or the content changed, and that no scan has read since.';
COMMENT ON COLUMN autoembed.status.waiting IS
    'Number of rows that changed, were deleted or were found by a scan, and that no lane has claimed. Each counts '
    'once, among up to 100,000.';
COMMENT ON COLUMN autoembed.status.in_flight IS 'Number of rows that lanes have claimed and not written yet.';
COMMENT ON COLUMN autoembed.status.failed IS 'Number of rows that were given up. The view failed lists them.';
COMMENT ON COLUMN autoembed.status.oldest_waiting IS 'Time since the oldest row queued or in flight was queued.';
COMMENT ON COLUMN autoembed.status.rows_per_second IS 'Rows embedded a second, over the last minute.';
COMMENT ON COLUMN autoembed.status.percent_done IS
    'Share of the table that does not wait and is not stale, from 0 to 100 percent. NULL during a scan with a '
    'condition, whose rows are not known yet.';
COMMENT ON COLUMN autoembed.status.time_left IS
    'Time until no row waits, at the rate of the last five minutes, or since there is work. NULL if it cannot be '
    'estimated, or nothing works on stale rows.';
COMMENT ON COLUMN autoembed.status.embeddings_table IS
    'Table of the embeddings, if they are beside the rows. A table that has two sets has two of them.';

CREATE OR REPLACE VIEW autoembed.progress WITH (security_barrier) AS
SELECT l.pid,
       p.table_id::text AS table_name,
       p.embedding_column,
       CASE WHEN l.backfill THEN 'backfill' ELSE 'live' END AS lane,
       CASE WHEN h.rows > 0 THEN 'embedding' ELSE 'waiting for work' END AS phase,
       h.rows AS rows_in_flight,
       b.rows_queued AS backfill_rows_done,
       CASE WHEN b.pipeline_id IS NOT NULL THEN autoembed._estimated_rows(p.table_id) END AS backfill_rows_total,
       CASE WHEN h.rows > 0 THEN clock_timestamp() - l.claimed_at END AS since
FROM autoembed.lane AS l
LEFT JOIN LATERAL (
    SELECT q.message ->> 'pipeline' AS pipeline,
           sum(q.rows)::bigint AS rows
    FROM autoembed._job AS q
    WHERE q.message_id = ANY (l.message_ids) AND q.last_read_at <= l.claimed_at AND q.due_at > clock_timestamp()
    GROUP BY 1
) AS h ON true
LEFT JOIN autoembed.pipeline AS p ON p.id::text = h.pipeline
LEFT JOIN autoembed.backfill AS b ON b.pipeline_id = p.id AND l.backfill
WHERE autoembed._lane_lives(l.pid, l.backend_start) AND (p.id IS NULL OR autoembed._may_see(p.table_id));
COMMENT ON VIEW autoembed.progress IS E'Present work of each lane, one row a table, for \\watch.';
COMMENT ON COLUMN autoembed.progress.pid IS 'Process of the lane, as in pg_stat_activity.';
COMMENT ON COLUMN autoembed.progress.table_name IS 'Table whose rows the lane has claimed.';
COMMENT ON COLUMN autoembed.progress.embedding_column IS 'Column that holds the embeddings.';
COMMENT ON COLUMN autoembed.progress.lane IS 'live: the lane embeds rows that change; backfill: the lane scans tables.';
COMMENT ON COLUMN autoembed.progress.phase IS 'embedding, or waiting for work.';
COMMENT ON COLUMN autoembed.progress.rows_in_flight IS 'Number of rows that the lane has claimed.';
COMMENT ON COLUMN autoembed.progress.backfill_rows_done IS 'Number of rows that the backfill has queued.';
COMMENT ON COLUMN autoembed.progress.backfill_rows_total IS 'Estimated number of rows of the table.';
COMMENT ON COLUMN autoembed.progress.since IS 'Time since the lane claimed the rows.';

CREATE OR REPLACE VIEW autoembed._row_state WITH (security_barrier) AS
SELECT r.pipeline_id, r.key, r.digest, r.state, r.vector_digest
FROM (
    SELECT e.pipeline_id, e.key, e.digest, NULL AS state, e.vector_digest FROM autoembed.embedded AS e
    UNION ALL
    SELECT f.pipeline_id, f.key, NULL, 'failed', NULL FROM autoembed.failure AS f WHERE f.pipeline_id IS NOT NULL
    UNION ALL
    SELECT p.id, replace(k.key::text, ', ', ','), NULL, 'waiting', NULL
    FROM autoembed.pipeline AS p
    JOIN autoembed._job AS q ON q.pipeline = p.id::text
    CROSS JOIN LATERAL jsonb_array_elements(q.keys) AS k(key)
    UNION ALL
    SELECT b.pipeline_id, NULL, NULL, 'waiting', NULL FROM autoembed.backfill AS b WHERE b.scanned_at IS NULL
) AS r
JOIN autoembed.pipeline AS p ON p.id = r.pipeline_id
WHERE autoembed._owns(p.table_id);
COMMENT ON VIEW autoembed._row_state IS
    'State of the rows of the tables that the reader owns: the digests of the text that was embedded and of the '
    'vector, and whether the row waits or has failed. An entry without a key is for a whole table, which a backfill '
    'scans.';

CREATE OR REPLACE VIEW autoembed.usage WITH (security_barrier) AS
SELECT u.day,
       u.model,
       p.table_id::text AS table_name,
       p.embedding_column,
       sum(u.requests)::bigint AS requests,
       sum(u.inputs)::bigint AS inputs,
       sum(u.tokens)::bigint AS tokens,
       round(sum(u.tokens) * m.price_per_million_tokens / 1000000, 6) AS cost
FROM (
    SELECT d.day, d.model, d.pipeline_id, d.requests, d.inputs, d.tokens FROM autoembed.usage_day AS d
    UNION ALL
    SELECT (e.at AT TIME ZONE 'UTC')::date, e.model, e.pipeline_id, e.requests, e.inputs, e.tokens
    FROM autoembed.usage_entry AS e
) AS u
LEFT JOIN autoembed.pipeline AS p ON p.id = u.pipeline_id
LEFT JOIN autoembed.model AS m ON m.name = u.model
WHERE autoembed._may_see(p.table_id)
GROUP BY u.day, u.model, u.pipeline_id, p.table_id, p.embedding_column, m.price_per_million_tokens;
COMMENT ON VIEW autoembed.usage IS
    'Requests, texts and tokens per day (UTC), model and embedding column, and their cost at the model''s price. An '
    'owner sees those of the own tables.';
COMMENT ON COLUMN autoembed.usage.day IS 'The day, in UTC.';
COMMENT ON COLUMN autoembed.usage.model IS 'The model.';
COMMENT ON COLUMN autoembed.usage.table_name IS
    'The table. NULL for embed(), and for tables that are no longer embedded.';
COMMENT ON COLUMN autoembed.usage.embedding_column IS 'The column.';
COMMENT ON COLUMN autoembed.usage.requests IS 'Requests that were answered.';
COMMENT ON COLUMN autoembed.usage.inputs IS 'Texts in them.';
COMMENT ON COLUMN autoembed.usage.tokens IS 'Tokens as the provider counted them, or as estimated where it does not.';
COMMENT ON COLUMN autoembed.usage.cost IS 'Tokens at the model''s price_per_million_tokens; NULL where none is set.';

CREATE OR REPLACE VIEW autoembed._own_pipeline_state WITH (security_barrier) AS
SELECT s.* FROM autoembed._pipeline_state AS s WHERE autoembed._owns(s.table_id);
COMMENT ON VIEW autoembed._own_pipeline_state IS
    'The pipelines of the tables that the reader owns, and the reason why their jobs wait, if they do.';

CREATE OR REPLACE FUNCTION autoembed.wait_until_fresh(table_name regclass, timeout_seconds double precision DEFAULT 60)
    RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _end timestamptz;
    _look_at timestamptz := clock_timestamp();
    _owned CONSTANT autoembed.pipeline[] := autoembed._owned_pipelines(table_name, NULL);
    _pipelines CONSTANT integer[] := ARRAY(SELECT p.id FROM unnest(_owned) AS p);
    _stopped record;
    _failed bigint;
BEGIN
    IF (timeout_seconds BETWEEN 0 AND 1000000000) IS NOT TRUE THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('timeout_seconds must be from 0 to 1000000000, not %s',
                             coalesce(timeout_seconds::text, 'NULL')),
            HINT = 'Leave it out for a minute.';
    END IF;
    _end := clock_timestamp() + make_interval(secs => timeout_seconds);
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_transaction_state',
            MESSAGE = format('wait_until_fresh() cannot see what lanes do in a %s transaction',
                             upper(current_setting('transaction_isolation'))),
            DETAIL = 'Such a transaction does not see what others commit after it has begun.',
            HINT = 'Call it after BEGIN ISOLATION LEVEL READ COMMITTED.';
    ELSIF autoembed._waits_for_commit(_pipelines) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_transaction_state',
            MESSAGE = format('wait_until_fresh() would wait for its own transaction, which has changed table %s',
                             table_name),
            DETAIL = 'Lanes do not see these changes before the transaction commits.',
            HINT = 'Commit first. A role that may call autoembed.process() can embed within the transaction by it.';
    END IF;
    WHILE EXISTS (
        SELECT FROM autoembed._row_state AS r WHERE r.pipeline_id = ANY (_pipelines) AND r.state = 'waiting'
    ) LOOP
        IF clock_timestamp() >= _end THEN
            RAISE NOTICE USING
                MESSAGE = format('rows of table %s still wait after %s seconds', table_name, timeout_seconds),
                HINT = format(
                    'SELECT state, reason, hint FROM autoembed.status WHERE table_name = %L::regclass::text tells why.',
                    table_name
                );
            RETURN false;
        END IF;
        PERFORM pg_sleep(least(0.02, extract(epoch FROM _end - clock_timestamp())));
        -- The look for a reason takes as long as many looks at the queue.
        IF clock_timestamp() >= _look_at THEN
            EXIT WHEN EXISTS (
                SELECT FROM autoembed._own_pipeline_state AS s WHERE s.id = ANY (_pipelines) AND NOT s.sound
            );
            _look_at := clock_timestamp() + interval '1 second';
        END IF;
    END LOOP;
    SELECT s.blocked, s.hint INTO _stopped
    FROM autoembed._own_pipeline_state AS s
    WHERE s.id = ANY (_pipelines) AND NOT s.sound
    ORDER BY s.id
    LIMIT 1;
    IF FOUND THEN
        RAISE NOTICE USING
            MESSAGE = format('rows of table %s are not being embedded: %s', table_name, _stopped.blocked),
            HINT = coalesce(_stopped.hint, '');
        RETURN false;
    END IF;
    SELECT count(*) INTO _failed FROM autoembed.failed AS f WHERE f.table_name = wait_until_fresh.table_name::text;
    IF _failed > 0 THEN
        RAISE WARNING USING
            ERRCODE = 'no_data_found',
            MESSAGE = format('nothing of table %s waits, but %s of its rows or scans failed', table_name, _failed),
            HINT = format('SELECT key, reason FROM autoembed.failed WHERE table_name = %L::regclass::text shows them.',
                          table_name);
    END IF;
    RETURN _failed = 0;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.wait_until_fresh IS
    'Waits until no committed row of a table that the caller owns waits to be embedded. Returns false if '
    'timeout_seconds pass before that, at once if the table is stopped, or, with a WARNING, if rows were given up. An '
    'error if it could never see the end: in a REPEATABLE READ or SERIALIZABLE transaction, or in one that has '
    'changed the table.';
