"""How long a run takes: seconds of its parts as measured, and what is left of each."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastgen.train.progress import duration

STEP = "step"
NAMES: Mapping[str, str] = {"evaluate": "evaluations", "sample": "samples", "checkpoint": "checkpoints"}
GIB = 2**30


class Costs:
    """Seconds of a step, an evaluation, drawing samples and a checkpoint: the last one measured.

    Args:
        total: number of steps of the run.
        every: steps between two of each other part; the last step has one of each, too.
    """

    def __init__(self, total: int, every: Mapping[str, int]) -> None:
        self.total, self.every = total, dict(every)
        self.seconds: dict[str, float] = {}

    def due(self, part: str, step: int) -> int:
        """How often a part is still due after a step. Other parts than steps are counted with those of this step."""
        if part == STEP:
            return self.total - step
        every = self.every[part]
        return -(-self.total // every) - max(0, step - 1) // every

    def left(self, step: int) -> dict[str, float]:
        """Seconds that are left after a step, by part, as ``due``; parts that were not measured are left out."""
        return {part: self.due(part, step) * each for part, each in self.seconds.items()}

    def sentence(self, step: int) -> str:
        """ "about 15 min: 12,000 steps of 72 ms, 20 evaluations 9 s, 20 samples 12 s"."""
        left = self.left(step)
        words = [f"{self.due(STEP, step):,} steps of {milliseconds(self.seconds[STEP])}"]
        words += [f"{self.due(part, step)} {NAMES[part]} {duration(left[part])}" for part in NAMES if part in left]
        return f"about {duration(sum(left.values()))}: {', '.join(words)}"


@dataclass(frozen=True)
class Plan:
    """What a run would do: for ``--dry-run``.

    Attributes:
        sentence: its time.
        memory: bytes at most in the steps that were timed: of the process on a CPU, allocated on a GPU.
    """

    parameters: int
    steps: int
    training_items: int
    held_out_items: int
    sentence: str
    memory: int
    device: str
    threads: int

    def __str__(self) -> str:
        on = f"{self.device}, {self.threads} thread{'s' * (self.threads != 1)}" if self.device == "cpu" else self.device
        return "\n".join(
            (
                f"parameters  {self.parameters:,}",
                f"data        {self.training_items:,} items to train on, {self.held_out_items:,} held out",
                f"memory      {self.memory / GIB:.1f} GiB ({'process' if self.device == 'cpu' else 'GPU'})",
                f"time        {self.sentence} ({on})",
            )
        )


def milliseconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: allocated on a GPU, of this process on a CPU; 0 where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
