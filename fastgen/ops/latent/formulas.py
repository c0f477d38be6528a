"""Formulas of the Gaussian latent in plain PyTorch: KL divergence, tangents, and gradients of any order.

Nothing cancels near the prior, and an overflow has the sign of the formula: e^x and its factors are one function, which
gives 0 where a factor is 0, also where e^x alone would be infinite. All operands have the dtype of the computation,
float32 or float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgen.ops.transforms import tangent_formula, transforms_active


def _exp_times(x: Tensor, minus_one: bool, *factors: Tensor) -> Tensor:
    factor = math.prod(factors[1:], start=factors[0])
    if minus_one:
        value = x.expm1()
        return torch.where((factor == 0) & (value == math.inf), 0, factor * value)
    root = (0.5 * x).exp()  # overflows much later
    return torch.where((factor == 0) & (root == math.inf), 0, factor * root * root)


class _ExpTimes(Function):
    """(e^x or e^x - 1) times the product of the factors. All its derivatives have this form."""

    generate_vmap_rule = True
    forward = staticmethod(_exp_times)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.minus_one, *factors = inputs
        ctx.save_for_backward(x, *factors)
        ctx.save_for_forward(x, *factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grads = [
            _apply(x, ctx.minus_one, grad, *factors[:i], *factors[i + 1 :]) if wanted[2 + i] else None
            for i in range(len(factors))
        ]
        return exp_times(x, grad, *factors) if wanted[0] else None, None, *grads

    @staticmethod
    @tangent_formula
    def jvp(ctx: Any, saved: list[Any], t_x: Tensor | None, _: None, *tangents: Tensor | None) -> Tensor:
        x, *factors = saved
        total = torch.zeros_like(x) if t_x is None else exp_times(x, t_x, *factors)
        for i, tangent in enumerate(tangents):
            if tangent is not None:
                total = total + _apply(x, ctx.minus_one, tangent, *factors[:i], *factors[i + 1 :])
        return total


def _apply(x: Tensor, minus_one: bool, *factors: Tensor) -> Tensor:
    tensors = torch.broadcast_tensors(x, *factors)
    if transforms_active() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        result: Tensor = _ExpTimes.apply(tensors[0], minus_one, *tensors[1:])  # type: ignore[no-untyped-call]
        return result
    return _exp_times(tensors[0], minus_one, *tensors[1:])


def exp_times(x: Tensor, *factors: Tensor) -> Tensor:
    """e^x times the factors, differentiable to any order; 0 where one of these is 0, whatever x."""
    return _apply(x, False, *factors)


def expm1_times(x: Tensor, *factors: Tensor) -> Tensor:
    """e^x - 1, accurate also near x = 0, times the factors; differentiable to any order; 0 where a factor is 0."""
    return _apply(x, True, *factors)


def expm1_excess(x: Tensor) -> Tensor:
    """e^x - 1 - x, accurate to the last digits also near 0, where its terms cancel: a Taylor series serves there."""
    small = x.abs() < 0.5
    near = torch.where(small, x, 0)
    series = torch.full_like(near, 1 / math.factorial(18))
    for power in range(17, 1, -1):
        series = series * near + 1 / math.factorial(power)
    far = torch.where(small, 1, x)
    return torch.where(small, near.square() * series, far.expm1() - far)


def kl_divergence(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
    """KL( N(mu, e^logvar) || N(prior_mu, e^prior_logvar) ) in nats, summed over the last dim; never negative.

    Kingma and Welling, "Auto-encoding variational Bayes" (2014), appendix B. A missing prior is N(0, I).
    """
    difference = mu if prior_mu is None else mu - prior_mu
    if prior_logvar is None:
        return 0.5 * (difference.square() + expm1_excess(logvar)).sum(-1)
    scale = (-0.5 * prior_logvar).exp()
    scaled = torch.where((difference == 0) & (scale == math.inf), 0, difference * scale)
    return 0.5 * (scaled.square() + expm1_excess(logvar - prior_logvar)).sum(-1)


def gradients(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of mu, logvar, prior_mu and prior_logvar, all (B, D); None for a missing prior.

    grad_z and noise are (B, D), grad_kl (B,); either gradient may be absent. With d = mu - prior_mu and
    r = logvar - prior_logvar:

        of mu            grad_z + grad_kl d e^-prior_logvar
        of logvar        1/2 (grad_z noise e^(logvar / 2) + grad_kl (e^r - 1))
        of prior_mu      -grad_kl d e^-prior_logvar
        of prior_logvar  -1/2 grad_kl (e^r - 1 + d^2 e^-prior_logvar)
    """
    grad_z = torch.zeros_like(mu) if grad_z is None else grad_z
    from_z, half = 0.5 * grad_z, 0.5 * logvar
    if grad_kl is None:
        of_prior_mu, of_prior_logvar = (None if t is None else torch.zeros_like(mu) for t in (prior_mu, prior_logvar))
        return grad_z, exp_times(half, from_z, noise), of_prior_mu, of_prior_logvar
    upstream = grad_kl.unsqueeze(-1)
    difference = mu if prior_mu is None else mu - prior_mu
    ratio = logvar if prior_logvar is None else logvar - prior_logvar
    from_kl = 0.5 * upstream
    of_z, of_ratio = exp_times(half, from_z, noise), expm1_times(ratio, from_kl)
    # Where both overflow, possibly with different signs: std (from_z noise + from_kl e^r / std).
    both = of_z.isinf() & of_ratio.isinf()
    less = half if prior_logvar is None else half - prior_logvar
    inner = from_z * noise + exp_times(torch.where(both, less, 0), from_kl)
    grad_logvar = torch.where(both, exp_times(torch.where(both, half, 0), inner), of_z + of_ratio)
    if prior_logvar is None:
        from_difference, grad_prior_logvar = upstream * difference, None
    else:
        from_difference = exp_times(-prior_logvar, upstream, difference)
        grad_prior_logvar = -(of_ratio + exp_times(-prior_logvar, from_kl, difference, difference))
    grad_prior_mu = None if prior_mu is None else -from_difference
    return grad_z + from_difference, grad_logvar, grad_prior_mu, grad_prior_logvar


def tangents(
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    t_mu: Tensor,
    t_logvar: Tensor,
    t_prior_mu: Tensor | None,
    t_prior_logvar: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tangents of z, (B, D), and of the KL, (B,), from the tangents of mu, logvar and the prior, all (B, D)."""
    z = t_mu + exp_times(0.5 * logvar, 0.5 * noise, t_logvar)
    difference = mu if prior_mu is None else mu - prior_mu
    t_difference = t_mu if t_prior_mu is None else t_mu - t_prior_mu
    ratio = logvar if prior_logvar is None else logvar - prior_logvar
    t_ratio = t_logvar if t_prior_logvar is None else t_logvar - t_prior_logvar
    if t_prior_logvar is not None:
        t_difference = t_difference - 0.5 * difference * t_prior_logvar
    if prior_logvar is None:
        of_difference = difference * t_difference
    else:
        of_difference = exp_times(-prior_logvar, difference, t_difference)
    return z, (of_difference + expm1_times(ratio, 0.5 * t_ratio)).sum(-1)
