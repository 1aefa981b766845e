"""Finds a provider's key by its reference. A key is never stored, logged or part of an error."""

from __future__ import annotations

import os
import re

from autoembed.errors import ProviderTrouble
from autoembed.model import Model

# Variables that hold secrets of the server itself.
SERVER_VARIABLES = re.compile(r"(POSTGRES|PG)[A-Z_]*", re.IGNORECASE)
REFERENCE = re.compile(r"(env|file|vault):.+", re.DOTALL)


def resolve(model: Model) -> str | None:
    """The key that a model refers to, None if it needs none; ProviderTrouble (permanent) if it cannot be had."""
    return None if model.api_key is None else _resolved(model, model.api_key, "API key")


def resolve_headers(model: Model) -> dict[str, str]:
    """The option extra_headers, each reference replaced by what it refers to; ProviderTrouble if that cannot be had."""
    return {
        name: _resolved(model, value, f"value for the header {name}") if is_reference(value) else value
        for name, value in model.options.get("extra_headers", {}).items()
    }


def is_reference(value: str) -> bool:
    return REFERENCE.fullmatch(value) is not None


def _resolved(model: Model, reference: str, what: str) -> str:
    """The secret that a reference names.

    env:NAME and file:PATH are read now. The secret behind vault:NAME has come with the model, because threads must not
    use the database.
    """
    kind, _, name = reference.partition(":")
    if kind == "env":
        if SERVER_VARIABLES.fullmatch(name):
            raise ProviderTrouble(f"there is no {what}: {name} is the database server's own", permanent=True)
        secret = os.environ.get(name, "")
        missing = f"the environment variable {name} is not set for the database server"
    elif kind == "vault":
        vault_secret = model.vault_secrets.get(reference, {})
        secret = vault_secret.get("vault_key") or ""
        missing = vault_secret.get("vault_fault") or f'the vault has no secret "{name}"'
    else:
        secret, missing = _read(name)
    secret = secret.strip()
    if not secret:
        raise ProviderTrouble(f"there is no {what}: {missing}", permanent=True)
    # An HTTP client would say so too, and quote the secret.
    if not (secret.isascii() and secret.isprintable()):
        raise ProviderTrouble(f"what {reference} holds is no {what}: it is not one line of ASCII", permanent=True)
    return secret


def _read(path: str) -> tuple[str, str]:
    if os.path.basename(path) == ".pgpass" or path == os.environ.get("POSTGRES_PASSWORD_FILE"):
        return "", f"the file {path} is the database server's own"
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(), f"the file {path} is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        return "", f"the file {path} cannot be read ({reason})"
