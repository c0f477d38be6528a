"""--config: options from files, which those on the command line win over, and files that are something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgen.cli import main
from fastgen.train.settings import Request

RequestOf = Callable[..., Request]


@pytest.fixture
def request_of(monkeypatch: pytest.MonkeyPatch) -> RequestOf:
    """What ``fastgen train gan`` would train; None where it ended in an error."""

    def request_of(*words: object) -> Any:
        requests: list[Request] = []

        def keep(request: Request) -> None:
            requests.append(request)
            raise RuntimeError

        monkeypatch.setattr("fastgen.cli._train.train", keep)
        main(["train", "gan", *map(str, words)])
        return requests[0] if requests else None

    return request_of


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


FILE = "steps: 30\nflip: true\ndata: blobs\nmodel:\n  width: 7\n  depth: 2\n"


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_options_win_over_a_file_wherever_they_stand(request_of: RequestOf, tmp_path: Path, after: bool) -> None:
    config = ["--config", written(tmp_path / "a.yaml", FILE)]
    options = ["--steps", "5", "--no-flip", "--data=digits", "--model.width", "9", "--out", tmp_path / "mine"]
    request = request_of(*(config + options if after else options + config))
    assert request.train_options == {"steps": 5, "flip": False}
    assert request.data_options == {"source": "digits"}
    assert request.model_options == {"width": 9, "depth": 2}
    assert request.folder.path == tmp_path / "mine"


def test_a_file_wins_over_those_before_it(request_of: RequestOf, tmp_path: Path) -> None:
    a = written(tmp_path / "a.yaml", FILE)
    b = written(tmp_path / "b.yaml", "steps: 40\nmodel.width: 8\nlearning_rate: 1e-3\n")
    assert request_of("--config", a, "--flip", f"--config={b}").train_options == {
        "steps": 40,
        "flip": True,
        "learning_rate": 1e-3,
    }
    assert request_of("--config", b, "--config", a).train_options["steps"] == 30
    assert request_of("--config", a, "--config", b).model_options == {"width": 8, "depth": 2}


@pytest.mark.parametrize("text", ["out: there\n", "resume: true\n", "overwrite: false\n", "epochs: 1\nout: there\n"])
@pytest.mark.parametrize("first", [True, False])
def test_a_config_file_cannot_set_the_output(
    request_of: RequestOf, tmp_path: Path, error_line: Callable[[], str], text: str, first: bool
) -> None:
    config = ["--config", written(tmp_path / "a.yaml", text)]
    typed = ["--out", tmp_path / "here", "--overwrite"]
    assert request_of(*(config + typed if first else typed + config)) is None
    name = text.splitlines()[-1].partition(":")[0]
    assert f"{name}: expected on the command line, not in a file, as it decides where to write" in error_line()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dear secret diary\n", "expected a YAML file of options, such as 'epochs: 3', got other text"),
        ("My secret: 3\n", "expected a YAML file of options, such as 'epochs: 3', got other text in line 1"),
        ("- secret\n", "got other text"),
        ("", "got an empty file"),
        (b"PK\x03\x04secret", "got text that is no YAML"),
        (b"\xff\xfesecret", "got bytes that are no text"),
        (b"#" * 2**20 + b"secret", "got more than 1 MiB"),
        ('{"step": 1, "part": "secret"}\n', "line 1: expected an option of fastgen train gan, got step"),
        ('{"step": 1, "part": "secret"}\n{"step": 2}\n', "got text that is no YAML from line 2 on"),
        ("epochs: 3\nlearning-rate: 7e7\n", "line 2: expected an option of fastgen train gan, got learning-rate"
         " (did you mean learning_rate?)"),
        ("width: 8\n", "got width (did you mean model.width?)"),
        ("model:\n  levels: 8\n", "line 2: expected an option of fastgen train gan, got model.levels"),
        ("config: other.yaml\n", "line 1: expected an option of fastgen train gan, got config"),
        ("epochs: 3\nepochs: 4\n", "line 2: epochs: expected each option once, got this one again"),
        ("model.width: 3\nmodel:\n  depth: 3\n", "line 1: model.width: expected it below model"),
        ("model: 3\n", "line 1: model: expected options by name below it"),
        ("epochs: many\n", "epochs: Expected float. Got value: many"),
        ("flip: maybe\n", "line 1: flip: expected true or false"),
        ("steps:\n", "line 1: steps: expected a value, got nothing"),
        ("schedule: stepwise\n", "schedule: Expected one of constant, linear, cosine. Got value: stepwise"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_named_and_not_repeated(
    request_of: RequestOf, tmp_path: Path, error_line: Callable[[], str], text: str | bytes, message: str
) -> None:
    file = written(tmp_path / "a.yaml", text)
    assert main(["train", "gan", "--config", str(file)]) == 2
    line = error_line()
    assert f"{file}" in line
    assert message in line
    assert "secret" not in line


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path: Path, error_line: Callable[[], str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("epochs: 3\n")
    for words, message in (
        ([tmp_path / "nowhere"], "nowhere: expected a YAML file of options, got a path where there is no file"),
        ([tmp_path / "run"], f"got a folder; a run's options are in {tmp_path / 'run' / 'config.yaml'}"),
        ([], "config: expected a file, got nothing"),
        (["--steps", "3"], "config: expected a file, got --steps"),
    ):
        assert main(["train", "gan", "--config", *map(str, words)]) == 2
        assert message in error_line()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "3"], "--step 3; did you mean --steps?"),
        (["--learning_rate", "3"], "did you mean --learning-rate?"),
        (["--width", "3"], "did you mean --model.width?"),
        (["--conf", "a.yaml"], "did you mean --config?"),
        (["--learning-rate", "fast"], "learning_rate: Expected float or null. Got value: fast"),
        (["--schedule", "stepwise"], "schedule: Expected one of constant, linear, cosine. Got value: stepwise"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistyped_option_gets_a_hint(error_line: Callable[[], str], words: list[str], message: str) -> None:
    assert main(["train", "gan", *words]) == 2
    assert message in error_line()
