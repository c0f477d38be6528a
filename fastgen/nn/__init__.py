"""Layers that hold parameters and call ``fastgen.functional``."""

from __future__ import annotations

from fastgen.nn.latent import GaussianLatent

__all__ = ["GaussianLatent"]
