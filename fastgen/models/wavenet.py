"""WaveNet: an autoregressive model of audio samples.

Van den Oord et al., "WaveNet: a generative model for raw audio" (2016): each sample is one of 256 mu-law levels, whose
distribution depends on the samples before it through causal convolutions. Their dilation doubles from layer to layer:

    previous samples -> embedding + convolution -> layers -> sum of the layers' skips -> [ReLU, linear] twice -> outputs
    layer: x_t, x_{t - dilation} -> tanh(.) * sigmoid(.) -> skip, and x + (.) for the next layer

The outputs are 256 logits, or the parameters of a mixture of logistics that is integrated over each level's interval.
The mean of the mixture is a linear prediction from the last samples, whose coefficients are among the outputs (Hwang et
al., "LP-WaveNet: linear prediction-based WaveNet speech synthesis", 2018): those of a stationary sound are constant.
Coefficients and weights of the first convolution are learned as their cosine transforms: neighbouring samples are so
correlated that gradient steps on the samples' own weights would hardly distinguish pitches.

Samples before the first one are zeros, in every layer. The loss is the cross-entropy of the levels, in nats per sample.

In this file: config, mu-law and mixture, layers, network and loss, sampling with one small step per sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

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
from fastgen.functional._autocast import without_autocast
from fastgen.models.base import Batch, GenerativeModel, Phase, Sounds, StepContext, option, upcast
from fastgen.models.decoding import Chooser
from fastgen.models.registry import register_model
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._sublayers import is_pointwise, is_unhooked, weight_and_bias

Output = Literal["logistics", "levels"]
LEVELS = 256
MIN_LOG_SCALE, MAX_LOG_SCALE = -10.0, 3.0  # of a logistic; the narrowest levels are 2e-4 wide
SCORE_CHUNK = 1 << 16  # samples that are scored at once: their logits are 64 MiB
COEFFICIENT = 0.1  # coefficient of the linear prediction for an output of 1


@dataclass(frozen=True)
class WaveNetConfig:
    """Configuration of a ``WaveNet``.

    Raises:
        ValueError: an option out of range.
    """

    sample_rate: int = option(8000, "samples per second", from_data=True)
    length: int = option(8000, "number of samples of a sound", from_data=True)
    channels: int = option(32, "number of residual channels")
    skip_channels: int = option(64, "number of skip channels")
    cycle: int = option(10, "number of layers per cycle of dilations 1, 2, 4, ...")
    cycles: int = option(1, "number of cycles of dilations")
    reach: int = option(80, "number of samples in the first convolution and the linear prediction")
    output: Output = option("logistics", "output distribution: a mixture of logistics, or 256 logits")
    components: int = option(4, "number of mixture components")
    crop: int = option(1000, "number of predicted samples of each sound per training step; 0: all")
    learning_rate: float = option(4e-3, "AdamW learning rate")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.99, "AdamW beta2")

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
        """Receptive field: number of samples that a prediction depends on."""
        return self.reach + sum(self.dilations)


@dataclass(frozen=True)
class SoundOptions:
    """Sampling options of a ``WaveNet``.

    Raises:
        ValueError: an option out of range.
    """

    seconds: float = option(0.0, "duration in seconds; 0: that of the training sounds")
    temperature: float = option(1.0, "sampling temperature; 0: greedy")

    def __post_init__(self) -> None:
        for name in ("seconds", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")


# --------------------------------------------------------------------------------------------------
# Levels and their probabilities


def mu_law(audio: Tensor) -> Tensor:
    """Samples in [-1, 1] -> levels, int64 in 0 .. 255, uniform in sign(x) log(1 + 255 |x|) / log 256 (ITU-T G.711)."""
    mu = LEVELS - 1
    audio = audio.clamp(-1, 1)
    compressed = audio.sign() * torch.log1p(mu * audio.abs()) / math.log1p(mu)
    return ((compressed + 1) * (0.5 * mu) + 0.5).floor().long()


def companded(levels: Tensor) -> Tensor:
    """Levels -> companded samples in [-1, 1], float32: 2 level / 255 - 1."""
    return 2 * levels.float() / (LEVELS - 1) - 1


def inverse_mu_law(levels: Tensor) -> Tensor:
    """Levels, or positions between levels -> samples in [-1, 1], float32."""
    mu = LEVELS - 1
    compressed = companded(levels)
    return compressed.sign() * torch.expm1(compressed.abs() * math.log1p(mu)) / mu


def level_borders() -> Tensor:
    """Borders of the levels' intervals, (257,) float32; the first and last stand for -inf and inf."""
    between = inverse_mu_law(torch.arange(LEVELS - 1) + 0.5)
    return torch.cat((torch.tensor([-1e6]), between, torch.tensor([1e6])))


def logistics_log_prob(centre: Tensor, log_scale: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """log P(low < sample < high) of a mixture of logistics.

    Salimans et al., "PixelCNN++: improving the PixelCNN with discretized logistic mixture likelihood" (2017). The
    identity sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)) is accurate in both tails.

    Args:
        centre, log_scale, weight: means, log scales and logits of the components, (..., components).
        low, high: ends of the interval, (...).
    """
    precision = torch.exp(-log_scale)
    below, above = (low[..., None] - centre) * precision, (high[..., None] - centre) * precision
    # Not from above - below, which is 0 in floating point if the centre is far away.
    width = torch.log(-torch.expm1((low - high)[..., None] * precision))
    log_prob = F.logsigmoid(above) + F.logsigmoid(-below) + width
    return torch.logsumexp(log_prob + weight.log_softmax(-1), -1)


def logistics_level_logits(centre: Tensor, log_scale: Tensor, weight: Tensor, borders: Tensor) -> Tensor:
    """``logistics_log_prob`` of all levels, (..., 256), with one sigmoid per border."""
    precision = torch.exp(-log_scale)[..., None, :]
    places = (borders[:, None] - centre[..., None, :]) * precision
    width = torch.log(-torch.expm1((borders[:-1] - borders[1:])[:, None] * precision))
    tail = F.logsigmoid(places)
    log_prob = tail[..., 1:, :] + (tail - places)[..., :-1, :] + width
    return torch.logsumexp(log_prob + weight.log_softmax(-1)[..., None, :], -1)


def cosine_transform(n: int) -> Tensor:
    """The orthonormal DCT-II, (n, n); row k has k half waves."""
    angle = math.pi / n * torch.outer(torch.arange(n), torch.arange(n) + 0.5)
    scale = torch.full((n, 1), math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    return scale * angle.cos()


# --------------------------------------------------------------------------------------------------
# Layers


class GatedLayer(nn.Module):
    """Gated dilated causal convolution of two taps, with residual and skip outputs.

    Args:
        config: channels and skip_channels.
        dilation: distance of the taps, in samples.
        last: whether this is the last layer, which has no residual output.
    """

    def __init__(self, config: Any, dilation: int, last: bool) -> None:
        super().__init__()
        self.dilation, self.channels = dilation, 0 if last else config.channels
        self.taps = nn.Linear(2 * config.channels, 2 * config.channels)
        self.out = nn.Linear(config.channels, self.channels + config.skip_channels)

    def forward(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """x (B, N, channels) -> output (B, length, channels) and skip (B, length, skip_channels) of the last samples.

        x is padded with zeros on the left if it is shorter than length + dilation.
        """
        missing = max(0, length + self.dilation - x.size(1))
        past = F.pad(x, (0, 0, missing, 0)) if missing else x
        past = past[:, -length - self.dilation : -self.dilation]
        return self.step(past, x[:, -length:])

    def step(self, past: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """Output and skip for samples ``now`` (..., channels) and those ``dilation`` before, ``past``."""
        filtered, gate = self.taps(torch.cat((past, now), -1)).chunk(2, -1)
        out: Tensor = self.out(filtered.tanh() * gate.sigmoid())
        change, skip = out.split((self.channels, out.size(-1) - self.channels), -1)
        return now + change if self.channels else now, skip


class _Layers(nn.ModuleList):
    def __iter__(self) -> Iterator[GatedLayer]:  # type: ignore[override]
        return cast(Iterator[GatedLayer], super().__iter__())


@register_model
class WaveNet(ComputedBuffers, GenerativeModel):
    """Dilated causal convolutions over mu-law audio, with cached sampling. Audio is (B, length) in [-1, 1].

    Example:
        >>> model = WaveNet(WaveNetConfig(length=50, channels=4, skip_channels=4, cycle=3))
        >>> model(torch.zeros(2, 50, dtype=torch.int64)).shape
        torch.Size([2, 50, 256])
        >>> model.draw(2, SoundOptions()).waves.shape
        torch.Size([2, 50])
    """

    name, summary, kind = "wavenet", "dilated causal convolutions over audio samples", "audio"
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
        self._init_weights()

    def _computed(self) -> dict[str, Tensor]:
        return {"borders": level_borders(), "cosines": cosine_transform(self.config.reach)}

    def _init_weights(self) -> None:
        """Small embeddings; mixtures start around the previous sample."""
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
        """Logits (B, length, 256) of the last ``length`` samples (default: all), each given the ones before it.

        Args:
            levels: (B, N) int64, from 0 to 255. The first sample is taken for the beginning of the sound, which matters
                for predictions of the first ``config.field`` samples.

        Raises:
            TypeError: levels are not an int64 tensor. ValueError: they are not (B, N), or N is less than length.
        """
        require_tokens("levels", levels, LEVELS)
        length = levels.size(-1) if length is None else length
        if levels.dim() != 2 or not 1 <= length <= levels.size(1):
            raise ValueError(f"levels: expected (B, N) with N at least length = {length}, got {tuple(levels.shape)}")
        outputs = self._outputs(levels, length)
        if self.config.output == "levels":
            return outputs
        mixture = self._mixture(outputs, self._before(inverse_mu_law(levels), length))
        return logistics_level_logits(*mixture, self.borders)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As ``nn.Module.compile``, of the outputs that ``loss`` uses: ``forward`` turns them into 256 logits."""
        self._outputs = torch.compile(self._outputs, *args, **kwargs)  # type: ignore[method-assign]

    def _outputs(self, levels: Tensor, length: int) -> Tensor:
        """Outputs (B, length, .) for the last samples."""
        x = F.pad(self.embedding(levels[:, :-1]), (0, 0, 1, 0))  # the sample before each
        x = x + self.front(self._before(companded(levels), levels.size(1)) @ self.cosines.t())
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
        """The ``reach`` samples before each of the last ``length`` ones, (B, length, reach), padded with zeros."""
        reach = self.config.reach
        windows = F.pad(samples[:, :-1], (reach, 0)).unfold(1, reach, 1)
        return windows[:, -length:].to(next(self.parameters()).dtype)

    def _head(self, total: Tensor) -> Tensor:
        outputs: Tensor = self.numbers(self.hidden(total.relu()).relu())
        return upcast(outputs)  # under autocast, too

    def _split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Coefficients of the linear prediction; offset, log scale and logit of each component."""
        parts: tuple[Tensor, ...] = outputs.split((self.config.reach, *(self.config.components,) * 3), -1)
        return parts

    def _mixture(self, outputs: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means, log scales and logits of the components, given the samples before. Offsets are multiples of scales."""
        coefficients, offset, log_scale, weight = self._split(outputs)
        log_scale = log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)
        with without_autocast(outputs.device):  # bfloat16 is too coarse for a prediction
            coefficients = COEFFICIENT * (coefficients @ self.cosines.to(coefficients.dtype))
        prediction = before[..., -1:] + (coefficients * before).sum(-1, keepdim=True)
        return prediction + offset * log_scale.exp(), log_scale, weight

    def _nll(self, levels: Tensor, length: int) -> Tensor:
        """-log p of the last samples, (B, length), in float32 at least."""
        outputs, target = self._outputs(levels, length), levels[:, -length:]
        if self.config.output == "levels":
            nll = F.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction="none", ignore_index=NEVER_IGNORED)
            return nll.view(-1, length)
        mixture = self._mixture(outputs, self._before(inverse_mu_law(levels), length))
        low, high = self.borders[target], self.borders[target + 1]
        return -logistics_log_prob(*mixture, low, high)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss: nats per sample, over a random crop of ``crop`` samples, the same in all sounds.

        Crops that would start before the sound start with it, so that its first samples are trained as often as others.
        """
        audio = self._checked(batch["audio"])
        crop, total = self.config.crop or self.config.length, self.config.length
        start = max(0, int(torch.randint(min(0, 1 - crop), max(1, total - crop + 1), ())))
        window = audio[:, max(0, start - self.config.field) : start + crop]
        levels, flaw = self._read(window)
        return {"loss": (self._nll(levels, min(crop, total)) + flaw[:, None]).mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): nats of a sound, in 256 levels. tokens (B,): its number of samples."""
        levels, flaw = self._read(self._checked(batch["audio"]))
        length = self.config.length
        parts = levels.split(max(1, SCORE_CHUNK // length))
        nll = torch.cat([self._nll(part, length).double().sum(1) for part in parts])
        return {"nll": nll + flaw, "tokens": torch.full_like(nll, length)}

    @torch.no_grad()
    def draw(self, n: int, options: SoundOptions, *, generator: torch.Generator | None = None) -> Sounds:
        """Samples n sounds.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        length = max(1, round(options.seconds * self.config.sample_rate)) if options.seconds else self.config.length
        with without_autocast(self.device):
            levels = self._sample(n, length, options.temperature, generator)
        return Sounds(inverse_mu_law(levels), self.config.sample_rate)

    def _sample(self, n: int, length: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """(n, length) int64."""
        config, weight = self.config, next(self.parameters())
        layers = list(self.layers)
        steps = LayerSteps(layers, n) if may_be_fused(layers) else CalledLayerSteps(layers)
        every = torch.arange(LEVELS, device=weight.device)
        companded_of, sample_of = (of(every).to(weight.dtype) for of in (companded, inverse_mu_law))
        inputs, samples = (weight.new_zeros(n, config.reach + length) for _ in range(2))
        front: Tensor | None = None
        if is_pointwise(self.front) and self.front.bias is None:
            front = (self.front.weight @ self.cosines).t().contiguous()
        x = weight.new_zeros(n, config.channels)
        levels = torch.empty(n, length, dtype=torch.int64, device=weight.device)
        chooser = Chooser(temperature, generator)
        for time in range(length):
            now = time + config.reach
            before = inputs[:, time:now]
            first = x + self.front(before @ self.cosines.t()) if front is None else torch.addmm(x, before, front)
            logits = self._head(steps.step(first))
            if config.output == "logistics":
                mixture = self._mixture(logits, samples[:, time:now])
                logits = logistics_level_logits(*mixture, self.borders)
            level = chooser(logits)
            levels[:, time], inputs[:, now], samples[:, now] = level, companded_of[level], sample_of[level]
            x = self.embedding(level)
        chooser.check()
        return levels

    @staticmethod
    def _read(audio: Tensor) -> tuple[Tensor, Tensor]:
        """Levels of samples (B, N), and a term of the loss (B,): 0, or NaN for samples that are NaN or infinite."""
        return mu_law(audio.nan_to_num()), 0 * audio.sum(1)

    def _checked(self, audio: Tensor) -> Tensor:
        require_audio("audio", audio, self.config.length)
        return audio


# --------------------------------------------------------------------------------------------------
# Layers for one sample at a time


class LayerSteps:
    """All layers one sample at a time, for ``batch`` sounds that begin with zeros.

    Each layer keeps its last ``dilation`` inputs in a ring buffer (Le Paine et al., "Fast WaveNet generation
    algorithm", 2016). Calls of this size cost more than their arithmetic, so there are few: one batched product for the
    past taps of all layers, two products per layer, one for all skips. The gate is tanh(f) * sigmoid(g) =
    tanh(f) * (1 + tanh(g / 2)) / 2, its constants folded into the weights; biases multiply a column of ones.
    """

    def __init__(self, layers: Sequence[GatedLayer], batch: int) -> None:
        of_taps, of_out = ([weight_and_bias(part) for part in parts] for parts in _parts(layers))
        weight = of_taps[0][0]
        depth, channels = len(layers), weight.size(1) // 2
        half = torch.cat((weight.new_ones(channels), weight.new_full((channels,), 0.5)))  # g / 2 of the gate
        taps = [weight.detach() * half[:, None] for weight, _ in of_taps]
        self.past_weight = torch.stack([tap[:, :channels].t() for tap in taps])
        self.bias = torch.stack([(_required(bias).detach() * half)[None] for _, bias in of_taps])
        self.now_weights = [tap[:, channels:].t().contiguous() for tap in taps]
        out = [torch.cat((0.5 * weight.detach().t(), _required(bias).detach()[None])) for weight, bias in of_out]
        self.changes = [whole[:, : layer.channels].contiguous() for whole, layer in zip(out, layers, strict=True)]
        self.skips = torch.cat([whole[:, layer.channels :] for whole, layer in zip(out, layers, strict=True)])

        dilations = torch.tensor([layer.dilation for layer in layers])
        self.period = int(dilations.max())  # all are powers of two
        first = dilations.cumsum(0) - dilations
        self.places = (first + torch.arange(self.period)[:, None] % dilations).to(weight.device)
        self.ring = weight.new_zeros(int(dilations.sum()), batch, channels)

        self.states = weight.new_empty(depth, batch, channels)
        self.gates = weight.new_empty(depth, batch, 2 * channels)
        self.gated = weight.new_ones(batch, depth * (channels + 1))
        self.state = list(self.states.unbind(0))
        self.gate = list(self.gates.unbind(0))
        self.halves = [gate.chunk(2, 1) for gate in self.gate]
        with_ones = self.gated.view(batch, depth, channels + 1)
        self.value = list(with_ones[..., :channels].unbind(1))
        self.value_and_one = list(with_ones.unbind(1))
        self.time = 0

    def step(self, x: Tensor) -> Tensor:
        """Input of the first layer (batch, channels) -> sum of the skips (batch, skip_channels)."""
        places = self.places[self.time % self.period]
        torch.baddbmm(self.bias, self.ring.index_select(0, places), self.past_weight, out=self.gates)
        self.state[0].copy_(x)
        last = len(self.state) - 1
        for i, gate in enumerate(self.gate):
            gate.addmm_(self.state[i], self.now_weights[i]).tanh_()
            filtered, opened = self.halves[i]
            torch.addcmul(filtered, filtered, opened, out=self.value[i])
            if i < last:
                torch.addmm(self.state[i], self.value_and_one[i], self.changes[i], out=self.state[i + 1])
        self.ring.index_copy_(0, places, self.states)
        self.time += 1
        return self.gated @ self.skips


def _parts(layers: Sequence[GatedLayer]) -> tuple[list[nn.Linear], list[nn.Linear]]:
    return [layer.taps for layer in layers], [layer.out for layer in layers]


def _required(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias


def may_be_fused(layers: Sequence[GatedLayer]) -> bool:
    """Whether ``LayerSteps`` may read the layers' weights: calling them would compute nothing else."""
    parts = [part for kind in _parts(layers) for part in kind]
    return all(is_unhooked(layer) for layer in layers) and all(
        is_pointwise(part) and part.bias is not None for part in parts
    )


class CalledLayerSteps:
    """``LayerSteps`` by a call of each layer for each sample, for layers with hooks, adapters or quantized weights."""

    def __init__(self, layers: Sequence[GatedLayer]) -> None:
        self.layers = layers
        self.past: list[Tensor] = []

    def step(self, x: Tensor) -> Tensor:
        """Input of the first layer (batch, channels) -> sum of the skips (batch, skip_channels)."""
        if not self.past:
            self.past = [x.new_zeros(len(x), layer.dilation, x.size(1)) for layer in self.layers]
        total: Tensor | None = None
        for i, layer in enumerate(self.layers):
            samples = torch.cat((self.past[i], x.unsqueeze(1)), 1)
            self.past[i] = samples[:, 1:]
            out, skip = layer(samples, 1)
            x = out.squeeze(1)
            total = skip.squeeze(1) if total is None else total + skip.squeeze(1)
        assert total is not None
        return total
