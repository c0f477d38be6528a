"""The direct paths of common CPU calls: they serve what they should, and give what the general path gives."""

from __future__ import annotations

import gc
import math
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import fastgen
from fastgen import functional, reference
from fastgen.functional import attention as module
from fastgen.functional import projection as projection_module

CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "boolean": {"attn_mask": torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4},
    "boolean, rows masked": {"attn_mask": torch.arange(5).view(1, 1, 5, 1).expand(1, 1, 5, 7).contiguous() > 1},
    "padding": {"attn_mask": torch.arange(7).view(1, 1, 1, 7) < torch.tensor([3, 7]).view(2, 1, 1, 1)},
    "float": {"attn_mask": torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(2))},
}


def inputs(dtype=torch.float32, keys=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 8, dtype=dtype, generator=generator) for n in (5, keys, keys)]


def options_of(name, dtype):
    options = dict(CALLS[name])
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    return options


@pytest.fixture
def general(monkeypatch):
    """Runs a call without the direct paths."""

    def run(call):
        with monkeypatch.context() as patch:
            for name in ("to_heads", "from_heads"):
                patch.setattr(projection_module.direct, name, lambda *arguments: None)
            patch.setattr(module.direct, "attend", lambda *arguments: None)
            patch.setattr(module.direct, "takes_dropout", lambda *arguments: False)
            return call()

    return run


@pytest.fixture
def only_direct(monkeypatch):
    """Until it is called, the general path raises."""

    def refuse(*arguments):
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(module, "attention", refuse)
    monkeypatch.setattr(projection_module, "projection", refuse)
    monkeypatch.setattr(projection_module, "merge_heads", refuse)
    return monkeypatch.undo


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_common_calls_are_direct(only_direct, name, dtype):
    keys = 5 if name == "causal" else 7
    tensors, options = inputs(dtype, keys), options_of(name, dtype)
    functional.scaled_dot_product_attention(*tensors, **options)
    leaves = [t.requires_grad_() for t in tensors]
    functional.scaled_dot_product_attention(*leaves, **options).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def derivatives(leaves, options):
    out = functional.scaled_dot_product_attention(*leaves, **options)
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    plain = torch.autograd.grad(functional.scaled_dot_product_attention(*leaves, **options).sin().sum(), leaves)
    return [out, *first, *second, *plain]


@pytest.mark.parametrize("name", CALLS)
def test_results_and_derivatives_are_the_general_ones(general, name):
    dtype = torch.float64
    tensors, options = inputs(dtype, 5 if name == "causal" else 7), options_of(name, dtype)
    with torch.no_grad():
        direct = functional.scaled_dot_product_attention(*tensors, **options)
        torch.testing.assert_close(
            direct, general(lambda: functional.scaled_dot_product_attention(*tensors, **options))
        )
    leaves = [t.requires_grad_() for t in tensors]
    for a, b in zip(derivatives(leaves, options), general(lambda: derivatives(leaves, options)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", range(3))
def test_one_argument_may_need_the_gradient(general, wanted):
    leaves = inputs(torch.float64)
    leaves[wanted].requires_grad_()
    results = []
    for run in (lambda call: call(), general):
        out = run(lambda: functional.scaled_dot_product_attention(*leaves))
        results.append(torch.autograd.grad(out.sin().sum(), leaves[wanted])[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("what", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_masked_keys_hold_has_no_effect(value, what, grad):
    tensors = inputs(torch.float64)
    mask = (torch.arange(7) < 4).expand(2, 3, 5, 7).contiguous()
    wanted = [functional.scaled_dot_product_attention(*tensors, mask)]
    tensors[what][:, :, 5] = value
    leaves = [t.requires_grad_(grad) for t in tensors]
    out = functional.scaled_dot_product_attention(*leaves, mask)
    torch.testing.assert_close(out, wanted[0])
    if grad:
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sin().sum(), leaves))


@pytest.mark.parametrize("keys", [3, 40])
def test_nan_in_a_query_is_seen(keys):
    query, key, value = inputs(keys=keys)
    query[0, 0, 1, 2] = math.nan
    out = functional.scaled_dot_product_attention(query, key, value)
    assert out[0, 0, 1].isnan().all()
    assert out[0, 0, 0].isfinite().all()


def test_dtypes_that_differ_are_named():
    query, key, value = inputs()
    for grad in (False, True):
        with pytest.raises(TypeError, match=r"key: .*float32.*float64"):
            functional.scaled_dot_product_attention(query.requires_grad_(grad), key.double(), value)
    with pytest.raises(TypeError, match=r"weight: .*float32.*float64"):
        functional.multi_head_projection(torch.randn(2, 3, 4), torch.randn(8, 4).double(), num_heads=2)
    with pytest.raises(TypeError, match=r"weight: .*float32.*float64"):
        functional.merge_heads_projection(query, torch.randn(4, 24).double())


def test_transforms_autocast_and_forced_backends_take_the_general_path(only_direct):
    tensors = inputs()

    def call(*arguments):
        return functional.scaled_dot_product_attention(*arguments)

    def compiled():
        with fastgen.use_backend("torch"):
            call(*tensors)

    def autocast():
        with torch.autocast("cpu"):
            call(*tensors)

    def jvp_of_jvp():
        torch.func.jvp(lambda *t: torch.func.jvp(call, t, t)[1], tuple(tensors), tuple(tensors))

    compiled()  # by the operators: test_operator_path.py
    for run in (
        autocast,
        jvp_of_jvp,
        lambda: torch.vmap(call)(*tensors),
    ):
        with pytest.raises(AssertionError, match="general path"):
            run()


def test_a_sharing_of_first_and_second_order_is_the_formula():
    """Batched gradients, and a second backward after a first one of the same graph."""
    leaves = [t.requires_grad_() for t in inputs(torch.float64)]
    out = functional.scaled_dot_product_attention(*leaves)
    exact = reference.attention(*leaves)[0]
    directions = torch.randn(3, *out.shape, dtype=torch.float64)
    results = [
        torch.autograd.grad(o, leaves, directions, is_grads_batched=True, retain_graph=True) for o in (out, exact)
    ]
    results += [torch.autograd.grad(o.cos().sum(), leaves) for o in (out, exact)]
    for first, second in (results[:2], results[2:]):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b)


HEADS = {
    "one part": lambda x, w, b: functional.multi_head_projection(x, w, b, num_heads=4),
    "three parts": lambda x, w, b: functional.qkv_projection(x, w, b, heads=(2, 2, 2), head_dims=[4, 4, 4]),
    "lists": lambda x, w, b: functional.qkv_projection(x, w, b, heads=[6], head_dims=[4]),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_projections_are_direct_and_the_same(general, monkeypatch, name, bias):
    leaves = [torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(24, 6, dtype=torch.float64)]
    leaves += [torch.randn(24, dtype=torch.float64)] if bias else []
    leaves = [t.requires_grad_() for t in leaves]

    def call():
        parts = HEADS[name](*leaves, *([] if bias else [None]))
        parts = parts if isinstance(parts, tuple) else (parts,)
        first = torch.autograd.grad(sum(p.sin().sum() for p in parts), leaves, create_graph=True)
        return [*parts, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    wanted = general(call)
    monkeypatch.setattr(projection_module, "projection", None)
    for a, b in zip(call(), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", [False, True])
def test_merged_heads_are_direct_and_the_same(general, monkeypatch, residual):
    x, weight, bias = torch.randn(2, 3, 5, 4), torch.randn(6, 12), torch.randn(6)
    added = torch.randn(2, 5, 6) if residual else None
    wanted = general(lambda: functional.merge_heads_projection(x, weight, bias, residual=added))
    monkeypatch.setattr(projection_module, "merge_heads", None)
    torch.testing.assert_close(functional.merge_heads_projection(x, weight, bias, residual=added), wanted)
    tokens = x.transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(wanted, F.linear(tokens, weight, bias) + (0 if added is None else added))


@pytest.mark.parametrize("rows_masked", [False, True])
def test_a_learned_bias_of_few_scores_is_plain_pytorch_and_the_same(general, only_direct, rows_masked):
    leaves = [*inputs(torch.float64), torch.randn(1, 3, 5, 7, dtype=torch.float64)]
    if rows_masked:
        leaves[3][:, :, 2] = -math.inf
    leaves = [t.requires_grad_() for t in leaves]

    def call():
        out = functional.scaled_dot_product_attention(*leaves)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    direct = call()
    only_direct()
    for a, b in zip(direct, general(call), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dual", [False, True], ids=["torch.func.jvp", "dual numbers"])
@pytest.mark.parametrize("causal", [False, True])
def test_jvps_of_few_scores_are_plain_pytorch_and_the_same(general, only_direct, causal, dual):
    tensors, tangents = inputs(torch.float64, 5), inputs(torch.float64, 5)[::-1]

    def function(*arguments):
        return functional.scaled_dot_product_attention(*arguments, is_causal=causal)

    def call():
        if not dual:
            return torch.func.jvp(function, tuple(tensors), tuple(tangents))
        with forward_ad.dual_level():
            made = (forward_ad.make_dual(t, tangent) for t, tangent in zip(tensors, tangents, strict=True))
            return tuple(forward_ad.unpack_dual(function(*made)))

    direct = call()
    only_direct()
    torch.testing.assert_close(direct, general(call))


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


NARROW = [name for name in CALLS if name != "float"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_16_bits_are_direct_and_the_same(general, only_direct, name, dtype):
    tensors, options = inputs(dtype, 5 if name == "causal" else 7), options_of(name, dtype)
    leaves = [t.requires_grad_() for t in tensors]

    def call():
        with torch.no_grad():
            plain = functional.scaled_dot_product_attention(*tensors, **options)
        out = functional.scaled_dot_product_attention(*leaves, **options)
        return [plain, out, *torch.autograd.grad(out.sin().sum(), leaves)]

    direct = call()
    only_direct()
    for a, b in zip(direct, general(call), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_in_16_bits_are_the_operators(general, dtype):
    leaves = [t.requires_grad_() for t in inputs(dtype)]
    for a, b in zip(derivatives(leaves, {}), general(lambda: derivatives(leaves, {})), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("keys", [7, 40])
@pytest.mark.parametrize("value", [math.inf, math.nan, 3e4])
def test_infinite_scores_in_16_bits_are_those_of_the_general_path(general, value, keys, grad):
    query, key, values = inputs(torch.float16, keys)
    query[0, 0, 1], key[0, 0, 2] = value, 3e4
    for tensor in (query, key, values):
        tensor.requires_grad_(grad)
    out = functional.scaled_dot_product_attention(query, key, values, scale=1e4)
    wanted = general(lambda: functional.scaled_dot_product_attention(query, key, values, scale=1e4))
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    assert value == 3e4 or out[0, 0, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_dropout_of_few_scores_is_direct_with_the_mask_of_the_operators(general, only_direct, name, dtype):
    tensors, options = inputs(dtype, 5 if name == "causal" else 7), options_of(name, dtype)
    leaves = [t.requires_grad_() for t in tensors]
    if name == "float":
        leaves.append(options["attn_mask"].clone().requires_grad_())
        options["attn_mask"] = leaves[3]

    def call():
        torch.manual_seed(5)
        out = functional.scaled_dot_product_attention(*leaves[:3], **options, dropout_p=0.4)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        after = torch.rand(1, dtype=torch.float64)
        return [out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves), after]

    direct = call()
    only_direct()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    for a, b in zip(direct, general(call), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    assert direct[0].eq(0).sum() == call()[0].eq(0).sum()


def test_dropout_beside_masked_keys_with_nan_uses_one_seed():
    tensors = inputs(torch.float64)
    mask = (torch.arange(7) < 4).expand(2, 3, 5, 7).contiguous()
    torch.manual_seed(1)
    wanted = functional.scaled_dot_product_attention(*tensors, mask, dropout_p=0.4), torch.rand(1)
    tensors[2][:, :, 5] = math.nan
    torch.manual_seed(1)
    found = functional.scaled_dot_product_attention(*tensors, mask, dropout_p=0.4), torch.rand(1)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_of_many_scores_takes_the_general_path(only_direct):
    with pytest.raises(AssertionError, match="general path"):
        functional.scaled_dot_product_attention(*(torch.randn(2, 2, 100, 8) for _ in range(3)), dropout_p=0.4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_with_an_infinite_score_in_16_bits_are_nan(dtype, masked, grad):
    query, key, value = inputs(dtype, 40)
    key[0, 0, 2, 0] = math.inf
    mask = torch.ones(1, 1, 5, 40, dtype=torch.bool) if masked else None
    for tensor in (query, key, value):
        tensor.requires_grad_(grad)
    out = functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(out[0, 0].isnan().any(-1), query[0, 0, :, 0] > 0)
