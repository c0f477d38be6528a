"""Variational autoencoder whose posterior is a normalizing flow.

Rezende and Mohamed, "Variational inference with normalizing flows" (2015). A sample of a normal distribution passes
through invertible maps with known Jacobians, so that the posterior can have any shape while log q stays exact:

    images -> encoder -> mu, logvar of z_0, context       z_0 -> flow -> ... -> flow -> z -> decoder -> p(pixel | z)
    log q(z | images) = log N(z_0; mu, exp(logvar)) - sum log |det dz_k / dz_(k-1)|

planar: z + u tanh(w z + b); u, w and b are the encoder's context (the paper above). inverse-autoregressive: each
dimension is scaled and shifted by a function of the dimensions before it and of the context; the order of the
dimensions is reversed from one flow to the next (Kingma et al., "Improved variational inference with inverse
autoregressive flow", 2016).

The KL has no closed form: it is estimated from the sample and may be negative for a single image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import (
    require_choice,
    require_count,
    require_not_negative,
    require_positive,
    require_positive_number,
)
from fastgen.models.base import Images, Phase, option, upcast
from fastgen.models.conditioning import LatentOptions
from fastgen.models.registry import register_model
from fastgen.models.sizes import DECAY, Size
from fastgen.models.vae import mlp
from fastgen.models.variational import (
    Bound,
    Likelihood,
    VariationalAutoencoder,
    check_images,
    check_latents,
    check_likelihood,
    log_standard_normal,
    normal_noise,
    parameters_per_pixel,
    pixels_mean,
    sample_and_log_prob,
)
from fastgen.nn._buffers import ComputedBuffers

Flow = Literal["inverse-autoregressive", "planar"]

MIN_DERIVATIVE = 1e-6  # of a planar flow along w
INITIAL_GATE_LOGIT = 1.5  # its sigmoid is 0.82: a new flow is near the identity


@dataclass(frozen=True)
class FlowVAEConfig:
    """Hyperparameters of a FlowVAE.

    Raises:
        ValueError: a field is out of range.
    """

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    levels: int = option(17, "number of values of a pixel: counts 0 .. levels - 1", from_data=True)
    likelihood: Likelihood = option("beta-binomial", "distribution of a pixel; bernoulli requires two levels")
    beta: float = option(1.0, "weight of the KL in the loss")
    free_bits: float = option(0.0, "minimum of the mean KL in the loss, in nats per latent dimension")
    kl_warmup: int = option(230, "number of steps over which the weight of the KL grows to beta")
    latent_dim: int = option(10, "latent dimension")
    width: int = option(256, "units of each hidden layer")
    depth: int = option(2, "number of hidden layers of the encoder and of the decoder")
    learning_rate: float = option(1e-3, "AdamW learning rate")
    weight_decay: float = option(0.1, "AdamW weight decay")
    flow: Flow = option("inverse-autoregressive", "type of the flows")
    flows: int = option(4, "number of flows")
    flow_width: int = option(64, "hidden units of each inverse autoregressive flow")
    context_dim: int = option(32, "dimension of the context of inverse autoregressive flows")

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "latent_dim", "width", "depth", "flows", "flow_width", "context_dim"):
            require_positive(name, getattr(self, name))
        check_likelihood(self.likelihood, self.levels)
        require_not_negative(beta=self.beta, free_bits=self.free_bits, weight_decay=self.weight_decay)
        require_count("kl_warmup", self.kl_warmup, 0, "a number of steps")
        require_positive_number(learning_rate=self.learning_rate)
        require_choice("flow", self.flow, get_args(Flow))
        if self.flow == "inverse-autoregressive" and self.latent_dim < 2:
            raise ValueError("latent_dim: expected at least 2 with inverse autoregressive flows, got 1")

    @property
    def context_size(self) -> int:
        """Dimension of the context: what the encoder computes besides mu and logvar."""
        return self.context_dim if self.flow == "inverse-autoregressive" else self.flows * (2 * self.latent_dim + 1)


def planar(z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """z + u tanh(w z + b), and log |det| of its Jacobian.

    u is moved along w so that w u > -1, where the map is invertible (appendix A.1 of the paper).

    Args:
        z: (B, L). parameters: (B, 2 L + 1), u, w and b.

    Returns:
        (B, L) and (B,).
    """
    u, w, b = parameters.split((z.size(1), z.size(1), 1), dim=1)
    along, squared = (w * u).sum(1, keepdim=True), w.square().sum(1, keepdim=True)
    # w u after the move, above -1 also after rounding and where softplus underflows.
    target = F.softplus(along + math.log(math.e - 1)).clamp(min=MIN_DERIVATIVE) - 1
    u = u + (target - along) * w / squared.clamp(min=1e-6)
    along = torch.where(squared < 1e-6, (w * u).sum(1, keepdim=True).clamp(min=MIN_DERIVATIVE - 1), target)
    h = torch.tanh((w * z).sum(1, keepdim=True) + b)
    log_det = torch.log1p((1 - h.square()) * along)
    return z + u * h, log_det.squeeze(1)


class MaskedLinear(ComputedBuffers, nn.Linear):
    """A linear layer whose output i depends on the inputs j with ``out_degrees[i] >= in_degrees[j]``."""

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
    """g z + (1 - g) m; g in (0, 1) and m of each dimension are functions of those before it and of the context.

    The network is masked (Germain et al., "MADE", 2015): a hidden unit of degree d depends on the first d dimensions.
    """

    def __init__(self, latent_dim: int, width: int, context_dim: int) -> None:
        super().__init__()
        degrees = [unit % (latent_dim - 1) + 1 for unit in range(width)]
        self.hidden = MaskedLinear(list(range(1, latent_dim + 1)), degrees)
        self.context = nn.Linear(context_dim, width, bias=False)
        self.out = MaskedLinear(degrees, 2 * list(range(latent_dim)))
        self.told = nn.Linear(context_dim, 2 * latent_dim, bias=False)  # context -> out; saved models have this name
        with torch.no_grad():
            self.out.weight.mul_(0.1)
            self.told.weight.mul_(0.1)
            self.out.bias.copy_(torch.tensor([0.0, INITIAL_GATE_LOGIT]).repeat_interleave(latent_dim))

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
        shift, gate_logits = out.to(z.dtype).chunk(2, dim=1)
        gate = torch.sigmoid(gate_logits)
        return gate * z + (1 - gate) * shift, F.logsigmoid(gate_logits).sum(1)


@register_model
class FlowVAE(VariationalAutoencoder):
    """Variational autoencoder with a normalizing flow as posterior.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1).

    Example:
        >>> model = FlowVAE(FlowVAEConfig(image_size=8, levels=17, flow="planar"))
        >>> model(torch.zeros(5, 1, 8, 8)).kl.shape
        torch.Size([5])
        >>> model.draw(3, LatentOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "flow-vae"
    summary = "variational autoencoder whose posterior is a normalizing flow"
    config_class, sampling_class = FlowVAEConfig, LatentOptions
    train_defaults: ClassVar = {"steps": 3368, "batch_size": 64, "clip": 100.0, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(8_000, passes=200, train=DECAY, model={"latent_dim": 20, "width": 512}),
        "large": Size(3_000, passes=200, train=DECAY, model={"latent_dim": 32}),
        "medium, gpu": Size(20_000, 128, passes=200, train=DECAY, model={"latent_dim": 20, "width": 1024}),
        "large, gpu": Size(20_000, 128, passes=200, train=DECAY, model={"latent_dim": 64, "width": 1024}),
    }
    config: FlowVAEConfig

    def __init__(self, config: FlowVAEConfig) -> None:
        super().__init__(config)
        pixels = config.channels * config.image_size**2
        outputs = parameters_per_pixel(config.likelihood) * pixels
        self.encoder = mlp(pixels, config.width, config.depth, 2 * config.latent_dim + config.context_size)
        sizes = (config.latent_dim, config.flow_width, config.context_dim)
        count = config.flows if config.flow == "inverse-autoregressive" else 0  # planar flows have no weights
        self.flows = nn.ModuleList(InverseAutoregressiveFlow(*sizes) for _ in range(count))
        self.decoder = mlp(config.latent_dim, config.width, config.depth, outputs)

    def forward(self, images: Tensor, *, beta: float = 1.0, generator: torch.Generator | None = None) -> Bound:
        """The loss, with one posterior sample per image.

        Args:
            images: (B, C, S, S) in [0, 1].
            beta: weight of the KL in the loss; nll and kl do not depend on it.
            generator: source of the noise, on the images' device; default torch's global one.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        nll, kl = self._nll_and_kl(images, generator)
        kl_loss = kl.mean()
        if self.config.free_bits:  # the estimate of a flow's KL does not split into dimensions
            kl_loss = kl_loss.clamp(min=self.config.free_bits * self.config.latent_dim)
        return Bound(nll.mean() + beta * kl_loss, nll, kl)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("model", (), self.config.learning_rate, (0.9, 0.99), self.config.weight_decay),)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, S, S) -> mu and logvar of z_0, (B, latent_dim) each, and the context (B, context_size).

        A posterior sample is ``flow(z_0, context)[0]``.
        """
        config = self.config
        check_images(images, config)
        parameters = upcast(self.encoder(2 * images.flatten(1) - 1))
        mu, logvar, context = parameters.split((config.latent_dim, config.latent_dim, config.context_size), dim=1)
        return mu, logvar, context

    def flow(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z_0 (B, latent_dim), context (B, context_size) -> z (B, latent_dim), and log |det dz / dz_0|, (B,)."""
        log_det = torch.zeros_like(z[:, 0])
        if self.config.flow == "planar":
            for parameters in context.chunk(self.config.flows, dim=1):
                z, log_det_k = planar(z, parameters)
                log_det = log_det + log_det_k
        for flow in self.flows:
            z, log_det_k = flow(z.flip(1), context)
            log_det = log_det + log_det_k
        return z, log_det

    def decode(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) -> expected pixels (B, C, S, S) in [0, 1]. ValueError: another shape."""
        check_latents(z, self.config)
        return pixels_mean(self._pixel_parameters(z), self.config.likelihood)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) -> ``decode`` of the flow of their mean z_0 (B, C, S, S), without noise."""
        mu, _, context = self.encode(images)
        return self.decode(self.flow(mu, context)[0])

    def log_weight(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) log p(images, z) - log q(z | images) of one posterior sample per image, in nats."""
        nll, kl = self._nll_and_kl(images, generator)
        return -nll - kl

    @torch.no_grad()
    def draw(self, n: int, options: LatentOptions, *, generator: torch.Generator | None = None) -> Images:
        """The expected pixels of n latents from the prior.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        z = normal_noise((n, self.config.latent_dim), next(self.decoder.parameters()), generator, options)
        return Images(self.decode(z))

    def _nll_and_kl(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """-log p(images | z), and log q(z | images) - log p(z), (B,) each, of one posterior sample."""
        mu, logvar, context = self.encode(images)
        z_0, log_q_0 = sample_and_log_prob(mu, logvar, generator=generator)
        z, log_det = self.flow(z_0, context)
        nll = -self.log_likelihood(self._pixel_parameters(z), images)
        return nll, log_q_0 - log_det - log_standard_normal(z)

    def _pixel_parameters(self, z: Tensor) -> Tensor:
        """z -> parameters of the distribution of each pixel, (B, parameters_per_pixel * C, S, S)."""
        size = self.config.image_size
        return upcast(self.decoder(z)).view(len(z), -1, size, size)
