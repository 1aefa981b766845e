-- Made by build.py out of sql/ and plpy_src/: edit those.

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

-- 15_python.sql: how plpy_src/ gets into the server. build.py fills in the sources.

CREATE FUNCTION autoembed._load_python()
    RETURNS void
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
AS $autoembed_python$
    # One importer holds all sources, so that a session never mixes the Python of two versions.
    import importlib.abc
    import importlib.util
    import sys

    # onnxruntime and tokenizers of the image: for this extension, not for the distribution's Python.
    packages = "/usr/local/lib/autoembed/python"
    if packages not in sys.path:
        sys.path.append(packages)

    # PL/Python puts a tab before every line of a body, those inside a string included.
    sources = {name: source.replace("\n\t", "\n") for name, source in {
"autoembed": r'''"""The Python of autoembed that runs inside the database server."""
''',
"autoembed.batching": r'''"""Packs texts into as few requests as the model's limits allow."""

from __future__ import annotations

import math
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

ZERO_WIDTH_JOINER = "\u200d"
SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
# Tokens that models put around a text.
MARKS = 2
# The most characters that are kept together. More accents on one letter are not a real text.
MAX_JOINED = 16


# The cost of a character in tokens, by the first byte of its UTF-8 form. A text has no more tokens than bytes, and far
# fewer in the alphabets that vocabularies know well.
_COSTS: dict[bytes, tuple[float, Iterable[int]]] = {
    b"v": (0, b"aeiou"),
    b"c": (0, b"bcdfghjklmnpqrstvwxyz"),
    b"U": (0.5, string.ascii_uppercase.encode()),
    b"d": (1, string.digits.encode()),
    b" ": (0, b" "),
    b"n": (0.5, b"\n\r\t"),
    # Greek, Cyrillic, Hebrew, Arabic; Latin with its accents.
    b"1": (1.25, [*range(0xCE, 0xD2), *range(0xD7, 0xDC)]),
    b"2": (1.5, range(0xC2, 0xC6)),
    # Other characters of two bytes; signs, kana, the usual Han characters, Hangul.
    b"3": (2, [*range(0xC6, 0xCE), *range(0xD2, 0xD7), *range(0xDC, 0xE0)]),
    b"4": (2, [*range(0xE2, 0xEA), *range(0xEB, 0xEE)]),
    # India, Thailand, Laos; Georgia, Ethiopia, Burma, Cambodia, full-width letters, emoji.
    b"5": (2.25, [0xE0]),
    b"6": (3, [0xE1, 0xEA, 0xEE, 0xEF, *range(0xF0, 0xF8)]),
}
# Punctuation, and all characters that are not above.
_OTHER = b"."
_CONTINUATIONS = bytes(range(0x80, 0xC0))
# Kinds of letters, which count as one kind where the order of characters matters.
_LETTERS = b"vcU"


def _kinds() -> bytes:
    table = bytearray(_OTHER * 256)
    for kind, (_, characters) in _COSTS.items():
        for character in characters:
            table[character] = kind[0]
    return bytes(table)


_KINDS = _kinds()
_WORDS = bytes(ord("a") if kind in _LETTERS else kind if kind in b"d " else ord(".") for kind in range(256))


def estimate_tokens(text: str) -> int:
    """The estimated number of tokens of a text, more often too high than too low.

    Measured against OpenAI's vocabularies, in tests/data/token_counts.json: about 1.4 times the true number for English
    prose. In any language, code or data it is at least 0.8 times the true number, and from some hundred characters on
    at least that number; for random characters at least 0.6 times. The counting is done in C, because every text is
    estimated: about 20 ns a character.
    """
    encoded = text.encode("utf-8", "replace")
    kinds = encoded.translate(_KINDS, _CONTINUATIONS)
    words = kinds.translate(_WORDS)
    tokens = sum(cost * kinds.count(kind) for kind, (cost, _) in _COSTS.items() if cost) + kinds.count(_OTHER)
    # A word is one token, and more if it is long or hard to pronounce.
    tokens += words.startswith(b"a") + sum(map(words.count, (b".a", b" a", b"aaaaa"))) + 2 * words.count(b"da")
    tokens += kinds.count(b"ccc") + kinds.count(b"vvv")
    # A space is part of the word behind it, but not of a number. Many spaces in a row are few tokens.
    tokens += words.count(b" d") + 0.25 * words.count(b"  ")
    return math.ceil(min(tokens, len(encoded))) + MARKS


def most_tokens(text: str) -> int:
    """An upper bound of estimate_tokens() for a fiftieth of its work: no text has more tokens than bytes."""
    return len(text.encode("utf-8", "replace")) + MARKS


def truncate(text: str, max_tokens: int, prefix: str = "") -> str:
    """The longest beginning of a text that has at most max_tokens behind a prefix.

    A letter keeps its accents, and at least one character is left of every text.
    """
    max_tokens = max(0, max_tokens - _before(prefix))
    if len(text) <= max_tokens and most_tokens(text) <= max_tokens:
        return text
    # The search begins at the front, because a text may be far too long.
    low, high = 1, 1 + 4 * max_tokens
    while high < len(text) and estimate_tokens(text[:high]) <= max_tokens:
        low, high = high, 2 * high
    if high >= len(text):
        if estimate_tokens(text) <= max_tokens:
            return text
        high = len(text)
    while high - low > 1:
        middle = (low + high) // 2
        if estimate_tokens(text[:middle]) <= max_tokens:
            low = middle
        else:
            high = middle
    for cut in range(min(low, len(text) - 1), max(0, low - MAX_JOINED), -1):
        if not _joined(text[cut - 1], text[cut]):
            return text[:cut]
    return text[:low]


def _joined(before: str, after: str) -> bool:
    """Whether two characters are drawn as one: an accent, the colour of an emoji, emoji with a joiner between them."""
    return ZERO_WIDTH_JOINER in (before, after) or after in SKIN_TONES or unicodedata.category(after).startswith("M")


def _before(prefix: str) -> int:
    return estimate_tokens(prefix) if prefix else 0


def pack(texts: Sequence[str], max_inputs: int, max_tokens: int, prefix: str = "") -> list[list[str]]:
    """The texts in order, in lists of at most max_inputs texts and max_tokens estimated tokens.

    A text that has more tokens by itself gets a list of its own. prefix: is counted with each text.
    """
    requests: list[list[str]] = []
    tokens_left = 0
    before = _before(prefix)
    longest = max(map(most_tokens, texts), default=0)
    # If that many of the longest texts would fit, the rough estimate is good enough.
    count = most_tokens if max_inputs * (before + longest) <= max_tokens else estimate_tokens
    for text in texts:
        tokens = before + count(text)
        if not requests or len(requests[-1]) == max_inputs or tokens > tokens_left:
            requests.append([])
            tokens_left = max_tokens
        requests[-1].append(text)
        tokens_left -= tokens
    return requests


def halves(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Splits a list that failed as a whole, to find the item to blame."""
    middle = len(items) // 2
    return items[:middle], items[middle:]
''',
"autoembed.binary": r'''"""Vectors in PostgreSQL's binary COPY format, which the server reads many times faster than text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# The signature, the flags and the length of the header's extension; and the end (PostgreSQL manual, COPY).
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
# The numbers of each type, big-endian. Two int16 (dimensions, zero) go before them: vector_recv(), halfvec_recv().
NUMBERS = {"vector": ">f4", "halfvec": ">f2"}


def copy_rows(vectors: np.ndarray, type_name: str) -> bytes:
    """Rows of (ordinal integer, vector or halfvec), counted from 1, as COPY … FROM … (FORMAT binary) takes them.

    vectors: (n, dimensions) float32. A number that a halfvec cannot hold becomes infinite, which PostgreSQL refuses.
    """
    import numpy as np

    count, dimensions = vectors.shape
    numbers = np.dtype((NUMBERS[type_name], dimensions))
    rows = np.empty(
        count,
        [
            ("fields", ">i2"),
            ("ordinal_bytes", ">i4"),
            ("ordinal", ">i4"),
            ("vector_bytes", ">i4"),
            ("dimensions", ">i2"),
            ("zero", ">i2"),
            ("numbers", numbers),
        ],
    )
    rows["fields"] = 2
    rows["ordinal_bytes"] = 4
    rows["ordinal"] = np.arange(1, count + 1)
    rows["vector_bytes"] = 4 + numbers.itemsize
    rows["dimensions"] = dimensions
    rows["zero"] = 0
    with np.errstate(over="ignore"):
        rows["numbers"] = vectors
    return HEADER + rows.tobytes() + TRAILER
''',
"autoembed.database": r'''"""The one door to plpy: every statement that the Python side runs is a method here."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import plpy  # type: ignore[import-not-found]

from autoembed.binary import copy_rows
from autoembed.errors import ProviderTrouble, row_error, trouble_of_function
from autoembed.limits import Charge, Limits, Permit
from autoembed.model import Model, Share
from autoembed.records import Backfill, Message, Pipeline, Row

if TYPE_CHECKING:
    import numpy as np

# A failed statement raises this.
Error = plpy.SPIError

_plans: dict[str, Any] = {}


class _Undo(Exception):
    """Rolls back a subtransaction whose result has been read."""


class Database:
    """The database as seen from a lane, which commits as it goes, or from a function, which cannot."""

    def __init__(self, *, commits: bool) -> None:
        self._commits = commits
        # The vector types whose temporary tables may have rows. Each commit empties them.
        self._filled: set[str] = set()

    def commit(self, *, synced: bool = True) -> None:
        """Commits, where that is possible. synced: waits for the disk if the server's settings ask for it."""
        if self._commits:
            if not synced:
                self._run("SELECT pg_catalog.set_config('synchronous_commit', 'off', true)")
            plpy.commit()
            self._filled.clear()

    def check_interrupts(self) -> None:
        """Lets a cancel, a timeout or a shutdown take effect, and keeps a lane's transactions short."""
        self._run("SELECT 1")
        self.commit()

    def sleep(self, seconds: float) -> None:
        """Waits. A cancel, a timeout or a shutdown ends the wait."""
        self._run("SELECT pg_catalog.pg_sleep($1)", ["pg_catalog.float8"], [seconds])
        self.commit()

    # Lanes ---------------------------------------------------------------------------------------

    def enter_lane(self, *, backfill: bool) -> bool:
        """Registers the session as a lane. backfill: as one for backfills alone.

        Returns whether any of the tables has a vector index, which makes writing slow.
        """
        return bool(
            self._run("SELECT autoembed._enter_lane($1) AS indexed", ["pg_catalog.bool"], [backfill])[0]["indexed"]
        )

    def leave_lane(self) -> None:
        self._run("SELECT autoembed._leave_lane()")

    def clean_up(self) -> None:
        """Removes the remains of dropped tables, dead lanes and finished backfills."""
        self._run("SELECT autoembed._clean_up()")

    def lock_lanes(self) -> None:
        """Locks the table of lanes. A transaction that writes begins so, to avoid a deadlock with DROP EXTENSION."""
        self._run("SELECT autoembed._gate()")

    def lane_is_wanted(self) -> bool:
        """Whether nobody has asked the lane to stop."""
        return bool(self._run("SELECT autoembed._lane_is_wanted() AS wanted")[0]["wanted"])

    def statement_timeout_seconds(self) -> float | None:
        """The time that a statement of this session may take; None: there is no limit."""
        row = self._run(
            "SELECT s.setting FROM pg_catalog.pg_settings AS s WHERE s.name OPERATOR(pg_catalog.=) 'statement_timeout'"
        )[0]
        return int(row["setting"]) / 1000 or None

    # The queue -----------------------------------------------------------------------------------

    def claim(self, max_rows: int, lease_seconds: float, held: Sequence[int]) -> list[Message]:
        """Takes messages for about so many rows. held: the messages that this lane has already."""
        rows = self._run(
            "SELECT c.message_id, c.read_count, c.message FROM autoembed._claim($1, $2, $3) AS c",
            ["pg_catalog.int4", "pg_catalog.float8", "pg_catalog.int8[]"],
            [max_rows, lease_seconds, list(held)],
        )
        return [Message(row["message_id"], row["read_count"], _body(row["message"])) for row in rows]

    def extend(self, message_ids: Sequence[int], lease_seconds: float) -> None:
        self._run(
            "SELECT autoembed._extend($1, $2)",
            ["pg_catalog.int8[]", "pg_catalog.float8"],
            [list(message_ids), lease_seconds],
        )

    def settle(self, message_ids: Sequence[int]) -> None:
        self._run("SELECT autoembed._settle($1)", ["pg_catalog.int8[]"], [list(message_ids)])

    def release(self, message_ids: Sequence[int]) -> None:
        self._run("SELECT autoembed._release($1)", ["pg_catalog.int8[]"], [list(message_ids)])

    def requeue(
        self, pipeline_id: int, keys: Sequence[str], attempts: int, *, read_count: int = 0, delay_seconds: float = 0.0
    ) -> None:
        """Queues rows in one message. read_count: how often it counts as read before."""
        self._run(
            "SELECT autoembed._requeue($1, $2, $3, $4, $5)",
            ["pg_catalog.int4", "pg_catalog.jsonb", "pg_catalog.int4", "pg_catalog.int4", "pg_catalog.float8"],
            [pipeline_id, f"[{','.join(keys)}]", attempts, read_count, delay_seconds],
        )

    # Backfills -----------------------------------------------------------------------------------

    def next_backfill(self, *, dedicated: bool) -> Backfill | None:
        """The next table to scan, locked against other lanes until the commit. dedicated: this lane only backfills."""
        rows = self._run("SELECT b.* FROM autoembed._next_backfill($1) AS b", ["pg_catalog.bool"], [dedicated])
        if not rows:
            return None
        return Backfill(rows[0]["pipeline_id"], rows[0]["after"], rows[0]["condition"], rows[0]["failures"])

    def scan(self, backfill: Backfill, max_rows: int) -> list[str]:
        """The next keys of its table. Raises RowError if its condition fails or the table is locked."""
        rows: Any = []
        with _row_errors(), contextlib.suppress(_Undo), plpy.subtransaction():
            rows = self._run(
                f"SELECT s.key FROM autoembed._scan_{backfill.pipeline_id}($1, $2, $3) AS s",
                ["pg_catalog.text", "pg_catalog.text", "pg_catalog.int4"],
                [backfill.after, backfill.condition, max_rows],
            )
            raise _Undo
        return [row["key"] for row in rows]

    def queue_backfill(
        self,
        backfill: Backfill,
        keys: Sequence[str],
        *,
        exhausted: bool,
        lease_seconds: float,
        held: Sequence[int],
    ) -> list[Message]:
        """Moves a backfill behind these keys. Returns the message for them, which is claimed already."""
        rows = self._run(
            "SELECT c.message_id, c.read_count, c.message FROM autoembed._queue_backfill($1, $2, $3, $4, $5) AS c",
            ["pg_catalog.int4", "pg_catalog.text[]", "pg_catalog.bool", "pg_catalog.float8", "pg_catalog.int8[]"],
            [backfill.pipeline_id, list(keys), exhausted, lease_seconds, list(held)],
        )
        return [Message(row["message_id"], row["read_count"], _body(row["message"])) for row in rows]

    def fail_backfill(self, backfill: Backfill, reason: str) -> None:
        """Ends a backfill, with the reason on the failed list."""
        self._run(
            "SELECT autoembed._fail_backfill($1, $2)",
            ["pg_catalog.int4", "pg_catalog.text"],
            [backfill.pipeline_id, reason],
        )

    # Pipelines and models ------------------------------------------------------------------------

    def resolve(self, body: Any) -> int:
        """The pipeline of a message of the guide's form. Raises RowError if the message is of no use."""
        with _row_errors():
            return int(
                self._run("SELECT autoembed._resolve($1) AS id", ["pg_catalog.jsonb"], [json.dumps(body)])[0]["id"]
            )

    def pipelines(self, ids: Sequence[int]) -> dict[int, Pipeline]:
        rows = self._run("SELECT p.* FROM autoembed._pipelines($1) AS p", ["pg_catalog.int4[]"], [list(ids)])
        return {
            row["id"]: Pipeline(
                id=row["id"],
                schema_name=row["schema_name"],
                table_name=row["table_name"],
                content_function=row["content_function"],
                embedding_column=row["embedding_column"],
                vector_type=row["vector_type"],
                truncate=row["truncate"],
                trusted=row["trusted"],
                blocked=row["blocked"],
                failures=row["failures"],
                model=Model.from_row(json.loads(row["model"])),
            )
            for row in rows
        }

    def model(self, name: str | None) -> Model:
        """The model of that name; None: the default one."""
        sql = "SELECT autoembed._model_facts(m) AS model FROM autoembed._model($1) AS m"
        return Model.from_row(json.loads(self._run(sql, ["pg_catalog.text"], [name])[0]["model"]))

    def price_and_rate(self, model: Model) -> tuple[Any, Any]:
        """The price of a model per million tokens, and its rows per second in the busiest recent minute."""
        row = self._run(
            "SELECT p.price, p.rows_per_second FROM autoembed._price_and_rate($1) AS p",
            ["pg_catalog.text"],
            [model.name],
        )[0]
        return row["price"], row["rows_per_second"]

    def rest_model(self, name: str, seconds: float, needs_attention: bool, reason: str) -> bool:
        """Lets a model rest. Returns whether this lane is the first to report the trouble."""
        row = self._run(
            "SELECT autoembed._rest_model($1, $2, $3, $4) AS is_new",
            ["pg_catalog.text", "pg_catalog.float8", "pg_catalog.bool", "pg_catalog.text"],
            [name, seconds, needs_attention, reason],
        )[0]
        return bool(row["is_new"])

    def resume_model(self, name: str) -> None:
        self._run("SELECT autoembed.resume_model($1)", ["pg_catalog.text"], [name])

    def call_embedder(self, model: str, purpose: str, texts: Sequence[str]) -> list[bytes | None]:
        """The vectors that a model's SQL function makes of texts, in PostgreSQL's binary form. Raises Trouble."""
        row: Any = None
        try:
            with self.prepared_statements_kept(), contextlib.suppress(_Undo), plpy.subtransaction():
                [row] = self._run(
                    "SELECT c.vectors, c.fault FROM autoembed._call_embedder($1, $2, $3) AS c",
                    ["pg_catalog.text", "pg_catalog.text", "pg_catalog.text[]"],
                    [model, purpose, list(texts)],
                )
                # The owner's code may have changed settings, made temporary objects, or left events for the commit.
                raise _Undo
        except plpy.SPIError as error:
            trouble = trouble_of_function(getattr(error, "sqlstate", None) or "XX000", str(error))
            if trouble is None:
                raise
            raise trouble from error
        if row["fault"] is not None:
            raise ProviderTrouble(row["fault"], permanent=True)
        return list(row["vectors"])

    @contextmanager
    def prepared_statements_kept(self) -> Iterator[None]:
        """Drops the prepared statements that an owner's code leaves: the session's user might execute one by name."""
        known = self._run("SELECT autoembed._prepared() AS statements")[0]["statements"]
        try:
            yield
        finally:
            self._run("SELECT autoembed._forget_prepared($1)", ["pg_catalog.text[]"], [known])

    @contextmanager
    def read_committed(self) -> Iterator[None]:
        """Transactions inside are READ COMMITTED, whatever the session's default is.

        At a higher level, lanes and applications would fail each other's statements, and even COMMIT.
        """
        default = self._run("SELECT pg_catalog.current_setting('default_transaction_isolation') AS level")[0]["level"]
        self._isolate("read committed")
        try:
            yield
        finally:
            self._isolate(default)

    def _isolate(self, level: str) -> None:
        self._run(
            "SELECT pg_catalog.set_config('default_transaction_isolation', $1, false)", ["pg_catalog.text"], [level]
        )
        self.commit()

    # Limits --------------------------------------------------------------------------------------

    def take_permit(self, model: str, charges: Sequence[Charge | None], slots_held: Sequence[int]) -> Permit:
        """A permit for one more request of a model. The caller commits at once where that is possible."""
        seconds = [value for charge in charges for value in charge or (None, None)]
        [row] = self._run(
            "SELECT p.* FROM autoembed._take_permit($1, $2, $3, $4, $5, $6, $7) AS p",
            ["pg_catalog.text", "pg_catalog.bool", *["pg_catalog.float8"] * 4, "pg_catalog.int4[]"],
            [
                model,
                self._commits,
                *seconds,
                list(slots_held),
            ],
        )
        wait = row["wait_seconds"]
        at = None if wait is None else time.monotonic() + wait
        return Permit(at, row["slot"], row["spent"], row["rest_seconds"] or 0.0)

    def free_slots(self, model: str, slots: Sequence[int]) -> None:
        """Notes that requests with these slots are no longer in flight."""
        self._run(
            "SELECT autoembed._free_slots($1, $2)", ["pg_catalog.text", "pg_catalog.int4[]"], [model, list(slots)]
        )

    def learn_limits(self, model: str, limits: Limits) -> None:
        self._run(
            "SELECT autoembed._learn_limits($1, $2, $3, $4, $5)",
            ["pg_catalog.text", *["pg_catalog.int4"] * 4],
            [model, *limits.requests, *limits.tokens],
        )

    def warn_of_blocked_pipelines(self, resting: Sequence[str] | None = None) -> None:
        """Warns of the pipelines that have jobs waiting and cannot be embedded.

        resting: only pipelines that wait for one of these models; an empty list: only those that wait for no model.
        """
        self._run(
            "SELECT autoembed._warn_of_blocked_pipelines(true, $1)",
            ["pg_catalog.text[]"],
            [None if resting is None else list(resting)],
        )

    # Rows ----------------------------------------------------------------------------------------

    def rows(self, pipeline: Pipeline, keys: Sequence[str]) -> dict[str, Row]:
        """The rows that exist, by key. Raises RowError if the content function fails for one of them."""
        rows: Any = []
        with _row_errors(), contextlib.suppress(_Undo), plpy.subtransaction():
            rows = self._run(
                f"SELECT c.key, c.content, c.has_embedding FROM autoembed._content_{pipeline.id}($1) AS c",
                ["pg_catalog.text[]"],
                [list(keys)],
            )
            # The owner's code may have changed settings or made temporary objects.
            raise _Undo
        return {row["key"]: Row(row["content"], row["has_embedding"]) for row in rows}

    def digests(self, pipeline: Pipeline, keys: Sequence[str]) -> dict[str, bytes]:
        rows = self._run(
            "SELECT d.key, d.digest FROM autoembed._digests($1, $2) AS d",
            ["pg_catalog.int4", "pg_catalog.text[]"],
            [pipeline.id, list(keys)],
        )
        return {row["key"]: row["digest"] for row in rows}

    def write(
        self,
        pipeline: Pipeline,
        keys: Sequence[str],
        contents: Sequence[str | None],
        vectors: np.ndarray | None,
    ) -> dict[str, str]:
        """Writes the vectors (None: NULLs) of the rows whose text is still the same.

        Returns the outcome of each key: written, changed, locked or gone. Raises RowError if a row does not take its
        vector; then none is written.
        """
        with _row_errors(), contextlib.nullcontext() if pipeline.trusted else self._settings_kept():
            if vectors is not None and (stage := self._staged(pipeline, vectors)):
                embeddings, arguments = f"(SELECT pg_catalog.array_agg(s.v ORDER BY s.n) FROM {stage} AS s)", []
            else:
                embeddings = f"$4::{pipeline.vector_type}[]"
                arguments = [[None] * len(keys) if vectors is None else literals(vectors)]
            rows = self._run(
                f"SELECT w.key, w.outcome FROM autoembed._write_{pipeline.id}($1, $2, $3, {embeddings}) AS w",
                [*["pg_catalog.text[]"] * 2, "pg_catalog.text", *["pg_catalog.text[]"] * len(arguments)],
                [list(keys), list(contents), pipeline.model.identity, *arguments],
            )
            if not pipeline.trusted:
                self._run("SELECT autoembed._check_deferred()")
        return {row["key"]: row["outcome"] for row in rows}

    def _staged(self, pipeline: Pipeline, vectors: np.ndarray) -> str | None:
        """The temporary table that holds the vectors in their order; None if this role may not COPY from a file."""
        may_have_rows = not self._commits or pipeline.vector_type in self._filled
        self._filled.add(pipeline.vector_type)
        rows = copy_rows(vectors, pipeline.vector_type.rpartition(".")[2])
        # The file is in memory, and no other process can open it by a name.
        file = os.memfd_create("autoembed")
        try:
            with open(file, "wb", closefd=False) as stream:
                stream.write(rows)
            [row] = self._run(
                "SELECT autoembed._stage($1, $2, $3, $4) AS name",
                ["pg_catalog.regtype", "pg_catalog.int4", "pg_catalog.int4", "pg_catalog.bool"],
                [pipeline.vector_type, len(rows) // len(vectors), file, may_have_rows],
            )
        finally:
            os.close(file)
        return row["name"]  # type: ignore[no-any-return]

    def record_embedded(
        self, pipeline: Pipeline, keys: Sequence[str], digests: Sequence[bytes], truncated: Sequence[bool]
    ) -> None:
        self._run(
            "SELECT autoembed._record_embedded($1, $2, $3, $4)",
            ["pg_catalog.int4", "pg_catalog.text[]", "pg_catalog.bytea[]", "pg_catalog.bool[]"],
            [pipeline.id, list(keys), list(digests), list(truncated)],
        )

    def forget(self, pipeline: Pipeline, keys: Sequence[str]) -> None:
        self._run(
            "SELECT autoembed._forget($1, $2)", ["pg_catalog.int4", "pg_catalog.text[]"], [pipeline.id, list(keys)]
        )

    def note_usage(self, model: str, shares: Sequence[Share], slot: int | None) -> None:
        """Notes a request that was answered and the shares of pipelines in it. Frees its slot."""
        self._run(
            "SELECT autoembed._note_usage($1, $2, $3, $4, $5, $6, $7)",
            [
                "pg_catalog.text",
                *["pg_catalog.int4[]"] * 3,
                "pg_catalog.int8[]",
                "pg_catalog.int4[]",
                "pg_catalog.int4",
            ],
            [model, *(list(column) for column in zip(*shares, strict=True)), slot],
        )

    def forget_all(self, pipeline_id: int) -> None:
        self._run("SELECT autoembed._forget_all($1)", ["pg_catalog.int4"], [pipeline_id])

    def fail(self, pipeline: Pipeline, key: str, reason: str, attempts: int, excerpt: str | None) -> None:
        self._run(
            "SELECT autoembed._fail($1, $2, $3, $4, $5)",
            ["pg_catalog.int4", "pg_catalog.text", "pg_catalog.text", "pg_catalog.int4", "pg_catalog.text"],
            [pipeline.id, key, reason, attempts, excerpt],
        )

    def fail_message(self, body: Any, reason: str, attempts: int) -> None:
        self._run(
            "SELECT autoembed._fail_message($1, $2, $3)",
            ["pg_catalog.jsonb", "pg_catalog.text", "pg_catalog.int4"],
            [json.dumps(body), reason, attempts],
        )

    @contextmanager
    def _settings_kept(self) -> Iterator[None]:
        """Restores the settings of the session that an owner's code changes inside."""
        before = self._settings()
        yield
        after = self._settings()
        for name in after.keys() - before.keys():
            plpy.execute(f"RESET {'.'.join(plpy.quote_ident(part) for part in name.split('.'))}")
        for name, value in before.items():
            if after.get(name) != value:
                self._run(
                    "SELECT pg_catalog.set_config($1, $2, false)", ["pg_catalog.text", "pg_catalog.text"], [name, value]
                )
        # pg_settings does not show this one, and the triggers obey it.
        self._run("SELECT pg_catalog.set_config('autoembed.writing', '', false)")

    def _settings(self) -> dict[str, str]:
        """The settings that differ in this session."""
        rows = self._run(
            "SELECT s.name, pg_catalog.current_setting(s.name) AS value FROM pg_catalog.pg_settings AS s"
            " WHERE s.source OPERATOR(pg_catalog.=) 'session' AND s.context OPERATOR(pg_catalog.<>) 'internal'"
        )
        return {row["name"]: row["value"] for row in rows}

    def _run(self, sql: str, types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> Any:
        plan = _plans.get(sql)
        if plan is None:
            plan = _plans[sql] = plpy.prepare(sql, list(types))
        return plpy.execute(plan, list(arguments))


def is_installed() -> bool:
    return bool(
        plpy.execute("SELECT FROM pg_catalog.pg_extension AS e WHERE e.extname OPERATOR(pg_catalog.=) 'autoembed'")
    )


@contextmanager
def _row_errors() -> Iterator[None]:
    """Undoes a statement that fails because of a row and raises RowError. All other errors pass unchanged."""
    try:
        with plpy.subtransaction():
            yield
    except plpy.SPIError as error:
        # The attribute is missing if PostgreSQL does not know the SQLSTATE.
        fault = row_error(getattr(error, "sqlstate", None) or "XX000", str(error))
        if fault is None:
            raise
        raise fault from error


def literals(vectors: np.ndarray) -> list[str]:
    """Vectors in pgvector's text form."""
    import numpy as np
    import orjson

    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    return [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY).decode() for row in rows]


def _body(message: str | None) -> Any:
    # Fractions stay text: a numeric key must come back with the same digits.
    return None if message is None else json.loads(message, parse_float=str)
''',
"autoembed.doors": r'''"""The doors from SQL into Python: each function is the body of the SQL function of the same name."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from autoembed import database, heap, providers, worker
from autoembed.batching import estimate_tokens, pack, truncate
from autoembed.errors import Fault, OverBudget, ProviderTrouble, Trouble
from autoembed.flight import SLICE_SECONDS, Flight
from autoembed.limits import NOTHING_KNOWN, PATIENCE_SECONDS, Charge, Limiter, Permit
from autoembed.model import Embedded, Model, Request, Share
from autoembed.network import Network
from autoembed.providers import provider_of, sizes_of

# Vectors of search texts that a session keeps: a plan without an index calls embed() once for each row, and paging
# calls it once for each page.
QUERY_CACHE_SIZE = 100
# A search waits for its vector for at most this long, in seconds.
QUERY_TIMEOUT_SECONDS = 60.0
# doctor() waits for the answer of a model for at most this long, in seconds.
PROBE_TIMEOUT_SECONDS = 10.0
# Connections that a session keeps open.
MAX_CONNECTIONS = 32
# Freed blocks up to this size, in bytes, stay with a lane: an index takes such blocks for each of its rows. The answers
# of providers, most of what a lane allocates, are larger and go back to the system.
KEPT_BLOCK_BYTES = 600_000
# Free memory that a lane keeps at the end of its heap, in bytes.
KEPT_FREE_BYTES = 8 << 20

heap.share_one_arena()
_network = Network(MAX_CONNECTIONS)
_queries: OrderedDict[tuple[str, str], str] = OrderedDict()


def process(batch_size: int, max_requests: int, timeout_milliseconds: int) -> dict[str, Any]:
    options = worker.Options(batch_size, max_requests, timeout_milliseconds / 1000)
    here = database.Database(commits=False)
    here.clean_up()
    with here.prepared_statements_kept():
        report = worker.run_pass(here, _network, options)
    here.warn_of_blocked_pipelines()
    return {**vars(report), "failed_jobs": json.dumps(report.failed_jobs)}


def work(run_seconds: float, batch_size: int, max_requests: int, timeout_milliseconds: int, backfill: bool) -> None:
    options = worker.Options(batch_size, max_requests, timeout_milliseconds / 1000)
    heap.keep(block_bytes=KEPT_BLOCK_BYTES, free_bytes=KEPT_FREE_BYTES)
    here = database.Database(commits=True)
    try:
        with here.read_committed(), here.prepared_statements_kept():
            worker.work(here, _network, options, run_seconds, backfill=backfill)
    except database.Error:
        # DROP EXTENSION while the lane runs is no error.
        if database.is_installed():
            raise


def embed(content: str, model_name: str, definition: str) -> dict[str, Any]:
    """The vector of a search text, or the fault that SQL is to raise.

    definition: the row of the model as text. A vector that is kept is of the same text and the same definition.
    """
    query = (content, definition)
    if query not in _queries:
        try:
            if not content.strip():
                raise Fault("a blank text has no embedding", hint="Give embed() some words.")
            here = database.Database(commits=False)
            _queries[query] = _embed_in_turn(here, here.model(model_name), content)
        except Fault as fault:
            return {"embedding": None, **_fields(fault)}
        except Trouble as trouble:
            return {"embedding": None, **_fields(_without_vector(model_name, trouble))}
        if len(_queries) > QUERY_CACHE_SIZE:
            _queries.popitem(last=False)
    _queries.move_to_end(query)
    return {"embedding": _queries[query], **NO_FAULT}


def state_of(
    pipeline_id: int, content: str | None, has_embedding: bool, digest: str | None, outstanding: str | None
) -> dict[str, Any]:
    """The state of a row with this text: the columns of autoembed._state_of()."""
    pipeline = database.Database(commits=False).pipelines([pipeline_id])[pipeline_id]
    limit = sizes_of(pipeline.model).tokens_per_input
    tokens = estimate_tokens(content or "")
    wanted = content is not None and content.strip() != ""
    fresh = wanted and has_embedding and content is not None and digest == pipeline.model.digest(content).hex()
    if fresh or not wanted and not has_embedding:
        state = "fresh" if wanted else "not wanted"
    else:
        state = outstanding or ("stale" if has_embedding else "missing")
    return {"tokens": tokens if wanted else 0, "truncated": limit is not None and tokens > limit, "state": state}


def estimate(texts: list[str], model_name: str | None) -> dict[str, Any]:
    """The effort to embed these texts: the columns of autoembed._estimate_texts()."""
    here = database.Database(commits=False)
    model = here.model(model_name)
    sizes = sizes_of(model, Limiter(model).learnt)
    limit, prefix = sizes.tokens_per_input, model.prefix("document")
    distinct = list(dict.fromkeys(text if limit is None else truncate(text, limit, prefix) for text in texts))
    most = min(worker.DEFAULT_BATCH_SIZE, sizes.inputs_per_request)
    requests = pack(distinct, most, sizes.tokens_per_request, prefix)
    price, rows_per_second = here.price_and_rate(model)
    return {
        "tokens": sum(estimate_tokens(prefix + text) for text in distinct),
        "requests": len(requests),
        "price": price,
        "rows_per_second": rows_per_second,
    }


def check_model(name: str) -> dict[str, Any] | None:
    """The fault in a model's definition, if there is one. waits: the model cannot be used yet, which is a WARNING."""
    model = database.Database(commits=False).model(name)
    try:
        providers.check(model)
    except Fault as fault:
        return {**_fields(fault), "waits": False}
    except ProviderTrouble as trouble:
        not_yet = Fault(
            f'model "{name}" cannot be used yet: {trouble}',
            hint="It is tried again by itself once this is mended.",
            errcode="01000",
        )
        return {**_fields(not_yet), "waits": True}
    return None


def probe(name: str) -> str | None:
    """The fault of a model, found by asking it for one vector; None if it works."""
    here = database.Database(commits=False)
    model = here.model(name)
    try:
        providers.check(model)
        _embed_query(here, model, worker.PROBE, PROBE_TIMEOUT_SECONDS)
    except (Fault, Trouble) as found:
        return str(found)
    return None


NO_FAULT = {"problem": None, "hint": None, "errcode": None}


def _fields(fault: Fault) -> dict[str, Any]:
    return {"problem": fault.problem, "hint": fault.hint, "errcode": fault.errcode}


def _without_vector(model_name: str, trouble: Trouble) -> Fault:
    return Fault(
        f'model "{model_name}" gave no embedding: {trouble}',
        hint="SELECT * FROM autoembed.doctor() shows what to do.",
        errcode="38000",
    )


def _embed_in_turn(here: database.Database, model: Model, content: str) -> str:
    limiter = Limiter(model)
    if not limiter.needs_permits:
        return _embed_query(here, model, content)
    permit = _permit(here, model, limiter.charge(estimate_tokens(content), time.monotonic()))
    try:
        return _embed_query(here, model, content)
    finally:
        if permit.slot is not None:
            here.free_slots(model.name, [permit.slot])


def _permit(here: database.Database, model: Model, charges: Sequence[Charge | None]) -> Permit:
    """Waits until the model may be asked once more. Raises ProviderTrouble if that takes too long."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (permit := here.take_permit(model.name, charges, [])).at is None:
        if permit.spent is not None:
            raise OverBudget(permit.spent)
        if time.monotonic() > end:
            raise ProviderTrouble(f"{model.max_requests_in_flight} requests are in flight, and no more may be")
        _wait(here)
    try:
        while time.monotonic() < permit.at:
            if permit.at > end:
                raise ProviderTrouble(f"its limits allow no request for {permit.at - time.monotonic():.0f} s")
            _wait(here)
    except BaseException:
        if permit.slot is not None:
            here.free_slots(model.name, [permit.slot])
        raise
    return permit


def _wait(here: database.Database) -> None:
    here.check_interrupts()
    time.sleep(SLICE_SECONDS)


def _embed_query(
    here: database.Database, model: Model, content: str, timeout_seconds: float = QUERY_TIMEOUT_SECONDS
) -> str:
    provider = provider_of(model)
    request = Request(model, [content], timeout_seconds, purpose="query")

    def abort() -> None:
        _network.abort()
        provider.abort()

    with Flight[None, Embedded](1, here.check_interrupts, abort) as flight:
        flight.submit(
            None, lambda: providers.embed(request, _network, here.call_embedder), here=provider.RUNS_IN_BACKEND
        )
        [(_, outcome)] = flight.landed()
    limiter = Limiter(model)
    if limiter.learn_from(outcome, time.monotonic()):
        here.learn_limits(model.name, limiter.learnt or NOTHING_KNOWN)
    if isinstance(outcome, BaseException):
        raise outcome
    tokens = estimate_tokens(content) if outcome.tokens is None else outcome.tokens
    here.note_usage(model.name, [Share(None, 1, 1, tokens, 0)], None)
    return database.literals(outcome.vectors)[0]
''',
"autoembed.endpoints": r'''"""The addresses of models: https anywhere, http on this machine and on allowed hosts, metadata services never."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection

from autoembed.errors import Fault

# Link-local addresses, and those where clouds give out credentials: AWS, Google, Alibaba, Azure, Oracle.
FORBIDDEN_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::/32",
        "fd20:ce::254/128",
        "100.100.100.200/32",
        "168.63.129.16/32",
        "192.0.0.192/32",
    )
]
# The names of these services, which a proxy may resolve.
FORBIDDEN_NAMES = {
    "metadata",
    "metadata.google.internal",
    "metadata.goog",
    "instance-data",
    "instance-data.ec2.internal",
}
# IPv4 inside IPv6 (RFC 6052), which ipaddress does not unwrap.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

# This form is stricter than that of HTTP clients, so that none finds another host in a URL.
URL = re.compile(r"(https?)://([^\s/?#\\@]+@)?(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s/?#\\@:\[\]]+)(:[0-9]+)?([/?#]\S*)?")


def fault_of(url: str, http_hosts: Collection[str]) -> Fault | None:
    """The reason why a URL is not called. http_hosts: the hosts that an administrator allows http for."""
    parts = URL.fullmatch(url)
    shown = without_user(url)
    if parts is None:
        return Fault(f'"{shown}" is not an http or https URL', hint="Write it as https://HOST/PATH.")
    scheme, user, host = parts[1], parts[2], _plain(parts[3])
    if user is not None:
        return Fault(
            f'"{shown}" names a user, who would not be sent and whose password would stand in a table',
            hint="Say where a key is found with api_key.",
        )
    if is_forbidden(host):
        return Fault(
            f'"{shown}" is a link-local address or a cloud\'s metadata service, which is never called',
            hint="Give the address of the embedding server itself.",
        )
    if scheme == "https" or _is_here(host) or host in http_hosts:
        return None
    return Fault(
        f'"{shown}" would be called without encryption',
        hint=f"Use https, or allow it first: SELECT autoembed.allow_http_host('{host}').",
    )


def without_user(url: str) -> str:
    return re.sub(r"//[^/]*@", "//", url)


def is_forbidden(host: str) -> bool:
    """Whether the host of a URL is never called. Where a proxy resolves names, nothing more can be checked."""
    address = _address(host)
    return _plain(host) in FORBIDDEN_NAMES if address is None else _is_forbidden_address(address)


def may_connect(host: str, address: str) -> bool:
    """Whether a connection to the address of a host is allowed. A name for this machine must lead to this machine."""
    resolved = _unwrapped(ipaddress.ip_address(address))
    return not _is_forbidden_address(resolved) and (resolved.is_loopback or not _is_here(_plain(host)))


def _is_here(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") if address is None else address.is_loopback


def _is_forbidden_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return any(address in network for network in FORBIDDEN_NETWORKS)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is, in any notation that the system knows (2852039166, 0xA9FEA9FE); None for a name."""
    try:
        plain = _plain(host).partition("%")[0]
        found = socket.getaddrinfo(plain, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    return _unwrapped(ipaddress.ip_address(found[0][4][0]))


def _unwrapped(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address inside an IPv6 address, or else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _plain(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()
''',
"autoembed.errors": r'''"""The errors: who is to blame, and whether they pass. Decided here, acted on in worker and rows."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping
from datetime import UTC
from types import MappingProxyType


class Fault(Exception):
    """A mistake of the user. It is returned to SQL, which raises it with message, hint and SQLSTATE."""

    def __init__(self, problem: str, *, hint: str, errcode: str = "22023") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
        self.errcode = errcode


class Trouble(Exception):
    """An embedding that could not be had; str() is one sentence for the operator, without secrets.

    headers: those of the HTTP answer that says so, in lower case; empty without an answer.
    """

    headers: Mapping[str, str] = MappingProxyType({})


class Refused(Trouble):
    """The provider refused this request but not the next: one of its texts is to blame."""


class ProviderTrouble(Trouble):
    """The provider is to blame, not the texts.

    permanent: somebody must act (a wrong key, an unknown model); otherwise it passes by itself.
    retry_after_seconds: the wait that the provider asked for, if it did.
    """

    def __init__(self, message: str, *, permanent: bool = False, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.retry_after_seconds = retry_after_seconds


class OverBudget(ProviderTrouble):
    """The model has used up its budget of the day. retry_after_seconds: the time until the next day."""


class RowError(Exception):
    """A statement failed because of a row: its data, or its owner's functions, triggers and constraints.

    passes: another transaction was in the way, and the same statement may work in a moment.
    locked: it holds a lock, perhaps on the whole table.
    """

    def __init__(self, message: str, *, passes: bool, locked: bool = False) -> None:
        super().__init__(message)
        self.passes = passes
        self.locked = locked


# SQLSTATEs by their beginnings (PostgreSQL manual, appendix A).
# Errors that pass by themselves: rollbacks for concurrency, and locks that another transaction holds.
PASSING = ("40", "55")
# Errors that no row causes: no disk space or memory, a cancel or a shutdown, a failing disk.
NOBODYS = ("53", "57", "58030")
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"
NO_CONNECTION = ("08",)
UNDEFINED_FUNCTION = "42883"


def row_error(sqlstate: str, message: str) -> RowError | None:
    """The row error that a failed statement stands for; None if no row is to blame."""
    if sqlstate.startswith(NOBODYS):
        return None
    # A function of the pipeline was replaced while a request was in flight. The next claim finds the new one.
    gone = sqlstate == UNDEFINED_FUNCTION and "autoembed._" in message
    return RowError(message, passes=gone or sqlstate.startswith(PASSING), locked=sqlstate == LOCK_NOT_AVAILABLE)


def trouble_of_function(sqlstate: str, message: str) -> Trouble | None:
    """The trouble that an error of a user's SQL function stands for; None if it was cancelled."""
    if sqlstate == QUERY_CANCELED:
        return None
    if sqlstate.startswith(PASSING + NOBODYS + NO_CONNECTION):
        return ProviderTrouble(message)
    return Refused(message)


# The longest rest after trouble that passes by itself, in seconds.
MAX_REST_SECONDS = 15.0
# The longest rest after trouble that somebody must mend, in seconds.
MAX_PERMANENT_REST_SECONDS = 60.0
# A longer wait, in seconds, is not granted to a provider.
MAX_RETRY_AFTER_SECONDS = 3600.0


def rest_seconds(trouble: ProviderTrouble, failures: int, fraction: float) -> float:
    """The rest of a model whose provider has failed that many times before. fraction: random, from 0 to 1.

    The rest is the time that the provider asks for, plus up to a second so that lanes do not all come back at once.
    Without such a time it grows exponentially, with full jitter. It is never long: a small request now and then shows
    whether the provider is back.
    """
    if isinstance(trouble, OverBudget) and trouble.retry_after_seconds is not None:
        return trouble.retry_after_seconds
    if trouble.retry_after_seconds is not None:
        return min(trouble.retry_after_seconds, MAX_RETRY_AFTER_SECONDS) + fraction
    if trouble.permanent:
        return float(min(10.0 * 2 ** min(failures, 10), MAX_PERMANENT_REST_SECONDS))
    return 0.2 + fraction * min(2.0 ** min(failures, 10), MAX_REST_SECONDS)


# Statuses that blame the request (RFC 9110, section 15).
REFUSED_STATUSES = {400, 413, 414, 422}
# Statuses that pass by themselves. 409, 423 and 425 come from busy gateways.
PASSING_STATUSES = {408, 409, 423, 425, 429}


def trouble_of_answer(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None
) -> Trouble:
    """The trouble that an HTTP answer with a status other than 200 stands for."""
    message = f"the provider answered {status}: {_message_in(body, secret)}"
    if status in REFUSED_STATUSES:
        return Refused(message)
    if status == 429 and b"Request too large" in body:
        # The request has more tokens than a minute allows. Waiting does not help; fewer texts do.
        return Refused(message)
    if status == 429 and b"insufficient_quota" in body:
        return ProviderTrouble(message, permanent=True)
    if status in PASSING_STATUSES or status >= 500:
        return ProviderTrouble(message, retry_after_seconds=retry_after_seconds(headers))
    if 300 <= status < 400:
        return ProviderTrouble(f"the provider answered {status}, a redirect, which is not followed", permanent=True)
    return ProviderTrouble(message, permanent=True)


def retry_after_seconds(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Retry-After in seconds from now; None if there is none. It is a number or an HTTP date (RFC 9110, 10.2.3).

    OpenAI and Azure also send it in milliseconds, in another header.
    """
    milliseconds = re.fullmatch(r"[0-9]{1,12}", headers.get("retry-after-ms", ""))
    if milliseconds:
        return int(milliseconds[0]) / 1000
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - (time.time() if now is None else now))


def _message_in(body: bytes | bytearray, secret: str | None) -> str:
    """The provider's message, on one line of at most 300 characters, without the key that it may echo."""
    text = body[:10_000].decode("utf-8", "replace")
    try:
        answer = json.loads(text)
        if isinstance(answer, dict):
            text = _words_in(answer)
    except (ValueError, RecursionError):
        pass
    if secret:
        text = text.replace(secret, "***")
    return " ".join(text.split())[:300] or "no explanation"


def _words_in(error: object) -> str:
    """The message in an error, in the forms that providers and their web frameworks use."""
    if isinstance(error, list):
        return "; ".join(map(_words_in, error))
    if not isinstance(error, dict):
        return str(error)
    for name in ("error", "message", "detail"):
        if error.get(name) is not None:
            return _words_in(error[name])
    if isinstance(error.get("msg"), str):
        # A field of the request is wrong.
        place = ".".join(map(str, error["loc"])) + ": " if isinstance(error.get("loc"), list) else ""
        return f"{place}{error['msg']}"
    return str(error)
''',
"autoembed.flight": r'''"""Calls that run side by side in threads, while the backend can still be interrupted."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from autoembed.errors import Trouble

Tag = TypeVar("Tag")
Result = TypeVar("Result")

# A cancel or a shutdown is noticed after at most this long, in seconds.
SLICE_SECONDS = 0.05


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Threads started inside never receive a signal: PostgreSQL's handlers must run in the backend's own thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# A thread that does not end keeps a backend from leaving for at most this long, in seconds.
EXIT_SECONDS = 1.0


def _flights() -> set[Flight[Any, Any]]:
    """The flights of this process, in a module of their own: sys.modules keeps it when this module is loaded again."""
    name = "_autoembed_flights"
    if name not in sys.modules:
        holder: Any = types.ModuleType(name)
        holder.flights = set()
        holder.callback = _end_flights_before_exit(holder.flights)
        sys.modules[name] = holder
    return sys.modules[name].flights  # type: ignore[no-any-return]


def _end_flights_before_exit(flights: set[Flight[Any, Any]]) -> Any:
    """Has PostgreSQL end all flights before it leaves the process.

    exit() tears down libraries, OpenSSL first, under threads that still use them. The segmentation fault that follows
    would restart the whole server. PostgreSQL's own exit callbacks run before that.
    """
    on_proc_exit = getattr(ctypes.CDLL(None), "on_proc_exit", None)
    if on_proc_exit is None:
        # This process is no backend.
        return None

    def end_all(code: int, _argument: int) -> None:
        for flight in list(flights):
            if not flight.end(EXIT_SECONDS):
                os._exit(code)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t)(end_all)
    on_proc_exit(callback, ctypes.c_size_t(0))
    return callback


class Flight(Generic[Tag, Result]):
    """Up to max_calls calls at a time, in threads. Calls for the backend's own thread are made in landed(), one by one.

    between_waits: is called between two waits for outcomes; a cancel comes out of it.
    abort: is called to end the calls that still run when the context is left.
    """

    def __init__(self, max_calls: int, between_waits: Callable[[], None], abort: Callable[[], None]) -> None:
        self._executor = ThreadPoolExecutor(max_calls, thread_name_prefix="autoembed")
        self._between_waits = between_waits
        self._abort = abort
        self._tags: dict[Future[Result], Tag] = {}
        self._here: deque[tuple[Tag, Callable[[], Result]]] = deque()

    def __enter__(self) -> Flight[Tag, Result]:
        _flights().add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        _flights().discard(self)

    def end(self, seconds: float = math.inf) -> bool:
        """Ends all calls and their threads. Returns False if one is still there after so many seconds."""
        until = time.monotonic() + seconds
        self._executor.shutdown(wait=False, cancel_futures=True)
        # A wait() on all calls would not end: it does not count a call that was cancelled before it began.
        while running := [future for future in self._tags if not future.done()]:
            if time.monotonic() > until:
                return False
            self._abort()
            wait(running, timeout=SLICE_SECONDS)
        self._executor.shutdown(wait=True)
        return True

    def __len__(self) -> int:
        """The number of calls that are made or wait to be made."""
        return len(self._tags) + len(self._here)

    def submit(self, tag: Tag, call: Callable[[], Result], *, here: bool = False) -> None:
        """Has a call made. landed() returns its tag with the outcome. here: in the backend's own thread."""
        if here:
            self._here.append((tag, call))
            return
        with signals_blocked():
            self._tags[self._executor.submit(call)] = tag

    def withdraw(self, unwanted: Callable[[Tag], bool]) -> list[Tag]:
        """Takes back calls that have not begun. Returns their tags."""
        taken = [future for future, tag in self._tags.items() if unwanted(tag) and future.cancel()]
        taken_here = [(tag, call) for tag, call in self._here if unwanted(tag)]
        for mine in taken_here:
            self._here.remove(mine)
        return [*(self._tags.pop(future) for future in taken), *(tag for tag, _ in taken_here)]

    def landed(self) -> Iterator[tuple[Tag, Result | BaseException]]:
        """The outcome of each call as it comes, including calls that are submitted meanwhile.

        Where several outcomes are there, that of the newest call comes first. between_waits() runs before each.
        """
        while self._tags or self._here:
            if self._here:
                yield self._make_here()
            done = wait(self._tags, timeout=0 if self._here else SLICE_SECONDS, return_when=FIRST_COMPLETED).done
            self._between_waits()
            # One at a time: the others may wait while something newer is sent.
            if future := next((future for future in reversed(self._tags) if future in done), None):
                tag = self._tags.pop(future)
                error = future.exception()
                yield tag, future.result() if error is None else error

    def _make_here(self) -> tuple[Tag, Result | BaseException]:
        """Makes the next call in the backend's own thread. An error that is no Trouble, such as a cancel, is raised."""
        tag, call = self._here.popleft()
        try:
            return tag, call()
        except Trouble as trouble:
            return tag, trouble
''',
"autoembed.heap": r'''"""The freed memory that a process keeps, by glibc's mallopt(3) and malloc_trim(3). Without glibc nothing happens."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(), from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8


def share_one_arena() -> None:
    """Lets all threads share one heap. Otherwise each thread has a heap that keeps the most it ever used."""
    _call("mallopt", M_ARENA_MAX, 1)


def keep(block_bytes: int, free_bytes: int) -> None:
    """Keeps freed blocks up to a size (at most 32 MiB), and so much at the end of the heap. The rest is given back."""
    _call("mallopt", M_MMAP_THRESHOLD, block_bytes)
    _call("mallopt", M_TRIM_THRESHOLD, free_bytes)


def trim() -> None:
    """Gives all free memory back. Takes 1 to 3 ms."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function:
        function(*arguments)
''',
"autoembed.jobs": r'''"""Jobs and messages: the rows a message is for, the outcome of each, and when the message can leave the queue."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from autoembed.errors import RowError

if TYPE_CHECKING:
    from autoembed.database import Database
    from autoembed.records import Message, Pipeline, Row

# A row fails after this many attempts.
MAX_ATTEMPTS = 5


class Address(NamedTuple):
    """The rows that a message is for: their pipeline (None: to be found by names), and their keys as JSON arrays.

    truncated: the table was emptied, and there are no keys.
    moved: rows have changed their keys, so the digests known under these keys belong to other rows.
    """

    pipeline_id: int | None
    keys: list[str]
    attempts: int
    truncated: bool = False
    moved: bool = False


def address_of(body: Any) -> Address:
    """Reads a message of this extension (pipeline, keys) or of the guide's form (id, schema, …).

    Raises ValueError for any other.
    """
    if not isinstance(body, dict):
        raise ValueError("the message is not an object")
    pipeline_id, keys, attempts = body.get("pipeline"), body.get("keys"), body.get("attempts", 0)
    if body.get("truncated") is True and isinstance(pipeline_id, int):
        return Address(pipeline_id, [], 0, truncated=True)
    if keys is None:
        if body.get("id") is None:
            raise ValueError("the message lacks id")
        keys = [[body["id"]]]
    if not isinstance(keys, list) or not keys or not all(_is_key(key) for key in keys):
        raise ValueError("the message's keys are not rows' keys")
    if not isinstance(pipeline_id, int | None) or not isinstance(attempts, int):
        raise ValueError("the message's pipeline or attempts is not a number")
    canonical = [json.dumps(key, ensure_ascii=False, separators=(",", ":")) for key in keys]
    return Address(pipeline_id, canonical, attempts, moved=body.get("moved") is True)


def are_keys(texts: Sequence[str]) -> bool:
    """Whether these texts are keys as JSON arrays."""
    try:
        return all(_is_key(json.loads(text)) for text in texts)
    except (TypeError, ValueError, RecursionError):
        return False


def _is_key(key: Any) -> bool:
    return isinstance(key, list) and len(key) > 0 and all(isinstance(value, str | int) for value in key)


def isolate(messages: list[Message], fraction: float) -> tuple[list[Message], list[Message]]:
    """Separates the messages to work on now from those for later. fraction: random, from 0 to 1.

    A message that was read before was never settled: its lane died, perhaps because of it. The more often this has
    happened, the fewer other messages it is tried with. A message that kills its lane then takes few others with it.
    Messages with the fewest deaths are tried first: restarts for other reasons then spread over all messages and do
    not exhaust one. Half the time, messages that were never read go first.
    """
    fresh = [message for message in messages if message.read_count == 1]
    if len(fresh) == len(messages):
        return messages, []
    if fresh and fraction < 0.5:
        chosen = fresh
    else:
        least = min(message.read_count for message in messages if message.read_count > 1)
        size = {2: 100, 3: 10}.get(least, 1)
        chosen = [message for message in messages if message.read_count == least][:size]
    taken = {message.id for message in chosen}
    return chosen, [message for message in messages if message.id not in taken]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job. again_in_seconds: it goes back to the queue; released: unchanged, as if never read."""

    again_in_seconds: float | None = None
    attempts: int = 0
    released: bool = False


DONE = Outcome()
RELEASED = Outcome(released=True)


@dataclass(eq=False)
class Job:
    """One row to embed, as claimed by one or more messages."""

    pipeline: Any  # Pipeline; None if it was dropped after the row was queued
    key: str
    attempts: int
    message_ids: list[int]
    row: Row | None = None
    digest: bytes = b""
    truncated: bool = False
    outcome: Outcome | None = None

    @property
    def content(self) -> str | None:
        return self.row.content if self.row else None

    @property
    def has_embedding(self) -> bool:
        return self.row is not None and self.row.has_embedding


def open_jobs(
    database: Database, ledger: Ledger, messages: list[Message], max_rows: int
) -> list[tuple[Pipeline, list[Job]]]:
    """The claimed messages as jobs, one for each row, by pipeline. Messages that cannot be jobs are settled here."""
    chosen, others = isolate(messages, random.random())
    if others:
        ledger.release_messages(others)
    addressed: dict[int, list[tuple[Message, Address]]] = defaultdict(list)
    moved: dict[int, list[str]] = defaultdict(list)
    for message in chosen:
        found = _address_in(database, ledger, message)
        if found is None:
            continue
        pipeline_id, address = found
        if address.moved:
            moved[pipeline_id].extend(address.keys)
        if message.read_count > 1 and len(address.keys) > 1:
            # A lane died, perhaps because of one of these rows: from now on each row has its own message.
            for key in address.keys:
                database.requeue(pipeline_id, [key], address.attempts, read_count=message.read_count - 1)
            ledger.settle(message)
        else:
            addressed[pipeline_id].append((message, address))

    rows = _rows_of(database, ledger, addressed, max_rows)
    ids = sorted({*addressed, *moved})
    pipelines = database.pipelines(ids) if ids else {}
    for pipeline_id in moved.keys() & pipelines.keys():
        database.forget(pipelines[pipeline_id], moved[pipeline_id])
    by_pipeline: dict[int, list[Job]] = defaultdict(list)
    for (pipeline_id, key), (attempts, holders) in rows.items():
        job = Job(pipelines.get(pipeline_id), key, attempts, [message.id for message in holders])
        ledger.open(job)
        if _can_begin(ledger, job, holders):
            by_pipeline[pipeline_id].append(job)
    return [(pipelines[pipeline_id], jobs) for pipeline_id, jobs in by_pipeline.items()]


def _address_in(database: Database, ledger: Ledger, message: Message) -> tuple[int, Address] | None:
    """The pipeline and the rows of a message; None if it is settled already, because it names none."""
    try:
        address = address_of(message.body)
        pipeline_id = address.pipeline_id or database.resolve(message.body)
    except (ValueError, RowError) as error:
        ledger.fail_message(message, str(error))
        return None
    if address.truncated:
        database.forget_all(pipeline_id)
        ledger.settle(message)
        return None
    return pipeline_id, address


def _rows_of(
    database: Database, ledger: Ledger, addressed: dict[int, list[tuple[Message, Address]]], max_rows: int
) -> dict[tuple[int, str], tuple[int, list[Message]]]:
    """The attempts and the messages of each row, by pipeline and key. Each pipeline has an equal share of max_rows.

    Rows beyond the share go back to the queue.
    """
    rows: dict[tuple[int, str], tuple[int, list[Message]]] = {}
    for pipeline_id, of_pipeline in addressed.items():
        room = max(1, max_rows // len(addressed))
        # Short messages come first: they hold the latest changes. A long one may exceed the share.
        for message, address in sorted(of_pipeline, key=lambda one: len(one[1].keys)):
            if room == 0:
                ledger.release_messages([message])
                continue
            if len(address.keys) > room:
                database.requeue(pipeline_id, address.keys[room:], address.attempts)
            keys = address.keys[:room]
            room -= len(keys)
            for key in keys:
                attempts, holders = rows.setdefault((pipeline_id, key), (address.attempts, []))
                rows[pipeline_id, key] = (max(attempts, address.attempts), [*holders, message])
    return rows


def _can_begin(ledger: Ledger, job: Job, holders: list[Message]) -> bool:
    """Whether a job can be worked on now; otherwise its outcome is decided here."""
    read_count = min(message.read_count for message in holders)
    if job.pipeline is None:
        ledger.done(job)
    elif job.pipeline.blocked is not None:
        if all(message.body.get("pipeline") for message in holders):
            ledger.release(job, job.pipeline.blocked)
        else:
            # The new message names its pipeline, which claims pass over as long as it is blocked.
            ledger.retry(job, 0, job.pipeline.blocked)
    elif read_count > MAX_ATTEMPTS:
        ledger.fail(job, f"{read_count - 1} lanes ended while they worked on it", read_count - 1)
    else:
        return True
    return False


@dataclass
class Report:
    """The work of a pass, counted in jobs. failed_jobs has the guide's keys."""

    read: int = 0
    completed: int = 0
    retried: int = 0
    failed: int = 0
    requests: int = 0
    failed_jobs: list[dict[str, Any]] = field(default_factory=list)


class Ledger:
    """Notes the outcome of each job, and settles a message when all its jobs have one.

    A cancel may strike at any statement: nothing is noted as done before it is done.
    """

    def __init__(self, database: Database, messages: Sequence[Message]) -> None:
        self._database = database
        # Messages whose jobs are not known yet, and the jobs of the others.
        self._unread = {message.id for message in messages}
        self._messages: dict[int, list[Job]] = defaultdict(list)
        # Decided, and written by flush(): messages, and rows by pipeline, attempts and delay.
        self._released: list[int] = []
        self._settled: list[int] = []
        self._again: dict[tuple[int, int, float], dict[str, None]] = defaultdict(dict)
        self.report = Report()

    def take(self, messages: Sequence[Message]) -> None:
        """Adds messages whose jobs are not known yet."""
        self._unread.update(message.id for message in messages)

    def open(self, job: Job) -> None:
        self.report.read += 1
        for message_id in job.message_ids:
            self._unread.discard(message_id)
            self._messages[message_id].append(job)

    def release_messages(self, messages: Sequence[Message]) -> None:
        """Gives messages whose jobs are not known back to the queue, for a later pass."""
        self._database.release([message.id for message in messages])
        self._unread.difference_update(message.id for message in messages)

    def settle(self, message: Message) -> None:
        """Deletes a message that has no jobs."""
        self._database.settle([message.id])
        self._unread.discard(message.id)

    def done(self, job: Job) -> None:
        job.outcome = DONE
        self.report.completed += 1

    def retry(self, job: Job, delay_seconds: float, error: str | None = None, *, counts: bool = False) -> None:
        """Gives a job back to the queue, to be read again after the delay. counts: as an attempt."""
        job.outcome = Outcome(delay_seconds, job.attempts + counts)
        self.report.retried += 1
        if error is not None:
            self._note(job, error)

    def release(self, job: Job, error: str) -> None:
        """Gives a job back to the queue unchanged: its row is not to blame."""
        if job.outcome is None:
            job.outcome = RELEASED
            self.report.retried += 1
            self._note(job, error)

    def fail(self, job: Job, reason: str, attempts: int | None = None) -> None:
        self._database.fail(job.pipeline, job.key, reason, attempts or job.attempts + 1, job.content)
        job.outcome = DONE
        self.report.failed += 1
        self._note(job, reason)

    def fail_message(self, message: Message, reason: str) -> None:
        self.report.read += 1
        self.report.failed += 1
        self.report.failed_jobs.append({"jobId": message.id, "message": message.body, "error": reason})
        self._database.fail_message(message.body, reason, message.read_count)
        self.settle(message)

    def release_open(self) -> None:
        """Releases all jobs and messages without an outcome, when a pass ends early."""
        for jobs in self._messages.values():
            for job in jobs:
                job.outcome = job.outcome or RELEASED
        if self._unread:
            self._database.release(list(self._unread))
            self._unread.clear()

    def open_message_ids(self) -> list[int]:
        return [*self._unread, *self._messages]

    def flush(self) -> None:
        """Writes the decisions: a message whose jobs all have an outcome leaves the queue or goes back to it."""
        decided = [
            message_id for message_id, jobs in self._messages.items() if all(job.outcome is not None for job in jobs)
        ]
        for message_id in decided:
            jobs = self._messages.pop(message_id)
            if all(job.outcome is RELEASED for job in jobs):
                self._released.append(message_id)
                continue
            self._settled.append(message_id)
            for job in jobs:
                outcome = job.outcome
                if outcome is RELEASED:
                    self._again[job.pipeline.id, job.attempts, 0.0][job.key] = None
                elif outcome is not None and outcome.again_in_seconds is not None:
                    self._again[job.pipeline.id, outcome.attempts, outcome.again_in_seconds][job.key] = None
        for (pipeline_id, attempts, delay_seconds), keys in list(self._again.items()):
            self._database.requeue(pipeline_id, list(keys), attempts, delay_seconds=delay_seconds)
            del self._again[pipeline_id, attempts, delay_seconds]
        if self._released:
            self._database.release(self._released)
            self._released = []
        if self._settled:
            self._database.settle(self._settled)
            self._settled = []

    def _note(self, job: Job, error: str) -> None:
        pipeline: Pipeline = job.pipeline
        key = json.loads(job.key)
        self.report.failed_jobs.append(
            {
                "jobId": job.message_ids[0],
                "id": key[0] if len(key) == 1 else key,
                "schema": pipeline.schema_name,
                "table": pipeline.table_name,
                "contentFunction": pipeline.content_function,
                "embeddingColumn": pipeline.embedding_column,
                "error": error,
            }
        )
''',
"autoembed.keys": r'''"""Finds a provider's key by its reference. A key is never stored, logged or part of an error."""

from __future__ import annotations

import os

from autoembed.errors import ProviderTrouble
from autoembed.model import Model


def resolve(model: Model) -> str | None:
    """The key that a model refers to; None if it needs none. Raises ProviderTrouble (permanent) without a usable key.

    env:NAME and file:PATH are read now. The secret behind vault:NAME has come with the model, because threads must not
    use the database.
    """
    if model.api_key is None:
        return None
    kind, _, name = model.api_key.partition(":")
    if kind == "env":
        key = os.environ.get(name, "")
        missing = f"the environment variable {name} is not set for the database server"
    elif kind == "vault":
        key, missing = model.vault_key or "", model.vault_fault or f'the vault has no secret "{name}"'
    else:
        key, missing = _read(name)
    key = key.strip()
    if not key:
        raise ProviderTrouble(f"there is no API key: {missing}", permanent=True)
    # An HTTP client would also refuse it, but quote the key.
    if not (key.isascii() and key.isprintable()):
        raise ProviderTrouble(
            f"the value at {model.api_key} is not an API key: it is not one line of ASCII", permanent=True
        )
    return key


def _read(path: str) -> tuple[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(), f"the file {path} is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        return "", f"the file {path} cannot be read ({reason})"
''',
"autoembed.limits": r'''"""The speed at which a model may be asked: by its definition, and by what its provider's answers tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from autoembed.errors import Trouble
from autoembed.model import Embedded

if TYPE_CHECKING:
    from autoembed.model import Model

# Requests stay 3 % below the limit, because clocks and network delays differ.
HEADROOM = 1.03
# Sending is checked every SLICE_SECONDS. Allowance that is unused for up to this long, in seconds, carries over, so
# that being late does not lower the rate.
SAVED_SECONDS = 0.1
# The first request to an unknown model goes alone for at most this long, in seconds.
FIRST_ANSWER_SECONDS = 1.0
# A pass, or embed(), waits this long for its turn, in seconds.
PATIENCE_SECONDS = 10.0
# A limit that takes longer than this to be whole again, in seconds, is not one of a minute.
MINUTE_SECONDS = 61


class Allowance(NamedTuple):
    """Requests or tokens: so many a minute, and so many more at once. None: not known."""

    per_minute: int | None = None
    at_once: int | None = None


class Limits(NamedTuple):
    """The limits of a provider, as far as they are known."""

    requests: Allowance = Allowance()
    tokens: Allowance = Allowance()


class Charge(NamedTuple):
    """The part of an allowance that a request uses, and how much of it may have been saved up. Both in seconds."""

    seconds: float
    saved_seconds: float


class Permit(NamedTuple):
    """The permission to send a request.

    at: the moment, by time.monotonic(); None: no slot is free. slot: where the number of requests in flight is limited.
    spent: why nothing may be sent for rest_seconds.
    """

    at: float | None = None
    slot: int | None = None
    spent: str | None = None
    rest_seconds: float = 0.0


NOTHING_KNOWN = Limits()
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0.001}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[dhms]|$)")


def limits_in(headers: Mapping[str, str]) -> Limits:
    """The limits in the x-ratelimit headers of an answer, which OpenAI and others send. at_once: what is left.

    Limits of an hour or a day are left out: the provider's 429s say when they end.
    """
    return Limits(*(_allowance_in(headers, unit) for unit in ("requests", "tokens")))


def _allowance_in(headers: Mapping[str, str], unit: str) -> Allowance:
    limit, left = (_count(headers.get(f"x-ratelimit-{what}-{unit}", "")) for what in ("limit", "remaining"))
    if not limit or _seconds(headers.get(f"x-ratelimit-reset-{unit}", "")) > MINUTE_SECONDS:
        return Allowance()
    return Allowance(limit, left)


def _count(value: str) -> int | None:
    return int(value) if re.fullmatch(r"\d{1,9}", value, re.ASCII) else None


def _seconds(value: str) -> float:
    """A duration in OpenAI's notation: 12ms, 1.5s, 6m0s; without a unit, seconds."""
    return sum(float(number) * _SECONDS[unit or "s"] for number, unit in _DURATION.findall(value))


def learn(known: Limits | None, told: Limits) -> Limits:
    """The limits known after an answer. The most that was ever left is how much may be sent at once."""
    before = known or NOTHING_KNOWN
    return Limits(_learn(before.requests, told.requests), _learn(before.tokens, told.tokens))


def _learn(known: Allowance, told: Allowance) -> Allowance:
    if told.per_minute is None:
        return known
    # A small difference is not worth a write.
    if told.per_minute != known.per_minute or (told.at_once or 0) > 1.1 * (known.at_once or 0):
        return told
    return known


def stricter(per_minute: int | None, known: Allowance) -> Allowance:
    """The lower of a model's own limit and its provider's."""
    if per_minute is not None and (known.per_minute is None or per_minute < known.per_minute):
        return Allowance(per_minute)
    return known


def charge_for(amount: float, allowance: Allowance, left: int | None = None, age_seconds: float = 0.0) -> Charge | None:
    """The charge for a request of that amount; None if there is no limit.

    left: the allowance that an answer of that age said was left.
    """
    if allowance.per_minute is None:
        return None
    each = HEADROOM * 60 / allowance.per_minute
    saved = max(max(allowance.at_once or 0, amount) * each, SAVED_SECONDS)
    if left is not None:
        saved = min(saved, left * each + age_seconds)
    return Charge(amount * each, saved)


class Limiter:
    """The limits of one model, as a pass or a call of embed() keeps to them."""

    def __init__(self, model: Model) -> None:
        row = model.learnt
        self._model = model
        self.learnt = (
            None
            if row is None
            else Limits(
                Allowance(row.get("requests_per_minute"), row.get("requests_at_once")),
                Allowance(row.get("tokens_per_minute"), row.get("tokens_at_once")),
            )
        )
        self._told = NOTHING_KNOWN
        self._told_at = 0.0
        # Tokens that were charged by estimate and not used.
        self._overpaid = 0

    @property
    def paces(self) -> bool:
        """Whether requests or tokens a minute are limited."""
        return any(allowance.per_minute is not None for allowance in self._allowances())

    @property
    def needs_permits(self) -> bool:
        model = self._model
        budgets = (model.max_requests_in_flight, model.daily_token_budget, model.daily_cost_budget)
        return self.paces or any(budget is not None for budget in budgets)

    def _allowances(self) -> tuple[Allowance, Allowance]:
        known = self.learnt or NOTHING_KNOWN
        return (
            stricter(self._model.requests_per_minute, known.requests),
            stricter(self._model.tokens_per_minute, known.tokens),
        )

    def charge(self, tokens: int, now: float) -> tuple[Charge | None, Charge | None]:
        """Charges a request of so many tokens, by estimate: in requests, and in tokens less those overpaid before."""
        requests, token_allowance = self._allowances()
        refund = min(self._overpaid, tokens)
        self._overpaid -= refund
        age = now - self._told_at
        return (
            charge_for(1, requests, self._told.requests.at_once, age),
            charge_for(tokens - refund, token_allowance, self._told.tokens.at_once, age),
        )

    def learn_from(self, outcome: Embedded | BaseException, now: float) -> bool:
        """Takes the limits from the headers of an answer. Returns whether they differ from those known before."""
        told = limits_in(outcome.headers) if isinstance(outcome, Embedded | Trouble) else NOTHING_KNOWN
        if told == NOTHING_KNOWN and not isinstance(outcome, Embedded):
            return False
        before, self.learnt = self.learnt, learn(self.learnt, told)
        self._told, self._told_at = told, now
        return self.learnt != before

    def correct_estimate(self, estimated: int, tokens: int | None) -> None:
        """Notes the tokens that a request had by its answer: those charged in excess are credited to the next."""
        if tokens is not None:
            self._overpaid += max(0, estimated - tokens)
''',
"autoembed.model": r'''"""A model as the table autoembed.model defines it, a request to it, and its answer."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

# The role of a text. Many models embed a question and the document that answers it in two ways.
Purpose = Literal["document", "query"]
# The options that prefixed() obeys.
PREFIXES = frozenset({"document_prefix", "query_prefix"})


@dataclass(frozen=True)
class Model:
    """One row of autoembed.model, and what it refers to. A limit that is None is left to the provider.

    identity: a JSON array that SQL makes. Two models with the same identity produce interchangeable vectors.
    learnt: the limits in the provider's answers, a row of autoembed.model_limit; None: it never answered.
    http_hosts: the hosts that may be called without encryption.
    vault_key: the secret that vault:NAME refers to; vault_fault: why it cannot be had.
    """

    name: str
    provider: str
    model_id: str
    dimensions: int
    identity: str = field(default="", compare=False)
    base_url: str | None = None
    api_key: str | None = None
    max_inputs_per_request: int | None = None
    max_tokens_per_request: int | None = None
    max_tokens_per_input: int | None = None
    requests_per_minute: int | None = field(default=None, compare=False)
    tokens_per_minute: int | None = field(default=None, compare=False)
    max_requests_in_flight: int | None = field(default=None, compare=False)
    daily_token_budget: int | None = field(default=None, compare=False)
    daily_cost_budget: float | None = field(default=None, compare=False)
    learnt: Mapping[str, int | None] | None = field(default_factory=dict, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    http_hosts: Sequence[str] = field(default=(), hash=False)
    vault_key: str | None = field(default=None, repr=False, compare=False)
    vault_fault: str | None = field(default=None, compare=False)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Model:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})

    def prefix(self, purpose: Purpose) -> str:
        """The text that goes before each text; see prefixed()."""
        return str(self.options.get(f"{purpose}_prefix", ""))

    def digest(self, content: str) -> bytes:
        """16 bytes that tell whether this model has embedded this text before."""
        return hashlib.blake2b((self._salt + content).encode("utf-8", "surrogatepass"), digest_size=16).digest()

    @cached_property
    def _salt(self) -> str:
        return "\0".join(map(str, json.loads(self.identity)))


@dataclass(eq=False)
class Request:
    """Texts of one model that travel together, and how long the answer may take.

    probe: the text is a harmless one, to see whether the model accepts any. tokens: the estimate that a permit was
    taken for. slot: the request's own, where the number of requests in flight is limited. sent: set when only the
    answer is outstanding.
    """

    model: Model
    texts: Sequence[str]
    timeout_seconds: float
    purpose: Purpose = "document"
    probe: bool = False
    tokens: int = 0
    slot: int | None = None
    sent: threading.Event = field(default_factory=threading.Event, repr=False)


def prefixed(request: Request) -> list[str]:
    """The texts, each behind the prefix that tells the model whether it is a document or a query.

    The cards of E5, BGE, nomic and others name these prefixes, for example "query: " and "passage: ". The options
    document_prefix and query_prefix hold them, spaces included.
    """
    prefix = request.model.prefix(request.purpose)
    return [prefix + text for text in request.texts]


class Share(NamedTuple):
    """The part of a request that belongs to one pipeline (None: to embed()): texts, their tokens, and their rows."""

    pipeline_id: int | None
    requests: int
    inputs: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class Embedded:
    """The answer to a request.

    vectors: (n, dimensions) float32, finite, in the order of the texts. tokens: as the provider counted them.
    headers: those of the HTTP answer, in lower case.
    """

    vectors: np.ndarray
    tokens: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)
''',
"autoembed.network": r'''"""The one door to the network: posts a body, returns the answer, and can be aborted."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from autoembed import endpoints
from autoembed.errors import ProviderTrouble

if TYPE_CHECKING:
    import requests

# A connection is given this long to be made, in seconds.
CONNECT_TIMEOUT_SECONDS = 10.0
# Environment variables that name certificate authorities: those of requests, and that of OpenSSL.
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray


class Network:
    """Connections, kept from one request to the next. Threads may share them. abort() ends their requests at once."""

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._session: requests.Session | None = None
        self._sockets: dict[int, socket.socket] = {}
        self._thread = threading.local()
        self._lock = threading.Lock()

    def post(
        self,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        timeout_seconds: float,
        max_answer_bytes: int,
        ca_file: str | None = None,
        sent: Callable[[], None] = lambda: None,
    ) -> Answer:
        """The answer to a POST, whatever its status. Raises ProviderTrouble if it is late or too large.

        Redirects are not followed. Certificates are verified. Link-local addresses and metadata services are never
        called.
        ca_file: the certificate authorities to trust, in place of those of the environment and the system.
        sent: is called when only the answer is outstanding.
        """
        # The import takes 0.2 to 0.3 s in a new backend, so it waits until there is something to send.
        import requests
        import urllib3

        deadline = time.monotonic() + timeout_seconds
        timeouts = (min(CONNECT_TIMEOUT_SECONDS, timeout_seconds), timeout_seconds)
        self._thread.sent = sent
        try:
            with self._connected().post(
                url,
                data=body,
                headers=dict(headers),
                timeout=timeouts,
                verify=ca_file or next(filter(None, map(os.environ.get, CA_VARIABLES)), True),
                allow_redirects=False,
                stream=True,
                # Any value here keeps a .netrc of the server's user from replacing the key.
                auth=lambda request: request,
            ) as response:
                received = bytearray()
                # read1() returns the bytes that are there. iter_content() waits for a full chunk, past the deadline.
                while chunk := response.raw.read1(1 << 16, decode_content=True):
                    received += chunk
                    if len(received) > max_answer_bytes:
                        raise ProviderTrouble(f"the provider's answer is larger than {max_answer_bytes >> 20} MiB")
                    if time.monotonic() > deadline:
                        raise ProviderTrouble(f"the provider's answer was not complete after {timeout_seconds:g} s")
                lower = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status_code, lower, received)
        except requests.exceptions.SSLError as error:
            raise ProviderTrouble(f"no trusted connection to {_host(url)}: {_cause(error)}", permanent=True) from error
        except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
            raise ProviderTrouble(f"{_host(url)} did not answer within {timeout_seconds:g} s") from error
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema,
            requests.exceptions.MissingSchema,
            UnicodeError,
        ) as error:
            raise ProviderTrouble(f"{url} is not a URL that can be called", permanent=True) from error
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            raise ProviderTrouble(f"no answer from {_host(url)}: {_cause(error)}") from error
        except OSError as error:
            # Nothing was sent: requests checks first that the file exists.
            raise ProviderTrouble(f"the certificate authorities cannot be read: {error}", permanent=True) from error
        finally:
            self._watch(None)

    def abort(self) -> None:
        """Ends every request that is under way. Its thread sees a broken connection."""
        with self._lock:
            for connection in self._sockets.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _watch(self, connection: socket.socket | None) -> None:
        """Remembers the socket that this thread waits on. It is a copy: TLS takes the descriptor from the original."""
        with self._lock:
            before = self._sockets.pop(threading.get_ident(), None)
            if before is not None:
                before.close()
            if connection is not None:
                self._sockets[threading.get_ident()] = socket.socket(fileno=os.dup(connection.fileno()))

    def _connected(self) -> requests.Session:
        with self._lock:
            if self._session is None:
                self._session = _session(self._max_connections, self._watch, lambda: self._thread.sent())
            return self._session


def _session(
    max_connections: int, watch: Callable[[socket.socket], None], sent: Callable[[], None]
) -> requests.Session:
    """A session that passes each socket to watch() before a thread waits on it, and calls sent() after each request."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Watched:
        def request(self, *args: Any, **kwargs: Any) -> Any:
            if self.sock is not None:  # type: ignore[attr-defined]
                watch(self.sock)  # type: ignore[attr-defined]
            return super().request(*args, **kwargs)  # type: ignore[misc]

        def getresponse(self) -> Any:
            sent()
            return super().getresponse()  # type: ignore[misc]

        def _new_conn(self) -> Any:
            return _connect(self._dns_host, self.port, self.timeout, self.socket_options, watch)  # type: ignore[attr-defined]

    class WatchedHTTPConnection(Watched, HTTPConnection):
        pass

    class WatchedHTTPSConnection(Watched, HTTPSConnection):
        pass

    class WatchedHTTPPool(HTTPConnectionPool):
        ConnectionCls = WatchedHTTPConnection

    class WatchedHTTPSPool(HTTPSConnectionPool):
        ConnectionCls = WatchedHTTPSConnection

    pools = {"http": WatchedHTTPPool, "https": WatchedHTTPSPool}

    class WatchedAdapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = pools

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            manager.pool_classes_by_scheme = pools
            return manager

        def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
            # Where a proxy resolves names, nothing more can be checked. For other names see _connect().
            host = urlsplit(str(request.url)).hostname or ""
            if endpoints.is_forbidden(host):
                raise _never_called(host, "a link-local address or a cloud's metadata service")
            return super().send(request, *args, **kwargs)

    session = requests.Session()
    adapter = WatchedAdapter(pool_maxsize=max_connections)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _connect(host: str, port: int, timeout: Any, options: Any, watch: Callable[[socket.socket], None]) -> socket.socket:
    """A connected socket. watch() is given it before it connects, so that connecting can be aborted too.

    The name is resolved once: the address that is checked is the address that is connected to.
    """
    from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise NameResolutionError(host, None, error) from error  # type: ignore[arg-type]
    failure: OSError = OSError("no address")
    allowed = [found for found in addresses if endpoints.may_connect(host, str(found[4][0]))]
    if addresses and not allowed:
        raise _never_called(host, str(addresses[0][4][0]))
    for family, kind, protocol, _, address in allowed:
        connection = socket.socket(family, kind, protocol)
        watch(connection)
        try:
            for option in options or ():
                connection.setsockopt(*option)
            connection.settimeout(timeout)
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(None, f"connection to {host} timed out") from failure
    raise NewConnectionError(None, str(failure)) from failure  # type: ignore[arg-type]


def _never_called(host: str, where: str) -> ProviderTrouble:
    return ProviderTrouble(f"{host} is at {where}, which is never called", permanent=True)


def _host(url: str) -> str:
    return url.split("://", 1)[-1].split("/", 1)[0].rsplit("@", 1)[-1]


def _cause(error: BaseException) -> str:
    """The innermost reason on one line: requests wraps it three times."""
    cause: BaseException = error
    while True:
        inner = getattr(cause, "reason", None) or cause.__cause__ or cause.__context__
        if not isinstance(inner, BaseException) or inner is cause:
            break
        cause = inner
    return " ".join(str(cause).split())[:200] or type(cause).__name__
''',
"autoembed.onnx_model": r'''"""A sentence-embedding model in a folder (model.onnx, tokenizer.json), run inside this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from autoembed import heap

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# Padded tokens in one batch. 256 to 512 were fastest on 2 cores; more costs memory and delays a cancel.
BATCH_TOKENS = 512
# Texts that the tokenizer gets at once. It cannot be interrupted.
TOKENIZE_TEXTS = 64
# Characters of a text that are tokenized at first, for each token wanted. A megabyte costs 0.4 s and 120 MB.
CHARACTERS_PER_TOKEN = 16
# WordPiece makes up to one token per character of a word, but a single token of a longer word than this.
LONGEST_WORD_CHARACTERS = 100


class Stopped(Exception):
    """The embedding was stopped."""


class OnnxModel:
    """Texts in, unit vectors out: the mean of the token vectors that the model gives.

    onnxruntime starts threads here, and a thread inherits the signal mask of the one that starts it. In a
    database backend, create the model in a thread that has blocked all signals: the server's handlers must
    run in the backend's own thread.
    """

    def __init__(self, folder: str, *, max_tokens: int = 256, threads: int | None = None) -> None:
        self._tokenizer = _open(_load_tokenizer, os.path.join(folder, "tokenizer.json"))
        self._session = _open(
            lambda path: _load_session(path, threads or len(os.sched_getaffinity(0))),
            os.path.join(folder, "model.onnx"),
        )
        self._inputs = [model_input.name for model_input in self._session.get_inputs()]
        output = self._session.get_outputs()[0]
        if len(output.shape) != 3 or not isinstance(output.shape[2], int):
            raise ValueError(
                f"The model in {folder} gives {output.name} of shape {output.shape}, "
                "where a vector for each token is needed: (texts, tokens, dimensions)."
            )
        self._output: str = output.name
        self.dimensions: int = output.shape[2]
        self._max_tokens = max_tokens
        self._run: Any = None
        # Loading leaves 60 MB of freed memory.
        heap.trim()

    def embed(self, texts: Sequence[str], between_batches: Callable[[], None] = lambda: None) -> Array:
        """Return one float32 vector of unit length for each text, in their order.

        `between_batches` is called before each batch and may raise. To give up from another thread, first see
        to it that `between_batches` raises, then call `stop`.
        """
        import numpy as np
        import onnxruntime

        vectors = np.empty((len(texts), self.dimensions), np.float32)
        # If memory were mapped again for each batch, a batch would take half as long again.
        heap.keep(block_bytes=32 << 20, free_bytes=64 << 20)
        try:
            tokens = self._tokenize(texts, between_batches)
            for batch in batches([len(ids) for ids in tokens], BATCH_TOKENS):
                self._run = onnxruntime.RunOptions()
                between_batches()
                vectors[batch] = self._embed_batch([tokens[i] for i in batch])
        finally:
            heap.trim()
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, untruncated."""
        encode = self._tokenizer.encode_batch_fast
        return [len(encoding) for part in _parts(texts) for encoding in encode(part)]

    def stop(self) -> None:
        """End the batch that another thread runs now: its `embed` raises `Stopped`."""
        if self._run is not None:
            self._run.terminate = True

    def _tokenize(self, texts: Sequence[str], between_batches: Callable[[], None]) -> list[Array]:
        import numpy as np

        encode = self._tokenizer.encode_batch_fast
        limit = self._max_tokens - self._tokenizer.num_special_tokens_to_add(False)
        characters = CHARACTERS_PER_TOKEN * self._max_tokens
        tokens = []
        for part in _parts(texts):
            between_batches()
            encodings = encode([text[:characters] for text in part], add_special_tokens=False)
            for text, encoding in zip(part, encodings, strict=True):
                if len(text) > characters and len(encoding) < limit + LONGEST_WORD_CHARACTERS:
                    # The cut may have changed the tokens within the limit.
                    (encoding,) = encode([text], add_special_tokens=False)
                encoding.truncate(limit)
                tokens.append(np.array(self._tokenizer.post_process(encoding).ids, np.int32))
        return tokens

    def _embed_batch(self, tokens: list[Array]) -> Array:
        import numpy as np

        ids = np.zeros((len(tokens), max(map(len, tokens))), np.int64)
        mask = np.zeros_like(ids)
        for row, row_tokens in enumerate(tokens):
            ids[row, : len(row_tokens)] = row_tokens
            mask[row, : len(row_tokens)] = 1
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        inputs = {name: values[name] for name in self._inputs}
        try:
            (hidden,) = self._session.run([self._output], inputs, self._run)
        except Exception:
            if self._run.terminate:
                raise Stopped(Stopped.__doc__) from None
            raise
        # The sum has the direction of the mean, and at unit length only the direction remains.
        vectors: Array = np.einsum("bt,btd->bd", mask.astype(np.float32), hidden)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return the positions of texts of these lengths: near lengths together, `batch_tokens` when padded."""
    result: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if result and (len(result[-1]) + 1) * lengths[i] <= batch_tokens:
            result[-1].append(i)
        else:
            result.append([i])
    return result


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + TOKENIZE_TEXTS] for start in range(0, len(texts), TOKENIZE_TEXTS))


def _open(load: Callable[[str], Any], path: str) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The model's file {path} is missing.")
    try:
        return load(path)
    except Exception as error:
        raise ValueError(f"The model's file {path} cannot be loaded: {error}") from error


def _load_tokenizer(path: str) -> Any:
    # The tokenizer's own threads would start in the first thread that tokenizes, which may not block signals.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _load_session(path: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Both would keep the memory of the largest batch.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Threads that spin while they wait take the cores from other backends.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
''',
"autoembed.providers": r'''"""The ways to speak to a model: texts in, vectors out. Each provider is one module, and only it knows its API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from autoembed.errors import Fault
from autoembed.model import Embedded, Model, Request
from autoembed.providers import azure, cohere, fake, function, gemini, local, ollama, openai, voyage

if TYPE_CHECKING:
    from autoembed.limits import Limits
    from autoembed.network import Network

# Calls the SQL function of a model: its name, the purpose and the texts in, vectors in PostgreSQL's binary form out.
CallEmbedder = Callable[[str, str, Sequence[str]], list[bytes | None]]


class Provider(Protocol):
    """The contents of a provider's module."""

    MAX_INPUTS_PER_REQUEST: int
    MAX_TOKENS_PER_REQUEST: int
    # None: the model truncates by its own tokenizer, so nothing is cut before.
    MAX_TOKENS_PER_INPUT: int | None
    # True: embed() goes through the database, which only the backend's own thread may use.
    RUNS_IN_BACKEND: bool

    def check(self, model: Model) -> None:
        """Raises Fault if the model cannot work as defined, ProviderTrouble if something is not there yet."""

    def embed(self, request: Request, reach: Any, /) -> Embedded:
        """The vectors of the texts. Raises Trouble.

        reach: the network; a provider that runs in the backend is given a CallEmbedder instead.
        """

    def abort(self) -> None:
        """Ends what embed() is doing without the network."""


PROVIDERS: dict[str, Provider] = {
    "openai": openai,
    "azure": azure,
    "cohere": cohere,
    "gemini": gemini,
    "ollama": ollama,
    "voyage": voyage,
    "local": local,
    "function": function,
    "fake": fake,
}


def provider_of(model: Model) -> Provider:
    try:
        return PROVIDERS[model.provider]
    except KeyError:
        raise Fault(
            f'model "{model.name}" names the provider "{model.provider}", which is not known',
            hint=f"The providers are: {', '.join(sorted(PROVIDERS))}.",
        ) from None


class Sizes(NamedTuple):
    """The most that one request to a model may hold. tokens_per_input None: the provider shortens texts itself."""

    inputs_per_request: int
    tokens_per_request: int
    tokens_per_input: int | None


def sizes_of(model: Model, learnt: Limits | None = None) -> Sizes:
    """The model's own limits, or else its provider's. A request has no more tokens than a minute allows.

    learnt: the limits that the provider's answers told.
    """
    provider = provider_of(model)
    per_request = model.max_tokens_per_request or provider.MAX_TOKENS_PER_REQUEST
    per_minute = (model.tokens_per_minute, learnt.tokens.per_minute if learnt else None)
    return Sizes(
        model.max_inputs_per_request or provider.MAX_INPUTS_PER_REQUEST,
        min([per_request, *(limit for limit in per_minute if limit is not None)]),
        model.max_tokens_per_input or provider.MAX_TOKENS_PER_INPUT,
    )


def check(model: Model) -> None:
    """Raises Fault if the model cannot work as defined, ProviderTrouble if something is not there yet."""
    if not model.model_id.strip():
        raise Fault(
            f'model "{model.name}" has a blank model_id', hint="Give the name by which the provider knows the model."
        )
    provider_of(model).check(model)


def embed(request: Request, network: Network, call_embedder: CallEmbedder) -> Embedded:
    """The vectors of a request's texts, from the provider of its model. Raises Trouble."""
    provider = provider_of(request.model)
    try:
        return provider.embed(request, call_embedder if provider.RUNS_IN_BACKEND else network)
    finally:
        request.sent.set()
''',
"autoembed.providers.azure": r'''"""OpenAI's models as Azure serves them: by resource and deployment.

Written from the API reference, https://learn.microsoft.com/azure/ai-services/openai/reference#embeddings, and
https://learn.microsoft.com/azure/ai-services/openai/how-to/embeddings, which sets the limits. Body and answer are those
of OpenAI. The provider openai speaks Azure's v1 API, which has no deployments and versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from autoembed import keys
from autoembed.model import Embedded, Model, Request
from autoembed.providers import http, openai

if TYPE_CHECKING:
    from autoembed.network import Network

API_VERSION = "2024-10-21"
MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
MAX_TOKENS_PER_INPUT: int | None = 8192
RUNS_IN_BACKEND = False


def check(model: Model) -> None:
    http.check(
        model,
        default_url=None,
        example="https://NAME.openai.azure.com, the endpoint of the resource",
        options=frozenset({"deployment", "api_version"}),
    )


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    headers = {} if key is None else {"api-key": key}
    return openai.embed_at(url_of(request.model), request, network, headers, key)


abort = http.abort


def url_of(model: Model) -> str:
    deployment = quote(model.options.get("deployment", model.model_id), safe="")
    version = quote(model.options.get("api_version", API_VERSION), safe="")
    return http.url(model, "", f"/openai/deployments/{deployment}/embeddings?api-version={version}")
''',
"autoembed.providers.cohere": r'''"""Cohere's embed endpoint, version 2.

Written from the API reference, https://docs.cohere.com/reference/embed: 96 texts a request. Tokens of a text:
https://docs.cohere.com/docs/cohere-embed. Statuses: https://docs.cohere.com/reference/errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import ProviderTrouble, Refused, Trouble, trouble_of_answer
from autoembed.model import Embedded, Model, Request
from autoembed.providers import http
from autoembed.providers.definition import check_tokens_per_input
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "https://api.cohere.com"
MAX_INPUTS_PER_REQUEST = 96
# The reference sets no limit for a request. One text of embed-v4.0 may have this many.
MAX_TOKENS_PER_REQUEST = 128_000
MAX_TOKENS_PER_INPUT: int | None = 128_000
RUNS_IN_BACKEND = False

# Models before embed-v4.0 take shorter texts and refuse output_dimension.
OLD_MODELS = "-v3.0"
OLD_MAX_TOKENS_PER_INPUT = 512
INPUT_TYPES = {"document": "search_document", "query": "search_query"}


def check(model: Model) -> None:
    http.check(model, default_url=BASE_URL, example=f"{BASE_URL}, what comes before /v2/embed")
    if model.model_id.endswith(OLD_MODELS):
        check_tokens_per_input(model, OLD_MAX_TOKENS_PER_INPUT)


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    url = http.url(request.model, BASE_URL, "/v2/embed")
    return http.post(request, network, url, http.bearer(key), request_body(request), key, embedded_in, trouble_of)


abort = http.abort


def request_body(request: Request) -> dict[str, Any]:
    body = {
        "model": request.model.model_id,
        "texts": list(request.texts),
        "input_type": INPUT_TYPES[request.purpose],
        # The reference does not describe the bytes of its base64 form.
        "embedding_types": ["float"],
        # Texts that are too long were cut before, or must not be cut.
        "truncate": "NONE",
    }
    if request.model.model_id.endswith(OLD_MODELS):
        return body
    return {**body, "output_dimension": request.model.dimensions}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int) -> Embedded:
    """The vectors of an answer, which are in the order of the texts, and the tokens that are billed."""
    with http.reading("Cohere"):
        answer = http.parse(body)
        vectors = matrix(answer["embeddings"]["float"], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "meta", "billed_units", "input_tokens"))


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None) -> Trouble:
    """The usual trouble, except: 498 blocks a text, 499 ends a request, and the month of a trial key may be used up."""
    trouble = trouble_of_answer(status, headers, body, secret)
    if status == 498:
        return Refused(str(trouble))
    if status == 499:
        return ProviderTrouble(str(trouble))
    if status == 429 and b"/ month" in body:
        return ProviderTrouble(str(trouble), permanent=True)
    return trouble
''',
"autoembed.providers.definition": r'''"""Checks of a model's definition that several providers share. Each raises Fault."""

from __future__ import annotations

from autoembed.errors import Fault
from autoembed.model import Model


def check_without(model: Model, *names: str) -> None:
    """Checks that a model inside the server has none of these, which only a provider elsewhere needs."""
    for name in names:
        if getattr(model, name) is not None:
            raise Fault(f'model "{model.name}" runs inside the server and takes no {name}', hint=f"Leave {name} out.")


def check_options(model: Model, texts: frozenset[str], objects: frozenset[str] = frozenset()) -> None:
    """Checks that the provider knows each option, and that it is a text or an object, whichever it must be."""
    check_option_names(model, texts | objects)
    for kind, type_, names in (("a text", str, texts), ("an object", dict, objects)):
        for name in sorted(names & model.options.keys()):
            if not isinstance(model.options[name], type_):
                raise Fault(f'option {name} of model "{model.name}" is not {kind}', hint=f"Give {name} as {kind}.")


def check_option_names(model: Model, known: frozenset[str]) -> None:
    """Checks that the provider knows each option."""
    unknown = sorted(model.options.keys() - known)
    if unknown:
        raise Fault(
            f'model "{model.name}" has the option {unknown[0]}, which the provider {model.provider} does not know',
            hint=f"Its options are: {', '.join(sorted(known)) or 'none'}.",
        )


def check_tokens_per_input(model: Model, most: int) -> None:
    """Checks that the limit of a model which takes shorter texts than others of its provider says so."""
    if model.max_tokens_per_input is None or model.max_tokens_per_input > most:
        raise Fault(
            f'model "{model.name}" is {model.model_id}, which takes at most {most} tokens of a text',
            hint=f"Set max_tokens_per_input => {most}.",
        )
''',
"autoembed.providers.fake": r'''"""No model: vectors that follow from the texts, and faults on demand, for tests of applications."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoembed.batching import estimate_tokens
from autoembed.errors import Fault, ProviderTrouble, trouble_of_answer
from autoembed.model import Embedded, Model, Request
from autoembed.providers.definition import check_option_names, check_without

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
# Nothing is cut, so that a search for a text finds its row, however long it is.
MAX_TOKENS_PER_INPUT: int | None = None
RUNS_IN_BACKEND = False

OPTIONS = frozenset({"delay_seconds", "faults"})
FAULT = frozenset({"match", "status", "message", "retry_after_seconds"})

_stopping = threading.Event()


def check(model: Model) -> None:
    check_without(model, "api_key", "base_url")
    check_option_names(model, OPTIONS)
    _check_seconds(model, "delay_seconds", model.options.get("delay_seconds", 0))
    faults = model.options.get("faults", [])
    if not isinstance(faults, list) or not all(isinstance(fault, dict) for fault in faults):
        raise _wrong(model, "faults", "must be a list of objects")
    for fault in faults:
        if fault.keys() - FAULT:
            raise _wrong(model, "faults", f"has {min(fault.keys() - FAULT)}, which no fault has")
        status = fault.get("status")
        if not isinstance(status, int) or not 300 <= status <= 599:
            raise _wrong(model, "faults", "has a fault without a status from 300 to 599")
        for name in ("match", "message"):
            if not isinstance(fault.get(name, ""), str):
                raise _wrong(model, "faults", f"has a {name} that is not a text")
        _check_seconds(model, "faults", fault.get("retry_after_seconds", 0))


def _check_seconds(model: Model, option: str, seconds: object) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0:
        raise _wrong(model, option, "must be a number of seconds")


def _wrong(model: Model, option: str, problem: str) -> Fault:
    return Fault(
        f'option {option} of model "{model.name}" {problem}',
        hint='For example options => \'{"delay_seconds": 0.2, "faults": [{"match": "poison", "status": 400}]}\'.',
    )


def embed(request: Request, network: Network) -> Embedded:
    options = request.model.options
    delay = options.get("delay_seconds", 0)
    _stopping.clear()
    if _stopping.wait(min(delay, request.timeout_seconds)):
        raise ProviderTrouble("the request was stopped")
    if delay > request.timeout_seconds:
        raise ProviderTrouble(f"the fake provider did not answer within {request.timeout_seconds:g} s")
    for fault in options.get("faults", []):
        if any(fault.get("match", "") in text for text in request.texts):
            raise trouble_of_answer(fault["status"], _headers(fault), fault.get("message", "").encode())
    import numpy as np

    vectors = np.stack([vector_of(text, request.model.dimensions) for text in request.texts])
    return Embedded(vectors, sum(map(estimate_tokens, request.texts)))


def abort() -> None:
    _stopping.set()


def vector_of(text: str, dimensions: int) -> np.ndarray:
    """The vector of a text, of length 1. It is the same in every version and on every machine."""
    import numpy as np

    digest = hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(4 * dimensions)
    # Halves are added so that no vector is zero.
    numbers = np.frombuffer(digest, ">i4") + 0.5
    vector: np.ndarray = (numbers / np.linalg.norm(numbers)).astype(np.float32)
    return vector


def _headers(fault: Mapping[str, Any]) -> dict[str, str]:
    return {"retry-after": str(fault["retry_after_seconds"])} if "retry_after_seconds" in fault else {}
''',
"autoembed.providers.function": r'''"""A user's SQL function: texts in, vectors out. SQL makes it run with the rights of its owner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoembed.errors import Refused
from autoembed.model import Embedded, Model, Request
from autoembed.providers.definition import check_options, check_without
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    from autoembed.providers import CallEmbedder

# Requests are small, because nothing else happens in the session until the function returns.
MAX_INPUTS_PER_REQUEST = 100
MAX_TOKENS_PER_REQUEST = 100_000
MAX_TOKENS_PER_INPUT: int | None = None
RUNS_IN_BACKEND = True

# vector_send() puts two int16 before the numbers, which are big-endian. In bytes.
HEADER_BYTES = 4


def check(model: Model) -> None:
    check_without(model, "api_key", "base_url")
    check_options(model, frozenset({"query_function"}))


def embed(request: Request, call_embedder: CallEmbedder) -> Embedded:
    import numpy as np

    answer = call_embedder(request.model.name, request.purpose, request.texts)
    if len(answer) != len(request.texts):
        raise Refused(f"the function returned {len(answer)} vectors for {len(request.texts)} texts")
    sent = [vector for vector in answer if vector is not None]
    if len(sent) < len(answer):
        raise Refused("the function returned NULL in place of a vector")
    vectors = [np.frombuffer(vector, ">f4", offset=HEADER_BYTES) for vector in sent]
    return Embedded(matrix(vectors, len(vectors), request.model.dimensions))


def abort() -> None:
    """Does nothing: the function runs in the backend's own thread, where a cancel ends it."""
''',
"autoembed.providers.gemini": r'''"""Google's Gemini API.

Written from the API reference, https://ai.google.dev/api/embeddings#method:-models.batchembedcontents. Dimensions, task
types and tokens of a text: https://ai.google.dev/gemini-api/docs/embeddings. Errors:
https://ai.google.dev/gemini-api/docs/troubleshooting. The 100 texts a request are what the API says when it has more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from autoembed import keys
from autoembed.errors import ProviderTrouble, Refused, Trouble, trouble_of_answer
from autoembed.model import PREFIXES, Embedded, Model, Request, prefixed
from autoembed.providers import http
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

BASE_URL = "https://generativelanguage.googleapis.com/v1beta"
MAX_INPUTS_PER_REQUEST = 100
# The reference sets no limit. A request should be a small part of the tokens that a key has per minute.
MAX_TOKENS_PER_REQUEST = 20_000
MAX_TOKENS_PER_INPUT: int | None = 2048
RUNS_IN_BACKEND = False

TASK_TYPES = {"document": "RETRIEVAL_DOCUMENT", "query": "RETRIEVAL_QUERY"}
# These models read the task in the text, where document_prefix and query_prefix put it.
WITHOUT_TASK_TYPE = "gemini-embedding-2"
RETRY_DELAY = re.compile(rb'"retryDelay"\s*:\s*"([0-9]+(?:\.[0-9]+)?)s"')


def check(model: Model) -> None:
    http.check(
        model,
        default_url=BASE_URL,
        example=f"{BASE_URL}, what comes before /models",
        options=PREFIXES,
    )


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    headers = {} if key is None else {"x-goog-api-key": key}
    url = http.url(request.model, BASE_URL, f"/{quote(name_of(request.model))}:batchEmbedContents")
    return http.post(request, network, url, headers, request_body(request), key, embedded_in, trouble_of)


abort = http.abort


def name_of(model: Model) -> str:
    return "models/" + model.model_id.removeprefix("models/")


def request_body(request: Request) -> dict[str, Any]:
    name = name_of(request.model)
    each: dict[str, Any] = {"model": name, "outputDimensionality": request.model.dimensions}
    if WITHOUT_TASK_TYPE not in name:
        each["taskType"] = TASK_TYPES[request.purpose]
    return {"requests": [{**each, "content": {"parts": [{"text": text}]}} for text in prefixed(request)]}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int) -> Embedded:
    """The vectors of an answer, which are in the order of the texts, at unit length; and the tokens it reports."""
    with http.reading("Gemini"):
        answer = http.parse(body)
        vectors = matrix([embedding["values"] for embedding in answer["embeddings"]], count, dimensions)
        return Embedded(unit_length(vectors), http.tokens_in(answer, "usageMetadata", "promptTokenCount"))


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Brings vectors to length 1. gemini-embedding-001 cuts them short, and inner products are then no cosines."""
    import numpy as np

    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None) -> Trouble:
    """The usual trouble, except: a bad key or missing billing has status 400, and the wait is in the body."""
    trouble = trouble_of_answer(status, headers, body, secret)
    if isinstance(trouble, Refused) and (b"API_KEY_INVALID" in body or b"FAILED_PRECONDITION" in body):
        return ProviderTrouble(str(trouble), permanent=True)
    delay = RETRY_DELAY.search(body)
    if status == 429 and "retry-after" not in headers and delay:
        return ProviderTrouble(str(trouble), retry_after_seconds=float(delay[1]))
    return trouble
''',
"autoembed.providers.http": r'''"""The parts that all providers over HTTP share: checks of an address, the round trip, the reading of an answer."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoembed import endpoints, keys
from autoembed.errors import Fault, ProviderTrouble, Trouble, trouble_of_answer
from autoembed.model import Embedded, Model, Request
from autoembed.providers.definition import check_options

if TYPE_CHECKING:
    from autoembed.network import Network

# Options whose fields go into each request, in place of the provider's own fields of the same name.
EXTRAS = frozenset({"extra_headers", "extra_body"})
# Headers that hold keys. They must not be options, which stand in a table.
SECRET_HEADERS = {"authorization", "proxy-authorization", "cookie", "api-key", "x-api-key", "x-goog-api-key"}


def check(model: Model, *, default_url: str | None, example: str, options: frozenset[str] = frozenset()) -> None:
    """Raises Fault if the model cannot work as defined, ProviderTrouble if its key or ca_file is not there yet.

    options: those that this provider takes besides extra_headers, extra_body and ca_file.
    """
    url = model.base_url or default_url
    if url is None:
        raise Fault(f'model "{model.name}" has no base_url', hint=f"For example {example}.")
    fault = endpoints.fault_of(url, model.http_hosts)
    if fault is not None:
        raise Fault(f'model "{model.name}" has an unusable base_url: {fault.problem}', hint=fault.hint)
    check_options(model, texts=options | {"ca_file"}, objects=EXTRAS)
    secret = sorted(name for name in model.options.get("extra_headers", {}) if name.lower() in SECRET_HEADERS)
    if secret:
        raise Fault(
            f'option extra_headers of model "{model.name}" has {secret[0]}, which would keep a secret in a table',
            hint="Say where the key is found with api_key => 'env:NAME', 'file:PATH' or 'vault:NAME'.",
        )
    if default_url is not None and model.base_url is None and model.api_key is None:
        raise Fault(
            f'model "{model.name}" has no api_key, and {default_url} wants one',
            hint="For example api_key => 'env:NAME'; or name the base_url of a server that needs no key.",
        )
    ca_file = model.options.get("ca_file")
    if ca_file is not None and not os.access(ca_file, os.R_OK):
        raise ProviderTrouble(f"the ca_file {ca_file} cannot be read", permanent=True)
    keys.resolve(model)


def url(model: Model, default_url: str, path: str) -> str:
    return (model.base_url or default_url).rstrip("/") + path


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def post(
    request: Request,
    network: Network,
    url: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any],
    secret: str | None,
    embedded_in: Callable[[bytes | bytearray, int, int], Embedded],
    trouble_of: Callable[[int, Mapping[str, str], bytes | bytearray, str | None], Trouble] = trouble_of_answer,
) -> Embedded:
    """The vectors that embedded_in() reads from a 200 answer; raises what trouble_of() makes of any other.

    embedded_in: is given the body, the count of texts and the dimensions. secret: is kept out of errors.
    The headers of the answer go with the vectors and with the trouble.
    """
    # The check is repeated because a host may have lost its permission since the model was defined.
    fault = endpoints.fault_of(url, request.model.http_hosts)
    if fault is not None:
        raise ProviderTrouble(fault.problem, permanent=True)
    answer = network.post(
        url,
        {
            "Content-Type": "application/json",
            "Accept": "application/json",
            **headers,
            **request.model.options.get("extra_headers", {}),
        },
        encode({**body, **request.model.options.get("extra_body", {})}),
        timeout_seconds=request.timeout_seconds,
        # A JSON number takes up to 24 bytes. The rest is room for a server that ignores the dimensions asked for.
        max_answer_bytes=(64 << 20) + 32 * len(request.texts) * request.model.dimensions,
        ca_file=request.model.options.get("ca_file"),
        sent=request.sent.set,
    )
    try:
        if answer.status != 200:
            raise trouble_of(answer.status, answer.headers, answer.body, secret)
        embedded = embedded_in(answer.body, len(request.texts), request.model.dimensions)
    except Trouble as trouble:
        trouble.headers = answer.headers
        raise
    return replace(embedded, headers=answer.headers)


def encode(body: Mapping[str, Any]) -> bytes:
    """The body as JSON. Half a surrogate pair, which UTF-8 cannot carry, becomes a question mark."""
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def parse(body: bytes | bytearray) -> Any:
    """The JSON value of a body. Raises ValueError."""
    import orjson

    try:
        return orjson.loads(body)
    except ValueError:
        # Some servers answer NaN, which is not JSON, if a text was too much for their model.
        return json.loads(body)


def abort() -> None:
    """Does nothing: these providers only use the network, which is aborted by itself."""


# Answers are read one by one: reading takes several times their size, and only one thread computes at a time anyway.
_reading = threading.Lock()


@contextlib.contextmanager
def reading(api: str) -> Iterator[None]:
    """Turns the errors of an answer in another form into ProviderTrouble."""
    try:
        with _reading:
            yield
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProviderTrouble(f"the provider's answer is not in the form of the {api} API ({error})") from error


def tokens_in(answer: Any, *path: str) -> int | None:
    """The count of tokens at that path of an answer; None if the answer reports none."""
    for name in path:
        answer = answer.get(name) if isinstance(answer, dict) else None
    return answer if isinstance(answer, int) else None
''',
"autoembed.providers.local": r'''"""A model that runs inside the backend: model.onnx and tokenizer.json in a folder on the server."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from autoembed.errors import ProviderTrouble
from autoembed.model import PREFIXES, Embedded, Model, Request, prefixed
from autoembed.providers.definition import check_options, check_without

if TYPE_CHECKING:
    from autoembed.network import Network
    from autoembed.onnx_model import OnnxModel

MODELS_FOLDER = "/usr/local/share/autoembed/models"
MAX_INPUTS_PER_REQUEST = 256
MAX_TOKENS_PER_REQUEST = 1_000_000
MAX_TOKENS_PER_INPUT: int | None = None
RUNS_IN_BACKEND = False
DEFAULT_MAX_TOKENS = 256

_loaded: dict[tuple[str, int], OnnxModel] = {}
# One batch of texts at a time, because it uses all cores.
_running = threading.Lock()
_stopping = threading.Event()


def folder_of(model: Model) -> str:
    return model.base_url or os.path.join(MODELS_FOLDER, model.model_id)


def check(model: Model) -> None:
    check_without(model, "api_key")
    check_options(model, PREFIXES)
    for name in ("model.onnx", "tokenizer.json"):
        path = os.path.join(folder_of(model), name)
        if not os.path.exists(path):
            raise ProviderTrouble(f"the model's file {path} does not exist on the server", permanent=True)


def embed(request: Request, network: Network) -> Embedded:
    request.sent.set()
    with _running:
        _stopping.clear()
        vectors = _onnx_model(request.model).embed(prefixed(request), _stop_if_told)
    if vectors.shape[1] != request.model.dimensions:
        raise ProviderTrouble(
            f"the model's vectors have {vectors.shape[1]} dimensions, it is defined with {request.model.dimensions}",
            permanent=True,
        )
    return Embedded(vectors)


def abort() -> None:
    _stopping.set()
    for onnx_model in list(_loaded.values()):
        onnx_model.stop()


def _stop_if_told() -> None:
    if _stopping.is_set():
        raise ProviderTrouble("the local model was stopped")


def _onnx_model(model: Model) -> OnnxModel:
    from autoembed.onnx_model import OnnxModel

    which = (folder_of(model), model.max_tokens_per_input or DEFAULT_MAX_TOKENS)
    if which not in _loaded:
        check(model)
        try:
            _loaded[which] = OnnxModel(which[0], max_tokens=which[1])
        except (OSError, ImportError, ValueError) as error:
            raise ProviderTrouble(f"the local model cannot be loaded: {error}", permanent=True) from error
    return _loaded[which]
''',
"autoembed.providers.ollama": r'''"""Ollama's own endpoint; the provider openai speaks to its /v1.

Written from the API reference, https://docs.ollama.com/api/embed, which sets no limits. The limits here keep a request
short on a computer without a graphics card. Ollama shortens texts by the model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import Refused, Trouble, trouble_of_answer
from autoembed.model import PREFIXES, Embedded, Model, Request, prefixed
from autoembed.providers import http
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "http://127.0.0.1:11434"
MAX_INPUTS_PER_REQUEST = 64
MAX_TOKENS_PER_REQUEST = 32_000
MAX_TOKENS_PER_INPUT: int | None = None
RUNS_IN_BACKEND = False

# Words in an answer with status 500 that blame a text, which then fails each time it is sent.
TEXTS_FAULTS = (b"context length", b"NaN")


def check(model: Model) -> None:
    # A server with a base_url needs no key, so the default address becomes one.
    placed = replace(model, base_url=model.base_url or BASE_URL)
    http.check(placed, default_url=None, example=f"{BASE_URL}, what comes before /api", options=PREFIXES)


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    url = http.url(request.model, BASE_URL, "/api/embed")
    return http.post(request, network, url, http.bearer(key), request_body(request), key, embedded_in, trouble_of)


abort = http.abort


def request_body(request: Request) -> dict[str, Any]:
    return {
        "model": request.model.model_id,
        "input": prefixed(request),
        "dimensions": request.model.dimensions,
        "truncate": True,
    }


def embedded_in(body: bytes | bytearray, count: int, dimensions: int) -> Embedded:
    """The vectors of an answer, which are in the order of the texts, and the tokens it counted."""
    with http.reading("Ollama"):
        answer = http.parse(body)
        vectors = matrix(answer["embeddings"], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "prompt_eval_count"))


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None) -> Trouble:
    """The usual trouble, except: a text may be to blame for a 500."""
    trouble = trouble_of_answer(status, headers, body, secret)
    if status == 500 and any(fault in body for fault in TEXTS_FAULTS):
        return Refused(str(trouble))
    return trouble
''',
"autoembed.providers.openai": r'''"""OpenAI's embeddings endpoint, and servers that speak its protocol.

Written from the API reference, https://platform.openai.com/docs/api-reference/embeddings/create, which sets the limits.
It has one form for documents and queries. For models behind it that have two, see prefixed().
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import ProviderTrouble, Refused, Trouble, trouble_of_answer
from autoembed.model import PREFIXES, Embedded, Model, Request, prefixed
from autoembed.providers import http
from autoembed.providers.vectors import matrix

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

BASE_URL = "https://api.openai.com/v1"
MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
MAX_TOKENS_PER_INPUT: int | None = 8192
RUNS_IN_BACKEND = False

# Fields that a server may refuse. The request is then sent without them.
OPTIONAL_FIELDS = frozenset({"dimensions", "encoding_format"})
PARAM = re.compile(rb'"param"\s*:\s*"(\w+)"')

# The fields that servers refused in this process, by URL and model.
_refused: dict[tuple[str, str], frozenset[str]] = {}

# Models from before OpenAI allowed shorter vectors refuse the field dimensions.
WITHOUT_DIMENSIONS = ("text-embedding-ada-002",)


def check(model: Model) -> None:
    http.check(
        model,
        default_url=BASE_URL,
        example="https://api.openai.com/v1, what comes before /embeddings",
        options=PREFIXES,
    )


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    return embed_at(http.url(request.model, BASE_URL, "/embeddings"), request, network, http.bearer(key), key)


abort = http.abort


class FieldsRefused(Refused):
    """A refusal that names fields, which may be to blame instead of a text."""

    def __init__(self, message: str, fields: frozenset[str]) -> None:
        super().__init__(message)
        self.fields = fields


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None) -> Trouble:
    trouble = trouble_of_answer(status, headers, body, secret)
    if not isinstance(trouble, Refused):
        return trouble
    param = PARAM.search(body)
    words = str(trouble) if param is None else f"{trouble} {param[1].decode()}"
    return FieldsRefused(str(trouble), frozenset(name for name in OPTIONAL_FIELDS if name in words))


def embed_at(url: str, request: Request, network: Network, headers: Mapping[str, str], key: str | None) -> Embedded:
    """Asks again without the fields that the server names in a refusal. Remembers them if that works."""
    which = (url, request.model.model_id)
    # A field that the model's extra_body sets is always sent.
    optional = OPTIONAL_FIELDS - request.model.options.get("extra_body", {}).keys()
    left_out = _refused.get(which, frozenset()) & optional
    refusal: Refused | None = None
    while True:
        body = {name: value for name, value in request_body(request).items() if name not in left_out}
        try:
            embedded = http.post(request, network, url, headers, body, key, embedded_in, trouble_of)
        except FieldsRefused as error:
            named = error.fields & optional & body.keys()
            if not named:
                raise
            refusal = refusal or error
            left_out |= named
        except ProviderTrouble as error:
            if refusal and error.permanent:
                # The vectors probably have another length. The refusal says more about the cause.
                refusal.headers = error.headers
                raise refusal from error
            raise
        else:
            if refusal:
                _refused[which] = left_out
            return embedded


def request_body(request: Request) -> dict[str, Any]:
    body = {"model": request.model.model_id, "input": prefixed(request), "encoding_format": "base64"}
    if request.model.model_id in WITHOUT_DIMENSIONS:
        return body
    return {**body, "dimensions": request.model.dimensions}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int, api: str = "OpenAI") -> Embedded:
    """The vectors of an answer in the order of its indexes, and the tokens it reports."""
    with http.reading(api):
        answer = http.parse(body)
        by_index = {item["index"]: item["embedding"] for item in answer["data"]}
        if len(answer["data"]) != count or set(by_index) != set(range(count)):
            raise ProviderTrouble(f"the provider answered with {len(by_index)} vectors for {count} texts")
        vectors: np.ndarray = matrix([by_index[index] for index in range(count)], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "usage", "total_tokens"))
''',
"autoembed.providers.vectors": r'''"""The vectors in a provider's answer, as numbers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoembed.errors import ProviderTrouble, Refused

if TYPE_CHECKING:
    import numpy as np


def matrix(embeddings: Sequence[Any], count: int, dimensions: int) -> np.ndarray:
    """Embeddings, lists of numbers or base64 of float32, as (count, dimensions) float32.

    Raises ValueError for one in another form. Raises ProviderTrouble if their count or their length is wrong, and
    Refused if one is not finite.
    """
    import numpy as np

    vectors = [_vector(embedding) for embedding in embeddings]
    if len(vectors) != count:
        raise ProviderTrouble(f"the provider answered with {len(vectors)} vectors for {count} texts")
    lengths = {len(vector) for vector in vectors}
    if lengths != {dimensions}:
        wrong = max(lengths - {dimensions})
        raise ProviderTrouble(
            f"the provider's vectors have {wrong} dimensions, the model is defined with {dimensions}", permanent=True
        )
    stacked = np.stack(vectors)
    if not np.isfinite(stacked).all():
        raise Refused("the provider answered with a vector that is not finite")
    return stacked


def _vector(embedding: Any) -> np.ndarray:
    import numpy as np

    if isinstance(embedding, str):
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        except binascii.Error as error:
            raise ValueError("invalid base64") from error
    # JSON writers put null where a number is not finite.
    numbers = np.array([np.nan if n is None else n for n in embedding] if isinstance(embedding, list) else embedding)
    if numbers.ndim != 1 or numbers.dtype.kind not in "fi":
        raise ValueError("an embedding that is not a list of numbers")
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)
''',
"autoembed.providers.voyage": r'''"""Voyage AI's embeddings endpoint.

Written from the API reference, https://docs.voyageai.com/reference/embeddings-api: 1,000 texts a request, and 120,000,
320,000 or 1,000,000 tokens, by model. Tokens of a text: https://docs.voyageai.com/docs/embeddings. Statuses:
https://docs.voyageai.com/docs/error-codes. The answer is in the form of OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import ProviderTrouble, Trouble, trouble_of_answer
from autoembed.model import Embedded, Model, Request
from autoembed.providers import http, openai
from autoembed.providers.definition import check_tokens_per_input

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "https://api.voyageai.com/v1"
MAX_INPUTS_PER_REQUEST = 1000
# Every model takes this many. max_tokens_per_request can raise it for a model that takes more.
MAX_TOKENS_PER_REQUEST = 120_000
MAX_TOKENS_PER_INPUT: int | None = 32_000
RUNS_IN_BACKEND = False

SHORT_MODELS = ("voyage-law-2", "voyage-code-2")
SHORT_MAX_TOKENS_PER_INPUT = 16_000
# These models have only one length of vectors.
WITHOUT_DIMENSIONS = (*SHORT_MODELS, "voyage-finance-2", "voyage-multilingual-2", "voyage-3", "voyage-3-lite")


def check(model: Model) -> None:
    http.check(model, default_url=BASE_URL, example=f"{BASE_URL}, what comes before /embeddings")
    if model.model_id in SHORT_MODELS:
        check_tokens_per_input(model, SHORT_MAX_TOKENS_PER_INPUT)


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    url = http.url(request.model, BASE_URL, "/embeddings")
    return http.post(request, network, url, http.bearer(key), request_body(request), key, embedded_in, trouble_of)


abort = http.abort


embedded_in = partial(openai.embedded_in, api="Voyage")


def request_body(request: Request) -> dict[str, Any]:
    body = {
        "model": request.model.model_id,
        "input": list(request.texts),
        "input_type": request.purpose,
        "encoding_format": "base64",
        # Texts that are too long were cut before, or must not be cut.
        "truncation": False,
    }
    if request.model.model_id in WITHOUT_DIMENSIONS:
        return body
    return {**body, "output_dimension": request.model.dimensions}


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None) -> Trouble:
    """The usual trouble, except: an unknown model has status 400."""
    trouble = trouble_of_answer(status, headers, body, secret)
    if status == 400 and b"Supported models are" in body:
        return ProviderTrouble(str(trouble), permanent=True)
    return trouble
''',
"autoembed.records": r'''"""The records that the database hands to a pass: messages of the queue, pipelines, backfills and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoembed.model import Model


@dataclass(frozen=True)
class Message:
    """A message of the queue: its number, how often it was read, and its body."""

    id: int
    read_count: int
    body: Any


@dataclass(frozen=True)
class Pipeline:
    """One embedding column of one table.

    vector_type: the column's type with its schema. truncate: texts that are too long are cut instead of failed.
    trusted: the table's owner is a superuser. blocked: why the jobs must wait; None: they need not.
    failures: how often the provider of the model has failed in a row.
    """

    id: int
    schema_name: str
    table_name: str
    content_function: str
    embedding_column: str
    vector_type: str
    truncate: bool
    trusted: bool
    blocked: str | None
    failures: int
    model: Model


@dataclass(frozen=True)
class Backfill:
    """A table that is being scanned.

    after: the last key that was queued; None: none yet. condition: which rows are wanted; None: all.
    failures: how often the provider of the model has failed in a row.
    """

    pipeline_id: int
    after: str | None
    condition: str | None
    failures: int


@dataclass(frozen=True)
class Row:
    """A row as it is now: its text, and whether it has an embedding."""

    content: str | None
    has_embedding: bool
''',
"autoembed.rows": r'''"""The rows of a pass: their texts are read, their vectors are written, and the ledger learns the outcome of each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autoembed import batching
from autoembed.errors import RowError
from autoembed.jobs import MAX_ATTEMPTS, Job, Ledger
from autoembed.providers import sizes_of

if TYPE_CHECKING:
    import numpy as np

    from autoembed.database import Database
    from autoembed.records import Pipeline

# A lane claims no more rows than it can write in this time, in seconds.
AHEAD_SECONDS = 1.0
# The fixed cost of a write statement, in seconds.
WRITE_SECONDS = 0.003
# The first guess for a row of a table with a vector index, in seconds.
INDEXED_ROW_SECONDS = 0.0025
# The first guess for a row of a table without one, in seconds.
PLAIN_ROW_SECONDS = 0.0001
# The delay before a row that changed during its request is read again, in seconds. The change queued a message of its
# own; this is only a safety net.
CHANGED_DELAY_SECONDS = 5.0
# Locked rows are tried for this long, in seconds, because their vectors are paid for.
LOCK_PATIENCE_SECONDS = 1.0
# The pause between two tries of locked rows, in seconds.
LOCK_POLL_SECONDS = 0.05
# The delay before a row that is still locked is claimed again, in seconds.
LOCKED_DELAY_SECONDS = 1.0


class Pace:
    """The speed at which a lane writes. A lane holds few rows, so that a new change does not wait behind them.

    Where an index makes writing slow, the rows that one lane does not hold are free for the others.
    indexed: slow writing is expected, before anything was written.
    """

    def __init__(self, batch_size: int, max_rows: int, *, indexed: bool) -> None:
        self._batch_size = batch_size
        self._max_rows = max_rows
        self._rows = float(batch_size)
        self._seconds = batch_size * (INDEXED_ROW_SECONDS if indexed else PLAIN_ROW_SECONDS)

    def wrote(self, rows: int, seconds: float) -> None:
        """Takes note of a write. Each full batch halves the weight of the writes before it."""
        kept = 0.5 ** (rows / self._batch_size)
        self._rows = kept * self._rows + rows
        self._seconds = kept * self._seconds + max(0.0, seconds - WRITE_SECONDS)

    def max_rows(self) -> int:
        """The number of rows that the lane may hold: whole requests, and at least two.

        One request is then written while another is in flight.
        """
        if self._seconds * self._max_rows <= AHEAD_SECONDS * self._rows:
            return self._max_rows
        requests = max(2, int(AHEAD_SECONDS * self._rows / self._seconds) // self._batch_size)
        return min(self._max_rows, requests * self._batch_size)


class Rows:
    """Reads and writes the rows of a pass."""

    def __init__(self, database: Database, ledger: Ledger, pace: Pace) -> None:
        self._database = database
        self._ledger = ledger
        self._pace = pace
        self._locked: list[tuple[Job, np.ndarray | None]] = []

    @property
    def some_are_locked(self) -> bool:
        """Whether vectors wait for rows that were locked when they were to be written."""
        return bool(self._locked)

    def read(self, pipeline: Pipeline, jobs: list[Job]) -> list[Job]:
        """Reads the texts; returns the jobs whose row exists.

        If the content function fails, the jobs are halved until the row that it fails for stands alone.
        """
        try:
            rows = self._database.rows(pipeline, [job.key for job in jobs])
        except RowError as error:
            if self._release_if_blocked(pipeline, jobs, error):
                return []
            if len(jobs) > 1 and not error.locked:
                return [job for half in batching.halves(jobs) for job in self.read(pipeline, half)]
            for job in jobs:
                self._retry_or_fail(job, error)
            return []
        self._forget(pipeline, [job for job in jobs if job.key not in rows])
        for job in jobs:
            job.row = rows.get(job.key)
        return [job for job in jobs if job.row is not None]

    def to_embed(self, pipeline: Pipeline, jobs: list[Job]) -> list[tuple[Job, str]]:
        """The jobs that need a vector, each with the text to send. All others are settled here.

        Settled are rows without a text, rows whose vector is of this text already, and texts that must not be cut.
        """
        if not jobs:
            return []
        digests = self._database.digests(pipeline, [job.key for job in jobs])
        limit = sizes_of(pipeline.model).tokens_per_input
        prefix = pipeline.model.prefix("document")
        chosen: list[tuple[Job, str]] = []
        blank: list[Job] = []
        empty: list[Job] = []
        unchanged: list[Job] = []
        for job in jobs:
            if job.content is None or not job.content.strip():
                (blank if job.has_embedding else empty).append(job)
                continue
            job.digest = pipeline.model.digest(job.content)
            if job.has_embedding and digests.get(job.key) == job.digest:
                unchanged.append(job)
                continue
            text = job.content if limit is None else batching.truncate(job.content, limit, prefix)
            job.truncated = text is not job.content
            if job.truncated and not pipeline.truncate:
                self._ledger.fail(job, f"the text has more than the {limit} tokens that the model takes")
            else:
                chosen.append((job, text))
        if unchanged:
            self._record(pipeline, unchanged)
        if blank:
            self.write(pipeline, blank, None)
        self._forget(pipeline, empty)
        return chosen

    def fail_unless_changed(self, job: Job, reason: str) -> None:
        """Fails a row whose text was refused. A row that has another text by now is read again."""
        content = job.content
        for existing in self.read(job.pipeline, [job]):
            if existing.content == content:
                self._ledger.fail(existing, reason)
            else:
                self._retry_changed(existing)

    def write(self, pipeline: Pipeline, jobs: list[Job], vectors: np.ndarray | None) -> None:
        """Writes the vectors (None: NULLs) of the rows whose text is still the same.

        If a row does not take its vector, the jobs are halved until it stands alone.
        """
        began_at = time.monotonic()
        try:
            outcomes = self._database.write(pipeline, [job.key for job in jobs], [job.content for job in jobs], vectors)
            self._pace.wrote(len(jobs), time.monotonic() - began_at)
        except RowError as error:
            if self._release_if_blocked(pipeline, jobs, error):
                return
            if error.locked:
                self._note_locked(jobs, vectors, range(len(jobs)))
            elif len(jobs) > 1:
                middle = len(jobs) // 2
                self.write(pipeline, jobs[:middle], None if vectors is None else vectors[:middle])
                self.write(pipeline, jobs[middle:], None if vectors is None else vectors[middle:])
            else:
                self._retry_or_fail(jobs[0], error, at_once=True)
            return
        by_outcome: dict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            by_outcome[outcomes[job.key]].append(job)
        self._note_locked(jobs, vectors, [i for i, job in enumerate(jobs) if outcomes[job.key] == "locked"])
        written = by_outcome["written"]
        if vectors is None:
            self._forget(pipeline, written)
        elif written:
            self._record(pipeline, written)
        for job in by_outcome["changed"]:
            self._retry_changed(job)
        self._forget(pipeline, by_outcome["gone"])

    def write_locked(self, check_interrupts: Callable[[], None]) -> None:
        """Tries for a moment to write the rows that were locked, then gives them back to the queue."""
        end = time.monotonic() + LOCK_PATIENCE_SECONDS
        while self._locked and time.monotonic() < end:
            self._ledger.flush()
            self._database.commit(synced=False)
            check_interrupts()
            time.sleep(LOCK_POLL_SECONDS)
            self._database.lock_lanes()
            locked, self._locked = self._locked, []
            for job, vector in locked:
                self.write(job.pipeline, [job], vector)
        for job, _ in self._locked:
            self._ledger.retry(job, LOCKED_DELAY_SECONDS, "the row or its table is locked by another transaction")

    def _note_locked(self, jobs: Sequence[Job], vectors: np.ndarray | None, indexes: Sequence[int]) -> None:
        for i in indexes:
            self._locked.append((jobs[i], None if vectors is None else vectors[i : i + 1]))

    def _record(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Settles rows whose vector is of their text."""
        self._database.record_embedded(
            pipeline,
            [job.key for job in jobs],
            [job.digest for job in jobs],
            [job.truncated for job in jobs],
        )
        for job in jobs:
            self._ledger.done(job)

    def _forget(self, pipeline: Pipeline, jobs: Sequence[Job]) -> None:
        """Settles rows that need no vector: deleted ones, and those without a text."""
        if jobs:
            self._database.forget(pipeline, [job.key for job in jobs])
        for job in jobs:
            self._ledger.done(job)

    def _retry_changed(self, job: Job) -> None:
        """Has a row read again whose text changed during its request. This counts as an attempt."""
        if job.attempts + 1 < MAX_ATTEMPTS:
            self._ledger.retry(job, CHANGED_DELAY_SECONDS, counts=True)
            return
        # Another lane may have embedded the new text already.
        for without_vector, _ in self.to_embed(job.pipeline, self.read(job.pipeline, [job])):
            self._ledger.fail(without_vector, "its text was different each time it was read")

    def _release_if_blocked(self, pipeline: Pipeline, jobs: Sequence[Job], error: RowError) -> bool:
        """Releases the jobs if their table has become unusable since the claim. Returns whether it has."""
        now = None if error.passes else self._database.pipelines([pipeline.id]).get(pipeline.id)
        if now is None or now.blocked is None:
            return False
        for job in jobs:
            self._ledger.release(job, now.blocked)
        return True

    def _retry_or_fail(self, job: Job, error: RowError, *, at_once: bool = False) -> None:
        """Decides on a row that caused an error. at_once: it fails without further attempts."""
        if error.passes:
            self._ledger.retry(job, LOCKED_DELAY_SECONDS, str(error))
        elif at_once or job.attempts + 1 >= MAX_ATTEMPTS:
            self._ledger.fail(job, str(error))
        else:
            self._ledger.retry(job, 2.0**job.attempts, str(error), counts=True)
''',
"autoembed.worker": r'''"""The path of a job: claim, embed, apply. Database and network are handed in, so this module needs no plpy."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from autoembed import batching, heap, providers
from autoembed.errors import OverBudget, ProviderTrouble, Refused, RowError, rest_seconds
from autoembed.flight import SLICE_SECONDS, Flight
from autoembed.jobs import Job, Ledger, Report, are_keys, open_jobs
from autoembed.limits import FIRST_ANSWER_SECONDS, NOTHING_KNOWN, PATIENCE_SECONDS, Limiter, Permit
from autoembed.model import Embedded, Model, Request, Share
from autoembed.providers import PROVIDERS, provider_of, sizes_of
from autoembed.rows import Pace, Rows

if TYPE_CHECKING:
    import numpy as np

    from autoembed.database import Database
    from autoembed.network import Network
    from autoembed.records import Message, Pipeline

# The default of batch_size in process() and work(), in texts.
DEFAULT_BATCH_SIZE = 100
# Added to the time that a request may take, in seconds: the database's own work on a claim.
LEASE_MARGIN_SECONDS = 60.0
# The pause of an idle lane between two looks at the queue, in seconds.
POLL_SECONDS = 0.1
# The same for a lane that does backfills alone, in seconds: nobody waits for these.
BACKFILL_POLL_SECONDS = 1.0
# A lane cleans up, and checks whether it is still wanted, this often, in seconds.
LOOK_AROUND_SECONDS = 1.0
# A pass claims further rows for this long, in seconds. Then it ends, and deals with its locked rows.
CLAIMING_SECONDS = 5.0
# A text that no model refuses. It shows whether a text or the whole request is to blame.
PROBE = "autoembed"


@dataclass(frozen=True)
class Options:
    """The settings of a pass: texts per request, requests at a time, and seconds for each."""

    batch_size: int
    max_requests: int
    timeout_seconds: float

    @property
    def max_rows(self) -> int:
        return self.batch_size * self.max_requests

    @property
    def lease_seconds(self) -> float:
        return self.timeout_seconds + LEASE_MARGIN_SECONDS


def work(database: Database, network: Network, options: Options, run_seconds: float, *, backfill: bool = False) -> None:
    """Runs a lane: makes passes until its time is up or it is told to end. While idle it polls the queue.

    backfill: the lane scans tables and leaves the queue to others.
    """
    # A lane that ends in time is not logged as a statement that was cancelled.
    limit = database.statement_timeout_seconds()
    end = time.monotonic() + (run_seconds if limit is None else min(run_seconds, limit / 2))
    look_around_at = 0.0
    has_worked = False
    queue = partial(_claim_queued, database, options)
    tables = partial(_claim_backfill, database, options, backfill)
    indexed = database.enter_lane(backfill=backfill)
    pace = Pace(options.batch_size, options.max_rows, indexed=indexed)
    database.warn_of_blocked_pipelines([])
    database.commit()
    try:
        while time.monotonic() < end:
            look_around = time.monotonic() >= look_around_at
            if look_around:
                look_around_at = time.monotonic() + LOOK_AROUND_SECONDS
                if not database.lane_is_wanted():
                    break
                database.clean_up()
                database.commit()
                if has_worked:
                    heap.trim()
                    has_worked = False
            read = 0 if backfill else _work_on(database, network, options, queue, pace).read
            if read == 0 and look_around:
                read = _work_on(database, network, options, tables, pace).read
                if read > 0:
                    look_around_at = 0.0
            if read > 0:
                has_worked = True
            elif backfill:
                database.sleep(BACKFILL_POLL_SECONDS)
            else:
                time.sleep(POLL_SECONDS)
    finally:
        database.leave_lane()
        database.commit()


def run_pass(database: Database, network: Network, options: Options) -> Report:
    """Makes one pass over the queue or, if nothing is due, over the next rows of a backfill.

    A bad row, a bad answer or a dead provider raises nothing: the report says so.
    """
    report = _work_on(database, network, options, partial(_claim_queued, database, options), None)
    if report.read == 0:
        tables = partial(_claim_backfill, database, options, False)
        report = _work_on(database, network, options, tables, None)
    return report


# Claims messages for so many rows, in addition to the messages with these ids.
Claim = Callable[[int, list[int]], "list[Message]"]


def _work_on(database: Database, network: Network, options: Options, claim: Claim, pace: Pace | None) -> Report:
    """Makes one pass. With the pace of a lane, it claims further rows while requests are in flight."""
    messages = claim(options.max_rows if pace is None else pace.max_rows(), [])
    if not messages:
        database.commit()
        return Report()
    ledger = Ledger(database, messages)
    try:
        return _Pass(database, network, options, ledger, claim, pace).run(messages)
    except BaseException:
        # After a cancel or a shutdown, all that is not done goes back to the queue at once.
        ledger.release_open()
        ledger.flush()
        raise


def _claim_queued(database: Database, options: Options, max_rows: int, held: list[int]) -> list[Message]:
    return database.claim(max_rows, options.lease_seconds, held)


def _claim_backfill(
    database: Database, options: Options, dedicated: bool, max_rows: int, held: list[int]
) -> list[Message]:
    """The next rows of a table that is being scanned, as one message that is claimed already."""
    backfill = database.next_backfill(dedicated=dedicated)
    if backfill is None:
        return []
    if backfill.failures:
        # A provider that failed last time is tried with one row.
        max_rows = 1
    try:
        keys = database.scan(backfill, max_rows)
    except RowError as error:
        if not error.passes:
            database.fail_backfill(backfill, str(error))
        return []
    if not are_keys(keys):
        database.fail_backfill(backfill, "the scan with its condition returned something that is not a key")
        return []
    exhausted = len(keys) < max_rows
    return database.queue_backfill(backfill, keys, exhausted=exhausted, lease_seconds=options.lease_seconds, held=held)


@dataclass
class Outbox:
    """One model's part of a pass.

    jobs: the open ones, by text. unsent: texts that no request holds yet. accepted: the model has answered in this
    pass. suspended: refused requests, until it is known whether the model refuses everything.
    waiting: requests that the model's limits do not allow yet. permit: that of the first. slots: all that are held.
    """

    limiter: Limiter
    jobs: dict[str, list[Job]] = field(default_factory=lambda: defaultdict(list))
    unsent: list[str] = field(default_factory=list)
    accepted: bool = False
    trouble: ProviderTrouble | None = None
    suspended: list[tuple[Request, Refused]] = field(default_factory=list)
    failures: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    in_flight: int = 0
    permit: Permit | None = None
    slots: set[int] = field(default_factory=set)
    began_at: float = field(default_factory=time.monotonic)


class _Pass:
    def __init__(
        self,
        database: Database,
        network: Network,
        options: Options,
        ledger: Ledger,
        claim: Claim,
        pace: Pace | None,
    ) -> None:
        self._database = database
        self._network = network
        self._options = options
        self._ledger = ledger
        # None: nothing further is claimed in this pass.
        self._claim: Claim | None = claim if pace else None
        self._pace = pace or Pace(options.batch_size, options.max_rows, indexed=True)
        self._rows = Rows(database, ledger, self._pace)
        self._outboxes: dict[Model, Outbox] = {}
        # Requests that are handed to threads and may not be sent yet.
        self._leaving: list[Request] = []
        self._flight: Flight[Request, Embedded] | None = None
        self._lease_ends = time.monotonic() + options.lease_seconds
        self._claim_at = time.monotonic() + POLL_SECONDS
        self._claim_until = time.monotonic() + CLAIMING_SECONDS

    def run(self, messages: list[Message]) -> Report:
        if any(message.read_count > 1 for message in messages):
            # Lanes died, perhaps because of these: nothing else is to be in flight beside them.
            self._claim = None
        with Flight[Request, Embedded](self._options.max_requests, self._between_waits, self._abort) as flight:
            try:
                self._load(flight, messages)
                self._flight = flight
                while flight or self._waiting():
                    for request, outcome in flight.landed():
                        self._wait_until_sent()
                        self._database.lock_lanes()
                        self._land(flight, request, outcome)
                        self._commit()
                        self._launch(flight)
                    if self._waiting():
                        time.sleep(SLICE_SECONDS)
                        self._between_waits()
                self._flight = None
            finally:
                for model, outbox in self._outboxes.items():
                    self._free(model, outbox.slots)
        self._rows.write_locked(self._between_waits)
        self._commit()
        return self._ledger.report

    # Claim ---------------------------------------------------------------------------------------

    def _load(self, flight: Flight[Request, Embedded], messages: list[Message]) -> None:
        """Reads the rows of claimed messages, and sends their texts."""
        for pipeline, jobs in open_jobs(self._database, self._ledger, messages, self._options.max_rows):
            for job, text in self._rows.to_embed(pipeline, self._rows.read(pipeline, jobs)):
                outbox = self._outbox(pipeline)
                if text not in outbox.jobs:
                    outbox.unsent.append(text)
                outbox.jobs[text].append(job)
        # This commit waits for the disk: a row that crashes the server must find the attempt counted.
        self._commit(synced=True)
        for model, outbox in self._outboxes.items():
            unsent, outbox.unsent = outbox.unsent, []
            self._submit(model, unsent)
        self._launch(flight)

    def _outbox(self, pipeline: Pipeline) -> Outbox:
        outbox = self._outboxes.get(pipeline.model)
        if outbox is None:
            outbox = self._outboxes[pipeline.model] = Outbox(Limiter(pipeline.model), failures=pipeline.failures)
        return outbox

    def _claim_more(self, flight: Flight[Request, Embedded], claim: Claim) -> None:
        """Claims rows for the requests that could also be in flight, so that providers do not wait for writes."""
        batch_size = self._options.batch_size
        texts = sum(len(outbox.jobs) for outbox in self._outboxes.values())
        # In requests: those the lane may hold, those it holds, and those that may be added.
        most = self._pace.max_rows() // batch_size
        held = (texts + batch_size - 1) // batch_size
        free = min(self._options.max_requests - len(flight) - self._waiting(), most - held)
        now = time.monotonic()
        if free < 1 or now > self._claim_until:
            return
        if 2 * free < most and now < self._claim_at:
            return
        # Another message must not ask again for a vector that waits for a locked row. A provider that failed last time
        # is tried with one request.
        if self._rows.some_are_locked or any(
            box.trouble or box.suspended or box.failures for box in self._outboxes.values()
        ):
            return
        self._claim_at = now + POLL_SECONDS
        self._database.lock_lanes()
        messages = claim(free * batch_size, self._ledger.open_message_ids())
        self._ledger.take(messages)
        suspects = [message for message in messages if message.read_count > 1]
        if suspects:
            self._ledger.release_messages(suspects)
            self._claim = None
        self._load(flight, [message for message in messages if message.read_count == 1])

    # Embed ---------------------------------------------------------------------------------------

    def _submit(self, model: Model, texts: Sequence[str]) -> None:
        """Packs texts into requests, which are sent when the limits of their model allow."""
        outbox = self._outboxes[model]
        sizes = sizes_of(model, outbox.limiter.learnt)
        most = min(self._options.batch_size, sizes.inputs_per_request)
        packed = batching.pack(texts, most, sizes.tokens_per_request, model.prefix("document"))
        outbox.waiting.extend(Request(model, part, self._options.timeout_seconds) for part in packed)

    def _waiting(self) -> int:
        return sum(len(outbox.waiting) for outbox in self._outboxes.values())

    def _launch(self, flight: Flight[Request, Embedded]) -> None:
        """Sends the requests that the limits of their models allow by now."""
        for model, outbox in self._outboxes.items():
            provider = provider_of(model)
            while outbox.waiting and self._is_its_turn(flight, outbox):
                request = outbox.waiting.popleft()
                if outbox.permit is not None:
                    request.slot, outbox.permit = outbox.permit.slot, None
                self._ledger.report.requests += 1
                outbox.in_flight += 1
                if not provider.RUNS_IN_BACKEND:
                    self._leaving.append(request)
                call = partial(providers.embed, request, self._network, self._database.call_embedder)
                flight.submit(request, call, here=provider.RUNS_IN_BACKEND)

    def _wait_until_sent(self) -> None:
        """Gives requests a moment to be sent: their threads need the interpreter, which a statement keeps."""
        end = time.monotonic() + SLICE_SECONDS
        for request in self._leaving:
            request.sent.wait(end - time.monotonic())
        self._leaving.clear()

    def _is_its_turn(self, flight: Flight[Request, Embedded], outbox: Outbox) -> bool:
        """Whether the first request that waits may be sent now. Asks for its permit if it has none."""
        elapsed = time.monotonic() - outbox.began_at
        if outbox.in_flight and outbox.limiter.learnt is None and elapsed < FIRST_ANSWER_SECONDS:
            return False
        if not outbox.limiter.needs_permits:
            return True
        if outbox.permit is None:
            if len(flight) >= self._options.max_requests:
                return False
            if elapsed > PATIENCE_SECONDS:
                self._release(outbox, outbox.waiting, "the model's limits allow no request yet")
                outbox.waiting.clear()
                return False
            self._ask_for_permit(flight, outbox)
        return outbox.permit is not None and outbox.permit.at is not None and time.monotonic() >= outbox.permit.at

    def _ask_for_permit(self, flight: Flight[Request, Embedded], outbox: Outbox) -> None:
        """Asks for a permit for the first request that waits. Gives the model up if its budget is spent."""
        request = outbox.waiting[0]
        prefix = request.model.prefix("document")
        request.tokens = sum(batching.estimate_tokens(prefix + text) for text in request.texts)
        charges = outbox.limiter.charge(request.tokens, time.monotonic())
        permit = self._database.take_permit(request.model.name, charges, sorted(outbox.slots))
        if permit.spent is not None:
            outbox.waiting.popleft()
            self._give_up_model(flight, request, OverBudget(permit.spent, retry_after_seconds=permit.rest_seconds))
        elif permit.at is not None:
            outbox.permit = permit
            outbox.slots.update([] if permit.slot is None else [permit.slot])
        # The commit comes at once: other lanes wait for their turn.
        self._database.commit()

    def _land(self, flight: Flight[Request, Embedded], request: Request, outcome: Embedded | BaseException) -> None:
        outbox = self._outboxes[request.model]
        self._note_limits(outbox, request, outcome)
        if isinstance(outcome, Refused) and request.probe:
            outcome = ProviderTrouble(f"every request is refused: {outcome}", permanent=True)
        elif isinstance(outcome, Refused) and outbox.trouble is not None:
            outcome = outbox.trouble
        match outcome:
            case ProviderTrouble():
                self._give_up_model(flight, request, outcome)
            case Refused():
                self._refuse(request, outcome)
            case Exception():
                # A mistake in this code must not end every lane again and again. Its text may hold a key.
                trouble = ProviderTrouble(
                    f"an unexpected {type(outcome).__name__} in the provider {request.model.provider}"
                )
                self._give_up_model(flight, request, trouble)
            case BaseException():
                raise outcome
            case Embedded(vectors, tokens):
                self._database.note_usage(request.model.name, self._shares(request, tokens), request.slot)
                self._accept(request, vectors)

    def _note_limits(self, outbox: Outbox, request: Request, outcome: Embedded | BaseException) -> None:
        """Takes the model's limits from an answer. A request that failed frees its slot."""
        outbox.in_flight -= 1
        outbox.slots.discard(request.slot or 0)
        if isinstance(outcome, Embedded):
            outbox.limiter.correct_estimate(request.tokens, outcome.tokens)
        elif request.slot is not None:
            self._free(request.model, {request.slot})
        if outbox.limiter.learn_from(outcome, time.monotonic()):
            self._database.learn_limits(request.model.name, outbox.limiter.learnt or NOTHING_KNOWN)
            if outbox.permit is None and not any(other.probe for other in outbox.waiting):
                # The requests that still wait may have too many tokens.
                waiting, outbox.waiting = outbox.waiting, deque()
                self._submit(request.model, [text for other in waiting for text in other.texts])

    def _free(self, model: Model, slots: Iterable[int]) -> None:
        if slots:
            self._database.free_slots(model.name, sorted(slots))

    def _shares(self, request: Request, tokens: int | None) -> list[Share]:
        """The part of each pipeline in a request, its tokens estimated. A text of several pipelines is the first's."""
        texts: dict[int | None, list[str]] = defaultdict(list)
        rows: dict[int | None, int] = defaultdict(int)
        for text in request.texts:
            jobs = [] if request.probe else self._outboxes[request.model].jobs[text]
            texts[jobs[0].pipeline.id if jobs else None].append(text)
            for job in jobs:
                rows[job.pipeline.id] += 1
        if tokens is not None and len(texts) == 1:
            [(pipeline_id, own)] = texts.items()
            return [Share(pipeline_id, 1, len(own), tokens, rows[pipeline_id])]
        parts = [sum(map(batching.estimate_tokens, own)) for own in texts.values()]
        counted = sum(parts) if tokens is None else tokens
        return [
            Share(pipeline_id, int(number == 0), len(own), counted * part // sum(parts), rows[pipeline_id])
            for number, ((pipeline_id, own), part) in enumerate(zip(texts.items(), parts, strict=True))
        ]

    def _refuse(self, request: Request, refusal: Refused) -> None:
        """Looks for the text to blame, as soon as the model is known to accept others."""
        outbox = self._outboxes[request.model]
        if outbox.accepted:
            self._split(request, refusal)
            return
        outbox.suspended.append((request, refusal))
        if len(outbox.suspended) == 1:
            probe = Request(request.model, [PROBE], self._options.timeout_seconds, probe=True)
            outbox.waiting.appendleft(probe)

    def _accept(self, request: Request, vectors: np.ndarray) -> None:
        outbox = self._outboxes[request.model]
        outbox.accepted = True
        if outbox.failures:
            self._database.resume_model(request.model.name)
            outbox.failures = 0
        if not request.probe:
            self._apply(request, vectors)
            for text in request.texts:
                del outbox.jobs[text]
        suspended, outbox.suspended = outbox.suspended, []
        for refused, refusal in suspended:
            self._split(refused, refusal)

    def _split(self, request: Request, refusal: Refused) -> None:
        """Halves a refused request until the text to blame stands alone."""
        outbox = self._outboxes[request.model]
        if len(request.texts) > 1:
            for half in batching.halves(list(request.texts)):
                outbox.waiting.append(Request(request.model, half, self._options.timeout_seconds))
            return
        for job in outbox.jobs.pop(request.texts[0]):
            self._rows.fail_unless_changed(job, str(refusal))

    def _give_up_model(self, flight: Flight[Request, Embedded], request: Request, trouble: ProviderTrouble) -> None:
        """Lets the model rest, for all lanes, and releases the jobs that were to be sent."""
        outbox = self._outboxes[request.model]
        if outbox.trouble is not trouble:
            outbox.trouble = trouble
            # Where limits are known, the lanes come back one by one without a random delay.
            paced = outbox.limiter.paces and trouble.retry_after_seconds is not None
            seconds = rest_seconds(trouble, outbox.failures, 0.0 if paced else random.random())
            name = request.model.name
            is_new = self._database.rest_model(name, seconds, trouble.permanent, str(trouble))
            if is_new and self._claim is not None:
                # The server's log has one warning for each outage.
                self._database.warn_of_blocked_pipelines([name])
        unsent = flight.withdraw(lambda other: other.model == request.model)
        self._ledger.report.requests -= len(unsent)
        outbox.in_flight -= len(unsent)
        suspended = [refused for refused, _ in outbox.suspended]
        self._release(outbox, [request, *unsent, *suspended, *outbox.waiting], str(trouble))
        outbox.suspended = []
        outbox.waiting.clear()

    def _release(self, outbox: Outbox, requests: Iterable[Request], reason: str) -> None:
        """Gives the jobs of requests back to the queue unchanged."""
        for request in requests:
            for text in [] if request.probe else request.texts:
                for job in outbox.jobs.pop(text):
                    self._ledger.release(job, reason)

    # Apply ---------------------------------------------------------------------------------------

    def _apply(self, request: Request, vectors: np.ndarray) -> None:
        # A row that was queued again during its request has two jobs, and one statement writes it only once.
        turns: Counter[tuple[int, str]] = Counter()
        by_statement: dict[tuple[int, int], list[tuple[Job, int]]] = defaultdict(list)
        for index, text in enumerate(request.texts):
            for job in self._outboxes[request.model].jobs[text]:
                turns[job.pipeline.id, job.key] += 1
                by_statement[job.pipeline.id, turns[job.pipeline.id, job.key]].append((job, index))
        for matched in by_statement.values():
            jobs = [job for job, _ in matched]
            self._rows.write(jobs[0].pipeline, jobs, vectors[[index for _, index in matched]])

    # In between ----------------------------------------------------------------------------------

    def _commit(self, *, synced: bool = False) -> None:
        """Commits. Not synced: a crash may undo the work; its messages are then in the queue again."""
        self._ledger.flush()
        self._database.commit(synced=synced)

    def _between_waits(self) -> None:
        """The work of the backend's own thread between two waits for answers."""
        self._database.check_interrupts()
        if self._flight is not None:
            self._launch(self._flight)
        if self._flight is not None and self._claim is not None:
            self._claim_more(self._flight, self._claim)
        if self._lease_ends - time.monotonic() < self._options.timeout_seconds:
            self._database.extend(self._ledger.open_message_ids(), self._options.lease_seconds)
            self._database.commit()
            self._lease_ends = time.monotonic() + self._options.lease_seconds

    def _abort(self) -> None:
        self._network.abort()
        for provider in PROVIDERS.values():
            provider.abort()
''',
    }.items()}

    class AutoembedImporter(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
        def find_spec(self, name, path=None, target=None):
            if name not in sources:
                return None
            spec = importlib.util.spec_from_loader(name, self, origin=f"plpy_src/{name}")
            return spec

        def is_package(self, name):
            return any(other.startswith(name + ".") for other in sources)

        def get_source(self, name):
            return sources[name]

    for name in [name for name in sys.modules if name.split(".")[0] == "autoembed"]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "AutoembedImporter"]
    sys.meta_path.insert(0, AutoembedImporter())
    GD["autoembed"] = "d8cc025f104e94e6"
$autoembed_python$;
COMMENT ON FUNCTION autoembed._load_python() IS
    'Puts this version''s Python modules into the session.';

-- 20_models.sql: create, change and drop models. Where a model is and where its key lies is an administrator's business.

CREATE FUNCTION autoembed._default_model()
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce((SELECT s.value FROM autoembed.setting AS s WHERE s.name = 'default_model'), 'all-MiniLM-L6-v2');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._default_model() IS 'The model of pipelines and embed() calls that name none.';

CREATE FUNCTION autoembed._model(name text)
    RETURNS autoembed.model
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _name text := coalesce(_model.name, autoembed._default_model());
    _found autoembed.model;
BEGIN
    SELECT m.* INTO _found FROM autoembed.model AS m WHERE m.name = _name;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('model "%s" does not exist', _name),
            DETAIL = (SELECT 'The models are: ' || string_agg(m.name, ', ' ORDER BY m.name) || '.' FROM autoembed.model AS m),
            HINT = 'Create it with autoembed.create_model().';
    END IF;
    RETURN _found;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._model(text) IS 'The model of that name, NULL for the default one; an error if there is none.';

CREATE FUNCTION autoembed._http_hosts()
    RETURNS text[]
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce((SELECT string_to_array(s.value, ' ') FROM autoembed.setting AS s WHERE s.name = 'http_hosts'), '{}');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._http_hosts() IS 'The hosts that may be called without encryption; see allow_http_host().';

CREATE FUNCTION autoembed._vault_key(reference text, OUT vault_key text, OUT vault_fault text)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _name text := substring(reference FROM '^vault:(.*)$');
    _view oid := to_regclass('vault.decrypted_secrets');
BEGIN
    IF _name IS NULL THEN
        RETURN;
    END IF;
    -- Where there is no Vault, anybody who may create schemas could make such a view, and its code would run as us.
    IF NOT EXISTS (SELECT FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner WHERE c.oid = _view AND r.rolsuper) THEN
        vault_fault := 'this database has no Vault: no view vault.decrypted_secrets that belongs to a superuser';
        RETURN;
    END IF;
    EXECUTE 'SELECT s.decrypted_secret::text FROM vault.decrypted_secrets AS s WHERE s.name = $1'
    INTO vault_key USING _name;
    IF vault_key IS NULL THEN
        vault_fault := format('the vault has no secret "%s"', _name);
    END IF;
EXCEPTION WHEN OTHERS THEN
    -- Not raised: other models have work to do. Not repeated: the message may hold what was read.
    vault_key := NULL;
    vault_fault := format('the vault gives no secret "%s" (SQLSTATE %s)', _name, SQLSTATE);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._vault_key(text) IS
    'The key that vault:NAME refers to, or why it cannot be had; nothing for other references.';

CREATE FUNCTION autoembed._model_identity(model autoembed.model)
    RETURNS text
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN jsonb_build_array(model.provider, model.model_id, model.dimensions, coalesce(model.options ->> 'document_prefix', ''));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._model_identity(autoembed.model) IS
    'Two models with the same identity produce interchangeable vectors.';

CREATE FUNCTION autoembed._model_facts(model autoembed.model)
    RETURNS jsonb
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN to_jsonb(model)
        || jsonb_build_object(
            'identity', autoembed._model_identity(model),
            'http_hosts', autoembed._http_hosts(),
            'learnt', (SELECT to_jsonb(l) FROM autoembed.model_limit AS l WHERE l.model = (_model_facts.model).name ORDER BY l.at DESC LIMIT 1)
        )
        || (SELECT to_jsonb(v) FROM autoembed._vault_key((_model_facts.model).api_key) AS v);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._model_facts(autoembed.model) IS
    'What the Python side needs to know of a model: its row, and what the row refers to.';

CREATE FUNCTION autoembed._model_fault(name text, OUT problem text, OUT hint text, OUT errcode text, OUT waits boolean)
    LANGUAGE plpython3u
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "d8cc025f104e94e6":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.check_model(name)
$python$;
COMMENT ON FUNCTION autoembed._model_fault(text) IS
    'The fault in a model''s definition, NULL if there is none; waits: its key or folder is not there yet.';

CREATE FUNCTION autoembed._check_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _fault record;
BEGIN
    SELECT f.* INTO _fault FROM autoembed._model_fault(name) AS f;
    IF _fault.waits THEN
        RAISE WARNING USING MESSAGE = _fault.problem, HINT = _fault.hint, ERRCODE = _fault.errcode;
    ELSIF _fault.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _fault.problem, HINT = _fault.hint, ERRCODE = _fault.errcode;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_model(text) IS
    'Fails if the model cannot work as it is defined; warns if its key or folder is not there yet.';

CREATE FUNCTION autoembed._check_api_key(api_key text)
    RETURNS void
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Not left to the table's CHECK: its error would print the row, and with it a key pasted by mistake.
    IF api_key !~ '^(env|file|vault):.' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'api_key must say where the key is found, not what it is',
            HINT = 'Use env:NAME for an environment variable of the server, file:PATH for a file that it can read, or vault:NAME for a secret of the Vault extension.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_api_key(text) IS 'Fails unless it is a reference to a key.';

CREATE FUNCTION autoembed._check_budget(daily_cost_budget numeric, price_per_million_tokens numeric)
    RETURNS void
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF daily_cost_budget IS NOT NULL AND price_per_million_tokens IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'daily_cost_budget needs a price',
            HINT = 'Give price_per_million_tokens too, in the same currency; or a daily_token_budget.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_budget(numeric, numeric) IS 'Fails for a budget in money without a price.';

CREATE FUNCTION autoembed.create_model(
    name text,
    provider text,
    dimensions integer,
    model_id text DEFAULT NULL,
    base_url text DEFAULT NULL,
    api_key text DEFAULT NULL,
    max_inputs_per_request integer DEFAULT NULL,
    max_tokens_per_request integer DEFAULT NULL,
    max_tokens_per_input integer DEFAULT NULL,
    requests_per_minute integer DEFAULT NULL,
    tokens_per_minute integer DEFAULT NULL,
    max_requests_in_flight integer DEFAULT NULL,
    price_per_million_tokens numeric DEFAULT NULL,
    daily_token_budget bigint DEFAULT NULL,
    daily_cost_budget numeric DEFAULT NULL,
    options jsonb DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._check_api_key(create_model.api_key);
    PERFORM autoembed._check_budget(create_model.daily_cost_budget, create_model.price_per_million_tokens);
    IF EXISTS (SELECT FROM autoembed.model AS m WHERE m.name = create_model.name) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('model "%s" already exists', create_model.name),
            HINT = 'Change it with autoembed.alter_model().';
    END IF;
    INSERT INTO autoembed.model (name, provider, model_id, dimensions, base_url, api_key,
                                 max_inputs_per_request, max_tokens_per_request, max_tokens_per_input,
                                 requests_per_minute, tokens_per_minute, max_requests_in_flight,
                                 price_per_million_tokens, daily_token_budget, daily_cost_budget, options)
    VALUES (create_model.name, create_model.provider, coalesce(create_model.model_id, create_model.name),
            create_model.dimensions, create_model.base_url, create_model.api_key, create_model.max_inputs_per_request,
            create_model.max_tokens_per_request, create_model.max_tokens_per_input,
            create_model.requests_per_minute, create_model.tokens_per_minute, create_model.max_requests_in_flight,
            create_model.price_per_million_tokens, create_model.daily_token_budget, create_model.daily_cost_budget,
            coalesce(create_model.options, '{}'));
    PERFORM autoembed._check_model(create_model.name);
    PERFORM autoembed._build_embedders(create_model.name);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.create_model(text, text, integer, text, text, text, integer, integer, integer, integer, integer, integer, numeric, bigint, numeric, jsonb) IS
    'Defines a model: its provider (local, openai, azure, cohere, voyage, gemini, ollama, function, fake), the length of its vectors, what the provider calls it (default: its name), where it is, where its key is found (env:NAME, file:PATH or vault:NAME), limits below the provider''s own, requests and tokens a minute and requests in flight for all sessions together (left out: what the provider''s answers tell), its price, what it may use a day (UTC) in tokens or at that price, and options of the provider.';

CREATE FUNCTION autoembed.alter_model(
    name text,
    provider text DEFAULT NULL,
    dimensions integer DEFAULT NULL,
    model_id text DEFAULT NULL,
    base_url text DEFAULT NULL,
    api_key text DEFAULT NULL,
    max_inputs_per_request integer DEFAULT NULL,
    max_tokens_per_request integer DEFAULT NULL,
    max_tokens_per_input integer DEFAULT NULL,
    requests_per_minute integer DEFAULT NULL,
    tokens_per_minute integer DEFAULT NULL,
    max_requests_in_flight integer DEFAULT NULL,
    price_per_million_tokens numeric DEFAULT NULL,
    daily_token_budget bigint DEFAULT NULL,
    daily_cost_budget numeric DEFAULT NULL,
    options jsonb DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _before autoembed.model;
BEGIN
    PERFORM autoembed._check_api_key(alter_model.api_key);
    _before := autoembed._model(alter_model.name);
    PERFORM autoembed._check_budget(coalesce(alter_model.daily_cost_budget, _before.daily_cost_budget),
                                    coalesce(alter_model.price_per_million_tokens, _before.price_per_million_tokens));
    UPDATE autoembed.model AS m
    SET provider = coalesce(alter_model.provider, m.provider),
        dimensions = coalesce(alter_model.dimensions, m.dimensions),
        model_id = coalesce(alter_model.model_id, m.model_id),
        base_url = coalesce(alter_model.base_url, m.base_url),
        api_key = coalesce(alter_model.api_key, m.api_key),
        max_inputs_per_request = coalesce(alter_model.max_inputs_per_request, m.max_inputs_per_request),
        max_tokens_per_request = coalesce(alter_model.max_tokens_per_request, m.max_tokens_per_request),
        max_tokens_per_input = coalesce(alter_model.max_tokens_per_input, m.max_tokens_per_input),
        requests_per_minute = coalesce(alter_model.requests_per_minute, m.requests_per_minute),
        tokens_per_minute = coalesce(alter_model.tokens_per_minute, m.tokens_per_minute),
        max_requests_in_flight = coalesce(alter_model.max_requests_in_flight, m.max_requests_in_flight),
        price_per_million_tokens = coalesce(alter_model.price_per_million_tokens, m.price_per_million_tokens),
        daily_token_budget = coalesce(alter_model.daily_token_budget, m.daily_token_budget),
        daily_cost_budget = coalesce(alter_model.daily_cost_budget, m.daily_cost_budget),
        options = coalesce(alter_model.options, m.options),
        builtin = false
    WHERE m.name = alter_model.name;
    -- Another address or key, perhaps, with limits of its own.
    DELETE FROM autoembed.model_limit AS l WHERE l.model = alter_model.name;
    PERFORM autoembed._check_model(alter_model.name);
    PERFORM autoembed._build_embedders(alter_model.name);
    PERFORM autoembed.resume_model(alter_model.name);
    PERFORM autoembed._warn_of_blocked_pipelines();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.alter_model(text, text, integer, text, text, text, integer, integer, integer, integer, integer, integer, numeric, bigint, numeric, jsonb) IS
    'Changes what is not NULL of a model, ends its rest, and forgets the limits that its provider''s answers told. Rows embedded before keep their vectors.';

CREATE FUNCTION autoembed.drop_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _used_by text;
BEGIN
    PERFORM autoembed._model(drop_model.name);
    SELECT string_agg(format('%s.%I', p.table_id, p.embedding_column), ', ' ORDER BY p.id)
    INTO _used_by
    FROM autoembed.pipeline AS p
    WHERE p.model = drop_model.name;
    IF _used_by IS NOT NULL OR autoembed._default_model() = drop_model.name THEN
        RAISE EXCEPTION USING
            ERRCODE = 'dependent_objects_still_exist',
            MESSAGE = format('model "%s" is in use', drop_model.name),
            DETAIL = coalesce('It embeds ' || _used_by || '.', 'It is the default model.'),
            HINT = 'Give these another model first; autoembed.set_default_model() changes the default one.';
    END IF;
    DELETE FROM autoembed.model AS m WHERE m.name = drop_model.name;
    PERFORM autoembed._build_embedders(drop_model.name);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.drop_model(text) IS 'Drops a model that nothing uses.';

CREATE FUNCTION autoembed.set_default_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    INSERT INTO autoembed.setting AS s (name, value)
    VALUES ('default_model', (autoembed._model(set_default_model.name)).name)
    ON CONFLICT ON CONSTRAINT setting_pkey DO UPDATE SET value = excluded.value;
    PERFORM autoembed._check_model(set_default_model.name);
    PERFORM autoembed._warn_of_blocked_pipelines();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.set_default_model(text) IS
    'Makes it the model of all pipelines and embed() calls that name none.';

CREATE FUNCTION autoembed.allow_http_host(host text, allowed boolean DEFAULT true)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _host text := lower(rtrim(allow_http_host.host, '.'));
    _hosts text[];
BEGIN
    IF coalesce(_host !~ '^([[:alnum:]_.-]+|[0-9a-f]*:[0-9a-f]*:[0-9a-f:.]*)$', true) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('"%s" is not the name or address of a host', allow_http_host.host),
            HINT = 'Leave out what stands before and after it in a URL, such as http:// and the port.';
    END IF;
    -- Two of these at a time would each lose the other's host.
    LOCK TABLE autoembed.setting IN SHARE ROW EXCLUSIVE MODE;
    _hosts := array_remove(autoembed._http_hosts(), _host);
    IF allow_http_host.allowed THEN
        _hosts := _hosts || _host;
    END IF;
    INSERT INTO autoembed.setting AS s (name, value)
    VALUES ('http_hosts', array_to_string(_hosts, ' '))
    ON CONFLICT ON CONSTRAINT setting_pkey DO UPDATE SET value = excluded.value;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.allow_http_host(text, boolean) IS
    'Allows models whose base_url has http and this host, or forbids it again: texts and keys then travel unencrypted. This machine needs no permission.';

CREATE FUNCTION autoembed.resume_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._model(resume_model.name);
    DELETE FROM autoembed.model_rest AS r WHERE r.model = resume_model.name;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.resume_model(text) IS 'Ends a model''s rest: the next pass calls its provider again.';

CREATE FUNCTION autoembed._rest_model(name text, seconds double precision, needs_attention boolean, reason text)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _is_new boolean;
BEGIN
    INSERT INTO autoembed.model_rest AS r (model, until, failures, needs_attention, reason)
    VALUES (_rest_model.name, clock_timestamp() + make_interval(secs => seconds), 1,
            _rest_model.needs_attention, _rest_model.reason)
    ON CONFLICT (model) DO UPDATE
    SET until = greatest(r.until, excluded.until),
        -- Requests side by side fail together: one failed try.
        failures = r.failures + (r.until <= clock_timestamp())::integer,
        needs_attention = excluded.needs_attention,
        reason = excluded.reason
    -- An update leaves a mark there.
    RETURNING r.xmax = 0 INTO _is_new;
    RETURN _is_new;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._rest_model(text, double precision, boolean, text) IS
    'Keeps all lanes from calling a model''s provider for so many seconds; whether its trouble is new.';

-- 22_embedders.sql: models of the provider "function", SQL functions of somebody's. They run with their owners' rights.

CREATE FUNCTION autoembed._embedder(
    model autoembed.model,
    purpose text,
    OUT function_name text,
    OUT function_id oid,
    OUT wrapper name,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _query_function text := CASE purpose WHEN 'query' THEN model.options ->> 'query_function' END;
    _named text := coalesce(_query_function, model.model_id);
    _parts text[];
BEGIN
    wrapper := format('_embed_%s_%s', CASE WHEN _query_function IS NULL THEN 'document' ELSE 'query' END, md5(model.name));
    BEGIN
        _parts := parse_ident(_named);
    EXCEPTION WHEN invalid_parameter_value THEN
        NULL;
    END;
    IF cardinality(_parts) IS DISTINCT FROM 2 THEN
        problem := format('model "%s" names the function "%s", which has to be a schema, a dot and a name', model.name, _named);
        hint := 'Write it as SQL does, in double quotes where they are needed, and without arguments.';
        errcode := 'invalid_parameter_value';
        RETURN;
    END IF;
    function_name := format('%I.%I', _parts[1], _parts[2]);
    function_id := to_regprocedure(function_name || '(pg_catalog.text[])');
    IF function_id IS NULL THEN
        problem := format('there is no function %s(text[])', function_name);
        hint := format('Create it; then SELECT autoembed.alter_model(%L).', model.name);
        errcode := CASE WHEN to_regproc(function_name) IS NULL THEN 'waits' ELSE 'undefined_function' END;
    ELSIF NOT EXISTS (
        SELECT FROM pg_proc AS p
        WHERE p.oid = function_id AND p.prokind = 'f' AND NOT p.proretset
          AND p.prorettype IN ('@extschema:vector@.vector[]'::regtype, '@extschema:vector@.halfvec[]'::regtype)
    ) THEN
        problem := format('function %s(text[]) does not return vector[] or halfvec[]', function_name);
        hint := 'It is given texts, and returns a vector for each, in their order.';
        errcode := 'datatype_mismatch';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._embedder(autoembed.model, text) IS
    'The function that a model names for documents or queries, the name of our own that runs it as its owner, and what is wrong with it. errcode waits: it may come yet.';

CREATE FUNCTION autoembed._build_embedders(name text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _built regprocedure;
    _embedder record;
BEGIN
    FOR _built IN
        SELECT p.oid FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname IN ('_embed_document_' || md5(name), '_embed_query_' || md5(name))
    LOOP
        EXECUTE format('DROP FUNCTION %s', _built);
    END LOOP;
    FOR _embedder IN
        SELECT e.*, f.proowner, f.prorettype, n.nspname
        FROM autoembed.model AS m
        JOIN unnest('{document,query}'::text[]) AS p(purpose) ON p.purpose = 'document' OR m.options ? 'query_function'
        CROSS JOIN LATERAL autoembed._embedder(m, p.purpose) AS e
        LEFT JOIN pg_proc AS f ON f.oid = e.function_id
        LEFT JOIN pg_namespace AS n ON n.oid = f.pronamespace
        WHERE m.name = _build_embedders.name AND m.provider = 'function'
    LOOP
        IF _embedder.errcode = 'waits' THEN
            RAISE WARNING USING
                ERRCODE = 'undefined_function',
                MESSAGE = format('model "%s" cannot be used yet: %s', name, _embedder.problem),
                HINT = _embedder.hint;
        ELSIF _embedder.problem IS NOT NULL THEN
            RAISE EXCEPTION USING MESSAGE = _embedder.problem, HINT = _embedder.hint, ERRCODE = _embedder.errcode;
        ELSE
            PERFORM autoembed._create_owned(
                pg_get_userbyid(_embedder.proowner), _embedder.wrapper || '(texts text[])', format_type(_embedder.prorettype, NULL),
                format('SET search_path = %I, public, pg_temp', _embedder.nspname), format('RETURN %s(texts);', _embedder.function_name));
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_embedders(text) IS
    'Makes the functions that run a model''s own as their owners, in place of those that there were; of a model that is gone, takes them away.';

CREATE FUNCTION autoembed._call_embedder(model text, purpose text, texts text[], OUT vectors bytea[], OUT fault text)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _embedder record;
BEGIN
    SELECT e.* INTO STRICT _embedder
    FROM autoembed._model(model) AS m
    CROSS JOIN LATERAL autoembed._embedder(m, purpose) AS e;
    fault := _embedder.problem;
    -- Another's function of that name would run as the owner of the one that a superuser has chosen.
    IF fault IS NULL AND NOT EXISTS (
        SELECT FROM pg_proc AS b
        JOIN pg_proc AS f ON f.oid = _embedder.function_id AND f.proowner = b.proowner
        WHERE b.pronamespace = 'autoembed'::regnamespace AND b.proname = _embedder.wrapper AND b.prosecdef
    ) THEN
        fault := format('function %s(text[]) was not there, or was not its owner''s, when the model was defined; SELECT autoembed.alter_model(%L) takes it as it is',
                        _embedder.function_name, model);
    END IF;
    IF fault IS NULL THEN
        -- One statement, read before the owner's code can change what its names mean; the last one, too.
        EXECUTE format('SELECT ARRAY(SELECT %1$s.vector_send(u.v::%1$s.vector) FROM pg_catalog.unnest(autoembed.%2$I($1)) WITH ORDINALITY AS u(v, n) ORDER BY u.n)',
                       '@extschema:vector@', _embedder.wrapper)
        INTO vectors
        USING texts;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._call_embedder(text, text, text[]) IS
    'What a model''s function makes of texts, in binary form; or why it is not called. To be rolled back: its owner''s code may have changed the session.';

CREATE FUNCTION autoembed._prepared()
    RETURNS text[]
    LANGUAGE sql
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT ARRAY(SELECT format('%L %s', p.name, p.statement) FROM pg_prepared_statements AS p);
$sql$;
COMMENT ON FUNCTION autoembed._prepared() IS 'The prepared statements of the session.';

CREATE FUNCTION autoembed._forget_prepared(known text[])
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _name text;
BEGIN
    FOR _name IN SELECT p.name FROM pg_prepared_statements AS p WHERE format('%L %s', p.name, p.statement) <> ALL (known) LOOP
        EXECUTE format('DEALLOCATE %I', _name);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_prepared(text[]) IS
    'Forgets the prepared statements that an owner''s code has left, which no rollback does, before the session''s user executes them by name.';

-- 25_limits.sql: how often a model may be asked and what it may use a day, for all sessions together.

CREATE FUNCTION autoembed._spent_budget(name text)
    RETURNS text
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT CASE WHEN u.tokens >= m.daily_token_budget
                THEN format('its budget of %s tokens a day is used up; the next day begins at 00:00 UTC', m.daily_token_budget)
                WHEN u.tokens * m.price_per_million_tokens >= m.daily_cost_budget * 1000000
                THEN format('its budget of %s a day is used up; the next day begins at 00:00 UTC', m.daily_cost_budget) END
    FROM autoembed.model AS m
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(t.tokens), 0) AS tokens
        FROM (
            SELECT d.tokens FROM autoembed.usage_day AS d WHERE d.model = m.name AND d.day = (clock_timestamp() AT TIME ZONE 'UTC')::date
            UNION ALL
            SELECT e.tokens FROM autoembed.usage_entry AS e WHERE e.model = m.name AND e.at >= date_trunc('day', clock_timestamp(), 'UTC')
        ) AS t
    ) AS u
    WHERE m.name = _spent_budget.name AND num_nonnulls(m.daily_token_budget, m.daily_cost_budget) > 0;
$sql$;
COMMENT ON FUNCTION autoembed._spent_budget(text) IS 'Why a model may use no more today; NULL: it may.';

CREATE FUNCTION autoembed._take_permit(
    model text,
    in_turn boolean,
    requests_seconds double precision,
    requests_saved_seconds double precision,
    tokens_seconds double precision,
    tokens_saved_seconds double precision,
    slots_held integer[],
    OUT wait_seconds double precision,
    OUT slot integer,
    OUT spent text,
    OUT rest_seconds double precision
)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _slots integer := (SELECT m.max_requests_in_flight FROM autoembed.model AS m WHERE m.name = _take_permit.model);
    _now timestamptz;
    _requests_until timestamptz;
    _tokens_until timestamptz;
BEGIN
    PERFORM autoembed._gate();
    spent := autoembed._spent_budget(_take_permit.model);
    IF spent IS NOT NULL THEN
        rest_seconds := extract(epoch FROM date_trunc('day', clock_timestamp(), 'UTC') + interval '1 day' - clock_timestamp());
        RETURN;
    END IF;
    IF _slots IS NOT NULL THEN
        -- A lock for each request in flight: seen by all sessions at once, and gone with the session.
        SELECT s.slot INTO slot
        FROM generate_series(1, _slots) AS s(slot)
        WHERE CASE WHEN s.slot <> ALL (slots_held) THEN pg_try_advisory_lock(autoembed._slot_key(_take_permit.model, s.slot)) END
        LIMIT 1;
        IF slot IS NULL THEN
            RETURN;
        END IF;
    END IF;
    wait_seconds := 0;
    IF num_nonnulls(requests_seconds, tokens_seconds) = 0 OR current_setting('transaction_read_only')::boolean THEN
        RETURN;
    END IF;
    IF in_turn THEN
        -- Until the lane's commit, which comes at once. A caller's transaction may last: it goes without, and what it takes is seen late.
        PERFORM pg_advisory_xact_lock(autoembed._slot_key(_take_permit.model, 0));
    END IF;
    _now := clock_timestamp();
    _requests_until := (SELECT max(p.requests_until) FROM autoembed.permit AS p WHERE p.model = _take_permit.model);
    _tokens_until := (SELECT max(p.tokens_until) FROM autoembed.permit AS p WHERE p.model = _take_permit.model);
    -- NULL where there is no limit; greatest() passes over a NULL.
    _requests_until := greatest(_requests_until, _now - make_interval(secs => requests_saved_seconds)) + make_interval(secs => requests_seconds);
    _tokens_until := greatest(_tokens_until, _now - make_interval(secs => tokens_saved_seconds)) + make_interval(secs => tokens_seconds);
    INSERT INTO autoembed.permit (model, at, requests_until, tokens_until)
    VALUES (_take_permit.model, _now, _requests_until, _tokens_until);
    wait_seconds := extract(epoch FROM greatest(_now, _requests_until, _tokens_until) - _now);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._take_permit(text, boolean, double precision, double precision, double precision, double precision, integer[]) IS
    'A permit for one request: in how many seconds, and the slot that it holds where only so many may be in flight, none of slots_held; both NULL: all are taken, or the budget is spent. What it takes is given in seconds of each allowance, with how much may have been saved up.';

CREATE FUNCTION autoembed._slot_key(model text, slot integer)
    RETURNS bigint
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT hashtextextended('autoembed ' || model, slot);
$sql$;
COMMENT ON FUNCTION autoembed._slot_key(text, integer) IS 'The advisory lock of a request in flight; 0: of taking turns.';

CREATE FUNCTION autoembed._free_slots(model text, slots integer[])
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT pg_advisory_unlock(autoembed._slot_key(_free_slots.model, s.slot)) FROM unnest(slots) AS s(slot);
$sql$;
COMMENT ON FUNCTION autoembed._free_slots(text, integer[]) IS 'Says that these requests are no longer in flight.';

CREATE FUNCTION autoembed._learn_limits(model text, requests_per_minute integer, requests_at_once integer, tokens_per_minute integer, tokens_at_once integer)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF NOT current_setting('transaction_read_only')::boolean THEN
        -- Unless it was dropped meanwhile.
        INSERT INTO autoembed.model_limit (model, requests_per_minute, requests_at_once, tokens_per_minute, tokens_at_once)
        SELECT m.name, _learn_limits.requests_per_minute, _learn_limits.requests_at_once,
               _learn_limits.tokens_per_minute, _learn_limits.tokens_at_once
        FROM autoembed.model AS m
        WHERE m.name = _learn_limits.model;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._learn_limits(text, integer, integer, integer, integer) IS
    'Notes the limits that an answer told; NULLs: it told none.';

CREATE FUNCTION autoembed._forget_permits()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF (SELECT min(p.at) FROM autoembed.permit AS p) < clock_timestamp() - interval '10 minutes' THEN
        DELETE FROM autoembed.permit AS p WHERE greatest(p.at, p.requests_until, p.tokens_until) < clock_timestamp() - interval '5 minutes';
        DELETE FROM autoembed.model_limit AS l
        WHERE EXISTS (SELECT FROM autoembed.model_limit AS n WHERE n.model = l.model AND n.at > l.at);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_permits() IS 'Forgets permits of some minutes ago, and limits that have changed since.';

-- 30_pipelines.sql: what a pipeline is: the keys of its rows, their text, and whether it can be embedded as things stand.

CREATE FUNCTION autoembed._content_function(table_id oid, name text)
    RETURNS oid
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _found oid[];
BEGIN
    -- The table's own schema comes first, as the caller's search_path is not known here.
    SELECT array_agg(f.oid ORDER BY f.same_schema DESC, f.oid)
    INTO _found
    FROM (
        SELECT p.oid, p.pronamespace = c.relnamespace AS same_schema
        FROM pg_class AS c
        -- By its name without a schema first, which has an index.
        JOIN pg_proc AS p
            ON p.proname IN (name, substring(name FROM '^"(.*)"$'), substring(name FROM '[.]([^.]*)$'), substring(name FROM '[.]"(.*)"$'))
           AND p.proargtypes[0] = c.reltype AND p.pronargs = 1 AND p.prokind = 'f' AND NOT p.proretset
        JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE c.oid = table_id
          AND name IN (p.proname::text, quote_ident(p.proname), format('%s.%s', n.nspname, p.proname), format('%I.%I', n.nspname, p.proname))
    ) AS f;
    RETURN _found[1];
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_function(oid, text) IS
    'The function of one row of the table with that name, which may name its schema; NULL if there is none.';

CREATE FUNCTION autoembed._content_function_of(pipeline autoembed.pipeline)
    RETURNS oid
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- One that was dropped and made again has another OID, but the same name.
    RETURN coalesce((SELECT p.oid FROM pg_proc AS p WHERE p.oid = pipeline.content_function_id),
                    autoembed._content_function(pipeline.table_id, pipeline.content_function));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_function_of(autoembed.pipeline) IS 'The content function of a pipeline; NULL if there is none.';

CREATE FUNCTION autoembed._key_columns(table_id oid)
    RETURNS name[]
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT k.columns
    FROM pg_index AS i
    CROSS JOIN LATERAL (
        SELECT array_agg(a.attname ORDER BY n.position) AS columns, bool_and(a.attnotnull) AS not_null
        FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS n(number, position)
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = n.number
        WHERE n.position <= i.indnkeyatts
    ) AS k
    WHERE i.indrelid = table_id AND i.indisunique AND i.indisvalid
      AND i.indpred IS NULL AND i.indexprs IS NULL AND k.not_null
    ORDER BY i.indisprimary DESC, i.indisreplident DESC, i.indimmediate DESC, i.indnkeyatts, i.indexrelid
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._key_columns(oid) IS
    'The columns that tell the rows of a table apart: its primary key, else its replica identity, else a unique index without NULLs; NULL if there is none.';

CREATE FUNCTION autoembed._template(template text)
    RETURNS TABLE (literal text, column_name text)
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY
    SELECT CASE
               WHEN t.part[1] IN ('{{', '}}', '\\') THEN left(t.part[1], 1)
               WHEN t.part[1] = '\n' THEN E'\n'
               WHEN t.part[2] IS NULL THEN t.part[1]
           END,
           replace(t.part[2], '""', '"')
    FROM regexp_matches(template, '(\{\{|\}\}|\\\\|\\n|\{([^{}]+)\}|[^{}\\]+|.)', 'g') WITH ORDINALITY AS t(part, position)
    ORDER BY t.position;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._template(text) IS
    'The parts of a template in order: literal text, or a column. {{ and }} are braces, \n is a line break, \\ a backslash.';

CREATE FUNCTION autoembed._columns_of(pipeline autoembed.pipeline)
    RETURNS name[]
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce(
        pipeline.content_columns,
        (SELECT array_agg(DISTINCT t.column_name::name) FROM autoembed._template(pipeline.content_template) AS t
         WHERE t.column_name IS NOT NULL),
        '{}'
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._columns_of(autoembed.pipeline) IS 'The columns that a pipeline names as its content.';

CREATE FUNCTION autoembed._needed_columns(pipeline autoembed.pipeline)
    RETURNS name[]
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN pipeline.key_columns || autoembed._columns_of(pipeline)
        || ARRAY(SELECT c.value::name FROM jsonb_each_text(pipeline.condition_columns) AS c);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._needed_columns(autoembed.pipeline) IS
    'The columns without which a pipeline cannot work, its embedding column aside.';

CREATE FUNCTION autoembed._missing_object(pipeline autoembed.pipeline)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT concat_ws(' ', o.value ->> 'type', o.key)
        FROM jsonb_each(pipeline.condition_objects) AS o
        WHERE NOT EXISTS (
            SELECT FROM (
                SELECT 'pg_proc'::regclass AS class, p.oid FROM pg_proc AS p WHERE p.proname = o.value ->> 'name'
                UNION ALL
                SELECT 'pg_operator'::regclass, p.oid FROM pg_operator AS p WHERE p.oprname = o.value ->> 'name'
                UNION ALL
                SELECT 'pg_type'::regclass, t.oid FROM pg_type AS t WHERE t.typname = o.value ->> 'name'
                UNION ALL
                SELECT 'pg_collation'::regclass, c.oid FROM pg_collation AS c WHERE c.collname = o.value ->> 'name'
            ) AS c
            CROSS JOIN LATERAL pg_identify_object(c.class, c.oid, 0) AS i
            -- Made anew it is as good. The types that it takes may have other names since: the condition does not tell them.
            WHERE i.identity = o.key
               OR c.oid::text = o.value ->> 'oid' AND split_part(i.identity, '(', 1) = split_part(o.key, '(', 1)
        )
        ORDER BY o.key
        LIMIT 1
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._missing_object(autoembed.pipeline) IS
    'A function, operator, type or collation of a pipeline''s condition that no longer has the name that it has there; NULL if there is none.';

CREATE FUNCTION autoembed._operator(table_id oid, column_name name, strategy integer)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Not in SQL, which would be planned anew for each claim: 1 ms.
    -- As the index has it: the name alone might mean another operator, or none, where the type is not in a schema searched.
    RETURN coalesce((
        SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname)
        FROM pg_index AS i
        CROSS JOIN LATERAL unnest(i.indkey::smallint[], i.indclass::oid[]) AS k(number, class)
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.number AND a.attname = column_name
        JOIN pg_opclass AS c ON c.oid = k.class
        JOIN pg_amop AS m ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype
                         AND m.amopstrategy = strategy
        JOIN pg_am ON pg_am.oid = m.amopmethod AND pg_am.amname = 'btree'
        JOIN pg_operator AS o ON o.oid = m.amopopr
        JOIN pg_namespace AS n ON n.oid = o.oprnamespace
        WHERE i.indrelid = table_id AND i.indisunique
        ORDER BY i.indisprimary DESC, i.indisreplident DESC, i.indexrelid
        LIMIT 1
    ), CASE strategy WHEN 3 THEN '=' ELSE '>' END);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._operator(oid, name, integer) IS
    'The operator by which a key column is compared: 3 for equal, 5 for greater, as B-tree strategies are numbered.';

CREATE FUNCTION autoembed._content_expression(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _columns text;
    _text text;
BEGIN
    -- Output functions, not casts: a cast to text may be the owner's, and triggers evaluate this with more rights than his.
    -- An empty string is as good as none.
    SELECT string_agg(format('nullif(pg_catalog.concat(%s.%I), '''')', alias, c.name), ', ' ORDER BY c.position) INTO _columns
    FROM unnest(autoembed._columns_of(pipeline)) WITH ORDINALITY AS c(name, position);
    IF pipeline.content_columns IS NOT NULL THEN
        _text := format('pg_catalog.concat_ws(%L, %s)', E'\n\n', _columns);
    ELSIF pipeline.content_template IS NOT NULL THEN
        SELECT format('CASE WHEN pg_catalog.num_nonnulls(%s) OPERATOR(pg_catalog.>) 0 THEN pg_catalog.concat(%s) END', _columns,
                      string_agg(CASE WHEN t.column_name IS NULL THEN quote_literal(t.literal) ELSE format('%s.%I', alias, t.column_name) END, ', '))
        INTO _text
        FROM autoembed._template(pipeline.content_template) AS t;
    ELSE
        SELECT format('%I.%I(%s)::pg_catalog.text', n.nspname, p.proname, alias) INTO _text
        FROM pg_proc AS p
        JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE p.oid = autoembed._content_function_of(pipeline);
        -- One that is gone is an error in whatever calls it, and nobody can make it where this looks.
        _text := coalesce(_text, format('autoembed.%I(%s)', pipeline.content_function, alias));
    END IF;
    IF pipeline.condition IS NOT NULL THEN
        _text := format('CASE WHEN (SELECT (%s) FROM (SELECT %s) AS r) THEN %s END', pipeline.condition, (
            SELECT string_agg(format('%s.%I AS %I', alias, c.value, c.key), ', ') FROM jsonb_each_text(pipeline.condition_columns) AS c
        ), _text);
    END IF;
    RETURN _text;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_expression(autoembed.pipeline, text) IS
    'The SQL expression that gives the text of the row of that alias; NULL in rows that have no embedding.';

CREATE FUNCTION autoembed._key_expression(pipeline autoembed.pipeline, alias text)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN (
        SELECT format('pg_catalog.concat(''['', %s, '']'')', string_agg(
            CASE WHEN coalesce(nullif(t.typbasetype, 0), t.oid) IN ('bigint'::regtype, 'integer'::regtype, 'smallint'::regtype)
                 THEN format('%s.%I', alias, k.name)
                 ELSE format('pg_catalog.to_json(pg_catalog.concat(%s.%I))', alias, k.name)
            END, ', '','', ' ORDER BY k.position))
        FROM unnest(pipeline.key_columns) WITH ORDINALITY AS k(name, position)
        JOIN pg_attribute AS a ON a.attrelid = pipeline.table_id AND a.attname = k.name
        JOIN pg_type AS t ON t.oid = a.atttypid
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._key_expression(autoembed.pipeline, text) IS
    'The SQL expression that gives the key of the row of that alias as a JSON array.';

CREATE FUNCTION autoembed._vector_index(table_id regclass, embedding_column name)
    RETURNS SETOF pg_index
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT i.*
    FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indexrelid
    JOIN pg_am AS m ON m.oid = c.relam AND m.amname IN ('hnsw', 'ivfflat')
    JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attname = _vector_index.embedding_column
    WHERE i.indrelid = _vector_index.table_id
      -- Of the column, or of an expression with it.
      AND (a.attnum = i.indkey[0] OR i.indkey[0] = 0 AND EXISTS (
          SELECT FROM pg_depend AS d
          WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid AND d.refobjsubid = a.attnum
      ))
    ORDER BY i.indisvalid DESC
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._vector_index(regclass, name) IS
    'The index on the embeddings of a table or partition, a valid one first; no row if there is none.';

CREATE FUNCTION autoembed._index_key(pipeline autoembed.pipeline, OUT key text, OUT expression text, OUT problem text, OUT hint text)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _type name;
    _dimensions integer;
BEGIN
    SELECT t.typname, nullif(a.atttypmod, -1) INTO STRICT _type, _dimensions
    FROM pg_attribute AS a
    JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = pipeline.table_id AND a.attname = pipeline.embedding_column;
    IF _dimensions IS NULL THEN
        _dimensions := autoembed._dimensions(pipeline.model);
        problem := format('column "%s" of table %s has no dimensions, which an HNSW index needs', pipeline.embedding_column, pipeline.table_id);
        hint := format('ALTER TABLE %s ALTER COLUMN %I TYPE @extschema:vector@.%s(%s);',
                       pipeline.table_id, pipeline.embedding_column, _type, _dimensions);
    END IF;
    expression := quote_ident(pipeline.embedding_column);
    -- pgvector's limits of an HNSW index.
    IF _dimensions > 4000 THEN
        problem := format('embeddings of %s dimensions cannot have an HNSW index, which takes up to 4000', _dimensions);
        hint := 'Many models give shorter ones: autoembed.create_model(…, dimensions => 1024).';
    ELSIF _type = 'vector' AND _dimensions > 2000 THEN
        expression := format('%s::@extschema:vector@.halfvec(%s)', expression, _dimensions);
        key := format('(%s) @extschema:vector@.halfvec_cosine_ops', expression);
    ELSE
        key := format('%s @extschema:vector@.%s_cosine_ops', expression, _type);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._index_key(autoembed.pipeline) IS
    'What an HNSW index on a pipeline''s embeddings is built on, NULL: none can be; the expression by which queries use it; what is in its way, and what to do before.';

CREATE FUNCTION autoembed._check_pipeline(pipeline autoembed.pipeline, OUT problem text, OUT hint text, OUT errcode text)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table pg_class;
    _function pg_proc;
    _missing text;
    _type text;
    _type_dimensions integer;
    _generated boolean;
    _model autoembed.model;
BEGIN
    SELECT c.* INTO _table FROM pg_class AS c WHERE c.oid = pipeline.table_id;
    IF NOT FOUND THEN
        problem := format('the table with OID %s no longer exists', pipeline.table_id::oid);
        hint := 'It is ended by the next lane, or by SELECT autoembed.process().';
        errcode := 'undefined_table';
        RETURN;
    END IF;
    IF _table.relkind NOT IN ('r', 'p') THEN
        problem := format('%s is not a table', pipeline.table_id);
        hint := 'Only tables and partitioned tables hold embeddings.';
        errcode := 'wrong_object_type';
        RETURN;
    END IF;
    IF pipeline.managed AND cardinality(pipeline.key_columns) = 0 THEN
        problem := format('table %s has no key to find its rows by', pipeline.table_id);
        hint := format('Add a primary key, or a unique index on columns that are NOT NULL: ALTER TABLE %s ADD COLUMN id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY.', pipeline.table_id);
        errcode := 'object_not_in_prerequisite_state';
        RETURN;
    END IF;
    SELECT k.name INTO _missing
    FROM unnest(autoembed._needed_columns(pipeline)) WITH ORDINALITY AS k(name, position)
    WHERE NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = _table.oid AND a.attname = k.name AND a.attnum > 0 AND NOT a.attisdropped
    )
    ORDER BY k.position
    LIMIT 1;
    IF FOUND THEN
        problem := format('table %s has no column "%s"', pipeline.table_id, _missing);
        hint := CASE
            WHEN pipeline.managed THEN
                (SELECT 'Its columns are: ' || string_agg(a.attname, ', ' ORDER BY a.attnum) || '.'
                 FROM pg_attribute AS a
                 WHERE a.attrelid = _table.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attname <> pipeline.embedding_column)
            ELSE 'queue_embeddings() finds rows by a primary key column called id.'
        END;
        errcode := 'undefined_column';
        RETURN;
    END IF;

    IF _table.relforcerowsecurity AND _table.relrowsecurity
       AND NOT (SELECT r.rolsuper OR r.rolbypassrls FROM pg_roles AS r WHERE r.oid = _table.relowner)
       AND (SELECT NOT coalesce(bool_or(p.polpermissive AND p.polcmd = '*' AND pg_get_expr(p.polqual, p.polrelid) = 'true'), false)
                   OR NOT bool_and(p.polpermissive)
            FROM pg_policy AS p
            WHERE p.polrelid = _table.oid
              -- Those that bind him: for PUBLIC, or for a role that he has the rights of.
              AND EXISTS (SELECT FROM unnest(p.polroles) AS r(id) WHERE r.id = 0 OR pg_has_role(_table.relowner, r.id, 'USAGE'))) THEN
        problem := format('row level security is forced on the owner of table %s and may hide rows from him', pipeline.table_id);
        hint := format('Let him see all: CREATE POLICY embeddings ON %s TO %I USING (true), without restrictive policies; or ALTER TABLE %s NO FORCE ROW LEVEL SECURITY.',
                       pipeline.table_id, pg_get_userbyid(_table.relowner), pipeline.table_id);
        errcode := 'waits';
        RETURN;
    END IF;

    SELECT CASE WHEN e.oid IS NOT NULL THEN t.typname ELSE format_type(a.atttypid, a.atttypmod) END, a.atttypmod, a.attgenerated <> ''
    INTO _type, _type_dimensions, _generated
    FROM pg_attribute AS a
    JOIN pg_type AS t ON t.oid = a.atttypid
    LEFT JOIN pg_extension AS e ON e.extname = 'vector' AND e.extnamespace = t.typnamespace
    WHERE a.attrelid = _table.oid AND a.attname = pipeline.embedding_column AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        problem := format('table %s has no column "%s"', pipeline.table_id, pipeline.embedding_column);
        hint := format('Add it: ALTER TABLE %s ADD COLUMN %I halfvec(%s).',
                       pipeline.table_id, pipeline.embedding_column, (autoembed._model(pipeline.model)).dimensions);
        errcode := 'undefined_column';
        RETURN;
    END IF;
    IF _type NOT IN ('vector', 'halfvec') OR _generated THEN
        problem := format('column "%s" of table %s is %s', pipeline.embedding_column, pipeline.table_id,
                          CASE WHEN _generated THEN 'a generated column' ELSE 'of type ' || _type END);
        hint := 'An embedding column is of type halfvec or vector.';
        errcode := 'datatype_mismatch';
        RETURN;
    END IF;
    IF pipeline.embedding_column = ANY (autoembed._columns_of(pipeline)) THEN
        problem := format('column "%s" cannot be its own content', pipeline.embedding_column);
        hint := 'Leave it out of the content.';
        errcode := 'invalid_parameter_value';
        RETURN;
    END IF;

    IF pipeline.on_change = 'clear' AND EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = _table.oid AND a.attname = pipeline.embedding_column AND a.attnotnull AND NOT a.attisdropped
    ) THEN
        problem := format('column "%s" of table %s is NOT NULL and cannot be cleared', pipeline.embedding_column, pipeline.table_id);
        hint := 'Use on_change => ''keep'', or drop the constraint.';
        errcode := 'invalid_parameter_value';
        RETURN;
    END IF;
    -- A BEFORE trigger sees no generated column; what a function reads is not known.
    IF pipeline.on_change = 'clear' AND EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = _table.oid AND a.attgenerated <> '' AND NOT a.attisdropped
          AND (a.attname = ANY (autoembed._needed_columns(pipeline)) OR pipeline.content_function IS NOT NULL)
    ) THEN
        problem := format('on_change => ''clear'' does not work with the generated columns of table %s', pipeline.table_id);
        hint := 'Use on_change => ''keep'', or columns that are not generated.';
        errcode := 'feature_not_supported';
        RETURN;
    END IF;

    IF pipeline.content_function IS NOT NULL THEN
        SELECT p.* INTO _function FROM pg_proc AS p WHERE p.oid = autoembed._content_function_of(pipeline);
        IF NOT FOUND THEN
            problem := format('there is no function "%s" of one row of %s', pipeline.content_function, pipeline.table_id);
            hint := format('Create it: CREATE FUNCTION %s(%s) RETURNS text.', pipeline.content_function, pipeline.table_id);
            errcode := 'undefined_function';
            RETURN;
        END IF;
        IF (SELECT t.typcategory FROM pg_type AS t WHERE t.oid = _function.prorettype) <> 'S' THEN
            problem := format('function %s returns %s', _function.oid::regprocedure, format_type(_function.prorettype, NULL));
            hint := 'A content function returns text.';
            errcode := 'datatype_mismatch';
            RETURN;
        END IF;
        -- It will run as the table's owner, so it must come from somebody who already has the owner's rights.
        IF NOT pg_has_role(_function.proowner, _table.relowner, 'MEMBER') THEN
            problem := format('function %s belongs to %I, who has not the rights of %I, the owner of table %s',
                              _function.oid::regprocedure, pg_get_userbyid(_function.proowner),
                              pg_get_userbyid(_table.relowner), pipeline.table_id);
            hint := format('Make it the table owner''s: ALTER FUNCTION %s OWNER TO %I.',
                           _function.oid::regprocedure, pg_get_userbyid(_table.relowner));
            errcode := 'insufficient_privilege';
            RETURN;
        END IF;
    END IF;

    _missing := autoembed._missing_object(pipeline);
    IF _missing IS NOT NULL THEN
        problem := format('the condition on table %s uses %s, which is gone or has another name', pipeline.table_id, _missing);
        hint := format('Bring it back, or give the condition anew: SELECT autoembed.alter_pipeline(%L, condition => …).', pipeline.table_id);
        errcode := 'waits';
        RETURN;
    END IF;

    _model := autoembed._model(pipeline.model);
    IF _type_dimensions NOT IN (-1, _model.dimensions) THEN
        problem := format('column "%s" of table %s has %s dimensions, model "%s" has %s',
                          pipeline.embedding_column, pipeline.table_id, _type_dimensions, _model.name, _model.dimensions);
        hint := format('Change the column: ALTER TABLE %s ALTER COLUMN %I TYPE %s(%s) USING NULL; or the model: SELECT %s.',
                       pipeline.table_id, pipeline.embedding_column, _type, _model.dimensions,
                       CASE WHEN pipeline.managed THEN format('autoembed.alter_pipeline(%L, model => …)', pipeline.table_id)
                            ELSE 'autoembed.set_default_model(…)' END);
        -- Not an error of the pipeline: another model cures it at any time.
        errcode := 'waits';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_pipeline(autoembed.pipeline) IS
    'Why the column cannot be embedded as things stand, and what to do; NULLs if it can. errcode waits: the jobs wait for a change.';

CREATE VIEW autoembed._pipeline_state AS
SELECT p.id,
       p.table_id,
       p.embedding_column,
       p.content_function,
       p.truncate,
       p.paused,
       coalesce(p.model, autoembed._default_model()) AS model,
       coalesce(c.problem, CASE WHEN p.paused THEN 'it is paused' WHEN r.until > clock_timestamp() THEN format('model "%s" rests: %s', r.model, r.reason) END)
           AS blocked,
       coalesce(c.hint, CASE WHEN p.paused THEN format('SELECT autoembed.resume(%L).', p.table_id)
                             WHEN r.needs_attention THEN format('SELECT autoembed.resume_model(%L) tries it at once.', r.model) END)
           AS hint,
       c.problem IS NULL AS sound,
       coalesce(r.failures, 0) AS failures
FROM autoembed.pipeline AS p
CROSS JOIN LATERAL autoembed._check_pipeline(p) AS c
LEFT JOIN autoembed.model_rest AS r ON r.model = coalesce(p.model, autoembed._default_model());
COMMENT ON VIEW autoembed._pipeline_state IS 'Every pipeline, and why its jobs wait, if they do.';

CREATE FUNCTION autoembed._warn_of_blocked_pipelines(only_with_jobs boolean DEFAULT false, resting text[] DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _state record;
BEGIN
    IF resting IS NOT NULL THEN
        -- For the server's log: a lane's client is pg_cron, which would write it there again.
        PERFORM set_config('client_min_messages', 'error', true);
    END IF;
    FOR _state IN
        SELECT s.*
        FROM autoembed.pipeline AS p
        JOIN autoembed._pipeline_state AS s ON s.id = p.id AND s.blocked IS NOT NULL AND NOT s.paused
        WHERE (resting IS NULL OR CASE WHEN s.sound THEN s.model = ANY (resting) ELSE resting = '{}' END)
          AND (NOT only_with_jobs
               OR EXISTS (SELECT FROM pgmq.q_embedding_jobs AS q WHERE coalesce(q.message ->> 'pipeline', '') = p.id::text))
        ORDER BY p.id
    LOOP
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('%s.%I is not being embedded: %s', _state.table_id, _state.embedding_column, _state.blocked),
            HINT = coalesce(_state.hint, 'Its jobs are kept, and go on by themselves.');
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._warn_of_blocked_pipelines(boolean, text[]) IS
    'Says which pipelines wait, why, and what to do. With resting, for lanes, in the server''s log: those that wait for one of these models, or, with none, for no model.';

-- 31_build.sql: the functions made for a pipeline. Those that read texts and write vectors run with its table owner's rights.

CREATE FUNCTION autoembed._output_settings()
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT $$SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres' SET extra_float_digits = 1 SET bytea_output = 'hex'$$;
$sql$;
COMMENT ON FUNCTION autoembed._output_settings() IS
    'The settings of functions in which a text or a key must look the same whatever the session''s are.';

CREATE FUNCTION autoembed._create_owned(owner name, signature text, returns text, options text, body text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _function regprocedure;
BEGIN
    -- The body is quoted as a whole, so that no name in it can end it. An owner's code that raises a cancel or a shutdown
    -- would be taken for a real one, and end every pass.
    EXECUTE format('CREATE FUNCTION autoembed.%s RETURNS %s LANGUAGE plpgsql SECURITY DEFINER %s AS %L', signature, returns, options, format($body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
%s
EXCEPTION WHEN operator_intervention OR insufficient_resources OR system_error THEN
    GET STACKED DIAGNOSTICS _context = PG_EXCEPTION_CONTEXT;
    IF pg_catalog.split_part(_context, E'\n', 1) LIKE '%% at RAISE' THEN
        RAISE EXCEPTION USING MESSAGE = SQLERRM;
    END IF;
    RAISE;
END;$body$, body));
    SELECT p.oid INTO STRICT _function
    FROM pg_proc AS p
    WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname = split_part(signature, '(', 1);
    EXECUTE format('ALTER FUNCTION %s OWNER TO %I', _function, owner);
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', _function);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._create_owned(name, text, text, text, text) IS
    'Makes a function that runs with the rights of a table''s owner, for lanes alone.';

CREATE FUNCTION autoembed._drop_functions(pipeline_id integer, with_capture boolean)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    _function regprocedure;
BEGIN
    FOR _function IN
        SELECT p.oid
        FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace
          AND (p.proname IN ('_content_' || pipeline_id, '_write_' || pipeline_id, '_scan_' || pipeline_id, '_text_' || pipeline_id)
               OR with_capture AND p.proname IN ('_capture_' || pipeline_id, '_clear_' || pipeline_id))
    LOOP
        -- Its triggers go with a trigger function.
        EXECUTE format('DROP FUNCTION %s %s', _function, CASE WHEN with_capture THEN 'CASCADE' END);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_functions(integer, boolean) IS
    'Drops the functions made for a pipeline; with_capture: those of its triggers, and the triggers, too.';

CREATE FUNCTION autoembed._build_pipeline(pipeline_id integer)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _owner name;
    _table text;
    _vector_type text;
    _options text;
    -- Of the row t: its text, its key as a JSON array, its key columns; the same of a key s.key that was sent.
    _content text;
    _key_json text;
    _keys text;
    _sent_keys text;
    _same_key text;
    _later_key text;
    _model text;
    _from text;
    _ready boolean;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    _content := autoembed._content_expression(_pipeline, 't');
    _key_json := autoembed._key_expression(_pipeline, 't');
    -- Rows of tables that inherit from it have keys of their own.
    SELECT CASE c.relkind WHEN 'r' THEN 'ONLY ' ELSE '' END || c.oid::regclass::text, pg_get_userbyid(c.relowner), format_type(e.atttypid, NULL),
           -- What a key or a text looks like must not depend on the session.
           format('SET search_path = %I, public, pg_temp %s', n.nspname, autoembed._output_settings())
    INTO STRICT _table, _owner, _vector_type, _options
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_attribute AS e ON e.attrelid = c.oid AND e.attname = _pipeline.embedding_column AND NOT e.attisdropped
    WHERE c.oid = _pipeline.table_id;
    SELECT string_agg(format('t.%I', k.name), ', ' ORDER BY k.position),
           string_agg(format('(s.key::pg_catalog.jsonb ->> %s)::%s AS k%s', k.position - 1, format_type(a.atttypid, a.atttypmod), k.position),
                      ', ' ORDER BY k.position),
           string_agg(format('t.%I %s s.k%s', k.name, autoembed._operator(_pipeline.table_id, k.name, 3), k.position), ' AND ' ORDER BY k.position),
           -- One row comparison goes by the index; operators of several schemas take it in pieces.
           CASE WHEN bool_and(autoembed._operator(_pipeline.table_id, k.name, 5) IN ('OPERATOR(pg_catalog.>)', '>'))
                THEN format('ROW(%s) OPERATOR(pg_catalog.>) ROW(%s)', string_agg(format('t.%I', k.name), ', ' ORDER BY k.position), string_agg('s.k' || k.position, ', ' ORDER BY k.position))
                ELSE string_agg(format('%st.%I %s s.k%s', (
                         SELECT string_agg(format('t.%I %s s.k%s AND ', e.name, autoembed._operator(_pipeline.table_id, e.name, 3), e.position), '')
                         FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS e(name, position) WHERE e.position < k.position
                     ), k.name, autoembed._operator(_pipeline.table_id, k.name, 5), k.position), ' OR ' ORDER BY k.position)
           END
    INTO STRICT _keys, _sent_keys, _same_key, _later_key
    FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS k(name, position)
    JOIN pg_attribute AS a ON a.attrelid = _pipeline.table_id AND a.attname = k.name;

    _model := autoembed._model_identity(autoembed._model(_pipeline.model));

    _from := concat_ws(' ', _table, _owner, _options, _keys, _sent_keys, _pipeline.embedding_column, _vector_type, _content, _model);
    SELECT count(*) = 3 INTO _ready
    FROM pg_proc AS p
    JOIN pg_roles AS o ON o.oid = p.proowner AND o.rolname = _owner
    WHERE p.pronamespace = 'autoembed'::regnamespace
      AND p.proname IN ('_content_' || pipeline_id, '_write_' || pipeline_id, '_scan_' || pipeline_id)
      AND p.prosecdef;
    IF _ready AND _pipeline.built_from = _from THEN
        RETURN;
    END IF;
    PERFORM autoembed._drop_functions(pipeline_id, false);

    PERFORM autoembed._create_owned(_owner, format('_content_%s(keys text[])', pipeline_id),
        'TABLE (key text, content text, has_embedding boolean)', _options, format($body$
    -- Whoever has locked the table as a whole is not waited for; and what could not be written is not embedded.
    LOCK TABLE %3$s IN ROW EXCLUSIVE MODE NOWAIT;
    RETURN QUERY
    SELECT s.key, %1$s, t.%2$I IS NOT NULL
    FROM (SELECT s.key, %4$s FROM pg_catalog.unnest(keys) AS s(key)) AS s
    JOIN %3$s AS t ON %5$s;
$body$, _content, _pipeline.embedding_column, _table, _sent_keys, _same_key));

    PERFORM autoembed._create_owned(_owner, format('_scan_%s(after text, condition text, max_rows integer)', pipeline_id),
        'TABLE (key text)', _options, format($body$
    LOCK TABLE %1$s IN ACCESS SHARE MODE NOWAIT;
    FOR key IN EXECUTE pg_catalog.concat(
        %2$L,
        CASE WHEN after IS NOT NULL THEN %3$L END,
        CASE WHEN condition IS NOT NULL THEN pg_catalog.concat(' AND (', condition, ')') END,
        %4$L
    ) USING after, max_rows LOOP
        RETURN NEXT;
        max_rows := max_rows - 1;
        EXIT WHEN max_rows = 0;
    END LOOP;
$body$, _table,
        -- Of the first key there is nothing before.
        format('SELECT %s FROM %s AS t CROSS JOIN LATERAL (SELECT %s FROM (SELECT $1 AS key) AS s) AS s WHERE true', _key_json, _table, _sent_keys),
        format(' AND (%s)', _later_key),
        format(' ORDER BY %s LIMIT $2', _keys)));

    -- Rows that somebody else has locked are left out: embeddings never wait for an application, nor two lanes for each other.
    -- Triggers deferred to the commit would run as the lane, so they run at the end of this.
    PERFORM autoembed._create_owned(_owner, format('_write_%s(keys text[], contents text[], model text, embeddings %s[])', pipeline_id, _vector_type),
        'TABLE (key text, outcome text)', format('%s SET autoembed.writing = %L', _options, _pipeline.table_id::oid), format($body$
    -- Asked for before its model was changed: that of now may have been faster.
    IF model IS DISTINCT FROM %7$L THEN
        RETURN QUERY SELECT s.key, 'changed' FROM unnest(keys) AS s(key);
        RETURN;
    END IF;
    LOCK TABLE %3$s IN ROW EXCLUSIVE MODE NOWAIT;
    FOR key, outcome IN
    WITH sent AS MATERIALIZED (
        SELECT s.key, s.content, s.embedding, %4$s
        FROM unnest(keys, contents, embeddings) AS s(key, content, embedding)
    ),
    locked AS MATERIALIZED (
        SELECT s.*, %1$s COLLATE "C" IS NOT DISTINCT FROM s.content AS unchanged
        FROM sent AS s
        JOIN %3$s AS t ON %5$s
        ORDER BY %6$s
        FOR NO KEY UPDATE OF t SKIP LOCKED
    ),
    written AS (
        UPDATE %3$s AS t
        SET %2$I = s.embedding
        FROM locked AS s
        WHERE %5$s AND s.unchanged
        RETURNING s.key, %1$s COLLATE "C" IS NOT DISTINCT FROM s.content AS unchanged
    )
    SELECT s.key,
           CASE WHEN w.unchanged THEN 'written'
                WHEN w.key IS NOT NULL THEN 'overtaken'
                WHEN l.key IS NOT NULL THEN 'changed'
                WHEN EXISTS (SELECT FROM %3$s AS t WHERE %5$s) THEN 'locked'
                ELSE 'gone'
           END
    FROM sent AS s
    LEFT JOIN locked AS l ON l.key = s.key
    LEFT JOIN (SELECT w.key, pg_catalog.bool_and(w.unchanged) AS unchanged FROM written AS w GROUP BY w.key) AS w
        ON w.key = s.key
    LOOP
        -- Undone, as it would leave the vector of one text beside another.
        IF outcome = 'overtaken' THEN
            RAISE EXCEPTION 'a trigger of the table changes the text when its embedding is written';
        END IF;
        RETURN NEXT;
    END LOOP;
    IF EXISTS (SELECT FROM pg_catalog.pg_trigger AS g WHERE g.tgdeferrable AND NOT g.tgisinternal)
       OR EXISTS (SELECT FROM pg_catalog.pg_constraint AS c WHERE c.contype = 'x' AND c.condeferrable) THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
$body$, _content, _pipeline.embedding_column, _table, _sent_keys, _same_key, _keys, _model));

    IF _pipeline.managed THEN
        PERFORM autoembed._build_capture(_pipeline, _owner, _options);
    END IF;
    UPDATE autoembed.pipeline AS p SET built_from = _from WHERE p.id = pipeline_id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_pipeline(integer) IS
    'Makes the functions that read a pipeline''s texts and write its vectors, if they are missing or the table has changed.';

CREATE FUNCTION autoembed._build_capture(pipeline autoembed.pipeline, owner name, options text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _runs_owners_code boolean := num_nonnulls(pipeline.content_function, pipeline.condition) > 0;
    _key_changed text;
    _text_changed text;
    -- A row whose key is NULL, now that it may be, cannot be found again.
    _has_key text := (SELECT format('ROW(%s) IS NOT NULL', string_agg(format('%%1$s.%I', k.name), ', ')) FROM unnest(pipeline.key_columns) AS k(name));
    _new_rows text := format('SELECT %s AS key FROM new_rows AS n WHERE %s', autoembed._key_expression(pipeline, 'n'), format(_has_key, 'n'));
    _enqueue text;
    _options text := 'SECURITY DEFINER SET search_path = pg_catalog, pg_temp';
BEGIN
    -- These run as the extension's owner, so that whoever writes the table needs no rights of ours; and so they compare values as
    -- they are stored, which calls no code of a type's. What is the owner's code runs in _text_N, as the owner.
    SELECT format('record_image_ne(ROW(%s), ROW(%s))', string_agg(format('OLD.%I', k.name), ', '), string_agg(format('NEW.%I', k.name), ', '))
    INTO _key_changed
    FROM unnest(pipeline.key_columns) AS k(name);

    IF _runs_owners_code THEN
        PERFORM autoembed._create_owned(owner, format('_text_%s(r anyelement)', pipeline.id), 'text', 'STABLE ' || options,
                                        format('RETURN %s;', autoembed._content_expression(pipeline, 'r')));
        _text_changed := format('autoembed._text_%1$s(OLD) COLLATE "C" IS DISTINCT FROM autoembed._text_%1$s(NEW)', pipeline.id);
    ELSE
        -- A long text that was left alone is the same value in the TOAST table, and need not be fetched to know it.
        SELECT string_agg(
            concat(
                CASE WHEN a.attlen = -1 AND a.attstorage <> 'p' THEN
                    format('(pg_column_toast_chunk_id(OLD.%1$I) = pg_column_toast_chunk_id(NEW.%1$I)) IS NOT TRUE AND ', k.name)
                END,
                format('record_image_ne(ROW(OLD.%1$I), ROW(NEW.%1$I))', k.name)
            ), ' OR ')
        INTO _text_changed
        FROM unnest(autoembed._columns_of(pipeline)) AS k(name)
        JOIN pg_attribute AS a ON a.attrelid = pipeline.table_id AND a.attname = k.name;
    END IF;
    IF EXISTS (
        SELECT FROM pg_attribute AS a
        JOIN pg_type AS t ON t.oid = a.atttypid
        WHERE a.attrelid = pipeline.table_id AND a.attname = ANY (pipeline.key_columns)
          AND t.typtype <> 'e' AND coalesce(nullif(t.typbasetype, 0), t.oid) NOT IN (
              'bigint'::regtype, 'integer'::regtype, 'smallint'::regtype, 'numeric'::regtype, 'boolean'::regtype,
              'text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'name'::regtype, 'uuid'::regtype)
    ) THEN
        -- What such a key looks like depends on the session.
        _options := concat_ws(' ', _options, autoembed._output_settings());
    END IF;

    -- The queue's INSERT is what pgmq.send() does inside, without its dynamic SQL, which costs more than all the rest. Most
    -- statements are of few rows, and to number these costs half as much again.
    _enqueue := format($sql$INSERT INTO pgmq.q_embedding_jobs (vt, message)
        SELECT clock_timestamp(), concat('{"pipeline": %1$s, "keys": [', string_agg(k.key, ','), ']}')::jsonb
        FROM (SELECT r.key FROM (%%1$s) AS r LIMIT 101) AS k
        HAVING count(*) BETWEEN 1 AND 100;
        IF NOT FOUND THEN
            INSERT INTO pgmq.q_embedding_jobs (vt, message)
            SELECT clock_timestamp(), concat('{"pipeline": %1$s, "keys": [', string_agg(k.key, ','), ']}')::jsonb
            FROM (SELECT r.key, (row_number() OVER () - 1) / 100 AS message FROM (%%1$s) AS r) AS k
            GROUP BY k.message;
        END IF$sql$, pipeline.id);

    EXECUTE format('CREATE OR REPLACE FUNCTION autoembed._capture_%s() RETURNS trigger LANGUAGE plpgsql %s AS %L',
                   pipeline.id, _options, format($body$
DECLARE
    _changed boolean;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        %1$s
        IF NOT (%8$s) THEN
            RETURN NULL;
        END IF;
        INSERT INTO pgmq.q_embedding_jobs (vt, message)
        VALUES (clock_timestamp(), concat('{"pipeline": %2$s, "keys": [', CASE WHEN %3$s THEN concat(%4$s, ',') END, %5$s, CASE WHEN %3$s THEN '], "moved": true}' ELSE ']}' END)::jsonb);
    ELSIF TG_OP = 'TRUNCATE' THEN
        INSERT INTO pgmq.q_embedding_jobs (vt, message)
        VALUES (clock_timestamp(), '{"pipeline": %2$s, "truncated": true}');
    ELSIF TG_LEVEL = 'ROW' THEN
        INSERT INTO pgmq.q_embedding_jobs (vt, message)
        SELECT clock_timestamp(), concat('{"pipeline": %2$s, "keys": [', CASE TG_OP WHEN 'INSERT' THEN %5$s ELSE %4$s END, ']}')::jsonb
        WHERE CASE TG_OP WHEN 'INSERT' THEN %9$s ELSE %10$s END;
    ELSIF TG_OP = 'INSERT' THEN
        %6$s
    ELSE
        %7$s;
    END IF;
    RETURN NULL;
END;$body$,
        CASE WHEN _runs_owners_code THEN format($plain$
        -- Only the vector that we ourselves are writing.
        IF pg_trigger_depth() = 1 AND current_setting('autoembed.writing', true) = %L THEN
            RETURN NULL;
        END IF;
        BEGIN
            _changed := %s OR %s;
        EXCEPTION WHEN OTHERS OR assert_failure THEN
            -- A row is never refused for its embedding: the lane will meet the error again, and report it.
            _changed := true;
        END;
        IF NOT _changed THEN
            RETURN NULL;
        END IF;$plain$, pipeline.table_id::oid, _key_changed, _text_changed)
        ELSE format($plain$
        IF NOT (%s OR %s) THEN
            RETURN NULL;
        END IF;$plain$, _key_changed, _text_changed)
        END,
        pipeline.id,
        _key_changed,
        autoembed._key_expression(pipeline, 'OLD'),
        autoembed._key_expression(pipeline, 'NEW'),
        CASE WHEN pipeline.condition IS NULL THEN format(_enqueue, _new_rows) || ';'
             ELSE format($plain$
        BEGIN
            %s;
        EXCEPTION WHEN OTHERS OR assert_failure THEN
            %s;
        END;$plain$,
                         format(_enqueue, format('%s AND autoembed._text_%s(n::%s) IS NOT NULL', _new_rows, pipeline.id, pipeline.table_id)),
                         format(_enqueue, _new_rows))
        END,
        format(_enqueue, format('SELECT %s AS key FROM old_rows AS o WHERE %s', autoembed._key_expression(pipeline, 'o'), format(_has_key, 'o'))),
        format(_has_key, 'OLD') || ' AND ' || format(_has_key, 'NEW'),
        format(_has_key, 'NEW'),
        format(_has_key, 'OLD')));
    EXECUTE format('REVOKE ALL ON FUNCTION autoembed._capture_%s() FROM PUBLIC', pipeline.id);

    EXECUTE format('CREATE OR REPLACE FUNCTION autoembed._clear_%s() RETURNS trigger LANGUAGE plpgsql %s AS %L',
                   pipeline.id, _options, format($body$
DECLARE
    _changed boolean;
BEGIN
    BEGIN
        _changed := %s;
    EXCEPTION WHEN OTHERS OR assert_failure THEN
        _changed := true;
    END;
    IF _changed THEN
        NEW.%I := NULL;
    END IF;
    RETURN NEW;
END;$body$, _text_changed, pipeline.embedding_column));
    EXECUTE format('REVOKE ALL ON FUNCTION autoembed._clear_%s() FROM PUBLIC', pipeline.id);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_capture(autoembed.pipeline, name, text) IS
    'Makes the trigger functions of a pipeline, which queue the keys of rows whose text has changed.';

CREATE FUNCTION autoembed._build_triggers(pipeline autoembed.pipeline)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    -- Neither partitions written directly nor logical replication fire statement triggers.
    _by_row boolean := pipeline.replicated
        OR (SELECT c.relkind = 'p' FROM pg_class AS c WHERE c.oid = pipeline.table_id);
    _name text;
    _definition text;
BEGIN
    FOR _name, _definition IN
        SELECT t.name, t.definition
        FROM (VALUES
            ('insert', 'AFTER INSERT ON %s' || CASE WHEN _by_row THEN ' FOR EACH ROW' ELSE ' REFERENCING NEW TABLE AS new_rows' END),
            ('delete', 'AFTER DELETE ON %s' || CASE WHEN _by_row THEN ' FOR EACH ROW' ELSE ' REFERENCING OLD TABLE AS old_rows' END),
            ('update', 'AFTER UPDATE ON %s FOR EACH ROW'),
            ('truncate', 'AFTER TRUNCATE ON %s'),
            -- By its name the last of the BEFORE triggers, so that it sees what the others make of the text.
            ('clear', CASE WHEN pipeline.on_change = 'clear' THEN 'BEFORE UPDATE ON %s FOR EACH ROW' END)
        ) AS t(name, definition)
    LOOP
        EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', autoembed._trigger_name(pipeline.id, _name), pipeline.table_id);
        CONTINUE WHEN _definition IS NULL;
        EXECUTE format('CREATE TRIGGER %I ' || _definition || ' EXECUTE FUNCTION autoembed._%s_%s()',
                       autoembed._trigger_name(pipeline.id, _name), pipeline.table_id,
                       CASE _name WHEN 'clear' THEN 'clear' ELSE 'capture' END, pipeline.id);
        IF pipeline.replicated THEN
            EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', pipeline.table_id, autoembed._trigger_name(pipeline.id, _name));
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_triggers(autoembed.pipeline) IS 'Makes the triggers of a pipeline anew.';

CREATE FUNCTION autoembed._trigger_name(pipeline_id integer, event text)
    RETURNS name
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT format(CASE event WHEN 'clear' THEN 'zz_autoembed_%s_%s' ELSE 'autoembed_%s_%s' END, pipeline_id, event)::name;
$sql$;
COMMENT ON FUNCTION autoembed._trigger_name(integer, text) IS 'What a pipeline''s trigger is called.';

CREATE FUNCTION autoembed._check_deferred()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table regclass;
BEGIN
    FOR _table IN
        SELECT g.tgrelid FROM pg_trigger AS g WHERE g.tgdeferrable AND NOT g.tgisinternal
        UNION
        SELECT c.conrelid FROM pg_constraint AS c WHERE c.contype = 'x' AND c.condeferrable
    LOOP
        BEGIN
            -- Any ALTER TABLE is refused while the table has events pending; this one changes nothing, and is undone.
            EXECUTE format('ALTER TABLE %s RESET (fillfactor)', _table);
            RAISE EXCEPTION USING ERRCODE = 'AE000';
        EXCEPTION
            WHEN SQLSTATE 'AE000' THEN
                NULL;
            WHEN object_in_use THEN
                RAISE EXCEPTION 'a trigger on table % is deferred to the commit, where it would run with the rights of the lane', _table;
        END;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_deferred() IS
    'Fails if writing has left trigger events for the commit, which PostgreSQL runs as the session''s user.';

-- 32_follow.sql: what follows when a pipeline is defined, changed or ended, and when its table is altered.

CREATE FUNCTION autoembed._table_shape(pipeline autoembed.pipeline)
    RETURNS jsonb
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT jsonb_build_object(
        'columns', (SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_attribute AS a
                    WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped),
        'type', (SELECT concat_ws(' ', a.attnum, format_type(a.atttypid, a.atttypmod)) FROM pg_attribute AS a
                 WHERE a.attrelid = pipeline.table_id AND a.attname = pipeline.embedding_column),
        'contents', (SELECT jsonb_object_agg(a.attnum, concat_ws(' ', format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid)))
                     FROM pg_attribute AS a
                     LEFT JOIN pg_attrdef AS d ON a.attgenerated <> '' AND d.adrelid = a.attrelid AND d.adnum = a.attnum
                     WHERE a.attrelid = pipeline.table_id AND a.attnum > 0 AND NOT a.attisdropped AND a.attname <> pipeline.embedding_column),
        'partitions', (SELECT coalesce(jsonb_agg(t.relid::oid::bigint ORDER BY t.relid::oid), '[]') FROM pg_partition_tree(pipeline.table_id) AS t
                       WHERE t.isleaf)
    );
$sql$;
COMMENT ON FUNCTION autoembed._table_shape(autoembed.pipeline) IS
    'What of a table matters to its pipeline: its columns by number, number and type of the embedding column, types and expressions of the others, its partitions.';

CREATE FUNCTION autoembed._define()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _check record;
BEGIN
    -- Out of a dump, where it was sound once and its table's triggers are yet to come.
    IF TG_OP = 'INSERT' AND NEW.built_from IS NOT NULL THEN
        NEW.table_shape := autoembed._table_shape(NEW);
        RETURN NEW;
    END IF;
    -- A dump of the schema alone brings functions and triggers, but no pipelines: their numbers are taken.
    WHILE TG_OP = 'INSERT' AND EXISTS (
        SELECT FROM pg_proc AS p WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname = '_content_' || NEW.id
    ) LOOP
        NEW.id := nextval('autoembed.pipeline_id_seq');
    END LOOP;
    IF NEW.managed AND NEW.key_columns IS NULL THEN
        NEW.key_columns := coalesce(autoembed._key_columns(NEW.table_id), '{}');
    END IF;
    IF NEW.content_function IS NULL THEN
        NEW.content_function_id := NULL;
    ELSIF TG_OP = 'INSERT' OR NEW.content_function IS DISTINCT FROM OLD.content_function THEN
        NEW.content_function_id := autoembed._content_function(NEW.table_id, NEW.content_function);
    END IF;
    SELECT c.* INTO _check FROM autoembed._check_pipeline(NEW) AS c;
    IF _check.errcode = 'waits' THEN
        RAISE WARNING USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = 'object_not_in_prerequisite_state';
    ELSIF _check.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = _check.errcode;
    END IF;
    NEW.table_shape := autoembed._table_shape(NEW);
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._define() IS 'Completes the definition of a pipeline, and refuses one that cannot work.';

CREATE TRIGGER define
    BEFORE INSERT ON autoembed.pipeline
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._define();

-- What follows an ALTER TABLE comes with another shape.
CREATE TRIGGER define_again
    BEFORE UPDATE OF content_columns, content_template, content_function, condition, model, on_change ON autoembed.pipeline
    FOR EACH ROW
    WHEN (OLD.table_shape = NEW.table_shape)
    EXECUTE FUNCTION autoembed._define();

CREATE FUNCTION autoembed._defined()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _stale integer;
BEGIN
    IF TG_OP = 'INSERT' AND NEW.built_from IS NOT NULL THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'INSERT' THEN
        FOR _stale IN
            SELECT DISTINCT substring(f.proname FROM '[0-9]+$')::integer
            FROM pg_trigger AS t
            JOIN pg_proc AS f ON f.oid = t.tgfoid AND f.pronamespace = 'autoembed'::regnamespace AND f.proname ~ '^_(capture|clear)_[0-9]+$'
            WHERE t.tgrelid = NEW.table_id
              AND NOT EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id::text = substring(f.proname FROM '[0-9]+$'))
        LOOP
            PERFORM autoembed._drop_functions(_stale, true);
        END LOOP;
    END IF;
    PERFORM autoembed._build_pipeline(NEW.id);
    BEGIN
        -- On no row, and undone, whatever the owner's code does: has PostgreSQL read all that will be read.
        IF autoembed._missing_object(NEW) IS NULL THEN
            EXECUTE format('SELECT FROM autoembed._content_%s(''{}'')', NEW.id);
        END IF;
        RAISE EXCEPTION USING ERRCODE = 'AE000';
    EXCEPTION
        WHEN SQLSTATE 'AE000' THEN
            NULL;
        WHEN lock_not_available THEN
            NULL;
    END;
    IF NEW.managed AND (TG_OP = 'INSERT' OR NEW.on_change <> OLD.on_change OR EXISTS (SELECT FROM autoembed._trigger_problems(NEW))) THEN
        PERFORM autoembed._build_triggers(NEW);
    END IF;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._defined() IS 'Makes the functions and triggers of a pipeline that was defined or changed.';

CREATE TRIGGER defined
    AFTER INSERT ON autoembed.pipeline
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._defined();

-- What follows an ALTER TABLE comes with another shape.
CREATE TRIGGER defined_again
    AFTER UPDATE OF content_columns, content_template, content_function, condition, model, on_change ON autoembed.pipeline
    FOR EACH ROW
    WHEN (OLD.table_shape = NEW.table_shape)
    EXECUTE FUNCTION autoembed._defined();

CREATE FUNCTION autoembed._ended()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _trigger name;
BEGIN
    DELETE FROM pgmq.q_embedding_jobs AS q WHERE coalesce(q.message ->> 'pipeline', '') = OLD.id::text;
    PERFORM autoembed._drop_functions(OLD.id, true);
    PERFORM autoembed._unschedule('index-' || OLD.id);
    FOR _trigger IN
        SELECT t.tgname
        FROM pg_trigger AS t
        WHERE t.tgrelid = OLD.table_id
          AND (t.tgfoid = 'autoembed.queue_embeddings()'::regprocedure AND (autoembed._arguments(t))[2] = OLD.embedding_column
               OR t.tgfoid = 'autoembed.clear_column()'::regprocedure AND (autoembed._arguments(t))[1] = OLD.embedding_column)
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', _trigger, OLD.table_id);
    END LOOP;
    RETURN NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._ended() IS 'Takes away the jobs, functions and triggers of a pipeline that was ended.';

CREATE TRIGGER ended
    AFTER DELETE ON autoembed.pipeline
    FOR EACH ROW
    EXECUTE FUNCTION autoembed._ended();

CREATE FUNCTION autoembed._drop_orphaned_pipelines()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- A look-up for each; NOT EXISTS would read the whole catalog, every second.
    DELETE FROM autoembed.pipeline AS p WHERE (SELECT c.oid FROM pg_class AS c WHERE c.oid = p.table_id) IS NULL;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_orphaned_pipelines() IS 'Ends the pipelines whose table was dropped, with their jobs.';

CREATE FUNCTION autoembed._adopt(table_id oid, embedding_column text, content_function text)
    RETURNS integer
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH root AS (
        SELECT coalesce(pg_partition_root(_adopt.table_id)::oid, _adopt.table_id) AS table_id
    ),
    made AS (
        INSERT INTO autoembed.pipeline AS p (table_id, embedding_column, key_columns, content_function, managed)
        SELECT r.table_id, _adopt.embedding_column, '{id}', _adopt.content_function, false
        FROM root AS r
        WHERE NOT EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.table_id = r.table_id AND p.embedding_column = _adopt.embedding_column)
        RETURNING p.id
    )
    SELECT m.id FROM made AS m
    UNION ALL
    SELECT p.id FROM autoembed.pipeline AS p JOIN root AS r ON p.table_id = r.table_id AND p.embedding_column = _adopt.embedding_column;
$sql$;
COMMENT ON FUNCTION autoembed._adopt(oid, text, text) IS
    'The pipeline of that table and column, made with that content function if it is new; an error if it cannot be.';

CREATE FUNCTION autoembed._follow_tables()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _before jsonb;
    _after jsonb;
    _renames jsonb;
BEGIN
    FOR _pipeline IN
        SELECT p.*
        FROM autoembed.pipeline AS p
        WHERE p.table_id IN (
            SELECT coalesce(pg_partition_root(d.objid), d.objid) FROM pg_event_trigger_ddl_commands() AS d
            WHERE d.classid = 'pg_class'::regclass
        )
        ORDER BY p.id
    LOOP
        _before := _pipeline.table_shape;
        SELECT coalesce(jsonb_object_agg(b.value, a.value), '{}') INTO _renames
        FROM jsonb_each_text(_before -> 'columns') AS b
        JOIN jsonb_each_text(autoembed._table_shape(_pipeline) -> 'columns') AS a ON a.key = b.key AND a.value <> b.value;
        IF _renames <> '{}' THEN
            _pipeline.embedding_column := coalesce(_renames ->> _pipeline.embedding_column, _pipeline.embedding_column);
            _pipeline.key_columns := autoembed._renamed(_pipeline.key_columns, _renames);
            _pipeline.content_columns := autoembed._renamed(_pipeline.content_columns, _renames);
            _pipeline.content_template := (
                SELECT string_agg(
                    CASE WHEN t.column_name IS NOT NULL THEN format('{%s}', coalesce(_renames ->> t.column_name, t.column_name))
                         WHEN t.literal IN ('{', '}', '\') THEN t.literal || t.literal
                         ELSE t.literal
                    END, '')
                FROM autoembed._template(_pipeline.content_template) AS t
            );
            -- The condition is an expression of the owner's, not to be read with more rights than his: it keeps its names.
            SELECT coalesce(jsonb_object_agg(c.key, coalesce(_renames ->> c.value, c.value)), '{}') INTO _pipeline.condition_columns
            FROM jsonb_each_text(_pipeline.condition_columns) AS c;
        END IF;
        _after := autoembed._table_shape(_pipeline);

        IF _before <> _after THEN
            UPDATE autoembed.pipeline AS p
            SET embedding_column = _pipeline.embedding_column, key_columns = _pipeline.key_columns,
                content_columns = _pipeline.content_columns, content_template = _pipeline.content_template,
                condition_columns = _pipeline.condition_columns, table_shape = _after
            WHERE p.id = _pipeline.id;
        END IF;
        -- Whatever keeps rows from being embedded: a trigger made for other names would refuse them.
        IF (SELECT c.errcode IS DISTINCT FROM 'undefined_column' FROM autoembed._check_pipeline(_pipeline) AS c) THEN
            PERFORM autoembed._build_pipeline(_pipeline.id);
        END IF;
        -- The vectors are of another type, or the texts may be others, or there are rows that came with a partition: no
        -- trigger has seen it.
        IF _before ->> 'type' <> _after ->> 'type'
           OR EXISTS (
               SELECT FROM jsonb_each_text(_before -> 'contents') AS b
               JOIN jsonb_each_text(_after -> 'contents') AS a ON a.key = b.key AND a.value <> b.value
           )
           OR NOT _before -> 'partitions' @> (_after -> 'partitions') THEN
            PERFORM autoembed._backfill(_pipeline.id);
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._follow_tables() IS
    'Has pipelines follow what ALTER TABLE changes: names, owners, types, partitions.';

CREATE FUNCTION autoembed._end_broken()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _broken record;
BEGIN
    -- Its trigger would refuse rows that are written. A rename is no drop: the numbers of the columns tell.
    FOR _broken IN
        SELECT p.id, p.table_id, p.embedding_column, min(k.name::text) AS lost
        FROM autoembed.pipeline AS p
        JOIN pg_class AS c ON c.oid = p.table_id
        CROSS JOIN LATERAL unnest(p.embedding_column || autoembed._needed_columns(p)) AS k(name)
        WHERE p.managed
          AND NOT EXISTS (
              SELECT FROM pg_attribute AS a
              WHERE a.attrelid = p.table_id AND NOT a.attisdropped
                AND (a.attname = k.name OR p.table_shape -> 'columns' ->> a.attnum::text = k.name)
          )
        GROUP BY p.id
    LOOP
        DELETE FROM autoembed.pipeline AS p WHERE p.id = _broken.id;
        RAISE NOTICE '%.% is no longer embedded: column "%" is gone', _broken.table_id, quote_ident(_broken.embedding_column), _broken.lost;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._end_broken() IS 'Ends the pipelines that have lost a column, however it was dropped.';

CREATE EVENT TRIGGER autoembed_end_broken
    ON sql_drop
    EXECUTE FUNCTION autoembed._end_broken();

CREATE FUNCTION autoembed._renamed(names name[], renames jsonb)
    RETURNS name[]
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT array_agg(coalesce((renames ->> n.name)::name, n.name) ORDER BY n.position)
    FROM unnest(names) WITH ORDINALITY AS n(name, position);
$sql$;
COMMENT ON FUNCTION autoembed._renamed(name[], jsonb) IS 'The names after renames, {then: now}.';

CREATE FUNCTION autoembed._backfill(pipeline_id integer)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.backfill AS b (pipeline_id)
    VALUES (_backfill.pipeline_id)
    ON CONFLICT ON CONSTRAINT backfill_pkey DO UPDATE
    SET position = NULL, rows_queued = 0, scanned_at = NULL, index_problem = NULL, started_at = clock_timestamp();
$sql$;
COMMENT ON FUNCTION autoembed._backfill(integer) IS 'Has the rows of a pipeline looked through for what is missing or stale.';

CREATE EVENT TRIGGER autoembed_follow_tables
    ON ddl_command_end
    WHEN TAG IN ('ALTER TABLE')
    EXECUTE FUNCTION autoembed._follow_tables();

CREATE FUNCTION autoembed._arguments(trigger pg_trigger)
    RETURNS text[]
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- tgargs: each argument ends with a zero byte, which the escape format shows as \000.
    SELECT array_agg(convert_from(decode(a.argument, 'escape'), getdatabaseencoding()) ORDER BY a.position)
    FROM string_to_table(encode(trigger.tgargs, 'escape'), '\000') WITH ORDINALITY AS a(argument, position)
    WHERE a.position <= trigger.tgnargs;
$sql$;
COMMENT ON FUNCTION autoembed._arguments(pg_trigger) IS 'The arguments of a trigger.';



-- What can be known at DDL time is said at DDL time -------------------------------------------------

CREATE FUNCTION autoembed._check_trigger()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _trigger record;
    _arguments text[];
    _id integer;
BEGIN
    FOR _trigger IN
        SELECT t AS trigger, t.tgrelid, t.tgtype, t.tgnargs, f.proname
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_trigger AS t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid AND t.tgparentid = 0
        JOIN pg_proc AS f ON f.oid = t.tgfoid AND f.pronamespace = 'autoembed'::regnamespace
        WHERE f.proname IN ('queue_embeddings', 'clear_column')
    LOOP
        _arguments := autoembed._arguments(_trigger.trigger);
        -- Bits of pg_trigger.tgtype: 1 row, 2 before, 16 update.
        IF _trigger.tgtype & 1 = 0 THEN
            RAISE EXCEPTION USING
                ERRCODE = 'feature_not_supported',
                MESSAGE = format('autoembed.%s() works only FOR EACH ROW', _trigger.proname),
                HINT = 'Add FOR EACH ROW to CREATE TRIGGER.';
        ELSIF _trigger.proname = 'queue_embeddings' THEN
            IF _trigger.tgnargs <> 2 OR _trigger.tgtype & 2 <> 0 THEN
                RAISE EXCEPTION USING
                    ERRCODE = 'invalid_parameter_value',
                    MESSAGE = 'autoembed.queue_embeddings() is for AFTER triggers and takes two arguments, a content function and an embedding column',
                    HINT = 'For example: AFTER INSERT ON documents FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings(''embedding_input'', ''embedding'').';
            END IF;
            _id := autoembed._adopt(_trigger.tgrelid, _arguments[2], _arguments[1]);
            UPDATE autoembed.pipeline AS p
            SET content_function = _arguments[1]
            WHERE p.id = _id AND p.content_function IS DISTINCT FROM _arguments[1] AND NOT p.managed;
            IF EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = _id AND p.managed) THEN
                RAISE EXCEPTION USING
                    ERRCODE = 'duplicate_object',
                    MESSAGE = format('%s.%I is being embedded already', _trigger.tgrelid::regclass, _arguments[2]),
                    HINT = 'autoembed.enable() has made its triggers; autoembed.disable() ends them.';
            END IF;
        ELSIF _trigger.tgnargs <> 1 OR _trigger.tgtype & 2 = 0 OR _trigger.tgtype & 16 = 0 THEN
            RAISE EXCEPTION USING
                ERRCODE = 'invalid_parameter_value',
                MESSAGE = 'autoembed.clear_column() is for BEFORE UPDATE triggers and takes one argument, a column',
                HINT = 'For example: BEFORE UPDATE OF title ON documents FOR EACH ROW EXECUTE FUNCTION autoembed.clear_column(''embedding'').';
        ELSIF NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = _trigger.tgrelid AND a.attname = _arguments[1] AND a.attnum > 0 AND NOT a.attisdropped
        ) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'undefined_column',
                MESSAGE = format('table %s has no column "%s"', _trigger.tgrelid::regclass, _arguments[1]),
                HINT = 'autoembed.clear_column() takes the name of a column of its table.';
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_trigger() IS 'Checks a trigger of ours when it is created, not when a row is written.';

CREATE EVENT TRIGGER autoembed_check_trigger
    ON ddl_command_end
    WHEN TAG IN ('CREATE TRIGGER')
    EXECUTE FUNCTION autoembed._check_trigger();

CREATE FUNCTION autoembed._protect_functions()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- A table owner owns his pipelines' functions; as SECURITY INVOKER they would run as the lane, a superuser.
    IF NOT (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user)
       AND EXISTS (SELECT FROM pg_event_trigger_ddl_commands() AS d WHERE d.schema_name = 'autoembed') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = 'the functions in schema autoembed cannot be altered',
            HINT = 'They are made anew when their table changes.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._protect_functions() IS 'Keeps table owners from altering the functions made for them.';

CREATE EVENT TRIGGER autoembed_protect_functions
    ON ddl_command_end
    WHEN TAG IN ('ALTER FUNCTION', 'ALTER ROUTINE')
    EXECUTE FUNCTION autoembed._protect_functions();

-- 33_enable.sql: what a table's owner says to attach it, change it, stop it and have it embedded anew. All of it runs with
-- the caller's rights; row level security decides whose pipelines are his.

CREATE FUNCTION autoembed._owned_pipelines(table_name regclass, embedding_column name)
    RETURNS SETOF autoembed.pipeline
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY
    SELECT p.*
    FROM autoembed.pipeline AS p
    WHERE p.table_id = _owned_pipelines.table_name
      AND (_owned_pipelines.embedding_column IS NULL OR p.embedding_column = _owned_pipelines.embedding_column)
    ORDER BY p.id;
    IF table_name IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'null_value_not_allowed', MESSAGE = 'table_name must not be NULL';
    ELSIF NOT FOUND THEN
        PERFORM autoembed._check_owner(table_name);
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = CASE WHEN embedding_column IS NULL THEN format('table %s has no embeddings of ours', table_name)
                           ELSE format('column "%s" of table %s has no embeddings of ours', embedding_column, table_name) END,
            HINT = format('SELECT autoembed.enable(%L, …) attaches it.', table_name);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._owned_pipelines(regclass, name) IS
    'The pipelines of a table of the caller''s, or the one of that column; an error if there are none.';

CREATE FUNCTION autoembed._owned_pipeline(table_name regclass, embedding_column name)
    RETURNS autoembed.pipeline
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _found autoembed.pipeline[] := ARRAY(SELECT p FROM autoembed._owned_pipelines(table_name, embedding_column) AS p);
BEGIN
    IF cardinality(_found) > 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'ambiguous_column',
            MESSAGE = format('table %s has several embedding columns', table_name),
            HINT = 'Say which: embedding_column => '
                || (SELECT string_agg(quote_literal(f.embedding_column), ' or ') FROM unnest(_found) AS f) || '.';
    END IF;
    RETURN _found[1];
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._owned_pipeline(regclass, name) IS
    'The pipeline of a table of the caller''s; an error if there is none, or more than one and no column is given.';

CREATE FUNCTION autoembed._check_owner(table_name regclass)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF NOT (SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class AS c WHERE c.oid = table_name) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('must be owner of table %s', table_name),
            HINT = 'The owner of a table decides on its embeddings.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_owner(regclass) IS 'Fails unless the caller has the rights of the table''s owner.';

CREATE FUNCTION autoembed._check_content(content_columns name[], content_function text, content_template text, required boolean)
    RETURNS void
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF num_nonnulls(content_columns, content_function, content_template) NOT IN (required::integer, 1) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'the text of a row comes from one of content_columns, content_function and content_template',
            HINT = 'For example: content_columns => ''{title,content}''.';
    ELSIF cardinality(content_columns) = 0 OR array_position(content_columns, NULL) IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'content_columns has no columns, or a NULL among them',
            HINT = 'For example: content_columns => ''{title,content}''.';
    ELSIF content_template IS NOT NULL AND (
        NOT EXISTS (SELECT FROM autoembed._template(content_template) AS t WHERE t.column_name IS NOT NULL)
        OR regexp_replace(content_template, '\{\{|\}\}|\{[^{}]+\}', '', 'g') ~ '[{}]'
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('content_template %L names no column, or has a brace without its other', content_template),
            HINT = 'For example: content_template => ''# {title}\n\n{content}''; {{ and }} stand for braces.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_content(name[], text, text, boolean) IS 'Fails unless exactly one way to the text is given, and well formed.';

CREATE FUNCTION autoembed._check_on_change(on_change text)
    RETURNS void
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF on_change IS NULL OR on_change NOT IN ('keep', 'clear') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('on_change must be keep or clear, not %s', coalesce(on_change, 'NULL')),
            HINT = 'keep: the old vector stays until the new one is there; clear: it goes with the old text.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_on_change(text) IS 'Fails unless it is keep or clear.';

CREATE FUNCTION autoembed._read_condition(table_name regclass, INOUT condition text, OUT columns jsonb, OUT objects jsonb)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning
AS $plpgsql$
DECLARE
    _path text := (SELECT format('%I, public, pg_temp', n.nspname) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
                   WHERE c.oid = table_name);
BEGIN
    columns := '{}';
    objects := '{}';
    IF condition IS NULL THEN
        RETURN;
    END IF;
    -- PostgreSQL itself reads the expression, on a copy without rows, and writes it again with every name in full.
    EXECUTE format('CREATE TEMP TABLE autoembed_condition (LIKE %s)', table_name);
    PERFORM set_config('search_path', _path, true);
    EXECUTE format(E'ALTER TABLE pg_temp.autoembed_condition ADD CONSTRAINT condition CHECK (%s\n) NO INHERIT NOT VALID', condition);
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    SELECT pg_get_expr(k.conbin, k.conrelid),
           coalesce((SELECT jsonb_object_agg(a.attname, a.attname) FROM pg_attribute AS a
                     WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey) AND a.attnum > 0), '{}'),
           coalesce((SELECT jsonb_object_agg(i.identity, jsonb_build_object('type', i.type, 'oid', d.refobjid::text, 'name', (
                                SELECT p.proname FROM pg_proc AS p WHERE p.oid = d.refobjid AND d.refclassid = 'pg_proc'::regclass
                                UNION ALL SELECT p.oprname FROM pg_operator AS p WHERE p.oid = d.refobjid AND d.refclassid = 'pg_operator'::regclass
                                UNION ALL SELECT t.typname FROM pg_type AS t WHERE t.oid = d.refobjid AND d.refclassid = 'pg_type'::regclass
                                UNION ALL SELECT c.collname FROM pg_collation AS c WHERE c.oid = d.refobjid AND d.refclassid = 'pg_collation'::regclass)))
                     FROM pg_depend AS d
                     CROSS JOIN LATERAL pg_identify_object(d.refclassid, d.refobjid, 0) AS i
                     WHERE d.classid = 'pg_constraint'::regclass AND d.objid = k.oid
                       AND d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass, 'pg_type'::regclass, 'pg_collation'::regclass)), '{}')
    INTO STRICT condition, columns, objects
    FROM pg_constraint AS k WHERE k.conrelid = 'pg_temp.autoembed_condition'::regclass AND k.conname = 'condition';
    DROP TABLE pg_temp.autoembed_condition;
EXCEPTION WHEN syntax_error_or_access_rule_violation OR feature_not_supported OR data_exception THEN
    RAISE EXCEPTION USING
        ERRCODE = SQLSTATE,
        MESSAGE = format('the condition %s does not work on table %s: %s', condition, table_name, SQLERRM),
        HINT = 'A condition is a boolean expression of the columns of one row, without subqueries.';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._read_condition(regclass, text) IS
    'A condition on the rows of a table, with every name in it in full, its columns, {name: name}, and what else it uses; an error if it is none. Runs with the caller''s rights.';

CREATE FUNCTION autoembed.enable(
    table_name regclass,
    embedding_column name DEFAULT 'embedding',
    content_columns name[] DEFAULT NULL,
    content_function text DEFAULT NULL,
    content_template text DEFAULT NULL,
    model text DEFAULT NULL,
    condition text DEFAULT NULL,
    on_change text DEFAULT 'keep',
    truncate boolean DEFAULT true,
    enqueue_existing boolean DEFAULT true,
    create_index boolean DEFAULT false,
    replicated boolean DEFAULT false,
    if_not_exists boolean DEFAULT false
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table pg_class;
    _dimensions integer;
    _pipeline autoembed.pipeline;
    _index record;
BEGIN
    IF table_name IS NULL OR embedding_column IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'table_name and embedding_column must not be NULL';
    END IF;
    SELECT c.* INTO _table FROM pg_class AS c WHERE c.oid = enable.table_name;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_table', MESSAGE = format('there is no table with OID %s', enable.table_name::oid);
    ELSIF _table.relpersistence = 't' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s is a temporary table, which only its own session sees', enable.table_name),
            HINT = 'Attach a table that lanes see, too.';
    ELSIF _table.relkind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s is %s, not a table', enable.table_name,
                             CASE _table.relkind WHEN 'v' THEN 'a view' WHEN 'm' THEN 'a materialized view'
                                                 WHEN 'f' THEN 'a foreign table' ELSE 'no table' END),
            HINT = 'Attach the table that holds the rows.';
    ELSIF _table.relkind = 'p' AND create_index THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('no index can be built concurrently on the partitioned table %s', enable.table_name),
            HINT = 'Leave create_index out. Later, create the index concurrently on each partition, then on the table, which takes those.';
    ELSIF _table.relispartition THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('table %s is a partition', enable.table_name),
            HINT = format('Attach the whole table: SELECT autoembed.enable(%L, …).', pg_partition_root(enable.table_name));
    END IF;
    PERFORM autoembed._check_owner(enable.table_name);
    PERFORM autoembed._check_content(content_columns, content_function, content_template, true);
    PERFORM autoembed._check_on_change(on_change);
    IF EXISTS (
        SELECT FROM autoembed.pipeline AS p
        WHERE p.table_id = enable.table_name AND p.embedding_column = enable.embedding_column
    ) THEN
        IF if_not_exists THEN
            RAISE NOTICE '%.% is being embedded already, skipping', enable.table_name, quote_ident(enable.embedding_column);
            RETURN;
        END IF;
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('%s.%I is being embedded already', enable.table_name, enable.embedding_column),
            HINT = 'autoembed.alter_pipeline() changes how; autoembed.disable() ends it.';
    END IF;

    _dimensions := autoembed._dimensions(enable.model);
    IF NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = enable.table_name AND a.attname = enable.embedding_column AND a.attnum > 0 AND NOT a.attisdropped
    ) THEN
        EXECUTE format('ALTER TABLE %s ADD COLUMN %I @extschema:vector@.halfvec(%s)', enable.table_name, enable.embedding_column, _dimensions);
    END IF;
    INSERT INTO autoembed.pipeline AS p (table_id, embedding_column, content_columns, content_function, content_template,
                                         condition, condition_columns, condition_objects, model, on_change, truncate, replicated)
    SELECT enable.table_name, enable.embedding_column, enable.content_columns, enable.content_function, enable.content_template,
           c.condition, c.columns, c.objects, enable.model, enable.on_change, coalesce(enable.truncate, true), coalesce(enable.replicated, false)
    FROM autoembed._read_condition(enable.table_name, enable.condition) AS c
    RETURNING p.* INTO _pipeline;
    SELECT k.* INTO _index FROM autoembed._index_key(_pipeline) AS k;
    IF create_index AND _index.problem IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = _index.problem,
            HINT = _index.hint;
    ELSIF _index.key IS NULL THEN
        RAISE WARNING USING MESSAGE = _index.problem, HINT = _index.hint;
    END IF;
    IF enqueue_existing OR create_index THEN
        INSERT INTO autoembed.backfill (pipeline_id, create_index) VALUES (_pipeline.id, coalesce(enable.create_index, false));
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.enable(regclass, name, name[], text, text, text, text, text, boolean, boolean, boolean, boolean, boolean) IS
    'Keeps a column of a table of the caller''s the embedding of its rows'' text: columns, a template with columns in braces, or a function of the row. Adds the column if it is missing, and embeds the rows that are there.';

CREATE FUNCTION autoembed._dimensions(model text)
    RETURNS integer
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT (autoembed._model(model)).dimensions;
$sql$;
COMMENT ON FUNCTION autoembed._dimensions(text) IS 'The length of a model''s vectors.';

CREATE FUNCTION autoembed.alter_pipeline(
    table_name regclass,
    embedding_column name DEFAULT NULL,
    content_columns name[] DEFAULT NULL,
    content_function text DEFAULT NULL,
    content_template text DEFAULT NULL,
    model text DEFAULT NULL,
    condition text DEFAULT NULL,
    on_change text DEFAULT NULL,
    truncate boolean DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline := autoembed._owned_pipeline(table_name, embedding_column);
    _condition record;
    _new_content boolean := num_nonnulls(content_columns, content_function, content_template) > 0;
BEGIN
    PERFORM autoembed._check_content(content_columns, content_function, content_template, false);
    IF NOT _pipeline.managed AND (_new_content OR condition IS NOT NULL OR on_change IS NOT NULL) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('the triggers of %s.%I were made by hand', _pipeline.table_id, _pipeline.embedding_column),
            HINT = 'autoembed.disable() it, and autoembed.enable() it with what it should be.';
    END IF;
    IF alter_pipeline.on_change IS NOT NULL THEN
        PERFORM autoembed._check_on_change(alter_pipeline.on_change);
    END IF;
    SELECT c.* INTO _condition FROM autoembed._read_condition(_pipeline.table_id, nullif(alter_pipeline.condition, '')) AS c;
    UPDATE autoembed.pipeline AS p
    SET content_columns = CASE WHEN _new_content THEN alter_pipeline.content_columns ELSE p.content_columns END,
        content_function = CASE WHEN _new_content THEN alter_pipeline.content_function ELSE p.content_function END,
        content_template = CASE WHEN _new_content THEN alter_pipeline.content_template ELSE p.content_template END,
        model = CASE WHEN alter_pipeline.model IS NULL THEN p.model ELSE nullif(alter_pipeline.model, '') END,
        condition = CASE WHEN alter_pipeline.condition IS NULL THEN p.condition ELSE _condition.condition END,
        condition_columns = CASE WHEN alter_pipeline.condition IS NULL THEN p.condition_columns ELSE _condition.columns END,
        condition_objects = CASE WHEN alter_pipeline.condition IS NULL THEN p.condition_objects ELSE _condition.objects END,
        on_change = coalesce(alter_pipeline.on_change, p.on_change),
        truncate = coalesce(alter_pipeline.truncate, p.truncate)
    WHERE p.id = _pipeline.id;
    IF _new_content OR alter_pipeline.model IS NOT NULL OR alter_pipeline.condition IS NOT NULL THEN
        PERFORM autoembed.resync(_pipeline.table_id, _pipeline.embedding_column);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.alter_pipeline(regclass, name, name[], text, text, text, text, text, boolean) IS
    'Changes what is not NULL of how a table is embedded, and has the rows embedded to which that makes a difference. An empty model is the default model, an empty condition none.';

CREATE FUNCTION autoembed.disable(table_name regclass, embedding_column name DEFAULT NULL, drop_column boolean DEFAULT false)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
BEGIN
    FOR _pipeline IN SELECT p.* FROM autoembed._owned_pipelines(table_name, embedding_column) AS p LOOP
        DELETE FROM autoembed.pipeline AS p WHERE p.id = _pipeline.id;
        IF drop_column THEN
            EXECUTE format('ALTER TABLE %s DROP COLUMN %I', _pipeline.table_id, _pipeline.embedding_column);
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.disable(regclass, name, boolean) IS
    'Ends the embedding of a table of the caller''s, or of one column of it: triggers, jobs and failures go, the vectors stay unless drop_column.';

CREATE FUNCTION autoembed.pause(table_name regclass, embedding_column name DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
BEGIN
    FOR _pipeline IN SELECT p.* FROM autoembed._owned_pipelines(table_name, embedding_column) AS p LOOP
        UPDATE autoembed.pipeline AS p SET paused = true WHERE p.id = _pipeline.id;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.pause(regclass, name) IS
    'Has the jobs of a table of the caller''s, or of one column of it, wait. Changes go on being queued.';

CREATE FUNCTION autoembed.resume(table_name regclass, embedding_column name DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
BEGIN
    FOR _pipeline IN SELECT p.* FROM autoembed._owned_pipelines(table_name, embedding_column) AS p LOOP
        UPDATE autoembed.pipeline AS p SET paused = false WHERE p.id = _pipeline.id;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.resume(regclass, name) IS 'Ends a pause.';

CREATE FUNCTION autoembed.resync(table_name regclass, embedding_column name DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
BEGIN
    FOR _pipeline IN SELECT p.* FROM autoembed._owned_pipelines(table_name, embedding_column) AS p LOOP
        -- Has triggers that are missing or disabled made anew.
        UPDATE autoembed.pipeline AS p SET on_change = p.on_change WHERE p.id = _pipeline.id AND p.managed;
        PERFORM autoembed._look_through(_pipeline, NULL, false);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.resync(regclass, name) IS
    'Looks through all rows of a table of the caller''s and embeds those whose embedding is missing or stale: after a restore, a load with triggers off, another model. Triggers of ours that are missing or disabled are made anew. A row that is as it should be is not sent.';

CREATE FUNCTION autoembed.reembed(table_name regclass, embedding_column name DEFAULT NULL, condition text DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline := autoembed._owned_pipeline(table_name, embedding_column);
BEGIN
    PERFORM autoembed._look_through(_pipeline, (autoembed._read_condition(_pipeline.table_id, reembed.condition)).condition, true);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.reembed(regclass, name, text) IS
    'Embeds all rows of a table of the caller''s anew, or those that a condition holds for, fresh or not.';

CREATE FUNCTION autoembed._look_through(pipeline autoembed.pipeline, condition text, force boolean)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _before autoembed.backfill;
BEGIN
    DELETE FROM autoembed.backfill AS b WHERE b.pipeline_id = pipeline.id RETURNING b.* INTO _before;
    -- What one under way has not come to yet is not forgotten: for all rows, unless both are for the same.
    INSERT INTO autoembed.backfill (pipeline_id, condition, force, create_index)
    VALUES (
        pipeline.id,
        CASE WHEN _before.pipeline_id IS NULL OR _before.condition = _look_through.condition THEN _look_through.condition END,
        _look_through.force OR coalesce(_before.force, false),
        coalesce(_before.create_index, false)
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._look_through(autoembed.pipeline, text, boolean) IS 'Asks the lanes to look through a table''s rows.';

-- 40_enqueue.sql: the triggers that note which rows have changed. They call neither Python nor the network.

CREATE FUNCTION autoembed.queue_embeddings()
    RETURNS trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _root oid := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    _key jsonb;
BEGIN
    -- Nothing has changed, or only the vector that we ourselves are writing.
    IF TG_OP = 'UPDATE' AND (
        NEW OPERATOR(pg_catalog.*=) OLD
        OR pg_trigger_depth() = 1 AND current_setting('autoembed.writing', true) = _root::text
    ) THEN
        RETURN NEW;
    END IF;

    BEGIN
        -- By the type's output function: a cast, as of to_jsonb(), may be the owner's, and we run with more rights than his.
        _key := to_jsonb(format('%s', NEW.id));
        IF pg_typeof(NEW.id) IN ('bigint'::regtype, 'integer'::regtype, 'smallint'::regtype) THEN
            _key := to_jsonb((_key #>> '{}')::bigint);
        END IF;
    EXCEPTION WHEN undefined_column THEN
        RAISE WARNING USING
            ERRCODE = 'undefined_column',
            MESSAGE = format('a row of %s is not queued for embedding: the table has no column id', TG_RELID::regclass),
            HINT = 'queue_embeddings() finds rows by a primary key column called id.';
        RETURN NEW;
    END;

    -- What pgmq.send() does inside, without its dynamic SQL, which costs more than all the rest.
    INSERT INTO pgmq.q_embedding_jobs (vt, message)
    VALUES (
        clock_timestamp(),
        jsonb_build_object(
            'id', _key,
            'schema', TG_TABLE_SCHEMA,
            'table', TG_TABLE_NAME,
            'contentFunction', TG_ARGV[0],
            'embeddingColumn', TG_ARGV[1],
            'pipeline', (
                SELECT p.id
                FROM autoembed.pipeline AS p
                WHERE p.table_id = _root AND p.embedding_column = TG_ARGV[1]
            )
        )
    );
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.queue_embeddings() IS
    'Row trigger for INSERT and UPDATE: queues the row for embedding. Arguments: the function of a row that gives its text, and the embedding column.';

CREATE FUNCTION autoembed.clear_column()
    RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF NOT NEW OPERATOR(pg_catalog.*=) OLD THEN
        NEW := jsonb_populate_record(NEW, jsonb_build_object(TG_ARGV[0], NULL));
    END IF;
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.clear_column() IS
    'Row trigger BEFORE UPDATE: sets a column to NULL when the row changes. Argument: the column.';

-- 45_triggers.sql: whether the triggers of a pipeline are as they should be.

CREATE FUNCTION autoembed._trigger_problems(pipeline autoembed.pipeline)
    RETURNS TABLE (problem text, cure text)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH wanted AS (
        SELECT e.event, e.bit, autoembed._trigger_name(pipeline.id, e.event) AS name
        -- As in pg_trigger.tgtype.
        FROM (VALUES ('insert', 4), ('update', 16), ('delete', 8), ('truncate', 32), ('clear', 16)) AS e(event, bit)
        WHERE CASE WHEN pipeline.managed THEN e.event <> 'clear' OR pipeline.on_change = 'clear' ELSE e.event IN ('insert', 'update') END
    ),
    found AS (
        SELECT t.*
        FROM pg_trigger AS t
        WHERE t.tgrelid IN (SELECT r.relid FROM pg_partition_tree(pipeline.table_id) AS r UNION ALL SELECT pipeline.table_id)
          AND CASE WHEN pipeline.managed THEN t.tgname IN (SELECT w.name FROM wanted AS w)
                   WHEN t.tgfoid = 'autoembed.queue_embeddings()'::regprocedure THEN (autoembed._arguments(t))[2] = pipeline.embedding_column
                   WHEN t.tgfoid = 'autoembed.clear_column()'::regprocedure THEN (autoembed._arguments(t))[1] = pipeline.embedding_column END
    )
    SELECT format('no trigger for %s', w.event),
           format('CREATE TRIGGER %I AFTER %s ON %s FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings(%L, %L);',
                  w.name, upper(w.event), pipeline.table_id, pipeline.content_function, pipeline.embedding_column)
    FROM wanted AS w
    WHERE NOT EXISTS (
        SELECT FROM found AS f
        WHERE f.tgrelid = pipeline.table_id
          AND CASE WHEN pipeline.managed THEN f.tgname = w.name
                   ELSE f.tgfoid = 'autoembed.queue_embeddings()'::regprocedure AND f.tgtype & w.bit <> 0 END
    )
    UNION ALL
    -- Of a partitioned table on any of its partitions, too.
    SELECT format('trigger %I is disabled', f.tgname), format('ALTER TABLE %s ENABLE TRIGGER %I;', pipeline.table_id, f.tgname)
    FROM found AS f
    GROUP BY f.tgname
    HAVING NOT bool_and(f.tgenabled = 'A' OR f.tgenabled = 'O' AND NOT pipeline.replicated);
$sql$;
COMMENT ON FUNCTION autoembed._trigger_problems(autoembed.pipeline) IS
    'What is wrong with the triggers of a pipeline, and what mends those that were made by hand; resync() makes the others anew.';

-- 50_process.sql: the path of a job. First what the lane does to queue and state, one statement each; then the doors into Python.
-- What every claim calls is in PL/pgSQL: an SQL function with settings of its own is planned anew in each transaction.

CREATE FUNCTION autoembed._claim(max_rows integer, lease_seconds double precision, held bigint[])
    RETURNS TABLE (message_id bigint, read_count integer, message jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- A parameter, unlike clock_timestamp() itself, can be looked up in an index.
    _now timestamptz := clock_timestamp();
    _ready record;
    _messages refcursor;
    _due record;
    _share integer;
    _room integer;
    _newest boolean;
    _ids bigint[] := '{}';
BEGIN
    -- As _gate() does: this begins a lane's transaction.
    LOCK TABLE autoembed.lane IN ACCESS SHARE MODE;
    -- By the index, whatever the queue holds or has held: EXISTS may read all of a table in which many rows are expected.
    IF (SELECT min(q.vt) FROM pgmq.q_embedding_jobs AS q) <= _now IS NOT TRUE THEN
        RETURN;
    END IF;
    FOR _ready IN
        -- From one pipeline in the index to the next: a DISTINCT would read the whole queue.
        WITH RECURSIVE queued AS (
            (SELECT min(coalesce(q.message ->> 'pipeline', '')) AS pipeline FROM pgmq.q_embedding_jobs AS q)
            UNION ALL
            SELECT (
                SELECT min(coalesce(q.message ->> 'pipeline', ''))
                FROM pgmq.q_embedding_jobs AS q
                WHERE coalesce(q.message ->> 'pipeline', '') > n.pipeline
            )
            FROM queued AS n
            WHERE n.pipeline IS NOT NULL
        )
        SELECT n.pipeline, s.failures, count(*) OVER () AS pipelines
        FROM queued AS n
        -- OFFSET 0: looks at these pipelines alone, however many there are.
        LEFT JOIN LATERAL (
            SELECT p.id, p.paused OR r.until > _now AS waits, r.failures
            FROM autoembed.pipeline AS p
            LEFT JOIN autoembed.model_rest AS r ON r.model = coalesce(p.model, autoembed._default_model())
            WHERE p.id = CASE WHEN n.pipeline ~ '^[1-9][0-9]{0,8}$' THEN n.pipeline::integer END
            OFFSET 0
        ) AS s ON true
        WHERE EXISTS (
                  SELECT FROM pgmq.q_embedding_jobs AS q
                  WHERE coalesce(q.message ->> 'pipeline', '') = n.pipeline AND q.vt <= _now
              )
          -- First what is quick to see: many tables may wait for one model, and are looked at ten times a second.
          AND CASE WHEN s.waits THEN false ELSE (SELECT b.blocked FROM autoembed._pipeline_state AS b WHERE b.id = s.id) IS NULL END
    LOOP
        -- Every pipeline has its share, so that none holds up another; a provider that failed last time is tried with one message.
        _share := CASE WHEN _ready.failures > 0 THEN 1 ELSE greatest(1, max_rows / _ready.pipelines) END;
        -- Up to half of it the newest, the rest the oldest: what changes now need not wait for a backlog, which is worked off.
        FOREACH _newest IN ARRAY '{true,false}'::boolean[] LOOP
            _room := CASE WHEN _newest THEN _share / 2 ELSE _share END;
            -- Row by row: a FOR loop reads, and locks, fifty at a time, which other lanes would not see.
            OPEN _messages FOR EXECUTE format(
                $sql$
                SELECT q.msg_id,
                       CASE jsonb_typeof(q.message -> 'keys') WHEN 'array' THEN jsonb_array_length(q.message -> 'keys') ELSE 1 END AS rows
                FROM pgmq.q_embedding_jobs AS q
                WHERE coalesce(q.message ->> 'pipeline', '') = $1 AND q.vt <= $2 AND q.msg_id <> ALL ($3)
                ORDER BY q.vt %s
                FOR UPDATE SKIP LOCKED
                $sql$, CASE WHEN _newest THEN 'DESC' END) USING _ready.pipeline, _now, _ids;
            WHILE _room > 0 LOOP
                FETCH _messages INTO _due;
                EXIT WHEN NOT FOUND OR _newest AND _due.rows > _room;
                _ids := _ids || _due.msg_id;
                _room := _room - _due.rows;
                _share := _share - _due.rows;
            END LOOP;
            CLOSE _messages;
        END LOOP;
    END LOOP;
    RETURN QUERY
    WITH claimed AS (
        UPDATE pgmq.q_embedding_jobs AS q
        SET vt = _now + make_interval(secs => lease_seconds), read_ct = q.read_ct + 1, last_read_at = _now
        WHERE q.msg_id = ANY (_ids)
        RETURNING q.msg_id, q.read_ct, q.message
    ),
    held AS (
        UPDATE autoembed.lane AS l
        SET claimed_at = _now, message_ids = held || _ids
        WHERE (l.pid, l.backend_start) = (SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a) AND _ids <> '{}'
    )
    SELECT c.msg_id, c.read_ct, c.message FROM claimed AS c ORDER BY c.msg_id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._claim(integer, double precision, bigint[]) IS
    'Takes due messages of the pipelines that can be embedded now, hides them for the lease, and counts the try. Of each pipeline, the last message may exceed its share of max_rows. held: the messages that the lane has already.';

CREATE FUNCTION autoembed._extend(message_ids bigint[], lease_seconds double precision)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    UPDATE pgmq.q_embedding_jobs AS q
    SET vt = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE q.msg_id = ANY (message_ids);
$sql$;
COMMENT ON FUNCTION autoembed._extend(bigint[], double precision) IS 'Hides claimed messages for longer.';

CREATE FUNCTION autoembed._settle(message_ids bigint[])
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    DELETE FROM pgmq.q_embedding_jobs AS q WHERE q.msg_id = ANY (message_ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._settle(bigint[]) IS 'Deletes messages that are dealt with.';

CREATE FUNCTION autoembed._release(message_ids bigint[])
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    UPDATE pgmq.q_embedding_jobs AS q
    SET vt = clock_timestamp(), read_ct = q.read_ct - 1
    WHERE q.msg_id = ANY (message_ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._release(bigint[]) IS 'Gives claimed messages back as if they had never been read.';

CREATE FUNCTION autoembed._requeue(pipeline_id integer, keys jsonb, attempts integer, read_count integer, delay_seconds double precision)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO pgmq.q_embedding_jobs (vt, read_ct, message)
    VALUES (clock_timestamp() + make_interval(secs => delay_seconds),
            read_count,
            jsonb_build_object('pipeline', pipeline_id, 'keys', keys, 'attempts', attempts));
$sql$;
COMMENT ON FUNCTION autoembed._requeue(integer, jsonb, integer, integer, double precision) IS
    'Queues rows again, to be tried after the delay; read_count: how often they were in the hands of a lane that died.';

CREATE FUNCTION autoembed._resolve(message jsonb)
    RETURNS integer
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _missing text;
    _table oid;
    _pipeline autoembed.pipeline;
    _function oid;
BEGIN
    SELECT string_agg(k.key, ', ') INTO _missing
    FROM unnest('{id,schema,table,contentFunction,embeddingColumn}'::text[]) AS k(key)
    WHERE jsonb_typeof(message) IS DISTINCT FROM 'object' OR (message ->> k.key) IS NULL;
    IF _missing IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('the message lacks %s', _missing),
            HINT = 'Messages are sent by the trigger autoembed.queue_embeddings().';
    END IF;
    SELECT c.oid INTO _table
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = message ->> 'schema' AND c.relname = message ->> 'table';
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_table',
            MESSAGE = format('there is no table %I.%I', message ->> 'schema', message ->> 'table');
    END IF;
    _pipeline.id := autoembed._adopt(_table, message ->> 'embeddingColumn', message ->> 'contentFunction');
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = _pipeline.id;
    _function := autoembed._content_function(_pipeline.table_id, message ->> 'contentFunction');
    IF _function IS DISTINCT FROM autoembed._content_function_of(_pipeline) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_function',
            MESSAGE = CASE
                WHEN _function IS NULL THEN format('there is no function "%s" of one row of %s', message ->> 'contentFunction', _pipeline.table_id)
                ELSE format('%s.%I is not embedded from function "%s"', _pipeline.table_id, _pipeline.embedding_column, message ->> 'contentFunction')
            END;
    END IF;
    RETURN _pipeline.id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._resolve(jsonb) IS
    'The pipeline that a message of the guide''s form is for, made if it is new; an error if the message is of no use.';

CREATE FUNCTION autoembed._pipelines(ids integer[])
    RETURNS TABLE (id integer, schema_name text, table_name text, content_function text, embedding_column text, vector_type text,
                   truncate boolean, trusted boolean, blocked text, failures integer, model jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- To plan for each list anew costs each claim half a millisecond.
    SET plan_cache_mode = force_generic_plan
AS $plpgsql$
#variable_conflict use_column
BEGIN
    PERFORM autoembed._build_pipeline(s.id) FROM autoembed._pipeline_state AS s WHERE s.id = ANY (ids) AND s.sound;
    RETURN QUERY
    SELECT s.id, n.nspname::text, c.relname::text, s.content_function, s.embedding_column::text,
           (SELECT format_type(a.atttypid, NULL) FROM pg_attribute AS a WHERE a.attrelid = s.table_id AND a.attname = s.embedding_column),
           s.truncate, coalesce((SELECT r.rolsuper FROM pg_roles AS r WHERE r.oid = c.relowner), true), s.blocked, s.failures, autoembed._model_facts(autoembed._model(s.model))
    FROM autoembed._pipeline_state AS s
    LEFT JOIN pg_class AS c ON c.oid = s.table_id
    LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE s.id = ANY (ids);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._pipelines(integer[]) IS
    'What a pass needs to know of its pipelines, their functions made ready.';

CREATE FUNCTION autoembed._digests(pipeline_id integer, keys text[])
    RETURNS TABLE (key text, digest bytea)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY
    SELECT e.key, e.digest FROM autoembed.embedded AS e WHERE e.pipeline_id = _digests.pipeline_id AND e.key = ANY (keys);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._digests(integer, text[]) IS 'From which text the embeddings of these rows were made.';

CREATE FUNCTION autoembed._stage(vector_type regtype, row_bytes integer, file integer, may_have_rows boolean) RETURNS text
    LANGUAGE plpgsql
    -- As the caller: it is he who COPYs.
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- What fits in a page needs no TOAST table, which each commit would empty and index anew, at a cost of 2 kB of the lane's memory.
    storage CONSTANT text := CASE WHEN row_bytes <= 8100 THEN 'PLAIN' ELSE 'EXTERNAL' END;
    name CONSTANT text := format('_autoembed_%s_%s', (SELECT t.typname FROM pg_type AS t WHERE t.oid = vector_type), lower(storage));
    stage CONSTANT text := format('pg_temp.%I', name);
    usable boolean;
    is_there boolean;
BEGIN
    SELECT pg_has_role('pg_read_server_files', 'USAGE')
           AND has_database_privilege(current_database(), 'TEMPORARY')
           -- Made before any owner's code could make one of that name: only ours belongs to us.
           AND coalesce(bool_and(pg_get_userbyid(c.relowner) = current_user), true),
           count(*) > 0
    INTO usable, is_there
    FROM pg_class AS c
    WHERE c.relnamespace = pg_my_temp_schema() AND c.relname = name;
    IF NOT usable THEN
        RETURN NULL;
    ELSIF NOT is_there THEN
        EXECUTE format('CREATE TEMPORARY TABLE %s (n integer, v %s STORAGE %s) ON COMMIT DELETE ROWS', stage, vector_type, storage);
    ELSIF may_have_rows THEN
        EXECUTE format('TRUNCATE %s', stage);
    END IF;
    EXECUTE format('COPY %s FROM ''/proc/self/fd/%s'' (FORMAT binary)', stage, file);
    RETURN stage;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._stage(regtype, integer, integer, boolean) IS
    'Reads numbered vectors of about so many bytes from an open file into a temporary table, and returns its name; NULL if the caller may not do so.';

CREATE FUNCTION autoembed._record_embedded(pipeline_id integer, keys text[], digests bytea[], truncated boolean[])
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    INSERT INTO autoembed.embedded AS e (pipeline_id, key, digest, truncated)
    SELECT _record_embedded.pipeline_id, s.key, s.digest, s.truncated
    FROM unnest(keys, digests, _record_embedded.truncated) AS s(key, digest, truncated)
    -- It may have been ended meanwhile.
    WHERE EXISTS (SELECT FROM autoembed.pipeline AS p WHERE p.id = _record_embedded.pipeline_id FOR KEY SHARE)
    ORDER BY s.key COLLATE "C"
    ON CONFLICT ON CONSTRAINT embedded_pkey DO UPDATE
    SET digest = excluded.digest, truncated = excluded.truncated
    WHERE e.digest <> excluded.digest;
    DELETE FROM autoembed.failure AS f WHERE f.pipeline_id = _record_embedded.pipeline_id AND f.key = ANY (keys);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._record_embedded(integer, text[], bytea[], boolean[]) IS
    'Notes from which text each embedding was made, and strikes the rows off the failed list.';

CREATE FUNCTION autoembed._forget(pipeline_id integer, keys text[])
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM autoembed.embedded AS e WHERE e.pipeline_id = _forget.pipeline_id AND e.key = ANY (keys);
    DELETE FROM autoembed.failure AS f WHERE f.pipeline_id = _forget.pipeline_id AND f.key = ANY (keys);
$sql$;
COMMENT ON FUNCTION autoembed._forget(integer, text[]) IS 'Forgets rows that were deleted.';

CREATE FUNCTION autoembed._forget_all(pipeline_id integer)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM autoembed.embedded AS e WHERE e.pipeline_id = _forget_all.pipeline_id;
    -- One may be of a row that has come since: the newest messages are read before older ones.
    WITH failed AS (
        DELETE FROM autoembed.failure AS f WHERE f.pipeline_id = _forget_all.pipeline_id RETURNING f.key
    )
    INSERT INTO pgmq.q_embedding_jobs (vt, message)
    SELECT clock_timestamp(), jsonb_build_object('pipeline', _forget_all.pipeline_id, 'keys', jsonb_agg(k.key::jsonb))
    FROM (SELECT f.key, (row_number() OVER () - 1) / 100 AS message FROM failed AS f) AS k
    GROUP BY k.message;
$sql$;
COMMENT ON FUNCTION autoembed._forget_all(integer) IS 'Forgets all rows of a table that was truncated; those that have failed are looked at again.';

CREATE FUNCTION autoembed._fail(pipeline_id integer, key text, reason text, attempts integer, excerpt text)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- It may have been ended meanwhile.
    INSERT INTO autoembed.failure AS f (pipeline_id, key, error_class, reason, attempts, excerpt)
    SELECT p.id, _fail.key, 'row', _fail.reason, _fail.attempts, left(_fail.excerpt, 200)
    FROM autoembed.pipeline AS p
    WHERE p.id = _fail.pipeline_id
    FOR KEY SHARE
    ON CONFLICT (pipeline_id, key) DO UPDATE
    SET reason = excluded.reason, attempts = excluded.attempts, excerpt = excluded.excerpt,
        last_failed_at = excluded.last_failed_at;
$sql$;
COMMENT ON FUNCTION autoembed._fail(integer, text, text, integer, text) IS 'Puts a row on the failed list.';

CREATE FUNCTION autoembed._fail_message(message jsonb, reason text, attempts integer)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.failure (message, error_class, reason, attempts)
    VALUES (coalesce(_fail_message.message, 'null'), 'message', _fail_message.reason, _fail_message.attempts);
$sql$;
COMMENT ON FUNCTION autoembed._fail_message(jsonb, text, integer) IS
    'Puts a message that names no row on the failed list.';

CREATE FUNCTION autoembed._enter_lane(backfill boolean)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._forget_runs();
    INSERT INTO autoembed.lane (pid, backend_start, backfill)
    SELECT a.pid, a.backend_start, _enter_lane.backfill FROM pg_stat_get_activity(pg_backend_pid()) AS a
    ON CONFLICT DO NOTHING;
    RETURN EXISTS (
        SELECT FROM autoembed.pipeline AS p
        JOIN pg_index AS i ON i.indrelid = p.table_id
        JOIN pg_class AS c ON c.oid = i.indexrelid
        JOIN pg_am AS m ON m.oid = c.relam AND m.amname IN ('hnsw', 'ivfflat')
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._enter_lane(boolean) IS 'Signs this session on as a lane; backfill: for backfills alone. Returns whether any embedded table has a vector index.';

CREATE FUNCTION autoembed._lane_is_wanted()
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- One without an entry is of an extension that was dropped and made again.
    RETURN EXISTS (SELECT FROM autoembed.lane AS l WHERE (l.pid, l.backend_start) = (SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a) AND NOT l.stop);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lane_is_wanted() IS 'Whether this lane is signed on and nobody has asked it to stop.';

CREATE FUNCTION autoembed._gate()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    LOCK TABLE autoembed.lane IN ACCESS SHARE MODE;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._gate() IS
    'The first lock of a lane''s transaction, which DROP EXTENSION takes first too: neither waits for the other in a circle.';

CREATE FUNCTION autoembed._leave_lane()
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM autoembed.lane AS l WHERE (l.pid, l.backend_start) = (SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a);
$sql$;
COMMENT ON FUNCTION autoembed._leave_lane() IS 'Signs this session off.';

-- Backfills ---------------------------------------------------------------------------------------

CREATE FUNCTION autoembed._next_backfill(dedicated boolean)
    RETURNS TABLE (pipeline_id integer, after text, condition text, failures integer)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- As _gate() does: this begins a lane's transaction.
    LOCK TABLE autoembed.lane IN ACCESS SHARE MODE;
    IF NOT EXISTS (SELECT FROM autoembed.backfill AS b WHERE b.scanned_at IS NULL)
       -- Live changes do not wait behind a backfill where there is a lane for it.
       OR NOT dedicated AND EXISTS (SELECT FROM autoembed.lane AS l WHERE l.backfill) THEN
        RETURN;
    END IF;
    -- In turn, so that none holds up another, whatever becomes of its scan.
    RETURN QUERY
    WITH next AS (
        SELECT b.pipeline_id, s.failures
        FROM autoembed.backfill AS b
        JOIN autoembed._pipeline_state AS s ON s.id = b.pipeline_id AND s.blocked IS NULL
        WHERE b.scanned_at IS NULL
        ORDER BY b.served_at NULLS FIRST, b.started_at
        LIMIT 1
        FOR UPDATE OF b SKIP LOCKED
    )
    UPDATE autoembed.backfill AS b
    SET served_at = clock_timestamp()
    FROM next AS n
    WHERE b.pipeline_id = n.pipeline_id
    RETURNING b.pipeline_id, b.position, b.condition, n.failures;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._next_backfill(boolean) IS
    'A table to look through, locked until the commit; dedicated: for a lane that does nothing else.';

CREATE FUNCTION autoembed._queue_backfill(pipeline_id integer, keys text[], exhausted boolean, lease_seconds double precision, held bigint[])
    RETURNS TABLE (message_id bigint, read_count integer, message jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    _now timestamptz := clock_timestamp();
    _backfill autoembed.backfill;
BEGIN
    UPDATE autoembed.backfill AS b
    SET position = coalesce(keys[cardinality(keys)], b.position),
        rows_queued = b.rows_queued + cardinality(keys),
        scanned_at = CASE WHEN exhausted THEN _now END
    WHERE b.pipeline_id = _queue_backfill.pipeline_id
    RETURNING b.* INTO _backfill;
    IF keys = '{}' THEN
        RETURN;
    END IF;
    IF _backfill.force THEN
        DELETE FROM autoembed.embedded AS e WHERE e.pipeline_id = _queue_backfill.pipeline_id AND e.key = ANY (keys);
    END IF;
    -- In the queue, but claimed already: should this lane die, another finds them there.
    INSERT INTO pgmq.q_embedding_jobs AS q (vt, read_ct, last_read_at, message)
    VALUES (_now + make_interval(secs => lease_seconds), 1, _now,
            jsonb_build_object('pipeline', _queue_backfill.pipeline_id, 'keys', (SELECT jsonb_agg(k.key::jsonb) FROM unnest(keys) AS k(key))))
    RETURNING q.msg_id, q.read_ct, q.message INTO message_id, read_count, message;
    UPDATE autoembed.lane AS l SET claimed_at = _now, message_ids = held || message_id WHERE (l.pid, l.backend_start) = (SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a);
    RETURN NEXT;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._queue_backfill(integer, text[], boolean, double precision, bigint[]) IS
    'Moves a backfill on behind these keys, and returns the message that names them, as claimed.';

CREATE FUNCTION autoembed._fail_backfill(pipeline_id integer, reason text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _backfill autoembed.backfill;
BEGIN
    DELETE FROM autoembed.backfill AS b WHERE b.pipeline_id = _fail_backfill.pipeline_id RETURNING b.* INTO _backfill;
    PERFORM autoembed._fail_message(jsonb_build_object('backfill', to_jsonb(_backfill)), reason, 1);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._fail_backfill(integer, text) IS 'Gives a backfill up, with the reason on the failed list.';

CREATE FUNCTION autoembed._finish_backfills()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _backfill record;
BEGIN
    FOR _backfill IN
        SELECT b.pipeline_id, b.create_index, p.table_id, p.embedding_column
        FROM autoembed.backfill AS b
        JOIN autoembed.pipeline AS p ON p.id = b.pipeline_id
        WHERE b.scanned_at IS NOT NULL
          AND NOT EXISTS (SELECT FROM pgmq.q_embedding_jobs AS q WHERE coalesce(q.message ->> 'pipeline', '') = b.pipeline_id::text)
        FOR UPDATE OF b SKIP LOCKED
    LOOP
        IF NOT _backfill.create_index OR autoembed._build_index(_backfill.pipeline_id) THEN
            DELETE FROM autoembed.backfill AS b WHERE b.pipeline_id = _backfill.pipeline_id;
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._finish_backfills() IS
    'Ends the backfills whose rows are all embedded, once those that asked for an index have it.';

-- The doors ---------------------------------------------------------------------------------------

CREATE FUNCTION autoembed._options_fault(batch_size integer, max_requests integer, timeout_milliseconds integer)
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT format('%s must be at least 1, not %s', o.name, coalesce(o.value::text, 'NULL'))
    FROM (VALUES ('batch_size', batch_size), ('max_requests', max_requests), ('timeout_milliseconds', timeout_milliseconds)) AS o(name, value)
    WHERE (o.value >= 1) IS NOT TRUE
    LIMIT 1;
$sql$;
COMMENT ON FUNCTION autoembed._options_fault(integer, integer, integer) IS
    'The fault in the arguments of process() and work(), NULL if there is none.';

CREATE FUNCTION autoembed._process(
    batch_size integer,
    max_requests integer,
    timeout_milliseconds integer,
    OUT read integer,
    OUT completed integer,
    OUT retried integer,
    OUT failed integer,
    OUT requests integer,
    OUT failed_jobs jsonb
)
    LANGUAGE plpython3u
    VOLATILE
    SECURITY DEFINER
    -- No search_path of its own: behind it, it could not see the caller's, to put that back after an owner's code has run.
    -- As in _work(), every name that the Python side uses is qualified.
AS $python$
    if GD.get("autoembed") != "d8cc025f104e94e6":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.process(batch_size, max_requests, timeout_milliseconds)
$python$;
COMMENT ON FUNCTION autoembed._process(integer, integer, integer) IS 'The work of process(), whose arguments are checked.';

CREATE FUNCTION autoembed.process(
    batch_size integer DEFAULT 100,
    max_requests integer DEFAULT 10,
    timeout_milliseconds integer DEFAULT 300000,
    OUT read integer,
    OUT completed integer,
    OUT retried integer,
    OUT failed integer,
    OUT requests integer,
    OUT failed_jobs jsonb
)
    LANGUAGE plpgsql
    VOLATILE
    SECURITY DEFINER
    -- No search_path of its own, for the reason that _process() has none. Every name is qualified.
AS $plpgsql$
DECLARE
    _fault pg_catalog.text := autoembed._options_fault(batch_size, max_requests, timeout_milliseconds);
BEGIN
    -- Python cannot raise an error without its prefix and its traceback.
    IF _fault IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = _fault, HINT = 'Leave it out for its default.';
    END IF;
    SELECT p.read, p.completed, p.retried, p.failed, p.requests, p.failed_jobs
    INTO read, completed, retried, failed, requests, failed_jobs
    FROM autoembed._process(batch_size, max_requests, timeout_milliseconds) AS p;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.process(integer, integer, integer) IS
    'Embeds waiting jobs once, in the caller''s transaction: up to max_requests requests at a time of up to batch_size texts, each request to a provider given timeout_milliseconds. Returns how many jobs were read, completed, put back to be tried again, and given up, and the requests sent; failed_jobs lists the jobs that did not complete, each with its error.';

CREATE PROCEDURE autoembed._work(
    run_seconds double precision,
    batch_size integer,
    max_requests integer,
    timeout_milliseconds integer,
    backfill boolean
)
    LANGUAGE plpython3u
AS $python$
    if GD.get("autoembed") != "d8cc025f104e94e6":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    doors.work(run_seconds, batch_size, max_requests, timeout_milliseconds, backfill)
$python$;
COMMENT ON PROCEDURE autoembed._work(double precision, integer, integer, integer, boolean) IS
    'The work of work(), whose arguments are checked.';

CREATE PROCEDURE autoembed.work(
    run_seconds double precision DEFAULT 300,
    batch_size integer DEFAULT 100,
    max_requests integer DEFAULT 20,
    timeout_milliseconds integer DEFAULT 300000,
    backfill boolean DEFAULT false
)
    LANGUAGE plpgsql
AS $plpgsql$
DECLARE
    _fault pg_catalog.text := autoembed._options_fault(batch_size, max_requests, timeout_milliseconds);
BEGIN
    IF _fault IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = _fault, HINT = 'Leave it out for its default.';
    END IF;
    -- In a transaction block, where a lane cannot commit, this fails without the traceback of Python.
    COMMIT;
    CALL autoembed._work(run_seconds, batch_size, max_requests, timeout_milliseconds, backfill);
END;
$plpgsql$;
COMMENT ON PROCEDURE autoembed.work(double precision, integer, integer, integer, boolean) IS
    'A lane: embeds what waits, and what comes, for run_seconds; commits as it goes and holds no transaction while a request is in flight. With backfill it looks through tables instead, and leaves the queue to others. schedule() has pg_cron call it.';

CREATE FUNCTION autoembed._embed(
    content text,
    model_name text,
    definition text,
    OUT embedding @extschema:vector@.vector,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpython3u
    STABLE
    PARALLEL RESTRICTED
    SET search_path = pg_catalog, @extschema:vector@, pg_temp
AS $python$
    if GD.get("autoembed") != "d8cc025f104e94e6":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.embed(content, model_name, definition)
$python$;
COMMENT ON FUNCTION autoembed._embed(text, text, text) IS
    'The embedding of a search text by a model, or why there is none. definition: the model''s row; a session keeps vectors of the same text and definition.';

CREATE FUNCTION autoembed.embed(content text, model text DEFAULT NULL)
    RETURNS @extschema:vector@.vector
    LANGUAGE plpgsql
    STABLE
    PARALLEL RESTRICTED
    SECURITY DEFINER
    SET search_path = pg_catalog, @extschema:vector@, pg_temp
AS $plpgsql$
DECLARE
    _model autoembed.model;
    _answer record;
BEGIN
    IF content IS NULL THEN
        RETURN NULL;
    END IF;
    -- Assigned, not selected: such an expression runs no statement, and shows none in the context of an error.
    _model := autoembed._model(model);
    _answer := autoembed._embed(content, _model.name, _model::text);
    IF _answer.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _answer.problem, HINT = _answer.hint, ERRCODE = _answer.errcode;
    END IF;
    RETURN _answer.embedding;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.embed(text, text) IS
    'The embedding of a search text by that model, NULL for the default one; NULL for NULL. ORDER BY column <=> autoembed.embed(…) uses the column''s index.';

-- 55_usage.sql: what was asked of which model, for whom, and what it cost.

CREATE FUNCTION autoembed._note_usage(model text, pipeline_ids integer[], requests integer[], inputs integer[], tokens bigint[], rows integer[], slot integer)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF slot IS NOT NULL THEN
        PERFORM autoembed._free_slots(_note_usage.model, ARRAY[slot]);
    END IF;
    -- embed() works in these too.
    IF NOT current_setting('transaction_read_only')::boolean THEN
        INSERT INTO autoembed.usage_entry (model, pipeline_id, requests, inputs, tokens, rows)
        SELECT _note_usage.model, u.pipeline_id, u.requests, u.inputs, u.tokens, u.rows
        FROM unnest(pipeline_ids, _note_usage.requests, _note_usage.inputs, _note_usage.tokens, _note_usage.rows)
            AS u(pipeline_id, requests, inputs, tokens, rows);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._note_usage(text, integer[], integer[], integer[], bigint[], integer[], integer) IS
    'Notes a request that was answered, with a row for each pipeline that had texts in it, and frees its slot.';

CREATE FUNCTION autoembed._fold_usage()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- One lane at a time; what the last minutes show is read one by one.
    IF (SELECT min(u.at) FROM autoembed.usage_entry AS u) < clock_timestamp() - interval '10 minutes'
       AND pg_try_advisory_xact_lock('autoembed.usage_entry'::regclass::oid::integer, 0) THEN
        WITH folded AS (
            DELETE FROM autoembed.usage_entry AS u WHERE u.at < clock_timestamp() - interval '5 minutes' RETURNING u.*
        )
        INSERT INTO autoembed.usage_day AS d (day, model, pipeline_id, requests, inputs, tokens, rows)
        SELECT (f.at AT TIME ZONE 'UTC')::date, f.model, f.pipeline_id, sum(f.requests), sum(f.inputs), sum(f.tokens), sum(f.rows)
        FROM folded AS f
        GROUP BY 1, 2, 3
        ON CONFLICT (day, model, pipeline_id) DO UPDATE
        SET requests = d.requests + excluded.requests, inputs = d.inputs + excluded.inputs,
            tokens = d.tokens + excluded.tokens, rows = d.rows + excluded.rows;
    END IF;
    PERFORM autoembed._forget_permits();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._fold_usage() IS 'Adds requests of some minutes ago up to their day, and forgets their permits.';

CREATE VIEW autoembed.usage AS
SELECT u.day,
       u.model,
       p.table_id AS table_name,
       p.embedding_column,
       sum(u.requests)::bigint AS requests,
       sum(u.inputs)::bigint AS inputs,
       sum(u.tokens)::bigint AS tokens,
       round(sum(u.tokens) * m.price_per_million_tokens / 1000000, 6) AS cost
FROM (
    SELECT d.day, d.model, d.pipeline_id, d.requests, d.inputs, d.tokens FROM autoembed.usage_day AS d
    UNION ALL
    SELECT (e.at AT TIME ZONE 'UTC')::date, e.model, e.pipeline_id, e.requests, e.inputs, e.tokens FROM autoembed.usage_entry AS e
) AS u
LEFT JOIN autoembed.pipeline AS p ON p.id = u.pipeline_id
LEFT JOIN autoembed.model AS m ON m.name = u.model
GROUP BY u.day, u.model, u.pipeline_id, p.table_id, p.embedding_column, m.price_per_million_tokens;
COMMENT ON VIEW autoembed.usage IS 'Per day (UTC), model and embedding column: what was asked, and its cost at the model''s price.';
COMMENT ON COLUMN autoembed.usage.day IS 'The day, in UTC.';
COMMENT ON COLUMN autoembed.usage.model IS 'The model.';
COMMENT ON COLUMN autoembed.usage.table_name IS 'The table; NULL for embed(), and for tables that are embedded no more.';
COMMENT ON COLUMN autoembed.usage.embedding_column IS 'The column.';
COMMENT ON COLUMN autoembed.usage.requests IS 'Requests that were answered.';
COMMENT ON COLUMN autoembed.usage.inputs IS 'Texts in them.';
COMMENT ON COLUMN autoembed.usage.tokens IS 'Tokens as the provider counted them, or as estimated where it does not.';
COMMENT ON COLUMN autoembed.usage.cost IS 'Tokens at the model''s price_per_million_tokens; NULL where none is set.';

-- 57_clean_up.sql: what lanes see to every second, besides their jobs.

CREATE FUNCTION autoembed._lane_lives(pid integer, backend_start timestamptz)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- With more rights than the reader of a view may have: others' processes show him no start.
    RETURN EXISTS (SELECT FROM pg_stat_get_activity(_lane_lives.pid) AS a WHERE a.backend_start = _lane_lives.backend_start);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._lane_lives(integer, timestamptz) IS 'Whether a process that started then is still there.';

CREATE FUNCTION autoembed._clean_up()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._drop_orphaned_pipelines();
    PERFORM autoembed._finish_backfills();
    PERFORM autoembed._fold_usage();
    WITH dead AS (
        DELETE FROM autoembed.lane AS l
        WHERE NOT autoembed._lane_lives(l.pid, l.backend_start)
        RETURNING l.claimed_at, l.message_ids
    )
    UPDATE pgmq.q_embedding_jobs AS q
    SET vt = clock_timestamp()
    FROM dead AS d
    CROSS JOIN LATERAL unnest(d.message_ids) AS m(id)
    -- Unless another lane has them since.
    WHERE q.msg_id = m.id AND q.last_read_at <= d.claimed_at;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._clean_up() IS
    'Ends the pipelines of dropped tables and the backfills that are done, and makes the jobs of lanes whose backend is gone visible at once; the try stays counted.';

-- 60_schedule.sql: lanes as pg_cron jobs, and leaving without a trace. Nothing else knows pg_cron.

CREATE FUNCTION autoembed._unschedule(jobs text)
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _unscheduled integer := 0;
BEGIN
    IF to_regclass('cron.job') IS NOT NULL THEN
        SELECT count(u.unscheduled) INTO _unscheduled
        FROM cron.job AS j
        CROSS JOIN LATERAL cron.unschedule(j.jobid) AS u(unscheduled)
        WHERE j.jobname ~ format('^autoembed-%s$', jobs) AND j.database = current_database();
    END IF;
    RETURN _unscheduled;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._unschedule(text) IS 'Takes the jobs of such names out of pg_cron; returns how many.';

CREATE FUNCTION autoembed.unschedule()
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    UPDATE autoembed.lane SET stop = true;
    -- Nobody would see to the builds of indexes: the next lane begins them anew.
    PERFORM autoembed._unschedule('(backfill|index)-\d+');
    RETURN autoembed._unschedule('lane-\d+');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.unschedule() IS
    'Ends all lanes; returns how many were scheduled, those for backfills not counted. What a lane has in flight goes back to the queue.';

CREATE FUNCTION autoembed.schedule(lanes integer DEFAULT 1, backfill_lanes integer DEFAULT 1)
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF lanes IS NULL OR lanes NOT BETWEEN 1 AND 32 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('lanes must be between 1 and 32, not %s', coalesce(lanes::text, 'NULL')),
            HINT = 'autoembed.unschedule() ends all lanes.';
    END IF;
    IF backfill_lanes IS NULL OR backfill_lanes NOT BETWEEN 0 AND 32 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('backfill_lanes must be between 0 and 32, not %s', coalesce(backfill_lanes::text, 'NULL')),
            HINT = 'With 0, the other lanes do backfills when nothing else waits.';
    END IF;
    IF to_regclass('cron.job') IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('pg_cron is not installed in database "%s"', current_database()),
            DETAIL = 'pg_cron lives in one database of a server, the one that cron.database_name names.',
            HINT = format(
                'CREATE EXTENSION pg_cron here; or, in its database, SELECT cron.schedule_in_database(%L, %L, %L, %L).',
                'autoembed-lane-1', '1 second', 'CALL autoembed.work()', current_database()
            );
    END IF;
    -- Beside the lanes run pg_cron's own worker and that of logical replication.
    IF current_setting('cron.use_background_workers')::boolean
       AND lanes + backfill_lanes > current_setting('max_worker_processes')::integer - 3 THEN
        RAISE WARNING USING
            ERRCODE = 'configuration_limit_exceeded',
            MESSAGE = format('%s lanes may not all run with max_worker_processes at %s', lanes + backfill_lanes,
                             current_setting('max_worker_processes')),
            HINT = format('Set max_worker_processes to at least %s and restart the server.', lanes + backfill_lanes + 3);
    END IF;
    UPDATE autoembed.lane SET stop = true;
    PERFORM autoembed._unschedule('(lane|backfill)-\d+');
    PERFORM cron.schedule('autoembed-lane-' || n, '1 second', 'CALL autoembed.work()') FROM generate_series(1, lanes) AS n;
    PERFORM cron.schedule('autoembed-backfill-' || n, '1 second', 'CALL autoembed.work(backfill => true)')
    FROM generate_series(1, backfill_lanes) AS n;
    RETURN lanes;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.schedule(integer, integer) IS
    'Has pg_cron run that many lanes side by side in this database, and that many more for backfills, in place of those it ran before; returns the number of lanes.';

CREATE FUNCTION autoembed._forget_runs()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF to_regclass('cron.job_run_details') IS NOT NULL THEN
        -- Those that never started have no time, but a number.
        DELETE FROM cron.job_run_details AS d
        WHERE d.command LIKE 'CALL autoembed.work(%' AND d.database = current_database() AND d.status NOT IN ('starting', 'running')
          AND d.runid < (SELECT min(r.runid) FROM cron.job_run_details AS r WHERE r.start_time > clock_timestamp() - interval '1 hour');
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_runs() IS
    'Deletes what pg_cron has noted of lanes more than an hour ago: it keeps such notes for ever.';

CREATE FUNCTION autoembed._build_index(pipeline_id integer)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _job text := 'autoembed-index-' || pipeline_id;
    -- Lanes look once a second: before a second run, which would find the index there and say so in the log.
    _interval text := '2 seconds';
    _pipeline autoembed.pipeline;
    _index pg_index;
    _key record;
    _name text;
    _problem text;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    SELECT i.* INTO _index FROM autoembed._vector_index(_pipeline.table_id, _pipeline.embedding_column) AS i;
    IF _index.indisvalid THEN
        PERFORM autoembed._unschedule('index-' || pipeline_id);
        RETURN true;
    ELSIF to_regclass('cron.job') IS NULL THEN
        RAISE WARNING USING MESSAGE = format('%s.%I has no index', _pipeline.table_id, _pipeline.embedding_column),
                            HINT = 'Create it by hand: indexes are built by pg_cron, which is not installed in this database.';
        RETURN true;
    END IF;
    SELECT k.* INTO _key FROM autoembed._index_key(_pipeline) AS k;
    SELECT coalesce(b.index_problem, CASE WHEN _key.key IS NULL THEN _key.problem END, (
               -- An error is not tried again; a server that was restarted, or has no process to spare, is.
               SELECT substring(d.return_message FROM '^ERROR:\s*([^\n]*)')
               FROM cron.job_run_details AS d
               JOIN cron.job AS j ON j.jobid = d.jobid AND j.jobname = _job AND j.database = current_database()
               WHERE d.status = 'failed' AND d.return_message LIKE 'ERROR%'
               LIMIT 1
           ))
    INTO _problem
    FROM autoembed.backfill AS b
    WHERE b.pipeline_id = _build_index.pipeline_id;
    IF _problem IS NOT NULL THEN
        PERFORM autoembed._unschedule('index-' || pipeline_id);
        UPDATE autoembed.backfill AS b SET index_problem = _problem WHERE b.pipeline_id = _build_index.pipeline_id AND b.index_problem IS NULL;
    END IF;
    IF _index.indexrelid IS NOT NULL THEN
        -- Either it is being built, or a build was interrupted.
        BEGIN
            EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', _pipeline.table_id);
            -- It may have been finished before the lock was ours.
            IF EXISTS (SELECT FROM pg_index AS i WHERE i.indexrelid = _index.indexrelid AND NOT i.indisvalid) THEN
                EXECUTE format('DROP INDEX %s', _index.indexrelid::regclass);
            END IF;
        EXCEPTION WHEN lock_not_available THEN
            -- The next run would begin as soon as this one ends; to unschedule the job would end this one.
            PERFORM cron.alter_job(j.jobid, schedule => '0 0 1 1 *')
            FROM cron.job AS j
            WHERE j.jobname = _job AND j.database = current_database() AND j.schedule = _interval;
        END;
    ELSIF _problem IS NULL AND NOT EXISTS (
        SELECT FROM cron.job AS j WHERE j.jobname = _job AND j.database = current_database() AND j.schedule = _interval
    ) THEN
        SELECT CASE WHEN to_regclass(format('%I.%I', n.nspname, k.name)) IS NULL THEN k.name ELSE format('autoembed_%s_idx', pipeline_id) END
        INTO STRICT _name
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        CROSS JOIN LATERAL (SELECT left(c.relname, 30) || '_' || left(_pipeline.embedding_column, 25) || '_idx' AS name) AS k
        WHERE c.oid = _pipeline.table_id;
        -- By pg_cron, as no function can build one concurrently.
        PERFORM cron.schedule(_job, _interval, format('CREATE INDEX CONCURRENTLY IF NOT EXISTS %I ON %s USING hnsw (%s)',
                                                      _name, _pipeline.table_id, _key.key));
    END IF;
    RETURN false;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_index(integer) IS
    'Has pg_cron build the HNSW index of a pipeline''s column, concurrently; whether it is there, or cannot be built here.';

-- DROP EXTENSION does not call us, and neither cron.job nor pgmq.meta is ours: so our rows there go before any extension is
-- dropped, and come back if it was not this one.
CREATE FUNCTION autoembed._before_drop()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- What every transaction of a lane locks first: taken first here too, it leaves no way to a deadlock.
    LOCK TABLE autoembed.lane IN ACCESS EXCLUSIVE MODE;
    PERFORM set_config('autoembed.lanes', autoembed.unschedule()::text, true);
    DELETE FROM pgmq.meta AS m WHERE m.queue_name = 'embedding_jobs';
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._before_drop() IS
    'Takes the lanes out of pg_cron and the queue off pgmq''s list before an extension is dropped.';

CREATE EVENT TRIGGER autoembed_before_drop
    ON ddl_command_start
    WHEN TAG IN ('DROP EXTENSION', 'DROP OWNED')
    EXECUTE FUNCTION autoembed._before_drop();

CREATE FUNCTION autoembed._after_drop()
    RETURNS event_trigger
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _lanes integer := nullif(current_setting('autoembed.lanes', true), '');
BEGIN
    INSERT INTO pgmq.meta (queue_name, is_partitioned, is_unlogged)
    VALUES ('embedding_jobs', false, false)
    ON CONFLICT (queue_name) DO NOTHING;
    IF _lanes > 0 AND to_regclass('cron.job') IS NOT NULL THEN
        PERFORM autoembed.schedule(_lanes);
    END IF;
    PERFORM set_config('autoembed.lanes', '', true);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._after_drop() IS 'Puts both back if the extension dropped was another.';

CREATE EVENT TRIGGER autoembed_after_drop
    ON ddl_command_end
    WHEN TAG IN ('DROP EXTENSION', 'DROP OWNED')
    EXECUTE FUNCTION autoembed._after_drop();

-- 70_failed.sql: what was given up, for the operator.

CREATE FUNCTION autoembed._owns(table_id regclass)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT coalesce((SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class AS c WHERE c.oid = table_id), false);
$sql$;
COMMENT ON FUNCTION autoembed._owns(regclass) IS 'Whether the current role has the rights of a table''s owner.';

CREATE FUNCTION autoembed._may_see(table_id regclass)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT autoembed._owns(table_id) OR pg_has_role('pg_monitor', 'USAGE');
$sql$;
COMMENT ON FUNCTION autoembed._may_see(regclass) IS 'Whether the current role owns a table or monitors the server.';

CREATE VIEW autoembed.failed WITH (security_barrier) AS
SELECT f.id,
       p.table_id AS table_name,
       p.embedding_column,
       f.key,
       f.error_class,
       CASE WHEN autoembed._owns(p.table_id) OR p.id IS NULL THEN f.reason END AS reason,
       f.attempts,
       f.first_failed_at,
       f.last_failed_at,
       CASE WHEN autoembed._owns(p.table_id) THEN f.excerpt END AS excerpt,
       f.message
FROM autoembed.failure AS f
LEFT JOIN autoembed.pipeline AS p ON p.id = f.pipeline_id
WHERE autoembed._may_see(p.table_id);
COMMENT ON VIEW autoembed.failed IS
    'The rows that could not be embedded and will not be tried again, each with the reason; retry_failed() tries them again.';
COMMENT ON COLUMN autoembed.failed.id IS 'The failure''s number.';
COMMENT ON COLUMN autoembed.failed.table_name IS 'The table; NULL for a message that names none.';
COMMENT ON COLUMN autoembed.failed.embedding_column IS 'The column that was to hold the embedding.';
COMMENT ON COLUMN autoembed.failed.key IS 'The row''s key as a JSON array.';
COMMENT ON COLUMN autoembed.failed.error_class IS 'row: the text or the table; message: the job itself.';
COMMENT ON COLUMN autoembed.failed.reason IS 'What went wrong the last time, for the table''s owner: it may quote the text.';
COMMENT ON COLUMN autoembed.failed.attempts IS 'How often it was tried.';
COMMENT ON COLUMN autoembed.failed.first_failed_at IS 'When it was given up first.';
COMMENT ON COLUMN autoembed.failed.last_failed_at IS 'When it was given up last.';
COMMENT ON COLUMN autoembed.failed.excerpt IS 'The first 200 characters of the text, for the table''s owner.';
COMMENT ON COLUMN autoembed.failed.message IS 'The message, where it names no row.';

CREATE FUNCTION autoembed.retry_failed(table_name regclass DEFAULT NULL, error_class text DEFAULT NULL)
    RETURNS integer
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _retried integer;
BEGIN
    WITH retried AS (
        DELETE FROM autoembed.failure AS f
        USING autoembed.failed AS v
        WHERE v.id = f.id
          AND (retry_failed.table_name IS NULL OR v.table_name = retry_failed.table_name)
          AND (retry_failed.error_class IS NULL OR v.error_class = retry_failed.error_class)
        RETURNING f.pipeline_id, f.key, f.message
    ),
    queued AS (
        INSERT INTO pgmq.q_embedding_jobs (vt, message)
        SELECT clock_timestamp(),
               coalesce(r.message, jsonb_build_object('pipeline', r.pipeline_id, 'keys', jsonb_build_array(r.key::jsonb)))
        FROM retried AS r
        WHERE r.message -> 'backfill' IS NULL
    ),
    begun AS (
        INSERT INTO autoembed.backfill (pipeline_id, condition, force, create_index)
        SELECT b.pipeline_id, b.condition, b.force, b.create_index
        FROM retried AS r
        CROSS JOIN LATERAL jsonb_populate_record(NULL::autoembed.backfill, r.message -> 'backfill') AS b
        JOIN autoembed.pipeline AS p ON p.id = b.pipeline_id
        WHERE r.message -> 'backfill' IS NOT NULL
        ON CONFLICT DO NOTHING
    )
    SELECT count(*) INTO _retried FROM retried;
    RETURN _retried;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.retry_failed(regclass, text) IS
    'Queues the failed rows of a table, of an error class, or all again; returns how many.';

-- 80_status.sql: how it goes, for operators and owners. An owner sees his tables, members of pg_monitor see all, texts excepted.

CREATE FUNCTION autoembed._estimated_rows(table_id regclass)
    RETURNS bigint
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- As the statistics of activity have it, else as of the last ANALYZE.
    SELECT sum(coalesce(nullif(pg_stat_get_live_tuples(c.oid), 0), nullif(c.reltuples, -1)::bigint, CASE WHEN pg_relation_size(c.oid) = 0 THEN 0 END))::bigint
    FROM (SELECT t.relid FROM pg_partition_tree(table_id) AS t WHERE t.isleaf UNION SELECT table_id) AS r
    JOIN pg_class AS c ON c.oid = r.relid AND c.relkind = 'r';
$sql$;
COMMENT ON FUNCTION autoembed._estimated_rows(regclass) IS
    'About how many rows a table has, without reading it; NULL if it was never analysed.';

CREATE VIEW autoembed.status WITH (security_barrier) AS
SELECT s.table_id AS table_name,
       s.embedding_column,
       s.model,
       CASE WHEN s.paused THEN 'paused'
            WHEN NOT s.sound THEN 'stopped'
            WHEN s.blocked IS NOT NULL THEN 'resting'
            WHEN b.pipeline_id IS NOT NULL AND b.scanned_at IS NULL THEN 'backfilling'
            WHEN q.waiting + q.in_flight > 0 THEN 'embedding'
            WHEN b.create_index AND b.index_problem IS NULL THEN 'indexing'
            ELSE 'idle'
       END AS state,
       coalesce(s.blocked, 'the index could not be built: ' || b.index_problem) AS reason,
       CASE WHEN s.blocked IS NOT NULL THEN s.hint
            WHEN b.index_problem IS NOT NULL THEN format('Create it by hand; or SELECT autoembed.resync(%L) tries it again.', s.table_id)
       END AS hint,
       greatest(r.rows, e.embedded, b.rows_queued) AS estimated_rows,
       e.embedded,
       q.waiting,
       q.in_flight,
       f.failed,
       clock_timestamp() - q.oldest_at AS oldest_waiting,
       a.rows_per_second,
       round(100 * (1 - w.left::numeric / greatest(r.rows, e.embedded, w.left, 1)), 1) AS percent_done,
       CASE WHEN w.left = 0 THEN interval '0'
            WHEN a.rows_per_second > 0 THEN make_interval(secs => round(w.left / a.rows_per_second)::double precision)
       END AS time_left
FROM autoembed._pipeline_state AS s
-- One whose table was dropped is ended by the next lane.
JOIN pg_class AS c ON c.oid = s.table_id
LEFT JOIN autoembed.backfill AS b ON b.pipeline_id = s.id
CROSS JOIN LATERAL (SELECT autoembed._estimated_rows(s.table_id) AS rows) AS r
CROSS JOIN LATERAL (SELECT count(*) AS embedded FROM autoembed.embedded AS e WHERE e.pipeline_id = s.id) AS e
CROSS JOIN LATERAL (SELECT count(*) AS failed FROM autoembed.failure AS f WHERE f.pipeline_id = s.id) AS f
CROSS JOIN LATERAL (
    SELECT coalesce(sum(k.rows) FILTER (WHERE NOT k.held), 0)::bigint AS waiting,
           coalesce(sum(k.rows) FILTER (WHERE k.held), 0)::bigint AS in_flight,
           min(k.enqueued_at) AS oldest_at
    FROM (
        SELECT q.enqueued_at,
               q.vt > clock_timestamp()
                   AND EXISTS (SELECT FROM autoembed.lane AS l
                               WHERE q.msg_id = ANY (l.message_ids) AND autoembed._lane_lives(l.pid, l.backend_start)) AS held,
               CASE jsonb_typeof(q.message -> 'keys') WHEN 'array' THEN jsonb_array_length(q.message -> 'keys') ELSE 1 END AS rows
        FROM pgmq.q_embedding_jobs AS q
        WHERE coalesce(q.message ->> 'pipeline', '') = s.id::text
    ) AS k
) AS q
CROSS JOIN LATERAL (
    SELECT round(coalesce(sum(u.rows), 0) / greatest(extract(epoch FROM clock_timestamp() - min(u.at)), 1), 1) AS rows_per_second
    FROM autoembed.usage_entry AS u
    WHERE u.pipeline_id = s.id AND u.at > clock_timestamp() - interval '1 minute'
) AS a
CROSS JOIN LATERAL (
    SELECT q.waiting + q.in_flight
        + CASE WHEN b.pipeline_id IS NOT NULL AND b.scanned_at IS NULL THEN greatest(coalesce(r.rows, 0) - b.rows_queued, 0) ELSE 0 END AS left
) AS w
WHERE autoembed._may_see(s.table_id);
COMMENT ON VIEW autoembed.status IS 'How each embedding column does.';
COMMENT ON COLUMN autoembed.status.table_name IS 'The table.';
COMMENT ON COLUMN autoembed.status.embedding_column IS 'The column.';
COMMENT ON COLUMN autoembed.status.model IS 'Its model.';
COMMENT ON COLUMN autoembed.status.state IS
    'idle; embedding: rows wait or are in flight; backfilling: the table is being looked through; indexing: its index is being built; resting: the provider is in trouble, or a limit is reached; paused; stopped: somebody must act.';
COMMENT ON COLUMN autoembed.status.reason IS 'Why it is stopped, paused or resting, or has no index though one was asked for.';
COMMENT ON COLUMN autoembed.status.hint IS 'What to do about it.';
COMMENT ON COLUMN autoembed.status.estimated_rows IS 'About how many rows the table has; NULL: it was never analysed.';
COMMENT ON COLUMN autoembed.status.embedded IS 'Rows that were embedded.';
COMMENT ON COLUMN autoembed.status.waiting IS 'Rows queued; a row that changed twice may count twice.';
COMMENT ON COLUMN autoembed.status.in_flight IS 'Rows that lanes have in their hands.';
COMMENT ON COLUMN autoembed.status.failed IS 'Rows given up; see the view failed.';
COMMENT ON COLUMN autoembed.status.oldest_waiting IS 'How long the oldest of those queued or in flight has been so.';
COMMENT ON COLUMN autoembed.status.rows_per_second IS 'Rows embedded a second, over the last minute.';
COMMENT ON COLUMN autoembed.status.percent_done IS 'How much of the table is not waiting, 0 to 100.';
COMMENT ON COLUMN autoembed.status.time_left IS 'At that rate, until nothing waits; NULL: no telling.';

CREATE VIEW autoembed.progress WITH (security_barrier) AS
SELECT l.pid,
       p.table_id AS table_name,
       p.embedding_column,
       CASE WHEN l.backfill THEN 'backfill' ELSE 'live' END AS lane,
       CASE WHEN h.rows > 0 THEN 'embedding' ELSE 'waiting for work' END AS phase,
       h.rows AS rows_in_flight,
       b.rows_queued AS backfill_rows_done,
       CASE WHEN b.pipeline_id IS NOT NULL THEN autoembed._estimated_rows(p.table_id) END AS backfill_rows_total,
       CASE WHEN h.rows > 0 THEN clock_timestamp() - l.claimed_at END AS since
FROM autoembed.lane AS l
LEFT JOIN LATERAL (
    SELECT q.message ->> 'pipeline' AS pipeline,
           sum(CASE jsonb_typeof(q.message -> 'keys') WHEN 'array' THEN jsonb_array_length(q.message -> 'keys') ELSE 1 END)::bigint AS rows
    FROM pgmq.q_embedding_jobs AS q
    WHERE q.msg_id = ANY (l.message_ids) AND q.last_read_at <= l.claimed_at AND q.vt > clock_timestamp()
    GROUP BY 1
) AS h ON true
LEFT JOIN autoembed.pipeline AS p ON p.id::text = h.pipeline
LEFT JOIN autoembed.backfill AS b ON b.pipeline_id = p.id AND l.backfill
WHERE autoembed._lane_lives(l.pid, l.backend_start) AND (p.id IS NULL OR autoembed._may_see(p.table_id));
COMMENT ON VIEW autoembed.progress IS 'What each lane is at, for \watch.';
COMMENT ON COLUMN autoembed.progress.pid IS 'The lane''s process, as in pg_stat_activity.';
COMMENT ON COLUMN autoembed.progress.table_name IS 'The table whose rows it has in its hands.';
COMMENT ON COLUMN autoembed.progress.embedding_column IS 'The column.';
COMMENT ON COLUMN autoembed.progress.lane IS 'live: it embeds what changes; backfill: it looks through tables.';
COMMENT ON COLUMN autoembed.progress.phase IS 'embedding, or waiting for work.';
COMMENT ON COLUMN autoembed.progress.rows_in_flight IS 'Rows it has in its hands.';
COMMENT ON COLUMN autoembed.progress.backfill_rows_done IS 'Rows that the backfill has come past.';
COMMENT ON COLUMN autoembed.progress.backfill_rows_total IS 'About how many rows the table has.';
COMMENT ON COLUMN autoembed.progress.since IS 'How long it has had them.';

CREATE VIEW autoembed._row_state WITH (security_barrier) AS
SELECT r.pipeline_id, r.key, r.digest, r.state
FROM (
    SELECT e.pipeline_id, e.key, e.digest, NULL AS state FROM autoembed.embedded AS e
    UNION ALL
    SELECT f.pipeline_id, f.key, NULL, 'failed' FROM autoembed.failure AS f WHERE f.pipeline_id IS NOT NULL
    UNION ALL
    SELECT p.id, replace(k.key::text, ', ', ','), NULL, 'waiting'
    FROM autoembed.pipeline AS p
    JOIN pgmq.q_embedding_jobs AS q ON coalesce(q.message ->> 'pipeline', '') = p.id::text
    CROSS JOIN LATERAL jsonb_array_elements(coalesce(q.message -> 'keys', jsonb_build_array(jsonb_build_array(q.message -> 'id')))) AS k(key)
    UNION ALL
    SELECT b.pipeline_id, NULL, NULL, 'waiting' FROM autoembed.backfill AS b WHERE b.scanned_at IS NULL
) AS r
JOIN autoembed.pipeline AS p ON p.id = r.pipeline_id
WHERE autoembed._owns(p.table_id);
COMMENT ON VIEW autoembed._row_state IS
    'What is known of the rows of the reader''s tables: the digest of what was embedded, and whether they wait or have failed; no key: the whole table is looked through.';

CREATE FUNCTION autoembed.preview(table_name regclass, key text, embedding_column name DEFAULT NULL)
    RETURNS TABLE (content text, tokens integer, truncated boolean, state text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    -- As _output_settings() has them: the lanes' text and key.
    SET TimeZone = 'UTC'
    SET DateStyle = 'ISO, YMD'
    SET IntervalStyle = 'postgres'
    SET extra_float_digits = 1
    SET bytea_output = 'hex'
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline := autoembed._owned_pipeline(table_name, embedding_column);
    _condition text;
    _has_embedding boolean;
    _key jsonb;
BEGIN
    -- One value for a key of one column, a JSON array for more.
    IF cardinality(_pipeline.key_columns) = 1 AND key !~ '^\s*\[' THEN
        _key := jsonb_build_array(key);
    ELSIF pg_input_is_valid(key, 'jsonb') THEN
        _key := key::jsonb;
    END IF;
    -- In its own type and by its own operator, so that its index serves.
    SELECT string_agg(format('t.%I %s %L::%s', k.name, autoembed._operator(table_name, k.name, 3), k.value, k.type), ' AND ')
    INTO _condition
    FROM (
        SELECT n.name, format_type(a.atttypid, a.atttypmod) AS type, _key ->> (n.position - 1)::integer AS value
        FROM unnest(_pipeline.key_columns) WITH ORDINALITY AS n(name, position)
        JOIN pg_attribute AS a ON a.attrelid = table_name AND a.attname = n.name
    ) AS k
    HAVING jsonb_typeof(_key) = 'array' AND jsonb_array_length(_key) = count(*) AND bool_and(coalesce(pg_input_is_valid(k.value, k.type), false));
    IF _condition IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('%s is no key of table %s', coalesce(key, 'NULL'), table_name),
            HINT = format('Its key is %s%s.', array_to_string(_pipeline.key_columns, ', '),
                          CASE WHEN cardinality(_pipeline.key_columns) > 1 THEN ', to be given as a JSON array' ELSE '' END);
    END IF;
    -- As the caller, so that row level security holds.
    EXECUTE format('SELECT %s, t.%I IS NOT NULL, %s FROM %s AS t WHERE %s LIMIT 1', autoembed._content_expression(_pipeline, 't'),
                   _pipeline.embedding_column, autoembed._key_expression(_pipeline, 't'), table_name, _condition)
    INTO content, _has_embedding, _key;
    IF _has_embedding IS NULL THEN
        RETURN;
    END IF;
    SELECT s.tokens, s.truncated, s.state INTO tokens, truncated, state
    FROM (
        SELECT max(encode(r.digest, 'hex')) AS digest, max(r.state) AS state
        FROM autoembed._row_state AS r
        WHERE r.pipeline_id = _pipeline.id AND r.key = replace(_key::text, ', ', ',')
    ) AS r
    CROSS JOIN LATERAL autoembed._state_of(_pipeline.id, content, _has_embedding, r.digest, r.state) AS s;
    RETURN NEXT;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.preview(regclass, text, name) IS
    'What a row of a table of the caller''s is embedded as: its text, about how many tokens that has, whether it is cut, and whether its embedding is fresh, waiting, failed, missing, stale, or not wanted. No row if there is none with that key.';

CREATE FUNCTION autoembed._state_of(pipeline_id integer, content text, has_embedding boolean, digest text, outstanding text)
    RETURNS TABLE (tokens integer, truncated boolean, state text)
    LANGUAGE plpython3u
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "d8cc025f104e94e6":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return [doors.state_of(pipeline_id, content, has_embedding, digest, outstanding)]
$python$;
COMMENT ON FUNCTION autoembed._state_of(integer, text, boolean, text, text) IS
    'How a row stands whose text is this, and of whose embedding that digest is known.';

CREATE FUNCTION autoembed.wait_until_fresh(table_name regclass, timeout_seconds double precision DEFAULT 60)
    RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _end timestamptz := clock_timestamp() + make_interval(secs => timeout_seconds);
BEGIN
    PERFORM autoembed._owned_pipelines(table_name, NULL);
    LOOP
        IF NOT EXISTS (
            SELECT FROM autoembed._owned_pipelines(table_name, NULL) AS p JOIN autoembed._row_state AS r ON r.pipeline_id = p.id
            WHERE r.state = 'waiting'
        ) THEN
            RETURN true;
        END IF;
        IF clock_timestamp() >= _end THEN
            RETURN false;
        END IF;
        PERFORM pg_sleep(least(0.02, extract(epoch FROM _end - clock_timestamp())));
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.wait_until_fresh(regclass, double precision) IS
    'Waits until nothing that was committed to a table of the caller''s waits to be embedded; whether that came true in time. Embedding is done by lanes; a change of the caller''s own transaction, which they do not see, never comes true.';

CREATE FUNCTION autoembed.estimate(
    table_name regclass,
    embedding_column name DEFAULT NULL,
    content_columns name[] DEFAULT NULL,
    content_function text DEFAULT NULL,
    content_template text DEFAULT NULL,
    model text DEFAULT NULL,
    condition text DEFAULT NULL,
    OUT rows bigint,
    OUT tokens bigint,
    OUT requests bigint,
    OUT cost numeric,
    OUT duration interval
)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _pipeline autoembed.pipeline;
    _sample bigint;
    _percent numeric;
    _texts text[];
    _dimensions integer;
    _found record;
BEGIN
    IF num_nonnulls(content_columns, content_function, content_template) = 0 THEN
        _pipeline := autoembed._owned_pipeline(table_name, embedding_column);
    ELSE
        PERFORM autoembed._check_owner(table_name);
        PERFORM autoembed._check_content(content_columns, content_function, content_template, true);
        _pipeline.table_id := table_name;
        _pipeline.content_columns := estimate.content_columns;
        _pipeline.content_function := estimate.content_function;
        _pipeline.content_template := estimate.content_template;
        _pipeline.condition_columns := '{}';
    END IF;
    _pipeline.model := coalesce(estimate.model, _pipeline.model);
    -- A model that does not exist is an error here: one that Python raises would have a prefix and a traceback.
    _dimensions := autoembed._dimensions(_pipeline.model);
    IF estimate.condition IS NOT NULL THEN
        SELECT c.condition, c.columns INTO _pipeline.condition, _pipeline.condition_columns
        FROM autoembed._read_condition(table_name, estimate.condition) AS c;
    END IF;
    rows := coalesce(autoembed._estimated_rows(table_name), 0);
    -- About 10,000 rows of a large table stand for all.
    _percent := CASE WHEN rows > 20000 THEN 1000000.0 / rows ELSE 100 END;
    EXECUTE format('SELECT count(*), array_agg(s.content) FILTER (WHERE s.content ~ ''\S'') FROM (SELECT %s AS content FROM %s AS t %s) AS s',
                   autoembed._content_expression(_pipeline, 't'), table_name,
                   CASE WHEN _percent < 100 THEN format('TABLESAMPLE SYSTEM (%s)', _percent) END)
    INTO _sample, _texts;
    SELECT e.* INTO _found FROM autoembed._estimate_texts(coalesce(_texts, '{}'), _pipeline.model) AS e;
    IF _percent = 100 THEN
        rows := cardinality(coalesce(_texts, '{}'));
        tokens := _found.tokens;
        requests := _found.requests;
    ELSE
        tokens := _found.tokens * rows / greatest(_sample, 1);
        requests := ceil(_found.requests * rows / greatest(_sample, 1)::numeric);
        rows := cardinality(coalesce(_texts, '{}')) * rows / greatest(_sample, 1);
    END IF;
    cost := round(tokens * _found.price / 1000000, 4);
    duration := make_interval(secs => rows / nullif(_found.rows_per_second, 0));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.estimate(regclass, name, name[], text, text, text, text) IS
    'What it would take to embed all rows of a table of the caller''s, as enable() would be told, or as it is enabled: about how many rows, tokens and requests, the cost at the model''s price, and the time at the rate of its busiest minute of late. Nothing is sent; large tables are sampled.';

CREATE FUNCTION autoembed._estimate_texts(texts text[], model text)
    RETURNS TABLE (tokens bigint, requests bigint, price numeric, rows_per_second numeric)
    LANGUAGE plpython3u
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "d8cc025f104e94e6":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return [doors.estimate(texts, model)]
$python$;
COMMENT ON FUNCTION autoembed._estimate_texts(text[], text) IS 'What it takes to embed these texts.';

CREATE FUNCTION autoembed._price_and_rate(model text, OUT price numeric, OUT rows_per_second numeric)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT m.price_per_million_tokens,
           (SELECT max(u.rows) / 60.0
            FROM (SELECT sum(e.rows) AS rows FROM autoembed.usage_entry AS e WHERE e.model = m.name GROUP BY date_trunc('minute', e.at)) AS u)
    FROM autoembed.model AS m
    WHERE m.name = _price_and_rate.model;
$sql$;
COMMENT ON FUNCTION autoembed._price_and_rate(text) IS
    'What a model costs, and the rows a second that it did in its busiest minute of late; NULL: nothing known.';

CREATE FUNCTION autoembed.doctor()
    RETURNS TABLE (subject text, ok boolean, finding text, advice text)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _row record;
    _cron boolean := to_regclass('cron.job') IS NOT NULL;
    _lanes bigint;
    _scheduled bigint;
    _start text;
    _problem text;
    _index record;
BEGIN
    SELECT count(*) INTO _lanes FROM autoembed.lane AS l WHERE NOT l.stop AND NOT l.backfill AND autoembed._lane_lives(l.pid, l.backend_start);
    _start := CASE WHEN _cron THEN 'SELECT autoembed.schedule();'
                   WHEN current_setting('cron.database_name', true) IS NULL
                   THEN 'Set shared_preload_libraries = ''pg_cron'', restart the server, and look here again; or have something else call autoembed.work().'
                   WHEN current_setting('cron.database_name') = current_database() THEN 'CREATE EXTENSION pg_cron; SELECT autoembed.schedule();'
                   ELSE format('In database "%s": SELECT cron.schedule_in_database(%L, %L, %L, %L);', current_setting('cron.database_name'),
                               'autoembed-lane-1', '1 second', 'CALL autoembed.work()', current_database()) END;
    FOR _row IN
        SELECT n.name, e.installed_version, e.default_version
        FROM unnest('{autoembed,pg_cron,pgmq,plpython3u,vector}'::text[]) AS n(name)
        LEFT JOIN pg_available_extensions AS e ON e.name = n.name
        ORDER BY n.name
    LOOP
        subject := format('extension %s', _row.name);
        -- Only pg_cron can be missing; it lives in one database of a server, and starts lanes in any.
        ok := CASE WHEN _row.installed_version IS NULL THEN _lanes > 0 ELSE _row.installed_version = _row.default_version END;
        finding := coalesce('version ' || _row.installed_version, 'not in this database')
            || CASE WHEN _row.installed_version <> _row.default_version THEN format(', %s is there', _row.default_version) ELSE '' END;
        advice := CASE WHEN NOT ok AND _row.installed_version IS NULL THEN _start
                       WHEN NOT ok THEN format('ALTER EXTENSION %I UPDATE;', _row.name) END;
        RETURN NEXT;
    END LOOP;

    subject := 'lanes';
    IF _cron THEN
        EXECUTE $sql$
            SELECT count(*), 'the last said: ' || (
                SELECT split_part(d.return_message, E'\n', 1) FROM cron.job_run_details AS d WHERE d.jobid = ANY (array_agg(j.jobid)) ORDER BY d.runid DESC LIMIT 1)
            FROM cron.job AS j
            WHERE j.active AND j.database = current_database() AND j.command ~ 'autoembed\.work'
        $sql$ INTO _scheduled, _problem;
    END IF;
    ok := _lanes > 0;
    finding := concat_ws(', ', _lanes || ' running', _scheduled || ' jobs of pg_cron', CASE WHEN NOT ok THEN _problem END);
    advice := CASE WHEN ok THEN NULL
                   WHEN _scheduled > 0 THEN 'pg_cron does not start them: see cron.job_run_details and the server''s log, and that max_worker_processes suffices.'
                   ELSE _start END;
    RETURN NEXT;

    FOR _row IN
        SELECT m.name, r.until, r.reason, r.needs_attention
        FROM autoembed.model AS m
        LEFT JOIN autoembed.model_rest AS r ON r.model = m.name AND r.until > clock_timestamp()
        WHERE m.name IN (SELECT coalesce(p.model, autoembed._default_model()) FROM autoembed.pipeline AS p UNION SELECT autoembed._default_model())
        ORDER BY m.name
    LOOP
        subject := format('model %s', _row.name);
        _problem := autoembed._probe(_row.name);
        ok := _row.until IS NULL AND _problem IS NULL;
        finding := coalesce(_problem, 'rests until ' || _row.until || ': ' || _row.reason, 'answers');
        advice := CASE WHEN _problem IS NOT NULL THEN 'Mend its definition with autoembed.alter_model(), its key or the network; it is tried again by itself.'
                       WHEN _row.until IS NOT NULL THEN format('SELECT autoembed.resume_model(%L); tries it at once.', _row.name) END;
        RETURN NEXT;
    END LOOP;

    FOR _row IN
        SELECT s.*, p AS pipeline, format('%s.%I', s.table_id, s.embedding_column) AS name, c.relkind = 'p' AS partitioned, b.index_problem
        FROM autoembed._pipeline_state AS s
        JOIN autoembed.pipeline AS p ON p.id = s.id
        -- One whose table was dropped is ended by the next lane.
        JOIN pg_class AS c ON c.oid = s.table_id
        LEFT JOIN autoembed.backfill AS b ON b.pipeline_id = s.id
        ORDER BY s.id
    LOOP
        subject := format('table %s', _row.name);
        ok := _row.sound AND NOT _row.paused;
        finding := coalesce(_row.blocked, 'sound');
        advice := CASE WHEN NOT ok THEN _row.hint END;
        RETURN NEXT;

        subject := format('triggers of %s', _row.name);
        SELECT string_agg(t.problem, ', '), CASE WHEN NOT (_row.pipeline).managed THEN string_agg(t.cure, ' ') END
        INTO finding, advice
        FROM autoembed._trigger_problems(_row.pipeline) AS t;
        ok := finding IS NULL;
        advice := CASE WHEN NOT ok THEN concat_ws(' ', advice, format('SELECT autoembed.resync(%L);', _row.table_id)) END;
        finding := coalesce(finding, 'in place');
        RETURN NEXT;

        IF _row.sound THEN
            subject := format('index of %s', _row.name);
            SELECT k.* INTO _index FROM autoembed._index_key(_row.pipeline) AS k;
            -- One on each partition will do; the table's own takes those that are there.
            SELECT CASE WHEN count(i.*) = count(*) THEN string_agg(i.indexrelid::regclass::text, ', ' ORDER BY r.relid) END,
                   concat_ws(' ', CASE WHEN _index.key IS NOT NULL THEN _index.hint END,
                             string_agg(format('CREATE INDEX CONCURRENTLY ON %s USING hnsw (%s);', r.relid::regclass, _index.key), ' ' ORDER BY r.relid)
                                 FILTER (WHERE i.indexrelid IS NULL),
                             CASE WHEN _row.partitioned THEN format('CREATE INDEX ON %s USING hnsw (%s);', _row.table_id, _index.key) END,
                             CASE WHEN _index.expression LIKE '%::%' THEN format('-- Used by ORDER BY %s <=> …', _index.expression) END)
            INTO finding, advice
            FROM (SELECT t.relid FROM pg_partition_tree(_row.table_id) AS t WHERE t.isleaf
                  UNION SELECT _row.table_id WHERE NOT _row.partitioned) AS r
            JOIN pg_class AS c ON c.oid = r.relid AND c.relkind = 'r'
            LEFT JOIN LATERAL (SELECT v.* FROM autoembed._vector_index(r.relid, _row.embedding_column) AS v WHERE v.indisvalid) AS i ON true;
            -- A few thousand rows are searched faster without one.
            ok := finding IS NOT NULL OR _row.index_problem IS NULL AND coalesce(autoembed._estimated_rows(_row.table_id), 0) < 10000;
            finding := coalesce(finding, 'none' || coalesce(', it could not be built: ' || _row.index_problem, ''));
            advice := CASE WHEN NOT ok THEN CASE WHEN _index.key IS NULL THEN _index.hint ELSE advice END END;
            RETURN NEXT;
        END IF;

        subject := format('failed rows of %s', _row.name);
        SELECT count(*) = 0, count(*) || coalesce(', the last: ' || (array_agg(f.reason ORDER BY f.last_failed_at DESC))[1], '') INTO ok, finding FROM autoembed.failure AS f WHERE f.pipeline_id = _row.id;
        advice := CASE WHEN NOT ok THEN format('Look at autoembed.failed; when mended, SELECT autoembed.retry_failed(%L);', _row.table_id) END;
        RETURN NEXT;
    END LOOP;

    subject := 'queue';
    SELECT coalesce(clock_timestamp() - min(q.enqueued_at) < interval '5 minutes', true),
           format('%s messages', count(*)) || coalesce(', the oldest for ' || date_trunc('second', clock_timestamp() - min(q.enqueued_at)), '')
    INTO ok, finding
    FROM pgmq.q_embedding_jobs AS q;
    advice := CASE WHEN NOT ok THEN 'See autoembed.status for what holds it up; more lanes: SELECT autoembed.schedule(2).' END;
    RETURN NEXT;

    IF EXISTS (SELECT FROM autoembed.failure AS f WHERE f.pipeline_id IS NULL) THEN
        subject := 'failed messages';
        SELECT false, count(*) || ', the last: ' || (array_agg(f.reason ORDER BY f.last_failed_at DESC))[1] INTO ok, finding FROM autoembed.failure AS f WHERE f.pipeline_id IS NULL;
        advice := 'Look at autoembed.failed. Again: SELECT autoembed.retry_failed(error_class => ''message''); or no more: '
            'DELETE FROM autoembed.failure WHERE error_class = ''message'';';
        RETURN NEXT;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.doctor() IS
    'Checks everything that has to be right, model by model and table by table: whether it is, what was found, and what to do. Sends each model in use one word.';

CREATE FUNCTION autoembed._probe(model text)
    RETURNS text
    LANGUAGE plpython3u
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "d8cc025f104e94e6":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.probe(model)
$python$;
COMMENT ON FUNCTION autoembed._probe(text) IS 'Sends a model one word; what is wrong with it, NULL: nothing.';

-- 85_grant.sql: what a role needs, in one call.

CREATE FUNCTION autoembed._grant(role regrole, functions text[])
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA autoembed TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', (
        SELECT string_agg(p.oid::regprocedure::text, ', ')
        FROM pg_proc AS p
        -- A view's functions are called with the rights of whoever reads it.
        WHERE p.pronamespace = 'autoembed'::regnamespace
          AND p.proname = ANY (functions || '{_check_pipeline,_default_model,_estimated_rows,_lane_lives,_may_see,_owns}'::text[])
    ), role);
    EXECUTE format('GRANT SELECT ON autoembed.status, autoembed.progress, autoembed.failed TO %s', role);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._grant(regrole, text[]) IS 'Grants these functions, and what every reader of the views needs.';

CREATE FUNCTION autoembed.grant_usage(role regrole)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._grant(role, '{embed,queue_embeddings,clear_column,enable,alter_pipeline,disable,pause,resume,resync,reembed,preview,
        estimate,wait_until_fresh,_owned_pipelines,_owned_pipeline,_check_owner,_check_content,_check_on_change,_needed_columns,_template,_dimensions,_read_condition,
        _look_through,_state_of,_content_expression,_key_expression,_columns_of,_content_function,_content_function_of,
        _estimate_texts,_index_key,_operator}');
    EXECUTE format('GRANT SELECT,
                    INSERT (table_id, embedding_column, content_columns, content_function, content_template, condition, condition_columns,
                            condition_objects, model, on_change, truncate, replicated),
                    UPDATE (content_columns, content_function, content_template, condition, condition_columns, condition_objects, model,
                            on_change, truncate, paused),
                    DELETE ON autoembed.pipeline TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT (pipeline_id, condition, force, create_index), DELETE ON autoembed.backfill TO %s', role);
    EXECUTE format('GRANT SELECT ON autoembed._row_state TO %s', role);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.grant_usage(regrole) IS
    'Lets a role attach tables that it owns, see how they do, and call embed(); all of it costs your provider''s money.';

CREATE FUNCTION autoembed.grant_monitor(role regrole)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._grant(role, '{}');
    EXECUTE format('GRANT SELECT ON autoembed.usage, autoembed.model_rest TO %s', role);
    EXECUTE format('GRANT pg_monitor TO %s', role);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.grant_monitor(regrole) IS
    'Lets a role see how all tables do, their texts excepted, and what they cost; makes it a member of pg_monitor.';

-- 90_privileges.sql: nothing is for PUBLIC. Last, so that nothing escapes it.

REVOKE ALL ON SCHEMA autoembed FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA autoembed FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA autoembed FROM PUBLIC;
