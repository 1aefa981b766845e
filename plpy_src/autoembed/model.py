"""A model as the table autoembed.model defines it, a request to it, and its answer."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from autoembed.long_text import Text

# The role of a text. Many models embed a question and the document that answers it in two ways. rerank: a passage that
# is compared with a query.
Purpose = Literal["document", "query", "rerank"]
# So much of a text is encoded at once.
HASHED_CHARACTERS = 1 << 20
# The options that prefixed() obeys.
PREFIXES = frozenset({"document_prefix", "query_prefix"})


def add_text(update: Callable[[bytes], None], text: Text) -> None:
    """Adds a text to a digest, without a copy of the whole."""
    for start in range(0, len(text), HASHED_CHARACTERS):
        update(text[start : start + HASHED_CHARACTERS].encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Model:
    """One row of autoembed.model, and what it refers to. A limit that is None is left to the provider.

    dimensions: 0: it reranks, and makes no vectors.
    identity: a JSON array that SQL makes. Two models with the same identity produce interchangeable vectors.
    learnt: the limits in the provider's answers, by the names in autoembed.model_limit; None: it never answered.
    http_hosts: the hosts that may be called without encryption.
    vault_secrets: by reference, vault:NAME, its vault_key, or its vault_fault: why it cannot be had.
    """

    name: str
    provider: str
    model_id: str
    dimensions: int
    identity: str = field(default="", compare=False)
    base_url: str | None = None
    api_key: str | None = None
    max_inputs_per_request: int | None = None
    max_tokens_per_request: int | None = None
    max_tokens_per_input: int | None = None
    requests_per_minute: int | None = field(default=None, compare=False)
    tokens_per_minute: int | None = field(default=None, compare=False)
    max_requests_in_flight: int | None = field(default=None, compare=False)
    timeout_seconds: float | None = field(default=None, compare=False)
    daily_token_budget: int | None = field(default=None, compare=False)
    daily_cost_budget: float | None = field(default=None, compare=False)
    learnt: Mapping[str, int | None] | None = field(default_factory=dict, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    http_hosts: Sequence[str] = field(default=(), hash=False)
    vault_secrets: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Model:
        fields = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        return cls(**{**fields, "dimensions": row["dimensions"] or 0})

    @property
    def reranks(self) -> bool:
        return self.dimensions == 0

    @property
    def tokens_taken(self) -> int | None:
        """The tokens of a text that the provider is known to take, since it refused a longer one."""
        return (self.learnt or {}).get("tokens_per_input")

    @property
    def inputs_taken(self) -> int | None:
        """The texts of a request that the provider is sent, since it did not answer more in time."""
        return (self.learnt or {}).get("inputs_per_request")

    def prefix(self, purpose: Purpose) -> str:
        """The text that goes before each text; see prefixed()."""
        return str(self.options.get(f"{purpose}_prefix", ""))

    def extra_body(self, purpose: Purpose) -> dict[str, Any]:
        """The fields that the options add to a request: to each one, and to those of documents or of queries."""
        return {**self.options.get("extra_body", {}), **self.options.get(f"{purpose}_body", {})}

    def digest(self, content: Text, way: str = "") -> bytes:
        """16 bytes that tell whether this model has embedded this text in this way before."""
        digest = hashlib.blake2b((self._salt + way).encode("utf-8", "surrogatepass"), digest_size=16)
        add_text(digest.update, content)
        return digest.digest()

    def chunk_digest(self, chunk: str) -> bytes:
        """16 bytes that tell whether this model has embedded this chunk before. search() computes it in SQL."""
        return hashlib.sha256(self._chunk_salt + chunk.encode("utf-8", "surrogatepass")).digest()[:16]

    @cached_property
    def _chunk_salt(self) -> bytes:
        return hashlib.sha256(self.identity.encode()).digest()

    @cached_property
    def _salt(self) -> str:
        return "\0".join(map(str, json.loads(self.identity)))


class Trial(NamedTuple):
    """The beginning of a text that was refused for its length: so many tokens of it, to see whether they are taken."""

    text: str
    tokens: int


@dataclass(eq=False)
class Request:
    """Texts of one model that travel together, and how long the answer may take.

    probe: the text is a harmless one, to see whether the model accepts any. suspect: one of the texts may be the reason
    that a larger request failed. trial: the text is the beginning of one that was refused. tokens: the estimate that a
    permit was taken for. slot: the request's own, where the number of requests in flight is limited. query: that with
    which the texts are compared, if they are to be reranked. sent_at: as time.monotonic() has it. sent: set when only
    the answer is outstanding. stopped: set when nobody waits for the answer any more.
    """

    model: Model
    texts: Sequence[str]
    timeout_seconds: float
    purpose: Purpose = "document"
    probe: bool = False
    suspect: bool = False
    trial: Trial | None = None
    tokens: int = 0
    slot: int | None = None
    query: str | None = None
    sent_at: float = 0.0
    sent: threading.Event = field(default_factory=threading.Event, repr=False)
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)


def prefixed(request: Request) -> list[str]:
    """The texts, each behind the prefix that tells the model whether it is a document or a query.

    The cards of E5, BGE, nomic and others name these prefixes, for example "query: " and "passage: ". The options
    document_prefix and query_prefix hold them, spaces included.
    """
    prefix = request.model.prefix(request.purpose)
    return [prefix + text for text in request.texts]


class Share(NamedTuple):
    """The part of a request that belongs to one pipeline (None: to embed()): texts, their tokens, and their rows."""

    pipeline_id: int | None
    requests: int
    inputs: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class Embedded:
    """The answer to a request.

    vectors: (n, dimensions) float32, finite, in the order of the texts. tokens: as the provider counted them.
    headers: those of the HTTP answer, in lower case. seconds: the time that it took this process; None: another one.
    cut: the positions of the texts that the model has cut by itself, as far as it tells.
    """

    vectors: np.ndarray
    tokens: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)
    seconds: float | None = field(default=None, compare=False)
    cut: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Reranked:
    """The answer to a request for scores.

    scores: finite, in the order of the texts; the higher, the better. tokens, headers: as in Embedded.
    """

    scores: Sequence[float]
    tokens: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)
