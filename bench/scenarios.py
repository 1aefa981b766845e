"""The scenarios: each function makes one measurement on a fresh server and returns its figures."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

from bench import beside as vectors_beside
from bench import chunking, documents, limit, measure, neighbours
from bench import quality as search_quality
from bench import recall as search_recall
from bench import search_speed as speed_of_search
from bench import text_leg as search_by_words
from bench.measure import Usage
from bench.server import api, bare_model_seconds, log_bytes
from bench.systems import System, Workers
from bench.systems.autoembed import Autoembed
from harness import Connection, Server
from waiting import wait_until

SINGLE_ROWS = 2000
SEARCHES = 300  # more than a session keeps
CURVE_POINTS = 100
MEMORY_POLL_SECONDS = 1.0
# A backfill's lane is looked at when it has embedded so many rows, and at the end.
EARLY_ROWS = 10_000
# How often a row is inserted while a backfill runs, and beside a hostile neighbour.
BACKFILL_ROWS_PER_SECOND = 5
NEIGHBOURS_ROWS_PER_SECOND = 2

Figures = dict[str, float]


@dataclass(frozen=True)
class Measured:
    figures: Figures
    curve: list[tuple[float, int]] = field(default_factory=list)  # of a drain: seconds, and rows with vectors by then


@dataclass(frozen=True)
class Sizes:
    rows: int
    rows_without_index: int
    backfill_rows: int
    search_rows: int
    cost_rows: int
    cost_rounds: int
    freshness_seconds: float
    idle_seconds: float
    request_seconds: float  # what the API takes per request, and per input
    input_seconds: float
    grace_seconds: float  # how long the last rows of a steady stream are waited for


def drain(server: Server, db: Connection, system: System, sizes: Sizes) -> Measured:
    """Rows inserted by one statement, until the last has its vector."""
    system.attach(server, db)
    documents.load(db, sizes.rows + 1)
    with ExitStack() as stack:
        if system.sees_rows_by_itself:
            workers = stack.enter_context(_warm(server, db, system))
        before, earlier = Usage.of(db), api(server).counters()
        began = time.monotonic()
        documents.insert(db, sizes.rows, first=2)
        committed = time.time()
        insert_seconds = time.monotonic() - began
        if not system.sees_rows_by_itself:
            workers = stack.enter_context(system.running(server, db))
            api(server).wait_for(seconds=60, requests=1)
        worker_cpu_seconds, machine_cpu_seconds = workers.cpu_seconds(), measure.machine_cpu_seconds()
        private_bytes, look_at = 0, began

        def is_done() -> bool:
            nonlocal private_bytes, look_at
            # A look takes some hundredths of a second of a core that a system could have used.
            if time.monotonic() > look_at:
                private_bytes = max(private_bytes, workers.private_bytes())
                look_at = time.monotonic() + MEMORY_POLL_SECONDS
            return documents.missing(db) == 0

        wait_until(is_done, 60 + sizes.rows, pause_seconds=0.25)
        used, calls = Usage.of(db) - before, api(server).counters()
        worker_cpu_seconds = workers.cpu_seconds() - worker_cpu_seconds
        machine_cpu_seconds = measure.machine_cpu_seconds() - machine_cpu_seconds
        private_bytes = max(private_bytes, workers.private_bytes())
    documents.check(db, api(server))
    requests = api(server).log()[earlier["requests"] :]
    # A worker's start, and a rival's wait for its next tick, are not counted.
    if system.name != "autoembed":
        committed = requests[0]["started_at"] + time.time() - time.monotonic()
    seconds = [at - committed for at in measure.stored_at(db)[-sizes.rows :]]
    inputs = calls["inputs"] - earlier["inputs"]
    figures = {
        "rows_per_second": sizes.rows / seconds[-1],
        "requests": len(requests),
        "inputs_per_row": inputs / sizes.rows,
        "inputs_per_request": inputs / len(requests),
        "most_in_flight": calls["max_in_flight"],
        "postgres_cpu_seconds": used.cpu_seconds,
        "worker_cpu_seconds": worker_cpu_seconds,
        "other_cpu_seconds": machine_cpu_seconds - worker_cpu_seconds - used.cpu_seconds,
        "wal_bytes": used.wal_bytes,
        "private_bytes": private_bytes,
        "insert_seconds": insert_seconds,
        "end_over_start": _end_over_start(seconds),
    }
    return Measured(figures, _curve(seconds))


def write_limit(server: Server, db: Connection, connections: int, sizes: Sizes) -> Measured:
    """The same rows and vectors without any system."""
    documents.load(db, sizes.rows)
    documents.insert(db, sizes.rows)
    batches = limit.batches(db, api(server))
    with ExitStack() as stack:
        writers = [stack.enter_context(server.connect()) for _ in range(connections)]
        before, machine_cpu_seconds = Usage.of(db), measure.machine_cpu_seconds()
        began = limit.write(batches, writers)
        used, machine_cpu_seconds = Usage.of(db) - before, measure.machine_cpu_seconds() - machine_cpu_seconds
    documents.check(db, api(server))
    seconds = [at - began for at in measure.stored_at(db)]
    figures = {
        "rows_per_second": sizes.rows / seconds[-1],
        "postgres_cpu_seconds": used.cpu_seconds,
        "other_cpu_seconds": machine_cpu_seconds - used.cpu_seconds,
        "wal_bytes": used.wal_bytes,
    }
    return Measured(figures, _curve(seconds))


def backfill(server: Server, db: Connection, system: Autoembed, sizes: Sizes) -> Measured:
    """enable() on a table that has rows, until the last has its vector; and what a lane takes when it is done."""
    documents.load(db, sizes.backfill_rows)
    documents.insert(db, sizes.backfill_rows)
    system.create(server, db)
    began = time.monotonic()
    system.enable(db, enqueue_existing=True)
    enable_seconds = time.monotonic() - began
    began_at = time.time()
    early_bytes, private_bytes, queue_bytes = 0, 0, 0
    with system.running(server, db) as workers:

        def is_done() -> bool:
            nonlocal early_bytes, private_bytes, queue_bytes
            [(queue,)] = db.execute("SELECT pg_total_relation_size('pgmq.q_embedding_jobs')")
            queue_bytes = max(queue_bytes, queue)
            private_bytes = max(private_bytes, workers.private_bytes())
            embedded = api(server).counters()["inputs"]
            if embedded <= EARLY_ROWS:
                early_bytes = private_bytes
            return bool(embedded >= sizes.backfill_rows and documents.missing(db) == 0)

        wait_until(is_done, 60 + sizes.backfill_rows, pause_seconds=0.25)
        # With the dead rows that it leaves, and with what the lane has grown to.
        lane_cpu_percent = measure.lane_cpu_percent(db, sizes.idle_seconds)
    documents.check(db, api(server))
    seconds = [at - began_at for at in measure.stored_at(db)]
    figures = {
        "enable_seconds": enable_seconds,
        "rows_per_second": sizes.backfill_rows / seconds[-1],
        "end_over_start": _end_over_start(seconds),
        "inputs_per_row": api(server).counters()["inputs"] / sizes.backfill_rows,
        "early_private_bytes": early_bytes,
        "private_bytes": private_bytes,
        "queue_bytes": queue_bytes,
        "idle_lane_cpu_percent": lane_cpu_percent,
    }
    return Measured(figures, _curve(seconds))


def local_model(server: Server, db: Connection, system: Autoembed, sizes: Sizes) -> Measured:
    """The model in the image: a drain, and the same texts by a plain loop before."""
    db.execute("ALTER TABLE documents ALTER embedding TYPE halfvec(384)")
    system.attach(server, db)
    documents.load(db, sizes.rows + 1)
    texts = db.execute("SELECT format(E'# %s\\n\\n%s', title, content) FROM source WHERE id > 1 ORDER BY id").fetchall()
    bare_seconds = bare_model_seconds(server, [text for (text,) in texts])
    private_bytes = 0
    with _warm(server, db, system) as workers:
        documents.insert(db, sizes.rows, first=2)
        committed = time.time()

        def is_done() -> bool:
            nonlocal private_bytes
            private_bytes = max(private_bytes, workers.private_bytes())
            return documents.missing(db) == 0

        wait_until(is_done, 60 + sizes.rows, pause_seconds=0.25)
    rows_per_second = sizes.rows / (measure.stored_at(db)[-1] - committed)
    figures = {
        "rows_per_second": rows_per_second,
        "bare_rows_per_second": sizes.rows / bare_seconds,
        "ratio": rows_per_second * bare_seconds / sizes.rows,
        "private_bytes": private_bytes,
    }
    return Measured(figures)


def search(server: Server, db: Connection, system: Autoembed, sizes: Sizes) -> Measured:
    """A session that calls embed() with one text after another, and with the last one again and again."""
    system.create(server, db)
    [(pid,)] = db.execute("SELECT pg_backend_pid()")
    texts = [content for _, _, content in documents.texts(SEARCHES)]

    def seconds(text: str) -> float:
        began = time.perf_counter()
        db.execute("SELECT autoembed.embed(%s)", [text])
        return time.perf_counter() - began

    figures = {
        "first_seconds": statistics.median([seconds(text) for text in texts]),
        "again_seconds": statistics.median([seconds(texts[-1]) for _ in texts]),
        "private_bytes": measure.backend_private_bytes(db, pid),
    }
    return Measured(figures)


def chunks(server: Server, db: Connection, splitter: str) -> Measured:
    """How well the chunks of a splitter are found, and how many an edit makes new."""
    return Measured(chunking.measure(server, splitter))


def fresh_beside_a_neighbour(server: Server, db: Connection, attack: str, sizes: Sizes) -> Measured:
    """Single INSERTs of one tenant, first alone, then while another tenant attacks; both have the same lane and model.

    No figure is taken off for what the machine's cores do for the attack.
    """
    system = Autoembed("defaults", lanes=1)
    system.create(server, db)
    with neighbours.honest_tenant(server, db) as honest, system.running(server, db) as lanes:
        system.enable(honest, enqueue_existing=False)
        alone = _insert_steadily(honest, NEIGHBOURS_ROWS_PER_SECOND, sizes.freshness_seconds)
        _wait_for_the_last(db, sizes)
        pids = lanes.pids()
        with neighbours.attacking(server, db, attack):
            beside = _insert_steadily(honest, NEIGHBOURS_ROWS_PER_SECOND, sizes.freshness_seconds)
            _wait_for_the_last(db, sizes)
            lost = set(pids) - set(lanes.pids())
    figures = {f"alone_{name}": value for name, value in _freshness(db, alone, sizes).items()}
    return Measured({**_freshness(db, beside, sizes), **figures, "lanes_lost": len(lost)})


def beside(server: Server, db: Connection, system: Autoembed, sizes: Sizes) -> Measured:
    """What vectors beside the rows cost the application, and vectors in them."""
    return Measured(vectors_beside.measure(server, db, system, sizes.rows_without_index, sizes.rows))


def quality(server: Server, db: Connection, system: Autoembed, sizes: Sizes) -> Measured:
    """How well search() answers questions, by mode."""
    return Measured(search_quality.measure(server, db, system))


def recall(server: Server, db: Connection, system: Autoembed, sizes: Sizes) -> Measured:
    """How many of the nearest rows search() finds, whatever is left out."""
    return Measured(search_recall.measure(server, db, system))


def search_speed(server: Server, db: Connection, system: Autoembed, sizes: Sizes) -> Measured:
    """How long search() takes, by mode, over SQL alone."""
    return Measured(speed_of_search.measure(server, db, system, sizes.search_rows))


def text_leg(server: Server, db: Connection, system: Autoembed, sizes: Sizes) -> Measured:
    """How search() by words does beside an index of pg_textsearch."""
    return Measured(search_by_words.measure(server, db, system, sizes.search_rows))


def fresh_when_idle(server: Server, db: Connection, system: System, sizes: Sizes) -> Measured:
    """Single INSERTs, each after the one before has its vector and after a pause that no clock of a worker knows."""
    pause = random.Random(1)
    system.attach(server, db)
    documents.load(db, 1)
    with _warm(server, db, system):
        inserted: list[_Inserted] = []
        end = time.monotonic() + sizes.freshness_seconds
        while time.monotonic() < end:
            time.sleep(pause.uniform(0, 0.3))
            inserted.append(_insert_one(db, len(inserted) + 2))
            wait_until(lambda: documents.missing(db) == 0, 60)
    return Measured(_freshness(db, inserted, sizes))


def fresh_when_steady(server: Server, db: Connection, system: System, sizes: Sizes) -> Measured:
    """Single INSERTs at 50 rows a second."""
    system.attach(server, db)
    documents.load(db, 1)
    with _warm(server, db, system):
        inserted = _insert_steadily(db, 50, sizes.freshness_seconds)
        _wait_for_the_last(db, sizes)
    return Measured(_freshness(db, inserted, sizes))


def fresh_during_backfill(server: Server, db: Connection, system: System, sizes: Sizes) -> Measured:
    """Single INSERTs while many older rows are embedded: those that a table had before, where a system knows such."""
    return _fresh_beside_many(server, db, system, sizes, system.older_rows(db))


def fresh_behind_a_backlog(server: Server, db: Connection, system: System, sizes: Sizes) -> Measured:
    """Single INSERTs behind one of many rows."""
    return _fresh_beside_many(server, db, system, sizes, nullcontext())


def cost(server: Server, db: Connection, system: System, sizes: Sizes) -> Measured:
    """The time of an application's statements with triggers and without; nothing embeds meanwhile.

    Each single-row statement runs on both tables, one right after the other: the machine is as fast for the one as for
    the other. Those of many rows run twice on each, so that each table comes first as often.
    """
    db.execute("CREATE TABLE plain (LIKE documents INCLUDING ALL)")
    system.attach(server, db)
    documents.load(db, sizes.cost_rows)
    singles = list(documents.texts(SINGLE_ROWS))
    rounds: list[dict[tuple[str, str], float]] = []
    tables = ["plain", "documents"]

    def run(what: str, table: str, statement: str, *arguments: object) -> None:
        began = time.perf_counter()
        db.execute(statement.format(table=table), arguments, prepare=True)
        rounds[-1][what, table] += time.perf_counter() - began

    def run_on_both(what: str, statement: str, *arguments: object) -> None:
        tables.reverse()
        for table in tables:
            run(what, table, statement, *arguments)

    for _ in range(1 + sizes.cost_rounds):
        rounds.append(defaultdict(float))
        for table in ("plain", "documents", "documents", "plain"):
            db.execute(f"TRUNCATE {table}")
            run("insert", table, "INSERT INTO {table} (title, content) SELECT title, content FROM source ORDER BY id")
            run("update_other", table, "UPDATE {table} SET created_at = now()")
        db.execute("TRUNCATE plain, documents RESTART IDENTITY")
        with db.transaction():
            for _, title, content in singles:
                run_on_both("insert_single", "INSERT INTO {table} (title, content) VALUES (%s, %s)", title, content)
        with db.transaction():
            for number, _, _ in singles:
                run_on_both("update_other_single", "UPDATE {table} SET created_at = now() WHERE id = %s", number)
    del rounds[0]  # which pays for caches
    figures: Figures = {}
    for what in ("insert", "insert_single", "update_other", "update_other_single"):
        ours, plain = ([a_round[what, table] for a_round in rounds] for table in ("documents", "plain"))
        figures[f"{what}_ratio"] = statistics.median(ours) / statistics.median(plain)
        figures[f"{what}_seconds"] = statistics.median(ours)
        figures[f"{what}_plain_seconds"] = statistics.median(plain)
    return Measured(figures)


def idle(server: Server, db: Connection, system: System, sizes: Sizes) -> Measured:
    """A system that has nothing to do."""
    system.attach(server, db)
    documents.load(db, 1)
    with _warm(server, db, system) as workers:
        # The work that autovacuum and the checkpointer would do meanwhile.
        db.execute("ALTER SYSTEM SET autovacuum = off")
        db.execute("SELECT pg_reload_conf()")
        db.execute("VACUUM ANALYZE")
        db.execute("CHECKPOINT")
        # The first look prunes catalogs, sessions report what they wrote within ten seconds, and the server notes its
        # running transactions within fifteen.
        _written(server, db)
        time.sleep(16)
        written = _written(server, db)
        before, worker_cpu_seconds = Usage.of(db), workers.cpu_seconds()
        lane_cpu_percent = measure.lane_cpu_percent(db, sizes.idle_seconds)
        used, worker_cpu_seconds = Usage.of(db) - before, workers.cpu_seconds() - worker_cpu_seconds
        grown = {figure: value - written[figure] for figure, value in _written(server, db).items()}
        private_bytes = workers.private_bytes()
    figures = {
        "postgres_cpu_percent": 100 * used.cpu_seconds / sizes.idle_seconds,
        "worker_cpu_percent": 100 * worker_cpu_seconds / sizes.idle_seconds,
        "lane_cpu_percent": lane_cpu_percent,
        "wal_bytes": used.wal_bytes,
        **grown,
        "private_bytes": private_bytes,
    }
    return Measured(figures)


def _written(server: Server, db: Connection) -> Figures:
    [(rows,)] = db.execute("SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables")
    [(table_bytes,)] = db.execute("SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r'")
    return {"rows_written": int(rows), "growth_bytes": int(table_bytes) + log_bytes(server)}


def _end_over_start(seconds: list[float]) -> float:
    """Rows per second of the last three tenths of the rows over those of the first, but for one at each end.

    A start warms up and an end runs dry; and parts must be long beside a lane's passes, of five seconds each.
    """
    tenth = len(seconds) // 10
    start = seconds[4 * tenth - 1] - seconds[tenth - 1]
    end = seconds[9 * tenth - 1] - seconds[6 * tenth - 1]
    return start / end


def _curve(seconds: list[float]) -> list[tuple[float, int]]:
    """Enough points to draw."""
    step = max(1, len(seconds) // CURVE_POINTS)
    rows = [*range(step, len(seconds), step), len(seconds)]
    return [(round(seconds[row - 1], 4), row) for row in rows]


@contextmanager
def _warm(server: Server, db: Connection, system: System) -> Iterator[Workers]:
    """A system that has embedded its first row."""
    with system.running(server, db) as workers:
        documents.insert(db, 1)
        wait_until(lambda: documents.missing(db) == 0, 60)
        yield workers


@dataclass(frozen=True)
class _Inserted:
    id: int
    transaction: str


def _insert_one(db: Connection, number: int) -> _Inserted:
    [(_, title, content)] = documents.texts(1, first=10_000_000 + number)
    statement = "INSERT INTO documents (title, content) VALUES (%s, %s) RETURNING id, xmin::text"
    [row] = db.execute(statement, (title, content))
    return _Inserted(*row)


def _insert_steadily(db: Connection, rows_per_second: float, seconds: float) -> list[_Inserted]:
    inserted = []
    began = time.monotonic()
    for number in range(int(rows_per_second * seconds)):
        time.sleep(max(0.0, began + number / rows_per_second - time.monotonic()))
        inserted.append(_insert_one(db, number))
    return inserted


def _fresh_beside_many(
    server: Server, db: Connection, system: System, sizes: Sizes, how: AbstractContextManager[None]
) -> Measured:
    system.attach(server, db)
    documents.load(db, sizes.backfill_rows + 1)
    with _warm(server, db, system):
        with how:
            documents.insert(db, sizes.backfill_rows, first=2)
        inserted = _insert_steadily(db, BACKFILL_ROWS_PER_SECOND, sizes.freshness_seconds)
        _wait_for_the_last(db, sizes)
        waiting = documents.missing(db)
    return Measured({**_freshness(db, inserted, sizes), "rows_waiting_at_the_end": waiting})


def _wait_for_the_last(db: Connection, sizes: Sizes) -> None:
    end = time.monotonic() + sizes.grace_seconds
    wait_until(lambda: documents.missing(db) == 0 or time.monotonic() > end, math.inf, pause_seconds=0.5)


def _freshness(db: Connection, inserted: list[_Inserted], sizes: Sizes) -> Figures:
    """From COMMIT to vector visible, less the API's time for one input; infinite for a row without a vector."""
    rows = db.execute(
        "SELECT CASE WHEN d.embedding IS NOT NULL THEN extract(epoch FROM"
        " pg_xact_commit_timestamp(d.xmin) - pg_xact_commit_timestamp(i.transaction::xid))::float8 END"
        " FROM unnest(%s::int[], %s::text[]) AS i (id, transaction) JOIN documents AS d USING (id)",
        ([row.id for row in inserted], [row.transaction for row in inserted]),
    )
    lags = [math.inf if lag is None else lag - sizes.request_seconds - sizes.input_seconds for (lag,) in rows]
    return {
        "inserted": len(lags),
        "p50_seconds": measure.percentile(lags, 50),
        "p99_seconds": measure.percentile(lags, 99),
        "worst_seconds": max(lags),
    }
