"""torch's inference kernels: where layers take them, what they give, and where they do not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn as torch_nn

import fastgen
from fastgen import nn
from fastgen.nn import _fast_path


def mha(**options):
    return nn.MultiheadAttention(16, 4, batch_first=True, **options).eval()


def encoder(**options):
    options = {"dropout": 0.1, "batch_first": True, **options}
    return nn.TransformerEncoderLayer(16, 4, 32, **options).eval()


def run(layer, x, **options):
    if isinstance(layer, torch_nn.MultiheadAttention):
        return layer(x, x, x, need_weights=False, **options)[0]
    return layer(x, **options)


LAYERS = {
    "attention": mha,
    "encoder": encoder,
    "encoder, norm first": lambda: encoder(norm_first=True),
    "encoder, gelu": lambda: encoder(activation="gelu"),
}


@pytest.fixture
def kernels(monkeypatch):
    """Names of torch's kernels, once for each call."""
    calls = []
    for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
        kernel = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, name=name, kernel=kernel: (calls.append(name), kernel(*a))[1])
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_short_sequences_in_inference_take_the_kernel_and_give_the_same(kernels, monkeypatch, name, dtype):
    layer, x = LAYERS[name]().to(dtype), torch.randn(3, 5, 16, dtype=dtype)
    with torch.no_grad():
        found = run(layer, x)
        strided = run(layer, x.transpose(0, 1).contiguous().transpose(0, 1))
        assert len(kernels) == 2
        monkeypatch.setattr(_fast_path, "takes", lambda *arguments: False)
        wanted = run(layer, x)
    assert len(kernels) == 2
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(strided, wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_layers_take_it_with_gradients_enabled(kernels, name):
    layer = LAYERS[name]().requires_grad_(False)
    run(layer, torch.randn(3, 5, 16))
    assert kernels


def hooked(layer, name):
    layer.get_submodule(name).register_forward_hook(lambda *arguments: None)
    return layer


def with_adapter(layer, name):
    class Adapter(torch_nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    adapter = Adapter(16, 16)
    adapter.load_state_dict(layer.get_submodule(name).state_dict())
    layer.set_submodule(name, adapter)
    return layer


class Subclass(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) + 1


OTHERS = {
    "attention in training": lambda: (mha().train(), {}),
    "encoder in training": lambda: (encoder().train(), {}),
    "encoder with a dropout in training": lambda: ((lambda e: (e.dropout1.train(), e)[1])(encoder()), {}),
    "a mask": lambda: (mha(), {"attn_mask": torch.zeros(5, 5)}),
    "padding": lambda: (encoder(), {"src_key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}),
    "zero attention": lambda: (mha(add_zero_attn=True), {}),
    "an extra key": lambda: (mha(add_bias_kv=True), {}),
    "no bias": lambda: (mha(bias=False), {}),
    "batch second": lambda: (nn.MultiheadAttention(16, 4).eval(), {}),
    "heads of odd number": lambda: (nn.MultiheadAttention(15, 3, batch_first=True).eval(), {}),
    "16 bits": lambda: (mha().bfloat16(), {}),
    "a hook of out_proj": lambda: (hooked(mha(), "out_proj"), {}),
    "a hook of norm1": lambda: (hooked(encoder(), "norm1"), {}),
    "a hook of attention": lambda: (hooked(encoder(), "self_attn"), {}),
    "an adapter": lambda: (with_adapter(mha(), "out_proj"), {}),
    "an adapter of the encoder": lambda: (with_adapter(encoder(), "self_attn.out_proj"), {}),
    "a subclass": lambda: (Subclass(16, 4, 32, batch_first=True).eval(), {}),
    "an activation": lambda: (encoder(activation=torch.tanh), {}),
    "two epsilons": lambda: ((lambda e: (setattr(e.norm1, "eps", 1e-3), e)[1])(encoder()), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_do_not_take_it(kernels, name):
    layer, options = OTHERS[name]()
    x = torch.randn(3, 5, layer.embed_dim if isinstance(layer, torch_nn.MultiheadAttention) else 16)
    with torch.no_grad():
        run(layer, x.to(next(layer.parameters()).dtype), **options)
    # An encoder layer that calls its attention as a module may take attention's kernel.
    own = "_native_multi" if isinstance(layer, torch_nn.MultiheadAttention) else "_transformer_encoder"
    assert not any(name.startswith(own) for name in kernels)


@pytest.mark.parametrize("name", ["attention", "encoder"])
def test_other_calls_do_not_take_it(kernels, name):
    layer = LAYERS[name]()
    x = torch.randn(3, 5, 16)
    assert run(layer, x).requires_grad
    with torch.no_grad():
        run(layer, torch.randn(1, 40, 16))  # long: the kernel would write all scores
        run(layer, torch.randn(129, 8, 16))  # many
        run(layer, x[0])
        torch.func.jvp(lambda x: run(layer, x), (x,), (x,))
        with torch.autocast("cpu"):
            run(layer, x)
        with fastgen.use_backend("torch"):
            run(layer, x)
        torch.vmap(lambda x: run(layer, x))(x[None])
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        assert run(layer, x.clone().requires_grad_()).requires_grad
    assert not kernels


@pytest.mark.parametrize("name", ["attention", "encoder"])
def test_errors_name_the_argument(name):
    layer = LAYERS[name]()
    with torch.no_grad(), pytest.raises(TypeError, match=r"weight: .*float64.*float32"):
        run(layer, torch.randn(3, 5, 16).double())
    with torch.no_grad(), pytest.raises(ValueError, match="query: expected"):
        run(copy.deepcopy(layer), torch.randn(3, 5, 15))
