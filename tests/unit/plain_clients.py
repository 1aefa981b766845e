"""Plain clients of the fake API, one a protocol: what they send and where they find what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import requests

from fake_api import FakeApi, Vector

MODEL = "text-embedding-3-small"


def ask(session: requests.Session, api: FakeApi, texts: Any, **fields: Any) -> requests.Response:
    body = {"model": MODEL, "input": texts, **fields}
    return session.post(f"{api.base_url}/embeddings", json=body, timeout=10)


def vectors(answer: requests.Response) -> list[Vector]:
    return [np.array(item["embedding"], np.float32) for item in answer.json()["data"]]


def error(answer: requests.Response) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    return found


def raw(api: FakeApi, texts: list[str]) -> dict[str, Any]:
    """The arguments of a request that shares no connection."""
    headers = {"Authorization": "Bearer sk-right"}
    return {"url": f"{api.base_url}/embeddings", "json": {"model": MODEL, "input": texts}, "headers": headers}


def openai_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    return {"input": texts, **fields}


def cohere_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    return {"model": "embed-v4.0", "texts": texts, "input_type": "search_query", "truncate": "NONE", **fields}


def voyage_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    return {"model": "voyage-4", "input": texts, "truncation": False, **fields}


def gemini_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    settings = {"model": "models/gemini-embedding-001", **fields}
    return {"requests": [{**settings, "content": {"parts": [{"text": text}]}} for text in texts]}


def ollama_body(texts: list[str], **fields: Any) -> dict[str, Any]:
    return {"model": "nomic-embed-text", "input": texts, "truncate": False, **fields}


class Other(NamedTuple):
    """One of the other protocols, as a plain client speaks it."""

    path: str
    key: dict[str, str]
    body: Callable[..., dict[str, Any]]
    model: str
    full: int
    vectors: Callable[[Any], list[Any]]
    tokens: Callable[[Any], int]
    message: Callable[[Any], str]

    def ask(self, api: FakeApi, body: Any, key: dict[str, str] | None = None, path: str = "") -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False
            headers = self.key if key is None else key
            return session.post(api.root + (path or self.path), json=body, headers=headers, timeout=10)


BEARER = {"Authorization": "Bearer sk-right"}
AZURE_PATH = "/openai/deployments/text-embedding-3-small/embeddings?api-version=2024-10-21"
OTHERS = {
    "azure": Other(
        AZURE_PATH,
        {"api-key": "sk-right"},
        openai_body,
        MODEL,
        1536,
        lambda answer: [item["embedding"] for item in answer["data"]],
        lambda answer: answer["usage"]["total_tokens"],
        lambda answer: answer["error"]["message"],
    ),
    "cohere": Other(
        "/v2/embed",
        BEARER,
        cohere_body,
        "embed-v4.0",
        1536,
        lambda answer: answer["embeddings"]["float"],
        lambda answer: answer["meta"]["billed_units"]["input_tokens"],
        lambda answer: answer["message"],
    ),
    "voyage": Other(
        "/voyage/v1/embeddings",
        BEARER,
        voyage_body,
        "voyage-4",
        1024,
        lambda answer: [item["embedding"] for item in answer["data"]],
        lambda answer: answer["usage"]["total_tokens"],
        lambda answer: answer["detail"],
    ),
    "gemini": Other(
        "/v1beta/models/gemini-embedding-001:batchEmbedContents",
        {"x-goog-api-key": "sk-right"},
        gemini_body,
        "gemini-embedding-001",
        3072,
        lambda answer: [embedding["values"] for embedding in answer["embeddings"]],
        lambda answer: answer["usageMetadata"]["promptTokenCount"],
        lambda answer: answer["error"]["message"],
    ),
    "ollama": Other(
        "/api/embed",
        BEARER,
        ollama_body,
        "nomic-embed-text",
        768,
        lambda answer: answer["embeddings"],
        lambda answer: answer["prompt_eval_count"],
        lambda answer: answer["error"],
    ),
}
