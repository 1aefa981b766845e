-- The models, the settings, and the state of the models' providers.

CREATE TABLE autoembed.model (
    name text PRIMARY KEY,
    provider text NOT NULL,
    model_id text NOT NULL,
    dimensions integer CHECK (dimensions BETWEEN 1 AND 16000),
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
    timeout_seconds double precision CHECK (timeout_seconds > 0),
    CONSTRAINT cost_needs_price CHECK (daily_cost_budget IS NULL OR price_per_million_tokens IS NOT NULL)
);
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
COMMENT ON COLUMN autoembed.model.max_tokens_per_request IS 'Tokens in one request; NULL: the provider''s limit.';
COMMENT ON COLUMN autoembed.model.max_tokens_per_input IS
    'Tokens of one text. A longer text is truncated; NULL: the provider''s limit.';
COMMENT ON COLUMN autoembed.model.requests_per_minute IS
    'Requests a minute, of all sessions; NULL: the limit that the provider''s answers tell.';
COMMENT ON COLUMN autoembed.model.tokens_per_minute IS
    'Tokens a minute, of all sessions; NULL: the limit that the provider''s answers tell.';
COMMENT ON COLUMN autoembed.model.max_requests_in_flight IS 'Requests at a time, of all sessions; NULL: no limit.';
COMMENT ON COLUMN autoembed.model.price_per_million_tokens IS
    'The provider''s price of a million tokens, in any currency; NULL: unknown.';
COMMENT ON COLUMN autoembed.model.daily_token_budget IS
    'Tokens a day (UTC), after which it rests until the next day; NULL: no budget.';
COMMENT ON COLUMN autoembed.model.daily_cost_budget IS
    'Cost a day (UTC) at price_per_million_tokens, after which it rests until the next day; NULL: no budget.';
COMMENT ON COLUMN autoembed.model.options IS
    'Options of its provider. Every provider over HTTP takes extra_headers and extra_body, objects that are sent with '
    'each request, and ca_file.';
COMMENT ON COLUMN autoembed.model.timeout_seconds IS
    'Seconds that a request may take; NULL: those of the lane. For a rerank model NULL: 2.';
COMMENT ON COLUMN autoembed.model.builtin IS 'Whether it came with the extension and was never changed.';

-- The price is OpenAI's in dollars since January 2024.
INSERT INTO autoembed.model (name, provider, model_id, dimensions, api_key, price_per_million_tokens, builtin)
VALUES ('all-MiniLM-L6-v2', 'local', 'all-MiniLM-L6-v2', 384, NULL, NULL, true),
       ('text-embedding-3-small', 'openai', 'text-embedding-3-small', 1536, 'env:OPENAI_API_KEY', 0.02, true);

CREATE TABLE autoembed.setting (
    name text PRIMARY KEY CHECK (name IN ('default_model', 'http_hosts')),
    value text NOT NULL
);
COMMENT ON TABLE autoembed.setting IS 'The settings of this database. A setting without a row has its default.';
COMMENT ON COLUMN autoembed.setting.name IS
    'default_model: the model of pipelines and embed() calls that name none. http_hosts: the hosts that may be called '
    'without encryption, with blanks between.';
COMMENT ON COLUMN autoembed.setting.value IS 'The value of the setting.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.setting', '');

-- Only superusers say where texts and keys go. pg_write_all_data gives the right to write all tables without a policy.
ALTER TABLE autoembed.model ENABLE ROW LEVEL SECURITY;
ALTER TABLE autoembed.setting ENABLE ROW LEVEL SECURITY;
CREATE POLICY readers ON autoembed.model FOR SELECT USING (true);
CREATE POLICY readers ON autoembed.setting FOR SELECT USING (true);

CREATE TABLE autoembed.model_rest (
    model text PRIMARY KEY REFERENCES autoembed.model (name) ON UPDATE CASCADE ON DELETE CASCADE,
    until timestamptz NOT NULL,
    failures integer NOT NULL,
    needs_attention boolean NOT NULL,
    reason text NOT NULL,
    summary text NOT NULL DEFAULT 'its provider is in trouble'
);
COMMENT ON TABLE autoembed.model_rest IS
    'Models whose provider is in trouble. No lane calls a model while it rests.';
COMMENT ON COLUMN autoembed.model_rest.model IS 'The model that rests.';
COMMENT ON COLUMN autoembed.model_rest.until IS 'When one request tries it again.';
COMMENT ON COLUMN autoembed.model_rest.failures IS 'Failed requests in a row.';
COMMENT ON COLUMN autoembed.model_rest.needs_attention IS
    'Whether a person must act (a wrong key, an unknown model), rather than wait.';
COMMENT ON COLUMN autoembed.model_rest.reason IS
    'The last error. It may quote the provider, and with it a text of a tenant. Only superusers and monitors see it.';
COMMENT ON COLUMN autoembed.model_rest.summary IS 'The same without words of the provider, for every tenant.';

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

-- The table is not logged. A crash forgets the last minute's requests, and the provider itself refuses excess ones.
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
    'The requests of the last minutes to models with limits. Rows are added and never changed, so the transaction of a '
    'caller keeps no lane waiting.';
COMMENT ON COLUMN autoembed.permit.model IS 'The model.';
COMMENT ON COLUMN autoembed.permit.at IS 'When the permit was given.';
COMMENT ON COLUMN autoembed.permit.requests_until IS
    'The time until which the model''s requests a minute are given away.';
COMMENT ON COLUMN autoembed.permit.tokens_until IS
    'The time until which the model''s tokens a minute are given away.';

-- The table is not logged. After a crash no request is in flight.
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
