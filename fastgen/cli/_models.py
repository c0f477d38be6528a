"""``fastgen models [MODEL]``."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from typing import Any, get_args, get_type_hints

from fastgen.cli._config import nearest
from fastgen.cli._errors import USAGE, CommandError
from fastgen.cli._options import options_parser, parse
from fastgen.models import MODELS, GenerativeModel

WIDTH = 118


def run(words: list[str]) -> None:
    parser = options_parser("fastgen models", "The models there are; with a name, all about that one.", files=False)
    parser.add_argument("model", type=str, nargs="?", default="", help="a model's name")
    name = parse(parser, words, defaults=True)["model"]
    if not name:
        width = max(map(len, MODELS))
        for name, model in MODELS.items():
            print(f"{name:<{width}}  {model.summary} (data: {_kinds(model)}, by default {model.default_data})")
        return
    if name not in MODELS:
        near = nearest(name, MODELS)
        hint = f"; did you mean {near}?" if near else ""
        raise CommandError(f"models: expected one of {', '.join(MODELS)}, got {name}{hint}", USAGE)
    print(_about(MODELS[name]))


def _kinds(model: type[GenerativeModel]) -> str:
    return " or ".join(model.kinds or (model.kind,))


def _about(model: type[GenerativeModel]) -> str:
    """What the model is, by whom, its data, its options, and the commands that train it and draw from it."""
    description = (sys.modules[model.__module__].__doc__ or "").strip()
    blocks = [
        f"{model.name}: {model.summary}",
        description,
        f"data: {_kinds(model)}, by default {model.default_data}\nclass: {_place(model)}, {_place(model.config_class)}",
        "options of the model, for fastgen train:\n" + _options(model.config_class, "--model."),
    ]
    if dataclasses.fields(model.sampling_class):
        blocks.append("options of sampling, for fastgen sample:\n" + _options(model.sampling_class, "--"))
    if model.train_defaults:
        blocks.append(
            "defaults of training: " + ", ".join(f"--{_dashed(n)} {_shown(v)}" for n, v in model.train_defaults.items())
        )
    blocks.append(
        f"fastgen train {model.name} --data {model.default_data} --out runs/{model.name}\n"
        f"fastgen sample runs/{model.name}\n"
        f"fastgen train {model.name} --help   lists the options of training, too"
    )
    return "\n\n".join(blocks)


def _place(kind: type) -> str:
    """Where to import it from."""
    return f"fastgen.models.{kind.__name__}"


def _options(config: type, prefix: str) -> str:
    types = get_type_hints(config)
    rows = []
    for field in dataclasses.fields(config):
        if field.metadata.get("from_data"):
            continue
        choices = [str(choice) for choice in get_args(types[field.name]) if isinstance(choice, str)]
        words = field.metadata.get("help", "") + (f": {', '.join(choices)}" if choices else "")
        rows.append((prefix + _dashed(field.name), f"{words} (default {_shown(field.default)})"))
    width = max((len(option) for option, _ in rows), default=0)
    return "\n".join(
        textwrap.fill(words, WIDTH, initial_indent=f"  {option:<{width}}  ", subsequent_indent=" " * (width + 4))
        for option, words in rows
    )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else "empty" if value == "" else str(value)
