"""Random work on a table, lanes killed, a provider that fails in every way; then peace, and the promises must hold.

Short in `make test`; `make chaos MINUTES=60` goes on for as long as asked and prints what it did, with the seed.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fake_api import embedding_of
from harness import Connection, Server, is_settled
from lanes import Lane, stop_lanes
from waiting import soon, wait_until

TABLE = "CREATE TABLE notes (id integer PRIMARY KEY, content text, embedding halfvec(1536))"
ATTACHED = {
    "by enable()": "SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}')",
    "by a trigger": """
        CREATE FUNCTION note_text(note notes) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT note.content';
        CREATE TRIGGER embed AFTER INSERT OR UPDATE ON notes FOR EACH ROW
        EXECUTE FUNCTION autoembed.queue_embeddings('note_text', 'embedding');
    """,
}

POISON = {"status": 400, "match": "poison", "times": "forever"}
FAULTS: list[dict[str, Any]] = [
    {"status": 500},
    {"status": 503, "retry_after": 1},
    {"status": 429, "retry_after": 1},
    {"status": 401},
    {"close": True},
    {"cut_off": True},
    {"not_json": True},
    {"wrong_count": True},
    {"duplicate_index": True},
    {"redirect": "http://127.0.0.1:8000/elsewhere"},
]
# Answers that are paid for and of no use.
PAID_FAULTS = ("cut_off", "not_json", "wrong_count", "duplicate_index")

keys = st.integers(1, 12)
# Rows that nothing else changes, which would hide a stale vector.
keys_of_overtaken = st.integers(13, 24)
contents = st.one_of(st.sampled_from(["same", "same too", "", "  ", "poison"]), st.uuids(version=4).map(str), st.none())
operations = st.one_of(
    st.tuples(st.just("upsert"), keys, contents),
    st.tuples(st.just("touch"), keys, st.none()),
    st.tuples(st.just("delete"), keys, st.none()),
    st.tuples(st.just("move"), keys, keys),
)

SQL = {
    "upsert": "INSERT INTO notes VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET content = excluded.content",
    "touch": "UPDATE notes SET content = content WHERE id = %s",
    "delete": "DELETE FROM notes WHERE id = %s",
    "move": "UPDATE notes SET id = %s + 100 WHERE id = %s",
}


class Chaos(RuleBasedStateMachine):
    """One example: a fresh database, some lanes, and an hour of bad luck."""

    server: Server
    template: str
    attached: str
    did: Counter[str] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        name = f"chaos_{uuid.uuid4().hex[:12]}"
        self.stack.enter_context(self.server.database(name, self.template))
        self.name = name
        self.db = self._connect()
        self.api = self.server.fake_api(name)
        self.db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [self.api.base_url])
        self.db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
        self.db.execute(TABLE)
        self.db.execute(ATTACHED[self.attached].encode())
        self.lanes: list[Lane] = []
        # Texts that may be paid for: changes committed, and what was claimed by a lane at its end or rolled back.
        self.changes = 0
        self.excused = 0
        self.api.behave(faults=[POISON], delay_seconds=0.01)

    def _connect(self) -> Connection:
        return self.stack.enter_context(self.server.connect(self.name))

    def _apply(self, operation: tuple[str, Any, Any]) -> None:
        kind, first, second = operation
        arguments = {"upsert": (first, second), "move": (second, first)}.get(kind, (first,))
        self.db.execute(SQL[kind], arguments)
        self.did["operations"] += 1
        self.changes += kind in ("upsert", "move")

    @rule(operation=operations)
    def one(self, operation: tuple[str, Any, Any]) -> None:
        with self.db.transaction():
            self.db.execute("DELETE FROM notes WHERE id > 100")
            self._apply(operation)

    @rule(batch=st.lists(st.tuples(operations, st.booleans()), min_size=2, max_size=8), rolled_back=st.booleans())
    def transaction(self, batch: list[tuple[tuple[str, Any, Any], bool]], rolled_back: bool) -> None:
        with self.db.transaction(force_rollback=rolled_back):
            for operation, undone in batch:
                with self.db.transaction(force_rollback=undone):
                    self.db.execute("DELETE FROM notes WHERE id > 100")
                    self._apply(operation)

    @rule()
    def truncate(self) -> None:
        self.db.execute("TRUNCATE notes")
        self.did["operations"] += 1

    @rule(faults=st.lists(st.sampled_from(FAULTS), max_size=4), delay=st.sampled_from([0.0, 0.01, 0.2]))
    def trouble(self, faults: list[dict[str, Any]], delay: float) -> None:
        self.api.behave(faults=[POISON, *faults], delay_seconds=delay)
        self.did["faults"] += len(faults)
        # A request that meets one of them has at most every row.
        self.excused += 14 * sum(any(kind in fault for kind in PAID_FAULTS) for fault in faults)

    @precondition(lambda self: len(self.lanes) < 3)
    @rule()
    def start_lane(self) -> None:
        lane = Lane(self._connect(), "batch_size => 3, max_requests => 2")
        lane.wait_until_up(self.db)
        self.lanes.append(lane)
        self.did["lanes"] += 1

    @precondition(lambda self: self.lanes)
    @rule(pick=st.randoms(use_true_random=False), signal=st.sampled_from(["pg_terminate_backend", "pg_cancel_backend"]))
    def kill_lane(self, pick: random.Random, signal: str) -> None:
        lane = self.lanes.pop(pick.randrange(len(self.lanes)))
        self.db.execute(f"SELECT {signal}(%s)", [lane.pid])
        lane.join()
        self.excused += 6
        self.did["kills"] += 1

    @rule(key=keys_of_overtaken, old=st.uuids(version=4).map(str), new=st.uuids(version=4).map(str))
    def overtake(self, key: int, old: str, new: str) -> None:
        """A row changes while its text is in flight, and the older answer comes last."""
        while len(self.lanes) < 2:
            self.start_lane()
        self.api.behave(faults=[POISON], hold=old)
        self.db.execute("SELECT autoembed.resume_model('text-embedding-3-small')")
        self._apply(("upsert", key, old))
        # A request that fails just now rests the model again.
        if soon(lambda: self.api.counters()["held"] > 0, 1):
            self._apply(("upsert", key, new))
            self.did["overtaken"] += bool(soon(lambda: self._embedded(key, new), 1))
        self.api.release()

    def _embedded(self, key: int, content: str) -> bool:
        row = self.db.execute("SELECT embedding::vector::real[] AS v FROM notes WHERE id = %s", [key]).fetchone()
        return row is not None and row.v is not None and bool(abs(embedding_of(content) - row.v).max() < 1e-3)

    @rule(rolled_back=st.booleans())
    def process(self, rolled_back: bool) -> None:
        with self.db.transaction(force_rollback=rolled_back):
            row = self.db.execute("SELECT read FROM autoembed.process(batch_size => 4, max_requests => 2)").fetchone()
            assert row is not None
            self.excused += row.read if rolled_back else 0
        self.did["passes"] += 1

    @invariant()
    def no_lane_has_broken(self) -> None:
        assert [lane.error for lane in self.lanes if lane.error] == []

    def teardown(self) -> None:
        try:
            self._make_peace()
            self._check()
        finally:
            for lane in self.lanes:
                self.db.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
                lane.join()
            self.stack.close()

    def _make_peace(self) -> None:
        self.api.behave(faults=[POISON])
        self.db.execute("SELECT autoembed.resume_model('text-embedding-3-small')")
        self.start_lane()
        wait_until(lambda: is_settled(self.db), 140)
        stop_lanes(self.db)
        for lane in self.lanes:
            lane.join()
        self.no_lane_has_broken()
        self.lanes.clear()

    def _check(self) -> None:
        stale, poisoned, existing = [], set(), set()
        for row in self.db.execute(
            "SELECT id, coalesce(content, '') AS content, embedding::vector::real[] AS v FROM notes"
        ):
            existing.add(f"[{row.id}]")
            if "poison" in row.content:
                poisoned.add(f"[{row.id}]")
                continue
            expected = embedding_of(row.content) if row.content.strip() else None
            if (row.v is None) != (expected is None) or (expected is not None and abs(expected - row.v).max() > 1e-3):
                stale.append((row.id, row.content))
        assert stale == []
        failed = {row.key for row in self.db.execute("SELECT key FROM autoembed.failed")}
        assert failed & existing == poisoned
        paid = sum(len(request["texts"] or []) for request in self.api.log() if request["status"] == 200)
        probes = sum(request["texts"] == ["autoembed"] for request in self.api.log())
        assert paid <= self.changes + self.excused + probes
        self.did["examples"] += 1


def run(server: Server, template: str, attached: str, number: int, examples: int, steps: int) -> None:
    Chaos.server, Chaos.template, Chaos.attached = server, template, attached
    run_state_machine_as_test(
        seed(number)(Chaos),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("attached", ATTACHED)
def test_after_any_trouble_every_row_is_fresh_and_nothing_was_paid_twice(
    server: Server, template: str, attached: str, request: pytest.FixtureRequest
) -> None:
    """Without the write guard a row keeps the vector of an older text.

    If jobs of dead or cancelled lanes are not given back, or trouble counts as a try, some never come to an end.
    """
    minutes = request.config.getoption("--chaos-minutes")
    if not minutes:
        run(server, template, attached, random.randrange(1 << 32), examples=4, steps=25)
        return
    end = time.monotonic() + 60 * minutes / len(ATTACHED)
    while time.monotonic() < end:
        number = random.randrange(1 << 32)
        print(f"\nattached {attached}, seed {number}: ", end="", flush=True)  # noqa: T201
        run(server, template, attached, number, examples=10, steps=60)
        print(f"{dict(Chaos.did)}, violations: 0", end="", flush=True)  # noqa: T201
