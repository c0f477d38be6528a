"""torchvision's Swin Transformers: ``accelerate`` and ``restore``."""

from __future__ import annotations

import pytest

import fastgen
from tests.integrations.contract import Contract, Model
from tests.integrations.torchvision_models import CASES

try:
    import torchvision  # noqa: F401
    from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
except Exception as error:  # other errors than ImportError where torchvision does not match torch
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request):
    return request.param


class TestTorchvision(Contract):
    pass


def test_other_attention_layers_are_named():
    report = fastgen.accelerate(RelativePositionalMultiHeadAttention(8, 4, 4))
    name = "torchvision.models.maxvit.RelativePositionalMultiHeadAttention"
    assert report.kept == {"(model)": f"{name} computes the softmax itself"}


def test_an_unknown_version_is_kept(monkeypatch):
    from fastgen.integrations import torchvision as integration

    monkeypatch.setitem(integration._KNOWN, "shifted_window_attention", ())
    report = fastgen.accelerate(Model(CASES[0]).module)
    assert not report.replaced
    assert all("differs from the versions that fastgen knows" in reason for reason in report.kept.values())
