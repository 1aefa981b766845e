-- The owner of a table attaches, changes, pauses and detaches it. These functions run with the caller's rights.

CREATE OR REPLACE FUNCTION autoembed._owned_pipelines(table_name regclass, embedding_column name)
    RETURNS autoembed.pipeline[]
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
    SET row_security = on
AS $plpgsql$
DECLARE
    _found CONSTANT autoembed.pipeline[] := ARRAY(
        SELECT p
        FROM autoembed.pipeline AS p
        -- Several embeddings tables of one table are told apart by their own names.
        WHERE _owned_pipelines.table_name IN (p.table_id, p.embeddings_table)
          AND (_owned_pipelines.embedding_column IS NULL OR p.embedding_column = _owned_pipelines.embedding_column)
        ORDER BY p.id
    );
    _void text;
BEGIN
    IF table_name IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'table_name must not be NULL',
            HINT = 'Give the name of a table, such as ''public.documents''.';
    ELSIF _found = '{}' THEN
        _void := autoembed._check_owner(table_name);
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = CASE
                WHEN embedding_column IS NULL THEN format('table %s is not attached to autoembed', table_name)
                ELSE format('column "%s" of table %s is not attached to autoembed', embedding_column, table_name)
            END,
            HINT = format('Attach it: SELECT autoembed.enable(%L, …).', table_name);
    END IF;
    RETURN _found;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._owned_pipelines IS
    'The pipelines of a table that the caller owns, or the one of that column. Fails if there is none.';

CREATE OR REPLACE FUNCTION autoembed._check_beside(table_id regclass, embeddings_table regclass)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF embeddings_table IS NOT NULL AND NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = embeddings_table) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_table',
            MESSAGE = format('the embeddings table of table %s was dropped', table_id),
            HINT = format('Attach the table again: SELECT autoembed.disable(%1$L); then '
                          'SELECT autoembed.enable(%1$L, …).', table_id);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_beside IS
    'Fails if the embeddings table of a table was dropped. NULL: it has none.';

CREATE OR REPLACE FUNCTION autoembed._owned_pipeline(table_name regclass, embedding_column name)
    RETURNS autoembed.pipeline
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _found CONSTANT autoembed.pipeline[] := autoembed._owned_pipelines(table_name, embedding_column);
    _void text;
BEGIN
    IF cardinality(_found) > 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'ambiguous_column',
            MESSAGE = format('table %s has several embeddings', table_name),
            HINT = (
                SELECT 'Name one of them: ' || string_agg(CASE
                    WHEN f.embeddings_table IS NULL THEN format('embedding_column => %L', f.embedding_column)
                    ELSE format('table_name => %L', f.embeddings_table)
                END, ' or ') || '.'
                FROM unnest(_found) AS f
            );
    END IF;
    _void := autoembed._check_beside(_found[1].table_id, _found[1].embeddings_table);
    RETURN _found[1];
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._owned_pipeline IS
    'The pipeline of a table that the caller owns. Fails if there is none, or several and no column is given.';

CREATE OR REPLACE FUNCTION autoembed._execute(statement text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _hint text;
BEGIN
    EXECUTE statement;
EXCEPTION WHEN syntax_error_or_access_rule_violation OR feature_not_supported OR program_limit_exceeded THEN
    GET STACKED DIAGNOSTICS _hint = PG_EXCEPTION_HINT;
    IF _hint = '' THEN
        RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = SQLERRM;
    END IF;
    RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = SQLERRM, HINT = _hint;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._execute IS
    'Runs a statement that makes something for the caller, with the rights of the caller. If PostgreSQL refuses it, '
    'the CONTEXT of the error does not show it.';

CREATE OR REPLACE FUNCTION autoembed._check_owner(table_name regclass)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF NOT (SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class AS c WHERE c.oid = table_name) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('must be owner of table %s', table_name),
            HINT = 'Call the function as the owner of the table, or as a member of that role.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_owner IS 'Fails unless the caller has the rights of the table''s owner.';

CREATE OR REPLACE FUNCTION autoembed._check_template(argument text, template text, example text)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF octet_length(template) > 5000 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'program_limit_exceeded',
            MESSAGE = format('%s has %s bytes, and may have 5000', argument, octet_length(template)),
            HINT = 'Give long texts by a content_function.';
    ELSIF template IS NOT NULL AND (
        NOT EXISTS (SELECT FROM autoembed._template(template) AS t WHERE t.column_name IS NOT NULL)
        OR regexp_replace(template, '[{][{]|[}][}]|[{][^{}]+[}]', '', 'g') ~ '[{}]'
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('%s %L names no column or has an unmatched brace', argument, template),
            HINT = format('For example: %s => ''%s''. Write {{ and }} for plain braces.', argument, example);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_template IS
    'Fails if a template, given as this argument, is not well formed. NULL is valid.';

CREATE OR REPLACE FUNCTION autoembed._check_content(
    content_columns name[],
    content_function text,
    content_template text,
    required boolean
)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    IF num_nonnulls(content_columns, content_function, content_template) NOT IN (required::integer, 1) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('one of content_columns, content_function and content_template must be given, not %s',
                             num_nonnulls(content_columns, content_function, content_template)),
            HINT = 'For example: content_columns => ''{title,content}''.';
    ELSIF cardinality(content_columns) = 0
          OR EXISTS (SELECT FROM unnest(content_columns) AS c(name) WHERE c.name IS NULL OR c.name = '')
          OR array_ndims(content_columns) > 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'content_columns names no column or contains NULL, an empty name or an array',
            HINT = 'For example: content_columns => ''{title,content}''.';
    END IF;
    _void := autoembed._check_template('content_template', content_template, E'# {title}\\n\\n{content}');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_content IS
    'Fails unless one source of a row''s text is given and well formed. None is valid too, unless required.';

CREATE OR REPLACE FUNCTION autoembed._check_on_change(on_change text)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF on_change IS NULL OR on_change NOT IN ('keep', 'clear') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('on_change must be keep or clear, not %s', coalesce(on_change, 'NULL')),
            HINT = 'keep leaves the old vector until the new one is written; clear removes it with the old text.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_on_change IS 'Fails unless on_change is keep or clear.';

CREATE OR REPLACE FUNCTION autoembed._check_chunking(
    is_beside boolean,
    chunking text,
    chunk_size integer,
    chunk_overlap integer,
    model text,
    chunk_prefix text
)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _check record;
    _void text;
BEGIN
    _void := autoembed._check_template('chunk_prefix', chunk_prefix, '{title}');
    IF is_beside THEN
        _check := autoembed._chunk_size(chunking, chunk_size, chunk_overlap, (autoembed._model(model)).name);
        IF _check.problem IS NOT NULL THEN
            RAISE EXCEPTION USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = _check.errcode;
        END IF;
    ELSIF num_nonnulls(chunking, chunk_size, chunk_overlap, chunk_prefix) > 0 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = 'a column in the row holds one embedding, not those of chunks',
            HINT = 'Leave embedding_column out: the embeddings are then kept beside the rows.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_chunking IS 'Fails unless texts can be cut into chunks like this.';

CREATE OR REPLACE FUNCTION autoembed._read_condition(
    table_name regclass,
    INOUT condition text,
    OUT columns jsonb,
    OUT objects jsonb
)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
    SET standard_conforming_strings = on
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    _path text := (
        SELECT format('%I, public, pg_temp', n.nspname)
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.oid = table_name
    );
    _owner name := (SELECT pg_get_userbyid(c.relowner) FROM pg_class AS c WHERE c.oid = table_name);
    _statement text;
BEGIN
    columns := '{}';
    objects := '{}';
    IF condition IS NULL THEN
        RETURN;
    ELSIF octet_length(condition) > 50000 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'program_limit_exceeded',
            MESSAGE = format('the condition for table %s has %s bytes, and may have 50000',
                             table_name, octet_length(condition)),
            HINT = 'Put what it says into a function or a column.';
    END IF;
    -- PostgreSQL parses the expression as a constraint of an empty copy, and prints it with every name in full.
    EXECUTE format('CREATE TEMP TABLE autoembed_condition (LIKE %s)', table_name);
    _statement := format(
        E'ALTER TABLE pg_temp.autoembed_condition ADD CONSTRAINT condition CHECK (%s\n) NO INHERIT NOT VALID',
        condition
    );
    IF _owner = current_user THEN
        PERFORM set_config('search_path', _path, true);
        EXECUTE _statement;
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    ELSE
        -- To read a literal may call a check of the owner.
        EXECUTE format('ALTER TABLE pg_temp.autoembed_condition OWNER TO %I', _owner);
        PERFORM autoembed._alter_as_owner(
            table_name, format('SELECT pg_catalog.set_config(''search_path'', %L, true); %s', _path, _statement)
        );
    END IF;
    SELECT pg_get_expr(k.conbin, k.conrelid),
           coalesce((
               SELECT jsonb_object_agg(a.attname, a.attname)
               FROM pg_attribute AS a
               WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey) AND a.attnum > 0
           ), '{}'),
           coalesce((
               SELECT jsonb_object_agg(i.identity, jsonb_build_object(
                   'type', i.type, 'oid', d.refobjid::text, 'name', o.name, 'owner', pg_get_userbyid(o.owner)
               ))
               FROM pg_depend AS d
               CROSS JOIN LATERAL pg_identify_object(d.refclassid, d.refobjid, 0) AS i
               CROSS JOIN LATERAL (
                   SELECT p.proname AS name, p.proowner AS owner FROM pg_proc AS p
                   WHERE p.oid = d.refobjid AND d.refclassid = 'pg_proc'::regclass
                   UNION ALL
                   SELECT p.oprname, p.oprowner FROM pg_operator AS p
                   WHERE p.oid = d.refobjid AND d.refclassid = 'pg_operator'::regclass
                   UNION ALL
                   SELECT t.typname, t.typowner FROM pg_type AS t
                   WHERE t.oid = d.refobjid AND d.refclassid = 'pg_type'::regclass
                   UNION ALL
                   SELECT c.collname, c.collowner FROM pg_collation AS c
                   WHERE c.oid = d.refobjid AND d.refclassid = 'pg_collation'::regclass
               ) AS o
               WHERE d.classid = 'pg_constraint'::regclass
                 AND d.objid = k.oid
                 AND d.refclassid IN (
                     'pg_proc'::regclass, 'pg_operator'::regclass, 'pg_type'::regclass, 'pg_collation'::regclass
                 )
           ), '{}')
    INTO STRICT condition, columns, objects
    FROM pg_constraint AS k
    WHERE k.conrelid = 'pg_temp.autoembed_condition'::regclass AND k.conname = 'condition';
    DROP TABLE pg_temp.autoembed_condition;
    IF (SELECT count(*) FROM jsonb_object_keys(objects)) > 200 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'program_limit_exceeded',
            MESSAGE = format('the condition for table %s uses %s functions, operators, types and collations, and may '
                             'use 200', table_name, (SELECT count(*) FROM jsonb_object_keys(objects))),
            HINT = 'Put what it says into a function or a column.';
    END IF;
EXCEPTION WHEN syntax_error_or_access_rule_violation OR feature_not_supported OR data_exception THEN
    IF NOT has_database_privilege(current_database(), 'TEMPORARY') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role %s may not create temporary tables, in one of which a condition is read',
                             quote_ident(current_user)),
            HINT = format('GRANT TEMPORARY ON DATABASE %I TO %I, at least until the condition is read.',
                          current_database(), current_user);
    END IF;
    RAISE EXCEPTION USING
        ERRCODE = SQLSTATE,
        MESSAGE = format('condition %s is not valid for table %s: %s', condition, table_name, SQLERRM),
        HINT = 'A condition is a boolean expression of the columns of one row, without subqueries.';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._read_condition IS
    'A condition on the rows of a table with every name in it in full, its columns, {name: name}, and the other '
    'objects that it uses. Fails if it is not a valid condition. Runs with the caller''s rights.';

CREATE OR REPLACE FUNCTION autoembed._make_embeddings_table(table_name regclass, name text, dimensions integer)
    RETURNS regclass
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table record;
    _key_columns name[] := autoembed._key_columns(table_name);
    _keys text;
    _full_name text;
    _existing regclass;
    _columns name[];
    _comment text;
    _void text;
BEGIN
    SELECT c.relnamespace, n.nspname, c.relname, c.relowner INTO STRICT _table
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = table_name;
    -- A name that is cut off may be that of another table.
    IF octet_length(name) NOT BETWEEN 1 AND 63 THEN
        RAISE EXCEPTION USING
            ERRCODE = CASE WHEN name = '' THEN 'invalid_name' ELSE 'name_too_long' END,
            MESSAGE = format('the embeddings table''s name "%s" must have from 1 to 63 bytes', name),
            HINT = 'Leave embeddings_table out for the name of the table with _embeddings.';
    ELSIF name LIKE '%.%' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_name',
            MESSAGE = format('the embeddings table''s name "%s" has a dot', name),
            DETAIL = format('The embeddings table is in schema %I, as its table is.', _table.nspname),
            HINT = format('Give the name alone, such as %L.', regexp_replace(name, '^.*[.]', ''));
    END IF;
    name := coalesce(name, autoembed._beginning(_table.relname, 52) || '_embeddings');
    _full_name := format('%I.%I', _table.nspname, name);
    IF _key_columns IS NULL THEN
        -- The check of the pipeline says so.
        RETURN NULL;
    ELSIF _key_columns && '{chunk_number,chunk_start,chunk_end,digest,embedding}' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_column',
            MESSAGE = format('key column "%s" of table %s has the name of a column of its embeddings table',
                             (SELECT k.name FROM unnest(_key_columns) AS k(name)
                              WHERE k.name IN ('chunk_number', 'chunk_start', 'chunk_end', 'digest', 'embedding')
                              LIMIT 1), table_name),
            HINT = 'Keep the embeddings in the rows: embedding_column => ''embedding''.';
    END IF;
    -- A table that was dropped a moment ago may have left its own.
    PERFORM autoembed._drop_orphaned_pipelines(to_regclass(_full_name));
    -- A lane may have dropped that table just now, and to_regclass() may still find it.
    SELECT c.oid INTO _existing FROM pg_class AS c WHERE c.relnamespace = _table.relnamespace AND c.relname = name;
    _columns := ARRAY(
        SELECT a.attname FROM pg_attribute AS a
        WHERE a.attrelid = _existing AND a.attnum > 0 AND NOT a.attisdropped
        ORDER BY a.attnum
    );
    IF _columns @> _key_columns AND _key_columns || '{chunk_number,chunk_start,chunk_end,digest,embedding}' @> _columns
       AND cardinality(_columns) = cardinality(_key_columns) + 5
       AND NOT EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.embeddings_table = _existing) THEN
        -- A table that was attached before left it, or a dump brought it. It gets a policy.
        _void := autoembed._lock_table(_existing, true);
        RAISE NOTICE 'the embeddings in table % are used', _existing;
        RETURN _existing;
    ELSIF _existing IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_table',
            MESSAGE = format('relation %s exists and is no embeddings table of %s', _full_name, table_name),
            -- A table that is partitioned gives its name to a new one.
            HINT = coalesce((
                SELECT format('It holds the embeddings of partition %1$s. They are used after SELECT '
                              'autoembed.disable(%1$L);', p.table_id)
                FROM autoembed.pipeline AS p
                WHERE p.embeddings_table = _existing
                  AND p.table_id IN (SELECT t.relid FROM autoembed._partition_tree(table_name) AS t)
            ), format(
                'Give the embeddings table another name: embeddings_table => %L.',
                autoembed._beginning(_table.relname, 55) || '_vectors'
            ));
    END IF;
    IF NOT has_schema_privilege(_table.nspname, 'CREATE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role %I may not create the embeddings table %s', current_user, _full_name),
            HINT = format('GRANT CREATE ON SCHEMA %I TO %I; or keep the embeddings in the rows: '
                          'embedding_column => ''embedding''.', _table.nspname, current_user);
    END IF;
    IF NOT pg_has_role(_table.relowner, 'SET') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role %I may not give the embeddings table %s to %I, the owner of %s',
                             current_user, _full_name, pg_get_userbyid(_table.relowner), table_name),
            HINT = format('GRANT %1$I TO %2$I WITH SET TRUE; or keep the embeddings in the rows: '
                          'embedding_column => ''embedding''.', pg_get_userbyid(_table.relowner), current_user);
    END IF;
    SELECT string_agg(concat(
        format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)),
        (SELECT format(' COLLATE %I.%I', n.nspname, l.collname)
         FROM pg_collation AS l
         JOIN pg_namespace AS n ON n.oid = l.collnamespace
         WHERE l.oid = a.attcollation AND l.collname <> 'default')
    ), ', ' ORDER BY k.number)
    INTO _keys
    FROM unnest(_key_columns) WITH ORDINALITY AS k(name, number)
    JOIN pg_attribute AS a ON a.attrelid = table_name AND a.attname = k.name;
    _void := autoembed._execute(format(
        'CREATE TABLE %s (%s, chunk_number integer, chunk_start integer NOT NULL, chunk_end integer NOT NULL, '
        'digest bytea NOT NULL, embedding @extschema:vector@.halfvec(%s) NOT NULL, PRIMARY KEY (%s, chunk_number))',
        _full_name, _keys, dimensions,
        (SELECT string_agg(quote_ident(k.name), ', ' ORDER BY k.number)
         FROM unnest(_key_columns) WITH ORDINALITY AS k(name, number))
    ));
    EXECUTE format('ALTER TABLE %s OWNER TO %I', _full_name, pg_get_userbyid(_table.relowner));
    -- No policy keeps a role with default privileges from a TRUNCATE, or from a trigger that the owner then runs.
    EXECUTE format('REVOKE ALL ON %s FROM %s', _full_name, (
        SELECT concat_ws(', ', 'PUBLIC', string_agg(DISTINCT a.grantee::regrole::text, ', '))
        FROM pg_class AS c
        CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        WHERE c.oid = _full_name::regclass AND a.grantee NOT IN (0, c.relowner)
    ));
    -- A policy shows a role the embeddings of the rows that it may read.
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', _full_name);
    EXECUTE format('COMMENT ON TABLE %s IS %L', _full_name,
                   format('The embeddings of the rows of %s, one for each chunk of a row''s text.', table_name));
    FOR _comment IN
        SELECT format('COMMENT ON COLUMN %s.%I IS %L', _full_name, c.name, c.comment)
        FROM (VALUES
            ('chunk_number', 'The number of the chunk. The chunks of a row are numbered in the order of its text.'),
            ('chunk_start', 'The number of characters before the chunk.'),
            ('chunk_end', 'The number of characters up to the end of the chunk.'),
            ('digest', 'The digest of the model and the chunk. A chunk with a known digest is not sent again.')
        ) AS c(name, comment)
    LOOP
        EXECUTE _comment;
    END LOOP;
    RETURN _full_name::regclass;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._make_embeddings_table IS
    'Makes the embeddings table of a table, in its schema and for its owner, or takes one that exists. name: NULL is '
    'that of the table with _embeddings. NULL if the table has no key.';

CREATE OR REPLACE FUNCTION autoembed._fit_embeddings_table(pipeline autoembed.pipeline)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _dimensions integer := autoembed._dimensions(pipeline.model);
    _void text;
BEGIN
    IF EXISTS (
        SELECT FROM pg_attribute AS a
        JOIN pg_class AS e ON e.oid = a.attrelid
        -- A table that was given to another role is left alone.
        JOIN pg_class AS t ON t.oid = pipeline.table_id AND t.relowner = e.relowner
        WHERE a.attrelid = pipeline.embeddings_table
          AND a.attname = pipeline.embedding_column
          AND a.atttypmod NOT IN (-1, _dimensions)
    ) THEN
        _void := autoembed._lock_table(pipeline.embeddings_table, true);
        -- Vectors of other dimensions are of no use to the model. Triggers of the owner may fire.
        PERFORM autoembed._alter_as_owner(
            pipeline.embeddings_table, format('TRUNCATE %s', pipeline.embeddings_table)
        );
        PERFORM autoembed._alter_as_owner(pipeline.embeddings_table, format(
            'ALTER TABLE %s ALTER COLUMN %I TYPE @extschema:vector@.halfvec(%s)',
            pipeline.embeddings_table, pipeline.embedding_column, _dimensions
        ));
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._fit_embeddings_table IS
    'Empties a table of embeddings whose vectors have other dimensions than its model gives, and gives it these.';

CREATE OR REPLACE FUNCTION autoembed._check_attachable(table_id regclass, builds_index boolean)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table pg_class;
BEGIN
    SELECT c.* INTO _table FROM pg_class AS c WHERE c.oid = table_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_table',
            MESSAGE = format('table with OID %s does not exist', table_id::oid);
    ELSIF _table.relpersistence = 't' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s is temporary, so lanes cannot see it', table_id),
            HINT = 'Attach a permanent table.';
    ELSIF _table.relkind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s is %s, which cannot be attached', table_id, CASE _table.relkind
                WHEN 'v' THEN 'a view'
                WHEN 'm' THEN 'a materialized view'
                WHEN 'f' THEN 'a foreign table'
                WHEN 'S' THEN 'a sequence'
                WHEN 'i' THEN 'an index'
                WHEN 'I' THEN 'a partitioned index'
                WHEN 'c' THEN 'a composite type'
                WHEN 't' THEN 'a TOAST table'
                ELSE format('a relation of kind "%s"', _table.relkind)
            END),
            HINT = 'Attach the table that holds the rows.';
    ELSIF _table.relnamespace::regnamespace::text IN ('autoembed', 'pg_catalog', 'information_schema') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s belongs to %s, and cannot be attached', table_id, CASE
                WHEN _table.relnamespace = 'autoembed'::regnamespace THEN 'autoembed' ELSE 'PostgreSQL'
            END),
            HINT = 'Attach a table of your own.';
    ELSIF _table.relkind = 'p' AND builds_index THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('cannot build an index concurrently on partitioned table %s', table_id),
            HINT = 'Leave it out. Later, create an index concurrently on each partition, and then one on the table, '
                'which takes over those of the partitions.';
    ELSIF _table.relispartition THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('table %s is a partition', table_id),
            HINT = format('Attach the whole table: SELECT autoembed.enable(%L, …).', pg_partition_root(table_id));
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_attachable IS
    'Refuses what is no permanent, whole table of a user, and an index on the rows of a partitioned table.';

CREATE OR REPLACE FUNCTION autoembed._lock_holder(
    table_id regclass,
    modes text[],
    OUT pid integer,
    OUT holder text,
    OUT is_autovacuum boolean
)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT a.pid,
           concat_ws(', ',
               format('process %s', a.pid),
               format('role %s', a.usename),
               format('application %s', nullif(a.application_name, '')),
               'in a transaction for ' || date_trunc('second', clock_timestamp() - a.xact_start)
           ),
           a.backend_type = 'autovacuum worker'
    FROM pg_locks AS l
    LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE l.locktype = 'relation' AND l.granted AND l.pid <> pg_backend_pid() AND l.mode = ANY (modes)
      AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
      AND l.relation IN (SELECT t.relid FROM autoembed._partition_tree(table_id) AS t UNION ALL SELECT table_id)
    ORDER BY a.xact_start
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._lock_holder IS
    'The oldest transaction of another session that holds a lock of one of these modes on a table or on a partition of '
    'it.';

CREATE OR REPLACE FUNCTION autoembed._lock_table(table_id regclass, exclusive boolean)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms'
AS $plpgsql$
DECLARE
    _mode CONSTANT text := CASE WHEN exclusive THEN 'ACCESS EXCLUSIVE' ELSE 'SHARE ROW EXCLUSIVE' END;
    _in_the_way CONSTANT text[] := '{RowExclusiveLock,ShareUpdateExclusiveLock,ShareLock,ShareRowExclusiveLock,'
        'ExclusiveLock,AccessExclusiveLock}'::text[]
        || CASE WHEN exclusive THEN '{AccessShareLock,RowShareLock}'::text[] ELSE '{}' END;
    _end CONSTANT timestamptz := clock_timestamp() + interval '5 seconds';
    _name text;
    _holder record;
BEGIN
    LOOP
        BEGIN
            _name := table_id;
            EXECUTE format('LOCK TABLE %s IN %s MODE', _name, _mode);
            -- Somebody may have renamed the schema at the last moment, and given the name to another table.
            IF to_regclass(_name) = table_id THEN
                RETURN;
            END IF;
        EXCEPTION
            WHEN lock_not_available THEN
                NULL;
            WHEN insufficient_privilege THEN
                -- An owner may have revoked its own rights. The statements that follow take the lock then.
                RETURN;
        END;
        SELECT h.* INTO _holder FROM autoembed._lock_holder(table_id, _in_the_way) AS h;
        EXIT WHEN clock_timestamp() >= _end;
        IF _holder.is_autovacuum THEN
            -- An autovacuum gives way to somebody who waits for so long, and not before.
            PERFORM set_config('lock_timeout', (
                SELECT s.setting::integer + 500 FROM pg_settings AS s WHERE s.name = 'deadlock_timeout'
            )::text, true);
        ELSE
            -- Those who wait behind this session go on meanwhile.
            PERFORM set_config('lock_timeout', '100ms', true), pg_sleep(0.3);
        END IF;
    END LOOP;
    RAISE EXCEPTION USING
        ERRCODE = 'lock_not_available',
        MESSAGE = format('table %s is in use by another transaction', table_id),
        DETAIL = format('A lock on it is held by %s.', coalesce(_holder.holder, 'a prepared transaction')),
        HINT = CASE
            WHEN _holder.pid IS NULL THEN 'See pg_prepared_xacts.'
            ELSE format('Call it again when that has ended. To end it: SELECT pg_terminate_backend(%s).', _holder.pid)
        END;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lock_table IS
    'Locks a table that is to be altered: against writers, or, if exclusive, against all. It tries so for five '
    'seconds, each time for a moment, so that a long transaction stops nobody else who uses the table.';

CREATE OR REPLACE FUNCTION autoembed.enable(
    table_name regclass,
    embedding_column name DEFAULT NULL,
    content_columns name[] DEFAULT NULL,
    content_function text DEFAULT NULL,
    content_template text DEFAULT NULL,
    model text DEFAULT NULL,
    condition text DEFAULT NULL,
    on_change text DEFAULT 'keep',
    truncate boolean DEFAULT true,
    enqueue_existing boolean DEFAULT true,
    create_index boolean DEFAULT false,
    replicated boolean DEFAULT false,
    if_not_exists boolean DEFAULT false,
    embeddings_table text DEFAULT NULL,
    chunking text DEFAULT NULL,
    chunk_size integer DEFAULT NULL,
    chunk_overlap integer DEFAULT NULL,
    text_config text DEFAULT NULL,
    adopt boolean DEFAULT false,
    chunk_prefix text DEFAULT NULL,
    binary_index boolean DEFAULT false
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET row_security = on
AS $plpgsql$
DECLARE
    _dimensions integer;
    _pipeline autoembed.pipeline;
    _embeddings_table regclass;
    _name text := concat_ws('.', table_name::text, quote_ident(embedding_column));
    _chunking CONSTANT record := autoembed._chunking(chunking);
    _text_config CONSTANT text := autoembed._full_text_config(text_config);
    _adds_column boolean;
    _is_empty boolean;
    _condition record;
    _void text;
BEGIN
    IF table_name IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'table_name must not be NULL',
            HINT = 'Give the name of a table, such as ''public.documents''.';
    ELSIF embedding_column = '' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_name',
            MESSAGE = 'embedding_column is an empty name',
            HINT = 'Name a column, or leave it out: the embeddings are then kept beside the rows.';
    ELSIF embedding_column IS NOT NULL AND embeddings_table IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'embedding_column and embeddings_table cannot both be given',
            HINT = 'embedding_column keeps the embeddings in the rows, embeddings_table beside them.';
    END IF;
    chunk_prefix := nullif(chunk_prefix, '');
    _void := autoembed._check_chunking(
        embedding_column IS NULL, _chunking.way, chunk_size, chunk_overlap, model, chunk_prefix
    );
    _void := autoembed._check_attachable(enable.table_name, create_index AND embedding_column IS NOT NULL);
    _void := autoembed._check_owner(enable.table_name);
    _void := autoembed._check_content(content_columns, content_function, content_template, true);
    _void := autoembed._check_on_change(on_change);
    IF EXISTS (
        SELECT FROM autoembed.pipeline AS p
        WHERE p.table_id = enable.table_name
          AND CASE
              WHEN enable.embedding_column IS NOT NULL THEN
                  p.embeddings_table IS NULL AND p.embedding_column = enable.embedding_column
              ELSE
                  p.embeddings_table IS NOT NULL AND (enable.embeddings_table IS NULL OR (
                      SELECT c.relname FROM pg_class AS c WHERE c.oid = p.embeddings_table
                  ) = enable.embeddings_table)
          END
    ) THEN
        IF enable.embedding_column IS NOT NULL AND NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = enable.table_name AND a.attname = enable.embedding_column AND NOT a.attisdropped
        ) THEN
            -- The column was dropped, and is now added with a new definition.
            _void := autoembed.disable(enable.table_name, enable.embedding_column);
        ELSIF if_not_exists THEN
            RAISE NOTICE '% is already attached, skipping', _name;
            RETURN;
        ELSE
            RAISE EXCEPTION USING
                ERRCODE = 'duplicate_object',
                MESSAGE = format('%s is already attached', _name),
                HINT = concat(
                    'Change how it is embedded with autoembed.alter_pipeline(), or detach it with autoembed.disable().',
                    CASE
                        WHEN enable.embedding_column IS NULL THEN
                            ' Second embeddings need a name: embeddings_table => ….'
                    END
                );
        END IF;
    END IF;

    _void := autoembed._refuse_without_vectors(enable.table_name, enable.embedding_column, current_user);
    _dimensions := autoembed._dimensions(enable.model);
    _adds_column := enable.embedding_column IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = enable.table_name AND a.attname = enable.embedding_column AND a.attnum > 0
    );
    -- Vectors are adopted before the table is locked.
    IF adopt IS NOT TRUE OR _adds_column THEN
        _void := autoembed._lock_table(enable.table_name, _adds_column);
    END IF;
    IF enable.embedding_column IS NULL THEN
        _embeddings_table := autoembed._make_embeddings_table(
            enable.table_name, enable.embeddings_table, _dimensions
        );
    ELSIF _adds_column THEN
        _void := autoembed._execute(format(
            'ALTER TABLE %s ADD COLUMN %I @extschema:vector@.halfvec(%s)',
            enable.table_name, enable.embedding_column, _dimensions
        ));
    END IF;
    _condition := autoembed._read_condition(enable.table_name, enable.condition);
    -- The loop keeps this statement out of the CONTEXT of a refusal.
    FOR _pipeline IN
        INSERT INTO autoembed.pipeline AS p (
            table_id, embedding_column, content_columns, content_function, content_template,
            condition, condition_columns, condition_objects, model, on_change, truncate, replicated, embeddings_table,
            chunking, chunk_function, chunk_size, chunk_overlap, text_config, adopts, chunk_prefix,
            binary_index
        )
        VALUES (
            enable.table_name, coalesce(enable.embedding_column, 'embedding'),
            enable.content_columns, enable.content_function, enable.content_template,
            _condition.condition, _condition.columns, _condition.objects, enable.model, enable.on_change,
            coalesce(enable.truncate, true), coalesce(enable.replicated, false), _embeddings_table,
            coalesce(_chunking.way, CASE WHEN enable.embedding_column IS NULL THEN 'structure' ELSE 'none' END),
            _chunking.chunk_function, enable.chunk_size, coalesce(enable.chunk_overlap, 0),
            _text_config, coalesce(enable.adopt, false),
            enable.chunk_prefix, coalesce(enable.binary_index, false)
        )
        RETURNING p.*
    LOOP
    END LOOP;
    _void := autoembed._check_index(_pipeline, coalesce(create_index, false));
    -- The triggers are there, and no other session can write before this transaction ends. Later writes are queued.
    _is_empty := autoembed._is_empty(enable.table_name);
    IF enqueue_existing AND NOT _is_empty OR create_index THEN
        INSERT INTO autoembed.backfill (pipeline_id, create_index)
        VALUES (_pipeline.id, coalesce(enable.create_index, false));
        UPDATE autoembed.backfill AS b
        SET scanned_at = clock_timestamp()
        WHERE b.pipeline_id = _pipeline.id AND _is_empty;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.enable IS
    'Attaches a table that the caller owns: from now on each row has the embedding of its text, in a table beside the '
    'rows, or in embedding_column. Adds the table or column if it is missing, and embeds the rows that exist. The text'
    ': content_columns, joined by blank lines; content_template, with columns in braces; or content_function, of a '
    'row. model: by default the default model. condition: which rows have an embedding. on_change: keep the old vector '
    'until the new one is there, or clear it. truncate: cut a text that the model does not take, or fail. '
    'enqueue_existing: embed the rows that exist. create_index: build an HNSW index afterwards. replicated: embed rows '
    'that logical replication applies. if_not_exists: a table that is attached is no error. embeddings_table: the name '
    'of the table beside the rows. chunking, chunk_size, chunk_overlap: as in chunk_text(); a function that cuts runs '
    'as the owner of the table. text_config: the text '
    'search configuration of a text index, such as english. adopt: the vectors that exist count as those of the rows'' '
    'texts, and are not asked for again. chunk_prefix: text with columns in braces, such as {title}, behind which each '
    'chunk is embedded. binary_index: the index has one bit for each dimension, and search() compares its candidates.';

CREATE OR REPLACE FUNCTION autoembed.alter_pipeline(
    table_name regclass,
    embedding_column name DEFAULT NULL,
    content_columns name[] DEFAULT NULL,
    content_function text DEFAULT NULL,
    content_template text DEFAULT NULL,
    model text DEFAULT NULL,
    condition text DEFAULT NULL,
    on_change text DEFAULT NULL,
    truncate boolean DEFAULT NULL,
    chunking text DEFAULT NULL,
    chunk_size integer DEFAULT NULL,
    chunk_overlap integer DEFAULT NULL,
    text_config text DEFAULT NULL,
    storage text DEFAULT NULL,
    chunk_prefix text DEFAULT NULL,
    binary_index boolean DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET row_security = on
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline := autoembed._owned_pipeline(table_name, embedding_column);
    _condition record;
    _new_content boolean := num_nonnulls(content_columns, content_function, content_template) > 0;
    _is_beside CONSTANT boolean := coalesce(storage = 'beside', _pipeline.embeddings_table IS NOT NULL);
    _moves CONSTANT boolean := _is_beside <> (_pipeline.embeddings_table IS NOT NULL);
    -- Texts that come back beside the rows are cut as before.
    _former CONSTANT jsonb := CASE WHEN _moves AND _is_beside AND chunking IS NULL THEN _pipeline.former_chunking END;
    _chunking CONSTANT record := autoembed._chunking(coalesce(chunking, _former ->> 'chunking'));
    _text_config CONSTANT text := autoembed._full_text_config(text_config);
    _new_place record;
    _new_table regclass;
    _new_column name;
    _void text;
BEGIN
    chunking := coalesce(chunking, _former ->> 'chunking');
    chunk_size := coalesce(chunk_size, (_former ->> 'chunk_size')::integer);
    chunk_overlap := coalesce(chunk_overlap, (_former ->> 'chunk_overlap')::integer);
    chunk_prefix := coalesce(chunk_prefix, _former ->> 'chunk_prefix');
    _void := autoembed._check_content(content_columns, content_function, content_template, false);
    IF NOT _pipeline.managed AND (_new_content OR _moves OR num_nonnulls(condition, on_change) > 0) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('cannot alter %s.%I, whose triggers were made by hand',
                             _pipeline.table_id, _pipeline.embedding_column),
            HINT = 'Detach it with autoembed.disable(), and attach it with autoembed.enable() and the new arguments. '
                'With adopt => true the vectors stay, if they are of the present texts.';
    END IF;
    IF alter_pipeline.on_change IS NOT NULL THEN
        _void := autoembed._check_on_change(alter_pipeline.on_change);
    END IF;
    IF num_nonnulls(chunking, chunk_size, chunk_overlap, nullif(chunk_prefix, '')) > 0 THEN
        _void := autoembed._check_chunking(
            _is_beside, coalesce(_chunking.way, _pipeline.chunking),
            coalesce(alter_pipeline.chunk_size, _pipeline.chunk_size),
            coalesce(alter_pipeline.chunk_overlap, _pipeline.chunk_overlap),
            coalesce(nullif(alter_pipeline.model, ''), _pipeline.model), nullif(alter_pipeline.chunk_prefix, '')
        );
    END IF;
    IF _moves THEN
        _void := autoembed._check_chunks_view(_pipeline);
    END IF;
    IF storage NOT IN ('beside', 'row') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('storage must be beside or row, not %s', storage),
            HINT = 'beside keeps embeddings in a table beside the rows, row in a column of the rows.';
    END IF;
    IF _moves OR alter_pipeline.on_change IS NOT NULL THEN
        _void := autoembed._lock_table(_pipeline.table_id, true);
    END IF;
    IF _moves AND NOT _is_beside THEN
        _void := autoembed._lock_table(_pipeline.embeddings_table, true);
    END IF;
    IF _moves THEN
        _new_place := autoembed._new_place(_pipeline, coalesce(nullif(alter_pipeline.model, ''), _pipeline.model));
        _new_table := _new_place.embeddings_table;
        _new_column := _new_place.embedding_column;
    END IF;
    _condition := autoembed._read_condition(_pipeline.table_id, nullif(alter_pipeline.condition, ''));
    -- The loop keeps this statement out of the CONTEXT of a refusal.
    FOR _void IN
        UPDATE autoembed.pipeline AS p
        SET content_columns = CASE WHEN _new_content THEN alter_pipeline.content_columns ELSE p.content_columns END,
            content_function = CASE WHEN _new_content THEN alter_pipeline.content_function ELSE p.content_function END,
            content_template = CASE WHEN _new_content THEN alter_pipeline.content_template ELSE p.content_template END,
            model = CASE WHEN alter_pipeline.model IS NULL THEN p.model ELSE nullif(alter_pipeline.model, '') END,
            condition = CASE WHEN alter_pipeline.condition IS NULL THEN p.condition ELSE _condition.condition END,
            condition_columns = CASE
                WHEN alter_pipeline.condition IS NULL THEN p.condition_columns
                ELSE _condition.columns
            END,
            condition_objects = CASE
                WHEN alter_pipeline.condition IS NULL THEN p.condition_objects
                ELSE _condition.objects
            END,
            on_change = coalesce(alter_pipeline.on_change, p.on_change),
            truncate = coalesce(alter_pipeline.truncate, p.truncate),
            embeddings_table = CASE WHEN _moves THEN _new_table ELSE p.embeddings_table END,
            embedding_column = CASE WHEN _moves THEN _new_column ELSE p.embedding_column END,
            chunking = CASE WHEN _is_beside THEN coalesce(_chunking.way, p.chunking) ELSE 'none' END,
            chunk_function = CASE
                WHEN NOT _is_beside THEN NULL
                WHEN alter_pipeline.chunking IS NULL THEN p.chunk_function
                ELSE _chunking.chunk_function
            END,
            chunk_prefix = CASE
                WHEN _is_beside THEN nullif(coalesce(alter_pipeline.chunk_prefix, p.chunk_prefix), '')
            END,
            chunk_size = CASE WHEN _is_beside THEN coalesce(alter_pipeline.chunk_size, p.chunk_size) END,
            chunk_overlap = CASE
                WHEN _is_beside THEN coalesce(alter_pipeline.chunk_overlap, p.chunk_overlap)
                ELSE 0
            END,
            text_config = CASE
                WHEN alter_pipeline.text_config IS NULL THEN p.text_config
                ELSE _text_config
            END,
            binary_index = coalesce(alter_pipeline.binary_index, p.binary_index),
            former_chunking = CASE
                WHEN _moves AND NOT _is_beside THEN jsonb_strip_nulls(jsonb_build_object(
                    'chunking', coalesce(p.chunk_function, p.chunking), 'chunk_size', p.chunk_size,
                    'chunk_overlap', p.chunk_overlap, 'chunk_prefix', p.chunk_prefix
                ))
                WHEN NOT _is_beside THEN p.former_chunking
            END
        WHERE p.id = _pipeline.id
        RETURNING p.id
    LOOP
    END LOOP;
    IF _moves AND NOT _is_beside THEN
        EXECUTE format('DROP TABLE %s', _pipeline.embeddings_table);
    END IF;
    IF _new_content OR _moves OR num_nonnulls(
        alter_pipeline.model, alter_pipeline.condition, alter_pipeline.chunking, alter_pipeline.chunk_size,
        alter_pipeline.chunk_overlap, alter_pipeline.chunk_prefix, nullif(alter_pipeline.text_config, '')
    ) > 0 THEN
        PERFORM autoembed._look_through(_pipeline, NULL, '{}', false);
    END IF;
    IF alter_pipeline.binary_index <> _pipeline.binary_index THEN
        PERFORM autoembed._replace_index(_pipeline.id);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.alter_pipeline IS
    'Changes how a table is embedded, by the arguments that are not NULL, and embeds the rows to which that makes a '
    'difference. An empty model is the default model. An empty condition, text_config or chunk_prefix is none. '
    'storage: beside or row, where the embeddings are to be. They go there without a request to the model, and the '
    'table is locked until the caller commits. Texts that come back beside the rows are cut as before. '
    'binary_index: the index has one bit for each dimension, or is one of numbers again; the new one is built '
    'concurrently, and takes the place of the old one.';

CREATE OR REPLACE FUNCTION autoembed._new_place(
    pipeline autoembed.pipeline,
    model text,
    OUT embeddings_table regclass,
    OUT embedding_column name
)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    _void := autoembed._refuse_without_vectors(
        pipeline.table_id,
        CASE WHEN pipeline.embeddings_table IS NOT NULL THEN pipeline.embedding_column END, current_user
    );
    IF pipeline.embeddings_table IS NULL THEN
        embeddings_table := autoembed._make_embeddings_table(
            pipeline.table_id, NULL, autoembed._dimensions(_new_place.model)
        );
        embedding_column := 'embedding';
    ELSE
        embedding_column := pipeline.embedding_column;
        _void := autoembed._execute(format(
            'ALTER TABLE %s ADD COLUMN IF NOT EXISTS %I @extschema:vector@.halfvec(%s)',
            pipeline.table_id, embedding_column, autoembed._dimensions(_new_place.model)
        ));
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._new_place IS
    'Makes the place to which the embeddings of a pipeline move: a table beside the rows, or a column in them.';

CREATE OR REPLACE FUNCTION autoembed.disable(
    table_name regclass,
    embedding_column name DEFAULT NULL,
    drop boolean DEFAULT false,
    if_exists boolean DEFAULT false
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET row_security = on
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _embeddings_table regclass;
    _ended text[] := '{}'::text[];
    _void text;
BEGIN
    IF NOT EXISTS (
        SELECT FROM autoembed.pipeline AS p
        WHERE disable.table_name IN (p.table_id, p.embeddings_table)
          AND (disable.embedding_column IS NULL OR p.embedding_column = disable.embedding_column)
    ) THEN
        _void := autoembed._check_owner(table_name);
        IF autoembed._drop_stray_triggers(table_name) > 0 THEN
            RETURN;
        ELSIF if_exists THEN
            RAISE NOTICE '% is not attached, skipping', concat_ws('.', table_name, quote_ident(embedding_column));
            RETURN;
        END IF;
    END IF;
    FOREACH _pipeline IN ARRAY autoembed._owned_pipelines(table_name, embedding_column) LOOP
        _void := autoembed._lock_table(_pipeline.table_id, true);
        _embeddings_table := (SELECT c.oid FROM pg_class AS c WHERE c.oid = _pipeline.embeddings_table);
        IF disable.drop AND _embeddings_table IS NOT NULL THEN
            _void := autoembed._lock_table(_pipeline.embeddings_table, true);
        END IF;
        _ended := _ended || coalesce(
            _pipeline.embeddings_table::text, format('column "%s"', _pipeline.embedding_column)
        );
        _void := autoembed._check_chunks_view(_pipeline);
        UPDATE autoembed.pipeline AS p SET ended = true WHERE p.id = _pipeline.id;
        IF disable.drop AND _embeddings_table IS NOT NULL THEN
            EXECUTE format('DROP TABLE %s', _embeddings_table);
        ELSIF disable.drop AND _pipeline.embeddings_table IS NULL THEN
            EXECUTE format('ALTER TABLE %s DROP COLUMN IF EXISTS %I', _pipeline.table_id, _pipeline.embedding_column);
        END IF;
    END LOOP;
    IF cardinality(_ended) > 1 THEN
        RAISE NOTICE 'table % had several embeddings, and all of them are %: %',
            table_name, CASE WHEN disable.drop THEN 'dropped' ELSE 'detached' END, array_to_string(_ended, ', ');
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.disable IS
    'Ends the embedding of a table that the caller owns, or of one column of it. Triggers, jobs and failures go. The '
    'vectors stay unless drop is true. With if_exists, a table that is not attached is no error. Triggers that '
    'a dump has brought without their pipeline go, too.';

CREATE OR REPLACE FUNCTION autoembed._set_paused(table_name regclass, embedding_column name, paused boolean)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET row_security = on
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
BEGIN
    FOREACH _pipeline IN ARRAY autoembed._owned_pipelines(table_name, embedding_column) LOOP
        UPDATE autoembed.pipeline AS p SET paused = _set_paused.paused WHERE p.id = _pipeline.id;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._set_paused IS
    'Pauses or resumes the pipelines of a table that the caller owns, or the one of that column.';

CREATE OR REPLACE FUNCTION autoembed.pause(table_name regclass, embedding_column name DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    _void := autoembed._set_paused(table_name, embedding_column, true);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.pause IS
    'Stops the embedding of a table that the caller owns, or of one column of it, until resume(). Changes are still '
    'queued.';

CREATE OR REPLACE FUNCTION autoembed.resume(table_name regclass, embedding_column name DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    _void := autoembed._set_paused(table_name, embedding_column, false);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.resume IS 'Ends a pause of a table that the caller owns, or of one column of it.';

CREATE OR REPLACE FUNCTION autoembed.resync(table_name regclass, embedding_column name DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET row_security = on
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _void text;
BEGIN
    FOREACH _pipeline IN ARRAY autoembed._owned_pipelines(table_name, embedding_column) LOOP
        IF _pipeline.managed AND EXISTS (SELECT FROM autoembed._trigger_problems(_pipeline)) THEN
            _void := autoembed._lock_table(_pipeline.table_id, false);
        END IF;
        -- This assignment fires the trigger that makes missing or disabled triggers again.
        UPDATE autoembed.pipeline AS p SET on_change = p.on_change WHERE p.id = _pipeline.id AND p.managed;
        PERFORM autoembed._look_through(_pipeline, NULL, '{}', false);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.resync IS
    'Scans all rows of a table that the caller owns, and embeds those whose embedding is missing or stale: after a '
    'restore, a load with triggers off, or a change of model. Makes autoembed''s triggers again where they are missing '
    'or disabled, and the policy and the view for readers of embeddings beside the rows. A row whose embedding is '
    'fresh is not sent.';

CREATE OR REPLACE FUNCTION autoembed.reembed(
    table_name regclass,
    embedding_column name DEFAULT NULL,
    condition text DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline CONSTANT autoembed.pipeline := autoembed._owned_pipeline(table_name, embedding_column);
    _condition CONSTANT record := autoembed._read_condition(_pipeline.table_id, reembed.condition);
BEGIN
    PERFORM autoembed._look_through(_pipeline, _condition.condition, _condition.objects, true);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.reembed IS
    'Embeds all rows of a table that the caller owns again, or those for which a condition holds, fresh or not.';

CREATE OR REPLACE FUNCTION autoembed._look_through(
    pipeline autoembed.pipeline,
    condition text,
    condition_objects jsonb,
    force boolean
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET row_security = on
AS $plpgsql$
BEGIN
    -- A backfill in progress is widened, not replaced: to all rows, unless both have the same condition.
    INSERT INTO autoembed.backfill AS b (pipeline_id, condition, condition_objects, force, create_index)
    SELECT p.id, _look_through.condition, _look_through.condition_objects, _look_through.force, false
    FROM autoembed.pipeline AS p
    WHERE p.id = (_look_through.pipeline).id
    -- It does not end meanwhile.
    FOR KEY SHARE
    ON CONFLICT ON CONSTRAINT backfill_pkey DO UPDATE
    SET condition = CASE WHEN b.condition = excluded.condition THEN excluded.condition END,
        condition_objects = excluded.condition_objects,
        force = b.force OR excluded.force,
        position = NULL, rows_queued = 0, started_at = clock_timestamp(), scanned_at = NULL,
        index_problem = NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._look_through IS
    'Starts a backfill of a pipeline, or widens the one in progress and starts it again. force: fresh rows are '
    'embedded too.';
