"""Checks of a model's definition that several providers share. Each raises Fault."""

from __future__ import annotations

from autoembed.errors import Fault
from autoembed.model import Model


def check_without(model: Model, *names: str) -> None:
    """Checks that a model inside the server has none of these, which only a provider elsewhere needs."""
    for name in names:
        if getattr(model, name) is not None:
            raise Fault(f'model "{model.name}" runs inside the server and takes no {name}', hint=f"Leave {name} out.")


def check_options(model: Model, texts: frozenset[str], objects: frozenset[str] = frozenset()) -> None:
    """Checks that the provider knows each option, and that it is a text or an object, whichever it must be."""
    check_option_names(model, texts | objects)
    for kind, type_, names in (("a text", str, texts), ("an object", dict, objects)):
        for name in sorted(names & model.options.keys()):
            if not isinstance(model.options[name], type_):
                raise Fault(f'option {name} of model "{model.name}" is not {kind}', hint=f"Give {name} as {kind}.")


def check_option_names(model: Model, known: frozenset[str]) -> None:
    """Checks that the provider knows each option."""
    unknown = sorted(model.options.keys() - known)
    if unknown:
        raise Fault(
            f'model "{model.name}" has the option {unknown[0]}, which the provider {model.provider} does not know',
            hint=f"Its options are: {', '.join(sorted(known)) or 'none'}.",
        )


def check_tokens_per_input(model: Model, most: int) -> None:
    """Checks that the limit of a model which takes shorter texts than others of its provider says so."""
    if model.max_tokens_per_input is None or model.max_tokens_per_input > most:
        raise Fault(
            f'model "{model.name}" is {model.model_id}, which takes at most {most} tokens of a text',
            hint=f"Set max_tokens_per_input => {most}.",
        )
