"""The records that the database hands to a pass: messages of the queue, pipelines, backfills and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoembed.model import Model

# A lane reads no longer text, in bytes.
MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class Message:
    """A message of the queue: its number, how often it was read, and its body."""

    id: int
    read_count: int
    body: Any


@dataclass(frozen=True)
class Pipeline:
    """One embedding column of one table.

    vector_type: the column's type with its schema. truncate: texts that are too long are cut instead of failed.
    owner: the OID of the table's owner. blocked: why the jobs must wait; None: they need not.
    failures: how often the provider of the model has failed in a row.
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


@dataclass(frozen=True)
class Backfill:
    """A table that is being scanned.

    after: the last key that was queued; None: none yet. condition: which rows are wanted; None: all.
    failures: how often the provider of the model has failed in a row. owner: the OID of the table's owner.
    """

    pipeline_id: int
    owner: int
    after: str | None
    condition: str | None
    failures: int


@dataclass(frozen=True)
class Row:
    """A row as it is now: its text, whether it has an embedding, and the size of the text.

    A text of more than MAX_TEXT_BYTES is not read: it is None then.
    """

    content: str | None
    has_embedding: bool
    bytes: int = 0
