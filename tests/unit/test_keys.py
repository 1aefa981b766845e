"""References to keys, found or not; no error may repeat a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoembed import keys
from autoembed.errors import ProviderTrouble
from autoembed.model import Model


def model(reference: str | None, **vault: str) -> Model:
    """vault: what the database has found of the reference."""
    secrets = {reference or "": vault} if vault else {}
    return Model("m", "openai", "m", 3, api_key=reference, vault_secrets=secrets)


def with_headers(headers: dict[str, str], **secrets: dict[str, str | None]) -> Model:
    found = {f"vault:{name}": secret for name, secret in secrets.items()}
    return Model("m", "openai", "m", 3, options={"extra_headers": headers}, vault_secrets=found)


def test_no_reference_is_no_key() -> None:
    assert keys.resolve(model(None)) is None


@pytest.mark.parametrize("value", ["sk-right", "  sk-right\n", "sk-right\r\n"])
def test_a_key_comes_from_the_environment_without_blanks_around_it(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SOME_KEY", value)

    assert keys.resolve(model("env:SOME_KEY")) == "sk-right"


@pytest.mark.parametrize("content", ["sk-right", "sk-right\n", "\n sk-right \r\n"])
def test_a_key_comes_from_a_file_without_blanks_around_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a:key"
    path.write_text(content)

    assert keys.resolve(model(f"file:{path}")) == "sk-right"


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)

    with pytest.raises(ProviderTrouble, match="SOME_KEY is not set") as caught:
        keys.resolve(model("env:SOME_KEY"))

    assert caught.value.permanent


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfesk-secret", "cannot be read (not a text file)"),
    ],
)
def test_a_file_without_a_key_is_named_with_the_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ProviderTrouble) as caught:
        keys.resolve(model(f"file:{path}"))

    assert str(caught.value) == f"there is no API key: the file {path} {reason}"
    assert caught.value.permanent


def test_a_folder_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(ProviderTrouble, match="Is a directory"):
        keys.resolve(model(f"file:{tmp_path}"))


def test_a_changed_file_gives_the_new_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sk-old")
    keys.resolve(model(f"file:{path}"))
    path.write_text("sk-new")

    assert keys.resolve(model(f"file:{path}")) == "sk-new"


# --- the vault ---------------------------------------------------------------------------------------


def test_a_key_comes_from_the_vault_as_the_database_has_read_it() -> None:
    assert keys.resolve(model("vault:openai", vault_key="sk-right\n")) == "sk-right"


def test_a_key_comes_from_the_secret_of_its_own_name() -> None:
    secrets: dict[str, dict[str, str | None]] = {"vault:a": {"vault_key": "sk-a"}, "vault:b": {"vault_key": "sk-b"}}

    assert keys.resolve(Model("m", "openai", "m", 3, api_key="vault:b", vault_secrets=secrets)) == "sk-b"


def test_a_vault_that_was_not_asked_has_no_key() -> None:
    with pytest.raises(ProviderTrouble, match='there is no API key: the vault has no secret "openai"'):
        keys.resolve(model("vault:openai"))


def test_a_vault_without_the_key_says_why() -> None:
    with pytest.raises(ProviderTrouble) as caught:
        keys.resolve(model("vault:openai", vault_fault='the vault has no secret "openai"'))

    assert str(caught.value) == 'there is no API key: the vault has no secret "openai"'
    assert caught.value.permanent


def test_a_model_never_shows_its_key_and_is_the_same_with_another() -> None:
    old, new = model("vault:openai", vault_key="sk-old"), model("vault:openai", vault_key="sk-new")

    assert "sk-" not in f"{old} {old!r}"
    assert old == new
    assert len({old, new}) == 1


def test_a_secret_that_is_no_key_is_not_repeated() -> None:
    with pytest.raises(ProviderTrouble, match="what vault:openai holds is no API key") as caught:
        keys.resolve(model("vault:openai", vault_key="two\nlines"))

    assert "lines" not in str(caught.value).replace("not one line of ASCII", "")
    assert caught.value.permanent


# --- the server's own secrets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["PGPASSWORD", "PGPASSFILE", "PGDATA", "pgpassword", "POSTGRES_PASSWORD", "POSTGRES_USER", "PG"]
)
def test_a_variable_of_the_server_itself_is_no_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "sk-secret")

    with pytest.raises(ProviderTrouble, match=f"{name} is the database server's own") as caught:
        keys.resolve(model(f"env:{name}"))

    assert caught.value.permanent


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "MY_PGPASSWORD", "P", "EMBEDDINGS_POSTGRES"])
def test_any_other_variable_may_hold_a_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "sk-right")

    assert keys.resolve(model(f"env:{name}")) == "sk-right"


@pytest.mark.parametrize("name", [".pgpass", "password"])
def test_a_file_of_the_server_itself_is_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    path.write_text("sk-secret")
    monkeypatch.setenv("POSTGRES_PASSWORD_FILE", str(tmp_path / "password"))

    with pytest.raises(ProviderTrouble, match="is the database server's own") as caught:
        keys.resolve(model(f"file:{path}"))

    assert caught.value.permanent
    assert "sk-secret" not in str(caught.value)


# --- headers -----------------------------------------------------------------------------------------


def test_values_of_headers_may_be_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("sk-file\n")
    monkeypatch.setenv("SOME_KEY", "sk-env")
    headers = {
        "x-team": "search",
        "x-note": "environment: none",
        "x-env-key": "env:SOME_KEY",
        "x-file-key": f"file:{tmp_path / 'key'}",
        "x-vault-key": "vault:gateway",
    }

    assert keys.resolve_headers(with_headers(headers, gateway={"vault_key": "sk-vault"})) == {
        "x-team": "search",
        "x-note": "environment: none",
        "x-env-key": "sk-env",
        "x-file-key": "sk-file",
        "x-vault-key": "sk-vault",
    }
    assert keys.resolve_headers(model(None)) == {}


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("env:SOME_KEY", "the environment variable SOME_KEY is not set for the database server"),
        ("env:PGPASSWORD", "PGPASSWORD is the database server's own"),
        ("file:/nowhere/key", "the file /nowhere/key cannot be read (No such file or directory)"),
        ("vault:gateway", "there is no vault here"),
        ("vault:other", 'the vault has no secret "other"'),
    ],
)
def test_a_header_whose_value_cannot_be_had_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, reference: str, reason: str
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)

    with pytest.raises(ProviderTrouble) as caught:
        keys.resolve_headers(with_headers({"x-key": reference}, gateway={"vault_fault": "there is no vault here"}))

    assert str(caught.value) == f"there is no value for the header x-key: {reason}"
    assert caught.value.permanent


@pytest.mark.parametrize(
    ("value", "refers"),
    [
        ("env:NAME", True),
        ("file:/run/key", True),
        ("vault:two\nlines", True),
        ("env:", False),
        ("search", False),
        ("ENV:NAME", False),
        ("Bearer env:NAME", False),
        ("https://host", False),
    ],
)
def test_a_reference_says_where_a_secret_is(value: str, refers: bool) -> None:
    assert keys.is_reference(value) is refers
