"""The records that the database hands to a pass: messages of the queue, pipelines, backfills and rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

from autoembed.long_text import LongText, Text
from autoembed.model import Model, add_text

if TYPE_CHECKING:
    import numpy as np

# A lane reads no longer text, in bytes.
MAX_TEXT_BYTES = 64 << 20
# A text of more bytes is kept as UTF-8 where it is cut into chunks.
LONG_TEXT_BYTES = 1 << 20
# An owner's function cuts a text into no more pieces.
MAX_PIECES = 100_000
# A text may begin with many equal chunks. So many of them may be the first one of those that were written.
TRIED_PLACES = 100
# The record of a row has this digest of its vector if a lane's write has changed the row by a trigger.
ECHO = b"\0"
# So many times within an hour, a vector that somebody else has replaced is made again at once.
FREE_REPLACEMENTS = 5
# After that the waits double, up to this, in seconds.
MAX_REPLACEMENT_SECONDS = 600.0


@dataclass(frozen=True)
class Message:
    """A message of the queue: its number, how often it was read, and its body."""

    id: int
    read_count: int
    body: Any


@dataclass(frozen=True)
class Pipeline:
    """One embedding column of one table.

    is_beside: the embeddings are in a table beside the rows, one for each chunk of a row's text.
    chunking, chunk_size, chunk_overlap: how a text is cut into chunks; see enable(). splitter: tells one body of the
    function that cuts from another; None: no function does. chunk_prefix: the template of what each chunk is embedded
    behind; None: nothing.
    vector_type: the column's type with its schema. truncate: texts that are too long are cut instead of failed.
    owner: the OID of the table's owner. blocked: why the jobs must wait; None: they need not.
    failures: how often the provider of the model has failed in a row.
    text_config: the text search configuration of its text index; None: it has no text index.
    was_rebuilt: its functions were missing or outdated until now.
    """

    id: int
    schema_name: str
    table_name: str
    owner: int
    content_function: str
    embedding_column: str
    vector_type: str
    truncate: bool
    blocked: str | None
    failures: int
    model: Model
    is_beside: bool = False
    chunking: str = "none"
    chunk_size: int | None = None
    chunk_overlap: int = 0
    text_config: str | None = None
    splitter: str | None = None
    chunk_prefix: str | None = None
    was_rebuilt: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.schema_name}.{self.table_name}.{self.embedding_column}"

    @property
    def may_cut(self) -> bool:
        """Whether a text that is too long for the model is made shorter: cut, or cut into more chunks."""
        return self.truncate or self.chunking != "none"

    def digest(self, content: Text, prefix: str = "") -> bytes:
        """16 bytes that tell whether a row's embeddings were made of this text, behind this prefix, in this way."""
        if self.chunking == "none" and not prefix:
            return self.model.digest(content)
        # No text in a database has a zero byte.
        return self.model.digest(content, f"{self._way}{prefix}\0" if prefix else self._way)

    @cached_property
    def _way(self) -> str:
        way = self.chunking if self.splitter is None else f"{self.chunking} {self.splitter}"
        return f"{way}\0{self.chunk_size}\0{self.chunk_overlap}\0"


@dataclass(frozen=True)
class Backfill:
    """A table that is being scanned.

    after: the last key that was queued; None: none yet. condition: which rows are wanted; None: all.
    failures: how often the provider of the model has failed in a row. owner: the OID of the table's owner.
    problem: the reason why the condition may not run; None: it may.
    """

    pipeline_id: int
    owner: int
    after: str | None
    condition: str | None
    failures: int
    model: str = ""
    provider: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Row:
    """A row as it is now: its text, the digest of its vector (None: it has no vector), and the size of the text.

    A text of more than MAX_TEXT_BYTES is not read: it is None then. is_locked: another session has locked the row.
    digests, numbers: those of the chunks that have an embedding beside the row. prefix: what its chunks are embedded
    behind. own_key: its key as the row has it, if the message has an equal one that is written in another way.
    version: as long as the row has it, its text is the same; None: that is not certain.
    """

    content: Text | None
    vector_digest: bytes | None
    size: int = 0
    digests: Sequence[bytes] = ()
    numbers: Sequence[int] = ()
    is_locked: bool = False
    prefix: str = ""
    own_key: str | None = None
    version: str | None = None

    @cached_property
    def text_digest(self) -> bytes | None:
        """SHA-256 of the text."""
        return None if self.content is None else sha256_of(self.content)

    def keep_beginning(self, characters: int) -> None:
        """Forgets what is behind the first characters of a long text, once its digest is known."""
        if isinstance(self.content, LongText) and self.text_digest is not None:
            self.content.shorten(characters)


@dataclass(frozen=True)
class Known:
    """The record of a row: the digests of its text and of its vector.

    vector_digest: None: not known. replaced: how often in a row somebody else has replaced the vector, or the write of
    the vector has changed the text.
    age_seconds: the time since the vector was written; None: not known.
    """

    digest: bytes
    vector_digest: bytes | None
    replaced: int = 0
    age_seconds: float | None = None

    @property
    def keeps_vectors(self) -> bool:
        """Whether vectors beside the row are those of their chunks.

        A row that is embedded again by request has an empty digest, and one with vectors of somebody else, too.
        """
        return bool(self.digest) and self.vector_digest != b""

    def describes(self, row: Row, digest: bytes) -> bool:
        """Whether the row has the vector that was written for the text of this digest."""
        if self.digest != digest or row.vector_digest is None:
            return False
        return self.vector_digest is None or self.vector_digest == row.vector_digest

    def wait_seconds(self, digest: bytes) -> float:
        """The time for which a vector of a text of this digest is not made again, because that would not end."""
        if self.replaced < FREE_REPLACEMENTS or digest != self.digest and self.vector_digest != ECHO:
            return 0.0
        wait = min(2.0 ** (self.replaced - FREE_REPLACEMENTS), MAX_REPLACEMENT_SECONDS)
        return max(0.0, wait - (self.age_seconds or 0.0))


@dataclass(frozen=True)
class Written:
    """The outcome of a row's write: written, changed, skipped (by a trigger), locked or gone; and its vector.

    version: that of the row, beside which the vectors were written.
    """

    outcome: str
    vector_digest: bytes | None = None
    version: str | None = None


def digest_of_chunks(digests: Iterable[bytes]) -> bytes | None:
    """8 bytes that tell whether a row has these embeddings beside it; None: it has none."""
    together = b"".join(digests)
    return hashlib.sha256(together).digest()[:8] if together else None


def sha256_of(text: Text) -> bytes:
    """SHA-256 of a text, as SQL computes it of the text of a row."""
    digest = hashlib.sha256()
    add_text(digest.update, text)
    return digest.digest()


@dataclass(eq=False, slots=True)
class Chunk:
    """A part of a row's text, from its first character to the one behind its last. digest: of the model and the part.

    vector: (dimensions,) float32; None: not known yet, or in the row's embeddings already (is_kept). number: that of
    the chunk in the row, and source: that of the one from which a kept vector comes.
    """

    start: int
    end: int
    digest: bytes
    is_kept: bool = False
    vector: np.ndarray | None = None
    number: int = 1
    source: int | None = None


def changes(row: Row, chunks: Sequence[Chunk]) -> int:
    """The number of places at which a row has another chunk than these, or none."""
    if not row.digests:
        return len(chunks)
    return sum(one != other for one, other in zip_longest(row.digests, [chunk.digest for chunk in chunks]))


def first_number(row: Row, digests: Sequence[bytes]) -> int:
    """The number that the first chunk of a text gets, if its chunks are written in parts.

    The chunks that the row has keep their numbers, so that they stay until the last part is there. Where the last ones
    are the first ones of the text, a lane has written them, or the text goes on where it ended.
    """
    old = list(row.digests)
    if not old:
        return 1
    begun = (place for place, digest in enumerate(old) if digest == digests[0])
    for place in islice(begun, TRIED_PLACES):
        if old[place:] == list(digests[: len(old) - place]):
            return row.numbers[place]
    return row.numbers[-1] + 1
