"""Random samples for the tests of metrics."""

from __future__ import annotations

import torch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, dims=8, seed=0, scale=1.0, shift=0.0):
    return torch.randn(n, dims, generator=seeded(seed), dtype=torch.float64) * scale + shift
