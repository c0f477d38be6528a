"""Overhead of the training loop: steps of ``fastgen train`` against a hand-written loop.

Both train the same model on the same batches with AdamW. The hand-written loop samples its batches, computes the loss,
its gradient, clips it, steps, averages the weights and reads the loss every ten steps. The difference is what the
trainer does in addition: seeding every step, guarding against NaN, recording every value, progress, metrics.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from fastgen.data import DataConfig, load_data
from fastgen.models import MODELS, GenerativeModel, StepContext, from_data
from fastgen.testing import interleaved_times, median_ratio
from fastgen.train.checkpoint import Header
from fastgen.train.config import TrainConfig
from fastgen.train.engine import Engine
from fastgen.train.folder import RunFolder
from fastgen.train.loop import Trainer
from fastgen.train.progress import Progress
from fastgen.train.run import limited_threads, split
from fastgen.train.sharding import leave, make_accelerator

STEPS = 20
NEVER = 10**9


def make(name: str) -> tuple[GenerativeModel, TrainConfig, tuple[object, object]]:
    model_class = MODELS[name]
    data = load_data(DataConfig(model_class.default_data), model_class.kind)
    config = model_class.config_class(**{fact: data.facts[fact] for fact in from_data(model_class.config_class)})
    options = {**model_class.train_defaults, "steps": NEVER, "clip": 1.0, "device": "cpu"}
    never = dict.fromkeys(("evaluate_every", "sample_every", "checkpoint_every"), NEVER)
    torch.manual_seed(0)
    return model_class(config), TrainConfig(**options, **never), split(data, config)


def by_hand(name: str) -> Callable[[], None]:
    model, config, (items, _) = make(name)
    (phase,) = model.phases()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=phase.betas, weight_decay=phase.weight_decay, fused=True
    )
    average = [weight.detach().clone() for weight in model.parameters()]
    weights = list(model.parameters())
    steps = itertools.count(1)
    total = torch.zeros(())

    def run() -> None:
        nonlocal total
        for _ in range(STEPS):
            step = next(steps)
            batch = items.batch(torch.randint(len(items), (config.batch_size,)))
            loss = model.loss(phase.name, batch, StepContext(step, NEVER))["loss"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, config.clip)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - config.average_decay)
            total = total + loss.detach()
            if step % 10 == 0:
                float(total)

    return run


def by_fastgen(name: str, folder: Path) -> tuple[Callable[[], None], Accelerator]:
    model, config, splits = make(name)
    accelerator = make_accelerator(config, torch.device("cpu"))
    engine = Engine(model, config, NEVER, accelerator)
    trainer = Trainer(engine, splits, RunFolder(folder), Header(name, {}, {}, {}, ""))
    progress = Progress(NEVER, 0, trainer.epoch_steps, quiet=True)
    stop = type("StopRequest", (), {"requested": False})()

    def run() -> None:
        engine.total = engine.step + STEPS
        trainer._evaluate = lambda progress: None  # type: ignore[method-assign]
        trainer.sample = trainer.save = lambda: None  # type: ignore[method-assign]
        trainer.run(progress, stop)

    return run, accelerator


@pytest.mark.parametrize("name", ["conv-vae", "transformer-lm"])
def test_the_loop_costs_little(benchmark, name: str) -> None:
    """extra_info: the median of ratios of rounds, ours over the hand-written loop."""
    with tempfile.TemporaryDirectory() as folder:
        ours, accelerator = by_fastgen(name, Path(folder))
        loops = {"ours": ours, "by hand": by_hand(name)}
        model, config, (items, _) = make(name)
        with limited_threads(config, model, items):
            times = interleaved_times(loops, rounds=15)
            benchmark.extra_info["overhead"] = median_ratio(times["ours"], times["by hand"]) - 1
            benchmark.extra_info["shape"] = f"{name}, {STEPS} steps"
            benchmark.pedantic(loops["ours"], rounds=3)
        leave(accelerator)
