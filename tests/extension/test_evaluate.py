"""evaluate_search(): how good search() answers, by judgments in a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from autoembed.quality import Quality, quality_of, summary
from fake_api import FakeApi
from harness import Connection, warnings_of

TEXTS = {1: "red apple pie", 2: "green apple", 3: "pear tart", 4: "plum", 5: "apple apple apple"}
JUDGED = {"apple": {5: 2.0, 2: 1.0}, "a pear": {3: 1.0}, "plum": {4: 3.0, 1: 1.0}, "cherry": {2: 1.0}}


@pytest.fixture
def pages(db: Connection, api: FakeApi) -> Connection:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.cursor().executemany("INSERT INTO pages VALUES (%s, %s)", list(TEXTS.items()))
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}', text_config => 'english')")
    db.execute("SELECT autoembed.process()")
    db.execute("CREATE TABLE judged (query text, key int, grade real)")
    rows = [(query, key, grade) for query, grades in JUDGED.items() for key, grade in grades.items()]
    db.cursor().executemany("INSERT INTO judged VALUES (%s, %s, %s)", rows)
    db.execute("INSERT INTO judged VALUES ('plum', 5, 0), ('nothing', 1, 0), (NULL, 1, 1), ('nothing', NULL, 1)")
    return db


def expected(db: Connection, most: int = 3, **options: Any) -> tuple[Quality, Quality, Quality]:
    """The same by calls of search(), one by one."""
    named = "".join(f", {name} => %s" for name in options)
    answers = []
    for query, grades in sorted(JUDGED.items()):
        search = f"SELECT (s.hit).id FROM autoembed.search(NULL::pages, %s, %s{named}) AS s ORDER BY s.rank"
        keys = [row.id for row in db.execute(search.encode(), [query, most, *options.values()])]
        answers.append(quality_of([grades.get(key, 0.0) for key in keys], list(grades.values()), most))
    return summary(answers)


def test_each_mode_and_weight_is_measured_and_the_best_comes_first(pages: Connection) -> None:
    rows = pages.execute("SELECT * FROM autoembed.evaluate_search('pages', 'judged', 3)").fetchall()

    assert sorted((row.mode, row.vector_weight) for row in rows if row.vector_weight is not None) == [
        ("hybrid", weight) for weight in (0.3, 0.5, 0.7, 0.9)
    ]
    assert {row.mode for row in rows if row.vector_weight is None} == {"vector", "text"}
    assert [row.ndcg for row in rows] == sorted((row.ndcg for row in rows), reverse=True)
    assert {row.queries for row in rows} == {len(JUDGED)}
    for row in rows:
        options = {"mode": row.mode} | ({} if row.vector_weight is None else {"vector_weight": row.vector_weight})
        mean, low, high = expected(pages, **options)
        assert (row.ndcg, row.mrr, row.recall) == pytest.approx(mean)
        assert (row.ndcg_low, row.mrr_low, row.recall_low) == pytest.approx(low)
        assert (row.ndcg_high, row.mrr_high, row.recall_high) == pytest.approx(high)
    again = pages.execute("SELECT * FROM autoembed.evaluate_search('pages', 'judged', 3)").fetchall()
    assert again == rows


@pytest.mark.parametrize("key", ["key", "key::text", "'[' || key || ']'", "jsonb_build_array(key)"])
def test_a_key_may_be_written_as_the_row_or_as_search_has_it(pages: Connection, key: str) -> None:
    columns = "mode, vector_weight, ndcg, mrr, recall, queries"
    pages.execute("DELETE FROM judged WHERE num_nulls(query, key) > 0")
    expected = pages.execute(f"SELECT {columns} FROM autoembed.evaluate_search('pages', 'judged')").fetchall()
    pages.execute(f"CREATE VIEW other AS SELECT query, {key} AS key, grade FROM judged WHERE key > 0".encode())

    with warnings_of(pages) as heard:
        found = pages.execute(f"SELECT {columns} FROM autoembed.evaluate_search('pages', 'other')").fetchall()

    assert found == expected
    assert heard == []


def test_without_grades_and_without_a_text_index_and_with_two_columns_of_the_key(db: Connection, api: FakeApi) -> None:
    db.execute("""
        CREATE TABLE notes (day date, who text, body text, PRIMARY KEY (day, who));
        INSERT INTO notes VALUES ('2026-01-02', 'a"b', 'apple'), ('2026-01-03', 'c', 'pear');
        SELECT autoembed.enable('notes', content_columns => '{body}');
        SELECT autoembed.process();
        CREATE TABLE judged (query text, key text);
        INSERT INTO judged VALUES ('apple', '["2026-01-02", "a\\"b"]'), ('pear', '["2026-01-03","c"]');
    """)

    with warnings_of(db) as heard:
        rows = db.execute("SELECT mode, ndcg, mrr, recall FROM autoembed.evaluate_search('notes', 'judged')").fetchall()

    assert heard == []
    assert rows == [("vector", 1, 1, 1)]


def test_judgments_that_do_not_count_are_told(pages: Connection) -> None:
    pages.execute("INSERT INTO judged VALUES ('plum', 4, NULL), ('plum', 77, 1), ('apple', 78, 1), ('apple', 77, 1)")

    with warnings_of(pages) as heard:
        pages.execute("SELECT * FROM autoembed.evaluate_search('pages', 'judged')")

    assert heard == [
        "3 of the judgments judged have no query, key or grade, and do not count",
        "2 of the keys in judged are of no row of table pages that you may read, and count as not found",
    ]


def test_keys_that_are_no_values_of_the_keys_type_are_told(pages: Connection) -> None:
    pages.execute(
        "CREATE VIEW other AS SELECT query, key || '!' AS key FROM judged WHERE grade > 0 AND num_nulls(query, key) = 0"
    )

    with warnings_of(pages) as heard:
        row = pages.execute("SELECT recall FROM autoembed.evaluate_search('pages', 'other') LIMIT 1").fetchone()

    assert row == (0,)
    assert [message[:24] for message in heard] == ["5 of the keys in other a"]


def test_a_caller_needs_the_rights_to_the_rows_and_the_judgments(pages: Connection, role: Callable[[str], str]) -> None:
    reader = role("reader")
    pages.execute(f"SELECT autoembed.grant_usage('{reader}'); GRANT SELECT ON pages TO {reader}; SET ROLE {reader}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="judged"):
        pages.execute("SELECT * FROM autoembed.evaluate_search('pages', 'judged')")
    pages.execute(f"RESET ROLE; GRANT SELECT ON judged TO {reader}; ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
    pages.execute(f"CREATE POLICY one ON pages USING (id = 3); SET ROLE {reader}")

    row = pages.execute("SELECT recall FROM autoembed.evaluate_search('pages', 'judged') LIMIT 1").fetchone()

    assert row == (0.25,)
    pages.execute("RESET ROLE")


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "message"),
    [
        ("'judged', 0", "22023", "max_rows must be 1 or more, not 0"),
        ("NULL", "22004", "judgments must not be NULL"),
        ("'pages'", "42703", "the judgments pages have no column query, key"),
        ("'empty'", "P0002", "the judgments empty have no query with a grade above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(pages: Connection, arguments: str, sqlstate: str, message: str) -> None:
    pages.execute("CREATE TABLE empty (query text, key int)")
    with pytest.raises(psycopg.Error, match=message) as refusal:
        pages.execute(f"SELECT * FROM autoembed.evaluate_search('pages', {arguments})")
    assert refusal.value.sqlstate == sqlstate
    assert refusal.value.diag.message_hint


@pytest.mark.parametrize(
    ("type", "one", "other"),
    [
        ("timestamptz", "2026-01-02 03:04:05.75+00", "2026-01-03 03:04:05+00"),
        ("timestamp", "2026-01-02 03:04:05.75", "2026-01-03 03:04:05"),
        ("boolean", "true", "false"),
        ("char(4)", "a", "b"),
        ("int[]", "{1,2}", "{2,1}"),
        ("float8", "0.3333333333333333", "0.6666666666666666"),
        ("date", "2026-01-02", "2026-01-03"),
    ],
)
@pytest.mark.parametrize("judged", ["key", "to_jsonb(key::text)"], ids=["typed", "json"])
def test_a_key_of_any_type_counts_as_found(
    db: Connection, api: FakeApi, type: str, one: str, other: str, judged: str
) -> None:
    db.execute(f"CREATE TABLE notes (id {type} PRIMARY KEY, body text)".encode())
    db.execute("INSERT INTO notes VALUES (%s, 'apple'), (%s, 'pear')", [one, other])
    db.execute("SELECT autoembed.enable('notes', content_columns => '{body}'); SELECT autoembed.process()")
    db.execute("SET DateStyle = 'German'; SET TimeZone = 'Asia/Kathmandu'")
    judgments = f"SELECT n.query, {judged} AS key FROM (SELECT body, id FROM notes) AS n(query, key)"
    db.execute(f"CREATE TABLE judged AS {judgments}".encode())

    with warnings_of(db) as heard:
        rows = db.execute("SELECT mode, ndcg, mrr, recall FROM autoembed.evaluate_search('notes', 'judged')").fetchall()

    assert (rows, heard) == ([("vector", 1, 1, 1)], [])


@pytest.mark.parametrize("grade", ["NaN", "Infinity", "-inf", "good"])
def test_a_grade_that_is_no_number_is_refused(pages: Connection, grade: str) -> None:
    pages.execute("ALTER TABLE judged ALTER COLUMN grade TYPE text")
    pages.execute("UPDATE judged SET grade = %s WHERE key = 3", [grade])

    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"have the grade {grade}, which is no number"):
        pages.execute("SELECT * FROM autoembed.evaluate_search('pages', 'judged')")
