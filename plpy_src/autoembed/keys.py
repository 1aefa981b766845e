"""Finds a provider's key by its reference. A key is never stored, logged or part of an error."""

from __future__ import annotations

import os

from autoembed.errors import ProviderTrouble


def resolve(reference: str | None) -> str | None:
    """The key that env:NAME or file:PATH refers to, None for None; ProviderTrouble (permanent) if there is none."""
    if reference is None:
        return None
    kind, _, name = reference.partition(":")
    if kind == "env":
        key = os.environ.get(name, "")
        missing = f"the environment variable {name} is not set for the database server"
    else:
        key, missing = _read(name)
    key = key.strip()
    if not key:
        raise ProviderTrouble(f"there is no API key: {missing}", permanent=True)
    # An HTTP client would say so too, and quote the key.
    if not (key.isascii() and key.isprintable()):
        raise ProviderTrouble(f"what {reference} holds is no API key: it is not one line of ASCII", permanent=True)
    return key


def _read(path: str) -> tuple[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(), f"the file {path} is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        return "", f"the file {path} cannot be read ({reason})"
