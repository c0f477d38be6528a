"""The choice of a backend, and packages whose compiled libraries are missing or damaged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastgen
from fastgen import backend
from fastgen.backend import libraries, selection
from fastgen.functional import reparameterize, scaled_dot_product_attention
from tests import compile_check

PACKAGE = Path(fastgen.__file__).parent


def test_forcing_a_backend_that_cannot_serve_raises_with_the_reason():
    arguments = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with fastgen.use_backend("compiled"):
        with pytest.raises(RuntimeError, match="backend 'compiled' was requested, but"):
            reparameterize(*arguments)
        with pytest.raises(RuntimeError, match=r"only parts of attention_forward have compiled cpu|was not built"):
            scaled_dot_product_attention(*(torch.zeros(1, 2, 4),) * 3)
    assert fastgen.current_backend() == "auto"


def test_use_backend_is_undone_by_an_error_and_nests():
    with pytest.raises(ZeroDivisionError), fastgen.use_backend("torch"):
        with fastgen.use_backend("auto"):
            assert fastgen.current_backend() == "auto"
        assert fastgen.current_backend() == "torch"
        raise ZeroDivisionError
    assert fastgen.current_backend() == "auto"


@pytest.mark.parametrize(("name", "outcome"), [("torch", "torch\n"), ("gpu", "FASTGEN_BACKEND: expected one of auto")])
def test_the_environment_chooses_the_backend(name, outcome):
    done = subprocess.run(
        [sys.executable, "-c", "import fastgen; print(fastgen.current_backend())"],
        env={**os.environ, "FASTGEN_BACKEND": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout + done.stderr


PROBE = """
import torch, fastgen
mu = torch.zeros(3, 8, requires_grad=True)
torch.manual_seed(0)
z, kl = fastgen.functional.reparameterize_kl(mu, torch.zeros(3, 8))
(z.sum() + kl.sum()).backward()
q = torch.randn(1, 2, 4, 8)
fastgen.functional.scaled_dot_product_attention(q, q, q, window=(1, 1))
print(fastgen.info())
print("sample", float(z[0, 0]))
try:
    with fastgen.use_backend("compiled"):
        fastgen.functional.reparameterize(mu, mu)
except RuntimeError as error:
    print("refused:", error)
"""


def run_copy(tmp_path, **extra):
    copy = tmp_path / "fastgen"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_report.json"))
    for name, content in extra.items():
        (copy / name.replace("__", ".")).write_bytes(content)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_everything_works_with_every_compiled_library_removed(tmp_path):
    output = run_copy(tmp_path)
    assert "_cpu was not built" in output
    assert "refused: backend 'compiled' was requested, but _cpu was not built" in output
    torch.manual_seed(0)
    mine = reparameterize(torch.zeros(3, 8), torch.zeros(3, 8))
    theirs = float(output.split("sample ")[1].split()[0])
    assert abs(theirs - float(mine[0, 0])) < 1e-6


def test_a_library_that_does_not_load_is_skipped_with_its_reason(tmp_path):
    output = run_copy(tmp_path, _cpu__so=b"not a library")
    assert "library _cpu: _cpu.so does not load" in output
    assert "sample" in output


def test_a_library_that_was_cut_short_is_skipped_with_its_reason_and_does_not_kill_the_process(tmp_path):
    whole = Path(backend.compiled_libraries()[0].path or pytest.skip("no library was built")).read_bytes()
    output = run_copy(tmp_path, _cpu__so=whole[: len(whole) // 2])
    assert f"library _cpu: _cpu.so was cut short: it has {len(whole) // 2} bytes of" in output
    assert "sample" in output


@pytest.mark.parametrize(
    ("capability", "architectures", "works"),
    [
        ((8, 0), ["80"], True),
        ((8, 6), ["80"], True),
        ((9, 0), ["90a"], True),
        ((9, 0), ["80"], False),
        ((10, 0), ["80", "90a", "120", "120+PTX"], False),
        ((12, 1), ["120", "120+PTX"], True),
        ((13, 0), ["120", "120+PTX"], True),
        ((9, 0), [], False),
        ((8, 7), ["80"], False),  # Jetson
        ((8, 7), ["80+PTX"], True),
        ((8, 7), ["87"], True),
        ((8, 9), ["87"], False),
    ],
)
def test_which_devices_a_build_runs_on(capability, architectures, works):
    assert backend.runs_on(capability, architectures) is works


@pytest.mark.parametrize(
    ("capability", "machine_code", "ptx"),
    [
        ((7, 5), False, False),
        ((8, 0), True, True),
        ((8, 6), True, True),
        ((8, 7), False, False),  # Jetson: TORCH_CUDA_ARCH_LIST=8.7
        ((8, 9), True, True),
        ((9, 0), True, True),
        ((10, 0), True, True),
        ((10, 3), True, True),
        ((11, 0), False, True),
        ((12, 0), True, True),
        ((12, 1), True, True),
        ((13, 0), False, True),
    ],
)
def test_which_gpus_the_default_build_serves(capability, machine_code, ptx):
    """The claim of README and docs/install.md: from Ampere on. ``ptx``: with a driver that compiles it."""
    tool = compile_check.load("tools/build_libraries.py")
    names = tool.architecture_names(tool.DEFAULT_ARCHITECTURES)
    assert backend.runs_on(capability, names, ptx=False) is machine_code
    assert backend.runs_on(capability, names) is ptx


def test_a_gpu_that_the_kernels_are_not_compiled_for_takes_pytorch_and_says_so(monkeypatch):
    cuda, name = torch.device("cuda", 0), "attention_forward"
    library = backend.CompiledLibrary("_cuda", "cuda", path=Path("somewhere"))
    monkeypatch.setattr(libraries, "_compiled", [library])
    monkeypatch.setattr(selection, "_places", {})
    monkeypatch.setattr(libraries, "has_kernel", lambda *arguments: True)
    monkeypatch.setattr(libraries, "compiled_architectures", lambda: ["80", "90a"])
    monkeypatch.setattr(libraries, "device_capability", lambda device: (7, 5))
    reason = "the kernels are compiled for 80, 90a, not for (7, 5)"
    assert selection._place(name, cuda, torch.float16) == (backend.TORCH, reason)
    assert fastgen.environment._served_by(name, cuda) == f"PyTorch ({reason})"
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match="compiled for 80, 90a, not for"):
        backend.select(name, SimpleNamespace(device=cuda, dtype=torch.float16))


def test_a_dtype_that_the_library_was_not_built_for_takes_pytorch_and_says_so(monkeypatch):
    cuda, name = torch.device("cuda", 0), "attention_forward"
    library = backend.CompiledLibrary("_cuda", "cuda", path=Path("somewhere"))
    built = {"torch": "2.13.0", "cuda": "13.0", "compiler": "cc", "architectures": ["80"]}
    monkeypatch.setattr(library, "build_info", lambda: built | {"dtypes": ["bfloat16", "float32"]})
    monkeypatch.setattr(libraries, "_compiled", [backend.library_for("cpu"), library])
    monkeypatch.setattr(selection, "_places", {})
    monkeypatch.setattr(libraries, "has_kernel", lambda *arguments: True)
    monkeypatch.setattr(libraries, "device_capability", lambda device: (8, 0))
    reason = "attention_forward has no compiled kernel for torch.float16: the library was built with "
    reason += "FASTGEN_DTYPES=float32,bfloat16"
    assert selection._place(name, cuda, torch.float16) == (backend.TORCH, reason)
    assert selection._place(name, cuda, torch.bfloat16) == (backend.COMPILED, None)
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match=re.escape(reason)):
        backend.select(name, SimpleNamespace(device=cuda, dtype=torch.float16))
    assert "for torch.float64" in str(backend.why_not_compiled(name, cuda, torch.float64))
    assert "FASTGEN_DTYPES" not in str(backend.why_not_compiled(name, cuda, torch.float64))
    assert fastgen.environment._served_by(name, cuda) == "compiled for float32, bfloat16; PyTorch for other dtypes"
    assert "CUDA dtypes: bfloat16, float32\n" in str(fastgen.info())
    with pytest.raises(ValueError, match=r"dtype: expected one of torch.float32, torch.bfloat16, .*FASTGEN_DTYPES.*16"):
        fastgen.info((1, 1, 8, 8, 8, 8), torch.float16)
    assert set(backend.compiled_dtypes("cpu")) == set(backend.COMPILED_DTYPES)


def test_the_torch_backend_is_still_accepted_as_reference():
    with pytest.warns(DeprecationWarning, match="'reference' is called 'torch'"), fastgen.use_backend("reference"):
        assert fastgen.current_backend() == "torch"


needs_plans = pytest.mark.skipif(backend.plans.why_not() is not None, reason="the CPU library is not loaded")


@needs_plans
@pytest.mark.parametrize(
    ("name", "sizes", "text"),
    [
        ("latent_plan", {"rows": 0}, "rows: expected an integer from 1 to 9223372036854775807, got 0"),
        ("latent_plan", {"multiprocessors": 1.0}, "multiprocessors: expected an integer from 1 to 2147483647, got 1.0"),
        ("latent_plan", {"cols": 2**63}, "cols: expected an integer from 1 to"),
        ("attention_plan", {"key_dim": 4096}, "key_dim, value_dim: larger than every compiled tile"),
        ("attention_plan", {"mask": (1, 1, 8)}, r"mask: expected four sizes \(B, H, N, M\), got \(1, 1, 8\)"),
        ("projection_plan", {"tokens": 2**31}, "tokens: expected an integer from 1 to 2147483647, got 2147483648"),
    ],
)
def test_launch_plans_refuse_bad_sizes(name, sizes, text):
    """Also those that C would wrap, or divide by."""
    good = {
        "latent_plan": dict.fromkeys(("rows", "cols", "element_size", "multiprocessors"), 4),
        "attention_plan": dict.fromkeys(
            ("batch", "heads", "key_heads", "queries", "keys", "key_dim", "value_dim", "element_size",
             "multiprocessors"), 4
        ),
        "projection_plan": dict.fromkeys(
            ("batch", "tokens", "inputs", "outputs", "widest", "element_size", "multiprocessors"), 4
        ),
    }  # fmt: skip
    plan = getattr(backend.plans, name)
    assert plan(**good[name])
    with pytest.raises(ValueError, match=text):
        plan(**{**good[name], **sizes})


@needs_plans
def test_launch_plans_have_tuples_and_the_plan_of_a_mask():
    plans = backend.plans.attention_plan(2, 4, 4, 64, 64, 8, 8, 2, 132, plain=False, mask=[1, 1, 64, 64])
    assert plans["forward"]["tile"] == (16, 32)
    assert {"mask", "second order mask", "tangent"} <= plans.keys()
    assert "mask" not in backend.plans.attention_plan(2, 4, 4, 64, 64, 8, 8, 2, 132)


def test_without_the_cpu_library_launch_plans_raise_with_the_reason(monkeypatch):
    monkeypatch.setattr(libraries, "_compiled", [backend.CompiledLibrary("_cpu", "cpu", problem="_cpu was not built")])
    with pytest.raises(RuntimeError, match="latent_plan: launch plans require the compiled CPU library: _cpu was not"):
        backend.plans.latent_plan(1, 1, 4, 132)


def test_a_library_of_another_version_is_not_used(monkeypatch):
    """It has no build information."""
    library = backend.CompiledLibrary("_cpu", "cpu")
    monkeypatch.setattr(libraries, "_built", lambda name: Path(sys.executable).resolve())
    monkeypatch.setattr(libraries, "why_incomplete", lambda path: None)
    monkeypatch.setattr(libraries, "why_of_another_version", lambda path: None)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda path: SimpleNamespace())
    library.load()
    assert "is of another version of fastgen: build or install fastgen again" in library.problem
    assert library.build_info() == {}


@pytest.mark.parametrize("version", ["0.0.9", None])
def test_a_library_of_another_version_is_refused_before_it_registers_operators(tmp_path, monkeypatch, version):
    whole = Path(backend.compiled_libraries()[0].path or pytest.skip("no library was built")).read_bytes()
    name = b"fastgen_version\0"
    if version is None:  # a library of a version without the section
        old = whole.replace(name, b"another_section\0")
    else:
        old = whole.replace(fastgen.__version__.encode() + b"\0", version.encode() + b"\0")
    assert old != whole
    file = tmp_path / "_cpu.so"
    file.write_bytes(old)
    library = backend.CompiledLibrary("_cpu", "cpu")
    monkeypatch.setattr(libraries, "_built", lambda name: file)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("the library was loaded"))
    library.load()
    expected = "_cpu.so is of another version of fastgen" if version is None else f"of fastgen {version}, and this is"
    assert expected in (library.problem or "")
    assert "build or install fastgen again" in (library.problem or "")
