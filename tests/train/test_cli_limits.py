"""Every integer option of the command line at 0, -1 and huge: it works, or one line names what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from fastgen.cli import main
from fastgen.data import DataConfig
from fastgen.models import MODELS, from_data
from fastgen.train import limits
from fastgen.train.config import TrainConfig
from fastgen.train.evaluate import EvaluateConfig

Main = Callable[..., int]


def integers(config: type, without: list[str] = []) -> list[str]:  # noqa: B006
    """Names of the options that take integers."""
    types = get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config) if field.name not in without]
    return [name for name in names if types[name] is int or int in get_args(types[name])]


OF_MODELS = sorted(
    {
        (name, option)
        for name, model in MODELS.items()
        for option in integers(model.config_class, from_data(model.config_class))
    },
    key=lambda pair: (pair[1], pair[0]),
)
"""One model for each option."""
FIRST = list({option: (model, option) for model, option in reversed(OF_MODELS)}.values())


def dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


class Began(Exception):
    pass


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line in which a command ends that is refused before training begins; "" where it began."""

    def began(*rest: object, **options: object) -> None:
        raise Began

    monkeypatch.setattr("fastgen.train.run.Engine", began)
    monkeypatch.setattr(limits, "memory", lambda device: 2**30)  # whatever the machine has
    monkeypatch.setattr("fastgen.cli._evaluate.evaluate", began)

    def ends(*words: str) -> str:
        code = main(list(words))
        line = capsys.readouterr().err.strip()
        assert len(line.splitlines()) == 1
        if "Began" in line:
            return ""
        assert code == 2 or "expected a text with" in line, line
        assert len(line) < 600
        return line

    return ends


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30])
def test_integer_options_of_training_at_their_extremes(
    ends: Callable[..., str], digits: Path, tmp_path: Path, value: int
) -> None:
    given = ["train", "vae", "--model.width", "4", "--data", str(digits), "--out", str(tmp_path / "run")]
    for name in [*integers(TrainConfig), "held_out"]:
        line = ends(*given, dashed(name), str(value))
        assert line == "" or f"error: {name}: expected" in line or f"processes x {name}" in line
        if value in (-1, 10**30) or (value == 10**9 and name in ("threads", "workers", "batch_size")):
            assert line, name


@pytest.mark.parametrize(("model", "name"), FIRST, ids=lambda value: value)
def test_integer_options_of_models_at_their_extremes(
    ends: Callable[..., str], words: Callable[..., list[str]], model: str, name: str
) -> None:
    for value in (0, -1, 10**9, 10**30):
        line = ends(*words(model=model, steps=1), dashed(f"model.{name}").replace("---", "--"), str(value))
        assert "out of memory" not in line
        if value == 10**30:
            assert f"model.{name}: expected an integer from -2^63 to 2^63 - 1" in line


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30])
def test_integer_options_of_evaluation_at_their_extremes(ends: Callable[..., str], value: int) -> None:
    for name in integers(EvaluateConfig):
        line = ends("evaluate", "nowhere", dashed(name), str(value))
        assert line == "" or f"error: {name}: expected" in line
        if value in (-1, 10**30) or (value == 10**9 and name != "seed"):
            assert line, name


def test_integer_options_of_data_at_their_extremes(capsys: pytest.CaptureFixture[str]) -> None:
    for name in integers(DataConfig):
        for value in (-1, 10**30):
            assert main(["data", "digits", dashed(name), str(value)]) == 2
            assert f"error: {name}: expected" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["conv-vae", "transformer-lm", "cgan", "seq2seq", "wavenet", "stylegan"])
def test_a_mistake_in_an_option_of_sampling_is_one_of_usage(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert fit(model=model, steps=1) == 0
    capsys.readouterr()  # what was chosen for the data
    wrong = {
        "conv-vae": [("--n", "0"), ("--n", "1000000000"), ("--n", str(10**30)), ("--seed", "-1"), ("--device", "meta")],
        "transformer-lm": [
            ("--temperature", "-1"),
            ("--length", "0"),
            ("--top-k", "-1"),
            ("--top-p", "2"),
            ("--top-p", "nan"),
        ],
        "cgan": [("--label", "-2"), ("--label", "10"), ("--label", str(10**30))],
        "seq2seq": [("--num-beams", "0"), ("--temperature", "nan")],
        "wavenet": [("--seconds", "-1"), ("--temperature", "inf")],
        "stylegan": [("--truncation", "nan")],
    }
    error_line_of = error_line
    for option, value in wrong[model]:
        assert main(["sample", str(tmp_path / "run"), option, value]) == 2, (option, value)
        assert option[2:].replace("-", "_") in error_line_of()


@pytest.mark.parametrize("device", ["meta", "abacus", "cpu:1", "cuda:99", "", "gpu"])
def test_a_device_that_can_t_compute_is_named(
    ends: Callable[..., str], digits: Path, tmp_path: Path, device: str
) -> None:
    line = ends("train", "vae", "--data", str(digits), "--out", str(tmp_path / "run"), f"--device={device}")
    assert f"device: expected one that this machine has, got {device!r}" in line


def test_a_model_and_a_batch_beyond_memory_are_refused_before_they_are_made(
    ends: Callable[..., str], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "memory", lambda device: 2**30)
    given = ["train", "vae", "--data", str(digits), "--out", str(tmp_path / "run")]
    assert "model: expected weights that fit into 1.0 GiB" in ends(*given, "--model.width", "20000")
    assert ends(*given, "--model.width", "2000") == ""
    assert "batch_size: expected a batch that fits into 1.0 GiB" in ends(*given, "--batch-size", "100000000")
    assert ends(*given, "--batch-size", "100000000", "--accumulate", "1000000") == ""
    assert "model.depth: expected at most 1000" in ends(*given, "--model.depth", "1001")


def test_running_out_of_memory_is_reported_in_one_line(
    fit: Main, monkeypatch: pytest.MonkeyPatch, error_line: Callable[[], str]
) -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto allocate 9 bytes"),
    ):

        def fail(request: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("fastgen.cli._train.train", fail)
        assert fit() == 1
        assert "fastgen: error: out of memory; fewer items, a smaller model" in error_line()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("dcgan", "got 18: --image-size 16 or 20 resizes and crops the images"),
        ("vq-vae", "got 18: --image-size 16 or 20 resizes and crops the images"),
        ("cvae", "got 0: the data have no labels, which are subfolders, one for each class, or an array, a column or"),
    ],
)
def test_what_would_make_the_data_fit_is_named(
    tmp_path: Path, ends: Callable[..., str], model: str, expected: str
) -> None:
    np.savez(tmp_path / "a.npz", images=np.arange(20 * 18 * 18, dtype=np.uint8).reshape(20, 18, 18))
    assert expected in ends("train", model, "--data", str(tmp_path / "a.npz"), "--out", str(tmp_path / "run"))
