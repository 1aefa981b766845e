"""The states of a request, and what each way out of the outbox does to it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from autoembed import outbox as outbox_module
from autoembed.errors import CameLate, FellOver, ProviderTrouble, Refused, Trouble
from autoembed.jobs import Job, Ledger
from autoembed.limits import PATIENCE_SECONDS, Permit
from autoembed.model import Request, Trial
from autoembed.outbox import Outbox
from autoembed.records import Row
from autoembed.rows import Owners, Rows
from unit.fakes import MODEL, PIPELINE, FakeDatabase, key_of

LONG = "word " * 1000


class Desk:
    """An outbox with the texts "one" and "two" of a row each, and one request with both."""

    def __init__(self, *, suspect: bool = False, failures: int = 0) -> None:
        self.database = FakeDatabase()
        self.ledger = Ledger(self.database, [])
        rows = Rows(self.database, self.ledger, Owners())
        self.outbox = Outbox(MODEL, rows, self.ledger, 60, failures=failures)
        self.jobs = [self.job(number, text) for number, text in enumerate(["one", "two"])]
        self.outbox.add([self.outbox.request(self.outbox.take_unsent(), suspect=suspect)])

    def job(self, number: int, text: str) -> Job:
        self.database.put(number, text)
        job = Job(replace(PIPELINE, truncate=True), key_of(number), 0, [number], row=Row(text, None))
        self.ledger.open(job)
        self.outbox.put(job, text)
        return job

    def send(self) -> Request:
        request = self.outbox.next()
        assert request is not None
        self.outbox.send(request)
        return request

    def fail(self, trouble: Trouble) -> Request:
        request = self.send()
        self.outbox.land(request)
        self.outbox.suspend(request, trouble)
        return request

    def outcomes(self) -> list[str]:
        """What became of each row."""
        found = []
        for job in self.jobs:
            outcome = job.outcome
            if outcome is None:
                found.append("open")
            elif outcome.released:
                found.append("released")
            elif outcome.suspects:
                found.append(f"suspect {outcome.suspects}" + (" counted" if outcome.attempts else ""))
            elif outcome.again_in_seconds is not None:
                found.append("counted" if outcome.attempts else "again")
            else:
                found.append("failed" if job.key in self.database.failures else "done")
        return found

    def check(self) -> None:
        """Each open text is in one place from which it goes on."""
        box = self.outbox
        requests = [*box.waiting, *box.in_flight, *(failed for failed, _ in box.suspended)]
        places = Counter(text for one in requests if not (one.probe or one.trial) for text in one.texts)
        places.update([*box.unsent, *box.too_long])
        held = {text for text, jobs in box.jobs.items() if any(job.outcome is None for job in jobs)}
        assert places == dict.fromkeys(held, 1)
        if box.too_long:
            assert any(one.trial for one in requests)
        if box.suspended or box.asks_first:
            following = box.next()
            assert any(one.probe for one in box.in_flight) or following is not None and following.probe


def waiting(desk: Desk) -> None:
    pass


def with_permit(desk: Desk) -> None:
    desk.outbox.allow(Permit(0.0, 1), 10)


def in_flight(desk: Desk) -> None:
    with_permit(desk)
    desk.send()


def packed_again(desk: Desk) -> None:
    desk.outbox.add([desk.outbox.request([text]) for text in desk.outbox.unpack()])


def suspended(trouble: Trouble) -> Callable[[Desk], None]:
    def state(desk: Desk) -> None:
        desk.fail(trouble)

    return state


def suspended_in_a_model_that_answers(trouble: Trouble) -> Callable[[Desk], None]:
    def state(desk: Desk) -> None:
        desk.outbox.accepted = True
        desk.fail(trouble)

    return state


def probed(desk: Desk) -> None:
    desk.fail(FAILED)
    desk.outbox.allow(Permit(0.0, 1), 10)
    desk.send()


def split(desk: Desk) -> None:
    probed(desk)
    [probe] = desk.outbox.in_flight
    desk.outbox.land(probe)
    desk.outbox.accept(probe)


def on_trial(desk: Desk) -> None:
    [request] = desk.outbox.waiting
    for job, text in zip(desk.jobs, request.texts, strict=True):
        desk.outbox.too_long[text] = TOO_LONG
        assert job.outcome is None
    trial = desk.outbox.request(["o"])
    trial.trial = Trial("one", 1)
    desk.outbox.waiting.clear()
    desk.outbox.add([trial])


FAILED = ProviderTrouble("the provider answered 500")
BUSY = CameLate("no answer in time")
FELL = FellOver("no answer")
REFUSED = Refused("the provider answered 400")
TOO_LONG = Refused("the provider answered 400: maximum context length is 200 tokens")


def rest(desk: Desk) -> None:
    desk.outbox.give_up(None, "down")


def run_out(desk: Desk) -> None:
    desk.outbox.run_out_of_patience()


def end(desk: Desk) -> None:
    desk.outbox.keep_suspects("the lane's time was up")
    desk.ledger.release_open()


def cancel(desk: Desk) -> None:
    desk.ledger.release_open()


def take_back(desk: Desk) -> None:
    requests = list(desk.outbox.in_flight)
    assert desk.outbox.take_back(requests) == {request.slot or 1 for request in requests}


# The state of the request, whether it is a suspect, the way out, and what becomes of its two rows.
TABLE: list[tuple[Callable[[Desk], None], bool, Callable[[Desk], None], list[str]]] = [
    (waiting, False, rest, ["released"] * 2),
    (waiting, False, run_out, ["released"] * 2),
    (waiting, False, end, ["released"] * 2),
    (waiting, True, rest, ["suspect 1"] * 2),
    (waiting, True, run_out, ["suspect 1"] * 2),
    (waiting, True, end, ["suspect 1"] * 2),
    (waiting, True, cancel, ["released"] * 2),
    (with_permit, False, rest, ["released"] * 2),
    (with_permit, True, rest, ["suspect 1"] * 2),
    (packed_again, False, rest, ["released"] * 2),
    (packed_again, True, run_out, ["suspect 1"] * 2),
    (in_flight, False, rest, ["open"] * 2),
    (in_flight, False, run_out, ["open"] * 2),
    (in_flight, False, end, ["released"] * 2),
    (in_flight, True, end, ["suspect 1"] * 2),
    (in_flight, False, take_back, ["open"] * 2),
    (in_flight, True, take_back, ["open"] * 2),
    # The model had answered nothing: it may be an outage, of which a suspect says nothing new.
    (suspended(FAILED), False, rest, ["suspect 1"] * 2),
    (suspended(FAILED), True, rest, ["suspect 1"] * 2),
    (suspended(FAILED), False, run_out, ["suspect 1"] * 2),
    (suspended(FAILED), True, run_out, ["suspect 1"] * 2),
    (suspended(FAILED), False, end, ["released"] * 2),
    (suspended(FAILED), True, end, ["suspect 1"] * 2),
    (suspended(FELL), False, rest, ["suspect 1"] * 2),
    (suspended(BUSY), False, rest, ["released"] * 2),
    (suspended(BUSY), False, run_out, ["suspect 1"] * 2),
    (suspended(REFUSED), False, rest, ["released"] * 2),
    (suspended(REFUSED), False, run_out, ["suspect 1"] * 2),
    # It had answered: one of the texts is to blame, and is looked for in halves.
    (suspended_in_a_model_that_answers(FAILED), True, rest, ["suspect 1", "suspect 2"]),
    (suspended_in_a_model_that_answers(FAILED), True, run_out, ["suspect 1", "suspect 2"]),
    (suspended_in_a_model_that_answers(BUSY), True, run_out, ["suspect 1", "suspect 2"]),
    (suspended_in_a_model_that_answers(BUSY), True, rest, ["suspect 1"] * 2),
    (probed, False, rest, ["suspect 1"] * 2),
    (probed, False, run_out, ["suspect 1"] * 2),
    (probed, False, take_back, ["open"] * 2),
    (split, False, rest, ["suspect 1", "suspect 2"]),
    (split, False, run_out, ["suspect 1", "suspect 2"]),
    (split, False, end, ["suspect 1", "suspect 2"]),
    (on_trial, False, rest, ["released"] * 2),
    (on_trial, False, run_out, ["counted"] * 2),
    (on_trial, False, end, ["released"] * 2),
]


@pytest.mark.parametrize(("state", "suspect", "way_out", "outcomes"), TABLE)
def test_each_way_out_leaves_each_row_with_an_outcome_or_a_place(
    state: Callable[[Desk], None], suspect: bool, way_out: Callable[[Desk], None], outcomes: list[str]
) -> None:
    desk = Desk(suspect=suspect)
    state(desk)
    desk.check()

    way_out(desk)

    assert desk.outcomes() == outcomes
    if way_out not in (end, cancel):
        desk.check()
    if "open" not in outcomes:
        assert not desk.outbox.has_next or way_out in (end, cancel)


@pytest.mark.parametrize("trouble", [FAILED, FELL, BUSY])
@pytest.mark.parametrize("way_out", [rest, run_out])
def test_a_text_that_fails_alone_where_the_model_answers_spends_an_attempt(
    trouble: Trouble, way_out: Callable[[Desk], None]
) -> None:
    """Its server may be so busy with the text that it does not answer the probe behind it."""
    desk = Desk(suspect=True)
    desk.outbox.unpack()
    desk.outbox.waiting.clear()
    desk.outbox.add([desk.outbox.request(["one"], suspect=True), desk.outbox.request(["two"], suspect=True)])
    suspended_in_a_model_that_answers(trouble)(desk)

    way_out(desk)

    assert desk.outcomes() == ["suspect 1 counted", "suspect 3"]


def test_a_request_that_is_taken_back_waits_in_its_place_and_a_probe_is_due_again() -> None:
    desk = Desk()
    probed(desk)
    [probe] = desk.outbox.in_flight

    assert desk.outbox.next() is None
    assert desk.outbox.take_back([probe]) == {1}

    again = desk.outbox.next()
    assert again is not None
    assert again.probe
    assert not desk.outbox.waiting


def test_what_is_packed_again_leaves_suspects_and_the_request_with_a_permit_alone() -> None:
    desk = Desk()
    with_permit(desk)
    desk.outbox.add([desk.outbox.request(["three"]), desk.outbox.request(["four"], suspect=True)])

    assert desk.outbox.unpack() == ["three"]
    assert [list(request.texts) for request in desk.outbox.waiting] == [["one", "two"], ["four"]]


def test_a_new_change_goes_before_all_but_the_request_with_a_permit() -> None:
    desk = Desk()
    desk.outbox.add([desk.outbox.request(["new"])], first=True)
    with_permit(desk)
    desk.outbox.add([desk.outbox.request(["newer"])], first=True)

    assert [list(request.texts) for request in desk.outbox.waiting] == [["new"], ["newer"], ["one", "two"]]


def test_a_permit_that_nothing_needs_any_more_leaves_its_slot() -> None:
    desk = Desk()
    with_permit(desk)
    rest(desk)

    assert not desk.outbox.is_idle
    assert desk.outbox.take_permit_back() == {1}
    assert desk.outbox.is_idle
    assert desk.outbox.take_permit_back() == set()


def test_a_request_is_charged_what_its_permit_was_taken_for() -> None:
    desk = Desk()
    desk.outbox.allow(Permit(0.0, 3), 17)

    request = desk.send()

    assert (request.tokens, request.slot, desk.outbox.slots) == (17, 3, {3})


def test_a_pass_that_has_paid_for_a_probe_or_a_failure_has_more_patience_until_the_next_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "PATIENCE_SECONDS", 10.0)
    monkeypatch.setattr(outbox_module, "SEARCH_SECONDS", 100.0)
    desk = Desk()
    assert desk.outbox.patience() == pytest.approx(10)
    desk.fail(FAILED)
    assert desk.outbox.patience() == pytest.approx(100, abs=5)

    for _ in range(3):
        request = desk.send()
        desk.outbox.land(request)
        assert desk.outbox.patience() == pytest.approx(100, abs=5)
        desk.outbox.accept(request)

    assert desk.outbox.patience() == pytest.approx(10)


def test_patience_ends_where_no_slot_is_free_for_that_long(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    desk.outbox.refused_at = time.monotonic() - PATIENCE_SECONDS - 1
    assert desk.outbox.patience() == 0

    desk.outbox.allow(Permit(0.0), 1)

    assert desk.outbox.patience() == pytest.approx(PATIENCE_SECONDS)
