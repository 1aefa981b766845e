"""The ways to speak to a model: texts in, vectors out. One module each; nothing of one provider is known outside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from autoembed.errors import InvalidInput
from autoembed.model import Ask, Embedded, Model
from autoembed.providers import azure, cohere, fake, function, gemini, local, ollama, openai, voyage

if TYPE_CHECKING:
    from autoembed.network import Network


class Provider(Protocol):
    """What a provider's module offers."""

    MAX_INPUTS_PER_REQUEST: int
    MAX_TOKENS_PER_REQUEST: int
    # None: the model truncates by its own tokenizer, so nothing is cut before.
    MAX_TOKENS_PER_INPUT: int | None

    def check(self, model: Model) -> None:
        """Raises InvalidInput if the model cannot work as defined, ProviderTrouble if something is not there yet."""

    def embed(self, ask: Ask, network: Network) -> Embedded:
        """The vectors of the texts. Raises Trouble. Runs in a thread, unless it is one of IN_BACKEND."""

    def abort(self) -> None:
        """Ends what embed() is doing without the network."""


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
# Those that go through the database, which is for the backend's own thread alone.
IN_BACKEND = {"function"}


def provider_of(model: Model) -> Provider:
    try:
        return PROVIDERS[model.provider]
    except KeyError:
        raise InvalidInput(
            f'model "{model.name}" names the provider "{model.provider}", which is not known',
            hint=f"The providers are: {', '.join(sorted(PROVIDERS))}.",
        ) from None
