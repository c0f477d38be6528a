"""Sound, sample by sample.

Van den Oord et al., "WaveNet: a generative model for raw audio" (2016): each sample is one of 256 levels, spaced by the
mu-law, and its probability depends on the samples before it by convolutions whose dilation doubles from layer to layer:

    samples before -> embedding + convolution -> layers -> sum of the layers' skips -> [ReLU, linear] twice -> numbers
    layer: x_t, x_{t - dilation} -> tanh(.) * sigmoid(.) -> skip, and x + (.) for the next layer

The numbers are 256 logits, or a mixture of logistic distributions whose probability a level's interval has; their
centre is then a linear prediction of the sample from the last ones, with coefficients that are among the numbers (Hwang
et al., "LP-WaveNet: linear prediction-based WaveNet speech synthesis", 2018): sound that goes on as it was needs no
more than coefficients that stay as they are. These and the convolution's weights are cosine transforms of what is
learnt: neighbouring samples are so alike that steps along the samples themselves would hardly tell pitches apart.

Before the first sample there is nothing: zeros, in every layer. The loss is the cross-entropy of the levels in nats per
sample. Levels are in ``_mu_law.py``, how sound is drawn with one small step per sample in
``_wavenet_layers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.batch import NEVER_IGNORED, require_audio, require_tokens
from fastgen.checks import (
    require_choice,
    require_count,
    require_positive,
    require_positive_number,
    require_probability,
)
from fastgen.models._mu_law import (
    LARGEST,
    LEVELS,
    SMALLEST,
    heights,
    inverse_mu_law,
    level_borders,
    logistics_level_logits,
    logistics_log_prob,
    mu_law,
)
from fastgen.models._wavenet_layers import CalledLayerSteps, GatedLayer, LayerSteps, cosines, may_be_fused
from fastgen.models.base import Batch, GenerativeModel, Phase, Sounds, StepContext, option
from fastgen.models.decoding import Chooser
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._sublayers import is_pointwise

Output = Literal["logistics", "levels"]
SCORED = 1 << 16  # samples that are judged at once: their logits are 64 MiB
COEFFICIENT = 0.1  # of the prediction, for a number of 1


@dataclass(frozen=True)
class WaveNetConfig:
    """Sizes of a WaveNet and how it learns. ValueError names the field, what was expected and what came."""

    sample_rate: int = option(8000, "samples a second", from_data=True)
    length: int = option(8000, "samples of a sound", from_data=True)
    channels: int = option(32, "channels of a layer")
    skip_channels: int = option(64, "channels of the layers' sum")
    cycle: int = option(10, "layers until the dilation is 1 again: 1, 2, 4, ...")
    cycles: int = option(1, "times the dilations are gone through")
    reach: int = option(80, "samples that the first convolution and the linear prediction look at")
    output: Output = option("logistics", "what says how likely a level is: a mixture of logistics, or 256 logits")
    components: int = option(4, "logistics of a mixture")
    crop: int = option(1000, "samples of each sound that a step predicts; 0: all")
    learning_rate: float = option(4e-3, "of AdamW")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.99, "of AdamW")

    def __post_init__(self) -> None:
        for name in (
            *("sample_rate", "length", "channels", "skip_channels"),
            *("cycle", "cycles", "reach", "components"),
        ):
            require_positive(name, getattr(self, name))
        require_choice("output", self.output, get_args(Output))
        if self.cycle > 16:
            raise ValueError(f"cycle: expected at most 16, dilations up to 32768, got {self.cycle}")
        require_count("crop", self.crop, 0)
        for name in ("beta1", "beta2"):
            require_probability(name, getattr(self, name))
        require_positive_number(learning_rate=self.learning_rate)

    @property
    def dilations(self) -> list[int]:
        return [1 << i for i in range(self.cycle)] * self.cycles

    @property
    def field(self) -> int:
        """Samples that a prediction depends on."""
        return self.reach + sum(self.dilations)


@dataclass(frozen=True)
class SoundOptions:
    """How sounds are drawn. ValueError names the field, what was expected and what came."""

    seconds: float = option(0.0, "how long; 0: as the sounds it learnt from")
    temperature: float = option(1.0, "divides the logits; 0: always the likeliest sample")

    def __post_init__(self) -> None:
        for name in ("seconds", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")


class _Layers(nn.ModuleList):
    def __iter__(self) -> Iterator[GatedLayer]:  # type: ignore[override]
        return cast(Iterator[GatedLayer], super().__iter__())


class WaveNet(ComputedBuffers, GenerativeModel):
    """The model described at the top of this file. Audio is (B, length) in [-1, 1].

    Example:
        >>> model = WaveNet(WaveNetConfig(length=50, channels=4, skip_channels=4, cycle=3))
        >>> model(torch.zeros(2, 50, dtype=torch.int64)).shape
        torch.Size([2, 50, 256])
        >>> model.draw(2, SoundOptions()).waves.shape
        torch.Size([2, 50])
    """

    name, summary, kind = "wavenet", "dilated causal convolutions over samples of sound", "audio"
    default_data = "tones"
    config_class, sampling_class = WaveNetConfig, SoundOptions
    train_defaults: ClassVar = {
        "steps": 3500,
        "batch_size": 4,
        "schedule": "cosine",
        "warmup": 50,
        "clip": 1.0,
        "average_decay": 0.998,
        "evaluate_every": 1750,
        "sample_every": 1750,
    }
    config: WaveNetConfig
    borders: Tensor
    cosines: Tensor

    def __init__(self, config: WaveNetConfig) -> None:
        super().__init__(config)
        dilations = config.dilations
        self.embedding = nn.Embedding(LEVELS, config.channels)
        self.front = nn.Linear(config.reach, config.channels, bias=False)
        last = len(dilations) - 1
        self.layers = _Layers(GatedLayer(config, dilation, i == last) for i, dilation in enumerate(dilations))
        self.hidden = nn.Linear(config.skip_channels, config.skip_channels)
        mixture = config.output == "logistics"
        self.numbers = nn.Linear(config.skip_channels, config.reach + 3 * config.components if mixture else LEVELS)
        self._register_computed()
        self._initialise()

    def _computed(self) -> dict[str, Tensor]:
        return {"borders": level_borders(), "cosines": cosines(self.config.reach)}

    def _initialise(self) -> None:
        """Levels begin almost alike; a mixture about the sample before."""
        config, numbers = self.config, self.numbers
        nn.init.normal_(self.embedding.weight, std=0.05)
        if config.output == "logistics":
            with torch.no_grad():
                numbers.weight.mul_(0.1)
                numbers.bias.zero_()
                _, offset, log_scale, _ = self._split(numbers.bias)
                offset.copy_(torch.linspace(-1, 1, config.components))
                log_scale.fill_(-4.0)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        return (Phase("sound", (), config.learning_rate, (config.beta1, config.beta2)),)

    def forward(self, levels: Tensor, length: int | None = None) -> Tensor:
        """Logits (B, length, 256) of the last ``length`` samples (default: all), each given those before it.

        Args:
            levels: (B, N) int64, from 0 to 255. What was before them counts as nothing; predictions that reach back
                to it, those of the first ``config.field``, take the first sample for the beginning of the sound.

        Raises:
            TypeError: levels are no int64 tensor. ValueError: they are not (B, N), or N is less than length.
        """
        require_tokens("levels", levels, LEVELS)
        length = levels.size(-1) if length is None else length
        if levels.dim() != 2 or not 1 <= length <= levels.size(1):
            raise ValueError(f"levels: expected (B, N) with N at least length = {length}, got {tuple(levels.shape)}")
        numbers = self._numbers(levels, length)
        if self.config.output == "levels":
            return numbers
        mixture = self._mixture(numbers, self._before(inverse_mu_law(levels), length))
        return logistics_level_logits(*mixture, self.borders)

    def _numbers(self, levels: Tensor, length: int) -> Tensor:
        """(B, length, .) for the last samples."""
        x = F.pad(self.embedding(levels[:, :-1]), (0, 0, 1, 0))  # what comes before each sample
        x = x + self.front(self._before(heights(levels), levels.size(1)) @ self.cosines.t())
        reach = sum(self.config.dilations)
        total: Tensor | None = None
        for layer in self.layers:
            reach -= layer.dilation
            x, skip = layer(x, min(x.size(1), length + reach))
            skip = skip[:, -length:]
            total = skip if total is None else total + skip
        assert total is not None
        return self._head(total)

    def _before(self, samples: Tensor, length: int) -> Tensor:
        """The ``reach`` samples before each of the last ``length`` ones, (B, length, reach); zeros where none are."""
        reach = self.config.reach
        windows = F.pad(samples[:, :-1], (reach, 0)).unfold(1, reach, 1)
        return windows[:, -length:].to(next(self.parameters()).dtype)

    def _head(self, total: Tensor) -> Tensor:
        numbers: Tensor = self.numbers(self.hidden(total.relu()).relu())
        return numbers.to(torch.promote_types(numbers.dtype, torch.float32))  # whatever autocast chose

    def _split(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Coefficients of the prediction, and each component's offset, log of its scale and logit."""
        parts: tuple[Tensor, ...] = numbers.split((self.config.reach, *(self.config.components,) * 3), -1)
        return parts

    def _mixture(self, numbers: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centres, logs of scales and logits, given the samples before each. Offsets count in scales."""
        coefficients, offset, log_scale, weight = self._split(numbers)
        log_scale = log_scale.clamp(SMALLEST, LARGEST)
        with torch.autocast(numbers.device.type, enabled=False):  # 8 bits would be too few for a prediction
            coefficients = COEFFICIENT * (coefficients @ self.cosines.to(coefficients.dtype))
        prediction = before[..., -1:] + (coefficients * before).sum(-1, keepdim=True)
        return prediction + offset * log_scale.exp(), log_scale, weight

    def _nll(self, levels: Tensor, length: int) -> Tensor:
        """-log p of the last samples, (B, length), float32 whatever autocast chose."""
        numbers, wanted = self._numbers(levels, length), levels[:, -length:]
        if self.config.output == "levels":
            nll = F.cross_entropy(numbers.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=NEVER_IGNORED)
            return nll.view(-1, length)
        mixture = self._mixture(numbers, self._before(inverse_mu_law(levels), length))
        low, high = self.borders[wanted], self.borders[wanted + 1]
        return -logistics_log_prob(*mixture, low, high)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss: nats per sample, over ``crop`` samples from a random one on, the same in all sounds.

        One that would begin before the sound begins with it, or else its first samples would hardly ever be learnt.
        """
        audio = self._checked(batch["audio"])
        crop, total = self.config.crop or self.config.length, self.config.length
        start = max(0, int(torch.randint(min(0, 1 - crop), max(1, total - crop + 1), ())))
        window = audio[:, max(0, start - self.config.field) : start + crop]
        levels, flaw = self._read(window)
        return {"loss": (self._nll(levels, min(crop, total)) + flaw[:, None]).mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): nats of a sound, in 256 levels. tokens (B,): its samples."""
        levels, flaw = self._read(self._checked(batch["audio"]))
        length = self.config.length
        parts = levels.split(max(1, SCORED // length))
        nll = torch.cat([self._nll(part, length).double().sum(1) for part in parts])
        return {"nll": nll + flaw, "tokens": torch.full_like(nll, length)}

    @torch.no_grad()
    def draw(self, n: int, options: SoundOptions, *, generator: torch.Generator | None = None) -> Sounds:
        """n sounds.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        length = max(1, round(options.seconds * self.config.sample_rate)) if options.seconds else self.config.length
        with torch.autocast(self.device.type, enabled=False):
            levels = self._draw(n, length, options.temperature, generator)
        return Sounds(inverse_mu_law(levels), self.config.sample_rate)

    def _draw(self, n: int, length: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """(n, length) int64."""
        config, weight = self.config, next(self.parameters())
        layers = list(self.layers)
        steps = LayerSteps(layers, n) if may_be_fused(layers) else CalledLayerSteps(layers)
        every = torch.arange(LEVELS, device=weight.device)
        height_of, sample_of = (of(every).to(weight.dtype) for of in (heights, inverse_mu_law))
        seen, heard = (weight.new_zeros(n, config.reach + length) for _ in range(2))
        front: Tensor | None = None
        if is_pointwise(self.front) and self.front.bias is None:
            front = (self.front.weight @ self.cosines).t().contiguous()
        x = weight.new_zeros(n, config.channels)
        levels = torch.empty(n, length, dtype=torch.int64, device=weight.device)
        chooser = Chooser(temperature, generator)
        for time in range(length):
            now = time + config.reach
            before = seen[:, time:now]
            first = x + self.front(before @ self.cosines.t()) if front is None else torch.addmm(x, before, front)
            logits = self._head(steps.step(first))
            if config.output == "logistics":
                mixture = self._mixture(logits, heard[:, time:now])
                logits = logistics_level_logits(*mixture, self.borders)
            level = chooser(logits)
            levels[:, time], seen[:, now], heard[:, now] = level, height_of[level], sample_of[level]
            x = self.embedding(level)
        chooser.check()
        return levels

    @staticmethod
    def _read(audio: Tensor) -> tuple[Tensor, Tensor]:
        """Levels of samples (B, N), and (B,) 0, or NaN where samples are NaN or infinite and so have no level."""
        return mu_law(audio.nan_to_num()), 0 * audio.sum(1)

    def _checked(self, audio: Tensor) -> Tensor:
        require_audio("audio", audio, self.config.length)
        return audio
