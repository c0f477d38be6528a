"""Training and evaluation, epoch by epoch. Knows no files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fastgen._checks import require_positive
from fastgen.data import ImageData
from fastgen.models import ConvVAE
from fastgen.train.errors import DivergedError, UsageError
from fastgen.train.progress import Metrics, Progress
from fastgen.train.state import TrainState

MAX_GRADIENT_NORM = 100.0
STEPS_PER_REPORT = 10
SMALL_STEP = 2**14  # pixels; below, a second thread gains little, and loses much where cores are shared
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class TrainConfig:
    """How to train. ValueError names the field, what was expected and what came."""

    epochs: int = field(default=50, metadata={"help": "passes over the training images"})
    batch_size: int = field(default=64, metadata={"help": "images per step"})
    learning_rate: float = field(default=4e-3, metadata={"help": "of Adam"})
    kl_warmup: int = field(default=10, metadata={"help": "epochs over which the KL's weight grows to 1"})
    average_decay: float = field(default=0.998, metadata={"help": "of the running average of the weights"})
    seed: int = field(default=0, metadata={"help": "of initial weights, data order and noise"})
    threads: int = field(
        default=0, metadata={"help": "on the CPU; 0: one if the images of a step are small, else torch's choice"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, ...; auto: cuda if there is one"})

    def __post_init__(self) -> None:
        require_positive("epochs", self.epochs)
        require_positive("batch_size", self.batch_size)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if self.kl_warmup < 0:
            raise ValueError(f"kl_warmup: expected a number of epochs >= 0, got {self.kl_warmup}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay: expected a number in [0, 1), got {self.average_decay}")
        if self.threads < 0:
            raise ValueError(f"threads: expected a number of threads >= 0, got {self.threads}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1, got {self.seed}")


def choose_device(name: str) -> torch.device:
    """Raises UsageError for a device that torch does not know or this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device: expected one that this machine has, got {name!r} ({reason})") from error
    return device


@contextmanager
def limited_threads(config: TrainConfig, images: Tensor) -> Iterator[None]:
    """Have torch use ``config.threads``, and afterwards as many as before."""
    before = torch.get_num_threads()
    pixels = config.batch_size * images.shape[-2] * images.shape[-1]
    torch.set_num_threads(config.threads or (1 if pixels < SMALL_STEP else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit(state: TrainState, data: ImageData, config: TrainConfig, progress: Progress) -> Iterator[Metrics]:
    """Train from ``state.epoch`` to ``config.epochs``, yielding after each epoch with ``state`` up to date.

    Raises:
        DivergedError: a loss is NaN or infinite; raised instead of yielding that epoch.
    """
    train, test = data.train.to(state.device), data.test.to(state.device)
    for epoch in range(state.epoch + 1, config.epochs + 1):
        started = time.perf_counter()
        train_loss = _train_epoch(state, train, config, epoch, progress)
        trained = time.perf_counter() - started
        elbo, nll, kl = evaluate(state.average, test)
        for name, value in (("training loss", train_loss), ("held-out ELBO", elbo)):
            if not math.isfinite(value):
                raise DivergedError(f"epoch {epoch}: the {name} is {value}; try a smaller learning rate")
        state.epoch = epoch
        yield Metrics(epoch, train_loss, elbo, nll, kl, len(train) / trained, time.perf_counter() - started)


def _train_epoch(state: TrainState, images: Tensor, config: TrainConfig, epoch: int, progress: Progress) -> float:
    """One pass over the images in an order drawn from (seed, epoch); the mean loss."""
    beta = min(1.0, epoch / max(1, config.kl_warmup))
    order = torch.randperm(len(images), generator=_seeded(config.seed, epoch)).to(images.device)
    sums = torch.zeros(2, device=images.device)
    seen = 0
    state.model.train()
    for step, chosen in enumerate(torch.split(order, config.batch_size), start=1):
        out = state.model(images[chosen], beta=beta)
        state.optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), MAX_GRADIENT_NORM)
        state.optimizer.step()
        state.update_average(config.average_decay)
        sums += torch.stack([(out.nll + out.kl).detach().sum(), out.kl.detach().sum()])
        seen += len(chosen)
        if step % STEPS_PER_REPORT == 0 or seen == len(images):
            loss, kl = (sums / seen).tolist()
            progress.advance(epoch, seen, loss, kl)
            if not math.isfinite(loss):
                break
    return float(loss)


def _seeded(seed: int, epoch: int) -> torch.Generator:
    mixed = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


@torch.no_grad()
def evaluate(model: ConvVAE, images: Tensor) -> tuple[float, float, float]:
    """(ELBO, nll, KL), means over the images in nats, from one posterior sample each with fixed noise."""
    generator = torch.Generator(images.device).manual_seed(0)
    nll = torch.zeros((), device=images.device, dtype=torch.float64)
    kl = torch.zeros_like(nll)
    for batch in torch.split(images, EVALUATION_BATCH):
        out = model(batch, generator=generator)
        nll += out.nll.sum()
        kl += out.kl.sum()
    mean_nll, mean_kl = float(nll) / len(images), float(kl) / len(images)
    return -(mean_nll + mean_kl), mean_nll, mean_kl
