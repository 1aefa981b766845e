-- HNSW indexes on embedding columns.

CREATE OR REPLACE FUNCTION autoembed._indexes_on_vectors(table_id regclass, embedding_column name)
    RETURNS SETOF pg_index
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT i.*
    FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indexrelid
    JOIN pg_am AS m ON m.oid = c.relam AND m.amname IN ('hnsw', 'ivfflat')
    JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attname = _indexes_on_vectors.embedding_column
    WHERE i.indrelid = _indexes_on_vectors.table_id
      -- The index is on the column, or on an expression with it.
      AND (a.attnum = i.indkey[0] OR i.indkey[0] = 0 AND EXISTS (
          SELECT FROM pg_depend AS d
          WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid AND d.refobjsubid = a.attnum
      ))
    ORDER BY i.indisvalid DESC;
$sql$;
COMMENT ON FUNCTION autoembed._indexes_on_vectors IS
    'The indexes of pgvector on the embeddings of a table or partition, valid ones first.';

CREATE OR REPLACE FUNCTION autoembed._serves_searches(index pg_index)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- A search compares by cosine, among all rows.
    -- It sets nothing of ivfflat, which finds few of the nearest rows then.
    SELECT m.amname = 'hnsw' AND index.indpred IS NULL
        AND o.opcname IN ('vector_cosine_ops', 'halfvec_cosine_ops', 'bit_hamming_ops')
    FROM pg_opclass AS o
    JOIN pg_am AS m ON m.oid = o.opcmethod
    WHERE o.oid = index.indclass[0];
$sql$;
COMMENT ON FUNCTION autoembed._serves_searches IS
    'Whether a search can use an index on embeddings: HNSW, of all rows, for the cosine distance or for bits.';

CREATE OR REPLACE FUNCTION autoembed._vector_indexes(table_id regclass, embedding_column name)
    RETURNS SETOF pg_index
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT i.*
    FROM autoembed._indexes_on_vectors(table_id, embedding_column) AS i
    WHERE autoembed._serves_searches(i)
    ORDER BY i.indisvalid DESC;
$sql$;
COMMENT ON FUNCTION autoembed._vector_indexes IS
    'The indexes on the embeddings of a table or partition that searches can use, valid ones first.';

CREATE OR REPLACE FUNCTION autoembed._vector_index(table_id regclass, embedding_column name)
    RETURNS SETOF pg_index
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT i.* FROM autoembed._vector_indexes(table_id, embedding_column) AS i LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._vector_index IS
    'The index of a table or partition that searches use, a valid one first. No row if there is none.';

CREATE OR REPLACE FUNCTION autoembed._is_binary(index pg_index)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT o.opcname = 'bit_hamming_ops' FROM pg_opclass AS o WHERE o.oid = index.indclass[0];
$sql$;
COMMENT ON FUNCTION autoembed._is_binary IS 'Whether an index on embeddings has one bit for each dimension.';

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
        SELECT t.relid FROM autoembed._partition_tree(table_id) AS t WHERE t.isleaf UNION SELECT table_id
    ) AS r
    CROSS JOIN LATERAL autoembed._vector_indexes(r.relid, embedding_column) AS i
    JOIN pg_attribute AS a ON a.attrelid = i.indexrelid AND a.attnum = 1
    WHERE i.indisvalid
      AND autoembed._is_binary(i)
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

CREATE OR REPLACE FUNCTION autoembed._check_index(pipeline autoembed.pipeline, builds boolean)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _vectors_table CONSTANT regclass := coalesce(pipeline.embeddings_table, pipeline.table_id);
    _index record;
BEGIN
    SELECT k.* INTO _index FROM autoembed._index_key(pipeline) AS k;
    IF builds AND _index.problem IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = _index.problem,
            HINT = _index.hint;
    ELSIF _index.key IS NULL THEN
        RAISE WARNING USING MESSAGE = _index.problem, HINT = _index.hint;
    ELSIF builds AND NOT autoembed._cron_is_here() THEN
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('the index of %s.%I cannot be built: pg_cron is not installed in this database',
                             pipeline.table_id, pipeline.embedding_column),
            HINT = format('When the rows are embedded: CREATE INDEX CONCURRENTLY ON %s USING hnsw (%s);',
                          _vectors_table, _index.key);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_index IS
    'Tells what is in the way of an HNSW index on the embeddings of a pipeline. builds: it is to be built.';

CREATE OR REPLACE FUNCTION autoembed._replace_index(pipeline_id integer)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET row_security = on
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _vectors_table regclass;
    _void text;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = _replace_index.pipeline_id;
    _vectors_table := coalesce(_pipeline.embeddings_table, _pipeline.table_id);
    IF NOT _pipeline.binary_index AND NOT EXISTS (
        SELECT FROM autoembed._vector_index(_vectors_table, _pipeline.embedding_column) AS i
    ) THEN
        RETURN;
    END IF;
    _void := autoembed._check_attachable(_vectors_table, true);
    _void := autoembed._check_index(_pipeline, true);
    -- Nothing is scanned for it.
    INSERT INTO autoembed.backfill AS b (pipeline_id, condition, create_index)
    VALUES (_pipeline.id, 'false', true)
    ON CONFLICT ON CONSTRAINT backfill_pkey DO UPDATE SET create_index = true, index_problem = NULL;
    UPDATE autoembed.backfill AS b
    SET scanned_at = clock_timestamp()
    WHERE b.pipeline_id = _pipeline.id AND b.condition = 'false' AND b.scanned_at IS NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._replace_index IS
    'Has an HNSW index of the kind that a pipeline names built, if that is binary or there is one of the other kind.';

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
    _other regclass;
    _key record;
    _job record;
    -- In the order in which they are tried. Two may be taken, one of them by an index of the other kind.
    _names text[];
    _problem text;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    _vectors_table := coalesce(_pipeline.embeddings_table, _pipeline.table_id);
    SELECT ARRAY[
        autoembed._beginning(c.relname, 30) || '_' || autoembed._beginning(_pipeline.embedding_column, 25) || '_idx',
        format('autoembed_%s_idx', pipeline_id), format('autoembed_%s_other_idx', pipeline_id)
    ]
    INTO STRICT _names
    FROM pg_class AS c
    WHERE c.oid = _vectors_table;
    SELECT i.*
    INTO _index
    FROM autoembed._vector_indexes(_vectors_table, _pipeline.embedding_column) AS i
    WHERE autoembed._is_binary(i) = _pipeline.binary_index
    ORDER BY i.indisvalid DESC
    LIMIT 1;
    IF _index.indisvalid THEN
        PERFORM autoembed._unschedule('index-' || pipeline_id);
        -- One of the other kind, by a name that this function gives, has served searches meanwhile.
        FOR _other IN
            SELECT i.indexrelid
            FROM autoembed._vector_indexes(_vectors_table, _pipeline.embedding_column) AS i
            JOIN pg_class AS c ON c.oid = i.indexrelid AND c.relname = ANY (_names)
            WHERE autoembed._is_binary(i) <> _pipeline.binary_index
        LOOP
            BEGIN
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', _vectors_table);
                EXECUTE format('DROP INDEX %s', _other);
            EXCEPTION WHEN lock_not_available OR internal_error THEN
                RETURN false;
            END;
        END LOOP;
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
        -- No function can build an index concurrently.
        PERFORM autoembed._schedule_index(pipeline_id, format(
            'CREATE INDEX CONCURRENTLY IF NOT EXISTS %I ON %s USING hnsw (%s)', k.name, _vectors_table, _key.key
        ))
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        CROSS JOIN unnest(_names) WITH ORDINALITY AS k(name, number)
        WHERE c.oid = _vectors_table
          AND (to_regclass(format('%I.%I', n.nspname, k.name)) IS NULL OR k.number = cardinality(_names))
        ORDER BY k.number
        LIMIT 1;
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
