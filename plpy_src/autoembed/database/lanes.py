"""The statements of lanes, and of the functions that do a lane's work."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import plpy  # type: ignore[import-not-found]

from autoembed.binary import copy_rows, literals
from autoembed.database.statements import message_body, row_errors, sqlstate_of
from autoembed.database.texts import TextDatabase
from autoembed.errors import (
    INSUFFICIENT_PRIVILEGE,
    LOCK_NOT_AVAILABLE,
    OBJECT_IN_USE,
    QUERY_CANCELED,
    PassEnded,
    ProviderTrouble,
    RowError,
    Trouble,
    row_error,
    trouble_of_function,
)
from autoembed.limits import Charge, Limits, Permit
from autoembed.long_text import LongText, Text
from autoembed.model import Model, Share
from autoembed.records import (
    LONG_TEXT_BYTES,
    MAX_PIECES,
    MAX_TEXT_BYTES,
    Backfill,
    Chunk,
    Known,
    Message,
    Pipeline,
    Row,
    Written,
    digest_of_chunks,
)
from autoembed.restricted import Run, as_role, available, interrupt_is_pending, restricted
from autoembed.statistics import Reporter

if TYPE_CHECKING:
    import numpy as np

# An owner's code is cancelled after so long in one statement, in seconds: another owner's rows wait meanwhile.
OWNER_SECONDS = 1.0
# The same where the statement runs no code of the owner, but has a long text, or many chunks beside an index.
OWN_SECONDS = 10.0
# The code of an owner is at fault if it fails alike for so many rows, and gives no text of those that are tried.
ALIKE_ROWS = 2
# So many rows are tried of those that fail, and of those that a lane comes by.
TRIED_ROWS = 10
# A longer text tells nothing of the code, in bytes.
TRIED_BYTES = 1 << 20
# A lane looks for so long whether the code or the row is at fault, in seconds.
LOOK_SECONDS = 0.5
# The same where only the caller waits.
CALLER_SECONDS = 3600.0
# A model whose function was cancelled rests for so long, in seconds.
CANCEL_REST_SECONDS = 60.0
# A scan reads about so many bytes of keys at a time: a key can have a megabyte.
MAX_KEY_BYTES = 1_000_000
# A lane does not wait longer for a lock, in milliseconds.
LOCK_TIMEOUT_MILLISECONDS = 500
# The functions of a pipeline are looked at so often, in seconds, and those of all so many times a second. Event
# triggers keep them current. A look takes a millisecond.
CHECK_SECONDS = 1.0
CHECKS_PER_SECOND = 20
# A wait looks for a cancel so often, in seconds.
SLEEP_SECONDS = 0.1
# The types of the arguments that describe chunks: prefixes, versions, first and last numbers of rows; keys, numbers,
# sources, starts, ends, digests.
CHUNK_COLUMNS = [
    *["pg_catalog.text[]"] * 2,
    *["pg_catalog.int4[]"] * 2,
    "pg_catalog.text[]",
    *["pg_catalog.int4[]"] * 4,
    "pg_catalog.bytea[]",
]


class _Undo(Exception):
    """Rolls back a subtransaction whose result has been read."""


class Database(TextDatabase):
    """The database as seen from a lane, which commits as it goes, or from a function, which cannot."""

    def __init__(self, *, commits: bool) -> None:
        # A lane lives long.
        super().__init__(lasts=commits)
        self._commits = commits
        # The vector types whose temporary tables may have rows. Each commit empties them.
        self._filled: set[str] = set()
        # When the functions of a pipeline are due to be looked at again.
        self._check_at: dict[int, float] = {}
        # When the time was last looked at between two steps.
        self._looked_at = 0.0
        self._has_written = False
        self._in_pass = commits
        self._reporter: Reporter | None = None

    def begin_pass(self) -> None:
        """To be called first in a caller's transaction, which may have deferred triggers of its own."""
        self._in_pass = True
        sql = "SELECT pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL AS has_written"
        self._has_written = bool(self._run(sql)[0]["has_written"])

    def commit(self, *, synced: bool = True) -> None:
        """Commits, where that is possible. synced: waits for the disk if the server's settings ask for it."""
        if self._commits:
            if not synced:
                self._run("SELECT pg_catalog.set_config('synchronous_commit', 'off', true)")
            plpy.commit()
            self._filled.clear()
            if self._reporter is not None:
                self._reporter.report()

    def check_interrupts(self) -> None:
        """Lets a cancel, a timeout or a shutdown take effect, and keeps a lane's transactions short."""
        self._run("SELECT 1")
        self.commit()

    def between_steps(self) -> None:
        """The same between steps that may be short: at once if an interrupt is pending, and else ten times a second."""
        now = time.monotonic()
        if interrupt_is_pending() or now - self._looked_at > SLEEP_SECONDS:
            self._looked_at = now
            self.check_interrupts()

    def sleep(self, seconds: float) -> None:
        """Waits, while other threads may run. A cancel, a timeout or a shutdown ends the wait."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not interrupt_is_pending():
            time.sleep(SLEEP_SECONDS)
        self.check_interrupts()

    # Lanes ---------------------------------------------------------------------------------------

    def enter_lane(self, *, backfill: bool) -> bool:
        """Registers the session as a lane. backfill: as one for backfills alone.

        Returns whether any of the tables has a vector index, which makes writing slow.
        """
        [settings] = self._run(
            "SELECT pg_catalog.current_setting('track_functions') AS track_functions,"
            " pg_catalog.current_setting('debug_assertions') AS debug_assertions"
        )
        self._reporter = Reporter(**settings)
        return bool(
            self._run("SELECT autoembed._enter_lane($1) AS indexed", ["pg_catalog.bool"], [backfill])[0]["indexed"]
        )

    def leave_lane(self) -> None:
        self._run("SELECT autoembed._leave_lane()")

    def clean_up(self) -> None:
        """Removes the remains of dropped tables, dead lanes and finished backfills.

        What another transaction has removed, or holds, is left for the next time.
        """
        with _left_if_locked():
            self._run("SELECT autoembed._clean_up()")

    def lock_lanes(self) -> None:
        """Locks the table of lanes. A transaction that writes begins so, to avoid a deadlock with DROP EXTENSION."""
        self._run("SELECT autoembed._gate()")

    def lane_is_wanted(self) -> bool:
        """Whether nobody has asked the lane to stop."""
        return bool(self._run("SELECT autoembed._lane_is_wanted() AS wanted")[0]["wanted"])

    def statement_timeout_seconds(self) -> float | None:
        """The time that is left of the one that the present statement may take; None: there is no limit.

        The statement began before Python was loaded, which takes long on a busy machine.
        """
        [row] = self._run(
            "SELECT s.setting, pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()"
            " OPERATOR(pg_catalog.-) pg_catalog.statement_timestamp()) AS passed"
            " FROM pg_catalog.pg_settings AS s WHERE s.name OPERATOR(pg_catalog.=) 'statement_timeout'"
        )
        limit = int(row["setting"]) / 1000
        return max(0.0, limit - row["passed"]) if limit else None

    # The queue -----------------------------------------------------------------------------------

    def claim(
        self,
        max_rows: int,
        lease_seconds: float,
        held: Sequence[int],
        busy_models: Sequence[str],
        busy_owners: Sequence[int],
    ) -> list[Message]:
        """Claims messages for about so many rows, of other models and owners than the busy ones.

        held: the messages that this lane has already.
        """
        rows = self._run(
            "SELECT c.message_id, c.read_count, c.message FROM autoembed._claim($1, $2, $3, $4, $5) AS c",
            ["pg_catalog.int4", "pg_catalog.float8", "pg_catalog.int8[]", "pg_catalog.text[]", "pg_catalog.int8[]"],
            [max_rows, lease_seconds, list(held), list(busy_models), list(busy_owners)],
        )
        return [Message(row["message_id"], row["read_count"], message_body(row["message"])) for row in rows]

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
        self,
        pipeline_id: int,
        keys: Sequence[str],
        attempts: int,
        message_ids: Sequence[int],
        *,
        read_count: int = 0,
        delay_seconds: float = 0.0,
        suspect: bool = False,
    ) -> None:
        """Queues rows in one message. message_ids: those that have named them, and are still there.

        read_count: how often it counts as read before. suspect: see Address.
        """
        self._run(
            "SELECT autoembed._requeue($1, $2, $3, $4, $5, $6, $7)",
            [
                "pg_catalog.int4",
                "pg_catalog.jsonb",
                *["pg_catalog.int4"] * 2,
                "pg_catalog.float8",
                "pg_catalog.bool",
                "pg_catalog.int8[]",
            ],
            [pipeline_id, f"[{','.join(keys)}]", attempts, read_count, delay_seconds, suspect, list(message_ids)],
        )

    # Backfills -----------------------------------------------------------------------------------

    def next_backfill(
        self, *, dedicated: bool, busy_models: Sequence[str], busy_owners: Sequence[int]
    ) -> Backfill | None:
        """The next table to scan, locked against other lanes until the commit; of no busy model or owner.

        dedicated: this lane only backfills.
        """
        rows = self._run(
            "SELECT b.* FROM autoembed._next_backfill($1, $2, $3) AS b",
            ["pg_catalog.bool", "pg_catalog.text[]", "pg_catalog.int8[]"],
            [dedicated, list(busy_models), list(busy_owners)],
        )
        if not rows:
            return None
        row = rows[0]
        return Backfill(
            row["pipeline_id"],
            row["owner"],
            row["after"],
            row["condition"],
            row["failures"],
            row["model"],
            row["provider"],
            row["problem"],
        )

    def scan(self, backfill: Backfill, max_rows: int) -> tuple[list[str], bool]:
        """The next keys of its table, and whether these are the last.

        Raises RowError if its condition fails or the table is locked.
        """
        if time.monotonic() > self._check_at.get(backfill.pipeline_id, 0.0):
            # A dump may have brought the function of another version.
            self.pipelines([backfill.pipeline_id])
        rows: Any = []
        with self._owners_code(undone=True):
            rows = self._run_made(
                f"SELECT s.key FROM autoembed._scan_{backfill.pipeline_id}($1, $2, $3, $4) AS s",
                ["pg_catalog.text", "pg_catalog.text", "pg_catalog.int4", "pg_catalog.int8"],
                [backfill.after, backfill.condition, max_rows, MAX_KEY_BYTES],
            )
        keys = [row["key"] for row in rows]
        if keys and keys[-1] is None:
            return keys[:-1], False
        return keys, len(keys) < max_rows

    def queue_backfill(
        self,
        backfill: Backfill,
        keys: Sequence[str],
        *,
        exhausted: bool,
        lease_seconds: float,
        held: Sequence[int],
    ) -> list[Message]:
        """Moves a backfill behind these keys. Returns the message for them, which is claimed already.

        Raises RowError if the owner has written figures that cannot be counted on.
        """
        rows: Any = []
        with row_errors():
            rows = self._run(
                "SELECT c.message_id, c.read_count, c.message FROM autoembed._queue_backfill($1, $2, $3, $4, $5) AS c",
                ["pg_catalog.int4", "pg_catalog.text[]", "pg_catalog.bool", "pg_catalog.float8", "pg_catalog.int8[]"],
                [backfill.pipeline_id, list(keys), exhausted, lease_seconds, list(held)],
            )
        return [Message(row["message_id"], row["read_count"], message_body(row["message"])) for row in rows]

    def fail_backfill(self, backfill: Backfill, reason: str) -> None:
        """Ends a backfill, with the reason on the failed list."""
        self._run(
            "SELECT autoembed._fail_backfill($1, $2)",
            ["pg_catalog.int4", "pg_catalog.text"],
            [backfill.pipeline_id, storable(reason)],
        )

    # Pipelines and models ------------------------------------------------------------------------

    def resolve(self, body: Any) -> int:
        """The pipeline of a message of the guide's form; RowError if it is of no use."""
        with row_errors():
            return int(
                self._run("SELECT autoembed._resolve($1) AS id", ["pg_catalog.jsonb"], [json.dumps(body)])[0]["id"]
            )

    def pipelines(self, ids: Sequence[int], *, after_error: bool = False) -> dict[int, Pipeline]:
        """The facts of pipelines. Their functions are looked at now and then, and after an error."""
        now = time.monotonic()
        unchecked = [number for number in ids if after_error or now > self._check_at.get(number, 0.0)]
        rows = self._run(
            "SELECT p.* FROM autoembed._pipelines($1, $2) AS p",
            ["pg_catalog.int4[]", "pg_catalog.int4[]"],
            [list(ids), unchecked],
        )
        seconds = max(CHECK_SECONDS, len(self._check_at) / CHECKS_PER_SECOND)
        for row in rows:
            if row["was_checked"] and row["blocked"] is None:
                self._check_at[row["id"]] = now + seconds
        return {
            row["id"]: Pipeline(
                id=row["id"],
                schema_name=row["schema_name"],
                table_name=row["table_name"],
                owner=row["owner"],
                content_function=row["content_function"],
                embedding_column=row["embedding_column"],
                vector_type=row["vector_type"],
                truncate=row["truncate"],
                blocked=row["blocked"],
                failures=row["failures"],
                model=Model.from_row(json.loads(row["model"])),
                is_beside=row["is_beside"],
                chunking=row["chunking"],
                chunk_size=row["chunk_size"],
                chunk_overlap=row["chunk_overlap"],
                text_config=row["text_config"],
                splitter=row["splitter"],
                chunk_prefix=row["chunk_prefix"],
                was_rebuilt=row["was_rebuilt"],
            )
            for row in rows
        }

    def own_pipeline(self, pipeline_id: int) -> Pipeline:
        """The facts of a pipeline. Fails unless the caller has the rights of its table's owner."""
        with as_role(self._texts_table()[1]):
            pipelines = self.pipelines([pipeline_id])
            tables = self._run(
                "SELECT p.table_id::pg_catalog.oid::pg_catalog.int8 AS id FROM autoembed.pipeline AS p"
                " WHERE p.id OPERATOR(pg_catalog.=) $1",
                ["pg_catalog.int4"],
                [pipeline_id],
            )
        for table in tables:
            self._run(
                "SELECT autoembed._check_owner($1::pg_catalog.oid::pg_catalog.regclass)",
                ["pg_catalog.int8"],
                [table["id"]],
            )
        return pipelines[pipeline_id]

    def model(self, name: str | None) -> Model:
        """The model of that name, which may be a rerank model; None: the default one."""
        sql = "SELECT autoembed._model_facts(m) AS model FROM autoembed._model($1, NULL) AS m"
        return Model.from_row(json.loads(self._run(sql, ["pg_catalog.text"], [name])[0]["model"]))

    def price_and_rate(self, model: Model) -> tuple[Any, Any, float | None]:
        """The price of a model per million tokens, its rows per second in the busiest recent minute, and the tokens of
        its usual requests.
        """
        row = self._run(
            "SELECT p.price, p.rows_per_second, p.tokens_per_request FROM autoembed._price_and_rate($1) AS p",
            ["pg_catalog.text"],
            [model.name],
        )[0]
        return row["price"], row["rows_per_second"], row["tokens_per_request"]

    def rest_model(self, name: str, seconds: float, needs_attention: bool, trouble: Trouble) -> bool:
        """Lets a model rest; whether its trouble is new, and this the first lane to say so."""
        with _left_if_locked():
            [row] = self._run(
                "SELECT autoembed._rest_model($1, $2, $3, $4, $5) AS is_new",
                ["pg_catalog.text", "pg_catalog.float8", "pg_catalog.bool", "pg_catalog.text", "pg_catalog.text"],
                [name, seconds, needs_attention, storable(str(trouble)), storable(trouble.summary)],
            )
            return bool(row["is_new"])
        return False

    def rest_pipelines(self, owner: int, pipeline_ids: Sequence[int], reason: str) -> None:
        """Lets pipelines of an owner rest after an error of its code; no ids: all of them."""
        with _left_if_locked():
            self._run(
                "SELECT autoembed._rest_pipelines($1, $2, $3)",
                ["pg_catalog.int8", "pg_catalog.int4[]", "pg_catalog.text"],
                [owner, list(pipeline_ids), storable(reason)],
            )

    def resume_model(self, name: str) -> None:
        with _left_if_locked():
            self._run("SELECT autoembed.resume_model($1)", ["pg_catalog.text"], [name])

    def call_embedder(
        self, model: str, purpose: str, texts: Sequence[str], timeout_seconds: float
    ) -> list[bytes | None]:
        """The vectors that a model's SQL function returns for texts, in PostgreSQL's binary form. Raises Trouble."""
        row: Any = None
        try:
            with self._owners_code(undone=True, seconds=timeout_seconds):
                [row] = self._run(
                    "SELECT c.vectors, c.fault FROM autoembed._call_embedder($1, $2, $3) AS c",
                    ["pg_catalog.text", "pg_catalog.text", "pg_catalog.text[]"],
                    [model, purpose, list(texts)],
                )
        except RowError as error:
            if not error.cancels:
                raise trouble_of_function(error, timeout_seconds) from error
            if not self._in_pass:
                raise (error.__cause__ or error) from None
            # The function may have raised it, so its model rests; it may be a real one, so the pass ends.
            self.rest_model(model, CANCEL_REST_SECONDS, False, ProviderTrouble(str(error)))
            raise PassEnded(str(error)) from error
        if row["fault"] is not None:
            raise ProviderTrouble(row["fault"], permanent=True)
        return list(row["vectors"])

    def call_reranker(
        self, model: str, query: str, passages: Sequence[str], timeout_seconds: float
    ) -> list[float | None]:
        """The scores that a rerank model's SQL function returns, one more at most than passages. Raises Trouble."""
        row: Any = None
        try:
            with self._owners_code(undone=True, seconds=timeout_seconds):
                [row] = self._run(
                    "SELECT c.scores, c.fault FROM autoembed._call_embedder($1, 'rerank', $2, $3) AS c",
                    ["pg_catalog.text", "pg_catalog.text[]", "pg_catalog.text"],
                    [model, list(passages), query],
                )
        except RowError as error:
            if not error.cancels:
                raise trouble_of_function(error, timeout_seconds) from error
            raise (error.__cause__ or error) from None
        if row["fault"] is not None:
            raise ProviderTrouble(row["fault"], permanent=True)
        return list(row["scores"])

    @contextmanager
    def _owners_code(
        self, *, undone: bool = False, writes: bool = False, user: int | None = None, seconds: float = OWNER_SECONDS
    ) -> Iterator[None]:
        """Runs statements with an owner's code, under PostgreSQL's guards. Their errors are RowErrors.

        undone: what the code has done is rolled back. writes: although it is undone, it is a write. user: the
        statements run as this role.
        """
        if not available():
            raise RowError("this PostgreSQL lacks the functions under whose guard the code of a table's owner runs")
        if (writes or not undone) and not self._has_written:
            # Before anything is done: PostgreSQL refuses to defer what would run with other rights at the commit.
            self._run("SET CONSTRAINTS ALL IMMEDIATE")
        run = Run()
        locks = None if self._commits else self._run("SELECT autoembed._advisory_locks() AS held")[0]["held"]
        temporary = None if undone else self._temporary_objects()
        try:
            with contextlib.suppress(_Undo), plpy.subtransaction():
                with restricted(seconds, user) as run:
                    yield
                if undone:
                    raise _Undo
                # PostgreSQL 18.6 refuses temporary tables there, but lets types and functions be made.
                if self._temporary_objects() != temporary:
                    raise RowError(
                        "cannot create a temporary object while an embedding is written",
                        sqlstate=INSUFFICIENT_PRIVILEGE,
                    )
        except plpy.SPIError as error:
            if run.session_timed_out and sqlstate_of(error) == QUERY_CANCELED:
                raise
            raise row_error(sqlstate_of(error), str(error), timed_out=run.timed_out) from error
        finally:
            # No rollback undoes what the code does with locks of the session. A lane has none of its own.
            if locks is None:
                self._run("SELECT pg_catalog.pg_advisory_unlock_all()")
            else:
                self._run("SELECT autoembed._restore_advisory_locks($1)", ["pg_catalog.text[]"], [locks])

    def _temporary_objects(self) -> int:
        """How many objects the session's temporary schema has."""
        [row] = self._run(
            "SELECT pg_catalog.count(*) AS count FROM pg_catalog.pg_depend AS d"
            " WHERE d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass"
            " AND d.refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()"
        )
        return int(row["count"])

    @contextmanager
    def lane_settings(self, name: str) -> Iterator[None]:
        """Transactions that see what is committed and wait for no lock, whatever the session's default.

        At a higher level, lanes and applications would fail each other's statements, and even COMMIT. Errors are in
        PostgreSQL's own language where that may be set: their context tells who has raised a cancel. name: the lane's,
        for those who watch the server.
        """
        settings = {
            "application_name": name,
            "default_transaction_isolation": "read committed",
            "lock_timeout": f"{LOCK_TIMEOUT_MILLISECONDS}ms",
        }
        sql = "SELECT pg_catalog.has_parameter_privilege('lc_messages', 'SET') AS may"
        if self._run(sql)[0]["may"]:
            settings["lc_messages"] = "C"
        names = list(settings)
        [before] = self._run(
            "SELECT pg_catalog.array_agg(pg_catalog.current_setting(s.name) ORDER BY s.number) AS values"
            " FROM pg_catalog.unnest($1) WITH ORDINALITY AS s(name, number)",
            ["pg_catalog.text[]"],
            [names],
        )
        self._set(names, list(settings.values()))
        try:
            yield
        finally:
            self._set(names, before["values"])

    def _set(self, names: Sequence[str], values: Sequence[str]) -> None:
        self._run(
            "SELECT pg_catalog.set_config(s.name, s.value, false)"
            " FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS s(name, value)",
            ["pg_catalog.text[]", "pg_catalog.text[]"],
            [list(names), list(values)],
        )
        self.commit()

    # Limits --------------------------------------------------------------------------------------

    def take_permit(
        self, model: str, charges: Sequence[Charge | None], patience_seconds: float, *, with_slot: bool
    ) -> Permit:
        """A permit for one more request of a model. To be committed at once where that is possible."""
        [row] = self._run(
            "SELECT p.* FROM autoembed._take_permit($1, $2, $3, $4, $5, $6, $7, $8) AS p",
            ["pg_catalog.text", "pg_catalog.bool", "pg_catalog.bool", *["pg_catalog.float8"] * 5],
            [
                model,
                self._commits,
                with_slot,
                *(value for charge in charges for value in charge or (None, None)),
                patience_seconds,
            ],
        )
        wait = row["wait_seconds"]
        at = None if wait is None else time.monotonic() + wait
        if wait is not None and wait > patience_seconds:
            return Permit(possible_at=at)
        return Permit(at, slot=row["slot"], spent=row["spent"], rest_seconds=row["rest_seconds"] or 0.0)

    @contextmanager
    def slot(self, model: Model) -> Iterator[bool]:
        """Holds a slot for one request in flight until the block ends; False: all are taken."""
        if model.max_requests_in_flight is None:
            yield True
            return
        # The rollback frees the slot at once, and not at the end of the caller's transaction.
        with contextlib.suppress(_Undo), plpy.subtransaction():
            [row] = self._run("SELECT autoembed._take_slot($1, false) AS slot", ["pg_catalog.text"], [model.name])
            yield row["slot"] is not None
            raise _Undo

    def free_slots(self, model: str, slots: Sequence[int]) -> None:
        """Notes that requests with these slots are no longer in flight."""
        self._run(
            "SELECT autoembed._free_slots($1, $2)", ["pg_catalog.text", "pg_catalog.int4[]"], [model, list(slots)]
        )

    def learn_limits(self, model: str, limits: Limits) -> None:
        self._learn(
            model,
            requests_per_minute=limits.requests.per_minute,
            requests_at_once=limits.requests.at_once,
            tokens_per_minute=limits.tokens.per_minute,
            tokens_at_once=limits.tokens.at_once,
        )

    def learn_inputs_taken(self, model: str, inputs: int | None) -> None:
        """Notes how many texts a request of a model may have to be answered in time; None: any number."""
        self._learn(model, inputs_per_request=inputs)

    def learn_tokens_taken(self, model: str, tokens: int) -> bool:
        """Notes that a model takes texts of so many tokens and refused a longer one. Returns whether that is new."""
        return self._learn(model, tokens_per_input=tokens)

    def _learn(self, model: str, **limits: int | None) -> bool:
        [row] = self._run(
            "SELECT autoembed._learn($1, $2) AS is_new",
            ["pg_catalog.text", "pg_catalog.jsonb"],
            [model, json.dumps(limits)],
        )
        return bool(row["is_new"])

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

    def rows(self, pipeline: Pipeline, keys: Sequence[str], max_bytes: int) -> tuple[dict[str, Row], bool]:
        """The rows that exist, by key, up to about so many bytes of text; and whether these are all.

        RowError if the content function fails for one of them.
        """

        def read(seconds: float) -> Any:
            with self._owners_code(undone=True, seconds=seconds):
                return self._run_made(
                    f"SELECT c.* FROM autoembed._content_{pipeline.id}($1, $2, $3, $4) AS c",
                    ["pg_catalog.text[]", *["pg_catalog.int8"] * 3],
                    [list(keys), max_bytes, MAX_TEXT_BYTES, LONG_TEXT_BYTES],
                )

        rows = self._in_time(pipeline, keys, read, writes=False)
        texts: dict[str, bytearray] = defaultdict(bytearray)
        found: dict[Any, Row] = {}
        for row in rows:
            if row["key"] not in found:
                found[row["key"]] = _row(row)
            # A part is not held twice.
            if (part := row.pop("encoded")) is not None:
                texts[row["key"]] += part
                del part
        for key, encoded in texts.items():
            found[key] = replace(found[key], content=LongText(encoded))
        # A row without a key is the mark that rows are left.
        return found, found.pop(None, None) is None

    def split(self, pipeline: Pipeline, content: str) -> list[str | None]:
        """The pieces that a pipeline's function makes of a text. RowError if it fails."""
        rows: Any = []
        with self._owners_code(undone=True):
            rows = self._run_made(
                f"SELECT s.piece FROM autoembed._split_{pipeline.id}($1, $2, $3) AS s(piece)",
                ["pg_catalog.text", "pg_catalog.int4", "pg_catalog.int8"],
                [content, MAX_PIECES, MAX_TEXT_BYTES],
            )
        return [row["piece"] for row in rows]

    @staticmethod
    def literal(texts: Sequence[str]) -> str:
        """Texts as an array in a query."""
        return f"ARRAY[{', '.join(map(plpy.quote_literal, texts))}]::pg_catalog.text[]"

    def run_as_owner(self, table_id: str, query: str, max_seconds: float | None = None) -> str:
        """The rows of a query as a JSON array. As a table's owner; RowError if it fails or the caller has no right."""
        [table] = self._run(
            "SELECT c.relowner::pg_catalog.int8 AS owner, pg_catalog.pg_has_role(c.relowner, 'USAGE') AS owns"
            " FROM pg_catalog.pg_class AS c WHERE c.oid OPERATOR(pg_catalog.=) $1::pg_catalog.regclass",
            ["pg_catalog.text"],
            [table_id],
        )
        if not table["owns"]:
            raise RowError(f"must be owner of table {table_id}", sqlstate=INSUFFICIENT_PRIVILEGE)
        rows: Any = []
        seconds = CALLER_SECONDS if max_seconds is None else max_seconds
        with self._owners_code(undone=True, user=table["owner"], seconds=seconds):
            rows = plpy.execute(
                "SELECT coalesce(pg_catalog.jsonb_agg(pg_catalog.to_jsonb(q)), '[]')::pg_catalog.text AS found"
                f" FROM ({query}) AS q"
            )
        return str(rows[0]["found"])

    def run_statement_as_owner(self, table_id: str, statement: str) -> None:
        """Runs a statement as a table's owner; RowError if it fails or the caller cannot be the owner."""
        [table] = self._run(
            "SELECT c.relowner::pg_catalog.int8 AS owner, pg_catalog.pg_has_role(c.relowner, 'SET') AS may"
            " FROM pg_catalog.pg_class AS c WHERE c.oid OPERATOR(pg_catalog.=) $1::pg_catalog.regclass",
            ["pg_catalog.text"],
            [table_id],
        )
        if not table["may"]:
            raise RowError(f"must be able to be the owner of table {table_id}", sqlstate=INSUFFICIENT_PRIVILEGE)
        # The caller's deferred constraints stay deferred: the statement queues none.
        self._has_written = True
        with self._owners_code(user=table["owner"], seconds=CALLER_SECONDS):
            plpy.execute(statement)

    def plan(self, pipeline_id: int, max_seconds: float | None, failing: Sequence[str] = ()) -> None:
        """Has PostgreSQL plan the reading of a pipeline's texts; RowError if that fails.

        failing: rows for which the owner's code fails. If there are any, or if the pipeline is stopped, rows are read:
        RowError if it is the code that is at fault.
        """
        until = time.monotonic() + (CALLER_SECONDS if max_seconds is None else max_seconds)
        with self._owners_code(undone=True, seconds=_seconds_left(until)):
            self._run_made(f"SELECT FROM autoembed._content_{pipeline_id}('{{}}', 0, 0)")
        [tried] = self._run("SELECT t.* FROM autoembed._rows_to_try($1) AS t", ["pg_catalog.int4"], [pipeline_id])
        if failing or tried["is_stopped"]:
            others = [*tried["keys"], *self._some_keys(pipeline_id, until)]
            random.shuffle(others)
            least = 1 if tried["is_stopped"] else ALIKE_ROWS
            self._find_fault(pipeline_id, [*failing[:TRIED_ROWS], *others], tried["cuts"], least, until)

    def _some_keys(self, pipeline_id: int, until: float) -> list[str]:
        """The keys of a few rows, others each time."""
        condition = f"pg_catalog.random() OPERATOR(pg_catalog.<) {10.0 ** -random.randrange(4)}::pg_catalog.float8"
        rows: Any = []
        try:
            with self._owners_code(undone=True, seconds=_seconds_left(until)):
                rows = self._run_made(
                    f"SELECT s.key FROM autoembed._scan_{pipeline_id}(NULL, $1, $2, $3) AS s WHERE s.key IS NOT NULL",
                    ["pg_catalog.text", "pg_catalog.int4", "pg_catalog.int8"],
                    [condition, TRIED_ROWS, MAX_KEY_BYTES],
                )
        except RowError as error:
            if error.cancels:
                raise
        return [row["key"] for row in rows]

    def _find_fault(self, pipeline_id: int, keys: Sequence[str], cuts: bool, least: int, until: float) -> None:
        """RowError if the owner's code fails alike for so many of the rows, each read alone, and gives no text of any.

        cuts: the code cuts texts into chunks, too.
        """
        faults: dict[str, list[RowError]] = defaultdict(list)
        for key in dict.fromkeys(keys):
            try:
                if self._gives_text(pipeline_id, key, cuts, _seconds_left(until)):
                    return
            except RowError as error:
                if error.cancels or error.locked or error.slow and not faults:
                    raise
                if error.slow:
                    break
                if error.is_of_code:
                    faults[str(error)].append(error)
        most = max(faults.values(), key=len, default=[])
        if len(most) >= least:
            raise most[0]

    def _gives_text(self, pipeline_id: int, key: str, cuts: bool, seconds: float) -> bool:
        """Whether a row has a text; RowError if the owner's code fails for it, or runs too long."""
        texts: list[str] = []
        with self._owners_code(undone=True, seconds=seconds):
            rows = self._run_made(
                f"SELECT c.content FROM autoembed._content_{pipeline_id}($1, 0, $2) AS c",
                ["pg_catalog.text[]", "pg_catalog.int8"],
                [[key], TRIED_BYTES],
            )
            texts = [row["content"] for row in rows if row["content"]]
            if texts and cuts:
                self._run_made(
                    f"SELECT FROM autoembed._split_{pipeline_id}($1, $2, $3)",
                    ["pg_catalog.text", "pg_catalog.int4", "pg_catalog.int8"],
                    [texts[0], MAX_PIECES, MAX_TEXT_BYTES],
                )
        return bool(texts)

    def plan_again(self, pipeline_id: int, failing: Sequence[str] = ()) -> RowError | None:
        """Notes whether a pipeline's texts can still be read, as plan() finds. Returns a cancel that came meanwhile.

        If they cannot, the pipeline is blocked.
        """
        problem = None
        try:
            self.plan(pipeline_id, LOOK_SECONDS, failing)
        except RowError as error:
            if error.cancels:
                return error
            if error.locked or error.slow:
                return None
            problem = storable(str(error))
        with _left_if_locked():
            [row] = self._run(
                "SELECT autoembed._note_plan($1, $2) AS is_new",
                ["pg_catalog.int4", "pg_catalog.text"],
                [pipeline_id, problem],
            )
            if row["is_new"] and self._commits:
                self.warn_of_blocked_pipelines([])
        return None

    def digests(self, pipeline: Pipeline, keys: Sequence[str]) -> dict[str, Known]:
        """The records of these rows, by key."""
        rows = self._run(
            "SELECT d.* FROM autoembed._digests($1, $2) AS d",
            ["pg_catalog.int4", "pg_catalog.text[]"],
            [pipeline.id, list(keys)],
        )
        return {
            row["key"]: Known(row["digest"], row["vector_digest"], row["replaced"], row["age_seconds"]) for row in rows
        }

    def write(
        self,
        pipeline: Pipeline,
        keys: Sequence[str],
        text_digests: Sequence[bytes | None],
        versions: Sequence[str | None],
        vectors: np.ndarray | None,
    ) -> dict[str, Written]:
        """Writes the vectors (None: NULLs) of the rows whose text is still the same.

        text_digests: SHA-256 of the texts. versions: those of the rows that have these texts; None: not known. Returns
        what became of each key. RowError if a row does not take its vector; then none was written.
        """
        new = [None] * len(keys) if vectors is None else vectors
        rows = self._write(pipeline, keys, text_digests, ["pg_catalog.text[]"], [list(versions)], new)
        return {row["key"]: Written(row["outcome"], row["vector_digest"]) for row in rows}

    def write_chunks(
        self,
        pipeline: Pipeline,
        keys: Sequence[str],
        text_digests: Sequence[bytes | None],
        versions: Sequence[str | None],
        prefixes: Sequence[str],
        chunks: Sequence[Sequence[Chunk]],
        vectors: np.ndarray | None,
        *,
        numbers: range | None = None,
        is_last: bool = True,
    ) -> dict[str, Written]:
        """The same where embeddings are beside the rows. vectors: those of the chunks that are not kept, in order.

        prefixes: what the chunks of each row are embedded behind.
        numbers: those of the chunks of the only row; None: the chunks of each row count from 1. is_last: no further
        part of its chunks is to come.

        A row without chunks loses its embeddings.
        """
        described = [(key, chunk) for key, of_key in zip(keys, chunks, strict=True) for chunk in of_key]
        # The array of vectors ends where those begin that the row keeps.
        described.sort(key=lambda one: one[1].is_kept)
        firsts, lasts = [1] * len(keys), [len(of_key) for of_key in chunks]
        if numbers is not None:
            firsts, lasts = [numbers.start], [numbers.stop - 1]
        columns: list[list[Any] | None] = [
            [prefix or None for prefix in prefixes] if any(prefixes) else None,
            list(versions),
            firsts if is_last else None,
            lasts if is_last else None,
            [key for key, _ in described],
            [chunk.number for _, chunk in described],
            [chunk.source for _, chunk in described],
            [chunk.start for _, chunk in described],
            [chunk.end for _, chunk in described],
            [chunk.digest for _, chunk in described],
        ]
        new: np.ndarray | list[None] = [] if vectors is None or not len(vectors) else vectors
        rows = self._write(pipeline, keys, text_digests, CHUNK_COLUMNS, columns, new)
        digests = {key: digest_of_chunks([one.digest for one in own]) for key, own in zip(keys, chunks, strict=True)}
        return {row["key"]: Written(row["outcome"], digests[row["key"]], row["version"]) for row in rows}

    def _write(
        self,
        pipeline: Pipeline,
        keys: Sequence[str],
        text_digests: Sequence[bytes | None],
        types: Sequence[str],
        columns: Sequence[Sequence[Any] | None],
        vectors: np.ndarray | list[None],
    ) -> Any:
        """Calls a pipeline's function that writes.

        types, columns: its arguments between the model and the vectors.
        """
        with row_errors():
            stage = None if isinstance(vectors, list) else self._staged(pipeline, vectors)
        if stage is not None:
            embeddings, arguments = f"(SELECT pg_catalog.array_agg(s.v ORDER BY s.n) FROM {stage} AS s)", []
        else:
            embeddings = f"${len(types) + 4}::{pipeline.vector_type}[]"
            arguments = [vectors if isinstance(vectors, list) else literals(vectors)]
        placeholders = ", ".join(f"${number}" for number in range(1, len(types) + 4))

        def write(seconds: float) -> Any:
            with self._owners_code(seconds=seconds):
                return self._run_made(
                    f"SELECT w.* FROM autoembed._write_{pipeline.id}({placeholders}, {embeddings}) AS w",
                    [
                        "pg_catalog.text[]",
                        "pg_catalog.bytea[]",
                        "pg_catalog.text",
                        *types,
                        *["pg_catalog.text[]"] * len(arguments),
                    ],
                    [list(keys), list(text_digests), pipeline.model.identity, *columns, *arguments],
                )

        return self._in_time(pipeline, keys, write, writes=True)

    def _in_time(self, pipeline: Pipeline, keys: Sequence[str], run: Callable[[float], Any], *, writes: bool) -> Any:
        """Runs a statement for rows in the seconds of an owner's code; or in more, for one row without such code."""
        try:
            return run(OWNER_SECONDS)
        except RowError as error:
            if not error.slow or len(keys) > 1 or self.runs_owners_code(pipeline, writes=writes):
                raise
        return run(OWN_SECONDS)

    def runs_owners_code(self, pipeline: Pipeline, *, writes: bool) -> bool:
        """Whether code of the owner may run when texts are read, or, with writes, when embeddings are written."""
        sql = "SELECT autoembed._runs_owners_code($1, $2) AS runs"
        return bool(self._run(sql, ["pg_catalog.int4", "pg_catalog.bool"], [pipeline.id, writes])[0]["runs"])

    def pay_chunks(self, pipeline: Pipeline, key: str, chunks: Sequence[Chunk]) -> None:
        """Keeps the vectors of some chunks of a row until the row is written."""
        with row_errors():
            self._run(
                "SELECT autoembed._pay_chunks($1, $2, $3, $4)",
                ["pg_catalog.int4", "pg_catalog.text", *["pg_catalog.bytea[]"] * 2],
                [
                    pipeline.id,
                    key,
                    [chunk.digest for chunk in chunks],
                    [None if chunk.vector is None else chunk.vector.astype("<f4").tobytes() for chunk in chunks],
                ],
            )

    def paid_chunks(self, pipeline: Pipeline, key: str) -> set[bytes]:
        """The digests of the chunks of a row whose vectors are kept."""
        rows = self._run(
            "SELECT c.digest FROM autoembed._paid_chunks($1, $2) AS c(digest)",
            ["pg_catalog.int4", "pg_catalog.text"],
            [pipeline.id, key],
        )
        return {row["digest"] for row in rows}

    def paid_vectors(self, pipeline: Pipeline, key: str, digests: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The vectors that are kept of these chunks of a row, by their digests."""
        import numpy as np

        rows = self._run(
            "SELECT c.digest, c.vector FROM autoembed._paid_vectors($1, $2, $3) AS c",
            ["pg_catalog.int4", "pg_catalog.text", "pg_catalog.bytea[]"],
            [pipeline.id, key, list(digests)],
        )
        return {row["digest"]: np.frombuffer(row["vector"], "<f4") for row in rows}

    def try_write(
        self,
        pipeline: Pipeline,
        keys: Sequence[str],
        text_digests: Sequence[bytes | None],
        versions: Sequence[str | None],
    ) -> dict[str, str]:
        """Writes a vector of no meaning into these rows, and undoes that.

        Returns what would become of each key. RowError if a row would not take a vector.
        """
        vector = f"[1{',0' * (pipeline.model.dimensions - 1)}]"
        rows: Any = []
        with self._owners_code(undone=True, writes=True):
            rows = self._run_made(
                f"SELECT w.key, w.outcome FROM autoembed._write_{pipeline.id}($1, $2, $3, $4, pg_catalog.array_fill("
                f"$5::{pipeline.vector_type}, ARRAY[pg_catalog.cardinality($1)])) AS w",
                ["pg_catalog.text[]", "pg_catalog.bytea[]", "pg_catalog.text", "pg_catalog.text[]", "pg_catalog.text"],
                [list(keys), list(text_digests), pipeline.model.identity, list(versions), vector],
            )
        return {row["key"]: row["outcome"] for row in rows}

    def _staged(self, pipeline: Pipeline, vectors: np.ndarray) -> str | None:
        """The temporary table that holds the vectors in their order; None if this role may not COPY from a file."""
        may_have_rows = not self._commits or pipeline.vector_type in self._filled
        self._filled.add(pipeline.vector_type)
        rows = copy_rows(vectors, pipeline.vector_type.rpartition(".")[2].strip('"'))
        # A private file, in memory alone.
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
        self,
        pipeline: Pipeline,
        keys: Sequence[str],
        digests: Sequence[bytes],
        vector_digests: Sequence[bytes | None],
        truncated: Sequence[bool],
        *,
        written: bool,
    ) -> None:
        """Records the digests of texts and of their vectors. written: the vectors were written now."""
        with row_errors():
            self._run(
                "SELECT autoembed._record_embedded($1, $2, $3, $4, $5, $6)",
                [
                    "pg_catalog.int4",
                    "pg_catalog.text[]",
                    *["pg_catalog.bytea[]"] * 2,
                    "pg_catalog.bool[]",
                    "pg_catalog.bool",
                ],
                [pipeline.id, list(keys), list(digests), list(vector_digests), list(truncated), written],
            )

    def note_replaced(self, pipeline_id: int, keys: Sequence[str], *, echo: bool) -> None:
        """Records that somebody else has replaced the vectors of rows; echo: that a lane's write has changed them."""
        with row_errors():
            self._run(
                "SELECT autoembed._note_replaced($1, $2, $3)",
                ["pg_catalog.int4", "pg_catalog.text[]", "pg_catalog.bool"],
                [pipeline_id, list(keys), echo],
            )

    def forget(self, pipeline: Pipeline, keys: Sequence[str]) -> None:
        with row_errors():
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

    def forget_all(self, pipeline_id: int) -> bool:
        """Forgets some records of the rows that a truncated table had; whether none are left."""
        rows: Any = []
        with row_errors():
            rows = self._run("SELECT autoembed._forget_all($1) AS done", ["pg_catalog.int4"], [pipeline_id])
        return bool(rows[0]["done"])

    def queue_recorded(self, pipeline_id: int, after: str) -> None:
        """Queues the next rows of which something is recorded, behind this key."""
        self._run(
            "SELECT autoembed._queue_recorded($1, $2)", ["pg_catalog.int4", "pg_catalog.text"], [pipeline_id, after]
        )

    def fail(self, pipeline: Pipeline, key: str, reason: str, attempts: int, excerpt: Text | None) -> None:
        with row_errors():
            self._run(
                "SELECT autoembed._fail($1, $2, $3, $4, $5)",
                ["pg_catalog.int4", "pg_catalog.text", "pg_catalog.text", "pg_catalog.int4", "pg_catalog.text"],
                [pipeline.id, key, storable(reason), attempts, excerpt and excerpt[:200]],
            )

    @staticmethod
    def log(line: str) -> None:
        """Writes a line to the server's log alone."""
        plpy.log(line)

    def fail_message(self, body: Any, reason: str, attempts: int) -> None:
        self._run(
            "SELECT autoembed._fail_message($1, $2, $3)",
            ["pg_catalog.jsonb", "pg_catalog.text", "pg_catalog.int4"],
            [json.dumps(body), storable(reason), attempts],
        )


def is_installed() -> bool:
    return bool(
        plpy.execute("SELECT FROM pg_catalog.pg_extension AS e WHERE e.extname OPERATOR(pg_catalog.=) 'autoembed'")
    )


@contextmanager
def _left_if_locked() -> Iterator[None]:
    """Leaves out a statement that would wait for the transaction of another session. Nothing but a note is lost."""
    try:
        yield
    except plpy.SPIError as error:
        if sqlstate_of(error) not in (LOCK_NOT_AVAILABLE, OBJECT_IN_USE):
            raise


def _seconds_left(until: float) -> float:
    """The time until then for an owner's code, which a timer can measure."""
    return max(0.001, until - time.monotonic())


def storable(text: str) -> str:
    """A text that PostgreSQL takes: words of a provider may have half a surrogate pair, or a zero byte."""
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def _row(row: dict[str, Any]) -> Row:
    if "digests" not in row:
        return Row(
            row["content"],
            row["vector_digest"],
            row["bytes"] or 0,
            is_locked=bool(row["is_locked"]),
            own_key=row["own_key"],
            version=row["version"],
        )
    digests = row["digests"] or ()
    return Row(
        row["content"],
        digest_of_chunks(digests),
        row["bytes"] or 0,
        digests,
        row["numbers"] or (),
        prefix=row["prefix"] or "",
        own_key=row["own_key"],
        version=row["version"],
    )
