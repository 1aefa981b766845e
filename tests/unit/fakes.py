"""In-memory stand-ins for the database, the network and a provider, as the path of a job sees them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoembed.errors import RanTooLong, Refused, RowError, Trouble
from autoembed.limits import Charge, Limits, Permit
from autoembed.long_text import Text
from autoembed.model import Embedded, Model, Request, Share
from autoembed.network import Network
from autoembed.records import MAX_TEXT_BYTES, Backfill, Known, Message, Pipeline, Row, Written

if TYPE_CHECKING:
    # mypy compares the fake's methods with the real ones. Inside a test they cannot be imported: they need plpy.
    from autoembed.database.lanes import Database
else:
    Database = object

Vector = NDArray[np.float32]


def identified(model: Model) -> Model:
    """The model with the identity that SQL gives it."""
    parts = [model.provider, model.model_id, model.dimensions, model.prefix("document")]
    return replace(model, identity=json.dumps(parts))


MODEL = identified(Model("small", "fake", "fake-small", 3))
PIPELINE = Pipeline(
    id=1,
    schema_name="public",
    table_name="documents",
    owner=10,
    content_function="embedding_input",
    embedding_column="embedding",
    vector_type="public.halfvec",
    truncate=True,
    blocked=None,
    failures=0,
    model=MODEL,
)


class Cancelled(BaseException):
    """The database's error when somebody cancels the query."""


class StatementError(Exception):
    """The database's error when a statement fails. nobodys: by no row's fault."""

    def __init__(self, message: str, *, nobodys: bool = False) -> None:
        super().__init__(message)
        self.nobodys = nobodys


@dataclass(frozen=True)
class Failure:
    reason: str
    attempts: int
    excerpt: str | None


@dataclass(frozen=True)
class Rest:
    model: str
    seconds: float
    needs_attention: bool
    reason: str
    summary: str = Trouble.summary


def key_of(row_id: int) -> str:
    return f"[{row_id}]"


def vector_of(text: str) -> Vector:
    """Three whole numbers that follow from the text."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:3], np.uint8).astype(np.float32)


def vectors_of(texts: Sequence[str]) -> Vector:
    return np.stack([vector_of(text) for text in texts])


def digest_of(vector: list[float] | None) -> bytes | None:
    return None if vector is None else repr(vector).encode()


class FakeDatabase(Database):
    """One table, the queue and the failed list; delays are noted, not waited for.

    The faults: content_errors, write_errors and settle_errors by key; locked, how many writes find a row locked;
    skipped, the rows that a trigger leaves out of a write; bad_texts, parts of texts that an SQL function refuses;
    fail_error, of the failed list; interrupts, called whenever the method of that name is.
    """

    Error = StatementError

    def __init__(self) -> None:
        self.defined = {1: PIPELINE}
        self.texts: dict[str, str | None] = {}
        self.vectors: dict[str, list[float] | None] = {}
        self.embedded: dict[str, tuple[bytes, bool]] = {}
        self.vector_digests: dict[str, bytes] = {}
        # The keys of each try of a write, and whether a try meets the errors of the write.
        self.tried_keys: list[list[str]] = []
        self.tries_find = True
        self.replaced: dict[str, int] = {}
        self.failures: dict[str, Failure] = {}
        self.failed_messages: list[tuple[Any, str, int]] = []
        self.queue: dict[int, Message] = {}
        self.claimed: set[int] = set()
        self.delays: dict[int, float] = {}
        self.extended: list[list[int]] = []
        self.rests: list[Rest] = []
        self.rested_pipelines: list[tuple[int, list[int], str]] = []
        # Whether code of the owner may run.
        self.owners_code = False
        self.resumed: list[str] = []
        self.logged: list[str] = []
        self.tokens_taken: list[int] = []
        self.in_lane = False
        self.is_wanted: Callable[[], bool] = lambda: True
        self.backfill: Backfill | None = None
        self.scan_error: RowError | None = None
        self.failed_backfills: list[str] = []
        self.usage: list[Share] = []
        # The next ones; then as many as the limits of the models allow.
        self.permits: list[Permit] = []
        # The limits of each model, beside its own; the time that each request takes of them; and the slots in use.
        self.limits: dict[str, Any] = {}
        self.seconds_per_request = 0.0
        self.requests_until = -math.inf
        self.slots_held: set[int] = set()
        self.charges: list[tuple[Charge | None, ...]] = []
        # The models that were left out of each claim.
        self.busy: list[list[str]] = []
        self.slots_freed: list[int] = []
        self.embedder_timeouts: list[float] = []
        # The most texts that a call of an SQL function takes before its time is up.
        self.embedder_takes = math.inf
        self.limits_learnt: list[Limits] = []
        self.statement_timeout: float | None = None
        self.content_errors: dict[str, Exception] = {}
        self.write_errors: dict[str, RowError | StatementError] = {}
        self.settle_errors: dict[str, RowError] = {}
        self.fail_error: RowError | None = None
        self.locked: dict[str, float] = {}
        self.skipped: set[str] = set()
        self.bad_texts: list[str] = []
        self.interrupts: dict[str, Callable[[], None]] = {}
        # Called with the name of each statement.
        self.watch: Callable[[str], None] = lambda statement: None
        # The calls, in order.
        self.statements: list[str] = []
        # How many merges of the text index are due.
        self.merges = 0
        # The keys of each statement that reads, and of each that writes.
        self.read_keys: list[list[str]] = []
        self.written_keys: list[list[str]] = []
        # The commits among them that do not wait for the disk.
        self.unsynced: list[int] = []
        self._numbers = itertools.count(1)

    # For tests -----------------------------------------------------------------------------------

    def put(self, row_id: int, text: str | None, pipeline_id: int = 1) -> int:
        """Inserts or updates a row; returns the id of the message that says so."""
        self.texts[key_of(row_id)] = text
        self.vectors.setdefault(key_of(row_id), None)
        return self.send({"pipeline": pipeline_id, "keys": [[row_id]]})

    def send(self, body: Any) -> int:
        message_id = next(self._numbers)
        self.queue[message_id] = Message(message_id, 0, body)
        return message_id

    def waiting(self) -> list[Message]:
        """The messages that a lane could claim."""
        return [message for message in self.queue.values() if message.id not in self.claimed]

    def is_fresh(self, row_id: int) -> bool:
        key = key_of(row_id)
        if key not in self.texts:
            return False
        text = self.texts[key]
        return self.vectors[key] == (None if text is None else vector_of(text).tolist())

    def _note(self, statement: str) -> None:
        self.statements.append(statement)
        self.watch(statement)
        self.interrupts.get(statement, lambda: None)()

    # The real one's methods ----------------------------------------------------------------------

    def commit(self, *, synced: bool = True) -> None:
        if not synced:
            self.unsynced.append(len(self.statements))
        self._note("commit")

    def check_interrupts(self) -> None:
        self._note("check_interrupts")

    def between_steps(self) -> None:
        self.check_interrupts()

    def sleep(self, seconds: float) -> None:
        self._note("sleep")

    def enter_lane(self, *, backfill: bool) -> bool:
        self.in_lane = True
        return True

    def leave_lane(self) -> None:
        self.in_lane = False
        self.claimed.clear()

    def clean_up(self) -> None:
        self._note("clean_up")

    def merge_segments(self, *, dedicated: bool = False) -> bool:
        self._note("merge_segments")
        self.merges -= 1
        return self.merges >= 0

    def lock_lanes(self) -> None:
        self._note("lock_lanes")

    def lane_is_wanted(self) -> bool:
        return self.is_wanted()

    def warn_of_blocked_pipelines(self, resting: Sequence[str] | None = None) -> None:
        self._note("warn_of_blocked_pipelines")

    def statement_timeout_seconds(self) -> float | None:
        return self.statement_timeout

    def claim(
        self,
        max_rows: int,
        lease_seconds: float,
        held: Sequence[int],
        busy_models: Sequence[str],
        busy_owners: Sequence[int],
    ) -> list[Message]:
        self._note("claim")
        self.busy.append(list(busy_models))
        free = [
            message
            for message in self.waiting()
            if (pipeline := self._pipeline_of(message)) is None
            or (pipeline.model.name not in busy_models and pipeline.owner not in busy_owners)
        ]
        claimed = [replace(message, read_count=message.read_count + 1) for message in free[:max_rows]]
        self.queue.update({message.id: message for message in claimed})
        self.claimed.update(message.id for message in claimed)
        return claimed

    def _pipeline_of(self, message: Message) -> Pipeline | None:
        number = message.body.get("pipeline") if isinstance(message.body, dict) else None
        return None if number is None else self.defined.get(number)

    def extend(self, message_ids: Sequence[int], lease_seconds: float) -> None:
        self._note("extend")
        self.extended.append(list(message_ids))

    def settle(self, message_ids: Sequence[int]) -> None:
        self._note("settle")
        for message_id in message_ids:
            del self.queue[message_id]

    def release(self, message_ids: Sequence[int]) -> None:
        self._note("release")
        for message_id in message_ids:
            message = self.queue[message_id]
            self.queue[message_id] = replace(message, read_count=message.read_count - 1)
            self.claimed.discard(message_id)

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
        self._note("requeue")
        # How long the rows have waited is known from these.
        assert set(message_ids) & self.queue.keys()
        body = {"pipeline": pipeline_id, "keys": [json.loads(key) for key in keys], "attempts": attempts}
        message_id = self.send(body | ({"suspect": True} if suspect else {}))
        self.queue[message_id] = replace(self.queue[message_id], read_count=read_count)
        self.delays[message_id] = delay_seconds

    def next_backfill(
        self, *, dedicated: bool, busy_models: Sequence[str], busy_owners: Sequence[int]
    ) -> Backfill | None:
        self._note("next_backfill")
        return None if MODEL.name in busy_models else self.backfill

    def scan(self, backfill: Backfill, max_rows: int) -> tuple[list[str], bool]:
        self._note("scan")
        if self.scan_error is not None:
            raise self.scan_error
        after = -1 if backfill.after is None else json.loads(backfill.after)[0]
        numbers = [number for number in sorted(json.loads(key)[0] for key in self.texts) if number > after]
        return [key_of(number) for number in numbers[:max_rows]], len(numbers) < max_rows

    def queue_backfill(
        self,
        backfill: Backfill,
        keys: Sequence[str],
        *,
        exhausted: bool,
        lease_seconds: float,
        held: Sequence[int],
    ) -> list[Message]:
        self._note("queue_backfill")
        self.backfill = None if exhausted else replace(backfill, after=keys[-1])
        if not keys:
            return []
        message_id = self.send({"pipeline": backfill.pipeline_id, "keys": [json.loads(key) for key in keys]})
        self.queue[message_id] = replace(self.queue[message_id], read_count=1)
        self.claimed.add(message_id)
        return [self.queue[message_id]]

    def fail_backfill(self, backfill: Backfill, reason: str) -> None:
        self._note("fail_backfill")
        self.backfill = None
        self.failed_backfills.append(reason)

    def resolve(self, body: Any) -> int:
        self._note("resolve")
        if body.get("table") != "documents":
            raise RowError(f"there is no table {body.get('table')}")
        return 1

    def pipelines(self, ids: Sequence[int], *, after_error: bool = False) -> dict[int, Pipeline]:
        self._note("pipelines")
        found = {number: self.defined[number] for number in ids if number in self.defined}
        return {number: replace(one, model=self._limited(one.model)) for number, one in found.items()}

    def _limited(self, model: Model) -> Model:
        learnt = {**(model.learnt or {}), **self.limits["learnt"]} if "learnt" in self.limits else model.learnt
        return replace(model, **{**self.limits, "learnt": learnt})

    def rest_model(self, name: str, seconds: float, needs_attention: bool, trouble: Trouble) -> bool:
        self._note("rest_model")
        self.rests.append(Rest(name, seconds, needs_attention, str(trouble), trouble.summary))
        return len(self.rests) == 1

    def rest_pipelines(self, owner: int, pipeline_ids: Sequence[int], reason: str) -> None:
        self._note("rest_pipelines")
        self.rested_pipelines.append((owner, list(pipeline_ids), reason))

    def runs_owners_code(self, pipeline: Pipeline, *, writes: bool) -> bool:
        return self.owners_code

    def plan_again(self, pipeline_id: int, failing: Sequence[str] = ()) -> RowError | None:
        self._note("plan_again")
        return None

    @staticmethod
    def is_nobodys(error: Exception) -> bool:
        return isinstance(error, StatementError) and error.nobodys

    may_pass = is_nobodys

    def resume_model(self, name: str) -> None:
        self._note("resume_model")
        self.resumed.append(name)

    def rows(self, pipeline: Pipeline, keys: Sequence[str], max_bytes: int) -> tuple[dict[str, Row], bool]:
        self._note("rows")
        self.read_keys.append(list(keys))
        for key in keys:
            if key in self.content_errors:
                raise self.content_errors[key]
        found: dict[str, Row] = {}
        for key in keys:
            if key in self.texts:
                text = self.texts[key]
                size = len((text or "").encode())
                max_bytes -= size
                found[key] = Row(text if size <= MAX_TEXT_BYTES else None, digest_of(self.vectors[key]), size)
                if max_bytes < 0:
                    return found, False
        return found, True

    def digests(self, pipeline: Pipeline, keys: Sequence[str]) -> dict[str, Known]:
        return {
            key: Known(self.embedded[key][0], self.vector_digests.get(key), self.replaced.get(key, 0), 0.0)
            for key in keys
            if key in self.embedded
        }

    def note_replaced(self, pipeline_id: int, keys: Sequence[str], *, echo: bool) -> None:
        self._note("note_replaced")
        self._raise_for(keys)
        for key in keys:
            self.vector_digests.setdefault(key, b"")

    def try_write(
        self,
        pipeline: Pipeline,
        keys: Sequence[str],
        text_digests: Sequence[bytes | None],
        versions: Sequence[str | None],
    ) -> dict[str, str]:
        self._note("try_write")
        self.tried_keys.append(list(keys))
        for key in keys:
            if key in self.write_errors and self.tries_find:
                raise self.write_errors[key]
        return {key: "skipped" if key in self.skipped else "written" for key in keys}

    def write(
        self,
        pipeline: Pipeline,
        keys: Sequence[str],
        text_digests: Sequence[bytes | None],
        versions: Sequence[str | None],
        vectors: Vector | None,
    ) -> dict[str, Written]:
        self._note("write")
        self.written_keys.append(list(keys))
        assert len(set(keys)) == len(keys), "a row cannot be written twice by one statement"
        for key in keys:
            if key in self.write_errors:
                raise self.write_errors[key]
        outcomes = {}
        for index, (key, text_digest) in enumerate(zip(keys, text_digests, strict=True)):
            if key not in self.texts:
                outcomes[key] = "gone"
            elif self.locked.get(key, 0) > 0:
                self.locked[key] -= 1
                outcomes[key] = "locked"
            elif Row(self.texts[key], None).text_digest != text_digest:
                outcomes[key] = "changed"
            elif key in self.skipped:
                outcomes[key] = "skipped"
            else:
                self.vectors[key] = None if vectors is None else vectors[index].tolist()
                outcomes[key] = "written"
        return {key: Written(outcome, digest_of(self.vectors.get(key))) for key, outcome in outcomes.items()}

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
        self._note("record_embedded")
        self._raise_for(keys)
        assert len(set(keys)) == len(keys), "a row cannot be recorded twice by one statement"
        for key, digest, vector_digest, cut in zip(keys, digests, vector_digests, truncated, strict=True):
            self.embedded[key] = (digest, cut)
            if vector_digest is not None:
                self.vector_digests[key] = vector_digest
            self.failures.pop(key, None)

    def forget(self, pipeline: Pipeline, keys: Sequence[str]) -> None:
        self._note("forget")
        self._raise_for(keys)
        for key in keys:
            self.embedded.pop(key, None)
            self.failures.pop(key, None)

    def _raise_for(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key in self.settle_errors:
                raise self.settle_errors[key]

    def call_embedder(
        self, model: str, purpose: str, texts: Sequence[str], timeout_seconds: float
    ) -> list[bytes | None]:
        self._note("call_embedder")
        self.embedder_timeouts.append(timeout_seconds)
        if any(part in text for part in self.bad_texts for text in texts):
            raise Refused("not these words")
        if len(texts) > self.embedder_takes:
            raise RanTooLong("too long")
        return [struct.pack(">hh3f", 3, 0, *vector_of(text)) for text in texts]

    def take_permit(
        self, model: str, charges: Sequence[Charge | None], patience_seconds: float, *, with_slot: bool
    ) -> Permit:
        self._note("take_permit")
        self.charges.append(tuple(charges))
        now = time.monotonic()
        at = self.permits[0].at if self.permits else max(now, self.requests_until + self.seconds_per_request)
        if at is not None and at - now > patience_seconds:
            return Permit(possible_at=at)
        if self.permits:
            return self.permits.pop(0)
        most = self.limits.get("max_requests_in_flight")
        slot = None if most is None else next((n for n in range(1, most + 1) if n not in self.slots_held), 0)
        if slot == 0:
            return Permit()
        if slot is not None:
            self.slots_held.add(slot)
        self.requests_until = at or now
        return Permit(at, slot)

    def free_slots(self, model: str, slots: Sequence[int]) -> None:
        self._note("free_slots")
        self.slots_freed.extend(slots)
        self.slots_held.difference_update(slots)

    def learn_limits(self, model: str, limits: Limits) -> None:
        self._note("learn_limits")
        self.limits_learnt.append(limits)

    def learn_inputs_taken(self, model: str, inputs: int | None) -> None:
        self._note("learn_inputs_taken")
        for number, pipeline in self.defined.items():
            if pipeline.model.name == model:
                learnt = {**(pipeline.model.learnt or {}), "inputs_per_request": inputs}
                self.defined[number] = replace(pipeline, model=replace(pipeline.model, learnt=learnt))

    def learn_tokens_taken(self, model: str, tokens: int) -> bool:
        self.tokens_taken.append(tokens)
        for number, pipeline in self.defined.items():
            if pipeline.model.name == model:
                learnt = replace(pipeline.model, learnt={"tokens_per_input": tokens})
                self.defined[number] = replace(pipeline, model=learnt)
        return True

    def note_usage(self, model: str, shares: Sequence[Share], slot: int | None) -> None:
        self.usage.extend(shares)
        self.slots_freed.extend([] if slot is None else [slot])
        self.slots_held.discard(slot or 0)

    def queue_recorded(self, pipeline_id: int, after: str) -> None:
        self._note("queue_recorded")
        for key in sorted(key for key in self.embedded if key > after):
            self.send({"pipeline": pipeline_id, "keys": [json.loads(key)]})

    def unindexed(self, pipeline: Pipeline, keys: Sequence[str]) -> set[str]:
        return set(keys)

    def index_texts(
        self, pipeline: Pipeline, keys: Sequence[str], digests: Sequence[bytes], texts: Sequence[tuple[int, int, str]]
    ) -> None:
        self._note("index_texts")

    def forget_all(self, pipeline_id: int) -> bool:
        self._note("forget_all")
        self._raise_for(list(self.settle_errors))
        self.embedded.clear()
        self.failures.clear()
        return True

    def fail(self, pipeline: Pipeline, key: str, reason: str, attempts: int, excerpt: Text | None) -> None:
        self._note("fail")
        if self.fail_error is not None:
            raise self.fail_error
        self.failures[key] = Failure(reason, attempts, None if excerpt is None else str(excerpt))

    def log(self, line: str) -> None:  # type: ignore[override]
        self.logged.append(line)

    def fail_message(self, body: Any, reason: str, attempts: int) -> None:
        self._note("fail_message")
        self.failed_messages.append((body, reason, attempts))


class FakeNetwork(Network):
    """Calls nobody; fails where it is aborted for ever, which would hang a backend."""

    MAX_ABORTS = 40

    def __init__(self) -> None:
        super().__init__(1)
        self.aborts = 0
        self.looks_at_deadlines = 0

    def expire(self) -> None:
        self.looks_at_deadlines += 1

    def abort(self) -> None:
        self.aborts += 1
        assert self.aborts < self.MAX_ABORTS, "aborted again and again, and the calls never ended"


class FakeProvider:
    """Answers with vectors_of() the texts unless a test puts another answer in its place."""

    MAX_INPUTS_PER_REQUEST = 2048
    MAX_TOKENS_PER_REQUEST = 300_000
    MAX_TOKENS_PER_INPUT: int | None = 8192
    RUNS_IN_BACKEND = False

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.timeouts: list[float] = []
        self.answer: Callable[[list[str]], Vector] = vectors_of
        self.headers: dict[str, str] = {}
        self.tokens: int | None = None
        self.aborted = threading.Event()

    def check(self, model: Model) -> None:
        pass

    def embed(self, request: Request, reach: Any, /) -> Embedded:
        self.requests.append(list(request.texts))
        self.timeouts.append(request.timeout_seconds)
        return Embedded(self.answer(list(request.texts)), self.tokens, self.headers)

    def abort(self) -> None:
        self.aborted.set()

    @property
    def texts(self) -> list[str]:
        return [text for request in self.requests for text in request]
