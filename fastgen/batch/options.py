"""Fields of config dataclasses that become command-line options."""

from __future__ import annotations

import dataclasses
from typing import Any


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
