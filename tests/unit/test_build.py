"""build.py: what it refuses, that nothing is missing, and that the tree holds what it makes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import build
import pytest


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tree of sources that build.py takes for the project's."""
    for path, text in {
        "plpy_src/package/__init__.py": '"""A package."""\n',
        "plpy_src/package/module.py": "VALUE = r'\\d' + \"\\n\"\n",
        "plpy_src/package/inner/__init__.py": "",
        "sql/10_first.sql": "-- @BUILD@\n{\n@PYTHON_SOURCES@\n}\n",
        "sql/20_second.sql": "-- last, @BUILD@\n",
        "extension/autoembed.control": "comment = 'x'\ndefault_version = '1.2.3'\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "plpy_src")
    return tmp_path


def hash_in(sql: str) -> str:
    found = re.search("last, ([0-9a-f]{16})$", sql, re.MULTILINE)
    assert found
    return found[1]


def test_the_generated_sql_in_the_tree_is_what_build_makes() -> None:
    generated = {path.name: path.read_text() for path in (build.ROOT / "extension").glob("autoembed--*.sql")}

    assert generated[f"autoembed--{build.version()}.sql"] == build.extension_sql()


def test_the_generated_sql_carries_every_module_of_the_tree() -> None:
    sources = build.python_sources()

    assert ast.literal_eval("{" + build.literal(sources) + "}") == sources
    assert build.literal(sources) in build.extension_sql()
    assert {"autoembed", "autoembed.worker", "autoembed.providers", "autoembed.providers.openai"} <= sources.keys()
    assert len(sources) == len(list(build.PACKAGE.rglob("*.py")))


def test_no_placeholder_is_left_in_the_generated_sql() -> None:
    assert not re.findall("@[A-Z_]+@", build.extension_sql())


def test_modules_have_their_dotted_names(tree: Path) -> None:
    assert list(build.python_sources()) == ["package", "package.inner", "package.module"]


@pytest.mark.parametrize(
    "forbidden",
    ["@extschema@", "@extschema:vector@", "@extowner@", "MODULE_PATHNAME", "$autoembed_python$", "'''", "if x:\n\ty"],
)
def test_a_source_that_the_generated_sql_cannot_carry_is_refused(tree: Path, forbidden: str) -> None:
    (tree / "plpy_src/package/module.py").write_text(f"# {forbidden}\n")

    with pytest.raises(ValueError, match=r"^package\.module contains "):
        build.extension_sql()


def test_sql_files_come_in_the_order_of_their_names(tree: Path) -> None:
    sql = build.extension_sql()

    assert sql.startswith("-- Made by build.py")
    assert sql.index("'''VALUE") < sql.index("-- last")


@pytest.mark.parametrize("path", ["plpy_src/package/module.py", "plpy_src/package/__init__.py", "sql/20_second.sql"])
def test_the_build_hash_changes_with_every_source(tree: Path, path: str) -> None:
    before = hash_in(build.extension_sql())
    again = hash_in(build.extension_sql())
    (tree / path).write_text("# other\n" + (tree / path).read_text())
    after = hash_in(build.extension_sql())

    assert before == again
    assert before != after


def test_the_build_hash_changes_when_a_module_is_renamed(tree: Path) -> None:
    before = hash_in(build.extension_sql())
    (tree / "plpy_src/package/module.py").rename(tree / "plpy_src/package/other.py")

    assert hash_in(build.extension_sql()) != before


def test_the_script_is_named_after_the_version_in_control(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main() == 0

    assert (tree / "extension/autoembed--1.2.3.sql").read_text() == build.extension_sql()
    assert capsys.readouterr().out == "extension/autoembed--1.2.3.sql\n"


def test_a_control_file_without_version_is_refused(tree: Path) -> None:
    (tree / "extension/autoembed.control").write_text("comment = 'x'\n")

    with pytest.raises(ValueError, match="default_version"):
        build.version()
