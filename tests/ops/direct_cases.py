"""Calls of attention that take a direct path, for the tests of these paths."""

from __future__ import annotations

import torch

from fastgen import functional

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


def derivatives(leaves, options):
    out = functional.scaled_dot_product_attention(*leaves, **options)
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    plain = torch.autograd.grad(functional.scaled_dot_product_attention(*leaves, **options).sin().sum(), leaves)
    return [out, *first, *second, *plain]
