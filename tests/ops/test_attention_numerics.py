"""Numerics of attention: large scores, rows with one key or none, infinities, NaN that must not leak."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen import reference
from fastgen.backend import current_backend
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.testing import assert_accurate, largest_error
from tests.ops.attention_cases import DTYPES

N, M, D = 70, 83, 24


def tensors(dtype, device, heads=2):
    return [torch.randn(1, heads, n, D).to(dtype).to(device).requires_grad_() for n in (N, M, M)]


def results(function, leaves, **kwargs):
    out, lse = function(*leaves, return_lse=True, **kwargs)
    loss = out.double().sin().sum() + lse.masked_fill(lse == -math.inf, 0).double().sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def formula(query, key, value, attn_mask=None, return_lse=True, is_causal=False):
    return reference.attention(query, key, value, attn_mask, None, -1, 0 if is_causal else -1)


def compare(leaves, device, kwargs):
    """Results on the device, of the formula in the same dtype, and of the formula in float64."""
    ours = [t.cpu() for t in results(attention, leaves, **kwargs)]
    host = [t.detach().cpu() for t in leaves]
    mask = kwargs.get("attn_mask")
    on_host = kwargs if mask is None else {**kwargs, "attn_mask": mask.cpu()}
    wide = on_host
    if mask is not None and mask.is_floating_point():
        wide = {**kwargs, "attn_mask": mask.cpu().double()}
    plain = results(formula, [t.clone().requires_grad_() for t in host], **on_host)
    exact = results(formula, [t.double().requires_grad_() for t in host], **wide)
    for name, a, b, c in zip(("out", "lse", "query", "key", "value"), ours, plain, exact, strict=True):
        assert_accurate(a, b, c, name)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_ten_thousand(attention_place, dtype):
    query, key, value = (t.detach() for t in tensors(dtype, attention_place))
    query[:, :, ::3] *= 1e4 / 5
    ours = results(attention, [t.requires_grad_() for t in (query, key, value)])
    exact = results(formula, [t.detach().cpu().double().requires_grad_() for t in (query, key, value)])
    score = float((query.detach().double() @ key.detach().double().mT).abs().max()) / D**0.5
    assert score > 5e3
    assert all(bool(t.isfinite().all()) for t in ours)
    eps = torch.finfo(torch.float32).eps
    assert largest_error(ours[1].cpu(), exact[1]) < 8 * eps * score
    # A weight's relative error is the absolute one of its score and logsumexp.
    for a, b in zip((ours[0], *ours[2:]), (exact[0], *exact[2:]), strict=True):
        size = float(b.abs().max())
        assert largest_error(a.cpu(), b) < (8 * eps * score + 4 * torch.finfo(dtype).eps) * size * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_equal_scores(attention_place, dtype):
    leaves = tensors(dtype, attention_place)
    with torch.no_grad():
        leaves[0][:, :, 5] = 0
        leaves[1][:, :, :] = leaves[1][:, :, :1]
    ours = compare(leaves, attention_place, {})
    mean = leaves[2].detach().double().mean(2).cpu()
    assert largest_error(ours[0][:, :, 5], mean) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_surviving_key_for_each_query(attention_place, dtype, kind):
    leaves = tensors(dtype, attention_place)
    survivor = torch.randperm(M)[:N]
    seen = torch.zeros(N, M, dtype=torch.bool)
    seen[torch.arange(N), survivor] = True
    seen[7] = False
    mask = seen if kind == "bool" else torch.zeros(N, M).masked_fill_(~seen, -math.inf)
    ours = results(attention, leaves, attn_mask=mask.to(attention_place))
    wanted = leaves[2].detach().cpu()[:, :, survivor]
    wanted[:, :, 7] = 0
    # float32 as two tf32 numbers keeps 22 bits or more.
    allowed = 4 * torch.finfo(dtype).eps * float(wanted.detach().abs().max()) if dtype == torch.float32 else 0
    assert largest_error(ours[0].cpu(), wanted) <= allowed
    assert bool((ours[1][:, :, 7] == -math.inf).all())
    assert all(bool(t.isfinite().all()) for t in ours[2:])
    assert bool((ours[2][:, :, 7] == 0).all())


def test_infinities_of_a_bias_and_denormals(attention_place):
    leaves = tensors(torch.float32, attention_place)
    bias = torch.randn(2, N, M)
    bias[:, :, ::4] = -math.inf
    bias[:, 3] = -math.inf
    bias[:, 4, :] = 1e-41
    with torch.no_grad():
        leaves[0][:, :, 4] = 1e-40
        leaves[2][:, :, 9] = 1e-42
    compare(leaves, attention_place, {"attn_mask": bias.to(attention_place)})


PADDED = 40


@pytest.mark.parametrize("kind", ["bool per key", "float per key", "bool", "float", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e38])
def test_keys_that_no_query_attends_to_may_hold_anything(attention_place, dtype, kind, junk):
    """Keys and values from PADDED on contain junk: results equal those of the keys before, their gradients are 0."""
    leaves = tensors(dtype, attention_place)
    kwargs = {}
    if kind == "causal":
        leaves[0] = leaves[0].detach()[:, :, :PADDED].clone().requires_grad_()
        kwargs["is_causal"] = True
    else:
        sizes = (1, 1, 1, M) if "per key" in kind else (1, 1, N, M)
        seen = (torch.arange(M) < PADDED).expand(sizes).clone()
        if "per key" not in kind:
            seen[..., 5, 2:] = False
        if kind.startswith("float"):
            seen = torch.zeros(sizes).masked_fill_(~seen, -math.inf)
        kwargs["attn_mask"] = seen.to(attention_place)
    with torch.no_grad():
        for leaf in leaves[1:]:
            leaf[:, :, PADDED:] = junk
    ours = results(attention, leaves, **kwargs)
    short = [leaves[0], *(leaf.detach()[:, :, :PADDED].clone().requires_grad_() for leaf in leaves[1:])]
    if kind != "causal":
        kwargs["attn_mask"] = kwargs["attn_mask"][..., :PADDED]
    wanted = results(attention, short, **kwargs)
    tolerance = 8 * torch.finfo(dtype).eps
    for a, b in zip(ours[:3], wanted[:3], strict=True):
        assert largest_error(a, b) <= tolerance * float(b[b.isfinite()].abs().max())
    for a, b in zip(ours[3:], wanted[3:], strict=True):
        assert bool((a[:, :, PADDED:] == 0).all())
        assert largest_error(a[:, :, :PADDED], b) <= tolerance * float(b.abs().max())


def test_nan_that_is_seen_is_passed_on(attention_place):
    query, key, value = (t.detach() for t in tensors(torch.float32, attention_place))
    query[:, :, 3] = math.nan
    value[:, :, 60, 5] = math.nan
    out, lse = attention(query, key, value, is_causal=True, return_lse=True)
    assert bool(out[:, :, 3].isnan().all())
    assert bool(lse[:, :, 3].isnan().all())
    assert bool(out[:, :, 60:, 5].isnan().all())
    if current_backend() != "torch":  # whose matrix products multiply it by zero
        assert bool(out[:, :, 4:32].isfinite().all())
    assert bool(lse[:, :, 4:].isfinite().all())


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_nothing_in_gives_nothing_or_zero_out(attention_place, sizes):
    batch, heads, queries, keys = sizes
    shapes = ((queries, 8), (keys, 8), (keys, 16))
    leaves = [torch.randn(batch, heads, *shape).to(attention_place).requires_grad_() for shape in shapes]
    bias = torch.zeros(1, 1, 1, keys, device=attention_place, requires_grad=True)
    out, lse = attention(*leaves, bias, return_lse=True)
    assert out.shape == (batch, heads, queries, 16)
    assert lse.shape == (batch, heads, queries)
    out.sum().backward()
    assert all(bool((leaf.grad == 0).all()) for leaf in (*leaves, bias))
    assert bool((out == 0).all())


LARGE_SIZES = {"few": (1, 2, 5, 7, 8), "few keys": (4, 8, 32, 64, 32), "many": (1, 1, 150, 160, 16)}
LARGE_MASKS = ("bool", "float", "learned")


@pytest.mark.parametrize("kind", LARGE_MASKS)
@pytest.mark.parametrize(
    ("dtype", "dropout"), [(torch.float32, 0.0), (torch.float32, 0.3), (torch.bfloat16, 0.0)], ids=str
)
@pytest.mark.parametrize("sizes", LARGE_SIZES.values(), ids=LARGE_SIZES.keys())
@pytest.mark.parametrize("junk", [(1e38, 0), (0, 1e38), (-math.inf, 0), (1e38, -1e38)], ids=str)
def test_a_masked_key_that_overflows_changes_no_derivative_of_any_path(junk, sizes, dtype, kind, dropout):
    """Finite numbers, too, as uninitialized padding has them: products with them are infinite, their weight is 0."""
    batch, heads, queries, keys, dim = sizes
    generator = torch.Generator().manual_seed(0)

    def leaf(rows, low=0.0):
        return (torch.randn(batch, heads, rows, dim, generator=generator).abs() + low).to(dtype)

    query, key, value = leaf(queries, 2.0), leaf(keys), leaf(keys)
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    seen[..., -1] = False
    mask = seen if kind == "bool" else torch.zeros(1, 1, queries, keys, dtype=dtype).masked_fill_(~seen, -math.inf)

    def results(key_junk, value_junk):
        leaves = [t.clone() for t in (query, key, value)]
        leaves[1][:, :, -1], leaves[2][:, :, -1] = key_junk, value_junk
        leaves = [t.requires_grad_() for t in leaves]
        own = mask.clone().requires_grad_() if kind == "learned" else mask
        torch.manual_seed(0)
        out = attention(*leaves, own, dropout_p=dropout)
        yield out
        given = (3 * torch.arange(out.numel(), dtype=torch.float32).view(out.shape).sin()).to(dtype)
        yield from torch.autograd.grad(out, leaves, given, retain_graph=True)
        first = torch.autograd.grad(out, leaves[0], given, create_graph=True)[0]
        yield from torch.autograd.grad(first.square().sum(), leaves)

    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-3
    for ours, expected in zip(results(*junk), results(0, 0), strict=True):
        assert bool(expected.isfinite().all())
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
