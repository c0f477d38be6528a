"""``fastgen info``."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch

from fastgen.backend import COMPILED_DTYPES
from fastgen.cli._errors import USAGE, CommandError
from fastgen.environment import info


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (fastgen info --help lists the options)", USAGE)


def run(argv: list[str]) -> None:
    parser = _Parser(
        prog="fastgen info",
        description="Show backends, devices and libraries of this installation, and why any are unavailable.",
    )
    parser.add_argument(
        "--attention",
        metavar="B,H,N,M,Dk,Dv",
        help="attention sizes for which the launch plans of the CUDA kernels are shown",
    )
    parser.add_argument(
        "--projection",
        metavar="B,N,C,E",
        help="projection of tokens (B, N, C) to E for which expected times of CUDA kernels and cuBLAS are shown",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=[str(d).removeprefix("torch.") for d in COMPILED_DTYPES])
    given = parser.parse_args(argv)

    def sizes(option: str, names: str) -> list[int] | None:
        text = getattr(given, option)
        if text is None:
            return None
        if not all(word.isdigit() for word in text.split(",")):
            parser.error(f"--{option}: expected {names}, got {text}")
        return [int(word) for word in text.split(",")]

    attention, projection = sizes("attention", "B,H,N,M,Dk,Dv"), sizes("projection", "B,N,C,E")
    try:
        print(info(attention, getattr(torch, given.dtype), projection))
    except ValueError as error:
        parser.error(str(error))
