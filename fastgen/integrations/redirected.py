"""Redirection of the attention calls of any library's modules, and the reasons why a module is left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastgen.integrations import _function_mode as mode
from fastgen.integrations._calls import names_used
from fastgen.integrations.modules import (
    AccelerationReport,
    has_forward_of_its_class,
    named_modules,
    qualified_name,
    require_module,
)

__all__ = ["accelerate", "check_restore", "recognizes", "redirect_attention", "restore"]

_ATTENTION = "scaled_dot_product_attention"

_OTHER_FUNCTIONS = ("multi_head_attention_forward", "flex_attention")

_ELSEWHERE = ("torch", "fastgen", "transformers", "diffusers", "timm", "torchvision")
"""Packages whose modules this module does not report: those of other modules of ``fastgen.integrations``."""

Choice = str | mode.Variant | None
"""The reason why a module is kept, how it is redirected, or None for a module without attention."""


def redirect_attention(model: nn.Module, *classes: type[nn.Module]) -> AccelerationReport:
    """Replaces torch's attention function by fastgen's in modules whose code calls it, in place.

    For the modules of libraries that ``fastgen.accelerate`` does not know, and for one's own:
    ``torch.nn.functional.scaled_dot_product_attention`` is replaced in the forward passes of these modules and nowhere
    else. They keep their parameters, submodules, hooks and state dict, and remain instances of their class;
    ``fastgen.restore`` undoes it.

    Args:
        model: any module.
        classes: the classes whose instances in ``model`` are redirected. Subclasses are included. At least one.

    Returns:
        A report of the modules of ``classes``, with the reason for each that was kept: its code contains no call of
        the function, its ``forward`` is overridden on the instance, or a parametrization or FSDP changed its class.

    Raises:
        TypeError: ``model`` is not a module, or ``classes`` is empty or contains something other than module classes.

    Example:
        >>> class Attend(torch.nn.Module):
        ...     def forward(self, q, k, v):
        ...         return torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> print(redirect_attention(torch.nn.Sequential(Attend()), Attend))
        replaced: 1
          0  fastgen.integrations.redirected.Attend calls fastgen's attention
        kept: none
    """
    require_module(model)
    if not classes or not all(isinstance(cls, type) and issubclass(cls, nn.Module) for cls in classes):
        raise TypeError(f"classes: expected one or more subclasses of torch.nn.Module, got {classes!r}")

    def choose(module: nn.Module) -> Choice:
        if not isinstance(module, classes):
            return None
        return choice_of(module) or f"no call of {_ATTENTION} in the code of {qualified_name(_original(module))}"

    return redirect_chosen(model, choose)


def _original(module: nn.Module) -> type[nn.Module]:
    return mode.original_class(type(module))


def redirect_chosen(model: nn.Module, choose: Callable[[nn.Module], Choice]) -> AccelerationReport:
    """Redirects the modules for which ``choose`` returns a variant, and reports those for which it has a reason."""
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    done: dict[nn.Module, str] = {}
    for name, module, compiled in named_modules(model):
        if module not in done:
            choice = choose(module)
            if isinstance(choice, mode.Variant):
                choice = reason_unsuited(module) or choice
            if isinstance(choice, mode.Variant):
                done[module] = f"{qualified_name(type(module))} calls fastgen's attention"
                mode.redirect(module, choice)
            elif choice is not None:
                kept[name] = choice
        if module in done:
            replaced[name] = done[module] + (", recompiled at its next call" if compiled else "")
    return AccelerationReport(replaced, kept)


def choice_of(module: nn.Module) -> Choice:
    """What is done with a module, according to the code of its ``forward``."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    cls = _original(module)
    return choice_by_names(module, names_used(cls), cls)


def choice_by_names(module: nn.Module, names: frozenset[str], cls: type) -> Choice:
    """What is done with a module whose attention is in code with these names, the code of a method of ``cls``."""
    if _ATTENTION in names:
        return mode.REDIRECTED
    for function in _OTHER_FUNCTIONS:
        if function in names:
            return f"{qualified_name(cls)} calls {function}"
    by_hand = "softmax" in names or any(isinstance(child, nn.Softmax) for child in module.children())
    if by_hand and re.search("att(n|en)", cls.__name__, re.IGNORECASE):
        return f"{qualified_name(cls)} computes the softmax itself"
    return None


def reason_unsuited(module: nn.Module) -> str | None:
    """Reason not to redirect a module whose code calls torch's attention function."""
    cls = type(module)
    if mode.is_redirected(module):
        return f"already accelerated: {qualified_name(_original(module))}"
    if not has_forward_of_its_class(module):
        return "forward is overridden on the instance; accelerate before that"
    if is_parametrized(module) or cls.__module__.startswith("torch."):
        cause = "a parametrization" if is_parametrized(module) else "FSDP"
        return f"{cause} changed the class of this module to {cls.__name__}; accelerate before that"
    if any("checkpoint" in name for name in names_used(cls)):
        return f"{qualified_name(cls)} repeats a part of its forward pass (activation checkpointing)"
    return None


# --------------------------------------------------------------------------------------------------
# As an integration of fastgen.accelerate: modules of other libraries


def recognizes(model: nn.Module) -> bool:
    """True for every model: modules of any library may call attention."""
    return True


def accelerate(model: nn.Module) -> AccelerationReport:
    """Redirects nothing; the report names modules of other libraries that compute attention, with the reason."""

    def choose(module: nn.Module) -> Choice:
        cls = _original(module)
        if cls.__module__.partition(".")[0] in _ELSEWHERE:
            return None
        choice = choice_of(module)
        if not isinstance(choice, mode.Variant):
            return choice
        hint = f"fastgen.integrations.redirect_attention(model, {cls.__name__}) replaces it"
        return reason_unsuited(module) or f"{qualified_name(cls)} calls torch's {_ATTENTION}; {hint}"

    return redirect_chosen(model, choose)


def restore(model: nn.Module) -> AccelerationReport:
    """Restores the class of every redirected module, of whatever library."""
    replaced = {}
    done: dict[nn.Module, str] = {}
    for name, module in list(_redirected(model)):
        if module not in done:
            mode.undo(module)
            done[module] = f"{qualified_name(type(module))} calls torch's attention"
        replaced[name] = done[module]
    return AccelerationReport(replaced, {})


def check_restore(model: nn.Module) -> None:
    """Raises what ``restore`` would raise, and changes nothing."""
    for name, module in _redirected(model):
        if not mode.is_redirected(module):
            raise RuntimeError(
                f"model: expected {name} to have the class that accelerate gave it, got {qualified_name(type(module))};"
                " undo the change (a parametrization, a wrapper) first"
            )
        if not has_forward_of_its_class(module):
            raise RuntimeError(
                f"model: expected {name} to have the forward of its class, got one that was set on the instance since;"
                " remove it (a hook of the package accelerate, for example) first"
            )


def _redirected(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module, _ in named_modules(model):
        if mode.original_class(type(module)) is not type(module):
            yield name, module
