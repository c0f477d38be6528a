"""A decoder-only Transformer over the pixels of an image, one after another in raster order.

An image's probability is the product of the probabilities of its values, each given those above it and to its left
(van den Oord, Kalchbrenner and Kavukcuoglu, "Pixel recurrent neural networks", 2016; Chen et al., "Generative
pretraining from pixels", 2020). A pixel's colours follow one another. The values are classes without an order:

    [caption,] start or label, value, value, ... + embeddings of row, column and colour of the value to come
        -> the blocks of the text Transformer -> norm -> logits of the value

A caption stands in front, character by character; values see all of it (Ramesh et al., "Zero-shot text-to-image
generation", 2021). With a ``codebook_size`` the values are not pixels but the words of an autoencoder with a codebook,
which learns in a phase of its own (van den Oord et al., 2017; see ``vq_vae``). Images are then bounded below by

    log p(image) >= log p(image | its words) + log p(its words)

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

from fastgen.batch import NEVER_IGNORED, SLACK, require_labels, require_tokens
from fastgen.checks import (
    require_choice,
    require_count,
    require_not_negative,
    require_positive,
    require_positive_number,
    require_probability,
)
from fastgen.models._captions import caption_rows, check_captions
from fastgen.models._decoder import DecoderBlock, Past, drawing, initialise_decoder
from fastgen.models.base import Batch, GenerativeModel, Images, Phase, Samples, StepContext, image_rows, option
from fastgen.models.conditioning import LabelOptions, check_labels, wanted_labels
from fastgen.models.decoding import Chooser
from fastgen.models.variational import check_images
from fastgen.models.vq_vae import Autoencoder, AutoencoderConfig
from fastgen.nn import RotaryEmbedding
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._sublayers import all_rows

Activation = Literal["gelu", "swiglu"]

MOST_VALUES = 4096
COMPLETED = 16
AUTOENCODER_RATE = 2e-3


@dataclass(frozen=True)
class ImageTransformerConfig:
    """Sizes of an ImageTransformer and how it learns. ValueError names the field, what was expected and what came."""

    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "colour channels of the images", from_data=True)
    levels: int = option(17, "values a pixel can have: counts 0 .. levels - 1", from_data=True)
    classes: int = option(0, "classes of the images", from_data=True)
    conditional: bool = option(False, "tell the model the class, so that it draws what you ask for")
    caption_vocabulary: str = option("", "the characters of captions; token 1 + i is character i", from_data=True)
    caption_length: int = option(0, "characters of the longest caption; 0: the data has none", from_data=True)
    caption_examples: tuple[str, ...] = option((), "captions that are drawn where none is asked for", from_data=True)
    captions: bool = option(False, "tell the model the caption, so that it draws what you ask for in words")
    codebook_size: int = option(0, "words of a learned codebook, of which images are then made; 0: of pixels")
    halvings: int = option(2, "times the size is halved, to that of the map of words")
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
            require_count(name, getattr(self, name), 2)
        object.__setattr__(self, "caption_examples", tuple(self.caption_examples))
        for name in ("codebook_size", "caption_length"):
            require_count(name, getattr(self, name), 0)
        if self.codebook_size:
            _ = self.autoencoder
        if self.length > MOST_VALUES:
            size = self.grid
            raise ValueError(
                f"image_size: expected at most {MOST_VALUES} values in an image,"
                f" got {self.colours} x {size} x {size} = {self.length}"
            )
        if self.captions and not (self.caption_length and self.caption_vocabulary and self.caption_examples):
            raise ValueError("captions: expected false, as the data has no captions, got true")
        if self.captions and self.conditional:
            raise ValueError("captions: expected false with conditional, got true")
        if self.conditional and self.classes < 2:
            raise ValueError(f"conditional: expected false, as the data has {self.classes} classes, got true")
        if self.width % self.heads != 0 or self.width // self.heads % 2 != 0:
            raise ValueError(f"width: expected an even multiple of heads = {self.heads}, got {self.width}")
        require_count("mlp_width", self.mlp_width, 0)
        require_choice("activation", self.activation, get_args(Activation))
        for name in ("dropout", "beta1", "beta2"):
            require_probability(name, getattr(self, name))
        require_positive_number(learning_rate=self.learning_rate)
        require_not_negative(weight_decay=self.weight_decay)

    @property
    def autoencoder(self) -> AutoencoderConfig:
        """Of the one whose words are the values."""
        return AutoencoderConfig(self.image_size, self.channels, self.levels, self.halvings, self.codebook_size)

    @property
    def grid(self) -> int:
        """Rows and columns of values."""
        return self.image_size >> self.halvings if self.codebook_size else self.image_size

    @property
    def colours(self) -> int:
        """Values in one place."""
        return 1 if self.codebook_size else self.channels

    @property
    def values(self) -> int:
        """Different values."""
        return self.codebook_size or min(self.tones, self.levels)

    @property
    def length(self) -> int:
        """Values of an image."""
        return self.colours * self.grid**2

    @property
    def prefix(self) -> int:
        """Tokens before the start."""
        return self.caption_length if self.captions else 0

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

    caption: str = option("", "what is drawn, in the data's words; empty: captions of the data in turn")
    temperature: float = option(1.0, "divides the logits; 0: always the likeliest value")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(temperature=self.temperature)


class ImageTransformer(ComputedBuffers, GenerativeModel):
    """The model described at the top of this file.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1). Tokens are
    (B, length) int64, 0 .. values - 1. Captions are (B, caption_length) int64, padded with 0 at the end.

    Example:
        >>> model = ImageTransformer(ImageTransformerConfig(image_size=4, width=16, depth=1)).eval()
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape  # the first value, and those after each of five
        torch.Size([2, 6, 17])
        >>> model.draw(3, PixelOptions()).pixels.shape
        torch.Size([3, 1, 4, 4])
    """

    name = "image-transformer"
    summary = "decoder-only Transformer over pixels or a codebook's words, one after another"
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
        tones, width = config.values, config.width
        self.autoencoder = Autoencoder(config.autoencoder) if config.codebook_size else None
        self.embedding = nn.Embedding(tones, width)
        self.start = nn.Embedding(config.classes if config.conditional else 1, width)
        self.caption = nn.Embedding(1 + len(config.caption_vocabulary), width) if config.captions else None
        self.caption_place = nn.Embedding(config.prefix, width) if config.captions else None
        self.row, self.column = nn.Embedding(config.grid, width), nn.Embedding(config.grid, width)
        self.colour = nn.Embedding(config.colours, width)
        self.rotary = RotaryEmbedding(config.head_dim)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.logits = nn.Linear(width, tones, bias=False)
        initialise_decoder(self, config)
        self._register_computed()

    def _computed(self) -> dict[str, Tensor]:
        if self.autoencoder is not None:
            return {}
        tones, levels = self.config.values, self.config.levels
        counts = torch.arange(levels)
        tone = counts * tones // levels
        sizes = torch.zeros(tones, dtype=torch.int64).index_add(0, tone, torch.ones_like(tone))
        sums = torch.zeros(tones, dtype=torch.float64).index_add(0, tone, counts.double())
        pixels = sums / sizes / (levels - 1)
        return {"tone_of_level": tone, "pixel_of_tone": pixels.float(), "log_share": sizes.float().log()}

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas = (config.beta1, config.beta2)
        if self.autoencoder is None:
            return (Phase("pixels", (), config.learning_rate, betas, config.weight_decay),)
        parts = ("autoencoder.encoder", "autoencoder.decoder")
        others = tuple(
            name for name, part in self.named_children() if name != "autoencoder" and list(part.parameters())
        )
        return (
            Phase("autoencoder", parts, AUTOENCODER_RATE, (0.9, 0.99), config.weight_decay),
            Phase("words", others, config.learning_rate, betas, config.weight_decay),
        )

    def tokens(self, images: Tensor) -> Tensor:
        """(B, length): row by row, a pixel's colours one after another; or the words.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        if self.autoencoder is not None:
            return self.autoencoder.encode(images).flatten(1)
        return self._read(images)[0]

    def _read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, and what to add to -log p(images), (B,): 0, inf where pixels are not in [0, 1], NaN for NaN."""
        check_images(images, self.config)
        if self.autoencoder is not None:
            codes, flaw = self.autoencoder.quantize(images)
            return codes.flatten(1), flaw
        exact = (images.float() * (self.config.levels - 1)).round()
        impossible = (images < -SLACK) | (images > 1 + SLACK)
        flaw = torch.where(impossible, math.inf, 0 * exact).flatten(1).sum(1)
        counts = exact.long().clamp(0, self.config.levels - 1)
        return self.tone_of_level[counts].movedim(1, -1).flatten(1), flaw

    def pixels(self, tokens: Tensor) -> Tensor:
        """Images (B, C, S, S) of tokens (B, length), the mean of levels that share a tone, or what words stand for."""
        size = self.config.grid
        if self.autoencoder is not None:
            return self.autoencoder.decode(tokens.view(-1, size, size))
        require_tokens("tokens", tokens, self.config.values)
        return self.pixel_of_tone.gather(0, tokens.flatten()).view(-1, size, size, self.config.channels).movedim(-1, 1)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, captions: Tensor | None = None) -> Tensor:
        """Logits (B, N + 1, values) of the first value and those after each token.

        Args:
            tokens: (B, N) int64, N below ``length``.
            labels: (B,) int64, of a conditional model; others take no notice.
            captions: (B, caption_length) int64, of a model with captions; likewise.

        Raises:
            TypeError: tokens are no int64 tensor. ValueError: too many of them, or no labels or captions where there
                should be.
        """
        self._check_tokens(tokens, self.config.length - 1)
        return self._run(self._embedded(tokens, labels, captions), 0)

    def _check_tokens(self, tokens: Tensor, most: int) -> None:
        require_tokens("tokens", tokens, self.config.values)
        if tokens.dim() != 2 or tokens.size(1) > most:
            raise ValueError(f"tokens: expected (B, N) with N at most {most}, got {tuple(tokens.shape)}")

    def _embedded(self, tokens: Tensor, labels: Tensor | None, captions: Tensor | None) -> Tensor:
        """(B, prefix + 1 + N, width): caption, start or label, then the tokens."""
        if self.config.conditional and labels is None:
            raise ValueError("labels: expected (B,) int64, as the model is conditional, got None")
        if not self.config.conditional or labels is None:
            labels = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        require_labels("labels", labels, len(tokens), self.config.classes if self.config.conditional else 1)
        parts = [self.start(labels).unsqueeze(1), self.embedding(tokens)]
        if self.caption is not None:
            check_captions(captions, len(tokens), self.config.caption_length, 1 + len(self.config.caption_vocabulary))
            parts.insert(0, self.caption(captions))
        return torch.cat(parts, dim=1)

    def _run(self, x: Tensor, first: int, past: Past | None = None) -> Tensor:
        """x (B, N, width), what is embedded from place ``first`` on -> logits of the values that stand after it."""
        config = self.config
        row, column = (all_rows(part, config.grid, x.device) for part in (self.row, self.column))
        colour = all_rows(self.colour, config.colours, x.device)
        places = (row[:, None, None] + column[:, None] + colour).flatten(0, 2)
        if self.caption_place is not None:
            places = torch.cat([all_rows(self.caption_place, config.prefix, x.device), places])
        here = slice(first, first + x.size(1))
        x = x + places[here]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = self.rotary.tables(len(places), device=x.device, dtype=dtype)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        if past is not None:
            past.open(x.size(1))
        rotary = cos[here], sin[here]
        for i, block in enumerate(self.decoder):
            x = block(x, rotary, past=past, layer=i)
        logits: Tensor = self.logits(self.norm(x[:, max(0, self.config.prefix - first) :]))
        return logits

    def _given(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The labels or captions that the model is told."""
        return (
            check_labels(batch, self.config.classes) if self.config.conditional else None,
            batch.get("caption") if self.config.captions else None,
        )

    def _nll(self, tokens: Tensor, batch: Batch) -> Tensor:
        """-log p of each value given those before it, (B, length), float32 whatever autocast chose."""
        logits = self(tokens[:, :-1], *self._given(batch))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none", ignore_index=NEVER_IGNORED)
        return nll if self.autoencoder is not None else nll + self.log_share[tokens]

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """autoencoder: as ``vq_vae``. Else loss: nats per value."""
        if phase == "autoencoder" and self.autoencoder is not None:
            return self.autoencoder.loss(batch["images"])
        tokens, flaw = self._read(batch["images"])
        return {"loss": (self._nll(tokens, batch) + flaw[:, None]).mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): -log p(image), or -log p(image | label or caption), in nats.

        Of words: elbo, nll (of the pixels, given the words) and kl (of the words), in nats; the mean squared error of
        the expected pixels; the codebook's perplexity, which is no item's own.
        """
        if self.autoencoder is None:
            tokens, flaw = self._read(batch["images"])
            return {"nll": self._nll(tokens, batch).sum(1) + flaw}
        codes, nll, error = self.autoencoder.evaluate(batch["images"])
        kl = self._nll(codes.flatten(1), batch).sum(1)
        perplexity = self.autoencoder.codebook.perplexity().expand(len(codes))
        return {"elbo": -(nll + kl), "nll": nll, "kl": kl, "squared error": error, "codebook perplexity": perplexity}

    @torch.no_grad()
    def draw(self, n: int, options: PixelOptions, *, generator: torch.Generator | None = None) -> Images:
        """n images; of all classes, or captions of the data, in turn, each fills a column of its own.

        Raises:
            ValueError: n is not a positive integer, there is no such class, or the caption is too long or has
                characters that the vocabulary lacks.
        """
        require_positive("n", n)
        config = self.config
        labels, columns, captions = None, None, None
        if config.conditional:
            labels, columns = wanted_labels(n, options.label, config.classes)
            labels = labels.to(self.device)
        elif options.label >= 0:
            raise ValueError(f"label: expected -1, as the model was not told the classes, got {options.label}")
        if options.caption and not config.captions:
            raise ValueError(f"caption: expected none, as the model was told none, got {options.caption!r}")
        if config.captions:
            texts = (options.caption,) if options.caption else config.caption_examples
            chosen, columns = wanted_labels(n, 0 if options.caption else -1, len(texts))
            captions = caption_rows(texts, config.caption_vocabulary, config.caption_length)[chosen].to(self.device)
            if not options.caption and len(texts) == config.classes:  # their names
                labels = chosen
        none = torch.zeros(n, 0, dtype=torch.int64, device=self.device)
        pixels = self.pixels(self.complete(none, labels, options.temperature, captions=captions, generator=generator))
        return Images(pixels, columns, labels)

    def complete(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        *,
        captions: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens (B, length) of images that begin with ``tokens`` (B, N), N from 0 to ``length``.

        Raises: as ``forward``.
        """
        length = self.config.length
        self._check_tokens(tokens, length)
        count = tokens.size(1)
        chooser = Chooser(temperature, generator)
        with drawing(self):
            prefix = self.config.prefix
            like = next(self.embedding.parameters(), self.norm.weight)
            past = Past(self.config, len(tokens), prefix + length, like)
            x, first = self._embedded(tokens, labels, captions), 0
            for at in range(count, length):
                logits = self._run(x, first, past)[:, -1]
                value = chooser(logits).unsqueeze(1)
                tokens = torch.cat([tokens, value], dim=1)
                x, first = self.embedding(value), prefix + at + 1
            chooser.check()
        return tokens.clone()

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Completions: a row of held-out images, below it their upper halves, and how the model goes on from there."""
        batch = {name: tensor[:COMPLETED] for name, tensor in batch.items()}
        tokens = self.tokens(batch["images"])
        known = self.config.grid // 2 * self.config.grid * self.config.colours
        labels, captions = self._given(batch)
        halves = self.pixels(tokens)
        halves[:, :, self.config.image_size // 2 :] = 0.5
        completed = self.pixels(self.complete(tokens[:, :known], labels, captions=captions, generator=generator))
        return {"completions": image_rows(batch["images"].to(halves), halves, completed)}
