"""The sampling layer of a variational autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen import functional
from fastgen.checks import require_tensor, shape_of


class GaussianLatent(nn.Module):
    """Samples N(mu, e^logvar) from an encoder's output and gives its KL divergence from N(0, 1).

    The first half of the channels is mu, the second logvar; both are read in place. Has no parameters.
    Samples in eval mode too: for a deterministic code, take ``h.chunk(2, dim=1)[0]``.
    Formula: Kingma and Welling, "Auto-encoding variational Bayes" (2014), section 2.4 and appendix B.

    Shapes: h (B, 2L, *) -> z (B, L, *) in h's dtype, kl (B,) in nats, summed over the latent dims.

    Example:
        >>> z, kl = GaussianLatent()(torch.zeros(4, 32, 2, 2))
        >>> z.shape, kl
        (torch.Size([4, 16, 2, 2]), tensor([0., 0., 0., 0.]))
    """

    def forward(self, h: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Sample.

        Args:
            h: (B, 2L, *), floating.
            generator: source of the noise, on h's device; default torch's global one.

        Raises:
            TypeError: h is not a floating tensor. ValueError: it has no channels, or an odd number of them.
        """
        require_tensor("h", h)
        if h.dim() < 2 or h.size(1) % 2 or h.size(1) == 0:
            raise ValueError(f"h: expected (B, 2L, *), an even number of channels in dim 1, got {shape_of(h)}")
        mu, logvar = h.chunk(2, dim=1)
        return functional.reparameterize_kl(mu, logvar, generator=generator)
