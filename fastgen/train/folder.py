"""A run's folder: which files it holds, and whose they are."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastgen.train.files import cannot_write, temporary_name, write_whole

FORMAT = "fastgen-run"
EXHIBIT = re.compile(r"\d{6,}\.(png|txt|wav)")
STEP_DIGITS = 6


@dataclass(frozen=True)
class RunFolder:
    """``environment.json`` is written first, so a folder without it was not made by fastgen."""

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
        """All that have fixed names; the one that tells whose they are goes last."""
        weights = [self.pretrained / name for name in ("model.safetensors", "config.json", "README.md")]
        pages = [self.curves, self.report, self.evaluation, self.features]
        return [self.checkpoint, self.metrics, *pages, *weights, self.config, self.environment]

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
            ours = json.loads(self.environment.read_text(encoding="utf-8"))["format"] == FORMAT
        except (OSError, KeyError, TypeError, ValueError):
            ours = False
        if not ours:
            name = present[0].relative_to(self.path)
            raise FileExistsError(
                f"{self.path}: expected a new folder or a fastgen run, got a folder with {name} from another program"
            )
        return True

    def clear(self) -> None:
        """Remove a run's files, its exhibits and its event files; all others stay."""
        if not self.path.is_dir():
            return
        for folder in sorted(self.path.iterdir()):
            if folder.is_dir() and not folder.is_symlink():
                for file in folder.iterdir():
                    ours = EXHIBIT.fullmatch(file.name) or file.name.startswith("events.out.tfevents.")
                    if ours and not file.is_dir():
                        file.unlink()
        for file in self._files():
            temporary_name(file).unlink(missing_ok=True)
            file.unlink(missing_ok=True)
        for folder in sorted(self.path.iterdir()):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()

    def begin(
        self, environment: dict[str, Any], config: dict[str, Any], command: str, resumed: dict[str, Any] | None = None
    ) -> None:
        """The first files of a run: whose it is, and what reproduces it.

        Args:
            environment: where it runs; of a resumed run, when and how it began are kept.
            config: its options as the command line takes them.
            command: what trains with them.
            resumed: of a resumed run, its step, its command, and the options that changed: {name: [old, new]}.
        """
        self.path.mkdir(parents=True, exist_ok=True)
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

    def _environment_before(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.environment.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError):
            return {}

    def keep_metrics(self, step: int) -> None:
        """Drop the lines after ``step``, and one that an interruption cut short."""
        kept = []
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (KeyError, TypeError, ValueError):
                continue
        write_whole(self.metrics, "".join(kept).encode())

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append a line, never through a link that somebody put in the file's place.

        JSON has no NaN and no infinity: they become null.
        """
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
    """What was typed to begin the run and to resume it, with the step and the options that changed; [] if not known."""
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
    """Whether nothing is kept of what a resumed run did: it ended before its first checkpoint."""
    return isinstance(turn, dict) and turn.get("step", -1) >= step


def _list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else []
