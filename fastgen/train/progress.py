"""Progress of training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINES = 20
MOST_VALUES = 5
SECONDS_BETWEEN_LINES = 10.0


def short(values: Mapping[str, float]) -> str:
    """ "loss 1.23, kl 0.04": the first few, losses first."""
    names = sorted(values, key=lambda name: (not name.endswith("loss"), name))[:MOST_VALUES]
    return ", ".join(f"{name} {values[name]:.4g}" for name in names)


class Progress:
    """Prints losses, held-out scores, throughput and the time left to stderr: a progress bar on a terminal, elsewhere
    about ``LINES`` lines per run. quiet: print nothing (in all processes but the first)."""

    def __init__(self, total: int, finished: int, epoch_steps: float, *, quiet: bool = False) -> None:
        self.total = total
        self.epoch_steps = epoch_steps
        self.quiet = quiet
        self.losses: dict[str, float] = {}
        self.held_out: dict[str, float] = {}
        self.speed = 0.0
        self.next_line = finished
        self.bar = tqdm(
            total=total, initial=finished, unit="step", dynamic_ncols=True, disable=quiet or not sys.stderr.isatty()
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self) -> None:
        self.bar.update()

    def show(self, step: int, seconds_left: float) -> None:
        """Print the new ``losses``, ``held_out`` and ``speed``, where a line is due."""
        held_out = f"; held out {short(self.held_out)}" if self.held_out else ""
        text = f"{short(self.losses)}{held_out}"
        epoch = step / self.epoch_steps
        if not self.bar.disable:
            self.bar.set_description(f"epoch {epoch:.1f}", refresh=False)
            self.bar.set_postfix_str(f"{self.speed:.0f} items/s, {text}", refresh=False)
        elif not self.quiet and (step >= self.next_line or step == self.total):
            self.next_line = step + max(1, self.total // LINES)
            print(
                f"step {step}/{self.total}, epoch {epoch:.1f}: {text} ({self.speed:.0f} items/s,"
                f" {duration(seconds_left)} left)",
                file=sys.stderr,
                flush=True,
            )


class Stages:
    """Prints the stages of a command to stderr: bars on a terminal, elsewhere a line every few seconds.

    Args:
        name: of the command, first in each line.
        quiet: print nothing.
    """

    def __init__(self, name: str, *, quiet: bool = False) -> None:
        self.name, self.quiet = name, quiet
        self.on_terminal = sys.stderr.isatty()
        self.last_line = time.perf_counter()

    def begin(self, stage: str) -> None:
        """A stage that can't tell how far it is."""
        if self.on_terminal:
            self.note(stage)
        else:
            self._line(stage)

    def note(self, text: str) -> None:
        """Print a line in any case."""
        if not self.quiet:
            self.last_line = time.perf_counter()
            print(f"fastgen: {self.name}: {text}", file=sys.stderr, flush=True)

    def over(self, stage: str, parts: Iterable[T], total: int | None) -> Iterator[T]:
        """The parts of a stage, as they are taken. total: their number, if it is known."""
        bar = tqdm(parts, desc=stage, total=total, leave=False, disable=self.quiet or not self.on_terminal)
        for number, part in enumerate(bar, start=1):
            yield part
            if not self.on_terminal:
                self._line(f"{stage}, {number}{f' of {total}' if total else ''}")

    def _line(self, text: str) -> None:
        if time.perf_counter() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.note(text)


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s, 12 s."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
