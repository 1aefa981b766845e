-- 10_tables.sql: all state. Every other file holds functions and views.

\echo Use "CREATE EXTENSION autoembed CASCADE" to load this file. \quit

DO LANGUAGE plpython3u $python$
    import importlib

    for package in ("requests", "numpy", "orjson"):
        try:
            importlib.import_module(package)
        except ImportError:
            plpy.error(
                f"the Python package {package} is not installed on this server",
                hint=f"Install it for the Python that PL/Python uses (on Debian: apt-get install python3-{package}).",
                sqlstate="58P01",
            )
$python$;

CREATE SCHEMA autoembed;
COMMENT ON SCHEMA autoembed IS
    'Keeps embeddings in step with their rows. Names that begin with _ are private.';

CREATE FUNCTION autoembed._keep_restored()
    RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
-- pg_restore loads rows that CREATE EXTENSION has already made; the restored ones win.
BEGIN
    IF TG_TABLE_NAME = 'model' THEN
        DELETE FROM autoembed.model AS m WHERE m.name = NEW.name AND m.builtin;
    ELSE
        DELETE FROM pgmq.meta AS m WHERE m.queue_name = NEW.queue_name;
    END IF;
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._keep_restored() IS
    'Lets a restored dump replace the rows that CREATE EXTENSION made.';

-- The queue ---------------------------------------------------------------------------------------

DO LANGUAGE plpgsql $plpgsql$
BEGIN
    IF EXISTS (SELECT FROM pgmq.meta AS m WHERE m.queue_name = 'embedding_jobs') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = 'the queue embedding_jobs exists already',
            HINT = 'Let what fills it come to rest, then SELECT pgmq.drop_queue(''embedding_jobs'').';
    END IF;
END;
$plpgsql$;

SELECT pgmq.create('embedding_jobs');

-- A claim picks the due messages of one pipeline; messages from elsewhere name none and sort under ''.
CREATE INDEX q_embedding_jobs_pipeline_idx
    ON pgmq.q_embedding_jobs ((coalesce(message ->> 'pipeline', '')), vt);

-- A hundred keys are more than 2 kB, and to compress them would be an eighth of what an application's INSERT pays for us.
ALTER TABLE pgmq.q_embedding_jobs SET (toast_tuple_target = 8160);

SELECT pg_catalog.pg_extension_config_dump('pgmq.q_embedding_jobs', '');
SELECT pg_catalog.pg_extension_config_dump('pgmq.q_embedding_jobs_msg_id_seq', '');

CREATE TRIGGER autoembed_keep_restored
    BEFORE INSERT ON pgmq.meta
    FOR EACH ROW
    WHEN (NEW.queue_name = 'embedding_jobs')
    EXECUTE FUNCTION autoembed._keep_restored();

-- Models ------------------------------------------------------------------------------------------

CREATE TABLE autoembed.model (
    name text PRIMARY KEY,
    provider text NOT NULL,
    model_id text NOT NULL,
    dimensions integer NOT NULL CHECK (dimensions BETWEEN 1 AND 16000),
    base_url text,
    api_key text CHECK (api_key ~ '^(env|file|vault):.'),
    max_inputs_per_request integer CHECK (max_inputs_per_request > 0),
    max_tokens_per_request integer CHECK (max_tokens_per_request > 0),
    max_tokens_per_input integer CHECK (max_tokens_per_input > 0),
    requests_per_minute integer CHECK (requests_per_minute > 0),
    tokens_per_minute integer CHECK (tokens_per_minute > 0),
    max_requests_in_flight integer CHECK (max_requests_in_flight > 0),
    price_per_million_tokens numeric CHECK (price_per_million_tokens >= 0),
    daily_token_budget bigint CHECK (daily_token_budget >= 0),
    daily_cost_budget numeric CHECK (daily_cost_budget >= 0),
    options jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(options) = 'object'),
    builtin boolean NOT NULL DEFAULT false,
    CONSTRAINT cost_needs_price CHECK (daily_cost_budget IS NULL OR price_per_million_tokens IS NOT NULL)
);
COMMENT ON TABLE autoembed.model IS 'The ways to embed a text; see create_model().';
COMMENT ON COLUMN autoembed.model.name IS 'What pipelines and embed() call it.';
COMMENT ON COLUMN autoembed.model.provider IS 'How it is spoken to: local, openai, azure, cohere, voyage, gemini, ollama, function or fake.';
COMMENT ON COLUMN autoembed.model.model_id IS 'What the provider calls it; of the provider function, the name of the SQL function.';
COMMENT ON COLUMN autoembed.model.dimensions IS 'Length of its vectors.';
COMMENT ON COLUMN autoembed.model.base_url IS
    'Where it is: the URL before /embeddings, or the folder of a local model; NULL: the provider''s own.';
COMMENT ON COLUMN autoembed.model.api_key IS
    'Where its key is found, never the key: env:NAME or file:PATH on the database server, or vault:NAME, a secret of the Vault extension.';
COMMENT ON COLUMN autoembed.model.max_inputs_per_request IS 'Texts in one request; NULL: the provider''s limit.';
COMMENT ON COLUMN autoembed.model.max_tokens_per_request IS 'Tokens in one request; NULL: the provider''s limit.';
COMMENT ON COLUMN autoembed.model.max_tokens_per_input IS
    'Tokens of one text, longer ones are truncated; NULL: the provider''s limit.';
COMMENT ON COLUMN autoembed.model.requests_per_minute IS 'Requests a minute, of all sessions; NULL: what its provider''s answers tell.';
COMMENT ON COLUMN autoembed.model.tokens_per_minute IS 'Tokens a minute, of all sessions; NULL: what its provider''s answers tell.';
COMMENT ON COLUMN autoembed.model.max_requests_in_flight IS 'Requests at a time, of all sessions; NULL: no limit.';
COMMENT ON COLUMN autoembed.model.price_per_million_tokens IS 'What its provider asks for, in your currency; NULL: nothing known.';
COMMENT ON COLUMN autoembed.model.daily_token_budget IS 'Tokens a day (UTC), after which it rests until the next; NULL: no budget.';
COMMENT ON COLUMN autoembed.model.daily_cost_budget IS
    'Cost a day (UTC) at price_per_million_tokens, after which it rests until the next; NULL: no budget.';
COMMENT ON COLUMN autoembed.model.options IS
    'What only its provider knows; every one over HTTP takes extra_headers and extra_body, objects sent with each request, and ca_file.';
COMMENT ON COLUMN autoembed.model.builtin IS 'Came with the extension and was never changed.';

INSERT INTO autoembed.model (name, provider, model_id, dimensions, api_key, builtin)
VALUES ('all-MiniLM-L6-v2', 'local', 'all-MiniLM-L6-v2', 384, NULL, true),
       ('text-embedding-3-small', 'openai', 'text-embedding-3-small', 1536, 'env:OPENAI_API_KEY', true);

SELECT pg_catalog.pg_extension_config_dump('autoembed.model', 'WHERE NOT builtin');

CREATE TRIGGER keep_restored
    BEFORE INSERT ON autoembed.model
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._keep_restored();

CREATE TABLE autoembed.setting (
    name text PRIMARY KEY CHECK (name IN ('default_model', 'http_hosts')),
    value text NOT NULL
);
COMMENT ON TABLE autoembed.setting IS 'Settings of this database; what is not here has its default.';
COMMENT ON COLUMN autoembed.setting.name IS
    'default_model: for pipelines and embed() calls that name none; http_hosts: hosts that may be called without encryption, with blanks between.';
COMMENT ON COLUMN autoembed.setting.value IS 'Its value.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.setting', '');

CREATE TABLE autoembed.model_rest (
    model text PRIMARY KEY REFERENCES autoembed.model (name) ON UPDATE CASCADE ON DELETE CASCADE,
    until timestamptz NOT NULL,
    failures integer NOT NULL,
    needs_attention boolean NOT NULL,
    reason text NOT NULL
);
COMMENT ON TABLE autoembed.model_rest IS
    'Models whose provider is in trouble; no lane calls them before their time.';
COMMENT ON COLUMN autoembed.model_rest.model IS 'The model that rests.';
COMMENT ON COLUMN autoembed.model_rest.until IS 'When one request will try it again.';
COMMENT ON COLUMN autoembed.model_rest.failures IS 'Failed tries in a row.';
COMMENT ON COLUMN autoembed.model_rest.needs_attention IS
    'Whether somebody must act (a wrong key, an unknown model), rather than wait.';
COMMENT ON COLUMN autoembed.model_rest.reason IS 'What the provider answered last.';

CREATE TABLE autoembed.model_limit (
    model text NOT NULL REFERENCES autoembed.model (name) ON UPDATE CASCADE ON DELETE CASCADE,
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    requests_per_minute integer,
    requests_at_once integer,
    tokens_per_minute integer,
    tokens_at_once integer
);
COMMENT ON TABLE autoembed.model_limit IS
    'Limits that the providers'' answers told. The newest row of a model counts: rows are added and never changed, so that nobody waits for another''s.';
COMMENT ON COLUMN autoembed.model_limit.model IS 'The model.';
COMMENT ON COLUMN autoembed.model_limit.at IS 'When the answer came.';
COMMENT ON COLUMN autoembed.model_limit.requests_per_minute IS 'Requests a minute; NULL: the answers do not tell.';
COMMENT ON COLUMN autoembed.model_limit.requests_at_once IS 'The most that were left after a request.';
COMMENT ON COLUMN autoembed.model_limit.tokens_per_minute IS 'Tokens a minute; NULL: the answers do not tell.';
COMMENT ON COLUMN autoembed.model_limit.tokens_at_once IS 'The most that were left after a request.';

-- Not logged: a crash forgets the last minute's requests, and their provider will say so.
CREATE UNLOGGED TABLE autoembed.permit (
    model text NOT NULL,
    at timestamptz NOT NULL,
    requests_until timestamptz,
    tokens_until timestamptz
);
CREATE INDEX permit_at_idx ON autoembed.permit (at);
CREATE INDEX permit_requests_until_idx ON autoembed.permit (model, requests_until);
CREATE INDEX permit_tokens_until_idx ON autoembed.permit (model, tokens_until);
COMMENT ON TABLE autoembed.permit IS
    'Requests of the last minutes to models with limits. Rows are added and never changed, so that a caller''s transaction keeps no lane waiting.';
COMMENT ON COLUMN autoembed.permit.model IS 'The model.';
COMMENT ON COLUMN autoembed.permit.at IS 'When it was given.';
COMMENT ON COLUMN autoembed.permit.requests_until IS 'Until when its requests a minute are given away.';
COMMENT ON COLUMN autoembed.permit.tokens_until IS 'Until when its tokens a minute are given away.';

-- Pipelines ---------------------------------------------------------------------------------------

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

-- What is going on, and what went wrong -----------------------------------------------------------

CREATE TABLE autoembed.lane (
    pid integer NOT NULL,
    backend_start timestamptz NOT NULL,
    claimed_at timestamptz,
    message_ids bigint[] NOT NULL DEFAULT '{}',
    stop boolean NOT NULL DEFAULT false,
    backfill boolean NOT NULL DEFAULT false,
    PRIMARY KEY (pid, backend_start)
);
COMMENT ON TABLE autoembed.lane IS
    'The lanes and what each holds; when its backend is gone, the next lane frees its jobs.';
COMMENT ON COLUMN autoembed.lane.pid IS 'The lane''s process, as in pg_stat_activity.';
COMMENT ON COLUMN autoembed.lane.backend_start IS 'When that process started: tells it from a later one of the same id.';
COMMENT ON COLUMN autoembed.lane.claimed_at IS 'When it claimed what it holds.';
COMMENT ON COLUMN autoembed.lane.message_ids IS 'The messages it holds.';
COMMENT ON COLUMN autoembed.lane.stop IS 'Whether it was asked to stop.';
COMMENT ON COLUMN autoembed.lane.backfill IS 'Whether it looks through tables and leaves the queue to others.';

CREATE TABLE autoembed.usage_entry (
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    model text NOT NULL,
    pipeline_id integer,
    requests integer NOT NULL,
    inputs integer NOT NULL,
    tokens bigint NOT NULL,
    rows integer NOT NULL
);
CREATE INDEX usage_entry_at_idx ON autoembed.usage_entry (at);
COMMENT ON TABLE autoembed.usage_entry IS
    'Requests of the last minutes, one by one, so that lanes never wait for each other''s counts; older ones are added up in usage_day.';
COMMENT ON COLUMN autoembed.usage_entry.at IS 'When the answer came.';
COMMENT ON COLUMN autoembed.usage_entry.model IS 'The model.';
COMMENT ON COLUMN autoembed.usage_entry.pipeline_id IS 'The pipeline; NULL: embed().';
COMMENT ON COLUMN autoembed.usage_entry.requests IS 'Requests; 0 for the second pipeline in one request.';
COMMENT ON COLUMN autoembed.usage_entry.inputs IS 'Texts in them.';
COMMENT ON COLUMN autoembed.usage_entry.tokens IS 'Tokens as the provider counted them, or as estimated where it does not.';
COMMENT ON COLUMN autoembed.usage_entry.rows IS 'Rows that the texts are of.';

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
COMMENT ON TABLE autoembed.usage_day IS 'What was asked of each model a day, up to some minutes ago; see the view usage.';
COMMENT ON COLUMN autoembed.usage_day.day IS 'The day, in UTC.';
COMMENT ON COLUMN autoembed.usage_day.model IS 'The model.';
COMMENT ON COLUMN autoembed.usage_day.pipeline_id IS 'The pipeline; NULL: embed().';
COMMENT ON COLUMN autoembed.usage_day.requests IS 'Requests.';
COMMENT ON COLUMN autoembed.usage_day.inputs IS 'Texts in them.';
COMMENT ON COLUMN autoembed.usage_day.tokens IS 'Tokens.';
COMMENT ON COLUMN autoembed.usage_day.rows IS 'Rows.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.usage_entry', '');
SELECT pg_catalog.pg_extension_config_dump('autoembed.usage_day', '');

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
    UNIQUE (pipeline_id, key),
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
