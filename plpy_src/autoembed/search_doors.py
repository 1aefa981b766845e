"""The doors of searches. A session that only searches loads nothing of what lanes need."""

from __future__ import annotations

from typing import Any

from autoembed import database
from autoembed.errors import NO_FAULT, Fault
from autoembed.search import Hit, Search

_NO_PAGE = {
    **dict.fromkeys(("table_id", "pipeline_id", "rows_query", "by_index")),
    **dict.fromkeys(("ranks", "keys", "numbers", "scores", "similarities", "text_scores")),
    **NO_FAULT,
}


def page(
    table_name: str,
    embedding_column: str | None,
    query: str | None,
    mode: str | None,
    condition: str | None,
    vector_weight: float,
    after: int,
    last: int,
) -> dict[str, Any]:
    """The rows of a search from one rank to another: the columns of autoembed._search_page()."""
    here = database.Database(commits=False)
    try:
        search = Search(here, table_name, embedding_column, condition)
        mode = search.mode(mode)
        if not query or not query.strip() or not last:
            return _NO_PAGE
        hits, by_index = search.hits(query, mode, vector_weight, last, last - after)
    except Fault as fault:
        return {**_NO_PAGE, **fault.fields()}
    except here.Error as error:
        return {**_NO_PAGE, **here.fault_of(error).fields()}
    facts = {name: search.target[name] for name in ("table_id", "pipeline_id", "rows_query")}
    columns = zip(*hits[after:last], strict=True) if hits[after:last] else [[] for _ in Hit._fields]
    keys, numbers, scores, similarities, text_scores = map(list, columns)
    return {
        **_NO_PAGE,
        **facts,
        "by_index": by_index,
        "ranks": list(range(after + 1, after + 1 + len(keys))),
        "keys": keys,
        "numbers": numbers,
        "scores": scores,
        "similarities": similarities,
        "text_scores": text_scores,
    }


def nearest(
    table_name: str,
    embedding_column: str | None,
    vector: str,
    wanted: int,
    by_index: bool | None,
    ef_search: int | None,
) -> dict[str, Any]:
    """The rows that are nearest to a vector: the columns of autoembed._nearest()."""
    here = database.Database(commits=False)
    try:
        search = Search(here, table_name, embedding_column, None)
        rows, _ = search.nearest(vector, wanted, by_index=by_index, ef_search=ef_search)
    except here.Error as error:
        return {"keys": None, "distances": None, **here.fault_of(error).fields()}
    return {"keys": [row.key for row in rows], "distances": [row.distance for row in rows], **NO_FAULT}
