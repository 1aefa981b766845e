"""The provider voyage: the fields it sends, by purpose and model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autoembed.model import Model, Request
from autoembed.network import Network
from autoembed.providers import voyage
from fake_api import FakeApi

MODEL = Model("vo", "voyage", "voyage-4", 256)
OLD = replace(MODEL, model_id="voyage-law-2", dimensions=1024, max_tokens_per_input=16_000)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


@pytest.mark.parametrize("purpose", ["document", "query"])
def test_a_request_has_the_fields_of_the_api_reference(purpose: Any) -> None:
    assert voyage.request_body(Request(MODEL, TEXTS, 5, purpose)) == {
        "model": "voyage-4",
        "input": TEXTS,
        "input_type": purpose,
        "encoding_format": "base64",
        "truncation": False,
        "output_dimension": 256,
    }


def test_an_old_model_is_asked_without_dimensions(api: FakeApi, key: str, network: Network) -> None:
    old = replace(OLD, base_url=api.root + "/voyage/v1", api_key=key)

    assert voyage.embed(Request(old, TEXTS, 5, "query"), network).vectors.shape == (3, 1024)
    assert api.log()[0]["settings"]["input_type"] == "query"
