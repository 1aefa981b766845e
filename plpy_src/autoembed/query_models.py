"""The local models by which a lane embeds search texts of other sessions, apart from those for its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoembed.binary import literals
from autoembed.query_client import Answer, Question

if TYPE_CHECKING:
    from autoembed.onnx_model import OnnxModel

# Models that a lane keeps for search texts. Questions to others are refused.
MAX_MODELS = 4

# None: the model cannot be loaded, and is not tried again before the next lane.
_loaded: dict[tuple[str, int], OnnxModel | None] = {}


def answers(questions: Sequence[Question]) -> list[Answer] | None:
    """The answers to questions to one model; None: this lane does not load it."""
    model = _model(*questions[0].model)
    if model is None:
        return None
    computed = model.embed_few([question.text for question in questions])
    return [
        Answer(literal, tokens) for literal, tokens in zip(literals(computed.vectors), computed.tokens, strict=True)
    ]


def stop_answering() -> None:
    for model in list(_loaded.values()):
        if model is not None:
            model.stop()


def _model(folder: str, max_tokens: int) -> OnnxModel | None:
    from autoembed.onnx_model import OnnxModel

    which = (folder, max_tokens)
    if which not in _loaded and len(_loaded) < MAX_MODELS:
        _loaded[which] = None
        # A search text is short: further threads would only take the cores from the lane.
        _loaded[which] = OnnxModel(folder, max_tokens=max_tokens, threads=1)
    return _loaded.get(which)
