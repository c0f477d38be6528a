"""Sound, sample by sample.

Van den Oord et al., "WaveNet: a generative model for raw audio" (2016): each sample is one of 256 levels, spaced by the
mu-law (ITU-T G.711), and its probability depends on the samples before it by convolutions whose dilation doubles from
layer to layer:

    samples before -> embedding -> layers -> sum of the layers' skips -> [ReLU, linear] twice -> 256 logits
    layer: x_t, x_{t - dilation} -> tanh(.) * sigmoid(.) -> skip, and x + (.) for the next layer

Before the first sample there is nothing: zeros, in every layer. The loss is the cross-entropy in nats per sample. A
layer needs just one value from ``dilation`` samples ago, which sound as it is drawn keeps in a ring (Le Paine et al.,
"Fast WaveNet generation algorithm", 2016).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen._checks import require_floating, require_positive, require_probability, require_shape, require_tensor
from fastgen.models._base import Batch, GenerativeModel, Moment, Phase, Sounds, option
from fastgen.models._tokens import choose

LEVELS = 256
SCORED = 1 << 16  # samples that are judged at once: their logits are 64 MiB


@dataclass(frozen=True)
class WaveNetConfig:
    """Sizes of a WaveNet and how it learns. ValueError names the field, what was expected and what came."""

    sample_rate: int = option(8000, "samples a second", from_data=True)
    length: int = option(8000, "samples of a sound", from_data=True)
    channels: int = option(32, "channels of a layer")
    skip_channels: int = option(64, "channels of the layers' sum")
    cycle: int = option(8, "layers until the dilation is 1 again: 1, 2, 4, ...")
    cycles: int = option(2, "times the dilations are gone through")
    crop: int = option(1000, "samples of each sound that a step predicts; 0: all")
    learning_rate: float = option(5e-3, "of AdamW")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.99, "of AdamW")

    def __post_init__(self) -> None:
        for name in ("sample_rate", "length", "channels", "skip_channels", "cycle", "cycles"):
            require_positive(name, getattr(self, name))
        if self.cycle > 16:
            raise ValueError(f"cycle: expected at most 16, dilations up to 32768, got {self.cycle}")
        if isinstance(self.crop, bool) or not isinstance(self.crop, int) or self.crop < 0:
            raise ValueError(f"crop: expected an integer >= 0, got {self.crop!r}")
        for name in ("beta1", "beta2"):
            require_probability(name, getattr(self, name))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")

    @property
    def dilations(self) -> list[int]:
        return [1 << i for i in range(self.cycle)] * self.cycles

    @property
    def field(self) -> int:
        """Samples that a prediction depends on."""
        return 1 + sum(self.dilations)


@dataclass(frozen=True)
class SoundOptions:
    """How sounds are drawn. ValueError names the field, what was expected and what came."""

    seconds: float = option(0.0, "how long; 0: as the sounds it learnt from")
    temperature: float = option(1.0, "divides the logits; 0: always the likeliest sample")

    def __post_init__(self) -> None:
        for name in ("seconds", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")


def mu_law(audio: Tensor) -> Tensor:
    """Levels (int64, 0 to 255) of samples in [-1, 1]: even steps of sign(x) log(1 + 255 |x|) / log 256."""
    mu = LEVELS - 1
    audio = audio.clamp(-1, 1)
    compressed = audio.sign() * torch.log1p(mu * audio.abs()) / math.log1p(mu)
    return ((compressed + 1) * (0.5 * mu) + 0.5).floor().long()


def inverse_mu_law(levels: Tensor) -> Tensor:
    """Samples in [-1, 1], float32, of levels."""
    mu = LEVELS - 1
    compressed = 2 * levels.float() / mu - 1
    return compressed.sign() * torch.expm1(compressed.abs() * math.log1p(mu)) / mu


class GatedLayer(nn.Module):
    """A dilated causal convolution of two taps, its gate, and what becomes of it.

    ``last``: nothing comes after it but the sum of the skips.
    """

    def __init__(self, config: WaveNetConfig, dilation: int, last: bool) -> None:
        super().__init__()
        self.dilation, self.channels = dilation, 0 if last else config.channels
        self.taps = nn.Linear(2 * config.channels, 2 * config.channels)
        self.out = nn.Linear(config.channels, self.channels + config.skip_channels)

    def forward(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """x (B, N, channels) -> the same and the skip (B, ., skip_channels), of the last ``length`` samples.

        Where x does not reach back far enough, there are zeros.
        """
        missing = max(0, length + self.dilation - x.size(1))
        past = F.pad(x, (0, 0, missing, 0)) if missing else x
        past = past[:, -length - self.dilation : -self.dilation]
        return self.step(past, x[:, -length:])

    def step(self, past: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """Of samples (..., channels) and those ``dilation`` before."""
        filtered, gate = self.taps(torch.cat((past, now), -1)).chunk(2, -1)
        out: Tensor = self.out(filtered.tanh() * gate.sigmoid())
        change, skip = out.split((self.channels, out.size(-1) - self.channels), -1)
        return now + change if self.channels else now, skip


class _Layers(nn.ModuleList):
    def __iter__(self) -> Iterator[GatedLayer]:  # type: ignore[override]
        return cast(Iterator[GatedLayer], super().__iter__())


class WaveNet(GenerativeModel):
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
        "steps": 1500,
        "batch_size": 4,
        "schedule": "cosine",
        "warmup": 50,
        "clip": 1.0,
        "average_decay": 0.998,
        "evaluate_every": 750,
        "sample_every": 500,
    }
    config: WaveNetConfig

    def __init__(self, config: WaveNetConfig) -> None:
        super().__init__(config)
        dilations = config.dilations
        self.embedding = nn.Embedding(LEVELS, config.channels)
        self.number = nn.Linear(1, config.channels, bias=False)
        last = len(dilations) - 1
        self.layers = _Layers(GatedLayer(config, dilation, i == last) for i, dilation in enumerate(dilations))
        self.hidden = nn.Linear(config.skip_channels, config.skip_channels)
        self.logits = nn.Linear(config.skip_channels, LEVELS)

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
        require_tensor("levels", levels)
        if levels.dtype != torch.int64:
            raise TypeError(f"levels: expected an int64 tensor, got {levels.dtype}")
        length = levels.size(-1) if length is None else length
        if levels.dim() != 2 or not 1 <= length <= levels.size(1):
            raise ValueError(f"levels: expected (B, N) with N at least length = {length}, got {tuple(levels.shape)}")
        x = F.pad(self._embed(levels[:, :-1]), (0, 0, 1, 0))  # what comes before each sample
        reach = sum(self.config.dilations)
        total: Tensor | None = None
        for layer in self.layers:
            reach -= layer.dilation
            x, skip = layer(x, min(x.size(1), length + reach))
            skip = skip[:, -length:]
            total = skip if total is None else total + skip
        assert total is not None
        return self._head(total)

    def _embed(self, levels: Tensor) -> Tensor:
        """A learned vector of each level, and one times its height: neighbouring levels begin alike."""
        height = levels.to(self.number.weight.dtype) / (LEVELS / 2) - 1
        x: Tensor = self.embedding(levels) + self.number(height[..., None])
        return x

    def _head(self, total: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.hidden(total.relu()).relu())
        return logits

    def _nll(self, levels: Tensor, length: int) -> Tensor:
        """-log p of the last samples, (B, length), float32 whatever autocast chose."""
        logits = self(levels, length)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits.flatten(0, 1), levels[:, -length:].flatten(), reduction="none")
        return nll.view(-1, length)

    def loss(self, phase: str, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """loss: nats per sample, over ``crop`` samples from a random one on, the same in all sounds."""
        audio = self._checked(batch["audio"])
        crop, total = self.config.crop or self.config.length, self.config.length
        start = int(torch.randint(0, max(1, total - crop + 1), ()))
        window = audio[:, max(0, start + 1 - self.config.field) : start + crop]
        return {"loss": self._nll(mu_law(window), min(crop, total)).mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): nats of a sound, in 256 levels. tokens (B,): its samples."""
        levels = mu_law(self._checked(batch["audio"]))
        length = self.config.length
        parts = levels.split(max(1, SCORED // length))
        nll = torch.cat([self._nll(part, length).double().sum(1) for part in parts])
        return {"nll": nll, "tokens": torch.full_like(nll, length)}

    @torch.no_grad()
    def draw(self, n: int, options: SoundOptions, *, generator: torch.Generator | None = None) -> Sounds:
        """n sounds.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        length = max(1, round(options.seconds * self.config.sample_rate)) if options.seconds else self.config.length
        rings = [self.embedding.weight.new_zeros(layer.dilation, n, self.config.channels) for layer in self.layers]
        x = self.embedding.weight.new_zeros(n, self.config.channels)
        levels = []
        for time in range(length):
            levels.append(choose(self._next_logits(x, time, rings), options.temperature, generator))
            x = self._embed(levels[-1])
        return Sounds(inverse_mu_law(torch.stack(levels, 1)), self.config.sample_rate)

    def _next_logits(self, x: Tensor, time: int, rings: list[Tensor]) -> Tensor:
        """(B, 256), of sample ``time``, given the one before it as x (B, channels) and the layers' past in rings."""
        total: Tensor | None = None
        for layer, ring in zip(self.layers, rings, strict=True):
            place = ring[time % layer.dilation]
            past = place.clone()
            place.copy_(x)
            x, skip = layer.step(past, x)
            total = skip if total is None else total + skip
        assert total is not None
        return self._head(total)

    def _checked(self, audio: Tensor) -> Tensor:
        require_tensor("audio", audio)
        require_floating("audio", audio)
        require_shape("audio", audio, (*audio.shape[:1], self.config.length), "(B, length)")
        return audio
