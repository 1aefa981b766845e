-- 85_grant.sql: what a role needs, in one call.

CREATE FUNCTION autoembed._grant(role regrole, functions text[])
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA autoembed TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', (
        SELECT string_agg(p.oid::regprocedure::text, ', ')
        FROM pg_proc AS p
        -- A view's functions are called with the rights of whoever reads it.
        WHERE p.pronamespace = 'autoembed'::regnamespace
          AND p.proname = ANY (functions || '{_check_pipeline,_default_model,_estimated_rows,_lane_lives,_may_see,_owns}'::text[])
    ), role);
    EXECUTE format('GRANT SELECT ON autoembed.status, autoembed.progress, autoembed.failed TO %s', role);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._grant(regrole, text[]) IS 'Grants these functions, and what every reader of the views needs.';

CREATE FUNCTION autoembed.grant_usage(role regrole)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._grant(role, '{embed,queue_embeddings,clear_column,enable,alter_pipeline,disable,pause,resume,resync,reembed,preview,
        estimate,wait_until_fresh,_owned_pipelines,_owned_pipeline,_check_owner,_check_content,_check_on_change,_needed_columns,_template,_dimensions,_read_condition,
        _look_through,_state_of,_content_expression,_key_expression,_columns_of,_content_function,_content_function_of,
        _estimate_texts,_index_key,_operator}');
    EXECUTE format('GRANT SELECT,
                    INSERT (table_id, embedding_column, content_columns, content_function, content_template, condition, condition_columns,
                            condition_objects, model, on_change, truncate, replicated),
                    UPDATE (content_columns, content_function, content_template, condition, condition_columns, condition_objects, model,
                            on_change, truncate, paused),
                    DELETE ON autoembed.pipeline TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT (pipeline_id, condition, force, create_index), DELETE ON autoembed.backfill TO %s', role);
    EXECUTE format('GRANT SELECT ON autoembed._row_state TO %s', role);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.grant_usage(regrole) IS
    'Lets a role attach tables that it owns, see how they do, and call embed(); all of it costs your provider''s money.';

CREATE FUNCTION autoembed.grant_monitor(role regrole)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._grant(role, '{}');
    EXECUTE format('GRANT SELECT ON autoembed.usage, autoembed.model_rest TO %s', role);
    EXECUTE format('GRANT pg_monitor TO %s', role);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.grant_monitor(regrole) IS
    'Lets a role see how all tables do, their texts excepted, and what they cost; makes it a member of pg_monitor.';
