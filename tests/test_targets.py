"""benchmarks/targets: the rows of ``make bench``, how they are measured, and where they are written."""

from __future__ import annotations

import os
import time

import pytest
import torch

from benchmarks.targets import report
from benchmarks.targets.peer import SETTINGS, hold_pytorch
from benchmarks.targets.row import Row, measure
from fastgen import backend


def wait(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_row_is_the_ratio_of_the_times_and_short_below_its_target():
    calls = (lambda: wait(0.002)), (lambda: wait(0.006))
    found = measure(Row("name", "shape", "peer", 4.0, lambda: calls), threads=1)
    assert 2.0 < found["ratio"] < 4.0
    assert found["short"]
    assert "**short**" in report.line(found)
    again = measure(Row("name", "shape", "peer", 1.5, lambda: calls), threads=1)
    assert not again["short"]
    assert "short" not in report.line(again)


def test_threads_are_set_for_the_row_alone():
    before, seen = torch.get_num_threads(), []
    calls = (lambda: seen.append(torch.get_num_threads())), (lambda: None)
    measure(Row("name", "shape", "peer", 1.0, lambda: calls), threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_every_row_of_the_issue_is_there_and_has_a_name_of_its_own():
    rows = report.rows_at(1)
    names = [(row.name, row.shape) for row in rows]
    assert len(set(names)) == len(names)
    text = " ".join(map(" ".join, names))
    for wanted in (
        "R1 step", "output and tangent", "reparameterize_kl, forward + backward", "unequal heads", "sagan-256",
        "swin-window", "transgan-window", "seq2seq, key padding, dropout", "seq2seq, learned bias",
        "attention, dropout", "bfloat16", "float16", "conv-vae", "dcgan",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert {row.name for row in report.rows_at(2)} < {row.name for row in rows}


@pytest.mark.parametrize("level", backend.CPU_LEVELS)
def test_pytorch_is_held_to_the_level_of_the_kernels(monkeypatch, level):
    for name in SETTINGS["avx2"]:
        monkeypatch.setenv(name, "before")  # and restored
    monkeypatch.setenv("FASTGEN_CPU", level)
    hold_pytorch()
    held = level != "avx512"
    assert os.environ["ATEN_CPU_CAPABILITY"] == ({"generic": "default"}.get(level, level) if held else "before")
    assert (os.environ["ONEDNN_MAX_CPU_ISA"] == "before") != held


@pytest.mark.parametrize(
    ("cpu", "begin"),
    [("AMD EPYC", "epyc"), ("Intel(R) Xeon(R) Processor @ 2.10GHz", "xeon"), ("SiFive U74", "sifive-u74")],
)
def test_the_file_of_results_names_cpu_cores_day_and_level(cpu, begin):
    about = {"cpu": cpu, "cores": 2, "level": "avx2"}
    assert report.file_name(about, "2026-11-29") == f"{begin}-2cores-2026-11-29-avx2.json"
