"""Fake tensors of a GPU that this machine lacks: a model is traced for another machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgen import functional, nn
from tests.tracing.calls import CASES, FUNCTIONS, LAYERS

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def build_guard(folder: Path) -> list[str]:
    """The library of device_guard.cpp; nothing for a torch with CUDA, which has a guard."""
    if torch.version.cuda is not None:
        return []
    if shutil.which("g++") is None:
        pytest.skip("this torch has no CUDA and g++ was not found, to compile a guard for its devices")
    root, out = Path(torch.__file__).parent, folder / "guard.so"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    subprocess.run([*command, str(HERE / "device_guard.cpp"), "-lc10", "-o", str(out)], check=True)
    return [str(out)]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    arguments = build_guard(tmp_path_factory.mktemp("guard"))
    command = [sys.executable, "-W", "ignore", "-m", "tests.tracing.fakes", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def on_gpu(result):
    """A result on the CPU, as it is on the GPU."""
    return json.loads(json.dumps(result).replace('"cpu"', '"cuda"'))


def test_there_is_a_call_of_every_public_function_and_layer():
    assert set(FUNCTIONS) == set(functional.__all__)
    assert set(LAYERS) == set(nn.__all__)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["absent auto", "loaded auto", "loaded compiled"])
def test_outputs_and_gradients_have_the_shapes_and_dtypes_of_real_ones(traced, way, name):
    real = traced["cpu"][name]
    assert isinstance(real["gradients"], list), real
    assert traced[way][name] == on_gpu(real)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("functional.") and "rotary" not in name])
def test_compiled_raises_where_no_library_with_kernels_is_loaded(traced, name):
    assert "RuntimeError: backend 'compiled' was requested, but _cuda" in traced["absent compiled"][name]


def test_a_layer_is_exported_for_the_gpu_with_the_operators_of_its_kernels(traced):
    assert traced["exported"]["operators"] == [
        f"fastgen.{name}_forward.default" for name in ("attention", "merge_heads", "projection")
    ]
