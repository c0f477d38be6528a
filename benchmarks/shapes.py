"""Shapes of operators in generative models, shared by tests and benchmarks."""

from __future__ import annotations

from fastgen.bench.shapes import ATTENTION_SHAPES, EQUAL_HEADS, LATENT_SHAPES, UNEQUAL_HEADS, AttentionShape

__all__ = [
    "ATTENTION_SHAPES",
    "EQUAL_HEADS",
    "LATENT_EDGES",
    "LATENT_SHAPES",
    "PROJECTION_SHAPES",
    "PROJECTION_SIZES",
    "UNEQUAL_HEADS",
    "AttentionShape",
]

LATENT_EDGES = [(1, 1), (3, 1), (2, 3), (5, 4), (2, 7), (3, 8), (2, 129), (2, 3, 5), (0, 4), (4, 0), (3,)]
"""Odd sizes, multiples of four and not, and empty tensors."""

PROJECTION_SHAPES = {
    # name: (B, N, C, heads, head_dims)
    "sagan-64": (4, 256, 64, (1, 1, 1), (8, 8, 32)),
    "dit-xl": (2, 64, 1152, (16, 16, 16), (72, 72, 72)),
    "char-lm": (2, 64, 384, (6, 6, 6), (64, 64, 64)),
    "grouped": (2, 33, 48, (8, 2, 2), (8, 8, 8)),
    "odd": (3, 7, 5, (3, 1, 1), (5, 5, 7)),
}

PROJECTION_SIZES = {"sagan-64": (64, 1024), "dit-xl": (32, 256), "char-lm": (64, 256), "grouped": (32, 1024)}
"""Full sizes (B, N) of the shapes above, which are reduced for tests and CPUs."""
