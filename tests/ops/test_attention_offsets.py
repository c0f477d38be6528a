"""Windows with negative bounds, for queries that begin elsewhere than the keys, and attention sinks: values and every
derivative are those of the formula with a mask, and of a softmax with one more logit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import jvp, vmap
from torch.nn.attention.bias import causal_lower_right

import fastgen
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.testing import assert_accurate

SIZES = [(7, 12), (12, 7), (9, 9), (3, 20), (20, 3), (1, 6)]  # queries, keys
WINDOWS = [(None, -2), (-3, None), (4, -2), (-2, 5), (-2, 2), (2, -2), (None, -30), (-30, None), (None, 4), (1, -3)]


def formula(query, key, value, mask=None, window=(None, None), sinks=None):
    """With scores in full. Fully masked rows: 0 and -inf."""
    offset = torch.arange(key.size(2)) - torch.arange(query.size(2))[:, None]
    left, right = window
    allowed = torch.ones_like(offset, dtype=torch.bool)
    allowed &= offset >= (-math.inf if left is None else -left)
    allowed &= offset <= (math.inf if right is None else right)
    key, value = (t.repeat_interleave(query.size(1) // key.size(1), 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.size(3))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    scores = scores.masked_fill(~allowed, -math.inf)
    extra = (
        torch.full_like(scores[..., :1], -1e4) if sinks is None else sinks.view(1, -1, 1, 1).expand_as(scores[..., :1])
    )
    scores = torch.cat((scores, extra), -1)  # never fully masked
    lse = scores.logsumexp(-1)
    return scores.softmax(-1)[..., :-1] @ value, lse if sinks is not None else lse.masked_fill(lse < -9e3, -math.inf)


def problem(queries, keys, heads=4, key_heads=4, dtype=torch.float64):
    torch.manual_seed(queries * 100 + keys)
    shapes = ((2, heads, queries, 8), (2, key_heads, keys, 8), (2, key_heads, keys, 5))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_same(ours, right, tensors):
    """Values, gradients, tangents, and gradients of a gradient's square."""
    results = []
    for function in (ours, right):
        out, lse = function(*tensors)
        finite = lse.masked_fill(lse == -math.inf, 0)
        # A row without keys has no gradient; the formula's own would be NaN.
        score = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + finite.square().sum()
        grads = torch.autograd.grad(score, tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
        tangents = tuple(torch.ones_like(t) for t in tensors)
        _, (dout, dlse) = jvp(function, tuple(t.detach() for t in tensors), tangents)
        results.append((out, lse, *grads, *second, dout, dlse))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_windows_of_any_bounds(sizes, window, backend):
    with fastgen.use_backend(backend):
        assert_same(
            lambda q, k, v: attention(q, k, v, window=window, return_lse=True),
            lambda q, k, v: formula(q, k, v, window=window),
            problem(*sizes),
        )


@pytest.mark.parametrize("window", [(None, -2), (-3, None), (4, -2), (-2, 5)], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 7, 12), (1, 1, 1, 12), (2, 1, 7, 1)], ids=str)
def test_masks_beside_negative_bounds(shape, window):
    tensors = problem(7, 12, key_heads=2)
    options = {"window": window, "enable_gqa": True, "return_lse": True}
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert_same(
        lambda q, k, v, b: attention(q, k, v, b, **options),
        lambda q, k, v, b: formula(q, k, v, b, window),
        [*tensors, bias],
    )
    allowed = torch.rand(shape) > 0.3
    assert_same(
        lambda q, k, v: attention(q, k, v, allowed, **options),
        lambda q, k, v: formula(q, k, v, allowed, window),
        tensors,
    )


def test_causal_with_the_last_query_at_the_last_key():
    """As in FlashAttention and for a cache: bottom-right alignment, for more keys than queries and for fewer."""
    for queries, keys in SIZES:
        q, k, v = problem(queries, keys)
        bias = causal_lower_right(queries, keys)
        expected, _ = formula(q, k, v, window=(None, keys - queries))
        torch.testing.assert_close(attention(q, k, v, window=(None, keys - queries)), expected)
        torch.testing.assert_close(attention(q, k, v, bias), expected)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("local", [None, (40, 0), (17, 30)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 239), (113, 203), (108, 256), (203, 113), (64, 128), (129, 129)], ids=str)
def test_windows_aligned_at_the_last_query_and_key(sizes, local, backend):
    """FlashAttention's causal and local attention: positions count from the last query and the last key."""
    queries, keys = sizes
    offset = keys - queries
    window = (None, offset) if local is None else (local[0] - offset, local[1] + offset)
    leaves = [t.detach().to(torch.bfloat16) for t in problem(queries, keys, heads=2, key_heads=1, dtype=torch.float32)]
    rows, columns = torch.arange(queries)[:, None] + offset, torch.arange(keys)
    mask = columns <= rows if local is None else (columns >= rows - local[0]) & (columns <= rows + local[1])

    def results(function, dtype):
        tensors = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        out, lse = function(*tensors)
        score = (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        return [out, lse, *torch.autograd.grad(score, tensors)]

    with fastgen.use_backend(backend):
        ours = results(lambda *t: attention(*t, window=window, enable_gqa=True, return_lse=True), torch.bfloat16)
    plain, exact = (results(lambda *t: formula(*t, mask=mask), dtype) for dtype in (torch.bfloat16, torch.float64))
    for name, *values in zip(("out", "lse", "grad query", "grad key", "grad value"), ours, plain, exact, strict=True):
        assert_accurate(*values, name)


def test_negative_bounds_with_fewer_dims_half_precision_dropout_and_transforms():
    q, k, v = (t.detach() for t in problem(7, 12))
    window = (5, -2)
    expected, _ = formula(q, k, v, window=window)
    torch.testing.assert_close(attention(q[0], k[0], v[0], window=window), expected[0])
    torch.testing.assert_close(attention(q[0, 0], k[0, 0], v[0, 0], window=window), expected[0, 0])
    torch.testing.assert_close(vmap(lambda *t: attention(*t, window=window))(q, k, v), expected)
    low = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), window=window)
    torch.testing.assert_close(low.double(), expected, rtol=0.03, atol=0.03)
    dropped = attention(q, k, v, window=window, dropout_p=0.5)
    assert dropped.isfinite().all()
    assert (dropped[:, :, :2] == 0).all()  # the first queries attend to no key
    compiled = torch.compile(lambda *t: attention(*t, window=window), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), expected)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("window", [(None, None), (3, 0), (None, -2)], ids=str)
def test_sinks(window, backend):
    """A softmax with one more logit, which has no value. Rows that attend to no key attend to the sink alone."""
    tensors = [*problem(9, 12, key_heads=2), torch.randn(4, dtype=torch.float64, requires_grad=True)]
    options = {"window": window, "enable_gqa": True, "return_lse": True}
    with fastgen.use_backend(backend):
        assert_same(
            lambda q, k, v, s: attention(q, k, v, sinks=s, **options),
            lambda q, k, v, s: formula(q, k, v, None, window, s),
            tensors,
        )


def test_sinks_far_from_the_scores_and_in_half_precision():
    q, k, v = (t.detach() for t in problem(5, 6))
    for size in (-1e4, 1e4):
        sinks = torch.full((4,), size, dtype=torch.float64, requires_grad=True)
        out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
        expected, right = formula(q, k, v, sinks=sinks)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, right)
        assert torch.autograd.grad(out.sum() + lse.sum(), sinks)[0].isfinite().all()
    sinks = torch.randn(4)
    low = attention(*(t.to(torch.bfloat16) for t in (q, k, v)), sinks=sinks)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), formula(q, k, v, sinks=sinks.double())[0], rtol=0.03, atol=0.03)
