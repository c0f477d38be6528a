"""In-place replacement of torch layers by fastgen's layers.

fastgen's layers are subclasses of torch's without attributes of their own, so a layer is replaced by assigning its
``__class__``. Parameters, buffers, hooks, flags and references to the layer are unchanged.

Replaced layers have the attribute ``_fastgen_accelerated``, which distinguishes them from layers that were constructed
as fastgen's. It is copied by deepcopy and pickle, removed by ``restore``, and not part of the state dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

import fastgen.nn

_MARK = "_fastgen_accelerated"

_NAMES = (
    "GRU",
    "LSTM",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
)
_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(fastgen.nn, name) for name in _NAMES
}
_ORIGINALS = {fast: original for original, fast in _REPLACEMENTS.items()}
_WITHOUT_EQUIVALENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class AccelerationReport:
    """Report of ``accelerate`` and ``restore``. A layer that is shared between modules has several names.

    Attributes:
        replaced: maps the name of each replaced layer to its class before and after.
        kept: maps the name of each attention or recurrent layer that was not replaced to the reason. Other layers are
            not listed.
    """

    replaced: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for title, entries in (("replaced", self.replaced), ("kept", self.kept)):
            lines.append(f"{title}: {'none' if not entries else len(entries)}")
            width = max((len(name) for name in entries), default=0)
            lines += [f"  {name:{width}}  {text}" for name, text in entries.items()]
        return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Which layers are replaced


def named_modules(module: nn.Module, name: str = "", compiled: bool = False) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yields each module under each of its names, and whether it is inside a module compiled with ``torch.compile``."""
    compiled = compiled or hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
    yield name or "(model)", module, compiled
    for child_name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{name}.{child_name}" if name else child_name, compiled)


def is_of_library(module: nn.Module, library: str) -> bool:
    """Whether the module's class, or one that it is derived from, is a library's own."""
    return any(cls.__module__.partition(".")[0] == library for cls in type(module).__mro__)


def qualified_name(cls: type) -> str:
    """Public name of a class, for example torch.nn.LSTM."""
    for package, root in ((nn, "torch.nn"), (fastgen.nn, "fastgen.nn")):
        if getattr(package, cls.__name__, None) is cls:
            return f"{root}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _reason_kept(module: nn.Module) -> str | None:
    """Reason not to replace a layer; None if it can be replaced, or is not an attention or recurrent layer."""
    cls = type(module)
    if _MARK in vars(module):
        return f"already accelerated: {qualified_name(cls)}"
    if isinstance(module, torch.jit.ScriptModule):
        script = getattr(module, "original_name", "")
        return f"torch.nn.{script} is scripted (torch.jit)" if script in _NAMES else None
    if cls in _ORIGINALS:
        return f"constructed as {qualified_name(cls)}"
    if cls in _REPLACEMENTS:
        return _reason_original_class_kept(module)
    if cls.__module__.startswith("torch.ao.") and cls.__name__ in _NAMES:
        return f"quantized: {qualified_name(cls)}"
    if isinstance(module, LazyModuleMixin) and getattr(module, "cls_to_become", None) in _REPLACEMENTS:
        return "not initialized yet (lazy module): call the model once, then accelerate it"
    base = next((original for original in _REPLACEMENTS if isinstance(module, original)), None)
    if base is not None:
        return _reason_subclass_kept(module, base)
    if isinstance(module, _WITHOUT_EQUIVALENT):
        return f"{qualified_name(cls)} has no equivalent in fastgen.nn"
    return None


def _reason_subclass_kept(module: nn.Module, base: type[nn.Module]) -> str:
    cls = type(module)
    if is_parametrized(module) or cls.__module__.startswith("torch.distributed."):
        cause = "parametrization" if is_parametrized(module) else "FSDP"
        return f"{cause} changed the class of this {qualified_name(base)} to {cls.__name__}; accelerate before that"
    return f"{qualified_name(cls)} is a subclass of {qualified_name(base)}, which may override its behavior"


def _reason_original_class_kept(module: nn.Module) -> str | None:
    """Reason not to replace a layer whose class is exactly torch's; None if it can be replaced."""
    patched = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    if has_forward_of_its_class(module):
        patched = [name for name in patched if name != "forward"]
    if patched:
        return f"{', '.join(patched)} is overridden on the instance"
    if isinstance(module, nn.MultiheadAttention) and module.dropout >= 1:
        return f"dropout is {module.dropout}; fastgen's layer requires a probability below 1"
    return None


# --------------------------------------------------------------------------------------------------
# Replacement


def require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _set_class(module: nn.Module, cls: type[nn.Module]) -> str:
    text = f"{qualified_name(type(module))} -> {qualified_name(cls)}"
    vars(module).pop("forward", None)  # that of the class before
    module.__class__ = cls  # type: ignore[assignment]
    return text


def accelerate(model: nn.Module) -> AccelerationReport:
    """``fastgen.accelerate`` for the layers of ``torch.nn``."""
    require_module(model)
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    done: dict[nn.Module, str] = {}
    for name, module, compiled in named_modules(model):
        reason = None if module in done else _reason_kept(module)
        if reason is not None:
            kept[name] = reason
            continue
        if type(module) in _REPLACEMENTS:
            done[module] = _set_class(module, _REPLACEMENTS[type(module)])
            vars(module)[_MARK] = True
        if module in done:
            replaced[name] = done[module] + (", recompiled at its next call" if compiled else "")
    return AccelerationReport(replaced, kept)


def restore(model: nn.Module) -> AccelerationReport:
    """``fastgen.restore`` for the layers of ``torch.nn``."""
    accelerated = _accelerated(model)
    done = {}
    for _, module in accelerated:
        if module not in done:
            done[module] = _set_class(module, _ORIGINALS[type(module)])
            del vars(module)[_MARK]
    return AccelerationReport({name: done[module] for name, module in accelerated}, {})


def check_restore(model: nn.Module) -> None:
    """Raises what ``restore`` would raise, and changes nothing."""
    _accelerated(model)


def _accelerated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that ``restore`` restores, under each of their names."""
    require_module(model)
    accelerated = [(name, module) for name, module, _ in named_modules(model) if _MARK in vars(module)]
    for name, module in accelerated:
        if type(module) not in _ORIGINALS:
            raise RuntimeError(
                f"model: expected {name} to have the class that accelerate gave it, got {qualified_name(type(module))};"
                " undo the change (a parametrization, a wrapper) first"
            )
        if not has_forward_of_its_class(module):
            raise RuntimeError(
                f"model: expected {name} to have the forward of its class, got one that was set on the instance since;"
                " remove it (a hook of the package accelerate, for example) first"
            )
    return accelerated


def has_forward_of_its_class(module: nn.Module) -> bool:
    """False where another ``forward`` was set on the instance; a removed hook may leave the class's own there."""
    own = vars(module).get("forward")
    return own is None or (getattr(own, "__self__", None) is module and own.__func__ is type(module).forward)
