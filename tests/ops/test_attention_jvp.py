"""scaled_dot_product_attention_jvp: output and tangent in one call, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen import reference
from fastgen.functional import scaled_dot_product_attention, scaled_dot_product_attention_jvp
from fastgen.testing import assert_accurate
from tests.ops.attention_cases import cancellation_second_order

B, H, N, M, D, E = 2, 4, 9, 11, 8, 5


def tensors(*shapes, dtype=torch.float64):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


QKV = ((B, H, N, D), (B, H, M, D), (B, H, M, E))
GROUPED = ((B, H, N, D), (B, 2, M, D), (B, 2, M, E))
CALLS = {
    "plain": (QKV, None, {}),
    "causal": (QKV, None, {"is_causal": True}),
    "window": (QKV, None, {"window": (3, 1)}),
    "first queries attend to nothing": (QKV, None, {"window": (None, -3)}),
    "first keys are masked": (QKV, None, {"window": (-2, None)}),
    "bias": (QKV, (H, 1, M), {}),
    "bias of each score, softcap": (QKV, (B, H, N, M), {"softcap": 0.7}),
    "grouped heads": (GROUPED, None, {"enable_gqa": True}),
    "one head for all": (((B, H, N, D), (1, 1, M, D), (1, 1, M, E)), None, {}),
    "no heads": (((B, N, D), (B, M, D), (B, M, E)), None, {"scale": -0.4}),
    "one head": (((N, D), (M, D), (M, E)), (N, M), {}),
    "dropout": (QKV, (H, 1, M), {"dropout_p": 0.4}),
    "all dropped": (QKV, None, {"dropout_p": 1.0}),
}


def results_of(call, leaves, directions, options):
    """(out, lse), (out', lse') by torch.func.jvp of another function, or by ours."""
    torch.manual_seed(3)  # of dropout
    if call is not scaled_dot_product_attention_jvp:
        return torch.func.jvp(lambda *t: call(*t, **options, return_lse=True), tuple(leaves), tuple(directions))
    mask, of_mask = (leaves[3], directions[3]) if len(leaves) == 4 else (None, None)
    return call(leaves[:3], directions[:3], mask, attn_mask_tangent=of_mask, **options, return_lse=True)


def gradients(results, leaves):
    torch.manual_seed(4)
    flat = [part.masked_fill(part.isinf(), 0) for pair in results for part in pair]
    return torch.autograd.grad(flat, leaves, [torch.randn_like(part) for part in flat])


@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_jvp_of_attention(name):
    shapes, of_mask, options = CALLS[name]
    leaves = tensors(*shapes, *([] if of_mask is None else [of_mask]))
    directions = tensors(*(leaf.shape for leaf in leaves))
    got, wanted = (
        results_of(call, leaves, directions, options)
        for call in (scaled_dot_product_attention_jvp, scaled_dot_product_attention)
    )
    for ours, theirs in zip(got, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(*(gradients(each, [*leaves, *directions]) for each in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dims", [(64, 64), (40, 24)], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "window", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_the_formula(attention_place, dtype, mask, dims):
    shapes = (2, 4, 17, dims[0]), (2, 2, 23, dims[0]), (2, 2, 23, dims[1])
    leaves, directions = ([t.detach() for t in tensors(*shapes, dtype=dtype)] for _ in range(2))
    padding = torch.arange(23) < torch.tensor([23, 7])[:, None, None, None] if mask == "padding" else None
    sides = {"causal": (-1, 0), "window": (4, 2)}.get(mask, (-1, -1))
    window = None if mask == "none" else tuple(None if side < 0 else side for side in sides)
    to = lambda t: None if t is None else t.to(attention_place)  # noqa: E731
    (out, lse), (of_out, of_lse) = scaled_dot_product_attention_jvp(
        [to(t) for t in leaves], [to(t) for t in directions], to(padding), window=window, enable_gqa=True,
        return_lse=True,
    )  # fmt: skip

    def formula(dtype):
        wide, tangents = ([t.to(dtype) for t in group] for group in (leaves, directions))
        values = reference.attention(*wide, padding, None, *sides, dims[0] ** -0.5)
        return *values, *reference.attention_tangent(*wide, padding, *tangents, None, None, *sides, dims[0] ** -0.5)

    upstream = torch.zeros(out.shape, dtype=torch.float64)
    granted = cancellation_second_order(leaves, directions, padding, None, *sides, upstream)
    allowances = (0.0, 0.0, *granted[:2])
    compared = zip((out, lse, of_out, of_lse), formula(dtype), formula(torch.float64), allowances, strict=True)
    for name, (ours, plain, exact, allowance) in zip(("out", "lse", "out'", "lse'"), compared, strict=True):
        assert_accurate(ours.cpu(), plain, exact, name, allowance)


@pytest.mark.parametrize("missing", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_a_missing_tangent_is_zero(attention_place, missing):
    leaves = [t.detach().to(attention_place) for t in tensors(*QKV, dtype=torch.float32)]
    given = [None if at in missing else torch.randn_like(t) for at, t in enumerate(leaves)]
    zeros = [torch.zeros_like(t) if own is None else own for t, own in zip(leaves, given, strict=True)]
    got = scaled_dot_product_attention_jvp(leaves, given)
    for a, b in zip(got, scaled_dot_product_attention_jvp(leaves, zeros), strict=True):
        torch.testing.assert_close(a, b)


def test_masked_keys_and_their_tangents_may_be_anything(attention_place):
    primals, directions = ([t.detach() for t in tensors(*QKV, dtype=torch.float32)] for _ in range(2))
    padding = torch.arange(M) < M - 3
    results = []
    for filler in (0.0, math.nan):
        for group in (primals, directions):
            for one in group[1:]:
                one[:, :, -3:] = filler
        places = [[t.to(attention_place) for t in group] for group in (primals, directions)]
        results.append(scaled_dot_product_attention_jvp(*places, padding.to(attention_place)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert bool(b.isfinite().all())


def test_gradients_of_the_tangent_alone_and_of_the_output_alone():
    leaves, directions = tensors(*QKV), tensors(*QKV)
    out, of_out = scaled_dot_product_attention_jvp(leaves, directions)
    attend = lambda *t: scaled_dot_product_attention(*t)  # noqa: E731
    wanted = torch.autograd.grad(attend(*leaves).sum(), leaves)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves, retain_graph=True), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert all(t is None for t in torch.autograd.grad(out.sum(), directions, retain_graph=True, allow_unused=True))
    wanted = torch.autograd.grad(torch.func.jvp(attend, tuple(leaves), tuple(directions))[1].sum(), leaves)
    for a, b in zip(torch.autograd.grad(of_out.sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_penalty_of_the_output():
    leaves, directions = tensors(*QKV), [t.detach() for t in tensors(*QKV)]

    def penalty(out):
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    got = penalty(scaled_dot_product_attention_jvp(leaves, directions)[0])
    for a, b in zip(got, penalty(scaled_dot_product_attention(*leaves)), strict=True):
        torch.testing.assert_close(a, b)


def test_transforms():
    leaves, directions = ([t.detach() for t in tensors(*QKV)] for _ in range(2))

    def loss(*t):
        out, of_out = scaled_dot_product_attention_jvp(t, directions)
        return (out.cos() * of_out).sum()

    def plain(*t):
        out, of_out = torch.func.jvp(lambda *t: reference.attention(*t, None)[0], t, tuple(directions))
        return (out.cos() * of_out).sum()

    pairs = zip(*(torch.func.grad(each, (0, 1, 2))(*leaves) for each in (loss, plain)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    stacked = [torch.stack([t, t.flip(0)]) for t in leaves]
    mapped = torch.func.vmap(loss)(*stacked)
    torch.testing.assert_close(mapped, torch.stack([loss(*leaves), loss(*(t.flip(0) for t in leaves))]))


@pytest.mark.parametrize("way", ["jvp", "dual numbers"])
def test_forward_mode_raises(way):
    leaves, directions = ([t.detach() for t in tensors(*QKV)] for _ in range(2))
    call = lambda *t: scaled_dot_product_attention_jvp(t, directions)[0]  # noqa: E731
    with pytest.raises(RuntimeError, match="forward mode over forward mode is not supported"):
        if way == "jvp":
            torch.func.jvp(call, tuple(leaves), tuple(directions))
        else:
            with torch.autograd.forward_ad.dual_level():
                call(*map(torch.autograd.forward_ad.make_dual, leaves, directions))


def test_a_second_derivative_of_the_tangent_raises():
    leaves, directions = tensors(*QKV), tensors(*QKV)
    of_out = scaled_dot_product_attention_jvp(leaves, directions)[1]
    grads = torch.autograd.grad(of_out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first or second derivatives, got a third one"):
        torch.autograd.grad(sum(grad.sum() for grad in grads), leaves)


def test_autocast():
    leaves, directions = ([t.detach() for t in tensors(*QKV, dtype=torch.float32)] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = scaled_dot_product_attention_jvp(leaves, directions)
    narrow = [[t.bfloat16() for t in group] for group in (leaves, directions)]
    for a, b in zip(got, scaled_dot_product_attention_jvp(*narrow), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


def test_a_causal_bias_is_a_mask():
    from torch.nn.attention.bias import causal_lower_right

    leaves, directions = ([t.detach() for t in tensors(*QKV)] for _ in range(2))
    got = scaled_dot_product_attention_jvp(leaves, directions, causal_lower_right(N, M))
    wanted = scaled_dot_product_attention_jvp(leaves, directions, window=(None, M - N))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


ONE = [torch.zeros(1, 1, 2, 4)] * 3
MASK = torch.zeros(2, 2)
BAD = {
    "two primals": (lambda: (ONE[:2], ONE), TypeError, "primals: expected a tuple of three, .* got 2 of them"),
    "a tensor of tangents": (lambda: (ONE, ONE[0]), TypeError, "tangents: expected a tuple of three, .* got Tensor"),
    "no query": (lambda: ((None, *ONE[1:]), ONE), TypeError, "query: expected a tensor, got NoneType"),
    "a number": (lambda: (ONE, (1.0, None, None)), TypeError, "tangent of query: expected a tensor or None, got float"),
    "a shape": (
        lambda: (ONE, (None, torch.zeros(1, 1, 3, 4), None)),
        ValueError,
        r"tangent of key: expected shape the shape of key = \(1, 1, 2, 4\), got \(1, 1, 3, 4\)",
    ),
    "a dtype": (
        lambda: (ONE, (None, None, ONE[0].double())),
        TypeError,
        "tangent of value: expected the dtype of value, torch.float32, got torch.float64",
    ),
    "no mask": (lambda: (ONE, ONE, None, MASK), ValueError, "attn_mask_tangent: .*floating attn_mask, .*None"),
    "a boolean mask": (lambda: (ONE, ONE, MASK > 0, MASK), ValueError, "attn_mask_tangent: .*which is torch.bool"),
    "a mask's shape": (lambda: (ONE, ONE, MASK, MASK[:1]), ValueError, "attn_mask_tangent: expected shape"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    make, error, text = BAD[what]
    primals, directions, *masks = make()
    with pytest.raises(error, match=text):
        scaled_dot_product_attention_jvp(primals, directions, *masks[:1], attn_mask_tangent=masks[1] if masks else None)
