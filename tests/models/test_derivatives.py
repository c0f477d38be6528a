"""The losses of every model of the zoo, differentiated in the weights: right, or an error. Never silently wrong.

The oracle is the difference of two values of the loss (or of its gradient) in float64, a small step along a random
direction to either side. An adversarial loss has its penalty in reverse mode: the second derivative that one needs.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from fastgen.models import MODELS, StepContext

STEP = 1e-6
NOW = StepContext(1, 1)
B = 3
GAN = {"image_size": 8, "latent_dim": 3, "penalty": "r1"}
PATCHES = {"image_size": 16, "width": 2, "patch_width": 2, "patch_num_downsamples": 1, "penalty": "r1"}
CASES = {
    # model: options, and the beginning of the names of the weights; default those of the first phase
    "gan": (GAN | {"width": 6, "depth": 2}, ""),
    "cgan": (GAN | {"width": 6, "depth": 2, "classes": 2}, ""),
    "dcgan": (GAN | {"width": 2}, ""),
    "cdcgan": (GAN | {"width": 2, "classes": 2}, ""),
    "sagan": (GAN | {"width": 4, "classes": 2}, ""),
    "attention-gan": (GAN | {"width": 2, "gate_width": 2}, ""),
    "recurrent-gan": ({"generator_width": 4, "critic_width": 3, "noise_dim": 2, "penalty": "r1"}, ""),
    "stylegan": (GAN | {"width": 4, "style_dim": 4, "penalty_every": 1}, ""),
    "transgan": (GAN | {"width": 8, "num_heads": 2, "penalty_every": 1}, ""),
    "cyclegan": (PATCHES | {"blocks": 1, "history": 0}, ""),
    "pix2pix": (PATCHES | {"num_downsamples": 2, "norm": "instance"}, ""),
    "vae": ({"width": 6, "latent_dim": 2}, ""),
    "conv-vae": ({"image_size": 4, "width": 2, "hidden_dim": 4, "latent_dim": 2, "attention": True}, ""),
    "cvae": ({"width": 6, "latent_dim": 2, "classes": 2}, ""),
    "flow-vae": ({"width": 6, "latent_dim": 3, "flow_width": 4, "context_dim": 2, "flows": 2}, ""),
    # The gradient passes straight through its quantizer: of the encoder it is none of the loss.
    "vq-vae": ({"width": 4}, "autoencoder.decoder"),
    "transformer-lm": ({"vocabulary": "abc", "context": 4, "width": 8, "num_heads": 2, "depth": 1}, ""),
    "seq2seq": ({"vocabulary": "ab", "source_length": 5, "target_length": 4, "width": 8, "num_heads": 2}, ""),
    "image-transformer": ({"image_size": 4, "levels": 4, "width": 8, "num_heads": 2, "depth": 1}, ""),
    "wavenet": ({"sample_rate": 100, "length": 40, "channels": 4, "skip_channels": 4, "cycle": 2, "crop": 8}, ""),
}  # fmt: skip
REFUSED = {("recurrent-gan", "forward"): r"call Tensor\.requires_grad_\(\)"}
"""(model, way): what a derivative that is not there says."""


class Loss(nn.Module):
    def __init__(self, name: str, penalised: bool) -> None:
        super().__init__()
        options, _ = CASES[name]
        options = options if penalised or "penalty" not in options else {**options, "penalty": "none"}
        torch.manual_seed(0)
        self.model = MODELS[name](MODELS[name].config_class(**options)).double()
        self.model.train(name != "sagan")  # whose power iterations, in training, PyTorch does not differentiate
        config = self.model.config
        self.phase = self.model.phases()[0]
        size, channels = getattr(config, "image_size", 1), getattr(config, "channels", 1)
        levels = getattr(config, "levels", 0) or 17
        self.batch = {
            "images": torch.randint(levels, (B, channels, size, size)).double() / (levels - 1),
            "labels": torch.arange(B) % 2,
            "tokens": torch.randint(3, (B, getattr(config, "context", 0) + 1)),
            "source": torch.tensor([[1, 3, 4, 2, 0], [1, 4, 2, 0, 0], [1, 3, 3, 4, 2]]),
            "target": torch.tensor([[1, 4, 3, 2], [1, 3, 2, 0], [1, 4, 4, 2]]),
            **{name: torch.rand(B, channels, size, size).double() for name in ("a", "b", "targets")},
            "inputs": torch.rand(B, getattr(config, "input_channels", 1), size, size).double(),
            "audio": torch.rand(B, getattr(config, "length", 1)).double() - 0.5,
        }

    def forward(self) -> Tensor:
        torch.manual_seed(1)
        with torch.random.fork_rng():
            return self.model.loss(self.phase.name, dict(self.batch), NOW)["loss"]


def loss_of(name: str, penalised: bool):
    """The loss as a function of weights, and those weights and a direction for each."""
    module = Loss(name, penalised)
    chosen = {
        key: weight.detach() + 0.1 * torch.randn_like(weight)
        for key, weight in module.named_parameters()
        if key.removeprefix("model.").startswith(CASES[name][1] or module.phase.networks or "")
    }
    module.requires_grad_(False)

    def function(*weights: Tensor) -> Tensor:
        buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}  # statistics that a step changes
        return functional_call(module, {**dict(zip(chosen, weights, strict=True)), **buffers}, ())

    return function, tuple(chosen.values()), tuple(torch.randn_like(weight) for weight in chosen.values())


def gradient(function, weights, create_graph=False):
    leaves = [weight.detach().requires_grad_() for weight in weights]
    found = torch.autograd.grad(function(*leaves), leaves, create_graph=create_graph, allow_unused=True)
    return leaves, [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


def along(tensors, directions) -> Tensor:
    return sum((tensor * d).sum() for tensor, d in zip(tensors, directions, strict=True))


def moved(weights, directions, by):
    return [weight + by * d for weight, d in zip(weights, directions, strict=True)]


def reverse(function, weights, directions):
    return along(gradient(function, weights)[1], directions)


def forward(function, weights, directions):
    return jvp(function, weights, directions)[1]


def reverse_twice(function, weights, directions):
    leaves, first = gradient(function, weights, create_graph=True)
    second = torch.autograd.grad(along(first, directions), leaves, allow_unused=True)
    return sum((g * d).sum() for g, d in zip(second, directions, strict=True) if g is not None)


WAYS = {"reverse": reverse, "forward": forward, "reverse twice": reverse_twice}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_derivative_in_the_weights_is_right_or_raises(name, way):
    function, weights, directions = loss_of(name, penalised=way == "reverse")
    ends = [moved(weights, directions, by) for by in (STEP, -STEP)]
    values = [reverse(function, end, directions) if way == "reverse twice" else function(*end) for end in ends]
    wanted = (values[0] - values[1]).detach() / (2 * STEP)
    assert wanted.abs() > 1e-6, "an oracle of zero shows nothing"
    text = REFUSED.get((name, way))
    try:
        got = WAYS[way](function, weights, directions)
    except Exception as error:
        if text is None or re.search(text, str(error)) is None:
            raise
        return
    assert text is None, "it is there after all"
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)


def test_the_table_has_every_model():
    assert set(MODELS) == set(CASES)
