"""Training steps of zoo models against plain PyTorch implementations (baselines/) with the same weights and batches.

A step runs all phases of the model: loss, gradients of the weights of the phase, fused AdamW. Configurations and data
are the defaults. bench_training.py measures the training loop.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.baselines import TWINS
from fastgen.data import DataConfig, load_data
from fastgen.models import MODELS, Batch, GenerativeModel, StepContext, from_data
from fastgen.train.run import split

CASES = {
    "vae": ("vae", {}, {}, 20),
    "conv-vae": ("conv-vae", {}, {}, 4),
    "dcgan": ("dcgan", {}, {}, 4),
    "sagan": ("sagan", {}, {}, 2),
    "sagan 32x32": ("sagan", {"image_size": 32}, {}, 1),
    "sagan 32x32, attention at 32x32": ("sagan", {"image_size": 32}, {"attention_size": 32}, 1),
    "transformer-lm": ("transformer-lm", {}, {}, 2),
}
"""Model, options of the data, options of the config, steps in a round."""


def make(name: str) -> tuple[GenerativeModel, nn.Module, Batch]:
    """fastgen's model, the baseline with the same weights, and a batch."""
    model, data_options, options, _ = CASES[name]
    model_class = MODELS[model]
    data = load_data(DataConfig(model_class.default_data, **data_options), model_class.kind)
    facts = {fact: data.facts[fact] for fact in from_data(model_class.config_class)}
    config = model_class.config_class(**facts, **options)
    torch.manual_seed(0)
    ours = model_class(config)
    twin = TWINS[model](config)
    twin.load_state_dict(ours.state_dict())
    items, _ = split(data, config)
    return ours, twin, items.batch(torch.arange(model_class.train_defaults["batch_size"]))


def trainer(module: nn.Module, like: GenerativeModel, batch: Batch, steps: int) -> Callable[[], None]:
    """A function that runs ``steps`` training steps with the phases of ``like``."""
    phases = like.phases()
    phase_weights = [
        [
            weight
            for name, weight in module.named_parameters()
            if not phase.networks or name.split(".")[0] in phase.networks
        ]
        for phase in phases
    ]
    optimizers = [
        torch.optim.AdamW(
            weights, lr=phase.learning_rate, betas=phase.betas, weight_decay=phase.weight_decay, fused=True
        )
        for phase, weights in zip(phases, phase_weights, strict=True)
    ]

    def run() -> None:
        for _ in range(steps):
            for phase, weights, optimizer in zip(phases, phase_weights, optimizers, strict=True):
                module.requires_grad_(False)
                for weight in weights:
                    weight.requires_grad_(True)
                loss = module.loss(phase.name, batch, StepContext(1, 1))["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return run


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_training_step(against, device, name, threads):
    ours, twin, batch = make(name)
    ours, twin = ours.to(device), twin.to(device)
    batch = {key: value.to(device) for key, value in batch.items()}
    steps = CASES[name][3]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        against(trainer(ours, ours, batch, steps), {"torch": trainer(twin, ours, batch, steps)}, rounds=11)
    finally:
        torch.set_num_threads(before)
