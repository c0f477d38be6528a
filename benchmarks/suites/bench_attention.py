"""Attention against torch's scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.roofline import BACKWARD, FORWARD, cost
from benchmarks.shapes import ATTENTION_SHAPES, EQUAL_HEADS, UNEQUAL_HEADS
from fastgen.functional import scaled_dot_product_attention as attention

CPU_SHAPES = [UNEQUAL_HEADS, EQUAL_HEADS] + [
    shape.cut(batch=4, length=1024) for name, shape in ATTENTION_SHAPES.items() if not name.startswith("long")
]
CUDA_SHAPES = list(ATTENTION_SHAPES.values())
SHAPES = [("cpu", shape) for shape in CPU_SHAPES] + [("cuda", shape) for shape in CUDA_SHAPES]


BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


@pytest.fixture
def device(request):
    """Device of the case."""
    kind = request.getfixturevalue("case")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(kind)


def inputs(shape, device, requires_grad):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = ((shape.queries, shape.key_dim), (shape.keys, shape.key_dim), (shape.keys, shape.value_dim))
    tensors = [torch.randn(shape.batch, shape.heads, *s, device=device, dtype=dtype) for s in sizes]
    kwargs = {}
    if shape.mask == "causal":
        kwargs["is_causal"] = True
    elif shape.mask == "bias":
        kwargs["attn_mask"] = torch.randn(1, shape.heads, shape.queries, shape.keys, device=device, dtype=dtype)
    elif shape.mask == "padding":
        lengths = torch.randint(shape.keys // 2, shape.keys + 1, (shape.batch, 1, 1, 1), device=device)
        kwargs["attn_mask"] = torch.arange(shape.keys, device=device) < lengths
    return [t.requires_grad_(requires_grad) for t in tensors], kwargs


def peers(device, call):
    """torch's default backend, and on a GPU each backend that supports the shape."""
    found = {"sdpa": call}
    if device.type == "cuda":
        for backend in BACKENDS:

            def forced(backend=backend):
                with sdpa_kernel(backend):
                    return call()

            try:
                forced()
            except RuntimeError:  # unsupported shape, or out of memory
                continue
            found[backend.name.lower()] = forced
    return found


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: f"{case[0]}-{case[1].name}")
def test_forward(against, device, case):
    shape = case[1]
    tensors, kwargs = inputs(shape, device, requires_grad=False)
    with torch.no_grad():
        against(
            lambda: attention(*tensors, **kwargs),
            peers(device, lambda: F.scaled_dot_product_attention(*tensors, **kwargs)),
            cost=cost(shape, FORWARD),
        )


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: f"{case[0]}-{case[1].name}")
def test_forward_and_backward(against, device, case):
    shape = case[1]
    tensors, kwargs = inputs(shape, device, requires_grad=True)
    leaves = [*tensors]
    if shape.mask == "bias":  # learned bias
        leaves.append(kwargs["attn_mask"].requires_grad_())
    upstream = torch.randn_like(F.scaled_dot_product_attention(*tensors, **kwargs))

    def step(function):
        return torch.autograd.grad(function(*tensors, **kwargs), leaves, upstream)

    against(
        lambda: step(attention),
        peers(device, lambda: step(F.scaled_dot_product_attention)),
        cost=cost(shape, FORWARD, BACKWARD),
        rounds=9,
    )
