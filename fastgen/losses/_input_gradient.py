"""Norms of gradients with respect to an input, shared by the penalties."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

from fastgen import checks as check
from fastgen.functional._autocast import without_autocast


def upcast_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


# --------------------------------------------------------------------------------------------------
# Argument checks. ``prefix`` begins the error message: "scores: expected", "discriminator: expected it to return".


def check_batch(name: str, tensor: Tensor, least_dims: int = 1, meaning: str = "(B, *)") -> None:
    check.require_tensor(name, tensor)
    check.require_floating(name, tensor)
    if tensor.dim() < least_dims or tensor.numel() == 0:
        raise ValueError(f"{name}: expected {meaning} with no empty dim, got {check.shape_of(tensor)}")


def check_scores(prefix: str, scores: Tensor, batch: int) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"{prefix} a tensor, got {type(scores).__name__}")
    if not scores.is_floating_point():
        raise TypeError(f"{prefix} a floating-point tensor, got {scores.dtype}")
    if scores.dim() == 0 or scores.size(0) != batch or scores.numel() != batch:
        patches = scores.dim() > 1 and scores.size(0) == batch and scores.numel() > batch
        hint = "; reduce scores of patches first" if patches else ""
        raise ValueError(
            f"{prefix} one score per sample, (B,) or (B, 1) with B = {batch}, got {check.shape_of(scores)}{hint}"
        )


def check_requires_grad(name: str, tensor: Tensor, producer: str) -> None:
    if not tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that requires grad (call {name}.requires_grad_() before the {producer}),"
            " got one that does not"
        )


def check_nonnegative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def check_grad_mode(function: str) -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: expected a call with gradients enabled, got one under torch.no_grad() or"
            " torch.inference_mode(); a penalty is itself a gradient"
        )


# --------------------------------------------------------------------------------------------------
# Gradient with respect to the input


def _edges(roots: Iterable[Node], stop: Node) -> Iterator[tuple[Node, int]]:
    """Yields each edge of the autograd graph from ``roots`` down to ``stop`` once, as (node, output index)."""
    visited = set(roots)
    pending = [root for root in visited if root != stop]
    while pending:
        for node, index in pending.pop().next_functions:
            if node is None:
                continue
            yield node, index
            if node not in visited and node != stop:
                visited.add(node)
                pending.append(node)


def _depends_through_compiled(outputs: Tensor, source: Tensor) -> bool:
    """Whether a path in the autograd graph from outputs to source goes through code of ``torch.compile``."""
    root, target = outputs.grad_fn, get_gradient_edge(source)
    if root is None:  # outputs are source
        return False
    nodes = [root, *(node for node, _ in _edges([root], target.node))]
    compiled = [
        node for node in nodes if isinstance(node, BackwardCFunction) and "CompiledFunctionBackward" in node.name()
    ]
    return any(node == target.node and index == target.output_nr for node, index in _edges(compiled, target.node))


def _is_traced() -> bool:
    """Whether ``torch.compile`` traces this call including ``torch.autograd.grad``."""
    return torch.compiler.is_compiling() and getattr(torch._dynamo.config, "trace_autograd_ops", False)


def _gradient_scale(scaler: torch.amp.GradScaler | None, batch: int, device: torch.device) -> Tensor | None:
    """Scale of the gradient, a tensor on the device; None without an enabled scaler.

    The gradient of a sum over the batch is B times that of the usual mean, so the scaler's scale is divided by B,
    rounded up to a power of two to keep the scaling exact. (2^16 alone overflows in float16.)
    """
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.full((), 0.5 ** (batch - 1).bit_length(), device=device))


def squared_gradient_norms(
    prefix: str,
    outputs: Tensor,
    source_name: str,
    source: Tensor,
    scaler: torch.amp.GradScaler | None,
    *,
    weights: Tensor | None = None,
    hint: str = "",
) -> Tensor:
    """Squared norms (B,) of the gradient of <outputs, weights> by source, in float32 or float64, differentiable."""
    if not outputs.requires_grad:
        raise ValueError(
            f"{prefix} values computed from {source_name}, got values that do not require grad"
            " (computed under torch.no_grad(), or detached)"
        )
    if not _is_traced() and _depends_through_compiled(outputs, source):
        raise RuntimeError(
            f"{prefix} values that are twice differentiable, got output of a module compiled with torch.compile;"
            " call the uncompiled module for the penalty (compiled._orig_mod, or any call under"
            " torch.compiler.set_stance('force_eager')), for instance every 16th step (lazy regularization), and keep"
            " the compiled module for the other losses"
        )
    batch = source.size(0)
    # The backward pass uses the dtypes of the forward pass; autocast would also cast operations that ran in float32.
    with without_autocast(source.device):
        scale = _gradient_scale(scaler, batch, outputs.device)
        grad_outputs = torch.ones_like(outputs, dtype=upcast_dtype(outputs.dtype)) if weights is None else weights
        grad_outputs = (grad_outputs if scale is None else grad_outputs * scale).to(outputs.dtype)
        (gradient,) = torch.autograd.grad(outputs, source, grad_outputs, create_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(f"{prefix} values computed from {source_name}, got values that do not depend on it{hint}")
        gradient = gradient.to(upcast_dtype(gradient.dtype))
        if scale is not None:
            gradient = gradient / scale.to(gradient.device, non_blocking=True)
        squares: Tensor = gradient.reshape(batch, gradient.numel() // batch).square().sum(1)
        return squares


def safe_sqrt(squares: Tensor) -> Tensor:
    """Square root whose derivatives are 0 at 0, instead of inf or NaN. NaN and inf are propagated."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
