"""How to train: the options that every model shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastgen.checks import require_positive
from fastgen.models import option

Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["float32", "bfloat16", "float16"]
Strategy = Literal["ddp", "fsdp"]

FREE_ON_RESUME = (
    "epochs",
    "steps",
    "learning_rate",
    "threads",
    "workers",
    "device",
    "nan_limit",
    "log_every",
    "evaluate_every",
    "sample_every",
    "checkpoint_every",
    "trackers",
)
"""Options that may change when a run goes on. Two touch what a step computes: the learning rate, and, where it has a
schedule, which is stretched, epochs and steps."""

COUNTS = (
    *("batch_size", "accumulate", "nan_limit", "log_every", "steps", "warmup", "threads", "workers"),
    *("evaluate_every", "sample_every", "checkpoint_every"),
)
MOST = {"threads": 1024, "workers": 1024}
MOST_STEPS = 2**53
"""The largest numbers: of threads and processes more than machines have, of all else more than a run can come to."""

PARTS_OF_A_RUN, LEAST_STEPS = 20, 10
"""Evaluations, samples and checkpoints in a run, and the fewest steps between two, where nobody says otherwise."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. ValueError names the field, what was expected and what came."""

    epochs: float = option(50.0, "passes over the training items")
    steps: int = option(0, "steps; 0: as many as the epochs take")
    batch_size: int = option(64, "items per step, over all processes")
    accumulate: int = option(1, "parts that a process cuts its share of a batch into, to save memory")
    learning_rate: float | None = option(None, "of every optimiser; by default the model's own")
    schedule: Schedule = option("constant", "of the learning rate, down to 0 at the last step")
    warmup: int = option(0, "steps over which the learning rate grows from 0")
    clip: float = option(0.0, "largest norm of a gradient; 0: any")
    average_decay: float = option(0.999, "of the running average of the weights")
    precision: Precision = option("float32", "bfloat16 and float16: mixed precision")
    compile: bool = option(False, "torch.compile the networks")
    strategy: Strategy = option("ddp", "with several processes; fsdp shards the weights of a Transformer")
    flip: bool = option(False, "mirror each training picture with probability 1/2")
    seed: int = option(0, "of initial weights, data order and noise")
    threads: int = option(0, "on the CPU; 0: torch's choice, or one where steps are tiny")
    workers: int = option(2, "processes that decode data which do not fit into memory")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    nan_limit: int = option(20, "stop after this many steps in a row whose gradient is NaN or infinite")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    evaluate_every: int = option(0, f"steps between evaluations; 0: {PARTS_OF_A_RUN} times in a run")
    sample_every: int = option(0, f"steps between pictures; 0: {PARTS_OF_A_RUN} times in a run")
    checkpoint_every: int = option(0, f"steps between checkpoints; 0: {PARTS_OF_A_RUN} times in a run")
    trackers: str = option("", "tensorboard, or others that accelerate knows, with commas between")

    def __post_init__(self) -> None:
        for name in COUNTS:
            value, most = getattr(self, name), MOST.get(name, MOST_STEPS)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
            if value > most:
                raise ValueError(f"{name}: expected at most {most}, got {value}")
        for name in ("batch_size", "accumulate", "nan_limit", "log_every"):
            require_positive(name, getattr(self, name))
        for name in ("steps", "warmup", "threads", "workers", "evaluate_every", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs: expected a positive number, got {self.epochs}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not 0 <= self.clip < math.inf:
            raise ValueError(f"clip: expected a number >= 0, got {self.clip}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay: expected a number in [0, 1), got {self.average_decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1, got {self.seed}")
        for name, kind in (("schedule", Schedule), ("precision", Precision), ("strategy", Strategy)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    def total_steps(self, items: int, batches_per_step: int) -> int:
        """Steps of the run, over ``items`` training items."""
        total = self.steps or max(1, math.ceil(self.epochs * items / (self.batch_size * batches_per_step)))
        if total > MOST_STEPS:
            raise ValueError(f"epochs: expected at most {MOST_STEPS} steps, got {self.epochs:g} epochs")
        return total

    def every(self, what: str, total: int) -> int:
        """Steps between two of ``what``: "evaluate", "sample" or "checkpoint"."""
        return int(getattr(self, f"{what}_every")) or max(LEAST_STEPS, total // PARTS_OF_A_RUN)

    def rate(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in a step, 1 .. total."""
        warm = min(1.0, step / (self.warmup + 1))
        left = 1 - (step - 1) / total
        if self.schedule == "linear":
            return warm * left
        if self.schedule == "cosine":
            return warm * 0.5 * (1 - math.cos(math.pi * left))
        return warm
