"""Derivatives of the raw operators: attention's first and second ones through operators of their own; the others' first
ones through operators, higher ones through the reference."""

from __future__ import annotations

from fastgen._autograd.attention import attention
from fastgen._autograd.latent import gaussian_latent
from fastgen._autograd.projection import merge_heads, projection
from fastgen._library import refuse_other_derivatives

refuse_other_derivatives()

__all__ = ["attention", "gaussian_latent", "merge_heads", "projection"]
