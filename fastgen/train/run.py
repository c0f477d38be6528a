"""Runs: train one in its folder, from the start or from its checkpoint, and sample from one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data import ImageData, load_images
from fastgen.models import MODELS, ConvVAE, ConvVAEConfig
from fastgen.train.checkpoint import Header, load_checkpoint, save_checkpoint
from fastgen.train.errors import DivergedError, StoppedError, UsageError
from fastgen.train.folder import RunFolder
from fastgen.train.loop import TrainConfig, choose_device, evaluate, fit, limited_threads
from fastgen.train.pictures import write_grid, write_pairs
from fastgen.train.progress import Progress
from fastgen.train.state import TrainState, kept_epoch, load_weights

FROM_DATA = ("image_size", "channels", "levels")  # fields of a model's config that the data decide
FREE_ON_RESUME = ("epochs", "threads", "device")
DEFAULT_DATA = "digits"
SAMPLES_SHOWN = 64
PAIRS_SHOWN = 64


@dataclass(frozen=True)
class Request:
    """What a person asked for. The options hold only what was given; the rest takes its default or, on
    ``resume``, the run's own value."""

    model: str
    folder: RunFolder
    data: str | None = None
    train_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Result:
    """held_out_elbo is in nats per image, a mean over held_out_images."""

    epochs: int
    parameters: int
    held_out_elbo: float
    held_out_images: int
    seconds: float


def train(request: Request) -> Result:
    """Train a model in a folder, keeping after each epoch its metrics, a checkpoint and pictures.

    Raises:
        StoppedError: Ctrl-C, or a loss that is no longer finite.
        FileExistsError, FileNotFoundError: the folder holds a run already, or none to resume.
        UsageError, ValueError, TypeError: options, data or a checkpoint that do not fit.
    """
    started = time.perf_counter()
    folder = request.folder
    _check_folder(request)
    tensors: dict[str, Tensor] = {}
    if request.resume:
        saved, tensors = load_checkpoint(folder.checkpoint)
        header, data = _resumed(request, saved)
    else:
        header, data = _fresh(request)
    model_config, config = _configs(folder.checkpoint, header)
    device = choose_device(config.device)

    torch.manual_seed(config.seed)
    state = TrainState(MODELS[header.model].model(model_config).to(device), config.learning_rate)
    if request.resume:
        state.restore(tensors)
        if config.epochs < state.epoch:
            raise UsageError(f"epochs: expected at least {state.epoch}, which are trained, got {config.epochs}")
    else:
        folder.clear()
    folder.write_config(header)
    folder.keep_metrics(state.epoch)
    with limited_threads(config, data.train):
        _train_in_folder(state, data, config, folder, header)
        elbo, _, _ = evaluate(state.average, data.test.to(device))
    return Result(
        epochs=state.epoch,
        parameters=sum(weight.numel() for weight in state.model.parameters()),
        held_out_elbo=elbo,
        held_out_images=len(data.test),
        seconds=time.perf_counter() - started,
    )


def _train_in_folder(
    state: TrainState, data: ImageData, config: TrainConfig, folder: RunFolder, header: Header
) -> None:
    """Train, keeping each epoch, and the state at the start: there is always one to resume."""
    save_checkpoint(folder.checkpoint, header, state.tensors())
    try:
        _draw(folder, state.average, data)
        with Progress(config.epochs, len(data.train), finished=state.epoch) as progress:
            for metrics in fit(state, data, config, progress):
                folder.add_metrics(metrics)
                save_checkpoint(folder.checkpoint, header, state.tensors())
                _draw(folder, state.average, data)
                progress.finish_epoch(metrics)
    except KeyboardInterrupt as error:
        raise StoppedError("interrupted", kept_epoch(folder.checkpoint), interrupted=True) from error
    except DivergedError as error:
        raise StoppedError(str(error), kept_epoch(folder.checkpoint), interrupted=False) from error


def _check_folder(request: Request) -> None:
    path = request.folder.path
    if request.resume and request.overwrite:
        raise UsageError("resume, overwrite: expected at most one of them, got both")
    holds_run = request.folder.holds_run()
    if request.resume and not holds_run:
        raise FileNotFoundError(f"{path}: expected a run to resume, got a path without one")
    if holds_run and not (request.resume or request.overwrite):
        raise FileExistsError(f"{path}: holds a run already; --resume goes on with it, --overwrite replaces it")


def _fresh(request: Request) -> tuple[Header, ImageData]:
    config = _train_config(request.train_options)
    source = request.data or DEFAULT_DATA
    data = load_images(source)
    _, channels, height, width = data.train.shape
    if height != width:
        raise ValueError(f"{source}: images: expected square ones, got height {height} and width {width}")
    sizes: dict[str, Any] = {"image_size": height, "channels": channels, "levels": data.levels}
    try:
        model_config = MODELS[request.model].config(**sizes, **request.model_options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.{error}") from error
    origin = {"source": source, "fingerprint": data.fingerprint()}
    return Header(request.model, asdict(model_config), asdict(config), origin), data


def _resumed(request: Request, saved: Header) -> tuple[Header, ImageData]:
    """The run's own settings, but for those of the request that may change."""
    _train_config(request.train_options)
    fixed = {name: value for name, value in request.train_options.items() if name not in FREE_ON_RESUME}
    pairs: list[tuple[str, Any, Any]] = [("model", request.model, saved.model)]
    pairs += [(name, value, saved.train_config.get(name)) for name, value in fixed.items()]
    pairs += [(f"model.{name}", value, saved.model_config.get(name)) for name, value in request.model_options.items()]
    for name, asked, own in pairs:
        if asked != own:
            raise UsageError(f"{name}: expected {own!r}, as when the run in {request.folder.path} began, got {asked!r}")
    source = request.data or saved.data["source"]
    data = load_images(source)
    if data.fingerprint() != saved.data["fingerprint"]:
        raise UsageError(f"data: expected the images with which the run in {request.folder.path} began, got others")
    free = {name: value for name, value in request.train_options.items() if name in FREE_ON_RESUME}
    return replace(saved, train_config=saved.train_config | free, data=saved.data | {"source": source}), data


def _train_config(options: Mapping[str, Any]) -> TrainConfig:
    try:
        return TrainConfig(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _configs(checkpoint: Path, header: Header) -> tuple[ConvVAEConfig, TrainConfig]:
    try:
        return MODELS[header.model].config(**header.model_config), TrainConfig(**header.train_config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint}: expected a checkpoint of this version of fastgen, got {error}") from error


def _draw(folder: RunFolder, model: ConvVAE, data: ImageData) -> None:
    write_grid(folder.samples, model.sample(SAMPLES_SHOWN, generator=torch.Generator().manual_seed(0)))
    shown = data.test[:PAIRS_SHOWN]
    device = next(model.parameters()).device
    write_pairs(folder.reconstructions, shown, model.reconstruct(shown.to(device)).cpu())


def sample(folder: RunFolder, n: int, out: Path, seed: int = 0, device: str = "auto") -> None:
    """Write a grid of n samples of a run's averaged weights; one seed gives the same latents on every device.

    Raises:
        FileNotFoundError: no run there. UsageError, ValueError: n, out, device or the checkpoint do not fit.
    """
    if n < 1:
        raise UsageError(f"n: expected a positive number of samples, got {n}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed: expected an integer from 0 to 2^63 - 1, got {seed}")
    if out.suffix.lower() != ".png":
        raise UsageError(f"out: expected a path that ends in .png, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: expected a path in a folder that exists, got one in {out.parent}")
    header, tensors = load_checkpoint(folder.checkpoint)
    model_config, _ = _configs(folder.checkpoint, header)
    model = MODELS[header.model].model(model_config).to(choose_device(device)).eval()
    load_weights(model, tensors, "average/")
    write_grid(out, model.sample(n, generator=torch.Generator().manual_seed(seed)))
