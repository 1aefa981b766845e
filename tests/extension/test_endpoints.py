"""Where models may be, and where their keys and certificates are found, seen from SQL."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import psycopg
import pytest

from fake_api import FakeApi
from harness import Connection, Server, assert_fresh, insert, put_file, warnings_of

CREATE_OWN = "SELECT autoembed.create_model('own', 'openai', 3, base_url => 'http://embeddings.example:8080/v1')"
REASON = "would be called without encryption"


def rest(db: Connection) -> tuple[bool, str] | None:
    return db.execute("SELECT needs_attention, reason FROM autoembed.model_rest").fetchone()


def test_http_to_another_machine_is_an_error_until_an_administrator_allows_it(db: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=REASON) as caught:
        db.execute(CREATE_OWN)
    assert caught.value.diag.message_hint is not None
    assert "SELECT autoembed.allow_http_host('embeddings.example')." in caught.value.diag.message_hint

    db.execute("SELECT autoembed.allow_http_host('Embeddings.Example.')")
    db.execute("SELECT autoembed.allow_http_host('fd12::7')")
    db.execute(CREATE_OWN)

    db.execute("SELECT autoembed.alter_model('own', base_url => 'http://[fd12::7]/v1')")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=REASON):
        db.execute("SELECT autoembed.alter_model('own', base_url => 'http://other.example/v1')")


def test_a_host_that_is_allowed_no_more_is_not_called_by_a_lane(documents: Connection) -> None:
    documents.execute("SELECT autoembed.allow_http_host('embeddings.example')")
    documents.execute(
        "SELECT autoembed.alter_model('text-embedding-3-small', base_url => 'http://embeddings.example:8080/v1')"
    )
    documents.execute("SELECT autoembed.allow_http_host('embeddings.example', false)")
    insert(documents, "one")

    documents.execute("SELECT autoembed.process()")

    found = rest(documents)
    assert found is not None
    assert found == (True, f'"http://embeddings.example:8080/v1/embeddings" {REASON}')


@pytest.mark.parametrize(
    "base_url",
    ["http://169.254.169.254/latest", "https://[fd00:ec2::254]/v1", "https://metadata.google.internal/v1"],
)
def test_a_metadata_service_is_an_error_whatever_is_allowed(db: Connection, base_url: str) -> None:
    db.execute("SELECT autoembed.allow_http_host('169.254.169.254')")

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="never called"):
        db.execute("SELECT autoembed.create_model('own', 'openai', 3, base_url => %s)", [base_url])


@pytest.mark.parametrize("host", ["http://embeddings.example", "embeddings.example:8080", "", "a b", "a/b", None])
def test_what_is_no_host_is_not_allowed(db: Connection, host: str | None) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="is not the name or address of a host"):
        db.execute("SELECT autoembed.allow_http_host(%s)", [host])


def test_only_an_administrator_allows_a_host(
    db: Connection, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    clerk = role("clerk")
    db.execute(f"GRANT USAGE ON SCHEMA autoembed TO {clerk}")

    for call in ("allow_http_host('embeddings.example')", "_model_facts(NULL)"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connect(user=clerk).execute(f"SELECT autoembed.{call}")


# --- certificates ------------------------------------------------------------------------------------


def test_a_model_with_a_ca_file_trusts_a_private_authority(
    server: Server, db: Connection, api: FakeApi, tmp_path: Path
) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=own -addext subjectAltName=IP:127.0.0.1"
    for name in (f"{api.tenant}.pem", f"{api.tenant}.key"):
        command += f" {'-out' if name.endswith('pem') else '-keyout'} {tmp_path / name}"
    subprocess.run(command.split(), check=True, capture_output=True)
    for path in tmp_path.iterdir():
        path.chmod(0o644)
        put_file(server.container, path, "/tmp")
    ca_file = f"/tmp/{api.tenant}.pem"
    port = api.listen(tls_cert=ca_file, tls_key=f"/tmp/{api.tenant}.key")
    base_url = f"https://127.0.0.1:{port}/{api.tenant}/v1"
    db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [base_url])

    with pytest.raises(psycopg.Error, match="certificate verify failed"):
        db.execute("SELECT autoembed.embed('a')")
    db.execute(
        "SELECT autoembed.alter_model('text-embedding-3-small', options => jsonb_build_object('ca_file', %s::text))",
        [ca_file],
    )

    assert db.execute("SELECT vector_dims(autoembed.embed('a'))").fetchone() == (1536,)


# --- the vault ---------------------------------------------------------------------------------------

VAULT = """
CREATE SCHEMA vault;
CREATE TABLE vault.secrets (name text, secret text);
CREATE VIEW vault.decrypted_secrets AS SELECT s.name, reverse(s.secret) AS decrypted_secret FROM vault.secrets AS s;
"""
KEY = "sk-vault-marked"


def use_vault(db: Connection) -> list[str]:
    """Has the model take its key from the vault; returns what it is warned of."""
    with warnings_of(db) as heard:
        db.execute("SELECT autoembed.alter_model('text-embedding-3-small', api_key => 'vault:openai')")
    return [warning for warning in heard if "cannot be used yet" in warning]


def put_key(db: Connection, key: str = KEY) -> None:
    db.execute("DELETE FROM vault.secrets")
    db.execute("INSERT INTO vault.secrets VALUES ('openai', reverse(%s))", [key])


def test_a_key_is_read_from_the_vault_for_every_request_and_kept_nowhere(documents: Connection, api: FakeApi) -> None:
    documents.execute(VAULT)
    put_key(documents)
    assert use_vault(documents) == []

    insert(documents, "one")
    documents.execute("SELECT autoembed.process()")
    documents.execute("SELECT autoembed.embed('query')")
    put_key(documents, "sk-vault-new")
    insert(documents, "two")
    documents.execute("SELECT autoembed.process()")

    assert_fresh(documents)
    assert [request["key_sha256"] for request in api.log()] == [
        sha256(key.encode()).hexdigest() for key in (KEY, KEY, "sk-vault-new")
    ]
    for (table,) in documents.execute(
        "SELECT c.oid::regclass::text FROM pg_class AS c"
        " WHERE c.relnamespace IN ('autoembed'::regnamespace, 'pgmq'::regnamespace) AND c.relkind IN ('r', 'v')"
    ).fetchall():
        assert "sk-vault" not in str(documents.execute(f"SELECT string_agg(t::text, ' ') FROM {table} AS t").fetchone())


def test_a_key_that_a_provider_echoes_is_in_no_error(documents: Connection, api: FakeApi) -> None:
    documents.execute(VAULT)
    put_key(documents)
    use_vault(documents)
    api.behave(faults=[{"echo_authorization": True, "times": "forever"}])
    insert(documents, "one")

    report = documents.execute("SELECT failed_jobs FROM autoembed.process()").fetchone()
    with pytest.raises(psycopg.Error) as caught:
        documents.execute("SELECT autoembed.embed('query')")

    assert "Authorization: ***" in str(report)
    assert "Authorization: ***" in str(caught.value)
    assert KEY not in f"{report} {caught.value} {rest(documents)}"


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        ("", "this database has no Vault"),
        (VAULT, 'the vault has no secret "openai"'),
        (VAULT + "INSERT INTO vault.secrets VALUES ('openai', '')", 'the vault has no secret "openai"'),
        (
            VAULT + "INSERT INTO vault.secrets VALUES ('openai', 'dekram-ks');"
            "CREATE OR REPLACE VIEW vault.decrypted_secrets AS"
            " SELECT s.name, reverse(s.secret)::integer::text AS decrypted_secret FROM vault.secrets AS s",
            'the vault gives no secret "openai" (SQLSTATE 22P02)',
        ),
    ],
)
def test_a_key_that_the_vault_does_not_give_is_a_warning_at_once_and_holds_up_no_other_model(
    documents: Connection, prepare: str, reason: str
) -> None:
    if prepare:
        documents.execute(prepare)

    [warning] = use_vault(documents)
    assert reason in warning
    assert "sk-marked" not in warning

    insert(documents, "one")
    documents.execute("CREATE TABLE notes (id integer PRIMARY KEY, content text, embedding halfvec(384))")
    documents.execute("CREATE FUNCTION note(n notes) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT n.content'")
    documents.execute(
        "CREATE TRIGGER embed AFTER INSERT ON notes FOR EACH ROW"
        " EXECUTE FUNCTION autoembed.queue_embeddings('note', 'embedding')"
    )
    documents.execute(
        "UPDATE autoembed.pipeline SET model = 'all-MiniLM-L6-v2' WHERE table_id = 'notes'::regclass;"
        "INSERT INTO notes VALUES (1, 'local')"
    )
    report = documents.execute("SELECT completed, retried, failed FROM autoembed.process()").fetchone()

    assert report == (1, 1, 0)
    found = rest(documents)
    assert found is not None
    assert found[0]
    assert reason in found[1]


def test_a_view_that_is_not_a_superusers_is_not_taken_for_the_vault(
    db: Connection, api: FakeApi, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    mallory = role("mallory")
    db.execute(f"GRANT CREATE ON DATABASE {db.info.dbname} TO {mallory}")
    connect(user=mallory).execute(
        VAULT + "CREATE FUNCTION vault.note() RETURNS text LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO vault.secrets VALUES ('ran as', current_user); RETURN 'sk-x'; END $$;"
        "CREATE OR REPLACE VIEW vault.decrypted_secrets AS SELECT 'openai' AS name, vault.note() AS decrypted_secret"
    )

    [warning] = use_vault(db)

    assert "this database has no Vault: no view vault.decrypted_secrets that belongs to a superuser" in warning
    assert db.execute("TABLE vault.secrets").fetchall() == []
