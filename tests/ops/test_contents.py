"""Zeros and NaN in results of PyTorch's kernels, as the compiled library and as PyTorch find them."""

from __future__ import annotations

import math

import pytest
import torch

import fastgen
from fastgen.ops import _contents
from fastgen.ops._contents import LARGE, NAN, NOT_FINITE, ZERO

ALL = ZERO | NAN | NOT_FINITE | LARGE
VALUES = [
    (1.0, 0),
    (0.0, ZERO),
    (-0.0, ZERO),
    (math.nan, NAN | NOT_FINITE | LARGE),
    (-math.inf, NOT_FINITE | LARGE),
]
LARGEST = {torch.float16: 65504.0, torch.bfloat16: 2.0**59, torch.float32: 2.0**59, torch.float64: 2.0**499}


def test_the_library_is_used_where_it_is_loaded():
    assert bool(_contents._scans) == fastgen.backend.library_for("cpu").loaded


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_zeros_and_nan_are_found(monkeypatch, dtype, compiled):
    if not compiled:
        monkeypatch.setattr(_contents, "_scans", {})
    large = [] if dtype == torch.float16 else [(2 * LARGEST[dtype], LARGE), (-2 * LARGEST[dtype], LARGE)]
    for value, bits in [*VALUES, (LARGEST[dtype], 0), *large]:
        tensor = torch.ones(1, 2, 3, 4, dtype=dtype)
        tensor[0, 1, 2, 3] = value
        for view in (tensor, tensor.transpose(1, 2), tensor.expand(2, 2, 3, 4), tensor[..., :3]):
            expected = bits if view.shape[-1] == 4 else 0
            assert _contents.contents(view, ALL) == expected


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_zeros_and_nan_of_large_results_are_found_in_every_part(monkeypatch, dtype, compiled):
    if not compiled:
        monkeypatch.setattr(_contents, "_scans", {})
    tensor = torch.full((1, 3, 2**10, 67), 3e38, dtype=dtype)  # sums of it overflow
    assert tensor.numel() > 3 * _contents._FEW
    assert _contents.contents(tensor, ALL) == LARGE
    for value, bits in VALUES:
        for at in (0, tensor.numel() // 2, tensor.numel() - 1):
            changed = tensor.clone()
            changed.view(-1)[at] = value
            assert _contents.contents(changed, ALL) == bits | LARGE
