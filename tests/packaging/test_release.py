"""The index serves pip; tools/release.sh refuses wrong arguments; workflow and documentation name the same wheels."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.packaging.wheels import Parts
from tools import make_index, variants

ROOT = Path(__file__).resolve().parents[2]

# -- index -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as http_:
        thread = threading.Thread(target=http_.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{http_.server_port}"
        http_.shutdown()
        thread.join()


def download(index: str, out: Path) -> subprocess.CompletedProcess[str]:
    """pip download fastgen from this index only."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-cache-dir"]
    return subprocess.run(
        [*command, "--index-url", index, "--dest", str(out), "fastgen"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("base_url", [False, True])
def test_pip_downloads_the_wheel_of_the_index_it_was_given(
    parts: Parts, server: tuple[Path, str], base_url: bool, tmp_path: Path
) -> None:
    folder, address = server
    tag = "py3-none-manylinux_2_17_x86_64"  # of every machine
    cpu = replace(parts, folder=folder, tag=tag, files={}).write()
    cuda = replace(parts, folder=folder, tag=tag, local="cu130", files={}).write()
    assert make_index.main([str(folder), str(folder), *(["--base-url", address] if base_url else [])]) == 0
    for local, wheel in (("cpu", cpu), ("cu130", cuda)):
        done = download(f"{address}/whl/{local}/", tmp_path / local)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [path.name for path in (tmp_path / local).iterdir()] == [wheel.name]
    page = (folder / "whl" / "cu130" / "fastgen" / "index.html").read_text(encoding="utf-8")
    assert 'data-requires-python="&gt;=3.10"' in page
    assert "fastgen-0.1.0%2Bcu130-py3" in page
    assert (folder / f"{cpu.name}.metadata").read_text(encoding="utf-8") == cpu_metadata(parts)


def cpu_metadata(parts: Parts) -> str:
    return parts.files[f"{parts.info}METADATA"]


def test_pip_refuses_a_wheel_that_changed_after_the_index_was_written(
    parts: Parts, server: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = server
    wheel = replace(parts, folder=folder, tag="py3-none-manylinux_2_17_x86_64", files={}).write()
    make_index.main([str(folder), str(folder)])
    wheel.write_bytes(wheel.read_bytes() + b"\n")
    done = download(f"{address}/whl/cpu/", tmp_path / "out")
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY", "out"], "expected a folder with wheels"),
        (["FULL", "out", "--base-url", "ftp://x"], "expected an http"),
    ],
)
def test_an_index_of_nothing_is_refused(
    parts: Parts, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    parts.write()
    places = {"EMPTY": str(tmp_path / "empty"), "FULL": str(tmp_path)}
    with pytest.raises(SystemExit):
        make_index.main([places.get(word, word) for word in arguments])
    assert message in capsys.readouterr().err


# -- the script, the workflow and the page ----------------------------------------------------------------------------


def release(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    command = ["bash", str(ROOT / "tools" / "release.sh"), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


needs_3_11 = pytest.mark.skipif(sys.version_info < (3, 11), reason="tools/release.sh needs Python 3.11")


@needs_3_11
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "VARIANT: expected one, got none"),
        (["cu999"], "VARIANT: expected one of cpu, cu126, cu128, cu130, public, cu12-smoke, got cu999"),
        (["cpu", "cu130"], "VARIANT: expected one, got cpu and cu130"),
        (["cpu", "--tag"], "--tag: expected a value, got none"),
        (["cpu", "--fast"], "unknown option --fast"),
        (["cpu", "--tag", "no-such-tag"], "--tag: expected a commit, got no-such-tag"),
        (["cpu", "--from", "no-such.whl"], "--from: expected a wheel, got no-such.whl"),
    ],
)
def test_release_explains_a_wrong_argument(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = release(*arguments, RELEASE_WORK=str(tmp_path))
    assert done.returncode != 0
    assert message in done.stderr
    assert not [*tmp_path.iterdir()]


@needs_3_11
def test_release_refuses_a_wheel_of_another_variant(parts: Parts, tmp_path: Path) -> None:
    done = release("cu130", "--from", str(parts.write()), RELEASE_WORK=str(tmp_path))
    assert done.returncode != 0
    assert "expected a wheel of cu130 (local version 'cu130'), got fastgen-0.1.0+cpu-" in done.stderr


@needs_3_11
def test_release_refuses_an_nvcc_of_another_version(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.1, V12.1.1'\n")
    nvcc.chmod(0o755)
    done = release("cu128", "--out", str(tmp_path / "out"), CUDA_HOME=str(tmp_path), RELEASE_WORK=str(tmp_path))
    assert done.returncode != 0
    assert f"cu128 needs nvcc 12.8, {nvcc} is of CUDA 12.1" in done.stderr


def test_the_workflow_builds_every_published_variant() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8"))
    rows = workflow["jobs"]["wheel"]["strategy"]["matrix"]["include"]
    images = {name: variant.image for name, variant in variants.VARIANTS.items() if variant.image}
    assert {row["variant"]: row["image"] for row in rows} == images


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of docs/install.md, without its head."""
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    rows = re.findall(r"^\|(.*)\|$", text.partition("\n## ")[0], re.MULTILINE)[2:]
    return [[cell.strip().strip("`") for cell in row.split("|")] for row in rows]


def test_the_table_of_wheels_is_that_of_the_variants() -> None:
    rows = {row[0]: row[1:] for row in table("Which wheel") if row[0].startswith("fastgen-")}
    published = [variant for variant in variants.VARIANTS.values() if variant.image]
    assert len(rows) == len(published)
    for variant in published:
        cuda, driver, architectures, *_ = rows["fastgen-X" + (f"+{variant.local}" if variant.local else "")]
        assert cuda == (variant.cuda or "-")
        assert driver == (variant.driver or "-")
        expected = variants.architecture_list(variant).replace(";", "; ") or "-"
        assert architectures == expected


@pytest.mark.slow
@needs_3_11
def test_the_cpu_wheel_is_released(tmp_path: Path) -> None:
    """Minutes: a clean clone of HEAD, a virtual environment with torch, the CPU kernels."""
    done = release("cpu", "--no-environments", "--out", str(tmp_path / "dist"))
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in (tmp_path / "dist").iterdir()}
    assert {"SHA256SUMS", "whl"} <= names
    assert sum(name.endswith(".whl") for name in names) == 1
    assert sum(name.endswith(".tar.gz") for name in names) == 1
    subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path / "dist", check=True, capture_output=True)
