"""fastgen's attention in modules that call ``torch.nn.functional.scaled_dot_product_attention`` themselves.

A module is redirected by assigning it a subclass of its class whose ``forward`` runs the original ``forward`` under
``Redirection``, a ``TorchFunctionMode`` that replaces calls of torch's function. The module keeps its parameters,
hooks, submodules and attributes, and nothing outside of its ``forward`` is affected. Every forward pass enters the mode
anew, also one that ``torch.utils.checkpoint`` repeats in the backward pass, when a mode of the caller is gone.

The subclasses are created when they are first needed. An instance is pickled as its original class and a ``Variant``.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode

from fastgen import functional
from fastgen._dynamo import is_dynamo_compiling
from fastgen.nn._sublayers import is_unhooked

__all__ = [
    "REDIRECTED",
    "Redirection",
    "Variant",
    "can_be_skipped",
    "is_redirected",
    "original_class",
    "redirect",
    "redirected_class",
    "undo",
]

_TRACED = (FakeTensor, FunctionalTensor)


class Redirection(TorchFunctionMode):
    """Replaces calls of torch's ``scaled_dot_product_attention`` by fastgen's function.

    Calls with nested tensors or tensor subclasses (sharded, proxies of ``torch.fx``) still go to torch's function.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if is_dynamo_compiling():
            # Dynamo cannot trace the methods of Tensor that are written in Python and call super(). As methods of the
            # tensor, it knows them.
            name = getattr(func, "__name__", "")
            if getattr(Tensor, name, None) is func:
                return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*args, **kwargs)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    own = all(
        type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, _TRACED) for tensor in (query, key, value)
    ) and not (query.is_nested or key.is_nested or value.is_nested)
    function = functional.scaled_dot_product_attention if own else F.scaled_dot_product_attention
    return function(query, key, value, *args, **kwargs)


class Variant(NamedTuple):
    """What a redirected class changes.

    Attributes:
        forward: replaces the class's ``forward``; a function of a Python module, by whose name it is pickled. None: the
            original ``forward`` runs under ``Redirection``.
        flag: an attribute by which the module chooses torch's attention function. It reads as True while the module is
            redirected, unless one of ``steps`` has to be called.
        steps: names of the submodules of the module's own attention, a softmax and a dropout.
        finish: applied to the output; a function of a Python module, too.
    """

    forward: Callable[..., Any] | None = None
    flag: str | None = None
    steps: tuple[str, ...] = ()
    finish: Callable[[Any], Any] | None = None


REDIRECTED = Variant()

_CLASSES: dict[tuple[type[nn.Module], Variant], type[nn.Module]] = {}
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {}


def redirected_class(original: type[nn.Module], variant: Variant = REDIRECTED) -> type[nn.Module]:
    """The subclass of ``original`` that modules are redirected to; the same one at every call.

    Raises:
        TypeError: classes cannot be derived from ``original``.
    """
    key = (original, variant)
    if key not in _CLASSES:
        members: dict[str, Any] = {
            "__module__": __name__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "forward": variant.forward or _redirected_forward(original, variant.finish),
            "__reduce_ex__": _reduction(original, variant),
        }
        if variant.flag is not None:
            members[variant.flag] = _flag(variant.flag, variant.steps)
        cls = types.new_class(original.__name__, (original,), exec_body=lambda namespace: namespace.update(members))
        _CLASSES[key], _ORIGINALS[cls] = cls, original
    return _CLASSES[key]


def _redirected_forward(original: type[nn.Module], finish: Callable[[Any], Any] | None) -> Callable[..., Any]:
    inner = original.forward

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Redirection():
            out = inner(self, *args, **kwargs)
        return out if finish is None else finish(out)

    return forward


def _flag(name: str, steps: tuple[str, ...]) -> property:
    def get(module: nn.Module) -> Any:
        return module.__dict__[name] or can_be_skipped(module, steps)

    def set_own(module: nn.Module, value: Any) -> None:
        module.__dict__[name] = value

    return property(get, set_own)


def can_be_skipped(module: nn.Module, steps: tuple[str, ...]) -> bool:
    """Whether each submodule is torch's softmax or dropout without hooks, whose calls an attention function replaces.

    With a hook, one that records the attention weights for example, the submodule has to be called.
    """
    found = [module._modules[name] for name in steps if module._modules.get(name) is not None]
    return all(type(step) in _STEPS and is_unhooked(step) for step in found if step is not None)


_STEPS = (nn.Softmax, nn.Dropout, nn.Identity)


# --------------------------------------------------------------------------------------------------
# Modules


def is_redirected(module: nn.Module) -> bool:
    return type(module) in _ORIGINALS


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a redirected class, or a class derived from it since, was derived from; another class itself."""
    return next((_ORIGINALS[base] for base in cls.__mro__ if base in _ORIGINALS), cls)


def redirect(module: nn.Module, variant: Variant = REDIRECTED) -> None:
    cls = redirected_class(type(module), variant)
    vars(module).pop("forward", None)  # that of the class before
    module.__class__ = cls  # type: ignore[assignment]


def undo(module: nn.Module) -> None:
    vars(module).pop("forward", None)
    module.__class__ = original_class(type(module))  # type: ignore[assignment]


# --------------------------------------------------------------------------------------------------
# Copies and pickles


def _reduction(original: type[nn.Module], variant: Variant) -> Callable[[nn.Module, Any], Any]:
    """``__reduce_ex__`` of a redirected class, which cannot be pickled by name: names its original class."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        cls = redirected_class(original, variant)
        reduced: Any = super(cls, self).__reduce_ex__(max(protocol, 2))
        if type(self) is not cls:  # a class derived since, by a parametrization for example
            return reduced
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise pickle.PicklingError(
                f"{original.__module__}.{original.__qualname__}: expected a module pickled by its attributes, got one"
                " with its own __reduce__; call fastgen.restore first"
            )
        return (_new, (original, variant, *reduced[1][1:]), *reduced[2:])

    return __reduce_ex__


def _new(original: type[nn.Module], variant: Variant, *args: Any) -> nn.Module:
    cls = redirected_class(original, variant)
    return cls.__new__(cls, *args)
