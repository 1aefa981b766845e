"""The parts that all providers over HTTP share: checks of an address, the round trip, the reading of an answer."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoembed import endpoints, keys
from autoembed.errors import Fault, ProviderTrouble, Trouble, trouble_of_answer
from autoembed.model import Embedded, Model, Request
from autoembed.providers.definition import check_options

if TYPE_CHECKING:
    from autoembed.network import Network

# Options whose fields go into each request, in place of the provider's own fields of the same name.
EXTRAS = frozenset({"extra_headers", "extra_body"})
# Headers that hold keys. They must not be options, which stand in a table.
SECRET_HEADERS = {"authorization", "proxy-authorization", "cookie", "api-key", "x-api-key", "x-goog-api-key"}


def check(model: Model, *, default_url: str | None, example: str, options: frozenset[str] = frozenset()) -> None:
    """Raises Fault if the model cannot work as defined, ProviderTrouble if its key or ca_file is not there yet.

    options: those that this provider takes besides extra_headers, extra_body and ca_file.
    """
    url = model.base_url or default_url
    if url is None:
        raise Fault(f'model "{model.name}" has no base_url', hint=f"For example {example}.")
    fault = endpoints.fault_of(url, model.http_hosts)
    if fault is not None:
        raise Fault(f'model "{model.name}" has an unusable base_url: {fault.problem}', hint=fault.hint)
    check_options(model, texts=options | {"ca_file"}, objects=EXTRAS)
    secret = sorted(name for name in model.options.get("extra_headers", {}) if name.lower() in SECRET_HEADERS)
    if secret:
        raise Fault(
            f'option extra_headers of model "{model.name}" has {secret[0]}, which would keep a secret in a table',
            hint="Say where the key is found with api_key => 'env:NAME', 'file:PATH' or 'vault:NAME'.",
        )
    if default_url is not None and model.base_url is None and model.api_key is None:
        raise Fault(
            f'model "{model.name}" has no api_key, and {default_url} wants one',
            hint="For example api_key => 'env:NAME'; or name the base_url of a server that needs no key.",
        )
    ca_file = model.options.get("ca_file")
    if ca_file is not None and not os.access(ca_file, os.R_OK):
        raise ProviderTrouble(f"the ca_file {ca_file} cannot be read", permanent=True)
    keys.resolve(model)


def url(model: Model, default_url: str, path: str) -> str:
    return (model.base_url or default_url).rstrip("/") + path


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def post(
    request: Request,
    network: Network,
    url: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any],
    secret: str | None,
    embedded_in: Callable[[bytes | bytearray, int, int], Embedded],
    trouble_of: Callable[[int, Mapping[str, str], bytes | bytearray, str | None], Trouble] = trouble_of_answer,
) -> Embedded:
    """The vectors that embedded_in() reads from a 200 answer; raises what trouble_of() makes of any other.

    embedded_in: is given the body, the count of texts and the dimensions. secret: is kept out of errors.
    The headers of the answer go with the vectors and with the trouble.
    """
    # The check is repeated because a host may have lost its permission since the model was defined.
    fault = endpoints.fault_of(url, request.model.http_hosts)
    if fault is not None:
        raise ProviderTrouble(fault.problem, permanent=True)
    answer = network.post(
        url,
        {
            "Content-Type": "application/json",
            "Accept": "application/json",
            **headers,
            **request.model.options.get("extra_headers", {}),
        },
        encode({**body, **request.model.options.get("extra_body", {})}),
        timeout_seconds=request.timeout_seconds,
        # A JSON number takes up to 24 bytes. The rest is room for a server that ignores the dimensions asked for.
        max_answer_bytes=(64 << 20) + 32 * len(request.texts) * request.model.dimensions,
        ca_file=request.model.options.get("ca_file"),
        sent=request.sent.set,
    )
    try:
        if answer.status != 200:
            raise trouble_of(answer.status, answer.headers, answer.body, secret)
        embedded = embedded_in(answer.body, len(request.texts), request.model.dimensions)
    except Trouble as trouble:
        trouble.headers = answer.headers
        raise
    return replace(embedded, headers=answer.headers)


def encode(body: Mapping[str, Any]) -> bytes:
    """The body as JSON. Half a surrogate pair, which UTF-8 cannot carry, becomes a question mark."""
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def parse(body: bytes | bytearray) -> Any:
    """The JSON value of a body. Raises ValueError."""
    import orjson

    try:
        return orjson.loads(body)
    except ValueError:
        # Some servers answer NaN, which is not JSON, if a text was too much for their model.
        return json.loads(body)


def abort() -> None:
    """Does nothing: these providers only use the network, which is aborted by itself."""


# Answers are read one by one: reading takes several times their size, and only one thread computes at a time anyway.
_reading = threading.Lock()


@contextlib.contextmanager
def reading(api: str) -> Iterator[None]:
    """Turns the errors of an answer in another form into ProviderTrouble."""
    try:
        with _reading:
            yield
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProviderTrouble(f"the provider's answer is not in the form of the {api} API ({error})") from error


def tokens_in(answer: Any, *path: str) -> int | None:
    """The count of tokens at that path of an answer; None if the answer reports none."""
    for name in path:
        answer = answer.get(name) if isinstance(answer, dict) else None
    return answer if isinstance(answer, int) else None
