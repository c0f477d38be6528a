"""Derivatives of the raw operators: first ones through kernels, higher ones through the reference."""

from __future__ import annotations

from fastgen._autograd.attention import attention
from fastgen._autograd.latent import gaussian_latent
from fastgen._autograd.projection import merge_heads, projection

__all__ = ["attention", "gaussian_latent", "merge_heads", "projection"]
