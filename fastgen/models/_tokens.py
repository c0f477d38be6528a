"""Former place of the tokens of ``fastgen.batch``; how one is chosen is in ``decoding.py``."""

from __future__ import annotations

from fastgen.batch import END, FIRST, PADDING, START, require_known, spell
from fastgen.batch import require_characters as require_vocabulary
from fastgen.models.decoding import choose

__all__ = ["END", "FIRST", "PADDING", "START", "choose", "require_known", "require_vocabulary", "spell"]
