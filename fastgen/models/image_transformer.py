"""A decoder-only Transformer over the pixels of an image in raster order, or over codes of a VQ autoencoder.

The probability of an image is the product of the probabilities of its values, each given those above it and to its left
(van den Oord, Kalchbrenner and Kavukcuoglu, "Pixel recurrent neural networks", 2016; Chen et al., "Generative
pretraining from pixels", 2020). The channels of a pixel follow one another. The values are unordered classes:

    [caption,] start or label, value, value, ... + embeddings of row, column and channel of the next value
        -> the blocks of ``transformer_lm`` -> norm -> logits of the next value

A caption is a prefix of characters, to which all values attend (Ramesh et al., "Zero-shot text-to-image generation",
2021). With a ``codebook_size`` the values are not pixels but the codes of a VQ autoencoder, which is trained in a phase
of its own (van den Oord et al., 2017; see ``vq_vae``). The likelihood of an image then has a lower bound:

    log p(image) >= log p(image | its codes) + log p(its codes)

If the data has more levels than ``tones``, neighboring levels share a tone and are equally probable within it, so that
the loss is still -log p(image) in nats of the original levels, which can be compared between models.

In this file: config, network and loss, sampling. Blocks and KV caches are in ``transformer_lm``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.batch import NEVER_IGNORED, RANGE_TOLERANCE, caption_tokens, require_labels, require_tokens
from fastgen.batch.options import takes_old_names
from fastgen.checks import (
    require_choice,
    require_count,
    require_not_negative,
    require_positive,
    require_positive_number,
    require_probability,
)
from fastgen.models.base import Batch, GenerativeModel, Images, Phase, Samples, StepContext, image_rows, option, upcast
from fastgen.models.conditioning import LabelOptions, check_labels, wanted_labels
from fastgen.models.decoding import Chooser, generating
from fastgen.models.lm_blocks import EPS, RENAMED, CachedBlocks, LMBlock, init_weights
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, DataSize, Size
from fastgen.models.variational import check_images
from fastgen.models.vq_vae import Autoencoder, AutoencoderConfig
from fastgen.nn import RotaryEmbedding
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._sublayers import embedding_table

Activation = Literal["gelu", "swiglu"]

MAX_VALUES = 4096
MAX_COMPLETIONS = 16
AUTOENCODER_LEARNING_RATE = 2e-3
WIDE: Mapping[str, Any] = {"width": 256, "depth": 8, "dropout": 0.0}
WIDER = {**WIDE, "width": 384, "num_heads": 6}


@takes_old_names
@dataclass(frozen=True)
class ImageTransformerConfig:
    """Configuration of an ``ImageTransformer``.

    Raises:
        ValueError: an option out of range.
    """

    renamed: ClassVar = {**RENAMED, "halvings": "num_downsamples"}  # word-lint: ok
    image_size: int = option(8, "height and width of the images", from_data=True)
    channels: int = option(1, "number of image channels", from_data=True)
    levels: int = option(17, "number of pixel values: counts 0 .. levels - 1", from_data=True)
    classes: int = option(0, "number of classes", from_data=True)
    conditional: bool = option(False, "condition on class labels")
    caption_vocabulary: str = option("", "characters of captions; token 1 + i is character i", from_data=True)
    caption_length: int = option(0, "number of characters of the longest caption; 0: no captions", from_data=True)
    caption_examples: tuple[str, ...] = option((), "captions to sample if none is given", from_data=True)
    captions: bool = option(False, "condition on captions")
    codebook_size: int = option(0, "number of codebook entries of the VQ autoencoder; 0: model raw pixels")
    num_downsamples: int = option(2, "number of downsamplings of the VQ autoencoder")
    tones: int = option(256, "largest number of pixel classes; neighboring levels share one if there are more")
    width: int = option(64, "embedding dimension")
    depth: int = option(4, "number of blocks")
    num_heads: int = option(4, "number of attention heads")
    mlp_width: int = option(0, "hidden dimension of the MLP; 0: 4 times the width, 8/3 for swiglu")
    activation: Activation = option("gelu", "activation of the MLP")
    qk_norm: bool = option(True, "apply QK-norm (RMS) to queries and keys")
    dropout: float = option(0.1, "dropout probability, in attention and after each branch")
    learning_rate: float = option(3e-3, "AdamW learning rate")
    weight_decay: float = option(0.1, "AdamW weight decay, on all weights")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.99, "AdamW beta2")

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "width", "depth", "num_heads"):
            require_positive(name, getattr(self, name))
        for name in ("levels", "tones"):
            require_count(name, getattr(self, name), 2)
        object.__setattr__(self, "caption_examples", tuple(self.caption_examples))
        for name in ("codebook_size", "caption_length"):
            require_count(name, getattr(self, name), 0)
        if self.codebook_size:
            _ = self.autoencoder
        if self.length > MAX_VALUES:
            size = self.grid
            raise ValueError(
                f"image_size: expected at most {MAX_VALUES} values in an image,"
                f" got {self.values_per_position} x {size} x {size} = {self.length}"
            )
        if self.captions and not (self.caption_length and self.caption_vocabulary and self.caption_examples):
            raise ValueError("captions: expected false, as the data has no captions, got true")
        if self.captions and self.conditional:
            raise ValueError("captions: expected false with conditional, got true")
        if self.conditional and self.classes < 2:
            raise ValueError(f"conditional: expected false, as the data has {self.classes} classes, got true")
        if self.width % self.num_heads != 0 or self.width // self.num_heads % 2 != 0:
            raise ValueError(f"width: expected an even multiple of num_heads = {self.num_heads}, got {self.width}")
        require_count("mlp_width", self.mlp_width, 0)
        require_choice("activation", self.activation, get_args(Activation))
        for name in ("dropout", "beta1", "beta2"):
            require_probability(name, getattr(self, name))
        require_positive_number(learning_rate=self.learning_rate)
        require_not_negative(weight_decay=self.weight_decay)

    @property
    def autoencoder(self) -> AutoencoderConfig:
        """Configuration of the VQ autoencoder."""
        return AutoencoderConfig(self.image_size, self.channels, self.levels, self.num_downsamples, self.codebook_size)

    @property
    def grid(self) -> int:
        """Number of rows, and of columns, of the map of values."""
        return self.image_size >> self.num_downsamples if self.codebook_size else self.image_size

    @property
    def values_per_position(self) -> int:
        """Number of values at one place of the map."""
        return 1 if self.codebook_size else self.channels

    @property
    def values(self) -> int:
        """Number of classes of a value."""
        return self.codebook_size or min(self.tones, self.levels)

    @property
    def length(self) -> int:
        """Number of values of an image."""
        return self.values_per_position * self.grid**2

    @property
    def prefix(self) -> int:
        """Number of tokens before the start token."""
        return self.caption_length if self.captions else 0

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden dimension of the MLP. A swiglu MLP has two input matrices: 8/3 of the width costs as much as 4."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.activation == "gelu" else 8 * math.ceil(self.width / 3)


@dataclass(frozen=True)
class PixelOptions(LabelOptions):
    """Sampling options of an ``ImageTransformer``.

    Raises:
        ValueError: an option out of range.
    """

    caption: str = option("", "caption to sample, in characters of the data; empty: example captions in turn")
    temperature: float = option(1.0, "sampling temperature; 0: greedy")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(temperature=self.temperature)


@register_model
class ImageTransformer(ComputedBuffers, GenerativeModel):
    """Autoregressive Transformer over pixels or codebook codes, optionally conditioned on labels or captions.

    Images are (B, channels, image_size, image_size), floating, in [0, 1], multiples of 1 / (levels - 1). Tokens are
    (B, length) int64, 0 .. values - 1. Captions are (B, caption_length) int64, padded with 0 at the end.

    Example:
        >>> model = ImageTransformer(ImageTransformerConfig(image_size=4, width=16, depth=1)).eval()
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape  # logits of the first value, and after each of five
        torch.Size([2, 6, 17])
        >>> model.draw(3, PixelOptions()).pixels.shape
        torch.Size([3, 1, 4, 4])
    """

    name = "image-transformer"
    summary = "decoder-only Transformer over pixels or codebook codes"
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
    sizes: ClassVar = {
        "medium": Size(4_000, 32, train=LONG, model={"codebook_size": 128, "num_downsamples": 2, "dropout": 0.0}),
        "large": Size(
            3_000, 16, train=LONG, model={"codebook_size": 256, "num_downsamples": 3, "width": 128, "dropout": 0.0}
        ),
        "medium, gpu": Size(30_000, 64, train=LONG, model={"codebook_size": 256, "num_downsamples": 2, **WIDE}),
        "large, gpu": Size(50_000, 64, train=LONG, model={"codebook_size": 512, "num_downsamples": 3, **WIDER}),
    }
    pixel_sizes: ClassVar[Mapping[str, Size]] = {
        "medium": Size(1_500, 16, model={"dropout": 0.0}),
        "large": Size(1_500, 4, model={"dropout": 0.0}),
        "medium, gpu": Size(30_000, 64, train=LONG, model=WIDE),
        "large, gpu": Size(30_000, 32, train=LONG, model=WIDE),
    }
    """As ``sizes``, for a model of raw pixels, which the user chooses by ``codebook_size`` 0."""
    blocks = ("LMBlock",)
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
        self.colour = nn.Embedding(config.values_per_position, width)  # a state-dict key; word-lint: ok
        self.rotary = RotaryEmbedding(config.head_dim)
        self.decoder = nn.ModuleList(LMBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.logits = nn.Linear(width, tones, bias=False)
        init_weights(self, width, config.depth)
        self._register_computed()

    @classmethod
    def suggested(cls, data: DataSize, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As ``GenerativeModel.suggested``. Images of an even height above 16 are modeled as codes, others as pixels.

        A ``codebook_size`` of 0 among the given options chooses pixels.
        """
        pixels = (given or {}).get("model.codebook_size") == 0 or data.image_size % 2
        if pixels and data.row in cls.pixel_sizes:
            return cls.pixel_sizes[data.row].options(data)
        return super().suggested(data, given)

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
            Phase("autoencoder", parts, AUTOENCODER_LEARNING_RATE, (0.9, 0.99), config.weight_decay),
            Phase("words", others, config.learning_rate, betas, config.weight_decay),
        )

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) -> tokens (B, length): tones in raster order, a pixel's channels consecutive; or codes.

        Raises:
            TypeError, ValueError: images of another dtype or shape than the config's.
        """
        if self.autoencoder is not None:
            return self.autoencoder.encode(images).flatten(1)
        return self._read(images)[0]

    def _read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, and a term of -log p(images), (B,): 0, or inf for pixels beyond [0, 1], NaN for NaN."""
        check_images(images, self.config)
        if self.autoencoder is not None:
            codes, flaw = self.autoencoder.quantize(images)
            return codes.flatten(1), flaw
        exact = (images.float() * (self.config.levels - 1)).round()
        impossible = (images < -RANGE_TOLERANCE) | (images > 1 + RANGE_TOLERANCE)
        flaw = torch.where(impossible, math.inf, 0 * exact).flatten(1).sum(1)
        counts = exact.long().clamp(0, self.config.levels - 1)
        return self.tone_of_level[counts].movedim(1, -1).flatten(1), flaw

    def pixels(self, tokens: Tensor) -> Tensor:
        """Tokens (B, length) -> images (B, C, S, S): the mean of the levels of a tone, or the decoded codes."""
        size = self.config.grid
        if self.autoencoder is not None:
            return self.autoencoder.decode(tokens.view(-1, size, size))
        require_tokens("tokens", tokens, self.config.values)
        return self.pixel_of_tone.gather(0, tokens.flatten()).view(-1, size, size, self.config.channels).movedim(-1, 1)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, captions: Tensor | None = None) -> Tensor:
        """Logits (B, N + 1, values) of the first value, and of the value after each token.

        Args:
            tokens: (B, N) int64, N below ``length``.
            labels: (B,) int64, for a conditional model; others ignore them.
            captions: (B, caption_length) int64, for a model with captions; others ignore them.

        Raises:
            TypeError: tokens are not an int64 tensor. ValueError: too many tokens, or labels or captions missing.
        """
        self._check_tokens(tokens, self.config.length - 1)
        x = self._embed(tokens, labels, captions)
        x = x + self._positions(x.device)[: x.size(1)]
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        dtype = torch.promote_types(x.dtype, torch.float32)
        rotary = self.rotary.tables(x.size(1), device=x.device, dtype=dtype)
        for block in self.decoder:
            x = block(x, rotary)
        logits: Tensor = self.logits(self.norm(x[:, self.config.prefix :]))
        return logits

    def _check_tokens(self, tokens: Tensor, most: int) -> None:
        require_tokens("tokens", tokens, self.config.values)
        if tokens.dim() != 2 or tokens.size(1) > most:
            raise ValueError(f"tokens: expected (B, N) with N at most {most}, got {tuple(tokens.shape)}")

    def _embed(self, tokens: Tensor, labels: Tensor | None, captions: Tensor | None) -> Tensor:
        """(B, prefix + 1 + N, width): caption, start or label, then the tokens."""
        config = self.config
        if config.conditional and labels is None:
            raise ValueError("labels: expected (B,) int64, as the model is conditional, got None")
        if not config.conditional or labels is None:
            labels = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        require_labels("labels", labels, len(tokens), config.classes if config.conditional else 1)
        parts = [self.start(labels).unsqueeze(1), self.embedding(tokens)]
        if self.caption is not None:
            if captions is None:
                raise ValueError(f"caption: expected (B, {config.caption_length}) int64 with captions, got none")
            shape = (len(tokens), config.caption_length)
            require_tokens("caption", captions, 1 + len(config.caption_vocabulary), shape, "(B, caption_length)")
            parts.insert(0, self.caption(captions))
        return torch.cat(parts, dim=1)

    def _positions(self, device: torch.device) -> Tensor:
        """Position embeddings (prefix + length, width): of the caption, then row + column + channel of each value."""
        config = self.config
        row, column = (embedding_table(part, config.grid, device) for part in (self.row, self.column))
        channel = embedding_table(self.colour, config.values_per_position, device)  # word-lint: ok
        values = (row[:, None, None] + column[:, None] + channel).flatten(0, 2)
        if self.caption_place is None:
            return values
        return torch.cat([embedding_table(self.caption_place, config.prefix, device), values])

    def _conditions(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Labels and captions of a batch that the model is conditioned on."""
        return (
            check_labels(batch, self.config.classes) if self.config.conditional else None,
            batch.get("caption") if self.config.captions else None,
        )

    def _nll(self, tokens: Tensor, batch: Batch) -> Tensor:
        """-log p of each value given the ones before it, (B, length), in float32 at least."""
        logits = self(tokens[:, :-1], *self._conditions(batch))
        logits = upcast(logits)
        nll = F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none", ignore_index=NEVER_IGNORED)
        return nll if self.autoencoder is not None else nll + self.log_share[tokens]

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Phase autoencoder: the losses of ``vq_vae``. Otherwise loss: nats per value."""
        if phase == "autoencoder" and self.autoencoder is not None:
            return self.autoencoder.loss(batch["images"])
        tokens, flaw = self._read(batch["images"])
        return {"loss": (self._nll(tokens, batch) + flaw[:, None]).mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): -log p(image), or -log p(image | label or caption), in nats.

        With codes: elbo, nll (of the pixels given the codes) and kl (of the codes), in nats; the mean squared error of
        the expected pixels; the perplexity of the codebook, the same for all items.
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
        """Samples n images. Without a label or caption, classes or example captions take turns, one per column.

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
            raise ValueError(f"label: expected -1, as the model is not conditional, got {options.label}")
        if options.caption and not config.captions:
            raise ValueError(f"caption: expected none, as the model has no captions, got {options.caption!r}")
        if config.captions:
            texts = (options.caption,) if options.caption else config.caption_examples
            chosen, columns = wanted_labels(n, 0 if options.caption else -1, len(texts))
            captions = caption_tokens(texts, config.caption_vocabulary, config.caption_length)[chosen].to(self.device)
            if not options.caption and len(texts) == config.classes:  # captions are class names
                labels = chosen
        none = torch.zeros(n, 0, dtype=torch.int64, device=self.device)
        pixels = self.pixels(self.complete(none, labels, options.temperature, captions=captions, generator=generator))
        return Images(pixels, columns, labels)

    @torch.no_grad()
    def draw_captioned(
        self, captions: Tensor, options: PixelOptions, *, generator: torch.Generator | None = None
    ) -> Images:
        """An image for each of the captions (N, caption_length) int64, for a model with captions."""
        if not self.config.captions:
            raise ValueError("captions: expected a model with captions, got one without")
        captions = captions.to(self.device)
        none = captions.new_zeros(len(captions), 0)
        tokens = self.complete(none, None, options.temperature, captions=captions, generator=generator)
        return Images(self.pixels(tokens))

    def complete(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        *,
        captions: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples the rest of images whose first tokens are given.

        Args:
            tokens: (B, N) int64, N from 0 to ``length``.
            labels, captions: as for ``forward``.
            temperature: sampling temperature; 0: greedy.
            generator: random number generator. A CPU generator serves every device.

        Returns:
            Tokens (B, length).

        Raises:
            As ``forward``.
        """
        length = self.config.length
        self._check_tokens(tokens, length)
        chooser = Chooser(temperature, generator)
        with generating(self):
            x = self._embed(tokens, labels, captions)
            positions = self._positions(x.device)
            like = next(self.embedding.parameters(), self.norm.weight)
            past = CachedBlocks(self.decoder, self.rotary, len(tokens), len(positions), like)
            end = x.size(1)
            for _ in range(tokens.size(1), length):
                x = past(x + positions[end - x.size(1) : end])
                value = chooser(self.logits(self.norm(x[:, -1]))).unsqueeze(1)
                tokens = torch.cat([tokens, value], dim=1)
                x, end = self.embedding(value), end + 1
            chooser.check()
        return tokens.clone()

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Completions: a row of held-out images, below it their upper halves, and the model's completions of these."""
        batch = {name: tensor[:MAX_COMPLETIONS] for name, tensor in batch.items()}
        tokens = self.tokens(batch["images"])
        known = self.config.grid // 2 * self.config.grid * self.config.values_per_position
        labels, captions = self._conditions(batch)
        halves = self.pixels(tokens)
        halves[:, :, self.config.image_size // 2 :] = 0.5
        completed = self.pixels(self.complete(tokens[:, :known], labels, captions=captions, generator=generator))
        return {"completions": image_rows(batch["images"].to(halves), halves, completed)}
