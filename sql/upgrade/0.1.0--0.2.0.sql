-- Replaced by _keep_restored_queue() and _keep_restored_model().
DROP FUNCTION autoembed._keep_restored CASCADE;
-- Replaced by _create_function() and the templates.
DROP FUNCTION autoembed._create_owned;
DROP FUNCTION autoembed._build_capture;
-- A parameter has another name.
DROP FUNCTION autoembed._drop_functions;
DROP FUNCTION autoembed._claim;
DROP FUNCTION autoembed._take_permit;
-- Slots of requests in flight are rows of autoembed.slot.
DROP FUNCTION autoembed._slot_key;
-- PostgreSQL refuses what they looked for.
DROP FUNCTION autoembed._check_deferred;
DROP FUNCTION autoembed._prepared;
DROP FUNCTION autoembed._forget_prepared;

DROP FUNCTION autoembed._pipelines;
DROP FUNCTION autoembed._content_function;

ALTER TABLE autoembed.pipeline ADD COLUMN ended boolean NOT NULL DEFAULT false;
ALTER TABLE autoembed.pipeline ADD COLUMN content_function_schema name;
COMMENT ON COLUMN autoembed.pipeline.content_function_schema IS
    'Its schema when it was named. A function of that name in another schema is not taken for it.';
UPDATE autoembed.pipeline AS p
SET content_function_schema = (
    SELECT n.nspname FROM pg_proc AS f JOIN pg_namespace AS n ON n.oid = f.pronamespace WHERE f.oid = p.content_function_id
);
COMMENT ON COLUMN autoembed.pipeline.ended IS
    'Set to true by disable(), which deletes the row. Owners have no right to DELETE, since it includes LOCK TABLE.';

CREATE TABLE autoembed.pipeline_rest (
    pipeline_id integer PRIMARY KEY REFERENCES autoembed.pipeline (id) ON DELETE CASCADE,
    until timestamptz NOT NULL,
    failures integer NOT NULL,
    reason text NOT NULL
);
COMMENT ON TABLE autoembed.pipeline_rest IS
    'Pipelines that have ended a pass by an error of their own; no lane claims their jobs before their time.';
COMMENT ON COLUMN autoembed.pipeline_rest.pipeline_id IS 'The pipeline that rests.';
COMMENT ON COLUMN autoembed.pipeline_rest.until IS 'When its jobs are claimed again.';
COMMENT ON COLUMN autoembed.pipeline_rest.failures IS 'Errors in a row. Each doubles the next rest.';
COMMENT ON COLUMN autoembed.pipeline_rest.reason IS 'The last error.';

CREATE UNLOGGED TABLE autoembed.slot (
    model text NOT NULL,
    number integer NOT NULL,
    pid integer,
    backend_start timestamptz,
    PRIMARY KEY (model, number)
);
COMMENT ON TABLE autoembed.slot IS
    'One row for each request that a model with max_requests_in_flight may have in flight, and the session that has it.';
COMMENT ON COLUMN autoembed.slot.model IS 'The model.';
COMMENT ON COLUMN autoembed.slot.number IS 'The number of the slot, from 1.';
COMMENT ON COLUMN autoembed.slot.pid IS 'The process that holds it; NULL: none.';
COMMENT ON COLUMN autoembed.slot.backend_start IS 'When that process started.';

CREATE TABLE autoembed.turn (
    name text PRIMARY KEY
);
COMMENT ON TABLE autoembed.turn IS
    'Locks that nobody else can take: a session has the turn of that name while it holds the lock of the row.';
COMMENT ON COLUMN autoembed.turn.name IS 'usage: adding up old usage.';

INSERT INTO autoembed.turn (name) VALUES ('usage');

ALTER TABLE autoembed.model_rest ADD COLUMN summary text NOT NULL DEFAULT 'its provider is in trouble';
COMMENT ON COLUMN autoembed.model_rest.reason IS
    'The last error, which may quote the provider, and a text of some tenant with it. For superusers and monitors.';
COMMENT ON COLUMN autoembed.model_rest.summary IS 'The same without words of the provider, for every tenant.';
DROP FUNCTION autoembed._rest_model;

-- A long key does not fit into an index.
ALTER TABLE autoembed.failure DROP CONSTRAINT failure_pipeline_id_key_key;
DROP FUNCTION autoembed._next_backfill;
DROP FUNCTION autoembed.schedule;

ALTER TABLE autoembed.model ADD COLUMN timeout_seconds double precision CHECK (timeout_seconds > 0);
COMMENT ON COLUMN autoembed.model.timeout_seconds IS 'Seconds that a request may take. NULL: those of the lane.';
DROP FUNCTION autoembed.create_model;
DROP FUNCTION autoembed.alter_model;
