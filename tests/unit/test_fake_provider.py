"""The provider fake: what its vectors are, and which trouble each fault on order is."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autoembed.batching import estimate_tokens
from autoembed.errors import Fault, ProviderTrouble, Refused, Trouble
from autoembed.model import Embedded, Model, Request
from autoembed.network import Network
from autoembed.providers import fake

MODEL = Model("test", "fake", "test", 8)
NETWORK = Network(1)


def embed(*texts: str, timeout_seconds: float = 5, **options: Any) -> Embedded:
    return fake.embed(Request(replace(MODEL, options=options), texts, timeout_seconds), NETWORK)


def trouble(*texts: str, **options: Any) -> Trouble:
    with pytest.raises(Trouble) as caught:
        embed(*texts, **options)
    return caught.value


def test_a_vector_follows_from_its_text_alone() -> None:
    first = embed("one", "two", "one").vectors
    again = embed("two", "Grüße, 世界 🦊 \udcff", "one").vectors

    assert first.shape == (3, 8)
    assert first.dtype == np.float32
    assert (first[0] == first[2]).all() and (first[0] == again[2]).all() and (first[1] == again[0]).all()
    assert not np.allclose(first[0], first[1])


def test_vectors_are_the_same_in_every_version() -> None:
    assert np.allclose(fake.vector_of("hello", 3), [0.454995, -0.684060, 0.570124], atol=1e-6)


@pytest.mark.parametrize("dimensions", [1, 2, 4000])
def test_vectors_have_length_one(dimensions: int) -> None:
    for text in ("", "one", "two"):
        assert np.linalg.norm(fake.vector_of(text, dimensions)) == pytest.approx(1)


def test_it_counts_tokens() -> None:
    assert embed("one", "two three").tokens == estimate_tokens("one") + estimate_tokens("two three")


@pytest.mark.parametrize(
    ("fault", "kind", "permanent", "retry_after_seconds"),
    [
        ({"status": 400}, Refused, None, None),
        ({"status": 413}, Refused, None, None),
        ({"status": 401}, ProviderTrouble, True, None),
        ({"status": 403}, ProviderTrouble, True, None),
        ({"status": 429}, ProviderTrouble, False, None),
        ({"status": 429, "retry_after_seconds": 1.5}, ProviderTrouble, False, 1.5),
        ({"status": 429, "message": "insufficient_quota"}, ProviderTrouble, True, None),
        ({"status": 503, "retry_after_seconds": 2}, ProviderTrouble, False, 2),
        ({"status": 500}, ProviderTrouble, False, None),
    ],
)
def test_a_fault_is_the_trouble_that_its_status_means_anywhere(
    fault: dict[str, Any], kind: type[Trouble], permanent: bool | None, retry_after_seconds: float | None
) -> None:
    met = trouble("one", faults=[fault])

    assert type(met) is kind
    assert str(met).startswith(f"the provider answered {fault['status']}: ")
    if isinstance(met, ProviderTrouble):
        assert (met.permanent, met.retry_after_seconds) == (permanent, retry_after_seconds)


def test_a_fault_meets_the_requests_alone_that_have_a_text_with_its_match() -> None:
    faults = [{"match": "poison", "status": 400, "message": "bad words"}, {"match": "busy", "status": 503}]

    assert str(trouble("one", "some poison here", faults=faults)) == "the provider answered 400: bad words"
    assert str(trouble("one", "a busy day", faults=faults)) == "the provider answered 503: no explanation"
    assert embed("one", "two", faults=faults).vectors.shape == (2, 8)


def test_a_delay_beyond_the_requests_time_is_no_answer() -> None:
    started = time.monotonic()

    with pytest.raises(ProviderTrouble, match=r"did not answer within 0.1 s"):
        embed("one", timeout_seconds=0.1, delay_seconds=60)

    assert time.monotonic() - started < 5


def test_a_delay_ends_when_it_is_aborted() -> None:
    request = Request(replace(MODEL, options={"delay_seconds": 60}), ["one"], 60)
    threading.Timer(0.1, request.stopped.set).start()

    with pytest.raises(ProviderTrouble, match="the request was stopped"):
        fake.embed(request, NETWORK)

    assert embed("one").vectors.shape == (1, 8)


@pytest.mark.parametrize(
    "options",
    [{}, {"delay_seconds": 0.2, "faults": [{"match": "a", "status": 599, "message": "b", "retry_after_seconds": 0.5}]}],
)
def test_a_right_definition_passes(options: dict[str, Any]) -> None:
    fake.check(replace(MODEL, options=options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key": "env:KEY"}, "takes no api_key"),
        ({"base_url": "https://h"}, "takes no base_url"),
        ({"options": {"delay": 1}}, "the option delay,"),
        ({"options": {"delay_seconds": "1"}}, "option delay_seconds of .* must be a number of seconds"),
        ({"options": {"delay_seconds": -1}}, "option delay_seconds of .* must be a number of seconds"),
        ({"options": {"delay_seconds": True}}, "option delay_seconds of .* must be a number of seconds"),
        ({"options": {"faults": {"status": 400}}}, "option faults of .* must be a list of objects"),
        ({"options": {"faults": [400]}}, "option faults of .* must be a list of objects"),
        ({"options": {"faults": [{}]}}, "option faults of .* without a status"),
        ({"options": {"faults": [{"status": "400"}]}}, "option faults of .* without a status"),
        ({"options": {"faults": [{"status": 200}]}}, "option faults of .* without a status"),
        ({"options": {"faults": [{"status": 400, "times": 1}]}}, "option faults of .* has times, which no fault has"),
        ({"options": {"faults": [{"status": 400, "match": 1}]}}, "option faults of .* a match that is not a text"),
        ({"options": {"faults": [{"status": 400, "message": 1}]}}, "option faults of .* a message that is not a text"),
        (
            {"options": {"faults": [{"status": 429, "retry_after_seconds": "1"}]}},
            "must be a number of seconds",
        ),
    ],
)
def test_a_definition_that_cannot_work_is_the_callers_mistake(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Fault, match=message) as caught:
        fake.check(replace(MODEL, **changes))

    assert caught.value.hint
