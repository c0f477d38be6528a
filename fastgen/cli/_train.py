"""``fastgen train MODEL``."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from fastgen.batch import current_names
from fastgen.cli._errors import INTERRUPTED, USAGE, CommandError
from fastgen.cli._models import model_class
from fastgen.cli._options import add_fields, options_parser, parse
from fastgen.data import DataConfig
from fastgen.models import MODELS, GenerativeModel, from_data, list_models
from fastgen.train.config import FREE_ON_RESUME, TrainConfig
from fastgen.train.errors import StoppedError, UsageError
from fastgen.train.folder import RunFolder
from fastgen.train.presets import GPU, PRESETS
from fastgen.train.run import Result, first_process, plan, train
from fastgen.train.settings import Request, command, settings

ABOUT = "Train a model and write the run to a folder. With several processes: torchrun -m fastgen train ..."

PRESET_NAMES = ", ".join(name for name in PRESETS if not name.endswith(GPU)) + f" ({GPU} at the end: for a GPU)"

HELP = f"""\
usage: fastgen train MODEL [options]

{ABOUT}

MODEL is one of: {", ".join(list_models())};
or a class of your own, as path/to/file.py:MyModel.

fastgen train MODEL --help lists the options of training, data and the model; fastgen models MODEL describes it.
Options may be given in a file (--config); the command line overrides it.
--dry-run prints the options, the memory and the time of a run, and trains nothing.
--preset NAME takes options for data like: {PRESET_NAMES}.
--resume continues a run; these options may then change: {", ".join(FREE_ON_RESUME)}."""

RESUME = (
    "continue the run in the folder, with its own options; these may change: "
    + ", ".join("--" + name.replace("_", "-") for name in FREE_ON_RESUME)
    + ", and --data where the same data have moved"
)


def run(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP)
        return
    if not argv:
        raise CommandError(f"train: expected a model, one of {', '.join(list_models())}, got nothing", USAGE)
    request = _request(argv[0], argv[1:])
    folder = request.folder
    if request.dry_run:
        _dry_run(request)
        return
    try:
        result = train(request)
    except UsageError as error:
        raise CommandError(str(error), USAGE) from error
    except StoppedError as stop:
        again = command(request.model, folder, "--resume")
        if not stop.step:
            raise CommandError(
                f"{stop}; no step is saved in {folder.path}", INTERRUPTED if stop.interrupted else 1
            ) from stop
        saved = f"{stop}; step {stop.step} is saved in {folder.path}"
        raise CommandError(f"{saved}; continue with: {again}", INTERRUPTED if stop.interrupted else 1) from stop
    if first_process():
        print(_summary(request.model, folder, result))


def _dry_run(request: Request) -> None:
    """Print the options as a file for --config, with parameters, memory and time in comments."""
    try:
        header, chosen, found = plan(request)
    except UsageError as error:
        raise CommandError(str(error), USAGE) from error
    lines = [f"fastgen train {request.model}", *str(found).splitlines(), *([str(chosen)] if chosen.options else [])]
    options = settings(header, request.model_class)
    print("\n".join(f"# {line}" for line in lines))
    print(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), end="")


def _request(name: str, argv: list[str]) -> Request:
    model = model_class("train", name)
    parser = options_parser(f"fastgen train {name}", ABOUT)
    parser.add_argument(
        "--data", type=str, default=getattr(model, "default_data", ""), help="a bundled dataset, a path, or hf:NAME"
    )
    parser.add_argument("--out", type=str, default=f"runs/{model.name}", help="folder of the run")
    parser.add_argument(
        "--preset", type=str, default="", help=f"options for data like: {PRESET_NAMES}; other options override them"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print options, memory and an estimate of the time, and train nothing"
    )
    parser.add_argument("--resume", action="store_true", help=RESUME)
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    add_fields(parser, DataConfig, without=["source"])
    add_fields(parser, TrainConfig, defaults=model.train_defaults)
    add_fields(parser, model.config_class, prefix="model.", without=from_data(model.config_class))
    given = parse(parser, argv, defaults=False, refused=("out", "resume", "overwrite", "dry_run"))
    data_names = {field.name for field in dataclasses.fields(DataConfig)}
    data_options = {name: given.pop(name) for name in data_names & given.keys()}
    if "data" in given:
        data_options["source"] = given.pop("data")
    return Request(
        model=name,
        folder=RunFolder(Path(given.pop("out", f"runs/{model.name}"))),
        data_options=data_options,
        preset=given.pop("preset", ""),
        dry_run=given.pop("dry_run", False),
        resume=given.pop("resume", False),
        overwrite=given.pop("overwrite", False),
        model_options=_model_options(model, given),
        train_options=given,
        model_class=None if name in MODELS else model,
        command=shlex.join([*_program(), "train", name, *argv]),
    )


def _model_options(model: type[GenerativeModel], given: dict[str, Any]) -> dict[str, Any]:
    try:
        return current_names(model.config_class, given.pop("model", {}))
    except ValueError as error:
        raise CommandError(f"model.{error}", USAGE) from error


def _program() -> list[str]:
    """The program, or the launcher of several processes."""
    processes = os.environ.get("WORLD_SIZE", "1")
    return ["fastgen"] if processes == "1" else ["torchrun", f"--nproc-per-node={processes}", "-m", "fastgen"]


def _summary(model: str, folder: RunFolder, result: Result) -> str:
    lines = [f"{model}: {result.parameters:,} parameters, {result.steps:,} steps, {result.seconds:.1f} s"]
    lines += [
        f"held-out {name:<14} {value:.4g} ({result.held_out_items} items)" for name, value in result.held_out.items()
    ]
    if result.skipped:
        lines.append(f"skipped steps           {result.skipped} (gradient NaN or infinite)")
    for name, path in (("report", folder.report), ("checkpoint", folder.checkpoint), ("weights", folder.pretrained)):
        lines.append(f"{name:<23} {path}")
    return "\n".join(lines)
