-- The checks that tell whether a pipeline can be embedded, and if not, why.

CREATE OR REPLACE FUNCTION autoembed._continue_advice(pipeline autoembed.pipeline, missing name)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _is_one_of_several CONSTANT boolean := (
        SELECT count(*) > 1 FROM autoembed.pipeline AS p WHERE p.table_id = pipeline.table_id
    );
    _table CONSTANT text := quote_literal(
        CASE WHEN _is_one_of_several THEN coalesce(pipeline.embeddings_table, pipeline.table_id)
             ELSE pipeline.table_id END
    );
    _column CONSTANT text := CASE
        WHEN _is_one_of_several AND pipeline.embeddings_table IS NULL THEN
            format(', embedding_column => %L', pipeline.embedding_column)
    END;
    -- A content may have lost the column that others name, too.
    _also CONSTANT text := concat(
        CASE WHEN missing = ANY (autoembed._columns_of(autoembed._prefix_of(pipeline))) THEN
            ', chunk_prefix => '''''
        END,
        CASE WHEN missing::text IN (SELECT c.value FROM jsonb_each_text(pipeline.condition_columns) AS c) THEN
            ', condition => '''''
        END
    );
    _left name[] := ARRAY(
        SELECT c.name
        FROM unnest(pipeline.content_columns) WITH ORDINALITY AS c(name, position)
        JOIN pg_attribute AS a ON a.attrelid = pipeline.table_id AND a.attname = c.name AND NOT a.attisdropped
        ORDER BY c.position
    );
BEGIN
    IF missing IS NULL AND num_nonnulls(pipeline.condition, pipeline.content_function, pipeline.chunk_function) > 0 THEN
        RETURN 'Give ' || concat_ws(
            '; or give ',
            CASE WHEN pipeline.condition IS NOT NULL THEN
                format('the condition again: SELECT autoembed.alter_pipeline(%s%s, condition => …)', _table, _column)
            END,
            CASE WHEN pipeline.content_function IS NOT NULL THEN
                format('the function another body: CREATE OR REPLACE FUNCTION %s(%s) RETURNS text …',
                       pipeline.content_function_id, pipeline.table_id)
            END,
            CASE WHEN pipeline.chunk_function IS NOT NULL THEN
                format('the function another body: CREATE OR REPLACE FUNCTION %s(text) RETURNS SETOF text …',
                       pipeline.chunk_function)
            END
        ) || '; or undo the change that it does not fit.';
    ELSIF missing IS NULL THEN
        RETURN 'Undo the change that has caused it. Lanes go on within ten seconds.';
    ELSIF missing = ANY (pipeline.key_columns) AND pipeline.embeddings_table IS NOT NULL THEN
        RETURN format('Attach the table by its new key, which embeds all rows again: '
                      'SELECT autoembed.disable(%s%s, drop => true); SELECT autoembed.enable(%L, …);',
                      _table, _column, pipeline.table_id);
    ELSIF missing = ANY (pipeline.key_columns) THEN
        RETURN format('Give the table a key, and its pipeline goes on with it: '
                      'ALTER TABLE %s ADD COLUMN %I bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY;',
                      pipeline.table_id, missing);
    ELSIF missing <> ALL (autoembed._columns_of(pipeline))
          AND missing = ANY (autoembed._columns_of(autoembed._prefix_of(pipeline))) THEN
        RETURN format('Go on without it: SELECT autoembed.alter_pipeline(%s%s%s); or add the column again.',
                      _table, _column, _also);
    ELSIF missing <> ALL (autoembed._columns_of(pipeline)) THEN
        RETURN format('Embed all rows: SELECT autoembed.alter_pipeline(%s%s, condition => ''''); or give another '
                      'condition, or add the column again.', _table, _column);
    ELSIF _left <> '{}' THEN
        RETURN format('Go on without it: SELECT autoembed.alter_pipeline(%s%s, content_columns => %L%s); or add the '
                      'column again.', _table, _column, _left, _also);
    END IF;
    RETURN format('Name another content: SELECT autoembed.alter_pipeline(%s%s, %s => …%s); or add the column again.',
                  _table, _column, CASE
                      WHEN pipeline.content_template IS NULL THEN 'content_columns'
                      ELSE 'content_template'
                  END, _also);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._continue_advice IS
    'The advice on how a pipeline goes on that has lost a column; missing NULL: whose texts cannot be read.';

CREATE OR REPLACE FUNCTION autoembed._without_replica_identity(table_id regclass)
    RETURNS regclass
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Most databases publish nothing. Each claim comes by here.
    IF NOT EXISTS (SELECT FROM pg_publication AS p WHERE p.pubupdate) THEN
        RETURN NULL;
    END IF;
    RETURN (
        SELECT c.oid
        FROM (SELECT t.relid FROM autoembed._partition_tree(table_id) AS t WHERE t.isleaf UNION SELECT table_id) AS r
        JOIN pg_class AS c ON c.oid = r.relid AND c.relkind = 'r' AND c.relpersistence = 'p'
        WHERE c.relreplident <> 'f'
          AND NOT EXISTS (
              SELECT FROM pg_index AS i
              WHERE i.indrelid = c.oid
                AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END
          )
          AND EXISTS (
              SELECT FROM (SELECT a.relid FROM pg_partition_ancestors(c.oid) AS a UNION SELECT c.oid) AS a
              JOIN pg_class AS o ON o.oid = a.relid
              JOIN pg_publication AS p
                  ON p.pubupdate
                 AND (p.puballtables
                      OR EXISTS (
                          SELECT FROM pg_publication_rel AS l WHERE l.prpubid = p.oid AND l.prrelid = o.oid
                      )
                      OR EXISTS (
                          SELECT FROM pg_publication_namespace AS n
                          WHERE n.pnpubid = p.oid AND n.pnnspid = o.relnamespace
                      ))
          )
        LIMIT 1
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._without_replica_identity IS
    'The table, or its partition, that a publication of updates has and that has no replica identity. PostgreSQL '
    'refuses each UPDATE of such a table. NULL if there is none.';

CREATE OR REPLACE FUNCTION autoembed._check_table(
    pipeline autoembed.pipeline,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table pg_class;
    _root regclass;
    _missing name;
    _needed CONSTANT name[] := autoembed._needed_columns(pipeline);
BEGIN
    SELECT c.* INTO _table FROM pg_class AS c WHERE c.oid = pipeline.table_id;
    IF NOT FOUND THEN
        problem := format('the table with OID %s no longer exists', pipeline.table_id::oid);
        hint := 'The next lane ends its pipeline, or SELECT autoembed.process().';
        errcode := 'undefined_table';
        RETURN;
    END IF;
    IF _table.relkind NOT IN ('r', 'p') THEN
        problem := format('%s is not a table', pipeline.table_id);
        hint := 'Only tables and partitioned tables hold embeddings.';
        errcode := 'wrong_object_type';
        RETURN;
    END IF;
    IF pipeline.managed AND cardinality(pipeline.key_columns) = 0 THEN
        problem := format('table %s has no key to find its rows by', pipeline.table_id);
        hint := format('Add a primary key, or a unique index on columns that are NOT NULL: '
                       'ALTER TABLE %s ADD COLUMN id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY.',
                       pipeline.table_id);
        errcode := 'object_not_in_prerequisite_state';
        RETURN;
    END IF;
    IF _table.relispartition THEN
        SELECT p.table_id INTO _root
        FROM pg_partition_ancestors(pipeline.table_id) AS a(table_id)
        JOIN autoembed.pipeline AS p USING (table_id)
        WHERE p.table_id <> pipeline.table_id AND p.embedding_column = pipeline.embedding_column
          AND num_nonnulls(p.embeddings_table, pipeline.embeddings_table) = 0
        LIMIT 1;
        IF FOUND THEN
            problem := format('table %s is a partition of %s, whose own pipeline embeds this column',
                              pipeline.table_id, _root);
            hint := format('Detach the partition from autoembed: SELECT autoembed.disable(%L, %L);',
                           pipeline.table_id, pipeline.embedding_column);
            errcode := 'duplicate_object';
            RETURN;
        END IF;
    END IF;
    -- EXCEPT compares them by a hash. A join would compare each with each.
    SELECT k.name INTO _missing
    FROM (
        SELECT unnest(_needed)
        EXCEPT
        SELECT a.attname FROM pg_attribute AS a WHERE a.attrelid = _table.oid AND a.attnum > 0 AND NOT a.attisdropped
    ) AS k(name)
    ORDER BY array_position(_needed, k.name)
    LIMIT 1;
    IF FOUND THEN
        problem := format('table %s has no column "%s"', pipeline.table_id, _missing);
        hint := CASE
            WHEN pipeline.built_from = 'stopped' THEN autoembed._continue_advice(pipeline, _missing)
            WHEN pipeline.managed THEN
                (SELECT 'Its columns are: ' || string_agg(a.attname, ', ' ORDER BY a.attnum) || '.'
                 FROM pg_attribute AS a
                 WHERE a.attrelid = _table.oid AND a.attnum > 0 AND NOT a.attisdropped
                   AND a.attname <> pipeline.embedding_column)
            ELSE 'queue_embeddings() finds rows by a primary key column called id.'
        END;
        errcode := 'undefined_column';
        RETURN;
    END IF;

    -- A parallel restore may bring the key at the same time as the pipeline, and neither sees the other.
    IF pipeline.managed AND pipeline.table_shape -> 'key' = 'false'
       AND NOT autoembed._is_key(pipeline.table_id, pipeline.key_columns) THEN
        problem := format('column %s of table %s is no longer a key',
                          array_to_string(pipeline.key_columns, ', '), pipeline.table_id);
        hint := format('Make it one again: ALTER TABLE %s ADD PRIMARY KEY (%s); or give the table another key.',
                       pipeline.table_id,
                       (SELECT string_agg(quote_ident(k.name), ', ') FROM unnest(pipeline.key_columns) AS k(name)));
        errcode := 'waits';
        RETURN;
    END IF;

    IF _table.relforcerowsecurity AND _table.relrowsecurity
       AND NOT (SELECT r.rolsuper OR r.rolbypassrls FROM pg_roles AS r WHERE r.oid = _table.relowner)
       AND (SELECT NOT coalesce(
                       bool_or(p.polpermissive AND p.polcmd = '*' AND pg_get_expr(p.polqual, p.polrelid) = 'true'),
                       false
                   )
                   OR NOT bool_and(p.polpermissive)
            FROM pg_policy AS p
            WHERE p.polrelid = _table.oid
              -- The policies that bind the owner are those for PUBLIC, or for a role whose rights the owner has.
              AND EXISTS (
                  SELECT FROM unnest(p.polroles) AS r(id)
                  WHERE r.id = 0 OR pg_has_role(_table.relowner, r.id, 'USAGE')
              )) THEN
        problem := format('row level security is forced on the owner of table %s and may hide rows from the owner',
                          pipeline.table_id);
        hint := format('Let the owner see all rows: CREATE POLICY embeddings ON %s TO %I USING (true), without '
                       'restrictive policies; or ALTER TABLE %s NO FORCE ROW LEVEL SECURITY.',
                       pipeline.table_id, pg_get_userbyid(_table.relowner), pipeline.table_id);
        errcode := 'waits';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_table IS
    'The reason why a pipeline cannot read the rows of its table, and the cure, as _check_pipeline() returns them.';

CREATE OR REPLACE FUNCTION autoembed._check_embeddings_table(
    pipeline autoembed.pipeline,
    OUT problem text,
    OUT hint text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _key CONSTANT name[] := pipeline.key_columns || 'chunk_number'::name;
    _columns CONSTANT name[] := _key || '{chunk_start,chunk_end,digest}'::name[];
    _column name;
BEGIN
    IF pipeline.embeddings_table IS NULL THEN
        RETURN;
    END IF;
    _column := (
        SELECT n.name
        FROM unnest(_columns || pipeline.embedding_column) WITH ORDINALITY AS n(name, position)
        WHERE NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = pipeline.embeddings_table AND a.attname = n.name AND a.attnum > 0 AND NOT a.attisdropped
        )
        ORDER BY n.position
        LIMIT 1
    );
    IF _column IS NOT NULL THEN
        problem := format('table %s has no column "%s"', pipeline.embeddings_table, _column);
        hint := format('Give the column its name again; or attach the table again: SELECT autoembed.disable(%L, '
                       'drop => true); then SELECT autoembed.enable(%L, …).', pipeline.table_id, pipeline.table_id);
        RETURN;
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_index AS i
        WHERE i.indrelid = pipeline.embeddings_table AND i.indisunique AND i.indisvalid AND i.indimmediate
          AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indnkeyatts = cardinality(_key)
          AND NOT EXISTS (
              SELECT FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS n(number, position)
              JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = n.number
              WHERE n.position <= i.indnkeyatts AND a.attname <> ALL (_key)
          )
    ) THEN
        problem := format('table %s has lost its primary key', pipeline.embeddings_table);
        hint := format('Add it: ALTER TABLE %s ADD PRIMARY KEY (%s);', pipeline.embeddings_table,
                       (SELECT string_agg(quote_ident(k.name), ', ') FROM unnest(_key) AS k(name)));
        RETURN;
    END IF;
    SELECT a.attname INTO _column
    FROM pg_attribute AS a
    WHERE a.attrelid = pipeline.embeddings_table AND a.attnum > 0 AND NOT a.attisdropped AND a.attnotnull
      AND NOT a.atthasdef AND a.attidentity = '' AND a.attname <> ALL (_columns || pipeline.embedding_column)
    LIMIT 1;
    IF FOUND THEN
        problem := format('column "%s" of table %s is NOT NULL, and has no default', _column,
                          pipeline.embeddings_table);
        hint := format('Give it a default, or: ALTER TABLE %s ALTER COLUMN %I DROP NOT NULL;',
                       pipeline.embeddings_table, _column);
        RETURN;
    END IF;
    SELECT format('role %I, the owner of table %s, has no right to %s', r.name, c.oid::regclass, m.rights),
           format('GRANT %s ON %s TO %I;', m.rights, c.oid::regclass, r.name)
    INTO problem, hint
    FROM pg_class AS c
    CROSS JOIN pg_get_userbyid(c.relowner) AS r(name)
    CROSS JOIN LATERAL (
        SELECT string_agg(p.privilege, ', ') AS rights
        FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS p(privilege)
        WHERE NOT has_table_privilege(c.relowner, c.oid, p.privilege)
    ) AS m
    WHERE c.oid = pipeline.embeddings_table AND m.rights IS NOT NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_embeddings_table IS
    'The reason why no embedding can be written into the embeddings table of a pipeline, and the cure: somebody has '
    'altered it, or revoked rights. NULLs if there is none.';

CREATE OR REPLACE FUNCTION autoembed._check_embedding_column(
    pipeline autoembed.pipeline,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _owner oid := (SELECT c.relowner FROM pg_class AS c WHERE c.oid = pipeline.table_id);
    _vectors_table regclass := coalesce(pipeline.embeddings_table, pipeline.table_id);
    _model_name text := coalesce(pipeline.model, autoembed._default_model());
    _model autoembed.model;
    _type text;
    _is_vector boolean;
    _generated boolean;
BEGIN
    IF pipeline.embeddings_table IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_class AS c
        WHERE c.oid = pipeline.embeddings_table AND c.relkind = 'r' AND c.relowner = _owner
    ) THEN
        problem := CASE
            WHEN EXISTS (SELECT FROM pg_class AS c WHERE c.oid = pipeline.embeddings_table) THEN
                format('the embeddings table %s has another owner than table %s',
                       pipeline.embeddings_table, pipeline.table_id)
            ELSE format('the embeddings table of table %s was dropped', pipeline.table_id)
        END;
        hint := CASE
            WHEN EXISTS (SELECT FROM pg_class AS c WHERE c.oid = pipeline.embeddings_table AND c.relkind = 'r') THEN
                format('Give it back: ALTER TABLE %s OWNER TO %I;',
                       pipeline.embeddings_table, pg_get_userbyid(_owner))
            ELSE
                format('Attach the table again: SELECT autoembed.disable(%1$L); '
                       'then SELECT autoembed.enable(%1$L, …).', pipeline.table_id)
        END;
        errcode := 'waits';
        RETURN;
    END IF;
    IF EXISTS (
        SELECT FROM pg_subscription_rel AS r
        JOIN pg_subscription AS s ON s.oid = r.srsubid AND s.subenabled
        WHERE r.srrelid = pipeline.embeddings_table
    ) THEN
        -- The subscription would stop at the first embedding that a lane has written before it.
        problem := format('a subscription writes the embeddings table %s, too', pipeline.embeddings_table);
        hint := format('Publish the tables of the application by their names, not their schema: ALTER PUBLICATION … '
                       'at the publisher; then ALTER SUBSCRIPTION … REFRESH PUBLICATION; '
                       'SELECT autoembed.resync(%L).', pipeline.table_id);
        errcode := 'waits';
        RETURN;
    END IF;
    SELECT c.* INTO problem, hint FROM autoembed._check_embeddings_table(pipeline) AS c;
    IF problem IS NOT NULL THEN
        errcode := 'waits';
        RETURN;
    END IF;

    SELECT m.* INTO _model FROM autoembed.model AS m WHERE m.name = _model_name;
    IF NOT FOUND THEN
        problem := format('model "%s" does not exist', _model_name);
        hint := 'Create it with autoembed.create_model().';
        errcode := 'undefined_object';
        RETURN;
    ELSIF _model.dimensions IS NULL THEN
        problem := format('model "%s" reranks, and makes no embeddings', _model_name);
        hint := 'Name a model that autoembed.create_model() has made.';
        errcode := 'wrong_object_type';
        RETURN;
    END IF;

    SELECT coalesce(v.name, format_type(a.atttypid, a.atttypmod)), v.name IS NOT NULL, a.attgenerated <> ''
    INTO _type, _is_vector, _generated
    FROM pg_attribute AS a
    LEFT JOIN autoembed._vector_types() AS v ON v.id = a.atttypid
    WHERE a.attrelid = _vectors_table AND a.attname = pipeline.embedding_column AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        problem := format('table %s has no column "%s"', _vectors_table, pipeline.embedding_column);
        hint := format('Add it: ALTER TABLE %s ADD COLUMN %I @extschema:vector@.halfvec(%s);',
                       _vectors_table, pipeline.embedding_column, _model.dimensions);
        errcode := 'undefined_column';
        RETURN;
    END IF;
    IF NOT _is_vector OR _generated THEN
        problem := format('column "%s" of table %s is %s', pipeline.embedding_column, _vectors_table,
                          CASE WHEN _generated THEN 'a generated column' ELSE 'of type ' || _type END);
        hint := 'An embedding column is of type halfvec or vector.';
        errcode := 'datatype_mismatch';
        RETURN;
    END IF;
    IF pipeline.embeddings_table IS NULL AND pipeline.embedding_column = ANY (autoembed._columns_of(pipeline)) THEN
        problem := format('column "%s" cannot be its own content', pipeline.embedding_column);
        hint := 'Leave it out of the content.';
        errcode := 'invalid_parameter_value';
        RETURN;
    END IF;

    SELECT format('rule "%s" of table %s stands in the way of the embeddings', r.rulename, _vectors_table),
           format('Drop it: DROP RULE %I ON %s;', r.rulename, _vectors_table),
           'wrong_object_type'
    INTO problem, hint, errcode
    FROM pg_rewrite AS r
    -- 2, 3 and 4 are UPDATE, INSERT and DELETE.
    WHERE r.ev_class = _vectors_table AND r.ev_enabled <> 'D'
      AND (r.ev_type = '2' OR pipeline.embeddings_table IS NOT NULL AND r.ev_type IN ('3', '4'))
    ORDER BY r.rulename
    LIMIT 1;
    IF problem IS NOT NULL THEN
        hint := hint || CASE
            WHEN pipeline.embeddings_table IS NULL THEN
                ' Or attach the table without an embedding column: embeddings beside the rows need no UPDATE of it.'
            ELSE ''
        END;
        RETURN;
    END IF;
    IF autoembed._clears(pipeline) AND EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = pipeline.table_id AND a.attname = pipeline.embedding_column
          AND a.attnotnull AND NOT a.attisdropped
    ) THEN
        problem := format('column "%s" of table %s is NOT NULL and cannot be cleared',
                          pipeline.embedding_column, pipeline.table_id);
        hint := 'Use on_change => ''keep'', or drop the constraint.';
        errcode := 'invalid_parameter_value';
        RETURN;
    END IF;
    -- A BEFORE trigger sees no generated column. A content function may read any column.
    IF autoembed._clears(pipeline) AND EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = pipeline.table_id AND a.attgenerated <> '' AND NOT a.attisdropped
          AND (
              pipeline.content_function IS NOT NULL
              OR a.attname = ANY ((SELECT autoembed._needed_columns(pipeline))::name[])
          )
    ) THEN
        problem := format('on_change => ''clear'' does not work with the generated columns of table %s',
                          pipeline.table_id);
        hint := 'Use on_change => ''keep'', or columns that are not generated.';
        errcode := 'feature_not_supported';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_embedding_column IS
    'The reason why a pipeline cannot write its vectors, and the cure, as _check_pipeline() returns them.';

CREATE OR REPLACE FUNCTION autoembed._check_function_owner(
    function oid,
    table_id regclass,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- The function runs as the table's owner, so its own owner must have that role's rights already.
    -- A role that may SET ROLE to the table's owner has them. A membership alone may give none.
    SELECT format('function %s belongs to %I, which lacks the rights of %I, the owner of table %s',
                  p.oid::regprocedure, pg_get_userbyid(p.proowner), pg_get_userbyid(c.relowner), table_id),
           format('Make it the table owner''s: ALTER FUNCTION %s OWNER TO %I.',
                  p.oid::regprocedure, pg_get_userbyid(c.relowner)),
           'insufficient_privilege'
    INTO problem, hint, errcode
    FROM pg_proc AS p
    JOIN pg_class AS c ON c.oid = table_id AND NOT pg_has_role(p.proowner, c.relowner, 'SET')
    WHERE p.oid = function;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_function_owner IS
    'The reason why a function may not run as the owner of a table, and the cure. NULLs if it may.';

CREATE OR REPLACE FUNCTION autoembed._check_content_function(
    pipeline autoembed.pipeline,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _function pg_proc;
    -- The name that the owner gave, unless it was renamed since.
    _name CONSTANT text := CASE
        WHEN pipeline.content_function_id LIKE '%.' || pipeline.content_function THEN pipeline.content_function
        ELSE coalesce(pipeline.content_function_id, pipeline.content_function)
    END;
BEGIN
    IF pipeline.content_function IS NULL THEN
        RETURN;
    END IF;
    SELECT p.* INTO _function FROM pg_proc AS p WHERE p.oid = autoembed._content_function_of(pipeline);
    IF NOT FOUND THEN
        problem := format('there is no function "%s" of one row of %s', _name, pipeline.table_id);
        hint := format('Create it: CREATE FUNCTION %s(%s) RETURNS text.', _name, pipeline.table_id);
        errcode := 'undefined_function';
        RETURN;
    END IF;
    IF (SELECT t.typcategory FROM pg_type AS t WHERE t.oid = _function.prorettype) <> 'S' THEN
        problem := format('function %s returns %s',
                          _function.oid::regprocedure, format_type(_function.prorettype, NULL));
        hint := 'A content function returns text.';
        errcode := 'datatype_mismatch';
        RETURN;
    END IF;
    SELECT c.* INTO problem, hint, errcode FROM autoembed._check_function_owner(_function.oid, pipeline.table_id) AS c;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_content_function IS
    'The reason why a pipeline cannot call its content function, and the cure, as _check_pipeline() returns them.';

CREATE OR REPLACE FUNCTION autoembed._check_chunk_function(
    pipeline autoembed.pipeline,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _function pg_proc;
BEGIN
    IF pipeline.chunk_function IS NULL THEN
        RETURN;
    END IF;
    SELECT p.* INTO _function FROM pg_proc AS p WHERE p.oid = autoembed._chunk_function_of(pipeline);
    IF NOT FOUND OR (SELECT t.typcategory FROM pg_type AS t WHERE t.oid = _function.prorettype) <> 'S' THEN
        problem := format('chunking "%s" is not known, and there is no such function of a text that returns texts',
                          pipeline.chunk_function);
        hint := format('It is structure, tokens, none, or a function: CREATE FUNCTION %s(text) RETURNS SETOF text.',
                       pipeline.chunk_function);
        errcode := 'undefined_function';
        RETURN;
    END IF;
    SELECT c.* INTO problem, hint, errcode FROM autoembed._check_function_owner(_function.oid, pipeline.table_id) AS c;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_chunk_function IS
    'The reason why a pipeline cannot call the function that cuts its texts, and the cure, as _check_pipeline() '
    'returns them.';

CREATE OR REPLACE FUNCTION autoembed._runs_owners_code(pipeline_id integer, writes boolean)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT num_nonnulls(p.content_function, p.condition) > 0
        OR t.relforcerowsecurity
        OR EXISTS (
            SELECT FROM unnest(autoembed._needed_columns(p)) AS c(name)
            JOIN pg_attribute AS a ON a.attrelid = p.table_id AND a.attname = c.name
            JOIN pg_type AS y ON y.oid = a.atttypid
            WHERE y.typnamespace <> 'pg_catalog'::regnamespace
        )
        OR EXISTS (
            SELECT FROM unnest(p.key_columns) AS k(name)
            WHERE autoembed._operator(p.table_id, k.name, 3) NOT IN ('OPERATOR(pg_catalog.=)', '=')
        )
        OR writes AND (
            -- A write to the table itself meets its triggers, constraints and indexes.
            p.embeddings_table IS NULL
            OR EXISTS (
                SELECT FROM pg_class AS e
                WHERE e.oid = p.embeddings_table AND (e.relhasrules OR e.relforcerowsecurity)
            )
            OR EXISTS (
                SELECT FROM pg_trigger AS g
                WHERE g.tgrelid = p.embeddings_table
                  AND g.tgfoid IS DISTINCT FROM to_regproc('autoembed._watch_' || p.id)
            )
            OR EXISTS (
                SELECT FROM pg_constraint AS c WHERE c.conrelid = p.embeddings_table AND c.contype NOT IN ('p', 'n')
            )
            OR EXISTS (SELECT FROM pg_attrdef AS d WHERE d.adrelid = p.embeddings_table)
            OR EXISTS (
                SELECT FROM pg_index AS i
                WHERE i.indrelid = p.embeddings_table AND num_nonnulls(i.indpred, i.indexprs) > 0
            )
        )
    FROM autoembed.pipeline AS p
    JOIN pg_class AS t ON t.oid = p.table_id
    WHERE p.id = pipeline_id;
$sql$;
COMMENT ON FUNCTION autoembed._runs_owners_code IS
    'Whether code of the owner may run when texts of a pipeline are read, or its embeddings are written.';

CREATE OR REPLACE FUNCTION autoembed._check_vector_rights(
    role oid,
    type oid,
    names boolean,
    OUT problem text,
    OUT hint text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _type record;
    _missing text;
BEGIN
    SELECT t.typnamespace, t.typnamespace::regnamespace AS schema, t.typsend INTO _type
    FROM pg_type AS t
    WHERE t.oid = type;
    IF names AND NOT has_schema_privilege(role, _type.typnamespace, 'USAGE') THEN
        problem := format('role %I has no right to use schema %s, which has the types of pgvector',
                          pg_get_userbyid(role), _type.schema);
        hint := format('GRANT USAGE ON SCHEMA %s TO %I;', _type.schema, pg_get_userbyid(role));
        RETURN;
    END IF;
    _missing := (
        SELECT string_agg(f.id::regprocedure::text, ', ' ORDER BY f.id)
        FROM (
            SELECT c.castfunc::oid AS id FROM pg_cast AS c WHERE c.castsource = type AND c.castfunc <> 0
            UNION ALL
            SELECT o.oprcode::oid FROM pg_operator AS o
            WHERE o.oprname = '<=>' AND o.oprleft = type AND o.oprright = type
            UNION ALL
            SELECT p.oid FROM pg_proc AS p
            WHERE p.proname = 'binary_quantize' AND p.proargtypes = ARRAY[type]::oidvector
              AND p.pronamespace = _type.typnamespace
            UNION ALL
            SELECT _type.typsend::oid
        ) AS f
        WHERE NOT has_function_privilege(role, f.id, 'EXECUTE')
    );
    IF _missing IS NOT NULL THEN
        problem := format('role %I has no right to execute functions of pgvector: %s', pg_get_userbyid(role), _missing);
        -- Everybody has it by default, and readers need it, too.
        hint := format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC;', _missing);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_vector_rights IS
    'The reason why a role can write or compare no vectors of a type, and the cure. NULLs if there is none. names: '
    'whether the role''s statements name functions of the type.';

CREATE OR REPLACE FUNCTION autoembed._refuse_without_vectors(
    table_name regclass,
    embedding_column name,
    caller name
)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _check record;
BEGIN
    FOR _check IN
        SELECT c.*
        FROM autoembed._vector_types() AS v
        JOIN pg_class AS t ON t.oid = table_name
        LEFT JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attname = embedding_column AND NOT a.attisdropped
        JOIN pg_roles AS r ON r.oid = t.relowner OR r.rolname = caller
        CROSS JOIN LATERAL (
            SELECT k.* FROM autoembed._check_vector_rights(
                r.oid, v.id, r.rolname = caller OR embedding_column IS NOT NULL
            ) AS k
            UNION ALL
            -- The caller makes a column of it.
            SELECT format('role %I has no right to use type %s', caller, v.id::regtype),
                   format('GRANT USAGE ON TYPE %s TO %I;', v.id::regtype, caller)
            WHERE r.rolname = caller AND a.attname IS NULL AND NOT has_type_privilege(r.oid, v.id, 'USAGE')
        ) AS c
        -- A column of another type is refused for that.
        WHERE CASE WHEN a.attname IS NULL THEN v.name = 'halfvec' ELSE v.id = a.atttypid END AND c.problem IS NOT NULL
        LIMIT 1
    LOOP
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege', MESSAGE = _check.problem, HINT = _check.hint;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._refuse_without_vectors IS
    'Fails if the caller, or the owner of a table, lacks the rights to pgvector that embeddings of the table need.';

CREATE OR REPLACE FUNCTION autoembed._rights_problems(pipeline autoembed.pipeline)
    RETURNS TABLE (problem text, cure text)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT 'other roles may call ' || string_agg(f.function::text, ', '),
           string_agg(format('REVOKE ALL ON FUNCTION %s FROM %s;', f.function, f.roles), ' ')
    FROM autoembed._open_functions(pipeline.id) AS f
    HAVING count(*) > 0
    UNION ALL
    SELECT format('table %s has no row level security, so roles that may read it see all embeddings', c.oid::regclass),
           format('SELECT autoembed.resync(%L);', pipeline.table_id)
    FROM pg_class AS c
    WHERE c.oid = pipeline.embeddings_table AND c.relkind = 'r' AND NOT c.relrowsecurity
    UNION ALL
    SELECT format('table %s has no policy autoembed_readers, so no other role than its owner finds embeddings',
                  pipeline.embeddings_table),
           format('SELECT autoembed.resync(%L);', pipeline.table_id)
    WHERE EXISTS (SELECT FROM pg_class AS c WHERE c.oid = pipeline.embeddings_table AND c.relkind = 'r')
      AND NOT EXISTS (
          SELECT FROM pg_policy AS o
          WHERE o.polrelid = pipeline.embeddings_table AND o.polname = 'autoembed_readers'
            AND autoembed._pipeline_of_policy(o.oid) = pipeline.id
      )
    UNION ALL
    SELECT u.problem, u.cure FROM autoembed._unshared(ARRAY[pipeline.id]) AS u;
$sql$;
COMMENT ON FUNCTION autoembed._rights_problems IS
    'Rights to a pipeline''s functions and embeddings that other roles have and must not, or need and lack, and the '
    'SQL that mends it.';

CREATE OR REPLACE FUNCTION autoembed._check_pipeline(
    pipeline autoembed.pipeline,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _vectors_table regclass := coalesce(pipeline.embeddings_table, pipeline.table_id);
    _unpublished regclass;
    _model autoembed.model;
    _type text;
    _type_dimensions integer;
BEGIN
    SELECT c.* INTO problem, hint, errcode FROM autoembed._check_table(pipeline) AS c;
    IF problem IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT c.* INTO problem, hint, errcode FROM autoembed._check_embedding_column(pipeline) AS c;
    IF problem IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT c.* INTO problem, hint, errcode FROM autoembed._check_content_function(pipeline) AS c;
    IF problem IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT c.* INTO problem, hint, errcode FROM autoembed._check_chunk_function(pipeline) AS c;
    IF problem IS NOT NULL THEN
        RETURN;
    END IF;

    SELECT format('role %I, the owner of table %s, has no right to use its schema', r.name, c.oid::regclass),
           format('GRANT USAGE ON SCHEMA %s TO %I.', c.relnamespace::regnamespace, r.name),
           'waits'
    INTO problem, hint, errcode
    FROM pg_class AS c
    CROSS JOIN pg_get_userbyid(c.relowner) AS r(name)
    WHERE c.oid = pipeline.table_id AND NOT has_schema_privilege(c.relowner, c.relnamespace, 'USAGE');
    IF problem IS NOT NULL THEN
        RETURN;
    END IF;

    SELECT c.* INTO problem, hint
    FROM pg_class AS t
    JOIN pg_attribute AS a ON a.attrelid = _vectors_table AND a.attname = pipeline.embedding_column
    CROSS JOIN LATERAL autoembed._check_vector_rights(
        t.relowner, a.atttypid, pipeline.embeddings_table IS NULL
    ) AS c
    WHERE t.oid = pipeline.table_id;
    IF problem IS NOT NULL THEN
        errcode := 'waits';
        RETURN;
    END IF;

    _unpublished := autoembed._without_replica_identity(_vectors_table);
    IF _unpublished IS NOT NULL THEN
        problem := format('table %s is published without a replica identity, so none of its rows can be updated',
                          _unpublished);
        hint := format('Give it a primary key, or name another index: ALTER TABLE %s REPLICA IDENTITY USING INDEX ….',
                       _unpublished);
        errcode := 'waits';
        RETURN;
    END IF;

    problem := autoembed._condition_problem(pipeline.table_id, pipeline.condition_objects);
    IF problem IS NOT NULL THEN
        hint := autoembed._continue_advice(pipeline, NULL);
        errcode := 'waits';
        RETURN;
    END IF;

    IF pipeline.plan_problem IS NOT NULL THEN
        problem := format('the texts of table %s cannot be read: %s', pipeline.table_id, pipeline.plan_problem);
        hint := autoembed._continue_advice(pipeline, NULL);
        errcode := 'waits';
        RETURN;
    END IF;

    SELECT m.* INTO _model
    FROM autoembed.model AS m
    WHERE m.name = coalesce(pipeline.model, autoembed._default_model());
    SELECT v.name, a.atttypmod INTO _type, _type_dimensions
    FROM pg_attribute AS a
    JOIN autoembed._vector_types() AS v ON v.id = a.atttypid
    WHERE a.attrelid = _vectors_table AND a.attname = pipeline.embedding_column;
    IF _type_dimensions NOT IN (-1, _model.dimensions) THEN
        problem := format('column "%s" of table %s has %s dimensions, model "%s" has %s',
                          pipeline.embedding_column, _vectors_table, _type_dimensions,
                          _model.name, _model.dimensions);
        hint := format('Change the column: %s; or the model: SELECT %s.',
                       format(
                           CASE
                               WHEN pipeline.embeddings_table IS NULL THEN
                                   'ALTER TABLE %s ALTER COLUMN %I TYPE %s(%s) USING NULL'
                               ELSE 'TRUNCATE %1$s; ALTER TABLE %1$s ALTER COLUMN %2$I TYPE %3$s(%4$s)'
                           END,
                           _vectors_table, pipeline.embedding_column, _type, _model.dimensions
                       ),
                       CASE
                           WHEN pipeline.managed THEN
                               format('autoembed.alter_pipeline(%L, model => …)', pipeline.table_id)
                           ELSE 'autoembed.set_default_model(…)'
                       END);
        -- The definition of the pipeline is valid. Another model cures it at any time.
        errcode := 'waits';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_pipeline IS
    'The reason why a pipeline cannot be embedded, and the cure. NULLs if it can. errcode: the name of an SQLSTATE, or '
    'waits, if the jobs wait for a change.';

CREATE OR REPLACE VIEW autoembed._pipeline_state AS
SELECT p.id,
       p.table_id,
       p.embedding_column,
       p.content_function,
       p.truncate,
       p.paused,
       coalesce(p.model, autoembed._default_model()) AS model,
       coalesce(c.problem, CASE
           WHEN p.paused THEN 'it is paused'
           WHEN t.are_missing THEN 'its triggers are not there'
           WHEN r.until > clock_timestamp() THEN
               -- The reason may quote the provider, and with it the texts of other tenants.
               format('model "%s" rests: %s', r.model,
                      CASE WHEN pg_has_role('pg_monitor', 'USAGE') THEN r.reason ELSE r.summary END)
           WHEN e.until > clock_timestamp() THEN
               concat_ws(': ', 'it rests after an error', CASE WHEN autoembed._owns(p.table_id) THEN e.reason END)
       END) AS blocked,
       coalesce(c.hint, CASE
           WHEN p.paused THEN format('SELECT autoembed.resume(%L).', p.table_id)
           WHEN t.are_missing THEN format('If no restore is going on: SELECT autoembed.resync(%L).', p.table_id)
           WHEN r.needs_attention THEN format('SELECT autoembed.resume_model(%L) tries it at once.', r.model)
       END) AS hint,
       c.problem IS NULL AS sound,
       coalesce(r.failures, 0) AS failures,
       p.embeddings_table,
       p.stale_since
FROM autoembed.pipeline AS p
CROSS JOIN LATERAL autoembed._check_pipeline(p) AS c
-- A restore brings triggers last. Until then rows that are not there yet look like deleted ones.
CROSS JOIN LATERAL (
    SELECT p.managed AND NOT EXISTS (
        SELECT FROM pg_trigger AS g
        -- Readers of views that use this one may not call _trigger_name().
        WHERE g.tgrelid = p.table_id AND g.tgname = format('autoembed_%s_insert', p.id)::name
    ) AS are_missing
) AS t
LEFT JOIN autoembed.model_rest AS r ON r.model = coalesce(p.model, autoembed._default_model())
LEFT JOIN autoembed.pipeline_rest AS e ON e.pipeline_id = p.id;
COMMENT ON VIEW autoembed._pipeline_state IS 'Every pipeline, and the reason why its jobs wait, if they do.';

CREATE OR REPLACE FUNCTION autoembed._warn_of_blocked_pipelines(
    only_with_jobs boolean DEFAULT false,
    resting text[] DEFAULT NULL,
    model text DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- A tenant may have thousands of tables, and a lane does nothing else meanwhile. Another lane tells of the rest.
    _until CONSTANT timestamptz := CASE
        WHEN resting IS NULL THEN 'infinity'
        ELSE clock_timestamp() + interval '200 milliseconds'
    END;
    _default_model CONSTANT text := autoembed._default_model();
    _id integer;
    _state record;
BEGIN
    IF resting IS NOT NULL THEN
        -- The warning is for the server's log alone. A lane's client is pg_cron, which would write it there again.
        PERFORM set_config('client_min_messages', 'error', true);
    END IF;
    IF resting = '{}' THEN
        FOR _id IN SELECT p.id FROM autoembed.pipeline AS p ORDER BY random() LOOP
            EXIT WHEN clock_timestamp() > _until;
            PERFORM autoembed._warn_once(_id);
        END LOOP;
        RETURN;
    END IF;
    FOR _id IN
        SELECT p.id
        FROM autoembed.pipeline AS p
        WHERE (resting IS NULL OR coalesce(p.model, _default_model) = ANY (resting))
          AND coalesce(p.model, _default_model) = coalesce(_warn_of_blocked_pipelines.model, p.model, _default_model)
          AND (NOT only_with_jobs
               OR EXISTS (SELECT FROM autoembed._job AS q WHERE q.pipeline = p.id::text))
        ORDER BY p.id
    LOOP
        EXIT WHEN clock_timestamp() > _until;
        SELECT s.* INTO _state
        FROM autoembed._pipeline_state AS s
        WHERE s.id = _id AND s.blocked IS NOT NULL AND NOT s.paused AND (resting IS NULL OR s.sound);
        CONTINUE WHEN NOT FOUND;
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('%s.%I is not being embedded: %s',
                             _state.table_id, _state.embedding_column, _state.blocked),
            HINT = coalesce(_state.hint, 'Its jobs are kept, and go on by themselves.');
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._warn_of_blocked_pipelines IS
    'Warns of pipelines that wait, with the reason and the cure. resting: warns in the server''s log alone, and for a '
    'fifth of a second, of the pipelines that wait for one of these models. An empty array: of the problems that the '
    'log does not have yet. model: only of those that use this model.';

CREATE OR REPLACE FUNCTION autoembed._rest_pipelines(owner bigint, pipeline_ids integer[], reason text)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.pipeline_rest AS r (pipeline_id, until, failures, reason)
    SELECT p.id, clock_timestamp() + interval '5 seconds', 1, _rest_pipelines.reason
    FROM autoembed.pipeline AS p
    JOIN pg_class AS c ON c.oid = p.table_id AND c.relowner = _rest_pipelines.owner::oid
    WHERE pipeline_ids = '{}' OR p.id = ANY (pipeline_ids)
    -- A new row checks its foreign key, which would wait for a tenant's lock.
    FOR KEY SHARE OF p SKIP LOCKED
    ON CONFLICT (pipeline_id) DO UPDATE
    -- A rest lasts 5 seconds, doubled with each error within ten minutes, up to five minutes.
    SET until = clock_timestamp() + least(
            interval '5 minutes',
            interval '5 seconds' * 2 ^ CASE
                WHEN r.until > clock_timestamp() - interval '10 minutes' THEN least(r.failures, 6)
                ELSE 0
            END
        ),
        failures = CASE WHEN r.until > clock_timestamp() - interval '10 minutes' THEN r.failures + 1 ELSE 1 END,
        reason = excluded.reason;
$sql$;
COMMENT ON FUNCTION autoembed._rest_pipelines IS
    'Keeps all lanes from the jobs of an owner''s pipelines for a while, after an error of the owner''s code. An empty '
    'pipeline_ids: all pipelines of the owner.';
