"""OpenAI's models as Azure serves them: by resource and deployment.

Written from the API reference, https://learn.microsoft.com/azure/ai-services/openai/reference#embeddings, and
https://learn.microsoft.com/azure/ai-services/openai/how-to/embeddings, which sets the limits. Body and answer are those
of OpenAI. The provider openai speaks Azure's v1 API, which has no deployments and versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from autoembed import keys
from autoembed.model import Embedded, Model, Request
from autoembed.providers import http, openai

if TYPE_CHECKING:
    from autoembed.network import Network

API_VERSION = "2024-10-21"
MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
MAX_TOKENS_PER_INPUT: int | None = 8192
RUNS_IN_BACKEND = False


def check(model: Model) -> None:
    http.check(
        model,
        default_url=None,
        example="https://NAME.openai.azure.com, the endpoint of the resource",
        options=frozenset({"deployment", "api_version"}),
    )


def embed(request: Request, network: Network) -> Embedded:
    key = keys.resolve(request.model)
    headers = {} if key is None else {"api-key": key}
    return openai.embed_at(url_of(request.model), request, network, headers)


abort = http.abort


def url_of(model: Model) -> str:
    deployment = quote(model.options.get("deployment", model.model_id), safe="")
    version = quote(model.options.get("api_version", API_VERSION), safe="")
    return http.url(model, "", f"/openai/deployments/{deployment}/embeddings?api-version={version}")
