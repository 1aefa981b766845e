-- The pipelines, the backfills, and the records of rows.
-- No foreign key joins tables that a dump has: a parallel restore loads them in any order.

CREATE TABLE autoembed.pipeline (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    table_id regclass NOT NULL,
    embedding_column name NOT NULL,
    key_columns name[] NOT NULL,
    content_columns name[],
    content_template text,
    content_function text,
    content_function_id text,
    condition text,
    condition_columns jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(condition_columns) = 'object'),
    condition_objects jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(condition_objects) = 'object'),
    model text,
    on_change text NOT NULL DEFAULT 'keep' CHECK (on_change IN ('keep', 'clear')),
    truncate boolean NOT NULL DEFAULT true,
    replicated boolean NOT NULL DEFAULT false,
    managed boolean NOT NULL DEFAULT true,
    paused boolean NOT NULL DEFAULT false,
    table_shape jsonb,
    built_from text,
    ended boolean NOT NULL DEFAULT false,
    content_function_oid oid,
    embeddings_table regclass,
    chunking text NOT NULL DEFAULT 'none' CHECK (chunking IN ('structure', 'tokens', 'none', 'function')),
    chunk_size integer,
    chunk_overlap integer NOT NULL DEFAULT 0,
    warned_of text,
    stale_since timestamptz,
    text_config text,
    ef_search integer CHECK (ef_search BETWEEN 1 AND 1000),
    recall_target double precision,
    recall double precision,
    recall_measured_at timestamptz,
    adopts boolean NOT NULL DEFAULT false,
    chunk_function text,
    chunk_function_oid oid,
    chunk_prefix text,
    binary_index boolean NOT NULL DEFAULT false,
    plan_problem text,
    planned_at timestamptz,
    former_chunking jsonb,
    CONSTRAINT pipeline_embedding_column_key UNIQUE NULLS NOT DISTINCT (table_id, embeddings_table, embedding_column),
    CHECK (num_nonnulls(content_columns, content_template, content_function) = 1),
    CHECK ((chunking = 'function') = (chunk_function IS NOT NULL))
);
-- A search may name the embeddings table.
CREATE INDEX pipeline_embeddings_table_idx ON autoembed.pipeline (embeddings_table);
COMMENT ON TABLE autoembed.pipeline IS
    'One embedding column of one table, with its content and its model. See enable().';
COMMENT ON COLUMN autoembed.pipeline.id IS 'The number in its jobs and in the names of its functions and triggers.';
COMMENT ON COLUMN autoembed.pipeline.table_id IS 'The table. For a partitioned table: the root.';
COMMENT ON COLUMN autoembed.pipeline.embedding_column IS
    'The vector or halfvec column that holds the embeddings, in the table or in its embeddings table.';
COMMENT ON COLUMN autoembed.pipeline.key_columns IS 'The columns by which its rows are found.';
COMMENT ON COLUMN autoembed.pipeline.content_columns IS
    'The columns whose values, joined by blank lines, are the text.';
COMMENT ON COLUMN autoembed.pipeline.content_template IS 'The text with columns in braces.';
COMMENT ON COLUMN autoembed.pipeline.content_function IS
    'The function of a row that gives the text, by the name in enable() or in the trigger.';
COMMENT ON COLUMN autoembed.pipeline.content_function_id IS
    'The present name of that function, with its schema. A function of that name in another schema is another one.';
COMMENT ON COLUMN autoembed.pipeline.condition IS
    'The condition of the rows that have an embedding; NULL: every row with a text.';
COMMENT ON COLUMN autoembed.pipeline.condition_columns IS
    'The columns that the condition uses: {name in the condition: present name}.';
COMMENT ON COLUMN autoembed.pipeline.condition_objects IS
    'The functions, operators, types and collations that the condition uses, apart from PostgreSQL''s own: {full name: '
    '{type, name, owner, oid}}. The owner is the one when the condition was given, and the OID is of that database';
COMMENT ON COLUMN autoembed.pipeline.model IS 'Its model; NULL: the default model.';
COMMENT ON COLUMN autoembed.pipeline.on_change IS
    'The fate of a vector whose text changes. keep: it stays until the new one is written. clear: it is cleared at '
    'once.';
COMMENT ON COLUMN autoembed.pipeline.truncate IS
    'Whether a text longer than the model takes is truncated, and recorded in embedded. If not, it fails.';
COMMENT ON COLUMN autoembed.pipeline.replicated IS
    'Whether its triggers also fire for rows that logical replication applies.';
COMMENT ON COLUMN autoembed.pipeline.managed IS
    'Whether enable() made its triggers. If not, CREATE TRIGGER statements made them.';
COMMENT ON COLUMN autoembed.pipeline.paused IS 'Whether its jobs wait until resume().';
COMMENT ON COLUMN autoembed.pipeline.table_shape IS
    'The table''s columns, embedding type and partitions when they were last seen. A difference shows a change.';
COMMENT ON COLUMN autoembed.pipeline.built_from IS
    'The digest of the facts from which its functions were made. A difference shows that they are outdated. stopped: '
    'a column is missing, so it has no triggers.';
COMMENT ON COLUMN autoembed.pipeline.content_function_oid IS
    'Its OID, which a rename does not change. A dump and pg_upgrade give it another one; then the name counts.';
COMMENT ON COLUMN autoembed.pipeline.embeddings_table IS
    'The table beside it that holds the embeddings; NULL: they are in the rows themselves.';
COMMENT ON COLUMN autoembed.pipeline.chunking IS
    'How its texts are cut into chunks. structure: at headings, paragraphs and sentences. tokens: at equal lengths. '
    'none: a text is one chunk. function: by chunk_function.';
COMMENT ON COLUMN autoembed.pipeline.chunk_size IS 'The most tokens of a chunk; NULL: what suits the model.';
COMMENT ON COLUMN autoembed.pipeline.chunk_overlap IS 'The tokens that a chunk repeats of the chunk before.';
COMMENT ON COLUMN autoembed.pipeline.ended IS
    'Set to true by disable(), which deletes the row. Owners have no right to DELETE, since it includes LOCK TABLE.';
COMMENT ON COLUMN autoembed.pipeline.warned_of IS
    'The problem that the server''s log was last told of. NULL: none since the last one was over.';
COMMENT ON COLUMN autoembed.pipeline.stale_since IS
    'When its model or content changed. Vectors from before are stale until a scan has read all rows. NULL: none is.';
COMMENT ON COLUMN autoembed.pipeline.text_config IS
    'The text search configuration of its text index, by its full name. NULL: it has no text index.';
COMMENT ON COLUMN autoembed.pipeline.ef_search IS
    'How many candidates an HNSW index keeps in searches, as tune() has set it. NULL: 100.';
COMMENT ON COLUMN autoembed.pipeline.recall_target IS
    'The recall that tune() was asked for. NULL: it was never called.';
COMMENT ON COLUMN autoembed.pipeline.recall IS 'The recall that tune() has measured.';
COMMENT ON COLUMN autoembed.pipeline.recall_measured_at IS 'When tune() has measured it.';
COMMENT ON COLUMN autoembed.pipeline.adopts IS
    'Whether enable() took the vectors that were there for those of the rows'' texts.';
COMMENT ON COLUMN autoembed.pipeline.chunk_function IS
    'The present name, with its schema, of the function that cuts its texts into chunks; NULL: none does.';
COMMENT ON COLUMN autoembed.pipeline.chunk_function_oid IS
    'Its OID, which a rename does not change. A dump and pg_upgrade give it another one; then the name counts.';
COMMENT ON COLUMN autoembed.pipeline.chunk_prefix IS
    'The text with columns in braces that each chunk is embedded behind; NULL: none.';
COMMENT ON COLUMN autoembed.pipeline.binary_index IS
    'Whether the index that create_index builds has one bit for each dimension.';
COMMENT ON COLUMN autoembed.pipeline.plan_problem IS
    'The error for which no text of its rows can be read, which stops it; NULL: none is known.';
COMMENT ON COLUMN autoembed.pipeline.planned_at IS 'When that was last looked at.';
COMMENT ON COLUMN autoembed.pipeline.former_chunking IS
    'How its texts were cut when its embeddings moved from beside the rows into them; NULL: they did not.';

-- Lanes read a definition in each pass, and nothing interrupts that. Older definitions are not looked at: none keeps a
-- database from its update.
ALTER TABLE autoembed.pipeline ADD CONSTRAINT pipeline_definition_is_short CHECK (
    octet_length(content_template) <= 5000
    AND octet_length(chunk_function) <= 1000
    AND octet_length(text_config) <= 1000
    AND octet_length(chunk_prefix) <= 5000
    AND octet_length(former_chunking::text) <= 100000
    AND cardinality(content_columns) <= 1600
    AND octet_length(condition) <= 100000
    AND octet_length(condition_columns::text) <= 100000
    AND octet_length(condition_objects::text) <= 100000
    AND jsonb_array_length(jsonb_path_query_array(condition_objects, '$.keyvalue()')) <= 200
) NOT VALID;

SELECT pg_catalog.pg_extension_config_dump('autoembed.pipeline_id_seq', '');

-- The owner of a table has the rights over its pipelines. The policy knows the caller, which a SECURITY DEFINER
-- function does not.
ALTER TABLE autoembed.pipeline ENABLE ROW LEVEL SECURITY;

CREATE POLICY table_owner ON autoembed.pipeline
    USING (EXISTS (SELECT FROM pg_class AS c WHERE c.oid = table_id AND pg_has_role(c.relowner, 'USAGE')));

CREATE TABLE autoembed.backfill (
    pipeline_id integer PRIMARY KEY,
    condition text,
    force boolean NOT NULL DEFAULT false,
    create_index boolean NOT NULL DEFAULT false,
    position text,
    rows_queued bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    served_at timestamptz DEFAULT clock_timestamp(),
    scanned_at timestamptz,
    index_problem text,
    rows_recorded bigint NOT NULL DEFAULT 0,
    condition_objects jsonb NOT NULL DEFAULT '{}' CHECK (
        jsonb_typeof(condition_objects) = 'object'
        AND octet_length(condition_objects::text) <= 100000
        AND jsonb_array_length(jsonb_path_query_array(condition_objects, '$.keyvalue()')) <= 200
    )
);
COMMENT ON TABLE autoembed.backfill IS
    'The tables that lanes scan, in the order of their keys, for embeddings that are missing or stale.';
COMMENT ON COLUMN autoembed.backfill.pipeline_id IS 'The pipeline.';
COMMENT ON COLUMN autoembed.backfill.condition IS 'The condition of the rows that are scanned; NULL: all rows.';
COMMENT ON COLUMN autoembed.backfill.force IS 'Whether rows whose embedding is up to date are embedded again, too.';
COMMENT ON COLUMN autoembed.backfill.create_index IS 'Whether an HNSW index is built at the end.';
COMMENT ON COLUMN autoembed.backfill.position IS 'The last key that was queued, as a JSON array; NULL: none yet.';
COMMENT ON COLUMN autoembed.backfill.rows_queued IS 'The number of rows that were queued.';
COMMENT ON COLUMN autoembed.backfill.started_at IS 'When the backfill was asked for.';
COMMENT ON COLUMN autoembed.backfill.served_at IS 'When a lane last worked on it; at first, when it was asked for.';
COMMENT ON COLUMN autoembed.backfill.scanned_at IS 'When the last row was queued; NULL: there are more.';
COMMENT ON COLUMN autoembed.backfill.index_problem IS
    'The reason why the index could not be built. No lane tries again.';
COMMENT ON COLUMN autoembed.backfill.rows_recorded IS
    'The number of those rows that had an embedding when it was asked for. If there were more, rows have gone unseen.';
COMMENT ON COLUMN autoembed.backfill.condition_objects IS
    'The functions, operators, types and collations that the condition uses, as in autoembed.pipeline.';

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
    'Pipelines that have ended a pass by an error of their own. No lane claims their jobs while they rest.';
COMMENT ON COLUMN autoembed.pipeline_rest.pipeline_id IS 'The pipeline that rests.';
COMMENT ON COLUMN autoembed.pipeline_rest.until IS 'When lanes claim its jobs again.';
COMMENT ON COLUMN autoembed.pipeline_rest.failures IS 'Errors in a row. Each doubles the next rest.';
COMMENT ON COLUMN autoembed.pipeline_rest.reason IS 'The last error.';

CREATE TABLE autoembed.embedded (
    pipeline_id integer NOT NULL,
    key text COLLATE pg_catalog."C" NOT NULL,
    digest bytea NOT NULL,
    truncated boolean NOT NULL,
    vector_digest bytea,
    embedded_at timestamptz DEFAULT clock_timestamp(),
    replaced smallint NOT NULL DEFAULT 0,
    PRIMARY KEY (pipeline_id, key)
);
COMMENT ON TABLE autoembed.embedded IS
    'The digest of the text from which each embedding was made. A text with the same digest is not sent again.';
COMMENT ON COLUMN autoembed.embedded.pipeline_id IS 'The pipeline.';
COMMENT ON COLUMN autoembed.embedded.key IS 'The row''s key as a JSON array.';
COMMENT ON COLUMN autoembed.embedded.digest IS 'BLAKE2b of the model and the text, 16 bytes.';
COMMENT ON COLUMN autoembed.embedded.truncated IS 'Whether the text was longer than the model takes.';
COMMENT ON COLUMN autoembed.embedded.vector_digest IS
    'SHA-256 of the vector as it is stored, 8 bytes. NULL: not known. Empty: the row has a vector of somebody else.';
COMMENT ON COLUMN autoembed.embedded.embedded_at IS 'When the vector was written. NULL: by version 0.1.0.';
COMMENT ON COLUMN autoembed.embedded.replaced IS
    'How often within an hour the vector of this text was written again because somebody else had replaced it.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.embedded', '');

CREATE TABLE autoembed.paid_chunk (
    pipeline_id integer NOT NULL,
    key text COLLATE pg_catalog."C" NOT NULL,
    digest bytea NOT NULL,
    vector bytea NOT NULL,
    PRIMARY KEY (pipeline_id, key, digest)
);
COMMENT ON TABLE autoembed.paid_chunk IS
    'The vectors of chunks of long texts that have not all their vectors yet. A lane that goes on does not ask again.';
COMMENT ON COLUMN autoembed.paid_chunk.pipeline_id IS 'The pipeline.';
COMMENT ON COLUMN autoembed.paid_chunk.key IS 'The row''s key as a JSON array.';
COMMENT ON COLUMN autoembed.paid_chunk.digest IS 'The digest of the chunk.';
COMMENT ON COLUMN autoembed.paid_chunk.vector IS 'Its vector, 4 bytes for each dimension.';

-- A vector does not compress.
ALTER TABLE autoembed.paid_chunk ALTER COLUMN vector SET STORAGE EXTERNAL;

CREATE TABLE autoembed.failure (
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    pipeline_id integer,
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
    'The failed list: rows that cannot be embedded, and messages that name no row. See the view failed.';
COMMENT ON COLUMN autoembed.failure.id IS 'The number of the failure.';
COMMENT ON COLUMN autoembed.failure.pipeline_id IS 'The pipeline; NULL for a message that names none.';
COMMENT ON COLUMN autoembed.failure.key IS 'The row''s key as a JSON array.';
COMMENT ON COLUMN autoembed.failure.message IS 'The message that names no row, as it stood in the queue.';
COMMENT ON COLUMN autoembed.failure.error_class IS
    'row: the text or the table is at fault. message: the job itself is.';
COMMENT ON COLUMN autoembed.failure.reason IS 'The last error.';
COMMENT ON COLUMN autoembed.failure.attempts IS 'The number of attempts.';
COMMENT ON COLUMN autoembed.failure.excerpt IS 'The first 200 characters of the text, where there was one.';
COMMENT ON COLUMN autoembed.failure.first_failed_at IS 'When it was first given up.';
COMMENT ON COLUMN autoembed.failure.last_failed_at IS 'When it was last given up.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.failure', '');
SELECT pg_catalog.pg_extension_config_dump('autoembed.failure_id_seq', '');
