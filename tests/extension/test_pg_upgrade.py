"""pg_upgrade moves a database that has the extension, and everything goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from harness import Connection, Server

# The rest needs no lane and no provider: process() embeds, with the model fake.
LIVED_IN = """
CREATE EXTENSION autoembed CASCADE;
SELECT autoembed.create_model('fake', 'fake', 3), autoembed.set_default_model('fake');
CREATE ROLE owner;
SELECT autoembed.grant_usage('owner');
GRANT CREATE ON SCHEMA public TO owner;
-- They shift the OIDs of functions.
CREATE FUNCTION dropped_1() RETURNS int LANGUAGE sql RETURN 1;
CREATE FUNCTION dropped_2() RETURNS int LANGUAGE sql RETURN 2;
SET ROLE owner;
CREATE TABLE notes (gone int, id int PRIMARY KEY, body text);
ALTER TABLE notes DROP COLUMN gone;
SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}', create_index => true);
CREATE TABLE stories (id int PRIMARY KEY, body text);
CREATE FUNCTION story(s stories) RETURNS text LANGUAGE sql AS 'SELECT ''story '' || s.body';
SELECT autoembed.enable('stories', 'embedding', content_function => 'story');
ALTER FUNCTION story RENAME TO tale;
CREATE FUNCTION other(s stories) RETURNS text LANGUAGE sql AS 'SELECT ''other '' || s.body';
CREATE FUNCTION is_good(body text) RETURNS boolean LANGUAGE sql RETURN body <> 'bad';
CREATE TABLE parts (id int PRIMARY KEY, body text) PARTITION BY RANGE (id);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
SELECT autoembed.enable('parts', 'embedding', content_columns => '{body}', condition => 'is_good(body)');
CREATE TABLE manuals (id int PRIMARY KEY, body text);
SELECT autoembed.enable('manuals', content_columns => '{body}');
RESET ROLE;
DROP FUNCTION dropped_1, dropped_2;
INSERT INTO notes SELECT n, 'note ' || n FROM generate_series(1, 5) AS n;
INSERT INTO stories SELECT n, 'story ' || n FROM generate_series(1, 5) AS n;
INSERT INTO parts SELECT n, CASE n WHEN 1 THEN 'bad' ELSE 'part' END FROM generate_series(1, 5) AS n;
INSERT INTO manuals SELECT n, 'manual ' || n FROM generate_series(1, 5) AS n;
SELECT autoembed.process();
CREATE INDEX ON notes USING hnsw (embedding halfvec_cosine_ops);
INSERT INTO notes VALUES (6, 'waits');
SELECT autoembed._fail(1, '[7]', 'refused', 5, 'a text');
SELECT autoembed.pause('stories');
INSERT INTO stories VALUES (6, 'waits');
"""

STATE = """
SELECT p.id, p.table_id, p.content_function, p.content_function_id, autoembed._content_function_of(p)::regprocedure,
       p.table_shape, p.paused, e.keys, f.keys, q.messages
FROM autoembed.pipeline AS p
LEFT JOIN LATERAL (SELECT array_agg((e.*)::text ORDER BY key) AS keys FROM autoembed.embedded AS e
                   WHERE e.pipeline_id = p.id) AS e ON true
LEFT JOIN LATERAL (SELECT array_agg((f.*)::text) AS keys FROM autoembed.failure AS f WHERE f.pipeline_id = p.id) AS f
    ON true
LEFT JOIN LATERAL (SELECT jsonb_agg(q.message) AS messages FROM autoembed._job AS q WHERE q.pipeline = p.id::text) AS q
    ON true
ORDER BY p.id
"""

TEXTS = """
SELECT 'notes', id, body, embedding IS NOT NULL FROM notes
UNION ALL SELECT 'stories', id, body, embedding IS NOT NULL FROM stories
UNION ALL SELECT 'parts', id, body, embedding IS NOT NULL FROM parts
ORDER BY 1, 2
"""

Run = Callable[[str], str]


@pytest.fixture
def run(server: Server) -> Iterator[Run]:
    """Runs shell as the server's user in the container, with the programs of the server, in a folder of its own."""
    container = server.container.get_wrapped_container()

    def run(script: str) -> str:
        [bin_folder] = container.exec_run(["pg_config", "--bindir"]).output.decode().split()
        code, output = container.exec_run(
            ["bash", "-c", f"set -e; PATH={bin_folder}:$PATH; cd /tmp/pg_upgrade; {script}"], user="postgres"
        )
        printed: str = output.decode()
        assert code == 0, printed[-4000:]
        return printed.strip()

    container.exec_run(["install", "-d", "-o", "postgres", "/tmp/pg_upgrade"])
    yield run
    for cluster in ("old", "new"):
        run(f"[ ! -f {cluster}/postmaster.pid ] || pg_ctl -D {cluster} stop -m immediate")
    container.exec_run(["rm", "-r", "/tmp/pg_upgrade"])


def psql(sql: str) -> str:
    quoted = sql.replace("'", "'\\''")
    return f"psql -h /tmp/pg_upgrade -p 5499 -U postgres -v ON_ERROR_STOP=1 -qAt -c '{quoted}'"


def start(cluster: str) -> str:
    return f"pg_ctl -D {cluster} -w -o '-p 5499 -k /tmp/pg_upgrade -c listen_addresses=' start >log"


def test_no_column_has_a_type_that_pg_upgrade_refuses(db: Connection) -> None:
    columns = db.execute(
        "SELECT a.attrelid::regclass::text, a.attname FROM pg_attribute AS a"
        " JOIN pg_class AS c ON c.oid = a.attrelid AND c.relkind IN ('r', 'p', 'm', 'i')"
        " WHERE c.relnamespace IN ('autoembed'::regnamespace, 'pgmq'::regnamespace) AND NOT a.attisdropped"
        " AND format_type(a.atttypid, NULL) ~ '^reg' AND format_type(a.atttypid, NULL) !~ '^reg(class|role|type)'"
    ).fetchall()

    assert columns == []


def test_everything_goes_on_after_pg_upgrade(run: Run) -> None:
    run(f"initdb -D old -U postgres -E UTF8 --locale=C.UTF-8 >log && {start('old')}")
    run(psql(LIVED_IN))
    state, texts = run(psql(STATE)), run(psql(TEXTS))
    assert "public.tale" in state and '"keys": [[6]]' in state and "refused" in state
    run("pg_ctl -D old stop >log && initdb -D new -U postgres -E UTF8 --locale=C.UTF-8 >log")

    run('pg_upgrade -b "$(pg_config --bindir)" -B "$(pg_config --bindir)" -d old -D new -U postgres -s /tmp/pg_upgrade')

    run(start("new"))
    assert (run(psql(STATE)), run(psql(TEXTS))) == (state, texts)
    # A rename is followed although the OIDs of functions are others.
    run(psql("SELECT autoembed._enter_lane(false), autoembed._leave_lane(); ALTER FUNCTION tale RENAME TO saga"))
    run(psql("SELECT autoembed.resume('stories')"))
    run(psql("INSERT INTO parts VALUES (6, 'bad'), (7, 'good'); UPDATE stories SET body = 'new' WHERE id = 1"))
    run(psql("DELETE FROM manuals WHERE id = 1; UPDATE manuals SET body = 'new' WHERE id = 2"))
    # A pass may leave rows of a scan to the next one.
    read = "1"
    while read != "0":
        read, failed = run(psql("SELECT read, failed FROM autoembed.process()")).split("|")
        assert failed == "0"
    assert run(psql("SELECT count(*) FROM autoembed._job")) == "0"

    assert run(psql("SELECT string_agg(id::text, ' ' ORDER BY id) FROM notes WHERE embedding IS NULL")) == ""
    assert run(psql("SELECT count(*) FROM stories WHERE embedding IS NULL")) == "0"
    assert run(psql("SELECT string_agg(id::text, ' ' ORDER BY id) FROM parts WHERE embedding IS NULL")) == "1 6"
    assert run(psql("SELECT string_agg(id::text, ' ' ORDER BY id) FROM manuals_embeddings")) == "2 3 4 5"
    assert (
        run(
            psql(
                "SELECT count(*) FROM stories AS s JOIN autoembed.embedded AS e ON e.key = format('[%s]', s.id)"
                " JOIN autoembed.pipeline AS p ON p.id = e.pipeline_id AND p.table_id = 'stories'::regclass"
                " WHERE e.embedded_at > now() - interval '1 hour'"
            )
        )
        == "6"
    )
    assert run(psql("SELECT content_function_id FROM autoembed.pipeline WHERE content_function = 'story'")) == (
        "public.saga"
    )
    run(psql("DROP EXTENSION autoembed CASCADE"))
