"""Second-order derivatives, forward-mode AD and transforms of MultiheadAttention and Transformer layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen import nn as ours
from fastgen.losses import r1_penalty
from fastgen.nn._norm import apply_norm
from fastgen.testing import assert_accurate
from tests.nn.transformer_cases import NAMES, B, E, H, L, call, first, inputs, normal, padding_of, pair

pytestmark = pytest.mark.usefixtures("second_order_operators")


def scores_of(module, tensors, **kwargs):
    out = first(call(module, tensors, kwargs))
    return out.sin().transpose(0, 1 if module_batch_dim(module) else 0).flatten(1).sum(1)


def module_batch_dim(module):
    found = next(m for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    return 0 if found.batch_first else 1


def penalty_grads(module, tensors, **kwargs):
    leaves = {id(t): t.detach().clone().requires_grad_() for t in tensors}
    tensors = [leaves[id(t)] for t in tensors]
    scores = scores_of(module, tensors, **kwargs)
    samples = tensors[0].transpose(0, 1) if module_batch_dim(module) else tensors[0]
    if samples is not tensors[0]:
        (gradient,) = torch.autograd.grad(scores.sum(), tensors[0], create_graph=True)
        penalty = gradient.square().sum() / (2 * B)
    else:
        penalty = r1_penalty(scores, samples)
    return torch.autograd.grad(penalty, module.parameters(), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_r1_penalty_matches_unfused_torch(name, batch_first):
    mine, theirs = pair(name, batch_first=batch_first, **({} if name == NAMES[0] else {"activation": "gelu"}))
    tensors = inputs(name, batch_first)
    result = penalty_grads(mine, tensors)
    with sdpa_kernel(SDPBackend.MATH):
        expected = penalty_grads(theirs, tensors)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_r1_penalty_requires_our_class():
    layer, x = nn.MultiheadAttention(E, H, batch_first=True).double(), [normal(B, L, E)] * 3
    with pytest.raises(RuntimeError, match="is not implemented"):
        penalty_grads(layer, x)
    layer.__class__ = ours.MultiheadAttention
    assert all(bool(g.isfinite().all()) for g in penalty_grads(layer, x))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_gradcheck(need_weights, masked):
    mine = pair("MultiheadAttention", batch_first=True)[0]
    x, y = normal(2, 2, E).requires_grad_(), normal(2, 3, E).requires_grad_()
    mask = normal(2, 3).requires_grad_()
    padding = torch.tensor([[False, False, True], [True, True, True]])

    def run(x, y, mask):
        masks = {"attn_mask": mask, "key_padding_mask": padding} if masked else {}
        results = mine(x, y, y, need_weights=need_weights, **masks)
        return tuple(r for r in results if r is not None)

    assert gradcheck(run, (x, y, mask), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, (x, y, mask), fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", NAMES[1:3])
def test_layer_gradcheck(name):
    mine = pair(name, batch_first=True, norm_first=True, activation=torch.tanh)[0]
    tensors = [t[:2, :2].contiguous().requires_grad_() for t in inputs(name)]
    assert gradcheck(mine, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(mine, tensors, fast_mode=True)


def tangent(module, tensors, directions, **kwargs):
    run = lambda *t: first(call(module, t, kwargs))  # noqa: E731
    return torch.func.jvp(run, tuple(tensors), tuple(directions))[1]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_matches_unfused_torch(name, frozen):
    """Also of frozen layers in eval mode, where torch uses inference kernels without forward mode and raises."""
    mine, theirs = pair(name, batch_first=True)
    tensors = inputs(name)
    directions = [torch.randn_like(t) for t in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        expected = tangent(theirs, tensors, directions)
    if frozen:
        mine.eval().requires_grad_(False)
    torch.testing.assert_close(tangent(mine, tensors, directions), expected, rtol=1e-9, atol=1e-9)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, directions, strict=True)]
        result = forward_ad.unpack_dual(first(call(mine, duals, {}))).tangent
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NAMES[1:])
def test_reverse_over_forward_equals_forward_over_reverse(name, norm_first):
    """Reverse over forward is silently wrong with torch's layer norm."""
    mine = pair(name, batch_first=True, norm_first=norm_first, activation=torch.tanh)[0]
    tensors = inputs(name)
    direction = torch.randn_like(tensors[0])
    loss = lambda x: mine(x, *tensors[1:]).sin().sum()  # noqa: E731
    expected = torch.func.jvp(torch.func.grad(loss), (tensors[0],), (direction,))[1]
    result = torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (direction,))[1])(tensors[0])
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    leaf = tensors[0].clone().requires_grad_()
    with forward_ad.dual_level():
        directional = forward_ad.unpack_dual(loss(forward_ad.make_dual(leaf, direction))).tangent
    torch.testing.assert_close(torch.autograd.grad(directional, leaf)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_accuracy_under_transforms(dtype, autocast):
    norm, x = nn.LayerNorm((4, 32)).to(dtype), (3 + torch.randn(5, 4, 32)).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = torch.func.vmap(lambda x: apply_norm(norm, x))(x)
        plain = norm(x)
    assert result.dtype == plain.dtype
    assert_accurate(result, plain, copy.deepcopy(norm).double()(x.double()))


def test_padding_is_not_skipped_under_transforms():
    mine, x = pair("TransformerEncoder", batch_first=True)[0].eval().requires_grad_(False), normal(B, L, E)
    padding, direction = padding_of(B, L), normal(B, L, E)
    valid = ~padding
    result = tangent(mine, [x], [direction], src_key_padding_mask=padding)
    step = 1e-6
    ends = [mine(x + sign * step * direction, src_key_padding_mask=padding) for sign in (1, -1)]
    torch.testing.assert_close(result[valid], ((ends[0] - ends[1]) / (2 * step))[valid], rtol=1e-5, atol=1e-6)
    mapped = torch.func.vmap(lambda x: mine(x, src_key_padding_mask=padding))(torch.stack((x, -x)))
    torch.testing.assert_close(mapped[0][valid], mine(x, src_key_padding_mask=padding)[valid])


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_inputs_and_parameters(name):
    mine = pair(name, batch_first=True)[0]
    tensors = inputs(name)
    stacked = [torch.stack((t.flip(0), t)) for t in tensors]
    run = lambda *t: first(call(mine, t, {}))  # noqa: E731
    expected = run(*tensors)
    torch.testing.assert_close(torch.func.vmap(run)(*stacked)[1], expected)
    parameters = {n: torch.stack((p.detach() * 2, p.detach())) for n, p in mine.named_parameters()}
    result = torch.func.vmap(
        lambda p: first(
            torch.func.functional_call(mine, p, tuple(tensors), {"need_weights": False} if name == NAMES[0] else {})
        )
    )(parameters)
    torch.testing.assert_close(result[1], expected)
