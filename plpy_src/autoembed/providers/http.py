"""What all providers over HTTP have in common: the round trip, and what an answer must be."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoembed import endpoints, keys
from autoembed.errors import InvalidInput, ProviderTrouble, Refused, Trouble, trouble_of_answer
from autoembed.model import Embedded, Model, Request

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

# Sent with each request, over what we would send.
EXTRAS = frozenset({"extra_headers", "extra_body"})
# Options that every provider over HTTP takes.
OPTIONS = EXTRAS | {"ca_file"}
SECRET_HEADERS = {"authorization", "proxy-authorization", "cookie", "api-key", "x-api-key", "x-goog-api-key"}


def check(model: Model, *, default_url: str | None, example: str, options: frozenset[str] = OPTIONS) -> None:
    """Raises InvalidInput for a definition that cannot work, ProviderTrouble for a key that is not there yet."""
    url = model.base_url or default_url
    if url is None:
        raise InvalidInput(f'model "{model.name}" has no base_url', hint=f"For example {example}.")
    fault = endpoints.fault_of(url, model.http_hosts)
    if fault is not None:
        raise InvalidInput(
            f'model "{model.name}" has the base_url "{endpoints.without_user(url)}", which {fault.reason}',
            hint=fault.hint or f"For example {example}.",
        )
    check_options(model, options)
    for name in sorted(EXTRAS & model.options.keys()):
        if not isinstance(model.options[name], dict):
            raise InvalidInput(f'option {name} of model "{model.name}" is not an object')
    secret = sorted(name for name in model.options.get("extra_headers", {}) if name.lower() in SECRET_HEADERS)
    if secret:
        raise InvalidInput(
            f'option extra_headers of model "{model.name}" has {secret[0]}, which would keep a secret in a table',
            hint="Say where the key is found with api_key => 'env:NAME', 'file:PATH' or 'vault:NAME'.",
        )
    if default_url is not None and model.base_url is None and model.api_key is None:
        raise InvalidInput(
            f'model "{model.name}" has no api_key, and {default_url} wants one',
            hint="For example api_key => 'env:NAME'; or name the base_url of a server that needs no key.",
        )
    ca_file = model.options.get("ca_file")
    if ca_file is not None and not os.access(ca_file, os.R_OK):
        raise ProviderTrouble(f"the ca_file {ca_file} cannot be read", permanent=True)
    keys.resolve(model)


def check_without(model: Model, *names: str) -> None:
    """Raises InvalidInput for what only a provider elsewhere has."""
    for name in names:
        if getattr(model, name) is not None:
            raise InvalidInput(f'model "{model.name}" runs inside the server and takes no {name}')


def check_options(model: Model, known: frozenset[str]) -> None:
    """Raises InvalidInput for an option that the provider does not know, or that is not a text."""
    check_known_options(model, known)
    for name in sorted(model.options.keys() - EXTRAS):
        if not isinstance(model.options[name], str):
            raise InvalidInput(f'option {name} of model "{model.name}" is not a text')


def check_known_options(model: Model, known: frozenset[str]) -> None:
    """Raises InvalidInput for an option that the provider does not know."""
    unknown = sorted(model.options.keys() - known)
    if unknown:
        raise InvalidInput(
            f'model "{model.name}" has the option {unknown[0]}, which the provider {model.provider} does not know',
            hint=f"Its options are: {', '.join(sorted(known)) or 'none'}.",
        )


def check_tokens_per_input(model: Model, most: int) -> None:
    """Raises InvalidInput unless the model's own limit keeps texts within what it takes, less than its provider's."""
    if model.max_tokens_per_input is None or model.max_tokens_per_input > most:
        raise InvalidInput(
            f'model "{model.name}" is {model.model_id}, which takes at most {most} tokens of a text',
            hint=f"Say so with max_tokens_per_input => {most}.",
        )


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
        raise ProviderTrouble(f"{endpoints.without_user(url)} {fault.reason}", permanent=True)
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
    """JSON; half a surrogate pair, which UTF-8 cannot carry, becomes a question mark."""
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def parse(body: bytes | bytearray) -> Any:
    """JSON, or ValueError."""
    import orjson

    try:
        return orjson.loads(body)
    except ValueError:
        # Some servers answer NaN, which is no JSON, where a text was too much for their model.
        return json.loads(body)


# Answers are read one by one: each takes some times its size meanwhile, and only one thread computes anyway.
_reading = threading.Lock()


@contextlib.contextmanager
def reading(api: str) -> Iterator[None]:
    """Makes ProviderTrouble of what an answer raises that is not in the form it should have."""
    try:
        with _reading:
            yield
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProviderTrouble(f"the provider's answer is not in the form of the {api} API ({error})") from error


def tokens_in(answer: Any, *path: str) -> int | None:
    """The count of tokens that an answer reports at that path; None if it reports none."""
    for name in path:
        answer = answer.get(name) if isinstance(answer, dict) else None
    return answer if isinstance(answer, int) else None


def matrix(embeddings: Sequence[Any], count: int, dimensions: int) -> np.ndarray:
    """Embeddings, lists of numbers or base64 of float32, as (count, dimensions) float32.

    Raises ValueError for what is no embedding, ProviderTrouble for too many, too few or of the wrong length, Refused
    for one that is not finite.
    """
    import numpy as np

    vectors = [_vector(embedding) for embedding in embeddings]
    if len(vectors) != count:
        raise ProviderTrouble(f"the provider answered with {len(vectors)} vectors for {count} texts")
    lengths = {len(vector) for vector in vectors}
    if lengths != {dimensions}:
        wrong = max(lengths - {dimensions})
        raise ProviderTrouble(
            f"the provider's vectors have {wrong} dimensions, the model is defined with {dimensions}", permanent=True
        )
    stacked = np.stack(vectors)
    if not np.isfinite(stacked).all():
        raise Refused("the provider answered with a vector that is not finite")
    return stacked


def _vector(embedding: Any) -> np.ndarray:
    import numpy as np

    if isinstance(embedding, str):
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        except binascii.Error as error:
            raise ValueError("invalid base64") from error
    # null is how JSON writers put what is not a number.
    numbers = np.array([np.nan if n is None else n for n in embedding] if isinstance(embedding, list) else embedding)
    if numbers.ndim != 1 or numbers.dtype.kind not in "fi":
        raise ValueError("an embedding that is not a list of numbers")
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)
