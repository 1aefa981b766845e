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

# The documents of a merged segment, and its postings, unless one segment alone has more.
MAX_MERGED = 50_000
MAX_MERGED_POSTINGS = 200_000


class Posting(NamedTuple):
    """The documents of a segment that have a term: their places in the segment, and how often each has it."""

    ordinals: np.ndarray
    frequencies: np.ndarray


@dataclass(frozen=True)
class Segment:
    """documents: their ids. lengths: the number of words in each."""

    documents: np.ndarray
    lengths: np.ndarray
    postings: Mapping[str, Posting] = field(default_factory=dict)


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
    return Segment(np.concatenate(documents), np.concatenate(lengths))


def live(documents: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """Which of these documents are not among the dead ones, whose ids are ascending."""
    import numpy as np

    if not len(dead):
        return np.ones(len(documents), bool)
    alive: np.ndarray = dead[np.minimum(np.searchsorted(dead, documents), len(dead) - 1)] != documents
    return alive


class Scores:
    """The documents that match a query, and their scores.

    terms: each term of the query with the number of its occurrences.
    """

    def __init__(self, segments: Sequence[Segment], terms: Mapping[str, int], dead: np.ndarray) -> None:
        import numpy as np

        whole = joined(segments)
        starts = [0, *itertools.accumulate(len(segment.documents) for segment in segments)]
        count, words = len(whole.documents), int(whole.lengths.sum())
        alive = live(whole.documents, dead) if len(dead) else None
        if alive is not None:
            count, words = int(alive.sum()), int(whole.lengths[alive].sum())
        mean = words / count if count else 1.0
        totals = np.zeros(len(whole.documents))
        for term, occurrences in terms.items():
            found = [
                (start + segment.postings[term].ordinals, segment.postings[term].frequencies)
                for start, segment in zip(starts, segments, strict=False)
                if term in segment.postings
            ]
            if not found:
                continue
            ordinals, frequencies = map(np.concatenate, zip(*found, strict=True))
            matching = len(ordinals) if alive is None else int(alive[ordinals].sum())
            weight = occurrences * math.log(1 + (count - matching + 0.5) / (matching + 0.5))
            norms = K1 * (1 - B + B * whole.lengths[ordinals] / mean)
            # A document is once in the postings of a term.
            totals[ordinals] += weight * frequencies * (K1 + 1) / (frequencies + norms)
        at = np.flatnonzero(totals > 0 if alive is None else (totals > 0) & alive)
        self.documents, self.scores = whole.documents[at], totals[at]

    def best(self, count: int) -> list[tuple[int, float]]:
        """So many documents with the best scores, or a few more, best first; of equal ones, the older first."""
        import numpy as np

        chosen = np.arange(len(self.scores))
        if count < len(chosen):
            least = np.partition(self.scores, len(self.scores) - count)[len(self.scores) - count]
            chosen = np.flatnonzero(self.scores >= least)
        chosen = chosen[np.lexsort((self.documents[chosen], -self.scores[chosen]))]
        return list(zip(self.documents[chosen].tolist(), self.scores[chosen].tolist(), strict=True))

    def of(self, documents: Collection[int]) -> dict[int, float]:
        """The scores of those of these documents that match."""
        import numpy as np

        at = np.flatnonzero(np.isin(self.documents, np.fromiter(documents, np.int64, len(documents))))
        return dict(zip(self.documents[at].tolist(), self.scores[at].tolist(), strict=True))


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
