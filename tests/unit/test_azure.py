"""The provider azure: where it sends what, and what it makes of every answer, over the fake API."""

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
from autoembed.providers import PROVIDERS, azure
from fake_api import FakeApi, Server, embedding_of, tokens_in

MODEL = Model("small", "azure", "text-embedding-3-small", 256)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


# --- check -------------------------------------------------------------------------------------------


def test_the_provider_has_its_name() -> None:
    assert PROVIDERS["azure"] is azure


def test_a_resource_with_all_its_options_is_right() -> None:
    options = {"deployment": "d", "api_version": "2025-01-01-preview", "extra_headers": {"x-team": "search"}}

    azure.check(replace(MODEL, base_url="https://name.openai.azure.com", options=options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": None}, "has no base_url"),
        ({"base_url": "name.openai.azure.com"}, "not an http or https URL"),
        ({"options": {"deploiment": "d"}}, "the option deploiment"),
        ({"options": {"deployment": 5}}, "option deployment .* is not a text"),
        ({"options": {"extra_headers": {"Api-Key": "sk"}}}, "would keep a secret"),
    ],
)
def test_a_definition_that_cannot_work_is_the_callers_mistake(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        azure.check(replace(MODEL, **{"base_url": "https://name.openai.azure.com", **changes}))


@pytest.mark.parametrize(
    ("base_url", "options", "url"),
    [
        ("https://h", {}, "https://h/openai/deployments/text-embedding-3-small/embeddings?api-version=2024-10-21"),
        ("https://h//", {"deployment": "d"}, "https://h/openai/deployments/d/embeddings?api-version=2024-10-21"),
        (
            "https://h",
            {"deployment": "a/b?c"},
            "https://h/openai/deployments/a%2Fb%3Fc/embeddings?api-version=2024-10-21",
        ),
        (
            "https://h/gateway",
            {"deployment": "d", "api_version": "2023-05-15"},
            "https://h/gateway/openai/deployments/d/embeddings?api-version=2023-05-15",
        ),
    ],
)
def test_the_url_names_deployment_and_version(base_url: str, options: dict[str, str], url: str) -> None:
    assert azure.url_of(replace(MODEL, base_url=base_url, options=options)) == url


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
    embedded = azure.embed(Ask(model, TEXTS, 5), network)

    assert np.array_equal(
        embedded.vectors, np.stack([embedding_of(t, MODEL.dimensions, MODEL.model_id) for t in TEXTS])
    )
    assert embedded.tokens == sum(map(tokens_in, TEXTS))


def test_a_request_is_sent_to_the_deployment_with_the_key_in_its_header(
    api: FakeApi, model: Model, network: Network
) -> None:
    api.behave(models={"mine": 1536})
    azure.embed(Ask(replace(model, options={"deployment": "mine"}), TEXTS, 5, "query"), network)

    (request,) = api.log()
    assert request["path"] == f"/{api.tenant}/openai/deployments/mine/embeddings?api-version=2024-10-21"
    assert request["key_sha256"] == sha256(b"sk-right").hexdigest()
    assert "Authorization" not in request["headers"]
    assert request["texts"] == TEXTS
    assert request["settings"] == {"model": MODEL.model_id, "encoding_format": "base64", "dimensions": 256}


def test_vectors_come_in_the_order_of_the_texts(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"shuffled": True}])

    vectors = azure.embed(Ask(model, TEXTS, 5), network).vectors

    assert np.array_equal(vectors, np.stack([embedding_of(text, 256) for text in TEXTS]))


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
        azure.embed(Ask(model, TEXTS, 5), network)

    if isinstance(caught.value, ProviderTrouble):
        assert caught.value.permanent == (kind == "permanent")
    assert azure.embed(Ask(model, TEXTS, 5), network).vectors.shape == (3, MODEL.dimensions)


@pytest.mark.parametrize(
    ("changes", "texts", "kind", "message"),
    [
        ({"options": {"deployment": "none"}}, ["a"], ProviderTrouble, "404: The API deployment .* does not exist"),
        ({"options": {"api_version": "yesterday"}}, ["a"], ProviderTrouble, "404: Resource not found"),
        ({}, ["a" * 40_000], Refused, "400: .*maximum context length is 8192"),
        ({}, ["a" * 30_000] * 41, Refused, "400: .*max 300000 tokens per request"),
        ({"dimensions": 5000}, ["a"], Refused, "400: .*Must be between 1 and 1536"),
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
        azure.embed(Ask(replace(model, **changes), texts, 5), network)

    assert getattr(caught.value, "permanent", True)


def test_the_limits_are_those_of_the_api(api: FakeApi, model: Model, network: Network) -> None:
    most = azure.MAX_INPUTS_PER_REQUEST

    assert len(azure.embed(Ask(model, ["a"] * most, 5), network).vectors) == most
    with pytest.raises(Refused):
        azure.embed(Ask(model, ["a"] * (most + 1), 5), network)


@pytest.mark.parametrize("key", ["right", None])
def test_a_key_that_is_refused_needs_somebody_to_act(
    api: FakeApi, model: Model, network: Network, key: str | None
) -> None:
    api.behave(api_key="sk-other")

    with pytest.raises(ProviderTrouble, match="401: Access denied") as caught:
        azure.embed(Ask(model if key else replace(model, api_key=None), ["a"], 5), network)

    assert caught.value.permanent
    assert "sk-right" not in str(caught.value)


def test_a_rate_limit_says_when_to_come_back(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(rate_limit={"requests_per_minute": 1})
    azure.embed(Ask(model, ["a"], 5), network)

    with pytest.raises(ProviderTrouble, match="answered 429") as caught:
        azure.embed(Ask(model, ["a"], 5), network)

    assert caught.value.retry_after_seconds is not None
    assert 50 < caught.value.retry_after_seconds <= 60
    assert not caught.value.permanent


def test_a_key_that_the_api_echoes_is_in_no_error(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"echo_authorization": True}])

    with pytest.raises(ProviderTrouble, match="\\*\\*\\*") as caught:
        azure.embed(Ask(model, ["a"], 5), network)

    assert "sk-right" not in str(caught.value)


def test_a_missing_key_calls_nobody(api: FakeApi, model: Model, network: Network) -> None:
    with pytest.raises(ProviderTrouble, match="no API key"):
        azure.embed(Ask(replace(model, api_key="file:/nowhere"), ["a"], 5), network)

    assert api.log() == []
