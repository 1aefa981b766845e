"""A model as the table autoembed.model defines it, and what the path of a job needs to know of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """A way to embed; the limits are the model's own, None where it leaves them to its provider."""

    name: str
    provider: str
    model_id: str
    dimensions: int
    base_url: str | None = None
    api_key: str | None = None
    max_inputs_per_request: int | None = None
    max_tokens_per_request: int | None = None
    max_tokens_per_input: int | None = None

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Model:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    def digest(self, content: str) -> bytes:
        """16 bytes that tell whether this text, by this model, has been embedded before."""
        name = f"{self.provider}\0{self.model_id}\0{self.dimensions}\0"
        return hashlib.blake2b((name + content).encode("utf-8", "surrogatepass"), digest_size=16).digest()
