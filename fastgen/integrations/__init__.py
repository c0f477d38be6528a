"""Use of fastgen's operators in models of other libraries.

``accelerate`` and ``restore`` treat torch's own layers (``modules``) first, then the models of every library of
``_LIBRARIES`` that the program has imported, then modules of other libraries (``redirected``). The module of a library
has the library's name and offers

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

from fastgen.backend import decompositions
from fastgen.integrations import modules, redirected
from fastgen.integrations.modules import AccelerationReport
from fastgen.integrations.redirected import redirect_attention

__all__ = [
    "AccelerationReport",
    "accelerate",
    "available",
    "decompositions",
    "redirect_attention",
    "register",
    "restore",
]

_LIBRARIES = {"transformers": (5, 0), "diffusers": (0, 30), "timm": (0, 9), "torchvision": (0, 20)}
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
    yield redirected


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
    """Replaces torch layers in ``model`` and the attention of other libraries' models, in place.

    Replaces ``MultiheadAttention``, the Transformer layers, ``LSTM`` and ``GRU`` of ``torch.nn``. The layers remain the
    same objects with the same parameters, so optimizers, hooks, state dicts and wrappers (DDP) keep working. Results
    are the same up to rounding, except for the random numbers of dropout and for fully masked queries, whose attention
    output is 0. The layers gain second-order and forward-mode derivatives.

    Models of other libraries keep their modules and call fastgen's attention function: ``available`` lists the
    libraries, and the guide ("Integrations") what is replaced in each. A model of transformers selects it in its
    config, as ``set_attn_implementation`` does; models that share the config object share the choice.

    ``accelerate`` may be called again after layers were added. Modules compiled with ``torch.compile`` are recompiled
    at their next call; accelerate before compiling. Loading a pickle of an accelerated model requires fastgen; loading
    its state dict does not. ``torch.jit.script`` supports torch's layers only: call ``restore`` first.

    Args:
        model: any module. The following layers are not replaced, and are listed in the report: subclasses of torch's
            layers; layers with a method overridden on the instance; parametrized, sharded (``fully_shard``), quantized,
            scripted and uninitialized (lazy) layers; recurrent layers without an equivalent (``torch.nn.RNN`` and the
            cells); attention layers of other libraries that compute attention themselves, or with arguments that
            fastgen's function does not have.

    Returns:
        A printable report of the layers that were replaced, and of those that were not, with the reason.

    Raises:
        TypeError: if ``model`` is not a module.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GRU(4, 5), torch.nn.RNN(5, 6))
        >>> print(accelerate(model))
        replaced: 1
          1  torch.nn.GRU -> fastgen.nn.GRU
        kept: 1
          2  torch.nn.RNN has no equivalent in fastgen.nn
        >>> print(restore(model))
        replaced: 1
          1  fastgen.nn.GRU -> torch.nn.GRU
        kept: none
    """
    reports = [modules.accelerate(model)]
    return _merged(reports + [integration.accelerate(model) for integration in _integrations(model)])


def restore(model: nn.Module) -> AccelerationReport:
    """Reverts ``accelerate``: restores torch's class of every replaced layer, and the attention of other libraries.

    Layers that were constructed as fastgen's, and models that selected it by name, are unchanged. Copies of accelerated
    models (deepcopy, pickle) are restored, too. A model of transformers whose attention was selected anew since keeps
    that selection.

    Args:
        model: any module, for example a part of an accelerated model, or a model that was never accelerated.

    Returns:
        A report of the restored layers; ``kept`` is empty.

    Raises:
        TypeError: if ``model`` is not a module.
        RuntimeError: if the class of an accelerated layer was changed since, by a parametrization for example. Nothing
            is restored in this case.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GRU(4, 5))
        >>> _ = accelerate(model)
        >>> print(restore(model))
        replaced: 1
          1  fastgen.nn.GRU -> torch.nn.GRU
        kept: none
    """
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
        raise RuntimeError(f"library: expected {library} >= {_oldest(library)}, got {problem.partition(',')[0]}")
    import_module(f"{__name__}.{library}").register()
