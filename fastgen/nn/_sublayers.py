"""Sublayers as parts of a fused operation: which may be, and what happens to the others.

A fused operation reads the weights of a sublayer and never calls it, so hooks, adapters, pruning and quantised weights
would be ignored. Therefore only plain sublayers are fused. Any other one is called, once per call of its layer, and its
output is split into heads, or added to the residual, by ordinary operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from fastgen import functional
from fastgen.checks import shape_of

__all__ = [
    "all_rows",
    "embed",
    "is_plain",
    "is_pointwise",
    "is_untouched",
    "map_channels",
    "merge_heads",
    "project_heads",
    "weight_and_bias",
]

_LINEAR, _EMBEDDING = nn.Linear.forward, nn.Embedding.forward
_POINTWISE_CONVOLUTIONS = {
    nn.Conv1d.forward: (nn.Conv1d._conv_forward, (1,)),
    nn.Conv2d.forward: (nn.Conv2d._conv_forward, (1, 1)),
}


# --------------------------------------------------------------------------------------------------
# The rule


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's ``forward`` and nothing else: no hooks, global ones included, and no
    ``forward`` set on the instance."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def is_plain(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a call would compute ``forward`` from the module's weight and bias, which may then be read instead.

    Subclasses are plain if they keep ``forward``. Weight and bias are parameters, or come from
    ``torch.nn.utils.parametrize``, which computes them at each reading: read them once. Tensor subclasses with
    operations of their own (quantised, sharded) are not plain.
    """
    if type(module).forward is not forward or not is_untouched(module):
        return False
    computed = module._modules.get("parametrizations")
    for name in ("weight", "bias"):
        if name in module._parameters:
            if not _is_plain_tensor(module._parameters[name]):
                return False
        elif computed is None or name not in cast(nn.ModuleDict, computed):
            return name == "bias" and getattr(module, "bias", None) is None
    return True


def _is_plain_tensor(tensor: Tensor | None) -> bool:
    kind = type(tensor)
    stands_for_one = (FakeTensor, FunctionalTensor)
    return tensor is None or kind is nn.Parameter or kind is Tensor or isinstance(tensor, stands_for_one)


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a plain linear map of channels: ``nn.Linear``, or a 1x1 convolution."""
    forward = type(module).forward
    if forward is _LINEAR:
        return is_plain(module, _LINEAR)
    if forward not in _POINTWISE_CONVOLUTIONS:
        return False
    inner, ones = _POINTWISE_CONVOLUTIONS[forward]
    convolution = cast(nn.Conv2d, module)
    return (
        type(convolution)._conv_forward is inner
        and convolution.kernel_size == convolution.stride == ones
        and convolution.groups == 1
        and (isinstance(convolution.padding, str) or not any(convolution.padding))
        and is_plain(convolution, forward)
    )


# --------------------------------------------------------------------------------------------------
# Linear maps to and from heads


def project_heads(
    owner: nn.Module,
    names: Sequence[str],
    x: Tensor,
    *,
    heads: Sequence[int],
    head_dims: Sequence[int],
    channels_first: bool = False,
    convolutions: bool = False,
    norms: Sequence[Tensor] = (),
    norm_eps: float = 1e-6,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """``functional.qkv_projection`` of x by sublayers of ``owner``, whose outputs stand beside each other.

    Args:
        names: of the sublayers, linear maps or 1x1 convolutions. One that is not plain is called with tokens
            (B, N, C); with x itself where it holds a convolution.
        x: (B, N, C), or (B, C, *spatial) with ``channels_first``.
        convolutions: whether sublayers that hold neither a linear map nor a convolution are called with x too.

    Raises:
        TypeError, ValueError: as ``functional.qkv_projection``; a sublayer whose output has another shape.
    """
    modules = [getattr(owner, name) for name in names]
    if all(is_pointwise(module) for module in modules):
        weight, bias = weight_and_bias(*modules)
        return functional.qkv_projection(
            x,
            weight,
            bias,
            heads=heads,
            head_dims=head_dims,
            channels_first=channels_first,
            norms=norms,
            norm_eps=norm_eps,
            rotary=rotary,
        )
    tokens = x.flatten(2).transpose(1, 2) if channels_first else x
    outputs = [_call(owner, name, tokens, x if channels_first else None, convolutions) for name in names]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    sizes = [count * dim for count, dim in zip(heads, head_dims, strict=True)]
    if y.size(-1) != sum(sizes):
        raise ValueError(
            f"{', '.join(names)}: expected {sum(sizes)} channels from {_of(owner, names)}, got {y.size(-1)}"
        )
    parts = [
        part.unflatten(-1, (count, dim)).transpose(1, 2)
        for part, count, dim in zip(y.split(sizes, -1), heads, head_dims, strict=True)
    ]
    for i, norm in enumerate(norms):
        wide = parts[i].to(torch.promote_types(parts[i].dtype, torch.float32))
        wide = wide * (wide.square().mean(-1, keepdim=True) + norm_eps).rsqrt() * norm
        parts[i] = wide.to(parts[i].dtype)
    if rotary is not None:
        parts[:2] = [functional.rotary_embedding(part, *rotary) for part in parts[:2]]
    return tuple(parts)


def weight_and_bias(*modules: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weights of plain maps as one (rows, C), and their biases as one (rows,). Each is read once."""
    weights = [cast(Tensor, module.weight).flatten(1) for module in modules]
    biases = [cast("Tensor | None", module.bias) for module in modules]
    if len(modules) == 1:
        return weights[0], biases[0]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    pairs = zip(weights, biases, strict=True)
    return torch.cat(weights), torch.cat([w.new_zeros(w.size(0)) if b is None else b for w, b in pairs])


def map_channels(owner: nn.Module, name: str, x: Tensor, channels: int) -> Tensor:
    """Calls a sublayer of ``owner``, with tokens unless it holds a convolution: x (B, C, H, W) -> (B, channels, H, W).

    Raises:
        TypeError, ValueError: the sublayer's output is no such tensor.
    """
    y = _call(owner, name, x.flatten(2).transpose(1, 2), x, False)
    if y.size(-1) != channels:
        raise ValueError(f"{name}: expected {channels} channels from {_of(owner, [name])}, got {y.size(-1)}")
    out: Tensor = y.transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
    return out


def merge_heads(
    owner: nn.Module,
    name: str,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    channels_first: bool = False,
    convolutions: bool = False,
) -> Tensor:
    """``functional.merge_heads_projection`` of x (B, H, N, D) by a sublayer of ``owner``.

    One that is not plain is called with (B, N, H * D), or (B, H * D, *spatial); see ``project_heads``.

    Args:
        gate: one element.

    Raises:
        TypeError, ValueError: as ``functional.merge_heads_projection``; a sublayer whose output has another shape.
    """
    module = getattr(owner, name)
    if is_pointwise(module):
        weight, bias = weight_and_bias(module)
        return functional.merge_heads_projection(
            x, weight, bias, residual=residual, gate=gate, channels_first=channels_first
        )
    tokens = x.transpose(1, 2).flatten(2)
    feature_map = None
    if channels_first:
        spatial = (x.size(2),) if residual is None else residual.shape[2:]
        feature_map = tokens.transpose(1, 2).unflatten(2, tuple(spatial))
    y = _call(owner, name, tokens, feature_map, convolutions)
    if feature_map is not None:
        y = y.transpose(1, 2).unflatten(2, tuple(feature_map.shape[2:]))
    y = y if gate is None else gate * y
    if residual is None:
        return y
    if y.shape != residual.shape:
        raise ValueError(
            f"{name}: expected {tuple(residual.shape)} from {_of(owner, [name])}, like the residual, got {shape_of(y)}"
        )
    return residual + y


def _call(owner: nn.Module, name: str, tokens: Tensor, feature_map: Tensor | None, convolutions: bool) -> Tensor:
    """(B, N, rows): what the sublayer makes of tokens (B, N, C), or of the same as a feature map (B, C, *spatial)."""
    module = getattr(owner, name)
    for part in module.modules():
        if isinstance(part, (nn.Linear, _ConvNd)):
            convolutions = isinstance(part, _ConvNd)
            break
    feature_map = feature_map if convolutions else None
    y = module(tokens if feature_map is None else feature_map)
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: expected a tensor from {_of(owner, [name])}, got {type(y).__name__}")
    expected = tokens.shape[:2]
    if feature_map is not None and y.shape[2:] == feature_map.shape[2:]:
        y = y.flatten(2).transpose(1, 2)
    if y.dim() != 3 or y.shape[:2] != expected:
        raise ValueError(
            f"{name}: expected an output of {tuple(expected)} tokens from {_of(owner, [name])}, got {shape_of(y)}"
        )
    return y


def _of(owner: nn.Module, names: Sequence[str]) -> str:
    kinds = (type(getattr(owner, name)).__name__ for name in names)
    return f"the {', '.join(kinds)} in {type(owner).__name__}"


# --------------------------------------------------------------------------------------------------
# Tables


def all_rows(module: nn.Module, count: int, device: torch.device) -> Tensor:
    """(count, channels): what an embedding has for indices 0 to count - 1."""
    if is_plain(module, _EMBEDDING) and cast(nn.Embedding, module).max_norm is None:
        return cast(Tensor, module.weight)
    rows: Tensor = module(torch.arange(count, device=device))
    return rows


def embed(module: nn.Module, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What an embedding has for the indices, and for all from 0 to count - 1, as tied logits need it.

    Whatever stands in the place of an ``nn.Embedding`` (an adapter, say) is asked for all rows, once.
    """
    if type(module).forward is not _EMBEDDING or "forward" in module.__dict__:
        rows = all_rows(module, count, indices.device)
        return F.embedding(indices, rows), rows
    if is_plain(module, _EMBEDDING) and cast(nn.Embedding, module).max_norm is None:
        rows = cast(Tensor, module.weight)
        return F.embedding(indices, rows, cast(nn.Embedding, module).padding_idx), rows
    with parametrize.cached() if "parametrizations" in module._modules else nullcontext():
        embedded: Tensor = module(indices)  # first: a hook may be what makes the weight
        return embedded, cast(Tensor, module.weight)
