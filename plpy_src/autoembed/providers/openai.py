"""OpenAI's embeddings endpoint and whatever speaks its protocol.

Written from the API reference, https://platform.openai.com/docs/api-reference/embeddings/create, which sets the limits.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoembed import keys
from autoembed.errors import InvalidInput, ProviderTrouble, Refused, trouble_of_answer
from autoembed.model import Model

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

BASE_URL = "https://api.openai.com/v1"
MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
MAX_TOKENS_PER_INPUT: int | None = 8192

# The models that OpenAI made before it allowed shorter vectors refuse the parameter.
WITHOUT_DIMENSIONS = ("text-embedding-ada-002",)


def check(model: Model) -> None:
    url = model.base_url or BASE_URL
    if not url.startswith(("https://", "http://")):
        raise InvalidInput(
            f'model "{model.name}" has the base_url "{url}", which is not an http or https URL',
            hint="It is what comes before /embeddings, for example https://api.openai.com/v1.",
        )
    if model.base_url is None and model.api_key is None:
        raise InvalidInput(
            f'model "{model.name}" has no api_key, and api.openai.com wants one',
            hint="For example api_key => 'env:OPENAI_API_KEY'; or name the base_url of a server that needs no key.",
        )
    keys.resolve(model.api_key)


def embed(model: Model, texts: Sequence[str], network: Network, timeout_seconds: float) -> np.ndarray:
    key = keys.resolve(model.api_key)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    url = (model.base_url or BASE_URL).rstrip("/") + "/embeddings"
    answer = network.post(
        url,
        headers,
        request_body(model, texts),
        timeout_seconds=timeout_seconds,
        # A JSON number takes up to 24 bytes; the rest is room for a server that does not know the dimensions asked for.
        max_answer_bytes=(64 << 20) + 32 * len(texts) * model.dimensions,
    )
    if answer.status != 200:
        raise trouble_of_answer(answer.status, answer.headers, answer.body, key)
    return vectors_in(answer.body, len(texts), model.dimensions)


def abort() -> None:
    """Nothing to end: all it does goes over the network."""


def request_body(model: Model, texts: Sequence[str]) -> bytes:
    body: dict[str, Any] = {"model": model.model_id, "input": list(texts), "encoding_format": "base64"}
    if model.model_id not in WITHOUT_DIMENSIONS:
        body["dimensions"] = model.dimensions
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def vectors_in(body: bytes | bytearray, count: int, dimensions: int) -> np.ndarray:
    """The vectors of an answer in the order of its indexes, (count, dimensions) float32.

    Raises ProviderTrouble for an answer that is not what was asked for, Refused for a vector that is not finite.
    """
    import numpy as np

    try:
        data = _parsed(body)["data"]
        vectors = {item["index"]: _vector(item["embedding"]) for item in data}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProviderTrouble(f"the provider's answer is not in the form of the OpenAI API ({error})") from error
    if len(data) != count or set(vectors) != set(range(count)):
        raise ProviderTrouble(f"the provider answered with {len(vectors)} vectors for {count} texts")
    lengths = {len(vector) for vector in vectors.values()}
    if lengths != {dimensions}:
        wrong = max(lengths - {dimensions})
        raise ProviderTrouble(
            f"the provider's vectors have {wrong} dimensions, the model is defined with {dimensions}", permanent=True
        )
    ordered = np.stack([vectors[index] for index in range(count)])
    if not np.isfinite(ordered).all():
        raise Refused("the provider answered with a vector that is not finite")
    return ordered


def _parsed(body: bytes | bytearray) -> Any:
    import orjson

    try:
        return orjson.loads(body)
    except ValueError:
        # Some servers answer NaN, which is no JSON, where a text was too much for their model.
        return json.loads(body)


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
