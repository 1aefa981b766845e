-- 80_status.sql: how it goes, for operators and owners. An owner sees his tables, members of pg_monitor see all, texts excepted.

CREATE FUNCTION autoembed._estimated_rows(table_id regclass)
    RETURNS bigint
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- As the statistics of activity have it, else as of the last ANALYZE.
    SELECT sum(coalesce(nullif(pg_stat_get_live_tuples(c.oid), 0), nullif(c.reltuples, -1)::bigint, CASE WHEN pg_relation_size(c.oid) = 0 THEN 0 END))::bigint
    FROM (SELECT t.relid FROM pg_partition_tree(table_id) AS t WHERE t.isleaf UNION SELECT table_id) AS r
    JOIN pg_class AS c ON c.oid = r.relid AND c.relkind = 'r';
$sql$;
COMMENT ON FUNCTION autoembed._estimated_rows(regclass) IS
    'About how many rows a table has, without reading it; NULL if it was never analysed.';

CREATE VIEW autoembed.status WITH (security_barrier) AS
SELECT s.table_id AS table_name,
       s.embedding_column,
       s.model,
       CASE WHEN s.paused THEN 'paused'
            WHEN NOT s.sound THEN 'stopped'
            WHEN s.blocked IS NOT NULL THEN 'resting'
            WHEN b.pipeline_id IS NOT NULL AND b.scanned_at IS NULL THEN 'backfilling'
            WHEN q.waiting + q.in_flight > 0 THEN 'embedding'
            WHEN b.create_index AND b.index_problem IS NULL THEN 'indexing'
            ELSE 'idle'
       END AS state,
       coalesce(s.blocked, 'the index could not be built: ' || b.index_problem) AS reason,
       CASE WHEN s.blocked IS NOT NULL THEN s.hint
            WHEN b.index_problem IS NOT NULL THEN format('Create it by hand; or SELECT autoembed.resync(%L) tries it again.', s.table_id)
       END AS hint,
       greatest(r.rows, e.embedded, b.rows_queued) AS estimated_rows,
       e.embedded,
       q.waiting,
       q.in_flight,
       f.failed,
       clock_timestamp() - q.oldest_at AS oldest_waiting,
       a.rows_per_second,
       round(100 * (1 - w.left::numeric / greatest(r.rows, e.embedded, w.left, 1)), 1) AS percent_done,
       CASE WHEN w.left = 0 THEN interval '0'
            WHEN a.rows_per_second > 0 THEN make_interval(secs => round(w.left / a.rows_per_second)::double precision)
       END AS time_left
FROM autoembed._pipeline_state AS s
-- One whose table was dropped is ended by the next lane.
JOIN pg_class AS c ON c.oid = s.table_id
LEFT JOIN autoembed.backfill AS b ON b.pipeline_id = s.id
CROSS JOIN LATERAL (SELECT autoembed._estimated_rows(s.table_id) AS rows) AS r
CROSS JOIN LATERAL (SELECT count(*) AS embedded FROM autoembed.embedded AS e WHERE e.pipeline_id = s.id) AS e
CROSS JOIN LATERAL (SELECT count(*) AS failed FROM autoembed.failure AS f WHERE f.pipeline_id = s.id) AS f
CROSS JOIN LATERAL (
    SELECT coalesce(sum(k.rows) FILTER (WHERE NOT k.held), 0)::bigint AS waiting,
           coalesce(sum(k.rows) FILTER (WHERE k.held), 0)::bigint AS in_flight,
           min(k.enqueued_at) AS oldest_at
    FROM (
        SELECT q.enqueued_at,
               q.vt > clock_timestamp()
                   AND EXISTS (SELECT FROM autoembed.lane AS l
                               WHERE q.msg_id = ANY (l.message_ids) AND autoembed._lane_lives(l.pid, l.backend_start)) AS held,
               CASE jsonb_typeof(q.message -> 'keys') WHEN 'array' THEN jsonb_array_length(q.message -> 'keys') ELSE 1 END AS rows
        FROM pgmq.q_embedding_jobs AS q
        WHERE coalesce(q.message ->> 'pipeline', '') = s.id::text
    ) AS k
) AS q
CROSS JOIN LATERAL (
    SELECT round(coalesce(sum(u.rows), 0) / greatest(extract(epoch FROM clock_timestamp() - min(u.at)), 1), 1) AS rows_per_second
    FROM autoembed.usage_entry AS u
    WHERE u.pipeline_id = s.id AND u.at > clock_timestamp() - interval '1 minute'
) AS a
CROSS JOIN LATERAL (
    SELECT q.waiting + q.in_flight
        + CASE WHEN b.pipeline_id IS NOT NULL AND b.scanned_at IS NULL THEN greatest(coalesce(r.rows, 0) - b.rows_queued, 0) ELSE 0 END AS left
) AS w
WHERE autoembed._may_see(s.table_id);
COMMENT ON VIEW autoembed.status IS 'How each embedding column does.';
COMMENT ON COLUMN autoembed.status.table_name IS 'The table.';
COMMENT ON COLUMN autoembed.status.embedding_column IS 'The column.';
COMMENT ON COLUMN autoembed.status.model IS 'Its model.';
COMMENT ON COLUMN autoembed.status.state IS
    'idle; embedding: rows wait or are in flight; backfilling: the table is being looked through; indexing: its index is being built; resting: the provider is in trouble, or a limit is reached; paused; stopped: somebody must act.';
COMMENT ON COLUMN autoembed.status.reason IS 'Why it is stopped, paused or resting, or has no index though one was asked for.';
COMMENT ON COLUMN autoembed.status.hint IS 'What to do about it.';
COMMENT ON COLUMN autoembed.status.estimated_rows IS 'About how many rows the table has; NULL: it was never analysed.';
COMMENT ON COLUMN autoembed.status.embedded IS 'Rows that were embedded.';
COMMENT ON COLUMN autoembed.status.waiting IS 'Rows queued; a row that changed twice may count twice.';
COMMENT ON COLUMN autoembed.status.in_flight IS 'Rows that lanes have in their hands.';
COMMENT ON COLUMN autoembed.status.failed IS 'Rows given up; see the view failed.';
COMMENT ON COLUMN autoembed.status.oldest_waiting IS 'How long the oldest of those queued or in flight has been so.';
COMMENT ON COLUMN autoembed.status.rows_per_second IS 'Rows embedded a second, over the last minute.';
COMMENT ON COLUMN autoembed.status.percent_done IS 'How much of the table is not waiting, 0 to 100.';
COMMENT ON COLUMN autoembed.status.time_left IS 'At that rate, until nothing waits; NULL: no telling.';

CREATE VIEW autoembed.progress WITH (security_barrier) AS
SELECT l.pid,
       p.table_id AS table_name,
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
           sum(CASE jsonb_typeof(q.message -> 'keys') WHEN 'array' THEN jsonb_array_length(q.message -> 'keys') ELSE 1 END)::bigint AS rows
    FROM pgmq.q_embedding_jobs AS q
    WHERE q.msg_id = ANY (l.message_ids) AND q.last_read_at <= l.claimed_at AND q.vt > clock_timestamp()
    GROUP BY 1
) AS h ON true
LEFT JOIN autoembed.pipeline AS p ON p.id::text = h.pipeline
LEFT JOIN autoembed.backfill AS b ON b.pipeline_id = p.id AND l.backfill
WHERE autoembed._lane_lives(l.pid, l.backend_start) AND (p.id IS NULL OR autoembed._may_see(p.table_id));
COMMENT ON VIEW autoembed.progress IS 'What each lane is at, for \watch.';
COMMENT ON COLUMN autoembed.progress.pid IS 'The lane''s process, as in pg_stat_activity.';
COMMENT ON COLUMN autoembed.progress.table_name IS 'The table whose rows it has in its hands.';
COMMENT ON COLUMN autoembed.progress.embedding_column IS 'The column.';
COMMENT ON COLUMN autoembed.progress.lane IS 'live: it embeds what changes; backfill: it looks through tables.';
COMMENT ON COLUMN autoembed.progress.phase IS 'embedding, or waiting for work.';
COMMENT ON COLUMN autoembed.progress.rows_in_flight IS 'Rows it has in its hands.';
COMMENT ON COLUMN autoembed.progress.backfill_rows_done IS 'Rows that the backfill has come past.';
COMMENT ON COLUMN autoembed.progress.backfill_rows_total IS 'About how many rows the table has.';
COMMENT ON COLUMN autoembed.progress.since IS 'How long it has had them.';

CREATE VIEW autoembed._row_state WITH (security_barrier) AS
SELECT r.pipeline_id, r.key, r.digest, r.state
FROM (
    SELECT e.pipeline_id, e.key, e.digest, NULL AS state FROM autoembed.embedded AS e
    UNION ALL
    SELECT f.pipeline_id, f.key, NULL, 'failed' FROM autoembed.failure AS f WHERE f.pipeline_id IS NOT NULL
    UNION ALL
    SELECT p.id, replace(k.key::text, ', ', ','), NULL, 'waiting'
    FROM autoembed.pipeline AS p
    JOIN pgmq.q_embedding_jobs AS q ON coalesce(q.message ->> 'pipeline', '') = p.id::text
    CROSS JOIN LATERAL jsonb_array_elements(coalesce(q.message -> 'keys', jsonb_build_array(jsonb_build_array(q.message -> 'id')))) AS k(key)
    UNION ALL
    SELECT b.pipeline_id, NULL, NULL, 'waiting' FROM autoembed.backfill AS b WHERE b.scanned_at IS NULL
) AS r
JOIN autoembed.pipeline AS p ON p.id = r.pipeline_id
WHERE autoembed._owns(p.table_id);
COMMENT ON VIEW autoembed._row_state IS
    'What is known of the rows of the reader''s tables: the digest of what was embedded, and whether they wait or have failed; no key: the whole table is looked through.';

CREATE FUNCTION autoembed.preview(table_name regclass, key text, embedding_column name DEFAULT NULL)
    RETURNS TABLE (content text, tokens integer, truncated boolean, state text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    -- As _output_settings() has them: the lanes' text and key.
    SET TimeZone = 'UTC'
    SET DateStyle = 'ISO, YMD'
    SET IntervalStyle = 'postgres'
    SET extra_float_digits = 1
    SET bytea_output = 'hex'
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline := autoembed._owned_pipeline(table_name, embedding_column);
    _condition text;
    _has_embedding boolean;
    _key jsonb;
BEGIN
    -- One value for a key of one column, a JSON array for more.
    IF cardinality(_pipeline.key_columns) = 1 AND key !~ '^\s*\[' THEN
        _key := jsonb_build_array(key);
    ELSIF pg_input_is_valid(key, 'jsonb') THEN
        _key := key::jsonb;
    END IF;
    -- In its own type and by its own operator, so that its index serves.
    SELECT string_agg(format('t.%I %s %L::%s', k.name, autoembed._operator(table_name, k.name, 3), k.value, k.type), ' AND ')
    INTO _condition
    FROM (
        SELECT n.name, format_type(a.atttypid, a.atttypmod) AS type, _key ->> (n.position - 1)::integer AS value
        FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS n(name, position)
        JOIN pg_attribute AS a ON a.attrelid = table_name AND a.attname = n.name
    ) AS k
    HAVING jsonb_typeof(_key) = 'array' AND jsonb_array_length(_key) = count(*) AND bool_and(coalesce(pg_input_is_valid(k.value, k.type), false));
    IF _condition IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('%s is no key of table %s', coalesce(key, 'NULL'), table_name),
            HINT = format('Its key is %s%s.', array_to_string(_pipeline.key_columns, ', '),
                          CASE WHEN cardinality(_pipeline.key_columns) > 1 THEN ', to be given as a JSON array' ELSE '' END);
    END IF;
    -- As the caller, so that row level security holds.
    EXECUTE format('SELECT %s, t.%I IS NOT NULL, %s FROM %s AS t WHERE %s LIMIT 1', autoembed._content_expression(_pipeline, 't'),
                   _pipeline.embedding_column, autoembed._key_expression(_pipeline, 't'), table_name, _condition)
    INTO content, _has_embedding, _key;
    IF _has_embedding IS NULL THEN
        RETURN;
    END IF;
    SELECT s.tokens, s.truncated, s.state INTO tokens, truncated, state
    FROM (
        SELECT max(encode(r.digest, 'hex')) AS digest, max(r.state) AS state
        FROM autoembed._row_state AS r
        WHERE r.pipeline_id = _pipeline.id AND r.key = replace(_key::text, ', ', ',')
    ) AS r
    CROSS JOIN LATERAL autoembed._state_of(_pipeline.id, content, _has_embedding, r.digest, r.state) AS s;
    RETURN NEXT;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.preview(regclass, text, name) IS
    'What a row of a table of the caller''s is embedded as: its text, about how many tokens that has, whether it is cut, and whether its embedding is fresh, waiting, failed, missing, stale, or not wanted. No row if there is none with that key.';

CREATE FUNCTION autoembed._state_of(pipeline_id integer, content text, has_embedding boolean, digest text, outstanding text)
    RETURNS TABLE (tokens integer, truncated boolean, state text)
    LANGUAGE plpython3u
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return [doors.state_of(pipeline_id, content, has_embedding, digest, outstanding)]
$python$;
COMMENT ON FUNCTION autoembed._state_of(integer, text, boolean, text, text) IS
    'How a row stands whose text is this, and of whose embedding that digest is known.';

CREATE FUNCTION autoembed.wait_until_fresh(table_name regclass, timeout_seconds double precision DEFAULT 60)
    RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _end timestamptz := clock_timestamp() + make_interval(secs => timeout_seconds);
BEGIN
    PERFORM autoembed._owned_pipelines(table_name, NULL);
    LOOP
        IF NOT EXISTS (
            SELECT FROM autoembed._owned_pipelines(table_name, NULL) AS p JOIN autoembed._row_state AS r ON r.pipeline_id = p.id
            WHERE r.state = 'waiting'
        ) THEN
            RETURN true;
        END IF;
        IF clock_timestamp() >= _end THEN
            RETURN false;
        END IF;
        PERFORM pg_sleep(least(0.02, extract(epoch FROM _end - clock_timestamp())));
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.wait_until_fresh(regclass, double precision) IS
    'Waits until nothing that was committed to a table of the caller''s waits to be embedded; whether that came true in time. Embedding is done by lanes; a change of the caller''s own transaction, which they do not see, never comes true.';

CREATE FUNCTION autoembed.estimate(
    table_name regclass,
    embedding_column name DEFAULT NULL,
    content_columns name[] DEFAULT NULL,
    content_function text DEFAULT NULL,
    content_template text DEFAULT NULL,
    model text DEFAULT NULL,
    condition text DEFAULT NULL,
    OUT rows bigint,
    OUT tokens bigint,
    OUT requests bigint,
    OUT cost numeric,
    OUT duration interval
)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _sample bigint;
    _percent numeric;
    _texts text[];
    _dimensions integer;
    _found record;
BEGIN
    IF num_nonnulls(content_columns, content_function, content_template) = 0 THEN
        _pipeline := autoembed._owned_pipeline(table_name, embedding_column);
    ELSE
        PERFORM autoembed._check_owner(table_name);
        PERFORM autoembed._check_content(content_columns, content_function, content_template, true);
        _pipeline.table_id := table_name;
        _pipeline.content_columns := estimate.content_columns;
        _pipeline.content_function := estimate.content_function;
        _pipeline.content_template := estimate.content_template;
        _pipeline.condition_columns := '{}';
    END IF;
    _pipeline.model := coalesce(estimate.model, _pipeline.model);
    -- A model that does not exist is an error here: one that Python raises would have a prefix and a traceback.
    _dimensions := autoembed._dimensions(_pipeline.model);
    IF estimate.condition IS NOT NULL THEN
        SELECT c.condition, c.columns INTO _pipeline.condition, _pipeline.condition_columns
        FROM autoembed._read_condition(table_name, estimate.condition) AS c;
    END IF;
    rows := coalesce(autoembed._estimated_rows(table_name), 0);
    -- About 10,000 rows of a large table stand for all.
    _percent := CASE WHEN rows > 20000 THEN 1000000.0 / rows ELSE 100 END;
    EXECUTE format('SELECT count(*), array_agg(s.content) FILTER (WHERE s.content ~ ''\S'') FROM (SELECT %s AS content FROM %s AS t %s) AS s',
                   autoembed._content_expression(_pipeline, 't'), table_name,
                   CASE WHEN _percent < 100 THEN format('TABLESAMPLE SYSTEM (%s)', _percent) END)
    INTO _sample, _texts;
    SELECT e.* INTO _found FROM autoembed._estimate_texts(coalesce(_texts, '{}'), _pipeline.model) AS e;
    IF _percent = 100 THEN
        rows := cardinality(coalesce(_texts, '{}'));
        tokens := _found.tokens;
        requests := _found.requests;
    ELSE
        tokens := _found.tokens * rows / greatest(_sample, 1);
        requests := ceil(_found.requests * rows / greatest(_sample, 1)::numeric);
        rows := cardinality(coalesce(_texts, '{}')) * rows / greatest(_sample, 1);
    END IF;
    cost := round(tokens * _found.price / 1000000, 4);
    duration := make_interval(secs => rows / nullif(_found.rows_per_second, 0));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.estimate(regclass, name, name[], text, text, text, text) IS
    'What it would take to embed all rows of a table of the caller''s, as enable() would be told, or as it is enabled: about how many rows, tokens and requests, the cost at the model''s price, and the time at the rate of its busiest minute of late. Nothing is sent; large tables are sampled.';

CREATE FUNCTION autoembed._estimate_texts(texts text[], model text)
    RETURNS TABLE (tokens bigint, requests bigint, price numeric, rows_per_second numeric)
    LANGUAGE plpython3u
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return [doors.estimate(texts, model)]
$python$;
COMMENT ON FUNCTION autoembed._estimate_texts(text[], text) IS 'What it takes to embed these texts.';

CREATE FUNCTION autoembed._price_and_rate(model text, OUT price numeric, OUT rows_per_second numeric)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT m.price_per_million_tokens,
           (SELECT max(u.rows) / 60.0
            FROM (SELECT sum(e.rows) AS rows FROM autoembed.usage_entry AS e WHERE e.model = m.name GROUP BY date_trunc('minute', e.at)) AS u)
    FROM autoembed.model AS m
    WHERE m.name = _price_and_rate.model;
$sql$;
COMMENT ON FUNCTION autoembed._price_and_rate(text) IS
    'What a model costs, and the rows a second that it did in its busiest minute of late; NULL: nothing known.';

CREATE FUNCTION autoembed.doctor()
    RETURNS TABLE (subject text, ok boolean, finding text, advice text)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _row record;
    _cron boolean := to_regclass('cron.job') IS NOT NULL;
    _lanes bigint;
    _scheduled bigint;
    _start text;
    _problem text;
    _index record;
BEGIN
    SELECT count(*) INTO _lanes FROM autoembed.lane AS l WHERE NOT l.stop AND NOT l.backfill AND autoembed._lane_lives(l.pid, l.backend_start);
    _start := CASE WHEN _cron THEN 'SELECT autoembed.schedule();'
                   WHEN current_setting('cron.database_name', true) IS NULL
                   THEN 'Set shared_preload_libraries = ''pg_cron'', restart the server, and look here again; or have something else call autoembed.work().'
                   WHEN current_setting('cron.database_name') = current_database() THEN 'CREATE EXTENSION pg_cron; SELECT autoembed.schedule();'
                   ELSE format('In database "%s": SELECT cron.schedule_in_database(%L, %L, %L, %L);', current_setting('cron.database_name'),
                               'autoembed-lane-1', '1 second', 'CALL autoembed.work()', current_database()) END;
    FOR _row IN
        SELECT n.name, e.installed_version, e.default_version
        FROM unnest('{autoembed,pg_cron,pgmq,plpython3u,vector}'::text[]) AS n(name)
        LEFT JOIN pg_available_extensions AS e ON e.name = n.name
        ORDER BY n.name
    LOOP
        subject := format('extension %s', _row.name);
        -- Only pg_cron can be missing; it lives in one database of a server, and starts lanes in any.
        ok := CASE WHEN _row.installed_version IS NULL THEN _lanes > 0 ELSE _row.installed_version = _row.default_version END;
        finding := coalesce('version ' || _row.installed_version, 'not in this database')
            || CASE WHEN _row.installed_version <> _row.default_version THEN format(', %s is there', _row.default_version) ELSE '' END;
        advice := CASE WHEN NOT ok AND _row.installed_version IS NULL THEN _start
                       WHEN NOT ok THEN format('ALTER EXTENSION %I UPDATE;', _row.name) END;
        RETURN NEXT;
    END LOOP;

    subject := 'lanes';
    IF _cron THEN
        EXECUTE $sql$
            SELECT count(*), 'the last said: ' || (
                SELECT split_part(d.return_message, E'\n', 1) FROM cron.job_run_details AS d WHERE d.jobid = ANY (array_agg(j.jobid)) ORDER BY d.runid DESC LIMIT 1)
            FROM cron.job AS j
            WHERE j.active AND j.database = current_database() AND j.command ~ 'autoembed\.work'
        $sql$ INTO _scheduled, _problem;
    END IF;
    ok := _lanes > 0;
    finding := concat_ws(', ', _lanes || ' running', _scheduled || ' jobs of pg_cron', CASE WHEN NOT ok THEN _problem END);
    advice := CASE WHEN ok THEN NULL
                   WHEN _scheduled > 0 THEN 'pg_cron does not start them: see cron.job_run_details and the server''s log, and that max_worker_processes suffices.'
                   ELSE _start END;
    RETURN NEXT;

    FOR _row IN
        SELECT m.name, r.until, r.reason, r.needs_attention
        FROM autoembed.model AS m
        LEFT JOIN autoembed.model_rest AS r ON r.model = m.name AND r.until > clock_timestamp()
        WHERE m.name IN (SELECT coalesce(p.model, autoembed._default_model()) FROM autoembed.pipeline AS p UNION SELECT autoembed._default_model())
        ORDER BY m.name
    LOOP
        subject := format('model %s', _row.name);
        _problem := autoembed._probe(_row.name);
        ok := _row.until IS NULL AND _problem IS NULL;
        finding := coalesce(_problem, 'rests until ' || _row.until || ': ' || _row.reason, 'answers');
        advice := CASE WHEN _problem IS NOT NULL THEN 'Mend its definition with autoembed.alter_model(), its key or the network; it is tried again by itself.'
                       WHEN _row.until IS NOT NULL THEN format('SELECT autoembed.resume_model(%L); tries it at once.', _row.name) END;
        RETURN NEXT;
    END LOOP;

    FOR _row IN
        SELECT s.*, p AS pipeline, format('%s.%I', s.table_id, s.embedding_column) AS name, c.relkind = 'p' AS partitioned, b.index_problem
        FROM autoembed._pipeline_state AS s
        JOIN autoembed.pipeline AS p ON p.id = s.id
        -- One whose table was dropped is ended by the next lane.
        JOIN pg_class AS c ON c.oid = s.table_id
        LEFT JOIN autoembed.backfill AS b ON b.pipeline_id = s.id
        ORDER BY s.id
    LOOP
        subject := format('table %s', _row.name);
        ok := _row.sound AND NOT _row.paused;
        finding := coalesce(_row.blocked, 'sound');
        advice := CASE WHEN NOT ok THEN _row.hint END;
        RETURN NEXT;

        subject := format('triggers of %s', _row.name);
        SELECT string_agg(t.problem, ', '), CASE WHEN NOT (_row.pipeline).managed THEN string_agg(t.cure, ' ') END
        INTO finding, advice
        FROM autoembed._trigger_problems(_row.pipeline) AS t;
        ok := finding IS NULL;
        advice := CASE WHEN NOT ok THEN concat_ws(' ', advice, format('SELECT autoembed.resync(%L);', _row.table_id)) END;
        finding := coalesce(finding, 'in place');
        RETURN NEXT;

        IF _row.sound THEN
            subject := format('index of %s', _row.name);
            SELECT k.* INTO _index FROM autoembed._index_key(_row.pipeline) AS k;
            -- One on each partition will do; the table's own takes those that are there.
            SELECT CASE WHEN count(i.*) = count(*) THEN string_agg(i.indexrelid::regclass::text, ', ' ORDER BY r.relid) END,
                   concat_ws(' ', CASE WHEN _index.key IS NOT NULL THEN _index.hint END,
                             string_agg(format('CREATE INDEX CONCURRENTLY ON %s USING hnsw (%s);', r.relid::regclass, _index.key), ' ' ORDER BY r.relid)
                                 FILTER (WHERE i.indexrelid IS NULL),
                             CASE WHEN _row.partitioned THEN format('CREATE INDEX ON %s USING hnsw (%s);', _row.table_id, _index.key) END,
                             CASE WHEN _index.expression LIKE '%::%' THEN format('-- Used by ORDER BY %s <=> …', _index.expression) END)
            INTO finding, advice
            FROM (SELECT t.relid FROM pg_partition_tree(_row.table_id) AS t WHERE t.isleaf
                  UNION SELECT _row.table_id WHERE NOT _row.partitioned) AS r
            JOIN pg_class AS c ON c.oid = r.relid AND c.relkind = 'r'
            LEFT JOIN LATERAL (SELECT v.* FROM autoembed._vector_index(r.relid, _row.embedding_column) AS v WHERE v.indisvalid) AS i ON true;
            -- A few thousand rows are searched faster without one.
            ok := finding IS NOT NULL OR _row.index_problem IS NULL AND coalesce(autoembed._estimated_rows(_row.table_id), 0) < 10000;
            finding := coalesce(finding, 'none' || coalesce(', it could not be built: ' || _row.index_problem, ''));
            advice := CASE WHEN NOT ok THEN CASE WHEN _index.key IS NULL THEN _index.hint ELSE advice END END;
            RETURN NEXT;
        END IF;

        subject := format('failed rows of %s', _row.name);
        SELECT count(*) = 0, count(*) || coalesce(', the last: ' || (array_agg(f.reason ORDER BY f.last_failed_at DESC))[1], '') INTO ok, finding FROM autoembed.failure AS f WHERE f.pipeline_id = _row.id;
        advice := CASE WHEN NOT ok THEN format('Look at autoembed.failed; when mended, SELECT autoembed.retry_failed(%L);', _row.table_id) END;
        RETURN NEXT;
    END LOOP;

    subject := 'queue';
    SELECT coalesce(clock_timestamp() - min(q.enqueued_at) < interval '5 minutes', true),
           format('%s messages', count(*)) || coalesce(', the oldest for ' || date_trunc('second', clock_timestamp() - min(q.enqueued_at)), '')
    INTO ok, finding
    FROM pgmq.q_embedding_jobs AS q;
    advice := CASE WHEN NOT ok THEN 'See autoembed.status for what holds it up; more lanes: SELECT autoembed.schedule(2).' END;
    RETURN NEXT;

    IF EXISTS (SELECT FROM autoembed.failure AS f WHERE f.pipeline_id IS NULL) THEN
        subject := 'failed messages';
        SELECT false, count(*) || ', the last: ' || (array_agg(f.reason ORDER BY f.last_failed_at DESC))[1] INTO ok, finding FROM autoembed.failure AS f WHERE f.pipeline_id IS NULL;
        advice := 'Look at autoembed.failed. Again: SELECT autoembed.retry_failed(error_class => ''message''); or no more: '
            'DELETE FROM autoembed.failure WHERE error_class = ''message'';';
        RETURN NEXT;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.doctor() IS
    'Checks everything that has to be right, model by model and table by table: whether it is, what was found, and what to do. Sends each model in use one word.';

CREATE FUNCTION autoembed._probe(model text)
    RETURNS text
    LANGUAGE plpython3u
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.probe(model)
$python$;
COMMENT ON FUNCTION autoembed._probe(text) IS 'Sends a model one word; what is wrong with it, NULL: nothing.';
