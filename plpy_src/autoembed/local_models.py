"""Where a local model lies on the server, and how much of a text it reads."""

from __future__ import annotations

import os

MODELS_FOLDER = "/usr/local/share/autoembed/models"
DEFAULT_MAX_TOKENS = 256
# No more characters of a text are read. A megabyte costs 0.4 s, in which nothing interrupts, and 120 MB.
MOST_CHARACTERS = 1 << 19


def folder_of(base_url: str | None, model_id: str) -> str:
    return base_url or os.path.join(MODELS_FOLDER, model_id)


def max_tokens_of(max_tokens_per_input: int | None) -> int:
    return max_tokens_per_input or DEFAULT_MAX_TOKENS
