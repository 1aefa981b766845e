-- The requests, inputs and tokens by model and pipeline.
-- A publication of all tables would refuse each DELETE of a table without a replica identity.

CREATE TABLE autoembed.usage_entry (
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    model text NOT NULL,
    pipeline_id integer,
    requests integer NOT NULL,
    inputs integer NOT NULL,
    tokens bigint NOT NULL,
    rows integer NOT NULL
);
ALTER TABLE autoembed.usage_entry REPLICA IDENTITY FULL;

CREATE INDEX usage_entry_at_idx ON autoembed.usage_entry (at);
COMMENT ON TABLE autoembed.usage_entry IS
    'The requests of the last minutes, one by one, so that lanes never wait for each other''s counts. Older ones are '
    'added up in usage_day.';
COMMENT ON COLUMN autoembed.usage_entry.at IS 'When the answer came.';
COMMENT ON COLUMN autoembed.usage_entry.model IS 'The model.';
COMMENT ON COLUMN autoembed.usage_entry.pipeline_id IS 'The pipeline; NULL: embed().';
COMMENT ON COLUMN autoembed.usage_entry.requests IS 'Requests; 0 for the second pipeline in one request.';
COMMENT ON COLUMN autoembed.usage_entry.inputs IS 'Texts in the requests.';
COMMENT ON COLUMN autoembed.usage_entry.tokens IS
    'Tokens that the provider counted. An estimate where the provider counts none.';
COMMENT ON COLUMN autoembed.usage_entry.rows IS 'Rows that have these texts.';

CREATE TABLE autoembed.usage_day (
    day date NOT NULL,
    model text NOT NULL,
    pipeline_id integer,
    requests bigint NOT NULL,
    inputs bigint NOT NULL,
    tokens bigint NOT NULL,
    rows bigint NOT NULL,
    UNIQUE NULLS NOT DISTINCT (day, model, pipeline_id)
);
ALTER TABLE autoembed.usage_day REPLICA IDENTITY FULL;
COMMENT ON TABLE autoembed.usage_day IS
    'The requests to each model by day, except those of the last minutes. See the view usage.';
COMMENT ON COLUMN autoembed.usage_day.day IS 'The day, in UTC.';
COMMENT ON COLUMN autoembed.usage_day.model IS 'The model.';
COMMENT ON COLUMN autoembed.usage_day.pipeline_id IS 'The pipeline; NULL: embed().';
COMMENT ON COLUMN autoembed.usage_day.requests IS 'Requests.';
COMMENT ON COLUMN autoembed.usage_day.inputs IS 'Texts in the requests.';
COMMENT ON COLUMN autoembed.usage_day.tokens IS 'Tokens.';
COMMENT ON COLUMN autoembed.usage_day.rows IS 'Rows that have these texts.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.usage_entry', '');

SELECT pg_catalog.pg_extension_config_dump('autoembed.usage_day', '');

CREATE TABLE autoembed.turn (
    name text PRIMARY KEY
);
COMMENT ON TABLE autoembed.turn IS
    'Locks that only this extension takes. A session has the turn of a name while it holds the lock of the row.';
COMMENT ON COLUMN autoembed.turn.name IS 'usage: the turn to add up old usage.';

INSERT INTO autoembed.turn (name) VALUES ('usage');
