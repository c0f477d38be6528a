"""A generative adversarial network of sequences: rows of pictures, characters, pairs of texts.

Mogren, "C-RNN-GAN: continuous recurrent neural networks with adversarial training" (2016), for numbers, and Press et
al., "Language generation with recurrent generative adversarial networks without pre-training" (2017), for symbols: a
recurrent generator is given noise and its own previous output at every step, a recurrent critic reads the sequence. A
penalty of the critic's slope makes the game learnable.

    noise_t, output_{t-1} -> GRU -> linear -> output_t
    rows -> GRU, both ways -> linear, LeakyReLU, linear -> mean over time -> score (B, 1)
    symbols before t -> GRU -> linear, LeakyReLU, linear -> a score of each symbol; that of symbol_t is score_t (B, T)

A step is a row of an image, its numbers in [-1, 1] by tanh, or a symbol. A symbol's output is a sample that has a
gradient: the softmax of (logits + Gumbel noise) / temperature (Jang et al., "Categorical reparameterization with
Gumbel-softmax", 2017), rounded to a one-hot vector where it is ``hard``, with the gradient of what was rounded. Each
symbol is a game of its own: the critic's score is linear in it, so that the gradient tells what every other symbol
would have scored in its place. Of text it learns words of a few letters and runs of punctuation, not sentences: half
of its words are the data's after 1300 steps. The recurrent layers are ``fastgen.nn``'s, whose penalty is
differentiable on a GPU too. How data become steps is in ``_steps.py``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import losses
from fastgen.checks import require_positive, require_probability
from fastgen.losses.adversarial import ADVERSARIAL_LOSSES, AdversarialLoss
from fastgen.models._steps import Characters, Pairs, Rows, Steps
from fastgen.models._tokens import require_vocabulary
from fastgen.models.base import Batch, GenerativeModel, Kind, NoOptions, Phase, Samples, StepContext, option
from fastgen.models.decoding import TINY, tempered
from fastgen.nn import GRU

Penalty = Literal["none", "r1", "r1-r2", "gradient"]
Sequence = Literal["images", "text", "sequences"]
BY_KIND = {"penalty_weight": (2.0, 0.1), "generator_learning_rate": (1e-3, 2e-3), "critic_learning_rate": (1e-3, 3e-3)}
"""Defaults of images, and of symbols."""


@dataclass(frozen=True)
class RecurrentGANConfig:
    """Sizes of a RecurrentGAN and how it learns. ValueError names the field, what was expected and what came."""

    kind: Sequence = option("images", "of data", from_data=True)
    image_size: int = option(8, "height and width of images: steps, and numbers of a step", from_data=True)
    channels: int = option(1, "colour channels of images", from_data=True)
    vocabulary: str = option("+0123456789", "the characters of text and sequences", from_data=True)
    source_length: int = option(9, "tokens of the longest source, start and end included", from_data=True)
    target_length: int = option(6, "tokens of the longest target, start and end included", from_data=True)
    text_length: int = option(16, "characters of a piece of text")
    noise_dim: int = option(16, "numbers of noise in each step")
    generator_width: int = option(128, "units of the generator's GRU")
    critic_width: int = option(64, "units of the critic's GRU; of images in each direction")
    logit_scale: float = option(4.0, "what the logits of symbols are multiplied by, before the noise")
    temperature: float = option(4.0, "of the Gumbel-softmax")
    hard: bool = option(True, "round symbols to one-hot vectors, as they are when drawn")
    loss: AdversarialLoss = option("non-saturating", "the game")
    penalty: Penalty = option(
        "r1-r2", "of the critic's slope: at real sequences, at those and generated ones, between them"
    )
    penalty_weight: float | None = option(
        None, "what the penalty is multiplied by (gamma, lambda); default: 2, of symbols 0.1"
    )
    critic_steps: int = option(1, "updates of the critic for one of the generator")
    generator_learning_rate: float | None = option(None, "of the generator's AdamW; default: 0.001, of symbols 0.002")
    critic_learning_rate: float | None = option(None, "of the critic's AdamW; default: 0.001, of symbols 0.003")
    beta1: float = option(0.0, "of AdamW")
    beta2: float = option(0.99, "of AdamW")

    def __post_init__(self) -> None:
        require_vocabulary(self.vocabulary)
        for name in (
            *("image_size", "channels", "source_length", "target_length", "text_length"),
            *("noise_dim", "generator_width", "critic_width", "critic_steps"),
        ):
            require_positive(name, getattr(self, name))
        for name, least in (("source_length", "start, a character, end"), ("target_length", "start, a character, end")):
            if getattr(self, name) < 3:
                raise ValueError(f"{name}: expected 3 or more: {least}, got {getattr(self, name)}")
        if self.text_length < 3:
            raise ValueError(f"text_length: expected 3 or more characters, got {self.text_length}")
        for name, known in (
            ("kind", get_args(Sequence)),
            ("loss", ADVERSARIAL_LOSSES),
            ("penalty", get_args(Penalty)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("logit_scale", "temperature", "generator_learning_rate", "critic_learning_rate"):
            if not 0 < self.chosen(name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.chosen("penalty_weight") < math.inf:
            raise ValueError(f"penalty_weight: expected a number >= 0, got {self.penalty_weight}")
        for name in ("beta1", "beta2"):
            require_probability(name, getattr(self, name))

    def chosen(self, name: str) -> float:
        """An option, or what its default is for this kind of data."""
        value: float | None = getattr(self, name)
        return BY_KIND[name][self.kind != "images"] if value is None else value

    def data_options(self) -> dict[str, int]:
        """Of text, how long its pieces are."""
        return {"length": self.text_length} if self.kind == "text" else {}

    def steps(self) -> Steps:
        """How the data become steps."""
        if self.kind == "images":
            return Rows(self.image_size, self.channels)
        if self.kind == "text":
            return Characters(self.vocabulary, self.text_length)
        return Pairs(self.vocabulary, self.source_length, self.target_length)


class Generator(nn.Module):
    """Noise (B, length, noise_dim) and, of symbols, Gumbel noise (B, length, width) -> outputs (B, length, width)."""

    def __init__(self, config: RecurrentGANConfig, width: int) -> None:
        super().__init__()
        self.logit_scale, self.temperature, self.hard = config.logit_scale, config.temperature, config.hard
        self.gru = GRU(config.noise_dim + width, config.generator_width, batch_first=True)
        self.out = nn.Linear(config.generator_width, width)

    def forward(self, noise: Tensor, gumbel: Tensor | None = None) -> Tensor:
        output, state, outputs = noise.new_zeros(len(noise), self.out.out_features), None, []
        for t, now in enumerate(noise.unbind(1)):
            hidden, state = self.gru(torch.cat((now, output), 1)[:, None], state)
            output = self.out(hidden[:, 0])
            output = output.tanh() if gumbel is None else self.sample(self.logit_scale * output + gumbel[:, t])
            outputs.append(output)
        return torch.stack(outputs, 1)

    def sample(self, disturbed: Tensor) -> Tensor:
        """Symbols of logits with their noise (B, width)."""
        soft = tempered(disturbed, self.temperature).softmax(1).to(disturbed.dtype)
        if not self.hard:
            return soft
        rounded = F.one_hot(disturbed.argmax(1), disturbed.size(1)).to(soft.dtype)
        return rounded + (soft - soft.detach())


class Critic(nn.Module):
    """Sequences of numbers (B, length, width) -> scores (B, 1): high means real."""

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
    """Symbols (B, length, width) -> scores (B, length) of each after those before it: high means real."""

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


class RecurrentGAN(GenerativeModel):
    """The model described at the top of this file. Batches are as ``fastgen.models.KINDS`` says of the config's kind.

    Example:
        >>> RecurrentGAN(RecurrentGANConfig(image_size=5)).draw(3, NoOptions()).pixels.shape
        torch.Size([3, 1, 5, 5])
        >>> model = RecurrentGAN(RecurrentGANConfig(kind="text", vocabulary="ab", text_length=7))
        >>> len(model.draw(1, NoOptions()).texts[0])
        7
    """

    name, summary = "recurrent-gan", "recurrent generator and critic of rows, characters or pairs"
    kind: Kind = "images"
    kinds = get_args(Sequence)
    default_data = "digits"
    config_class = RecurrentGANConfig
    train_defaults: ClassVar = {"steps": 2600, "batch_size": 64, "average_decay": 0.998}
    averaged = ("generator",)
    config: RecurrentGANConfig

    def __init__(self, config: RecurrentGANConfig) -> None:
        super().__init__(config)
        self.kind = config.kind
        self.steps = config.steps()
        self.generator = Generator(config, self.steps.width)
        self.critic = (SymbolCritic if self.steps.symbols else Critic)(config, self.steps.width)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas = (config.beta1, config.beta2)
        rates = [config.chosen(f"{network}_learning_rate") for network in ("critic", "generator")]
        return (
            Phase("critic", ("critic",), rates[0], betas, repeats=config.critic_steps),
            Phase("generator", ("generator",), rates[1], betas),
        )

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """What ``phase`` minimises; mean scores of "real" and "fake" sequences, the "penalty"."""
        config = self.config
        real = self._read(batch)
        if phase == "generator":
            scores = self.critic(self._generate(len(real)))
            return {"loss": losses.generator_loss(scores, config.loss), "fake": scores.detach().float().mean()}
        with torch.no_grad():
            fake = self._generate(len(real)).to(real.dtype)
        with nullcontext() if config.penalty == "none" else torch.compiler.set_stance("force_eager"):
            return self._critic_loss(real, fake, context)  # compiled code can't be differentiated twice

    def _critic_loss(self, real: Tensor, fake: Tensor, context: StepContext) -> dict[str, Tensor]:
        """Both halves in one pass: a recurrence costs its steps, hardly its items."""
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
        else:  # the mean over both halves is half of what R1 and R2 are together
            penalty = 2 * losses.r1_penalty(scores.mean(1), both, scaler=scaler)
        return {
            **values,
            "loss": values["loss"] + config.chosen("penalty_weight") * penalty,
            "penalty": penalty.detach(),
        }

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The critic's scores (B,) of held-out sequences, "real", and of as many drawn ones, "fake"; of symbols, more.

        text: "known triples", the share of a drawn text's triples of characters that occur in real texts of the batch,
        beside that of the real ones in the others. sequences: "well formed" is 1 where a drawn pair has two sides of
        one character at least, each with its end, and nothing after that; else 0.
        """
        real = self._read(batch)
        fake = self._generate(len(real), generator).to(real.dtype)
        scores = {"real": self._score(real), "fake": self._score(fake)}
        return {**scores, **self.steps.judge(fake, real)}

    @torch.no_grad()
    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Samples:
        """n images or texts. Of pairs what is not well formed shows further ends as "|", padding inside as "_".

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        return self.steps.samples(self._generate(n, generator))

    def _generate(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Outputs (n, length, width). A CPU generator gives the same noise to every device."""
        weight, length = next(self.generator.parameters()), self.steps.length
        device = weight.device if generator is None else generator.device
        noise = torch.randn(n, length, self.config.noise_dim, generator=generator, device=device).to(weight)
        outputs: Tensor
        if not self.steps.symbols:
            outputs = self.generator(noise)
            return outputs
        uniform = torch.rand(n, length, self.steps.width, generator=generator, device=device)
        gumbel = -(-uniform.clamp(min=TINY).log()).clamp(min=TINY).log()
        outputs = self.generator(noise, gumbel.to(weight))
        return outputs

    def _score(self, sequences: Tensor) -> Tensor:
        """The critic's mean score of each sequence, (B,)."""
        scores: Tensor = self.critic(sequences)
        return scores.mean(1)

    def _read(self, batch: Batch) -> Tensor:
        return self.steps.read(batch).to(next(self.generator.parameters()).dtype)
