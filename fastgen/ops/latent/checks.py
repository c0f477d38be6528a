"""Argument checks of the operators of the Gaussian latent; see ``fastgen.ops._checks``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.ops._checks import require_dims, require_seed, require_sizes


def _require_matrices(mu: Tensor, logvar: Tensor, seed: Tensor, **others: Tensor | None) -> None:
    require_dims("mu", mu, "(B, D)", None, mu)
    require_sizes("logvar", logvar, tuple(mu.shape), "of mu", mu.dtype, mu)
    for name, tensor in others.items():
        if tensor is not None:
            require_sizes(name, tensor, tuple(mu.shape), "of mu", mu.dtype, mu)
    require_seed(seed, mu.size(0), mu)


def latent_forward(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, seed: Tensor, with_kl: bool
) -> None:
    _require_matrices(mu, logvar, seed, prior_mu=prior_mu, prior_logvar=prior_logvar)


def latent_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
) -> None:
    _require_matrices(mu, logvar, seed, prior_mu=prior_mu, prior_logvar=prior_logvar, grad_z=grad_z)
    if grad_kl is not None:
        wide = torch.float64 if mu.dtype == torch.float64 else torch.float32
        require_sizes("grad_kl", grad_kl, (mu.size(0),), "(B,)", wide, mu)
