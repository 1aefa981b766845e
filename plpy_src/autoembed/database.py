"""The one door to plpy: every statement that the Python side runs is a method here."""

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
