"""The fake API's protocols: OpenAI's as the official client sees it, and what each provider takes and refuses."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest
import requests

from fake_api import FakeApi, embedding_of
from fake_api.protocols.openai import MODELS as OPENAI_MODELS
from unit.plain_clients import (
    AZURE_PATH,
    MODEL,
    OTHERS,
    ask,
    cohere_body,
    error,
    gemini_body,
    ollama_body,
    openai_body,
    voyage_body,
)


@pytest.fixture
def client(api: FakeApi) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=api.base_url, api_key="sk-right", max_retries=0, timeout=10) as client:
        yield client


# --- the official client -----------------------------------------------------------------------------


def test_official_client_embeds_a_single_text_by_base64(client: openai.OpenAI, api: FakeApi) -> None:
    answer = client.embeddings.create(model=MODEL, input="eight ch")

    assert np.array_equal(np.array(answer.data[0].embedding, np.float32), embedding_of("eight ch"))
    assert (answer.object, answer.model, answer.data[0].index) == ("list", MODEL, 0)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 2)
    assert api.log()[0]["encoding_format"] == "base64"


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize(("model", "full"), OPENAI_MODELS.items())
def test_official_client_embeds_a_list_in_order(
    client: openai.OpenAI, model: str, full: int, encoding_format: Any
) -> None:
    answer = client.embeddings.create(model=model, input=["a", "b", "a"], encoding_format=encoding_format)

    found = [
        np.frombuffer(base64.b64decode(item.embedding), "<f4")
        if isinstance(item.embedding, str)
        else np.array(item.embedding, np.float32)
        for item in answer.data
    ]
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert np.array_equal(found, [embedding_of(text, full, model) for text in "aba"])


def test_official_client_gets_fewer_dimensions(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input="a", dimensions=256)

    assert np.array_equal(np.array(answer.data[0].embedding, np.float32), embedding_of("a", 256))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_official_client_raises_its_own_error_for_each_status(
    client: openai.OpenAI, api: FakeApi, status: int, kind: type[openai.APIStatusError]
) -> None:
    api.behave(faults=[{"status": status}])

    with pytest.raises(kind) as caught:
        client.embeddings.create(model=MODEL, input="a")
    assert isinstance(caught.value.body, dict)
    assert caught.value.body.keys() == {"message", "type", "param", "code"}
    assert client.embeddings.create(model=MODEL, input="a").data[0].index == 0


def test_official_client_waits_as_told_and_tries_again(api: FakeApi) -> None:
    api.behave(faults=[{"status": 429, "headers": {"retry-after-ms": "10"}, "times": 2}])

    with openai.OpenAI(base_url=api.base_url, api_key="sk-right", max_retries=2) as client:
        assert client.embeddings.create(model=MODEL, input="a").data[0].index == 0
    assert [request["status"] for request in api.log()] == [429, 429, 200]


# --- what OpenAI refuses -----------------------------------------------------------------------------


def test_request_without_a_key_is_refused(api: FakeApi) -> None:
    with requests.Session() as nobody:
        answer = ask(nobody, api, "a")

    assert (answer.status_code, error(answer)["type"], error(answer)["code"]) == (
        401,
        "invalid_request_error",
        None,
    )


def test_wrong_key_is_refused_and_not_repeated(session: requests.Session, api: FakeApi) -> None:
    api.behave(api_key="sk-other")

    answer = ask(session, api, "a")

    assert (answer.status_code, error(answer)["code"]) == (401, "invalid_api_key")
    assert "sk-right" not in answer.text
    assert ask(session, api, "a").status_code == 401
    api.behave(api_key="sk-right")
    assert ask(session, api, "a").status_code == 200


@pytest.mark.parametrize(
    ("texts", "fields", "status", "param", "code", "message"),
    [
        ("", {}, 400, None, None, "'$.input' is invalid."),
        ([], {}, 400, None, None, "'$.input' is invalid."),
        (["a", ""], {}, 400, None, None, "'$.input' is invalid."),
        (None, {}, 400, None, None, "'$.input' is invalid."),
        ([1, 2, 3], {}, 400, None, None, "'$.input' is invalid."),
        (["a", 1], {}, 400, None, None, "'$.input' is invalid."),
        (["a"] * 2049, {}, 400, None, None, "array length must be 2048 or less"),
        ("a" * (8192 * 4 + 1), {}, 400, None, None, "maximum context length is 8192 tokens"),
        (
            ["a" * 32_000] * 38,
            {},
            400,
            None,
            "max_tokens_per_request",
            "Requested 304000 tokens, max 300000 tokens per request",
        ),
        ("a", {"model": "no-model"}, 404, None, "model_not_found", "`no-model` does not exist"),
        ("a", {"model": None}, 400, None, None, "you must provide a model parameter"),
        ("a", {"dimensions": 1537}, 400, "dimensions", None, "Must be between 1 and 1536"),
        ("a", {"dimensions": 0}, 400, "dimensions", None, "Must be between 1 and 1536"),
        (
            "a",
            {"dimensions": 8, "model": "text-embedding-ada-002"},
            400,
            None,
            None,
            "does not support specifying dimensions",
        ),
        ("a", {"encoding_format": "int8"}, 400, "encoding_format", "invalid_value", "Supported values"),
        ("a", {"input_type": "query"}, 400, None, None, "Unrecognized request argument supplied: input_type"),
    ],
)
def test_what_openai_refuses_is_refused_with_its_words(
    session: requests.Session,
    api: FakeApi,
    texts: Any,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    message: str,
) -> None:
    answer = ask(session, api, texts, **fields)

    assert (answer.status_code, error(answer)["param"], error(answer)["code"]) == (status, param, code)
    assert message in error(answer)["message"]


@pytest.mark.parametrize(
    ("texts", "tokens"), [(["a"] * 2048, 2048), ("a" * 8192 * 4, 8192), (["a" * 30_000] * 40, 300_000)]
)
def test_what_is_just_within_the_limits_is_embedded(
    session: requests.Session, api: FakeApi, texts: Any, tokens: int
) -> None:
    answer = ask(session, api, texts, encoding_format="base64")

    assert answer.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_body_that_is_not_json_is_refused(session: requests.Session, api: FakeApi) -> None:
    answer = session.post(f"{api.base_url}/embeddings", data=b"{", timeout=10)

    assert (answer.status_code, error(answer)["type"]) == (400, "invalid_request_error")


def test_unknown_path_is_not_found(session: requests.Session, api: FakeApi) -> None:
    assert session.post(f"{api.base_url}/completions", json={}, timeout=10).status_code == 404


# --- the other protocols -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_every_protocol_gives_the_vectors_of_the_texts_in_order(api: FakeApi, name: str) -> None:
    other = OTHERS[name]

    answer = other.ask(api, other.body(["a", "eight ch"])).json()

    expected = [embedding_of(text, other.full, other.model) for text in ("a", "eight ch")]
    assert np.array_equal(np.array(other.vectors(answer), np.float32), expected)
    assert other.tokens(answer) == 3
    assert api.texts() == ["a", "eight ch"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_every_protocol_refuses_in_its_own_form(api: FakeApi, name: str, status: int) -> None:
    other = OTHERS[name]
    api.behave(faults=[{"status": status, "retry_after": 3}])

    answer = other.ask(api, other.body(["a"]))

    assert (answer.status_code, answer.headers["Retry-After"]) == (status, "3")
    assert other.message(answer.json())
    assert other.ask(api, other.body(["a"])).status_code == 200


@pytest.mark.parametrize("name", OTHERS)
def test_every_fault_that_needs_no_index_works_for_every_protocol(api: FakeApi, name: str) -> None:
    other = OTHERS[name]
    twisted: dict[str, Callable[[list[Any]], bool]] = {
        "wrong_count": lambda found: len(found) == 1,
        "wrong_dimensions": lambda found: len(found[0]) == other.full - 1,
        "nan": lambda found: math.isnan(found[1][other.full // 2]),
        "infinity": lambda found: math.isinf(found[1][other.full // 2]),
        "shuffled": lambda found: found[0] == embedding_of("b", other.full, other.model).tolist(),
        "invalid_base64": lambda found: found[1] == "?!",
    }

    for fault, shows in twisted.items():
        api.behave(faults=[{fault: True}])
        assert shows(other.vectors(other.ask(api, other.body(["a", "b"])).json())), fault


@pytest.mark.parametrize("name", OTHERS)
def test_a_key_is_echoed_from_the_header_that_had_it(api: FakeApi, name: str) -> None:
    other = OTHERS[name]
    api.behave(faults=[{"echo_authorization": True}])

    answer = other.ask(api, other.body(["a"]))

    assert answer.status_code == 401
    assert "sk-right" in other.message(answer.json())


@pytest.mark.parametrize(
    ("name", "none", "wrong"),
    [("azure", 401, 401), ("cohere", 401, 401), ("voyage", 401, 401), ("gemini", 403, 400), ("ollama", 200, 401)],
)
def test_a_missing_and_a_wrong_key_are_refused_as_documented(api: FakeApi, name: str, none: int, wrong: int) -> None:
    other = OTHERS[name]
    api.behave(api_key="sk-other")

    assert other.ask(api, other.body(["a"]), key={}).status_code == none
    answer = other.ask(api, other.body(["a"]))
    assert answer.status_code == wrong
    assert "sk-right" not in answer.text
    assert name != "gemini" or answer.json()["error"]["details"][0]["reason"] == "API_KEY_INVALID"


@pytest.mark.parametrize(
    ("name", "body", "status", "message"),
    [
        ("azure", openai_body([]), 400, "'$.input' is invalid"),
        ("azure", openai_body(["a"] * 2049), 400, "array length must be 2048 or less"),
        ("azure", openai_body(["a"], input_type="query"), 400, "Unrecognized request argument"),
        ("cohere", [], 400, "invalid JSON"),
        ("cohere", cohere_body(["a"] * 97), 400, "must be at most 96"),
        ("cohere", cohere_body(["a"], model="embed-v9"), 404, "model 'embed-v9' not found"),
        ("cohere", cohere_body(["a"], input_type=None), 400, "valid input_type must be provided"),
        ("cohere", cohere_body(["a"], embedding_types=["int8"]), 400, "embedding_types"),
        ("cohere", cohere_body(["a" * 2052], model="embed-english-v3.0"), 400, "exceeds 512 tokens"),
        ("cohere", cohere_body(["a"], output_dimension=100), 400, "output_dimension is not valid"),
        ("cohere", cohere_body(["a"], model="embed-english-v3.0", output_dimension=1024), 400, "not supported"),
        ("cohere", cohere_body(["a"], dimensions=256), 400, "unknown field: dimensions"),
        ("voyage", voyage_body(["a"] * 1001), 400, "batch size limit is 1000"),
        ("voyage", voyage_body(["a"], model="voyage-9"), 400, "Supported models are"),
        ("voyage", voyage_body(["a"], input_type="search_query"), 400, "input_type"),
        ("voyage", voyage_body(["a"], encoding_format="float"), 400, "encoding_format"),
        ("voyage", voyage_body(["a" * 64_004], model="voyage-law-2"), 400, "context length of 16000"),
        ("voyage", voyage_body(["a" * 60_000] * 9, model="voyage-law-2"), 400, "submitted batch is 120000"),
        ("voyage", voyage_body(["a"], model="voyage-law-2", output_dimension=256), 400, "output_dimension"),
        ("gemini", gemini_body(["a"] * 101), 400, "at most 100 requests"),
        ("gemini", gemini_body([]), 400, "contents is not specified"),
        ("gemini", {}, 400, "contents is not specified"),
        ("gemini", gemini_body([""]), 400, "contents is not specified"),
        ("gemini", gemini_body(["a"], model="models/other"), 400, "does not match"),
        ("gemini", gemini_body(["a"], taskType="QUERY"), 400, "task_type"),
        ("gemini", gemini_body(["a"], outputDimensionality=4000), 400, "must be between"),
        ("gemini", gemini_body(["a" * 8196]), 400, "exceeds the maximum"),
        ("gemini", {"requests": [*gemini_body(["a"])["requests"], {"model": "b"}]}, 400, "not specified"),
        ("ollama", ollama_body(["a"], model="none"), 404, "try pulling it first"),
        ("ollama", ollama_body(["a" * 8196]), 400, "the input length exceeds the context length"),
        ("ollama", {**ollama_body([]), "input": [1]}, 400, "invalid input type"),
    ],
)
def test_what_a_provider_refuses_is_refused_with_its_words(
    api: FakeApi, name: str, body: Any, status: int, message: str
) -> None:
    answer = OTHERS[name].ask(api, body)

    assert answer.status_code == status
    assert message in OTHERS[name].message(answer.json())


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (AZURE_PATH.replace("text-embedding-3-small", "none"), "DeploymentNotFound"),
        (AZURE_PATH.partition("?")[0], "404"),
    ],
)
def test_azure_knows_its_deployments_and_wants_a_version(api: FakeApi, path: str, code: str) -> None:
    answer = OTHERS["azure"].ask(api, openai_body(["a"]), path=path)

    assert (answer.status_code, error(answer)["code"]) == (404, code)


@pytest.mark.parametrize(
    ("name", "body", "tokens"),
    [
        ("cohere", cohere_body(["a" * 4000], model="embed-english-v3.0", truncate="END"), 512),
        ("voyage", voyage_body(["a" * 100_000], model="voyage-law-2", truncation=True), 16_000),
        ("ollama", ollama_body(["a" * 100_000], truncate=True), 2048),
    ],
)
def test_a_provider_shortens_texts_when_asked_to(api: FakeApi, name: str, body: Any, tokens: int) -> None:
    assert OTHERS[name].tokens(OTHERS[name].ask(api, body).json()) == tokens


@pytest.mark.parametrize(
    ("name", "fields", "dimensions", "length"),
    [
        ("azure", {"dimensions": 256}, 256, 1),
        ("cohere", {"output_dimension": 512}, 512, 1),
        ("voyage", {"output_dimension": 2048}, 2048, 1),
        ("gemini", {"outputDimensionality": 768}, 768, 0.5),
        ("ollama", {"dimensions": 256}, 256, 1),
        ("ollama", {"dimensions": 2000}, 768, 1),
    ],
)
def test_shorter_vectors_have_unit_length_but_gemini_s(
    api: FakeApi, name: str, fields: dict[str, int], dimensions: int, length: float
) -> None:
    other = OTHERS[name]

    (vector,) = other.vectors(other.ask(api, other.body(["a"], **fields)).json())

    assert len(vector) == dimensions
    assert np.linalg.norm(vector) == pytest.approx(length, abs=0.05 if length < 1 else 1e-6)


def test_voyage_answers_in_base64_when_asked_to(api: FakeApi) -> None:
    (text,) = OTHERS["voyage"].vectors(OTHERS["voyage"].ask(api, voyage_body(["a"], encoding_format="base64")).json())

    assert np.array_equal(np.frombuffer(base64.b64decode(text), "<f4"), embedding_of("a", 1024, "voyage-4"))
