"""Gradient penalties of adversarial training. B is the batch; samples are (B, *) of any dims.

Each returns one number, unweighted (the caller multiplies by lambda or gamma), in float32, or float64 for float64
inputs, and can be differentiated with respect to the parameters: ``loss + weight * penalty``. Bad arguments raise
``TypeError`` (a dtype, not a tensor) or ``ValueError`` (a shape, a value, a device) with the argument's name.

Mixed precision: penalties may be called under autocast. The gradient is turned to float32 before its norm is taken.
In float16 it may underflow on the way; give the ``GradScaler`` as ``scaler`` and it is computed scaled and divided
afterwards, with no synchronisation. The penalty comes out unscaled: scale the sum of all losses as usual,
``scaler.scale(loss).backward()``. Where the scale is too large the penalty is inf or NaN, and the scaler skips the
step as for any other loss.

Compiled modules: PyTorch cannot differentiate code of ``torch.compile`` twice. Call the uncompiled module for the
penalty, ``compiled._orig_mod``, or call it under ``torch.compiler.set_stance("force_eager")``. Or compile the whole
step, penalty included, with ``torch._dynamo.config.trace_autograd_ops = True``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from fastgen import checks as check

__all__ = ["dragan_penalty", "gradient_penalty", "path_length_penalty", "r1_penalty", "r2_penalty"]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32; float64 stays."""
    return torch.promote_types(dtype, torch.float32)


# --------------------------------------------------------------------------------------------------
# Argument checks. ``wanted`` begins a message: "scores: expected", "discriminator: expected it to return".


def _check_batch(name: str, tensor: Tensor, least_dims: int = 1, meaning: str = "(B, *)") -> None:
    check.require_tensor(name, tensor)
    check.require_floating(name, tensor)
    if tensor.dim() < least_dims or tensor.numel() == 0:
        raise ValueError(f"{name}: expected {meaning} with no empty dim, got {check.shape_of(tensor)}")


def _check_scores(wanted: str, scores: Tensor, batch: int) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"{wanted} a tensor, got {type(scores).__name__}")
    if not scores.is_floating_point():
        raise TypeError(f"{wanted} a floating-point tensor, got {scores.dtype}")
    if scores.dim() == 0 or scores.size(0) != batch or scores.numel() != batch:
        patches = scores.dim() > 1 and scores.size(0) == batch and scores.numel() > batch
        hint = "; reduce scores of patches first" if patches else ""
        raise ValueError(
            f"{wanted} one score per sample, (B,) or (B, 1) with B = {batch}, got {check.shape_of(scores)}{hint}"
        )


def _check_requires_grad(name: str, tensor: Tensor, producer: str) -> None:
    if not tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that requires grad (call {name}.requires_grad_() before the {producer}),"
            " got one that does not"
        )


def _check_not_negative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def _check_grad_mode(function: str) -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: expected a call with gradients enabled, got one under torch.no_grad() or"
            " torch.inference_mode(); a penalty is itself a gradient"
        )


# --------------------------------------------------------------------------------------------------
# The gradient


def _edges(roots: Iterable[Node], stop: Node) -> Iterator[tuple[Node, int]]:
    """The edges below the roots, each once, as (node, index of its output), not going on past ``stop``."""
    seen = set(roots)
    pending = [root for root in seen if root != stop]
    while pending:
        for node, index in pending.pop().next_functions:
            if node is None:
                continue
            yield node, index
            if node not in seen and node != stop:
                seen.add(node)
                pending.append(node)


def _leads_through_compiled(outputs: Tensor, source: Tensor) -> bool:
    """Whether outputs come from source through code of torch.compile. Compiled code beside that way does no harm."""
    root, target = outputs.grad_fn, get_gradient_edge(source)
    if root is None:  # outputs are source
        return False
    nodes = [root, *(node for node, _ in _edges([root], target.node))]
    compiled = [node for node in nodes if "CompiledFunctionBackward" in node.name()]
    return any(node == target.node and index == target.output_nr for node, index in _edges(compiled, target.node))


def _traced() -> bool:
    """Whether torch.compile is tracing this call and its torch.autograd.grad: then the penalty is compiled as one."""
    return torch.compiler.is_compiling() and getattr(torch._dynamo.config, "trace_autograd_ops", False)


def _gradient_scale(scaler: torch.amp.GradScaler | None, batch: int, device: torch.device) -> Tensor | None:
    """The scaler's scale, left on the device.

    The gradient of a sum over the batch is B times that of a mean, the usual loss, and a scale of 2^16 alone is inf
    in float16: divided by B, as a power of two so that it rounds nothing.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.full((), 0.5 ** (batch - 1).bit_length(), device=device))


def _squared_norms(
    wanted: str,
    outputs: Tensor,
    source_name: str,
    source: Tensor,
    scaler: torch.amp.GradScaler | None,
    *,
    weights: Tensor | None = None,
    hint: str = "",
) -> Tensor:
    """||d <outputs, weights> / d source||^2 of each sample, (B,), in float32 or float64, differentiable."""
    if not outputs.requires_grad:
        raise ValueError(
            f"{wanted} values computed from {source_name}, got ones that do not require grad"
            " (computed under torch.no_grad(), or detached)"
        )
    if not _traced() and _leads_through_compiled(outputs, source):
        raise RuntimeError(
            f"{wanted} values that PyTorch can differentiate twice, got ones of a module compiled with torch.compile;"
            " call the uncompiled module for the penalty (compiled._orig_mod, or any call under"
            " torch.compiler.set_stance('force_eager')), for instance every 16th step as lazy regularisation does,"
            " and keep the compiled one for the other losses"
        )
    batch = source.size(0)
    # The backward pass takes its dtypes from the forward pass; autocast would also lower what was kept in float32.
    with torch.autocast(source.device.type, enabled=False):
        scale = _gradient_scale(scaler, batch, outputs.device)
        seed = torch.ones_like(outputs, dtype=_wide(outputs.dtype)) if weights is None else weights
        seed = (seed if scale is None else seed * scale).to(outputs.dtype)
        (gradient,) = torch.autograd.grad(outputs, source, seed, create_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(f"{wanted} values computed from {source_name}, got ones that do not depend on it{hint}")
        gradient = gradient.to(_wide(gradient.dtype))
        if scale is not None:
            gradient = gradient / scale.to(gradient.device, non_blocking=True)
        squares: Tensor = gradient.reshape(batch, gradient.numel() // batch).square().sum(1)
        return squares


def _safe_sqrt(squares: Tensor) -> Tensor:
    """sqrt whose derivatives of every order are 0 at 0, not inf or NaN. NaN and inf stay what they are."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


# --------------------------------------------------------------------------------------------------
# Penalties at points between or around samples


def _one_per_sample(samples: Tensor, generator: torch.Generator | None) -> Tensor:
    """U(0, 1), (B, 1, ...)."""
    shape = (samples.size(0), *(1 for _ in samples.shape[1:]))
    return torch.rand(shape, dtype=_wide(samples.dtype), device=samples.device, generator=generator)


def _centered_penalty(
    discriminator: Callable[[Tensor], Tensor], points: Tensor, center: float, scaler: torch.amp.GradScaler | None
) -> Tensor:
    """E[(||grad D(points)|| - center)^2]."""
    wanted = "discriminator: expected it to return"
    points.requires_grad_()
    scores = discriminator(points)
    _check_scores(wanted, scores, points.size(0))
    norms = _safe_sqrt(_squared_norms(wanted, scores, "its input", points, scaler))
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
    """Distance of the discriminator's slope from ``center``, between real and generated samples.

    ``E[(||grad D(x^)||_2 - center)^2]``, ``x^ = a x + (1 - a) x~``, ``a ~ U(0, 1)``, one per sample; the norm is over
    the whole sample. Gulrajani et al., "Improved training of Wasserstein GANs" (2017), equation 3, with lambda = 10.

    Args:
        discriminator: maps (B, *) to one score per sample, (B,) or (B, 1). Called once, under the caller's autocast.
        real: (B, *), floating. Detached, as is fake.
        fake: like real: its shape, dtype and device.
        center: the slope asked for. 1 in the paper; 0 is known as the zero-centered penalty.
        generator: source of a, on the samples' device; default torch's global one.
        scaler: the scaler of float16 training.

    Returns:
        A scalar. Where a gradient is exactly 0 the penalty's own gradient is 0.

    Raises:
        TypeError: samples or scores that are not floating tensors, dtypes that differ.
        ValueError: shapes or devices that differ, no samples, a negative center, scores that are not one per sample
            or do not depend on the samples.
        RuntimeError: gradients are disabled, or the discriminator is compiled.

    Example:
        >>> gradient_penalty(lambda x: 3 * x[:, 0], torch.randn(8, 2), torch.randn(8, 2))
        tensor(4.)
    """
    _check_batch("real", real)
    _check_batch("fake", fake)
    check.require_shape("fake", fake, tuple(real.shape), "that of real")
    check.require_alike("real", real, fake=fake)
    _check_not_negative("center", center)
    _check_grad_mode("gradient_penalty")
    share, wide = _one_per_sample(real, generator), _wide(real.dtype)
    points = torch.lerp(fake.detach().to(wide), real.detach().to(wide), share).to(real.dtype)
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
    """Distance of the discriminator's slope from ``center``, around real samples.

    ``E[(||grad D(x^)||_2 - center)^2]``, ``x^ = x + (1 - a) noise std(x) u``, ``a ~ U(0, 1)`` one per sample,
    ``u ~ U(0, 1)`` one per element, std over the whole batch. Kodali et al., "On convergence and stability of GANs"
    (2017), section 2.3, with lambda = 10; the noise is that of the authors' code.

    Args:
        discriminator: maps (B, *) to one score per sample, (B,) or (B, 1). Called once, under the caller's autocast.
        real: (B, *), floating. Detached.
        noise: how far from the samples, in standard deviations.
        center: the slope asked for.
        generator: source of a, then of u, on the samples' device; default torch's global one.
        scaler: the scaler of float16 training.

    Returns:
        A scalar. Where a gradient is exactly 0 the penalty's own gradient is 0.

    Raises:
        TypeError: samples or scores that are not floating tensors.
        ValueError: no samples, negative noise or center, scores that are not one per sample or do not depend on
            the samples.
        RuntimeError: gradients are disabled, or the discriminator is compiled.

    Example:
        >>> dragan_penalty(lambda x: 3 * x[:, 0], torch.randn(8, 2))
        tensor(4.)
    """
    _check_batch("real", real)
    _check_not_negative("noise", noise)
    _check_not_negative("center", center)
    _check_grad_mode("dragan_penalty")
    samples = real.detach().to(_wide(real.dtype))
    share = _one_per_sample(real, generator)
    uniform = torch.rand(samples.shape, dtype=samples.dtype, device=samples.device, generator=generator)
    points = samples + (1 - share) * noise * samples.std(correction=0) * uniform
    return _centered_penalty(discriminator, points.to(real.dtype), center, scaler)


# --------------------------------------------------------------------------------------------------
# Penalties at the samples


def _squared_slope(name: str, samples: Tensor, scores: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """1/2 E||grad D(samples)||^2."""
    wanted = "scores: expected"
    _check_batch(name, samples)
    _check_scores(wanted, scores, samples.size(0))
    _check_grad_mode("r1_penalty" if name == "real" else "r2_penalty")
    _check_requires_grad(name, samples, "discriminator")
    hint = f" (or {name} did not require grad when they were computed)"
    return 0.5 * _squared_norms(wanted, scores, name, samples, scaler, hint=hint).mean()


def r1_penalty(scores: Tensor, real: Tensor, *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
    """Squared slope of the discriminator at real samples, ``1/2 E||grad D(x)||^2``.

    Mescheder et al., "Which training methods for GANs do actually converge?" (2018), equation 9, without gamma.

    Args:
        scores: D(real), one per sample, (B,) or (B, 1). The ones of the loss may be used.
        real: (B, *), floating. Call ``real.requires_grad_()`` before the discriminator.
        scaler: the scaler of float16 training.

    Returns:
        A scalar.

    Raises:
        TypeError: samples or scores that are not floating tensors.
        ValueError: no samples, samples that do not require grad, scores that are not one per sample or do not depend
            on the samples.
        RuntimeError: gradients are disabled, or the scores are those of a compiled discriminator.

    Example:
        >>> real = torch.ones(8, 3, requires_grad=True)
        >>> r1_penalty(real.square().sum(1), real).item()
        6.0
    """
    return _squared_slope("real", real, scores, scaler)


def r2_penalty(scores: Tensor, fake: Tensor, *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
    """Squared slope of the discriminator at generated samples, ``1/2 E||grad D(x~)||^2``.

    Mescheder et al., "Which training methods for GANs do actually converge?" (2018), equation 10, without gamma.

    Args:
        scores: D(fake), one per sample, (B,) or (B, 1). The ones of the loss may be used.
        fake: (B, *), floating, requiring grad: the generator's output, or ``output.detach().requires_grad_()`` to
            leave the generator out of the penalty's gradient.
        scaler: the scaler of float16 training.

    Returns:
        A scalar.

    Raises:
        TypeError: samples or scores that are not floating tensors.
        ValueError: no samples, samples that do not require grad, scores that are not one per sample or do not depend
            on the samples.
        RuntimeError: gradients are disabled, or the scores are those of a compiled discriminator.

    Example:
        >>> fake = torch.ones(8, 3, requires_grad=True) * 2
        >>> r2_penalty(fake.square().sum(1), fake).item()
        24.0
    """
    return _squared_slope("fake", fake, scores, scaler)


# --------------------------------------------------------------------------------------------------
# Path length


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
    """Spread of how far the image moves with the latent, around its running mean.

    ``E[(||J^T y|| - mean)^2]``, J the generator's Jacobian, ``J^T y = grad <images, y>``,
    ``y ~ N(0, I) / sqrt(pixels)``. Karras et al., "Analyzing and improving the image quality of StyleGAN" (2020),
    section 3.2; the scaling of y and the mean over the layers' latents are those of the authors' code.

    Args:
        images: (B, C, *), computed from latents. The dims after C count as pixels.
        latents: (B, w), or (B, L, w) with one latent per layer, floating, requiring grad. The squared lengths of
            dims between the first and the last are averaged.
        mean: the running mean of the lengths, a scalar tensor or a number: 0 in the beginning, then what the
            previous call returned. Not modified.
        decay: weight of this batch in the mean, in (0, 1].
        generator: source of y, on the images' device; default torch's global one.
        scaler: the scaler of float16 training.

    Returns:
        The penalty, and the new mean ``mean + decay * (E||J^T y|| - mean)``, which the penalty already uses; both
        scalars. The new mean is detached: no gradient passes through it.

    Raises:
        TypeError: images, latents or a mean that are not floating.
        ValueError: no samples, batches that differ, latents that do not require grad, images that do not depend on
            them, a mean that is no scalar, a decay out of range.
        RuntimeError: gradients are disabled, or the images are those of a compiled generator.

    Example:
        >>> latents = torch.randn(8, 16, requires_grad=True)
        >>> images = torch.nn.Linear(16, 3 * 4 * 4)(latents).unflatten(1, (3, 4, 4))
        >>> penalty, mean = path_length_penalty(images, latents, 0.0)
        >>> penalty.shape, mean.requires_grad
        (torch.Size([]), False)
    """
    _check_batch("images", images, 2, "(B, C, *)")
    _check_batch("latents", latents, 2, "(B, w) or (B, L, w)")
    if images.size(0) != latents.size(0):
        raise ValueError(
            f"images: expected as many samples as latents, {latents.size(0)}, got {check.shape_of(images)}"
        )
    if not 0 < decay <= 1:
        raise ValueError(f"decay: expected a number in (0, 1], got {decay}")
    _check_grad_mode("path_length_penalty")
    _check_requires_grad("latents", latents, "generator")
    wide = _wide(images.dtype)
    pixels = math.prod(images.shape[2:])
    noise = torch.randn(images.shape, dtype=wide, device=images.device, generator=generator) / math.sqrt(pixels)
    hint = " (or latents did not require grad when they were computed)"
    squares = _squared_norms("images: expected", images, "latents", latents, scaler, weights=noise, hint=hint)
    lengths = _safe_sqrt(squares / math.prod(latents.shape[1:-1]))
    before = _checked_mean(mean, lengths)
    after = before + decay * (lengths.detach().mean() - before)
    return (lengths - after).square().mean(), after
