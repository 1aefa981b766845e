-- A pipeline takes another key when that of its table has changed.

CREATE OR REPLACE FUNCTION autoembed._rows_of(table_id oid)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- Rows of tables that inherit from it have keys of their own.
    SELECT CASE c.relkind WHEN 'r' THEN 'ONLY ' ELSE '' END || c.oid::regclass
    FROM pg_class AS c
    WHERE c.oid = table_id;
$sql$;
COMMENT ON FUNCTION autoembed._rows_of IS 'A table, as FROM names it, with its own rows and those of its partitions.';

CREATE OR REPLACE FUNCTION autoembed._may_take_key(pipeline autoembed.pipeline, key_columns name[])
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT pipeline.embeddings_table IS NULL
        OR NOT key_columns && '{chunk_number,chunk_start,chunk_end,digest,embedding}'
           -- The rows tell which old key each new one had, or a part of it is enough.
           AND (key_columns <@ pipeline.key_columns OR pipeline.key_columns <@ ARRAY(
               SELECT a.attname FROM pg_attribute AS a WHERE a.attrelid = pipeline.table_id AND NOT a.attisdropped
           ))
           AND EXISTS (
               SELECT FROM pg_class AS t
               JOIN pg_class AS e ON e.relowner = t.relowner AND e.oid = pipeline.embeddings_table
               WHERE t.oid = pipeline.table_id
           );
$sql$;
COMMENT ON FUNCTION autoembed._may_take_key IS
    'Whether a pipeline can go on with another key. Its embeddings table needs the old key to know the rows.';

CREATE OR REPLACE FUNCTION autoembed._take_key_beside(pipeline autoembed.pipeline, key_columns name[])
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _old_keys text;
    _same_key text;
    _new_keys text := (SELECT string_agg(quote_ident(k.name), ', ') FROM unnest(key_columns) AS k(name));
    _statement text;
    _void text;
BEGIN
    SELECT string_agg(quote_ident(k.name), ', '),
           string_agg(format('e.%1$I %2$s t.%1$I', k.name, autoembed._operator(pipeline.embeddings_table, k.name, 3)),
                      ' AND ')
    INTO _old_keys, _same_key
    FROM unnest(pipeline.key_columns) AS k(name);
    _void := autoembed._check_chunks_view(pipeline);
    _void := autoembed._drop_readers(pipeline.id, pipeline.embeddings_table, pipeline.table_id);
    FOR _statement IN
        SELECT s.statement
        FROM (
            -- The same names are those of other columns, which do not tell the rows.
            SELECT 0 AS step, format('TRUNCATE %s', pipeline.embeddings_table) AS statement
            WHERE key_columns = pipeline.key_columns
            UNION ALL
            SELECT 1, format(
                'ALTER TABLE %s ADD COLUMN %I %s%s', pipeline.embeddings_table, a.attname,
                format_type(a.atttypid, a.atttypmod),
                (SELECT format(' COLLATE %I.%I', n.nspname, l.collname)
                 FROM pg_collation AS l
                 JOIN pg_namespace AS n ON n.oid = l.collnamespace
                 WHERE l.oid = a.attcollation AND l.collname <> 'default')
            )
            FROM pg_attribute AS a
            WHERE a.attrelid = pipeline.table_id AND a.attname = ANY (key_columns)
              AND a.attname <> ALL (pipeline.key_columns)
            UNION ALL
            -- An old key of several rows tells nothing.
            SELECT 2, format(
                'UPDATE %s AS e SET %s '
                'FROM (SELECT *, count(*) OVER (PARTITION BY %s) AS "autoembed rows" FROM %s) AS t '
                'WHERE %s AND t."autoembed rows" = 1',
                pipeline.embeddings_table,
                string_agg(format('%1$I = t.%1$I', k.name), ', ') FILTER (WHERE k.name <> ALL (pipeline.key_columns)),
                _old_keys, autoembed._rows_of(pipeline.table_id), _same_key
            )
            FROM unnest(key_columns) AS k(name)
            HAVING NOT key_columns <@ pipeline.key_columns
            UNION ALL
            SELECT 3, format('DELETE FROM %s AS e WHERE num_nulls(%s) > 0', pipeline.embeddings_table, _new_keys)
            UNION ALL
            SELECT 4, format('ALTER TABLE %s DROP CONSTRAINT %I', pipeline.embeddings_table, c.conname)
            FROM pg_constraint AS c
            WHERE c.conrelid = pipeline.embeddings_table AND c.contype = 'p'
            UNION ALL
            SELECT 5, format('ALTER TABLE %s DROP COLUMN %I', pipeline.embeddings_table, k.name)
            FROM unnest(pipeline.key_columns) AS k(name)
            WHERE k.name <> ALL (key_columns)
            UNION ALL
            SELECT 6, format('ALTER TABLE %s ADD PRIMARY KEY (%s, chunk_number)', pipeline.embeddings_table, _new_keys)
        ) AS s
        ORDER BY s.step
    LOOP
        PERFORM autoembed._alter_as_owner(pipeline.embeddings_table, _statement);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._take_key_beside IS
    'Gives the embeddings table of a pipeline another key. Embeddings go whose row is not told by the old key.';

CREATE OR REPLACE FUNCTION autoembed._keys_of_rows(
    table_id oid,
    old_key text,
    new_key text,
    max_seconds double precision
)
    RETURNS SETOF jsonb
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- So many keys fit into the memory of a session.
    _part_rows CONSTANT bigint := 500000;
    _parts integer := 1 + coalesce(autoembed._estimated_rows(table_id), 0) / _part_rows;
    _answer record;
BEGIN
    FOR _part IN 0 .. _parts - 1 LOOP
        -- To plan a query calls functions of the owner, in expressions of indexes and statistics. To run it may reach
        -- foreign tables.
        SELECT a.* INTO _answer FROM autoembed._run_as_owner(table_id, format(
            'SELECT k.* FROM (SELECT %s AS old_key, min(%s COLLATE "C") AS new_key FROM %s AS t GROUP BY 1 '
            'HAVING count(*) = 1) AS k WHERE abs(mod(hashtextextended(k.old_key, 0), %s)) = %s',
            old_key, new_key, autoembed._rows_of(table_id), _parts, _part
        ), max_seconds) AS a;
        RETURN NEXT _answer.found;
        EXIT WHEN _answer.problem IS NOT NULL;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._keys_of_rows IS
    'The old and the new key of the rows of a table, in parts, where an old key is that of one row. NULL as the last '
    'part: the rest cannot be read.';

CREATE OR REPLACE FUNCTION autoembed._take_key(pipeline autoembed.pipeline, key_columns name[])
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    -- The settings with which lanes make keys, as in _output_settings().
    SET TimeZone = 'UTC'
    SET DateStyle = 'ISO, YMD'
    SET IntervalStyle = 'postgres'
    SET extra_float_digits = 1
    SET bytea_output = 'hex'
AS $plpgsql$
DECLARE
    _new autoembed.pipeline := pipeline;
    _part jsonb;
    _void text;
BEGIN
    -- Lanes may hold jobs with the old keys. These end with the old number.
    UPDATE autoembed.pipeline AS p SET table_id = 0 WHERE p.id = pipeline.id;
    IF pipeline.embeddings_table IS NOT NULL THEN
        _void := autoembed._take_key_beside(pipeline, key_columns);
    END IF;
    _new.key_columns := _take_key.key_columns;
    INSERT INTO autoembed.pipeline AS p (
        table_id, embedding_column, key_columns, content_columns, content_template, content_function,
        content_function_id, content_function_oid, condition, condition_columns, condition_objects, model,
        on_change, truncate, replicated, managed, paused, table_shape, built_from, text_config,
        ef_search, recall_target, recall, recall_measured_at, embeddings_table, chunking, chunk_size, chunk_overlap,
        chunk_function, chunk_function_oid, chunk_prefix, binary_index, former_chunking
    )
    SELECT (_new).table_id, (_new).embedding_column, (_new).key_columns, (_new).content_columns,
           (_new).content_template, (_new).content_function, (_new).content_function_id,
           (_new).content_function_oid, (_new).condition, (_new).condition_columns, (_new).condition_objects,
           (_new).model, (_new).on_change, (_new).truncate, (_new).replicated, (_new).managed, (_new).paused,
           (_new).table_shape, 'stopped', (_new).text_config, (_new).ef_search, (_new).recall_target,
           (_new).recall, (_new).recall_measured_at, (_new).embeddings_table, (_new).chunking, (_new).chunk_size,
           (_new).chunk_overlap, (_new).chunk_function, (_new).chunk_function_oid,
           (_new).chunk_prefix, (_new).binary_index, (_new).former_chunking
    RETURNING p.id INTO _new.id;
    -- The digests of the rows go along while the table has both keys.
    IF NOT EXISTS (
        SELECT FROM unnest(pipeline.key_columns) AS k(name)
        WHERE NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = pipeline.table_id AND a.attname = k.name AND NOT a.attisdropped
        )
    ) THEN
        -- A row whose digest stays behind is embedded again.
        FOR _part IN
            SELECT k.found
            FROM autoembed._keys_of_rows(
                pipeline.table_id, autoembed._key_expression(pipeline, 't'), autoembed._key_expression(_new, 't'), NULL
            ) AS k(found)
        LOOP
            INSERT INTO autoembed.embedded (
                pipeline_id, key, digest, truncated, vector_digest, embedded_at, replaced
            )
            SELECT _new.id, autoembed._short_key(k.new_key), e.digest, e.truncated, e.vector_digest, e.embedded_at,
                   e.replaced
            FROM jsonb_to_recordset(_part) AS k(old_key text, new_key text)
            JOIN autoembed.embedded AS e ON e.pipeline_id = pipeline.id AND e.key = autoembed._short_key(k.old_key);
        END LOOP;
    END IF;
    INSERT INTO autoembed.backfill (pipeline_id, create_index)
    SELECT _new.id, coalesce(bool_or(b.create_index), false)
    FROM autoembed.backfill AS b
    WHERE b.pipeline_id = pipeline.id;
    DELETE FROM autoembed.pipeline AS p WHERE p.id = pipeline.id;
    RETURN _new.id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._take_key IS
    'Replaces a pipeline by one with another key. Digests go along if the table still has the columns of the old key.';

CREATE OR REPLACE FUNCTION autoembed._forget_old_keys(pipeline autoembed.pipeline, max_seconds double precision)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    -- The settings with which lanes make keys, as in _output_settings().
    SET TimeZone = 'UTC'
    SET DateStyle = 'ISO, YMD'
    SET IntervalStyle = 'postgres'
    SET extra_float_digits = 1
    SET bytea_output = 'hex'
AS $plpgsql$
DECLARE
    _key text := autoembed._key_expression(pipeline, 't');
    _part jsonb;
    _present bigint[] := '{}'::bigint[];
BEGIN
    FOR _part IN
        SELECT k.found FROM autoembed._keys_of_rows(pipeline.table_id, _key, _key, max_seconds) AS k(found)
    LOOP
        IF _part IS NULL THEN
            -- A digest of no row does no harm.
            RETURN;
        END IF;
        _present := _present || ARRAY(
            SELECT hashtextextended(autoembed._short_key(k.old_key), 0)
            FROM jsonb_to_recordset(_part) AS k(old_key text)
        );
    END LOOP;
    DELETE FROM autoembed.embedded AS e
    WHERE e.pipeline_id = pipeline.id AND NOT EXISTS (
        SELECT FROM unnest(_present) AS k(hash) WHERE k.hash = hashtextextended(e.key, 0)
    );
    UPDATE autoembed.text_document AS d
    SET is_live = false
    WHERE d.pipeline_id = pipeline.id AND d.is_live AND NOT EXISTS (
        SELECT FROM autoembed.embedded AS e
        WHERE e.pipeline_id = pipeline.id AND e.key = autoembed._short_key(d.key)
    );
    IF pipeline.embeddings_table IS NOT NULL AND max_seconds IS NULL THEN
        PERFORM autoembed._alter_as_owner(pipeline.embeddings_table, (
            SELECT format('DELETE FROM %s AS e WHERE NOT EXISTS (SELECT FROM %s AS t WHERE %s)',
                          pipeline.embeddings_table, autoembed._rows_of(pipeline.table_id),
                          string_agg(format('e.%1$I %2$s t.%1$I', k.name,
                                            autoembed._operator(pipeline.embeddings_table, k.name, 3)), ' AND '))
            FROM unnest(pipeline.key_columns) AS k(name)
        ));
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_old_keys IS
    'Deletes the digests, the indexed texts and the embeddings of rows whose key is written in another way since the '
    'type of a key column has changed.';
