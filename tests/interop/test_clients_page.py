"""The Python of docs/clients.md runs with real models, on the table of that page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections, models
from sqlalchemy import URL, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from harness import HOST, PASSWORD, Connection, Server
from interop.django_settings import APP_LABEL

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
MIGRATION = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)[0]
PYTHON = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
QUESTION = "take a nap"
# What the page's Python takes from the application.
INPUT = {"question": QUESTION, "title": "o'ne", "page": 0}
FILTERED = ", a page of a search with a filter"


class Article(models.Model):
    title = models.TextField()
    body = models.TextField()

    class Meta:
        app_label = APP_LABEL
        managed = False
        db_table = "articles"


class Base(DeclarativeBase):
    pass


class MappedArticle(Base):
    __tablename__ = "articles"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str]


def snippet(name: str) -> str:
    """The part of the page's Python under the comment with this name."""
    part: str
    [part] = re.findall(rf"# {name}(?:;[^\n]*)?\n(.*?)(?:\n\n|\Z)", PYTHON, re.DOTALL)
    return part.strip()


@pytest.fixture
def articles(db: Connection) -> None:
    db.execute(MIGRATION)
    db.execute(
        "INSERT INTO articles (title, body) VALUES ('one', %s), ('two', 'roll back a mistake'), ('o''ne', 'a nap')",
        [QUESTION],
    )
    db.execute("SELECT autoembed.process()")


@pytest.fixture
def session(server: Server, dbname: str, articles: None) -> Iterator[Session]:
    engine = create_engine(URL.create("postgresql+psycopg", "postgres", PASSWORD, HOST, server.port, dbname))
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.mark.parametrize(("name", "titles"), [("", {"one", "two", "o'ne"}), (FILTERED, {"one", "two"})])
def test_django_makes_objects_of_a_search(
    server: Server, dbname: str, articles: None, name: str, titles: set[str]
) -> None:
    connections["default"].settings_dict.update(NAME=dbname, PORT=server.port, USER="postgres")

    found: Any = eval(snippet(f"Django{name}"), {"Article": Article, **INPUT})

    best, *others = [article.title for article in found]
    assert best == "one"
    assert {best, *others} == titles
    connection.close()


@pytest.mark.parametrize(("name", "titles"), [("", {"one", "two", "o'ne"}), (FILTERED, {"one", "two"})])
def test_sqlalchemy_makes_objects_of_a_search(session: Session, name: str, titles: set[str]) -> None:
    statements, _, expression = snippet(f"SQLAlchemy{name}").rpartition("\n")
    names = {"text": text, "select": select, "session": session, "Article": MappedArticle, **INPUT}
    exec(statements, names)

    found: Any = eval(expression, names)

    best, *others = [article.title for article in found]
    assert best == "one"
    assert {best, *others} == titles
