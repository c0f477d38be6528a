"""Fusion of sublayers into one operation, with a fallback that calls them.

A fused operation reads the weights of a sublayer and never calls it, which would bypass hooks, adapters, pruning and
quantized weights. Therefore only unmodified sublayers are fused (``is_fusible``). Any other sublayer is called once per
forward pass, and its output is split into heads, or added to the residual, by ordinary PyTorch operations.
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
    "embed",
    "embedding_table",
    "is_fusible",
    "is_pointwise",
    "is_unhooked",
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
# What can be fused


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs its class's ``forward`` and nothing else.

    That is, it has no hooks (global module hooks included) and no ``forward`` set on the instance.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def is_fusible(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether calling the module computes exactly ``forward`` with its ``weight`` and ``bias``.

    A fused operation may then read the two tensors instead. Subclasses qualify if they do not override ``forward``.
    Parametrized tensors (``torch.nn.utils.parametrize``) qualify too; they are computed at each access, so read them
    once. Tensor subclasses with operations of their own (quantized, sharded) do not qualify.
    """
    if type(module).forward is not forward or not is_unhooked(module):
        return False
    computed = module._modules.get("parametrizations")
    for name in ("weight", "bias"):
        if name in module._parameters:
            if not _is_fusible_tensor(module._parameters[name]):
                return False
        elif computed is None or name not in cast(nn.ModuleDict, computed):
            return name == "bias" and getattr(module, "bias", None) is None
    return True


def _is_fusible_tensor(tensor: Tensor | None) -> bool:
    tracing = (FakeTensor, FunctionalTensor)
    return tensor is None or type(tensor) in (nn.Parameter, Tensor) or isinstance(tensor, tracing)


def is_pointwise(module: nn.Module) -> bool:
    """Whether the module is a fusible ``nn.Linear`` or 1x1 convolution."""
    forward = type(module).forward
    if forward is _LINEAR:
        return is_fusible(module, _LINEAR)
    if forward not in _POINTWISE_CONVOLUTIONS:
        return False
    inner, ones = _POINTWISE_CONVOLUTIONS[forward]
    convolution = cast(nn.Conv2d, module)
    return (
        type(convolution)._conv_forward is inner
        and convolution.kernel_size == convolution.stride == ones
        and convolution.groups == 1
        and (isinstance(convolution.padding, str) or not any(convolution.padding))
        and is_fusible(convolution, forward)
    )


# --------------------------------------------------------------------------------------------------
# Projections to and from heads


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
    """Applies ``functional.qkv_projection`` with the concatenated weights of sublayers of ``owner``.

    Args:
        names: attribute names of the sublayers, linear layers or 1x1 convolutions. A sublayer that cannot be fused is
            called with tokens (B, N, C), or with x itself if it contains a convolution.
        x: (B, N, C), or (B, C, *spatial) with ``channels_first``.
        convolutions: whether sublayers that contain neither a linear layer nor a convolution are called with x, too.

    Raises:
        TypeError, ValueError: see ``functional.qkv_projection``; also if a sublayer's output has an unexpected shape.
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
            f"{', '.join(names)}: expected {sum(sizes)} channels from {_describe(owner, names)}, got {y.size(-1)}"
        )
    parts = [
        part.unflatten(-1, (count, dim)).transpose(1, 2)
        for part, count, dim in zip(y.split(sizes, -1), heads, head_dims, strict=True)
    ]
    for i, norm in enumerate(norms):
        upcast = parts[i].to(torch.promote_types(parts[i].dtype, torch.float32))
        upcast = upcast * (upcast.square().mean(-1, keepdim=True) + norm_eps).rsqrt() * norm
        parts[i] = upcast.to(parts[i].dtype)
    if rotary is not None:
        parts[:2] = [functional.rotary_embedding(part, *rotary) for part in parts[:2]]
    return tuple(parts)


def weight_and_bias(*modules: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Concatenated weights (rows, C) and biases (rows,) of fusible linear layers. Each tensor is read once."""
    weights = [cast(Tensor, module.weight).flatten(1) for module in modules]
    biases = [cast("Tensor | None", module.bias) for module in modules]
    if len(modules) == 1:
        return weights[0], biases[0]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    pairs = zip(weights, biases, strict=True)
    return torch.cat(weights), torch.cat([w.new_zeros(w.size(0)) if b is None else b for w, b in pairs])


def map_channels(owner: nn.Module, name: str, x: Tensor, channels: int) -> Tensor:
    """Calls a sublayer of ``owner`` on a feature map x (B, C, H, W) and returns (B, channels, H, W).

    The sublayer is called with tokens (B, H W, C), or with x if it contains a convolution.

    Raises:
        TypeError, ValueError: if the sublayer's output is not a tensor of the expected shape.
    """
    y = _call(owner, name, x.flatten(2).transpose(1, 2), x, False)
    if y.size(-1) != channels:
        raise ValueError(f"{name}: expected {channels} channels from {_describe(owner, [name])}, got {y.size(-1)}")
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
    """Applies ``functional.merge_heads_projection`` to x (B, H, N, D) with the weight of a sublayer of ``owner``.

    A sublayer that cannot be fused is called with (B, N, H * D), or (B, H * D, *spatial); see ``project_heads``.

    Args:
        gate: tensor of one element that scales the output before the residual is added.

    Raises:
        TypeError, ValueError: see ``functional.merge_heads_projection``; also if the sublayer's output has an
            unexpected shape.
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
            f"{name}: expected {tuple(residual.shape)} from {_describe(owner, [name])}, like the residual, got"
            f" {shape_of(y)}"
        )
    return residual + y


def _call(owner: nn.Module, name: str, tokens: Tensor, feature_map: Tensor | None, convolutions: bool) -> Tensor:
    """Calls a sublayer with tokens (B, N, C), or the same data as a feature map (B, C, *spatial); returns tokens."""
    module = getattr(owner, name)
    for part in module.modules():
        if isinstance(part, (nn.Linear, _ConvNd)):
            convolutions = isinstance(part, _ConvNd)
            break
    feature_map = feature_map if convolutions else None
    y = module(tokens if feature_map is None else feature_map)
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: expected a tensor from {_describe(owner, [name])}, got {type(y).__name__}")
    expected = tokens.shape[:2]
    if feature_map is not None and y.shape[2:] == feature_map.shape[2:]:
        y = y.flatten(2).transpose(1, 2)
    if y.dim() != 3 or y.shape[:2] != expected:
        raise ValueError(
            f"{name}: expected an output of {tuple(expected)} tokens from {_describe(owner, [name])}, got {shape_of(y)}"
        )
    return y


def _describe(owner: nn.Module, names: Sequence[str]) -> str:
    kinds = (type(getattr(owner, name)).__name__ for name in names)
    return f"the {', '.join(kinds)} in {type(owner).__name__}"


# --------------------------------------------------------------------------------------------------
# Embeddings


def embedding_table(module: nn.Module, count: int, device: torch.device) -> Tensor:
    """Embeddings (count, channels) of the indices 0 to count - 1."""
    if is_fusible(module, _EMBEDDING) and cast(nn.Embedding, module).max_norm is None:
        return cast(Tensor, module.weight)
    rows: Tensor = module(torch.arange(count, device=device))
    return rows


def embed(module: nn.Module, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Embeddings of ``indices``, and the table (count, channels) that tied output logits are computed with.

    A module that replaces ``nn.Embedding`` (an adapter, for example) is called once, with all indices.
    """
    if type(module).forward is not _EMBEDDING or "forward" in module.__dict__:
        rows = embedding_table(module, count, indices.device)
        return F.embedding(indices, rows), rows
    if is_fusible(module, _EMBEDDING) and cast(nn.Embedding, module).max_norm is None:
        rows = cast(Tensor, module.weight)
        return F.embedding(indices, rows, cast(nn.Embedding, module).padding_idx), rows
    with parametrize.cached() if "parametrizations" in module._modules else nullcontext():
        embedded: Tensor = module(indices)  # before the weight is read: a forward hook may compute it
        return embedded, cast(Tensor, module.weight)
