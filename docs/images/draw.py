"""Draws the pictures of the README: `python3 docs/images/draw.py`, the bars from the figures of docs/bench."""

from __future__ import annotations

import json
import re
import statistics
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "bench" / "results.json"
ROOT = FOLDER.parents[1]

# The picture follows the reader's light or dark scheme.
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; }
.small { font-size: 12px; fill: #59636e; }
.head { font-weight: 600; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
.box { fill: #ddf4ff; stroke: #0969da; }
.other { fill: #f6f8fa; stroke: #818b98; }
.room { fill: none; stroke: #818b98; stroke-dasharray: 4 4; }
.arrow { stroke: #59636e; fill: none; marker-end: url(#tip); }
#tip path { fill: #59636e; }
.bar { fill: #0969da; }
.rival { fill: #818b98; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .small { fill: #9198a1; }
  .box { fill: #0c2d6b; stroke: #4493f8; }
  .other { fill: #21262d; stroke: #9198a1; }
  .arrow { stroke: #9198a1; }
  #tip path { fill: #9198a1; }
  .bar { fill: #4493f8; }
  .rival { fill: #656c76; }
}
"""
TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z"/></marker>'
)


def svg(width: int, height: int, title: str, *shapes: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" aria-label="{escape(title)}">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f"<defs>{TIP}</defs>\n" + "\n".join(shapes) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, look: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{look}">{escape(words)}</text>'


def box(x: float, y: float, width: float, head: str, *lines: str, look: str = "box") -> str:
    height = 30 + 16 * len(lines)
    middle = x + width / 2
    words = [text(middle, y + 20, head, "head middle")]
    words += [text(middle, y + 38 + 16 * n, line, "small middle") for n, line in enumerate(lines)]
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height}" rx="6" class="{look}"/>' + "".join(words)


def arrow(*points: tuple[float, float]) -> str:
    return f'<path class="arrow" d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def architecture() -> str:
    ours = [
        text(20, 24, "autoembed", "head"),
        '<rect x="20" y="36" width="580" height="218" rx="8" class="room"/>',
        text(30, 54, "PostgreSQL", "small"),
        box(40, 66, 150, "your table", "INSERT, UPDATE"),
        box(230, 66, 150, "trigger", "keys of changed rows"),
        box(420, 66, 150, "queue", "pgmq"),
        box(420, 170, 150, "lane", "local model, or an API"),
        box(230, 170, 150, "embeddings", "beside or in the row"),
        box(40, 170, 150, "search()", "meaning, words, both"),
        box(640, 170, 140, "provider", "an API", look="other"),
        arrow((190, 89), (228, 89)),
        arrow((380, 89), (418, 89)),
        arrow((495, 112), (495, 168)),
        arrow((570, 184), (638, 184)),
        arrow((640, 204), (572, 204)),
        arrow((420, 193), (382, 193)),
        arrow((230, 193), (192, 193)),
    ]
    steps = [
        ("your table", ""),
        ("trigger", "a job for each row"),
        ("queue", "pgmq"),
        ("schedule", "pg_cron, 10 s"),
        ("pump", "a function of yours"),
        ("HTTP", "pg_net"),
        ("Edge Function", "TypeScript of yours"),
        ("provider", "a request a row"),
        ("row", "UPDATE by id"),
    ]
    guide = [text(20, 296, "The Supabase guide, to set up by hand; it has no search", "head")]
    for n, (head, line) in enumerate(steps):
        x, y = (20 + 155 * n, 310) if n < 5 else (640 - 155 * (n - 5), 380)
        guide.append(box(x, y, 135, head, *filter(None, [line or " "]), look="other"))
        if 0 < n < 5:
            guide.append(arrow((x - 20, 333), (x - 2, 333)))
        elif n == 5:
            guide.append(arrow((707, 356), (707, 378)))
        elif n > 5:
            guide.append(arrow((x + 155, 403), (x + 137, 403)))
    return svg(800, 440, "How autoembed works, beside the nine parts of the Supabase guide", *ours, *guide)


def median(scenario: str, system: str, figure: str) -> float:
    results = json.loads(RESULTS.read_text())["results"]
    values = [
        float(result["figures"][figure])
        for result in results
        if (result["scenario"], result["system"]) == (scenario, system)
    ]
    return statistics.median(values)


def bars(x: float, head: str, rows: list[tuple[str, float, str]]) -> str:
    """One group of bars, each as long as its share of the largest."""
    largest = max(value for _, value, _ in rows)
    shapes = [text(x, 24, head, "head")]
    for n, (name, value, label) in enumerate(rows):
        y = 40 + 28 * n
        length = max(2, 170 * value / largest)
        look = "bar" if name.startswith("autoembed") else "rival"
        shapes.append(text(x + 125, y + 15, name, "end"))
        shapes.append(f'<rect x="{x + 133:g}" y="{y}" width="{length:.0f}" height="20" class="{look}"/>')
        shapes.append(text(x + 139 + length, y + 15, label, "small"))
    return "\n".join(shapes)


def speed() -> str:
    systems = [
        ("autoembed", "autoembed"),
        ("guide", "guide"),
        ("guide, tuned", "guide-best"),
        ("pgai, tuned", "pgai-best"),
    ]
    rates = [(n, median("drain-no-index", s, "rows_per_second")) for n, s in systems if s != "guide"]
    waits = [(n, median("fresh-idle", s, "p50_seconds")) for n, s in systems]
    return svg(
        800,
        160,
        "Rows per second and freshness of autoembed, the Supabase guide and pgai",
        bars(0, "Rows/s without an index: longer is better", [(n, r, f"{r:,.0f}") for n, r in rates]),
        bars(410, "A new row has its vector after: shorter is better", [(n, w, f"{w:.2f} s") for n, w in waits]),
    )


def badges() -> str:
    """What the project's own files say: the version, the majors that are tested, and the licence."""
    control = (ROOT / "extension" / "autoembed.control").read_text(encoding="utf-8")
    [version] = re.findall(r"default_version = '(.*)'", control)
    majors = re.findall(r"^(\d+) ", (ROOT / "docker" / "majors").read_text(encoding="utf-8"), re.MULTILINE)
    [licence] = re.findall(r"\A(.*) License", (ROOT / "LICENSE").read_text(encoding="utf-8"))
    shapes, x = [], 1.0
    for head, value in [("version", version), ("PostgreSQL", ", ".join(majors)), ("licence", licence)]:
        left, right = 16 + 7 * len(head), 16 + 7 * len(value)
        shapes += [
            f'<rect x="{x:g}" y="1" width="{left + right}" height="22" rx="4" class="other"/>',
            text(x + left / 2, 16, head, "small middle"),
            f'<rect x="{x + left:g}" y="1" width="{right}" height="22" rx="4" class="box"/>',
            text(x + left + right / 2, 16, value, "small middle"),
        ]
        x += left + right + 8
    return svg(round(x), 24, f"autoembed {version}, for PostgreSQL {', '.join(majors)}", *shapes)


if __name__ == "__main__":
    (FOLDER / "badges.svg").write_text(badges(), encoding="utf-8")
    (FOLDER / "architecture.svg").write_text(architecture(), encoding="utf-8")
    (FOLDER / "speed.svg").write_text(speed(), encoding="utf-8")
