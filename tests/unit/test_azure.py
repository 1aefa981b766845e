"""The provider azure: the URL names deployment and version."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoembed.model import Model, Request
from autoembed.network import Network
from autoembed.providers import azure
from fake_api import FakeApi

MODEL = Model("small", "azure", "text-embedding-3-small", 256)
TEXTS = ["one", "Grüße, 世界 🦊", "three"]


@pytest.mark.parametrize(
    ("base_url", "options", "url"),
    [
        ("https://h", {}, "https://h/openai/deployments/text-embedding-3-small/embeddings?api-version=2024-10-21"),
        ("https://h//", {"deployment": "d"}, "https://h/openai/deployments/d/embeddings?api-version=2024-10-21"),
        (
            "https://h",
            {"deployment": "a/b?c"},
            "https://h/openai/deployments/a%2Fb%3Fc/embeddings?api-version=2024-10-21",
        ),
        (
            "https://h/gateway",
            {"deployment": "d", "api_version": "2023-05-15"},
            "https://h/gateway/openai/deployments/d/embeddings?api-version=2023-05-15",
        ),
    ],
)
def test_the_url_names_deployment_and_version(base_url: str, options: dict[str, str], url: str) -> None:
    assert azure.url_of(replace(MODEL, base_url=base_url, options=options)) == url


def test_a_request_is_sent_to_the_deployment_with_the_fields_of_openai(
    api: FakeApi, key: str, network: Network
) -> None:
    api.behave(models={"mine": 1536})
    model = replace(MODEL, base_url=api.root, api_key=key, options={"deployment": "mine"})

    azure.embed(Request(model, TEXTS, 5, "query"), network)

    (request,) = api.log()
    assert request["path"] == f"/{api.tenant}/openai/deployments/mine/embeddings?api-version=2024-10-21"
    assert request["texts"] == TEXTS
    assert request["settings"] == {"model": MODEL.model_id, "encoding_format": "base64", "dimensions": 256}
