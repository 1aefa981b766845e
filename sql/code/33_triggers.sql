-- The triggers of a pipeline, and the checks that they exist and are enabled.

CREATE OR REPLACE FUNCTION autoembed._may_write_vectors(table_id oid, is_written boolean DEFAULT false)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- The functions that write run as their owner, but leave the setting role as it is.
    SELECT EXISTS (
        SELECT FROM autoembed.pipeline AS p
        JOIN pg_proc AS w ON w.proname = '_write_' || p.id AND w.pronamespace = 'autoembed'::regnamespace
        WHERE p.table_id = _may_write_vectors.table_id
          AND (has_function_privilege(session_user, w.oid, 'EXECUTE')
               OR has_function_privilege(nullif(current_setting('role'), 'none')::name, w.oid, 'EXECUTE'))
          -- The code of another owner, which a lane runs too, cannot have this setting.
          AND (NOT is_written OR p.id::text = current_setting('autoembed.written_pipeline', true))
    );
$sql$;
COMMENT ON FUNCTION autoembed._may_write_vectors IS
    'Whether the role of the session, or the one that it has taken, may write the vectors of a table, as lanes do. A '
    'setting tells that a lane writes, and any session can have it. is_written: whether it writes this table now.';

CREATE OR REPLACE FUNCTION autoembed._trigger_name(pipeline_id integer, event text)
    RETURNS name
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT format(
        CASE event WHEN 'clear' THEN 'zz_autoembed_%s_%s' ELSE 'autoembed_%s_%s' END, pipeline_id, event
    )::name;
$sql$;
COMMENT ON FUNCTION autoembed._trigger_name IS 'The name of a pipeline''s trigger.';

CREATE OR REPLACE FUNCTION autoembed._clears(pipeline autoembed.pipeline)
    RETURNS boolean
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT pipeline.on_change = 'clear' AND pipeline.embeddings_table IS NULL;
$sql$;
COMMENT ON FUNCTION autoembed._clears IS 'Whether a trigger clears the vector in a row whose text changes.';

CREATE OR REPLACE FUNCTION autoembed._is_subscribed(table_id oid)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN EXISTS (
        SELECT FROM pg_subscription_rel AS s
        WHERE s.srrelid IN (SELECT t.relid FROM autoembed._partition_tree(table_id) AS t UNION ALL SELECT table_id)
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._is_subscribed IS
    'Whether a subscription of logical replication writes a table or one of its partitions.';

CREATE OR REPLACE FUNCTION autoembed._inherits(table_id oid)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = table_id);
$sql$;
COMMENT ON FUNCTION autoembed._inherits IS 'Whether a table is a partition, or inherits from another table.';

CREATE OR REPLACE FUNCTION autoembed._build_triggers(pipeline autoembed.pipeline)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    _is_parted boolean := (SELECT c.relkind = 'p' FROM pg_class AS c WHERE c.oid = pipeline.table_id);
    -- A write to a partition fires no statement trigger of the root, and one to a table that others inherit from fires
    -- none of theirs. Logical replication of rows fires none either.
    _by_row boolean := pipeline.replicated OR _is_parted OR autoembed._inherits(pipeline.table_id);
    _name text;
    _definition text;
BEGIN
    FOR _name, _definition IN
        SELECT t.name, t.definition
        FROM (VALUES
            ('insert', 'AFTER INSERT ON %s' || CASE
                WHEN _by_row THEN ' FOR EACH ROW'
                ELSE ' REFERENCING NEW TABLE AS new_rows'
            END),
            ('delete', 'AFTER DELETE ON %s' || CASE
                WHEN _by_row THEN ' FOR EACH ROW'
                ELSE ' REFERENCING OLD TABLE AS old_rows'
            END),
            ('update', 'AFTER UPDATE ON %s FOR EACH ROW'),
            -- The embeddings are to be gone before the triggers of the partitions look for theirs.
            ('truncate', CASE
                WHEN _is_parted AND pipeline.embeddings_table IS NOT NULL THEN 'BEFORE TRUNCATE ON %s'
                ELSE 'AFTER TRUNCATE ON %s'
            END),
            -- Its name makes it the last of the BEFORE triggers, so it sees the text that the others leave.
            ('clear', CASE WHEN autoembed._clears(pipeline) THEN 'BEFORE UPDATE ON %s FOR EACH ROW' END)
        ) AS t(name, definition)
    LOOP
        IF _definition IS NULL THEN
            EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s',
                           autoembed._trigger_name(pipeline.id, _name), pipeline.table_id);
            CONTINUE;
        END IF;
        -- A trigger that is dropped before would lock the table against readers.
        EXECUTE format('CREATE OR REPLACE TRIGGER %I ' || _definition || ' EXECUTE FUNCTION autoembed._%s_%s()',
                       autoembed._trigger_name(pipeline.id, _name), pipeline.table_id,
                       CASE _name WHEN 'clear' THEN 'clear' ELSE 'capture' END, pipeline.id);
    END LOOP;
    PERFORM autoembed._build_partition_triggers(pipeline);
    FOR _name, _definition IN
        SELECT t.name, t.definition
        FROM pg_class AS e
        CROSS JOIN (VALUES
            ('update', 'AFTER UPDATE ON %s REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'),
            ('delete', 'AFTER DELETE ON %s REFERENCING OLD TABLE AS old_rows'),
            ('truncate', 'AFTER TRUNCATE ON %s')
        ) AS t(name, definition)
        WHERE e.oid = pipeline.embeddings_table
    LOOP
        EXECUTE format('CREATE OR REPLACE TRIGGER %I ' || _definition || ' EXECUTE FUNCTION autoembed._watch_%s()',
                       autoembed._trigger_name(pipeline.id, _name), pipeline.embeddings_table, pipeline.id);
    END LOOP;
    -- An event trigger follows an ALTER TABLE, and finds all triggers made.
    FOR _definition IN
        SELECT format('ALTER TABLE %s %s', t.tgrelid::regclass,
                      string_agg(format('ENABLE ALWAYS TRIGGER %I', t.tgname), ', '))
        FROM unnest('{insert,delete,update,truncate,clear}'::text[]) AS n(name)
        JOIN pg_trigger AS t
            ON t.tgname = autoembed._trigger_name(pipeline.id, n.name) AND t.tgenabled <> 'A'
            AND t.tgrelid IN (pipeline.table_id, pipeline.embeddings_table)
        WHERE pipeline.replicated
        GROUP BY t.tgrelid
    LOOP
        EXECUTE _definition;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_triggers IS 'Makes the triggers of a pipeline. Replaces those that exist.';

CREATE OR REPLACE FUNCTION autoembed._follow_truncate()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline record;
BEGIN
    FOR _pipeline IN
        SELECT p.id, to_regprocedure(format('autoembed._erase_%s(text[], regclass)', p.id)) IS NOT NULL AS is_beside
        FROM pg_partition_ancestors(TG_RELID) AS a(relid)
        JOIN autoembed.pipeline AS p ON p.table_id = a.relid AND p.managed
        WHERE a.relid <> TG_RELID
        ORDER BY p.id
    LOOP
        IF _pipeline.is_beside THEN
            EXECUTE format('SELECT autoembed._erase_%s(NULL, $1)', _pipeline.id) USING TG_RELID::regclass;
        END IF;
        INSERT INTO autoembed._job (due_at, message)
        VALUES (clock_timestamp(), jsonb_build_object('pipeline', _pipeline.id, 'recorded_after', ''));
    END LOOP;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_truncate IS
    'Deletes the embeddings beside the rows of a partition that is truncated, and has a lane find which of the rows '
    'with records are gone.';

CREATE OR REPLACE FUNCTION autoembed._partition_triggers(pipeline autoembed.pipeline)
    RETURNS TABLE (relid regclass, state "char")
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT r.relid, t.tgenabled
    FROM autoembed._partition_tree(pipeline.table_id) AS r
    JOIN pg_class AS c ON c.oid = r.relid AND c.relkind = 'r'
    LEFT JOIN pg_trigger AS t ON t.tgrelid = r.relid AND t.tgname = 'autoembed_truncate'
    WHERE r.level > 0;
$sql$;
COMMENT ON FUNCTION autoembed._partition_triggers IS
    'The partitions that need a trigger of their own, as a TRUNCATE of one fires none of the whole table. state: that '
    'of the trigger; NULL: it is missing.';

CREATE OR REPLACE FUNCTION autoembed._build_partition_triggers(pipeline autoembed.pipeline)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _partition record;
BEGIN
    FOR _partition IN
        SELECT t.* FROM autoembed._partition_triggers(pipeline) AS t
        WHERE pipeline.managed AND t.state IS DISTINCT FROM 'A'
          AND (t.state IS DISTINCT FROM 'O' OR pipeline.replicated)
    LOOP
        IF _partition.state IS NULL THEN
            EXECUTE format('CREATE TRIGGER autoembed_truncate BEFORE TRUNCATE ON %s '
                           'EXECUTE FUNCTION autoembed._follow_truncate()', _partition.relid);
        END IF;
        IF _partition.state IS NOT NULL OR pipeline.replicated THEN
            EXECUTE format('ALTER TABLE %s ENABLE %s TRIGGER autoembed_truncate',
                           _partition.relid, CASE WHEN pipeline.replicated THEN 'ALWAYS' END);
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_partition_triggers IS
    'Makes or enables the triggers of a pipeline on the partitions of its table. All pipelines share them.';

CREATE OR REPLACE FUNCTION autoembed._trigger_problems(pipeline autoembed.pipeline)
    RETURNS TABLE (problem text, cure text)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH found AS (
        SELECT t.tgrelid, t.tgname, t.tgenabled
        FROM unnest('{insert,update,delete,truncate,clear}'::text[]) AS e(event)
        JOIN pg_trigger AS t ON t.tgname = autoembed._trigger_name(pipeline.id, e.event)
        WHERE pipeline.managed
          AND t.tgrelid IN (
              SELECT r.relid FROM autoembed._partition_tree(pipeline.table_id) AS r
              UNION ALL
              VALUES (pipeline.table_id), (pipeline.embeddings_table)
          )
        UNION ALL
        SELECT t.relid, 'autoembed_truncate', t.state
        FROM autoembed._partition_triggers(pipeline) AS t
        WHERE pipeline.managed AND t.state IS NOT NULL
        UNION ALL
        SELECT t.tgrelid, t.tgname, t.tgenabled FROM autoembed._guide_triggers(pipeline) AS t WHERE NOT pipeline.managed
    )
    SELECT format('no trigger for %s', e.event), NULL
    FROM unnest('{insert,update,delete,truncate,clear}'::text[]) AS e(event)
    WHERE pipeline.managed
      AND (e.event <> 'clear' OR autoembed._clears(pipeline))
      AND NOT EXISTS (
          SELECT FROM found AS f
          WHERE f.tgrelid = pipeline.table_id AND f.tgname = autoembed._trigger_name(pipeline.id, e.event)
      )
    UNION ALL
    SELECT format('no trigger for %s on its embeddings table', e.event), NULL
    FROM unnest('{update,delete,truncate}'::text[]) AS e(event)
    JOIN pg_class AS c ON c.oid = pipeline.embeddings_table
    WHERE pipeline.managed AND NOT EXISTS (
        SELECT FROM found AS f
        WHERE f.tgrelid = pipeline.embeddings_table AND f.tgname = autoembed._trigger_name(pipeline.id, e.event)
    )
    UNION ALL
    SELECT format('no trigger for truncate on partition %s', t.relid), NULL
    FROM autoembed._partition_triggers(pipeline) AS t
    WHERE pipeline.managed AND t.state IS NULL
    UNION ALL
    SELECT m.problem, m.cure FROM autoembed._missing_guide_triggers(pipeline) AS m WHERE NOT pipeline.managed
    UNION ALL
    -- A trigger of a partitioned table may be disabled on one partition.
    SELECT format(
               CASE
                   WHEN bool_and(f.tgenabled IN ('A', 'O')) AND NOT pipeline.replicated THEN
                       'trigger %I does not fire for rows that a subscription writes'
                   ELSE 'trigger %I is disabled'
               END, f.tgname),
           CASE
               WHEN NOT pipeline.managed THEN
                   format('ALTER TABLE %s ENABLE %sTRIGGER %I;', pipeline.table_id,
                          CASE WHEN autoembed._is_subscribed(pipeline.table_id) THEN 'ALWAYS ' END, f.tgname)
           END
    FROM found AS f
    GROUP BY f.tgname
    HAVING NOT bool_and(
        f.tgenabled = 'A'
        OR f.tgenabled = 'O' AND NOT pipeline.replicated AND NOT autoembed._is_subscribed(pipeline.table_id)
    );
$sql$;
COMMENT ON FUNCTION autoembed._trigger_problems IS
    'The triggers of a pipeline that are missing, disabled or blind to a subscription. cure: the SQL that mends a '
    'trigger made by hand. NULL: resync() mends it.';

CREATE OR REPLACE FUNCTION autoembed._stray_triggers(table_id oid DEFAULT NULL)
    RETURNS TABLE (stray_on regclass, name name, pipeline_id integer)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- By these, an index finds the triggers of one table, too. A restore looks at each trigger that it creates.
    WITH looked_at AS (
        SELECT ARRAY(
            SELECT _stray_triggers.table_id WHERE _stray_triggers.table_id IS NOT NULL
            UNION
            SELECT t.tgrelid FROM pg_trigger AS t WHERE _stray_triggers.table_id IS NULL
        ) AS ids
    )
    SELECT t.tgrelid, t.tgname, f.id
    FROM (
        SELECT p.oid, substring(p.proname FROM '[0-9]+$')::integer AS id, split_part(p.proname, '_', 2) AS kind
        FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname ~ '^_(capture|clear|watch)_[0-9]{1,9}$'
    ) AS f
    JOIN pg_trigger AS t ON t.tgfoid = f.oid AND t.tgparentid = 0
    WHERE t.tgrelid = ANY ((SELECT l.ids FROM looked_at AS l)::oid[])
      AND NOT EXISTS (
          SELECT FROM autoembed.pipeline AS p
          WHERE p.id = f.id AND t.tgrelid = CASE f.kind WHEN 'watch' THEN p.embeddings_table ELSE p.table_id END
      )
    UNION ALL
    SELECT t.tgrelid, t.tgname, NULL
    FROM pg_trigger AS t
    WHERE t.tgfoid = 'autoembed._follow_truncate()'::regprocedure
      AND t.tgrelid = ANY ((SELECT l.ids FROM looked_at AS l)::oid[])
      AND NOT EXISTS (
          SELECT FROM pg_partition_ancestors(t.tgrelid) AS a(relid)
          JOIN autoembed.pipeline AS p ON p.table_id = a.relid AND p.managed
          WHERE a.relid <> t.tgrelid
      )
    ORDER BY 1, 2;
$sql$;
COMMENT ON FUNCTION autoembed._stray_triggers IS
    'The triggers that have no pipeline: a dump of a table or of a schema alone has brought them, or a partition has '
    'left. Those of a table, or all.';

CREATE OR REPLACE FUNCTION autoembed._drop_stray_triggers(table_id regclass)
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _name name;
    _dropped integer := 0;
    _void text;
BEGIN
    IF EXISTS (SELECT FROM autoembed._stray_triggers(table_id)) THEN
        _void := autoembed._lock_table(table_id, true);
    END IF;
    FOR _name IN SELECT t.name FROM autoembed._stray_triggers(table_id) AS t LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', _name, table_id);
        _dropped := _dropped + 1;
    END LOOP;
    RETURN _dropped;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_stray_triggers IS
    'Drops the triggers of a table that a dump has brought without their pipeline, and returns their number.';
