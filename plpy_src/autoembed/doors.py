"""The doors from SQL into Python: each function is the body of the SQL function of the same name."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from autoembed import heap, providers, rerankers, tally, worker
from autoembed.batching import estimate_tokens, halves, pack, truncate
from autoembed.binary import literals
from autoembed.chunks import FUNCTION, NONE, STRUCTURE, chunks_of, fitting, places, size_of, trimmed
from autoembed.cutting import Cutter
from autoembed.database.lanes import Database, is_installed, storable
from autoembed.database.searches import SearchDatabase
from autoembed.database.statements import Error
from autoembed.errors import NO_FAULT, Fault, OverBudget, ProviderTrouble, RowError, Trouble, advice_for
from autoembed.flight import SLICE_SECONDS, Flight
from autoembed.forecast import chunk_effort
from autoembed.kept import KeptTexts
from autoembed.limits import NOTHING_KNOWN, PATIENCE_SECONDS, Charge, Limiter
from autoembed.model import Embedded, Model, Request, Reranked, Share
from autoembed.network import Network
from autoembed.outbox import PROBE
from autoembed.providers import COMPUTED_HERE, counter_of, most_tokens_of, provider_of, sizes_of
from autoembed.quality import quality_of, summary
from autoembed.query_models import answers, stop_answering
from autoembed.query_server import QueryServer
from autoembed.records import Backfill, Chunk, Known, Pipeline, Row, sha256_of
from autoembed.rows import FIRST_TEXTS, READ_BYTES
from autoembed.search import MAX_QUERY_CHARACTERS

# A search waits for its vector for at most this long, in seconds.
QUERY_TIMEOUT_SECONDS = 60.0
# Scores that a session keeps, in characters, so that all pages of a search come from one list.
SCORE_CACHE_CHARACTERS = 1_000_000
# A search waits for the scores of its rows for at most this long, in seconds, if its model sets no time.
RERANK_TIMEOUT_SECONDS = 2.0
# A rerank model that has failed is not asked for so many times as long as that took: searches lose little time to it.
RERANK_REST_TIMES = 10
# doctor() waits for the answer of a model for at most this long, in seconds.
PROBE_TIMEOUT_SECONDS = 10.0
# Rows whose vectors are adopted are read in so many at a time.
ADOPTED_ROWS = 1000
# Embeddings that change their place are copied so many at a time.
COPIED_ROWS = 500
# Connections that a session keeps open.
MAX_CONNECTIONS = 32
# Freed blocks up to this size, in bytes, stay with a lane: an index takes such blocks for each of its rows. The answers
# of providers, most of what a lane allocates, are larger and go back to the system.
KEPT_BLOCK_BYTES = 600_000
# Free memory that a lane keeps at the end of its heap, in bytes.
KEPT_FREE_BYTES = 8 << 20
# Python looks for cycles after so many new objects. The rows that a lane holds have as many, and no cycles.
NEW_OBJECTS = 30_000

heap.share_one_arena()
_network = Network(MAX_CONNECTIONS)
_scores = KeptTexts(SCORE_CACHE_CHARACTERS)
# By the definitions of rerank models: until when they are not asked, and why.
_resting: dict[str, tuple[float, str]] = {}
Result = TypeVar("Result", Embedded, Reranked)


def process(batch_size: int, max_requests: int, timeout_milliseconds: int) -> dict[str, Any]:
    options = worker.Options(batch_size, max_requests, timeout_milliseconds / 1000)
    here = Database(commits=False)
    here.begin_pass()
    here.clean_up()
    here.merge_segments()
    report = worker.run_pass(here, _network, options)
    here.warn_of_blocked_pipelines()
    return {**vars(report), "failed_jobs": json.dumps(report.failed_jobs)}


def work(run_seconds: float, batch_size: int, max_requests: int, timeout_milliseconds: int, backfill: bool) -> None:
    options = worker.Options(batch_size, max_requests, timeout_milliseconds / 1000)
    heap.keep(block_bytes=KEPT_BLOCK_BYTES, free_bytes=KEPT_FREE_BYTES)
    gc.set_threshold(NEW_OBJECTS)
    # The importer is that of autoembed._load_python().
    __loader__.keep()  # type: ignore[name-defined]
    here = Database(commits=True)
    name = "autoembed backfill lane" if backfill else "autoembed lane"
    try:
        with here.lane_settings(name), QueryServer(answers, stop_answering) as server:
            worker.work(here, _network, options, run_seconds, backfill=backfill, look_around=server.offer)
    except Error:
        # DROP EXTENSION while the lane runs is no error.
        if is_installed():
            raise


def embed(content: str, model_name: str) -> dict[str, Any]:
    """The vector of a search text, made by this session, or the fault that SQL is to raise."""
    try:
        if not content.strip():
            raise Fault("a blank text has no embedding", hint="Give embed() some words.")
        here = Database(commits=False)
        vector = _embed_in_turn(here, here.model(model_name), content)
    except Fault as fault:
        return {"embedding": None, "tokens_used": None, **fault.fields()}
    except Trouble as trouble:
        return {"embedding": None, "tokens_used": None, **_without_vector(model_name, trouble).fields()}
    return {"embedding": vector, "tokens_used": None, **NO_FAULT}


def scores(query: str, passages: list[str], model_name: str, definition: str) -> dict[str, Any]:
    """The scores of passages by a rerank model, or the trouble with it: the columns of autoembed._scores().

    definition: the row of the model and the version of its function. Scores that are kept are of the same passages
    and the same definition.
    """
    asked = (definition, query, hashlib.sha256(json.dumps(passages).encode()).hexdigest())
    kept = _scores.get(asked)
    if kept is None:
        began_at = time.monotonic()
        until, reason = _resting.get(definition, (0.0, ""))
        if began_at < until:
            return {"scores": None, "trouble": reason}
        here = Database(commits=False)
        try:
            kept = json.dumps(_rerank(here, here.model(model_name), query, passages))
        except (Fault, Trouble) as trouble:
            failed_at = time.monotonic()
            # The error may quote a passage, and another tenant may have the session's next search.
            summary = trouble.summary if isinstance(trouble, Trouble) else trouble.problem
            rest = failed_at + RERANK_REST_TIMES * (failed_at - began_at), f"it rests after an error: {summary}"
            for other in [other for other, (until, _) in _resting.items() if until < failed_at]:
                del _resting[other]
            _resting[definition] = rest
            return {"scores": None, "trouble": storable(str(trouble))}
        _scores.keep(asked, kept)
    return {"scores": json.loads(kept), "trouble": None}


def plan(pipeline_id: int, max_seconds: float | None) -> dict[str, Any]:
    """The faults of the SQL by which a pipeline's texts are read: the columns of autoembed._plan()."""
    try:
        Database(commits=False).plan(pipeline_id, max_seconds)
    except RowError as error:
        return {"problem": None if error.locked or error.slow else str(error), "errcode": error.sqlstate}
    return {"problem": None, "errcode": None}


def adopt_rows(pipeline_id: int) -> int:
    """Records that rows with a text and a vector have that of their text. Returns how many: autoembed._adopt_rows().

    A row that cannot be read is left to the lanes, which tell why.
    """
    here = Database(commits=False)
    pipeline = here.pipelines([pipeline_id])[pipeline_id]
    adopted = 0
    for keys in _scanned(here, pipeline, ADOPTED_ROWS):
        for rows in _readable(here, pipeline, keys):
            found = {
                key: (pipeline.digest(row.content), row.vector_digest)
                for key, row in rows.items()
                if row.vector_digest is not None and row.content and not row.content.isspace()
            }
            if found:
                digests, vector_digests = zip(*found.values(), strict=True)
                uncut = [False] * len(found)
                here.record_embedded(pipeline, list(found), digests, vector_digests, uncut, written=True)
            adopted += len(found)
    return adopted


def _scanned(here: Database, pipeline: Pipeline, max_rows: int) -> Iterator[list[str]]:
    """The keys of all rows, so many at a time."""
    after, are_all = None, False
    while not are_all:
        keys, are_all = here.scan(Backfill(pipeline.id, pipeline.owner, after, None, 0), max_rows)
        if keys:
            yield keys
            after = keys[-1]


def _readable(here: Database, pipeline: Pipeline, keys: list[str]) -> Iterator[dict[str, Row]]:
    """The rows of these keys, part by part. A part that cannot be read is halved, down to the row to blame."""
    try:
        rows, complete = here.rows(pipeline, keys, READ_BYTES)
    except RowError as error:
        if error.locked or error.cancels:
            raise
        if len(keys) > 1:
            for half in halves(keys):
                yield from _readable(here, pipeline, half)
        return
    yield rows
    if not complete:
        yield from _readable(here, pipeline, [key for key in keys if key not in rows])


def run_as_owner(table_id: str, query: str, max_seconds: float | None) -> dict[str, Any]:
    """The rows of a query that runs with the rights of a table's owner: the columns of autoembed._run_as_owner()."""
    try:
        found = Database(commits=False).run_as_owner(table_id, query, max_seconds)
    except RowError as error:
        return {"found": None, "problem": str(error), "errcode": error.sqlstate}
    return {"found": found, "problem": None, "errcode": None}


def run_statement_as_owner(table_id: str, statement: str) -> dict[str, Any]:
    """Runs a statement with the rights of a table's owner: the columns of autoembed._run_statement_as_owner()."""
    try:
        Database(commits=False).run_statement_as_owner(table_id, statement)
    except RowError as error:
        return {"problem": str(error), "errcode": error.sqlstate}
    return {"problem": None, "errcode": None}


def copy_embeddings(
    pipeline_id: int, table_id: str, query_start: str, query_end: str, former: dict[str, Any]
) -> dict[str, Any]:
    """Copies embeddings to where their pipeline has them now: the columns of autoembed._copy_embeddings().

    The query gives the old embeddings of the rows whose keys come between its parts. former: how texts were cut.
    """
    here = Database(commits=False)
    pipeline = here.pipelines([pipeline_id])[pipeline_id]
    old = dataclasses.replace(pipeline, **former)
    if FUNCTION in (old.chunking, pipeline.chunking) or old.chunk_prefix or pipeline.chunk_prefix:
        # A piece is not the whole text, and a prefix is not in the text.
        return {"problem": None, "errcode": None}
    cutter = Cutter(here.between_steps)
    try:
        for keys in _scanned(here, pipeline, COPIED_ROWS):
            while keys:
                rows, are_all = here.rows(pipeline, keys, READ_BYTES)
                _copy(here, table_id, f"{query_start}{{}}{query_end}", pipeline, old, rows, cutter)
                keys = [] if are_all else [key for key in keys if key not in rows]
    except RowError as error:
        return {"problem": str(error), "errcode": error.sqlstate}
    return {"problem": None, "errcode": None}


def _copy(
    here: Database,
    table_id: str,
    query: str,
    pipeline: Pipeline,
    old: Pipeline,
    rows: dict[str, Row],
    cutter: Cutter,
) -> None:
    """Copies the embeddings of these rows that are of their present texts, each of one text as a whole."""
    import numpy as np

    found = {one["key"]: one for one in json.loads(here.run_as_owner(table_id, query.format(here.literal(list(rows)))))}
    known = here.digests(pipeline, list(found))
    keys, contents, chunks = [], [], []
    for key, embedding in found.items():
        content = rows[key].content
        was = Row(content, bytes.fromhex(embedding["digest"]))
        if content is None or key not in known or not known[key].describes(was, old.digest(content)):
            continue
        ranges = cutter.ranges(pipeline, content)
        if len(ranges) == 1:
            (start, end) = ranges[0]
            keys.append(key)
            contents.append(content)
            chunks.append([Chunk(start, end, pipeline.model.chunk_digest(content[start:end]))])
    if not keys:
        return
    vectors = np.array([json.loads(found[key]["vector"]) for key in keys], np.float32)
    digests = [*map(sha256_of, contents)]
    unknown = [None] * len(keys)
    if pipeline.is_beside:
        outcomes = here.write_chunks(pipeline, keys, digests, unknown, [""] * len(keys), chunks, vectors)
    else:
        outcomes = here.write(pipeline, keys, digests, unknown, vectors)
    written = [place for place, key in enumerate(keys) if outcomes[key].outcome == "written"]
    here.record_embedded(
        pipeline,
        [keys[place] for place in written],
        [pipeline.digest(contents[place]) for place in written],
        [outcomes[keys[place]].vector_digest for place in written],
        [chunks[place][0].end < trimmed(contents[place], 0, len(contents[place]))[1] for place in written],
        written=True,
    )


def preview(
    pipeline_id: int,
    content: str | None,
    prefix: str | None,
    vector_digest: str | None,
    known_digest: str | None,
    known_vector_digest: str | None,
    outstanding: str | None,
) -> Iterator[dict[str, Any]]:
    """The chunks of a row with this text, and its state: the rows of autoembed._preview()."""
    here = Database(commits=False)
    # Not while the rows are read: PostgreSQL would not show the words of the error.
    pipeline = here.own_pipeline(pipeline_id)
    return _preview(here, pipeline, content, prefix, vector_digest, known_digest, known_vector_digest, outstanding)


def _preview(
    here: Database,
    pipeline: Pipeline,
    content: str | None,
    prefix: str | None,
    vector_digest: str | None,
    known_digest: str | None,
    known_vector_digest: str | None,
    outstanding: str | None,
) -> Iterator[dict[str, Any]]:
    if content is None or not content.strip():
        state = "not wanted" if vector_digest is None else outstanding or "stale"
        place = dict.fromkeys(("chunk_number", "chunk_start", "chunk_end", "problem", "errcode"))
        yield {"content": content, "tokens": 0, "truncated": False, "state": state, **place}
        return
    state = outstanding or ("missing" if vector_digest is None else "stale")
    if known_digest is not None:
        row = Row(content, None if vector_digest is None else bytes.fromhex(vector_digest))
        known = Known(
            bytes.fromhex(known_digest), None if known_vector_digest is None else bytes.fromhex(known_vector_digest)
        )
        if known.describes(row, pipeline.digest(content, prefix or "")):
            state = "fresh"
    problem = errcode = None
    try:
        ranges = Cutter(here.between_steps, here.split).ranges(pipeline, content, prefix=prefix or "")
    except Fault as fault:
        ranges = [(0, len(content))]
        if pipeline.chunking == FUNCTION or prefix:
            problem, errcode = fault.problem, fault.errcode
    except RowError as error:
        ranges, problem, errcode = [(0, len(content))], str(error), error.sqlstate
    for number, (start, end) in enumerate(ranges, 1):
        # A text that is not cut into chunks is shown as a whole, though the model takes its beginning alone.
        text = content if pipeline.chunking == NONE else content[start:end]
        tokens, limit = _tokens_of(pipeline.model, (prefix or "") + text)
        yield {
            "content": text,
            "tokens": tokens,
            "truncated": limit is not None and tokens > limit,
            "state": state,
            "chunk_number": number,
            "chunk_start": start,
            "chunk_end": end,
            "problem": problem,
            "errcode": errcode,
        }


def _tokens_of(model: Model, text: str) -> tuple[int, int | None]:
    """The tokens of a text, estimated if its model cannot count them here, and the most that the model takes."""
    try:
        counter = counter_of(model)
    except ProviderTrouble:
        return estimate_tokens(text), most_tokens_of(model)
    return counter.count([text])[0], counter.most


def estimate(
    texts: list[str], prefixes: list[str], model_name: str | None, chunking: str, size: int | None, overlap: int
) -> dict[str, Any]:
    """The effort to embed these texts, cut like that behind prefixes: the columns of autoembed._estimate_texts()."""
    here = Database(commits=False)
    model = here.model(model_name)
    sizes = sizes_of(model, Limiter(model).learnt)
    limit, prefix = sizes.tokens_per_input, model.prefix("document")
    most = min(worker.DEFAULT_BATCH_SIZE, sizes.inputs_per_request)
    price, rows_per_second, tokens_per_request = here.price_and_rate(model)
    chunk_tokens = None if chunking == NONE else chunk_size(chunking, size, overlap, model.name)["tokens"]
    if chunk_tokens is None:
        texts = [behind + text for behind, text in zip(prefixes, texts, strict=True)]
        distinct = list(dict.fromkeys(text if limit is None else truncate(text, limit, prefix) for text in texts))
        read = most_tokens_of(model) or sizes.tokens_per_request
        tokens = sum(min(estimate_tokens(prefix + text), read) for text in distinct)
        inputs, requests = len(distinct), len(pack(distinct, most, sizes.tokens_per_request, prefix))
    else:
        behind_texts = list(dict.fromkeys(zip(prefixes, texts, strict=True)))
        tokens, inputs = chunk_effort(
            behind_texts, counter_of(model).count, chunk_tokens, chunking, overlap or 0, here.check_interrupts
        )
        requests = math.ceil(max(inputs / most, tokens / sizes.tokens_per_request))
    if model.provider in COMPUTED_HERE:
        # A lane sends as many texts as such a model embeds in a second.
        usual = tokens / tokens_per_request if tokens_per_request else inputs / FIRST_TEXTS
        requests = max(requests, math.ceil(usual))
    return {"tokens": tokens, "requests": requests, "price": price, "rows_per_second": rows_per_second}


def chunk_size(chunking: str | None, size: int | None, overlap: int | None, model_name: str) -> dict[str, Any]:
    """The most tokens of a chunk, or the fault that SQL is to raise: the columns of autoembed._chunk_size()."""
    model = Database(commits=False).model(model_name)
    try:
        counter = providers.counter_of(model)
        (around,) = counter.count([""])
        tokens = size_of(chunking or STRUCTURE, size, overlap or 0, model_name, around, counter.most, counter.is_exact)
    except Fault as fault:
        return {"tokens": None, **fault.fields()}
    except Trouble as trouble:
        return {"tokens": None, **_without_tokens(model_name, trouble).fields()}
    return {"tokens": tokens, **NO_FAULT}


def chunks(
    content: str | None,
    chunking: str | None,
    size: int,
    overlap: int | None,
    model_name: str,
    pieces: list[str | None] | None,
) -> Iterator[dict[str, Any]]:
    """The chunks of a text: the rows of autoembed._chunks()."""
    here = Database(commits=False)
    count = providers.counter_of(here.model(model_name)).count
    text = content or ""
    if chunking == FUNCTION:
        try:
            parts = places(text, pieces or ()) if text.strip() else []
        except Fault as fault:
            yield {**dict.fromkeys(("chunk_start", "chunk_end", "token_count", "chunk")), **fault.fields()}
            return
        found = fitting(text, parts, count, size, here.check_interrupts)
    else:
        found = chunks_of(text, count, size, chunking or STRUCTURE, overlap or 0, here.check_interrupts)
    for start, end, tokens in found:
        place = {"chunk_start": start, "chunk_end": end, "token_count": tokens, "chunk": text[start:end]}
        yield {**place, **NO_FAULT}


def search_stats() -> Iterator[dict[str, Any]]:
    """The figures of pipelines whose tables the caller owns or monitors: the rows of autoembed._search_stats().

    Those of pipelines that are gone are removed.
    """
    files = tally.of_database(SearchDatabase().own_id())
    found = files.all()
    for (pipeline, figures), state in zip(found.items(), _states(found), strict=True):
        if not state["exists"]:
            files.remove(pipeline)
        elif state["seen"]:
            yield {
                **figures.counts,
                "pipeline_id": pipeline[0],
                "p50_ms": tally.quantile(figures.buckets, 0.5),
                "p95_ms": tally.quantile(figures.buckets, 0.95),
                "since": figures.since / 1e6,
            }


def reset_search_stats(table: int | None) -> None:
    """Forgets the figures of a table, or of all, that the caller owns: autoembed.reset_search_stats()."""
    files = tally.of_database(SearchDatabase().own_id())
    found = [pipeline for pipeline in files.all() if table in (None, pipeline[1])]
    for pipeline, state in zip(found, _states(found), strict=True):
        if state["owned"]:
            files.remove(pipeline)


def _states(pipelines: Collection[tuple[int, int]]) -> list[dict[str, bool]]:
    return SearchDatabase().pipelines_seen(list(pipelines))


def search_quality(found: str, grades: str, most: int) -> dict[str, float]:
    """The quality of answers: the columns of autoembed._search_quality().

    found: for each query the grades of the rows that were found. grades: for each query those of all its answers.
    """
    answers = [
        quality_of(one, all_of_one, most) for one, all_of_one in zip(*map(json.loads, (found, grades)), strict=True)
    ]
    mean, low, high = summary(answers)
    return {
        **mean._asdict(),
        **{f"{name}_low": value for name, value in low._asdict().items()},
        **{f"{name}_high": value for name, value in high._asdict().items()},
    }


def check_model(name: str) -> dict[str, Any] | None:
    """The fault in a model's definition, if there is one. waits: the model cannot be used yet, which is a WARNING."""
    model = Database(commits=False).model(name)
    try:
        _check(model)
    except Fault as fault:
        return {**fault.fields(), "waits": False}
    except ProviderTrouble as trouble:
        not_yet = Fault(
            f'model "{name}" cannot be used yet: {trouble}',
            hint="It is tried again by itself once this is mended.",
            errcode="01000",
        )
        return {**not_yet.fields(), "waits": True}
    return None


def probe(name: str) -> dict[str, Any]:
    """The fault of a model, found by asking it about one word: the columns of autoembed._probe()."""
    here = Database(commits=False)
    model = here.model(name)
    try:
        _check(model)
        if model.reranks:
            _rerank(here, model, PROBE, [PROBE])
        else:
            _embed_query(here, model, PROBE, PROBE_TIMEOUT_SECONDS)
    except Fault as fault:
        return {"problem": fault.problem, "advice": fault.hint}
    except Trouble as trouble:
        return {"problem": str(trouble), "advice": RERANK_ADVICE if model.reranks else advice_for(trouble)}
    except Exception as error:
        if here.may_pass(error):
            raise
        # doctor() has more to tell. The error's text may hold a key.
        problem = f"an unexpected {type(error).__name__} in the provider {model.provider}"
        return {"problem": problem, "advice": "Correct its definition with autoembed.alter_model()."}
    return {"problem": None, "advice": None}


RERANK_ADVICE = (
    "Nothing, if it passes: searches are not reranked meanwhile. Or correct its definition with "
    "autoembed.alter_model(), its key, or the network; a larger timeout_seconds gives a slow server more time."
)


def _check(model: Model) -> None:
    (rerankers if model.reranks else providers).check(model)


def _without_vector(model_name: str, trouble: Trouble) -> Fault:
    return Fault(
        f'model "{model_name}" gave no embedding: {trouble}',
        hint="SELECT * FROM autoembed.doctor() shows a superuser what to do.",
        errcode="38000",
    )


def _without_tokens(model_name: str, trouble: Trouble) -> Fault:
    return Fault(
        f'model "{model_name}" cannot count tokens: {trouble}',
        hint="SELECT * FROM autoembed.doctor() shows a superuser what to do.",
        errcode="38000",
    )


def _embed_in_turn(here: Database, model: Model, content: str) -> str:
    limiter = Limiter(model)
    if limiter.needs_permits:
        end = time.monotonic() + PATIENCE_SECONDS
        _wait_for_permit(here, model, limiter.charge(estimate_tokens(content), time.monotonic()), end)
    return _embed_query(here, model, content)


def _wait_for_permit(here: Database, model: Model, charges: Sequence[Charge | None], end: float) -> None:
    """Waits until the model may be asked once more. Raises ProviderTrouble if that is not so at the end."""
    permit = here.take_permit(model.name, charges, end - time.monotonic(), with_slot=False)
    if permit.spent is not None:
        raise OverBudget(permit.spent)
    if permit.possible_at is not None:
        raise ProviderTrouble(f"its limits allow no request for {permit.possible_at - time.monotonic():.0f} s")
    while permit.at is not None and time.monotonic() < permit.at:
        _wait(here)


def _wait(here: Database) -> None:
    here.check_interrupts()
    time.sleep(SLICE_SECONDS)


def _embed_query(here: Database, model: Model, content: str, timeout_seconds: float = QUERY_TIMEOUT_SECONDS) -> str:
    request = Request(model, [content], timeout_seconds, purpose="query")
    provider = provider_of(model)
    call = partial(providers.embed, request, _network, here.call_embedder)
    end = time.monotonic() + PATIENCE_SECONDS
    answer = _answer(here, model, call, request.stopped, provider.abort, end, in_backend=provider.RUNS_IN_BACKEND)
    tokens = estimate_tokens(content) if answer.tokens is None else answer.tokens
    here.note_usage(model.name, [Share(None, 1, 1, tokens, 0)], None)
    return literals(answer.vectors)[0]


def _rerank(here: Database, model: Model, query: str, passages: Sequence[str]) -> list[float]:
    """The scores of passages. Raises Trouble, too, if they are not there in time."""
    end = time.monotonic() + (model.timeout_seconds or RERANK_TIMEOUT_SECONDS)
    query = query[:MAX_QUERY_CHARACTERS]
    texts = rerankers.shortened(model, query, passages)
    tokens = sum(map(estimate_tokens, texts)) + len(texts) * estimate_tokens(query)
    limiter = Limiter(model)
    if limiter.needs_permits:
        _wait_for_permit(here, model, limiter.charge(tokens, time.monotonic()), end)

    stopped = threading.Event()

    def call() -> Reranked:
        # It may stand in an error.
        seconds = max(round(end - time.monotonic(), 1), 0.1)
        request = Request(model, texts, seconds, purpose="rerank", query=query, stopped=stopped)
        return rerankers.rerank(request, _network, here.call_reranker)

    in_backend = rerankers.reranker_of(model).RUNS_IN_BACKEND
    answer = _answer(here, model, call, stopped, lambda: None, end, in_backend=in_backend)
    tokens = tokens if answer.tokens is None else answer.tokens
    here.note_usage(model.name, [Share(None, 1, len(texts), tokens, 0)], None)
    return list(answer.scores)


def _answer(
    here: Database,
    model: Model,
    call: Callable[[], Result],
    stopped: threading.Event,
    abort_call: Callable[[], None],
    end: float,
    *,
    in_backend: bool,
) -> Result:
    """The answer to a request, which is sent as soon as one more may be in flight. Learns the model's limits from it.

    stopped: that of the request. abort_call: ends what the call does without the network. end: the moment until which
    it waits to send.
    """

    def abort() -> None:
        stopped.set()
        _network.abort()
        abort_call()

    def between_waits() -> None:
        here.check_interrupts()
        _network.expire()

    while True:
        with here.slot(model) as has_slot:
            if has_slot:
                with Flight[None, Result](1, between_waits, abort) as flight:
                    flight.submit(None, call, here=in_backend)
                    [(_, outcome)] = flight.landed()
        if has_slot:
            break
        if time.monotonic() > end:
            raise ProviderTrouble(f"{model.max_requests_in_flight} requests are in flight, and no more may be")
        _wait(here)
    limiter = Limiter(model)
    if limiter.learn_from(outcome, time.monotonic()):
        here.learn_limits(model.name, limiter.learnt or NOTHING_KNOWN)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
