"""Gaussian latent: z = mu + noise * e^(logvar / 2) and its KL divergence, on (B, D) matrices.

All operands are (B, D) with a contiguous last dim and any row stride (0 for a prior shared by the
batch). ``seed`` is (S,) int64, S dividing B; see ``fastgen.random.standard_normal``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.backend import define
from fastgen.ops._batching import fold, fold_seed, out_dims, unfold
from fastgen.ops.latent import checks, formulas
from fastgen.random import standard_normal


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is float32 unless the data are float64; so is the type of kl."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the dtype of the computation."""
    return [None if t is None else t.to(compute_dtype(t.dtype)) for t in tensors]


def _forward(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    with_kl: bool,
) -> tuple[Tensor, Tensor]:
    wide_mu, wide_logvar, wide_prior_mu, wide_prior_logvar = upcast(mu, logvar, prior_mu, prior_logvar)
    noise = standard_normal(seed, *mu.shape).to(wide_mu.dtype)
    z = wide_mu + noise * (0.5 * wide_logvar).exp()
    if with_kl:
        kl = formulas.kl_divergence(wide_mu, wide_logvar, wide_prior_mu, wide_prior_logvar)
    else:
        kl = wide_mu.new_empty(0)
    return z.to(mu.dtype), kl


def _forward_fake(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    with_kl: bool,
) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.size(0) if with_kl else 0, dtype=compute_dtype(mu.dtype))


def backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide_grad_z, wide_grad_kl, wide_mu, wide_logvar = upcast(grad_z, grad_kl, mu, logvar)
    wide_prior_mu, wide_prior_logvar = upcast(prior_mu, prior_logvar)
    noise = standard_normal(seed, *mu.shape).to(wide_mu.dtype)
    grads = formulas.gradients(wide_grad_z, wide_grad_kl, wide_mu, wide_logvar, noise, wide_prior_mu, wide_prior_logvar)
    empty = mu.new_empty(0)
    # The copies keep outputs apart where the formula returns an input.
    a, b, c, d = (empty.clone() if g is None else g.to(mu.dtype, copy=True) for g in grads)
    return a, b, c, d


def _backward_fake(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(present: bool) -> Tensor:
        return mu.new_empty(mu.shape) if present else mu.new_empty(0)

    return like(True), like(True), like(prior_mu is not None), like(prior_logvar is not None)


def _vmap(seed_at: int) -> Callable[..., tuple[Any, Any]]:
    """Matrices and seeds fold into the rows; ``seed_at`` is the seed's place among the arguments."""

    def rule(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        matrices = [fold(a, d, size) for a, d in zip(args[:seed_at], in_dims[:seed_at], strict=True)]
        seed = fold_seed(args[seed_at], in_dims[seed_at], size)
        outputs = unfold(operator(*matrices, seed, *args[seed_at + 1 :]), size)
        return outputs, out_dims(outputs)

    return rule


define(
    "latent",
    "latent_forward(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor seed, bool with_kl)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _vmap(seed_at=4),
    check=checks.latent_forward,
    decomposition=_forward,
)
define(
    "latent",
    "latent_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor? prior_mu,"
    " Tensor? prior_logvar, Tensor seed) -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    _vmap(seed_at=6),
    check=checks.latent_backward,
)
