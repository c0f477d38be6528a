"""An autoencoder whose code is a small map of words from a learned codebook, and a prior over such maps.

van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning" (2017):

    images -> encoder -> features (B, code_dim, h, w) -> the nearest word of each place -> decoder -> p(pixel | words)

Gradients pass the choice of a word as if it were not there; features are drawn to the words that were chosen for them
(commitment), words to the mean of the features that chose them, by running averages. A word that is hardly ever chosen
moves to a feature of the batch. Then, as a phase of its own, a recurrent net learns which maps of words there are, in
raster order, so that new ones can be drawn:

    p(words) = product of p(word | words before it)

As an encoder that is sure of its words is a posterior too, log p(images | words) + log p(words) is a lower bound on
log p(images), in nats, like that of any variational autoencoder.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen._checks import require_positive, require_shape, require_tensor
from fastgen.models._base import Batch, Exhibit, GenerativeModel, Images, Moment, Phase, option
from fastgen.models._likelihoods import Likelihood, check_likelihood, numbers_per_pixel, pixels_log_prob, pixels_mean
from fastgen.models._residual import ResidualBlock
from fastgen.models._tokens import choose
from fastgen.models._vae import above_each_other, check_images
from fastgen.nn import GRU


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a VQVAE and how it learns. ValueError names the field, what was expected and what came."""

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "colour channels of the images", from_data=True)
    levels: int = option(17, "values a pixel can have: counts 0 .. levels - 1", from_data=True)
    halvings: int = option(2, "times the size is halved, to that of the map of words")
    codebook_size: int = option(64, "words")
    code_dim: int = option(16, "numbers in a word")
    width: int = option(16, "channels at full size; doubled at each halving")
    likelihood: Likelihood = option("beta-binomial", "distribution of a pixel; bernoulli is for images of two levels")
    commitment: float = option(1.0, "weight of the squared distance from features to their words, summed over an image")
    codebook_decay: float = option(0.99, "of the running averages that words follow")
    revive_below: float = option(
        0.1, "share of an even use below which a word moves to a feature of the batch; 0: never"
    )
    prior_width: int = option(128, "units of the prior")
    learning_rate: float = option(2e-3, "of the autoencoder's AdamW")
    prior_learning_rate: float = option(2e-3, "of the prior's AdamW")
    weight_decay: float = option(0.1, "of AdamW")

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "halvings", "codebook_size", "code_dim", "width", "prior_width"):
            require_positive(name, getattr(self, name))
        if self.image_size % 2**self.halvings:
            raise ValueError(
                f"image_size: expected a multiple of {2**self.halvings}, as halvings = {self.halvings},"
                f" got {self.image_size}"
            )
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size: expected at least 2, got {self.codebook_size}")
        check_likelihood(self.likelihood, self.levels)
        for name in ("codebook_decay", "revive_below"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        for name in ("commitment", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        for name in ("learning_rate", "prior_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    @property
    def map_size(self) -> int:
        """Height and width of a map of words."""
        return self.image_size >> self.halvings


@dataclass(frozen=True)
class CodeOptions:
    """How maps of words are drawn. ValueError names the field, what was expected and what came."""

    temperature: float = option(1.0, "divides the prior's logits; 0: always the likeliest word")

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")


class Codebook(nn.Module):
    """Words (K, D), and running averages of how often each was chosen in a batch and of the sum of what chose it."""

    words: Tensor
    uses: Tensor
    sums: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.decay, self.revive_below = config.codebook_decay, config.revive_below
        self.register_buffer("words", torch.randn(config.codebook_size, config.code_dim))
        self.register_buffer("uses", torch.zeros(config.codebook_size))
        self.register_buffer("sums", torch.zeros(config.codebook_size, config.code_dim))

    def nearest(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) -> the nearest words' indices (B, h, w)."""
        rows = features.movedim(1, -1).to(self.words.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            distances = self.words.square().sum(1) - 2 * rows @ self.words.T
        return distances.argmin(-1)

    def look_up(self, codes: Tensor) -> Tensor:
        """Indices (B, h, w) -> words (B, D, h, w)."""
        return F.embedding(codes, self.words).movedim(-1, 1)

    @torch.no_grad()
    def follow(self, features: Tensor, codes: Tensor) -> None:
        """A step of the running averages, after which words that are hardly used move. Noise: torch's global one."""
        rows = features.movedim(1, -1).flatten(0, -2).to(self.words.dtype)
        chosen = F.one_hot(codes.flatten(), len(self.words)).to(rows.dtype)
        self.uses.lerp_(chosen.sum(0), 1 - self.decay)
        with torch.autocast(rows.device.type, enabled=False):
            self.sums.lerp_(chosen.T @ rows, 1 - self.decay)
        if self.revive_below:
            even = len(rows) / len(self.words)
            dead = self.uses < self.revive_below * even
            others = rows[torch.randint(len(rows), (len(self.words),), device=rows.device)]
            self.uses.copy_(torch.where(dead, even, self.uses))
            self.sums.copy_(torch.where(dead[:, None], even * others, self.sums))
        used = self.uses[:, None] > 1e-4
        self.words.copy_(torch.where(used, self.sums / self.uses.clamp(min=1e-4)[:, None], self.words))

    def perplexity(self) -> Tensor:
        """How many words are in use: the exponential of the entropy of ``uses``, from 1 to K."""
        share = (self.uses + 1e-10) / (self.uses + 1e-10).sum()
        return (-share * share.log()).sum().exp()


class Prior(nn.Module):
    """p(word | words before it), by a GRU that reads a map in raster order and knows where it is."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.start, self.length = config.codebook_size, config.map_size**2
        self.embedding = nn.Embedding(config.codebook_size + 1, config.prior_width)
        self.position = nn.Embedding(self.length, config.prior_width)
        self.recurrent = GRU(config.prior_width, config.prior_width, batch_first=True)
        self.logits = nn.Linear(config.prior_width, config.codebook_size)

    def forward(self, codes: Tensor) -> Tensor:
        """-log p(codes), (B,) in nats, of codes (B, length)."""
        before = F.pad(codes[:, :-1], (1, 0), value=self.start)
        states, _ = self.recurrent(self.embedding(before) + self.position.weight)
        logits = self.logits(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.movedim(-1, 1), codes, reduction="none").sum(1)

    def draw(self, n: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """Codes (n, length)."""
        code = torch.full((n,), self.start, device=self.position.weight.device)
        state, drawn = None, []
        for place in self.position.weight:
            output, state = self.recurrent((self.embedding(code) + place).unsqueeze(1), state)
            code = choose(self.logits(output[:, 0]), temperature, generator)
            drawn.append(code)
        return torch.stack(drawn, dim=1)


class VQVAE(GenerativeModel):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1). Maps of words
    are (B, map_size, map_size) int64, 0 .. codebook_size - 1; ``encode`` and ``decode`` turn one into the other.

    Example:
        >>> model = VQVAE(VQVAEConfig(image_size=8, halvings=1))
        >>> codes = model.encode(torch.zeros(5, 1, 8, 8))
        >>> codes.shape, model.decode(codes).shape
        (torch.Size([5, 4, 4]), torch.Size([5, 1, 8, 8]))
        >>> model.draw(3, CodeOptions()).pixels.shape
        torch.Size([3, 1, 8, 8])
    """

    name = "vq-vae"
    summary = "autoencoder with a codebook, and a prior over its words"
    kind = "images"
    default_data = "digits"
    config_class, sampling_class = VQVAEConfig, CodeOptions
    train_defaults: ClassVar = {"epochs": 50.0, "batch_size": 64, "schedule": "cosine", "average_decay": 0.99}
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        widths = [config.width << i for i in range(config.halvings + 1)]
        encoder: list[nn.Module] = [nn.Conv2d(config.channels, widths[0], 3, padding=1), ResidualBlock(widths[0])]
        for fine, wide in itertools.pairwise(widths):
            encoder += [nn.Conv2d(fine, wide, 4, stride=2, padding=1), ResidualBlock(wide)]
        self.encoder = nn.Sequential(*encoder, nn.SiLU(), nn.Conv2d(widths[-1], config.code_dim, 1))
        self.codebook = Codebook(config)
        decoder: list[nn.Module] = [nn.Conv2d(config.code_dim, widths[-1], 3, padding=1), ResidualBlock(widths[-1])]
        for wide, fine in itertools.pairwise(reversed(widths)):
            decoder += [nn.Conv2d(wide, 4 * fine, 3, padding=1), nn.PixelShuffle(2), ResidualBlock(fine)]
        outputs = numbers_per_pixel(config.likelihood) * config.channels
        self.decoder = nn.Sequential(*decoder, nn.SiLU(), nn.Conv2d(widths[0], outputs, 3, padding=1))
        self.prior = Prior(config)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        return (
            Phase("autoencoder", ("encoder", "decoder"), config.learning_rate, (0.9, 0.99), config.weight_decay),
            Phase("prior", ("prior",), config.prior_learning_rate, (0.9, 0.99), config.weight_decay),
        )

    def loss(self, phase: str, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """autoencoder: nll + commitment, and the codebook's step in training. prior: nats of a map of words.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        images = batch["images"]
        if phase == "prior":
            with torch.no_grad():
                codes = self.encode(images)
            return {"loss": self.prior(codes.flatten(1)).mean()}
        features = self._features(images)
        codes = self.codebook.nearest(features)
        words = self.codebook.look_up(codes)
        distance = (features - words).square().flatten(1).sum(1).mean()
        # The words in front, the features' gradient behind.
        nll = -self._log_prob(features + (words - features).detach(), images).mean()
        if self.training:
            self.codebook.follow(features, codes)
        perplexity = self.codebook.perplexity()
        loss = nll + self.config.commitment * distance
        return {"loss": loss, "nll": nll.detach(), "distance": distance.detach(), "perplexity": perplexity}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """elbo, nll (of the pixels, given the words) and kl (of the words) (B,) in nats; the mean squared error of the
        expected pixels; the codebook's perplexity, which is no item's own.
        """
        images = batch["images"]
        codes = self.encode(images)
        words = self.codebook.look_up(codes)
        nll, kl = -self._log_prob(words, images), self.prior(codes.flatten(1))
        error = (self._mean(words) - images).square().flatten(1).mean(1)
        perplexity = self.codebook.perplexity().expand(len(images))
        return {"elbo": -(nll + kl), "nll": nll, "kl": kl, "squared error": error, "codebook perplexity": perplexity}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The map of words (B, map_size, map_size) of each image."""
        return self.codebook.nearest(self._features(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The expected pixels (B, C, S, S), in [0, 1], of maps of words.

        Raises:
            TypeError: codes are no int64 tensor. ValueError: another shape, or words that are not in the codebook.
        """
        require_tensor("codes", codes)
        if codes.dtype != torch.int64:
            raise TypeError(f"codes: expected an int64 tensor, got {codes.dtype}")
        size, count = self.config.map_size, self.config.codebook_size
        require_shape("codes", codes, (*codes.shape[:1], size, size), "(B, h, w)")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < count:
            raise ValueError(f"codes: expected 0 to {count - 1}, got {int(codes.min())} to {int(codes.max())}")
        return self._mean(self.codebook.look_up(codes))

    @torch.no_grad()
    def draw(self, n: int, options: CodeOptions, *, generator: torch.Generator | None = None) -> Images:
        """The expected pixels of n maps of words from the prior.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        with torch.compiler.set_stance("force_eager"):  # word by word: another shape than in training
            codes = self.prior.draw(n, options.temperature, generator)
        return Images(self.decode(codes.view(n, self.config.map_size, -1)))

    def show(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Exhibit]:
        """Rows of held-out images, each above the row of its reconstructions."""
        return {"reconstructions": above_each_other(batch["images"], self.decode(self.encode(batch["images"])))}

    def _features(self, images: Tensor) -> Tensor:
        """(B, code_dim, h, w), float32 at least whatever autocast chose."""
        check_images(images, self.config)
        features: Tensor = self.encoder(2 * images - 1)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def _distribution(self, words: Tensor) -> Tensor:
        parameters: Tensor = self.decoder(words)
        return parameters.to(torch.promote_types(parameters.dtype, torch.float32))

    def _log_prob(self, words: Tensor, images: Tensor) -> Tensor:
        return pixels_log_prob(self._distribution(words), images, self.config.likelihood, self.config.levels)

    def _mean(self, words: Tensor) -> Tensor:
        return pixels_mean(self._distribution(words), self.config.likelihood)
