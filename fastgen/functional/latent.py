"""Gaussian latents: reparameterization and KL divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen import checks as check
from fastgen._dynamo import is_dynamo_compiling
from fastgen.backend import select
from fastgen.functional._autocast import autocast_dtype
from fastgen.functional._overrides import handle_torch_function, overridden, relevant
from fastgen.functional._seeds import sample_seed
from fastgen.ops.latent import operator_path
from fastgen.ops.latent.autograd import gaussian_latent


def _rows(tensor: Tensor) -> Tensor:
    """(B, *) -> (B, D) with a contiguous last dim; a view for the halves of one encoder output."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(tensor.size(0), math.prod(tensor.shape[1:]))
    return rows if rows.size(1) <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _latent(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    generator: torch.Generator | None,
    with_kl: bool,
) -> tuple[Tensor, Tensor]:
    if prior_mu is None and prior_logvar is None and not is_dynamo_compiling() and operator_path.takes(mu, logvar):
        seed = sample_seed(mu.device, generator)
        return operator_path.gaussian_latent(mu, logvar, seed, with_kl, select("latent_forward", mu))
    tensors = {"mu": mu, "logvar": logvar, "prior_mu": prior_mu, "prior_logvar": prior_logvar}
    for name, tensor in tensors.items():
        check.require_tensor(name, tensor, optional=name.startswith("prior"))
        if tensor is not None:
            check.require_floating(name, tensor)
    if mu.dim() == 0:
        raise ValueError("mu: expected (B, *), got a scalar tensor")
    check.require_shape("logvar", logvar, tuple(mu.shape), "that of mu")
    if autocast_dtype(mu) is not None:
        wide = mu.dtype
        for tensor in (logvar, prior_mu, prior_logvar):
            wide = wide if tensor is None else torch.promote_types(wide, tensor.dtype)
        mu, logvar = mu.to(wide), logvar.to(wide)
        prior_mu = None if prior_mu is None else prior_mu.to(wide)
        prior_logvar = None if prior_logvar is None else prior_logvar.to(wide)
    check.require_alike("mu", mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
    priors = []
    for name, tensor in (("prior_mu", prior_mu), ("prior_logvar", prior_logvar)):
        if tensor is not None:
            check.require_broadcast(name, tensor, tuple(mu.shape), "the shape of mu")
            tensor = _rows(tensor.expand(mu.shape))
        priors.append(tensor)
    seed = sample_seed(mu.device, generator)
    namespace = select("latent_forward", mu)
    z, kl = gaussian_latent(_rows(mu), _rows(logvar), priors[0], priors[1], seed, with_kl, namespace)
    return z if mu.dim() == 2 else z.reshape(mu.shape), kl


def reparameterize(mu: Tensor, logvar: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""A sample of N(mu, e^logvar), differentiable in both: ``z = mu + noise * exp(logvar / 2)``.

    Kingma and Welling, "Auto-encoding variational Bayes" (2014), section 2.4. The noise is a function of one
    64-bit seed and each element's position (Philox4x32-10 and Box-Muller in float32). It is the same on every
    backend, and it is regenerated in the backward pass instead of saved. Differentiable to any order in reverse
    mode, with forward-mode AD.

    Args:
        mu: (B, *), floating.
        logvar: logarithm of the variance, same shape and dtype as mu. NaN propagates to its element of z.
        generator: source of the seed, on the tensors' device; default: torch's global generator.

    Returns:
        z, contiguous, with mu's shape and dtype.

    Raises:
        TypeError: integer tensors, or dtypes that differ.
        ValueError: shapes or devices that differ.

    Example:
        >>> h = torch.randn(4, 32)  # an encoder's output; its halves are read in place
        >>> reparameterize(*h.chunk(2, dim=1)).shape
        torch.Size([4, 16])
    """
    if overridden(mu, logvar) and (own := relevant(mu, logvar)):
        return handle_torch_function(  # type: ignore[no-any-return]
            reparameterize, own, mu, logvar, generator=generator
        )
    return _latent(mu, logvar, None, None, generator, with_kl=False)[0]


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``reparameterize`` and the KL divergence from the prior, in one pass over memory.

    ``kl = 1/2 sum(e^(lv - plv) + (mu - pmu)^2 e^(-plv) - 1 - (lv - plv))`` (Kingma and Welling 2014, appendix B).
    Differentiable to any order in reverse mode, with forward-mode AD.

    Args:
        mu: (B, *), floating.
        logvar: logarithm of the variance, same shape and dtype as mu. The two halves of one encoder output are read
            in place.
        prior_mu: mean of the prior, broadcasts to mu's shape; default 0. Differentiable.
        prior_logvar: logarithm of the prior's variance, broadcasts to mu's shape; default 0. Differentiable.
        generator: source of the seed, on the tensors' device; default: torch's global generator.

    Returns:
        z, contiguous, with mu's shape and dtype, and kl (B,), in nats, summed over the latent dims, float32 (float64
        for float64). NaN in logvar propagates to its element of z and to the kl of its row, as in PyTorch.

    Raises:
        TypeError: integer tensors, or dtypes that differ.
        ValueError: shapes or devices that do not match.

    Example:
        >>> z, kl = reparameterize_kl(torch.zeros(4, 16), torch.zeros(4, 16))
        >>> z.shape, kl
        (torch.Size([4, 16]), tensor([0., 0., 0., 0.]))
    """
    if overridden(mu, logvar, prior_mu, prior_logvar) and (own := relevant(mu, logvar, prior_mu, prior_logvar)):
        return handle_torch_function(  # type: ignore[no-any-return]
            reparameterize_kl, own, mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, generator=generator
        )
    return _latent(mu, logvar, prior_mu, prior_logvar, generator, with_kl=True)
