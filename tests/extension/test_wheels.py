"""The wheels of the image: each pinned wheel exists for every Python and processor, and has the pinned hash."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = [ROOT / "docker" / name for name in ("requirements.txt", "requirements-build.txt")]
PINNED = "".join(file.read_text() for file in REQUIREMENTS)
PROCESSORS = ("x86_64", "aarch64")
# Wheels name the oldest glibc that they run on. Debian trixie has 2.41.
GLIBC_MINORS = range(17, 42)


def pythons() -> list[str]:
    match = re.search(r'^ARG PYTHONS="(.+)"$', (ROOT / "Dockerfile.postgres").read_text(), re.MULTILINE)
    assert match is not None
    return match[1].split()


def download(folder: Path, python: str, processor: str) -> list[str]:
    """The hashes of the wheels that pip takes there; pip itself refuses one that is not pinned."""
    abis = [f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")]
    platforms = [f"--platform=manylinux_2_{minor}_{processor}" for minor in GLIBC_MINORS]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        + [f"--requirement={file}" for file in REQUIREMENTS]
        + [f"--dest={folder}", f"--platform=manylinux2014_{processor}", f"--python-version={python}"]
        + ["--implementation=cp", *abis, *platforms],
        check=True,
    )
    return [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in folder.glob("*.whl")]


@pytest.fixture(scope="module")
def hashes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    targets = [(python, processor) for python in pythons() for processor in PROCESSORS]
    return {target: download(tmp_path_factory.mktemp("wheels"), *target) for target in targets}


def test_every_python_and_processor_has_every_wheel(hashes: dict[tuple[str, str], list[str]]) -> None:
    names = re.findall(r"^([\w-]+)==", PINNED, re.MULTILINE)

    assert {target: len(found) for target, found in hashes.items()} == dict.fromkeys(hashes, len(names))


def test_every_pinned_hash_is_of_such_a_wheel(hashes: dict[tuple[str, str], list[str]]) -> None:
    found = {digest for wheels in hashes.values() for digest in wheels}

    assert found == set(re.findall(r"--hash=sha256:(\w{64})", PINNED))
