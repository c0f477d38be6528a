"""FASTGEN_BUILD: what is chosen on which machine, and that the choices build and install."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import build_libraries

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("fastgen_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

EVERYTHING = setup.Facts("2.13.0", "13.0", "/cuda/bin/nvcc", "/usr/bin/c++")
NVCC = build_libraries.find_nvcc()


@pytest.mark.parametrize(
    ("mode", "facts", "targets", "reason"),
    [
        ("auto", EVERYTHING, ["cpu", "cuda"], None),
        ("auto", EVERYTHING._replace(torch_cuda=None), ["cpu"], "torch has no CUDA"),
        ("auto", EVERYTHING._replace(nvcc=None), ["cpu"], "nvcc was not found"),
        ("auto", EVERYTHING._replace(compiler=None), [], "no C\\+\\+ compiler"),
        ("auto", EVERYTHING._replace(ninja=None), [], "pip install ninja"),
        ("auto", EVERYTHING._replace(torch_version=None), [], "no torch in this environment"),
        ("none", EVERYTHING, [], "FASTGEN_BUILD=none"),
        ("cpu", EVERYTHING, ["cpu"], "FASTGEN_BUILD=cpu"),
        ("cuda", EVERYTHING._replace(torch_cuda=None), ["cpu", "cuda"], None),
    ],
)
def test_the_targets_follow_from_the_machine(mode, facts, targets, reason):
    chosen, missing = setup.choose(mode, facts)
    assert chosen == targets
    assert set(chosen) | set(missing) == {"cpu", "cuda"}
    if reason:
        assert any(re.search(reason, text) for text in missing.values())


@pytest.mark.parametrize(
    ("mode", "facts", "reason"),
    [
        ("cuda", EVERYTHING._replace(nvcc=None), "FASTGEN_BUILD=cuda: nvcc was not found"),
        ("cpu", EVERYTHING._replace(compiler=None), "FASTGEN_BUILD=cpu: no C"),
        ("cpu", EVERYTHING._replace(torch_version=None), "FASTGEN_BUILD=cpu: no torch"),
        ("gpu", EVERYTHING, "expected auto, none, cpu or cuda, got 'gpu'"),
    ],
)
def test_an_explicit_choice_that_cannot_be_met_fails_with_the_reason(mode, facts, reason):
    with pytest.raises(SystemExit, match=reason):
        setup.choose(mode, facts)


def test_architecture_lists_become_names():
    assert build_libraries.architecture_names("8.0;9.0a;12.0+PTX") == ["80", "90a", "120", "120+PTX"]
    assert build_libraries.architecture_names("8.0 8.6") == ["80", "86"]
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected entries such as 8\.0.* got 'Hopper'"):
        build_libraries.architecture_names("8.0;Hopper")


def test_dtypes_are_those_of_the_variable_and_a_typo_is_an_error_of_every_build(monkeypatch):
    for text, names in [("", build_libraries.DTYPES), ("float32, bfloat16", ("bfloat16", "float32"))]:
        monkeypatch.setenv("FASTGEN_DTYPES", text)
        assert build_libraries.cuda_dtypes() == names
    message = "FASTGEN_DTYPES: expected names of bfloat16, float16, float32, separated by commas, got '{}'"
    for text, wrong in [("bfloat", "bfloat"), ("bfloat16,", ""), ("float16;float32", "float16;float32")]:
        monkeypatch.setenv("FASTGEN_DTYPES", text)
        with pytest.raises(SystemExit, match=re.escape(message.format(wrong))):
            build_libraries.cuda_dtypes()
    done = run([sys.executable, "setup.py", "--version"], ROOT, FASTGEN_DTYPES="half", FASTGEN_BUILD="none")
    assert done.returncode != 0
    assert message.format("half") in done.stdout


def test_a_library_of_one_dtype_compiles_its_sources_alone(monkeypatch):
    monkeypatch.setattr(build_libraries, "cuda_home", lambda _: "/cuda")
    monkeypatch.setattr(build_libraries, "cuda_release", lambda _: "13.0")
    torch = build_libraries.Torch(ROOT, "2.13.0", None)

    def sources(*dtypes):
        return build_libraries.cuda_library(torch, "1.0", "nvcc", ["90a"], dtypes).sources

    everything, one = sources(*build_libraries.DTYPES), sources("float16")
    left_out = {path for path in everything if re.search(r"(\b|_)(bfloat16|float32)\.cu$", path)}
    assert len(left_out) > 20
    assert set(one) == set(everything) - left_out
    assert not any("FASTGEN_WITHOUT" in flags for flags in everything.values())
    for flags in one.values():  # those that dispatch by dtype, too
        assert re.findall(r"FASTGEN_WITHOUT_(\w+)", flags) == ["BFLOAT16", "FLOAT32"]
    assert '-DFASTGEN_DTYPES="float16"' in one["csrc/common/build_info.cpp"]
    with_instances = {path for path in everything if "/instantiations/" in path}
    assert with_instances == {path for path in everything if build_libraries.dtype_of(path)}


DISPATCH = """
#include <cstdio>
#include "common/dispatch.h"
using namespace fastgen;
template <typename T> int launcher();  // defined for BFloat16 alone
template <> int launcher<BFloat16>() { return 3; }
int main() {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const DType dtype : dtypes) {
    try {
      dispatch_dtype(dtype, [](auto type) { printf("%d\\n", launcher<typename decltype(type)::type>()); });
    } catch (const Error& error) {
      puts(error.what());
    }
  }
}
"""


@pytest.mark.skipif(build_libraries.find_compiler() is None, reason="no C++ compiler")
def test_dispatch_refers_to_no_launcher_of_a_dtype_that_is_left_out(tmp_path):
    (tmp_path / "dispatch.cpp").write_text(DISPATCH)
    command = [*shlex.split(build_libraries.find_compiler()), "-std=c++20", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    command += [str(tmp_path / "dispatch.cpp"), "-o", str(tmp_path / "dispatch")]
    without = [f"-DFASTGEN_WITHOUT_{name}" for name in ("FLOAT32", "FLOAT16")]
    done = run([*command, *without], tmp_path)
    assert done.returncode == 0, done.stdout
    refused = "dtype: this library was built without its kernels (FASTGEN_DTYPES)"
    assert run([tmp_path / "dispatch"], tmp_path).stdout.splitlines() == [refused, refused, "3"]
    assert "undefined reference" in run(command, tmp_path).stdout


def test_an_environments_torch_is_found_in_an_isolated_build(monkeypatch, tmp_path):
    """pip hides the environment from sys.path; uv builds in another one, and VIRTUAL_ENV names the environment."""
    installed = build_libraries.find_torch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert build_libraries.find_torch() == installed
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(tmp_path))
    assert build_libraries.find_torch() is None
    site = tmp_path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "torch" / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    (site / "torch" / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert build_libraries.find_torch() == build_libraries.Torch(site / "torch", "2.11.0+cu130", "13.0")


@pytest.mark.parametrize("value", ["0", "many", "-2"])
def test_max_jobs_is_a_positive_integer(monkeypatch, value):
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(SystemExit, match=f"MAX_JOBS: expected a positive integer, got '{value}'"):
        build_libraries.jobs()


@pytest.fixture
def project(tmp_path):
    """A copy, since builds leave files in it. Compiled libraries come along: no wheel may take an old one.

    Objects come along too, with their times, and are not compiled again.
    """
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "site", "*.egg-info", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path / "project", ignore=skipped)
    if (ROOT / "build" / "libraries").exists():
        shutil.copytree(ROOT / "build" / "libraries", copy / "build" / "libraries")
    return copy


def run(command, folder, **environment):
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def build_wheel(project, mode, **environment):
    folder = project.parent / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, project]
    done = run(command, project, FASTGEN_BUILD=mode, **environment)
    assert done.returncode == 0, done.stdout[-3000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        report = json.loads(archive.read("fastgen/_build_report.json"))
        libraries = sorted(name.split("/")[1] for name in archive.namelist() if name.endswith(".so"))
    line = next(line for line in done.stdout.splitlines() if "fastgen: built" in line)
    return wheel, report, libraries, line


def test_a_build_of_nothing_is_a_pure_wheel_that_says_why(project):
    wheel, report, libraries, line = build_wheel(project, "none")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {"fastgen/py.typed", "fastgen/train/report.html.j2"} <= set(archive.namelist())
    assert libraries == []
    assert report["missing"] == {"cpu": "FASTGEN_BUILD=none", "cuda": "FASTGEN_BUILD=none"}
    assert "nothing compiled; not cpu: FASTGEN_BUILD=none" in line


def test_a_wheel_serves_every_python_and_carries_its_version_everywhere(project):
    wheel, report, libraries, _ = build_wheel(project, "cpu", FASTGEN_LOCAL_VERSION="cpu")
    version = f"{setup.public_version()}+cpu"
    assert re.fullmatch(rf"fastgen-{re.escape(version)}-py3-none-(linux|macosx)\w+\.whl", wheel.name)
    assert libraries == ["_cpu.so"]
    assert report == {
        "version": version,
        "mode": "cpu",
        "built": ["cpu"],
        "kept": [],
        "missing": {"cuda": "FASTGEN_BUILD=cpu"},
    }
    with zipfile.ZipFile(wheel) as archive:
        assert f'__version__ = "{version}"' in archive.read("fastgen/version.py").decode()
        assert f"\nVersion: {version}\n" in archive.read(f"fastgen-{version}.dist-info/METADATA").decode()


@pytest.mark.parametrize("value", ["cu 130", "+cu130", "CU130"])
def test_a_local_version_is_checked(value, monkeypatch):
    monkeypatch.setenv("FASTGEN_LOCAL_VERSION", value)
    with pytest.raises(SystemExit, match=r"FASTGEN_LOCAL_VERSION: expected letters, digits and dots"):
        setup.version()


def test_only_wheels_have_local_versions(project):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = run(command, project, FASTGEN_BUILD="cpu", FASTGEN_LOCAL_VERSION="cpu")
    assert done.returncode != 0
    assert "FASTGEN_LOCAL_VERSION: only a wheel can have a local version" in done.stdout


def test_a_compiler_that_fails_does_not_fail_an_automatic_install(project, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho error: no such machine >&2\nexit 1\n")
    broken.chmod(0o755)
    _, report, libraries, line = build_wheel(project, "auto", CXX=str(broken), CC=str(broken), CUDA_HOME="/nowhere")
    assert libraries == []
    assert report["missing"]["cpu"] == "the build failed: error: no such machine"
    assert "not cpu: the build failed" in line


def test_a_compiler_that_fails_fails_an_explicit_choice(project):
    done = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], project, FASTGEN_BUILD="cpu", CXX="false")
    assert done.returncode != 0
    assert "FASTGEN_BUILD=cpu: cpu: the build failed" in done.stdout


@pytest.fixture
def without_torch(tmp_path):
    """An interpreter in an environment without torch."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    packages = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    for pattern in ("setuptools", "setuptools-*", "_distutils_hack", "ninja"):
        for path in packages.glob(pattern):
            (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


def test_a_build_without_torch_keeps_the_libraries_of_a_checkout(project, without_torch):
    """``pip install -e .`` in an environment without torch once deleted them."""
    library = project / "fastgen" / "_cpu.so"
    library.write_bytes(b"built earlier")
    command = [without_torch, "setup.py", "-q", "build_py", "build_ext", "--inplace"]
    environment = {"VIRTUAL_ENV": "", "PYTHONPATH": ""}
    editable = [without_torch, "-c", "import setuptools.build_meta as b; b.build_editable('dist')"]
    (project / "dist").mkdir()
    done = run(editable, project, FASTGEN_BUILD="auto", **environment)
    assert "kept cpu, built earlier; not cpu: no torch in this environment" in done.stdout
    assert library.read_bytes() == b"built earlier"
    report = json.loads((project / "fastgen" / "_build_report.json").read_text())
    assert report["kept"] == ["cpu"]
    assert run(command, project, FASTGEN_BUILD="cpu", **environment).returncode != 0  # an explicit choice fails,
    assert library.read_bytes() == b"built earlier"  # and changes nothing
    assert run(editable, project, FASTGEN_BUILD="none", **environment).returncode == 0
    assert not library.exists()


@pytest.mark.parametrize(
    ("cxx", "compiler"), [("g++", "g++"), ("ccache g++ -m64", "g++"), ("/opt/bin/sccache clang++", "clang++")]
)
def test_nvcc_takes_the_compiler_behind_a_launcher(cxx, compiler):
    assert build_libraries.host_compiler(cxx) == compiler


def test_a_changed_header_compiles_its_dependents_again(project):
    facts, torch = setup.gather_facts(), build_libraries.find_torch()
    libraries = [build_libraries.cpu_library(torch, "1")]
    files = {library.name: library for library in libraries}
    # One source of each compiler; the smallest, since it is compiled here.
    small = {"csrc/common/cpu/device_scope.cpp": files["_cpu"].sources["csrc/common/cpu/device_scope.cpp"]}
    if facts.nvcc is not None:
        cuda = build_libraries.cuda_library(torch, "1", facts.nvcc, ["80"])
        source = "csrc/smallest.cu"
        (project / source).write_text('#include "smallest.cuh"\n__global__ void kernel(float* out) { *out = kOne; }\n')
        (project / "csrc/smallest.cuh").write_text("#pragma once\nconstexpr float kOne = 1;\n")
        small[source] = next(flags for file, flags in cuda.sources.items() if file.endswith(".cu"))
    shutil.rmtree(project / "build", ignore_errors=True)
    (project / "build").mkdir()
    library = build_libraries.Library("_small", small, "")
    (project / "build.ninja").write_text(build_libraries.manifest([library], "build", facts.nvcc))
    ninja = build_libraries.find_ninja()
    done = run([ninja], project)
    assert done.returncode == 0, done.stdout
    assert "no work to do" in run([ninja], project).stdout
    (project / "csrc/common/torch_api.h").touch()
    assert "device_scope.cpp" in run([ninja, "-n"], project).stdout
    if facts.nvcc is not None:
        assert "smallest.cu" not in run([ninja, "-n"], project).stdout
        (project / "csrc/smallest.cuh").touch()
        assert "smallest.cu" in run([ninja, "-n"], project).stdout


def test_a_source_distribution_holds_what_a_build_needs(project, tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path]
    environment = {**os.environ, "FASTGEN_BUILD": "none"}
    subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "fastgen", "tools"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert {"setup.py", "csrc/latent/forward.cuh", "csrc/common/math.h", "LICENSE"} <= names
    assert "tools/build_libraries.py" in names
    assert set(tracked.stdout.split()) <= names


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_cuda_kernels_build_without_a_gpu_and_with_a_torch_that_has_no_cuda(project):
    """With little optimization, if nvcc has the option. ``make cuda-check`` runs this after compiling every source."""
    options = subprocess.run([NVCC, "--help"], check=True, capture_output=True, text=True).stdout
    haste = {"NVCC_APPEND_FLAGS": "--Ofast-compile=max"} if "--Ofast-compile" in options else {}
    _, report, libraries, _ = build_wheel(project, "cuda", TORCH_CUDA_ARCH_LIST="12.0", **haste)
    assert libraries == ["_cpu.so", "_cuda.so"]
    assert (report["built"], report["missing"]) == (["cpu", "cuda"], {})
