"""A model that runs inside the backend: model.onnx and tokenizer.json in a folder on the server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from autoembed.errors import ProviderTrouble
from autoembed.flight import SLICE_SECONDS
from autoembed.local_models import folder_of, max_tokens_of
from autoembed.model import PREFIXES, Embedded, Model, Request, prefixed
from autoembed.providers.definition import check_options, check_without

if TYPE_CHECKING:
    from autoembed.network import Network
    from autoembed.onnx_model import OnnxModel

Loaded = TypeVar("Loaded")

MAX_INPUTS_PER_REQUEST = 256
MAX_TOKENS_PER_REQUEST = 1_000_000
MAX_TOKENS_PER_INPUT: int | None = None
RUNS_IN_BACKEND = False

# Models that a session keeps, each with a hundred megabytes or more.
MAX_MODELS = 4
# The last one was used last.
_loaded: dict[tuple[str, int], OnnxModel] = {}
# One batch of texts at a time, because it uses all cores.
_running = threading.Lock()
# The request whose texts are in work.
_at_work: Request | None = None


def check(model: Model) -> None:
    check_without(model, "api_key")
    check_options(model, PREFIXES)
    for name in ("model.onnx", "tokenizer.json"):
        path = os.path.join(_folder(model), name)
        if not os.path.exists(path):
            raise ProviderTrouble(f"the model's file {path} does not exist on the server", permanent=True)


def embed(request: Request, network: Network) -> Embedded:
    global _at_work
    request.sent.set()
    while not _running.acquire(timeout=SLICE_SECONDS):
        _stop_if_told(request)
    try:
        _at_work = request
        model = _onnx_model(request.model)
        began_at = time.monotonic()
        vectors, tokens, cut = model.embed(prefixed(request), partial(_stop_if_told, request))
        seconds = time.monotonic() - began_at
    finally:
        _at_work = None
        _running.release()
    if vectors.shape[1] != request.model.dimensions:
        raise ProviderTrouble(
            f"the model's vectors have {vectors.shape[1]} dimensions, it is defined with {request.model.dimensions}",
            permanent=True,
        )
    return Embedded(vectors, sum(tokens), seconds=seconds, cut=cut)


def abort() -> None:
    request = _at_work
    if request is not None and request.stopped.is_set():
        for onnx_model in list(_loaded.values()):
            onnx_model.stop()


def _stop_if_told(request: Request) -> None:
    if request.stopped.is_set():
        raise ProviderTrouble("the local model was stopped")


def max_tokens(model: Model) -> int:
    return max_tokens_of(model.max_tokens_per_input)


def is_loaded(folder: str, most_tokens: int) -> bool:
    return (folder, most_tokens) in _loaded


def _folder(model: Model) -> str:
    return folder_of(model.base_url, model.model_id)


def token_counter(model: Model) -> Callable[[Sequence[str]], list[int]]:
    """Counts the tokens of texts, with the marks that the model puts around each. Raises ProviderTrouble."""
    from autoembed.onnx_model import count_tokens, load_tokenizer

    check(model)
    return partial(count_tokens, _loading(partial(load_tokenizer, _folder(model))))


def _onnx_model(model: Model) -> OnnxModel:
    from autoembed.onnx_model import OnnxModel

    which = (_folder(model), max_tokens(model))
    loaded = _loaded.pop(which, None)
    if loaded is None:
        check(model)
        if len(_loaded) == MAX_MODELS:
            del _loaded[next(iter(_loaded))]
        loaded = _loading(partial(OnnxModel, which[0], max_tokens=which[1]))
    _loaded[which] = loaded
    return loaded


def _loading(load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except (OSError, ImportError, ValueError) as error:
        raise ProviderTrouble(f"the local model cannot be loaded: {error}", permanent=True) from error
