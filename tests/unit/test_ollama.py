"""The provider ollama, over the fake API and without; and the prefixes of all providers that take them."""

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
from autoembed.model import Ask, Model, prefixed
from autoembed.network import Network
from autoembed.providers import PROVIDERS, local, ollama, openai
from fake_api import FakeApi, Server, embedding_of, tokens_in

MODEL = Model("ol", "ollama", "nomic-embed-text", 256)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]
PREFIXES = {"document_prefix": "search_document: ", "query_prefix": "search_query: "}


# --- prefixes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "purpose", "expected"),
    [
        ({}, "document", ["a", ""]),
        ({}, "query", ["a", ""]),
        (PREFIXES, "document", ["search_document: a", "search_document: "]),
        (PREFIXES, "query", ["search_query: a", "search_query: "]),
        ({"query_prefix": "q: "}, "document", ["a", ""]),
        ({"query_prefix": "q: "}, "query", ["q: a", "q: "]),
    ],
)
def test_a_text_is_prefixed_by_its_purpose(options: dict[str, str], purpose: Any, expected: list[str]) -> None:
    assert prefixed(Ask(replace(MODEL, options=options), ["a", ""], 5, purpose)) == expected


@pytest.mark.parametrize("provider", [openai, ollama])
def test_a_provider_without_input_types_sends_prefixed_texts(provider: Any) -> None:
    ask = Ask(replace(MODEL, base_url="http://127.0.0.1:1", options=PREFIXES), ["a"], 5, "query")

    provider.check(ask.model)
    assert provider.request_body(ask)["input"] == ["search_query: a"]


def test_the_local_model_embeds_prefixed_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    embedded = []

    class Recording:
        def embed(self, texts: list[str], between_batches: Any) -> Any:
            embedded.extend(texts)
            return np.ones((len(texts), 256), np.float32)

    for name in ("model.onnx", "tokenizer.json"):
        (tmp_path / name).touch()
    model = replace(MODEL, provider="local", base_url=str(tmp_path), options=PREFIXES)
    monkeypatch.setattr(local, "_onnx_model", lambda _: Recording())

    local.check(model)
    local.embed(Ask(model, ["a"], 5, "query"), Network(1))

    assert embedded == ["search_query: a"]


def test_another_document_prefix_makes_another_digest_and_another_query_prefix_does_not() -> None:
    plain = MODEL.digest("text")

    assert replace(MODEL, options={"document_prefix": "passage: "}).digest("text") != plain
    assert replace(MODEL, options={"query_prefix": "query: "}).digest("text") == plain


# --- what it sends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", ["document", "query"])
def test_a_request_has_the_fields_of_the_api_reference(purpose: Any) -> None:
    assert ollama.request_body(Ask(MODEL, TEXTS, 5, purpose)) == {
        "model": "nomic-embed-text",
        "input": TEXTS,
        "dimensions": 256,
        "truncate": True,
    }


# --- what it makes of an answer ----------------------------------------------------------------------


def answer(embeddings: Any) -> bytes:
    return json.dumps({"model": "m", "embeddings": embeddings, "prompt_eval_count": 7}).encode()


def test_vectors_and_counted_tokens_are_read() -> None:
    embedded = ollama.embedded_in(answer([[1, 2], [3, 4]]), 2, 2)

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
    with pytest.raises(ProviderTrouble, match="not in the form of the Ollama API") as caught:
        ollama.embedded_in(body, 2, 2)

    assert not caught.value.permanent


@pytest.mark.parametrize("embeddings", [[], [[1, 2]], [[1, 2]] * 3])
def test_every_text_must_have_exactly_one_vector(embeddings: list[Any]) -> None:
    with pytest.raises(ProviderTrouble, match="for 2 texts"):
        ollama.embedded_in(answer(embeddings), 2, 2)


def test_an_answer_that_counts_no_tokens_reports_none() -> None:
    body = {name: value for name, value in json.loads(answer([[1, 0]])).items() if name != "prompt_eval_count"}

    assert ollama.embedded_in(json.dumps(body).encode(), 1, 2).tokens is None


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error": "the input length exceeds the context length"}', "refused"),
        (401, b'{"error": "unauthorized: sk-right"}', "permanent"),
        (404, b'{"error": "model not found, try pulling it first"}', "permanent"),
        (500, b'{"error": "failed to encode response: json: unsupported value: NaN"}', "refused"),
        (500, b'{"error": "the input length exceeds the context length"}', "refused"),
        (500, b'{"error": "llama runner process has terminated"}', "passing"),
        (503, b'{"error": "server busy, please try again. maximum pending requests exceeded"}', "passing"),
    ],
)
def test_a_status_means_what_the_provider_means_by_it(status: int, body: bytes, kind: str) -> None:
    trouble = ollama.trouble_of(status, {}, body, "sk-right")

    if isinstance(trouble, ProviderTrouble):
        assert kind == ("permanent" if trouble.permanent else "passing")
    else:
        assert kind == "refused"
    assert str(trouble).startswith(f"the provider answered {status}")
    assert "sk-right" not in str(trouble)


# --- check -------------------------------------------------------------------------------------------


def test_the_provider_has_its_name() -> None:
    assert PROVIDERS["ollama"] is ollama


@pytest.mark.parametrize("base_url", [None, "http://gpu:11434", "https://ollama.example.com"])
def test_a_model_needs_neither_key_nor_url(base_url: str | None) -> None:
    ollama.check(replace(MODEL, base_url=base_url))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "gpu:11434"}, "not an http or https URL"),
        ({"options": {"prefix": "query: "}}, "the option prefix"),
        ({"options": {"query_prefix": None}}, "option query_prefix .* is not a text"),
        ({"options": {"extra_body": []}}, "option extra_body .* is not an object"),
    ],
)
def test_a_definition_that_cannot_work_is_the_callers_mistake(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ollama.check(replace(MODEL, **changes))


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
    embedded = ollama.embed(Ask(model, TEXTS, 5), network)

    assert np.array_equal(
        embedded.vectors, np.stack([embedding_of(t, MODEL.dimensions, MODEL.model_id) for t in TEXTS])
    )
    assert embedded.tokens == sum(map(tokens_in, TEXTS))


def test_a_request_is_sent_to_the_native_endpoint(api: FakeApi, model: Model, network: Network) -> None:
    asked = replace(model, options={**PREFIXES, "extra_body": {"keep_alive": "10m"}})

    ollama.embed(Ask(asked, ["a"], 5, "query"), network)

    (request,) = api.log()
    assert request["path"] == f"/{api.tenant}/api/embed"
    assert request["texts"] == ["search_query: a"]
    assert request["settings"]["keep_alive"] == "10m"


def test_without_a_key_none_is_sent_and_none_is_missed(api: FakeApi, model: Model, network: Network) -> None:
    ollama.embed(Ask(replace(model, api_key=None), ["a"], 5), network)

    assert "Authorization" not in api.log()[0]["headers"]


def test_a_key_of_a_proxy_before_it_is_sent(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(api_key="sk-right")
    ollama.embed(Ask(model, ["a"], 5), network)

    api.behave(api_key="sk-other")
    with pytest.raises(ProviderTrouble, match="401: unauthorized"):
        ollama.embed(Ask(model, ["a"], 5), network)


def test_a_long_text_is_shortened_by_the_model(api: FakeApi, model: Model, network: Network) -> None:
    assert ollama.embed(Ask(model, ["a" * 100_000], 5), network).tokens == 2048


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
        ({"status": 500, "body": {"error": "failed to encode response: json: unsupported value: NaN"}}, Refused),
    ],
)
def test_a_fault_of_the_api_is_its_kind_of_trouble(
    api: FakeApi, model: Model, network: Network, fault: dict[str, Any], kind: Any
) -> None:
    api.behave(faults=[fault])

    with pytest.raises(Refused if kind is Refused else ProviderTrouble) as caught:
        ollama.embed(Ask(model, TEXTS, 5), network)

    if isinstance(caught.value, ProviderTrouble):
        assert caught.value.permanent == (kind == "permanent")
    assert ollama.embed(Ask(model, TEXTS, 5), network).vectors.shape == (3, MODEL.dimensions)


@pytest.mark.parametrize(
    ("changes", "texts", "kind", "message"),
    [
        ({"model_id": "none"}, ["a"], ProviderTrouble, '404: model "none" not found, try pulling it first'),
        ({"dimensions": 1024}, ["a"], ProviderTrouble, "vectors have 768 dimensions, the model is defined with 1024"),
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
        ollama.embed(Ask(replace(model, **changes), texts, 5), network)

    assert getattr(caught.value, "permanent", True)


def test_the_limits_are_those_of_the_api(api: FakeApi, model: Model, network: Network) -> None:
    most = ollama.MAX_INPUTS_PER_REQUEST

    assert len(ollama.embed(Ask(model, ["a"] * most, 5), network).vectors) == most


def test_a_rate_limit_says_when_to_come_back(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(rate_limit={"requests_per_minute": 1})
    ollama.embed(Ask(model, ["a"], 5), network)

    with pytest.raises(ProviderTrouble, match="answered 429") as caught:
        ollama.embed(Ask(model, ["a"], 5), network)

    assert caught.value.retry_after_seconds is not None
    assert 50 < caught.value.retry_after_seconds <= 60
    assert not caught.value.permanent


def test_a_key_that_the_api_echoes_is_in_no_error(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"echo_authorization": True}])

    with pytest.raises(ProviderTrouble, match="\\*\\*\\*") as caught:
        ollama.embed(Ask(model, ["a"], 5), network)

    assert "sk-right" not in str(caught.value)


def test_a_missing_key_calls_nobody(api: FakeApi, model: Model, network: Network) -> None:
    with pytest.raises(ProviderTrouble, match="no API key"):
        ollama.embed(Ask(replace(model, api_key="file:/nowhere"), ["a"], 5), network)

    assert api.log() == []
