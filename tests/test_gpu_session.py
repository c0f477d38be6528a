"""benchmarks/gpu: what a session does on a machine with a GPU, without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import attention, check, family, prebuilt, report, smoke, timing
from benchmarks.gpu.session import ROOT, Session
from benchmarks.shapes import ATTENTION_SHAPES
from tests.emulator import build


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_results_are_on_disk_as_soon_as_they_are_written(tmp_path):
    first = Session(tmp_path / "out", 10)
    first.write("smoke", passed=True)
    first.write("failure", test="a")
    # Another process appends.
    Session(tmp_path / "out", 10).write("failure", test="b")
    assert [row["test"] for row in first.rows("failure")] == ["a", "b"]
    assert len(first.rows()) == 3
    assert 9 < first.left <= 10


def fake_project(tmp_path):
    root = tmp_path / "project"
    for folder in ("csrc", "tools", "fastgen"):
        (root / folder).mkdir(parents=True)
    (root / "csrc" / "kernel.cu").write_text("// one\n")
    (root / "tools" / "build_libraries.py").write_text("")
    for name in prebuilt.LIBRARIES:
        (root / "fastgen" / name).write_text("old")
    return root


def test_prebuilt_libraries_are_taken_only_if_they_are_of_these_sources(tmp_path, monkeypatch):
    root, folder = fake_project(tmp_path), tmp_path / "prebuilt"
    monkeypatch.setenv("FASTGEN_PREBUILT", str(folder))
    assert prebuilt.take(root) == (None, [f"{folder} has no _cpu.so, _cuda.so, prebuilt.json"])
    prebuilt.save(folder, root)
    for name in prebuilt.LIBRARIES:
        (folder / name).write_text("new")
    assert prebuilt.take(root) == (folder, [])
    assert (root / "fastgen" / "_cuda.so").read_text() == "new"

    (root / "csrc" / "kernel.cu").write_text("// two\n")
    (root / "fastgen" / "_cuda.so").write_text("old")
    assert prebuilt.take(root) == (None, [f"{folder} is of other sources"])
    assert (root / "fastgen" / "_cuda.so").read_text() == "old"


def test_prebuilt_libraries_are_looked_for_in_the_shared_folder_first(tmp_path, monkeypatch):
    root = fake_project(tmp_path)
    monkeypatch.delenv("FASTGEN_PREBUILT", raising=False)
    for place in prebuilt.PLACES:
        prebuilt.save(root / place, root)
    assert prebuilt.take(root) == (root / "shared" / "prebuilt", [])


def test_a_command_is_ended_at_its_limit_with_all_its_children(tmp_path):
    marker = tmp_path / "marker"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w').close()"
    code = f"import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    assert check.run([sys.executable, "-c", code], 1, tmp_path / "log") is None
    assert time.monotonic() - start < 3
    assert check.run([sys.executable, "-c", "raise SystemExit(7)"], 60, tmp_path / "log") == 7
    time.sleep(max(0.0, 4.5 - (time.monotonic() - start)))
    assert not marker.exists()


def test_families_are_in_order_and_their_tests_exist():
    assert list(family.FAMILIES) == [
        "device layer", "latent", "forward", "backward", "second order", "projection", "layers",
    ]  # fmt: skip
    assert set(family.FAMILIES) == set(smoke.CASES)
    missing = [file for one in family.FAMILIES.values() for file in one.files if not (ROOT / file).is_file()]
    assert not missing
    assert sum(one.seconds for one in family.FAMILIES.values()) <= 300
    assert "-k" in family.selection(family.FAMILIES["latent"])
    assert family.selection(family.FAMILIES["latent"], "a.py::test_b")[-1] == "a.py::test_b"


def test_peers_are_those_that_support_the_pass():
    assert sorted(attention.ORDER) == sorted(ATTENTION_SHAPES)
    assert len(attention.COMPILED) == 3
    assert list(attention.peers(ATTENTION_SHAPES["dit-xl"], "forward, compiled")) == ["torch.compile"]
    assert "math" not in attention.peers(ATTENTION_SHAPES["long"], "backward"), "its scores do not fit"
    assert set(attention.peers(ATTENTION_SHAPES["dit-xl"], "backward")) == {"flash", "efficient", "cudnn", "math"}


def test_a_table_has_spread_peers_and_what_is_missing():
    good = {"median_us": 10.0, "quartiles_us": [9.5, 11.0]}
    rows = [
        {"kind": "machine", "gpu": "NVIDIA H200", "cores": 16, "versions": {"torch": "2.11"}},
        {"kind": "process", "family": "latent", "passed": False, "seconds": 3},
        {"kind": "attention", "shape": "dit-xl", "pass": "forward", "rows": {"ours": good}, "ratios": {"flash": 1.5},
         "of_roofline": 0.5, "predicted_us": 8.0},
        {"kind": "rest", "case": "latent", "rows": {"ours": {"problem": "RuntimeError: no"}}},
        {"kind": "left out", "what": ["backward long"]},
    ]  # fmt: skip
    text = "\n".join(report.lines(rows))
    assert "| forward dit-xl | 10 (9.5 to 11) | 50% | 8.0 | flash 1.50 |" in text
    assert "| latent | **no** | 3 |" in text
    assert "| latent | RuntimeError: no | | | |" in text
    assert "backward long" in text
    assert "rehearsal" not in text
    assert "A rehearsal without a GPU" in "\n".join(report.lines([{**rows[0], "rehearsal": True}]))


def test_the_first_two_calls_need_no_package_of_training_or_benchmarks():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['jsonargparse', 'pytest_benchmark', 'pytest', 'sklearn']))"
    done = python("-c", f"{blocked}\nimport benchmarks.gpu.check, benchmarks.gpu.attention, benchmarks.gpu.rest")
    assert done.returncode == 0, done.stderr


def test_collecting_the_emulators_tests_does_not_build_it():
    code = (
        "from tests.emulator import build; build.build = build.module = None; import tests.emulator.test_emulator as t"
    )
    done = python("-c", f"{code}; assert len(t.PLANTED) >= 25")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_a_family_is_rehearsed_in_the_emulator(tmp_path):
    build.build()
    arguments = ["-m", "benchmarks.gpu.family", str(tmp_path), "latent", "--limit", "300"]
    done = python(*arguments, FASTGEN_GPU_REHEARSAL="1")
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row["rehearsal"] for row in rows)
    assert [row["passed"] for row in rows if row["kind"] == "smoke"] == [True] * 4
    assert rows[-1]["kind"] == "family"
    assert rows[-1]["tests"]["passed"] >= 2
    assert rows[-1]["complete"]


def test_tests_stop_when_the_time_is_over(tmp_path):
    (tmp_path / "test_slow.py").write_text("import time\ndef test_one(): time.sleep(0.2)\ndef test_two(): pass\n")
    lines = family.Lines(Session(tmp_path, 0.1), "latent")
    code = pytest.main(["-q", "-p", "no:cacheprovider", str(tmp_path / "test_slow.py")], plugins=[lines])
    assert code == pytest.ExitCode.INTERRUPTED
    assert lines.stopped
    assert lines.counts == {"passed": 1}


def test_a_rehearsal_is_timed_by_the_clock(monkeypatch):
    monkeypatch.setattr(timing, "REHEARSAL", True)

    def unsupported():
        raise RuntimeError("no kernel\nfor this")

    rows = timing.measure({"ours": lambda: lambda: None, "peer": unsupported}, 1)
    assert rows["ours"]["method"] == "clock"
    assert rows["ours"]["quartiles_us"][0] <= rows["ours"]["median_us"] <= rows["ours"]["quartiles_us"][1]
    assert rows["peer"] == {"problem": "RuntimeError: no kernel"}


def test_the_script_names_its_calls():
    script = (ROOT / "benchmarks" / "gpu_session.sh").read_text()
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n"], input=script, text=True, check=False).returncode == 0
    assert "check | attention | rest)" in script
