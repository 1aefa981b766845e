"""Lanes: what holds while they run beside an application and beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from fake_api import FakeApi
from harness import GUIDE_TRIGGERS, Connection, Server, assert_fresh, insert, is_settled, stored, waiting
from lanes import Lane, running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]


def test_a_lane_embeds_what_waits_and_what_comes(documents: Connection, api: FakeApi, connect: Connect) -> None:
    """If a lane ends when it finds nothing to do, what comes later waits."""
    insert(documents, "before")
    with running_lanes(documents, connect):
        wait_until(lambda: is_settled(documents))
        insert(documents, "during")
        wait_until(lambda: is_settled(documents))

    assert_fresh(documents)
    assert api.texts() == ["# t\n\nbefore", "# t\n\nduring"]


def test_a_lane_ends_by_itself_when_its_time_is_up(db: Connection) -> None:
    """Without the look at the clock the call never returns; without signing off its lane stays on the list."""
    db.execute("CALL autoembed.work(run_seconds => 0.3)")

    assert db.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (0,)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_lane_reads_what_is_committed_whatever_the_sessions_default(
    documents: Connection, connect: Connect, level: str
) -> None:
    """At another level a row that somebody changes meanwhile ends the lane, or takes back what it has written."""
    documents.execute("""
        CREATE TABLE seen (level text);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $plpgsql$
        BEGIN
            INSERT INTO public.seen VALUES (current_setting('transaction_isolation'));
            RETURN NULL;
        END $plpgsql$;
        CREATE TRIGGER note AFTER UPDATE OF embedding ON documents EXECUTE FUNCTION note();
    """)
    insert(documents, "a text")
    session = connect()
    session.execute(f"SET default_transaction_isolation = '{level}'".encode())
    lane = Lane(session)
    wait_until(lambda: is_settled(documents))
    documents.execute("SELECT autoembed.unschedule()")
    lane.join()

    assert documents.execute("SELECT level FROM seen").fetchall() == [("read committed",)]
    assert session.execute("SHOW default_transaction_isolation").fetchone() == (level,)


def test_a_lanes_memory_does_not_grow_with_its_requests(documents: Connection, connect: Connect) -> None:
    """Memory that a statement leaves behind stays until the lane ends: COPY leaves 2 kB each time."""
    documents.execute("""
        CREATE TABLE memory (id integer GENERATED ALWAYS AS IDENTITY, used_bytes bigint);
        CREATE FUNCTION note_memory() RETURNS trigger LANGUAGE plpgsql AS $plpgsql$
        BEGIN
            INSERT INTO public.memory (used_bytes)
            -- But for the buffers of temporary tables, which have a size of their own.
            SELECT sum(used_bytes) FROM pg_backend_memory_contexts WHERE name <> 'LocalBufferContext';
            RETURN NULL;
        END $plpgsql$;
        CREATE TRIGGER note_memory AFTER UPDATE OF embedding ON documents EXECUTE FUNCTION note_memory();
    """)
    insert(documents, *(f"text {number}" for number in range(300)))

    with running_lanes(documents, connect, arguments="batch_size => 1"):
        wait_until(lambda: is_settled(documents))

    used_bytes = [used for (used,) in documents.execute("SELECT used_bytes FROM memory ORDER BY id")]
    assert len(used_bytes) == 300
    # Now and then other work takes more for a moment.
    assert min(used_bytes[200:]) - max(used_bytes[:100]) < 50_000


def test_unschedule_ends_running_lanes(documents: Connection, connect: Connect) -> None:
    """If a lane does not ask whether it is wanted, it runs on until its time is up."""
    lane = Lane(connect())
    wait_until(lambda: documents.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (1,))

    documents.execute("SELECT autoembed.unschedule()")

    lane.join(5)
    assert lane.error is None


def test_dropping_the_extension_ends_running_lanes_without_an_error(documents: Connection, connect: Connect) -> None:
    """If the lane does not ask whether the extension is still there, it ends with an error."""
    lane = Lane(connect())
    wait_until(lambda: documents.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (1,))

    documents.execute("DROP EXTENSION autoembed CASCADE")

    lane.join(5)
    assert lane.error is None


@pytest.mark.parametrize(
    "beginning",
    ["_claim(100, 60, '{}', '{}', '{}')", "_next_backfill(false, '{}', '{}')", "_lane_is_wanted()", "_gate()"],
)
def test_a_lanes_transaction_locks_the_table_of_lanes_first(
    documents: Connection, connect: Connect, beginning: str
) -> None:
    """DROP EXTENSION does, too, so neither waits for the other while it holds what that wants."""
    insert(documents, "text")
    lane = connect()
    locks = (
        "SELECT relation::regclass::text, granted FROM pg_locks JOIN pg_class AS c ON c.oid = relation"
        " WHERE pid = %s AND relkind = 'r' AND relnamespace IN ('autoembed'::regnamespace, 'pgmq'::regnamespace)"
    )
    with ThreadPoolExecutor() as pool, documents.transaction():
        documents.execute("LOCK TABLE autoembed.lane IN ACCESS EXCLUSIVE MODE")
        call = pool.submit(lane.execute, f"SELECT autoembed.{beginning}")
        wait_until(
            lambda: documents.execute(f"{locks} AND NOT granted", [lane.info.backend_pid]).fetchone() is not None
        )
        assert documents.execute(locks, [lane.info.backend_pid]).fetchall() == [("autoembed.lane", False)]
    call.result()


def test_dropping_the_extension_never_deadlocks_with_busy_lanes(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """Without the gate, DROP and the lanes lock our tables in different orders, and one of them ends as the victim."""
    for _ in range(4):
        documents.execute(
            "INSERT INTO documents (title, content) SELECT 't', 'c' || n FROM generate_series(1, 500) AS n"
        )
        lanes = [Lane(connect(), "batch_size => 2, max_requests => 4") for _ in range(2)]
        before = api.counters()["requests"]
        api.wait_for(requests=before + 10)

        documents.execute("DROP EXTENSION autoembed CASCADE")

        for lane in lanes:
            lane.join(10)
        assert [lane.error for lane in lanes] == [None, None]
        documents.execute("CREATE EXTENSION autoembed")
        documents.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
        documents.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
        documents.execute(GUIDE_TRIGGERS)


def test_two_lanes_share_the_work_and_send_each_text_once(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """If a claim locks nothing, both lanes send the same texts; if requests go singly, two are in flight at most."""
    api.behave(delay_seconds=0.2)
    documents.execute("INSERT INTO documents (title, content) SELECT 't', 'c' || n FROM generate_series(1, 400) AS n")

    with running_lanes(documents, connect, 2, "batch_size => 10, max_requests => 2"):
        wait_until(lambda: is_settled(documents))

    assert_fresh(documents)
    assert api.counters()["inputs"] == 400
    assert api.counters()["max_in_flight"] > 2


def is_true(db: Connection, sql: str, *values: int) -> bool:
    return db.execute(sql.encode(), values).fetchone() == (True,)


def test_no_transaction_is_held_while_a_request_is_in_flight(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """Without the commit between two slices of waiting, the lane keeps the snapshot that it sent the text with."""
    lane_after = """
        SELECT backend_xid IS NULL AND (backend_xmin IS NULL OR backend_xmin::text::bigint > %s)
          FROM pg_stat_activity WHERE pid = %s
    """
    locks_of = "SELECT relation::regclass FROM pg_locks WHERE pid = %s AND locktype IN ('relation', 'tuple')"
    api.behave(hold=True)
    insert(documents, "one")
    with running_lanes(documents, connect) as [lane]:
        api.wait_for(held=1)
        for _ in range(5):
            [[xid]] = documents.execute("SELECT pg_current_xact_id()::xid::text::bigint").fetchall()
            wait_until(partial(is_true, documents, lane_after, xid, lane.pid))
        # A statement of the lane's own, between two slices of waiting, holds locks for its moment.
        wait_until(lambda: documents.execute(locks_of, [lane.pid]).fetchall() == [])
        assert api.counters()["held"] == 1
        api.release()
        wait_until(lambda: is_settled(documents))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE documents SET content = 'newer' WHERE id = 1",
        "DELETE FROM documents WHERE id = 1",
        "TRUNCATE documents",
        "ALTER TABLE documents ADD COLUMN note text",
        "LOCK TABLE documents IN ACCESS EXCLUSIVE MODE",
    ],
)
def test_an_application_never_waits_for_a_request_in_flight(
    documents: Connection, api: FakeApi, connect: Connect, statement: str
) -> None:
    """Without commits the lane's locks outlive its reading, and TRUNCATE, ALTER and LOCK wait for the provider.

    If a row that is gone is not settled, the queue never empties after DELETE and TRUNCATE.
    """
    api.behave(hold=True)
    insert(documents, "one", "two")
    with running_lanes(documents, connect):
        api.wait_for(held=1)
        with documents.transaction():
            documents.execute("SET LOCAL lock_timeout = '1s'")
            documents.execute(statement)
        api.release()
        wait_until(lambda: is_settled(documents))

    assert_fresh(documents)


def test_a_row_deleted_while_its_request_is_in_flight_stays_deleted(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """If a row that is gone is not settled, its job stays in the queue."""
    api.behave(hold=True)
    insert(documents, "one", "two")
    with running_lanes(documents, connect):
        api.wait_for(held=1)
        documents.execute("DELETE FROM documents WHERE id = 1")
        api.release()
        wait_until(lambda: is_settled(documents))

    assert list(stored(documents)) == [2]
    assert documents.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)


@pytest.mark.parametrize("first_to_answer", ["old", "new"])
def test_an_old_answer_never_overwrites_a_newer_text(
    documents: Connection, api: FakeApi, connect: Connect, first_to_answer: str
) -> None:
    """Two lanes, an old slow request and a newer one for the same row, in both orders.

    The guide's algorithm (select the content; call the API; UPDATE … SET embedding WHERE id; delete the job) ends
    with the vector of the old text when the old answer comes last: its UPDATE asks only for the id. Without
    `AND l.unchanged` and the look at what was written in _write_N, so does this test.
    """
    api.behave(hold=["old", "new"])
    insert(documents, "old")
    with running_lanes(documents, connect, 2):
        api.wait_for(held=1)
        documents.execute("UPDATE documents SET content = 'new' WHERE id = 1")
        api.wait_for(held=2)
        api.amend(hold="new" if first_to_answer == "old" else "old")
        wait_until(lambda: api.counters()["in_flight"] == 1)
        if first_to_answer == "new":
            wait_until(lambda: stored(documents)[1])
        else:
            wait_until(
                lambda: (
                    documents.execute("SELECT count(*) FROM pgmq.q_embedding_jobs WHERE msg_id = 1").fetchone() == (0,)
                )
            )
            assert stored(documents)[1] is None
            assert documents.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)
        api.release()
        wait_until(lambda: is_settled(documents))
        assert_fresh(documents)

    assert api.texts() == ["# t\n\nold", "# t\n\nnew"]


def test_a_change_that_no_trigger_saw_is_embedded_anew(documents: Connection, api: FakeApi, connect: Connect) -> None:
    """If a row that no longer says the text is settled instead of queued again, it keeps no vector."""
    api.behave(hold="old")
    insert(documents, "old")
    with running_lanes(documents, connect):
        api.wait_for(held=1)
        documents.execute("ALTER TABLE documents DISABLE TRIGGER USER")
        documents.execute("UPDATE documents SET content = 'new' WHERE id = 1")
        documents.execute("ALTER TABLE documents ENABLE TRIGGER USER")
        api.release()
        wait_until(lambda: is_settled(documents))

    assert_fresh(documents)


def test_a_locked_row_is_left_out_and_done_later_without_an_attempt(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """Without SKIP LOCKED the free row waits with the locked one; if a lock counts, attempts are 1."""
    insert(documents, "locked", "free")
    with connect() as application, running_lanes(documents, connect):
        with application.transaction():
            application.execute("SELECT FROM documents WHERE id = 1 FOR UPDATE")
            wait_until(lambda: stored(documents)[2])
            wait_until(
                lambda: (
                    documents.execute(
                        "SELECT count(*) FROM pgmq.q_embedding_jobs WHERE message ->> 'attempts' = '0'"
                    ).fetchone()
                    == (1,)
                )
            )
            assert stored(documents)[1] is None
        wait_until(lambda: is_settled(documents))

    assert_fresh(documents)


def test_a_row_locked_for_a_moment_is_not_paid_for_twice(documents: Connection, api: FakeApi, connect: Connect) -> None:
    """Without a second try for the vectors of locked rows, the text is sent again."""
    documents.execute("CREATE SEQUENCE writes")
    documents.execute(
        "CREATE FUNCTION count_write() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM nextval('writes'); RETURN NULL; END $$"
    )
    documents.execute(
        "CREATE TRIGGER count AFTER UPDATE ON documents FOR EACH STATEMENT EXECUTE FUNCTION count_write()"
    )
    api.behave(hold=True)
    insert(documents, "locked")
    with connect() as application, running_lanes(documents, connect):
        api.wait_for(held=1)
        with application.transaction():
            application.execute("SELECT FROM documents WHERE id = 1 FOR UPDATE")
            api.release()
            wait_until(lambda: documents.execute("SELECT is_called FROM writes").fetchone() == (True,))
        wait_until(lambda: is_settled(documents))

    assert api.counters()["inputs"] == 1
    assert_fresh(documents)


def test_jobs_of_a_lane_that_died_are_done_soon_not_after_the_lease(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """If nobody frees the jobs of dead lanes, they stay hidden until the lease is over."""
    api.behave(hold=True)
    insert(documents, "one")
    lane = Lane(connect())
    api.wait_for(held=1)
    documents.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
    lane.join()
    api.release()

    with running_lanes(documents, connect):
        # The lease is six minutes.
        wait_until(lambda: is_settled(documents), 5)

    assert_fresh(documents)


def test_a_job_is_never_visible_while_its_request_may_run(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """With a lease shorter than the request's timeout the job is visible while its request may still run."""
    api.behave(hold=True)
    insert(documents, "one")
    with running_lanes(documents, connect, 2, "timeout_milliseconds => 5000"):
        api.wait_for(held=1)
        [row] = documents.execute(
            "SELECT vt - clock_timestamp() > interval '5 seconds' AS hidden FROM pgmq.q_embedding_jobs"
        ).fetchall()
        assert row.hidden
        api.release()
        wait_until(lambda: is_settled(documents))

    assert api.counters()["inputs"] == 1


def refused_connections(server: Server) -> int:
    """How many connections of a container were refused so far."""
    lines = server.container.get_wrapped_container().exec_run(["cat", "/proc/net/snmp"]).output.decode().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(dict(zip(names, values, strict=True))["AttemptFails"])


def test_an_outage_spends_no_attempts_and_the_drain_goes_on_when_it_ends(
    documents: Connection, api: FakeApi, connect: Connect, server: Server
) -> None:
    """If a released job keeps its count, reads are not 0; if the model does not rest, it is tried all the time.

    If a claim is not of one row after a failure, each rest ends with six requests.
    """
    port = api.listen()
    documents.execute(
        "SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)",
        [f"http://127.0.0.1:{port}/{api.tenant}/v1"],
    )
    api.refuse(port)
    documents.execute("INSERT INTO documents (title, content) SELECT 't', 'c' || n FROM generate_series(1, 600) AS n")
    failures = "SELECT coalesce(max(failures), 0) FROM autoembed.model_rest"
    before = refused_connections(server)
    with running_lanes(documents, connect, 2):
        began_at = time.monotonic()
        wait_until(lambda: time.monotonic() > began_at + 3)
        wait_until(lambda: (documents.execute(failures).fetchone() or (0,)) >= (4,), 60)
        tries = refused_connections(server) - before
        # Six requests of the first claim, then a row of each lane's after each rest, which is 0.2 s at the least.
        assert tries <= 6 + 2 * (time.monotonic() - began_at) / 0.2
        [rests] = documents.execute(failures).fetchone() or [0]
        assert tries <= 6 + 2 * (rests + 1)
        # Another lane may have a row in hand at this moment.
        untouched = (
            "SELECT count(*) FROM pgmq.q_embedding_jobs WHERE vt <= clock_timestamp()"
            " AND read_ct = 0 AND coalesce(message ->> 'attempts', '0') = '0'"
        )
        wait_until(lambda: documents.execute(untouched).fetchone() == (600,))
        api.listen(port)
        wait_until(lambda: is_settled(documents), 30)

    # Beside the texts, the word that a lane asks a model first that has failed again and again.
    assert sum(text != "autoembed" for request in api.log() for text in request["texts"]) == 600
    assert_fresh(documents)


@pytest.mark.parametrize("header", ["retry_after", "retry_after_date"])
def test_a_rate_limit_rests_the_model_for_as_long_as_the_provider_says(
    documents: Connection, api: FakeApi, connect: Connect, header: str
) -> None:
    """If Retry-After is not read, as seconds or as a date, or the rest not heeded, the next request comes too soon."""
    api.behave(faults=[{"status": 429, header: 3}])
    insert(documents, "one")
    with running_lanes(documents, connect, 2):
        wait_until(lambda: is_settled(documents))

    refused, accepted = api.log()
    assert refused["status"] == 429
    # An HTTP date has whole seconds.
    assert accepted["started_at"] - refused["finished_at"] >= 2
    assert_fresh(documents)


def test_a_model_in_trouble_does_not_hold_up_another(documents: Connection, api: FakeApi, connect: Connect) -> None:
    """If a rest is kept for all models, not for one, the note waits for the documents' provider."""
    documents.execute("CREATE TABLE notes (id int PRIMARY KEY, content text, embedding halfvec(256))")
    documents.execute("CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql AS 'SELECT n.content'")
    documents.execute(
        "SELECT autoembed.create_model('other', 'openai', 256, model_id => 'text-embedding-3-large',"
        " base_url => %s, api_key => 'env:OPENAI_API_KEY')",
        [api.base_url],
    )
    documents.execute(
        "CREATE TRIGGER embed AFTER INSERT ON notes FOR EACH ROW"
        " EXECUTE FUNCTION autoembed.queue_embeddings('note_text', 'embedding')"
    )
    documents.execute("UPDATE autoembed.pipeline SET model = 'other' WHERE table_id = 'notes'::regclass")
    api.behave(faults=[{"status": 503, "retry_after": 60, "match": "# t", "times": "forever"}])
    insert(documents, *[f"c{n}" for n in range(50)])
    with running_lanes(documents, connect):
        wait_until(lambda: documents.execute("SELECT count(*) FROM autoembed.model_rest").fetchone() == (1,))
        documents.execute("INSERT INTO notes VALUES (1, 'a note')")
        wait_until(lambda: documents.execute("SELECT embedding IS NOT NULL FROM notes").fetchone() == (True,))
        api.behave()
        documents.execute("SELECT autoembed.resume_model('text-embedding-3-small')")
        wait_until(lambda: is_settled(documents))


def test_an_idle_lane_writes_nothing(documents: Connection, connect: Connect) -> None:
    """A sign of life written at each look at the queue, or each second, leaves no two seconds quiet."""
    position = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"

    def two_seconds_are_quiet() -> bool:
        before = documents.execute(position).fetchone()
        end = time.monotonic() + 2
        wait_until(lambda: time.monotonic() > end)
        return documents.execute(position).fetchone() == before

    with running_lanes(documents, connect):
        # The server writes now and then for its own ends; a lane looks at the queue ten times in two seconds.
        wait_until(two_seconds_are_quiet, 30)


@pytest.mark.parametrize("queue", ["hidden", "emptied"])
def test_an_idle_lane_reads_no_table_that_a_backfill_made_large(documents: Connection, queue: str) -> None:
    """Tables that are read from end to end, ten times a second, cost the more the more was done before."""
    documents.execute(
        "INSERT INTO pgmq.q_embedding_jobs (vt, message) SELECT now() + interval '1 hour', "
        """'{"pipeline": 1, "keys": []}' FROM generate_series(1, 10000)"""
    )
    documents.execute(
        "INSERT INTO autoembed.usage_entry (model, requests, inputs, tokens, rows) "
        "SELECT 'text-embedding-3-small', 1, 1, 1, 1 FROM generate_series(1, 10000)"
    )
    documents.execute(
        "INSERT INTO autoembed.permit (model, at) SELECT 'text-embedding-3-small', now() FROM generate_series(1, 10000)"
    )
    if queue == "emptied":
        documents.execute("DELETE FROM pgmq.q_embedding_jobs")
    # The reads of this session so far no longer count.
    documents.execute("SELECT pg_stat_force_next_flush()")

    with documents.transaction():
        documents.execute("SELECT FROM autoembed._claim(100, 60, '{}', '{}', '{}')")
        documents.execute("SELECT autoembed._lane_is_wanted(), autoembed._clean_up()")
        documents.execute("SELECT FROM autoembed._next_backfill(false, '{}', '{}')")
        read = documents.execute("SELECT relname FROM pg_stat_xact_user_tables WHERE seq_scan > 0").fetchall()

    assert not {"q_embedding_jobs", "usage_entry", "permit", "embedded"} & {name for (name,) in read}


@pytest.mark.parametrize(
    "wait",
    [
        "autoembed.pause('documents')",
        "autoembed._rest_model('text-embedding-3-small', 60, false, 'it is down', 'down')",
    ],
)
def test_a_table_that_waits_is_not_checked_at_each_look(documents: Connection, wait: str) -> None:
    """Ten times a second, a hundred tables whose provider is down would take a tenth of a core."""
    insert(documents, "first")
    documents.execute(f"SELECT {wait}")
    documents.execute("SET track_functions = 'all'")

    with documents.transaction():
        claimed = documents.execute("SELECT count(*) FROM autoembed._claim(100, 60, '{}', '{}', '{}')").fetchone()
        called = documents.execute("SELECT funcname FROM pg_stat_xact_user_functions").fetchall()

    assert claimed == (0,)
    assert ("_claim",) in called
    assert ("_check_pipeline",) not in called


def test_a_claim_leaves_out_the_owners_whose_vectors_wait(documents: Connection) -> None:
    insert(documents, "first")
    claimed = "SELECT count(*) FROM autoembed._claim(100, 60, '{}', '{}', %s)"
    owner = documents.execute("SELECT relowner::bigint AS id FROM pg_class WHERE relname = 'documents'").fetchone()
    assert owner is not None

    assert documents.execute(claimed, [[owner.id]]).fetchone() == (0,)
    assert documents.execute(claimed, [[owner.id + 1]]).fetchone() == (1,)


def test_a_claim_looks_at_no_pipeline_that_has_no_messages(documents: Connection) -> None:
    """Joined as a whole, hundreds of pipelines would be gone through at each look."""
    insert(documents, "first")
    columns = "table_id, key_columns, content_function, managed, on_change"
    # No trigger checks them: their columns are not there.
    documents.execute("SET session_replication_role = 'replica'")
    documents.execute(
        f"INSERT INTO autoembed.pipeline (embedding_column, {columns})"
        f" SELECT 'other_' || n, {columns} FROM autoembed.pipeline, generate_series(1, 1000) AS n"
    )
    documents.execute("ANALYZE autoembed.pipeline")
    documents.execute("SET track_functions = 'all'")

    with documents.transaction():
        claimed = documents.execute("SELECT count(*) FROM autoembed._claim(100, 60, '{}', '{}', '{}')").fetchone()
        calls = dict(documents.execute("SELECT funcname, calls FROM pg_stat_xact_user_functions").fetchall())

    assert claimed == (1,)
    assert calls["_default_model"] < 20


def test_a_lane_that_kills_its_backend_again_and_again_gives_the_row_up(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """If claims do not count, or count for nothing, it is tried again; if all jobs share a claim, both are given up."""
    api.behave(hold="deadly")
    insert(documents, "deadly", "harmless")
    for _ in range(5):
        before = api.counters()["requests"]
        lane = Lane(connect())
        api.wait_for(requests=before + 1)
        wait_until(lambda: api.counters()["held"] >= 1)
        documents.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
        lane.join()
        api.wait_until_idle()

    with running_lanes(documents, connect):
        wait_until(lambda: is_settled(documents))

    [failure] = documents.execute("SELECT key, reason, attempts FROM autoembed.failed").fetchall()
    assert failure == ("[1]", "5 lanes ended while they worked on it", 5)
    assert stored(documents)[2] is not None


def test_a_claim_leaves_to_other_lanes_what_it_does_not_take(documents: Connection, connect: Connect) -> None:
    """Read many at a time, messages would be locked that nobody takes: a lane beside finds nothing, and sleeps."""
    insert(documents, *(f"text {number}" for number in range(20)))
    claimed = "SELECT count(*) FROM autoembed._claim(%s, 60, '{}', '{}', '{}')"
    with connect() as first, first.transaction():
        assert first.execute(claimed, [4]).fetchone() == (4,)
        # The newest that no longer fits its half may be locked, too.
        with connect() as second, second.transaction():
            assert second.execute(claimed, [15]).fetchone() == (15,)


def test_only_claims_wait_for_the_log(documents: Connection, api: FakeApi) -> None:
    """Were each answer's commit written through, a drain would wait for the disk once for each of its requests."""
    insert(documents, *(f"text {number}" for number in range(200)))
    before = log_writes(documents)

    while waiting(documents):
        documents.execute("CALL autoembed.work(run_seconds => 3, batch_size => 1)")

    assert len(api.log()) == 200
    assert_fresh(documents)
    assert log_writes(documents) - before < 100
    assert documents.execute("SHOW synchronous_commit").fetchone() == ("on",)


def log_writes(db: Connection) -> int:
    """How often the write-ahead log was written, by all sessions; this one's share included."""
    db.execute("SELECT pg_stat_force_next_flush()")
    [(writes,)] = db.execute(
        "SELECT sum(writes) FROM pg_stat_io WHERE object = 'wal'"
        if db.info.server_version >= 180000
        else "SELECT wal_write FROM pg_stat_wal"
    )
    return int(writes)
