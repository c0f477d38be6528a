"""The protocol between a model and the training application.

A model is one file: its config (a frozen dataclass), its networks, its loss, its sampling. Files, devices, processes
and command lines belong to the training application, which uses only this interface:

    class MyModel(GenerativeModel):
        name, summary, kind = "my-model", "one line for fastgen models", "images"
        config_class = MyConfig

        def phases(self): ...      # the optimizer updates of one step, in order
        def loss(self, ...): ...   # the loss of one phase
        def score(self, ...): ...  # metrics of held-out items, for example the ELBO
        def draw(self, ...): ...   # samples; models that translate images implement ``translate`` instead

State that changes during training is kept in parameters and buffers, so that it is saved, averaged and resumed. A loss
uses torch's global random generators. The trainer seeds them before every call, so that a step depends only on the
weights, the data and its number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from fastgen.batch import KINDS as KINDS
from fastgen.batch import TRANSLATED as TRANSLATED
from fastgen.batch import Batch as Batch
from fastgen.batch import Kind as Kind
from fastgen.batch import check_batch
from fastgen.batch import from_data as from_data
from fastgen.batch import option as option
from fastgen.models.pretrained import Pretrained
from fastgen.models.sizes import DataSize, Size


@dataclass(frozen=True)
class Images:
    """Image samples.

    Attributes:
        pixels: (N, C, H, W) in [0, 1].
        columns: number of images in a row of the grid; None: a grid that is as square as possible.
        labels: (N,) int64 classes of a class-conditional model's samples.
    """

    pixels: Tensor
    columns: int | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Texts:
    """Text samples, one string each."""

    texts: list[str]


@dataclass(frozen=True)
class Sounds:
    """Audio samples: waves (N, samples) in [-1, 1], with ``sample_rate`` samples per second."""

    waves: Tensor
    sample_rate: int


Samples: TypeAlias = Images | Texts | Sounds


@dataclass(frozen=True)
class Phase:
    """One AdamW optimizer and the networks that it updates. The phases of a step run in order, on the step's batch.

    Attributes:
        name: passed to ``loss``.
        networks: names of the submodules that are updated; the others are frozen meanwhile. Empty: the whole model.
        learning_rate, betas, weight_decay: AdamW hyperparameters.
        repeats: number of updates per step, each on its own batch.
    """

    name: str
    networks: tuple[str, ...] = ()
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    repeats: int = 1


@dataclass(frozen=True)
class StepContext:
    """The training step that a loss is computed in.

    Attributes:
        step: 1, 2, ..., steps.
        steps: total number of steps.
        scaler: the GradScaler of float16 training, which gradient penalties need; None otherwise.
    """

    step: int
    steps: int
    scaler: torch.amp.GradScaler | None = None


@dataclass(frozen=True)
class NoOptions:
    """The sampling options of a model without any."""


def upcast(x: Tensor) -> Tensor:
    """x in at least float32, also under autocast. In float16 the square of 256 is infinite, and 1e-8 is 0."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], in at least float32. Values out of range are clamped; infinite values become NaN."""
    pixels = 0.5 * upcast(images) + 0.5
    return pixels.clamp(0, 1) + 0 * pixels


def image_rows(*stacks: Tensor, columns: int = 16) -> Images:
    """Rows of images (B, C, H, W), each above the row of its counterparts in the other stacks.

    Images that do not fill a row of ``columns`` are left out. C may be 1 where other stacks have more channels.
    """
    count, channels = len(stacks[0]), max(stack.size(1) for stack in stacks)
    columns = min(columns, count)
    same = [stack[: count // columns * columns].expand(-1, channels, -1, -1) for stack in stacks]
    return Images(torch.stack([images.unflatten(0, (-1, columns)) for images in same], dim=1).flatten(0, 2), columns)


def at_most(count: int, batch: Batch) -> int:
    """``count``, or the number of items of a batch where there are fewer."""
    return min([count, *(len(tensor) for tensor in batch.values())])


def require_options(name: str, given: Mapping[str, Any], options_class: type) -> None:
    """Raises TypeError where a given option is not a field of ``options_class``. ``name`` begins the message."""
    known = [field.name for field in dataclasses.fields(options_class)]
    if unknown := sorted(given.keys() - set(known)):
        expected = f"options among {', '.join(known)}" if known else "no options"
        raise TypeError(f"{name}: expected {expected}, got {', '.join(unknown)}")


class GenerativeModel(nn.Module, Pretrained):
    """Base class of all models.

    ``save_pretrained(folder)`` writes config.json and model.safetensors, and ``from_pretrained(folder or repository)``
    loads them through huggingface_hub; ``GenerativeModel.from_pretrained`` finds the class. Weights are loaded from
    safetensors only, so loading never runs code.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    kind: Kind
    """Kind of data. With several ``kinds``, the class has the default one and an instance the one it was made for."""
    kinds: ClassVar[tuple[Kind, ...]] = ()
    """All kinds of data that the class supports, if there are several; the config then has a field ``kind``."""
    default_data: ClassVar[str]
    config_class: ClassVar[type]
    sampling_class: ClassVar[type] = NoOptions
    """Frozen dataclass with the options of ``draw``."""
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of ``TrainConfig`` that this model overrides: {"steps": 2000, ...}."""
    sizes: ClassVar[Mapping[str, Size]] = {}
    """Options for larger images, by ``DataSize.row``; all other defaults are for small ones."""
    averaged: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules that are sampled with an exponential moving average of their weights. Empty: all."""
    blocks: ClassVar[tuple[str, ...]] = ()
    """Class names of the layers that FSDP wraps; empty: the model does not support FSDP."""
    stores: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules whose buffers (N, ...) hold items: with several processes, each keeps its share of the
    rows, while other buffers, which hold statistics, are averaged."""

    channels_last: ClassVar[bool] = False
    """Whether training on a CPU keeps the weights of convolutions in the channels-last format: oneDNN then reads and
    writes feature maps as they are, without a copy into its own layout and back."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.parameters()).device
        return device

    @classmethod
    def suggested(cls, data: DataSize, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Defaults for data of a size, where they differ from the model's general ones.

        Args:
            data: kind, number and size of the training items.
            given: the options that the user gives, which override all others, by the same names.

        Returns:
            Options as the command line names them: {"steps": 12000, "model.width": 32, ...}.
        """
        if data.row in cls.sizes:
            return cls.sizes[data.row].options(data)
        steps = cls.train_defaults.get("steps")
        if data.kind != "images" or steps is None:
            return {}
        scaled = Size(steps).steps_for(data)
        return {} if scaled == steps else {"steps": scaled}

    def phases(self) -> tuple[Phase, ...]:
        """The optimizer updates of one training step, in order."""
        raise NotImplementedError

    def check(self, batch: Batch) -> None:
        """Check a batch, on the CPU, before training starts.

        Raises:
            TypeError, ValueError: values out of range, dtypes or shapes that do not fit the config.
        """
        check_batch(self.kind, self.config, batch)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss of a phase.

        Args:
            phase: name of one of the ``phases``.
            batch: tensors by name; see ``fastgen.batch``.
            context: number of the training step.

        Returns:
            The scalar to minimize under "loss", and other scalars to log.
        """
        raise NotImplementedError

    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Metrics (B,) of held-out items by name; likelihoods ("nll", "kl", "elbo") are in nats. {}: no metrics."""
        return {}

    def draw(self, n: int, options: Any, *, generator: torch.Generator | None = None) -> Samples:
        """n samples, as the training application saves them; see ``sample``.

        Args:
            n: number of samples.
            options: a ``sampling_class``.
            generator: source of the noise; default torch's global one. A CPU generator gives the same noise on every
                device.
        """
        raise NotImplementedError

    def sample(self, n: int, *, generator: torch.Generator | None = None, **options: Any) -> Tensor | list[str]:
        """n samples as plain data; the same for the same generator.

        Args:
            n: number of samples.
            generator: source of the noise; default torch's global one. A CPU generator gives the same noise on every
                device.
            options: fields of ``sampling_class``, for example ``label`` or ``temperature``. A label is the number of a
                class, or its name, one of ``class_names``.

        Returns:
            Images (n, C, H, W) in [0, 1], a list of n strings, or waveforms (n, samples) in [-1, 1].

        Raises:
            TypeError: the model has no such option, or translates images (see ``translate``).
            ValueError: n or an option is out of range.
        """
        if self.kind in TRANSLATED:
            raise TypeError(f"{self.name}: expected a model that samples; this one translates images: call translate")
        require_options(self.name, options, self.sampling_class)
        if isinstance(options.get("label"), str):
            options["label"] = self._number_of(options["label"])
        with torch.no_grad():
            samples = self.draw(n, self.sampling_class(**options), generator=generator)
        if isinstance(samples, Images):
            return samples.pixels
        return samples.texts if isinstance(samples, Texts) else samples.waves

    def _number_of(self, label: str) -> int:
        """The number of the class with this name."""
        names = self.class_names
        if label not in names:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(f"label: expected {known or 'a number, as the model has no class_names'}, got {label!r}")
        return names.index(label)

    def translate(self, batch: Batch, options: Any = None, *, generator: torch.Generator | None = None) -> Images:
        """The translation of each image of a batch, which needs to hold the inputs only.

        Args:
            options: a ``sampling_class``; None: its defaults.
        """
        raise NotImplementedError

    def interpolate(self, rows: int, columns: int, options: Any, *, generator: torch.Generator | None = None) -> Images:
        """Rows of images, each from one random latent to another in ``columns`` steps.

        Args:
            options: a ``sampling_class``. With classes, the rows are of all classes in turn, or of the class ``label``.
            generator: as of ``draw``.

        Raises:
            TypeError: the model has no continuous latent.
        """
        raise TypeError(f"{self.name}: expected a model with a continuous latent, for interpolation, got one without")

    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Further samples by name, computed from held-out items: reconstructions, completions, ..."""
        return {}
