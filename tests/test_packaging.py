"""FASTGEN_BUILD: what is chosen on which machine, and that the choices install."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("fastgen_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

EVERYTHING = setup.Facts("2.13.0", "13.0", "/cuda/bin/nvcc", "/usr/bin/c++")


@pytest.mark.parametrize(
    ("mode", "facts", "targets", "reason"),
    [
        ("auto", EVERYTHING, ["cpu", "cuda"], None),
        ("auto", EVERYTHING._replace(torch_cuda=None), ["cpu"], "torch has no CUDA"),
        ("auto", EVERYTHING._replace(nvcc=None), ["cpu"], "nvcc was not found"),
        ("auto", EVERYTHING._replace(compiler=None), [], "no C\\+\\+ compiler"),
        ("auto", EVERYTHING._replace(pybind11=False), [], "pip install pybind11"),
        ("auto", EVERYTHING._replace(torch_version=None), [], "no-build-isolation"),
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
        ("gpu", EVERYTHING, "expected auto, none, cpu or cuda, got 'gpu'"),
    ],
)
def test_an_explicit_choice_that_cannot_be_met_fails_with_the_reason(mode, facts, reason):
    with pytest.raises(SystemExit, match=reason):
        setup.choose(mode, facts)


def test_architecture_lists_become_names():
    assert setup.architecture_names("8.0;9.0a;12.0+PTX") == ["80", "90a", "120", "120+PTX"]
    assert setup.architecture_names("8.0 8.6") == ["80", "86"]


@pytest.fixture
def project(tmp_path):
    """A copy, since builds leave files in it. Compiled libraries come along: no wheel may take an old one."""
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, tmp_path / "project", ignore=skipped)


def build_wheel(project, mode, **environment):
    folder = project.parent
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, project],
        env={**os.environ, "FASTGEN_BUILD": mode, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        report = json.loads(archive.read("fastgen/_build_report.json"))
        libraries = sorted(name.split("/")[1].split(".")[0] for name in archive.namelist() if name.endswith(".so"))
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


def test_a_compiler_that_fails_does_not_fail_an_automatic_install(project, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such machine >&2\nexit 1\n")
    broken.chmod(0o755)
    _, report, libraries, line = build_wheel(project, "auto", CXX=str(broken), CC=str(broken), CUDA_HOME="/nowhere")
    assert libraries == []
    assert "the build failed" in report["missing"]["cpu"]
    assert "not cpu: the build failed" in line


def test_a_source_distribution_holds_what_a_build_needs(project, tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path]
    environment = {**os.environ, "FASTGEN_BUILD": "none"}
    subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "fastgen"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert {"setup.py", "csrc/latent/forward.cuh", "csrc/common/math.h", "LICENSE"} <= names
    assert set(tracked.stdout.split()) <= names


@pytest.mark.slow
@pytest.mark.skipif(setup.find_nvcc() is None, reason="no nvcc")
def test_cuda_kernels_build_without_a_gpu_and_with_a_torch_that_has_no_cuda(project):
    """With little optimization, if nvcc has the option. ``make cuda-check`` runs this after compiling every source."""
    options = subprocess.run([setup.find_nvcc(), "--help"], check=True, capture_output=True, text=True).stdout
    haste = {"NVCC_APPEND_FLAGS": "--Ofast-compile=max"} if "--Ofast-compile" in options else {}
    _, report, libraries, _ = build_wheel(project, "cuda", TORCH_CUDA_ARCH_LIST="12.0", **haste)
    assert libraries == ["_C", "_cpu", "_cuda"]
    assert report == {"mode": "cuda", "built": ["C", "cpu", "cuda"], "missing": {}}
