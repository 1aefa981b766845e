"""The prefixes that tell documents from queries: which texts get which, and what another one changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoembed.model import Model, Request, prefixed
from autoembed.network import Network
from autoembed.onnx_model import Computed
from autoembed.providers import local
from unit.fakes import identified

MODEL = Model("ol", "ollama", "nomic-embed-text", 256)
PREFIXES = {"document_prefix": "search_document: ", "query_prefix": "search_query: "}


@pytest.mark.parametrize(
    ("options", "purpose", "expected"),
    [
        ({}, "document", ["a", ""]),
        ({}, "query", ["a", ""]),
        (PREFIXES, "document", ["search_document: a", "search_document: "]),
        (PREFIXES, "query", ["search_query: a", "search_query: "]),
        ({"query_prefix": "q: "}, "document", ["a", ""]),
        ({"query_prefix": "q: "}, "query", ["q: a", "q: "]),
    ],
)
def test_a_text_is_prefixed_by_its_purpose(options: dict[str, str], purpose: Any, expected: list[str]) -> None:
    assert prefixed(Request(replace(MODEL, options=options), ["a", ""], 5, purpose)) == expected


def test_the_local_model_embeds_prefixed_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    embedded = []

    class Recording:
        def embed(self, texts: list[str], between_batches: Any) -> Computed:
            embedded.extend(texts)
            return Computed(np.ones((len(texts), 256), np.float32), tokens=[3] * len(texts), cut=frozenset())

    for name in ("model.onnx", "tokenizer.json"):
        (tmp_path / name).touch()
    model = replace(MODEL, provider="local", base_url=str(tmp_path), options=PREFIXES)
    monkeypatch.setattr(local, "_onnx_model", lambda _: Recording())

    local.check(model)
    local.embed(Request(model, ["a"], 5, "query"), Network(1))

    assert embedded == ["search_query: a"]


def test_another_document_prefix_makes_another_digest_and_another_query_prefix_does_not() -> None:
    plain = identified(MODEL).digest("text")

    assert identified(replace(MODEL, options={"document_prefix": "passage: "})).digest("text") != plain
    assert identified(replace(MODEL, options={"query_prefix": "query: "})).digest("text") == plain


@pytest.mark.parametrize(
    ("model", "content", "digest"),
    [
        (MODEL, "text", "e4b0115f119cfe18658fba93579c758f"),
        (
            replace(MODEL, model_id='a "b"\\', options={"document_prefix": "é: "}),
            "\udcff 世界",
            "8c880036dbe43cae051c40c55c41647a",
        ),
    ],
)
def test_digests_stay_the_same_from_version_to_version(model: Model, content: str, digest: str) -> None:
    """Rows of an older version would all be embedded again."""
    assert identified(model).digest(content).hex() == digest
