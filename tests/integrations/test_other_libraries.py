"""Libraries without an integration of their own: ``redirect_attention``, and what the report says about the rest."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastgen
from fastgen.integrations import redirect_attention
from tests.integrations.contract import assert_equal


class Case(NamedTuple):
    """A library's module to import, the class to redirect there, a model and the number of redirected modules."""

    module: str
    attention: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    replaced: int


def x_transformer():
    from x_transformers import ContinuousTransformerWrapper, Decoder

    layers = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, attn_flash=True, rotary_pos_emb=True)
    return ContinuousTransformerWrapper(max_seq_len=8, dim_in=6, dim_out=6, attn_layers=layers)


def simple_vit():
    from vit_pytorch.simple_flash_attn_vit import SimpleViT

    sizes = {"image_size": 16, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16, "dim_head": 8}
    return SimpleViT(**sizes, num_classes=5, use_flash=True)


CASES = {
    "x-transformers": Case("x_transformers.attend", "Attend", x_transformer, (2, 8, 6), 2),
    "vit-pytorch": Case("vit_pytorch.simple_flash_attn_vit", "Attend", simple_vit, (2, 3, 16, 16), 2),
}


@pytest.fixture(params=CASES)
def case(request):
    found = CASES[request.param]
    try:
        importlib.import_module(found.module)
    except Exception as error:
        pytest.skip(f"{request.param} cannot be imported: {error}")
    return found


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()], materialize_grads=True)


def penalty(model, x):
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), list(model.parameters()), materialize_grads=True)


@pytest.mark.filterwarnings("ignore")
def test_attention_modules_are_redirected(case):
    torch.manual_seed(0)
    model = case.build().double().eval()
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    cls = getattr(importlib.import_module(case.module), case.attention)
    before = [model(x).detach(), *gradients(model, x)]
    with pytest.raises(RuntimeError, match="is not implemented"):
        penalty(model, x)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(model, (x.detach(),), (torch.ones_like(x),))

    left = fastgen.accelerate(model)
    assert not left.replaced
    assert len(left.kept) == case.replaced
    assert all("redirect_attention(model, Attend)" in reason for reason in left.kept.values())
    report = redirect_attention(model, cls)
    assert report.replaced.keys() == left.kept.keys()

    assert_equal([model(x).detach(), *gradients(model, x)], before)
    penalty(model, x)
    tangent = torch.func.jvp(model, (x.detach(),), (torch.ones_like(x),))[1]
    again = torch.autograd.functional.jvp(model, x.detach(), torch.ones_like(x), create_graph=True)[1]
    assert_equal([tangent], [again.detach()])

    fastgen.restore(model)
    assert torch.equal(model(x), before[0])
    with pytest.raises(RuntimeError, match="is not implemented"):
        penalty(model, x)


def test_x_transformers_compiles_in_one_graph():
    case = CASES["x-transformers"]
    module = pytest.importorskip(case.module)
    model = case.build().double().eval()
    x = torch.randn(case.shape, dtype=torch.float64)
    expected = model(x)
    redirect_attention(model, module.Attend)
    torch._dynamo.reset()
    try:
        torch.compile(case.build().double().eval(), fullgraph=True, backend="eager")(x)
    except Exception as error:
        pytest.skip(f"the original does not compile: {str(error).splitlines()[0]}")
    assert_equal([torch.compile(model, fullgraph=True, backend="aot_eager")(x)], [expected])
