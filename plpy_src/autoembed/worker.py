"""The path of a job: claim, embed, apply. Database and network are handed in, so this module needs no plpy."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from autoembed import batching, heap, providers
from autoembed.cutting import Cutter
from autoembed.errors import (
    CameLate,
    Fault,
    OverBudget,
    PassEnded,
    ProviderTrouble,
    RanTooLong,
    Refused,
    RowError,
    rest_seconds,
)
from autoembed.flight import SLICE_SECONDS, Flight, Turns
from autoembed.jobs import Job, Ledger, Report, are_keys, open_jobs
from autoembed.limits import FIRST_ANSWER_SECONDS, NOTHING_KNOWN
from autoembed.model import Embedded, Model, Request, Share, Trial
from autoembed.outbox import Outbox
from autoembed.providers import PROVIDERS, provider_of, sizes_of
from autoembed.rows import OWNER_READ_BYTES, READ_BYTES, Owners, Pace, Rows, Speeds, owners_of_few

if TYPE_CHECKING:
    import numpy as np

    from autoembed.database.lanes import Database
    from autoembed.network import Network
    from autoembed.records import Backfill, Chunk, Message, Pipeline

# The default of batch_size in process() and work(), in texts.
DEFAULT_BATCH_SIZE = 100
# Added to the time that a request may take, in seconds: the database's own work on a claim.
LEASE_MARGIN_SECONDS = 60.0
# The pause of an idle lane between two looks at the queue, in seconds.
POLL_SECONDS = 0.1
# The same for a lane that does backfills alone, in seconds: nobody waits for these.
BACKFILL_POLL_SECONDS = 1.0
# The pause of a lane that holds all it may between two looks for rows of other owners, in seconds.
FULL_POLL_SECONDS = 0.3
# A lane cleans up, and checks whether it is still wanted, this often, in seconds.
LOOK_AROUND_SECONDS = 1.0
# One look scans tables that have no rows to embed for so long at most, in seconds: an owner may have thousands of them.
SCAN_SECONDS = 0.3
# A lane for backfills merges so many times in each look, if there is as much to merge.
BACKFILL_MERGES = 5
# The threads of a lane, as a multiple of the requests that one model may have at a time.
THREADS_PER_REQUEST = 4
# Requests to a model that embeds in this process: one is worked on, the next one waits.
REQUESTS_HERE = 2
# A call of an SQL function holds up its lane, so it may take so long, in seconds, unless its model says otherwise.
FUNCTION_SECONDS = 1.0
# A lane whose time is up waits so long for its answers, in seconds.
ENDING_SECONDS = 2.0
# A model that has failed so often is asked by a probe before it is sent texts.
ASKED_AFTER_FAILURES = 2


@dataclass(frozen=True)
class Options:
    """The settings of a pass: texts per request, requests at a time, and seconds for each."""

    batch_size: int
    max_requests: int
    timeout_seconds: float

    @property
    def max_rows(self) -> int:
        return self.batch_size * self.max_requests

    @property
    def lease_seconds(self) -> float:
        return self.timeout_seconds + LEASE_MARGIN_SECONDS


def work(
    database: Database,
    network: Network,
    options: Options,
    run_seconds: float,
    *,
    backfill: bool = False,
    look_around: Callable[[], None] = lambda: None,
) -> None:
    """Runs a lane: makes passes until its time is up or it is told to end. While idle it polls the queue.

    backfill: the lane scans tables and leaves the queue to others. look_around: is called once a second.
    """
    lane = _Lane(database, network, options, run_seconds, backfill=backfill, look_around=look_around)
    database.warn_of_blocked_pipelines([])
    database.commit()
    try:
        while lane.goes_on():
            if lane.works():
                continue
            if backfill:
                database.sleep(BACKFILL_POLL_SECONDS)
            else:
                time.sleep(POLL_SECONDS)
    except PassEnded:
        # The lane ends in good order. pg_cron begins another one.
        pass
    finally:
        database.leave_lane()
        database.commit()


class _Lane:
    """The state that a lane keeps from one pass to the next."""

    def __init__(
        self,
        database: Database,
        network: Network,
        options: Options,
        run_seconds: float,
        *,
        backfill: bool,
        look_around: Callable[[], None],
    ) -> None:
        self._database = database
        self._network = network
        self._options = options
        # A lane that ends in time is not logged as a statement that was cancelled.
        limit = database.statement_timeout_seconds()
        self._ends_at = time.monotonic() + (run_seconds if limit is None else min(run_seconds, limit / 2))
        self._backfill = backfill
        self._look_around = look_around
        self._is_wanted = True
        self._look_around_at = 0.0
        self._scan_at = 0.0
        self._has_worked = False
        # How often this lane has tried messages that other lanes may have died of.
        self.survived = 0
        indexed = database.enter_lane(backfill=backfill)
        self.pace = Pace(options.batch_size, options.max_rows, indexed=indexed)
        self.owners = Owners()
        self.speeds = Speeds()
        self.turns = Turns()

    def goes_on(self) -> bool:
        """Whether the lane's time is not up and nobody has told it to end. Cleans up now and then."""
        now = time.monotonic()
        if now >= self._look_around_at:
            self._look_around_at = now + LOOK_AROUND_SECONDS
            self._is_wanted = self._database.lane_is_wanted()
            if self._is_wanted:
                self._database.clean_up()
                self._database.commit()
                self._merge_segments()
            self._database.commit()
            self._look_around()
            if self._has_worked:
                heap.trim()
                self._has_worked = False
        return self._is_wanted and now < self._ends_at

    def _merge_segments(self) -> None:
        # A backfill writes more segments in the time between two looks than one merge takes.
        for _ in range(BACKFILL_MERGES if self._backfill else 1):
            if not self._database.merge_segments(dedicated=self._backfill):
                break
            self._database.commit()

    def works(self) -> bool:
        """Makes a pass, if something is due. Returns whether it was."""
        messages = self.claim(
            self.pace.max_rows(), [], sorted(self.speeds.not_allowed()), sorted(self.owners.resting())
        )
        if not messages:
            self._database.commit()
            return False
        self._has_worked = True
        _run(self._database, self._network, self._options, messages, self)
        if any(message.read_count > 1 for message in messages):
            self.survived += 1
        return True

    def claim(self, max_rows: int, held: list[int], busy_models: list[str], busy_owners: list[int]) -> list[Message]:
        """Claims due messages or, if there are none, the next rows of a backfill."""
        messages: list[Message] = []
        if not self._backfill:
            messages = self._database.claim(max_rows, self._options.lease_seconds, held, busy_models, busy_owners)
        if not messages and time.monotonic() >= self._scan_at:
            messages = _claim_backfill(
                self._database, self._options, self.speeds, self._backfill, max_rows, held, busy_models, busy_owners
            )
            self._scan_at = 0.0 if messages else time.monotonic() + LOOK_AROUND_SECONDS
        return messages


def run_pass(database: Database, network: Network, options: Options) -> Report:
    """Makes one pass over the queue or, if nothing is due, over the next rows of a backfill.

    A bad row, a bad answer or a dead provider raises nothing: the report says so.
    """
    messages = database.claim(options.max_rows, options.lease_seconds, [], [], [])
    if not messages:
        messages = _claim_backfill(database, options, Speeds(options.batch_size), False, options.max_rows, [], [], [])
    if not messages:
        return Report()
    return _run(database, network, options, messages, None)


def _run(database: Database, network: Network, options: Options, messages: list[Message], lane: _Lane | None) -> Report:
    """Makes one pass. In a lane, it claims further rows while requests are in flight."""
    ledger = Ledger(database, messages)
    try:
        # The commit waits for the disk: a row that crashes the server, even while it is read, finds the try counted.
        database.commit()
        return _Pass(database, network, options, ledger, lane).run(messages)
    except PassEnded:
        ledger.release_open()
        ledger.flush()
        database.commit()
        if lane is not None:
            raise
        return ledger.report
    except BaseException as error:
        # After a cancel or a shutdown, all that is not done goes back to the queue at once. A message that breaks its
        # pass is to be found: the reads stay counted, and the lane that ends gives the messages back.
        if not isinstance(error, Exception) or database.may_pass(error):
            ledger.release_open()
        ledger.flush()
        raise


def _claim_backfill(
    database: Database,
    options: Options,
    speeds: Speeds,
    dedicated: bool,
    max_rows: int,
    held: list[int],
    busy_models: list[str],
    busy_owners: list[int],
) -> list[Message]:
    """The next rows of a table that is being scanned, as one message that is claimed already."""
    ends_at = time.monotonic() + SCAN_SECONDS
    messages: list[Message] | None = []
    while not messages:
        backfill = database.next_backfill(dedicated=dedicated, busy_models=busy_models, busy_owners=busy_owners)
        if backfill is None:
            break
        messages = _scanned(database, options, speeds, backfill, max_rows, held)
        if messages is None or time.monotonic() >= ends_at:
            break
    return messages or []


def _scanned(
    database: Database, options: Options, speeds: Speeds, backfill: Backfill, max_rows: int, held: list[int]
) -> list[Message] | None:
    """The next rows of this table. None: it has to be scanned again later."""
    if backfill.problem:
        database.fail_backfill(backfill, backfill.problem)
        return []
    max_rows = min(max_rows, speeds.texts_ahead(backfill.model, backfill.provider) or max_rows)
    if backfill.failures:
        # A provider that failed last time is tried with one row.
        max_rows = 1
    try:
        keys, exhausted = database.scan(backfill, max_rows)
        if are_keys(keys):
            return database.queue_backfill(
                backfill, keys, exhausted=exhausted, lease_seconds=options.lease_seconds, held=held
            )
        database.fail_backfill(backfill, "the scan with its condition returned something that is not a key")
    except RowError as error:
        if error.locked:
            return None
        if error.cancels or error.slow:
            database.rest_pipelines(backfill.owner, [backfill.pipeline_id], str(error))
            return None
        database.fail_backfill(backfill, str(error))
    return []


@dataclass(eq=False)
class Cut:
    """A job whose long text is cut into chunks in a thread."""

    job: Job


# A thread gives the answer to a request, or where the chunks of a text start and end.
_Flight = Flight[Request | Cut, Embedded | list[tuple[int, int]]]
_Outcome = Embedded | list[tuple[int, int]] | BaseException


class _Stopped(Exception):
    """The pass ends, and with it what its threads do."""


class _TimeIsUp(Exception):
    """The lane has waited long enough for its last answers."""


class _Pass:
    """The way of claimed messages to their end, and of those that are claimed meanwhile."""

    def __init__(
        self, database: Database, network: Network, options: Options, ledger: Ledger, lane: _Lane | None
    ) -> None:
        self._database = database
        self._network = network
        self._options = options
        self._ledger = ledger
        # None: nothing further is claimed in this pass.
        self._lane = lane
        self._in_lane = lane is not None
        self._survived = lane.survived if lane else 0
        self._pace = lane.pace if lane else Pace(options.batch_size, options.max_rows, indexed=True)
        self._owners = lane.owners if lane else Owners(lasts=False)
        # Where no lane is held up, requests are small only once one has run too long.
        self._speeds = lane.speeds if lane else Speeds(options.batch_size)
        self._turns = lane.turns if lane else Turns()
        self._rows = Rows(database, ledger, self._owners)
        self._outboxes: dict[Model, Outbox] = {}
        # Requests that are handed to threads and may not be sent yet.
        self._leaving: list[Request] = []
        # The job whose text is being cut in a thread, and whether that is to stop.
        self._cut: Cut | None = None
        self._stopped = threading.Event()
        self._cutter = Cutter(self._check_stopped)
        self._flight: _Flight | None = None
        self._lease_ends = time.monotonic() + options.lease_seconds
        self._claim_at = time.monotonic() + POLL_SECONDS
        self._ends_at: float | None = None

    def run(self, messages: list[Message]) -> Report:
        if any(message.read_count > 1 for message in messages):
            # Lanes died, perhaps because of these: nothing else is to be in flight beside them.
            self._lane = None
        threads = THREADS_PER_REQUEST * self._options.max_requests
        with _Flight(threads, self._between_waits, self._abort, self._of_few, self._turns) as flight:
            try:
                self._flight = flight
                self._load(flight, messages)
                while flight or self._has_work():
                    for landed, outcome in flight.landed():
                        self._wait_until_sent()
                        self._database.lock_lanes()
                        if isinstance(landed, Cut):
                            self._land_cut(landed.job, outcome)
                            self._send(flight)
                        else:
                            self._land(flight, landed, outcome)
                        self._commit()
                        self._launch(flight)
                    if self._has_work():
                        time.sleep(SLICE_SECONDS)
                        self._between_waits()
            except _TimeIsUp:
                # The requests that are left are ended, and their jobs released.
                for outbox in self._outboxes.values():
                    outbox.keep_suspects("the lane's time was up")
            finally:
                self._flight = None
                for model, outbox in self._outboxes.items():
                    self._free(model, outbox.slots)
        self._ledger.release_open()
        self._commit()
        return self._ledger.report

    # Claim ---------------------------------------------------------------------------------------

    def _load(self, flight: _Flight, messages: list[Message], *, first: bool = False) -> None:
        """Reads the rows of claimed messages, and sends their texts. first: before those that wait."""
        began_at = time.monotonic()
        self._owners.begin_claim()
        most = self._texts_ahead if self._in_lane else None
        work = open_jobs(self._database, self._ledger, messages, self._options.max_rows, most, self._survived)
        for pipeline, jobs in self._owners.quickest_first(work):
            if time.monotonic() - began_at > POLL_SECONDS or self._owners.is_slow(pipeline):
                # The texts of quick owners do not wait for those of slow ones.
                self._send(flight, first=first)
                self._wait_until_sent()
            try:
                self._read(pipeline, jobs)
            except self._database.Error as error:
                self._rows.blame(pipeline, jobs, error)
            self._commit()
        self._send(flight, first=first)

    def _read(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Reads the rows of one pipeline, and embeds them."""
        jobs = self._rows.without_unwritten(pipeline, jobs)
        self._embed(pipeline, self._rows.read(pipeline, jobs, self._room(pipeline.owner)))

    def _room(self, owner: int) -> int:
        """The bytes of texts to read of an owner. What is held, keys included, leaves a part of the room."""
        held: Counter[int] = Counter()
        for outbox in self._outboxes.values():
            for text, jobs in outbox.jobs.items():
                held[jobs[0].pipeline.owner] += len(text) + sum(len(job.key) for job in jobs)
        for job in self._long_jobs():
            held[job.pipeline.owner] += len(job.content or "") + len(job.key)
        return max(READ_BYTES - held.total(), OWNER_READ_BYTES - held[owner])

    def _embed(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Puts the texts of rows that were read into the outbox of their model."""
        self._put(self._rows.writable(pipeline, self._rows.to_embed(pipeline, jobs)))

    def _put(self, chosen: Iterable[tuple[Job, str]]) -> None:
        for job, text in chosen:
            self._outbox(job.pipeline).put(job, text)

    def _cut_next(self, flight: _Flight) -> None:
        """Has the shortest of the long texts cut into chunks. Several at a time would leave the lane little time."""
        if self._cut is None and self._rows.uncut:
            job = min(self._rows.uncut, key=lambda job: len(job.content or ""))
            self._rows.uncut.remove(job)
            self._cut = Cut(job)
            content = job.content or ""
            flight.submit(self._cut, partial(self._cutter.ranges, job.pipeline, content, job.parts, job.prefix))

    def _land_cut(self, job: Job, outcome: _Outcome) -> None:
        self._cut = None
        match outcome:
            case list():
                job.ranges = outcome
                try:
                    self._embed(job.pipeline, [job])
                except self._database.Error as error:
                    self._rows.blame(job.pipeline, [job], error)
            case Fault():
                self._ledger.fail(job, str(outcome))
            case Exception():
                self._ledger.fail(job, f"an unexpected {type(outcome).__name__} when the text was cut into chunks")
            case BaseException():
                raise outcome

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def _send(self, flight: _Flight, *, first: bool = False) -> None:
        few = self._owners_of_few()
        for model, outbox in self._outboxes.items():
            unsent = outbox.take_unsent()
            # In requests of their own, so that their answers do not wait until those of others are written. If limits
            # allow few requests, all travel together.
            apart = set() if outbox.limiter.needs_permits else few
            suspects = outbox.suspects_in(unsent)
            unsent = [text for text in unsent if not any(text in group for group in suspects)]
            of_few = dict.fromkeys(text for text in unsent if apart and outbox.owners_of([text]) <= apart)
            self._submit(model, [text for text in unsent if text not in of_few], first=first)
            self._submit(model, list(of_few), first=True)
            asks = suspects or outbox.failures >= ASKED_AFTER_FAILURES
            if asks and not (outbox.accepted or outbox.trouble or outbox.is_idle):
                outbox.ask_first()
            for group in suspects:
                outbox.has_suspects = True
                self._submit(model, group, suspect=True)
        self._launch(flight)
        self._cut_next(flight)

    def _owners_of_few(self) -> set[int]:
        """The owners of few of the rows that the lane holds. They do not wait for those of many."""
        return owners_of_few(Counter(job.pipeline.owner for job in self._held_jobs()))

    def _of_few(self, landed: Sequence[Request | Cut]) -> Sequence[Request | Cut]:
        """Those of these requests whose rows, if there are any, are all of owners of few."""
        few = self._owners_of_few()
        return [
            one
            for one in landed
            if few and isinstance(one, Request) and self._outboxes[one.model].owners_of(one.texts) <= few
        ]

    def _outbox(self, pipeline: Pipeline) -> Outbox:
        outbox = self._outboxes.get(pipeline.model)
        if outbox is None or outbox.is_idle:
            self._speeds.recall(pipeline.model.name, pipeline.model.inputs_taken)
            outbox = Outbox(
                pipeline.model,
                self._rows,
                self._ledger,
                self._timeout_seconds(pipeline.model),
                self._stopped,
                pipeline.failures,
            )
            self._outboxes[pipeline.model] = outbox
        return outbox

    def _claim_more(self, flight: _Flight, lane: _Lane) -> None:
        """Claims rows for the requests that could also be in flight, so that providers do not wait for writes.

        Models that do not answer are left out of the account.
        """
        batch_size = self._options.batch_size
        busy = {model.name for model, outbox in self._outboxes.items() if outbox.is_busy or self._holds_enough(model)}
        others = [outbox for model, outbox in self._outboxes.items() if model.name not in busy]
        # In requests: those the lane may hold, those it holds, and those that may be added.
        most = self._pace.max_rows() // batch_size
        held = -(-sum(len(jobs) for outbox in others for jobs in outbox.jobs.values()) // batch_size)
        under_way = sum(len(outbox.in_flight) + len(outbox.waiting) for outbox in others)
        free = min(self._options.max_requests - under_way, most - held)
        now = time.monotonic()
        if now < self._claim_at and 2 * free < most:
            return
        self._claim_at = now + (POLL_SECONDS if free > 0 else FULL_POLL_SECONDS)
        # A lane that is full has room for owners that it holds nothing of, and sends their texts first.
        holders = {job.pipeline.owner for job in self._held_jobs()} if free < 1 else set()
        # A provider that has failed is tried with one request.
        shaky = {model.name for model, outbox in self._outboxes.items() if outbox.needs_care}
        self._database.lock_lanes()
        messages = lane.claim(
            max(free, 1) * batch_size,
            self._ledger.open_message_ids(),
            sorted(busy | shaky | self._speeds.not_allowed()),
            # The code of an owner is slow, or the rows are many. What is claimed now would only wait behind it.
            sorted(self._rows.owners_behind() | self._owners.resting() | holders),
        )
        self._ledger.take(messages)
        self._database.commit()
        suspects = [message for message in messages if message.read_count > 1]
        if suspects:
            self._ledger.release_messages(suspects)
            self._lane = None
        self._load(flight, [message for message in messages if message.read_count == 1], first=free < 1)

    def _held_jobs(self) -> Iterator[Job]:
        """The jobs that wait for an answer, or for their turn to be sent or cut."""
        for outbox in self._outboxes.values():
            for jobs in outbox.jobs.values():
                yield from jobs
        yield from self._long_jobs()

    def _long_jobs(self) -> Iterator[Job]:
        """The jobs with long texts that wait to be cut, sent or written."""
        yield from self._rows.uncut
        if self._cut is not None:
            yield self._cut.job
        for outbox in self._outboxes.values():
            yield from outbox.long
        yield from self._rows.long_jobs()

    # Embed ---------------------------------------------------------------------------------------

    def _holds_enough(self, model: Model) -> bool:
        """Whether a model that embeds in this process has enough to do for a while."""
        ahead = self._texts_ahead(model)
        return ahead is not None and len(self._outboxes[model].jobs) >= ahead

    def _texts_ahead(self, model: Model) -> int | None:
        return self._speeds.texts_ahead(model.name, model.provider)

    def _submit(self, model: Model, texts: Sequence[str], *, first: bool = False, suspect: bool = False) -> None:
        """Packs texts into requests, which are sent when the limits of their model allow. first: before others."""
        outbox = self._outboxes[model]
        sizes = sizes_of(model, outbox.limiter.learnt)
        most = self._speeds.most_texts(model.name, min(self._options.batch_size, sizes.inputs_per_request))
        # A new change waits behind the request that is being worked on.
        most = min(most, self._texts_ahead(model) or most)
        packed = batching.pack(texts, most, sizes.tokens_per_request, model.prefix("document"))
        outbox.add([outbox.request(part, suspect=suspect) for part in packed], first=first)

    def _timeout_seconds(self, model: Model) -> float:
        holds_up = self._in_lane and provider_of(model).RUNS_IN_BACKEND
        return model.timeout_seconds or (FUNCTION_SECONDS if holds_up else self._options.timeout_seconds)

    def _has_work(self) -> bool:
        """Whether something is left that is not in flight."""
        waits = any(outbox.has_next for outbox in self._outboxes.values())
        return waits or bool(self._rows.uncut) or self._rows.some_are_unwritten

    def _launch(self, flight: _Flight) -> None:
        """Sends the requests that the limits of their models allow by now."""
        for model, outbox in self._outboxes.items():
            in_backend = provider_of(model).RUNS_IN_BACKEND
            while (request := self._next(flight, outbox)) is not None:
                outbox.send(request)
                self._ledger.report.requests += 1
                if not in_backend:
                    self._leaving.append(request)
                call = partial(providers.embed, request, self._network, self._database.call_embedder)
                flight.submit(request, call, here=in_backend)
            if outbox.permit is not None and not outbox.has_next:
                self._free(model, outbox.take_permit_back())
                self._database.commit()

    def _next(self, flight: _Flight, outbox: Outbox) -> Request | None:
        """The next request of a model, if it may be sent now. Asks for its permit if it has none."""
        self._unroll(outbox)
        request = outbox.next()
        if request is None or not self._has_room(outbox):
            return None
        if not outbox.limiter.needs_permits:
            return request
        if outbox.permit is None:
            self._ask_for_permit(flight, outbox, request)
        at = outbox.permit and outbox.permit.at
        return None if at is None or time.monotonic() < at else request

    def _unroll(self, outbox: Outbox) -> None:
        """Where no request waits, makes one of the next chunks of a long text."""
        while not outbox.waiting and outbox.long and len(outbox.in_flight) < self._options.max_requests:
            job = outbox.long[0]
            if job.outcome is None:
                for text in self._rows.next_texts(job, self._options.batch_size):
                    outbox.put(job, text)
                self._submit(outbox.model, outbox.take_unsent())
            outbox.long.popleft()
            if job.outcome is None and job.unsent:
                outbox.long.append(job)

    def _wait_until_sent(self) -> None:
        """Gives requests a moment to be sent: their threads need the interpreter, which a statement keeps."""
        end = time.monotonic() + SLICE_SECONDS
        for request in self._leaving:
            request.sent.wait(end - time.monotonic())
        self._leaving.clear()

    def _has_room(self, outbox: Outbox) -> bool:
        """Whether one more request to a model may be in flight."""
        model, in_flight = outbox.model, len(outbox.in_flight)
        if in_flight == 0:
            return True
        if in_flight >= min(self._options.max_requests, model.max_requests_in_flight or math.inf):
            return False
        if in_flight >= REQUESTS_HERE and self._texts_ahead(model) is not None:
            return False
        if outbox.is_careful or self._speeds.is_late(model.name):
            return False
        return outbox.limiter.learnt is not None or time.monotonic() >= outbox.began_at + FIRST_ANSWER_SECONDS

    def _ask_for_permit(self, flight: _Flight, outbox: Outbox, request: Request) -> None:
        """Asks for a permit for the next request. Gives the model up if its budget is spent."""
        prefix = outbox.model.prefix("document")
        tokens = sum(batching.estimate_tokens(prefix + text) for text in request.texts)
        patience = outbox.patience()
        charges = outbox.limiter.charge(tokens, time.monotonic())
        permit = self._database.take_permit(outbox.model.name, charges, patience, with_slot=True)
        # The commit comes at once: other lanes wait for their turn.
        self._database.commit()
        if permit.spent is not None:
            trouble = OverBudget(permit.spent, retry_after_seconds=permit.rest_seconds)
            self._give_up_model(flight, outbox, None, trouble)
        elif permit.at is not None:
            outbox.allow(permit, tokens)
        elif permit.possible_at is None and patience > 0:
            outbox.refused_at = outbox.refused_at or time.monotonic()
        else:
            if permit.possible_at is not None:
                self._speeds.allows_from(outbox.model.name, permit.possible_at)
            outbox.run_out_of_patience()
            self._commit()

    def _land(self, flight: _Flight, request: Request, outcome: _Outcome) -> None:
        outbox = self._outboxes[request.model]
        self._note_limits(outbox, request, outcome)
        self._note_time(request, outcome)
        if isinstance(outcome, Refused) and request.probe:
            outcome = ProviderTrouble(f"every request is refused: {outcome}", permanent=True)
        elif isinstance(outcome, Refused) and outbox.trouble is not None:
            outcome = outbox.trouble
        match outcome:
            case RanTooLong() if len(request.texts) > 1:
                self._send_fewer(flight, outbox, request)
            case ProviderTrouble() if outbox.may_be_a_texts(request, outcome):
                outbox.suspend(request, outcome)
            case ProviderTrouble() if outbox.may_be_starting(request, outcome):
                outbox.send_later(request)
            case ProviderTrouble():
                self._give_up_model(flight, outbox, request, outcome)
            case Refused():
                outbox.refuse(request, outcome)
            case Exception():
                # A mistake in this code must not end every lane again and again. Its text may hold a key.
                trouble = ProviderTrouble(
                    f"an unexpected {type(outcome).__name__} in the provider {request.model.provider}"
                )
                self._give_up_model(flight, outbox, request, trouble)
            case BaseException():
                raise outcome
            case Embedded(vectors, tokens):
                if outcome.seconds is not None:
                    self._speeds.embedded(request.model.name, len(request.texts), outcome.seconds)
                self._database.note_usage(request.model.name, self._shares(request, tokens), request.slot)
                self._accept(outbox, request, vectors, outcome.cut)

    def _note_time(self, request: Request, outcome: _Outcome) -> None:
        """Has a slow server be sent fewer texts at a time, and more once it answers quickly."""
        if request.probe:
            return
        name = request.model.name
        before = self._speeds.inputs_taken(name)
        if isinstance(outcome, CameLate):
            self._speeds.came_late(name, len(request.texts))
        elif isinstance(outcome, Embedded) and 4 * (time.monotonic() - request.sent_at) < request.timeout_seconds:
            self._speeds.came_early(name)
        if self._speeds.inputs_taken(name) != before:
            # The next lane, or the next call of process(), does not begin with a request that is too large.
            self._database.learn_inputs_taken(name, self._speeds.inputs_taken(name))

    def _note_limits(self, outbox: Outbox, request: Request, outcome: _Outcome) -> None:
        """Takes the model's limits from an answer. A request that failed frees its slot."""
        outbox.land(request)
        if isinstance(outcome, Embedded):
            outbox.limiter.correct_estimate(request.tokens, outcome.tokens)
        elif request.slot is not None:
            self._free(request.model, {request.slot})
        if outbox.limiter.learn_from(outcome, time.monotonic()):
            self._database.learn_limits(request.model.name, outbox.limiter.learnt or NOTHING_KNOWN)
            # The requests that still wait may have too many tokens.
            self._submit(outbox.model, outbox.unpack())

    def _send_fewer(self, flight: _Flight, outbox: Outbox, request: Request) -> None:
        """Sends the texts of a request that took an SQL function too long again, fewer at a time."""
        self._speeds.ran_too_long(request.model.name, len(request.texts), request.timeout_seconds)
        self._withdraw(flight, outbox)
        unpacked = outbox.unpack()
        if request.suspect:
            self._submit(outbox.model, request.texts, suspect=True)
            self._submit(outbox.model, unpacked)
        else:
            self._submit(outbox.model, [*request.texts, *unpacked])

    def _withdraw(self, flight: _Flight, outbox: Outbox) -> None:
        """Takes back the requests of a model that were handed over, and have not begun."""
        withdrawn = flight.withdraw(lambda other: isinstance(other, Request) and other.model == outbox.model)
        requests = [other for other in withdrawn if isinstance(other, Request)]
        self._ledger.report.requests -= len(requests)
        self._leaving = [other for other in self._leaving if other not in requests]
        self._free(outbox.model, outbox.take_back(requests))

    def _free(self, model: Model, slots: Iterable[int]) -> None:
        if slots:
            self._database.free_slots(model.name, sorted(slots))

    def _shares(self, request: Request, tokens: int | None) -> list[Share]:
        """The part of each pipeline in a request, its tokens estimated. A text of several pipelines is the first's."""
        texts: dict[int | None, list[str]] = defaultdict(list)
        rows: dict[int | None, int] = defaultdict(int)
        for text in request.texts:
            jobs = [] if request.probe or request.trial else self._outboxes[request.model].jobs[text]
            texts[jobs[0].pipeline.id if jobs else None].append(text)
            for job in jobs:
                rows[job.pipeline.id] += 1
        if tokens is not None and len(texts) == 1:
            [(pipeline_id, own)] = texts.items()
            return [Share(pipeline_id, 1, len(own), tokens, rows[pipeline_id])]
        parts = [sum(map(batching.estimate_tokens, own)) for own in texts.values()]
        counted = sum(parts) if tokens is None else tokens
        return [
            Share(pipeline_id, int(number == 0), len(own), counted * part // sum(parts), rows[pipeline_id])
            for number, ((pipeline_id, own), part) in enumerate(zip(texts.items(), parts, strict=True))
        ]

    def _accept(self, outbox: Outbox, request: Request, vectors: np.ndarray, cut: Iterable[int]) -> None:
        # A probe that went first says little of texts: it passes limits that they exceed.
        if outbox.failures and not outbox.asks_first:
            self._database.resume_model(request.model.name)
            outbox.failures = 0
        if request.trial is not None:
            self._learn_tokens_taken(outbox, request.trial)
        elif not request.probe:
            for number in cut:
                for job in outbox.jobs[request.texts[number]]:
                    self._rows.note_cut(job)
            self._apply(request, vectors)
            for text in request.texts:
                del outbox.jobs[text]
        outbox.accept(request)

    def _learn_tokens_taken(self, outbox: Outbox, trial: Trial) -> None:
        """Notes the length that a model takes. The rows whose texts were too long are read, cut and sent again."""
        if self._database.learn_tokens_taken(outbox.model.name, trial.tokens):
            self._database.log(
                f'autoembed cuts texts for model "{outbox.model.name}" at about {trial.tokens} tokens: '
                "its provider has refused a longer one"
            )
        outbox.read_shorter()

    def _give_up_model(
        self, flight: _Flight, outbox: Outbox, request: Request | None, trouble: ProviderTrouble
    ) -> None:
        """Lets the model rest, for all lanes, and releases what was to be sent, and the request that failed."""
        if outbox.trouble is not trouble:
            outbox.trouble = trouble
            # Where limits are known, the lanes come back one by one without a random delay.
            paced = outbox.limiter.paces and trouble.retry_after_seconds is not None
            seconds = rest_seconds(trouble, outbox.failures, 0.0 if paced else random.random())
            name = outbox.model.name
            is_new = self._database.rest_model(name, seconds, trouble.permanent, trouble)
            if is_new and self._lane is not None:
                # The server's log has one warning for each outage.
                self._database.warn_of_blocked_pipelines([name])
        self._withdraw(flight, outbox)
        outbox.give_up(request, str(trouble))

    # Apply ---------------------------------------------------------------------------------------

    def _apply(self, request: Request, vectors: np.ndarray) -> None:
        # A row that was queued again during its request has two jobs, and one statement writes it only once.
        turns: Counter[tuple[int, str]] = Counter()
        by_statement: dict[tuple[int, int], list[tuple[Job, int]]] = defaultdict(list)
        landed: dict[Job, list[Chunk]] = defaultdict(list)
        for index, text in enumerate(request.texts):
            for job in self._outboxes[request.model].jobs[text]:
                for chunk in job.wanted.pop(text, ()):
                    chunk.vector = vectors[index]
                    landed[job].append(chunk)
                # Another chunk may have no vector yet, or have been refused.
                if not (job.wanted or job.unsent) and job.outcome is None:
                    turns[job.pipeline.id, job.key] += 1
                    by_statement[job.pipeline.id, turns[job.pipeline.id, job.key]].append((job, index))
        for job, chunks in landed.items():
            if job.is_long and job.outcome is None:
                self._rows.keep(job, chunks)
        with self._paced():
            for matched in sorted(by_statement.values(), key=lambda one: self._owners.slowness(one[0][0].pipeline)):
                jobs = [job for job, _ in matched]
                if jobs[0].pipeline.is_beside:
                    self._rows.write_complete(jobs[0].pipeline, jobs)
                else:
                    self._rows.write(jobs[0].pipeline, jobs, vectors[[index for _, index in matched]])
                if len(by_statement) > 1:
                    # The row locks of one owner do not wait for the code of another.
                    self._commit()
                    self._database.lock_lanes()

    @contextmanager
    def _paced(self) -> Iterator[None]:
        """Takes note of how long the rows take that are written in the block, with all that belongs to it."""
        before, began_at = self._rows.written, time.monotonic()
        yield
        if self._rows.written > before:
            self._pace.wrote(self._rows.written - before, time.monotonic() - began_at)

    # In between ----------------------------------------------------------------------------------

    def _commit(self, *, synced: bool = False) -> None:
        """Commits. Not synced: a crash may undo the work; its messages are then in the queue again."""
        self._ledger.flush()
        self._database.commit(synced=synced)

    def _between_waits(self) -> None:
        """The work of the backend's own thread between two waits for answers."""
        self._database.check_interrupts()
        self._network.expire()
        if self._rows.some_are_unwritten:
            self._database.lock_lanes()
            with self._paced():
                self._rows.write_some()
                self._commit()
        if self._lane is not None and not self._lane.goes_on():
            self._lane = None
            self._ends_at = time.monotonic() + ENDING_SECONDS
        if self._ends_at is not None and time.monotonic() > self._ends_at:
            raise _TimeIsUp
        if self._flight is not None:
            self._launch(self._flight)
            if self._lane is not None:
                self._claim_more(self._flight, self._lane)
        if self._lease_ends - time.monotonic() < self._options.timeout_seconds:
            self._database.extend(self._ledger.open_message_ids(), self._options.lease_seconds)
            self._database.commit()
            self._lease_ends = time.monotonic() + self._options.lease_seconds

    def _abort(self) -> None:
        self._stopped.set()
        self._network.abort()
        for provider in PROVIDERS.values():
            provider.abort()
