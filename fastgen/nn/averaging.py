"""Recomputation of derived buffers after weight averaging (EMA).

Averaging each parameter and buffer separately gives a valid model, except for buffers that are a function of others:

- Spectral normalization: the average of singular vectors is neither a singular vector of the averaged weight nor has
  it norm 1. The vectors are recomputed by power iteration.
- A VQ codebook trained by EMA: its codes are quotients of two running averages. They are recomputed from these.

Everything else can be averaged, for example the running mean and variance of batch normalization, or the gain and
direction of a weight norm. Integer buffers are copied, not averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from fastgen.functional._autocast import without_autocast

ITERATIONS = 20
MOST_ITERATIONS = 1000
TOLERANCE = 1e-6
"""Power iteration stops when ``ITERATIONS`` steps increase the singular value by no more than this relative amount."""


@runtime_checkable
class Derived(Protocol):
    """Protocol of modules with buffers that are a function of other parameters and buffers."""

    def derived(self) -> list[Tensor]:
        """Returns the derived buffers."""

    def derive(self) -> None:
        """Recomputes the derived buffers in place."""


@torch.no_grad()
def recompute_buffers(network: nn.Module) -> None:
    """Recomputes the derived buffers of ``network`` in place. Call it after averaging weights.

    The largest singular value of each spectrally normalized weight is 1 afterwards. Synchronizes with the device.

    Args:
        network: any module.

    Example:
        >>> network = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4))
        >>> recompute_buffers(network)
        >>> round(float(torch.linalg.matrix_norm(network.eval().weight, 2)), 4)
        1.0
    """
    for buffers, compute in _derived(network):
        with without_autocast(buffers[0].device):
            compute()


@contextmanager
def recomputed_buffers(network: nn.Module) -> Iterator[None]:
    """Context manager that applies ``recompute_buffers`` to ``network`` and restores the buffers bitwise on exit."""
    saved = [(buffer, buffer.detach().clone()) for buffers, _ in _derived(network) for buffer in buffers]
    try:
        recompute_buffers(network)
        yield
    finally:
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)


def _derived(network: nn.Module) -> Iterator[tuple[list[Tensor], Callable[[], None]]]:
    """Yields groups of derived buffers with the function that recomputes them."""
    for module in network.modules():
        if isinstance(module, Derived):
            yield module.derived(), module.derive
        if isinstance(module, ParametrizationList):
            norms: list[Any] = [each for each in module if isinstance(each, _SpectralNorm) and hasattr(each, "_u")]
            if norms:
                yield [vector for each in norms for vector in (each._u, each._v)], partial(_update_parametrized, module)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                u, v = (cast(Tensor, getattr(module, f"{hook.name}_{vector}")) for vector in "uv")
                yield [u, v], partial(_update_hook, hook, module)


def _update_parametrized(weight: ParametrizationList) -> None:
    """Updates each spectral norm in a chain of parametrizations, applied to the output of the preceding ones."""
    x: Any = weight.original if weight.is_tensor else [getattr(weight, f"original{i}") for i in range(weight.ntensors)]
    for place, each in enumerate(weight):
        if isinstance(each, _SpectralNorm) and hasattr(each, "_u"):
            _power_iteration(each._reshape_weight_to_matrix(x), each._u, each._v, each.eps)
        was_training = each.training
        each.eval()  # in training mode, a spectral norm runs another power iteration
        x = each(*x) if place == 0 and not weight.is_tensor else each(x)
        each.train(was_training)


def _update_hook(hook: SpectralNorm, module: nn.Module) -> None:
    matrix = hook.reshape_weight_to_matrix(cast(Tensor, getattr(module, f"{hook.name}_orig")))
    _power_iteration(matrix, getattr(module, f"{hook.name}_u"), getattr(module, f"{hook.name}_v"), hook.eps)


def _power_iteration(matrix: Tensor, u: Tensor, v: Tensor, eps: float) -> None:
    """Sets u (M,) and v (N,) to the singular vectors of the largest singular value of ``matrix`` (M, N)."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    left, right, value = u.to(matrix), v.to(matrix), 0.0
    for _ in range(MOST_ITERATIONS // ITERATIONS):
        for _ in range(ITERATIONS):
            left = F.normalize(matrix @ right, dim=0, eps=eps)
            right = F.normalize(left @ matrix, dim=0, eps=eps)
        last, value = value, float(left @ matrix @ right)
        if not value > last * (1 + TOLERANCE):
            break
    u.copy_(left)
    v.copy_(right)
