"""Gradient penalties of discriminators.

Penalties are scalars, not weighted (the caller multiplies by lambda or gamma), in float32, or float64 for float64
inputs, and can be differentiated with respect to the parameters: ``loss + weight * penalty``.

Mixed precision: penalties may be computed under autocast. The gradient is cast to float32 before its norm is taken. In
float16 the gradient may underflow: pass the ``GradScaler`` as ``scaler``, and the gradient is scaled, and unscaled
afterwards, without synchronization. The returned penalty is not scaled; scale the sum of all losses as usual,
``scaler.scale(loss).backward()``. If the scale is too large, the penalty is inf or NaN, and the scaler skips the step
as for any other loss.

Compiled modules: PyTorch does not support double backward through ``torch.compile``. Call the uncompiled module for the
penalty, ``compiled._orig_mod``, or any module under ``torch.compiler.set_stance("force_eager")``. Alternatively,
compile the whole training step including the penalty, with ``torch._dynamo.config.trace_autograd_ops = True``
(torch 2.11 or newer).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen import checks as check
from fastgen.losses._input_gradient import (
    check_batch,
    check_grad_mode,
    check_nonnegative,
    check_requires_grad,
    check_scores,
    safe_sqrt,
    squared_gradient_norms,
    upcast_dtype,
)

__all__ = ["dragan_penalty", "gradient_penalty", "r1_penalty", "r2_penalty"]


def _uniform_per_sample(samples: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform random numbers in (0, 1), one per sample: (B, 1, ...)."""
    shape = (samples.size(0), *(1 for _ in samples.shape[1:]))
    return torch.rand(shape, dtype=upcast_dtype(samples.dtype), device=samples.device, generator=generator)


def _centered_penalty(
    discriminator: Callable[[Tensor], Tensor], points: Tensor, center: float, scaler: torch.amp.GradScaler | None
) -> Tensor:
    """``E[(||grad D(points)|| - center)^2]``."""
    prefix = "discriminator: expected it to return"
    points.requires_grad_()
    scores = discriminator(points)
    check_scores(prefix, scores, points.size(0))
    norms = safe_sqrt(squared_gradient_norms(prefix, scores, "its input", points, scaler))
    return (norms - center).square().mean()


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    center: float = 1.0,
    generator: torch.Generator | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """WGAN-GP gradient penalty, at random interpolations of real and generated samples.

    ``E[(||grad D(x^)||_2 - center)^2]`` with ``x^ = a x + (1 - a) x~`` and ``a ~ U(0, 1)``, one per sample. The norm is
    over all elements of a sample. Gulrajani et al., "Improved training of Wasserstein GANs" (2017), equation 3, where
    the weight of the penalty is 10.

    Args:
        discriminator: function of samples (B, *) that returns one score per sample, (B,) or (B, 1). It is called once,
            under the caller's autocast.
        real: real samples (B, *), floating point. They are detached, as are the generated samples.
        fake: generated samples, with the shape, dtype and device of real.
        center: target of the gradient norm. 1 in the paper; 0 gives the zero-centered gradient penalty.
        generator: random number generator of a, on the device of the samples. Default: torch's global generator.
        scaler: gradient scaler of float16 training.

    Returns:
        A scalar. Where a gradient is exactly 0, the gradient of the penalty is 0.

    Raises:
        TypeError: if samples or scores are not floating-point tensors, or dtypes differ.
        ValueError: if shapes or devices differ, there are no samples, ``center`` is negative, or the scores are not one
            per sample or do not depend on the samples.
        RuntimeError: if gradients are disabled, or the discriminator is compiled.

    Example:
        >>> gradient_penalty(lambda x: 3 * x[:, 0], torch.randn(8, 2), torch.randn(8, 2))
        tensor(4.)
    """
    check_batch("real", real)
    check_batch("fake", fake)
    check.require_shape("fake", fake, tuple(real.shape), "of real")
    check.require_alike("real", real, fake=fake)
    check_nonnegative("center", center)
    check_grad_mode("gradient_penalty")
    alpha, dtype = _uniform_per_sample(real, generator), upcast_dtype(real.dtype)
    points = torch.lerp(fake.detach().to(dtype), real.detach().to(dtype), alpha).to(real.dtype)
    return _centered_penalty(discriminator, points, center, scaler)


def dragan_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    *,
    noise: float = 0.5,
    center: float = 1.0,
    generator: torch.Generator | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """DRAGAN gradient penalty, at randomly perturbed real samples.

    ``E[(||grad D(x^)||_2 - center)^2]`` with ``x^ = x + (1 - a) noise std(x) u``, ``a ~ U(0, 1)`` one per sample,
    ``u ~ U(0, 1)`` one per element, and std over the whole batch. Kodali et al., "On convergence and stability of GANs"
    (2017), section 2.3, where the weight of the penalty is 10. The noise follows the authors' code.

    Args:
        discriminator: function of samples (B, *) that returns one score per sample, (B,) or (B, 1). It is called once,
            under the caller's autocast.
        real: real samples (B, *), floating point. They are detached.
        noise: amplitude of the perturbation, in standard deviations of the batch.
        center: target of the gradient norm.
        generator: random number generator of a, then u, on the device of the samples. Default: torch's global
            generator.
        scaler: gradient scaler of float16 training.

    Returns:
        A scalar. Where a gradient is exactly 0, the gradient of the penalty is 0.

    Raises:
        TypeError: if samples or scores are not floating-point tensors.
        ValueError: if there are no samples, ``noise`` or ``center`` is negative, or the scores are not one per sample
            or do not depend on the samples.
        RuntimeError: if gradients are disabled, or the discriminator is compiled.

    Example:
        >>> dragan_penalty(lambda x: 3 * x[:, 0], torch.randn(8, 2))
        tensor(4.)
    """
    check_batch("real", real)
    check_nonnegative("noise", noise)
    check_nonnegative("center", center)
    check_grad_mode("dragan_penalty")
    samples = real.detach().to(upcast_dtype(real.dtype))
    alpha = _uniform_per_sample(real, generator)
    uniform = torch.rand(samples.shape, dtype=samples.dtype, device=samples.device, generator=generator)
    points = samples + (1 - alpha) * noise * samples.std(correction=0) * uniform
    return _centered_penalty(discriminator, points.to(real.dtype), center, scaler)


def _squared_norm_penalty(name: str, samples: Tensor, scores: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """``1/2 E||grad D(samples)||^2``."""
    prefix = "scores: expected"
    check_batch(name, samples)
    check_scores(prefix, scores, samples.size(0))
    check_grad_mode("r1_penalty" if name == "real" else "r2_penalty")
    check_requires_grad(name, samples, "discriminator")
    hint = f" (or {name} did not require grad when they were computed)"
    return 0.5 * squared_gradient_norms(prefix, scores, name, samples, scaler, hint=hint).mean()


def r1_penalty(scores: Tensor, real: Tensor, *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
    """R1 penalty: squared gradient norm of the discriminator at real samples, ``1/2 E||grad D(x)||^2``.

    Mescheder et al., "Which training methods for GANs do actually converge?" (2018), equation 9, without gamma.

    Args:
        scores: D(real), one per sample, (B,) or (B, 1). The scores of the adversarial loss can be reused.
        real: real samples (B, *), floating point. Call ``real.requires_grad_()`` before the discriminator.
        scaler: gradient scaler of float16 training.

    Returns:
        A scalar.

    Raises:
        TypeError: if samples or scores are not floating-point tensors.
        ValueError: if there are no samples, they do not require grad, or the scores are not one per sample or do not
            depend on the samples.
        RuntimeError: if gradients are disabled, or the scores were computed by a compiled discriminator.

    Example:
        >>> real = torch.ones(8, 3, requires_grad=True)
        >>> r1_penalty(real.square().sum(1), real).item()
        6.0
    """
    return _squared_norm_penalty("real", real, scores, scaler)


def r2_penalty(scores: Tensor, fake: Tensor, *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
    """R2 penalty: squared gradient norm of the discriminator at generated samples, ``1/2 E||grad D(x~)||^2``.

    Mescheder et al., "Which training methods for GANs do actually converge?" (2018), equation 10, without gamma.

    Args:
        scores: D(fake), one per sample, (B,) or (B, 1). The scores of the adversarial loss can be reused.
        fake: generated samples (B, *), floating point, that require grad: the output of the generator, or
            ``output.detach().requires_grad_()`` if the generator should receive no gradient from the penalty.
        scaler: gradient scaler of float16 training.

    Returns:
        A scalar.

    Raises:
        TypeError: if samples or scores are not floating-point tensors.
        ValueError: if there are no samples, they do not require grad, or the scores are not one per sample or do not
            depend on the samples.
        RuntimeError: if gradients are disabled, or the scores were computed by a compiled discriminator.

    Example:
        >>> fake = torch.ones(8, 3, requires_grad=True) * 2
        >>> r2_penalty(fake.square().sum(1), fake).item()
        24.0
    """
    return _squared_norm_penalty("fake", fake, scores, scaler)
