"""The model zoo: each model is one file, its config first, its loss in it."""

from __future__ import annotations

from fastgen.models._base import (
    KINDS,
    Batch,
    Exhibit,
    GenerativeModel,
    Images,
    Moment,
    NoOptions,
    Phase,
    Sounds,
    Texts,
    from_data,
    option,
)
from fastgen.models.conv_vae import ConvVAE, ConvVAEConfig
from fastgen.models.dcgan import DCGAN, DCGANConfig
from fastgen.models.transformer_lm import TransformerLM, TransformerLMConfig

__all__ = [
    "DCGAN",
    "KINDS",
    "MODELS",
    "Batch",
    "ConvVAE",
    "ConvVAEConfig",
    "DCGANConfig",
    "Exhibit",
    "GenerativeModel",
    "Images",
    "Moment",
    "NoOptions",
    "Phase",
    "Sounds",
    "Texts",
    "TransformerLM",
    "TransformerLMConfig",
    "from_data",
    "option",
]

MODELS: dict[str, type[GenerativeModel]] = {model.name: model for model in (ConvVAE, DCGAN, TransformerLM)}
"""By the name that the command line uses."""
