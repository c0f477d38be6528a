"""Helpers for vmap rules: fold the mapped dimension into the batch, or map slice by slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def to_front(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(..., V, ...) -> (V, ...); a tensor that is not mapped is expanded."""
    if tensor is None:
        return None
    return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(..., V, ...) -> (V * B, ...)."""
    front = to_front(tensor, dim, size)
    return None if front is None else front.flatten(0, 1)


def fold_seed(seed: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Seeds of every slice, one after the other, contiguous: kernels index them."""
    folded = fold(seed, dim, size)
    return None if folded is None else folded.contiguous()


def unfold(outputs: Any, size: int) -> Any:
    """(V * B, ...) -> (V, B, ...), through tuples and lists."""
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (size, outputs.size(0) // size))
    return type(outputs)(unfold(output, size) for output in outputs)


def out_dims(outputs: Any) -> Any:
    """Dimension 0 for every output, in the structure of the outputs."""
    return 0 if isinstance(outputs, Tensor) else type(outputs)(out_dims(output) for output in outputs)


def map_slices(operator: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The fallback rule: one call per slice, stacked."""

    def take(argument: Any, dim: Any, index: int) -> Any:
        if isinstance(argument, list) and isinstance(dim, (list, tuple)):
            return [take(a, d, index) for a, d in zip(argument, dim, strict=True)]
        return argument if dim is None else argument.select(dim, index)

    def stack(results: list[Any]) -> Any:
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return type(results[0])(stack(list(parts)) for parts in zip(*results, strict=True))

    calls = [
        operator(*(take(argument, dim, index) for argument, dim in zip(args, in_dims, strict=True)))
        for index in range(info.batch_size)
    ]
    outputs = stack(calls)
    return outputs, out_dims(outputs)
