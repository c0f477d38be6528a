"""What a running average of weights leaves inconsistent, and how it is made consistent again.

An average of weights (parameters and buffers, each by itself) is a model again, but for buffers that are a function of
others:

    spectral normalisation  the average of singular vectors is no singular vector of the averaged weight, nor has it
                            norm 1: they are computed anew by power iterations
    a codebook              its words are quotients of two running averages: they are computed anew from these

Everything else may be averaged by itself: batch normalisation's mean and variance, the gain and the direction of a
weight norm. Integers are not averaged but taken as they are.
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

ITERATIONS = 20
MOST_ITERATIONS = 1000
TOLERANCE = 1e-6
"""Power iterations end when ``ITERATIONS`` of them raise the singular value by no more than this share."""


@runtime_checkable
class Derived(Protocol):
    """A module with buffers that are a function of others."""

    def derived(self) -> list[Tensor]:
        """These buffers."""

    def derive(self) -> None:
        """Compute them anew."""


@torch.no_grad()
def settle(network: nn.Module) -> None:
    """Compute the buffers of ``network`` anew that are a function of others; to be called once weights are averaged.

    The largest singular value of a spectrally normalised weight is 1 afterwards. May wait for the device.
    """
    for buffers, compute in _derived(network):
        with torch.autocast(buffers[0].device.type, enabled=False):
            compute()


@contextmanager
def settled(network: nn.Module) -> Iterator[None]:
    """The network as ``settle`` leaves it; afterwards its buffers are as they were before, bit for bit."""
    kept = [(buffer, buffer.detach().clone()) for buffers, _ in _derived(network) for buffer in buffers]
    try:
        settle(network)
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


def _derived(network: nn.Module) -> Iterator[tuple[list[Tensor], Callable[[], None]]]:
    """Buffers, and what computes them anew."""
    for module in network.modules():
        if isinstance(module, Derived):
            yield module.derived(), module.derive
        if isinstance(module, ParametrizationList):
            norms: list[Any] = [each for each in module if isinstance(each, _SpectralNorm) and hasattr(each, "_u")]
            if norms:
                yield [vector for each in norms for vector in (each._u, each._v)], partial(_parametrized, module)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                u, v = (cast(Tensor, getattr(module, f"{hook.name}_{vector}")) for vector in "uv")
                yield [u, v], partial(_hooked, hook, module)


def _parametrized(weight: ParametrizationList) -> None:
    """Every spectral norm among a weight's parametrizations, given what those before it make of the weight."""
    x: Any = weight.original if weight.is_tensor else [getattr(weight, f"original{i}") for i in range(weight.ntensors)]
    for place, each in enumerate(weight):
        if isinstance(each, _SpectralNorm) and hasattr(each, "_u"):
            _iterate(each._reshape_weight_to_matrix(x), each._u, each._v, each.eps)
        was_training = each.training
        each.eval()  # in training a spectral norm would go on
        x = each(*x) if place == 0 and not weight.is_tensor else each(x)
        each.train(was_training)


def _hooked(hook: SpectralNorm, module: nn.Module) -> None:
    matrix = hook.reshape_weight_to_matrix(cast(Tensor, getattr(module, f"{hook.name}_orig")))
    _iterate(matrix, getattr(module, f"{hook.name}_u"), getattr(module, f"{hook.name}_v"), hook.eps)


def _iterate(matrix: Tensor, u: Tensor, v: Tensor, eps: float) -> None:
    """u (M,) and v (N,) become the singular vectors of the largest singular value of the matrix (M, N)."""
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
