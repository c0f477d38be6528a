"""Calls of attention's operators that show which kernels of the backward pass run, in the emulator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgen import backend
from fastgen.ops.attention.problem import Options

GENERAL = ("attention_backward_query", "attention_backward_key_value")
PLAIN = Options(0.0, -1, -1, 0.3)

needs_module = pytest.mark.skipif(backend.plans.why_not() is not None, reason="the CPU library is not loaded")


def launches(emulator, call):
    """How often each kernel was launched by ``call``."""
    before = {name: kernel["launches"] for name, kernel in emulator.statistics().items()}
    call()
    return {
        name: kernel["launches"] - before.get(name, 0)
        for name, kernel in emulator.statistics().items()
        if kernel["launches"] > before.get(name, 0)
    }


def operands(batch=2, heads=2, queries=49, keys=49, dims=(32, 32), dtype=torch.bfloat16):
    shapes = ((heads, queries, dims[0]), (heads, keys, dims[0]), (heads, keys, dims[1]))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def backward(operators, tensors, mask=None, seed=None, options=PLAIN, learned=None) -> Callable[[], list[Tensor]]:
    """The backward pass after a forward pass that has run, as a call.

    It gives gradients of query, key, value and a float mask, with upstream gradients of out and lse.
    """
    out, lse = operators.attention_forward(*tensors, mask, seed, None, *options)
    if learned is None:
        learned = mask is not None and mask.is_floating_point()
    torch.manual_seed(5)
    upstream = torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape)
    return lambda: operators.attention_backward(*upstream, *tensors, out, lse, mask, seed, None, *options, learned)


def gradients(operators, tensors, mask=None, seed=None, options=PLAIN, learned=None):
    return backward(operators, tensors, mask, seed, options, learned)()


def plan(batch, heads, key_heads, queries, keys, key_dim, value_dim, element_size=2, **kwargs):
    sizes = (batch, heads, key_heads, queries, keys, key_dim, value_dim, element_size)
    return backend.plans.attention_plan(*sizes, **{"multiprocessors": 132, **kwargs})
