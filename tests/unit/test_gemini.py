"""The provider gemini: one request a text, unit length, and a delay in the body."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autoembed.errors import ProviderTrouble
from autoembed.model import Model, Request
from autoembed.network import Network
from autoembed.providers import gemini
from fake_api import FakeApi

MODEL = Model("ge", "gemini", "gemini-embedding-001", 256)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


@pytest.mark.parametrize(("purpose", "task"), [("document", "RETRIEVAL_DOCUMENT"), ("query", "RETRIEVAL_QUERY")])
@pytest.mark.parametrize("model_id", ["gemini-embedding-001", "models/gemini-embedding-001"])
def test_a_request_has_the_fields_of_the_api_reference(purpose: Any, task: str, model_id: str) -> None:
    settings = {"model": "models/gemini-embedding-001", "outputDimensionality": 256, "taskType": task}

    assert gemini.request_body(Request(replace(MODEL, model_id=model_id), ["a", "b"], 5, purpose)) == {
        "requests": [
            {**settings, "content": {"parts": [{"text": "a"}]}},
            {**settings, "content": {"parts": [{"text": "b"}]}},
        ]
    }


def test_a_model_that_reads_its_task_in_the_text_is_sent_it_there() -> None:
    model = replace(MODEL, model_id="gemini-embedding-2", options={"query_prefix": "task: search result | query: "})

    (request,) = gemini.request_body(Request(model, ["a"], 5, "query"))["requests"]

    assert request["content"] == {"parts": [{"text": "task: search result | query: a"}]}
    assert "taskType" not in request


@pytest.mark.parametrize("model_id", ["gemini-embedding-001", "models/gemini-embedding-001", "gemini-embedding-2"])
def test_a_request_names_the_model_in_its_path_too(api: FakeApi, key: str, network: Network, model_id: str) -> None:
    model = replace(MODEL, model_id=model_id, base_url=f"{api.root}/v1beta", api_key=key)

    gemini.embed(Request(model, TEXTS, 5, "query"), network)

    (request,) = api.log()
    name = model_id.removeprefix("models/")
    assert request["path"] == f"/{api.tenant}/v1beta/models/{name}:batchEmbedContents"
    assert request["texts"] == TEXTS


def test_vectors_are_brought_to_unit_length() -> None:
    values = [{"values": vector} for vector in ([3, 4], [0, 1], [1e38, 1e38])]

    vectors = gemini.embedded_in(json.dumps({"embeddings": values}).encode(), 3, 2).vectors

    assert vectors.dtype == np.float32
    assert vectors.tolist() == [
        pytest.approx([0.6, 0.8]),
        [0, 1],
        pytest.approx([0.5**0.5, 0.5**0.5]),
    ]


@pytest.mark.parametrize(
    ("status", "headers", "delay", "seconds"),
    [
        (429, {}, "34s", 34.0),
        (429, {}, "34.074824224s", 34.074824224),
        (429, {"retry-after": "7"}, "34s", 7.0),
        (429, {}, "soon", None),
        (503, {}, "34s", None),
    ],
)
def test_when_to_come_back_is_read_from_the_body(
    status: int, headers: dict[str, str], delay: str, seconds: float | None
) -> None:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}
    trouble = gemini.trouble_of(status, headers, json.dumps({"error": {"details": [info]}}).encode())

    assert isinstance(trouble, ProviderTrouble)
    assert trouble.retry_after_seconds == seconds
