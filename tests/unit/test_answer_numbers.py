"""Any value where a provider's answer has a number: an error of the provider, or numbers that the database holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed import rerankers
from autoembed.errors import Trouble
from autoembed.model import Embedded, Reranked
from autoembed.providers import cohere, gemini, ollama, openai, voyage

ODD = st.sampled_from([0, 1, 1.0, True, None, -1, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf"), "1", "٣"])
ANY = ODD | st.integers() | st.floats() | st.lists(ODD, max_size=3) | st.dictionaries(st.text(max_size=2), ODD)


def both(item: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(item, min_size=2, max_size=2) | ANY


def an_object(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional=fields) | st.fixed_dictionaries(fields)


VECTOR = both(ODD)
USAGE = an_object(total_tokens=ANY)
SCORES = both(an_object(index=ODD, relevance_score=ANY))
BILLED = an_object(billed_units=an_object(input_tokens=ANY, search_units=ANY))
READERS: list[tuple[Callable[[bytes, int, int], Embedded | Reranked], st.SearchStrategy[Any]]] = [
    (openai.embedded_in, an_object(data=both(an_object(embedding=VECTOR, index=ODD)), usage=USAGE)),
    (voyage.embedded_in, an_object(data=both(an_object(embedding=VECTOR, index=ODD)), usage=USAGE)),
    (cohere.embedded_in, an_object(embeddings=an_object(float=both(VECTOR)), meta=BILLED)),
    (gemini.embedded_in, an_object(embeddings=both(an_object(values=VECTOR)), usageMetadata=ANY)),
    (ollama.embedded_in, an_object(embeddings=both(VECTOR), prompt_eval_count=ANY)),
    (rerankers.cohere.reranked_in, an_object(results=SCORES, meta=BILLED)),
    (rerankers.voyage.reranked_in, an_object(data=SCORES, usage=USAGE)),
    (rerankers.jina.reranked_in, an_object(results=SCORES, usage=USAGE)),
    (rerankers.tei.reranked_in, both(an_object(index=ODD, score=ANY))),
]


@pytest.mark.parametrize(("read", "answers"), READERS)
def test_no_number_of_an_answer_passes_unchecked(
    read: Callable[[bytes, int, int], Embedded | Reranked], answers: st.SearchStrategy[Any]
) -> None:
    @given(answers)
    def reads(answer: Any) -> None:
        try:
            found = read(json.dumps(answer).encode(), 2, 2)
        except Trouble:
            return
        assert found.tokens is None or (type(found.tokens) is int and 0 <= found.tokens < 2**31)
        numbers = np.asarray(found.vectors if isinstance(found, Embedded) else found.scores)
        assert numbers.shape[0] == 2
        assert np.isfinite(numbers).all()

    reads()
