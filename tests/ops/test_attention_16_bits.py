"""Attention in bfloat16 and float16 on CPU: in float32 inside where the processor has no products of 16 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import reference
from fastgen.functional import scaled_dot_product_attention
from fastgen.ops.attention import fused
from fastgen.testing import assert_accurate

SHAPES = {  # B, H, N, M, Dk, Dv
    "equal heads": (2, 4, 96, 64, 32, 32),
    "narrow query heads": (2, 4, 96, 64, 8, 32),
    "padded heads": (2, 4, 96, 64, 24, 32),
}
HALVES = (torch.bfloat16, torch.float16)


def operands(name: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    batch, heads, queries, keys, key_dim, value_dim = SHAPES[name]
    sizes = ((queries, key_dim), (keys, key_dim), (keys, value_dim))
    tensors = [torch.randn(batch, heads, *size).to(dtype) for size in sizes]
    return tensors, torch.randn(batch, heads, queries, value_dim).to(dtype)


def results(attend, tensors: list[Tensor], grad: Tensor, **options) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attend(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward_with_and_without_products_of_16_bits(monkeypatch, name, dtype, mask, native):
    monkeypatch.setattr(fused, "has_products", lambda dtype: native)
    monkeypatch.setattr(fused, "FEW_ELEMENTS", 1)
    tensors, grad = operands(name, dtype)
    assert fused.widens(tensors[0], backward=True)
    options: dict[str, object] = {"is_causal": True} if mask == "causal" else {}
    if mask == "padding":
        options["attn_mask"] = (torch.arange(64) < torch.tensor([40, 64]).view(2, 1, 1, 1)).expand(2, 1, 96, 64)
    actual = results(scaled_dot_product_attention, tensors, grad, **options)
    plain = results(F.scaled_dot_product_attention, tensors, grad, **options)

    def exact_attention(*leaves: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        right = 0 if is_causal else -1
        return reference.attention(*leaves, attn_mask, window_right=right)[0]

    exact = results(exact_attention, [tensor.double() for tensor in tensors], grad.double(), **options)
    for found, peer, wanted, like in zip(actual, plain, exact, [grad, *tensors], strict=True):
        assert found.dtype == dtype
        assert found.shape == like.shape
        assert_accurate(found, peer, wanted)
    with torch.no_grad():
        torch.testing.assert_close(scaled_dot_product_attention(*tensors, **options), actual[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", HALVES)
def test_small_tensors_are_not_converted(dtype, monkeypatch):
    monkeypatch.setattr(fused, "has_products", lambda dtype: False)
    assert not fused.widens(torch.empty(1, 1, 4, 8, dtype=dtype), backward=True)
    assert fused.widens(torch.empty(2, 4, 64, 64, dtype=dtype), backward=True)
    assert not fused.widens(torch.empty(2, 4, 64, 64), backward=True)
    assert not fused.widens(torch.empty(2, 4, 64, 64, dtype=dtype), backward=False)
    long = torch.empty(1, 1, 1024, 64, dtype=dtype)
    assert fused.widens(long, backward=False) == (dtype == torch.float16)


def test_products_of_16_bits_are_used_where_the_processor_has_them(monkeypatch):
    monkeypatch.setattr(fused, "has_products", lambda dtype: True)
    long = torch.empty(1, 1, 1024, 64, dtype=torch.float16)
    assert not fused.widens(long, backward=True)
    assert not fused.widens(long, backward=False)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_nan_is_kept(monkeypatch, name, dtype):
    monkeypatch.setattr(fused, "has_products", lambda dtype: False)
    monkeypatch.setattr(fused, "FEW_ELEMENTS", 1)
    tensors, _ = operands(name, dtype)
    tensors[1][0, 0, 3, 0] = float("nan")
    out = scaled_dot_product_attention(*tensors)
    assert out[0, 0].isnan().all()
    assert not out[0, 1:].isnan().any()
