"""The splitters that are measured: a text in, ranges of its characters out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

from autoembed.chunks import chunks_of
from autoembed.onnx_model import count_tokens, load_tokenizer
from bench import CACHE
from bench.systems import pgai

MODEL = CACHE / "model"
# The model's limit, and the two tokens around a text.
TOKENS = 256
AROUND = 2
# pgai's default: ai.chunking_recursive_character_text_splitter().
PGAI = """
import json, sys
from langchain_text_splitters import RecursiveCharacterTextSplitter
splitter = RecursiveCharacterTextSplitter(chunk_size=800, chunk_overlap=400, add_start_index=True)
for line in sys.stdin:
    found = splitter.create_documents([json.loads(line)])
    starts = [document.metadata["start_index"] for document in found]
    print(json.dumps([[at, at + len(document.page_content)] for at, document in zip(starts, found)]), flush=True)
"""

Ranges = list[tuple[int, int]]
Split = Callable[[str], Ranges]


def autoembed(text: str) -> Ranges:
    return [(chunk.start, chunk.end) for chunk in chunks_of(text, _count, TOKENS)]


def fixed(text: str) -> Ranges:
    """Chunks of as many tokens as fit, wherever that ends."""
    offsets = load_tokenizer(str(MODEL)).encode(text, add_special_tokens=False).offsets
    size = TOKENS - AROUND
    return [(offsets[at][0], offsets[min(at + size, len(offsets)) - 1][1]) for at in range(0, len(offsets), size)]


def pgai_default(text: str) -> Ranges:
    return _Pgai.running().split(text)


def semantic(text: str) -> Ranges:
    """semantic-text-splitter for Markdown, with the model's tokenizer."""
    found = _markdown_splitter().chunk_indices(text)
    return [(start, start + len(chunk)) for start, chunk in found]


SPLITTERS: dict[str, Split] = {
    "chunks-autoembed": autoembed,
    "chunks-fixed": fixed,
    "chunks-pgai": pgai_default,
    "chunks-semantic": semantic,
}


def _count(texts: Sequence[str]) -> list[int]:
    return count_tokens(load_tokenizer(str(MODEL)), texts)


class _Pgai:
    """langchain's splitter in pgai's own environment, one text a line."""

    @staticmethod
    @lru_cache
    def running() -> _Pgai:
        pgai.Pgai("defaults").install()
        return _Pgai()

    @cached_property
    def _process(self) -> subprocess.Popen[str]:
        python = str(pgai.INSTALLED / "bin" / "python")
        return subprocess.Popen([python, "-c", PGAI], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def split(self, text: str) -> Ranges:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(text) + "\n")
        self._process.stdin.flush()
        return [(start, end) for start, end in json.loads(self._process.stdout.readline())]


@lru_cache
def _markdown_splitter() -> Any:
    from semantic_text_splitter import MarkdownSplitter

    return MarkdownSplitter.from_huggingface_tokenizer(load_tokenizer(str(MODEL)), TOKENS)
