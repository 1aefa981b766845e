"""The text index: how well texts match words (BM25), and how segments are merged.

A segment is a list of documents with their lengths, and for each term the places of its documents in that list.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

# So many postings of a term are scored at a time.
PART_POSTINGS = 1 << 15
# So many scores in a row are told by the greatest of them.
BLOCK = 256

# The documents of a merged segment, and its postings, unless one segment alone has more.
MAX_MERGED = 50_000
MAX_MERGED_POSTINGS = 200_000


class Posting(NamedTuple):
    """The documents of a segment that have a term: their places in the segment, and how often each has it."""

    ordinals: np.ndarray
    frequencies: np.ndarray


@dataclass(frozen=True)
class Segment:
    """documents: their ids. lengths: the number of words in each. starts: where the ids begin to ascend again."""

    documents: np.ndarray
    lengths: np.ndarray
    postings: Mapping[str, Posting] = field(default_factory=dict)
    starts: Sequence[int] = (0,)


def counted(texts: Sequence[tuple[int, Mapping[str, int]]]) -> Segment:
    """A segment of texts that are in no segment yet: the number of words in each, and how often it has which term.

    Its documents are -1 for the last text, -2 for the one before, and so on.
    """
    import numpy as np

    found: dict[str, tuple[list[int], list[int]]] = {}
    for place, (_, frequencies) in enumerate(texts):
        for term, frequency in frequencies.items():
            places, counts = found.setdefault(term, ([], []))
            places.append(place)
            counts.append(frequency)
    return Segment(
        np.arange(-len(texts), 0),
        np.array([length for length, _ in texts], np.int64),
        {term: Posting(np.array(places), np.array(counts)) for term, (places, counts) in found.items()},
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


def joined(segments: Sequence[Segment]) -> Segment:
    """The documents of all of these, in their order. Only one that is alone keeps its postings."""
    import numpy as np

    if len(segments) == 1:
        return segments[0]
    documents = [np.empty(0, np.int64), *(segment.documents for segment in segments)]
    lengths = [np.empty(0, np.int32), *(segment.lengths for segment in segments)]
    offsets = itertools.accumulate((len(segment.documents) for segment in segments), initial=0)
    starts = [offset + start for offset, segment in zip(offsets, segments, strict=False) for start in segment.starts]
    return Segment(np.concatenate(documents), np.concatenate(lengths), starts=starts)


def live(documents: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """Which of these documents are not among the dead ones, whose ids are ascending."""
    import numpy as np

    if not len(dead):
        return np.ones(len(documents), bool)
    alive: np.ndarray = dead[np.minimum(np.searchsorted(dead, documents), len(dead) - 1)] != documents
    return alive


class Scores:
    """The documents that match a query, and their scores.

    terms: each term of the query with the number of its occurrences. dead: ids, ascending. count: how many match.
    """

    def __init__(self, segments: Sequence[Segment], terms: Mapping[str, int], dead: np.ndarray) -> None:
        import numpy as np

        self._whole = whole = joined(segments)
        offsets = list(itertools.accumulate((len(segment.documents) for segment in segments), initial=0))
        gone = self._places(dead)
        is_gone = np.zeros(len(whole.documents), bool)
        is_gone[gone] = True
        count = len(whole.documents) - len(gone)
        words = int(whole.lengths.sum()) - int(whole.lengths[gone].sum())
        # The average length may be 0: no document has a word.
        mean = words / count if words else 1.0
        # In single precision, which takes half as long.
        by_length = whole.lengths.astype(np.float32)
        by_length *= K1 * B / mean
        by_length += K1 * (1 - B)
        self._totals = np.zeros(len(whole.documents), np.float32)
        for term, occurrences in terms.items():
            found = [
                (offset + segment.postings[term].ordinals, segment.postings[term].frequencies)
                for offset, segment in zip(offsets, segments, strict=False)
                if term in segment.postings
            ]
            if not found:
                continue
            # To concatenate a single array would copy it.
            ordinals, frequencies = found[0] if len(found) == 1 else map(np.concatenate, zip(*found, strict=True))
            matching = len(ordinals) - (int(is_gone[ordinals].sum()) if len(gone) else 0)
            weight = np.float32((K1 + 1) * occurrences * math.log(1 + (count - matching + 0.5) / (matching + 0.5)))
            # A million new numbers take longer than what is done with them, and a part stays in the processor's cache.
            for start in range(0, len(ordinals), PART_POSTINGS):
                places = ordinals[start : start + PART_POSTINGS]
                scores = by_length.take(places)
                part = frequencies[start : start + PART_POSTINGS].astype(np.float32, copy=False)
                scores += part
                np.divide(part, scores, out=scores)
                scores *= weight
                # A document is once in the postings of a term.
                scores += self._totals.take(places)
                self._totals[places] = scores
        self._totals[gone] = 0
        self.count = int(np.count_nonzero(self._totals))

    def best(self, count: int) -> list[tuple[int, float]]:
        """So many documents with the best scores, or a few more, best first; of equal ones, the older first."""
        import numpy as np

        documents, totals = self._whole.documents, self._totals
        least = _at_least(totals, count) if count < self.count else 0.0
        chosen = np.flatnonzero(totals >= least) if least else np.flatnonzero(totals)
        if count < len(chosen):
            chosen = chosen[totals[chosen] >= _greatest(totals[chosen], count)]
        chosen = chosen[np.lexsort((documents[chosen], -totals[chosen]))]
        return list(zip(documents[chosen].tolist(), totals[chosen].tolist(), strict=True))

    def of(self, documents: Collection[int]) -> dict[int, float]:
        """The scores of those of these documents that match."""
        import numpy as np

        places = self._places(np.unique(np.fromiter(documents, np.int64, len(documents))))
        found = zip(self._whole.documents[places].tolist(), self._totals[places].tolist(), strict=True)
        return {document: score for document, score in found if score}

    def _places(self, documents: np.ndarray) -> np.ndarray:
        """The places of those of these documents that are there. documents: ids, ascending."""
        import numpy as np

        found = [np.empty(0, np.int64)]
        for start, end in itertools.pairwise([*self._whole.starts, len(self._whole.documents)]):
            part = self._whole.documents[start:end]
            if len(part):
                first, last = np.searchsorted(documents, (part[0], part[-1] + 1))
                at = np.searchsorted(part, documents[first:last])
                found.append(start + at[part[at] == documents[first:last]])
        return np.concatenate(found)


def _greatest(values: np.ndarray, count: int) -> float:
    """The least of so many of the greatest of these."""
    import numpy as np

    return float(np.partition(values, len(values) - count)[len(values) - count])


def _at_least(values: np.ndarray, count: int) -> float:
    """A number that at least so many of these reach, and few others. 0: none is known without a look at all of them."""
    import numpy as np

    blocks = range(0, len(values), BLOCK)
    return _greatest(np.maximum.reduceat(values, blocks), count) if count <= len(blocks) else 0.0


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


class Merged(NamedTuple):
    """A merged segment, and its postings as columns."""

    documents: np.ndarray
    lengths: np.ndarray
    terms: list[str]
    ordinals: list[np.ndarray]
    frequencies: list[np.ndarray]


def merged(segments: Sequence[Segment], dead: np.ndarray) -> Merged:
    """One segment in place of several, without their dead documents."""
    import numpy as np

    documents = np.concatenate([segment.documents for segment in segments])
    lengths = np.concatenate([segment.lengths for segment in segments])
    alive = live(documents, dead)
    order = np.argsort(documents, kind="stable")
    order = order[alive[order]]
    place = np.full(len(documents), -1, np.int64)
    place[order] = np.arange(len(order))
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    offset = 0
    for segment in segments:
        for term, (ordinals, frequencies) in segment.postings.items():
            found.setdefault(term, []).append((place[ordinals + offset], frequencies))
        offset += len(segment.documents)
    result = Merged(documents[order], lengths[order], [], [], [])
    for term, parts_of_term in found.items():
        ordinals = np.concatenate([part for part, _ in parts_of_term])
        kept = ordinals >= 0
        if kept.any():
            result.terms.append(term)
            result.ordinals.append(ordinals[kept])
            result.frequencies.append(np.concatenate([part for _, part in parts_of_term])[kept])
    return result
