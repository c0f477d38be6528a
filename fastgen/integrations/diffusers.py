"""Attention of diffusers' models.

An attention module of diffusers delegates to its processor, which calls torch's attention function, directly or
through the dispatcher of attention backends. The module is redirected and the processor is left as it is. Processors
that are set afterwards (IP-Adapter, fused projections, ``set_attn_processor``) are then accelerated too, and diffusers'
checks of their classes keep working. Nothing is registered with diffusers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgen.integrations import _function_mode as mode
from fastgen.integrations import redirected
from fastgen.integrations._calls import names_used
from fastgen.integrations.modules import AccelerationReport, is_of_library
from fastgen.integrations.redirected import Choice

__all__ = ["accelerate", "check_restore", "recognizes", "restore"]

_DISPATCHER = "dispatch_attention_fn"

_NATIVE_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Attention backends that call torch's function."""


def recognizes(model: nn.Module) -> bool:
    return any(is_of_library(module, "diffusers") for module in model.modules())


def accelerate(model: nn.Module) -> AccelerationReport:
    """Redirects the modules whose processor, or whose own code, calls torch's attention function.

    A module is kept, with the reason in the report, if its processor computes the softmax itself or a backend other
    than torch's is selected for it.
    """
    return redirected.redirect_chosen(
        model, lambda module: _choice(module) if is_of_library(module, "diffusers") else None
    )


restore = redirected.restore
check_restore = redirected.check_restore


def _choice(module: nn.Module) -> Choice:
    processor = getattr(module, "processor", None)
    if processor is None:
        return redirected.choice_of(module)
    cls = type(processor)
    names = names_used(cls, "__call__")
    if isinstance(processor, nn.Module):
        names |= names_used(cls)
    if _DISPATCHER in names:
        return _reason_dispatched_elsewhere(processor) or _REDIRECTED
    if "get_attention_scores" in names:  # a method of diffusers.models.attention_processor.Attention
        return f"its processor {cls.__name__} computes the softmax itself; set another one"
    choice = redirected.choice_by_names(module, names, cls) or redirected.choice_of(module)
    return _REDIRECTED if choice == mode.REDIRECTED else choice


def _contiguous_for_tangents(out: Any) -> Any:
    """Makes the output contiguous where it has a tangent.

    The attention of feature maps returns channels last, and torch's group norm fails for such tangents (2.13: "view
    size is not compatible").
    """
    return out.contiguous() if isinstance(out, Tensor) and forward_ad._current_level >= 0 else out


_REDIRECTED = mode.Variant(finish=_contiguous_for_tangents)


def _reason_dispatched_elsewhere(processor: Any) -> str | None:
    """Reason to keep a module whose processor calls the dispatcher: it does not call torch's function."""
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism is enabled for it"
    selected = getattr(processor, "_attention_backend", None)
    if selected is None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        selected = _AttentionBackendRegistry.get_active_backend()[0]
    name = str(getattr(selected, "value", selected))
    if name not in _NATIVE_BACKENDS:
        return f'its attention backend is "{name}"; call set_attention_backend("native") first'
    return None
