"""Layers and models on the meta device: materialization of buffers, and shapes of outputs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastgen
from fastgen.functional import scaled_dot_product_attention
from fastgen.functional._autocast import without_autocast
from fastgen.losses import gradient_penalty
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
from fastgen.nn import KVCache, PositionalEncoding, RelativePositionBias, WindowAttention2d
from tests.tracing.calls import CASES, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")

WITH_BUFFERS = {
    "RelativePositionBias": lambda: RelativePositionBias(4),
    "RelativePositionBias, unidirectional": lambda: RelativePositionBias(4, bidirectional=False),
    "WindowAttention2d": lambda: WindowAttention2d(8, 2, (2, 3)),
    "PositionalEncoding": lambda: PositionalEncoding(5, max_len=7),
    "KVCache": lambda: KVCache(2, 2, 4, 3),
    "TransformerLM": lambda: TransformerLM(
        TransformerLMConfig(vocabulary=("a", "b", "ab"), width=8, num_heads=2, depth=1)
    ),
    "ImageTransformer": lambda: ImageTransformer(
        ImageTransformerConfig(image_size=4, levels=17, width=8, num_heads=2, depth=1)
    ),
    "ImageTransformer of words": lambda: ImageTransformer(
        ImageTransformerConfig(image_size=8, levels=17, width=8, num_heads=2, depth=1, codebook_size=4)
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


@pytest.mark.parametrize("name", CASES)
def test_functions_and_layers_support_meta_tensors(name):
    leaves = []

    def make(*sizes, dtype=None, grad=True):
        tensor = torch.empty(sizes, dtype=dtype, device="meta", requires_grad=grad and dtype is None)
        leaves.extend([tensor] if tensor.requires_grad else [])
        return tensor

    def real(*sizes, dtype=None, grad=True):
        return torch.zeros(sizes, dtype=dtype) if dtype is not None else torch.randn(sizes, requires_grad=grad)

    with torch.device("meta"):
        outputs = tensors_of(CASES[name](make))
    assert all(out.is_meta for out in outputs)
    assert [out.shape for out in outputs] == [out.shape for out in tensors_of(CASES[name](real))]
    differentiable = [out for out in outputs if out.requires_grad]
    assert differentiable or not leaves
    if differentiable:
        sum(out.sum() for out in differentiable).backward()
    assert all(leaf.grad.is_meta and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("way", ["auto", "torch", "compiled"])
def test_every_backend_supports_meta_tensors(way):
    q = torch.empty(1, 2, 3, 8, device="meta", requires_grad=True)
    with fastgen.use_backend(way):
        scaled_dot_product_attention(q, q, q).sum().backward()
    assert q.grad.is_meta


def test_without_autocast_takes_meta_tensors():
    with without_autocast(torch.device("meta")):
        pass
    with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
        assert torch.ones(2, 2).matmul(torch.ones(2, 2)).dtype == torch.float32


def test_gradient_penalties_support_meta_tensors():
    real, fake = (torch.empty(3, 4, device="meta") for _ in range(2))
    weight = torch.empty(4, 1, device="meta", requires_grad=True)
    gradient_penalty(lambda x: (x @ weight).tanh(), real, fake).backward()
    assert weight.grad.is_meta
