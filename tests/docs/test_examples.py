"""The scripts of examples/ run for a few steps, and stay short."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator import build

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script.stem == "emulated_kernel" and build.why_not() is not None:
        pytest.skip(str(build.why_not()))
    out = ["--out", "out.png" if "PNG" in script.read_text() else "out"] if '"--out"' in script.read_text() else []
    arguments = [str(script), "--steps", "2", *out]
    if script.stem == "emulated_kernel":  # its module and the emulator's own would translate each other's exceptions
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "race" in done.stdout
    else:  # in this process, which has imported torch
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(script), run_name="__main__")
    assert not out or (tmp_path / out[1]).exists()


def test_examples_are_short_and_in_the_table() -> None:
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) == 6
    for script in SCRIPTS:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 100, script.name
        assert f"`examples/{script.name}`" in table
