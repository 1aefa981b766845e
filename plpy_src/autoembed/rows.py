"""The rows of a pass: their texts are read, their vectors are written, and the ledger learns the outcome of each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autoembed import batching
from autoembed.errors import RowError
from autoembed.jobs import MAX_ATTEMPTS, Job, Ledger
from autoembed.providers import sizes_of

if TYPE_CHECKING:
    import numpy as np

    from autoembed.database import Database
    from autoembed.records import Pipeline

# A lane claims no more rows than it can write in this time, in seconds.
AHEAD_SECONDS = 1.0
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


class Rows:
    """Reads and writes the rows of a pass."""

    def __init__(self, database: Database, ledger: Ledger, pace: Pace) -> None:
        self._database = database
        self._ledger = ledger
        self._pace = pace
        self._locked: list[tuple[Job, np.ndarray | None]] = []

    @property
    def some_are_locked(self) -> bool:
        """Whether vectors wait for rows that were locked when they were to be written."""
        return bool(self._locked)

    def read(self, pipeline: Pipeline, jobs: list[Job]) -> list[Job]:
        """Reads the texts; returns the jobs whose row exists.

        If the content function fails, the jobs are halved until the row that it fails for stands alone.
        """
        try:
            rows = self._database.rows(pipeline, [job.key for job in jobs])
        except RowError as error:
            if self._release_if_blocked(pipeline, jobs, error):
                return []
            if len(jobs) > 1 and not error.locked:
                return [job for half in batching.halves(jobs) for job in self.read(pipeline, half)]
            for job in jobs:
                self._retry_or_fail(job, error)
            return []
        self._forget(pipeline, [job for job in jobs if job.key not in rows])
        for job in jobs:
            job.row = rows.get(job.key)
        return [job for job in jobs if job.row is not None]

    def to_embed(self, pipeline: Pipeline, jobs: list[Job]) -> list[tuple[Job, str]]:
        """The jobs that need a vector, each with the text to send. All others are settled here.

        Settled are rows without a text, rows whose vector is of this text already, and texts that must not be cut.
        """
        if not jobs:
            return []
        digests = self._database.digests(pipeline, [job.key for job in jobs])
        limit = sizes_of(pipeline.model).tokens_per_input
        prefix = pipeline.model.prefix("document")
        chosen: list[tuple[Job, str]] = []
        blank: list[Job] = []
        empty: list[Job] = []
        unchanged: list[Job] = []
        for job in jobs:
            if job.content is None or not job.content.strip():
                (blank if job.has_embedding else empty).append(job)
                continue
            job.digest = pipeline.model.digest(job.content)
            if job.has_embedding and digests.get(job.key) == job.digest:
                unchanged.append(job)
                continue
            text = job.content if limit is None else batching.truncate(job.content, limit, prefix)
            job.truncated = text is not job.content
            if job.truncated and not pipeline.truncate:
                self._ledger.fail(job, f"the text has more than the {limit} tokens that the model takes")
            else:
                chosen.append((job, text))
        if unchanged:
            self._record(pipeline, unchanged)
        if blank:
            self.write(pipeline, blank, None)
        self._forget(pipeline, empty)
        return chosen

    def fail_unless_changed(self, job: Job, reason: str) -> None:
        """Fails a row whose text was refused. A row that has another text by now is read again."""
        content = job.content
        for existing in self.read(job.pipeline, [job]):
            if existing.content == content:
                self._ledger.fail(existing, reason)
            else:
                self._retry_changed(existing)

    def write(self, pipeline: Pipeline, jobs: list[Job], vectors: np.ndarray | None) -> None:
        """Writes the vectors (None: NULLs) of the rows whose text is still the same.

        If a row does not take its vector, the jobs are halved until it stands alone.
        """
        began_at = time.monotonic()
        try:
            outcomes = self._database.write(pipeline, [job.key for job in jobs], [job.content for job in jobs], vectors)
            self._pace.wrote(len(jobs), time.monotonic() - began_at)
        except RowError as error:
            if self._release_if_blocked(pipeline, jobs, error):
                return
            if error.locked:
                self._note_locked(jobs, vectors, range(len(jobs)))
            elif len(jobs) > 1:
                middle = len(jobs) // 2
                self.write(pipeline, jobs[:middle], None if vectors is None else vectors[:middle])
                self.write(pipeline, jobs[middle:], None if vectors is None else vectors[middle:])
            else:
                self._retry_or_fail(jobs[0], error, at_once=True)
            return
        by_outcome: dict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            by_outcome[outcomes[job.key]].append(job)
        self._note_locked(jobs, vectors, [i for i, job in enumerate(jobs) if outcomes[job.key] == "locked"])
        written = by_outcome["written"]
        if vectors is None:
            self._forget(pipeline, written)
        elif written:
            self._record(pipeline, written)
        for job in by_outcome["changed"]:
            self._retry_changed(job)
        self._forget(pipeline, by_outcome["gone"])

    def write_locked(self, check_interrupts: Callable[[], None]) -> None:
        """Tries for a moment to write the rows that were locked, then gives them back to the queue."""
        end = time.monotonic() + LOCK_PATIENCE_SECONDS
        while self._locked and time.monotonic() < end:
            self._ledger.flush()
            self._database.commit(synced=False)
            check_interrupts()
            time.sleep(LOCK_POLL_SECONDS)
            self._database.lock_lanes()
            locked, self._locked = self._locked, []
            for job, vector in locked:
                self.write(job.pipeline, [job], vector)
        for job, _ in self._locked:
            self._ledger.retry(job, LOCKED_DELAY_SECONDS, "the row or its table is locked by another transaction")

    def _note_locked(self, jobs: Sequence[Job], vectors: np.ndarray | None, indexes: Sequence[int]) -> None:
        for i in indexes:
            self._locked.append((jobs[i], None if vectors is None else vectors[i : i + 1]))

    def _record(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Settles rows whose vector is of their text."""
        self._database.record_embedded(
            pipeline,
            [job.key for job in jobs],
            [job.digest for job in jobs],
            [job.truncated for job in jobs],
        )
        for job in jobs:
            self._ledger.done(job)

    def _forget(self, pipeline: Pipeline, jobs: Sequence[Job]) -> None:
        """Settles rows that need no vector: deleted ones, and those without a text."""
        if jobs:
            self._database.forget(pipeline, [job.key for job in jobs])
        for job in jobs:
            self._ledger.done(job)

    def _retry_changed(self, job: Job) -> None:
        """Has a row read again whose text changed during its request. This counts as an attempt."""
        if job.attempts + 1 < MAX_ATTEMPTS:
            self._ledger.retry(job, CHANGED_DELAY_SECONDS, counts=True)
            return
        # Another lane may have embedded the new text already.
        for without_vector, _ in self.to_embed(job.pipeline, self.read(job.pipeline, [job])):
            self._ledger.fail(without_vector, "its text was different each time it was read")

    def _release_if_blocked(self, pipeline: Pipeline, jobs: Sequence[Job], error: RowError) -> bool:
        """Releases the jobs if their table has become unusable since the claim. Returns whether it has."""
        now = None if error.passes else self._database.pipelines([pipeline.id]).get(pipeline.id)
        if now is None or now.blocked is None:
            return False
        for job in jobs:
            self._ledger.release(job, now.blocked)
        return True

    def _retry_or_fail(self, job: Job, error: RowError, *, at_once: bool = False) -> None:
        """Decides on a row that caused an error. at_once: it fails without further attempts."""
        if error.passes:
            self._ledger.retry(job, LOCKED_DELAY_SECONDS, str(error))
        elif at_once or job.attempts + 1 >= MAX_ATTEMPTS:
            self._ledger.fail(job, str(error))
        else:
            self._ledger.retry(job, 2.0**job.attempts, str(error), counts=True)
