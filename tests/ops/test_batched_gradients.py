"""``torch.autograd.grad(..., is_grads_batched=True)``: the gradients of a loop, or an error where PyTorch would lose
what is to be differentiated."""

from __future__ import annotations

import pytest
import torch

from fastgen import nn
from fastgen.functional import (
    multi_head_projection,
    qkv_projection,
    reparameterize,
    reparameterize_kl,
    scaled_dot_product_attention,
)


def leaf(*sizes, dtype=torch.float32):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype).requires_grad_()


def attention(*sizes, keys_of=None, dtype=torch.float32, **options):
    def call():
        query, key, value = (leaf(*shape, dtype=dtype) for shape in (sizes, keys_of or sizes, keys_of or sizes))
        if "seed" in options:
            torch.manual_seed(0)
        given = {name: option for name, option in options.items() if name != "seed"}
        return query, scaled_dot_product_attention(query, key, value, **given)

    return call


def projection(function, **options):
    def call():
        x, weight = leaf(2, 5, 8), leaf(24, 8)
        out = function(x, weight, **options)
        return x, sum(part.square() for part in out) if isinstance(out, tuple) else out.square()

    return call


def latent(function):
    def call():
        torch.manual_seed(0)
        mu = leaf(3, 4)
        out = function(mu, leaf(3, 4))
        return mu, out if isinstance(out, torch.Tensor) else out[0].square().sum(1) + out[1]

    return call


def layer(make, *sizes):
    def call():
        torch.manual_seed(0)
        module, x = make(), leaf(*sizes)
        out = module(x)
        return x, (out if isinstance(out, torch.Tensor) else out[0]).square()

    return call


CASES = {
    "few scores": attention(1, 2, 9, 8),
    "few scores, causal": attention(1, 2, 9, 8, is_causal=True),
    "window": attention(1, 2, 9, 8, window=(2, 1)),
    "softcap": attention(1, 2, 9, 8, softcap=2.0),
    "negative scale": attention(1, 2, 9, 8, scale=-1.0),
    "grouped heads": attention(1, 4, 9, 8, keys_of=(1, 2, 9, 8), enable_gqa=True),
    "bfloat16": attention(1, 2, 9, 8, dtype=torch.bfloat16),
    "many scores": attention(1, 2, 150, 8),
    "many scores, mask": attention(1, 2, 150, 8, attn_mask=torch.ones(150, 150, dtype=torch.bool).tril()),
    "dropout": attention(1, 2, 150, 8, dropout_p=0.5, seed=True),
    "few keys in many heads": attention(8, 8, 64, 8, scale=1.0),
    "one projection": projection(multi_head_projection, num_heads=2),
    "projections": projection(qkv_projection, heads=(1, 1, 1), head_dims=(8, 8, 8)),
    "norms": projection(multi_head_projection, num_heads=2, norm=torch.ones(12)),
    "reparameterize": latent(reparameterize),
    "reparameterize_kl": latent(reparameterize_kl),
    "LSTM": layer(lambda: nn.LSTM(3, 4, batch_first=True), 2, 5, 3),
    "GRU": layer(lambda: nn.GRU(3, 4, batch_first=True), 2, 5, 3),
    "MultiheadAttention": layer(lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, 5, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_a_loop_also_where_they_are_differentiated_or_an_error(name):
    x, out = CASES[name]()
    vectors = torch.randn(2, *out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    tolerance = {"atol": 0.1, "rtol": 0.1} if x.dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}

    def loop(**options):
        return torch.stack([torch.autograd.grad(out, x, v, retain_graph=True, **options)[0] for v in vectors])

    def batched(**options):
        return torch.autograd.grad(out, x, vectors, retain_graph=True, is_grads_batched=True, **options)[0]

    torch.testing.assert_close(batched(), loop(), **tolerance)
    try:
        graph = batched(create_graph=True)
    except RuntimeError as error:
        assert str(error).startswith("is_grads_batched: expected False with create_graph=True, got True")  # noqa: PT017
        return
    assert graph.requires_grad
    second, expected = (
        torch.autograd.grad(g.square().sum(), x, retain_graph=True)[0] for g in (graph, loop(create_graph=True))
    )
    torch.testing.assert_close(second, expected, **tolerance)
