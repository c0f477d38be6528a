"""Layer normalization with correct forward-mode derivatives."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen._dynamo import in_graph
from fastgen.nn._sublayers import is_fusible
from fastgen.ops.transforms import transforms_active

__all__ = ["apply_norm"]


def apply_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Returns ``norm(x)``. A ``nn.LayerNorm`` has correct derivatives under ``torch.func`` transforms, too."""
    compiling = torch.compiler.is_compiling()
    y: Tensor
    if (compiling or transforms_active()) and isinstance(norm, nn.LayerNorm):
        if is_fusible(norm, nn.LayerNorm.forward):
            return _forward(norm, x)
        if not compiling and type(norm).forward is nn.LayerNorm.forward and "forward" not in vars(norm):
            norm.forward = partial(_forward, norm)  # type: ignore[method-assign]  # keeps its hooks
            try:
                y = norm(x)
            finally:
                del norm.forward
            return y
    y = norm(x)
    return y


def _forward(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    y: Tensor = _layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return y


@in_graph
def _layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalization over the last ``len(shape)`` dims (Ba, Kiros and Hinton, 2016).

    ``F.layer_norm`` treats mean and variance as constants in the derivatives of its tangent, which are silently wrong
    (pytorch/pytorch#196700), so the formula is evaluated explicitly under transforms. Under ``torch.compile`` the
    choice is made at run time.
    """
    if not transforms_active():
        return F.layer_norm(x, shape, weight, bias, eps)
    dims = tuple(range(-len(shape), 0))
    low_precision = x.dtype.itemsize < 4
    centered = x.float() if low_precision else x
    centered = centered - centered.mean(dims, keepdim=True)
    y = centered * (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    device_type = x.device.type
    # Autocast runs layer_norm in float32 on every device but the CPU.
    upcast = device_type not in ("cpu", "meta") and torch.is_autocast_enabled(device_type)
    return y.to(x.dtype) if low_precision and not upcast else y
