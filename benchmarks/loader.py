"""Items per second of the data loader, beside those of a training step: ``python benchmarks/loader.py [FOLDER]``.

Without a folder, JPEG files of photographs' patches are written to a temporary one. The images are read twice: into
memory, and decoded batch by batch as a dataset larger than memory is, in the training process and in workers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

import fastgen.data.images
from fastgen.data import DataConfig, Items, load_data
from fastgen.models import StepContext, create_model
from fastgen.train.stream import Stream, batches, resident

REPEATS = 3


def write_images(folder: Path, count: int, size: int) -> None:
    """JPEG files, twice as large as they are trained on."""
    patches = load_data(DataConfig("photos", image_size=min(2 * size, 128), items=min(count, 500)), "images").train
    for i in range(count):
        pixels = patches.batch(torch.tensor([i % len(patches)]))["images"][0]
        array = (255 * pixels).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).resize((2 * size, 2 * size)).save(folder / f"{i:05}.jpg", quality=90)


def loaded_per_second(items: Items, batch_size: int, workers: int, device: torch.device, seconds: float) -> float:
    """Items per second, the first batches left out, in which workers start."""
    stream = Stream(len(items), 0, batch_size, batches_per_step=1, accumulate=1, process=0, processes=1)
    stream.first_step, stream.last_step = 1, 10**9
    parts = batches(items, stream, device, workers)
    for _ in islice(parts, 4 * max(1, workers) + 1):  # what was prefetched meanwhile, too
        pass
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += len(next(parts)["images"].to(device, non_blocking=True))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def trained_per_second(size: int, channels: int, batch_size: int, device: torch.device, seconds: float) -> float:
    """Items per second of the default DCGAN's discriminator and generator steps, without a loader."""
    model = create_model("dcgan", image_size=size, channels=channels).to(device)
    batch = {"images": torch.rand(batch_size, channels, size, size, device=device)}
    optimizers = {phase.name: torch.optim.AdamW(model.parameters(), lr=1e-4) for phase in model.phases()}

    def steps() -> Iterator[None]:
        for step in range(1, 10**9):
            for name, optimizer in optimizers.items():
                optimizer.zero_grad()
                model.loss(name, batch, StepContext(step, 10**9))["loss"].backward()
                optimizer.step()
            yield

    running = steps()
    next(running)
    count, began = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - began < seconds:
        next(running)
        count += batch_size
        if device.type == "cuda":
            torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="folder of images; default: generated ones")
    parser.add_argument("--size", type=int, default=64, help="image size")
    parser.add_argument("--items", type=int, default=2000, help="number of generated images")
    parser.add_argument("--batch-size", type=int, default=64, help="batch size")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{given.size}x{given.size}, batch {given.batch_size}, {device}, {torch.get_num_threads()} threads; items/s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if given.folder is None:
            write_images(folder, given.items, given.size)
        rows: dict[str, list[float]] = {}
        config = DataConfig(str(folder), image_size=given.size)
        train = resident(load_data(config, "images").train, device)
        channels = train.batch(torch.tensor([0]))["images"].shape[1]
        fastgen.data.images.MEMORY_LIMIT = 0
        lazy = load_data(config, "images").train
        for _ in range(REPEATS):
            found = loaded_per_second(train, given.batch_size, 0, device, given.seconds)
            rows.setdefault("loader, in memory", []).append(found)
            for workers in given.workers:
                found = loaded_per_second(lazy, given.batch_size, workers, device, given.seconds)
                rows.setdefault(f"loader, decoding, {workers} workers", []).append(found)
            found = trained_per_second(given.size, channels, given.batch_size, device, given.seconds)
            rows.setdefault("DCGAN step", []).append(found)
    for name, values in rows.items():
        print(f"{name:<28} {statistics.median(values):>10,.0f}  ({min(values):,.0f} to {max(values):,.0f})")


if __name__ == "__main__":
    main()
