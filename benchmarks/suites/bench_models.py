"""Training steps of zoo models against plain PyTorch implementations (baselines/) with the same weights and batches.

A step runs all phases of the model: loss, gradients of the weights of the phase, fused AdamW. Configurations are the
defaults, with the data of their defaults or with random images of 28x28 and 64x64. With one thread CPU time is
compared. Sampling of the image-transformer is compared with the same network without its cache. bench_training.py
measures the training loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import TWINS
from fastgen.data import DataConfig, load_data
from fastgen.models import MODELS, Batch, GenerativeModel, StepContext, from_data
from fastgen.models.image_transformer import ImageTransformer, ImageTransformerConfig
from fastgen.models.sizes import DataSize
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

SIZES = {"28x28": (28, 1), "64x64": (64, 3)}
SIZED = [f"{model} {size}" for size in SIZES for model in ("conv-vae", "dcgan", "sagan", "stylegan")]
"""A step each, with the defaults for 10,000 images of that size and random pixels."""

SAMPLED = {"8x8": 4, "16x16": 1, "28x28": 1}
"""Images of the image-transformer with its defaults, and how many are drawn at a time."""


def make(name: str) -> tuple[GenerativeModel, nn.Module, Batch, int]:
    """fastgen's model, the baseline with the same weights, a batch, and the steps in a round."""
    if name in SIZED:
        return make_sized(*name.split())
    model, data_options, options, steps = CASES[name]
    model_class = MODELS[model]
    data = load_data(DataConfig(model_class.default_data, **data_options), model_class.kind)
    facts = {fact: data.facts[fact] for fact in from_data(model_class.config_class)}
    config = model_class.config_class(**facts, **options)
    items, _ = split(data, config)
    batch = items.batch(torch.arange(model_class.train_defaults["batch_size"]))
    return *same(model_class, config), batch, steps


def make_sized(model: str, size: str) -> tuple[GenerativeModel, nn.Module, Batch, int]:
    model_class, (pixels, channels) = MODELS[model], SIZES[size]
    chosen = model_class.suggested(DataSize("images", 10_000, pixels, channels, 256))
    facts = {"image_size": pixels, "channels": channels, "levels": 256}
    facts = {fact: facts[fact] for fact in from_data(model_class.config_class) if fact in facts}
    options = {option.removeprefix("model."): value for option, value in chosen.items() if option.startswith("model.")}
    if "penalty_every" in options:
        options["penalty_every"] = 1  # as in the baselines
    images = torch.randint(256, (chosen["batch_size"], channels, pixels, pixels)) / 255
    return *same(model_class, model_class.config_class(**facts, **options)), {"images": images}, 1


def same(model_class: type[GenerativeModel], config: Any) -> tuple[GenerativeModel, nn.Module]:
    """A model, and the baseline with its weights."""
    torch.manual_seed(0)
    ours, twin = model_class(config), TWINS[model_class.name](config)
    twin.load_state_dict(ours.state_dict())
    return ours, twin


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


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [*CASES, *SIZED])
def test_training_step(against, device, name, threads):
    ours, twin, batch, steps = make(name)
    ours, twin = ours.to(device), twin.to(device)
    if ours.channels_last and device.type == "cpu":  # as in training
        ours.to(memory_format=torch.channels_last)
    batch = {key: value.to(device) for key, value in batch.items()}
    clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
    with threads_of(threads):
        against(trainer(ours, ours, batch, steps), {"torch": trainer(twin, ours, batch, steps)}, rounds=11, clock=clock)


@torch.no_grad()
def draw_without_cache(model: ImageTransformer, n: int) -> Tensor:
    """Tokens (n, length): a forward of all tokens so far for each new one."""
    tokens = torch.zeros(n, 0, dtype=torch.int64, device=model.device)
    for _ in range(model.config.length):
        probability = model(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probability, 1)], dim=1)
    return tokens


@pytest.mark.parametrize("size", SAMPLED)
def test_sampling_of_pixels(against, device, size):
    """The cache against a forward of all tokens for each new one, of the same model."""
    model = ImageTransformer(ImageTransformerConfig(image_size=int(size.split("x")[0]))).to(device).eval()
    n = SAMPLED[size]
    none = torch.zeros(n, 0, dtype=torch.int64, device=device)
    peers = {"no cache": lambda: draw_without_cache(model, n)}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with threads_of(1):
        against(lambda: model.complete(none), peers, rounds=3, clock=clock)
