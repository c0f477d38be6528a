"""A generative adversarial network of sequences.

Press et al., "Language generation with recurrent generative adversarial networks without pre-training" (2017), with a
penalty of the critic's slope, which makes the game of discrete outputs learnable: a recurrent generator is given noise
and its own previous output at every step, a recurrent critic reads the sequence in both directions:

    noise_t, output_{t-1} -> GRU -> logits -> output_t
    outputs, or one-hot vectors of real symbols -> GRU, both ways -> linear -> mean over time -> score (B,)

An output is a sample that has a gradient: the softmax of (logits + Gumbel noise) / temperature (Jang et al.,
"Categorical reparameterization with Gumbel-softmax", 2017), rounded to a one-hot vector where it is ``hard``, with the
gradient of what was rounded. The layers are ``fastgen.nn``'s, whose penalty is differentiable on a GPU too.

A source and its target are one sequence: the source's characters, an end, the target's, an end, padding.
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
from fastgen._checks import require_positive, require_probability, require_shape, require_tensor
from fastgen.losses.adversarial import ADVERSARIAL_LOSSES, AdversarialLoss
from fastgen.models._base import Batch, GenerativeModel, Moment, NoOptions, Phase, Texts, option
from fastgen.models._tokens import PADDING, require_vocabulary
from fastgen.nn import GRU

Penalty = Literal["none", "r1", "r1-r2", "gradient"]

BLANK, STOP, CHARACTER = 0, 1, 2
"""Symbols of a sequence: padding, the end of a side, and the vocabulary's first character."""


@dataclass(frozen=True)
class RecurrentGANConfig:
    """Sizes of a RecurrentGAN and how it learns. ValueError names the field, what was expected and what came."""

    vocabulary: str = option("+0123456789", "the characters; token 3 + i is character i", from_data=True)
    source_length: int = option(9, "tokens of the longest source, start and end included", from_data=True)
    target_length: int = option(6, "tokens of the longest target, start and end included", from_data=True)
    noise_dim: int = option(16, "numbers of noise in each step")
    generator_width: int = option(128, "units of the generator's GRU")
    critic_width: int = option(64, "units of the critic's GRU, in each direction")
    temperature: float = option(1.0, "of the Gumbel-softmax")
    hard: bool = option(True, "round outputs to one-hot vectors, as they are when drawn")
    loss: AdversarialLoss = option("non-saturating", "the game")
    penalty: Penalty = option(
        "r1-r2", "of the critic's slope: at real sequences, at those and generated ones, between them"
    )
    penalty_weight: float = option(10.0, "what the penalty is multiplied by (gamma, lambda)")
    critic_steps: int = option(1, "updates of the critic for one of the generator")
    generator_learning_rate: float = option(2e-3, "of the generator's AdamW")
    critic_learning_rate: float = option(2e-3, "of the critic's AdamW")
    beta1: float = option(0.0, "of AdamW")
    beta2: float = option(0.99, "of AdamW")

    def __post_init__(self) -> None:
        require_vocabulary(self.vocabulary)
        for name in ("source_length", "target_length"):
            require_positive(name, getattr(self, name))
            if getattr(self, name) < 3:
                raise ValueError(f"{name}: expected 3 or more: start, a character, end, got {getattr(self, name)}")
        for name in ("noise_dim", "generator_width", "critic_width", "critic_steps"):
            require_positive(name, getattr(self, name))
        for name, known in (("loss", ADVERSARIAL_LOSSES), ("penalty", get_args(Penalty))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("temperature", "generator_learning_rate", "critic_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.penalty_weight < math.inf:
            raise ValueError(f"penalty_weight: expected a number >= 0, got {self.penalty_weight}")
        for name in ("beta1", "beta2"):
            require_probability(name, getattr(self, name))

    @property
    def length(self) -> int:
        """Symbols of a sequence: both sides without their starts."""
        return self.source_length + self.target_length - 2

    @property
    def symbols(self) -> int:
        """Different symbols."""
        return CHARACTER + len(self.vocabulary)


class Generator(nn.Module):
    """Noise (B, length, noise_dim) and Gumbel noise (B, length, symbols) -> outputs (B, length, symbols)."""

    def __init__(self, config: RecurrentGANConfig) -> None:
        super().__init__()
        self.temperature, self.hard = config.temperature, config.hard
        self.gru = GRU(config.noise_dim + config.symbols, config.generator_width, batch_first=True)
        self.logits = nn.Linear(config.generator_width, config.symbols)

    def forward(self, noise: Tensor, gumbel: Tensor) -> Tensor:
        output, state, outputs = torch.zeros_like(gumbel[:, 0]), None, []
        for now, disturbance in zip(noise.unbind(1), gumbel.unbind(1), strict=True):
            hidden, state = self.gru(torch.cat((now, output), 1)[:, None], state)
            output = self._sample(self.logits(hidden[:, 0]) + disturbance)
            outputs.append(output)
        return torch.stack(outputs, 1)

    def _sample(self, disturbed: Tensor) -> Tensor:
        soft = (disturbed / self.temperature).softmax(1)
        if not self.hard:
            return soft
        rounded = F.one_hot(disturbed.argmax(1), disturbed.size(1)).to(soft.dtype)
        return rounded + (soft - soft.detach())


class Critic(nn.Module):
    """Sequences (B, length, symbols) -> scores (B,): high means real."""

    def __init__(self, config: RecurrentGANConfig) -> None:
        super().__init__()
        self.gru = GRU(config.symbols, config.critic_width, batch_first=True, bidirectional=True)
        self.score = nn.Linear(2 * config.critic_width, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        hidden, _ = self.gru(sequences)
        scores: Tensor = self.score(hidden)
        return scores.mean((1, 2))


class RecurrentGAN(GenerativeModel):
    """The model described at the top of this file.

    Sources are (B, source_length), targets (B, target_length) int64: 1, characters from 3 on, 2, then padding with 0.

    Example:
        >>> model = RecurrentGAN(RecurrentGANConfig(vocabulary="ab", source_length=4, target_length=4))
        >>> len(model.draw(3, NoOptions()).texts)
        3
    """

    name, summary, kind = "recurrent-gan", "recurrent generator and critic of pairs of sequences", "sequences"
    default_data = "sums"
    config_class = RecurrentGANConfig
    train_defaults: ClassVar = {"steps": 2000, "batch_size": 64, "average_decay": 0.99}
    averaged = ("generator",)
    config: RecurrentGANConfig

    def __init__(self, config: RecurrentGANConfig) -> None:
        super().__init__(config)
        self.generator, self.critic = Generator(config), Critic(config)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas = (config.beta1, config.beta2)
        return (
            Phase("critic", ("critic",), config.critic_learning_rate, betas, repeats=config.critic_steps),
            Phase("generator", ("generator",), config.generator_learning_rate, betas),
        )

    def loss(self, phase: str, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """What ``phase`` minimises; mean scores of "real" and "fake" sequences, the "penalty"."""
        config = self.config
        real = self._sequences(batch)
        if phase == "generator":
            scores = self.critic(self._generate(len(real)))
            return {"loss": losses.generator_loss(scores, config.loss), "fake": scores.detach().float().mean()}
        with torch.no_grad():
            fake = self._generate(len(real)).to(real.dtype)
        with nullcontext() if config.penalty == "none" else torch.compiler.set_stance("force_eager"):
            return self._critic_loss(real, fake, moment)  # compiled code can't be differentiated twice

    def _critic_loss(self, real: Tensor, fake: Tensor, moment: Moment) -> dict[str, Tensor]:
        config, scaler = self.config, moment.scaler
        real.requires_grad_(config.penalty in ("r1", "r1-r2"))
        fake.requires_grad_(config.penalty == "r1-r2")
        real_scores, fake_scores = self.critic(real), self.critic(fake)
        values = {
            "loss": losses.discriminator_loss(real_scores, fake_scores, config.loss),
            "real": real_scores.detach().float().mean(),
            "fake": fake_scores.detach().float().mean(),
        }
        if config.penalty == "none":
            return values
        if config.penalty == "gradient":
            penalty = losses.gradient_penalty(self.critic, real, fake, scaler=scaler)
        else:
            penalty = losses.r1_penalty(real_scores, real, scaler=scaler)
        if config.penalty == "r1-r2":
            penalty = penalty + losses.r2_penalty(fake_scores, fake, scaler=scaler)
        return {**values, "loss": values["loss"] + config.penalty_weight * penalty, "penalty": penalty.detach()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The critic's scores (B,) of held-out sequences, "real", and of as many drawn ones, "fake".

        "well formed" (B,) is 1 where a drawn one has two sides of one character at least, each with its end, and
        nothing after that; else 0.
        """
        real = self._sequences(batch)
        fake = self._symbols(len(real), generator)
        ends = fake == STOP
        sides = ends.cumsum(1) - ends.long()  # 0 up to the first end, 1 up to the second, 2 after that
        empty = ends & torch.cat((torch.ones_like(ends[:, :1]), ends[:, :-1]), 1)
        formed = (ends.sum(1) == 2) & ~empty.any(1) & ((fake == BLANK) == (sides == 2)).all(1)
        scores = {"real": self.critic(real), "fake": self.critic(F.one_hot(fake, self.config.symbols).to(real.dtype))}
        return {**scores, "well formed": formed.to(real.dtype)}

    @torch.no_grad()
    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Texts:
        """n texts "source -> target". What is not well formed shows further ends as "|", padding inside as "_".

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        return Texts([self._spell(row) for row in self._symbols(n, generator).tolist()])

    def _spell(self, symbols: list[int]) -> str:
        while symbols and symbols[-1] == BLANK:
            symbols = symbols[:-1]
        if symbols.count(STOP) > 1 and symbols[-1] == STOP:
            symbols = symbols[:-1]
        characters = ("_", "|", *self.config.vocabulary)
        return "".join(characters[symbol] for symbol in symbols).replace("|", " -> ", 1)

    def _symbols(self, n: int, generator: torch.Generator | None) -> Tensor:
        """(n, length) int64, drawn."""
        return self._generate(n, generator).argmax(2)

    def _generate(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Outputs (n, length, symbols). A CPU generator gives the same noise to every device."""
        config, weight = self.config, self.generator.logits.weight
        device = weight.device if generator is None else generator.device
        noise = torch.randn(n, config.length, config.noise_dim, generator=generator, device=device)
        uniform = torch.rand(n, config.length, config.symbols, generator=generator, device=device)
        tiny = torch.finfo(torch.float32).tiny
        gumbel = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
        outputs: Tensor = self.generator(noise.to(weight), gumbel.to(weight))
        return outputs

    def _sequences(self, batch: Batch) -> Tensor:
        """One-hot vectors (B, length, symbols) of sources and targets."""
        sides = []
        for name, length in (("source", self.config.source_length), ("target", self.config.target_length)):
            tokens = batch[name]
            require_tensor(name, tokens)
            if tokens.dtype != torch.int64:
                raise TypeError(f"{name}: expected an int64 tensor, got {tokens.dtype}")
            require_shape(name, tokens, (*tokens.shape[:1], length), f"(B, {name}_length)")
            sides.append(tokens[:, 1:])
        source, target = sides
        place = (source != PADDING).sum(1, keepdim=True) + torch.arange(target.size(1), device=target.device)
        tokens = F.pad(source, (0, target.size(1))).scatter(1, place, target)
        one_hot = F.one_hot((tokens - 1).clamp(min=0), self.config.symbols)
        return one_hot.to(self.generator.logits.weight.dtype)
