"""Scaled dot-product attention: values, masks, derivatives, memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastgen
from benchmarks.shapes import ATTENTION_SHAPES
from fastgen import random, reference
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.ops.attention import blocked as _attention_blocked
from fastgen.ops.attention import fused as _attention_fused
from fastgen.testing import assert_accurate, largest_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Also with tiles so small that every loop of the blocked implementation runs."""
    if request.param == "many tiles":
        monkeypatch.setattr(_attention_blocked, "TILE_BYTES", 4096)


def tensors(shape, dtype=torch.float32, device="cpu", key_heads=None):
    query = torch.randn(shape.batch, shape.heads, shape.queries, shape.key_dim, device=device)
    heads = key_heads or shape.heads
    key = torch.randn(shape.batch, heads, shape.keys, shape.key_dim, device=device)
    value = torch.randn(shape.batch, heads, shape.keys, shape.value_dim, device=device)
    return [t.to(dtype) for t in (query, key, value)]


def mask_of(shape, dtype, device="cpu"):
    """The keyword arguments that the shape's kind of mask means."""
    if shape.mask == "causal":
        return {"is_causal": True}
    if shape.mask == "bias":
        return {"attn_mask": torch.randn(shape.heads, shape.queries, shape.keys, device=device).to(dtype)}
    if shape.mask == "padding":
        lengths = torch.randint(1, shape.keys + 1, (shape.batch, 1, 1, 1), device=device)
        return {"attn_mask": torch.arange(shape.keys, device=device) < lengths}
    return {}


def with_gradients(function, leaves, seed=3):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = function(*leaves)
    torch.manual_seed(seed)
    upstream = torch.randn(out.shape, dtype=torch.float64).to(torch.bfloat16).to(out)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def formula(query, key, value, attn_mask=None, is_causal=False):
    return reference.attention(query, key, value, attn_mask, None, -1, 0 if is_causal else -1)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_named_shapes_are_as_accurate_as_the_plain_formula(name, dtype, device):
    shape = ATTENTION_SHAPES[name].cut()
    leaves = tensors(shape, dtype, device)
    kwargs = mask_of(shape, dtype, device)
    bias = kwargs.get("attn_mask")
    wide = {**kwargs, "attn_mask": bias.double()} if bias is not None and bias.is_floating_point() else kwargs
    ours = with_gradients(lambda *t: attention(*t, **kwargs), leaves)
    plain = with_gradients(lambda *t: formula(*t, **kwargs), leaves)
    exact = with_gradients(lambda *t: formula(*t, **wide), [t.double() for t in leaves])
    for what, a, b, c in zip(("out", "query", "key", "value"), ours, plain, exact, strict=True):
        assert_accurate(a, b, c, what)


MASKS = ["none", "bool", "float", "bool per key", "float per head", "all dims 1"]


def make_mask(kind, batch, heads, queries, keys, dtype):
    return {
        "none": None,
        "bool": torch.rand(batch, heads, queries, keys) > 0.4,
        "float": torch.randn(queries, keys, dtype=dtype),
        "bool per key": torch.rand(batch, 1, 1, keys) > 0.4,
        "float per head": torch.randn(heads, 1, keys, dtype=dtype),
        "all dims 1": torch.randn(1, 1, 1, 1, dtype=dtype),
    }[kind]


GRID = [
    # Every pair of (mask, window), (mask, dropout), (lengths, causal), (head dims, groups) occurs.
    (mask, window, causal, dropout, lengths, dims, groups)
    for index, (mask, window, lengths) in enumerate(
        itertools.product(MASKS, [None, (2, 1), (0, None)], [(1, 1), (5, 9), (17, 3), (33, 64)])
    )
    for causal, dropout, dims, groups in [
        (
            bool(index & 1),
            0.0 if index % 3 else 0.4,
            [(8, 8), (3, 5), (16, 8), (4, 20)][(index + index // 4) % 4],
            1 + index % 2,
        )
    ]
]


@pytest.mark.parametrize(("mask", "window", "causal", "dropout", "lengths", "dims", "groups"), GRID)
def test_every_feature_matches_the_reference_in_float64(tiles, mask, window, causal, dropout, lengths, dims, groups):
    (queries, keys), (key_dim, value_dim), heads = lengths, dims, 4
    query = torch.randn(3, heads, queries, key_dim, dtype=torch.float64)
    key = torch.randn(3, heads // groups, keys, key_dim, dtype=torch.float64)
    value = torch.randn(3, heads // groups, keys, value_dim, dtype=torch.float64)
    leaves = [query, key, value]
    attn_mask = make_mask(mask, 3, heads, queries, keys, torch.float64)
    learned = attn_mask is not None and attn_mask.is_floating_point()
    if learned:
        leaves.append(attn_mask)
    left, right = (-1 if w is None else w for w in (window or (None, None)))
    right = 0 if causal else right
    keep = None
    if dropout:
        torch.manual_seed(7)
        seed = torch.randint(0, 2**63 - 1, (1,))
        groups_of_row = random.groups_per_row(keys)
        count = 3 * heads * queries
        uniform = random.uniform_rows(seed, torch.arange(count), count, groups_of_row, 0, groups_of_row)
        keep = ((uniform[:, :keys] >= dropout).double() / (1 - dropout)).reshape(3, heads, queries, keys)

    def both(out, lse):
        return torch.cat((out, lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)), dim=-1)

    def ours(q, k, v, m=attn_mask):
        torch.manual_seed(7)
        return both(*attention(q, k, v, m, dropout, causal, window=window, enable_gqa=True, return_lse=True))

    def wanted(q, k, v, m=attn_mask):
        return both(*reference.attention(q, k, v, m, keep, left, right))

    for a, b in zip(with_gradients(ours, leaves), with_gradients(wanted, leaves), strict=True):
        assert largest_error(a, b) < 1e-12


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
@pytest.mark.parametrize("lengths", [(7, 7), (5, 12), (12, 5)], ids=str)
def test_agrees_with_torch(kwargs, lengths):
    key_heads = 2 if "enable_gqa" in kwargs else 4
    query = torch.randn(2, 4, lengths[0], 8)
    key, value = torch.randn(2, 2, key_heads, lengths[1], 8).unbind(0)
    torch.testing.assert_close(
        attention(query, key, value, **kwargs), F.scaled_dot_product_attention(query, key, value, **kwargs)
    )


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_other_numbers_of_dims_work_as_in_torch(dims):
    lead = (2, 3, 2)[: dims - 2]
    query, key, value = (torch.randn(*lead, n, 8) for n in (5, 7, 7))
    mask = torch.rand(*lead[-1:], 5, 7) > 0.3
    torch.testing.assert_close(
        attention(query, key, value, mask),
        F.scaled_dot_product_attention(query, key, value, mask),
        equal_nan=True,
    )


@pytest.mark.parametrize("kind", ["bool", "float", "window", "no keys"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fully_masked_row_gives_zero_and_zero_gradients(kind, dropout):
    query, key, value = (torch.randn(2, 2, n, 8) for n in (6, 4, 4))
    kwargs = {"dropout_p": dropout}
    dead = slice(2, 3)
    if kind == "bool":
        mask = torch.ones(6, 4, dtype=torch.bool)
        mask[dead] = False
        kwargs["attn_mask"] = mask
    elif kind == "float":
        mask = torch.zeros(6, 4)
        mask[dead] = -math.inf
        kwargs["attn_mask"] = mask
    elif kind == "window":
        kwargs["window"], dead = (1, 0), slice(5, 6)
    else:
        key, value, dead = key[:, :, :0], value[:, :, :0], slice(0, 6)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    out, lse = attention(*leaves, **kwargs, return_lse=True)
    assert bool((out[:, :, dead] == 0).all())
    assert bool((lse[:, :, dead] == -math.inf).all())
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert bool((grads[0][:, :, dead] == 0).all())


@pytest.mark.parametrize("layout", ["BNHD", "packed", "last dim strided"])
def test_strided_inputs_give_the_contiguous_result(layout):
    base = torch.randn(2, 5, 3, 4, 8)  # (B, N, 3, H, D)
    if layout == "last dim strided":
        q, k, v = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in base.permute(2, 0, 3, 1, 4))
    else:
        q, k, v = base.permute(2, 0, 3, 1, 4)
        if layout == "BNHD":
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    dense = [t.contiguous() for t in (q, k, v)]
    for a, b in zip(with_gradients(attention, [q, k, v]), with_gradients(attention, dense), strict=True):
        torch.testing.assert_close(a, b)
    if layout == "BNHD":
        assert attention(q, k, v).transpose(1, 2).is_contiguous(), "merging the heads is a view"


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"is_causal": True}, {"window": (1, 2)}, {"dropout_p": 0.4}, {"attn_mask": "bool"}, {"attn_mask": "float"}],
    ids=str,
)
def test_derivatives_of_first_and_second_order_in_both_modes(kwargs, backend):
    leaves = [
        torch.randn(1, h, n, d, dtype=torch.float64, requires_grad=True)
        for h, n, d in ((2, 3, 2), (1, 4, 2), (1, 4, 3))
    ]
    if kwargs.get("attn_mask") == "bool":
        kwargs = {"attn_mask": torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)}
    elif kwargs.get("attn_mask") == "float":
        leaves.append(torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True))
        kwargs = {}

    def call(q, k, v, *mask):
        torch.manual_seed(1)
        out, lse = attention(q, k, v, *mask, enable_gqa=True, return_lse=True, **kwargs)
        return out, lse.masked_fill(lse == -math.inf, 0)

    def tangent(*leaves):
        directions = tuple(torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in leaves)
        return torch.func.jvp(call, leaves, directions)[1]

    with fastgen.use_backend(backend):
        fast = {"fast_mode": True}  # random projections of the Jacobians
        assert gradcheck(call, leaves, check_forward_ad=True, **fast)
        assert gradgradcheck(call, leaves, check_fwd_over_rev=True, **fast)
        assert gradcheck(tangent, leaves, **fast)


def test_a_gradient_penalty_gives_the_weight_gradients_of_plain_attention():
    """The case where opaque kernels are silently wrong."""
    x, weight = torch.randn(2, 2, 6, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)

    def penalty_gradient(attend):
        inputs, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        score = attend(inputs @ w, inputs @ w.t(), inputs).square().sum()
        (gradient,) = torch.autograd.grad(score, inputs, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), w)[0]

    torch.testing.assert_close(penalty_gradient(attention), penalty_gradient(formula))


def test_jvp_of_grad_is_the_hessian_vector_product():
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    direction = torch.randn_like(q)
    hessian = torch.func.hessian(lambda q: formula(q, k, v).square().sum())(q)
    wanted = (hessian.reshape(q.numel(), -1) @ direction.reshape(-1)).reshape(q.shape)
    _, got = torch.func.jvp(torch.func.grad(lambda q: attention(q, k, v).square().sum()), (q,), (direction,))
    torch.testing.assert_close(got, wanted)


def test_dual_numbers_through_a_backward_keep_their_tangent():
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    direction = torch.randn_like(q)

    def gradient_tangent(attend):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q.clone().requires_grad_(), direction)
            (grad,) = torch.autograd.grad(attend(dual, k, v).square().sum(), dual)
            return torch.autograd.forward_ad.unpack_dual(grad).tangent

    torch.testing.assert_close(gradient_tangent(attention), gradient_tangent(formula))


@pytest.mark.parametrize("mask_dim", [None, 0])
def test_vmap_of_values_and_gradients(mask_dim):
    query, key, value = (torch.randn(3, 2, 4, n, 8) for n in (5, 7, 7))
    mask = torch.randn(3, 4, 1, 7) if mask_dim == 0 else torch.randn(4, 1, 7)

    def loss(attend):
        return lambda q, k, v, m: attend(q, k, v, m).square().sum()

    dims = (0, 0, 0, mask_dim)
    mapped = torch.func.vmap(torch.func.grad(loss(attention), argnums=(0, 1, 2, 3)), in_dims=dims)(
        query, key, value, mask
    )
    for i in range(3):
        own = mask[i] if mask_dim == 0 else mask
        alone = torch.func.grad(loss(formula), argnums=(0, 1, 2, 3))(query[i], key[i], value[i], own)
        for a, b in zip(mapped, alone, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


def test_dropout_drops_the_wanted_share_and_scales_the_rest():
    value = torch.eye(64).expand(4, 2, 64, 64)
    flat = torch.zeros(4, 2, 64, 8)
    weights = attention(flat, flat, value, dropout_p=0.25) * 64
    kept = weights > 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 0.75))


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"window": (3, 3)}, {"dropout_p": 0.1}, {"attn_mask": True}, {"return_lse": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_autocast_changes_the_arguments_and_nothing_inside(options):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 40, 8, generator=generator).unbind()
    if "attn_mask" in options:
        options = {"attn_mask": torch.randn(40, 40, generator=generator)}

    def run(*inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        torch.manual_seed(1)
        out = attention(*inputs, **options)
        out = torch.cat([part.float().flatten() for part in (out if isinstance(out, tuple) else (out,))])
        return out, inputs

    with torch.autocast("cpu", torch.bfloat16):
        out, inputs = run(query, key, value)
    direct, lower = run(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert torch.equal(out, direct)
    out.sum().backward()
    direct.sum().backward()
    for ours, theirs in zip(inputs, lower, strict=True):
        assert torch.equal(ours.grad, theirs.grad.float())


def test_autocast_computes_in_the_lower_precision():
    query, key, value = (torch.randn(2, 2, 8, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(query, key, value, torch.zeros(8, 8))
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().sum(), query)[0].dtype == torch.float32


@pytest.mark.parametrize("kwargs", [{"dropout_p": 0.1}, {"window": (64, 64)}, {"attn_mask": "bias"}], ids=str)
def test_no_buffer_of_the_size_of_the_scores(kwargs, monkeypatch):
    """Largest single allocation of forward and backward, with tiles of 1 MiB, against N x M floats."""
    monkeypatch.setattr(_attention_blocked, "TILE_BYTES", 2**20)
    length = 4096
    if kwargs.get("attn_mask") == "bias":
        kwargs = {"attn_mask": torch.randn(1, length, requires_grad=True)}
    query, key, value = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attention(query, key, value, **kwargs).sum().backward()
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest < length * length * 4 / 4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_depends_on_threads(dropout):
    """The compiled helpers share rows out among threads; for other tests a worker of pytest-xdist has one."""
    inputs = [torch.randn(2, 3, rows, dim, requires_grad=True) for rows, dim in ((200, 8), (300, 8), (300, 32))]

    def derivatives():
        torch.manual_seed(1)
        out, tangent = torch.func.jvp(lambda *t: attention(*t, dropout_p=dropout), tuple(inputs), tuple(inputs))
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return [out, tangent, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)]

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(derivatives())
    finally:
        torch.set_num_threads(threads)
    for results in found[1:]:
        torch.testing.assert_close(results, found[0])


@pytest.mark.parametrize("dims", [(16, 16), (8, 32)], ids=str)
def test_reference_backend_is_the_same_function(dims):
    query, key, value = torch.randn(2, 2, 8, dims[0]), torch.randn(2, 2, 8, dims[0]), torch.randn(2, 2, 8, dims[1])
    with fastgen.use_backend("torch"):
        again = attention(query, key, value)
    torch.testing.assert_close(again, attention(query, key, value))


MASK_STRIDES = {
    "transposed": lambda dtype: torch.randn(2, 3, 29, 23, dtype=dtype).mT,
    "one for all": lambda dtype: torch.randn(29, 23, dtype=dtype).t()[None, None],
    "every other column": lambda dtype: torch.randn(2, 1, 23, 58, dtype=dtype)[..., ::2],
    "heads last": lambda dtype: torch.randn(2, 23, 29, 3, dtype=dtype).permute(0, 3, 1, 2),
    "per key": lambda dtype: torch.randn(29, 2, dtype=dtype).t()[:, None, None],
}


@pytest.mark.parametrize("strides", MASK_STRIDES)
@pytest.mark.parametrize(("dtype", "mask_dtype"), [(d, d) for d in (*DTYPES, torch.float64)] + [(torch.bfloat16, None)])
def test_a_float_mask_may_have_any_strides(strides, dtype, mask_dtype):
    """Values and gradients are those of its contiguous copy, and torch's kernel never gets another last stride."""
    mask = MASK_STRIDES[strides](mask_dtype or torch.float32)
    assert mask.stride(-1) != 1
    results = []
    for given in (mask, mask.contiguous()):
        torch.manual_seed(1)
        leaves = [torch.randn(2, 3, n, 16, dtype=dtype).requires_grad_() for n in (23, 29, 29)]
        out = attention(*leaves, attn_mask=given)
        results.append([out, *torch.autograd.grad(out.double().sin().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exact = reference.attention(*(t.detach().double() for t in leaves), mask.double())[0]
    assert largest_error(results[0][0], exact) < 8 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert _attention_fused.additive(mask, dtype).stride(-1) == 1


def test_a_mask_that_broadcasts_over_keys_is_not_copied():
    mask = torch.randn(2, 3, 23, 1).expand(2, 3, 23, 29)
    assert _attention_fused.additive(mask, torch.float32) is mask
