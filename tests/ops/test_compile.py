"""torch.compile of every public function: whole graphs, the same results, no wrong second derivative."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen import functional
from fastgen.functional import (
    merge_heads_projection,
    multi_head_projection,
    qkv_projection,
    reparameterize,
    reparameterize_kl,
    scaled_dot_product_attention,
    scaled_dot_product_attention_jvp,
    varlen_attention,
)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


BEGINS = torch.tensor([0, 4, 4, 9])
FUNCTIONS = {
    "scaled_dot_product_attention": lambda: (
        lambda q, k, v, m: scaled_dot_product_attention(q, k, v, m, dropout_p=0.1, window=(3, 1), return_lse=True),
        (leaf(2, 4, 5, 8), leaf(2, 4, 6, 8), leaf(2, 4, 6, 3), leaf(4, 1, 6)),
    ),
    "scaled_dot_product_attention_jvp": lambda: (
        lambda q, k, v, t: scaled_dot_product_attention_jvp((q, k, v), (t, None, v), dropout_p=0.1, window=(3, 1)),
        (leaf(2, 4, 5, 8), leaf(2, 4, 6, 8), leaf(2, 4, 6, 3), leaf(2, 4, 5, 8)),
    ),
    "varlen_attention": lambda: (
        lambda q, k, v: varlen_attention(q, k, v, BEGINS, is_causal=True, enable_gqa=True, return_lse=True),
        (leaf(9, 4, 8), leaf(9, 2, 8), leaf(9, 2, 3)),
    ),
    "multi_head_projection": lambda: (
        lambda x, w: multi_head_projection(x, w, num_heads=2),
        (leaf(2, 5, 6), leaf(8, 6)),
    ),
    "rotary_embedding": lambda: (
        functional.rotary_embedding,
        (leaf(2, 3, 5, 4), torch.randn(5, 2).requires_grad_(), torch.randn(5, 2).requires_grad_()),
    ),
    "qkv_projection": lambda: (
        lambda x, w, b: qkv_projection(x, w, b, heads=(2, 1, 1), head_dims=(4, 4, 2), channels_first=True),
        (leaf(2, 6, 3, 2), leaf(14, 6), leaf(14)),
    ),
    "qkv_projection, with norms and rotary": lambda: (
        lambda x, w, n: qkv_projection(
            x, w, heads=(2, 1, 1), head_dims=(4, 4, 2), norms=(n, n), rotary=(x.new_ones(x.size(1), 1),) * 2
        ),
        (leaf(2, 6, 6), leaf(14, 6), leaf(4)),
    ),
    "merge_heads_projection": lambda: (
        lambda x, w, r, g: merge_heads_projection(x, w, residual=r, gate=g),
        (leaf(2, 4, 5, 2), leaf(6, 8), leaf(2, 5, 6), leaf(1)),
    ),
    "reparameterize": lambda: (reparameterize, (leaf(3, 8), leaf(3, 8))),
    "reparameterize_kl": lambda: (
        lambda m, v, p: reparameterize_kl(m, v, prior_mu=p),
        (leaf(3, 8), leaf(3, 8), leaf(8)),
    ),
}


def test_every_public_function_is_compiled_in_a_test():
    assert {name.partition(",")[0] for name in FUNCTIONS} == set(functional.__all__)


def outputs_and_gradients(function, arguments):
    torch.manual_seed(1)
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    loss = sum(o.square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, arguments)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_compile_takes_each_function_whole(name, backend, dynamic):
    torch._dynamo.reset()
    function, arguments = FUNCTIONS[name]()
    with fastgen.use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for a, b in zip(
            outputs_and_gradients(compiled, arguments), outputs_and_gradients(function, arguments), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile_takes_one_tensor_in_several_places(dynamic):
    torch._dynamo.reset()
    x, weight = leaf(2, 2, 6, 8), leaf(8, 8)

    def function(x, weight):
        y = scaled_dot_product_attention(x, x, x, is_causal=True)
        z, kl = reparameterize_kl(weight, weight, prior_mu=weight)
        return y, z, kl, multi_head_projection(weight.unsqueeze(0), weight, num_heads=2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for arguments in ((x, weight), (leaf(2, 2, 9, 8), weight)):
        ours, wanted = (outputs_and_gradients(f, arguments) for f in (compiled, function))
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_inductor_compiles_a_block_of_them():
    torch._dynamo.reset()

    def block(x, weight, out):
        q, k, v = qkv_projection(x, weight, heads=(2, 2, 2), head_dims=(4, 4, 4))
        y = merge_heads_projection(scaled_dot_product_attention(q, k, v), out, residual=x)
        z, kl = reparameterize_kl(*y.chunk(2, dim=1))
        return z.sum() + kl.sum()

    x, weight, out = leaf(2, 4, 8), leaf(24, 8), leaf(8, 8)
    with torch.no_grad():
        torch.manual_seed(0)
        plain = block(x, weight, out)
    compiled = torch.compile(block, fullgraph=True)(x, weight, out)
    compiled.backward()
    assert x.grad is not None
    # Inductor draws its own seed, so only what does not depend on the noise can be compared.
    assert bool(torch.isfinite(compiled))
    assert bool(torch.isfinite(plain))


def test_a_second_derivative_under_compile_raises_and_is_never_wrong():
    torch._dynamo.reset()
    q = leaf(1, 1, 4, 8)
    compiled = torch.compile(
        lambda q: scaled_dot_product_attention(q, q, q).square().sum(), backend="aot_eager", fullgraph=True
    )
    out = compiled(q)
    (grad,) = torch.autograd.grad(out, q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()


def test_the_forced_backend_is_a_guard_of_compiled_code():
    torch._dynamo.reset()
    wide = torch.randn(2, 3, 8, dtype=torch.float64)  # no compiled kernel takes float64
    compiled = torch.compile(lambda x: reparameterize(*x), fullgraph=True, backend="eager")
    compiled(wide)
    with fastgen.use_backend("compiled"), pytest.raises(Exception, match="backend 'compiled' was requested"):
        compiled(wide)
