"""``fastgen train MODEL``."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

from fastgen.batch import current_names
from fastgen.cli._config import nearest
from fastgen.cli._errors import INTERRUPTED, USAGE, CommandError
from fastgen.cli._options import add_fields, options_parser, parse
from fastgen.data import DataConfig
from fastgen.models import MODELS, GenerativeModel, from_data
from fastgen.train.config import FREE_ON_RESUME, TrainConfig
from fastgen.train.errors import StoppedError, UsageError
from fastgen.train.folder import RunFolder
from fastgen.train.run import Request, Result, command, first_process, train

ABOUT = "Train a model; the folder holds all that comes of it. With several processes: torchrun -m fastgen train ..."

HELP = f"""\
usage: fastgen train MODEL [options]

{ABOUT}

MODEL is one of: {", ".join(MODELS)}

fastgen train MODEL --help lists the options of training, data and the model; fastgen models MODEL describes it.
An option may come from a file (--config); the command line wins over files.
--resume goes on with a run; {", ".join(FREE_ON_RESUME)} may then be given anew."""

RESUME = (
    "go on with the run in the folder, with its own options; these may be given anew: "
    + ", ".join("--" + name.replace("_", "-") for name in FREE_ON_RESUME)
    + ", and --data where the same data have moved"
)


def run(words: list[str]) -> None:
    if words[:1] in (["-h"], ["--help"]):
        print(HELP)
        return
    if not words or words[0] not in MODELS:
        came = words[0] if words else "nothing"
        near = nearest(came.lower().replace("_", "-"), MODELS) if words else ""
        hint = f"; did you mean {near}?" if near else ""
        raise CommandError(f"train: expected a model, one of {', '.join(MODELS)}, got {came}{hint}", USAGE)
    request = _request(words[0], words[1:])
    folder = request.folder
    try:
        result = train(request)
    except UsageError as error:
        raise CommandError(str(error), USAGE) from error
    except StoppedError as stop:
        again = command(request.model, folder, "--resume")
        if not stop.step:
            raise CommandError(
                f"{stop}; no step is kept in {folder.path}", INTERRUPTED if stop.interrupted else 1
            ) from stop
        kept = f"{stop}; step {stop.step} is kept in {folder.path}"
        raise CommandError(f"{kept}; go on with: {again}", INTERRUPTED if stop.interrupted else 1) from stop
    if first_process():
        print(_summary(request.model, folder, result))


def _request(name: str, words: list[str]) -> Request:
    model = MODELS[name]
    parser = options_parser(f"fastgen train {name}", ABOUT)
    parser.add_argument("--data", type=str, default=model.default_data, help="a bundled data set, a path, or hf:NAME")
    parser.add_argument("--out", type=str, default=f"runs/{name}", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help=RESUME)
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    add_fields(parser, DataConfig, without=["source"])
    add_fields(parser, TrainConfig, defaults=model.train_defaults)
    add_fields(parser, model.config_class, prefix="model.", without=from_data(model.config_class))
    given = parse(parser, words, defaults=False, refused=("out", "resume", "overwrite"))
    data_names = {field.name for field in dataclasses.fields(DataConfig)}
    data_options = {name: given.pop(name) for name in data_names & given.keys()}
    if "data" in given:
        data_options["source"] = given.pop("data")
    return Request(
        model=name,
        folder=RunFolder(Path(given.pop("out", f"runs/{name}"))),
        data_options=data_options,
        resume=given.pop("resume", False),
        overwrite=given.pop("overwrite", False),
        model_options=_model_options(model, given),
        train_options=given,
        command=shlex.join([*_program(), "train", name, *words]),
    )


def _model_options(model: type[GenerativeModel], given: dict[str, Any]) -> dict[str, Any]:
    try:
        return current_names(model.config_class, given.pop("model", {}))
    except ValueError as error:
        raise CommandError(f"model.{error}", USAGE) from error


def _program() -> list[str]:
    """What starts this command, and as many processes as there are."""
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
