"""The steps that the tests in this folder share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from harness import Connection

Connect = Callable[..., Connection]
Role = Callable[[str], str]

MODEL = "text-embedding-3-small"


def one(db: Connection, sql: str, *arguments: object) -> Any:
    [row] = db.execute(sql.encode(), arguments or None).fetchall()
    return row


def status(db: Connection) -> Any:
    return one(db, "SELECT * FROM autoembed.status WHERE table_name = 'notes'")


def add(db: Connection, first: int, last: int, content: str = "note") -> None:
    db.execute(
        "INSERT INTO notes SELECT n, %s || n FROM generate_series(%s::int, %s::int) AS n", [content, first, last]
    )


def process(db: Connection) -> None:
    """Embeds all that can be."""
    db.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
    while one(db, "SELECT read FROM autoembed.process()").read:
        pass
    db.execute("SELECT autoembed.process()")


def statements(advice: str) -> list[str]:
    """The SQL that stands in an advice: a call up to its bracket, a command up to a semicolon or an alternative."""
    return re.findall(r"SELECT .*?\)(?=[.; ]|$)|(?:ALTER|CREATE|DELETE) .*?(?=;|, or |$)", advice)
