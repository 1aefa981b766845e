"""The provider gemini: what it sends, what it makes of every answer, over the fake API and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoembed.errors import InvalidInput, ProviderTrouble, Refused
from autoembed.model import Ask, Model
from autoembed.network import Network
from autoembed.providers import PROVIDERS, gemini
from fake_api import FakeApi, Server, embedding_of, tokens_in

MODEL = Model("ge", "gemini", "gemini-embedding-001", 256)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


# --- what it sends -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("purpose", "task"), [("document", "RETRIEVAL_DOCUMENT"), ("query", "RETRIEVAL_QUERY")])
@pytest.mark.parametrize("model_id", ["gemini-embedding-001", "models/gemini-embedding-001"])
def test_a_request_has_the_fields_of_the_api_reference(purpose: Any, task: str, model_id: str) -> None:
    settings = {"model": "models/gemini-embedding-001", "outputDimensionality": 256, "taskType": task}

    assert gemini.request_body(Ask(replace(MODEL, model_id=model_id), ["a", "b"], 5, purpose)) == {
        "requests": [
            {**settings, "content": {"parts": [{"text": "a"}]}},
            {**settings, "content": {"parts": [{"text": "b"}]}},
        ]
    }


def test_a_model_that_reads_its_task_in_the_text_is_sent_it_there() -> None:
    model = replace(MODEL, model_id="gemini-embedding-2", options={"query_prefix": "task: search result | query: "})

    (request,) = gemini.request_body(Ask(model, ["a"], 5, "query"))["requests"]

    assert request["content"] == {"parts": [{"text": "task: search result | query: a"}]}
    assert "taskType" not in request


# --- what it makes of an answer ----------------------------------------------------------------------


def answer(embeddings: list[Any]) -> bytes:
    values = [{"values": embedding} for embedding in embeddings]
    return json.dumps({"embeddings": values, "usageMetadata": {"promptTokenCount": 7}}).encode()


def test_vectors_are_brought_to_unit_length() -> None:
    embedded = gemini.embedded_in(answer([[3, 4], [0, 1], [0, 0], [1e38, 1e38]]), 4, 2)

    assert embedded.vectors.dtype == np.float32
    assert embedded.vectors.tolist() == [
        pytest.approx([0.6, 0.8]),
        [0, 1],
        [0, 0],
        pytest.approx([0.5**0.5, 0.5**0.5]),
    ]
    assert embedded.tokens == 7


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html></html>",
        b"null",
        b"[]",
        b"{}",
        b'{"embeddings": null}',
        b'{"embeddings": 5}',
        b"[" * 100_000,
        answer([[1, 2], [3, 4]])[:-5],
        answer([[1, 2], "?!"]),
        answer([[1, 2], ["one", "two"]]),
        answer([[1, 2], {"a": 1}]),
        answer([[1, 2], 5]),
        answer([[1, 2], [[1], [2]]]),
    ],
)
def test_an_answer_in_another_form_is_the_providers_trouble(body: bytes) -> None:
    with pytest.raises(ProviderTrouble, match="not in the form of the Gemini API") as caught:
        gemini.embedded_in(body, 2, 2)

    assert not caught.value.permanent


@pytest.mark.parametrize("embeddings", [[], [[1, 2]], [[1, 2]] * 3])
def test_every_text_must_have_exactly_one_vector(embeddings: list[Any]) -> None:
    with pytest.raises(ProviderTrouble, match="for 2 texts"):
        gemini.embedded_in(answer(embeddings), 2, 2)


def test_an_answer_that_counts_no_tokens_reports_none() -> None:
    body = {name: value for name, value in json.loads(answer([[1, 0]])).items() if name != "usageMetadata"}

    assert gemini.embedded_in(json.dumps(body).encode(), 1, 2).tokens is None


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error": {"status": "INVALID_ARGUMENT", "message": "at most 100 requests"}}', "refused"),
        (400, b'{"error": {"message": "sk-right", "details": [{"reason": "API_KEY_INVALID"}]}}', "permanent"),
        (400, b'{"error": {"status": "FAILED_PRECONDITION", "message": "enable billing"}}', "permanent"),
        (403, b'{"error": {"status": "PERMISSION_DENIED"}}', "permanent"),
        (404, b'{"error": {"status": "NOT_FOUND"}}', "permanent"),
        (429, b'{"error": {"status": "RESOURCE_EXHAUSTED"}}', "passing"),
        (500, b'{"error": {"status": "INTERNAL"}}', "passing"),
        (503, b'{"error": {"status": "UNAVAILABLE"}}', "passing"),
        (504, b'{"error": {"status": "DEADLINE_EXCEEDED"}}', "passing"),
    ],
)
def test_a_status_means_what_the_provider_means_by_it(status: int, body: bytes, kind: str) -> None:
    trouble = gemini.trouble_of(status, {}, body, "sk-right")

    if isinstance(trouble, ProviderTrouble):
        assert kind == ("permanent" if trouble.permanent else "passing")
    else:
        assert kind == "refused"
    assert str(trouble).startswith(f"the provider answered {status}")
    assert "sk-right" not in str(trouble)


@pytest.mark.parametrize(
    ("status", "headers", "delay", "seconds"),
    [
        (429, {}, "34s", 34.0),
        (429, {}, "34.074824224s", 34.074824224),
        (429, {"retry-after": "7"}, "34s", 7.0),
        (429, {}, "soon", None),
        (503, {}, "34s", None),
    ],
)
def test_when_to_come_back_is_read_from_the_body(
    status: int, headers: dict[str, str], delay: str, seconds: float | None
) -> None:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}
    trouble = gemini.trouble_of(status, headers, json.dumps({"error": {"details": [info]}}).encode())

    assert isinstance(trouble, ProviderTrouble)
    assert trouble.retry_after_seconds == seconds


# --- check -------------------------------------------------------------------------------------------


def test_the_provider_has_its_name() -> None:
    assert PROVIDERS["gemini"] is gemini


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key": None}, "has no api_key"),
        ({"base_url": "generativelanguage"}, "not an http or https URL"),
        ({"options": {"task": "query"}}, "the option task"),
        ({"options": {"query_prefix": 1}}, "option query_prefix .* is not a text"),
        ({"options": {"extra_headers": {"X-Goog-Api-Key": "sk"}}}, "would keep a secret"),
    ],
)
def test_a_definition_that_cannot_work_is_the_callers_mistake(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("GEMINI_KEY", "sk-right")
    gemini.check(replace(MODEL, api_key="env:GEMINI_KEY"))

    with pytest.raises(InvalidInput, match=message):
        gemini.check(replace(MODEL, **{"api_key": "env:GEMINI_KEY", **changes}))


# --- over HTTP ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def api(server: Server, request: pytest.FixtureRequest) -> Iterator[FakeApi]:
    api = server.api(sha256(request.node.name.encode()).hexdigest()[:16])
    yield api
    api.reset()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    network = Network(2)
    yield network
    network._connected().close()


@pytest.fixture
def model(api: FakeApi, tmp_path: Path) -> Model:
    (tmp_path / "key").write_text("sk-right\n")
    return replace(MODEL, base_url=api.root + "/v1beta", api_key=f"file:{tmp_path / 'key'}")


def test_each_text_gets_its_vector_and_the_tokens_are_reported(api: FakeApi, model: Model, network: Network) -> None:
    embedded = gemini.embed(Ask(model, TEXTS, 5), network)

    # The API shortens a vector by cutting it: what the fake calls the shorter one is the same, rescaled.
    expected = np.stack([embedding_of(text, 256, MODEL.model_id) for text in TEXTS])
    assert np.allclose(embedded.vectors, expected, atol=1e-6)
    assert embedded.tokens == sum(map(tokens_in, TEXTS))


@pytest.mark.parametrize("model_id", ["gemini-embedding-001", "models/gemini-embedding-001", "gemini-embedding-2"])
def test_a_request_is_sent_as_the_api_reference_has_it(
    api: FakeApi, model: Model, network: Network, model_id: str
) -> None:
    gemini.embed(Ask(replace(model, model_id=model_id), TEXTS, 5, "query"), network)

    (request,) = api.log()
    assert (
        request["path"]
        == f"/{api.tenant}/v1beta/{gemini.name_of(replace(model, model_id=model_id))}:batchEmbedContents"
    )
    assert request["key_sha256"] == sha256(b"sk-right").hexdigest()
    assert "Authorization" not in request["headers"]
    assert request["texts"] == TEXTS


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"status": 400}, Refused),
        ({"status": 413}, Refused),
        ({"nan": True}, Refused),
        ({"infinity": True}, Refused),
        ({"status": 401}, "permanent"),
        ({"status": 403}, "permanent"),
        ({"status": 404}, "permanent"),
        ({"redirect": "http://127.0.0.1:9/elsewhere"}, "permanent"),
        ({"wrong_dimensions": True}, "permanent"),
        ({"wrong_dimensions": 3}, "permanent"),
        ({"status": 429}, "passing"),
        ({"status": 500}, "passing"),
        ({"status": 502}, "passing"),
        ({"status": 503}, "passing"),
        ({"status": 504}, "passing"),
        ({"close": True}, "passing"),
        ({"cut_off": True}, "passing"),
        ({"not_json": True}, "passing"),
        ({"wrong_count": True}, "passing"),
        ({"wrong_count": 1}, "passing"),
        ({"invalid_base64": True}, "passing"),
    ],
)
def test_a_fault_of_the_api_is_its_kind_of_trouble(
    api: FakeApi, model: Model, network: Network, fault: dict[str, Any], kind: Any
) -> None:
    api.behave(faults=[fault])

    with pytest.raises(Refused if kind is Refused else ProviderTrouble) as caught:
        gemini.embed(Ask(model, TEXTS, 5), network)

    if isinstance(caught.value, ProviderTrouble):
        assert caught.value.permanent == (kind == "permanent")
    assert gemini.embed(Ask(model, TEXTS, 5), network).vectors.shape == (3, MODEL.dimensions)


@pytest.mark.parametrize(
    ("changes", "texts", "kind", "message"),
    [
        ({"model_id": "gemini-9"}, ["a"], ProviderTrouble, "404: The model is not found"),
        ({}, ["a" * 8300], Refused, "400: The input token count .2075. exceeds .* .2048."),
        ({"dimensions": 5000}, ["a"], Refused, "400: output_dimensionality must be between"),
    ],
)
def test_what_the_api_refuses_is_said_in_its_words(
    api: FakeApi,
    model: Model,
    network: Network,
    changes: dict[str, Any],
    texts: list[str],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message) as caught:
        gemini.embed(Ask(replace(model, **changes), texts, 5), network)

    assert getattr(caught.value, "permanent", True)


def test_the_limits_are_those_of_the_api(api: FakeApi, model: Model, network: Network) -> None:
    most = gemini.MAX_INPUTS_PER_REQUEST

    assert len(gemini.embed(Ask(model, ["a"] * most, 5), network).vectors) == most
    with pytest.raises(Refused):
        gemini.embed(Ask(model, ["a"] * (most + 1), 5), network)


@pytest.mark.parametrize("key", ["right", None])
def test_a_key_that_is_refused_needs_somebody_to_act(
    api: FakeApi, model: Model, network: Network, key: str | None
) -> None:
    api.behave(api_key="sk-other")

    with pytest.raises(ProviderTrouble, match="400: API key not valid|403: Method doesn't allow") as caught:
        gemini.embed(Ask(model if key else replace(model, api_key=None), ["a"], 5), network)

    assert caught.value.permanent
    assert "sk-right" not in str(caught.value)


def test_a_rate_limit_says_when_to_come_back(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(rate_limit={"requests_per_minute": 1})
    gemini.embed(Ask(model, ["a"], 5), network)

    with pytest.raises(ProviderTrouble, match="answered 429") as caught:
        gemini.embed(Ask(model, ["a"], 5), network)

    assert caught.value.retry_after_seconds is not None
    assert 50 < caught.value.retry_after_seconds <= 60
    assert not caught.value.permanent


def test_a_key_that_the_api_echoes_is_in_no_error(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"echo_authorization": True}])

    with pytest.raises(ProviderTrouble, match="\\*\\*\\*") as caught:
        gemini.embed(Ask(model, ["a"], 5), network)

    assert "sk-right" not in str(caught.value)


def test_a_missing_key_calls_nobody(api: FakeApi, model: Model, network: Network) -> None:
    with pytest.raises(ProviderTrouble, match="no API key"):
        gemini.embed(Ask(replace(model, api_key="file:/nowhere"), ["a"], 5), network)

    assert api.log() == []
