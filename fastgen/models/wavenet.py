"""WaveNet: an autoregressive model of audio samples.

Van den Oord et al., "WaveNet: a generative model for raw audio" (2016): each sample is one of 256 mu-law levels, whose
distribution depends on the samples before it through causal convolutions. Their dilation doubles from layer to layer:

    previous samples -> embedding + convolution -> layers -> sum of the layers' skips -> [ReLU, linear] twice -> outputs
    layer: x_t, x_{t - dilation} -> tanh(.) * sigmoid(.) -> skip, and x + (.) for the next layer

The outputs are 256 logits, or the parameters of a mixture of logistics that is integrated over each level's interval.
The mean of the mixture is a linear prediction from the last samples, whose coefficients are among the outputs (Hwang et
al., "LP-WaveNet: linear prediction-based WaveNet speech synthesis", 2018): those of a stationary sound are constant.
Coefficients and weights of the first convolution are learned as their cosine transforms: neighboring samples are so
correlated that gradient steps on the samples' own weights would hardly distinguish pitches.

With ``predictors``, coefficients are constant: the mean is a weighted sum of that many linear predictions, each that of
a harmonic sound of one pitch. A prediction weighs the more, the smaller its errors were in the last samples; the
network adjusts weights and widths of the mixture. A tone then keeps the pitch of one prediction, while coefficients
that the network computes anew for each sample let the pitch drift. Predictions that are trained
(``trained_predictors``) have a better likelihood, and sampled sounds less energy at the harmonics of one pitch.
Weighting experts by their past errors: Vovk, "Aggregating strategies" (1990).

Samples before the first one are zeros, in every layer. The loss is the cross-entropy of the levels, in nats per sample.

In this file: config, network, loss, sampling. Levels and their probabilities are in ``audio_levels.py``, the layers in
``gated_layers.py``, which also computes them for one sample at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.batch import NEVER_IGNORED, require_audio, require_labels, require_tokens
from fastgen.checks import (
    require_choice,
    require_count,
    require_positive,
    require_positive_number,
    require_probability,
)
from fastgen.functional._autocast import without_autocast
from fastgen.models.audio_levels import (
    LEVELS,
    companded,
    inverse_mu_law,
    level_borders,
    logistics_level_logits,
    logistics_log_prob,
    mu_law,
)
from fastgen.models.base import Batch, GenerativeModel, Phase, Sounds, StepContext, option, upcast
from fastgen.models.conditioning import LabelOptions, check_labels, wanted_labels
from fastgen.models.decoding import Chooser
from fastgen.models.gated_layers import CalledLayerSteps, GatedLayer, GatedLayers, LayerSteps, may_be_fused
from fastgen.models.linear_prediction import cosine_transform, harmonic_predictors
from fastgen.models.registry import register_model
from fastgen.models.sizes import DataSize
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._sublayers import is_pointwise

Output = Literal["logistics", "levels"]
MIN_LOG_SCALE, MAX_LOG_SCALE = -10.0, 3.0  # of a logistic; the narrowest levels are 2e-4 wide
SCORE_CHUNK = 1 << 16  # samples that are scored at once: their logits are 64 MiB
COEFFICIENT = 0.1  # coefficient of the linear prediction for an output of 1
PREDICTOR = 0.3  # the same for a weight of 1 of ``predictors``
SMALLEST = 1e-8  # mean squared error that counts as none
SUGGESTED: Mapping[str, Any] = {
    "steps": 2000,
    "model.predictors": 192,
    "model.trained_predictors": False,
    "model.cycle": 8,
    "model.onset": 0.5,
}


@dataclass(frozen=True)
class WaveNetConfig:
    """Configuration of a ``WaveNet``.

    Raises:
        ValueError: an option out of range.
    """

    sample_rate: int = option(8000, "samples per second", from_data=True)
    length: int = option(8000, "number of samples of a sound", from_data=True)
    classes: int = option(0, "number of classes; 0 for data without labels", from_data=True)
    conditional: bool = option(False, "condition on class labels")
    channels: int = option(32, "number of residual channels")
    skip_channels: int = option(64, "number of skip channels")
    cycle: int = option(10, "number of layers per cycle of dilations 1, 2, 4, ...")
    cycles: int = option(1, "number of cycles of dilations")
    reach: int = option(80, "number of samples in the first convolution and the linear prediction")
    output: Output = option("logistics", "output distribution: a mixture of logistics, or 256 logits")
    components: int = option(4, "number of mixture components")
    predictors: int = option(0, "number of linear predictions; 0: coefficients from the network")
    trained_predictors: bool = option(True, "train the linear predictions; false: they stay those of harmonic sounds")
    crop: int = option(1000, "number of predicted samples of each sound per training step; 0: all")
    onset: float = option(
        0.0, "share of training steps that are of the beginnings of sounds, in addition to random ones"
    )
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
        for name in ("crop", "predictors", "classes"):
            require_count(name, getattr(self, name), 0)
        if self.conditional and self.classes < 2:
            raise ValueError(f"conditional: expected false, as the data has {self.classes} classes, got true")
        if not 0 <= self.onset <= 1:
            raise ValueError(f"onset: expected a share from 0 to 1, got {self.onset}")
        if self.predictors and self.output != "logistics":
            raise ValueError(f"predictors: expected 0 with output {self.output!r}, got {self.predictors}")
        for name in ("beta1", "beta2"):
            require_probability(name, getattr(self, name))
        require_positive_number(learning_rate=self.learning_rate)

    @property
    def dilations(self) -> list[int]:
        return [1 << i for i in range(self.cycle)] * self.cycles

    @property
    def field(self) -> int:
        """Receptive field: number of samples that a prediction depends on."""
        return self.reach + (self.error_window if self.predictors else 0) + sum(self.dilations)

    @property
    def error_window(self) -> int:
        """Number of samples over which the errors of the predictors are averaged."""
        return (self.reach + 1) // 2


@dataclass(frozen=True)
class SoundOptions(LabelOptions):
    """Sampling options of a ``WaveNet``.

    Raises:
        ValueError: an option out of range.
    """

    seconds: float = option(0.0, "duration in seconds; 0: that of the training sounds")
    temperature: float = option(1.0, "sampling temperature; 0: greedy")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seconds", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")


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

    @classmethod
    def suggested(cls, data: DataSize, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As ``GenerativeModel.suggested``: predictors that are not trained, for a mixture of logistics, and a shorter
        receptive field.

        The defaults of the config are those of models that were trained before there were predictors.
        """
        levels = (given or {}).get("model.output", "logistics") != "logistics"
        return {} if levels else dict(SUGGESTED)

    def __init__(self, config: WaveNetConfig) -> None:
        super().__init__(config)
        dilations = config.dilations
        self.embedding = nn.Embedding(LEVELS, config.channels)
        self.front = nn.Linear(config.reach, config.channels, bias=False)
        last = len(dilations) - 1
        self.layers = GatedLayers(GatedLayer(config, dilation, i == last) for i, dilation in enumerate(dilations))
        self.hidden = nn.Linear(config.skip_channels, config.skip_channels)
        mixture = config.output == "logistics"
        means = config.predictors or config.reach
        self.numbers = nn.Linear(config.skip_channels, means + 3 * config.components if mixture else LEVELS)
        if config.predictors:
            empty = torch.empty(config.predictors, config.reach)
            self.predictors = nn.Parameter(empty, requires_grad=config.trained_predictors)
            self.errors = nn.Linear(config.predictors + 1, config.channels, bias=False)
            self.sharpness = nn.Parameter(torch.tensor(4.0))
        if config.conditional:
            self.label = nn.Embedding(config.classes, config.channels + config.skip_channels)
        self._register_computed()
        self._init_weights()

    def _computed(self) -> dict[str, Tensor]:
        return {"borders": level_borders(), "cosines": cosine_transform(self.config.reach)}

    def _init_weights(self) -> None:
        """Small embeddings; mixtures start around the previous sample."""
        config, numbers = self.config, self.numbers
        nn.init.normal_(self.embedding.weight, std=0.05)
        if config.conditional:
            nn.init.normal_(self.label.weight, std=0.05)
        if config.output == "logistics":
            with torch.no_grad():
                numbers.weight.mul_(0.1)
                numbers.bias.zero_()
                _, offset, log_scale, _ = self._split(numbers.bias)
                offset.copy_(torch.linspace(-1, 1, config.components))
                log_scale.fill_(-0.6 if config.predictors else -4.0)
        if config.predictors:
            with torch.no_grad(), torch.device("cpu"):
                change = harmonic_predictors(config.predictors, config.reach)
                change[:, -1] -= 1
                self.predictors.copy_(change @ cosine_transform(config.reach).t() / PREDICTOR)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        return (Phase("sound", (), config.learning_rate, (config.beta1, config.beta2)),)

    def forward(self, levels: Tensor, length: int | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, length, 256) of the last ``length`` samples (default: all), each given the ones before it.

        Args:
            levels: (B, N) int64, from 0 to 255. The first sample is taken for the beginning of the sound, which matters
                for predictions of the first ``config.field`` samples.
            labels: (B,) int64, for a conditional model; others ignore them.

        Raises:
            TypeError: levels are not an int64 tensor. ValueError: they are not (B, N), or N is less than length.
        """
        require_tokens("levels", levels, LEVELS)
        length = levels.size(-1) if length is None else length
        if levels.dim() != 2 or not 1 <= length <= levels.size(1):
            raise ValueError(f"levels: expected (B, N) with N at least length = {length}, got {tuple(levels.shape)}")
        outputs, guesses, errors = self._outputs(levels, length, labels)
        if self.config.output == "levels":
            return outputs
        return logistics_level_logits(*self._mixture(outputs, guesses, errors), self.borders)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As ``nn.Module.compile``, of the outputs that ``loss`` uses: ``forward`` turns them into 256 logits."""
        self._outputs = torch.compile(self._outputs, *args, **kwargs)  # type: ignore[method-assign]

    def _outputs(self, levels: Tensor, length: int, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Outputs (B, length, .) for the last samples; what ``_guesses`` and ``_errors`` return for them."""
        first, last = self._of_labels(labels)
        total_length = levels.size(1)
        x = F.pad(self.embedding(levels[:, :-1]), (0, 0, 1, 0))  # the sample before each
        x = x + self.front(self._before(companded(levels), total_length) @ self.cosines.t())
        samples = inverse_mu_law(levels)
        errors: Tensor | None = None
        guesses = self._guesses(self._before(samples, total_length if self.config.predictors else length))
        if self.config.predictors:
            with torch.no_grad():
                squares = (samples.to(guesses.dtype)[..., None] - guesses).square()
                window = self.config.error_window
                squares = F.pad(squares[:, :-1].transpose(1, 2), (window, 0))
                errors = self._errors(F.avg_pool1d(squares, window, 1).transpose(1, 2))
            x = x + self._of_errors(errors)
            guesses, errors = guesses[:, -length:], errors[:, -length:]
        x = x if first is None else x + first[:, None]
        reach = sum(self.config.dilations)
        total = None if last is None else last[:, None]
        for layer in self.layers:
            reach -= layer.dilation
            x, skip = layer(x, min(x.size(1), length + reach))
            skip = skip[:, -length:]
            total = skip if total is None else total + skip
        assert total is not None
        return self._head(total), guesses, errors

    def _before(self, samples: Tensor, length: int) -> Tensor:
        """The ``reach`` samples before each of the last ``length`` ones, (B, length, reach), padded with zeros."""
        reach = self.config.reach
        windows = F.pad(samples[:, :-1], (reach, 0)).unfold(1, reach, 1)
        return windows[:, -length:].to(next(self.parameters()).dtype)

    def _head(self, total: Tensor) -> Tensor:
        outputs: Tensor = self.numbers(self.hidden(total.relu()).relu())
        return upcast(outputs)  # under autocast, too

    def _of_labels(self, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What a conditional model adds to the input of the first layer, (B, channels), and to the skips."""
        if not self.config.conditional:
            return None, None
        if labels is None:
            raise ValueError("labels: expected (B,) int64, as the model is conditional, got None")
        require_labels("labels", labels, len(labels), self.config.classes)
        first, last = self.label(labels).split((self.config.channels, self.config.skip_channels), 1)
        return first, last

    def _guesses(self, before: Tensor) -> Tensor:
        """What the predictors expect after the samples before, (..., predictors); without predictors those samples."""
        if not self.config.predictors:
            return before
        with without_autocast(before.device):  # bfloat16 is too coarse for a prediction
            coefficients = PREDICTOR * (self.predictors @ self.cosines.to(self.predictors.dtype))
            return before[..., -1:] + before @ coefficients.t()

    @staticmethod
    def _errors(mean_squares: Tensor) -> Tensor:
        """Logarithms of the mean squared errors (..., predictors) over the last ``error_window`` samples."""
        return (mean_squares + SMALLEST).log()

    def _of_errors(self, errors: Tensor) -> Tensor:
        """What the errors add to the input of the first layer, (..., channels)."""
        mean = errors.mean(-1, keepdim=True)
        added: Tensor = self.errors(torch.cat((errors - mean, mean / math.log(1 / SMALLEST)), -1))
        return added

    def _split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Coefficients or choice of the linear prediction; offset, log scale and logit of each component."""
        config = self.config
        parts: tuple[Tensor, ...] = outputs.split((config.predictors or config.reach, *(config.components,) * 3), -1)
        return parts

    def _mixture(self, outputs: Tensor, guesses: Tensor, errors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Means, log scales and logits of the components, given ``_guesses`` and ``_errors``.

        Offsets are multiples of scales, which are relative to the errors, if there are predictors.
        """
        coefficients, offset, log_scale, weight = self._split(outputs)
        if errors is not None:
            choice = (coefficients - self.sharpness * errors).softmax(-1)
            prediction = (choice * guesses).sum(-1, keepdim=True)
            log_scale = log_scale + 0.5 * (choice * errors.exp()).sum(-1, keepdim=True).log()
        else:
            with without_autocast(outputs.device):
                coefficients = COEFFICIENT * (coefficients @ self.cosines.to(coefficients.dtype))
            prediction = guesses[..., -1:] + (coefficients * guesses).sum(-1, keepdim=True)
        log_scale = log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)
        return prediction + offset * log_scale.exp(), log_scale, weight

    def _nll(self, levels: Tensor, length: int, labels: Tensor | None) -> Tensor:
        """-log p of the last samples, (B, length), in float32 at least."""
        outputs, guesses, errors = self._outputs(levels, length, labels)
        target = levels[:, -length:]
        if self.config.output == "levels":
            nll = F.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction="none", ignore_index=NEVER_IGNORED)
            return nll.view(-1, length)
        mixture = self._mixture(outputs, guesses, errors)
        low, high = self.borders[target], self.borders[target + 1]
        return -logistics_log_prob(*mixture, low, high)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss: nats per sample, over a random crop of ``crop`` samples, the same in all sounds.

        Crops that would start before the sound start with it, so that its first samples are trained as often as others;
        with ``onset``, more often: the first samples decide on pitch and loudness of all others that are sampled.
        """
        audio = self._checked(batch["audio"])
        crop, total = self.config.crop or self.config.length, self.config.length
        start = max(0, int(torch.randint(min(0, 1 - crop), max(1, total - crop + 1), ())))
        if self.config.onset and torch.rand(()).item() < self.config.onset:
            start = 0
        window = audio[:, max(0, start - self.config.field) : start + crop]
        levels, flaw = self._read(window)
        nll = self._nll(levels, min(crop, total), self._labels(batch))
        return {"loss": (nll + flaw[:, None]).mean()}

    def _labels(self, batch: Batch) -> Tensor | None:
        return check_labels(batch, self.config.classes) if self.config.conditional else None

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): nats of a sound, in 256 levels. tokens (B,): its number of samples."""
        levels, flaw = self._read(self._checked(batch["audio"]))
        length = self.config.length
        labels, size = self._labels(batch), max(1, SCORE_CHUNK // length)
        parts = [slice(start, start + size) for start in range(0, len(levels), size)]
        found = [self._nll(levels[part], length, None if labels is None else labels[part]) for part in parts]
        nll = torch.cat([part.double().sum(1) for part in found])
        return {"nll": nll + flaw, "tokens": torch.full_like(nll, length)}

    @torch.no_grad()
    def draw(self, n: int, options: SoundOptions, *, generator: torch.Generator | None = None) -> Sounds:
        """Samples n sounds.

        Raises:
            ValueError: n is not a positive integer.
        """
        require_positive("n", n)
        length = max(1, round(options.seconds * self.config.sample_rate)) if options.seconds else self.config.length
        labels = self._wanted(n, options.label)
        with without_autocast(self.device):
            levels = self._sample(n, length, labels, options.temperature, generator)
        return Sounds(inverse_mu_law(levels), self.config.sample_rate)

    def _wanted(self, n: int, label: int) -> Tensor | None:
        """Labels (n,) to sample, of a conditional model: all classes in turn, or some of them, evenly spaced."""
        classes = self.config.classes
        if not self.config.conditional:
            if label >= 0:
                raise ValueError(f"label: expected -1, as the model is not conditional, got {label}")
            return None
        labels, _ = wanted_labels(n, label, classes)
        return (torch.arange(n) * classes // n if label < 0 and n < classes else labels).to(self.device)

    def _sample(
        self, n: int, length: int, labels: Tensor | None, temperature: float, generator: torch.Generator | None
    ) -> Tensor:
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
        to_first, to_last = self._of_labels(labels)
        x = weight.new_zeros(n, config.channels)
        levels = torch.empty(n, length, dtype=torch.int64, device=weight.device)
        chooser = Chooser(temperature, generator)
        errors: Tensor | None = None
        squares = weight.new_zeros(config.error_window, n, config.predictors)
        for time in range(length):
            now = time + config.reach
            before = inputs[:, time:now]
            first = x + self.front(before @ self.cosines.t()) if front is None else torch.addmm(x, before, front)
            guesses = self._guesses(samples[:, time:now])
            if config.predictors:
                errors = self._errors(squares.mean(0))
                first = first + self._of_errors(errors)
            total = steps.step(first if to_first is None else first + to_first)
            logits = self._head(total if to_last is None else total + to_last)
            if config.output == "logistics":
                logits = logistics_level_logits(*self._mixture(logits, guesses, errors), self.borders)
            level = chooser(logits)
            levels[:, time], inputs[:, now], samples[:, now] = level, companded_of[level], sample_of[level]
            x = self.embedding(level)
            if config.predictors:
                squares[time % config.error_window] = (samples[:, now, None] - guesses).square()
        chooser.check()
        return levels

    @staticmethod
    def _read(audio: Tensor) -> tuple[Tensor, Tensor]:
        """Levels of samples (B, N), and a term of the loss (B,): 0, or NaN for samples that are NaN or infinite."""
        return mu_law(audio.nan_to_num()), 0 * audio.sum(1)

    def _checked(self, audio: Tensor) -> Tensor:
        require_audio("audio", audio, self.config.length)
        return audio
