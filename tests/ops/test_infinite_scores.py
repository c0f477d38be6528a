"""Rows with an infinite score: out is NaN, the logsumexp infinite, and derivatives are those of the formula."""

from __future__ import annotations

import math

import pytest
import torch

import fastgen
from fastgen import functional, reference

PATHS = {
    "torch's kernel, few keys": {},
    "torch's kernel": {"keys": 40},
    "torch's kernel, mask": {"keys": 40, "attn_mask": torch.ones(9, 40, dtype=torch.bool)},
    "torch's kernel, bfloat16": {"keys": 40, "dtype": torch.bfloat16},
    "kernel": {"value_dim": 32},
    "kernel, many keys": {"value_dim": 32, "keys": 600},
    "kernel, grouped heads and a window": {"key_heads": 1, "keys": 40, "window": (30, 36)},
    "kernel, bfloat16": {"value_dim": 32, "dtype": torch.bfloat16},
    "tiles": {"queries": 4, "window": (30, 8)},
    "tiles, float64": {"dtype": torch.float64, "window": (30, 8)},
    "tiles, mask": {"attn_mask": torch.zeros(9, 11), "window": (30, 8)},
    "PyTorch": {"backend": "torch", "window": (30, 8)},
}
ROW, NAN_ROW = 3, 2


def inputs(queries=9, keys=11, key_heads=2, value_dim=8, dtype=torch.float32):
    """Row 3 of the first head has an infinite score, at the last key but one; row 2 has that, and a NaN at the first
    key; the scores of all others are finite or -inf."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, queries, 8), (key_heads, keys, 8), (key_heads, keys, value_dim)
    query, key, value = (torch.randn(1, *shape, generator=generator) for shape in shapes)
    query[..., 0] = -query[..., 0].abs()
    query[0, 0, [ROW, NAN_ROW], 0], query[..., 1] = 1.0, 0.0
    key[:, :, -2] = 0.0
    key[:, :, -2, 0] = math.inf
    query[0, 0, NAN_ROW, 1] = math.nan
    return [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]


def results(attend, leaves, **options):
    """lse, out, and the gradients of the row's out and of its lse."""
    out, lse = attend(*leaves, **options)
    found = [lse, out]
    for total in (out[0, 0, ROW].sum(), lse[0, 0, ROW]):
        grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        found += [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]
    return found


@pytest.mark.parametrize("name", PATHS)
def test_the_logsumexp_of_an_infinite_score_is_infinite_on_every_path(name):
    options = dict(PATHS[name])
    sizes = {k: options.pop(k) for k in ("queries", "keys", "key_heads", "value_dim", "dtype") if k in options}
    leaves = inputs(**sizes)

    def attend(*tensors, **options):
        return functional.scaled_dot_product_attention(*tensors, **options, enable_gqa=True, return_lse=True)

    with fastgen.use_backend(options.pop("backend", "auto")):
        lse, out, *_ = found = results(attend, leaves, **options)
    assert lse[0, 0, ROW] == math.inf
    assert lse[0, 0, NAN_ROW].isnan()
    assert out[0, 0, ROW].isnan().all()
    left, right = options.get("window", (-1, -1))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = results(reference.attention, exact, window_left=left, window_right=right)
    assert wanted[0][0, 0, ROW] == math.inf
    torch.testing.assert_close(lse.double(), wanted[0].to(lse.dtype).double(), equal_nan=True, rtol=0.02, atol=0.02)
    for grad, of_formula in zip(found[2:5], wanted[2:5], strict=True):
        assert not of_formula.isnan().logical_and(~grad.isnan()).any()  # NaN of the formula is not lost


@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
def test_the_logsumexp_of_an_infinite_score_at_each_instruction_set(level):
    if level not in fastgen.backend.cpu_levels():
        pytest.skip(f"this CPU, or this build, has no {level}")
    query, key, value = inputs(value_dim=32, keys=300)
    with fastgen.backend.use_cpu_level(level), torch.no_grad():
        lse = functional.scaled_dot_product_attention(query, key, value, return_lse=True)[1]
    assert lse[0, 0, ROW] == math.inf
    assert lse[0, 0, NAN_ROW].isnan()
    assert lse.isfinite().sum() == lse.numel() - 2
