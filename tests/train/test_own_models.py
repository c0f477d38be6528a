"""Models in the user's own file: trained, resumed, evaluated and sampled by the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgen.cli import main
from fastgen.train import evaluate
from fastgen.train.engine import Engine
from fastgen.train.settings import same_model

Main = Callable[..., int]
ROOT = Path(__file__).resolve().parents[2]
STEPS = ["--log-every", "1", "--evaluate-every", "4", "--sample-every", "100", "--checkpoint-every", "2"]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """The user's file; what running it adds to the process is removed."""
    path, modules = list(sys.path), set(sys.modules)
    shutil.copy(Path(__file__).with_name("own_model.py"), tmp_path / "mine.py")
    yield tmp_path / "mine.py"
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name in ("mine", "moved", "broken", "fastgen_file_json"):
            del sys.modules[name]


@pytest.fixture
def train(own: Path, digits: Path, tmp_path: Path) -> Main:
    def train(*options: str, name: str = "run", model: str = f"{own}:Mean", steps: int = 4) -> int:
        data = [] if "--resume" in options else ["--data", str(digits), *STEPS]
        return main(["train", model, "--out", str(tmp_path / name), "--steps", str(steps), *data, *options])

    return train


def test_a_model_in_a_file_trains_resumes_bitwise_evaluates_and_samples(
    train: Main,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    same_tensors: Callable[[Path, Path], bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "write_report", lambda folder: None)
    assert train("--model.noise", "0.2", name="straight") == 0
    with monkeypatch.context() as patch:
        advance = Engine.advance

        def stop(self: Engine, *rest: Any) -> None:
            advance(self, *rest)
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(Engine, "advance", stop)
        assert train("--model.noise", "0.2", name="halves") == 130
    assert f"continue with: fastgen train {own}:Mean --out" in capsys.readouterr().err
    moved = own.rename(own.with_name("moved.py"))
    assert train("--resume", name="halves", model=f"{moved}:Mean") == 0
    assert same_tensors(tmp_path / "straight", tmp_path / "halves")
    run = tmp_path / "halves"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model"] == {"noise": 0.2}
    assert json.loads((run / "model" / "config.json").read_text())["model_type"] == "mean"
    assert main(["evaluate", str(run), "--features", "none", "--model", f"{moved}:Mean"]) == 0
    assert "squared error" in capsys.readouterr().out
    outputs = [tmp_path / f"{name}.png" for name in "ab"]
    for out in outputs:
        assert main(["sample", str(run), f"--model={moved}:Mean", "--n", "3", "--out", str(out)]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert main(["models", f"{moved}:Mean"]) == 0
    assert "--model.noise" in capsys.readouterr().out


def test_the_file_that_a_run_recorded_is_never_run_on_its_own_account(
    train: Main, own: Path, tmp_path: Path, error_line: Callable[[], str]
) -> None:
    assert train(steps=1) == 0
    error_line_of = lambda words: (main(words), error_line())  # noqa: E731
    own.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    run = str(tmp_path / "run")
    for words in (["sample", run], ["evaluate", run], ["train", "vae", "--resume", "--out", run]):
        code, line = error_line_of(words)
        assert code == 2
        assert f"model: expected {own}:Mean, as in the run, got none" in line
    assert not (tmp_path / "ran").exists()


def test_another_model_than_that_of_the_run_is_rejected(
    train: Main, fit: Main, own: Path, tmp_path: Path, error_line: Callable[[], str]
) -> None:
    assert fit(model="vae", name="registered", steps=1) == 0
    assert main(["sample", str(tmp_path / "registered"), "--model", f"{own}:Mean"]) == 2
    assert "model: expected vae, as in the run, got Mean" in error_line()
    assert train("--resume", name="registered") == 2
    assert "model: expected vae, as in the run, got Mean" in error_line()
    assert same_model("vae", "vae")
    assert same_model("a/b.py:Mean", "b.py:Mean")
    assert not same_model("b.py:Mean", "Mean")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{own}", "a class of your own is named path/to/file.py:MyModel"),
        ("{own}:", "expected a subclass of GenerativeModel in {own} (Mean, NoName), got ''"),
        ("{own}:mean", "expected a subclass of GenerativeModel in {own} (Mean, NoName), got 'mean'"),
        ("{own}:NoName", "NoName: expected a class attribute 'name', got none"),
        ("{folder}/nowhere.py:Mean", "nowhere.py: expected a Python file with a model, got a path where"),
        ("{folder}/broken.py:Mean", "broken.py: expected a Python file with a model, got ZeroDivisionError: "),
        ("{folder}/json.py:Mean", "json.py (none), got 'Mean'"),
    ],
)
def test_mistakes_in_the_name_of_a_file_are_named(
    own: Path, tmp_path: Path, error_line: Callable[[], str], model: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "json.py").write_text("from fastgen.models import VAE as Mean\n")
    before = sys.modules["json"]
    code = main(["train", model.format(own=own, folder=tmp_path), "--out", str(tmp_path / "run")])
    assert code == (1 if "broken" in model else 2)
    assert message.format(own=own) in error_line()
    assert sys.modules["json"] is before
    assert not (tmp_path / "run").exists()


def test_a_model_without_default_data_needs_a_source(train: Main, own: Path, error_line: Callable[[], str]) -> None:
    assert main(["train", f"{own}:Mean", "--out", str(own.with_name("run"))]) == 2
    assert "source: expected a bundled dataset, a path or hf:NAME, got an empty string" in error_line()


def test_a_renamed_option_of_a_model_in_a_file_is_read_from_its_runs(train: Main, own: Path) -> None:
    assert train("--model.noise", "0.2", steps=2) == 0
    text = own.read_text().replace("noise", "jitter")
    marker = "@dataclass(frozen=True)\n"
    head, config = text.split(marker, 1)
    line, rest = config.split("\n", 1)
    own.write_text(f'{head}{marker}{line}\n    renamed = {{"noise": "jitter"}}\n{rest}')
    sys.modules.pop("mine", None)
    assert train("--resume", steps=3) == 0
