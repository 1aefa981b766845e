-- A pass reads and writes the database through these functions.

CREATE OR REPLACE FUNCTION autoembed._pipelines(ids integer[], unchecked integer[])
    RETURNS TABLE (
        id integer,
        schema_name text,
        table_name text,
        owner bigint,
        content_function text,
        embedding_column text,
        is_beside boolean,
        vector_type text,
        truncate boolean,
        blocked text,
        failures integer,
        model jsonb,
        chunking text,
        chunk_size integer,
        chunk_overlap integer,
        text_config text,
        splitter text,
        chunk_prefix text,
        was_checked boolean,
        was_rebuilt boolean
    )
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- A plan made for each list of ids would cost each claim half a millisecond.
    SET plan_cache_mode = force_generic_plan
    -- A tenant may have locked its table. No lane waits for that.
    SET lock_timeout = '10ms'
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _id integer;
    _unbuilt jsonb := '{}'::jsonb;
    _checked integer[] := '{}'::integer[];
    _rebuilt integer[] := '{}'::integer[];
    -- A table of a thousand columns takes a tenth of a second. The rest is looked at the next time.
    _until CONSTANT timestamptz := clock_timestamp() + interval '100 milliseconds';
BEGIN
    FOR _id IN
        SELECT s.id FROM autoembed._pipeline_state AS s WHERE s.id = ANY (unchecked) AND s.sound ORDER BY random()
    LOOP
        EXIT WHEN clock_timestamp() > _until;
        _checked := _checked || _id;
        BEGIN
            IF autoembed._build_pipeline(_id) THEN
                _rebuilt := _rebuilt || _id;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            -- Other pipelines must not wait for this one.
            _unbuilt := _unbuilt || jsonb_build_object(_id::text, 'its functions cannot be created: ' || SQLERRM);
        END;
    END LOOP;
    RETURN QUERY
    SELECT s.id, n.nspname::text, c.relname::text, c.relowner::bigint, s.content_function, s.embedding_column::text,
           s.embeddings_table IS NOT NULL, v.full_name, s.truncate, coalesce(s.blocked, _unbuilt ->> s.id::text),
           s.failures, autoembed._model_facts(autoembed._model(s.model)), p.chunking, p.chunk_size,
           p.chunk_overlap, p.text_config,
           -- Another body may cut in another way.
           (SELECT md5(concat(f.prosrc, pg_get_function_sqlbody(f.oid))) FROM pg_proc AS f
            WHERE f.oid = p.chunk_function_oid),
           p.chunk_prefix,
           s.id = ANY (_checked),
           s.id = ANY (_rebuilt)
    FROM autoembed._pipeline_state AS s
    JOIN autoembed.pipeline AS p ON p.id = s.id
    LEFT JOIN pg_class AS c ON c.oid = s.table_id
    LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
    LEFT JOIN pg_attribute AS a
        ON a.attrelid = coalesce(s.embeddings_table, s.table_id) AND a.attname = s.embedding_column
    LEFT JOIN autoembed._vector_types() AS v ON v.id = a.atttypid
    WHERE s.id = ANY (ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._pipelines IS
    'The facts about these pipelines that a pass needs. Makes the functions of the unchecked ones where they are '
    'missing or outdated: was_rebuilt. Looks at as many of them as a tenth of a second allows: was_checked.';

CREATE OR REPLACE FUNCTION autoembed._digests(pipeline_id integer, keys text[])
    RETURNS TABLE (key text, digest bytea, vector_digest bytea, replaced integer, age_seconds double precision)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY
    SELECT k.key, e.digest, e.vector_digest, e.replaced::integer,
           extract(epoch FROM clock_timestamp() - e.embedded_at)::double precision
    FROM unnest(keys, autoembed._short_keys(keys)) AS k(key, short_key)
    JOIN autoembed.embedded AS e ON e.pipeline_id = _digests.pipeline_id AND e.key = k.short_key;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._digests IS
    'The digests of the texts from which the embeddings of these rows were made and of the vectors, how often these '
    'were replaced, and the time since they were written.';

CREATE OR REPLACE FUNCTION autoembed._stage(
    vector_type regtype,
    row_bytes integer,
    file integer,
    may_have_rows boolean
)
    RETURNS text
    LANGUAGE plpgsql
    -- SECURITY INVOKER on purpose: COPY needs the caller's pg_read_server_files.
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- A row of up to 8100 bytes fits in a page and needs no TOAST table. Each commit would empty that table and build
    -- its index again, which takes 2 kB of the lane's memory each time.
    storage CONSTANT text := CASE WHEN row_bytes <= 8100 THEN 'PLAIN' ELSE 'EXTERNAL' END;
    name CONSTANT text := format(
        '_autoembed_%s_%s', (SELECT t.typname FROM pg_type AS t WHERE t.oid = vector_type), lower(storage)
    );
    stage CONSTANT text := format('pg_temp.%I', name);
    usable boolean;
    is_there boolean;
    is_old boolean;
BEGIN
    SELECT pg_has_role('pg_read_server_files', 'USAGE')
           AND has_database_privilege(current_database(), 'TEMPORARY')
           -- An owner's code could make a table of that name first. Only the lane's own table is used.
           AND coalesce(bool_and(pg_get_userbyid(c.relowner) = current_user), true),
           count(*) > 0,
           count(*) > count(a.attnum)
    INTO usable, is_there, is_old
    FROM pg_class AS c
    LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'v' AND a.atttypid = vector_type
    WHERE c.relnamespace = pg_my_temp_schema() AND c.relname = name;
    IF NOT usable THEN
        RETURN NULL;
    END IF;
    -- pgvector may be another one since, and has taken its column along.
    IF is_old THEN
        EXECUTE format('DROP TABLE %s', stage);
    END IF;
    IF is_old OR NOT is_there THEN
        BEGIN
            EXECUTE format(
                'CREATE TEMPORARY TABLE %s (n integer, v %s STORAGE %s) ON COMMIT DELETE ROWS',
                stage, vector_type, storage
            );
        EXCEPTION WHEN OTHERS THEN
            -- An event trigger may refuse all DDL.
            RETURN NULL;
        END;
    ELSIF may_have_rows THEN
        EXECUTE format('TRUNCATE %s', stage);
    END IF;
    EXECUTE format('COPY %s FROM ''/proc/self/fd/%s'' (FORMAT binary)', stage, file);
    RETURN stage;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._stage IS
    'Reads numbered vectors of about row_bytes each from an open file into a temporary table, and returns the table''s '
    'name. NULL if the caller may not do so.';

CREATE OR REPLACE FUNCTION autoembed._record_embedded(
    pipeline_id integer,
    keys text[],
    digests bytea[],
    vector_digests bytea[],
    truncated boolean[],
    written boolean
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Few texts are so long. A look for a pipeline with such takes microseconds.
    IF written AND EXISTS (
        SELECT FROM autoembed.paid_chunk AS c WHERE c.pipeline_id = _record_embedded.pipeline_id
    ) THEN
        DELETE FROM autoembed.paid_chunk AS c
        WHERE c.pipeline_id = _record_embedded.pipeline_id AND c.key = ANY (autoembed._short_keys(keys));
    END IF;
    INSERT INTO autoembed.embedded AS e (pipeline_id, key, digest, truncated, vector_digest)
    SELECT _record_embedded.pipeline_id, s.key, s.digest, s.truncated, s.vector_digest
    FROM unnest(autoembed._short_keys(keys), digests, vector_digests, _record_embedded.truncated)
        AS s(key, digest, vector_digest, truncated)
    -- The pipeline may have ended since.
    WHERE EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = _record_embedded.pipeline_id FOR KEY SHARE)
    ORDER BY s.key COLLATE "C"
    ON CONFLICT ON CONSTRAINT embedded_pkey DO UPDATE
    SET digest = excluded.digest, truncated = excluded.truncated, vector_digest = excluded.vector_digest,
        embedded_at = excluded.embedded_at,
        -- The text is the same, so the vector was not. Or the former write has changed the text.
        replaced = CASE
            WHEN NOT written OR e.digest <> excluded.digest AND e.vector_digest IS DISTINCT FROM E'\\x00' THEN 0
            WHEN e.embedded_at > clock_timestamp() - interval '1 hour' THEN least(e.replaced + 1, 100)
            ELSE 1
        END
    WHERE written OR e.vector_digest IS NULL;
    DELETE FROM autoembed.failure AS f
    WHERE f.pipeline_id = _record_embedded.pipeline_id
      AND autoembed._short_key(f.key) = ANY (autoembed._short_keys(keys));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._record_embedded IS
    'Records the digests of the text from which each embedding was made and of the vector, and takes the rows off the '
    'failed list. written: the vectors were written now.';

CREATE OR REPLACE FUNCTION autoembed._note_replaced(pipeline_id integer, keys text[], echo boolean)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    UPDATE autoembed.embedded AS e
    -- No vector has one of these digests.
    SET vector_digest = CASE WHEN echo THEN E'\\x00'::bytea ELSE '' END
    WHERE e.pipeline_id = _note_replaced.pipeline_id AND e.key = ANY (autoembed._short_keys(keys))
      -- A vector in the row shows it by its digest. Those beside the rows have none of their own.
      AND (echo OR e.vector_digest IS NULL OR EXISTS (
          SELECT FROM autoembed.pipeline AS p
          WHERE p.id = _note_replaced.pipeline_id AND p.embeddings_table IS NOT NULL
      ));
$sql$;
COMMENT ON FUNCTION autoembed._note_replaced IS
    'Records that somebody else has replaced the vectors of these rows. Rows whose vector has a digest show it. echo: '
    'a trigger has changed these rows when a lane wrote a vector.';

CREATE OR REPLACE FUNCTION autoembed._pay_chunks(pipeline_id integer, key text, digests bytea[], vectors bytea[])
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.paid_chunk AS c (pipeline_id, key, digest, vector)
    SELECT p.id, autoembed._short_key(_pay_chunks.key), u.digest, u.vector
    FROM autoembed.pipeline AS p
    CROSS JOIN unnest(digests, vectors) AS u(digest, vector)
    WHERE p.id = _pay_chunks.pipeline_id
    ON CONFLICT DO NOTHING;
$sql$;
COMMENT ON FUNCTION autoembed._pay_chunks IS
    'Keeps the vectors of some chunks of a row until the row is written.';

CREATE OR REPLACE FUNCTION autoembed._paid_chunks(pipeline_id integer, key text)
    RETURNS SETOF bytea
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT c.digest
    FROM autoembed.paid_chunk AS c
    WHERE c.pipeline_id = _paid_chunks.pipeline_id AND c.key = autoembed._short_key(_paid_chunks.key);
$sql$;
COMMENT ON FUNCTION autoembed._paid_chunks IS 'The digests of the chunks of a row whose vectors are kept.';

CREATE OR REPLACE FUNCTION autoembed._paid_vectors(pipeline_id integer, key text, digests bytea[])
    RETURNS TABLE (digest bytea, vector bytea)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT c.digest, c.vector
    FROM autoembed.paid_chunk AS c
    WHERE c.pipeline_id = _paid_vectors.pipeline_id
      AND c.key = autoembed._short_key(_paid_vectors.key)
      AND c.digest = ANY (digests);
$sql$;
COMMENT ON FUNCTION autoembed._paid_vectors IS 'The vectors that are kept of these chunks of a row.';

CREATE OR REPLACE FUNCTION autoembed._forget(pipeline_id integer, keys text[])
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM autoembed.embedded AS e
    WHERE e.pipeline_id = _forget.pipeline_id AND e.key = ANY (autoembed._short_keys(keys));
    DELETE FROM autoembed.paid_chunk AS c
    WHERE c.pipeline_id = _forget.pipeline_id AND c.key = ANY (autoembed._short_keys(keys));
    DELETE FROM autoembed.failure AS f
    WHERE f.pipeline_id = _forget.pipeline_id AND autoembed._short_key(f.key) = ANY (autoembed._short_keys(keys));
    -- A text that was indexed after this transaction had begun may be of a new row with an old key.
    INSERT INTO autoembed._job (due_at, message)
    SELECT clock_timestamp(), jsonb_build_object('pipeline', _forget.pipeline_id, 'keys', jsonb_agg(k.key::jsonb))
    FROM (
        SELECT d.key, (row_number() OVER () - 1) / autoembed._keys_per_message() AS number
        FROM autoembed._drop_texts(_forget.pipeline_id, keys) AS d
        WHERE d.indexed_at > now()
        GROUP BY d.key
    ) AS k
    GROUP BY k.number;
$sql$;
COMMENT ON FUNCTION autoembed._forget IS 'Deletes all records of rows that were deleted.';

CREATE OR REPLACE FUNCTION autoembed._forget_part(pipeline_id integer, until timestamptz)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- Lanes do nothing else meanwhile.
    _most CONSTANT integer := 5000;
    _count bigint;
    _deleted bigint := 0;
    _is_all boolean;
BEGIN
    -- A record that another session has locked is left for the next time.
    DELETE FROM autoembed.embedded AS e
    WHERE e.ctid = ANY (ARRAY(
        SELECT o.ctid FROM autoembed.embedded AS o
        WHERE o.pipeline_id = _forget_part.pipeline_id AND (o.embedded_at > until) IS NOT TRUE
        LIMIT _most
        FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS _count = ROW_COUNT;
    _deleted := _deleted + _count;
    DELETE FROM autoembed.failure AS f
    WHERE f.ctid = ANY (ARRAY(
        SELECT o.ctid FROM autoembed.failure AS o
        WHERE o.pipeline_id = _forget_part.pipeline_id AND o.last_failed_at <= until
        LIMIT _most
        FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS _count = ROW_COUNT;
    _deleted := _deleted + _count;
    DELETE FROM autoembed.paid_chunk AS c
    WHERE c.ctid = ANY (ARRAY(
        SELECT o.ctid FROM autoembed.paid_chunk AS o
        WHERE o.pipeline_id = _forget_part.pipeline_id
        LIMIT _most
        FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS _count = ROW_COUNT;
    _deleted := _deleted + _count;
    UPDATE autoembed.text_document AS d
    SET is_live = false
    WHERE d.ctid = ANY (ARRAY(
        SELECT o.ctid FROM autoembed.text_document AS o
        WHERE o.pipeline_id = _forget_part.pipeline_id AND o.is_live AND o.indexed_at <= until
        LIMIT _most
        FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS _count = ROW_COUNT;
    _deleted := _deleted + _count;
    _is_all := NOT EXISTS (
            SELECT FROM autoembed.embedded AS o
            WHERE o.pipeline_id = _forget_part.pipeline_id AND (o.embedded_at > until) IS NOT TRUE
        )
        AND NOT EXISTS (
            SELECT FROM autoembed.failure AS o
            WHERE o.pipeline_id = _forget_part.pipeline_id AND o.last_failed_at <= until
        )
        AND NOT EXISTS (SELECT FROM autoembed.paid_chunk AS o WHERE o.pipeline_id = _forget_part.pipeline_id)
        AND NOT EXISTS (
            SELECT FROM autoembed.text_document AS o
            WHERE o.pipeline_id = _forget_part.pipeline_id AND o.is_live AND o.indexed_at <= until
        );
    IF _deleted = 0 AND NOT _is_all AND until <> 'infinity' THEN
        RAISE EXCEPTION 'another transaction has locked records of the table' USING ERRCODE = 'lock_not_available';
    END IF;
    RETURN _is_all;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_part IS
    'Deletes some records of a pipeline that were made until then, and takes the texts out of the text index. Returns '
    'whether none are left.';

CREATE OR REPLACE FUNCTION autoembed._forget_ended(pipeline_id integer)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Both delete a part.
    IF (autoembed._forget_part(pipeline_id, 'infinity') AND autoembed._drop_part(pipeline_id)) IS NOT TRUE THEN
        RETURN false;
    END IF;
    DELETE FROM autoembed.backfill AS b
    WHERE b.pipeline_id = (
        SELECT o.pipeline_id FROM autoembed.backfill AS o
        WHERE o.pipeline_id = _forget_ended.pipeline_id
        FOR UPDATE SKIP LOCKED
    );
    DELETE FROM autoembed.text_segment AS s WHERE s.id IN (
        SELECT o.id FROM autoembed.text_segment AS o
        WHERE o.pipeline_id = _forget_ended.pipeline_id
        FOR UPDATE SKIP LOCKED
    );
    RETURN NOT EXISTS (SELECT FROM autoembed.backfill AS b WHERE b.pipeline_id = _forget_ended.pipeline_id)
        AND NOT EXISTS (SELECT FROM autoembed.text_segment AS s WHERE s.pipeline_id = _forget_ended.pipeline_id)
        AND NOT EXISTS (SELECT FROM autoembed.text_document AS d WHERE d.pipeline_id = _forget_ended.pipeline_id);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_ended IS
    'Deletes some records of a pipeline that has ended, and waits for no lock of one. Returns whether none are left.';

CREATE OR REPLACE FUNCTION autoembed._forget_all(pipeline_id integer)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF NOT EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = _forget_all.pipeline_id) THEN
        IF NOT autoembed._forget_ended(pipeline_id) THEN
            -- The rest may be locked. A lane does not try it without a pause.
            INSERT INTO autoembed._job (due_at, message)
            VALUES (clock_timestamp() + interval '100 milliseconds',
                    jsonb_build_object('pipeline', pipeline_id, 'truncated', true));
        END IF;
        RETURN true;
    END IF;
    IF NOT autoembed._forget_part(pipeline_id, (
        SELECT max(j.enqueued_at)
        FROM autoembed._job AS j
        WHERE j.pipeline = _forget_all.pipeline_id::text AND j.message ? 'truncated'
    )) THEN
        RETURN false;
    END IF;
    -- A row that has failed since may have been read before. If it is there, it was inserted since.
    WITH failed AS (
        DELETE FROM autoembed.failure AS f WHERE f.pipeline_id = _forget_all.pipeline_id RETURNING f.key
    )
    INSERT INTO autoembed._job (due_at, message)
    SELECT clock_timestamp(), jsonb_build_object('pipeline', _forget_all.pipeline_id, 'keys', jsonb_agg(k.key::jsonb))
    FROM (SELECT f.key, (row_number() OVER () - 1) / autoembed._keys_per_message() AS number FROM failed AS f) AS k
    GROUP BY k.number;
    RETURN true;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_all IS
    'Deletes some records of the rows that a table had when it was truncated, or its pipeline ended. Returns whether '
    'none are left, or another message stands for these. Rows that have failed since are queued again.';

CREATE OR REPLACE FUNCTION autoembed._queue_recorded(pipeline_id integer, after text)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH next AS (
        SELECT e.key, row_number() OVER (ORDER BY e.key) AS number
        FROM autoembed.embedded AS e
        WHERE e.pipeline_id = _queue_recorded.pipeline_id AND e.key > after
        ORDER BY e.key
        LIMIT 10000
    )
    INSERT INTO autoembed._job (due_at, message)
    SELECT clock_timestamp(), jsonb_build_object(
        'pipeline', _queue_recorded.pipeline_id, 'keys', jsonb_agg(n.key::jsonb ORDER BY n.number)
    )
    FROM next AS n
    -- A long key is known by its hash alone.
    WHERE n.key LIKE '[%'
    GROUP BY (n.number - 1) / autoembed._keys_per_message()
    UNION ALL
    -- Lanes need about that time for these.
    SELECT clock_timestamp() + interval '1 second', jsonb_build_object(
        'pipeline', _queue_recorded.pipeline_id, 'recorded_after', max(n.key)
    )
    FROM next AS n
    HAVING count(*) = 10000
    UNION ALL
    -- Those that are there have one more try.
    SELECT clock_timestamp(), jsonb_build_object(
        'pipeline', _queue_recorded.pipeline_id, 'keys', jsonb_agg(n.key::jsonb), 'attempts', 4
    )
    FROM (
        SELECT f.key, row_number() OVER () AS number
        FROM autoembed.failure AS f
        WHERE f.pipeline_id = _queue_recorded.pipeline_id AND f.key IS NOT NULL AND after = ''
    ) AS n
    GROUP BY (n.number - 1) / autoembed._keys_per_message();
$sql$;
COMMENT ON FUNCTION autoembed._queue_recorded IS
    'Queues the next rows of which a pipeline has records, in the order of their keys, and a message for those behind '
    'them; first of all the rows that have failed. Lanes delete the records and embeddings of those that are gone.';

CREATE OR REPLACE FUNCTION autoembed._fail(pipeline_id integer, key text, reason text, attempts integer, excerpt text)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM autoembed.paid_chunk AS c
    WHERE c.pipeline_id = _fail.pipeline_id AND c.key = autoembed._short_key(_fail.key);
    -- The pipeline may have ended since.
    INSERT INTO autoembed.failure AS f (pipeline_id, key, error_class, reason, attempts, excerpt)
    SELECT p.id, _fail.key, 'row', _fail.reason, _fail.attempts, left(_fail.excerpt, 200)
    FROM autoembed.pipeline AS p
    WHERE p.id = _fail.pipeline_id
    FOR KEY SHARE
    ON CONFLICT (pipeline_id, autoembed._short_key(key)) DO UPDATE
    SET reason = excluded.reason, attempts = excluded.attempts, excerpt = excluded.excerpt,
        last_failed_at = excluded.last_failed_at;
$sql$;
COMMENT ON FUNCTION autoembed._fail IS 'Puts a row on the failed list.';

CREATE OR REPLACE FUNCTION autoembed._fail_message(message jsonb, reason text, attempts integer)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.failure (message, error_class, reason, attempts)
    -- The entry of a backfill has a field of this name.
    VALUES (CASE jsonb_typeof(_fail_message.message)
                WHEN 'object' THEN _fail_message.message - 'backfill'
                ELSE coalesce(_fail_message.message, 'null')
            END, 'message', _fail_message.reason, _fail_message.attempts);
$sql$;
COMMENT ON FUNCTION autoembed._fail_message IS 'Puts a message that names no row on the failed list.';

-- SQL enters Python through these functions --------------------------------------------------------

CREATE OR REPLACE FUNCTION autoembed._check_options(
    batch_size integer,
    max_requests integer,
    timeout_milliseconds integer,
    run_seconds double precision DEFAULT 0,
    backfill boolean DEFAULT false
)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _option record;
BEGIN
    SELECT o.* INTO _option
    FROM (VALUES
        ('batch_size', batch_size, 1, 100000),
        ('max_requests', max_requests, 1, 1000),
        ('timeout_milliseconds', timeout_milliseconds, 1, 3600000),
        ('run_seconds', run_seconds, 0, 1000000000),
        ('backfill', backfill::integer, 0, 1)
    ) AS o(name, value, least, most)
    WHERE (o.value BETWEEN o.least AND o.most) IS NOT TRUE
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = CASE _option.name
                WHEN 'backfill' THEN 'backfill must be true or false, not NULL'
                ELSE format('%s must be from %s to %s, not %s', _option.name, _option.least, _option.most,
                            coalesce(_option.value::text, 'NULL'))
            END,
            HINT = format('Leave %s out for its default.', _option.name);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_options IS 'Fails unless the arguments of process() or work() are valid.';

CREATE OR REPLACE FUNCTION autoembed._process(
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
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '500ms'
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.process(batch_size, max_requests, timeout_milliseconds)
$python$;
COMMENT ON FUNCTION autoembed._process IS 'Does the work of process(), which checks the arguments.';

CREATE OR REPLACE FUNCTION autoembed.process(
    batch_size integer DEFAULT 100,
    max_requests integer DEFAULT 10,
    timeout_milliseconds integer DEFAULT 30000,
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
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    _void := autoembed._check_options(batch_size, max_requests, timeout_milliseconds);
    IF EXISTS (SELECT FROM pg_cursors AS c WHERE c.statement <> current_query()) THEN
        RAISE WARNING USING
            ERRCODE = 'invalid_cursor_state',
            MESSAGE = 'process() does nothing while the session has open cursors',
            DETAIL = 'The code of tables'' owners, which it runs, could read them.',
            HINT = 'Close them first, or leave the work to lanes: SELECT autoembed.schedule().';
        read := 0; completed := 0; retried := 0; failed := 0; requests := 0; failed_jobs := '[]';
        RETURN;
    END IF;
    SELECT p.* INTO read, completed, retried, failed, requests, failed_jobs
    FROM autoembed._process(batch_size, max_requests, timeout_milliseconds) AS p;
EXCEPTION WHEN invalid_transaction_state OR transaction_rollback THEN
    -- Python puts words of its own around those of PostgreSQL.
    RAISE EXCEPTION USING
        ERRCODE = SQLSTATE,
        MESSAGE = regexp_replace(SQLERRM, '^spiexceptions[.][[:alpha:]]+: ', ''),
        HINT = CASE
            WHEN SQLSTATE = '25006' THEN 'process() writes: call it on the primary server, in a READ WRITE transaction.'
            ELSE 'Repeat the transaction.'
        END;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.process IS
    'Embeds waiting jobs once, in the caller''s transaction. Sends up to max_requests requests at a time, each of up '
    'to batch_size texts and for up to timeout_milliseconds. Returns the number of jobs that were read, completed, put '
    'back to be tried again, and given up, and of requests sent. failed_jobs lists the jobs that did not complete, '
    'each with its error.';

CREATE OR REPLACE PROCEDURE autoembed._work(
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
COMMENT ON PROCEDURE autoembed._work IS 'Does the work of work(), which checks the arguments.';

CREATE OR REPLACE PROCEDURE autoembed.work(
    run_seconds double precision DEFAULT 300,
    batch_size integer DEFAULT 100,
    max_requests integer DEFAULT 20,
    timeout_milliseconds integer DEFAULT 30000,
    backfill boolean DEFAULT false
)
    LANGUAGE plpgsql
AS $plpgsql$
DECLARE
    _void pg_catalog.text;
BEGIN
    _void := autoembed._check_options(batch_size, max_requests, timeout_milliseconds, run_seconds, backfill);
    -- In a transaction block, where a lane cannot commit, this fails in PostgreSQL's own words.
    COMMIT;
    CALL autoembed._work(run_seconds, batch_size, max_requests, timeout_milliseconds, backfill);
END;
$plpgsql$;
COMMENT ON PROCEDURE autoembed.work IS
    'A lane: embeds the rows that wait, and those that change, for run_seconds. It commits as it goes and holds no '
    'transaction while a request is in flight. With backfill it scans tables instead, and leaves the queue to others. '
    'schedule() has pg_cron call it.';

CREATE OR REPLACE FUNCTION autoembed._embed(
    content text,
    model_name text,
    definition text,
    local_model text[],
    asker text,
    OUT embedding @extschema:vector@.vector,
    OUT tokens_used integer,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpython3u
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import search_text
    try:
        return search_text.embed(
            content, model_name, definition, local_model, asker, lambda: plpy.execute("SELECT 1")
        )
    except plpy.SPIError as error:
        if error.sqlstate != "57014":
            raise
        # Python would put words of its own around those of PostgreSQL.
        return search_text.cancelled(str(error))
$python$;
COMMENT ON FUNCTION autoembed._embed IS
    'The embedding of a search text by a model, or why there is none. definition: the row of the model and the '
    'version of its function. A session keeps vectors of the same text and definition. local_model: what a lane needs '
    'to know of the model to embed the text; NULL: the session is to do it. asker: whose texts take turns with those '
    'of others there. tokens_used: those that a lane has used, and nobody has noted.';

CREATE OR REPLACE FUNCTION autoembed.embed(content text, model text DEFAULT NULL)
    RETURNS @extschema:vector@.vector
    LANGUAGE plpgsql
    STABLE
    -- It notes what was used, which no parallel plan may.
    PARALLEL UNSAFE
    -- A text that the session has embedded takes about 0.05 ms, to read its vector.
    COST 1000
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _model autoembed.model;
    _local_model text[];
    _answer record;
BEGIN
    IF content IS NULL THEN
        RETURN NULL;
    END IF;
    -- An assignment runs no statement, and shows none in the context of an error.
    _model := autoembed._model(model);
    -- The session itself keeps to limits.
    IF _model.provider = 'local' AND num_nonnulls(
        _model.requests_per_minute, _model.tokens_per_minute, _model.max_requests_in_flight,
        _model.daily_token_budget, _model.daily_cost_budget
    ) = 0 THEN
        _local_model := ARRAY[
            _model.base_url, _model.model_id, _model.max_tokens_per_input::text,
            _model.options ->> 'query_prefix', _model.dimensions::text
        ];
    END IF;
    _answer := autoembed._embed(
        content,
        _model.name,
        concat(_model, CASE
            WHEN _model.provider = 'function' THEN autoembed._embedder_version(_model, 'query')
        END),
        _local_model,
        concat(session_user, ' ', current_setting('role'))
    );
    IF _answer.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _answer.problem, HINT = _answer.hint, ERRCODE = _answer.errcode;
    END IF;
    IF _answer.tokens_used IS NOT NULL THEN
        PERFORM autoembed._note_usage(
            _model.name, '{NULL}', '{1}', '{1}', ARRAY[_answer.tokens_used::bigint], '{0}', NULL
        );
    END IF;
    RETURN _answer.embedding;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.embed IS
    'The embedding of a search text by a model, by default the default model. NULL for a NULL text. Provider trouble '
    'is an error. ORDER BY column <=> (SELECT autoembed.embed(…)) calls it once, and uses the column''s index.';
