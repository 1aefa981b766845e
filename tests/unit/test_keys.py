"""References to keys, found or not; no error may repeat a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoembed import keys
from autoembed.errors import ProviderTrouble
from autoembed.model import Model


def model(reference: str | None, **vault_secret: str) -> Model:
    """vault_secret: what the database has read of the vault: vault_key or vault_fault."""
    secrets = {} if reference is None else {reference: vault_secret}
    return Model("m", "openai", "m", 3, api_key=reference, vault_secrets=secrets)


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
