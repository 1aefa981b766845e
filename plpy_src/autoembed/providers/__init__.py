"""The ways to speak to a model: texts in, vectors out. Each provider is one module, and only it knows its API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from autoembed.batching import estimate_tokens, most_estimated, most_tokens
from autoembed.errors import Fault
from autoembed.local_models import MOST_CHARACTERS
from autoembed.model import Embedded, Model, Request
from autoembed.providers import azure, cohere, fake, function, gemini, local, ollama, openai, voyage

if TYPE_CHECKING:
    from autoembed.limits import Limits
    from autoembed.network import Network

# Calls the SQL function of a model: its name, the purpose and the texts in, vectors in PostgreSQL's binary form out.
CallEmbedder = Callable[[str, str, Sequence[str], float], list[bytes | None]]


class Provider(Protocol):
    """The contents of a provider's module."""

    MAX_INPUTS_PER_REQUEST: int
    MAX_TOKENS_PER_REQUEST: int
    # None: the model truncates by its own tokenizer, so nothing is cut before.
    MAX_TOKENS_PER_INPUT: int | None
    # True: embed() goes through the database, which only the backend's own thread may use.
    RUNS_IN_BACKEND: bool

    def check(self, model: Model) -> None:
        """Raises Fault if the model cannot work as defined, ProviderTrouble if something is not there yet."""

    def embed(self, request: Request, reach: Any, /) -> Embedded:
        """The vectors of the texts. Raises Trouble.

        reach: the network; a provider that runs in the backend is given a CallEmbedder instead.
        """

    def abort(self) -> None:
        """Ends what embed() is doing without the network for requests that are stopped."""


PROVIDERS: dict[str, Provider] = {
    "openai": openai,
    "azure": azure,
    "cohere": cohere,
    "gemini": gemini,
    "ollama": ollama,
    "voyage": voyage,
    "local": local,
    "function": function,
    "fake": fake,
}
# The providers whose models embed in the process that asks, one request at a time.
COMPUTED_HERE = frozenset({"local", "function"})


def provider_of(model: Model) -> Provider:
    try:
        return PROVIDERS[model.provider]
    except KeyError:
        raise Fault(
            f'model "{model.name}" names the provider "{model.provider}", which is not known',
            hint=f"The providers are: {', '.join(sorted(PROVIDERS))}. For a rerank model: create_rerank_model().",
        ) from None


class Sizes(NamedTuple):
    """The most that one request to a model may hold. tokens_per_input None: the provider shortens texts itself."""

    inputs_per_request: int
    tokens_per_request: int
    tokens_per_input: int | None


def sizes_of(model: Model, learnt: Limits | None = None) -> Sizes:
    """The model's own limits, or else its provider's. A request has no more tokens than a minute allows.

    learnt: the limits that the provider's answers told.
    """
    provider = provider_of(model)
    per_request = model.max_tokens_per_request or provider.MAX_TOKENS_PER_REQUEST
    per_minute = (model.tokens_per_minute, learnt.tokens.per_minute if learnt else None)
    per_input = (own_tokens_per_input(model), model.tokens_taken)
    return Sizes(
        model.max_inputs_per_request or provider.MAX_INPUTS_PER_REQUEST,
        min([per_request, *(limit for limit in per_minute if limit is not None)]),
        min((limit for limit in per_input if limit is not None), default=None),
    )


def own_tokens_per_input(model: Model) -> int | None:
    """The most tokens of a text by the model's definition, or else its provider's reference."""
    return model.max_tokens_per_input or provider_of(model).MAX_TOKENS_PER_INPUT


def most_characters_of(model: Model) -> int | None:
    """The characters of a text that a model reads at most; None: not known."""
    return MOST_CHARACTERS if provider_of(model) is local else None


def most_tokens_of(model: Model) -> int | None:
    """The most tokens of a text that a model reads, if that is known."""
    return local.max_tokens(model) if provider_of(model) is local else sizes_of(model).tokens_per_input


@dataclass(frozen=True)
class Counter:
    """How the tokens of a model's documents are counted. most: those that one may have, if that is known.

    most_tokens: an upper bound of `count` for one text.
    """

    count: Callable[[Sequence[str]], list[int]]
    most_tokens: Callable[[str], int]
    is_exact: bool
    most: int | None


def counter_of(model: Model) -> Counter:
    """Counts by the model's own tokenizer where it is at hand. The prefix of documents counts, too."""
    if provider_of(model) is local:
        counter = Counter(local.token_counter(model), most_tokens, True, most_tokens_of(model))
    else:
        counter = Counter(_estimate_all, most_estimated, False, most_tokens_of(model))
    prefix = model.prefix("document")
    if not prefix:
        return counter
    return replace(
        counter,
        count=lambda texts: counter.count([prefix + text for text in texts]),
        most_tokens=lambda text: counter.most_tokens(prefix + text),
    )


def _estimate_all(texts: Sequence[str]) -> list[int]:
    return [estimate_tokens(text) for text in texts]


def check(model: Model) -> None:
    """Raises Fault if the model cannot work as defined, ProviderTrouble if something is not there yet."""
    if not model.model_id.strip():
        raise Fault(
            f'model "{model.name}" has a blank model_id', hint="Give the name by which the provider knows the model."
        )
    provider_of(model).check(model)


def embed(request: Request, network: Network, call_embedder: CallEmbedder) -> Embedded:
    """The vectors of a request's texts, from the provider of its model. Raises Trouble."""
    provider = provider_of(request.model)
    try:
        return provider.embed(request, call_embedder if provider.RUNS_IN_BACKEND else network)
    finally:
        request.sent.set()
