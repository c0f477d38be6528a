"""Layers and models on the meta device: materialization of buffers, and shapes of outputs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastgen.models import (
    FlowVAE,
    FlowVAEConfig,
    ImageTransformer,
    ImageTransformerConfig,
    TransformerLM,
    TransformerLMConfig,
    WaveNet,
    WaveNetConfig,
)
from fastgen.nn import (
    GRU,
    LSTM,
    AttentionBlock2d,
    AttentionGate2d,
    GaussianLatent,
    KVCache,
    MultiheadAttention,
    PositionalEncoding,
    RelativePositionBias,
    RotaryEmbedding,
    SelfAttention2d,
    Transformer,
    TransformerEncoder,
    TransformerEncoderLayer,
    WindowAttention2d,
)

pytestmark = pytest.mark.filterwarnings("ignore")

WITH_BUFFERS = {
    "RelativePositionBias": lambda: RelativePositionBias(4),
    "RelativePositionBias, unidirectional": lambda: RelativePositionBias(4, bidirectional=False),
    "WindowAttention2d": lambda: WindowAttention2d(8, 2, (2, 3)),
    "PositionalEncoding": lambda: PositionalEncoding(5, max_len=7),
    "KVCache": lambda: KVCache(2, 2, 4, 3),
    "TransformerLM": lambda: TransformerLM(TransformerLMConfig(vocabulary=("a", "b", "ab"), width=8, heads=2, depth=1)),
    "ImageTransformer": lambda: ImageTransformer(
        ImageTransformerConfig(image_size=4, levels=17, width=8, heads=2, depth=1)
    ),
    "ImageTransformer of words": lambda: ImageTransformer(
        ImageTransformerConfig(image_size=8, levels=17, width=8, heads=2, depth=1, codebook_size=4)
    ),
    "WaveNet": lambda: WaveNet(WaveNetConfig(length=20, channels=4, skip_channels=4, cycle=3, reach=4)),
    "FlowVAE": lambda: FlowVAE(FlowVAEConfig(image_size=8, width=8, latent_dim=4, flow_width=5)),
}


def assert_same_buffers(model, other):
    pairs = list(zip(model.named_buffers(), other.named_buffers(), strict=True))
    assert pairs
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", WITH_BUFFERS)
def test_buffers_after_to_empty(name, monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7))  # uninitialized memory
    good = WITH_BUFFERS[name]()
    with torch.device("meta"):
        other = WITH_BUFFERS[name]()
    assert all(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
    other.to_empty(device="cpu")
    other.load_state_dict(good.state_dict())
    assert_same_buffers(good, other)
    with torch.device("meta"):  # independent of the default device
        other.to_empty(device="cpu")
    other.load_state_dict(good.state_dict())
    assert_same_buffers(good, other)


@pytest.mark.parametrize("name", [n for n in WITH_BUFFERS if n not in ("KVCache", "PositionalEncoding")])
def test_buffers_after_assigning_a_state_dict(name):
    good = WITH_BUFFERS[name]()
    with torch.device("meta"):
        other = WITH_BUFFERS[name]()
    other.load_state_dict(good.state_dict(), assign=True)
    assert_same_buffers(good, other)


def test_positional_encoding_on_meta_is_materialized_on_the_input_device():
    x = torch.randn(1, 3, 4)
    with torch.device("meta"):
        layer = PositionalEncoding(4, 7)
    assert torch.equal(layer(x), PositionalEncoding(4, 7)(x))


def test_buffers_after_skip_init():
    other = torch.nn.utils.skip_init(WindowAttention2d, 16, 2, 4)
    assert_same_buffers(other, WindowAttention2d(16, 2, 4))


@pytest.mark.parametrize("name", [n for n in WITH_BUFFERS if n != "KVCache"])
def test_unmoved_buffers_are_shared_and_cast_buffers_keep_their_values(name):
    model = WITH_BUFFERS[name]()
    before = {key: (buffer.data_ptr(), buffer.clone()) for key, buffer in model.named_buffers()}
    model.float().to("cpu").share_memory()
    assert all(buffer.is_shared() for buffer in model.buffers())
    model.float()
    assert all(buffer.is_shared() for buffer in model.buffers())
    model.bfloat16().float()
    persistent = set(model.state_dict())
    for key, buffer in model.named_buffers():
        if key not in persistent:  # recomputed, not rounded
            assert torch.equal(buffer, before[key][1]), key
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_buffers(model, copied)


def test_cache_is_preserved_when_moved_and_empty_after_to_empty():
    cache = KVCache(2, 2, 4, 3)
    cache.reset(torch.tensor([1, 0]))
    keys, values = torch.randn(2, 2, 2, 3), torch.randn(2, 2, 2, 3)
    cache.update(keys, values)
    assert torch.equal(cache.double().keys[:, :, :2].float(), keys)
    assert (cache.position.item(), cache.padding.tolist()) == (2, [1, 0])
    cache._apply(lambda tensor: torch.full_like(tensor, 7))  # as by to_empty
    assert (cache.position.item(), cache.padding.tolist(), cache._written) == (0, [0, 0], 0)
    cache.update(torch.randn(2, 2, 4, 3).double(), torch.randn(2, 2, 4, 3).double())


def test_negative_cache_padding_raises():
    with pytest.raises(ValueError, match="padding: expected counts >= 0, got -2"):
        KVCache(2, 1, 4, 3).reset(torch.tensor([0, -2]))


# --------------------------------------------------------------------------------------------------
# Meta tensors through layers


def on_meta(*shape, dtype=None):
    return torch.empty(*shape, dtype=dtype, device="meta")


PADDING = on_meta(2, 3, dtype=torch.bool)
CALLS = {
    "MultiheadAttention": (
        lambda: MultiheadAttention(8, 2, batch_first=True),
        lambda layer: layer(*[on_meta(2, 3, 8)] * 3, key_padding_mask=PADDING)[0],
    ),
    "TransformerEncoder": (
        lambda: TransformerEncoder(TransformerEncoderLayer(8, 2, 8, batch_first=True), 1).eval().requires_grad_(False),
        lambda layer: layer(on_meta(2, 3, 8), src_key_padding_mask=PADDING),
    ),
    "Transformer": (
        lambda: Transformer(8, 2, 1, 1, 8),
        lambda layer: layer(on_meta(3, 2, 8), on_meta(3, 2, 8), tgt_mask=on_meta(3, 3)),
    ),
    "SelfAttention2d": (lambda: SelfAttention2d(8, pool=2), lambda layer: layer(on_meta(2, 8, 4, 4))),
    "AttentionBlock2d": (lambda: AttentionBlock2d(8, num_groups=2), lambda layer: layer(on_meta(2, 8, 4, 4))),
    "AttentionGate2d": (lambda: AttentionGate2d(8, stride=2), lambda layer: layer(on_meta(2, 8, 4, 4))),
    "WindowAttention2d": (lambda: WindowAttention2d(8, 2, 3, shift=1), lambda layer: layer(on_meta(2, 8, 7, 4))),
    "PositionalEncoding": (
        lambda: PositionalEncoding(8, 7),
        lambda layer: layer(on_meta(2, 3, 8), positions=on_meta(3, dtype=torch.int64)),
    ),
    "RotaryEmbedding": (
        lambda: RotaryEmbedding(8),
        lambda layer: layer(on_meta(2, 2, 3, 8), on_meta(2, 2, 3, 8))[0],
    ),
    "RelativePositionBias": (lambda: RelativePositionBias(4), lambda layer: layer(5, 7)),
    "KVCache": (
        lambda: KVCache(2, 2, 4, 3),
        lambda layer: (
            layer.reset(on_meta(2, dtype=torch.int64)) or layer.update(on_meta(2, 2, 3, 3), on_meta(2, 2, 3, 3))[0]
        ),
    ),
    "GaussianLatent": (GaussianLatent, lambda layer: layer(on_meta(2, 8, 3))[0]),
    "LSTM": (lambda: LSTM(3, 4, 2), lambda layer: layer(on_meta(5, 2, 3))[0]),
    "GRU": (lambda: GRU(3, 4, bidirectional=True), lambda layer: layer(on_meta(5, 2, 3))[0]),
}
SHAPES = {
    "MultiheadAttention": (2, 3, 8), "TransformerEncoder": (2, 3, 8), "Transformer": (3, 2, 8),
    "WindowAttention2d": (2, 8, 7, 4), "PositionalEncoding": (2, 3, 8), "RotaryEmbedding": (2, 2, 3, 8),
    "RelativePositionBias": (4, 5, 7), "KVCache": (2, 2, 4, 3), "GaussianLatent": (2, 4, 3), "LSTM": (5, 2, 4),
    "GRU": (5, 2, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_layers_support_meta_tensors(name):
    make, call = CALLS[name]
    with torch.device("meta"):
        layer = make()
    out = call(layer)
    assert out.is_meta
    assert out.shape == SHAPES.get(name, (2, 8, 4, 4))
    if out.requires_grad:
        out.sum().backward()
        assert all(p.grad.is_meta for p in layer.parameters() if p.grad is not None)
