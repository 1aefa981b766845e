"""The image: what people know of the official postgres image holds, and it is ready when it starts."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import psycopg
import pytest
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

from harness import FAKE_API_PORT, GUIDE_TRIGGERS, HOST, IMAGE, PASSWORD, Connection, Server, is_settled, waiting
from waiting import wait_until

# initdb itself refuses a user with quotes, a dollar, a backslash or a comment in the name.
USER = "Ünser = admin; 1"
DATABASE = 'my "first" = database\'s %s'
OWN_SCRIPT = (
    """
CREATE TABLE documents (id int PRIMARY KEY, title text, content text, embedding halfvec(384));
CREATE FUNCTION embedding_input(doc documents) RETURNS text LANGUAGE sql AS 'SELECT doc.content';
INSERT INTO documents VALUES (0, 't', 'written before the trigger');
"""
    + GUIDE_TRIGGERS
    + """
INSERT INTO documents VALUES (1, 't', 'written by a script of the first start');
"""
)


def run(server: Server, command: str) -> tuple[int, str]:
    """Exit code and output of a shell command in the container."""
    result = server.container.get_wrapped_container().exec_run(["bash", "-c", command])
    return result.exit_code, result.output.decode()


def inspect(server: Server) -> dict[str, Any]:
    wrapped = server.container.get_wrapped_container()
    wrapped.reload()
    attributes: dict[str, Any] = wrapped.attrs
    return attributes


def log(server: Server) -> str:
    return "".join(part.decode() for part in server.container.get_logs())


@pytest.fixture(scope="module")
def odd() -> Iterator[Server]:
    """A container with odd names, its password in a file, arguments of its own, and a script for the first start."""
    container = DockerContainer(IMAGE)
    published: dict[str, Any] = {f"{port}/tcp": (HOST, None) for port in (5432, FAKE_API_PORT)}
    container.ports = published
    environment = {
        "POSTGRES_USER": USER,
        "POSTGRES_DB": DATABASE,
        "POSTGRES_PASSWORD_FILE": "/run/password",
        "OWN_SCRIPT": OWN_SCRIPT,
        "PASSWORD": PASSWORD,
    }
    for name, value in environment.items():
        container.with_env(name, value)
    # The files are made inside: a bind mount would need the engine to see this machine's.
    container.with_kwargs(entrypoint=["bash", "-c"])
    prepare = (
        'printf "%s" "$PASSWORD" > /run/password; printf "%s" "$OWN_SCRIPT" > /docker-entrypoint-initdb.d/20-own.sql;'
        ' unset PASSWORD OWN_SCRIPT; exec docker-entrypoint.sh "$@"'
    )
    container.with_command([prepare, "bash", "postgres", "-c", "fsync=off", "-c", "work_mem=5MB"])
    with ExitStack() as stack:
        stack.enter_context(container)
        server = Server(container, int(container.get_exposed_port(5432)))
        wait_until(lambda: is_up(server), 60)
        yield server


def is_up(server: Server) -> bool:
    return answers(server, DATABASE, USER)


def answers(server: Server, dbname: str = "postgres", user: str = "postgres") -> bool:
    try:
        server.connect(dbname, user=user).close()
    except psycopg.OperationalError:
        return False
    return True


def connect(server: Server) -> Connection:
    return server.connect(DATABASE, user=USER)


def test_the_named_database_has_the_extensions_and_a_lane(odd: Server) -> None:
    with connect(odd) as db:
        extensions = {row.extname for row in db.execute("SELECT extname FROM pg_extension")}
        assert {"autoembed", "pg_cron", "pgmq", "plpython3u", "vector"} <= extensions
        assert db.execute("SELECT jobname, database, username, command FROM cron.job ORDER BY 1").fetchall() == [
            ("autoembed-backfill-1", DATABASE, USER, "CALL autoembed.work(backfill => true)"),
            ("autoembed-lane-1", DATABASE, USER, "CALL autoembed.work()"),
        ]
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (2,))
    with odd.connect("postgres", user=USER) as db:
        assert db.execute("SELECT count(*) FROM pg_extension WHERE extname <> 'plpgsql'").fetchone() == (0,)


def test_arguments_after_the_images_name_reach_the_server(odd: Server) -> None:
    with connect(odd) as db:
        assert db.execute("SHOW work_mem").fetchone() == ("5MB",)
        assert db.execute("SHOW shared_preload_libraries").fetchone() == ("pg_cron",)
        assert db.execute("SHOW cron.database_name").fetchone() == (DATABASE,)


def test_a_script_of_the_first_start_can_use_the_extension(odd: Server) -> None:
    with connect(odd) as db:
        wait_until(lambda: is_settled(db))
        rows = db.execute("SELECT id, embedding IS NOT NULL FROM documents WHERE id <= 1 ORDER BY id").fetchall()

    assert rows == [(0, False), (1, True)]


def test_the_container_becomes_healthy(odd: Server) -> None:
    wait_until(lambda: inspect(odd)["State"]["Health"]["Status"] == "healthy", 30)


def test_the_server_runs_as_postgres(odd: Server) -> None:
    _, users = run(odd, "stat -c %U /proc/1 $(grep -l postgres /proc/[0-9]*/comm | xargs -n 1 dirname)")

    assert set(users.split()) == {"postgres"}


def test_no_tool_for_building_is_left(odd: Server) -> None:
    _, found = run(odd, "type -P gcc cc c++ g++ clang make ld pip pip3 python3-config git; python3 -m pip")

    assert found.strip().endswith("No module named pip")
    assert len(found.strip().splitlines()) == 1


def test_nothing_of_the_machine_that_built_it_is_trusted(odd: Server) -> None:
    _, added = run(odd, "find /usr/local/share/ca-certificates -type f")
    _, counts = run(odd, "grep -c '^[^#!]' /etc/ca-certificates.conf; grep -c BEGIN /etc/ssl/certs/ca-certificates.crt")

    assert added == ""
    configured, trusted = counts.split()
    assert configured == trusted


def test_the_image_lists_what_it_is_made_of(odd: Server) -> None:
    _, listed = run(odd, "cat /usr/local/share/autoembed/sbom.json")
    bom = json.loads(listed)
    components = {(component["name"], component["version"]) for component in bom["components"]}
    _, packages = run(odd, "dpkg-query --show --showformat='${Package} ${Version}\\n'")
    _, folders = run(odd, "ls -d /usr/local/lib/autoembed/python/*.dist-info | xargs -n 1 basename -s .dist-info")
    with connect(odd) as db:
        extensions = db.execute(
            "SELECT extname, extversion FROM pg_extension WHERE extname IN ('autoembed', 'pgmq')"
        ).fetchall()

    assert bom["bomFormat"] == "CycloneDX"
    assert {tuple(line.split()) for line in packages.splitlines()} <= components
    assert {tuple(folder.split("-")) for folder in folders.split()} <= components
    assert {tuple(row) for row in extensions} <= components
    assert ("all-MiniLM-L6-v2", "machine-learning-model") in {
        (component["name"], component["type"]) for component in bom["components"]
    }


def test_a_quiet_start_says_nothing_of_an_error(odd: Server) -> None:
    said = [
        line for line in log(odd).splitlines() if any(word in line for word in ("ERROR", "FATAL", "WARNING", "PANIC"))
    ]

    # The server's own, while nobody may connect yet or the entrypoint restarts it, and initdb's about trust.
    known = (
        "the database system is",
        "terminating connection due to administrator command",
        'terminating background worker "pg_cron launcher" due to administrator command',
        "trust",
    )
    assert [line for line in said if not any(part in line for part in known)] == []
    assert "Traceback" not in log(odd)


def test_pg_cron_notes_a_lane_once_a_run(odd: Server) -> None:
    with connect(odd) as db:
        started = db.execute("SELECT count(DISTINCT pid) AS lanes FROM autoembed.lane").fetchone()
        assert started == (2,)
        runs = db.execute(
            "SELECT status, count(*) FROM cron.job_run_details GROUP BY status ORDER BY status"
        ).fetchall()

    assert runs == [("running", 2)]


def test_the_image_is_labelled_and_checks_its_health(odd: Server) -> None:
    config = inspect(odd)["Config"]

    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert {"title", "description", "licenses", "version"} <= labels.keys()
    assert labels["title"] == "autoembed"
    with connect(odd) as db:
        version = db.execute("SELECT extversion FROM pg_extension WHERE extname = 'autoembed'").fetchone()
    assert version == (labels["version"],)
    assert "pg_isready" in json.dumps(config["Healthcheck"])


def test_pgmq_works_by_itself(odd: Server) -> None:
    with connect(odd) as db:
        db.execute("CREATE DATABASE plain")
    with odd.connect("plain", user=USER) as db:
        db.execute("CREATE EXTENSION pgmq")
        db.execute("SELECT pgmq.create('q')")
        db.execute("SELECT pgmq.send('q', '{\"a\": 1}')")
        assert db.execute("SELECT message FROM pgmq.read('q', 30, 1)").fetchall() == [({"a": 1},)]


def test_data_and_jobs_survive_a_stop_and_a_start(odd: Server) -> None:
    wrapped = odd.container.get_wrapped_container()
    with connect(odd) as db:
        # So that the row still waits when the server stops.
        db.execute("SELECT autoembed._rest_model('all-MiniLM-L6-v2', 3600, false, 'a test', 'a test')")
        db.execute("INSERT INTO documents VALUES (2, 't', 'written before the stop')")
    wrapped.stop(timeout=30)
    assert inspect(odd)["State"]["ExitCode"] == 0
    wrapped.start()
    again = Server(odd.container, int(odd.container.get_exposed_port(5432)))
    wait_until(lambda: is_up(again), 60)

    with connect(again) as db:
        assert waiting(db) == 1
        assert db.execute("SELECT jobname FROM cron.job ORDER BY 1").fetchall() == [
            ("autoembed-backfill-1",),
            ("autoembed-lane-1",),
        ]
        db.execute("SELECT autoembed.resume_model('all-MiniLM-L6-v2')")
        wait_until(lambda: is_settled(db), 30)
        assert db.execute("SELECT embedding IS NOT NULL FROM documents WHERE id = 2").fetchone() == (True,)


def test_a_number_of_lanes_that_is_none_stops_the_first_start() -> None:
    container = DockerContainer(IMAGE).with_env("POSTGRES_PASSWORD", PASSWORD).with_env("AUTOEMBED_LANES", "two")
    with container:
        wrapped = container.get_wrapped_container()

        assert wrapped.wait(timeout=60)["StatusCode"] != 0
        assert "AUTOEMBED_LANES is 'two' but must be a whole number" in wrapped.logs().decode()


@contextmanager
def locked(
    user: str, writable: list[str], prepare: str, *arguments: str, **environment: str
) -> Iterator[DockerContainer]:
    """A container that can write in some folders only, in memory. It first runs a line of shell, then its server."""
    container = DockerContainer(IMAGE)
    for name, value in environment.items():
        container.with_env(name, value)
    for folder in writable:
        container.with_tmpfs_mount(folder)
    container.with_kwargs(entrypoint=["bash", "-c"], user=user, read_only=True)
    container.with_command([f'set -e\n{prepare}\nexec "$@"', "bash", *arguments])
    with container:
        yield container


def psql(container: DockerContainer, statement: str, **environment: str) -> str:
    """The answer through the socket of the server, by the image's own psql."""
    result = container.get_wrapped_container().exec_run(
        ["psql", "--username=postgres", "--no-align", "--tuples-only", "--no-psqlrc", f"--command={statement}"],
        environment=environment,
    )
    return str(result.output.decode().strip())


def health(container: DockerContainer) -> str:
    wrapped = container.get_wrapped_container()
    wrapped.reload()
    return str(wrapped.attrs["State"]["Health"]["Status"])


def embeds(container: DockerContainer, **environment: str) -> None:
    """Waits until a lane has embedded a row by the local model."""
    psql(container, "CREATE TABLE notes (id int PRIMARY KEY, body text)", **environment)
    psql(container, "SELECT autoembed.enable('notes', content_columns => '{body}')", **environment)
    psql(container, "INSERT INTO notes VALUES (1, 'a note')", **environment)
    wait_until(lambda: psql(container, "SELECT embedded = 1 FROM autoembed.status", **environment) == "t", 30)


# Each name stands for a package that a lane imports.
DECOYS = (
    "mkdir /tmp/decoys && for name in requests numpy orjson onnxruntime tokenizers; do : > /tmp/decoys/$name.py; done"
)


def test_any_user_on_a_root_that_cannot_be_written_whatever_python_its_environment_names() -> None:
    environment = {"PGDATA": f"{place_of_the_volume()}/own", "PGPORT": "5433", "PYTHONPATH": "/tmp/decoys"}
    server = ("docker-entrypoint.sh", "postgres")
    with locked(
        "12345:0", ["/tmp", "/var/run/postgresql"], DECOYS, *server, POSTGRES_PASSWORD=PASSWORD, **environment
    ) as container:
        wait_until(lambda: health(container) == "healthy", 60)

        embeds(container)
        assert psql(container, "SELECT count(DISTINCT pid) FROM autoembed.lane") == "2"


def test_the_home_directory_adds_nothing_to_what_python_imports(odd: Server) -> None:
    _, enabled = run(odd, "python3 -c 'import site; print(site.ENABLE_USER_SITE)'")

    assert enabled == "False\n"


def test_a_port_among_the_arguments_is_the_one_that_is_probed() -> None:
    container = DockerContainer(IMAGE).with_env("POSTGRES_PASSWORD", PASSWORD)
    container.with_command(["postgres", "-c", "port=5433"])
    with container:
        wait_until(lambda: health(container) == "healthy", 60)

        assert psql(container, "SHOW port", PGPORT="5433") == "5433"
        assert psql(container, "SELECT count(*) FROM cron.job", PGPORT="5433") == "2"


# CloudNativePG: a user and a database of its own, and no script of the image but the programs of PostgreSQL.
OPERATOR = """
initdb --username=postgres --auth=trust > /tmp/initdb.log
printf '%s\\n' "shared_preload_libraries = 'pg_cron'" "cron.database_name = 'app'" \\
    "cron.use_background_workers = on" "unix_socket_directories = '/tmp'" >> $PGDATA/postgresql.conf
"""


def test_an_operator_can_start_the_server_by_itself() -> None:
    place = place_of_the_volume()
    environment = {"PGHOST": "/tmp", "PGDATA": f"{place}/pgdata"}
    with locked(uid_of_postgres(), ["/tmp", place], OPERATOR, "postgres", **environment) as container:
        wait_until(lambda: psql(container, "SELECT 1", PGDATABASE="postgres") == "1", 60)
        psql(container, "CREATE ROLE app LOGIN", PGDATABASE="postgres")
        psql(container, "CREATE DATABASE app OWNER app", PGDATABASE="postgres")
        for statement in (
            "CREATE EXTENSION pg_cron",
            "CREATE EXTENSION autoembed CASCADE",
            "SELECT autoembed.grant_usage('app')",
            "SELECT autoembed.schedule()",
        ):
            psql(container, statement, PGDATABASE="app")

        embeds(container, PGDATABASE="app")


def uid_of_postgres() -> str:
    output = DockerClient().client.containers.run(IMAGE, ["-c", "id -u postgres"], entrypoint="bash", remove=True)
    return str(output.decode().strip())


@pytest.fixture
def volume() -> Iterator[str]:
    name = f"autoembed_{uuid.uuid4().hex}"
    yield name
    DockerClient().client.volumes.get(name).remove()


def started(volume: str, place: str) -> DockerContainer:
    container = DockerContainer(IMAGE).with_env("POSTGRES_PASSWORD", PASSWORD).with_env("AUTOEMBED_LANES", "0")
    published: dict[str, Any] = {"5432/tcp": (HOST, None)}
    container.ports = published
    return container.with_volume_mapping(volume, place, "rw")


def place_of_the_volume() -> str:
    (place,) = DockerClient().client.images.get(IMAGE).attrs["Config"]["Volumes"]
    return str(place)


def major() -> int:
    environment = DockerClient().client.images.get(IMAGE).attrs["Config"]["Env"]
    return int(dict(entry.split("=", 1) for entry in environment)["PG_MAJOR"])


def test_data_in_the_documented_volume_outlive_the_container(volume: str) -> None:
    # Both are in docs/install.md and compose.yaml.
    place = "/var/lib/postgresql" if major() >= 18 else "/var/lib/postgresql/data"
    assert place_of_the_volume() == place
    for statement in ("CREATE TABLE kept (a int)", "INSERT INTO kept VALUES (1)"):
        with started(volume, place) as container:
            server = Server(container, int(container.get_exposed_port(5432)))
            wait_until(partial(answers, server), 60)
            with server.connect() as db:
                db.execute(statement)


def test_a_volume_at_the_place_of_another_major_is_refused_where_it_would_hold_no_data(volume: str) -> None:
    with started(volume, "/var/lib/postgresql/data") as container:
        if major() < 18:
            server = Server(container, int(container.get_exposed_port(5432)))
            wait_until(partial(answers, server), 60)
        else:
            wrapped = container.get_wrapped_container()
            assert wrapped.wait(timeout=60)["StatusCode"] != 0
            assert "/var/lib/postgresql/data" in wrapped.logs().decode()
