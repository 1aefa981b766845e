"""The provider ollama: its own endpoint and fields, and texts shortened by the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autoembed.model import Model, Request
from autoembed.network import Network
from autoembed.providers import ollama
from fake_api import FakeApi

MODEL = Model("ol", "ollama", "nomic-embed-text", 256)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


@pytest.mark.parametrize("purpose", ["document", "query"])
def test_a_request_has_the_fields_of_the_api_reference(purpose: Any) -> None:
    assert ollama.request_body(Request(MODEL, TEXTS, 5, purpose)) == {
        "model": "nomic-embed-text",
        "input": TEXTS,
        "dimensions": 256,
        "truncate": True,
    }


def test_extra_body_reaches_the_native_endpoint(api: FakeApi, key: str, network: Network) -> None:
    model = replace(MODEL, base_url=api.root, api_key=key, options={"extra_body": {"keep_alive": "10m"}})

    ollama.embed(Request(model, ["a"], 5), network)

    (request,) = api.log()
    assert request["path"] == f"/{api.tenant}/api/embed"
    assert request["settings"]["keep_alive"] == "10m"


def test_a_long_text_is_shortened_by_the_model(api: FakeApi, network: Network) -> None:
    assert ollama.embed(Request(replace(MODEL, base_url=api.root), ["a" * 100_000], 5), network).tokens == 2048
