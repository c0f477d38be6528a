"""Calls of attention so small that they are one call of a compiled function, outside of PyTorch's dispatcher."""

from __future__ import annotations

import pytest
import torch

from fastgen import backend, reference
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.ops.attention import direct, small
from tests.ops.direct_cases import CALLS, inputs, options_of

pytestmark = pytest.mark.skipif(not backend.library_for("cpu").loaded, reason="the CPU library is not compiled")
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def served(monkeypatch):
    """Whether each call of the compiled functions gave the result."""
    found = []

    def observed(kernel):
        def run(*arguments):
            found.append(not kernel(*arguments))
            return not found[-1]

        return run

    for name in ("_kernel", "_dropout_kernel"):
        monkeypatch.setattr(small, name, observed(getattr(small, name)))
    return found


def expected(tensors, options):
    wide = {
        name: given.double() if isinstance(given, torch.Tensor) and given.is_floating_point() else given
        for name, given in options.items()
    }
    mask = wide.pop("attn_mask", None)
    right = 0 if wide.pop("is_causal", False) else -1
    return reference.attention(*(tensor.double() for tensor in tensors), mask, window_right=right, **wide)[0]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows_first", [False, True])
def test_small_calls_are_right_at_every_level(name, dtype, rows_first, served):
    tensors, options = inputs(dtype, keys=5 if name == "causal" else 7), options_of(name, dtype)
    if rows_first:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    for level in backend.cpu_levels():
        with backend.use_cpu_level(level):
            out = attention(*tensors, **options)
        assert out.dtype == dtype
        assert out.stride() == tensors[0].stride()
        torch.testing.assert_close(out.double(), expected(tensors, options), rtol=0, atol=TOLERANCES[dtype])
    assert served == [True] * len(backend.cpu_levels()) or (name == "float" and dtype != torch.float32 and not served)


@pytest.mark.parametrize("name", CALLS)
def test_small_calls_with_dropout_drop_the_weights_that_the_operators_drop(name, served, monkeypatch):
    tensors, options = inputs(keys=5 if name == "causal" else 7), options_of(name, torch.float32)

    def call():
        torch.manual_seed(3)
        return attention(*tensors, **options, dropout_p=0.4)

    found = []
    for level in backend.cpu_levels():
        with backend.use_cpu_level(level):
            found.append(call())
    assert served == [True] * len(found)
    monkeypatch.setattr(direct, "takes_dropout", lambda *arguments: False)
    wanted = call()
    assert len(served) == len(found)
    for out in found:
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(wanted, attention(*tensors, **options), atol=1e-2)


def test_larger_calls_and_those_with_derivatives_are_those_of_pytorch(served):
    tensors = inputs()
    count = tensors[0].numel() * tensors[1].size(2)
    assert count <= small.MOST < count * 8
    attention(*(tensor.repeat(8, 1, 1, 1) for tensor in tensors))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    assert attention(*leaves).requires_grad
    assert attention(*leaves, dropout_p=0.1).requires_grad
    learned = torch.zeros(5, 7).view(1, 1, 5, 7).requires_grad_()
    assert attention(*tensors, learned).requires_grad
    assert attention(*tensors, learned, dropout_p=0.1).requires_grad
    torch.func.vmap(attention)(*(tensor[None] for tensor in tensors))
    torch.func.jvp(attention, tuple(tensors), tuple(tensors))
    assert not served
    with torch.no_grad():
        attention(*(tensor.clone().requires_grad_() for tensor in tensors), learned)
    assert served == [True]


def test_a_traced_call_is_in_the_graph(served):
    traced = torch.jit.trace(lambda *t: attention(*t), tuple(inputs()))
    others = [tensor.flip(2) * 2 for tensor in inputs()]
    torch.testing.assert_close(traced(*others), attention(*others))


def test_what_pytorch_does_not_keep_in_memory_takes_another_path(served):
    """Bits that negate a tensor, tensors of zeros, other devices, columns that are not contiguous."""
    query, key, value = inputs()
    negated = torch.view_as_complex(torch.stack((query, query), -1)).conj().imag
    assert negated.is_neg()
    dense = torch.zeros_like(query).copy_(negated)
    torch.testing.assert_close(attention(negated, key, value), attention(dense, key, value))
    zeros = torch._efficientzerotensor(key.shape)
    torch.testing.assert_close(attention(query, zeros, value), attention(query, torch.zeros_like(key), value))
    leaf, mask = query.clone().requires_grad_(), torch.ones(1, 1, 5, 7, dtype=torch.bool)
    torch.testing.assert_close(attention(leaf, zeros, value, mask), attention(leaf, torch.zeros_like(key), value, mask))
    apart = torch.stack((value, value), -1)[..., 0]
    torch.testing.assert_close(attention(query, key, apart), attention(query, key, value))
    assert served.count(True) == 3
    with pytest.raises(ValueError, match="key"):
        attention(query, key.to("meta"), value)


def test_a_key_that_every_query_masks_is_ignored_and_a_nan_elsewhere_is_not(served):
    query, key, value = inputs()
    mask = (torch.arange(7) < 4).view(1, 1, 1, 7)
    wanted = attention(query, key[:, :, :4], value[:, :, :4])
    key[:, :, 4:], value[:, :, 5:] = float("nan"), float("inf")
    torch.testing.assert_close(attention(query, key, value, mask), wanted)
    assert attention(query, key, value).isnan().all()
    key[:, :, :] = float("-inf")  # rows without weights: by the formula NaN, as the scores
    assert served == [True, False, True]
    assert attention(query.abs(), key, value).isnan().all()
    assert not served[-1]


def test_shapes_are_remembered_up_to_a_number(monkeypatch, served):
    monkeypatch.setattr(small, "_plans", {})
    monkeypatch.setattr(small, "_MOST_PLANS", 3)
    for keys in (1, 2, 3, 4, 5, 4):
        tensors = inputs(keys=keys)
        torch.testing.assert_close(attention(*tensors).double(), expected(tensors, {}), rtol=0, atol=1e-6)
        assert 0 < len(small._plans) <= 3
    assert served == [True] * 6


def test_without_the_library_small_calls_are_those_of_pytorch(monkeypatch):
    tensors = inputs()
    monkeypatch.setattr(small, "_kernel", None)
    assert torch.equal(attention(*tensors), direct.torch_attention(*tensors))
