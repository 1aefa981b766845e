"""Measures autoembed and its rivals side by side: python -m bench."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What is installed for the bench: outside git, kept from one bench to the next.
CACHE = ROOT / ".bench"

# The fake API's client, and what runs inside the server.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "plpy_src")]
