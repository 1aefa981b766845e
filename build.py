"""Makes the extension's SQL scripts, for install and update, out of sql/ and plpy_src/.

Usage: build.py [FOLDER], build/ by default.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# CREATE EXTENSION substitutes the @…@ names inside Python bodies too; the others would end a literal early.
FORBIDDEN_IN_PYTHON = ("@extschema", "@extowner@", "MODULE_PATHNAME", "$autoembed_python$", "'''", "\n\t")
FORBIDDEN_IN_TEMPLATES = ("$template$", "$templates$", "@BUILD@", "@PYTHON_SOURCES@", "@TEMPLATES@")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "plpy_src").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def carried(sources: dict[str, str], forbidden: tuple[str, ...]) -> dict[str, str]:
    """The sources as they are; raises ValueError for what a generated script cannot carry."""
    for name, source in sources.items():
        for word in forbidden:
            if word in source:
                raise ValueError(f"{name} contains {word!r}, which the generated SQL cannot carry")
    return sources


def python_sources() -> dict[str, str]:
    """The source of every module by its dotted name."""
    paths = sorted((ROOT / "plpy_src").rglob("*.py"))
    # In ASCII: strings and patterns know these escapes, also raw ones that are patterns.
    texts = {module_name(path): path.read_text().encode("ascii", "backslashreplace").decode() for path in paths}
    return carried(texts, FORBIDDEN_IN_PYTHON)


def templates() -> dict[str, str]:
    """The text of every template of a function by its name, without the comment at its top."""
    paths = sorted((ROOT / "sql" / "templates").glob("*.sql"))
    texts = {path.stem: re.sub(r"\A(--.*\n)+", "", path.read_text()).rstrip() for path in paths}
    return carried(texts, FORBIDDEN_IN_TEMPLATES)


def python_literal(sources: dict[str, str]) -> str:
    """The sources as lines of a Python dict of raw strings, for the body of _python_sources()."""
    return "\n".join(f"\"{name}\": r'''{source}'''," for name, source in sources.items())


def template_literal(texts: dict[str, str]) -> str:
    """The templates as branches of an SQL CASE, for the body of _function_template()."""
    return "\n".join(f"WHEN '{name}' THEN $template${text}$template$" for name, text in texts.items())


def read(folder: str) -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / "sql" / folder).glob("*.sql")))


def script(state: str) -> str:
    """A whole script: what is run once, between what begins each script and what is run in each."""
    sources, texts = python_sources(), templates()
    head, code, attach = (ROOT / "sql/head.sql").read_text(), read("code"), (ROOT / "sql/attach.sql").read_text()
    build = hashlib.sha256(repr((code, attach, sources, texts)).encode()).hexdigest()[:16]
    code = code.replace("@PYTHON_SOURCES@", python_literal(sources)).replace("@TEMPLATES@", template_literal(texts))
    made = "-- Made by build.py out of sql/ and plpy_src/: edit those."
    return in_ascii("\n".join([made, head, state, code.replace("@BUILD@", build), attach]))


def in_ascii(text: str) -> str:
    """The script for a database of any encoding: it is read as a whole before it can say that it wants UTF8."""
    text = text.replace("…", "...")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.isascii():
            raise ValueError(f"line {number} of the generated SQL is not ASCII: {line}")
    return text


def steps_from(version_before: str) -> str:
    """The changes of state that lead from a released version to the present one."""
    steps = {path.stem.partition("--")[0]: path for path in (ROOT / "sql" / "upgrade").glob("*.sql")}
    texts = []
    at = version_before
    while at != version():
        if at not in steps:
            raise ValueError(f"sql/upgrade/ has no script that begins at version {at}")
        path = steps.pop(at)
        texts.append(path.read_text())
        at = path.stem.partition("--")[2]
    return "\n".join([(ROOT / "sql/update.sql").read_text(), *texts])


def scripts() -> dict[str, str]:
    """All scripts by their names: the present version's, and one from each released version straight to it."""
    made = {f"autoembed--{version()}.sql": script(read("state"))}
    released = sorted(path.stem.partition("--")[2] for path in (ROOT / "extension").glob("autoembed--*.sql"))
    return made | {f"autoembed--{before}--{version()}.sql": script(steps_from(before)) for before in released}


def version() -> str:
    control = (ROOT / "extension" / "autoembed.control").read_text()
    match = re.search(r"^default_version = '(.+)'$", control, re.MULTILINE)
    if match is None:
        raise ValueError("extension/autoembed.control has no default_version")
    return match[1]


def main() -> int:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build"
    target.mkdir(parents=True, exist_ok=True)
    for name, text in scripts().items():
        (target / name).write_text(text)
        print(target / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
