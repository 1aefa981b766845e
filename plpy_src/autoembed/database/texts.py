"""The statements of the text index: those of lanes, which write it, and those of searches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import plpy  # type: ignore[import-not-found]

from autoembed.bm25 import (
    MAX_MERGED_POSTINGS,
    Documents,
    Segment,
    StoredPosting,
    TermPostings,
    counts,
    joined,
    merged,
    most_dead,
    parts,
    plain_words,
    unpacked,
)
from autoembed.database.statements import Error, Statements, message_body, row_errors, sqlstate_of
from autoembed.errors import QUERY_CANCELED, RowError, is_nobodys, row_error
from autoembed.kept import KeptTexts
from autoembed.restricted import Run, as_role, restricted

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import numpy as np

    from autoembed.records import Pipeline

# PostgreSQL has so long to tell the words of some texts, in seconds: other rows wait meanwhile.
WORDS_SECONDS = 1.0
# The words of texts that wait to be indexed, by the version of the table's facts. Each search counts them.
_words = KeptTexts(4_000_000)
# The segments that searches of this session have read, without postings, by the OID of their table and their ids. A
# segment is never changed.
_segments: dict[tuple[int, int], Segment] = {}
# The documents of those of the last search, the ids of the segments, and where each starts.
_joined: dict[tuple[int, bytes], tuple[Documents, np.ndarray, np.ndarray]] = {}
# More documents of segments are not kept: 12 MB, and 16 MB for those of the last search.
MAX_KEPT_DOCUMENTS = 1_000_000


class TextIndex(NamedTuple):
    """What a search reads of the text index.

    terms: those of the query, and the number of their occurrences. documents: all of them. postings: those of the
    terms, as Scores() takes them. dead: ids of documents that count no more, ascending. messages: of rows that have
    changed since. of_rows: the documents of the rows that were asked for, as documents() tells them.
    """

    terms: dict[str, int]
    documents: Documents
    postings: dict[str, list[TermPostings]]
    dead: np.ndarray
    messages: list[Any]
    of_rows: dict[int, tuple[str, int]]


# The ids of the documents of pipeline $1 that count no more, ascending, 8 bytes each.
_DEAD_DOCUMENTS = (
    "SELECT pg_catalog.string_agg(pg_catalog.int8send(d.id), '' ORDER BY d.id) FROM autoembed.text_document AS d"
    " WHERE d.pipeline_id OPERATOR(pg_catalog.=) $1 AND NOT d.is_live"
)


class TextDatabase(Statements):
    """The text indexes. lasts: the role that owns them may change while this lasts."""

    def __init__(self, *, lasts: bool) -> None:
        self._lasts = lasts
        self._texts: tuple[int, int] | None = None
        # The pipelines of whose texts PostgreSQL did not tell the words in time.
        self._slow_words: set[int] = set()

    def unindexed(self, pipeline: Pipeline, keys: Sequence[str]) -> set[str]:
        """The keys of the rows that have no text in the text index."""
        [row] = self._run(
            "SELECT autoembed._unindexed($1, $2) AS keys",
            ["pg_catalog.int4", "pg_catalog.text[]"],
            [pipeline.id, list(keys)],
        )
        return set(row["keys"])

    def index_texts(
        self, pipeline: Pipeline, keys: Sequence[str], digests: Sequence[bytes], texts: Sequence[tuple[int, int, str]]
    ) -> None:
        """Puts texts into the text index, where the record of a row has this digest.

        texts: the place of the row's key, counted from 1; the number of the chunk; and its text or a part of it.
        Texts of which PostgreSQL cannot tell the words in time are indexed by plain words, or without any.
        """
        rows, numbers, cut = zip(*texts, strict=True)
        known = [list(keys), list(digests), list(rows), list(numbers)]
        if pipeline.id not in self._slow_words and self._has_indexed(pipeline, known, cut):
            return
        self._slow_words.add(pipeline.id)
        if not self._has_indexed(pipeline, known, [plain_words(text) for text in cut]):
            self._has_indexed(pipeline, known, [""] * len(cut))

    def _has_indexed(self, pipeline: Pipeline, known: Sequence[Any], texts: Sequence[str]) -> bool:
        """Puts texts into the text index, if PostgreSQL tells their words in time. Returns whether it did."""
        run = Run()
        try:
            with plpy.subtransaction(), restricted(WORDS_SECONDS) as run:
                self._run(
                    "SELECT autoembed._index_texts($1, $2, $3, $4, $5, $6)",
                    [
                        "pg_catalog.int4",
                        "pg_catalog.text[]",
                        "pg_catalog.bytea[]",
                        *["pg_catalog.int4[]"] * 2,
                        "pg_catalog.text[]",
                    ],
                    [pipeline.id, *known, list(texts)],
                )
        except Error as error:
            if sqlstate_of(error) == QUERY_CANCELED and run.timed_out and not run.session_timed_out:
                return False
            if is_nobodys(sqlstate_of(error)):
                raise
            raise row_error(sqlstate_of(error), str(error)) from error
        return True

    def merge_segments(self, *, dedicated: bool = False) -> bool:
        """Merges some segments of the text index, if it has too many, or many dead documents. Returns whether it did.

        dedicated: the caller is a lane for backfills alone. While there is one, no other lane merges.
        """
        try:
            with row_errors(), plpy.subtransaction():
                return self._merge_segments(dedicated=dedicated)
        except RowError as error:
            # The pipeline may be ended meanwhile. The next round tries again.
            if not (error.locked or error.may_pass):
                raise
            return False

    def _merge_segments(self, *, dedicated: bool) -> bool:
        [task] = self._run(
            "SELECT s.* FROM autoembed._segments_to_merge($1, $2) AS s",
            ["pg_catalog.bool", "pg_catalog.int4"],
            [dedicated, MAX_MERGED_POSTINGS],
        )
        ids, pipeline_id = task["segments"] or [], task["pipeline_id"]
        if len(ids) < (1 if task["many_are_dead"] else 2):
            return False
        import numpy as np

        which = ("s.id OPERATOR(pg_catalog.=) ANY ($1)", ["pg_catalog.int8[]"])
        with as_role(self._texts_table()[1]):
            dead = self._dead_documents(pipeline_id)
            if task["many_are_dead"]:
                posting_counts = dict(zip(ids, task["postings"], strict=True))
                ids = most_dead(self._segments(*which, [ids]), dead, posting_counts)
            segments = self._segments(*which, [ids])
            postings = self._postings(ids)
        if not segments:
            return False
        new, new_postings = merged(segments, postings, dead)
        gone = np.intersect1d(np.concatenate([segment.documents for segment in segments.values()]), dead)
        self._run(
            "SELECT autoembed._replace_segments($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            [
                "pg_catalog.int4",
                "pg_catalog.int8[]",
                "pg_catalog.int4",
                *["pg_catalog.bytea"] * 2,
                "pg_catalog.text[]",
                *["pg_catalog.bytea[]"] * 2,
                "pg_catalog.int8[]",
            ],
            [
                pipeline_id,
                list(ids),
                len(new.documents),
                new.documents.astype(">i8").tobytes(),
                new.lengths.astype(">i4").tobytes(),
                [posting.term for posting in new_postings],
                [posting.ordinals for posting in new_postings],
                [posting.levels for posting in new_postings],
                gone.tolist(),
            ],
        )
        return True

    def text_index(self, pipeline_id: int, words: str, keys: Sequence[str], max_messages: int) -> TextIndex:
        """The text index as a search for these words sees it. The caller's rights are not asked for.

        keys: the rows whose documents are wanted.
        """
        table, owner = self._texts_table()
        with as_role(owner):
            [row] = self._run(
                "SELECT (SELECT pg_catalog.string_agg(pg_catalog.int8send(s.id), '' ORDER BY s.id)"
                " FROM autoembed.text_segment AS s WHERE s.pipeline_id OPERATOR(pg_catalog.=) $1) AS segments,"
                f" ({_DEAD_DOCUMENTS}) AS dead",
                ["pg_catalog.int4"],
                [pipeline_id],
            )
            documents, segments, starts = self._joined_segments(table, row["segments"] or b"")
            terms, postings = self._terms_and_postings(pipeline_id, words, segments, starts)
            return TextIndex(
                terms,
                documents,
                postings,
                _numbers(row["dead"] or b"", ">i8"),
                self._outstanding(pipeline_id, max_messages),
                self._documents_of(pipeline_id, keys),
            )

    def _terms_and_postings(
        self, pipeline_id: int, words: str, segments: np.ndarray, starts: np.ndarray
    ) -> tuple[dict[str, int], dict[str, list[TermPostings]]]:
        """The terms in a query, the number of their occurrences, and their postings in these segments."""
        import numpy as np

        rows = self._run(
            # The postings of many segments are few values. A value takes Python as long as a small posting.
            "SELECT t.term, t.occurrences, p.segments, p.sizes, p.ordinals, p.levels FROM ("
            'SELECT w.lexeme COLLATE pg_catalog."C" AS term,'
            " coalesce(pg_catalog.cardinality(w.positions), 1) AS occurrences"
            " FROM ROWS FROM (pg_catalog.unnest(pg_catalog.to_tsvector(autoembed._text_config($1), $2))) AS w"
            ") AS t LEFT JOIN LATERAL ("
            "SELECT pg_catalog.string_agg(pg_catalog.int8send(p.segment_id), '' ORDER BY p.segment_id) AS segments,"
            " pg_catalog.string_agg(pg_catalog.int4send(pg_catalog.octet_length(p.levels)), ''"
            " ORDER BY p.segment_id) AS sizes,"
            " pg_catalog.string_agg(p.ordinals, '' ORDER BY p.segment_id) AS ordinals,"
            " pg_catalog.string_agg(p.levels, '' ORDER BY p.segment_id) AS levels"
            " FROM autoembed.text_posting AS p"
            " WHERE p.segment_id OPERATOR(pg_catalog.=) ANY ($3) AND p.term OPERATOR(pg_catalog.=) t.term"
            " GROUP BY p.ordinals OPERATOR(pg_catalog.=) ''::pg_catalog.bytea"
            ") AS p ON true",
            ["pg_catalog.int4", "pg_catalog.text", "pg_catalog.int8[]"],
            [pipeline_id, words, segments.tolist()],
        )
        postings: dict[str, list[TermPostings]] = {}
        for row in rows:
            if row["segments"] is not None:
                places = np.searchsorted(segments, _numbers(row["segments"], ">i8"))
                posting = unpacked(row["ordinals"], row["levels"])
                of_term = TermPostings(starts[places], _numbers(row["sizes"], ">i4"), *posting)
                postings.setdefault(row["term"], []).append(of_term)
        return {row["term"]: row["occurrences"] for row in rows}, postings

    def _joined_segments(self, table: int, ids: bytes) -> tuple[Documents, np.ndarray, np.ndarray]:
        """The documents of segments, the ids of these, and where each starts. ids: ascending, 8 bytes each."""
        import numpy as np

        key = (table, ids)
        if key not in _joined:
            segments = _numbers(ids, ">i8")
            missing = [number for number in segments.tolist() if (table, number) not in _segments]
            found = self._segments("s.id OPERATOR(pg_catalog.=) ANY ($1)", ["pg_catalog.int8[]"], [missing])
            _segments.update(((table, number), segment) for number, segment in found.items())
            parts = [_segments[table, number] for number in segments.tolist()]
            _joined.clear()
            starts = np.cumsum([0, *(len(segment.documents) for segment in parts)])[:-1]
            _joined[key] = joined(parts), segments, starts
            _forget_segments(table, segments.tolist())
        return _joined[key]

    def _outstanding(self, pipeline_id: int, max_messages: int) -> list[Any]:
        """The messages of a pipeline in the queue, the newest first, and its failed rows as messages.

        One more than max_messages of either: there are more.
        """
        rows = self._run(
            "(SELECT q.message FROM autoembed._job AS q WHERE q.pipeline OPERATOR(pg_catalog.=) $1::pg_catalog.text"
            " ORDER BY q.due_at DESC LIMIT $2)"
            " UNION ALL (SELECT pg_catalog.jsonb_build_object('keys', ARRAY[f.key::pg_catalog.jsonb])"
            " FROM autoembed.failure AS f WHERE f.pipeline_id OPERATOR(pg_catalog.=) $1 LIMIT $2)",
            ["pg_catalog.int4", "pg_catalog.int4"],
            [pipeline_id, max_messages + 1],
        )
        return [message_body(row["message"]) for row in rows]

    def words_of(
        self, target: dict[str, Any], texts: Sequence[str], terms: Collection[str]
    ) -> list[tuple[int, dict[str, int]]]:
        """The number of words in each text, and how often it has which of these terms."""
        known = {text: _words.get((target["version"], text)) for text in texts}
        missing = [text for text, words in known.items() if words is None]
        if missing:
            for text, words in self._words_of(target["pipeline_id"], missing).items():
                known[text] = words
                _words.keep((target["version"], text), words)
        return [counts(words or "", terms) for words in map(known.get, texts)]

    def _words_of(self, pipeline_id: int, texts: Sequence[str]) -> dict[str, str]:
        """The words of texts, as counts() takes them."""
        cut = [(place, part) for place, text in enumerate(texts) for part in parts(text)]
        with as_role(self._texts_table()[1]):
            rows = self._run(
                "SELECT pg_catalog.concat_ws(' ', pg_catalog.sum(t.length), pg_catalog.string_agg(t.words, ' '))"
                " AS words FROM (SELECT t.place, w.words::pg_catalog.text, (SELECT"
                " pg_catalog.sum(coalesce(pg_catalog.cardinality(l.positions), 1))"
                " FROM ROWS FROM (pg_catalog.unnest(w.words)) AS l) AS length"
                " FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS t(place, part),"
                " autoembed._text_config($1) AS c(config), pg_catalog.to_tsvector(c.config, t.part) AS w(words)"
                " ) AS t GROUP BY t.place ORDER BY t.place",
                ["pg_catalog.int4", "pg_catalog.int4[]", "pg_catalog.text[]"],
                [pipeline_id, [place for place, _ in cut], [part for _, part in cut]],
            )
        return {text: row["words"] for text, row in zip(texts, rows, strict=True)}

    def documents(self, ids: Sequence[int]) -> dict[int, tuple[str, int]]:
        """The key and the number of the chunk of documents. The caller's rights are not asked for."""
        if not ids:
            return {}
        with as_role(self._texts_table()[1]):
            rows = self._run(
                "SELECT d.id, d.key, d.chunk_number FROM autoembed.text_document AS d"
                " WHERE d.id OPERATOR(pg_catalog.=) ANY ($1)",
                ["pg_catalog.int8[]"],
                [list(ids)],
            )
        return {row["id"]: (row["key"], row["chunk_number"]) for row in rows}

    def documents_of(self, pipeline_id: int, keys: Sequence[str]) -> dict[int, tuple[str, int]]:
        """The same of the documents of these rows."""
        with as_role(self._texts_table()[1]):
            return self._documents_of(pipeline_id, keys)

    def _documents_of(self, pipeline_id: int, keys: Sequence[str]) -> dict[int, tuple[str, int]]:
        if not keys:
            return {}
        rows = self._run(
            "SELECT d.id, d.key, d.chunk_number FROM autoembed.text_document AS d"
            " WHERE d.pipeline_id OPERATOR(pg_catalog.=) $1 AND d.is_live"
            " AND d.key OPERATOR(pg_catalog.=) ANY ($2)"
            " AND pg_catalog.hashtextextended(d.key, 0) OPERATOR(pg_catalog.=) ANY (ARRAY("
            'SELECT pg_catalog.hashtextextended(k.key COLLATE pg_catalog."C", 0)'
            " FROM pg_catalog.unnest($2) AS k(key)))",
            ["pg_catalog.int4", "pg_catalog.text[]"],
            [pipeline_id, list(keys)],
        )
        return {row["id"]: (row["key"], row["chunk_number"]) for row in rows}

    def _texts_table(self) -> tuple[int, int]:
        """The OID of a table of the text index, and of the role that owns them."""
        # A lane may live longer than an owner is one.
        if self._texts is None or self._lasts:
            [row] = self._run(
                "SELECT c.oid::pg_catalog.int8 AS id, c.relowner::pg_catalog.int8 AS owner"
                " FROM pg_catalog.pg_class AS c"
                " WHERE c.oid OPERATOR(pg_catalog.=) 'autoembed.text_segment'::pg_catalog.regclass"
            )
            self._texts = int(row["id"]), int(row["owner"])
        return self._texts

    def _segments(self, which: str, types: Sequence[str], arguments: Sequence[Any]) -> dict[int, Segment]:
        rows = self._run(
            f"SELECT s.id, s.documents, s.lengths FROM autoembed.text_segment AS s WHERE {which} ORDER BY s.id",
            types,
            arguments,
        )
        return {
            row["id"]: Segment(_numbers(row["documents"], ">i8"), _numbers(row["lengths"], ">i4"), {}) for row in rows
        }

    def _postings(self, segments: Sequence[int]) -> list[StoredPosting]:
        rows = self._run(
            "SELECT p.segment_id, p.term, p.ordinals, p.levels FROM autoembed.text_posting AS p"
            " WHERE p.segment_id OPERATOR(pg_catalog.=) ANY ($1)",
            ["pg_catalog.int8[]"],
            [list(segments)],
        )
        return [StoredPosting(row["segment_id"], row["term"], row["ordinals"], row["levels"]) for row in rows]

    def _dead_documents(self, pipeline_id: int) -> np.ndarray:
        [row] = self._run(f"SELECT ({_DEAD_DOCUMENTS}) AS ids", ["pg_catalog.int4"], [pipeline_id])
        return _numbers(row["ids"] or b"", ">i8")


def _forget_segments(table: int, ids: Collection[int]) -> None:
    """Forgets segments once they are too many: all but these, or all."""
    for kept in (set(ids), set()):
        if sum(len(segment.documents) for segment in _segments.values()) <= MAX_KEPT_DOCUMENTS:
            break
        for place in [place for place in _segments if place[0] != table or place[1] not in kept]:
            del _segments[place]


def _numbers(data: bytes, form: str) -> np.ndarray:
    """Numbers that SQL has put together."""
    import numpy as np

    return np.frombuffer(data, form).astype(form[1:])
