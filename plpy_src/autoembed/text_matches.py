"""The rows whose texts have the words of a search: what only a search by words imports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from autoembed.bm25 import Scores, counted, merged_ids, with_segment
from autoembed.database.texts import TextDatabase
from autoembed.jobs import address_of
from autoembed.search import FEW_ROWS, MAX_QUERY_CHARACTERS, Near, near_of, tried_next

if TYPE_CHECKING:
    from autoembed.database.searches import SearchDatabase

# A look-up by an index reads two pages at least, and a page at random has this cost to PostgreSQL.
COST_OF_CANDIDATE = 2 * 4
# So many documents more than wanted rows are tried first where several may be of one row, or hidden.
SPARE_CANDIDATES = 20
# A search by words knows so many messages of rows that have changed, so many of these rows, and reads so many of their
# texts, the newest first, and bytes of them: with these, it takes some 0.1 s longer.
MAX_OUTSTANDING_MESSAGES = 1000
MAX_OUTSTANDING_ROWS = 5000
MAX_CHANGED_ROWS = 1000
MAX_CHANGED_BYTES = 1_000_000


class TextMatches:
    """The documents that match words: those of the text index, and the present texts of rows that have changed since.

    Documents with ids below 0 are such texts, read with the caller's rights.
    """

    def __init__(
        self,
        here: SearchDatabase,
        target: dict[str, Any],
        words: str,
        condition: str | None,
        keys: Sequence[str] = (),
        vector: str | None = None,
    ) -> None:
        """keys: of rows that fulfil the condition, and that the caller may read. Their scores are wanted, too.

        vector: one whose distances to other rows are wanted.
        """
        self._here = here
        self._index = TextDatabase(lasts=False)
        self._target = target
        self._pipeline_id: int = target["pipeline_id"]
        self._condition = condition
        self._found = set(keys)
        here.print_no_plans()
        words = words[:MAX_QUERY_CHARACTERS]
        index = self._index.text_index(self._pipeline_id, words, keys, MAX_OUTSTANDING_MESSAGES)
        self._terms = index.terms
        documents, dead = index.documents, index.dead
        changed, self._all_known = _changed(index.messages)
        texts = (self._texts(changed[:MAX_CHANGED_ROWS]) if changed else None) or []
        self._changed = {number: key for number, (key, _) in enumerate(texts, -len(texts))}
        if changed:
            counts = self._index.words_of(target, [text for _, text in texts], self._terms)
            documents = with_segment(documents, index.postings, counted(counts))
            dead = merged_ids(dead, self._index.documents_of(self._pipeline_id, changed))
        self._scores = Scores(documents, index.postings, self._terms, dead)
        self._vector = vector
        # The rows of the documents that have been read, but for those of keys.
        self.near: dict[str, Near] = {}
        self._documents = dict(index.of_rows)
        # The key and the chunk number of each document of the index; None: the caller may not read it.
        self._read: dict[int, tuple[str, int] | None] = {}
        self._of_keys = self._scored(keys, index.of_rows)

    def best(self, wanted: int) -> dict[str, tuple[int, float]]:
        """So many rows that match best and fulfil the condition: the number of their best chunk, and its score."""
        scores = self._scores
        found: dict[str, tuple[int, float]] = {}
        target = self._target
        may_be_left_out = target["is_chunked"] or target["has_policies"] or self._condition is not None
        tried, limit, are_all = 0, wanted + SPARE_CANDIDATES * may_be_left_out, False
        while len(found) < wanted and not are_all:
            few = self._few_rows(tried * (wanted / max(1, len(found)) - 1)) if tried else None
            if few is not None:
                # Most candidates are not among the rows that match. These are fewer.
                documents = self._index.documents_of(self._pipeline_id, few)
                self._documents.update(documents)
                candidates, are_all = self._scored(few, documents), True
                self._found.update(few)
            else:
                best = scores.best(limit)
                candidates, tried, are_all = best[tried:], len(best), len(best) < limit
            # One look for those of the rows that are known, too.
            self._visible([*candidates, *self._of_keys])
            passages = [one for one in self._visible(candidates) if one[0] not in found]
            unknown = list(dict.fromkeys(key for key, _, _ in passages if key not in self._found))
            if self._condition is not None and unknown:
                query = f"{self._target['matching_query']}{self._condition}\n{self._target['matching_end']}"
                matching = self._here.matching(query, unknown)
                passages = [one for one in passages if one[0] in self._found or one[0] in matching]
            for key, number, score in passages:
                found.setdefault(key, (number, score))
            limit = tried_next(tried, len(found), wanted)
        return dict(list(found.items())[:wanted])

    def of_keys(self) -> dict[str, tuple[int, float]]:
        """Those of the rows of keys that match: the number of their best chunk, and its score."""
        found: dict[str, tuple[int, float]] = {}
        for key, number, score in self._visible(self._of_keys):
            found.setdefault(key, (number, score))
        return found

    def _texts(self, keys: Sequence[str]) -> list[tuple[str, str]] | None:
        """The keys and present texts of rows, up to a limit; None: the texts are code of the table's owner."""
        query = self._target["texts_query"]
        return None if query is None else self._here.present_texts(query, keys, MAX_CHANGED_BYTES)

    def _scored(self, keys: Sequence[str], documents: Iterable[int]) -> list[tuple[int, float]]:
        """Those of these rows' documents that match, with their scores, best first."""
        of_rows = set(keys)
        changed = [document for document, key in self._changed.items() if key in of_rows]
        return sorted(self._scores.of([*changed, *documents]).items(), key=lambda one: (-one[1], one[0]))

    def _few_rows(self, candidates: float) -> list[str] | None:
        """The keys of all rows that fulfil the condition and that the caller may read.

        None: they are no fewer than these candidates, take longer to find, or are too many or not known.
        """
        candidates = min(candidates, self._scores.most, FEW_ROWS)
        estimated, cost = self._here.estimated_matches(self._target, self._condition)
        if estimated is None or estimated > candidates or cost > candidates * COST_OF_CANDIDATE:
            return None
        keys = self._here.keys(f"{self._target['keys_query']}{self._condition or 'true'}\n)) AS t LIMIT {4 * FEW_ROWS}")
        return keys if len(keys) < 4 * FEW_ROWS else None

    def _visible(self, candidates: Sequence[tuple[int, float]]) -> list[tuple[str, int, float]]:
        """Those of these documents that the caller may read: the key, the number of the chunk, and the score of each.

        A text that has changed has no chunk: its number is 0.
        """
        # A condition may have them printed again.
        self._here.print_no_plans()
        unread = list(dict.fromkeys(one for one, _ in candidates if one >= 0 and one not in self._read))
        self._read.update(dict.fromkeys(unread))
        self._documents.update(self._index.documents([one for one in unread if one not in self._documents]))
        documents = {one: self._documents[one] for one in unread if one in self._documents}
        # A condition may end its query, and give keys of rows that the caller may not read.
        known = self._found if self._condition is None else ()
        read = {document: one for document, one in documents.items() if one[0] in known}
        others = [document for document in documents if document not in read]
        if others:
            keys, numbers = zip(*(documents[document] for document in others), strict=True)
            distance = "NULL::pg_catalog.float8" if self._vector is None else self._target["visible_distance"]
            query = f"{self._target['visible_start']}{distance} AS distance{self._target['visible_end']}"
            visible = self._here.visible(query, self._target["vector_type"], keys, numbers, self._vector)
            for place, (key, distance) in visible.items():
                read[others[place]] = key, numbers[place]
                if distance is not None:
                    self.near[key] = near_of(key, distance, numbers[place])
        if not self._all_known:
            matching = self._still_match(list({key for key, _ in read.values()}))
            read = {document: one for document, one in read.items() if one[0] in matching}
        self._read.update(read)
        passages = [
            ((self._changed[document], 0) if document < 0 else self._read[document], score)
            for document, score in candidates
        ]
        return [(*passage, score) for passage, score in passages if passage is not None]

    def _still_match(self, keys: Sequence[str]) -> set[str]:
        """Those of these rows whose present texts have a word of the query. Too many have changed to know them all."""
        texts = self._texts(keys)
        if texts is None:
            return set(keys)
        counts = self._index.words_of(self._target, [text for _, text in texts], self._terms)
        return {key for (key, _), (_, terms) in zip(texts, counts, strict=True) if terms}


def _changed(messages: Sequence[Any]) -> tuple[list[str], bool]:
    """The keys in messages, and whether these are all that have changed."""
    keys: dict[str, None] = {}
    for number, message in enumerate(messages):
        if number == MAX_OUTSTANDING_MESSAGES or len(keys) > MAX_OUTSTANDING_ROWS:
            return list(keys), False
        # A lane refuses messages that name no row.
        with contextlib.suppress(ValueError):
            keys.update(dict.fromkeys(address_of(message).keys))
    return list(keys), True
