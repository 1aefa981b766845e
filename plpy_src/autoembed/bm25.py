"""The text index: how well texts match words (BM25), and how segments are merged.

A segment is a list of documents with their lengths, and for each term the places of its documents in that list. How
often a document has a term is one byte, its level: a number below 128, or above it the eighths of doublings of 128.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

# How soon a term that comes again counts no more, and how much long texts are marked down.
K1 = 1.2
B = 0.75
# Longer texts are indexed up to here, in characters.
MAX_CHARACTERS = 1_000_000
# PostgreSQL counts the words of a text only up to the 16,384th, so long texts are counted in parts.
PART_CHARACTERS = 30_000

# The characters of texts of which one statement tells the words.
STATEMENT_CHARACTERS = 300_000
# PostgreSQL reads a text from each of these to the end, and no cancel ends that. A part of a text may have so many.
ENDLESS = ("<?", "<!--")
MAX_ENDLESS = 20
# A plain word has no more characters.
PLAIN_WORD_CHARACTERS = 100

# A lower level is a number of occurrences. Each so many levels above it double the number.
EXACT_LEVELS = 128
LEVELS_PER_DOUBLING = 8

# So many postings of a term are scored at a time.
PART_POSTINGS = 1 << 15
# So many scores in a row are told by the greatest of them.
BLOCK = 256
# A look for the candidates costs as much as to score a term of so small a share of the documents.
SHARE_OF_A_LOOK = 1 / 16
# To look up the level of a candidate takes as long as to score so many postings.
POSTINGS_PER_LOOKUP = 6
# Sums of scores are rounded by less.
ROUNDING = 1.0001

# The documents of a merged segment, and its postings, unless one segment alone has more.
MAX_MERGED = 65_000
MAX_MERGED_POSTINGS = 200_000
# So many places of documents are merged at a time: some megabytes.
PART_MERGED = 200_000


class Posting(NamedTuple):
    """The documents of a segment that have a term: their places in the segment, and the level of each.

    ordinals: ascending. None: levels has one for each document of the segment, 0 for those without the term.
    """

    ordinals: np.ndarray | None
    levels: np.ndarray


class TermPostings(NamedTuple):
    """The postings of one term in several segments, one after the other.

    starts: the place of the first document of each segment. sizes: the number of levels of each posting. ordinals and
    levels: as those of a posting.
    """

    starts: np.ndarray
    sizes: np.ndarray
    ordinals: np.ndarray | None
    levels: np.ndarray


class StoredPosting(NamedTuple):
    """A posting of a segment as the text index has it."""

    segment: int
    term: str
    ordinals: bytes
    levels: bytes


class Segment(NamedTuple):
    """documents: their ids. lengths: the number of words in each."""

    documents: np.ndarray
    lengths: np.ndarray
    postings: dict[str, Posting]


def level_of(occurrences: int) -> int:
    """The level of a number of occurrences. autoembed._index_texts() has the same rule."""
    if occurrences < EXACT_LEVELS:
        return occurrences
    return min(255, EXACT_LEVELS + round(LEVELS_PER_DOUBLING * math.log2(occurrences / EXACT_LEVELS)))


def occurrences_of(levels: np.ndarray) -> np.ndarray:
    """The numbers of occurrences that levels stand for, float32."""
    import numpy as np

    occurrences = levels.astype(np.float32)
    high = levels >= EXACT_LEVELS
    if high.any():
        occurrences[high] = EXACT_LEVELS * np.exp2((occurrences[high] - EXACT_LEVELS) / LEVELS_PER_DOUBLING)
    return occurrences


def packed(posting: Posting, document_count: int) -> tuple[bytes, bytes]:
    """A posting with ordinals as the text index has it."""
    import numpy as np

    ordinals, levels = posting
    if ordinals is not None and _is_common(len(ordinals), document_count):
        every = np.zeros(document_count, np.uint8)
        every[ordinals] = levels
        return b"", every.tobytes()
    return (b"" if ordinals is None else ordinals.astype(">u2").tobytes()), levels.tobytes()


def unpacked(ordinals: bytes, levels: bytes) -> Posting:
    """A posting of the text index, or those of several segments in one form, one after the other."""
    import numpy as np

    return Posting(np.frombuffer(ordinals, ">u2") if ordinals else None, np.frombuffer(levels, np.uint8))


def counts(words: str, terms: Collection[str]) -> tuple[int, dict[str, int]]:
    """The number of words in a text, and how often it has which of these terms.

    words: that number, and the words as PostgreSQL writes a tsvector, which may have parts with the same words.
    """
    found = {}
    for term in terms:
        start = " '" + term.replace("\\", "\\\\").replace("'", "''") + "':"
        if start in words:
            _, *places = words.split(start)
            found[term] = sum(part.partition(" ")[0].count(",") + 1 for part in places)
    return int(words.partition(" ")[0] or 0), found


def counted(texts: Sequence[tuple[int, Mapping[str, int]]]) -> Segment:
    """A segment of texts that are in no segment yet: the number of words in each, and how often it has which term.

    Its documents are -1 for the last text, -2 for the one before, and so on.
    """
    import numpy as np

    found: dict[str, tuple[list[int], list[int]]] = {}
    for place, (_, frequencies) in enumerate(texts):
        for term, frequency in frequencies.items():
            places, levels = found.setdefault(term, ([], []))
            places.append(place)
            levels.append(level_of(frequency))
    return Segment(
        np.arange(-len(texts), 0),
        np.array([length for length, _ in texts], np.int64),
        {term: Posting(np.array(places), np.array(levels, np.uint8)) for term, (places, levels) in found.items()},
    )


def parts(text: str) -> Iterator[str]:
    """The parts in which a text is counted. They end between words, where there is a space."""
    end = min(len(text), MAX_CHARACTERS)
    start = 0
    while end - start > PART_CHARACTERS:
        cut = text.rfind(" ", start + PART_CHARACTERS // 2, start + PART_CHARACTERS) + 1 or start + PART_CHARACTERS
        yield _readable(text[start:cut])
        start = cut
    yield _readable(text[start:end])


def _readable(part: str) -> str:
    """A part of a text that the parser of PostgreSQL can be cancelled in."""
    return plain_words(part) if sum(map(part.count, ENDLESS)) > MAX_ENDLESS else part


def plain_words(text: str) -> str:
    """The letters and digits of a text, in words that are not too long.

    The parser of PostgreSQL takes time that grows with the square of the length of "a_a_a_…".
    """
    return " ".join(word[:PLAIN_WORD_CHARACTERS] for word in re.findall(r"[^\W_]+", text))


def merged_ids(ascending: np.ndarray, others: Collection[int]) -> np.ndarray:
    """Ids of both, ascending."""
    import numpy as np

    return np.union1d(ascending, np.fromiter(others, np.int64, len(others)))


def live(documents: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """Which of these documents are not among the dead ones, whose ids are ascending."""
    import numpy as np

    if not len(dead):
        return np.ones(len(documents), bool)
    alive: np.ndarray = dead[np.minimum(np.searchsorted(dead, documents), len(dead) - 1)] != documents
    return alive


@dataclass(frozen=True)
class Documents:
    """The documents of all segments, one segment after the other.

    ids: they ascend within a segment. lengths: the number of words in each.
    """

    ids: np.ndarray
    lengths: np.ndarray
    _norms: dict[float, tuple[np.ndarray, float]] = field(default_factory=dict)

    @cached_property
    def words(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the ids begin to ascend, and where each of these runs ends."""
        import numpy as np

        cuts = np.flatnonzero(np.diff(self.ids) <= 0) + 1
        bounds = np.concatenate(([0], cuts, [len(self.ids)]))
        return bounds[:-1], bounds[1:]

    def norms(self, mean: float) -> tuple[np.ndarray, float]:
        """How much the length of each document marks it down, float32, and the least of it. mean: of the lengths."""
        import numpy as np

        if mean not in self._norms:
            # In single precision, which takes half as long.
            norms = self.lengths.astype(np.float32)
            norms *= K1 * B / mean
            norms += K1 * (1 - B)
            self._norms.clear()
            self._norms[mean] = norms, float(norms.min(initial=math.inf))
        return self._norms[mean]

    def places(self, ids: np.ndarray) -> np.ndarray:
        """The places of those of these documents that are there. ids: ascending."""
        import numpy as np

        found = [np.empty(0, np.int64)]
        if len(ids) and len(self.ids):
            starts, ends = self._runs
            firsts = np.searchsorted(ids, self.ids[starts])
            lasts = np.searchsorted(ids, self.ids[ends - 1], "right")
            for run in np.flatnonzero(firsts < lasts).tolist():
                part, wanted = self.ids[starts[run] : ends[run]], ids[firsts[run] : lasts[run]]
                at = part.searchsorted(wanted)
                found.append(starts[run] + at[part[at] == wanted])
        return np.concatenate(found)


def joined(segments: Sequence[Segment]) -> Documents:
    """The documents of all of these, in their order."""
    import numpy as np

    ids = [np.empty(0, np.int64), *(segment.documents for segment in segments)]
    lengths = [np.empty(0, np.int32), *(segment.lengths for segment in segments)]
    return Documents(np.concatenate(ids), np.concatenate(lengths))


def with_segment(documents: Documents, postings: dict[str, list[TermPostings]], segment: Segment) -> Documents:
    """These documents, and those of one more segment. Its postings are added to the others, as Scores() takes them."""
    import numpy as np

    start = np.array([len(documents.ids)])
    for term, posting in segment.postings.items():
        postings.setdefault(term, []).append(TermPostings(start, np.array([len(posting.levels)]), *posting))
    return Documents(
        np.concatenate((documents.ids, segment.documents)), np.concatenate((documents.lengths, segment.lengths))
    )


class EveryLevel(NamedTuple):
    """Levels of a term for all documents of several segments.

    starts, ends: the places of the first document of each segment, and behind its last. shifts: levels has the level of
    a document so many places behind that of the document.
    """

    starts: np.ndarray
    ends: np.ndarray
    shifts: np.ndarray
    levels: np.ndarray

    @classmethod
    def of(cls, postings: TermPostings) -> EveryLevel:
        import numpy as np

        starts, sizes, _, levels = postings
        return cls(starts, starts + sizes, np.cumsum(sizes) - sizes - starts, levels)


class Having:
    """The documents of all segments that have a term, by their places.

    count: their number. highest: the highest of their levels.
    """

    def __init__(self, postings: Sequence[TermPostings]) -> None:
        """postings: their segments do not overlap, and follow each other in the order of the documents."""
        import numpy as np

        # Those of segments that have a level for each document.
        self._every = [EveryLevel.of(one) for one in postings if one.ordinals is None]
        some = [one for one in postings if one.ordinals is not None]
        self.places = _one_array(np.int64, [np.repeat(one.starts, one.sizes) + one.ordinals for one in some])
        self.levels = _one_array(np.uint8, [one.levels for one in some])
        self.count = len(self.levels) + sum(int(np.count_nonzero(every.levels)) for every in self._every)
        self.highest = max(int(levels.max(initial=0)) for levels in (self.levels, *(one.levels for one in self._every)))

    def runs(self) -> Iterator[tuple[int, np.ndarray]]:
        """Where each segment starts that has a level for each document, and these levels."""
        for every in self._every:
            for start, end, shift in zip(*(column.tolist() for column in every[:3]), strict=True):
                yield start, every.levels[start + shift : end + shift]

    def levels_at(self, places: np.ndarray) -> np.ndarray:
        """The levels of the documents at these places, which ascend."""
        import numpy as np

        found = np.zeros(len(places), np.uint8)
        if len(self.places) and len(places):
            at = np.minimum(np.searchsorted(self.places, places), len(self.places) - 1)
            np.copyto(found, self.levels.take(at), where=self.places.take(at) == places)
        for starts, ends, shifts, levels in self._every:
            segment = np.maximum(np.searchsorted(starts, places, "right") - 1, 0)
            at = places + shifts.take(segment)
            is_there = (places >= starts.take(segment)) & (places < ends.take(segment))
            found[is_there] = levels[at[is_there]]
        return found


def _one_array(kind: type[np.generic], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """These arrays in one. kind: the type of its numbers."""
    import numpy as np

    # To join arrays copies them.
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, kind), *arrays])


class Term(NamedTuple):
    """A term of a query, how much a document with it counts, and the most that it adds to a score."""

    having: Having
    weight: np.float32
    most: float


class Scores:
    """The documents that match a query, and their scores (BM25).

    most: at most so many match.
    """

    def __init__(
        self,
        documents: Documents,
        postings: Mapping[str, Sequence[TermPostings]],
        terms: Mapping[str, int],
        dead: np.ndarray,
    ) -> None:
        """postings: of each term, as Having() takes them.

        terms: each term of the query with the number of its occurrences. dead: ids of documents, ascending.
        """
        import numpy as np

        self._documents, self._dead = documents, dead
        self._gone = gone = documents.places(dead)
        count = len(documents.ids) - len(gone)
        words = documents.words - int(documents.lengths[gone].sum())
        # The average length may be 0: no document has a word.
        self._norms, least_norm = documents.norms(words / count if words else 1.0)
        found = []
        for term, occurrences in terms.items():
            having = Having(postings.get(term, ()))
            matching = having.count - int(np.count_nonzero(having.levels_at(gone)))
            weight = np.float32((K1 + 1) * occurrences * math.log(1 + (count - matching + 0.5) / (matching + 0.5)))
            if matching:
                [highest] = occurrences_of(np.array([having.highest], np.uint8)).tolist()
                found.append(Term(having, weight, float(weight) * highest / (highest + least_norm)))
        # Terms that add much come first, so that the others may need no look at most documents (MaxScore: Turtle and
        # Flood, "Query evaluation: strategies and optimizations", 1995).
        self._terms = sorted(found, key=lambda term: -term.most)
        self.most = sum(term.having.count for term in found)

    def best(self, count: int) -> list[tuple[int, float]]:
        """So many documents with the best scores, best first; of equal ones, the older first."""
        import numpy as np

        totals = np.zeros(len(self._documents.ids), np.float32)
        candidates = None
        to_come = sum(term.most for term in self._terms)
        for term in self._terms:
            if term.having.count > SHARE_OF_A_LOOK * len(totals):
                candidates = self._narrowed(totals, candidates, count, to_come)
            self._add(totals, term, candidates)
            to_come -= term.most
        candidates = self._narrowed(totals, candidates, count, 0.0)
        if candidates is None:
            candidates = np.flatnonzero(totals)
        scores = totals.take(candidates)
        if count < len(scores):
            is_best = scores >= _greatest(scores, count)
            candidates, scores = candidates[is_best], scores[is_best]
        ids = self._documents.ids.take(candidates)
        order = np.lexsort((ids, -scores))[:count]
        return list(zip(ids[order].tolist(), scores[order].tolist(), strict=True))

    def of(self, ids: Collection[int]) -> dict[int, float]:
        """The scores of those of these documents that match."""
        import numpy as np

        wanted = np.unique(np.fromiter(ids, np.int64, len(ids)))
        places = np.sort(self._documents.places(wanted[live(wanted, self._dead)]))
        totals = np.zeros(len(places), np.float32)
        for term in self._terms:
            totals += _gains(term, term.having.levels_at(places), self._norms.take(places))
        found = zip(self._documents.ids.take(places).tolist(), totals.tolist(), strict=True)
        return {document: score for document, score in found if score}

    def _narrowed(
        self, totals: np.ndarray, candidates: np.ndarray | None, count: int, to_come: float
    ) -> np.ndarray | None:
        """The places of those of the candidates that may be among so many best. None: all documents may be.

        to_come: other terms add at most so much to a score.
        """
        import numpy as np

        totals[self._gone] = 0
        scores = totals if candidates is None else totals.take(candidates)
        least = _reached(scores, count) / ROUNDING - to_come
        if least <= 0:
            return candidates
        chosen = np.flatnonzero(scores >= least)
        return chosen if candidates is None else candidates[chosen]

    def _add(self, totals: np.ndarray, term: Term, candidates: np.ndarray | None) -> None:
        """Adds what a term gives to the scores, at least to those of the candidates."""
        having, norms = term.having, self._norms
        if candidates is not None and POSTINGS_PER_LOOKUP * len(candidates) < having.count:
            totals[candidates] += _gains(term, having.levels_at(candidates), norms.take(candidates))
            return
        for start, levels in having.runs():
            end = start + len(levels)
            totals[start:end] += _gains(term, levels, norms[start:end])
        # A million new numbers take longer than what is done with them, and a part stays in the processor's cache.
        for start in range(0, len(having.places), PART_POSTINGS):
            places = having.places[start : start + PART_POSTINGS]
            # A document is once in the postings of a term.
            totals[places] += _gains(term, having.levels[start : start + PART_POSTINGS], norms.take(places))


def _gains(term: Term, levels: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """How much a term adds to the scores of documents with these levels."""
    import numpy as np

    occurrences = occurrences_of(levels)
    gains: np.ndarray = norms + occurrences
    np.divide(occurrences, gains, out=gains)
    gains *= term.weight
    return gains


def _greatest(values: np.ndarray, count: int) -> float:
    """The least of so many of the greatest of these."""
    import numpy as np

    return float(np.partition(values, len(values) - count)[len(values) - count])


def _reached(scores: np.ndarray, count: int) -> float:
    """A score that at least so many of these reach, and few more. 0: there are not so many."""
    import numpy as np

    if not 0 < count < len(scores):
        return 0.0
    block = min(BLOCK, max(1, len(scores) // (8 * count)))
    return _greatest(np.maximum.reduceat(scores, np.arange(0, len(scores), block)), count)


def most_dead(segments: Mapping[int, Segment], dead: np.ndarray, postings: Mapping[int, int]) -> list[int]:
    """The segments with the greatest share of dead documents, as many as one merge takes, at least one.

    postings: how many each segment has.
    """
    alive = {number: live(segment.documents, dead) for number, segment in segments.items() if len(segment.documents)}
    chosen: list[int] = []
    documents = terms = 0
    for number in sorted(alive, key=lambda one: alive[one].mean()):
        documents += len(alive[number])
        terms += postings[number]
        if alive[number].all() or chosen and (documents > MAX_MERGED or terms > MAX_MERGED_POSTINGS):
            break
        chosen.append(number)
    return chosen


def merged(
    segments: Mapping[int, Segment], postings: Iterable[StoredPosting], dead: np.ndarray
) -> tuple[Segment, list[StoredPosting]]:
    """One segment in place of several, without their dead documents, and its postings, whose segment is 0."""
    import numpy as np

    documents = np.concatenate([segment.documents for segment in segments.values()])
    lengths = np.concatenate([segment.lengths for segment in segments.values()])
    order = np.argsort(documents, kind="stable")
    order = order[live(documents, dead)[order]]
    place = np.full(len(documents), -1, np.int64)
    place[order] = np.arange(len(order))
    document_counts = {number: len(segment.documents) for number, segment in segments.items()}
    starts = dict(zip(document_counts, itertools.accumulate(document_counts.values(), initial=0), strict=False))
    every = {number: np.arange(count).astype(">u2").tobytes() for number, count in document_counts.items()}
    found: list[StoredPosting] = []
    for part in _of_whole_terms(postings):
        sizes = [len(posting.levels) for posting in part]
        ordinals = np.frombuffer(b"".join([one.ordinals or every[one.segment] for one in part]), ">u2")
        levels = np.frombuffer(b"".join([posting.levels for posting in part]), np.uint8)
        places = place[np.repeat([starts[posting.segment] for posting in part], sizes) + ordinals]
        terms = {term: number for number, term in enumerate(dict.fromkeys(posting.term for posting in part))}
        # One number for both, so that one sort does for all terms.
        keys = np.repeat([terms[posting.term] for posting in part], sizes) * len(order) + places
        is_there = (places >= 0) & (levels > 0)
        keys, levels = keys[is_there], levels[is_there]
        ascending = np.argsort(keys)
        keys, levels = keys[ascending], levels[ascending]
        ends = np.searchsorted(keys, len(order) * np.arange(1, len(terms) + 1))
        found += _cut(list(terms), ends.tolist(), keys % max(1, len(order)), levels, len(order))
    return Segment(documents[order], lengths[order], {}), found


def _of_whole_terms(postings: Iterable[StoredPosting]) -> Iterator[list[StoredPosting]]:
    """Lists of postings, each with all of a term, and of not many documents."""
    part: list[StoredPosting] = []
    size = 0
    for _, of_term in itertools.groupby(sorted(postings, key=attrgetter("term")), key=attrgetter("term")):
        if size > PART_MERGED:
            yield part
            part, size = [], 0
        for posting in of_term:
            part.append(posting)
            size += len(posting.levels)
    if part:
        yield part


def _cut(
    terms: Sequence[str], ends: Sequence[int], ordinals: np.ndarray, levels: np.ndarray, document_count: int
) -> Iterator[StoredPosting]:
    """The postings of these terms, which follow each other. ends: where that of each term ends."""
    # To cut bytes takes less time than to cut arrays.
    all_ordinals, all_levels = ordinals.astype(">u2").tobytes(), levels.tobytes()
    for term, (start, end) in zip(terms, itertools.pairwise([0, *ends]), strict=True):
        if _is_common(end - start, document_count):
            yield StoredPosting(0, term, *packed(Posting(ordinals[start:end], levels[start:end]), document_count))
        elif start < end:
            yield StoredPosting(0, term, all_ordinals[2 * start : 2 * end], all_levels[start:end])


def _is_common(having: int, document_count: int) -> bool:
    """Whether a level for each document takes less room, and less time, than the places of those with a term."""
    return 4 * having > document_count
