"""Argument checks of the raw operators: a bad argument is refused by name before any memory is read."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen import backend
from tests.emulator import build

NAMESPACES = ("fastgen", "fastgen_torch")
PLAIN = (0.0, -1, -1, 0.25, 0.0, False)
SEED = torch.tensor([5])


def randn(*shape):
    return torch.randn(shape)


def rows(*shape):
    """With a last dim that is not contiguous."""
    return torch.randn(shape).mT.contiguous().mT


def freed(*shape):
    tensor = torch.randn(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


QUERY, KEY, VALUE = randn(2, 4, 5, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 3)
OUT, LSE = randn(2, 4, 5, 3), randn(2, 4, 5)


def attention(query=QUERY, key=KEY, value=VALUE, mask=None, seed=None, options=PLAIN):
    return "attention_forward", (query, key, value, mask, seed, None, *options)


def attention_backward(grad_out=OUT, grad_lse=None, out=OUT, lse=LSE, mask=None, mask_grad=False):
    return "attention_backward", (grad_out, grad_lse, QUERY, KEY, VALUE, out, lse, mask, None, None, *PLAIN, mask_grad)


def tangent(query=None, key=None, value=None, mask=None):
    return "attention_tangent", (QUERY, KEY, VALUE, OUT, LSE, None, None, None, query, key, value, mask, *PLAIN)


def forward_tangent(key=KEY, of_key=None, of_mask=None):
    return "attention_forward_tangent", (QUERY, key, VALUE, None, None, None, None, of_key, None, of_mask, *PLAIN)


def cpu_attention(key=None, value=None, mask=None):
    key = randn(2, 2, 6, 8) if key is None else key
    value = randn(2, 2, 6, 16) if value is None else value
    return "cpu_attention_forward", (QUERY, key, value, mask, None, 0.0, -1, -1, 0.25)


def cpu_tangent(tangent_key=None, tangent_mask=None):
    tangents = None, tangent_key, None, tangent_mask
    return "cpu_attention_tangent", (QUERY, KEY, VALUE, OUT, LSE, None, None, *tangents, 0.0, -1, -1, 0.25)


def keep(rows_per_seed=60, batches=1, heads=3, length=20, queries=2, keys=9, last_key=8, p=0.3):
    return "cpu_dropout_keep", (SEED, rows_per_seed, 0, batches, heads, length, 0, queries, keys, 3, last_key, p)


def softmax(scores=None, factors=None, lse=None):
    scores = randn(3, 5) if scores is None else scores
    return "cpu_attention_softmax", (scores, factors, randn(3) if lse is None else lse)


def projection(x=None, weight=None, bias=None, norms=(), cos=None, sin=None, heads=(3,), dims=(8,), rotated=1):
    x = randn(2, 6, 16) if x is None else x
    weight = randn(24, 16) if weight is None else weight
    numbers = (list(heads), list(dims), False, 1e-6, rotated, False, False, False)
    return "projection_forward", (x, weight, bias, list(norms), cos, sin, *numbers)


def projection_backward(grads=None, kept=(), norms=()):
    grads = [randn(2, 3, 6, 8)] if grads is None else grads
    numbers = (False, False, 1e-6, 0, False, False)
    return "projection_backward", (grads, list(kept), randn(2, 6, 16), randn(24, 16), list(norms), None, None, *numbers)


def merge(residual=None, gate=None, bias=None):
    return "merge_heads_forward", (randn(2, 3, 5, 2), randn(7, 6), bias, residual, gate, False, False)


def merge_backward(grad=None, gate=None):
    grad = randn(2, 5, 7) if grad is None else grad
    return "merge_heads_backward", (grad, randn(2, 3, 5, 2), randn(7, 6), None, gate, False, False)


def finish(part=None, norm=None, cos=None, sin=None):
    return "cpu_finish_heads", (randn(2, 3, 5, 8) if part is None else part, norm, cos, sin, 1e-6, False)


def latent(logvar=None, seed=SEED):
    return "latent_forward", (randn(4, 7), randn(4, 7) if logvar is None else logvar, None, None, seed, True)


def same_memory():
    scores = randn(3, 5)
    return softmax(scores, scores)


REFUSED = [
    (lambda: attention(key=randn(2, 3, 6, 8), value=randn(2, 3, 6, 3)), "key: .*heads that divides query's 4, got 3"),
    (lambda: attention(key=randn(2, 0, 6, 8), value=randn(2, 0, 6, 3)), "key: .*heads that divides query's 4, got 0"),
    (lambda: attention(key=randn(1, 2, 6, 8), value=randn(1, 2, 6, 3)), "key: expected shape"),
    (lambda: attention(value=randn(2, 2, 5, 3)), "value: expected shape"),
    (lambda: attention(query=QUERY[0]), "query: expected four dims"),
    (lambda: attention(query=rows(2, 4, 5, 8)), "query: expected a contiguous last dim"),
    (lambda: attention(query=QUERY.to_sparse()), "query: expected a strided tensor"),
    (lambda: attention(query=QUERY.to(torch.float8_e5m2)), "query: expected float16, bfloat16, float32 or float64"),
    (lambda: attention(key=KEY.double()), "key: expected torch.float32, got torch.float64"),
    (lambda: attention(key=freed(2, 2, 6, 8)), "key: expected a tensor with memory"),
    (lambda: attention(mask=randn(2, 1, 5, 5)), "mask: expected"),
    (lambda: attention(mask=torch.ones(1, 1, 5, 6, dtype=torch.int64)), "mask: expected a boolean or floating"),
    (lambda: attention(seed=torch.tensor([1, 2, 3]), options=(0.5, *PLAIN[1:])), "seed: .*divides the batch, 2, got 3"),
    (lambda: attention(seed=torch.tensor([1.0]), options=(0.5, *PLAIN[1:])), "seed: expected torch.int64"),
    (lambda: attention(options=(0.5, *PLAIN[1:])), "seed: expected one, because dropout_p is 0.5"),
    (lambda: attention(options=(1.0, *PLAIN[1:]), seed=SEED), "dropout_p: expected a probability"),
    (lambda: attention(options=(0.0, -1, -5, 0.25, 0.0, False)), "window_right: expected >= 0, or -1"),
    (
        lambda: attention(options=(0.0, -1, -1, 0.25, -2.0, False)),
        "softcap: expected 0, or a number from 1e-30 to 1e30",
    ),
    (lambda: attention_backward(grad_out=randn(2, 4, 5, 4)), "grad_out: expected shape"),
    (lambda: attention_backward(out=rows(2, 4, 5, 3)), "out: expected a contiguous last dim"),
    (lambda: attention_backward(lse=LSE[:, :2]), "lse: expected shape"),
    (lambda: attention_backward(mask=torch.ones(1, 1, 5, 6) > 0, mask_grad=True), "mask_grad: expected False"),
    (lambda: attention_backward(grad_lse=randn(2, 4)), "grad_lse: expected shape"),
    (lambda: tangent(query=randn(2, 4, 5, 7)), "tangent_query: expected shape"),
    (lambda: tangent(mask=torch.ones(1, 1, 5, 6) > 0), "tangent_mask: expected a floating tensor"),
    (lambda: forward_tangent(key=randn(2, 3, 6, 8)), "key: .*heads that divides query's 4, got 3"),
    (lambda: forward_tangent(of_key=randn(2, 2, 6, 7)), "tangent_key: expected shape"),
    (lambda: forward_tangent(of_mask=torch.ones(1, 1, 5, 6) > 0), "tangent_mask: expected a floating tensor"),
    (lambda: cpu_attention(key=randn(2, 0, 6, 8), value=randn(2, 0, 6, 16)), "key: .*number of heads that divides"),
    (lambda: cpu_attention(value=randn(2, 2, 5, 16)), "value: expected shape"),
    (lambda: cpu_attention(mask=randn(2, 3, 5, 6)), "mask: expected"),
    (lambda: cpu_attention(mask=torch.ones(2, 4, 5, 7, dtype=torch.bool)), "mask: expected"),
    (lambda: cpu_tangent(tangent_key=randn(2, 2, 6, 7)), "tangent_key: expected shape"),
    (lambda: cpu_tangent(tangent_mask=torch.ones(1, 1, 5, 6, dtype=torch.bool)), "tangent_mask: expected"),
    (lambda: keep(heads=2**32, length=2**32), "batches: "),
    (lambda: keep(rows_per_seed=2**62, keys=2**20, last_key=4), "keys: "),
    (lambda: keep(queries=21), "first_query, queries: expected ranges within the problem"),
    (lambda: keep(batches=-1), "first_batch, batches: expected ranges within the problem"),
    (lambda: keep(p=1.0), "p: expected a probability"),
    (lambda: softmax(randn(1, 5).expand(3, 5)), "scores: expected"),
    (lambda: softmax(lse=randn(1).expand(3)), "lse: expected"),
    (lambda: softmax(factors=randn(3, 4)), "keep: expected shape"),
    (lambda: softmax(lse=randn(4)), "lse: expected an element for each of the 3 rows"),
    (same_memory, "keep: expected memory of its own, got some that scores is written to"),
    (lambda: projection(weight=randn(23, 16)), "weight: expected shape"),
    (lambda: projection(bias=randn(1)), "bias: expected shape"),
    (lambda: projection(norms=[randn(7)]), "norms: expected shape"),
    (lambda: projection(heads=(3, 1)), "head_dims: expected as many as heads"),
    (lambda: projection(rotated=-1), "rotated: expected between 0 and the 1 parts"),
    (lambda: projection(cos=randn(1, 6, 5), sin=randn(1, 6, 5)), "cos: expected"),
    (lambda: projection(cos=randn(2, 6, 2), sin=randn(1, 6, 2)), "sin: expected shape"),
    (lambda: projection(cos=randn(1, 6, 2)), "sin: expected together with cos"),
    (lambda: projection_backward([randn(2, 3, 5, 8)]), "grads: expected"),
    (lambda: projection_backward([randn(2, 3, 6, 7)]), "weight: expected shape"),
    (lambda: projection_backward(norms=[randn(8)]), "kept: expected one for each of the 1 norms"),
    (lambda: projection_backward(norms=[randn(8)], kept=[randn(2, 3, 6, 7)]), "kept: expected shape"),
    (lambda: merge(residual=randn(1, 5, 7)), "residual: expected shape"),
    (lambda: merge(gate=randn(2, 5, 7)), "gate: expected"),
    (lambda: merge(bias=randn(6)), "bias: expected shape"),
    (lambda: merge_backward(grad=randn(2, 4, 7)), "grad: expected shape"),
    (lambda: merge_backward(gate=randn(2, 1, 7)), "gate: expected one that the batch shares"),
    (lambda: finish(norm=randn(7)), "norm: expected shape"),
    (lambda: finish(cos=randn(2, 5, 3), sin=randn(1, 5, 3)), "sin: expected shape"),
    (lambda: finish(part=randn(3, 5, 8)), "part: expected"),
    (lambda: latent(logvar=randn(4, 6)), "logvar: expected shape"),
    (lambda: latent(logvar=freed(4, 7)), "logvar: expected a tensor"),
    (lambda: latent(seed=torch.tensor([1, 2, 3])), "seed: expected a number of seeds that divides"),
]


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("case", range(len(REFUSED)), ids=[f"{i}-{text}" for i, (_, text) in enumerate(REFUSED)])
def test_what_does_not_fit_is_refused_by_name(case, namespace):
    make, text = REFUSED[case]
    name, arguments = make()
    with pytest.raises((TypeError, ValueError, RuntimeError), match=text):
        backend.operator(namespace, name)(*arguments)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_none_for_a_tensor_is_refused(namespace):
    with pytest.raises((TypeError, RuntimeError), match="key: expected a tensor, got None"):
        backend.operator(namespace, "attention_forward")(QUERY, None, VALUE, None, None, None, *PLAIN)
    with pytest.raises(TypeError, match="key: expected a tensor, got None"):
        backend.operator(namespace, "attention_forward")(QUERY.to("meta"), None, VALUE, None, None, None, *PLAIN)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_keys_that_no_head_looks_at_have_a_gradient_of_zero(namespace):
    query, key, value, rows_of_query = randn(2, 0, 5, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 16), randn(2, 0, 5)
    out = randn(2, 0, 5, 16)
    backward = backend.operator(namespace, "cpu_attention_backward")
    grads = backward(out, None, query, key, value, out, rows_of_query, None, None, 0.0, -1, -1, 0.3, False)[:3]
    assert [g.shape for g in grads] == [query.shape, key.shape, value.shape]
    assert all(bool((g == 0).all()) for g in grads)


def test_kernels_of_gpus_refuse_it_too(emulator):
    """Before these were checked, the kernels read past the end of a residual, a gradient or a table."""
    build.register()
    operators = torch.ops.fastgen_emulated
    x, weight, flat = randn(2, 3, 5, 8), randn(24, 24), randn(2, 5, 24)
    tokens, grad = randn(2, 6, 16), randn(2, 3, 6, 8)
    five = {"heads": [1] * 5, "dims": [8] * 5, "weight": randn(40, 16), "norms": [randn(8)] * 5}
    wide = (randn(2, 4, 5, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8), None, None)
    mu = randn(4, 8)
    for name, arguments, text in [
        ("merge_heads_forward", (x, weight, None, flat[:1], None, False, False), "residual: expected"),
        ("merge_heads_forward", (x, weight, None, flat[:, :4], None, False, False), "residual: expected"),
        ("merge_heads_backward", (flat[:, :4], x, weight, None, None, False, False), "grad: expected"),
        ("merge_heads_backward", (flat, x, weight, randn(8), None, False, False), "bias: expected"),
        (*projection_backward([grad[:, :, :5]]), "grads: expected"),
        (*projection_backward([grad[:, :2]]), "weight: expected"),
        (*projection_backward([grad], norms=[randn(8)]), "kept: expected one for each"),
        (*projection_backward([grad], norms=[randn(8)], kept=[grad[:1]]), "kept: expected"),
        (*projection(tokens, cos=randn(2, 6, 2), sin=randn(1, 6, 2)), "cos, sin: expected"),
        (*projection(tokens, cos=randn(1, 6, 2)), "sin: expected together with cos"),
        (*projection(tokens, rotated=-1), "rotated: expected"),
        (*projection(tokens, **five), "heads: kernels take up to 4 parts, got 5"),
        (
            "attention_forward",
            (*wide, None, 0.0, -(2**62), -1, 0.3, 0.0, False),
            "window_left, window_right: expected >= 0",
        ),
        ("attention_forward", (*wide, None, 0.5, -1, -1, 0.3, 0.0, False), "seed: expected one"),
        (
            "attention_forward",
            (*wide, None, 0.0, -1, -1, 0.3, -1.0, False),
            "softcap: expected 0, or a number from 1e-30 to 1e30",
        ),
        (
            "attention_forward",
            (*wide, None, 0.0, -1, -1, 0.3, math.nan, False),
            "softcap: expected 0, or a number from 1e-30 to 1e30",
        ),
        ("attention_forward", (freed(2, 4, 5, 8), *wide[1:], None, *PLAIN), "query: expected a tensor whose storage"),
        (*attention_backward(mask=torch.ones(1, 1, 5, 6) > 0, mask_grad=True), "mask_grad: expected False"),
        ("latent_backward", (None, randn(3), mu, mu, None, None, SEED), "grad_kl: expected shape"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            getattr(operators, name)(*arguments)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_mask_of_any_float_dtype_may_stand_beside_any_query(namespace):
    """PyTorch's kernel takes float32 masks beside float64 queries, and reads them as float64: beyond their end."""
    forward = backend.operator(namespace, "attention_forward")
    long = randn(2, 2, 70, 8)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        query, key, value = (t.to(dtype) for t in (QUERY, long, long))
        for of_mask in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            mask = randn(1, 4, 5, 70).to(of_mask)
            out, _ = forward(query, key, value, mask, None, None, *PLAIN)
            exact, _ = forward(query.double(), key.double(), value.double(), mask.double(), None, None, *PLAIN)
            assert out.dtype == dtype
            assert float((out - exact).abs().max()) < (0.05 if dtype == torch.bfloat16 else 1e-5)
