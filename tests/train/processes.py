"""Commands in processes of their own, forked from one that has everything imported already."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

import fastgen.cli._train
import fastgen.data.images
import fastgen.train.run
from fastgen.cli import main
from fastgen.train.lock import locked


def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([__name__])
    return found


def run_command(words: Sequence[str], environment: dict[str, str], out: str) -> None:
    """What a process does: run the command, what it prints being added to a file; its exit code is the command's.

    environment: variables to set; "limit" is none of them, but the largest size of a file that it may write, and "lazy"
    gives it a process group, and workers that decode images.
    """
    if environment.pop("lazy", ""):
        os.setpgrp()
        multiprocessing.set_start_method(None, force=True)  # as in a process that was not forked
        fastgen.data.images.MEMORY_LIMIT = 0
    limit = int(environment.pop("limit", 0))
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(out, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def hold_lock(folder: Path, pipe: Connection) -> None:
    """Hold a folder's lock until killed; tells so, then the number of a child."""
    with locked(folder):
        pipe.send("locked")
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        pipe.send(child)
        time.sleep(60)
