"""Layers and models made on the meta device, and given memory later."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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
    "RelativePositionBias of one direction": lambda: RelativePositionBias(4, bidirectional=False),
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
def test_buffers_after_meta(name, monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7))  # memory as it may come
    good = WITH_BUFFERS[name]()
    with torch.device("meta"):
        other = WITH_BUFFERS[name]()
    assert all(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
    other.to_empty(device="cpu")
    other.load_state_dict(good.state_dict())
    assert_same_buffers(good, other)
    with torch.device("meta"):  # whatever the default device is
        other.to_empty(device="cpu")
    other.load_state_dict(good.state_dict())
    assert_same_buffers(good, other)


@pytest.mark.parametrize("name", [n for n in WITH_BUFFERS if n not in ("KVCache", "PositionalEncoding")])
def test_buffers_after_a_state_dict_is_assigned_to_a_module_on_meta(name):
    good = WITH_BUFFERS[name]()
    with torch.device("meta"):
        other = WITH_BUFFERS[name]()
    other.load_state_dict(good.state_dict(), assign=True)
    assert_same_buffers(good, other)


def test_a_positional_encoding_on_meta_goes_where_its_input_is():
    x = torch.randn(1, 3, 4)
    with torch.device("meta"):
        layer = PositionalEncoding(4, 7)
    assert torch.equal(layer(x), PositionalEncoding(4, 7)(x))


def test_buffers_after_skip_init():
    other = torch.nn.utils.skip_init(WindowAttention2d, 16, 2, 4)
    assert_same_buffers(other, WindowAttention2d(16, 2, 4))


@pytest.mark.parametrize("name", [n for n in WITH_BUFFERS if n != "KVCache"])
def test_buffers_that_stay_are_not_touched_and_those_that_change_their_dtype_keep_their_values(name):
    model = WITH_BUFFERS[name]()
    before = {key: (buffer.data_ptr(), buffer.clone()) for key, buffer in model.named_buffers()}
    model.float().to("cpu").share_memory()
    assert all(buffer.is_shared() for buffer in model.buffers())
    model.float()
    assert all(buffer.is_shared() for buffer in model.buffers())
    model.bfloat16().float()
    persistent = set(model.state_dict())
    for key, buffer in model.named_buffers():
        if key not in persistent:  # not even rounded
            assert torch.equal(buffer, before[key][1]), key
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_buffers(model, copied)


def test_a_cache_keeps_its_tokens_when_it_moves_and_is_empty_after_to_empty():
    cache = KVCache(2, 2, 4, 3)
    cache.reset(torch.tensor([1, 0]))
    keys, values = torch.randn(2, 2, 2, 3), torch.randn(2, 2, 2, 3)
    cache.update(keys, values)
    assert torch.equal(cache.double().keys[:, :, :2].float(), keys)
    assert (cache.position.item(), cache.padding.tolist()) == (2, [1, 0])
    cache._apply(lambda tensor: torch.full_like(tensor, 7))  # as to_empty may
    assert (cache.position.item(), cache.padding.tolist(), cache._written) == (0, [0, 0], 0)
    cache.update(torch.randn(2, 2, 4, 3).double(), torch.randn(2, 2, 4, 3).double())


# --------------------------------------------------------------------------------------------------
# Tables of positions


def test_what_is_written_to_rotary_tables_changes_no_other():
    rotary = RotaryEmbedding(4)
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    expected = rotary(query, key)
    for table in rotary.tables(3):
        table.zero_()
    assert torch.equal(rotary(query, key)[0], expected[0])
    assert torch.equal(rotary.tables(3)[0][0], torch.ones(2))


def test_tables_made_of_fake_tensors_are_not_kept():
    rotary, x = RotaryEmbedding(4), torch.randn(1, 2, 3, 4)
    with FakeTensorMode() as mode:
        rotary(mode.from_tensor(x), mode.from_tensor(x))
    assert torch.equal(rotary(x, x)[0], RotaryEmbedding(4)(x, x)[0])
    with mode:
        rotary(mode.from_tensor(x), mode.from_tensor(x))


def test_rotary_embedding_turns_backwards_at_negative_positions():
    rotary = RotaryEmbedding(4)
    x = torch.randn(1, 1, 3, 4).double()
    there, _ = rotary(x, x, positions=torch.tensor([1, 5, 9]))
    back, _ = rotary(there, there, positions=torch.tensor([-1, -5, -9]))
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("positions", [(-1, 0), (0, 7), (2, -7)])
def test_positions_that_a_table_does_not_have(positions):
    message = rf"positions: expected 0 to max_len - 1 = 6, got {min(positions)} to {max(positions)}"
    with pytest.raises(ValueError, match=message):
        PositionalEncoding(4, 7)(torch.zeros(1, 2, 4), positions=torch.tensor(positions))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_positions_of_any_integer_dtype(dtype):
    layer, x = PositionalEncoding(4, 7), torch.zeros(1, 2, 4)
    expected = layer(x, positions=torch.tensor([1, 0]))
    assert torch.equal(layer(x, positions=torch.tensor([1, 0], dtype=dtype)), expected)


def test_negative_padding_of_a_cache():
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
def test_meta_tensors_go_through_a_layer_and_keep_their_shapes(name):
    make, call = CALLS[name]
    with torch.device("meta"):
        layer = make()
    out = call(layer)
    assert out.is_meta
    assert out.shape == SHAPES.get(name, (2, 8, 4, 4))
    if out.requires_grad:
        out.sum().backward()
        assert all(p.grad.is_meta for p in layer.parameters() if p.grad is not None)
