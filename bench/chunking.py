"""How well a splitter's chunks are found, how many an edit makes new, and what it takes to cut a text."""

from __future__ import annotations

import hashlib
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from autoembed.onnx_model import OnnxModel
from bench import CACHE, manuals
from bench.manuals import Question
from bench.server import docker, name_of
from bench.splitters import MODEL, SPLITTERS, Ranges, Split
from harness import Server

VECTORS = CACHE / "chunk-vectors"
IMAGE_MODEL = "/usr/local/share/autoembed/models/all-MiniLM-L6-v2"
# Chunks that a search gives, and characters that a reader gets.
FOUND = 10
READ_CHARACTERS = 2000
EDITS = 12
LONG_TEXT_MEGABYTES = 50

SENTENCE = "Note that this sentence was added afterwards, because a reader had asked for it. "
PARAGRAPH = (
    "This paragraph was added later. It explains in a few plain words something that readers had asked for more than "
    "once, and it is about as long as paragraphs of such manuals usually are. It has three sentences.\n\n"
)

Vectors = NDArray[np.float32]


def measure(server: Server, name: str) -> dict[str, float]:
    """The figures of one splitter."""
    manuals.fetch(server)
    if not MODEL.exists():
        docker("cp", f"{name_of(server)}:{IMAGE_MODEL}", str(MODEL))
    split = SPLITTERS[name]
    figures = {**_search(split), **_edits(split)}
    if name == "chunks-autoembed":
        figures |= _effort()
    elif name == "chunks-pgai":
        # It runs in a process of its own, whose time is not counted.
        del figures["megabytes_per_second"]
    return figures


def _search(split: Split) -> dict[str, float]:
    documents, questions = manuals.faq()
    began = time.process_time()
    ranges = [split(text) for text in documents]
    seconds = time.process_time() - began
    chunks = [(number, start, end) for number, found in enumerate(ranges) for start, end in found]
    vectors = _vectors([documents[number][start:end] for number, start, end in chunks])
    similarities = _vectors([question.text for question in questions]) @ vectors.T
    ranked = [[chunks[at] for at in order] for order in np.argsort(-similarities, axis=1, kind="stable")]
    pairs = list(zip(questions, ranked, strict=True))
    return {
        "chunks": len(chunks),
        "reciprocal_rank": statistics.fmean(_reciprocal_rank(question, found) for question, found in pairs),
        "answer_share": statistics.fmean(_answer_share(question, found) for question, found in pairs),
        "right_document": statistics.fmean(found[0][0] == question.document for question, found in pairs),
        "megabytes_per_second": sum(map(len, documents)) / 1e6 / seconds,
    }


def _reciprocal_rank(question: Question, found: Sequence[tuple[int, int, int]]) -> float:
    """A chunk is right if the shorter of it and the answer lies half within the other."""
    for rank, (document, start, end) in enumerate(found[:FOUND], 1):
        shared = min(end, question.end) - max(start, question.start)
        if document == question.document and 2 * shared >= min(end - start, question.end - question.start):
            return 1 / rank
    return 0.0


def _answer_share(question: Question, found: Sequence[tuple[int, int, int]]) -> float:
    """How much of the answer is in the first characters; a longer one cannot be there as a whole."""
    is_read = np.zeros(question.end - question.start, bool)
    left = READ_CHARACTERS
    for document, start, end in found:
        end = min(end, start + left)
        if document == question.document:
            is_read[max(start - question.start, 0) : max(end - question.start, 0)] = True
        left -= end - start
        if left <= 0:
            break
    return float(is_read.sum()) / min(len(is_read), READ_CHARACTERS)


def _vectors(texts: list[str]) -> Vectors:
    """The local model's vectors, kept from one bench to the next."""
    VECTORS.mkdir(exist_ok=True)
    model: OnnxModel | None = None
    rows: list[Vectors] = []
    for text in texts:
        path = VECTORS / hashlib.sha256(text.encode()).hexdigest()
        if not path.exists():
            model = model or OnnxModel(str(MODEL))
            path.write_bytes(model.embed([text]).vectors.astype("<f4").tobytes())
        rows.append(np.frombuffer(path.read_bytes(), "<f4"))
    return np.array(rows)


def _edits(split: Split) -> dict[str, float]:
    """The share of chunks that are new after an edit, in percent."""
    shares: dict[str, list[float]] = {}
    chosen = random.Random(7)
    for text in manuals.manuals():
        before = set(_texts(text, split(text)))
        for kind, edited in _edited(text, chosen):
            after = _texts(edited, split(edited))
            shares.setdefault(kind, []).append(100 * sum(chunk not in before for chunk in after) / len(after))
    return {f"new_after_{kind}_percent": statistics.fmean(values) for kind, values in shares.items()}


def _texts(text: str, ranges: Ranges) -> list[str]:
    return [text[start:end] for start, end in ranges]


def _edited(text: str, chosen: random.Random) -> Iterator[tuple[str, str]]:
    paragraphs = [found.start() for found in re.finditer(r"(?<=\n\n)(?=[A-Z][^\n]{30})", text)]
    for start in chosen.choices(paragraphs, k=EDITS):
        end = text.find("\n\n", start) + 1 or len(text)
        paragraph = text[start:end]
        ends = [0, *(found.end() for found in re.finditer(r"(?<=[a-z][.!?])\s+(?=[A-Z])", paragraph))]
        at = start + chosen.choice(ends)
        yield "sentence", text[:at] + SENTENCE + text[at:]
        if words := list(re.finditer(r"[a-z]{4,}", paragraph)):
            word = chosen.choice(words)
            yield "word", text[: start + word.start()] + "changed" + text[start + word.end() :]
        yield "paragraph", text[:start] + PARAGRAPH + text[start:]
        yield "deletion", text[:start] + text[end + 1 :]


def _effort() -> dict[str, float]:
    """The cost of a long text, in a process of its own: its memory beside the text."""
    command = [sys.executable, "-m", "bench.long_text", str(MODEL), str(LONG_TEXT_MEGABYTES)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    bytes_more, longest_step_seconds = map(float, done.stdout.split())
    return {"long_text_bytes": bytes_more, "longest_step_seconds": longest_step_seconds}
