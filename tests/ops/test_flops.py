"""Operation counts: those of PyTorch's FlopCounterMode for the same computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastgen
from fastgen.functional import qkv_projection, scaled_dot_product_attention
from fastgen.losses import r1_penalty


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture
def heads():
    return [torch.randn(2, 4, n, 8, requires_grad=True) for n in (16, 12, 12)]


@pytest.mark.parametrize("backward", [False, True])
def test_attention_counts_as_torch_does(heads, backward):
    """PyTorch counts its fused kernel, which is the one on CPU for these, as two products forward, five backward."""

    def run(attention):
        out = attention(*heads)
        if backward:
            out.sum().backward()

    pair = 2 * 2 * 4 * 16 * 12 * 8  # one product
    assert count(lambda: run(scaled_dot_product_attention)) == (7 if backward else 2) * pair
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = count(lambda: run(F.scaled_dot_product_attention))
    # Without fusion, the backward pass keeps the scores: one product less.
    assert expected == (6 if backward else 2) * pair


def test_derivatives_count(heads):
    tangents = tuple(torch.ones_like(t) for t in heads)
    pair = 2 * 2 * 4 * 16 * 12 * 8
    jvp = count(lambda: torch.func.jvp(scaled_dot_product_attention, tuple(t.detach() for t in heads), tangents))
    assert jvp == (2 + 5) * pair

    def penalty():
        r1_penalty(scaled_dot_product_attention(*heads).sum((1, 2, 3)), heads[0]).backward()

    assert count(penalty) == (2 + 5 + 10) * pair  # forward, backward, second order


def test_projection_and_layers_count_as_torch_does():
    x, weight = torch.randn(2, 16, 32, requires_grad=True), torch.randn(96, 32, requires_grad=True)

    def ours():
        parts = qkv_projection(x, weight, heads=[4] * 3, head_dims=[8] * 3)
        sum(part.sum() for part in parts).backward()

    assert count(ours) == count(lambda: F.linear(x, weight).sum().backward())
    layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True, dropout=0.0)
    x = x.detach()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = count(lambda: layer(x))
    fastgen.accelerate(holder := torch.nn.Sequential(layer))
    assert count(lambda: holder(x)) == expected


def test_the_profiler_names_the_operators(heads):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scaled_dot_product_attention(*heads, window=(9, 9)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastgen::attention_forward", "fastgen::attention_backward"} <= names
