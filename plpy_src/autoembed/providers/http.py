"""The parts that all providers over HTTP share: checks of an address, the round trip, the reading of an answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from autoembed import endpoints, keys
from autoembed.answers import may_be_a_texts, message_in, summary_of, trouble_of_answer, without_secrets
from autoembed.errors import Fault, ProviderTrouble, Trouble
from autoembed.model import Embedded, Model, Request, Reranked
from autoembed.providers.definition import check_options

if TYPE_CHECKING:
    from autoembed.network import Network

Result = TypeVar("Result", Embedded, Reranked)

# Scores take less. Some servers return the passages with them.
MAX_SCORES_BYTES = 8 << 20
# Options whose fields go into each request, in place of the provider's own fields of the same name.
BODIES = frozenset({"extra_body", "document_body", "query_body"})
EXTRAS = BODIES | {"extra_headers"}
# Names of headers and fields that hold secrets. Such a header is an option only by reference, since options stand in a
# table.
SECRET_NAME = re.compile(r"auth|cookie|key|token|secret|passw|credential|signature|session", re.IGNORECASE)


def check(model: Model, *, default_url: str | None, example: str, options: frozenset[str] = frozenset()) -> None:
    """Raises Fault if the model cannot work as defined, ProviderTrouble if its key or ca_file is not there yet.

    options: those that this provider takes besides EXTRAS and ca_file.
    """
    url = model.base_url or default_url
    if url is None:
        raise Fault(f'model "{model.name}" has no base_url', hint=f"For example {example}.")
    # The first one shows no query.
    fault = endpoints.fault_of_query(url) or endpoints.fault_of(url, model.http_hosts)
    if fault is not None:
        raise Fault(f'model "{model.name}" has an unusable base_url: {fault.problem}', hint=fault.hint)
    check_options(model, texts=options | {"ca_file"}, objects=EXTRAS)
    for name, value in sorted(model.options.get("extra_headers", {}).items()):
        if not isinstance(value, str):
            raise Fault(f'header {name} of model "{model.name}" is not a text', hint=f"Give {name} as a text.")
        if SECRET_NAME.search(name) and not keys.is_reference(value):
            raise Fault(
                f'option extra_headers of model "{model.name}" has {name}, which would keep a secret in a table',
                hint=f"Say where it is found: {name} => 'env:NAME', 'file:PATH' or 'vault:NAME'; or use api_key.",
            )
    for option in sorted(BODIES):
        secret = _secret_field(model.options.get(option, {}))
        if secret is not None:
            raise Fault(
                f'option {option} of model "{model.name}" has {secret}, which would keep a secret in a table',
                hint="Send it as a header: extra_headers takes 'env:NAME', 'file:PATH' or 'vault:NAME' as a value.",
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
    keys.resolve_headers(model)


def _secret_field(value: Any) -> str | None:
    """The name of a field that holds a secret, at any depth; None if there is none."""
    if isinstance(value, list):
        return next(filter(None, map(_secret_field, value)), None)
    if not isinstance(value, dict):
        return None
    for name, field in value.items():
        # Counts of tokens, as max_tokens, are no secrets.
        if SECRET_NAME.search(name) and isinstance(field, str):
            return str(name)
    return _secret_field(list(value.values()))


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
    answer_in: Callable[[bytes | bytearray, int, int], Result],
    trouble_of: Callable[[int, Mapping[str, str], bytes | bytearray], Trouble] = trouble_of_answer,
) -> Result:
    """The result of answer_in() for a 200 answer. Raises the result of trouble_of() for any other.

    answer_in: is given the body, the count of texts and the dimensions.
    The headers of the answer go with it and with the trouble. Values of headers are kept out of errors.
    """
    sent = {**headers, **keys.resolve_headers(request.model)}
    try:
        return _post(request, network, url, sent, body, answer_in, trouble_of)
    except Trouble as trouble:
        # The one place where an error becomes text that is stored and shown.
        stored = set(request.model.options.get("extra_headers", {}).values())
        secrets = {part for value in set(sent.values()) - stored for part in (value, value.split(" ")[-1])}
        raise without_secrets(trouble, secrets, stored) from trouble.__cause__


def _post(
    request: Request,
    network: Network,
    url: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any],
    answer_in: Callable[[bytes | bytearray, int, int], Result],
    trouble_of: Callable[[int, Mapping[str, str], bytes | bytearray], Trouble],
) -> Result:
    # The check is repeated because a host may have lost its permission since the model was defined.
    fault = endpoints.fault_of(url, request.model.http_hosts)
    if fault is not None:
        raise ProviderTrouble(fault.problem, permanent=True)
    try:
        answer = network.post(
            url,
            {"Content-Type": "application/json", "Accept": "application/json", **headers},
            encode({**body, **request.model.extra_body(request.purpose)}),
            timeout_seconds=request.timeout_seconds,
            max_answer_bytes=_most_bytes(request),
            ca_file=request.model.options.get("ca_file"),
            sent=request.sent.set,
            stopped=request.stopped,
        )
    except ProviderTrouble as trouble:
        # A text may have stopped the server, or may keep it busy for too long.
        trouble.may_be_a_texts = request.sent.is_set() and not trouble.permanent
        raise
    try:
        if answer.status != 200:
            refusal = trouble_of(answer.status, answer.headers, answer.body)
            refusal.summary = summary_of(answer.status)
            if answer.status == 404:
                # The address may be wrong: a query may hold a secret, and is left out.
                refusal.args = (f"at {url.split('?')[0]}, {refusal}",)
            raise refusal
        read = answer_in(answer.body, len(request.texts), request.model.dimensions)
    except Trouble as trouble:
        trouble.headers = answer.headers
        trouble.may_be_a_texts = may_be_a_texts(answer.status)
        raise
    return replace(read, headers=answer.headers)


def _most_bytes(request: Request) -> int:
    """The size of an answer beyond which it is not read."""
    if request.model.reranks:
        return MAX_SCORES_BYTES
    # A JSON number takes up to 24 bytes. The rest is room for a server that ignores the dimensions asked for.
    return (64 << 20) + 32 * len(request.texts) * request.model.dimensions


def encode(body: Mapping[str, Any]) -> bytes:
    """The body as JSON. Half a surrogate pair, which UTF-8 cannot carry, becomes a question mark."""
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def parse(body: bytes | bytearray) -> Any:
    """The JSON value of a body. Raises ValueError, and ProviderTrouble for an error with status 200."""
    import orjson

    try:
        answer = orjson.loads(body)
    except ValueError:
        # Some servers answer NaN, which is not JSON, if a text was too much for their model.
        answer = json.loads(body)
    if isinstance(answer, dict) and answer.get("error") and not answer.keys() & {"data", "embeddings", "results"}:
        raise ProviderTrouble(f"the provider answered with an error: {message_in(body)}")
    return answer


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
        # A missing field is named. The words of other errors may quote the answer.
        why = f"it lacks {error}" if isinstance(error, KeyError) else type(error).__name__
        raise ProviderTrouble(f"the provider's answer is not in the form of the {api} API ({why})") from error


def tokens_in(answer: Any, *path: str) -> int | None:
    """The count of tokens at that path of an answer; None if the answer reports none."""
    for name in path:
        answer = answer.get(name) if isinstance(answer, dict) else None
    # Not True, which is an int, nor what no column takes.
    return answer if type(answer) is int and 0 <= answer < 2**31 else None
