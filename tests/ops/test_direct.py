"""The direct paths of common CPU calls: they serve what they should, and give what the general path gives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import fastgen
from fastgen import functional, reference
from fastgen.functional import attention as module
from fastgen.functional import projection as projection_module
from fastgen.ops.attention import direct
from tests.ops.direct_cases import CALLS, derivatives, inputs, options_of


@pytest.fixture
def general(monkeypatch):
    """Runs a call without the direct paths."""

    def run(call):
        with monkeypatch.context() as patch:
            for name in ("to_one_part", "to_heads", "from_heads"):
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


@pytest.mark.parametrize("name", ["plain", "boolean", "float"])
@pytest.mark.parametrize("wanted", range(3))
def test_one_argument_may_need_the_gradient(general, wanted, name):
    leaves, options = inputs(torch.float64), options_of(name, torch.float64)
    leaves[wanted].requires_grad_()
    results = []
    for run in (lambda call: call(), general):
        out = run(lambda: functional.scaled_dot_product_attention(*leaves, **options))
        (grad,) = torch.autograd.grad(out.sin().sum(), leaves[wanted], create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), leaves[wanted], allow_unused=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(b) if a is None else b)


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


HOOKS = {
    "before": lambda node, hook: node.register_prehook(hook),
    "after": lambda node, hook: node.register_hook(lambda grads, given: hook(grads)),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("when", HOOKS)
def test_hooks_of_the_node_see_and_change_gradients_of_any_order(when, masked):
    query, key, value = (t.requires_grad_() for t in inputs(torch.float32))
    mask = torch.ones(1, 1, query.size(2), key.size(2), dtype=torch.bool).tril() if masked else None
    weights, seen = torch.randn(*query.shape[:3], value.size(3)), []

    def twice(grads):
        seen.append(float(grads[0].detach().abs().sum()))
        return tuple(grad if grad is None else 2 * grad for grad in grads)

    def gradients(hooked):
        out = functional.scaled_dot_product_attention(query, key, value, mask)
        if hooked:
            HOOKS[when](out.grad_fn, twice)
        for create_graph in (False, True, True):
            (grad,) = torch.autograd.grad((out * weights).sum(), query, create_graph=create_graph, retain_graph=True)
            yield grad.detach()
        yield torch.autograd.grad(grad.square().sum(), key)[0]

    plain = list(gradients(False))
    for index, (ours, expected) in enumerate(zip(gradients(True), plain, strict=True)):
        torch.testing.assert_close(ours, (2 if index < 3 else 4) * expected)
    assert seen[0] > 0
    torch.testing.assert_close(seen[:3], [seen[0]] * 3)


def test_hooks_before_the_node_that_would_see_zeros_are_refused():
    query, key, value = (t.requires_grad_() for t in inputs(torch.float32))
    out = functional.scaled_dot_product_attention(query, key, value)
    out.grad_fn.register_prehook(lambda grads: grads)
    with torch.autograd.forward_ad.dual_level():
        direction = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match=r"^attention: expected no hooks of grad_fn\.register_prehook under"):
            torch.autograd.grad(out, query, direction)


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
    wanted = general(call)
    # Without a gradient another kernel serves so few scores, which rounds its weights to float32, not to 16 bits.
    torch.testing.assert_close(direct.pop(0), wanted.pop(0), rtol=0, atol=2 * torch.finfo(dtype).eps)
    for a, b in zip(direct, wanted, strict=True):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_beside_masked_keys_with_nan_uses_one_seed(dtype):
    tensors = inputs(dtype)
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


def test_a_masked_call_in_inference_mode_leaves_nothing_behind():
    """Constants of a first call in inference mode must serve training."""
    direct._zero_and_infinity.cache_clear()
    tensors, mask = inputs(torch.bfloat16, 40), torch.rand(1, 1, 5, 40) > 0.2
    with torch.inference_mode():
        functional.scaled_dot_product_attention(*tensors, mask)
    assert direct._zero_and_infinity.cache_info().currsize == 1
    assert not any(constant.is_inference() for constant in direct._zero_and_infinity(torch.bfloat16))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    functional.scaled_dot_product_attention(*tensors, mask).sum().backward()
