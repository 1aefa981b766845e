"""The provider voyage: what it sends, what it makes of every answer, over the fake API and without."""

from __future__ import annotations

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
from autoembed.providers import PROVIDERS, voyage
from fake_api import FakeApi, Server, embedding_of, tokens_in

MODEL = Model("vo", "voyage", "voyage-4", 256)
OLD = replace(MODEL, model_id="voyage-law-2", dimensions=1024, max_tokens_per_input=16_000)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


# --- what it sends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", ["document", "query"])
def test_a_request_has_the_fields_of_the_api_reference(purpose: Any) -> None:
    assert voyage.request_body(Ask(MODEL, TEXTS, 5, purpose)) == {
        "model": "voyage-4",
        "input": TEXTS,
        "input_type": purpose,
        "encoding_format": "base64",
        "truncation": False,
        "output_dimension": 256,
    }


def test_a_model_that_knows_no_dimensions_is_not_sent_any() -> None:
    assert "output_dimension" not in voyage.request_body(Ask(OLD, TEXTS, 5))


# --- what it makes of an answer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"detail": "The batch size limit is 1000, sk-right."}', "refused"),
        (400, b'{"detail": "Model a is not supported. Supported models are [b]."}', "permanent"),
        (401, b'{"detail": "Provided API key is invalid."}', "permanent"),
        (403, b'{"detail": "Forbidden"}', "permanent"),
        (429, b'{"detail": "You have not yet added your payment method and will have reduced rate limits"}', "passing"),
        (500, b"", "passing"),
        (502, b"", "passing"),
        (503, b"", "passing"),
        (504, b"", "passing"),
    ],
)
def test_a_status_means_what_the_provider_means_by_it(status: int, body: bytes, kind: str) -> None:
    trouble = voyage.trouble_of(status, {}, body, "sk-right")

    if isinstance(trouble, ProviderTrouble):
        assert kind == ("permanent" if trouble.permanent else "passing")
    else:
        assert kind == "refused"
    assert str(trouble).startswith(f"the provider answered {status}")
    assert "sk-right" not in str(trouble)


# --- check -------------------------------------------------------------------------------------------


def test_the_provider_has_its_name() -> None:
    assert PROVIDERS["voyage"] is voyage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key": None}, "has no api_key"),
        ({"base_url": "ftp://host"}, "not an http or https URL"),
        ({"options": {"input_type": "query"}}, "the option input_type"),
        ({"model_id": "voyage-law-2"}, "at most 16000 tokens"),
        ({"model_id": "voyage-code-2", "max_tokens_per_input": 16_001}, "at most 16000 tokens"),
    ],
)
def test_a_definition_that_cannot_work_is_the_callers_mistake(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("VOYAGE_KEY", "sk-right")

    with pytest.raises(InvalidInput, match=message):
        voyage.check(replace(MODEL, **{"api_key": "env:VOYAGE_KEY", **changes}))


@pytest.mark.parametrize("model", [MODEL, OLD])
def test_a_right_definition_passes(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setenv("VOYAGE_KEY", "sk-right")

    voyage.check(replace(model, api_key="env:VOYAGE_KEY"))


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
    return replace(MODEL, base_url=api.root + "/voyage/v1", api_key=f"file:{tmp_path / 'key'}")


def test_each_text_gets_its_vector_and_the_tokens_are_reported(api: FakeApi, model: Model, network: Network) -> None:
    embedded = voyage.embed(Ask(model, TEXTS, 5), network)

    assert np.array_equal(
        embedded.vectors, np.stack([embedding_of(t, MODEL.dimensions, MODEL.model_id) for t in TEXTS])
    )
    assert embedded.tokens == sum(map(tokens_in, TEXTS))


@pytest.mark.parametrize("old", [False, True])
def test_a_request_is_sent_as_the_api_reference_has_it(api: FakeApi, model: Model, network: Network, old: bool) -> None:
    asked = replace(model, model_id=OLD.model_id, dimensions=1024) if old else model

    vectors = voyage.embed(Ask(asked, TEXTS, 5, "query"), network).vectors

    (request,) = api.log()
    assert vectors.shape == (3, asked.dimensions)
    assert request["path"] == f"/{api.tenant}/voyage/v1/embeddings"
    assert request["key_sha256"] == sha256(b"sk-right").hexdigest()
    assert request["texts"] == TEXTS
    assert request["settings"]["input_type"] == "query"


def test_vectors_come_in_the_order_of_the_texts(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"shuffled": True}])

    vectors = voyage.embed(Ask(model, TEXTS, 5), network).vectors

    assert np.array_equal(vectors, np.stack([embedding_of(text, 256, "voyage-4") for text in TEXTS]))


def test_an_answer_in_another_form_is_named_after_the_provider(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"not_json": True}])

    with pytest.raises(ProviderTrouble, match="not in the form of the Voyage API"):
        voyage.embed(Ask(model, TEXTS, 5), network)


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
        ({"duplicate_index": True}, "passing"),
        ({"missing_index": True}, "passing"),
    ],
)
def test_a_fault_of_the_api_is_its_kind_of_trouble(
    api: FakeApi, model: Model, network: Network, fault: dict[str, Any], kind: Any
) -> None:
    api.behave(faults=[fault])

    with pytest.raises(Refused if kind is Refused else ProviderTrouble) as caught:
        voyage.embed(Ask(model, TEXTS, 5), network)

    if isinstance(caught.value, ProviderTrouble):
        assert caught.value.permanent == (kind == "permanent")
    assert voyage.embed(Ask(model, TEXTS, 5), network).vectors.shape == (3, MODEL.dimensions)


@pytest.mark.parametrize(
    ("changes", "texts", "kind", "message"),
    [
        ({"model_id": "voyage-9"}, ["a"], ProviderTrouble, "400: .*Model voyage-9 is not supported"),
        ({}, ["a" * 128_100], Refused, "400: .*exceeds the context length of 32000"),
        ({}, ["a" * 100_000] * 13, Refused, "400: .*max allowed tokens per submitted batch is 320000"),
        ({"dimensions": 100}, ["a"], Refused, "400: .*output_dimension"),
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
        voyage.embed(Ask(replace(model, **changes), texts, 5), network)

    assert getattr(caught.value, "permanent", True)


def test_the_limits_are_those_of_the_api(api: FakeApi, model: Model, network: Network) -> None:
    most = voyage.MAX_INPUTS_PER_REQUEST

    assert len(voyage.embed(Ask(model, ["a"] * most, 5), network).vectors) == most
    with pytest.raises(Refused):
        voyage.embed(Ask(model, ["a"] * (most + 1), 5), network)


@pytest.mark.parametrize("key", ["right", None])
def test_a_key_that_is_refused_needs_somebody_to_act(
    api: FakeApi, model: Model, network: Network, key: str | None
) -> None:
    api.behave(api_key="sk-other")

    with pytest.raises(ProviderTrouble, match="401: .*Provided API key is invalid") as caught:
        voyage.embed(Ask(model if key else replace(model, api_key=None), ["a"], 5), network)

    assert caught.value.permanent
    assert "sk-right" not in str(caught.value)


def test_a_rate_limit_says_when_to_come_back(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(rate_limit={"requests_per_minute": 1})
    voyage.embed(Ask(model, ["a"], 5), network)

    with pytest.raises(ProviderTrouble, match="answered 429") as caught:
        voyage.embed(Ask(model, ["a"], 5), network)

    assert caught.value.retry_after_seconds is not None
    assert 50 < caught.value.retry_after_seconds <= 60
    assert not caught.value.permanent


def test_a_key_that_the_api_echoes_is_in_no_error(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"echo_authorization": True}])

    with pytest.raises(ProviderTrouble, match="\\*\\*\\*") as caught:
        voyage.embed(Ask(model, ["a"], 5), network)

    assert "sk-right" not in str(caught.value)


def test_a_missing_key_calls_nobody(api: FakeApi, model: Model, network: Network) -> None:
    with pytest.raises(ProviderTrouble, match="no API key"):
        voyage.embed(Ask(replace(model, api_key="file:/nowhere"), ["a"], 5), network)

    assert api.log() == []
