"""PyTorch's own tests of attention, Transformer and recurrent layers, run with fastgen in the place of torch.

``PYTORCH_TESTS`` names a checkout of PyTorch, or its folder of tests, of about the version that is installed. Each file
runs twice, with torch's functions and with fastgen's: a test that passes with torch's has to pass with fastgen's, too,
unless ``differences.py`` says why not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pytorch.differences import DIFFERENCES

ROOT = Path(__file__).parents[2]

FILES = {
    # Of the grid of 3,072 cases that compare a kernel with the formula, 512.
    "test_transformers.py": "^(?!.*mask_vs_math.*(_batch_size_12_|_q_seq_len_1030_|_n_head_1_))",
    "test_nn.py": "(?i)rnn|lstm|gru|transformer|attention",
    "nn/test_multihead_attention.py": "",
    "nn/test_packed_sequence.py": "",
}
"""Files below PyTorch's folder of tests, and a regular expression that selects tests by class and name."""

Outcome = tuple[str, str, list[str]]
"""Outcome, message, and fastgen's errors that the test accepted instead of torch's."""


@pytest.fixture(scope="module")
def folder() -> Path:
    """PyTorch's folder of tests."""
    pytest.importorskip("expecttest", reason="PyTorch's tests need the package expecttest")
    where = os.environ.get("PYTORCH_TESTS")
    if not where:
        pytest.skip("PYTORCH_TESTS is not set: the path of a checkout of PyTorch, or of its folder of tests")
    path = Path(where).resolve()
    path = path / "test" if (path / "test").is_dir() else path
    assert any((path / file).is_file() for file in FILES), f"{path} has none of {', '.join(FILES)}"
    return path


def run(path: Path, select: str, out: Path, *options: str) -> dict[str, Outcome]:
    """The outcome of each test of a file, in a process of its own."""
    command = [sys.executable, "-m", "tests.pytorch.run_file", path, "--select", select, "--out", out, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_PRINT_REPRO_ON_FAILURE": "0"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    outcomes: dict[str, Outcome] = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        entry = json.loads(line)
        outcomes[entry["test"]] = (entry["outcome"], entry["message"], entry["own_errors"])
    last = next(reversed(outcomes), None)
    assert ended.returncode == 0, f"{path.name} ended with {ended.returncode} in {last}:\n{ended.stderr[-4000:]}"
    assert outcomes, f"{path.name} has no test that matches {select!r}"
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_pytorchs_tests_pass_with_fastgen_in_its_place(file, folder, tmp_path):
    if not (folder / file).is_file():
        pytest.skip(f"{folder} has no {file}")
    arguments = (folder / file, FILES[file])
    torchs = run(*arguments, tmp_path / "torch.jsonl")
    fastgens = run(*arguments, tmp_path / "fastgen.jsonl", "--fastgen")

    passing = [test for test, (outcome, *_) in torchs.items() if outcome == "passed"]
    failing = {test: fastgens[test][1] for test in passing if fastgens[test][0] != "passed"}
    counts = {
        "pass with torch": len(passing),
        "pass with fastgen": len(passing) - len(failing),
        "of them expect an error and accept fastgen's": sum(
            bool(fastgens[test][2]) for test in passing if test not in failing
        ),
    }
    print(f"\n{file}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))

    by_design = {pattern: [test for test in passing if re.search(pattern, test)] for pattern in DIFFERENCES[file]}
    listed = {test for tests in by_design.values() for test in tests}
    new = [f"{test}\n{message}" for test, message in failing.items() if test not in listed]
    assert not new, f"{len(new)} tests of {file} fail with fastgen only:\n\n" + "\n".join(new)
    cured = [pattern for pattern, tests in by_design.items() if tests and not failing.keys() & set(tests)]
    assert not cured, f"differences.py lists tests of {file} that pass: {', '.join(cured)}"
