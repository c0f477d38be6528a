"""Layers that ``accelerate`` keeps, each with the reason."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastgen


class CustomLSTM(nn.LSTM):
    def forward(self, input, hx=None):
        output, last = super().forward(input, hx)
        return output + 1, last


def patched():
    layer = nn.GRU(2, 2)
    layer.forward = lambda *a: nn.GRU.forward(layer, *a)
    return layer


def parametrized():
    return parametrizations.weight_norm(nn.LSTM(2, 2), "weight_hh_l0")


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.LSTM(2, 2)))


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.nn.quantized.dynamic.LSTM(2, 2)


class LazyGRU(nn.modules.lazy.LazyModuleMixin, nn.GRU):
    cls_to_become = nn.GRU

    def __init__(self):
        super().__init__(1, 2)
        self.weight_ih_l0 = nn.UninitializedParameter()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: CustomLSTM(2, 2),
            r"\.CustomLSTM is a subclass of torch\.nn\.LSTM, which may override",
        ),
        (patched, "forward is overridden on the instance"),
        (parametrized, r"parametrization changed the class of this torch\.nn\.LSTM to .*; accelerate before that"),
        (scripted, r"torch\.nn\.LSTM is scripted"),
        (quantized, r"quantized: torch\.ao\.nn\.quantized\.dynamic\.modules\.rnn\.LSTM"),
        (LazyGRU, "not initialized yet"),
        (lambda: nn.RNN(2, 2), "has no equivalent"),
        (lambda: nn.LSTMCell(2, 2), r"torch\.nn\.LSTMCell has no equivalent"),
        (lambda: nn.MultiheadAttention(2, 1, dropout=1.0), r"dropout is 1\.0; fastgen's layer requires"),
    ],
    ids=["subclass", "patched", "parametrized", "script", "quantized", "lazy", "RNN", "cell", "dropout"],
)
def test_unsupported_layers_are_kept_with_a_reason(make, reason):
    model = nn.ModuleDict({"inner": make()})
    before = {name: type(part) for name, part in model.named_modules()}
    report = fastgen.accelerate(model)
    assert report.replaced == {}
    assert len(report.kept) == 1
    ((name, why),) = report.kept.items()
    assert name.startswith("inner")
    assert re.search(reason, why), why
    assert {name: type(part) for name, part in model.named_modules()} == before


def test_parent_of_a_kept_layer_is_replaced():
    layer = nn.TransformerEncoderLayer(4, 1, 4, dropout=1.0, batch_first=True)
    x = torch.randn(2, 3, 4)
    before = layer(x)
    report = fastgen.accelerate(layer)
    assert set(report.replaced) == {"(model)"}
    assert set(report.kept) == {"self_attn"}
    torch.testing.assert_close(layer(x), before)


def test_parametrization_after_acceleration():
    layer, x = nn.LSTM(2, 3), torch.randn(4, 2, 2)
    before = layer(x)[0]
    fastgen.accelerate(layer)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    torch.testing.assert_close(layer(x)[0], before)
    report = fastgen.accelerate(layer)
    assert "already accelerated" in report.kept["(model)"]
    with pytest.raises(RuntimeError, match=r"model: expected \(model\) to have the class that accelerate gave it, got"):
        fastgen.restore(layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    fastgen.restore(layer)
    assert type(layer) is nn.LSTM
    torch.testing.assert_close(layer(x)[0], before)


def test_restore_is_atomic():
    model = nn.ModuleList([nn.GRU(2, 2), nn.LSTM(2, 2)])
    fastgen.accelerate(model)
    parametrizations.weight_norm(model[1], "weight_hh_l0")
    with pytest.raises(RuntimeError, match="expected 1 to have the class"):
        fastgen.restore(model)
    assert type(model[0]) is fastgen.nn.GRU
