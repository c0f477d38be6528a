"""Runs: training in a folder, from the start or from a checkpoint."""

from __future__ import annotations

import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor

from fastgen import environment
from fastgen.data import Dataset, Items
from fastgen.models import GenerativeModel, recompute_buffers
from fastgen.train.card import write_card
from fastgen.train.checkpoint import Header, load_checkpoint
from fastgen.train.config import TrainConfig
from fastgen.train.curves import read_rows
from fastgen.train.distances import check_distances
from fastgen.train.engine import Engine, find
from fastgen.train.errors import StoppedError, UsageError
from fastgen.train.estimate import Plan, peak_memory
from fastgen.train.files import inside
from fastgen.train.folder import RunFolder
from fastgen.train.inspection import inspect
from fastgen.train.limits import check_batch, check_model
from fastgen.train.lock import locked
from fastgen.train.loop import Trainer
from fastgen.train.progress import Progress
from fastgen.train.settings import (
    Chosen,
    Request,
    changed,
    command,
    configs,
    new_settings,
    resumed_settings,
    settings,
    split,
)
from fastgen.train.sharding import leave, make_accelerator, whole
from fastgen.train.signals import stop_on_signals

SMALL_STEP = 2**28
"""Elements of a batch x weights below which a second thread gains little, and costs much where cores are shared."""


UNWRITABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Unicode categories that can't be part of a YAML comment."""


@dataclass(frozen=True)
class Result:
    """The result of training. held_out: the last scores of the averaged weights, means over held_out_items."""

    steps: int
    parameters: int
    seconds: float
    held_out: dict[str, float]
    held_out_items: int
    skipped: int


def train(request: Request) -> Result:
    """Train a model in a folder; each process of several calls it alike.

    Raises:
        StoppedError: by a signal, or because gradients stay NaN or infinite.
        FileExistsError, FileNotFoundError: the folder holds a run already, or none to resume, or another process trains
            in it.
        UsageError, ValueError, TypeError: options, data or a checkpoint that do not fit.
        OSError: a file can't be written; the previous checkpoint is kept.
    """
    if not first_process():  # the first one holds the lock for all of them
        return _train_in_folder(request)
    _check_folder(request)
    with locked(request.folder.path):
        _check_folder(request)  # again: another process may have trained there meanwhile
        return _train_in_folder(request)


def plan(request: Request) -> tuple[Header, Chosen, Plan]:
    """What a new run would do, after a few timed steps; nothing is written.

    Raises:
        UsageError, ValueError, TypeError: options or data that do not fit.
    """
    if request.resume or request.overwrite:
        raise UsageError(f"dry_run: expected no --{'resume' if request.resume else 'overwrite'} with it, got one")
    header, data, chosen = new_settings(request)
    prepared = _prepare(request, header, data)
    accelerator, engine = prepared.accelerator, prepared.engine
    try:
        with limited_threads(engine.config, engine.model, prepared.splits[0]):
            trainer = Trainer(engine, prepared.splits, request.folder, header)
            trainer.rehearse()
            found = Plan(
                parameters=prepared.parameters,
                steps=engine.total,
                training_items=len(prepared.splits[0]),
                held_out_items=len(prepared.splits[1]),
                sentence=trainer.costs.sentence(0),
                memory=peak_memory(accelerator.device),
                device=str(accelerator.device),
                threads=torch.get_num_threads(),
            )
        return header, chosen, found
    finally:
        leave(accelerator)


@dataclass(frozen=True)
class _Prepared:
    """A run before its first step."""

    engine: Engine
    splits: tuple[Items, Items]
    accelerator: Accelerator
    trackers: list[str]
    parameters: int


def _prepare(request: Request, header: Header, data: Dataset, tensors: dict[str, Tensor] | None = None) -> _Prepared:
    """The model, on its device, with its data. tensors: of the checkpoint to resume."""
    folder = request.folder
    model_class, model_config, config = configs(folder.checkpoint, header, request.model_class)
    splits = split(data, model_config)
    device = choose_device(config.device)
    trackers = _trackers(config)
    accelerator = make_accelerator(config, device, log_with=trackers or None, project_dir=str(folder.path))
    try:
        if accelerator.num_processes == 1 or config.strategy == "ddp":
            check_model(model_class, model_config, accelerator.device)
        check_batch(config, splits[0], accelerator.num_processes, accelerator.device)
        torch.manual_seed(config.seed)
        model = model_class(model_config)
        model.class_names = tuple(data.classes)
        if config.init_from and tensors is None:
            _start_from(model, config.init_from)
        inspect(model, splits)
        check_distances(config.distance_samples, model, splits, accelerator.num_processes)
        parameters = sum(weight.numel() for weight in model.parameters())
        batches_per_step = max(phase.repeats for phase in model.phases())
        total = config.total_steps(len(splits[0]), batches_per_step)
        engine = Engine(model, config, total, accelerator)
        if tensors is not None:
            engine.restore(tensors)
            tensors.clear()
            if total < engine.step:
                name = "steps" if config.steps else "epochs"
                raise UsageError(f"{name}: expected at least the {engine.step} steps that are trained, got {total}")
        return _Prepared(engine, splits, accelerator, trackers, parameters)
    except BaseException:
        leave(accelerator)
        raise


def _train_in_folder(request: Request) -> Result:
    started = time.perf_counter()
    folder = request.folder
    tensors: dict[str, Tensor] | None = None
    changes: dict[str, list[Any]] = {}
    chosen = Chosen()
    if request.resume:
        saved, tensors = load_checkpoint(folder.checkpoint)
        configs(folder.checkpoint, saved, request.model_class)
        header, data = resumed_settings(request, saved)
        changes = changed(saved, header, request.model_class)
    else:
        header, data, chosen = new_settings(request)
    prepared = _prepare(request, header, data, tensors)
    engine, splits, accelerator = prepared.engine, prepared.splits, prepared.accelerator
    try:
        if first_process():
            for note in data.warnings:
                print(f"fastgen: {data.name}: {note}", file=sys.stderr)
            if chosen.options:
                print(f"fastgen: {chosen}", file=sys.stderr)
            if not request.resume:
                folder.clear()
            folder.begin(
                {
                    "command": request.command,
                    **_environment(accelerator, prepared.parameters),
                    "classes": list(data.classes),
                },
                settings(header, request.model_class),
                command(header.model, folder, "--config"),
                {"step": engine.step, "command": request.command, "changed": changes} if request.resume else None,
            )
            folder.keep_metrics(engine.step)
        accelerator.wait_for_everyone()
        _start_trackers(accelerator, prepared.trackers, folder, engine.step)
        with limited_threads(engine.config, engine.model, splits[0]):
            trainer = Trainer(engine, splits, folder, header)
            _train(trainer, accelerator)
        return Result(
            steps=engine.step,
            parameters=prepared.parameters,
            seconds=time.perf_counter() - started,
            held_out=_last_held_out(folder),
            held_out_items=len(trainer.held_out),
            skipped=int(engine.skipped),
        )
    finally:
        leave(accelerator)


def _train(trainer: Trainer, accelerator: Accelerator) -> None:
    """Train; curves and report are written however it ends."""
    engine, folder = trainer.engine, trainer.folder
    first = accelerator.is_main_process
    try:
        with (
            stop_on_signals() as stop,
            Progress(engine.total, engine.step, trainer.epoch_steps, quiet=not first) as progress,
        ):
            trainer.run(progress, stop)
    except BaseException as error:
        if first and folder.checkpoint.exists():
            with suppress(OSError):
                trainer.write_pages()
        if isinstance(error, KeyboardInterrupt):
            raise StoppedError("interrupted", trainer.saved, interrupted=True) from error
        if isinstance(error, OSError):
            raise StoppedError(_reason(error), trainer.saved, interrupted=False) from error
        raise
    with engine.averaged():
        weights = {name: whole(tensor) for name, tensor in engine.model.state_dict().items()}
        if first:
            write_pretrained(folder, engine.model, weights)
    if first:
        trainer.write_pages()
    accelerator.wait_for_everyone()


def _reason(error: OSError) -> str:
    return error.strerror if error.strerror and error.filename is None else str(error)


def write_pretrained(folder: RunFolder, model: GenerativeModel, weights: Mapping[str, Tensor]) -> None:
    """The averaged weights as ``from_pretrained`` reads them, in the run's folder ``model``, with a model card."""
    unsharded = type(model)(model.config)
    unsharded.class_names = model.class_names
    unsharded.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()})
    unsharded.save_pretrained(inside(folder.path, folder.pretrained.name))
    write_card(folder, unsharded)


def first_process() -> bool:
    """Whether this is the first of the processes that a launcher started; True without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def _check_folder(request: Request) -> None:
    path = request.folder.path
    if request.resume and request.overwrite:
        raise UsageError("resume, overwrite: expected at most one of them, got both")
    if any(unicodedata.category(character) in UNWRITABLE for character in str(path)):
        raise UsageError(f"out: expected a path without line ends and other control characters, got {str(path)!r}")
    holds_run = request.folder.holds_run()
    if request.resume and not holds_run:
        raise FileNotFoundError(f"{path}: expected a run to resume, got a path without one")
    if request.resume and not os.path.lexists(request.folder.checkpoint):
        raise FileNotFoundError(
            f"{path}: expected a run with a checkpoint, got one that ended before its first; --overwrite starts over"
        )
    if holds_run and not (request.resume or request.overwrite):
        raise FileExistsError(f"{path}: holds a run already; --resume continues it, --overwrite replaces it")


def load_average(model: GenerativeModel, tensors: Mapping[str, Tensor]) -> None:
    """Load the averaged weights of a checkpoint and all else, and call ``fastgen.models.recompute_buffers``.

    On the device of training these are the weights that it was evaluated with, bit for bit.
    """
    for name, tensor in model.state_dict().items():
        averaged = f"average/{name}"
        tensor.copy_(find(tensors, averaged if averaged in tensors else f"model/{name}", tensor))
    recompute_buffers(model)


def _start_from(model: GenerativeModel, init_from: str) -> None:
    """Load the averaged weights of a run. UsageError: they do not fit the model's options."""
    path = RunFolder(Path(init_from)).checkpoint
    header, tensors = load_checkpoint(path)
    try:
        with torch.no_grad():
            load_average(model, tensors)
    except ValueError as error:
        before = configs(path, header, type(model))[1]
        named = [
            f"model.{name}: expected {getattr(before, name)!r}, as in {init_from}, got {getattr(model.config, name)!r}"
            for name in _reshaping(type(model), before, model.config)
        ]
        message = "; ".join(named) or f"init_from: expected a run whose weights fit the model's options, got {error}"
        raise UsageError(message) from error


def _reshaping(model_class: type[GenerativeModel], before: Any, after: Any) -> list[str]:
    """Names of the options that differ between two configs and change names or shapes of weights."""

    def shapes(config: Any) -> dict[str, torch.Size]:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return {name: weight.shape for name, weight in model_class(config).named_parameters()}

    found = []
    names = [field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)]
    for name in names:
        try:
            if shapes(replace(before, **{name: getattr(after, name)})) != shapes(before):
                found.append(name)
        except (TypeError, ValueError, RuntimeError):  # fits only with the other options, or has to compute weights
            found.append(name)
    return found


def choose_device(name: str) -> torch.device:
    """Raises UsageError for a device that torch does not know or this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU device, cpu")
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"device: expected one that this machine has, got {name!r} ({reason})") from error
    return device


@contextmanager
def limited_threads(config: TrainConfig, model: GenerativeModel, items: Items) -> Iterator[None]:
    """Context with ``config.threads`` torch threads."""
    before = torch.get_num_threads()
    elements = config.batch_size * max(tensor.numel() for tensor in items.batch(torch.tensor([0])).values())
    work = elements * sum(weight.numel() for weight in model.parameters())
    torch.set_num_threads(config.threads or (1 if work < SMALL_STEP else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _environment(accelerator: Accelerator, parameters: int) -> dict[str, Any]:
    info = environment.info()
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **info.versions,
        "devices": info.devices,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "parameters": parameters,
        "backend": info.backend,
        "libraries": info.libraries,
    }


def _trackers(config: TrainConfig) -> list[str]:
    names = [name.strip() for name in config.trackers.split(",") if name.strip()]
    there = [str(tracker) for tracker in get_available_trackers()]
    missing = sorted(set(names) - set(there))
    if missing:
        raise UsageError(
            f"trackers: expected installed ones that accelerate supports ({', '.join(there) or 'none is'}),"
            f" got {', '.join(missing)}"
        )
    return names


def _start_trackers(accelerator: Accelerator, trackers: list[str], folder: RunFolder, step: int) -> None:
    if not trackers:
        return
    project = (
        "tensorboard" if trackers == ["tensorboard"] else "fastgen"
    )  # the folder of TensorBoard, the project of others
    inside(folder.path, project)
    accelerator.init_trackers(project, init_kwargs={"tensorboard": {"purge_step": step + 1}})


def _last_held_out(folder: RunFolder) -> dict[str, float]:
    rows = [row for row in read_rows(folder.metrics) if row.get("part") == "held-out"]
    values = rows[-1]["values"] if rows else {}
    return {name: float(value) if isinstance(value, (int, float)) else math.nan for name, value in values.items()}
