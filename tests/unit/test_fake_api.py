"""The fake API: OpenAI's protocol as the official client sees it, every fault as a plain client does."""

from __future__ import annotations

import base64
import datetime
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import pytest
import requests

import fake_api
from fake_api import FakeApi, Server, Vector, embedding_of

MODEL = "text-embedding-3-small"


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
def client(api: FakeApi) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=api.base_url, api_key="sk-right", max_retries=0, timeout=10) as client:
        yield client


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = "Bearer sk-right"
        yield session


def ask(session: requests.Session, api: FakeApi, texts: Any, **fields: Any) -> requests.Response:
    body = {"model": MODEL, "input": texts, **fields}
    return session.post(f"{api.base_url}/embeddings", json=body, timeout=10)


def vectors(answer: requests.Response) -> list[Vector]:
    return [np.array(item["embedding"], np.float32) for item in answer.json()["data"]]


def error(answer: requests.Response) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    return found


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


# --- the official client -----------------------------------------------------------------------------


def test_official_client_embeds_a_single_text_by_base64(client: openai.OpenAI, api: FakeApi) -> None:
    answer = client.embeddings.create(model=MODEL, input="eight ch")

    assert np.array_equal(np.array(answer.data[0].embedding, np.float32), embedding_of("eight ch"))
    assert (answer.object, answer.model, answer.data[0].index) == ("list", MODEL, 0)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 2)
    assert api.log()[0]["encoding_format"] == "base64"


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize(("model", "full"), fake_api.MODELS.items())
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


def openai_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    return {"input": texts, **fields}


def cohere_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    return {"model": "embed-v4.0", "texts": texts, "input_type": "search_query", "truncate": "NONE", **fields}


def voyage_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    return {"model": "voyage-4", "input": texts, "truncation": False, **fields}


def gemini_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    settings = {"model": "models/gemini-embedding-001", **fields}
    return {"requests": [{**settings, "content": {"parts": [{"text": text}]}} for text in texts]}


def ollama_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    return {"model": "nomic-embed-text", "input": texts, "truncate": False, **fields}


class Other(NamedTuple):
    """One of the other protocols, as a plain client speaks it."""

    path: str
    key: dict[str, str]
    body: Callable[..., dict[str, Any]]
    model: str
    full: int
    vectors: Callable[[Any], list[Any]]
    tokens: Callable[[Any], int]
    message: Callable[[Any], str]

    def ask(self, api: FakeApi, body: Any, key: dict[str, str] | None = None, path: str = "") -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False
            headers = self.key if key is None else key
            return session.post(api.root + (path or self.path), json=body, headers=headers, timeout=10)


BEARER = {"Authorization": "Bearer sk-right"}
AZURE_PATH = "/openai/deployments/text-embedding-3-small/embeddings?api-version=2024-10-21"
OTHERS = {
    "azure": Other(
        AZURE_PATH,
        {"api-key": "sk-right"},
        openai_body,
        MODEL,
        1536,
        lambda answer: [item["embedding"] for item in answer["data"]],
        lambda answer: answer["usage"]["total_tokens"],
        lambda answer: answer["error"]["message"],
    ),
    "cohere": Other(
        "/v2/embed",
        BEARER,
        cohere_body,
        "embed-v4.0",
        1536,
        lambda answer: answer["embeddings"]["float"],
        lambda answer: answer["meta"]["billed_units"]["input_tokens"],
        lambda answer: answer["message"],
    ),
    "voyage": Other(
        "/voyage/v1/embeddings",
        BEARER,
        voyage_body,
        "voyage-4",
        1024,
        lambda answer: [item["embedding"] for item in answer["data"]],
        lambda answer: answer["usage"]["total_tokens"],
        lambda answer: answer["detail"],
    ),
    "gemini": Other(
        "/v1beta/models/gemini-embedding-001:batchEmbedContents",
        {"x-goog-api-key": "sk-right"},
        gemini_body,
        "gemini-embedding-001",
        3072,
        lambda answer: [embedding["values"] for embedding in answer["embeddings"]],
        lambda answer: answer["usageMetadata"]["promptTokenCount"],
        lambda answer: answer["error"]["message"],
    ),
    "ollama": Other(
        "/api/embed",
        BEARER,
        ollama_body,
        "nomic-embed-text",
        768,
        lambda answer: answer["embeddings"],
        lambda answer: answer["prompt_eval_count"],
        lambda answer: answer["error"],
    ),
}


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


def test_requests_above_the_rate_are_refused_until_the_time_told(session: requests.Session, api: FakeApi) -> None:
    api.behave(rate_limit={"requests_per_minute": 120, "burst_seconds": 1})  # two at once, then 2 a second

    first, second = ask(session, api, "a"), ask(session, api, "a")
    before = time.monotonic()
    third = ask(session, api, "a")
    wait_milliseconds = int(third.headers["retry-after-ms"])
    while ask(session, api, "a").status_code == 429:
        assert time.monotonic() < before + 10, "still refused"
    waited_milliseconds = (time.monotonic() - before) * 1000

    assert [answer.status_code for answer in (first, second, third)] == [200, 200, 429]
    assert error(third)["code"] == "rate_limit_exceeded"
    assert error(third)["type"] == "requests"
    assert third.headers["Retry-After"] == "1"
    assert 0 < wait_milliseconds <= 500
    assert waited_milliseconds >= wait_milliseconds - 1
    assert first.headers["x-ratelimit-limit-requests"] == "120"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.headers["x-ratelimit-reset-requests"].endswith("ms")


def test_tokens_above_the_rate_are_refused(session: requests.Session, api: FakeApi) -> None:
    api.behave(rate_limit={"requests_per_minute": 6000, "tokens_per_minute": 100})

    assert ask(session, api, "a" * 4 * 90).status_code == 200
    answer = ask(session, api, "a" * 4 * 20)

    assert (answer.status_code, error(answer)["type"]) == (429, "tokens")
    assert int(answer.headers["Retry-After"]) in range(4, 8)  # 10 tokens are missing, 1.67 come a second
    assert answer.headers["x-ratelimit-reset-tokens"].endswith("s")


@pytest.mark.parametrize(
    ("seconds", "duration"),
    [(0, "0ms"), (0.0121, "13ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (360.25, "6m0.25s")],
)
def test_durations_are_written_as_openai_does(seconds: float, duration: str) -> None:
    assert fake_api._duration(seconds) == duration


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


def raw(api: FakeApi, texts: list[str]) -> dict[str, Any]:
    """The arguments of a request that shares no connection."""
    headers = {"Authorization": "Bearer sk-right"}
    return {"url": f"{api.base_url}/embeddings", "json": {"model": MODEL, "input": texts}, "headers": headers}


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


# --- faults ------------------------------------------------------------------------------------------


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
        assert next(answer.iter_content(1000)).startswith(b'{"object":"list"')

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


def test_every_fault_of_the_table_has_its_test() -> None:
    source = Path(__file__).read_text()

    assert [kind for kind in fake_api.FAULTS if f'"{kind}"' not in source] == []


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
    command = [sys.executable, fake_api.__file__, "--port", "0"]
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
