"""The contract between datasets, models and training: kinds of data, token numbering, config fields, batch checks."""

from __future__ import annotations

from fastgen.batch.checks import (
    NEVER_IGNORED,
    RANGE_TOLERANCE,
    can_read_values,
    check_batch,
    require_audio,
    require_images,
    require_labels,
    require_range,
    require_same_batch,
    require_tokens,
)
from fastgen.batch.direction import Direction, is_reversed
from fastgen.batch.kinds import FACTS, KINDS, TRANSLATED, Batch, Kind
from fastgen.batch.options import current_names, from_data, option, takes_old_names
from fastgen.batch.vocabulary import (
    END,
    FIRST,
    PADDING,
    START,
    Vocabulary,
    caption_tokens,
    check_vocabulary,
    detokenize,
    require_characters,
    require_known,
    tokenize,
)

__all__ = [
    "END",
    "FACTS",
    "FIRST",
    "KINDS",
    "NEVER_IGNORED",
    "PADDING",
    "RANGE_TOLERANCE",
    "START",
    "TRANSLATED",
    "Batch",
    "Direction",
    "Kind",
    "Vocabulary",
    "can_read_values",
    "caption_tokens",
    "check_batch",
    "check_vocabulary",
    "current_names",
    "detokenize",
    "from_data",
    "is_reversed",
    "option",
    "require_audio",
    "require_characters",
    "require_images",
    "require_known",
    "require_labels",
    "require_range",
    "require_same_batch",
    "require_tokens",
    "takes_old_names",
    "tokenize",
]
