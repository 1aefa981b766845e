"""SQLAlchemy's models, and upserts of whole rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pgvector.sqlalchemy import HALFVEC
from sqlalchemy import URL, cast, create_engine, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from harness import HOST, PASSWORD, Server
from interop.conftest import Documents


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "documents"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str]
    views: Mapped[int] = mapped_column(default=0)
    embedding: Mapped[Any] = mapped_column(HALFVEC(1536), nullable=True)


@pytest.fixture
def session(server: Server, dbname: str, documents: Documents) -> Iterator[Session]:
    url = URL.create("postgresql+psycopg", "postgres", PASSWORD, HOST, server.port, dbname)
    engine = create_engine(url)
    with Session(engine, expire_on_commit=False) as session:
        yield session
    engine.dispose()


def test_rows_are_embedded_and_a_change_of_another_column_costs_nothing(session: Session, documents: Documents) -> None:
    session.add_all([Document(title="t", body=f"text {number}") for number in range(30)])
    session.commit()
    documents.assert_right()

    for document in session.scalars(select(Document)):
        document.views += 1
    session.commit()

    documents.assert_right()
    assert len(documents.api.texts()) == 30


def test_an_object_that_was_loaded_before_its_vector_changed_is_written_with_its_new_text(
    session: Session, documents: Documents
) -> None:
    document = Document(title="t", body="one")
    session.add(document)
    session.commit()
    documents.embed()

    document.body = "two"
    document.embedding = None
    session.commit()

    documents.assert_right()


def test_a_detached_object_that_is_merged_leaves_the_right_vector(session: Session, documents: Documents) -> None:
    session.add(Document(id=1, title="t", body="one"))
    session.commit()
    documents.embed()
    session.expunge_all()

    session.merge(Document(id=1, title="t", body="one", views=5, embedding=[0.5] * 1536))
    session.commit()

    documents.assert_right()


@pytest.mark.parametrize("vector", [None, [0.25] * 1536])
def test_an_upsert_of_whole_rows_leaves_the_right_vectors(session: Session, documents: Documents, vector: Any) -> None:
    rows = [{"id": key, "title": "t", "body": f"text {key}", "views": 0, "embedding": vector} for key in range(1, 11)]
    for views in range(3):
        statement = insert(Document).values([{**row, "views": views} for row in rows])
        written = {name: statement.excluded[name] for name in ("title", "body", "views", "embedding")}
        session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=written))
        session.commit()
        documents.assert_right()


def test_a_search_orders_by_the_distance_to_a_text(session: Session, documents: Documents) -> None:
    session.add_all([Document(title="t", body=body) for body in ("one", "two", "three")])
    session.commit()
    documents.embed()

    query = cast(select(func.autoembed.embed("three")).scalar_subquery(), HALFVEC(1536))
    nearest = session.scalars(select(Document).order_by(Document.embedding.cosine_distance(query)).limit(1)).one()

    assert nearest.body == "three"
