"""Models with fastgen's functions and layers, exported to ONNX and run by onnxruntime: the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastgen
from fastgen.functional import (
    merge_heads_projection,
    qkv_projection,
    reparameterize_kl,
    scaled_dot_product_attention,
)

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

BATCH, LENGTH = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=512)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def assert_same_in_onnxruntime(model, args, path, dynamic_shapes=None, others=()):
    """Exports with ``args``; compares for them and for the arguments of other sizes."""
    program = torch.onnx.export(model.eval(), args, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    for inputs in (args, *others):
        expected = model(*inputs)
        names = [known.name for known in session.get_inputs()]
        results = session.run(None, {name: t.numpy() for name, t in zip(names, inputs, strict=True)})
        for result, right in zip(results, torch.utils._pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(torch.from_numpy(result), right.detach(), rtol=1e-5, atol=1e-5)


def heads(batch=2, length=16, count=4, dim=8):
    return torch.randn(batch, count, length, dim)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (3, 0), "return_lse": True}], ids=["plain", "causal", "window"]
)
def test_attention_with_dynamic_batch_and_length(options, tmp_path):
    model = Call(lambda q, k, v: scaled_dot_product_attention(q, k, v, **options))
    sizes = (({0: BATCH, 2: LENGTH},) * 3,)
    others = [tuple(heads(3, 21) for _ in range(3))]
    assert_same_in_onnxruntime(model, tuple(heads() for _ in range(3)), tmp_path / "model.onnx", sizes, others)


def test_attention_with_masks_and_grouped_heads(tmp_path):
    allowed = torch.rand(2, 1, 16, 16) > 0.5
    allowed[:, :, 3] = False  # fully masked rows give 0

    def forward(query, key, value, allowed, bias):
        masked = scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)
        return masked, scaled_dot_product_attention(query, key, value, bias, enable_gqa=True)

    args = (heads(), heads(count=2), heads(count=2, dim=5), allowed, torch.randn(1, 4, 16, 16))
    assert_same_in_onnxruntime(Call(forward), args, tmp_path / "model.onnx")


def test_dropout_is_refused(tmp_path):
    model = Call(lambda x: scaled_dot_product_attention(x, x, x, dropout_p=0.5))
    with pytest.raises(Exception, match=r"attention_forward|dropout_p") as caught:
        torch.onnx.export(model, (heads(),), dynamo=True, verbose=False)
    causes = [caught.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert any("dropout_p: expected 0 in a model that is exported (model.eval()), got 0.5" in str(e) for e in causes)


def test_projections_with_norms_and_rotary_embedding(tmp_path):
    weight, norm, angles = torch.randn(96, 32), torch.rand(8) + 0.5, (torch.randn(16, 4), torch.randn(16, 4))

    def forward(x):
        parts = qkv_projection(x, weight, heads=[4] * 3, head_dims=[8] * 3, norms=[norm, norm], rotary=angles)
        return *parts, merge_heads_projection(parts[0], weight[:32])

    assert_same_in_onnxruntime(Call(forward), (torch.randn(2, 16, 32),), tmp_path / "model.onnx")


def test_an_exported_program_decomposes_and_a_latent_has_the_noise_of_its_seed(tmp_path):
    """Philox in ONNX's integers. A program that was exported before names the operators."""
    operator = torch.ops.fastgen.latent_forward
    model = Call(lambda mu, logvar, seed: operator(mu, logvar, None, None, seed, True))
    args = (torch.randn(4, 6), torch.randn(4, 6), torch.tensor([123456789012345678]))
    program = torch.export.export(model.eval(), args)
    assert "fastgen.latent_forward" in str(program.graph)
    program = program.run_decompositions(fastgen.integrations.decompositions())
    assert "fastgen" not in str(program.graph)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [known.name for known in session.get_inputs()]
    results = session.run(None, {name: t.numpy() for name, t in zip(names, args, strict=True)})
    for result, right in zip(results, model(*args), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), right, rtol=1e-5, atol=1e-5)


def test_a_latent_is_sampled_anew(tmp_path):
    args = (torch.randn(4, 6), torch.randn(4, 6))
    program = torch.onnx.export(Call(reparameterize_kl), args, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = {known.name: t.numpy() for known, t in zip(session.get_inputs(), args, strict=True)}
    (first, kl), (second, _) = session.run(None, inputs), session.run(None, inputs)
    assert abs(first - second).max() > 0.1
    torch.testing.assert_close(torch.from_numpy(kl), reparameterize_kl(*args)[1])


def test_an_accelerated_encoder_with_dynamic_batch_and_length(tmp_path):
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, batch_first=True))
    assert "replaced" in str(fastgen.accelerate(model))
    sizes = ({0: BATCH, 1: LENGTH},)
    assert_same_in_onnxruntime(
        model, (torch.randn(2, 16, 32),), tmp_path / "model.onnx", sizes, [(torch.randn(3, 21, 32),)]
    )


@pytest.mark.parametrize("layer", ["LSTM", "SelfAttention2d", "WindowAttention2d"])
def test_layers(layer, tmp_path):
    model, x = {
        "LSTM": lambda: (fastgen.nn.LSTM(32, 8, batch_first=True), torch.randn(2, 16, 32)),
        "SelfAttention2d": lambda: (fastgen.nn.SelfAttention2d(32), torch.randn(2, 32, 6, 6)),
        "WindowAttention2d": lambda: (fastgen.nn.WindowAttention2d(32, 4, 4), torch.randn(2, 32, 8, 8)),
    }[layer]()
    assert_same_in_onnxruntime(model, (x,), tmp_path / "model.onnx")
