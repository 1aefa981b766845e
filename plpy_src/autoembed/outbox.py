"""One model's part of a pass: the requests that wait, are in flight or have failed, and the way out of each."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autoembed import batching
from autoembed.answers import shorter_limit
from autoembed.errors import CameLate, FellOver, ProviderTrouble, Refused, Trouble
from autoembed.jobs import Job, Ledger
from autoembed.limits import PATIENCE_SECONDS, Limiter, Permit
from autoembed.model import Model, Request, Trial
from autoembed.providers import provider_of
from autoembed.rows import Rows

# A text that no model refuses. It shows whether a text or the whole request is to blame.
PROBE = "autoembed"
# A model that has not answered for this long, in seconds, holds up no other: nothing more is claimed for it.
BUSY_SECONDS = 1.0
# A server that has ended a connection without an answer may start again for so long, in seconds.
RESTART_SECONDS = 10.0
# The pause between two tries to reach a server that may be starting again, in seconds.
RESTART_POLL_SECONDS = 0.5
# A pass that has paid for a probe, or for a request that failed, waits so long, in seconds, for the turns of the next
# ones. A model with one request a minute has two of them in that time. Otherwise the same would be paid for again.
SEARCH_SECONDS = 150.0
OVER_LIMITS = "the model's limits allow no request yet"


@dataclass(eq=False)
class Outbox:
    """One model's part of a pass.

    A text is unsent, in a request, or too long. A request waits, is in flight, or is suspended. A probe never waits: it
    is due as long as something depends on its answer.

    timeout_seconds, stopped: those of its requests.
    jobs: the open ones, by text. unsent: texts that no request holds yet.
    long: long texts with chunks that no request holds yet: they take turns, behind all that waits.
    suspended: requests that failed, until it is known whether the model answers others.
    too_long: texts that were refused for their length, and wait for the outcome of a trial, each with its trouble.
    accepted: the model has answered in this pass. trouble: why it rests.
    asks_first: nothing is sent before a probe is answered. again_at: until then, nothing is sent.
    permit: that of the next request. charged_tokens: those it was taken for.
    refused_at: when its limits first refused the permit that is wanted now.
    searches_until: the end of the patience of a pass that has paid for a probe, or for requests that failed.
    fell_at: when its server last ended a connection without an answer; None: not since a text was last looked for.
    has_suspects: there are texts of which one may have felled the server before this pass.
    heard_at: when the model last answered, or was first asked while nothing was in flight.
    """

    model: Model
    rows: Rows
    ledger: Ledger
    timeout_seconds: float
    stopped: threading.Event = field(default_factory=threading.Event)
    failures: int = 0
    limiter: Limiter = field(init=False)
    jobs: dict[str, list[Job]] = field(default_factory=lambda: defaultdict(list))
    unsent: list[str] = field(default_factory=list)
    long: deque[Job] = field(default_factory=deque)
    waiting: deque[Request] = field(default_factory=deque)
    in_flight: set[Request] = field(default_factory=set)
    suspended: list[tuple[Request, Trouble]] = field(default_factory=list)
    too_long: dict[str, Trouble] = field(default_factory=dict)
    accepted: bool = False
    trouble: ProviderTrouble | None = None
    asks_first: bool = False
    again_at: float = 0.0
    permit: Permit | None = None
    charged_tokens: int = 0
    refused_at: float | None = None
    searches_until: float = 0.0
    fell_at: float | None = None
    has_suspects: bool = False
    began_at: float = field(default_factory=time.monotonic)
    heard_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.limiter = Limiter(self.model)

    @property
    def is_busy(self) -> bool:
        """Whether the model has not answered for a while."""
        return bool(self.in_flight) and time.monotonic() - self.heard_at > BUSY_SECONDS

    @property
    def needs_care(self) -> bool:
        """Whether the model has failed, and has open jobs still."""
        return not self.is_idle and bool(self.trouble or self.suspended or self.failures)

    @property
    def is_idle(self) -> bool:
        """Whether nothing of the model is open."""
        return not (self.jobs or self.in_flight or self.has_next or self.unsent or self.permit)

    @property
    def has_next(self) -> bool:
        """Whether something is to be sent, now or later."""
        return bool(self.waiting or self.long or self._depends_on_probe)

    @property
    def slots(self) -> set[int]:
        """Those that are held."""
        held = [request.slot for request in self.in_flight] + [self.permit.slot if self.permit else None]
        return {slot for slot in held if slot is not None}

    @property
    def is_careful(self) -> bool:
        """Whether a request goes alone: a text that a server falls over must not take the answers to others with it."""
        return self.fell_at is not None or self.has_suspects

    @property
    def _depends_on_probe(self) -> bool:
        return bool(self.suspended or self.asks_first)

    # In ------------------------------------------------------------------------------------------

    def put(self, job: Job, text: str) -> None:
        """Adds a text of a row."""
        if text not in self.jobs:
            self.unsent.append(text)
        self.jobs[text].append(job)
        if job.unsent and job not in self.long:
            self.long.append(job)

    def take_unsent(self) -> list[str]:
        unsent, self.unsent = self.unsent, []
        return unsent

    def owners_of(self, texts: Iterable[str]) -> set[int]:
        return {job.pipeline.owner for text in texts for job in self.jobs.get(text, ())}

    def suspects_in(self, texts: Iterable[str]) -> list[list[str]]:
        """Those of these texts of which one may have felled the server, in groups that travel apart."""
        groups: dict[int, list[str]] = defaultdict(list)
        for text in texts:
            if number := next((job.suspects for job in self.jobs[text] if job.suspects), 0):
                groups[number].append(text)
        return list(groups.values())

    def request(self, texts: Sequence[str], *, probe: bool = False, suspect: bool = False) -> Request:
        return Request(self.model, texts, self.timeout_seconds, probe=probe, suspect=suspect, stopped=self.stopped)

    def add(self, requests: Sequence[Request], *, first: bool = False) -> None:
        """Has requests wait. first: before all that wait but a request that has its permit."""
        if not first:
            self.waiting.extend(requests)
            return
        ahead = [self.waiting.popleft()] if self.waiting and self.permit is not None else []
        self.waiting.extendleft(reversed([*ahead, *requests]))

    def ask_first(self) -> None:
        """Has a probe sent before all others: a server that is not there does not fall over a text."""
        if not self.in_flight and self.permit is None:
            self.asks_first = True

    def unpack(self) -> list[str]:
        """Takes the texts out of the requests that wait. Suspects, a trial and a request that has its permit stay."""
        waiting, self.waiting = self.waiting, deque()
        texts: list[str] = []
        for number, request in enumerate(waiting):
            if request.suspect or request.trial or number == 0 and self.permit is not None:
                self.waiting.append(request)
            else:
                texts.extend(request.texts)
        return texts

    # To the model and back -----------------------------------------------------------------------

    def next(self) -> Request | None:
        """The request that is the next to be sent; None: none may be."""
        if time.monotonic() < self.again_at:
            return None
        if self._depends_on_probe:
            is_asked = any(request.probe for request in self.in_flight)
            return None if is_asked else self.request([PROBE], probe=True)
        return self.waiting[0] if self.waiting else None

    def patience(self) -> float:
        """The time, in seconds, for which the next request may wait for its turn."""
        now = time.monotonic()
        return max((self.refused_at or now) + PATIENCE_SECONDS, self.searches_until, now) - now

    def allow(self, permit: Permit, tokens: int) -> None:
        """Takes a permit for the next request, which has so many tokens by estimate."""
        self.limiter.charged(tokens)
        self.permit, self.charged_tokens, self.refused_at = permit, tokens, None

    def send(self, request: Request) -> None:
        """Takes note that the next request is handed over."""
        if not request.probe:
            self.waiting.popleft()
        now = request.sent_at = time.monotonic()
        if self.permit is not None:
            request.slot, request.tokens, self.permit = self.permit.slot, self.charged_tokens, None
        if not self.in_flight:
            self.heard_at = now
        self.in_flight.add(request)

    def take_back(self, requests: Sequence[Request]) -> set[int]:
        """Has requests wait again that were handed over and have not begun. Returns their slots, which are free."""
        self.in_flight.difference_update(requests)
        self.waiting.extendleft(request for request in reversed(requests) if not request.probe)
        slots = {request.slot for request in requests if request.slot is not None}
        for request in requests:
            request.slot = None
        return slots

    def take_permit_back(self) -> set[int]:
        """Gives up a permit that no request needs any more. Returns its slot, which is free."""
        slots = {self.permit.slot} if self.permit and self.permit.slot is not None else set()
        self.permit = None
        return slots

    def land(self, request: Request) -> None:
        """Takes note that a request has an outcome."""
        self.in_flight.discard(request)
        self.heard_at = time.monotonic()

    # Answers -------------------------------------------------------------------------------------

    def accept(self, request: Request) -> None:
        """Takes note that the model answers. The requests that failed are split until the text to blame is alone."""
        self.accepted = True
        self.asks_first = False
        suspended, self.suspended = self.suspended, []
        for failed, trouble in suspended:
            self._split(failed, trouble)
        if not any(other.suspect for other in self.waiting):
            self.fell_at = None
            self.has_suspects = False
        if request.probe:
            self._search()
        elif not any(other.suspect or other.trial for other in self.waiting):
            self.searches_until = 0.0

    def refuse(self, request: Request, refusal: Refused) -> None:
        """Looks for the text to blame, as soon as the model is known to accept others."""
        if self.accepted:
            self._split(request, refusal)
        else:
            self.suspend(request, refusal)

    def may_be_a_texts(self, request: Request, trouble: ProviderTrouble) -> bool:
        """Whether a text may be to blame for trouble of a request. A wait that the provider asks for comes first."""
        if request.probe or self.trouble is not None or not trouble.may_be_a_texts:
            return False
        return request.suspect or self.failures > 0 or not trouble.retry_after_seconds

    def may_be_starting(self, request: Request, trouble: ProviderTrouble) -> bool:
        """Whether the reason may be that a server that fell over a text is not there again yet."""
        if self.trouble is not None or not (isinstance(trouble, FellOver) or request.probe and not trouble.permanent):
            return False
        if trouble.may_be_a_texts and self.failures > 0:
            # Something is there, and fails each time.
            return False
        # The request that the server fell over may still be in flight.
        return bool(self.in_flight) or (self.fell_at is not None and time.monotonic() < self.fell_at + RESTART_SECONDS)

    def send_later(self, request: Request) -> None:
        """Sends a request again after a pause."""
        if not request.probe:
            again = self.request(request.texts, suspect=request.suspect)
            again.trial = request.trial
            self.waiting.append(again)
        self.again_at = time.monotonic() + RESTART_POLL_SECONDS

    def suspend(self, request: Request, trouble: Trouble) -> None:
        """Keeps a request that failed until the model has answered another one. A probe is due."""
        if isinstance(trouble, FellOver):
            self.fell_at = time.monotonic()
        self.suspended.append((request, trouble))
        self._search()

    def _search(self) -> None:
        self.searches_until = self.searches_until or time.monotonic() + SEARCH_SECONDS

    # The text to blame ---------------------------------------------------------------------------

    def _split(self, request: Request, trouble: Trouble) -> None:
        """Halves a request that failed until the text to blame stands alone."""
        if len(request.texts) > 1:
            for half in batching.halves(list(request.texts)):
                self.waiting.append(self.request(half, suspect=True))
        elif request.trial is None:
            self._refuse_text(request.texts[0], trouble)
        elif not self._try_shorter(request.trial.text, request.texts[0], trouble):
            # Length is not the reason.
            while self.too_long:
                self._give_up_text(*self.too_long.popitem())

    def _refuse_text(self, text: str, trouble: Trouble) -> None:
        """Fails the rows of a text that stands alone, unless it is too long and may be cut."""
        cuttable = [job for job in self.jobs[text] if job.pipeline.may_cut]
        if not cuttable:
            self._give_up_text(text, trouble)
        elif self.too_long:
            if shorter_limit(trouble, self._tokens(text)) is None:
                self._give_up_text(text, trouble)
            else:
                self.too_long[text] = trouble
        elif self._try_shorter(text, text, trouble):
            self.too_long[text] = trouble
        else:
            self._give_up_text(text, trouble)

    def _try_shorter(self, text: str, refused: str, trouble: Trouble) -> bool:
        """Sends the beginning of a text, if the length of the text or beginning that was refused may be the reason."""
        limit = shorter_limit(trouble, self._tokens(refused))
        beginning = refused if limit is None else batching.truncate(refused, limit, self.model.prefix("document"))
        if limit is None or len(beginning) == len(refused) or provider_of(self.model).RUNS_IN_BACKEND:
            return False
        request = self.request([beginning])
        request.trial = Trial(text, limit)
        self.waiting.append(request)
        return True

    def read_shorter(self) -> None:
        """Has rows read again, and cut, whose texts were too long. A trial has shown which length the model takes."""
        while self.too_long:
            text, trouble = self.too_long.popitem()
            for job in self.jobs.pop(text):
                if job.outcome is None and job.pipeline.may_cut:
                    self.ledger.retry(job, 0.0)
                elif job.outcome is None:
                    self.rows.refuse(job, str(trouble), at_once=isinstance(trouble, Refused))

    def _give_up_text(self, text: str, trouble: Trouble) -> None:
        for job in self.jobs.pop(text):
            # Another chunk of the row may have been refused before.
            if job.outcome is None:
                is_fall = isinstance(trouble, FellOver)
                self.rows.refuse(job, str(trouble), at_once=isinstance(trouble, Refused), alone=is_fall)

    def _tokens(self, text: str) -> int:
        return batching.estimate_tokens(self.model.prefix("document") + text)

    # Out -----------------------------------------------------------------------------------------

    def give_up(self, request: Request | None, reason: str) -> None:
        """Gives the rows of this request and all others back to the queue, because the model rests.

        In an outage, no text is to blame. It may be one that began just now.
        """
        for failed, trouble in self.suspended:
            if self._may_be_to_blame(failed, trouble):
                self._blame(failed, trouble, reason)
        self.accepted = False
        own = () if request is None or request.probe or request.trial else request.texts
        for text in [*own, *self.too_long]:
            self._release(self.jobs.pop(text), reason)
        self.too_long.clear()
        self._empty(reason)

    def _may_be_to_blame(self, request: Request, trouble: Trouble) -> bool:
        """Whether one of the texts of a request may be to blame, although the model rests."""
        if not isinstance(trouble, ProviderTrouble):
            return False
        if isinstance(trouble, CameLate):
            # A slow server is sent fewer texts first.
            return self.accepted and len(request.texts) == 1
        return self.accepted or not (request.suspect or self.failures or trouble.permanent)

    def run_out_of_patience(self) -> None:
        """Gives the rows of all that waits back to the queue, because its limits allow no request yet.

        No row is paid for again and again: what the pass has learnt of texts that failed is kept, or counts as an
        attempt.
        """
        for failed, trouble in self.suspended:
            if self.accepted or not failed.suspect:
                self._blame(failed, trouble, OVER_LIMITS)
        for text, trouble in self.too_long.items():
            for job in self.jobs.pop(text):
                if job.outcome is None:
                    self.rows.refuse(job, str(trouble), at_once=False)
        self.too_long.clear()
        self._empty(OVER_LIMITS)
        self.refused_at = None

    def keep_suspects(self, reason: str) -> None:
        """Gives suspects of which nothing is known yet back to the queue, as they would have been sent."""
        self._keep_suspects([*self.in_flight, *self._held_back()], reason)

    def _keep_suspects(self, requests: Iterable[Request], reason: str) -> None:
        for request in requests:
            if request.suspect:
                self.ledger.suspect(self._open_jobs(request), reason)

    def _held_back(self) -> list[Request]:
        """The requests that are not in flight."""
        return [*(failed for failed, _ in self.suspended), *self.waiting]

    def _empty(self, reason: str) -> None:
        """Gives all that is not in flight back to the queue, suspects as such and others unchanged."""
        requests = self._held_back()
        self._keep_suspects(requests, reason)
        for request in requests:
            for text in () if request.trial else request.texts:
                self._release(self.jobs.pop(text), reason)
        self._release(self.long, reason)
        self.suspended.clear()
        self.waiting.clear()
        self.long.clear()
        self.asks_first = False

    def _release(self, jobs: Iterable[Job], reason: str) -> None:
        for job in jobs:
            self.ledger.release(job, reason)

    def _blame(self, request: Request, trouble: Trouble, reason: str) -> None:
        """Has the text looked for by later passes that may be to blame for a request that failed.

        The texts of the request travel without others from now on. If they did so already, each half of them goes on
        without the other, until the row to blame stands alone. reason: why this pass does not look for it.
        """
        jobs = [] if request.trial else self._open_jobs(request)
        if not request.suspect:
            self.ledger.suspect(jobs, reason)
        elif len(jobs) == 1 or len(request.texts) == 1:
            for job in jobs:
                self.rows.refuse(job, str(trouble), at_once=False, alone=True)
        else:
            for half in batching.halves(jobs):
                self.ledger.suspect(half, reason)

    def _open_jobs(self, request: Request) -> list[Job]:
        """The jobs of a request's texts that have no outcome."""
        jobs = dict.fromkeys(job for text in request.texts for job in self.jobs.get(text, ()))
        return [job for job in jobs if job.outcome is None]
