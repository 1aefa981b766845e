-- Triggers, event triggers and privileges. They need functions of code/, or cannot be replaced in place.

CREATE OR REPLACE TRIGGER autoembed_keep_restored
    BEFORE INSERT ON pgmq.meta
    FOR EACH ROW
    WHEN (NEW.queue_name = 'embedding_jobs')
    EXECUTE FUNCTION autoembed._keep_restored_queue();
-- A restore may say that it is a replica.
ALTER TABLE pgmq.meta ENABLE ALWAYS TRIGGER autoembed_keep_restored;

CREATE OR REPLACE TRIGGER take
    AFTER INSERT OR UPDATE ON autoembed.restored
    FOR EACH ROW
    WHEN (NEW.problem IS NULL)
    EXECUTE FUNCTION autoembed._take_restored();
ALTER TABLE autoembed.restored ENABLE ALWAYS TRIGGER take;

CREATE OR REPLACE TRIGGER forget
    AFTER DELETE ON autoembed.restored
    FOR EACH ROW
    WHEN (OLD.problem IS NOT NULL)
    EXECUTE FUNCTION autoembed._forget_restored();

CREATE OR REPLACE TRIGGER keep_restored
    BEFORE INSERT ON autoembed.model
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._keep_restored_model();

CREATE OR REPLACE TRIGGER model_changed
    AFTER UPDATE ON autoembed.model
    FOR EACH ROW
    WHEN (
        (OLD.provider, OLD.model_id, OLD.dimensions, coalesce(OLD.options ->> 'document_prefix', ''),
         OLD.options -> 'document_body')
        IS DISTINCT FROM (NEW.provider, NEW.model_id, NEW.dimensions, coalesce(NEW.options ->> 'document_prefix', ''),
         NEW.options -> 'document_body')
    )
    EXECUTE FUNCTION autoembed._model_changed();

CREATE OR REPLACE TRIGGER model_changed
    AFTER INSERT OR UPDATE ON autoembed.setting
    FOR EACH ROW
    WHEN (NEW.name = 'default_model')
    EXECUTE FUNCTION autoembed._model_changed();

CREATE OR REPLACE TRIGGER retry
    INSTEAD OF UPDATE ON autoembed._own_failure
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._retry_failure();

CREATE OR REPLACE TRIGGER define
    BEFORE INSERT ON autoembed.pipeline
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._define();

-- An update that follows an ALTER TABLE changes table_shape, and does the work of this trigger itself.
CREATE OR REPLACE TRIGGER define_again
    BEFORE UPDATE OF content_columns, content_template, content_function, condition, model, on_change, embeddings_table,
        embedding_column
    ON autoembed.pipeline
    FOR EACH ROW
    WHEN (OLD.table_shape = NEW.table_shape)
    EXECUTE FUNCTION autoembed._define();

CREATE OR REPLACE TRIGGER defined
    AFTER INSERT ON autoembed.pipeline
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._defined();

-- An update that follows an ALTER TABLE changes table_shape, and does the work of this trigger itself.
CREATE OR REPLACE TRIGGER defined_again
    AFTER UPDATE OF content_columns, content_template, content_function, condition, model, on_change, embeddings_table,
        embedding_column
    ON autoembed.pipeline
    FOR EACH ROW
    WHEN (OLD.table_shape = NEW.table_shape OR OLD.embeddings_table IS DISTINCT FROM NEW.embeddings_table)
    EXECUTE FUNCTION autoembed._defined();

CREATE OR REPLACE TRIGGER forget_texts
    AFTER UPDATE OF text_config ON autoembed.pipeline
    FOR EACH ROW
    WHEN (OLD.text_config IS DISTINCT FROM NEW.text_config)
    EXECUTE FUNCTION autoembed._forget_texts();

CREATE OR REPLACE TRIGGER forget_postings
    AFTER DELETE ON autoembed.text_segment
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._forget_postings();

CREATE OR REPLACE TRIGGER end_pipeline
    AFTER UPDATE OF ended ON autoembed.pipeline
    FOR EACH ROW
    WHEN (NEW.ended)
    EXECUTE FUNCTION autoembed._end();

CREATE OR REPLACE TRIGGER ended
    AFTER DELETE ON autoembed.pipeline
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._ended();

-- This index needs a function of code/. A long key does not fit into an index entry, so its digest stands for it.
CREATE UNIQUE INDEX IF NOT EXISTS failure_pipeline_id_key_idx
    ON autoembed.failure (pipeline_id, autoembed._short_key(key));

DROP EVENT TRIGGER IF EXISTS autoembed_follow_drops;
CREATE EVENT TRIGGER autoembed_follow_drops
    ON sql_drop
    EXECUTE FUNCTION autoembed._follow_drops();

DROP EVENT TRIGGER IF EXISTS autoembed_follow_tables;
CREATE EVENT TRIGGER autoembed_follow_tables
    ON ddl_command_end
    -- PostgreSQL takes ALTER VIEW and its like for tables and types, too.
    WHEN TAG IN (
        'ALTER TABLE', 'ALTER TYPE', 'CREATE INDEX', 'ALTER INDEX', 'CREATE TABLE', 'CREATE SCHEMA', 'ALTER VIEW',
        'ALTER MATERIALIZED VIEW', 'ALTER FOREIGN TABLE'
    )
    EXECUTE FUNCTION autoembed._follow_tables();

DROP EVENT TRIGGER IF EXISTS autoembed_follow_schemas;
CREATE EVENT TRIGGER autoembed_follow_schemas
    ON ddl_command_end
    WHEN TAG IN ('ALTER SCHEMA')
    EXECUTE FUNCTION autoembed._follow_schemas();

DROP EVENT TRIGGER IF EXISTS autoembed_follow_rewrite;
CREATE EVENT TRIGGER autoembed_follow_rewrite
    ON table_rewrite
    EXECUTE FUNCTION autoembed._follow_rewrite();

DROP EVENT TRIGGER IF EXISTS autoembed_follow_functions;
CREATE EVENT TRIGGER autoembed_follow_functions
    ON ddl_command_end
    WHEN TAG IN ('CREATE FUNCTION', 'ALTER FUNCTION', 'ALTER ROUTINE')
    EXECUTE FUNCTION autoembed._follow_functions();

DROP EVENT TRIGGER IF EXISTS autoembed_follow_grants;
CREATE EVENT TRIGGER autoembed_follow_grants
    ON ddl_command_end
    WHEN TAG IN ('GRANT', 'REVOKE', 'CREATE SCHEMA')
    EXECUTE FUNCTION autoembed._follow_grants();
-- A restore may say that it is a replica.
ALTER EVENT TRIGGER autoembed_follow_grants ENABLE ALWAYS;

-- No statement of a job can say this itself: CREATE INDEX CONCURRENTLY stands alone.
DROP EVENT TRIGGER IF EXISTS autoembed_build_without_workers;
CREATE EVENT TRIGGER autoembed_build_without_workers
    ON ddl_command_start
    WHEN TAG IN ('CREATE INDEX')
    EXECUTE FUNCTION autoembed._build_without_workers();

DROP EVENT TRIGGER IF EXISTS autoembed_check_trigger;
CREATE EVENT TRIGGER autoembed_check_trigger
    ON ddl_command_end
    WHEN TAG IN ('CREATE TRIGGER')
    EXECUTE FUNCTION autoembed._check_trigger();

DROP EVENT TRIGGER IF EXISTS autoembed_check_policy;
CREATE EVENT TRIGGER autoembed_check_policy
    ON ddl_command_end
    WHEN TAG IN ('CREATE POLICY')
    EXECUTE FUNCTION autoembed._check_policy();

DROP EVENT TRIGGER IF EXISTS autoembed_check_restored;
CREATE EVENT TRIGGER autoembed_check_restored
    ON ddl_command_end
    WHEN TAG IN ('CREATE FUNCTION', 'GRANT')
    EXECUTE FUNCTION autoembed._check_restored();
-- A restore may say that it is a replica.
ALTER EVENT TRIGGER autoembed_check_restored ENABLE ALWAYS;

DROP EVENT TRIGGER IF EXISTS autoembed_follow_restore;
CREATE EVENT TRIGGER autoembed_follow_restore
    ON ddl_command_end
    WHEN TAG IN ('ALTER TABLE')
    EXECUTE FUNCTION autoembed._follow_restore();
ALTER EVENT TRIGGER autoembed_follow_restore ENABLE ALWAYS;

DROP EVENT TRIGGER IF EXISTS autoembed_protect_functions;
CREATE EVENT TRIGGER autoembed_protect_functions
    ON ddl_command_end
    WHEN TAG IN ('ALTER FUNCTION', 'ALTER ROUTINE', 'ALTER SCHEMA')
    EXECUTE FUNCTION autoembed._protect_functions();

DROP EVENT TRIGGER IF EXISTS autoembed_before_drop;
CREATE EVENT TRIGGER autoembed_before_drop
    ON ddl_command_start
    WHEN TAG IN ('DROP EXTENSION', 'DROP OWNED')
    EXECUTE FUNCTION autoembed._before_drop();

DROP EVENT TRIGGER IF EXISTS autoembed_after_drop;
CREATE EVENT TRIGGER autoembed_after_drop
    ON ddl_command_end
    WHEN TAG IN ('DROP EXTENSION', 'DROP OWNED')
    EXECUTE FUNCTION autoembed._after_drop();

DROP EVENT TRIGGER IF EXISTS autoembed_updated;
CREATE EVENT TRIGGER autoembed_updated
    ON ddl_command_end
    WHEN TAG IN ('ALTER EXTENSION')
    EXECUTE FUNCTION autoembed._updated();

-- A new object is for its owner alone, whatever the default privileges are. An object with initial privileges is not
-- new, so its grants stay.
DO LANGUAGE plpgsql $plpgsql$
DECLARE
    _member record;
BEGIN
    FOR _member IN
        SELECT format('%s %s', m.kind, m.name) AS object,
               string_agg(CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, ', ') AS grantees
        FROM (
            SELECT d.classid, d.objid, 'ROUTINE' AS kind, p.oid::regprocedure::text AS name,
                   p.proowner AS owner, p.proacl AS acl
            FROM pg_depend AS d
            JOIN pg_proc AS p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
            WHERE d.deptype = 'e'
              AND d.refobjid = (SELECT e.oid FROM pg_extension AS e WHERE e.extname = 'autoembed')
            UNION ALL
            SELECT d.classid, d.objid, CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::regclass::text,
                   c.relowner, c.relacl
            FROM pg_depend AS d
            JOIN pg_class AS c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind IN ('r', 'v', 'S')
            WHERE d.deptype = 'e'
              AND d.refobjid = (SELECT e.oid FROM pg_extension AS e WHERE e.extname = 'autoembed')
            UNION ALL
            SELECT 'pg_namespace'::regclass, n.oid, 'SCHEMA', 'autoembed', n.nspowner, n.nspacl
            FROM pg_namespace AS n
            WHERE n.nspname = 'autoembed'
        ) AS m
        CROSS JOIN LATERAL (
            SELECT x.grantee FROM aclexplode(m.acl) AS x WHERE x.grantee <> m.owner
            UNION
            SELECT 0
        ) AS a
        WHERE NOT EXISTS (
            SELECT FROM pg_init_privs AS i WHERE i.classoid = m.classid AND i.objoid = m.objid AND i.objsubid = 0
        )
        GROUP BY m.kind, m.name
    LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s', _member.object, _member.grantees);
    END LOOP;
END;
$plpgsql$;

-- The view of chunks calls it with the rights of its reader. Nobody else can name it without a right in the schema.
GRANT EXECUTE ON FUNCTION autoembed._part_of_long_text TO PUBLIC;
