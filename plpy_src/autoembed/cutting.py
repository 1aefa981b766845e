"""The way in which a pipeline cuts the texts of its rows into chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autoembed import batching
from autoembed.chunks import (
    FEWEST_TOKENS,
    FUNCTION,
    NONE,
    chunks_of,
    fitting,
    may_have_headings,
    places,
    size_of,
    trimmed,
)
from autoembed.errors import Fault, Trouble
from autoembed.providers import counter_of, most_characters_of, own_tokens_per_input, sizes_of

if TYPE_CHECKING:
    from autoembed.long_text import Text
    from autoembed.model import Model
    from autoembed.providers import Counter
    from autoembed.records import Pipeline

Range = tuple[int, int]


def limit_of(pipeline: Pipeline) -> int | None:
    """The tokens after which a text is cut; None: the model shortens texts itself.

    A text that must not be cut is sent whole: a limit that was learnt is an estimate, and the model may take the text.
    """
    if pipeline.truncate:
        return sizes_of(pipeline.model).tokens_per_input
    return own_tokens_per_input(pipeline.model)


def sent_of(pipeline: Pipeline, content: Text, prefix: str = "") -> str:
    """The beginning of a text that a model is sent, if it is not cut into chunks. prefix: what goes before it."""
    limit = limit_of(pipeline)
    if limit is None:
        return content[: most_characters_of(pipeline.model)]
    return batching.truncate(content, limit, f"{pipeline.model.prefix('document')}{prefix}")


class Cutter:
    """Cuts texts. between_steps: called between the steps of a text, and may raise.

    split: gives the pieces that a pipeline's function makes of a text. It is called in the backend's own thread alone.
    """

    def __init__(
        self,
        between_steps: Callable[[], None],
        split: Callable[[Pipeline, str], Sequence[str | None]] | None = None,
    ) -> None:
        self._between_steps = between_steps
        self._split = split
        # How the tokens of chunks are counted, and the most of them, by the way in which texts are cut.
        self._known: dict[tuple[Model, int | None, str, int | None, int], tuple[Counter, int]] = {}

    def parts(self, pipeline: Pipeline, content: Text) -> list[Range] | None:
        """The start and the end of each piece that the pipeline's function gives; None: it has none.

        Raises RowError if the function fails, and Fault if a piece is not in the text.
        """
        if pipeline.chunking != FUNCTION or self._split is None:
            return None
        whole = str(content)
        return places(whole, self._split(pipeline, whole))

    def ranges(
        self, pipeline: Pipeline, content: Text, parts: Sequence[Range] | None = None, prefix: str = ""
    ) -> list[Range]:
        """The start and the end of each chunk of a text. Raises as parts(), and Fault if no text can be cut like that.

        parts: those of the function, if they are known. prefix: what each chunk is embedded behind.
        """
        if pipeline.chunking == NONE:
            limit = limit_of(pipeline)
            before = f"{pipeline.model.prefix('document')}{prefix}"
            if prefix and limit is not None and batching.estimate_tokens(before) >= limit:
                raise _no_room(prefix, limit)
            return [(0, len(sent_of(pipeline, content, prefix)))]
        if parts is None:
            parts = self.parts(pipeline, content)
        # Two models are equal whatever they have learnt, so the limit is named apart.
        taken = pipeline.model.tokens_taken
        way = (pipeline.model, taken, pipeline.chunking, pipeline.chunk_size, pipeline.chunk_overlap)
        try:
            known = self._known.get(way)
            if known is None:
                counter = counter_of(pipeline.model)
                (around,) = counter.count([""])
                size = size_of(*way[2:], pipeline.model.name, around, counter.most, counter.is_exact)
                known = self._known[way] = counter, size
            counter, size = known
            if prefix:
                bare, behind = counter.count(["a", f"{prefix}a"])
                if size - (behind - bare) < bare + FEWEST_TOKENS + pipeline.chunk_overlap:
                    raise _no_room(prefix, size)
                size -= behind - bare
            if parts is not None:
                found = fitting(str(content), parts, counter.count, size, self._between_steps)
            elif len(content) <= 2 * size and _is_one(str(content), counter, size):
                return [trimmed(content, 0, len(content))]
            else:
                found = chunks_of(
                    content, counter.count, size, pipeline.chunking, pipeline.chunk_overlap, self._between_steps
                )
            return [(chunk.start, chunk.end) for chunk in found]
        except Trouble:
            # The model cannot be had. The request for the whole text says why.
            return [trimmed(content, 0, len(content))]


def _is_one(text: str, counter: Counter, size: int) -> bool:
    """Whether a text is one chunk, as far as that takes little work to tell."""
    if batching.most_tokens(text) <= size:
        return True
    return counter.most_tokens(text) <= size and not may_have_headings(text)


def _no_room(prefix: str, size: int) -> Fault:
    return Fault(
        f"chunk_prefix gives {len(prefix.rstrip())} characters, which leave no room in a chunk of {size} tokens",
        hint="Give a shorter chunk_prefix, or a larger chunk_size.",
    )
