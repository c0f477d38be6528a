"""Use of fastgen's operators in models of other libraries.

``accelerate`` and ``restore`` treat torch's own layers (``modules``) first, then the models of every library of
``_LIBRARIES`` that the program has imported. The module of a library has the library's name and offers

- ``recognizes(model) -> bool``: whether the model contains modules of the library;
- ``accelerate(model) -> AccelerationReport`` and ``restore(model) -> AccelerationReport``, with names as in
  ``model.named_modules()`` and ``"(model)"`` for the model itself;
- ``check_restore(model) -> None``, which raises what ``restore`` would raise, and changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from typing import Protocol, cast

from torch import nn

from fastgen.integrations import modules
from fastgen.integrations.modules import AccelerationReport

__all__ = ["AccelerationReport", "accelerate", "available", "register", "restore"]

_LIBRARIES = {"transformers": (5, 0), "diffusers": (0, 35), "timm": (1, 0)}
"""Libraries with a module of the same name in this package, and the oldest supported version."""

_REGISTRIES = ("transformers",)
"""Libraries whose module here has ``register() -> None``."""


class _Integration(Protocol):
    def recognizes(self, model: nn.Module) -> bool: ...
    def accelerate(self, model: nn.Module) -> AccelerationReport: ...
    def restore(self, model: nn.Module) -> AccelerationReport: ...
    def check_restore(self, model: nn.Module) -> None: ...


def _integrations(model: nn.Module) -> Iterator[_Integration]:
    """The integrations that recognize ``model``. A library that is not imported has no modules in it."""
    for library in _LIBRARIES:
        if library in sys.modules and _problem(library) is None:
            integration = cast(_Integration, import_module(f"{__name__}.{library}"))
            if integration.recognizes(model):
                yield integration


def _problem(library: str) -> str | None:
    """Why the integration of a library is not possible here; None if it is."""
    version = _version(library)
    if version is None:
        return "not installed"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    return None if numbers >= _LIBRARIES[library] else f"version {version}, expected >= {_oldest(library)}"


def _oldest(library: str) -> str:
    return ".".join(map(str, _LIBRARIES[library]))


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _merged(reports: list[AccelerationReport]) -> AccelerationReport:
    """One report; a module that one integration replaced is not listed as kept by another."""
    replaced = {name: text for report in reports for name, text in report.replaced.items()}
    kept = {name: text for report in reports for name, text in report.kept.items() if name not in replaced}
    return AccelerationReport(replaced, kept)


def accelerate(model: nn.Module) -> AccelerationReport:
    reports = [modules.accelerate(model)]
    return _merged(reports + [integration.accelerate(model) for integration in _integrations(model)])


def restore(model: nn.Module) -> AccelerationReport:
    modules.check_restore(model)
    integrations = list(_integrations(model))
    for integration in integrations:
        integration.check_restore(model)
    return _merged([modules.restore(model)] + [integration.restore(model) for integration in integrations])


def available() -> dict[str, str]:
    """The libraries that fastgen integrates with, and whether that is possible here.

    Reads the versions of the installed packages and imports none of them.

    Returns:
        Maps the name of each library to its version and "possible", or to the reason why it is not.
    """
    return {library: _problem(library) or f"{_version(library)} (possible)" for library in _LIBRARIES}


def register(library: str = "transformers") -> None:
    """Registers fastgen's attention under the name "fastgen" in the registry of a library, for this process.

    Models that are built or loaded afterwards select it by name, ``attn_implementation="fastgen"`` in transformers.
    Other models are unaffected. Imports the library.

    Raises:
        ValueError: the library has no registry.
        RuntimeError: the library is not installed, or too old.
    """
    if library not in _REGISTRIES:
        raise ValueError(f"library: expected one of {', '.join(_REGISTRIES)}, got {library!r}")
    problem = _problem(library)
    if problem is not None:
        raise RuntimeError(f"library: expected {library} >= {_oldest(library)}, got {problem}")
    import_module(f"{__name__}.{library}").register()
