"""The fields that servers of OpenAI's protocol may refuse: done without, found out once, never forgotten too soon."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from autoembed.errors import ProviderTrouble, Refused
from autoembed.model import Model, Request
from autoembed.network import HttpAnswer, Network
from autoembed.providers import azure, openai

MODEL = Model("own", "openai", "some-model", 2, base_url="https://embeddings.example/v1")
ANSWER = json.dumps({"data": [{"index": 0, "embedding": [1, 2]}], "usage": {"total_tokens": 1}}).encode()

Fields = dict[str, Any]


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_refused", {})


class Server(Network):
    """Answers each request by a function of its fields: None for the right answer, else the error's body."""

    def __init__(self, error: Callable[[Fields], Any], status: int = 400, answer: bytes = ANSWER) -> None:
        super().__init__(1)
        self.error = error
        self.status = status
        self.answer = answer
        self.requests: list[Fields] = []

    def post(self, url: str, headers: Any, body: bytes, **_: Any) -> HttpAnswer:
        self.requests.append(json.loads(body))
        error = self.error(self.requests[-1])
        return (
            HttpAnswer(200, {}, self.answer)
            if error is None
            else HttpAnswer(self.status, {}, json.dumps(error).encode())
        )

    @property
    def fields(self) -> list[set[str]]:
        return [request.keys() - {"model", "input"} for request in self.requests]


def embed(server: Server, model: Model = MODEL) -> list[list[float]]:
    vectors: list[list[float]] = openai.embed(Request(model, ["a"], 5), server).vectors.tolist()
    return vectors


REFUSALS = [
    (400, {"error": {"message": "This model does not support specifying dimensions."}}, "dimensions"),
    (400, {"error": {"message": "Unknown parameter.", "param": "dimensions"}}, "dimensions"),
    (400, {"message": 'Model "m" does not support matryoshka, changing output dimensions is bad.'}, "dimensions"),
    (422, {"detail": [{"loc": ["body", "dimensions"], "msg": "Extra inputs are not permitted"}]}, "dimensions"),
    (400, {"error": {"message": "encoding_format 'base64' is not supported."}}, "encoding_format"),
    (422, {"detail": [{"loc": ["body", "encoding_format"], "msg": "Must be 'float'"}]}, "encoding_format"),
]


@pytest.mark.parametrize(("status", "error", "field"), REFUSALS)
def test_a_field_that_is_refused_is_done_without_and_not_tried_again(status: int, error: Any, field: str) -> None:
    server = Server(lambda fields: error if field in fields else None, status)

    assert embed(server) == embed(server) == [[1, 2]]

    [other] = {"dimensions", "encoding_format"} - {field}
    assert server.fields == [{"dimensions", "encoding_format"}, {other}, {other}]


def test_both_fields_may_be_refused_one_after_the_other() -> None:
    def error(fields: Fields) -> Any:
        refused = [name for name in ("dimensions", "encoding_format") if name in fields]
        return {"error": {"message": f"{refused[0]} is not known"}} if refused else None

    server = Server(error)

    assert embed(server) == embed(server) == [[1, 2]]
    assert server.fields == [{"dimensions", "encoding_format"}, {"encoding_format"}, set(), set()]


def test_what_one_model_is_refused_another_is_asked_with() -> None:
    server = Server(lambda fields: REFUSALS[0][1] if "dimensions" in fields else None)
    embed(server)
    server.error = lambda _: None

    embed(server, replace(MODEL, model_id="another"))
    embed(server, replace(MODEL, base_url="https://another.example/v1"))

    assert ["dimensions" in fields for fields in server.fields] == [True, False, True, True]


def test_a_text_whose_refusal_names_a_field_stays_refused_and_nothing_is_remembered() -> None:
    server = Server(lambda _: {"error": {"message": "Your text about dimensions is too long."}})

    with pytest.raises(Refused, match="too long"):
        embed(server)
    server.error = lambda _: None
    embed(server)

    assert server.fields[-1] == {"dimensions", "encoding_format"}
    assert len(server.requests) == 3


def test_the_refusal_stands_where_the_answer_without_the_field_is_of_no_use() -> None:
    server = Server(lambda fields: REFUSALS[0][1] if "dimensions" in fields else None)

    for _ in range(2):
        with pytest.raises(Refused, match="does not support specifying dimensions"):
            embed(server, replace(MODEL, dimensions=1))

    assert ["dimensions" in fields for fields in server.fields] == [True, False, True, False]


def test_trouble_that_passes_is_told_as_it_is() -> None:
    def error(fields: Fields) -> Any:
        server.status = 400 if "dimensions" in fields else 429
        return REFUSALS[0][1]

    server = Server(error)

    with pytest.raises(ProviderTrouble, match="429"):
        embed(server)


def test_a_refusal_that_names_no_field_is_not_asked_again() -> None:
    server = Server(lambda _: {"error": {"message": "No."}})

    with pytest.raises(Refused, match="No"):
        embed(server)

    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 429, 500])
def test_trouble_of_another_kind_that_names_a_field_is_not_asked_again(status: int) -> None:
    server = Server(lambda _: REFUSALS[0][1], status)

    with pytest.raises(ProviderTrouble):
        embed(server)

    assert len(server.requests) == 1


def test_a_field_that_the_model_asks_for_itself_is_not_left_out() -> None:
    server = Server(lambda fields: REFUSALS[0][1] if "dimensions" in fields else None)

    with pytest.raises(Refused, match="specifying dimensions"):
        embed(server, replace(MODEL, options={"extra_body": {"dimensions": 2}}))

    assert len(server.requests) == 1


def test_azure_does_without_them_too() -> None:
    server = Server(lambda fields: REFUSALS[0][1] if "dimensions" in fields else None)
    model = replace(MODEL, provider="azure", base_url="https://name.openai.azure.example")

    for _ in range(2):
        azure.embed(Request(model, ["a"], 5), server)

    assert ["dimensions" in fields for fields in server.fields] == [True, False, False]
