"""Errors of bad arguments: their type and text, the same on every backend."""

from __future__ import annotations

import math
import re

import pytest
import torch

import fastgen
from fastgen.functional import (
    merge_heads_projection,
    multi_head_projection,
    qkv_projection,
    reparameterize,
    reparameterize_kl,
    scaled_dot_product_attention,
)


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
    "a window of fractions": (
        lambda: scaled_dot_product_attention(t(1, 1, 2, 4), t(1, 1, 3, 4), t(1, 1, 3, 4), window=(0.5, 0)),
        ValueError,
        "window: expected left to be an integer, or None for unbounded, got 0.5",
    ),
    **{
        f"{value} as softcap": (
            lambda value=value: scaled_dot_product_attention(*[t(1, 1, 2, 4)] * 3, softcap=value),
            ValueError,
            re.escape(f"softcap: expected a positive number from 1e-30 to 1e30, got {value}"),
        )
        for value in (0.0, -1.0, math.inf, math.nan, 1e300)
    },
    **{
        f"a {type(value).__name__} as softcap": (
            lambda value=value: scaled_dot_product_attention(*[t(1, 1, 2, 4)] * 3, softcap=value),
            TypeError,
            f"softcap: expected a number or None, got {type(value).__name__}",
        )
        for value in (True, "2", torch.ones(()))
    },
    "sinks of another number of heads": (
        lambda: scaled_dot_product_attention(t(1, 4, 2, 4), t(1, 4, 3, 4), t(1, 4, 3, 4), sinks=t(3)),
        ValueError,
        r"sinks: expected \(heads,\) = \(4,\), got \(3,\)",
    ),
    "integers as sinks": (
        lambda: scaled_dot_product_attention(t(1, 4, 2, 4), t(1, 4, 3, 4), t(1, 4, 3, 4), sinks=t(4).long()),
        TypeError,
        "sinks: expected",
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
        ValueError,
        r"query: expected \(batch, heads, jagged length, head_dim\)",
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
