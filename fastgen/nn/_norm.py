"""Layer normalisation with derivatives that are right in forward mode too."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen._dynamo import in_graph
from fastgen.nn._sublayers import is_plain
from fastgen.ops.transforms import transforms_active

__all__ = ["normalized"]


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, with derivatives that are right in forward mode too."""
    compiling = torch.compiler.is_compiling()
    y: Tensor
    if (compiling or transforms_active()) and isinstance(norm, nn.LayerNorm):
        if is_plain(norm, nn.LayerNorm.forward):
            return _forward(norm, x)
        if not compiling and type(norm).forward is nn.LayerNorm.forward and "forward" not in vars(norm):
            norm.forward = partial(_forward, norm)  # type: ignore[method-assign]  # between its hooks
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
    """Ba, Kiros and Hinton, "Layer normalization" (2016), over the last dims.

    torch's takes mean and deviation for constants in the derivatives of its tangent, which come out wrong without a
    word (pytorch/pytorch#196700); so under transforms it is written out. torch.compile decides as late as this is run.
    """
    if not transforms_active():
        return F.layer_norm(x, shape, weight, bias, eps)
    dims = tuple(range(-len(shape), 0))
    low = x.dtype.itemsize < 4
    centered = x.float() if low else x
    centered = centered - centered.mean(dims, keepdim=True)
    y = centered * (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    kind = x.device.type
    # By autocast, which leaves it alone on CPU.
    widened = kind not in ("cpu", "meta") and torch.is_autocast_enabled(kind)
    return y.to(x.dtype) if low and not widened else y
