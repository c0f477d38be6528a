"""The model of a run, and samples from it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.batch import TRANSLATED, Kind
from fastgen.data import Items
from fastgen.models import GenerativeModel, Images, Samples, Sounds, Texts
from fastgen.train.checkpoint import Header, load_checkpoint
from fastgen.train.engine import find
from fastgen.train.errors import UsageError
from fastgen.train.evaluation import Thinned
from fastgen.train.files import cannot_write, make_folder, write_whole
from fastgen.train.folder import RunFolder
from fastgen.train.image_files import FileItems
from fastgen.train.run import choose_device, load_average
from fastgen.train.sample_files import checked_waves, encode_png, encode_wav, save_samples
from fastgen.train.settings import ModelClass, configs, data_of, split
from fastgen.train.stream import to_device

MOST_SAMPLES = 100_000
BATCH = 256  # samples generated together
SUFFIXES: dict[type, str] = {Images: ".png", Texts: ".txt", Sounds: ".wav"}
ARRAYS = ".npz"  # of images and sounds


@dataclass(frozen=True)
class Trained:
    """A run's model in evaluation, with averaged weights; ``step`` of its checkpoint."""

    model: GenerativeModel
    header: Header
    step: int

    def draw(self, n: int, options: Any, generator: torch.Generator) -> Iterator[Samples]:
        """n samples, in batches of a multiple of the number of classes, so that each class keeps its column."""
        classes = max(1, getattr(self.model.config, "classes", 1))
        size = classes * max(1, BATCH // classes)
        with torch.no_grad():
            for start in range(0, n, size):
                yield self.model.draw(min(size, n - start), options, generator=generator)

    def translate(self, items: Items, options: Any, generator: torch.Generator) -> Iterator[Samples]:
        """Translations of the items, in batches; for models of the kinds ``TRANSLATED``."""
        with torch.no_grad():
            for chosen in torch.arange(len(items)).split(BATCH):
                batch = to_device(items.batch(chosen), self.model.device)
                yield self.model.translate(batch, options, generator=generator)

    def draw_captioned(self, captions: Tensor, options: Any, generator: torch.Generator) -> Iterator[Samples]:
        """A sample for each of the captions (N, T), in batches; for models that have ``draw_captioned``."""
        model: Any = self.model
        with torch.no_grad():
            for chosen in captions.split(BATCH):
                yield model.draw_captioned(chosen, options, generator=generator)


def open_run(folder: RunFolder, device: str = "auto", model_class: ModelClass | None = None) -> Trained:
    """The model of a run.

    Args:
        model_class: the class of a model that is not registered.

    Raises:
        FileNotFoundError, ValueError: no run, or a checkpoint that does not fit. UsageError: no such device, or a model
            that is not registered and not given.
    """
    chosen = choose_device(device)
    header, tensors = load_checkpoint(folder.checkpoint)
    found, model_config, _ = configs(folder.checkpoint, header, model_class)
    model = found(model_config)
    load_average(model, tensors)
    model.to(chosen).eval()
    return Trained(model, header, int(find(tensors, "step")))


def input_items(trained: Trained, folder: RunFolder, images: str = "") -> Items | None:
    """The images to translate: the run's held-out items, or the user's images; None for a model that samples.

    Args:
        images: a file or a folder of images, which are resized to the size of the training images.

    Raises:
        FileNotFoundError, ValueError: no such path, or no images. UsageError: the data of the run have changed.
    """
    model = trained.model
    if model.kind not in TRANSLATED:
        return None
    if not images:
        return split(data_of(trained.header, folder, type(model)), model.config)[1]
    names = ("inputs",) if model.kind == "pairs" else ("a", "b")
    channels = model.config.input_channels if model.kind == "pairs" else model.config.channels
    return FileItems(Path(images), names, model.config.image_size, channels)


def sample(trained: Trained, n: int, options: Any, seed: int = 0, items: Items | None = None) -> Samples:
    """n samples; one seed gives the same noise on every device.

    Args:
        items: for a model that translates, the items to translate: all, or n of them, evenly spaced.

    Raises:
        UsageError: n, seed, or an option that the model rejects.
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
    """Samples of one type, concatenated."""
    images = [part for part in parts if isinstance(part, Images)]
    texts = [part for part in parts if isinstance(part, Texts)]
    sounds = [part for part in parts if isinstance(part, Sounds)]
    if images:
        labels = [part.labels for part in images if part.labels is not None]
        joined_labels = torch.cat(labels) if labels else None
        return Images(torch.cat([part.pixels for part in images]), images[0].columns, joined_labels)
    if texts:
        return Texts([text for part in texts for text in part.texts])
    return Sounds(torch.cat([part.waves for part in sounds]), sounds[0].sample_rate)


def is_folder(out: str) -> bool:
    """Whether samples go into a folder as single files: an existing one, or a path without a suffix."""
    return bool(out) and (out.endswith(("/", os.sep)) or Path(out).is_dir() or not Path(out).suffix)


def sample_suffixes(kind: Kind) -> tuple[str, ...]:
    """The suffixes of files that samples of a model of this kind can be written to, the usual one first."""
    if kind in ("text", "sequences"):
        return (SUFFIXES[Texts],)
    return (SUFFIXES[Sounds if kind == "audio" else Images], ARRAYS)


def check_out(out: Path, suffixes: Sequence[str], what: str = "") -> None:
    """Checks where a file is to be written, before the work that it takes.

    Args:
        suffixes: those that are possible, the usual one first.
        what: the contents, for the message: "latents".

    Raises:
        UsageError: another suffix, or no such folder.
    """
    if out.suffix.lower() not in suffixes:
        purpose = f", for {what}," if what else ","
        raise UsageError(f"out: expected a path that ends in {suffixes[0]}{purpose} got {out}")
    if not out.parent.is_dir():
        raise UsageError(f"out: expected a path in a folder that exists, got {out}")
    if out.is_dir():
        raise UsageError(f"out: expected a path of a file, got the folder {out}")


def check_out_folder(out: Path) -> None:
    """Checks where single files are to be written, before the work that they take.

    Raises:
        FileExistsError: the folder has files, or is a file or in one.
    """
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out}: expected a new or an empty folder, got one with files")
    above = next(path for path in (out, *out.parents, Path.cwd()) if path.exists())
    if not above.is_dir():
        raise FileExistsError(f"{out}: expected a folder, got a file, {above}")


def write_single_samples(samples: Samples, out: Path, names: Sequence[str] | None = None) -> None:
    """Write each sample to a file of its own in a folder, which is made if it is missing: 000000.png, ...

    Args:
        names: of the files, without their suffix, all different; with "/" in a subfolder.

    Raises:
        FileExistsError: the folder has files. OSError: a file can't be written; names it, and leaves no part of it.
    """
    check_out_folder(out)
    if isinstance(samples, Images):
        files = [encode_png(image) for image in _bytes(samples, out)]
    elif isinstance(samples, Texts):
        files = [(text + "\n").encode("utf-8", errors="replace") for text in samples.texts]
    else:
        waves = _finite_waves(samples, out)
        files = [encode_wav(wave[None], samples.sample_rate) for wave in waves]
    make_folder(out)
    for name, data in zip(names or [f"{number:06}" for number in range(len(files))], files, strict=True):
        path = out / (name + SUFFIXES[type(samples)])
        make_folder(path.parent)
        _write_new(path, data)


def _write_new(path: Path, data: bytes) -> None:
    """Writes a file that does not exist yet, all of it or nothing; OSError names it.

    Not synced to disk as by ``write_whole``: there may be thousands of files.
    """
    try:
        path.write_bytes(data)
    except BaseException as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def _bytes(samples: Images, out: Path) -> torch.Tensor:
    """The pixels (N, C, H, W) uint8. UsageError: some are not finite."""
    pixels = samples.pixels.detach().float().cpu()
    broken = int((~pixels.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise UsageError(f"{out}: expected finite pixels, got {broken} of {len(pixels)} images with NaN or infinity")
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _finite_waves(samples: Sounds, out: Path) -> torch.Tensor:
    """The waves (N, samples) in [-1, 1]. UsageError: some are not finite."""
    broken = int((~samples.waves.isfinite()).any(1).sum())
    if broken:
        raise UsageError(f"{out}: expected finite samples, got {broken} of {len(samples.waves)} with NaN or infinity")
    return checked_waves(samples)


def write_arrays(samples: Samples, out: Path) -> None:
    """Write images to an .npz file as tools for Frechet distances read it: uint8 (N, H, W, C) as ``arr_0``, and
    ``labels`` where they are known; waves (N, samples) as float32.

    Raises:
        UsageError: texts, or values that are not finite.
    """
    if isinstance(samples, Texts):
        raise UsageError(f"out: expected a path that ends in .txt, got {out}")
    if isinstance(samples, Images):
        arrays = {"arr_0": _bytes(samples, out).permute(0, 2, 3, 1).contiguous().numpy()}
        if samples.labels is not None:
            arrays["labels"] = samples.labels.cpu().numpy()
    else:
        arrays = {"arr_0": _finite_waves(samples, out).numpy()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_whole(out, buffer.getvalue())


def write_samples(samples: Samples, out: Path) -> None:
    """Write samples to a file with the suffix of their type, or to .npz.

    Raises:
        UsageError: another suffix, or no such folder.
    """
    suffix = SUFFIXES[type(samples)]
    check_out(out, (suffix,) if isinstance(samples, Texts) else (suffix, ARRAYS))
    if out.suffix.lower() == ARRAYS:
        write_arrays(samples, out)
    else:
        save_samples(out.parent, out.name.removesuffix(out.suffix), samples)
