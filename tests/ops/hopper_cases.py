"""What the tests of the attention kernels for sm_90a have in common."""

from __future__ import annotations

import torch

from fastgen import backend, environment
from tests.covering import covering
from tests.emulator import build
from tests.ops.attention_cases import LAYOUTS, Case
from tests.ops.test_attention_kernels import PLAIN

HOPPER = {"shared_limit": backend.plans.SHARED_LIMITS["sm_90"]}
CAUSAL = PLAIN._replace(window_right=0)
MASKS = ("none", "causal", "window", "causal window", "bool per key")
DTYPES = (torch.bfloat16, torch.float16)
DERIVATIVE_DIMS = [(64, 40), (96, 72), (128, 128)]
GROUPS = ((2, 2), (2, 1))


def derivative_cases(queries, keys, dims=DERIVATIVE_DIMS):
    """Cases with each pair of settings; ``dims``: head dims of query and value, by default those of the derivatives."""
    axes = [dims, queries, keys, MASKS, DTYPES, GROUPS, LAYOUTS]
    return [
        Case(dtype, dims, n, m, mask, heads=heads, layout=layout, batch=1 + (n * m < 60))
        for dims, n, m, mask, dtype, heads, layout in covering(axes, lambda point: True)
    ]


def emulated_hopper(emulator, monkeypatch):
    """The emulated operators, with the kernels for sm_90a."""
    build.register()
    monkeypatch.setenv("FASTGEN_SM90", "1")
    emulator.configure(**HOPPER)
    return torch.ops.fastgen_emulated


def launches_of(emulator, *kernels):
    statistics = emulator.statistics()
    return [statistics.get(kernel, {"launches": 0})["launches"] for kernel in kernels]


def shapes_of(heads, queries, keys, dims, key_heads=None):
    """Of query, key and value, without the batch."""
    key_heads = key_heads or heads
    return [(heads, queries, dims[0]), (key_heads, keys, dims[0]), (key_heads, keys, dims[1])]


def operands(heads=2, queries=200, keys=300, dims=(64, 64), dtype=torch.bfloat16, batch=1, key_heads=None):
    """query, key and value, and a tangent of each."""
    return [torch.randn(batch, *shape).to(dtype) for shape in 2 * shapes_of(heads, queries, keys, dims, key_heads)]


def without_tangents(*absent):
    """Operands of which some have no tangent."""
    return [None if place - 3 in absent else t for place, t in enumerate(operands(1, 40, 50))]


def with_expanded_tangent():
    """The tangent of a scalar's broadcast."""
    return [*operands(1, 40, 50)[:5], torch.ones(64, dtype=torch.bfloat16).expand(1, 1, 50, 64)]


def forward_of(query, key, value, mask, options):
    """out and logsumexp of PyTorch in float64, in the dtypes of the operators; NaN and infinities in keys as 0."""
    wide = [t.double() for t in (query, key, value)]
    wide[1:] = [t.nan_to_num(0, 0, 0).repeat_interleave(query.size(1) // key.size(1), 1) for t in wide[1:]]
    out, lse = torch.ops.fastgen_torch.attention_forward(*wide, mask, None, None, *options)
    return out.to(query.dtype), lse.to(torch.promote_types(query.dtype, torch.float32))


def assert_equal_results(results):
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def assert_info_says(monkeypatch, operator, given, text):
    """``fastgen info`` on an H100 with FASTGEN_SM90 as given. Second order has no kernels for sm_90a."""
    monkeypatch.setenv("FASTGEN_SM90", given)
    monkeypatch.setattr(backend, "compiled_architectures", lambda: ["80", "90a"])
    monkeypatch.setattr(backend, "why_not_compiled", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert text in environment._served_by(operator, torch.device("cuda", 0))
    assert "sm_90a" not in environment._served_by("attention_second_order", torch.device("cuda", 0))
