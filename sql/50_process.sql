-- 50_process.sql: the path of a job. First what the lane does to queue and state, one statement each; then the doors into Python.
-- What every claim calls is in PL/pgSQL: an SQL function with settings of its own is planned anew in each transaction.

CREATE FUNCTION autoembed._claim(max_rows integer, lease_seconds double precision, held bigint[])
    RETURNS TABLE (message_id bigint, read_count integer, message jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- A parameter, unlike clock_timestamp() itself, can be looked up in an index.
    _now timestamptz := clock_timestamp();
    _ready record;
    _messages refcursor;
    _due record;
    _share integer;
    _room integer;
    _newest boolean;
    _ids bigint[] := '{}';
BEGIN
    -- As _gate() does: this begins a lane's transaction.
    LOCK TABLE autoembed.lane IN ACCESS SHARE MODE;
    -- By the index, whatever the queue holds or has held: EXISTS may read all of a table in which many rows are expected.
    IF (SELECT min(q.vt) FROM pgmq.q_embedding_jobs AS q) <= _now IS NOT TRUE THEN
        RETURN;
    END IF;
    FOR _ready IN
        -- From one pipeline in the index to the next: a DISTINCT would read the whole queue.
        WITH RECURSIVE queued AS (
            (SELECT min(coalesce(q.message ->> 'pipeline', '')) AS pipeline FROM pgmq.q_embedding_jobs AS q)
            UNION ALL
            SELECT (
                SELECT min(coalesce(q.message ->> 'pipeline', ''))
                FROM pgmq.q_embedding_jobs AS q
                WHERE coalesce(q.message ->> 'pipeline', '') > n.pipeline
            )
            FROM queued AS n
            WHERE n.pipeline IS NOT NULL
        )
        SELECT n.pipeline, s.failures, count(*) OVER () AS pipelines
        FROM queued AS n
        -- OFFSET 0: looks at these pipelines alone, however many there are.
        LEFT JOIN LATERAL (
            SELECT p.id, p.paused OR r.until > _now AS waits, r.failures
            FROM autoembed.pipeline AS p
            LEFT JOIN autoembed.model_rest AS r ON r.model = coalesce(p.model, autoembed._default_model())
            WHERE p.id = CASE WHEN n.pipeline ~ '^[1-9][0-9]{0,8}$' THEN n.pipeline::integer END
            OFFSET 0
        ) AS s ON true
        WHERE EXISTS (
                  SELECT FROM pgmq.q_embedding_jobs AS q
                  WHERE coalesce(q.message ->> 'pipeline', '') = n.pipeline AND q.vt <= _now
              )
          -- First what is quick to see: many tables may wait for one model, and are looked at ten times a second.
          AND CASE WHEN s.waits THEN false ELSE (SELECT b.blocked FROM autoembed._pipeline_state AS b WHERE b.id = s.id) IS NULL END
    LOOP
        -- Every pipeline has its share, so that none holds up another; a provider that failed last time is tried with one message.
        _share := CASE WHEN _ready.failures > 0 THEN 1 ELSE greatest(1, max_rows / _ready.pipelines) END;
        -- Up to half of it the newest, the rest the oldest: what changes now need not wait for a backlog, which is worked off.
        FOREACH _newest IN ARRAY '{true,false}'::boolean[] LOOP
            _room := CASE WHEN _newest THEN _share / 2 ELSE _share END;
            -- Row by row: a FOR loop reads, and locks, fifty at a time, which other lanes would not see.
            OPEN _messages FOR EXECUTE format(
                $sql$
                SELECT q.msg_id,
                       CASE jsonb_typeof(q.message -> 'keys') WHEN 'array' THEN jsonb_array_length(q.message -> 'keys') ELSE 1 END AS rows
                FROM pgmq.q_embedding_jobs AS q
                WHERE coalesce(q.message ->> 'pipeline', '') = $1 AND q.vt <= $2 AND q.msg_id <> ALL ($3)
                ORDER BY q.vt %s
                FOR UPDATE SKIP LOCKED
                $sql$, CASE WHEN _newest THEN 'DESC' END) USING _ready.pipeline, _now, _ids;
            WHILE _room > 0 LOOP
                FETCH _messages INTO _due;
                EXIT WHEN NOT FOUND OR _newest AND _due.rows > _room;
                _ids := _ids || _due.msg_id;
                _room := _room - _due.rows;
                _share := _share - _due.rows;
            END LOOP;
            CLOSE _messages;
        END LOOP;
    END LOOP;
    RETURN QUERY
    WITH claimed AS (
        UPDATE pgmq.q_embedding_jobs AS q
        SET vt = _now + make_interval(secs => lease_seconds), read_ct = q.read_ct + 1, last_read_at = _now
        WHERE q.msg_id = ANY (_ids)
        RETURNING q.msg_id, q.read_ct, q.message
    ),
    held AS (
        UPDATE autoembed.lane AS l
        SET claimed_at = _now, message_ids = held || _ids
        WHERE (l.pid, l.backend_start) = (SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a) AND _ids <> '{}'
    )
    SELECT c.msg_id, c.read_ct, c.message FROM claimed AS c ORDER BY c.msg_id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._claim(integer, double precision, bigint[]) IS
    'Takes due messages of the pipelines that can be embedded now, hides them for the lease, and counts the try. Of each pipeline, the last message may exceed its share of max_rows. held: the messages that the lane has already.';

CREATE FUNCTION autoembed._extend(message_ids bigint[], lease_seconds double precision)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    UPDATE pgmq.q_embedding_jobs AS q
    SET vt = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE q.msg_id = ANY (message_ids);
$sql$;
COMMENT ON FUNCTION autoembed._extend(bigint[], double precision) IS 'Hides claimed messages for longer.';

CREATE FUNCTION autoembed._settle(message_ids bigint[])
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    DELETE FROM pgmq.q_embedding_jobs AS q WHERE q.msg_id = ANY (message_ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._settle(bigint[]) IS 'Deletes messages that are dealt with.';

CREATE FUNCTION autoembed._release(message_ids bigint[])
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    UPDATE pgmq.q_embedding_jobs AS q
    SET vt = clock_timestamp(), read_ct = q.read_ct - 1
    WHERE q.msg_id = ANY (message_ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._release(bigint[]) IS 'Gives claimed messages back as if they had never been read.';

CREATE FUNCTION autoembed._requeue(pipeline_id integer, keys jsonb, attempts integer, read_count integer, delay_seconds double precision)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO pgmq.q_embedding_jobs (vt, read_ct, message)
    VALUES (clock_timestamp() + make_interval(secs => delay_seconds),
            read_count,
            jsonb_build_object('pipeline', pipeline_id, 'keys', keys, 'attempts', attempts));
$sql$;
COMMENT ON FUNCTION autoembed._requeue(integer, jsonb, integer, integer, double precision) IS
    'Queues rows again, to be tried after the delay; read_count: how often they were in the hands of a lane that died.';

CREATE FUNCTION autoembed._resolve(message jsonb)
    RETURNS integer
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _missing text;
    _table oid;
    _pipeline autoembed.pipeline;
    _function oid;
BEGIN
    SELECT string_agg(k.key, ', ') INTO _missing
    FROM unnest('{id,schema,table,contentFunction,embeddingColumn}'::text[]) AS k(key)
    WHERE jsonb_typeof(message) IS DISTINCT FROM 'object' OR (message ->> k.key) IS NULL;
    IF _missing IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('the message lacks %s', _missing),
            HINT = 'Messages are sent by the trigger autoembed.queue_embeddings().';
    END IF;
    SELECT c.oid INTO _table
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = message ->> 'schema' AND c.relname = message ->> 'table';
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_table',
            MESSAGE = format('there is no table %I.%I', message ->> 'schema', message ->> 'table');
    END IF;
    _pipeline.id := autoembed._adopt(_table, message ->> 'embeddingColumn', message ->> 'contentFunction');
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = _pipeline.id;
    _function := autoembed._content_function(_pipeline.table_id, message ->> 'contentFunction');
    IF _function IS DISTINCT FROM autoembed._content_function_of(_pipeline) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_function',
            MESSAGE = CASE
                WHEN _function IS NULL THEN format('there is no function "%s" of one row of %s', message ->> 'contentFunction', _pipeline.table_id)
                ELSE format('%s.%I is not embedded from function "%s"', _pipeline.table_id, _pipeline.embedding_column, message ->> 'contentFunction')
            END;
    END IF;
    RETURN _pipeline.id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._resolve(jsonb) IS
    'The pipeline that a message of the guide''s form is for, made if it is new; an error if the message is of no use.';

CREATE FUNCTION autoembed._pipelines(ids integer[])
    RETURNS TABLE (id integer, schema_name text, table_name text, content_function text, embedding_column text, vector_type text,
                   truncate boolean, trusted boolean, blocked text, failures integer, model jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- To plan for each list anew costs each claim half a millisecond.
    SET plan_cache_mode = force_generic_plan
AS $plpgsql$
#variable_conflict use_column
BEGIN
    PERFORM autoembed._build_pipeline(s.id) FROM autoembed._pipeline_state AS s WHERE s.id = ANY (ids) AND s.sound;
    RETURN QUERY
    SELECT s.id, n.nspname::text, c.relname::text, s.content_function, s.embedding_column::text,
           (SELECT format_type(a.atttypid, NULL) FROM pg_attribute AS a WHERE a.attrelid = s.table_id AND a.attname = s.embedding_column),
           s.truncate, coalesce((SELECT r.rolsuper FROM pg_roles AS r WHERE r.oid = c.relowner), true), s.blocked, s.failures, autoembed._model_facts(autoembed._model(s.model))
    FROM autoembed._pipeline_state AS s
    LEFT JOIN pg_class AS c ON c.oid = s.table_id
    LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE s.id = ANY (ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._pipelines(integer[]) IS
    'What a pass needs to know of its pipelines, their functions made ready.';

CREATE FUNCTION autoembed._digests(pipeline_id integer, keys text[])
    RETURNS TABLE (key text, digest bytea)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY
    SELECT e.key, e.digest FROM autoembed.embedded AS e WHERE e.pipeline_id = _digests.pipeline_id AND e.key = ANY (keys);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._digests(integer, text[]) IS 'From which text the embeddings of these rows were made.';

CREATE FUNCTION autoembed._stage(vector_type regtype, row_bytes integer, file integer, may_have_rows boolean) RETURNS text
    LANGUAGE plpgsql
    -- As the caller: it is he who COPYs.
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- What fits in a page needs no TOAST table, which each commit would empty and index anew, at a cost of 2 kB of the lane's memory.
    storage CONSTANT text := CASE WHEN row_bytes <= 8100 THEN 'PLAIN' ELSE 'EXTERNAL' END;
    name CONSTANT text := format('_autoembed_%s_%s', (SELECT t.typname FROM pg_type AS t WHERE t.oid = vector_type), lower(storage));
    stage CONSTANT text := format('pg_temp.%I', name);
    usable boolean;
    is_there boolean;
BEGIN
    SELECT pg_has_role('pg_read_server_files', 'USAGE')
           AND has_database_privilege(current_database(), 'TEMPORARY')
           -- Made before any owner's code could make one of that name: only ours belongs to us.
           AND coalesce(bool_and(pg_get_userbyid(c.relowner) = current_user), true),
           count(*) > 0
    INTO usable, is_there
    FROM pg_class AS c
    WHERE c.relnamespace = pg_my_temp_schema() AND c.relname = name;
    IF NOT usable THEN
        RETURN NULL;
    ELSIF NOT is_there THEN
        EXECUTE format('CREATE TEMPORARY TABLE %s (n integer, v %s STORAGE %s) ON COMMIT DELETE ROWS', stage, vector_type, storage);
    ELSIF may_have_rows THEN
        EXECUTE format('TRUNCATE %s', stage);
    END IF;
    EXECUTE format('COPY %s FROM ''/proc/self/fd/%s'' (FORMAT binary)', stage, file);
    RETURN stage;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._stage(regtype, integer, integer, boolean) IS
    'Reads numbered vectors of about so many bytes from an open file into a temporary table, and returns its name; NULL if the caller may not do so.';

CREATE FUNCTION autoembed._record_embedded(pipeline_id integer, keys text[], digests bytea[], truncated boolean[])
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    INSERT INTO autoembed.embedded AS e (pipeline_id, key, digest, truncated)
    SELECT _record_embedded.pipeline_id, s.key, s.digest, s.truncated
    FROM unnest(keys, digests, _record_embedded.truncated) AS s(key, digest, truncated)
    -- It may have been ended meanwhile.
    WHERE EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = _record_embedded.pipeline_id FOR KEY SHARE)
    ORDER BY s.key COLLATE "C"
    ON CONFLICT ON CONSTRAINT embedded_pkey DO UPDATE
    SET digest = excluded.digest, truncated = excluded.truncated
    WHERE e.digest <> excluded.digest;
    DELETE FROM autoembed.failure AS f WHERE f.pipeline_id = _record_embedded.pipeline_id AND f.key = ANY (keys);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._record_embedded(integer, text[], bytea[], boolean[]) IS
    'Notes from which text each embedding was made, and strikes the rows off the failed list.';

CREATE FUNCTION autoembed._forget(pipeline_id integer, keys text[])
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM autoembed.embedded AS e WHERE e.pipeline_id = _forget.pipeline_id AND e.key = ANY (keys);
    DELETE FROM autoembed.failure AS f WHERE f.pipeline_id = _forget.pipeline_id AND f.key = ANY (keys);
$sql$;
COMMENT ON FUNCTION autoembed._forget(integer, text[]) IS 'Forgets rows that were deleted.';

CREATE FUNCTION autoembed._forget_all(pipeline_id integer)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM autoembed.embedded AS e WHERE e.pipeline_id = _forget_all.pipeline_id;
    -- One may be of a row that has come since: the newest messages are read before older ones.
    WITH failed AS (
        DELETE FROM autoembed.failure AS f WHERE f.pipeline_id = _forget_all.pipeline_id RETURNING f.key
    )
    INSERT INTO pgmq.q_embedding_jobs (vt, message)
    SELECT clock_timestamp(), jsonb_build_object('pipeline', _forget_all.pipeline_id, 'keys', jsonb_agg(k.key::jsonb))
    FROM (SELECT f.key, (row_number() OVER () - 1) / 100 AS message FROM failed AS f) AS k
    GROUP BY k.message;
$sql$;
COMMENT ON FUNCTION autoembed._forget_all(integer) IS 'Forgets all rows of a table that was truncated; those that have failed are looked at again.';

CREATE FUNCTION autoembed._fail(pipeline_id integer, key text, reason text, attempts integer, excerpt text)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- It may have been ended meanwhile.
    INSERT INTO autoembed.failure AS f (pipeline_id, key, error_class, reason, attempts, excerpt)
    SELECT p.id, _fail.key, 'row', _fail.reason, _fail.attempts, left(_fail.excerpt, 200)
    FROM autoembed.pipeline AS p
    WHERE p.id = _fail.pipeline_id
    FOR KEY SHARE
    ON CONFLICT (pipeline_id, key) DO UPDATE
    SET reason = excluded.reason, attempts = excluded.attempts, excerpt = excluded.excerpt,
        last_failed_at = excluded.last_failed_at;
$sql$;
COMMENT ON FUNCTION autoembed._fail(integer, text, text, integer, text) IS 'Puts a row on the failed list.';

CREATE FUNCTION autoembed._fail_message(message jsonb, reason text, attempts integer)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.failure (message, error_class, reason, attempts)
    VALUES (coalesce(_fail_message.message, 'null'), 'message', _fail_message.reason, _fail_message.attempts);
$sql$;
COMMENT ON FUNCTION autoembed._fail_message(jsonb, text, integer) IS
    'Puts a message that names no row on the failed list.';

CREATE FUNCTION autoembed._enter_lane(backfill boolean)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._forget_runs();
    INSERT INTO autoembed.lane (pid, backend_start, backfill)
    SELECT a.pid, a.backend_start, _enter_lane.backfill FROM pg_stat_get_activity(pg_backend_pid()) AS a
    ON CONFLICT DO NOTHING;
    RETURN EXISTS (
        SELECT FROM autoembed.pipeline AS p
        JOIN pg_index AS i ON i.indrelid = p.table_id
        JOIN pg_class AS c ON c.oid = i.indexrelid
        JOIN pg_am AS m ON m.oid = c.relam AND m.amname IN ('hnsw', 'ivfflat')
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._enter_lane(boolean) IS 'Signs this session on as a lane; backfill: for backfills alone. Returns whether any embedded table has a vector index.';

CREATE FUNCTION autoembed._lane_is_wanted()
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- One without an entry is of an extension that was dropped and made again.
    RETURN EXISTS (SELECT FROM autoembed.lane AS l WHERE (l.pid, l.backend_start) = (SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a) AND NOT l.stop);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lane_is_wanted() IS 'Whether this lane is signed on and nobody has asked it to stop.';

CREATE FUNCTION autoembed._gate()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    LOCK TABLE autoembed.lane IN ACCESS SHARE MODE;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._gate() IS
    'The first lock of a lane''s transaction, which DROP EXTENSION takes first too: neither waits for the other in a circle.';

CREATE FUNCTION autoembed._leave_lane()
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM autoembed.lane AS l WHERE (l.pid, l.backend_start) = (SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a);
$sql$;
COMMENT ON FUNCTION autoembed._leave_lane() IS 'Signs this session off.';

-- Backfills ---------------------------------------------------------------------------------------

CREATE FUNCTION autoembed._next_backfill(dedicated boolean)
    RETURNS TABLE (pipeline_id integer, after text, condition text, failures integer)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- As _gate() does: this begins a lane's transaction.
    LOCK TABLE autoembed.lane IN ACCESS SHARE MODE;
    IF NOT EXISTS (SELECT FROM autoembed.backfill AS b WHERE b.scanned_at IS NULL)
       -- Live changes do not wait behind a backfill where there is a lane for it.
       OR NOT dedicated AND EXISTS (SELECT FROM autoembed.lane AS l WHERE l.backfill) THEN
        RETURN;
    END IF;
    -- In turn, so that none holds up another, whatever becomes of its scan.
    RETURN QUERY
    WITH next AS (
        SELECT b.pipeline_id, s.failures
        FROM autoembed.backfill AS b
        JOIN autoembed._pipeline_state AS s ON s.id = b.pipeline_id AND s.blocked IS NULL
        WHERE b.scanned_at IS NULL
        ORDER BY b.served_at NULLS FIRST, b.started_at
        LIMIT 1
        FOR UPDATE OF b SKIP LOCKED
    )
    UPDATE autoembed.backfill AS b
    SET served_at = clock_timestamp()
    FROM next AS n
    WHERE b.pipeline_id = n.pipeline_id
    RETURNING b.pipeline_id, b.position, b.condition, n.failures;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._next_backfill(boolean) IS
    'A table to look through, locked until the commit; dedicated: for a lane that does nothing else.';

CREATE FUNCTION autoembed._queue_backfill(pipeline_id integer, keys text[], exhausted boolean, lease_seconds double precision, held bigint[])
    RETURNS TABLE (message_id bigint, read_count integer, message jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _now timestamptz := clock_timestamp();
    _backfill autoembed.backfill;
BEGIN
    UPDATE autoembed.backfill AS b
    SET position = coalesce(keys[cardinality(keys)], b.position),
        rows_queued = b.rows_queued + cardinality(keys),
        scanned_at = CASE WHEN exhausted THEN _now END
    WHERE b.pipeline_id = _queue_backfill.pipeline_id
    RETURNING b.* INTO _backfill;
    IF keys = '{}' THEN
        RETURN;
    END IF;
    IF _backfill.force THEN
        DELETE FROM autoembed.embedded AS e WHERE e.pipeline_id = _queue_backfill.pipeline_id AND e.key = ANY (keys);
    END IF;
    -- In the queue, but claimed already: should this lane die, another finds them there.
    INSERT INTO pgmq.q_embedding_jobs AS q (vt, read_ct, last_read_at, message)
    VALUES (_now + make_interval(secs => lease_seconds), 1, _now,
            jsonb_build_object('pipeline', _queue_backfill.pipeline_id, 'keys', (SELECT jsonb_agg(k.key::jsonb) FROM unnest(keys) AS k(key))))
    RETURNING q.msg_id, q.read_ct, q.message INTO message_id, read_count, message;
    UPDATE autoembed.lane AS l SET claimed_at = _now, message_ids = held || message_id WHERE (l.pid, l.backend_start) = (SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a);
    RETURN NEXT;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._queue_backfill(integer, text[], boolean, double precision, bigint[]) IS
    'Moves a backfill on behind these keys, and returns the message that names them, as claimed.';

CREATE FUNCTION autoembed._fail_backfill(pipeline_id integer, reason text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _backfill autoembed.backfill;
BEGIN
    DELETE FROM autoembed.backfill AS b WHERE b.pipeline_id = _fail_backfill.pipeline_id RETURNING b.* INTO _backfill;
    PERFORM autoembed._fail_message(jsonb_build_object('backfill', to_jsonb(_backfill)), reason, 1);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._fail_backfill(integer, text) IS 'Gives a backfill up, with the reason on the failed list.';

CREATE FUNCTION autoembed._finish_backfills()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _backfill record;
BEGIN
    FOR _backfill IN
        SELECT b.pipeline_id, b.create_index, p.table_id, p.embedding_column
        FROM autoembed.backfill AS b
        JOIN autoembed.pipeline AS p ON p.id = b.pipeline_id
        WHERE b.scanned_at IS NOT NULL
          AND NOT EXISTS (SELECT FROM pgmq.q_embedding_jobs AS q WHERE coalesce(q.message ->> 'pipeline', '') = b.pipeline_id::text)
        FOR UPDATE OF b SKIP LOCKED
    LOOP
        IF NOT _backfill.create_index OR autoembed._build_index(_backfill.pipeline_id) THEN
            DELETE FROM autoembed.backfill AS b WHERE b.pipeline_id = _backfill.pipeline_id;
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._finish_backfills() IS
    'Ends the backfills whose rows are all embedded, once those that asked for an index have it.';

-- The doors ---------------------------------------------------------------------------------------

CREATE FUNCTION autoembed._options_fault(batch_size integer, max_requests integer, timeout_milliseconds integer)
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT format('%s must be at least 1, not %s', o.name, coalesce(o.value::text, 'NULL'))
    FROM (VALUES ('batch_size', batch_size), ('max_requests', max_requests), ('timeout_milliseconds', timeout_milliseconds)) AS o(name, value)
    WHERE (o.value >= 1) IS NOT TRUE
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._options_fault(integer, integer, integer) IS
    'The fault in the arguments of process() and work(), NULL if there is none.';

CREATE FUNCTION autoembed._process(
    batch_size integer,
    max_requests integer,
    timeout_milliseconds integer,
    OUT read integer,
    OUT completed integer,
    OUT retried integer,
    OUT failed integer,
    OUT requests integer,
    OUT failed_jobs jsonb
)
    LANGUAGE plpython3u
    VOLATILE
    SECURITY DEFINER
    -- No search_path of its own: behind it, it could not see the caller's, to put that back after an owner's code has run.
    -- As in _work(), every name that the Python side uses is qualified.
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.process(batch_size, max_requests, timeout_milliseconds)
$python$;
COMMENT ON FUNCTION autoembed._process(integer, integer, integer) IS 'The work of process(), whose arguments are checked.';

CREATE FUNCTION autoembed.process(
    batch_size integer DEFAULT 100,
    max_requests integer DEFAULT 10,
    timeout_milliseconds integer DEFAULT 300000,
    OUT read integer,
    OUT completed integer,
    OUT retried integer,
    OUT failed integer,
    OUT requests integer,
    OUT failed_jobs jsonb
)
    LANGUAGE plpgsql
    VOLATILE
    SECURITY DEFINER
    -- No search_path of its own, for the reason that _process() has none. Every name is qualified.
AS $plpgsql$
DECLARE
    _fault pg_catalog.text := autoembed._options_fault(batch_size, max_requests, timeout_milliseconds);
BEGIN
    -- Python cannot raise an error without its prefix and its traceback.
    IF _fault IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = _fault, HINT = 'Leave it out for its default.';
    END IF;
    SELECT p.read, p.completed, p.retried, p.failed, p.requests, p.failed_jobs
    INTO read, completed, retried, failed, requests, failed_jobs
    FROM autoembed._process(batch_size, max_requests, timeout_milliseconds) AS p;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.process(integer, integer, integer) IS
    'Embeds waiting jobs once, in the caller''s transaction: up to max_requests requests at a time of up to batch_size texts, each request to a provider given timeout_milliseconds. Returns how many jobs were read, completed, put back to be tried again, and given up, and the requests sent; failed_jobs lists the jobs that did not complete, each with its error.';

CREATE PROCEDURE autoembed._work(
    run_seconds double precision,
    batch_size integer,
    max_requests integer,
    timeout_milliseconds integer,
    backfill boolean
)
    LANGUAGE plpython3u
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    doors.work(run_seconds, batch_size, max_requests, timeout_milliseconds, backfill)
$python$;
COMMENT ON PROCEDURE autoembed._work(double precision, integer, integer, integer, boolean) IS
    'The work of work(), whose arguments are checked.';

CREATE PROCEDURE autoembed.work(
    run_seconds double precision DEFAULT 300,
    batch_size integer DEFAULT 100,
    max_requests integer DEFAULT 20,
    timeout_milliseconds integer DEFAULT 300000,
    backfill boolean DEFAULT false
)
    LANGUAGE plpgsql
AS $plpgsql$
DECLARE
    _fault pg_catalog.text := autoembed._options_fault(batch_size, max_requests, timeout_milliseconds);
BEGIN
    IF _fault IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = _fault, HINT = 'Leave it out for its default.';
    END IF;
    -- In a transaction block, where a lane cannot commit, this fails without the traceback of Python.
    COMMIT;
    CALL autoembed._work(run_seconds, batch_size, max_requests, timeout_milliseconds, backfill);
END;
$plpgsql$;
COMMENT ON PROCEDURE autoembed.work(double precision, integer, integer, integer, boolean) IS
    'A lane: embeds what waits, and what comes, for run_seconds; commits as it goes and holds no transaction while a request is in flight. With backfill it looks through tables instead, and leaves the queue to others. schedule() has pg_cron call it.';

CREATE FUNCTION autoembed._embed(
    content text,
    model_name text,
    definition text,
    OUT embedding @extschema:vector@.vector,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpython3u
    STABLE
    PARALLEL RESTRICTED
    SET search_path = pg_catalog, @extschema:vector@, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.embed(content, model_name, definition)
$python$;
COMMENT ON FUNCTION autoembed._embed(text, text, text) IS
    'The embedding of a search text by a model, or why there is none. definition: the model''s row; a session keeps vectors of the same text and definition.';

CREATE FUNCTION autoembed.embed(content text, model text DEFAULT NULL)
    RETURNS @extschema:vector@.vector
    LANGUAGE plpgsql
    STABLE
    PARALLEL RESTRICTED
    SECURITY DEFINER
    SET search_path = pg_catalog, @extschema:vector@, pg_temp
AS $plpgsql$
DECLARE
    _model autoembed.model;
    _answer record;
BEGIN
    IF content IS NULL THEN
        RETURN NULL;
    END IF;
    -- Assigned, not selected: such an expression runs no statement, and shows none in the context of an error.
    _model := autoembed._model(model);
    _answer := autoembed._embed(content, _model.name, _model::text);
    IF _answer.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _answer.problem, HINT = _answer.hint, ERRCODE = _answer.errcode;
    END IF;
    RETURN _answer.embedding;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.embed(text, text) IS
    'The embedding of a search text by that model, NULL for the default one; NULL for NULL. ORDER BY column <=> autoembed.embed(…) uses the column''s index.';
