"""Every provider over HTTP: its requests, its reading of every answer, its refusals.

A provider's own file has only what is special to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from autoembed.errors import Fault, ProviderTrouble, Refused, Trouble
from autoembed.model import Embedded, Model, Request
from autoembed.network import HttpAnswer, Network
from autoembed.providers import (
    PROVIDERS,
    azure,
    cohere,
    fake,
    function,
    gemini,
    http,
    local,
    ollama,
    openai,
    provider_of,
    voyage,
)
from fake_api import FakeApi, embedding_of, tokens_in

TEXTS = ["one", "Grüße, 世界 🦊", "three"]
PREFIXES = {"document_prefix": "search_document: ", "query_prefix": "search_query: "}


def listed(embeddings: Sequence[Any]) -> dict[str, Any]:
    data = [{"index": index, "embedding": embedding} for index, embedding in enumerate(embeddings)]
    return {"data": data, "usage": {"total_tokens": 7}}


def cohere_answer(embeddings: Sequence[Any]) -> dict[str, Any]:
    return {"embeddings": {"float": embeddings}, "meta": {"billed_units": {"input_tokens": 7}}}


def gemini_answer(embeddings: Sequence[Any]) -> dict[str, Any]:
    values = [{"values": embedding} for embedding in embeddings]
    return {"embeddings": values, "usageMetadata": {"promptTokenCount": 7}}


def ollama_answer(embeddings: Sequence[Any]) -> dict[str, Any]:
    return {"embeddings": embeddings, "prompt_eval_count": 7}


class Case(NamedTuple):
    """The facts of one provider that the tests of all providers need."""

    model: Model
    base_path: str  # of its base_url, below the tenant of the fake API
    endpoint: str  # below that
    form: str  # whose API an answer is in the form of
    answer: Callable[[Sequence[Any]], dict[str, Any]]  # with these embeddings, then the count of tokens
    no_key: str | None  # what the API says of none; None: it wants none
    wrong_key: str
    key_header: str = "Authorization"
    atol: float = 0
    takes_prefixes: bool = False
    has_indexes: bool = False
    says_when_to_come_back: bool = True


SIX = [
    Case(
        Model("small", "openai", "text-embedding-3-small", 256),
        "/v1",
        "/embeddings",
        "OpenAI",
        listed,
        "401: You didn't provide an API key",
        "401: Incorrect API key provided",
        takes_prefixes=True,
        has_indexes=True,
    ),
    Case(
        Model("small", "azure", "text-embedding-3-small", 256),
        "",
        "/openai/deployments/text-embedding-3-small/embeddings?api-version=2024-10-21",
        "OpenAI",
        listed,
        "401: Access denied",
        "401: Access denied",
        key_header="api-key",
        has_indexes=True,
    ),
    Case(
        Model("small", "cohere", "embed-v4.0", 256),
        "",
        "/v2/embed",
        "Cohere",
        cohere_answer,
        "401: invalid api token",
        "401: invalid api token",
        says_when_to_come_back=False,
    ),
    Case(
        Model("small", "voyage", "voyage-4", 256),
        "/voyage/v1",
        "/embeddings",
        "Voyage",
        listed,
        "401: .*Provided API key is invalid",
        "401: .*Provided API key is invalid",
        says_when_to_come_back=False,
        has_indexes=True,
    ),
    Case(
        Model("small", "gemini", "gemini-embedding-001", 256),
        "/v1beta",
        "/models/gemini-embedding-001:batchEmbedContents",
        "Gemini",
        gemini_answer,
        "403: Method doesn't allow",
        "400: API key not valid",
        key_header="x-goog-api-key",
        # The API shortens a vector by cutting it: what the fake calls the shorter one is the same, rescaled.
        atol=1e-6,
        takes_prefixes=True,
    ),
    Case(
        Model("small", "ollama", "nomic-embed-text", 256),
        "",
        "/api/embed",
        "Ollama",
        ollama_answer,
        None,
        "401: unauthorized",
        takes_prefixes=True,
    ),
]
CASES = {case.model.provider: case for case in SIX}
WITH_INDEXES = [name for name, case in CASES.items() if case.has_indexes]
WITH_ADDRESS = ["openai", "cohere", "voyage", "gemini"]  # of their own, where a key is wanted
WITH_PREFIXES = [name for name, case in CASES.items() if case.takes_prefixes]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def model(case: Case, api: FakeApi, key: str) -> Model:
    return replace(case.model, base_url=api.root + case.base_path, api_key=key)


def check(model: Model) -> None:
    provider_of(model).check(model)


def embed(model: Model, texts: Sequence[str], network: Network, **settings: Any) -> Embedded:
    return provider_of(model).embed(Request(model, texts, **{"timeout_seconds": 5, **settings}), network)


def trouble(model: Model, texts: Sequence[str], network: Network, **settings: Any) -> Trouble:
    with pytest.raises(Trouble) as caught:
        embed(model, texts, network, **settings)
    assert "sk-right" not in str(caught.value)
    return caught.value


def kind_of(trouble: Trouble) -> str:
    if isinstance(trouble, ProviderTrouble):
        return "permanent" if trouble.permanent else "passing"
    assert isinstance(trouble, Refused)
    return "refused"


class Answering(Network):
    """Gives every request the same answer, and keeps what the last one was."""

    def __init__(self, body: bytes = b"", status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(1)
        self.answer = HttpAnswer(status, dict(headers or {}), body)

    def post(self, url: str, headers: Mapping[str, str], body: bytes, **limits: Any) -> HttpAnswer:
        self.headers, self.body, self.limits = headers, json.loads(body), limits
        return self.answer


# --- check -------------------------------------------------------------------------------------------


def test_every_provider_has_its_name() -> None:
    modules = [azure, cohere, fake, function, gemini, local, ollama, openai, voyage]

    assert {name: provider.__name__ for name, provider in PROVIDERS.items()} == {  # type: ignore[attr-defined]
        module.__name__.rpartition(".")[2]: module.__name__ for module in modules
    }
    assert CASES.keys() == PROVIDERS.keys() - {"local", "function", "fake"}


def test_a_provider_that_is_not_known_is_the_callers_mistake() -> None:
    with pytest.raises(Fault, match='"small" names the provider "acme", which is not known') as caught:
        provider_of(Model("small", "acme", "m", 2))

    assert caught.value.hint.startswith(f"The providers are: {', '.join(sorted(PROVIDERS))}.")


def test_a_server_of_ones_own_needs_no_key(case: Case) -> None:
    check(replace(case.model, base_url="http://127.0.0.1:8000"))


@pytest.mark.parametrize("case", [name for name in CASES if name != "azure"], indirect=True)
def test_a_model_with_a_key_needs_no_url(case: Case, key: str) -> None:
    check(replace(case.model, api_key=key))


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("ollama", {}),
        ("ollama", {"base_url": "http://127.0.0.1:11434"}),
        ("cohere", {"model_id": "embed-english-v3.0", "max_tokens_per_input": 512, "base_url": "https://h"}),
        ("voyage", {"model_id": "voyage-law-2", "max_tokens_per_input": 16_000, "base_url": "https://h"}),
        ("azure", {"options": {"deployment": "d", "api_version": "2025-01-01-preview"}, "base_url": "https://h"}),
        *[(name, {"options": PREFIXES, "base_url": "https://h"}) for name in WITH_PREFIXES],
        *[(name, {"options": {"extra_headers": {"x-team": "a"}}, "base_url": "https://h"}) for name in CASES],
    ],
    indirect=["case"],
)
def test_a_right_definition_passes(case: Case, changes: dict[str, Any]) -> None:
    check(replace(case.model, **changes))


MISTAKES = [
    ({"base_url": "host:8000/v1"}, "not an http or https URL"),
    ({"base_url": "ftp://host/v1"}, "not an http or https URL"),
    ({"base_url": "file:///etc/passwd"}, "not an http or https URL"),
    ({"base_url": "HTTP"}, "not an http or https URL"),
    ({"options": {"prefix": "query: "}}, "the option prefix"),
    ({"options": {"extra_body": []}}, "option extra_body .* is not an object"),
    ({"options": {"extra_headers": "x-team: search"}}, "option extra_headers .* is not an object"),
    ({"options": {"extra_headers": {"x-team": 5}}}, "header x-team .* is not a text"),
    ({"base_url": "https://host/v1?key=sk"}, "has a query or a fragment"),
]
OWN_MISTAKES = [
    *[(name, {"base_url": None, "api_key": None}, "has no api_key") for name in WITH_ADDRESS],
    ("azure", {"base_url": None}, "has no base_url"),
    ("azure", {"options": {"deploiment": "d"}}, "the option deploiment"),
    ("azure", {"options": {"deployment": 5}}, "option deployment .* is not a text"),
    *[(name, {"options": PREFIXES}, "the option document_prefix") for name in CASES if name not in WITH_PREFIXES],
    *[(name, {"options": {"query_prefix": None}}, "option query_prefix .* is not a text") for name in WITH_PREFIXES],
    ("cohere", {"model_id": "embed-english-v3.0"}, "at most 512 tokens"),
    ("cohere", {"model_id": "embed-english-v3.0", "max_tokens_per_input": 513}, "at most 512 tokens"),
    ("voyage", {"model_id": "voyage-law-2"}, "at most 16000 tokens"),
    ("voyage", {"model_id": "voyage-code-2", "max_tokens_per_input": 16_001}, "at most 16000 tokens"),
]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [*[(name, *mistake) for name in CASES for mistake in MISTAKES], *OWN_MISTAKES],
    indirect=["case"],
)
def test_a_definition_that_cannot_work_is_the_callers_mistake(
    case: Case, key: str, changes: dict[str, Any], message: str
) -> None:
    right = replace(case.model, base_url="https://host", api_key=key)

    with pytest.raises(Fault, match=message) as caught:
        check(replace(right, **changes))

    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *[
            ({"extra_headers": {name: "sk-secret"}}, name)
            for name in (
                *("Authorization", "proxy-authorization", "Cookie", "Api-Key", "X-Goog-Api-Key", "Ocp-Apim-Key"),
                *("x-token", "X-Client-Secret", "x-password", "x-credentials", "x-signature", "x-session-id"),
            )
        ],
        ({"extra_headers": {"Authorization": "Bearer env:SOME_KEY"}}, "Authorization"),
        ({"extra_body": {"api_key": "sk-secret"}}, "api_key"),
        ({"extra_body": {"user": "u", "auth": {"Token": "sk-secret"}}}, "Token"),
        ({"extra_body": {"inputs": [1, [{"password": "sk-secret"}]]}}, "password"),
        ({"query_body": {"api_key": "sk-secret"}}, "api_key"),
        # It would be sent as it stands: only headers take references.
        ({"extra_body": {"api_key": "env:SOME_KEY"}}, "api_key"),
    ],
)
def test_an_option_keeps_no_secret_by_value(
    case: Case, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], name: str
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-right")

    with pytest.raises(Fault, match=f'"small" has {name}, which would keep a secret in a table') as caught:
        check(replace(case.model, base_url="https://host", options=options))

    assert "secret" not in str(caught.value).replace("keep a secret", "").replace(name, "")
    assert "'env:NAME', 'file:PATH' or 'vault:NAME'" in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"extra_headers": {"Authorization": "env:SOME_KEY", "x-api-key": "vault:gateway"}},
        {"extra_headers": {"x-team": "search"}},
        {"extra_body": {"max_tokens": 5, "tokens": [1, 2], "auth": {"user": "u"}, "user": "token"}},
    ],
)
def test_references_and_counts_of_tokens_are_no_secrets(
    case: Case, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-right")
    secrets = {"vault:gateway": {"vault_key": "sk-vault"}}

    check(replace(case.model, base_url="https://host", options=options, vault_secrets=secrets))


def test_a_header_whose_secret_is_missing_is_trouble_to_mend(case: Case) -> None:
    options = {"extra_headers": {"x-key": "file:/nowhere"}}

    with pytest.raises(ProviderTrouble, match="there is no value for the header x-key") as caught:
        check(replace(case.model, base_url="https://host", options=options))

    assert caught.value.permanent


def test_a_key_that_is_missing_is_trouble_to_mend(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)

    with pytest.raises(ProviderTrouble, match="SOME_KEY"):
        check(replace(case.model, base_url="https://host", api_key="env:SOME_KEY"))


# --- what it sends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slashes", ["", "/", "//"])
def test_a_request_goes_where_the_api_reference_has_it_with_the_key_in_its_header(
    api: FakeApi, case: Case, model: Model, network: Network, slashes: str
) -> None:
    embed(replace(model, base_url=f"{model.base_url}{slashes}"), TEXTS, network)

    (request,) = api.log()
    assert request["path"] == f"/{api.tenant}{case.base_path}{case.endpoint}"
    assert request["key_sha256"] == sha256(b"sk-right").hexdigest()
    assert {"Authorization", "api-key", "x-goog-api-key"} & set(request["headers"]) == {case.key_header}
    assert request["texts"] == TEXTS


@pytest.mark.parametrize(
    ("case", "model_id", "field"),
    [
        ("openai", "text-embedding-ada-002", "dimensions"),
        ("cohere", "embed-english-v3.0", "output_dimension"),
        ("voyage", "voyage-law-2", "output_dimension"),
    ],
    indirect=["case"],
)
def test_a_model_that_knows_no_dimensions_is_not_sent_any(case: Case, model_id: str, field: str) -> None:
    network = Answering(json.dumps(case.answer([[1.0] * 256])).encode())

    embed(replace(case.model, base_url="https://h"), ["a"], network)
    assert network.body[field] == 256
    embed(replace(case.model, base_url="https://h", model_id=model_id), ["a"], network)
    assert field not in network.body


def test_extra_headers_and_extra_body_are_sent_over_ours(case: Case) -> None:
    network = Answering(json.dumps(case.answer([[1.0] * 256])).encode())
    extra = {"extra_headers": {"x-team": "search", "Accept": "text/json"}, "extra_body": {"user": "u", "model": "mine"}}

    embed(replace(case.model, base_url="https://h", options=extra), ["a"], network)

    assert (network.headers["x-team"], network.headers["Accept"]) == ("search", "text/json")
    assert network.headers["Content-Type"] == "application/json"
    assert (network.body["user"], network.body["model"]) == ("u", "mine")


@pytest.mark.parametrize("purpose", ["document", "query"])
def test_a_request_has_the_fields_of_its_purpose(case: Case, purpose: str) -> None:
    network = Answering(json.dumps(case.answer([[1.0] * 256])).encode())
    options = {
        "extra_body": {"user": "u", "prompt": "any"},
        "document_body": {"prompt": "document"},
        "query_body": {"prompt": "query"},
    }

    embed(replace(case.model, base_url="https://h", options=options), ["a"], network, purpose=purpose)

    assert (network.body["user"], network.body["prompt"]) == ("u", purpose)


def test_a_header_is_sent_with_what_its_reference_names(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Answering(json.dumps(case.answer([[1.0] * 256])).encode())
    monkeypatch.setenv("SOME_KEY", "Bearer sk-gateway")
    options = {"extra_headers": {case.key_header: "env:SOME_KEY", "x-team": "search"}}

    embed(replace(case.model, base_url="https://h", options=options), ["a"], network)

    assert (network.headers[case.key_header], network.headers["x-team"]) == ("Bearer sk-gateway", "search")


def test_a_header_whose_secret_is_missing_calls_nobody(api: FakeApi, model: Model, network: Network) -> None:
    found = trouble(replace(model, options={"extra_headers": {"x-key": "file:/nowhere"}}), ["a"], network)

    assert "there is no value for the header x-key" in str(found)
    assert api.log() == []


@pytest.mark.parametrize("purpose", ["document", "query"])
@pytest.mark.parametrize("case", WITH_PREFIXES, indirect=True)
def test_texts_are_sent_with_the_prefix_of_their_purpose(
    api: FakeApi, model: Model, network: Network, purpose: str
) -> None:
    embed(replace(model, options=PREFIXES), ["a"], network, purpose=purpose)

    assert api.texts() == [f"search_{purpose}: a"]


def test_a_missing_key_calls_nobody(api: FakeApi, model: Model, network: Network) -> None:
    found = trouble(replace(model, api_key="file:/nowhere"), ["a"], network)

    assert "no API key" in str(found)
    assert api.log() == []


@pytest.mark.parametrize("key_text", ["sk-top\nsk-secret", "sk-top\u2026secret", "\ufeffsk-topsecret"])
def test_a_key_that_no_header_can_carry_is_trouble_to_mend_and_in_no_error(
    api: FakeApi, model: Model, network: Network, tmp_path: Path, key_text: str
) -> None:
    (tmp_path / "key").write_text(key_text)

    found = trouble(model, ["a"], network)

    assert "secret" not in str(found)
    assert kind_of(found) == "permanent"
    assert api.log() == []


# --- what it makes of an answer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "behaviour"),
    [
        *[(name, behaviour) for name in CASES for behaviour in ({}, {"faults": [{"slow_body": 0.1}]})],
        *[(name, {"faults": [{"shuffled": True}]}) for name in WITH_INDEXES],
        *[(name, {"supports_base64": "ignore"}) for name in ("openai", "azure")],
    ],
    indirect=["case"],
)
def test_each_text_gets_its_vector_and_the_tokens_are_reported(
    api: FakeApi, case: Case, model: Model, network: Network, behaviour: dict[str, Any]
) -> None:
    api.behave(**behaviour)

    embedded = embed(model, TEXTS, network)

    expected = np.stack([embedding_of(text, 256, case.model.model_id) for text in TEXTS])
    assert np.allclose(embedded.vectors, expected, rtol=0, atol=case.atol)
    assert embedded.vectors.dtype == np.float32
    assert embedded.tokens == sum(map(tokens_in, TEXTS))


def test_an_answer_that_counts_no_tokens_reports_none(case: Case) -> None:
    answer = case.answer([[1, 0]])
    counted = Answering(json.dumps(answer).encode())
    uncounted = Answering(json.dumps({name: answer[name] for name in list(answer)[:-1]}).encode())
    model = replace(case.model, base_url="https://h", dimensions=2)

    assert embed(model, ["a"], counted).tokens == 7
    assert embed(model, ["a"], uncounted).tokens is None


@pytest.mark.parametrize(
    ("counted", "tokens"),
    [
        (0, 0),
        (7, 7),
        (2**31 - 1, 2**31 - 1),
        (2**31, None),
        (-1, None),
        (True, None),
        (7.0, None),
        ("7", None),
        (None, None),
        ([7], None),
    ],
)
def test_only_a_count_that_a_column_takes_is_a_count_of_tokens(counted: Any, tokens: int | None) -> None:
    answer = {"usage": {"total_tokens": counted}}

    assert http.tokens_in(answer, "usage", "total_tokens") == tokens
    assert http.tokens_in({"total_tokens": counted}, "total_tokens") == tokens


@pytest.mark.parametrize("answer", [None, 5, [], {}, {"usage": None}, {"usage": [7]}, {"usage": {"tokens": 7}}])
def test_an_answer_of_any_form_may_count_no_tokens(answer: Any) -> None:
    assert http.tokens_in(answer, "usage", "total_tokens") is None


@pytest.mark.parametrize(
    ("status", "embeddings"), [(200, [[1, 2]]), (200, [[1, None]]), (200, ["?!"]), (400, []), (429, []), (401, [])]
)
def test_the_headers_of_an_answer_come_back_with_it_whatever_it_says(
    case: Case, status: int, embeddings: list[Any]
) -> None:
    headers = {"x-ratelimit-limit-requests": "60"}
    network = Answering(json.dumps(case.answer(embeddings)).encode(), status, headers)
    model = replace(case.model, base_url="https://h", dimensions=2)

    try:
        outcome: Embedded | Trouble = embed(model, ["a"], network)
    except Trouble as found:
        outcome = found

    assert outcome.headers == headers


def assert_in_another_form(case: Case, body: bytes) -> None:
    found = trouble(replace(case.model, base_url="https://h", dimensions=2), ["a", "b"], Answering(body))

    assert f"not in the form of the {case.form} API" in str(found)
    assert kind_of(found) == "passing"


@pytest.mark.parametrize(
    "body",
    [b"", b"<html></html>", b"null", b"[]", b"{}", b'"text"', b'{"error": ""}', b"[" * 100_000],
)
def test_an_answer_in_another_form_is_the_providers_trouble(case: Case, body: bytes) -> None:
    assert_in_another_form(case, body)


@pytest.mark.parametrize("embeddings", [None, 5, "text", {"a": 1}, [5]])
def test_embeddings_that_are_no_list_of_them_are_the_providers_trouble(case: Case, embeddings: Any) -> None:
    field = next(iter(case.answer([])))

    assert_in_another_form(case, json.dumps({field: embeddings}).encode())


@pytest.mark.parametrize(
    "embedding", ["?!", "AA==", ["one", "two"], {"a": 1}, 5, None, True, [[1], [2]], [[1, 2], [3, 4]], [1, [2]]]
)
def test_an_embedding_in_another_form_is_the_providers_trouble(case: Case, embedding: Any) -> None:
    assert_in_another_form(case, json.dumps(case.answer([[1, 2], embedding])).encode())


@pytest.mark.parametrize(
    "body",
    [b'{"data": "my text"', b'["my text"]', b'"my text"', b'{"data": [{"index": "my text", "embedding": "my text"}]}'],
)
def test_an_answer_in_another_form_is_not_quoted(case: Case, body: bytes) -> None:
    """It may repeat the texts."""
    found = trouble(replace(case.model, base_url="https://h", dimensions=2), ["my text"], Answering(body))

    assert "my text" not in str(found)


def test_an_answer_that_is_not_whole_or_not_utf_8_is_the_providers_trouble(case: Case) -> None:
    right = json.dumps(case.answer([[1, 2], [3, 4]])).encode()

    assert_in_another_form(case, right[:-5])
    assert_in_another_form(case, b"\xff" + right)


@pytest.mark.parametrize(
    ("embeddings", "kind", "message"),
    [
        ([], "passing", "0 vectors for 2 texts"),
        ([[1, 2]], "passing", "1 vectors for 2 texts"),
        ([[1, 2]] * 3, "passing", "3 vectors for 2 texts"),
        ([[1, 2, 3], [1, 2, 3]], "permanent", "have 3 dimensions, the model is defined with 2"),
        ([[1, 2], [1]], "permanent", "have 1 dimensions, the model is defined with 2"),
        ([[], []], "permanent", "have 0 dimensions, the model is defined with 2"),
        ([[1, 2], [1, None]], "refused", "not finite"),
        # Out of float32's range.
        ([[1, 2], [1, 1e300]], "refused", "not finite"),
        # Python's json writes these, although JSON has no such numbers.
        ([[1, 2], [1, float("nan")]], "refused", "not finite"),
        ([[1, 2], [1, float("inf")]], "refused", "not finite"),
        ([[1, 2], [float("-inf"), 1]], "refused", "not finite"),
        ([[1, 2], [0, 0]], "refused", "of length zero"),
        ([[0.0, -0.0], [1, 2]], "refused", "of length zero"),
        # Zero in float32, and zero when it is squared.
        ([[1, 2], [1e-60, 0]], "refused", "of length zero"),
        ([[1, 2], [1e-30, 1e-30]], "refused", "of length zero"),
    ],
)
def test_every_text_must_have_one_finite_vector_of_the_models_dimensions(
    case: Case, embeddings: list[Any], kind: str, message: str
) -> None:
    network = Answering(json.dumps(case.answer(embeddings)).encode())

    found = trouble(replace(case.model, base_url="https://h", dimensions=2), ["a", "b"], network)

    assert (kind_of(found), message in str(found)) == (kind, True)


def test_an_error_with_status_200_is_told_in_its_words(case: Case) -> None:
    network = Answering(json.dumps({"error": {"message": "credits exhausted"}}).encode())

    found = trouble(replace(case.model, base_url="https://h", dimensions=2), ["a", "b"], network)

    assert (kind_of(found), found.may_be_a_texts) == ("passing", True)
    assert str(found) == "the provider answered with an error: credits exhausted"


def test_a_404_names_the_address_that_was_asked(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"status": 404}])

    found = str(trouble(model, TEXTS, network))

    assert str(model.base_url) in found
    assert "?" not in found.split(", the provider answered 404")[0]


FAULTS = [
    ({"status": 400}, "refused"),
    ({"status": 413}, "refused"),
    ({"status": 422}, "refused"),
    ({"nan": True}, "refused"),
    ({"infinity": True}, "refused"),
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
]
OWN_FAULTS = [
    *[(name, {fault: True}, "passing") for name in WITH_INDEXES for fault in ("duplicate_index",)],
    ("openai", {"status": 429, "body": {"error": {"code": "insufficient_quota"}}}, "permanent"),
    ("azure", {"status": 429, "body": {"error": {"code": "insufficient_quota"}}}, "permanent"),
    ("cohere", {"status": 402}, "permanent"),
    ("cohere", {"status": 498}, "refused"),
    ("cohere", {"status": 499}, "passing"),
    ("ollama", {"status": 500, "body": {"error": "json: unsupported value: NaN"}}, "refused"),
]


@pytest.mark.parametrize(
    ("case", "fault", "kind"),
    [*[(name, *fault) for name in CASES for fault in FAULTS], *OWN_FAULTS],
    indirect=["case"],
)
def test_a_fault_of_the_api_is_its_kind_of_trouble(
    api: FakeApi, model: Model, network: Network, fault: dict[str, Any], kind: str
) -> None:
    api.behave(faults=[fault])

    assert kind_of(trouble(model, TEXTS, network)) == kind
    assert embed(model, TEXTS, network).vectors.shape == (3, 256)


@pytest.mark.parametrize("fault", [{"hang": True}, {"slow_body": 30}, {"close": True}, {"cut_off": True}], ids=str)
def test_a_text_may_be_the_reason_of_silence(
    api: FakeApi, model: Model, network: Network, fault: dict[str, Any]
) -> None:
    api.behave(faults=[fault])

    assert trouble(model, TEXTS, network, timeout_seconds=0.5).may_be_a_texts


def test_no_text_is_the_reason_of_a_server_that_is_not_there(model: Model, network: Network) -> None:
    assert not trouble(replace(model, base_url="http://127.0.0.1:9"), TEXTS, network).may_be_a_texts


@pytest.mark.parametrize(
    ("case", "status", "body", "kind"),
    [
        ("cohere", 400, b'{"message": "too many tokens"}', "refused"),
        ("cohere", 401, b'{"message": "invalid api token sk-right"}', "permanent"),
        ("cohere", 402, b'{"message": "Please add or update your payment method"}', "permanent"),
        ("cohere", 404, b'{"message": "model not found"}', "permanent"),
        ("cohere", 422, b'{"message": "unprocessable"}', "refused"),
        ("cohere", 429, b'{"message": "a Trial key, which is limited to 100 API calls / minute"}', "passing"),
        ("cohere", 429, b'{"message": "a Trial key, which is limited to 1000 API calls / month"}', "permanent"),
        ("cohere", 498, b'{"message": "blocked input"}', "refused"),
        ("cohere", 499, b'{"message": "request cancelled"}', "passing"),
        ("cohere", 501, b"", "passing"),
        ("voyage", 400, b'{"detail": "The batch size limit is 1000, sk-right."}', "refused"),
        ("voyage", 400, b'{"detail": "Model a is not supported. Supported models are [b]."}', "permanent"),
        ("voyage", 401, b'{"detail": "Provided API key is invalid."}', "permanent"),
        ("voyage", 403, b'{"detail": "Forbidden"}', "permanent"),
        ("voyage", 429, b'{"detail": "You have not yet added your payment method"}', "passing"),
        ("gemini", 400, b'{"error": {"status": "INVALID_ARGUMENT", "message": "at most 100 requests"}}', "refused"),
        ("gemini", 400, b'{"error": {"message": "sk-right", "details": [{"reason": "API_KEY_INVALID"}]}}', "permanent"),
        ("gemini", 400, b'{"error": {"status": "FAILED_PRECONDITION", "message": "enable billing"}}', "permanent"),
        ("gemini", 403, b'{"error": {"status": "PERMISSION_DENIED"}}', "permanent"),
        ("gemini", 404, b'{"error": {"status": "NOT_FOUND"}}', "permanent"),
        ("gemini", 429, b'{"error": {"status": "RESOURCE_EXHAUSTED"}}', "passing"),
        ("gemini", 500, b'{"error": {"status": "INTERNAL"}}', "passing"),
        ("gemini", 503, b'{"error": {"status": "UNAVAILABLE"}}', "passing"),
        ("gemini", 504, b'{"error": {"status": "DEADLINE_EXCEEDED"}}', "passing"),
        ("ollama", 400, b'{"error": "the input length exceeds the context length"}', "refused"),
        ("ollama", 401, b'{"error": "unauthorized: sk-right"}', "permanent"),
        ("ollama", 404, b'{"error": "model not found, try pulling it first"}', "permanent"),
        ("ollama", 500, b'{"error": "failed to encode response: json: unsupported value: NaN"}', "refused"),
        ("ollama", 500, b'{"error": "the input length exceeds the context length"}', "refused"),
        ("ollama", 500, b'{"error": "llama runner process has terminated"}', "passing"),
        ("ollama", 503, b'{"error": "server busy, please try again. maximum pending requests exceeded"}', "passing"),
        # No answer at all, although a success.
        *[(name, 202, b"", "permanent") for name in CASES],
    ],
    indirect=["case"],
)
def test_a_status_means_what_the_provider_means_by_it(
    case: Case, key: str, status: int, body: bytes, kind: str
) -> None:
    found = trouble(replace(case.model, base_url="https://h", api_key=key), ["a"], Answering(body, status))

    assert kind_of(found) == kind
    assert f"the provider answered {status}" in str(found)


@pytest.mark.parametrize(
    ("case", "changes", "texts", "kind", "message"),
    [
        ("openai", {"model_id": "none"}, ["a"], "permanent", "404: The model `none` does not exist"),
        ("openai", {}, ["a" * 40_000], "refused", "400: .*maximum context length is 8192"),
        ("azure", {"options": {"deployment": "none"}}, ["a"], "permanent", "404: The API deployment .* does not exist"),
        ("azure", {"options": {"api_version": "yesterday"}}, ["a"], "permanent", "404: Resource not found"),
        ("azure", {}, ["a" * 40_000], "refused", "400: .*maximum context length is 8192"),
        ("azure", {}, ["a" * 30_000] * 41, "refused", "400: .*max 300000 tokens per request"),
        ("azure", {"dimensions": 5000}, ["a"], "refused", "400: .*Must be between 1 and 1536"),
        ("cohere", {"model_id": "embed-v9"}, ["a"], "permanent", "404: model 'embed-v9' not found"),
        (
            "cohere",
            {"model_id": "embed-english-v3.0"},
            ["a" * 2100],
            "refused",
            "400: too many tokens: text exceeds 512",
        ),
        ("cohere", {}, ["a" * 513_000], "refused", "400: too many tokens: text exceeds 128000"),
        ("cohere", {"dimensions": 100}, ["a"], "refused", "400: .*output_dimension is not valid"),
        ("voyage", {"model_id": "voyage-9"}, ["a"], "permanent", "400: .*Model voyage-9 is not supported"),
        ("voyage", {}, ["a" * 128_100], "refused", "400: .*exceeds the context length of 32000"),
        ("voyage", {}, ["a" * 100_000] * 13, "refused", "400: .*max allowed tokens per submitted batch is 320000"),
        ("voyage", {"dimensions": 100}, ["a"], "refused", "400: .*output_dimension"),
        ("gemini", {"model_id": "gemini-9"}, ["a"], "permanent", "404: The model is not found"),
        ("gemini", {}, ["a" * 8300], "refused", "400: The input token count .2075. exceeds .* .2048."),
        ("gemini", {"dimensions": 5000}, ["a"], "refused", "400: output_dimensionality must be between"),
        ("ollama", {"model_id": "none"}, ["a"], "permanent", '404: model "none" not found, try pulling it first'),
        ("ollama", {"dimensions": 1024}, ["a"], "permanent", "have 768 dimensions, the model is defined with 1024"),
    ],
    indirect=["case"],
)
def test_what_the_api_refuses_is_said_in_its_words(
    model: Model, network: Network, changes: dict[str, Any], texts: list[str], kind: str, message: str
) -> None:
    found = trouble(replace(model, **changes), texts, network)

    assert kind_of(found) == kind
    with pytest.raises(Trouble, match=message):
        raise found


def test_the_limit_of_texts_is_the_apis(case: Case, model: Model, network: Network) -> None:
    most = provider_of(model).MAX_INPUTS_PER_REQUEST

    assert len(embed(model, ["a"] * most, network).vectors) == most
    if case.model.provider != "ollama":  # which has none: ours keeps a request short
        assert kind_of(trouble(model, ["a"] * (most + 1), network)) == "refused"


def test_a_key_that_is_missing_or_wrong_needs_somebody_to_act(
    api: FakeApi, case: Case, model: Model, network: Network
) -> None:
    api.behave(api_key="sk-other")

    with pytest.raises(ProviderTrouble, match=case.wrong_key) as wrong:
        embed(model, ["a"], network)
    assert wrong.value.permanent
    assert "sk-right" not in str(wrong.value)

    without_key = replace(model, api_key=None)
    if case.no_key is None:
        embed(without_key, ["a"], network)
    else:
        with pytest.raises(ProviderTrouble, match=case.no_key) as none:
            embed(without_key, ["a"], network)
        assert none.value.permanent
    assert case.key_header not in api.log()[1]["headers"]


def test_a_key_that_the_api_echoes_is_in_no_error(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"echo_authorization": True}])

    found = trouble(model, ["a"], network)

    assert "***" in str(found)


def test_no_secret_of_a_header_is_in_an_error_nor_in_its_cut_words(
    case: Case, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "Bearer sk-gateway")
    said = "x" * 300 + " sk-right Bearer sk-gateway sk-gateway " * 20
    options = {"extra_headers": {"x-gateway-key": "env:SOME_KEY"}}
    model = replace(case.model, base_url="https://h", api_key=key, options=options)

    found = trouble(model, ["a"], Answering(json.dumps({"error": {"message": said}}).encode(), 500))

    assert "sk-" not in str(found)
    assert len(str(found)) <= 400


@pytest.mark.parametrize("status", [202, 400, 401, 429, 500])
def test_what_every_tenant_may_know_of_an_answer_has_no_words_of_it(case: Case, status: int) -> None:
    body = json.dumps({"error": {"message": "Your text says: a secret"}, "message": "a secret"}).encode()

    found = trouble(replace(case.model, base_url="https://h"), ["a"], Answering(body, status))

    assert found.summary == f"its provider is in trouble (HTTP {status})"


@pytest.mark.parametrize(("header", "low", "high"), [("retry_after", 7, 7), ("retry_after_date", 6, 8)])
def test_retry_after_reaches_the_trouble(
    api: FakeApi, model: Model, network: Network, header: str, low: float, high: float
) -> None:
    api.behave(faults=[{"status": 429, header: 7}])

    found = trouble(model, ["a"], network)

    assert isinstance(found, ProviderTrouble)
    assert found.retry_after_seconds is not None
    assert low <= found.retry_after_seconds <= high


def test_a_rate_limit_passes_and_says_when_if_the_provider_does(
    api: FakeApi, case: Case, model: Model, network: Network
) -> None:
    api.behave(rate_limit={"requests_per_minute": 1})
    embed(model, ["a"], network)

    found = trouble(model, ["a"], network)

    assert isinstance(found, ProviderTrouble)
    assert "answered 429" in str(found)
    assert not found.permanent
    assert (found.retry_after_seconds is not None) == case.says_when_to_come_back
    assert found.retry_after_seconds is None or 50 < found.retry_after_seconds <= 60


def test_an_answer_that_does_not_come_in_time_is_passing_trouble(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"hang": True}])

    assert kind_of(trouble(model, ["a"], network, timeout_seconds=0.1)) == "passing"


@pytest.mark.parametrize(("count", "dimensions"), [(1, 1), (2048, 3072)])
def test_the_bound_of_an_answer_leaves_room_for_the_longest_right_one(case: Case, count: int, dimensions: int) -> None:
    network = Answering(status=500)

    trouble(replace(case.model, base_url="https://h", dimensions=dimensions), ["a"] * count, network)

    longest_number = len("-1.2345678901234567e-123, ")
    assert network.limits["max_answer_bytes"] > count * dimensions * longest_number
    assert network.limits["max_answer_bytes"] < 300 << 20
