"""The path of a job: claim, embed, apply. Database and network are handed in, so this module needs no plpy."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from autoembed import batching, heap, providers
from autoembed.answers import shorter_limit
from autoembed.cutting import Cutter
from autoembed.errors import (
    CameLate,
    Fault,
    FellOver,
    OverBudget,
    PassEnded,
    ProviderTrouble,
    RanTooLong,
    Refused,
    RowError,
    Trouble,
    rest_seconds,
)
from autoembed.flight import SLICE_SECONDS, Flight, Turns
from autoembed.jobs import Job, Ledger, Report, are_keys, open_jobs
from autoembed.limits import FIRST_ANSWER_SECONDS, NOTHING_KNOWN, PATIENCE_SECONDS, Limiter, Permit
from autoembed.model import Embedded, Model, Request, Share, Trial
from autoembed.providers import PROVIDERS, provider_of, sizes_of
from autoembed.rows import OWNER_READ_BYTES, READ_BYTES, Owners, Pace, Rows, Speeds, owners_of_few

if TYPE_CHECKING:
    import numpy as np

    from autoembed.database.lanes import Database
    from autoembed.network import Network
    from autoembed.records import Chunk, Message, Pipeline

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
# A lane for backfills merges so many times in each look, if there is as much to merge.
BACKFILL_MERGES = 5
# A model that has not answered for this long, in seconds, holds up no other: nothing more is claimed for it.
BUSY_SECONDS = 1.0
# The threads of a lane, as a multiple of the requests that one model may have at a time.
THREADS_PER_REQUEST = 4
# Requests to a model that embeds in this process: one is worked on, the next one waits.
REQUESTS_HERE = 2
# A call of an SQL function holds up its lane, so it may take so long, in seconds, unless its model says otherwise.
FUNCTION_SECONDS = 1.0
# A lane whose time is up waits so long for its answers, in seconds.
ENDING_SECONDS = 2.0
# A server that has ended a connection without an answer may start again for so long, in seconds.
RESTART_SECONDS = 10.0
# A model that has failed so often is asked by a probe before it is sent texts.
ASKED_AFTER_FAILURES = 2
# The pause between two tries to reach it, in seconds.
RESTART_POLL_SECONDS = 0.5
# A text that no model refuses. It shows whether a text or the whole request is to blame.
PROBE = "autoembed"


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
        messages = self.claim(self.pace.max_rows(), [], [], sorted(self.owners.resting()))
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
    backfill = database.next_backfill(dedicated=dedicated, busy_models=busy_models, busy_owners=busy_owners)
    if backfill is None:
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
        if error.cancels or error.slow:
            database.rest_pipelines(backfill.owner, [backfill.pipeline_id], str(error))
        elif not error.locked:
            database.fail_backfill(backfill, str(error))
    return []


@dataclass
class Outbox:
    """One model's part of a pass.

    jobs: the open ones, by text. unsent: texts that no request holds yet. accepted: the model has answered in this
    pass. suspended: requests that failed, until it is known whether the model answers others.
    too_long: texts that were refused for their length, and wait for the outcome of a trial, each with its trouble.
    long: long texts with chunks that no request holds yet: they take turns, behind all that waits.
    waiting: requests that the model's limits do not allow yet. permit: that of the first. slots: all that are held.
    fell_at: when its server last ended a connection without an answer; None: not since a text was last looked for.
    has_suspects: there are texts of which one may have felled the server before this pass.
    asks_first: nothing is sent before a probe is answered.
    again_at: until then, nothing is sent.
    """

    limiter: Limiter
    jobs: dict[str, list[Job]] = field(default_factory=lambda: defaultdict(list))
    unsent: list[str] = field(default_factory=list)
    long: deque[Job] = field(default_factory=deque)
    accepted: bool = False
    trouble: ProviderTrouble | None = None
    suspended: list[tuple[Request, Trouble]] = field(default_factory=list)
    too_long: dict[str, Trouble] = field(default_factory=dict)
    failures: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    in_flight: int = 0
    permit: Permit | None = None
    slots: set[int] = field(default_factory=set)
    fell_at: float | None = None
    has_suspects: bool = False
    asks_first: bool = False
    again_at: float = 0.0
    began_at: float = field(default_factory=time.monotonic)
    # When the model last answered, or was first asked while nothing was in flight.
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def is_busy(self) -> bool:
        """Whether the model has not answered for a while."""
        return self.in_flight > 0 and time.monotonic() - self.heard_at > BUSY_SECONDS

    @property
    def needs_care(self) -> bool:
        """Whether the model has failed, and has open jobs still."""
        return not self.is_idle and bool(self.trouble or self.suspended or self.failures)

    @property
    def is_idle(self) -> bool:
        """Whether nothing of the model is open."""
        return not (self.jobs or self.in_flight or self.waiting or self.suspended or self.unsent or self.long)


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
                while flight or self._waiting() or self._rows.uncut or self._rows.some_are_unwritten:
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
                    if self._waiting() or self._rows.uncut or self._rows.some_are_unwritten:
                        time.sleep(SLICE_SECONDS)
                        self._between_waits()
            except _TimeIsUp:
                # The requests that are left are ended, and their jobs released.
                for outbox in self._outboxes.values():
                    self._keep_suspects(outbox, "the lane's time was up")
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
            outbox = self._outbox(job.pipeline)
            if text not in outbox.jobs:
                outbox.unsent.append(text)
            outbox.jobs[text].append(job)
            if job.unsent and job not in outbox.long:
                outbox.long.append(job)

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
            unsent, outbox.unsent = outbox.unsent, []
            # In requests of their own, so that their answers do not wait until those of others are written. If limits
            # allow few requests, all travel together.
            apart = set() if outbox.limiter.needs_permits else few
            suspects = self._suspects_in(outbox, unsent)
            unsent = [text for text in unsent if not any(text in group for group in suspects)]
            of_few = dict.fromkeys(text for text in unsent if apart and self._owners_of(outbox, [text]) <= apart)
            self._submit(model, [text for text in unsent if text not in of_few], first=first)
            self._submit(model, list(of_few), first=True)
            asks = suspects or outbox.failures >= ASKED_AFTER_FAILURES
            if asks and not (outbox.accepted or outbox.trouble or outbox.is_idle):
                self._ask_first(model, outbox)
            for group in suspects:
                outbox.has_suspects = True
                self._submit(model, list(group), suspect=True)
        self._launch(flight)
        self._cut_next(flight)

    def _ask_first(self, model: Model, outbox: Outbox) -> None:
        """Sends a probe before all others: a server that is not there does not fall over a text."""
        if outbox.in_flight == 0 and outbox.permit is None and not any(other.probe for other in outbox.waiting):
            outbox.waiting.appendleft(self._request(model, [PROBE], probe=True))
            outbox.asks_first = True

    @staticmethod
    def _suspects_in(outbox: Outbox, texts: Iterable[str]) -> list[dict[str, None]]:
        """Those of these texts of which one may have felled the server, in groups that travel apart."""
        groups: dict[int, dict[str, None]] = defaultdict(dict)
        for text in texts:
            if number := next((job.suspects for job in outbox.jobs[text] if job.suspects), 0):
                groups[number][text] = None
        return list(groups.values())

    def _owners_of_few(self) -> set[int]:
        """The owners of few of the rows that the lane holds. They do not wait for those of many."""
        return owners_of_few(Counter(job.pipeline.owner for job in self._held_jobs()))

    @staticmethod
    def _owners_of(outbox: Outbox, texts: Iterable[str]) -> set[int]:
        return {job.pipeline.owner for text in texts for job in outbox.jobs.get(text, ())}

    def _of_few(self, landed: Sequence[Request | Cut]) -> Sequence[Request | Cut]:
        """Those of these requests whose rows, if there are any, are all of owners of few."""
        few = self._owners_of_few()
        return [
            one
            for one in landed
            if few and isinstance(one, Request) and self._owners_of(self._outboxes[one.model], one.texts) <= few
        ]

    def _outbox(self, pipeline: Pipeline) -> Outbox:
        outbox = self._outboxes.get(pipeline.model)
        if outbox is None or outbox.is_idle:
            self._speeds.recall(pipeline.model.name, pipeline.model.inputs_taken)
            outbox = self._outboxes[pipeline.model] = Outbox(Limiter(pipeline.model), failures=pipeline.failures)
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
        under_way = sum(outbox.in_flight + len(outbox.waiting) for outbox in others)
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
            sorted(busy | shaky),
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
        requests = [self._request(model, part, suspect=suspect) for part in packed]
        if not first:
            outbox.waiting.extend(requests)
            return
        # A probe, and a request that has its permit, keep their place.
        has_place = outbox.waiting and (outbox.waiting[0].probe or outbox.permit is not None)
        ahead = [outbox.waiting.popleft()] if has_place else []
        outbox.waiting.extendleft(reversed([*ahead, *requests]))

    def _request(self, model: Model, texts: Sequence[str], *, probe: bool = False, suspect: bool = False) -> Request:
        holds_up = self._in_lane and provider_of(model).RUNS_IN_BACKEND
        usual = FUNCTION_SECONDS if holds_up else self._options.timeout_seconds
        seconds = model.timeout_seconds or usual
        return Request(model, texts, seconds, probe=probe, suspect=suspect, stopped=self._stopped)

    def _waiting(self) -> int:
        return sum(len(outbox.waiting) + len(outbox.long) for outbox in self._outboxes.values())

    def _launch(self, flight: _Flight) -> None:
        """Sends the requests that the limits of their models allow by now."""
        for model, outbox in self._outboxes.items():
            provider = provider_of(model)
            while self._has_next(model, outbox) and self._is_its_turn(flight, model, outbox):
                request = outbox.waiting.popleft()
                if outbox.permit is not None:
                    request.slot, outbox.permit = outbox.permit.slot, None
                self._ledger.report.requests += 1
                if outbox.in_flight == 0:
                    outbox.heard_at = time.monotonic()
                outbox.in_flight += 1
                request.sent_at = time.monotonic()
                if not provider.RUNS_IN_BACKEND:
                    self._leaving.append(request)
                call = partial(providers.embed, request, self._network, self._database.call_embedder)
                flight.submit(request, call, here=provider.RUNS_IN_BACKEND)

    def _has_next(self, model: Model, outbox: Outbox) -> bool:
        """Whether a request waits. If none does, the next chunks of a long text become one."""
        while not outbox.waiting and outbox.long and outbox.in_flight < self._options.max_requests:
            job = outbox.long[0]
            if job.outcome is None:
                self._put([(job, text) for text in self._rows.next_texts(job, self._options.batch_size)])
                unsent, outbox.unsent = outbox.unsent, []
                self._submit(model, unsent)
            outbox.long.popleft()
            if job.outcome is None and job.unsent:
                outbox.long.append(job)
        return bool(outbox.waiting)

    def _wait_until_sent(self) -> None:
        """Gives requests a moment to be sent: their threads need the interpreter, which a statement keeps."""
        end = time.monotonic() + SLICE_SECONDS
        for request in self._leaving:
            request.sent.wait(end - time.monotonic())
        self._leaving.clear()

    def _is_its_turn(self, flight: _Flight, model: Model, outbox: Outbox) -> bool:
        """Whether the first request that waits may be sent now. Asks for its permit if it has none."""
        elapsed = time.monotonic() - outbox.began_at
        if outbox.in_flight >= min(self._options.max_requests, model.max_requests_in_flight or math.inf):
            return False
        is_asked = bool(outbox.suspended or outbox.asks_first)
        if is_asked and not outbox.waiting[0].probe or time.monotonic() < outbox.again_at:
            return False
        if outbox.in_flight >= REQUESTS_HERE and self._texts_ahead(model) is not None:
            return False
        # A text that a server falls over must not take the answers to others with it.
        careful = outbox.fell_at is not None or outbox.has_suspects
        if outbox.in_flight and (careful or self._speeds.is_late(model.name)):
            return False
        if outbox.in_flight and outbox.limiter.learnt is None and elapsed < FIRST_ANSWER_SECONDS:
            return False
        if not outbox.limiter.needs_permits:
            return True
        if outbox.permit is None:
            if elapsed > PATIENCE_SECONDS:
                self._release_waiting(outbox, [], "the model's limits allow no request yet")
                return False
            self._ask_for_permit(flight, outbox)
        return outbox.permit is not None and outbox.permit.at is not None and time.monotonic() >= outbox.permit.at

    def _ask_for_permit(self, flight: _Flight, outbox: Outbox) -> None:
        """Asks for a permit for the first request that waits. Gives the model up if its budget is spent."""
        request = outbox.waiting[0]
        prefix = request.model.prefix("document")
        request.tokens = sum(batching.estimate_tokens(prefix + text) for text in request.texts)
        charges = outbox.limiter.charge(request.tokens, time.monotonic())
        permit = self._database.take_permit(request.model.name, charges, with_slot=True)
        if permit.spent is not None:
            outbox.waiting.popleft()
            self._give_up_model(flight, request, OverBudget(permit.spent, retry_after_seconds=permit.rest_seconds))
        elif permit.at is not None:
            outbox.permit = permit
            outbox.slots.update([] if permit.slot is None else [permit.slot])
        # The commit comes at once: other lanes wait for their turn.
        self._database.commit()

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
                self._send_fewer(flight, request, outbox)
            case ProviderTrouble() if self._may_be_a_texts(outbox, request, outcome):
                self._suspend(request, outcome)
            case ProviderTrouble() if self._may_be_starting(outbox, request, outcome):
                self._send_later(request)
            case ProviderTrouble():
                self._give_up_model(flight, request, outcome)
            case Refused():
                self._refuse(request, outcome)
            case Exception():
                # A mistake in this code must not end every lane again and again. Its text may hold a key.
                trouble = ProviderTrouble(
                    f"an unexpected {type(outcome).__name__} in the provider {request.model.provider}"
                )
                self._give_up_model(flight, request, trouble)
            case BaseException():
                raise outcome
            case Embedded(vectors, tokens):
                if outcome.seconds is not None:
                    self._speeds.embedded(request.model.name, len(request.texts), outcome.seconds)
                self._database.note_usage(request.model.name, self._shares(request, tokens), request.slot)
                self._accept(request, vectors, outcome.cut)

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
        outbox.in_flight -= 1
        outbox.heard_at = time.monotonic()
        outbox.slots.discard(request.slot or 0)
        if isinstance(outcome, Embedded):
            outbox.limiter.correct_estimate(request.tokens, outcome.tokens)
        elif request.slot is not None:
            self._free(request.model, {request.slot})
        if outbox.limiter.learn_from(outcome, time.monotonic()):
            self._database.learn_limits(request.model.name, outbox.limiter.learnt or NOTHING_KNOWN)
            # The requests that still wait may have too many tokens.
            self._pack_again(request.model, outbox, [])

    def _pack_again(self, model: Model, outbox: Outbox, texts: Sequence[str]) -> None:
        """Packs the texts of requests that wait, and these, by what is known now.

        A probe, a trial, suspects and a permit keep theirs.
        """
        waiting: list[Request] = []
        if outbox.permit is None and not any(other.probe or other.trial for other in outbox.waiting):
            waiting = [other for other in outbox.waiting if not other.suspect]
            outbox.waiting = deque(other for other in outbox.waiting if other.suspect)
        self._submit(model, [*texts, *(text for other in waiting for text in other.texts)])

    def _send_fewer(self, flight: _Flight, request: Request, outbox: Outbox) -> None:
        """Sends the texts of a request that took an SQL function too long again, fewer at a time."""
        self._speeds.ran_too_long(request.model.name, len(request.texts), request.timeout_seconds)
        unsent = self._withdraw(flight, request.model, outbox)
        self._pack_again(request.model, outbox, [text for one in [request, *unsent] for text in one.texts])

    def _withdraw(self, flight: _Flight, model: Model, outbox: Outbox) -> list[Request]:
        """Takes back the requests of a model that were handed over, and have not begun."""
        withdrawn = flight.withdraw(lambda other: isinstance(other, Request) and other.model == model)
        unsent = [other for other in withdrawn if isinstance(other, Request)]
        self._ledger.report.requests -= len(unsent)
        outbox.in_flight -= len(unsent)
        return unsent

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

    def _refuse(self, request: Request, refusal: Refused) -> None:
        """Looks for the text to blame, as soon as the model is known to accept others."""
        outbox = self._outboxes[request.model]
        if outbox.accepted:
            self._split(request, refusal)
        else:
            self._suspend(request, refusal)

    @staticmethod
    def _may_be_a_texts(outbox: Outbox, request: Request, trouble: ProviderTrouble) -> bool:
        """Whether a text may be to blame for trouble of a request. A wait that the provider asks for comes first."""
        if request.probe or outbox.trouble is not None or not trouble.may_be_a_texts:
            return False
        return request.suspect or outbox.failures > 0 or not trouble.retry_after_seconds

    @staticmethod
    def _may_be_starting(outbox: Outbox, request: Request, trouble: ProviderTrouble) -> bool:
        """Whether the reason may be that a server that fell over a text is not there again yet."""
        if outbox.trouble is not None or not (isinstance(trouble, FellOver) or request.probe and not trouble.permanent):
            return False
        if trouble.may_be_a_texts and outbox.failures > 0:
            # Something is there, and fails each time.
            return False
        # The request that the server fell over may still be in flight.
        return outbox.in_flight > 0 or (
            outbox.fell_at is not None and time.monotonic() < outbox.fell_at + RESTART_SECONDS
        )

    def _send_later(self, request: Request) -> None:
        """Sends a request again after a pause, a probe before all others."""
        outbox = self._outboxes[request.model]
        again = self._request(request.model, request.texts, probe=request.probe, suspect=request.suspect)
        again.trial = request.trial
        if request.probe:
            outbox.waiting.appendleft(again)
        else:
            outbox.waiting.append(again)
        outbox.again_at = time.monotonic() + RESTART_POLL_SECONDS

    def _suspend(self, request: Request, trouble: Trouble) -> None:
        """Keeps a request that failed until the model has answered another one. Sends a probe."""
        outbox = self._outboxes[request.model]
        if isinstance(trouble, FellOver):
            outbox.fell_at = time.monotonic()
        outbox.suspended.append((request, trouble))
        if len(outbox.suspended) == 1:
            probe = self._request(request.model, [PROBE], probe=True)
            outbox.waiting.appendleft(probe)

    def _accept(self, request: Request, vectors: np.ndarray, cut: Iterable[int]) -> None:
        outbox = self._outboxes[request.model]
        outbox.accepted = True
        # A probe that went first says little of texts: it passes limits that they exceed.
        if outbox.failures and not outbox.asks_first:
            self._database.resume_model(request.model.name)
            outbox.failures = 0
        outbox.asks_first = False
        if request.trial is not None:
            self._learn_tokens_taken(request.model, request.trial)
        elif not request.probe:
            for number in cut:
                for job in outbox.jobs[request.texts[number]]:
                    self._rows.note_cut(job)
            self._apply(request, vectors)
            for text in request.texts:
                del outbox.jobs[text]
        suspended, outbox.suspended = outbox.suspended, []
        for failed, trouble in suspended:
            self._split(failed, trouble)
        if not any(other.suspect for other in outbox.waiting):
            outbox.fell_at = None
            outbox.has_suspects = False

    def _split(self, request: Request, trouble: Trouble) -> None:
        """Halves a request that failed until the text to blame stands alone."""
        outbox = self._outboxes[request.model]
        if len(request.texts) > 1:
            for half in batching.halves(list(request.texts)):
                outbox.waiting.append(self._request(request.model, half, suspect=True))
        elif request.trial is None:
            self._refuse_text(request.model, request.texts[0], trouble)
        elif not self._try_shorter(request.model, request.trial.text, request.texts[0], trouble):
            # Length is not the reason.
            while outbox.too_long:
                self._give_up_text(outbox, *outbox.too_long.popitem())

    def _refuse_text(self, model: Model, text: str, trouble: Trouble) -> None:
        """Fails the rows of a text that stands alone, unless it is too long and may be cut."""
        outbox = self._outboxes[model]
        jobs = outbox.jobs[text]
        cuttable = [job for job in jobs if job.pipeline.may_cut]
        if not cuttable:
            self._give_up_text(outbox, text, trouble)
        elif outbox.too_long:
            if shorter_limit(trouble, self._tokens(model, text)) is None:
                self._give_up_text(outbox, text, trouble)
            else:
                outbox.too_long[text] = trouble
        elif self._try_shorter(model, text, text, trouble):
            outbox.too_long[text] = trouble
        else:
            self._give_up_text(outbox, text, trouble)

    def _try_shorter(self, model: Model, text: str, refused: str, trouble: Trouble) -> bool:
        """Sends the beginning of a text, if the length of the text or beginning that was refused may be the reason."""
        limit = shorter_limit(trouble, self._tokens(model, refused))
        beginning = refused if limit is None else batching.truncate(refused, limit, model.prefix("document"))
        if limit is None or len(beginning) == len(refused) or provider_of(model).RUNS_IN_BACKEND:
            return False
        request = self._request(model, [beginning])
        request.trial = Trial(text, limit)
        self._outboxes[model].waiting.append(request)
        return True

    def _learn_tokens_taken(self, model: Model, trial: Trial) -> None:
        """Notes the length that a model takes. The rows whose texts were too long are read, cut and sent again."""
        if self._database.learn_tokens_taken(model.name, trial.tokens):
            self._database.log(
                f'autoembed cuts texts for model "{model.name}" at about {trial.tokens} tokens: '
                "its provider has refused a longer one"
            )
        outbox = self._outboxes[model]
        while outbox.too_long:
            text, trouble = outbox.too_long.popitem()
            for job in outbox.jobs.pop(text):
                if job.outcome is None and job.pipeline.may_cut:
                    self._ledger.retry(job, 0.0)
                elif job.outcome is None:
                    self._rows.refuse(job, str(trouble), at_once=isinstance(trouble, Refused))

    def _give_up_text(self, outbox: Outbox, text: str, trouble: Trouble) -> None:
        for job in outbox.jobs.pop(text):
            # Another chunk of the row may have been refused before.
            if job.outcome is None:
                is_fall = isinstance(trouble, FellOver)
                self._rows.refuse(job, str(trouble), at_once=isinstance(trouble, Refused), alone=is_fall)

    @staticmethod
    def _tokens(model: Model, text: str) -> int:
        return batching.estimate_tokens(model.prefix("document") + text)

    def _give_up_model(self, flight: _Flight, request: Request, trouble: ProviderTrouble) -> None:
        """Lets the model rest, for all lanes, and releases the jobs that were to be sent."""
        outbox = self._outboxes[request.model]
        if outbox.trouble is not trouble:
            outbox.trouble = trouble
            # Where limits are known, the lanes come back one by one without a random delay.
            paced = outbox.limiter.paces and trouble.retry_after_seconds is not None
            seconds = rest_seconds(trouble, outbox.failures, 0.0 if paced else random.random())
            name = request.model.name
            is_new = self._database.rest_model(name, seconds, trouble.permanent, trouble)
            if is_new and self._lane is not None:
                # The server's log has one warning for each outage.
                self._database.warn_of_blocked_pipelines([name])
        unsent = self._withdraw(flight, request.model, outbox)
        for failed, reason in outbox.suspended:
            self._blame_texts(outbox, failed, reason, str(trouble))
        self._keep_suspects(outbox, str(trouble))
        outbox.accepted = outbox.asks_first = False
        suspended = [refused for refused, _ in outbox.suspended]
        self._release_waiting(outbox, [request, *unsent, *suspended], str(trouble))
        outbox.suspended = []
        for text in outbox.too_long:
            for job in outbox.jobs.pop(text):
                self._ledger.release(job, str(trouble))
        outbox.too_long.clear()

    def _blame_texts(self, outbox: Outbox, request: Request, trouble: Trouble, rests_for: str) -> None:
        """Has the text be looked for that has felled a server for longer than a pass waits.

        The texts of the request travel without others from now on. If they did so already, and the model had answered
        before, each half of them goes on without the other, until the row to blame stands alone. rests_for: why the
        model rests.
        """
        if request.trial or not isinstance(trouble, ProviderTrouble) or isinstance(trouble, CameLate):
            return
        # In an outage, no text is to blame. It may be one that began just now.
        may_be = outbox.accepted or not (request.suspect or outbox.failures or trouble.permanent)
        jobs = self._open_jobs(outbox, request) if may_be else []
        if not request.suspect:
            self._ledger.suspect(jobs, rests_for)
        elif len(jobs) == 1 or len(request.texts) == 1:
            for job in jobs:
                self._rows.refuse(job, str(trouble), at_once=False, alone=True)
        else:
            for half in batching.halves(jobs):
                self._ledger.suspect(half, rests_for)

    def _keep_suspects(self, outbox: Outbox, reason: str) -> None:
        """Gives suspects of which nothing is known yet back to the queue, as they would have been sent."""
        for request in [*(failed for failed, _ in outbox.suspended), *outbox.waiting]:
            if request.suspect:
                self._ledger.suspect(self._open_jobs(outbox, request), reason)

    @staticmethod
    def _open_jobs(outbox: Outbox, request: Request) -> list[Job]:
        """The jobs of a request's texts that have no outcome."""
        jobs = dict.fromkeys(job for text in request.texts for job in outbox.jobs.get(text, ()))
        return [job for job in jobs if job.outcome is None]

    def _release_waiting(self, outbox: Outbox, requests: Iterable[Request], reason: str) -> None:
        """Gives the jobs of these requests, and of all that waits, back to the queue unchanged."""
        for request in [*requests, *outbox.waiting]:
            for text in [] if request.probe or request.trial else request.texts:
                for job in outbox.jobs.pop(text):
                    self._ledger.release(job, reason)
        for job in outbox.long:
            self._ledger.release(job, reason)
        outbox.waiting.clear()
        outbox.long.clear()

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
