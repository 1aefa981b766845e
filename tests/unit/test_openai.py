"""The provider openai: the fields it sends, and the forms of embeddings it reads."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed.errors import ProviderTrouble, Refused
from autoembed.model import Model, Request
from autoembed.providers import http, openai

SMALL = Model("small", "openai", "text-embedding-3-small", 1536)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


# --- what it sends -----------------------------------------------------------------------------------


def test_a_request_has_the_fields_of_the_api_reference() -> None:
    assert json.loads(http.encode(openai.request_body(Request(replace(SMALL, dimensions=256), TEXTS, 5)))) == {
        "model": "text-embedding-3-small",
        "input": TEXTS,
        "encoding_format": "base64",
        "dimensions": 256,
    }


@given(st.lists(st.text(), min_size=1))
def test_texts_arrive_as_they_are(texts: list[str]) -> None:
    assert json.loads(http.encode(openai.request_body(Request(SMALL, texts, 5))))["input"] == texts


def test_half_a_surrogate_pair_breaks_no_request() -> None:
    assert json.loads(http.encode(openai.request_body(Request(SMALL, ["a\ud83eb"], 5))))["input"] == ["a?b"]


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
        # Without indexes, or without some.
        answer([1, 2], [3, 4], [5, 6], indexes=[None, None, None]),
        answer([1, 2], [3, 4], [5, 6], indexes=[None, 1, 2]),
        answer([1, 2], [5, 6], [3, 4], indexes=[None, 2, 1]),
        b'{"data": [{"embedding": [1, 2]}, {"embedding": [3, 4]}, {"embedding": [5, 6]}]}',
        b'{"data": [{"embedding": [1, 2]}, {"embedding": [3, 4], "index": 1}, {"embedding": [5, 6], "index": 2}]}',
        b'{"error": null, "data": [{"embedding": [1, 2], "x": 2}, {"embedding": [3, 4]}, {"embedding": [5, 6]}]}',
    ],
)
def test_vectors_come_in_the_order_of_the_texts(body: bytes) -> None:
    vectors = openai.embedded_in(body, 3, 2).vectors

    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1, 2], [3, 4], [5, 6]]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1).filter(
        lambda numbers: max(map(abs, numbers)) > 1e-15
    )
)
def test_base64_and_numbers_give_the_same_vector(numbers: list[float]) -> None:
    by_base64 = openai.embedded_in(answer(packed(*numbers)), 1, len(numbers)).vectors
    by_numbers = openai.embedded_in(answer(numbers), 1, len(numbers)).vectors

    assert by_base64.tolist() == by_numbers.tolist() == [numbers]


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": [{"index": 0}]}',
        b'{"data": [{"index": [0], "embedding": [1, 2]}]}',
        answer(packed(1, 2) + "\n?"),
    ],
)
def test_an_item_in_another_form_is_the_providers_trouble(body: bytes) -> None:
    with pytest.raises(ProviderTrouble, match="not in the form of the OpenAI API") as caught:
        openai.embedded_in(body, 1, 2)

    assert not caught.value.permanent


@pytest.mark.parametrize(
    "body",
    [
        answer([1, 2], [3, 4], indexes=[0, 0]),
        answer([1, 2], [3, 4], indexes=[1, None]),
        answer([1, 2], [3, 4], indexes=[1, 2]),
        answer([1, 2], [3, 4], indexes=[-1, 0]),
        answer([1, 2], [3, 4], indexes=["0", "1"]),
    ],
)
def test_every_text_must_have_exactly_one_index(body: bytes) -> None:
    with pytest.raises(ProviderTrouble, match="does not number its vectors from 0 to 1, each once") as caught:
        openai.embedded_in(body, 2, 2)

    assert not caught.value.permanent


def test_a_base64_vector_of_other_dimensions_needs_somebody_to_act() -> None:
    with pytest.raises(ProviderTrouble, match="vectors have 3 dimensions, the model is defined with 2") as caught:
        openai.embedded_in(answer([1, 2], packed(1, 2, 3)), 2, 2)

    assert caught.value.permanent


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_base64_vector_that_is_not_finite_is_its_texts_fault(number: float) -> None:
    with pytest.raises(Refused, match="not finite"):
        openai.embedded_in(answer([1, 2], packed(1, number)), 2, 2)
