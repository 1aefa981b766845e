"""A hook of mkdocs: the site has no files outside docs/, so links to them become their words."""

from __future__ import annotations

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
