"""Installs a built wheel into clean environments and checks it there: Pythons, versions of torch, no torch at all.

    python tools/check_environments.py dist/fastgen-0.1.0-py3-none-linux_x86_64.whl
    python tools/check_environments.py WHEEL --python 3.10 3.14 --torch none 2.11.0
    python tools/check_environments.py WHEEL --full --keep /var/tmp/environments --json environments.json

Without --python and --torch: this Python and one other, each without torch and with the torch that is installed here.
--full: Python 3.10 to 3.14 with that torch; torch 2.10.0, 2.11.0, 2.13.0 and the newest with one Python; this Python
with the extra `train`. torch comes from the index that pip is configured for; from PyPI it brings its CUDA libraries,
5 to 7 GB in each environment. An environment is deleted when it is checked; with --keep it is kept for the next run.
A pip configuration that caps torch refuses newer releases; PIP_CONFIG_FILE=/dev/null sets it aside.

An interpreter that is not found, or a torch that has no release for it, is reported as "not checked". The exit status
is 1 where a check failed or nothing was checked.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.10.0", "2.11.0", "2.13.0", "newest")
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TOOLS = ("numpy", "pytest", "hypothesis", "scipy")  # what the copied tests import
SHORT_TESTS = (
    "tests/ops/test_attention_numerics.py",
    "tests/ops/test_bad_arguments.py",
    "tests/ops/test_latent_numerics.py",
    "tests/ops/test_noise.py",
)
FULL_TESTS = (
    *SHORT_TESTS,
    "tests/ops/test_aliased_inputs.py",
    "tests/ops/test_backends.py",
    "tests/ops/test_compile.py",
    "tests/ops/test_latent.py",
    "tests/ops/test_operator_checks.py",
)
PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"
STEP_LIMIT = 3600  # seconds; an installation of torch from a slow index, or all tests


class Environment(NamedTuple):
    """A Python, a torch (None: without it) and perhaps an extra of fastgen."""

    python: str
    torch: str | None
    extra: str | None = None

    def __str__(self) -> str:
        torch = "no torch" if self.torch is None else f"torch {self.torch}"
        return f"Python {self.python}, {torch}" + (f", fastgen[{self.extra}]" if self.extra else "")

    @property
    def folder(self) -> str:
        return f"torch-{self.torch or 'none'}-py{self.python}" + (f"-{self.extra}" if self.extra else "")


class Row(NamedTuple):
    environment: str
    check: str
    result: str
    detail: str = ""
    seconds: float = 0.0


class Failure(Exception):
    """A step that failed; the text is the detail of its row."""


class Skipped(Exception):
    """A step that this environment cannot run; the text is the reason."""


# --------------------------------------------------------------------------------------------------
# What to check


def library_files(wheel: Path) -> dict[str, str]:
    """The wheel's compiled libraries: name without suffix -> path in the archive."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"fastgen/_\w+(\.[\w-]+)*\.so", name)]
    return {name.partition("/")[2].partition(".")[0]: name for name in names}


def find_python(version: str) -> str | None:
    """An interpreter of this version: this one, ``python3.X`` of PATH, or the newest of pyenv's."""
    if version == THIS_PYTHON:
        return sys.executable
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders = sorted(
        root.glob(f"versions/{version}.*/bin"),
        key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.parts[-2])],
    )
    candidates = [shutil.which(f"python{version}"), *(str(folder / f"python{version}") for folder in reversed(folders))]
    # A pyenv shim of an interpreter that is not selected is on PATH and only prints an error.
    question = [
        "-c",
        "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2]); print(sys._base_executable)",
    ]
    for candidate in filter(None, candidates):
        try:
            done = subprocess.run([candidate, *question], capture_output=True, text=True, check=False, timeout=60)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.split()[0] == version:
            return done.stdout.splitlines()[1]
    return None


def current_torch() -> str | None:
    """The public version of the torch that is installed here."""
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def choose(pythons: Sequence[str] | None, torches: Sequence[str] | None, full: bool) -> list[Environment]:
    """The environments of a run."""
    torch = current_torch()
    known = [] if torch is None else [torch]
    if pythons or torches:
        wanted = torches or ["none", *known]
        return [Environment(p, None if t == "none" else t) for p in pythons or [THIS_PYTHON] for t in wanted]
    others = [p for p in ("3.12", "3.13", "3.10", "3.11", "3.14") if p != THIS_PYTHON]
    other = next((p for p in others if find_python(p)), others[0])  # one that is missing is reported
    if not full:
        return [Environment(p, t) for p in (THIS_PYTHON, other) for t in (None, *known)]
    known = known or [TORCHES[-1]]
    chosen = [Environment(p, t) for p in PYTHONS for t in (None, *known)]
    chosen += [Environment(other, t) for t in TORCHES if t not in known]
    return [*chosen, Environment(THIS_PYTHON, known[0], "train")]


# --------------------------------------------------------------------------------------------------
# One environment


def clean_variables() -> dict[str, str]:
    """The process's variables, without those by which it would find other packages than the environment's."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "FASTGEN_BACKEND", "__PYVENV_LAUNCHER__")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def run(command: Sequence[str | Path], where: Path, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=where,
        env={**clean_variables(), **options},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=STEP_LIMIT,
    )


def succeed(command: Sequence[str | Path], where: Path, **options: str) -> str:
    """The output of a command that must exit with 0."""
    done = run(command, where, **options)
    if done.returncode != 0:
        print(done.stdout[-6000:], file=sys.stderr)
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
        raise Failure(f"exit status {done.returncode}: {lines[-1].strip()}")
    return done.stdout


class Checker:
    """Checks one environment, whose rows it collects."""

    def __init__(self, environment: Environment, wheel: Path, folder: Path, tests: Sequence[str]) -> None:
        self.environment, self.wheel, self.folder, self.tests = environment, wheel, folder, tests
        self.libraries = library_files(wheel)
        self.rows: list[Row] = []
        self.work = folder / "work"  # the working directory: no checkout is there
        self.python = folder / "bin" / "python"

    @contextmanager
    def step(self, check: str) -> Iterator[list[str]]:
        """A row: passed with the texts appended, failed with those of an exception, or not checked."""
        details: list[str] = []
        start = time.monotonic()
        try:
            yield details
            result = PASSED
        except Skipped as reason:
            result, details = NOT_CHECKED, [str(reason)]
        except Failure as failure:
            result, details = FAILED, [str(failure)]
        except subprocess.TimeoutExpired:
            result, details = FAILED, [f"no end after {STEP_LIMIT} s"]
        self.add(check, result, "; ".join(details), time.monotonic() - start)

    def add(self, check: str, result: str, detail: str = "", seconds: float = 0.0) -> None:
        self.rows.append(Row(str(self.environment), check, result, detail, round(seconds, 1)))
        print(f"{self.environment}: {check}: {result} {detail}", file=sys.stderr, flush=True)

    def pip(self, *arguments: str | Path) -> str:
        return succeed([self.python, "-m", "pip", *arguments], self.work)

    def check(self) -> list[Row]:
        interpreter = find_python(self.environment.python)
        if interpreter is None:
            self.add("interpreter", NOT_CHECKED, f"python{self.environment.python} was not found")
            return self.rows
        if not self.created(interpreter):
            return self.rows
        before = self.site_files()
        with self.step("install") as details:
            extra = f"[{self.environment.extra}]" if self.environment.extra else ""
            # Without torch, nor what else fastgen requires: pip would bring it.
            alone = ["--no-deps"] if self.environment.torch is None else []
            self.pip("install", "--quiet", "--no-cache-dir", *alone, f"{self.wheel}{extra}")
            details.append(self.wheel.name)
        if self.rows[-1].result == PASSED:
            if self.environment.torch is None:
                self.without_torch()
            else:
                self.with_torch()
            self.uninstall(before if not self.environment.extra else None)
        return self.rows

    def created(self, interpreter: str) -> bool:
        """A virtual environment with torch and what the tests need, without fastgen."""
        torch = self.environment.torch
        try:
            if not self.python.exists():
                succeed([interpreter, "-m", "venv", self.folder], ROOT)
                self.work.mkdir(exist_ok=True)
                self.pip("install", "--quiet", "--upgrade", "pip")
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
            self.pip("uninstall", "--quiet", "--yes", "fastgen")
        except Failure as failure:
            self.add("environment", FAILED, str(failure))
            return False
        with self.step("environment") as details:
            version = succeed([self.python, "-c", "import sys; print(sys.version.split()[0])"], self.work).strip()
            details.append(f"Python {version}")
            if torch is not None:
                wanted = "torch" if torch == "newest" else f"torch=={torch}"
                # Byte code of torch takes longer than its download. The upgrade is for "newest".
                install = ["install", "--quiet", "--no-cache-dir", "--no-compile", "--upgrade", wanted, *TOOLS]
                done = run([self.python, "-m", "pip", *install], self.work)
                if "No matching distribution found for torch" in done.stdout:
                    raise Skipped(f"{wanted} has no release for Python {version} in the index")
                if done.returncode != 0:
                    print(done.stdout[-3000:], file=sys.stderr)
                    raise Failure(f"pip install {wanted}: {done.stdout.strip().splitlines()[-1]}")
                show = "import torch; print(torch.__version__, torch.version.cuda or 'without CUDA')"
                found = succeed([self.python, "-c", show], self.work).strip().splitlines()[-1]
                details.append("torch {}, CUDA {}".format(*found.split(" ", 1)).replace("CUDA without", "without"))
        return self.rows[-1].result == PASSED

    def site_files(self) -> set[str]:
        """Files and folders of site-packages and the commands in bin, as paths in the environment.

        torch's own folders are left out, and so is the byte code of other packages, which Python writes at will.
        """
        (site,) = self.folder.glob("lib/python*/site-packages")
        skipped = {"torch", "nvidia", "triton"}
        found = set()
        for folder, folders, files in os.walk(site):
            folders[:] = [name for name in folders if Path(folder) != site or name not in skipped]
            inside = Path(folder).relative_to(self.folder)
            own = "fastgen" in str(inside)
            folders[:] = [name for name in folders if own or name != "__pycache__"]
            found |= {str(inside / name) for name in (*folders, *files)}
        return found | {f"bin/{path.name}" for path in (self.folder / "bin").iterdir()}

    # ----------------------------------------------------------------------------------------------

    def without_torch(self) -> None:
        """One error, of one kind, that names torch and not a part of fastgen."""
        for name, command in (
            ("import fastgen", [self.python, "-c", "import fastgen"]),
            ("fastgen info", [self.folder / "bin" / "fastgen", "info"]),
            ("python -m fastgen info", [self.python, "-m", "fastgen", "info"]),
        ):
            with self.step(f"{name} without torch") as details:
                done = run(command, self.work)
                lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["no output"]
                if done.returncode == 0:
                    raise Failure(f"expected an error that names torch, got: {lines[-1]}")
                if not re.search(r"\btorch\b", lines[-1]) or done.stdout.count("Traceback") > 1:
                    raise Failure(f"expected one error whose last line names torch, got: {lines[-1]}")
                details.append(lines[-1])
        with self.step("fastgen --version without torch") as details:
            details.append(succeed([self.folder / "bin" / "fastgen", "--version"], self.work).strip())

    def with_torch(self) -> None:
        with self.step("pip check") as details:
            details.append(self.pip("check").strip())
        for name, command in (
            ("fastgen info", [self.folder / "bin" / "fastgen", "info"]),
            ("python -m fastgen info", [self.python, "-m", "fastgen", "info"]),
        ):
            with self.step(name) as details:
                text = succeed(command, self.work)
                details += [line for line in text.splitlines() if line.startswith("library ")]
        self.own_checks()
        if "_cuda" in self.libraries:
            self.fake_drivers()
        self.operator_tests()
        if self.environment.extra == "train":
            self.training()

    def own_checks(self) -> None:
        """The rows of environment_checks.py."""
        script = shutil.copy(ROOT / "tools" / "environment_checks.py", self.work)
        done = run([self.python, script, "--libraries", *self.libraries], self.work)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        found = [json.loads(line) for line in lines]
        for row in found:
            if "check" in row:
                self.add(row["check"], row["result"], row["detail"])
        if done.returncode != 0 or not found or not found[-1].get("done"):
            last = ([line for line in done.stdout.splitlines() if line.strip()] or ["no output"])[-1]
            self.add("environment_checks.py", FAILED, f"exit status {done.returncode}: {last}")
        if any(row.get("result") == FAILED for row in found):
            print(done.stdout[-6000:], file=sys.stderr)

    def copied_tests(self) -> Path:
        """A folder with the tests and what they import beside the package: no fastgen but the installed one."""
        folder = self.work / "tests_alone"
        if not folder.exists():
            ignored = shutil.ignore_patterns("__pycache__")
            for name in ("tests", "benchmarks"):
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            shutil.copy(ROOT / "pyproject.toml", folder)
        return folder

    def fake_drivers(self) -> None:
        """Drivers too old for the library, simulated by a libcuda of the tests."""
        with self.step("fake drivers") as details:
            if not (ROOT / "tests" / "packaging" / "drivers.py").is_file():
                raise Skipped("tests/packaging/drivers.py is missing")
            (site,) = self.folder.glob("lib/python*/site-packages")
            library = site / self.libraries["_cuda"]
            text = succeed([self.python, "-m", "tests.packaging.drivers", library], self.copied_tests())
            details.append(text.strip().splitlines()[-1] if text.strip() else "")

    def operator_tests(self) -> None:
        """The CPU tests of the operators, with the installed package."""
        with self.step("tests of the operators") as details:
            options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--no-header"]
            text = succeed([self.python, "-m", "pytest", *options, *self.tests], self.copied_tests())
            summary = text.strip().splitlines()[-1].strip("= ")
            if not re.search(r"\b[1-9]\d* passed", summary):
                raise Failure(f"no test ran: {summary}")
            details.append(summary)

    def training(self) -> None:
        with self.step("fastgen train") as details:
            command = [self.folder / "bin" / "fastgen", "train", "conv-vae", "--data", "digits", "--steps", "20"]
            text = succeed([*command, "--out", self.work / "run", "--device", "cpu"], self.work)
            details.append(text.strip().splitlines()[-1])
            command = [self.folder / "bin" / "fastgen", "sample", self.work / "run", "--n", "4"]
            succeed([*command, "--out", self.work / "samples.png"], self.work)
            if not (self.work / "samples.png").is_file():
                raise Failure("fastgen sample left no image")

    def uninstall(self, before: set[str] | None) -> None:
        with self.step("uninstall leaves nothing") as details:
            self.pip("uninstall", "--yes", "--quiet", "fastgen")
            after = self.site_files()
            # The packages of an extra stay: there only what fastgen's name is in counts.
            left = sorted(path for path in after if (before is not None and path not in before) or "fastgen" in path)
            if left:
                raise Failure(f"{len(left)} left, the first: {left[0]}")
            done = run([self.python, "-c", "import fastgen"], self.work)
            if done.returncode == 0 or "No module named 'fastgen'" not in done.stdout:
                raise Failure("fastgen can still be imported")
            details.append("" if before is not None else "packages of the extra stay")


# --------------------------------------------------------------------------------------------------
# Report


def table(rows: Iterable[Row]) -> str:
    """Rows in columns; the environment is written once."""
    lines, previous = [], None
    listed = list(rows)
    widths = [max((len(str(row[i])) for row in listed), default=0) for i in range(3)]
    for row in listed:
        shown = row.environment if row.environment != previous else ""
        previous = row.environment
        cells = [shown.ljust(widths[0]), row.check.ljust(widths[1]), row.result.ljust(widths[2]), row.detail]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def exit_status(rows: Iterable[Row]) -> int:
    results = [row.result for row in rows]
    return 1 if FAILED in results or PASSED not in results else 0


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, metavar="WHEEL", help="a built wheel of fastgen")
    parser.add_argument("--python", nargs="+", metavar="X", help="versions such as 3.12")
    parser.add_argument("--torch", nargs="+", metavar="Y", help='versions such as 2.10.0, "newest", or "none"')
    parser.add_argument("--full", action="store_true", help="every Python, every torch, and more tests")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="tests to run, such as tests/ops")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder of environments to use again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file that the rows are written to")
    known = parser.parse_args(given)
    if known.wheel.suffix != ".whl" or not zipfile.is_zipfile(known.wheel):
        parser.error(f"WHEEL: expected a wheel file, got {known.wheel}")
    for test in known.tests or ():
        if not (ROOT / test.partition("::")[0]).exists():
            parser.error(f"--tests: expected a path in the repository, got {test}")
    for python in known.python or ():
        if not re.fullmatch(r"3\.\d+", python):
            parser.error(f"--python: expected a version such as 3.12, got {python!r}")
    for torch in known.torch or ():
        if not re.fullmatch(r"\d+(\.\d+)+|newest|none", torch):
            parser.error(f'--torch: expected a version such as 2.10.0, "newest" or "none", got {torch!r}')
    return known


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    tests = options.tests or (FULL_TESTS if options.full else SHORT_TESTS)
    rows: list[Row] = []
    for environment in choose(options.python, options.torch, options.full):
        with tempfile.TemporaryDirectory(prefix="fastgen-environment-") as temporary:
            folder = (options.keep.resolve() if options.keep else Path(temporary)) / environment.folder
            folder.parent.mkdir(parents=True, exist_ok=True)
            rows += Checker(environment, options.wheel.resolve(), folder, tests).check()
    print(table(rows))
    counts = [sum(row.result == result for row in rows) for result in (PASSED, FAILED, NOT_CHECKED)]
    print("{} passed, {} failed, {} not checked".format(*counts))
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
