"""The ``fastgen`` command. ``info``, ``bench``, ``--help`` and ``--version`` need only torch, the rest the extras."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from fastgen.cli._errors import FAILURE, INTERRUPTED, USAGE, CommandError
from fastgen.version import __version__

SUCCESS = 0

EXTRAS = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "jsonargparse": "jsonargparse",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
}
"""Modules of the ``train`` extra, and the packages that have them."""

COMMANDS = """\
commands:
  train MODEL    train a model            fastgen train conv-vae --data digits --out runs/digits
  sample RUN     generate samples         fastgen sample runs/digits --n 64 --out grid.png
  evaluate RUN   compute metrics          fastgen evaluate runs/digits
  models [MODEL] list the models, or describe one
  data PATH      inspect a dataset        fastgen data photos/ --image-size 32
  info           backends, devices and libraries of this installation
  bench          compare fastgen's layers with PyTorch's on this machine

fastgen COMMAND --help lists a command's options. --debug, anywhere, shows tracebacks.
"""

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
"""Parts of PyTorch's error messages."""

PLAIN = ("info", "bench")

TRAINING = ("train", "sample", "evaluate")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables of OpenMP's runtimes: what a thread does while it waits for the others."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (fastgen --help lists the commands)", USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after ``fastgen``; default those of the process.

    Returns:
        The exit code: 0; 1 for a failure; 2 for invalid arguments; 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        _run([word for word in argv if word != "--debug"])
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
        print(prefix + _one_line(error) + _which_process(), file=sys.stderr)
        return code
    return SUCCESS


def _one_line(error: Exception) -> str:
    """The message; of unexpected errors also the type."""
    own = isinstance(error, OSError) and error.filename is None and error.strerror
    text = " ".join(str(own or error).partition("Exception raised from")[0].split())
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return (
            f"out of memory; fewer items, a smaller model or a smaller --batch-size take less ({text or 'by Python'})"
        )
    expected = isinstance(error, (CommandError, ValueError, TypeError, OSError, ImportError))
    return text if expected and text else f"{type(error).__name__}: {text} (--debug shows the traceback)"


def _which_process() -> str:
    return f" (process {os.environ.get('RANK')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _run(argv: list[str]) -> None:
    names = ("train", "sample", "evaluate", "models", "data", "info", "bench")
    parser = _Parser(
        prog="fastgen",
        description="Train, sample and evaluate generative models built on fused layers.",
        usage="fastgen [--help] [--version] COMMAND ...",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastgen {__version__}")
    parser.add_argument("command", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("argv", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not argv:
        parser.error(f"expected a command, one of {', '.join(names)}, got nothing")
    known = (*names, "--help", "-h", "--version")
    if argv[0] not in known:
        wanted = {"help": "--help", "version": "--version", "-v": "--version", "-V": "--version"}
        near = wanted.get(argv[0]) or next(iter(difflib.get_close_matches(argv[0].lower(), known, n=1)), "")
        hint = f"; did you mean {near}?" if near else ""
        parser.error(f"invalid choice: {argv[0]!r}, expected a command, one of {', '.join(names)}{hint}")
    given = parser.parse_args(argv)
    if given.command not in PLAIN:
        _require_extras(given.command)
    if given.command in TRAINING:
        _spin_briefly()
    importlib.import_module(f"fastgen.cli._{given.command}").run(given.argv)


def _spin_briefly() -> None:
    """Makes OpenMP threads spin for a short time only before they sleep, unless the user has set how they wait.

    A spinning thread occupies a core that other threads need: beside other processes, training becomes several times
    slower. The variable is read by libgomp, PyTorch's OpenMP runtime on Linux, when torch is imported.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "2000"


def _require_extras(command: str) -> None:
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"{command} needs {', '.join(missing)}: pip install 'fastgen[train]'")
