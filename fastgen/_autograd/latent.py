"""Derivatives of the Gaussian latent. Noise is regenerated from the seed, never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen import reference
from fastgen._autograd.common import choose, in_graph, must_be_differentiable, only_wanted, tangent_formula
from fastgen._library import operator


def _run(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    with_kl: bool,
    namespace: str,
) -> tuple[Tensor, Tensor]:
    result = operator(namespace, "latent_forward")(mu, logvar, prior_mu, prior_logvar, seed, with_kl)
    return result[0], result[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.save_for_forward(*inputs[:5])
    ctx.with_kl, ctx.namespace = inputs[5:]
    ctx.set_materialize_grads(False)


class _GaussianLatent(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _run(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        mu, logvar, prior_mu, prior_logvar, seed = ctx.saved_tensors
        if not ctx.with_kl:
            grad_kl = None
        if grad_z is None and grad_kl is None:
            return (None,) * 7
        if must_be_differentiable():
            noise = reference.standard_normal(seed, *mu.shape).to(mu.dtype)
            priors = (prior_mu, prior_logvar)
            grad_kl = None if grad_kl is None else grad_kl.to(mu.dtype)
            grads = reference.gaussian_latent_backward(grad_z, grad_kl, mu, logvar, noise, *priors)
        else:
            backward = operator(ctx.namespace, "latent_backward")
            grad_z = None if grad_z is None else grad_z.contiguous()
            grads = backward(grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, seed)
        return (*only_wanted(ctx, 0, *grads), None, None, None)


class _TransformedGaussianLatent(Function):
    forward = staticmethod(_run)
    setup_context = staticmethod(_save)
    backward = _GaussianLatent.backward
    generate_vmap_rule = True

    @staticmethod
    @tangent_formula
    def jvp(ctx: Any, saved: list[Any], *tangents: Any) -> tuple[Tensor, Tensor]:
        mu, logvar, prior_mu, prior_logvar, seed = saved
        zero = torch.zeros_like(mu)
        t_mu, t_logvar, t_prior_mu, t_prior_logvar = (zero if t is None else t for t in tangents[:4])
        noise = reference.standard_normal(seed, *mu.shape).to(mu.dtype)
        z = t_mu + 0.5 * noise * (0.5 * logvar).exp() * t_logvar
        if not ctx.with_kl:
            return z, mu.new_zeros(0)  # not None: PyTorch takes that for a tangent where a vmap is inside
        ones = torch.ones(mu.size(0), dtype=mu.dtype, device=mu.device)
        slopes = reference.gaussian_latent_backward(None, ones, mu, logvar, noise, prior_mu, prior_logvar)
        directions = (t_mu, t_logvar, t_prior_mu, t_prior_logvar)
        kl = sum((s * d).sum(-1) for s, d in zip(slopes, directions, strict=True))
        return z, kl.to(torch.promote_types(mu.dtype, torch.float32))  # type: ignore[union-attr]


@in_graph
def gaussian_latent(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    with_kl: bool,
    namespace: str,
) -> tuple[Tensor, Tensor]:
    """``latent_forward`` with derivatives of every order; straight to the operator where none is needed."""
    arguments = (mu, logvar, prior_mu, prior_logvar, seed, with_kl, namespace)
    function = choose(_GaussianLatent, _TransformedGaussianLatent, mu, logvar, prior_mu, prior_logvar)
    result = _run(*arguments) if function is None else function.apply(*arguments)
    return result[0], result[1]
