"""Jobs and messages: the rows a message is for, the outcome of each, and when the message can leave the queue."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from autoembed.errors import RowError

if TYPE_CHECKING:
    from autoembed.database.lanes import Database
    from autoembed.long_text import Text
    from autoembed.model import Model
    from autoembed.records import Chunk, Message, Pipeline, Row

# The kinds of reasons for which rows are given up, as the server's log has them.
TEXT = "the text is too long"
REFUSED = "the model refuses the text"
CHANGES = "the text is different each time"
KILLS = "lanes ended while they worked on it"
# A row fails after this many attempts.
MAX_ATTEMPTS = 5
# The largest integer of a column.
MAX_ID = 2**31 - 1
# By how often messages were read: so many of them are tried together at first, and at most. Those that were read more
# often are tried alone.
TRIED_TOGETHER = {2: (100, 2000), 3: (10, 200), 4: (1, 20)}


# json.dumps() would make an encoder for each key.
_canonical = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Address(NamedTuple):
    """The rows that a message is for: their pipeline (None: to be found by names), and their keys as JSON arrays.

    truncated: the table was emptied, and there are no keys.
    moved: rows have changed their keys, so the digests known under these keys belong to other rows.
    replaced: somebody else has replaced the rows' vectors.
    echo: a trigger has changed the rows when a lane wrote a vector.
    suspect: a server may have fallen over one of the texts, which travel without others.
    recorded_after: rows may have gone unseen. The rows with a record are to be queued, those behind this key, and there
    are no other keys.
    """

    pipeline_id: int | None
    keys: list[str]
    attempts: int
    truncated: bool = False
    moved: bool = False
    replaced: bool = False
    recorded_after: str | None = None
    suspect: bool = False
    echo: bool = False


def address_of(body: Any) -> Address:
    """Reads a message of this extension (pipeline, keys) or of the guide's form (id, schema, …).

    Raises ValueError for any other.
    """
    if not isinstance(body, dict):
        raise ValueError("the message is not an object")
    pipeline_id, keys, attempts = body.get("pipeline"), body.get("keys"), body.get("attempts", 0)
    if pipeline_id is not None and not _is_number(pipeline_id, 1, MAX_ID) or not _is_number(attempts, 0, MAX_ATTEMPTS):
        raise ValueError("the message's pipeline or attempts is not a number, or out of its range")
    if body.get("truncated") is True and pipeline_id is not None:
        return Address(pipeline_id, [], 0, truncated=True)
    if isinstance(body.get("recorded_after"), str) and pipeline_id is not None:
        return Address(pipeline_id, [], 0, recorded_after=body["recorded_after"])
    if keys is None:
        if body.get("id") is None:
            raise ValueError("the message lacks id")
        keys = [[body["id"]]]
    if not isinstance(keys, list) or not keys or not all(_is_key(key) for key in keys):
        raise ValueError("the message's keys are not rows' keys")
    return Address(
        pipeline_id,
        list(map(_canonical, keys)),
        attempts,
        moved=body.get("moved") is True,
        replaced=body.get("replaced") is True,
        suspect=body.get("suspect") is True,
        echo=body.get("echo") is True,
    )


def _is_number(value: Any, least: int, most: int) -> bool:
    # True is an int, too.
    return type(value) is int and least <= value <= most


def are_keys(texts: Sequence[str]) -> bool:
    """Whether these texts are keys as JSON arrays."""
    try:
        return all(_is_key(json.loads(text)) for text in texts)
    except (TypeError, ValueError, RecursionError):
        return False


def _is_key(key: Any) -> bool:
    return isinstance(key, list) and len(key) > 0 and all(isinstance(value, str | int) for value in key)


def isolate(messages: list[Message], fraction: float, survived: int) -> tuple[list[Message], list[Message]]:
    """Separates the messages to work on now from those for later. fraction: random, from 0 to 1.

    A message that was read before was never settled: its lane died, perhaps because of it. The more often this has
    happened, the fewer other messages it is tried with. A message that kills its lane then takes few others with it.
    After each group that the lane has survived, the next one has twice as many: most of them only died with others.
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
        first, most = TRIED_TOGETHER.get(least, (1, 1))
        chosen = [message for message in messages if message.read_count == least][: min(first << survived, most)]
    taken = {message.id for message in chosen}
    return chosen, [message for message in messages if message.id not in taken]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job. again_in_seconds: it goes back to the queue; released: unchanged, as if never read.

    suspects: the number of those that share a message because the reason may be one of them; 0: of none.
    """

    again_in_seconds: float | None = None
    attempts: int = 0
    released: bool = False
    suspects: int = 0


DONE = Outcome()
RELEASED = Outcome(released=True)


@dataclass(eq=False)
class Job:
    """One row to embed, as claimed by one or more messages.

    chunks: those of the text, where embeddings are beside the rows. wanted: those that have no vector yet, by text.
    is_long: their vectors gather in the database, and they are written in parts. unsent: those that are not asked for
    yet, one of each digest, the last one first.
    parts: where the pieces of an owner's function start and end, and ranges: chunks, once that is known.
    suspects: the message of the rows with which alone its text travels; 0: it travels with any.
    """

    pipeline: Any  # Pipeline; None if it was dropped after the row was queued
    key: str
    attempts: int
    message_ids: list[int]
    row: Row | None = None
    digest: bytes = b""
    vector_digest: bytes | None = None
    truncated: bool = False
    outcome: Outcome | None = None
    chunks: list[Chunk] = field(default_factory=list)
    wanted: dict[str, list[Chunk]] = field(default_factory=dict)
    is_long: bool = False
    unsent: list[Chunk] = field(default_factory=list)
    parts: list[tuple[int, int]] | None = None
    ranges: list[tuple[int, int]] | None = None
    suspects: int = 0

    @property
    def content(self) -> Text | None:
        return self.row.content if self.row else None

    @property
    def text_digest(self) -> bytes | None:
        return self.row.text_digest if self.row else None

    @property
    def version(self) -> str | None:
        return self.row.version if self.row else None

    @property
    def prefix(self) -> str:
        return self.row.prefix if self.row else ""

    @property
    def has_embedding(self) -> bool:
        return self.row is not None and self.row.vector_digest is not None

    @property
    def first_number(self) -> int:
        """The number of the first chunk: as it is to be written, or as the row has it."""
        if self.chunks:
            return self.chunks[0].number
        return self.row.numbers[0] if self.row and self.row.numbers else 1

    @property
    def vector_count(self) -> int:
        """The number of vectors that are written for the row."""
        return sum(not chunk.is_kept for chunk in self.chunks) if self.pipeline.is_beside else 1


def open_jobs(
    database: Database,
    ledger: Ledger,
    messages: list[Message],
    max_rows: int,
    texts_ahead: Callable[[Model], int | None] | None = None,
    survived: int = 0,
) -> list[tuple[Pipeline, list[Job]]]:
    """The claimed messages as jobs, one for each row, by pipeline. Messages that cannot be jobs are settled here.

    texts_ahead: the most rows for a model; None: max_rows. survived: see isolate().
    """
    chosen, others = isolate(messages, random.random(), survived)
    if others:
        ledger.release_messages(others)
    found = [(message, *one) for message in chosen if (one := _address_in(database, ledger, message)) is not None]
    resting, unfinished = _forget_changed(database, [(pipeline_id, address) for _, pipeline_id, address in found])
    addressed: dict[int, list[tuple[Message, Address]]] = defaultdict(list)
    looked_after: set[tuple[int, str]] = set()
    for message, pipeline_id, address in found:
        of_all_rows = address.truncated or address.recorded_after is not None
        if pipeline_id in resting or of_all_rows and pipeline_id in unfinished:
            ledger.release_messages([message])
            continue
        if address.recorded_after is not None and (pipeline_id, address.recorded_after) not in looked_after:
            # Each partition of a table that is truncated gives one such message.
            looked_after.add((pipeline_id, address.recorded_after))
            database.queue_recorded(pipeline_id, address.recorded_after)
        if of_all_rows:
            ledger.settle(message)
            continue
        if message.read_count > 1 and len(address.keys) > 1:
            # A lane died, perhaps because of one of these rows: from now on each row has its own message.
            for key in address.keys:
                database.requeue(
                    pipeline_id,
                    [key],
                    address.attempts,
                    [message.id],
                    read_count=message.read_count - 1,
                    suspect=address.suspect,
                )
            ledger.settle(message)
        else:
            addressed[pipeline_id].append((message, address))

    pipelines = database.pipelines(sorted(addressed)) if addressed else {}
    share = max(1, max_rows // max(1, len(addressed)))
    room = {
        number: min(share, texts_ahead and texts_ahead(pipeline.model) or share)
        for number, pipeline in pipelines.items()
    }
    suspects = {message.id for of_pipeline in addressed.values() for message, address in of_pipeline if address.suspect}
    rows = _rows_of(database, ledger, addressed, defaultdict(lambda: share, room))
    by_pipeline: dict[int, list[Job]] = defaultdict(list)
    for (pipeline_id, key), (attempts, holders) in rows.items():
        message_ids = [message.id for message in holders]
        job = Job(pipelines.get(pipeline_id), key, attempts, message_ids)
        job.suspects = next((number for number in message_ids if number in suspects), 0)
        ledger.open(job)
        if _can_begin(ledger, job, holders):
            by_pipeline[pipeline_id].append(job)
    return [(pipelines[pipeline_id], jobs) for pipeline_id, jobs in by_pipeline.items()]


def _address_in(database: Database, ledger: Ledger, message: Message) -> tuple[int, Address] | None:
    """The pipeline and the rows of a message; None if it is settled already, because it names none."""
    if message.read_count > MAX_ATTEMPTS + 1:
        # A row is given up one read before.
        ledger.fail_message(message, f"{message.read_count - 1} lanes ended while they worked on it")
        return None
    try:
        address = address_of(message.body)
        pipeline_id = address.pipeline_id or database.resolve(message.body)
    except (ValueError, RowError) as error:
        ledger.fail_message(message, str(error))
        return None
    return pipeline_id, address


def _forget_changed(database: Database, found: list[tuple[int, Address]]) -> tuple[set[int], set[int]]:
    """Forgets the digests that messages say are no longer those of their rows.

    Returns the pipelines where that is not possible now, and those of truncated tables of which more is to be forgotten
    by the next claims. The former rest, and their messages keep what they say.
    """
    changed: dict[int, list[Address]] = defaultdict(list)
    for pipeline_id, address in found:
        if address.truncated or address.moved or address.replaced or address.echo:
            changed[pipeline_id].append(address)
    pipelines = database.pipelines(sorted(changed)) if changed else {}
    resting, unfinished = set(), set()
    for pipeline_id, addresses in changed.items():
        pipeline = pipelines.get(pipeline_id)
        if pipeline is None:
            # It has ended, and left records.
            if any(address.truncated for address in addresses) and not database.forget_all(pipeline_id):
                unfinished.add(pipeline_id)
            continue
        moved = [key for address in addresses if address.moved for key in address.keys]
        replaced = [key for address in addresses if address.replaced for key in address.keys]
        echoed = [key for address in addresses if address.echo for key in address.keys]
        try:
            if any(address.truncated for address in addresses) and not database.forget_all(pipeline_id):
                unfinished.add(pipeline_id)
            if moved:
                database.forget(pipeline, moved)
            if replaced:
                database.note_replaced(pipeline_id, replaced, echo=False)
            if echoed:
                database.note_replaced(pipeline_id, echoed, echo=True)
        except RowError as error:
            database.rest_pipelines(pipeline.owner, [pipeline_id], str(error))
            resting.add(pipeline_id)
    return resting, unfinished


def _rows_of(
    database: Database,
    ledger: Ledger,
    addressed: dict[int, list[tuple[Message, Address]]],
    most: Mapping[int, int],
) -> dict[tuple[int, str], tuple[int, list[Message]]]:
    """The attempts and the messages of each row, by pipeline and key.

    most: the rows that a pipeline may have. Those beyond go back to the queue.
    """
    rows: dict[tuple[int, str], tuple[int, list[Message]]] = {}
    for pipeline_id, of_pipeline in addressed.items():
        room = most[pipeline_id]
        # Short messages come first: they hold the latest changes. A long one may exceed the share.
        for message, address in sorted(of_pipeline, key=lambda one: len(one[1].keys)):
            if room == 0:
                ledger.release_messages([message])
                continue
            if len(address.keys) > room:
                left = address.keys[room:]
                database.requeue(pipeline_id, left, address.attempts, [message.id], suspect=address.suspect)
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
        ledger.fail(job, f"{read_count - 1} lanes ended while they worked on it", read_count - 1, kind=KILLS)
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
        # Decided, and written by flush(): messages; and rows, with the messages that named them, by pipeline, attempts,
        # delay and number of suspects.
        self._released: list[int] = []
        self._settled: list[int] = []
        self._again: dict[tuple[int, int, float, int], dict[str, list[int]]] = defaultdict(dict)
        self._suspects = 0
        # Rows that were given up, for the server's log, by pipeline and kind of reason.
        self._given_up: Counter[tuple[str, str]] = Counter()
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

    def suspect(self, jobs: Sequence[Job], error: str, delay_seconds: float = 0.0, *, counts: bool = False) -> None:
        """Gives jobs back to the queue whose texts are to travel together, and without others."""
        self._suspects += 1
        for job in jobs:
            if job.outcome is None:
                job.outcome = Outcome(delay_seconds, job.attempts + counts, suspects=self._suspects)
                self.report.retried += 1
                self._note(job, error)

    def release(self, job: Job, error: str | None = None) -> None:
        """Gives a job back to the queue unchanged: its row is not to blame."""
        if job.outcome is None:
            job.outcome = RELEASED
            self.report.retried += 1
            if error is not None:
                self._note(job, error)

    def fail(self, job: Job, reason: str, attempts: int | None = None, *, kind: str = TEXT) -> None:
        """Gives a row up. If it cannot be noted, its pipeline rests, and the job goes back.

        kind: that of the reason, without words of a row, a provider or an owner's code.
        """
        try:
            self._database.fail(job.pipeline, job.key, reason, attempts or job.attempts + 1, job.content)
        except RowError as error:
            self._database.rest_pipelines(job.pipeline.owner, [job.pipeline.id], str(error))
            self.release(job, reason)
            return
        job.outcome = DONE
        self.report.failed += 1
        self._given_up[job.pipeline.name, kind] += 1
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
                    outcome = Outcome(0.0, job.attempts, suspects=-job.suspects)
                if outcome is not None and outcome.again_in_seconds is not None:
                    group = (job.pipeline.id, outcome.attempts, outcome.again_in_seconds, outcome.suspects)
                    self._again[group][job.key] = job.message_ids
        for group, rows in list(self._again.items()):
            pipeline_id, attempts, delay_seconds, suspects = group
            self._database.requeue(
                pipeline_id,
                list(rows),
                attempts,
                sorted({message_id for message_ids in rows.values() for message_id in message_ids}),
                delay_seconds=delay_seconds,
                suspect=suspects != 0,
            )
            del self._again[group]
        if self._released:
            self._database.release(self._released)
            self._released = []
        if self._settled:
            self._database.settle(self._settled)
            self._settled = []
        for (name, kind), count in self._given_up.items():
            self._database.log(f"autoembed gave up {count} {'row' if count == 1 else 'rows'} of {name}: {kind}")
        self._given_up.clear()

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
