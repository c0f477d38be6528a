"""What a finished (or running) run can be asked for: its model, and samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen.models import Exhibit, GenerativeModel, Images, Sounds, Texts
from fastgen.train.checkpoint import Header, load_checkpoint
from fastgen.train.errors import UsageError
from fastgen.train.folder import RunFolder
from fastgen.train.pictures import write_exhibit
from fastgen.train.run import choose_device, configs, load_average

AT_ONCE = 256  # samples drawn together
SUFFIXES: dict[type, str] = {Images: ".png", Texts: ".txt", Sounds: ".wav"}


@dataclass(frozen=True)
class Trained:
    """A run's model in evaluation, with averaged weights; ``step`` of its checkpoint."""

    model: GenerativeModel
    header: Header
    step: int

    def draw(self, n: int, options: Any, generator: torch.Generator) -> Iterator[Exhibit]:
        """n samples, some at a time; of classes in turn whole turns, so that each keeps its column."""
        turn = max(1, getattr(self.model.config, "classes", 1))
        at_once = turn * max(1, AT_ONCE // turn)
        with torch.no_grad():
            for start in range(0, n, at_once):
                yield self.model.draw(min(at_once, n - start), options, generator=generator)


def open_run(folder: RunFolder, device: str = "auto") -> Trained:
    """Raises FileNotFoundError, ValueError: no run there, or a checkpoint that does not fit. UsageError: the device."""
    chosen = choose_device(device)
    header, tensors = load_checkpoint(folder.checkpoint)
    model_class, model_config, _ = configs(folder.checkpoint, header)
    model = model_class(model_config)
    load_average(model, tensors)
    model.to(chosen).eval()
    return Trained(model, header, int(tensors["step"]))


def sample(trained: Trained, n: int, options: Any, seed: int = 0) -> Exhibit:
    """n samples; one seed gives the same noise on every device.

    Raises:
        UsageError: n, seed, or an option that the model refuses.
    """
    if n < 1:
        raise UsageError(f"n: expected a positive number of samples, got {n}")
    check_seed(seed)
    try:
        parts = list(trained.draw(n, options, torch.Generator().manual_seed(seed)))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return joined(parts)


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed: expected an integer from 0 to 2^63 - 1, got {seed}")


def joined(parts: list[Exhibit]) -> Exhibit:
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


def write_samples(exhibit: Exhibit, out: Path) -> None:
    """Write what ``sample`` gave to a file whose name ends as its kind demands.

    Raises:
        UsageError: another ending. FileNotFoundError: no such folder.
    """
    suffix = SUFFIXES[type(exhibit)]
    if out.suffix.lower() != suffix:
        raise UsageError(f"out: expected a path that ends in {suffix}, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: expected a path in a folder that exists, got one in {out.parent}")
    write_exhibit(out.parent, out.name.removesuffix(out.suffix), exhibit)
