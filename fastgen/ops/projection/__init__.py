"""Operators of multi-head projections."""

from __future__ import annotations

from fastgen.ops.projection import autograd, operators

__all__ = ["autograd", "operators"]
