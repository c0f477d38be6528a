"""Path length regularization of generators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen import checks as check
from fastgen.losses._input_gradient import (
    check_batch,
    check_grad_mode,
    check_requires_grad,
    safe_sqrt,
    squared_gradient_norms,
    upcast_dtype,
)

__all__ = ["path_length_penalty"]


def _checked_mean(mean: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(mean, Tensor):
        if isinstance(mean, bool) or not isinstance(mean, (int, float)):
            raise TypeError(f"mean: expected a scalar tensor or a number, got {type(mean).__name__}")
        return torch.full((), float(mean), dtype=like.dtype, device=like.device)
    check.require_floating("mean", mean)
    if mean.dim() != 0:
        raise ValueError(f"mean: expected a scalar tensor, of shape (), or a number, got {check.shape_of(mean)}")
    return mean.detach().to(device=like.device, dtype=like.dtype, non_blocking=True)


def path_length_penalty(
    images: Tensor,
    latents: Tensor,
    mean: Tensor | float,
    *,
    decay: float = 0.01,
    generator: torch.Generator | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """Path length regularization of StyleGAN2: variance of the generator's Jacobian norms around their running mean.

    ``E[(||J^T y|| - mean)^2]`` with the generator's Jacobian J, ``J^T y = grad <images, y>`` and
    ``y ~ N(0, I) / sqrt(pixels)``. Karras et al., "Analyzing and improving the image quality of StyleGAN" (2020),
    section 3.2. The scaling of y and the mean over the latents of the layers follow the authors' code. See
    ``fastgen.losses.penalties`` for mixed precision and compiled modules.

    Args:
        images: generated images (B, C, *), computed from latents. The number of pixels is the product of the dims
            after C.
        latents: latents (B, w), or (B, L, w) with one latent per layer, floating point, that require grad. Squared
            lengths are averaged over the dims between the first and the last.
        mean: running mean of the path lengths, a scalar tensor or a number: initially 0, then the second return value
            of the previous call. Not modified.
        decay: weight of this batch in the running mean, in (0, 1].
        generator: random number generator of y, on the device of the images. Default: torch's global generator.
        scaler: gradient scaler of float16 training.

    Returns:
        The penalty, and the updated mean ``mean + decay * (E||J^T y|| - mean)``, which the penalty is computed with.
        Both are scalars; the mean is detached.

    Raises:
        TypeError: if images, latents or ``mean`` are not floating point.
        ValueError: if there are no samples, batch sizes differ, the latents do not require grad, the images do not
            depend on them, ``mean`` is not a scalar, or ``decay`` is out of range.
        RuntimeError: if gradients are disabled, or the images were computed by a compiled generator.

    Example:
        >>> latents = torch.randn(8, 16, requires_grad=True)
        >>> images = torch.nn.Linear(16, 3 * 4 * 4)(latents).unflatten(1, (3, 4, 4))
        >>> penalty, mean = path_length_penalty(images, latents, 0.0)
        >>> penalty.shape, mean.requires_grad
        (torch.Size([]), False)
    """
    check_batch("images", images, 2, "(B, C, *)")
    check_batch("latents", latents, 2, "(B, w) or (B, L, w)")
    if images.size(0) != latents.size(0):
        raise ValueError(
            f"images: expected as many samples as latents, {latents.size(0)}, got {check.shape_of(images)}"
        )
    if not 0 < decay <= 1:
        raise ValueError(f"decay: expected a number in (0, 1], got {decay}")
    check_grad_mode("path_length_penalty")
    check_requires_grad("latents", latents, "generator")
    dtype = upcast_dtype(images.dtype)
    pixels = math.prod(images.shape[2:])
    noise = torch.randn(images.shape, dtype=dtype, device=images.device, generator=generator) / math.sqrt(pixels)
    hint = " (or latents did not require grad when they were computed)"
    squares = squared_gradient_norms("images: expected", images, "latents", latents, scaler, weights=noise, hint=hint)
    lengths = safe_sqrt(squares / math.prod(latents.shape[1:-1]))
    old_mean = _checked_mean(mean, lengths)
    new_mean = old_mean + decay * (lengths.detach().mean() - old_mean)
    return (lengths - new_mean).square().mean(), new_mean
