"""Losses of the models on meta tensors, as when a training is traced, or sharded before its weights exist."""

from __future__ import annotations

import pytest
from torch.utils._pytree import tree_map

from fastgen.models import MODELS
from fastgen.models.base import StepContext
from tests.models.test_contract import FIRST, batch_for, own_weights, small


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_loss_supports_meta_tensors(name):
    model = small(FIRST[name])
    batch = tree_map(lambda tensor: tensor.to("meta"), batch_for(model))
    model.to("meta")
    for phase in model.phases():
        own = own_weights(model, phase.name)
        loss = model.loss(phase.name, batch, StepContext(1, 100))["loss"]
        assert loss.is_meta
        model.zero_grad()
        loss.backward()
        grads = [weight.grad for key, weight in model.named_parameters() if key in own]
        assert grads
        assert all(grad is not None and grad.is_meta for grad in grads)
