"""The common call of the Gaussian latent: few checks, then the operator.

Matrices without a prior, plain tensors outside of transforms. Anything else is left to ``autograd``, which calls the
same operators.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgen.backend import overload
from fastgen.ops._checks import FLOATS, STRIDED
from fastgen.ops._direct import PLAIN, is_watched
from fastgen.ops.autograd import apply_of, is_wrapped
from fastgen.ops.latent.autograd import GaussianLatent

_interpreter = torch._C._functorch.peek_interpreter_stack
_apply = apply_of(GaussianLatent)


def takes(mu: Tensor, logvar: Tensor) -> bool:
    """Whether ``gaussian_latent`` takes the arguments as they are."""
    return (
        type(mu) in PLAIN
        and type(logvar) in PLAIN
        and not is_watched()
        and forward_ad._current_level < 0
        and _interpreter() is None
        and not torch._C._is_tracing()
        and not mu.is_nested
        and not logvar.is_nested
        and mu.layout == logvar.layout == STRIDED
        and len(mu.shape) == 2
        and mu.shape == logvar.shape
        and mu.dtype == logvar.dtype
        and mu.dtype in FLOATS
        and mu.device == logvar.device
        and 0 not in mu.shape
        and mu.stride()[1] == logvar.stride()[1] == 1
        and not is_wrapped(mu)
        and not is_wrapped(logvar)
    )


def gaussian_latent(mu: Tensor, logvar: Tensor, seed: Tensor, with_kl: bool, namespace: str) -> tuple[Tensor, Tensor]:
    """z and its KL divergence of arguments that ``takes`` accepts."""
    if torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad):
        return _apply(mu, logvar, None, None, seed, with_kl, namespace)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return overload(namespace, "latent_forward")(mu, logvar, None, None, seed, with_kl)  # type: ignore[no-any-return]
