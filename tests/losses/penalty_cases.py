"""Networks and calls of the tests of penalties."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastgen.losses import (
    dragan_penalty,
    gradient_penalty,
    path_length_penalty,
    r1_penalty,
    r2_penalty,
)

SHAPES = [(5, 7), (5, 3, 4, 4), (5, 6, 2)]
PENALTIES = ["gradient", "dragan", "r1", "r2", "path length"]


def seeded(seed=3, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def critic(shape, dtype=torch.float64):
    """A small smooth discriminator for samples of this shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def decoder(shape=(5, 7), dtype=torch.float64):
    """A small smooth generator of (B, 2, 3, 3) images from latents of this shape."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape[1:]), 6), nn.Tanh(), nn.Linear(6, 18), nn.Unflatten(1, (2, 3, 3))
    ).to(dtype)


def penalty_of(kind, network, samples, seed=3, mean=0.3, **kwargs):
    """One penalty of a discriminator, or of a generator with ``samples`` as latents."""
    generator = torch.Generator(samples.device).manual_seed(seed)
    if kind == "gradient":
        return gradient_penalty(network, samples, samples.flip(0) + 1, generator=generator, **kwargs)
    if kind == "dragan":
        return dragan_penalty(network, samples, generator=generator, **kwargs)
    leaf = samples.detach().clone().requires_grad_()
    if kind == "r1":
        return r1_penalty(network(leaf), leaf, **kwargs)
    if kind == "r2":
        fake = leaf * 2
        return r2_penalty(network(fake), fake, **kwargs)
    return path_length_penalty(network(leaf), leaf, mean, generator=generator, **kwargs)[0]


def network_of(kind, shape=(5, 7), dtype=torch.float64):
    return decoder(shape, dtype) if kind == "path length" else critic(shape, dtype)
