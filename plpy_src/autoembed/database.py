"""The one door to plpy: every statement that the Python side runs is a method here."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import plpy  # type: ignore[import-not-found]

from autoembed import search_text
from autoembed.binary import copy_rows, literals
from autoembed.bm25 import (
    MAX_MERGED_POSTINGS,
    Documents,
    Segment,
    StoredPosting,
    TermPostings,
    counts,
    joined,
    merged,
    most_dead,
    parts,
    plain_words,
    unpacked,
)
from autoembed.errors import (
    INSUFFICIENT_PRIVILEGE,
    LOCK_NOT_AVAILABLE,
    OBJECT_IN_USE,
    QUERY_CANCELED,
    Fault,
    PassEnded,
    ProviderTrouble,
    RowError,
    Trouble,
    is_nobodys,
    row_error,
    trouble_of_function,
)
from autoembed.kept import KeptTexts
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

# A failed statement raises this.
Error = plpy.SPIError
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
SLICE_SECONDS = 0.1
# The types of the arguments that describe chunks: prefixes, versions, first and last numbers of rows; keys, numbers,
# sources, starts, ends, digests.
CHUNK_COLUMNS = [
    *["pg_catalog.text[]"] * 2,
    *["pg_catalog.int4[]"] * 2,
    "pg_catalog.text[]",
    *["pg_catalog.int4[]"] * 4,
    "pg_catalog.bytea[]",
]

# Fractions stay text: a numeric key must come back with the same digits. json.loads() would make a decoder for each.
_decoded = json.JSONDecoder(parse_float=str).decode

_plans: dict[str, Any] = {}
# Plans of the queries of searches, which name tables, and have conditions and limits of callers.
_kept_plans: dict[str, Any] = {}
MAX_KEPT_PLANS = 50
# The vectors of search texts, by text, model and version of the table's facts: embed() looks up more.
_vectors = KeptTexts(1_000_000)
# The words of texts that wait to be indexed, by the version of the table's facts. Each search counts them.
_words = KeptTexts(4_000_000)
# The segments that searches of this session have read, without postings, by the OID of their table and their ids. A
# segment is never changed.
_segments: dict[tuple[int, int], Segment] = {}
# The documents of those of the last search, the ids of the segments, and where each starts.
_joined: dict[tuple[int, bytes], tuple[Documents, np.ndarray, np.ndarray]] = {}
# More documents of segments are not kept: 12 MB, and 16 MB for those of the last search.
MAX_KEPT_DOCUMENTS = 1_000_000


class TextIndex(NamedTuple):
    """What a search reads of the text index.

    terms: those of the query, and the number of their occurrences. documents: all of them. postings: those of the
    terms, as Scores() takes them. dead: ids of documents that count no more, ascending. messages: of rows that have
    changed since. of_rows: the documents of the rows that were asked for, as documents() tells them.
    """

    terms: dict[str, int]
    documents: Documents
    postings: dict[str, list[TermPostings]]
    dead: np.ndarray
    messages: list[Any]
    of_rows: dict[int, tuple[str, int]]


# The ids of the documents of pipeline $1 that count no more, ascending, 8 bytes each.
_DEAD_DOCUMENTS = (
    "SELECT pg_catalog.string_agg(pg_catalog.int8send(d.id), '' ORDER BY d.id) FROM autoembed.text_document AS d"
    " WHERE d.pipeline_id OPERATOR(pg_catalog.=) $1 AND NOT d.is_live"
)


class _Undo(Exception):
    """Rolls back a subtransaction whose result has been read."""


class Database:
    """The database as seen from a lane, which commits as it goes, or from a function, which cannot."""

    Error = Error

    def __init__(self, *, commits: bool) -> None:
        self._commits = commits
        # The vector types whose temporary tables may have rows. Each commit empties them.
        self._filled: set[str] = set()
        # When the functions of a pipeline are due to be looked at again.
        self._check_at: dict[int, float] = {}
        # When the time was last looked at between two steps.
        self._looked_at = 0.0
        self._has_written = False
        self._in_pass = commits
        # The pipelines of whose texts PostgreSQL did not tell the words in time.
        self._slow_words: set[int] = set()
        self._reporter: Reporter | None = None
        self._texts: tuple[int, int] | None = None

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
        if interrupt_is_pending() or now - self._looked_at > SLICE_SECONDS:
            self._looked_at = now
            self.check_interrupts()

    def sleep(self, seconds: float) -> None:
        """Waits, while other threads may run. A cancel, a timeout or a shutdown ends the wait."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not interrupt_is_pending():
            time.sleep(SLICE_SECONDS)
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
        self,
        pipeline_id: int,
        keys: Sequence[str],
        attempts: int,
        *,
        read_count: int = 0,
        delay_seconds: float = 0.0,
        suspect: bool = False,
    ) -> None:
        """Queues rows in one message. read_count: how often it counts as read before. suspect: see Address."""
        self._run(
            "SELECT autoembed._requeue($1, $2, $3, $4, $5, $6)",
            [
                "pg_catalog.int4",
                "pg_catalog.jsonb",
                *["pg_catalog.int4"] * 2,
                "pg_catalog.float8",
                "pg_catalog.bool",
            ],
            [pipeline_id, f"[{','.join(keys)}]", attempts, read_count, delay_seconds, suspect],
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
            rows = self._run(
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
        return [Message(row["message_id"], row["read_count"], _body(row["message"])) for row in rows]

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
            if run.session_timed_out and _sqlstate(error) == QUERY_CANCELED:
                raise
            raise row_error(_sqlstate(error), str(error), timed_out=run.timed_out) from error
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

    def take_permit(self, model: str, charges: Sequence[Charge | None], *, with_slot: bool) -> Permit:
        """A permit for one more request of a model. To be committed at once where that is possible."""
        [row] = self._run(
            "SELECT p.* FROM autoembed._take_permit($1, $2, $3, $4, $5, $6, $7) AS p",
            ["pg_catalog.text", "pg_catalog.bool", "pg_catalog.bool", *["pg_catalog.float8"] * 4],
            [model, self._commits, with_slot, *(value for charge in charges for value in charge or (None, None))],
        )
        wait = row["wait_seconds"]
        at = None if wait is None else time.monotonic() + wait
        return Permit(at, row["slot"], row["spent"], row["rest_seconds"] or 0.0)

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
        self._run(
            "SELECT autoembed._learn_limits($1, $2, $3, $4, $5)",
            ["pg_catalog.text", *["pg_catalog.int4"] * 4],
            [model, *limits.requests, *limits.tokens],
        )

    def learn_inputs_taken(self, model: str, inputs: int | None) -> None:
        """Notes how many texts a request of a model may have to be answered in time; None: any number."""
        self._run(
            "SELECT autoembed._learn_inputs_taken($1, $2)", ["pg_catalog.text", "pg_catalog.int4"], [model, inputs]
        )

    def learn_tokens_taken(self, model: str, tokens: int) -> bool:
        """Notes that a model takes texts of so many tokens and refused a longer one. Returns whether that is new."""
        [row] = self._run(
            "SELECT autoembed._learn_tokens_taken($1, $2) AS is_new",
            ["pg_catalog.text", "pg_catalog.int4"],
            [model, tokens],
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
                return self._run(
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
            rows = self._run(
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
            self._run(f"SELECT FROM autoembed._content_{pipeline_id}('{{}}', 0, 0)")
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
                rows = self._run(
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
            rows = self._run(
                f"SELECT c.content FROM autoembed._content_{pipeline_id}($1, 0, $2) AS c",
                ["pg_catalog.text[]", "pg_catalog.int8"],
                [[key], TRIED_BYTES],
            )
            texts = [row["content"] for row in rows if row["content"]]
            if texts and cuts:
                self._run(
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
                return self._run(
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
            if not error.slow or len(keys) > 1:
                raise
            sql = "SELECT autoembed._runs_owners_code($1, $2) AS runs"
            if self._run(sql, ["pg_catalog.int4", "pg_catalog.bool"], [pipeline.id, writes])[0]["runs"]:
                raise
        return run(OWN_SECONDS)

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
            rows = self._run(
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

    def note_replaced(self, pipeline_id: int, keys: Sequence[str]) -> None:
        """Records that somebody else has replaced the vectors of rows."""
        with row_errors():
            self._run(
                "SELECT autoembed._note_replaced($1, $2)",
                ["pg_catalog.int4", "pg_catalog.text[]"],
                [pipeline_id, list(keys)],
            )

    def forget(self, pipeline: Pipeline, keys: Sequence[str]) -> None:
        with row_errors():
            self._run(
                "SELECT autoembed._forget($1, $2)", ["pg_catalog.int4", "pg_catalog.text[]"], [pipeline.id, list(keys)]
            )

    # The text index ------------------------------------------------------------------------------

    def unindexed(self, pipeline: Pipeline, keys: Sequence[str]) -> set[str]:
        """The keys of the rows that have no text in the text index."""
        [row] = self._run(
            "SELECT autoembed._unindexed($1, $2) AS keys",
            ["pg_catalog.int4", "pg_catalog.text[]"],
            [pipeline.id, list(keys)],
        )
        return set(row["keys"])

    def index_texts(
        self, pipeline: Pipeline, keys: Sequence[str], digests: Sequence[bytes], texts: Sequence[tuple[int, int, str]]
    ) -> None:
        """Puts texts into the text index, where the record of a row has this digest.

        texts: the place of the row's key, counted from 1; the number of the chunk; and its text or a part of it.
        Texts of which PostgreSQL cannot tell the words in time are indexed by plain words, or without any.
        """
        rows, numbers, cut = zip(*texts, strict=True)
        known = [list(keys), list(digests), list(rows), list(numbers)]
        if pipeline.id not in self._slow_words and self._has_indexed(pipeline, known, cut):
            return
        self._slow_words.add(pipeline.id)
        if not self._has_indexed(pipeline, known, [plain_words(text) for text in cut]):
            self._has_indexed(pipeline, known, [""] * len(cut))

    def _has_indexed(self, pipeline: Pipeline, known: Sequence[Any], texts: Sequence[str]) -> bool:
        """Puts texts into the text index, if PostgreSQL tells their words in time. Returns whether it did."""
        run = Run()
        try:
            with plpy.subtransaction(), restricted(OWNER_SECONDS) as run:
                self._run(
                    "SELECT autoembed._index_texts($1, $2, $3, $4, $5, $6)",
                    [
                        "pg_catalog.int4",
                        "pg_catalog.text[]",
                        "pg_catalog.bytea[]",
                        *["pg_catalog.int4[]"] * 2,
                        "pg_catalog.text[]",
                    ],
                    [pipeline.id, *known, list(texts)],
                )
        except plpy.SPIError as error:
            if _sqlstate(error) == QUERY_CANCELED and run.timed_out and not run.session_timed_out:
                return False
            if is_nobodys(_sqlstate(error)):
                raise
            raise row_error(_sqlstate(error), str(error)) from error
        return True

    def merge_segments(self, *, dedicated: bool = False) -> bool:
        """Merges some segments of the text index, if it has too many, or many dead documents. Returns whether it did.

        dedicated: the caller is a lane for backfills alone. While there is one, no other lane merges.
        """
        try:
            with row_errors(), plpy.subtransaction():
                return self._merge_segments(dedicated=dedicated)
        except RowError as error:
            # The pipeline may be ended meanwhile. The next round tries again.
            if not (error.locked or error.may_pass):
                raise
            return False

    def _merge_segments(self, *, dedicated: bool) -> bool:
        [task] = self._run(
            "SELECT s.* FROM autoembed._segments_to_merge($1, $2) AS s",
            ["pg_catalog.bool", "pg_catalog.int4"],
            [dedicated, MAX_MERGED_POSTINGS],
        )
        ids, pipeline_id = task["segments"] or [], task["pipeline_id"]
        if len(ids) < (1 if task["many_are_dead"] else 2):
            return False
        import numpy as np

        which = ("s.id OPERATOR(pg_catalog.=) ANY ($1)", ["pg_catalog.int8[]"])
        with as_role(self._texts_table()[1]):
            dead = self._dead_documents(pipeline_id)
            if task["many_are_dead"]:
                posting_counts = dict(zip(ids, task["postings"], strict=True))
                ids = most_dead(self._segments(*which, [ids]), dead, posting_counts)
            segments = self._segments(*which, [ids])
            postings = self._postings(ids)
        if not segments:
            return False
        new, new_postings = merged(segments, postings, dead)
        gone = np.intersect1d(np.concatenate([segment.documents for segment in segments.values()]), dead)
        self._run(
            "SELECT autoembed._replace_segments($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            [
                "pg_catalog.int4",
                "pg_catalog.int8[]",
                "pg_catalog.int4",
                *["pg_catalog.bytea"] * 2,
                "pg_catalog.text[]",
                *["pg_catalog.bytea[]"] * 2,
                "pg_catalog.int8[]",
            ],
            [
                pipeline_id,
                list(ids),
                len(new.documents),
                new.documents.astype(">i8").tobytes(),
                new.lengths.astype(">i4").tobytes(),
                [posting.term for posting in new_postings],
                [posting.ordinals for posting in new_postings],
                [posting.levels for posting in new_postings],
                gone.tolist(),
            ],
        )
        return True

    def text_index(self, pipeline_id: int, words: str, keys: Sequence[str], max_messages: int) -> TextIndex:
        """The text index as a search for these words sees it. The caller's rights are not asked for.

        keys: the rows whose documents are wanted.
        """
        table, owner = self._texts_table()
        with as_role(owner):
            [row] = self._run(
                "SELECT (SELECT pg_catalog.string_agg(pg_catalog.int8send(s.id), '' ORDER BY s.id)"
                " FROM autoembed.text_segment AS s WHERE s.pipeline_id OPERATOR(pg_catalog.=) $1) AS segments,"
                f" ({_DEAD_DOCUMENTS}) AS dead",
                ["pg_catalog.int4"],
                [pipeline_id],
            )
            documents, segments, starts = self._joined_segments(table, row["segments"] or b"")
            terms, postings = self._terms_and_postings(pipeline_id, words, segments, starts)
            return TextIndex(
                terms,
                documents,
                postings,
                _numbers(row["dead"] or b"", ">i8"),
                self._outstanding(pipeline_id, max_messages),
                self._documents_of(pipeline_id, keys),
            )

    def _terms_and_postings(
        self, pipeline_id: int, words: str, segments: np.ndarray, starts: np.ndarray
    ) -> tuple[dict[str, int], dict[str, list[TermPostings]]]:
        """The terms in a query, the number of their occurrences, and their postings in these segments."""
        import numpy as np

        rows = self._run(
            # The postings of many segments are few values. A value takes Python as long as a small posting.
            "SELECT t.term, t.occurrences, p.segments, p.sizes, p.ordinals, p.levels FROM ("
            'SELECT w.lexeme COLLATE pg_catalog."C" AS term,'
            " coalesce(pg_catalog.cardinality(w.positions), 1) AS occurrences"
            " FROM ROWS FROM (pg_catalog.unnest(pg_catalog.to_tsvector(autoembed._text_config($1), $2))) AS w"
            ") AS t LEFT JOIN LATERAL ("
            "SELECT pg_catalog.string_agg(pg_catalog.int8send(p.segment_id), '' ORDER BY p.segment_id) AS segments,"
            " pg_catalog.string_agg(pg_catalog.int4send(pg_catalog.octet_length(p.levels)), ''"
            " ORDER BY p.segment_id) AS sizes,"
            " pg_catalog.string_agg(p.ordinals, '' ORDER BY p.segment_id) AS ordinals,"
            " pg_catalog.string_agg(p.levels, '' ORDER BY p.segment_id) AS levels"
            " FROM autoembed.text_posting AS p"
            " WHERE p.segment_id OPERATOR(pg_catalog.=) ANY ($3) AND p.term OPERATOR(pg_catalog.=) t.term"
            " GROUP BY p.ordinals OPERATOR(pg_catalog.=) ''::pg_catalog.bytea"
            ") AS p ON true",
            ["pg_catalog.int4", "pg_catalog.text", "pg_catalog.int8[]"],
            [pipeline_id, words, segments.tolist()],
        )
        postings: dict[str, list[TermPostings]] = {}
        for row in rows:
            if row["segments"] is not None:
                places = np.searchsorted(segments, _numbers(row["segments"], ">i8"))
                posting = unpacked(row["ordinals"], row["levels"])
                of_term = TermPostings(starts[places], _numbers(row["sizes"], ">i4"), *posting)
                postings.setdefault(row["term"], []).append(of_term)
        return {row["term"]: row["occurrences"] for row in rows}, postings

    def _joined_segments(self, table: int, ids: bytes) -> tuple[Documents, np.ndarray, np.ndarray]:
        """The documents of segments, the ids of these, and where each starts. ids: ascending, 8 bytes each."""
        import numpy as np

        key = (table, ids)
        if key not in _joined:
            segments = _numbers(ids, ">i8")
            missing = [number for number in segments.tolist() if (table, number) not in _segments]
            found = self._segments("s.id OPERATOR(pg_catalog.=) ANY ($1)", ["pg_catalog.int8[]"], [missing])
            _segments.update(((table, number), segment) for number, segment in found.items())
            parts = [_segments[table, number] for number in segments.tolist()]
            _joined.clear()
            starts = np.cumsum([0, *(len(segment.documents) for segment in parts)])[:-1]
            _joined[key] = joined(parts), segments, starts
            _forget_segments(table, segments.tolist())
        return _joined[key]

    def _outstanding(self, pipeline_id: int, max_messages: int) -> list[Any]:
        """The messages of a pipeline in the queue, the newest first, and its failed rows as messages.

        One more than max_messages of either: there are more.
        """
        rows = self._run(
            "(SELECT q.message FROM autoembed._job AS q WHERE q.pipeline OPERATOR(pg_catalog.=) $1::pg_catalog.text"
            " ORDER BY q.due_at DESC LIMIT $2)"
            " UNION ALL (SELECT pg_catalog.jsonb_build_object('keys', ARRAY[f.key::pg_catalog.jsonb])"
            " FROM autoembed.failure AS f WHERE f.pipeline_id OPERATOR(pg_catalog.=) $1 LIMIT $2)",
            ["pg_catalog.int4", "pg_catalog.int4"],
            [pipeline_id, max_messages + 1],
        )
        return [_body(row["message"]) for row in rows]

    def present_texts(self, query: str, keys: Sequence[str], max_bytes: int) -> list[tuple[str, str]]:
        """The keys and present texts of these rows, read with the rights of the caller, up to max_bytes in all."""
        rows = self._run(query, ["pg_catalog.text[]", "pg_catalog.int8"], [list(keys), max_bytes])
        return [(row["key"], row["content"]) for row in rows if row["content"] and row["content"].strip()]

    def words_of(
        self, target: dict[str, Any], texts: Sequence[str], terms: Collection[str]
    ) -> list[tuple[int, dict[str, int]]]:
        """The number of words in each text, and how often it has which of these terms."""
        known = {text: _words.get((target["version"], text)) for text in texts}
        missing = [text for text, words in known.items() if words is None]
        if missing:
            for text, words in self._words_of(target["pipeline_id"], missing).items():
                known[text] = words
                _words.keep((target["version"], text), words)
        return [counts(words or "", terms) for words in map(known.get, texts)]

    def _words_of(self, pipeline_id: int, texts: Sequence[str]) -> dict[str, str]:
        """The words of texts, as counts() takes them."""
        cut = [(place, part) for place, text in enumerate(texts) for part in parts(text)]
        with as_role(self._texts_table()[1]):
            rows = self._run(
                "SELECT pg_catalog.concat_ws(' ', pg_catalog.sum(t.length), pg_catalog.string_agg(t.words, ' '))"
                " AS words FROM (SELECT t.place, w.words::pg_catalog.text, (SELECT"
                " pg_catalog.sum(coalesce(pg_catalog.cardinality(l.positions), 1))"
                " FROM ROWS FROM (pg_catalog.unnest(w.words)) AS l) AS length"
                " FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS t(place, part),"
                " autoembed._text_config($1) AS c(config), pg_catalog.to_tsvector(c.config, t.part) AS w(words)"
                " ) AS t GROUP BY t.place ORDER BY t.place",
                ["pg_catalog.int4", "pg_catalog.int4[]", "pg_catalog.text[]"],
                [pipeline_id, [place for place, _ in cut], [part for _, part in cut]],
            )
        return {text: row["words"] for text, row in zip(texts, rows, strict=True)}

    def documents(self, ids: Sequence[int]) -> dict[int, tuple[str, int]]:
        """The key and the number of the chunk of documents. The caller's rights are not asked for."""
        if not ids:
            return {}
        with as_role(self._texts_table()[1]):
            rows = self._run(
                "SELECT d.id, d.key, d.chunk_number FROM autoembed.text_document AS d"
                " WHERE d.id OPERATOR(pg_catalog.=) ANY ($1)",
                ["pg_catalog.int8[]"],
                [list(ids)],
            )
        return {row["id"]: (row["key"], row["chunk_number"]) for row in rows}

    def documents_of(self, pipeline_id: int, keys: Sequence[str]) -> dict[int, tuple[str, int]]:
        """The same of the documents of these rows."""
        with as_role(self._texts_table()[1]):
            return self._documents_of(pipeline_id, keys)

    def _documents_of(self, pipeline_id: int, keys: Sequence[str]) -> dict[int, tuple[str, int]]:
        if not keys:
            return {}
        rows = self._run(
            "SELECT d.id, d.key, d.chunk_number FROM autoembed.text_document AS d"
            " WHERE d.pipeline_id OPERATOR(pg_catalog.=) $1 AND d.is_live"
            " AND d.key OPERATOR(pg_catalog.=) ANY ($2)"
            " AND pg_catalog.hashtextextended(d.key, 0) OPERATOR(pg_catalog.=) ANY (ARRAY("
            'SELECT pg_catalog.hashtextextended(k.key COLLATE pg_catalog."C", 0)'
            " FROM pg_catalog.unnest($2) AS k(key)))",
            ["pg_catalog.int4", "pg_catalog.text[]"],
            [pipeline_id, list(keys)],
        )
        return {row["id"]: (row["key"], row["chunk_number"]) for row in rows}

    def search_target(self, table_id: str, embedding_column: str | None) -> dict[str, Any]:
        """The facts that a search needs: the columns of autoembed._search_target(), and some of this search.

        These are pipeline_id, table_oid, vectors_oid, version, and has_policies: whether policies may hide rows from
        the caller. An error for a caller without the rights to all columns: a search that finds nothing would tell
        which words no text has.
        """
        [searched] = self._run(
            "SELECT s.*, s.table_id::pg_catalog.oid::pg_catalog.int8 AS table_oid,"
            " s.vectors_table::pg_catalog.oid::pg_catalog.int8 AS vectors_oid,"
            " pg_catalog.row_security_active(s.table_id) AS has_policies,"
            " pg_catalog.has_table_privilege(s.table_id, 'SELECT') AS may_read,"
            " pg_catalog.current_setting('transaction_isolation') AS isolation"
            " FROM autoembed._searched($1::pg_catalog.regclass, $2) AS s",
            ["pg_catalog.text", "pg_catalog.name"],
            [table_id, embedding_column],
        )
        if not searched["may_read"]:
            # PostgreSQL knows the rights to columns, and names what is missing.
            plpy.execute(f"SELECT ROW(t.*) IS NULL FROM {searched['table_id']} AS t LIMIT 0")
        query = (
            f"SELECT autoembed._lasting_target({searched['pipeline_id']}, {plpy.quote_literal(searched['version'])})"
            f" AS facts FROM (SELECT) AS one LEFT JOIN ONLY {searched['table_id']} AS t ON false"
            f" LEFT JOIN ONLY {searched['vectors_table']} AS e ON false"
        )
        # An older snapshot has facts of before a change that PostgreSQL has told of already.
        lasts = searched["isolation"] == "read committed"
        [row] = plpy.execute(_kept_plan(query, []) if lasts else query)
        facts = _facts(row["facts"])
        if lasts and not facts["lasts"]:
            del _kept_plans[query]
        own = ("pipeline_id", "table_oid", "vectors_oid", "version", "has_policies")
        return {**facts, **{name: searched[name] for name in own}}

    def has_names(self, target: dict[str, Any]) -> bool:
        """Whether the tables of search_target() have their names yet: a lock on them lets a schema be renamed."""
        [row] = self._run(
            "SELECT pg_catalog.to_regclass($1)::pg_catalog.oid::pg_catalog.int8 AS table_oid,"
            " pg_catalog.to_regclass($2)::pg_catalog.oid::pg_catalog.int8 AS vectors_oid",
            ["pg_catalog.text", "pg_catalog.text"],
            [target["table_id"], target["vectors_table"]],
        )
        return all(row[name] == target[name] for name in ("table_oid", "vectors_oid"))

    def near(self, query: str, vector_type: str, vector: str) -> list[tuple[str, float, int | None]]:
        """The keys, distances and chunks of a query that a search asks. It runs with the rights of the caller."""
        rows = plpy.execute(_kept_plan(query, [vector_type]), [vector])
        return [(row["key"], row["distance"], row["number"]) for row in rows]

    def distances(
        self, query: str, vector_type: str, vector: str, keys: Sequence[str]
    ) -> list[tuple[str, float, int | None]]:
        """The same of rows with these keys."""
        rows = self._run(query, [vector_type, "pg_catalog.text[]"], [vector, list(keys)])
        return [(row["key"], row["distance"], row["number"]) for row in rows]

    def embed(self, content: str, target: dict[str, Any]) -> str:
        """The vector of a search text, as SQL writes it."""
        search = (content, target["model"], target["version"])
        vector = _vectors.get(search)
        search_text.was_kept = vector is not None
        if vector is None:
            [row] = self._run(
                "SELECT autoembed.embed($1, $2) AS vector",
                ["pg_catalog.text", "pg_catalog.text"],
                [content, target["model"]],
            )
            vector = str(row["vector"])
            _vectors.keep(search, vector)
        return vector

    def go_on_by_index(self) -> None:
        """Has a vector index give as many rows as are asked for, whatever conditions leave out, for this function."""
        self._run("SELECT pg_catalog.set_config('hnsw.iterative_scan', 'strict_order', true)")

    def print_no_plans(self) -> None:
        """Keeps plans from a caller who may not read all that they look up, for this function."""
        self._run("SELECT pg_catalog.set_config('debug_print_plan', 'off', true)")

    def set_ef_search(self, ef_search: int) -> None:
        """Has a vector index keep so many candidates, for this function."""
        self._run(
            "SELECT pg_catalog.set_config('hnsw.ef_search', $1::pg_catalog.text, true)",
            ["pg_catalog.int4"],
            [ef_search],
        )

    def visible(
        self, query: str, vector_type: str, keys: Sequence[str], numbers: Sequence[int], vector: str | None
    ) -> dict[int, tuple[str, float | None]]:
        """Which of these chunks the caller may read: by their places from 0, the keys as search() writes them.

        With their distances to the vector, if there is one.
        """
        types = ["pg_catalog.text[]", "pg_catalog.int4[]", vector_type]
        rows = self._run(query, types, [list(keys), list(numbers), vector])
        return {row["place"] - 1: (row["key"], row["distance"]) for row in rows}

    def matching(self, query: str, keys: Sequence[str]) -> set[str]:
        """Which of these rows fulfil the condition of a search. It runs with the rights of the caller."""
        return {row["key"] for row in plpy.execute(plpy.prepare(query, ["pg_catalog.text[]"]), [list(keys)])}

    def keys(self, query: str) -> list[str]:
        """The keys of the rows that fulfil the condition of a search. It runs with the rights of the caller."""
        return [row["key"] for row in plpy.execute(query)]

    def estimated_matches(self, target: dict[str, Any], condition: str | None) -> tuple[float | None, float]:
        """About how many rows fulfil a condition and may be read by the caller, and what it costs to find these.

        None: nobody knows. The cost is in PostgreSQL's units, and 0 if all rows fulfil it.
        """
        rows: float | None = target["row_count"]
        if condition is None and not target["has_policies"]:
            return rows if rows is not None and rows >= 0 else None, 0.0
        [row] = self._run(
            "SELECT e.matches, e.cost FROM autoembed._estimated_matches($1::pg_catalog.regclass, $2) AS e",
            ["pg_catalog.text", "pg_catalog.text"],
            [target["table_id"], condition],
        )
        return row["matches"], row["cost"]

    def own_id(self) -> int:
        """The OID of the database."""
        [row] = self._run(
            "SELECT d.oid::pg_catalog.int8 AS id FROM pg_catalog.pg_database AS d"
            " WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()"
        )
        return int(row["id"])

    def pipelines_seen(self, pipelines: Sequence[tuple[int, int]]) -> list[dict[str, bool]]:
        """Whether each of these pipelines, with the OID of its table, exists, and is one that the caller may see."""
        rows = self._run(
            "SELECT autoembed._is_pipeline_of(p.id, p.table_id::pg_catalog.oid) AS exists,"
            " autoembed._may_see(p.table_id::pg_catalog.oid::pg_catalog.regclass) AS seen,"
            " autoembed._owns(p.table_id::pg_catalog.oid::pg_catalog.regclass) AS owned"
            " FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) WITH ORDINALITY AS p(id, table_id, number)"
            " ORDER BY p.number",
            ["pg_catalog.int4[]", "pg_catalog.int8[]"],
            [[one for one, _ in pipelines], [table for _, table in pipelines]],
        )
        return [dict(row) for row in rows]

    def _texts_table(self) -> tuple[int, int]:
        """The OID of a table of the text index, and of the role that owns them."""
        # A lane may live longer than an owner is one.
        if self._texts is None or self._commits:
            [row] = self._run(
                "SELECT c.oid::pg_catalog.int8 AS id, c.relowner::pg_catalog.int8 AS owner"
                " FROM pg_catalog.pg_class AS c"
                " WHERE c.oid OPERATOR(pg_catalog.=) 'autoembed.text_segment'::pg_catalog.regclass"
            )
            self._texts = int(row["id"]), int(row["owner"])
        return self._texts

    def _segments(self, which: str, types: Sequence[str], arguments: Sequence[Any]) -> dict[int, Segment]:
        rows = self._run(
            f"SELECT s.id, s.documents, s.lengths FROM autoembed.text_segment AS s WHERE {which} ORDER BY s.id",
            types,
            arguments,
        )
        return {
            row["id"]: Segment(_numbers(row["documents"], ">i8"), _numbers(row["lengths"], ">i4"), {}) for row in rows
        }

    def _postings(self, segments: Sequence[int]) -> list[StoredPosting]:
        rows = self._run(
            "SELECT p.segment_id, p.term, p.ordinals, p.levels FROM autoembed.text_posting AS p"
            " WHERE p.segment_id OPERATOR(pg_catalog.=) ANY ($1)",
            ["pg_catalog.int8[]"],
            [list(segments)],
        )
        return [StoredPosting(row["segment_id"], row["term"], row["ordinals"], row["levels"]) for row in rows]

    def _dead_documents(self, pipeline_id: int) -> np.ndarray:
        [row] = self._run(f"SELECT ({_DEAD_DOCUMENTS}) AS ids", ["pg_catalog.int4"], [pipeline_id])
        return _numbers(row["ids"] or b"", ">i8")

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

    @staticmethod
    def fault_of(error: Exception) -> Fault:
        """An error of a statement, Error, for SQL to raise."""
        # (number, detail, hint, …), if PostgreSQL told more than a message.
        told = getattr(error, "spidata", None) or (None, None, None)
        return Fault(str(error), hint=told[2] or "", errcode=_sqlstate(error))

    @staticmethod
    def is_nobodys(error: Exception) -> bool:
        """Whether an error of a statement, Error, is a cancel, a shutdown or a shortage of the server."""
        return is_nobodys(_sqlstate(error))

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

    def _run(self, sql: str, types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> Any:
        plan = _plans.get(sql)
        if plan is None:
            plan = _plans[sql] = plpy.prepare(sql, list(types))
        return plpy.execute(plan, list(arguments))


@lru_cache(maxsize=MAX_KEPT_PLANS)
def _facts(text: str) -> dict[str, Any]:
    """The facts of autoembed._lasting_target(), to be read only."""
    return json.loads(text)  # type: ignore[no-any-return]


def _kept_plan(query: str, types: Sequence[str]) -> Any:
    """The plan of one of the queries that the session has used last."""
    plan = _kept_plans.pop(query, None) or plpy.prepare(query, list(types))
    # The last one is the one that was used last.
    _kept_plans[query] = plan
    if len(_kept_plans) > MAX_KEPT_PLANS:
        del _kept_plans[next(iter(_kept_plans))]
    return plan


def _forget_segments(table: int, ids: Collection[int]) -> None:
    """Forgets segments once they are too many: all but these, or all."""
    for kept in (set(ids), set()):
        if sum(len(segment.documents) for segment in _segments.values()) <= MAX_KEPT_DOCUMENTS:
            break
        for place in [place for place in _segments if place[0] != table or place[1] not in kept]:
            del _segments[place]


def is_installed() -> bool:
    return bool(
        plpy.execute("SELECT FROM pg_catalog.pg_extension AS e WHERE e.extname OPERATOR(pg_catalog.=) 'autoembed'")
    )


@contextmanager
def row_errors() -> Iterator[None]:
    """Makes a RowError of the error of one statement, unless it is nobody's fault. That statement is rolled back."""
    try:
        yield
    except plpy.SPIError as error:
        if is_nobodys(_sqlstate(error)):
            raise
        raise row_error(_sqlstate(error), str(error)) from error


@contextmanager
def _left_if_locked() -> Iterator[None]:
    """Leaves out a statement that would wait for the transaction of another session. Nothing but a note is lost."""
    try:
        yield
    except plpy.SPIError as error:
        if _sqlstate(error) not in (LOCK_NOT_AVAILABLE, OBJECT_IN_USE):
            raise


def _seconds_left(until: float) -> float:
    """The time until then for an owner's code, which a timer can measure."""
    return max(0.001, until - time.monotonic())


def _sqlstate(error: Exception) -> str:
    # An SQLSTATE that PostgreSQL does not know leaves the attribute out.
    return getattr(error, "sqlstate", None) or "XX000"


def storable(text: str) -> str:
    """A text that PostgreSQL takes: words of a provider may have half a surrogate pair, or a zero byte."""
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def _numbers(data: bytes, form: str) -> np.ndarray:
    """Numbers that SQL has put together."""
    import numpy as np

    return np.frombuffer(data, form).astype(form[1:])


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


def _body(message: str | None) -> Any:
    return None if message is None else _decoded(message)
