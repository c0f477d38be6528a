"""The contract between datasets, models and training: kinds of data, token numbering, config fields, batch checks."""

from __future__ import annotations

from fastgen.batch.checks import (
    NEVER_IGNORED,
    SLACK,
    check_batch,
    readable,
    require_audio,
    require_images,
    require_labels,
    require_range,
    require_same_batch,
    require_tokens,
)
from fastgen.batch.kinds import FACTS, KINDS, TRANSLATED, Batch, Kind
from fastgen.batch.options import current_names, from_data, option
from fastgen.batch.vocabulary import (
    END,
    FIRST,
    PADDING,
    START,
    Vocabulary,
    caption_tokens,
    check_vocabulary,
    require_characters,
    require_known,
    spell,
    tokenize,
)

__all__ = [
    "END",
    "FACTS",
    "FIRST",
    "KINDS",
    "NEVER_IGNORED",
    "PADDING",
    "SLACK",
    "START",
    "TRANSLATED",
    "Batch",
    "Kind",
    "Vocabulary",
    "caption_tokens",
    "check_batch",
    "check_vocabulary",
    "current_names",
    "from_data",
    "option",
    "readable",
    "require_audio",
    "require_characters",
    "require_images",
    "require_known",
    "require_labels",
    "require_range",
    "require_same_batch",
    "require_tokens",
    "spell",
    "tokenize",
]
