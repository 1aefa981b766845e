"""No key is shown, whatever a provider answers; and no tenant reads another's text."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from extension.hostile.raw_api import ECHOES
from extension.hostile.tenants import ENABLE_COLUMNS, NOTES, Tenant
from fake_api import FakeApi
from harness import Connection, Server
from waiting import wait_until

MakeModel = Callable[..., None]


@pytest.fixture
def secret(db: Connection) -> tuple[str, str]:
    """A marked key, and the file that holds it."""
    key = f"sk-{uuid.uuid4().hex}{uuid.uuid4().hex}"
    path = f"/tmp/key_{uuid.uuid4().hex[:8]}"
    db.execute(f"COPY (SELECT '{key}') TO '{path}'")
    return key, f"file:{path}"


# Where the key travels.
CARRIERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "api_key": lambda reference: {"api_key": reference},
    "extra_headers": lambda reference: {"options": {"extra_headers": {"X-Auth-Token": reference}}},
}


@pytest.mark.parametrize(
    ("case", "carrier"),
    [*((case, "api_key") for case in ECHOES), ("status-line", "extra_headers"), ("escaped", "extra_headers")],
)
def test_a_key_is_shown_nowhere_whatever_the_answer_is(
    server: Server,
    db: Connection,
    mallory: Tenant,
    raw_model: MakeModel,
    secret: tuple[str, str],
    case: str,
    carrier: str,
) -> None:
    key, reference = secret
    raw_model("echoing", f"echo/{case}", **CARRIERS[carrier](reference))
    mallory.run(NOTES, ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'echoing'"))
    mallory.run("INSERT INTO notes VALUES (1, 'a note')")
    said: list[object] = []
    for session in (db, mallory.session):
        session.add_notice_handler(lambda d: said.append(f"{d.message_primary} {d.message_detail} {d.message_hint}"))

    said += db.execute("SELECT * FROM autoembed.process()").fetchall()
    try:
        said += mallory.session.execute("SELECT autoembed.embed('a question', 'echoing')").fetchall()
    except psycopg.Error as error:
        said += [error, error.diag.message_detail, error.diag.message_hint, error.diag.context]
    for relation in ("status", "failed"):
        said += mallory.session.execute(f"SELECT x::text FROM autoembed.{relation} AS x").fetchall()
    for relation in ("model", "model_rest", "status", "failed", "failure", "usage"):
        said += db.execute(f"SELECT x::text FROM autoembed.{relation} AS x").fetchall()
    said += db.execute("SELECT x::text FROM pgmq.q_embedding_jobs AS x").fetchall()
    said += db.execute("SELECT * FROM autoembed.doctor()").fetchall()
    said += [part.decode() for part in server.container.get_logs()]

    # Each eight characters of it.
    words = "\n".join(map(str, said))
    for form in (key, base64.b64encode(f"Bearer {key}".encode()).decode()):
        assert [form[n : n + 8] for n in range(3, len(form) - 8) if form[n : n + 8] in words] == []


# A provider's own words on a text of bob's.
QUOTING: list[dict[str, Any]] = [
    {"status": 500, "body": {"error": {"message": "bad input: bob's diagnosis"}}, "retry_after": 30},
    {"status": 401, "body": {"error": {"message": "not for bob's diagnosis"}}},
    {"status": 429, "body": "slow down, bob's diagnosis", "retry_after": 30},
    {"status": 404, "body": "<html>bob's diagnosis</html>"},
]


@pytest.mark.parametrize("fault", QUOTING, ids=lambda fault: str(fault["status"]))
def test_a_tenant_reads_no_words_of_a_provider_that_quote_anothers_text(
    db: Connection,
    mallory: Tenant,
    bob: Tenant,
    nobody: Connection,
    api: FakeApi,
    fault: dict[str, Any],
) -> None:
    db.execute("SELECT autoembed.grant_monitor(%s)", [nobody.info.user])
    api.behave(faults=[{**fault, "times": "forever"}])
    bob.run("SELECT autoembed.alter_pipeline('letters', model => 'slow')")
    bob.run("UPDATE letters SET content = 'bob''s diagnosis'")
    mallory.run(NOTES, ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'slow'"))

    db.execute("SELECT autoembed.process()")
    mallory.run("INSERT INTO notes VALUES (1, 'a note')")
    db.execute("SELECT autoembed.process()")

    seen = {
        session: str(session.execute("SELECT x::text FROM autoembed.status AS x").fetchall())
        for session in (db, nobody, mallory.session, bob.session)
    }
    assert "diagnosis" in seen[db]
    assert "diagnosis" in seen[nobody]
    for session in (mallory.session, bob.session):
        assert "diagnosis" not in seen[session]
        assert f"its provider is in trouble (HTTP {fault['status']})" in seen[session]
    assert "diagnosis" not in str(mallory.session.execute("SELECT x::text FROM autoembed.failed AS x").fetchall())
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        mallory.session.execute("TABLE autoembed.model_rest")


def test_a_scan_that_fails_is_told_to_its_owner_alone(
    db: Connection, mallory: Tenant, bob: Tenant, nobody: Connection
) -> None:
    db.execute("SELECT autoembed.grant_monitor(%s)", [nobody.info.user])
    bob.run("UPDATE letters SET content = 'a secret text'")

    def process_until_settled() -> None:
        scans = "SELECT FROM autoembed.backfill"
        wait_until(lambda: db.execute("SELECT FROM autoembed.process()") and not db.execute(scans).fetchall())

    process_until_settled()
    bob.run("SELECT autoembed.reembed('letters', condition => 'content::int > 0')")
    process_until_settled()

    views = [f"SELECT x::text FROM autoembed.{view} AS x" for view in ("status", "failed")]
    assert "a secret text" in str([bob.session.execute(view.encode()).fetchall() for view in views])
    for session in (mallory.session, nobody):
        assert "a secret text" not in str([session.execute(view.encode()).fetchall() for view in views])


# Definitions that would put a secret into a table, and so into dumps.
BY_VALUE: dict[str, dict[str, Any]] = {
    **{
        f"header {name}": {"options": {"extra_headers": {name: "s3cr3t"}}}
        for name in (
            "Ocp-Apim-Subscription-Key",
            "X-Auth-Token",
            "cf-aig-authorization",
            "x-portkey-api-key",
            "X-Amz-Security-Token",
            "Private-Token",
        )
    },
    "field api_key": {"options": {"extra_body": {"api_key": "s3cr3t"}}},
    "field deep down": {"options": {"extra_body": {"proxy": [{"authorization": "s3cr3t"}]}}},
    "query": {"base_url": "https://embeddings.example/v1?key=s3cr3t"},
    "query of another name": {"base_url": "https://embeddings.example/v1?sig=s3cr3t&x=1"},
    "fragment": {"base_url": "https://embeddings.example/v1#key=s3cr3t"},
    "user": {"base_url": "https://user:s3cr3t@embeddings.example/v1"},
}


@pytest.mark.parametrize(
    ("call", "definition"),
    [
        *(("create", definition) for definition in BY_VALUE),
        *(("alter", definition) for definition in ("header X-Auth-Token", "field deep down", "query")),
    ],
)
def test_a_secret_by_value_is_refused_and_not_repeated(db: Connection, call: str, definition: str) -> None:
    named = {"base_url": "https://embeddings.example/v1", "api_key": "env:OPENAI_API_KEY"}
    if call == "alter":
        db.execute(
            "SELECT autoembed.create_model('m', 'openai', 8, base_url => %(base_url)s, api_key => %(api_key)s)", named
        )
    given: dict[str, Any] = {**(named if call == "create" else {}), **BY_VALUE[definition]}
    if "options" in given:
        given["options"] = Jsonb(given["options"])
    arguments = ", ".join(f"{name} => %({name})s" for name in given)
    begin = "create_model('m', 'openai', 8" if call == "create" else "alter_model('m'"

    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        db.execute(f"SELECT autoembed.{begin}, {arguments})".encode(), given)

    assert "s3cr3t" not in f"{caught.value} {caught.value.diag.message_hint} {caught.value.diag.message_detail}"
    assert "s3cr3t" not in str(db.execute("SELECT m::text FROM autoembed.model AS m").fetchall())


@pytest.mark.parametrize("kind", ["env", "file", "vault"])
def test_a_header_takes_a_reference_for_a_value(
    db: Connection, mallory: Tenant, raw_model: MakeModel, kind: str
) -> None:
    db.execute("COPY (SELECT 'sk-test') TO '/tmp/token'")
    db.execute(
        """CREATE SCHEMA vault;
           CREATE VIEW vault.decrypted_secrets AS SELECT 'token' AS name, 'sk-test' AS decrypted_secret"""
    )
    reference = {"env": "env:OPENAI_API_KEY", "file": "file:/tmp/token", "vault": "vault:token"}[kind]
    raw_model("guarded", "token", options={"extra_headers": {"X-Auth-Token": reference}})
    mallory.run(NOTES, ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'guarded'"))
    mallory.run("INSERT INTO notes VALUES (1, 'a note')")

    db.execute("SELECT autoembed.process()")

    assert mallory.session.execute("SELECT embedding IS NOT NULL FROM notes").fetchall() == [(True,)]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_the_servers_own_password_is_sent_to_no_provider(
    db: Connection, api: FakeApi, raw_model: MakeModel, carrier: str
) -> None:
    try:
        raw_model("curious", "token", **CARRIERS[carrier]("env:POSTGRES_PASSWORD"))
        db.execute("SELECT autoembed.alter_model('curious', base_url => %s)", [api.base_url])
        with pytest.raises(psycopg.Error, match="POSTGRES_PASSWORD"):
            db.execute("SELECT autoembed.embed('a question', 'curious')")
    except psycopg.errors.InvalidParameterValue as error:
        assert "POSTGRES_PASSWORD" in str(error)

    assert api.counters()["requests"] == 0
