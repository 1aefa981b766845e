"""The provider cohere: what it sends, what it makes of every answer, over the fake API and without."""

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
from autoembed.providers import PROVIDERS, cohere
from fake_api import FakeApi, Server, embedding_of, tokens_in

MODEL = Model("co", "cohere", "embed-v4.0", 256)
OLD = replace(MODEL, model_id="embed-english-v3.0", dimensions=1024, max_tokens_per_input=512)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


# --- what it sends -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("purpose", "input_type"), [("document", "search_document"), ("query", "search_query")])
def test_a_request_has_the_fields_of_the_api_reference(purpose: Any, input_type: str) -> None:
    assert cohere.request_body(Ask(MODEL, TEXTS, 5, purpose)) == {
        "model": "embed-v4.0",
        "texts": TEXTS,
        "input_type": input_type,
        "embedding_types": ["float"],
        "truncate": "NONE",
        "output_dimension": 256,
    }


def test_a_model_that_knows_no_dimensions_is_not_sent_any() -> None:
    assert "output_dimension" not in cohere.request_body(Ask(OLD, TEXTS, 5))


# --- what it makes of an answer ----------------------------------------------------------------------


def answer(embeddings: Any) -> bytes:
    meta = {"billed_units": {"input_tokens": 7}}
    return json.dumps({"id": "0", "embeddings": {"float": embeddings}, "texts": [], "meta": meta}).encode()


def test_vectors_and_billed_tokens_are_read() -> None:
    embedded = cohere.embedded_in(answer([[1, 2], [3, 4]]), 2, 2)

    assert embedded.vectors.tolist() == [[1, 2], [3, 4]]
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
    with pytest.raises(ProviderTrouble, match="not in the form of the Cohere API") as caught:
        cohere.embedded_in(body, 2, 2)

    assert not caught.value.permanent


@pytest.mark.parametrize("embeddings", [[], [[1, 2]], [[1, 2]] * 3])
def test_every_text_must_have_exactly_one_vector(embeddings: list[Any]) -> None:
    with pytest.raises(ProviderTrouble, match="for 2 texts"):
        cohere.embedded_in(answer(embeddings), 2, 2)


def test_an_answer_that_counts_no_tokens_reports_none() -> None:
    body = {name: value for name, value in json.loads(answer([[1, 0]])).items() if name != "meta"}

    assert cohere.embedded_in(json.dumps(body).encode(), 1, 2).tokens is None


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"message": "too many tokens"}', "refused"),
        (401, b'{"message": "invalid api token sk-right"}', "permanent"),
        (402, b'{"message": "Please add or update your payment method"}', "permanent"),
        (404, b'{"message": "model not found"}', "permanent"),
        (422, b'{"message": "unprocessable"}', "refused"),
        (429, b'{"message": "a Trial key, which is limited to 100 API calls / minute"}', "passing"),
        (429, b'{"message": "a Trial key, which is limited to 1000 API calls / month"}', "permanent"),
        (498, b'{"message": "blocked input"}', "refused"),
        (499, b'{"message": "request cancelled"}', "passing"),
        (500, b"", "passing"),
        (501, b"", "passing"),
        (504, b"", "passing"),
    ],
)
def test_a_status_means_what_the_provider_means_by_it(status: int, body: bytes, kind: str) -> None:
    trouble = cohere.trouble_of(status, {}, body, "sk-right")

    if isinstance(trouble, ProviderTrouble):
        assert kind == ("permanent" if trouble.permanent else "passing")
    else:
        assert kind == "refused"
    assert str(trouble).startswith(f"the provider answered {status}")
    assert "sk-right" not in str(trouble)


# --- check -------------------------------------------------------------------------------------------


def test_the_provider_has_its_name() -> None:
    assert PROVIDERS["cohere"] is cohere


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key": None}, "has no api_key"),
        ({"base_url": "api.cohere.com"}, "not an http or https URL"),
        ({"options": {"document_prefix": "passage: "}}, "the option document_prefix"),
        ({"model_id": "embed-english-v3.0"}, "at most 512 tokens"),
        ({"model_id": "embed-english-v3.0", "max_tokens_per_input": 513}, "at most 512 tokens"),
    ],
)
def test_a_definition_that_cannot_work_is_the_callers_mistake(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("COHERE_KEY", "sk-right")

    with pytest.raises(InvalidInput, match=message):
        cohere.check(replace(MODEL, **{"api_key": "env:COHERE_KEY", **changes}))


@pytest.mark.parametrize("model", [MODEL, OLD])
def test_a_right_definition_passes(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setenv("COHERE_KEY", "sk-right")

    cohere.check(replace(model, api_key="env:COHERE_KEY"))


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
    return replace(MODEL, base_url=api.root, api_key=f"file:{tmp_path / 'key'}")


def test_each_text_gets_its_vector_and_the_tokens_are_reported(api: FakeApi, model: Model, network: Network) -> None:
    embedded = cohere.embed(Ask(model, TEXTS, 5), network)

    assert np.array_equal(
        embedded.vectors, np.stack([embedding_of(t, MODEL.dimensions, MODEL.model_id) for t in TEXTS])
    )
    assert embedded.tokens == sum(map(tokens_in, TEXTS))


@pytest.mark.parametrize("old", [False, True])
def test_a_request_is_sent_as_the_api_reference_has_it(api: FakeApi, model: Model, network: Network, old: bool) -> None:
    asked = replace(model, model_id=OLD.model_id, dimensions=1024) if old else model

    vectors = cohere.embed(Ask(asked, TEXTS, 5, "query"), network).vectors

    (request,) = api.log()
    assert vectors.shape == (3, asked.dimensions)
    assert request["path"] == f"/{api.tenant}/v2/embed"
    assert request["key_sha256"] == sha256(b"sk-right").hexdigest()
    assert request["texts"] == TEXTS
    assert request["settings"]["input_type"] == "search_query"


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
        ({"status": 402}, "permanent"),
        ({"status": 498}, Refused),
        ({"status": 499}, "passing"),
    ],
)
def test_a_fault_of_the_api_is_its_kind_of_trouble(
    api: FakeApi, model: Model, network: Network, fault: dict[str, Any], kind: Any
) -> None:
    api.behave(faults=[fault])

    with pytest.raises(Refused if kind is Refused else ProviderTrouble) as caught:
        cohere.embed(Ask(model, TEXTS, 5), network)

    if isinstance(caught.value, ProviderTrouble):
        assert caught.value.permanent == (kind == "permanent")
    assert cohere.embed(Ask(model, TEXTS, 5), network).vectors.shape == (3, MODEL.dimensions)


@pytest.mark.parametrize(
    ("changes", "texts", "kind", "message"),
    [
        ({"model_id": "embed-v9"}, ["a"], ProviderTrouble, "404: model 'embed-v9' not found"),
        ({"model_id": "embed-english-v3.0"}, ["a" * 2100], Refused, "400: too many tokens: text exceeds 512"),
        ({}, ["a" * 513_000], Refused, "400: too many tokens: text exceeds 128000"),
        ({"dimensions": 100}, ["a"], Refused, "400: .*output_dimension is not valid"),
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
        cohere.embed(Ask(replace(model, **changes), texts, 5), network)

    assert getattr(caught.value, "permanent", True)


def test_the_limits_are_those_of_the_api(api: FakeApi, model: Model, network: Network) -> None:
    most = cohere.MAX_INPUTS_PER_REQUEST

    assert len(cohere.embed(Ask(model, ["a"] * most, 5), network).vectors) == most
    with pytest.raises(Refused):
        cohere.embed(Ask(model, ["a"] * (most + 1), 5), network)


@pytest.mark.parametrize("key", ["right", None])
def test_a_key_that_is_refused_needs_somebody_to_act(
    api: FakeApi, model: Model, network: Network, key: str | None
) -> None:
    api.behave(api_key="sk-other")

    with pytest.raises(ProviderTrouble, match="401: invalid api token") as caught:
        cohere.embed(Ask(model if key else replace(model, api_key=None), ["a"], 5), network)

    assert caught.value.permanent
    assert "sk-right" not in str(caught.value)


def test_a_rate_limit_says_when_to_come_back(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(rate_limit={"requests_per_minute": 1})
    cohere.embed(Ask(model, ["a"], 5), network)

    with pytest.raises(ProviderTrouble, match="answered 429") as caught:
        cohere.embed(Ask(model, ["a"], 5), network)

    assert caught.value.retry_after_seconds is not None
    assert 50 < caught.value.retry_after_seconds <= 60
    assert not caught.value.permanent


def test_a_key_that_the_api_echoes_is_in_no_error(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"echo_authorization": True}])

    with pytest.raises(ProviderTrouble, match="\\*\\*\\*") as caught:
        cohere.embed(Ask(model, ["a"], 5), network)

    assert "sk-right" not in str(caught.value)


def test_a_missing_key_calls_nobody(api: FakeApi, model: Model, network: Network) -> None:
    with pytest.raises(ProviderTrouble, match="no API key"):
        cohere.embed(Ask(replace(model, api_key="file:/nowhere"), ["a"], 5), network)

    assert api.log() == []
