"""Where SQL enters Python: each function is the body of the SQL function of the same name."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from autoembed import database, heap, providers, worker
from autoembed.batching import estimate_tokens, pack, truncate
from autoembed.errors import InvalidInput, OverBudget, ProviderTrouble, RowError, Trouble
from autoembed.flight import SLICE_SECONDS, Flight
from autoembed.limits import NOTHING_KNOWN, PATIENCE_SECONDS, Charge, Limiter
from autoembed.model import Embedded, Model, Request, Share
from autoembed.network import Network
from autoembed.providers import provider_of, sizes_of

# A plan without an index calls embed() for every row, a search page for every page.
QUERY_CACHE_SIZE = 100
QUERY_TIMEOUT_SECONDS = 60.0
PROBE_TIMEOUT_SECONDS = 10.0

heap.share_one_arena()
_network = Network(max_connections=32)
_queries: OrderedDict[tuple[Model, str], str] = OrderedDict()


def process(batch_size: int, max_requests: int, timeout_milliseconds: int) -> dict[str, Any]:
    options = _options(batch_size, max_requests, timeout_milliseconds)
    here = database.Database(commits=False)
    here.note_transaction()
    here.clean_up()
    report = worker.run_pass(here, _network, options)
    here.warn_of_blocked_pipelines()
    return {**vars(report), "failed_jobs": json.dumps(report.failed_jobs)}


def work(run_seconds: float, batch_size: int, max_requests: int, timeout_milliseconds: int, backfill: bool) -> None:
    options = _options(batch_size, max_requests, timeout_milliseconds)
    # Answers are most of what a lane allocates: each goes back to the system when it is written, but not what an index
    # takes for each of its rows.
    heap.keep(block_bytes=600_000, free_bytes=8 << 20)
    here = database.Database(commits=True)
    try:
        with here.lane_settings():
            worker.work(here, _network, options, run_seconds, backfill=backfill)
    except database.Error:
        # DROP EXTENSION while the lane ran is no error.
        if database.is_installed():
            raise


def embed(content: str | None, model_name: str | None) -> str | None:
    if content is None:
        return None
    here = database.Database(commits=False)
    model = here.model(model_name)
    query = (model, content)
    if query not in _queries:
        try:
            if not content.strip():
                raise InvalidInput("a blank text has no embedding", hint="Give embed() some words.")
            _queries[query] = _embed_in_turn(here, model, content)
        except InvalidInput as error:
            database.raise_error(error)
        except Trouble as trouble:
            message = f'model "{model.name}" gave no embedding: {trouble}'
            database.raise_error(InvalidInput(message, sqlstate="38000"))
        if len(_queries) > QUERY_CACHE_SIZE:
            _queries.popitem(last=False)
    _queries.move_to_end(query)
    return _queries[query]


def plan(pipeline_id: int) -> dict[str, Any]:
    """What is wrong with the SQL by which a pipeline's texts are read: the columns of autoembed._plan()."""
    try:
        database.Database(commits=False).plan(pipeline_id)
    except RowError as error:
        return {"problem": None if error.locked else str(error), "errcode": error.sqlstate}
    return {"problem": None, "errcode": None}


def state_of(
    pipeline_id: int, content: str | None, has_embedding: bool, digest: str | None, outstanding: str | None
) -> dict[str, Any]:
    """How a row stands whose text is this: the columns of autoembed._state_of()."""
    pipeline = database.Database(commits=False).pipelines([pipeline_id])[pipeline_id]
    limit = sizes_of(pipeline.model).tokens_per_input
    tokens = estimate_tokens(content or "")
    wanted = content is not None and content.strip() != ""
    fresh = wanted and has_embedding and content is not None and digest == pipeline.model.digest(content).hex()
    if fresh or not wanted and not has_embedding:
        state = "fresh" if wanted else "not wanted"
    else:
        state = outstanding or ("stale" if has_embedding else "missing")
    return {"tokens": tokens if wanted else 0, "truncated": limit is not None and tokens > limit, "state": state}


def estimate(texts: list[str], model_name: str | None) -> dict[str, Any]:
    """What it takes to embed these texts: the columns of autoembed._estimate_texts()."""
    here = database.Database(commits=False)
    model = here.model(model_name)
    sizes = sizes_of(model, Limiter(model).learnt)
    limit, prefix = sizes.tokens_per_input, model.prefix("document")
    distinct = list(dict.fromkeys(text if limit is None else truncate(text, limit, prefix) for text in texts))
    most = min(worker.DEFAULT_BATCH_SIZE, sizes.inputs_per_request)
    requests = pack(distinct, most, sizes.tokens_per_request, prefix)
    price, rows_per_second = here.price_and_rate(model)
    return {
        "tokens": sum(estimate_tokens(prefix + text) for text in distinct),
        "requests": len(requests),
        "price": price,
        "rows_per_second": rows_per_second,
    }


def check_model(name: str) -> None:
    model = database.Database(commits=False).model(name)
    try:
        provider_of(model).check(model)
    except InvalidInput as error:
        database.raise_error(error)
    except ProviderTrouble as trouble:
        database.warn(
            f'model "{name}" cannot be used yet: {trouble}',
            "It is tried again by itself once this is mended.",
        )


def probe(name: str) -> str | None:
    """What is wrong with a model, as seen by asking it for one vector; None: nothing."""
    here = database.Database(commits=False)
    model = here.model(name)
    try:
        provider_of(model).check(model)
        _embed_query(here, model, worker.PROBE, PROBE_TIMEOUT_SECONDS)
    except (InvalidInput, Trouble) as trouble:
        return str(trouble)
    return None


def _embed_in_turn(here: database.Database, model: Model, content: str) -> str:
    limiter = Limiter(model)
    if limiter.needs_permits:
        _wait_for_permit(here, model, limiter.charge(estimate_tokens(content), time.monotonic()))
    return _embed_query(here, model, content)


def _wait_for_permit(here: database.Database, model: Model, charges: Sequence[Charge | None]) -> None:
    """Waits until the model may be asked once more; ProviderTrouble if that takes too long."""
    end = time.monotonic() + PATIENCE_SECONDS
    permit = here.take_permit(model.name, charges, with_slot=False)
    if permit.spent is not None:
        raise OverBudget(permit.spent)
    while permit.at is not None and time.monotonic() < permit.at:
        if permit.at > end:
            raise ProviderTrouble(f"its limits allow no request for {permit.at - time.monotonic():.0f} s")
        _wait(here)


def _wait(here: database.Database) -> None:
    here.check_interrupts()
    time.sleep(SLICE_SECONDS)


def _embed_query(
    here: database.Database, model: Model, content: str, timeout_seconds: float = QUERY_TIMEOUT_SECONDS
) -> str:
    outcome = _outcome(here, model, Request(model, [content], timeout_seconds, purpose="query"))
    limiter = Limiter(model)
    if limiter.learn_from(outcome, time.monotonic()):
        here.learn_limits(model.name, limiter.learnt or NOTHING_KNOWN)
    if isinstance(outcome, BaseException):
        raise outcome
    tokens = estimate_tokens(content) if outcome.tokens is None else outcome.tokens
    here.note_usage(model.name, [Share(None, 1, 1, tokens, 0)], None)
    return database.literals(outcome.vectors)[0]


def _outcome(here: database.Database, model: Model, request: Request) -> Embedded | BaseException:
    """Sends a request, as soon as one more may be in flight."""
    provider = provider_of(model)
    end = time.monotonic() + PATIENCE_SECONDS

    def abort() -> None:
        _network.abort()
        provider.abort()

    while True:
        with here.slot(model) as has_slot:
            if has_slot:
                with Flight[None, Embedded](1, here.check_interrupts, abort) as flight:
                    call = partial(providers.embed, request, _network, here.call_embedder)
                    flight.submit(None, call, here=provider.RUNS_IN_BACKEND)
                    [(_, outcome)] = flight.landed()
        if has_slot:
            return outcome
        if time.monotonic() > end:
            raise ProviderTrouble(f"{model.max_requests_in_flight} requests are in flight, and no more may be")
        _wait(here)


def _options(batch_size: int, max_requests: int, timeout_milliseconds: int) -> worker.Options:
    for name, value in (
        ("batch_size", batch_size),
        ("max_requests", max_requests),
        ("timeout_milliseconds", timeout_milliseconds),
    ):
        if value is None or value < 1:
            database.raise_error(
                InvalidInput(f"{name} must be at least 1, not {value}", hint=f"Leave {name} out for its default.")
            )
    return worker.Options(batch_size, max_requests, timeout_milliseconds / 1000)
