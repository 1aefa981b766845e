"""Finds a provider's key by its reference. A key is never stored, logged or part of an error."""

from __future__ import annotations

import os

from autoembed.errors import ProviderTrouble
from autoembed.model import Model


def resolve(model: Model) -> str | None:
    """The key that a model refers to, None if it needs none; ProviderTrouble (permanent) if it cannot be had.

    env:NAME and file:PATH are looked up now. The vault is in the database, where threads may not go: what vault:NAME
    refers to has come with the model.
    """
    if model.api_key is None:
        return None
    kind, _, name = model.api_key.partition(":")
    if kind == "env":
        key = os.environ.get(name, "")
        missing = f"the environment variable {name} is not set for the database server"
    elif kind == "vault":
        key, missing = model.vault_key or "", model.vault_fault or f'the vault has no secret "{name}"'
    else:
        key, missing = _read(name)
    key = key.strip()
    if not key:
        raise ProviderTrouble(f"there is no API key: {missing}", permanent=True)
    # An HTTP client would say so too, and quote the key.
    if not (key.isascii() and key.isprintable()):
        raise ProviderTrouble(f"what {model.api_key} holds is no API key: it is not one line of ASCII", permanent=True)
    return key


def _read(path: str) -> tuple[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(), f"the file {path} is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        return "", f"the file {path} cannot be read ({reason})"
