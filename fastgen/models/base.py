"""What every model gives to whoever trains, samples and judges it.

A model is one file: its config (a frozen dataclass), its networks, its loss, how it is sampled. It knows nothing of
files, devices, processes or command lines; the training application knows nothing of what is inside.

    class MyModel(GenerativeModel):
        name, summary, kind = "my-model", "one line for fastgen models", "images"
        config_class = MyConfig

        def phases(self): ...      # whose weights are updated in a step, in which order, by which optimiser
        def loss(self, ...): ...   # what one of them minimises
        def score(self, ...): ...  # nats for each held-out item
        def draw(self, ...): ...   # pictures, text or sound; of the kinds pairs and domains ``translate`` instead

Whatever changes during training lives in parameters and buffers: it is saved, averaged and resumed without further
ado. A loss draws its randomness from torch's global generators, which the trainer seeds before every call, so that a
step depends on nothing but weights, data and its number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastgen.batch import check_batch
from fastgen.models._checksum import is_whole
from fastgen.models.pretrained import MODEL_TYPE, WEIGHTS, Pretrained, check_saved_config

Batch: TypeAlias = dict[str, Tensor]
"""Tensors whose first dim is the item; which ones there are depends on the kind of data (``KINDS``)."""

Kind = Literal["images", "pairs", "domains", "text", "sequences", "audio"]
KINDS: tuple[str, ...] = get_args(Kind)
"""Kinds of data, the tensors of their batches, and the facts they offer to a config:

images: images (B, C, S, S) in [0, 1], and labels (B,) int64 where there are classes. Facts: image_size, channels,
    levels (values of a pixel: multiples of 1 / (levels - 1)), classes (0: no labels). Where they are captioned (those
    with labels are, by the names of their classes): caption (B, T) int64, padded with 0 at the end, token 1 + i being
    character i of caption_vocabulary. Facts: caption_vocabulary, caption_length (T), caption_examples; else "", 0, ().
pairs: inputs (B, Cin, S, S), targets (B, C, S, S), in [0, 1]. Facts: image_size, input_channels, channels, levels.
domains: a, b (B, C, S, S) in [0, 1], unpaired. Facts: image_size, channels, levels.
text: tokens (B, length) int64. Facts: vocabulary (one string, token i being its character i; or a tuple of strings,
    where the data was asked for longer tokens). The config's ``data_options`` gives the length.
sequences: source (B, S), target (B, T) int64, padded at the end; token 0 is padding, 1 start, 2 end, 3 + i character
    i of the vocabulary; both begin with 1 and end with 2. Facts: vocabulary, source_length, target_length.
audio: audio (B, length) in [-1, 1]. Facts: sample_rate, length.
"""

TRANSLATED: tuple[str, ...] = ("pairs", "domains")
"""Kinds whose models have ``translate`` in place of ``draw``."""


@dataclass(frozen=True)
class Images:
    """Pictures to look at: pixels (N, C, H, W) in [0, 1], shown in rows of ``columns`` (default: as square as goes).

    labels: (N,) int64, the classes that were asked for, where a model draws classes.
    """

    pixels: Tensor
    columns: int | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Texts:
    """Texts to read, one string each."""

    texts: list[str]


@dataclass(frozen=True)
class Sounds:
    """Sounds to hear: waves (N, samples) in [-1, 1], ``sample_rate`` of them a second."""

    waves: Tensor
    sample_rate: int


Samples: TypeAlias = Images | Texts | Sounds


@dataclass(frozen=True)
class Phase:
    """One optimiser and what it updates. The phases of a step run in order, all on the batch of the step.

    networks: names of the submodules that are updated; the rest stands still meanwhile. Empty: the whole model.
    learning_rate, betas, weight_decay: of AdamW. repeats: updates per step, each on a batch of its own.
    """

    name: str
    networks: tuple[str, ...] = ()
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    repeats: int = 1


@dataclass(frozen=True)
class StepContext:
    """When a loss is asked for: in ``step`` (1, 2, ...) of ``steps``. scaler: of float16, for penalties."""

    step: int
    steps: int
    scaler: torch.amp.GradScaler | None = None


@dataclass(frozen=True)
class NoOptions:
    """Options of sampling, of a model that has none."""


def option(default: Any, help: str, *, from_data: bool = False) -> Any:
    """A config's field. ``help`` is shown on the command line. ``from_data``: the data's fact of that name decides."""
    return field(default=default, metadata={"help": help, "from_data": from_data})


def from_data(config_class: type) -> list[str]:
    """Names of the fields that the data decide."""
    return [f.name for f in dataclasses.fields(config_class) if f.metadata.get("from_data")]


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], float32 at least. What is beyond the ends is cut off; what is infinite becomes NaN."""
    wide = 0.5 * images.to(torch.promote_types(images.dtype, torch.float32)) + 0.5
    return wide.clamp(0, 1) + 0 * wide


def image_rows(*stacks: Tensor, columns: int = 16) -> Images:
    """Rows of images (B, C, H, W), each above the row of its counterparts in the other stacks.

    Images that do not fill a row of ``columns`` are left out. C may be 1 where other stacks have more channels.
    """
    count, channels = len(stacks[0]), max(stack.size(1) for stack in stacks)
    columns = min(columns, count)
    same = [stack[: count // columns * columns].expand(-1, channels, -1, -1) for stack in stacks]
    return Images(torch.stack([images.unflatten(0, (-1, columns)) for images in same], dim=1).flatten(0, 2), columns)


def current_names(config_class: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names that the config's fields have now.

    A config whose fields were renamed maps their old names to the new ones, so that saved models and runs still load:
    ``renamed: ClassVar[Mapping[str, str]] = {"old_name": "new_name"}``.

    Raises:
        ValueError: an option is given under both names.
    """
    renamed: Mapping[str, str] = getattr(config_class, "renamed", {})
    for old, new in renamed.items():
        if old in saved and new in saved:
            raise ValueError(f"{new}: expected one value, got another under its old name {old}")
    return {renamed.get(name, name): value for name, value in saved.items()}


class GenerativeModel(nn.Module, Pretrained):
    """Base of all models; described at the top of this file.

    ``save_pretrained(folder)`` writes config.json and model.safetensors, ``from_pretrained(folder or repository)``
    reads them, by huggingface_hub; ``GenerativeModel.from_pretrained`` finds the class. Reading never runs code:
    weights come from safetensors only.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    kind: Kind
    """Of the data. Of a class with several ``kinds`` the default one's; of its model, that which it was made for."""
    kinds: ClassVar[tuple[Kind, ...]] = ()
    """Where there are several; the config then has a field ``kind``, and what other kinds don't tell it is default."""
    default_data: ClassVar[str]
    config_class: ClassVar[type]
    sampling_class: ClassVar[type] = NoOptions
    """A frozen dataclass of the options of ``draw``."""
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """Where training this model differs from ``TrainConfig``'s defaults: {"epochs": 50, ...}."""
    averaged: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules whose weights are averaged over time for sampling. Empty: the whole model."""
    blocks: ClassVar[tuple[str, ...]] = ()
    """Class names of the layers that FSDP shards one by one; empty: the model can't be sharded."""
    stores: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules whose buffers (N, ...) hold items, not statistics: several processes, which average
    statistics, give each its share of the rows."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.parameters()).device
        return device

    def phases(self) -> tuple[Phase, ...]:
        """The phases of a step, in order."""
        raise NotImplementedError

    def check(self, batch: Batch) -> None:
        """Whether the model can learn from a batch on the CPU, before training begins.

        Raises:
            TypeError, ValueError: values out of range, dtypes or shapes that do not fit the config.
        """
        check_batch(self.kind, self.config, batch)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """What ``phase`` minimises, a scalar under "loss"; other scalars are shown beside it.

        Noise comes from torch's global generators.
        """
        raise NotImplementedError

    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Figures (B,) of held-out items, in nats where they are likelihoods ("nll", "kl", "elbo"); {}: it has none."""
        return {}

    def draw(self, n: int, options: Any, *, generator: torch.Generator | None = None) -> Samples:
        """n samples; the same for the same generator. A CPU generator gives the same noise to every device.

        Args:
            n: how many.
            options: a ``sampling_class``.
            generator: of the noise; default torch's global one.
        """
        raise NotImplementedError

    def translate(self, batch: Batch, options: Any, *, generator: torch.Generator | None = None) -> Images:
        """What becomes of a batch's images, one for each. The batch holds what is translated, perhaps nothing else."""
        raise NotImplementedError

    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """What else is worth looking at, by name, made from held-out items: reconstructions, completions, ..."""
        return {}

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str = "cpu",
        strict: bool = True,
        config: Any = None,
        **options: Any,
    ) -> GenerativeModel:
        from huggingface_hub import hf_hub_download
        from safetensors import SafetensorError
        from safetensors.torch import load_model

        if config is None:
            raise FileNotFoundError(f"{model_id}: expected a saved {cls.__name__}, got no config.json there")
        if options:
            raise TypeError(f"{cls.__name__}.from_pretrained: expected no further options, got {', '.join(options)}")
        saved = None if dataclasses.is_dataclass(config) else config
        if saved is not None:
            saved = {name: value for name, value in saved.items() if name != MODEL_TYPE}
            current = current_names(cls.config_class, saved)
            known = {f.name for f in dataclasses.fields(cls.config_class)}
            if unknown := sorted(set(current) - known):
                raise ValueError(f"{model_id}: config.json: expected options of {cls.__name__}, got {unknown}")
        file = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            file = Path(
                hf_hub_download(
                    model_id,
                    file.name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected the weights of a {cls.__name__}, got no file")
        if not is_whole(file.read_bytes()):
            raise ValueError(
                f"{file}: expected the weights of a {cls.__name__}, got a damaged file (its digest differs)"
            )
        if saved is not None:
            check_saved_config(model_id, saved, sorted(known - set(current)), file)
            config = cls.config_class(**current)
        model = cls(config)
        try:
            load_model(model, file, strict=strict, device=map_location)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{file}: expected the weights of a {cls.__name__}, got: {error}") from error
        model.to(map_location)
        model.eval()
        return model
