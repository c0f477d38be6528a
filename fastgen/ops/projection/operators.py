"""Projection of tokens or of a feature map to heads.

``projection_forward`` takes x (B, N, C), or (B, C, N) with ``channels_first``, and a packed weight
(sum of heads * head_dims, C), and returns one (B, heads, N, head_dim) tensor for each packed part, after the epilogue
(``HeadEpilogue``); with ``keep`` the normalized parts before their normalization follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.backend import define
from fastgen.ops._batching import fold, map_slices, out_dims, unfold
from fastgen.ops.projection import checks, epilogue
from fastgen.ops.projection.epilogue import HeadEpilogue
from fastgen.ops.projection.layout import Layout, join_heads, length_first, to_tokens
from fastgen.ops.projection.linear import linear, weight_grads

# --------------------------------------------------------------------------------------------------
# Tokens to heads


def _part_fake(part: Tensor, *rest: Any) -> Tensor:
    batch, heads, length, dim = part.shape
    return part.new_empty(batch, length, heads, dim).transpose(1, 2)


def part_epilogue(part: Tensor, *rest: Any) -> Tensor:
    """PyTorch implementation of ``cpu_finish_heads``."""
    return _part_fake(part).copy_(epilogue.apply_to_part(part, *rest))


def _part_backward_fake(grad: Tensor, part: Tensor, norm: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    grad_norm = part.new_empty(0, dtype=torch.float32) if norm is None else norm.new_empty(norm.shape)
    return _part_fake(part), grad_norm


def part_epilogue_backward(grad: Tensor, part: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``cpu_finish_heads_backward``."""
    grad_part, grad_norm = epilogue.part_backward(grad, part, *rest)
    result = _part_fake(part).copy_(grad_part)
    return result, part.new_empty(0, dtype=torch.float32) if grad_norm is None else grad_norm


def unpack(*args: Any) -> tuple[Tensor, Tensor, Tensor | None, HeadEpilogue, Layout, bool]:
    """The arguments of ``projection_forward``: x, weight, bias, epilogue, layout, keep."""
    x, weight, bias, norms, cos, sin, heads, head_dims, channels_first, eps, rotated, interleaved, keep, tf32 = args
    after = HeadEpilogue(tuple(norms), eps, cos, sin, rotated, interleaved)
    return x, weight, bias, after, Layout(heads, head_dims, channels_first, tf32), keep


def _forward(*args: Any) -> list[Tensor]:
    # Outputs of an operator may not share memory, so each part has a product of its own.
    x, weight, bias, after, layout, keep = unpack(*args)
    tokens = to_tokens(x, layout.channels_first)
    heads = list(zip(layout.heads, layout.head_dims, strict=True))
    sizes = [h * d for h, d in heads]
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    flat = [linear(tokens, w, b) for w, b in zip(weight.split(sizes), biases, strict=True)]
    parts = [y.unflatten(-1, size).transpose(1, 2) for y, size in zip(flat, heads, strict=True)]
    return [*epilogue.apply_in_layout(parts, after), *(parts[: len(after.norms)] if keep else [])]


def _forward_fake(*args: Any) -> list[Tensor]:
    x, _, _, after, layout, keep = unpack(*args)
    batch, length, _ = to_tokens(x, layout.channels_first).shape
    by_length = length_first(to_tokens(x, layout.channels_first))

    def part(heads: int, dim: int) -> Tensor:
        if by_length:
            return x.new_empty(length, batch, heads, dim).permute(1, 2, 0, 3)
        return x.new_empty(batch, length, heads, dim).transpose(1, 2)

    sizes = list(zip(layout.heads, layout.head_dims, strict=True))
    return [part(*size) for size in (*sizes, *(sizes[: len(after.norms)] if keep else []))]


def backward(
    grads: list[Tensor],
    kept: list[Tensor],
    x: Tensor,
    weight: Tensor,
    norms: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    bias: bool,
    channels_first: bool,
    eps: float,
    rotated: int,
    interleaved: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of x, weight, bias and norms; ``kept``: the normalized parts before their normalization."""
    grads, grad_norms = list(grads), []
    after = HeadEpilogue(tuple(norms), eps, cos, sin, rotated, interleaved)
    for i in range(after.parts):
        before = kept[i] if i < len(norms) else None
        grads[i], grad_norm = epilogue.part_backward(grads[i], before, *after.of_part(i), eps, interleaved)
        grad_norms += [] if grad_norm is None else [grad_norm]
    tokens = to_tokens(x, channels_first)
    joined = [join_heads(g) for g in grads]
    by_length = length_first(tokens)
    if by_length:
        grad = torch.cat([g.transpose(0, 1) for g in joined], dim=-1).transpose(0, 1)
    else:
        grad = torch.cat(joined, dim=-1)
    grad_weight, grad_bias = weight_grads(grad, tokens)
    if channels_first:
        grad_x = torch.bmm(weight.t().expand(x.size(0), -1, -1), grad.transpose(1, 2))
    elif by_length:
        grad_x = torch.matmul(grad.transpose(0, 1), weight).transpose(0, 1)
    else:
        grad_x = torch.matmul(grad, weight)
    return grad_x, grad_weight, grad_bias if bias else grad_bias.new_empty(0), grad_norms


def _backward_fake(
    grads: list[Tensor], kept: list[Tensor], x: Tensor, weight: Tensor, norms: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    _, _, bias, channels_first = rest[:4]
    grad_x = x.new_empty(x.shape)
    if not channels_first and length_first(x):
        grad_x = x.new_empty(x.size(1), x.size(0), x.size(2)).transpose(0, 1)
    grad_bias = weight.new_empty(weight.size(0) if bias else 0)
    return grad_x, weight.new_empty(weight.shape), grad_bias, [n.new_empty(n.shape) for n in norms]


# --------------------------------------------------------------------------------------------------
# vmap: the mapped dim folds into the batch where the parameters are not mapped


def _vmap_forward(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    has_epilogue = bool(args[3]) or args[4] is not None
    if has_epilogue or any(dim is not None for dim in in_dims[1:3]):
        return map_slices(operator, info, in_dims, *args)
    outputs = unfold(operator(fold(args[0], in_dims[0], info.batch_size), *args[1:]), info.batch_size)
    return outputs, out_dims(outputs)


WIDEST_CPU_HEAD = 1024
"""The largest head dim that the compiled CPU kernel of the epilogue takes."""

_PART = "Tensor part, Tensor? norm, Tensor? cos, Tensor? sin, float eps, bool interleaved"
define(
    "helpers",
    f"cpu_finish_heads({_PART}) -> Tensor",
    part_epilogue,
    _part_fake,
    check=checks.cpu_finish_heads,
    decomposition=epilogue.apply_to_part,
)
define(
    "helpers",
    f"cpu_finish_heads_backward(Tensor grad, {_PART}) -> (Tensor, Tensor)",
    part_epilogue_backward,
    _part_backward_fake,
    check=checks.cpu_finish_heads_backward,
)
_EPILOGUE = "Tensor[] norms, Tensor? cos, Tensor? sin"
define(
    "projection",
    f"projection_forward(Tensor x, Tensor weight, Tensor? bias, {_EPILOGUE}, int[] heads, int[] head_dims,"
    " bool channels_first, float eps, int rotated, bool interleaved, bool keep, bool allow_tf32) -> Tensor[]",
    _forward,
    _forward_fake,
    _vmap_forward,
    check=checks.projection_forward,
    decomposition=_forward,
    parts={"cpu_finish_heads": "norms and rotary embedding of heads"},
)
define(
    "projection",
    f"projection_backward(Tensor[] grads, Tensor[] kept, Tensor x, Tensor weight, {_EPILOGUE}, bool bias,"
    " bool channels_first, float eps, int rotated, bool interleaved, bool allow_tf32)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    backward,
    _backward_fake,
    map_slices,
    check=checks.projection_backward,
    parts={"cpu_finish_heads_backward": "gradients of norms and rotary embedding of heads"},
)
