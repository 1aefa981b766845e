"""Flight: outcomes, limits, signals, and that nothing is left running."""

from __future__ import annotations

import itertools
import signal
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from autoembed import flight as flight_module
from autoembed.errors import Trouble
from autoembed.flight import Flight, Turns, signals_blocked
from waiting import wait_until


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Gate:
    """Calls that wait until they are let through or aborted; abort() fails when called for ever."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.aborts = 0
        self.inside = 0

    def wait(self) -> str:
        self.inside += 1
        return "through" if self.opened.wait(20) else "too late"

    def abort(self) -> None:
        self.aborts += 1
        self.opened.set()
        assert self.aborts < 40, "aborted again and again, and the calls never ended"


def nothing() -> None:
    pass


def mask() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_outcomes_come_with_the_tags_of_their_calls() -> None:
    with Flight[int, int](4, nothing, nothing) as flight:
        for number in range(20):
            flight.submit(number, lambda number=number: number * number)  # type: ignore[misc]

        outcomes = dict(flight.landed())

    assert outcomes == {number: number * number for number in range(20)}


def test_what_a_call_raises_is_its_outcome_and_holds_up_no_other() -> None:
    error = KeyboardInterrupt("of a thread")

    def fail() -> str:
        raise error

    with Flight[str, str](2, nothing, nothing) as flight:
        flight.submit("bad", fail)
        flight.submit("good", lambda: "fine")

        assert dict(flight.landed()) == {"bad": error, "good": "fine"}


def test_landing_nothing_ends_at_once() -> None:
    with Flight[int, int](1, nothing, nothing) as flight:
        assert list(flight.landed()) == []


def test_a_call_lands_while_another_still_runs() -> None:
    gate = Gate()
    with Flight[str, str](2, nothing, gate.abort) as flight:
        flight.submit("slow", gate.wait)
        flight.submit("fast", lambda: "done")
        landing = flight.landed()

        assert next(landing) == ("fast", "done")
        assert not gate.opened.is_set()
        gate.opened.set()
        assert list(landing) == [("slow", "through")]


def test_of_outcomes_that_are_there_the_newest_comes_first_and_each_after_a_breath() -> None:
    looks: list[None] = []
    with Flight[int, int](3, lambda: looks.append(None), nothing) as flight:
        for number in range(3):
            flight.submit(number, lambda number=number: number)  # type: ignore[misc]
        wait_until(lambda: flight.outcomes() == len(flight))

        assert [tag for tag, _ in flight.landed()] == [2, 1, 0]

    assert len(looks) == 3


def test_an_outcome_that_has_waited_for_a_while_comes_before_newer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the newest always came first, an answer would never come to its rows while new ones arrive fast enough."""
    monkeypatch.setattr(flight_module, "NEWEST_FIRST_SECONDS", 0.0)
    landed: list[int] = []
    with Flight[int, None](3, nothing, nothing) as flight:
        flight.submit(0, nothing)
        for tag, _ in flight.landed():
            landed.append(tag)
            for number in range(2 * tag + 1, 2 * tag + 3) if tag < 20 else ():
                flight.submit(number, nothing)
            wait_until(lambda: flight.outcomes() == len(flight))

    # A breath after they were seen, outcomes land in the order in which they came.
    assert landed.index(1) < 5
    assert len(landed) == 41


def test_each_second_outcome_is_a_preferred_one_and_the_others_have_their_turns_between() -> None:
    with Flight[int, None](6, nothing, nothing, lambda tags: [tag for tag in tags if tag < 3]) as flight:
        for number in range(6):
            flight.submit(number, nothing)
        wait_until(lambda: flight.outcomes() == len(flight))

        landed = [tag for tag, _ in flight.landed()]

    assert [tag < 3 for tag in landed[:3]] == [True, False, True]
    assert sorted(landed) == list(range(6))


def test_calls_submitted_while_landing_are_landed_too() -> None:
    landed = []
    with Flight[int, int](2, nothing, nothing) as flight:
        flight.submit(8, lambda: 8)
        for tag, _ in flight.landed():
            landed.append(tag)
            if tag > 1:
                for half in (tag // 2, tag // 2):
                    flight.submit(half, lambda: 0)

    assert Counter(landed) == {8: 1, 4: 2, 2: 4, 1: 8}


@pytest.mark.parametrize("max_calls", [1, 3])
def test_exactly_max_calls_run_at_a_time(max_calls: int) -> None:
    gate = Gate()
    looks = itertools.count()

    def look() -> None:
        assert gate.opened.is_set() or gate.inside == max_calls
        if next(looks) == 2:
            gate.opened.set()

    with Flight[int, str](max_calls, look, gate.abort) as flight:
        for number in range(6):
            flight.submit(number, gate.wait)
        wait_until(lambda: gate.inside == max_calls)
        assert len(list(flight.landed())) == 6


def test_a_call_that_runs_leaves_time_between_waits() -> None:
    gate = Gate()
    looks = itertools.count(1)

    def look() -> None:
        if next(looks) == 5:
            gate.opened.set()

    with Flight[int, str](1, look, gate.abort) as flight:
        flight.submit(1, gate.wait)
        assert list(flight.landed()) == [(1, "through")]

    assert gate.aborts == 0


def test_an_exception_in_look_aborts_the_calls_and_comes_out() -> None:
    class Cancelled(BaseException):
        pass

    def look() -> None:
        raise Cancelled

    gate = Gate()
    with pytest.raises(Cancelled), Flight[int, str](2, look, gate.abort) as flight:
        for number in range(2):
            flight.submit(number, gate.wait)
        list(flight.landed())

    # Not the end of the calls' own time.
    assert gate.opened.is_set()
    assert gate.aborts >= 1


def test_leaving_ends_calls_that_run() -> None:
    gate = Gate()
    with Flight[int, str](2, nothing, gate.abort) as flight:
        flight.submit(1, gate.wait)
        flight.submit(2, gate.wait)

    assert gate.aborts >= 1


def test_leaving_ends_although_calls_wait_that_never_began() -> None:
    gate = Gate()
    with Flight[int, str](1, nothing, gate.abort) as flight:
        for number in range(3):
            flight.submit(number, gate.wait)
        wait_until(lambda: gate.inside == 1)

    assert gate.inside == 1


def test_abort_is_repeated_until_a_call_that_missed_it_has_ended() -> None:
    aborts = itertools.count(1)
    ended = threading.Event()

    def abort() -> None:
        if next(aborts) == 3:
            ended.set()

    with Flight[int, bool](1, nothing, abort) as flight:
        flight.submit(1, lambda: ended.wait(5))

    assert ended.is_set()


def test_leaving_without_calls_under_way_aborts_nothing() -> None:
    gate = Gate()
    with Flight[int, int](2, nothing, gate.abort) as flight:
        flight.submit(1, lambda: 1)
        list(flight.landed())

    assert gate.aborts == 0


def test_withdrawing_takes_only_what_is_unwanted_and_has_not_begun() -> None:
    gate = Gate()
    with Flight[int, str](1, nothing, gate.abort) as flight:
        for number in range(5):
            flight.submit(number, gate.wait)
        wait_until(lambda: gate.inside == 1)

        taken = flight.withdraw(lambda number: number != 3)
        gate.opened.set()

        assert taken == [1, 2, 4]
        assert dict(flight.landed()) == {0: "through", 3: "through"}


def test_withdrawing_while_landing_lands_the_others_only() -> None:
    landed = []
    with Flight[int, int](1, nothing, nothing) as flight:
        for number in range(200):
            flight.submit(number, lambda: 0)
        for tag, _ in flight.landed():
            landed.append(tag)
            if tag == 0:
                landed += flight.withdraw(lambda _: True)

    assert sorted(landed) == list(range(200))


def test_calls_for_the_backends_thread_are_made_there_one_by_one_and_keep_no_thread_from_landing() -> None:
    gate = Gate()
    made: list[int] = []

    def make() -> str:
        made.append(threading.get_ident())
        return "here"

    with Flight[str, str](1, nothing, gate.abort) as flight:
        flight.submit("thread", gate.wait)
        wait_until(lambda: gate.inside == 1)
        for tag in ("first", "second"):
            flight.submit(tag, make, here=True)
        assert (len(flight), made) == (3, [])
        landing = flight.landed()

        assert next(landing) == ("first", "here")
        gate.opened.set()
        wait_until(lambda: flight.outcomes() == 1)
        assert next(landing) == ("thread", "through")
        assert list(landing) == [("second", "here")]

    assert made == [threading.get_ident()] * 2


def test_trouble_of_a_call_in_the_backends_thread_is_its_outcome() -> None:
    trouble = Trouble("a bad text")

    def fail() -> str:
        raise trouble

    with Flight[str, str](1, nothing, nothing) as flight:
        flight.submit("bad", fail, here=True)
        flight.submit("good", lambda: "fine", here=True)

        assert list(flight.landed()) == [("bad", trouble), ("good", "fine")]


def test_a_cancel_in_the_backends_thread_comes_out_and_the_other_calls_are_never_made() -> None:
    class Cancelled(Exception):
        pass

    made = []

    def cancel() -> None:
        raise Cancelled

    with pytest.raises(Cancelled), Flight[int, None](1, nothing, nothing) as flight:
        flight.submit(1, cancel, here=True)
        flight.submit(2, lambda: made.append(2), here=True)
        list(flight.landed())

    assert made == []


def test_breathing_goes_on_between_calls_in_the_backends_thread() -> None:
    order: list[str] = []
    with Flight[int, None](1, lambda: order.append("breath"), nothing) as flight:
        for number in range(2):
            flight.submit(number, lambda: order.append("call"), here=True)
        list(flight.landed())

    assert order == ["breath", "call", "breath", "call"]


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(flight_module, "time", clock)
    return clock


def test_a_call_in_the_backends_thread_leaves_the_others_as_much_time_as_the_last_one_took(clock: Clock) -> None:
    gate = Gate()

    def breathe() -> None:
        # Whatever came while the call before held up all. One ends soon, and one never.
        if clock.now == 10 and not gate.inside:
            flight.submit("never", gate.wait)
            wait_until(lambda: gate.inside == 1)
            flight.submit("soon", lambda: "")
            wait_until(lambda: flight.outcomes() == 1)
        elif clock.now >= 10:
            clock.now += 1

    def take_ten_seconds() -> str:
        clock.now += 10
        return ""

    with Flight[str, str](2, breathe, gate.abort) as flight:
        for tag in ("first", "second", "third"):
            flight.submit(tag, take_ten_seconds, here=True)
        landing = flight.landed()

        assert [next(landing)[0], next(landing)[0]] == ["first", "soon"]
        assert next(landing)[0] == "second"
        assert clock.now == 30
        gate.opened.set()
        assert {tag for tag, _ in landing} == {"never", "third"}


def test_calls_that_start_later_have_that_time_too_and_in_the_next_flight(clock: Clock) -> None:
    gate = Gate()
    turns = Turns()

    def take(seconds: float) -> str:
        clock.now += seconds
        return ""

    for seconds in (10.0, 0.0):
        # A quick call makes others wait less, but not no more.
        with Flight[str, str](1, nothing, nothing, turns=turns) as flight:
            flight.submit("here", lambda: take(seconds), here=True)  # noqa: B023
            assert [tag for tag, _ in flight.landed()] == ["here"]
    clock.now = 1000.0

    with Flight[str, str](2, lambda: clock.__setattr__("now", clock.now + 1), gate.abort, turns=turns) as flight:
        flight.submit("here", lambda: "", here=True)
        flight.submit("thread", gate.wait)
        landing = flight.landed()

        assert next(landing)[0] == "here"
        assert clock.now == 1005.0
        gate.opened.set()
        assert [tag for tag, _ in landing] == ["thread"]


def test_withdrawing_takes_calls_of_the_backends_thread_too() -> None:
    with Flight[int, str](1, nothing, nothing) as flight:
        for number in range(4):
            flight.submit(number, lambda: "made", here=True)

        assert flight.withdraw(lambda number: number != 2) == [0, 1, 3]
        assert list(flight.landed()) == [(2, "made")]


def test_threads_have_all_signals_blocked() -> None:
    with Flight[int, set[int]](1, nothing, nothing) as flight:
        flight.submit(1, mask)
        [(_, blocked)] = flight.landed()

    assert blocked == set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}


def test_the_callers_signal_mask_is_as_before() -> None:
    own = {signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_SETMASK, own)
    try:
        with Flight[int, int](1, nothing, nothing) as flight:
            flight.submit(1, lambda: 1)
            during = mask()
            list(flight.landed())

        assert (during, mask()) == (own, own)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_the_signal_mask_is_restored_after_an_error() -> None:
    before = signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        with pytest.raises(ValueError, match="inside"), signals_blocked():
            raise ValueError("inside")

        assert mask() == set()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
