"""The fake API's faults, each as a plain client sees it."""

from __future__ import annotations

import base64
import datetime
import math
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from fake_api import FakeApi, embedding_of
from fake_api.behaviour import Fault
from fake_api.faults import FAULTS
from unit.plain_clients import MODEL, ask, error, raw, vectors
from waiting import wait_until


def test_faults_come_in_order_and_as_often_as_told(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"status": 500, "times": 2}, {"status": 429}])

    assert [ask(session, api, "a").status_code for _ in range(4)] == [500, 500, 429, 200]


def test_fault_for_a_text_meets_requests_with_that_text_only_and_forever(
    session: requests.Session, api: FakeApi
) -> None:
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])

    assert [
        ask(session, api, texts).status_code for texts in (["a"], ["a", "some poison"], ["b"], ["poison"], ["poison"])
    ] == [200, 400, 200, 400, 400]


def test_status_is_sent_with_the_body_and_headers_told(session: requests.Session, api: FakeApi) -> None:
    api.behave(
        faults=[
            {"status": 418, "body": {"error": "teapot"}, "headers": {"X-Kind": "pot"}},
            {"status": 502, "body": "<html>bad gateway</html>"},
        ]
    )

    pot, gateway = ask(session, api, "a"), ask(session, api, "a")

    assert (pot.status_code, pot.json(), pot.headers["X-Kind"]) == (418, {"error": "teapot"}, "pot")
    assert (gateway.status_code, gateway.text) == (502, "<html>bad gateway</html>")


def test_retry_after_is_sent_as_seconds_or_as_a_date(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"status": 429, "retry_after": 7}, {"status": 503, "retry_after_date": 60}])

    seconds, date = ask(session, api, "a"), ask(session, api, "a")

    assert seconds.headers["Retry-After"] == "7"
    left = parsedate_to_datetime(date.headers["Retry-After"]) - datetime.datetime.now(datetime.UTC)
    assert 50 < left.total_seconds() <= 61


def test_hanging_request_gets_no_answer_until_the_client_goes(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"hang": True}])

    with pytest.raises(requests.ReadTimeout):
        session.post(f"{api.base_url}/embeddings", json={"model": MODEL, "input": "a"}, timeout=0.2)

    assert api.wait_until_idle()["statuses"] == {"none": 1}


def test_request_that_hangs_for_a_time_is_answered_then(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"hang": 0.1}])

    assert ask(session, api, "a").status_code == 200
    (request,) = api.log()
    assert request["finished_at"] - request["started_at"] >= 0.1


def test_closed_connection_is_an_error_and_the_next_request_works(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"close": True}])

    with pytest.raises(requests.ConnectionError):
        ask(session, api, "a")
    assert ask(session, api, "a").status_code == 200
    assert api.counters()["statuses"] == {"none": 1, "200": 1}


def is_answered(session: requests.Session, api: FakeApi) -> bool:
    try:
        return ask(session, api, "harmless").status_code == 200
    except requests.ConnectionError:
        return False


def test_a_fall_is_an_error_and_so_are_requests_until_it_is_over(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"fall": 0.5, "match": "poison"}])

    for text in ("poison", "harmless"):
        with pytest.raises(requests.ConnectionError):
            ask(session, api, text)
    wait_until(lambda: is_answered(session, api))


@pytest.mark.parametrize("bytes_sent", [True, 10])
def test_body_that_is_cut_off_ends_before_its_announced_length(
    session: requests.Session, api: FakeApi, bytes_sent: bool | int
) -> None:
    api.behave(faults=[{"cut_off": bytes_sent}])

    with pytest.raises(requests.exceptions.ChunkedEncodingError, match=r"IncompleteRead\((10|\d{4}) bytes"):
        ask(session, api, "a", encoding_format="base64")


def test_slow_body_comes_right_but_late(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"slow_body": 0.5}])
    started_at = time.monotonic()

    with session.post(**raw(api, ["a"]), stream=True, timeout=10) as answer:
        headers_after_seconds = time.monotonic() - started_at
        assert np.array_equal(vectors(answer), [embedding_of("a")])

    assert time.monotonic() - started_at >= 0.5 > headers_after_seconds


@pytest.mark.parametrize("kind", ["big_body", "gzip_body"])
def test_big_body_has_the_size_told_and_does_not_announce_it(
    session: requests.Session, api: FakeApi, kind: str
) -> None:
    api.behave(faults=[{kind: 3_000_000}])

    with session.post(**raw(api, ["a"]), stream=True, timeout=10) as answer:
        size = sum(map(len, answer.iter_content(1 << 16)))

    assert size == 3_000_000
    assert "Content-Length" not in answer.headers
    assert answer.headers.get("Content-Encoding") == ("gzip" if kind == "gzip_body" else None)


def test_client_may_leave_a_big_body_at_any_point(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"big_body": 1 << 30}])

    with session.post(**raw(api, ["a"]), stream=True, timeout=10) as answer:
        assert next(answer.iter_content(1000)).startswith(b'{"')

    api.wait_until_idle()
    assert ask(session, api, "a").status_code == 200


def test_not_json_is_html(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"not_json": True}])

    answer = ask(session, api, "a")

    assert answer.status_code == 200
    with pytest.raises(requests.JSONDecodeError):
        answer.json()


def test_redirect_leads_to_the_url_told(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"redirect": "http://169.254.169.254/latest"}])

    answer = session.post(**raw(api, ["a"]), allow_redirects=False, timeout=10)

    assert (answer.status_code, answer.headers["Location"]) == (307, "http://169.254.169.254/latest")


def test_key_is_echoed_on_order(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"echo_authorization": True}])

    answer = ask(session, api, "a")

    assert (answer.status_code, "Bearer sk-right" in error(answer)["message"]) == (401, True)


@pytest.mark.parametrize(("difference", "count"), [(True, 2), (-2, 1), (1, 4)])
def test_wrong_count_gives_fewer_or_more(
    session: requests.Session, api: FakeApi, difference: bool | int, count: int
) -> None:
    api.behave(faults=[{"wrong_count": difference}])

    data = ask(session, api, ["a", "b", "c"]).json()["data"]

    assert [item["index"] for item in data] == list(range(count))


@pytest.mark.parametrize(("dimensions", "size"), [(True, 1535), (384, 384), (2000, 2000)])
def test_wrong_dimensions_are_what_was_told(
    session: requests.Session, api: FakeApi, dimensions: bool | int, size: int
) -> None:
    api.behave(faults=[{"wrong_dimensions": dimensions}])

    assert [len(vector) for vector in vectors(ask(session, api, ["a", "b"]))] == [size, size]


@pytest.mark.parametrize(("fault", "is_it"), [("nan", math.isnan), ("infinity", math.isinf)])
def test_one_number_of_the_last_vector_is_none(session: requests.Session, api: FakeApi, fault: str, is_it: Any) -> None:
    api.behave(faults=[{fault: True, "times": 2}])

    good, bad = vectors(ask(session, api, ["a", "b"]))
    encoded = ask(session, api, ["a", "b"], encoding_format="base64").json()["data"][1]["embedding"]

    assert np.array_equal(good, embedding_of("a"))
    assert sum(map(is_it, bad)) == 1
    assert sum(map(is_it, np.frombuffer(base64.b64decode(encoded), "<f4"))) == 1


@pytest.mark.parametrize(
    ("fault", "indexes"),
    [("duplicate_index", [0, 1, 0]), ("missing_index", [0, 1, None]), ("shuffled", [2, 1, 0])],
)
def test_indexes_are_twisted_as_told(
    session: requests.Session, api: FakeApi, fault: str, indexes: list[int | None]
) -> None:
    api.behave(faults=[{fault: True}])

    answer = ask(session, api, ["a", "b", "c"])

    assert [item.get("index") for item in answer.json()["data"]] == indexes
    order = "cba" if fault == "shuffled" else "abc"
    assert np.array_equal(vectors(answer), [embedding_of(text) for text in order])


def test_invalid_base64_cannot_be_decoded(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"invalid_base64": True}])

    data = ask(session, api, ["a", "b"], encoding_format="base64").json()["data"]

    assert len(base64.b64decode(data[0]["embedding"], validate=True)) == 1536 * 4
    with pytest.raises(ValueError, match="base64"):
        base64.b64decode(data[1]["embedding"], validate=True)


def test_every_fault_that_can_be_ordered_is_made_and_has_its_test() -> None:
    source = Path(__file__).read_text()

    assert list(FAULTS) == Fault.kinds()
    assert [kind for kind in FAULTS if f'"{kind}"' not in source] == []
