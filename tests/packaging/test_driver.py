"""CUDA drivers that are too old for the kernels: PyTorch is taken, with a reason."""

from __future__ import annotations

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
from fastgen.backend.drivers import CudaVersions, compiles_ptx, runs_on, version_from, version_of, why_too_old
from tests import compile_check
from tests.packaging import drivers

CUDA_VERSIONS = backend.CompiledLibrary.cuda_versions
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(fastgen.__file__).parent


def test_versions_are_read_as_cuda_numbers_them():
    assert [version_of(number) for number in (11080, 12020, 12080, 13000)] == [(11, 8), (12, 2), (12, 8), (13, 0)]
    assert version_from("12.10") == (12, 10)


@pytest.mark.parametrize(
    ("runtime", "driver", "reason"),
    [
        ("13.0", "11.8", r"CUDA 13.0 and the driver supports CUDA 11.8: .* CUDA 13 \(R580 or newer\), .* CUDA 11"),
        ("13.0", "12.2", r"CUDA 13.0 and the driver supports CUDA 12.2: .* CUDA 13 \(R580 or newer\), .* CUDA 12"),
        ("13.0", "12.8", r"CUDA 13.0 and the driver supports CUDA 12.8: .* the fastgen wheel for CUDA 12"),
        ("13.0", "13.0", None),
        ("13.2", "13.0", None),  # minor version compatibility
        ("12.8", "11.8", r"for CUDA 12 \(R525 or newer\)"),
        ("12.8", "12.2", None),
        ("12.8", "13.0", None),
        ("12.8", None, None),
        ("14.0", "13.0", r"a driver for CUDA 14, or"),
    ],
)
def test_a_driver_of_an_older_major_version_is_too_old(runtime, driver, reason):
    version = version_from(runtime)
    found = why_too_old(CudaVersions(version, version, None if driver is None else version_from(driver)))
    assert (found is None) is (reason is None)
    assert reason is None or re.search(reason, found)


@pytest.mark.parametrize(
    ("compiler", "driver", "ptx"), [("12.8", "12.2", False), ("12.8", "12.8", True), ("12.8", "13.0", True)]
)
def test_a_driver_compiles_ptx_of_its_own_and_of_older_versions(compiler, driver, ptx):
    versions = CudaVersions(version_from("12.0"), version_from(compiler), version_from(driver))
    assert compiles_ptx(versions) is ptx
    names = ["80", "90", "90+PTX"]
    assert runs_on((12, 0), names, ptx=ptx) is ptx  # only by PTX
    assert runs_on((8, 6), names, ptx=ptx)
    assert runs_on((9, 0), names, ptx=ptx)


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes this process one with a library and a GPU of these versions."""
    library = backend.CompiledLibrary("_cuda", "cuda", path=Path("_cuda.so"))
    monkeypatch.setattr(libraries, "_compiled", [backend.library_for("cpu"), library])
    monkeypatch.setattr(selection, "_places", {})
    monkeypatch.setattr(libraries, "has_kernel", lambda name, device: device.type == "cuda")

    def make(versions, capability, architectures):
        monkeypatch.setattr(backend.CompiledLibrary, "cuda_versions", lambda self: versions)
        monkeypatch.setattr(libraries, "compiled_architectures", lambda: architectures)
        monkeypatch.setattr(libraries, "device_capability", lambda device: capability)

    return make


def test_ptx_that_the_driver_does_not_compile_is_named_in_the_reason(gpu):
    device = torch.device("cuda", 0)
    gpu(CudaVersions((12, 8), (12, 8), (12, 2)), (9, 0), ["80", "80+PTX"])
    reason = backend.why_not_compiled("latent_forward", device)
    assert "not for (9, 0), and the driver, which supports CUDA 12.2, does not compile PTX of CUDA 12.8" in reason
    gpu(CudaVersions((12, 8), (12, 8), (12, 8)), (9, 0), ["80", "80+PTX"])
    assert backend.why_not_compiled("latent_forward", device) is None
    gpu(CudaVersions((12, 8), (12, 8), (12, 2)), (8, 0), ["80", "80+PTX"])
    assert backend.why_not_compiled("latent_forward", device) is None


def test_what_is_assumed_for_a_gpu_elsewhere_is_not_kept_for_one_that_appears(gpu):
    device = torch.device("cuda", 0)
    old = CudaVersions((13, 0), (13, 0), (12, 8))
    gpu(old, None, ["90a"])  # no device: tensors are fake
    assert selection._place("latent_forward", device, torch.float16) == (backend.COMPILED, None)
    gpu(old, (9, 0), ["90a"])
    namespace, reason = selection._place("latent_forward", device, torch.float16)
    assert namespace == backend.TORCH
    assert "the driver supports CUDA 12.8" in reason


def test_an_error_of_the_cuda_runtime_is_a_reason_for_pytorch(gpu, monkeypatch):
    gpu(None, (9, 0), ["90a"])
    monkeypatch.setattr(backend.CompiledLibrary, "cuda_versions", CUDA_VERSIONS)
    library = backend.library_for("cuda")
    library.handle = SimpleNamespace(fastgen_cuda_versions=lambda *pointers: 999)
    monkeypatch.setattr(library, "build_info", dict)
    reason = "the CUDA runtime of _cuda gives error 999 for the driver's version"
    assert selection._place("latent_forward", torch.device("cuda", 0), torch.float16) == (backend.TORCH, reason)
    assert fastgen.info().libraries["_cuda"] == f"loaded, but {reason}"


def test_a_library_for_cuda_is_not_loaded_into_a_torch_without_it(monkeypatch, tmp_path):
    file = tmp_path / "_cuda.so"
    file.write_bytes(b"not a library")
    library = backend.CompiledLibrary("_cuda", "cuda")
    monkeypatch.setattr(libraries, "_built", lambda name: file)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("the library was loaded"))
    library.load()
    assert library.problem == (
        f"_cuda.so requires CUDA, and this torch ({torch.__version__}) has none: install a build of torch 2.10 or newer"
        " for CUDA"
    )
    assert not library.loaded


# --------------------------------------------------------------------------------------------------
# A library that reads its versions by NVIDIA's runtime


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with a CUDA library that has versions and no kernels."""
    nvcc = compile_check.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found, which brings the CUDA runtime")
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("the fake driver requires Linux and a C compiler")
    copy = tmp_path_factory.mktemp("driver") / "fastgen"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_cuda*.so", "__pycache__"))
    version = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
    values = {
        "VERSION": fastgen.__version__,
        "TORCH_VERSION": "0",
        "DTYPES": "bfloat16 float16 float32",
        "CUDA_VERSION": version,
        "CUDA_ARCHITECTURES": "90a 120 120+PTX",
    }
    macros = [f'-DFASTGEN_{key}="{value}"' for key, value in values.items()]
    common = ROOT / "csrc" / "common"
    command = [nvcc, "-shared", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{common.parent}", *macros]
    sources = [str(common / "cuda_versions.cpp"), str(common / "build_info.cpp")]
    subprocess.run([*command, *sources, "-o", str(copy / "_cuda.so")], check=True)
    return copy


@pytest.mark.parametrize(
    "labels",
    [("11.8", "13.0", "none"), pytest.param(tuple(drivers.DRIVERS), marks=pytest.mark.slow)],
    ids=["an older one, a newer one and none", "all"],
)
def test_under_each_driver_pytorch_or_the_kernels_are_taken(package, capsys, labels):
    """For each driver a process imports torch."""
    assert drivers.main(str(package / "_cuda.so"), labels=labels, pretend=True) == 0
    lines = capsys.readouterr().out.splitlines()
    runtime = lines[0].split("runtime ")[1].split(",")[0]
    taken = {line.split(":")[0].removeprefix("driver "): line.split("auto: ")[1].split(";")[0] for line in lines}
    older = {label for label in labels if label != "none" and int(label.split(".")[0]) < int(float(runtime))}
    assert "11.8" in older
    assert {label for label, namespace in taken.items() if namespace == "fastgen_torch"} == older
    assert taken["none"] == "fastgen"


def test_a_wrong_choice_is_reported():
    """The checks of drivers.py can fail."""
    right = {"auto": "fastgen", "compiled": "fastgen", "info": ""}
    assert drivers.wrong_choice(right, 13000, 13000) == []
    assert "auto takes fastgen" in drivers.wrong_choice(right, 13000, 12080)
    assert drivers.wrong_choice({**right, "auto": "fastgen_torch"}, 12080, 13000) == ["auto takes fastgen_torch"]
    versions = {"error": 0, "runtime": 12080, "driver": 0, "build": {"cuda": "13.0"}}
    assert drivers.wrong_versions(versions, None) == ["built with nvcc 13.0, linked with the runtime 12080"]
    assert drivers.wrong_versions({**versions, "error": 35}, 12080)[:2] == [
        "CUDA error 35",
        "expected driver 12080, got 0",
    ]
