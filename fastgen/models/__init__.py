"""The model zoo: each model is one file, its config first, its loss in it."""

from __future__ import annotations

from typing import NamedTuple

from fastgen.models.conv_vae import ConvVAE, ConvVAEConfig

__all__ = ["MODELS", "ConvVAE", "ConvVAEConfig", "ModelEntry"]


class ModelEntry(NamedTuple):
    config: type[ConvVAEConfig]
    model: type[ConvVAE]


MODELS: dict[str, ModelEntry] = {"conv-vae": ModelEntry(ConvVAEConfig, ConvVAE)}
