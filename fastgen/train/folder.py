"""A run's folder: which files it holds, and whose they are."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fastgen.train.checkpoint import Header
from fastgen.train.files import temporary_name, write_whole
from fastgen.train.progress import Metrics

FORMAT = "fastgen-run"


@dataclass(frozen=True)
class RunFolder:
    """``config.json`` is written first, so a folder without it was not made by fastgen."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    @property
    def reconstructions(self) -> Path:
        return self.path / "reconstructions.png"

    def _files(self) -> list[Path]:
        return [self.checkpoint, self.metrics, self.samples, self.reconstructions, self.config]

    def holds_run(self) -> bool:
        """Whether fastgen made a run here.

        Raises:
            FileExistsError: the path is a file, or holds a file of another program under one of our names.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path}: expected a folder for the run, got a file")
        present = [file for file in self._files() if file.exists()]
        if not present:
            return False
        try:
            ours = json.loads(self.config.read_text(encoding="utf-8"))["format"] == FORMAT
        except (OSError, KeyError, TypeError, ValueError):
            ours = False
        if not ours:
            raise FileExistsError(
                f"{self.path}: expected a new folder or a fastgen run, got a folder with {present[0].name}"
                " from another program"
            )
        return True

    def clear(self) -> None:
        """Remove a run's files; all others stay."""
        for file in self._files():
            temporary_name(file).unlink(missing_ok=True)
            file.unlink(missing_ok=True)

    def write_config(self, header: Header) -> None:
        """The run's settings, for people; ``checkpoint`` has them too, and is what is read."""
        self.path.mkdir(parents=True, exist_ok=True)
        settings = {"format": FORMAT, **asdict(header)}
        write_whole(self.config, (json.dumps(settings, indent=2) + "\n").encode())

    def keep_metrics(self, epoch: int) -> None:
        """Drop the lines after ``epoch``, and one that an interruption cut short."""
        kept = []
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        for line in lines:
            try:
                if json.loads(line)["epoch"] <= epoch:
                    kept.append(line + "\n")
            except (KeyError, TypeError, ValueError):
                continue
        write_whole(self.metrics, "".join(kept).encode())

    def add_metrics(self, metrics: Metrics) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")
            file.flush()
            os.fsync(file.fileno())
