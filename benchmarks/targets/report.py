"""Measures all rows and prints them as one table, with a mark where a row falls short of its target.

usage: python -m benchmarks.targets [--only TEXT] [--threads N ...] [--save]

Without --save nothing is written. FASTGEN_CPU=avx2 holds fastgen's kernels, and PyTorch, to AVX2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fastgen
from benchmarks import overhead
from benchmarks.targets import attention, others
from benchmarks.targets.row import Row, is_short, measure
from fastgen import backend

RESULTS = Path(__file__).resolve().parents[1] / "results"
MOST_MORE_US = 5.0
"""The most that a call of attention without a gradient may take more than PyTorch's."""


def rows_at(threads: int) -> list[Row]:
    rows = attention.higher_rows() + attention.float32_rows() + others.latent_rows()[:2] + others.model_rows()
    if threads == 1:
        rows += attention.half_rows() + others.latent_rows()[2:] + others.projection_rows() + others.layer_rows()
    return rows


def overhead_rows(only: str) -> Iterator[dict[str, Any]]:
    """Calls so small that only their cost counts, on one thread."""
    torch.set_num_threads(1)
    for case in overhead.all_cases():
        if only in case.name:
            ours, theirs = overhead.measure(case)
            short = is_short(theirs / ours, 1 / case.limit)
            if case.name.startswith("attention") and case.name.endswith(": forward"):
                short = short or ours > theirs + MOST_MORE_US
            yield {
                "name": f"cost of a call: {case.name.replace(': ', ', ')}",
                "shape": "small",
                "threads": 1,
                "peer": "PyTorch's",
                "fastgen_ms": ours / 1e3,
                "pytorch_ms": theirs / 1e3,
                "ratio": theirs / ours,
                "target": 1 / case.limit,
                "short": short,
            }


def line(found: dict[str, Any]) -> str:
    times = [
        f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{milliseconds * 1e3:.3g} us"
        for milliseconds in (found["fastgen_ms"], found["pytorch_ms"])
    ]
    mark = " **short**" if found["short"] else ""
    return (
        f"| {found['name']} | {found['shape']} | {found['threads']} | {times[0]} | {times[1]} | {found['peer']} "
        f"| {found['ratio']:.2f} | {found['target']:.2f}{mark} |"
    )


def machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": overhead.machine()["cpu"],
        "architecture": platform.machine(),
        "cores": cores,
        "level": backend.cpu_level() or "nothing compiled",
        "pytorch": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fastgen": fastgen.__version__,
    }


def file_name(found: dict[str, Any], day: str) -> str:
    """Such as epyc-2cores-2026-11-29-avx2.json."""
    family = re.search(r"epyc|xeon|ryzen|core|graviton|neoverse|apple", found["cpu"].lower())
    cpu = family[0] if family else re.sub(r"[^a-z0-9]+", "-", found["cpu"].lower()).strip("-")
    return f"{cpu}-{found['cores']}cores-{day}-{found['level'].replace(' ', '-')}.json"


def commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="measure the rows whose name or shape contains this text")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (default: 1, 2 and all cores)")
    parser.add_argument("--save", action="store_true", help="write the rows to benchmarks/results/")
    given = parser.parse_args(arguments)
    about = machine()
    threads = given.threads or sorted({1, min(2, about["cores"]), about["cores"]})
    print(
        f"{about['cpu']}, {about['cores']} cores, fastgen {about['fastgen']} with kernels for {about['level']}, "
        f"torch {about['torch']} with {about['pytorch']}\n"
    )
    print("| what | shape | threads | fastgen | PyTorch | which | PyTorch / fastgen | target |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    began, results = time.monotonic(), []
    for count in threads:
        for row in rows_at(count):
            if given.only in f"{row.name} {row.shape}":
                results.append(measure(row, count))
                print(line(results[-1]), flush=True)
    if 1 in threads:
        for found in overhead_rows(given.only):
            results.append(found)
            print(line(found), flush=True)
    short = sum(found["short"] for found in results)
    print(f"\n{len(results)} rows in {time.monotonic() - began:.0f} s, {short} short of their target")
    if given.save:
        path = RESULTS / file_name(about, date.today().isoformat())
        content = {"machine": about, "commit": commit(), "date": date.today().isoformat(), "rows": results}
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
