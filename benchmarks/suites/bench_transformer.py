"""Multi-head attention and encoder layers against torch: language model, diffusion Transformer, seq2seq."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.shapes import ATTENTION_SHAPES
from fastgen import nn as ours

BATCHES = {"char-lm": 8, "dit-xl": 2, "seq2seq": 8}
"""Batch sizes on CPU."""


def layers(kind, shape, batch_first, device):
    """fastgen's and torch's layer with the same parameters."""
    width = shape.heads * shape.key_dim
    torch.manual_seed(0)
    if kind == "attention":
        made = [m.MultiheadAttention(width, shape.heads, batch_first=batch_first, device=device) for m in (ours, nn)]
    else:
        kwargs = {"dropout": 0.0, "batch_first": batch_first, "device": device}
        made = [m.TransformerEncoderLayer(width, shape.heads, 4 * width, **kwargs) for m in (ours, nn)]
    made[1].load_state_dict(made[0].state_dict())
    return made


def inputs(kind, shape, batch, batch_first, device):
    """Queries, keys and masks. Encoder layers and shapes of equal lengths use self-attention."""
    query = torch.randn(batch, shape.queries, shape.heads * shape.key_dim, device=device)
    self_attention = kind == "encoder layer" or shape.queries == shape.keys
    keys = query if self_attention else torch.randn(batch, shape.keys, query.size(-1), device=device)
    prefix, masks = ("src_", {}) if kind == "encoder layer" else ("", {})
    if shape.mask == "causal":
        name = "src_mask" if prefix else "attn_mask"
        masks = {name: nn.Transformer.generate_square_subsequent_mask(shape.queries, device), "is_causal": True}
    elif shape.mask == "padding":
        lengths = torch.randint(keys.size(1) // 2, keys.size(1) + 1, (batch, 1), device=device)
        masks = {f"{prefix}key_padding_mask": torch.arange(keys.size(1), device=device) >= lengths}
    if not batch_first:
        query, keys = (query.transpose(0, 1).contiguous(), keys.transpose(0, 1).contiguous())
    return query, query if self_attention else keys, masks


def run(layer, query, keys, masks):
    if isinstance(layer, nn.MultiheadAttention):
        return layer(query, keys, keys, need_weights=False, **masks)[0]
    return layer(query, **masks)


CASES = [
    pytest.param(kind, name, batch_first, id=f"{kind}-{name}-{'batch' if batch_first else 'sequence'} first")
    for kind in ("attention", "encoder layer")
    for name in BATCHES
    for batch_first in (True, False)
]


@pytest.mark.parametrize(("kind", "name", "batch_first"), CASES)
def test_inference(against, device, kind, name, batch_first):
    shape = ATTENTION_SHAPES[name]
    mine, theirs = (layer.eval() for layer in layers(kind, shape, batch_first, device))
    arguments = inputs(kind, shape, BATCHES[name] if device.type == "cpu" else shape.batch, batch_first, device)
    with torch.no_grad():
        torch.testing.assert_close(run(mine, *arguments), run(theirs, *arguments), rtol=1e-3, atol=1e-3)
        against(lambda: run(mine, *arguments), {"torch": lambda: run(theirs, *arguments)}, rounds=31)


@pytest.mark.parametrize(("kind", "name", "batch_first"), CASES)
def test_training_step(against, device, kind, name, batch_first):
    shape = ATTENTION_SHAPES[name]
    mine, theirs = layers(kind, shape, batch_first, device)
    arguments = inputs(kind, shape, BATCHES[name] if device.type == "cpu" else shape.batch, batch_first, device)
    leaves = list({id(t): t.requires_grad_() for t in arguments[:2]}.values())
    upstream = torch.randn_like(arguments[0])

    def step(layer):
        return torch.autograd.grad(run(layer, *arguments), [*leaves, *layer.parameters()], upstream)

    against(lambda: step(mine), {"torch": lambda: step(theirs)}, rounds=15)
