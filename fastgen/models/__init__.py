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

__all__ = [
    "KINDS",
    "MODELS",
    "Batch",
    "ConvVAE",
    "ConvVAEConfig",
    "Exhibit",
    "GenerativeModel",
    "Images",
    "Moment",
    "NoOptions",
    "Phase",
    "Sounds",
    "Texts",
    "from_data",
    "option",
]

MODELS: dict[str, type[GenerativeModel]] = {model.name: model for model in (ConvVAE,)}
"""By the name that the command line uses."""
