"""Derivatives of the Gaussian latent. Noise is regenerated from the seed, never saved.

Arithmetic is float32, or float64 for float64; only results are rounded to the dtype of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen.backend import call
from fastgen.ops.autograd import (
    choose,
    formula_of,
    in_graph,
    must_be_differentiable,
    only_wanted,
    record,
    refuse_batched_gradients,
    tangent_formula,
)
from fastgen.ops.latent import formulas, operators
from fastgen.ops.latent.operators import upcast
from fastgen.random import standard_normal


def _run(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    with_kl: bool,
    namespace: str,
) -> tuple[Tensor, Tensor]:
    result = call(namespace, "latent_forward", mu, logvar, prior_mu, prior_logvar, seed, with_kl)
    return result[0], result[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.save_for_forward(*inputs[:5])
    ctx.with_kl, ctx.namespace = inputs[5:]
    ctx.set_materialize_grads(False)


class GaussianLatent(Function):
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
            refuse_batched_gradients(grad_z, grad_kl)
            wide_mu, wide_logvar = upcast(mu, logvar)
            noise = standard_normal(seed, *mu.shape).to(wide_mu.dtype)
            wide_priors, upstream = upcast(prior_mu, prior_logvar), upcast(grad_z, grad_kl)
            exact = formulas.gradients(upstream[0], upstream[1], wide_mu, wide_logvar, noise, *wide_priors)
            grads = [None if grad is None else grad.to(mu.dtype) for grad in exact]
        else:
            grad_z = None if grad_z is None else grad_z.contiguous()
            grads = call(ctx.namespace, "latent_backward", grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, seed)
        return (*only_wanted(ctx, 0, *grads), None, None, None)


class _TransformedGaussianLatent(Function):
    forward = staticmethod(_run)
    setup_context = staticmethod(_save)
    backward = GaussianLatent.backward
    generate_vmap_rule = True

    @staticmethod
    @tangent_formula
    def jvp(ctx: Any, saved: list[Any], *tangents: Any) -> tuple[Tensor, Tensor]:
        dtype = saved[0].dtype
        mu, logvar, prior_mu, prior_logvar = upcast(*saved[:4])
        t_mu, t_logvar, *t_prior = upcast(*tangents[:4])
        noise = standard_normal(saved[4], *mu.shape).to(mu.dtype)
        t_mu = torch.zeros_like(mu) if t_mu is None else t_mu
        t_logvar = torch.zeros_like(mu) if t_logvar is None else t_logvar
        z, kl = formulas.tangents(mu, logvar, noise, prior_mu, prior_logvar, t_mu, t_logvar, *t_prior)
        # Not None without a KL: PyTorch takes that for a tangent where a vmap is inside.
        return z.to(dtype), kl if ctx.with_kl else mu.new_zeros(0)


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
    function = choose(GaussianLatent, _TransformedGaussianLatent, mu, logvar, prior_mu, prior_logvar)
    result = _run(*arguments) if function is None else function.apply(*arguments)
    return result[0], result[1]


def _recorded(namespace: str, *args: Any) -> tuple[Tensor, Tensor]:
    mu, logvar, prior_mu, prior_logvar, seed, with_kl = args
    return gaussian_latent(mu, logvar, prior_mu, prior_logvar, seed, with_kl, namespace)


record("latent_forward", _recorded)
record("latent_backward", formula_of(operators.backward))
