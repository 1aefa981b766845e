"""OnnxModel on tiny models, written here as protobuf, whose vectors can be told in advance."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from autoembed import onnx_model
from autoembed.model import Model, Request
from autoembed.network import Network
from autoembed.onnx_model import OnnxModel, Stopped, batches
from autoembed.providers import local

# Every token has a vector of its own; the padding's is the largest, so that it shows when it is counted.
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "##e"]
TOKEN_VECTORS = {
    "[PAD]": [0, 0, 0, 900],
    "[UNK]": [0, 0, 0, 1],
    "[CLS]": [1, 0, 0, 0],
    "[SEP]": [2, 0, 0, 0],
    "one": [0, 3, 0, 0],
    "two": [0, 0, 5, 0],
    "three": [0, 1, 0, 7],
    "##e": [4, 4, 0, 0],
}
INT64, FLOAT, BOOL = 7, 1, 9


def field(number: int, value: int | str | bytes) -> bytes:
    """One protobuf field."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    head = b""
    while value > 127:
        head += bytes([value & 127 | 128])
        value >>= 7
    return head + bytes([value])


def node(operator: str, inputs: Sequence[str], output: str, attribute: bytes = b"") -> bytes:
    names = b"".join(field(1, name) for name in inputs)
    return field(1, names + field(2, output) + field(4, operator) + attribute)


def tensor(name: str, element_type: int, dimensions: Sequence[int], content: bytes) -> bytes:
    shape = b"".join(field(1, dimension) for dimension in dimensions)
    return field(5, shape + field(2, element_type) + field(8, name) + field(9, content))


def value(number: int, name: str, element_type: int, dimensions: Sequence[int | str]) -> bytes:
    """An input (number 11) or output (12) of a graph."""
    shape = b"".join(field(1, field(1 if isinstance(d, int) else 2, d)) for d in dimensions)
    return field(number, field(1, name) + field(2, field(1, field(1, element_type) + field(2, shape))))


def write_model(folder: Path, *nodes: bytes, output: bytes | None = None) -> None:
    """Write a model that has the ids of tokens as input, and their vectors at hand as "table"."""
    table = struct.pack("<32f", *(number for token in VOCABULARY for number in TOKEN_VECTORS[token]))
    graph = (
        b"".join(nodes)
        + field(2, "graph")
        + tensor("table", FLOAT, [len(VOCABULARY), 4], table)
        + tensor("three", INT64, [], struct.pack("<q", 3))
        + value(11, "input_ids", INT64, ["texts", "tokens"])
        + (output or value(12, "hidden", FLOAT, ["texts", "tokens", 4]))
    )
    opset = field(8, field(1, "") + field(2, 17))
    (folder / "model.onnx").write_bytes(field(1, 8) + field(7, graph) + opset)


LOOK_UP = node("Gather", ["table", "input_ids"], "hidden")

LOOP_BODY = (
    node("Identity", ["condition"], "condition_out")
    + node("Identity", ["table_in"], "table_out")
    + field(2, "body")
    + value(11, "iteration", INT64, [])
    + value(11, "condition", BOOL, [])
    + value(11, "table_in", FLOAT, [len(VOCABULARY), 4])
    + value(12, "condition_out", BOOL, [])
    + value(12, "table_out", FLOAT, [len(VOCABULARY), 4])
)
# The same, but it loops for ever over a text without words, which alone has two tokens.
ENDLESS_FOR_NO_WORD = (
    node("Size", ["input_ids"], "size"),
    node("Less", ["size", "three"], "without_words"),
    node(
        "Loop",
        ["", "without_words", "table"],
        "looped",
        field(5, field(1, "body") + field(6, LOOP_BODY) + field(20, 5)),
    ),
    node("Gather", ["looped", "input_ids"], "hidden"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that gives each token the vector of the table, whatever stands beside it."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # Published tokenizers often have both; neither may count.
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_model(tmp_path, LOOK_UP)
    return tmp_path


def expected(*words: str) -> np.ndarray:
    total = np.sum([TOKEN_VECTORS[token] for token in ("[CLS]", *words, "[SEP]")], axis=0)
    vector: np.ndarray = total / np.linalg.norm(total)
    return vector


def test_a_vector_is_the_mean_of_its_tokens_at_unit_length(folder: Path) -> None:
    vectors = OnnxModel(str(folder)).embed(["one two two"]).vectors
    assert vectors.dtype == np.float32
    assert vectors == pytest.approx(expected("one", "two", "two")[None], abs=1e-6)


def test_vectors_come_in_the_order_of_the_texts_and_padding_does_not_count(folder: Path) -> None:
    texts = ["two " * 40, "one", "", "one three", "unheard", "two", "one"]
    vectors = OnnxModel(str(folder)).embed(texts).vectors
    assert vectors == pytest.approx(
        np.array(
            [
                expected(*["two"] * 40),
                expected("one"),
                expected(),
                expected("one", "three"),
                expected("[UNK]"),
                expected("two"),
                expected("one"),
            ]
        ),
        abs=1e-6,
    )


def test_no_text_gives_an_array_of_no_vectors(folder: Path) -> None:
    model = OnnxModel(str(folder))
    assert model.dimensions == 4
    assert model.embed([]).vectors.shape == (0, 4)


def test_more_texts_than_are_tokenized_at_once_keep_their_order(folder: Path) -> None:
    words = ["one", "two", "three"] * onnx_model.TOKENIZE_TEXTS
    assert OnnxModel(str(folder)).embed(words).vectors == pytest.approx(
        np.array([expected(w) for w in words]), abs=1e-6
    )


def test_a_long_text_is_cut_at_max_tokens_with_the_special_ones_among_them(folder: Path) -> None:
    vectors = OnnxModel(str(folder), max_tokens=6).embed(["one one one two two two"]).vectors
    assert vectors == pytest.approx(expected("one", "one", "one", "two")[None], abs=1e-6)


def test_the_texts_that_were_cut_are_told_and_the_tokens_that_were_computed(folder: Path) -> None:
    texts = ["one one one one", "one one one one two", "", "one " * 1000]
    assert OnnxModel(str(folder), max_tokens=6).embed(texts)[1:] == ([6, 6, 2, 6], frozenset({1, 3}))


def test_tokens_are_counted_untruncated(folder: Path) -> None:
    tokenizer = onnx_model.load_tokenizer(str(folder))
    assert onnx_model.count_tokens(tokenizer, ["", "one", "one " * 5000]) == [2, 3, 5002]


def test_a_tokenizer_that_is_read_once_serves_the_model_and_the_count(folder: Path) -> None:
    assert onnx_model.load_tokenizer(str(folder)) is onnx_model.load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (" " * 10_000 + "three two one", ["three", "two", "one"]),
        (
            "one one one".ljust(6 * onnx_model.CHARACTERS_PER_TOKEN - 2) + "three",
            ["one", "one", "one", "three"],
        ),
        ("x" * 101 + " three two one", ["[UNK]", "three", "two", "one"]),
    ],
    ids=["many blanks", "a word across the cut", "a word longer than the cut"],
)
def test_a_text_of_many_characters_has_the_tokens_of_the_whole_text(folder: Path, text: str, tokens: list[str]) -> None:
    assert OnnxModel(str(folder), max_tokens=6).embed([text]).vectors == pytest.approx(
        expected(*tokens)[None], abs=1e-6
    )


def test_only_the_beginning_of_a_huge_text_is_tokenized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnnxModel(str(folder), max_tokens=256)
    tokenizer = model._tokenizer
    lengths: list[int] = []

    class Watched:
        num_special_tokens_to_add = tokenizer.num_special_tokens_to_add
        post_process = tokenizer.post_process

        def encode_batch_fast(self, texts: list[str], **options: bool) -> Any:
            lengths.extend(map(len, texts))
            return tokenizer.encode_batch_fast(texts, **options)

    monkeypatch.setattr(model, "_tokenizer", Watched())
    assert model.embed(["one " * 1_000_000]).vectors == pytest.approx(expected(*["one"] * 254)[None], abs=1e-6)
    assert lengths == [256 * onnx_model.CHARACTERS_PER_TOKEN]


@pytest.mark.parametrize("character", [" ", "x"])
def test_no_text_is_tokenized_beyond_the_most_characters(
    folder: Path, monkeypatch: pytest.MonkeyPatch, character: str
) -> None:
    monkeypatch.setattr(onnx_model, "MOST_CHARACTERS", 10_000)
    beyond = character * 9_990 + " one two three four"
    whole = OnnxModel(str(folder), max_tokens=6).embed([beyond, beyond[:10_000]])

    assert whole.vectors[0] == pytest.approx(whole.vectors[1], abs=1e-6)
    assert whole.cut == {0}


def test_a_batch_holds_near_lengths_and_no_more_padded_tokens_than_allowed() -> None:
    assert batches([3, 100, 4, 3, 90, 700, 4], 200) == [[0, 3, 2, 6], [4, 1], [5]]


def test_a_batch_is_as_full_as_it_can_be() -> None:
    assert [len(batch) for batch in batches([10] * 45, 200)] == [20, 20, 5]


def test_the_caller_is_asked_before_each_batch_and_can_end_it_all(folder: Path) -> None:
    calls = 0

    def third_call_fails() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        OnnxModel(str(folder)).embed(["one " * 200] * 50, third_call_fails)


def test_a_stop_just_before_a_batch_is_not_lost(folder: Path) -> None:
    model = OnnxModel(str(folder))
    calls = 0

    def stop_at_second_call() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            model.stop()

    with pytest.raises(Stopped):
        model.embed(["one"], stop_at_second_call)


def test_stop_ends_a_batch_that_another_thread_runs_and_the_model_lives_on(folder: Path) -> None:
    write_model(folder, *ENDLESS_FOR_NO_WORD)
    model = OnnxModel(str(folder))
    outcome: list[str] = []

    def embed() -> None:
        try:
            model.embed([""])
        except Stopped as error:
            outcome.append(str(error))

    thread = threading.Thread(target=embed, daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    model.stop()
    thread.join(1)
    assert outcome == ["The embedding was stopped."]
    assert model.embed(["one"]).vectors == pytest.approx(expected("one")[None], abs=1e-6)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"^The model's file {folder / name} is missing.$"):
        OnnxModel(str(folder))


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_broken_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("nonsense")
    with pytest.raises(ValueError, match=f"^The model's file {folder / name} cannot be loaded: "):
        OnnxModel(str(folder))


def test_a_model_without_a_vector_for_each_token_is_refused(folder: Path) -> None:
    write_model(folder, LOOK_UP, output=value(12, "input_ids", INT64, ["texts", "tokens"]))
    with pytest.raises(ValueError, match=r"gives input_ids of shape .* where a vector for each token is needed"):
        OnnxModel(str(folder))


def test_tokenizing_starts_no_thread(folder: Path) -> None:
    # In a process of its own: the tokenizers' threads, once started, stay for all that follow.
    program = """if True:
        import os, sys
        from autoembed.onnx_model import OnnxModel, count_tokens, load_tokenizer
        model = OnnxModel(sys.argv[1], threads=1)
        before = os.listdir("/proc/self/task")
        count_tokens(load_tokenizer(sys.argv[1]), ["one two"] * 1000)
        model.embed(["one two"] * 1000)
        assert os.listdir("/proc/self/task") == before
    """
    environment = os.environ | {"PYTHONPATH": str(Path(onnx_model.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, str(folder)], env=environment, check=True)


def test_a_session_keeps_few_local_models_and_those_that_it_used_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []

    class Noted(OnnxModel):
        def __init__(self, folder: str, *, max_tokens: int) -> None:
            loaded.append(max_tokens)
            super().__init__(folder, max_tokens=max_tokens)

    monkeypatch.setattr(onnx_model, "OnnxModel", Noted)
    monkeypatch.setattr(local, "_loaded", {})
    monkeypatch.setattr(local, "MAX_MODELS", 2)

    for most in (6, 7, 6, 8, 6, 7):
        model = Model("tiny", "local", "tiny", 4, base_url=str(folder), max_tokens_per_input=most)
        assert local.embed(Request(model, ["one"], 5), Network(1)).vectors == pytest.approx(expected("one")[None])

    assert loaded == [6, 7, 8, 7]
