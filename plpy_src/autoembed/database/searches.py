"""The statements of searches, but for those of the text index. Most run with the rights of the caller."""

from __future__ import annotations

import json
from functools import lru_cache

import plpy  # type: ignore[import-not-found]

from autoembed import search_text
from autoembed.database.statements import Statements
from autoembed.kept import KeptTexts

# The import of typing takes as long as all of these.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

# Tables whose facts are kept.
MAX_KEPT_FACTS = 50
# The vectors of search texts, by text, model and version of the table's facts: embed() looks up more.
_vectors = KeptTexts(1_000_000)


class SearchDatabase(Statements):
    """The database as seen from a search."""

    def search_target(self, table_id: str, embedding_column: str | None) -> dict[str, Any]:
        """The facts that a search needs: the columns of autoembed._search_target(), and some of this search.

        These are pipeline_id, table_oid, vectors_oid, version; has_rows: whether the table that was named is the one of
        the rows, and not that of their embeddings; and has_policies: whether policies may hide rows from the caller. An
        error for a caller without the rights to all columns: a search that finds nothing would tell which words no text
        has.
        """
        [searched] = self._run(
            "SELECT s.*, s.table_id::pg_catalog.oid::pg_catalog.int8 AS table_oid,"
            " s.vectors_table::pg_catalog.oid::pg_catalog.int8 AS vectors_oid,"
            " s.table_id OPERATOR(pg_catalog.=) $1::pg_catalog.regclass AS has_rows,"
            " pg_catalog.row_security_active(s.table_id) AS has_policies,"
            " pg_catalog.has_table_privilege(s.table_id, 'SELECT') AS may_read,"
            " pg_catalog.current_setting('transaction_isolation') AS isolation"
            " FROM autoembed._searched($1::pg_catalog.regclass, $2) AS s",
            ["pg_catalog.text", "pg_catalog.name"],
            [table_id, embedding_column],
        )
        if not searched["may_read"]:
            # PostgreSQL knows the rights to columns, and names what is missing.
            plpy.execute(f"SELECT ROW(t.*) IS NULL FROM {searched['table_id']} AS t LIMIT 0")
        query = (
            f"SELECT autoembed._lasting_target({searched['pipeline_id']}, {plpy.quote_literal(searched['version'])})"
            f" AS facts FROM (SELECT) AS one LEFT JOIN ONLY {searched['table_id']} AS t ON false"
            f" LEFT JOIN ONLY {searched['vectors_table']} AS e ON false"
        )
        # An older snapshot has facts of before a change that PostgreSQL has told of already.
        lasts = searched["isolation"] == "read committed"
        [row] = self._run_made(query) if lasts else plpy.execute(query)
        facts = _facts(row["facts"])
        if lasts and not facts["lasts"]:
            self._forget_plan(query)
        own = ("pipeline_id", "table_oid", "vectors_oid", "version", "has_rows", "has_policies")
        return {**facts, **{name: searched[name] for name in own}}

    def has_names(self, target: dict[str, Any]) -> bool:
        """Whether the tables of search_target() have their names yet: a lock on them lets a schema be renamed."""
        [row] = self._run(
            "SELECT pg_catalog.to_regclass($1)::pg_catalog.oid::pg_catalog.int8 AS table_oid,"
            " pg_catalog.to_regclass($2)::pg_catalog.oid::pg_catalog.int8 AS vectors_oid",
            ["pg_catalog.text", "pg_catalog.text"],
            [target["table_id"], target["vectors_table"]],
        )
        return all(row[name] == target[name] for name in ("table_oid", "vectors_oid"))

    def embed(self, content: str, target: dict[str, Any]) -> str:
        """The vector of a search text, as SQL writes it."""
        search = (content, target["model"], target["version"])
        vector = _vectors.get(search)
        search_text.was_kept = vector is not None
        if vector is None:
            [row] = self._run(
                "SELECT autoembed.embed($1, $2) AS vector",
                ["pg_catalog.text", "pg_catalog.text"],
                [content, target["model"]],
            )
            vector = str(row["vector"])
            _vectors.keep(search, vector)
        return vector

    def near(self, query: str, vector_type: str, vector: str) -> list[tuple[str, float, int | None]]:
        """The keys, distances and chunks of a query that a search asks. It runs with the rights of the caller."""
        rows = self._run_made(query, [vector_type], [vector])
        return [(row["key"], row["distance"], row["number"]) for row in rows]

    def distances(
        self, query: str, vector_type: str, vector: str, keys: Sequence[str]
    ) -> list[tuple[str, float, int | None]]:
        """The same of rows with these keys."""
        rows = self._run_made(query, [vector_type, "pg_catalog.text[]"], [vector, list(keys)])
        return [(row["key"], row["distance"], row["number"]) for row in rows]

    def go_on_by_index(self) -> None:
        """Has a vector index give as many rows as are asked for, whatever conditions leave out, for this function."""
        self._run("SELECT pg_catalog.set_config('hnsw.iterative_scan', 'strict_order', true)")

    def print_no_plans(self) -> None:
        """Keeps plans from a caller who may not read all that they look up, for this function."""
        self._run("SELECT pg_catalog.set_config('debug_print_plan', 'off', true)")

    def set_ef_search(self, ef_search: int) -> None:
        """Has a vector index keep so many candidates, for this function."""
        self._run(
            "SELECT pg_catalog.set_config('hnsw.ef_search', $1::pg_catalog.text, true)",
            ["pg_catalog.int4"],
            [ef_search],
        )

    def visible(
        self, query: str, vector_type: str, keys: Sequence[str], numbers: Sequence[int], vector: str | None
    ) -> dict[int, tuple[str, float | None]]:
        """Which of these chunks the caller may read: by their places from 0, the keys as search() writes them.

        With their distances to the vector, if there is one.
        """
        types = ["pg_catalog.text[]", "pg_catalog.int4[]", vector_type]
        rows = self._run_made(query, types, [list(keys), list(numbers), vector])
        return {row["place"] - 1: (row["key"], row["distance"]) for row in rows}

    def matching(self, query: str, keys: Sequence[str]) -> set[str]:
        """Which of these rows fulfil the condition of a search. It runs with the rights of the caller."""
        return {row["key"] for row in plpy.execute(plpy.prepare(query, ["pg_catalog.text[]"]), [list(keys)])}

    def keys(self, query: str) -> list[str]:
        """The keys of the rows that fulfil the condition of a search. It runs with the rights of the caller."""
        return [row["key"] for row in plpy.execute(query)]

    def estimated_matches(self, target: dict[str, Any], condition: str | None) -> tuple[float | None, float]:
        """About how many rows fulfil a condition and may be read by the caller, and what it costs to find these.

        None: nobody knows. The cost is in PostgreSQL's units, and 0 if all rows fulfil it.
        """
        rows: float | None = target["row_count"]
        if condition is None and not target["has_policies"]:
            return rows if rows is not None and rows >= 0 else None, 0.0
        [row] = self._run(
            "SELECT e.matches, e.cost FROM autoembed._estimated_matches($1::pg_catalog.regclass, $2) AS e",
            ["pg_catalog.text", "pg_catalog.text"],
            [target["table_id"], condition],
        )
        return row["matches"], row["cost"]

    def present_texts(self, query: str, keys: Sequence[str], max_bytes: int) -> list[tuple[str, str]]:
        """The keys and present texts of these rows, read with the rights of the caller, up to max_bytes in all."""
        rows = self._run_made(query, ["pg_catalog.text[]", "pg_catalog.int8"], [list(keys), max_bytes])
        return [(row["key"], row["content"]) for row in rows if row["content"] and row["content"].strip()]

    def pipelines_seen(self, pipelines: Sequence[tuple[int, int]]) -> list[dict[str, bool]]:
        """Whether each of these pipelines, with the OID of its table, exists, and is one that the caller may see."""
        rows = self._run(
            "SELECT autoembed._is_pipeline_of(p.id, p.table_id::pg_catalog.oid) AS exists,"
            " autoembed._may_see(p.table_id::pg_catalog.oid::pg_catalog.regclass) AS seen,"
            " autoembed._owns(p.table_id::pg_catalog.oid::pg_catalog.regclass) AS owned"
            " FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) WITH ORDINALITY AS p(id, table_id, number)"
            " ORDER BY p.number",
            ["pg_catalog.int4[]", "pg_catalog.int8[]"],
            [[one for one, _ in pipelines], [table for _, table in pipelines]],
        )
        return [dict(row) for row in rows]


@lru_cache(maxsize=MAX_KEPT_FACTS)
def _facts(text: str) -> dict[str, Any]:
    """The facts of autoembed._lasting_target(), to be read only."""
    return json.loads(text)  # type: ignore[no-any-return]
