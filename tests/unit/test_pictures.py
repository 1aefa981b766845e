"""The pictures of the README are those that its command draws from the project's files and figures."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


@pytest.mark.parametrize("picture", ["architecture", "badges", "speed"])
def test_a_picture_is_the_one_that_its_command_draws(picture: str) -> None:
    drawn = runpy.run_path(str(IMAGES / "draw.py"))[picture]()

    assert (IMAGES / f"{picture}.svg").read_text(encoding="utf-8") == drawn
