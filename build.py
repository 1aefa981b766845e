"""Makes extension/autoembed--VERSION.sql out of sql/ and plpy_src/."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "plpy_src"

# CREATE EXTENSION substitutes the @…@ names inside Python bodies too; the others would end a literal early.
FORBIDDEN_IN_PYTHON = ("@extschema", "@extowner@", "MODULE_PATHNAME", "$autoembed_python$", "'''", "\n\t")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def python_sources() -> dict[str, str]:
    """The source of every module by its dotted name; raises ValueError for what the loader cannot carry."""
    sources = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    for name, source in sources.items():
        for forbidden in FORBIDDEN_IN_PYTHON:
            if forbidden in source:
                raise ValueError(f"{name} contains {forbidden!r}, which the generated SQL cannot carry")
    return sources


def literal(sources: dict[str, str]) -> str:
    """The sources as lines of a Python dict of raw strings, for the body of _load_python()."""
    return "\n".join(f"\"{name}\": r'''{source}'''," for name, source in sources.items())


def extension_sql() -> str:
    """The whole install script."""
    sources = python_sources()
    text = "\n".join(path.read_text() for path in sorted((ROOT / "sql").glob("*.sql")))
    build = hashlib.sha256((text + repr(sources)).encode()).hexdigest()[:16]
    text = text.replace("@BUILD@", build).replace("@PYTHON_SOURCES@", literal(sources))
    return "-- Made by build.py out of sql/ and plpy_src/: edit those.\n\n" + text


def version() -> str:
    control = (ROOT / "extension" / "autoembed.control").read_text()
    match = re.search(r"^default_version = '(.+)'$", control, re.MULTILINE)
    if match is None:
        raise ValueError("extension/autoembed.control has no default_version")
    return match[1]


def main() -> int:
    target = ROOT / "extension" / f"autoembed--{version()}.sql"
    target.write_text(extension_sql())
    print(target.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
