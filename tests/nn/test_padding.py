"""Fully masked batches and empty tensors in all Transformer layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fastgen.nn import (
    MultiheadAttention,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

pytestmark = pytest.mark.filterwarnings("ignore")
E = 8


def attention(x, memory, x_padding, memory_padding, *, weights, **options):
    layer = MultiheadAttention(E, 2, **options)
    return layer, lambda: layer(x, memory, memory, key_padding_mask=memory_padding, need_weights=weights)[0]


def encoder_layer(x, memory, x_padding, memory_padding, **options):
    layer = TransformerEncoderLayer(E, 2, 8, **options)
    return layer, lambda: layer(x, src_key_padding_mask=x_padding)


def encoder(x, memory, x_padding, memory_padding, **options):
    layer = TransformerEncoder(TransformerEncoderLayer(E, 2, 8, **options), 2, norm=nn.LayerNorm(E))
    return layer, lambda: layer(x, src_key_padding_mask=x_padding)


def decoder_layer(x, memory, x_padding, memory_padding, **options):
    layer = TransformerDecoderLayer(E, 2, 8, **options)
    return layer, lambda: layer(x, memory, tgt_key_padding_mask=x_padding, memory_key_padding_mask=memory_padding)


def decoder(x, memory, x_padding, memory_padding, **options):
    layer = TransformerDecoder(TransformerDecoderLayer(E, 2, 8, norm_first=True, **options), 2)
    return layer, lambda: layer(x, memory, tgt_key_padding_mask=x_padding, memory_key_padding_mask=memory_padding)


def transformer(x, memory, x_padding, memory_padding, **options):
    layer = Transformer(E, 2, 1, 1, 8, **options)
    masks = {
        "src_key_padding_mask": memory_padding,
        "memory_key_padding_mask": memory_padding,
        "tgt_key_padding_mask": x_padding,
    }
    return layer, lambda: layer(memory, x, **masks)


MAKERS = {
    "attention": lambda *a, **k: attention(*a, weights=False, **k),
    "attention with weights": lambda *a, **k: attention(*a, weights=True, **k),
    "encoder layer": encoder_layer,
    "encoder": encoder,
    "decoder layer": decoder_layer,
    "decoder": decoder,
    "transformer": transformer,
}
SIZES = {"all padding": (2, 3, 4), "no batch": (0, 3, 4), "no query": (2, 0, 4), "no key": (2, 3, 0), "none": (2, 0, 0)}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MAKERS)
def test_fully_masked_and_empty_inputs_have_finite_outputs_and_gradients(name, sizes):
    batch, queries, keys = SIZES[sizes]
    masks = torch.ones(batch, queries, dtype=torch.bool), torch.ones(batch, keys, dtype=torch.bool)
    for training, batch_first in itertools.product((True, False), repeat=2):
        x, memory = torch.randn(batch, queries, E), torch.randn(batch, keys, E)
        x, memory = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
        x.requires_grad_(training)
        layer, call = MAKERS[name](x, memory, *masks, batch_first=batch_first)
        layer.train(training)
        with torch.set_grad_enabled(training):
            out = call()
        assert out.shape == x.shape
        assert out.isfinite().all()
        if training:
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert grad.isfinite().all()


def inference_encoder(**options):
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(E, 2, 8, batch_first=True, **options)
    return TransformerEncoder(layer, 2, norm=nn.LayerNorm(E)).eval().requires_grad_(False)


@pytest.mark.parametrize("num_padded", [(3, 3), (3, 1), (0, 3), (0, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_inference_skips_padding(num_padded, norm_first):
    model, x = inference_encoder(norm_first=norm_first), torch.randn(2, 3, E)
    padding = torch.arange(3) >= 3 - torch.tensor(num_padded)[:, None]
    out = model(x, src_key_padding_mask=padding)
    assert out.isfinite().all()
    expected = model(x.clone().requires_grad_(), src_key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], expected[~padding])
    if not norm_first:
        torch.testing.assert_close(out[padding], model.norm.bias.expand_as(out[padding]))
    added = torch.zeros(2, 3).masked_fill(padding, -torch.inf)
    torch.testing.assert_close(model(x, src_key_padding_mask=added), out)


def test_finite_floating_padding_masks_are_added_to_scores():
    model, x = inference_encoder(), torch.randn(2, 3, E)
    lower = torch.tensor([[0.0, 0.0, -1.5], [0.0, 0.0, 0.0]])
    expected = model(x.clone().requires_grad_(), src_key_padding_mask=lower)
    torch.testing.assert_close(model(x, src_key_padding_mask=lower), expected.detach())


def test_padding_of_wrong_shape_raises_in_inference():
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(B, S\) = \(2, 3\), got"):
        inference_encoder()(torch.randn(2, 3, E), src_key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
