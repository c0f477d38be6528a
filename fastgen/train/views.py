"""Views of a trained model beside plain samples: reconstructions, latents, interpolations, nearest training images,
sweeps, the model's own visualizations."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgen.data import Items
from fastgen.metrics import nearest_training
from fastgen.models import Images, Samples, Texts
from fastgen.models.base import image_rows
from fastgen.models.conditioning import has_classes
from fastgen.train.errors import UsageError
from fastgen.train.evaluation import VISUALIZED, Thinned, first
from fastgen.train.files import write_whole
from fastgen.train.folder import RunFolder
from fastgen.train.image_files import FileItems, file_names
from fastgen.train.settings import data_of, split
from fastgen.train.stream import to_device
from fastgen.train.trained import ARRAYS, BATCH, Trained, check_out, joined, sample

HELD_OUT = "held-out"
COLUMNS = 8
MOST_SWEPT = 8
SEARCHED = 1024  # training images in memory at once
MOST_FRAMES, FRAME_MS, LAST_FRAME_MS = 60, 150, 3000
WIDEST_FRAME = 760


def chosen_items(trained: Trained, folder: RunFolder, source: str) -> Items:
    """Images to encode: a file or a folder, resized to those of the training, or the run's held-out items.

    Raises:
        FileNotFoundError, ValueError: no such path, or no images. UsageError: the data of the run have changed.
    """
    if source == HELD_OUT:
        return split(data_of(trained.header, folder, type(trained.model)), trained.model.config)[1]
    config = trained.model.config
    return FileItems(Path(source), ("images",), config.image_size, config.channels)


def _batches(trained: Trained, items: Items, n: int, options: Any) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Images and what the model needs besides: labels of the items, or else the one among the options."""
    model = trained.model
    if not hasattr(model, "reconstruct"):
        raise UsageError(f"reconstruct, encode: expected an autoencoder, got {model.name}")
    found = []
    some = Thinned(items, n)
    for indices in torch.arange(len(some)).split(BATCH):
        batch = to_device(some.batch(indices), model.device)
        conditions: tuple[Tensor, ...] = ()
        if hasattr(options, "label"):
            if options.label >= 0:
                batch["labels"] = torch.full((len(indices),), options.label, device=model.device)
            if "labels" not in batch:
                raise UsageError(f"label: expected the class of the images, as {model.name} has classes, got none")
            conditions = (batch["labels"],)
        found.append((batch["images"], conditions))
    return found


@torch.no_grad()
def reconstructions(trained: Trained, items: Items, n: int, options: Any) -> Images:
    """Rows of images, each above the row of its reconstructions, of at most n items, evenly spaced.

    Raises:
        UsageError: no autoencoder, or no class for images without one.
    """
    model: Any = trained.model
    given, made = [], []
    for images, conditions in _batches(trained, items, n, options):
        given.append(images)
        made.append(model.reconstruct(images, *conditions))
    return image_rows(torch.cat(given), torch.cat(made))


@torch.no_grad()
def write_latents(trained: Trained, items: Items, options: Any, out: Path) -> None:
    """Write the latents of all items to an .npz file: ``z``, the mean of the posterior (N, D) float32, or codes
    (N, h, w) int64; ``labels`` (N,) where the items have classes; ``names`` (N,), paths of the user's files.

    Raises:
        UsageError: no autoencoder, another suffix, or no class for images without one.
    """
    check_out(out, (ARRAYS,), "latents")
    model: Any = trained.model
    latents, labels = [], []
    for images, conditions in _batches(trained, items, len(items), options):
        encoded = model.encode(images, *conditions)
        latents.append((encoded[0] if isinstance(encoded, tuple) else encoded).cpu())
        labels += [each.cpu() for each in conditions]
    arrays = {"z": torch.cat(latents).numpy()} | ({"labels": torch.cat(labels).numpy()} if labels else {})
    if (names := file_names(items)) is not None:
        arrays["names"] = np.array(names)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_whole(out, buffer.getvalue())


def interpolations(trained: Trained, n: int, options: Any, seed: int) -> Images:
    """About n images in rows of ``COLUMNS``, each from one random latent to another.

    Raises:
        UsageError: the model has no continuous latent.
    """
    try:
        return trained.model.interpolate(
            max(1, n // COLUMNS), COLUMNS, options, generator=torch.Generator().manual_seed(seed)
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"interpolate: {error}") from error


def nearest_neighbors(trained: Trained, folder: RunFolder, n: int, options: Any, seed: int) -> Images:
    """Rows of n samples, each above the row of the training images nearest to them in pixels.

    Raises:
        UsageError: no images from noise, or the data of the run have changed.
    """
    if trained.model.kind != "images":
        raise UsageError(f"nearest: expected a model of images, got {trained.model.name}")
    train = split(data_of(trained.header, folder, type(trained.model)), trained.model.config)[0]
    samples = sample(trained, n, options, seed)
    assert isinstance(samples, Images)
    pixels = samples.pixels.float().clamp(0, 1).cpu()
    closest, neighbors = torch.full((len(pixels),), torch.inf, dtype=torch.float64), torch.zeros_like(pixels)
    for indices in torch.arange(len(train)).split(SEARCHED):
        block = train.batch(indices)["images"].cpu()
        found, distances = nearest_training(pixels, block)
        closer = distances < closest
        closest[closer], neighbors[closer] = distances[closer], block[found[closer]]
    return image_rows(pixels, neighbors)


def sweep(trained: Trained, n: int, option: str, options: Any, seed: int) -> Samples:
    """Samples of the same noise with several values of a sampling option: a row of images, or texts, for each.

    Args:
        n: samples of each value; at most ``MOST_SWEPT`` are made.
        option: "temperature=0.5,0.8,1"; all values are checked before the first is sampled.

    Raises:
        UsageError: no such option, or a value that does not fit.
    """
    name, _, values = option.partition("=")
    name = name.replace("-", "_")
    kinds = get_type_hints(type(options))
    numbers = [each.name for each in dataclasses.fields(options) if kinds[each.name] in (int, float)]
    if "label" in numbers and not has_classes(trained.model.config):
        numbers.remove("label")
    if name not in numbers or not values:
        known = ", ".join(numbers) or "none"
        raise UsageError(
            f"sweep: expected OPTION=VALUE,VALUE,... of a number that samples depend on ({known}), got {option!r}"
        )
    rows: list[Samples] = []
    swept = [(value, _swept_options(options, name, value, kinds[name])) for value in values.split(",")]
    for value, changed in swept:
        try:
            row = sample(trained, min(n, MOST_SWEPT), changed, seed)
        except (TypeError, ValueError) as error:
            raise UsageError(f"sweep: {error}") from error
        rows.append(Texts([f"{name} {value}\n{text}" for text in row.texts]) if isinstance(row, Texts) else row)
    together = joined(rows)
    if isinstance(together, Images):
        return dataclasses.replace(together, columns=min(n, MOST_SWEPT))
    return together


def _swept_options(options: Any, name: str, value: str, kind: type) -> Any:
    """The options with a value, as the user typed it, for one of them. UsageError: no number, or out of range."""
    try:
        number = kind(value)
    except ValueError as error:
        expected = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"sweep: expected {expected} after {name}=, got {value!r}") from error
    try:
        return dataclasses.replace(options, **{name: number})
    except ValueError as error:
        raise UsageError(f"sweep: {error}") from error


@torch.no_grad()
def shown(trained: Trained, folder: RunFolder, name: str, n: int, seed: int) -> Samples:
    """One of the visualizations of held-out items by the model: "attention", "completions", ...

    Args:
        n: number of held-out items, or of samples of models that draw them; at most ``VISUALIZED``.

    Raises:
        UsageError: no such visualization, or the data of the run have changed.
    """
    model = trained.model
    held_out = chosen_items(trained, folder, HELD_OUT)
    batch = first(Thinned(held_out, min(n, VISUALIZED)), VISUALIZED, model.device)
    found = model.visualize(batch, generator=torch.Generator().manual_seed(seed))
    if name not in found:
        raise UsageError(f"show: expected one of {', '.join(found) or 'none'} for {model.name}, got {name!r}")
    return found[name]


def write_history(folder: RunFolder, name: str, out: Path) -> None:
    """Write a GIF of the samples that were saved during training, which have the same noise.

    Args:
        name: of the samples: "samples", or another subfolder of the run.

    Raises:
        UsageError: another suffix, or no saved samples.
    """
    check_out(out, (".gif",), "a history")
    files = sorted(
        (folder.path / name).glob("[0-9]*.png"), key=lambda file: int(file.stem) if file.stem.isdigit() else -1
    )
    if not files:
        raise UsageError(f"history: expected PNG files of samples in {folder.path / name}, got none")
    keep = torch.linspace(0, len(files) - 1, min(MOST_FRAMES, len(files))).round().long().tolist()
    frames = []
    for index in keep:
        with Image.open(files[index]) as image:
            frame = image.convert("RGB")
        frame.thumbnail((WIDEST_FRAME, 8 * WIDEST_FRAME))
        frames.append(frame.convert("P", palette=Image.Palette.ADAPTIVE))
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write_whole(out, buffer.getvalue())
