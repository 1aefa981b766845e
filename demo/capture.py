"""Runs the demo in a terminal and draws a part of what it prints as docs/images/demo.svg: `make capture`."""

from __future__ import annotations

import os
import pty
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
PICTURE = FOLDER.parent / "docs" / "images" / "demo.svg"
# The picture is of the search.
BEGIN, END = "INSERT INTO functions ...  -- from pg_proc and pg_description", "3. A passage of a long text"
COLUMNS, LINE, CHARACTER = 84, 18, 8.0
COLOURS = {"1": "bold", "36": "sql", "32": "bar"}
STYLE = """
rect { fill: #0d1117; }
text { font: 13px ui-monospace, Menlo, Consolas, monospace; fill: #e6edf3; white-space: pre; }
.bold { font-weight: bold; }
.sql { fill: #79c0ff; }
.bar { fill: #3fb950; }
"""


def record() -> str:
    """All that the demo prints to a terminal."""
    printed = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        printed.extend(data)
        return data

    if pty.spawn([str(FOLDER / "run.sh")], read) != 0:
        raise SystemExit("the demo failed")
    return printed.decode()


def lines_of(printed: str) -> list[str]:
    """The lines as the terminal shows them at the end: a bar that was drawn many times stands there once."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].replace("\x1b[K", "") for line in printed.split("\n")]
    heads = [re.sub(r"\x1b\[\d+m", "", line) for line in lines]
    return lines[heads.index(BEGIN) : heads.index(END) - 1]


def coloured(lines: list[str]) -> Iterator[str]:
    """The lines with their colours as classes; a colour may go on in the next line."""
    look = ""
    for line in lines:
        shapes = []
        for code, words in re.findall(r"(?:\x1b\[(\d+)m)?([^\x1b]*)", line):
            look = COLOURS.get(code, "") if code else look
            if words:
                shapes.append(f'<tspan class="{look}">{escape(words)}</tspan>')
        yield "".join(shapes)


def picture(lines: list[str]) -> str:
    width, height = COLUMNS * CHARACTER, LINE * (len(lines) + 1)
    rows = [
        f'<text x="12" y="{LINE * (n + 1)}" xml:space="preserve">{line}</text>'
        for n, line in enumerate(coloured(lines))
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" width="{width:g}" height="{height}"'
        f' role="img" aria-label="The demo in a terminal">\n<style>{STYLE}</style>\n'
        f'<rect width="100%" height="100%" rx="8"/>\n' + "\n".join(rows) + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(lines_of(record())), encoding="utf-8")
