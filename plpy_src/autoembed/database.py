"""The one door to plpy: every statement that the Python side runs is a method here."""

from __future__ import annotations

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

    truncate: too long texts are cut rather than failed; blocked: why its jobs wait, if they do; failures: how often its
    model's provider has failed in a row.
    """

    id: int
    schema_name: str
    table_name: str
    content_function: str
    embedding_column: str
    truncate: bool
    blocked: str | None
    failures: int
    model: Model


@dataclass(frozen=True)
class Row:
    """A row as it stands: its text, and whether its embedding is there."""

    content: str | None
    has_embedding: bool


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

    def lane_is_wanted(self) -> bool:
        """Whether nobody has asked the lane to stop."""
        return bool(self._run("SELECT autoembed._lane_is_wanted() AS wanted")[0]["wanted"])

    def statement_timeout_seconds(self) -> float | None:
        """How long a statement of this session may take; None: as long as it likes."""
        row = self._run("SELECT s.setting FROM pg_catalog.pg_settings AS s WHERE s.name = 'statement_timeout'")[0]
        return int(row["setting"]) / 1000 or None

    # The queue -----------------------------------------------------------------------------------

    def claim(self, max_rows: int, lease_seconds: float) -> list[Message]:
        rows = self._run(
            "SELECT c.message_id, c.read_count, c.message FROM autoembed._claim($1, $2) AS c",
            ["integer", "double precision"],
            [max_rows, lease_seconds],
        )
        return [Message(row["message_id"], row["read_count"], _body(row["message"])) for row in rows]

    def extend(self, message_ids: Sequence[int], lease_seconds: float) -> None:
        self._run(
            "SELECT autoembed._extend($1, $2)",
            ["bigint[]", "double precision"],
            [list(message_ids), lease_seconds],
        )

    def settle(self, message_ids: Sequence[int]) -> None:
        self._run("SELECT autoembed._settle($1)", ["bigint[]"], [list(message_ids)])

    def release(self, message_ids: Sequence[int]) -> None:
        self._run("SELECT autoembed._release($1)", ["bigint[]"], [list(message_ids)])

    def requeue(self, pipeline_id: int, keys: Sequence[str], attempts: int, delay_seconds: float) -> None:
        self._run(
            "SELECT autoembed._requeue($1, $2, $3, $4)",
            ["integer", "jsonb", "integer", "double precision"],
            [pipeline_id, f"[{','.join(keys)}]", attempts, delay_seconds],
        )

    # Pipelines and models ------------------------------------------------------------------------

    def resolve(self, body: Any) -> int:
        """The pipeline of a message of the guide's form; RowError if it is of no use."""
        with _row_errors():
            return int(self._run("SELECT autoembed._resolve($1) AS id", ["jsonb"], [json.dumps(body)])[0]["id"])

    def pipelines(self, ids: Sequence[int]) -> dict[int, Pipeline]:
        rows = self._run("SELECT p.* FROM autoembed._pipelines($1) AS p", ["integer[]"], [list(ids)])
        return {
            row["id"]: Pipeline(
                id=row["id"],
                schema_name=row["schema_name"],
                table_name=row["table_name"],
                content_function=row["content_function"],
                embedding_column=row["embedding_column"],
                truncate=row["truncate"],
                blocked=row["blocked"],
                failures=row["failures"],
                model=Model.from_row(json.loads(row["model"])),
            )
            for row in rows
        }

    def model(self, name: str | None) -> Model:
        """The model of that name, the default one for None; an error of PostgreSQL's kind if there is none."""
        sql = "SELECT pg_catalog.to_jsonb(m) AS model FROM autoembed._model($1) AS m"
        return Model.from_row(json.loads(self._run(sql, ["text"], [name])[0]["model"]))

    def rest_model(self, name: str, seconds: float, needs_attention: bool, reason: str) -> None:
        self._run(
            "SELECT autoembed._rest_model($1, $2, $3, $4)",
            ["text", "double precision", "boolean", "text"],
            [name, seconds, needs_attention, reason],
        )

    def resume_model(self, name: str) -> None:
        self._run("SELECT autoembed.resume_model($1)", ["text"], [name])

    def warn_of_blocked_pipelines(self) -> None:
        """Warns of the pipelines that have jobs waiting and cannot be embedded."""
        self._run("SELECT autoembed._warn_of_blocked_pipelines(true)")

    # Rows ----------------------------------------------------------------------------------------

    def rows(self, pipeline: Pipeline, keys: Sequence[str]) -> dict[str, Row]:
        """The rows that exist, by key; RowError if the content function fails for one of them."""
        with _row_errors():
            rows = self._run(
                f"SELECT c.key, c.content, c.has_embedding FROM autoembed._content_{pipeline.id}($1) AS c",
                ["text[]"],
                [list(keys)],
            )
        return {row["key"]: Row(row["content"], row["has_embedding"]) for row in rows}

    def digests(self, pipeline: Pipeline, keys: Sequence[str]) -> dict[str, bytes]:
        rows = self._run(
            "SELECT d.key, d.digest FROM autoembed._digests($1, $2) AS d",
            ["integer", "text[]"],
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
        with _row_errors():
            rows = self._run(
                f"SELECT w.key, w.outcome FROM autoembed._write_{pipeline.id}($1, $2, $3) AS w",
                ["text[]", "text[]", "text[]"],
                [list(keys), list(contents), embeddings],
            )
        return {row["key"]: row["outcome"] for row in rows}

    def record_embedded(
        self, pipeline: Pipeline, keys: Sequence[str], digests: Sequence[bytes], truncated: Sequence[bool]
    ) -> None:
        self._run(
            "SELECT autoembed._record_embedded($1, $2, $3, $4)",
            ["integer", "text[]", "bytea[]", "boolean[]"],
            [pipeline.id, list(keys), list(digests), list(truncated)],
        )

    def forget(self, pipeline: Pipeline, keys: Sequence[str]) -> None:
        self._run("SELECT autoembed._forget($1, $2)", ["integer", "text[]"], [pipeline.id, list(keys)])

    def fail(self, pipeline: Pipeline, key: str, reason: str, attempts: int, excerpt: str | None) -> None:
        self._run(
            "SELECT autoembed._fail($1, $2, $3, $4, $5)",
            ["integer", "text", "text", "integer", "text"],
            [pipeline.id, key, reason, attempts, excerpt],
        )

    def fail_message(self, body: Any, reason: str, attempts: int) -> None:
        self._run(
            "SELECT autoembed._fail_message($1, $2, $3)",
            ["jsonb", "text", "integer"],
            [json.dumps(body), reason, attempts],
        )

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
    return bool(plpy.execute("SELECT FROM pg_catalog.pg_extension AS e WHERE e.extname = 'autoembed'"))


@contextmanager
def _row_errors() -> Iterator[None]:
    """Undoes a statement that fails by a row's fault and raises RowError; all other errors go their way."""
    try:
        with plpy.subtransaction():
            yield
    except plpy.SPIError as error:
        fault = row_error(error.sqlstate or "XX000", str(error))
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
