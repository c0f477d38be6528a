"""Soft-capped scores: values and every derivative are those of the formula, with every other feature of attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, jvp, vmap

from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.ops.attention import decomposition, fused
from fastgen.ops.attention.problem import Options, Problem


def formula(query, key, value, mask=None, *, cap, scale=0.9, window=(None, None)):
    """With scores in full. Fully masked rows: 0 and -inf."""
    groups = query.size(-3) // key.size(-3)
    key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = cap * torch.tanh(scale * (query @ key.mT) / cap)
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask
    offset = torch.arange(key.size(-2)) - torch.arange(query.size(-2))[:, None]
    left, right = (math.inf if bound is None else bound for bound in window)
    scores = scores.masked_fill((offset < -left) | (offset > right), -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    return (scores.softmax(-1) * ~empty) @ value, lse


def operands(heads=4, key_heads=2, queries=9, keys=12, dtype=torch.float64):
    shapes = ((2, heads, queries, 8), (2, key_heads, keys, 8), (2, key_heads, keys, 5))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def results(function, tensors, upstream, directions):
    """Values, gradients, tangents, and gradients of the gradients' weighted sum."""
    out, lse = function(*tensors)
    grads = torch.autograd.grad(
        [out, lse.masked_fill(lse == -math.inf, 0)], tensors, [u.to(out) for u in upstream], create_graph=True
    )
    second = torch.autograd.grad(
        sum((g * d.to(g)).sum() for g, d in zip(grads, directions, strict=True)), tensors, retain_graph=True
    )
    primals, along = (
        tuple(t.detach() for t in tensors),
        tuple(d.to(t) for d, t in zip(directions, tensors, strict=True)),
    )
    _, (dout, dlse) = jvp(function, primals, along)
    return [out, lse, *grads, *second, dout, dlse.masked_fill(lse == -math.inf, 0)]


MASKS = {
    "no mask": None,
    "bool": (torch.rand(2, 1, 9, 12, generator=torch.Generator().manual_seed(1)) > 0.4),
    "bias": torch.randn(4, 1, 12, generator=torch.Generator().manual_seed(2)).double(),
    "bias with holes": torch.randn(1, 4, 9, 12, generator=torch.Generator().manual_seed(3)).double(),
}
MASKS["bias with holes"][:, :, :, 3:7] = -math.inf
MASKS["bias with holes"][:, :, 2] = -math.inf


def assert_formula(mask, window, cap, dtype, device):
    """Every mask is learned that can be."""
    torch.manual_seed(0)
    tensors, given = operands(), MASKS[mask]
    learned = given is not None and given.is_floating_point()
    tensors += [given.clone().requires_grad_()] if learned else []
    upstream = torch.randn(2, 4, 9, 5).double(), torch.randn(2, 4, 9).double()
    directions = [torch.randn(t.shape).double() for t in tensors]
    options = {"scale": 0.9, "enable_gqa": True, "window": window, "softcap": cap, "return_lse": True}
    rest = () if learned or given is None else (given.clone().to(device),)
    leaves = [t.detach().to(device, dtype).requires_grad_() for t in tensors]
    ours = results(lambda *t: attention(*t, *rest, **options), leaves, upstream, directions)
    rest = () if learned else (given,)
    right = results(lambda *t: formula(*t, *rest, cap=cap, window=window), tensors, upstream, directions)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=tolerance)


over_masks = pytest.mark.parametrize("mask", MASKS)
over_windows = pytest.mark.parametrize("window", [(None, None), (3, 0)], ids=str)
over_caps = pytest.mark.parametrize("cap", [0.3, 2.0, 50.0])


@over_caps
@over_windows
@over_masks
def test_values_and_derivatives_are_those_of_the_formula(attention_place, mask, window, cap):
    assert_formula(mask, window, cap, torch.float32, attention_place)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@over_caps
@over_windows
@over_masks
def test_values_and_derivatives_with_the_helpers_of_the_cpu(mask, window, cap, dtype):
    assert_formula(mask, window, cap, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_numerical_derivatives(dropout):
    q, k, v = operands(queries=3, keys=5)
    bias = torch.randn(4, 1, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias, sinks):
        return attention(
            q, k, v, bias, dropout, enable_gqa=True, window=(2, 2), softcap=0.6, sinks=sinks, return_lse=True,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (q, k, v, bias, sinks), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_softcap_changes_nothing(attention_place, dtype):
    tensors = [t.detach().to(attention_place, dtype).requires_grad_() for t in operands(queries=40, keys=70)]
    called = [attention(*tensors, enable_gqa=True, return_lse=True, softcap=cap) for cap in (None, 1e6, 1e30)]
    found = [(*call, *torch.autograd.grad([c.float().sum() for c in call], tensors)) for call in called]
    for capped in found[1:]:
        for a, b in zip(capped, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=12 * torch.finfo(dtype).eps, atol=12 * torch.finfo(dtype).eps)


def test_scores_far_beyond_the_softcap_give_equal_weights(attention_place):
    """Without it, each query attends to the key with the largest score alone; with it, no weight is above e^(2 c) times
    another, and where tanh is 1 the gradients of query and key are 0."""
    q, k, v = (t.detach().float().abs().to(attention_place).requires_grad_() for t in operands())
    out = attention(1e4 * q, k, v, enable_gqa=True, softcap=0.5)
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).repeat_interleave(2, 1).expand_as(out))
    of_query, of_key, of_value = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (of_query == 0).all()
    assert (of_key == 0).all()
    assert (of_value != 0).any()


def test_a_masked_key_is_ignored_whatever_it_contains(attention_place):
    mask = torch.ones(1, 1, 1, 12, dtype=torch.bool, device=attention_place)
    mask[..., 5:8] = False

    def every(fill):
        torch.manual_seed(0)
        leaves = [t.detach().float() for t in operands()]
        leaves[1][:, :, 5:8], leaves[2][:, :, 5:8] = fill, fill
        leaves = [leaf.to(attention_place).requires_grad_() for leaf in leaves]
        upstream, directions = (torch.ones(2, 4, 9, 5), torch.ones(2, 4, 9)), [torch.ones_like(t) for t in leaves]
        call = lambda *t: attention(*t, mask, enable_gqa=True, softcap=1.5, return_lse=True)  # noqa: E731
        return results(call, leaves, [u.to(attention_place) for u in upstream], directions)

    for a, b in zip(every(math.nan), every(0.0), strict=True):
        assert torch.equal(a, b)


def test_vmap_grad_and_compile_agree_with_a_loop():
    q, k, v = (t.detach() for t in operands(key_heads=4))
    call = lambda q, k, v: attention(q, k, v, softcap=0.8, window=(4, 1))  # noqa: E731
    looped = torch.stack([call(*t) for t in zip(q, k, v, strict=True)])
    torch.testing.assert_close(vmap(call)(q, k, v), looped)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), looped)
    penalty = lambda q, k, v: grad(lambda q: call(q, k, v).square().sum())(q).square().sum()  # noqa: E731
    each = torch.stack([grad(penalty)(*t) for t in zip(q, k, v, strict=True)])
    torch.testing.assert_close(vmap(grad(penalty))(q, k, v), each)


def test_exported_programs_have_the_formula():
    q, k, v = (t.detach() for t in operands())
    bias = MASKS["bias"][None]
    out = decomposition.forward(q, k, v, bias, None, None, *Options(0.0, 3, 0, 0.9, 0.7))
    for a, b in zip(out, formula(q, k, v, bias, cap=0.7, window=(3, 0)), strict=True):
        torch.testing.assert_close(a, b)


def test_kernels_that_have_no_softcap_are_not_taken():
    """torch's fused kernel, and fastgen's for narrow query heads, which the compiled CPU backend takes without it."""
    tensors = [t.detach().float() for t in operands(key_heads=4)]
    problem = Problem(*tensors, None, None, None, Options(0.0, -1, -1, 0.3), "fastgen")
    assert fused.takes(problem)
    assert not fused.takes(problem._replace(options=problem.options._replace(softcap=1.0)))
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 50, 8)
    for value_dim in (8, 64):
        v = torch.randn(1, 2, 50, value_dim)
        torch.testing.assert_close(attention(q, k, v, softcap=0.5), formula(q, k, v, cap=0.5, scale=8**-0.5)[0])
