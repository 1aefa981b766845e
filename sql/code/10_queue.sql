-- The queue is a table of pgmq. Only this file and state/10_queue.sql name its objects.

CREATE OR REPLACE FUNCTION autoembed._keys_per_message()
    RETURNS integer
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT 100;
$sql$;
COMMENT ON FUNCTION autoembed._keys_per_message IS 'The most rows that one message names.';

CREATE OR REPLACE FUNCTION autoembed._bytes_per_message()
    RETURNS integer
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT 100000;
$sql$;
COMMENT ON FUNCTION autoembed._bytes_per_message IS
    'The bytes of keys from which a message names no further row: a key can have a megabyte.';

CREATE OR REPLACE FUNCTION autoembed._list_queue(listed boolean)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF listed THEN
        INSERT INTO pgmq.meta (queue_name, is_partitioned, is_unlogged)
        VALUES ('embedding_jobs', false, false)
        ON CONFLICT (queue_name) DO NOTHING;
    ELSE
        DELETE FROM pgmq.meta AS m WHERE m.queue_name = 'embedding_jobs';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._list_queue IS 'Puts the queue on pgmq''s list of queues, or takes it off.';

CREATE OR REPLACE FUNCTION autoembed._keep_restored_queue()
    RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._list_queue(false);
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._keep_restored_queue IS
    'Removes the entry that CREATE EXTENSION made in pgmq''s list, so that a restored dump can replace it.';

CREATE OR REPLACE FUNCTION autoembed._claim(
    max_rows integer,
    lease_seconds double precision,
    held bigint[],
    busy_models text[],
    busy_owners bigint[]
)
    RETURNS TABLE (message_id bigint, read_count integer, message jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- Each pipeline of a claim takes some milliseconds, in which nothing else is claimed.
    _most_pipelines CONSTANT integer := 30;
    -- A megabyte of keys takes some 0.1 s.
    _most_bytes CONSTANT integer := 1000000;
    -- A parameter, unlike clock_timestamp() itself, can be looked up in an index.
    _now timestamptz := clock_timestamp();
    _ready record;
    _messages refcursor;
    _message_id bigint;
    _rows integer;
    _bytes integer;
    _owner oid;
    _owner_room integer;
    _owner_bytes integer;
    _share integer;
    _room integer;
    _newest boolean;
    _ids bigint[] := ARRAY[]::bigint[];
BEGIN
    -- A lane's transaction begins here, so it takes the same lock as in _gate().
    LOCK TABLE autoembed.lane IN ACCESS SHARE MODE;
    -- min() always uses the index. EXISTS may use a sequential scan.
    IF (SELECT min(q.due_at) FROM autoembed._job AS q) <= _now IS NOT TRUE THEN
        RETURN;
    END IF;
    FOR _ready IN
        -- The recursion steps from one pipeline in the index to the next. A DISTINCT would read the whole queue.
        WITH RECURSIVE queued AS (
            (SELECT min(q.pipeline) AS pipeline FROM autoembed._job AS q)
            UNION ALL
            SELECT (
                SELECT min(q.pipeline) FROM autoembed._job AS q WHERE q.pipeline > n.pipeline
            )
            FROM queued AS n
            WHERE n.pipeline IS NOT NULL
        ),
        due AS (
            SELECT n.pipeline, s.id, s.failures, s.owner
            FROM queued AS n
            -- OFFSET 0 keeps the planner from reading all pipelines.
            LEFT JOIN LATERAL (
                SELECT p.id,
                       p.paused OR r.until > _now OR e.until > _now OR m.model = ANY (busy_models)
                           OR c.relowner = ANY (busy_owners::oid[]) AS waits,
                       r.failures,
                       c.relowner AS owner
                FROM autoembed.pipeline AS p
                CROSS JOIN LATERAL (SELECT coalesce(p.model, autoembed._default_model()) AS model) AS m
                LEFT JOIN autoembed.model_rest AS r ON r.model = m.model
                LEFT JOIN autoembed.pipeline_rest AS e ON e.pipeline_id = p.id
                LEFT JOIN pg_class AS c ON c.oid = p.table_id
                WHERE p.id = CASE WHEN n.pipeline ~ '^[1-9][0-9]{0,8}$' THEN n.pipeline::integer END
                OFFSET 0
            ) AS s ON true
            WHERE EXISTS (SELECT FROM autoembed._job AS q WHERE q.pipeline = n.pipeline AND q.due_at <= _now)
              AND s.waits IS NOT TRUE
        ),
        owner AS (
            SELECT d.owner, count(*) OVER () AS owners FROM due AS d GROUP BY d.owner
        ),
        ready AS (
            SELECT t.*
            FROM owner AS o
            CROSS JOIN LATERAL (
                SELECT d.*
                -- The random order serves others of an owner's pipelines each time. OFFSET 0 keeps the slow test below
                -- from those that are not needed.
                FROM (SELECT * FROM due WHERE due.owner IS NOT DISTINCT FROM o.owner ORDER BY random() OFFSET 0) AS d
                WHERE CASE
                    -- A restore in parallel brings the pipeline later, and a restore of the schema alone never.
                    WHEN d.id IS NULL THEN NOT EXISTS (
                        SELECT FROM pg_proc AS f
                        WHERE f.proname = '_content_' || d.pipeline AND f.pronamespace = 'autoembed'::regnamespace
                    )
                    ELSE (SELECT b.blocked FROM autoembed._pipeline_state AS b WHERE b.id = d.id) IS NULL
                END
                LIMIT greatest(1, _most_pipelines / o.owners)
            ) AS t
        )
        SELECT r.pipeline, r.failures, r.owner,
               count(*) OVER (PARTITION BY r.owner) AS pipelines,
               (SELECT count(DISTINCT coalesce(o.owner, 0)) FROM ready AS o) AS owners
        FROM ready AS r
        ORDER BY r.owner
    LOOP
        IF _owner IS DISTINCT FROM _ready.owner OR _owner_room IS NULL THEN
            _owner := _ready.owner;
            _owner_room := greatest(1, max_rows / _ready.owners);
            _owner_bytes := greatest(1, _most_bytes / _ready.owners);
        END IF;
        CONTINUE WHEN _owner_room <= 0 OR _owner_bytes <= 0;
        -- Each owner has an equal share, and so has each of the owner's pipelines. No tenant and no table holds up
        -- another. A provider that has failed is tried with one message.
        _share := CASE WHEN _ready.failures > 0 THEN 1
                       ELSE greatest(1, max_rows / _ready.owners / _ready.pipelines) END;
        -- Up to half of the share goes to the newest messages, so that a change does not wait behind a backlog.
        FOREACH _newest IN ARRAY '{true,false}'::boolean[] LOOP
            _room := CASE WHEN _newest THEN _share / 2 ELSE _share END;
            -- A FOR loop would lock fifty messages at a time, and so hide from other lanes those that it leaves.
            OPEN _messages FOR EXECUTE format(
                $sql$
                SELECT q.message_id, q.rows, CASE
                           WHEN pg_column_compression(q.message) IS NULL THEN pg_column_size(q.message)
                           ELSE octet_length(q.message::text)
                       END
                FROM autoembed._job AS q
                WHERE q.pipeline = $1 AND q.due_at <= $2 AND q.message_id <> ALL ($3)
                ORDER BY q.due_at %s
                FOR UPDATE SKIP LOCKED
                $sql$, CASE WHEN _newest THEN 'DESC' END) USING _ready.pipeline, _now, _ids;
            WHILE _room > 0 AND _owner_bytes > 0 LOOP
                FETCH _messages INTO _message_id, _rows, _bytes;
                EXIT WHEN NOT FOUND OR _newest AND _rows > _room;
                _ids := _ids || _message_id;
                _room := _room - _rows;
                _share := _share - _rows;
                _owner_room := _owner_room - _rows;
                _owner_bytes := _owner_bytes - _bytes;
            END LOOP;
            CLOSE _messages;
        END LOOP;
    END LOOP;
    RETURN QUERY
    WITH claimed AS (
        UPDATE autoembed._job AS q
        SET due_at = _now + make_interval(secs => lease_seconds), read_count = q.read_count + 1, last_read_at = _now
        WHERE q.message_id = ANY (_ids)
        RETURNING q.message_id, q.read_count, q.message
    ),
    held AS (
        UPDATE autoembed._this_lane
        SET claimed_at = _now, message_ids = held || _ids
        WHERE _ids <> '{}'
    )
    SELECT c.message_id, c.read_count, c.message FROM claimed AS c ORDER BY c.message_id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._claim IS
    'Claims due messages of the pipelines that can be embedded now: hides them for the lease and counts the read. '
    'The last message of each pipeline may exceed its share of max_rows and of a megabyte of keys. held: the messages '
    'that the lane has already. '
    'busy_models: the models that have not answered the lane for a while. busy_owners: those with vectors that the '
    'lane has yet to write.';

CREATE OR REPLACE FUNCTION autoembed._is_uncommitted(inserted_by xid)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _next bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
    -- The difference of two transactions, as xid has no epoch.
    _distance bigint := (inserted_by::text::bigint - _next) & 4294967295;
BEGIN
    IF _distance >= 2147483648 THEN
        _distance := _distance - 4294967296;
    END IF;
    RETURN pg_xact_status((_next + _distance)::text::xid8) = 'in progress';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._is_uncommitted IS
    'Whether the caller''s own transaction, or a part of it, has inserted a row with that xmin, which the caller sees.';

CREATE OR REPLACE FUNCTION autoembed._waits_for_commit(pipeline_ids integer[])
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN pg_current_xact_id_if_assigned() IS NOT NULL AND (
        EXISTS (
            SELECT FROM pgmq.q_embedding_jobs AS q
            WHERE coalesce(q.message ->> 'pipeline', '') = ANY (pipeline_ids::text[])
              AND autoembed._is_uncommitted(q.xmin)
        )
        OR EXISTS (
            SELECT FROM autoembed.backfill AS b
            WHERE b.pipeline_id = ANY (pipeline_ids) AND b.scanned_at IS NULL AND autoembed._is_uncommitted(b.xmin)
        )
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._waits_for_commit IS
    'Whether jobs of these pipelines wait for the caller''s own transaction to commit.';

CREATE OR REPLACE FUNCTION autoembed._extend(message_ids bigint[], lease_seconds double precision)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    UPDATE autoembed._job AS q
    SET due_at = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE q.message_id = ANY (message_ids);
$sql$;
COMMENT ON FUNCTION autoembed._extend IS 'Extends the lease of claimed messages.';

CREATE OR REPLACE FUNCTION autoembed._settle(message_ids bigint[])
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    DELETE FROM autoembed._job AS q WHERE q.message_id = ANY (message_ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._settle IS 'Deletes messages whose jobs have ended.';

CREATE OR REPLACE FUNCTION autoembed._release(message_ids bigint[])
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    UPDATE autoembed._job AS q
    SET due_at = clock_timestamp(), read_count = q.read_count - 1
    WHERE q.message_id = ANY (message_ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._release IS 'Gives claimed messages back as if they had never been read.';

CREATE OR REPLACE FUNCTION autoembed._requeue(
    pipeline_id integer,
    keys jsonb,
    attempts integer,
    read_count integer,
    delay_seconds double precision,
    suspect boolean,
    message_ids bigint[]
)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed._job (due_at, read_count, enqueued_at, message)
    VALUES (clock_timestamp() + make_interval(secs => delay_seconds),
            read_count,
            coalesce((SELECT min(q.enqueued_at) FROM autoembed._job AS q WHERE q.message_id = ANY (message_ids)),
                     clock_timestamp()),
            jsonb_build_object('pipeline', pipeline_id, 'keys', keys, 'attempts', attempts)
                || CASE WHEN suspect THEN '{"suspect": true}'::jsonb ELSE '{}'::jsonb END);
$sql$;
COMMENT ON FUNCTION autoembed._requeue IS
    'Queues rows again, due after the delay. read_count: the number of lanes that died while they held these rows. '
    'suspect: a server may have fallen over one of them. message_ids: the messages that they come from. The time that '
    'rows have waited counts on.';
