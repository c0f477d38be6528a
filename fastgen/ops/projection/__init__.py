"""Operators of multi-head projections: tokens to heads, and heads back to tokens (``merge_``)."""

from __future__ import annotations

from fastgen.ops.projection import autograd, merge_autograd, merge_operators, operators

__all__ = ["autograd", "merge_autograd", "merge_operators", "operators"]
