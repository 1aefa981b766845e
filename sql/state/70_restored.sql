-- The models and pipelines of a dump.

-- A dump has them in a form that loads in every database, each as one jsonb: a table that the dump leaves out, or a
-- model that CREATE EXTENSION has made already, would cost all rows of a COPY.
CREATE TABLE autoembed.restored (
    kind text NOT NULL CHECK (kind IN ('model', 'pipeline')),
    definition jsonb NOT NULL,
    problem text
);
ALTER TABLE autoembed.restored REPLICA IDENTITY FULL;
-- Its rows become models and pipelines. pg_write_all_data gives the right to write all tables without a policy.
ALTER TABLE autoembed.restored ENABLE ROW LEVEL SECURITY;
COMMENT ON TABLE autoembed.restored IS
    'The models and pipelines that a restore could not bring back. See doctor().';
COMMENT ON COLUMN autoembed.restored.kind IS 'model or pipeline, the name of the table that it is for.';
COMMENT ON COLUMN autoembed.restored.definition IS 'The row of that table.';
COMMENT ON COLUMN autoembed.restored.problem IS
    'The error that kept it from that table. To set it to NULL tries again. To delete the row forgets the pipeline.';

-- pg_dump puts the condition behind its own SELECT.
SELECT pg_catalog.pg_extension_config_dump('autoembed.restored', $$
    WHERE true
    UNION ALL SELECT 'model', to_jsonb(m), NULL FROM autoembed.model AS m WHERE NOT m.builtin
    UNION ALL SELECT 'pipeline', to_jsonb(p), NULL FROM autoembed.pipeline AS p
$$);
-- A dump of version 0.1.0 has the rows of these tables themselves.
SELECT pg_catalog.pg_extension_config_dump('autoembed.model', 'WHERE false');
SELECT pg_catalog.pg_extension_config_dump('autoembed.pipeline', 'WHERE false');
