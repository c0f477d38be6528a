"""Packages of the extras, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, package: str, what: str, extra: str = "train") -> Any:
    """The module; ImportError says that ``what`` needs ``package``, where it is not installed.

    extra: the extra of fastgen that has the package; "": none has.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        install = f"pip install 'fastgen[{extra}]'" if extra else f"pip install {package}"
        raise ImportError(f"{what}: expected {package} to be installed, got none: {install}") from None
