"""Long texts with questions: the FAQs and manuals of Perl and Python, from packages of Debian, as Markdown."""

from __future__ import annotations

import re
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import CACHE
from bench.server import docker, name_of
from harness import Server

FOLDER = CACHE / "manuals"
# One release of Debian, so that the texts stay the same.
FETCH = """
set -e
apt-get update -qq
archive=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)
echo "deb $archive trixie main" > /etc/apt/sources.list.d/manuals.list
apt-get update -qq
rm -rf /tmp/manuals && mkdir -p /tmp/manuals/perl /tmp/manuals/python && cd /tmp/manuals
apt-get download -qq perl-doc/trixie python3.13-doc/trixie
for package in *.deb; do dpkg-deb -x "$package" packages; done
cp packages/usr/share/perl/*/pod/*.pod perl
cp -rL packages/usr/share/doc/python3.13/html/_sources/. python
rm -r packages *.deb
"""
# Edits are tried on texts of about this size, of each language so many.
MANUAL_BYTES = 44_000
MANUALS = 12
# The local model takes minutes for a thousand sections.
OTHER_SECTIONS = 12
PASSAGE_CHARACTERS = 1000


@dataclass(frozen=True)
class Question:
    """A question, and where its answer is: document, start and end."""

    text: str
    document: int
    start: int
    end: int


def fetch(server: Server) -> None:
    """Have the packages' texts in the cache."""
    if not FOLDER.exists():
        docker("exec", name_of(server), "sh", "-c", FETCH, stderr=subprocess.DEVNULL)
        docker("cp", f"{name_of(server)}:/tmp/manuals", str(FOLDER))


def faq() -> tuple[list[str], list[Question]]:
    """The documents of the FAQs, and their questions. A question's heading is left as a bare mark."""
    texts = [_perl(path) for path in sorted(FOLDER.glob("perl/perlfaq[1-9].pod"))]
    texts += [_python(path) for path in sorted(FOLDER.glob("python/faq/*.rst.txt")) if path.name != "index.rst.txt"]
    times = Counter(heading[2] for text in texts for heading in HEADING.finditer(text))
    documents: list[str] = []
    questions: list[Question] = []
    for text in texts:
        parts = HEADING.split(text)
        document = parts[0]
        for mark, title, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            answer = body.strip()
            if title.endswith("?") and times[title] == 1 and answer:
                start = len(document) + len(mark) + body.index(answer)
                questions.append(Question(title, len(documents), start, start + len(answer)))
                document += mark + body
            else:
                document += f"{mark} {title}{body}"
        documents.append(document)
    return documents, questions


def sections(one_in: int = OTHER_SECTIONS) -> tuple[list[str], list[tuple[str, int]]]:
    """The sections of all documents, and the questions of the FAQs, each with the number of the answer.

    A question is left out of its answer. one_in: of the sections that answer none, one in so many is there.
    """
    perl = [path for path in sorted(FOLDER.glob("perl/*.pod")) if not re.match(r"perl(.*delta|5)", path.name)]
    python = [path for path in sorted(FOLDER.glob("python/**/*.rst.txt")) if path.parent.name != "whatsnew"]
    found: list[str] = []
    questions: list[tuple[str, int]] = []
    for path in [*perl, *python]:
        is_faq = path.name.startswith("perlfaq") or path.parent.name == "faq"
        _, *parts = HEADING.split((_perl if path in perl else _python)(path))
        for title, body in zip(parts[1::3], parts[2::3], strict=True):
            answer = body.strip()
            if answer and is_faq and title.endswith("?"):
                questions.append((title, len(found)))
                found.append(answer)
            elif answer and zlib.crc32(body.encode()) % one_in == 0:
                found.append(f"{title}\n\n{answer}")
    return found, questions


def passages() -> list[str]:
    """The paragraphs of all sections, as many together as have PASSAGE_CHARACTERS. A longer one is left out."""
    found: list[str] = []
    for section in sections(one_in=1)[0]:
        passage = ""
        for paragraph in re.split(r"\n\n+", section):
            together = f"{passage}\n\n{paragraph}".strip()
            if passage and len(together) > PASSAGE_CHARACTERS:
                found.append(passage)
                together = paragraph
            passage = together if len(together) <= PASSAGE_CHARACTERS else ""
        found += [passage] if passage else []
    return found


def manuals() -> list[str]:
    """Long documents: those of Perl as Markdown, those of Python as they are, in reStructuredText."""
    perl = [path for path in FOLDER.glob("perl/*.pod") if not re.match(r"perl(faq|.*delta|5)", path.name)]
    python = [path for path in FOLDER.glob("python/**/*.rst.txt") if path.parent.name not in ("faq", "whatsnew")]
    return [*map(_perl, _of_the_size(perl)), *(path.read_text() for path in _of_the_size(python))]


def _of_the_size(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (abs(path.stat().st_size - MANUAL_BYTES), path))[:MANUALS]


HEADING = re.compile(r"^(#{1,6}) +(.*?) *$", re.MULTILINE)
UNDERLINE = re.compile(r"([=\-~^*#\"])\1{2,}")


def _perl(path: Path) -> str:
    text = re.sub(r"^=head(\d) ", lambda found: "#" * int(found[1]) + " ", path.read_text(), flags=re.MULTILINE)
    text = re.sub(r"^=item", "*", text, flags=re.MULTILINE)
    text = re.sub(r"^=\w+.*\n|X<[^<>]*>\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"L<+\s*([^<>|]*)\|[^<>]*>+", r"\1", text).replace("E<lt>", "<").replace("E<gt>", ">")
    return re.sub(r"[BCFIL]<+\s?([^<>]*?)\s?>+", r"\1", text)


def _python(path: Path) -> str:
    text = "\n".join(_with_marks(path.read_text().split("\n")))
    text = re.sub(r":[a-z:]+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`", r"`\1`", text)
    text = re.sub(r"`([^`<>]+?)\s+<[^`<>]*>`__?", r"\1", text)
    return re.sub(r"^\.\. (index|_|contents|only).*\n(?:[ \t]+.*\n)*", "", text, flags=re.MULTILINE)


def _with_marks(lines: list[str]) -> Iterator[str]:
    """The lines with headings of Markdown. The levels are those of the underlines, in their order."""
    levels: list[tuple[bool, str]] = []
    at = 0
    while at < len(lines):
        line, after, last = [*lines[at : at + 3], "", ""][:3]
        is_over = bool(UNDERLINE.fullmatch(line)) and last == line and bool(after.strip())
        is_under = bool(UNDERLINE.fullmatch(after)) and 0 < len(line.strip()) <= len(after)
        if not is_over and not is_under:
            yield line
            at += 1
            continue
        level = (is_over, line[0] if is_over else after[0])
        if level not in levels:
            levels.append(level)
        yield "#" * (levels.index(level) + 1) + " " + (after if is_over else line).strip()
        at += 3 if is_over else 2
