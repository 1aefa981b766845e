"""The rerank models' providers: what each sends, and how it reads every answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple

import pytest

from autoembed import rerankers
from autoembed.errors import Fault, ProviderTrouble, Trouble
from autoembed.model import Model, Request, Reranked
from autoembed.network import HttpAnswer, Network
from autoembed.rerankers import RERANKERS, function, reranker_of, shortened
from autoembed.rerankers.scores import finite
from fake_api import FakeApi, relevance_of, tokens_in

QUERY = "red apple"
PASSAGES = ["a green apple", "Grüße, 世界 🦊", "an apple that is red"]
SCORES = [0.5, 0.0, 1.0]
RIGHT = [(2, 0.9), (0, 0.4), (1, -3.5)]


def results(pairs: Sequence[tuple[Any, Any]], name: str = "relevance_score") -> list[dict[str, Any]]:
    return [{"index": index, name: score} for index, score in pairs]


class Case(NamedTuple):
    """The facts of one provider."""

    model: Model
    base_path: str  # of its base_url, below the tenant of the fake API
    endpoint: str  # below that
    body: dict[str, Any]  # of a request with QUERY and PASSAGES
    answer: Callable[[Sequence[tuple[Any, Any]]], Any]  # with these indexes and scores
    counts_tokens: bool


CASES = {
    "cohere": Case(
        Model("best", "cohere", "rerank-v3.5", 0),
        "",
        "/v2/rerank",
        {"model": "rerank-v3.5", "query": QUERY, "documents": PASSAGES, "top_n": 3},
        lambda pairs: {"results": results(pairs), "meta": {"billed_units": {"search_units": 1}}},
        False,
    ),
    "voyage": Case(
        Model("best", "voyage", "rerank-2.5", 0),
        "/voyage/v1",
        "/rerank",
        {"model": "rerank-2.5", "query": QUERY, "documents": PASSAGES, "truncation": True},
        lambda pairs: {"object": "list", "data": results(pairs), "usage": {"total_tokens": 7}},
        True,
    ),
    "jina": Case(
        Model("best", "jina", "jina-reranker-v2", 0),
        "/v1",
        "/rerank",
        {
            "model": "jina-reranker-v2",
            "query": QUERY,
            "documents": PASSAGES,
            "top_n": 3,
            "return_documents": False,
        },
        lambda pairs: {"results": results(pairs), "usage": {"total_tokens": 7}},
        True,
    ),
    "tei": Case(
        Model("best", "tei", "any", 0),
        "/tei",
        "/rerank",
        {"query": QUERY, "texts": PASSAGES, "truncate": True},
        lambda pairs: results(pairs, "score"),
        False,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def model(case: Case, api: FakeApi, key: str) -> Model:
    return replace(case.model, base_url=api.root + case.base_path, api_key=key)


def rerank(model: Model, network: Network, passages: Sequence[str] = PASSAGES, seconds: float = 5) -> Reranked:
    request = Request(model, passages, seconds, purpose="rerank", query=QUERY)
    return rerankers.rerank(request, network, lambda *_: [])


class Answering(Network):
    """Gives every request the same answer, and keeps what the last one was."""

    def __init__(self, answer: Any) -> None:
        super().__init__(1)
        self.answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    def post(self, url: str, headers: Any, body: bytes, **limits: Any) -> HttpAnswer:
        self.url, self.sent, self.limits = url, json.loads(body), limits
        return HttpAnswer(200, {}, self.answer)


def test_every_provider_has_its_name() -> None:
    assert {name: reranker.__name__ for name, reranker in RERANKERS.items()} == {  # type: ignore[attr-defined]
        name: f"autoembed.rerankers.{name}" for name in (*CASES, "function")
    }


# --- what it sends -----------------------------------------------------------------------------------


def test_a_request_has_the_fields_of_the_api_reference(case: Case) -> None:
    network = Answering(case.answer(RIGHT))

    rerank(replace(case.model, base_url="https://host/path/"), network)

    assert network.sent == case.body
    assert network.url == f"https://host/path{case.endpoint}"


def test_the_scores_come_in_the_order_of_the_passages(case: Case, model: Model, api: FakeApi, network: Network) -> None:
    answer = rerank(model, network)

    assert answer.scores == SCORES == [float(relevance_of(QUERY, passage)[0]) for passage in PASSAGES]
    assert answer.tokens == (sum(map(tokens_in, PASSAGES)) if case.counts_tokens else None)
    [request] = api.log()
    assert request["path"] == f"/{api.tenant}{case.base_path}{case.endpoint}"
    assert request["key_sha256"] == sha256(b"sk-right").hexdigest()
    assert request["texts"] == PASSAGES


def test_extra_headers_and_extra_body_are_sent(case: Case) -> None:
    network = Answering(case.answer(RIGHT))

    rerank(replace(case.model, base_url="https://h", options={"extra_body": {"max_tokens_per_doc": 100}}), network)

    assert network.sent == {**case.body, "max_tokens_per_doc": 100}


# --- what it reads -----------------------------------------------------------------------------------

NUMBERED = "does not number its scores from 0 to 2, each once"
NOT_FINITE = "a score that is not a finite number"


def test_negative_scores_and_whole_ones_are_scores(case: Case) -> None:
    answer = rerank(replace(case.model, base_url="https://h"), Answering(case.answer([(2, 1), (0, -11.5), (1, 0)])))

    assert answer.scores == [-11.5, 0.0, 1.0]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "answered with 0 scores for 3 passages"),
        (RIGHT[:2], "answered with 2 scores for 3 passages"),
        ([*RIGHT, (3, 0.1)], "answered with 4 scores for 3 passages"),
        ([*RIGHT, (0, 0.1)], "answered with 4 scores for 3 passages"),
        ([(0, 0.5), (1, 0.5), (3, 0.5)], NUMBERED),
        ([(0, 0.5), (1, 0.5), (-1, 0.5)], NUMBERED),
        ([(0, 0.5), (1, 0.5), (1, 0.5)], NUMBERED),
        ([(0, 0.5), (1, 0.5), (None, 0.5)], NUMBERED),
        ([(0, 0.5), (1, 0.5), ("2", 0.5)], NUMBERED),
        ([(0, 0.5), (True, 0.5), (2, 0.5)], NUMBERED),
        ([(0, 0.5), (1.0, 0.5), (2, 0.5)], NUMBERED),
        ([(0, 0.5), (1, 0.5), ([2], 0.5)], NUMBERED),
        ([(0, 0.5), (1, 0.5), (10**30, 0.5)], NUMBERED),
        ([(0, 0.5), (1, 0.5), (2, None)], NOT_FINITE),
        ([(0, 0.5), (1, 0.5), (2, True)], NOT_FINITE),
        ([(0, 0.5), (1, 0.5), (2, "0.5")], NOT_FINITE),
        ([(0, 0.5), (1, 0.5), (2, [0.5])], NOT_FINITE),
        ([(0, 0.5), (1, 0.5), (2, float("nan"))], NOT_FINITE),
        ([(0, 0.5), (1, 0.5), (2, float("inf"))], NOT_FINITE),
        ([(0, 0.5), (1, 0.5), (2, 10**400)], NOT_FINITE),
    ],
)
def test_an_answer_that_does_not_fit_is_trouble(case: Case, pairs: list[tuple[Any, Any]], message: str) -> None:
    with pytest.raises(ProviderTrouble, match=message):
        rerank(replace(case.model, base_url="https://h"), Answering(case.answer(pairs)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "not in the form of the .* API"),
        (b"", "not in the form of the .* API"),
        (b"[" * 100_000, "not in the form of the .* API"),
        ("words", "not in the form of the .* API"),
        (5, "not in the form of the .* API"),
        (None, "not in the form of the .* API"),
        ({"results": 5, "data": 5}, "not in the form of the .* API"),
        ({"results": [5], "data": [5]}, "not in the form of the .* API"),
        ([[0, 0.5]], "not in the form of the .* API"),
        ([{"index": 0}], "not in the form of the .* API"),
        ({"error": {"message": "out of order"}}, "answered with an error: out of order"),
    ],
)
def test_an_answer_in_another_form_is_trouble(case: Case, answer: Any, message: str) -> None:
    with pytest.raises(ProviderTrouble, match=message):
        rerank(replace(case.model, base_url="https://h"), Answering(answer))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"nan": True}, NOT_FINITE),
        ({"infinity": True}, NOT_FINITE),
        ({"wrong_count": True}, "2 scores for 3 passages"),
        ({"wrong_count": 2}, "5 scores for 3 passages"),
        ({"duplicate_index": True}, NUMBERED),
        ({"missing_index": True}, "not in the form of the .* API .it lacks 'index'"),
        ({"not_json": True}, "not in the form of the .* API"),
        ({"cut_off": True}, "no answer from|not in the form"),
        ({"close": True}, "no answer from"),
        ({"big_body": 9 << 20}, "larger than 8 MiB"),
        ({"gzip_body": 9 << 20}, "larger than 8 MiB"),
        ({"redirect": "http://127.0.0.1:9/"}, "a redirect, which is not followed"),
        ({"status": 401}, "the provider answered 401"),
        ({"status": 503}, "the provider answered 503"),
        ({"echo_authorization": True}, r": \*\*\*$"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fault_of_the_provider_is_trouble(
    model: Model, api: FakeApi, network: Network, fault: dict[str, Any], message: str
) -> None:
    api.behave(faults=[fault])

    with pytest.raises(Trouble, match=message) as caught:
        rerank(model, network)

    assert "sk-right" not in str(caught.value)
    assert rerank(model, network).scores == SCORES


def test_shuffled_results_are_right(model: Model, api: FakeApi, network: Network) -> None:
    api.behave(faults=[{"shuffled": True}])

    assert rerank(model, network).scores == SCORES


@pytest.mark.parametrize("fault", [{"hang": True}, {"slow_body": 30}])
def test_an_answer_that_is_late_is_trouble(model: Model, api: FakeApi, network: Network, fault: dict[str, Any]) -> None:
    api.behave(faults=[fault])

    with pytest.raises(ProviderTrouble, match=r"did not answer within 0.3 s|was not complete after 0.3 s"):
        rerank(model, network, seconds=0.3)


# --- a definition ------------------------------------------------------------------------------------


def test_a_server_of_ones_own_needs_no_key(case: Case) -> None:
    rerankers.check(replace(case.model, base_url="http://127.0.0.1:8080"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "host:8000"}, "not an http or https URL"),
        ({"base_url": "http://elsewhere.example"}, "http"),
        ({"model_id": " "}, "blank model_id"),
        ({"options": {"top_n": 5}}, "the option top_n"),
        ({"options": {"extra_headers": {"Authorization": "Bearer sk"}}}, "would keep a secret in a table"),
        ({"provider": "openai"}, 'names the provider "openai", which reranks nothing'),
        ({"provider": "acme"}, 'names the provider "acme", which reranks nothing'),
    ],
)
def test_a_definition_that_cannot_work_is_the_callers_mistake(
    case: Case, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Fault, match=message) as caught:
        rerankers.check(replace(case.model, **{"base_url": "https://host", **changes}))

    assert caught.value.hint


@pytest.mark.parametrize("name", CASES)
def test_a_model_without_an_address_needs_a_key_or_an_address(name: str, key: str) -> None:
    with pytest.raises(Fault, match="has no base_url" if name == "tei" else "has no api_key"):
        rerankers.check(CASES[name].model)
    if name != "tei":
        rerankers.check(replace(CASES[name].model, api_key=key))


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        ({}, "500 tokens"),
        ({"max_tokens_per_input": 50}, "50 tokens"),
        ({"max_tokens_per_request": 300}, "100 tokens less those of the query"),
        ({"max_tokens_per_request": 1}, "a token"),
    ],
)
def test_passages_are_shortened_to_what_the_model_takes(limits: dict[str, Any], lengths: str) -> None:
    model = replace(CASES["jina"].model, **limits)
    long = "ab " * 10_000

    first, *rest = shortened(model, QUERY, [long, "short", "words"])

    assert long.startswith(first)
    if limits.get("max_tokens_per_request") != 1:
        assert rest == ["short", "words"]
    expected = {"500 tokens": 498, "50 tokens": 48, "100 tokens less those of the query": 93, "a token": 1}[lengths]
    assert len(first.split()) == pytest.approx(expected, abs=5)


# --- an SQL function ---------------------------------------------------------------------------------

MINE = Model("mine", "function", "app.relevance", 0)


class Calling:
    """Calls no function: all have the same answer."""

    def __init__(self, *scores: float | None) -> None:
        self.scores = list(scores)

    def __call__(self, *arguments: Any) -> list[float | None]:
        self.arguments = arguments
        return self.scores


def called(call: Calling) -> Reranked:
    request = Request(MINE, PASSAGES, 2.0, purpose="rerank", query=QUERY)
    return rerankers.rerank(request, Network(1), call)


def test_the_scores_are_the_functions() -> None:
    call = Calling(0.5, -1.0, 2.0)

    assert called(call).scores == [0.5, -1.0, 2.0]
    assert call.arguments == ("mine", QUERY, PASSAGES, 2.0)
    assert reranker_of(MINE) is function


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "returned 0 scores for 3 passages"),
        ([1.0, 2.0], "returned 2 scores for 3 passages"),
        ([1.0, 2.0, 3.0, 4.0], "returned more scores for 3 passages"),
        ([1.0, None, 3.0], NOT_FINITE),
        ([1.0, float("nan"), 3.0], NOT_FINITE),
        ([1.0, float("-inf"), 3.0], NOT_FINITE),
    ],
)
def test_scores_of_a_function_that_do_not_fit_are_trouble(scores: list[float | None], message: str) -> None:
    with pytest.raises(Trouble, match=message):
        called(Calling(*scores))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key": "env:KEY"}, "takes no api_key"),
        ({"base_url": "https://h"}, "takes no base_url"),
        ({"options": {"query_function": "app.f"}}, "the option query_function"),
    ],
)
def test_a_function_takes_nothing_of_a_provider_elsewhere(changes: dict[str, Any], message: str) -> None:
    rerankers.check(MINE)

    with pytest.raises(Fault, match=message):
        rerankers.check(replace(MINE, **changes))


def test_finite_scores_are_floats() -> None:
    assert finite([1, 0.5, -(10**20)]) == [1.0, 0.5, -1e20]
