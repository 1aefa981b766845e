"""The provider openai: what it sends, what it makes of every answer, over the fake API and without."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed.errors import InvalidInput, ProviderTrouble, Refused
from autoembed.model import Ask, Model
from autoembed.network import Answer, Network
from autoembed.providers import PROVIDERS, http, openai, provider_of
from fake_api import FakeApi, Server, embedding_of

SMALL = Model("small", "openai", "text-embedding-3-small", 1536)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


# --- what it sends -----------------------------------------------------------------------------------


def test_a_request_has_the_fields_of_the_api_reference() -> None:
    assert json.loads(http.encode(openai.request_body(Ask(replace(SMALL, dimensions=256), TEXTS, 5)))) == {
        "model": "text-embedding-3-small",
        "input": TEXTS,
        "encoding_format": "base64",
        "dimensions": 256,
    }


def test_a_model_that_knows_no_dimensions_is_not_sent_any() -> None:
    body = json.loads(
        http.encode(openai.request_body(Ask(replace(SMALL, model_id="text-embedding-ada-002"), TEXTS, 5)))
    )

    assert "dimensions" not in body


@given(st.lists(st.text(), min_size=1))
def test_texts_arrive_as_they_are(texts: list[str]) -> None:
    assert json.loads(http.encode(openai.request_body(Ask(SMALL, texts, 5))))["input"] == texts


def test_half_a_surrogate_pair_breaks_no_request() -> None:
    assert json.loads(http.encode(openai.request_body(Ask(SMALL, ["a\ud83eb"], 5))))["input"] == ["a?b"]


# --- what it makes of an answer ----------------------------------------------------------------------


def packed(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, "<f4").tobytes()).decode()


def answer(*embeddings: Any, indexes: list[Any] | None = None) -> bytes:
    items = [
        {"object": "embedding", "index": index, "embedding": embedding}
        for index, embedding in zip(indexes or range(len(embeddings)), embeddings, strict=True)
    ]
    return json.dumps({"object": "list", "data": items, "usage": {"total_tokens": 1}}).encode()


@pytest.mark.parametrize(
    "body",
    [
        answer([1, 2], [3, 4], [5, 6]),
        answer([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]),
        answer(packed(1, 2), packed(3, 4), packed(5, 6)),
        answer(packed(1, 2), [3, 4], packed(5, 6)),
        answer([5, 6], [1, 2], [3, 4], indexes=[2, 0, 1]),
        answer(packed(5, 6), packed(3, 4), packed(1, 2), indexes=[2, 1, 0]),
    ],
)
def test_vectors_come_in_the_order_of_the_texts(body: bytes) -> None:
    vectors = openai.embedded_in(body, 3, 2).vectors

    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1, 2], [3, 4], [5, 6]]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_base64_and_numbers_give_the_same_vector(numbers: list[float]) -> None:
    by_base64 = openai.embedded_in(answer(packed(*numbers)), 1, len(numbers)).vectors
    by_numbers = openai.embedded_in(answer(numbers), 1, len(numbers)).vectors

    assert by_base64.tolist() == by_numbers.tolist() == [numbers]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html></html>",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b'{"data": null}',
        b'{"data": 5}',
        b'{"data": "text"}',
        b'{"data": {"a": 1}}',
        b'{"data": [5]}',
        b'{"data": [{"embedding": [1, 2]}]}',
        b'{"data": [{"index": 0}]}',
        b'{"data": [{"index": [0], "embedding": [1, 2]}]}',
        b'{"error": {"message": "No."}}',
        answer([1, 2])[:-5],
        b"\xff" + answer([1, 2]),
        b"[" * 100_000,
        answer("?!"),
        answer("AA=="),
        answer(packed(1, 2) + "\n?"),
        answer({"a": 1}),
        answer(["one", "two"]),
        answer(None),
        answer(5),
        answer(True),
        answer([[1], [2]]),
        answer([[1, 2], [3, 4]]),
        answer([1, [2, 3]]),
    ],
)
def test_an_answer_in_another_form_is_the_providers_trouble(body: bytes) -> None:
    with pytest.raises(ProviderTrouble, match="not in the form of the OpenAI API") as caught:
        openai.embedded_in(body, 1, 2)

    assert not caught.value.permanent


@pytest.mark.parametrize(
    "body",
    [
        answer(),
        answer([1, 2]),
        answer([1, 2], [3, 4], [5, 6]),
        answer([1, 2], [3, 4], indexes=[0, 0]),
        answer([1, 2], [3, 4], [5, 6], indexes=[0, 1, 1]),
        answer([1, 2], [3, 4], indexes=[1, 2]),
        answer([1, 2], [3, 4], indexes=[-1, 0]),
        answer([1, 2], [3, 4], indexes=["0", "1"]),
        answer([1, 2], [3, 4], indexes=[0, None]),
    ],
)
def test_every_text_must_have_exactly_one_vector(body: bytes) -> None:
    with pytest.raises(ProviderTrouble, match="for 2 texts") as caught:
        openai.embedded_in(body, 2, 2)

    assert not caught.value.permanent


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (answer([1, 2, 3], [1, 2, 3]), 3),
        (answer([1, 2], [1]), 1),
        (answer([1, 2], packed(1, 2, 3)), 3),
        (answer([], []), 0),
    ],
)
def test_vectors_of_other_dimensions_need_somebody_to_act(body: bytes, wrong: int) -> None:
    with pytest.raises(ProviderTrouble) as caught:
        openai.embedded_in(body, 2, 2)

    assert str(caught.value) == f"the provider's vectors have {wrong} dimensions, the model is defined with 2"
    assert caught.value.permanent


@pytest.mark.parametrize(
    "body",
    [
        answer([1, 2], packed(1, float("nan"))),
        answer([1, 2], packed(float("inf"), 1)),
        answer([1, 2], packed(1, float("-inf"))),
        answer([1, 2], [1, None]),
        # Out of float32's range.
        answer([1, 2], [1, 1e300]),
        # What Python's json writes, although JSON has no such numbers.
        answer([1, 2], [1, float("nan")]),
        answer([1, 2], [1, float("inf")]),
        answer([1, 2], [float("-inf"), 1]),
    ],
)
def test_a_vector_that_is_not_finite_is_its_texts_fault(body: bytes) -> None:
    with pytest.raises(Refused, match="not finite"):
        openai.embedded_in(body, 2, 2)


# --- check -------------------------------------------------------------------------------------------


def test_every_provider_has_its_name() -> None:
    assert provider_of(SMALL) is PROVIDERS["openai"]

    with pytest.raises(InvalidInput, match='"small" names the provider "acme", which is not known') as caught:
        provider_of(replace(SMALL, provider="acme"))
    assert caught.value.hint == "The providers are: azure, cohere, gemini, local, ollama, openai, voyage."


@pytest.mark.parametrize("url", ["", "api.openai.com/v1", "ftp://host/v1", "file:///etc/passwd", "HTTP"])
def test_a_base_url_that_is_no_http_url_is_the_callers_mistake(url: str) -> None:
    model = replace(SMALL, base_url=url or None)

    with pytest.raises(InvalidInput) as caught:
        openai.check(model)

    assert caught.value.hint


def test_a_model_without_key_is_right_at_a_server_of_ones_own() -> None:
    openai.check(replace(SMALL, base_url="http://127.0.0.1:8000/v1"))


def test_a_key_that_is_missing_is_trouble_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)

    with pytest.raises(ProviderTrouble, match="SOME_KEY"):
        openai.check(replace(SMALL, api_key="env:SOME_KEY"))


# --- embed, over HTTP --------------------------------------------------------------------------------


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
    return replace(SMALL, base_url=api.base_url, api_key=f"file:{tmp_path / 'key'}")


@pytest.mark.parametrize(
    "behaviour",
    [
        {},
        {"supports_base64": "ignore"},
        {"faults": [{"shuffled": True}]},
        {"faults": [{"slow_body": 0.1}]},
    ],
)
def test_each_text_gets_its_vector(api: FakeApi, model: Model, network: Network, behaviour: dict[str, Any]) -> None:
    api.behave(**behaviour)

    vectors = openai.embed(Ask(model, TEXTS, 5), network).vectors

    assert np.array_equal(vectors, np.stack([embedding_of(text) for text in TEXTS]))


@pytest.mark.parametrize("slashes", ["", "/", "//"])
def test_the_base_url_may_end_in_a_slash(api: FakeApi, model: Model, network: Network, slashes: str) -> None:
    openai.embed(Ask(replace(model, base_url=api.base_url + slashes), ["a"], 5), network)

    assert [request["path"] for request in api.log()] == [f"/{api.tenant}/v1/embeddings"]


def test_the_key_is_sent(api: FakeApi, model: Model, network: Network) -> None:
    openai.embed(Ask(model, ["a"], 5), network)

    assert api.log()[0]["key_sha256"] == sha256(b"sk-right").hexdigest()


def test_without_a_key_none_is_sent(api: FakeApi, model: Model, network: Network) -> None:
    with pytest.raises(ProviderTrouble, match="didn't provide an API key"):
        openai.embed(Ask(replace(model, api_key=None), ["a"], 5), network)

    assert "Authorization" not in api.log()[0]["headers"]


def test_a_missing_key_calls_nobody(api: FakeApi, model: Model, network: Network) -> None:
    with pytest.raises(ProviderTrouble, match="no API key"):
        openai.embed(Ask(replace(model, api_key="file:/nowhere"), ["a"], 5), network)

    assert api.log() == []


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"status": 400}, Refused),
        ({"status": 413}, Refused),
        ({"status": 422}, Refused),
        ({"nan": True}, Refused),
        ({"infinity": True}, Refused),
        ({"status": 401}, "permanent"),
        ({"status": 403}, "permanent"),
        ({"status": 404}, "permanent"),
        ({"redirect": "http://127.0.0.1:9/elsewhere"}, "permanent"),
        ({"wrong_dimensions": True}, "permanent"),
        ({"wrong_dimensions": 3}, "permanent"),
        ({"status": 429, "body": {"error": {"code": "insufficient_quota"}}}, "permanent"),
        ({"status": 429}, "passing"),
        ({"status": 500}, "passing"),
        ({"status": 503}, "passing"),
        ({"close": True}, "passing"),
        ({"cut_off": True}, "passing"),
        ({"not_json": True}, "passing"),
        ({"wrong_count": True}, "passing"),
        ({"wrong_count": 1}, "passing"),
        ({"duplicate_index": True}, "passing"),
        ({"missing_index": True}, "passing"),
        ({"invalid_base64": True}, "passing"),
    ],
)
def test_a_fault_of_the_api_is_its_kind_of_trouble(
    api: FakeApi, model: Model, network: Network, fault: dict[str, Any], kind: Any
) -> None:
    api.behave(faults=[fault])

    with pytest.raises(Refused if kind is Refused else ProviderTrouble) as caught:
        openai.embed(Ask(model, TEXTS, 5), network)

    if isinstance(caught.value, ProviderTrouble):
        assert caught.value.permanent == (kind == "permanent")
    assert openai.embed(Ask(model, TEXTS, 5), network).vectors.shape == (3, 1536)


@pytest.mark.parametrize(("header", "low", "high"), [("retry_after", 7, 7), ("retry_after_date", 6, 8)])
def test_retry_after_reaches_the_trouble(
    api: FakeApi, model: Model, network: Network, header: str, low: float, high: float
) -> None:
    api.behave(faults=[{"status": 429, header: 7}])

    with pytest.raises(ProviderTrouble) as caught:
        openai.embed(Ask(model, ["a"], 5), network)

    assert caught.value.retry_after_seconds is not None
    assert low <= caught.value.retry_after_seconds <= high


def test_a_key_that_the_api_echoes_is_in_no_error(api: FakeApi, model: Model, network: Network) -> None:
    api.behave(faults=[{"echo_authorization": True}])

    with pytest.raises(ProviderTrouble, match="Bearer \\*\\*\\*") as caught:
        openai.embed(Ask(model, ["a"], 5), network)

    assert "sk-right" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-top\nsk-secret", "sk-top\u2026secret", "\ufeffsk-topsecret"])
def test_a_key_that_no_header_can_carry_is_trouble_to_mend_and_in_no_error(
    api: FakeApi, model: Model, network: Network, tmp_path: Path, key: str
) -> None:
    (tmp_path / "key").write_text(key)

    with pytest.raises(ProviderTrouble) as caught:
        openai.embed(Ask(model, ["a"], 5), network)

    assert "secret" not in str(caught.value)
    assert caught.value.permanent
    assert api.log() == []


def test_an_answer_of_another_success_than_200_is_no_answer(model: Model) -> None:
    class Accepting(Network):
        def post(self, *_: Any, **__: Any) -> Answer:
            return Answer(202, {}, b"")

    with pytest.raises(ProviderTrouble, match="the provider answered 202"):
        openai.embed(Ask(model, ["a"], 5), Accepting(1))


@pytest.mark.parametrize(("count", "dimensions"), [(1, 1), (2048, 3072)])
def test_the_bound_of_an_answer_leaves_room_for_the_longest_right_one(
    model: Model, count: int, dimensions: int
) -> None:
    bounds = []

    class Refusing(Network):
        def post(self, *_: Any, max_answer_bytes: int, **__: Any) -> Answer:
            bounds.append(max_answer_bytes)
            return Answer(500, {}, b"")

    with pytest.raises(ProviderTrouble):
        openai.embed(Ask(replace(model, dimensions=dimensions), ["a"] * count, 5), Refusing(1))

    longest_number = len("-1.2345678901234567e-123, ")
    assert bounds[0] > count * dimensions * longest_number
    assert bounds[0] < 300 << 20
