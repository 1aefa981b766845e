"""The cutter of a pass: a text that is plainly one chunk takes little work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed import chunks, providers
from autoembed.batching import estimate_tokens
from autoembed.cutting import Cutter
from unit.fakes import PIPELINE

BESIDE = replace(PIPELINE, is_beside=True, chunking="structure", chunk_size=512)
PROSE = "Yesterday evening the last train to the coast was late again. " * 10
LINES = st.sampled_from(
    ["# Title", "   ##", "", "Title", "====", "---", "::::", "```", "* item", "    code", "> quote", "<h1>", "<p>b"]
)


@pytest.mark.parametrize("text", [PROSE, f"# Title\n\n{PROSE}", f"\n{PROSE}\n\n* {PROSE[:9]}"])
def test_short_prose_is_one_chunk_without_a_count(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return estimate_tokens(text)

    monkeypatch.setattr(providers, "estimate_tokens", count)

    assert Cutter(lambda: None).ranges(BESIDE, text) == [chunks.trimmed(text, 0, len(text))]
    assert len(text) > 600
    assert counted == [""]


@given(text=st.lists(LINES | st.text(max_size=20), max_size=12).map("\n".join))
def test_a_text_without_a_later_heading_is_not_cut_at_one(text: str) -> None:
    if text.strip() and not chunks.may_have_headings(text):
        splitter = chunks.Splitter(text, lambda texts: [estimate_tokens(one) for one in texts], 4000, 0, lambda: None)
        found = list(splitter.split(chunks.introduced(text, chunks.paragraphs(text))))

        assert [(chunk.start, chunk.end) for chunk in found] == [chunks.trimmed(text, 0, len(text))]
