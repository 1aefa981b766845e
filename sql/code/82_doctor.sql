-- Checks of the whole installation, each with advice.

CREATE OR REPLACE FUNCTION autoembed._pipeline_checks(pipeline autoembed.pipeline)
    RETURNS TABLE (subject text, ok boolean, finding text, advice text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _state record;
    _unused text;
    _index record;
BEGIN
    SELECT s.*,
           format('%s.%I', s.table_id, s.embedding_column) AS name,
           c.relkind = 'p' AND s.embeddings_table IS NULL AS partitioned,
           coalesce(s.embeddings_table, s.table_id) AS vectors_table,
           b.index_problem
    INTO _state
    FROM autoembed._own_pipeline_state AS s
    JOIN pg_class AS c ON c.oid = s.table_id
    LEFT JOIN autoembed.backfill AS b ON b.pipeline_id = s.id
    WHERE s.id = pipeline.id;
    -- The next lane ends a pipeline whose table was dropped.
    IF NOT FOUND THEN
        RETURN;
    END IF;

    subject := format('table %s', _state.name);
    ok := _state.sound AND NOT _state.paused;
    finding := coalesce(_state.blocked, 'usable');
    advice := CASE WHEN NOT ok THEN _state.hint END;
    RETURN NEXT;

    subject := format('triggers of %s', _state.name);
    SELECT string_agg(t.problem, ', '), string_agg(t.cure, ' ')
    INTO finding, advice
    FROM autoembed._trigger_problems(pipeline) AS t;
    ok := finding IS NULL;
    advice := CASE
        WHEN NOT ok THEN concat_ws(' ', advice, format('SELECT autoembed.resync(%L);', _state.table_id))
    END;
    finding := coalesce(finding, 'in place');
    RETURN NEXT;

    subject := format('rights of %s', _state.name);
    SELECT string_agg(r.problem, '; '), string_agg(r.cure, ' ')
    INTO finding, advice
    FROM autoembed._rights_problems(pipeline) AS r;
    ok := finding IS NULL;
    finding := coalesce(finding, 'in place');
    RETURN NEXT;

    IF _state.sound THEN
        subject := format('index of %s', _state.name);
        SELECT k.* INTO _index FROM autoembed._index_key(pipeline) AS k;
        -- An index on each partition is enough. An index on the whole table takes over those of the partitions.
        SELECT CASE
                   WHEN count(i.*) = count(*) THEN string_agg(i.indexrelid::regclass::text, ', ' ORDER BY r.relid)
               END,
               concat_ws(
                   ' ',
                   CASE WHEN _index.key IS NOT NULL THEN _index.hint END,
                   string_agg(
                       format('CREATE INDEX CONCURRENTLY ON %s USING hnsw (%s);', r.relid::regclass, _index.key),
                       ' ' ORDER BY r.relid
                   ) FILTER (WHERE i.indexrelid IS NULL),
                   CASE
                       WHEN _state.partitioned THEN
                           format('CREATE INDEX ON %s USING hnsw (%s);', _state.vectors_table, _index.key)
                   END,
                   CASE
                       WHEN _index.expression LIKE '%::%' THEN
                           format('-- Used by ORDER BY %s <=> …', _index.expression)
                   END
               )
        INTO finding, advice
        FROM (
            SELECT t.relid FROM autoembed._partition_tree(_state.vectors_table) AS t WHERE t.isleaf
            UNION
            SELECT _state.vectors_table WHERE NOT _state.partitioned
        ) AS r
        JOIN pg_class AS c ON c.oid = r.relid AND c.relkind = 'r'
        LEFT JOIN LATERAL (
            SELECT v.* FROM autoembed._vector_index(r.relid, _state.embedding_column) AS v WHERE v.indisvalid
        ) AS i ON true;
        -- A search of fewer than about 10,000 rows needs no index.
        ok := finding IS NOT NULL
            OR _state.index_problem IS NULL AND coalesce(autoembed._estimated_rows(_state.vectors_table), 0) < 10000;
        finding := coalesce(finding, 'none' || coalesce(', it could not be built: ' || _state.index_problem, ''));
        SELECT string_agg(i.indexrelid::regclass::text, ', ' ORDER BY i.indexrelid) INTO _unused
        FROM (
            SELECT t.relid FROM autoembed._partition_tree(_state.vectors_table) AS t
            UNION
            SELECT _state.vectors_table
        ) AS r
        CROSS JOIN LATERAL autoembed._indexes_on_vectors(r.relid, _state.embedding_column) AS i
        WHERE NOT autoembed._serves_searches(i);
        IF _unused IS NOT NULL THEN
            ok := ok AND NOT starts_with(finding, 'none');
            finding := format('%s; searches cannot use %s: they need HNSW, all rows and the cosine distance',
                              finding, _unused);
        END IF;
        advice := CASE WHEN NOT ok THEN CASE WHEN _index.key IS NULL THEN _index.hint ELSE advice END END;
        RETURN NEXT;
    END IF;

    IF pipeline.recall_target IS NOT NULL THEN
        subject := format('recall of %s', _state.name);
        ok := pipeline.recall >= pipeline.recall_target;
        finding := format('%s of %s, measured at %s', round(pipeline.recall::numeric, 3), pipeline.recall_target,
                          to_char(pipeline.recall_measured_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'));
        advice := CASE
            WHEN NOT ok THEN
                format('The index loses rows. Build it again with (m = 32, ef_construction = 200), then SELECT * FROM '
                       'autoembed.tune(%L);', _state.vectors_table)
        END;
        RETURN NEXT;
    END IF;

    subject := format('failed rows of %s', _state.name);
    SELECT count(*) = 0,
           count(*) || coalesce(', the last: ' || (array_agg(f.reason ORDER BY f.last_failed_at DESC))[1], '')
    INTO ok, finding
    FROM autoembed.failed AS f
    WHERE f.table_name = _state.table_id::text AND f.embedding_column = _state.embedding_column
      AND f.error_class = 'row';
    advice := CASE
        WHEN NOT ok THEN
            format('See autoembed.failed. To try them again: SELECT autoembed.retry_failed(%L);', _state.table_id)
    END;
    RETURN NEXT;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._pipeline_checks IS
    'The checks of doctor() of one pipeline: its table, triggers, rights, index, recall and failed rows.';

CREATE OR REPLACE FUNCTION autoembed._running_lanes(backfill boolean)
    RETURNS bigint
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT count(*)
    FROM autoembed.lane AS l
    WHERE NOT l.stop AND l.backfill = _running_lanes.backfill AND autoembed._lane_lives(l.pid, l.backend_start);
$sql$;
COMMENT ON FUNCTION autoembed._running_lanes IS
    'The number of lanes that run and are not asked to stop. backfill: those for backfills alone.';

CREATE OR REPLACE FUNCTION autoembed._lanes_are_starting(within interval DEFAULT '30 seconds')
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- The launcher starts again after a crash, too.
    SELECT EXISTS (
        SELECT FROM pg_stat_activity AS a
        WHERE a.backend_type = 'pg_cron launcher' AND a.backend_start > clock_timestamp() - within
    );
$sql$;
COMMENT ON FUNCTION autoembed._lanes_are_starting IS
    'Whether pg_cron itself has started so lately that its lanes may be yet to come.';

CREATE OR REPLACE FUNCTION autoembed._lane_checks(
    frozen_after interval DEFAULT '1 minute',
    starts_within interval DEFAULT '30 seconds'
)
    RETURNS TABLE (subject text, ok boolean, finding text, advice text)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _kind record;
    _lane record;
    _jobs record;
    _running bigint;
    _full record;
    _are_starting boolean;
BEGIN
    IF pg_is_in_recovery() THEN
        -- A standby shows the lanes of its primary, and runs none.
        RETURN QUERY SELECT 'lanes', true, 'a standby, the lanes of its primary do the work', NULL;
        RETURN;
    END IF;
    SELECT f.* INTO _full FROM autoembed._full_limit() AS f;
    FOR _kind IN SELECT k.* FROM (VALUES ('lanes', false), ('backfill lanes', true)) AS k(name, backfill) LOOP
        _running := autoembed._running_lanes(_kind.backfill);
        SELECT j.* INTO _jobs FROM autoembed._lane_jobs(_kind.backfill) AS j;
        subject := _kind.name;
        _are_starting := _jobs.scheduled > _running AND num_nonnulls(_full.name, _jobs.last_message) = 0
            AND autoembed._lanes_are_starting(starts_within);
        -- Without a lane for backfills, the others do them.
        ok := (_running > 0 OR _kind.backfill AND coalesce(_jobs.scheduled, 0) = 0)
            AND (_full.name IS NULL OR _running >= coalesce(_jobs.scheduled, 0))
            OR coalesce(_are_starting, false);
        finding := concat_ws(
            ', ',
            _running || ' running',
            _jobs.scheduled || ' scheduled',
            CASE WHEN _are_starting THEN 'pg_cron has just started' END,
            CASE WHEN NOT ok AND _running < _jobs.scheduled THEN _full.problem END,
            CASE WHEN NOT ok THEN 'the last one ended with: ' || _jobs.last_message END
        );
        advice := CASE
            WHEN ok THEN NULL
            WHEN _jobs.missing_role IS NOT NULL THEN
                format('Role %I does not exist. SELECT autoembed.schedule(); makes the jobs again.', _jobs.missing_role)
            WHEN _jobs.scheduled > 0 AND current_setting('cron.launch_active_jobs', true) = 'off' THEN
                'ALTER SYSTEM SET cron.launch_active_jobs = on; SELECT pg_reload_conf();'
            WHEN _jobs.scheduled > 0 AND _full.name IS NOT NULL THEN
                format('Raise %s and restart the server, or run fewer lanes with autoembed.schedule().', _full.name)
            WHEN _jobs.scheduled > 0 THEN
                'pg_cron does not start them. Check cron.job_run_details, the server''s log, and whether '
                'max_worker_processes is high enough.'
            ELSE autoembed._start_advice()
        END;
        RETURN NEXT;
    END LOOP;
    -- A lane begins a transaction many times a second, also while it waits for an answer.
    FOR _lane IN
        SELECT l.pid, date_trunc('second', clock_timestamp() - a.xact_start) AS since, a.wait_event
        FROM autoembed.lane AS l
        CROSS JOIN LATERAL pg_stat_get_activity(l.pid) AS a
        WHERE a.backend_start = l.backend_start AND a.xact_start < clock_timestamp() - frozen_after
        ORDER BY l.pid
    LOOP
        subject := format('lane %s', _lane.pid);
        ok := false;
        finding := concat('has done nothing for ', _lane.since, ', waits for ' || _lane.wait_event);
        advice := format('SELECT pg_terminate_backend(%s); its rows go to the next lane. If the process stays, it is '
                         'stopped by the operating system.', _lane.pid);
        RETURN NEXT;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lane_checks IS
    'The checks of doctor() of lanes: how many run of those that are scheduled, those for backfills apart, and lanes '
    'that do not go on. starts_within: after the start of pg_cron, none has to run for so long.';

CREATE OR REPLACE FUNCTION autoembed._check_everything()
    RETURNS TABLE (subject text, ok boolean, finding text, advice text)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _row record;
    _lanes bigint;
    _start text := autoembed._start_advice();
    _problem text;
    _advice text;
    _pipeline autoembed.pipeline;
BEGIN
    _lanes := autoembed._running_lanes(false);
    FOR _row IN
        SELECT n.name, e.installed_version, e.default_version
        FROM unnest('{autoembed,pg_cron,pgmq,plpython3u,vector}'::text[]) AS n(name)
        LEFT JOIN pg_available_extensions AS e ON e.name = n.name
        ORDER BY n.name
    LOOP
        subject := format('extension %s', _row.name);
        -- Only pg_cron can be missing. It is installed in one database of a server and starts lanes in any.
        ok := CASE
            WHEN _row.installed_version IS NULL THEN _lanes > 0
            ELSE _row.installed_version = _row.default_version
        END;
        finding := coalesce('version ' || _row.installed_version, 'not in this database') || CASE
            WHEN _row.installed_version <> _row.default_version THEN format(', %s is available', _row.default_version)
            ELSE ''
        END;
        advice := CASE
            WHEN NOT ok AND _row.installed_version IS NULL THEN _start
            WHEN NOT ok THEN format('ALTER EXTENSION %I UPDATE;', _row.name)
        END;
        IF _row.name = 'vector' THEN
            SELECT f.faults INTO _problem FROM autoembed._vector_faults() AS f;
            IF _problem IS NOT NULL THEN
                ok := false;
                finding := concat(finding, ': ', _problem);
                advice := 'Install pgvector 0.8.4 or later, restart the server, then: ALTER EXTENSION vector UPDATE; '
                    'and REINDEX INDEX CONCURRENTLY for each HNSW index.';
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;

    RETURN QUERY SELECT c.* FROM autoembed._lane_checks() AS c;

    FOR _row IN SELECT j.* FROM autoembed._broken_jobs() AS j ORDER BY j.name LOOP
        subject := format('job %s', _row.name);
        ok := false;
        finding := _row.problem;
        advice := format('SELECT cron.unschedule(%s);', _row.jobid);
        RETURN NEXT;
    END LOOP;

    FOR _row IN
        SELECT m.name, r.until, r.reason, r.needs_attention
        FROM autoembed.model AS m
        LEFT JOIN autoembed.model_rest AS r ON r.model = m.name AND r.until > clock_timestamp()
        WHERE m.dimensions IS NULL OR m.name IN (
            SELECT coalesce(p.model, autoembed._default_model()) FROM autoembed.pipeline AS p
            UNION
            SELECT autoembed._default_model()
        )
        ORDER BY m.name
    LOOP
        subject := format('model %s', _row.name);
        SELECT p.problem, p.advice INTO _problem, _advice FROM autoembed._probe(_row.name) AS p;
        ok := _row.until IS NULL AND _problem IS NULL;
        finding := coalesce(_problem, 'rests until ' || _row.until || ': ' || _row.reason, 'answers')
            || coalesce('; it refused a longer text, so texts are cut at about '
                        || (autoembed._learnt(_row.name) ->> 'tokens_per_input') || ' tokens', '');
        advice := CASE
            WHEN _problem IS NOT NULL THEN _advice
            WHEN _row.until IS NOT NULL THEN
                format('To try it at once: SELECT autoembed.resume_model(%L);', _row.name)
        END;
        RETURN NEXT;
    END LOOP;

    FOR _pipeline IN SELECT p.* FROM autoembed.pipeline AS p ORDER BY p.id LOOP
        RETURN QUERY SELECT c.* FROM autoembed._pipeline_checks(_pipeline) AS c;
    END LOOP;

    FOR _row IN
        SELECT r.kind, coalesce(r.definition ->> 'table_id', r.definition ->> 'name') AS name, r.problem,
               format('FROM autoembed.restored WHERE kind = %L AND definition ->> %L = %L', r.kind, k.key,
                      r.definition ->> k.key) AS place
        FROM autoembed.restored AS r
        CROSS JOIN LATERAL (SELECT CASE r.kind WHEN 'pipeline' THEN 'id' ELSE 'name' END AS key) AS k
        ORDER BY r.kind, name
    LOOP
        subject := format('%s of %s', _row.kind, _row.name);
        ok := false;
        finding := concat_ws(': ', 'a restore could not bring it back', _row.problem);
        advice := format('Restore what is missing, then UPDATE autoembed.restored SET problem = NULL; or forget it: '
                         'DELETE %s;', _row.place);
        RETURN NEXT;
    END LOOP;

    FOR _row IN
        SELECT t.stray_on, string_agg(quote_ident(t.name), ', ') AS names
        FROM autoembed._stray_triggers() AS t
        GROUP BY t.stray_on
        ORDER BY t.stray_on
    LOOP
        subject := format('triggers of %s', _row.stray_on);
        ok := false;
        finding := format('a dump has brought them without their pipeline: %s', _row.names);
        advice := format('Attach the table: SELECT autoembed.enable(%L, …); or take them away: '
                         'SELECT autoembed.disable(%L);', _row.stray_on, _row.stray_on);
        RETURN NEXT;
    END LOOP;

    FOR _row IN
        SELECT string_agg(f.function::text, ', ') AS names,
               string_agg(format('REVOKE ALL ON FUNCTION %s FROM %s;', f.function, f.roles), ' ') AS cure
        FROM autoembed._open_functions() AS f
        -- The others are named with their pipelines.
        WHERE NOT EXISTS (
            SELECT FROM autoembed.pipeline AS p CROSS JOIN LATERAL autoembed._open_functions(p.id) AS o
            WHERE o.function = f.function
        )
        HAVING count(*) > 0
    LOOP
        subject := 'rights of functions';
        ok := false;
        finding := 'other roles may call ' || _row.names;
        advice := _row.cure;
        RETURN NEXT;
    END LOOP;

    subject := 'queue';
    SELECT coalesce(clock_timestamp() - min(q.enqueued_at) < interval '5 minutes', true),
           format('%s messages', count(*))
               || coalesce(
                   ', the oldest has waited ' || date_trunc('second', clock_timestamp() - min(q.enqueued_at)), ''
               )
    INTO ok, finding
    FROM autoembed._job AS q;
    advice := CASE
        WHEN NOT ok THEN 'See autoembed.status for the reason. To run more lanes: SELECT autoembed.schedule(2);'
    END;
    RETURN NEXT;

    IF EXISTS (SELECT FROM autoembed.failure AS f WHERE f.pipeline_id IS NULL) THEN
        subject := 'failed messages';
        SELECT false, count(*) || ', the last: ' || (array_agg(f.reason ORDER BY f.last_failed_at DESC))[1]
        INTO ok, finding
        FROM autoembed.failure AS f
        WHERE f.pipeline_id IS NULL;
        advice := 'See autoembed.failed. To try them again: SELECT autoembed.retry_failed(error_class => ''message''); '
            'To forget them: DELETE FROM autoembed.failure WHERE error_class = ''message'';';
        RETURN NEXT;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_everything IS
    'The checks of doctor() for a superuser: the extensions, the lanes, each model, each table and the queue. Sends '
    'each model in use one word.';

CREATE OR REPLACE FUNCTION autoembed._check_own()
    RETURNS TABLE (subject text, ok boolean, finding text, advice text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
BEGIN
    subject := 'lanes';
    ok := autoembed._running_lanes(false) > 0 OR pg_is_in_recovery() OR autoembed._lanes_are_starting();
    finding := format('%s running', autoembed._running_lanes(false));
    advice := CASE WHEN NOT ok THEN 'Ask a superuser for the lines on lanes of SELECT * FROM autoembed.doctor().' END;
    RETURN NEXT;
    FOR _pipeline IN SELECT p.* FROM autoembed.pipeline AS p WHERE autoembed._owns(p.table_id) ORDER BY p.id LOOP
        RETURN QUERY SELECT c.* FROM autoembed._pipeline_checks(_pipeline) AS c;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_own IS
    'The checks of doctor() for an owner of tables: whether lanes run, and the own tables.';

CREATE OR REPLACE FUNCTION autoembed.doctor()
    RETURNS TABLE (subject text, ok boolean, finding text, advice text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user) THEN
        RETURN QUERY SELECT c.* FROM autoembed._check_everything() AS c;
    ELSE
        RETURN QUERY SELECT c.* FROM autoembed._check_own() AS c;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.doctor IS
    'Checks the extensions, the lanes, each model, each table and the queue. Returns for each check whether it passed, '
    'the finding, and advice if it did not pass. Sends each model in use, and each rerank model, one word. A role that '
    'is no superuser gets the checks of the own tables, and no model is asked.';

CREATE OR REPLACE FUNCTION autoembed._probe(model text, OUT problem text, OUT advice text)
    LANGUAGE plpython3u
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.probe(model)
$python$;
COMMENT ON FUNCTION autoembed._probe IS
    'Sends a model one word. Returns the problem with the model, or NULL, and what to do.';
