"""What only a GPU can show of the projections: streams, graphs, compilation, leave to use TF32, the plan."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen import backend
from fastgen.functional import merge_heads_projection, qkv_projection
from fastgen.testing import largest_error

REASON = (
    backend.why_not_compiled("projection_forward", torch.device("cuda"))
    if torch.cuda.is_available()
    else "no CUDA device"
)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def problem(dtype=torch.bfloat16, channels_first=False, device="cuda"):
    shape = (2, 64, 15, 20) if channels_first else (2, 300, 64)
    shapes = [shape, (192, 64), (192,), (32,), (32,), (64, 64), (64,), (1,)]
    tensors = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]
    angles = torch.rand(300, 16, device=device)
    return tensors, (angles.cos(), angles.sin()), channels_first


def block(tensors, rotary, channels_first):
    x, weight, bias, query_norm, key_norm, out, out_bias, gate = tensors
    options = {"norms": (query_norm, key_norm), "rotary": rotary, "channels_first": channels_first}
    q, k, v = qkv_projection(x, weight, bias, heads=(2, 2, 2), head_dims=(32, 32, 32), **options)
    return merge_heads_projection(q * k + v, out, out_bias, residual=x, gate=gate, channels_first=channels_first)


def step(tensors, *rest):
    with fastgen.use_backend("compiled"):
        y = block(tensors, *rest)
        return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]


LAYOUT = pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])


@LAYOUT
def test_cuda_another_stream_and_every_run_give_the_same_bits(channels_first):
    arguments = problem(channels_first=channels_first)
    first = step(*arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = step(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@LAYOUT
def test_cuda_graphs_capture_forward_and_backward(channels_first):
    arguments = problem(channels_first=channels_first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*arguments)
    with torch.no_grad():
        arguments[0][0].mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(*arguments), strict=True))


def test_cuda_a_penalty_is_differentiated_through_the_kernels():
    tensors, *rest = problem(torch.float32)

    def penalty(tensors, backend):
        with fastgen.use_backend(backend):
            (gradient,) = torch.autograd.grad(block(tensors, *rest).square().sum(), tensors[:1], create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), tensors)

    wide = [t.detach().double().requires_grad_() for t in tensors]
    for a, b in zip(penalty(tensors, "compiled"), penalty(wide, "torch"), strict=True):
        assert largest_error(a, b) <= 1e-3 * max(1.0, float(b.abs().max()))


def test_cuda_tf32_is_taken_only_where_the_user_allows_it():
    tensors, *rest = problem(torch.float32)
    wide = [t.detach().double() for t in tensors]
    exact = block(wide, tuple(t.double() for t in rest[0]), rest[1])
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            with fastgen.use_backend("compiled"):
                errors[precision] = largest_error(block(tensors, *rest), exact) / float(exact.abs().max())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 2e-6 < 2e-5 < errors["tf32"] < 1e-2


def test_cuda_under_compile_it_is_the_same():
    tensors, *rest = problem()
    eager = block(tensors, *rest)
    compiled = torch.compile(lambda *t: block(t, *rest), fullgraph=True)(*tensors)
    assert largest_error(compiled, eager) <= 2e-2 * float(eager.abs().max())


def test_cuda_what_no_kernel_takes_goes_to_pytorch_or_raises():
    x, weight = torch.randn(2, 5, 7, device="cuda"), torch.randn(6, 7, device="cuda")
    assert qkv_projection(x, weight, heads=(1,), head_dims=(6,))[0].shape == (2, 1, 5, 6)
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match="multiples of 4, not 7"):
        qkv_projection(x, weight, heads=(1,), head_dims=(6,))
