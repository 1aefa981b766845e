"""A sentence-embedding model in a folder (model.onnx, tokenizer.json), run inside this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from autoembed import heap
from autoembed.local_models import MOST_CHARACTERS

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# Padded tokens in one batch. 256 to 512 were fastest on 2 cores; more costs memory and delays a cancel.
BATCH_TOKENS = 512
# Texts that the tokenizer gets at once. It cannot be interrupted.
TOKENIZE_TEXTS = 64
# Characters of a text that are tokenized at first, for each token wanted.
CHARACTERS_PER_TOKEN = 16
# WordPiece makes up to one token per character of a word, but a single token of a longer word than this.
LONGEST_WORD_CHARACTERS = 100
# Tokenizers that a session keeps, each with some 10 MB. Models of the same folder share one.
KEPT_TOKENIZERS = 4


class Stopped(Exception):
    """The embedding was stopped."""


class Computed(NamedTuple):
    """Vectors, float32 (n, dimensions) of unit length; the tokens of each text; which texts were cut, by position."""

    vectors: Array
    tokens: list[int]
    cut: frozenset[int]


class OnnxModel:
    """Texts in, unit vectors out: the mean of the token vectors that the model gives.

    onnxruntime starts threads here, and a thread inherits the signal mask of the one that starts it. In a
    database backend, create the model in a thread that has blocked all signals: the server's handlers must
    run in the backend's own thread.
    """

    def __init__(self, folder: str, *, max_tokens: int = 256, threads: int | None = None) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._session = _open(
            lambda path: _load_session(path, threads or len(os.sched_getaffinity(0))),
            os.path.join(folder, "model.onnx"),
        )
        self._inputs = [model_input.name for model_input in self._session.get_inputs()]
        output = self._session.get_outputs()[0]
        if len(output.shape) != 3 or not isinstance(output.shape[2], int):
            raise ValueError(
                f"The model in {folder} gives {output.name} of shape {output.shape}, "
                "where a vector for each token is needed: (texts, tokens, dimensions)."
            )
        self._output: str = output.name
        self.dimensions: int = output.shape[2]
        self._max_tokens = max_tokens
        self._run: Any = None
        # Loading leaves 60 MB of freed memory.
        heap.trim()

    def embed(self, texts: Sequence[str], between_batches: Callable[[], None] = lambda: None) -> Computed:
        """Return one vector for each text, in their order. A text of more than max_tokens is cut.

        `between_batches` is called before each batch and may raise. To give up from another thread, first see
        to it that `between_batches` raises, then call `stop`.
        """
        # If memory were mapped again for each batch, a batch would take half as long again.
        heap.keep(block_bytes=32 << 20, free_bytes=64 << 20)
        try:
            return self.embed_few(texts, between_batches)
        finally:
            heap.trim()

    def embed_few(self, texts: Sequence[str], between_batches: Callable[[], None] = lambda: None) -> Computed:
        """The same for texts that need so little memory that it may come and go as in the rest of the process."""
        import numpy as np
        import onnxruntime

        vectors = np.empty((len(texts), self.dimensions), np.float32)
        tokens, cut = self._tokenize(texts, between_batches)
        for batch in batches([len(ids) for ids in tokens], BATCH_TOKENS):
            self._run = onnxruntime.RunOptions()
            between_batches()
            vectors[batch] = self._embed_batch([tokens[i] for i in batch])
        return Computed(vectors, list(map(len, tokens)), cut)

    def stop(self) -> None:
        """End the batch that another thread runs now: its `embed` raises `Stopped`."""
        if self._run is not None:
            self._run.terminate = True

    def _tokenize(
        self, texts: Sequence[str], between_batches: Callable[[], None]
    ) -> tuple[list[Array], frozenset[int]]:
        import numpy as np

        encode = self._tokenizer.encode_batch_fast
        limit = self._max_tokens - self._tokenizer.num_special_tokens_to_add(False)
        characters = CHARACTERS_PER_TOKEN * self._max_tokens
        tokens: list[Array] = []
        cut = set()
        for part in _parts(texts):
            between_batches()
            encodings = encode([text[:characters] for text in part], add_special_tokens=False)
            for text, encoding in zip(part, encodings, strict=True):
                if len(text) > characters and len(encoding) < limit + LONGEST_WORD_CHARACTERS:
                    # The cut may have changed the tokens within the limit.
                    (encoding,) = encode([text[:MOST_CHARACTERS]], add_special_tokens=False)
                if len(encoding) > limit or len(text) > MOST_CHARACTERS:
                    cut.add(len(tokens))
                encoding.truncate(limit)
                tokens.append(np.array(self._tokenizer.post_process(encoding).ids, np.int32))
        return tokens, frozenset(cut)

    def _embed_batch(self, tokens: list[Array]) -> Array:
        import numpy as np

        ids = np.zeros((len(tokens), max(map(len, tokens))), np.int64)
        mask = np.zeros_like(ids)
        for row, row_tokens in enumerate(tokens):
            ids[row, : len(row_tokens)] = row_tokens
            mask[row, : len(row_tokens)] = 1
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        inputs = {name: values[name] for name in self._inputs}
        try:
            (hidden,) = self._session.run([self._output], inputs, self._run)
        except Exception:
            if self._run.terminate:
                raise Stopped(Stopped.__doc__) from None
            raise
        # The sum has the direction of the mean, and at unit length only the direction remains.
        vectors: Array = np.einsum("bt,btd->bd", mask.astype(np.float32), hidden)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return how many tokens each text has, untruncated, with the marks around it."""
    return [len(encoding) for part in _parts(texts) for encoding in tokenizer.encode_batch_fast(part)]


@lru_cache(maxsize=KEPT_TOKENIZERS)
def load_tokenizer(folder: str) -> Any:
    return _open(_load_tokenizer, os.path.join(folder, "tokenizer.json"))


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return the positions of texts of these lengths: near lengths together, `batch_tokens` when padded."""
    result: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if result and (len(result[-1]) + 1) * lengths[i] <= batch_tokens:
            result[-1].append(i)
        else:
            result.append([i])
    return result


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + TOKENIZE_TEXTS] for start in range(0, len(texts), TOKENIZE_TEXTS))


def _open(load: Callable[[str], Any], path: str) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The model's file {path} is missing.")
    try:
        return load(path)
    except Exception as error:
        raise ValueError(f"The model's file {path} cannot be loaded: {error}") from error


def _load_tokenizer(path: str) -> Any:
    # The tokenizer's own threads would start in the first thread that tokenizes, which may not block signals.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _load_session(path: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Both would keep the memory of the largest batch.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Threads that spin while they wait take the cores from other backends.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
