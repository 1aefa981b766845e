"""A search: the nearest rows, the rows whose texts have the words, and one list of both.

Conditions, policies and types run with the rights of the caller, and in the caller's search_path.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from autoembed import search_text
from autoembed.errors import DATATYPE_MISMATCH, INSUFFICIENT_PRIVILEGE, SERIALIZATION_FAILURE, Fault, is_nobodys

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from autoembed.database.searches import SearchDatabase
    from autoembed.text_matches import TextMatches

VECTOR, TEXT, HYBRID = "vector", "text", "hybrid"
# So many of the nearest rows, and of those with the best words, are compared by both, or as many as a page has. Pages
# of ten answer the questions of the bench as well with 200 and with 30 of them (nDCG@10 0.802), and each takes time.
CANDIDATES = 40
MAX_CANDIDATES = 1000
# So many rows are compared one by one sooner than an index finds the nearest of them among others, or candidates are
# tried until some are among them.
FEW_ROWS = 5000
# The candidates of a vector index that search() sets on entry.
DEFAULT_EF_SEARCH = 100
# pgvector keeps no more.
MAX_EF_SEARCH = 1000
# More of a search text is not looked up in the text index, in characters.
MAX_QUERY_CHARACTERS = 10_000
# No search lists more rows.
MAX_ROWS = 2**31 - 1
# So many rows at most are found and read by one query: autoembed._nearest_rows_slots() makes it for them.
ROWS_AT_ONCE = 10


class Near(NamedTuple):
    """A row, its distance to a vector, and the number of its chunk that is nearest."""

    key: str
    distance: float
    number: int | None

    @property
    def similarity(self) -> float:
        return 1 - self.distance


class Hit(NamedTuple):
    """A row that is found. number: that of the passage; 0 or None: none is known."""

    key: str
    number: int | None
    score: float
    similarity: float | None
    text_score: float | None


class Search:
    """A search of one table."""

    def __init__(
        self, here: SearchDatabase, table_name: str, embedding_column: str | None, condition: str | None
    ) -> None:
        self._here = here
        self._table_name = table_name
        # A blank condition is none.
        self._condition = condition if condition and condition.strip() else None
        self.target = here.search_target(table_name, embedding_column)

    def mode(self, mode: str | None) -> str:
        """This mode, or the table's own. Raises Fault if the table does not have it."""
        mode = mode or (HYBRID if self.target["has_texts"] else VECTOR)
        if mode != VECTOR and not self.target["has_texts"]:
            raise Fault(
                f"table {self._table_name} has no text index",
                hint=f"Add one: SELECT autoembed.alter_pipeline('{self._table_name}', text_config => 'english').",
                errcode="55000",
            )
        return mode

    def check_rows(self) -> None:
        """Raises Fault if the table that is named has no rows to give, because it holds embeddings."""
        if not self.target["has_rows"]:
            table = self.target["table_id"]
            raise Fault(
                f"table {self._table_name} holds embeddings of table {table}, and a search gives rows of that one",
                hint=f"Write NULL::{table}, and name the embeddings by embedding_column if there are several.",
                errcode=DATATYPE_MISMATCH,
            )

    def hits(
        self, query: str, mode: str, vector_weight: float, wanted: int, page_rows: int
    ) -> tuple[list[Hit], bool | None]:
        """At least so many of the best rows, if there are so many, best first.

        With whether an index has found the nearest of them; None: they were not asked for. page_rows: how many a page
        has. All pages of this length have the same order.
        """
        if self._condition is not None:
            self._estimated_matches()
        if mode == TEXT:
            matches = self._text_matches(query)
            found = matches.best(wanted)
            return [Hit(key, number, score, None, score) for key, (number, score) in found.items()], None
        vector = self._vector(query)
        if mode == VECTOR:
            near, by_index = self.nearest(vector, wanted)
            return [Hit(row.key, row.number, row.similarity, row.similarity, None) for row in near], by_index
        count = min(max(CANDIDATES, page_rows), MAX_CANDIDATES)
        near, by_index = self.nearest(vector, 1, at_least=count)
        self.check_names()
        candidates = near[:count]
        keys = {row.key: None for row in candidates}
        matches = self._text_matches(query, list(keys), vector)
        matched = {**matches.best(count), **matches.of_keys()}
        # A row of several chunks may have a nearer one without the words, so its distance is asked for.
        known = {} if self.target["is_chunked"] else matches.near
        others = {key: known.get(key) for key in matched if key not in keys}
        others.update(self._nearness_of(vector, [key for key, row in others.items() if row is None]))
        scores = {key: score for key, (_, score) in matched.items()}
        hits = fused(candidates, others, scores, vector_weight)
        are_all = not (by_index or self.target["is_chunked"]) and len(near) < count
        if len(hits) < wanted and not are_all:
            near, by_index = self.nearest(vector, wanted)
        rest = [row for row in near if row.key not in keys and row.key not in others]
        return [*hits, *(Hit(row.key, row.number, 0.0, row.similarity, None) for row in rest)], by_index

    def at_once(self, query: str, wanted: int) -> tuple[dict[str, Any] | None, bool | None]:
        """The query that finds the nearest rows and reads them, and its vector; with whether an index answers it.

        None: it does not suit the search. It gives no rows if it finds too few.
        """
        target = self.target
        if not target["nearest_rows"] or self._condition is not None or target["has_policies"]:
            return None, None
        by_index = self._suits_index(target["row_count"])
        if wanted > ROWS_AT_ONCE or by_index and target["is_binary"]:
            return None, None
        vector = self._vector(query)
        if by_index and target["ef_search"] != DEFAULT_EF_SEARCH:
            self._here.set_ef_search(target["ef_search"])
        return {"rows_query": target["nearest_rows"], "vector": vector}, by_index

    def check_names(self) -> None:
        """Raises Fault once the names in the queries may mean tables of others, whose code they would run."""
        if not self._here.has_names(self.target):
            raise Fault(
                f"table {self._table_name}, or its schema, was renamed during the search",
                hint="Search again.",
                errcode=SERIALIZATION_FAILURE,
            )

    def _text_matches(self, query: str, keys: Sequence[str] = (), vector: str | None = None) -> TextMatches:
        # A search by meaning alone imports neither this nor numpy.
        from autoembed.text_matches import TextMatches

        return TextMatches(self._here, self.target, query, self._condition, keys, vector)

    def _vector(self, query: str) -> str:
        vector = self._here.embed(query, self.target)
        if not search_text.was_kept:
            # A provider takes its time.
            self.check_names()
        return vector

    def nearest(
        self, vector: str, wanted: int, *, at_least: int = 0, by_index: bool | None = None, ef_search: int | None = None
    ) -> tuple[list[Near], bool]:
        """At least so many of the nearest rows, if there are so many, nearest first.

        With whether an index has found them. at_least: so many chunks are compared, of however many rows. by_index,
        ef_search: None: as suits the table.
        """
        target = self.target
        estimated = self._estimated_matches() if by_index is None and target["has_index"] else None
        by_index = self._suits_index(estimated) if by_index is None else by_index and target["has_index"]
        ef_search = ef_search or target["ef_search"]
        sought = with_spare(wanted) if by_index and not target["is_binary"] else wanted
        limit = max(sought, at_least)
        if target["is_chunked"] and not target["has_few_chunks"]:
            # Several chunks of one row may be near.
            limit += min(3 * limit, 50)
        if by_index:
            if at_least:
                # An index that has to go on after its first candidates takes longer than one that keeps more.
                share = min(1.0, (estimated or math.inf) / max(1.0, target["row_count"]))
                ef_search = max(ef_search, min(int(limit / share), MAX_EF_SEARCH))
            if ef_search != DEFAULT_EF_SEARCH:
                self._here.set_ef_search(ef_search)
            if target["is_binary"]:
                # Most pages come from the same candidates, of which a greater number has another order.
                limit = ef_search * 2 ** max(0, math.ceil(math.log2(limit / ef_search)))
        # An index that goes on behind its first candidates takes a tenth longer.
        goes_on = by_index and (self._condition is not None or target["has_policies"] or sought >= ef_search)
        if goes_on:
            self._here.go_on_by_index()
        while True:
            end = target["near_end"] if by_index else target["exact_end"]
            query = f"{target['near_start']}{self._condition or 'true'}\n{end} LIMIT {limit}"
            found = self._here.near(query, target["vector_type"], vector)
            rows = nearest_chunks(found)
            # An index that has gone on, and has no more of them to spare, need not be left for that.
            is_end = len(found) < limit and (not by_index or goes_on and len(rows) >= wanted)
            if len(rows) >= sought or is_end:
                return rows, by_index
            if len(found) == limit:
                limit *= 4
            elif goes_on:
                # The index has given up before it had as many.
                by_index = False
            if by_index and not goes_on:
                self._here.go_on_by_index()
                goes_on = True

    def _suits_index(self, estimated: float | None) -> bool:
        """Whether an index finds the nearest of about so many rows sooner than a comparison of all. None: unknown."""
        return self.target["has_index"] and (estimated is None or estimated < 0 or estimated > FEW_ROWS)

    def _nearness_of(self, vector: str, keys: list[str]) -> dict[str, Near | None]:
        """These rows. None: it has no embedding yet."""
        if not keys:
            return {}
        query = self.target["distances_query"]
        found = nearest_chunks(self._here.distances(query, self.target["vector_type"], vector, keys))
        return {**dict.fromkeys(keys), **{row.key: row for row in found}}

    def _estimated_matches(self) -> float | None:
        try:
            return self._here.estimated_matches(self.target, self._condition)[0]
        except self._here.Error as error:
            fault = self._here.fault_of(error)
            if self._condition is None or is_nobodys(fault.errcode) or fault.errcode == INSUFFICIENT_PRIVILEGE:
                raise
            raise Fault(
                f"the condition of the search cannot be used: {fault.problem}",
                hint=fault.hint or f"It is what would stand behind WHERE, with columns of table {self._table_name}.",
                errcode=fault.errcode,
            ) from error


def checked(
    max_rows: int | None, skip_rows: int | None, mode: str | None, vector_weight: float | None
) -> tuple[int, int, float]:
    """max_rows, skip_rows and vector_weight as a search takes them. Raises Fault for what none can."""
    if max_rows is None or skip_rows is None or max_rows < 0 or skip_rows < 0:
        given = ["NULL" if one is None else one for one in (max_rows, skip_rows)]
        raise Fault(
            "max_rows and skip_rows must be 0 or more, not {} and {}".format(*given),
            hint="Leave them out for the ten nearest rows.",
        )
    if mode is not None and mode not in (VECTOR, TEXT, HYBRID):
        raise Fault(
            f"mode must be hybrid, vector or text, not {mode or 'an empty text'}",
            hint="Leave it out for hybrid where the table has a text index, and for vector where it has none.",
        )
    # NaN is in no range.
    if vector_weight is None or not 0 <= vector_weight <= 1:
        given_weight = "NULL" if vector_weight is None else f"{vector_weight:.15g}"
        raise Fault(f"vector_weight must be from 0 to 1, not {given_weight}", hint="Leave it out for 0.7.")
    return min(max_rows, MAX_ROWS - skip_rows), skip_rows, vector_weight


def near_of(key: str, distance: float, number: int | None) -> Near:
    # A vector of zeros has no angle to another.
    return Near(key, distance if distance == distance else 1.0, number)  # noqa: PLR0124


def nearest_chunks(found: Iterable[tuple[str, float, int | None]]) -> list[Near]:
    """The rows of these chunks, each with the nearest of them, nearest first; of equal ones, in their order."""
    rows: dict[str, Near] = {}
    for one in found:
        row = near_of(*one)
        if row.key not in rows or row.distance < rows[row.key].distance:
            rows[row.key] = row
    return sorted(rows.values(), key=lambda row: row.distance)


def fused(
    near: Sequence[Near], others: Mapping[str, Near | None], text_scores: Mapping[str, float], vector_weight: float
) -> list[Hit]:
    """The candidates by both scores, best first.

    near: the nearest rows, nearest first. others: rows with good words that are not among these.
    """
    candidates = {**{row.key: row for row in near}, **others}
    similarities = {key: row.similarity for key, row in candidates.items() if row}
    texts = {key: text_scores.get(key, 0.0) for key in candidates}
    by_vector, by_text = _spread(similarities), _spread(texts)
    hits = []
    for key, row in candidates.items():
        score = vector_weight * by_vector.get(key, 0.0) + (1 - vector_weight) * by_text[key]
        hits.append(Hit(key, (row and row.number) or 0, score, similarities.get(key), texts[key]))
    return sorted(hits, key=lambda hit: (-hit.score, hit.similarity is None, -(hit.similarity or 0.0), hit.key))


def with_spare(count: int) -> int:
    """How many of the nearest an index is asked for, whose order is nearly that of the distances, to know so many.

    The next page puts more of them in order, and brings none in between those of this one.
    """
    return count + 5 + count // 20


def tried_next(tried: int, found: int, wanted: int) -> int:
    """How many of the best candidates to try, once so many of them are found to be rows that are wanted.

    Half as many again as should do, and at most eight times as many.
    """
    return min(8 * tried, 3 * wanted * tried // (2 * max(1, found)) + 1)


def _spread(values: Mapping[str, float]) -> dict[str, float]:
    """These values, from 0 for the least of them to 1. If all are equal, 1 where they are above 0."""
    least = min(values.values(), default=0.0)
    width = max(values.values(), default=0.0) - least
    return {key: (value - least) / width if width else float(value > 0) for key, value in values.items()}
