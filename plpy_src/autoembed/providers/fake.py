"""No model: vectors that follow from the texts, and faults on demand, for tests of applications."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoembed.answers import trouble_of_answer
from autoembed.batching import estimate_tokens
from autoembed.errors import Fault, ProviderTrouble
from autoembed.model import Embedded, Model, Request
from autoembed.providers.definition import check_option_names, check_without

if TYPE_CHECKING:
    import numpy as np

    from autoembed.network import Network

MAX_INPUTS_PER_REQUEST = 2048
MAX_TOKENS_PER_REQUEST = 300_000
# Nothing is cut, so that a search for a text finds its row, however long it is.
MAX_TOKENS_PER_INPUT: int | None = None
RUNS_IN_BACKEND = False

OPTIONS = frozenset({"delay_seconds", "faults"})
FAULT = frozenset({"match", "status", "message", "retry_after_seconds"})


def check(model: Model) -> None:
    check_without(model, "api_key", "base_url")
    check_option_names(model, OPTIONS)
    _check_seconds(model, "delay_seconds", model.options.get("delay_seconds", 0))
    faults = model.options.get("faults", [])
    if not isinstance(faults, list) or not all(isinstance(fault, dict) for fault in faults):
        raise _wrong(model, "faults", "must be a list of objects")
    for fault in faults:
        if fault.keys() - FAULT:
            raise _wrong(model, "faults", f"has {min(fault.keys() - FAULT)}, which no fault has")
        status = fault.get("status")
        if not isinstance(status, int) or not 300 <= status <= 599:
            raise _wrong(model, "faults", "has a fault without a status from 300 to 599")
        for name in ("match", "message"):
            if not isinstance(fault.get(name, ""), str):
                raise _wrong(model, "faults", f"has a {name} that is not a text")
        _check_seconds(model, "faults", fault.get("retry_after_seconds", 0))


def _check_seconds(model: Model, option: str, seconds: object) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0:
        raise _wrong(model, option, "must be a number of seconds")


def _wrong(model: Model, option: str, problem: str) -> Fault:
    return Fault(
        f'option {option} of model "{model.name}" {problem}',
        hint='For example options => \'{"delay_seconds": 0.2, "faults": [{"match": "poison", "status": 400}]}\'.',
    )


def embed(request: Request, network: Network) -> Embedded:
    options = request.model.options
    delay = options.get("delay_seconds", 0)
    if request.stopped.wait(min(delay, request.timeout_seconds)):
        raise ProviderTrouble("the request was stopped")
    if delay > request.timeout_seconds:
        raise ProviderTrouble(f"the fake provider did not answer within {request.timeout_seconds:g} s")
    for fault in options.get("faults", []):
        if any(fault.get("match", "") in text for text in request.texts):
            raise trouble_of_answer(fault["status"], _headers(fault), fault.get("message", "").encode())
    import numpy as np

    vectors = np.stack([vector_of(text, request.model.dimensions) for text in request.texts])
    return Embedded(vectors, sum(map(estimate_tokens, request.texts)))


def abort() -> None:
    """Does nothing: a request that is stopped ends by itself."""


def vector_of(text: str, dimensions: int) -> np.ndarray:
    """The vector of a text, of length 1. It is the same in every version and on every machine."""
    import numpy as np

    digest = hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(4 * dimensions)
    # Halves are added so that no vector is zero.
    numbers = np.frombuffer(digest, ">i4") + 0.5
    vector: np.ndarray = (numbers / np.linalg.norm(numbers)).astype(np.float32)
    return vector


def _headers(fault: Mapping[str, Any]) -> dict[str, str]:
    return {"retry-after": str(fault["retry_after_seconds"])} if "retry_after_seconds" in fault else {}
