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
    api_key text CHECK (api_key ~ '^(env|file):.'),
    max_inputs_per_request integer CHECK (max_inputs_per_request > 0),
    max_tokens_per_request integer CHECK (max_tokens_per_request > 0),
    max_tokens_per_input integer CHECK (max_tokens_per_input > 0),
    options jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(options) = 'object'),
    builtin boolean NOT NULL DEFAULT false
);
COMMENT ON TABLE autoembed.model IS 'The ways to embed a text; see create_model().';
COMMENT ON COLUMN autoembed.model.name IS 'What pipelines and embed() call it.';
COMMENT ON COLUMN autoembed.model.provider IS 'How it is spoken to: local, openai, azure, cohere, voyage, gemini or ollama.';
COMMENT ON COLUMN autoembed.model.model_id IS 'What the provider calls it.';
COMMENT ON COLUMN autoembed.model.dimensions IS 'Length of its vectors.';
COMMENT ON COLUMN autoembed.model.base_url IS
    'Where it is: the URL before /embeddings, or the folder of a local model; NULL: the provider''s own.';
COMMENT ON COLUMN autoembed.model.api_key IS
    'Where its key is found, never the key: env:NAME or file:PATH on the database server.';
COMMENT ON COLUMN autoembed.model.max_inputs_per_request IS 'Texts in one request; NULL: the provider''s limit.';
COMMENT ON COLUMN autoembed.model.max_tokens_per_request IS 'Tokens in one request; NULL: the provider''s limit.';
COMMENT ON COLUMN autoembed.model.max_tokens_per_input IS
    'Tokens of one text, longer ones are truncated; NULL: the provider''s limit.';
COMMENT ON COLUMN autoembed.model.options IS
    'What only its provider knows; every one over HTTP takes extra_headers and extra_body, objects sent with each request.';
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
    name text PRIMARY KEY CHECK (name IN ('default_model')),
    value text NOT NULL
);
COMMENT ON TABLE autoembed.setting IS 'Settings of this database; what is not here has its default.';
COMMENT ON COLUMN autoembed.setting.name IS 'default_model: for pipelines and embed() calls that name none.';
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

-- Pipelines ---------------------------------------------------------------------------------------

CREATE TABLE autoembed.pipeline (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    table_id regclass NOT NULL,
    embedding_column name NOT NULL,
    content_function text NOT NULL,
    model text REFERENCES autoembed.model (name) ON UPDATE CASCADE,
    truncate boolean NOT NULL DEFAULT true,
    built_from text,
    UNIQUE (table_id, embedding_column, content_function)
);
COMMENT ON TABLE autoembed.pipeline IS
    'One embedding column of one table: what is embedded there, with which model.';
COMMENT ON COLUMN autoembed.pipeline.id IS 'Names it in jobs and in its two functions.';
COMMENT ON COLUMN autoembed.pipeline.table_id IS 'The table; of a partitioned one the root.';
COMMENT ON COLUMN autoembed.pipeline.embedding_column IS 'The vector or halfvec column that holds the embeddings.';
COMMENT ON COLUMN autoembed.pipeline.content_function IS
    'The function of a row that gives the text, as the trigger names it.';
COMMENT ON COLUMN autoembed.pipeline.model IS 'Its model; NULL: the default model.';
COMMENT ON COLUMN autoembed.pipeline.truncate IS
    'Whether a text longer than the model takes is cut, and noted in embedded, or fails.';
COMMENT ON COLUMN autoembed.pipeline.built_from IS
    'What its functions were built from, to see when the table has changed.';

SELECT pg_catalog.pg_extension_config_dump('autoembed.pipeline', '');
SELECT pg_catalog.pg_extension_config_dump('autoembed.pipeline_id_seq', '');

CREATE TABLE autoembed.embedded (
    pipeline_id integer NOT NULL REFERENCES autoembed.pipeline (id) ON DELETE CASCADE,
    key text NOT NULL,
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
    PRIMARY KEY (pid, backend_start)
);
COMMENT ON TABLE autoembed.lane IS
    'The lanes and what each holds; when its backend is gone, the next lane frees its jobs.';
COMMENT ON COLUMN autoembed.lane.pid IS 'The lane''s process, as in pg_stat_activity.';
COMMENT ON COLUMN autoembed.lane.backend_start IS 'When that process started: tells it from a later one of the same id.';
COMMENT ON COLUMN autoembed.lane.claimed_at IS 'When it claimed what it holds.';
COMMENT ON COLUMN autoembed.lane.message_ids IS 'The messages it holds.';
COMMENT ON COLUMN autoembed.lane.stop IS 'Whether it was asked to stop.';

CREATE TABLE autoembed.failure (
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    pipeline_id integer REFERENCES autoembed.pipeline (id) ON DELETE CASCADE,
    key text,
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
"autoembed.batching": r'''"""Packs texts into requests, as few as the model's limits allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has: more rather than fewer.

    Byte-pair vocabularies spend about 4 ASCII characters on a token of prose, fewer on code and numbers, and up to
    2 tokens on a character of other scripts.
    """
    ascii_characters = sum(character < "\x80" for character in text) if not text.isascii() else len(text)
    return 1 + ascii_characters // 3 + 2 * (len(text) - ascii_characters)


def truncate(text: str, max_tokens: int) -> str:
    """The longest beginning of a text that is estimated to have at most max_tokens."""
    if estimate_tokens(text) <= max_tokens:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if estimate_tokens(text[:middle]) <= max_tokens:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def pack(texts: Sequence[str], max_inputs: int, max_tokens: int) -> list[list[str]]:
    """The texts in order, in lists of at most max_inputs texts and max_tokens estimated tokens.

    A text that has more tokens by itself gets a list of its own.
    """
    requests: list[list[str]] = []
    tokens_left = 0
    for text in texts:
        tokens = estimate_tokens(text)
        if not requests or len(requests[-1]) == max_inputs or tokens > tokens_left:
            requests.append([])
            tokens_left = max_tokens
        requests[-1].append(text)
        tokens_left -= tokens
    return requests


def halves(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """What failed as a whole, split, to find the one that is to blame."""
    middle = len(items) // 2
    return items[:middle], items[middle:]
''',
"autoembed.database": r'''"""The one door to plpy: every statement that the Python side runs is a method here."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import plpy  # type: ignore[import-not-found]

from autoembed.errors import InvalidInput, row_error
from autoembed.model import Model

if TYPE_CHECKING:
    import numpy as np

# What a statement that fails raises.
Error = plpy.SPIError

_plans: dict[str, Any] = {}


@dataclass(frozen=True)
class Message:
    """A message of the queue: its number, how often it was read, and what it says."""

    id: int
    read_count: int
    body: Any


@dataclass(frozen=True)
class Pipeline:
    """One embedding column of one table.

    truncate: too long texts are cut rather than failed; trusted: its owner is a superuser; blocked: why its jobs wait,
    if they do; failures: how often its model's provider has failed in a row.
    """

    id: int
    schema_name: str
    table_name: str
    content_function: str
    embedding_column: str
    truncate: bool
    trusted: bool
    blocked: str | None
    failures: int
    model: Model


@dataclass(frozen=True)
class Row:
    """A row as it stands: its text, and whether its embedding is there."""

    content: str | None
    has_embedding: bool


class _Undo(Exception):
    """Rolls a subtransaction back that has done what it was for."""


class Database:
    """The database as seen from a lane, which commits as it goes, or from a function, which cannot."""

    def __init__(self, *, commits: bool) -> None:
        self._commits = commits

    def commit(self) -> None:
        if self._commits:
            plpy.commit()

    def breathe(self) -> None:
        """Lets a cancel, a timeout or a shutdown through, and keeps a lane's transactions short."""
        plpy.execute("SELECT 1")
        self.commit()

    # Lanes ---------------------------------------------------------------------------------------

    def enter_lane(self) -> None:
        self._run("SELECT autoembed._enter_lane()")

    def leave_lane(self) -> None:
        self._run("SELECT autoembed._leave_lane()")

    def free_dead_lanes(self) -> None:
        self._run("SELECT autoembed._free_dead_lanes()")

    def gate(self) -> None:
        """To be called first in a transaction that writes: keeps it from a deadlock with DROP EXTENSION."""
        self._run("SELECT autoembed._gate()")

    def lane_is_wanted(self) -> bool:
        """Whether nobody has asked the lane to stop."""
        return bool(self._run("SELECT autoembed._lane_is_wanted() AS wanted")[0]["wanted"])

    def statement_timeout_seconds(self) -> float | None:
        """How long a statement of this session may take; None: as long as it likes."""
        row = self._run(
            "SELECT s.setting FROM pg_catalog.pg_settings AS s WHERE s.name OPERATOR(pg_catalog.=) 'statement_timeout'"
        )[0]
        return int(row["setting"]) / 1000 or None

    # The queue -----------------------------------------------------------------------------------

    def claim(self, max_rows: int, lease_seconds: float) -> list[Message]:
        rows = self._run(
            "SELECT c.message_id, c.read_count, c.message FROM autoembed._claim($1, $2) AS c",
            ["pg_catalog.int4", "pg_catalog.float8"],
            [max_rows, lease_seconds],
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

    def requeue(self, pipeline_id: int, keys: Sequence[str], attempts: int, delay_seconds: float) -> None:
        self._run(
            "SELECT autoembed._requeue($1, $2, $3, $4)",
            ["pg_catalog.int4", "pg_catalog.jsonb", "pg_catalog.int4", "pg_catalog.float8"],
            [pipeline_id, f"[{','.join(keys)}]", attempts, delay_seconds],
        )

    # Pipelines and models ------------------------------------------------------------------------

    def resolve(self, body: Any) -> int:
        """The pipeline of a message of the guide's form; RowError if it is of no use."""
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
                truncate=row["truncate"],
                trusted=row["trusted"],
                blocked=row["blocked"],
                failures=row["failures"],
                model=Model.from_row(json.loads(row["model"])),
            )
            for row in rows
        }

    def model(self, name: str | None) -> Model:
        """The model of that name, the default one for None; an error of PostgreSQL's kind if there is none."""
        sql = "SELECT pg_catalog.to_jsonb(m) AS model FROM autoembed._model($1) AS m"
        return Model.from_row(json.loads(self._run(sql, ["pg_catalog.text"], [name])[0]["model"]))

    def rest_model(self, name: str, seconds: float, needs_attention: bool, reason: str) -> None:
        self._run(
            "SELECT autoembed._rest_model($1, $2, $3, $4)",
            ["pg_catalog.text", "pg_catalog.float8", "pg_catalog.bool", "pg_catalog.text"],
            [name, seconds, needs_attention, reason],
        )

    def resume_model(self, name: str) -> None:
        self._run("SELECT autoembed.resume_model($1)", ["pg_catalog.text"], [name])

    def warn_of_blocked_pipelines(self) -> None:
        """Warns of the pipelines that have jobs waiting and cannot be embedded."""
        self._run("SELECT autoembed._warn_of_blocked_pipelines(true)")

    # Rows ----------------------------------------------------------------------------------------

    def rows(self, pipeline: Pipeline, keys: Sequence[str]) -> dict[str, Row]:
        """The rows that exist, by key; RowError if the content function fails for one of them."""
        rows: Any = []
        with _row_errors(), contextlib.suppress(_Undo), plpy.subtransaction():
            rows = self._run(
                f"SELECT c.key, c.content, c.has_embedding FROM autoembed._content_{pipeline.id}($1) AS c",
                ["pg_catalog.text[]"],
                [list(keys)],
            )
            # Whatever the owner's code has done besides: settings, temporary objects.
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
        """Writes each vector (None: NULLs) whose row still says the text.

        Returns what became of each key: written, changed, locked or gone. RowError if a row does not take its
        vector; then none was written.
        """
        embeddings = [None] * len(keys) if vectors is None else literals(vectors)
        with _row_errors(), contextlib.nullcontext() if pipeline.trusted else self._settings_kept():
            rows = self._run(
                f"SELECT w.key, w.outcome FROM autoembed._write_{pipeline.id}($1, $2, $3) AS w",
                ["pg_catalog.text[]", "pg_catalog.text[]", "pg_catalog.text[]"],
                [list(keys), list(contents), embeddings],
            )
            if not pipeline.trusted:
                self._run("SELECT autoembed._check_deferred()")
        return {row["key"]: row["outcome"] for row in rows}

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
        """Puts back the settings of the session that an owner's code changes inside."""
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
        # Not shown among the settings, and of weight to our triggers.
        self._run("SELECT pg_catalog.set_config('autoembed.writing', '', false)")

    def _settings(self) -> dict[str, str]:
        """The settings that were made in this session."""
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


def raise_error(error: InvalidInput) -> None:
    """Ends the call with a PostgreSQL error."""
    hint = {} if error.hint is None else {"hint": error.hint}
    plpy.error(str(error), sqlstate=error.sqlstate, **hint)


def warn(message: str, hint: str) -> None:
    plpy.warning(message, hint=hint)


def is_installed() -> bool:
    return bool(
        plpy.execute("SELECT FROM pg_catalog.pg_extension AS e WHERE e.extname OPERATOR(pg_catalog.=) 'autoembed'")
    )


@contextmanager
def _row_errors() -> Iterator[None]:
    """Undoes a statement that fails by a row's fault and raises RowError; all other errors go their way."""
    try:
        with plpy.subtransaction():
            yield
    except plpy.SPIError as error:
        # An SQLSTATE that PostgreSQL does not know leaves the attribute out.
        fault = row_error(getattr(error, "sqlstate", None) or "XX000", str(error))
        if fault is None:
            raise
        raise fault from error


def literals(vectors: np.ndarray) -> list[str]:
    """Vectors as text in pgvector's form."""
    import numpy as np
    import orjson

    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    return [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY).decode() for row in rows]


def _body(message: str | None) -> Any:
    # Fractions stay text: a numeric key must come back digit by digit.
    return None if message is None else json.loads(message, parse_float=str)
''',
"autoembed.doors": r'''"""Where SQL enters Python: each function is the body of the SQL function of the same name."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

from autoembed import database, worker
from autoembed.errors import InvalidInput, ProviderTrouble, Trouble
from autoembed.flight import Flight
from autoembed.model import Ask, Embedded, Model
from autoembed.network import Network
from autoembed.providers import provider_of

# A plan without an index calls embed() for every row, a search page for every page.
QUERY_CACHE_SIZE = 100
QUERY_TIMEOUT_SECONDS = 60.0

_network = Network(max_connections=32)
_queries: OrderedDict[tuple[Model, str], str] = OrderedDict()


def process(batch_size: int, max_requests: int, timeout_milliseconds: int) -> dict[str, Any]:
    options = _options(batch_size, max_requests, timeout_milliseconds)
    here = database.Database(commits=False)
    here.free_dead_lanes()
    report = worker.run_pass(here, _network, options)
    here.warn_of_blocked_pipelines()
    return {**vars(report), "failed_jobs": json.dumps(report.failed_jobs)}


def work(run_seconds: float, batch_size: int, max_requests: int, timeout_milliseconds: int) -> None:
    options = _options(batch_size, max_requests, timeout_milliseconds)
    try:
        worker.work(database.Database(commits=True), _network, options, run_seconds)
    except database.Error:
        # DROP EXTENSION while the lane ran is no error.
        if database.is_installed():
            raise


def embed(content: str | None, model_name: str | None) -> str | None:
    if content is None:
        return None
    here = database.Database(commits=False)
    model = here.model(model_name)
    query = (model, content)
    if query not in _queries:
        try:
            if not content.strip():
                raise InvalidInput("a blank text has no embedding", hint="Give embed() some words.")
            _queries[query] = _embed_query(here, model, content)
        except InvalidInput as error:
            database.raise_error(error)
        except Trouble as trouble:
            message = f'model "{model.name}" gave no embedding: {trouble}'
            database.raise_error(InvalidInput(message, sqlstate="38000"))
        if len(_queries) > QUERY_CACHE_SIZE:
            _queries.popitem(last=False)
    _queries.move_to_end(query)
    return _queries[query]


def check_model(name: str) -> None:
    model = database.Database(commits=False).model(name)
    try:
        provider_of(model).check(model)
    except InvalidInput as error:
        database.raise_error(error)
    except ProviderTrouble as trouble:
        database.warn(
            f'model "{name}" cannot be used yet: {trouble}',
            "It is tried again by itself once this is mended.",
        )


def _embed_query(here: database.Database, model: Model, content: str) -> str:
    provider = provider_of(model)

    def abort() -> None:
        _network.abort()
        provider.abort()

    with Flight[None, Embedded](1, here.breathe, abort) as flight:
        ask = Ask(model, [content], QUERY_TIMEOUT_SECONDS, purpose="query")
        flight.submit(None, lambda: provider.embed(ask, _network))
        [(_, outcome)] = flight.landed()
    if isinstance(outcome, BaseException):
        raise outcome
    return database.literals(outcome.vectors)[0]


def _options(batch_size: int, max_requests: int, timeout_milliseconds: int) -> worker.Options:
    for name, value in (
        ("batch_size", batch_size),
        ("max_requests", max_requests),
        ("timeout_milliseconds", timeout_milliseconds),
    ):
        if value is None or value < 1:
            database.raise_error(
                InvalidInput(f"{name} must be at least 1, not {value}", hint=f"Leave {name} out for its default.")
            )
    return worker.Options(batch_size, max_requests, timeout_milliseconds / 1000)
''',
"autoembed.errors": r'''"""What can go wrong, by whose fault and whether it passes: decided here, acted on in worker."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from datetime import UTC


class InvalidInput(Exception):
    """A mistake of the caller: becomes a PostgreSQL error with message, hint and SQLSTATE."""

    def __init__(self, message: str, *, hint: str | None = None, sqlstate: str = "22023") -> None:
        super().__init__(message)
        self.hint = hint
        self.sqlstate = sqlstate


class Trouble(Exception):
    """An embedding that could not be had; str() is one sentence for the operator, without secrets."""


class Refused(Trouble):
    """The provider refused this request but not the next: one of its texts is to blame."""


class ProviderTrouble(Trouble):
    """The provider is to blame, not the texts.

    permanent: somebody must act (a wrong key, an unknown model); otherwise it passes by itself.
    retry_after_seconds: what the provider asked for, if it did.
    """

    def __init__(self, message: str, *, permanent: bool = False, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.retry_after_seconds = retry_after_seconds


class RowError(Exception):
    """A statement failed by a row's fault: its data, or its owner's functions, triggers and constraints.

    passes: somebody else was in the way, and the same statement may work in a moment.
    """

    def __init__(self, message: str, *, passes: bool) -> None:
        super().__init__(message)
        self.passes = passes


# SQLSTATEs by their beginnings (PostgreSQL manual, appendix A). What passes by itself: rollbacks for concurrency, and
# locks that are not to be had. What is nobody's row: no disk or memory left, cancel and shutdown, a failing disk.
PASSING = ("40", "55")
NOBODYS = ("53", "57", "58030")


def row_error(sqlstate: str, message: str) -> RowError | None:
    """The row error that a failed statement means; None if no row is to blame."""
    if sqlstate.startswith(NOBODYS):
        return None
    return RowError(message, passes=sqlstate.startswith(PASSING))


MAX_REST_SECONDS = 15.0
MAX_PERMANENT_REST_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 3600.0


def rest_seconds(trouble: ProviderTrouble, failures: int, fraction: float) -> float:
    """How long a model rests after its provider failed that many times before; fraction: random, from 0 to 1.

    What the provider asks for, plus up to a second so that lanes do not come back all at once; else exponential backoff
    with full jitter. Never long: one small request now and then is how we learn that the provider is back.
    """
    if trouble.retry_after_seconds is not None:
        return min(trouble.retry_after_seconds, MAX_RETRY_AFTER_SECONDS) + fraction
    if trouble.permanent:
        return float(min(10.0 * 2 ** min(failures, 10), MAX_PERMANENT_REST_SECONDS))
    return 0.2 + fraction * min(2.0 ** min(failures, 10), MAX_REST_SECONDS)


# RFC 9110, section 15: what a client should make of a status. 409, 423, 425: a busy gateway.
REFUSED_STATUSES = {400, 413, 414, 422}
PASSING_STATUSES = {408, 409, 423, 425, 429}


def trouble_of_answer(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None
) -> Trouble:
    """The trouble that an HTTP answer with a status other than 200 means."""
    message = f"the provider answered {status}: {_message_in(body, secret)}"
    if status in REFUSED_STATUSES:
        return Refused(message)
    if status == 429 and b"insufficient_quota" in body:
        return ProviderTrouble(message, permanent=True)
    if status in PASSING_STATUSES or status >= 500:
        return ProviderTrouble(message, retry_after_seconds=retry_after_seconds(headers))
    if 300 <= status < 400:
        return ProviderTrouble(f"the provider answered {status}, a redirect, which is not followed", permanent=True)
    return ProviderTrouble(message, permanent=True)


def retry_after_seconds(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Retry-After in seconds from now, given as such or as an HTTP date (RFC 9110, 10.2.3); None if there is none."""
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
    """The provider's own words, on one line of at most 300 characters, without the key it may echo."""
    text = body[:10_000].decode("utf-8", "replace")
    try:
        answer = json.loads(text)
        error = answer.get("error", answer)
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, RecursionError):
        pass
    if secret:
        text = text.replace(secret, "***")
    return " ".join(text.split())[:300] or "no explanation"
''',
"autoembed.flight": r'''"""Calls that run side by side in threads, while the backend stays able to be interrupted."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Tag = TypeVar("Tag")
Result = TypeVar("Result")

# How long a cancel or a shutdown may have to wait before it is noticed.
SLICE_SECONDS = 0.05


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Threads started inside never receive a signal: PostgreSQL's handlers must run in its own thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# How long a backend that is told to leave may be kept by a thread that does not end.
EXIT_SECONDS = 1.0


def _flights() -> set[Flight[Any, Any]]:
    """The flights of this process. A set of its own in sys.modules, which outlives a new version of these modules."""
    name = "_autoembed_flights"
    if name not in sys.modules:
        holder: Any = types.ModuleType(name)
        holder.flights = set()
        holder.callback = _end_flights_before_exit(holder.flights)
        sys.modules[name] = holder
    return sys.modules[name].flights  # type: ignore[no-any-return]


def _end_flights_before_exit(flights: set[Flight[Any, Any]]) -> Any:
    """Has PostgreSQL end all flights before it leaves the process.

    exit() tears down libraries, OpenSSL first, under threads that still use them: a segmentation fault then, which
    restarts the whole server. PostgreSQL's own exit callbacks run before that.
    """
    on_proc_exit = getattr(ctypes.CDLL(None), "on_proc_exit", None)
    if on_proc_exit is None:
        # Not inside a backend.
        return None

    def end_all(code: int, _argument: int) -> None:
        for flight in list(flights):
            if not flight.end(EXIT_SECONDS):
                os._exit(code)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t)(end_all)
    on_proc_exit(callback, ctypes.c_size_t(0))
    return callback


class Flight(Generic[Tag, Result]):
    """Up to max_calls calls at a time. Leaving the context ends those that still run: abort() is called for that."""

    def __init__(self, max_calls: int, breathe: Callable[[], None], abort: Callable[[], None]) -> None:
        self._executor = ThreadPoolExecutor(max_calls, thread_name_prefix="autoembed")
        self._breathe = breathe
        self._abort = abort
        self._tags: dict[Future[Result], Tag] = {}

    def __enter__(self) -> Flight[Tag, Result]:
        _flights().add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        _flights().discard(self)

    def end(self, seconds: float = math.inf) -> bool:
        """Ends all calls and their threads; False if one is still there after so many seconds."""
        until = time.monotonic() + seconds
        self._executor.shutdown(wait=False, cancel_futures=True)
        # Not wait() on all: a call cancelled before it began is never done for it.
        while running := [future for future in self._tags if not future.done()]:
            if time.monotonic() > until:
                return False
            self._abort()
            wait(running, timeout=SLICE_SECONDS)
        self._executor.shutdown(wait=True)
        return True

    def submit(self, tag: Tag, call: Callable[[], Result]) -> None:
        """Has a call made; landed() gives its tag back with the outcome."""
        with signals_blocked():
            self._tags[self._executor.submit(call)] = tag

    def withdraw(self, unwanted: Callable[[Tag], bool]) -> list[Tag]:
        """Takes back calls that have not begun; returns their tags."""
        taken = [future for future, tag in self._tags.items() if unwanted(tag) and future.cancel()]
        return [self._tags.pop(future) for future in taken]

    def landed(self) -> Iterator[tuple[Tag, Result | BaseException]]:
        """The outcome of every call, those submitted meanwhile included, as they come; breathe() runs between."""
        while self._tags:
            done = wait(self._tags, timeout=SLICE_SECONDS, return_when=FIRST_COMPLETED).done
            self._breathe()
            for future in done:
                if future not in self._tags:
                    continue
                tag = self._tags.pop(future)
                error = future.exception()
                yield tag, future.result() if error is None else error
''',
"autoembed.jobs": r'''"""Jobs and messages: which rows a message is for, what became of each, and when the message can go."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from autoembed.database import Database, Message, Pipeline, Row


class Address(NamedTuple):
    """The rows that a message is for: their pipeline (None: to be found by names) and their keys as JSON arrays."""

    pipeline_id: int | None
    keys: list[str]
    attempts: int


def address_of(body: Any) -> Address:
    """Reads a message of ours (pipeline, keys) or of the guide's form (id, schema, …); ValueError if it is neither."""
    if not isinstance(body, dict):
        raise ValueError("the message is not an object")
    pipeline_id, keys, attempts = body.get("pipeline"), body.get("keys"), body.get("attempts", 0)
    if keys is None:
        if body.get("id") is None:
            raise ValueError("the message lacks id")
        keys = [[body["id"]]]
    if not isinstance(keys, list) or not keys or not all(_is_key(key) for key in keys):
        raise ValueError("the message's keys are not rows' keys")
    if not isinstance(pipeline_id, int | None) or not isinstance(attempts, int):
        raise ValueError("the message's pipeline or attempts is not a number")
    return Address(pipeline_id, [json.dumps(key, ensure_ascii=False, separators=(",", ":")) for key in keys], attempts)


def _is_key(key: Any) -> bool:
    return isinstance(key, list) and len(key) > 0 and all(isinstance(value, str | int) for value in key)


def isolate(messages: list[Message], fraction: float) -> tuple[list[Message], list[Message]]:
    """The messages to work on now, and those to set aside; fraction: random, from 0 to 1.

    A message read before was never settled: its lane died, perhaps of it. The more often, the smaller the company it
    is tried in, so that a deadly one takes few others with it. Those that died least come first, so that servers
    killed for other reasons add to the count of many, not again and again of one; half the time, those never tried.
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
    """What became of a job; again_in_seconds: it goes back to the queue; released: as if it had never been read."""

    again_in_seconds: float | None = None
    attempts: int = 0
    released: bool = False


DONE = Outcome()
RELEASED = Outcome(released=True)


@dataclass(eq=False)
class Job:
    """One row to embed, as claimed by one or more messages."""

    pipeline: Any  # Pipeline; None if it was dropped meanwhile
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


@dataclass
class Report:
    """What a pass did, in jobs; failed_jobs has the guide's keys."""

    read: int = 0
    completed: int = 0
    retried: int = 0
    failed: int = 0
    requests: int = 0
    failed_jobs: list[dict[str, Any]] = field(default_factory=list)


class Ledger:
    """Keeps what became of each job, and settles a message when all its jobs are dealt with."""

    def __init__(self, database: Database, messages: Sequence[Message]) -> None:
        self._database = database
        # Messages whose jobs are not known yet, and the jobs of the others.
        self._unread = {message.id for message in messages}
        self._messages: dict[int, list[Job]] = defaultdict(list)
        self.report = Report()

    def open(self, job: Job) -> None:
        self.report.read += 1
        for message_id in job.message_ids:
            self._unread.discard(message_id)
            self._messages[message_id].append(job)

    def set_aside(self, messages: Sequence[Message]) -> None:
        """Back to the queue, for a later pass."""
        self._unread.difference_update(message.id for message in messages)
        self._database.release([message.id for message in messages])

    def done(self, job: Job) -> None:
        job.outcome = DONE
        self.report.completed += 1

    def retry(self, job: Job, delay_seconds: float, error: str | None = None, *, counts: bool = False) -> None:
        """Back to the queue; counts: as an attempt."""
        job.outcome = Outcome(delay_seconds, job.attempts + counts)
        self.report.retried += 1
        if error is not None:
            self._note(job, error)

    def release(self, job: Job, error: str) -> None:
        """Back to the queue as it was: not the row's fault."""
        if job.outcome is None:
            job.outcome = RELEASED
            self.report.retried += 1
            self._note(job, error)

    def fail(self, job: Job, reason: str, attempts: int | None = None) -> None:
        job.outcome = DONE
        self.report.failed += 1
        self._note(job, reason)
        self._database.fail(job.pipeline, job.key, reason, attempts or job.attempts + 1, job.content)

    def fail_message(self, message: Message, reason: str) -> None:
        self.report.read += 1
        self.report.failed += 1
        self.report.failed_jobs.append({"jobId": message.id, "message": message.body, "error": reason})
        self._database.fail_message(message.body, reason, message.read_count)
        self._database.settle([message.id])
        self._unread.discard(message.id)

    def release_open(self) -> None:
        """Gives back all that is not dealt with, when a pass ends before its time."""
        for jobs in self._messages.values():
            for job in jobs:
                job.outcome = job.outcome or RELEASED
        if self._unread:
            self._database.release(list(self._unread))
            self._unread.clear()

    def open_message_ids(self) -> list[int]:
        return [*self._unread, *self._messages]

    def flush(self) -> None:
        """Writes what is decided: messages whose jobs are all dealt with leave the queue or go back to it."""
        decided = [
            message_id for message_id, jobs in self._messages.items() if all(job.outcome is not None for job in jobs)
        ]
        released, settled = [], []
        again: dict[tuple[int, int, float], dict[str, None]] = defaultdict(dict)
        for message_id in decided:
            jobs = self._messages.pop(message_id)
            if all(job.outcome is RELEASED for job in jobs):
                released.append(message_id)
                continue
            settled.append(message_id)
            for job in jobs:
                outcome = job.outcome
                if outcome is RELEASED:
                    again[job.pipeline.id, job.attempts, 0.0][job.key] = None
                elif outcome is not None and outcome.again_in_seconds is not None:
                    again[job.pipeline.id, outcome.attempts, outcome.again_in_seconds][job.key] = None
        for (pipeline_id, attempts, delay_seconds), keys in again.items():
            self._database.requeue(pipeline_id, list(keys), attempts, delay_seconds)
        if released:
            self._database.release(released)
        if settled:
            self._database.settle(settled)

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


def resolve(reference: str | None) -> str | None:
    """The key that env:NAME or file:PATH refers to, None for None; ProviderTrouble (permanent) if there is none."""
    if reference is None:
        return None
    kind, _, name = reference.partition(":")
    if kind == "env":
        key = os.environ.get(name, "")
        missing = f"the environment variable {name} is not set for the database server"
    else:
        key, missing = _read(name)
    key = key.strip()
    if not key:
        raise ProviderTrouble(f"there is no API key: {missing}", permanent=True)
    # An HTTP client would say so too, and quote the key.
    if not (key.isascii() and key.isprintable()):
        raise ProviderTrouble(f"what {reference} holds is no API key: it is not one line of ASCII", permanent=True)
    return key


def _read(path: str) -> tuple[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(), f"the file {path} is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        return "", f"the file {path} cannot be read ({reason})"
''',
"autoembed.model": r'''"""A model as the table autoembed.model defines it; what it is asked, and what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

# What a text is embedded as: many models embed a question and the document that answers it in two ways.
Purpose = Literal["document", "query"]
# The options of a model that prefixed() obeys.
PREFIXES = frozenset({"document_prefix", "query_prefix"})


@dataclass(frozen=True)
class Model:
    """A way to embed; the limits are the model's own, None where it leaves them to its provider."""

    name: str
    provider: str
    model_id: str
    dimensions: int
    base_url: str | None = None
    api_key: str | None = None
    max_inputs_per_request: int | None = None
    max_tokens_per_request: int | None = None
    max_tokens_per_input: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Model:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    def digest(self, content: str) -> bytes:
        """16 bytes that tell whether this text, by this model, has been embedded before."""
        name = f"{self.provider}\0{self.model_id}\0{self.dimensions}\0{self.options.get('document_prefix', '')}"
        return hashlib.blake2b((name + content).encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class Ask:
    """Texts of one model that travel together, what they are, and how long the answer may take."""

    model: Model
    texts: Sequence[str]
    timeout_seconds: float
    purpose: Purpose = "document"


def prefixed(ask: Ask) -> list[str]:
    """The texts as a model wants them that knows documents from queries by how they begin.

    E5, BGE, nomic and others say in their cards what to put before each, say "query: " and "passage: ": that is what
    the options document_prefix and query_prefix hold, spaces included.
    """
    prefix = ask.model.options.get(f"{ask.purpose}_prefix", "")
    return [prefix + text for text in ask.texts]


@dataclass(frozen=True)
class Embedded:
    """What a provider made of them: (n, dimensions) float32, in their order, finite; and the tokens it counted."""

    vectors: np.ndarray
    tokens: int | None = None
''',
"autoembed.network": r'''"""The one door to the network: posts a body, returns the answer, and lets go when told to."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoembed.errors import ProviderTrouble

if TYPE_CHECKING:
    import requests

CONNECT_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray


class Network:
    """Connections, kept from one request to the next. Threads may share it; abort() ends their requests at once."""

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._session: requests.Session | None = None
        self._sockets: dict[int, socket.socket] = {}
        self._lock = threading.Lock()

    def post(
        self, url: str, headers: Mapping[str, str], body: bytes, *, timeout_seconds: float, max_answer_bytes: int
    ) -> Answer:
        """The answer to a POST, whatever its status; ProviderTrouble if there is none in time or it is too large.

        Redirects are not followed; certificates are verified.
        """
        # 0.2-0.3 s in a new backend, so not before there is something to send.
        import requests
        import urllib3

        deadline = time.monotonic() + timeout_seconds
        timeouts = (min(CONNECT_TIMEOUT_SECONDS, timeout_seconds), timeout_seconds)
        try:
            with self._connected().post(
                url,
                data=body,
                headers=dict(headers),
                timeout=timeouts,
                allow_redirects=False,
                stream=True,
                # Anything, so that a .netrc of the server's user never replaces the key.
                auth=lambda request: request,
            ) as response:
                received = bytearray()
                # What has come so far: iter_content() would wait for a full chunk, past any deadline.
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
        finally:
            self._watch(None)

    def abort(self) -> None:
        """Ends every request that is under way; its thread sees a broken connection."""
        with self._lock:
            for connection in self._sockets.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _watch(self, connection: socket.socket | None) -> None:
        """Remembers what this thread waits on. A copy: TLS takes the socket's descriptor away from the object."""
        with self._lock:
            before = self._sockets.pop(threading.get_ident(), None)
            if before is not None:
                before.close()
            if connection is not None:
                self._sockets[threading.get_ident()] = socket.socket(fileno=os.dup(connection.fileno()))

    def _connected(self) -> requests.Session:
        with self._lock:
            if self._session is None:
                self._session = _session(self._max_connections, self._watch)
            return self._session


def _session(max_connections: int, watch: Callable[[socket.socket], None]) -> requests.Session:
    """A session that shows watch() each socket before a thread first waits on it."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Watched:
        def request(self, *args: Any, **kwargs: Any) -> Any:
            if self.sock is not None:  # type: ignore[attr-defined]
                watch(self.sock)  # type: ignore[attr-defined]
            return super().request(*args, **kwargs)  # type: ignore[misc]

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

    session = requests.Session()
    adapter = WatchedAdapter(pool_maxsize=max_connections)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _connect(host: str, port: int, timeout: Any, options: Any, watch: Callable[[socket.socket], None]) -> socket.socket:
    """A connected socket; watch() sees it before it waits for the other side, so that connecting can be aborted too."""
    from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise NameResolutionError(host, None, error) from error  # type: ignore[arg-type]
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, address in addresses:
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


def _host(url: str) -> str:
    return url.split("://", 1)[-1].split("/", 1)[0].rsplit("@", 1)[-1]


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line: requests wraps it three times over."""
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

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# Padded tokens in one batch: 256 to 512 were fastest on 2 cores, and more only costs memory and patience.
BATCH_TOKENS = 512
# What is handed to the tokenizer at once, for it cannot be interrupted.
TOKENIZE_TEXTS = 64
# Only so much of a text is tokenized at first: a megabyte costs 0.4 s and 120 MB.
CHARACTERS_PER_TOKEN = 16
# WordPiece makes of a word up to one token per character, of a longer word than this a single one.
LONGEST_WORD_CHARACTERS = 100


class Stopped(Exception):
    """The embedding was stopped."""


class OnnxModel:
    """Texts in, unit vectors out: the mean of the token vectors that the model gives.

    onnxruntime starts threads here, and a thread inherits the signal mask of the one that starts it. In a
    database backend, create the model in a thread that has blocked all signals: the server's handlers must
    not run in another thread than its own.
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
        _release_memory()

    def embed(self, texts: Sequence[str], between_batches: Callable[[], None] = lambda: None) -> Array:
        """Return one float32 vector of unit length for each text, in their order.

        `between_batches` is called before each batch and may raise. To give up from another thread, first see
        to it that `between_batches` raises, then call `stop`.
        """
        import numpy as np
        import onnxruntime

        vectors = np.empty((len(texts), self.dimensions), np.float32)
        try:
            tokens = self._tokenize(texts, between_batches)
            for batch in batches([len(ids) for ids in tokens], BATCH_TOKENS):
                self._run = onnxruntime.RunOptions()
                between_batches()
                vectors[batch] = self._embed_batch([tokens[i] for i in batch])
        finally:
            _release_memory()
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
                    # The cut may be felt in the tokens that count.
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
        # The sum has the mean's direction, and only that is left at unit length.
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
    # Its own threads would start in whichever thread tokenizes first, signals blocked or not.
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
    # Both keep what the largest batches needed.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Threads that spin while they wait take the cores from other backends.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _release_memory() -> None:
    # glibc keeps freed memory: 60 MB after loading, up to 70 MB after long texts. This takes 1 to 3 ms.
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)
''',
"autoembed.providers": r'''"""The ways to speak to a model: texts in, vectors out. One module each; nothing of one provider is known outside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from autoembed.errors import InvalidInput
from autoembed.model import Ask, Embedded, Model
from autoembed.providers import azure, cohere, gemini, local, ollama, openai, voyage

if TYPE_CHECKING:
    from autoembed.network import Network


class Provider(Protocol):
    """What a provider's module offers."""

    MAX_INPUTS_PER_REQUEST: int
    MAX_TOKENS_PER_REQUEST: int
    # None: the model truncates by its own tokenizer, so nothing is cut before.
    MAX_TOKENS_PER_INPUT: int | None

    def check(self, model: Model) -> None:
        """Raises InvalidInput if the model cannot work as defined, ProviderTrouble if something is not there yet."""

    def embed(self, ask: Ask, network: Network) -> Embedded:
        """The vectors of the texts. Raises Trouble. Runs in a thread."""

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
}


def provider_of(model: Model) -> Provider:
    try:
        return PROVIDERS[model.provider]
    except KeyError:
        raise InvalidInput(
            f'model "{model.name}" names the provider "{model.provider}", which is not known',
            hint=f"The providers are: {', '.join(sorted(PROVIDERS))}.",
        ) from None
''',
"autoembed.providers.azure": r'''"""OpenAI's models as Azure serves them: by resource and deployment.

Written from the API reference, https://learn.microsoft.com/azure/ai-services/openai/reference#embeddings, and
https://learn.microsoft.com/azure/ai-services/openai/how-to/embeddings, which sets the limits. The body and the answer
are OpenAI's. Its v1 API, without deployments and versions, is spoken by the provider openai.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from autoembed import keys
from autoembed.model import Ask, Embedded, Model
from autoembed.providers import http, openai

if TYPE_CHECKING:
    from autoembed.network import Network

API_VERSION = "2024-10-21"
MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
MAX_TOKENS_PER_INPUT: int | None = 8192


def check(model: Model) -> None:
    http.check(
        model,
        default_url=None,
        example="https://NAME.openai.azure.com, the endpoint of the resource",
        options=http.OPTIONS | {"deployment", "api_version"},
    )


def embed(ask: Ask, network: Network) -> Embedded:
    key = keys.resolve(ask.model.api_key)
    headers = {} if key is None else {"api-key": key}
    answer = http.post(ask, network, url_of(ask.model), headers, openai.request_body(ask), key)
    return openai.embedded_in(answer, len(ask.texts), ask.model.dimensions)


def abort() -> None:
    """Nothing to end: all it does goes over the network."""


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
from autoembed.model import Ask, Embedded, Model
from autoembed.providers import http

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "https://api.cohere.com"
MAX_INPUTS_PER_REQUEST = 96
# The reference sets none for a request; one text of embed-v4.0 may have as many.
MAX_TOKENS_PER_REQUEST = 128_000
MAX_TOKENS_PER_INPUT: int | None = 128_000

# The models before embed-v4.0, which take shorter texts and refuse output_dimension.
OLD_MODELS = "-v3.0"
OLD_MAX_TOKENS_PER_INPUT = 512
INPUT_TYPES = {"document": "search_document", "query": "search_query"}


def check(model: Model) -> None:
    http.check(model, default_url=BASE_URL, example=f"{BASE_URL}, what comes before /v2/embed")
    if model.model_id.endswith(OLD_MODELS):
        http.check_tokens_per_input(model, OLD_MAX_TOKENS_PER_INPUT)


def embed(ask: Ask, network: Network) -> Embedded:
    key = keys.resolve(ask.model.api_key)
    url = http.url(ask.model, BASE_URL, "/v2/embed")
    answer = http.post(ask, network, url, http.bearer(key), request_body(ask), key, trouble_of)
    return embedded_in(answer, len(ask.texts), ask.model.dimensions)


def abort() -> None:
    """Nothing to end: all it does goes over the network."""


def request_body(ask: Ask) -> dict[str, Any]:
    body = {
        "model": ask.model.model_id,
        "texts": list(ask.texts),
        "input_type": INPUT_TYPES[ask.purpose],
        # There is base64 too, but the reference does not say of what bytes.
        "embedding_types": ["float"],
        # What is too long was cut before, or must not be cut at all.
        "truncate": "NONE",
    }
    if ask.model.model_id.endswith(OLD_MODELS):
        return body
    return {**body, "output_dimension": ask.model.dimensions}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int) -> Embedded:
    """The vectors of an answer, which has them in the order of the texts, and the tokens that are billed."""
    with http.reading("Cohere"):
        answer = http.parse(body)
        vectors = http.matrix(answer["embeddings"]["float"], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "meta", "billed_units", "input_tokens"))


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None) -> Trouble:
    """As everywhere, but 498 blocks a text, 499 is a request given up, and a trial key's month may be used up."""
    trouble = trouble_of_answer(status, headers, body, secret)
    if status == 498:
        return Refused(str(trouble))
    if status == 499:
        return ProviderTrouble(str(trouble))
    if status == 429 and b"/ month" in body:
        return ProviderTrouble(str(trouble), permanent=True)
    return trouble
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
from autoembed.model import PREFIXES, Ask, Embedded, Model, prefixed
from autoembed.providers import http

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

BASE_URL = "https://generativelanguage.googleapis.com/v1beta"
MAX_INPUTS_PER_REQUEST = 100
# The reference sets none; a request should be a small part of what a key may send in a minute.
MAX_TOKENS_PER_REQUEST = 20_000
MAX_TOKENS_PER_INPUT: int | None = 2048

TASK_TYPES = {"document": "RETRIEVAL_DOCUMENT", "query": "RETRIEVAL_QUERY"}
# These are told the task in the text, by document_prefix and query_prefix.
WITHOUT_TASK_TYPE = "gemini-embedding-2"
RETRY_DELAY = re.compile(rb'"retryDelay"\s*:\s*"([0-9]+(?:\.[0-9]+)?)s"')


def check(model: Model) -> None:
    http.check(
        model,
        default_url=BASE_URL,
        example=f"{BASE_URL}, what comes before /models",
        options=http.OPTIONS | PREFIXES,
    )


def embed(ask: Ask, network: Network) -> Embedded:
    key = keys.resolve(ask.model.api_key)
    headers = {} if key is None else {"x-goog-api-key": key}
    url = http.url(ask.model, BASE_URL, f"/{quote(name_of(ask.model))}:batchEmbedContents")
    answer = http.post(ask, network, url, headers, request_body(ask), key, trouble_of)
    return embedded_in(answer, len(ask.texts), ask.model.dimensions)


def abort() -> None:
    """Nothing to end: all it does goes over the network."""


def name_of(model: Model) -> str:
    return "models/" + model.model_id.removeprefix("models/")


def request_body(ask: Ask) -> dict[str, Any]:
    name = name_of(ask.model)
    each: dict[str, Any] = {"model": name, "outputDimensionality": ask.model.dimensions}
    if WITHOUT_TASK_TYPE not in name:
        each["taskType"] = TASK_TYPES[ask.purpose]
    return {"requests": [{**each, "content": {"parts": [{"text": text}]}} for text in prefixed(ask)]}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int) -> Embedded:
    """The vectors of an answer, which has them in the order of the texts, at unit length; tokens if it reports them."""
    with http.reading("Gemini"):
        answer = http.parse(body)
        vectors = http.matrix([embedding["values"] for embedding in answer["embeddings"]], count, dimensions)
        return Embedded(unit_length(vectors), http.tokens_in(answer, "usageMetadata", "promptTokenCount"))


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """gemini-embedding-001 shortens vectors by cutting them, so that inner products no longer are cosines."""
    import numpy as np

    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None) -> Trouble:
    """As everywhere, but a bad key or a missing bill is answered with 400, and when to come back is in the body."""
    trouble = trouble_of_answer(status, headers, body, secret)
    if isinstance(trouble, Refused) and (b"API_KEY_INVALID" in body or b"FAILED_PRECONDITION" in body):
        return ProviderTrouble(str(trouble), permanent=True)
    delay = RETRY_DELAY.search(body)
    if status == 429 and "retry-after" not in headers and delay:
        return ProviderTrouble(str(trouble), retry_after_seconds=float(delay[1]))
    return trouble
''',
"autoembed.providers.http": r'''"""What all providers over HTTP have in common: the round trip, and what an answer must be."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import InvalidInput, ProviderTrouble, Refused, Trouble, trouble_of_answer
from autoembed.model import Ask, Model

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

# Options that every provider over HTTP takes: sent with each request, over what we would send.
OPTIONS = frozenset({"extra_headers", "extra_body"})
SECRET_HEADERS = {"authorization", "proxy-authorization", "cookie", "api-key", "x-api-key", "x-goog-api-key"}


def check(model: Model, *, default_url: str | None, example: str, options: frozenset[str] = OPTIONS) -> None:
    """Raises InvalidInput for a definition that cannot work, ProviderTrouble for a key that is not there yet."""
    url = model.base_url or default_url
    if url is None:
        raise InvalidInput(f'model "{model.name}" has no base_url', hint=f"For example {example}.")
    if not url.startswith(("https://", "http://")):
        raise InvalidInput(
            f'model "{model.name}" has the base_url "{url}", which is not an http or https URL',
            hint=f"For example {example}.",
        )
    check_options(model, options)
    for name in sorted(OPTIONS & model.options.keys()):
        if not isinstance(model.options[name], dict):
            raise InvalidInput(f'option {name} of model "{model.name}" is not an object')
    secret = sorted(name for name in model.options.get("extra_headers", {}) if name.lower() in SECRET_HEADERS)
    if secret:
        raise InvalidInput(
            f'option extra_headers of model "{model.name}" has {secret[0]}, which would keep a secret in a table',
            hint="Say where the key is found with api_key => 'env:NAME' or 'file:PATH'.",
        )
    if default_url is not None and model.base_url is None and model.api_key is None:
        raise InvalidInput(
            f'model "{model.name}" has no api_key, and {default_url} wants one',
            hint="For example api_key => 'env:NAME'; or name the base_url of a server that needs no key.",
        )
    keys.resolve(model.api_key)


def check_options(model: Model, known: frozenset[str]) -> None:
    """Raises InvalidInput for an option that the provider does not know."""
    unknown = sorted(model.options.keys() - known)
    if unknown:
        raise InvalidInput(
            f'model "{model.name}" has the option {unknown[0]}, which the provider {model.provider} does not know',
            hint=f"Its options are: {', '.join(sorted(known)) or 'none'}.",
        )
    for name in sorted(model.options.keys() - OPTIONS):
        if not isinstance(model.options[name], str):
            raise InvalidInput(f'option {name} of model "{model.name}" is not a text')


def check_tokens_per_input(model: Model, most: int) -> None:
    """Raises InvalidInput unless the model's own limit keeps texts within what it takes, less than its provider's."""
    if model.max_tokens_per_input is None or model.max_tokens_per_input > most:
        raise InvalidInput(
            f'model "{model.name}" is {model.model_id}, which takes at most {most} tokens of a text',
            hint=f"Say so with max_tokens_per_input => {most}.",
        )


def url(model: Model, default_url: str, path: str) -> str:
    return (model.base_url or default_url).rstrip("/") + path


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def post(
    ask: Ask,
    network: Network,
    url: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any],
    secret: str | None,
    trouble_of: Callable[[int, Mapping[str, str], bytes | bytearray, str | None], Trouble] = trouble_of_answer,
) -> bytes | bytearray:
    """The body of a 200 answer; raises what trouble_of says of any other. secret: to be kept out of errors."""
    answer = network.post(
        url,
        {
            "Content-Type": "application/json",
            "Accept": "application/json",
            **headers,
            **ask.model.options.get("extra_headers", {}),
        },
        encode({**body, **ask.model.options.get("extra_body", {})}),
        timeout_seconds=ask.timeout_seconds,
        # A JSON number takes up to 24 bytes; the rest is room for a server that does not know the dimensions asked for.
        max_answer_bytes=(64 << 20) + 32 * len(ask.texts) * ask.model.dimensions,
    )
    if answer.status != 200:
        raise trouble_of(answer.status, answer.headers, answer.body, secret)
    return answer.body


def encode(body: Mapping[str, Any]) -> bytes:
    """JSON; half a surrogate pair, which UTF-8 cannot carry, becomes a question mark."""
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def parse(body: bytes | bytearray) -> Any:
    """JSON, or ValueError."""
    import orjson

    try:
        return orjson.loads(body)
    except ValueError:
        # Some servers answer NaN, which is no JSON, where a text was too much for their model.
        return json.loads(body)


@contextlib.contextmanager
def reading(api: str) -> Iterator[None]:
    """Makes ProviderTrouble of what an answer raises that is not in the form it should have."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProviderTrouble(f"the provider's answer is not in the form of the {api} API ({error})") from error


def tokens_in(answer: Any, *path: str) -> int | None:
    """The count of tokens that an answer reports at that path; None if it reports none."""
    for name in path:
        answer = answer.get(name) if isinstance(answer, dict) else None
    return answer if isinstance(answer, int) else None


def matrix(embeddings: Sequence[Any], count: int, dimensions: int) -> np.ndarray:
    """Embeddings, lists of numbers or base64 of float32, as (count, dimensions) float32.

    Raises ValueError for what is no embedding, ProviderTrouble for too many, too few or of the wrong length, Refused
    for one that is not finite.
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
    # null is how JSON writers put what is not a number.
    numbers = np.array([np.nan if n is None else n for n in embedding] if isinstance(embedding, list) else embedding)
    if numbers.ndim != 1 or numbers.dtype.kind not in "fi":
        raise ValueError("an embedding that is not a list of numbers")
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)
''',
"autoembed.providers.local": r'''"""A model that runs inside the backend: model.onnx and tokenizer.json in a folder on the server."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from autoembed.errors import InvalidInput, ProviderTrouble
from autoembed.model import PREFIXES, Ask, Embedded, Model, prefixed
from autoembed.providers import http

if TYPE_CHECKING:
    from autoembed.network import Network
    from autoembed.onnx_model import OnnxModel

MODELS_FOLDER = "/usr/local/share/autoembed/models"
MAX_INPUTS_PER_REQUEST = 256
MAX_TOKENS_PER_REQUEST = 1_000_000
MAX_TOKENS_PER_INPUT: int | None = None
DEFAULT_MAX_TOKENS = 256

_loaded: dict[tuple[str, int], OnnxModel] = {}
# One text batch at a time: it uses all cores already.
_running = threading.Lock()
_stopping = threading.Event()


def folder_of(model: Model) -> str:
    return model.base_url or os.path.join(MODELS_FOLDER, model.model_id)


def check(model: Model) -> None:
    if model.api_key is not None:
        raise InvalidInput(f'model "{model.name}" runs inside the server and takes no api_key')
    http.check_options(model, PREFIXES)
    for name in ("model.onnx", "tokenizer.json"):
        path = os.path.join(folder_of(model), name)
        if not os.path.exists(path):
            raise ProviderTrouble(f"the model's file {path} does not exist on the server", permanent=True)


def embed(ask: Ask, network: Network) -> Embedded:
    with _running:
        _stopping.clear()
        vectors = _onnx_model(ask.model).embed(prefixed(ask), _stop_if_told)
    if vectors.shape[1] != ask.model.dimensions:
        raise ProviderTrouble(
            f"the model's vectors have {vectors.shape[1]} dimensions, it is defined with {ask.model.dimensions}",
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

Written from the API reference, https://docs.ollama.com/api/embed, which sets no limits: these keep a request short on
a computer without a graphics card. It shortens texts by the model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import Refused, Trouble, trouble_of_answer
from autoembed.model import PREFIXES, Ask, Embedded, Model, prefixed
from autoembed.providers import http

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "http://127.0.0.1:11434"
MAX_INPUTS_PER_REQUEST = 64
MAX_TOKENS_PER_REQUEST = 32_000
MAX_TOKENS_PER_INPUT: int | None = None

# What it says with status 500 of a text, and says again each time it is sent.
TEXTS_FAULTS = (b"context length", b"NaN")


def check(model: Model) -> None:
    # It needs no key, as no server with a URL of its own does.
    placed = replace(model, base_url=model.base_url or BASE_URL)
    http.check(placed, default_url=None, example=f"{BASE_URL}, what comes before /api", options=http.OPTIONS | PREFIXES)


def embed(ask: Ask, network: Network) -> Embedded:
    key = keys.resolve(ask.model.api_key)
    url = http.url(ask.model, BASE_URL, "/api/embed")
    answer = http.post(ask, network, url, http.bearer(key), request_body(ask), key, trouble_of)
    return embedded_in(answer, len(ask.texts), ask.model.dimensions)


def abort() -> None:
    """Nothing to end: all it does goes over the network."""


def request_body(ask: Ask) -> dict[str, Any]:
    return {
        "model": ask.model.model_id,
        "input": prefixed(ask),
        "dimensions": ask.model.dimensions,
        "truncate": True,
    }


def embedded_in(body: bytes | bytearray, count: int, dimensions: int) -> Embedded:
    """The vectors of an answer, which has them in the order of the texts, and the tokens it counted."""
    with http.reading("Ollama"):
        answer = http.parse(body)
        vectors = http.matrix(answer["embeddings"], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "prompt_eval_count"))


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None) -> Trouble:
    """As everywhere, but a text may be to blame for a 500."""
    trouble = trouble_of_answer(status, headers, body, secret)
    if status == 500 and any(fault in body for fault in TEXTS_FAULTS):
        return Refused(str(trouble))
    return trouble
''',
"autoembed.providers.openai": r'''"""OpenAI's embeddings endpoint and whatever speaks its protocol.

Written from the API reference, https://platform.openai.com/docs/api-reference/embeddings/create, which sets the limits.
It has one form for documents and queries; for models behind it that have two, see prefixed().
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import ProviderTrouble
from autoembed.model import PREFIXES, Ask, Embedded, Model, prefixed
from autoembed.providers import http

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

BASE_URL = "https://api.openai.com/v1"
MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
MAX_TOKENS_PER_INPUT: int | None = 8192

# The models that OpenAI made before it allowed shorter vectors refuse the parameter.
WITHOUT_DIMENSIONS = ("text-embedding-ada-002",)


def check(model: Model) -> None:
    http.check(
        model,
        default_url=BASE_URL,
        example="https://api.openai.com/v1, what comes before /embeddings",
        options=http.OPTIONS | PREFIXES,
    )


def embed(ask: Ask, network: Network) -> Embedded:
    key = keys.resolve(ask.model.api_key)
    url = http.url(ask.model, BASE_URL, "/embeddings")
    answer = http.post(ask, network, url, http.bearer(key), request_body(ask), key)
    return embedded_in(answer, len(ask.texts), ask.model.dimensions)


def abort() -> None:
    """Nothing to end: all it does goes over the network."""


def request_body(ask: Ask) -> dict[str, Any]:
    body = {"model": ask.model.model_id, "input": prefixed(ask), "encoding_format": "base64"}
    if ask.model.model_id in WITHOUT_DIMENSIONS:
        return body
    return {**body, "dimensions": ask.model.dimensions}


def embedded_in(body: bytes | bytearray, count: int, dimensions: int, api: str = "OpenAI") -> Embedded:
    """The vectors of an answer in the order of its indexes, and the tokens it reports."""
    with http.reading(api):
        answer = http.parse(body)
        by_index = {item["index"]: item["embedding"] for item in answer["data"]}
        if len(answer["data"]) != count or set(by_index) != set(range(count)):
            raise ProviderTrouble(f"the provider answered with {len(by_index)} vectors for {count} texts")
        vectors: np.ndarray = http.matrix([by_index[index] for index in range(count)], count, dimensions)
        return Embedded(vectors, http.tokens_in(answer, "usage", "total_tokens"))
''',
"autoembed.providers.voyage": r'''"""Voyage AI's embeddings endpoint.

Written from the API reference, https://docs.voyageai.com/reference/embeddings-api: 1,000 texts a request, and 120,000,
320,000 or 1,000,000 tokens, by model. Tokens of a text: https://docs.voyageai.com/docs/embeddings. Statuses:
https://docs.voyageai.com/docs/error-codes. The answer is in the form of OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import ProviderTrouble, Trouble, trouble_of_answer
from autoembed.model import Ask, Embedded, Model
from autoembed.providers import http, openai

if TYPE_CHECKING:
    from autoembed.network import Network

BASE_URL = "https://api.voyageai.com/v1"
MAX_INPUTS_PER_REQUEST = 1000
# What every model takes; max_tokens_per_request says so of a model that takes more.
MAX_TOKENS_PER_REQUEST = 120_000
MAX_TOKENS_PER_INPUT: int | None = 32_000

SHORT_MODELS = ("voyage-law-2", "voyage-code-2")
SHORT_MAX_TOKENS_PER_INPUT = 16_000
# These have one length of vectors only.
WITHOUT_DIMENSIONS = (*SHORT_MODELS, "voyage-finance-2", "voyage-multilingual-2", "voyage-3", "voyage-3-lite")


def check(model: Model) -> None:
    http.check(model, default_url=BASE_URL, example=f"{BASE_URL}, what comes before /embeddings")
    if model.model_id in SHORT_MODELS:
        http.check_tokens_per_input(model, SHORT_MAX_TOKENS_PER_INPUT)


def embed(ask: Ask, network: Network) -> Embedded:
    key = keys.resolve(ask.model.api_key)
    url = http.url(ask.model, BASE_URL, "/embeddings")
    answer = http.post(ask, network, url, http.bearer(key), request_body(ask), key, trouble_of)
    return openai.embedded_in(answer, len(ask.texts), ask.model.dimensions, "Voyage")


def abort() -> None:
    """Nothing to end: all it does goes over the network."""


def request_body(ask: Ask) -> dict[str, Any]:
    body = {
        "model": ask.model.model_id,
        "input": list(ask.texts),
        "input_type": ask.purpose,
        "encoding_format": "base64",
        # What is too long was cut before, or must not be cut at all.
        "truncation": False,
    }
    if ask.model.model_id in WITHOUT_DIMENSIONS:
        return body
    return {**body, "output_dimension": ask.model.dimensions}


def trouble_of(status: int, headers: Mapping[str, str], body: bytes | bytearray, secret: str | None = None) -> Trouble:
    """As everywhere, but an unknown model is answered with 400."""
    trouble = trouble_of_answer(status, headers, body, secret)
    if status == 400 and b"Supported models are" in body:
        return ProviderTrouble(str(trouble), permanent=True)
    return trouble
''',
"autoembed.worker": r'''"""The path of a job: claim, embed, apply. Knows neither plpy nor requests: database and network are handed in."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoembed import batching
from autoembed.errors import ProviderTrouble, Refused, RowError, rest_seconds
from autoembed.flight import Flight
from autoembed.jobs import Job, Ledger, Report, address_of, isolate
from autoembed.model import Ask, Embedded, Model
from autoembed.providers import PROVIDERS, provider_of

if TYPE_CHECKING:
    import numpy as np

    from autoembed.database import Database, Message, Pipeline
    from autoembed.network import Network

MAX_ATTEMPTS = 5
# Beyond the time that a request may take: for the database's own work on a claim.
LEASE_MARGIN_SECONDS = 60.0
POLL_SECONDS = 0.2
DEAD_LANES_SECONDS = 1.0
# The change that overtook us has a job of its own, which comes first; this one makes sure.
CHANGED_DELAY_SECONDS = 5.0
LOCK_PATIENCE_SECONDS = 1.0
LOCKED_DELAY_SECONDS = 1.0
# A text that no model refuses, to tell a bad text from a bad request.
PROBE = "autoembed"


@dataclass(frozen=True)
class Options:
    """How a pass works: texts per request, requests at a time, seconds for each."""

    batch_size: int
    max_requests: int
    timeout_seconds: float

    @property
    def max_rows(self) -> int:
        return self.batch_size * self.max_requests

    @property
    def lease_seconds(self) -> float:
        return self.timeout_seconds + LEASE_MARGIN_SECONDS


def work(database: Database, network: Network, options: Options, run_seconds: float) -> None:
    """A lane: passes until the time is up or somebody ends it, a look at the queue a few times a second while idle."""
    # A lane that ends by itself in good time is no cancelled statement in anybody's log.
    limit = database.statement_timeout_seconds()
    end = time.monotonic() + (run_seconds if limit is None else min(run_seconds, limit / 2))
    look_for_dead_lanes = 0.0
    database.enter_lane()
    database.warn_of_blocked_pipelines()
    database.commit()
    try:
        while time.monotonic() < end and database.lane_is_wanted():
            if time.monotonic() >= look_for_dead_lanes:
                database.free_dead_lanes()
                look_for_dead_lanes = time.monotonic() + DEAD_LANES_SECONDS
            if run_pass(database, network, options).read == 0:
                database.commit()
                time.sleep(POLL_SECONDS / 4)
                for _ in range(3):
                    database.breathe()
                    time.sleep(POLL_SECONDS / 4)
    finally:
        database.leave_lane()
        database.commit()


def run_pass(database: Database, network: Network, options: Options) -> Report:
    """Claims once, embeds what was claimed, applies it; commits after each step if the database can.

    Never raises for a bad row, a bad answer or a dead provider: the report says so.
    """
    messages = database.claim(options.max_rows, options.lease_seconds)
    if not messages:
        return Report()
    ledger = Ledger(database, messages)
    try:
        return _Pass(database, network, options, ledger).run(messages)
    except BaseException:
        # Cancelled or shut down: what is not done goes back to the queue at once.
        ledger.release_open()
        ledger.flush()
        raise


@dataclass(frozen=True, eq=False)
class Request:
    """Texts of one model that travel together; probe: a text of ours, to see whether the model takes any."""

    model: Model
    texts: list[str]
    probe: bool = False


@dataclass
class Outbox:
    """What a pass knows of one model: its jobs by text, whether it accepted anything yet, whether it rests."""

    jobs: dict[str, list[Job]] = field(default_factory=lambda: defaultdict(list))
    accepted: bool = False
    trouble: ProviderTrouble | None = None
    # Refused requests, until it is known whether the model refuses everything.
    suspended: list[tuple[Request, Refused]] = field(default_factory=list)
    failures: int = 0


class _Pass:
    def __init__(self, database: Database, network: Network, options: Options, ledger: Ledger) -> None:
        self._database = database
        self._network = network
        self._options = options
        self._ledger = ledger
        self._outboxes: dict[Model, Outbox] = {}
        self._locked: list[tuple[Job, Any]] = []
        self._lease_ends = time.monotonic() + options.lease_seconds

    def run(self, messages: list[Message]) -> Report:
        for pipeline, jobs in self._jobs(messages):
            self._take(pipeline, self._read(pipeline, jobs))
        self._commit()
        if self._outboxes:
            with Flight[Request, Embedded](self._options.max_requests, self._breathe, self._abort) as flight:
                for model in self._outboxes:
                    self._send(flight, model)
                for request, outcome in flight.landed():
                    self._database.gate()
                    self._land(flight, request, outcome)
                    self._commit()
        self._write_locked()
        self._commit()
        return self._ledger.report

    # Claim ---------------------------------------------------------------------------------------

    def _jobs(self, messages: list[Message]) -> list[tuple[Pipeline, list[Job]]]:
        """The claimed messages as jobs, one for each row, by pipeline. What cannot be a job is failed here."""
        messages, set_aside = isolate(messages, random.random())
        if set_aside:
            self._ledger.set_aside(set_aside)

        rows: dict[tuple[int, str], tuple[int, list[Message]]] = {}
        for message in messages:
            try:
                address = address_of(message.body)
                pipeline_id = address.pipeline_id or self._database.resolve(message.body)
            except (ValueError, RowError) as error:
                self._ledger.fail_message(message, str(error))
                continue
            for key in address.keys:
                attempts, holders = rows.setdefault((pipeline_id, key), (address.attempts, []))
                rows[pipeline_id, key] = (max(attempts, address.attempts), [*holders, message])

        pipelines = self._database.pipelines(sorted({pipeline_id for pipeline_id, _ in rows})) if rows else {}
        by_pipeline: dict[int, list[Job]] = defaultdict(list)
        for (pipeline_id, key), (attempts, holders) in rows.items():
            job = Job(pipelines.get(pipeline_id), key, attempts, [message.id for message in holders])
            self._ledger.open(job)
            tries = min(message.read_count for message in holders)
            if job.pipeline is None:
                self._ledger.done(job)
            elif job.pipeline.blocked is not None:
                self._ledger.retry(job, 0, job.pipeline.blocked)
            elif tries > MAX_ATTEMPTS:
                self._ledger.fail(job, f"{tries - 1} lanes ended while they worked on it", tries - 1)
            else:
                by_pipeline[pipeline_id].append(job)
        return [(pipelines[pipeline_id], jobs) for pipeline_id, jobs in by_pipeline.items()]

    def _read(self, pipeline: Pipeline, jobs: list[Job]) -> list[Job]:
        """The jobs whose row exists, their texts read. A row whose content function fails stands alone in the end."""
        try:
            rows = self._database.rows(pipeline, [job.key for job in jobs])
        except RowError as error:
            if len(jobs) > 1:
                return [job for half in batching.halves(jobs) for job in self._read(pipeline, half)]
            self._retry_or_fail(jobs[0], error)
            return []
        gone = [job for job in jobs if job.key not in rows]
        self._forget(pipeline, gone)
        for job in jobs:
            job.row = rows.get(job.key)
        return [job for job in jobs if job.row is not None]

    def _take(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Puts each job where it belongs: done already, nothing to embed, or to be sent."""
        if not jobs:
            return
        digests = self._database.digests(pipeline, [job.key for job in jobs])
        blank, unchanged = [], []
        for job in jobs:
            if job.content is None or not job.content.strip():
                blank.append(job)
                continue
            job.digest = pipeline.model.digest(job.content)
            if job.has_embedding and digests.get(job.key) == job.digest:
                unchanged.append(job)
                continue
            limit = pipeline.model.max_tokens_per_input or provider_of(pipeline.model).MAX_TOKENS_PER_INPUT
            text = job.content if limit is None else batching.truncate(job.content, limit)
            job.truncated = text is not job.content
            if job.truncated and not pipeline.truncate:
                self._ledger.fail(job, f"the text has more than the {limit} tokens that the model takes")
                continue
            outbox = self._outboxes.setdefault(pipeline.model, Outbox(failures=pipeline.failures))
            outbox.jobs[text].append(job)
        if unchanged:
            self._record(pipeline, unchanged)
        if blank:
            self._write(pipeline, blank, None)

    # Embed ---------------------------------------------------------------------------------------

    def _send(self, flight: Flight[Request, Embedded], model: Model) -> None:
        provider = provider_of(model)
        requests = batching.pack(
            list(self._outboxes[model].jobs),
            min(self._options.batch_size, model.max_inputs_per_request or provider.MAX_INPUTS_PER_REQUEST),
            model.max_tokens_per_request or provider.MAX_TOKENS_PER_REQUEST,
        )
        for texts in requests:
            self._submit(flight, Request(model, texts))

    def _submit(self, flight: Flight[Request, Embedded], request: Request) -> None:
        provider = provider_of(request.model)
        ask = Ask(request.model, request.texts, self._options.timeout_seconds)
        self._ledger.report.requests += 1
        flight.submit(request, lambda: provider.embed(ask, self._network))

    def _land(self, flight: Flight[Request, Embedded], request: Request, outcome: Embedded | BaseException) -> None:
        outbox = self._outboxes[request.model]
        if isinstance(outcome, Refused) and request.probe:
            outcome = ProviderTrouble(f"every request is refused: {outcome}", permanent=True)
        elif isinstance(outcome, Refused) and outbox.trouble is not None:
            outcome = outbox.trouble
        match outcome:
            case ProviderTrouble():
                self._give_up_model(flight, request, outcome)
            case Refused():
                self._refuse(flight, request, outcome)
            case Exception():
                # A fault of ours, which must not end every lane again and again. Its text may hold anything, a key too.
                trouble = ProviderTrouble(
                    f"an unexpected {type(outcome).__name__} in the provider {request.model.provider}"
                )
                self._give_up_model(flight, request, trouble)
            case BaseException():
                raise outcome
            case Embedded(vectors):
                self._accept(flight, request, vectors)

    def _refuse(self, flight: Flight[Request, Embedded], request: Request, refusal: Refused) -> None:
        """Looks for the text to blame, once it is known that the model takes others."""
        outbox = self._outboxes[request.model]
        if outbox.accepted:
            self._split(flight, request, refusal)
            return
        outbox.suspended.append((request, refusal))
        if len(outbox.suspended) == 1:
            self._submit(flight, Request(request.model, [PROBE], probe=True))

    def _accept(self, flight: Flight[Request, Embedded], request: Request, vectors: np.ndarray) -> None:
        outbox = self._outboxes[request.model]
        outbox.accepted = True
        if outbox.failures:
            self._database.resume_model(request.model.name)
            outbox.failures = 0
        if not request.probe:
            self._apply(request, vectors)
        suspended, outbox.suspended = outbox.suspended, []
        for refused, refusal in suspended:
            self._split(flight, refused, refusal)

    def _split(self, flight: Flight[Request, Embedded], request: Request, refusal: Refused) -> None:
        """Finds the text that is to blame for a refusal: halves the request until it stands alone."""
        if len(request.texts) > 1:
            for half in batching.halves(request.texts):
                self._submit(flight, Request(request.model, half))
            return
        for job in self._outboxes[request.model].jobs[request.texts[0]]:
            self._ledger.fail(job, str(refusal))

    def _give_up_model(self, flight: Flight[Request, Embedded], request: Request, trouble: ProviderTrouble) -> None:
        """Lets the model rest, for all lanes, and puts back the jobs that were to be sent."""
        outbox = self._outboxes[request.model]
        if outbox.trouble is not trouble:
            outbox.trouble = trouble
            seconds = rest_seconds(trouble, outbox.failures, random.random())
            self._database.rest_model(request.model.name, seconds, trouble.permanent, str(trouble))
        unsent = flight.withdraw(lambda other: other.model == request.model)
        self._ledger.report.requests -= len(unsent)
        for returned in [request, *unsent, *(suspended for suspended, _ in outbox.suspended)]:
            for text in [] if returned.probe else returned.texts:
                for job in outbox.jobs[text]:
                    self._ledger.release(job, str(trouble))
        outbox.suspended = []

    # Apply ---------------------------------------------------------------------------------------

    def _apply(self, request: Request, vectors: np.ndarray) -> None:
        by_pipeline: dict[int, list[tuple[Job, int]]] = defaultdict(list)
        for index, text in enumerate(request.texts):
            for job in self._outboxes[request.model].jobs[text]:
                by_pipeline[job.pipeline.id].append((job, index))
        for matched in by_pipeline.values():
            jobs = [job for job, _ in matched]
            self._write(jobs[0].pipeline, jobs, vectors[[index for _, index in matched]])

    def _write(self, pipeline: Pipeline, jobs: list[Job], vectors: np.ndarray | None) -> None:
        """Writes the vectors (None: NULLs) of the rows that still say the same.

        A row that does not take its own stands alone in the end.
        """
        try:
            outcomes = self._database.write(pipeline, [job.key for job in jobs], [job.content for job in jobs], vectors)
        except RowError as error:
            if len(jobs) > 1:
                middle = len(jobs) // 2
                self._write(pipeline, jobs[:middle], None if vectors is None else vectors[:middle])
                self._write(pipeline, jobs[middle:], None if vectors is None else vectors[middle:])
            else:
                self._retry_or_fail(jobs[0], error, at_once=True)
            return
        by_outcome: dict[str, list[Job]] = defaultdict(list)
        for index, job in enumerate(jobs):
            by_outcome[outcomes[job.key]].append(job)
            if outcomes[job.key] == "locked":
                self._locked.append((job, None if vectors is None else vectors[index : index + 1]))
        written = by_outcome["written"]
        if vectors is None:
            self._forget(pipeline, written)
        elif written:
            self._record(pipeline, written)
        for job in by_outcome["changed"]:
            self._ledger.retry(job, CHANGED_DELAY_SECONDS)
        self._forget(pipeline, by_outcome["gone"])

    def _write_locked(self) -> None:
        """Tries the rows that somebody had locked again for a moment: their vectors are paid for."""
        end = time.monotonic() + LOCK_PATIENCE_SECONDS
        while self._locked and time.monotonic() < end:
            self._commit()
            self._breathe()
            time.sleep(0.05)
            self._database.gate()
            locked, self._locked = self._locked, []
            for job, vector in locked:
                self._write(job.pipeline, [job], vector)
        for job, _ in self._locked:
            self._ledger.retry(job, LOCKED_DELAY_SECONDS, "the row is locked by another transaction")

    def _record(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Settles rows whose embedding is that of their text."""
        self._database.record_embedded(
            pipeline,
            [job.key for job in jobs],
            [job.digest for job in jobs],
            [job.truncated for job in jobs],
        )
        for job in jobs:
            self._ledger.done(job)

    def _forget(self, pipeline: Pipeline, jobs: Sequence[Job]) -> None:
        """Settles rows that need no embedding: deleted ones, and those without a text."""
        if jobs:
            self._database.forget(pipeline, [job.key for job in jobs])
        for job in jobs:
            self._ledger.done(job)

    def _retry_or_fail(self, job: Job, error: RowError, *, at_once: bool = False) -> None:
        if error.passes:
            self._ledger.retry(job, LOCKED_DELAY_SECONDS, str(error))
        elif at_once or job.attempts + 1 >= MAX_ATTEMPTS:
            self._ledger.fail(job, str(error))
        else:
            self._ledger.retry(job, 2.0**job.attempts, str(error), counts=True)

    # In between ----------------------------------------------------------------------------------

    def _commit(self) -> None:
        self._ledger.flush()
        self._database.commit()

    def _breathe(self) -> None:
        self._database.breathe()
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
    GD["autoembed"] = "d87a5e4085b8fab4"
$autoembed_python$;
COMMENT ON FUNCTION autoembed._load_python() IS
    'Puts this version''s Python modules into the session.';

-- 20_models.sql: create, change and drop models. Where a model is and where its key lies is an administrator's business.

CREATE FUNCTION autoembed._default_model()
    RETURNS text
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT coalesce((SELECT s.value FROM autoembed.setting AS s WHERE s.name = 'default_model'), 'all-MiniLM-L6-v2');
$sql$;
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

CREATE FUNCTION autoembed._check_model(name text)
    RETURNS void
    LANGUAGE plpython3u
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "d87a5e4085b8fab4":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    doors.check_model(name)
$python$;
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
    IF api_key !~ '^(env|file):.' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'api_key must say where the key is found, not what it is',
            HINT = 'Use env:NAME for an environment variable of the server, or file:PATH for a file that it can read.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_api_key(text) IS 'Fails unless it is a reference to a key.';

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
    options jsonb DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._check_api_key(create_model.api_key);
    IF EXISTS (SELECT FROM autoembed.model AS m WHERE m.name = create_model.name) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('model "%s" already exists', create_model.name),
            HINT = 'Change it with autoembed.alter_model().';
    END IF;
    INSERT INTO autoembed.model (name, provider, model_id, dimensions, base_url, api_key,
                                 max_inputs_per_request, max_tokens_per_request, max_tokens_per_input, options)
    VALUES (create_model.name, create_model.provider, coalesce(create_model.model_id, create_model.name),
            create_model.dimensions, create_model.base_url, create_model.api_key, create_model.max_inputs_per_request,
            create_model.max_tokens_per_request, create_model.max_tokens_per_input,
            coalesce(create_model.options, '{}'));
    PERFORM autoembed._check_model(create_model.name);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.create_model(text, text, integer, text, text, text, integer, integer, integer, jsonb) IS
    'Defines a model: its provider (local, openai, azure, cohere, voyage, gemini, ollama), the length of its vectors, what the provider calls it (default: its name), where it is, where its key is found (env:NAME or file:PATH), limits below the provider''s own, and options of the provider.';

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
    options jsonb DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._check_api_key(alter_model.api_key);
    PERFORM autoembed._model(alter_model.name);
    UPDATE autoembed.model AS m
    SET provider = coalesce(alter_model.provider, m.provider),
        dimensions = coalesce(alter_model.dimensions, m.dimensions),
        model_id = coalesce(alter_model.model_id, m.model_id),
        base_url = coalesce(alter_model.base_url, m.base_url),
        api_key = coalesce(alter_model.api_key, m.api_key),
        max_inputs_per_request = coalesce(alter_model.max_inputs_per_request, m.max_inputs_per_request),
        max_tokens_per_request = coalesce(alter_model.max_tokens_per_request, m.max_tokens_per_request),
        max_tokens_per_input = coalesce(alter_model.max_tokens_per_input, m.max_tokens_per_input),
        options = coalesce(alter_model.options, m.options),
        builtin = false
    WHERE m.name = alter_model.name;
    PERFORM autoembed._check_model(alter_model.name);
    PERFORM autoembed.resume_model(alter_model.name);
    PERFORM autoembed._warn_of_blocked_pipelines();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.alter_model(text, text, integer, text, text, text, integer, integer, integer, jsonb) IS
    'Changes what is not NULL of a model, and ends its rest. Rows embedded before keep their vectors.';

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
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    INSERT INTO autoembed.model_rest AS r (model, until, failures, needs_attention, reason)
    VALUES (_rest_model.name, clock_timestamp() + make_interval(secs => seconds), 1,
            _rest_model.needs_attention, _rest_model.reason)
    ON CONFLICT (model) DO UPDATE
    SET until = greatest(r.until, excluded.until),
        -- Requests side by side fail together: one failed try.
        failures = r.failures + (r.until <= clock_timestamp())::integer,
        needs_attention = excluded.needs_attention,
        reason = excluded.reason;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._rest_model(text, double precision, boolean, text) IS
    'Keeps all lanes from calling a model''s provider for so many seconds.';

-- 30_pipelines.sql: which column of which table is embedded, and the two functions that touch it with its owner's rights.

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
            ON p.proname IN (name, substring(name FROM '[.]([^.]*)$'), substring(name FROM '[.]"(.*)"$'))
           AND p.proargtypes[0] = c.reltype AND p.pronargs = 1 AND p.prokind = 'f' AND NOT p.proretset
        JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE c.oid = table_id
          AND name IN (p.proname::text, format('%s.%s', n.nspname, p.proname), format('%I.%I', n.nspname, p.proname))
    ) AS f;
    RETURN _found[1];
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._content_function(oid, text) IS
    'The function of one row of the table with that name, which may name its schema; NULL if there is none.';

CREATE FUNCTION autoembed._check_pipeline(
    table_id oid,
    embedding_column text,
    content_function text,
    model text,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _table pg_class;
    _function pg_proc;
    _type text;
    _type_dimensions integer;
    _model autoembed.model;
BEGIN
    SELECT c.* INTO _table FROM pg_class AS c WHERE c.oid = table_id;
    IF NOT FOUND THEN
        problem := format('the table with OID %s no longer exists', table_id);
        errcode := 'undefined_table';
        RETURN;
    END IF;
    IF _table.relkind NOT IN ('r', 'p') THEN
        problem := format('%s is not a table', table_id::regclass);
        hint := 'Only tables and partitioned tables hold embeddings.';
        errcode := 'wrong_object_type';
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = table_id AND a.attname = 'id' AND NOT a.attisdropped) THEN
        problem := format('table %s has no column id', table_id::regclass);
        hint := 'queue_embeddings() finds rows by a primary key column called id.';
        errcode := 'undefined_column';
        RETURN;
    END IF;

    SELECT CASE WHEN e.oid IS NOT NULL THEN t.typname ELSE format_type(a.atttypid, a.atttypmod) END, a.atttypmod
    INTO _type, _type_dimensions
    FROM pg_attribute AS a
    JOIN pg_type AS t ON t.oid = a.atttypid
    LEFT JOIN pg_extension AS e ON e.extname = 'vector' AND e.extnamespace = t.typnamespace
    WHERE a.attrelid = table_id AND a.attname = embedding_column AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        problem := format('table %s has no column "%s"', table_id::regclass, embedding_column);
        hint := format('Add it: ALTER TABLE %s ADD COLUMN %I halfvec(%s).',
                       table_id::regclass, embedding_column, (autoembed._model(model)).dimensions);
        errcode := 'undefined_column';
        RETURN;
    END IF;
    IF _type NOT IN ('vector', 'halfvec') THEN
        problem := format('column "%s" of table %s is of type %s', embedding_column, table_id::regclass, _type);
        hint := 'An embedding column is of type halfvec or vector.';
        errcode := 'datatype_mismatch';
        RETURN;
    END IF;

    SELECT p.* INTO _function FROM pg_proc AS p WHERE p.oid = autoembed._content_function(table_id, content_function);
    IF NOT FOUND THEN
        problem := format('there is no function "%s" of one row of %s', content_function, table_id::regclass);
        hint := format('Create it: CREATE FUNCTION %s(%s) RETURNS text.', content_function, table_id::regclass);
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
                          pg_get_userbyid(_table.relowner), table_id::regclass);
        hint := format('Make it the table owner''s: ALTER FUNCTION %s OWNER TO %I.',
                       _function.oid::regprocedure, pg_get_userbyid(_table.relowner));
        errcode := 'insufficient_privilege';
        RETURN;
    END IF;

    _model := autoembed._model(model);
    IF _type_dimensions NOT IN (-1, _model.dimensions) THEN
        problem := format('column "%s" of table %s has %s dimensions, model "%s" has %s',
                          embedding_column, table_id::regclass, _type_dimensions, _model.name, _model.dimensions);
        hint := format('Change the column: ALTER TABLE %s ALTER COLUMN %I TYPE %s(%s) USING NULL; or the model: SELECT autoembed.set_default_model(…).',
                       table_id::regclass, embedding_column, _type, _model.dimensions);
        -- Not an error of the trigger: another model cures it at any time.
        errcode := 'waits';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_pipeline(oid, text, text, text) IS
    'Why the column cannot be embedded as things stand, and what to do; NULLs if it can. errcode waits: the jobs wait for a change.';

CREATE VIEW autoembed._pipeline_state AS
SELECT p.id,
       p.table_id,
       p.embedding_column,
       p.content_function,
       p.truncate,
       coalesce(p.model, autoembed._default_model()) AS model,
       coalesce(c.problem, CASE WHEN r.until > clock_timestamp() THEN format('model "%s" rests: %s', r.model, r.reason) END)
           AS blocked,
       coalesce(c.hint, CASE WHEN r.needs_attention THEN format('SELECT autoembed.resume_model(%L) tries it at once.', r.model) END)
           AS hint,
       c.problem IS NULL AS sound,
       coalesce(r.failures, 0) AS failures
FROM autoembed.pipeline AS p
CROSS JOIN LATERAL autoembed._check_pipeline(p.table_id, p.embedding_column, p.content_function, p.model) AS c
LEFT JOIN autoembed.model_rest AS r ON r.model = coalesce(p.model, autoembed._default_model());
COMMENT ON VIEW autoembed._pipeline_state IS 'Every pipeline, and why its jobs wait, if they do.';

CREATE FUNCTION autoembed._warn_of_blocked_pipelines(only_with_jobs boolean DEFAULT false)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _state record;
BEGIN
    FOR _state IN
        SELECT s.*
        FROM autoembed.pipeline AS p
        JOIN autoembed._pipeline_state AS s ON s.id = p.id AND s.blocked IS NOT NULL
        WHERE NOT only_with_jobs
           OR EXISTS (SELECT FROM pgmq.q_embedding_jobs AS q WHERE coalesce(q.message ->> 'pipeline', '') = p.id::text)
        ORDER BY p.id
    LOOP
        RAISE WARNING USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('%s.%I is not being embedded: %s', _state.table_id, _state.embedding_column, _state.blocked),
            HINT = coalesce(_state.hint, 'Its jobs are kept, and go on by themselves.');
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._warn_of_blocked_pipelines(boolean) IS 'Says which pipelines wait, why, and what to do.';

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
    _schema text;
    _key_type text;
    _column text;
    _column_type text;
    _content text;
    _guard text;
    _body text;
    _from text;
    _ready boolean;
BEGIN
    SELECT p.* INTO STRICT _pipeline FROM autoembed.pipeline AS p WHERE p.id = pipeline_id;
    SELECT c.oid::regclass::text, n.nspname, pg_get_userbyid(c.relowner), format_type(k.atttypid, k.atttypmod),
           quote_ident(e.attname), format_type(e.atttypid, e.atttypmod),
           format('%I.%I(t)', fn.nspname, f.proname)
    INTO STRICT _table, _schema, _owner, _key_type, _column, _column_type, _content
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_attribute AS k ON k.attrelid = c.oid AND k.attname = 'id' AND NOT k.attisdropped
    JOIN pg_attribute AS e ON e.attrelid = c.oid AND e.attname = _pipeline.embedding_column AND NOT e.attisdropped
    JOIN pg_proc AS f ON f.oid = autoembed._content_function(c.oid, _pipeline.content_function)
    JOIN pg_namespace AS fn ON fn.oid = f.pronamespace
    WHERE c.oid = _pipeline.table_id;

    _from := concat_ws(' ', _table, _owner, _key_type, _column, _column_type, _content);
    SELECT count(*) = 2 INTO _ready
    FROM pg_proc AS p
    JOIN pg_roles AS o ON o.oid = p.proowner AND o.rolname = _owner
    WHERE p.pronamespace = 'autoembed'::regnamespace
      AND p.proname IN ('_content_' || pipeline_id, '_write_' || pipeline_id)
      AND p.prosecdef;
    IF _ready AND _pipeline.built_from = _from THEN
        RETURN;
    END IF;

    -- An owner's code that raises a cancel or a shutdown would be taken for a real one, and end every pass.
    _guard := $guard$
EXCEPTION WHEN operator_intervention OR insufficient_resources OR system_error THEN
    GET STACKED DIAGNOSTICS _context = PG_EXCEPTION_CONTEXT;
    IF pg_catalog.split_part(_context, E'\n', 1) LIKE '%% at RAISE' THEN
        RAISE EXCEPTION USING MESSAGE = SQLERRM;
    END IF;
    RAISE;
END;$guard$;

    -- Both run as the table's owner, whoever runs the lane: what his functions, triggers and defaults do, they do as him.
    -- The bodies are quoted as a whole, so that no name in them can end them.
    _body := format($body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
    RETURN QUERY
    SELECT s.key, %1$s::text, t.%2$s IS NOT NULL
    FROM pg_catalog.unnest(keys) AS s(key)
    JOIN %3$s AS t ON t.id = (s.key::pg_catalog.jsonb ->> 0)::%4$s;
$body$ || _guard, _content, _column, _table, _key_type);
    EXECUTE format('DROP FUNCTION IF EXISTS autoembed._content_%1$s(text[]), autoembed._write_%1$s(text[], text[], text[])', pipeline_id);
    EXECUTE format($ddl$
CREATE FUNCTION autoembed._content_%1$s(keys text[])
    RETURNS TABLE (key text, content text, has_embedding boolean)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = %2$I, public, pg_temp
AS %3$L$ddl$, pipeline_id, _schema, _body);

    -- Rows that somebody else has locked are left out: embeddings never wait for an application, nor two lanes for each other.
    -- Triggers deferred to the commit would run as the lane, so they run at the end of this.
    _body := format($body$
#variable_conflict use_column
DECLARE
    _context text;
BEGIN
    FOR key, outcome IN
    WITH sent AS MATERIALIZED (
        SELECT s.key, (s.key::pg_catalog.jsonb ->> 0)::%4$s AS id, s.content, s.embedding
        FROM unnest(keys, contents, embeddings) AS s(key, content, embedding)
    ),
    locked AS MATERIALIZED (
        SELECT s.key, t.id, s.content, s.embedding, %1$s::text COLLATE "C" IS NOT DISTINCT FROM s.content AS unchanged
        FROM sent AS s
        JOIN %3$s AS t ON t.id = s.id
        ORDER BY t.id
        FOR NO KEY UPDATE OF t SKIP LOCKED
    ),
    written AS (
        UPDATE %3$s AS t
        SET %2$s = l.embedding::%5$s
        FROM locked AS l
        WHERE t.id = l.id AND l.unchanged
        RETURNING l.key, %1$s::text COLLATE "C" IS NOT DISTINCT FROM l.content AS unchanged
    )
    SELECT s.key,
           CASE WHEN w.unchanged THEN 'written'
                WHEN w.key IS NOT NULL THEN 'overtaken'
                WHEN l.key IS NOT NULL THEN 'changed'
                WHEN EXISTS (SELECT FROM %3$s AS t WHERE t.id = s.id) THEN 'locked'
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
$body$ || _guard, _content, _column, _table, _key_type, _column_type);
    EXECUTE format($ddl$
CREATE FUNCTION autoembed._write_%1$s(keys text[], contents text[], embeddings text[])
    RETURNS TABLE (key text, outcome text)
    LANGUAGE plpgsql
    VOLATILE
    SECURITY DEFINER
    SET search_path = %2$I, public, pg_temp
    SET autoembed.writing = %3$L
AS %4$L$ddl$, pipeline_id, _schema, _pipeline.table_id::oid, _body);
    EXECUTE format('ALTER FUNCTION autoembed._content_%s(text[]) OWNER TO %I', pipeline_id, _owner);
    EXECUTE format('ALTER FUNCTION autoembed._write_%s(text[], text[], text[]) OWNER TO %I', pipeline_id, _owner);
    EXECUTE format('REVOKE ALL ON FUNCTION autoembed._content_%1$s(text[]), autoembed._write_%1$s(text[], text[], text[]) FROM PUBLIC', pipeline_id);
    UPDATE autoembed.pipeline AS p SET built_from = _from WHERE p.id = pipeline_id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_pipeline(integer) IS
    'Makes the functions that read a pipeline''s texts and write its vectors, if they are missing or the table has changed.';

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

CREATE FUNCTION autoembed._adopt(table_id oid, embedding_column text, content_function text)
    RETURNS integer
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _root oid := coalesce(pg_partition_root(table_id), table_id);
    _check record;
    _id integer;
BEGIN
    SELECT p.id INTO _id
    FROM autoembed.pipeline AS p
    WHERE p.table_id = _root AND p.embedding_column = _adopt.embedding_column AND p.content_function = _adopt.content_function;
    IF FOUND THEN
        RETURN _id;
    END IF;
    SELECT c.* INTO _check FROM autoembed._check_pipeline(_root, embedding_column, content_function, NULL) AS c;
    IF _check.errcode = 'waits' THEN
        RAISE WARNING USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = 'object_not_in_prerequisite_state';
    ELSIF _check.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _check.problem, HINT = _check.hint, ERRCODE = _check.errcode;
    END IF;
    INSERT INTO autoembed.pipeline AS p (table_id, embedding_column, content_function)
    VALUES (_root, _adopt.embedding_column, _adopt.content_function)
    ON CONFLICT ON CONSTRAINT pipeline_table_id_embedding_column_content_function_key DO UPDATE SET table_id = excluded.table_id
    RETURNING p.id INTO _id;
    PERFORM autoembed._build_pipeline(_id);
    RETURN _id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._adopt(oid, text, text) IS
    'The pipeline of that table, column and content function, made if it is new; an error if it cannot be.';

CREATE FUNCTION autoembed._drop_orphaned_pipelines()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _id integer;
BEGIN
    FOR _id IN
        DELETE FROM autoembed.pipeline AS p
        WHERE NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = p.table_id)
        RETURNING p.id
    LOOP
        DELETE FROM pgmq.q_embedding_jobs AS q WHERE coalesce(q.message ->> 'pipeline', '') = _id::text;
        EXECUTE format('DROP FUNCTION IF EXISTS autoembed._content_%1$s(text[]), autoembed._write_%1$s(text[], text[], text[])', _id);
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._drop_orphaned_pipelines() IS 'Ends the pipelines whose table was dropped, with their jobs.';

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
BEGIN
    FOR _trigger IN
        SELECT t.*, f.proname
        FROM pg_event_trigger_ddl_commands() AS d
        JOIN pg_trigger AS t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid AND t.tgparentid = 0
        JOIN pg_proc AS f ON f.oid = t.tgfoid AND f.pronamespace = 'autoembed'::regnamespace
        WHERE f.proname IN ('queue_embeddings', 'clear_column')
    LOOP
        -- tgargs: each argument ends with a zero byte, which the escape format shows as \000.
        SELECT array_agg(convert_from(decode(a.argument, 'escape'), getdatabaseencoding()) ORDER BY a.position)
        INTO _arguments
        FROM string_to_table(encode(_trigger.tgargs, 'escape'), '\000') WITH ORDINALITY AS a(argument, position)
        WHERE a.position <= _trigger.tgnargs;
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
            PERFORM autoembed._adopt(_trigger.tgrelid, _arguments[2], _arguments[1]);
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
                WHERE p.table_id = _root AND p.embedding_column = TG_ARGV[1] AND p.content_function = TG_ARGV[0]
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

-- 50_process.sql: the path of a job. First what the lane does to queue and state, one statement each; then the doors into Python.

CREATE FUNCTION autoembed._claim(max_rows integer, lease_seconds double precision)
    RETURNS TABLE (message_id bigint, read_count integer, message jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
DECLARE
    -- A parameter, unlike clock_timestamp() itself, can be looked up in an index.
    _now timestamptz := clock_timestamp();
BEGIN
    IF NOT EXISTS (SELECT FROM pgmq.q_embedding_jobs AS q WHERE q.vt <= _now) THEN
        RETURN;
    END IF;
    PERFORM autoembed._drop_orphaned_pipelines();
    RETURN QUERY
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
    ),
    ready AS MATERIALIZED (
        SELECT n.pipeline, s.failures
        FROM queued AS n
        -- OFFSET 0: looks at these pipelines alone, however many there are.
        LEFT JOIN LATERAL (
            SELECT s.blocked, s.failures
            FROM autoembed._pipeline_state AS s
            WHERE s.id = CASE WHEN n.pipeline ~ '^[1-9][0-9]{0,8}$' THEN n.pipeline::integer END
            OFFSET 0
        ) AS s ON true
        WHERE s.blocked IS NULL
          AND EXISTS (
              SELECT FROM pgmq.q_embedding_jobs AS q
              WHERE coalesce(q.message ->> 'pipeline', '') = n.pipeline AND q.vt <= _now
          )
    ),
    -- Every pipeline has its share, so that none holds up another; a provider that failed last time is tried with one row.
    due AS (
        SELECT q.msg_id
        FROM ready AS r
        CROSS JOIN LATERAL (
            SELECT q.msg_id
            FROM pgmq.q_embedding_jobs AS q
            WHERE coalesce(q.message ->> 'pipeline', '') = r.pipeline AND q.vt <= _now
            ORDER BY q.vt
            LIMIT CASE WHEN r.failures > 0 THEN 1 ELSE greatest(1, max_rows / (SELECT count(*) FROM ready)) END
            FOR UPDATE SKIP LOCKED
        ) AS q
    ),
    claimed AS (
        UPDATE pgmq.q_embedding_jobs AS q
        SET vt = _now + make_interval(secs => lease_seconds), read_ct = q.read_ct + 1, last_read_at = _now
        FROM due AS d
        WHERE q.msg_id = d.msg_id
        RETURNING q.msg_id, q.read_ct, q.message
    ),
    held AS (
        UPDATE autoembed.lane AS l
        SET claimed_at = _now, message_ids = (SELECT array_agg(c.msg_id) FROM claimed AS c)
        WHERE l.pid = pg_backend_pid() AND EXISTS (SELECT FROM claimed)
    )
    SELECT c.msg_id, c.read_ct, c.message FROM claimed AS c ORDER BY c.msg_id;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._claim(integer, double precision) IS
    'Takes due messages of the pipelines that can be embedded now, hides them for the lease, and counts the try.';

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
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM pgmq.q_embedding_jobs AS q WHERE q.msg_id = ANY (message_ids);
$sql$;
COMMENT ON FUNCTION autoembed._settle(bigint[]) IS 'Deletes messages that are dealt with.';

CREATE FUNCTION autoembed._release(message_ids bigint[])
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    UPDATE pgmq.q_embedding_jobs AS q
    SET vt = clock_timestamp(), read_ct = q.read_ct - 1
    WHERE q.msg_id = ANY (message_ids);
$sql$;
COMMENT ON FUNCTION autoembed._release(bigint[]) IS 'Gives claimed messages back as if they had never been read.';

CREATE FUNCTION autoembed._requeue(pipeline_id integer, keys jsonb, attempts integer, delay_seconds double precision)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO pgmq.q_embedding_jobs (vt, message)
    VALUES (clock_timestamp() + make_interval(secs => delay_seconds),
            jsonb_build_object('pipeline', pipeline_id, 'keys', keys, 'attempts', attempts));
$sql$;
COMMENT ON FUNCTION autoembed._requeue(integer, jsonb, integer, double precision) IS
    'Queues rows again, to be tried after the delay.';

CREATE FUNCTION autoembed._resolve(message jsonb)
    RETURNS integer
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _missing text;
    _table oid;
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
    RETURN autoembed._adopt(_table, message ->> 'embeddingColumn', message ->> 'contentFunction');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._resolve(jsonb) IS
    'The pipeline that a message of the guide''s form is for, made if it is new; an error if the message is of no use.';

CREATE FUNCTION autoembed._pipelines(ids integer[])
    RETURNS TABLE (id integer, schema_name text, table_name text, content_function text, embedding_column text,
                   truncate boolean, trusted boolean, blocked text, failures integer, model jsonb)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
#variable_conflict use_column
BEGIN
    PERFORM autoembed._build_pipeline(s.id) FROM autoembed._pipeline_state AS s WHERE s.id = ANY (ids) AND s.sound;
    RETURN QUERY
    SELECT s.id, n.nspname::text, c.relname::text, s.content_function, s.embedding_column::text,
           s.truncate, coalesce((SELECT r.rolsuper FROM pg_roles AS r WHERE r.oid = c.relowner), true), s.blocked, s.failures, to_jsonb(autoembed._model(s.model))
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
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT e.key, e.digest FROM autoembed.embedded AS e WHERE e.pipeline_id = _digests.pipeline_id AND e.key = ANY (keys);
$sql$;
COMMENT ON FUNCTION autoembed._digests(integer, text[]) IS 'From which text the embeddings of these rows were made.';

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
    ORDER BY s.key
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

CREATE FUNCTION autoembed._fail(pipeline_id integer, key text, reason text, attempts integer, excerpt text)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.failure AS f (pipeline_id, key, error_class, reason, attempts, excerpt)
    VALUES (_fail.pipeline_id, _fail.key, 'row', _fail.reason, _fail.attempts, left(_fail.excerpt, 200))
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

CREATE FUNCTION autoembed._enter_lane()
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.lane (pid, backend_start)
    SELECT a.pid, a.backend_start FROM pg_stat_get_activity(pg_backend_pid()) AS a
    ON CONFLICT DO NOTHING;
$sql$;
COMMENT ON FUNCTION autoembed._enter_lane() IS 'Signs this session on as a lane.';

CREATE FUNCTION autoembed._lane_is_wanted()
    RETURNS boolean
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT NOT EXISTS (SELECT FROM autoembed.lane AS l WHERE l.pid = pg_backend_pid() AND l.stop);
$sql$;
COMMENT ON FUNCTION autoembed._lane_is_wanted() IS 'Whether nobody has asked this lane to stop.';

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
    DELETE FROM autoembed.lane AS l WHERE l.pid = pg_backend_pid();
$sql$;
COMMENT ON FUNCTION autoembed._leave_lane() IS 'Signs this session off.';

CREATE FUNCTION autoembed._free_dead_lanes()
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH dead AS (
        DELETE FROM autoembed.lane AS l
        WHERE NOT EXISTS (
            SELECT FROM pg_stat_get_activity(NULL) AS a
            WHERE a.pid = l.pid AND a.backend_start = l.backend_start
        )
        RETURNING l.claimed_at, l.message_ids
    )
    UPDATE pgmq.q_embedding_jobs AS q
    SET vt = clock_timestamp()
    FROM dead AS d
    CROSS JOIN LATERAL unnest(d.message_ids) AS m(id)
    -- Unless another lane has them since.
    WHERE q.msg_id = m.id AND q.last_read_at = d.claimed_at;
$sql$;
COMMENT ON FUNCTION autoembed._free_dead_lanes() IS
    'Makes the jobs of lanes whose backend is gone visible at once; the try stays counted.';

-- The doors ---------------------------------------------------------------------------------------

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
    LANGUAGE plpython3u
    VOLATILE
    SECURITY DEFINER
    -- No search_path of its own: behind it, it could not see the caller's, to put that back after an owner's code has run.
    -- As in work(), every name that the Python side uses is qualified.
AS $python$
    if GD.get("autoembed") != "d87a5e4085b8fab4":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.process(batch_size, max_requests, timeout_milliseconds)
$python$;
COMMENT ON FUNCTION autoembed.process(integer, integer, integer) IS
    'Embeds waiting jobs once, in the caller''s transaction: up to max_requests requests at a time of up to batch_size texts, each request to a provider given timeout_milliseconds. Returns how many jobs were read, completed, put back to be tried again, and given up, and the requests sent; failed_jobs lists the jobs that did not complete, each with its error.';

CREATE PROCEDURE autoembed.work(
    run_seconds double precision DEFAULT 300,
    batch_size integer DEFAULT 100,
    max_requests integer DEFAULT 10,
    timeout_milliseconds integer DEFAULT 300000
)
    LANGUAGE plpython3u
AS $python$
    if GD.get("autoembed") != "d87a5e4085b8fab4":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    doors.work(run_seconds, batch_size, max_requests, timeout_milliseconds)
$python$;
COMMENT ON PROCEDURE autoembed.work(double precision, integer, integer, integer) IS
    'A lane: embeds what waits, and what comes, for run_seconds; commits as it goes and holds no transaction while a request is in flight. schedule() has pg_cron call it.';

CREATE FUNCTION autoembed.embed(content text, model text DEFAULT NULL)
    RETURNS @extschema:vector@.vector
    LANGUAGE plpython3u
    STABLE
    PARALLEL RESTRICTED
    SECURITY DEFINER
    SET search_path = pg_catalog, @extschema:vector@, pg_temp
AS $python$
    if GD.get("autoembed") != "d87a5e4085b8fab4":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.embed(content, model)
$python$;
COMMENT ON FUNCTION autoembed.embed(text, text) IS
    'The embedding of a search text by that model, NULL for the default one; NULL for NULL. ORDER BY column <=> autoembed.embed(…) uses the column''s index.';

-- 60_schedule.sql: lanes as pg_cron jobs, and leaving without a trace. Nothing else knows pg_cron.

CREATE FUNCTION autoembed.unschedule()
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _lanes integer;
BEGIN
    UPDATE autoembed.lane SET stop = true;
    IF to_regclass('cron.job') IS NULL THEN
        RETURN 0;
    END IF;
    SELECT count(cron.unschedule(j.jobid)) INTO _lanes
    FROM cron.job AS j
    WHERE j.jobname LIKE 'autoembed-lane-%' AND j.database = current_database();
    RETURN _lanes;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.unschedule() IS
    'Ends all lanes; returns how many were scheduled. What a lane has in flight goes back to the queue.';

CREATE FUNCTION autoembed.schedule(lanes integer DEFAULT 1)
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
       AND lanes > current_setting('max_worker_processes')::integer - 3 THEN
        RAISE WARNING USING
            ERRCODE = 'configuration_limit_exceeded',
            MESSAGE = format('%s lanes may not all run with max_worker_processes at %s', lanes,
                             current_setting('max_worker_processes')),
            HINT = format('Set max_worker_processes to at least %s and restart the server.', lanes + 3);
    END IF;
    PERFORM autoembed.unschedule();
    PERFORM cron.schedule('autoembed-lane-' || n, '1 second', 'CALL autoembed.work()') FROM generate_series(1, lanes) AS n;
    RETURN lanes;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.schedule(integer) IS
    'Has pg_cron run that many lanes side by side in this database, in place of those it ran before; returns their number.';

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

CREATE VIEW autoembed.failed AS
SELECT f.id,
       p.table_id AS table_name,
       p.embedding_column,
       f.key,
       f.error_class,
       f.reason,
       f.attempts,
       f.first_failed_at,
       f.last_failed_at,
       f.excerpt,
       f.message
FROM autoembed.failure AS f
LEFT JOIN autoembed.pipeline AS p ON p.id = f.pipeline_id;
COMMENT ON VIEW autoembed.failed IS
    'The rows that could not be embedded and will not be tried again, each with the reason; retry_failed() tries them again.';
COMMENT ON COLUMN autoembed.failed.id IS 'The failure''s number.';
COMMENT ON COLUMN autoembed.failed.table_name IS 'The table; NULL for a message that names none.';
COMMENT ON COLUMN autoembed.failed.embedding_column IS 'The column that was to hold the embedding.';
COMMENT ON COLUMN autoembed.failed.key IS 'The row''s key as a JSON array.';
COMMENT ON COLUMN autoembed.failed.error_class IS 'row: the text or the table; message: the job itself.';
COMMENT ON COLUMN autoembed.failed.reason IS 'What went wrong the last time.';
COMMENT ON COLUMN autoembed.failed.attempts IS 'How often it was tried.';
COMMENT ON COLUMN autoembed.failed.first_failed_at IS 'When it was given up first.';
COMMENT ON COLUMN autoembed.failed.last_failed_at IS 'When it was given up last.';
COMMENT ON COLUMN autoembed.failed.excerpt IS 'The first 200 characters of the text.';
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
        RETURNING 1
    )
    SELECT count(*) INTO _retried FROM queued;
    RETURN _retried;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.retry_failed(regclass, text) IS
    'Queues the failed rows of a table, of an error class, or all again; returns how many.';

-- 90_privileges.sql: nothing is for PUBLIC. Last, so that nothing escapes it.

REVOKE ALL ON SCHEMA autoembed FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA autoembed FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA autoembed FROM PUBLIC;
