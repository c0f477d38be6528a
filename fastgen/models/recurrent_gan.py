"""Recurrent generative adversarial network for sequences: rows of images, characters of text, pairs of texts.

Mogren, "C-RNN-GAN: continuous recurrent neural networks with adversarial training" (2016), for continuous sequences,
and Press et al., "Language generation with recurrent generative adversarial networks without pre-training" (2017), for
symbols:

    generator:              noise_t, output_{t-1} -> GRU -> linear -> output_t
    critic of images:       sequence -> bidirectional GRU -> MLP -> mean over time -> score (B, 1)
    critic of symbols:      symbols before t -> GRU -> MLP -> one score per symbol; symbol_t selects score_t (B, T)

A time step is a row of an image, in [-1, 1] by tanh, or a symbol. The generator's symbols are differentiable samples,
softmax((logits + Gumbel noise) / temperature) (Jang et al., "Categorical reparameterization with Gumbel-softmax",
2017); with ``hard`` they are rounded to one-hot vectors by the straight-through estimator. The critic's score is linear
in each symbol, so its gradient is the score of every alternative symbol. Training needs a gradient penalty of the
critic: the GRUs are those of ``fastgen.nn``, which have a double backward on GPUs too.

On text the model learns short words and runs of punctuation, not sentences: after 1300 steps half of its words are
words of the data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import losses
from fastgen.batch import PADDING, require_characters, require_images, require_tokens
from fastgen.checks import require_choice, require_positive, require_probability
from fastgen.losses.adversarial import ADVERSARIAL_LOSSES, AdversarialLoss
from fastgen.models.base import (
    Batch,
    GenerativeModel,
    Images,
    Kind,
    NoOptions,
    Phase,
    Samples,
    StepContext,
    Texts,
    option,
    to_pixels,
)
from fastgen.models.decoding import TINY, tempered
from fastgen.models.registry import register_model
from fastgen.models.sizes import LONG, Size
from fastgen.nn import GRU

Penalty = Literal["none", "r1", "r1-r2", "gradient"]
Sequence = Literal["images", "text", "sequences"]

DEFAULTS = {"penalty_weight": (2.0, 0.1), "generator_learning_rate": (1e-3, 2e-3), "critic_learning_rate": (1e-3, 3e-3)}
"""Defaults for images, and for symbols."""

BLANK, STOP, CHARACTER = 0, 1, 2
"""Symbols of a pair of texts: padding, the end of a text, and the first character of the vocabulary."""


@dataclass(frozen=True)
class RecurrentGANConfig:
    """Hyperparameters of a RecurrentGAN.

    Raises:
        ValueError: a field is out of range.
    """

    kind: Sequence = option("images", "kind of data", from_data=True)
    image_size: int = option(8, "height and width of images; rows are time steps", from_data=True)
    channels: int = option(1, "number of color channels of images", from_data=True)
    vocabulary: str = option("+0123456789", "characters of text and sequences", from_data=True)
    source_length: int = option(9, "tokens of the longest source, start and end included", from_data=True)
    target_length: int = option(6, "tokens of the longest target, start and end included", from_data=True)
    text_length: int = option(16, "number of characters in a piece of text")
    noise_dim: int = option(16, "dimension of the noise in each time step")
    generator_width: int = option(128, "units of the generator's GRU")
    critic_width: int = option(64, "units of the critic's GRU, per direction")
    logit_scale: float = option(4.0, "factor of the logits of symbols, before Gumbel noise is added")
    temperature: float = option(4.0, "temperature of the Gumbel-softmax")
    hard: bool = option(True, "round symbols to one-hot vectors in training")
    loss: AdversarialLoss = option("non-saturating", "adversarial objective")
    penalty: Penalty = option(
        "r1-r2",
        "gradient penalty on the critic: at real sequences (r1), at real and generated ones (r1-r2), or between them",
    )
    penalty_weight: float | None = option(
        None, "weight of the gradient penalty (gamma, lambda); default 2, for symbols 0.1"
    )
    critic_steps: int = option(1, "critic updates per generator update")
    generator_learning_rate: float | None = option(
        None, "AdamW learning rate of the generator; default 0.001, for symbols 0.002"
    )
    critic_learning_rate: float | None = option(
        None, "AdamW learning rate of the critic; default 0.001, for symbols 0.003"
    )
    beta1: float = option(0.0, "AdamW beta1")
    beta2: float = option(0.99, "AdamW beta2")

    def __post_init__(self) -> None:
        require_characters(self.vocabulary)
        for name in (
            *("image_size", "channels", "source_length", "target_length", "text_length"),
            *("noise_dim", "generator_width", "critic_width", "critic_steps"),
        ):
            require_positive(name, getattr(self, name))
        for name in ("source_length", "target_length"):
            if getattr(self, name) < 3:
                raise ValueError(f"{name}: expected 3 or more: start, a character, end, got {getattr(self, name)}")
        if self.text_length < 3:
            raise ValueError(f"text_length: expected 3 or more characters, got {self.text_length}")
        require_choice("kind", self.kind, get_args(Sequence))
        require_choice("loss", self.loss, ADVERSARIAL_LOSSES)
        require_choice("penalty", self.penalty, get_args(Penalty))
        for name in ("logit_scale", "temperature", "generator_learning_rate", "critic_learning_rate"):
            if not 0 < self.chosen(name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.chosen("penalty_weight") < math.inf:
            raise ValueError(f"penalty_weight: expected a number >= 0, got {self.penalty_weight}")
        for name in ("beta1", "beta2"):
            require_probability(name, getattr(self, name))

    def chosen(self, name: str) -> float:
        """The value of an option, or its default for this kind of data."""
        value: float | None = getattr(self, name)
        return DEFAULTS[name][self.kind != "images"] if value is None else value

    def data_options(self) -> dict[str, int]:
        """The length of pieces of text."""
        return {"length": self.text_length} if self.kind == "text" else {}


# How data become sequences


class SequenceFormat(ABC):
    """Conversion of batches to sequences (B, length, width), and back to samples.

    ``symbols``: whether a time step is a one-hot vector.
    """

    symbols: bool

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width

    @abstractmethod
    def encode(self, batch: Batch) -> Tensor:
        """A batch -> (B, length, width): int64 one-hot vectors of symbols, or values in [-1, 1]."""

    @abstractmethod
    def decode(self, sequences: Tensor) -> Samples:
        """Sequences (B, length, width) -> B samples."""

    def metrics(self, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Metrics (B,) of generated sequences beside as many real ones."""
        return {}


class ImageRows(SequenceFormat):
    """Images (B, C, S, S) in [0, 1] as rows from the top, (B, S, C * S)."""

    symbols = False

    def __init__(self, image_size: int, channels: int) -> None:
        super().__init__(image_size, channels * image_size)
        self.channels = channels

    def encode(self, batch: Batch) -> Tensor:
        images, size = batch["images"], self.length
        require_images("images", images, self.channels, size)
        return 2 * images.transpose(1, 2).flatten(2) - 1

    def decode(self, sequences: Tensor) -> Images:
        rows = sequences.unflatten(2, (self.channels, self.length)).transpose(1, 2)
        return Images(to_pixels(rows))


class TextCharacters(SequenceFormat):
    """Pieces of text, tokens (B, length) int64, as characters."""

    symbols = True

    def __init__(self, vocabulary: str, length: int) -> None:
        super().__init__(length, len(vocabulary))
        self.vocabulary = vocabulary

    def encode(self, batch: Batch) -> Tensor:
        return F.one_hot(checked_tokens(batch, "tokens", self.length, "(B, length)", self.width), self.width)

    def decode(self, sequences: Tensor) -> Texts:
        return Texts(["".join(self.vocabulary[i] for i in row) for row in to_symbols(sequences)])

    def metrics(self, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        """ "known triples": fraction of a text's character triples that occur in other real texts of the batch."""
        fake, real = (self._triples(sequences.argmax(2)) for sequences in (fake, real))
        return {"known triples": self._known(fake, real), "known triples, real": self._known(real, real)}

    def _triples(self, tokens: Tensor) -> Tensor:
        """(B, length) -> (B, length - 2): one integer per three consecutive characters."""
        return (tokens[:, :-2] * self.width + tokens[:, 1:-1]) * self.width + tokens[:, 2:]

    def _known(self, triples: Tensor, real: Tensor) -> Tensor:
        """(B,): the fraction of the triples of row i that occur in rows of ``real`` other than i."""
        distinct, ids = torch.cat((triples, real)).unique(return_inverse=True)
        triples, real = ids.split((len(triples), len(real)))
        places = torch.arange(len(real), device=real.device)[:, None] * len(distinct) + real
        occurs = torch.zeros(len(real) * len(distinct), device=real.device).index_fill(0, places.flatten(), 1.0)
        occurs = occurs.view(len(real), -1)
        in_others = occurs.sum(0) - occurs
        return (in_others.gather(1, triples) > 0).double().mean(1)


class TextPairs(SequenceFormat):
    """Pairs of texts, source (B, source_length) and target (B, target_length), tokens as in ``KINDS``.

    A pair is one sequence: the source's characters, an end, the target's characters, an end, padding.
    """

    symbols = True

    def __init__(self, vocabulary: str, source_length: int, target_length: int) -> None:
        super().__init__(source_length + target_length - 2, CHARACTER + len(vocabulary))
        self.vocabulary, self.lengths = vocabulary, {"source": source_length, "target": target_length}

    def encode(self, batch: Batch) -> Tensor:
        source, target = (
            checked_tokens(batch, name, length, f"(B, {name}_length)", self.width + 1)[:, 1:]
            for name, length in self.lengths.items()
        )
        place = (source != PADDING).sum(1, keepdim=True) + torch.arange(target.size(1), device=target.device)
        tokens = F.pad(source, (0, target.size(1))).scatter(1, place, target)
        return F.one_hot(tokens.masked_fill(tokens == PADDING, 1) - 1, self.width)

    def decode(self, sequences: Tensor) -> Texts:
        """Texts "source -> target". In malformed pairs further ends are "|" and padding between characters is "_"."""
        return Texts([self.detokenize(row) for row in to_symbols(sequences)])

    def detokenize(self, symbols: list[int]) -> str:
        """The text of one row of symbols."""
        while symbols and symbols[-1] == BLANK:
            symbols = symbols[:-1]
        if symbols.count(STOP) > 1 and symbols[-1] == STOP:
            symbols = symbols[:-1]
        characters = ("_", "|", *self.vocabulary)
        return "".join(characters[symbol] for symbol in symbols).replace("|", " -> ", 1)

    def metrics(self, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        """ "well formed": 1 for two texts of at least one character, each with its end, then only padding; else 0."""
        symbols = fake.argmax(2)
        ends = symbols == STOP
        part = ends.cumsum(1) - ends.long()  # 0 up to the first end, 1 up to the second, 2 after that
        empty = ends & torch.cat((torch.ones_like(ends[:, :1]), ends[:, :-1]), 1)
        formed = (ends.sum(1) == 2) & ~empty.any(1) & ((symbols == BLANK) == (part == 2)).all(1)
        return {"well formed": formed.double()}


def to_symbols(sequences: Tensor) -> list[list[int]]:
    """Sequences (B, length, width) -> symbols. Raises ValueError where they are NaN or infinite."""
    largest, symbols = sequences.max(2)
    if not bool(largest.isfinite().all()):
        raise ValueError("steps: expected numbers, got NaN or infinite ones; the generator's weights may be NaN")
    rows: list[list[int]] = symbols.tolist()
    return rows


def checked_tokens(batch: Batch, name: str, length: int, meaning: str, count: int) -> Tensor:
    """The batch's tokens of this name. Raises TypeError, ValueError unless they are (B, length) int64, below count."""
    tokens = batch[name]
    require_tokens(name, tokens, count, (*tokens.shape[:1], length), meaning)
    return tokens


def sequence_format(config: RecurrentGANConfig) -> SequenceFormat:
    """The format of the config's kind of data."""
    if config.kind == "images":
        return ImageRows(config.image_size, config.channels)
    if config.kind == "text":
        return TextCharacters(config.vocabulary, config.text_length)
    return TextPairs(config.vocabulary, config.source_length, config.target_length)


# Networks


class RecurrentGenerator(nn.Module):
    """Noise (B, length, noise_dim) and, for symbols, Gumbel noise (B, length, width) -> (B, length, width)."""

    def __init__(self, config: RecurrentGANConfig, width: int) -> None:
        super().__init__()
        self.logit_scale, self.temperature, self.hard = config.logit_scale, config.temperature, config.hard
        self.gru = GRU(config.noise_dim + width, config.generator_width, batch_first=True)
        self.out = nn.Linear(config.generator_width, width)

    def forward(self, noise: Tensor, gumbel: Tensor | None = None) -> Tensor:
        output, state, outputs = noise.new_zeros(len(noise), self.out.out_features), None, []
        for t, noise_t in enumerate(noise.unbind(1)):
            hidden, state = self.gru(torch.cat((noise_t, output), 1)[:, None], state)
            output = self.out(hidden[:, 0])
            output = output.tanh() if gumbel is None else self.sample(self.logit_scale * output + gumbel[:, t])
            outputs.append(output)
        return torch.stack(outputs, 1)

    def sample(self, noisy_logits: Tensor) -> Tensor:
        """Logits with Gumbel noise (B, width) -> symbols (B, width)."""
        soft = tempered(noisy_logits, self.temperature).softmax(1).to(noisy_logits.dtype)
        if not self.hard:
            return soft
        rounded = F.one_hot(noisy_logits.argmax(1), noisy_logits.size(1)).to(soft.dtype)
        return rounded + (soft - soft.detach())


class RecurrentCritic(nn.Module):
    """Continuous sequences (B, length, width) -> scores (B, 1): high means real."""

    def __init__(self, config: RecurrentGANConfig, width: int) -> None:
        super().__init__()
        units = config.critic_width
        self.gru = GRU(width, units, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(2 * units, 2 * units)
        self.score = nn.Linear(2 * units, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        states, _ = self.gru(sequences)
        scores: Tensor = self.score(F.leaky_relu(self.hidden(states), 0.2))
        return scores.mean(1)


class SymbolCritic(nn.Module):
    """Symbols (B, length, width) -> scores (B, length) of each symbol given those before it: high means real."""

    def __init__(self, config: RecurrentGANConfig, width: int) -> None:
        super().__init__()
        units = config.critic_width
        self.gru = GRU(width, units, batch_first=True)
        self.hidden = nn.Linear(units, units)
        self.score = nn.Linear(units, width)

    def forward(self, sequences: Tensor) -> Tensor:
        past, _ = self.gru(F.pad(sequences[:, :-1], (0, 0, 1, 0)))
        scores: Tensor = self.score(F.leaky_relu(self.hidden(past), 0.2))
        return (scores * sequences).sum(2)


# Model


@register_model
class RecurrentGAN(GenerativeModel):
    """Recurrent GAN of images, text or pairs of texts. ``fastgen.models.KINDS`` describes the batches of each kind.

    Example:
        >>> RecurrentGAN(RecurrentGANConfig(image_size=5)).draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 5, 5])
        >>> model = RecurrentGAN(RecurrentGANConfig(kind="text", vocabulary="ab", text_length=7))
        >>> len(model.draw(1, NoOptions()).texts[0])
        7
    """

    name, summary = "recurrent-gan", "recurrent GAN of image rows, characters or pairs of texts"
    kind: Kind = "images"
    kinds = get_args(Sequence)
    default_data = "digits"
    config_class = RecurrentGANConfig
    train_defaults: ClassVar = {"steps": 2600, "batch_size": 64, "average_decay": 0.998}
    sizes: ClassVar = {
        "medium": Size(8_000, train=LONG),
        "large": Size(4_000, 32),
        "medium, gpu": Size(30_000, 128, train=LONG, model={"generator_width": 256, "critic_width": 128}),
        "large, gpu": Size(30_000, 128, train=LONG, model={"generator_width": 512, "critic_width": 256}),
    }
    averaged = ("generator",)
    config: RecurrentGANConfig

    def __init__(self, config: RecurrentGANConfig) -> None:
        super().__init__(config)
        self.kind = config.kind
        self.format = sequence_format(config)
        self.generator = RecurrentGenerator(config, self.format.width)
        self.critic = (SymbolCritic if self.format.symbols else RecurrentCritic)(config, self.format.width)

    def forward(self, noise: Tensor, gumbel: Tensor | None = None) -> Tensor:
        """Noise -> sequences (B, length, width), which ``format.decode`` converts to samples.

        Args:
            noise: (B, length, noise_dim) from N(0, 1); ``format`` has length and width.
            gumbel: (B, length, width) from the standard Gumbel distribution, for text and sequences only.

        Raises:
            ValueError: gumbel is missing for symbols, or given for images.
        """
        if (gumbel is None) == self.format.symbols:
            expected = "Gumbel noise (B, length, width)" if self.format.symbols else "none for images"
            raise ValueError(f"gumbel: expected {expected}, got {'none' if gumbel is None else 'a tensor'}")
        sequences: Tensor = self.generator(noise, gumbel)
        return sequences

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas = (config.beta1, config.beta2)
        rates = [config.chosen(f"{network}_learning_rate") for network in ("critic", "generator")]
        return (
            Phase("critic", ("critic",), rates[0], betas, repeats=config.critic_steps),
            Phase("generator", ("generator",), rates[1], betas),
        )

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss of ``phase``; mean scores of "real" and "fake" sequences, the "penalty"."""
        config = self.config
        real = self._encode(batch)
        if phase == "generator":
            scores = self.critic(self._generate(len(real)))
            return {"loss": losses.generator_loss(scores, config.loss), "fake": scores.detach().float().mean()}
        with torch.no_grad():
            fake = self._generate(len(real)).to(real.dtype)
        with nullcontext() if config.penalty == "none" else torch.compiler.set_stance("force_eager"):
            return self._critic_loss(real, fake, context)  # compiled code has no double backward

    def _critic_loss(self, real: Tensor, fake: Tensor, context: StepContext) -> dict[str, Tensor]:
        """Real and generated sequences are one batch: the cost of a recurrence hardly depends on the batch size."""
        config, scaler = self.config, context.scaler
        real.requires_grad_(config.penalty == "r1")
        both = torch.cat((real, fake))
        if config.penalty == "r1-r2":
            both = both.detach().requires_grad_()
        scores = self.critic(both)
        real_scores, fake_scores = scores.chunk(2)
        values = {
            "loss": losses.discriminator_loss(real_scores, fake_scores, config.loss),
            "real": real_scores.detach().float().mean(),
            "fake": fake_scores.detach().float().mean(),
        }
        if config.penalty == "none":
            return values
        if config.penalty == "gradient":
            penalty = losses.gradient_penalty(self._score, real, fake, scaler=scaler)
        elif config.penalty == "r1":
            penalty = losses.r1_penalty(real_scores.mean(1), real, scaler=scaler)
        else:  # R1 + R2: the mean over both halves is half of their sum
            penalty = 2 * losses.r1_penalty(scores.mean(1), both, scaler=scaler)
        loss = values["loss"] + config.chosen("penalty_weight") * penalty
        return {**values, "loss": loss, "penalty": penalty.detach()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """(B,): the critic's scores of held-out sequences, "real", and of as many generated ones, "fake".

        Further metrics of the generated sequences depend on the kind: "known triples" for text, "well formed" for
        sequences; see ``TextCharacters`` and ``TextPairs``.
        """
        real = self._encode(batch)
        fake = self._generate(len(real), generator).to(real.dtype)
        scores = {"real": self._score(real), "fake": self._score(fake)}
        return {**scores, **self.format.metrics(fake, real)}

    @torch.no_grad()
    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Samples:
        """n images or texts; see ``TextPairs.decode`` for malformed pairs.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        return self.format.decode(self._generate(n, generator))

    def _generate(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Sequences (n, length, width). A CPU generator gives the same noise on every device."""
        weight, length = next(self.generator.parameters()), self.format.length
        device = weight.device if generator is None else generator.device
        noise = torch.randn(n, length, self.config.noise_dim, generator=generator, device=device).to(weight)
        gumbel = None
        if self.format.symbols:
            uniform = torch.rand(n, length, self.format.width, generator=generator, device=device)
            gumbel = (-(-uniform.clamp(min=TINY).log()).clamp(min=TINY).log()).to(weight)
        sequences: Tensor = self(noise, gumbel)
        return sequences

    def _score(self, sequences: Tensor) -> Tensor:
        """The critic's mean score of each sequence, (B,)."""
        scores: Tensor = self.critic(sequences)
        return scores.mean(1)

    def _encode(self, batch: Batch) -> Tensor:
        """A batch -> sequences (B, length, width) in the dtype of the weights."""
        return self.format.encode(batch).to(next(self.generator.parameters()).dtype)
