-- The rights of owners of tables, of monitors and of lanes.

CREATE OR REPLACE FUNCTION autoembed._check_role(role regrole)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles AS r WHERE r.oid = role) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('role %s does not exist', coalesce(role::text, 'NULL')),
            HINT = 'Give the name of a role, such as ''app''.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_role IS 'Fails unless the role exists.';

CREATE OR REPLACE FUNCTION autoembed._grant(role regrole, functions text[])
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text := autoembed._check_role(role);
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA autoembed TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', (
        SELECT string_agg(p.oid::regprocedure::text, ', ')
        FROM pg_proc AS p
        -- PostgreSQL calls a view's functions with the rights of the view's reader.
        WHERE p.pronamespace = 'autoembed'::regnamespace
          AND p.proname = ANY (functions || '{
              _check_pipeline, _default_model, _estimated_rows, _is_pipeline_of, _lane_lives,
              _load_python, _may_see, _owns, _partition_tree, _python_sources, _search_stats, _short_key
          }'::text[])
    ), role);
    EXECUTE format(
        'GRANT SELECT ON autoembed.status, autoembed.progress, autoembed.failed, autoembed.usage, '
        'autoembed.search_stats TO %s', role
    );
    -- The role can name the functions of pipelines now.
    PERFORM autoembed._mend_restored();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._grant IS
    'Grants a role these functions, and the rights that every reader of the views needs.';

CREATE OR REPLACE FUNCTION autoembed.grant_usage(role regrole)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    _void := autoembed._grant(role, '{
        alter_pipeline, chunk_text, clear_column, create_match_function, disable, doctor, embed, embed_query, enable,
        estimate, evaluate_search, measure_recall, pause, preview, queue_embeddings, reembed, reset_search_stats,
        resume, resync, retry_failed, search, search_rows, tune, wait_until_fresh, _advisory_locks, _alter_as_owner,
        _arguments, _as_owner, _beginning, _bits, _check_attachable, _check_beside, _check_chunking, _check_chunks_view,
        _check_content, _check_index, _check_on_change, _check_own, _check_owner, _check_template, _chunk_call,
        _chunk_function_of, _chunk_text, _chunking, _clears, _columns_of, _content_expression, _content_function,
        _content_function_of, _cron_is_here, _dimensions, _distances, _drop_orphaned_pipelines, _drop_stray_triggers,
        _estimate_texts, _estimated_matches, _exact_answers, _execute, _full_text_config, _guide_triggers, _index_key,
        _indexes_on_vectors, _is_binary, _is_empty, _is_plain, _is_subscribed, _judged_keys, _judgments, _key_columns,
        _key_expression, _key_operator, _key_text, _lanes_are_starting, _lasting_target, _load_python, _lock_holder,
        _lock_table, _look_through, _make_embeddings_table, _match_function, _measured_recall, _missing_guide_triggers,
        _nearest, _needed_columns, _new_place, _note_search, _operator, _owned_pipeline, _owned_pipelines,
        _partition_triggers, _pipeline_checks, _prefix_expression, _prefix_of, _present_text, _preview, _python_sources,
        _read_condition, _recall, _refuse, _refuse_without_vectors, _replace_index, _rerank, _rerank_candidates,
        _reranked, _reset_search_stats, _restore_advisory_locks, _rights_problems, _run_as_owner,
        _run_statement_as_owner, _running_lanes, _sample_query, _search_page, _search_quality, _search_target,
        _searched, _serves_searches, _set_paused, _stray_triggers, _template, _trigger_name, _trigger_problems,
        _vector_digest_expression, _vector_index, _vector_indexes, _waits_for_commit
    }');
    -- The role gets rights to columns only. A right to the whole table, which 0.1.0 granted, includes LOCK TABLE, and
    -- that stops all lanes.
    EXECUTE format('REVOKE DELETE ON autoembed.pipeline, autoembed.backfill FROM %s', role);
    EXECUTE format('GRANT SELECT,
                    INSERT (table_id, embedding_column, content_columns, content_function, content_template, condition,
                            condition_columns, condition_objects, model, on_change, truncate, replicated,
                            embeddings_table, chunking, chunk_size, chunk_overlap, text_config, adopts,
                            chunk_function, chunk_prefix, binary_index),
                    UPDATE (content_columns, content_function, content_template, condition, condition_columns,
                            condition_objects, model, on_change, truncate, paused, ended, chunking, chunk_size,
                            chunk_overlap, embeddings_table, embedding_column, text_config, ef_search, recall_target,
                            recall, recall_measured_at, chunk_function, chunk_prefix, binary_index, former_chunking)
                    ON autoembed.pipeline TO %s', role);
    EXECUTE format('GRANT SELECT,
                    INSERT (pipeline_id, condition, condition_objects, force, create_index),
                    UPDATE (condition, condition_objects, force, create_index, position, rows_queued, started_at,
                            scanned_at, index_problem)
                    ON autoembed.backfill TO %s', role);
    EXECUTE format('GRANT SELECT ON autoembed._row_state, autoembed._own_pipeline_state TO %s', role);
    EXECUTE format('GRANT SELECT, UPDATE (retried) ON autoembed._own_failure TO %s', role);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.grant_usage IS
    'Lets a role attach tables that it owns, see their state, call doctor() and retry_failed() for them, search, and '
    'call embed(). The provider charges for its embeddings.';

CREATE OR REPLACE FUNCTION autoembed.grant_monitor(role regrole)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    _void := autoembed._grant(role, '{}');
    EXECUTE format('GRANT SELECT ON autoembed.model_rest TO %s', role);
    EXECUTE format('GRANT pg_monitor TO %s', role);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.grant_monitor IS
    'Lets a role see the state and the costs of all tables, but not their texts. Makes it a member of pg_monitor.';

CREATE OR REPLACE FUNCTION autoembed.grant_lane(role regrole)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _function regprocedure;
    _void text := autoembed._check_role(role);
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA autoembed TO %s', role);
    EXECUTE format('GRANT EXECUTE ON PROCEDURE autoembed.work, autoembed._work TO %s', role);
    FOR _function IN
        SELECT p.oid
        FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace
          AND (p.proname = ANY ('{
                   _call_embedder, _check_options, _claim, _clean_up, _digests, _enter_lane, _extend, _fail,
                   _fail_backfill, _fail_message, _forget, _forget_all, _free_slots, _gate, _index_texts,
                   _lane_is_wanted, _learn, _learnt, _leave_lane, _load_python,
                   _next_backfill, _note_plan, _note_replaced, _note_usage, _paid_chunks, _paid_vectors, _pay_chunks,
                   _pipelines, _python_sources, _queue_backfill, _record_embedded, _release, _replace_segments,
                   _requeue, _resolve, _rest_model, _rest_pipelines, _rows_to_try, _runs_owners_code,
                   _segments_to_merge, _settle, _stage, _take_permit, _unindexed, _warn_of_blocked_pipelines,
                   resume_model
               }'::text[])
               OR p.proname ~ '^_(content|write|scan|split)_[0-9]+$')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', _function, role);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.grant_lane IS
    'Lets a role run lanes, and nothing else. SELECT autoembed.schedule(role => …) has pg_cron run them as this '
    'role. The role can read the texts of all attached tables and write their vectors.';

CREATE OR REPLACE FUNCTION autoembed._updated()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '500ms'
AS $plpgsql$
DECLARE
    _role oid;
    _grant record;
    _id integer;
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_extension AS e ON e.oid = d.objid AND e.extname = 'autoembed'
        WHERE d.classid = 'pg_extension'::regclass
    ) THEN
        RETURN;
    END IF;
    -- The script cannot do this itself. Dumps would lack its grants, and the functions that it makes would be members
    -- of the extension.
    FOR _grant IN
        SELECT g.privilege,
               CASE
                   WHEN g.routine THEN 'ROUTINE ' || p.oid::regprocedure
                   ELSE 'TABLE ' || c.oid::regclass
               END AS object,
               CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE r.oid::regrole::text END AS role
        FROM jsonb_to_recordset(nullif(current_setting('autoembed.grants_before_update', true), '')::jsonb)
            AS g(object text, routine boolean, privilege text, grantee bigint)
        LEFT JOIN pg_roles AS r ON r.oid = g.grantee::oid
        LEFT JOIN pg_proc AS p
            ON g.routine AND p.pronamespace = 'autoembed'::regnamespace AND p.proname = g.object
        LEFT JOIN pg_class AS c
            ON NOT g.routine AND c.relnamespace = 'autoembed'::regnamespace AND c.relname = g.object
        WHERE num_nonnulls(p.oid, c.oid) = 1 AND (g.grantee = 0 OR r.oid IS NOT NULL)
    LOOP
        EXECUTE format('GRANT %s ON %s TO %s', _grant.privilege, _grant.object, _grant.role);
    END LOOP;
    FOR _role IN
        SELECT a.grantee FROM pg_proc AS p CROSS JOIN LATERAL aclexplode(p.proacl) AS a
        WHERE p.oid = 'autoembed.enable'::regproc AND a.grantee NOT IN (0, p.proowner)
    LOOP
        PERFORM autoembed.grant_usage(_role);
    END LOOP;
    FOR _role IN
        SELECT a.grantee FROM pg_class AS c CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        -- Owners may read the view usage, too.
        WHERE c.oid = 'autoembed.model_rest'::regclass AND a.privilege_type = 'SELECT'
          AND a.grantee NOT IN (0, c.relowner)
    LOOP
        PERFORM autoembed.grant_monitor(_role);
    END LOOP;
    FOR _role IN SELECT r.role FROM autoembed._lane_roles() AS r(role) LOOP
        PERFORM autoembed.grant_lane(_role);
    END LOOP;
    -- Triggers call the functions of a pipeline that waits for something, too.
    FOR _id IN
        SELECT p.id
        FROM autoembed.pipeline AS p
        CROSS JOIN LATERAL autoembed._check_pipeline(p) AS c
        WHERE (c.errcode IN ('undefined_table', 'wrong_object_type', 'undefined_column')) IS NOT TRUE
    LOOP
        BEGIN
            PERFORM autoembed._build_pipeline(_id);
            PERFORM autoembed._build_partition_triggers(p) FROM autoembed.pipeline AS p WHERE p.id = _id;
        EXCEPTION WHEN OTHERS THEN
            -- The owner of the table may have locked it. No owner keeps the others from the update.
            PERFORM set_config('lock_timeout', '10ms', true);
            RAISE WARNING USING
                ERRCODE = SQLSTATE,
                MESSAGE = format('the functions of pipeline %s cannot be made again: %s', _id, SQLERRM),
                HINT = 'A lane tries it again.';
        END;
    END LOOP;
    -- Another role may have put its own function in the place of a model's. Only a superuser may choose that one.
    PERFORM autoembed._build_embedders(m.name)
    FROM autoembed.model AS m
    WHERE m.provider = 'function'
      AND NOT EXISTS (
          SELECT FROM unnest(autoembed._purposes(m)) AS u(purpose)
          CROSS JOIN LATERAL autoembed._embedder(m, u.purpose) AS e
          WHERE e.problem IS NOT NULL OR NOT autoembed._is_chosen(e.wrapper, e.function_id)
      );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._updated IS
    'Completes an update of the extension: grants again the rights that roles had, and makes the functions of '
    'pipelines and models again.';
