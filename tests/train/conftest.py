"""What the tests of training share. Without the extras of ``fastgen[train]`` they are left out."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgen.cli import main
from fastgen.models import MODELS
from tests.extras import MISSING

collect_ignore_glob = ["test_*.py"] if MISSING else []

GAN = ["--model.width", "4", "--model.latent-dim", "8", "--batch-size", "32"]
DENSE = ["--model.width", "8", "--model.depth", "1", "--batch-size", "32"]
TINY: dict[str, list[str]] = {
    "gan": [*DENSE, "--model.latent-dim", "8"],
    "cgan": [*DENSE, "--model.latent-dim", "8"],
    "dcgan": GAN,
    "cdcgan": GAN,
    "sagan": ["--model.width", "8", "--model.latent-dim", "8", "--batch-size", "32"],
    "attention-gan": GAN,
    "stylegan": ["--model.width", "4", "--model.style-dim", "8", "--batch-size", "16"],
    "transgan": ["--model.width", "4", "--batch-size", "16"],
    "recurrent-gan": ["--model.generator-width", "8", "--model.critic-width", "8", "--batch-size", "8"],
    "cyclegan": ["--model.width", "4", "--model.blocks", "1", "--model.patch-width", "4", "--batch-size", "4"],
    "pix2pix": ["--model.width", "4", "--model.patch-width", "4", "--batch-size", "8"],
    "vae": DENSE,
    "conv-vae": ["--model.width", "4", "--model.hidden-dim", "16", "--batch-size", "32"],
    "cvae": DENSE,
    "flow-vae": [*DENSE, "--model.flow-width", "8", "--model.flows", "1"],
    "vq-vae": ["--model.width", "4", "--model.codebook-size", "16", "--model.prior-width", "16", "--batch-size", "32"],
    "transformer-lm": [
        *("--model.width", "16", "--model.depth", "1", "--model.num-heads", "2", "--model.context", "16"),
        *("--batch-size", "8", "--evaluate-every", "1000000"),
    ],
    "seq2seq": [
        *("--model.width", "16", "--model.num-heads", "2", "--model.encoder-depth", "1", "--model.decoder-depth", "1"),
        *("--batch-size", "8"),
    ],
    "image-transformer": ["--model.width", "16", "--model.depth", "1", "--model.num-heads", "2", "--batch-size", "8"],
    "wavenet": ["--model.channels", "4", "--model.skip-channels", "8", "--model.cycle", "3", "--batch-size", "4"],
}
"""Options of models that take a few milliseconds a step."""

Main = Callable[..., int]


def pytest_report_header() -> str | None:
    return f"training tests left out, missing: {', '.join(MISSING)}" if MISSING else None


@pytest.fixture
def pages() -> None:
    """For tests that look at curves and report, which take more time than all else: others go without."""


@pytest.fixture(autouse=True)
def _without_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pages" not in request.fixturenames:
        from fastgen.train.loop import Trainer

        monkeypatch.setattr(Trainer, "write_pages", lambda self: None)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 of the digits, as a user's file."""
    from sklearn.datasets import load_digits

    path = tmp_path_factory.mktemp("data") / "digits.npz"
    some = load_digits()
    np.savez(path, images=(some.images[:200] * 15).astype(np.uint8), labels=some.target[:200])
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text, as a user's file."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number**2}.\n" for number in range(400)))
    return path


@pytest.fixture
def words(digits: Path, text: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command that trains a tiny model in ``tmp_path / name``."""

    def words(*options: str, model: str = "conv-vae", name: str = "run", steps: int = 8) -> list[str]:
        command = ["train", model, "--out", str(tmp_path / name), "--steps", str(steps), *options]
        if "--resume" in options:
            return command
        kept = {"images": [str(digits)], "text": [str(text)], "sequences": ["reversal", "--items", "100"]}
        kept |= {"audio": ["tones", "--items", "40", "--seconds", "0.05"]}
        kept |= {kind: [name, "--items", "80"] for kind, name in (("domains", "textures"), ("pairs", "photos"))}
        given = [] if "--data" in options else ["--data", *kept[MODELS[model].kind]]
        return command + given + TINY[model]

    return words


@pytest.fixture
def fit(words: Callable[..., list[str]]) -> Main:
    """Run that command; gives the exit code."""
    return lambda *options, **which: main(words(*options, **which))


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """The one line that a failed command left on stderr."""

    def error_line() -> str:
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("fastgen: ")
        return lines[0]

    return error_line


@pytest.fixture
def metrics() -> Callable[..., list[dict[str, Any]]]:
    """The lines of a run's metrics.jsonl, of one part."""

    def metrics(folder: Path, part: str = "train") -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["part"] == part]

    return metrics


@pytest.fixture
def same_tensors() -> Callable[[Path, Path], bool]:
    """Whether two runs' checkpoints hold the same bits."""

    def same_tensors(a: Path, b: Path) -> bool:
        from fastgen.train.checkpoint import load_checkpoint

        left, right = (load_checkpoint(path / "checkpoint.safetensors")[1] for path in (a, b))
        return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)

    return same_tensors


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., ForkServerProcess]:
    """Start a command in a process of its own; what it prints is added to ``tmp_path / "output"``."""

    def start(words: Sequence[str], **environment: str) -> ForkServerProcess:
        from tests.train import processes

        output = str(tmp_path / "output")
        process = processes.context().Process(target=processes.run_command, args=(list(words), environment, output))
        process.start()
        return process

    return start


@pytest.fixture
def together(start: Callable[..., ForkServerProcess], tmp_path: Path) -> Callable[..., list[int | None]]:
    """Run a command in several processes, as torchrun would; their exit codes."""

    def together(words: Sequence[str], processes: int = 2) -> list[int | None]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": port}
        shared |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        started = [start(words, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(processes)]
        for process in started:
            process.join(timeout=120)
        alive = [process for process in started if process.exitcode is None]
        for process in alive:
            process.kill()
        assert not alive, (tmp_path / "output").read_text()
        return [process.exitcode for process in started]

    return together
