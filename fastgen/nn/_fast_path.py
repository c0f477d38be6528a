"""torch's inference kernels for few short sequences on CPU, where they compute exactly what a layer does.

They are one call for a whole layer, and what a call costs is most of the time where the sequence is short. They write
all scores to memory, so that longer sequences take fastgen's attention; so do masks, since torch's kernels give NaN for
a query that attends to no key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from fastgen._dynamo import is_dynamo_compiling
from fastgen.nn._sublayers import is_fusible
from fastgen.ops._direct import PLAIN, is_common
from fastgen.ops.transforms import transforms_active

__all__ = ["encoder_layer", "self_attention", "takes"]

_DTYPES = frozenset((torch.float32, torch.float64))
_MOST_SCORES = 128 * 128  # of a head: they fit a processor's cache
_MOST_ELEMENTS = 2**14  # of the input: with four times as many fastgen's own products are faster


def takes(attention: nn.MultiheadAttention, x: Tensor) -> bool:
    """Whether self-attention of x in inference is what torch's kernel computes, apart from hooks."""
    if (
        type(x) not in PLAIN
        or is_dynamo_compiling()
        or not x.is_cpu
        or x.is_nested
        or x.dtype not in _DTYPES
        or not is_common()
        or has_torch_function_unary(x)
        or transforms_active()
        or torch._C._is_tracing()
        or not torch.backends.mha.get_fastpath_enabled()
    ):
        return False
    shape = x.shape
    return (
        not attention.training
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and not attention.add_zero_attn
        and attention.num_heads % 2 == 0
        and len(shape) == 3
        and 0 not in shape
        and shape[2] == attention.embed_dim
        and shape[0] * shape[1] * shape[2] <= _MOST_ELEMENTS
        and shape[1] ** 2 <= min(4 * shape[1] * attention.head_dim, _MOST_SCORES)
    )


def _tensors(attention: nn.MultiheadAttention) -> tuple[Tensor | None, ...]:
    out = attention.out_proj
    return attention.in_proj_weight, attention.in_proj_bias, out.weight, out.bias


def _fit(x: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the tensors are plain ones like x, and no derivative is recorded."""
    recorded = torch.is_grad_enabled()
    dtype = x.dtype
    if recorded and x.requires_grad:
        return False
    return all(
        type(tensor) in PLAIN
        and tensor.dtype == dtype  # type: ignore[union-attr]
        and tensor.is_cpu  # type: ignore[union-attr]
        and not (recorded and tensor.requires_grad)  # type: ignore[union-attr]
        for tensor in tensors
    )


def self_attention(attention: nn.MultiheadAttention, x: Tensor) -> Tensor | None:
    """The output (B, N, E) of self-attention without masks; None where the layer has to compute it."""
    if not takes(attention, x) or not is_fusible(attention.out_proj, nn.Linear.forward):
        return None
    tensors = _tensors(attention)
    if not _fit(x, tensors):
        return None
    width, heads = attention.embed_dim, attention.num_heads
    kernel: Any = torch._native_multi_head_attention
    out: Tensor = kernel(x, x, x, width, heads, *tensors, None, False, True, None)[0]
    return out


def encoder_layer(layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor | None:
    """The output (B, N, E) of an encoder layer without masks, whose sublayers are torch's without hooks and whose
    attention ``takes`` x; None where the layer has to compute it."""
    attention, norm1, norm2 = layer.self_attn, layer.norm1, layer.norm2
    if norm1.eps != norm2.eps:
        return None
    linear1, linear2 = layer.linear1, layer.linear2
    rest = (
        *(norm1.weight, norm1.bias, norm2.weight, norm2.bias),
        *(linear1.weight, linear1.bias, linear2.weight, linear2.bias),
    )
    tensors = _tensors(attention)
    if not _fit(x, tensors + rest):
        return None
    width, heads, gelu = attention.embed_dim, attention.num_heads, layer.activation_relu_or_gelu == 2
    kernel: Any = torch._transformer_encoder_layer_fwd
    out: Tensor = kernel(x, width, heads, *tensors, gelu, layer.norm_first, norm1.eps, *rest, None, None)
    return out
