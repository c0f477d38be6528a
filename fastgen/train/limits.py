"""Requests that this machine can't serve, rejected early: huge sizes, models and batches beyond its memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastgen.data import Items
from fastgen.models import GenerativeModel
from fastgen.train.config import MOST_STEPS, TrainConfig
from fastgen.train.errors import UsageError

MOST_LAYERS, MOST_SIZE = 1000, 2**20
USUAL_LAYERS, USUAL_SIZE = 50, 1024
LAYERS = ("depth", "blocks", "flows", "num_downsamples", "cycle", "cycles")
"""Ends of the names of options that count layers."""
LENGTHS = ("every", "warmup", "crop")  # ends of the names of options that count steps, or samples of audio
COPIES = 5  # of the weights in training: weights, gradients, AdamW's two averages, the running average
GIB = 2**30


def check_sizes(options: Mapping[str, Any]) -> None:
    """Raises UsageError where an option of a model exceeds any realistic number of layers, or size."""
    for name, value in options.items():
        most = MOST_LAYERS if name.endswith(LAYERS) else MOST_STEPS if name.endswith(LENGTHS) else MOST_SIZE
        if isinstance(value, int) and value > most:
            raise UsageError(f"model.{name}: expected at most {most}, got {value}")


def check_model(model_class: type[GenerativeModel], config: Any, device: torch.device) -> None:
    """Raises UsageError where the weights, gradients, optimizer states and averages of a model don't fit into memory.

    Models of usual sizes are not checked.
    """
    sizes = {name: value for name, value in asdict(config).items() if isinstance(value, int)}
    if not any(value > (USUAL_LAYERS if name.endswith(LAYERS) else USUAL_SIZE) for name, value in sizes.items()):
        return
    there = memory(device)
    room = "memory" if there is None else f"{there / GIB:.1f} GiB"
    expected = f"model: expected weights that fit into {room} with their gradients and averages"
    try:
        with torch.device("meta"):
            model = model_class(config)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if "overflow" in str(error):
            raise UsageError(f"{expected}, got more of them than can be counted") from error
        return  # a model that can't be built on the meta device; building it will raise
    needed = COPIES * sum(weight.numel() * weight.itemsize for weight in model.parameters())
    needed += sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    if there is not None and needed > there:
        raise UsageError(
            f"{expected}, got {sum(weight.numel() for weight in model.parameters()):,}, which take"
            f" {needed / GIB:,.1f} GiB"
        )


def check_batch(config: TrainConfig, items: Items, processes: int, device: torch.device) -> None:
    """Raises UsageError where a process' part of a batch does not fit into memory."""
    there = memory(device)
    one = sum(tensor.numel() * tensor.itemsize for tensor in items.batch(torch.tensor([0])).values())
    needed = one * (config.batch_size // (config.accumulate * processes))
    if there is not None and needed > there:
        raise UsageError(
            f"batch_size: expected a batch that fits into {there / GIB:.1f} GiB, got {config.batch_size:,} items in"
            f" {config.accumulate * processes} parts, of {needed / GIB:,.1f} GiB each"
        )


def memory(device: torch.device) -> int | None:
    """Memory of the device in bytes, or this process' limit; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # no such file, or "max"
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(found, default=None)
