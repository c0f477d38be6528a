"""Operators of the Gaussian latent."""

from __future__ import annotations

from fastgen.ops.latent import autograd, operators

__all__ = ["autograd", "operators"]
