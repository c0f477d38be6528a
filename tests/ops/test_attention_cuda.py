"""Attention on a GPU: streams, CUDA graphs, compilation, TF32."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen import backend, reference
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.nn import KVCache
from fastgen.testing import largest_error

REASON = (
    backend.why_not_compiled("attention_forward", torch.device("cuda"))
    if torch.cuda.is_available()
    else "no CUDA device"
)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

OPTIONS = [{}, {"dropout_p": 0.2, "window": (30, 5)}, {"attn_mask": "learned"}]


def problem(options, dtype=torch.bfloat16, device="cuda"):
    tensors = [torch.randn(2, 4, n, 64, device=device, dtype=dtype, requires_grad=True) for n in (100, 130, 130)]
    kwargs = {**options}
    if kwargs.get("attn_mask") == "learned":
        kwargs["attn_mask"] = torch.randn(4, 1, 130, device=device, requires_grad=True)
        tensors.append(kwargs["attn_mask"])
    return tensors, kwargs


def step(tensors, kwargs):
    out = attention(*tensors[:3], **kwargs)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


def penalty_step(tensors, kwargs):
    out = attention(*tensors[:3], **kwargs)
    grads = torch.autograd.grad(out.float().square().sum(), tensors, create_graph=True)
    penalty = sum(grad.float().square().sum() for grad in grads)
    return [out.detach(), *torch.autograd.grad(penalty, tensors)]


STEPS = pytest.mark.parametrize("step", [step, penalty_step], ids=["first order", "second order"])


@STEPS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cuda_another_stream_and_every_run_give_the_same_bits(options, step):
    tensors, kwargs = problem(options)
    torch.manual_seed(3)
    first = step(tensors, kwargs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.manual_seed(3)
        second = step(tensors, kwargs)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@STEPS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cuda_graphs_capture_forward_and_backward(options, step):
    tensors, kwargs = problem(options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(tensors, kwargs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors, kwargs)
    with torch.no_grad():
        tensors[0].mul_(0.5)
    graph.replay()
    first = [t.clone() for t in captured]
    graph.replay()
    if "dropout_p" in options:
        assert not torch.equal(first[0], captured[0]), "each replay draws a new seed"
    else:
        assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first, step(tensors, kwargs), strict=True))


def test_cuda_a_graph_replays_a_step_of_generation():
    """With the whole buffers of the cache and a mask, against a cache whose shapes grow."""
    static, growing = (KVCache(2, 2, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query, key, value = (torch.empty(2, heads, 1, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))

    def step():
        keys, values, mask = static.update(key, value)
        return attention(query, keys, values, mask, enable_gqa=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for tensor in (query, key, value):
            tensor.normal_()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    static.reset()
    for _ in range(200):
        for tensor in (query, key, value):
            tensor.normal_()
        graph.replay()
        wanted = attention(query, *growing.append(key, value), enable_gqa=True)
        torch.testing.assert_close(captured, wanted, rtol=0, atol=2e-2)


def test_cuda_under_compile_it_is_the_same_kernel():
    tensors, kwargs = problem({"is_causal": True})
    compiled = torch.compile(lambda *t: attention(*t, **kwargs).float().square().sum(), fullgraph=True)
    eager = attention(*tensors, **kwargs).float().square().sum()
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(eager, tensors), strict=True):
        assert largest_error(a, b) <= 1e-2 * float(b.abs().max())


def test_cuda_tf32_is_taken_only_where_the_user_allows_it():
    tensors, kwargs = problem({}, torch.float32)
    exact = reference.attention(*(t.detach().double() for t in tensors))[0]
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = largest_error(attention(*tensors, **kwargs), exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 5e-6 < 5e-5 < errors["tf32"] < 1e-2


def test_cuda_deterministic_algorithms_are_no_obstacle():
    tensors, kwargs = problem({"attn_mask": "learned"})
    torch.use_deterministic_algorithms(True)
    try:
        step(tensors, kwargs)
    finally:
        torch.use_deterministic_algorithms(False)


def test_cuda_heads_too_wide_for_a_kernel():
    tensors = [torch.randn(1, 1, 9, 600, device="cuda") for _ in range(3)]
    assert largest_error(attention(*tensors), reference.attention(*(t.double() for t in tensors))[0]) < 1e-2
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match="head dims up to 512, not for 600 and 600"):
        attention(*tensors)


def test_cuda_heads_too_wide_for_a_tangent():
    tensors = [torch.randn(1, 1, 9, 600, device="cuda") for _ in range(3)]
    directions = tuple(t.flip(2) for t in tensors)
    exact = torch.func.jvp(
        lambda *t: reference.attention(*t)[0], tuple(t.double() for t in tensors), tuple(t.double() for t in directions)
    )[1]
    assert largest_error(torch.func.jvp(attention, tuple(tensors), directions)[1], exact) < 1e-2
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match="head dims up to 512, not for 600 and 600"):
        torch.func.jvp(attention, tuple(tensors), directions)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_cuda_runs_on_the_device_of_its_tensors():
    tensors, kwargs = problem({}, device="cuda:1")
    assert all(t.device == torch.device("cuda:1") for t in step(tensors, kwargs))
