-- _keep_restored_queue() and _keep_restored_model() replace this function.
DROP FUNCTION autoembed._keep_restored CASCADE;
-- _create_function() and the templates replace these functions.
DROP FUNCTION autoembed._create_owned;
DROP FUNCTION autoembed._build_capture;
DROP FUNCTION autoembed._build_pipeline;
-- A parameter of each of these functions has another name.
DROP FUNCTION autoembed._drop_functions;
DROP FUNCTION autoembed._claim;
DROP FUNCTION autoembed._take_permit;
-- The slots of requests in flight are rows of autoembed.slot.
DROP FUNCTION autoembed._slot_key;
-- PostgreSQL itself refuses the code for which these functions looked.
DROP FUNCTION autoembed._check_deferred;
DROP FUNCTION autoembed._prepared;
DROP FUNCTION autoembed._forget_prepared;

-- _follow_drops() replaces this function and its event trigger.
DROP FUNCTION autoembed._end_broken CASCADE;
DROP FUNCTION autoembed._pipelines;
DROP FUNCTION autoembed._probe;
-- It returns an array.
DROP FUNCTION autoembed._owned_pipelines;
-- table_name is text in these views, and can be compared with a name.
DROP VIEW autoembed.status;
DROP VIEW autoembed.progress;
DROP VIEW autoembed.failed;
DROP VIEW autoembed.usage;
-- These functions know the digest of a row's vector, too.
DROP FUNCTION autoembed._digests;
DROP FUNCTION autoembed._record_embedded;
DROP FUNCTION autoembed._state_of;
DROP FUNCTION autoembed.preview;
-- They have new parameters.
DROP FUNCTION autoembed.enable;
DROP FUNCTION autoembed.alter_pipeline;
DROP FUNCTION autoembed.disable;
DROP FUNCTION autoembed._content_function;
DROP FUNCTION autoembed._backfill;
DROP FUNCTION autoembed._look_through;
DROP FUNCTION autoembed._missing_object;
DROP FUNCTION autoembed._estimate_texts;
DROP FUNCTION autoembed._price_and_rate;
DROP FUNCTION autoembed.estimate;
DROP FUNCTION autoembed._key_expression;

-- A parallel restore loads these tables in any order.
ALTER TABLE autoembed.pipeline DROP CONSTRAINT pipeline_model_fkey;
ALTER TABLE autoembed.backfill DROP CONSTRAINT backfill_pipeline_id_fkey;
ALTER TABLE autoembed.embedded DROP CONSTRAINT embedded_pipeline_id_fkey;
ALTER TABLE autoembed.failure DROP CONSTRAINT failure_pipeline_id_fkey;

ALTER TABLE autoembed.pipeline ADD COLUMN ended boolean NOT NULL DEFAULT false;
ALTER TABLE autoembed.pipeline ADD COLUMN content_function_oid oid;
ALTER TABLE autoembed.pipeline ADD COLUMN embeddings_table regclass;
ALTER TABLE autoembed.pipeline ADD COLUMN chunking text NOT NULL DEFAULT 'none'
    CHECK (chunking IN ('structure', 'tokens', 'none', 'function'));
ALTER TABLE autoembed.pipeline ADD COLUMN chunk_size integer;
ALTER TABLE autoembed.pipeline ADD COLUMN chunk_overlap integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN autoembed.pipeline.chunking IS
    'How its texts are cut into chunks. structure: at headings, paragraphs and sentences. tokens: at equal lengths. '
    'none: a text is one chunk. function: by chunk_function.';
COMMENT ON COLUMN autoembed.pipeline.chunk_size IS 'The most tokens of a chunk; NULL: what suits the model.';
COMMENT ON COLUMN autoembed.pipeline.chunk_overlap IS 'The tokens that a chunk repeats of the chunk before.';
ALTER TABLE autoembed.pipeline DROP CONSTRAINT pipeline_table_id_embedding_column_key;
ALTER TABLE autoembed.pipeline ADD CONSTRAINT pipeline_embedding_column_key
    UNIQUE NULLS NOT DISTINCT (table_id, embeddings_table, embedding_column);
CREATE INDEX pipeline_embeddings_table_idx ON autoembed.pipeline (embeddings_table);
COMMENT ON COLUMN autoembed.pipeline.embeddings_table IS
    'The table beside it that holds the embeddings; NULL: they are in the rows themselves.';
COMMENT ON COLUMN autoembed.pipeline.embedding_column IS
    'The vector or halfvec column that holds the embeddings, in the table or in its embeddings table.';
ALTER TABLE autoembed.pipeline ADD COLUMN warned_of text;
ALTER TABLE autoembed.pipeline ADD COLUMN stale_since timestamptz;
ALTER TABLE autoembed.pipeline ADD COLUMN text_config text;
ALTER TABLE autoembed.pipeline ADD COLUMN ef_search integer CHECK (ef_search BETWEEN 1 AND 1000);
ALTER TABLE autoembed.pipeline ADD COLUMN recall_target double precision;
ALTER TABLE autoembed.pipeline ADD COLUMN recall double precision;
ALTER TABLE autoembed.pipeline ADD COLUMN recall_measured_at timestamptz;
ALTER TABLE autoembed.pipeline ADD COLUMN adopts boolean NOT NULL DEFAULT false;
ALTER TABLE autoembed.pipeline ADD COLUMN chunk_function text;
ALTER TABLE autoembed.pipeline ADD COLUMN chunk_function_oid oid;
ALTER TABLE autoembed.pipeline ADD COLUMN chunk_prefix text;
ALTER TABLE autoembed.pipeline ADD COLUMN binary_index boolean NOT NULL DEFAULT false;
ALTER TABLE autoembed.pipeline ADD COLUMN plan_problem text;
ALTER TABLE autoembed.pipeline ADD COLUMN planned_at timestamptz;
ALTER TABLE autoembed.pipeline ADD COLUMN former_chunking jsonb;
ALTER TABLE autoembed.pipeline ADD CHECK ((chunking = 'function') = (chunk_function IS NOT NULL));
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
COMMENT ON COLUMN autoembed.pipeline.plan_problem IS
    'The error for which no text of its rows can be read, which stops it; NULL: none is known.';
COMMENT ON COLUMN autoembed.pipeline.planned_at IS 'When that was last looked at.';
COMMENT ON COLUMN autoembed.pipeline.former_chunking IS
    'How its texts were cut when its embeddings moved from beside the rows into them; NULL: they did not.';
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
COMMENT ON COLUMN autoembed.pipeline.content_function_oid IS
    'Its OID, which a rename does not change. A dump and pg_upgrade give it another one; then the name counts.';
UPDATE autoembed.pipeline AS p SET content_function_oid = p.content_function_id;
-- pg_upgrade refuses a column of type regprocedure.
ALTER TABLE autoembed.pipeline ALTER COLUMN content_function_id TYPE text USING NULL;
UPDATE autoembed.pipeline AS p
SET content_function_id = format('%I.%I', n.nspname, f.proname)
FROM pg_proc AS f
JOIN pg_namespace AS n ON n.oid = f.pronamespace
WHERE f.oid = p.content_function_oid;
COMMENT ON COLUMN autoembed.pipeline.ended IS
    'Set to true by disable(), which deletes the row. Owners have no right to DELETE, since it includes LOCK TABLE.';

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

CREATE UNLOGGED TABLE autoembed.slot (
    model text NOT NULL,
    number integer NOT NULL,
    pid integer,
    backend_start timestamptz,
    PRIMARY KEY (model, number)
);
COMMENT ON TABLE autoembed.slot IS
    'One row for each request that a model with max_requests_in_flight may have in flight, and the session that holds '
    'it.';
COMMENT ON COLUMN autoembed.slot.model IS 'The model.';
COMMENT ON COLUMN autoembed.slot.number IS 'The number of the slot, from 1.';
COMMENT ON COLUMN autoembed.slot.pid IS 'The process that holds the slot; NULL: none.';
COMMENT ON COLUMN autoembed.slot.backend_start IS 'When that process started.';

CREATE TABLE autoembed.turn (
    name text PRIMARY KEY
);
COMMENT ON TABLE autoembed.turn IS
    'Locks that only this extension takes. A session has the turn of a name while it holds the lock of the row.';
COMMENT ON COLUMN autoembed.turn.name IS 'usage: the turn to add up old usage.';

INSERT INTO autoembed.turn (name) VALUES ('usage');

ALTER TABLE autoembed.model_rest ADD COLUMN summary text NOT NULL DEFAULT 'its provider is in trouble';
COMMENT ON COLUMN autoembed.model_rest.reason IS
    'The last error. It may quote the provider, and with it a text of a tenant. Only superusers and monitors see it.';
COMMENT ON COLUMN autoembed.model_rest.summary IS 'The same without words of the provider, for every tenant.';
DROP FUNCTION autoembed._rest_model;

-- A long key does not fit into an index entry. An index on a digest of the key replaces this constraint.
ALTER TABLE autoembed.failure DROP CONSTRAINT failure_pipeline_id_key_key;
DROP FUNCTION autoembed._next_backfill;
DROP FUNCTION autoembed._drop_orphaned_pipelines;
DROP FUNCTION autoembed._forget_all;
DROP FUNCTION autoembed._requeue;
DROP FUNCTION autoembed.schedule;

ALTER TABLE autoembed.model ADD COLUMN timeout_seconds double precision CHECK (timeout_seconds > 0);
COMMENT ON COLUMN autoembed.model.timeout_seconds IS
    'Seconds that a request may take; NULL: those of the lane. For a rerank model NULL: 2.';
-- A rerank model has none.
ALTER TABLE autoembed.model ALTER COLUMN dimensions DROP NOT NULL;
-- The price is OpenAI's in dollars since January 2024.
UPDATE autoembed.model
SET price_per_million_tokens = 0.02
WHERE name = 'text-embedding-3-small' AND provider = 'openai' AND model_id = name AND price_per_million_tokens IS NULL;
DROP FUNCTION autoembed._model;
DROP FUNCTION autoembed._embedder;
DROP FUNCTION autoembed._call_embedder;
DROP FUNCTION autoembed.create_model;
DROP FUNCTION autoembed.alter_model;

CREATE VIEW autoembed._job AS
SELECT q.msg_id AS message_id,
       q.vt AS due_at,
       q.read_ct AS read_count,
       q.enqueued_at,
       q.last_read_at,
       q.message,
       coalesce(q.message ->> 'pipeline', '') AS pipeline,
       CASE jsonb_typeof(q.message -> 'keys')
           WHEN 'array' THEN jsonb_array_length(q.message -> 'keys')
           ELSE 1
       END AS rows,
       CASE jsonb_typeof(q.message -> 'keys')
           WHEN 'array' THEN q.message -> 'keys'
           ELSE jsonb_build_array(jsonb_build_array(q.message -> 'id'))
       END AS keys
FROM pgmq.q_embedding_jobs AS q;
COMMENT ON VIEW autoembed._job IS
    'The messages of the queue. pipeline: the id as text, empty if the message names none. rows: the number of rows '
    'that the message names. keys: these rows, an array in each case.';

-- Catalog comments that have other words in 0.1.0.
COMMENT ON TABLE autoembed.model IS
    'The ways to embed a text, and those to rerank rows. See create_model() and create_rerank_model().';
COMMENT ON COLUMN autoembed.model.name IS 'The name that pipelines, embed() and search() use.';
COMMENT ON COLUMN autoembed.model.provider IS
    'The kind of API that it has: local, openai, azure, cohere, voyage, gemini, ollama, function or fake; for a rerank '
    'model cohere, voyage, jina, tei or function.';
COMMENT ON COLUMN autoembed.model.model_id IS
    'The name that the provider uses. For the provider function: the name of the SQL function.';
COMMENT ON COLUMN autoembed.model.dimensions IS
    'The length of its vectors; NULL: it is a rerank model, and makes none.';
COMMENT ON COLUMN autoembed.model.base_url IS
    'The URL before /embeddings or /rerank, or the folder of a local model; NULL: the provider''s own.';
COMMENT ON COLUMN autoembed.model.api_key IS
    'The place of its key, never the key itself: env:NAME or file:PATH on the database server, or vault:NAME, a secret '
    'of the Vault extension.';
COMMENT ON COLUMN autoembed.model.max_inputs_per_request IS
    'Texts in one request; NULL: the provider''s limit. For a rerank model the rows that it reranks; NULL: 32.';
COMMENT ON COLUMN autoembed.model.max_tokens_per_input IS
    'Tokens of one text. A longer text is truncated; NULL: the provider''s limit.';
COMMENT ON COLUMN autoembed.model.requests_per_minute IS
    'Requests a minute, of all sessions; NULL: the limit that the provider''s answers tell.';
COMMENT ON COLUMN autoembed.model.tokens_per_minute IS
    'Tokens a minute, of all sessions; NULL: the limit that the provider''s answers tell.';
COMMENT ON COLUMN autoembed.model.price_per_million_tokens IS
    'The provider''s price of a million tokens, in any currency; NULL: unknown.';
COMMENT ON COLUMN autoembed.model.daily_token_budget IS
    'Tokens a day (UTC), after which it rests until the next day; NULL: no budget.';
COMMENT ON COLUMN autoembed.model.daily_cost_budget IS
    'Cost a day (UTC) at price_per_million_tokens, after which it rests until the next day; NULL: no budget.';
COMMENT ON COLUMN autoembed.model.options IS
    'Options of its provider. Every provider over HTTP takes extra_headers and extra_body, objects that are sent with '
    'each request, and ca_file.';
COMMENT ON COLUMN autoembed.model.builtin IS 'Whether it came with the extension and was never changed.';
COMMENT ON TABLE autoembed.setting IS 'The settings of this database. A setting without a row has its default.';
COMMENT ON COLUMN autoembed.setting.name IS
    'default_model: the model of pipelines and embed() calls that name none. http_hosts: the hosts that may be called '
    'without encryption, with blanks between.';
COMMENT ON COLUMN autoembed.setting.value IS 'The value of the setting.';
-- Only superusers say where texts and keys go. pg_write_all_data gives the right to write all tables without a policy.
ALTER TABLE autoembed.model ENABLE ROW LEVEL SECURITY;
ALTER TABLE autoembed.setting ENABLE ROW LEVEL SECURITY;
CREATE POLICY readers ON autoembed.model FOR SELECT USING (true);
CREATE POLICY readers ON autoembed.setting FOR SELECT USING (true);
COMMENT ON TABLE autoembed.model_rest IS
    'Models whose provider is in trouble. No lane calls a model while it rests.';
COMMENT ON COLUMN autoembed.model_rest.until IS 'When one request tries it again.';
COMMENT ON COLUMN autoembed.model_rest.failures IS 'Failed requests in a row.';
COMMENT ON COLUMN autoembed.model_rest.needs_attention IS
    'Whether a person must act (a wrong key, an unknown model), rather than wait.';
COMMENT ON TABLE autoembed.permit IS
    'The requests of the last minutes to models with limits. Rows are added and never changed, so the transaction of a '
    'caller keeps no lane waiting.';
COMMENT ON COLUMN autoembed.permit.at IS 'When the permit was given.';
COMMENT ON COLUMN autoembed.permit.requests_until IS
    'The time until which the model''s requests a minute are given away.';
COMMENT ON COLUMN autoembed.permit.tokens_until IS
    'The time until which the model''s tokens a minute are given away.';
COMMENT ON TABLE autoembed.pipeline IS
    'One embedding column of one table, with its content and its model. See enable().';
COMMENT ON COLUMN autoembed.pipeline.id IS 'The number in its jobs and in the names of its functions and triggers.';
COMMENT ON COLUMN autoembed.pipeline.table_id IS 'The table. For a partitioned table: the root.';
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
COMMENT ON COLUMN autoembed.pipeline.on_change IS
    'The fate of a vector whose text changes. keep: it stays until the new one is written. clear: it is cleared at '
    'once.';
COMMENT ON COLUMN autoembed.pipeline.truncate IS
    'Whether a text longer than the model takes is truncated, and recorded in embedded. If not, it fails.';
COMMENT ON COLUMN autoembed.pipeline.managed IS
    'Whether enable() made its triggers. If not, CREATE TRIGGER statements made them.';
COMMENT ON COLUMN autoembed.pipeline.table_shape IS
    'The table''s columns, embedding type and partitions when they were last seen. A difference shows a change.';
COMMENT ON COLUMN autoembed.pipeline.built_from IS
    'The digest of the facts from which its functions were made. A difference shows that they are outdated. stopped: '
    'a column is missing, so it has no triggers.';
COMMENT ON TABLE autoembed.backfill IS
    'The tables that lanes scan, in the order of their keys, for embeddings that are missing or stale.';
COMMENT ON COLUMN autoembed.backfill.condition IS 'The condition of the rows that are scanned; NULL: all rows.';
COMMENT ON COLUMN autoembed.backfill.force IS 'Whether rows whose embedding is up to date are embedded again, too.';
COMMENT ON COLUMN autoembed.backfill.create_index IS 'Whether an HNSW index is built at the end.';
COMMENT ON COLUMN autoembed.backfill.rows_queued IS 'The number of rows that were queued.';
COMMENT ON COLUMN autoembed.backfill.started_at IS 'When the backfill was asked for.';
COMMENT ON COLUMN autoembed.backfill.served_at IS 'When a lane last worked on it; at first, when it was asked for.';
ALTER TABLE autoembed.backfill ALTER COLUMN served_at SET DEFAULT clock_timestamp();
COMMENT ON COLUMN autoembed.backfill.index_problem IS
    'The reason why the index could not be built. No lane tries again.';
ALTER TABLE autoembed.backfill ADD COLUMN rows_recorded bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN autoembed.backfill.rows_recorded IS
    'The number of those rows that had an embedding when it was asked for. If there were more, rows have gone unseen.';
ALTER TABLE autoembed.backfill ADD COLUMN condition_objects jsonb NOT NULL DEFAULT '{}' CHECK (
    jsonb_typeof(condition_objects) = 'object'
    AND octet_length(condition_objects::text) <= 100000
    AND jsonb_array_length(jsonb_path_query_array(condition_objects, '$.keyvalue()')) <= 200
);
COMMENT ON COLUMN autoembed.backfill.condition_objects IS
    'The functions, operators, types and collations that the condition uses, as in autoembed.pipeline.';
COMMENT ON TABLE autoembed.embedded IS
    'The digest of the text from which each embedding was made. A text with the same digest is not sent again.';
ALTER TABLE autoembed.embedded ADD COLUMN vector_digest bytea;
ALTER TABLE autoembed.embedded ADD COLUMN embedded_at timestamptz;
ALTER TABLE autoembed.embedded ALTER COLUMN embedded_at SET DEFAULT clock_timestamp();
ALTER TABLE autoembed.embedded ADD COLUMN replaced smallint NOT NULL DEFAULT 0;
COMMENT ON COLUMN autoembed.embedded.vector_digest IS
    'SHA-256 of the vector as it is stored, 8 bytes. NULL: not known. Empty: the row has a vector of somebody else.';
COMMENT ON COLUMN autoembed.embedded.embedded_at IS 'When the vector was written. NULL: by version 0.1.0.';
COMMENT ON COLUMN autoembed.embedded.replaced IS
    'How often within an hour the vector of this text was written again because somebody else had replaced it.';
COMMENT ON TABLE autoembed.failure IS
    'The failed list: rows that cannot be embedded, and messages that name no row. See the view failed.';
COMMENT ON COLUMN autoembed.failure.id IS 'The number of the failure.';
COMMENT ON COLUMN autoembed.failure.message IS 'The message that names no row, as it stood in the queue.';
COMMENT ON COLUMN autoembed.failure.error_class IS
    'row: the text or the table is at fault. message: the job itself is.';
COMMENT ON COLUMN autoembed.failure.reason IS 'The last error.';
COMMENT ON COLUMN autoembed.failure.attempts IS 'The number of attempts.';
COMMENT ON COLUMN autoembed.failure.first_failed_at IS 'When it was first given up.';
COMMENT ON COLUMN autoembed.failure.last_failed_at IS 'When it was last given up.';
COMMENT ON TABLE autoembed.lane IS
    'The lanes and the messages that each holds. When the backend of a lane is gone, the next lane frees its messages.';
COMMENT ON COLUMN autoembed.lane.backend_start IS
    'When that process started. A later process may have the same id, but not the same start.';
COMMENT ON COLUMN autoembed.lane.claimed_at IS 'When it last claimed messages.';
COMMENT ON COLUMN autoembed.lane.message_ids IS 'The messages that it holds.';
COMMENT ON COLUMN autoembed.lane.stop IS 'Whether it is asked to stop.';
COMMENT ON COLUMN autoembed.lane.backfill IS 'Whether it scans tables and leaves the queue to other lanes.';
COMMENT ON TABLE autoembed.usage_entry IS
    'The requests of the last minutes, one by one, so that lanes never wait for each other''s counts. Older ones are '
    'added up in usage_day.';
COMMENT ON COLUMN autoembed.usage_entry.inputs IS 'Texts in the requests.';
COMMENT ON COLUMN autoembed.usage_entry.tokens IS
    'Tokens that the provider counted. An estimate where the provider counts none.';
COMMENT ON COLUMN autoembed.usage_entry.rows IS 'Rows that have these texts.';
COMMENT ON TABLE autoembed.usage_day IS
    'The requests to each model by day, except those of the last minutes. See the view usage.';
COMMENT ON COLUMN autoembed.usage_day.inputs IS 'Texts in the requests.';
COMMENT ON COLUMN autoembed.usage_day.rows IS 'Rows that have these texts.';

-- A publication of all tables would refuse each UPDATE and DELETE of a table without a replica identity.
ALTER TABLE pgmq.meta REPLICA IDENTITY FULL;
ALTER TABLE pgmq.topic_bindings REPLICA IDENTITY USING INDEX topic_bindings_unique_pattern_queue;
DROP FUNCTION autoembed._learn_limits;
DROP FUNCTION autoembed._warn_of_blocked_pipelines;
-- The next answers tell its rows again.
DROP TABLE autoembed.model_limit;
CREATE TABLE autoembed.model_limit (
    model text NOT NULL REFERENCES autoembed.model (name) ON UPDATE CASCADE ON DELETE CASCADE,
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    name text NOT NULL,
    value integer
);
CREATE INDEX model_limit_model_idx ON autoembed.model_limit (model, name, at DESC);
-- A publication of all tables would refuse each UPDATE and DELETE of a table without a replica identity.
ALTER TABLE autoembed.model_limit REPLICA IDENTITY FULL;
COMMENT ON TABLE autoembed.model_limit IS
    'The limits that the providers'' answers tell. The newest row of a model and a name counts. Rows are added and '
    'never changed, so no session waits for another one''s row.';
COMMENT ON COLUMN autoembed.model_limit.model IS 'The model.';
COMMENT ON COLUMN autoembed.model_limit.at IS 'When the answer came.';
COMMENT ON COLUMN autoembed.model_limit.name IS
    'requests_per_minute, tokens_per_minute. requests_at_once, tokens_at_once: the most that were left after a '
    'request. tokens_per_input: tokens of a text that it took after it had refused a longer one, by estimate. '
    'inputs_per_request: texts of one request that it is sent since it did not answer more in time.';
COMMENT ON COLUMN autoembed.model_limit.value IS 'The limit; NULL: there is none, or the answers do not tell.';

ALTER TABLE autoembed.usage_entry REPLICA IDENTITY FULL;
ALTER TABLE autoembed.usage_day REPLICA IDENTITY FULL;

CREATE TABLE autoembed.text_document (
    id bigint PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY,
    pipeline_id integer NOT NULL,
    key text COLLATE pg_catalog."C" NOT NULL,
    chunk_number integer NOT NULL,
    is_live boolean NOT NULL DEFAULT true,
    indexed_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
COMMENT ON TABLE autoembed.text_document IS
    'The texts in the text index: the chunks of rows, or whole rows. Segments name them by id.';
COMMENT ON COLUMN autoembed.text_document.id IS 'The number of the document. A text that changes gets another one.';
COMMENT ON COLUMN autoembed.text_document.pipeline_id IS 'The pipeline.';
COMMENT ON COLUMN autoembed.text_document.key IS 'The row''s key as a JSON array.';
COMMENT ON COLUMN autoembed.text_document.chunk_number IS 'The number of the chunk in the row.';
COMMENT ON COLUMN autoembed.text_document.is_live IS
    'Whether this is the text of the row. If not, the next merge leaves it out.';
COMMENT ON COLUMN autoembed.text_document.indexed_at IS 'When it was indexed.';

-- A key may be too long for an index.
CREATE INDEX text_document_key_idx ON autoembed.text_document (pipeline_id, pg_catalog.hashtextextended(key, 0))
WHERE is_live;
CREATE INDEX text_document_dead_idx ON autoembed.text_document (pipeline_id, id) WHERE NOT is_live;

CREATE TABLE autoembed.text_segment (
    id bigint PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY,
    pipeline_id integer NOT NULL,
    document_count integer NOT NULL,
    posting_count integer NOT NULL,
    documents bytea NOT NULL,
    lengths bytea NOT NULL
);
COMMENT ON TABLE autoembed.text_segment IS 'The segments of the text index. A segment is never changed.';
COMMENT ON COLUMN autoembed.text_segment.id IS 'The number of the segment.';
COMMENT ON COLUMN autoembed.text_segment.pipeline_id IS 'The pipeline.';
COMMENT ON COLUMN autoembed.text_segment.document_count IS 'The number of its documents.';
COMMENT ON COLUMN autoembed.text_segment.posting_count IS 'The number of its postings.';
COMMENT ON COLUMN autoembed.text_segment.documents IS 'The ids of its documents, ascending, 8 bytes each.';
COMMENT ON COLUMN autoembed.text_segment.lengths IS 'The number of words in each document, 4 bytes each.';

CREATE INDEX text_segment_pipeline_idx ON autoembed.text_segment (pipeline_id);

CREATE TABLE autoembed.text_posting (
    segment_id bigint NOT NULL,
    term text COLLATE pg_catalog."C" NOT NULL,
    ordinals bytea NOT NULL,
    levels bytea NOT NULL,
    PRIMARY KEY (segment_id, term)
);
COMMENT ON TABLE autoembed.text_posting IS 'The documents of each segment that have a term.';
COMMENT ON COLUMN autoembed.text_posting.segment_id IS 'The segment.';
COMMENT ON COLUMN autoembed.text_posting.term IS 'The term, as the text search configuration gives it.';
COMMENT ON COLUMN autoembed.text_posting.ordinals IS
    'The places of the documents within the segment, from 0, 2 bytes each. Empty if levels has all documents.';
COMMENT ON COLUMN autoembed.text_posting.levels IS
    'How often each document has the term, a byte each: up to 127 the number, above that 8 for each doubling of 128.';

-- To decompress them would take longer than to score them.
ALTER TABLE autoembed.text_segment ALTER COLUMN documents SET STORAGE EXTERNAL;
ALTER TABLE autoembed.text_segment ALTER COLUMN lengths SET STORAGE EXTERNAL;
ALTER TABLE autoembed.text_posting ALTER COLUMN ordinals SET STORAGE EXTERNAL;
ALTER TABLE autoembed.text_posting ALTER COLUMN levels SET STORAGE EXTERNAL;

SELECT pg_catalog.pg_extension_config_dump('autoembed.text_document', '');
SELECT pg_catalog.pg_extension_config_dump('autoembed.text_document_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('autoembed.text_segment', '');
SELECT pg_catalog.pg_extension_config_dump('autoembed.text_segment_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('autoembed.text_posting', '');

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
