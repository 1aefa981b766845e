"""Random work on two tables, lanes killed, a provider that fails in every way, and a hostile tenant beside them.

One table has its vectors in its rows, the other beside them, in chunks. Then comes peace, and the promises must hold.

Short in `make test`, without that tenant. `make chaos MINUTES=60` goes on for as long as asked, and prints what it did,
with the seed.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter, defaultdict
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from extension.hostile.attacks import ATTACKS
from extension.hostile.tenants import DIMENSIONS, Tenant, waiting_of
from fake_api import embedding_of
from harness import PASSWORD, Connection, Server, is_settled
from lanes import Lane, stop_lanes
from waiting import soon, wait_until

MODEL = "text-embedding-3-small"
NOTES = "CREATE TABLE notes (id integer PRIMARY KEY, content text, embedding halfvec(1536))"
ATTACHED = {
    "by enable()": f"SELECT autoembed.enable('notes', 'embedding', content_columns => '{{content}}',"
    f" model => '{MODEL}')",
    "by a trigger": f"""
        CREATE FUNCTION note_text(note notes) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT note.content';
        CREATE TRIGGER embed AFTER INSERT OR UPDATE ON notes FOR EACH ROW
        EXECUTE FUNCTION autoembed.queue_embeddings('note_text', 'embedding');
        SELECT autoembed.alter_pipeline('notes', model => '{MODEL}');
    """,
}
PAGES = f"""
    CREATE TABLE pages (id integer PRIMARY KEY, content text);
    SELECT autoembed.enable('pages', content_columns => '{{content}}', model => '{MODEL}', chunk_size => 32);
"""
# The columns with a vector, in the order of the text.
CHUNKS = {
    "notes": "SELECT id, 0 AS first, length(content) AS last, embedding::vector::real[] AS v FROM notes"
    " WHERE embedding IS NOT NULL",
    "pages": "SELECT id, chunk_start AS first, chunk_end AS last, embedding::vector::real[] AS v"
    " FROM pages_embeddings ORDER BY id, chunk_number",
}
COUNT_CHUNKS = f"SELECT count(*) AS chunks FROM autoembed.chunk_text(%s, chunk_size => 32, model => '{MODEL}')"
# The length of the longest text.
MOST_CHUNKS = 40

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
tables = st.sampled_from(list(CHUNKS))
words = st.uuids(version=4).map(str)
long_texts = st.lists(words, min_size=4, max_size=8).map("\n\n".join)
contents = st.one_of(st.sampled_from(["same", "same too", "", "  ", "poison"]), words, long_texts, st.none())
operations = st.one_of(
    st.tuples(st.just("upsert"), tables, keys, contents),
    st.tuples(st.just("touch"), tables, keys, st.none()),
    st.tuples(st.just("delete"), tables, keys, st.none()),
    st.tuples(st.just("move"), tables, keys, keys),
)
Operation = tuple[str, str, Any, Any]

SQL = {
    "upsert": "INSERT INTO {table} VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET content = excluded.content",
    "touch": "UPDATE {table} SET content = content WHERE id = %s",
    "delete": "DELETE FROM {table} WHERE id = %s",
    "move": "UPDATE {table} SET id = %s + 100 WHERE id = %s",
}


class Chaos(RuleBasedStateMachine):
    """One example: a fresh database, some lanes, and an hour of bad luck."""

    server: Server
    template: str
    attached: str
    with_attacks: bool
    did: Counter[str] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        name = f"chaos_{uuid.uuid4().hex[:12]}"
        self.hostile = f"hostile_{name}"
        self.stack.callback(self._drop_hostile_role)
        self.stack.enter_context(self.server.database(name, self.template))
        self.name = name
        self.db = self._connect()
        self.api = self.server.fake_api(name)
        self.db.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, self.api.base_url])
        self.db.execute("SELECT autoembed.set_default_model(%s)", [MODEL])
        for script in (NOTES, ATTACHED[self.attached], PAGES):
            self.db.execute(script.encode())
        # That of the hostile tenant, which is asked for nothing here.
        self.db.execute("SELECT autoembed.create_model('fast', 'fake', %s)", [DIMENSIONS])
        self.db.execute("SELECT autoembed.set_default_model('fast')")
        self.lanes: list[Lane] = []
        # Texts that may be paid for: changes committed, and what was claimed by a lane at its end or rolled back.
        self.changes = 0
        self.excused = 0
        self.api.behave(faults=[POISON], delay_seconds=0.01)

    def _connect(self, user: str = "postgres") -> Connection:
        return self.stack.enter_context(self.server.connect(self.name, user=user))

    def _drop_hostile_role(self) -> None:
        with self.server.connect() as db:
            db.execute(f"DROP ROLE IF EXISTS {self.hostile}")

    @initialize(attack=st.sampled_from(list(ATTACKS)))
    def let_a_tenant_attack(self, attack: str) -> None:
        self.attack = self.stack.enter_context(ExitStack())
        if not self.with_attacks:
            return
        self.db.execute(
            f"CREATE ROLE {self.hostile} LOGIN PASSWORD '{PASSWORD}';"
            f"CREATE SCHEMA {self.hostile} AUTHORIZATION {self.hostile}"
        )
        self.db.execute("SELECT autoembed.grant_usage(%s)", [self.hostile])
        tenant = Tenant(self.hostile, self._connect(self.hostile), lambda: self._connect(self.hostile))
        hung = self.server.fake_api(f"{self.name}_hung")
        hung.behave(hold=True)
        self.stack.callback(hung.release)
        superuser = self._connect()
        self.attack.enter_context(ATTACKS[attack].going_on(superuser, tenant, hung.base_url))
        self.did[attack] += 1

    def _apply(self, operation: Operation) -> None:
        kind, table, first, second = operation
        if kind in ("upsert", "move"):
            self.changes += self._texts_of(table, second if kind == "upsert" else self._content_of(table, first))
        arguments = {"upsert": (first, second), "move": (second, first)}.get(kind, (first,))
        self.db.execute(SQL[kind].format(table=table).encode(), arguments)
        self.did["operations"] += 1

    def _texts_of(self, table: str, content: str | None) -> int:
        """How many texts are sent for a row."""
        if table == "notes" or not content:
            return 1
        row = self.db.execute(COUNT_CHUNKS.encode(), [content]).fetchone()
        assert row is not None
        assert row.chunks <= MOST_CHUNKS
        return int(row.chunks)

    def _content_of(self, table: str, key: int) -> str | None:
        row = self.db.execute(f"SELECT content FROM {table} WHERE id = %s".encode(), [key]).fetchone()
        return row and row.content

    @rule(operation=operations)
    def one(self, operation: Operation) -> None:
        with self.db.transaction():
            self._delete_moved()
            self._apply(operation)

    def _delete_moved(self) -> None:
        self.db.execute("DELETE FROM notes WHERE id > 100; DELETE FROM pages WHERE id > 100")

    @rule(batch=st.lists(st.tuples(operations, st.booleans()), min_size=2, max_size=8), rolled_back=st.booleans())
    def transaction(self, batch: list[tuple[Operation, bool]], rolled_back: bool) -> None:
        with self.db.transaction(force_rollback=rolled_back):
            for operation, undone in batch:
                with self.db.transaction(force_rollback=undone):
                    self._delete_moved()
                    self._apply(operation)

    @rule(table=tables)
    def truncate(self, table: str) -> None:
        self.db.execute(f"TRUNCATE {table}".encode())
        self.did["operations"] += 1

    @rule(faults=st.lists(st.sampled_from(FAULTS), max_size=4), delay=st.sampled_from([0.0, 0.01, 0.2]))
    def trouble(self, faults: list[dict[str, Any]], delay: float) -> None:
        self.api.behave(faults=[POISON, *faults], delay_seconds=delay)
        self.did["faults"] += len(faults)
        # A request that meets one of them has at most every row.
        self.excused += 14 * MOST_CHUNKS * sum(any(kind in fault for kind in PAID_FAULTS) for fault in faults)

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

        def ends() -> bool:
            # The tenant's code may catch a cancel.
            self.db.execute(f"SELECT {signal}(%s)", [lane.pid])
            return lane.has_ended(0.5)

        wait_until(ends)
        self.excused += 6 * MOST_CHUNKS
        self.did["kills"] += 1

    @rule(table=tables, key=keys_of_overtaken, old=words, new=words)
    def overtake(self, table: str, key: int, old: str, new: str) -> None:
        """A row changes while its text is in flight, and the older answer comes last."""
        while len(self.lanes) < 2:
            self.start_lane()
        self.api.behave(faults=[POISON], hold=old)
        self.db.execute("SELECT autoembed.resume_model(%s)", [MODEL])
        self._apply(("upsert", table, key, old))
        # A request that fails just now rests the model again.
        if soon(lambda: self.api.counters()["held"] > 0, 1):
            self._apply(("upsert", table, key, new))
            self.did["overtaken"] += bool(soon(lambda: is_fresh(new, self._chunks(table)[key]), 1))
        self.api.release()

    def _chunks(self, table: str) -> dict[int, list[Any]]:
        """The texts that have a vector, by row."""
        found: dict[int, list[Any]] = defaultdict(list)
        for chunk in self.db.execute(CHUNKS[table].encode()):
            found[chunk.id].append(chunk)
        return found

    @rule(rolled_back=st.booleans())
    def process(self, rolled_back: bool) -> None:
        with self.db.transaction(force_rollback=rolled_back):
            row = self.db.execute("SELECT read FROM autoembed.process(4, 2, timeout_milliseconds => 2000)").fetchone()
            assert row is not None
            self.excused += MOST_CHUNKS * row.read if rolled_back else 0
        self.did["passes"] += 1

    @invariant()
    def no_lane_has_broken(self) -> None:
        broken = [str(lane.error) for lane in self.lanes if lane.error]
        assert not broken, "\n".join(broken)

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
        self.db.execute("SELECT autoembed.resume_model(%s)", [MODEL])
        self.start_lane()
        # The hostile tenant's messages are still there.
        self.attack.close()
        owner = Tenant("postgres", self.db, self._connect)
        wait_until(lambda: waiting_of(self.db, owner) == 0, 140)
        self.db.execute(f"DROP SCHEMA IF EXISTS {self.hostile} CASCADE")
        wait_until(lambda: is_settled(self.db), 60)
        stop_lanes(self.db)
        for lane in self.lanes:
            lane.join()
        self.no_lane_has_broken()
        self.lanes.clear()

    def _check(self) -> None:
        for table in CHUNKS:
            self._check_table(table)
        paid = sum(len(request["texts"] or []) for request in self.api.log() if request["status"] == 200)
        probes = sum(request["texts"] == ["autoembed"] for request in self.api.log())
        assert paid <= self.changes + self.excused + probes
        self.did["examples"] += 1

    def _check_table(self, table: str) -> None:
        rows = {row.id: row.content or "" for row in self.db.execute(f"SELECT id, content FROM {table}".encode())}
        poisoned = {key for key, content in rows.items() if "poison" in content}
        chunks = self._chunks(table)
        stale = [row for row in rows.items() if row[0] not in poisoned and not is_fresh(row[1], chunks[row[0]])]
        assert stale == []
        assert chunks.keys() <= rows.keys()
        failed = self.db.execute("SELECT key FROM autoembed.failed WHERE table_name::regclass = %s::regclass", [table])
        existing = {f"[{key}]" for key in rows}
        assert {row.key for row in failed} & existing == {f"[{key}]" for key in poisoned}


def is_fresh(content: str, chunks: list[Any]) -> bool:
    """Whether these are all chunks of a text, each with the vector of what it says."""
    pieces = [content[chunk.first : chunk.last] for chunk in chunks]
    whole = "".join("".join(pieces).split()) == "".join(content.split())
    vectors = all(abs(embedding_of(piece) - chunk.v).max() < 2e-3 for piece, chunk in zip(pieces, chunks, strict=True))
    return bool(chunks) == bool(content.strip()) and whole and vectors


def run(
    server: Server, template: str, attached: str, number: int, examples: int, steps: int, *, with_attacks: bool
) -> None:
    Chaos.server, Chaos.template, Chaos.attached, Chaos.with_attacks = server, template, attached, with_attacks
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
        run(server, template, attached, random.randrange(1 << 32), examples=4, steps=25, with_attacks=False)
        return
    end = time.monotonic() + 60 * minutes / len(ATTACHED)
    while time.monotonic() < end:
        number = random.randrange(1 << 32)
        print(f"\nattached {attached}, seed {number}: ", end="", flush=True)  # noqa: T201
        run(server, template, attached, number, examples=10, steps=60, with_attacks=True)
        print(f"{dict(Chaos.did)}, violations: 0", end="", flush=True)  # noqa: T201
