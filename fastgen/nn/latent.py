"""Sampling layer of variational autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen import functional
from fastgen.checks import require_tensor, shape_of


class GaussianLatent(nn.Module):
    """Samples z ~ N(mu, exp(logvar)) from an encoder's output and computes the KL divergence from N(0, 1).

    Kingma and Welling, "Auto-encoding variational Bayes" (2014), section 2.4 and appendix B. The first half of the
    channels is mu, the second half logvar; both are read in place. The layer has no parameters. It also samples in
    eval mode; use ``h.chunk(2, dim=1)[0]`` for the posterior mean.

    Shapes:
        - Input: h (B, 2L, *).
        - Output: z (B, L, *) in the dtype of h, and kl (B,) in nats, summed over the latent dims.

    Example:
        >>> z, kl = GaussianLatent()(torch.zeros(4, 32, 2, 2))
        >>> z.shape, kl
        (torch.Size([4, 16, 2, 2]), tensor([0., 0., 0., 0.]))
    """

    def forward(self, h: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Samples the latents.

        Args:
            h: mu and logvar, (B, 2L, *), floating point.
            generator: random number generator of the noise, on the device of h. Default: torch's global generator.

        Returns:
            z (B, L, *) and the KL divergence (B,).

        Raises:
            TypeError: if h is not a floating-point tensor.
            ValueError: if h has no channels, or an odd number of channels.
        """
        require_tensor("h", h)
        if h.dim() < 2 or h.size(1) % 2 or h.size(1) == 0:
            raise ValueError(f"h: expected (B, 2L, *), an even number of channels in dim 1, got {shape_of(h)}")
        mu, logvar = h.chunk(2, dim=1)
        return functional.reparameterize_kl(mu, logvar, generator=generator)
