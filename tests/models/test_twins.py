"""Models of the zoo against the same ones written with torch alone (benchmarks/baselines): the same training."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import TWINS
from benchmarks.suites.bench_models import trainer
from fastgen import random
from fastgen.models import MODELS, StepContext

STEPS = 6
CASES = {
    "vae": ("vae", {"image_size": 8, "width": 16, "latent_dim": 3}),
    "conv-vae": ("conv-vae", {"image_size": 16, "width": 4, "latent_dim": 3, "hidden_dim": 16}),
    "dcgan": ("dcgan", {"image_size": 16, "width": 8, "latent_dim": 4}),
    "stylegan": ("stylegan", {"image_size": 16, "width": 4, "latent_dim": 4, "style_dim": 8}),
    "sagan": ("sagan", {"image_size": 16, "width": 8, "latent_dim": 4}),
    "sagan, no bias of the map": ("sagan", {"image_size": 8, "width": 8, "latent_dim": 4, "canvas_bias": False}),
    "sagan with classes": ("sagan", {"image_size": 8, "width": 8, "latent_dim": 4, "classes": 3}),
    "transformer-lm": (
        "transformer-lm",
        {"vocabulary": "abcd", "context": 12, "width": 16, "num_heads": 2, "depth": 2},
    ),
}


def philox(mu):
    """The noise that the fused latent draws where a twin calls torch.randn_like."""
    return random.standard_normal(torch.randint(0, 2**63 - 1, (1,)), len(mu), mu[0].numel()).view_as(mu)


@pytest.mark.parametrize("name", CASES)
def test_a_model_trains_as_its_twin_does(name):
    torch.manual_seed(0)
    model, options = CASES[name]
    config = MODELS[model].config_class(**options)
    ours, twin = MODELS[model](config), TWINS[model](config)
    if model in ("vae", "conv-vae"):
        twin.noise = philox
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # zeros, as that of attention's gain, would hide a mistake
    twin.load_state_dict(ours.state_dict())
    size = options.get("image_size", 1)
    batch = {
        "images": torch.randint(17, (6, 1, size, size)) / 16,
        "labels": torch.arange(6) % 3,
        "tokens": torch.randint(4, (6, options.get("context", 0) + 1)),
    }
    for phase in ours.phases():
        values = []
        for module in (ours, twin):
            torch.manual_seed(1)
            values.append(module.loss(phase.name, dict(batch), StepContext(3, 10)))
        assert values[0].keys() == values[1].keys()
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)
    for module in (ours, twin):
        torch.manual_seed(2)
        trainer(module, ours, batch, STEPS)()
    losses = []
    for module in (ours, twin):
        torch.manual_seed(3)
        losses.append(
            {phase.name: module.loss(phase.name, batch, StepContext(3, 10))["loss"].detach() for phase in ours.phases()}
        )
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=2e-3)
