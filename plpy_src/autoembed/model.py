"""A model as the table autoembed.model defines it; what it is asked, and what it answers."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from autoembed.database import Database

# What a text is embedded as: many models embed a question and the document that answers it in two ways.
Purpose = Literal["document", "query"]
# The options of a model that prefixed() obeys.
PREFIXES = frozenset({"document_prefix", "query_prefix"})


@dataclass(frozen=True)
class Model:
    """A way to embed; the limits are the model's own, None where it leaves them to its provider.

    learnt: the limits that its provider's answers told, a row of autoembed.model_limit; None: it never answered.
    http_hosts: the hosts that may be called without encryption; vault_key: what vault:NAME refers to, or vault_fault:
    why it cannot be had.
    """

    name: str
    provider: str
    model_id: str
    dimensions: int
    base_url: str | None = None
    api_key: str | None = None
    max_inputs_per_request: int | None = None
    max_tokens_per_request: int | None = None
    max_tokens_per_input: int | None = None
    requests_per_minute: int | None = field(default=None, compare=False)
    tokens_per_minute: int | None = field(default=None, compare=False)
    max_requests_in_flight: int | None = field(default=None, compare=False)
    daily_token_budget: int | None = field(default=None, compare=False)
    daily_cost_budget: float | None = field(default=None, compare=False)
    learnt: Mapping[str, int | None] | None = field(default_factory=dict, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    http_hosts: Sequence[str] = field(default=(), hash=False)
    vault_key: str | None = field(default=None, repr=False, compare=False)
    vault_fault: str | None = field(default=None, compare=False)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Model:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})

    def prefix(self, purpose: Purpose) -> str:
        """What goes before each text; see prefixed()."""
        return str(self.options.get(f"{purpose}_prefix", ""))

    @property
    def identity(self) -> str:
        """What makes its vectors others than another's, as the functions that write them know it."""
        return json.dumps(
            [self.provider, self.model_id, self.dimensions, self.prefix("document")], ensure_ascii=False
        )

    def digest(self, content: str) -> bytes:
        """16 bytes that tell whether this text, by this model, has been embedded before."""
        name = f"{self.provider}\0{self.model_id}\0{self.dimensions}\0{self.prefix('document')}"
        return hashlib.blake2b((name + content).encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class Ask:
    """Texts of one model that travel together, what they are, and how long the answer may take.

    headers: is given those of the last answer, whatever its status; sent: is set when only the answer is outstanding;
    database: for the providers of IN_BACKEND.
    """

    model: Model
    texts: Sequence[str]
    timeout_seconds: float
    purpose: Purpose = "document"
    headers: dict[str, str] = field(default_factory=dict, compare=False)
    sent: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)
    database: Database | None = field(default=None, compare=False, repr=False)


def prefixed(ask: Ask) -> list[str]:
    """The texts as a model wants them that knows documents from queries by how they begin.

    E5, BGE, nomic and others say in their cards what to put before each, say "query: " and "passage: ": that is what
    the options document_prefix and query_prefix hold, spaces included.
    """
    return [ask.model.prefix(ask.purpose) + text for text in ask.texts]


class Share(NamedTuple):
    """A pipeline's part in a request (None: embed()'s): its texts, their tokens, the rows they are of."""

    pipeline_id: int | None
    requests: int
    inputs: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class Embedded:
    """What a provider made of them: (n, dimensions) float32, in their order, finite; and the tokens it counted."""

    vectors: np.ndarray
    tokens: int | None = None
