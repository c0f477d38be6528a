"""Former place of ``fastgen.batch.vocabulary``."""

from __future__ import annotations

from fastgen.batch.vocabulary import Vocabulary
from fastgen.batch.vocabulary import check_vocabulary as checked_vocabulary
from fastgen.batch.vocabulary import tokenize as tokenise

__all__ = ["Vocabulary", "checked_vocabulary", "tokenise"]
