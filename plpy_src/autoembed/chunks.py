"""Cuts a long text into chunks that a model takes whole: at its headings, paragraphs and sentences where it has them.

Every step reads a text forwards once and keeps a bounded part of it. Expressions are possessive or have a fixed width,
so no text makes them slow.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from autoembed.batching import halves
from autoembed.errors import Fault
from autoembed.graphemes import MAX_JOINED, is_boundary
from autoembed.long_text import LongText, Text

# The number of tokens of each of these texts, with what the model puts around each: marks, a prefix.
Count = Callable[[Sequence[str]], list[int]]

STRUCTURE, TOKENS, NONE = CHUNKING = ("structure", "tokens", "none")
# A function of the user's gives the pieces of a text.
FUNCTION = "function"
# The fewest tokens of a chunk, beside those that the model puts around it. A single character may be up to five.
FEWEST_TOKENS = 14
# The size of chunks for models that take much more: search finds a passage better than a chapter.
USUAL_CHUNK_SIZE = 512
# The part of a model's limit that chunks of estimated tokens fill: an estimate may be so much too low.
CERTAIN = 0.8
# A chunk has at most so many characters for each token, lest a megabyte that a model knows as one word is one chunk.
CHARACTERS_PER_TOKEN = 16
# A piece with more characters for each token than this is taken apart before its tokens are counted.
COUNTED_CHARACTERS_PER_TOKEN = 8
# Texts that are counted at once, and their characters. Counting cannot be interrupted.
COUNTED_TEXTS = 64
COUNTED_CHARACTERS = 1 << 15
# A text without paragraphs and sentences is taken apart into runs of so many parts of a chunk.
RUNS_PER_CHUNK = 16
# The characters of a long text whose lines are read at once.
READ_CHARACTERS = 1 << 18
# A longer line is read as several, and a longer paragraph is taken for several.
LONGEST_LINE = 1 << 14
LONGEST_PARAGRAPH = 1 << 16
# The white space before a line, or between two tags, that is looked at.
WIDEST_INDENT = 80
# A chunk is filled so far before a cut is chosen. With more, chunks are fewer, and more of them new after an edit.
LEAST_FILLED = 0.55
# The characters at the end of a paragraph in which a sentence ends, and all that closes behind it.
LONGEST_CLOSING = 80
# Lines that are read without a look at interrupts.
LINES_PER_STEP = 1000


class CountedRange(NamedTuple):
    """text[start:end], which begins and ends with a visible character, and its tokens as the model counts them."""

    start: int
    end: int
    tokens: int


class Block(NamedTuple):
    """A part of a text.

    cutters: the ways to take it apart, best first. depth: how many of them it took to make the cut before it.
    opens: a section begins with it. heading: it holds nothing but a heading.
    repeats: it belongs to the chunk before, too.
    """

    start: int
    end: int
    cutters: tuple[CutFinder, ...]
    depth: int = 0
    opens: bool = False
    heading: bool = False
    repeats: bool = False
    tokens: int = 0


# The positions within text[start:end] before which it may be cut, in order.
CutFinder = Callable[["Splitter", int, int], Iterator[int]]


def size_of(
    chunking: str,
    chunk_size: int | None,
    chunk_overlap: int,
    model_name: str,
    around: int,
    most: int | None,
    is_exact: bool,
) -> int:
    """The most tokens of a chunk. Raises Fault if texts cannot be cut like that.

    around: the tokens that the model puts around a text. most, is_exact: the model's limit, and whether tokens are
    counted or estimated.
    """
    if chunking == FUNCTION and chunk_overlap:
        raise Fault(
            "a function that cuts texts takes no chunk_overlap",
            hint="Its pieces may overlap as they are. Give chunk_overlap => 0.",
        )
    if chunking == NONE and (chunk_size is not None or chunk_overlap):
        raise Fault(
            f'chunking "{NONE}" takes no chunk_size and no chunk_overlap',
            hint="Leave them out, or choose a way to cut.",
        )
    fewest = around + FEWEST_TOKENS
    usual = min(USUAL_CHUNK_SIZE, math.floor(most if is_exact else CERTAIN * most)) if most else USUAL_CHUNK_SIZE
    size = usual if chunk_size is None else chunk_size
    if size < fewest and chunking != NONE:
        raise Fault(
            f'chunk_size is {size}, and model "{model_name}" needs at least {fewest}',
            hint=f"The model puts {around} tokens around each chunk.",
        )
    if most and size > most:
        raise Fault(
            f'chunk_size is {size}, and model "{model_name}" takes at most {most} tokens',
            hint=f"Give {most} at most, or leave it out.",
        )
    if not 0 <= chunk_overlap <= size // 2:
        raise Fault(
            f"chunk_overlap is {chunk_overlap}, and must be between 0 and half of the chunk_size of {size}",
            hint=f"Give {size // 2} at most.",
        )
    return size


def chunks_of(
    text: Text,
    count: Count,
    chunk_size: int,
    chunking: str = STRUCTURE,
    chunk_overlap: int = 0,
    between_steps: Callable[[], None] = lambda: None,
) -> Iterator[CountedRange]:
    """The chunks of a text in order. Together they hold all that is not white space.

    chunk_size: the most tokens of a chunk, as `count` counts them. chunk_overlap: the tokens of the chunk before with
    which a chunk begins. between_steps: is called before each count, and may raise.
    """
    if chunking != NONE and (chunk := _only_chunk(text, count, chunk_size, chunking, between_steps)):
        return iter([chunk])
    splitter = Splitter(text, count, chunk_size, chunk_overlap, between_steps)
    if chunking == NONE:
        return splitter.whole()
    if chunking == TOKENS:
        start, end = trimmed(text, 0, len(text))
        return splitter.split(iter([Block(start, end, WORDS)] if start < end else []), greedy=True)
    return splitter.split(introduced(text, paragraphs(text, between_steps)))


def _only_chunk(
    text: Text, count: Count, chunk_size: int, chunking: str, between_steps: Callable[[], None]
) -> CountedRange | None:
    """The chunk of a text that is one as a whole: most texts are short. None: it is several, or none, or not known."""
    if isinstance(text, LongText) or len(text) > min(COUNTED_CHARACTERS, COUNTED_CHARACTERS_PER_TOKEN * chunk_size):
        return None
    start, end = trimmed(text, 0, len(text))
    if start == end or chunking == STRUCTURE and may_have_headings(text):
        return None
    between_steps()
    [tokens] = count([text[start:end]])
    return CountedRange(start, end, tokens) if tokens <= chunk_size else None


def may_have_headings(text: str) -> bool:
    """Whether a text may have to be cut before a heading. One in its first line is not cut off."""
    return bool(_HEADING_LINE.search(text) or "<" in text and _HEADING_TAG.search(text))


def places(text: str, pieces: Sequence[str | None]) -> list[tuple[int, int]]:
    """Where pieces of a text start and end, none before the start of the one before. Blank ones are left out.

    A text of which there is no piece is one. Raises Fault if a piece is not in the text.
    """
    visible = [piece.strip() for piece in pieces if piece and not piece.isspace()]
    found = _places(text, visible, adjoining=True)
    if len(found) < len(visible):
        # A piece may have been taken for a later one like it.
        found = _places(text, visible, adjoining=False)
    if len(found) < len(visible):
        raise Fault(
            f"piece {len(found) + 1} of {len(visible)} that the function gives is not in the text, or only before the"
            " start of the piece before",
            hint="A piece is a part of the text as it stands there, and pieces come in the order of the text.",
        )
    return found or [trimmed(text, 0, len(text))]


def _places(text: str, pieces: Sequence[str], *, adjoining: bool) -> list[tuple[int, int]]:
    """The same up to the first piece that is not found. adjoining: a piece is sooner the one behind the piece before.

    Otherwise it is the first one from the start of the piece before, but not that piece once more.
    """
    found: list[tuple[int, int]] = []
    start = end = 0
    for piece in pieces:
        next_visible = _VISIBLE.search(text, end) if adjoining else None
        if next_visible and text.startswith(piece, next_visible.start()):
            start = next_visible.start()
        else:
            is_repeated = found and text[start:end] == piece
            start = text.find(piece, start + 1 if is_repeated else start)
        if start < 0:
            break
        end = start + len(piece)
        found.append((start, end))
    return found


def fitting(
    text: str,
    parts: Iterable[tuple[int, int]],
    count: Count,
    chunk_size: int,
    between_steps: Callable[[], None] = lambda: None,
) -> Iterator[CountedRange]:
    """The parts of a text as chunks. Those that are too long are cut at their structure."""
    parts = iter(parts)
    while batch := list(islice(parts, COUNTED_TEXTS)):
        between_steps()
        short = [(start, end) for start, end in batch if end - start <= CHARACTERS_PER_TOKEN * chunk_size]
        tokens = dict(zip(short, count([text[start:end] for start, end in short]), strict=True))
        for start, end in batch:
            if tokens.get((start, end), math.inf) <= chunk_size:
                yield CountedRange(start, end, tokens[start, end])
                continue
            for chunk in chunks_of(text[start:end], count, chunk_size, between_steps=between_steps):
                yield CountedRange(start + chunk.start, start + chunk.end, chunk.tokens)


class Splitter:
    def __init__(
        self, text: Text, count: Count, chunk_size: int, chunk_overlap: int, between_steps: Callable[[], None]
    ) -> None:
        self.text = text
        self._count = count
        self._between_steps = between_steps
        self._around, one, two = count(["", "a", "a\n\na"])
        # The tokens of the white space between two pieces: none for most models, but some count line ends.
        self._between = max(0, two - 2 * one + self._around)
        self._overlap = chunk_overlap
        self._most = chunk_size - self._around
        self._packed_tokens = self._most - chunk_overlap
        self._packed_characters = CHARACTERS_PER_TOKEN * self._packed_tokens
        self._counted_characters = COUNTED_CHARACTERS_PER_TOKEN * self._packed_tokens
        self.run = max(1, self._packed_tokens // RUNS_PER_CHUNK)

    def around(self, start: int, end: int) -> tuple[str, int]:
        """A part of the text with these characters, and those before that a cut depends on; and where it starts."""
        if isinstance(self.text, str):
            return self.text, 0
        low = max(0, start - MAX_JOINED)
        return self.text[low:end], low

    def split(self, blocks: Iterator[Block], greedy: bool = False) -> Iterator[CountedRange]:
        """The chunks that blocks are packed into. greedy: each is as long as may be."""
        return self._chunks(self._packs(self._pieces(blocks), _all_of if greedy else self._best_cut))

    def whole(self) -> Iterator[CountedRange]:
        start, end = trimmed(self.text, 0, len(self.text))
        if start < end:
            yield CountedRange(start, end, self._around + sum(self._window_tokens(start, end)))

    def _window_tokens(self, start: int, end: int) -> Iterator[int]:
        """The tokens of a range, in parts that are counted one by one."""
        while start < end:
            stop = min(end, start + COUNTED_CHARACTERS)
            while stop < end and stop > start + COUNTED_CHARACTERS // 2 and not self.text[stop].isspace():
                stop -= 1
            self._between_steps()
            yield self._count([self.text[start:stop]])[0] - self._around
            start = stop

    def _pieces(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Blocks with their tokens, taken apart until each fits in a chunk."""
        for batch in self._batches(blocks):
            short = [block for block in batch if block.end - block.start <= self._counted_characters]
            counts = iter(self._tokens(short))
            for block in batch:
                tokens = next(counts) if block.end - block.start <= self._counted_characters else self._most + 1
                if tokens <= self._packed_tokens or not block.cutters:
                    yield block._replace(tokens=tokens)
                else:
                    yield from self._pieces(self.parts(block))

    def _batches(self, blocks: Iterator[Block]) -> Iterator[list[Block]]:
        batch: list[Block] = []
        characters = 0
        for block in blocks:
            batch.append(block)
            characters += min(block.end - block.start, self._counted_characters)
            if len(batch) == COUNTED_TEXTS or characters >= COUNTED_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _tokens(self, parts: Sequence[Block]) -> list[int]:
        self._between_steps()
        if not parts:
            return []
        return [tokens - self._around for tokens in self._count([self.text[part.start : part.end] for part in parts])]

    def parts(self, block: Block) -> Iterator[Block]:
        """The block cut in the best way that cuts it at all; parts of white space are left out."""
        cuts, depth = self._first_cuts(block)
        at, part_depth, opens = block.start, block.depth, block.opens
        for cut in chain(cuts, [block.end]):
            start, end = trimmed(self.text, at, cut)
            if start < end:
                yield Block(start, end, block.cutters[depth:], part_depth, opens, block.heading and opens)
                part_depth, opens = block.depth + depth, False
            at = cut

    def _first_cuts(self, block: Block) -> tuple[Iterator[int], int]:
        """The positions where a block is cut, and how many ways of cutting it were tried."""
        for tried, cutter in enumerate(block.cutters, 1):
            cuts = cutter(self, block.start, block.end)
            for first in cuts:
                return chain([first], cuts), tried
        return iter([]), len(block.cutters)

    def _packs(self, pieces: Iterator[Block], best_cut: Callable[[list[Block], Block], int]) -> Iterator[list[Block]]:
        """Pieces that are a chunk together."""
        pack: list[Block] = []
        tokens = 0
        is_heading = True
        sources = [pieces]
        while sources:
            piece = next(sources[-1], None)
            if piece is None:
                sources.pop()
                continue
            if piece.opens and not is_heading:
                yield pack
                pack, tokens, is_heading = [], 0, True
            if pack and is_heading and piece.cutters and not piece.heading and not self._fits(pack, tokens, piece):
                # A heading stays with the beginning of what it is the heading of.
                sources.append(self._pieces(self.parts(piece)))
                continue
            while not self._fits(pack, tokens, piece):
                cut = best_cut(pack, piece)
                yield pack[:cut]
                pack = pack[cut:]
                tokens = sum(other.tokens + self._between for other in pack)
                is_heading = not pack
            pack.append(piece)
            tokens += piece.tokens + self._between
            is_heading = is_heading and piece.heading
        if pack:
            yield pack

    def _fits(self, pack: list[Block], tokens: int, piece: Block) -> bool:
        return not pack or (
            tokens + piece.tokens <= self._packed_tokens and piece.end - pack[0].start <= self._packed_characters
        )

    def _best_cut(self, pack: list[Block], following: Block) -> int:
        """How many pieces of a full pack are a chunk: at least LEAST_FILLED of it.

        The cut is where the text has the strongest one, and among equals where the hash of a piece is least. So an edit
        moves few cuts: behind it, the same pieces are soon the ends of chunks again.
        """
        least, tokens, best = LEAST_FILLED * self._packed_tokens, 0, (following.depth, 1 << 32, len(pack))
        for number, (piece, after) in enumerate(zip(pack, [*pack[1:], following], strict=True), 1):
            tokens += piece.tokens + self._between
            if tokens >= least:
                digest = zlib.crc32(self.text[piece.start : piece.end].encode())
                best = min(best, (after.depth, digest, number))
        return best[2]

    def _chunks(self, packs: Iterator[list[Block]]) -> Iterator[CountedRange]:
        if self._overlap:
            packs = self._overlapping(packs)
        while batch := list(islice(packs, COUNTED_TEXTS)):
            yield from self._counted(batch)

    def _overlapping(self, packs: Iterator[list[Block]]) -> Iterator[list[Block]]:
        """Packs that begin with the end of the pack before, within a section."""
        lowest = 0
        for pack in packs:
            first = pack[0]
            yield pack if first.opens or not lowest else [*self._end_of(lowest, first.start), *pack]
            lowest = first.start + 1

    def _end_of(self, lowest: int, end: int) -> list[Block]:
        """The last words of text[lowest:end] that an overlap may hold, as one block or none."""
        start = max(lowest, end - CHARACTERS_PER_TOKEN * self._overlap)
        # The first of them may be half a word.
        words = list(self.parts(Block(start, end, WORDS)))[1:]
        tokens = 0
        kept: list[Block] = []
        for word, word_tokens in zip(reversed(words), reversed(self._tokens(words)), strict=True):
            tokens += word_tokens + self._between
            if tokens > self._overlap:
                break
            kept = [Block(word.start, end, (), repeats=True)]
        return kept

    def _counted(self, packs: Sequence[list[Block]]) -> Iterator[CountedRange]:
        """The chunks of packs. What is counted as a whole may have more tokens than its pieces."""
        several = [pack for pack in packs if len(pack) > 1]
        counts = iter(self._tokens([Block(pack[0].start, pack[-1].end, ()) for pack in several]))
        for pack in packs:
            tokens = next(counts) if len(pack) > 1 else pack[0].tokens
            if tokens <= self._most or len(pack) == 1:
                yield CountedRange(pack[0].start, pack[-1].end, self._around + tokens)
            else:
                yield from self._counted([pack[1:]] if pack[0].repeats else halves(pack))


def _all_of(pack: list[Block], following: Block) -> int:
    return len(pack)


def _first(pattern: re.Pattern[str], text: Text, start: int, end: int) -> int | None:
    """The position of the first character in text[start:end] that a pattern of one character matches."""
    if isinstance(text, LongText):
        return text.search(pattern, start, end)
    found = pattern.search(text, start, end)
    return found.start() if found else None


def trimmed(text: Text, start: int, end: int) -> tuple[int, int]:
    """The range without the white space at its ends."""
    first = _first(_VISIBLE, text, start, end)
    if first is None:
        return end, end
    while text[end - 1].isspace():
        last = text[max(start, end - LONGEST_LINE) : end]
        end -= len(last) - len(last.rstrip())
    return first, end


_VISIBLE = re.compile(r"\S")
_SPACE = re.compile(r"\s")

# --- How a text that is too long is taken apart ---------------------------------------------------------------------


_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*+\n)++")


def _blank_lines(splitter: Splitter, start: int, end: int) -> Iterator[int]:
    text, low = splitter.around(start, end)
    return (low + found.end() for found in _BLANK_LINES.finditer(text, start - low, end - low))


def _lines(splitter: Splitter, start: int, end: int) -> Iterator[int]:
    text, low = splitter.around(start, end)
    at = text.find("\n", start - low, end - low) + 1
    while 0 < at < end - low:
        yield low + at
        at = text.find("\n", at, end - low) + 1


_ITEM = re.compile(r"\n(?=[^\S\n]*+(?:[-*+•·–—|]|\d{1,3}[.)]|\(?[A-Za-z\d][.)])[^\S\n])")


def _items(splitter: Splitter, start: int, end: int) -> Iterator[int]:
    text, low = splitter.around(start, end)
    return (low + found.end() for found in _ITEM.finditer(text, start - low, end - low))


_SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]*_]*+(?=\s)"
    r"|[。！？｡⁇⁈⁉‼]++[」』）】》〉”’\"')\]]*+"
    r"|[।॥؟۔።፧។៕။།]++[\"'”’»)\]]*+"
)


def _sentences(splitter: Splitter, start: int, end: int) -> Iterator[int]:
    text, low = splitter.around(start, end)
    for found in _SENTENCE_END.finditer(text, start - low, end - low):
        following = _VISIBLE.search(text, found.end(), end - low)
        if following is not None and not following[0].islower():
            yield low + following.start()


def _words(splitter: Splitter, start: int, end: int) -> Iterator[int]:
    """Before a word, but not one of the first characters."""
    text = splitter.text
    while (space := _first(_SPACE, text, start + splitter.run, end)) is not None:
        word = _first(_VISIBLE, text, space + 1, end)
        if word is None:
            return
        yield word
        start = word


def _clusters(splitter: Splitter, start: int, end: int) -> Iterator[int]:
    return _characters_apart(splitter, start, end, splitter.run)


def _single_clusters(splitter: Splitter, start: int, end: int) -> Iterator[int]:
    return _characters_apart(splitter, start, end, 1)


def _characters_apart(splitter: Splitter, start: int, end: int, run: int) -> Iterator[int]:
    text = splitter.text
    while (at := start + run) < end:
        last = min(end, at + MAX_JOINED)
        while at < last and not is_boundary(text, at, start):
            at += 1
        if at == end:
            return
        yield at
        start = at


def _code_points(splitter: Splitter, start: int, end: int) -> Iterator[int]:
    return iter(range(start + 1, end))


WORDS: tuple[CutFinder, ...] = (_words, _clusters, _single_clusters, _code_points)
PROSE: tuple[CutFinder, ...] = (_items, _sentences, *WORDS)
LINES: tuple[CutFinder, ...] = (_blank_lines, _lines, *WORDS)

# --- Paragraphs -----------------------------------------------------------------------------------------------------

_ATX_HEADING = re.compile(r"#{1,6}(?:\s|$)")
_FENCE = re.compile(r"`{3,}+(?=[^`]*+$)|~{3,}+")
_UNDERLINE = re.compile(r"([=\-~^\"'`#*+.:_<>])\1{2,}+$")
# A heading behind the first line has one of these in its line, or in the line below it.
_HEADING_LINE = re.compile(r"\n[^\S\n]*+(?:#|([=\-~^\"'`*+.:_<>])\1\1)")
_HEADING_TAG = re.compile(r"</?+h", re.IGNORECASE)
# The underlines that Markdown has. They may be shorter than the heading.
_SHORT_UNDERLINES = "=-"
_HTML_BLOCK = re.compile(
    r"<(?:(h[1-6])|p|div|ul|ol|li|dl|dt|dd|table|tr|pre|blockquote|section|article|br|hr)(?=[\s/>])|(</h[1-6]>)",
    re.IGNORECASE,
)

# With quotes, brackets and tags that close behind it.
_LAST_SENTENCE_END = re.compile(
    r"[.!?…。！？｡⁇⁈⁉‼।॥؟۔።፧។៕။།]"
    r"[\"'”’»)\]」』）】》〉]*+(?:\s*+<[^<>]*+>)*+$"
)


class _Line(NamedTuple):
    """A line that is not blank, or a part of one. joins: it goes on with a line that is too long to be read at once."""

    start: int
    text: str
    after_blank: bool
    joins: bool = False
    begins_block: bool = False
    begins_heading: bool = False


@dataclass
class _Reading:
    """How far lines were read. joins: the line before was too long to be read as a whole.

    is_blank: the white space before `at` has a line end.
    """

    stop: int
    at: int = 0
    joins: bool = False
    is_blank: bool = False


@dataclass
class _Paragraph:
    """The paragraph that is being read, and its first line. is_code: its lines so far are indented."""

    start: int
    end: int
    first: str
    cutters: tuple[CutFinder, ...]
    is_code: bool = False
    is_heading: bool = False
    lines: int = 1

    def block(self) -> Block:
        return Block(self.start, self.end, self.cutters, 0, self.is_heading, self.is_heading)


def paragraphs(text: Text, between_steps: Callable[[], None] = lambda: None) -> Iterator[Block]:
    """The headings, paragraphs, blocks of code and tables of a text, as Markdown, reStructuredText and HTML have them.

    A heading is a block of its own. So is all between two fences, and so are indented lines with blank lines between.
    """
    paragraph: _Paragraph | None = None
    fence = ""
    for number, line in enumerate(_parts_of_lines(text)):
        if number % LINES_PER_STEP == 0:
            between_steps()
        stripped = line.text.strip()
        start = line.start + len(line.text) - len(line.text.lstrip())
        end = start + len(stripped)
        if paragraph and end - paragraph.start > LONGEST_PARAGRAPH:
            yield paragraph.block()
            paragraph = _Paragraph(start, start, "", paragraph.cutters, paragraph.is_code)
        if paragraph and fence:
            paragraph.end = end
            if stripped.startswith(fence) and not stripped.strip(fence[0]):
                yield paragraph.block()
                paragraph, fence = None, ""
            continue
        if paragraph and line.joins:
            paragraph.end = end
            continue
        is_code = (line.text[0] == "\t" or line.text[:4] == "    ") and not line.begins_block
        if paragraph and not line.after_blank and _is_underline(stripped, paragraph):
            paragraph.end, paragraph.is_heading = end, True
            yield paragraph.block()
            paragraph = None
            continue
        is_heading = not is_code and stripped[0] == "#" and bool(_ATX_HEADING.match(stripped))
        opening = None if is_code or stripped[0] not in "`~" else _FENCE.match(stripped)
        parted = line.after_blank and not (is_code and paragraph and paragraph.is_code)
        if paragraph and (parted or is_heading or opening or line.begins_block):
            yield paragraph.block()
            paragraph = None
        if paragraph:
            paragraph.end = end
            paragraph.lines += 1
            paragraph.is_code &= is_code
        else:
            cutters = LINES if is_code or opening or stripped[0] in "|+" else PROSE
            paragraph = _Paragraph(start, end, stripped, cutters, is_code, is_heading or line.begins_heading)
        if is_heading:
            yield paragraph.block()
            paragraph = None
        elif opening:
            fence = opening[0]
    if paragraph:
        yield paragraph.block()


def introduced(text: Text, blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks, with a weaker cut behind prose that ends no sentence: it introduces what follows."""
    before: Block | None = None
    for block in blocks:
        is_introduced = before is not None and before.cutters is PROSE and not _ends_sentence(text, before)
        yield block._replace(depth=1) if is_introduced else block
        before = block


def _ends_sentence(text: Text, block: Block) -> bool:
    return bool(_LAST_SENTENCE_END.search(text[max(block.start, block.end - LONGEST_CLOSING) : block.end]))


def _is_underline(line: str, paragraph: _Paragraph) -> bool:
    """Whether a line makes a heading of the paragraph before it: one line, or one below a line like this one."""
    if not _UNDERLINE.match(line):
        return False
    if paragraph.lines == 2:
        return paragraph.first == line
    title = paragraph.first
    return (
        paragraph.lines == 1
        and not paragraph.is_code
        and not paragraph.is_heading
        and not _UNDERLINE.match(title)
        and (line[0] in _SHORT_UNDERLINES or len(line) >= len(title))
    )


def _parts_of_lines(text: Text) -> Iterator[_Line]:
    """The lines of a text; where HTML begins or ends a block within a line, the line is cut."""
    if isinstance(text, str):
        yield from _parts_of_window(text, _Reading(len(text)))
        return
    reading = _Reading(0)
    while reading.at < len(text):
        low = reading.at
        window = text[low : low + READ_CHARACTERS]
        is_last = low + len(window) == len(text)
        reading.at, reading.stop = 0, len(window) if is_last else len(window) - LONGEST_LINE
        for line in _parts_of_window(window, reading):
            yield line._replace(start=low + line.start)
        reading.at = len(text) if is_last else low + reading.at


def _parts_of_window(text: str, reading: _Reading) -> Iterator[_Line]:
    """The lines of a part of a text, from the one at `at` to the last one that begins before `stop`."""
    while visible := _VISIBLE.search(text, reading.at, reading.stop):
        at = reading.at
        start = text.rfind("\n", at, visible.start()) + 1
        after_blank = start > at or reading.is_blank
        start = max(start, at, visible.start() - WIDEST_INDENT)
        stop = text.find("\n", visible.start(), start + LONGEST_LINE) + 1
        is_whole = stop > 0
        stop = stop or _end_of_part(text, start)
        line = text[start:stop]
        joins = reading.joins and not after_blank
        if "<" in line and (found := _HTML_BLOCK.search(line)):
            yield from _parts_of_html(_Line(start, line, after_blank, joins), found)
        else:
            yield _Line(start, line, after_blank, joins)
        reading.at, reading.joins, reading.is_blank = stop, not is_whole, False
    # White space goes on in the next part.
    if reading.at < reading.stop:
        at = max(reading.at, reading.stop - WIDEST_INDENT)
        reading.is_blank |= "\n" in text[reading.at : at]
        reading.at = at


def _end_of_part(text: str, start: int) -> int:
    """Where the first part of a line that is too long ends: before a word, or at least not within a character."""
    end = start + LONGEST_LINE
    if end >= len(text):
        return len(text)
    space = text.rfind(" ", start + LONGEST_LINE // 2, end) + 1
    return space or next((at for at in range(end, end - MAX_JOINED, -1) if is_boundary(text, at, start)), end)


def _parts_of_html(line: _Line, found: re.Match[str] | None) -> Iterator[_Line]:
    at, part = 0, line
    while found:
        cut = found.end() if found[2] else found.start()
        # In the middle of a sentence it is the name of a tag.
        if not found[1] or _ends_tag(line.text[max(0, cut - WIDEST_INDENT) : cut].rstrip()):
            if line.text[at:cut].strip():
                yield part._replace(text=line.text[at:cut])
            at = cut
            part = _Line(line.start + at, "", line.after_blank, False, True, bool(found[1]))
        found = _HTML_BLOCK.search(line.text, found.end())
    if line.text[at:].strip():
        yield part._replace(text=line.text[at:])


def _ends_tag(before: str) -> bool:
    return not before or before.endswith(">")
