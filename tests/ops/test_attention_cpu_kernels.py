"""fastgen's fused attention kernels on CPU: values, gradients, tangents and second order against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastgen import backend, random, reference
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.testing import assert_accurate

SIZES = [
    # (B, H, Hk, N, M, Dk, Dv): rows and keys below, at and above tiles of 96, head dims around whole vectors
    (2, 4, 2, 5, 7, 8, 16),
    (1, 1, 1, 97, 128, 8, 64),
    (2, 2, 1, 200, 129, 3, 48),
    (1, 3, 3, 1, 1, 1, 17),
    (2, 2, 2, 49, 49, 32, 32),
    (1, 2, 2, 192, 257, 40, 33),
    (1, 1, 1, 30, 700, 72, 5),
]
MASKS = ("none", "causal", "window", "bool", "float", "float per key", "bool per row")
SCALE = 0.3


def cpu_kernel(name):
    reason = backend.why_not_compiled(name, torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    return backend.operator("fastgen", name)


class Call:
    """Arguments of the kernels, of the formulas, and their float64 versions."""

    def __init__(self, sizes, kind="none", dropout=0.0, layout="BHND"):
        batch, heads, key_heads, queries, keys, key_dim, value_dim = sizes
        self.tensors = [
            self._matrix(batch, *shape, layout)
            for shape in ((heads, queries, key_dim), (key_heads, keys, key_dim), (key_heads, keys, value_dim))
        ]
        self.directions = [torch.randn_like(t) for t in self.tensors]
        self.mask = {
            "bool": torch.rand(batch, 1, queries, keys) > 0.4,
            "float": torch.randn(1, heads, queries, keys),
            "float per key": torch.randn(batch, 1, 1, keys),
            "bool per row": torch.rand(1, heads, queries, 1) > 0.2,
        }.get(kind)
        self.window = {"causal": (-1, 0), "window": (keys // 3, 2)}.get(kind, (-1, -1))
        learned = self.mask is not None and self.mask.is_floating_point()
        self.of_mask = torch.randn_like(self.mask) if learned else None
        self.upstream = [self._matrix(batch, heads, queries, value_dim, layout), torch.randn(batch, heads, queries)]
        self.dropout, self.seed, self.keep = dropout, None, None
        if dropout:
            self.seed, groups, rows = torch.tensor([3]), random.groups_per_row(keys), batch * heads * queries
            uniform = random.uniform_rows(self.seed, torch.arange(rows), rows, groups, 0, groups)[:, :keys]
            self.keep = ((uniform >= dropout).float() / (1 - dropout)).reshape(batch, heads, queries, keys)

    @staticmethod
    def _matrix(batch, heads, rows, dim, layout):
        if layout == "BNHD":
            return torch.randn(batch, rows, heads, dim).transpose(1, 2)
        return torch.randn(batch, heads, rows, dim)

    @property
    def options(self):
        return self.dropout, *self.window, SCALE

    def formula(self, function, dtype, *before, directions=()):
        """``function`` of the oracle in this dtype."""
        wide = [None if t is None or t.dtype == torch.bool else t.to(dtype) for t in (*before, *self.tensors)]
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.to(dtype)
        directions = [None if t is None else t.to(dtype) for t in directions]
        keep = None if self.keep is None else self.keep.to(dtype)
        return function(*wide, mask, *directions, keep, *self.window, SCALE)

    def results(self):
        """out and lse, rounded from the formula in float64."""
        return [t.float() for t in self.formula(reference.attention, torch.float64)]

    def check(self, ours, function, *before, directions=(), names):
        plain = self.formula(function, torch.float32, *before, directions=directions)
        exact = self.formula(function, torch.float64, *before, directions=directions)
        lse = self.results()[1]
        largest = float(lse[lse.isfinite()].abs().max()) if bool(lse.isfinite().any()) else 0.0
        for name, a, b, c in zip(names, ours, plain, exact, strict=False):
            if c is None:
                continue
            # Rounding lse changes each weight by that much; where terms cancel, such as with one key, nothing is left.
            size = float(c[c.isfinite()].abs().max()) if c.numel() else 0.0
            allowance = torch.finfo(torch.float32).eps * largest * size + 2e-6
            assert a.shape == c.shape, name
            torch.testing.assert_close(a.isfinite(), c.isfinite())
            finite = c.isfinite()
            assert_accurate(a[finite], b[finite], c[finite], name, allowance)


GRID = [
    *((sizes, kind, 0.0, "BHND") for sizes in SIZES for kind in ("none", "causal")),
    *((SIZES[2], kind, dropout, "BHND") for kind in MASKS for dropout in (0.0, 0.3)),
    *((SIZES[i], "float", 0.3, "BNHD") for i in (0, 4, 5)),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_forward_kernel_is_as_accurate_as_the_plain_formula(case):
    kernel, call = cpu_kernel("cpu_attention_forward"), Call(*case)
    ours = kernel(*call.tensors, call.mask, call.seed, *call.options)
    call.check(ours, reference.attention, names=("out", "lse"))


@pytest.mark.parametrize("of_lse", [False, True], ids=["of out", "of out and lse"])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_backward_kernel_is_as_accurate_as_the_plain_formula(case, of_lse):
    kernel, call = cpu_kernel("cpu_attention_backward"), Call(*case)
    mask_grad = case[1] == "float"
    grad_out, grad_lse = call.upstream
    grad_lse = grad_lse if of_lse else None
    ours = kernel(grad_out, grad_lse, *call.tensors, *call.results(), call.mask, call.seed, *call.options, mask_grad)
    zero = torch.zeros_like(call.upstream[1])
    names = ("query", "key", "value", "mask")[: 3 + mask_grad]
    call.check(ours, reference.attention_backward, grad_out, zero if grad_lse is None else grad_lse, names=names)


@pytest.mark.parametrize("absent", [(), (2,), (0, 3), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_kernels_of_second_order_are_as_accurate_as_the_plain_formula(case, absent):
    call = Call(*case)
    if absent and case[0] != SIZES[2] and case[0] != SIZES[4]:
        pytest.skip("absent directions: at two sizes")
    directions = [None if i in absent else t for i, t in enumerate((*call.directions, call.of_mask))]
    out, lse = call.results()
    rest = call.mask, call.seed, *directions, *call.options
    tangents = cpu_kernel("cpu_attention_tangent")(*call.tensors, out, lse, *rest)
    ours = cpu_kernel("cpu_attention_second_order")(*call.upstream, *call.tensors, out, lse, *rest)
    names = ("grad of grad_out", "grad of grad_lse", "query", "key", "value")
    call.check(ours, reference.attention_second_order, *call.upstream, directions=directions, names=names)
    call.check(tangents, reference.attention_tangent, directions=directions, names=("out", "lse"))


@pytest.mark.parametrize("window", [(-1, -1), (10, 10)])
def test_directions_with_a_large_part_in_common_lose_no_more_digits_than_in_the_formula(window):
    """w is of the size of that part, and what counts is the difference from it. Rows with a window of 21 keys have no
    weight in the first block of keys of their tile."""
    call = Call((1, 2, 2, 300, 300, 16, 16))
    call.directions[1] += 100.0
    call.window = window
    out, lse = call.results()
    rest = out, lse, None, None, *call.directions, None, *call.options
    ours = cpu_kernel("cpu_attention_second_order")(*call.upstream, *call.tensors, *rest)
    tangents = cpu_kernel("cpu_attention_tangent")(*call.tensors, *rest)
    names = ("grad of grad_out", "grad of grad_lse", "query", "key", "value")
    directions = [*call.directions, None]
    call.check(ours, reference.attention_second_order, *call.upstream, directions=directions, names=names)
    call.check(tangents, reference.attention_tangent, directions=directions, names=("out", "lse"))


def test_a_row_without_weights_gives_no_gradients():
    call = Call((1, 1, 1, 5, 7, 8, 16))
    nothing, out = torch.full((1, 1, 5), -math.inf), torch.zeros(1, 1, 5, 16)
    backward = cpu_kernel("cpu_attention_backward")
    second_order = cpu_kernel("cpu_attention_second_order")
    plain, options = (*call.tensors, out, nothing, None, None), (0.0, -1, -1, SCALE)
    grads = backward(*call.upstream, *plain, *options, False)[:3]
    for grad in (*grads, *second_order(*call.upstream, *plain, *call.directions, None, *options)):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 20, 30), (1, 3, 20, 30), (2, 1, 20, 30), (1, 1, 20, 30)], ids=str)
@pytest.mark.parametrize("key_heads", [1, 3])
def test_the_gradient_of_a_mask_is_summed_where_it_is_broadcast(shape, key_heads):
    call = Call((2, 3, key_heads, 20, 30, 8, 8))
    call.mask = torch.randn(shape)
    backward = cpu_kernel("cpu_attention_backward")
    arguments = call.mask, None, *call.options, True
    ours = backward(*call.upstream, *call.tensors, *call.results(), *arguments)
    call.check(ours, reference.attention_backward, *call.upstream, names=("query", "key", "value", "mask"))


def test_masked_keys_do_not_reach_the_gradients():
    cpu_kernel("cpu_attention_backward")

    def gradients(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = attention(*leaves, is_causal=True)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    query, key, value = Call((1, 1, 1, 100, 200, 8, 32)).tensors
    wanted = gradients(query, key, value)
    key[:, :, 100:], value[:, :, 100:] = math.nan, math.inf
    torch.testing.assert_close(gradients(query, key, value), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 250, 1000, 16, 32), (3, 4, 2, 50, 100, 8, 16)], ids=str)
def test_derivatives_have_the_same_bits_on_any_number_of_threads(sizes):
    call, threads, found = Call(sizes, "float"), torch.get_num_threads(), []
    backward, second_order = cpu_kernel("cpu_attention_backward"), cpu_kernel("cpu_attention_second_order")
    out, lse = call.results()
    given = (*call.upstream, *call.tensors, out, lse, call.mask, None)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            second = second_order(*given, *call.directions, call.of_mask, *call.options)
            found.append([*backward(*given, *call.options, True), *second])
    finally:
        torch.set_num_threads(threads)
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0], rtol=0, atol=0)


KWARGS = [
    ({}, True),
    ({"is_causal": True}, True),
    ({"window": (5, 3)}, True),
    ({"dropout_p": 0.2}, True),
    ({"attn_mask": torch.zeros(150)}, True),
    ({"attn_mask": torch.ones(150, dtype=torch.bool)}, True),
    ({"softcap": 2.0}, False),
]


@pytest.mark.parametrize(("kwargs", "taken"), KWARGS, ids=str)
def test_the_kernels_serve_unequal_heads_in_float32_without_softcap(kwargs, taken):
    cpu_kernel("cpu_attention_backward")
    tensors = [torch.randn(1, 2, 150, dim, requires_grad=True) for dim in (16, 16, 32)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        grads = torch.autograd.grad(attention(*tensors, **kwargs).square().sum(), tensors, create_graph=True)
        torch.autograd.grad(grads[0].sum(), tensors)
        torch.func.jvp(lambda *t: attention(*t, **kwargs), tuple(tensors), tuple(tensors))
    names = {event.name for event in profile.events()}
    for name in ("forward", "backward", "tangent", "second_order"):
        assert (f"fastgen::cpu_attention_{name}" in names) == taken, name


EQUAL = [({}, False), ({"attn_mask": torch.zeros(150)}, False), ({"dropout_p": 0.2}, True), ({"window": (5, 3)}, True)]


@pytest.mark.parametrize(("kwargs", "taken"), EQUAL, ids=str)
def test_at_equal_head_dims_they_serve_what_the_kernel_of_torch_does_not_take(kwargs, taken):
    cpu_kernel("cpu_attention_backward")
    tensors = [torch.randn(1, 2, 150, 16, requires_grad=True) for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(*tensors, **kwargs).sum().backward()
    names = {event.name for event in profile.events()}
    for name in ("forward", "backward"):
        assert (f"fastgen::cpu_attention_{name}" in names) == taken, name


def test_large_scores_survive_and_nan_passes_on():
    cpu_kernel("cpu_attention_forward")
    query, key, value = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 200, 8), torch.randn(1, 1, 200, 16)
    query[0, 0, 0] *= 1e4
    query[0, 0, 1] = float("nan")
    out, lse = attention(query, key, value, return_lse=True)
    assert bool(out[0, 0, 1].isnan().all())
    others = [0, *range(2, 8)]
    wanted = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(out[0, 0, others].double(), wanted[0, 0, others], rtol=1e-4, atol=1e-4)
    assert bool(lse[0, 0, others].isfinite().all())
