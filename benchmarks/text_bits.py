"""Bits per byte of a text of 5 MB: transformer-lm with a learned vocabulary beside gzip, bzip2, xz and a 5-gram.

usage: python benchmarks/text_bits.py [--tokens 1024] [--steps 2000] [--order 5]

The text is source code of Python's standard library, which everyone has: its files in a random but fixed order, up to
5 MB (``runs/text/stdlib.txt``). It differs between versions of Python. The last tenth is held out; all figures are of
that part:

    transformer-lm   fastgen train transformer-lm --data runs/text/stdlib.txt --tokens N, then fastgen evaluate; with
                     a context of 128 tokens, and on texts of twice that length as two segments (Transformer-XL) and
                     with a window of 128 tokens in each block (Longformer), in half as many steps
    n-gram           interpolated modified Kneser-Ney smoothing of characters (ngram.py)
    gzip, bzip2, xz  at their highest levels: how much longer the compressed text is with the held-out part at its end
                     than without, and the held-out part alone

The result is written to benchmarks/results/text-bits.json; benchmarks/comparisons.py writes it into
docs/comparisons.md.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import math
import os
import platform
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "text-bits.json"
TEXT = "runs/text/stdlib.txt"
VARIANTS: dict[str, tuple[str, ...]] = {
    "transformer-lm": (),
    "transformer-lm, segments": ("--model.segments", "2"),
    "transformer-lm, window": ("--model.context", "256", "--model.window", "128"),
}
"""Options of the trainings. Those with options train on texts of twice the length, in half as many steps."""
BYTES = 5_000_000
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}
COMPRESSORS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lambda data: lzma.compress(data, preset=9)}


def standard_library(most: int = BYTES) -> str:
    """At most so many bytes of the standard library's source, whole lines, line ends LF."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(folder) for path in folder.rglob("*.py")]
    names = [name for name in names if not SKIPPED & set(name.parts)]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    parts, total = [], 0
    for name in names:
        try:
            text = (folder / name).read_text(encoding="utf-8").replace("\0", "")
        except UnicodeDecodeError:
            continue
        parts.append(text)
        total += len(text.encode()) + 1
        if total >= most:
            break
    data = "\n".join(parts).encode()[:most]
    return data[: data.rindex(b"\n") + 1].decode()


def compressed_bits(train: str, held: str) -> dict[str, dict[str, float]]:
    """Bits per byte of ``held``, after ``train`` and alone, by compressor."""
    first, last = train.encode(), held.encode()
    out = {}
    for name, compress in COMPRESSORS.items():
        after = len(compress(first + last)) - len(compress(first))
        out[name] = {"after the training text": 8 * after / len(last), "alone": 8 * len(compress(last)) / len(last)}
    return out


def table(record: dict) -> list[str]:
    """Rows of Markdown."""
    lines = ["| | bits per byte | CPU minutes |", "|---|---|---|"]
    for name, bits, minutes in record["models"]:
        lines.append(f"| {name} | {bits:.2f} | {minutes:.1f} |")
    for name, found in record["compressors"].items():
        after, alone = found["after the training text"], found["alone"]
        lines.append(f"| {name} | {after:.2f} ({alone:.2f} without the training text) | |")
    return lines


def transformer(name: str, tokens: int, steps: int) -> tuple[str, str, float, float]:
    """(command, name with the size, nats per character of the held-out text, CPU minutes) of one of VARIANTS."""
    from zoo import fastgen

    options, run = VARIANTS[name], "runs/text/" + name.replace(", ", "-")
    words = ["train", "transformer-lm", "--data", TEXT, "--tokens", str(tokens), *options]
    words += ["--steps", str(steps // 2 if options else steps), "--out", run]
    _, seconds = fastgen(*words, "--overwrite")
    fastgen("evaluate", run)
    figures = json.loads((ROOT / run / "evaluation.json").read_text())["figures"]
    nats = next(figure["value"] for figure in figures if figure["name"] == "nats per character")
    parameters = json.loads((ROOT / run / "environment.json").read_text())["parameters"]
    return f"fastgen {' '.join(words)}", f"{name}, {parameters:,} parameters", nats, seconds / 60


def main() -> None:
    from ngram import KneserNey
    from zoo import cpu_name, git

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="size of the learned vocabulary")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--order", type=int, default=5, help="order of the n-gram")
    given = parser.parse_args()
    text = standard_library()
    path = ROOT / TEXT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    cut = len(text) - len(text) // 10
    train, held = text[:cut], text[cut:]
    per_byte = len(held) / len(held.encode()) / math.log(2)  # nats per character -> bits per byte
    compressors = compressed_bits(train, held)

    before = time.process_time()
    nats = KneserNey(train, given.order).nats(train, held)
    minutes = (time.process_time() - before) / 60
    models = [[f"{given.order}-gram of characters", nats * per_byte, minutes]]
    print("\n".join(table({"models": models, "compressors": compressors})), flush=True)

    commands = []
    for at, variant in enumerate(VARIANTS):
        command, name, nats, minutes = transformer(variant, given.tokens, given.steps)
        commands.append(command)
        models.insert(at, [f"{name}, {given.tokens:,} tokens", nats * per_byte, minutes])
    record = {
        "commands": commands,
        "python": platform.python_version(),
        "bytes": len(text.encode()),
        "held-out bytes": len(held.encode()),
        "models": models,
        "compressors": compressors,
        "machine": f"{os.cpu_count()} cores of {cpu_name()}",
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "commit": git("rev-parse", "--short", "HEAD"),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(table(record)))


if __name__ == "__main__":
    main()
