"""Options from config dataclasses, by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse

from fastgen.batch import current_names
from fastgen.cli._config import check, nearest, split_config_files
from fastgen.cli._errors import USAGE, CommandError
from fastgen.train.folder import RunFolder


def options_parser(prog: str, description: str, *, files: bool = True) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description, print_config=None, exit_on_error=False, allow_abbrev=False
    )
    if files:
        parser.add_argument(
            "--config", action="config", help="YAML file of options; those on the command line override it"
        )
    return parser


def add_fields(
    parser: jsonargparse.ArgumentParser,
    config: type,
    prefix: str = "",
    without: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add one option per field of a config dataclass, with its type, default and help.

    defaults: values that replace the dataclass's defaults.
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
    for old, new in getattr(config, "renamed", {}).items():  # commands and config.yaml of earlier versions
        option = "--" + prefix + old.replace("_", "-")
        parser.add_argument(option, type=types[new] | None, default=None, help=argparse.SUPPRESS)


def parse(
    parser: jsonargparse.ArgumentParser, argv: list[str], *, defaults: bool, refused: Collection[str] = ()
) -> dict[str, Any]:
    """The options that were given; with ``defaults`` also the others.

    The command line overrides files, and a file overrides earlier files, regardless of their positions.

    Args:
        refused: names of options that no file may give.

    Raises:
        CommandError: an unknown option, an invalid value, or an invalid file.
    """
    known: dict[str, Any] = dict(vars(parser.get_defaults().as_flat()))
    takes_files = "config" in known
    known.pop("config", None)
    files, rest = split_config_files(argv) if takes_files else ([], argv)
    given = _parsed(parser, rest, known, defaults)
    ahead: list[str] = []
    for file in files:
        check(file, known, refused, parser.prog)
        ahead += ["--config", file]
        try:
            given = _parsed(parser, [*ahead, *rest], known, defaults)
        except CommandError as error:
            raise CommandError(f"{file}: {error}", USAGE) from error
    given.pop("config", None)
    return given


def given_under_current_names(config: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What ``parse`` with ``defaults`` gives for the fields of a config, without old names.

    Raises:
        ValueError: an option is given under both names.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    old = {name: given[name] for name in getattr(config, "renamed", {}) if given[name] is not None}
    as_given = {name: given[name] for name in defaults if given[name] != defaults[name]}
    return defaults | current_names(config, as_given | old)


def _parsed(
    parser: jsonargparse.ArgumentParser, argv: list[str], names: Collection[str], defaults: bool
) -> dict[str, Any]:
    try:
        given: dict[str, Any] = parser.parse_args(argv, defaults=defaults).as_dict()
    except argparse.ArgumentError as error:
        raise CommandError(f"{_plain(str(error), names)} ({parser.prog} --help lists the options)", USAGE) from error
    _check_sizes(given)
    return given


def _check_sizes(given: Mapping[str, Any], prefix: str = "") -> None:
    """Reject integers beyond 64 bits."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            _check_sizes(value, f"{prefix}{name}.")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise CommandError(f"{prefix}{name}: expected an integer from -2^63 to 2^63 - 1, got {value}", USAGE)


def _plain(message: str, names: Collection[str]) -> str:
    """jsonargparse's message without Python types, and with the most similar option."""
    text = re.sub(r'^Parser key "(.+?)":\s*', r"\1: ", message)
    union = re.fullmatch(
        r"(.+?): Does not validate against any.*?Subtypes: \[(.+?)\].*Given value: (.*)", text, re.DOTALL
    )
    if union:
        kinds = " or ".join(re.sub(r"<class '(\w+)'>", r"\1", union[2]).replace("NoneType", "null").split(", "))
        text = f"{union[1]}: Expected {kinds}. Got value: {union[3]}"
    text = re.sub(r"a <class '(\w+)'>", r"\1", text)
    text = re.sub(
        r"a typing\.Literal\[(.+?)\]", lambda found: "one of " + found[1].replace("'", "").replace('"', ""), text
    )
    unknown = re.match(r"unrecognized arguments: --([\w.-]+)", text)
    near = nearest(unknown[1].replace("-", "_"), [*names, "config"]) if unknown else ""
    return f"{text}; did you mean --{near.replace('_', '-')}?" if near else text


def run_folder(word: str) -> RunFolder:
    """The folder of a run. Raises CommandError for a file or subfolder of it."""
    path = Path(word)
    if not (path / "checkpoint.safetensors").exists() and (path.parent / "checkpoint.safetensors").is_file():
        raise CommandError(f"run: expected a run's folder, got its {path.name}; the run is {path.parent}", USAGE)
    return RunFolder(path)
