"""Runs: train one in its folder, from the start or from its checkpoint."""

from __future__ import annotations

import math
import os
import shlex
import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor

from fastgen import environment
from fastgen.data import BUNDLED, SOURCES, DataConfig, Dataset, Items, bundled_name, load_data
from fastgen.models import MODELS, GenerativeModel, from_data, settle
from fastgen.train.card import write_card
from fastgen.train.checkpoint import Header, load_checkpoint
from fastgen.train.config import FREE_ON_RESUME, TrainConfig
from fastgen.train.curves import read_rows
from fastgen.train.engine import Engine, find
from fastgen.train.errors import StoppedError, UsageError
from fastgen.train.files import inside
from fastgen.train.folder import RunFolder
from fastgen.train.inspection import inspect
from fastgen.train.limits import check_batch, check_model, check_sizes
from fastgen.train.lock import locked
from fastgen.train.loop import Trainer
from fastgen.train.progress import Progress
from fastgen.train.sharding import leave, make_accelerator, whole
from fastgen.train.signals import noticed

SMALL_STEP = (
    2**28
)  # items' elements x weights; below, a second thread gains little, and loses much where cores are shared


UNWRITABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Kinds of characters that can't stand in the comment of config.yaml: YAML ends it, or is not UTF-8."""


@dataclass(frozen=True)
class Request:
    """What a person asked for. The options hold only what was given; the rest takes its default or, on
    ``resume``, the run's own value."""

    model: str
    folder: RunFolder
    data_options: Mapping[str, Any] = field(default_factory=dict)
    train_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    overwrite: bool = False
    command: str = ""  # what was typed, for the report


@dataclass(frozen=True)
class Result:
    """What came of training. held_out: the last figures of the averaged weights, means over held_out_items."""

    steps: int
    parameters: int
    seconds: float
    held_out: dict[str, float]
    held_out_items: int
    skipped: int


def train(request: Request) -> Result:
    """Train a model in a folder; each process of several calls it alike.

    Raises:
        StoppedError: a signal, or gradients that stay NaN or infinite.
        FileExistsError, FileNotFoundError: the folder holds a run already, or none to resume, or another process trains
            in it.
        UsageError, ValueError, TypeError: options, data or a checkpoint that do not fit.
        OSError: a file can't be written; the checkpoint before is kept.
    """
    if not first_process():  # the first one holds the lock for all of them
        return _train_in_folder(request)
    _check_folder(request)
    with locked(request.folder.path):
        _check_folder(request)  # again: another process may have trained there meanwhile
        return _train_in_folder(request)


def _train_in_folder(request: Request) -> Result:
    started = time.perf_counter()
    folder = request.folder
    tensors: dict[str, Tensor] = {}
    changes: dict[str, list[Any]] = {}
    if request.resume:
        saved, tensors = load_checkpoint(folder.checkpoint)
        configs(folder.checkpoint, saved)
        header, data = _resumed(request, saved)
        changes = changed(saved, header)
    else:
        header, data = _fresh(request)
    model_class, model_config, config = configs(folder.checkpoint, header)
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
        inspect(model, splits)
        parameters = sum(weight.numel() for weight in model.parameters())
        draws = max(phase.repeats for phase in model.phases())
        total = config.total_steps(len(splits[0]), draws)
        engine = Engine(model, config, total, accelerator)
        if request.resume:
            engine.restore(tensors)
            del tensors
            if total < engine.step:
                name = "steps" if config.steps else "epochs"
                raise UsageError(f"{name}: expected at least the {engine.step} steps that are trained, got {total}")
        if first_process():
            if not request.resume:
                folder.clear()
            folder.begin(
                {"command": request.command, **_environment(accelerator, parameters)},
                settings(header),
                command(header.model, folder, "--config"),
                {"step": engine.step, "command": request.command, "changed": changes} if request.resume else None,
            )
            folder.keep_metrics(engine.step)
        accelerator.wait_for_everyone()
        _start_trackers(accelerator, trackers, folder, engine.step)
        with limited_threads(config, model, splits[0]):
            trainer = Trainer(engine, splits, folder, header)
            _train(trainer, accelerator)
        return Result(
            steps=engine.step,
            parameters=parameters,
            seconds=time.perf_counter() - started,
            held_out=_last_held_out(folder),
            held_out_items=len(trainer.held_out),
            skipped=int(engine.skipped),
        )
    finally:
        leave(accelerator)


def _train(trainer: Trainer, accelerator: Accelerator) -> None:
    """Train, and leave the folder complete whatever ends it."""
    engine, folder = trainer.engine, trainer.folder
    first = accelerator.is_main_process
    try:
        with noticed() as stop, Progress(engine.total, engine.step, trainer.epoch_steps, quiet=not first) as progress:
            trainer.run(progress, stop)
    except BaseException as error:
        if first and folder.checkpoint.exists():
            with suppress(OSError):
                trainer.write_pages()
        if isinstance(error, KeyboardInterrupt):
            raise StoppedError("interrupted", trainer.saved, interrupted=True) from error
        if isinstance(error, OSError):
            raise StoppedError(_of_os(error), trainer.saved, interrupted=False) from error
        raise
    with engine.averaged():
        weights = {name: whole(tensor) for name, tensor in engine.model.state_dict().items()}
        if first:
            write_pretrained(folder, engine.model, weights)
    if first:
        trainer.write_pages()
    accelerator.wait_for_everyone()


def _of_os(error: OSError) -> str:
    return error.strerror if error.strerror and error.filename is None else str(error)


def write_pretrained(folder: RunFolder, model: GenerativeModel, weights: Mapping[str, Tensor]) -> None:
    """The averaged weights as ``from_pretrained`` reads them, in the run's folder ``model``, with a model card."""
    unsharded = type(model)(model.config)
    unsharded.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()})
    unsharded.save_pretrained(inside(folder.path, folder.pretrained.name))
    write_card(folder, unsharded)


def first_process() -> bool:
    """Of those that a launcher started; true where there is no launcher."""
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
            f"{path}: expected a run with a checkpoint, got one that ended before its first; --overwrite begins anew"
        )
    if holds_run and not (request.resume or request.overwrite):
        raise FileExistsError(f"{path}: holds a run already; --resume goes on with it, --overwrite replaces it")


def _fresh(request: Request) -> tuple[Header, Dataset]:
    model_class = MODELS[request.model]
    config = _checked(TrainConfig, {**model_class.train_defaults, **request.train_options})
    data_config = _anywhere(
        _checked(DataConfig, {"source": BUNDLED + model_class.default_data, **request.data_options})
    )
    data = load_data(data_config, *_kinds(model_class))
    told = {**data.facts, "kind": data.kind}
    wanted = from_data(model_class.config_class)
    missing = [name for name in wanted if name not in told]
    if missing and not model_class.kinds:
        raise UsageError(f"data: expected a set that tells {missing[0]}, for {request.model}, got {data.name}")
    facts = {name: told[name] for name in wanted if name in told}
    check_sizes(request.model_options)
    model_config = _checked(model_class.config_class, {**facts, **request.model_options}, prefix="model.")
    kept = asdict(data_config) | {"source": data_config.source.removeprefix(BUNDLED)}
    return Header(request.model, asdict(model_config), asdict(config), kept, data.fingerprint), data


def _resumed(request: Request, saved: Header) -> tuple[Header, Dataset]:
    """The run's own settings, but for those of the request that may change."""
    _checked(TrainConfig, {**saved.train_config, **request.train_options})
    fixed = {name: value for name, value in request.train_options.items() if name not in FREE_ON_RESUME}
    data_options = dict(request.data_options)
    source = saved.data_config["source"]
    if "source" in data_options:
        source = _anywhere(_checked(DataConfig, {"source": data_options.pop("source")})).source.removeprefix(BUNDLED)
    pairs: list[tuple[str, Any, Any]] = [("model", request.model, saved.model)]
    pairs += [(name, value, saved.train_config.get(name)) for name, value in fixed.items()]
    pairs += [(name, value, saved.data_config.get(name)) for name, value in data_options.items()]
    pairs += [(f"model.{name}", value, saved.model_config.get(name)) for name, value in request.model_options.items()]
    for name, asked, own in pairs:
        if asked != own:
            raise UsageError(
                f"{name}: expected {_shown(own)}, as when the run in {request.folder.path} began, got {_shown(asked)};"
                f" with --resume only {', '.join(FREE_ON_RESUME)} may change"
            )
    free = {name: value for name, value in request.train_options.items() if name in FREE_ON_RESUME}
    header = replace(saved, train_config=saved.train_config | free, data_config=saved.data_config | {"source": source})
    return header, data_of(header, request.folder)


def _shown(value: Any) -> str:
    return "its default" if value is None else repr(value)


def changed(before: Header, after: Header) -> dict[str, list[Any]]:
    """Options of training and data that differ, by name: the old value and the new one."""
    old, new = settings(before), settings(after)
    return {name: [old.get(name), value] for name, value in new.items() if name != "model" and old.get(name) != value}


def data_of(header: Header, folder: RunFolder) -> Dataset:
    """The data of a run; UsageError where they are no longer the same."""
    config = DataConfig(**header.data_config)
    if config.source in SOURCES:  # paths are kept absolute
        config = replace(config, source=BUNDLED + config.source)
    data = load_data(config, *_kinds(MODELS[header.model]))
    if data.fingerprint != header.fingerprint:
        raise UsageError(
            f"data: expected the items with which the run in {folder.path} began, got others in {data.name}"
        )
    return data


def _kinds(model_class: type[GenerativeModel]) -> tuple[str, ...]:
    return model_class.kinds or (model_class.kind,)


def split(data: Dataset, model_config: Any) -> tuple[Items, Items]:
    """Training and held-out items; the config says how long pieces of text are."""
    options: dict[str, Any] = getattr(model_config, "data_options", dict)()
    return data.splits(**options)


def configs(checkpoint: Path, header: Header) -> tuple[type[GenerativeModel], Any, TrainConfig]:
    """The model's class and the configs of a header. ValueError names the checkpoint, and what does not fit.

    Options that a header lacks, of an earlier version, take their defaults; not all of them.
    """
    try:
        if not header.model_config or not header.data_config.get("source"):
            raise ValueError(
                f"no {'options of the model' if header.data_config.get('source') else 'source of the data'}"
            )
        DataConfig(**header.data_config)
        model_class = MODELS[header.model]
        config = model_class.config_class(**header.model_config)
        return model_class, config, TrainConfig(**header.train_config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint}: expected a checkpoint of this version of fastgen, got {error}") from error


def load_average(model: GenerativeModel, tensors: Mapping[str, Tensor]) -> None:
    """The averaged weights of a checkpoint, what follows from them (``fastgen.models.settle``), and the rest as it was.

    On the device of training these are the weights that it was evaluated with, bit for bit.
    """
    for name, tensor in model.state_dict().items():
        averaged = f"average/{name}"
        tensor.copy_(find(tensors, averaged if averaged in tensors else f"model/{name}", tensor))
    settle(model)


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
    """Have torch use ``config.threads``, and afterwards as many as before."""
    before = torch.get_num_threads()
    elements = config.batch_size * max(tensor.numel() for tensor in items.batch(torch.tensor([0])).values())
    work = elements * sum(weight.numel() for weight in model.parameters())
    torch.set_num_threads(config.threads or (1 if work < SMALL_STEP else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _anywhere(config: DataConfig) -> DataConfig:
    """With a source that means the same from every folder. ValueError: a path that is also the name of a set."""
    name = bundled_name(config.source)
    if name is not None:
        return replace(config, source=BUNDLED + name)
    return replace(config, source=str(Path(config.source).resolve())) if os.path.exists(config.source) else config


def _checked(config_class: Any, options: Mapping[str, Any], prefix: str = "") -> Any:
    try:
        return config_class(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{prefix}{error}") from error


def settings(header: Header) -> dict[str, Any]:
    """A run's options as the command line takes them."""
    decided = from_data(MODELS[header.model].config_class)
    own = {name: value for name, value in header.model_config.items() if name not in decided}
    data = dict(header.data_config)
    return {"data": data.pop("source"), **data, **header.train_config, "model": own}


def command(model: str, folder: RunFolder, option: str) -> str:
    """What a person types to reproduce the run ("--config"), or to go on with it ("--resume")."""
    path = shlex.quote(str(folder.path))
    if option == "--config":
        return f"fastgen train {model} --config {shlex.quote(str(folder.config))} --out ANOTHER_FOLDER"
    return f"fastgen train {model} --out {path} {option}"


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
            f"trackers: expected what accelerate knows and is installed ({', '.join(there) or 'none is'}),"
            f" got {', '.join(missing)}"
        )
    return names


def _start_trackers(accelerator: Accelerator, trackers: list[str], folder: RunFolder, step: int) -> None:
    if not trackers:
        return
    project = "tensorboard" if trackers == ["tensorboard"] else "fastgen"  # TensorBoard's folder, others' project
    inside(folder.path, project)
    accelerator.init_trackers(project, init_kwargs={"tensorboard": {"purge_step": step + 1}})


def _last_held_out(folder: RunFolder) -> dict[str, float]:
    rows = [row for row in read_rows(folder.metrics) if row.get("part") == "held-out"]
    values = rows[-1]["values"] if rows else {}
    return {name: float(value) if isinstance(value, (int, float)) else math.nan for name, value in values.items()}
