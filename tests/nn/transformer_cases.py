"""Layers, inputs and comparisons of the tests of Transformer layers."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from fastgen import nn as ours

B, L, S, E, H = 3, 5, 4, 8, 2
NAMES = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def padding_of(batch, keys, kind="bool"):
    """Left-aligned padding mask of random lengths of at least 1."""
    if kind == "float":
        return normal(batch, keys)
    return torch.arange(keys) >= torch.randint(1, keys + 1, (batch, 1))


def mask_of(kind, queries, keys, entries=None):
    """Attention mask "bool", "float", "causal" or "bool causal"; no query is fully masked."""
    shape = (queries, keys) if entries is None else (entries, queries, keys)
    if kind == "float":
        return normal(*shape)
    masked = torch.ones(shape, dtype=torch.bool).triu(1) if "causal" in kind else torch.rand(shape) > 0.6
    masked[..., 0] = False
    return masked if "bool" in kind else torch.zeros(shape, dtype=torch.float64).masked_fill(masked, -torch.inf)


def build(module, name, dtype=torch.float64, seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = {"dropout": 0.0, **kwargs}
    if name == "MultiheadAttention":
        return module.MultiheadAttention(E, H, **kwargs).to(dtype)
    if name == "Transformer":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about enable_nested_tensor
            return module.Transformer(E, H, 1, 2, 12, **kwargs).to(dtype)
    layer = getattr(module, name.removesuffix("Layer") + "Layer")(E, H, 12, **kwargs).to(dtype)
    if name.endswith("Layer"):
        return layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(module, name)(layer, 2, nn.LayerNorm(E).to(dtype))


def pair(name, **kwargs):
    """fastgen's and torch's layer with the same random parameters."""
    mine, theirs = build(ours, name, **kwargs), build(nn, name, **kwargs)
    for parameter in mine.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def inputs(name, batch_first=True, dtype=torch.float64):
    """Input tensors of a layer, with two different lengths."""
    count = {"MultiheadAttention": 3, "TransformerEncoderLayer": 1, "TransformerEncoder": 1}.get(name, 2)
    tensors = [normal(B, n, E, dtype=dtype) for n in (L, S, S)[:count]]
    return tensors if batch_first else [t.transpose(0, 1).contiguous() for t in tensors]


def first(result):
    return result[0] if isinstance(result, tuple) else result


def call(module, tensors, kwargs):
    if isinstance(module, nn.MultiheadAttention):
        kwargs = {"need_weights": False, **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about masks of different dtypes
        return module(*tensors, **kwargs)


def assert_same(mine, theirs, tensors, kwargs=None):
    """Compares outputs, weights, and gradients of inputs, parameters and floating masks."""
    kwargs = kwargs or {}
    kwargs = {
        name: value.detach().clone().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isfinite().all())
        else value
        for name, value in kwargs.items()
    }
    results, grads = [], []
    for module in (mine, theirs):
        leaves = {id(t): t.detach().clone().requires_grad_() for t in tensors}
        result = call(module, [leaves[id(t)] for t in tensors], kwargs)
        result = result if isinstance(result, tuple) else (result,)
        results.append(result)
        wanted = [*leaves.values(), *module.parameters()]
        wanted += [value for value in kwargs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        loss = sum((r.sin() * torch.arange(r.numel()).reshape(r.shape)).sum() for r in result if r is not None)
        grads.append(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
