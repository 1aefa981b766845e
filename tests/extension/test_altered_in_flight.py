"""A table or a model is altered while a request is in flight."""

from __future__ import annotations

import pytest

from extension.pipelines.documents import Connect, assert_fresh
from fake_api import FakeApi
from harness import Server, waiting
from lanes import running_lanes
from waiting import wait_until

MEANWHILE = {
    "disabled": "SELECT autoembed.disable('documents')",
    "disabled, its column dropped": "SELECT autoembed.disable('documents', drop => true)",
    "dropped": "DROP TABLE documents",
    "its column dropped": "ALTER TABLE documents DROP embedding",
    "its content dropped": "ALTER TABLE documents DROP content",
    "its table renamed": "ALTER TABLE documents RENAME TO papers",
    "its columns renamed": "ALTER TABLE documents RENAME content TO body; ALTER TABLE documents RENAME id TO number",
    "its content altered": "SELECT autoembed.alter_pipeline('documents', content_template => 'new {content}')",
    "moved beside the rows": "SELECT autoembed.alter_pipeline('documents', storage => 'beside')",
    "paused": "SELECT autoembed.pause('documents')",
    "its column altered": "ALTER TABLE documents ALTER embedding TYPE vector(1536)",
    "its column altered and altered back": "ALTER TABLE documents ALTER embedding TYPE vector(1536);"
    "ALTER TABLE documents ALTER embedding TYPE halfvec(1536)",
    "its column shortened": "ALTER TABLE documents ALTER embedding TYPE halfvec(3)",
    # A lane looks at the functions of a pipeline once a second, and after an error.
    "its own functions dropped where no event trigger sees it": r"""
        SET session_replication_role = replica;
        DO $$
        DECLARE
            _function regprocedure;
        BEGIN
            FOR _function IN SELECT p.oid FROM pg_proc AS p WHERE p.proname ~ '^_(write|content)_[0-9]+$' LOOP
                EXECUTE 'DROP FUNCTION ' || _function;
            END LOOP;
        END $$;
        RESET session_replication_role
    """,
    "its condition's function dropped": "DROP FUNCTION odd",
    "its condition's function made anew": "DROP FUNCTION odd; CREATE FUNCTION odd(n int) RETURNS boolean RETURN n > 0",
}
# Changes that leave nothing to embed. The jobs wait until somebody decides.
STOPPED = {"its column dropped", "its content dropped"}
# The cures.
MENDED = {
    "its column shortened": "ALTER TABLE documents ALTER embedding TYPE halfvec(1536) USING NULL",
    "its condition's function dropped": "CREATE FUNCTION odd(n int) RETURNS boolean RETURN n > 0",
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_a_lane_takes_it_calmly_when_its_table_changes_under_a_request_in_flight(
    api: FakeApi, connect: Connect, meanwhile: str
) -> None:
    with connect() as db:
        db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text); INSERT INTO documents VALUES (1, 'one')")
        db.execute("CREATE FUNCTION odd(n int) RETURNS boolean RETURN n % 2 = 1")
        condition = ", condition => 'odd(id)'" if "condition" in meanwhile else ""
        db.execute(f"SELECT autoembed.enable('documents', 'embedding', content_columns => '{{content}}'{condition})")
        api.behave(hold=True)
        with running_lanes(db, connect) as [lane]:
            api.wait_for(held=1)
            db.execute("SET lock_timeout = '2s'")
            db.execute(MEANWHILE[meanwhile])
            api.release()
            api.wait_until_idle()
            db.execute("CREATE TABLE others (id int PRIMARY KEY, content text); INSERT INTO others VALUES (1, 'other')")
            db.execute("SELECT autoembed.enable('others', 'embedding', content_columns => '{content}')")
            embedded = "SELECT embedding IS NOT NULL FROM others"
            wait_until(lambda: lane.error or db.execute(embedded).fetchone() == (True,))
            assert lane.error is None
            db.execute("UPDATE autoembed.pipeline SET paused = false")
            if meanwhile in MENDED:
                reason = "SELECT reason FROM autoembed.status WHERE table_name = 'documents'"
                assert db.execute(reason).fetchone() != (None,)
                assert db.execute("SELECT * FROM autoembed.failed").fetchall() == []
            db.execute(MENDED.get(meanwhile, ""))
            due = (
                "SELECT EXISTS (SELECT FROM pgmq.q_embedding_jobs) OR EXISTS (SELECT FROM autoembed.backfill)"
                " OR EXISTS (SELECT FROM autoembed.failed)"
            )
            if meanwhile in STOPPED:
                state = "SELECT state FROM autoembed.status WHERE table_name = 'documents'"
                assert db.execute(state).fetchone() == ("stopped",)
            else:
                wait_until(lambda: lane.error or db.execute(due).fetchone() == (False,))
            assert lane.error is None
        table = "papers" if meanwhile == "its table renamed" else "documents"
        if meanwhile == "moved beside the rows":
            assert db.execute("SELECT id, chunk FROM documents_chunks").fetchall() == [(1, "one")]
        elif meanwhile in list(MEANWHILE)[5:]:
            text = {"its columns renamed": "body", "its content altered": "'new ' || content"}.get(meanwhile, "content")
            assert_fresh(db, text, table)


def test_an_update_of_another_column_does_not_fetch_a_long_text(api: FakeApi, connect: Connect) -> None:
    long_text = "SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 500)"
    with connect() as db:
        db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text, views int DEFAULT 0)")
        db.execute("SELECT autoembed.enable('documents', 'embedding', content_columns => '{content}')")
        db.execute(f"INSERT INTO documents SELECT n, ({long_text} WHERE n > 0) FROM generate_series(1, 20) AS n")

        def blocks_fetched() -> int:
            db.execute("SELECT pg_stat_force_next_flush()")
            [(blocks,)] = db.execute(
                "SELECT toast_blks_hit + toast_blks_read FROM pg_statio_user_tables WHERE relid = 'documents'::regclass"
            )
            return int(blocks)

        before = blocks_fetched()
        db.execute("UPDATE documents SET views = views + 1")
        assert blocks_fetched() == before

        db.execute("SELECT upper(content) FROM documents")
        assert blocks_fetched() > before


ANOTHER_MODEL = [
    "alter_pipeline('documents', model => 'other')",
    "alter_model('mine', model_id => 'text-embedding-3-large', base_url => '{url}')",
]


@pytest.mark.parametrize("change", ANOTHER_MODEL)
def test_an_answer_of_the_model_before_is_never_written_over_that_of_the_model_now(
    server: Server, api: FakeApi, connect: Connect, dbname: str, change: str
) -> None:
    """Two lanes, and the older answer comes last; both models have vectors of one length."""
    url = server.fake_api(f"{dbname}_other").base_url
    with connect() as db:
        for model, kind, base_url in (("mine", "small", api.base_url), ("other", "large", url)):
            db.execute(
                "SELECT autoembed.create_model(%s, 'openai', 1536, model_id => %s, base_url => %s,"
                " api_key => 'env:OPENAI_API_KEY')",
                [model, f"text-embedding-3-{kind}", base_url],
            )
        db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
        db.execute("SELECT autoembed.enable('documents', 'embedding', content_columns => '{content}', model => 'mine')")
        api.behave(hold=True)
        with running_lanes(db, connect, 2):
            db.execute("INSERT INTO documents VALUES (1, 'one')")
            api.wait_for(held=1)
            db.execute(f"SELECT autoembed.{change.format(url=url)}")
            # A scan leaves out rows that are in flight, so the row is queued as a change of it would be.
            db.execute(
                "SELECT pgmq.send('embedding_jobs', jsonb_build_object('pipeline', id, 'keys', '[[1]]'::jsonb))"
                " FROM autoembed.pipeline"
            )
            wait_until(lambda: db.execute("SELECT FROM documents WHERE embedding IS NOT NULL").fetchone() is not None)
            api.release()
            wait_until(lambda: waiting(db) == 0)
        assert_fresh(db, "content", model="text-embedding-3-large")
