-- 45_triggers.sql: whether the triggers of a pipeline are as they should be.

CREATE FUNCTION autoembed._trigger_problems(pipeline autoembed.pipeline)
    RETURNS TABLE (problem text, cure text)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH wanted AS (
        SELECT e.event, e.bit, autoembed._trigger_name(pipeline.id, e.event) AS name
        -- As in pg_trigger.tgtype.
        FROM (VALUES ('insert', 4), ('update', 16), ('delete', 8), ('truncate', 32), ('clear', 16)) AS e(event, bit)
        WHERE CASE WHEN pipeline.managed THEN e.event <> 'clear' OR pipeline.on_change = 'clear' ELSE e.event IN ('insert', 'update') END
    ),
    found AS (
        SELECT t.*
        FROM pg_trigger AS t
        WHERE t.tgrelid IN (SELECT r.relid FROM pg_partition_tree(pipeline.table_id) AS r UNION ALL SELECT pipeline.table_id)
          AND CASE WHEN pipeline.managed THEN t.tgname IN (SELECT w.name FROM wanted AS w)
                   WHEN t.tgfoid = 'autoembed.queue_embeddings()'::regprocedure THEN (autoembed._arguments(t))[2] = pipeline.embedding_column
                   WHEN t.tgfoid = 'autoembed.clear_column()'::regprocedure THEN (autoembed._arguments(t))[1] = pipeline.embedding_column END
    )
    SELECT format('no trigger for %s', w.event),
           format('CREATE TRIGGER %I AFTER %s ON %s FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings(%L, %L);',
                  w.name, upper(w.event), pipeline.table_id, pipeline.content_function, pipeline.embedding_column)
    FROM wanted AS w
    WHERE NOT EXISTS (
        SELECT FROM found AS f
        WHERE f.tgrelid = pipeline.table_id
          AND CASE WHEN pipeline.managed THEN f.tgname = w.name
                   ELSE f.tgfoid = 'autoembed.queue_embeddings()'::regprocedure AND f.tgtype & w.bit <> 0 END
    )
    UNION ALL
    -- Of a partitioned table on any of its partitions, too.
    SELECT format('trigger %I is disabled', f.tgname), format('ALTER TABLE %s ENABLE TRIGGER %I;', pipeline.table_id, f.tgname)
    FROM found AS f
    GROUP BY f.tgname
    HAVING NOT bool_and(f.tgenabled = 'A' OR f.tgenabled = 'O' AND NOT pipeline.replicated);
$sql$;
COMMENT ON FUNCTION autoembed._trigger_problems(autoembed.pipeline) IS
    'What is wrong with the triggers of a pipeline, and what mends those that were made by hand; resync() makes the others anew.';
