"""Options of training, shared by all models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastgen.batch import option
from fastgen.checks import require_positive
from fastgen.models.augmentation import parse_augment

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
    "distance_samples",
    "sample_every",
    "checkpoint_every",
    "trackers",
)
"""Options that may change when a run is resumed. Only some affect what a step computes: the learning rate and, as its
schedule is stretched, epochs and steps."""

INTERVALS = ("evaluate_every", "sample_every", "checkpoint_every")
COUNTS = (
    *("batch_size", "accumulate", "nan_limit", "log_every", "steps", "warmup", "threads", "workers"),
    *INTERVALS,
    "distance_samples",
)
MOST = {"threads": 1024, "workers": 1024}
MOST_STEPS = 2**53
"""Upper limits, above what any machine has and any run reaches."""

PARTS_OF_A_RUN, LEAST_STEPS = 20, 10
"""Default number of evaluations, samples and checkpoints in a run, and the fewest steps between two of them."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of the training loop.

    Raises:
        ValueError: an option out of range.
    """

    epochs: float = option(50.0, "passes over the training data; given, they replace a default number of steps")
    steps: int = option(0, "number of training steps; 0: as many as the epochs need")
    batch_size: int = option(64, "batch size, over all processes")
    accumulate: int = option(1, "gradient accumulation: micro-batches per process and step, to save memory")
    learning_rate: float | None = option(None, "learning rate of every optimizer; default: the model's own")
    schedule: Schedule = option("constant", "learning rate schedule; linear and cosine decay to 0 at the last step")
    warmup: int = option(0, "linear warmup of the learning rate, in steps")
    clip: float = option(0.0, "maximum gradient norm; 0: no clipping")
    average_decay: float = option(0.999, "decay of the exponential moving average (EMA) of the weights")
    precision: Precision = option("float32", "training precision; bfloat16 and float16 are mixed precision")
    compile: bool = option(False, "compilation of the networks with torch.compile")
    strategy: Strategy = option("ddp", "strategy for several processes; fsdp shards the weights of a Transformer")
    flip: bool = option(False, "random horizontal flips of training images, with probability 1/2")
    augment: str = option(
        "", "random changes of training images, which samples will show, too: flip, color, translation, cutout"
    )
    init_from: str = option("", "run whose weights and model options training starts from")
    seed: int = option(0, "seed of initial weights, data order and noise")
    threads: int = option(0, "CPU threads; 0: torch's default, or one where steps are tiny")
    workers: int = option(2, "data-loading processes, for data that do not fit into memory")
    device: str = option("auto", "device: cpu, cuda, cuda:1, ...; auto: cuda if available")
    nan_limit: int = option(20, "consecutive steps with a NaN or infinite gradient after which training stops")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    evaluate_every: int = option(0, f"steps between evaluations; 0: {PARTS_OF_A_RUN} evaluations per run")
    distance_samples: int = option(0, "samples for the Frechet distance of each evaluation of images; 0: none")
    sample_every: int = option(0, f"steps between samples; 0: {PARTS_OF_A_RUN} times per run")
    checkpoint_every: int = option(0, f"steps between checkpoints; 0: {PARTS_OF_A_RUN} checkpoints per run")
    trackers: str = option(
        "", "experiment trackers, comma-separated: tensorboard, or any other that accelerate supports"
    )

    def __post_init__(self) -> None:
        for name in COUNTS:
            value, most = getattr(self, name), MOST.get(name, MOST_STEPS)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
            if value > most:
                raise ValueError(f"{name}: expected at most {most}, got {value}")
        for name in ("batch_size", "accumulate", "nan_limit", "log_every"):
            require_positive(name, getattr(self, name))
        for name in ("steps", "warmup", "threads", "workers", *INTERVALS, "distance_samples"):
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
        parse_augment(self.augment)
        for name, kind in (("schedule", Schedule), ("precision", Precision), ("strategy", Strategy)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    def total_steps(self, items: int, batches_per_step: int) -> int:
        """Total steps of a run over ``items`` training items."""
        total = self.steps or max(1, math.ceil(self.epochs * items / (self.batch_size * batches_per_step)))
        if total > MOST_STEPS:
            raise ValueError(f"epochs: expected at most {MOST_STEPS} steps, got {self.epochs:g} epochs")
        return total

    def every(self, what: str, total: int) -> int:
        """Steps between two of ``what``: "evaluate", "sample" or "checkpoint"."""
        return int(getattr(self, f"{what}_every")) or max(LEAST_STEPS, total // PARTS_OF_A_RUN)

    def rate(self, step: int, total: int) -> float:
        """Factor of the learning rate in a step, 1 .. total."""
        warm = min(1.0, step / (self.warmup + 1))
        left = 1 - (step - 1) / total
        if self.schedule == "linear":
            return warm * left
        if self.schedule == "cosine":
            return warm * 0.5 * (1 - math.cos(math.pi * left))
        return warm
