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

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.batch import NEVER_IGNORED
from fastgen.checks import require_not_negative, require_positive, require_positive_number, require_probability
from fastgen.models._vq import Autoencoder, AutoencoderConfig
from fastgen.models.base import Batch, GenerativeModel, Images, Phase, Samples, StepContext, option
from fastgen.models.decoding import Chooser
from fastgen.models.variational import above_each_other
from fastgen.nn import GRU
from fastgen.nn._sublayers import embedding_table


@dataclass(frozen=True)
class VQVAEConfig(AutoencoderConfig):
    """Sizes of a VQVAE and how it learns. ValueError names the field, what was expected and what came."""

    prior_width: int = option(128, "units of the prior")
    prior_dropout: float = option(0.5, "of the prior: probability of dropping a number of a word, or of its state")
    learning_rate: float = option(2e-3, "of the autoencoder's AdamW")
    prior_learning_rate: float = option(2e-3, "of the prior's AdamW")
    weight_decay: float = option(0.1, "of AdamW")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("prior_width", self.prior_width)
        require_probability("prior_dropout", self.prior_dropout)
        require_not_negative(weight_decay=self.weight_decay)
        require_positive_number(learning_rate=self.learning_rate, prior_learning_rate=self.prior_learning_rate)


@dataclass(frozen=True)
class CodeOptions:
    """How maps of words are drawn. ValueError names the field, what was expected and what came."""

    temperature: float = option(1.0, "divides the prior's logits; 0: always the likeliest word")

    def __post_init__(self) -> None:
        require_not_negative(temperature=self.temperature)


class Prior(nn.Module):
    """p(word | words before it), by a GRU that reads a map in raster order and knows where it is."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.start, self.length, self.dropout = config.codebook_size, config.map_size**2, config.prior_dropout
        self.embedding = nn.Embedding(config.codebook_size + 1, config.prior_width)
        self.position = nn.Embedding(self.length, config.prior_width)
        self.recurrent = GRU(config.prior_width, config.prior_width, batch_first=True)
        self.logits = nn.Linear(config.prior_width, config.codebook_size)

    def forward(self, codes: Tensor) -> Tensor:
        """-log p(codes), (B,) in nats, of codes (B, length)."""
        before = F.pad(codes[:, :-1], (1, 0), value=self.start)
        place = embedding_table(self.position, self.length, codes.device)
        states, _ = self.recurrent(self._dropped(self.embedding(before) + place))
        logits = self.logits(self._dropped(states))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.movedim(-1, 1), codes, reduction="none", ignore_index=NEVER_IGNORED).sum(1)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def draw(self, n: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """Codes (n, length)."""
        places = embedding_table(self.position, self.length, next(self.parameters()).device)
        code = torch.full((n,), self.start, device=places.device)
        state, drawn = None, []
        chooser = Chooser(temperature, generator)
        for place in places:
            output, state = self.recurrent((self.embedding(code) + place).unsqueeze(1), state)
            code = chooser(self.logits(output[:, 0]))
            drawn.append(code)
        chooser.check()
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
        self.autoencoder = Autoencoder(config)
        self.prior = Prior(config)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        return (
            Phase(
                "autoencoder",
                ("autoencoder.encoder", "autoencoder.decoder"),
                config.learning_rate,
                (0.9, 0.99),
                config.weight_decay,
            ),
            Phase("prior", ("prior",), config.prior_learning_rate, (0.9, 0.99), config.weight_decay),
        )

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """autoencoder: nll + commitment, and the codebook's step in training. prior: nats of a map of words.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        images = batch["images"]
        if phase == "prior":
            codes, flaw = self.autoencoder.read(images)
            return {"loss": (self.prior(codes.flatten(1)) + flaw).mean()}
        return self.autoencoder.loss(images)

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """elbo, nll (of the pixels, given the words) and kl (of the words) (B,) in nats; the mean squared error of the
        expected pixels; the codebook's perplexity, which is no item's own.
        """
        codes, nll, error = self.autoencoder.judge(batch["images"])
        kl = self.prior(codes.flatten(1))
        perplexity = self.autoencoder.codebook.perplexity().expand(len(codes))
        return {"elbo": -(nll + kl), "nll": nll, "kl": kl, "squared error": error, "codebook perplexity": perplexity}

    def encode(self, images: Tensor) -> Tensor:
        """The map of words (B, map_size, map_size) of each image."""
        return self.autoencoder.encode(images)

    def decode(self, codes: Tensor) -> Tensor:
        """The expected pixels (B, C, S, S), in [0, 1], of maps of words.

        Raises:
            TypeError: codes are no int64 tensor. ValueError: another shape, or words that are not in the codebook.
        """
        return self.autoencoder.decode(codes)

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

    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of held-out images, each above the row of its reconstructions."""
        return {"reconstructions": above_each_other(batch["images"], self.decode(self.encode(batch["images"])))}
