"""Layers of a model exchanged in place, and given back.

fastgen's layers are subclasses of torch's that keep nothing of their own on the instance, so a layer is exchanged by
giving it the other class. Parameters, buffers, hooks, flags and every reference to the layer stay what they are.

An exchanged layer carries the attribute ``_fastgen_accelerated``. It travels with deepcopy and pickle, it tells such
layers from those built as fastgen's, and ``restore`` takes it away again. State dicts do not hold it.
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
_OURS: dict[type[nn.Module], type[nn.Module]] = {getattr(nn, name): getattr(fastgen.nn, name) for name in _NAMES}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_WITHOUT_EQUIVALENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class AccelerationReport:
    """What was done to which layer. A layer that stands in several places has several names.

    Attributes:
        replaced: name -> the class before and after.
        kept: name -> why a layer of attention or recurrence was left alone. Other layers are not listed.
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
# Looking


def _places(module: nn.Module, name: str = "", compiled: bool = False) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module under every name it has, and whether it is there in code of torch.compile."""
    compiled = compiled or hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
    yield name or "(model)", module, compiled
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _places(child, f"{name}.{child_name}" if name else child_name, compiled)


def _name_of(cls: type) -> str:
    """torch.nn.LSTM, as one writes it."""
    for package, root in ((nn, "torch.nn"), (fastgen.nn, "fastgen.nn")):
        if getattr(package, cls.__name__, None) is cls:
            return f"{root}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _why_kept(module: nn.Module) -> str | None:
    """Why a layer keeps its class; None for one that has an equivalent, and for what is no such layer at all."""
    cls = type(module)
    if _MARK in vars(module):
        return f"accelerated before: {_name_of(cls)}"
    if isinstance(module, torch.jit.ScriptModule):
        script = getattr(module, "original_name", "")
        return f"a script of torch.nn.{script}, which runs outside Python" if script in _NAMES else None
    if cls in _THEIRS:
        return f"built as {_name_of(cls)}"
    if cls in _OURS:
        return _why_not_this_one(module)
    if cls.__module__.startswith("torch.ao.") and cls.__name__ in _NAMES:
        return f"quantised: {_name_of(cls)}"
    if isinstance(module, LazyModuleMixin) and getattr(module, "cls_to_become", None) in _OURS:
        return "not initialised yet: call the model once, then accelerate it"
    base = next((theirs for theirs in _OURS if isinstance(module, theirs)), None)
    if base is not None:
        return _why_not_this_subclass(module, base)
    if isinstance(module, _WITHOUT_EQUIVALENT):
        return f"{_name_of(cls)} has no equivalent in fastgen.nn"
    return None


def _why_not_this_subclass(module: nn.Module, base: type[nn.Module]) -> str:
    cls = type(module)
    if is_parametrized(module) or cls.__module__.startswith("torch.distributed."):
        cause = "a parametrisation" if is_parametrized(module) else "FSDP"
        return f"{cause} gave this {_name_of(base)} a class of its own, {cls.__name__}; accelerate before that"
    return f"{_name_of(cls)} is a subclass of {_name_of(base)}, and may compute something else"


def _why_not_this_one(module: nn.Module) -> str | None:
    """Why a layer of torch's own class cannot have ours."""
    patched = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    if patched:
        return f"{', '.join(patched)} was replaced on the instance"
    if isinstance(module, nn.MultiheadAttention) and module.dropout >= 1:
        return f"dropout is {module.dropout}, which drops everything; fastgen's takes a probability below 1"
    return None


# --------------------------------------------------------------------------------------------------
# Exchanging


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _exchange(module: nn.Module, cls: type[nn.Module]) -> str:
    text = f"{_name_of(type(module))} -> {_name_of(cls)}"
    module.__class__ = cls  # type: ignore[assignment]
    return text


def accelerate(model: nn.Module) -> AccelerationReport:
    """Give a model's layers fastgen's implementations, in place, where there is one for exactly that class.

    MultiheadAttention, the Transformer layers, LSTM and GRU. The layers stay the same objects with the same parameters,
    so optimisers, hooks, state dicts and wrappers (DDP) keep working. Results stay the same up to rounding, but for the
    random numbers of dropout and for queries that may see no key, which get 0. Derivatives of second order and forward
    mode are there besides.

    A model may be accelerated again after layers were added. Code of torch.compile is compiled anew at its next call;
    better accelerate first. A pickle of an accelerated model needs fastgen to be loaded; its state dict does
    not. ``torch.jit.script`` takes torch's layers only: restore first.

    Args:
        model: any module. Not replaced, and named in the report: subclasses of torch's layers, layers with a method
            replaced on the instance, parametrised, sharded (fully_shard), quantised, scripted and uninitialised ones,
            and recurrent layers without equivalent (torch.nn.RNN, the cells).

    Returns:
        What was replaced, and what was not and why. Print it.

    Raises:
        TypeError: model is not a module.

    Example:
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
    _require_module(model)
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    done: dict[nn.Module, str] = {}
    for name, module, compiled in _places(model):
        reason = None if module in done else _why_kept(module)
        if reason is not None:
            kept[name] = reason
            continue
        if type(module) in _OURS:
            done[module] = _exchange(module, _OURS[type(module)])
            vars(module)[_MARK] = True
        if module in done:
            replaced[name] = done[module] + (", compiled anew at its next call" if compiled else "")
    return AccelerationReport(replaced, kept)


def restore(model: nn.Module) -> AccelerationReport:
    """Undo ``accelerate``: every layer that it replaced has torch's class again. Nothing else changes.

    Layers built as fastgen's stay. Copies of accelerated layers (deepcopy, pickle) count as accelerated.

    Args:
        model: any module, also one that was never accelerated, or a part of one that was.

    Returns:
        What was replaced; ``kept`` is empty.

    Raises:
        TypeError: model is not a module.
        RuntimeError: an accelerated layer has been given another class since, by a parametrisation for instance.
            Then nothing is restored.
    """
    _require_module(model)
    marked = [place for place in _places(model) if _MARK in vars(place[1])]
    for name, module, _ in marked:
        if type(module) not in _THEIRS:
            raise RuntimeError(
                f"model: expected {name} to have the class that accelerate gave it, got {_name_of(type(module))};"
                " undo first what changed it (a parametrisation, a wrapper)"
            )
    done = {}
    for _, module, _ in marked:
        if module not in done:
            done[module] = _exchange(module, _THEIRS[type(module)])
            del vars(module)[_MARK]
    return AccelerationReport({name: done[module] for name, module, _ in marked}, {})
