-- 45_triggers.sql: whether the triggers of a pipeline are as they should be.

CREATE FUNCTION autoembed._trigger_problems(pipeline autoembed.pipeline)
    RETURNS SETOF text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT CASE WHEN t.oid IS NULL THEN format('no trigger for %s', e.event)
                ELSE format('trigger %I is disabled', t.tgname) END
    FROM unnest('{insert,update,delete,truncate}'::text[] || CASE pipeline.on_change WHEN 'clear' THEN ARRAY['clear'] ELSE '{}' END) AS e(event)
    LEFT JOIN pg_trigger AS t ON t.tgrelid = pipeline.table_id AND t.tgname = autoembed._trigger_name(pipeline.id, e.event)
    WHERE pipeline.managed AND (t.oid IS NULL OR t.tgenabled <> CASE WHEN pipeline.replicated THEN 'A' ELSE 'O' END)
      AND NOT coalesce(t.tgenabled = 'A', false)
    UNION ALL
    SELECT 'no trigger calls queue_embeddings(), or none that is enabled'
    WHERE NOT pipeline.managed
      AND NOT EXISTS (
          SELECT FROM pg_trigger AS t
          WHERE t.tgrelid = pipeline.table_id AND t.tgfoid = 'autoembed.queue_embeddings()'::regprocedure
            AND (autoembed._arguments(t))[2] = pipeline.embedding_column AND t.tgenabled IN ('O', 'A')
      );
$sql$;
COMMENT ON FUNCTION autoembed._trigger_problems(autoembed.pipeline) IS 'What is wrong with the triggers of a pipeline.';
