-- Pipelines: the keys of their rows, and their texts.

CREATE OR REPLACE FUNCTION autoembed._partition_tree(table_id oid)
    RETURNS TABLE (relid regclass, level integer, isleaf boolean)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH RECURSIVE tree AS (
        SELECT c.oid, 0 AS level FROM pg_class AS c
        WHERE c.oid = table_id AND (c.relkind = 'p' OR c.relispartition)
        UNION ALL
        SELECT i.inhrelid, t.level + 1
        FROM tree AS t
        JOIN pg_inherits AS i ON i.inhparent = t.oid AND NOT i.inhdetachpending
    )
    SELECT t.oid, t.level, c.relkind <> 'p' FROM tree AS t JOIN pg_class AS c ON c.oid = t.oid;
$sql$;
COMMENT ON FUNCTION autoembed._partition_tree IS
    'The partitions of a table, as pg_partition_tree() returns them. Locks none of them: a lock that an event trigger '
    'waits for can be a deadlock.';

CREATE OR REPLACE FUNCTION autoembed._owns(table_id regclass)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT coalesce((SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class AS c WHERE c.oid = table_id), false);
$sql$;
COMMENT ON FUNCTION autoembed._owns IS 'Whether the current role has the rights of a table''s owner.';

CREATE OR REPLACE FUNCTION autoembed._is_empty(table_id regclass)
    RETURNS boolean
    LANGUAGE sql
    VOLATILE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- pg_relation_size() would wait for the lock of a session that alters the table.
    SELECT coalesce(
        bool_and(c.relkind = 'r' AND (pg_stat_file(pg_relation_filepath(c.oid), true)).size = 0), true
    )
    FROM (SELECT t.relid FROM autoembed._partition_tree(table_id) AS t WHERE t.isleaf UNION SELECT table_id) AS r
    JOIN pg_class AS c ON c.oid = r.relid AND c.relkind <> 'p';
$sql$;
COMMENT ON FUNCTION autoembed._is_empty IS
    'Whether a table has no page, and so no row. Reads and locks nothing. A table whose rows were deleted may have '
    'pages.';

CREATE OR REPLACE FUNCTION autoembed._may_see(table_id regclass)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT autoembed._owns(table_id) OR pg_has_role('pg_monitor', 'USAGE');
$sql$;
COMMENT ON FUNCTION autoembed._may_see IS 'Whether the current role owns a table or monitors the server.';

CREATE OR REPLACE FUNCTION autoembed._vector_types()
    RETURNS TABLE (id oid, name name, full_name text)
    LANGUAGE plpgsql
    STABLE
    -- PL/pgSQL keeps the plan, where PostgreSQL 17 plans a function in SQL at each call.
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Members of the extension: a type of that name elsewhere may be anybody's.
    RETURN QUERY
    SELECT t.oid, t.typname, format('%I.%I', n.nspname, t.typname)
    FROM pg_extension AS e
    JOIN pg_namespace AS n ON n.oid = e.extnamespace
    JOIN pg_type AS t ON t.typnamespace = e.extnamespace AND t.typname IN ('vector', 'halfvec')
    JOIN pg_depend AS d ON d.classid = 'pg_type'::regclass AND d.objid = t.oid
                       AND d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
    WHERE e.extname = 'vector';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._vector_types IS
    'The types of pgvector that hold embeddings: OID, name, and name with the schema.';

CREATE OR REPLACE FUNCTION autoembed._function_named(
    table_id oid,
    argument oid,
    gives_set boolean,
    name text,
    schema_name name DEFAULT NULL
)
    RETURNS oid
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT p.oid
        FROM pg_class AS c
        -- The name without a schema comes first, since it has an index.
        JOIN pg_proc AS p
            ON p.proname IN (
                name,
                substring(name FROM '^"(.*)"$'),
                substring(name FROM '[.]([^.]*)$'),
                substring(name FROM '[.]"(.*)"$')
            )
           AND p.proargtypes[0] = argument AND p.pronargs = 1 AND p.prokind = 'f' AND p.proretset = gives_set
        JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE c.oid = table_id
          AND name IN (
              p.proname::text, quote_ident(p.proname),
              format('%s.%s', n.nspname, p.proname), format('%I.%I', n.nspname, p.proname)
          )
          AND n.nspname = coalesce(schema_name, n.nspname)
        -- The caller's search_path is not known here.
        ORDER BY p.pronamespace = c.relnamespace DESC, p.oid
        LIMIT 1
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._function_named IS
    'The function of one argument with that name, which may have its schema before it. Without a schema, one in the '
    'schema of the table is preferred. gives_set: whether it returns a set. NULL if there is none.';

CREATE OR REPLACE FUNCTION autoembed._content_function(table_id oid, name text, schema_name name DEFAULT NULL)
    RETURNS oid
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN autoembed._function_named(
        table_id, (SELECT c.reltype FROM pg_class AS c WHERE c.oid = table_id), false, name, schema_name
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_function IS
    'The function of one row of the table with that name, as _function_named() finds it. NULL if there is none.';

CREATE OR REPLACE FUNCTION autoembed._content_function_of(pipeline autoembed.pipeline)
    RETURNS oid
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- In a dump of 0.1.0, the type of the argument follows the name.
    _name text[] := parse_ident(pipeline.content_function_id, false);
BEGIN
    RETURN coalesce(
        -- After pg_upgrade or a restore, another function may have that OID.
        (SELECT p.oid
         FROM pg_proc AS p
         JOIN pg_class AS c ON c.oid = pipeline.table_id AND p.proargtypes[0] = c.reltype
         WHERE p.oid = pipeline.content_function_oid AND p.pronargs = 1 AND p.proname = _name[2]),
        -- A function that was dropped and created again has another OID.
        autoembed._content_function(pipeline.table_id, quote_ident(_name[2]), _name[1]),
        autoembed._content_function(pipeline.table_id, pipeline.content_function, _name[1])
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_function_of IS 'The content function of a pipeline; NULL if there is none.';

CREATE OR REPLACE FUNCTION autoembed._chunk_function_of(pipeline autoembed.pipeline)
    RETURNS oid
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $plpgsql$
BEGIN
    RETURN coalesce(
        -- After pg_upgrade or a restore, another function may have that OID.
        (SELECT p.oid
         FROM pg_proc AS p
         WHERE p.oid = pipeline.chunk_function_oid AND p.pronargs = 1 AND p.proargtypes[0] = 'text'::regtype
           AND p.proretset
           AND right(pipeline.chunk_function, length(quote_ident(p.proname)) + 1) = '.' || quote_ident(p.proname)),
        autoembed._function_named(
            pipeline.table_id, 'text'::regtype, true, regexp_replace(pipeline.chunk_function, '[(]text[)]$', '')
        )
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._chunk_function_of IS
    'The function that cuts the texts of a pipeline into chunks; NULL if there is none.';

CREATE OR REPLACE FUNCTION autoembed._chunk_call(pipeline autoembed.pipeline)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF pipeline.chunk_function IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN coalesce(
        (SELECT format('%I.%I', n.nspname, p.proname)
         FROM pg_proc AS p
         JOIN pg_namespace AS n ON n.oid = p.pronamespace
         JOIN pg_class AS c ON c.oid = pipeline.table_id AND pg_has_role(p.proowner, c.relowner, 'SET')
         WHERE p.oid = autoembed._chunk_function_of(pipeline)),
        -- A function that is gone, or whose owner may not run code as the table's owner, is an error in what calls it.
        -- Nobody can create one in this schema.
        format('autoembed.%I', pipeline.chunk_function)
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._chunk_call IS
    'The function that cuts the texts of a pipeline, as a call names it; NULL if none is to cut them.';

CREATE OR REPLACE FUNCTION autoembed._chunking(chunking text, OUT way text, OUT chunk_function text)
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT CASE WHEN k.is_known THEN chunking WHEN chunking IS NOT NULL THEN 'function' END,
           CASE WHEN NOT k.is_known THEN chunking END
    FROM (SELECT chunking IN ('structure', 'tokens', 'none') AS is_known) AS k;
$sql$;
COMMENT ON FUNCTION autoembed._chunking IS
    'The argument chunking of enable() as columns of a pipeline: a way to cut, or the name of a function that cuts.';

CREATE OR REPLACE FUNCTION autoembed._key_columns(table_id oid)
    RETURNS name[]
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT k.columns
    FROM pg_index AS i
    CROSS JOIN LATERAL (
        SELECT array_agg(a.attname ORDER BY n.position) AS columns, bool_and(a.attnotnull) AS not_null
        FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS n(number, position)
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = n.number
        WHERE n.position <= i.indnkeyatts
    ) AS k
    WHERE i.indrelid = table_id AND i.indisunique AND i.indisvalid
      AND i.indpred IS NULL AND i.indexprs IS NULL AND k.not_null
    ORDER BY i.indisprimary DESC, i.indisreplident DESC, i.indimmediate DESC, i.indnkeyatts, i.indexrelid
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._key_columns IS
    'The columns that tell the rows of a table apart: its primary key, else its replica identity, else a unique index '
    'without NULLs. NULL if there is none.';

CREATE OR REPLACE FUNCTION autoembed._template(template text)
    RETURNS TABLE (literal text, column_name text)
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY
    SELECT CASE
               WHEN t.part[1] IN ('{{', '}}', E'\\\\') THEN left(t.part[1], 1)
               WHEN t.part[1] = E'\\n' THEN E'\n'
               WHEN t.part[2] IS NULL THEN t.part[1]
           END,
           replace(t.part[2], '""', '"')
    FROM regexp_matches(template, E'([{][{]|[}][}]|\\\\\\\\|\\\\n|[{]([^{}]+)[}]|[^{}\\\\]+|.)', 'g')
        WITH ORDINALITY AS t(part, position)
    ORDER BY t.position;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._template IS
    E'The parts of a template in order: literal text, or a column. {{ and }} are braces, \\n is a line break, \\\\ a '
    'backslash.';

CREATE OR REPLACE FUNCTION autoembed._columns_of(pipeline autoembed.pipeline)
    RETURNS name[]
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce(
        pipeline.content_columns,
        (SELECT array_agg(DISTINCT t.column_name::name) FROM autoembed._template(pipeline.content_template) AS t
         WHERE t.column_name IS NOT NULL),
        '{}'
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._columns_of IS 'The columns that a pipeline names as its content.';

CREATE OR REPLACE FUNCTION autoembed._prefix_of(pipeline autoembed.pipeline)
    RETURNS autoembed.pipeline
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    pipeline.content_template := pipeline.chunk_prefix;
    pipeline.content_columns := NULL;
    pipeline.content_function := NULL;
    pipeline.condition := NULL;
    RETURN pipeline;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._prefix_of IS
    'The pipeline whose texts are what the chunks of a pipeline are embedded behind. It has no columns if that is '
    'nothing.';

CREATE OR REPLACE FUNCTION autoembed._needed_columns(pipeline autoembed.pipeline)
    RETURNS name[]
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN pipeline.key_columns || autoembed._columns_of(pipeline)
        || autoembed._columns_of(autoembed._prefix_of(pipeline))
        || ARRAY(SELECT c.value::name FROM jsonb_each_text(pipeline.condition_columns) AS c);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._needed_columns IS
    'The columns without which a pipeline cannot work, its embedding column aside.';

CREATE OR REPLACE FUNCTION autoembed._objects_named(name text)
    RETURNS TABLE (class regclass, id oid, namespace oid, owner oid, yields boolean)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT 'pg_proc'::regclass, p.oid, p.pronamespace, p.proowner,
           p.pronargdefaults > 0 OR p.provariadic <> 0 OR EXISTS (
               SELECT FROM unnest(p.proargtypes) AS a(id) JOIN pg_type AS t ON t.oid = a.id AND t.typtype = 'p'
           )
    FROM pg_proc AS p
    WHERE p.proname = _objects_named.name
    UNION ALL
    SELECT 'pg_operator'::regclass, p.oid, p.oprnamespace, p.oprowner, EXISTS (
               SELECT FROM pg_type AS t WHERE t.oid IN (p.oprleft, p.oprright) AND t.typtype = 'p'
           )
    FROM pg_operator AS p
    WHERE p.oprname = _objects_named.name
    UNION ALL
    SELECT 'pg_type'::regclass, t.oid, t.typnamespace, t.typowner, false FROM pg_type AS t
    WHERE t.typname = _objects_named.name
    UNION ALL
    SELECT 'pg_collation'::regclass, c.oid, c.collnamespace, c.collowner, false FROM pg_collation AS c
    WHERE c.collname = _objects_named.name;
$sql$;
COMMENT ON FUNCTION autoembed._objects_named IS
    'The functions, operators, types and collations of a name. yields: PostgreSQL prefers another one of that name '
    'that has exactly the types of the arguments.';

CREATE OR REPLACE FUNCTION autoembed._condition_objects(table_id regclass, objects jsonb)
    RETURNS TABLE (description text, class regclass, id oid, namespace oid, name text, rivals oid[], problem text)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $sql$
    -- An owner may have thousands of objects of a name. Each is identified once.
    WITH candidate AS MATERIALIZED (
        SELECT n.name, c.*, i.identity
        FROM (SELECT DISTINCT o.value ->> 'name' AS name FROM jsonb_each(objects) AS o) AS n
        CROSS JOIN LATERAL autoembed._objects_named(n.name) AS c
        CROSS JOIN LATERAL pg_identify_object(c.class, c.id, 0) AS i
        -- PostgreSQL's own are not noted.
        WHERE c.namespace <> 'pg_catalog'::regnamespace
    )
    SELECT concat_ws(' ', o.value ->> 'type', o.key), f.class, f.id, f.namespace, o.value ->> 'name', f.rivals, CASE
               WHEN f.id IS NULL THEN 'is gone or has another name'
               WHEN NOT f.trusted THEN format('belongs to role %I now', pg_get_userbyid(f.owner))
               WHEN f.rival IS NOT NULL THEN
                   format('yields to one of role %I of the same name', pg_get_userbyid(f.rival))
           END
    FROM jsonb_each(objects) AS o
    JOIN pg_class AS t ON t.oid = table_id
    LEFT JOIN LATERAL (
        WITH named AS (
            SELECT c.*, c.id::text = o.value ->> 'oid' AS is_known,
                   -- Its owner may run code as the table's owner anyway, or could when the condition was given.
                   -- Version 0.1.0 noted no owner.
                   c.id::text = o.value ->> 'oid' OR pg_has_role(c.owner, t.relowner, 'SET')
                   OR pg_get_userbyid(c.owner) = coalesce(o.value ->> 'owner', pg_get_userbyid(c.owner)) AS trusted
            FROM candidate AS c
            WHERE c.name = o.value ->> 'name'
        )
        SELECT c.*, r.ids AS rivals, r.owner AS rival
        FROM named AS c
        LEFT JOIN LATERAL (
            SELECT array_agg(n.id ORDER BY n.id) AS ids, min(n.owner) FILTER (WHERE NOT n.trusted) AS owner
            FROM named AS n
            WHERE c.yields AND n.class = c.class AND n.namespace = c.namespace
        ) AS r ON true
        -- An object of the same identity that was created since is as good, once the other is gone. Its types may have
        -- other names by now: the condition does not name them.
        WHERE c.identity = o.key
              AND NOT EXISTS (SELECT FROM named AS k WHERE k.is_known AND k.namespace <> c.namespace)
           OR c.is_known AND split_part(c.identity, '(', 1) = split_part(o.key, '(', 1)
        ORDER BY c.is_known DESC, c.trusted DESC
        LIMIT 1
    ) AS f ON true
    ORDER BY o.key;
$sql$;
COMMENT ON FUNCTION autoembed._condition_objects IS
    'The functions, operators, types and collations of a condition on a table. objects: as in '
    'autoembed.pipeline.condition_objects. rivals: those of the same name among which PostgreSQL chooses; NULL: there '
    'is no choice. problem: the reason why the condition may not run with the rights of the table''s owner.';

CREATE OR REPLACE FUNCTION autoembed._condition_problem(table_id regclass, objects jsonb)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT format('the condition on table %s uses %s, which %s', table_id, o.description, o.problem)
    FROM autoembed._condition_objects(table_id, objects) AS o
    WHERE o.problem IS NOT NULL
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._condition_problem IS
    'A sentence about a function, operator, type or collation of a condition on a table that no longer is what it was. '
    'NULL if there is none. objects: as in autoembed.pipeline.condition_objects.';

CREATE OR REPLACE FUNCTION autoembed._used_types(types oid[])
    RETURNS SETOF oid
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH RECURSIVE used AS (
        SELECT g.id FROM unnest(types) AS g(id)
        UNION
        SELECT p.id
        FROM used AS u
        JOIN pg_type AS t ON t.oid = u.id
        CROSS JOIN LATERAL (
            SELECT t.typbasetype AS id
            UNION ALL
            SELECT t.typelem
            UNION ALL
            SELECT r.rngsubtype FROM pg_range AS r WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
            UNION ALL
            SELECT a.atttypid FROM pg_attribute AS a
            WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        ) AS p
        WHERE p.id <> 0
    )
    SELECT u.id FROM used AS u;
$sql$;
COMMENT ON FUNCTION autoembed._used_types IS
    'These types, and those that they are made of: base types, elements, bounds and attributes.';

CREATE OR REPLACE FUNCTION autoembed._key_operator(table_id oid, column_name name, strategy integer)
    RETURNS oid
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- An SQL function would be planned again for each claim: 1 ms.
    -- The operator is that of the index. Its name alone might mean another one, or none if its schema is not searched.
    RETURN (
        SELECT m.amopopr
        FROM pg_index AS i
        CROSS JOIN LATERAL unnest(i.indkey::smallint[], i.indclass::oid[]) AS k(number, class)
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.number AND a.attname = column_name
        JOIN pg_opclass AS c ON c.oid = k.class
        JOIN pg_amop AS m
            ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype
           AND m.amopstrategy = strategy
        JOIN pg_am ON pg_am.oid = m.amopmethod AND pg_am.amname = 'btree'
        WHERE i.indrelid = table_id AND i.indisunique
        ORDER BY i.indisprimary DESC, i.indisreplident DESC, i.indexrelid
        LIMIT 1
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._key_operator IS
    'The operator by which the index of a key compares a column: 3 for equal, 5 for greater, as B-tree strategies are '
    'numbered. NULL: there is no such index.';

CREATE OR REPLACE FUNCTION autoembed._operator(table_id oid, column_name name, strategy integer)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce((
        SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname)
        FROM pg_operator AS o
        JOIN pg_namespace AS n ON n.oid = o.oprnamespace
        WHERE o.oid = autoembed._key_operator(table_id, column_name, strategy)
    ), format('OPERATOR(pg_catalog.%s)', (ARRAY['<', '<=', '=', '>=', '>'])[strategy]));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._operator IS
    'How an expression writes the operator of _key_operator(), or PostgreSQL''s own where there is none.';

CREATE OR REPLACE FUNCTION autoembed._is_spelled_one_way(pipeline autoembed.pipeline)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- A B-tree index whose operator class promises that equal values are the same bytes merges its duplicates.
    SELECT NOT EXISTS (
        SELECT FROM unnest(pipeline.key_columns) AS k(name)
        WHERE NOT EXISTS (
            SELECT FROM pg_index AS i
            CROSS JOIN LATERAL unnest(i.indkey::smallint[], i.indclass::oid[], i.indcollation::oid[])
                AS n(number, class, collation_id)
            JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = n.number AND a.attname = k.name
            JOIN pg_opclass AS c ON c.oid = n.class
            JOIN pg_amproc AS p
                ON p.amprocfamily = c.opcfamily AND p.amproclefttype = c.opcintype AND p.amprocrighttype = c.opcintype
               AND p.amprocnum = 4
            LEFT JOIN pg_collation AS l ON l.oid = n.collation_id
            WHERE i.indrelid = pipeline.table_id AND i.indisunique
              AND (p.amproc = 'btequalimage(oid)'::regprocedure
                   OR p.amproc = 'btvarstrequalimage(oid)'::regprocedure AND l.collisdeterministic IS NOT FALSE)
        )
    );
$sql$;
COMMENT ON FUNCTION autoembed._is_spelled_one_way IS
    'Whether equal keys are always written in the same way. 1.0 and 1.00 are equal, and so are ways to write a citext.';

CREATE OR REPLACE FUNCTION autoembed._content_expression(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _columns text;
    _text text;
BEGIN
    -- concat() uses output functions. A cast to text may be the owner's, and triggers evaluate this with more rights.
    -- A text is not copied. An empty string counts as NULL: nullif() would take its operator from the search_path.
    SELECT string_agg(format('CASE WHEN %1$s OPERATOR(pg_catalog.<>) '''' THEN %1$s END', format(
               CASE
                   WHEN a.atttypid IN ('text'::regtype, 'varchar'::regtype) THEN '%s.%I::pg_catalog.text'
                   ELSE 'pg_catalog.concat(%s.%I)'
               END, alias, c.name
           )), ', ' ORDER BY c.position)
    INTO _columns
    FROM unnest(autoembed._columns_of(pipeline)) WITH ORDINALITY AS c(name, position)
    LEFT JOIN pg_attribute AS a ON a.attrelid = pipeline.table_id AND a.attname = c.name;
    IF pipeline.content_columns IS NOT NULL THEN
        _text := format(
            CASE
                WHEN cardinality(pipeline.content_columns) = 1 THEN 'coalesce(%2$s, '''')'
                WHEN cardinality(pipeline.content_columns) < 100 THEN 'pg_catalog.concat_ws(%1$L, %2$s)'
                -- A function takes up to a hundred arguments, and an array any number.
                ELSE 'pg_catalog.concat_ws(%1$L, VARIADIC ARRAY[%2$s])'
            END, E'\n\n', _columns
        );
    ELSIF pipeline.content_template IS NOT NULL THEN
        SELECT format(
            CASE
                WHEN count(*) < 100 THEN 'CASE WHEN pg_catalog.num_nonnulls(%1$s) OPERATOR(pg_catalog.>) 0 '
                    'THEN pg_catalog.concat(%2$s) END'
                ELSE 'CASE WHEN pg_catalog.num_nonnulls(VARIADIC ARRAY[%1$s]) OPERATOR(pg_catalog.>) 0 '
                    'THEN pg_catalog.concat(VARIADIC ARRAY[%3$s]) END'
            END,
            _columns,
            string_agg(CASE
                WHEN t.column_name IS NULL THEN quote_literal(t.literal)
                ELSE format('%s.%I', alias, t.column_name)
            END, ', '),
            string_agg(CASE
                WHEN t.column_name IS NULL THEN quote_literal(t.literal)
                ELSE format('pg_catalog.concat(%s.%I)', alias, t.column_name)
            END, ', ')
        )
        INTO _text
        FROM autoembed._template(pipeline.content_template) AS t;
    ELSE
        -- With .* the alias cannot be taken for a column of that name.
        SELECT format('%I.%I(%s.*)::pg_catalog.text', n.nspname, p.proname, alias) INTO _text
        FROM pg_proc AS p
        JOIN pg_namespace AS n ON n.oid = p.pronamespace
        JOIN pg_class AS c ON c.oid = pipeline.table_id AND pg_has_role(p.proowner, c.relowner, 'SET')
        WHERE p.oid = autoembed._content_function_of(pipeline);
        -- A function that is gone, or whose owner may not run code as the table's owner, is an error in what calls it.
        -- Nobody can create one in this schema.
        _text := coalesce(_text, format('autoembed.%I(%s.*)', pipeline.content_function, alias));
    END IF;
    IF pipeline.condition IS NOT NULL THEN
        _text := format('CASE WHEN (SELECT (%s) FROM (SELECT %s) AS r) THEN %s END', pipeline.condition, (
            SELECT string_agg(format('%s.%I AS %I', alias, c.value, c.key), ', ')
            FROM jsonb_each_text(pipeline.condition_columns) AS c
        ), _text);
    END IF;
    RETURN _text;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_expression IS
    'The SQL expression that gives the text of the row of that alias; NULL in rows that have no embedding.';

CREATE OR REPLACE FUNCTION autoembed._prefix_expression(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF pipeline.chunk_prefix IS NULL THEN
        RETURN 'NULL::pg_catalog.text';
    END IF;
    RETURN format('((%s) OPERATOR(pg_catalog.||) %L)',
                  autoembed._content_expression(autoembed._prefix_of(pipeline), alias), E'\n\n');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._prefix_expression IS
    'The SQL expression that gives what the chunks of the row of that alias are embedded behind, with a blank line; '
    'NULL in rows that have nothing there.';

CREATE OR REPLACE FUNCTION autoembed._function_guard(function oid, problem text)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- NULL: there is no such function. Its schema may have another name, and another schema its name.
    SELECT format($$IF pg_catalog.has_function_privilege(%s::pg_catalog.oid, 'EXECUTE') IS NULL
        OR (pg_catalog.to_regnamespace(%L)::pg_catalog.oid OPERATOR(pg_catalog.=) %s::pg_catalog.oid) IS NOT TRUE THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_function', MESSAGE = %L;
    END IF;$$, coalesce(function, 0), n.oid::regnamespace, coalesce(n.oid, 0), problem)
    FROM (VALUES (function)) AS f(id)
    LEFT JOIN pg_proc AS p ON p.oid = f.id
    LEFT JOIN pg_namespace AS n ON n.oid = p.pronamespace;
$sql$;
COMMENT ON FUNCTION autoembed._function_guard IS
    'A statement that fails with this problem once a function is gone, or its schema has another name.';

CREATE OR REPLACE FUNCTION autoembed._condition_guard(pipeline autoembed.pipeline)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
AS $sql$
    SELECT format($$IF (%s) IS NOT TRUE THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = 'an object that the condition names is gone, is another one or is in a schema of another name';
    END IF;$$, string_agg(CASE
        WHEN o.problem IS NOT NULL THEN 'false'
        ELSE concat_ws(
            ' AND ',
            format('pg_catalog.to_regnamespace(%L)::pg_catalog.oid OPERATOR(pg_catalog.=) %s::pg_catalog.oid',
                   o.namespace::regnamespace, o.namespace),
            format('EXISTS (SELECT FROM pg_catalog.%1$I AS o WHERE o.oid OPERATOR(pg_catalog.=) %2$s::pg_catalog.oid '
                   'AND o.%3$I OPERATOR(pg_catalog.=) %4$L::pg_catalog.name '
                   'AND o.%5$I OPERATOR(pg_catalog.=) %6$s::pg_catalog.oid)',
                   c.relname, o.id, n.name_column, o.name, n.namespace_column, o.namespace),
            CASE WHEN o.rivals IS NOT NULL THEN
                format('ARRAY(SELECT o.oid FROM pg_catalog.%1$I AS o WHERE o.%2$I OPERATOR(pg_catalog.=) '
                       '%3$L::pg_catalog.name AND o.%4$I OPERATOR(pg_catalog.=) %5$s::pg_catalog.oid ORDER BY o.oid) '
                       'OPERATOR(pg_catalog.=) %6$L::pg_catalog.oid[]',
                       c.relname, n.name_column, o.name, n.namespace_column, o.namespace, o.rivals)
            END
        )
    END, ' AND ' ORDER BY o.description))
    FROM autoembed._condition_objects(pipeline.table_id, pipeline.condition_objects) AS o
    LEFT JOIN pg_class AS c ON c.oid = o.class
    LEFT JOIN (VALUES
        ('pg_proc', 'proname', 'pronamespace'),
        ('pg_operator', 'oprname', 'oprnamespace'),
        ('pg_type', 'typname', 'typnamespace'),
        ('pg_collation', 'collname', 'collnamespace')
    ) AS n(class, name_column, namespace_column) ON n.class = c.relname
    HAVING count(*) > 0;
$sql$;
COMMENT ON FUNCTION autoembed._condition_guard IS
    'A statement that fails once an object that a condition names may be another one. NULL: it names none.';

CREATE OR REPLACE FUNCTION autoembed._content_guard(pipeline autoembed.pipeline)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT concat_ws(' ', autoembed._condition_guard(pipeline), CASE
        WHEN pipeline.content_function IS NOT NULL THEN autoembed._function_guard(
            autoembed._content_function_of(pipeline),
            format('the content function %s was dropped or replaced', pipeline.content_function)
        )
    END);
$sql$;
COMMENT ON FUNCTION autoembed._content_guard IS
    'The statements that fail once the content function of a pipeline, or an object of its condition, may be another '
    'one of the same name. Empty if the pipeline has neither.';

CREATE OR REPLACE FUNCTION autoembed._content_bytes_expression(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce((
        SELECT string_agg(format('coalesce(pg_catalog.%s(%s.%I), 0)::pg_catalog.int8', CASE
                   WHEN a.atttypid IN ('text'::regtype, 'varchar'::regtype) THEN 'octet_length'
                   ELSE 'pg_column_size'
               END, alias, a.attname), ' OPERATOR(pg_catalog.+) ' ORDER BY a.attnum)
        FROM pg_attribute AS a
        WHERE a.attrelid = pipeline.table_id AND a.attlen = -1 AND a.attname = ANY ((
            SELECT autoembed._columns_of(pipeline) || autoembed._columns_of(autoembed._prefix_of(pipeline))
        )::name[])
    ), '0::pg_catalog.int8');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_bytes_expression IS
    'The SQL expression that gives the bytes of the columns that a text is made of, without reading them. 0 where a '
    'function gives the text.';

CREATE OR REPLACE FUNCTION autoembed._readable_text(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- A function of the owner gets no rights of the caller.
    IF pipeline.content_function IS NOT NULL THEN
        RETURN 'NULL::pg_catalog.text';
    END IF;
    -- A row that has a chunk fulfilled the condition.
    pipeline.condition := NULL;
    RETURN autoembed._content_expression(pipeline, alias);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._readable_text IS
    'The SQL expression of the text of the row of that alias, for those who read its chunks; NULL if a function gives '
    'it.';

CREATE OR REPLACE FUNCTION autoembed._passage_expression(
    pipeline autoembed.pipeline,
    alias text,
    chunk_start text,
    chunk_end text,
    digest text,
    part text DEFAULT NULL
)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _identity text;
BEGIN
    -- A function of the owner gets no rights of the caller.
    IF pipeline.content_function IS NOT NULL THEN
        RETURN 'NULL::pg_catalog.text';
    END IF;
    SELECT autoembed._model_identity(m) INTO _identity FROM autoembed._model(pipeline.model) AS m;
    part := coalesce(part, format(
        'pg_catalog.substr(%1$s, %2$s OPERATOR(pg_catalog.+) 1, %3$s OPERATOR(pg_catalog.-) %2$s)',
        autoembed._readable_text(pipeline, alias), chunk_start, chunk_end
    ));
    RETURN format(
        '(SELECT p.part FROM (SELECT %1$s AS part OFFSET 0) AS p '
        'WHERE pg_catalog.substring(pg_catalog.sha256(%2$L::pg_catalog.bytea OPERATOR(pg_catalog.||) '
        'pg_catalog.convert_to(%4$s, ''UTF8'')), 1, 16) OPERATOR(pg_catalog.=) %3$s)',
        part, sha256(convert_to(_identity, 'UTF8')), digest,
        CASE
            WHEN pipeline.chunk_prefix IS NULL THEN 'p.part'
            ELSE format('pg_catalog.concat(%s, p.part)', autoembed._prefix_expression(pipeline, alias))
        END
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._passage_expression IS
    'The SQL expression that cuts a chunk out of the text of the row of that alias; NULL if that part of the text, or '
    'its prefix, is another by now, or if a function gives the text. part: the expression of that part, where it is '
    'known.';

CREATE OR REPLACE FUNCTION autoembed._passage_of_hit(pipeline autoembed.pipeline)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _passage CONSTANT text := autoembed._passage_expression(pipeline, '(h.hit)', 'h.start', 'h.stop', 'h.digest');
BEGIN
    IF pipeline.embeddings_table IS NULL OR pipeline.content_function IS NOT NULL
       OR autoembed._has_plain_text(pipeline) THEN
        RETURN _passage;
    END IF;
    -- The caller may have other settings than lanes.
    RETURN format(
        'coalesce(%s, autoembed._chunk_%s(%s, h.start, h.stop, h.digest))', _passage, pipeline.id,
        (SELECT string_agg(format('(h.hit).%I', k.name), ', ' ORDER BY k.number)
         FROM unnest(pipeline.key_columns) WITH ORDINALITY AS k(name, number))
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._passage_of_hit IS
    'The SQL expression of the passage of a row that search() has found, whatever the settings of its caller are.';

CREATE OR REPLACE FUNCTION autoembed._vector_digest_expression(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT CASE
        WHEN pipeline.embeddings_table IS NULL THEN
            format('pg_catalog.substring(pg_catalog.sha256(%I.%I(%s.%I)), 1, 8)',
                   n.nspname, p.proname, alias, a.attname)
        ELSE
            format('(SELECT pg_catalog.substring(pg_catalog.sha256(pg_catalog.string_agg(e.digest, '''' '
                   'ORDER BY e.chunk_number)), 1, 8) FROM %s AS e WHERE %s)',
                   pipeline.embeddings_table,
                   (SELECT string_agg(
                        format('e.%1$I %2$s %3$s.%1$I', k.name,
                               autoembed._operator(pipeline.table_id, k.name, 3), alias), ' AND '
                    )
                    FROM unnest(pipeline.key_columns) AS k(name)))
    END
    FROM pg_attribute AS a
    JOIN autoembed._vector_types() AS v ON v.id = a.atttypid
    JOIN pg_type AS t ON t.oid = v.id
    JOIN pg_proc AS p ON p.oid = t.typsend
    JOIN pg_namespace AS n ON n.oid = p.pronamespace
    WHERE a.attrelid = coalesce(pipeline.embeddings_table, pipeline.table_id)
      AND a.attname = pipeline.embedding_column AND NOT a.attisdropped;
$sql$;
COMMENT ON FUNCTION autoembed._vector_digest_expression IS
    'The SQL expression that gives the digest of the vector of the row of that alias, or of its chunks; NULL if the '
    'row has none. NULL if the column holds no vectors.';

CREATE OR REPLACE FUNCTION autoembed._beginning(name text, bytes integer)
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT left(_beginning.name, l.length)
    FROM generate_series(0, length(_beginning.name)) AS l(length)
    WHERE octet_length(left(_beginning.name, l.length)) <= bytes
    ORDER BY l.length DESC
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._beginning IS
    'As much of a name as has at most so many bytes. PostgreSQL cuts names of more than 63 bytes.';

CREATE OR REPLACE FUNCTION autoembed._short_key(key text)
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT CASE WHEN octet_length(key) <= 1000 THEN key
                ELSE 'sha256:' || encode(sha256(convert_to(key, 'UTF8')), 'hex') END;
$sql$;
COMMENT ON FUNCTION autoembed._short_key IS
    'A key as the tables of what is known of rows have it: a long one does not fit into an index.';

CREATE OR REPLACE FUNCTION autoembed._short_keys(keys text[])
    RETURNS text[]
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF EXISTS (SELECT FROM unnest(keys) AS k(key) WHERE octet_length(k.key) > 1000) THEN
        RETURN ARRAY(
            SELECT autoembed._short_key(k.key) FROM unnest(keys) WITH ORDINALITY AS k(key, number) ORDER BY k.number
        );
    END IF;
    RETURN keys;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._short_keys IS 'The same for many keys, in their order.';

CREATE OR REPLACE FUNCTION autoembed._is_plain(type_id oid)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT t.typtype = 'e' OR coalesce(nullif(t.typbasetype, 0), t.oid) IN (
            'bigint'::regtype, 'integer'::regtype, 'smallint'::regtype, 'numeric'::regtype, 'boolean'::regtype,
            'text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'name'::regtype, 'uuid'::regtype
        )
        FROM pg_type AS t
        WHERE t.oid = type_id
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._is_plain IS 'Whether no setting of a session changes how values of a type are written.';

CREATE OR REPLACE FUNCTION autoembed._has_plain_text(pipeline autoembed.pipeline)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = pipeline.table_id AND NOT autoembed._is_plain(a.atttypid)
          AND a.attname = ANY (
              autoembed._columns_of(pipeline) || autoembed._columns_of(autoembed._prefix_of(pipeline))
          )
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._has_plain_text IS
    'Whether no setting of a session changes how the columns of the texts and prefixes of a pipeline are written.';

CREATE OR REPLACE FUNCTION autoembed._key_expression(
    pipeline autoembed.pipeline,
    alias text,
    spelling text DEFAULT 'pg_catalog.concat(%s)'
)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT format('pg_catalog.concat(''['', %s, '']'')', string_agg(
            CASE
                WHEN b.id IN ('bigint'::regtype, 'integer'::regtype, 'smallint'::regtype) THEN v.value
                ELSE format('pg_catalog.to_json(%s)', format(
                    CASE WHEN autoembed._is_plain(t.oid) THEN 'pg_catalog.concat(%s)' ELSE spelling END, v.value
                ))
            END, ', '','', ' ORDER BY k.position))
        FROM unnest(pipeline.key_columns) WITH ORDINALITY AS k(name, position)
        JOIN pg_attribute AS a ON a.attrelid = pipeline.table_id AND a.attname = k.name
        JOIN pg_type AS t ON t.oid = a.atttypid
        CROSS JOIN LATERAL (SELECT coalesce(nullif(t.typbasetype, 0), t.oid)) AS b(id)
        CROSS JOIN LATERAL (SELECT format('%s.%I', alias, k.name)) AS v(value)
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._key_expression IS
    'The SQL expression that gives the key of the row of that alias as a JSON array. spelling: the expression of a '
    'value whose text depends on settings of the session, around the value. Without it, the text depends on them.';

CREATE OR REPLACE FUNCTION autoembed._key_text(value anyelement)
    RETURNS text
    LANGUAGE sql
    STABLE
    PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
    -- The settings with which lanes make keys, as in _output_settings().
    SET TimeZone = 'UTC'
    SET DateStyle = 'ISO, YMD'
    SET IntervalStyle = 'postgres'
    SET extra_float_digits = 1
    SET bytea_output = 'hex'
AS $sql$
    SELECT concat(value);
$sql$;
COMMENT ON FUNCTION autoembed._key_text IS
    'The text of a value of a key, as lanes write it, whatever the settings of the session are.';

CREATE OR REPLACE FUNCTION autoembed._has_key_expression(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (SELECT format('ROW(%s) IS NOT NULL', string_agg(format('%s.%I', alias, k.name), ', '))
            FROM unnest(pipeline.key_columns) AS k(name));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._has_key_expression IS
    'The SQL expression that says whether the row of that alias has a key, with no NULL in it.';
