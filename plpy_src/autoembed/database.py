"""The one door to plpy: every statement that the Python side runs is a method here."""

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
