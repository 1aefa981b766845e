-- Pipelines, backfills, and what is known of rows.

CREATE TABLE autoembed.pipeline (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    table_id regclass NOT NULL,
    embedding_column name NOT NULL,
    key_columns name[] NOT NULL,
    content_columns name[],
    content_template text,
    content_function text,
    content_function_id regprocedure,
    condition text,
    condition_columns jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(condition_columns) = 'object'),
    condition_objects jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(condition_objects) = 'object'),
    model text REFERENCES autoembed.model (name) ON UPDATE CASCADE,
    on_change text NOT NULL DEFAULT 'keep' CHECK (on_change IN ('keep', 'clear')),
    truncate boolean NOT NULL DEFAULT true,
    replicated boolean NOT NULL DEFAULT false,
    managed boolean NOT NULL DEFAULT true,
    paused boolean NOT NULL DEFAULT false,
    table_shape jsonb,
    built_from text,
    ended boolean NOT NULL DEFAULT false,
    content_function_schema name,
    UNIQUE (table_id, embedding_column),
    CHECK (num_nonnulls(content_columns, content_template, content_function) = 1)
);
COMMENT ON TABLE autoembed.pipeline IS
    'One embedding column of one table: what is embedded there, with which model; see enable().';
COMMENT ON COLUMN autoembed.pipeline.id IS 'Names it in jobs and in its functions and triggers.';
COMMENT ON COLUMN autoembed.pipeline.table_id IS 'The table; of a partitioned one the root.';
COMMENT ON COLUMN autoembed.pipeline.embedding_column IS 'The vector or halfvec column that holds the embeddings.';
COMMENT ON COLUMN autoembed.pipeline.key_columns IS 'The columns by which its rows are found.';
COMMENT ON COLUMN autoembed.pipeline.content_columns IS 'The columns whose values, joined by blank lines, are the text.';
COMMENT ON COLUMN autoembed.pipeline.content_template IS 'The text with columns in braces.';
COMMENT ON COLUMN autoembed.pipeline.content_function IS
    'The function of a row that gives the text, as enable() or the trigger named it.';
COMMENT ON COLUMN autoembed.pipeline.content_function_id IS 'That function; follows it when it is renamed.';
COMMENT ON COLUMN autoembed.pipeline.condition IS 'Which rows have an embedding at all; NULL: every row with a text.';
COMMENT ON COLUMN autoembed.pipeline.condition_columns IS
    'The columns that it uses: {name in the condition: name now}.';
COMMENT ON COLUMN autoembed.pipeline.condition_objects IS
    'The functions, operators, types and collations, PostgreSQL''s own aside, that it uses: {name in full: what it is}.';
COMMENT ON COLUMN autoembed.pipeline.model IS 'Its model; NULL: the default model.';
COMMENT ON COLUMN autoembed.pipeline.on_change IS
    'What becomes of a vector when its text changes: keep until the new one is there, or clear at once.';
COMMENT ON COLUMN autoembed.pipeline.truncate IS
    'Whether a text longer than the model takes is cut, and noted in embedded, or fails.';
COMMENT ON COLUMN autoembed.pipeline.replicated IS
    'Whether its triggers also fire for rows that logical replication applies.';
COMMENT ON COLUMN autoembed.pipeline.managed IS
    'Whether enable() made its triggers; otherwise they are those of CREATE TRIGGER statements.';
COMMENT ON COLUMN autoembed.pipeline.paused IS 'Whether its jobs wait until resume().';
COMMENT ON COLUMN autoembed.pipeline.table_shape IS
    'The table''s columns, embedding type and partitions as last seen, to follow changes.';
COMMENT ON COLUMN autoembed.pipeline.built_from IS
    'What its functions were built from, to see when the table has changed.';
COMMENT ON COLUMN autoembed.pipeline.content_function_schema IS
    'Its schema when it was named. A function of that name in another schema is not taken for it.';
COMMENT ON COLUMN autoembed.pipeline.ended IS
    'Set to true by disable(), which deletes the row. Owners have no right to DELETE, since it includes LOCK TABLE.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.pipeline', '');
SELECT pg_catalog.pg_extension_config_dump('autoembed.pipeline_id_seq', '');

-- The rights of a table's owner over its pipelines, whoever he is: what no SECURITY DEFINER function could know.
ALTER TABLE autoembed.pipeline ENABLE ROW LEVEL SECURITY;

CREATE POLICY table_owner ON autoembed.pipeline
    USING (EXISTS (SELECT FROM pg_class AS c WHERE c.oid = table_id AND pg_has_role(c.relowner, 'USAGE')));

CREATE TABLE autoembed.backfill (
    pipeline_id integer PRIMARY KEY REFERENCES autoembed.pipeline (id) ON DELETE CASCADE,
    condition text,
    force boolean NOT NULL DEFAULT false,
    create_index boolean NOT NULL DEFAULT false,
    position text,
    rows_queued bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    served_at timestamptz,
    scanned_at timestamptz,
    index_problem text
);
COMMENT ON TABLE autoembed.backfill IS
    'Tables whose rows are being looked through, in the order of their keys, for what is missing or stale.';
COMMENT ON COLUMN autoembed.backfill.pipeline_id IS 'The pipeline.';
COMMENT ON COLUMN autoembed.backfill.condition IS 'Which rows; NULL: all.';
COMMENT ON COLUMN autoembed.backfill.force IS 'Whether rows whose embedding is that of their text are embedded anew, too.';
COMMENT ON COLUMN autoembed.backfill.create_index IS 'Whether an HNSW index is to be built at the end.';
COMMENT ON COLUMN autoembed.backfill.position IS 'The last key that was queued, as a JSON array; NULL: none yet.';
COMMENT ON COLUMN autoembed.backfill.rows_queued IS 'How many rows were queued.';
COMMENT ON COLUMN autoembed.backfill.started_at IS 'When it was asked for.';
COMMENT ON COLUMN autoembed.backfill.served_at IS 'When a lane last took its turn.';
COMMENT ON COLUMN autoembed.backfill.scanned_at IS 'When the last row was queued; NULL: there are more.';
COMMENT ON COLUMN autoembed.backfill.index_problem IS 'Why the index could not be built, which is not tried again.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.backfill', '');

ALTER TABLE autoembed.backfill ENABLE ROW LEVEL SECURITY;

-- The pipeline's own policy decides which of its rows are seen here.
CREATE POLICY table_owner ON autoembed.backfill USING (pipeline_id IN (SELECT p.id FROM autoembed.pipeline AS p));

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

CREATE TABLE autoembed.embedded (
    pipeline_id integer NOT NULL REFERENCES autoembed.pipeline (id) ON DELETE CASCADE,
    key text COLLATE pg_catalog."C" NOT NULL,
    digest bytea NOT NULL,
    truncated boolean NOT NULL,
    PRIMARY KEY (pipeline_id, key)
);
COMMENT ON TABLE autoembed.embedded IS
    'Which text each embedding was made from, so that an unchanged text is never sent again.';
COMMENT ON COLUMN autoembed.embedded.pipeline_id IS 'The pipeline.';
COMMENT ON COLUMN autoembed.embedded.key IS 'The row''s key as a JSON array.';
COMMENT ON COLUMN autoembed.embedded.digest IS 'BLAKE2b of the model and the text, 16 bytes.';
COMMENT ON COLUMN autoembed.embedded.truncated IS 'Whether the text was longer than the model takes.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.embedded', '');

CREATE TABLE autoembed.failure (
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    pipeline_id integer REFERENCES autoembed.pipeline (id) ON DELETE CASCADE,
    key text COLLATE pg_catalog."C",
    message jsonb,
    error_class text NOT NULL,
    reason text NOT NULL,
    attempts integer NOT NULL,
    excerpt text,
    first_failed_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    last_failed_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    CHECK ((pipeline_id IS NULL) = (key IS NULL) AND (pipeline_id IS NULL) = (message IS NOT NULL))
);
COMMENT ON TABLE autoembed.failure IS
    'What was given up: rows that cannot be embedded, and messages that name no row. See the view failed.';
COMMENT ON COLUMN autoembed.failure.id IS 'Its number.';
COMMENT ON COLUMN autoembed.failure.pipeline_id IS 'The pipeline; NULL for a message that names none.';
COMMENT ON COLUMN autoembed.failure.key IS 'The row''s key as a JSON array.';
COMMENT ON COLUMN autoembed.failure.message IS 'The message as it stood in the queue, where it names no row.';
COMMENT ON COLUMN autoembed.failure.error_class IS 'row: the text or the table; message: the job itself.';
COMMENT ON COLUMN autoembed.failure.reason IS 'What went wrong the last time.';
COMMENT ON COLUMN autoembed.failure.attempts IS 'How often it was tried.';
COMMENT ON COLUMN autoembed.failure.excerpt IS 'The first 200 characters of the text, where there was one.';
COMMENT ON COLUMN autoembed.failure.first_failed_at IS 'When it was given up first.';
COMMENT ON COLUMN autoembed.failure.last_failed_at IS 'When it was given up last.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.failure', '');
SELECT pg_catalog.pg_extension_config_dump('autoembed.failure_id_seq', '');
