"""When torch's inference kernel for encoder layers, which skips padding in nested tensors, computes what they compute.

It reads the weights of all sublayers and calls none of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn._sublayers import is_plain, is_untouched
from fastgen.nn.attention import MultiheadAttention

__all__ = ["has_forward_hooks", "hidden_positions", "ignored_by_kernel"]


def ignored_by_kernel(layer: nn.TransformerEncoderLayer) -> str | None:
    """The name of a sublayer or method that the kernel would not call although it may do more than its weights say."""
    for name in ("_sa_block", "_ff_block"):
        if getattr(type(layer), name) is not getattr(nn.TransformerEncoderLayer, name) or name in vars(layer):
            return name
    attention = layer.self_attn
    if type(attention).forward not in (MultiheadAttention.forward, nn.MultiheadAttention.forward):
        return "self_attn"
    if attention.bias_k is not None or attention.add_zero_attn or not is_untouched(attention):
        return "self_attn"
    if not is_plain(attention.out_proj, nn.Linear.forward):
        return "self_attn.out_proj"
    for name in ("linear1", "linear2"):
        if not is_plain(getattr(layer, name), nn.Linear.forward):
            return name
    for name in ("norm1", "norm2"):
        if not is_plain(getattr(layer, name), nn.LayerNorm.forward):
            return name
    for name in ("dropout", "dropout1", "dropout2"):
        dropout = getattr(layer, name)
        if type(dropout).forward is not nn.Dropout.forward or dropout.training or not is_untouched(dropout):
            return name
    return None if _is_known(layer.activation, layer.activation_relu_or_gelu) else "activation"


def _is_known(activation: object, kind: int) -> bool:
    """Whether it is what torch noted when the layer was built: 1 for relu, 2 for gelu."""
    if kind == 1:
        return activation is F.relu or (type(activation) is nn.ReLU and is_untouched(activation))
    if kind == 2:
        exact = type(activation) is nn.GELU and activation.approximate == "none" and is_untouched(activation)
        return activation is F.gelu or exact
    return False


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether torch, because of them, does without its kernel."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def hidden_positions(padding: Tensor) -> Tensor | None:
    """The padding mask as a boolean one, True = hidden; None where it adds to the scores without hiding."""
    if padding.dtype == torch.bool:
        return padding
    hidden = padding == -torch.inf
    return hidden if bool((hidden | (padding == 0)).all()) else None
