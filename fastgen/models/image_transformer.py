"""A decoder-only Transformer over the pixels of an image, one after another in raster order.

An image's probability is the product of the probabilities of its values, each given those above it and to its left
(van den Oord, Kalchbrenner and Kavukcuoglu, "Pixel recurrent neural networks", 2016; Chen et al., "Generative
pretraining from pixels", 2020). A pixel's colours follow one another. The values are classes without an order:

    start or label, value, value, ... + embeddings of row, column and colour of the value to come
        -> the blocks of the character Transformer -> norm -> logits of the value

Where the data has more levels than ``tones``, neighbouring levels share a tone and are equally probable in it, so that
the loss stays -log p(image) in nats of the levels themselves, which can be compared between models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen._checks import require_positive, require_probability, require_tensor
from fastgen.models._base import Batch, Exhibit, GenerativeModel, Images, Moment, Phase, option
from fastgen.models._classes import LabelOptions, check_labels, wanted_labels
from fastgen.models._decoder import DecoderBlock, Past, drawing, initialise_decoder
from fastgen.models._tokens import choose
from fastgen.models._vae import above_each_other, check_images
from fastgen.nn import RotaryEmbedding

Activation = Literal["gelu", "swiglu"]

MOST_VALUES = 4096
COMPLETED = 16


@dataclass(frozen=True)
class ImageTransformerConfig:
    """Sizes of an ImageTransformer and how it learns. ValueError names the field, what was expected and what came."""

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "colour channels of the images", from_data=True)
    levels: int = option(17, "values a pixel can have: counts 0 .. levels - 1", from_data=True)
    classes: int = option(0, "classes of the images", from_data=True)
    conditional: bool = option(False, "tell the model the class, so that it draws what you ask for")
    tones: int = option(17, "values that it tells apart; of more levels, neighbours share one")
    width: int = option(64, "channels of a token")
    depth: int = option(4, "blocks")
    heads: int = option(4, "heads of attention")
    mlp_width: int = option(0, "units of a block's mlp; 0: 4 times the width, 8/3 for swiglu")
    activation: Activation = option("gelu", "of the mlp")
    normalise_heads: bool = option(True, "RMS-normalise queries and keys")
    dropout: float = option(0.1, "probability of dropping, in attention and after each branch")
    learning_rate: float = option(3e-3, "of AdamW")
    weight_decay: float = option(0.1, "of AdamW, on all weights")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.99, "of AdamW")

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "width", "depth", "heads"):
            require_positive(name, getattr(self, name))
        for name in ("levels", "tones"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise ValueError(f"{name}: expected an integer of at least 2, got {value!r}")
        if self.length > MOST_VALUES:
            size = self.image_size
            raise ValueError(
                f"image_size: expected at most {MOST_VALUES} values in an image,"
                f" got {self.channels} x {size} x {size} = {self.length}"
            )
        if self.conditional and self.classes < 2:
            raise ValueError(f"conditional: expected false, as the data has {self.classes} classes, got true")
        if self.width % self.heads != 0 or self.width // self.heads % 2 != 0:
            raise ValueError(f"width: expected an even multiple of heads = {self.heads}, got {self.width}")
        if isinstance(self.mlp_width, bool) or not isinstance(self.mlp_width, int) or self.mlp_width < 0:
            raise ValueError(f"mlp_width: expected an integer >= 0, got {self.mlp_width!r}")
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation: expected one of {', '.join(get_args(Activation))}, got {self.activation!r}")
        for name in ("dropout", "beta1", "beta2"):
            require_probability(name, getattr(self, name))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")

    @property
    def length(self) -> int:
        """Values of an image."""
        return self.channels * self.image_size**2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden_dim(self) -> int:
        """Units of the mlp. With swiglu, whose first layer has two halves, 8/3 of the width costs as much as 4."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.activation == "gelu" else 8 * math.ceil(self.width / 3)


@dataclass(frozen=True)
class PixelOptions(LabelOptions):
    """What is drawn, and how. ValueError names the field, what was expected and what came."""

    temperature: float = option(1.0, "divides the logits; 0: always the likeliest value")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")


class ImageTransformer(GenerativeModel):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1). Tokens are
    (B, length) int64, 0 .. min(tones, levels) - 1.

    Example:
        >>> model = ImageTransformer(ImageTransformerConfig(image_size=4, width=16, depth=1)).eval()
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape  # the first value, and those after each of five
        torch.Size([2, 6, 17])
        >>> model.draw(3, PixelOptions()).pixels.shape
        torch.Size([3, 1, 4, 4])
    """

    name = "image-transformer"
    summary = "decoder-only Transformer over pixels, one after another"
    kind = "images"
    default_data = "digits"
    config_class, sampling_class = ImageTransformerConfig, PixelOptions
    train_defaults: ClassVar = {
        "steps": 1200,
        "batch_size": 32,
        "schedule": "cosine",
        "warmup": 100,
        "clip": 1.0,
        "average_decay": 0.998,
    }
    blocks = ("DecoderBlock",)
    config: ImageTransformerConfig
    tone_of_level: Tensor
    pixel_of_tone: Tensor
    log_share: Tensor

    def __init__(self, config: ImageTransformerConfig) -> None:
        super().__init__(config)
        tones, width = min(config.tones, config.levels), config.width
        self.embedding = nn.Embedding(tones, width)
        self.start = nn.Embedding(config.classes if config.conditional else 1, width)
        self.row, self.column = nn.Embedding(config.image_size, width), nn.Embedding(config.image_size, width)
        self.colour = nn.Embedding(config.channels, width)
        self.rotary = RotaryEmbedding(config.head_dim)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.logits = nn.Linear(width, tones, bias=False)
        initialise_decoder(self, config)
        counts = torch.arange(config.levels)
        tone = counts * tones // config.levels
        sizes = torch.bincount(tone, minlength=tones)
        pixels = torch.bincount(tone, counts.double(), tones) / sizes / (config.levels - 1)
        self.register_buffer("tone_of_level", tone, persistent=False)
        self.register_buffer("pixel_of_tone", pixels.float(), persistent=False)
        self.register_buffer("log_share", sizes.float().log(), persistent=False)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas = (config.beta1, config.beta2)
        return (Phase("pixels", (), config.learning_rate, betas, config.weight_decay),)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, length): row by row, a pixel's colours one after another.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        check_images(images, self.config)
        counts = (images.float() * (self.config.levels - 1)).round().long().clamp(0, self.config.levels - 1)
        return self.tone_of_level[counts].movedim(1, -1).flatten(1)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Images (B, C, S, S) of tokens (B, length); the mean of the levels that share a tone."""
        size = self.config.image_size
        return self.pixel_of_tone[tokens].view(-1, size, size, self.config.channels).movedim(-1, 1)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, N + 1, tones) of the first value and those after each token.

        Args:
            tokens: (B, N) int64, N below ``length``.
            labels: (B,) int64, of a conditional model; others take no notice.

        Raises:
            TypeError: tokens are no int64 tensor. ValueError: too many of them, or no labels where there should be.
        """
        self._check_tokens(tokens, self.config.length - 1)
        return self._run(self._embedded(tokens, labels), 0)

    def _check_tokens(self, tokens: Tensor, most: int) -> None:
        require_tensor("tokens", tokens)
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens: expected an int64 tensor, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.size(1) > most:
            raise ValueError(f"tokens: expected (B, N) with N at most {most}, got {tuple(tokens.shape)}")

    def _embedded(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        """(B, N + 1, width): start or label, then the tokens."""
        if self.config.conditional and labels is None:
            raise ValueError("labels: expected (B,) int64, as the model is conditional, got None")
        if not self.config.conditional or labels is None:
            labels = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        return torch.cat([self.start(labels).unsqueeze(1), self.embedding(tokens)], dim=1)

    def _run(self, x: Tensor, first: int, past: Past | None = None) -> Tensor:
        """x (B, N, width), what stands before the values ``first``, first + 1, ... -> their logits (B, N, tones)."""
        places = self.row.weight[:, None, None] + self.column.weight[:, None] + self.colour.weight
        here = slice(first, first + x.size(1))
        x = x + places.flatten(0, 2)[here]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = self.rotary.tables(self.config.length, device=x.device, dtype=dtype)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        if past is not None:
            past.open(x.size(1))
        for i, block in enumerate(self.decoder):
            x = block(x, (cos[here], sin[here]), past=past, layer=i)
        logits: Tensor = self.logits(self.norm(x))
        return logits

    def _nll(self, batch: Batch) -> Tensor:
        """-log p of each value given those before it, (B, length), float32 whatever autocast chose."""
        tokens = self.tokens(batch["images"])
        labels = check_labels(batch) if self.config.conditional else None
        logits = self(tokens[:, :-1], labels)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none") + self.log_share[tokens]

    def loss(self, phase: str, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """loss: nats per value."""
        return {"loss": self._nll(batch).mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): -log p(image), of a conditional model -log p(image | label), in nats."""
        return {"nll": self._nll(batch).sum(1)}

    @torch.no_grad()
    def draw(self, n: int, options: PixelOptions, *, generator: torch.Generator | None = None) -> Images:
        """n images; of all classes in turn each fills a column of its own.

        Raises:
            ValueError: n is not a positive integer, or there is no such class.
        """
        require_positive("n", n)
        labels, columns = None, None
        if self.config.conditional:
            labels, columns = wanted_labels(n, options.label, self.config.classes)
            labels = labels.to(self.device)
        elif options.label >= 0:
            raise ValueError(f"label: expected -1, as the model was not told the classes, got {options.label}")
        none = torch.zeros(n, 0, dtype=torch.int64, device=self.device)
        pixels = self.pixels(self.complete(none, labels, options.temperature, generator=generator))
        return Images(pixels, columns, labels)

    def complete(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens (B, length) of images that begin with ``tokens`` (B, N), N from 0 to ``length``.

        Raises: as ``forward``.
        """
        length = self.config.length
        self._check_tokens(tokens, length)
        count = tokens.size(1)
        with drawing(self):
            past = Past(self.config, len(tokens), length, self.embedding.weight)
            x, first = self._embedded(tokens, labels), 0
            for at in range(count, length):
                logits = self._run(x, first, past)[:, -1]
                value = choose(logits, temperature, generator).unsqueeze(1)
                tokens = torch.cat([tokens, value], dim=1)
                x, first = self.embedding(value), at + 1
        return tokens.clone()

    @torch.no_grad()
    def show(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Exhibit]:
        """Completions: a row of held-out images, below it their upper halves, and how the model goes on from there."""
        batch = {name: tensor[:COMPLETED] for name, tensor in batch.items()}
        tokens = self.tokens(batch["images"])
        known = self.config.image_size // 2 * self.config.image_size * self.config.channels
        labels = check_labels(batch) if self.config.conditional else None
        halves = self.pixels(tokens)
        halves[:, :, self.config.image_size // 2 :] = 0.5
        completed = self.pixels(self.complete(tokens[:, :known], labels, generator=generator))
        return {"completions": above_each_other(batch["images"].to(halves), halves, completed)}
