"""Measures autoembed and its rivals side by side: python -m bench."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Packages and data of the bench: outside git, kept from one bench to the next.
CACHE = ROOT / ".bench"

# The server with its fake API, and what runs inside it.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "plpy_src")]
