"""Second-order and forward-mode derivatives of attention against PyTorch's unfused backend and the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.roofline import BACKWARD, FORWARD, SECOND_ORDER, TANGENT, cost
from benchmarks.shapes import AttentionShape
from fastgen.functional import scaled_dot_product_attention as attention

SHAPES = [
    ("cpu", AttentionShape("unequal heads", 8, 1, 1024, 1024, 8, 64)),
    ("cpu", AttentionShape("equal heads", 2, 4, 2048, 2048, 64, 64)),
    ("cuda", AttentionShape("sagan-64", 64, 1, 1024, 1024, 8, 32)),
    ("cuda", AttentionShape("unequal heads", 64, 1, 1024, 1024, 8, 64)),
    ("cuda", AttentionShape("equal heads", 8, 8, 4096, 4096, 64, 64)),
    ("cuda", AttentionShape("long", 2, 16, 8192, 8192, 64, 64)),
]


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
    return [t.requires_grad_(requires_grad) for t in tensors]


def unfused(*tensors):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors)


def formula(query, key, value):
    return torch.softmax(query @ key.mT * query.size(-1) ** -0.5, dim=-1) @ value


def fits(call):
    """Whether the call, which materializes the scores, fits in memory."""
    try:
        call()
    except torch.OutOfMemoryError:
        return False
    return True


def ids(case):
    return f"{case[0]}-{case[1].name}"


@pytest.mark.parametrize("case", SHAPES, ids=ids)
def test_r1_step(against, device, case):
    """Forward, gradient of the inputs, and gradient of the squared gradient norm."""
    tensors = inputs(case[1], device, requires_grad=True)

    def step(attend):
        grads = torch.autograd.grad(attend(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    math = lambda: step(unfused)  # noqa: E731
    against(
        lambda: step(attention),
        {"math": math} if fits(math) else {},
        cost=cost(case[1], FORWARD, BACKWARD, TANGENT, SECOND_ORDER),
        rounds=9,
    )


@pytest.mark.parametrize("case", SHAPES, ids=ids)
def test_tangent(against, device, case):
    """torch.func.jvp with respect to query, key and value."""
    tensors = tuple(inputs(case[1], device, requires_grad=False))
    directions = tuple(t.flip(2) for t in tensors)
    plain = lambda: torch.func.jvp(formula, tensors, directions)  # noqa: E731
    against(
        lambda: torch.func.jvp(attention, tensors, directions),
        {"formula": plain} if fits(plain) else {},
        cost=cost(case[1], FORWARD, TANGENT),
        rounds=9,
    )
