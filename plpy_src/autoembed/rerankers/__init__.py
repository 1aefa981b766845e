"""The ways to speak to a rerank model: a query and passages in, scores out. Each provider is one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from autoembed.batching import estimate_tokens, truncate
from autoembed.errors import Fault
from autoembed.model import Model, Request, Reranked
from autoembed.rerankers import cohere, function, jina, tei, voyage

if TYPE_CHECKING:
    from autoembed.network import Network

# Calls the SQL function of a rerank model: its name, the query and the passages in, scores out.
CallReranker = Callable[[str, str, Sequence[str], float], list[float | None]]

# Tokens, where the model sets no limit. Many rerank models read 512 tokens of a query and a passage.
MAX_TOKENS_PER_PASSAGE = 500
MAX_TOKENS_PER_REQUEST = 100_000


class Reranker(Protocol):
    """The contents of a provider's module."""

    # True: rerank() goes through the database, which only the backend's own thread may use.
    RUNS_IN_BACKEND: bool

    def check(self, model: Model) -> None:
        """Raises Fault if the model cannot work as defined, ProviderTrouble if something is not there yet."""

    def rerank(self, request: Request, reach: Any, /) -> Reranked:
        """The scores of the passages. Raises Trouble.

        reach: the network; a provider that runs in the backend is given a CallReranker instead.
        """


RERANKERS: dict[str, Reranker] = {
    "cohere": cohere,
    "voyage": voyage,
    "jina": jina,
    "tei": tei,
    "function": function,
}


def reranker_of(model: Model) -> Reranker:
    try:
        return RERANKERS[model.provider]
    except KeyError:
        raise Fault(
            f'rerank model "{model.name}" names the provider "{model.provider}", which reranks nothing',
            hint=f"The providers of rerank models are: {', '.join(sorted(RERANKERS))}.",
        ) from None


def check(model: Model) -> None:
    """Raises Fault if the model cannot work as defined, ProviderTrouble if something is not there yet."""
    if not model.model_id.strip():
        raise Fault(
            f'model "{model.name}" has a blank model_id', hint="Give the name by which the provider knows the model."
        )
    reranker_of(model).check(model)


def shortened(model: Model, query: str, passages: Sequence[str]) -> list[str]:
    """The passages, each so short that the model reads it with the query, and all of them in one request."""
    most = (model.max_tokens_per_request or MAX_TOKENS_PER_REQUEST) // len(passages) - estimate_tokens(query)
    limit = max(1, min(most, model.max_tokens_per_input or MAX_TOKENS_PER_PASSAGE))
    return [truncate(passage, limit) for passage in passages]


def rerank(request: Request, network: Network, call_reranker: CallReranker) -> Reranked:
    """The scores of a request's passages, from the provider of its model. Raises Trouble."""
    reranker = reranker_of(request.model)
    return reranker.rerank(request, call_reranker if reranker.RUNS_IN_BACKEND else network)
