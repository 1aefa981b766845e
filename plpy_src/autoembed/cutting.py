"""The way in which a pipeline cuts the texts of its rows into chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from autoembed import batching
from autoembed.chunks import NONE, chunks_of, size_of, trimmed
from autoembed.errors import Trouble
from autoembed.providers import counter_of, sizes_of

if TYPE_CHECKING:
    from autoembed.model import Model
    from autoembed.providers import Counter
    from autoembed.records import Pipeline


class Cutter:
    """Cuts texts. check_interrupts: called between the steps of a long text."""

    def __init__(self, check_interrupts: Callable[[], None]) -> None:
        self._check_interrupts = check_interrupts
        # How the tokens of chunks are counted, and the most of them, by the way in which texts are cut.
        self._known: dict[tuple[Model, str, int | None, int], tuple[Counter, int]] = {}

    def ranges(self, pipeline: Pipeline, content: str) -> list[tuple[int, int]]:
        """The start and the end of each chunk of a text. Raises Fault if no text can be cut like that."""
        if pipeline.chunking == NONE:
            limit = sizes_of(pipeline.model).tokens_per_input
            whole = content if limit is None else batching.truncate(content, limit, pipeline.model.prefix("document"))
            return [(0, len(whole))]
        way = (pipeline.model, pipeline.chunking, pipeline.chunk_size, pipeline.chunk_overlap)
        try:
            if way not in self._known:
                counter = counter_of(pipeline.model)
                (around,) = counter.count([""])
                size = size_of(*way[1:], pipeline.model.name, around, counter.most, counter.is_exact)
                self._known[way] = counter, size
            counter, size = self._known[way]
            if batching.most_tokens(content) <= size:
                return [trimmed(content, 0, len(content))]
            found = chunks_of(
                content, counter.count, size, pipeline.chunking, pipeline.chunk_overlap, self._check_interrupts
            )
            return [(chunk.start, chunk.end) for chunk in found]
        except Trouble:
            # The model cannot be had. The request for the whole text says why.
            return [trimmed(content, 0, len(content))]
