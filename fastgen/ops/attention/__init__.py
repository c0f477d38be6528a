"""Operators of softmax attention."""

from __future__ import annotations

from fastgen.ops.attention import autograd, operators, sharding

__all__ = ["autograd", "operators", "sharding"]
