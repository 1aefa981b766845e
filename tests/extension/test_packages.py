"""`make package`: what it makes is installed on a plain Debian with PostgreSQL, and embeds a row by the local model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testcontainers.core.docker_client import DockerClient

from harness import IMAGE
from waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "build" / "packages"
# One package in its own right for each: the extension, its queue, the model.
NAMES = ("postgresql-{major}-autoembed", "postgresql-{major}-pgmq", "autoembed-all-minilm-l6-v2")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def major() -> str:
    environment = DockerClient().client.images.get(IMAGE).attrs["Config"]["Env"]
    return str(dict(entry.split("=", 1) for entry in environment)["PG_MAJOR"])


@pytest.fixture(scope="module")
def made() -> list[Path]:
    """The packages of this major and the archive."""
    output("make", "package", f"PG={major()}", f"PYTHON={sys.executable}")
    names = [name.format(major=major()) for name in NAMES]
    return [next(PACKAGES.glob(f"{name}_*.deb")) for name in names] + [next(PACKAGES.glob("autoembed-*.zip"))]


@pytest.fixture(scope="module")
def debian(made: list[Path]) -> Iterator[Any]:
    """A plain Debian with PostgreSQL; the packages lie in /packages."""
    client = DockerClient().client
    container = client.containers.create(
        output("docker/base.sh", major()), ["sleep", "infinity"], entrypoint=[], environment={"POSTGRES_PASSWORD": "p"}
    )
    try:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in made:
                tar.add(path, arcname=f"packages/{path.name}")
        container.put_archive("/", archive.getvalue())
        container.start()
        yield container
    finally:
        container.remove(force=True, v=True)


def run(container: Any, command: str) -> str:
    """The output of a shell command in the container, which must succeed."""
    code, said = container.exec_run(["bash", "-euo", "pipefail", "-c", command])
    assert code == 0, said.decode()
    return str(said.decode().strip())


def embed_a_row(container: Any, database: str) -> None:
    psql = (
        f"psql --username=postgres --no-psqlrc --quiet --tuples-only --no-align -v ON_ERROR_STOP=1 --dbname={database}"
    )
    run(container, f"createdb --username=postgres {database}")
    for statement in (
        "CREATE EXTENSION autoembed CASCADE",
        "CREATE TABLE notes (id int PRIMARY KEY, body text)",
        "SELECT autoembed.enable('notes', content_columns => '{body}')",
        "INSERT INTO notes VALUES (1, 'a note')",
        "SELECT autoembed.process()",
    ):
        run(container, f'{psql} --command="{statement}"')
    assert run(container, f"{psql} --command='SELECT embedded FROM autoembed.status'") == "1"


def test_debian_installs_the_packages_with_what_they_need_and_then_the_archive_of_pgxn(debian: Any) -> None:
    install = "DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --no-install-recommends"
    run(debian, f"apt-get update --quiet --quiet && {install} make /packages/*.deb")
    debian.exec_run(["docker-entrypoint.sh", "postgres"], detach=True)
    wait_until(lambda: debian.exec_run(["pg_isready", "--quiet", "--host=127.0.0.1"]).exit_code == 0, 60)
    embed_a_row(debian, "packaged")

    run(debian, f"dpkg --remove postgresql-{major()}-autoembed")
    run(debian, "cd /tmp && python3 -m zipfile -e /packages/autoembed-*.zip . && make -C autoembed-* install")
    embed_a_row(debian, "archived")


def test_the_archive_has_the_facts_that_pgxn_asks_for(made: list[Path]) -> None:
    with zipfile.ZipFile(made[-1]) as archive:
        names = archive.namelist()
        (folder,) = {name.split("/")[0] for name in names}
        meta = json.loads(archive.read(f"{folder}/META.json"))

    assert {"name", "abstract", "version", "maintainer", "license", "provides", "meta-spec"} <= meta.keys()
    assert folder == f"{meta['name']}-{meta['version']}"
    assert meta["meta-spec"]["version"] == "1.0.0"
    assert f"{folder}/{meta['provides']['autoembed']['file']}" in names
    assert {f"{folder}/{name}" for name in ("Makefile", "README.md", "LICENSE", "autoembed.control")} <= set(names)
