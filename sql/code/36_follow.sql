-- These triggers act when a pipeline is defined, changed or ended, and when its table is altered.

CREATE OR REPLACE FUNCTION autoembed._table_shape(pipeline autoembed.pipeline)
    RETURNS jsonb
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
    SET quote_all_identifiers = off
    SET standard_conforming_strings = on
AS $sql$
    SELECT jsonb_build_object(
        'columns', (SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_attribute AS a
                    WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped),
        'type', (SELECT concat_ws(' ', a.attnum, format_type(a.atttypid, a.atttypmod)) FROM pg_attribute AS a
                 WHERE a.attrelid = coalesce(pipeline.embeddings_table, pipeline.table_id)
                   AND a.attname = pipeline.embedding_column),
        'contents', (SELECT jsonb_object_agg(a.attnum, concat_ws(
                         ' ', format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid)
                     ))
                     FROM pg_attribute AS a
                     LEFT JOIN pg_attrdef AS d ON a.attgenerated <> '' AND d.adrelid = a.attrelid AND d.adnum = a.attnum
                     WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped
                       AND (a.attname <> pipeline.embedding_column OR pipeline.embeddings_table IS NOT NULL)),
        'partitions', (SELECT coalesce(jsonb_agg(t.relid::oid::bigint ORDER BY t.relid::oid), '[]')
                       FROM pg_partition_tree(pipeline.table_id) AS t
                       WHERE t.isleaf),
        'owner', (SELECT c.relowner::bigint FROM pg_class AS c WHERE c.oid = pipeline.table_id)
    );
$sql$;
COMMENT ON FUNCTION autoembed._table_shape IS
    'The facts of a table that its pipeline follows. columns: the names by number. type: the number and the type of '
    'the embedding column. contents: the types and expressions of the other columns. partitions: the OIDs of the '
    'leaves. owner: the OID of the owner.';

CREATE OR REPLACE FUNCTION autoembed._renamed(names name[], renames jsonb)
    RETURNS name[]
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT array_agg(coalesce((renames ->> n.name)::name, n.name) ORDER BY n.position)
    FROM unnest(names) WITH ORDINALITY AS n(name, position);
$sql$;
COMMENT ON FUNCTION autoembed._renamed IS 'The names after renames, given as {old name: new name}.';

CREATE OR REPLACE FUNCTION autoembed._backfill(pipeline_id integer)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.backfill AS b (pipeline_id)
    VALUES (_backfill.pipeline_id)
    ON CONFLICT ON CONSTRAINT backfill_pkey DO UPDATE
    SET position = NULL, rows_queued = 0, scanned_at = NULL, index_problem = NULL, started_at = clock_timestamp();
$sql$;
COMMENT ON FUNCTION autoembed._backfill IS
    'Has lanes scan the rows of a pipeline for embeddings that are missing or stale.';

CREATE OR REPLACE FUNCTION autoembed._define()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _check record;
BEGIN
    -- The row comes from a dump. It was sound once, and the triggers of its table are restored later.
    IF TG_OP = 'INSERT' AND NEW.built_from IS NOT NULL THEN
        NEW.table_shape := autoembed._table_shape(NEW);
        -- A dump of 0.1.0 does not have the schema.
        NEW.content_function_schema := coalesce(NEW.content_function_schema, (
            SELECT n.nspname
            FROM pg_proc AS p
            JOIN pg_namespace AS n ON n.oid = p.pronamespace
            WHERE p.oid = NEW.content_function_id
        ));
        RETURN NEW;
    END IF;
    -- A dump of the schema alone restores functions and triggers without their pipelines. Their numbers are taken.
    WHILE TG_OP = 'INSERT' AND EXISTS (
        SELECT FROM pg_proc AS p WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname = '_content_' || NEW.id
    ) LOOP
        NEW.id := nextval('autoembed.pipeline_id_seq');
    END LOOP;
    IF TG_OP = 'INSERT' AND NEW.embeddings_table IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_class AS t
        JOIN pg_class AS e ON e.relowner = t.relowner AND e.oid = NEW.embeddings_table
        WHERE t.oid = NEW.table_id
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('table %s and its embeddings table do not belong to the same role', NEW.table_id),
            HINT = 'Leave it to enable() to make the embeddings table.';
    END IF;
    IF NEW.managed AND NEW.key_columns IS NULL THEN
        NEW.key_columns := coalesce(autoembed._key_columns(NEW.table_id), '{}');
    END IF;
    IF NEW.content_function IS NULL THEN
        NEW.content_function_id := NULL;
        NEW.content_function_schema := NULL;
    ELSIF TG_OP = 'INSERT' OR NEW.content_function IS DISTINCT FROM OLD.content_function THEN
        NEW.content_function_id := autoembed._content_function(NEW.table_id, NEW.content_function);
        NEW.content_function_schema := (
            SELECT n.nspname
            FROM pg_proc AS p
            JOIN pg_namespace AS n ON n.oid = p.pronamespace
            WHERE p.oid = NEW.content_function_id
        );
    END IF;
    SELECT c.* INTO _check FROM autoembed._check_pipeline(NEW) AS c;
    IF _check.errcode = 'waits' THEN
        RAISE WARNING USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = 'object_not_in_prerequisite_state';
    ELSIF _check.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = _check.errcode;
    END IF;
    NEW.table_shape := autoembed._table_shape(NEW);
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._define IS 'Completes the definition of a pipeline, and refuses one that cannot work.';

CREATE OR REPLACE FUNCTION autoembed._defined()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _stale integer;
    _plan record;
BEGIN
    IF TG_OP = 'INSERT' AND NEW.built_from IS NOT NULL THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'INSERT' THEN
        FOR _stale IN
            SELECT DISTINCT substring(f.proname FROM '[0-9]+$')::integer
            FROM pg_trigger AS t
            JOIN pg_proc AS f
                ON f.oid = t.tgfoid
               AND f.pronamespace = 'autoembed'::regnamespace
               AND f.proname ~ '^_(capture|clear)_[0-9]+$'
            WHERE t.tgrelid = NEW.table_id
              AND NOT EXISTS (
                  SELECT FROM autoembed.pipeline AS p WHERE p.id::text = substring(f.proname FROM '[0-9]+$')
              )
        LOOP
            PERFORM autoembed._drop_functions(_stale, true);
        END LOOP;
    END IF;
    PERFORM autoembed._build_pipeline(NEW.id);
    -- PostgreSQL plans the statements of a lane, under the guards of a lane.
    IF autoembed._missing_object(NEW) IS NULL THEN
        SELECT p.* INTO _plan FROM autoembed._plan(NEW.id) AS p;
        IF _plan.problem IS NOT NULL THEN
            RAISE EXCEPTION USING MESSAGE = _plan.problem, ERRCODE = _plan.errcode;
        END IF;
    END IF;
    IF NEW.managed AND (
        TG_OP = 'INSERT'
        OR NEW.on_change <> OLD.on_change
        OR EXISTS (SELECT FROM autoembed._trigger_problems(NEW))
    ) THEN
        PERFORM autoembed._build_triggers(NEW);
    END IF;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._defined IS
    'Makes the functions and triggers of a pipeline that is defined or changed.';

CREATE OR REPLACE FUNCTION autoembed._ended()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _trigger name;
BEGIN
    DELETE FROM autoembed._job AS q WHERE q.pipeline = OLD.id::text;
    PERFORM autoembed._drop_functions(OLD.id, true);
    PERFORM autoembed._unschedule('index-' || OLD.id);
    FOR _trigger IN
        SELECT t.tgname FROM autoembed._guide_triggers(OLD) AS t WHERE t.tgrelid = OLD.table_id
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', _trigger, OLD.table_id);
    END LOOP;
    -- The embeddings of a table that was dropped go with it, unless something depends on them.
    IF EXISTS (
        SELECT FROM pg_class AS c
        WHERE c.oid = OLD.embeddings_table AND c.relowner::bigint = (OLD.table_shape ->> 'owner')::bigint
    )
       AND NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = OLD.table_id) THEN
        BEGIN
            EXECUTE format('DROP TABLE %s', OLD.embeddings_table);
        EXCEPTION WHEN dependent_objects_still_exist OR lock_not_available THEN
            NULL;
        END;
    END IF;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._ended IS 'Removes the jobs, functions and triggers of a pipeline that has ended.';

CREATE OR REPLACE FUNCTION autoembed._end()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    DELETE FROM autoembed.pipeline AS p WHERE p.id = NEW.id;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._end IS 'Deletes a pipeline that is marked as ended.';

CREATE OR REPLACE FUNCTION autoembed._drop_orphaned_pipelines()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- The subquery looks each table up by its OID. NOT EXISTS would read the whole catalog, every second.
    DELETE FROM autoembed.pipeline AS p
    WHERE p.id IN (
        SELECT o.id
        FROM autoembed.pipeline AS o
        WHERE (SELECT c.oid FROM pg_class AS c WHERE c.oid = o.table_id) IS NULL
        FOR UPDATE SKIP LOCKED
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_orphaned_pipelines IS
    'Ends the pipelines whose table was dropped, with their jobs.';

CREATE OR REPLACE FUNCTION autoembed._follow_embeddings_table(pipeline autoembed.pipeline, renames jsonb)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table pg_class;
    _embeddings pg_class;
    _change text;
BEGIN
    SELECT c.* INTO _table FROM pg_class AS c WHERE c.oid = pipeline.table_id;
    SELECT c.* INTO _embeddings FROM pg_class AS c WHERE c.oid = pipeline.embeddings_table;
    -- A table that was given to another role is left alone.
    IF _embeddings.relowner::bigint IS DISTINCT FROM (pipeline.table_shape ->> 'owner')::bigint THEN
        RETURN;
    END IF;
    -- Each of these statements runs no code of the owner.
    IF _embeddings.relowner <> _table.relowner THEN
        EXECUTE format('ALTER TABLE %s OWNER TO %I', pipeline.embeddings_table, pg_get_userbyid(_table.relowner));
    END IF;
    IF _embeddings.relnamespace <> _table.relnamespace THEN
        EXECUTE format('ALTER TABLE %s SET SCHEMA %s', pipeline.embeddings_table, _table.relnamespace::regnamespace);
    END IF;
    FOR _change IN
        SELECT format('ALTER TABLE %s RENAME COLUMN %I TO %I', pipeline.embeddings_table, r.key, r.value)
        FROM jsonb_each_text(renames) AS r
        JOIN pg_attribute AS a
            ON a.attrelid = pipeline.embeddings_table AND a.attname = r.key AND a.attnum > 0 AND NOT a.attisdropped
        WHERE r.value = ANY (pipeline.key_columns)
    LOOP
        EXECUTE _change;
    END LOOP;
    -- Between these types PostgreSQL converts by itself.
    FOR _change IN
        SELECT format('ALTER TABLE %s ALTER COLUMN %I TYPE %s', pipeline.embeddings_table, k.name,
                      format_type(t.atttypid, t.atttypmod))
        FROM unnest(pipeline.key_columns) AS k(name)
        JOIN pg_attribute AS t ON t.attrelid = pipeline.table_id AND t.attname = k.name
        JOIN pg_attribute AS a ON a.attrelid = pipeline.embeddings_table AND a.attname = k.name
        WHERE (a.atttypid, a.atttypmod) <> (t.atttypid, t.atttypmod)
          AND a.atttypid IN ('smallint'::regtype, 'integer'::regtype, 'bigint'::regtype, 'text'::regtype,
                             'varchar'::regtype)
          AND t.atttypid IN ('smallint'::regtype, 'integer'::regtype, 'bigint'::regtype, 'text'::regtype,
                             'varchar'::regtype)
    LOOP
        EXECUTE _change;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_embeddings_table IS
    'Gives an embeddings table the owner, the schema and the key columns of its table.';

CREATE OR REPLACE FUNCTION autoembed._follow_tables()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _before jsonb;
    _after jsonb;
    _renames jsonb;
BEGIN
    FOR _pipeline IN
        SELECT p.*
        FROM autoembed.pipeline AS p
        WHERE p.table_id IN (
            SELECT coalesce(pg_partition_root(d.objid), d.objid) FROM pg_event_trigger_ddl_commands() AS d
            WHERE d.classid = 'pg_class'::regclass
        )
        ORDER BY p.id
    LOOP
        _before := _pipeline.table_shape;
        SELECT coalesce(jsonb_object_agg(b.value, a.value), '{}') INTO _renames
        FROM jsonb_each_text(_before -> 'columns') AS b
        JOIN jsonb_each_text(autoembed._table_shape(_pipeline) -> 'columns') AS a
            ON a.key = b.key AND a.value <> b.value;
        IF _renames <> '{}' THEN
            IF _pipeline.embeddings_table IS NULL THEN
                _pipeline.embedding_column := coalesce(
                    _renames ->> _pipeline.embedding_column, _pipeline.embedding_column
                );
            END IF;
            _pipeline.key_columns := autoembed._renamed(_pipeline.key_columns, _renames);
            _pipeline.content_columns := autoembed._renamed(_pipeline.content_columns, _renames);
            _pipeline.content_template := (
                SELECT string_agg(
                    CASE
                        WHEN t.column_name IS NOT NULL THEN
                            format('{%s}', coalesce(_renames ->> t.column_name, t.column_name))
                        WHEN t.literal IN ('{', '}', E'\\') THEN t.literal || t.literal
                        ELSE t.literal
                    END, '')
                FROM autoembed._template(_pipeline.content_template) AS t
            );
            -- The condition keeps its names. It is the owner's code, and no other role may parse it.
            SELECT coalesce(jsonb_object_agg(c.key, coalesce(_renames ->> c.value, c.value)), '{}')
            INTO _pipeline.condition_columns
            FROM jsonb_each_text(_pipeline.condition_columns) AS c;
        END IF;
        PERFORM autoembed._follow_embeddings_table(_pipeline, _renames);
        _after := autoembed._table_shape(_pipeline);

        -- The restore of a dump switches check_function_bodies off. Its last statements need the functions of the dump.
        -- The next pass replaces them.
        CONTINUE WHEN _before = _after AND NOT current_setting('check_function_bodies')::boolean;
        IF _before <> _after THEN
            UPDATE autoembed.pipeline AS p
            SET embedding_column = _pipeline.embedding_column, key_columns = _pipeline.key_columns,
                content_columns = _pipeline.content_columns, content_template = _pipeline.content_template,
                condition_columns = _pipeline.condition_columns, table_shape = _after
            WHERE p.id = _pipeline.id;
        END IF;
        -- A trigger made for other names would refuse writes. Its function is made again even if the pipeline waits.
        IF (SELECT c.errcode IS DISTINCT FROM 'undefined_column' FROM autoembed._check_pipeline(_pipeline) AS c) THEN
            PERFORM autoembed._build_pipeline(_pipeline.id);
        END IF;
        -- The vectors have another type, or the texts may have changed, or a partition has brought rows. No trigger
        -- sees such a change.
        IF _before ->> 'type' <> _after ->> 'type' THEN
            -- The bytes of the vectors are others.
            UPDATE autoembed.embedded AS e SET vector_digest = NULL WHERE e.pipeline_id = _pipeline.id;
        END IF;
        IF _before ->> 'type' <> _after ->> 'type'
           OR EXISTS (
               SELECT FROM jsonb_each_text(_before -> 'contents') AS b
               JOIN jsonb_each_text(_after -> 'contents') AS a ON a.key = b.key AND a.value <> b.value
           )
           OR NOT _before -> 'partitions' @> (_after -> 'partitions') THEN
            PERFORM autoembed._backfill(_pipeline.id);
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_tables IS
    'Has pipelines follow the names, owners, types and partitions that ALTER TABLE changes.';

CREATE OR REPLACE FUNCTION autoembed._end_broken()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _broken record;
BEGIN
    -- The trigger of a lost column would refuse writes. A renamed column keeps its number, so it is not lost.
    FOR _broken IN
        SELECT p.id, p.table_id, p.embedding_column, min(k.name::text) AS lost
        FROM autoembed.pipeline AS p
        JOIN pg_class AS c ON c.oid = p.table_id
        CROSS JOIN LATERAL unnest(
            autoembed._needed_columns(p) || CASE WHEN p.embeddings_table IS NULL THEN ARRAY[p.embedding_column] END
        ) AS k(name)
        WHERE p.managed
          AND p.table_id IN (
              SELECT coalesce(pg_partition_root(d.objid), d.objid)
              FROM pg_event_trigger_dropped_objects() AS d
              WHERE d.classid = 'pg_class'::regclass AND d.objsubid > 0
          )
          AND NOT EXISTS (
              SELECT FROM pg_attribute AS a
              WHERE a.attrelid = p.table_id AND NOT a.attisdropped
                AND (a.attname = k.name OR p.table_shape -> 'columns' ->> a.attnum::text = k.name)
          )
        GROUP BY p.id
    LOOP
        DELETE FROM autoembed.pipeline AS p WHERE p.id = _broken.id;
        RAISE NOTICE '%.% is no longer embedded: column "%" is gone',
            _broken.table_id, quote_ident(_broken.embedding_column), _broken.lost;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._end_broken IS 'Ends the pipelines that have lost a column, however it was dropped.';

CREATE OR REPLACE FUNCTION autoembed._protect_functions()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- The functions of a pipeline belong to the table's owner. The owner could make them SECURITY INVOKER, and so have
    -- them run with the rights of a lane, which may be a superuser.
    IF NOT (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user)
       AND EXISTS (SELECT FROM pg_event_trigger_ddl_commands() AS d WHERE d.schema_name = 'autoembed') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = 'the functions in schema autoembed cannot be altered',
            HINT = 'They are made again when their table changes.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._protect_functions IS 'Keeps table owners from altering the functions made for them.';
