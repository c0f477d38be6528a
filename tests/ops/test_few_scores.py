"""Derivatives of attention with few scores, which are those of plain PyTorch."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch.autograd import forward_ad

from fastgen import functional, reference
from fastgen.functional import projection as projection_module
from tests.ops.direct_cases import inputs, options_of


def test_many_scores_take_the_operators_second_order():
    """No tensor of all scores where they are many, and where they are few no operator."""
    for queries, operators in ((8, 0), (200, 1)):
        leaves = [torch.randn(1, 1, queries, 8).requires_grad_() for _ in range(3)]
        (grad,) = torch.autograd.grad(
            functional.scaled_dot_product_attention(*leaves).sum(), leaves[:1], create_graph=True
        )
        nodes, seen = [grad.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [following for following, _ in node.next_functions]
        assert sum("_BackwardBackward" in type(node).__name__ for node in seen) == operators


def test_a_third_derivative_of_few_scores_is_right():
    results = []
    for attend in (functional.scaled_dot_product_attention, lambda *t: reference.attention(*t)[0]):
        leaves = [t.requires_grad_() for t in inputs(torch.float64)]
        total = attend(*leaves).sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(total, leaves, create_graph=True)
            total = sum(g.square().sum() for g in grads)
        results.append(grads)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_tangent_of_few_scores_is_differentiable_in_reverse():
    results = []
    for attend in (functional.scaled_dot_product_attention, lambda *t: reference.attention(*t)[0]):
        leaves, tangents = [t.requires_grad_() for t in inputs(torch.float64)], inputs(torch.float64)
        tangent = torch.func.jvp(attend, tuple(leaves), tuple(t.cos() for t in tangents))[1]
        results.append(torch.autograd.grad(tangent.sin().sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_merged_heads_that_are_not_common_are_not_copied_first(monkeypatch):
    """On a GPU, or with a forced backend, the direct path costs its checks and no copy of the tokens."""
    monkeypatch.setattr(projection_module.direct, "is_common", lambda: False)
    with torch.profiler.profile() as profile:
        assert projection_module.direct.from_heads(torch.randn(2, 3, 5, 4), torch.randn(6, 12), None, None) is None
    assert not {"aten::clone", "aten::reshape", "aten::copy_"} & {event.key for event in profile.key_averages()}


def few(**options):
    leaves = [t.requires_grad_() for t in inputs(torch.float64)]
    return leaves, functional.scaled_dot_product_attention(*leaves, **options)


def test_few_scores_take_the_node_of_torch():
    _, out = few()
    assert type(out.grad_fn).__name__.startswith("ScaledDotProductFlashAttention")


def test_few_scores_keep_nothing_alive_that_the_node_released():
    """As with torch's function: hooks must not hold what a backward pass releases."""
    temporaries = [t.requires_grad_() * 1.0 for t in inputs(torch.float64)]
    kept = [weakref.ref(t) for t in temporaries]
    out = functional.scaled_dot_product_attention(*temporaries)
    del temporaries
    gc.collect()
    assert all(reference() is not None for reference in kept)
    out.sum().backward()
    gc.collect()
    assert all(reference() is None for reference in kept)
    assert out is not None


def test_a_second_backward_pass_of_released_temporaries_is_refused_by_name():
    leaves = [t.requires_grad_() for t in inputs(torch.float64)]
    out = functional.scaled_dot_product_attention(*(t * 1.0 for t in leaves)).sum()
    torch.autograd.grad(out, leaves)
    gc.collect()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, leaves, create_graph=True)


@pytest.mark.parametrize("name", ["plain", "boolean", "float"])
def test_second_derivatives_of_temporaries_are_right(name):
    """Only the graph holds the tensors between the forward and the backward pass."""
    options = options_of(name, torch.float64)
    results = []
    for attend in (
        functional.scaled_dot_product_attention,
        lambda *t, **o: reference.attention(*t, o.get("attn_mask"))[0],
    ):
        leaves = [t.requires_grad_() for t in inputs(torch.float64)]
        out = attend(*(t.sin() for t in leaves), **options)
        gc.collect()
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_dual_gradient_of_few_scores():
    leaves, out = few()
    direction, tangent = torch.randn_like(out), torch.randn_like(out)
    wanted = torch.autograd.grad(out, leaves, tangent, retain_graph=True)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(out, leaves, forward_ad.make_dual(direction, tangent), retain_graph=True)
        found = [forward_ad.unpack_dual(grad).tangent for grad in grads]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["plain", "boolean"])
def test_a_vmap_over_gradients_of_few_scores(name):
    leaves, out = few(**options_of(name, torch.float64))
    directions = torch.randn(3, *out.shape, dtype=torch.float64)
    wanted = [torch.autograd.grad(out, leaves, d, retain_graph=True) for d in directions]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.vmap(lambda d: torch.autograd.grad(out, leaves, d, retain_graph=True))(directions)
    for i, grads in enumerate(wanted):
        for a, b in zip(grads, found, strict=True):
            torch.testing.assert_close(a, b[i])


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)])
def test_second_derivatives_of_few_scores_in_some_arguments(wanted):
    results = []
    for attend in (functional.scaled_dot_product_attention, lambda *t: reference.attention(*t)[0]):
        tensors = inputs(torch.float64)
        leaves = [tensors[i].requires_grad_() for i in wanted]
        first = torch.autograd.grad(attend(*tensors).sin().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_of_saved_tensors_see_those_of_few_scores():
    """Checkpointing and offloading work by these hooks; second derivatives go through them."""
    leaves = [t.requires_grad_() for t in inputs(torch.float64)]
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(1), t.clone())[1], lambda t: t):
        out = functional.scaled_dot_product_attention(*leaves)
    assert packed
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.square().sum() for g in first), leaves))


def test_a_gradient_with_strides_of_zero():
    for keys in (7, 40):
        leaves = [t.requires_grad_() for t in inputs(torch.float64, keys)]
        results = [
            torch.autograd.grad(attend(*leaves).sum((2, 3)).sin().sum(), leaves)
            for attend in (functional.scaled_dot_product_attention, lambda *t: reference.attention(*t)[0])
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
