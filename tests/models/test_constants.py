"""Buffers that are no part of the state dict: right after construction on the meta device, moves and copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from fastgen.models import (
    FlowVAE,
    FlowVAEConfig,
    GenerativeModel,
    ImageTransformer,
    ImageTransformerConfig,
    TransformerLM,
    TransformerLMConfig,
    WaveNet,
    WaveNetConfig,
)

MODELS = {
    "flow-vae": lambda: FlowVAE(FlowVAEConfig(width=4, latent_dim=3, flow_width=5)),
    "image-transformer": lambda: ImageTransformer(ImageTransformerConfig(levels=40, width=8, num_heads=2, depth=1)),
    "transformer-lm": lambda: TransformerLM(TransformerLMConfig(("a", "b", "ab"), 8, width=8, num_heads=2, depth=1)),
    "wavenet": lambda: WaveNet(WaveNetConfig(channels=4, skip_channels=4, cycle=2, reach=5)),
}


def differing(model: GenerativeModel, good: GenerativeModel) -> list[str]:
    found: dict[str, Tensor] = dict(model.named_buffers())
    return [name for name, buffer in good.named_buffers() if not torch.equal(found[name], buffer)]


def on_meta(name: str) -> GenerativeModel:
    with torch.device("meta"):
        return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_on_the_meta_device_is_the_same_once_it_has_its_weights(name: str) -> None:
    good = MODELS[name]()
    emptied = on_meta(name)
    written = [torch.full((4096,), 7, dtype=torch.int64) for _ in range(16)]
    del written  # so that fresh memory is not zero by luck
    emptied.to_empty(device="cpu")
    emptied.load_state_dict(good.state_dict())
    assert differing(emptied, good) == []
    assigned = on_meta(name)
    assigned.load_state_dict(good.state_dict(), assign=True)
    assert differing(assigned, good) == []


@pytest.mark.parametrize("name", MODELS)
def test_constants_follow_dtypes_and_copies(name: str) -> None:
    good = MODELS[name]()
    assert differing(copy.deepcopy(good), good) == []
    assert differing(pickle.loads(pickle.dumps(good)), good) == []
    halved, expected = copy.deepcopy(good).half(), {name: buffer.clone() for name, buffer in good.named_buffers()}
    for buffer_name, buffer in halved.named_buffers():
        wanted = expected[buffer_name]
        assert torch.equal(buffer, wanted.half() if wanted.is_floating_point() else wanted)
    shared = {name: buffer.data_ptr() for name, buffer in good.named_buffers()}
    good.float()
    assert {name: buffer.data_ptr() for name, buffer in good.named_buffers()} == shared  # nothing was made anew
