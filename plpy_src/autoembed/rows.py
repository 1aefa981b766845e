"""The rows of a pass: their texts are read, their vectors are written, and the ledger learns the outcome of each."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from autoembed import batching
from autoembed.bm25 import MAX_CHARACTERS, STATEMENT_CHARACTERS, parts
from autoembed.chunks import FUNCTION, NONE
from autoembed.cutting import Cutter, sent_of
from autoembed.errors import DISK_FULL, Fault, PassEnded, RowError
from autoembed.jobs import CHANGES, MAX_ATTEMPTS, REFUSED, Job, Ledger
from autoembed.limits import PATIENCE_SECONDS
from autoembed.providers import COMPUTED_HERE, most_tokens_of
from autoembed.records import ECHO, MAX_TEXT_BYTES, Chunk, Written, changes, digest_of_chunks, first_number

if TYPE_CHECKING:
    import numpy as np

    from autoembed.database.lanes import Database
    from autoembed.long_text import Text
    from autoembed.records import Pipeline

# A lane holds about so many bytes of texts, and so many of each owner's where others fill the room.
READ_BYTES = 8 << 20
OWNER_READ_BYTES = 1 << 20
# A text of more characters is cut into chunks in a thread: that takes a second for a million of them.
LONG_CHARACTERS = 50_000
# A text is written in parts if so many of its chunks are not those that the row has in their places.
KEPT_CHUNKS = 300
# The first of its texts that are sent.
FIRST_SENT_CHUNKS = 100
# The most chunks of a long text in one statement.
MAX_STATEMENT_CHUNKS = 500
# The rows of one statement are this many at first, and at most.
FIRST_STATEMENT_ROWS = 100
MAX_STATEMENT_ROWS = 2000
# The code of one owner has this time in a claim, in seconds: alone, and beside other owners. Its other rows wait for
# the next claim.
OWNER_SHARE_SECONDS = 1.0
SHARE_BESIDE_OTHERS_SECONDS = 0.25
# A statement that takes this long, in seconds, holds up the other owners.
SLOW_SECONDS = 0.5
# A lane then leaves its owner out for so many times as long.
REST_FACTOR = 3
# A statement whose cancel comes so late, in seconds, held up everybody.
OVERRUN_SECONDS = 4.0

# A lane claims no more rows than it can write in this time, in seconds.
AHEAD_SECONDS = 1.0
# The same for an SQL function, which holds up the lane. A call has twice as long.
FUNCTION_AHEAD_SECONDS = 0.5
# The texts of the first request to a model that embeds in the lane's own process.
FIRST_TEXTS = 10
# A slow server that is sent fewer texts in a request is sent any number again from this one on.
MOST_TEXTS = 2048
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
LOCKED = "the row or its table is locked by another transaction"
SKIPPED = "a trigger or a policy of the table leaves the row out of the write"


def is_long(pipeline: Pipeline, content: Text) -> bool:
    """Whether cutting the text into chunks takes so long that nothing else can wait for it."""
    return pipeline.is_beside and pipeline.chunking != NONE and len(content) > LONG_CHARACTERS


def owners_of_few(held: Mapping[int, int]) -> set[int]:
    """The owners who hold less than half of an equal share of the rows that are held, by owner."""
    return {owner for owner, rows in held.items() if 2 * rows * len(held) < sum(held.values())}


def _indexed_rows(pipeline: Pipeline, jobs: Sequence[Job]) -> int:
    """The number of the first jobs whose texts one statement puts into the text index, at least one."""
    if pipeline.text_config is None:
        return len(jobs)
    sizes = accumulate(min(len(job.content or ""), MAX_CHARACTERS) for job in jobs)
    return max(1, sum(size <= STATEMENT_CHARACTERS for size in sizes))


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


class Speeds:
    """The speeds of models that run in this process, one request at a time, the sizes that others answer in time, and
    when their limits allow the next request.

    first_texts: the most in the first request.
    """

    def __init__(self, first_texts: int = FIRST_TEXTS) -> None:
        self._first_texts = first_texts
        self._texts_per_second: dict[str, float] = {}
        self._most_texts: dict[str, int] = {}
        self._allowed_from: dict[str, float] = {}

    def allows_from(self, model: str, at: float) -> None:
        """Takes note that the limits of a model allow no request before a moment. It may be altered meanwhile."""
        self._allowed_from[model] = min(at, time.monotonic() + 2 * PATIENCE_SECONDS) - PATIENCE_SECONDS

    def not_allowed(self) -> set[str]:
        """The models for which nothing is to be claimed yet, since the turn of a request would be too far away."""
        now = time.monotonic()
        return {model for model, at in self._allowed_from.items() if now < at}

    def came_late(self, model: str, texts: int) -> None:
        """Takes note of a request without an answer in time. The next ones have at most half as many texts."""
        self._most_texts[model] = max(1, texts // 2)

    def came_early(self, model: str) -> None:
        """Takes note of an answer after a small part of the time. The next requests may have twice as many texts."""
        if model in self._most_texts:
            self._most_texts[model] *= 2
            if self._most_texts[model] > MOST_TEXTS:
                del self._most_texts[model]

    def recall(self, model: str, texts: int | None) -> None:
        """Takes over what another pass has learnt, where nothing is known."""
        if texts is not None:
            self._most_texts.setdefault(model, texts)

    def inputs_taken(self, model: str) -> int | None:
        """The texts of one request that answers came late for no longer; None: any number."""
        return self._most_texts.get(model)

    def is_late(self, model: str) -> bool:
        """Whether answers came late, and not quickly since. Requests beside others would only wait in its server."""
        return model in self._most_texts

    def most_texts(self, model: str, most: int) -> int:
        """The texts of one request, at most."""
        return min(most, self._most_texts.get(model, most))

    def embedded(self, model: str, texts: int, seconds: float) -> None:
        """Takes note of a request. It counts as much as all those before it."""
        speed = texts / max(seconds, 0.001)
        self._texts_per_second[model] = (self._texts_per_second.get(model, speed) + speed) / 2

    def ran_too_long(self, model: str, texts: int, seconds: float) -> None:
        """Takes note of a call that was cancelled. The next ones have at most half as many texts."""
        self._texts_per_second[model] = texts / max(seconds, 2 * FUNCTION_AHEAD_SECONDS)

    def texts_ahead(self, model: str, provider: str) -> int | None:
        """The texts that a model embeds while a lane may wait, at least one. None: its provider is another process."""
        if provider not in COMPUTED_HERE:
            return None
        speed = self._texts_per_second.get(model)
        seconds = FUNCTION_AHEAD_SECONDS if provider == "function" else AHEAD_SECONDS
        return self._first_texts if speed is None else max(1, int(speed * seconds))


class Owners:
    """A lane's knowledge of the code of tables' owners: how many rows one statement takes, and how long.

    lasts: the next pass knows it, too.
    """

    def __init__(self, *, lasts: bool = True) -> None:
        self.lasts = lasts
        self._spent: dict[int, float] = defaultdict(float)
        # By pipeline, and whether parts of one row are counted instead of rows.
        self._rows: dict[tuple[int, bool], int] = {}
        self._seconds: dict[int, float] = defaultdict(float)
        self._table_seconds: dict[int, float] = defaultdict(float)
        self._take_vectors: set[int] = set()
        self._rest_until: dict[int, float] = {}

    @property
    def share_seconds(self) -> float:
        """The time of each owner's code in a claim."""
        return OWNER_SHARE_SECONDS if len(self._seconds) < 2 else SHARE_BESIDE_OTHERS_SECONDS

    def begin_claim(self) -> None:
        """Starts a claim: the code of each owner has its full time again."""
        self._spent.clear()

    def spent(self, pipeline: Pipeline, seconds: float) -> None:
        """Takes note of the time of a statement."""
        self._spent[pipeline.owner] += seconds
        self._seconds[pipeline.owner] = 0.5 * self._seconds[pipeline.owner] + seconds
        self._table_seconds[pipeline.id] = 0.5 * self._table_seconds[pipeline.id] + seconds
        if seconds > SLOW_SECONDS:
            self._rest_until[pipeline.owner] = time.monotonic() + REST_FACTOR * seconds

    def resting(self) -> set[int]:
        """The owners whose code held up others. None, if there are no others."""
        now = time.monotonic()
        return {owner for owner, until in self._rest_until.items() if until > now and len(self._seconds) > 1}

    def is_slow(self, pipeline: Pipeline) -> bool:
        """Whether the next statement with the owner's code may take long."""
        return self._seconds.get(pipeline.owner, 0.0) > self.share_seconds

    def has_time(self, pipeline: Pipeline) -> bool:
        """Whether the owner's code may run on in this claim, whichever table it belongs to."""
        return self._spent[pipeline.owner] <= self.share_seconds

    def statement_rows(self, pipeline: Pipeline, *, chunks: bool = False) -> int:
        """The number of rows to read or write in one statement. chunks: of chunks of one row."""
        return self._rows.get((pipeline.id, chunks), FIRST_STATEMENT_ROWS)

    def failed(self, pipeline: Pipeline, rows: int, *, chunks: bool = False) -> None:
        """Takes note of a statement of so many rows that ran too long, or failed for one of them."""
        self._rows[pipeline.id, chunks] = max(1, rows // 4)

    def took(self, pipeline: Pipeline, rows: int, seconds: float, *, chunks: bool = False) -> None:
        """Takes note of a statement of so many rows."""
        share = self.share_seconds
        if seconds > share:
            self._rows[pipeline.id, chunks] = max(1, int(rows * share / seconds))
        elif rows >= self.statement_rows(pipeline, chunks=chunks) and seconds < share / 4:
            self._rows[pipeline.id, chunks] = min(2 * rows, MAX_STATEMENT_CHUNKS if chunks else MAX_STATEMENT_ROWS)

    def take_vectors(self, pipeline: Pipeline) -> bool:
        """Whether rows took their vectors, and none refused one since."""
        return pipeline.id in self._take_vectors

    def took_vectors(self, pipeline: Pipeline) -> None:
        self._take_vectors.add(pipeline.id)

    def refused_vectors(self, pipeline: Pipeline) -> None:
        self._take_vectors.discard(pipeline.id)

    def quickest_first(self, work: list[tuple[Pipeline, list[Job]]]) -> list[tuple[Pipeline, list[Job]]]:
        """The work, that of owners whose code was quick before that of others. So are the tables of each owner."""
        return sorted(work, key=lambda one: self.slowness(one[0]))

    def slowness(self, pipeline: Pipeline) -> tuple[float, int, float]:
        """The place of a pipeline where all wait: lower for owners whose code was quick, and for their quick tables."""
        return self._seconds.get(pipeline.owner, 0.0), pipeline.owner, self._table_seconds.get(pipeline.id, 0.0)


@dataclass
class Write:
    """Vectors that are to be written; None: NULLs.

    due_at, until: for rows that were locked, when the next try is due, and when the last one was.
    left: the chunks of a long text that are still to be written. version: that of its row, once a part was written.
    """

    pipeline: Pipeline
    jobs: list[Job]
    vectors: np.ndarray | None
    due_at: float = 0.0
    until: float | None = None
    left: list[Chunk] = field(default_factory=list)
    version: str | None = None

    def part(self, indexes: Sequence[int]) -> Write:
        """The same for some of the rows, with their vectors."""
        jobs = [self.jobs[i] for i in indexes]
        if self.vectors is None:
            return replace(self, jobs=jobs)
        ends = list(accumulate(job.vector_count for job in self.jobs))
        chosen = [n for i in indexes for n in range(ends[i] - self.jobs[i].vector_count, ends[i])]
        return Write(self.pipeline, jobs, self.vectors[chosen], self.due_at, self.until)


class Rows:
    """Reads and writes the rows of a pass."""

    def __init__(self, database: Database, ledger: Ledger, owners: Owners) -> None:
        self._database = database
        self._ledger = ledger
        self._owners = owners
        # The rows of all write statements that were made.
        self.written = 0
        # Jobs whose texts are to be cut in a thread. With their ranges they are for to_embed() again.
        self.uncut: list[Job] = []
        self._writes: deque[Write] = deque()
        # The rows of the last statement of several that failed, of which one is to blame.
        self._suspects: dict[Job, RowError] = {}
        self._cutter = Cutter(database.between_steps, self._split)

    @property
    def some_are_unwritten(self) -> bool:
        """Whether vectors wait for their rows."""
        return bool(self._writes)

    @contextmanager
    def _clock(self, pipeline: Pipeline) -> Iterator[None]:
        """Counts the time of a statement with the owner's code, and of what follows from its outcome.

        Code that no cancel has ended rests its owner.
        """
        began_at = time.monotonic()
        yield
        seconds = time.monotonic() - began_at
        self._owners.spent(pipeline, seconds)
        if seconds > OVERRUN_SECONDS:
            reason = f"the code of the table's owner ran for {seconds:.0f} s, as PostgreSQL could not cancel it"
            self._database.rest_pipelines(pipeline.owner, [], reason)

    def _split(self, pipeline: Pipeline, content: str) -> list[str | None]:
        """The pieces of a text by the owner's function."""
        with self._clock(pipeline):
            return self._database.split(pipeline, content)

    def long_jobs(self) -> list[Job]:
        """The long texts whose vectors are being written."""
        return [job for write in self._writes if write.left for job in write.jobs]

    def owners_behind(self) -> set[int]:
        """The owners with vectors that wait because the time of their code was up, and not for a lock."""
        return {write.pipeline.owner for write in self._writes if write.until is None}

    def without_unwritten(self, pipeline: Pipeline, jobs: list[Job]) -> list[Job]:
        """The jobs whose rows have no vector that waits to be written. Theirs must not be asked for again."""
        waiting = {job.key for write in self._writes if write.pipeline.id == pipeline.id for job in write.jobs}
        for job in jobs:
            if job.key in waiting:
                self._ledger.retry(job, LOCKED_DELAY_SECONDS, LOCKED)
        return [job for job in jobs if job.key not in waiting]

    def read(self, pipeline: Pipeline, jobs: list[Job], max_bytes: int = READ_BYTES) -> list[Job]:
        """Reads the texts; returns the jobs whose row exists.

        If the content function fails, statements have fewer rows until the row that it fails for stands alone. Jobs
        beyond max_bytes, or beyond the time that an owner's code has, go back to the queue.
        """
        found: list[Job] = []
        self._suspects = {}
        waiting = sorted(jobs, key=lambda job: job.attempts)
        while waiting:
            if max_bytes < 0 or not self._owners.has_time(pipeline):
                for job in waiting:
                    error = self._suspects.get(job)
                    if error is None or self._owners.lasts:
                        self._ledger.release(job)
                    else:
                        # The next pass would read the same rows together. Those with an attempt are read one by one.
                        self.retry_or_fail(job, error)
                break
            count = self._statement_rows(pipeline, waiting)
            with self._clock(pipeline):
                read, left = self._read_some(pipeline, waiting[:count], max_bytes)
            max_bytes -= sum(job.row.size for job in read if job.row)
            found += read
            waiting = left + waiting[count:]
        return found

    def _record_unchanged(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Settles rows that have the vector of their text. Those beyond the owner's time go back to the queue."""
        while jobs:
            count = _indexed_rows(pipeline, jobs)
            with self._clock(pipeline):
                self._record(pipeline, jobs[:count], written=False)
            jobs = jobs[count:]
            if not self._owners.has_time(pipeline):
                for job in jobs:
                    self._ledger.release(job)
                return

    def _statement_rows(self, pipeline: Pipeline, jobs: list[Job]) -> int:
        """The number of the first jobs that go into one statement. A row that was to blame before stands alone."""
        blameless = next((number for number, job in enumerate(jobs) if job.attempts), len(jobs))
        return max(1, min(blameless, self._owners.statement_rows(pipeline)))

    def _read_some(self, pipeline: Pipeline, jobs: list[Job], max_bytes: int) -> tuple[list[Job], list[Job]]:
        """Reads texts in one statement: the jobs whose row exists, and those that are still to be read."""
        began_at = time.monotonic()
        try:
            rows, complete = self._database.rows(pipeline, [job.key for job in jobs], max_bytes)
        except RowError as error:
            if self._blame_others(pipeline, jobs, error):
                return [], []
            if not error.locked:
                self._owners.failed(pipeline, len(jobs))
                if len(jobs) > 1:
                    self._suspects = dict.fromkeys(jobs, error)
                    return [], jobs
            for job in jobs:
                self.retry_or_fail(job, error)
            return [], []
        self._owners.took(pipeline, len(jobs), time.monotonic() - began_at)
        for job in jobs:
            job.row = rows.get(job.key)
        found = [job for job in jobs if job.row is not None]
        missing = [job for job in jobs if job.row is None]
        if respelled := [job for job in found if job.row and job.row.own_key]:
            found = [job for job in found if job not in respelled]
            self._take_own_keys(pipeline, respelled)
        if complete:
            if pipeline.is_beside and missing:
                # A lane may have written embeddings while the row was deleted.
                self.write(pipeline, missing, None)
            else:
                self._forget(pipeline, missing)
            return found, []
        return found, missing

    def _take_own_keys(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Settles jobs whose key is written in another way than that of their row, which is queued by its own key."""
        keys: dict[int, dict[str, list[int]]] = defaultdict(dict)
        for job in jobs:
            if job.row and job.row.own_key:
                # A type that writes a key in another way each time it reads it ends here.
                keys[job.attempts + 1][job.row.own_key] = job.message_ids
        for attempts, own in keys.items():
            if attempts < MAX_ATTEMPTS:
                self._database.requeue(pipeline.id, list(own), attempts, [ids[0] for ids in own.values()])
        self._forget(pipeline, jobs)

    def to_embed(self, pipeline: Pipeline, jobs: list[Job]) -> list[tuple[Job, str]]:
        """The jobs that need vectors, once with each text to send. All others are settled here.

        Settled are rows without a text, rows whose vectors are of this text already, and texts that must not be cut.
        """
        if not jobs:
            return []
        known_rows = self._database.digests(pipeline, [job.key for job in jobs])
        chosen: list[tuple[Job, str]] = []
        blank: list[Job] = []
        empty: list[Job] = []
        unchanged: list[Job] = []
        rearranged: list[Job] = []
        cutting_seconds = 0.0
        has_split = False
        for job in jobs:
            if job.row is not None and job.row.content is None and job.row.size > MAX_TEXT_BYTES:
                size = job.row.size >> 20
                self._ledger.fail(job, f"the text has {size} MB, and a lane reads at most {MAX_TEXT_BYTES >> 20} MB")
                continue
            if not job.content or job.content.isspace():
                (blank if job.has_embedding else empty).append(job)
                continue
            job.digest = pipeline.digest(job.content, job.prefix)
            known = known_rows.get(job.key)
            if known is not None and job.row is not None and known.describes(job.row, job.digest):
                job.vector_digest = job.row.vector_digest
                unchanged.append(job)
                continue
            if known is not None and (wait := known.wait_seconds(job.digest)):
                reason = "something else keeps replacing its embedding"
                if known.vector_digest == ECHO:
                    reason = "a trigger changes its text each time that its embedding is written"
                self._ledger.retry(job, wait, reason)
                continue
            if job.row is not None and job.row.is_locked:
                self._ledger.retry(job, LOCKED_DELAY_SECONDS, LOCKED)
                continue
            if pipeline.chunking == FUNCTION and job.parts is None:
                if has_split and not self._owners.has_time(pipeline):
                    # The next claim has time for it.
                    self._ledger.release(job)
                    continue
                has_split = True
                self._find_parts(pipeline, job)
                if job.outcome is not None:
                    continue
            if job.ranges is None and is_long(pipeline, job.content):
                self.uncut.append(job)
                continue
            if pipeline.is_beside:
                if cutting_seconds > self._owners.share_seconds:
                    # Some texts take ten times as long as others of their length.
                    self._ledger.release(job)
                    continue
                kept = job.row.digests if job.row and (known is None or known.keeps_vectors) else ()
                began_at = time.monotonic()
                try:
                    texts = self._cut(pipeline, job, kept)
                except Fault as fault:
                    self._ledger.fail(job, str(fault))
                    continue
                finally:
                    cutting_seconds += time.monotonic() - began_at
            else:
                content = job.content
                texts = [sent_of(pipeline, content)]
                job.truncated = len(texts[0]) < len(content)
            if job.truncated:
                self.note_cut(job)
            if job.outcome is not None:
                continue
            if job.row is not None and not (pipeline.is_beside and pipeline.chunking != NONE):
                # The text index has no more of a text that is not cut.
                job.row.keep_beginning(MAX_CHARACTERS)
            if texts:
                chosen += [(job, text) for text in texts]
            else:
                rearranged.append(job)
        self._record_unchanged(pipeline, unchanged)
        if rearranged:
            self.write_complete(pipeline, rearranged)
        if blank:
            self.write(pipeline, blank, None)
        self._forget(pipeline, empty)
        return chosen

    def _find_parts(self, pipeline: Pipeline, job: Job) -> None:
        """Finds where the pieces of the owner's function are in a text. A row of which it makes none is settled."""
        try:
            job.parts = self._cutter.parts(pipeline, job.content or "")
        except Fault as fault:
            self._ledger.fail(job, str(fault))
        except RowError as error:
            if not self._blame_others(pipeline, [job], error):
                self.retry_or_fail(job, error)

    def note_cut(self, job: Job) -> None:
        """The text of a row has been cut, by the model or before: that is recorded, or fails the row."""
        job.truncated = True
        if not job.pipeline.truncate and job.outcome is None:
            limit = most_tokens_of(job.pipeline.model)
            self._ledger.fail(job, f"the text has more than the {limit} tokens that the model takes")

    def _cut(self, pipeline: Pipeline, job: Job, kept: Sequence[bytes]) -> list[str]:
        """Cuts the text of a row into chunks. Returns the texts of those that have no vector yet.

        kept: the digests of the chunks whose vectors are good.
        """
        content, prefix = job.content or "", job.prefix
        ranges = job.ranges or self._cutter.ranges(pipeline, content, job.parts, prefix)
        job.truncated = pipeline.chunking == NONE and ranges[-1][1] < len(content)
        sources = dict(zip(kept, job.row.numbers, strict=False)) if kept and job.row else {}
        job.chunks = []
        job.ranges = None
        for number, (start, end) in enumerate(ranges, 1):
            digest = pipeline.model.chunk_digest(prefix + content[start:end])
            source = sources.get(digest)
            job.chunks.append(Chunk(start, end, digest, source is not None, number=number, source=source))
        new = [chunk for chunk in job.chunks if not chunk.is_kept]
        job.is_long = job.row is not None and changes(job.row, job.chunks) >= KEPT_CHUNKS
        job.wanted = defaultdict(list)
        if job.is_long:
            digests = [chunk.digest for chunk in job.chunks]
            paid = self._database.paid_chunks(pipeline, job.key)
            unpaid = {chunk.digest: chunk for chunk in reversed(new) if chunk.digest not in paid}
            job.unsent = list(unpaid.values())
            first = first_number(job.row, digests) if job.row else 1
            for number, chunk in enumerate(job.chunks, first):
                chunk.number = number
            return self.next_texts(job, FIRST_SENT_CHUNKS)
        for chunk in new:
            job.wanted[prefix + content[chunk.start : chunk.end]].append(chunk)
        return list(job.wanted)

    def next_texts(self, job: Job, count: int) -> list[str]:
        """The next texts to send for a long text. Few of its chunks are under way at a time."""
        texts: list[str] = []
        content = job.content or ""
        while job.unsent and len(texts) < count:
            chunk = job.unsent.pop()
            texts.append(job.prefix + content[chunk.start : chunk.end])
            job.wanted[texts[-1]].append(chunk)
        return texts

    def keep(self, job: Job, chunks: Sequence[Chunk]) -> None:
        """Keeps vectors of a long text in the database until the row is written. A lane that goes on finds them."""
        try:
            self._database.pay_chunks(job.pipeline, job.key, chunks)
        except RowError as error:
            self.retry_or_fail(job, error)
        for chunk in chunks:
            chunk.vector = None

    def writable(self, pipeline: Pipeline, chosen: list[tuple[Job, str]]) -> list[tuple[Job, str]]:
        """Those of the rows to send that would take their vectors, as far as that is in doubt.

        Before the first text of a pipeline is paid for, a write is tried, and again once a row has refused its vector.
        A row that was to blame before is tried, too. Embeddings beside the rows need no row to take them.
        """
        if pipeline.is_beside:
            return chosen
        jobs = list(dict.fromkeys(job for job, _ in chosen))
        if jobs and not self._owners.take_vectors(pipeline):
            self._try(pipeline, jobs[:1])
            if jobs[0].outcome is None:
                self._owners.took_vectors(pipeline)
            else:
                self._try(pipeline, jobs[1:])
        else:
            self._try(pipeline, [job for job in jobs if job.attempts])
        return [(job, text) for job, text in chosen if job.outcome is None]

    def _try(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Decides on rows that would not take their vectors now. Those that the owner's time leaves no try go back."""
        parts = [jobs] if jobs else []
        while parts:
            part = parts.pop()
            if not self._owners.has_time(pipeline):
                for job in part:
                    self._ledger.release(job)
                continue
            with self._clock(pipeline):
                parts += self._try_part(pipeline, part)

    def _try_part(self, pipeline: Pipeline, jobs: list[Job]) -> list[list[Job]]:
        """Decides on rows in one statement. Returns the parts to try of those that it does not suffice for."""
        try:
            outcomes = self._database.try_write(
                pipeline,
                [job.key for job in jobs],
                [job.text_digest for job in jobs],
                [job.version for job in jobs],
            )
        except RowError as error:
            if self._blame_others(pipeline, jobs, error):
                return []
            if len(jobs) > 1:
                return list(batching.halves(jobs))
            # The read had the lock of the table a moment ago, so an error of a lock is a trigger's, and counts.
            counted = RowError(str(error), sqlstate=error.sqlstate)
            self.retry_or_fail(jobs[0], counted, at_once=not (error.may_pass or error.locked))
            return []
        for job in jobs:
            if outcomes.get(job.key) == "skipped":
                self.retry_or_fail(job, RowError(SKIPPED))
            elif outcomes.get(job.key) == "locked":
                self._ledger.retry(job, LOCKED_DELAY_SECONDS, LOCKED)
        return []

    def refuse(self, job: Job, reason: str, *, at_once: bool, alone: bool = False) -> None:
        """Fails a row whose text the model does not take. A row that has another text by now is read again.

        at_once: another try does not help. Otherwise the row has all its attempts. alone: its text travels alone then.
        """
        if not at_once and job.attempts + 1 < MAX_ATTEMPTS:
            if alone:
                self._ledger.suspect([job], reason, 2.0**job.attempts, counts=True)
            else:
                self._ledger.retry(job, 2.0**job.attempts, reason, counts=True)
            return
        digest = job.text_digest
        for existing in self.read(job.pipeline, [job]):
            if existing.text_digest == digest:
                self._ledger.fail(existing, reason, kind=REFUSED)
            else:
                self._retry_changed(existing)

    def write_complete(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Writes the chunks of rows that have all their vectors."""
        import numpy as np

        for job in jobs:
            if job.is_long:
                self._writes.append(Write(pipeline, [job], None, left=job.chunks))
        jobs = [job for job in jobs if not job.is_long]
        if not jobs:
            return
        vectors = [chunk.vector for job in jobs for chunk in job.chunks if chunk.vector is not None]
        together = np.concatenate([*vectors, np.empty(0, np.float32)]).reshape(-1, pipeline.model.dimensions)
        for job in jobs:
            for chunk in job.chunks:
                chunk.vector = None
        self.write(pipeline, jobs, together)

    def write(self, pipeline: Pipeline, jobs: list[Job], vectors: np.ndarray | None) -> None:
        """Writes the vectors (None: NULLs) of the rows whose text is still the same.

        What the time of an owner's code does not suffice for is left to write_some().
        """
        self._writes.append(Write(pipeline, jobs, vectors))
        while self._owners.has_time(pipeline) and self._writes:
            last = self._writes[-1]
            # The time is that of this pipeline. The writes of others have their own.
            if last.due_at > 0.0 or last.pipeline.id != pipeline.id:
                return
            self._write_part(self._writes.pop())

    def write_some(self) -> None:
        """Writes what was left and is due by now, for the time that one owner's code has."""
        now = time.monotonic()
        for _ in range(len(self._writes)):
            write = self._writes.popleft()
            if write.due_at > now:
                self._writes.append(write)
            elif write.until is not None and write.until < now:
                for job in write.jobs:
                    self._ledger.retry(job, LOCKED_DELAY_SECONDS, LOCKED)
            else:
                self._write_part(write)
            if time.monotonic() - now > self._owners.share_seconds:
                return

    def _write_part(self, write: Write) -> None:
        """Writes as many rows as one statement takes. The others stay."""
        if write.left:
            with self._clock(write.pipeline):
                self._write_chunks(write)
            return
        count = min(self._statement_rows(write.pipeline, write.jobs), _indexed_rows(write.pipeline, write.jobs))
        if len(write.jobs) > count:
            self._writes.append(write.part(range(count, len(write.jobs))))
            write = write.part(range(count))
        with self._clock(write.pipeline):
            self._write_whole(write)

    def _write_whole(self, write: Write) -> None:
        """Writes rows in one statement, and settles each by its outcome."""
        pipeline, jobs, vectors = write.pipeline, write.jobs, write.vectors
        began_at = time.monotonic()
        try:
            keys, digests = [job.key for job in jobs], [job.text_digest for job in jobs]
            versions = [job.version for job in jobs]
            if pipeline.is_beside:
                chunks = [job.chunks if vectors is not None else [] for job in jobs]
                prefixes = [job.prefix for job in jobs]
                outcomes = self._database.write_chunks(pipeline, keys, digests, versions, prefixes, chunks, vectors)
            else:
                outcomes = self._database.write(pipeline, keys, digests, versions, vectors)
        except RowError as error:
            if self._blame_others(pipeline, jobs, error):
                return
            if error.locked:
                self._keep(write, list(range(len(jobs))))
                return
            self._owners.failed(pipeline, len(jobs))
            self._owners.refused_vectors(pipeline)
            if len(jobs) > 1:
                # The statements have fewer rows, until the row that does not take its vector stands alone.
                self._writes.append(write)
            else:
                self.retry_or_fail(jobs[0], error, at_once=not error.may_pass)
            return
        except self._database.Error as error:
            self.blame(pipeline, jobs, error)
            return
        self.written += len(jobs)
        self._settle_written(write, outcomes)
        self._owners.took(pipeline, len(jobs), time.monotonic() - began_at)

    def _write_chunks(self, write: Write) -> None:
        """Writes a part of the chunks of a long text. The others stay, and other rows have their turn first."""
        import numpy as np

        pipeline, [job] = write.pipeline, write.jobs
        count = self._owners.statement_rows(pipeline, chunks=True)
        part, left = write.left[:count], write.left[count:]
        wanted = [chunk.digest for chunk in part if not chunk.is_kept]
        numbers = range(job.chunks[0].number, job.chunks[0].number + len(job.chunks))
        began_at = time.monotonic()
        try:
            vectors = None
            if wanted:
                paid = self._database.paid_vectors(pipeline, job.key, wanted)
                if not paid.keys() >= set(wanted):
                    # Another lane has written the row, or its owner has emptied the table.
                    self._retry_changed(job)
                    return
                vectors = np.stack([paid[digest] for digest in wanted])
            outcomes = self._database.write_chunks(
                pipeline,
                [job.key],
                [job.text_digest],
                [write.version or job.version],
                [job.prefix],
                [part],
                vectors,
                numbers=numbers,
                is_last=not left,
            )
        except RowError as error:
            if self._blame_others(pipeline, [job], error):
                return
            if error.locked:
                self._keep(write, [0])
            elif error.slow and len(part) > 1:
                self._owners.failed(pipeline, len(part), chunks=True)
                self._writes.append(write)
            else:
                self.retry_or_fail(job, error, at_once=not error.may_pass)
            return
        except self._database.Error as error:
            self.blame(pipeline, [job], error)
            return
        self._owners.took(pipeline, len(part), time.monotonic() - began_at, chunks=True)
        written = outcomes[job.key]
        if left and written.outcome == "written":
            self._writes.append(Write(pipeline, [job], None, left=left, version=written.version))
            return
        self.written += 1
        digest = digest_of_chunks([chunk.digest for chunk in job.chunks])
        self._settle_written(write, {job.key: Written(written.outcome, digest)})

    def _settle_written(self, write: Write, outcomes: Mapping[str, Written]) -> None:
        """Settles the rows of a statement by their outcomes."""
        pipeline, jobs = write.pipeline, write.jobs
        by_outcome: dict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            by_outcome[outcomes[job.key].outcome].append(job)
            job.vector_digest = outcomes[job.key].vector_digest
        self._keep(write, [i for i, job in enumerate(jobs) if outcomes[job.key].outcome == "locked"])
        written = by_outcome["written"]
        if write.vectors is None and not write.left:
            self._forget(pipeline, written)
        elif written:
            self._owners.took_vectors(pipeline)
            self._record(pipeline, written, written=True)
        if by_outcome["skipped"]:
            self._owners.refused_vectors(pipeline)
        for job in by_outcome["changed"]:
            self._retry_changed(job)
        for job in by_outcome["skipped"]:
            self.retry_or_fail(job, RowError(SKIPPED))
        self._forget(pipeline, by_outcome["gone"])

    def _keep(self, write: Write, indexes: list[int]) -> None:
        """Keeps the vectors of rows that were locked, for another try."""
        if not indexes:
            return
        now = time.monotonic()
        kept = write.part(indexes)
        kept.due_at = now + LOCK_POLL_SECONDS
        kept.until = now + LOCK_PATIENCE_SECONDS if write.until is None else write.until
        self._writes.append(kept)

    def _record(self, pipeline: Pipeline, jobs: list[Job], *, written: bool) -> None:
        """Settles rows whose vector is of their text. written: it was written now."""
        try:
            self._database.record_embedded(
                pipeline,
                [job.key for job in jobs],
                [job.digest for job in jobs],
                [job.vector_digest for job in jobs],
                [job.truncated for job in jobs],
                written=written,
            )
            if pipeline.text_config is not None:
                self._index_texts(pipeline, jobs, written=written)
        except RowError as error:
            self._settle_one_by_one(partial(self._record, written=written), pipeline, jobs, error)
            return
        for job in jobs:
            self._ledger.done(job)

    def _index_texts(self, pipeline: Pipeline, jobs: list[Job], *, written: bool) -> None:
        """Puts the texts of rows whose digests are recorded into the text index, where they are not yet."""
        if not written:
            unindexed = self._database.unindexed(pipeline, [job.key for job in jobs])
            jobs = [job for job in jobs if job.key in unindexed]
        texts: list[tuple[int, int, str]] = []
        size, first = 0, 0
        for end, job in enumerate(jobs, 1):
            room = MAX_CHARACTERS
            for number, text in enumerate(self._texts_of(pipeline, job), job.first_number):
                texts += [(end - first, number, part) for part in parts(text[:room])]
                room = max(0, room - len(text))
            size += MAX_CHARACTERS - room
            if size > STATEMENT_CHARACTERS or end == len(jobs):
                some = jobs[first:end]
                if texts:
                    self._database.index_texts(pipeline, [job.key for job in some], [job.digest for job in some], texts)
                texts, size, first = [], 0, end

    def _texts_of(self, pipeline: Pipeline, job: Job) -> list[str]:
        """The texts of a row that have a vector each, without what they are embedded behind."""
        content = job.content or ""
        if not pipeline.is_beside or pipeline.chunking == NONE:
            # A model may read less of it.
            return [content[:MAX_CHARACTERS]]
        ranges = [(chunk.start, chunk.end) for chunk in job.chunks]
        if not ranges:
            try:
                ranges = job.ranges or self._cutter.ranges(pipeline, content, job.parts, job.prefix)
            except Fault as fault:
                raise RowError(str(fault)) from fault
        return [content[start:end] for start, end in ranges]

    def _forget(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Settles rows that need no vector: deleted ones, and those without a text."""
        if not jobs:
            return
        try:
            self._database.forget(pipeline, [job.key for job in jobs])
        except RowError as error:
            self._settle_one_by_one(self._forget, pipeline, jobs, error)
            return
        for job in jobs:
            self._ledger.done(job)

    def _settle_one_by_one(
        self, settle: Callable[[Pipeline, list[Job]], None], pipeline: Pipeline, jobs: list[Job], error: RowError
    ) -> None:
        """Settles jobs in halves, until the one that the error is about stands alone."""
        if self._blame_others(pipeline, jobs, error):
            return
        if len(jobs) == 1 or error.locked:
            for job in jobs:
                self.retry_or_fail(job, error)
            return
        for half in batching.halves(jobs):
            settle(pipeline, half)

    def _retry_changed(self, job: Job) -> None:
        """Has a row read again whose text changed during its request. This counts as an attempt."""
        if job.attempts + 1 < MAX_ATTEMPTS:
            self._ledger.retry(job, CHANGED_DELAY_SECONDS, counts=True)
            return
        # Another lane may have embedded the new text already.
        unembedded = self.to_embed(job.pipeline, self.read(job.pipeline, [job]))
        for without_vector in dict.fromkeys(one for one, _ in unembedded):
            self._ledger.fail(without_vector, "its text was different each time it was read", kind=CHANGES)

    def _blame_others(self, pipeline: Pipeline, jobs: Sequence[Job], error: RowError) -> bool:
        """Decides on jobs whose rows are not to blame for an error. Returns whether that is so.

        The table may have become unusable since the claim, or have been dropped, or its embeddings have moved, or its
        functions were not there, or PostgreSQL may refuse the statement for any row, or the owner's code fails for all
        of them. A full disk makes the pipeline rest. A cancel is counted, since the code of the owner may have raised
        it, and ends the pass, since it may be a real one.
        """

        def look() -> Pipeline | None:
            return self._database.pipelines([pipeline.id], after_error=True).get(pipeline.id)

        if error.sqlstate == DISK_FULL:
            # Where an owner's code may have raised it, its rows have their attempts.
            is_owners = self._database.runs_owners_code(pipeline, writes=True)
            self._database.rest_pipelines(pipeline.owner, [pipeline.id], str(error))
            for job in jobs:
                if is_owners:
                    self.retry_or_fail(job, error)
                else:
                    self._ledger.release(job, str(error))
            return True
        now = None
        if not (error.cancels or error.locked or error.slow):
            # A dump of an older version brings its functions, which are made again now.
            now = look()
            if now is not None and now.blocked is None and not now.was_rebuilt:
                keys = [job.key for job in jobs] if error.is_of_code else []
                error = self._database.plan_again(pipeline.id, keys) or error
                now = look()
        if error.cancels:
            for job in jobs:
                self.retry_or_fail(job, error)
            self._database.rest_pipelines(pipeline.owner, [], str(error))
            raise PassEnded(str(error))
        if error.locked or error.slow:
            return False
        is_as_before = now is not None and now.is_beside == pipeline.is_beside and not now.was_rebuilt
        if now is not None and now.blocked is None and is_as_before:
            return False
        for job in jobs:
            if now is None:
                self._ledger.done(job)
            else:
                self._ledger.release(job, now.blocked)
        return True

    def blame(self, pipeline: Pipeline, jobs: list[Job], error: Exception) -> None:
        """Lets a pipeline rest whose rows have raised an error that nobody expected. The others go on."""
        if self._database.is_nobodys(error):
            raise error
        self._database.rest_pipelines(pipeline.owner, [pipeline.id], str(error))
        for job in jobs:
            if job.outcome is None:
                self.retry_or_fail(job, RowError(str(error)))

    def retry_or_fail(self, job: Job, error: RowError, *, at_once: bool = False) -> None:
        """Decides on a row that caused an error. at_once: it fails without further attempts."""
        if error.locked:
            self._ledger.retry(job, LOCKED_DELAY_SECONDS, str(error))
        elif at_once or job.attempts + 1 >= MAX_ATTEMPTS:
            self._ledger.fail(job, str(error), kind=f"an error with SQLSTATE {error.sqlstate}")
        else:
            self._ledger.retry(job, 2.0**job.attempts, str(error), counts=True)
