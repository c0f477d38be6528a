"""fastgen: fused, twice differentiable layers for generative models."""

from __future__ import annotations

import sys
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastgen.version import __version__

__all__ = [
    "AccelerationReport",
    "Info",
    "__version__",
    "accelerate",
    "create_model",
    "current_backend",
    "functional",
    "info",
    "list_models",
    "load",
    "losses",
    "ops",
    "register_model",
    "restore",
    "use_backend",
]

_SUBMODULES = ("functional", "integrations", "losses", "models", "nn", "ops", "reference")

_HOMES = {
    "functional": "fastgen",
    "losses": "fastgen",
    "ops": "fastgen",
    **dict.fromkeys(("Info", "info"), "fastgen.environment"),
    **dict.fromkeys(("current_backend", "use_backend"), "fastgen.backend"),
    **dict.fromkeys(("AccelerationReport", "accelerate", "restore"), "fastgen.integrations"),
}

_ZOO = ("create_model", "list_models", "load", "register_model")
"""Names from ``fastgen.models``, which is imported when one of them is first used."""

if TYPE_CHECKING:
    from fastgen import functional, losses, ops
    from fastgen import models as models
    from fastgen import nn as nn
    from fastgen import reference as reference
    from fastgen.backend import current_backend, use_backend
    from fastgen.environment import Info, info
    from fastgen.integrations import AccelerationReport, accelerate, restore
    from fastgen.models import create_model, list_models, load, register_model
else:

    def __getattr__(name: str) -> Any:
        """Imports submodules at their first use, and the package's names where torch is not imported yet."""
        if name in _SUBMODULES:
            return import_module(f"{__name__}.{name}")
        if name in _ZOO:
            return getattr(import_module(f"{__name__}.models"), name)
        if name in __all__:
            return _load()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


OLDEST_TORCH = (2, 10)


def _require_torch() -> None:
    """Imports torch.

    Raises:
        ImportError: there is none, or one that is too old.
    """
    needed = f"fastgen requires PyTorch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer (pip install torch)"
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(f"{needed}: No module named 'torch'", name="torch") from None
    release = tuple(int(part) for part in str(torch.__version__).split(".")[:2])
    if release < OLDEST_TORCH:
        raise ImportError(f"{needed}, got {torch.__version__}")


def _load() -> dict[str, Any]:
    """Import torch, register the operators, and fill in the package's names."""
    _require_torch()
    for name, module in _HOMES.items():
        globals()[name] = getattr(import_module(module), name)
    return globals()


def _is_command() -> bool:
    """Whether this process is ``fastgen ...`` or ``python -m fastgen ...``.

    A command imports torch, which is slow, only when it needs it. Everywhere else importing fastgen registers the
    operators (``torch.ops.fastgen``).
    """
    program = (getattr(sys, "argv", None) or [""])[0].replace("\\", "/").rpartition("/")[2].lower()
    if program == "-m":  # Python is still locating the module to run
        return ("-m", "fastgen") in pairwise(sys.orig_argv)
    return program in ("fastgen", "fastgen.exe")


if not _is_command():
    _load()
