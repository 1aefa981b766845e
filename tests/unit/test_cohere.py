"""The provider cohere: the fields it sends, by purpose and model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autoembed.model import Model, Request
from autoembed.network import Network
from autoembed.providers import cohere
from fake_api import FakeApi

MODEL = Model("co", "cohere", "embed-v4.0", 256)
OLD = replace(MODEL, model_id="embed-english-v3.0", dimensions=1024, max_tokens_per_input=512)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


@pytest.mark.parametrize(("purpose", "input_type"), [("document", "search_document"), ("query", "search_query")])
def test_a_request_has_the_fields_of_the_api_reference(purpose: Any, input_type: str) -> None:
    assert cohere.request_body(Request(MODEL, TEXTS, 5, purpose)) == {
        "model": "embed-v4.0",
        "texts": TEXTS,
        "input_type": input_type,
        "embedding_types": ["float"],
        "truncate": "NONE",
        "output_dimension": 256,
    }


def test_an_old_model_is_asked_without_dimensions(api: FakeApi, key: str, network: Network) -> None:
    old = replace(OLD, base_url=api.root, api_key=key)

    assert cohere.embed(Request(old, TEXTS, 5, "query"), network).vectors.shape == (3, 1024)
    assert api.log()[0]["settings"]["input_type"] == "search_query"
