"""Conditions under which torch's fast path for encoder layers (nested tensors) is equivalent to the layer's forward.

The fast path reads the weights of all sublayers and calls none of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn._sublayers import is_fusible, is_unhooked
from fastgen.nn.attention import MultiheadAttention

__all__ = ["boolean_padding_mask", "has_forward_hooks", "unsupported_sublayer"]


def unsupported_sublayer(layer: nn.TransformerEncoderLayer) -> str | None:
    """Name of a sublayer or method that the fast path would skip although it may compute more than its weights."""
    for name in ("_sa_block", "_ff_block"):
        if getattr(type(layer), name) is not getattr(nn.TransformerEncoderLayer, name) or name in vars(layer):
            return name
    attention = layer.self_attn
    if type(attention).forward not in (MultiheadAttention.forward, nn.MultiheadAttention.forward):
        return "self_attn"
    if attention.bias_k is not None or attention.add_zero_attn or not is_unhooked(attention):
        return "self_attn"
    if not is_fusible(attention.out_proj, nn.Linear.forward):
        return "self_attn.out_proj"
    for name in ("linear1", "linear2"):
        if not is_fusible(getattr(layer, name), nn.Linear.forward):
            return name
    for name in ("norm1", "norm2"):
        if not is_fusible(getattr(layer, name), nn.LayerNorm.forward):
            return name
    for name in ("dropout", "dropout1", "dropout2"):
        dropout = getattr(layer, name)
        if type(dropout).forward is not nn.Dropout.forward or dropout.training or not is_unhooked(dropout):
            return name
    return None if _activation_matches(layer.activation, layer.activation_relu_or_gelu) else "activation"


def _activation_matches(activation: object, kind: int) -> bool:
    """Whether the activation still equals ``activation_relu_or_gelu`` (1 for ReLU, 2 for GELU)."""
    if kind == 1:
        return activation is F.relu or (type(activation) is nn.ReLU and is_unhooked(activation))
    if kind == 2:
        exact = type(activation) is nn.GELU and activation.approximate == "none" and is_unhooked(activation)
        return activation is F.gelu or exact
    return False


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether any submodule has forward hooks, for which torch disables its fast path."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def boolean_padding_mask(padding: Tensor) -> Tensor | None:
    """Converts a padding mask to boolean (True = masked); None if a floating mask has values other than 0 and -inf."""
    if padding.dtype == torch.bool:
        return padding
    masked = padding == -torch.inf
    return masked if bool((masked | (padding == 0)).all()) else None
