"""What a finished (or running) run can be asked for: its model, and samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen.data import Items, TensorItems, read_images
from fastgen.models import TRANSLATED, GenerativeModel, Images, Samples, Sounds, Texts
from fastgen.train.checkpoint import Header, load_checkpoint
from fastgen.train.engine import find
from fastgen.train.errors import UsageError
from fastgen.train.evaluation import Thinned
from fastgen.train.folder import RunFolder
from fastgen.train.pictures import save_samples
from fastgen.train.run import choose_device, configs, data_of, load_average, split
from fastgen.train.stream import to_device

MOST_SAMPLES = 100_000
AT_ONCE = 256  # samples drawn together
SUFFIXES: dict[type, str] = {Images: ".png", Texts: ".txt", Sounds: ".wav"}


@dataclass(frozen=True)
class Trained:
    """A run's model in evaluation, with averaged weights; ``step`` of its checkpoint."""

    model: GenerativeModel
    header: Header
    step: int

    def draw(self, n: int, options: Any, generator: torch.Generator) -> Iterator[Samples]:
        """n samples, some at a time; of classes in turn whole turns, so that each keeps its column."""
        turn = max(1, getattr(self.model.config, "classes", 1))
        at_once = turn * max(1, AT_ONCE // turn)
        with torch.no_grad():
            for start in range(0, n, at_once):
                yield self.model.draw(min(at_once, n - start), options, generator=generator)

    def translate(self, items: Items, options: Any, generator: torch.Generator) -> Iterator[Samples]:
        """What becomes of the items, some at a time; for models of the kinds ``TRANSLATED``."""
        with torch.no_grad():
            for chosen in torch.arange(len(items)).split(AT_ONCE):
                batch = to_device(items.batch(chosen), self.model.device)
                yield self.model.translate(batch, options, generator=generator)


def open_run(folder: RunFolder, device: str = "auto") -> Trained:
    """Raises FileNotFoundError, ValueError: no run there, or a checkpoint that does not fit. UsageError: the device."""
    chosen = choose_device(device)
    header, tensors = load_checkpoint(folder.checkpoint)
    model_class, model_config, _ = configs(folder.checkpoint, header)
    model = model_class(model_config)
    load_average(model, tensors)
    model.to(chosen).eval()
    return Trained(model, header, int(find(tensors, "step")))


def given_items(trained: Trained, folder: RunFolder, pictures: str = "") -> Items | None:
    """What a model translates, the run's held-out items, or a person's pictures; None for one that draws.

    Args:
        pictures: a file or a folder of them; each is brought to the size of those that the model learnt from.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no pictures. UsageError: the run's data are others now.
    """
    model = trained.model
    if model.kind not in TRANSLATED:
        return None
    if not pictures:
        return split(data_of(trained.header, folder), model.config)[1]
    names = ("inputs",) if model.kind == "pairs" else ("a", "b")
    channels = model.config.input_channels if model.kind == "pairs" else model.config.channels
    stack = read_images(Path(pictures), model.config.image_size, channels)
    return TensorItems(dict.fromkeys(names, stack), dict.fromkeys(names, 255.0))


def sample(trained: Trained, n: int, options: Any, seed: int = 0, items: Items | None = None) -> Samples:
    """n samples; one seed gives the same noise on every device.

    Args:
        items: of a model that translates: what becomes of them is shown, or of n of them, evenly spaced.

    Raises:
        UsageError: n, seed, or an option that the model refuses.
    """
    if n < 1:
        raise UsageError(f"n: expected a positive number of samples, got {n}")
    if n > MOST_SAMPLES:
        raise UsageError(f"n: expected at most {MOST_SAMPLES} samples, got {n}")
    check_seed(seed)
    try:
        generator = torch.Generator().manual_seed(seed)
        if items is None:
            return joined(list(trained.draw(n, options, generator)))
        return joined(list(trained.translate(Thinned(items, n), options, generator)))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed: expected an integer from 0 to 2^63 - 1, got {seed}")


def joined(parts: list[Samples]) -> Samples:
    """Exhibits of one kind, one after another."""
    images = [part for part in parts if isinstance(part, Images)]
    texts = [part for part in parts if isinstance(part, Texts)]
    sounds = [part for part in parts if isinstance(part, Sounds)]
    if images:
        labels = [part.labels for part in images if part.labels is not None]
        asked = torch.cat(labels) if labels else None
        return Images(torch.cat([part.pixels for part in images]), images[0].columns, asked)
    if texts:
        return Texts([text for part in texts for text in part.texts])
    return Sounds(torch.cat([part.waves for part in sounds]), sounds[0].sample_rate)


def write_samples(samples: Samples, out: Path) -> None:
    """Write what ``sample`` gave to a file whose name ends as its kind demands.

    Raises:
        UsageError: another ending. FileNotFoundError: no such folder.
    """
    suffix = SUFFIXES[type(samples)]
    if out.suffix.lower() != suffix:
        raise UsageError(f"out: expected a path that ends in {suffix}, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: expected a path in a folder that exists, got one in {out.parent}")
    save_samples(out.parent, out.name.removesuffix(out.suffix), samples)
