"""The doors of searches. A session that only searches loads nothing of what lanes need."""

from __future__ import annotations

import itertools
import time
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from autoembed import search_text, tally
from autoembed.database.searches import SearchDatabase
from autoembed.errors import NO_FAULT, Fault
from autoembed.search import VECTOR, Hit, Search, checked

if TYPE_CHECKING:
    from typing import Any

# Searches whose rows are still to be read. An error leaves one behind, so there are never more of them.
MAX_BEGUN = 100
# The numbers of searches fit into an integer.
_numbers = itertools.cycle(range(1, 1 << 31))
_NO_PAGE = {
    **dict.fromkeys(("search", "pipeline_id", "rows_query", "vector", "by_index")),
    **dict.fromkeys(("ranks", "keys", "numbers", "scores", "similarities", "text_scores")),
    "fell_back": False,
    **NO_FAULT,
}


class Begun(NamedTuple):
    """A search that counts once its rows are read. pipeline: its id, and the OID of its table."""

    began_at: float
    pipeline: tuple[int, int]
    by_index: bool | None
    max_rows: int
    from_cache: bool


_begun: dict[int, Begun] = {}


def page(
    table_name: str,
    query: str | None,
    max_rows: int | None,
    skip_rows: int | None,
    condition: str | None,
    embedding_column: str | None,
    mode: str | None,
    vector_weight: float | None,
    candidates: int,
    has_row_type: bool,
    search: int | None,
) -> dict[str, Any]:
    """The rows of a page, or the query that finds them: the columns of autoembed._search_page()."""
    here = SearchDatabase()
    before = None if search is None else _begun.pop(search, None)
    began_at = before.began_at if before else time.monotonic()
    try:
        max_rows, skip_rows, vector_weight = checked(max_rows, skip_rows, mode, vector_weight)
        this = Search(here, table_name, embedding_column, condition)
        if has_row_type:
            this.check_rows()
        mode = this.mode(mode)
        if not query or not query.strip() or not max_rows:
            return _NO_PAGE
        found, by_index = None, None
        if mode == VECTOR and not candidates and search is None:
            found, by_index = this.at_once(query, skip_rows + max_rows)
        if found is None:
            after = 0 if candidates else skip_rows
            last = max(skip_rows + max_rows, candidates)
            hits, by_index = this.hits(query, mode, vector_weight, last, last - after)
            # A comparison of many rows takes its time.
            this.check_names()
            found = _listed(hits[after:last], after, this.target["rows_query"])
    except Fault as fault:
        return {**_NO_PAGE, **fault.fields()}
    except here.Error as error:
        return {**_NO_PAGE, **here.fault_of(error).fields()}
    pipeline = this.target["pipeline_id"], this.target["table_oid"]
    from_cache = before.from_cache if before else search_text.was_kept and by_index is not None
    number = next(_numbers)
    _begun[number] = Begun(began_at, pipeline, by_index, max_rows, from_cache)
    if len(_begun) > MAX_BEGUN:
        del _begun[next(iter(_begun))]
    return {**_NO_PAGE, "search": number, "pipeline_id": pipeline[0], "by_index": by_index, **found}


def note(search: int, found: int, fell_back: bool) -> bool:
    """Counts a search that this session has begun, and that has found so many rows."""
    begun = _begun.pop(search, None)
    if begun is None:
        return False
    by_index = begun.by_index
    facts = (by_index is False, by_index is True, found < begun.max_rows, not found, begun.from_cache, fell_back)
    _files().add(begun.pipeline, 1000 * (time.monotonic() - begun.began_at), facts)
    return True


def nearest(
    table_name: str,
    embedding_column: str | None,
    vector: str,
    wanted: int,
    by_index: bool | None,
    ef_search: int | None,
) -> dict[str, Any]:
    """The rows that are nearest to a vector: the columns of autoembed._nearest()."""
    here = SearchDatabase()
    try:
        search = Search(here, table_name, embedding_column, None)
        rows, _ = search.nearest(vector, wanted, by_index=by_index, ef_search=ef_search)
    except here.Error as error:
        return {"keys": None, "distances": None, **here.fault_of(error).fields()}
    return {"keys": [row.key for row in rows], "distances": [row.distance for row in rows], **NO_FAULT}


def _listed(hits: list[Hit], after: int, rows_query: str) -> dict[str, Any]:
    """The columns that list these rows, whose ranks begin behind this one."""
    if not hits:
        return {}
    keys, numbers, scores, similarities, text_scores = map(list, zip(*hits, strict=True))
    return {
        "rows_query": rows_query,
        "ranks": list(range(after + 1, after + 1 + len(hits))),
        "keys": keys,
        "numbers": numbers,
        "scores": scores,
        "similarities": similarities,
        "text_scores": text_scores,
    }


@cache
def _files() -> tally.Tally:
    return tally.of_database(SearchDatabase().own_id())
