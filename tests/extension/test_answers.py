"""Answers that no provider should give: each is the right kind of trouble, costs bounded memory, and writes nothing."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from fake_api import FakeApi, tokens_in
from harness import Connection, Server, insert, is_settled, stored, waiting
from lanes import running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]

GIGABYTE = 1 << 30
MAX_MEMORY_MEGABYTES = 600
TOO_LARGE = r"the provider's answer is larger than \d+ MiB"
SECRET = "sk-secret-0123456789abcdef"


def run(server: Server, *command: str) -> str:
    """The output of a command in the container."""
    result = server.container.get_wrapped_container().exec_run(list(command))
    assert result.exit_code == 0, result.output
    return str(result.output.decode())


def put_text(server: Server, path: str, text: str) -> None:
    run(server, "python3", "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", path, text)
    run(server, "chmod", "644", path)


def peak_megabytes(server: Server, pid: int) -> int:
    """The most memory that a backend has had, without what it shares."""
    fields = dict(line.split(":", 1) for line in run(server, "cat", f"/proc/{pid}/status").splitlines())
    kilobytes = {name: int(fields[name].split()[0]) for name in ("VmHWM", "RssFile", "RssShmem")}
    return (kilobytes["VmHWM"] - kilobytes["RssFile"] - kilobytes["RssShmem"]) // 1024


def base_url(db: Connection, url: str) -> None:
    db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [url])


class Row(NamedTuple):
    read: int
    completed: int
    retried: int
    failed: int


def process(db: Connection, arguments: str = "") -> tuple[Row, list[str]]:
    """A pass: its counts, and the errors of the jobs that did not complete."""
    row = db.execute(
        f"SELECT read, completed, retried, failed, failed_jobs FROM autoembed.process({arguments})"
    ).fetchone()
    assert row is not None
    return Row(*row[:4]), [job["error"] for job in row.failed_jobs]


@pytest.mark.parametrize("fault", ["big_body", "gzip_body"])
def test_an_endless_answer_ends_in_a_clear_error_and_little_memory(
    documents: Connection, api: FakeApi, server: Server, fault: str
) -> None:
    insert(documents, "one", "two")
    api.behave(faults=[{fault: GIGABYTE, "times": "forever"}])

    counts, errors = process(documents)

    assert counts == Row(2, 0, 2, 0)
    assert all(re.fullmatch(TOO_LARGE, error) for error in errors)
    assert stored(documents) == {1: None, 2: None}
    assert peak_megabytes(server, documents.info.backend_pid) < MAX_MEMORY_MEGABYTES


def test_endless_answers_side_by_side_share_the_memory(documents: Connection, api: FakeApi, server: Server) -> None:
    insert(documents, *[f"text {n}" for n in range(8)])
    api.behave(faults=[{"big_body": GIGABYTE, "times": "forever"}])

    counts, _ = process(documents, "batch_size => 1, max_requests => 8")

    assert counts == Row(8, 0, 8, 0)
    assert peak_megabytes(server, documents.info.backend_pid) < MAX_MEMORY_MEGABYTES


# Answers every request with the file that it is given, its length announced.
SERVE_FILE = """
import http.server, sys
body = open(sys.argv[2], "rb").read()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def bomb(server: Server) -> Iterator[str]:
    """A server whose answer is a megabyte that unpacks to a gigabyte."""
    port, path = 8010, "/tmp/bomb"
    run(
        server,
        "python3",
        "-c",
        f"import gzip\nwith gzip.open({path!r}, 'wb', 9) as f:\n for _ in range(1024): f.write(bytes(1 << 20))",
    )
    container = server.container.get_wrapped_container()
    serve = f'echo $$ >{path}.pid; exec python3 -c "$0" {port} {path}'
    container.exec_run(["sh", "-c", serve, SERVE_FILE], detach=True)
    yield f"http://127.0.0.1:{port}/v1"
    run(server, "sh", "-c", f"kill $(cat {path}.pid)")


def test_a_packed_answer_is_not_unpacked_at_once(
    documents: Connection, api: FakeApi, server: Server, bomb: str
) -> None:
    insert(documents, "one")
    base_url(documents, bomb)

    def answer() -> str | None:
        documents.execute("SELECT autoembed.resume_model('text-embedding-3-small')")
        _, [error] = process(documents)
        return None if "Connection refused" in error else error

    assert re.fullmatch(TOO_LARGE, wait_until(answer))
    assert peak_megabytes(server, documents.info.backend_pid) < MAX_MEMORY_MEGABYTES


def test_an_answer_that_trickles_ends_at_the_timeout(documents: Connection, api: FakeApi) -> None:
    insert(documents, "one")
    api.behave(faults=[{"slow_body": 30}])
    documents.execute("SET statement_timeout = '10s'")

    counts, [error] = process(documents, "timeout_milliseconds => 1000")

    assert counts == Row(1, 0, 1, 0)
    assert "1 s" in error


def test_a_certificate_that_does_not_verify_needs_attention(
    documents: Connection, api: FakeApi, server: Server
) -> None:
    request = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout /tmp/key.pem -out /tmp/cert.pem"
    )
    run(server, *request.split())
    port = api.listen(tls_cert="/tmp/cert.pem", tls_key="/tmp/key.pem")
    insert(documents, "one")
    base_url(documents, f"https://localhost:{port}/{api.tenant}/v1")
    try:
        counts, [error] = process(documents)
    finally:
        api.refuse(port)

    assert counts == Row(1, 0, 1, 0)
    assert error.startswith(f"no trusted connection to localhost:{port}: ")
    assert "certificate verify failed" in error
    assert documents.execute("SELECT needs_attention FROM autoembed.model_rest").fetchall() == [(True,)]
    assert waiting(documents) == 1
    assert api.counters()["requests"] == 0


def everything_said(db: Connection, server: Server, heard: list[str]) -> str:
    """All that an operator or a user can read: tables, views, warnings and the server's log."""
    rows = [
        db.execute(f"SELECT x::text AS line FROM {relation} AS x").fetchall()
        for relation in (
            *("autoembed.model", "autoembed.model_rest", "autoembed.failed", "autoembed.failure"),
            *("autoembed.pipeline", "autoembed._pipeline_state", "pgmq.q_embedding_jobs"),
        )
    ]
    return "\n".join([*heard, str(rows), *(part.decode() for part in server.container.get_logs())])


# Keys, and what the provider does with them; each ends up in some message unless it is kept out.
KEYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "echoed": (SECRET, {"echo_authorization": True}),
    "echoed by a refusal": (SECRET, {"status": 400, "body": {"error": {"message": f"no text for {SECRET}"}}}),
    "echoed as text": (SECRET, {"status": 500, "body": f"<html>{SECRET}</html>"}),
    "echoed at the end of much text": (SECRET, {"status": 500, "body": "x" * 9_980 + SECRET}),
    "echoed in an object": (SECRET, {"status": 403, "body": {"error": {"headers": [f"Bearer {SECRET}"]}}}),
    "with a second line": (f"{SECRET}\nsk-other", None),
    "with a typographic dash": (f"{SECRET}\u2013", None),
    "with quotes": (f'{SECRET}"\\/', {"status": 401, "body": json.dumps({"error": f'{SECRET}"\\/'})}),
}


@pytest.mark.parametrize("case", KEYS)
@pytest.mark.parametrize("door", ["process", "work", "embed"])
def test_a_key_is_never_seen(
    documents: Connection, api: FakeApi, server: Server, connect: Connect, case: str, door: str
) -> None:
    key, fault = KEYS[case]
    path = f"/tmp/key_{documents.info.dbname}"
    put_text(server, path, key)
    heard: list[str] = []
    documents.add_notice_handler(lambda d: heard.append(f"{d.message_primary} {d.message_hint} {d.message_detail}"))
    documents.execute("SELECT autoembed.alter_model('text-embedding-3-small', api_key => %s)", [f"file:{path}"])
    api.behave(faults=[{**fault, "times": "forever"}] if fault else [])
    insert(documents, "one", "two")
    if door == "process":
        heard.append(str(process(documents)))
        heard.append(str(process(documents)))
    elif door == "work":
        with running_lanes(documents, connect) as [lane]:
            wait_until(lambda: documents.execute("SELECT FROM autoembed.model_rest").fetchall())
        assert lane.error is None
    else:
        with pytest.raises(Exception, match="gave no embedding") as caught:
            documents.execute("SELECT autoembed.embed('a question')")
        heard.append(str(caught.value))

    said = everything_said(documents, server, heard)

    assert SECRET[:16] not in said
    assert base64.b64encode(SECRET.encode()).decode()[:16] not in said
    # Rows of a request that failed may share a message.
    assert waiting(documents) in (1, 2)


@pytest.mark.parametrize("fault", ["nan", "infinity"])
def test_a_vector_that_is_not_finite_fails_its_row_alone(documents: Connection, api: FakeApi, fault: str) -> None:
    api.behave(faults=[{fault: True, "match": "poison", "times": "forever"}])
    insert(documents, *[f"text {n}" for n in range(15)], "poison", "last")

    counts, errors = process(documents)

    assert counts == Row(17, 16, 0, 1)
    assert errors == ["the provider answered with a vector that is not finite"]
    assert [id for id, vector in stored(documents).items() if vector is None] == [16]
    assert documents.execute("SELECT key, error_class FROM autoembed.failed").fetchall() == [("[16]", "row")]


# Section 4 of the design as a table: who is to blame, and whether it passes by itself.
PROVIDER_PASSES: list[dict[str, Any]] = [
    *({"status": status} for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)),
    {"status": 429, "retry_after": 30},
    {"close": True},
    {"cut_off": True},
    {"hang": True},
    {"slow_body": 30},
    {"not_json": True},
    {"wrong_count": True},
    {"invalid_base64": True},
]
PROVIDER_STAYS: list[dict[str, Any]] = [
    *({"status": status} for status in (401, 402, 403, 404, 405, 410)),
    {"status": 429, "body": {"error": {"message": "You exceeded your quota.", "code": "insufficient_quota"}}},
    {"redirect": "http://127.0.0.1:8000/elsewhere/v1/embeddings"},
    {"wrong_dimensions": True},
]
ROW_STAYS: list[dict[str, Any]] = [{"status": status} for status in (400, 413, 414, 422)]


@pytest.mark.parametrize(
    ("fault", "needs_attention"),
    [*((fault, False) for fault in PROVIDER_PASSES), *((fault, True) for fault in PROVIDER_STAYS)],
    ids=str,
)
def test_trouble_of_the_provider_rests_the_model_and_spends_no_attempt(
    documents: Connection, api: FakeApi, fault: dict[str, Any], needs_attention: bool
) -> None:
    insert(documents, "one", "two")
    api.behave(faults=[{**fault, "times": "forever"}])
    queue = (
        "SELECT read_ct, coalesce(message ->> 'attempts', '0') AS attempts FROM pgmq.q_embedding_jobs,"
        " jsonb_array_elements(coalesce(message -> 'keys', '[1]'))"
    )

    # More often than a row has attempts.
    for failures in range(1, 8):
        counts, errors = process(documents, "timeout_milliseconds => 300")
        assert counts.completed == counts.failed == 0
        assert counts.retried == len(errors) >= 1
        [rest] = documents.execute(
            "SELECT failures, needs_attention, until > clock_timestamp() AS rests, reason FROM autoembed.model_rest"
        ).fetchall()
        assert (rest.failures, rest.needs_attention, rest.rests) == (failures, needs_attention, True)
        assert rest.reason in errors
        assert process(documents)[0].read == 0
        documents.execute("UPDATE autoembed.model_rest SET until = clock_timestamp()")
    assert documents.execute(queue).fetchall() == [(0, "0"), (0, "0")]
    assert documents.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)

    api.behave()
    process(documents)
    process(documents)
    assert documents.execute("SELECT count(*) FROM autoembed.model_rest").fetchone() == (0,)
    assert is_settled(documents)


@pytest.mark.parametrize("fault", ROW_STAYS, ids=str)
def test_trouble_of_a_row_fails_that_row_and_no_model_rests(
    documents: Connection, api: FakeApi, fault: dict[str, Any]
) -> None:
    insert(documents, "one", "poison", "three")
    api.behave(faults=[{**fault, "match": "poison", "times": "forever"}])

    counts, _ = process(documents)

    assert counts == Row(3, 2, 0, 1)
    assert documents.execute("SELECT key, error_class, attempts FROM autoembed.failed").fetchall() == [
        ("[2]", "row", 1)
    ]
    assert documents.execute("SELECT count(*) FROM autoembed.model_rest").fetchone() == (0,)
    assert is_settled(documents)


@pytest.mark.parametrize(
    ("errcode", "attempts"),
    [("lock_not_available", 0), ("deadlock_detected", 1), ("serialization_failure", 1), ("data_exception", 1)],
)
def test_an_error_of_the_content_function_spends_an_attempt_and_a_lock_none(
    documents: Connection, errcode: str, attempts: int
) -> None:
    documents.execute(
        "CREATE OR REPLACE FUNCTION embedding_input(doc documents) RETURNS text LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{errcode}'; END $$"
    )
    insert(documents, "one")

    counts, errors = process(documents)

    assert (counts, errors) == (Row(1, 0, 1, 0), ["no"])
    assert documents.execute("SELECT message ->> 'attempts' FROM pgmq.q_embedding_jobs").fetchall() == [
        (str(attempts),)
    ]


@pytest.mark.parametrize("character", ["a", "é", "語", "😀", "👩‍👩‍👧", "\U00020000", "ﷺ"])
@pytest.mark.parametrize("limit", [3, 8, 100])
def test_a_text_that_is_too_long_is_cut_at_a_character(
    documents: Connection, api: FakeApi, character: str, limit: int
) -> None:
    documents.execute("SELECT autoembed.alter_model('text-embedding-3-small', max_tokens_per_input => %s)", [limit])
    api.behave(max_tokens_per_input=limit)
    documents.execute(
        "CREATE OR REPLACE FUNCTION embedding_input(doc documents) RETURNS text LANGUAGE sql AS 'SELECT doc.content'"
    )
    text = character * 1000
    insert(documents, text, "x")

    counts, _ = process(documents)

    assert counts == Row(2, 2, 0, 0)
    [sent] = [each for each in api.texts() if each != "x"]
    assert sent
    assert text.startswith(sent)
    assert tokens_in(sent) <= limit
    assert documents.execute("SELECT key, truncated FROM autoembed.embedded ORDER BY key").fetchall() == [
        ("[1]", True),
        ("[2]", False),
    ]
