"""OpenAI's models as Azure serves them: OpenAI's body and answer, addressed by deployment, with errors of its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fake_api.behaviour import Behaviour
from fake_api.protocol import Ask, Refusal
from fake_api.protocols import openai
from fake_api.rate_limit import Allowance


def check(body: Any, behaviour: Behaviour, address: Mapping[str, str]) -> Ask:
    if re.fullmatch(r"\d{4}-\d\d-\d\d(-preview)?", address.get("api-version", "")) is None:
        raise Refusal(404, "Resource not found", code="404")
    if behaviour.dimensions_of(address["deployment"], openai.MODELS) is None:
        raise usual_refusal(404)
    body = {**body, "model": address["deployment"]} if isinstance(body, dict) else body
    return openai.check(body, behaviour, address)


def usual_refusal(status: int) -> Refusal:
    if status == 401:
        message = "Access denied due to invalid subscription key or wrong API endpoint."
        return Refusal(401, message, code="401")
    if status == 404:
        return Refusal(404, "The API deployment for this resource does not exist.", code="DeploymentNotFound")
    if status == 429:
        message = (
            "Requests to the Embeddings_Create Operation have exceeded call rate limit. Please retry after 2 seconds."
        )
        return Refusal(429, message, code="429")
    return Refusal(status, f"Refused with {status}.", code=str(status))


def limit_headers(allowances: Sequence[Allowance], status: int) -> dict[str, str]:
    return {f"x-ratelimit-remaining-{allowance.unit}": str(int(allowance.left)) for allowance in allowances}


def over_limit(allowance: Allowance, usual: Refusal) -> Refusal:
    wait_seconds = min(allowance.wait_seconds, 86_400)
    what = "token" if allowance.unit == "tokens" else "call"
    message = (
        f"Requests to the Embeddings_Create Operation have exceeded {what} rate limit of your current pricing tier. "
        f"Please retry after {math.ceil(wait_seconds)} seconds."
    )
    return Refusal(429, message, code=usual.code, headers=openai.retry_after_ms(wait_seconds))


def error(refusal: Refusal) -> bytes:
    return json.dumps({"error": {"code": refusal.code, "message": refusal.message}}).encode()


PROTOCOL = openai.PROTOCOL._replace(
    path=re.compile("/openai/deployments/(?P<deployment>[^/]+)/embeddings"),
    key_header="api-key",
    check=check,
    usual_refusal=usual_refusal,
    error=error,
    bad_key=lambda key: usual_refusal(401),
    limit_headers=limit_headers,
    over_limit=over_limit,
)
