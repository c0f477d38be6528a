"""``fastgen bench``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NoReturn

import torch

from fastgen.bench import runner as _bench
from fastgen.cli._errors import USAGE, CommandError

ABOUT = "Compare fastgen's layers with plain PyTorch on this machine, in interleaved rounds; prints medians and ratios."

MOST_ROUNDS = 10**6


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (fastgen bench --help lists the options)", USAGE)


def run(argv: list[str]) -> None:
    parser = _Parser(prog="fastgen bench", description=ABOUT)
    parser.add_argument(
        "--only", default="", help="comma-separated prefixes of benchmark names, such as attention,latent-step"
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="rounds of each measurement, fastgen and PyTorch interleaved"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", default="", help="JSON file for the results")
    given = parser.parse_args(argv)
    device = given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            "device: expected one that this machine has, got 'cuda' (fastgen info shows the reason)", USAGE
        )
    if not 0 < given.rounds <= MOST_ROUNDS:
        raise CommandError(f"rounds: expected a positive number, at most {MOST_ROUNDS}, got {given.rounds}", USAGE)
    only = [name for name in given.only.split(",") if name] or None
    if given.json and not Path(given.json).parent.is_dir():
        raise CommandError(f"json: expected a path in a folder that exists, got {given.json}", USAGE)
    print(_bench.describe_machine(device))
    try:
        rows = _bench.run(only, given.rounds, device, on_row=lambda row: print(_bench.line(row), flush=True))
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    if given.json:
        Path(given.json).write_text(json.dumps(_bench.as_dict(rows, device), indent=2) + "\n", encoding="utf-8")
