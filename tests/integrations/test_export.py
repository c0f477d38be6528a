"""Models out of Python: torch.export with dynamic shapes, saved programs, AOTInductor, and torch.jit."""

from __future__ import annotations

import io
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim

import fastgen
from fastgen import functional
from tests.tracing.calls import LAYERS


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    assert len(fastgen.accelerate(model).replaced) == 5
    return model


class Masked(nn.Module):
    """Attention with a padding mask, and weights if they are asked for."""

    def __init__(self, weights):
        super().__init__()
        self.layer, self.weights = nn.MultiheadAttention(16, 2, batch_first=True), weights
        fastgen.accelerate(self)

    def forward(self, x, padding):
        return self.layer(x, x, x, key_padding_mask=padding, need_weights=self.weights)[0]


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


SIZES = {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=64)}


@pytest.mark.parametrize("weights", [True, False])
def test_padding_has_dynamic_shapes(weights):
    model = Masked(weights).eval()
    inputs = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    program = torch.export.export(model, inputs, dynamic_shapes={"x": SIZES, "padding": SIZES})
    x, padding = torch.randn(7, 11, 16), torch.zeros(7, 11, dtype=torch.bool)
    padding[2, 5:] = True
    torch.testing.assert_close(saved_and_loaded(program).module()(x, padding), model(x, padding))


@pytest.mark.parametrize("strict", [True, False])
def test_an_encoder_has_dynamic_shapes_and_gradients_after_loading(strict):
    model = encoder()
    program = torch.export.export(model, (torch.randn(3, 5, 16),), dynamic_shapes={"src": SIZES}, strict=strict)
    names = {str(node.target).partition(".default")[0] for node in program.graph.nodes}
    assert "fastgen.attention_forward" in names
    loaded, x = saved_and_loaded(program).module(), torch.randn(7, 11, 16)
    torch.testing.assert_close(loaded(x), model(x))
    loaded(x).square().sum().backward()
    model(x).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in loaded.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_compiles_and_loads(tmp_path):
    model = encoder().requires_grad_(False)
    program = torch.export.export(model, (torch.randn(3, 5, 16),), dynamic_shapes={"src": SIZES})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded, x = torch._inductor.aoti_load_package(package), torch.randn(7, 11, 16)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# torch.jit


@pytest.fixture
def deprecated():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


TRACED = {
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True), (2, 5, 8)),
    "projection": (lambda x: functional.multi_head_projection(x, torch.ones(8, 8), num_heads=2), (2, 5, 8)),
    "encoder": (encoder, (2, 5, 16)),
}


@pytest.mark.parametrize("name", TRACED)
def test_traced_models_without_gradients_are_right_and_can_be_saved(name, deprecated):
    make, sizes = TRACED[name]
    model = make() if name == "encoder" else make
    with torch.no_grad():
        traced = torch.jit.trace(model, (torch.randn(sizes),))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded, x = torch.jit.load(file), torch.randn(3, 7, sizes[-1], requires_grad=True)
    torch.testing.assert_close(loaded(x), model(x))
    (actual,), (expected,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (loaded, model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_trace_that_would_record_derivatives_is_refused(deprecated):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace: expected a call without derivatives.*torch\.no_grad"):
        torch.jit.trace(encoder(), (torch.randn(2, 5, 16),))


@pytest.mark.parametrize("name", functional.__all__)
def test_functions_are_not_scripted(name, deprecated):
    function = getattr(functional, name)
    with pytest.raises(RuntimeError, match=rf"functional\.{name} cannot be compiled by torch\.jit\.script; use torch"):
        torch.jit.script(function)


def test_functions_that_call_one_are_not_scripted(deprecated):
    def attend(x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)

    with pytest.raises(RuntimeError, match=r"scaled_dot_product_attention cannot be compiled by torch\.jit\.script"):
        torch.jit.script(attend)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_not_scripted(name, deprecated):
    for model in (LAYERS[name][0](), nn.Sequential(LAYERS[name][0]())):
        with pytest.raises(RuntimeError, match=rf"torch\.jit\.script: expected modules of PyTorch, got {name} of fast"):
            torch.jit.script(model)


def test_restored_layers_are_scripted(deprecated):
    model, x = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)).eval(), torch.randn(2, 3, 8)
    expected = model(x)
    fastgen.accelerate(model)
    with pytest.raises(RuntimeError, match=r"call fastgen\.restore first"):
        torch.jit.script(model)
    fastgen.restore(model)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
