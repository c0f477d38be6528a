"""Multi-head projections: tokens or a feature map to heads, and heads back.

``projection_forward`` takes x (B, N, C), or (B, C, N) with ``channels_first``, and a packed weight
(sum of heads * head_dims, C), and returns one (B, heads, N, head_dim) tensor for each packed part. The first
``len(norms)`` parts are normalised by norms (D,), then the first ``rotated`` turned by cos and sin (1|B, N, R / 2);
with ``keep`` follows what the normalised parts were before.
``merge_heads_forward`` takes x (B, H, N, D), weight (E, H * D), residual like the output, and a gate that
broadcasts to (B, N, E) as (1|B, 1, 1|E); it returns (B, N, E), or (B, E, N) with ``channels_first``. Its backward takes
gates that the batch shares.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import reference
from fastgen.backend import define
from fastgen.ops._batching import fold, map_slices, out_dims, unfold
from fastgen.ops.projection import checks


class Layout(NamedTuple):
    """The arguments of ``projection_forward`` that are numbers."""

    heads: list[int]
    head_dims: list[int]
    channels_first: bool
    eps: float = 0.0
    rotated: int = 0
    interleaved: bool = False
    allow_tf32: bool = False


def length_first(tokens: Tensor) -> bool:
    """Whether (B, N, C) lies in memory as (N, B, C)."""
    return not tokens.is_contiguous() and tokens.transpose(0, 1).is_contiguous()


def _linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """tokens (B, N, C) in any layout, weight (E, C) -> (B, N, E), with no copy of the tokens."""
    if tokens.is_contiguous():
        return torch.nn.functional.linear(tokens, weight, bias)
    if length_first(tokens):
        return torch.nn.functional.linear(tokens.transpose(0, 1), weight, bias).transpose(0, 1)
    expanded = weight.t().expand(tokens.size(0), -1, -1)
    if bias is None:
        return torch.bmm(tokens, expanded)
    return torch.baddbmm(bias, tokens, expanded)


def _tokens(x: Tensor, channels_first: bool) -> Tensor:
    return x.transpose(1, 2) if channels_first else x


def _weight_grads(grad: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight (E, C) and bias (E,) of a linear map, from (B, N, E) and (B, N, C)."""
    of_map = not tokens.is_contiguous() and tokens.transpose(1, 2).is_contiguous()
    from_map = not grad.is_contiguous() and grad.transpose(1, 2).is_contiguous()
    if (of_map or from_map) and grad.dtype.itemsize >= 4 and grad.size(1) >= max(grad.size(2), tokens.size(2)):
        # A feature map on one side: a product for each entry of the batch copies nothing, and is smaller than a copy.
        # In 16 bits their sum would lose too much.
        if of_map:
            weight = torch.bmm(tokens.transpose(1, 2), grad).sum(0).t().contiguous()
        else:
            weight = torch.bmm(grad.transpose(1, 2), tokens).sum(0)
        return weight, grad.sum((0, 1))
    if length_first(tokens):
        grad, tokens = grad.transpose(0, 1), tokens.transpose(0, 1)
    count = grad.size(0) * grad.size(1)
    rows = grad.reshape(count, grad.size(2))
    return torch.mm(rows.t(), tokens.reshape(count, tokens.size(2))), rows.sum(0)


# --------------------------------------------------------------------------------------------------
# Tokens to heads


def finish(
    part: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    """(B, H, N, D) normalised and turned, in float32 where the part is narrower; differentiable."""
    wide = part.float() if part.dtype.itemsize < 4 else part
    if norm is not None:
        wide = torch.nn.functional.rms_norm(wide, norm.shape, norm.to(wide.dtype), eps)
    if cos is not None and sin is not None:
        wide = reference.rotary(wide, cos, sin, interleaved)
    return wide.to(part.dtype)


def _helper_fake(
    part: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    batch, heads, length, dim = part.shape
    return part.new_empty(batch, length, heads, dim).transpose(1, 2)


def finish_heads(
    part: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    arguments = (part, norm, cos, sin, eps, interleaved)
    return _helper_fake(*arguments).copy_(finish(*arguments))


def _helper_backward_fake(
    grad: Tensor,
    part: Tensor,
    norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    grad_norm = part.new_empty(0, dtype=torch.float32) if norm is None else norm.new_empty(norm.shape)
    return _helper_fake(part, norm, cos, sin, eps, interleaved), grad_norm


def finish_heads_backward(
    grad: Tensor,
    part: Tensor,
    norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    grad_part, grad_norm = unfinish(grad, part, norm, cos, sin, eps, interleaved)
    result = _helper_fake(part, norm, cos, sin, eps, interleaved).copy_(grad_part)
    return result, part.new_empty(0, dtype=torch.float32) if grad_norm is None else grad_norm


def finish_parts(parts: list[Tensor], all_of: reference.HeadFinish) -> list[Tensor]:
    """``finish``, of the parts that have something of it."""
    norms, cos, sin = all_of.norms, all_of.cos, all_of.sin
    rotated = all_of.rotated if cos is not None else 0
    return [
        finish(
            part,
            norms[i] if i < len(norms) else None,
            *((cos, sin) if i < rotated else (None, None)),
            all_of.eps,
            all_of.interleaved,
        )
        if i < max(len(norms), rotated)
        else part
        for i, part in enumerate(parts)
    ]


def finish_parts_in_layout(parts: list[Tensor], all_of: reference.HeadFinish) -> list[Tensor]:
    """``finish_parts`` in the layout of the parts, whatever the steps left."""
    finished = zip(finish_parts(parts, all_of), parts, strict=True)
    return [f if f.stride() == p.stride() else torch.empty_like(p).copy_(f) for f, p in finished]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norms: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    heads: list[int],
    head_dims: list[int],
    channels_first: bool,
    eps: float,
    rotated: int,
    interleaved: bool,
    keep: bool,
    allow_tf32: bool,
) -> list[Tensor]:
    # Outputs of an operator may not share memory, so each part has a product of its own.
    tokens = _tokens(x, channels_first)
    sizes = [h * d for h, d in zip(heads, head_dims, strict=True)]
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    flat = [_linear(tokens, w, b) for w, b in zip(weight.split(sizes), biases, strict=True)]
    parts = [y.unflatten(-1, (h, d)).transpose(1, 2) for y, h, d in zip(flat, heads, head_dims, strict=True)]
    kept = parts[: len(norms)] if keep else []
    all_of = reference.HeadFinish(tuple(norms), eps, cos, sin, rotated, interleaved)
    return [*finish_parts_in_layout(parts, all_of), *kept]


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norms: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    heads: list[int],
    head_dims: list[int],
    channels_first: bool,
    eps: float,
    rotated: int,
    interleaved: bool,
    keep: bool,
    allow_tf32: bool,
) -> list[Tensor]:
    batch, length = x.size(0), x.size(2 if channels_first else 1)
    by_length = length_first(_tokens(x, channels_first))

    def part(heads: int, dim: int) -> Tensor:
        if by_length:
            return x.new_empty(length, batch, heads, dim).permute(1, 2, 0, 3)
        return x.new_empty(batch, length, heads, dim).transpose(1, 2)

    parts = [part(h, d) for h, d in zip(heads, head_dims, strict=True)]
    return [*parts, *(part(h, d) for h, d, _ in zip(heads, head_dims, norms, strict=False) if keep)]


def unfinish(
    grad: Tensor,
    kept: Tensor | None,
    norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a part before ``finish``, and of its norm's weight."""
    wide = grad.float() if grad.dtype.itemsize < 4 else grad
    grad_norm = None
    if cos is not None and sin is not None:
        wide = reference.rotary(wide, cos, -sin, interleaved)
    if norm is not None and kept is not None:
        wide, grad_norm = reference.rms_norm_backward(wide, kept.to(wide.dtype), norm.to(wide.dtype), eps)
        grad_norm = grad_norm.to(norm.dtype)
    return wide.to(grad.dtype), grad_norm


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
    grads, grad_norms = list(grads), []
    for i in range(max(len(norms), rotated if cos is not None else 0)):
        tables = (cos, sin) if i < rotated else (None, None)
        before, norm = (kept[i], norms[i]) if i < len(norms) else (None, None)
        grads[i], grad_norm = unfinish(grads[i], before, norm, *tables, eps, interleaved)
        grad_norms += [] if grad_norm is None else [grad_norm]
    tokens = _tokens(x, channels_first)
    joined = [reference.join_heads(g) for g in grads]
    by_length = length_first(tokens)
    if by_length:
        grad = torch.cat([g.transpose(0, 1) for g in joined], dim=-1).transpose(0, 1)
    else:
        grad = torch.cat(joined, dim=-1)
    grad_weight, grad_bias = _weight_grads(grad, tokens)
    if channels_first:
        grad_x = torch.bmm(weight.t().expand(x.size(0), -1, -1), grad.transpose(1, 2))
    elif by_length:
        grad_x = torch.matmul(grad.transpose(0, 1), weight).transpose(0, 1)
    else:
        grad_x = torch.matmul(grad, weight)
    return grad_x, grad_weight, grad_bias if bias else grad_bias.new_empty(0), grad_norms


def _backward_fake(
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
    grad_x = x.new_empty(x.shape)
    if not channels_first and length_first(x):
        grad_x = x.new_empty(x.size(1), x.size(0), x.size(2)).transpose(0, 1)
    grad_bias = weight.new_empty(weight.size(0) if bias else 0)
    return grad_x, weight.new_empty(weight.shape), grad_bias, [n.new_empty(n.shape) for n in norms]


# --------------------------------------------------------------------------------------------------
# Heads to tokens


def _folded(weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A gate that the batch shares becomes part of the weight and the bias; another is left over."""
    if gate is None or gate.size(0) != 1:
        return weight, bias, gate
    gate = gate.reshape(-1)
    return weight * gate.unsqueeze(1), None if bias is None else bias * gate, None


def _merge_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
) -> Tensor:
    tokens = reference.join_heads(x)
    weight, bias, gate = _folded(weight, bias, gate)
    if not channels_first:
        y = _linear(tokens, weight, bias).contiguous()
        y = y if gate is None else y.mul_(gate)
        return y if residual is None else y.add_(residual)
    features, expanded = tokens.transpose(1, 2), weight.expand(x.size(0), -1, -1)
    base = None if bias is None else bias.unsqueeze(1)
    if gate is None and residual is not None:
        base = residual if base is None else residual + base
    y = torch.bmm(expanded, features) if base is None else torch.baddbmm(base, expanded, features)
    if gate is not None:
        y = y.mul_(gate.transpose(1, 2))
        y = y if residual is None else y.add_(residual)
    return y


def _merge_forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
) -> Tensor:
    batch, length, channels = x.size(0), x.size(2), weight.size(0)
    return x.new_empty((batch, channels, length) if channels_first else (batch, length, channels))


def merge_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gate's gradient needs the product before the gate, which is not kept.

    That product's inner product with grad is the one of the weight and the weight's gradient, if that is not rounded to
    16 bits; otherwise it is computed again. The batch shares the gate.
    """
    upstream = _tokens(grad, channels_first)
    tokens = reference.join_heads(x)
    grad_gate = weight.new_empty(0)
    exact = weight.dtype.itemsize >= 4
    gated, factor = upstream, weight
    if gate is not None:
        gated, factor = (upstream, weight * gate.reshape(-1, 1)) if exact else (upstream * gate, weight)
    grad_weight, grad_bias = _weight_grads(gated, tokens)
    if gate is not None and exact:
        of_rows = (grad_weight * weight).sum(1)
        of_rows = of_rows if bias is None else of_rows + grad_bias * bias
        grad_gate = of_rows.reshape(1, 1, -1).sum_to_size(gate.shape)
        grad_weight, grad_bias = grad_weight * gate.reshape(-1, 1), grad_bias * gate.reshape(-1)
    elif gate is not None:
        grad_gate = (upstream * _linear(tokens, weight, bias)).sum_to_size(gate.shape)
    # In (B, N, H, D), whatever the layout of the gradient.
    by_heads = (x.size(0), x.size(2), x.size(1), x.size(3))
    grad_x = torch.matmul(gated, factor).contiguous().reshape(by_heads).transpose(1, 2)
    return grad_x, grad_weight, weight.new_empty(0) if bias is None else grad_bias, grad_gate


def _merge_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    channels_first: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, dim = x.shape
    return (
        x.new_empty(batch, length, heads, dim).transpose(1, 2),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if bias is None else weight.size(0)),
        weight.new_empty((0,) if gate is None else gate.shape),
    )


# --------------------------------------------------------------------------------------------------
# vmap: the batch takes the mapped dim where the parameters are not mapped


def _vmap_forward(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    finished = bool(args[3]) or args[4] is not None
    if finished or any(dim is not None for dim in in_dims[1:3]):
        return map_slices(operator, info, in_dims, *args)
    outputs = unfold(operator(fold(args[0], in_dims[0], info.batch_size), *args[1:]), info.batch_size)
    return outputs, out_dims(outputs)


WIDEST_HELPED = 1024
"""Channels of a head that the CPU's compiled helper takes."""

_HELPED = "Tensor part, Tensor? norm, Tensor? cos, Tensor? sin, float eps, bool interleaved"
define(
    "helpers",
    f"cpu_finish_heads({_HELPED}) -> Tensor",
    finish_heads,
    _helper_fake,
    check=checks.cpu_finish_heads,
)
define(
    "helpers",
    f"cpu_finish_heads_backward(Tensor grad, {_HELPED}) -> (Tensor, Tensor)",
    finish_heads_backward,
    _helper_backward_fake,
    check=checks.cpu_finish_heads_backward,
)
_FINISH = "Tensor[] norms, Tensor? cos, Tensor? sin"
define(
    "projection",
    f"projection_forward(Tensor x, Tensor weight, Tensor? bias, {_FINISH}, int[] heads, int[] head_dims,"
    " bool channels_first, float eps, int rotated, bool interleaved, bool keep, bool allow_tf32) -> Tensor[]",
    _forward,
    _forward_fake,
    _vmap_forward,
    check=checks.projection_forward,
)
define(
    "projection",
    f"projection_backward(Tensor[] grads, Tensor[] kept, Tensor x, Tensor weight, {_FINISH}, bool bias,"
    " bool channels_first, float eps, int rotated, bool interleaved, bool allow_tf32)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    backward,
    _backward_fake,
    map_slices,
    check=checks.projection_backward,
)
define(
    "projection",
    "merge_heads_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? gate, bool channels_first,"
    " bool allow_tf32) -> Tensor",
    _merge_forward,
    _merge_forward_fake,
    map_slices,
    check=checks.merge_heads_forward,
)
define(
    "projection",
    "merge_heads_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? gate, bool channels_first,"
    " bool allow_tf32) -> (Tensor, Tensor, Tensor, Tensor)",
    merge_backward,
    _merge_backward_fake,
    map_slices,
    check=checks.merge_heads_backward,
)
