"""Makes the archive for PGXN: pgxn.py SCRIPTS TARGET. SCRIPTS is where build.py has written the SQL scripts."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    match = re.search(r"^default_version = '(.+)'$", (ROOT / "extension/autoembed.control").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def meta() -> dict[str, Any]:
    """META.json, by the PGXN Meta Spec 1.0.0."""
    abstract = "Embeddings that keep in step with the rows of a table, inside the database"
    return {
        "name": "autoembed",
        "abstract": abstract,
        "version": version(),
        "maintainer": "The autoembed authors",
        "license": "postgresql",
        "provides": {
            "autoembed": {"abstract": abstract, "file": f"sql/autoembed--{version()}.sql", "version": version()}
        },
        "prereqs": {
            "runtime": {"requires": {"PostgreSQL": "17.0.0", "plpython3u": 0, "vector": "0.7.0", "pgmq": "1.5.0"}}
        },
        "tags": ["embeddings", "vector", "search", "queue"],
        "meta-spec": {"version": "1.0.0", "url": "https://pgxn.org/meta/spec.txt"},
    }


def main() -> None:
    scripts, target = (Path(argument) for argument in sys.argv[1:])
    name = f"autoembed-{version()}"
    files = {path.name: path for path in (ROOT / "README.md", ROOT / "LICENSE", ROOT / "CHANGELOG.md")}
    files |= {"Makefile": ROOT / "packaging/pgxn/Makefile", "autoembed.control": ROOT / "extension/autoembed.control"}
    files |= {f"docs/{path.name}": path for path in sorted((ROOT / "docs").glob("*.md"))}
    files |= {f"sql/{path.name}": path for path in sorted(scripts.glob("autoembed--*.sql"))}
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/META.json", json.dumps(meta(), indent=2) + "\n")
        for place, path in files.items():
            archive.write(path, f"{name}/{place}")


if __name__ == "__main__":
    main()
