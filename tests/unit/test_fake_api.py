"""The fake API: its vectors, what a test may order, what it finds in the log, and the server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

import fake_api
from fake_api import FakeApi, Server, embedding_of
from unit.plain_clients import MODEL, ask, raw, vectors

# --- vectors -----------------------------------------------------------------------------------------


def test_a_text_has_the_same_vector_on_every_machine() -> None:
    vector = embedding_of("The quick brown fox", 4)

    assert vector.tobytes().hex() == "905c203fdb01b0be16d61bbf5287b03e"
    assert sha256(embedding_of("Grüße, 世界 🦊").tobytes()).hexdigest()[:16] == "740aeb84a4e5f2b4"


@pytest.mark.parametrize("dimensions", [1, 2, 383, 1536, 3072])
def test_a_vector_has_unit_length_and_the_dimensions_asked_for(dimensions: int) -> None:
    vector = embedding_of("text", dimensions)

    assert vector.dtype == np.float32
    assert vector.shape == (dimensions,)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_vectors_of_different_texts_are_far_apart() -> None:
    texts = np.array([embedding_of(f"text {number}") for number in range(100)])

    assert np.abs(texts @ texts.T - np.eye(100)).max() < 0.15


def test_vectors_of_different_models_differ_and_fewer_dimensions_are_a_rescaled_prefix() -> None:
    whole, short = embedding_of("text"), embedding_of("text", 100)

    assert abs(float(whole @ embedding_of("text", model="text-embedding-ada-002"))) < 0.15
    assert np.allclose(short, whole[:100] / np.linalg.norm(whole[:100]))


# --- behaviour ---------------------------------------------------------------------------------------


def test_tenant_names_its_own_models(session: requests.Session, api: FakeApi) -> None:
    api.behave(models={"nomic-embed-text": 768})

    answer = ask(session, api, "a", model="nomic-embed-text")

    assert np.array_equal(vectors(answer), [embedding_of("a", 768, "nomic-embed-text")])


def test_tenant_sets_its_own_limit_of_inputs(session: requests.Session, api: FakeApi) -> None:
    api.behave(max_inputs_per_request=32)

    assert ask(session, api, ["a"] * 32).status_code == 200
    assert ask(session, api, ["a"] * 33).status_code == 400


def test_unsupported_dimensions_are_refused_or_ignored(session: requests.Session, api: FakeApi) -> None:
    api.behave(supports_dimensions=False)
    assert ask(session, api, "a", dimensions=8).status_code == 400
    assert ask(session, api, "a").status_code == 200

    api.behave(supports_dimensions="ignore")
    assert np.array_equal(vectors(ask(session, api, "a", dimensions=8)), [embedding_of("a")])


def test_unsupported_base64_is_refused_or_ignored(session: requests.Session, api: FakeApi) -> None:
    api.behave(supports_base64=False)
    assert ask(session, api, "a", encoding_format="base64").status_code == 400
    assert ask(session, api, "a", encoding_format="float").status_code == 200

    api.behave(supports_base64="ignore")
    assert np.array_equal(vectors(ask(session, api, "a", encoding_format="base64")), [embedding_of("a")])


def test_extra_fields_are_accepted_on_order_and_logged(session: requests.Session, api: FakeApi) -> None:
    api.behave(accepts_extra_fields=True)

    assert ask(session, api, "a", input_type="query", user="u").status_code == 200
    assert api.log()[0]["extra_fields"] == {"input_type": "query"}


def test_delay_counts_per_request_and_per_input(session: requests.Session, api: FakeApi) -> None:
    api.behave(delay_seconds=0.05, delay_seconds_per_input=0.01)

    ask(session, api, ["a"] * 5)

    (request,) = api.log()
    assert request["finished_at"] - request["started_at"] >= 0.1


def test_held_requests_wait_until_released(session: requests.Session, api: FakeApi) -> None:
    api.behave(hold=True)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, session, api, "a")
        counters = api.wait_for(held=1)
        assert (counters["in_flight"], counters["statuses"], answer.done()) == (1, {}, False)
        api.release()

        assert answer.result(10).status_code == 200
    assert api.counters()["held"] == 0


def test_hold_on_a_text_holds_no_other(session: requests.Session, api: FakeApi) -> None:
    api.behave(hold=["old", "older"])

    with ThreadPoolExecutor(2) as pool:
        old = pool.submit(requests.post, **raw(api, ["an old text"]))
        older = pool.submit(requests.post, **raw(api, ["x", "an older text"]))
        api.wait_for(held=2)
        assert ask(session, api, "new").status_code == 200
        api.amend(hold="older")
        assert old.result(10).status_code == 200
        assert older.done() is False
        api.amend(hold=False)
        assert older.result(10).status_code == 200

    assert [request["texts"][-1] for request in sorted(api.log(), key=lambda each: each["finished_at"])] == [
        "new",
        "an old text",
        "an older text",
    ]


def test_held_request_is_answered_as_ordered_when_released(session: requests.Session, api: FakeApi) -> None:
    api.behave(hold=True)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, session, api, "a")
        api.wait_for(held=1)
        api.behave(faults=[{"status": 503}])

        assert answer.result(10).status_code == 503


def test_client_that_goes_ends_its_held_request(session: requests.Session, api: FakeApi) -> None:
    api.behave(hold=True)

    with pytest.raises(requests.ReadTimeout):
        session.post(f"{api.base_url}/embeddings", json={"model": MODEL, "input": "a"}, timeout=0.1)

    assert api.wait_until_idle()["statuses"] == {"none": 1}


def test_reset_lets_go_and_forgets(session: requests.Session, api: FakeApi) -> None:
    api.behave(hold=True)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, session, api, "a")
        api.wait_for(held=1)
        api.reset()
        assert answer.result(10).status_code == 200

    assert api.log() == []
    assert ask(session, api, "a").status_code == 200


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"dealy_seconds": 1}, "behaviour has no 'dealy_seconds'; it has accepts_extra_fields, api_key"),
        ({"delay_seconds": "1"}, "behaviour: \"1\" is no value for 'delay_seconds'"),
        ({"hold": 3}, "behaviour: 3 is no value for 'hold'"),
        ({"supports_base64": "no"}, "behaviour: \"no\" is no value for 'supports_base64'"),
        ({"models": {"a": 0}}, "behaviour: {\"a\": 0} is no value for 'models'"),
        ({"rate_limit": {"per_minute": 1}}, "ratelimit has no 'per_minute'"),
        ({"rate_limit": {"requests_per_minute": 0}}, "ratelimit: 0 is no value for 'requests_per_minute'"),
        ({"faults": {"status": 500}}, "is no value for 'faults'"),
        ({"faults": [7]}, "fault must be an object, not 7"),
        ({"faults": [{"stauts": 500}]}, "fault has no 'stauts'"),
        ({"faults": [{"nan": False}]}, "fault: false is no value for 'nan'"),
        ({"faults": [{"status": 500, "times": "always"}]}, "fault: \"always\" is no value for 'times'"),
        ({"faults": [{"nan": True, "body": "a"}]}, "fault: 'body' goes with 'status' only"),
        ({"faults": [{"match": "a"}]}, "fault must have exactly one of status, hang, close,"),
        ({"faults": [{"nan": True, "close": True}]}, "fault must have exactly one of status, hang, close,"),
    ],
)
def test_order_that_is_not_understood_is_refused_and_changes_nothing(
    session: requests.Session, api: FakeApi, order: dict[str, Any], message: str
) -> None:
    api.behave(max_inputs_per_request=1)

    answer = session.put(f"{api.control_url}/control/{api.tenant}", json=order, timeout=10)
    with pytest.raises(ValueError, match=r"behaviour|fault|ratelimit") as caught:
        api.amend(**order)

    assert answer.status_code == 400
    assert message in answer.json()["error"] == str(caught.value)
    assert ask(session, api, ["a", "b"]).status_code == 400


@pytest.mark.parametrize(("method", "order"), [("PUT", "[]"), ("PUT", "{"), ("PATCH", "3")])
def test_order_that_is_no_object_is_refused(session: requests.Session, api: FakeApi, method: str, order: str) -> None:
    answer = session.request(method, f"{api.control_url}/control/{api.tenant}", data=order, timeout=10)

    assert answer.status_code == 400


def test_amending_keeps_what_is_not_named(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"status": 500, "times": 2, "body": {"a": None}}], max_inputs_per_request=1)
    assert ask(session, api, "a").json() == {"a": None}

    api.amend(keep_texts=False)

    assert [ask(session, api, "a").status_code for _ in range(2)] == [500, 200]
    assert ask(session, api, ["a", "b"]).status_code == 400


# --- log and counters --------------------------------------------------------------------------------


def test_log_tells_all_about_a_request_but_the_key(session: requests.Session, api: FakeApi) -> None:
    before = time.monotonic()
    ask(session, api, ["a", "b"], dimensions=8, encoding_format="float")

    (request,) = api.log()

    assert before <= request.pop("started_at") <= request.pop("finished_at") <= time.monotonic()
    assert {"Authorization", "Content-Type", "User-Agent"} <= set(request.pop("headers"))
    assert request == {
        "method": "POST",
        "path": f"/{api.tenant}/v1/embeddings",
        "key_sha256": sha256(b"sk-right").hexdigest(),
        "inputs": 2,
        "texts": ["a", "b"],
        "model": MODEL,
        "dimensions": 8,
        "encoding_format": "float",
        "settings": {"model": MODEL, "dimensions": 8, "encoding_format": "float"},
        "extra_fields": {},
        "fault": None,
        "status": 200,
    }
    assert "sk-right" not in json.dumps(api._call("GET", f"control/{api.tenant}"))


def test_counters_count(session: requests.Session, api: FakeApi) -> None:
    api.behave(faults=[{"status": 500}])
    ask(session, api, ["refused"])
    ask(session, api, ["four", "eight ch"])
    ask(session, api, ["four", "new"])

    assert api.counters() == {
        "requests": 3,
        "inputs": 5,
        "distinct_texts": 4,
        "tokens": 5,
        "in_flight": 0,
        "max_in_flight": 1,
        "held": 0,
        "connections": 1,
        "rate_limited": 0,
        "statuses": {"500": 1, "200": 2},
    }
    assert api.texts() == ["refused", "four", "eight ch", "four", "new"]


def test_max_in_flight_and_connections_count_concurrent_requests(api: FakeApi) -> None:
    api.behave(hold=True)

    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(requests.post, **raw(api, [f"text {number}"])) for number in range(5)]
        api.wait_for(held=5)
        api.release()
        assert [answer.result(10).status_code for answer in answers] == [200] * 5

    counters = api.counters()
    assert (counters["max_in_flight"], counters["connections"], counters["in_flight"]) == (5, 5, 0)


def test_texts_are_not_kept_when_not_wanted_but_still_counted(session: requests.Session, api: FakeApi) -> None:
    api.behave(keep_texts=False)
    ask(session, api, ["a", "b", "a"])

    assert (api.log()[0]["texts"], api.texts()) == (None, [])
    assert (api.counters()["inputs"], api.counters()["distinct_texts"]) == (3, 2)


def test_waiting_for_what_does_not_come_ends(api: FakeApi) -> None:
    with pytest.raises(TimeoutError, match="'requests': 1"):
        api.wait_for(seconds=0.05, requests=1)


def test_waiting_for_a_counter_that_is_none_is_an_error(api: FakeApi) -> None:
    with pytest.raises(ValueError, match="no such counters: hold"):
        api.wait_for(hold=1)


def test_tenants_are_apart(session: requests.Session, server: Server) -> None:
    left, right = server.api("left"), server.api("right")
    left.behave(faults=[{"status": 500, "times": "forever"}])

    assert ask(session, left, "a").status_code == 500
    assert ask(session, right, "b").status_code == 200

    assert (left.texts(), right.texts()) == (["a"], ["b"])
    left.reset()
    assert (left.texts(), right.texts()) == ([], ["b"])


# --- server ------------------------------------------------------------------------------------------


def test_port_refuses_while_it_is_closed_and_keeps_its_tenants(session: requests.Session, api: FakeApi) -> None:
    port = api.listen()
    elsewhere = FakeApi(api.control_url, f"http://127.0.0.1:{port}/{api.tenant}/v1", api.tenant)
    assert ask(session, elsewhere, "a").status_code == 200

    api.refuse(port)
    for _ in range(2):  # the kept connection first, then a new one
        with pytest.raises(requests.ConnectionError):
            ask(session, elsewhere, "b")
    assert api.listen(port) == port

    assert ask(session, elsewhere, "c").status_code == 200
    assert api.texts() == ["a", "c"]
    api.refuse(port)


def test_closing_a_port_ends_the_requests_on_it(session: requests.Session, api: FakeApi) -> None:
    port = api.listen()
    elsewhere = FakeApi(api.control_url, f"http://127.0.0.1:{port}/{api.tenant}/v1", api.tenant)
    api.behave(hold=True)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, session, elsewhere, "a")
        api.wait_for(held=1)
        api.refuse(port)
        assert isinstance(answer.exception(10), requests.ConnectionError)


def test_the_servers_own_port_stays_open(api: FakeApi, server: Server) -> None:
    with pytest.raises(ValueError, match="stays open"):
        api.refuse(server.port)
    assert api.counters()["requests"] == 0


def test_port_that_is_taken_is_told(api: FakeApi, server: Server) -> None:
    with Server() as other, pytest.raises(ValueError, match=f"cannot listen on port {other.port}"):
        api.listen(other.port)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"]
    subprocess.run([*command, *names, "-out", cert, "-keyout", key], check=True, capture_output=True)
    return cert, key


def test_https_is_served_and_does_not_verify_unless_trusted(certificate: tuple[str, str]) -> None:
    with Server(tls_cert=certificate[0], tls_key=certificate[1]) as server, requests.Session() as session:
        api = server.api("secure")
        session.trust_env = False
        assert api.base_url.startswith("https://")

        with pytest.raises(requests.exceptions.SSLError):
            session.post(**raw(api, ["a"]), timeout=10)
        assert session.post(**raw(api, ["a"]), timeout=10, verify=certificate[0]).status_code == 200

        assert api.texts() == ["a"]


def test_client_that_never_shakes_hands_is_in_nobodys_way(certificate: tuple[str, str]) -> None:
    with Server(tls_cert=certificate[0], tls_key=certificate[1]) as server, requests.Session() as session:
        session.trust_env = False
        with socket.create_connection(("127.0.0.1", server.port)):
            order = raw(server.api("secure"), ["a"])
            assert session.post(**order, timeout=10, verify=certificate[0]).status_code == 200


def test_further_port_may_speak_tls(api: FakeApi, certificate: tuple[str, str]) -> None:
    port = api.listen(tls_cert=certificate[0], tls_key=certificate[1])
    elsewhere = FakeApi(api.control_url, f"https://127.0.0.1:{port}/{api.tenant}/v1", api.tenant)

    with requests.Session() as session:
        session.trust_env = False
        assert session.post(**raw(elsewhere, ["a"]), timeout=10, verify=certificate[0]).status_code == 200
    api.refuse(port)


def test_client_that_asks_first_is_told_to_go_on(api: FakeApi, server: Server) -> None:
    head = f"POST /{api.tenant}/v1/embeddings HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"

    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode())

        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")


def test_program_says_where_it_listens_and_serves() -> None:
    command = [sys.executable, str(Path(fake_api.__file__).parent), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout
            url = program.stdout.readline().removeprefix("listening on ").strip()
            assert requests.get(f"{url}/health", timeout=10).status_code == 200
        finally:
            program.terminate()


def test_small_answer_leaves_at_once_and_in_one_piece(session: requests.Session, api: FakeApi, server: Server) -> None:
    body = ask(session, api, "a", encoding_format="base64").content
    ask_again = f"POST /{api.tenant}/v1/embeddings HTTP/1.1\r\nAuthorization: Bearer k\r\nContent-Length: "
    order = json.dumps({"model": MODEL, "input": "a", "encoding_format": "base64"})

    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"{ask_again}{len(order)}\r\n\r\n{order}".encode())

        assert connection.recv(1 << 16).endswith(body)
        accepted = server.listeners[server.port].connections
        assert {each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in accepted} == {1}
