"""Layers and functions in two processes: DDP, FSDP2 and tensor parallelism. The checks: distributed_checks.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CHECKS = [
    "data_parallel",
    "gradient_penalty_data_parallel",
    "fully_sharded",
    "attention_of_sharded_heads_or_batch",
    "tangents_of_sharded_heads",
    "tensor_parallel_heads",
    "tensor_parallel_encoder_layer",
    "errors_say_what_to_do",
]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    command = [sys.executable, "-W", "ignore", "-m", "tests.nn.distributed_checks"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(store)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    out, errors = zip(*(process.communicate(timeout=300) for process in started), strict=True)
    assert all(process.returncode == 0 for process in started), errors
    return json.loads(out[0].splitlines()[-1])


def test_the_checks_are_these(results):
    assert list(results) == CHECKS


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_compute_what_one_does(results, name):
    assert results[name] == "ok", results[name]
