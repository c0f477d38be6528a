"""VQ-VAE: an autoencoder with a discrete code, and an autoregressive prior over the codes.

van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning" (2017):

    images -> encoder -> features (B, code_dim, h, w) -> nearest codebook entries -> decoder -> p(pixel | codes)

Gradients pass the quantization by the straight-through estimator. The commitment loss pulls features to their codebook
entries; the entries follow running averages of the features assigned to them, and entries that are hardly used are
reset to features of the batch. In a second phase a GRU learns the prior of the maps of codes, in raster order:

    p(codes) = product of p(code | previous codes)

The posterior is deterministic, so log p(images | codes) + log p(codes) is a lower bound of log p(images), in nats, as
the ELBO of any variational autoencoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.batch import NEVER_IGNORED, can_read_values, require_tokens
from fastgen.checks import require_not_negative, require_positive, require_positive_number, require_probability
from fastgen.functional._autocast import without_autocast
from fastgen.models.base import Batch, GenerativeModel, Images, Phase, Samples, StepContext, image_rows, option, upcast
from fastgen.models.conv_vae import ResidualBlock, downsampling, upsampling
from fastgen.models.decoding import Chooser
from fastgen.models.registry import register_model
from fastgen.models.sizes import Size
from fastgen.models.variational import (
    Bound,
    Likelihood,
    check_images,
    check_likelihood,
    parameters_per_pixel,
    pixels_log_prob,
    pixels_mean,
)
from fastgen.nn import GRU
from fastgen.nn._sublayers import embedding_table

MIN_USES = 1e-4  # average number of uses in a batch below which a codebook entry keeps its value


@dataclass(frozen=True)
class AutoencoderConfig:
    """Hyperparameters of an Autoencoder.

    Raises:
        ValueError: a field is out of range.
    """

    renamed: ClassVar[Mapping[str, str]] = {"halvings": "num_downsamples"}  # word-lint: ok

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of color channels of the images", from_data=True)
    levels: int = option(17, "number of values of a pixel: counts 0 .. levels - 1", from_data=True)
    num_downsamples: int = option(2, "number of downsamplings by 2, from the images to the map of codes")
    codebook_size: int = option(64, "number of codebook entries")
    code_dim: int = option(16, "dimension of the codebook entries")
    width: int = option(16, "channels at full resolution; doubled at each downsampling")
    likelihood: Likelihood = option("beta-binomial", "distribution of a pixel; bernoulli requires two levels")
    commitment: float = option(1.0, "weight of the commitment loss, the squared distance of features to their entries")
    codebook_decay: float = option(0.99, "decay of the running averages of the codebook")
    revive_below: float = option(
        0.1, "fraction of the average use below which a codebook entry is reset to a feature of the batch; 0: never"
    )

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "num_downsamples", "codebook_size", "code_dim", "width"):
            require_positive(name, getattr(self, name))
        if self.image_size % 2**self.num_downsamples:
            raise ValueError(
                f"image_size: expected a multiple of {2**self.num_downsamples}, as num_downsamples ="
                f" {self.num_downsamples}, got {self.image_size}"
            )
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size: expected at least 2, got {self.codebook_size}")
        check_likelihood(self.likelihood, self.levels)
        for name in ("codebook_decay", "revive_below"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        require_not_negative(commitment=self.commitment)

    @property
    def map_size(self) -> int:
        """Height and width of a map of codes."""
        return self.image_size >> self.num_downsamples


@dataclass(frozen=True)
class VQVAEConfig(AutoencoderConfig):
    """Hyperparameters of a VQVAE: of its autoencoder, its prior and their training.

    Raises:
        ValueError: a field is out of range.
    """

    prior_width: int = option(128, "units of the prior's GRU")
    prior_dropout: float = option(0.5, "dropout probability of the prior's inputs and states")
    learning_rate: float = option(2e-3, "AdamW learning rate of the autoencoder")
    prior_learning_rate: float = option(2e-3, "AdamW learning rate of the prior")
    weight_decay: float = option(0.1, "AdamW weight decay")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("prior_width", self.prior_width)
        require_probability("prior_dropout", self.prior_dropout)
        require_not_negative(weight_decay=self.weight_decay)
        require_positive_number(learning_rate=self.learning_rate, prior_learning_rate=self.prior_learning_rate)


@dataclass(frozen=True)
class CodeOptions:
    """Sampling options of a VQVAE.

    Raises:
        ValueError: temperature is negative.
    """

    temperature: float = option(1.0, "divisor of the prior's logits; 0: always the most probable code")

    def __post_init__(self) -> None:
        require_not_negative(temperature=self.temperature)


class Codebook(nn.Module):
    """K codebook entries of dimension D, updated by running averages instead of gradients.

    ``uses`` (K,) and ``sums`` (K, D) are the running averages of the number of features in a batch that were assigned
    to each entry and of their sum. The entries (K, D) are the buffer ``words``, as saved models name them.
    """

    words: Tensor
    uses: Tensor
    sums: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.decay, self.revive_below = config.codebook_decay, config.revive_below
        self.register_buffer("words", torch.randn(config.codebook_size, config.code_dim))
        self.register_buffer("uses", torch.zeros(config.codebook_size))
        self.register_buffer("sums", torch.zeros(config.codebook_size, config.code_dim))

    def nearest(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) -> codes (B, h, w): the indices of the nearest entries."""
        entries = upcast(self.words)
        rows = features.movedim(1, -1).to(entries.dtype)
        with without_autocast(rows.device):
            distances = entries.square().sum(1) - 2 * rows @ entries.T
        return distances.argmin(-1)

    def look_up(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> their entries (B, D, h, w)."""
        return F.embedding(codes, self.words).movedim(-1, 1)

    @torch.no_grad()
    def update(self, features: Tensor, codes: Tensor) -> None:
        """One step of the running averages; then entries that are hardly used are reset to random features.

        The random choice uses torch's global generator.
        """
        rows = features.movedim(1, -1).flatten(0, -2).to(self.words.dtype)
        assigned = F.one_hot(codes.flatten(), len(self.words)).to(rows.dtype)
        self.uses.lerp_(assigned.sum(0), 1 - self.decay)
        with without_autocast(rows.device):
            self.sums.lerp_(assigned.T @ rows, 1 - self.decay)
        if self.revive_below:
            average_use = len(rows) / len(self.words)
            unused = self.uses < self.revive_below * average_use
            replacements = rows[torch.randint(len(rows), (len(self.words),), device=rows.device)]
            self.uses.copy_(torch.where(unused, average_use, self.uses))
            self.sums.copy_(torch.where(unused[:, None], average_use * replacements, self.sums))
        self.derive()

    def derived(self) -> list[Tensor]:
        """The buffers that ``derive`` computes (see ``fastgen.nn.averaging``)."""
        return [self.words]

    @torch.no_grad()
    def derive(self) -> None:
        """Compute the entries from the running averages: means of assigned features; unused entries stay."""
        used = self.uses[:, None] > MIN_USES
        self.words.copy_(torch.where(used, self.sums / self.uses.clamp(min=MIN_USES)[:, None], self.words))

    def perplexity(self) -> Tensor:
        """Effective number of entries in use: the exponential of the entropy of ``uses``, from 1 to K."""
        share = (self.uses + 1e-10) / (self.uses + 1e-10).sum()
        return (-share * share.log()).sum().exp()


class Autoencoder(nn.Module):
    """Convolutional autoencoder between images and maps of codes.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1); codes are
    (B, map_size, map_size) int64, 0 .. codebook_size - 1.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width << i for i in range(config.num_downsamples + 1)]
        self.encoder = nn.Sequential(
            nn.Conv2d(config.channels, widths[0], 3, padding=1),
            ResidualBlock(widths[0]),
            *downsampling(widths),
            nn.SiLU(),
            nn.Conv2d(widths[-1], config.code_dim, 1),
        )
        self.codebook = Codebook(config)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_dim, widths[-1], 3, padding=1),
            ResidualBlock(widths[-1]),
            *upsampling(widths[::-1]),
            nn.SiLU(),
            nn.Conv2d(widths[0], parameters_per_pixel(config.likelihood) * config.channels, 3, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> codes (B, h, w), nll (B,) in nats, and the squared distance of features to their entries (B,).

        The nll has gradients for the encoder (straight-through estimator) and the decoder. In training mode the
        codebook is updated.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        features = self._features(images)
        codes = self.codebook.nearest(features)
        entries = self.codebook.look_up(codes)
        distance = (features - entries).square().flatten(1).sum(1)
        straight_through = features + (entries - features).detach()  # the value of entries, the gradient of features
        nll = -self._log_prob(straight_through, images)
        if self.training:
            self.codebook.update(features, codes)
        return codes, nll, distance

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        """ "loss": mean nll + commitment * mean distance, see ``forward``; "nll", "distance", "perplexity"."""
        _, nll, distance = self(images)
        nll, distance = nll.mean(), distance.mean()
        perplexity = self.codebook.perplexity()
        loss = nll + self.config.commitment * distance
        return {"loss": loss, "nll": nll.detach(), "distance": distance.detach(), "perplexity": perplexity}

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> codes (B, h, w), nll given the codes (B,) in nats, mean squared error of the expected pixels (B,).

        Where the features are NaN, so that no entry is the nearest, nll and error are NaN, too.
        """
        codes, invalid = self.quantize(images)
        entries = self.codebook.look_up(codes)
        error = (self._mean(entries) - images).square().flatten(1).mean(1)
        return codes, invalid - self._log_prob(entries, images), invalid + error

    @torch.no_grad()
    def quantize(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> codes (B, h, w), and (B,) 0, or NaN where the features are NaN or infinite."""
        features = self._features(images)
        return self.codebook.nearest(features), 0 * features.flatten(1).sum(1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) -> codes (B, map_size, map_size).

        Raises:
            ValueError: the features are NaN or infinite; checked on the CPU only, where it costs no synchronization.
        """
        codes, invalid = self.quantize(images)
        if can_read_values(invalid) and not bool(invalid.isfinite().all()):
            raise ValueError("images: expected finite features of each, got NaN or infinite ones; are the weights NaN?")
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, map_size, map_size) -> expected pixels (B, C, S, S) in [0, 1].

        Raises:
            TypeError: codes are not int64. ValueError: another shape, or codes that are not in the codebook.
        """
        size = self.config.map_size
        require_tokens("codes", codes, self.config.codebook_size, (*codes.shape[:1], size, size), "(B, h, w)")
        if codes.device.type != "cpu" and codes.numel():
            require_tokens("codes", torch.stack(codes.aminmax()).cpu(), self.config.codebook_size)
        return self._mean(self.codebook.look_up(codes))

    def _features(self, images: Tensor) -> Tensor:
        """(B, code_dim, h, w), float32 at least."""
        check_images(images, self.config)
        return upcast(self.encoder(2 * images - 1))

    def _log_prob(self, entries: Tensor, images: Tensor) -> Tensor:
        return pixels_log_prob(upcast(self.decoder(entries)), images, self.config.likelihood, self.config.levels)

    def _mean(self, entries: Tensor) -> Tensor:
        return pixels_mean(upcast(self.decoder(entries)), self.config.likelihood)


class Prior(nn.Module):
    """p(code | previous codes): a GRU over the codes of a map in raster order, with position embeddings."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.start, self.length, self.dropout = config.codebook_size, config.map_size**2, config.prior_dropout
        self.embedding = nn.Embedding(config.codebook_size + 1, config.prior_width)
        self.position = nn.Embedding(self.length, config.prior_width)
        self.recurrent = GRU(config.prior_width, config.prior_width, batch_first=True)
        self.logits = nn.Linear(config.prior_width, config.codebook_size)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (B, length) -> -log p(codes), (B,) in nats."""
        previous = F.pad(codes[:, :-1], (1, 0), value=self.start)
        position = embedding_table(self.position, self.length, codes.device)
        states, _ = self.recurrent(self._dropout(self.embedding(previous) + position))
        logits = upcast(self.logits(self._dropout(states)))
        return F.cross_entropy(logits.movedim(-1, 1), codes, reduction="none", ignore_index=NEVER_IGNORED).sum(1)

    def sample(self, n: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """Codes (n, length)."""
        positions = embedding_table(self.position, self.length, next(self.parameters()).device)
        code = torch.full((n,), self.start, device=positions.device)
        state, codes = None, []
        chooser = Chooser(temperature, generator)
        for position in positions:
            output, state = self.recurrent((self.embedding(code) + position).unsqueeze(1), state)
            code = chooser(self.logits(output[:, 0]))
            codes.append(code)
        chooser.check()
        return torch.stack(codes, dim=1)

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


@register_model
class VQVAE(GenerativeModel):
    """Autoencoder with a discrete code and a recurrent prior over the codes.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1); codes are
    (B, map_size, map_size) int64, 0 .. codebook_size - 1.

    Example:
        >>> model = VQVAE(VQVAEConfig(image_size=8, num_downsamples=1))
        >>> codes = model.encode(torch.zeros(5, 1, 8, 8))
        >>> codes.shape, model.decode(codes).shape
        (torch.Size([5, 4, 4]), torch.Size([5, 1, 8, 8]))
        >>> model.draw(3, CodeOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "vq-vae"
    summary = "autoencoder with a codebook, and an autoregressive prior over its codes"
    kind = "images"
    default_data = "digits"
    config_class, sampling_class = VQVAEConfig, CodeOptions
    channels_last = True
    train_defaults: ClassVar = {"steps": 1123, "batch_size": 64, "schedule": "cosine", "average_decay": 0.99}
    sizes: ClassVar = {
        "medium": Size(3_500, passes=200, model={"width": 8, "codebook_size": 128}),
        "large": Size(1_500, 32, passes=200, model={"width": 8, "num_downsamples": 3, "codebook_size": 256}),
        "medium, gpu": Size(20_000, 128, passes=200, model={"width": 32, "codebook_size": 256, "prior_width": 512}),
        "large, gpu": Size(
            30_000, 128, passes=200, model={"width": 32, "num_downsamples": 3, "codebook_size": 512, "prior_width": 512}
        ),
    }
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.autoencoder = Autoencoder(config)
        self.prior = Prior(config)

    def forward(self, images: Tensor) -> Bound:
        """The loss of both phases: nll + commitment * distance + kl, where kl is -log p(codes).

        In training mode the codebook is updated.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        codes, nll, distance = self.autoencoder(images)
        kl = self.prior(codes.flatten(1))
        return Bound(nll.mean() + self.config.commitment * distance.mean() + kl.mean(), nll, kl)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        networks, betas = ("autoencoder.encoder", "autoencoder.decoder"), (0.9, 0.99)
        return (
            Phase("autoencoder", networks, config.learning_rate, betas, config.weight_decay),
            Phase("prior", ("prior",), config.prior_learning_rate, betas, config.weight_decay),
        )

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """autoencoder: nll + commitment * distance; the codebook is updated in training. prior: -log p(codes)."""
        images = batch["images"]
        if phase == "prior":
            codes, invalid = self.autoencoder.quantize(images)
            return {"loss": (self.prior(codes.flatten(1)) + invalid).mean()}
        return self.autoencoder.loss(images)

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """(B,): elbo, nll (pixels given the codes) and kl (codes) in nats; the mean squared error of the expected
        pixels; the perplexity of the codebook, the same for all items.
        """
        codes, nll, error = self.autoencoder.evaluate(batch["images"])
        kl = self.prior(codes.flatten(1))
        perplexity = self.autoencoder.codebook.perplexity().expand(len(codes))
        return {"elbo": -(nll + kl), "nll": nll, "kl": kl, "squared error": error, "codebook perplexity": perplexity}

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) -> codes (B, map_size, map_size)."""
        return self.autoencoder.encode(images)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, map_size, map_size) -> expected pixels (B, C, S, S) in [0, 1].

        Raises:
            TypeError: codes are not int64. ValueError: another shape, or codes that are not in the codebook.
        """
        return self.autoencoder.decode(codes)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) -> ``decode(encode(images))`` (B, C, S, S)."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def elbo(self, images: Tensor, *, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """A lower bound of log p(images): log p(images | codes) + log p(codes), (B,) in nats.

        Args:
            images: (B, C, S, S) in [0, 1].
            samples, generator: for the signature of other autoencoders; the posterior is deterministic.

        Raises:
            TypeError, ValueError: images of another dtype or shape; samples is not a positive integer.
        """
        require_positive("samples", samples)
        codes, nll, _ = self.autoencoder.evaluate(images)
        kl: Tensor = self.prior(codes.flatten(1))
        return -(nll + kl)

    @torch.no_grad()
    def draw(self, n: int, options: CodeOptions, *, generator: torch.Generator | None = None) -> Images:
        """The expected pixels of n maps of codes from the prior.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        with torch.compiler.set_stance("force_eager"):  # one code at a time: another shape than in training
            codes = self.prior.sample(n, options.temperature, generator)
        return Images(self.decode(codes.view(n, self.config.map_size, -1)))

    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of held-out images, each above the row of its reconstructions."""
        return {"reconstructions": image_rows(batch["images"], self.reconstruct(batch["images"]))}
