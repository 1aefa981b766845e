"""The provider function: what it makes of an SQL function's answer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autoembed.errors import Fault, ProviderTrouble, Refused, Trouble
from autoembed.model import Embedded, Model, Request
from autoembed.providers import function

MODEL = Model("mine", "function", "app.embed_texts", 2)


def binary(*numbers: float) -> bytes:
    """The binary form of vector_send()."""
    return struct.pack(f">hh{len(numbers)}f", len(numbers), 0, *numbers)


class Answering:
    """Calls no function: all have the same answer."""

    def __init__(self, *answer: bytes | None) -> None:
        self.answer = list(answer)

    def __call__(self, model: str, purpose: str, texts: Sequence[str], timeout_seconds: float) -> list[bytes | None]:
        self.arguments = (model, purpose, texts, timeout_seconds)
        return self.answer


def embed(call_embedder: Answering, texts: Sequence[str], purpose: Any = "document") -> Embedded:
    return function.embed(Request(MODEL, texts, 5, purpose), call_embedder)


@pytest.mark.parametrize("purpose", ["document", "query"])
def test_the_vectors_are_the_functions_in_its_order(purpose: str) -> None:
    call_embedder = Answering(binary(1, 2), binary(-0.5, 1e-30))

    embedded = embed(call_embedder, ["a", "b"], purpose)

    assert embedded.vectors.tolist() == [[1, 2], [-0.5, pytest.approx(1e-30)]]
    assert embedded.vectors.dtype == np.float32
    assert embedded.tokens is None
    assert call_embedder.arguments == ("mine", purpose, ["a", "b"], 5)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ([], Refused, "returned 0 vectors for 2 texts"),
        ([binary(1, 2)], Refused, "returned 1 vectors for 2 texts"),
        ([binary(1, 2)] * 3, Refused, "returned 3 vectors for 2 texts"),
        ([binary(1, 2), None], Refused, "returned NULL in place of a vector"),
        ([binary(1, 2, 3)] * 2, ProviderTrouble, "have 3 dimensions, the model is defined with 2"),
        ([binary(1, 2), binary(1)], ProviderTrouble, "have 1 dimensions, the model is defined with 2"),
    ],
)
def test_an_answer_that_does_not_fit_is_trouble(answer: list[bytes | None], kind: type[Trouble], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        embed(Answering(*answer), ["a", "b"])

    assert getattr(caught.value, "permanent", None) is (True if kind is ProviderTrouble else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key": "env:KEY"}, "takes no api_key"),
        ({"base_url": "https://h"}, "takes no base_url"),
        ({"options": {"query": "app.f"}}, "the option query,"),
        ({"options": {"query_function": 5}}, "option query_function .* is not a text"),
    ],
)
def test_a_definition_that_cannot_work_is_the_callers_mistake(changes: dict[str, Any], message: str) -> None:
    function.check(replace(MODEL, options={"query_function": "app.f"}))

    with pytest.raises(Fault, match=message):
        function.check(replace(MODEL, **changes))
