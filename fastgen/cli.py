"""The ``fastgen`` command. ``info``, ``--help`` and ``--version`` need only torch, the rest the extras."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

import fastgen

if TYPE_CHECKING:
    import jsonargparse

SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

EXTRAS = {
    "PIL": "pillow",
    "jsonargparse": "jsonargparse",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}
"""Modules of the ``train`` extra, and the packages that have them."""

COMMANDS = """\
commands:
  train MODEL   train a model            fastgen train conv-vae --data digits --out runs/conv-vae
  sample RUN    draw from a trained one  fastgen sample runs/conv-vae --n 64 --out grid.png
  info          what this installation can do, and what it lacks

fastgen COMMAND --help lists a command's options. --debug, anywhere, shows tracebacks.
"""


class CommandError(Exception):
    """One line for the person at the keyboard, and the exit code."""

    def __init__(self, message: str, code: int = FAILURE) -> None:
        super().__init__(message)
        self.code = code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (fastgen --help lists the commands)", USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``fastgen``; default those of the process.

    Returns:
        The exit code: 0; 1 for a failure; 2 for a mistake in the command; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        _run([word for word in words if word != "--debug"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else SUCCESS
    except KeyboardInterrupt:
        print("fastgen: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = error.code if isinstance(error, CommandError) else FAILURE
        prefix = "fastgen: " if code == INTERRUPTED else "fastgen: error: "
        print(prefix + _one_line(error), file=sys.stderr)
        return code
    return SUCCESS


def _one_line(error: Exception) -> str:
    """The message; of errors that nobody foresaw also the type."""
    text = " ".join(str(error).split())
    foreseen = isinstance(error, (CommandError, ValueError, TypeError, OSError))
    return text if foreseen and text else f"{type(error).__name__}: {text} (--debug shows where)"


def _run(words: list[str]) -> None:
    commands = {"train": _train, "sample": _sample, "info": _info}
    parser = _Parser(
        prog="fastgen",
        description="Fused layers for generative models, and models trained with them.",
        usage="fastgen [--help] [--version] COMMAND ...",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastgen {fastgen.__version__}")
    parser.add_argument("command", choices=commands, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not words:
        parser.error(f"expected a command, one of {', '.join(commands)}, got nothing")
    given = parser.parse_args(words)
    commands[given.command](given.words)


def _info(words: list[str]) -> None:
    import torch

    from fastgen._library import COMPILED_DTYPES

    parser = _Parser(prog="fastgen info", description="What this installation can do, and what it lacks.")
    parser.add_argument(
        "--attention",
        metavar="B,H,N,M,Dk,Dv",
        help="also show how CUDA kernels share out attention of these sizes",
    )
    parser.add_argument(
        "--projection",
        metavar="B,N,C,E",
        help="also show what CUDA kernels and cuBLAS are expected to take for a projection of tokens (B, N, C) to E",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=[str(d).removeprefix("torch.") for d in COMPILED_DTYPES])
    given = parser.parse_args(words)

    def sizes(option: str, names: str) -> list[int] | None:
        text = getattr(given, option)
        if text is None:
            return None
        if not all(word.isdigit() for word in text.split(",")):
            parser.error(f"--{option}: expected {names}, got {text}")
        return [int(word) for word in text.split(",")]

    attention, projection = sizes("attention", "B,H,N,M,Dk,Dv"), sizes("projection", "B,N,C,E")
    try:
        print(fastgen.info(attention, getattr(torch, given.dtype), projection))
    except ValueError as error:
        parser.error(str(error))


def _train(words: list[str]) -> None:
    _require_extras("train")
    from fastgen.models import MODELS
    from fastgen.train.errors import StoppedError, UsageError
    from fastgen.train.folder import RunFolder
    from fastgen.train.loop import TrainConfig
    from fastgen.train.run import DEFAULT_DATA, FROM_DATA, Request, train

    if words[:1] in (["-h"], ["--help"]):
        print(f"usage: fastgen train MODEL [options]\n\nMODEL is one of: {', '.join(MODELS)}")
        return
    if not words or words[0] not in MODELS:
        came = words[0] if words else "nothing"
        raise CommandError(f"train: expected a model, one of {', '.join(MODELS)}, got {came}", USAGE)

    name = words[0]
    parser = _options_parser(f"fastgen train {name}", "Train a model; the folder holds all that comes of it.")
    parser.add_argument("--data", type=str, default=DEFAULT_DATA, help="digits, or an .npz file with an array 'images'")
    parser.add_argument("--out", type=str, default=f"runs/{name}", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    _add_fields(parser, TrainConfig)
    _add_fields(parser, MODELS[name].config, prefix="model.", without=FROM_DATA)
    given = _parse(parser, words[1:], defaults=False)
    folder = RunFolder(Path(given.pop("out", f"runs/{name}")))
    request = Request(
        model=name,
        folder=folder,
        data=given.pop("data", None),
        resume=given.pop("resume", False),
        overwrite=given.pop("overwrite", False),
        model_options=given.pop("model", {}),
        train_options=given,
    )
    try:
        result = train(request)
    except UsageError as error:
        raise CommandError(str(error), USAGE) from error
    except StoppedError as stop:
        kept = f"{stop}; epoch {stop.epoch} is kept in {folder.path}"
        if not stop.interrupted:
            raise CommandError(kept) from stop
        again = f"fastgen train {name} --out {shlex.quote(str(folder.path))} --resume"
        raise CommandError(f"{kept}; go on with: {again}", INTERRUPTED) from stop
    print(
        f"{name}: {result.parameters:,} parameters, epoch {result.epochs}, {result.seconds:.1f} s\n"
        f"held-out ELBO    {result.held_out_elbo:.2f} nats per image ({result.held_out_images} images)\n"
        f"samples          {folder.samples}\n"
        f"reconstructions  {folder.reconstructions}\n"
        f"checkpoint       {folder.checkpoint}"
    )


def _sample(words: list[str]) -> None:
    _require_extras("sample")
    from fastgen.train.errors import UsageError
    from fastgen.train.folder import RunFolder
    from fastgen.train.run import sample

    parser = _options_parser("fastgen sample", "Draw a grid of pictures from a trained model.")
    parser.add_argument("run", type=str, help="the run's folder")
    parser.add_argument("--n", type=int, default=64, help="how many")
    parser.add_argument("--out", type=str, default="samples.png", help="the PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same pictures")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, ...; auto: cuda if there is one")
    given = _parse(parser, words, defaults=True)
    try:
        sample(RunFolder(Path(given["run"])), given["n"], Path(given["out"]), given["seed"], given["device"])
    except UsageError as error:
        raise CommandError(str(error), USAGE) from error
    print(given["out"])


def _require_extras(command: str) -> None:
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"{command} needs {', '.join(missing)}: pip install 'fastgen[train]'")


def _options_parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=prog, description=description, print_config=None, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file of options")
    return parser


def _add_fields(
    parser: jsonargparse.ArgumentParser, config: type, prefix: str = "", without: Sequence[str] = ()
) -> None:
    """One option per field of a config dataclass, with its type, default and help."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name not in without:
            option = "--" + prefix + field.name.replace("_", "-")
            parser.add_argument(option, type=types[field.name], default=field.default, help=field.metadata["help"])


def _parse(parser: jsonargparse.ArgumentParser, words: list[str], *, defaults: bool) -> dict[str, Any]:
    """What was given; with ``defaults`` also the rest."""
    try:
        given: dict[str, Any] = parser.parse_args(words, defaults=defaults).as_dict()
    except argparse.ArgumentError as error:
        text = re.sub(r'^Parser key "(.+?)":\s*', r"\1: ", str(error))
        text = re.sub(r"a <class '(\w+)'>", r"\1", text)
        raise CommandError(f"{text} ({parser.prog} --help lists the options)", USAGE) from error
    given.pop("config", None)
    return given
