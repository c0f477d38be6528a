"""Options from config dataclasses, by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import jsonargparse

from fastgen.cli._errors import USAGE, CommandError


def options_parser(prog: str, description: str, *, files: bool = True) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, print_config=None, exit_on_error=False)
    if files:
        parser.add_argument("--config", action="config", help="a YAML file of options")
    return parser


def add_fields(
    parser: jsonargparse.ArgumentParser,
    config: type,
    prefix: str = "",
    without: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """One option per field of a config dataclass, with its type, default and help.

    defaults: where they differ from the dataclass's.
    """
    types = get_type_hints(config)
    defaults = defaults or {}
    for field in dataclasses.fields(config):
        if field.name not in without:
            option = "--" + prefix + field.name.replace("_", "-")
            default = defaults.get(field.name, field.default)
            if types[field.name] is bool:
                kind: dict[str, Any] = {"action": jsonargparse.ActionYesNo(no_prefix="no-")}
            else:
                kind = {"type": types[field.name]}
            parser.add_argument(option, default=default, help=field.metadata["help"], **kind)


def parse(parser: jsonargparse.ArgumentParser, words: list[str], *, defaults: bool) -> dict[str, Any]:
    """What was given; with ``defaults`` also the rest."""
    try:
        given: dict[str, Any] = parser.parse_args(words, defaults=defaults).as_dict()
    except argparse.ArgumentError as error:
        text = re.sub(r'^Parser key "(.+?)":\s*', r"\1: ", str(error))
        text = re.sub(r"a <class '(\w+)'>", r"\1", text)
        raise CommandError(f"{text} ({parser.prog} --help lists the options)", USAGE) from error
    given.pop("config", None)
    return given
