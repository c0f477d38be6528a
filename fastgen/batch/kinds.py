"""Kinds of data: the tensors of their batches, and the facts that a dataset offers to a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from torch import Tensor

Batch: TypeAlias = dict[str, Tensor]
"""Tensors by name, one item per row; the kind of data decides which (``KINDS``)."""

Kind = Literal["images", "pairs", "domains", "text", "sequences", "audio"]
KINDS: tuple[str, ...] = get_args(Kind)
"""Kinds of data and the tensors of their batches; ``FACTS`` lists what a dataset says about itself.

images: images (B, C, S, S) in [0, 1]; labels (B,) int64 where there are classes; caption (B, T) int64 where there are
    captions (images with labels are captioned by the names of their classes), numbered as in
    ``fastgen.batch.caption_tokens``.
pairs: inputs (B, Cin, S, S) and targets (B, C, S, S), in [0, 1].
domains: a and b (B, C, S, S) in [0, 1], unpaired.
text: tokens (B, length) int64, numbered by the vocabulary. The config's ``data_options`` gives the length.
sequences: source (B, S) and target (B, T) int64, ``START``, characters from ``FIRST`` on, ``END``, then ``PADDING``.
audio: audio (B, length) in [-1, 1]; labels (B,) int64 where there are classes.
"""

FACTS: Mapping[str, tuple[str, ...]] = {
    "images": (
        "image_size",
        "channels",
        "levels",
        "classes",
        "caption_vocabulary",
        "caption_length",
        "caption_examples",
    ),
    "pairs": ("image_size", "input_channels", "channels", "levels"),
    "domains": ("image_size", "channels", "levels"),
    "text": ("vocabulary",),
    "sequences": ("vocabulary", "source_length", "target_length"),
    "audio": ("sample_rate", "length", "classes"),
}
"""The facts that every dataset of a kind has; config fields declared with ``option(..., from_data=True)`` take them.

levels: number of values of a pixel, which are multiples of 1 / (levels - 1). classes: 0 without labels.
caption_vocabulary, caption_length (T), caption_examples: "", 0 and () without captions.
vocabulary of text: a string, or a tuple of strings; of sequences: a string.
"""

TRANSLATED: tuple[str, ...] = ("pairs", "domains")
"""Kinds whose models have ``translate`` in place of ``draw``."""
