"""YAML files of options, for --config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastgen.cli._errors import USAGE, CommandError

MOST_BYTES = 2**20
LONGEST_NAME = 40
NAME = re.compile(r"[\w.-]+")
NULL = "tag:yaml.org,2002:null"
SWITCHES = ("true", "false", "yes", "no", "on", "off")


def split_config_files(argv: list[str]) -> tuple[list[str], list[str]]:
    """The files that follow --config, in order, and all other arguments."""
    files, rest = [], []
    left = iter(argv)
    for word in left:
        if word == "--":
            rest += [word, *left]
        elif word.startswith("--config="):
            files.append(_named(word.removeprefix("--config=")))
        elif word == "--config":
            files.append(_named(next(left, "")))
        else:
            rest.append(word)
    return files, rest


def _named(file: str) -> str:
    if not file or file.startswith("--"):
        raise CommandError(f"config: expected a file, got {file or 'nothing'}", USAGE)
    return file


def check(file: str, options: Mapping[str, Any], refused: Collection[str], program: str) -> None:
    """Check that a file holds options of the program and nothing else. Messages never quote other contents.

    Args:
        options: defaults by name, which has a dot where the option belongs to a group.
        refused: names of options that only the command line may give.

    Raises:
        CommandError: no such file, no YAML file of options, or a name in it that is unknown, refused, or repeated.
    """
    tree = _tree(file)
    if not isinstance(tree, yaml.MappingNode):
        raise _refusal(file, "other text" if tree else "an empty file")
    groups = {name.partition(".")[0] for name in options if "." in name}
    seen: set[str] = set()
    for name, line, value in _names(file, tree, groups):
        place = f"{file}, line {line}"
        if name in refused:
            raise CommandError(
                f"{place}: {name}: expected on the command line, not in a file, as it decides where to write", USAGE
            )
        if name in groups:
            raise CommandError(f"{place}: {name}: expected options by name below it, got something else", USAGE)
        if name not in options:
            raise CommandError(f"{place}: {_unknown(name, options, program)}", USAGE)
        if name in seen:
            raise CommandError(f"{place}: {name}: expected each option once, got this one again", USAGE)
        seen.add(name)
        if isinstance(options[name], bool) and not (
            isinstance(value, yaml.ScalarNode) and value.value.lower() in SWITCHES
        ):
            raise CommandError(f"{place}: {name}: expected true or false, got something else", USAGE)
        if options[name] is not None and value.tag == NULL:
            raise CommandError(f"{place}: {name}: expected a value, got nothing", USAGE)


def _tree(file: str) -> Any:
    path = Path(file)
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"; a run's options are in {inside}" if inside.is_file() else ""
        raise CommandError(f"{file}: expected a YAML file of options, got a folder{hint}", USAGE)
    if not path.exists():
        raise CommandError(f"{file}: expected a YAML file of options, got a path where there is no file", USAGE)
    try:
        with open(path, "rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise CommandError(f"{file}: expected a YAML file of options, got: {error.strerror}", USAGE) from error
    if len(data) > MOST_BYTES:
        raise _refusal(file, f"more than {MOST_BYTES // 2**20} MiB")
    try:
        return yaml.compose(data.decode("utf-8-sig"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise _refusal(file, "bytes that are no text") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" from line {mark.line + 1} on" if mark else ""
        raise _refusal(file, f"text that is no YAML{line}") from None


def _refusal(file: str, got: str) -> CommandError:
    return CommandError(f"{file}: expected a YAML file of options, such as 'epochs: 3', got {got}", USAGE)


def _names(
    file: str, tree: yaml.MappingNode, groups: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, int, yaml.Node]]:
    """Name, line and value of each option."""
    nested = {key.value for key, value in tree.value if isinstance(value, yaml.MappingNode)} & {*groups}
    for key, value in tree.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or not NAME.fullmatch(key.value):
            raise _refusal(file, f"other text in line {line}")
        name = prefix + key.value
        group = name.partition(".")[0]
        if name in nested:
            yield from _names(file, value, (), f"{name}.")
        elif "." in key.value and group in nested:
            raise CommandError(f"{file}, line {line}: {name}: expected it below {group}, where the others are", USAGE)
        else:
            yield name, line, value


def _unknown(name: str, options: Collection[str], program: str) -> str:
    shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
    hint = nearest(name.replace("-", "_"), options)
    return f"expected an option of {program}, got {shown}{f' (did you mean {hint}?)' if hint else ''}"


def nearest(name: str, options: Collection[str]) -> str:
    """The option most similar to a name; "" if none is."""
    same = [option for option in options if option.rpartition(".")[2] == name or (name and option.startswith(name))]
    return next(iter(same or difflib.get_close_matches(name, options, n=1)), "")
