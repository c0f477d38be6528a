"""Fields of config dataclasses that become command-line options."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config", bound=type)


def option(default: Any, help: str, *, from_data: bool = False) -> Any:
    """A field of a config dataclass.

    Args:
        default: the field's default.
        help: shown by ``--help``: a noun phrase that says what the option is, such as "AdamW beta1".
        from_data: the dataset's fact of the same name (``fastgen.batch.FACTS``) sets the field; it is no option.
    """
    return dataclasses.field(default=default, metadata={"help": help, "from_data": from_data})


def from_data(config_class: type) -> list[str]:
    """Names of the fields that the dataset decides."""
    return [field.name for field in dataclasses.fields(config_class) if field.metadata.get("from_data")]


def current_names(config_class: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names that the config's fields have now.

    A config whose fields were renamed maps their old names to the new ones, so that saved models and runs still load:
    ``renamed: ClassVar[Mapping[str, str]] = {"old_name": "new_name"}``.

    Raises:
        ValueError: an option is given under both names.
    """
    renamed: Mapping[str, str] = getattr(config_class, "renamed", {})
    for old, new in renamed.items():
        if old in saved and new in saved:
            raise ValueError(f"{new}: expected one value, got another under its old name {old}")
    return {renamed.get(name, name): value for name, value in saved.items()}


def takes_old_names(config_class: Config) -> Config:
    """Class decorator: the constructor takes keyword arguments under old names, too (``current_names``).

    Raises:
        ValueError: an option is given under both names.
    """
    init = config_class.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def with_current_names(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **current_names(config_class, options))

    config_class.__init__ = with_current_names  # type: ignore[misc]
    return config_class
