"""What every operator and public function promises, whatever it computes."""

from __future__ import annotations

import doctest
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastgen
from fastgen import backend, functional
from fastgen.functional import (
    merge_heads_projection,
    multi_head_projection,
    qkv_projection,
    reparameterize,
    reparameterize_kl,
    scaled_dot_product_attention,
)
from fastgen.ops.attention.operators import Options

PACKAGE = Path(fastgen.__file__).parent
SEED = torch.tensor([5])


def attention_arguments(masked=False, dropout=False):
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    mask = torch.randn(4, 1, 6).unsqueeze(0) if masked else None
    return query, key, value, mask, SEED if dropout else None, *Options(0.5 if dropout else 0.0, -1, -1, 0.4)


def backward_arguments(**kwargs):
    arguments = attention_arguments(**kwargs)
    out, lse = torch.ops.fastgen_torch.attention_forward(*arguments)
    return torch.randn_like(out), torch.randn_like(lse), *arguments[:3], out, lse, *arguments[3:]


def second_order_arguments(**kwargs):
    """Of attention_second_order; those of attention_tangent are among them."""
    grad_out, grad_lse, query, key, value, out, lse, mask, seed, *options = backward_arguments(**kwargs)
    tangents = [None if t is None else torch.randn_like(t) for t in (query, key, value, mask)]
    return grad_out, grad_lse, query, key, value, out, lse, mask, seed, *tangents, *options


def cases():
    matrix = lambda: torch.randn(3, 7)  # noqa: E731
    row = torch.randn(7).expand(3, 7)
    yield "latent_forward", (matrix(), matrix(), None, None, SEED, True)
    yield "latent_forward", (matrix(), matrix(), row, row, SEED, False)
    yield "latent_forward", (*torch.randn(3, 8).chunk(2, 1), None, None, torch.tensor([1, 2, 3]), True)
    yield "latent_backward", (matrix(), torch.randn(3), matrix(), matrix(), row, row, SEED)
    yield "latent_backward", (None, torch.randn(3), matrix(), matrix(), None, None, SEED)
    yield "latent_backward", (matrix(), None, matrix(), matrix(), None, None, SEED)
    for options in ({}, {"masked": True}, {"dropout": True}):
        yield "attention_forward", attention_arguments(**options)
        yield "attention_backward", (*backward_arguments(**options), bool(options.get("masked")))
        yield "attention_tangent", second_order_arguments(**options)[2:]
        yield "attention_second_order", (*second_order_arguments(**options), bool(options.get("masked")))
    narrow = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 16)
    yield "cpu_attention_forward", (*narrow, True, 0.4)
    rows = torch.ops.fastgen_torch.cpu_attention_forward(*narrow, True, 0.4)
    yield "cpu_attention_backward", (torch.randn_like(rows[0]), torch.randn(2, 4, 5), *narrow, *rows, True, 0.4)
    yield "cpu_attention_backward", (torch.randn_like(rows[0]), None, *narrow, *rows, False, 0.4)
    tile, row = lambda: torch.randn(2, 5, 7), torch.randn(2, 5, 1)
    yield "cpu_attention_weights", (tile(), tile(), row, None, None, None, None)
    yield "cpu_attention_weights", (tile(), tile(), row, tile(), tile(), row, tile())
    scores, factors = lambda: torch.randn(2, 5, 7), torch.rand(2, 5, 7)
    yield "cpu_attention_softmax", (scores(), None, torch.randn(2, 5))
    yield "cpu_attention_softmax", (scores(), factors, torch.randn(2, 5))
    yield "cpu_attention_softmax_backward", (scores(), scores(), factors, torch.randn(2, 5, 1), torch.randn(2, 5, 1))
    yield "cpu_dropout_keep", (torch.tensor([5, 6]), 12, 1, 1, 3, 4, 1, 2, 9, 3, 8, 0.3)
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(10, 6), torch.randn(10)
    plain, turned = ([], None, None), ([torch.randn(2)], torch.randn(1, 5, 1), torch.randn(1, 5, 1))
    parts = [3, 1], [2, 4]
    feature_map, length_first = x.mT.contiguous(), torch.randn(5, 2, 6).transpose(0, 1)
    yield "projection_forward", (x, weight, bias, *plain, *parts, False, 0.0, 0, False, False, False)
    yield "projection_forward", (length_first, weight, bias, *plain, *parts, False, 0.0, 0, False, False, False)
    yield "projection_forward", (feature_map, weight, None, *turned, *parts, True, 1e-6, 1, True, True, True)
    head, table = lambda: torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 5, 3)
    yield "cpu_finish_heads", (head(), torch.randn(8), table, table, 1e-6, True)
    yield "cpu_finish_heads", (head().bfloat16(), None, table[:1], table[:1], 1e-6, False)
    yield "cpu_finish_heads_backward", (head(), head(), torch.randn(8), None, None, 1e-6, True)
    yield "cpu_finish_heads_backward", (head(), head(), None, table, table, 1e-6, True)
    grads = [torch.randn(2, 3, 5, 2), torch.randn(2, 1, 5, 4)]
    yield "projection_backward", (grads, [], x, weight, *plain, True, False, 0.0, 0, False, False)
    yield "projection_backward", (grads, [], length_first, weight, *plain, True, False, 0.0, 0, False, False)
    yield "projection_backward", (grads, grads[:1], feature_map, weight, *turned, False, True, 1e-6, 1, True, True)
    heads, weight, gate = torch.randn(2, 3, 5, 2), torch.randn(7, 6), torch.randn(1, 1, 7)
    yield "merge_heads_forward", (heads, weight, torch.randn(7), torch.randn(2, 5, 7), gate, False, False)
    yield "merge_heads_forward", (heads, weight, None, None, None, True, True)
    yield "merge_heads_backward", (torch.randn(2, 5, 7), heads, weight, torch.randn(7), gate, False, False)
    yield "merge_heads_backward", (torch.randn(2, 7, 5), heads, weight, None, torch.randn(1, 1, 1), True, True)


CASES = list(cases())


@pytest.mark.parametrize("namespace", ["fastgen", "fastgen_torch"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_opcheck(case, namespace):
    name, arguments = CASES[case]
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), name).default, arguments)


def test_every_operator_has_an_opcheck_case():
    names = {name for family in backend.operators().values() for name in family}
    assert names == {name for name, _ in CASES}


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def wanting_gradients(argument):
    if isinstance(argument, list):
        return [wanting_gradients(a) for a in argument]
    wants = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.detach().clone().requires_grad_() if wants else argument


def differentiable_cases():
    """Each operator that a program may name; the last derivative, and those called inside of others, have none."""
    quick = {"latent_forward", "attention_forward", "attention_backward", "projection_forward", "merge_heads_forward"}
    for i, (name, _) in enumerate(CASES):
        if name == "attention_second_order" or (name.startswith("cpu_") and "finish" not in name):
            continue
        marks = [] if name in quick else [pytest.mark.slow]
        quick.discard(name)
        yield pytest.param(i, marks=marks, id=f"{name}-{i}")


@pytest.mark.parametrize("case", differentiable_cases())
def test_operators_called_by_name_are_differentiated_eagerly_and_compiled(case):
    name, arguments = CASES[case]
    arguments = tuple(wanting_gradients(a) for a in arguments)
    tests = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fastgen, name).default, arguments, test_utils=tests)


def test_operators_that_are_called_inside_of_others_refuse_to_be_differentiated():
    query, value = leaf(1, 1, 4, 8), leaf(1, 1, 4, 16)
    with pytest.raises(RuntimeError, match="cpu_attention_forward: expected tensors that need no gradient"):
        torch.ops.fastgen.cpu_attention_forward(query, query, value, False, 0.3)


# --------------------------------------------------------------------------------------------------
# torch.compile


FUNCTIONS = {
    "scaled_dot_product_attention": lambda: (
        lambda q, k, v, m: scaled_dot_product_attention(q, k, v, m, dropout_p=0.1, window=(3, 1), return_lse=True),
        (leaf(2, 4, 5, 8), leaf(2, 4, 6, 8), leaf(2, 4, 6, 3), leaf(4, 1, 6)),
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
    "qkv_projection, normalised and turned": lambda: (
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
    with fastgen.use_backend("compiled"), pytest.raises(Exception, match="backend 'compiled' was asked for"):
        compiled(wide)


# --------------------------------------------------------------------------------------------------
# Bad arguments: the type of the error and what it says, on every backend


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "latent of integers": (
        lambda: reparameterize(t(2, 3, dtype=torch.int64), t(2, 3)),
        TypeError,
        "mu: .*floating.*int64",
    ),
    "logvar of integers": (lambda: reparameterize(t(2, 3), t(2, 3, dtype=torch.int32)), TypeError, "logvar: .*int32"),
    "shapes that differ": (lambda: reparameterize_kl(t(2, 3), t(2, 4)), ValueError, r"logvar: .*\(2, 3\).*\(2, 4\)"),
    "dtypes that differ": (lambda: reparameterize_kl(t(2, 3), t(2, 3).half()), TypeError, "logvar: .*float32.*float16"),
    "a scalar latent": (lambda: reparameterize(t(), t()), ValueError, r"mu: expected \(B, \*\)"),
    "a number for mu": (lambda: reparameterize(1.0, t(1)), TypeError, "mu: expected a tensor, got float"),
    "a prior that does not fit": (
        lambda: reparameterize_kl(t(2, 3), t(2, 3), prior_mu=t(4)),
        ValueError,
        r"prior_mu: .*\(2, 3\), got \(4,\)",
    ),
    "an integer mask": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 4), t(1, 1, 3, 4), t(2, 3, dtype=torch.int64)),
        TypeError,
        "attn_mask: .*boolean.*int64",
    ),
    "a mask that does not fit": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 4), t(1, 1, 3, 4), t(3, 3)),
        ValueError,
        r"attn_mask: .*\(\.\.\., 2, 3\), got \(3, 3\)",
    ),
    "a negative window": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 4), t(1, 1, 3, 4), window=(-1, 0)),
        ValueError,
        "window: expected left .*>= 0.*got -1",
    ),
    "a window of one number": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 4), t(1, 1, 3, 4), window=3),
        ValueError,
        r"window: expected a pair \(left, right\), got 3",
    ),
    "dropout above one": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 4), t(1, 1, 3, 4), dropout_p=1.5),
        ValueError,
        r"dropout_p: .*\[0, 1\], got 1.5",
    ),
    "a tensor as scale": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 4), t(1, 1, 3, 4), scale=t()),
        TypeError,
        "scale: expected a number, got a tensor",
    ),
    "an infinite scale": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 4), t(1, 1, 3, 4), scale=float("inf")),
        ValueError,
        "scale: expected a finite number, got inf",
    ),
    "a sparse query": (
        lambda: scaled_dot_product_attention(t(2, 4).to_sparse(), t(3, 4), t(3, 4)),
        TypeError,
        "query: expected a dense .*sparse_coo",
    ),
    "a nested query": (
        lambda: scaled_dot_product_attention(
            torch.nested.nested_tensor([t(2, 4)], layout=torch.jagged), t(3, 4), t(3, 4)
        ),
        TypeError,
        "query: expected .*(N|n)ested",
    ),
    "a query in float8": (
        lambda: scaled_dot_product_attention(*(t(2, 4, dtype=torch.float8_e4m3fn),) * 3),
        TypeError,
        "query: expected float32, .*float8",
    ),
    "batches that do not broadcast": (
        lambda: scaled_dot_product_attention(t(2, 1, 2, 4), t(3, 1, 3, 4), t(3, 1, 3, 4)),
        ValueError,
        r"key: expected leading dims that broadcast with \(2, 1\), got \(3, 1\)",
    ),
    "key of another width": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 5), t(1, 1, 3, 5)),
        ValueError,
        "key: .*head dim 4",
    ),
    "value of another length": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 4), t(1, 1, 2, 4)),
        ValueError,
        "value: expected",
    ),
    "grouped heads unasked": (
        lambda: scaled_dot_product_attention(t(1, 4, 2, 4), t(1, 2, 3, 4), t(1, 2, 3, 4)),
        ValueError,
        "key: .*enable_gqa",
    ),
    "heads that do not divide": (
        lambda: scaled_dot_product_attention(t(1, 4, 2, 4), t(1, 3, 3, 4), t(1, 3, 3, 4), enable_gqa=True),
        ValueError,
        "key: .*divides query's 4, got 3",
    ),
    "query of integers": (
        lambda: scaled_dot_product_attention(*(t(1, 2, 4, dtype=torch.int64),) * 3),
        TypeError,
        "query: .*int64",
    ),
    "value of another dtype": (
        lambda: scaled_dot_product_attention(t(2, 4), t(2, 4), t(2, 4).double()),
        TypeError,
        "value: .*float32.*float64",
    ),
    "heads that do not divide the rows": (
        lambda: multi_head_projection(t(1, 2, 3), t(7, 3), num_heads=2),
        ValueError,
        "num_heads: .*7 rows, got 2",
    ),
    "no heads": (
        lambda: multi_head_projection(t(1, 2, 3), t(7, 3), num_heads=0),
        ValueError,
        "num_heads: .*positive.*0",
    ),
    "a weight of other channels": (
        lambda: multi_head_projection(t(1, 2, 3), t(4, 5), num_heads=2),
        ValueError,
        r"weight: expected \(4, 3\), got \(4, 5\)",
    ),
    "a weight of other rows": (
        lambda: qkv_projection(t(1, 2, 3), t(5, 3), heads=(1, 1, 1), head_dims=(2, 2, 2)),
        ValueError,
        "weight: expected 6 rows",
    ),
    "tokens with too many dims": (
        lambda: multi_head_projection(t(1, 2, 2, 3), t(4, 3), num_heads=2),
        ValueError,
        r"x: expected \(B, N, C\)",
    ),
    "a bias of another size": (
        lambda: multi_head_projection(t(1, 2, 3), t(4, 3), t(3), num_heads=2),
        ValueError,
        "bias: expected shape",
    ),
    "a gate of another size": (
        lambda: merge_heads_projection(t(1, 2, 3, 2), t(5, 4), gate=t(3)),
        ValueError,
        "gate: expected one element",
    ),
    "a residual of another size": (
        lambda: merge_heads_projection(t(1, 2, 3, 2), t(5, 4), residual=t(1, 3, 4)),
        ValueError,
        "residual: expected shape",
    ),
    "an unknown backend": (
        lambda: fastgen.use_backend("cuda").__enter__(),
        ValueError,
        "use_backend: expected one of auto",
    ),
}


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(name, backend):
    call, kind, text = BAD[name]
    with fastgen.use_backend(backend), pytest.raises(kind, match=text):
        call()


def test_forcing_a_backend_that_cannot_serve_raises_with_the_reason():
    arguments = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with fastgen.use_backend("compiled"):
        with pytest.raises(RuntimeError, match="backend 'compiled' was asked for, but"):
            reparameterize(*arguments)
        with pytest.raises(RuntimeError, match=r"no cpu kernel is written for attention_forward|was not built"):
            scaled_dot_product_attention(*(torch.zeros(1, 2, 4),) * 3)
    assert fastgen.current_backend() == "auto"


def test_use_backend_is_undone_by_an_error_and_nests():
    with pytest.raises(ZeroDivisionError), fastgen.use_backend("torch"):
        with fastgen.use_backend("auto"):
            assert fastgen.current_backend() == "auto"
        assert fastgen.current_backend() == "torch"
        raise ZeroDivisionError
    assert fastgen.current_backend() == "auto"


@pytest.mark.parametrize(("name", "outcome"), [("torch", "torch\n"), ("gpu", "FASTGEN_BACKEND: expected one of auto")])
def test_the_environment_chooses_the_backend(name, outcome):
    done = subprocess.run(
        [sys.executable, "-c", "import fastgen; print(fastgen.current_backend())"],
        env={**os.environ, "FASTGEN_BACKEND": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout + done.stderr


def test_examples_in_docstrings_run():
    results = doctest.testmod(functional, extraglobs={"torch": torch, "fastgen": fastgen})
    assert results.attempted >= len(functional.__all__)
    assert results.failed == 0


# --------------------------------------------------------------------------------------------------
# The package without its compiled parts

PROBE = """
import torch, fastgen
mu = torch.zeros(3, 8, requires_grad=True)
torch.manual_seed(0)
z, kl = fastgen.functional.reparameterize_kl(mu, torch.zeros(3, 8))
(z.sum() + kl.sum()).backward()
q = torch.randn(1, 2, 4, 8)
fastgen.functional.scaled_dot_product_attention(q, q, q, window=(1, 1))
print(fastgen.info())
print("sample", float(z[0, 0]))
try:
    with fastgen.use_backend("compiled"):
        fastgen.functional.reparameterize(mu, mu)
except RuntimeError as error:
    print("refused:", error)
"""


def run_copy(tmp_path, **extra):
    copy = tmp_path / "fastgen"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_report.json"))
    for name, content in extra.items():
        (copy / name.replace("__", ".")).write_bytes(content)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_everything_works_with_every_compiled_library_removed(tmp_path):
    output = run_copy(tmp_path)
    assert "_cpu was not built" in output
    assert "refused: backend 'compiled' was asked for, but _cpu was not built" in output
    torch.manual_seed(0)
    mine = reparameterize(torch.zeros(3, 8), torch.zeros(3, 8))
    theirs = float(output.split("sample ")[1].split()[0])
    assert abs(theirs - float(mine[0, 0])) < 1e-6


def test_a_library_that_does_not_load_is_skipped_with_its_reason(tmp_path):
    output = run_copy(tmp_path, _cpu__so=b"not a library")
    assert "library _cpu: _cpu.so does not load" in output
    assert "sample" in output


def test_a_library_that_was_cut_short_is_skipped_with_its_reason_and_does_not_kill_the_process(tmp_path):
    whole = Path(backend.compiled_libraries()[0].path or pytest.skip("no library was built")).read_bytes()
    output = run_copy(tmp_path, _cpu__so=whole[: len(whole) // 2], _C__so=whole[:70])
    assert f"library _cpu: _cpu.so was cut short: it has {len(whole) // 2} bytes of" in output
    assert "sample" in output


@pytest.mark.parametrize(
    ("capability", "architectures", "works"),
    [
        ((8, 0), ["80"], True),
        ((8, 6), ["80"], True),
        ((9, 0), ["90a"], True),
        ((9, 0), ["80"], False),
        ((10, 0), ["80", "90a", "120", "120+PTX"], False),
        ((12, 1), ["120", "120+PTX"], True),
        ((13, 0), ["120", "120+PTX"], True),
        ((9, 0), [], False),
    ],
)
def test_which_devices_a_build_runs_on(capability, architectures, works):
    assert backend.runs_on(capability, architectures) is works


def test_a_gpu_that_the_kernels_are_not_compiled_for_takes_pytorch_and_says_so(monkeypatch):
    cuda, name = torch.device("cuda", 0), "attention_forward"
    library = backend.CompiledLibrary("_cuda", "cuda", path=Path("somewhere"))
    monkeypatch.setattr(backend, "_compiled", [library])
    monkeypatch.setattr(backend, "_places", {})
    monkeypatch.setattr(backend, "has_kernel", lambda *arguments: True)
    monkeypatch.setattr(backend, "compiled_architectures", lambda: ["80", "90a"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = "the kernels are compiled for 80, 90a, not for (7, 5)"
    assert backend._place(name, cuda, torch.float16) == (backend.TORCH, reason)
    assert fastgen.environment._served_by(name, cuda) == f"PyTorch ({reason})"
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match="compiled for 80, 90a, not for"):
        backend.select(name, SimpleNamespace(device=cuda, dtype=torch.float16))


def test_the_torch_backend_is_still_accepted_as_reference():
    with pytest.warns(DeprecationWarning, match="'reference' is called 'torch'"), fastgen.use_backend("reference"):
        assert fastgen.current_backend() == "torch"
