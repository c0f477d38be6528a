"""Attention with few keys on CPU: fastgen's own kernels serve it, and give what the formula gives."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen import backend, reference
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.ops.attention import direct, short
from fastgen.testing import assert_accurate

SIZES = [(16, 2, 49, 49, 32), (8, 4, 33, 80, 64), (16, 2, 70, 17, 40), (8, 4, 40, 256, 16)]
MASKS = ("none", "padding", "boolean", "rows masked", "bias", "bias per key")
CASES = [(sizes, kind) for sizes in SIZES[:2] for kind in MASKS] + [(sizes, "bias") for sizes in SIZES[2:]]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    reason = backend.why_not_compiled("cpu_attention_backward", torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr("fastgen.ops.attention.short.LEAST_WORK", 1)


def mask_of(kind, batch, heads, queries, keys):
    generator = torch.Generator().manual_seed(1)
    return {
        "padding": torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1, 1, 1), generator=generator),
        "boolean": torch.rand(batch, 1, queries, keys, generator=generator) > 0.4,
        "rows masked": (torch.arange(queries) > 2).view(1, 1, queries, 1).expand(1, 1, queries, keys).contiguous(),
        "bias": torch.randn(1, heads, queries, keys, generator=generator),
        "bias per key": torch.randn(batch, 1, 1, keys, generator=generator),
    }.get(kind)


def make(sizes, rows_first=False):
    batch, heads, queries, keys, dim = sizes
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys)
    if rows_first:
        return [torch.randn(batch, n, heads, dim, generator=generator).transpose(1, 2) for n in lengths]
    return [torch.randn(batch, heads, n, dim, generator=generator) for n in lengths]


def with_gradients(function, tensors, mask):
    leaves = [t.detach().requires_grad_() for t in tensors]
    learned = [] if mask is None or mask.dtype == torch.bool or mask.size(2) == 1 else [mask.detach().requires_grad_()]
    out = function(*leaves, learned[0] if learned else mask)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, [*leaves, *learned], weights)]


def formula(query, key, value, mask):
    return reference.attention(query, key, value, mask)[0]


@pytest.mark.parametrize("level", backend.cpu_levels())
@pytest.mark.parametrize(("sizes", "kind"), CASES, ids=str)
def test_results_and_gradients_are_as_accurate_as_those_of_the_formula(sizes, kind, level):
    tensors, mask = make(sizes, rows_first=sizes[1] == 4), mask_of(kind, *sizes[:4])
    with backend.use_cpu_level(level):
        ours = with_gradients(attention, tensors, mask)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    plain = with_gradients(formula, tensors, mask)
    exact = with_gradients(formula, [t.double() for t in tensors], wide)
    assert len(ours) == (5 if kind == "bias" else 4)
    for name, a, b, c in zip(("out", "query", "key", "value", "mask"), ours, plain, exact, strict=False):
        assert_accurate(a, b, c, name, 4e-6)


@pytest.mark.parametrize(("kind", "value"), [("padding", math.nan), ("padding", math.inf), ("bias", math.nan)])
@pytest.mark.parametrize("what", [1, 2], ids=["key", "value"])
def test_what_masked_keys_hold_has_no_effect(kind, value, what):
    tensors, mask = make(SIZES[0]), mask_of(kind, *SIZES[0][:4])
    if kind == "padding":
        mask[..., 40] = False
    else:
        mask[..., 40] = -math.inf
    wanted = with_gradients(attention, tensors, mask)
    tensors[what][:, :, 40] = value
    torch.testing.assert_close(with_gradients(attention, tensors, mask), wanted, rtol=0, atol=0)


def test_nan_in_a_query_and_infinite_scores_are_seen():
    query, key, value = make(SIZES[0])
    query[0, 0, 1, 2], query[0, 0, 2, 3], key[0, 0, :, 3] = math.nan, math.inf, 1.0
    out = attention(query, key, value)
    assert bool(out[0, 0, 1:3].isnan().all())
    assert bool(out[0, 0, 3:].isfinite().all())


def test_weights_sum_to_1_in_the_backward_pass_where_a_mask_moves_all_scores_of_a_row():
    tensors, mask = make(SIZES[0]), mask_of("bias", *SIZES[0][:4])
    mask[:, :, 5] -= 1e6  # float32 has a step of 0.06 there
    leaves = [t.requires_grad_() for t in tensors]
    grad_out = torch.zeros(tensors[0].shape)
    grad_out[:, :, 5] = 1.0
    (grad_value,) = torch.autograd.grad(attention(*leaves, mask), leaves[2], grad_out)
    torch.testing.assert_close(grad_value.sum(2), torch.ones(16, 2, 32))


@pytest.mark.parametrize("masked", [False, True], ids=["finite", "masked NaN"])
@pytest.mark.parametrize("kind", ["none", "padding", "bias"])
def test_second_derivatives_are_those_of_the_formula(kind, masked):
    tensors, mask = make((16, 2, 12, 20, 16)), mask_of(kind, 16, 2, 12, 20)
    if masked and mask is not None:
        mask[..., 19] = False if mask.dtype == torch.bool else -math.inf

    def derivatives(function, tensors, mask):
        leaves = [t.detach().requires_grad_() for t in tensors]
        if mask is not None and mask.is_floating_point():
            mask = mask.detach().requires_grad_()
            leaves.append(mask)
        first = torch.autograd.grad(function(*leaves[:3], mask).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = derivatives(formula, [t.double() for t in tensors], wide)
    if masked and mask is not None:
        tensors[1][:, :, 19] = math.nan
    for a, b in zip(derivatives(attention, tensors, mask), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


TAKEN = [
    ((16, 2, 49, 49, 32), {}, True),
    ((16, 2, 49, 49, 32), {"attn_mask": torch.zeros(49, 49).view(1, 1, 49, 49)}, True),
    ((16, 2, 49, 49, 32), {"is_causal": True}, False),
    ((15, 2, 49, 49, 32), {}, False),
    ((16, 2, 49, 257, 32), {}, False),
]


@pytest.mark.parametrize(("sizes", "options", "taken"), TAKEN, ids=str)
def test_few_keys_in_many_heads_take_the_kernels(sizes, options, taken):
    leaves = [t.requires_grad_() for t in make(sizes)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(*leaves, **options).sum().backward()
    names = {event.name for event in profile.events()}
    for name in ("forward", "backward"):
        assert (f"fastgen::cpu_attention_{name}" in names) == taken, name


def test_the_gradient_of_a_bias_has_the_same_bits_on_any_number_of_threads():
    tensors, mask = make(SIZES[0]), mask_of("bias", *SIZES[0][:4])
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(attention, tensors, mask))
    finally:
        torch.set_num_threads(threads)
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "boolean", "rows masked"])
def test_float16_is_computed_in_float32_where_the_processor_has_no_products_of_it(kind, rows_first, monkeypatch):
    sizes = SIZES[1]
    tensors, mask = [t.half() for t in make(sizes, rows_first)], mask_of(kind, *sizes[:4])
    served = []
    attend = short.attend
    monkeypatch.setattr(short, "attend", lambda *arguments: served.append(attend(*arguments)) or served[-1])
    monkeypatch.setattr(direct, "has_products", lambda dtype: True)
    attention(*tensors, mask)
    monkeypatch.setattr(direct, "has_products", lambda dtype: False)
    assert not served
    exact = formula(*(t.double() for t in tensors), mask)
    if kind == "padding":
        hidden = ~mask.squeeze(2).unsqueeze(-1)
        tensors[1:] = [t.masked_fill(hidden, math.nan) for t in tensors[1:]]
    out = attention(*tensors, mask)
    assert [wide.dtype for wide in served] == [torch.float32]
    assert (out.dtype, out.stride()) == (torch.float16, tensors[0].stride())
    torch.testing.assert_close(out.double(), exact, rtol=2**-11, atol=1e-6)
    assert attention(*(t.requires_grad_() for t in tensors), mask).requires_grad
    assert len(served) == 1
