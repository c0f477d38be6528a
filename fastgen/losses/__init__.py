"""Losses of adversarial training: adversarial losses, gradient penalties and path length regularization."""

from __future__ import annotations

from fastgen.losses.adversarial import discriminator_loss, generator_loss
from fastgen.losses.path_length import path_length_penalty
from fastgen.losses.penalties import dragan_penalty, gradient_penalty, r1_penalty, r2_penalty

__all__ = [
    "discriminator_loss",
    "dragan_penalty",
    "generator_loss",
    "gradient_penalty",
    "path_length_penalty",
    "r1_penalty",
    "r2_penalty",
]
