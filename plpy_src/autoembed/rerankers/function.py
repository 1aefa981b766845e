"""An SQL function of the user: a query and passages in, scores out, with its owner's rights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoembed.errors import Refused
from autoembed.model import Model, Request, Reranked
from autoembed.providers.definition import check_options, check_without
from autoembed.rerankers.scores import finite

if TYPE_CHECKING:
    from autoembed.rerankers import CallReranker

RUNS_IN_BACKEND = True


def check(model: Model) -> None:
    check_without(model, "api_key", "base_url")
    check_options(model, frozenset())


def rerank(request: Request, call_reranker: CallReranker) -> Reranked:
    scores = call_reranker(request.model.name, request.query or "", request.texts, request.timeout_seconds)
    if len(scores) != len(request.texts):
        many = "more" if len(scores) > len(request.texts) else str(len(scores))
        raise Refused(f"the function returned {many} scores for {len(request.texts)} passages")
    return Reranked(finite(scores))
