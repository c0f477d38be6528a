"""A variational autoencoder of dense layers whose posterior is a normalising flow.

A sample of a normal distribution passes through invertible maps whose Jacobians are known, so that the posterior can
have any shape while log q stays exact (Rezende and Mohamed, "Variational inference with normalizing flows", 2015):

    images -> encoder -> mu, logvar of z_0, context       z_0 -> flow -> ... -> flow -> z -> decoder -> p(pixel | z)
    log q(z | images) = log N(z_0; mu, exp(logvar)) - sum log |det dz_k / dz_(k-1)|

planar: z + u tanh(w z + b), with u, w and b from the encoder (the paper above). inverse-autoregressive: each number is
scaled and shifted by a function of those before it and of the context, the order turning round from one flow to the
next (Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016).

The KL has no closed form: it is estimated from the sample, and may be negative for a single image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import require_choice, require_positive
from fastgen.models._likelihoods import log_standard_normal
from fastgen.models._norms import widened
from fastgen.models.base import Batch, Images, NoOptions, option
from fastgen.models.variational import (
    Bound,
    DenseVAE,
    DenseVAEConfig,
    check_images,
    dense,
    normal_noise,
    sample_and_log_prob,
)
from fastgen.nn._buffers import ComputedBuffers

Flow = Literal["inverse-autoregressive", "planar"]

LEAST_SLOPE = 1e-6  # of a planar flow, along w
FIRST_GATE = 1.5  # sigmoid of it is 0.82: a new flow changes little


@dataclass(frozen=True)
class FlowVAEConfig(DenseVAEConfig):
    """Sizes of a FlowVAE and how it learns. ValueError names the field, what was expected and what came."""

    free_bits: float = option(0.0, "nats that z may cost for nothing, for each of its numbers, on average over all")
    flow: Flow = option("inverse-autoregressive", "what the posterior's samples pass through")
    flows: int = option(4, "how many of them")
    flow_width: int = option(64, "units of an inverse autoregressive flow")
    context_dim: int = option(32, "numbers that the encoder tells each inverse autoregressive flow")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flows", "flow_width", "context_dim"):
            require_positive(name, getattr(self, name))
        require_choice("flow", self.flow, get_args(Flow))
        if self.flow == "inverse-autoregressive" and self.latent_dim < 2:
            raise ValueError("latent_dim: expected at least 2 with inverse autoregressive flows, got 1")

    @property
    def told(self) -> int:
        """Numbers that the encoder gives beside mu and logvar."""
        return self.context_dim if self.flow == "inverse-autoregressive" else self.flows * (2 * self.latent_dim + 1)


def planar(z: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    """z + u tanh(w z + b), and log |det| of its Jacobian.

    u is moved along w so that w u > -1, where the map is invertible (appendix A.1 of the paper).

    Args:
        z: (B, L). told: (B, 2 L + 1), u, w and b.

    Returns:
        (B, L) and (B,).
    """
    u, w, b = told.split((z.size(1), z.size(1), 1), dim=1)
    along, squared = (w * u).sum(1, keepdim=True), w.square().sum(1, keepdim=True)
    # w u once it is moved, which is above -1 also after rounding: above a softplus that has underflowed, too.
    target = F.softplus(along + math.log(math.e - 1)).clamp(min=LEAST_SLOPE) - 1
    u = u + (target - along) * w / squared.clamp(min=1e-6)
    along = torch.where(squared < 1e-6, (w * u).sum(1, keepdim=True).clamp(min=LEAST_SLOPE - 1), target)
    h = torch.tanh((w * z).sum(1, keepdim=True) + b)
    log_det = torch.log1p((1 - h.square()) * along)
    return z + u * h, log_det.squeeze(1)


class MaskedLinear(ComputedBuffers, nn.Linear):
    """A linear map of which output i sees the inputs j with ``out_degrees[i] >= in_degrees[j]``."""

    mask: Tensor

    def __init__(self, in_degrees: list[int], out_degrees: list[int]) -> None:
        super().__init__(len(in_degrees), len(out_degrees))
        self.in_degrees, self.out_degrees = in_degrees, out_degrees
        self._register_computed()

    def _computed(self) -> dict[str, Tensor]:
        return {"mask": (torch.tensor(self.out_degrees)[:, None] >= torch.tensor(self.in_degrees)).float()}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class InverseAutoregressiveFlow(nn.Module):
    """g z + (1 - g) m, with g in (0, 1) and m of each number being functions of those before it and of the context.

    The nets are masked (Germain et al., "MADE", 2015): a hidden unit of degree d sees the first d numbers.
    """

    def __init__(self, latent_dim: int, width: int, context_dim: int) -> None:
        super().__init__()
        degrees = [unit % (latent_dim - 1) + 1 for unit in range(width)]
        self.hidden = MaskedLinear(list(range(1, latent_dim + 1)), degrees)
        self.context = nn.Linear(context_dim, width, bias=False)
        self.out = MaskedLinear(degrees, 2 * list(range(latent_dim)))
        self.told = nn.Linear(context_dim, 2 * latent_dim, bias=False)
        with torch.no_grad():
            self.out.weight.mul_(0.1)
            self.told.weight.mul_(0.1)
            self.out.bias.copy_(torch.tensor([0.0, FIRST_GATE]).repeat_interleave(latent_dim))

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, L), context (B, context_dim) -> (B, L), and log |det| of the Jacobian, (B,)."""
        for name, module in (("hidden", self.hidden), ("out", self.out)):
            if not isinstance(module, MaskedLinear):
                raise TypeError(
                    f"{name}: expected a MaskedLinear, without which the flow's log determinant is wrong, got"
                    f" {type(module).__name__}; put adapters on context and told"
                )
        hidden = self.hidden(z) + self.context(context)
        out = self.out(F.silu(hidden)) + self.told(context)
        shift, gate = out.to(z.dtype).chunk(2, dim=1)
        kept = torch.sigmoid(gate)
        return kept * z + (1 - kept) * shift, F.logsigmoid(gate).sum(1)


class FlowVAE(DenseVAE):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1).

    Example:
        >>> model = FlowVAE(FlowVAEConfig(image_size=8, levels=17, flow="planar"))
        >>> model.bound({"images": torch.zeros(5, 1, 8, 8)}).kl.shape
        torch.Size([5])
        >>> model.draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "flow-vae"
    summary = "variational autoencoder whose posterior is a normalising flow"
    config_class = FlowVAEConfig
    train_defaults: ClassVar = {"epochs": 150.0, "batch_size": 64, "clip": 100.0, "average_decay": 0.998}
    config: FlowVAEConfig

    def __init__(self, config: FlowVAEConfig) -> None:
        super().__init__(config)
        pixels = config.channels * config.image_size**2
        self.encoder = dense(pixels, config.width, config.depth, 2 * config.latent_dim + config.told)
        sizes = (config.latent_dim, config.flow_width, config.context_dim)
        count = config.flows if config.flow == "inverse-autoregressive" else 0
        self.flows = nn.ModuleList(InverseAutoregressiveFlow(*sizes) for _ in range(count))
        self.decoder = dense(config.latent_dim, config.width, config.depth, self._decoder_outputs())

    def flow(self, z: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """All flows: z_0 (B, latent_dim) and what the encoder told them -> z, and log |det dz / dz_0|, (B,)."""
        log_det = torch.zeros_like(z[:, 0])
        if self.config.flow == "planar":
            for numbers in told.chunk(self.config.flows, dim=1):
                z, more = planar(z, numbers)
                log_det = log_det + more
        for flow in self.flows:
            z, more = flow(z.flip(1), told)
            log_det = log_det + more
        return z, log_det

    def bound(self, batch: Batch, *, beta: float = 1.0, generator: torch.Generator | None = None) -> Bound:
        log_p, kl = self._sample(batch["images"], generator)
        paid = kl.mean()
        if self.config.free_bits:  # of all numbers together: a flow's KL is of them all
            paid = paid.clamp(min=self.config.free_bits * self.config.latent_dim)
        return Bound(beta * paid - log_p.mean(), -log_p, kl)

    @torch.no_grad()
    def log_weights(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) log p(images, z) - log q(z | images) of one posterior sample, in nats; their mean is the ELBO."""
        log_p, kl = self._sample(batch["images"], generator)
        return log_p - kl

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Tensor:
        mu, _, told = self._posterior(batch["images"])
        return self._mean(self.decoder(self.flow(mu, told)[0]))

    @torch.no_grad()
    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Images:
        """The expected pixels of n latents from the prior."""
        require_positive("n", n)
        noise = normal_noise((n, self.config.latent_dim), next(self.decoder.parameters()), generator)
        return Images(self._mean(self.decoder(noise)))

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mu and logvar of z_0, (B, latent_dim) each, and what the flows are told."""
        config = self.config
        check_images(images, config)
        parts = widened(self.encoder(2 * images.flatten(1) - 1))
        mu, logvar, told = parts.split((config.latent_dim, config.latent_dim, config.told), dim=1)
        return mu, logvar, told

    def _sample(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """log p(images | z), and log q(z | images) - log p(z), (B,) each, of one posterior sample."""
        mu, logvar, told = self._posterior(images)
        first, log_first = sample_and_log_prob(mu, logvar, generator=generator)
        z, log_det = self.flow(first, told)
        return self._log_prob(self.decoder(z), images), log_first - log_det - log_standard_normal(z)
