"""The default major of PostgreSQL is the first of docker/majors, wherever it is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def majors() -> list[str]:
    return re.findall(r"^(\d+) \w+$", (ROOT / "docker" / "majors").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("Dockerfile.postgres", r"^ARG BASE_IMAGE=postgres:(\d+)-trixie$"),
        ("compose.yaml", r"\{BASE_IMAGE:-postgres:(\d+)-trixie\}"),
        ("docs/install.md", r"base image `postgres:(\d+)-trixie`"),
        ("docs/install.md", r"^The image has PostgreSQL (\d+)\."),
    ],
)
def test_the_default_is_the_first_of_the_majors(file: str, named: str) -> None:
    assert re.findall(named, (ROOT / file).read_text(), re.MULTILINE) == majors()[:1]


def test_compose_and_the_readme_mount_the_same_volume() -> None:
    (place,) = re.findall(r"data:\$\{POSTGRES_VOLUME:-(.+)\}", (ROOT / "compose.yaml").read_text())

    assert f"--volume autoembed:{place} " in (ROOT / "docs/install.md").read_text()
