"""Finds a provider's key by its reference. A key is never stored, logged or part of an error."""

from __future__ import annotations

import os

from autoembed.errors import ProviderTrouble
from autoembed.model import Model


def resolve(model: Model) -> str | None:
    """The key that a model refers to; None if it needs none. Raises ProviderTrouble (permanent) without a usable key.

    env:NAME and file:PATH are read now. The secret behind vault:NAME has come with the model, because threads must not
    use the database.
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
    # An HTTP client would also refuse it, but quote the key.
    if not (key.isascii() and key.isprintable()):
        raise ProviderTrouble(
            f"the value at {model.api_key} is not an API key: it is not one line of ASCII", permanent=True
        )
    return key


def _read(path: str) -> tuple[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(), f"the file {path} is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        return "", f"the file {path} cannot be read ({reason})"
