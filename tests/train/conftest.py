"""What the tests of training share. Without the extras of ``fastgen[train]`` they are left out."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgen.cli import EXTRAS, main

MISSING = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []

TINY = ["--model.width", "4", "--model.hidden-dim", "16", "--batch-size", "32"]


def pytest_report_header() -> str | None:
    return f"training tests left out, missing: {', '.join(MISSING)}" if MISSING else None


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 of the digits, as a user's file."""
    from sklearn.datasets import load_digits

    path = tmp_path_factory.mktemp("data") / "digits.npz"
    some = load_digits()
    np.savez(path, images=(some.images[:200] * 15).astype(np.uint8), labels=some.target[:200])
    return path


@pytest.fixture
def fit(digits: Path, tmp_path: Path) -> Callable[..., int]:
    """Train a tiny model in ``tmp_path / name``; gives the exit code."""

    def fit(*options: str, name: str = "run", epochs: int = 2, data: Path = digits) -> int:
        out = ["--out", str(tmp_path / name), "--data", str(data), "--epochs", str(epochs)]
        return main(["train", "conv-vae", *out, *([] if "--resume" in options else TINY), *options])

    return fit


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """The one line that a failed command left on stderr."""

    def error_line() -> str:
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("epoch ")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("fastgen: ")
        return lines[0]

    return error_line


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run's metrics.jsonl."""
    return lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def same_tensors() -> Callable[[Path, Path], bool]:
    """Whether two runs' checkpoints hold the same bits."""

    def same_tensors(a: Path, b: Path) -> bool:
        from fastgen.train.checkpoint import load_checkpoint

        left, right = (load_checkpoint(path / "checkpoint.safetensors")[1] for path in (a, b))
        return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)

    return same_tensors
