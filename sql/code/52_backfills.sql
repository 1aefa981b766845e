-- Backfills: scans of whole tables for missing and stale embeddings.

CREATE OR REPLACE FUNCTION autoembed._next_backfill(dedicated boolean, busy_models text[], busy_owners bigint[])
    RETURNS TABLE (
        pipeline_id integer, owner bigint, after text, condition text, failures integer, model text, provider text,
        problem text
    )
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _left_since timestamptz := 'infinity'::timestamptz;
    _id integer;
    _next integer;
BEGIN
    -- This begins a lane's transaction, so it takes the lock of _gate().
    LOCK TABLE autoembed.lane IN ACCESS SHARE MODE;
    IF NOT EXISTS (SELECT FROM autoembed.backfill AS b WHERE b.scanned_at IS NULL)
       -- Live changes need not wait behind a backfill that has a lane of its own.
       OR NOT dedicated AND EXISTS (SELECT FROM autoembed.lane AS l WHERE l.backfill) THEN
        RETURN;
    END IF;
    -- Between the end of such a lane and the start of the next there is none.
    IF NOT dedicated AND autoembed._backfill_lane_is_scheduled() THEN
        _left_since := clock_timestamp() - interval '30 seconds';
    END IF;
    -- Backfills of an owner take turns, so that none holds up another, whether its scan works or fails. Which owner is
    -- next is left to chance: one with many tables holds up no other. To look at the state of all pipelines takes a
    -- millisecond for each.
    FOR _id IN
        SELECT b.pipeline_id
        FROM autoembed.backfill AS b
        JOIN autoembed.pipeline AS p ON p.id = b.pipeline_id
        JOIN pg_class AS c ON c.oid = p.table_id AND c.relowner <> ALL (busy_owners::oid[])
        JOIN autoembed.model AS m
            ON m.name = coalesce(p.model, autoembed._default_model()) AND m.name <> ALL (busy_models)
        -- In a dump of 0.1.0, a backfill that no lane has worked on yet has a NULL.
        WHERE b.scanned_at IS NULL AND coalesce(b.served_at, b.started_at) < _left_since
        ORDER BY row_number() OVER (
                     PARTITION BY c.relowner ORDER BY coalesce(b.served_at, b.started_at), b.pipeline_id
                 ), random()
    LOOP
        CONTINUE WHEN NOT EXISTS (
            SELECT FROM autoembed._pipeline_state AS s WHERE s.id = _id AND s.blocked IS NULL
        );
        PERFORM FROM autoembed.backfill AS b
        WHERE b.pipeline_id = _id AND b.scanned_at IS NULL
        FOR UPDATE SKIP LOCKED;
        IF FOUND THEN
            _next := _id;
            EXIT;
        END IF;
    END LOOP;
    RETURN QUERY
    UPDATE autoembed.backfill AS b
    SET served_at = clock_timestamp()
    FROM autoembed._pipeline_state AS s
    JOIN pg_class AS c ON c.oid = s.table_id
    JOIN autoembed.model AS m ON m.name = s.model
    WHERE b.pipeline_id = _next AND s.id = _next
    -- The owner may have written any number of bytes there. The scan fails then.
    RETURNING b.pipeline_id, c.relowner::bigint,
              CASE WHEN octet_length(b.position) > 10000000 THEN 'the position is too long' ELSE b.position END,
              CASE WHEN octet_length(b.condition) > 1000000 THEN 'the condition is too long' ELSE b.condition END,
              s.failures, m.name, m.provider,
              CASE WHEN b.condition IS NOT NULL THEN
                  autoembed._condition_problem(s.table_id, b.condition_objects)
              END;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._next_backfill IS
    'The next backfill to scan for, locked until the commit. dedicated: the caller is a lane for backfills alone. '
    'busy_models, busy_owners: those for which the lane holds enough. problem: the reason why the condition may not '
    'run; NULL: it may.';

CREATE OR REPLACE FUNCTION autoembed._queue_backfill(
    pipeline_id integer,
    keys text[],
    exhausted boolean,
    lease_seconds double precision,
    held bigint[]
)
    RETURNS TABLE (message_id bigint, read_count integer, message jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _now timestamptz := clock_timestamp();
    _backfill autoembed.backfill;
    _queued jsonb;
BEGIN
    UPDATE autoembed.backfill AS b
    SET position = coalesce(keys[cardinality(keys)], b.position),
        rows_queued = b.rows_queued + cardinality(keys),
        rows_recorded = CASE WHEN b.position IS NULL THEN 0 ELSE b.rows_recorded END + (
            SELECT count(*) FROM autoembed.embedded AS e
            WHERE e.pipeline_id = b.pipeline_id AND e.key = ANY (autoembed._short_keys(keys))
              AND (e.embedded_at >= b.started_at) IS NOT TRUE
        ),
        scanned_at = CASE WHEN exhausted THEN _now END
    WHERE b.pipeline_id = _queue_backfill.pipeline_id
    RETURNING b.* INTO _backfill;
    IF exhausted AND _backfill.condition IS NULL AND (
        SELECT count(*) FROM autoembed.embedded AS e
        WHERE e.pipeline_id = _queue_backfill.pipeline_id AND (e.embedded_at >= _backfill.started_at) IS NOT TRUE
    ) > _backfill.rows_recorded THEN
        -- Rows have gone that no trigger has seen.
        PERFORM autoembed._queue_recorded(_queue_backfill.pipeline_id, '');
    END IF;
    IF _backfill.force THEN
        -- No text has this digest.
        UPDATE autoembed.embedded AS e SET digest = ''
        WHERE e.pipeline_id = _queue_backfill.pipeline_id AND e.key = ANY (autoembed._short_keys(keys));
    END IF;
    -- A row that a message names already is left to it, or it would be sent twice. A change is queued with its row, so
    -- the message of a row that the scan has seen is seen here.
    SELECT jsonb_agg(k.key::jsonb ORDER BY k.number) INTO _queued
    FROM unnest(keys) WITH ORDINALITY AS k(key, number)
    WHERE _backfill.force OR k.key::jsonb NOT IN (
        SELECT e.key
        FROM (
            SELECT q.keys FROM autoembed._job AS q
            WHERE q.pipeline = _queue_backfill.pipeline_id::text
            -- With more, this look would take longer than it saves.
            LIMIT 1000
        ) AS q
        CROSS JOIN LATERAL jsonb_array_elements(q.keys) AS e(key)
    );
    IF _queued IS NULL THEN
        RETURN;
    END IF;
    -- The message is queued as claimed: if this lane dies, another lane finds it.
    INSERT INTO autoembed._job AS q (due_at, read_count, last_read_at, message)
    VALUES (_now + make_interval(secs => lease_seconds), 1, _now, jsonb_build_object(
        'pipeline', _queue_backfill.pipeline_id,
        'keys', _queued
    ))
    RETURNING q.message_id, q.read_count, q.message INTO message_id, read_count, message;
    UPDATE autoembed._this_lane SET claimed_at = _now, message_ids = held || message_id;
    RETURN NEXT;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._queue_backfill IS
    'Moves the position of a backfill behind these keys. Returns a message that is already claimed and names those '
    'that no other message names.';

CREATE OR REPLACE FUNCTION autoembed._fail_backfill(pipeline_id integer, reason text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _backfill autoembed.backfill;
BEGIN
    DELETE FROM autoembed.backfill AS b WHERE b.pipeline_id = _fail_backfill.pipeline_id RETURNING b.* INTO _backfill;
    _backfill.condition := left(_backfill.condition, 1000);
    _backfill.position := left(_backfill.position, 1000);
    _backfill.index_problem := left(_backfill.index_problem, 1000);
    INSERT INTO autoembed.failure (message, error_class, reason, attempts)
    VALUES (jsonb_build_object('backfill', to_jsonb(_backfill)), 'message', _fail_backfill.reason, 1);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._fail_backfill IS 'Gives up a backfill, and puts it on the failed list with the reason.';

CREATE OR REPLACE FUNCTION autoembed._finish_backfills()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _backfill record;
BEGIN
    FOR _backfill IN
        SELECT b.pipeline_id, b.create_index, b.condition IS NULL AND b.started_at >= p.stale_since AS is_fresh
        FROM autoembed.backfill AS b
        JOIN autoembed.pipeline AS p ON p.id = b.pipeline_id
        WHERE b.scanned_at IS NOT NULL
          -- A restore brings triggers last. Until then jobs may be missing.
          AND (NOT p.managed OR EXISTS (
              SELECT FROM pg_trigger AS t
              WHERE t.tgrelid = p.table_id AND t.tgname = autoembed._trigger_name(p.id, 'insert')
          ))
          AND NOT EXISTS (SELECT FROM autoembed._job AS q WHERE q.pipeline = b.pipeline_id::text)
        FOR UPDATE OF b SKIP LOCKED
        -- A tenant may have locked the pipeline. Another look comes.
        FOR NO KEY UPDATE OF p SKIP LOCKED
    LOOP
        IF _backfill.is_fresh THEN
            UPDATE autoembed.pipeline AS p SET stale_since = NULL WHERE p.id = _backfill.pipeline_id;
        END IF;
        IF NOT _backfill.create_index OR autoembed._build_index(_backfill.pipeline_id) THEN
            DELETE FROM autoembed.backfill AS b WHERE b.pipeline_id = _backfill.pipeline_id;
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._finish_backfills IS
    'Ends the backfills whose rows are all embedded. A backfill that asked for an index ends when it has the index.';
