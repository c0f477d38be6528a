"""``fastgen models``."""

from __future__ import annotations

from fastgen.cli._options import options_parser, parse
from fastgen.models import MODELS


def run(words: list[str]) -> None:
    parse(options_parser("fastgen models", "The models there are.", files=False), words, defaults=True)
    width = max(map(len, MODELS))
    for name, model in MODELS.items():
        kinds = " or ".join(model.kinds or (model.kind,))
        print(f"{name:<{width}}  {model.summary} (data: {kinds}, by default {model.default_data})")
