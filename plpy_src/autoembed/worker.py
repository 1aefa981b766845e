"""The path of a job: claim, embed, apply. Knows neither plpy nor requests: database and network are handed in."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from autoembed import batching, heap, providers
from autoembed.errors import OverBudget, ProviderTrouble, Refused, RowError, rest_seconds
from autoembed.flight import SLICE_SECONDS, Flight
from autoembed.jobs import Address, Job, Ledger, Report, address_of, are_keys, isolate
from autoembed.limits import FIRST_ANSWER_SECONDS, NOTHING_KNOWN, PATIENCE_SECONDS, Limiter, Permit, tokens_per_request
from autoembed.model import Embedded, Model, Request, Share
from autoembed.providers import PROVIDERS, provider_of

if TYPE_CHECKING:
    import numpy as np

    from autoembed.database import Database
    from autoembed.network import Network
    from autoembed.records import Message, Pipeline

# As the SQL functions have it.
DEFAULT_BATCH_SIZE = 100
MAX_ATTEMPTS = 5
# Beyond the time that a request may take: for the database's own work on a claim.
LEASE_MARGIN_SECONDS = 60.0
POLL_SECONDS = 0.1
# Of a lane for backfills, which nobody waits for.
BACKFILL_POLL_SECONDS = 1.0
LOOK_AROUND_SECONDS = 1.0
# What a lane holds takes about so long to write; what a write takes whatever it writes; and a row, while nobody knows,
# with an index and without.
AHEAD_SECONDS = 1.0
WRITE_SECONDS = 0.003
INDEXED_ROW_SECONDS = 0.0025
PLAIN_ROW_SECONDS = 0.0001
# How long a pass claims on, before it comes to an end with its locked rows.
CLAIMING_SECONDS = 5.0
# The change that overtook us has a job of its own, which comes first; this one makes sure.
CHANGED_DELAY_SECONDS = 5.0
LOCK_PATIENCE_SECONDS = 1.0
LOCKED_DELAY_SECONDS = 1.0
# A text that no model refuses, to tell a bad text from a bad request.
PROBE = "autoembed"


@dataclass(frozen=True)
class Options:
    """How a pass works: texts per request, requests at a time, seconds for each."""

    batch_size: int
    max_requests: int
    timeout_seconds: float

    @property
    def max_rows(self) -> int:
        return self.batch_size * self.max_requests

    @property
    def lease_seconds(self) -> float:
        return self.timeout_seconds + LEASE_MARGIN_SECONDS


def work(database: Database, network: Network, options: Options, run_seconds: float, *, backfill: bool = False) -> None:
    """A lane: passes until the time is up or somebody ends it, a look at the queue a few times a second while idle.

    backfill: it looks through tables and leaves the queue to others.
    """
    # A lane that ends by itself in good time is no cancelled statement in anybody's log.
    limit = database.statement_timeout_seconds()
    end = time.monotonic() + (run_seconds if limit is None else min(run_seconds, limit / 2))
    look_around_at = 0.0
    has_worked = False
    queue = partial(_claim_queued, database, options)
    tables = partial(_claim_backfill, database, options, backfill)
    indexed = database.enter_lane(backfill=backfill)
    pace = Pace(options.batch_size, options.max_rows, indexed=indexed)
    database.warn_of_blocked_pipelines([])
    database.commit()
    try:
        while time.monotonic() < end:
            look_around = time.monotonic() >= look_around_at
            if look_around:
                look_around_at = time.monotonic() + LOOK_AROUND_SECONDS
                if not database.lane_is_wanted():
                    break
                database.clean_up()
                database.commit()
                if has_worked:
                    heap.trim()
                    has_worked = False
            read = 0 if backfill else _work_on(database, network, options, queue, pace).read
            if read == 0 and look_around:
                read = _work_on(database, network, options, tables, pace).read
                if read > 0:
                    look_around_at = 0.0
            if read > 0:
                has_worked = True
            elif backfill:
                database.sleep(BACKFILL_POLL_SECONDS)
            else:
                time.sleep(POLL_SECONDS)
    finally:
        database.leave_lane()
        database.commit()


def run_pass(database: Database, network: Network, options: Options) -> Report:
    """Claims once, embeds what was claimed, applies it: what is queued, or else the next rows of a backfill.

    Never raises for a bad row, a bad answer or a dead provider: the report says so.
    """
    report = _work_on(database, network, options, partial(_claim_queued, database, options), None)
    if report.read == 0:
        tables = partial(_claim_backfill, database, options, False)
        report = _work_on(database, network, options, tables, None)
    return report


# Claims so many rows, beside the messages that are held already.
Claim = Callable[[int, list[int]], "list[Message]"]


def _work_on(database: Database, network: Network, options: Options, claim: Claim, pace: Pace | None) -> Report:
    """One pass; with the pace of a lane it claims again while requests are in flight."""
    messages = claim(options.max_rows if pace is None else pace.max_rows(), [])
    if not messages:
        database.commit()
        return Report()
    ledger = Ledger(database, messages)
    try:
        return _Pass(database, network, options, ledger, claim, pace).run(messages)
    except BaseException:
        # Cancelled or shut down: what is not done goes back to the queue at once.
        ledger.release_open()
        ledger.flush()
        raise


def _claim_queued(database: Database, options: Options, max_rows: int, held: list[int]) -> list[Message]:
    return database.claim(max_rows, options.lease_seconds, held)


def _claim_backfill(
    database: Database, options: Options, dedicated: bool, max_rows: int, held: list[int]
) -> list[Message]:
    """The next rows of a table that is being looked through, as one message that is claimed at birth."""
    backfill = database.next_backfill(dedicated=dedicated)
    if backfill is None:
        return []
    if backfill.failures:
        # A provider that failed last time is tried with one row.
        max_rows = 1
    try:
        keys = database.scan(backfill, max_rows)
    except RowError as error:
        if not error.passes:
            database.fail_backfill(backfill, str(error))
        return []
    if not are_keys(keys):
        database.fail_backfill(backfill, "its condition gives what are no keys")
        return []
    exhausted = len(keys) < max_rows
    return database.queue_backfill(backfill, keys, exhausted=exhausted, lease_seconds=options.lease_seconds, held=held)


@dataclass
class Outbox:
    """What a pass knows of one model: its open jobs by text, whether it accepted anything yet, whether it rests.

    waiting: requests that its limits do not allow yet; permit: that of the first; slots: all that are held.
    """

    limiter: Limiter
    jobs: dict[str, list[Job]] = field(default_factory=lambda: defaultdict(list))
    unsent: list[str] = field(default_factory=list)
    accepted: bool = False
    trouble: ProviderTrouble | None = None
    # Refused requests, until it is known whether the model refuses everything.
    suspended: list[tuple[Request, Refused]] = field(default_factory=list)
    failures: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    in_flight: int = 0
    permit: Permit | None = None
    slots: set[int] = field(default_factory=set)
    began_at: float = field(default_factory=time.monotonic)


class Pace:
    """How fast a lane writes: what it holds is to be written soon, or what changes now would wait behind it.

    Where an index makes writing slow, rows that no lane holds are for whichever lane is free.
    indexed: whether that is to be expected, before anything was written.
    """

    def __init__(self, batch_size: int, max_rows: int, *, indexed: bool) -> None:
        self._batch_size = batch_size
        self._max_rows = max_rows
        self._rows = float(batch_size)
        self._seconds = batch_size * (INDEXED_ROW_SECONDS if indexed else PLAIN_ROW_SECONDS)

    def wrote(self, rows: int, seconds: float) -> None:
        """Takes note of a write; with each full one what was before counts half as much."""
        kept = 0.5 ** (rows / self._batch_size)
        self._rows = kept * self._rows + rows
        self._seconds = kept * self._seconds + max(0.0, seconds - WRITE_SECONDS)

    def max_rows(self) -> int:
        """How many rows the lane may hold: whole requests, two at least, as one is written while another flies."""
        if self._seconds * self._max_rows <= AHEAD_SECONDS * self._rows:
            return self._max_rows
        requests = max(2, int(AHEAD_SECONDS * self._rows / self._seconds) // self._batch_size)
        return min(self._max_rows, requests * self._batch_size)


class _Pass:
    def __init__(
        self,
        database: Database,
        network: Network,
        options: Options,
        ledger: Ledger,
        claim: Claim,
        pace: Pace | None,
    ) -> None:
        self._database = database
        self._network = network
        self._options = options
        self._ledger = ledger
        self._claim: Claim | None = claim if pace else None
        self._pace = pace or Pace(options.batch_size, options.max_rows, indexed=True)
        self._outboxes: dict[Model, Outbox] = {}
        self._locked: list[tuple[Job, Any]] = []
        self._unsent: list[Request] = []
        self._flight: Flight[Request, Embedded] | None = None
        self._lease_ends = time.monotonic() + options.lease_seconds
        self._claim_at = time.monotonic() + POLL_SECONDS
        self._claim_until = time.monotonic() + CLAIMING_SECONDS

    def run(self, messages: list[Message]) -> Report:
        if any(message.read_count > 1 for message in messages):
            # Lanes died of them, perhaps: nothing is to be in flight beside them.
            self._claim = None
        with Flight[Request, Embedded](self._options.max_requests, self._breathe, self._abort) as flight:
            try:
                self._load(flight, messages)
                self._flight = flight
                while flight or self._waiting():
                    for request, outcome in flight.landed():
                        self._see_off()
                        self._database.gate()
                        self._land(flight, request, outcome)
                        self._commit()
                        self._launch(flight)
                    if self._waiting():
                        time.sleep(SLICE_SECONDS)
                        self._breathe()
                self._flight = None
            finally:
                for model, outbox in self._outboxes.items():
                    self._free(model, outbox.slots)
        self._write_locked()
        self._commit()
        return self._ledger.report

    def _load(self, flight: Flight[Request, Embedded], messages: list[Message]) -> None:
        """Reads the rows of claimed messages and sends their texts on their way."""
        for pipeline, jobs in self._jobs(messages):
            self._take(pipeline, self._read(pipeline, jobs))
        # The try is counted for certain: a row that crashes the server is not to do so for ever.
        self._commit(synced=True)
        for model in self._outboxes:
            self._send(model)
        self._launch(flight)

    def _waiting(self) -> int:
        return sum(len(outbox.waiting) for outbox in self._outboxes.values())

    def _claim_more(self, flight: Flight[Request, Embedded], claim: Claim) -> None:
        """Claims for the requests that could be in flight besides, so that providers need not wait for our writing."""
        batch_size = self._options.batch_size
        unwritten = sum(len(outbox.jobs) for outbox in self._outboxes.values())
        most = self._pace.max_rows() // batch_size
        free = min(self._options.max_requests - len(flight) - self._waiting(), most - -(-unwritten // batch_size))
        now = time.monotonic()
        if now > self._claim_until or free < 1 or 2 * free < most and now < self._claim_at:
            return
        # A vector that waits for its row is not to be asked for again by another message; and a provider that failed
        # last time is tried with one request.
        if self._locked or any(box.trouble or box.suspended or box.failures for box in self._outboxes.values()):
            return
        self._claim_at = now + POLL_SECONDS
        self._database.gate()
        messages = claim(free * batch_size, self._ledger.open_message_ids())
        self._ledger.take(messages)
        suspects = [message for message in messages if message.read_count > 1]
        if suspects:
            self._ledger.set_aside(suspects)
            self._claim = None
        self._load(flight, [message for message in messages if message.read_count == 1])

    # Claim ---------------------------------------------------------------------------------------

    def _jobs(self, messages: list[Message]) -> list[tuple[Pipeline, list[Job]]]:
        """The claimed messages as jobs, one for each row, by pipeline. What cannot be a job is failed here."""
        messages, set_aside = isolate(messages, random.random())
        if set_aside:
            self._ledger.set_aside(set_aside)

        addressed: dict[int, list[tuple[Message, Address]]] = defaultdict(list)
        moved: dict[int, list[str]] = defaultdict(list)
        for message in messages:
            try:
                address = address_of(message.body)
                pipeline_id = address.pipeline_id or self._database.resolve(message.body)
            except (ValueError, RowError) as error:
                self._ledger.fail_message(message, str(error))
                continue
            if address.truncated:
                self._database.forget_all(pipeline_id)
                self._ledger.settle(message)
                continue
            if address.moved:
                moved[pipeline_id].extend(address.keys)
            if message.read_count > 1 and len(address.keys) > 1:
                # A lane died of one of these rows, perhaps: from now on each stands for itself.
                for key in address.keys:
                    self._database.requeue(pipeline_id, [key], address.attempts, read_count=message.read_count - 1)
                self._ledger.settle(message)
                continue
            addressed[pipeline_id].append((message, address))

        rows: dict[tuple[int, str], tuple[int, list[Message]]] = {}
        for pipeline_id, of_pipeline in addressed.items():
            room = max(1, self._options.max_rows // len(addressed))
            # The shortest first, which have what changes now: it is the longest that may exceed the share.
            for message, address in sorted(of_pipeline, key=lambda one: len(one[1].keys)):
                if room == 0:
                    self._ledger.set_aside([message])
                    continue
                if len(address.keys) > room:
                    self._database.requeue(pipeline_id, address.keys[room:], address.attempts)
                keys = address.keys[:room]
                room -= len(keys)
                for key in keys:
                    attempts, holders = rows.setdefault((pipeline_id, key), (address.attempts, []))
                    rows[pipeline_id, key] = (max(attempts, address.attempts), [*holders, message])

        ids = sorted({*addressed, *moved})
        pipelines = self._database.pipelines(ids) if ids else {}
        for pipeline_id in moved.keys() & pipelines.keys():
            self._database.forget(pipelines[pipeline_id], moved[pipeline_id])
        by_pipeline: dict[int, list[Job]] = defaultdict(list)
        for (pipeline_id, key), (attempts, holders) in rows.items():
            job = Job(pipelines.get(pipeline_id), key, attempts, [message.id for message in holders])
            self._ledger.open(job)
            tries = min(message.read_count for message in holders)
            if job.pipeline is None:
                self._ledger.done(job)
            elif job.pipeline.blocked is not None:
                if all(message.body.get("pipeline") for message in holders):
                    self._ledger.release(job, job.pipeline.blocked)
                else:
                    # By its pipeline, which a claim passes over meanwhile.
                    self._ledger.retry(job, 0, job.pipeline.blocked)
            elif tries > MAX_ATTEMPTS:
                self._ledger.fail(job, f"{tries - 1} lanes ended while they worked on it", tries - 1)
            else:
                by_pipeline[pipeline_id].append(job)
        return [(pipelines[pipeline_id], jobs) for pipeline_id, jobs in by_pipeline.items()]

    def _read(self, pipeline: Pipeline, jobs: list[Job]) -> list[Job]:
        """The jobs whose row exists, their texts read. A row whose content function fails stands alone in the end."""
        try:
            rows = self._database.rows(pipeline, [job.key for job in jobs])
        except RowError as error:
            if self._held_up(pipeline, jobs, error):
                return []
            if len(jobs) > 1 and not error.locked:
                return [job for half in batching.halves(jobs) for job in self._read(pipeline, half)]
            for job in jobs:
                self._retry_or_fail(job, error)
            return []
        gone = [job for job in jobs if job.key not in rows]
        self._forget(pipeline, gone)
        for job in jobs:
            job.row = rows.get(job.key)
        return [job for job in jobs if job.row is not None]

    def _take(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Puts each job where it belongs: done already, nothing to embed, or to be sent."""
        if not jobs:
            return
        digests = self._database.digests(pipeline, [job.key for job in jobs])
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
            limit = pipeline.model.max_tokens_per_input or provider_of(pipeline.model).MAX_TOKENS_PER_INPUT
            prefix = pipeline.model.prefix("document")
            text = job.content if limit is None else batching.truncate(job.content, limit, prefix)
            job.truncated = text is not job.content
            if job.truncated and not pipeline.truncate:
                self._ledger.fail(job, f"the text has more than the {limit} tokens that the model takes")
                continue
            outbox = self._outboxes.setdefault(
                pipeline.model, Outbox(Limiter(pipeline.model), failures=pipeline.failures)
            )
            if text not in outbox.jobs:
                outbox.unsent.append(text)
            outbox.jobs[text].append(job)
        if unchanged:
            self._record(pipeline, unchanged)
        if blank:
            self._write(pipeline, blank, None)
        self._forget(pipeline, empty)

    # Embed ---------------------------------------------------------------------------------------

    def _send(self, model: Model) -> None:
        unsent, self._outboxes[model].unsent = self._outboxes[model].unsent, []
        for texts in self._pack(model, unsent):
            self._submit(self._request(model, texts))

    def _pack(self, model: Model, texts: Sequence[str]) -> list[list[str]]:
        provider = provider_of(model)
        return batching.pack(
            texts,
            min(self._options.batch_size, model.max_inputs_per_request or provider.MAX_INPUTS_PER_REQUEST),
            tokens_per_request(model, provider.MAX_TOKENS_PER_REQUEST, self._outboxes[model].limiter.learnt),
            model.prefix("document"),
        )

    def _request(self, model: Model, texts: Sequence[str], *, probe: bool = False) -> Request:
        return Request(model, texts, self._options.timeout_seconds, probe=probe)

    def _submit(self, request: Request) -> None:
        """Has a request sent when the limits of its model allow."""
        waiting = self._outboxes[request.model].waiting
        if request.probe:
            waiting.appendleft(request)
        else:
            waiting.append(request)

    def _launch(self, flight: Flight[Request, Embedded]) -> None:
        """Sends what waits, as far as the limits allow by now."""
        for model, outbox in self._outboxes.items():
            while outbox.waiting and self._may_go(flight, outbox):
                request = outbox.waiting.popleft()
                if outbox.permit is not None:
                    request.slot, outbox.permit = outbox.permit.slot, None
                self._ledger.report.requests += 1
                outbox.in_flight += 1
                here = provider_of(model).RUNS_IN_BACKEND
                if not here:
                    self._unsent.append(request)
                call = partial(providers.embed, request, self._network, self._database.call_embedder)
                flight.submit(request, call, here=here)

    def _see_off(self) -> None:
        """Gives requests a moment to be sent: their threads need the interpreter, which a statement keeps."""
        end = time.monotonic() + SLICE_SECONDS
        for request in self._unsent:
            request.sent.wait(end - time.monotonic())
        self._unsent.clear()

    def _may_go(self, flight: Flight[Request, Embedded], outbox: Outbox) -> bool:
        """Whether the first request that waits may be sent now."""
        request, limiter = outbox.waiting[0], outbox.limiter
        elapsed = time.monotonic() - outbox.began_at
        if outbox.in_flight and limiter.learnt is None and elapsed < FIRST_ANSWER_SECONDS:
            return False
        if not limiter.needs_permits:
            return True
        if outbox.permit is None:
            if len(flight) >= self._options.max_requests:
                return False
            if elapsed > PATIENCE_SECONDS:
                self._put_back(outbox, outbox.waiting, "it is not its turn yet: the model's limits")
                outbox.waiting.clear()
                return False
            prefix = request.model.prefix("document")
            request.tokens = sum(batching.estimate_tokens(prefix + text) for text in request.texts)
            tolls = limiter.tolls(request.tokens, time.monotonic())
            permit = self._database.take_permit(request.model.name, tolls, sorted(outbox.slots))
            if permit.spent is not None:
                outbox.waiting.popleft()
                self._give_up_model(flight, request, OverBudget(permit.spent, retry_after_seconds=permit.rest_seconds))
            elif permit.at is not None:
                outbox.permit = permit
                outbox.slots.update([] if permit.slot is None else [permit.slot])
            # At once: other lanes wait for their turn.
            self._database.commit()
        return outbox.permit is not None and outbox.permit.at is not None and time.monotonic() >= outbox.permit.at

    def _land(self, flight: Flight[Request, Embedded], request: Request, outcome: Embedded | BaseException) -> None:
        outbox = self._outboxes[request.model]
        self._listen(outbox, request, outcome)
        if isinstance(outcome, Refused) and request.probe:
            outcome = ProviderTrouble(f"every request is refused: {outcome}", permanent=True)
        elif isinstance(outcome, Refused) and outbox.trouble is not None:
            outcome = outbox.trouble
        match outcome:
            case ProviderTrouble():
                self._give_up_model(flight, request, outcome)
            case Refused():
                self._refuse(request, outcome)
            case Exception():
                # A fault of ours, which must not end every lane again and again. Its text may hold anything, a key too.
                trouble = ProviderTrouble(
                    f"an unexpected {type(outcome).__name__} in the provider {request.model.provider}"
                )
                self._give_up_model(flight, request, trouble)
            case BaseException():
                raise outcome
            case Embedded(vectors, tokens):
                self._database.note_usage(request.model.name, self._shares(request, tokens), request.slot)
                self._accept(request, vectors)

    def _listen(self, outbox: Outbox, request: Request, outcome: Embedded | BaseException) -> None:
        """Takes from an answer what it tells of the model's limits; a request that failed frees its slot."""
        outbox.in_flight -= 1
        outbox.slots.discard(request.slot or 0)
        if request.slot is not None and not isinstance(outcome, Embedded):
            self._free(request.model, {request.slot})
        if isinstance(outcome, Embedded):
            outbox.limiter.counted(request.tokens, outcome.tokens)
        if outbox.limiter.learn_from(outcome, time.monotonic()):
            self._database.learn_limits(request.model.name, outbox.limiter.learnt or NOTHING_KNOWN)
            if outbox.permit is None and not any(other.probe for other in outbox.waiting):
                # What still waits may have too many tokens.
                waiting, outbox.waiting = outbox.waiting, deque()
                for texts in self._pack(request.model, [text for other in waiting for text in other.texts]):
                    self._submit(self._request(request.model, texts))

    def _free(self, model: Model, slots: Iterable[int]) -> None:
        if slots:
            self._database.free_slots(model.name, sorted(slots))

    def _shares(self, request: Request, tokens: int | None) -> list[Share]:
        """Who had texts in a request; its tokens by estimate. A text of several pipelines is the first one's."""
        texts: dict[int | None, list[str]] = defaultdict(list)
        rows: dict[int | None, int] = defaultdict(int)
        for text in request.texts:
            jobs = [] if request.probe else self._outboxes[request.model].jobs[text]
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
        """Looks for the text to blame, once it is known that the model takes others."""
        outbox = self._outboxes[request.model]
        if outbox.accepted:
            self._split(request, refusal)
            return
        outbox.suspended.append((request, refusal))
        if len(outbox.suspended) == 1:
            self._submit(self._request(request.model, [PROBE], probe=True))

    def _accept(self, request: Request, vectors: np.ndarray) -> None:
        outbox = self._outboxes[request.model]
        outbox.accepted = True
        if outbox.failures:
            self._database.resume_model(request.model.name)
            outbox.failures = 0
        if not request.probe:
            self._apply(request, vectors)
            for text in request.texts:
                del outbox.jobs[text]
        suspended, outbox.suspended = outbox.suspended, []
        for refused, refusal in suspended:
            self._split(refused, refusal)

    def _split(self, request: Request, refusal: Refused) -> None:
        """Finds the text that is to blame for a refusal: halves the request until it stands alone."""
        if len(request.texts) > 1:
            for half in batching.halves(list(request.texts)):
                self._submit(self._request(request.model, half))
            return
        for job in self._outboxes[request.model].jobs.pop(request.texts[0]):
            content = job.content
            # It may say something else by now, and have a job for that, which may be done.
            for existing in self._read(job.pipeline, [job]):
                if existing.content == content:
                    self._ledger.fail(existing, str(refusal))
                else:
                    self._ledger.retry(existing, CHANGED_DELAY_SECONDS)

    def _give_up_model(self, flight: Flight[Request, Embedded], request: Request, trouble: ProviderTrouble) -> None:
        """Lets the model rest, for all lanes, and puts back the jobs that were to be sent."""
        outbox = self._outboxes[request.model]
        if outbox.trouble is not trouble:
            outbox.trouble = trouble
            # Where limits are known, lanes do not come back all at once anyway.
            paced = outbox.limiter.paces and trouble.retry_after_seconds is not None
            seconds = rest_seconds(trouble, outbox.failures, 0.0 if paced else random.random())
            name = request.model.name
            is_new = self._database.rest_model(name, seconds, trouble.permanent, str(trouble))
            if is_new and self._claim is not None:
                # In the server's log, once for each outage.
                self._database.warn_of_blocked_pipelines([name])
        unsent = flight.withdraw(lambda other: other.model == request.model)
        self._ledger.report.requests -= len(unsent)
        outbox.in_flight -= len(unsent)
        suspended = [refused for refused, _ in outbox.suspended]
        self._put_back(outbox, [request, *unsent, *suspended, *outbox.waiting], str(trouble))
        outbox.suspended = []
        outbox.waiting.clear()

    def _put_back(self, outbox: Outbox, requests: Iterable[Request], reason: str) -> None:
        for request in requests:
            for text in [] if request.probe else request.texts:
                for job in outbox.jobs.pop(text):
                    self._ledger.release(job, reason)

    # Apply ---------------------------------------------------------------------------------------

    def _apply(self, request: Request, vectors: np.ndarray) -> None:
        # A row that was queued again while this was in flight has two jobs, and a statement writes it but once.
        turns: Counter[tuple[int, str]] = Counter()
        by_statement: dict[tuple[int, int], list[tuple[Job, int]]] = defaultdict(list)
        for index, text in enumerate(request.texts):
            for job in self._outboxes[request.model].jobs[text]:
                turns[job.pipeline.id, job.key] += 1
                by_statement[job.pipeline.id, turns[job.pipeline.id, job.key]].append((job, index))
        for matched in by_statement.values():
            jobs = [job for job, _ in matched]
            self._write(jobs[0].pipeline, jobs, vectors[[index for _, index in matched]])

    def _write(self, pipeline: Pipeline, jobs: list[Job], vectors: np.ndarray | None) -> None:
        """Writes the vectors (None: NULLs) of the rows that still say the same.

        A row that does not take its own stands alone in the end.
        """
        began = time.monotonic()
        try:
            outcomes = self._database.write(pipeline, [job.key for job in jobs], [job.content for job in jobs], vectors)
            self._pace.wrote(len(jobs), time.monotonic() - began)
        except RowError as error:
            if self._held_up(pipeline, jobs, error):
                return
            if error.locked:
                for index, job in enumerate(jobs):
                    self._locked.append((job, None if vectors is None else vectors[index : index + 1]))
            elif len(jobs) > 1:
                middle = len(jobs) // 2
                self._write(pipeline, jobs[:middle], None if vectors is None else vectors[:middle])
                self._write(pipeline, jobs[middle:], None if vectors is None else vectors[middle:])
            else:
                self._retry_or_fail(jobs[0], error, at_once=True)
            return
        by_outcome: dict[str, list[Job]] = defaultdict(list)
        for index, job in enumerate(jobs):
            by_outcome[outcomes[job.key]].append(job)
            if outcomes[job.key] == "locked":
                self._locked.append((job, None if vectors is None else vectors[index : index + 1]))
        written = by_outcome["written"]
        if vectors is None:
            self._forget(pipeline, written)
        elif written:
            self._record(pipeline, written)
        for job in by_outcome["changed"]:
            self._ledger.retry(job, CHANGED_DELAY_SECONDS)
        self._forget(pipeline, by_outcome["gone"])

    def _write_locked(self) -> None:
        """Tries the rows that somebody had locked again for a moment: their vectors are paid for."""
        end = time.monotonic() + LOCK_PATIENCE_SECONDS
        while self._locked and time.monotonic() < end:
            self._commit()
            self._breathe()
            time.sleep(0.05)
            self._database.gate()
            locked, self._locked = self._locked, []
            for job, vector in locked:
                self._write(job.pipeline, [job], vector)
        for job, _ in self._locked:
            self._ledger.retry(job, LOCKED_DELAY_SECONDS, "the row or its table is locked by another transaction")

    def _record(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        """Settles rows whose embedding is that of their text."""
        self._database.record_embedded(
            pipeline,
            [job.key for job in jobs],
            [job.digest for job in jobs],
            [job.truncated for job in jobs],
        )
        for job in jobs:
            self._ledger.done(job)

    def _forget(self, pipeline: Pipeline, jobs: Sequence[Job]) -> None:
        """Settles rows that need no embedding: deleted ones, and those without a text."""
        if jobs:
            self._database.forget(pipeline, [job.key for job in jobs])
        for job in jobs:
            self._ledger.done(job)

    def _held_up(self, pipeline: Pipeline, jobs: Sequence[Job], error: RowError) -> bool:
        """Puts jobs back if it is their table's fault by now: what it needs may go while a request is in flight."""
        now = None if error.passes else self._database.pipelines([pipeline.id]).get(pipeline.id)
        if now is None or now.blocked is None:
            return False
        for job in jobs:
            self._ledger.release(job, now.blocked)
        return True

    def _retry_or_fail(self, job: Job, error: RowError, *, at_once: bool = False) -> None:
        if error.passes:
            self._ledger.retry(job, LOCKED_DELAY_SECONDS, str(error))
        elif at_once or job.attempts + 1 >= MAX_ATTEMPTS:
            self._ledger.fail(job, str(error))
        else:
            self._ledger.retry(job, 2.0**job.attempts, str(error), counts=True)

    # In between ----------------------------------------------------------------------------------

    def _commit(self, *, synced: bool = False) -> None:
        """Not synced: a crash may undo the work, and gives its messages back."""
        self._ledger.flush()
        self._database.commit(synced=synced)

    def _breathe(self) -> None:
        self._database.breathe()
        if self._flight is not None:
            self._launch(self._flight)
        if self._flight is not None and self._claim is not None:
            self._claim_more(self._flight, self._claim)
        if self._lease_ends - time.monotonic() < self._options.timeout_seconds:
            self._database.extend(self._ledger.open_message_ids(), self._options.lease_seconds)
            self._database.commit()
            self._lease_ends = time.monotonic() + self._options.lease_seconds

    def _abort(self) -> None:
        self._network.abort()
        for provider in PROVIDERS.values():
            provider.abort()
