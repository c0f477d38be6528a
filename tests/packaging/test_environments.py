"""The matrix of environments: what it chooses, what it reports, and that a broken wheel fails it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "check_environments.py"
spec = importlib.util.spec_from_file_location("check_environments", SCRIPT)
matrix = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = matrix
spec.loader.exec_module(matrix)

ABSENT = "3.99"


def make_wheel(folder: Path, source: str) -> Path:
    """A wheel of a package fastgen that is one line long."""
    wheel, info = folder / "fastgen-0.0.1-py3-none-any.whl", "fastgen-0.0.1.dist-info"
    files = {
        "fastgen/__init__.py": source,
        "fastgen/__main__.py": "import fastgen\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: fastgen\nVersion: 0.0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nfastgen = fastgen:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "WHEEL"),
        (["nowhere.whl"], "WHEEL: expected a wheel file, got nowhere.whl"),
        ([str(SCRIPT)], "WHEEL: expected a wheel file"),
        (["--python", "python3"], "--python: expected a version such as 3.12, got 'python3'"),
        (["--tests", "tests/nowhere"], "--tests: expected a path in the repository, got tests/nowhere"),
        (["--torch", "latest"], '--torch: expected a version such as 2.10.0, "newest" or "none", got \'latest\''),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(given, message, tmp_path, capsys):
    if given and given[0].startswith("--"):
        given = [str(make_wheel(tmp_path, "")), *given]
    with pytest.raises(SystemExit) as left:
        matrix.arguments(given)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_the_short_form_has_one_other_python_and_the_full_form_all(monkeypatch):
    monkeypatch.setattr(matrix, "current_torch", lambda: "2.13.0")
    monkeypatch.setattr(matrix, "find_python", lambda version: f"/usr/bin/python{version}")
    short = matrix.choose(None, None, full=False)
    assert len({e.python for e in short}) == 2
    assert {e.torch for e in short} == {None, "2.13.0"}
    full = matrix.choose(None, None, full=True)
    assert {e.python for e in full if e.torch == "2.13.0"} == set(matrix.PYTHONS)
    assert {e.torch for e in full} == {None, *matrix.TORCHES}
    assert any(e.extra == "train" for e in full)
    assert len({e.folder for e in full}) == len(full)
    assert matrix.choose(["3.10"], ["none", "2.11.0"], False) == [
        matrix.Environment("3.10", None),
        matrix.Environment("3.10", "2.11.0"),
    ]


def test_libraries_of_a_wheel_are_found_with_and_without_a_python_tag(tmp_path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("_cpu.so", "_cuda.cpython-311-x86_64-linux-gnu.so", "cli.py", "nn/_other.so"):
            archive.writestr(f"fastgen/{name}", "")
    assert set(matrix.library_files(wheel)) == {"_cpu", "_cuda"}


def test_the_table_names_an_environment_once_and_a_failure_sets_the_exit_status():
    rows = [
        matrix.Row("Python 3.10, no torch", "install", matrix.PASSED, "fastgen.whl"),
        matrix.Row("Python 3.10, no torch", "import", matrix.FAILED, "no error"),
        matrix.Row("Python 3.14, no torch", "interpreter", matrix.NOT_CHECKED, "python3.14 was not found"),
    ]
    lines = matrix.table(rows).splitlines()
    assert [line.startswith("Python") for line in lines] == [True, False, True]
    assert lines[1].split() == ["import", "failed", "no", "error"]
    assert matrix.exit_status(rows) == 1
    assert matrix.exit_status([rows[0], rows[2]]) == 0
    assert matrix.exit_status([rows[2]]) == 1, "a run that checked nothing has not passed"


def test_an_interpreter_that_is_missing_is_not_checked_and_does_not_pass(tmp_path, capsys):
    wheel = make_wheel(tmp_path, "import torch\n")
    written = tmp_path / "rows.json"
    assert matrix.main([str(wheel), "--python", ABSENT, "--torch", "none", "--json", str(written)]) == 1
    assert "0 passed, 0 failed, 1 not checked" in capsys.readouterr().out
    (row,) = json.loads(written.read_text())
    assert (row["check"], row["result"]) == ("interpreter", "not checked")


def test_a_wheel_that_breaks_its_promises_fails_in_a_clean_environment(tmp_path, capsys, monkeypatch):
    """A real virtual environment without torch. The package imports without it, and leaves a file in its folder."""
    ask = matrix.Checker.pip  # the upgrade of pip would ask the index
    monkeypatch.setattr(matrix.Checker, "pip", lambda self, *a: "" if "--upgrade" in a else ask(self, *a))
    source = "from pathlib import Path\nPath(__file__).with_name('left').touch()\ndef main(): return 0\n"
    wheel, written = make_wheel(tmp_path, source), tmp_path / "rows.json"
    options = ["--python", matrix.THIS_PYTHON, "--torch", "none", "--json", str(written)]
    assert matrix.main([str(wheel), *options]) == 1
    results = {row["check"]: row["result"] for row in json.loads(written.read_text())}
    assert results.pop("environment") == results.pop("install") == "passed", capsys.readouterr().err
    assert results.pop("fastgen --version without torch") == "passed"
    assert set(results.values()) == {"failed"}
    assert {"import fastgen without torch", "fastgen info without torch", "uninstall leaves nothing"} <= set(results)


def test_the_checks_of_an_environment_pass_here_but_for_the_place_of_the_package():
    """In this checkout fastgen is not where a wheel would put it."""
    command = [sys.executable, str(ROOT / "tools" / "environment_checks.py"), "--libraries"]
    present = [path.name.partition(".")[0] for path in (ROOT / "fastgen").glob("_cpu*.so")]
    done = subprocess.run([*command, *present], cwd=ROOT, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[-1] == {"done": True}, done.stderr
    assert [row["check"] for row in rows[:-1] if row["result"] == "failed"] == ["package"], done.stdout
    (cpu,) = [row for row in rows[:-1] if row["check"] == "CPU operators"]
    assert cpu["detail"] == ("12 of 12" if present else "the wheel has no _cpu")
