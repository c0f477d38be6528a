"""An autoencoder whose code is a map of words from a learned codebook; ``vq_vae`` tells how it learns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.batch import readable, require_tokens
from fastgen.checks import require_not_negative, require_positive
from fastgen.models._likelihoods import Likelihood, check_likelihood, numbers_per_pixel, pixels_log_prob, pixels_mean
from fastgen.models._norms import widened
from fastgen.models._residual import ResidualBlock
from fastgen.models.base import option
from fastgen.models.variational import check_images

LEAST_USES = 1e-4  # of a word in a batch, on average, below which it stays where it is


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an Autoencoder and how it learns. ValueError names the field, what was expected and what came."""

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

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "halvings", "codebook_size", "code_dim", "width"):
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
        require_not_negative(commitment=self.commitment)

    @property
    def map_size(self) -> int:
        """Height and width of a map of words."""
        return self.image_size >> self.halvings


class Codebook(nn.Module):
    """Words (K, D), and running averages of how often each was chosen in a batch and of the sum of what chose it."""

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
        """Features (B, D, h, w) -> the nearest words' indices (B, h, w)."""
        words = widened(self.words)
        rows = features.movedim(1, -1).to(words.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            distances = words.square().sum(1) - 2 * rows @ words.T
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
        self.derive()

    def derived(self) -> list[Tensor]:
        return [self.words]

    @torch.no_grad()
    def derive(self) -> None:
        """The words as the running averages have them: means of the features that chose each; unused ones stay."""
        used = self.uses[:, None] > LEAST_USES
        self.words.copy_(torch.where(used, self.sums / self.uses.clamp(min=LEAST_USES)[:, None], self.words))

    def perplexity(self) -> Tensor:
        """How many words are in use: the exponential of the entropy of ``uses``, from 1 to K."""
        share = (self.uses + 1e-10) / (self.uses + 1e-10).sum()
        return (-share * share.log()).sum().exp()


class Autoencoder(nn.Module):
    """Images (B, channels, image_size, image_size), in [0, 1], multiples of 1 / (levels - 1), to and from maps
    of words (B, map_size, map_size) int64, 0 .. codebook_size - 1.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
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

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        """nll + commitment; in training, the codebook's step. Raises TypeError, ValueError: images that do not fit."""
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
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(map of words; nats of the pixels given them (B,); mean squared error of the expected pixels (B,)).

        Where the features are NaN, so that no word is the nearest, nats and error are NaN, too.
        """
        codes, flaw = self.read(images)
        words = self.codebook.look_up(codes)
        error = (self._mean(words) - images).square().flatten(1).mean(1)
        return codes, flaw - self._log_prob(words, images), flaw + error

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The map of words of each image, and (B,) 0, or NaN where its features are NaN or infinite."""
        features = self._features(images)
        return self.codebook.nearest(features), 0 * features.flatten(1).sum(1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The map of words (B, map_size, map_size) of each image.

        Raises:
            ValueError: features that are NaN or infinite, on the CPU, where that can be seen for nothing.
        """
        codes, flaw = self.read(images)
        if readable(flaw) and not bool(flaw.isfinite().all()):
            raise ValueError("images: expected finite features of each, got NaN or infinite ones; are the weights NaN?")
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The expected pixels (B, C, S, S), in [0, 1], of maps of words.

        Raises:
            TypeError: codes are no int64 tensor. ValueError: another shape, or words that are not in the codebook.
        """
        size = self.config.map_size
        require_tokens("codes", codes, self.config.codebook_size, (*codes.shape[:1], size, size), "(B, h, w)")
        if codes.device.type != "cpu" and codes.numel():
            require_tokens("codes", torch.stack(codes.aminmax()).cpu(), self.config.codebook_size)
        return self._mean(self.codebook.look_up(codes))

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
