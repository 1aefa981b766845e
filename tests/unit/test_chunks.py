"""Long texts are cut into chunks: at their structure, within a limit of tokens, with nothing lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoembed import chunks
from autoembed.batching import estimate_tokens
from autoembed.chunks import CHARACTERS_PER_TOKEN, CountedRange, chunks_of, fitting, places, size_of
from autoembed.errors import Fault
from autoembed.long_text import LongText


def count_words(texts: Sequence[str]) -> list[int]:
    """A model that reads words and signs, and knows none longer than 16 characters; two marks around a text."""
    return [2 + sum(-(-len(word) // 16) for word in re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def count_pieces(texts: Sequence[str]) -> list[int]:
    """A model that counts line ends and indents too, and words otherwise at the front of a text."""
    return [3 + len(re.findall(r" ?\w{1,5}| ?[^\w\s]|\n+|[ \t]+", text)) + text[:1].isalpha() for text in texts]


def count_by_estimate(texts: Sequence[str]) -> list[int]:
    return [estimate_tokens(text) for text in texts]


COUNTS = {"words": count_words, "pieces": count_pieces, "estimate": count_by_estimate}
each_count = pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS.keys())


def texts_of(text: str, chunk_size: int = 32, chunking: str = "structure", chunk_overlap: int = 0) -> list[str]:
    found = chunks_of(text, count_words, chunk_size, chunking, chunk_overlap)
    return [text[chunk.start : chunk.end] for chunk in found]


def visible(text: str) -> str:
    return "".join(text.split())


def sentences(number: int, start: int = 1) -> str:
    """So many sentences of ten words."""
    return " ".join(f"This is the sentence with number {n} of this text." for n in range(start, start + number))


# --- Properties of every text ---

ALPHABETS = st.one_of(
    st.sampled_from("ab .\n#`-=|<>&\t*"),
    st.sampled_from(["\n\n", "```\n", "# ", "<h2>", "</h2>", "<p>", "----\n", "    x\n", "| a | b |\n", ". ", "。"]),
    st.sampled_from(
        ["e\u0301", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u0915\u094d\u0937"]
    ),
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
)
TEXTS = st.one_of(
    st.lists(ALPHABETS, max_size=300).map("".join),
    st.lists(st.sampled_from([sentences(1), sentences(4), "# Title", "", "    code()", "* item"]), max_size=40).map(
        "\n".join
    ),
)


@given(
    text=TEXTS,
    count=st.sampled_from(list(COUNTS.values())),
    chunk_size=st.integers(2 + chunks.FEWEST_TOKENS, 80),
    chunking=st.sampled_from(["structure", "tokens"]),
)
def test_chunks_hold_every_visible_character_once_and_in_order(
    text: str, count: chunks.Count, chunk_size: int, chunking: str
) -> None:
    found = list(chunks_of(text, count, chunk_size, chunking))

    assert visible("".join(text[chunk.start : chunk.end] for chunk in found)) == visible(text)
    assert all(before.end <= after.start for before, after in pairwise(found))
    for chunk in found:
        piece = text[chunk.start : chunk.end]
        assert piece and piece == piece.strip()
        assert chunk.tokens == count([piece])[0]
        assert chunk.tokens <= chunk_size or len(piece) == 1
        assert len(piece) <= max(1, CHARACTERS_PER_TOKEN * chunk_size)


@given(
    text=st.lists(TEXTS, max_size=12).map(" \n ".join)
    | st.lists(st.sampled_from(" \n\ta字😀."), max_size=900).map("".join),
    chunk_size=st.integers(16, 80),
    chunking=st.sampled_from(["structure", "tokens", "none"]),
    window_bytes=st.integers(1, 300),
)
def test_a_text_that_is_kept_as_bytes_has_the_same_chunks(
    text: str, chunk_size: int, chunking: str, window_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LONGEST_LINE", 100)
        patch.setattr(chunks, "READ_CHARACTERS", 300)
        expected = list(chunks_of(text, count_words, chunk_size, chunking))
        found = list(chunks_of(LongText(text.encode(), window_bytes), count_words, chunk_size, chunking))

    assert found == expected


@given(text=TEXTS)
def test_a_section_begins_a_chunk_however_short_the_text_is(text: str) -> None:
    starts = {chunk.start for chunk in chunks_of(text, count_words, 400)}

    for before, after in pairwise(chunks.paragraphs(text)):
        assert not after.opens or before.heading or after.start in starts


@pytest.mark.parametrize("chunking", ["structure", "tokens"])
def test_a_text_that_is_one_chunk_is_counted_once(chunking: str) -> None:
    text = f"{sentences(1)}\n\n{sentences(5)}\n\n* {sentences(2)}"
    counted: list[str] = []

    def count(texts: Sequence[str]) -> list[int]:
        counted.extend(texts)
        return count_words(texts)

    assert list(chunks_of(text, count, 200, chunking)) == [CountedRange(0, len(text), count_words([text])[0])]
    assert counted == [text]


@given(text=TEXTS, chunk_size=st.integers(40, 80), chunk_overlap=st.integers(1, 20))
def test_chunks_that_overlap_go_forwards_and_keep_the_limit(text: str, chunk_size: int, chunk_overlap: int) -> None:
    plain = list(chunks_of(text, count_words, chunk_size, "tokens"))
    found = list(chunks_of(text, count_words, chunk_size, "tokens", chunk_overlap))

    assert [chunk.start for chunk in found] == sorted({chunk.start for chunk in found})
    assert [chunk.end for chunk in found] == sorted({chunk.end for chunk in found})
    assert [chunk.start for chunk in found[:1]] == [chunk.start for chunk in plain[:1]]
    assert [chunk.end for chunk in found[-1:]] == [chunk.end for chunk in plain[-1:]]
    for before, after in pairwise(found):
        assert not text[before.end : after.start].strip()
        shared = text[after.start : before.end]
        assert not shared or count_words([shared])[0] - 2 <= chunk_overlap
    assert all(chunk.tokens <= chunk_size for chunk in found)


@given(text=TEXTS)
def test_a_chunk_of_a_text_is_a_chunk_by_itself_if_it_is_cut_again(text: str) -> None:
    for chunk in chunks_of(text, count_words, 40, "tokens"):
        piece = text[chunk.start : chunk.end]
        assert list(chunks_of(piece, count_words, 40, "tokens")) == [CountedRange(0, len(piece), chunk.tokens)]


# --- Structure ---

LONG = sentences(2)

STRUCTURE = {
    "short texts": ("Only a few words.", ["Only a few words."]),
    "blank texts": (" \n\t\n ", []),
    "empty texts": ("", []),
    "Markdown": (f"# One\n\n{LONG}\n\n## Two\n{LONG}", [f"# One\n\n{LONG}", f"## Two\n{LONG}"]),
    "Markdown, underlined": (f"One\n===\n{LONG}\n\nTwo\n---\n{LONG}", [f"One\n===\n{LONG}", f"Two\n---\n{LONG}"]),
    "RST": (f"One\n~~~~\n\n{LONG}\n\nTwo\n~~~~\n\n{LONG}", [f"One\n~~~~\n\n{LONG}", f"Two\n~~~~\n\n{LONG}"]),
    "RST, two lines": (f"{LONG}\n\n====\nOne\n====\n\n{LONG}", [LONG, f"====\nOne\n====\n\n{LONG}"]),
    "HTML": (f"<h1>One</h1><p>{LONG}</p><h2>Two</h2>{LONG}", [f"<h1>One</h1><p>{LONG}</p>", f"<h2>Two</h2>{LONG}"]),
    "HTML, indented": (
        f"<body>\n      <h1 class='a'>One</h1>\n      {LONG}\n      <H3>Two</H3>\n      {LONG}",
        ["<body>", f"<h1 class='a'>One</h1>\n      {LONG}", f"<H3>Two</H3>\n      {LONG}"],
    ),
    "headings in a row": (f"# One\n## Two\n### Three\n{LONG}", [f"# One\n## Two\n### Three\n{LONG}"]),
    "a heading at the end": (f"{LONG}\n# One", [LONG, "# One"]),
    "the name of a tag": (f"Use <h1> for it. {LONG}", [f"Use <h1> for it. {LONG}"]),
    "a hashtag": (f"{LONG}\n#hashtag and more", [f"{LONG}\n#hashtag and more"]),
    "a comment in fenced code": (f"{LONG}\n```sh\n# no heading\n```", [f"{LONG}\n```sh\n# no heading\n```"]),
    "a comment in indented code": (f"{LONG}\n\n    # no heading", [f"{LONG}\n\n    # no heading"]),
    "a ruled line": (f"{LONG}\n\n---\n\nEnd.", [f"{LONG}\n\n---\n\nEnd."]),
    "a table": (f"{LONG}\n\n| a | b |\n|---|---|\n| 1 | 2 |", [LONG, "| a | b |\n|---|---|\n| 1 | 2 |"]),
    "line ends of Windows": (f"# One\r\n\r\n{LONG}\r\n# Two\r\n", [f"# One\r\n\r\n{LONG}", "# Two"]),
}


@pytest.mark.parametrize(("text", "wanted"), STRUCTURE.values(), ids=STRUCTURE.keys())
def test_a_text_is_cut_at_its_headings(text: str, wanted: list[str]) -> None:
    assert texts_of(text, 40) == wanted


def test_a_paragraph_that_fits_stays_whole() -> None:
    one, two, three = sentences(2), sentences(2, 3), sentences(2, 5)

    assert texts_of(f"{one}\n\n{two}\n\n{three}", 30) == [one, two, three]
    assert texts_of(f"{one}\n\n{two}\n\n{three}", 50)[0] == f"{one}\n\n{two}"


def test_a_long_paragraph_is_cut_between_its_sentences() -> None:
    found = texts_of(sentences(20), 40)

    assert all(piece.startswith("This is") and piece.endswith("text.") for piece in found)


def test_a_heading_stays_with_the_beginning_of_its_paragraph() -> None:
    assert texts_of(f"# Title\n\n{sentences(3)}", 36) == [f"# Title\n\n{sentences(2)}", sentences(1, 3)]


@pytest.mark.parametrize("lead", ["These are its parts:", "<p>These are its parts:</p>", "这些是它的部分："])
def test_what_introduces_stays_with_what_follows(lead: str) -> None:
    parts = [f"{sentences(1 + n % 3, 10 * n)}\n\n{lead}\n\n* the part {n}." for n in range(40)]

    found = texts_of("\n\n".join(parts), 60)

    assert len(found) > 20
    assert not [piece for piece in found if piece.endswith(lead)]


@pytest.mark.parametrize("end", ["It ends.", "(It ends.)", 'It "ends!"', "<p>It ends.</p>", "结束。」", "यह है।"])
def test_a_paragraph_that_ends_a_sentence_introduces_nothing(end: str) -> None:
    blocks = list(chunks.introduced(f"{end}\n\nMore.", chunks.paragraphs(f"{end}\n\nMore.")))

    assert [block.depth for block in blocks] == [0, 0]


def test_a_chunk_is_more_than_half_full_before_it_is_cut() -> None:
    found = texts_of("\n\n".join(sentences(1, n) for n in range(300)), 102)

    assert min(count_words([piece])[0] for piece in found[:-1]) > 57


def test_code_stays_whole_where_it_fits() -> None:
    code = "```python\n" + "".join(f"def f{n}():\n    return {n}\n\n" for n in range(3)) + "```"

    assert code in texts_of(f"{sentences(2)}\n\n{code}\n\n{sentences(2)}", 40)


def test_code_that_is_too_long_is_cut_between_lines() -> None:
    lines = [f"    call({n}, {n}, {n})" for n in range(20)]

    found = texts_of("\n".join(lines), 40)

    assert len(found) > 1
    assert [line.strip() for piece in found for line in piece.split("\n")] == [line.strip() for line in lines]


def test_fixed_windows_know_no_structure() -> None:
    text = f"# One\n\n{sentences(2)}\n\n# Two\n\n{sentences(2)}"

    found = texts_of(text, 42, "tokens")

    assert found[0].startswith("# One") and "# Two" in found[0]


def test_none_is_one_chunk_with_all_its_tokens() -> None:
    text = f"\n{sentences(10_000)}\n"

    assert list(chunks_of(text, count_words, 32, "none")) == [CountedRange(1, len(text) - 1, count_words([text])[0])]


def test_an_overlap_stays_within_a_section() -> None:
    found = texts_of(f"{sentences(9)}\n\n# Two\n\n{sentences(9)}", 40, chunk_overlap=12)

    assert sum(piece.startswith("# Two") for piece in found) == 1
    assert all("# Two" not in piece for piece in found if not piece.startswith("# Two"))
    assert all(after.split()[0] in before for before, after in pairwise(found[: len(found) // 2]))


# --- The size of a chunk ---

SIZES = {
    "the whole of a small model": ((None, 256, True), 256),
    "less than a large model takes": ((None, 8192, True), 512),
    "an estimate stays below the limit": ((None, 512, False), 409),
    "an unknown limit": ((None, None, False), 512),
    "as asked for": ((100, 256, True), 100),
    "as much as the model takes": ((256, 256, True), 256),
}


@pytest.mark.parametrize(("given_", "wanted"), SIZES.values(), ids=SIZES.keys())
def test_the_size_of_a_chunk_follows_from_the_model(given_: tuple[int | None, int | None, bool], wanted: int) -> None:
    chunk_size, most, is_exact = given_

    assert size_of("structure", chunk_size, 0, "m", 2, most, is_exact) == wanted


MISTAKES = {
    "an overlap of pieces": (("function", None, 1), "a function that cuts texts takes no chunk_overlap"),
    "too large": (("structure", 257, 0), 'chunk_size is 257, and model "m" takes at most 256 tokens'),
    "too small": (("tokens", 15, 0), 'chunk_size is 15, and model "m" needs at least 16'),
    "negative": (("tokens", -1, 0), 'chunk_size is -1, and model "m" needs at least 16'),
    "too much overlap": (("tokens", 100, 51), "chunk_overlap is 51, and must be between 0 and half of the chunk_size"),
    "a negative overlap": (("tokens", 100, -1), "chunk_overlap is -1, and must be between 0 and half of the"),
    "a size of what is not cut": (("none", 100, 0), 'chunking "none" takes no chunk_size and no chunk_overlap'),
    "an overlap of what is not cut": (("none", None, 1), 'chunking "none" takes no chunk_size and no chunk_overlap'),
}


@pytest.mark.parametrize(("given_", "problem"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_way_to_cut_that_cannot_be_is_a_fault(given_: tuple[str, int | None, int], problem: str) -> None:
    with pytest.raises(Fault) as caught:
        size_of(*given_, "m", 2, 256, True)

    assert caught.value.problem.startswith(problem)
    assert (caught.value.errcode, caught.value.hint[-1]) == ("22023", ".")


# --- Languages ---

LANGUAGES = {
    "English": ("Dr. Smith came at 3.30 p.m. yesterday. He stayed! Did he? ", ["yesterday.", "stayed!", "he?"]),
    "German": ("Der Zug fährt um 8 Uhr. Wann fährt er zurück? Übermorgen! ", ["Uhr.", "zurück?", "Übermorgen!"]),
    "Chinese": ("今天天气很好。我们去公园散步吧！你想去吗？", ["。", "！", "？"]),
    "Japanese": ("今日はいい天気ですね。「散歩に行きましょう。」と彼は言った。", ["。", "。」"]),
    "Thai": ("วันนี้อากาศดีมาก เราไปเดินเล่นที่สวนสาธารณะกันเถอะ คุณอยากไปไหม ", ["มาก", "เถอะ", "ไหม"]),
    "Arabic": ("الطقس جميل اليوم. هل تريد أن تذهب إلى الحديقة؟ نعم. ", ["اليوم.", "الحديقة؟", "نعم."]),
    "Hindi": ("आज मौसम बहुत अच्छा है। क्या आप पार्क चलेंगे? हाँ। ", ["है।", "चलेंगे?", "हाँ।"]),
}


@pytest.mark.parametrize(("text", "ends"), LANGUAGES.values(), ids=LANGUAGES.keys())
def test_a_text_of_any_language_is_cut_between_sentences_or_words(text: str, ends: list[str]) -> None:
    found = [(text * 40)[chunk.start : chunk.end] for chunk in chunks_of(text * 40, count_by_estimate, 100)]

    assert len(found) > 3
    assert all(piece.endswith(tuple(ends)) for piece in found), found


EMOJI = {
    "families": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "flags": "\U0001f1e9\U0001f1ea",
    "colours": "\U0001f44d\U0001f3fd",
    "accents": "e\u0301\u0323",
    "Devanagari": "\u0915\u094d\u0937\u093f",
    "Hangul": "\u1112\u1161\u11ab",
}


@each_count
@pytest.mark.parametrize("cluster", EMOJI.values(), ids=EMOJI.keys())
def test_what_is_read_as_one_character_is_not_cut(cluster: str, count: chunks.Count) -> None:
    text = cluster * 500

    found = list(chunks_of(text, count, 64))

    assert "".join(text[chunk.start : chunk.end] for chunk in found) == text
    assert len(found) > 1
    assert all(chunk.start % len(cluster) == 0 for chunk in found)


def test_a_letter_under_a_thousand_accents_is_cut_within_the_limit() -> None:
    text = "e" + "\u0301" * 1000

    found = list(chunks_of(text, count_by_estimate, 32))

    assert "".join(text[chunk.start : chunk.end] for chunk in found) == text
    assert all(chunk.tokens <= 32 for chunk in found)


# --- Edits ---


def document(with_headings: bool) -> list[str]:
    """Paragraphs of a long text."""
    parts = [sentences(1 + number * 7 % 5, 10 * number) for number in range(150)]
    return [f"## Part {n}\n\n{part}" if with_headings and n % 8 == 0 else part for n, part in enumerate(parts)]


EDITS: dict[str, Callable[[list[str], int], list[str]]] = {
    "a word": lambda parts, at: [*parts[:at], parts[at].replace("sentence", "thing", 1), *parts[at + 1 :]],
    "a sentence": lambda parts, at: [*parts[:at], f"{parts[at]} And one more.", *parts[at + 1 :]],
    "a paragraph more": lambda parts, at: [*parts[:at], sentences(3, 9000), *parts[at:]],
    "a paragraph less": lambda parts, at: [*parts[:at], *parts[at + 1 :]],
}


@pytest.mark.parametrize("with_headings", [True, False], ids=["headings", "no headings"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edit_makes_few_chunks_new(edit: Callable[[list[str], int], list[str]], with_headings: bool) -> None:
    parts = document(with_headings)
    before = set(texts_of("\n\n".join(parts), 100))

    new = [len(set(texts_of("\n\n".join(edit(parts, at)), 100)) - before) for at in range(0, len(parts), 3)]

    assert sum(new) / len(new) <= 3
    assert max(new) <= len(before) / 4


# --- Hostile texts ---

HOSTILE = {
    "one letter": "a",
    "spaces": " ",
    "line ends": "\n",
    "hashes": "#",
    "less-than signs": "<",
    "headings": "#\n",
    "HTML headings": "<h1 >",
    "HTML paragraphs": "<p>",
    "fences": "```\n",
    "backticks": "`",
    "dots": ".",
    "dots and brackets": ".)",
    "sentences": "A. ",
    "Chinese": "字",
    "Chinese sentences": "字。",
    "emoji": "\U0001f468\u200d\U0001f469\u200d",
    "accents": "\u0301",
    "flags": "\U0001f1e9",
    "underlines": "=\n",
    "dashes": "---\n",
    "items": "\n- ",
    "table": "|a\n",
    "blank lines": " \n",
    "indents": "\n    ",
    "line ends of Windows": "\r\n",
    "paragraphs": "a\n\n",
    "nothing visible": "\u200b",
    "a word and spaces": "a" + " " * 1000,
    "a word and line ends": "a" + "\n" * 1000,
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("chunking", chunks.CHUNKING)
def test_the_effort_for_a_hostile_text_grows_with_its_length_alone(unit: str, chunking: str) -> None:
    (small, _), (large, most_at_once) = (effort(unit, length, chunking) for length in (1 << 14, 1 << 17))

    assert large <= 9 * small + 10_000
    assert large <= 5 << 17
    assert most_at_once <= 1 << 17


@pytest.mark.parametrize("unit", ["a", " ", "\n", "#", "<", "字", ".", "`"])
@pytest.mark.parametrize("chunking", chunks.CHUNKING)
def test_a_megabyte_of_one_character_is_cut(unit: str, chunking: str) -> None:
    counted, most_at_once = effort(unit, 1 << 20, chunking)

    assert counted <= 5 << 20
    assert most_at_once <= 1 << 17


def effort(unit: str, length: int, chunking: str) -> tuple[int, int]:
    """The characters that were counted to cut a text, and the most that were counted at once."""
    text = unit * (length // len(unit))
    counted = [0]

    def count(texts: Sequence[str]) -> list[int]:
        counted.append(sum(map(len, texts)))
        return [2 + len(text) // 2 for text in texts]

    found = list(chunks_of(text, count, 256, chunking))

    assert visible("".join(text[chunk.start : chunk.end] for chunk in found)) == visible(text)
    return sum(counted), max(counted)


def test_a_cut_can_be_stopped() -> None:
    text = sentences(20_000)
    steps = []

    def stop_at_the_tenth() -> None:
        steps.append(1)
        if len(steps) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(chunks_of(text, count_words, 256, between_steps=stop_at_the_tenth))


# --- The pieces of a user's function ---

PIECES = {
    "in order": ("one, two", ["one", "two"], [(0, 3), (5, 8)]),
    "white space at their ends": ("one\n two", ["one\n", "  two "], [(0, 3), (5, 8)]),
    "blank and NULL ones": ("one two", [None, "one", "", " \n", "two"], [(0, 3), (4, 7)]),
    "the same one twice": ("a a", ["a", "a"], [(0, 1), (2, 3)]),
    "the same one twice, apart": ("a -- a", ["a", "a"], [(0, 1), (5, 6)]),
    "of one letter": ("aaaa", ["aa", "aa"], [(0, 2), (2, 4)]),
    "of one letter, overlapping": ("aaaab", ["aa", "aa", "aa", "ab"], [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "that overlap": ("abcd bcd", ["abc", "bcd"], [(0, 3), (1, 4)]),
    "that overlap in words": ("x y x y", ["x y", "y x", "x y"], [(0, 3), (2, 5), (4, 7)]),
    "none": (" one ", [], [(1, 4)]),
    "emoji": ("👩‍👩‍👧 é", ["👩‍👩‍👧", "é"], [(0, 5), (6, 7)]),
}


@pytest.mark.parametrize(("text", "pieces", "wanted"), PIECES.values(), ids=PIECES.keys())
def test_pieces_are_found_in_their_order(text: str, pieces: list[str | None], wanted: list[tuple[int, int]]) -> None:
    assert places(text, pieces) == wanted


@pytest.mark.parametrize("pieces", [["two", "one"], ["one", "three"], ["one", "one"], ["one two three"]])
def test_a_piece_that_is_not_there_is_a_fault(pieces: list[str | None]) -> None:
    with pytest.raises(Fault, match="is not in the text"):
        places("one two", pieces)


@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=8), overlap=st.integers(0, 5))
def test_every_way_to_cut_and_overlap_is_found_again(text: str, cuts: list[int], overlap: int) -> None:
    bounds = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(text)), len(text)]
    ranges = [chunks.trimmed(text, max(0, start - overlap), end) for start, end in pairwise(bounds)]
    pieces = [text[start:end] for start, end in ranges]
    assume(len(set(ranges)) == len(ranges) and text.strip())

    found = places(text, pieces)

    assert [text[start:end] for start, end in found] == [piece.strip() for piece in pieces if piece.strip()]


@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=5), chunk_size=st.integers(16, 60))
@each_count
def test_pieces_are_chunks_within_the_limit(text: str, cuts: list[int], count: chunks.Count, chunk_size: int) -> None:
    bounds = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(text)), len(text)]
    parts = places(text, [text[start:end] for start, end in pairwise(bounds)]) if text.strip() else []

    found = list(fitting(text, parts, count, chunk_size))

    assert "".join(visible(text[chunk.start : chunk.end]) for chunk in found) == visible(text)
    for chunk in found:
        assert chunk.tokens <= chunk_size or chunk.end - chunk.start == 1
    fits = [(start, end) for start, end in parts if count([text[start:end]])[0] <= chunk_size]
    assert {(start, end) for start, end in fits if end - start <= 16 * chunk_size} <= {
        (chunk.start, chunk.end) for chunk in found
    }
