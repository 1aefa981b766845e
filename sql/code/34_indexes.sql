-- HNSW indexes on embedding columns.

CREATE OR REPLACE FUNCTION autoembed._vector_index(table_id regclass, embedding_column name)
    RETURNS SETOF pg_index
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT i.*
    FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indexrelid
    JOIN pg_am AS m ON m.oid = c.relam AND m.amname IN ('hnsw', 'ivfflat')
    JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attname = _vector_index.embedding_column
    WHERE i.indrelid = _vector_index.table_id
      -- The index is on the column, or on an expression with it.
      AND (a.attnum = i.indkey[0] OR i.indkey[0] = 0 AND EXISTS (
          SELECT FROM pg_depend AS d
          WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid AND d.refobjsubid = a.attnum
      ))
    ORDER BY i.indisvalid DESC
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._vector_index IS
    'The index on the embeddings of a table or partition, a valid one first. No row if there is none.';

CREATE OR REPLACE FUNCTION autoembed._bits(vector text, dimensions integer)
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT format('@extschema:vector@.binary_quantize(%s)::pg_catalog.bit(%s)', vector, dimensions);
$sql$;
COMMENT ON FUNCTION autoembed._bits IS
    'The SQL expression that gives the bits of a vector: 1 for each dimension above 0.';

CREATE OR REPLACE FUNCTION autoembed._bits_indexed(table_id regclass, embedding_column name)
    RETURNS integer
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT max(a.atttypmod)
    FROM (
        SELECT t.relid FROM pg_partition_tree(table_id) AS t WHERE t.isleaf UNION SELECT table_id
    ) AS r
    CROSS JOIN LATERAL autoembed._vector_index(r.relid, embedding_column) AS i
    JOIN pg_opclass AS o ON o.oid = i.indclass[0] AND o.opcname = 'bit_hamming_ops'
    JOIN pg_attribute AS a ON a.attrelid = i.indexrelid AND a.attnum = 1
    WHERE i.indisvalid
      AND pg_get_expr(i.indexprs, i.indrelid) ~ format('binary_quantize[(]%s[)]', quote_ident(embedding_column));
$sql$;
COMMENT ON FUNCTION autoembed._bits_indexed IS
    'The dimensions in the binary index of a table or its partitions; NULL if its index, if any, is of another kind.';

CREATE OR REPLACE FUNCTION autoembed._index_key(
    pipeline autoembed.pipeline,
    OUT key text,
    OUT expression text,
    OUT problem text,
    OUT hint text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _vectors_table regclass := coalesce(pipeline.embeddings_table, pipeline.table_id);
    _type name;
    _dimensions integer;
BEGIN
    SELECT t.typname, nullif(a.atttypmod, -1) INTO STRICT _type, _dimensions
    FROM pg_attribute AS a
    JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = _vectors_table AND a.attname = pipeline.embedding_column;
    IF _dimensions IS NULL THEN
        _dimensions := autoembed._dimensions(pipeline.model);
        problem := format('column "%s" of table %s has no dimensions, which an HNSW index needs',
                          pipeline.embedding_column, _vectors_table);
        hint := format('ALTER TABLE %s ALTER COLUMN %I TYPE @extschema:vector@.%s(%s);',
                       _vectors_table, pipeline.embedding_column, _type, _dimensions);
    END IF;
    expression := quote_ident(pipeline.embedding_column);
    -- pgvector's HNSW indexes take up to 2000 dimensions of vector, and 4000 of halfvec, but 64,000 bits.
    IF pipeline.binary_index THEN
        key := format('(%s) @extschema:vector@.bit_hamming_ops', autoembed._bits(expression, _dimensions));
    ELSIF _dimensions > 4000 THEN
        problem := format('embeddings of %s dimensions cannot have an HNSW index, which takes up to 4000', _dimensions);
        hint := 'Many models give shorter ones: autoembed.create_model(…, dimensions => 1024).';
    ELSIF _type = 'vector' AND _dimensions > 2000 THEN
        expression := format('%s::@extschema:vector@.halfvec(%s)', expression, _dimensions);
        key := format('(%s) @extschema:vector@.halfvec_cosine_ops', expression);
    ELSE
        key := format('%s @extschema:vector@.%s_cosine_ops', expression, _type);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._index_key IS
    'The facts of an HNSW index on a pipeline''s embeddings. key: the indexed expression and its operator class. NULL: '
    'no index is possible. expression: the expression in queries that use the index. problem: the fact that prevents '
    'the index. hint: its cure.';

CREATE OR REPLACE FUNCTION autoembed._build_index(pipeline_id integer)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _vectors_table regclass;
    _index pg_index;
    _key record;
    _job record;
    _name text;
    _problem text;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    _vectors_table := coalesce(_pipeline.embeddings_table, _pipeline.table_id);
    SELECT i.* INTO _index FROM autoembed._vector_index(_vectors_table, _pipeline.embedding_column) AS i;
    IF _index.indisvalid THEN
        PERFORM autoembed._unschedule('index-' || pipeline_id);
        RETURN true;
    ELSIF NOT autoembed._cron_is_here() THEN
        UPDATE autoembed.backfill AS b
        SET index_problem = 'pg_cron, which builds indexes, is not installed in this database'
        WHERE b.pipeline_id = _build_index.pipeline_id AND b.index_problem IS NULL;
        RETURN false;
    END IF;
    SELECT k.* INTO _key FROM autoembed._index_key(_pipeline) AS k;
    SELECT j.* INTO _job FROM autoembed._index_job(pipeline_id) AS j;
    SELECT coalesce(b.index_problem, CASE WHEN _key.key IS NULL THEN _key.problem END, _job.problem)
    INTO _problem
    FROM autoembed.backfill AS b
    WHERE b.pipeline_id = _build_index.pipeline_id;
    IF _problem IS NOT NULL THEN
        PERFORM autoembed._unschedule('index-' || pipeline_id);
        UPDATE autoembed.backfill AS b
        SET index_problem = _problem
        WHERE b.pipeline_id = _build_index.pipeline_id AND b.index_problem IS NULL;
    END IF;
    IF _index.indexrelid IS NOT NULL THEN
        -- The index is being built, or its build was interrupted.
        BEGIN
            EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', _vectors_table);
            -- The build may have ended before the lock was granted.
            IF EXISTS (SELECT FROM pg_index AS i WHERE i.indexrelid = _index.indexrelid AND NOT i.indisvalid) THEN
                EXECUTE format('DROP INDEX %s', _index.indexrelid::regclass);
            END IF;
        -- A build frees its lock a moment before it commits. Until then, the catalog says: tuple concurrently updated.
        EXCEPTION WHEN lock_not_available OR internal_error THEN
            PERFORM autoembed._hold_index_job(pipeline_id);
        END;
    ELSIF _problem IS NULL AND _job.is_due IS NOT TRUE AND autoembed._index_may_be_built(pipeline_id) THEN
        SELECT CASE WHEN to_regclass(format('%I.%I', n.nspname, k.name)) IS NULL THEN k.name
                    ELSE format('autoembed_%s_idx', pipeline_id) END
        INTO STRICT _name
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        CROSS JOIN LATERAL (
            SELECT left(c.relname, 30) || '_' || left(_pipeline.embedding_column, 25) || '_idx' AS name
        ) AS k
        WHERE c.oid = _vectors_table;
        -- No function can build an index concurrently.
        PERFORM autoembed._schedule_index(pipeline_id, format(
            'CREATE INDEX CONCURRENTLY IF NOT EXISTS %I ON %s USING hnsw (%s)', _name, _vectors_table, _key.key
        ));
    END IF;
    RETURN false;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_index IS
    'Has pg_cron build the HNSW index of a pipeline''s column, concurrently. True if the index exists.';

CREATE OR REPLACE FUNCTION autoembed._vector_version()
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT e.default_version FROM pg_available_extensions AS e WHERE e.name = 'vector';
$sql$;
COMMENT ON FUNCTION autoembed._vector_version IS
    'The version of pgvector''s library, which is that of the newest scripts beside it.';

CREATE OR REPLACE FUNCTION autoembed._vector_faults(OUT faults text, OUT in_parallel_builds boolean)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT string_agg(f.fault, ', ' ORDER BY f.mended_in), coalesce(bool_or(f.in_parallel_builds), false)
    FROM (VALUES
        ('{0,8,2}'::integer[], 'a parallel build of an HNSW index can overflow a buffer (CVE-2026-3172)', true),
        ('{0,8,3}', 'VACUUM can corrupt an HNSW index', false),
        ('{0,8,4}', 'VACUUM of an HNSW index can fail', false)
    ) AS f(mended_in, fault, in_parallel_builds)
    WHERE string_to_array(substring(autoembed._vector_version() FROM '^[0-9]+(?:[.][0-9]+)*'), '.')::integer[]
        < f.mended_in;
$sql$;
COMMENT ON FUNCTION autoembed._vector_faults IS
    'What is known to be wrong with the HNSW indexes of this version of pgvector; NULL if nothing is. '
    'in_parallel_builds: whether an index is safe only if one process builds it.';

CREATE OR REPLACE FUNCTION autoembed._build_without_workers()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- A session of pg_cron, in either of its modes, ends with its job, and the setting with it.
    IF EXISTS (
        SELECT FROM pg_stat_get_activity(pg_backend_pid()) AS a
        WHERE 'pg_cron' IN (a.backend_type, a.application_name)
    ) THEN
        IF (SELECT f.in_parallel_builds FROM autoembed._vector_faults() AS f) THEN
            PERFORM set_config('max_parallel_maintenance_workers', '0', false);
        END IF;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_without_workers IS
    'Has pg_cron build indexes without parallel workers where these are a fault of pgvector.';
