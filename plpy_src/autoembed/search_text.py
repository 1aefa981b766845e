"""A door from SQL: the embedding of a search text. A session that gets it from a lane imports nothing else."""

from __future__ import annotations

import sys

from autoembed import query_client
from autoembed.kept import KeptTexts
from autoembed.local_models import folder_of, max_tokens_of

# The import of typing takes as long as all of these.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

# Vectors of search texts that a session keeps, in characters: a plan without an index calls embed() once for each
# row, a join of several searches does so in turns, and paging calls it once for each page.
KEPT_CHARACTERS = 8_000_000

_kept = KeptTexts(KEPT_CHARACTERS)
# Whether the last text was one of these.
was_kept = False


def embed(
    content: str,
    model_name: str,
    definition: str,
    local_model: Sequence[str | None] | None,
    asker: str,
    check_interrupts: Callable[[], object],
) -> dict[str, Any]:
    """The vector of a search text, or the fault that SQL is to raise: the columns of autoembed._embed().

    definition: the row of the model and the version of its function. A vector that is kept is of the same text and
    definition.
    local_model: base_url, model_id, max_tokens_per_input, query_prefix and dimensions, if a lane may embed the text.
    """
    global was_kept
    vector = _kept.get((content, definition))
    was_kept = vector is not None
    if vector is not None:
        return _without_fault(vector)
    outcome = None
    if local_model is not None and content.strip():
        outcome = _embedded_by_lane(content, local_model, asker, check_interrupts)
    if outcome is None:
        from autoembed import doors

        outcome = doors.embed(content, model_name)
    if outcome["embedding"] is not None:
        _kept.keep((content, definition), outcome["embedding"])
    return outcome


def _embedded_by_lane(
    content: str, local_model: Sequence[str | None], asker: str, check_interrupts: Callable[[], object]
) -> dict[str, Any] | None:
    """The same from a lane; None: there is none, or this session has loaded the model."""
    base_url, model_id, max_tokens_per_input, query_prefix, dimensions = local_model
    folder = folder_of(base_url, model_id or "")
    max_tokens = max_tokens_of(int(max_tokens_per_input or 0))
    local = sys.modules.get("autoembed.providers.local")
    if local is not None and local.is_loaded(folder, max_tokens):
        return None
    question = query_client.Question(asker, folder, max_tokens, (query_prefix or "") + content)
    answer = query_client.ask(question, check_interrupts)
    if answer is None or answer.literal.count(",") + 1 != int(dimensions or 0):
        return None
    return _without_fault(answer.literal, answer.tokens)


def cancelled(words: str) -> dict[str, Any]:
    return {
        "embedding": None,
        "tokens_used": None,
        "problem": words,
        "hint": "The model had not answered yet.",
        "errcode": "57014",
    }


def _without_fault(vector: str, tokens_used: int | None = None) -> dict[str, Any]:
    return {"embedding": vector, "tokens_used": tokens_used, "problem": None, "hint": None, "errcode": None}
