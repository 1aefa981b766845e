"""Django's models, whose save() writes all columns of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import InternalError, connection, connections, models, transaction
from pgvector.django import CosineDistance, HalfVectorField

from harness import Server
from interop.conftest import Documents
from interop.django_settings import APP_LABEL


class Document(models.Model):
    title = models.TextField()
    body = models.TextField()
    views = models.IntegerField(default=0)
    embedding = HalfVectorField(dimensions=1536, null=True, editable=False)

    class Meta:
        app_label = APP_LABEL
        db_table = "documents"
        managed = False


@pytest.fixture(autouse=True)
def database(server: Server, dbname: str, documents: Documents) -> Iterator[None]:
    """Django's connection goes to the test's database."""
    connections["default"].settings_dict.update(NAME=dbname, PORT=server.port, USER="postgres")
    yield
    connection.close()


def inputs(documents: Documents) -> int:
    return len(documents.api.texts())


def test_an_object_that_is_saved_after_its_creation_keeps_its_vector(documents: Documents) -> None:
    document = Document.objects.create(title="race", body="one")
    documents.embed()
    assert document.embedding is None

    document.views += 1
    document.save()

    documents.assert_right()


def test_an_object_with_an_old_vector_gets_that_of_its_new_text(documents: Documents) -> None:
    Document.objects.create(title="t", body="one")
    documents.embed()
    mine, other = Document.objects.get(), Document.objects.get()
    other.body = "two"
    other.save()
    documents.embed()

    mine.body = "three"
    mine.save()

    documents.assert_right()


def test_an_object_with_an_old_vector_and_the_text_that_is_there_keeps_the_right_one(documents: Documents) -> None:
    Document.objects.create(title="t", body="one")
    documents.embed()
    mine = Document.objects.get()
    Document.objects.update(body="two")
    documents.embed()

    mine.body = "two"
    mine.save()

    documents.assert_right()


def test_saves_that_change_neither_text_nor_vector_cost_nothing(documents: Documents) -> None:
    Document.objects.create(title="t", body="one")
    documents.embed()
    document = Document.objects.get()
    for _ in range(20):
        document.views += 1
        document.save()
    documents.assert_right()
    assert inputs(documents) == 1


def test_saves_that_clear_the_vector_cost_a_request_each_at_most(documents: Documents) -> None:
    document = Document.objects.create(title="t", body="one")
    documents.embed()
    for _ in range(4):
        document.views += 1
        document.save()
        documents.embed()
    documents.assert_right()
    assert inputs(documents) <= 5


@pytest.mark.parametrize("times", [1, 2])
def test_rows_that_are_written_in_bulk_are_embedded(documents: Documents, times: int) -> None:
    for number in range(times):
        Document.objects.bulk_create(
            [Document(id=key, title="t", body=f"text {key * number}") for key in range(1, 51)],
            update_conflicts=True,
            unique_fields=["id"],
            update_fields=["title", "body", "views", "embedding"],
        )
        documents.assert_right()
    some = list(Document.objects.all()[:20])
    for document in some:
        document.body += " more"
        document.embedding = None
    Document.objects.bulk_update(some, ["body", "embedding"])
    Document.objects.update_or_create(id=30, defaults={"body": "other"})
    documents.assert_right()


def test_a_row_is_found_by_its_text(documents: Documents) -> None:
    for body in ("one", "two", "three"):
        Document.objects.create(title="t", body=body)
    documents.embed()

    class Embed(models.Func):
        function = "autoembed.embed"
        output_field = HalfVectorField()

    query: Any = models.functions.Cast(Embed(models.Value("two")), HalfVectorField(dimensions=1536))
    nearest = Document.objects.annotate(distance=CosineDistance("embedding", query)).order_by("distance").first()

    assert nearest is not None
    assert nearest.body == "two"


def test_a_renamed_field_is_followed(documents: Documents) -> None:
    Document.objects.create(title="t", body="one")
    documents.embed()
    new = models.TextField()
    new.set_attributes_from_name("content")
    with connection.schema_editor() as editor:
        editor.alter_field(Document, Document._meta.get_field("body"), new)
        editor.execute("UPDATE documents SET content = 'two'")
        editor.execute("ALTER TABLE documents RENAME COLUMN content TO body")

    documents.assert_right()


def test_a_wait_in_the_transaction_of_a_change_is_an_error_at_once(documents: Documents) -> None:
    with pytest.raises(InternalError, match="its own transaction"), transaction.atomic():
        Document.objects.create(title="t", body="one")
        with connection.cursor() as cursor:
            cursor.execute("SELECT autoembed.wait_until_fresh('documents', 600)")
