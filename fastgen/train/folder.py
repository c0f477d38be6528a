"""A run's folder: its files, and whether fastgen wrote them."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastgen.data._files import cannot_read, read_bytes, what_is_at
from fastgen.train.files import cannot_write, make_folder, remove_leftovers, write_whole

FORMAT = "fastgen-run"
SAMPLE_FILE = re.compile(r"\d{6,}\.(png|txt|wav)")
STEP_DIGITS = 6


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run. ``environment.json`` is written first: a folder without it was not made by fastgen."""

    path: Path

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def features(self) -> Path:
        return self.path / "features.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def pretrained(self) -> Path:
        return self.path / "model"

    def _files(self) -> list[Path]:
        """All files with fixed names; the one that identifies a run is last."""
        weights = [self.pretrained / name for name in ("model.safetensors", "config.json", "README.md")]
        pages = [self.curves, self.report, self.evaluation, self.features]
        return [self.checkpoint, self.metrics, *pages, *weights, self.config, self.environment]

    def holds_run(self) -> bool:
        """Whether the folder holds a run of fastgen.

        Raises:
            FileExistsError: the path is a file, or holds another program's file under one of these names.
            ValueError: environment.json is damaged. OSError: it can't be read.
        """
        try:
            if os.path.lexists(self.path) and not self.path.is_dir():
                raise FileExistsError(f"{self.path}: expected a folder for the run, got {what_is_at(self.path)}")
            present = [file for file in self._files() if file.exists()]
        except PermissionError as error:
            raise cannot_read(self.path, error) from error
        if not present:
            return False
        if not self.environment.exists():
            raise self._another_programs(present[0])
        try:
            environment = json.loads(read_bytes(self.environment))
        except ValueError as error:
            raise ValueError(
                f"{self.environment}: expected the environment of a fastgen run, got a damaged file: {error}"
            ) from error
        if not isinstance(environment, dict) or environment.get("format") != FORMAT:
            raise self._another_programs(present[0])
        return True

    def _another_programs(self, file: Path) -> FileExistsError:
        name = file.relative_to(self.path)
        return FileExistsError(
            f"{self.path}: expected a new folder or a fastgen run, got a folder with {name} from another program"
        )

    def _remove_leftovers(self) -> None:
        names = {file.name for file in self._files()} | {"saving"}  # the last: save_pretrained
        for folder in (self.path, *self.path.iterdir()):
            if folder.is_dir() and not (folder.is_symlink() and folder != self.path):
                remove_leftovers(folder, lambda name: name in names or SAMPLE_FILE.fullmatch(name))

    def clear(self) -> None:
        """Remove a run's files, its samples and its event files, and nothing else."""
        if not self.path.is_dir():
            return
        for folder in sorted(self.path.iterdir()):
            if folder.is_dir() and not folder.is_symlink():
                for file in folder.iterdir():
                    ours = SAMPLE_FILE.fullmatch(file.name) or file.name.startswith("events.out.tfevents.")
                    if ours and not file.is_dir():
                        file.unlink()
        self._remove_leftovers()
        for file in self._files():
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(file, error) from error
        for folder in sorted(self.path.iterdir()):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()

    def begin(
        self, environment: dict[str, Any], config: dict[str, Any], command: str, resumed: dict[str, Any] | None = None
    ) -> None:
        """Write the first files of a run: its environment, and its options.

        Args:
            environment: versions, devices, ...; a resumed run keeps the start and command of its first training.
            config: its options as the command line takes them.
            command: the command that trains with them.
            resumed: for a resumed run, its step, command, and the options that changed: {name: [old, new]}.
        """
        make_folder(self.path)
        self._remove_leftovers()
        history: list[Any] = []
        if resumed is not None:
            before = self._environment_before()
            history = [turn for turn in _list(before.get("resumed")) if not _lost(turn, resumed["step"])]
            history.append({"started": environment["started"], **resumed})
            environment |= {name: before[name] for name in ("started", "command") if name in before}
            environment["resumed"] = history
        write_whole(self.environment, (json.dumps({"format": FORMAT, **environment}, indent=2) + "\n").encode())
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        notes = "".join(f"# {note}\n" for turn in history for note in changes(turn))
        write_whole(self.config, f"# {command}\n{notes}{text}".encode())

    def classes(self) -> list[str]:
        """Names of the classes of the data; [] where there are none, and in runs of earlier versions."""
        return [str(name) for name in _list(self._environment_before().get("classes"))]

    def _environment_before(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.environment.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError):
            return {}

    def keep_metrics(self, step: int) -> None:
        """Drop the lines after ``step``, and a truncated last line.

        Warns of other unreadable lines, which are dropped, too.
        """
        kept = []
        lines = read_bytes(self.metrics).split(b"\n") if self.metrics.exists() else []
        damaged = 0
        for number, line in enumerate(lines, start=1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (KeyError, RecursionError, TypeError, ValueError):
                damaged += bool(line.strip(b"\r\0 ")) and number < len(lines)
        if damaged:
            warnings.warn(f"{self.metrics}: {damaged} damaged lines were left out", stacklevel=2)
        write_whole(self.metrics, b"".join(kept))

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append a line, never through a symbolic link. NaN and infinity, which JSON lacks, become null."""
        values = {name: value if math.isfinite(value) else None for name, value in row["values"].items()}
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            with open(os.open(self.metrics, flags, 0o644), "a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"values": values}) + "\n")
        except OSError as error:
            raise cannot_write(self.metrics, error) from error


def changes(turn: Any) -> list[str]:
    """A line for each option that changed where a run was resumed, from an entry of "resumed" in environment.json."""
    changed = turn.get("changed") if isinstance(turn, dict) else None
    lines = []
    for name, values in changed.items() if isinstance(changed, dict) else ():
        old, new = ("its default" if value is None else value for value in values)
        lines.append(f"step {turn.get('step')}: {name} changed from {old} to {new}".replace("\n", " "))
    return lines


def story(environment: Mapping[str, Any]) -> list[str]:
    """The commands that started and resumed the run, with the step and the options that changed; [] if not known."""
    began = environment.get("command")
    turns = [turn for turn in _list(environment.get("resumed")) if isinstance(turn, Mapping)]
    if not isinstance(began, str) or not began:
        return []
    lines = [began]
    for turn in turns:
        lines += [f"# resumed at step {turn.get('step')}", *(f"# {note}" for note in changes(turn))]
        lines += [str(turn["command"])] if turn.get("command") else []
    return lines


def _lost(turn: Any, step: int) -> bool:
    """Whether a resumed training ended before its first checkpoint, so that nothing of it is left."""
    return isinstance(turn, dict) and turn.get("step", -1) >= step


def _list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else []
