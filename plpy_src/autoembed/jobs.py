"""Jobs and messages: which rows a message is for, what became of each, and when the message can go."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from autoembed.database import Database
    from autoembed.records import Message, Pipeline, Row


class Address(NamedTuple):
    """The rows that a message is for: their pipeline (None: to be found by names) and their keys as JSON arrays.

    truncated: the table was emptied, there are no keys then; moved: rows have changed their keys, and what is known of
    these keys is of others.
    """

    pipeline_id: int | None
    keys: list[str]
    attempts: int
    truncated: bool = False
    moved: bool = False


def address_of(body: Any) -> Address:
    """Reads a message of ours (pipeline, keys) or of the guide's form (id, schema, …); ValueError if it is neither."""
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
    """Whether these are keys as JSON arrays."""
    try:
        return all(_is_key(json.loads(text)) for text in texts)
    except (TypeError, ValueError, RecursionError):
        return False


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
    moved: bool = False
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
    """Keeps what became of each job, and settles a message when all its jobs are dealt with.

    Any statement may be where a cancel strikes: what it was to do is noted as done when it is.
    """

    def __init__(self, database: Database, messages: Sequence[Message]) -> None:
        self._database = database
        # Messages whose jobs are not known yet, and the jobs of the others.
        self._unread = {message.id for message in messages}
        self._messages: dict[int, list[Job]] = defaultdict(list)
        # Decided, and to be written by flush(): messages, and rows by pipeline, attempts and delay.
        self._released: list[int] = []
        self._settled: list[int] = []
        self._again: dict[tuple[int, int, float], dict[str, None]] = defaultdict(dict)
        self.report = Report()

    def take(self, messages: Sequence[Message]) -> None:
        """Further messages, whose jobs are not known yet."""
        self._unread.update(message.id for message in messages)

    def open(self, job: Job) -> None:
        self.report.read += 1
        for message_id in job.message_ids:
            self._unread.discard(message_id)
            self._messages[message_id].append(job)

    def set_aside(self, messages: Sequence[Message]) -> None:
        """Back to the queue, for a later pass."""
        self._database.release([message.id for message in messages])
        self._unread.difference_update(message.id for message in messages)

    def settle(self, message: Message) -> None:
        """A message that has no jobs is dealt with."""
        self._database.settle([message.id])
        self._unread.discard(message.id)

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
