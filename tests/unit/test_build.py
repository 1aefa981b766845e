"""build.py: what it refuses, that nothing is missing, and how updates are put together."""

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
        "sql/head.sql": "-- head\n",
        "sql/state/10_tables.sql": "-- tables\n",
        "sql/code/10_first.sql": "-- @BUILD@\n{\n@PYTHON_SOURCES@\n}\n",
        "sql/code/20_second.sql": "CASE @TEMPLATES@ END\n-- last, @BUILD@\n",
        "sql/templates/greet.sql": "-- Says it.\n-- Twice.\nSELECT '{{name}}', -- here\n    '{{name}}'\n",
        "sql/attach.sql": "-- attach\n",
        "sql/update.sql": "-- update\n",
        "sql/upgrade/1.0--1.1.sql": "-- from 1.0 to 1.1\n",
        "sql/upgrade/1.1--1.2.3.sql": "-- from 1.1 to 1.2.3\n",
        "extension/autoembed--1.0.sql": "",
        "extension/autoembed--1.1.sql": "",
        "extension/autoembed.control": "comment = 'x'\ndefault_version = '1.2.3'\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    return tmp_path


def install_script() -> str:
    return build.scripts()[f"autoembed--{build.version()}.sql"]


def hash_in(sql: str) -> str:
    found = re.search("last, ([0-9a-f]{16})$", sql, re.MULTILINE)
    assert found
    return found[1]


def test_the_generated_sql_carries_every_module_of_the_tree() -> None:
    sources = build.python_sources()

    assert ast.literal_eval("{" + build.python_literal(sources) + "}") == sources
    assert build.python_literal(sources) in install_script()
    assert {"autoembed", "autoembed.worker", "autoembed.providers", "autoembed.providers.openai"} <= sources.keys()
    assert len(sources) == len(list((build.ROOT / "plpy_src").rglob("*.py")))


def test_every_slot_of_a_template_is_in_double_braces_that_close() -> None:
    for name, text in build.templates().items():
        assert re.sub(r"\{\{[a-z_]+\}\}", "", text).count("{{") == 0, name


def test_no_placeholder_is_left_in_the_generated_sql() -> None:
    for name, text in build.scripts().items():
        assert not re.findall("@[A-Z_]+@", text), name


def test_modules_have_their_dotted_names(tree: Path) -> None:
    assert list(build.python_sources()) == ["package", "package.inner", "package.module"]


@pytest.mark.parametrize(
    "forbidden",
    ["@extschema@", "@extschema:vector@", "@extowner@", "MODULE_PATHNAME", "$autoembed_python$", "'''", "if x:\n\ty"],
)
def test_a_source_that_the_generated_sql_cannot_carry_is_refused(tree: Path, forbidden: str) -> None:
    (tree / "plpy_src/package/module.py").write_text(f"# {forbidden}\n")

    with pytest.raises(ValueError, match=r"^package\.module contains "):
        build.scripts()


@pytest.mark.parametrize("forbidden", ["$template$", "$templates$", "@BUILD@"])
def test_a_template_that_the_generated_sql_cannot_carry_is_refused(tree: Path, forbidden: str) -> None:
    (tree / "sql/templates/greet.sql").write_text(f"SELECT 1; {forbidden}\n")

    with pytest.raises(ValueError, match=r"^greet contains "):
        build.scripts()


def test_a_template_goes_without_the_comment_at_its_top(tree: Path) -> None:
    assert build.templates() == {"greet": "SELECT '{{name}}', -- here\n    '{{name}}'"}
    assert "WHEN 'greet' THEN $template$SELECT '{{name}}', -- here" in install_script()


def test_the_install_script_has_head_state_code_and_attach_in_this_order(tree: Path) -> None:
    sql = install_script()
    parts = ["-- Made by build.py", "-- head", "-- tables", "'''VALUE", "CASE", "-- last", "-- attach"]

    assert sorted(parts, key=sql.index) == parts
    assert sql.startswith("-- Made by build.py")


def test_an_update_goes_straight_from_each_released_version_to_the_present_one(tree: Path) -> None:
    scripts = build.scripts()

    assert scripts.keys() == {"autoembed--1.2.3.sql", "autoembed--1.0--1.2.3.sql", "autoembed--1.1--1.2.3.sql"}
    for name, steps in {
        "autoembed--1.0--1.2.3.sql": ["-- from 1.0 to 1.1", "-- from 1.1 to 1.2.3"],
        "autoembed--1.1--1.2.3.sql": ["-- from 1.1 to 1.2.3"],
    }.items():
        parts = ["-- head", *steps, "CASE", "-- attach"]
        assert sorted(parts, key=scripts[name].index) == parts
        assert "-- tables" not in scripts[name]


def test_a_released_version_without_a_way_to_the_present_one_is_refused(tree: Path) -> None:
    (tree / "sql/upgrade/1.1--1.2.3.sql").unlink()

    with pytest.raises(ValueError, match=r"sql/upgrade/ has no script that begins at version 1\.1"):
        build.scripts()


@pytest.mark.parametrize(
    "path",
    [
        "plpy_src/package/module.py",
        "plpy_src/package/__init__.py",
        "sql/code/20_second.sql",
        "sql/templates/greet.sql",
        "sql/attach.sql",
    ],
)
def test_the_build_hash_changes_with_every_source_of_what_is_run(tree: Path, path: str) -> None:
    before = hash_in(install_script())
    again = hash_in(install_script())
    (tree / path).write_text((tree / path).read_text() + "# other\n")
    after = hash_in(install_script())

    assert before == again
    assert before != after


def test_the_build_hash_changes_when_a_module_is_renamed(tree: Path) -> None:
    before = hash_in(install_script())
    (tree / "plpy_src/package/module.py").rename(tree / "plpy_src/package/other.py")

    assert hash_in(install_script()) != before


def test_an_installation_and_an_update_are_of_the_same_build(tree: Path) -> None:
    assert len({hash_in(text) for text in build.scripts().values()}) == 1


def test_the_scripts_are_written_into_the_folder_that_is_named(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["build.py", str(target)])

    assert build.main() == 0

    assert {path.name: path.read_text() for path in target.iterdir()} == build.scripts()
    assert capsys.readouterr().out.splitlines() == [str(target / name) for name in build.scripts()]


def test_a_control_file_without_version_is_refused(tree: Path) -> None:
    (tree / "extension/autoembed.control").write_text("comment = 'x'\n")

    with pytest.raises(ValueError, match="default_version"):
        build.version()


def test_lines_of_sql_have_at_most_120_columns() -> None:
    sources = (build.ROOT / "sql").rglob("*.sql")
    long = [
        f"{path.relative_to(build.ROOT)}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]

    assert long == []


# Comments, Python, escape strings, and, to be looked at, all other strings.
STRINGS = re.compile(
    r"--[^\n]*|\$(?P<tag>\w*python\w*)\$.*?\$(?P=tag)\$|[Ee]'(?:[^'\\]|\\.|'')*'|(?P<string>'(?:[^']|'')*')", re.DOTALL
)


def strings_with_backslashes(source: str) -> list[str]:
    return [found["string"] for found in STRINGS.finditer(source) if "\\" in (found["string"] or "")]


@pytest.mark.parametrize(
    ("source", "found"),
    [(r"SELECT 'a\d'", [r"'a\d'"]), (r"SELECT E'a\\d', 'it''s' -- a '\'", []), (r"'x' || E'\'' || '\'", [r"'\'"])],
)
def test_a_backslash_in_an_ordinary_string_is_found(source: str, found: list[str]) -> None:
    assert strings_with_backslashes(source) == found


def test_no_string_depends_on_standard_conforming_strings() -> None:
    """In a session that has it off, a backslash in an ordinary string is an escape."""
    found = {
        str(path.relative_to(build.ROOT)): strings
        for path in (build.ROOT / "sql").rglob("*.sql")
        if (strings := strings_with_backslashes(path.read_text()))
    }

    assert found == {}
