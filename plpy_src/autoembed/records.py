"""The records that the database hands to a pass: messages of the queue, pipelines, backfills and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoembed.model import Model


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
    trusted: the table's owner is a superuser. blocked: why the jobs must wait; None: they need not.
    failures: how often the provider of the model has failed in a row.
    """

    id: int
    schema_name: str
    table_name: str
    content_function: str
    embedding_column: str
    vector_type: str
    truncate: bool
    trusted: bool
    blocked: str | None
    failures: int
    model: Model


@dataclass(frozen=True)
class Backfill:
    """A table that is being scanned.

    after: the last key that was queued; None: none yet. condition: which rows are wanted; None: all.
    failures: how often the provider of the model has failed in a row.
    """

    pipeline_id: int
    after: str | None
    condition: str | None
    failures: int


@dataclass(frozen=True)
class Row:
    """A row as it is now: its text, and whether it has an embedding."""

    content: str | None
    has_embedding: bool
